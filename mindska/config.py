"""Typed configuration: a YAML file, then the command line on top of it. An unknown key is an error.

The names are MindCV's where MindCV has one, timm's otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import yaml

from .errors import SettingError

Numbers = tuple[float, ...]


class ConfigError(SettingError):
    """A setting that is unknown or out of range; the message says what was found, what was expected, what to do."""


def _option(default: Any, help: str, choices: Optional[Sequence] = None, heading: str = "") -> Any:
    """A setting; in --help it stands under `heading`, as those after it do."""
    return field(default=default, metadata={"help": help, "choices": choices, "heading": heading})


@dataclass(frozen=True)
class Config:
    """Everything that a run can be told. `None` where a default depends on the model or the machine."""

    device_target: str = _option(
        "auto",
        "where to run; auto takes what this MindSpore was built for",
        ("auto", "CPU", "GPU", "Ascend"),
        heading="machine",
    )
    mode: str = _option("graph", "compile the network (graph) or interpret it (pynative)", ("graph", "pynative"))
    distribute: Optional[bool] = _option(None, "MindCV's switch; not needed: mpirun or msrun is noticed. true: insist")
    seed: int = _option(42, "seed of initial values, data order, augmentation and stochastic layers")

    model: str = _option(
        "", "name in MindCV's factory; validate: default, the one that the checkpoint names", heading="model"
    )
    num_classes: Optional[int] = _option(None, "classes; default: as many as the data has")
    pretrained: bool = _option(False, "start from published MindSpore weights, where there are any")
    ckpt_path: str = _option(
        "", "start from (train) or evaluate (validate) these weights: MindSpore, PyTorch, safetensors, Caffe"
    )
    use_ema: Optional[bool] = _option(
        None, "of ckpt_path: the averaged (EMA) weights, or (false) the raw ones; default: averaged where there are any"
    )
    drop_rate: Optional[float] = _option(None, "dropout before the classifier; default: the model's")
    drop_path_rate: Optional[float] = _option(None, "stochastic depth of the last block; default: the model's")

    dataset: str = _option(
        "imagenet",
        "folders of images, or CIFAR in its binary format",
        ("imagenet", "cifar10", "cifar100"),
        heading="data",
    )
    data_dir: str = _option("", "folder that holds train/ and val/ (or CIFAR's files)")
    train_split: str = _option("train", "subfolder with the training images")
    val_split: str = _option("val", "subfolder with the validation images")
    batch_size: int = _option(128, "images per device and step")
    num_parallel_workers: Optional[int] = _option(
        None, "data worker threads per process; default: its share of the cores, at least two"
    )

    max_damaged: float = _option(0.01, "share of the training images that may be unreadable; others replace them")
    val_skip_damaged: bool = _option(False, "leave unreadable validation images out, and say so, instead of failing")

    image_resize: Optional[tuple[int, ...]] = _option(
        None,
        "network input size in pixels: one number, or height width",
        heading="pixels (defaults come with the model)",
    )
    crop_pct: Optional[float] = _option(None, "share of the resized image that the evaluation's centre crop keeps")
    interpolation: Optional[str] = _option(None, "resize filter", ("bilinear", "bicubic", "nearest", "lanczos"))
    mean: Optional[Numbers] = _option(None, "mean of the three channels, on a scale of 0 to 1")
    std: Optional[Numbers] = _option(None, "standard deviation of the three channels, on a scale of 0 to 1")

    scale: Numbers = _option((0.08, 1.0), "share of the area that a random crop takes, from to", heading="augmentation")
    ratio: Numbers = _option((0.75, 1.3333333333333333), "aspect ratio of a random crop, from to")
    pad_crop: int = _option(0, "pad by so many pixels and crop at the image's own size, instead of scale and ratio")
    hflip: float = _option(0.5, "probability of a horizontal flip")
    vflip: float = _option(0.0, "probability of a vertical flip")
    color_jitter: Optional[Numbers] = _option(
        None, "strength of brightness, contrast, saturation; not with auto_augment"
    )
    auto_augment: Optional[str] = _option(None, "RandAugment and relatives, e.g. randaug-m9-mstd0.5-inc1")
    re_prob: float = _option(0.0, "probability of random erasing")
    re_scale: Numbers = _option((0.02, 0.33), "share of the area that is erased, from to")
    re_ratio: Numbers = _option((0.3, 3.3), "aspect ratio of what is erased, from to")
    re_value: str = _option(
        "random", "what erased pixels become: normal noise, or the mean colour", ("random", "const")
    )
    mixup: float = _option(0.0, "mixup's alpha; 0: off")
    cutmix: float = _option(0.0, "cutmix's alpha; 0: off")
    cutmix_prob: float = _option(1.0, "probability that a batch is mixed at all")
    mixup_switch_prob: float = _option(0.5, "probability of cutmix rather than mixup when both are on")
    aug_repeats: int = _option(0, "repeated augmentation: copies of each image in an epoch; 0: off")

    epoch_size: int = _option(300, "epochs in all, cooldown included", heading="optimisation")
    opt: str = _option("adamw", "optimiser", ("adamw", "adam", "sgd", "momentum", "lion"))
    lr: float = _option(1e-3, "highest learning rate")
    beta1: float = _option(0.9, "first decay of adamw, adam and lion")
    beta2: float = _option(0.999, "second decay of adamw, adam and lion")
    momentum: float = _option(0.9, "momentum of sgd and momentum")
    weight_decay: float = _option(0.05, "weight decay")
    weight_decay_filter: str = _option(
        "norm_and_bias",
        "norm_and_bias: none on biases and other 1-D parameters; disable: on all",
        ("norm_and_bias", "disable"),
    )
    scheduler: str = _option("cosine_decay", "learning-rate schedule", ("cosine_decay", "step_decay", "constant"))
    min_lr: float = _option(1e-6, "lowest learning rate of the cosine, and of the cooldown")
    warmup_epochs: int = _option(5, "epochs of linear warm-up")
    warmup_lr: float = _option(1e-6, "learning rate at the start of the warm-up")
    cooldown_epochs: int = _option(0, "epochs at min_lr in the end")
    decay_epochs: int = _option(30, "epochs between two steps of step_decay")
    decay_rate: float = _option(0.1, "factor of step_decay")
    lr_epoch_stair: bool = _option(True, "the learning rate changes at epochs only (as in timm), not at every step")
    loss: str = _option("CE", "loss function", ("CE", "BCE"))
    label_smoothing: float = _option(0.1, "label smoothing")
    clip_grad: bool = _option(False, "clip the gradients' global norm")
    clip_value: float = _option(5.0, "largest global norm, with clip_grad")
    gradient_accumulation_steps: int = _option(1, "batches that make one update")
    ema: bool = _option(False, "average the weights, and evaluate the average")
    ema_decay: float = _option(0.9998, "share of the old value that the average keeps at each update")

    amp_level: str = _option(
        "O0", "mixed precision, as in mindspore.amp", ("O0", "O2", "O3", "auto"), heading="precision"
    )
    loss_scale_type: str = _option("fixed", "fixed or dynamic loss scale", ("fixed", "dynamic"))
    loss_scale: float = _option(1.0, "loss scale (initial, when dynamic)")
    dataset_sink_mode: bool = _option(False, "feed batches through the device's queue (GPU and Ascend)")

    ckpt_save_dir: str = _option("output", "folder for checkpoints, metrics, curves", heading="record")
    resume: bool = _option(True, "go on from the newest good checkpoint in ckpt_save_dir; false: refuse to touch a run")
    keep_checkpoint_max: int = _option(3, "best checkpoints to keep (besides the newest two)")
    ckpt_save_interval: int = _option(1, "epochs between checkpoints")
    ckpt_save_steps: int = _option(0, "steps between further checkpoints within an epoch; 0: none")
    val_while_train: bool = _option(True, "evaluate during training")
    val_interval: int = _option(1, "epochs between evaluations")
    log_interval: int = _option(50, "steps between rows of metrics.csv")
    max_skipped_steps: int = _option(50, "stop after so many updates in a row without a finite loss")
    result_json: str = _option("", "validate: write the results to this file")

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            choices, value = entry.metadata["choices"], getattr(self, entry.name)
            if choices and value is not None and value not in choices:
                raise ConfigError(f"{entry.name} is {value!r}; expected one of {', '.join(map(str, choices))}")
        for name in ("batch_size", "epoch_size", "gradient_accumulation_steps", "log_interval", "val_interval",
                     "ckpt_save_interval", "max_skipped_steps", "decay_epochs"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("hflip", "vflip", "re_prob", "cutmix_prob", "mixup_switch_prob", "label_smoothing", "max_damaged"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a share between 0 and 1")
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            numbers = value if isinstance(value, tuple) else (value,)
            if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                raise ConfigError(f"{entry.name} is {value}; expected a finite number")
            if entry.name not in ("std", "mean") and any(
                isinstance(number, (int, float)) and number < 0 for number in numbers
            ):
                raise ConfigError(f"{entry.name} is {value}; expected 0 or more")
        if self.num_parallel_workers == 0:
            raise ConfigError("num_parallel_workers is 0; expected at least 1")
        for name in ("lr", "loss_scale", "clip_value"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a positive number")
        for name in ("ema_decay", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a number in [0, 1)")
        if self.warmup_epochs + self.cooldown_epochs >= self.epoch_size:
            raise ConfigError(
                f"epoch_size is {self.epoch_size}, but warm-up ({self.warmup_epochs}) and cooldown "
                f"({self.cooldown_epochs}) leave no epoch between them; raise epoch_size or lower them"
            )
        if self.image_resize is not None and (len(self.image_resize) not in (1, 2) or min(self.image_resize) < 1):
            raise ConfigError(f"image_resize is {self.image_resize}; expected one size in pixels, or height and width")
        if self.color_jitter is not None and self.auto_augment is not None:
            raise ConfigError("color_jitter and auto_augment exclude each other; set one of them to null")


TYPES: dict[str, Any] = typing.get_type_hints(Config)


def _convert(name: str, value: Any, expected: Any, source: str) -> Any:
    """`value` as type `expected`; ConfigError when it is something else."""
    if typing.get_origin(expected) is Union:  # Optional[X]
        if value is None:
            return None
        expected = typing.get_args(expected)[0]
    if typing.get_origin(expected) is tuple:
        item = typing.get_args(expected)[0]
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(name, v, item, source) for v in values)
    if expected is float and isinstance(value, str):
        try:  # YAML reads 1e-3 (without a point) as a string
            return float(value)
        except ValueError:
            pass
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, expected) and not (expected in (int, float) and isinstance(value, bool)):
        return value
    raise ConfigError(f"{source}: {name} is {value!r}; expected {getattr(expected, '__name__', expected)}")


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, TYPES, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def read_yaml(path: Union[str, Path]) -> dict[str, Any]:
    """Settings of a recipe, checked; only plain YAML is read."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"No configuration file at {path.absolute()}")
    try:
        if path.stat().st_size > 1_000_000:
            raise ConfigError(f"{path} has {path.stat().st_size:,} bytes; expected at most 1,000,000")
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > 10:
                raise ConfigError(f"{path} is not plain YAML: it is nested too deeply")
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"{path} is not plain YAML: it has aliases (*NAME), which may multiply without end")
        loaded = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not plain YAML: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds a {type(loaded).__name__}; expected lines of `key: value`")
    for key in loaded:
        if key not in TYPES:
            raise ConfigError(f"{path}: unknown key {key!r}{_nearest(str(key))}")
    return {key: _convert(key, value, TYPES[key], str(path)) for key, value in loaded.items()}


def _parse_text(name: str, text: str) -> Any:
    """A command-line word as the type of option `name`."""
    try:
        # A path or a name stays what it is, even one that looks like a number; the rest is read as YAML reads it.
        value = text if TYPES[name] is str else yaml.safe_load(text)
        return _convert(name, value, TYPES[name], "command line")
    except (ConfigError, yaml.YAMLError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_args(arguments: Optional[Sequence[str]] = None, description: str = "") -> Config:
    """Configuration from `--config FILE` and one `--key value` for each setting; the command line wins.

    Several numbers are written with commas or spaces: `--image_resize 256,192`. A bare flag means true: `--ema`.
    Exits with status 2 and a message when something is wrong.
    """
    parser = group = argparse.ArgumentParser(
        usage="%(prog)s [--config FILE] [--key value ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", metavar="FILE", help="recipe in YAML; the options below go on top of it")
    for entry in dataclasses.fields(Config):
        if entry.metadata["heading"]:
            group = parser.add_argument_group(entry.metadata["heading"])
        choices = entry.metadata["choices"]
        text = entry.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")
        text += f" [{entry.default}]" if entry.default not in (None, "") else ""
        extra: dict[str, Any] = {}
        if TYPES[entry.name] in (bool, Optional[bool]):
            extra = dict(nargs="?", const="true", metavar="true|false")
        elif "tuple" in str(TYPES[entry.name]):
            extra = dict(nargs="+", metavar="N")
        group.add_argument(
            f"--{entry.name}", default=argparse.SUPPRESS, help=text.replace("%", "%%"), **{"metavar": "X", **extra}
        )
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_nearest(unknown[0].lstrip('-'))}")
    namespace = vars(known)
    try:
        path = namespace.pop("config")
        settings = read_yaml(path) if path else {}
        for name, text in namespace.items():
            if isinstance(text, list):  # several numbers
                text = "null" if text == ["null"] else "[" + ",".join(text) + "]"
            settings[name] = _parse_text(name, text)
        return Config(**settings)
    except (ConfigError, argparse.ArgumentTypeError) as error:
        parser.error(str(error))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings in which two configurations differ, one line each."""
    keys = sorted(set(old) | set(new))
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain values (tuples become lists), for JSON and YAML."""
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()
    }
