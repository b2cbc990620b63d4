"""A data set, looked through before it is trained on: every image is read and decoded once.

What would end a training run is a fault; what is only strange is a warning.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
from tqdm import tqdm

from ..errors import DataError, few, printable
from ..streams import unfailing_stderr
from .base import ImageDataset
from .contact_sheet import MOST, Picture, write_contact_sheet
from .loader import default_workers, in_parallel

log = logging.getLogger("mindska")

USUAL_MODES = {"RGB", "L"}
IMBALANCE = 10  # times as many images in the largest class as in the smallest
FEW = 5  # images of a class below which it is hardly learnt
SMALLEST = 16  # pixels of the shorter side
LONGEST = 5  # times as long as wide
NAMED = 100  # images that a report names of each kind
BATCH = 64


@dataclass
class Split:
    """What was found in one set of images.

    Attributes:
        counts: class -> images. unreadable: image -> why. modes: Pillow's name of the pixels' kind -> images.
        sizes: (width, height) of the readable images; odd: image -> what is unusual about it.
        contents: checksum of an image's content -> the images that have it, by their numbers.
    """

    images: int
    counts: dict[str, int]
    unreadable: dict[str, str] = field(default_factory=dict)
    modes: Counter[str] = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    odd: dict[str, str] = field(default_factory=dict)
    contents: dict[bytes, list[int]] = field(default_factory=lambda: defaultdict(list))


def look_through(dataset: ImageDataset, num_workers: Optional[int] = None) -> Split:
    """Reads and decodes every image of a data set."""
    names = dataset.class_names
    counts = np.bincount(dataset.labels, minlength=len(names))
    split = Split(len(dataset), {name: int(count) for name, count in zip(names, counts)})

    def look(index: int) -> tuple[bytes, str, tuple[int, int], str]:
        """(checksum, mode, size, why it cannot be read)"""
        checksum = b""
        try:
            checksum = hashlib.blake2b(dataset.content(index), digest_size=16).digest()
            with dataset.open(index) as image:
                mode, size = image.mode, image.size
            dataset.load(index)
            return checksum, mode, size, ""
        except DataError as error:
            return checksum, "", (0, 0), str(error)

    batches = (range(i, min(i + BATCH, len(dataset))) for i in range(0, len(dataset), BATCH))
    bar = tqdm(total=len(dataset), unit="image", disable=None, file=unfailing_stderr(), desc=printable(dataset.split))
    with bar:
        for ids, looks in in_parallel(look, batches, lambda *both: both, num_workers or default_workers()):
            for index, (checksum, mode, (width, height), error) in zip(ids, looks):
                if checksum:
                    split.contents[checksum].append(index)
                if error:
                    split.unreadable[dataset.describe(index)] = error
                    continue
                split.modes[mode] += 1
                split.sizes.append((width, height))
                if min(width, height) < SMALLEST or max(width, height) > LONGEST * min(width, height):
                    split.odd[dataset.describe(index)] = f"{width}x{height} pixels"
            bar.update(len(ids))
    return split


@dataclass
class Report:
    """What is wrong with a data set, and what may be.

    Attributes:
        faults: what would end a run; warnings: what is strange; facts: all figures, as JSON has them.
    """

    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=lambda: dict(splits={}))

    def to_json(self) -> dict[str, Any]:
        """All figures, faults and warnings, as JSON has them."""
        return dict(self.facts, faults=self.faults, warnings=self.warnings)

    def __str__(self) -> str:
        lines = []
        for name, split in self.facts["splits"].items():
            counts = split["classes"]
            lines.append(f"{name}: {split['images']:,} images of {len(counts):,} classes")
            if counts:
                least, most = min(counts, key=counts.get), max(counts, key=counts.get)
                both = f"{counts[least]:,} ({least}) to {counts[most]:,} ({most})"
                lines.append(f"  images of a class: {both if counts[least] < counts[most] else counts[most]}")
            if split["size"]:
                size = split["size"]
                lines.append(
                    "  pixels: {} to {}, median {}; ".format(*("x".join(map(str, size[k])) for k in size))
                    + few(f"{count:,} {mode}" for mode, count in split["modes"].items())
                )
        lines += [f"warning: {text}" for text in self.warnings] + [f"FAULT: {text}" for text in self.faults]
        lines.append("Training would fail." if self.faults else "Training can begin.")
        return printable("\n".join(lines), keep="\n")


def check(
    sets: dict[str, ImageDataset],
    max_damaged: float = 0.0,
    skip_damaged: bool = False,
    global_batch: int = 1,
    num_workers: Optional[int] = None,
    faults: Sequence[str] = (),
) -> Report:
    """Looks through the images for "train" and, where there are any, for "val".

    Args:
        max_damaged: share of the training images that may be unreadable; skip_damaged: whether the others may.
        global_batch: images of one update of a run.
        faults: what is known already.
    """
    report = Report(list(faults))
    splits = {name: look_through(dataset, num_workers) for name, dataset in sets.items()}
    for name, split in splits.items():
        report.facts["splits"][name] = split_facts(split)
        check_readable(report, name, split, max_damaged if name == "train" else float(skip_damaged))
        _check_counts(report, name, split, global_batch if name == "train" else 0)
        unusual = {mode: count for mode, count in split.modes.items() if mode not in USUAL_MODES}
        if unusual:
            report.warnings.append(
                f"{name}: {sum(unusual.values()):,} images are neither RGB nor grey of 8 bits and will be converted: "
                + few(f"{count:,} {mode}" for mode, count in unusual.items())
            )
        if split.odd:
            report.warnings.append(f"{name}: {len(split.odd):,} images of odd sizes: {few_items(split.odd)}")
    check_duplicates(report, sets, splits)
    return report


def split_facts(split: Split) -> dict[str, Any]:
    """What JSON says of a set."""
    size: dict[str, list[int]] = {}
    if split.sizes:
        by_area = sorted(split.sizes, key=lambda size: (size[0] * size[1], size))
        size = dict(smallest=list(by_area[0]), largest=list(by_area[-1]), median=list(by_area[len(by_area) // 2]))
    unreadable = dict(list(split.unreadable.items())[:NAMED])
    return dict(
        images=split.images, classes=split.counts, unreadable=len(split.unreadable), unreadable_images=unreadable,
        modes=dict(split.modes.most_common()), size=size, odd_sizes=len(split.odd),
        odd_images=dict(list(split.odd.items())[:NAMED]),
    )  # fmt: skip


def few_items(items: dict[str, str]) -> str:
    """Some images and what is said of each."""
    return few((f"{name} ({what})" for name, what in items.items()), 5)


def check_readable(report: Report, name: str, split: Split, allowed: float) -> None:
    """Notes the images that cannot be read: a fault where they are more than the share that is allowed."""
    if not split.unreadable:
        return
    said = f"{name}: {len(split.unreadable):,} of {split.images:,} images cannot be read: " + few(
        split.unreadable.values(), 5
    )
    enough = len(split.unreadable) <= int(allowed * split.images) and len(split.unreadable) < split.images
    option = "max_damaged allows" if name == "train" else "val_skip_damaged allows"
    (report.warnings if enough else report.faults).append(said if enough else f"{said}; more than {option}")


def _check_counts(report: Report, name: str, split: Split, global_batch: int) -> None:
    counts = {label: count for label, count in split.counts.items() if count}
    empty = [label for label, count in split.counts.items() if not count]
    if empty:
        report.warnings.append(f"{name}: {len(empty):,} classes have no image: {few(map(repr, empty))}")
    if name != "train" or not counts:
        return
    if len(counts) < 2:
        report.faults.append(f"{name}: all images are of one class ({next(iter(counts))}): there is nothing to learn")
        return
    if split.images < global_batch:
        report.faults.append(
            f"{name}: {split.images:,} images are fewer than one batch of {global_batch:,}; lower batch_size"
        )
    least, most = min(counts, key=lambda k: counts[k]), max(counts, key=lambda k: counts[k])
    if counts[most] >= IMBALANCE * counts[least]:
        report.warnings.append(
            f"{name}: {most} has {counts[most]:,} images and {least} {counts[least]:,}: a network that always says the "
            f"first is right for {100 * counts[most] / split.images:.1f} %"
        )
    if rare := [label for label, count in counts.items() if count < FEW]:
        report.warnings.append(f"{name}: {len(rare):,} classes have fewer than {FEW} images: {few(rare)}")


def check_duplicates(report: Report, sets: dict[str, ImageDataset], splits: dict[str, Split]) -> None:
    """Images with the same content: within a set, in two classes, and in both sets."""
    found: dict[str, Any] = dict(within={}, between=[])
    for name, split in splits.items():
        dataset = sets[name]
        groups = [group for group in split.contents.values() if len(group) > 1]
        two = [group for group in groups if len(set(dataset.labels[group])) > 1]
        found["within"][name] = [[dataset.describe(i) for i in group] for group in groups[:NAMED]]
        if groups:
            more = sum(len(group) - 1 for group in groups)
            report.warnings.append(
                f"{name}: {more:,} images have the content of another: {_pairs(dataset, groups)}"
                + (f"; of these, {len(two):,} contents are in several classes: {_pairs(dataset, two)}" if two else "")
            )
    if {"train", "val"} <= set(splits):
        train, val = splits["train"].contents, splits["val"].contents
        both = [(train[key][0], val[key][0]) for key in val if key in train]
        seen = sum(len(val[key]) for key in val if key in train)
        pairs = [[sets["train"].describe(a), sets["val"].describe(b)] for a, b in both]
        found["between"] = pairs[:NAMED]
        if seen:
            report.warnings.append(
                f"{seen:,} of {splits['val'].images:,} validation images are training images as well, so that the "
                f"accuracy will be too high: {few((' = '.join(pair) for pair in pairs), 3)}"
            )
    report.facts["duplicates"] = found


def _pairs(dataset: ImageDataset, groups: Sequence[Sequence[int]]) -> str:
    return few((" = ".join(dataset.describe(i) for i in group[:3]) for group in groups), 3)


def write_sheet(path: Path, dataset: ImageDataset) -> int:
    """Writes a contact sheet of the first images of every class; returns how many pictures it has.

    Raises:
        SettingError, WriteError: as of `write_contact_sheet`.
    """
    classes = [indices for indices in dataset.by_class() if len(indices)]
    columns = max(1, min(10, MOST // max(1, len(classes))))

    def pictures() -> Iterator[Optional[Picture]]:
        for indices in classes[:MOST]:
            # Evenly from the first to the last: neighbours are often alike.
            some = indices[np.unique(np.linspace(0, len(indices) - 1, columns).astype(int))]
            yield from map(picture, map(int, some))
            yield from [None] * (columns - len(some))  # every class begins a row

    def picture(index: int) -> Picture:
        lines = [dataset.class_names[dataset.labels[index]], dataset.member(index)[0].rpartition("/")[2]]
        try:
            return Picture(dataset.load(index, lambda size: (min(size[0], 320), min(size[1], 320))), lines)
        except DataError:
            return Picture(None, [lines[0], f"unreadable: {lines[1]}"])

    return write_contact_sheet(path, pictures(), str(dataset), 0 if columns < 2 else columns)
