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
import errno
import hashlib
import inspect
import logging
import os
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import BuiltinFunctionType, CellType, FunctionType, MethodType
from typing import Any, Callable, NoReturn, Optional

import mindcv
import mindspore as ms
import numpy as np
from google.protobuf.message import DecodeError
from mindspore import Parameter, Tensor, nn
from mindspore.train.mind_ir_pb2 import ModelProto

from . import kernels
from .distributed import world
from .errors import BuildError, SettingError
from .files import own_mode
from .kernels.build import cache_folder, keep_libraries, trusted_folder, why_untrusted
from .waiting import waiting

log = logging.getLogger("mindska")

KEPT = 20  # graphs, each of all its ranks; the oldest go
CHECKSUM = "checksum"  # the file of a graph's folder that has its checksum
LARGEST = 1 << 26  # bytes that a graph may take: SkaNet-S's training step has ten times less
UNFINISHED = 24 * 3600  # seconds after which a folder with half a graph is taken for a killed process's
_taken = False  # whether this process has cached a graph


def _end(number: int) -> NoReturn:
    """Ends a process that is asked to stop while it compiles."""
    log.warning("Stopped while compiling (%s)", signal.Signals(number).name)
    sys.stderr.flush()
    os._exit(128 + number)


def compile_cached(
    cell: nn.Cell,
    *inputs: Tensor,
    options: Any = None,
    what: str = "the network",
    on_signal: Optional[Callable[[int], None]] = None,
) -> None:
    """Compiles the cell in graph mode for inputs of these shapes, or loads what an earlier process compiled.

    Where the cache cannot be written, it compiles without one, and says so.

    Args:
        options: all that the graph depends on besides its parameters; its `repr` counts.
        what: what is compiled, for the lines that say so.
        on_signal: what ends the process when it is asked to stop meanwhile: MindSpore would go on to the end. Default:
            Ctrl-C does where nobody handles it; where somebody does, it waits.

    Raises:
        SettingError: MINDSKA_COMPILE_CACHE is neither "on" nor "off".
    """
    wanted = os.environ.get("MINDSKA_COMPILE_CACHE", "on")
    if wanted not in ("on", "off"):
        raise SettingError(f"MINDSKA_COMPILE_CACHE is {wanted!r}; expected on or off")
    if ms.get_context("mode") != ms.GRAPH_MODE:
        return
    what = f"Compiling {what}"
    if on_signal is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        on_signal = _end
    global _taken
    has_file = hasattr(sys.modules["__main__"], "__file__")  # MindSpore reads it to see whether it has changed
    if wanted == "off" or _taken or not has_file:
        with waiting(what, on_signal=on_signal):
            _compile(cell, inputs)
        return
    _taken = True
    try:
        trusted_folder(cache_folder())
        graphs = trusted_folder(cache_folder() / "graphs")
        folder = graphs / f"{_digest(cell, inputs, options)}-{world().rank}of{world().size}"
        place = tempfile.TemporaryDirectory(prefix="mindska-graph-")
        _check_room(Path(place.name))
    except (BuildError, OSError) as error:
        log.warning(
            "Compiled graphs are not kept (%s): the next start takes as long. MINDSKA_COMPILE_CACHE=off says no more.",
            error,
        )
        with waiting(what, on_signal=on_signal):
            _compile(cell, inputs)
        return

    def end(number: int) -> None:
        place.cleanup()
        assert on_signal  # else nobody calls this
        on_signal(number)

    with place:
        known = _take(folder, Path(place.name))
        kept = "as an earlier start has left it" if known else ""
        with waiting(what, on_signal=on_signal and end, note=kept), _mindspores_cache(Path(place.name)):
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
        with contextlib.suppress(OSError):  # root's, for all
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
    if not _are_whole(files):
        log.warning("The compiled graph is not kept (MindSpore has not written it whole): the next start takes as long")
        return
    try:
        trusted_folder(folder.parent)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as unfinished:
            new = Path(unfinished) / folder.name
            for name, content in {**files, CHECKSUM: _checksum(folder, files)}.items():
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                (new / name).write_bytes(content)
            for path in (new, *new.rglob("*")):
                path.chmod(own_mode(Path(unfinished), executable=path.is_dir()))
            with contextlib.suppress(OSError):  # another process was faster
                new.rename(folder)
    except (BuildError, OSError) as error:
        log.warning("The compiled graph is not kept (%s): the next start takes as long", error)


def _are_whole(files: dict[str, bytes]) -> bool:
    """Whether MindSpore could write a graph to its end: it does not say."""
    graphs = [content for name, content in files.items() if name.endswith(".mindir")]
    try:
        return bool(graphs) and all(ModelProto.FromString(content).HasField("graph") for content in graphs)
    except DecodeError:
        return False


def _check_room(place: Path) -> None:
    """OSError where there is no room for a graph: MindSpore would print its own errors and write half of it."""
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, LARGEST)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that does not know it
            raise OSError(f"no room for {LARGEST >> 20} MiB in {place.parent}: {error.strerror}") from error


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


# What every cell has; with it, what MindSpore has put there meanwhile counts for nothing.
_COMMON = frozenset(vars(nn.Cell()))
DEPTH = 5  # of objects within the attributes of a cell


def _fact(value: Any, depth: int = DEPTH) -> str:
    """What a value in a cell means for its graph, the same in every process: no addresses, no order of a set.

    Parameters and cells count elsewhere.
    """
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, ms.Type)):
        return repr(value)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, (Parameter, nn.Cell)) or depth == 0 or getattr(value, "has_init", False):
        return kind
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        array = np.asarray(value.asnumpy() if isinstance(value, Tensor) else value)
        return f"{kind} {array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
    if isinstance(value, (list, tuple)):
        return f"{kind}[{', '.join(_fact(each, depth - 1) for each in value)}]"
    if isinstance(value, (set, frozenset)):
        return f"{kind}[{', '.join(sorted(_fact(each, depth - 1) for each in value))}]"
    if isinstance(value, dict):
        pairs = sorted(f"{_fact(k, depth - 1)}: {_fact(v, depth - 1)}" for k, v in value.items())
        return f"{kind}[{', '.join(pairs)}]"
    if isinstance(value, (FunctionType, MethodType, BuiltinFunctionType, type)):
        value = inspect.unwrap(value)  # what MindSpore's jit made of a function holds the time
        held = [_fact(_content(cell), depth - 1) for cell in getattr(value, "__closure__", None) or ()]
        return f"{kind} {value.__module__}.{value.__qualname__}[{', '.join(held)}]"
    return f"{kind} {_fact(_own(value), depth - 1)}"


def _content(cell: CellType) -> Any:
    """What a function has from where it was made; None where that is not there yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _own(value: Any) -> dict[str, Any]:
    """An object's attributes that somebody has given it."""
    return {name: each for name, each in getattr(value, "__dict__", {}).items() if name[0] != "_"}


def _facts(cell: nn.Cell) -> Iterator[str]:
    """What tells a network from another, besides its parameters."""
    for name, each in cell.cells_and_names():
        own = {key: value for key, value in _own(each).items() if key not in _COMMON}
        yield f"{name} {type(each).__module__}.{type(each).__qualname__} {each.training} {each.get_flags()}"
        yield _fact({**own, **each._primitives})


def _digest(cell: nn.Cell, inputs: tuple[Tensor, ...], options: Any) -> str:
    key = hashlib.sha256(_sources())
    for part in (
        sys.version, ms.__version__, mindcv.__version__, np.__version__, ms.get_context("device_target"),
        [str(path) for path in kernels.libraries()], type(cell).__name__, cell.training, repr(options),
        [(p.name, p.shape, str(p.dtype), p.requires_grad) for p in cell.get_parameters()],
        [(x.shape, str(x.dtype)) for x in inputs], *_facts(cell),
    ):  # fmt: skip
        key.update(f"{part}\0".encode())
    return key.hexdigest()[:32]
