"""Lists of images in CSV: `path,label` a line."""

from __future__ import annotations

import csv
import io
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Callable, Optional, Union

import numpy as np

from ..errors import DataError, few, formatted_list, look_alike, printable
from ..files import replacing
from .base import ImageDataset, ImageFiles, in_threads

log = logging.getLogger("mindska")

PATHS, LABELS = ("path", "file", "filename", "image"), ("label", "class", "target")  # what columns may be called
MOST_LABELS = 1_000_000  # a number beyond is no label


def is_list(name: str) -> bool:
    """Whether a split or a class map is a file in CSV."""
    return name.lower().endswith(".csv")


class ImageList(ImageFiles):
    """The images that a CSV file names, in its order: columns `path` and `label`, with or without that header.

    With a header, other columns may be there and the order is free. Paths are relative to `data_dir`, or, without one,
    to the list's folder, and may not lead elsewhere unless `allow_outside`. `labelled` says what labels mean.

    Args:
        file: relative to the current folder, or to `data_dir`.
        class_names: the classes in the order of their numbers, where they are known.

    Raises:
        DataError: the file cannot be read, or rows are wrong: they are named by their line numbers.
    """

    def __init__(
        self,
        file: Union[str, Path],
        data_dir: Union[str, Path] = "",
        class_names: Optional[Sequence[str]] = None,
        exif_orientation: bool = False,
        allow_outside: bool = False,
    ) -> None:
        file = _located(str(file), str(data_dir))
        self.root, self.split, self.exif_orientation = Path(str(data_dir) or file.parent), str(file), exif_orientation
        rows = list(_rows(file))
        if not rows:
            raise DataError(f"{file} names no image; expected lines of path,label")
        inside = os.path.normpath(self.root.absolute())
        beginning = os.path.join(inside, "")  # noqa: PTH118
        self.paths, lines, faults = [], {}, []  # type: ignore[var-annotated]
        for line, path, label in rows:
            # As text, without asking the system: what is opened is this path.
            full = os.path.normpath(os.path.join(inside, path))  # noqa: PTH118
            if not path or not label or "\0" in path:
                faults.append(f"line {line}: path {path!r} and label {label!r}; expected both")
            elif not (allow_outside or full.startswith(beginning)):
                faults.append(
                    f"line {line}: {path!r} is outside of {self.root}; --allow_outside_data_dir true takes it"
                )
            elif full in lines:
                faults.append(f"line {line}: {path!r} is the image of line {lines[full]} again")
            lines.setdefault(full, line)
            # A relative data_dir stays relative, as in a folder.
            within = full.startswith(beginning)
            self.paths.append(self.below + full[len(beginning) :] if within else full)
        self._refuse(faults, len(rows))
        self.sizes = in_threads(_size, self.paths)
        missing = (row for row, size in zip(rows, self.sizes) if size < 0)
        self._refuse([f"line {line}: no file at {path!r}" for line, path, _ in missing], len(rows))
        self.class_names, self.labels = labelled(
            [label for _, _, label in rows], class_names, str(file), lambda i: f"line {rows[i][0]}"
        )
        self.check_headers()

    def _refuse(self, faults: list[str], rows: int) -> None:
        if faults:
            raise DataError(
                f"{self.split}: {len(faults):,} of {rows:,} rows are wrong; expected path,label, paths relative to "
                f"{self.root}{formatted_list('Rows', faults)}"
            )


def _located(name: str, data_dir: str) -> Path:
    here = Path(os.path.expanduser(name))  # noqa: PTH111 - see files.user_path
    places = [here] if here.is_absolute() or not data_dir else [here, Path(data_dir) / name]
    there = [place for place in places if place.is_file()]
    if not there:
        raise DataError(f"No list of images at {' or '.join(str(place.absolute()) for place in places)}")
    if len(there) > 1 and not there[0].samefile(there[1]):
        raise DataError(f"{name} may be {there[0].absolute()} or {there[1].absolute()}; give the whole path")
    return there[0]


def _rows(file: Path) -> Iterator[tuple[int, str, str]]:
    """(line, path, label) of a list; an empty text where a cell is missing."""
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
            reader = csv.reader(opened, strict=True)
            columns: Optional[tuple[int, int]] = None
            for row in reader:
                if not any(cell.strip() for cell in row):
                    continue
                if columns is None:
                    columns, header = _columns(row, file)
                    if header:
                        continue
                cells = [row[i].strip() if i < len(row) else "" for i in columns]
                yield reader.line_num, cells[0], cells[1]
    except (OSError, csv.Error) as error:
        raise DataError(f"{file} cannot be read: {error}; expected lines of path,label") from error


def _columns(first: list[str], file: Path) -> tuple[tuple[int, int], bool]:
    """Which columns are path and label, by the first row; and whether that is a header."""
    names = [cell.strip().lower() for cell in first]
    path, label = (next((names.index(n) for n in known if n in names), None) for known in (PATHS, LABELS))
    if path is not None and label is not None:
        return (path, label), True
    if len(first) != 2:
        raise DataError(
            f"{file} begins with {few(first, 5)!r}; expected path,label with a comma between them, or a header that "
            f"names these columns"
        )
    return (0, 1), False


def _size(path: str) -> int:
    """A file's size in bytes; -1 where there is none."""
    try:
        found = os.stat(path)  # noqa: PTH116 - a million paths are text
    except OSError:
        return -1
    return found.st_size if not stat.S_ISDIR(found.st_mode) else -1


def labelled(
    labels: Sequence[str], class_names: Optional[Sequence[str]], where: str, place: Callable[[int], str]
) -> tuple[list[str], np.ndarray]:
    """The classes in the order of their numbers, and the number of each label.

    Labels are names of classes, or numbers from 0 on. Where the classes are known, they may be either; else, if all are
    whole numbers, these are the classes' numbers (and names), else names in the order of text.

    Args:
        where: what the labels are of; place: from a label's index to where it stands there.

    Raises:
        DataError: a label is no class that is known.
    """
    numbers = [int(label) if label.isascii() and label.isdigit() and len(label) < 10 else -1 for label in labels]
    distinct = sorted(set(labels))
    if class_names is None:
        if min(numbers, default=-1) >= 0:
            if max(numbers) >= MOST_LABELS:
                raise DataError(f"{where}: {max(numbers)} is no number of a class; expected less than {MOST_LABELS:,}")
            return [str(i) for i in range(max(numbers) + 1)], np.asarray(numbers, np.int32)
        if twins := look_alike(distinct):
            raise DataError(f"{where} has labels that look the same{twins}")
        class_names = distinct
    known = {name: number for number, name in enumerate(class_names)}
    strange = [i for i, label in enumerate(labels) if label not in known]
    if not strange:
        return list(class_names), np.asarray([known[label] for label in labels], np.int32)
    if min(numbers) >= 0 and max(numbers) < len(class_names):
        return list(class_names), np.asarray(numbers, np.int32)
    unknown = sorted({labels[i] for i in strange})
    raise DataError(
        f"{where}: {len(strange):,} labels are none of the {len(class_names):,} classes ({few(class_names, 5)}) nor "
        f"all labels their numbers{look_alike(unknown, class_names)}"
        + formatted_list("Labels", (f"{place(i)}: {labels[i]!r}" for i in strange))
    )


def write_list(path: Path, dataset: ImageDataset, data_dir: Union[str, Path]) -> None:
    """Writes the images of a data set as a list that `ImageList` reads: paths below `data_dir`, and classes.

    Raises:
        WriteError: it cannot be written.
    """
    rows = ((dataset.listed(i, data_dir), dataset.class_names[label]) for i, label in enumerate(dataset.labels))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "label"))
    writer.writerows(rows)
    with replacing(path) as temporary:
        temporary.write_bytes(text.getvalue().encode("utf-8", "surrogateescape"))


def table_cell(text: str) -> str:
    """A text as a cell of a table: no control characters, and nothing that a spreadsheet would take for a formula."""
    text = printable(text)
    return f"'{text}" if text.lstrip()[:1] in tuple("=+-@＝＋－＠") or text.startswith(("\\t", "\\r")) else text


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes a table as CSV; texts are made harmless (see `table_cell`).

    Raises:
        WriteError: it cannot be written.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([table_cell(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
