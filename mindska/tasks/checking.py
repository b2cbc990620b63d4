"""What `mindska check_data` looks at, by task."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional

from .. import builders
from ..config import Config
from ..data import check as classification
from ..detection import check as detection
from ..errors import DataError
from ..segmentation import check as segmentation


@dataclass(frozen=True)
class Found:
    """A report, its text, and what writes a sheet of pictures (path -> how many), where there are images."""

    report: Any
    text: str
    write_sheet: Optional[Callable[[Path], int]]


def check_data(config: Config, options: Namespace) -> Found:
    """Looks through the data that a configuration names; options: of the command."""
    look = dict(classification=_classification, segmentation=_segmentation, detection=_detection)
    return look[config.task or ""](config, options)


def _global_batch(config: Config, options: Namespace) -> int:
    known = config.model or config.batch_size != Config.batch_size
    return config.batch_size * options.world_size if known else 1


def _classification(config: Config, options: Namespace) -> Found:
    sets: dict[str, Any] = {}
    faults: list[str] = []
    # Where the two do not fit together, the training images are looked through alone.
    for validation in (config.val_while_train, False):
        try:
            train, val = builders.open_training_data(config, validation)
            sets = {"train": train, **({"val": val} if val is not None else {})}
            break
        except DataError as error:
            faults.append(str(error))
    if not sets:
        report = classification.Report(list(dict.fromkeys(faults)))
        return Found(report, str(report), None)
    batch = _global_batch(config, options)
    workers = config.num_parallel_workers
    report = classification.check(sets, config.max_damaged, config.val_skip_damaged, batch, workers, faults)
    return Found(report, str(report), lambda path: classification.write_sheet(path, sets["train"]))


def _segmentation(config: Config, options: Namespace) -> Found:
    names = (
        "data_dir", "train_split", "val_split", "val_ratio", "val_seed", "class_map", "reduce_zero_label",
        "exif_orientation", "allow_outside_data_dir",
    )  # fmt: skip
    chosen: dict[str, Any] = {name: getattr(config, name) for name in names}
    sets, faults = segmentation.open_for_check(config.dataset or "", validation=config.val_while_train, **chosen)
    batch, workers = _global_batch(config, options), config.num_parallel_workers
    report = segmentation.check_masks(sets, config.max_damaged, config.val_skip_damaged, batch, workers, faults)
    return Found(report, str(report), (lambda path: segmentation.write_sheet(path, sets["train"])) if sets else None)


def _detection(config: Config, options: Namespace) -> Found:
    sets, faults = detection.open_sets(
        config.data_dir,
        dict(train=config.train_split, val=config.val_split if config.val_while_train else ""),
        dict(train=config.train_images, val=config.val_images),
        masks=options.masks,
        skip_missing=config.skip_missing,
        exif_orientation=config.exif_orientation,
    )
    report = detection.check_objects(sets, config.max_boxes, config.max_damaged, faults, config.num_parallel_workers)
    first = next(iter(sets.values()), None)
    return Found(report, str(report), (lambda path: detection.write_sheet(path, first)) if first else None)
