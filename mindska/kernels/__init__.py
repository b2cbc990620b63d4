"""Custom C++ operators for the CPU, and the one place where an operator chooses its implementation.

A layer asks here when it is made: `gelu()`, `mlp()`, `max_relative(...)` return the C++ operator (`operators.py`), or
None where the plain operators are to be used: on other devices, without a compiler, inside `plain()` (exports), or when
the environment variable MINDSKA_KERNELS is "off". With "require" a missing compiler is an error; the default is "auto".
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Optional

import mindspore as ms
from mindspore import nn

from ..errors import SettingError
from . import operators
from .build import BuildError, library

log = logging.getLogger("mindska")

FILES = (
    "gelu", "depthwise", "pointwise", "mlp", "max_relative", "layer_norm", "batch_norm", "grouped", "strided",
    "select", "square_sum", "residual", "gate", "fold",
)  # fmt: skip
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
        raise SettingError(f"MINDSKA_KERNELS is 'require', but the C++ operators cannot be built: {reason}")
    return not reason


def libraries() -> list[Path]:
    """The libraries of the operators that layers made now use; none where these are the plain ones."""
    return [library(name) for name in FILES] if available() else []


@cache
def _why_not() -> str:
    """Why the C++ operators cannot be had; empty when they can."""
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(library, FILES))
    except BuildError as error:
        log.warning(
            "C++ operators are not used (%s): the same results, slower. MINDSKA_KERNELS=off says no more.", error
        )
        return str(error)
    return ""


def gelu() -> Optional[nn.Cell]:
    """GELU as a C++ operator, or None: x -> y of the same shape."""
    return operators.Gelu() if available() else None


def depthwise(dilation: int) -> Optional[nn.Cell]:
    """A depthwise convolution as a C++ operator, or None; see `operators.Depthwise`."""
    return operators.Depthwise(dilation) if available() else None


def depthwise_gelu(dilation: int) -> Optional[nn.Cell]:
    """A depthwise convolution and GELU as one C++ operator, or None; see `operators.DepthwiseGelu`."""
    return operators.DepthwiseGelu(dilation) if available() else None


def pointwise() -> Optional[nn.Cell]:
    """A 1x1 convolution as a C++ operator, or None; see `operators.Pointwise`."""
    return operators.Pointwise() if available() else None


def pointwise_then(kind: str) -> Optional[nn.Cell]:
    """A 1x1 convolution and what follows it as one C++ operator, or None; see `operators.PointwiseThen`."""
    return operators.PointwiseThen(kind) if available() else None


def layer_norm(eps: float) -> Optional[nn.Cell]:
    """Layer norm over the channels of maps as a C++ operator, or None; see `operators.LayerNorm`."""
    return operators.LayerNorm(eps) if available() else None


def batch_norm(eps: float, momentum: float, relu: bool = False) -> Optional[nn.Cell]:
    """Batch norm in training as a C++ operator, or None; see `operators.BatchNorm`."""
    return operators.BatchNorm(eps, momentum, relu) if available() else None


def affine_of_norm(eps: float) -> Optional[nn.Cell]:
    """What a batch norm does in evaluation, as a C++ operator, or None; see `operators.AffineOfNorm`."""
    return operators.AffineOfNorm(eps) if available() else None


def behind() -> Optional[nn.Cell]:
    """A 1x1 convolution behind scale and shift, as a C++ operator, or None; see `operators.Behind`."""
    return operators.Behind() if available() else None


def square_sum() -> Optional[nn.Cell]:
    """The sum of the squares of tensors as a C++ operator without gradient, or None; see `operators.SquareSum`."""
    return operators.SquareSum() if available() else None


def residual() -> Optional[nn.Cell]:
    """A scaled residual branch plus its shortcut as a C++ operator, or None; see `operators.Residual`."""
    return operators.Residual() if available() else None


def gate() -> Optional[nn.Cell]:
    """SiLU of a map times another as a C++ operator, or None; see `operators.Gate`."""
    return operators.Gate() if available() else None


def grouped(dilation: int, relu: bool = False) -> Optional[nn.Cell]:
    """A convolution in groups, with or without ReLU, as a C++ operator, or None; see `operators.Grouped`."""
    return operators.Grouped(dilation, relu) if available() else None


def strided(stride: int, dilation: int, relu: bool = False) -> Optional[nn.Cell]:
    """A convolution with a stride, with or without ReLU, as a C++ operator, or None; see `operators.Strided`."""
    return operators.Strided(stride, dilation, relu) if available() else None


def fuse() -> Optional[nn.Cell]:
    """The mean of two maps' sum as a C++ operator, or None; see `operators.Fuse`."""
    return operators.Fuse() if available() else None


def select() -> Optional[nn.Cell]:
    """The weighted sum of two maps as a C++ operator, or None; see `operators.Select`."""
    return operators.Select() if available() else None


def mlp() -> Optional[nn.Cell]:
    """The MLP of a block as one C++ operator, or None; see `operators.Mlp`."""
    return operators.Mlp() if available() else None


def mlp_added() -> Optional[nn.Cell]:
    """shortcut + scale * mlp(x) as one C++ operator for inference, or None; see `operators.MlpAdded`."""
    return operators.MlpAdded() if available() else None


def split_depthwise(dilation1: int, dilation2: int, identity: int) -> Optional[nn.Cell]:
    """SkaNet's split over the channels as a C++ operator, or None; see `operators.SplitDepthwise`."""
    return operators.SplitDepthwise(dilation1, dilation2, identity) if available() else None


def max_relative(k: int, dilation: int) -> Optional[nn.Cell]:
    """Neighbour search and max-relative aggregation as a C++ operator, or None; see `operators.MaxRelative`."""
    return operators.MaxRelative(k, dilation) if available() else None
