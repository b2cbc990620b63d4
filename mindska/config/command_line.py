"""A recipe, then the command line on top of it; and what a command can check before it loads MindSpore."""

from __future__ import annotations

import argparse
import dataclasses
import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import yaml

from .. import mindcv_recipes, names
from ..arguments import Parser, nearest
from ..errors import ConfigError
from ..files import check_writable, exists
from .recipe_files import read_yaml
from .settings import TYPES, VALIDATION, Config, converted


def _parse_text(name: str, text: str) -> Any:
    """A command-line word as the type of option `name`."""
    try:
        # A path or a name stays what it is, even one that looks like a number; the rest is read as YAML reads it.
        value = mindcv_recipes.value(name, text if TYPES[name] is str else yaml.safe_load(text))
        return converted(name, value, TYPES[name], "command line")
    except (ValueError, yaml.YAMLError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_args(arguments: Optional[Sequence[str]] = None, description: str = "", command: str = "") -> Config:
    """Configuration from `--config FILE` and one `--key value` for each setting; the command line wins.

    Several numbers are written with commas or spaces: `--image_resize 256,192`. A bare flag means true: `--ema`.
    Exits with status 2 and a message when something is wrong.

    Args:
        command: whose settings --help shows: "train" or "validate"; all are understood. Default: it shows all.
    """
    parser = Parser(usage="%(prog)s [--config RECIPE] [--key value ...]", description=description, allow_abbrev=False)
    parser.add_argument(
        "-c", "--config", metavar="RECIPE",
        help="name of a recipe (`mindska recipes` lists them) or YAML file; the options below go on top of it",
    )  # fmt: skip
    parser.add_argument(
        "--ignore_unknown", action="store_true", help="pass over keys of MindCV's recipes that have no meaning here"
    )
    add_argument = parser.add_argument
    for entry in dataclasses.fields(Config):
        if entry.metadata["heading"]:
            add_argument = parser.add_argument_group(entry.metadata["heading"]).add_argument
        choices = entry.metadata["choices"]
        text = entry.metadata["help"] + (f" ({', '.join(map(str, choices))})" if choices else "")
        text += f" [{entry.default}]" if entry.default not in (None, "", ()) else ""
        extra: dict[str, Any] = {}
        if TYPES[entry.name] in (bool, Optional[bool]):
            extra = dict(nargs="?", const="true", metavar="true|false")
        elif "tuple" in str(TYPES[entry.name]):
            extra = dict(nargs="+", metavar=entry.metadata.get("metavar", "N"))
        elif entry.name == "ckpt_path":
            extra = dict(nargs="+", metavar="FILE")
        shown = argparse.SUPPRESS if command == "validate" and entry.name not in VALIDATION else text.replace("%", "%%")
        add_argument(f"--{entry.name}", default=argparse.SUPPRESS, help=shown, **{"metavar": "X", **extra})
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{nearest(name, TYPES)}")
    namespace = vars(known)
    try:
        path, ignore_unknown = namespace.pop("config"), namespace.pop("ignore_unknown")
        settings = read_yaml(path, ignore_unknown) if path else {}
        if "ckpt_path" in namespace:
            first, *more = matching(namespace["ckpt_path"])
            namespace.update(ckpt_path=first, **({"more_ckpt_paths": more} if more else {}))
        for name, text in namespace.items():
            if name == "more_ckpt_paths":
                settings[name] = tuple(text)
                continue
            if isinstance(text, list):  # several numbers
                text = "null" if text == ["null"] else "[" + ",".join(text) + "]"
            settings[name] = _parse_text(name, text)
        return Config(**settings)
    except (ConfigError, argparse.ArgumentTypeError) as error:
        parser.error(str(error))


def matching(paths: Sequence[str]) -> list[str]:
    """Paths as a shell reads them, for where none does: `~`, and patterns such as `run/*.ckpt`, whose files are sorted.

    What is there stays as it is, and so does a pattern that nothing matches.
    """
    found: list[str] = []
    for path in map(os.path.expanduser, paths):
        names = [] if exists(path) else sorted(glob.glob(path))  # noqa: PTH207 - as text
        found += names or [path]
    return found


def check_given(config: Config, *needed: str) -> None:
    """Checks what a command needs, before it loads MindSpore: settings that it cannot do without, and their paths.

    Raises:
        ConfigError: one of `needed` is empty, a file or folder is missing, or no model is called so.
    """
    what = dict(
        data_dir="data_dir is not set: name the folder that holds the images, e.g. --data_dir DATA",
        model="model is not set: name one, or take a recipe (`mindska recipes` lists them)",
        ckpt_path="the command needs --ckpt_path: the weights to evaluate",
    )
    if config.more_ckpt_paths and "model" in needed:
        raise ConfigError(
            f"ckpt_path names {1 + len(config.more_ckpt_paths)} files; a run starts from one (validate takes several)"
        )
    for name in dict.fromkeys((*needed, "data_dir")):
        value = getattr(config, name)
        if name == "data_dir" and not value and config.train_split.lower().endswith(".csv"):
            continue  # the paths are relative to the list
        if not value and name in needed and name in what:
            raise ConfigError(what[name])
        if value and name == "data_dir" and not exists(value):
            raise ConfigError(f"No data folder at {Path(value).absolute()}")
    if config.model:
        names.check_model(config.model)
        names.check_parts(config.model, config.freeze)
    if config.class_map and not exists(config.class_map):
        raise ConfigError(f"No class map at {Path(config.class_map).absolute()}")
    resumes = "ckpt_path" not in needed and any(Path(config.ckpt_save_dir).glob("*.ckpt"))  # it needs it no more
    for path in (config.ckpt_path, *config.more_ckpt_paths) if config.ckpt_path and not resumes else ():
        if not exists(path):
            raise ConfigError(f"No checkpoint at {Path(path).absolute()}")


def check_results(config: Config) -> None:
    """Whether what the command is to write can be written: before the work.

    Raises:
        ConfigError: a file that is of one checkpoint is asked for several.
        WriteError: one cannot be written.
    """
    of_several = ("result_csv", "corruptions_plot", *(("result_json",) if config.corruptions else ()))
    for name in ("result_json", "result_csv", "class_csv", "details", "corruptions_plot"):
        path = getattr(config, name)
        if path and config.more_ckpt_paths and name not in of_several:
            raise ConfigError(
                f"{name} is of one checkpoint, ckpt_path names {1 + len(config.more_ckpt_paths)}; --result_csv FILE "
                f"has a row for each"
            )
        if path:
            check_writable(Path(path))
    for name in ("class_csv", "details", "real_labels"):
        if config.corruptions and getattr(config, name):
            raise ConfigError(f"{name} is of images as they are; with corruptions, leave it out")
    if config.corruptions_plot and Path(config.corruptions_plot).suffix not in (".png", ".pdf", ".svg"):
        raise ConfigError(
            f"corruptions_plot is {config.corruptions_plot}; expected a name that ends in .png, .pdf or .svg"
        )
    if config.real_labels and not exists(config.real_labels):
        raise ConfigError(f"No file of labels at {Path(config.real_labels).absolute()}")
