"""Image classification data on disk: folders of images, or CIFAR in its binary format."""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Optional, Union

import numpy as np
from PIL import Image

from ..errors import DataError, look_alike, printable
from .class_order import read_class_map
from .folders import Surroundings, find_images, is_folder, subfolders
from .images import EXTENSIONS, DecodeSize, open_image, read_image

log = logging.getLogger("mindska")

Order = Callable[[list[str]], list[str]]  # from the names of classes, sorted, to the order of their numbers
HEADERS = 10  # images of a class of which one must be an image
LISTING_THREADS = 16  # a network file system answers many questions at once


class ImageFolder:
    """`data_dir/split/class/**/*.jpg` (or another image format); classes are numbered in the order of their names.

    The order is that of text, as in torchvision and MindCV. Hidden files and folders, those of storage systems and
    files with other extensions are passed over and counted; `mindska.data.folders` says which links are followed.

    Args:
        order: from the names of the folders to the classes in the order of their numbers.
        exif_orientation: turn images as their EXIF tag says.
    """

    def __init__(
        self,
        data_dir: Union[str, Path],
        split: str,
        order: Order = list,
        exif_orientation: bool = False,
    ) -> None:
        root = Path(data_dir) / split
        if not is_folder(root):
            there = ", ".join(subfolders(data_dir)[0]) or "none"
            raise DataError(f"No split {split!r} in {data_dir}; its folders: {there}")
        self.root, self.split, self.exif_orientation = root, split, exif_orientation
        names, self.found = subfolders(root)
        if not names:
            raise DataError(
                f"{root} has no class folders; expected {root}/CLASS/IMAGE.jpg{self.found.passed_over_text()}"
            )
        if twins := look_alike(names):
            raise DataError(f"{root} has class folders that look the same{twins}")
        self.class_names = order(names)
        folders = {str(root / name): name for name in self.class_names}
        surroundings = Surroundings(folders)
        labels: list[int] = []
        with ThreadPoolExecutor(LISTING_THREADS) as pool:
            listings = pool.map(lambda folder: find_images(folder, surroundings), folders)
            for label, (folder, found) in enumerate(zip(folders, listings)):
                if not found.paths:
                    endings = ", ".join(sorted(EXTENSIONS))
                    raise DataError(f"{folder} has no image ({endings}){found.passed_over_text()}")
                self.found.add(found)
                labels += [label] * len(found.paths)
        self.paths = self.found.paths
        self.labels = np.asarray(labels, np.int32)
        self._identity: Optional[dict[str, Any]] = None
        self._check_headers()
        self.found.report_links()

    def _check_headers(self) -> None:
        """A folder of text files named .jpg is found now and not hours later; single damaged files are not."""
        first = np.searchsorted(self.labels, np.arange(len(self.class_names) + 1))
        for start, end in zip(first, first[1:]):
            reasons = []
            for index in range(start, min(end, start + HEADERS)):
                try:
                    with open_image(self.paths[index]):
                        break
                except DataError as error:
                    reasons.append(str(error))
            else:
                raise DataError(f"{reasons[0]}; nor can the next: is this a folder of images?")

    def __len__(self) -> int:
        return len(self.paths)

    def __str__(self) -> str:
        return printable(
            f"{self.split}: {len(self):,} images of {len(self.class_names):,} classes in {self.root.absolute()}"
            f"{self.found.passed_over_text()}"
        )

    def identity(self) -> dict[str, Any]:
        """What tells this set of images from another: their number, the classes' number, and a digest of the images'
        names (below the split's folder), sizes in bytes and labels, and of the classes' names."""
        if self._identity is None:
            digest = hashlib.sha256(repr(self.class_names).encode())
            for label in range(len(self.class_names)):
                lines = (f"{name}\0{size}\0{label}\0" for name, size in self.members(label))
                digest.update("".join(lines).encode("utf-8", "surrogateescape"))
            self._identity = dict(images=len(self), classes=len(self.class_names), digest=digest.hexdigest()[:32])
        return self._identity

    def members(self, label: int) -> list[tuple[str, int]]:
        """(name below the split's folder, size in bytes) of each image of a class."""
        start, end = np.searchsorted(self.labels, (label, label + 1))
        below = len(str(self.root / "_")) - 1  # "./a" is "a"
        return [(path[below:], size) for path, size in zip(self.paths[start:end], self.found.sizes[start:end])]

    def describe(self, index: int) -> str:
        """What to call image `index` in a message."""
        return self.paths[index]

    def load(self, index: int, decode_size: Optional[DecodeSize] = None) -> Image.Image:
        """Image `index` as RGB; `decode_size` as for `read_image`.

        Raises:
            DataError: it cannot be read; the message names its path.
        """
        return read_image(self.paths[index], decode_size, self.exif_orientation)


def image_files(folder: Union[str, Path]) -> list[str]:
    """The image files below a folder, sorted; how many there are, and what is passed over, goes to the log.

    Raises:
        DataError: a folder cannot be listed.
    """
    found = find_images(str(folder))
    found.report_links()
    log.info("%d images in %s%s", len(found.paths), printable(folder), printable(found.passed_over_text()))
    return found.paths


class Cifar:
    """CIFAR-10 or CIFAR-100 in the binary format of its authors: records of label bytes and 3 x 32 x 32 pixel bytes."""

    FILES = {  # name -> (usual folder, label bytes, training files, test files, class names)
        "cifar10": (
            "cifar-10-batches-bin",
            1,
            [f"data_batch_{i}.bin" for i in range(1, 6)],
            ["test_batch.bin"],
            "batches.meta.txt",
        ),
        "cifar100": ("cifar-100-binary", 2, ["train.bin"], ["test.bin"], "fine_label_names.txt"),
    }
    PIXELS = 3 * 32 * 32

    def __init__(self, name: str, data_dir: Union[str, Path], split: str, order: Order = list) -> None:
        folder, label_bytes, train, test, names = self.FILES[name]
        root = Path(data_dir)
        root = root / folder if is_folder(root / folder) else root
        files = {"train": train, "val": test, "test": test}.get(split)
        if files is None:
            raise DataError(f"{name} has no split {split!r}; its splits: train, val")
        missing = [file for file in [*files, names] if not (root / file).is_file()]
        if missing:
            raise DataError(f"{name} is not in {root.absolute()}: missing {', '.join(missing)} (binary version)")
        self.name, self.split, self.root = name, split, root
        try:
            own_names = (root / names).read_text(encoding="ascii").split()
            contents = [np.fromfile(root / file, np.uint8) for file in files]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{name} in {root.absolute()} cannot be read: {error}") from error
        size = label_bytes + self.PIXELS
        for file, data in zip(files, contents):
            if data.size == 0 or data.size % size:
                raise DataError(f"{root / file} has {data.size} bytes; expected a multiple of {size}: is it complete?")
        table = np.concatenate([data.reshape(-1, size) for data in contents])
        self.labels = table[:, label_bytes - 1].astype(np.int32)  # CIFAR-100: coarse label, then fine label
        if self.labels.max() >= len(own_names):
            raise DataError(f"{root} has label {self.labels.max()} but {len(own_names)} class names")
        self.class_names = order(own_names)
        if self.class_names != own_names:
            self.labels = np.asarray([self.class_names.index(name) for name in own_names], np.int32)[self.labels]
        self.pixels = table[:, label_bytes:].reshape(-1, 3, 32, 32)

    def __len__(self) -> int:
        return len(self.labels)

    def __str__(self) -> str:
        classes = len(self.class_names)
        return f"{self.name} {self.split}: {len(self):,} images of {classes:,} classes in {self.root.absolute()}"

    def identity(self) -> dict[str, Any]:
        """As of `ImageFolder`; the digest is of pixels, labels and class names."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        digest.update(self.labels.tobytes())
        digest.update(np.ascontiguousarray(self.pixels).tobytes())
        return dict(images=len(self), classes=len(self.class_names), digest=digest.hexdigest()[:32])

    def members(self, label: int) -> list[tuple[str, int]]:
        """(what to call it, checksum of its pixels) of each image of a class."""
        indices = np.flatnonzero(self.labels == label)
        return [(f"image {index}", zlib.crc32(self.pixels[index].tobytes())) for index in indices]

    def describe(self, index: int) -> str:
        """What to call image `index` in a message."""
        return f"{self.name} {self.split} image {index}"

    def load(self, index: int, decode_size: Optional[DecodeSize] = None) -> Image.Image:
        """Image `index` as RGB, always whole."""
        return Image.fromarray(np.ascontiguousarray(self.pixels[index].transpose(1, 2, 0)))


Dataset = Union[ImageFolder, Cifar]


def open_dataset(
    name: str,
    data_dir: Union[str, Path],
    split: str,
    class_map: Union[str, Path] = "",
    trained_on: Optional[Sequence[str]] = None,
    exif_orientation: bool = False,
) -> Dataset:
    """A split of a data set: "imagenet" (or any folder of class folders), "cifar10", "cifar100".

    How many images and classes it has, and what was passed over, goes to the log.

    Args:
        class_map: text file with the classes in the order of their numbers (see `read_class_map`).
        trained_on: the classes of a network in its order; where the data has the same ones, they are numbered like it.
        exif_orientation: turn images as their EXIF tag says.

    Raises:
        DataError: a folder, split or file is missing or is not what it should be.
    """
    if name not in ("", "imagenet", *Cifar.FILES):
        raise DataError(f"dataset is {name!r}; expected imagenet (folders of images), {' or '.join(Cifar.FILES)}")
    if not str(data_dir):
        raise DataError("data_dir is not set: name the folder that holds the images, e.g. --data_dir DATA")
    if not is_folder(data_dir):
        raise DataError(f"No data folder at {Path(data_dir).absolute()}")
    mapped = read_class_map(class_map) if str(class_map) else None

    def order(names: list[str]) -> list[str]:
        if mapped is None:
            return list(trained_on) if trained_on and Counter(trained_on) == Counter(names) else names
        if Counter(mapped) != Counter(names):
            raise DataError(
                f"The class map {class_map} does not fit {split} in {data_dir}: it names what is no class there: "
                f"{sorted(set(mapped) - set(names))[:10]}; it lacks classes: {sorted(set(names) - set(mapped))[:10]}"
                f"{look_alike(set(mapped) - set(names), set(names) - set(mapped))}"
            )
        return mapped

    dataset: Dataset
    if name in Cifar.FILES:
        dataset = Cifar(name, data_dir, split, order)
    else:
        dataset = ImageFolder(data_dir, split, order, exif_orientation)
    log.info("%s", dataset)
    return dataset
