"""Builds the C++ operators, once for a machine, into the user's cache, and loads them.

A library is loaded only if it and its folder belong to the user or to root, nobody else can write them, and the
checksum at its end is right; else it is built anew, and a line says so. What a process has loaded it keeps: the loader
knows a library by its path, and does not open the file again when MindSpore asks for it (which must be there, though:
see `keep_library`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple, Optional

from ..distributed import cores
from ..errors import BuildError
from ..files import cache_folder, own_mode

log = logging.getLogger("mindska")

FOLDER = Path(__file__).parent
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-pthread", "-shared", "-fPIC",
    "-fno-math-errno", "-fno-trapping-math",  # vectors may compute what is then not taken
    "-Wno-psabi",
)  # fmt: skip
MARK = b"\nmindska sha256 "  # between a library and its checksum, which the loader does not read
LARGEST = 1 << 26  # bytes of a library
THREADS = "threads"  # the library whose functions the others call


def _compiler() -> tuple[list[str], str]:
    """The C++ compiler's command (CXX may hold several words: `ccache g++`) and version."""
    wanted = os.environ.get("CXX")
    try:
        for command in [shlex.split(wanted)] if wanted else [["g++"], ["clang++"], ["c++"]]:
            if command and shutil.which(command[0]):
                said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
                return command, said.stdout.partition("\n")[0]
    except (OSError, ValueError) as error:
        raise BuildError(f"the C++ compiler cannot be started ({wanted or command[0]}): {error}") from error
    raise BuildError(f"no C++ compiler ({wanted or 'g++, clang++'})")


def why_untrusted(status: os.stat_result) -> str:
    """Why what is in a file or folder may be somebody else's; empty where only the user and root can write it.

    Windows has other rules, and no C++ operators.
    """
    if os.name != "posix":
        return ""
    if status.st_uid not in (0, os.geteuid()):
        return f"it belongs to user {status.st_uid}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others can write it (mode {stat.S_IMODE(status.st_mode):o})"
    return ""


def trusted_folder(path: Path) -> Path:
    """The folder, made where there is none, without links on its way.

    Raises:
        BuildError: others can write there.
        OSError: it cannot be made.
    """
    path.mkdir(mode=0o755, parents=True, exist_ok=True)
    path = path.resolve()
    status = path.stat()
    if not os.environ.get("MINDSKA_CACHE") and why_untrusted(status) and status.st_uid == os.geteuid():
        path.chmod(stat.S_IMODE(status.st_mode) & 0o755)  # ours, from a time when only the umask counted
        status = path.stat()
    reason = why_untrusted(status)
    for parent in path.parents if os.name == "posix" else ():
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            reason = reason or f"all can write {parent} (mode {stat.S_IMODE(mode):o})"
    if reason:
        raise BuildError(f"{path} is not used: {reason}; MINDSKA_CACHE can name a folder of your own (chmod go-w)")
    return path


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    """Waits while another process is in here for the same name; where files cannot be locked, both go on."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(stack.enter_context((cache_folder() / f".{name}.lock").open("w")), fcntl.LOCK_EX)
        yield


def _processor() -> str:
    """What -march=native depends on: a library built for one processor may not run on another."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return f"{platform.machine()} {platform.processor()}"


class Loaded(NamedTuple):
    """A library that this process has loaded."""

    path: Path
    content: bytes
    handle: ctypes.CDLL


_loaded: dict[str, Loaded] = {}
_threads_lock = threading.Lock()


def _checksum(path: Path, content: bytes) -> bytes:
    return hashlib.sha256(path.name.encode() + content).hexdigest().encode()


def _read(path: Path) -> tuple[Optional[bytes], str]:
    """What is in a library's file; nothing where there is none, or one that must not be loaded, and why not."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return None, "it is a link"
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        reason = why_untrusted(status)
        if not reason and stat.S_ISREG(status.st_mode) and status.st_size <= LARGEST:
            content = file.read()
            library, _, checksum = content.rpartition(MARK)
            if checksum == _checksum(path, library):
                return content, ""
        return None, reason or "its checksum is wrong"


def _write(path: Path, content: bytes) -> None:
    """Puts a library in its place, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as folder:
        new = Path(folder) / path.name
        new.write_bytes(content)
        new.chmod(own_mode(Path(folder), executable=True))
        new.replace(path)


def _build(source: Path, path: Path, command: list[str]) -> bytes:
    """What is to be in a library's file."""
    with tempfile.TemporaryDirectory(prefix="mindska-") as folder:
        built = Path(folder) / path.name
        done = subprocess.run([*command, *FLAGS, str(source), "-o", str(built)], capture_output=True, text=True)
        if done.returncode or not built.is_file():
            how = f"exit status {done.returncode}" if done.returncode >= 0 else f"killed by signal {-done.returncode}"
            said = done.stderr.strip()[:500] or "it says nothing more"
            raise BuildError(f"{' '.join(command)} failed on {source.name} ({how}): {said}")
        library = built.read_bytes()
    return library + MARK + _checksum(path, library)


@cache
def library(name: str) -> Path:
    """The library of the operators in NAME.cc, loaded.

    It is built when the cache has none for this source, compiler and processor. Any number of processes may ask at
    once: one builds, the others wait. What is built is moved to its place whole.

    Raises:
        BuildError: there is no compiler, it fails, or the cache cannot be used.
    """
    command, version = _compiler()
    source = FOLDER / f"{name}.cc"
    key = hashlib.sha256()
    for file in (source, *sorted(FOLDER.glob("*.h"))):
        key.update(file.read_bytes())
    for text in (version, _processor(), *command, *FLAGS):
        key.update(text.encode())
    folder = cache_folder()
    if ":" in str(folder):  # MindSpore's separator between a library and its operator
        raise BuildError(f"the cache's path has a colon ({folder}); MINDSKA_CACHE can name another folder")
    try:
        path = trusted_folder(folder) / f"{name}-{key.hexdigest()[:16]}.so"
        content, reason = _read(path)
        if reason:
            log.warning("%s is not loaded (%s): it is built anew", path, reason)
        if content is None:
            with _alone(name):
                content, _ = _read(path)  # built meanwhile?
                if content is None:
                    content = _build(source, path, command)
                    _write(path, content)
        if not path.exists():  # deleted since
            _write(path, content)
        if name != THREADS:
            with _threads_lock:
                library(THREADS)
        handle = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL if name == THREADS else ctypes.DEFAULT_MODE)
        _loaded[name] = Loaded(path, content, handle)
    except OSError as error:
        raise BuildError(f"the cache {folder} cannot be used: {error}") from error
    if name == THREADS:
        cores.on_threads(handle.mindska_set_threads)
    return path


def keep_library(name: str) -> bool:
    """Puts a loaded library's file back where it was deleted, since MindSpore looks for it; whether it had to.

    Raises:
        BuildError: it cannot be put there.
    """
    if name not in _loaded:
        return False
    path, content, _ = _loaded[name]
    try:
        if path.exists():
            return False
        trusted_folder(path.parent)
        _write(path, content)
    except OSError as error:
        raise BuildError(f"the cache {path.parent} was deleted and cannot be made again: {error}") from error
    log.info("%s was deleted: it is put back", path)
    return True


def keep_libraries() -> bool:
    """`keep_library` for all that this process has loaded."""
    return sum(keep_library(name) for name in _loaded) > 0
