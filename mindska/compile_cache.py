"""Compiled graphs, kept for the next start of the same command.

MindSpore's own compile cache has one folder a process, numbers the graphs there in the order of their compilation, and
trusts its user for the rest. So here a process caches its first graph only (the training step; the network, when it is
evaluated), in a folder whose name is a digest of all that the graph depends on: the versions, our sources and
operators, the network's parameters, the inputs' shapes and the options. Another of any of them is another graph. A
folder is complete or absent, whenever a process was killed.

MindSpore loads the libraries that a graph names. So a folder counts only if it belongs to the user or to root, nobody
else can write it, and its checksum is right; what does not count is deleted, compiled anew, and said. MindSpore gets a
private copy: the cache may be deleted meanwhile.

MINDSKA_COMPILE_CACHE=off switches it off; the folder is `graphs` in the cache of the C++ operators (MINDSKA_CACHE).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import stat
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import mindcv
import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from . import kernels
from .distributed import world
from .errors import BuildError, SettingError
from .kernels.build import cache_folder, keep_libraries, trusted_folder, why_untrusted

log = logging.getLogger("mindska")

KEPT = 20  # graphs, each of all its ranks; the oldest go
CHECKSUM = "checksum"  # the file of a graph's folder that has its checksum
UNFINISHED = 24 * 3600  # seconds after which a folder with half a graph is taken for a killed process's
_taken = False  # whether this process has cached a graph


def compile_cached(cell: nn.Cell, *inputs: Tensor, options: Any = None) -> None:
    """Compiles the cell in graph mode for inputs of these shapes, or loads what an earlier process compiled.

    Where the cache cannot be written, it compiles without one, and says so.

    Args:
        options: all that the graph depends on besides its parameters; its `repr` counts.

    Raises:
        SettingError: MINDSKA_COMPILE_CACHE is neither "on" nor "off".
    """
    wanted = os.environ.get("MINDSKA_COMPILE_CACHE", "on")
    if wanted not in ("on", "off"):
        raise SettingError(f"MINDSKA_COMPILE_CACHE is {wanted!r}; expected on or off")
    if ms.get_context("mode") != ms.GRAPH_MODE:
        return
    global _taken
    has_file = hasattr(sys.modules["__main__"], "__file__")  # MindSpore reads it to see whether it has changed
    if wanted == "off" or _taken or not has_file:
        _compile(cell, inputs)
        return
    _taken = True
    try:
        trusted_folder(cache_folder())
        graphs = trusted_folder(cache_folder() / "graphs")
        folder = graphs / f"{_digest(cell, inputs, options)}-{world().rank}of{world().size}"
        place = tempfile.TemporaryDirectory(prefix="mindska-graph-")
    except (BuildError, OSError) as error:
        log.warning(
            "Compiled graphs are not kept (%s): the next start takes as long. MINDSKA_COMPILE_CACHE=off says no more.",
            error,
        )
        _compile(cell, inputs)
        return
    with place:
        known = _take(folder, Path(place.name))
        with _mindspores_cache(Path(place.name)):
            _compile(cell, inputs)
        if not known:
            _keep(Path(place.name), folder)
    _prune(graphs)


def _compile(cell: nn.Cell, inputs: tuple[Tensor, ...]) -> None:
    keep_libraries()
    try:
        cell.compile(*inputs)
    except RuntimeError:
        if not keep_libraries():
            raise
        cell.compile(*inputs)  # the operators' libraries were deleted in the middle


def _take(folder: Path, place: Path) -> bool:
    """Copies a graph that is kept to `place`; whether there is one that may be loaded."""
    try:
        files = _files(folder)
        os.utime(folder)  # the latest to go
        for name, content in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
    except FileNotFoundError:
        return False  # or deleted just now
    except (OSError, ValueError) as error:
        log.warning("%s is not loaded (%s): the graph is compiled anew", folder, error)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(exist_ok=True)
        _delete(folder)
        return False
    return True


def _keep(place: Path, folder: Path) -> None:
    """Copies a graph to its folder, whole or not at all."""
    files = {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}
    if not any(name.endswith(".mindir") for name in files):
        return
    try:
        trusted_folder(folder.parent)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as unfinished:
            new = Path(unfinished) / folder.name
            for name, content in {**files, CHECKSUM: _checksum(folder, files)}.items():
                (new / name).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                (new / name).write_bytes(content)
                (new / name).chmod(0o644)
            with contextlib.suppress(OSError):  # another process was faster
                new.rename(folder)
    except (BuildError, OSError) as error:
        log.warning("The compiled graph is not kept (%s): the next start takes as long", error)


def _files(folder: Path) -> dict[str, bytes]:
    """The files of a graph that is kept, by name.

    Raises:
        ValueError: others can write them, they are no plain files, or they are not what was written.
    """
    files = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        status = path.lstat()
        reason = why_untrusted(status)
        if reason or not (stat.S_ISDIR(status.st_mode) or (path != folder and stat.S_ISREG(status.st_mode))):
            raise ValueError(f"{path.name}: {reason or 'neither a file nor a folder'}")
        if stat.S_ISREG(status.st_mode):
            files[str(path.relative_to(folder))] = path.read_bytes()
    found = files.pop(CHECKSUM, None)
    if found != _checksum(folder, files):
        raise ValueError("its checksum is wrong")
    return files


def _checksum(folder: Path, files: dict[str, bytes]) -> bytes:
    key = hashlib.sha256(folder.name.encode())
    for name, content in sorted(files.items()):
        key.update(f"\0{name}\0{len(content)}\0".encode() + content)
    return key.hexdigest().encode()


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _prune(graphs: Path) -> None:
    """Deletes all but the `KEPT` graphs that were used last, and what processes left that were killed meanwhile."""
    for folder in graphs.glob(".*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > UNFINISHED:
                shutil.rmtree(folder, ignore_errors=True)
    latest: dict[str, float] = {}
    for folder in graphs.glob("[!.]*"):
        with contextlib.suppress(OSError):  # another process has just deleted it
            digest = folder.name.partition("-")[0]
            latest[digest] = max(latest.get(digest, 0), folder.stat().st_mtime)
    for digest in sorted(latest, key=latest.__getitem__, reverse=True)[KEPT:]:
        for folder in graphs.glob(f"{digest}-*"):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _mindspores_cache(folder: Path) -> Any:
    ms.set_context(enable_compile_cache=True, compile_cache_path=str(folder))
    try:
        yield
    finally:
        ms.set_context(enable_compile_cache=False)


@cache
def _sources() -> bytes:
    """The package's own code. (The operators' libraries count by their paths, which hold a digest of their sources.)"""
    key = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        key.update(path.read_bytes())
    return key.digest()


def _digest(cell: nn.Cell, inputs: tuple[Tensor, ...], options: Any) -> str:
    key = hashlib.sha256(_sources())
    for part in (
        sys.version, ms.__version__, mindcv.__version__, np.__version__, ms.get_context("device_target"),
        [str(path) for path in kernels.libraries()], type(cell).__name__, cell.training, repr(options),
        [(p.name, p.shape, str(p.dtype), p.requires_grad) for p in cell.get_parameters()],
        [(x.shape, str(x.dtype)) for x in inputs], str(cell),
    ):  # fmt: skip
        key.update(f"{part}\0".encode())
    return key.hexdigest()[:32]
