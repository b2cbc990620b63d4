"""MindSpore's two modes, each for a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import mindspore as ms


def graph_mode() -> AbstractContextManager[None]:
    """MindSpore's graph mode, in which networks are compiled."""
    return _mode(ms.GRAPH_MODE)


def pynative_mode() -> AbstractContextManager[None]:
    """MindSpore's PyNative mode, which takes many shapes without compiling for each."""
    return _mode(ms.PYNATIVE_MODE)


@contextmanager
def _mode(mode: int) -> Iterator[None]:
    before = ms.get_context("mode")
    ms.set_context(mode=mode)
    try:
        yield
    finally:
        ms.set_context(mode=before)
