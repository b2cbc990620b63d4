"""Images with objects, looked through before they are trained on: every image and every mask is read once.

As in `mindska.data.check`, what would end a run is a fault, and what is only strange is a warning.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
from tqdm import tqdm

from ..data.check import BATCH, NAMED, USUAL_MODES, Report
from ..data.contact_sheet import SIDE, Picture, write_contact_sheet
from ..data.loader import default_workers, in_parallel
from ..errors import DataError, few, printable
from ..streams import unfailing_stderr
from .coco import CocoDataset, open_coco
from .pictures import draw_detections
from .postprocess import Detections

TINY = 4  # pixels of an object's shorter side below which it is hardly found
RARE = 10  # objects of a class below which it is hardly learnt
ALIKE = 0.9  # share of boxes of one size: a sign of placeholders


class Looked(NamedTuple):
    """What was found of one image: a checksum, its pixels' kind, why it cannot be used, what its masks lack."""

    checksum: bytes = b""
    mode: str = ""
    fault: str = ""
    masks: tuple[str, ...] = ()


@dataclass
class ObjectSplit:
    """What was found in one set of images with objects.

    Attributes:
        faults: image -> why it cannot be used; masks: what is wrong with masks.
        modes: Pillow's name of the pixels' kind -> images. contents: checksum -> numbers of images.
    """

    faults: dict[str, str] = field(default_factory=dict)
    masks: list[str] = field(default_factory=list)
    modes: Counter[str] = field(default_factory=Counter)
    contents: dict[bytes, list[int]] = field(default_factory=lambda: defaultdict(list))


class ObjectReport(Report):
    """What is wrong with a data set for detection, and what may be; its classes count objects."""

    def __str__(self) -> str:
        lines = []
        for name, split in self.facts["splits"].items():
            sizes = ", ".join(f"{count:,} {size}" for size, count in split["object_sizes"].items())
            lines.append(
                f"{name}: {split['objects']:,} objects ({sizes}; {split['crowds']:,} crowds); at most "
                f"{split['most_objects_of_an_image']:,} in an image, none in {split['images_without_objects']:,} images"
            )
        text = super().__str__().replace("  images of a class:", "  objects of a class:")
        return "\n".join([*(printable(line) for line in lines), text])


def open_sets(
    data_dir: str,
    splits: dict[str, str],
    image_folders: Optional[dict[str, str]] = None,
    **options: Any,
) -> tuple[dict[str, CocoDataset], list[str]]:
    """The sets that can be opened, "train" before "val", and why others cannot.

    Args:
        splits: "train" and "val" -> what `open_coco` takes for it; empty: there is none.
        image_folders: the same for the images' folders. options: of `CocoDataset`.
    """
    sets: dict[str, CocoDataset] = {}
    faults = []
    for name, split in splits.items():
        if not split:
            continue
        categories = sets["train"].categories if "train" in sets else None
        try:
            sets[name] = open_coco(
                data_dir, split, (image_folders or {}).get(name), name, categories=categories, **options
            )
        except DataError as error:
            faults.append(f"{name}: {error}")
    return sets, faults


def look_at(dataset: CocoDataset, index: int) -> Looked:
    """Reads and decodes an image and its objects' masks."""
    checksum, mode, fault = b"", "", ""
    try:
        checksum = hashlib.blake2b(dataset.content(index), digest_size=16).digest()
        with dataset.open(index) as opened:
            mode = opened.mode
        dataset.load(index)
    except DataError as error:
        fault = str(error)
    wrong = []
    for number in dataset.objects(index).numbers.tolist() if dataset.with_masks else ():
        try:
            if not dataset.mask(number).any():
                wrong.append(f"annotation {dataset.annotation_ids[number]} has a mask without a pixel")
        except DataError as error:
            wrong.append(str(error))
    return Looked(checksum, mode, fault, tuple(wrong))


def look_through(dataset: CocoDataset, num_workers: Optional[int] = None) -> ObjectSplit:
    """Reads and decodes every image, and every mask where the data set has them."""
    split = ObjectSplit()
    batches = (range(i, min(i + BATCH, len(dataset))) for i in range(0, len(dataset), BATCH))
    bar = tqdm(total=len(dataset), unit="image", disable=None, file=unfailing_stderr(), desc=printable(dataset.split))
    with bar:
        looks = in_parallel(
            lambda index: look_at(dataset, index), batches, lambda *both: both, num_workers or default_workers()
        )
        for ids, found in looks:
            for index, looked in zip(ids, found):
                if looked.checksum:
                    split.contents[looked.checksum].append(index)
                if looked.fault:
                    split.faults[dataset.describe(index)] = looked.fault
                else:
                    split.modes[looked.mode] += 1
                split.masks += looked.masks
            bar.update(len(ids))
    return split


def check_objects(
    sets: dict[str, CocoDataset],
    max_boxes: int = 100,
    max_damaged: float = 0.0,
    faults: Optional[list[str]] = None,
    num_workers: Optional[int] = None,
) -> ObjectReport:
    """Looks through the sets "train" and "val".

    Args:
        max_boxes: objects of a sample in training, and detections that count in the evaluation.
        max_damaged: share of the training images that may be unreadable.
        faults: what is known already.
    """
    report = ObjectReport(list(faults or []))
    splits = {name: look_through(dataset, num_workers) for name, dataset in sets.items()}
    for name, split in splits.items():
        dataset = sets[name]
        report.facts["splits"][name] = facts(dataset, split)
        report.warnings += [f"{name}: {warning}" for warning in dataset.warnings]
        if split.faults:
            said = f"{name}: {len(split.faults):,} of {len(dataset):,} images cannot be used: " + few(
                split.faults.values(), 5
            )
            allowed = int(max_damaged * len(dataset)) if name == "train" else 0
            if len(split.faults) <= allowed:
                report.warnings.append(said)
            else:
                report.faults.append(f"{said}; more than max_damaged allows" if name == "train" else said)
        empty = [wrong for wrong in split.masks if wrong.endswith("without a pixel")]
        damaged = [wrong for wrong in split.masks if not wrong.endswith("without a pixel")]
        if damaged:
            report.faults.append(f"{name}: {len(damaged):,} masks cannot be read: {few(damaged, 5)}")
        if empty:
            report.warnings.append(f"{name}: {len(empty):,} masks are empty: {few(empty, 5)}")
        unusual = {mode: count for mode, count in split.modes.items() if mode not in USUAL_MODES}
        if unusual:
            report.warnings.append(
                f"{name}: {sum(unusual.values()):,} images are neither RGB nor grey of 8 bits and will be converted: "
                + few(f"{count:,} {mode}" for mode, count in unusual.items())
            )
        _check_counts(report, name, dataset, max_boxes)
    _check_duplicates(report, sets, splits)
    return report


def _check_counts(report: Report, name: str, dataset: CocoDataset, max_boxes: int) -> None:
    own = ~dataset.crowd
    counts = np.bincount(dataset.object_labels[own], minlength=len(dataset.class_names))
    in_images = np.bincount(dataset.objects_of[own], minlength=len(dataset))
    if not own.any():
        (report.faults if name == "train" else report.warnings).append(
            f"{name}: no image has an object" + ("" if name == "train" else ": all figures will be n/a")
        )
        return
    absent = [dataset.class_names[i] for i in np.flatnonzero(counts == 0)]
    if absent:
        report.warnings.append(f"{name}: {len(absent):,} classes have no object: {few(map(repr, absent))}")
    rare = [f"{dataset.class_names[i]} ({counts[i]})" for i in np.flatnonzero((counts > 0) & (counts < RARE))]
    if rare and name == "train":
        report.warnings.append(f"{name}: {len(rare):,} classes have fewer than {RARE} objects: {few(rare)}")
    without = int((in_images == 0).sum())
    if without:
        what = "left out in training" if name == "train" else "counted in the evaluation all the same"
        report.warnings.append(f"{name}: {without:,} images have no object: they are {what}")
    crowded = np.flatnonzero(in_images > max_boxes)
    if len(crowded):
        what = "so many are drawn each time" if name == "train" else "no more detections of a class count"
        report.warnings.append(
            f"{name}: {len(crowded):,} images have more than {max_boxes} objects, up to {in_images.max():,}: {what} "
            f"({few((dataset.describe(i) for i in crowded), 3)})"
        )
    sides = dataset.boxes[own, 2:]
    tiny = int((sides.min(1) < TINY).sum())
    if tiny:
        report.warnings.append(f"{name}: {tiny:,} of {len(sides):,} boxes have a side of fewer than {TINY} pixels")
    _, alike = np.unique(sides, axis=0, return_counts=True)
    if len(sides) >= RARE and alike.max() > ALIKE * len(sides):
        report.warnings.append(f"{name}: {alike.max():,} of {len(sides):,} boxes have one size: are they placeholders?")
    rows = np.column_stack([dataset.objects_of, dataset.object_labels, dataset.boxes])[own]
    _, numbers, times = np.unique(rows, axis=0, return_index=True, return_counts=True)
    twice = np.flatnonzero(own)[numbers[times > 1]]
    if len(twice):
        report.warnings.append(
            f"{name}: {len(twice):,} objects are there more than once, of the same class and box (annotations "
            f"{few(dataset.annotation_ids[i] for i in twice)})"
        )


def _check_duplicates(report: Report, sets: dict[str, CocoDataset], splits: dict[str, ObjectSplit]) -> None:
    """Images that are there more than once, by their content."""
    for name, split in splits.items():
        twice = [indices for indices in split.contents.values() if len(indices) > 1]
        if twice:
            pairs = (" = ".join(sets[name].member(i)[0] for i in indices[:3]) for indices in twice)
            report.warnings.append(f"{name}: {len(twice):,} images are there more than once: {few(pairs, 5)}")
    if len(splits) == 2:
        train, val = splits["train"].contents, splits["val"].contents
        both = [content for content in val if content in train]
        if both:
            pairs = (
                f"{sets['val'].member(val[content][0])[0]} = {sets['train'].member(train[content][0])[0]}"
                for content in both
            )
            report.warnings.append(f"{len(both):,} images are in training and in validation: {few(pairs, 5)}")


def facts(dataset: CocoDataset, split: ObjectSplit) -> dict[str, Any]:
    """The figures of a set, as JSON has them; `classes` counts objects."""
    own, areas = ~dataset.crowd, dataset.boxes[:, 2] * dataset.boxes[:, 3]
    counts = np.bincount(dataset.object_labels[own], minlength=len(dataset.class_names))
    in_images = np.bincount(dataset.objects_of[own], minlength=len(dataset))
    sizes: dict[str, list[int]] = {}
    if len(dataset):
        by_area = np.argsort(dataset.widths_heights.prod(1), kind="stable")
        for name, place in (("smallest", 0), ("largest", -1), ("median", len(by_area) // 2)):
            sizes[name] = dataset.widths_heights[by_area[place]].tolist()
    kinds = np.digitize(areas[own], [32**2, 96**2])
    return dict(
        images=len(dataset), classes=dict(zip(dataset.class_names, counts.tolist())), size=sizes,
        modes=dict(split.modes.most_common()), unreadable=len(split.faults),
        unreadable_images=dict(list(split.faults.items())[:NAMED]),
        objects=int(own.sum()), crowds=int(dataset.crowd.sum()), images_without_objects=int((in_images == 0).sum()),
        most_objects_of_an_image=int(in_images.max(initial=0)),
        object_sizes=dict(zip(("small", "medium", "large"), np.bincount(kinds, minlength=3).tolist())),
        masks_at_fault=len(split.masks),
    )  # fmt: skip


def truth_as_detections(dataset: CocoDataset, index: int) -> Detections:
    """The objects of an image, as if they were found, to draw them."""
    objects = dataset.objects(index)
    masks = None
    if dataset.with_masks and len(objects.labels):
        masks = np.stack([dataset.mask(number) for number in objects.numbers.tolist()]).astype(bool)
    return Detections(objects.boxes, np.ones(len(objects.labels), np.float32), objects.labels, masks)


def write_sheet(path: Path, dataset: CocoDataset, count: int = 24) -> int:
    """Writes a contact sheet of some images with their objects drawn; returns how many pictures it has."""

    def picture(index: int) -> Picture:
        name = dataset.member(index)[0].rpartition("/")[2]
        try:
            drawn = draw_detections(
                dataset.load(index), truth_as_detections(dataset, index), dataset.class_names, show_scores=False,
                viewed_at=SIDE,
            )  # fmt: skip
        except DataError:
            return Picture(None, [f"unreadable: {name}"])
        return Picture(drawn, [name, f"{len(dataset.objects(index).labels)} objects"])

    counts = np.bincount(dataset.objects_of, minlength=len(dataset))
    chosen = np.flatnonzero(counts) if counts.any() else np.arange(len(dataset))
    some = chosen[np.unique(np.linspace(0, max(0, len(chosen) - 1), min(count, len(chosen))).astype(int))]
    return write_contact_sheet(path, (picture(int(index)) for index in some), str(dataset))
