"""Images with masks, looked through before they are trained on: every image and every mask is read once.

As in `mindska.data.check`, what would end a run is a fault, and what is only strange is a warning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..data.base import in_threads
from ..data.check import (
    BATCH,
    LONGEST,
    NAMED,
    SMALLEST,
    Report,
    Split,
    check_duplicates,
    check_readable,
    few_items,
    split_facts,
)
from ..data.images import open_image
from ..data.loader import default_workers, in_parallel
from ..errors import DataError, few, printable
from ..streams import unfailing_stderr
from .datasets import SegmentationDataset, open_training_and_validation
from .masks import IGNORE, MaskError, is_label, read_mask, to_labels, wrong_numbers
from .pictures import write_overlay_sheet

DOMINANT = 0.9  # share of the labelled pixels that one class has
RARE = 3  # images with a class, below which it is hardly learnt
SHOWN = 6  # images on a contact sheet


class Looked(NamedTuple):
    """What was found of one image and its mask.

    Attributes:
        checksum: of the image's content; mode, size: of its pixels, (width, height).
        unreadable: why one of the two cannot be read. fault: what is wrong with the mask.
        values, counts: the numbers in the mask's file, and how many pixels have each.
    """

    checksum: bytes = b""
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    unreadable: str = ""
    fault: str = ""
    values: Sequence[int] = ()
    counts: Sequence[int] = ()


@dataclass
class MaskedSplit(Split):
    """What was found in one set of images with masks; `counts` are of images that have the class.

    Attributes:
        pixels: class -> pixels; ignored: pixels without a class, and in all.
        numbers: number in the masks' files -> pixels.
        faults: mask -> what is wrong with it; unlabelled: images whose pixels are all ignored.
    """

    pixels: dict[str, int] = field(default_factory=dict)
    ignored: int = 0
    numbers: dict[int, int] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    unlabelled: list[str] = field(default_factory=list)


def look_at(dataset: SegmentationDataset, index: int) -> Looked:
    """Reads and decodes an image and its mask."""
    path, checksum = dataset.mask_paths[index], b""
    classes, zero = len(dataset.class_names), dataset.reduce_zero_label
    try:
        checksum = hashlib.blake2b(dataset.content(index), digest_size=16).digest()
        with open_image(dataset.paths[index]) as opened:
            mode = opened.mode
        image = dataset.load_image(index)
        numbers = read_mask(path)
    except MaskError as error:
        return Looked(checksum, mode, image.size, fault=str(error))
    except DataError as error:
        return Looked(checksum, unreadable=str(error))
    values, counts = np.unique(numbers, return_counts=True)
    fault = ""
    if image.size != numbers.shape[::-1]:
        fault = dataset.sizes_differ(index, (image.height, image.width), numbers.shape)
    elif not is_label(values, classes, zero).all():
        fault = wrong_numbers(path, values, counts, classes, zero)
    return Looked(checksum, mode, image.size, "", fault, values.tolist(), counts.tolist())


def look_through(dataset: SegmentationDataset, num_workers: Optional[int] = None) -> MaskedSplit:
    """Reads and decodes every image and every mask of a data set."""
    names, zero = dataset.class_names, dataset.reduce_zero_label
    split = MaskedSplit(len(dataset), dict.fromkeys(names, 0), pixels=dict.fromkeys(names, 0))
    batches = (range(i, min(i + BATCH, len(dataset))) for i in range(0, len(dataset), BATCH))
    bar = tqdm(total=len(dataset), unit="image", disable=None, file=unfailing_stderr(), desc=printable(dataset.split))
    with bar:
        looks = in_parallel(
            lambda index: look_at(dataset, index), batches, lambda *both: both, num_workers or default_workers()
        )
        for ids, found in looks:
            for index, looked in zip(ids, found):
                _count(split, dataset, index, looked)
            bar.update(len(ids))
    for number, count in split.numbers.items():
        if is_label(np.array([number]), len(names), zero)[0]:
            label = int(to_labels(np.array([[number]]), len(names), zero, "")[0, 0])
            if label == IGNORE:
                split.ignored += count
            else:
                split.pixels[names[label]] += count
    return split


def _count(split: MaskedSplit, dataset: SegmentationDataset, index: int, looked: Looked) -> None:
    name = dataset.describe(index)
    if looked.checksum:
        split.contents[looked.checksum].append(index)
    if looked.unreadable:
        split.unreadable[name] = looked.unreadable
        return
    split.modes[looked.mode] += 1
    split.sizes.append(looked.size)
    width, height = looked.size
    if min(width, height) < SMALLEST or max(width, height) > LONGEST * min(width, height):
        split.odd[name] = f"{width}x{height} pixels"
    if looked.fault:
        split.faults[dataset.mask_paths[index]] = looked.fault
    for value, count in zip(looked.values, looked.counts):
        split.numbers[value] = split.numbers.get(value, 0) + count
    ignored = {IGNORE, *([0] if dataset.reduce_zero_label else [])}
    classes = [value - dataset.reduce_zero_label for value in looked.values if value not in ignored]
    for number in classes:
        if 0 <= number < len(dataset.class_names):
            split.counts[dataset.class_names[number]] += 1
    if looked.values and not classes:
        split.unlabelled.append(name)


@dataclass
class MaskReport(Report):
    """As `Report`, of images with masks."""

    def __str__(self) -> str:
        lines = []
        for name, split in self.facts["splits"].items():
            lines.append(f"{name}: {split['images']:,} images with masks of {len(split['pixels']):,} classes")
            if split["size"]:
                size = split["size"]
                lines.append(
                    "  pixels: {} to {}, median {}; ".format(*("x".join(map(str, size[k])) for k in size))
                    + few(f"{count:,} {mode}" for mode, count in split["modes"].items())
                )
            labelled = sum(split["pixels"].values())
            whole = max(1, labelled + split["ignored_pixels"])
            lines.append(f"  ignored: {100 * split['ignored_pixels'] / whole:.2f} % of the pixels; of the others:")
            width = max(map(len, split["pixels"]), default=0)
            lines += [
                f"    {label:{width}}  {100 * count / max(1, labelled):6.2f} %  in {split['classes'][label]:,} images"
                for label, count in split["pixels"].items()
            ]
        lines += [f"warning: {text}" for text in self.warnings] + [f"FAULT: {text}" for text in self.faults]
        lines.append("Training would fail." if self.faults else "Training can begin.")
        return printable("\n".join(lines), keep="\n")


def check_masks(
    sets: dict[str, SegmentationDataset],
    max_damaged: float = 0.0,
    skip_damaged: bool = False,
    global_batch: int = 1,
    num_workers: Optional[int] = None,
    faults: Sequence[str] = (),
) -> MaskReport:
    """Looks through the images and masks for "train" and, where there are any, for "val".

    Args:
        max_damaged: share of the training images that may be unreadable; skip_damaged: whether the others may.
        global_batch: images of one update of a run. faults: what is known already.
    """
    report = MaskReport(list(faults))
    splits = {name: look_through(dataset, num_workers) for name, dataset in sets.items()}
    for name, split in splits.items():
        dataset = sets[name]
        report.facts["splits"][name] = dict(
            split_facts(split), pixels=split.pixels, ignored_pixels=split.ignored,
            numbers={str(number): split.numbers[number] for number in sorted(split.numbers)},
            reduce_zero_label=dataset.reduce_zero_label, faulty_masks=len(split.faults),
            faults=dict(list(split.faults.items())[:NAMED]), unlabelled_images=split.unlabelled[:NAMED],
        )  # fmt: skip
        check_readable(report, name, split, max_damaged if name == "train" else float(skip_damaged))
        if split.faults:
            report.faults.append(
                f"{name}: {len(split.faults):,} of {split.images:,} masks are not as they should be: "
                + few(split.faults.values(), 5)
            )
        try:
            dataset.check_binary(list(split.numbers), dataset.mask_paths[0])
        except MaskError as error:
            report.faults.append(f"{name}: {error}")
        _check_classes(report, name, split)
        if name == "train" and split.images < global_batch:
            report.faults.append(
                f"{name}: {split.images:,} images are fewer than one batch of {global_batch:,}; lower batch_size"
            )
        if split.odd:
            report.warnings.append(f"{name}: {len(split.odd):,} images of odd sizes: {few_items(split.odd)}")
    check_duplicates(report, dict(sets), dict(splits))
    return report


def open_for_check(name: str, data_dir: str, validation: bool = True, **options: Any) -> tuple[dict, list[str]]:
    """The sets of images with masks that can be had, by "train" and "val", and what is wrong with the others' files.

    Args:
        name, data_dir, validation, options: as of `open_training_and_validation`.
    """
    faults: list[str] = []
    for with_validation in dict.fromkeys((validation, False)):  # where both cannot be had, the training images alone
        found: list[str] = []
        try:
            both = open_training_and_validation(name, data_dir, validation=with_validation, faults=found, **options)
        except DataError as error:
            faults += [*found, str(error)]
            continue
        sets = {split: part for split, part in zip(("train", "val"), both) if part is not None}
        return sets, list(dict.fromkeys([*faults, *found]))
    return {}, list(dict.fromkeys(faults))


def _check_classes(report: MaskReport, name: str, split: MaskedSplit) -> None:
    labelled = sum(split.pixels.values())
    if split.unlabelled:
        report.warnings.append(
            f"{name}: {len(split.unlabelled):,} images have no labelled pixel ({IGNORE} is ignored): "
            f"{few(split.unlabelled, 5)}"
        )
    if not labelled:
        report.faults.append(f"{name}: no mask has a pixel of a class: there is nothing to learn")
        return
    empty = [label for label, count in split.pixels.items() if not count]
    if empty:
        effect = "they cannot be learnt" if name == "train" else "they have no IoU unless they are predicted"
        report.warnings.append(f"{name}: {len(empty):,} classes have no pixel, {effect}: {few(map(repr, empty))}")
    most = max(split.pixels, key=lambda label: split.pixels[label])
    if len(split.pixels) - len(empty) == 1 and name == "train":
        report.faults.append(f"{name}: all labelled pixels are of one class ({most}): there is nothing to learn")
        return
    if split.ignored > labelled:
        report.warnings.append(
            f"{name}: {100 * split.ignored / (split.ignored + labelled):.1f} % of the pixels are ignored: is {IGNORE} "
            f"or, with reduce_zero_label, 0 a class in these masks?"
        )
    if split.pixels[most] >= DOMINANT * labelled:
        report.warnings.append(
            f"{name}: {most} has {100 * split.pixels[most] / labelled:.1f} % of the labelled pixels: look at the IoU "
            f"of the other classes, not at aAcc"
        )
    rare = [label for label, count in split.counts.items() if 0 < count < RARE]
    if rare and name == "train":
        report.warnings.append(f"{name}: {len(rare):,} classes are in fewer than {RARE} images: {few(rare)}")


def write_sheet(path: Path, dataset: SegmentationDataset) -> int:
    """Writes a contact sheet: some images, evenly from the first to the last, and their masks over them.

    Raises:
        SettingError, WriteError: as of `write_overlay_sheet`.
    """
    some = np.unique(np.linspace(0, len(dataset) - 1, min(SHOWN * 2, len(dataset))).astype(int))

    def row(index: int) -> Optional[tuple[str, Image.Image, dict[str, np.ndarray]]]:
        try:
            image, labels = dataset.load(index)
        except DataError:
            return None
        return dataset.member(index)[0].rpartition("/")[2], image, dict(mask=labels)

    rows = [each for each in in_threads(row, [int(index) for index in some]) if each is not None]
    return write_overlay_sheet(path, rows, dataset.class_names, str(dataset))
