"""One set of images in two parts, for training and for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ..errors import DataError, few
from .base import ImageDataset, Subset


def split_by_ratio(dataset: ImageDataset, val_ratio: float, val_seed: int) -> tuple[Subset, Subset]:
    """The training and the validation part of a data set: of each class the same share, by the images' names.

    An image's place depends on `val_seed` and the names in its class alone: the same files are split alike on every
    host and at every start, whatever the order in which they are listed. A new file moves at most two others.

    Args:
        val_ratio: share of the images of each class that the validation part gets: rounded, at least one image, and
            not all of them.

    Raises:
        DataError: a class has one image only.
    """
    single = [dataset.class_names[label] for label, found in enumerate(dataset.by_class()) if len(found) == 1]
    if single:
        raise DataError(
            f"{len(single)} classes in {dataset.root} have one image only ({few(single)}): val_ratio cannot keep one "
            f"for validation and one for training. Add images, or leave these out with --classes"
        )
    held = np.zeros(len(dataset), bool)
    for indices in dataset.by_class():
        if len(indices):
            names = [dataset.member(int(index))[0] for index in indices]
            held[indices[held_out(names, val_ratio, val_seed)]] = True
    said = f"{100 * val_ratio:g} % of {dataset.split}"
    val = Subset(dataset, np.flatnonzero(held), f"validation ({said})")
    train = Subset(dataset, np.flatnonzero(~held), f"training (all but {said})")
    train.held_out = val
    return train, val


def held_out(names: Sequence[str], val_ratio: float, val_seed: int) -> np.ndarray:
    """Which of at least two images, by their names, the validation part gets: their places, in no order."""
    count = min(max(1, int(val_ratio * len(names) + 0.5)), len(names) - 1)
    keys = [_key(name, val_seed) for name in names]
    return np.argsort(keys, kind="stable")[:count]


def _key(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogateescape")).digest()
