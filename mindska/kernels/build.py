"""Builds the C++ operators, once for a machine, into the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC",
    "-fno-math-errno", "-fno-trapping-math",  # vectors may compute what is then not taken
    "-Wno-psabi",
)  # fmt: skip


class BuildError(RuntimeError):
    """The operators cannot be had here; the message says why."""


def cache_folder() -> Path:
    """Where libraries are kept: MINDSKA_CACHE, or mindska in the user's cache."""
    if os.environ.get("MINDSKA_CACHE"):
        return Path(os.environ["MINDSKA_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "mindska"
    try:
        return Path.home() / ".cache" / "mindska"
    except RuntimeError as error:
        raise BuildError(f"{error}; MINDSKA_CACHE can name a folder") from error


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


@cache
def library(name: str) -> Path:
    """The shared library of the operators in NAME.cc, built when there is none for this source, compiler and processor.

    Any number of processes may ask at once: one builds, the others wait. What is built is moved to its place whole.

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
    path = cache_folder() / f"{name}-{key.hexdigest()[:16]}.so"
    if ":" in str(path):  # MindSpore's separator between a library and its operator
        raise BuildError(f"the cache's path has a colon ({path.parent}); MINDSKA_CACHE can name another folder")
    try:
        if path.is_file():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(name), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{name}-") as folder:
            if path.is_file():  # meanwhile
                return path
            built = Path(folder) / path.name
            done = subprocess.run([*command, *FLAGS, str(source), "-o", str(built)], capture_output=True, text=True)
            if done.returncode:
                raise BuildError(f"{' '.join(command)} failed on {source.name}: {done.stderr.strip()[:500]}")
            built.replace(path)
    except OSError as error:
        raise BuildError(f"the cache {path.parent} cannot be used: {error}") from error
    return path
