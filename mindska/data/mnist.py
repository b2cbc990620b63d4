"""MNIST and the data sets in its idx format: Fashion-MNIST (Xiao et al., 2017) and Kuzushiji-MNIST (Clanuwat, 2018).

A file begins with a magic number (two zero bytes, 8 for unsigned bytes, the number of dimensions) and the dimensions,
32 bits each, high byte first; then come the bytes. It may be compressed by gzip, whatever its name says.

MindSpore's own `MnistDataset` reads these files too, but not compressed ones, and its samples depend on its generators
and workers; here they depend on seed, epoch and position only.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, Union

import numpy as np
from PIL import Image

from ..errors import DataError
from .base import ImageArrays
from .class_order import Order
from .folders import is_folder

UNSIGNED_BYTES = 8
GZIP = b"\x1f\x8b"
MAX_BYTES = 1 << 30  # of a file's content: MNIST's training images have 47,040,000
CHUNK = 1 << 20
DIGITS = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
CLOTHES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
HIRAGANA = ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"]


class Mnist(ImageArrays):
    """MNIST, Fashion-MNIST or Kuzushiji-MNIST: `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the same of
    `t10k` (the splits val and test), each with or without `.gz`; a dot in the place of the second dash will do.

    They lie in `data_dir`, or where torchvision puts them below it (`FashionMNIST/raw`). Images of another size than
    28x28 are taken as well, if they are all of one.
    """

    CLASSES = dict(mnist=DIGITS, fashion_mnist=CLOTHES, kmnist=HIRAGANA)
    FOLDERS = dict(mnist="MNIST", fashion_mnist="FashionMNIST", kmnist="KMNIST")

    def __init__(self, name: str, data_dir: Union[str, Path], split: str, order: Order = list) -> None:
        prefix = {"train": "train", "val": "t10k", "test": "t10k"}.get(split)
        if prefix is None:
            raise DataError(f"{name} has no split {split!r}; its splits: train, val")
        root, below = Path(data_dir), Path(data_dir) / self.FOLDERS[name] / "raw"
        self.name, self.split, self.root = name, split, below if is_folder(below) else root
        images, labels = (find_idx(self.root, prefix, what) for what in ("images-idx3", "labels-idx1"))
        numbers = read_idx(labels, 1)
        self.pixels = read_idx(images, 3)
        if len(self.pixels) != len(numbers):
            raise DataError(
                f"{images} has {len(self.pixels):,} images, but {labels} {len(numbers):,} labels; expected as many: "
                f"are they of one set?"
            )
        own_names = self.CLASSES[name]
        if numbers.max() >= len(own_names):
            at = int(np.argmax(numbers >= len(own_names)))
            raise DataError(
                f"{labels} has the label {numbers[at]} for image {at}, but {name} has {len(own_names)} classes; "
                f"expected 0 to {len(own_names) - 1}"
            )
        self.number(numbers, own_names, order)

    def as_image(self, index: int) -> Image.Image:
        """Image `index`, which is grey."""
        return Image.fromarray(self.pixels[index])


def find_idx(root: Path, prefix: str, what: str) -> Path:
    """The file of a set's images or labels; `what`: images-idx3 or labels-idx1.

    Raises:
        DataError: there is none.
    """
    names = [f"{prefix}-{middle}-ubyte{end}" for middle in (what, what.replace("-", ".")) for end in ("", ".gz")]
    found = next((root / name for name in names if (root / name).is_file()), None)
    if found is None:
        raise DataError(f"No {names[0]}, with or without .gz, in {root.absolute()}: name the folder of the four files")
    return found


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The unsigned bytes of an idx file of so many dimensions. No more is read than its header says, and no memory is
    taken before there is something to put there.

    Raises:
        DataError: it is no such file, has too few bytes or too many, holds nothing, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            compressed = file.read(len(GZIP)) == GZIP
            file.seek(0)
            if not compressed:
                return _read(file, path, dimensions)
            with gzip.GzipFile(fileobj=file) as unpacked:
                return _read(unpacked, path, dimensions)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {reason}; is it complete?") from error


def _read(file: Union[BinaryIO, gzip.GzipFile], path: Path, dimensions: int) -> np.ndarray:
    length = 4 + 4 * dimensions
    header = file.read(length)
    magic = struct.pack(">HBB", 0, UNSIGNED_BYTES, dimensions)
    if header[:4] != magic:
        raise DataError(
            f"{path} begins with the bytes {header[:4].hex(' ') or '(none)'}; expected {magic.hex(' ')}: an idx file "
            f"of unsigned bytes in {dimensions} dimension{'s' if dimensions > 1 else ''}"
        )
    if len(header) < length:
        raise DataError(f"{path} ends after {len(header)} bytes, within its header of {length}: is it complete?")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    size, said = math.prod(shape), "x".join(f"{side:,}" for side in shape)
    if not 0 < size <= MAX_BYTES:
        raise DataError(f"{path} says that it has {said} bytes; expected 1 to {MAX_BYTES:,} in all")
    content = bytearray()
    while len(content) <= size and (chunk := file.read(min(CHUNK, size + 1 - len(content)))):
        content += chunk  # to one byte more than there should be, where gzip's checksum is behind
    if len(content) != size:
        found = f"ends after {len(content):,} bytes" if len(content) < size else "goes on after that"
        raise DataError(f"{path} says that it has {said} bytes, but {found}: is it complete, and one file?")
    return np.frombuffer(content, np.uint8).reshape(shape)
