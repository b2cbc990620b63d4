"""Files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional, Union

from .errors import BuildError, MissingWeights, PredictionError, UserError, WriteError

TORCH_SUFFIXES = (".pth", ".pth.tar", ".pt", ".bin")


def cache_folder() -> Path:
    """Where operators, graphs and indices are kept: MINDSKA_CACHE, or mindska in the user's cache.

    Raises:
        BuildError: the user has no home.
    """
    if os.environ.get("MINDSKA_CACHE"):
        return Path(os.path.expanduser(os.environ["MINDSKA_CACHE"]))  # noqa: PTH111 - see user_path
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "mindska"
    try:
        return Path.home() / ".cache" / "mindska"
    except RuntimeError as error:
        raise BuildError(f"{error}; MINDSKA_CACHE can name a folder") from error


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
    folder: Optional[Path] = None
    try:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.tmp"))
        temporary, mode = folder / path.name, new_file_mode(folder)
        yield temporary
        temporary.chmod(mode)  # MindSpore makes it readable for its owner only
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except UserError as error:  # it speaks of the file that the user named, not of the temporary one
        error.args = tuple(_with_path(arg, folder, path) for arg in error.args)
        raise
    except OSError as error:
        reason = _with_path(str(error), folder, path) if folder else error.strerror
        raise WriteError(
            f"{path} could not be written: {reason}. What was there before is intact; make room or mend the folder, "
            f"and the same command goes on."
        ) from error
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def _with_path(said: Any, folder: Optional[Path], path: Path) -> Any:
    """What was said of a file in the temporary folder, said of the file that it becomes."""
    if not folder or not isinstance(said, str):
        return said
    return said.replace(str(folder / path.name), str(path)).replace(f"{folder}{os.sep}", f"{path.parent}{os.sep}")


def user_path(text: str) -> Path:
    """A path as users write it: in a file, or after `=`, no shell replaces `~` by the home folder."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 - of an unknown user's home Path makes an error


def check_writable(path: Path, overwrite: bool = True, otherwise: str = "") -> None:
    """Checks that a file can be written: before the work, not after it.

    Args:
        overwrite: whether a file may be there already; `otherwise`: what to do where it may not.

    Raises:
        WriteError: its folder does not exist or cannot be written, there is a folder in its place, or it exists.
    """
    folder = path.absolute().parent
    try:
        if not folder.is_dir():
            raise WriteError(f"The folder of {path} does not exist")
        if path.is_dir():
            raise WriteError(f"{path} is a folder; expected the name of a file to write")
        if not overwrite and os.path.lexists(path):
            raise WriteError(f"{path} exists; {otherwise}")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise WriteError(f"{path} cannot be written: {error.strerror or error}") from error


def check_target(path: Path, overwrite: bool = False) -> None:
    """WriteError when a file of weights cannot be written to `path`: before the work, not after it."""
    if not path.name.endswith((".ckpt", ".safetensors", *TORCH_SUFFIXES)):
        raise WriteError(f"{path}: expected a name that ends in .ckpt, .safetensors or {', '.join(TORCH_SUFFIXES)}")
    if path.name.endswith(TORCH_SUFFIXES) and not find_spec("torch"):
        raise WriteError(f"Writing {path} needs PyTorch (pip install torch)")
    check_writable(path, overwrite, "choose another name, or allow it with --overwrite")


def exists(path: Union[str, Path]) -> bool:
    """Whether there is something; also where the system does not say, which is another message."""
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):  # ValueError: no name that a file can have
        return True
    return True


def check_there(path: Path, what: str) -> None:
    """Whether there is something to read, before MindSpore is loaded; reading it says the rest.

    Raises:
        MissingWeights: there is no "checkpoint".
        PredictionError: there is no "model", or "image or folder".
    """
    if not exists(path) and not os.path.lexists(path):
        raise (MissingWeights if what == "checkpoint" else PredictionError)(f"No {what} at {path.absolute()}")


@contextmanager
def as_oserror(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds, in which a library hides that a file cannot be written, become OSErrors."""
    try:
        yield
    except kinds as error:
        raise OSError(str(error)) from error
