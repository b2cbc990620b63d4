"""The order of classes: which output of a network is which folder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Union

from ..errors import DataError


def read_class_map(path: Union[str, Path]) -> list[str]:
    """The classes of a class map, a text file with one folder name a line in the order of the network's outputs.

    It is UTF-8; empty lines and lines that begin with # are passed over.

    Raises:
        DataError: it cannot be read, is empty, or names a class twice.
    """
    try:
        if not Path(path).is_file():
            raise OSError("no such file")
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"The class map {path} cannot be read: {error}; expected a text file with one folder name a line, in the "
            f"order of the network's outputs"
        ) from error
    names = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not names:
        raise DataError(f"The class map {path} names " + (f"classes twice: {twice[:10]}" if twice else "no class"))
    return names


def natural_order(names: Sequence[str]) -> list[str]:
    """Names in timm's order of classes: "2" before "10", and without regard to case."""

    def key(name: str) -> list[Union[str, int]]:
        parts = re.split(r"(\d+)", name.lower())
        return [int(part) if i % 2 else part for i, part in enumerate(parts)]

    return sorted(names, key=key)
