"""Images in tar files, as WebDataset has them, read in place: `KEY.jpg` beside `KEY.cls` or `KEY.json`.

A tar file is indexed once: where each image begins, how long it is, and its label. The index is kept in the user's
cache and holds as long as the file's size and time of change do. Then any image is read by itself, so that shards are
shuffled and resumed like folders.

Nothing is unpacked. A tar file is refused with links, devices or sparse files in it, with names that lead elsewhere,
with a name twice, or when it is compressed or cut off; what follows a damaged header would be lost without a word.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, Optional, Union

from PIL import Image

from ..errors import BuildError, DataError, UserError, few, printable
from ..files import cache_folder, replacing
from .base import ImageDataset, in_threads
from .folders import entries, is_folder, subfolders
from .images import EXTENSIONS, DecodeSize, open_image, read_image
from .lists import labelled

log = logging.getLogger("mindska")

VERSION = 1  # of the index
LABELS = {"cls", "json"}  # what a label's file ends with
JSON_FIELDS = ("label", "cls")  # of a label in JSON
MOST_LABEL_BYTES = 1 << 16
MOST_HEADER_BYTES = 1 << 20  # of a name: tar has headers of any length
BLOCK = 512

Entry = tuple[str, int, int, str]  # name, offset, size, label


def find_shards(data_dir: Union[str, Path], split: str) -> list[Path]:
    """The tar files of a split, sorted: in its folder, or beside it with its name; none where it is of another kind.

    `train` is `train/*.tar`, `train.tar`, `train-*.tar` or `NAME-train-*.tar`; `train-{0000..0009}.tar` names them.

    Raises:
        DataError: of the files that are named one is missing.
    """
    if split.endswith(".tar"):
        names = _expanded(split)
        missing = [name for name in names if not (Path(data_dir) / name).is_file()]
        if missing:
            raise DataError(f"{len(missing)} of {len(names)} tar files are not in {data_dir}: {few(missing)}")
        return [Path(data_dir) / name for name in names]
    folder = Path(data_dir) / split
    if is_folder(folder):
        tars = [Path(path) for _, _, name, path in entries(folder) if name.endswith(".tar") and name[0] != "."]
        # Beside class folders they are what these were unpacked from.
        return sorted(tars) if tars and not subfolders(folder)[0] else []
    pattern = re.compile(rf"(.+[-_])?{re.escape(split)}([-_.].*)?\.tar")
    return sorted(Path(path) for _, _, name, path in entries(data_dir) if pattern.fullmatch(name) and name[0] != ".")


def _expanded(split: str) -> list[str]:
    """The names that `train-{0000..0009}.tar` stands for; they may not lead out of the folder."""
    if PurePosixPath(split).is_absolute() or ".." in PurePosixPath(split).parts:
        raise DataError(f"{split} leads out of data_dir; expected names of tar files in it")
    found = re.fullmatch(r"(.*)\{(\d{1,9})\.\.(\d{1,9})\}(.*)", split)
    if not found:
        return [split]
    before, first, last, after = found.groups()
    if not 0 <= int(last) - int(first) < 1_000_000:
        raise DataError(f"{split} names no files: {first} to {last}")
    return [f"{before}{number:0{len(first)}}{after}" for number in range(int(first), int(last) + 1)]


class ImageShards(ImageDataset):
    """The images of tar files, in the order of the files and of their content.

    Args:
        shards: the tar files; class_names: the classes in the order of their numbers, where they are known. Else labels
            say what they are: see `lists.labelled`.

    Raises:
        DataError: a tar file cannot be read or is refused; an image has no label.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        split: str,
        data_dir: Union[str, Path],
        class_names: Optional[Sequence[str]] = None,
        exif_orientation: bool = False,
    ) -> None:
        self.root, self.split, self.exif_orientation = Path(data_dir), split, exif_orientation
        self.shards = list(shards)
        self.states: list[list[int]] = []  # of each shard, when it was indexed
        self.names: list[str] = []
        self.offsets: list[int] = []
        self.sizes: list[int] = []
        self.shard_of: list[int] = []
        labels: list[str] = []
        passed_over: Counter[str] = Counter()
        for number, (state, found, others) in enumerate(in_threads(_index, self.shards)):
            self.states.append(state)
            passed_over.update(others)
            for name, offset, size, label in found:
                self.names.append(name)
                self.offsets.append(offset)
                self.sizes.append(size)
                self.shard_of.append(number)
                labels.append(label)
        if not labels:
            raise DataError(f"{few(map(str, self.shards))}: there is no image with a label (KEY.jpg beside KEY.cls)")
        self.passed_over = "".join(f"; passed over: {count:,} {what}" for what, count in passed_over.most_common(10))
        self.class_names, self.labels = labelled(labels, class_names, f"{split} in {data_dir}", self.describe)
        self.check_headers()

    def __str__(self) -> str:
        return f"{super().__str__()} ({len(self.shards):,} tar files)"

    def member(self, index: int) -> tuple[str, int]:
        return f"{self.shards[self.shard_of[index]].name}/{self.names[index]}", self.sizes[index]

    def describe(self, index: int) -> str:
        return f"{self.shards[self.shard_of[index]]}: {self.names[index]}"

    def content(self, index: int) -> bytes:
        number = self.shard_of[index]
        try:
            with self.shards[number].open("rb", buffering=0) as file:
                if _state(file.fileno()) != self.states[number]:
                    raise DataError(f"{self.describe(index)} cannot be read: the tar file has changed since the start")
                file.seek(self.offsets[index])
                content = file.read(self.sizes[index])
                while len(content) < self.sizes[index] and (more := file.read(self.sizes[index] - len(content))):
                    content += more
        except OSError as error:
            raise DataError(f"{self.describe(index)} cannot be read: {error.strerror or error}") from error
        return content

    def open(self, index: int) -> AbstractContextManager[Image.Image]:
        return open_image(self.describe(index), self.content(index))

    def load(self, index: int, decode_size: Optional[DecodeSize] = None) -> Image.Image:
        return read_image(self.describe(index), decode_size, self.exif_orientation, self.content(index))


def _state(descriptor: int) -> list[int]:
    """What tells that a file is the one that was indexed: size and time of change."""
    found = os.fstat(descriptor)
    return [found.st_size, found.st_mtime_ns]


class _ShortReads:
    """A file of which no read is longer than a header may be: tar's headers say how much of the file they are."""

    def __init__(self, file: Any, path: Path) -> None:
        self.file, self.path, self.seek, self.tell = file, path, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MOST_HEADER_BYTES:
            raise DataError(f"{self.path} is refused: a header of {size:,} bytes")
        return self.file.read(size)


def _index(path: Path) -> tuple[list[int], list[Entry], dict[str, int]]:
    """A tar file's state, its images, and what else is in it: from the cache, or read now and kept there."""
    try:
        with path.open("rb") as file:
            state = _state(file.fileno())
            place = _place(path)
            kept = _kept(place, state)
            if kept is None:
                log.info("Indexing %s", printable(path))
                kept = _read(path, file, state[0])
                if place:
                    with suppress(OSError, UserError), replacing(place) as temporary:  # another start takes as long
                        temporary.write_text(json.dumps([VERSION, state, *kept]), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    return state, *kept


def _place(path: Path) -> Optional[Path]:
    """Where the index of a tar file is kept; None where there can be none."""
    try:
        cache_folder().mkdir(mode=0o755, parents=True, exist_ok=True)
        folder = cache_folder() / "shards"
        folder.mkdir(mode=0o755, exist_ok=True)
    except (OSError, BuildError):
        return None
    return folder / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"


def _kept(place: Optional[Path], state: list[int]) -> Optional[tuple[list[Entry], dict[str, int]]]:
    """The index as it was kept, if it is of this file and whole."""
    try:
        if place is None:
            return None
        version, known, images, others = json.loads(place.read_text(encoding="utf-8"))
        if [version, known] != [VERSION, state]:
            return None
        found = [(str(name), int(offset), int(size), str(label)) for name, offset, size, label in images]
        inside = all(0 < offset <= offset + size <= state[0] and size >= 0 for _, offset, size, _ in found)
        return (found, {str(what): int(count) for what, count in others.items()}) if inside else None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def _read(path: Path, file: Any, size: int) -> tuple[list[Entry], dict[str, int]]:
    """The images of a tar file, by its headers."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, str] = {}
    others: Counter[str] = Counter()
    seen: set[str] = set()
    try:
        headers: Any = _ShortReads(file, path)
        with tarfile.open(fileobj=headers, mode="r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # which would grow
                where = f"{path} is refused: {member.name!r}"
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise DataError(f"{where} is a link, a device or a sparse file; expected plain files")
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts or "\0" in member.name or "\\" in member.name:
                    raise DataError(f"{where} leads elsewhere; expected a name such as 000001.jpg")
                if member.offset_data + member.size > size:
                    raise DataError(f"{where} reaches beyond the end of the file: is it complete?")
                if str(name) in seen:
                    raise DataError(f"{where} is in it twice")
                seen.add(str(name))
                stem, _, ending = name.name.partition(".")
                key, ending = str(name.parent / stem), ending.lower()
                if not stem:
                    others["hidden"] += 1
                elif f".{ending}" in EXTENSIONS:
                    if key in images:
                        raise DataError(f"{where}: {key} has two images, {images[key][0]} and this one")
                    images[key] = str(name), member.offset_data, member.size
                elif ending in LABELS:
                    label = _label(where, archive.extractfile(member), member.size, ending)
                    if label is not None and labels.setdefault(key, label) != label:
                        raise DataError(f"{where}: {key} has two labels, {labels[key]!r} and {label!r}")
                else:
                    others[f".{ending} files"] += 1
            end = archive.offset
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK):
            raise DataError(
                f"{path} is damaged or cut off at byte {end:,} of {size:,}: there is neither a file's header nor the "
                f"end of an archive. What follows would be lost; mend it, or write it again"
            )
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise DataError(
            f"{path} cannot be read as a tar file: {error}; expected one that is whole and not compressed"
        ) from error
    without = [key for key in images if key not in labels]
    if without:
        raise DataError(
            f"{path}: {len(without):,} of {len(images):,} images have no label ({few(without)}); expected KEY.cls with "
            f"a number or a name, or KEY.json with a field `label`, beside KEY.jpg"
        )
    if alone := len(set(labels) - set(images)):
        others["labels without an image"] += alone
    return [(*images[key], labels[key]) for key in images], dict(others)


def _label(where: str, file: Any, size: int, ending: str) -> Optional[str]:
    """The label in a member; None of a JSON file that says none."""
    if size > MOST_LABEL_BYTES:
        raise DataError(f"{where} has {size:,} bytes; expected a label")
    try:
        text = file.read().decode("utf-8").strip()
        if ending == "json":
            fields = json.loads(text)
            found = next((fields[name] for name in JSON_FIELDS if name in fields), None)
            if found is None:
                return None
            if isinstance(found, bool) or not isinstance(found, (int, str)):
                raise ValueError(f"its label is {found!r}")
            text = str(found).strip()
    except (UnicodeDecodeError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{where} is no label: {str(error)[:200]}") from error
    if not text:
        raise DataError(f"{where} is empty; expected a label")
    return text
