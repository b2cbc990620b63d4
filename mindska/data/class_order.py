"""The order of classes: which output of a network is which folder."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Callable, Union

from ..errors import DataError

Order = Callable[[list[str]], list[str]]  # from the names of classes, sorted, to the order of their numbers


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


def read_folder_map(path: Union[str, Path]) -> dict[str, str]:
    """Folder -> class of a class map in CSV, `FOLDER,CLASS` a line, as for ImageNet-V2's numbered folders. Several may
    be of one class.

    It is UTF-8; a first line `folder,class` is passed over.

    Raises:
        DataError: it cannot be read, a line is not of two cells, or a folder is named twice.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = [(number, row) for number, row in enumerate(csv.reader(file), start=1) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"The class map {path} cannot be read: {error}; expected lines of FOLDER,CLASS") from error
    if rows and [cell.strip().lower() for cell in rows[0][1]] == ["folder", "class"]:
        del rows[0]
    folders: dict[str, str] = {}
    for number, row in rows:
        cells = [cell.strip() for cell in row]
        if len(cells) != 2 or not all(cells):
            raise DataError(f"The class map {path}, line {number}: {row[:5]!r}; expected FOLDER,CLASS")
        if cells[0] in folders:
            raise DataError(f"The class map {path}, line {number}: it names the folder {cells[0]!r} twice")
        folders[cells[0]] = cells[1]
    if not folders:
        raise DataError(f"The class map {path} names no folder; expected lines of FOLDER,CLASS")
    return folders


def natural_order(names: Sequence[str]) -> list[str]:
    """Names in timm's order of classes: "2" before "10", and without regard to case."""

    def key(name: str) -> list[Union[str, int]]:
        parts = re.split(r"(\d+)", name.lower())
        return [int(part) if i % 2 else part for i, part in enumerate(parts)]

    return sorted(names, key=key)
