"""What all data sets have in common, and the view of a part of one."""

from __future__ import annotations

import hashlib
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Optional, Union

import numpy as np
from PIL import Image

from ..errors import DataError, printable
from .images import DecodeSize, open_image, read_image

log = logging.getLogger("mindska")

HEADERS = 10  # images of a class of which one must be an image
THREADS = 16  # a network file system answers many questions at once


class ImageDataset:
    """Images with labels.

    Attributes:
        root: the folder that the images' names are relative to; split: what the set is called in messages.
        class_names: in the order of the classes' numbers; labels: (N,) int32.
        passed_over: for the end of a message, what was found and is no part of it.
        held_out: of the training part of a set that was split: the other part.
    """

    root: Path
    split: str
    class_names: list[str]
    labels: np.ndarray
    passed_over: str = ""
    held_out: Optional[ImageDataset] = None
    _identity: Optional[dict[str, Any]] = None
    _by_class: Optional[list[np.ndarray]] = None

    def __len__(self) -> int:
        return len(self.labels)

    def __str__(self) -> str:
        return printable(
            f"{self.split}: {len(self):,} images of {len(self.class_names):,} classes in {self.root.absolute()}"
            f"{self.passed_over}"
        )

    def by_class(self) -> list[np.ndarray]:
        """The numbers of the images of each class, in their order."""
        if self._by_class is None:
            order = np.argsort(self.labels, kind="stable")
            ends = np.searchsorted(self.labels[order], np.arange(1, len(self.class_names)))
            self._by_class = np.split(order, ends)
        return self._by_class

    def member(self, index: int) -> tuple[str, int]:
        """(name, size in bytes or a checksum) of image `index`: on all hosts the same, wherever the data lies."""
        raise NotImplementedError

    def members(self, label: int) -> list[tuple[str, int]]:
        """`member` of each image of a class."""
        return [self.member(index) for index in self.by_class()[label]]

    def identity(self) -> dict[str, Any]:
        """What tells this set of images from another: their number, the classes' number, and a digest of the images'
        names and sizes, of their labels, and of the classes' names."""
        if self._identity is None:
            digest = hashlib.sha256(repr(self.class_names).encode())
            for label in range(len(self.class_names)):
                lines = (f"{name}\0{size}\0{label}\0" for name, size in self.members(label))
                digest.update("".join(lines).encode("utf-8", "surrogateescape"))
            self._identity = dict(images=len(self), classes=len(self.class_names), digest=digest.hexdigest()[:32])
        return self._identity

    def describe(self, index: int) -> str:
        """What to call image `index` in a message."""
        raise NotImplementedError

    def listed(self, index: int, data_dir: Union[str, Path]) -> str:
        """Image `index` as a list of images names it: a file's path below `data_dir` (without one: below
        the root), else its name."""
        return self.member(index)[0]

    def content(self, index: int) -> bytes:
        """The bytes of image `index`, as they are stored.

        Raises:
            DataError: they cannot be read.
        """
        raise NotImplementedError

    def open(self, index: int) -> AbstractContextManager[Image.Image]:
        """Image `index`, opened but not decoded; errors as of `load`."""
        raise NotImplementedError

    def load(self, index: int, decode_size: Optional[DecodeSize] = None) -> Image.Image:
        """Image `index` as RGB; `decode_size` as for `read_image`.

        Raises:
            DataError: it cannot be read; the message names it.
        """
        raise NotImplementedError

    def check_headers(self) -> None:
        """A class of text files named .jpg is found now and not hours later; single damaged files are not.

        Raises:
            DataError: none of a class's first images is one.
        """
        for indices in self.by_class():
            reasons = []
            for index in indices[:HEADERS]:
                try:
                    with self.open(index):
                        break
                except DataError as error:
                    reasons.append(str(error))
            else:
                if reasons:
                    raise DataError(f"{reasons[0]}; nor can the next: is this a folder of images?")


class ImageFiles(ImageDataset):
    """Images that are files.

    Attributes:
        paths: as text: a million paths as objects take a gigabyte. sizes: in bytes; -1: a link that leads nowhere.
        exif_orientation: turn images as their EXIF tag says.
    """

    paths: list[str]
    sizes: list[int]
    exif_orientation: bool = False

    def member(self, index: int) -> tuple[str, int]:
        """(name below the root, size in bytes); of a file elsewhere its path."""
        path, below = self.paths[index], self.below
        return path[len(below) :] if path.startswith(below) else path, self.sizes[index]

    @cached_property
    def below(self) -> str:
        """How paths below the root begin; "./a" is "a"."""
        return str(self.root / "_")[:-1]

    def describe(self, index: int) -> str:
        return self.paths[index]

    def listed(self, index: int, data_dir: Union[str, Path]) -> str:
        return os.path.relpath(self.paths[index], data_dir if str(data_dir) else self.root)

    def content(self, index: int) -> bytes:
        try:
            return Path(self.paths[index]).read_bytes()
        except OSError as error:
            raise DataError(f"{self.paths[index]} cannot be read: {error.strerror or error}") from error

    def open(self, index: int) -> AbstractContextManager[Image.Image]:
        return open_image(self.paths[index])

    def load(self, index: int, decode_size: Optional[DecodeSize] = None) -> Image.Image:
        return read_image(self.paths[index], decode_size, self.exif_orientation)


class ImageArrays(ImageDataset):
    """Images of one size that are held in memory.

    Attributes:
        name: of the data set. pixels: (N, ...) uint8, as in its files.
    """

    name: str
    pixels: np.ndarray

    def __str__(self) -> str:
        classes = len(self.class_names)
        return printable(
            f"{self.name} {self.split}: {len(self):,} images of {classes:,} classes in {self.root.absolute()}"
        )

    def number(self, labels: np.ndarray, own_names: list[str], order: Callable[[list[str]], list[str]]) -> None:
        """Sets labels and class names, the latter in the order that `order` gives to those of the files."""
        self.class_names, self.labels = order(own_names), labels.astype(np.int32)
        if self.class_names != own_names:
            self.labels = np.asarray([self.class_names.index(name) for name in own_names], np.int32)[self.labels]

    def identity(self) -> dict[str, Any]:
        """As of `ImageDataset`; the digest is of pixels, labels and class names."""
        if self._identity is None:
            digest = hashlib.sha256(repr(self.class_names).encode())
            digest.update(self.labels.tobytes())
            digest.update(np.ascontiguousarray(self.pixels).tobytes())
            self._identity = dict(images=len(self), classes=len(self.class_names), digest=digest.hexdigest()[:32])
        return self._identity

    def member(self, index: int) -> tuple[str, int]:
        """(what to call it, checksum of its pixels)"""
        return f"image {index}", zlib.crc32(self.pixels[index].tobytes())

    def describe(self, index: int) -> str:
        return f"{self.name} {self.split} image {index}"

    def content(self, index: int) -> bytes:
        return self.pixels[index].tobytes()

    def as_image(self, index: int) -> Image.Image:
        """Image `index` as it is stored: RGB or grey."""
        raise NotImplementedError

    @contextmanager
    def open(self, index: int) -> Iterator[Image.Image]:
        yield self.as_image(index)

    def load(self, index: int, decode_size: Optional[DecodeSize] = None) -> Image.Image:
        """Image `index` as RGB, always whole."""
        return self.as_image(index).convert("RGB")


class Subset(ImageDataset):
    """Some images of a data set, or its images under other labels: a view.

    Args:
        indices: of the images; labels: theirs; default: those that they have.
        class_names: default: those of the data set.
        said: what to call it in messages.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        indices: np.ndarray,
        said: str,
        labels: Optional[np.ndarray] = None,
        class_names: Optional[Sequence[str]] = None,
    ) -> None:
        self.dataset, self.indices, self.split, self.root = dataset, np.asarray(indices, np.int64), said, dataset.root
        self.class_names = list(dataset.class_names if class_names is None else class_names)
        self.labels = np.asarray(dataset.labels[self.indices] if labels is None else labels, np.int32)

    def member(self, index: int) -> tuple[str, int]:
        return self.dataset.member(int(self.indices[index]))

    def describe(self, index: int) -> str:
        return self.dataset.describe(int(self.indices[index]))

    def listed(self, index: int, data_dir: Union[str, Path]) -> str:
        return self.dataset.listed(int(self.indices[index]), data_dir)

    def content(self, index: int) -> bytes:
        return self.dataset.content(int(self.indices[index]))

    def open(self, index: int) -> AbstractContextManager[Image.Image]:
        return self.dataset.open(int(self.indices[index]))

    def load(self, index: int, decode_size: Optional[DecodeSize] = None) -> Image.Image:
        return self.dataset.load(int(self.indices[index]), decode_size)


def relabelled(dataset: ImageDataset, class_names: Sequence[str], names: Sequence[str], said: str) -> Subset:
    """The images of some classes, numbered by another list of classes.

    Args:
        class_names: the new classes in the order of their numbers.
        names: what each class of the data set is called among them; empty: its images are left out.
    """
    number = {name: i for i, name in enumerate(class_names)}
    table = np.asarray([number[name] if name else -1 for name in names], np.int32)
    labels = table[dataset.labels]
    kept = np.flatnonzero(labels >= 0)
    return Subset(dataset, kept, said, labels[kept], class_names)


def in_threads(function: Any, items: Sequence[Any]) -> list[Any]:
    """`function` of each item, in order, by several threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))
