"""The names of ImageNet's classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Optional


@cache
def imagenet_classes() -> dict[str, str]:
    """WordNet synset -> name of the 1000 classes of ILSVRC 2012, in the order of their numbers."""
    text = Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="utf-8")
    return dict(line.split(" ", 1) for line in text.splitlines() if not line.startswith("#"))


def readable_names(num_classes: int, class_names: Optional[Sequence[str]] = None) -> list[str]:
    """What to call the classes of a network: their recorded names, else ImageNet's when there are 1000, else numbers.

    ImageNet's folders are named by synsets; those become names as well.
    """
    known = imagenet_classes()
    if class_names is None:
        return list(known.values()) if num_classes == len(known) else [f"class {i}" for i in range(num_classes)]
    return [known.get(name, name) for name in class_names]
