"""Files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Union

from .errors import UserError, WriteError

UMASK = os.umask(0)  # what the user takes away from the mode of new files; there is no other way to read it
os.umask(UMASK)


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
        temporary = folder / path.name
        yield temporary
        temporary.chmod(0o666 & ~UMASK)  # MindSpore makes it readable for its owner only
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
