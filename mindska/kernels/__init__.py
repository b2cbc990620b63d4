"""Custom C++ operators for the CPU, and the one place where an operator chooses its implementation.

A layer asks here when it is made: `gelu()`, `mlp()`, `max_relative(...)` return the C++ operator (`operators.py`), or
None where the plain operators are to be used: on other devices, without a compiler, inside `plain()` (exports), or when
the environment variable MINDSKA_KERNELS is "off". With "require" not to have them is an error; the default is "auto".
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any, Callable, Optional

import mindspore as ms
from mindspore import nn

from ..errors import SettingError
from . import operators
from .build import BuildError, library
from .signatures import signatures

log = logging.getLogger("mindska")

FILES = tuple(dict.fromkeys(signature.file for signature in signatures().values()))
MODES = ("auto", "off", "require")
_plain_only = 0


@contextmanager
def plain() -> Iterator[None]:
    """Networks that are made inside use MindSpore's plain operators only."""
    global _plain_only
    _plain_only += 1
    try:
        yield
    finally:
        _plain_only -= 1


def mode() -> str:
    """The value of MINDSKA_KERNELS.

    Raises:
        SettingError: it is none of "auto", "off", "require".
    """
    value = os.environ.get("MINDSKA_KERNELS", "auto")
    if value not in MODES:
        raise SettingError(f"MINDSKA_KERNELS is {value!r}; expected one of {', '.join(MODES)}")
    return value


def available() -> bool:
    """Whether layers that are made now use the C++ operators."""
    wanted = mode()
    if _plain_only or wanted == "off":
        return False
    if ms.get_context("device_target") != "CPU":
        if wanted == "require":
            raise SettingError("MINDSKA_KERNELS is 'require', but the C++ operators are for the CPU only")
        return False
    reason = _why_not()
    if reason and wanted == "require":
        raise SettingError(f"MINDSKA_KERNELS is 'require', but the C++ operators cannot be had: {reason}")
    return not reason


def libraries() -> list[Path]:
    """The libraries of the operators that layers made now use; none where these are the plain ones."""
    return [library(name) for name in FILES] if available() else []


def fingerprint() -> str:
    """Which operators layers made now use: "plain", or "C++" and a digest of sources, compiler and processor.

    Where it is the same, so are a run's numbers, to the bit.
    """
    names = " ".join(path.name for path in libraries())
    return f"C++ {hashlib.sha256(names.encode()).hexdigest()[:16]}" if names else "plain"


@cache
def _why_not() -> str:
    """Why the C++ operators cannot be had; empty when they can."""
    try:
        if sys.platform != "linux":
            raise BuildError("MindSpore takes them on Linux only")
        with ThreadPoolExecutor() as pool:
            list(pool.map(library, FILES))
    except BuildError as error:
        log.warning(
            "C++ operators are not used (%s): the same results, slower. MINDSKA_KERNELS=off says no more.", error
        )
        return str(error)
    return ""


def _where_available(operator: type[nn.Cell]) -> Callable[..., Optional[nn.Cell]]:
    """A function that makes the operator, or returns None where the plain operators are to be used."""

    @wraps(operator, updated=())
    def make(*args: Any, **kwargs: Any) -> Optional[nn.Cell]:
        return operator(*args, **kwargs) if available() else None

    return make


# Arguments, inputs and outputs are those of the classes.
affine_of_norm = _where_available(operators.AffineOfNorm)
batch_norm = _where_available(operators.BatchNorm)
behind = _where_available(operators.Behind)
depthwise = _where_available(operators.Depthwise)
depthwise_gelu = _where_available(operators.DepthwiseGelu)
fuse = _where_available(operators.Fuse)
gate = _where_available(operators.Gate)
gelu = _where_available(operators.Gelu)
grouped = _where_available(operators.Grouped)
layer_norm = _where_available(operators.LayerNorm)
max_relative = _where_available(operators.MaxRelative)
mlp = _where_available(operators.Mlp)
mlp_added = _where_available(operators.MlpAdded)
pointwise = _where_available(operators.Pointwise)
pointwise_then = _where_available(operators.PointwiseThen)
residual = _where_available(operators.Residual)
select = _where_available(operators.Select)
split_depthwise = _where_available(operators.SplitDepthwise)
square_sum = _where_available(operators.SquareSum)
strided = _where_available(operators.Strided)
