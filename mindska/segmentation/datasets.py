"""Images with masks on disk: ADE20K, PASCAL VOC 2012, or a pair of folders.

```
ADE20K        images/training/*.jpg     annotations/training/*.png     (validation); 0 is no class (reduce_zero_label)
PASCAL VOC    JPEGImages/*.jpg          SegmentationClass/*.png, SegmentationClassAug/*.png
              ImageSets/Segmentation/train.txt, trainaug.txt, val.txt: a name a line, or an image and its mask
pair          images/train/*.jpg        masks/train/*.png              (val); or train/images, train/masks
              images/*.jpg              masks/*.png                    and lists train.txt, val.txt, or val_ratio
```

Images and masks belong together by their names without the ending, never by their order. `classes.txt` beside the
folders names the classes, one a line, in the order of their numbers; ADE20K and PASCAL VOC do without it.
"""

from __future__ import annotations

import codecs
import hashlib
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
from PIL import Image

from ..data.base import ImageFiles, in_threads
from ..data.class_order import read_class_map
from ..data.folders import find_images, is_folder, subfolders
from ..data.images import EXTENSIONS, ORIENTATION, DecodeSize, open_image, read_image
from ..data.splits import held_out
from ..errors import DataError, few, formatted_list, printable
from .class_names import ADE20K, PASCAL_VOC
from .masks import IGNORE, MaskError, check_num_classes, is_binary, mask_size, read_mask, to_labels

log = logging.getLogger("mindska")

SAMPLE = 64  # masks whose pixels are looked at before training
CLASSES = "classes.txt"
LISTS = "ImageSets/Segmentation"
FOLDERS = (("images", "masks"), ("img_dir", "ann_dir"))  # the latter are MMSegmentation's
# Below data_dir, where the archives put them.
ADE20K_PLACES, VOC_PLACES = ("ADEChallengeData2016", "ade/ADEChallengeData2016"), ("VOC2012", "VOCdevkit/VOC2012")
ADE20K_SPLITS = {"train": "training", "val": "validation"}


Faults = Optional[list[str]]


def _fault(message: str, faults: Faults) -> None:
    """Notes what is wrong where there is a list for it, else ends with it."""
    if faults is None:
        raise DataError(message)
    faults.append(message)


class SegmentationDataset(ImageFiles):
    """Images with a mask each.

    Args:
        root: the folder that names are relative to; split: what the set is called in messages.
        paths, masks: of the images and of their masks, as text, in the same order.
        class_names: in the order of their numbers.
        reduce_zero_label: 0 in a mask is no class, and 1 the first.
        exif_orientation: turn images as their EXIF tag says (never masks).
        faults: where there is a list, missing files are named in it, and their images left out.

    Raises:
        DataError: files are missing, an image comes twice, or there are too many classes.
    """

    def __init__(
        self,
        root: Union[str, Path],
        split: str,
        paths: Sequence[str],
        masks: Sequence[str],
        class_names: Sequence[str],
        reduce_zero_label: bool = False,
        exif_orientation: bool = False,
        faults: Faults = None,
    ) -> None:
        self.root, self.split = Path(root), split
        self.paths, self.mask_paths, self.class_names = list(paths), list(masks), list(class_names)
        self.reduce_zero_label, self.exif_orientation = reduce_zero_label, exif_orientation
        check_num_classes(len(self.class_names), reduce_zero_label)
        if not self.paths:
            raise DataError(f"{split} in {root} has no image")
        if twice := [path for path, count in Counter(self.paths).items() if count > 1]:
            raise DataError(f"{split} names {len(twice):,} images twice{formatted_list('Images', twice)}")
        for what, files in (("images", self.paths), ("masks", self.mask_paths)):
            missing = {i for i, size in enumerate(in_threads(_bytes, files)) if size < 0}
            if missing:
                _fault(
                    f"{split} in {root}: {len(missing):,} of {len(files):,} {what} are missing"
                    f"{formatted_list('No file at', [files[i] for i in sorted(missing)])}",
                    faults,
                )
                kept = [i for i in range(len(self.paths)) if i not in missing]
                self.paths, self.mask_paths = ([each[i] for i in kept] for each in (self.paths, self.mask_paths))
        self.sizes, self.mask_sizes = in_threads(_bytes, self.paths), in_threads(_bytes, self.mask_paths)
        self.labels = np.zeros(len(self.paths), np.int32)  # images have no class of their own

    def __len__(self) -> int:
        return len(self.paths)

    def __str__(self) -> str:
        return printable(
            f"{self.split}: {len(self):,} images with masks of {len(self.class_names):,} classes in "
            f"{self.root.absolute()}{self.passed_over}"
        )

    def subset(self, indices: Sequence[int], said: str) -> SegmentationDataset:
        """Some of the images, in the order of `indices`; `said`: what to call them in messages."""
        paths, masks = ([files[int(i)] for i in indices] for files in (self.paths, self.mask_paths))
        return SegmentationDataset(
            self.root, said, paths, masks, self.class_names, self.reduce_zero_label, self.exif_orientation
        )

    def members(self, label: int) -> list[tuple[str, int]]:
        """(name, size in bytes) of every image and mask: all are of one kind, `label` 0."""
        if label:
            return []
        masks = zip(self.mask_paths, self.mask_sizes)
        images = [self.member(index) for index in range(len(self))]
        return images + [(self._below(path), size) for path, size in masks]

    def _below(self, path: str) -> str:
        return path[len(self.below) :] if path.startswith(self.below) else path

    def identity(self) -> dict[str, Any]:
        """As of `ImageDataset`; the digest is of the names and sizes of images and masks, and of what numbers mean."""
        if self._identity is None:
            digest = hashlib.sha256(repr((self.class_names, self.reduce_zero_label)).encode())
            for name, size in self.members(0):
                digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
            self._identity = dict(images=len(self), classes=len(self.class_names), digest=digest.hexdigest()[:32])
        return self._identity

    def load_image(self, index: int, decode_size: Optional[DecodeSize] = None) -> Image.Image:
        """Image `index` as RGB; DataError where it cannot be read."""
        return read_image(self.paths[index], decode_size, self.exif_orientation)

    def load_mask(self, index: int) -> np.ndarray:
        """The mask of image `index`, (H, W) int32: 0 to the number of classes - 1, or 255 (ignored).

        Raises:
            DataError: it cannot be read.
            MaskError: it is no mask, or has a number that is none of a class.
        """
        path = self.mask_paths[index]
        return to_labels(read_mask(path), len(self.class_names), self.reduce_zero_label, path)

    def load(self, index: int, decode_size: Optional[DecodeSize] = None) -> tuple[Image.Image, np.ndarray]:  # type: ignore[override]
        """Image `index` as RGB, always whole, and its mask, (H, W) int32.

        Raises:
            DataError: one of them cannot be read.
            MaskError: the mask is none, has another size than the image, or a number that is none of a class.
        """
        image, mask = self.load_image(index), self.load_mask(index)
        if image.size != mask.shape[::-1]:
            raise MaskError(self.sizes_differ(index, (image.height, image.width), mask.shape))
        return image, mask

    def sizes_differ(self, index: int, image: tuple[int, ...], mask: tuple[int, ...]) -> str:
        """What to say of an image and its mask with different (height, width)."""
        turned = image == mask[::-1]
        hint = "a mask is never resized or turned: one that is of this image has its size"
        if turned:
            hint = "one of them is turned: by an EXIF tag of the image? " + (
                "--exif_orientation false takes it as it is stored"
                if self.exif_orientation
                else "--exif_orientation true turns it by its tag"
            )
        return (
            f"{self.paths[index]} has {image[1]}x{image[0]} pixels (width x height) and its mask "
            f"{self.mask_paths[index]} {mask[1]}x{mask[0]}; expected the same size: {hint}"
        )

    # ------------------------------------------------------------------------------------- before training

    def check(self, sample: int = SAMPLE) -> None:
        """Looks at the beginning of every file, and at the pixels of some masks, evenly from the first to the last.

        Single files that cannot be read are left to the reading, which may be told to bear some.

        Raises:
            DataError: none of the first images, or less than half of the masks, can be read.
            MaskError: masks are none, have another size than their images, or numbers that are none of a class; or all
                that were looked at are black and white while there are two classes.
        """
        self.check_headers()
        looked = in_threads(self._header_fault, range(len(self)))
        unreadable = [str(error) for error in looked if isinstance(error, DataError)]
        if 2 * len(unreadable) > len(self):
            raise DataError(
                f"{self.split}: {len(unreadable):,} of {len(self):,} masks cannot be read; are they image files?"
                f"{formatted_list('Masks', unreadable)}"
            )
        self._refuse([fault for fault in looked if isinstance(fault, str) and fault], len(self), "masks")
        some = np.unique(np.linspace(0, len(self) - 1, min(sample, len(self))).astype(int))
        numbers = in_threads(self._numbers, [int(index) for index in some])
        self._refuse([found for found in numbers if isinstance(found, str)], len(some), "masks looked at")
        values = [value for found in numbers if not isinstance(found, str) for value in found]
        self.check_binary(values, self.mask_paths[int(some[0])])

    def check_binary(self, values: Sequence[int], path: str) -> None:
        """MaskError where the masks' numbers are those of pictures in black and white, but there are two classes."""
        if len(self.class_names) == 2 and not self.reduce_zero_label and is_binary(values):
            white = max(values)
            raise MaskError(
                f"{path} and the other masks hold 0 and {white} only, and there are two classes; expected 0 and 1 "
                f"({IGNORE} is ignored, so that nothing but {self.class_names[0]} would be learnt). Divide the masks "
                f"by {white}: Image.open(FILE).point(lambda v: v // {white}).save(FILE)"
            )

    def _header_fault(self, index: int) -> Union[str, DataError]:
        """What is wrong with image and mask, by the beginnings of the files; an error: the mask cannot be read."""
        try:
            mask = mask_size(self.mask_paths[index])
        except MaskError as error:
            return str(error)
        except DataError as error:
            return error
        try:
            size = self._image_size(index)
        except DataError:
            return ""
        return "" if size == mask else self.sizes_differ(index, size, mask)

    def _image_size(self, index: int) -> tuple[int, int]:
        with open_image(self.paths[index]) as image:
            # Pillow turns TIFF files by their tag itself.
            turns = self.exif_orientation or image.format == "TIFF"
            turned = turns and image.getexif().get(ORIENTATION, 1) in range(5, 9)
            return (image.width, image.height) if turned else (image.height, image.width)

    def image_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every image, by the beginnings of the files.

        Raises:
            DataError: one cannot be read.
        """
        return in_threads(self._image_size, range(len(self)))

    def _numbers(self, index: int) -> Union[list[int], str]:
        """The different numbers in a mask's file, or what is wrong with it."""
        try:
            numbers = read_mask(self.mask_paths[index])
            to_labels(numbers, len(self.class_names), self.reduce_zero_label, self.mask_paths[index])
        except MaskError as error:
            return str(error)
        except DataError:
            return []
        return np.unique(numbers).tolist()

    def _refuse(self, faults: Sequence[str], total: int, what: str) -> None:
        if faults:
            raise MaskError(
                f"{self.split}: {len(faults):,} of {total:,} {what} are not as they should be"
                f"{formatted_list('Masks', faults)}\nMend them, or leave these images out; "
                f"`mindska check_data --task segmentation` looks at all"
            )


def _bytes(path: str) -> int:
    """A file's size; -1 where there is none."""
    try:
        found = os.stat(path)  # noqa: PTH116 - paths are text
    except (OSError, ValueError):
        return -1
    return found.st_size if not os.path.isdir(path) else -1  # noqa: PTH112


# ----------------------------------------------------------------------------------------- pairs


def pair_by_stem(
    images: Sequence[str], masks: Sequence[str], folders: tuple[str, str], faults: Faults = None
) -> tuple[list[str], list[str]]:
    """The images in their order and the mask of each: both have the same path below their folders, but for the ending.

    Args:
        folders: in which the images and the masks are. faults: as of `SegmentationDataset`.

    Raises:
        DataError: two files of one folder have the same stem, or images have no mask.
    """
    found = []
    for files, folder in zip((images, masks), folders):
        by_stem: dict[str, str] = {}
        for path in files:
            other = by_stem.setdefault(_stem(path, folder), path)
            if other != path:
                raise DataError(
                    f"{other} and {path} have the same name but for the ending, by which images and masks are paired; "
                    f"rename one, or move it away"
                )
        found.append(by_stem)
    by_stem, masks_by_stem = found
    missing = [path for stem, path in by_stem.items() if stem not in masks_by_stem]
    if missing:
        some = next(iter(masks), "")
        hint = f"; the first mask there is {Path(some).name}" if len(missing) == len(by_stem) and some else ""
        _fault(
            f"{len(missing):,} of {len(images):,} images in {folders[0]} have no mask in {folders[1]}, which holds "
            f"{len(masks):,}; expected masks of the same names with another ending (a.jpg: a.png){hint}"
            f"{formatted_list('Images without a mask', missing)}",
            faults,
        )
    alone = [path for stem, path in masks_by_stem.items() if stem not in by_stem]
    if alone:
        log.warning("%d masks in %s have no image and are not used: %s", len(alone), folders[1], few(alone, 3))
    both = [stem for stem in by_stem if stem in masks_by_stem]
    return [by_stem[stem] for stem in both], [masks_by_stem[stem] for stem in both]


def _stem(path: str, folder: str) -> str:
    return _name_key(os.path.splitext(os.path.relpath(path, folder))[0])  # noqa: PTH122


def _name_key(name: str) -> str:
    """What a name has in common with others that look the same, in any locale."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "surrogateescape"))


def _folder_pair(
    images: Path, masks: Path, split: str, root: Path, class_names: Sequence[str], **options: Any
) -> SegmentationDataset:
    for folder in (images, masks):
        if not is_folder(folder):
            there = few(subfolders(folder.parent)[0]) if is_folder(folder.parent) else ""
            raise DataError(f"No folder {folder}" + (f"; {folder.parent} has: {there or 'no folder'}" if there else ""))
    found, found_masks = find_images(str(images)), find_images(str(masks))
    found.report_links()
    pairs = pair_by_stem(found.paths, found_masks.paths, (str(images), str(masks)), options.get("faults"))
    if not found.paths:
        endings = ", ".join(sorted(EXTENSIONS))
        raise DataError(f"{images} has no image ({endings}){found.passed_over_text()}")
    dataset = SegmentationDataset(root, split, *pairs, class_names, **options)
    dataset.passed_over = found.passed_over_text()
    return dataset


# ----------------------------------------------------------------------------------------- lists


@dataclass(frozen=True)
class _Layout:
    """Where a data set's files are: in `images`, and in the first of `masks` that has one of the name."""

    root: Path
    images: Path
    masks: tuple[Path, ...]
    lists: tuple[Path, ...]


def _find_list(layout: _Layout, split: str) -> Optional[Path]:
    names = [split] if split.endswith(".txt") else [f"{split}.txt"]
    if split == "trainaug":
        names.append("train_aug.txt")
    places = [folder / name for folder in layout.lists for name in names]
    if split.endswith(".txt"):
        places = [Path(os.path.expanduser(split)), layout.root / split, *places]  # noqa: PTH111
    return next((place for place in places if place.is_file()), None)


def _from_list(
    file: Path, layout: _Layout, class_names: Sequence[str], allow_outside: bool, **options: Any
) -> SegmentationDataset:
    """The images that a text file names: one a line, or an image and its mask."""
    try:
        # As the system has file names, whatever the locale.
        text = os.fsdecode(file.read_bytes().removeprefix(codecs.BOM_UTF8))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    images, masks, wrong = [], [], []
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    by_stem: dict[Path, dict[str, str]] = {}

    def named(folder: Path, stem: str) -> str:
        """The file of a name without ending; empty: there is none."""
        if folder not in by_stem:
            files = find_images(str(folder)).paths if is_folder(folder) else []
            by_stem[folder] = {_stem(path, str(folder)): path for path in reversed(files)}
        return by_stem[folder].get(_name_key(stem), "")

    inside = os.path.normpath(layout.root.absolute())

    def placed(path: str) -> str:
        """A path of a list, below the root; lists of others begin with a slash there."""
        path = path.replace("\\", "/")
        if allow_outside and os.path.isabs(path) and os.path.exists(path):  # noqa: PTH110, PTH117
            return path
        full = os.path.normpath(os.path.join(inside, path.lstrip("/")))  # noqa: PTH118
        if not (allow_outside or full.startswith(os.path.join(inside, ""))):  # noqa: PTH118
            raise DataError(f"{path!r} is outside of {layout.root}; --allow_outside_data_dir true takes it")
        return str(layout.root / os.path.relpath(full, inside))

    for number, line in lines:
        words = line.split("\t") if "\t" in line else line.split()
        try:
            stem = line if named(layout.images, line) else os.path.splitext(line)[0]  # noqa: PTH122
            image = named(layout.images, stem)
            if len(words) == 1 or image:
                mask = next(filter(None, (named(folder, stem) for folder in layout.masks)), "")
                if not image:
                    raise DataError(f"no image {stem} in {layout.images}")
                if not mask:
                    raise DataError(f"no mask {stem} in {' or '.join(map(str, layout.masks))}")
            elif len(words) == 2:
                image, mask = (placed(word.strip()) for word in words)
                for what, path in (("image", image), ("mask", mask)):
                    if _bytes(path) < 0:
                        raise DataError(f"no {what} at {path}")
            else:
                raise DataError(f"{line[:80]!r} is no name, and not an image and its mask (a tab may stand between)")
        except DataError as error:
            wrong.append(f"line {number}: {error}")
            continue
        images.append(image)
        masks.append(mask)
    if wrong or not lines:
        _fault(
            f"{file}: {len(wrong):,} of {len(lines):,} lines are wrong; expected the name of an image a line, or an "
            f"image and its mask relative to {layout.root}{formatted_list('Lines', wrong)}",
            options.get("faults"),
        )
    split = file.stem if file.parent in layout.lists else str(file)
    return SegmentationDataset(layout.root, split, images, masks, class_names, **options)


# ----------------------------------------------------------------------------------------- data sets


def _root(data_dir: Path, below: Sequence[str], what: str) -> Path:
    """The folder that holds `what`: data_dir, or one that it usually is in."""
    places = [data_dir, *(data_dir / name for name in below)]
    return next((place for place in places if is_folder(place / what)), data_dir)


def _names(root: Path, data_dir: Path, class_map: Union[str, Path], published: Sequence[str] = ()) -> list[str]:
    places = [Path(class_map)] if str(class_map) else [folder / CLASSES for folder in (root, data_dir)]
    for place in places:
        if str(class_map) or place.is_file():
            return read_class_map(place)
    if not published:
        raise DataError(
            f"No {CLASSES} in {root}: it names the classes of the masks, one a line, the first that of number 0; "
            f"--class_map FILE names another"
        )
    return list(published)


def _ade20k(
    data_dir: Path, split: str, class_map: Union[str, Path], allow: bool, **options: Any
) -> SegmentationDataset:
    root = _root(data_dir, ADE20K_PLACES, "annotations")
    name = ADE20K_SPLITS.get(split, split)
    names = _names(root, data_dir, class_map, ADE20K)
    return _folder_pair(root / "images" / name, root / "annotations" / name, split, root, names, **options)


def _voc(data_dir: Path, split: str, class_map: Union[str, Path], allow: bool, **options: Any) -> SegmentationDataset:
    root = _root(data_dir, VOC_PLACES, "JPEGImages")
    folders = [root / name for name in ("SegmentationClass", "SegmentationClassAug")]
    augmented = "aug" in Path(split).stem.lower()
    masks = tuple(reversed(folders) if augmented else folders)
    layout = _Layout(root, root / "JPEGImages", masks, (root / LISTS, root / "list"))
    file = _find_list(layout, split)
    if file is None:
        there = few(sorted(path.name for folder in layout.lists for path in folder.glob("*.txt"))) or "none"
        raise DataError(f"No list {split}.txt in {root / LISTS}; its lists: {there}")
    return _from_list(file, layout, _names(root, data_dir, class_map, PASCAL_VOC), allow, **options)


def _folders(
    data_dir: Path, split: str, class_map: Union[str, Path], allow: bool, **options: Any
) -> SegmentationDataset:
    names = _names(data_dir, data_dir, class_map)
    for images, masks in FOLDERS:
        for pair in ((data_dir / images / split, data_dir / masks / split),
                     (data_dir / split / images, data_dir / split / masks)):  # fmt: skip
            if any(is_folder(folder) for folder in pair):
                if split == "." and is_folder(data_dir / images / "train"):
                    raise DataError(
                        f"{data_dir / images} has a folder train: val_ratio is a share of that one, and needs no other"
                    )
                said = split if split != "." else "images"
                return _folder_pair(*pair, said, data_dir, names, **options)
    folder_names = next(((i, m) for i, m in FOLDERS if is_folder(data_dir / i)), FOLDERS[0])
    layout = _Layout(data_dir, data_dir / folder_names[0], (data_dir / folder_names[1],), (data_dir,))
    file = _find_list(layout, split)
    if file is None:
        raise DataError(
            f"No {split!r} in {data_dir}; expected images/{split} and masks/{split}, {split}/images and {split}/masks, "
            f"or images, masks and a list {split}.txt. Where all is in images and masks, --val_ratio 0.2 keeps a fifth "
            f"for validation"
        )
    return _from_list(file, layout, names, allow, **options)


LAYOUTS = {"ade20k": _ade20k, "voc": _voc, "folders": _folders}


def find_layout(data_dir: Path) -> str:
    """Which of the layouts a folder has, by its folders."""
    for name, below, folders in (
        ("ade20k", ADE20K_PLACES, [f"annotations/{split}" for split in ADE20K_SPLITS.values()]),
        ("voc", VOC_PLACES, ["JPEGImages"]),
    ):
        if any(is_folder(_root(data_dir, below, folder) / folder) for folder in folders):
            return name
    return "folders"


def open_segmentation_dataset(
    name: str,
    data_dir: Union[str, Path],
    split: str,
    class_map: Union[str, Path] = "",
    reduce_zero_label: Optional[bool] = None,
    exif_orientation: bool = False,
    allow_outside_data_dir: bool = False,
    faults: Faults = None,
) -> SegmentationDataset:
    """A split of images with masks: "ade20k", "voc" or "folders"; empty: whichever `data_dir` looks like.

    How many images and classes it has goes to the log. `SegmentationDataset.check` looks at the files.

    Args:
        split: a folder or a list of images, as the layout has them ("train", "val", "trainaug"); a file that ends with
            .txt; "." for all of a pair of folders.
        class_map: text file with the classes in the order of their numbers; default: classes.txt, or those of the
            published data set.
        reduce_zero_label: 0 in a mask is no class, and 1 the first; default: of ADE20K only.
        allow_outside_data_dir: a list may name files elsewhere.
        faults: where there is a list, images without a mask are named in it and left out.

    Raises:
        DataError: a folder, list or file is missing or is not what it should be.
    """
    if name not in ("", *LAYOUTS):
        raise DataError(f"dataset is {name!r}; expected one of {', '.join(LAYOUTS)} for segmentation")
    if not str(data_dir):
        raise DataError("data_dir is not set: name the folder that holds the images, e.g. --data_dir DATA")
    data_dir = Path(data_dir)
    if not is_folder(data_dir):
        raise DataError(f"No data folder at {data_dir.absolute()}")
    name = name or find_layout(data_dir)
    zero = name == "ade20k" if reduce_zero_label is None else reduce_zero_label
    options = dict(reduce_zero_label=zero, exif_orientation=exif_orientation, faults=faults)
    dataset = LAYOUTS[name](data_dir, split, class_map, allow_outside_data_dir, **options)
    log.info("%s", dataset)
    return dataset


def open_training_and_validation(
    name: str,
    data_dir: Union[str, Path],
    train_split: str = "train",
    val_split: str = "val",
    val_ratio: float = 0.0,
    val_seed: int = 0,
    validation: bool = True,
    **options: Any,
) -> tuple[SegmentationDataset, Optional[SegmentationDataset]]:
    """The training images and those for validation.

    Args:
        val_ratio: share of the training images that is kept for validation in the place of `val_split`; 0: none.
        validation: whether the latter are asked for; the training images are the same in either case.
        options: as of `open_segmentation_dataset`.

    Raises:
        DataError: as of `open_segmentation_dataset`; or there is one image only to divide.
    """
    if not val_ratio:
        train = open_segmentation_dataset(name, data_dir, train_split, **options)
        return train, open_segmentation_dataset(name, data_dir, val_split, **options) if validation else None
    if (name or find_layout(Path(data_dir))) == "folders" and train_split == "train" and not _has_train(Path(data_dir)):
        train_split = "."
    whole = open_segmentation_dataset(name, data_dir, train_split, **options)
    train, val = split_segmentation_by_ratio(whole, val_ratio, val_seed)
    return train, val if validation else None


def _has_train(data_dir: Path) -> bool:
    names = [(images, "train") for images, _ in FOLDERS] + [("train", images) for images, _ in FOLDERS]
    return any(is_folder(data_dir / a / b) for a, b in names) or (data_dir / "train.txt").is_file()


def split_segmentation_by_ratio(
    dataset: SegmentationDataset, val_ratio: float, val_seed: int
) -> tuple[SegmentationDataset, SegmentationDataset]:
    """The training and the validation part of a set, by the images' names alone (see `mindska.data.split_by_ratio`).

    Raises:
        DataError: it has one image only.
    """
    if len(dataset) < 2:
        raise DataError(f"{dataset.split} has one image only: val_ratio cannot keep one for validation")
    held = np.zeros(len(dataset), bool)
    held[held_out([dataset.member(index)[0] for index in range(len(dataset))], val_ratio, val_seed)] = True
    said = f"{100 * val_ratio:g} % of {dataset.split}"
    train = dataset.subset(np.flatnonzero(~held).tolist(), f"training (all but {said})")
    val = dataset.subset(np.flatnonzero(held).tolist(), f"validation ({said})")
    train.held_out = val
    return train, val
