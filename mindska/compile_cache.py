"""Compiled graphs, kept for the next start of the same command.

MindSpore's own compile cache has one folder a process, numbers the graphs there in the order of their compilation, and
trusts its user for the rest. So here a process caches its first graph only (the training step; the network, when it is
evaluated), in a folder whose name is a digest of all that the graph depends on: the versions, our sources and
operators, the network's parameters, the inputs' shapes and the options. Another of any of them is another graph. A
folder is complete or absent, whenever a process was killed.

MINDSKA_COMPILE_CACHE=off switches it off; the folder is `graphs` in the cache of the C++ operators (MINDSKA_CACHE).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
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
from .errors import SettingError
from .kernels.build import BuildError, cache_folder

log = logging.getLogger("mindska")

KEPT = 20  # graphs, each of all its ranks; the oldest go
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
        cell.compile(*inputs)
        return
    _taken = True
    try:
        graphs = cache_folder() / "graphs"
        graphs.mkdir(parents=True, exist_ok=True)
        folder = graphs / f"{_digest(cell, inputs, options)}-{world().rank}of{world().size}"
        known = folder.is_dir()
        place = folder if known else Path(tempfile.mkdtemp(dir=graphs, prefix="."))
    except (BuildError, OSError) as error:
        log.warning(
            "Compiled graphs are not kept (%s): the next start takes as long. MINDSKA_COMPILE_CACHE=off says no more.",
            error,
        )
        cell.compile(*inputs)
        return
    try:
        with contextlib.suppress(OSError):
            os.utime(place)  # the latest to go
        with _mindspores_cache(place):
            cell.compile(*inputs)
        if not known and list(place.rglob("*.mindir")):
            with contextlib.suppress(OSError):  # another process was faster
                place.rename(folder)
    finally:
        if not known:
            shutil.rmtree(place, ignore_errors=True)
    _prune(graphs)


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
