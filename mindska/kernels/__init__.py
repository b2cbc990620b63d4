"""C++ operators for the CPU (`operators.py`), and whether they can be had.

They cannot on other devices, without a compiler, inside `plain()`, or when the environment variable MINDSKA_KERNELS is
"off". With "require" not to have them is an error; the default is "auto". `mindska.acceleration` puts them into
networks.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import mindspore as ms

from ..errors import BuildError, SettingError
from ..waiting import waiting
from .build import library
from .signatures import signatures

log = logging.getLogger("mindska")

FILES = tuple(dict.fromkeys(signature.file for signature in signatures().values()))
MODES = ("auto", "off", "require")
_plain_only = 0


@contextmanager
def plain() -> Iterator[None]:
    """Networks that are made inside are not accelerated."""
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
    """Whether the C++ operators can be had here and now."""
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
    """The operators' libraries; none where they cannot be had."""
    return [library(name) for name in FILES] if available() else []


def fingerprint() -> str:
    """Which operators networks made now use: "plain", or "C++" and a digest of sources, compiler and processor.

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
        with waiting("Building C++ operators (once for this machine)", quiet_for=1.0), ThreadPoolExecutor() as pool:
            list(pool.map(library, FILES))
    except BuildError as error:
        if mode() != "require":  # which goes on with nothing
            log.warning(
                "C++ operators are not used (%s): the same results to rounding, slower. "
                "MINDSKA_KERNELS=off says no more.",
                error,
            )
        return str(error)
    return ""
