"""Files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Union

from .errors import UserError, WriteError


def new_file_mode(folder: Path) -> int:
    """The mode that a new file gets in this folder, which is the caller's alone: by the umask, or the folder's rules.

    Raises:
        OSError: there can be no new file.
    """
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def own_mode(folder: Path, executable: bool = False) -> int:
    """The mode for what the user alone may write: readable for whom the umask lets read, as a new file in `folder`."""
    mode = new_file_mode(folder) & 0o644
    return mode | (mode & 0o444) >> 2 if executable else mode


def sha256(path: Union[str, Path]) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file of the same name in a temporary folder beside `path`, which is moved to `path` when the block ends.

    So no reader ever sees half a file, and when the block fails nothing has changed.

    Raises:
        WriteError: it cannot be written.
    """
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.tmp"))
        temporary, mode = folder / path.name, new_file_mode(folder)
        yield temporary
        temporary.chmod(mode)  # MindSpore makes it readable for its owner only
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise WriteError(
            f"{path} could not be written: {error}. What was there before is intact; make room or mend the folder, "
            f"and the same command goes on."
        ) from error
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def as_oserror(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds, in which a library hides that a file cannot be written, become OSErrors."""
    try:
        yield
    except kinds as error:
        raise OSError(str(error)) from error
