"""Whether two sets of images belong together: training and validation, and those that several hosts see."""

from __future__ import annotations

import zlib
from typing import Any

from ..distributed import all_gather_object
from ..errors import DataError, look_alike
from .datasets import Dataset


def check_same_classes(train: Dataset, val: Dataset) -> None:
    """DataError when two splits do not have the same classes: their labels would mean different things."""
    if train.class_names != val.class_names:
        only_train = sorted(set(train.class_names) - set(val.class_names))
        only_val = sorted(set(val.class_names) - set(train.class_names))
        raise DataError(
            f"Training and validation data have different classes: only in training: {only_train[:10]}, "
            f"only in validation: {only_val[:10]}{look_alike(only_val, only_train)}"
        )


def check_same_on_all_ranks(dataset: Dataset) -> None:
    """Compares what the ranks have found on their hosts; every rank must call it.

    Raises:
        DataError: on all ranks, when one has other images (by names, sizes, classes); the message shows the difference.
    """
    found = all_gather_object((str(dataset), dataset.identity()))
    other = next((rank for rank, (_, identity) in enumerate(found) if identity != found[0][1]), None)
    if other is None:
        return
    classes = all_gather_object(dataset.class_names)
    difference = _first_difference(dict.fromkeys(classes[0]), dict.fromkeys(classes[other]), other)
    if not difference and classes[0] == classes[other]:
        members = (dataset.members(label) for label in range(len(dataset.class_names)))
        checksums = all_gather_object([zlib.crc32(repr(each).encode()) for each in members])
        pairs = enumerate(zip(checksums[0], checksums[other]))
        label = next((label for label, (ours, theirs) in pairs if ours != theirs), 0)
        images = all_gather_object(dict(dataset.members(label)))
        difference = _first_difference(images[0], images[other], other)
    raise DataError(
        f"The ranks see different data.\n  rank 0: {found[0][0]}\n  rank {other}: {found[other][0]}\n"
        f"The first difference: {difference or 'the order of the classes'}. Give all ranks the same folder, or equal "
        f"copies of it."
    )


def _first_difference(ours: dict[str, Any], theirs: dict[str, Any], other: int) -> str:
    """What differs between rank 0 (name -> size) and another; empty when nothing does."""
    for name in [*ours, *theirs]:
        if name not in theirs:
            return f"{name} is on rank 0 only"
        if name not in ours:
            return f"{name} is on rank {other} only"
        if ours[name] != theirs[name]:
            return f"{name} differs ({ours[name]} on rank 0, {theirs[name]} on rank {other})"
    return ""
