"""A file of annotations in COCO's format, read and checked: what is wrong is an error that names file and annotation,
what is left out is counted and said."""

from __future__ import annotations

import gc
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

import numpy as np

from ..errors import DataError, few, printable
from ..files import user_path
from .rle import SegmentationError, check_segmentation

Id = Union[int, str]

EXPECTED = 'expected an object with the lists "images", "annotations" and "categories"'


@dataclass(frozen=True)
class Category:
    """A class of objects as the file has it."""

    id: Id
    name: str


@dataclass
class CocoFile:
    """Annotations, with images and categories as numbers from 0.

    Attributes:
        categories: by rising id. image_ids, file_names: of the images, in the file's order.
        sizes: (images, 2) int64 height, width; 0 where the file does not say.
        images, labels: (annotations,) int64, numbers of image and category; boxes: (annotations, 4) float64 x, y, w, h
            as given; crowd: bool; areas: float64, nan where the file does not say; ids: as given.
        segmentations: of the annotations, None where there is none.
        warnings: what was left out or changed.
    """

    path: Path
    categories: list[Category]
    image_ids: list[Id]
    file_names: list[str]
    sizes: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    ids: list[Any]
    segmentations: list[Any]
    warnings: list[str] = field(default_factory=list)

    def keep(self, which: np.ndarray) -> None:
        """Only these annotations, by a mask or by their numbers."""
        numbers = np.flatnonzero(which) if which.dtype == bool else which
        for name in ("images", "labels", "boxes", "crowd", "areas"):
            setattr(self, name, getattr(self, name)[numbers])
        self.ids = [self.ids[i] for i in numbers.tolist()]
        self.segmentations = [self.segmentations[i] for i in numbers.tolist()]


def read_json(path: Path) -> Any:
    """A JSON file: UTF-8, whatever the system's encoding is.

    Raises:
        DataError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        hint = "; the option that names the annotation file can give another" if not path.exists() else ""
        raise DataError(f"{path} cannot be read: {error.strerror or error}{hint}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}): annotations are read as UTF-8 only") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON file: {error or 'nested too deeply'}") from error


def read_coco(path: Path) -> CocoFile:
    """Reads a file of annotations.

    Raises:
        DataError: it is not in COCO's format; the message names the annotation.
    """
    collecting = gc.isenabled()
    gc.disable()  # millions of new lists would have it look through all of them again and again
    try:
        return _read_coco(path)
    finally:
        if collecting:
            gc.enable()


def _read_coco(path: Path) -> CocoFile:
    content = read_json(path)
    if isinstance(content, list):
        hint = ": it looks like a file of results" if content and _is_result(content[0]) else ""
        raise DataError(f"{path} holds a list{hint}; {EXPECTED}")
    if not isinstance(content, dict):
        raise DataError(f"{path} holds {type(content).__name__}; {EXPECTED}")
    parts = {}
    for name in ("images", "annotations", "categories"):
        part = content.get(name)
        if not isinstance(part, list) or not all(isinstance(item, dict) for item in part):
            raise DataError(f"{path} has no list of objects {name!r} (its keys: {few(content)}); {EXPECTED}")
        parts[name] = [_clean(item) for item in part]
    return _Reader(path, **parts).read()


def _is_result(item: Any) -> bool:
    return isinstance(item, dict) and "score" in item


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _clean(ids: dict[str, Any]) -> dict[str, Any]:
    """An object of the file whose ids can be compared: 1.0 is 1, and what is no id at all is None."""
    for name in ("id", "image_id", "category_id"):
        value = ids.get(name)
        if isinstance(value, float) and value.is_integer():
            ids[name] = int(value)
        elif not _is_id(value):
            ids[name] = None
    return ids


def _repeated(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


class _Reader:
    def __init__(self, path: Path, images: list[dict], annotations: list[dict], categories: list[dict]) -> None:
        self.path, self.images, self.annotations, self.categories = path, images, annotations, categories
        self.warnings: list[str] = []

    def fail(self, what: str) -> DataError:
        return DataError(printable(f"{self.path}: {what}"))

    def read(self) -> CocoFile:
        categories = self._categories()
        number_of = {image.get("id"): i for i, image in enumerate(self._images())}
        self._drop_orphans(number_of)
        label_of = {category.id: i for i, category in enumerate(categories)}
        for annotation in self.annotations:
            if annotation.get("category_id") not in label_of:
                raise self.fail(
                    f"annotation {annotation.get('id')} has the category {annotation.get('category_id')!r}, which the "
                    f"categories do not have ({few(f'{c.id} {c.name}' for c in categories)})"
                )
        count, ids = len(self.annotations), [annotation.get("id") for annotation in self.annotations]
        repeated = _repeated(ids)
        if repeated:
            self.warnings.append(
                f"{len(repeated):,} annotation ids are repeated ({few(repeated)}): annotations are numbered anew, and "
                f"none is lost"
            )
        sizes = [[_side(image.get("height")), _side(image.get("width"))] for image in self.images]
        return CocoFile(
            path=self.path,
            categories=categories,
            image_ids=[image["id"] for image in self.images],
            file_names=[image["file_name"] for image in self.images],
            sizes=np.asarray(sizes, np.int64).reshape(-1, 2),
            images=np.fromiter((number_of[a["image_id"]] for a in self.annotations), np.int64, count),
            labels=np.fromiter((label_of[a["category_id"]] for a in self.annotations), np.int64, count),
            boxes=self._boxes(),
            crowd=np.fromiter(map(self._is_crowd, self.annotations), bool, count),
            areas=np.fromiter((_number(a.get("area")) for a in self.annotations), np.float64, count),
            ids=ids,
            segmentations=self._segmentations(),
            warnings=self.warnings,
        )

    def _categories(self) -> list[Category]:
        if not self.categories:
            raise self.fail("it has no categories")
        for category in self.categories:
            if not _is_id(category.get("id")):
                raise self.fail(f"a category has the id {category.get('id')!r}: expected a number")
            if not isinstance(category.get("name"), (str, int)):
                raise self.fail(f"category {category['id']} has no name")
        used = {annotation.get("category_id") for annotation in self.annotations}
        # Some exports have a category that is only the parent of the others; it would be a class too many.
        parents = [
            category
            for category in self.categories
            if category["id"] not in used
            and any(
                other is not category and other.get("supercategory") == category["name"] for other in self.categories
            )
        ]
        kept = [category for category in self.categories if category not in parents]
        if parents and kept:
            self.warnings.append(
                f"left out, since they have no boxes and are only the parents of others: "
                f"{few('category {id} {name}'.format(**parent) for parent in parents)}"
            )
        categories = [Category(category["id"], str(category["name"])) for category in kept or self.categories]
        for what in ("id", "name"):
            repeated = _repeated(getattr(category, what) for category in categories)
            if repeated:
                raise self.fail(f"several categories have the {what} {few(repeated)}: expected each once")
        return sorted(categories, key=lambda category: (isinstance(category.id, str), category.id))

    def _images(self) -> list[dict]:
        if not self.images:
            raise self.fail("it has no images")
        for image in self.images:
            if not _is_id(image.get("id")):
                raise self.fail(f"an image has the id {image.get('id')!r}: expected a number")
            if not isinstance(image.get("file_name"), str) or not image["file_name"] or "\0" in image["file_name"]:
                raise self.fail(f"image {image['id']} has no file_name")
        repeated = _repeated(image["id"] for image in self.images)
        if repeated:
            raise self.fail(f"several images have the id {few(repeated)}: expected each once")
        twice = _repeated(image["file_name"] for image in self.images)
        if twice:
            self.warnings.append(f"{len(twice):,} files are several images: {few(twice)}")
        return self.images

    def _drop_orphans(self, number_of: dict[Any, int]) -> None:
        orphans = [a for a in self.annotations if a.get("image_id") not in number_of]
        if not orphans:
            return
        if len(orphans) == len(self.annotations):
            raise self.fail(
                f"no annotation is of an image of this file: they name the images "
                f"{few((repr(a.get('image_id')) for a in orphans), 3)}, and the images are "
                f"{few(map(repr, number_of), 3)}"
            )
        self.warnings.append(
            f"{len(orphans):,} annotations are left out, since their image is not in the file: "
            f"{few(a.get('id') for a in orphans)}"
        )
        self.annotations = [a for a in self.annotations if a.get("image_id") in number_of]

    def _is_crowd(self, annotation: dict) -> bool:
        value = annotation.get("iscrowd")
        if value not in (None, 0, 1):
            raise self.fail(f"annotation {annotation.get('id')} has iscrowd {value!r}: expected 0 or 1")
        return bool(value)

    def _boxes(self) -> np.ndarray:
        boxes = np.empty((len(self.annotations), 4))
        for row, annotation in zip(boxes, self.annotations):
            box = annotation.get("bbox")
            try:
                if not isinstance(box, (list, tuple)) or len(box) != 4:
                    raise TypeError
                row[:] = [_strict(value) for value in box]
            except TypeError:
                raise self.fail(
                    f"annotation {annotation.get('id')} has the box {str(box)[:100]}: expected four finite numbers, "
                    f"x, y, width, height"
                ) from None
        return boxes

    def _segmentations(self) -> list[Any]:
        found, short = [], []
        for annotation in self.annotations:
            try:
                segmentation, left_out = check_segmentation(annotation.pop("segmentation", None))
            except SegmentationError as error:
                raise self.fail(f"annotation {annotation.get('id')}: {error}") from error
            found.append(segmentation)
            if left_out:
                short.append(annotation.get("id"))
        if short:
            self.warnings.append(
                f"polygons of fewer than three points are left out, of {len(short):,} annotations: {few(short)}"
            )
        return found


def _strict(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError
    return float(value)


def _number(value: Any) -> float:
    """nan where it is no finite number."""
    try:
        return _strict(value)
    except TypeError:
        return math.nan


def _side(value: Any) -> int:
    """0 where it is no number of pixels."""
    number = _number(value)
    return int(number) if 1 <= number < 1 << 24 else 0


def labels_among(own: Sequence[Category], others: Sequence[Category], used: set[int], path: Path) -> np.ndarray:
    """The numbers among the categories of another file (training's) of each own category, by their names; -1: none.

    Args:
        used: numbers of the own categories that have annotations.

    Raises:
        DataError: one with annotations is not among the others.
    """
    number_of, name_of = {c.name: i for i, c in enumerate(others)}, {c.id: c.name for c in others}
    table = np.asarray([number_of.get(category.name, -1) for category in own], np.int64)
    unknown = [category for i, category in enumerate(own) if table[i] < 0 and i in used]
    if unknown:
        renamed = [f"{c.id} is {c.name!r} here and {name_of[c.id]!r} there" for c in unknown if c.id in name_of]
        raise DataError(
            printable(
                f"{path} has objects of categories that the training set does not have: {few(c.name for c in unknown)}"
                + (f" (category {few(renamed)})" if renamed else "")
                + f"; it has {few(c.name for c in others)}"
            )
        )
    return table


def below(folder: Path, given: str) -> Path:
    """A path as it is, or below the folder where there is one."""
    path = user_path(given)
    return folder / path if not path.is_absolute() and ((folder / path).exists() or not path.exists()) else path
