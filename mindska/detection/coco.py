"""Images with objects, from annotations in COCO's format.

    <data_dir>/annotations/instances_train2017.json, instances_val2017.json
    <data_dir>/train2017/, val2017/

Files and folders elsewhere are named by options. The rules:

- The file is UTF-8. Categories are numbered by rising id, whatever their ids are and in whatever order they are listed;
  results get the ids back. A category without boxes that is only the parent of others is no class. The classes of
  validation are training's, by their names.
- Boxes are cut to the image. Objects without area or wholly outside, polygons of fewer than three points, and
  annotations whose image is not in the file are left out; each is counted and said.
- Objects marked `iscrowd` are no targets of training; in the evaluation they are neither found nor missed.
- `iscrowd` is 0 and `area` is the mask's (without a mask: the box's) where the file does not say.
- Images are as they are stored; their EXIF tag for the orientation is ignored, unless `exif_orientation`. An image
  whose size is not the file's is an error; where the file has none, it is read from the image.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np
from PIL import Image

from ..data.base import ImageFiles, in_threads
from ..data.images import ORIENTATION, DecodeSize, open_image
from ..errors import DataError, few, printable
from .coco_file import Category, CocoFile, Id, below, labels_among, read_coco
from .rle import SegmentationError, decode, polygons_of, to_rle

log = logging.getLogger("mindska")

HEADERS = 256  # images whose size is compared with the file's at the start
FAR_OUTSIDE = 0.1  # of the image's side by which a box is beyond it, when boxes may be corners
FEWEST = 8  # pixels of an image's side, above which boxes of one pixel are none
SAMPLED = 1000  # annotations whose polygons are compared with their boxes


class Objects(NamedTuple):
    """The objects of an image.

    Attributes:
        boxes: (n, 4) float32 x1, y1, x2, y2 in pixels, within the image; labels: (n,) int32 from 0; crowd: (n,) bool.
        numbers: (n,) int64, of the annotations in the data set.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    numbers: np.ndarray


class CocoDataset(ImageFiles):
    """A data set in COCO's format.

    Args:
        annotation_file, image_folder: where they are; or the file as it was read, which is then the data set's.
        categories: of training, for validation; default: those of the file.
        masks: whether objects need masks: those without are left out.
        skip_missing: leave out images that are not on disk, instead of an error.
        exif_orientation: images (and so their annotations) are as turned by their EXIF tag.
        split: what the set is called in messages.

    Attributes:
        categories: the classes in the order of their numbers; category_ids: what results call them.
        image_ids: as the file has them. widths_heights: (images, 2) int64, width and height.
        objects_of: (annotations,) numbers of images; boxes: (annotations, 4) float64 x, y, w, h as the file has them.
        warnings: what was left out or changed.

    Raises:
        DataError: the file is damaged, or does not belong to the images.
    """

    def __init__(
        self,
        annotation_file: Union[str, Path, CocoFile],
        image_folder: Union[str, Path],
        *,
        categories: Optional[Sequence[Category]] = None,
        masks: bool = False,
        skip_missing: bool = False,
        exif_orientation: bool = False,
        split: str = "train",
    ) -> None:
        file = annotation_file if isinstance(annotation_file, CocoFile) else read_coco(Path(annotation_file))
        self.annotation_file, self.root, self.split = file.path, Path(image_folder), split
        self.exif_orientation, self.with_masks = exif_orientation, masks
        self.categories, self.category_ids, file.labels = self._classes(file, categories)
        self.class_names = [category.name for category in self.categories]
        self.image_ids: list[Id] = file.image_ids
        self.paths, self.sizes = self._files(file, skip_missing)
        self._fill_sizes(file)
        _check_boxes(file)
        _drop_what_is_outside(file)
        if masks:
            _check_masks(file)
        self.widths_heights = file.sizes[:, ::-1]
        order = np.argsort(file.images, kind="stable")
        file.keep(order)
        self.objects_of, self.object_labels, self.boxes = file.images, file.labels, file.boxes
        self.crowd, self.areas, self.annotation_ids = file.crowd, file.areas, file.ids
        self.segmentations = file.segmentations
        self._starts = np.searchsorted(self.objects_of, np.arange(len(self.paths) + 1))
        self.labels = np.zeros(len(self.paths), np.int32)  # images have no class of their own
        self.warnings = file.warnings
        for warning in self.warnings:
            log.warning("%s", printable(f"{self.annotation_file}: {warning}"))
        self.check_headers()

    def __str__(self) -> str:
        without = int((np.bincount(self.objects_of[~self.crowd], minlength=len(self)) == 0).sum())
        return printable(
            f"{self.split}: {len(self):,} images ({without:,} without objects) with {(~self.crowd).sum():,} objects of "
            f"{len(self.class_names):,} classes in {self.root.absolute()}, by {self.annotation_file}"
        )

    # ------------------------------------------------------------------------------------ reading

    def _classes(
        self, file: CocoFile, others: Optional[Sequence[Category]]
    ) -> tuple[list[Category], list[Id], np.ndarray]:
        """Categories, their ids in this file, and the annotations' labels."""
        if others is None:
            return file.categories, [category.id for category in file.categories], file.labels
        table = labels_among(file.categories, others, set(file.labels.tolist()), file.path)
        ids = [category.id for category in others]
        for category, number in zip(file.categories, table.tolist()):
            if number >= 0:
                ids[number] = category.id
        unused = [c.name for c, number in zip(file.categories, table.tolist()) if number < 0]
        if unused:
            file.warnings.append(f"categories that training does not have, and without objects: {few(unused)}")
        absent = [c.name for i, c in enumerate(others) if i not in set(table.tolist())]
        if absent:
            file.warnings.append(f"{len(absent):,} classes of training are not among its categories: {few(absent)}")
        return list(others), ids, table[file.labels]

    def _files(self, file: CocoFile, skip_missing: bool) -> tuple[list[str], list[int]]:
        """Paths and sizes in bytes of the images; those that are missing are an error, or leave with their objects."""
        if not self.root.is_dir():
            raise DataError(
                f"There is no folder {self.root.absolute()}: expected the images of {file.path} there; the option that "
                f"names the images' folder can give another"
            )
        found = in_threads(lambda name: _locate(str(self.root), name), file.file_names)
        missing = [path for path, size in found if size < 0]
        if missing:
            said = f"{len(missing):,} of the {len(found):,} images of {file.path} are not on disk: {few(missing, 5)}"
            if not skip_missing or len(missing) == len(found):
                raise DataError(
                    printable(f"{said}. Is the folder of the images right? skip_missing leaves such images out")
                )
            file.warnings.append(f"{said}; they are left out with their objects")
            there = np.asarray([size >= 0 for _, size in found])
            number = np.cumsum(there) - 1
            file.keep(there[file.images])
            file.images, file.sizes = number[file.images], file.sizes[there]
            self.image_ids = [one for one, kept in zip(file.image_ids, there.tolist()) if kept]
            found = [one for one in found if one[1] >= 0]
        return [path for path, _ in found], [size for _, size in found]

    def _fill_sizes(self, file: CocoFile) -> None:
        unknown = np.flatnonzero((file.sizes <= 0).any(1))
        if len(unknown):
            for index, (width, height) in zip(unknown, in_threads(self.image_size, unknown.tolist())):
                file.sizes[index] = height, width
            file.warnings.append(
                f"{len(unknown):,} images have no size in the file: it is read from them "
                f"({few((self.paths[i] for i in unknown), 3)})"
            )

    def image_size(self, index: int) -> tuple[int, int]:
        """(width, height) of image `index` as `load` gives it, from the beginning of its file."""
        with open_image(self.paths[index]) as image:
            # Pillow turns TIFF files by itself.
            turned = self.exif_orientation or image.format == "TIFF"
            if turned and image.getexif().get(ORIENTATION, 1) in range(5, 9):
                return image.height, image.width
            return image.width, image.height

    def check_headers(self) -> None:
        """Compares the sizes of some images with the file's.

        Raises:
            DataError: they differ, or an image cannot be read.
        """
        some = (
            np.unique(np.linspace(0, len(self) - 1, min(HEADERS, len(self))).astype(int)).tolist() if len(self) else []
        )

        def check(index: int) -> Optional[str]:
            try:
                self.check_size(index, self.image_size(index))
            except DataError as error:
                return str(error)
            return None

        faults = [fault for fault in in_threads(check, some) if fault]
        contradictions = [fault for fault in faults if "annotations say" in fault]
        if contradictions or (faults and len(faults) == len(some)):  # single damaged files are met later
            first = (contradictions or faults)[0]
            more = f" (and so {len(faults) - 1} more of {len(some)} that were looked at)" if len(faults) > 1 else ""
            raise DataError(first + more)

    def check_size(self, index: int, size: tuple[int, int]) -> None:
        """DataError where an image's (width, height) is not that of the annotations."""
        expected = tuple(self.widths_heights[index].tolist())
        if tuple(size) == expected:
            return
        hint = "the annotations belong to another image, or this one was resized"
        if tuple(size[::-1]) == expected:
            hint = "width and height are exchanged"
            with open_image(self.paths[index]) as image:
                turned = image.getexif().get(ORIENTATION, 1) in range(5, 9)
            if turned:
                is_on = self.exif_orientation
                hint += (
                    f": its EXIF tag turns it, and exif_orientation is {'on' if is_on else 'off'}; turn it "
                    f"{'off' if is_on else 'on'} if the annotations are of the {'stored' if is_on else 'turned'} image"
                )
        raise DataError(
            printable(
                f"{self.paths[index]}: the annotations say {expected[0]}x{expected[1]} pixels (width x height), the "
                f"file has {size[0]}x{size[1]}; {hint}"
            )
        )

    def load(self, index: int, decode_size: Optional[DecodeSize] = None) -> Image.Image:
        """Image `index` as RGB.

        Raises:
            DataError: it cannot be read, or is not of the annotations' size; the message names it.
        """
        image = super().load(index, decode_size)
        if decode_size is None:
            self.check_size(index, image.size)
        return image

    # ------------------------------------------------------------------------------------ objects

    def objects(self, index: int) -> Objects:
        """All objects of image `index`, crowds among them."""
        numbers = np.arange(self._starts[index], self._starts[index + 1])
        width, height = self.widths_heights[index].tolist()
        boxes = self.boxes[numbers]
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        corners = np.clip(corners, 0, [width, height, width, height]).astype(np.float32)
        return Objects(corners, self.object_labels[numbers].astype(np.int32), self.crowd[numbers], numbers)

    def mask(self, number: int) -> np.ndarray:
        """The mask of annotation `number`, (H, W) uint8 of 0 and 1.

        Raises:
            DataError: it is damaged; the message names the annotation.
        """
        return self._of_segmentation(decode, number)

    def rle(self, number: int) -> dict[str, Any]:
        """The mask of annotation `number` as run lengths; errors as of `mask`."""
        return self._of_segmentation(to_rle, number)

    def _of_segmentation(self, function: Any, number: int) -> Any:
        width, height = self.widths_heights[self.objects_of[number]].tolist()
        segmentation = self.segmentations[number]
        try:
            if segmentation is None:
                raise SegmentationError("it has no mask")
            return function(segmentation, (height, width))
        except SegmentationError as error:
            raise DataError(
                printable(f"{self.annotation_file}: annotation {self.annotation_ids[number]}: {error}")
            ) from error

    def area(self, number: int) -> float:
        """Pixels of annotation `number`: as the file says, else of its mask, else of its box."""
        if not np.isnan(self.areas[number]):
            return float(self.areas[number])
        if self.segmentations[number] is not None:
            return float(self.mask(number).sum())
        return float(self.boxes[number, 2] * self.boxes[number, 3])

    # ------------------------------------------------------------------------------------ as a set

    def describe(self, index: int) -> str:
        return self.paths[index]

    def identity(self) -> dict[str, Any]:
        if self._identity is None:
            digest = hashlib.sha256(repr(self.class_names).encode())
            for index in range(len(self)):
                name, size = self.member(index)
                digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
            for array in (self.objects_of, self.object_labels, self.boxes, self.crowd):
                digest.update(np.ascontiguousarray(array).tobytes())
            for segmentation in self.segmentations if self.with_masks else ():
                for part in segmentation if isinstance(segmentation, list) else [repr(segmentation).encode()]:
                    digest.update(part)
            self._identity = dict(images=len(self), classes=len(self.class_names), digest=digest.hexdigest()[:32])
        return self._identity

    def subset(self, indices: np.ndarray, said: Optional[str] = None) -> CocoDataset:
        """Some of the images, as a data set."""
        part, indices = copy.copy(self), np.asarray(indices, np.int64)
        part.paths, part.sizes = ([values[i] for i in indices.tolist()] for values in (self.paths, self.sizes))
        part.image_ids = [self.image_ids[i] for i in indices.tolist()]
        part.widths_heights, part._identity = self.widths_heights[indices], None
        part.split, part.labels = said or self.split, self.labels[indices]
        numbers = [np.arange(self._starts[i], self._starts[i + 1]) for i in indices]
        chosen = np.concatenate([np.zeros(0, np.int64), *numbers])
        part.objects_of = np.repeat(np.arange(len(indices)), [len(some) for some in numbers])
        for name in ("object_labels", "boxes", "crowd", "areas"):
            setattr(part, name, getattr(self, name)[chosen])
        part.annotation_ids = [self.annotation_ids[i] for i in chosen.tolist()]
        part.segmentations = [self.segmentations[i] for i in chosen.tolist()]
        part._starts = np.searchsorted(part.objects_of, np.arange(len(indices) + 1))
        return part

    def with_objects(self) -> CocoDataset:
        """The images that have something to train on; it is said how many are left out.

        Raises:
            DataError: there are none.
        """
        counts = np.bincount(self.objects_of[~self.crowd], minlength=len(self))
        kept = np.flatnonzero(counts)
        if not len(kept):
            raise DataError(f"{self.annotation_file}: no image has an object: there is nothing to train on")
        if len(kept) == len(self):
            return self
        log.info("%s: %s of %s images have no object and are left out", self.split, len(self) - len(kept), len(self))
        return self.subset(kept)


def open_coco(
    data_dir: Union[str, Path], split: str, image_folder: Optional[str] = None, said: str = "", **options: Any
) -> CocoDataset:
    """A part of a data set in COCO's layout, or of one in COCO's format.

    Args:
        split: "train" or "val", for <data_dir>/annotations/instances_<split>2017.json; or a file of annotations that
            ends with .json, as it is or below `data_dir`.
        image_folder: where the images lie, as it is or below `data_dir`; default: <split>2017, or the folder that is
            called as the annotation file is, or the file's own folder, or `data_dir`: the first that has them.
        said: what the set is called in messages; default: the split.
        options: of `CocoDataset`.

    Raises:
        DataError: as of `CocoDataset`.
    """
    folder = Path(data_dir)
    if split.lower().endswith(".json"):
        path = below(folder, split)
    else:
        names = [f"instances_{split}2017.json", f"instances_{split}.json"]
        path = next((p for p in (folder / "annotations" / name for name in names) if p.is_file()), None) or (
            folder / "annotations" / names[0]
        )
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        there = f"; there are {few(near)}" if near else ""
        raise DataError(f"There is no annotation file {path.absolute()}{there}")
    file = read_coco(path)
    images = below(folder, image_folder) if image_folder else _image_folder(folder, file)
    return CocoDataset(file, images, split=said or split, **options)


def _image_folder(folder: Path, file: CocoFile) -> Path:
    """The first folder that has the first image of an annotation file; else the one that should have."""
    path, first = file.path, file.file_names[:1]
    name = path.stem[len("instances_") :] if path.stem.startswith("instances_") else path.stem
    candidates = [folder / name, path.parent / name, path.parent, folder / "images", folder]
    for candidate in candidates:
        if candidate.is_dir() and all(_locate(str(candidate), name)[1] >= 0 for name in first):
            return candidate
    return candidates[0]


def _locate(folder: str, name: str) -> tuple[str, int]:
    """The path of an image and its size in bytes, -1 where there is none."""
    names = [name]
    if "\\" in name:  # written on Windows
        names.append(name.replace("\\", "/"))
    names += [unicodedata.normalize(form, each) for each in names for form in ("NFC", "NFD")]
    for each in dict.fromkeys(names):
        path = os.path.join(folder, each)  # noqa: PTH118 - a million paths are text
        try:
            path.encode(sys.getfilesystemencoding(), "surrogateescape")
        except UnicodeEncodeError:  # the system's encoding is another: a name's bytes are UTF-8 all the same
            path = os.fsdecode(path.encode("utf-8", "surrogatepass"))
        try:
            return path, os.stat(path).st_size  # noqa: PTH116
        except (OSError, ValueError):
            continue
    return os.path.join(folder, names[min(1, len(names) - 1)] if "\\" in name else name), -1  # noqa: PTH118


def _check_boxes(file: CocoFile) -> None:
    """Refuses boxes that are corners, or have negative sides."""
    boxes, sizes = file.boxes, file.sizes[file.images]
    if not len(boxes):
        return
    heights, widths = sizes[:, 0], sizes[:, 1]
    negative = (boxes[:, 2:] < 0).any(1)
    corners = (boxes[:, 2:] > boxes[:, :2]).all(1) & (boxes[:, 2] <= widths + 1) & (boxes[:, 3] <= heights + 1)
    outside = (boxes[:, 0] + boxes[:, 2] > widths * (1 + FAR_OUTSIDE)) | (
        boxes[:, 1] + boxes[:, 3] > heights * (1 + FAR_OUTSIDE)
    )
    if boxes.max() <= 1 and sizes.min() > FEWEST:
        raise DataError(
            f"{file.path}: no box reaches beyond 1 pixel (annotation {file.ids[0]}: {boxes[0].tolist()}): they "
            f"look like shares of the image; expected x, y, width, height in pixels"
        )
    by_polygons = _corners_by_polygons(file)
    if by_polygons or (corners.mean() > 0.98 and outside.mean() > 0.2):
        why = by_polygons or f"{outside.sum():,} of {len(boxes):,} boxes would be far beyond their image"
        raise DataError(
            f"{file.path}: the boxes look like x1, y1, x2, y2: {why} as x, y, width, height, which COCO's format has "
            f"(annotations {few((file.ids[i] for i in np.flatnonzero(outside)), 5) or file.ids[0]}). Convert them"
        )
    if negative.any():
        first = int(negative.argmax())
        raise DataError(
            f"{file.path}: {negative.sum():,} boxes have a negative width or height (annotations "
            f"{few((file.ids[i] for i in np.flatnonzero(negative)), 5)}; the first is {boxes[first].tolist()}): "
            f"expected x, y, width, height"
        )


def _corners_by_polygons(file: CocoFile) -> str:
    """Where most polygons fit their boxes as corners and not as COCO has them, how many; else nothing."""
    as_corners = as_sizes = 0
    candidates = [i for i, segmentation in enumerate(file.segmentations) if isinstance(segmentation, list)]
    for i in candidates[:: max(1, len(candidates) // SAMPLED)]:
        points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in polygons_of(file.segmentations[i])[0]])
        extent, box = np.concatenate([points.min(0), points.max(0)]), file.boxes[i]
        room = 2 + 0.05 * (extent[2:] - extent[:2]).max()
        fits_sizes = np.abs(np.concatenate([box[:2], box[:2] + box[2:]]) - extent).max() <= room
        as_sizes += bool(fits_sizes)
        as_corners += bool(not fits_sizes and np.abs(box - extent).max() <= room)
    if as_corners > 4 * as_sizes and as_corners > 0:
        return f"{as_corners:,} polygons fit them so, and only {as_sizes:,} fit them"
    return ""


def _drop_what_is_outside(file: CocoFile) -> None:
    """Leaves out objects without area and those wholly outside of their image, and says which."""
    boxes = file.boxes
    if not len(boxes):
        return
    flat = (boxes[:, 2:] <= 0).any(1)
    zeros = flat & (boxes == 0).all(1)
    limits = file.sizes[file.images][:, ::-1]
    inside = np.minimum(boxes[:, :2] + boxes[:, 2:], limits) - np.maximum(boxes[:, :2], 0)
    # In float32, in which boxes are used: a width of 1e-9 is none.
    corners = np.clip(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1), 0, np.tile(limits, 2))
    corners = corners.astype(np.float32)
    flat |= (inside > 0).all(1) & (corners[:, 2:] <= corners[:, :2]).any(1)
    outside = ~flat & (inside <= 0).any(1)
    partly = ~flat & ~outside & ((boxes[:, :2] < 0) | (boxes[:, :2] + boxes[:, 2:] > limits)).any(1)
    for which, what in (
        (flat, "boxes without area are left out"),
        (outside, "boxes wholly outside of their image are left out"),
        (partly, "boxes reach beyond their image and are cut"),
    ):
        if which.any():
            hint = ""
            if which is flat and zeros.any():
                hint = "; an image without objects needs no annotation, and no box of zeros"
            file.warnings.append(
                f"{which.sum():,} {what} (annotations {few(file.ids[i] for i in np.flatnonzero(which))}){hint}"
            )
    file.keep(~(flat | outside))


def _check_masks(file: CocoFile) -> None:
    """Leaves out objects without a mask, and says which."""
    there = np.asarray([segmentation is not None for segmentation in file.segmentations], bool)
    if len(there) and not there.any():
        raise DataError(f"{file.path}: no annotation has a segmentation; without masks only boxes can be learnt")
    if not there.all():
        file.warnings.append(
            f"{(~there).sum():,} objects have no mask and are left out "
            f"(annotations {few(file.ids[i] for i in np.flatnonzero(~there))})"
        )
        file.keep(there)
