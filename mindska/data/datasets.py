"""Image classification data on disk: folders of images, or CIFAR in its binary format.

Pillow is the definition of an image's pixels: whatever it reads, converted to RGB.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Callable, Optional, Union

import numpy as np
from PIL import Image

from ..errors import UserError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif"}


class DataError(UserError, ValueError):
    """Data that is missing or unreadable; the message names the path and what was expected."""


# From an image's (width, height) in pixels to the size that is enough for its user.
Enough = Callable[[tuple[int, int]], tuple[int, int]]
HEADERS = 10  # images of a class of which one must be an image

# What Pillow raises for files that are no images, or broken ones; EOFError: for ones without a frame (WebP, GIF, TIFF).
UNREADABLE = (OSError, EOFError, ValueError, SyntaxError, Image.DecompressionBombError)


class ImageFolder:
    """`data_dir/split/class/**/*.jpg` (or another image format); classes are numbered in the order of their names.

    Hidden files and folders, and files with other extensions, are passed over.
    """

    def __init__(self, data_dir: Union[str, Path], split: str) -> None:
        data_dir = Path(data_dir)
        root = self.root = data_dir / split
        if not root.is_dir():
            found = ", ".join(sorted(p.name for p in data_dir.iterdir() if p.is_dir())) or "none"
            raise DataError(f"No split {split!r} in {data_dir}; its folders: {found}")
        self.class_names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not self.class_names:
            raise DataError(f"{root} has no class folders; expected {root}/CLASS/IMAGE.jpg")
        self.paths: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(self.class_names):
            files = image_files(root / name)
            if not files:
                raise DataError(f"{root / name} has no image ({', '.join(sorted(EXTENSIONS))})")
            self.paths += files
            labels += [label] * len(files)
        self.labels = np.asarray(labels, np.int32)
        self._check_headers()

    def _check_headers(self) -> None:
        """A folder of text files named .jpg is found now and not hours later; single damaged files are not."""
        first = np.searchsorted(self.labels, np.arange(len(self.class_names) + 1))
        for start, end in zip(first, first[1:]):
            reasons = []
            for index in range(start, min(end, start + HEADERS)):
                try:
                    with Image.open(self.paths[index]):
                        break
                except UNREADABLE as error:
                    reasons.append(str(error))
            else:
                raise DataError(f"{self.paths[start]} is no image that Pillow can read: {reasons[0]}; nor are the next")

    def __len__(self) -> int:
        return len(self.paths)

    def identity(self) -> dict[str, Any]:
        """What tells this set of images from another: their number, the classes' number, and a digest of the images'
        names (below the split's folder), sizes in bytes and labels, and of the classes' names."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        for path, label in zip(self.paths, self.labels):
            size = os.path.getsize(path)  # noqa: PTH202 - as text, as the paths are
            entry = f"{os.path.relpath(path, self.root)}\0{size}\0{label}\0"
            digest.update(entry.encode("utf-8", "surrogateescape"))
        return dict(images=len(self), classes=len(self.class_names), digest=digest.hexdigest()[:32])

    def describe(self, index: int) -> str:
        """What to call image `index` in a message."""
        return self.paths[index]

    def load(self, index: int, enough: Optional[Enough] = None) -> Image.Image:
        """Image `index` as RGB; `enough` as for `read_image`.

        Raises:
            DataError: it cannot be read; the message names its path.
        """
        return read_image(self.paths[index], enough)


def read_image(path: Union[str, Path], enough: Optional[Enough] = None) -> Image.Image:
    """An image file as RGB.

    Args:
        enough: from the image's (width, height) to the size that is enough. A JPEG file is decoded at a half, a quarter
            or an eighth of its size where that is no less, several times as fast.

    Raises:
        DataError: it cannot be read; the message names its path.
    """
    try:
        with Image.open(path) as image:
            if enough is not None:
                image.draft(None, enough(image.size))
            return image.convert("RGB")
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def image_files(folder: Path) -> list[str]:
    """The images under a folder, sorted; as text, because a million paths as objects take a gigabyte."""
    found: list[str] = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = (f for f in files if not f.startswith(".") and os.path.splitext(f)[1].lower() in EXTENSIONS)  # noqa: PTH122
        found += [f"{parent}{os.sep}{name}" for name in images]
    return sorted(found)


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

    def __init__(self, name: str, data_dir: Union[str, Path], split: str) -> None:
        folder, label_bytes, train, test, names = self.FILES[name]
        root = Path(data_dir)
        root = root / folder if (root / folder).is_dir() else root
        files = {"train": train, "val": test, "test": test}.get(split)
        if files is None:
            raise DataError(f"{name} has no split {split!r}; its splits: train, val")
        missing = [file for file in [*files, names] if not (root / file).is_file()]
        if missing:
            raise DataError(f"{name} is not in {root.absolute()}: missing {', '.join(missing)} (binary version)")
        self.name, self.split = name, split
        self.class_names = (root / names).read_text(encoding="ascii").split()
        size = label_bytes + self.PIXELS
        records = []
        for file in files:
            data = np.fromfile(root / file, np.uint8)
            if data.size == 0 or data.size % size:
                raise DataError(f"{root / file} has {data.size} bytes; expected a multiple of {size}: is it complete?")
            records.append(data.reshape(-1, size))
        table = np.concatenate(records)
        self.labels = table[:, label_bytes - 1].astype(np.int32)  # CIFAR-100: coarse label, then fine label
        if self.labels.max() >= len(self.class_names):
            raise DataError(f"{root} has label {self.labels.max()} but {len(self.class_names)} class names")
        self.pixels = table[:, label_bytes:].reshape(-1, 3, 32, 32)

    def __len__(self) -> int:
        return len(self.labels)

    def identity(self) -> dict[str, Any]:
        """As of `ImageFolder`; the digest is of pixels, labels and class names."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        digest.update(self.labels.tobytes())
        digest.update(np.ascontiguousarray(self.pixels).tobytes())
        return dict(images=len(self), classes=len(self.class_names), digest=digest.hexdigest()[:32])

    def describe(self, index: int) -> str:
        """What to call image `index` in a message."""
        return f"{self.name} {self.split} image {index}"

    def load(self, index: int, enough: Optional[Enough] = None) -> Image.Image:
        """Image `index` as RGB, always whole."""
        return Image.fromarray(np.ascontiguousarray(self.pixels[index].transpose(1, 2, 0)))


Dataset = Union[ImageFolder, Cifar]


def open_dataset(name: str, data_dir: Union[str, Path], split: str) -> Dataset:
    """A split of a data set: "imagenet" (or any folder of class folders), "cifar10", "cifar100".

    Raises:
        DataError: a folder, split or file is missing or is not what it should be.
    """
    if name not in ("", "imagenet", *Cifar.FILES):
        raise DataError(f"dataset is {name!r}; expected imagenet (folders of images), {' or '.join(Cifar.FILES)}")
    if not str(data_dir):
        raise DataError("data_dir is not set: name the folder that holds the images, e.g. --data_dir DATA")
    if not Path(data_dir).is_dir():
        raise DataError(f"No data folder at {Path(data_dir).absolute()}")
    return Cifar(name, data_dir, split) if name in Cifar.FILES else ImageFolder(data_dir, split)


def check_same_classes(train: Dataset, val: Dataset) -> None:
    """DataError when two splits do not have the same classes: their labels would mean different things."""
    if train.class_names != val.class_names:
        only_train = sorted(set(train.class_names) - set(val.class_names))
        only_val = sorted(set(val.class_names) - set(train.class_names))
        raise DataError(
            f"Training and validation data have different classes: only in training: {only_train[:10]}, "
            f"only in validation: {only_val[:10]}"
        )
