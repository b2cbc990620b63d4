"""Whether and from where a run goes on: its own checkpoints, its settings, its environment, its data."""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional, Union

import mindcv
import mindspore as ms
import numpy as np
import PIL

from .. import kernels
from ..config import Config, differences, settings_that, to_dict
from ..data.datasets import Dataset
from ..errors import RunError, SettingError, WeightsError
from ..evaluation import Evaluator
from ..models.factory import own_preprocessing
from ..weights import non_default_options
from .folder import RunFolder
from .optim import learning_rates, total_updates
from .state import State, read_state

log = logging.getLogger("mindska")

PIXELS = dict(  # setting -> field of the record's preprocessing
    image_resize="image_size", crop_pct="crop_pct", interpolation="interpolation", mean="mean", std="std"
)
# What settings.json says besides the settings, compared elsewhere or not at all.
FACTS_OF_RUN = {"run_id", "first_save", "environment", "train_set", "step"}
LENGTH = ("epoch_size", "max_steps")  # the settings that say how long a run is
SHOWN = 10  # differences that a message names


def environment() -> dict[str, str]:
    """What may change a run's numbers though its settings are equal: versions, operators, device, mode, processor.

    The number of threads is not among it: the results are the same to the bit.
    """
    found = dict(
        mindspore=ms.__version__,
        mindcv=mindcv.__version__,
        numpy=np.__version__,
        pillow=PIL.__version__,
        operators=kernels.fingerprint(),
        device_target=ms.get_context("device_target"),
        mode="graph" if ms.get_context("mode") == ms.GRAPH_MODE else "pynative",
    )
    return dict(found, processor=_processor()) if found["device_target"] == "CPU" else found


def _processor() -> str:
    """The processor's name and kinds of vectors: libraries choose their code by them."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}".strip()
    name = re.search(r"^model name\s*: *(.*)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: *(.*)$", text, re.MULTILINE)
    vectors = sorted({flag for flag in flags[1].split() if re.match("avx|fma|amx|asimd|sve", flag)} if flags else ())
    return " ".join([name[1].strip() if name else platform.machine(), *vectors])


def identity(dataset: Union[Dataset, Evaluator]) -> dict[str, Any]:
    """What tells a set of images from another; see `mindska.data.ImageDataset.identity`. Or what scores are of.

    Raises:
        RunError: images are not there any more.
    """
    try:
        return dataset.identity()
    except OSError as error:
        raise RunError(f"{error.filename}: {error.strerror}; is the data folder still there?") from error


def effective_settings(config: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Settings with the values that they came to, by the record of the network: the size of the input and the like, and
    the number of classes, may be left to the model and the data."""
    known = dict(config)
    pixels = record.get("preprocessing") or {}
    known.update({name: pixels[field] for name, field in PIXELS.items() if field in pixels})
    if "mean" in pixels:
        known["in_channels"] = len(pixels["mean"])
    known["num_classes"] = record.get("num_classes") or config.get("num_classes")
    return json.loads(json.dumps(known))


def settings_of_checkpoint(record: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's record says of the settings of its run, by the names of settings.json; and its step."""
    known = dict(
        effective_settings(record["config"], record), world_size=record["world_size"], step=record["progress"]["step"]
    )
    known.update({name: record[name] for name in ("class_names", "environment", "train_set") if name in record})
    return known


def own_checkpoints(folder: RunFolder, settings: dict[str, Any], quiet: bool = False) -> Iterator[State]:
    """The readable checkpoints of the folder's run, newest first.

    The run is that of settings.json; where this does not say it, that of the newest checkpoint.
    """
    say = log.debug if quiet else log.warning
    run, known = settings.get("run_id"), "run_id" in settings
    for entry in folder.saved():
        try:
            state = read_state(entry)
        except WeightsError as error:
            say("Skipping a checkpoint that cannot be used: %s", error)
            continue
        if not known:
            known, run = True, state.record.get("run_id")
        if state.record.get("run_id") == run:
            yield state
        else:
            say("Skipping a checkpoint that another run wrote: %s", entry.path)


def resumed_record(config: Config) -> dict[str, Any]:
    """The record of the checkpoint from which a run of this configuration goes on; empty when it begins.

    What a network is made like, and how its images are prepared, is in there: the weights from which the run began
    need not be there any more.
    """
    if not (config.resume and config.ckpt_save_dir and config.model):
        return {}
    folder = RunFolder(Path(config.ckpt_save_dir), config.model, config.keep_checkpoint_max)
    state = next(own_checkpoints(folder, read_settings(folder), quiet=True), None)
    if state is None:
        return {}
    try:
        non_default_options(config.model, state.record.get("network", {}))
    except KeyError as error:
        raise RunError(f"{state.path} was trained with an option that {config.model} does not have: {error}") from None
    return dict(state.record, preprocessing=state.record.get("preprocessing") or own_preprocessing(config.model))


def read_settings(folder: RunFolder) -> dict[str, Any]:
    """The settings that the folder's run was started with; empty when they are missing or damaged.

    Raises:
        RunError: they cannot be read.
    """
    try:
        return folder.settings()
    except OSError as error:
        raise RunError(f"{folder.folder / 'settings.json'} cannot be read: {error.strerror}") from error


def check_same_settings(folder: Path, old: dict[str, Any], new: dict[str, Any], at_epoch: bool) -> None:
    """Checks that a run goes on with the settings that it had; those that old versions did not have had their defaults.

    Raises:
        RunError: others than may change are different.
    """
    old = {**{name: value for name, value in to_dict(Config()).items() if name not in old}, **old}
    ignored = FACTS_OF_RUN | settings_that("may_change") | settings_that("first_start")
    ignored |= {"images", "class_names"} - set(old)  # where only a checkpoint tells
    batches = [tuple(settings.get(name) for name in ("batch_size", "world_size")) for settings in (old, new)]
    sizes = [a * b if isinstance(a, int) and isinstance(b, int) else None for a, b in batches]
    if at_epoch and sizes[0] == sizes[1] is not None and not (new["mixup"] or new["cutmix"]):
        # The same global batches on another number of ranks: sound at the boundary of an epoch. But mixing pairs the
        # samples of one rank.
        ignored |= {"batch_size", "world_size"}
    if old.get("train_set") == new["train_set"]:
        ignored |= {"dataset", "train_split"}  # written otherwise, they name the same images
    changed = [line for line in differences(old, new) if line.split(":")[0] not in ignored]
    if changed:
        raise RunError(
            f"{folder} holds a run with other settings:\n  "
            + "\n  ".join(changed[:SHOWN])
            + (f"\n  and {len(changed) - SHOWN} more" if len(changed) > SHOWN else "")
            + "\nGo on with those, or choose another --ckpt_save_dir."
        )
    if old.get("world_size") != new["world_size"]:
        log.info("Going on with %d instead of %s ranks", new["world_size"], old.get("world_size"))
    if old.get("train_set") not in (None, new["train_set"]):
        log.info("The training images are not quite those of before: names, sizes or labels of some differ")


def check_length(folder: Path, old: dict[str, Any], config: Config, steps_per_epoch: int) -> None:
    """Checks that a run may go on with another number of epochs or of updates.

    It may where its learning rates so far are those that the longer (or shorter) run would have had, so that nothing
    tells it from that run; or where `extend` asks for the new length's schedule from here on.

    Raises:
        RunError: they are others, or the run is longer already.
    """
    name = "max_steps" if config.max_steps else "epoch_size"
    known: dict[str, Any] = {each: old.get(each, getattr(config, each)) for each in LENGTH}
    before, after, step = known[name], getattr(config, name), old.get("step", 0)
    if known == {each: getattr(config, each) for each in LENGTH}:
        return
    updates = step // config.gradient_accumulation_steps
    unit = "updates" if config.max_steps else "epochs"
    done = str(updates) if config.max_steps else f"{step / steps_per_epoch:.4g}"
    if updates > total_updates(config, steps_per_epoch):
        raise RunError(
            f"{folder} holds a run of {done} {unit}, and {name} is {after} now. Raise it, or choose another "
            f"--ckpt_save_dir"
        )
    rates = learning_rates(config, steps_per_epoch)[:updates]
    try:
        same = learning_rates(dataclasses.replace(config, **known), steps_per_epoch)[:updates] == rates
    except (SettingError, TypeError):  # what the folder says is no such setting
        same = False
    if same:
        log.info("%s: %s -> %d: the learning rates so far are those of the new length; going on", name, before, after)
    elif config.extend:
        log.info(
            "%s: %s -> %d: after %s %s, the learning rates are those of a run of %d %s from here on (extend)",
            name, before, after, done, unit, after, unit,
        )  # fmt: skip
    else:
        raise RunError(
            f"{folder} holds a run of another length ({name}: {before} -> {after}), and its rates depend on "
            f"it ({config.scheduler}): for {done} {unit} they were not those of a run of {after} {unit}. --extend "
            f"goes on with those of a run of {after} {unit} from here on. Or begin another run from its weights, with "
            f"--ckpt_path {folder / (config.model + '_best.ckpt')} and another --ckpt_save_dir"
        )


def check_same_environment(folder: Path, old: Optional[Any], new: dict[str, str], allowed: bool) -> None:
    """Checks that nothing else may change the run's numbers; says what is different where it is allowed to be.

    Raises:
        RunError: it is different, and not allowed to be.
    """
    if not isinstance(old, dict):
        log.info(
            "The run so far did not record its environment (an earlier version): whether it was this one is unknown"
        )
        return
    changed = differences(old, new)[:SHOWN]
    if changed and not allowed:
        raise RunError(
            f"{folder} holds a run in another environment:\n  "
            + "\n  ".join(changed)
            + "\nIts numbers may differ in their last digits, so that it would not end as the uninterrupted run. Go on "
            "in that environment, or with --allow_other_environment, or choose another --ckpt_save_dir."
        )
    for line in changed:
        log.info("Going on in another environment: %s", line)


def say_initial_weights(settings: dict[str, Any], given: Config) -> None:
    """Says that weights which the command names are not used, where they are not those that the run began with."""
    if given.ckpt_path and given.ckpt_path != settings.get("ckpt_path"):
        log.info(
            "--ckpt_path %s is not used: the run began with %s, and goes on from its own checkpoint",
            given.ckpt_path, settings.get("ckpt_path") or "random weights",
        )  # fmt: skip
