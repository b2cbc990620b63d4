"""The image files below a folder: each real folder once, and nothing lost without a word.

What is passed over (other files, hidden ones, folders of storage systems) is counted. A folder that cannot be listed is
an error. A link to a folder is followed, unless it leads to a folder above, to one that was listed already, or into
another class: these are reported.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Optional, Union

from ..errors import DataError, printable
from .images import EXTENSIONS

log = logging.getLogger("mindska")

# Of storage systems and desktops, in lower case: they hold previews, snapshots and what was deleted.
SYSTEM_FOLDERS = {
    "@eadir", "@tmp", "@recycle", "@recently-snapshot", "@__thumb", "#recycle", "#snapshot", "~snapshot",
    "$recycle.bin", "system volume information", "network trash folder", "temporary items", "__macosx", "lost+found",
}  # fmt: skip
REPORTED = 10  # links in a log, kinds in a line

FOLDER, LINK, IMAGE = "folder", "link to a folder", "image"  # what an entry is, unless it is passed over
Identity = tuple[int, int]  # of a folder: device and inode


@dataclass
class Found:
    """What was found below a folder.

    Attributes:
        paths: of the image files, as text: a million paths as objects take a gigabyte.
        sizes: in bytes; -1: a link that leads nowhere, which is an unreadable image.
        passed_over: what -> how many.
        links: of those to folders that were not followed, which and why.
    """

    paths: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    links: list[str] = field(default_factory=list)

    def add(self, other: Found) -> None:
        """Takes in what was found below another folder."""
        self.paths += other.paths
        self.sizes += other.sizes
        self.passed_over += other.passed_over
        self.links += other.links

    def report_links(self) -> None:
        """Warns of the links that were not followed."""
        for link in self.links[:REPORTED]:
            log.warning("%s", printable(link))
        if len(self.links) > REPORTED:
            log.warning("... and %d more links", len(self.links) - REPORTED)

    def passed_over_text(self) -> str:
        """What was passed over, for the end of a message; empty when nothing was."""
        counts = self.passed_over.most_common(REPORTED)
        rest = sum(self.passed_over.values()) - sum(count for _, count in counts)
        texts = [f"{count:,} {what}" for what, count in counts] + ([f"{rest:,} others"] if rest else [])
        return "; passed over: " + ", ".join(texts) if texts else ""


class Surroundings:
    """Where links do not lead: into folders of classes, and to what lies above these.

    Args:
        folders: path -> name of the class.
    """

    def __init__(self, folders: dict[str, str]) -> None:
        self.classes: dict[Identity, str] = {}
        for path, name in folders.items():
            own = identity(path)
            if own in self.classes:
                other = self.classes[own]
                log.warning(
                    "%s and %s are the same folder: its images are in both classes", *map(printable, (other, path))
                )
            self.classes.setdefault(own, name)
        parents = {parent for path in folders for parent in Path(os.path.realpath(path)).parents}
        self.above = {identity(parent) for parent in parents}

    def why_not(self, link: str, folder: str, listed: set[Identity]) -> str:
        """Why a link below the class folder `folder` is not followed; empty when it is."""
        target = Path(os.path.realpath(link))
        chain = [identity(each) for each in (target, *target.parents)]
        if target in (here := Path(os.path.realpath(Path(link).parent)), *here.parents) or chain[0] in self.above:
            return "to a folder above"
        if identity(folder) not in chain:
            other = next((self.classes[each] for each in chain if each in self.classes), None)
            if other is not None:
                return f"into class {other}, whose images keep their class"
        return "to a folder that is listed already" if chain[0] in listed else ""


def identity(folder: Union[str, Path]) -> Identity:
    """What all names of a folder have in common; DataError when it cannot be reached."""
    try:
        found = os.stat(folder)  # noqa: PTH116 - as text, as the paths are
    except OSError as error:
        cannot_list(folder, error)
    return found.st_dev, found.st_ino


def is_folder(path: Union[str, Path]) -> bool:
    """Whether there is a folder; DataError where the system does not say."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        cannot_list(path, error)


def cannot_list(path: Union[str, Path], error: OSError) -> NoReturn:
    """Raises the DataError for what the system does not show."""
    to = f" (a link to {os.readlink(path)})" if os.path.islink(path) else ""  # noqa: PTH114, PTH115
    raise DataError(
        f"{path}{to} cannot be listed: {error.strerror or error}. Is it mounted, and may it be read?"
    ) from error


def entries(folder: Union[str, Path]) -> Iterator[tuple[str, int, str, str]]:
    """(what, size, name, path) of a folder's entries; what: FOLDER, LINK, IMAGE, or as what it is passed over.

    Raises:
        DataError: the folder or something in it cannot be listed, or a link leads nowhere.
    """
    try:
        with os.scandir(folder) as listing:
            for entry in listing:
                yield (*_look(entry), entry.name, entry.path)
    except OSError as error:
        cannot_list(folder, error)


def _look(entry: os.DirEntry) -> tuple[str, int]:
    """What an entry is and its size. Asks the system for images and links only, right where they are listed: a network
    file system has brought the answers with the listing."""
    name = entry.name
    if name.startswith("."):
        return "hidden", 0
    ending = name[name.rfind(".") :].lower()
    image = ending in EXTENSIONS
    if not image and name.lower() in SYSTEM_FOLDERS:
        return f"system folders ({name})", 0
    try:
        if entry.is_dir(follow_symlinks=False):
            return FOLDER, 0
        if not image and not entry.is_symlink():
            return _kind(ending), 0
        status = entry.stat()
    except OSError as error:
        if image and error.errno in (errno.ENOENT, errno.ELOOP):
            return IMAGE, -1
        cannot_list(entry.path, error)
    if stat.S_ISDIR(status.st_mode):
        return LINK, 0
    if not image:
        return _kind(ending), 0
    return (IMAGE, status.st_size) if stat.S_ISREG(status.st_mode) else ("pipes, devices or sockets", 0)


def _kind(ending: str) -> str:
    return f"{ending} files" if ending.startswith(".") and ending[1:].isalnum() and len(ending) < 8 else "other files"


def subfolders(folder: Union[str, Path]) -> tuple[list[str], Found]:
    """The names of a folder's folders, sorted, links to folders among them; and what else is there.

    Raises:
        DataError: the folder or something in it cannot be listed, or a link leads nowhere.
    """
    names, found = [], Found()
    for what, _, name, _ in entries(folder):
        if what in (FOLDER, LINK):
            names.append(name)
        else:
            found.passed_over["images beside the folders" if what is IMAGE else what] += 1
    return sorted(names), found


def find_images(folder: str, surroundings: Optional[Surroundings] = None) -> Found:
    """The image files below a folder, at any depth, sorted by their paths.

    Args:
        surroundings: default: all that lies above `folder`.

    Raises:
        DataError: a folder or something in it cannot be listed, or a link leads nowhere (a link with an image's name
            that does is an image without a size).
    """
    surroundings = surroundings or Surroundings({folder: ""})
    found, images, folders = Found(), [], deque([folder])
    listed: set[Identity] = set()
    links: list[str] = []
    while folders or links:
        if folders:
            current, why_not = folders.popleft(), ""
        else:  # after the real folders: what is reached both ways has its real name
            links.sort(reverse=True)
            current = links.pop()
            why_not = surroundings.why_not(current, folder, listed)
        own = identity(current)
        if not why_not and own in listed:
            why_not = "to a folder that is listed already"  # mounted twice
        if why_not:
            found.links.append(f"{current} is passed over: it leads {why_not}")
            found.passed_over["links to folders"] += 1
            continue
        listed.add(own)
        for what, size, _, path in entries(current):
            if what is FOLDER:
                folders.append(path)
            elif what is LINK:
                links.append(path)
            elif what is IMAGE:
                images.append((path, size))
            else:
                found.passed_over[what] += 1
    images.sort()
    found.paths, found.sizes = [path for path, _ in images], [size for _, size in images]
    return found
