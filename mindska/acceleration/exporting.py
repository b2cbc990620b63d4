"""`mindspore.export` and `mindspore.onnx.export`, taking acceleration off meanwhile.

A file that MindSpore writes of an accelerated network names libraries of this machine, and runs nowhere else; to ONNX
it cannot be written at all. `mindska.export.export` needs none of this: it is for those who call MindSpore's own.
"""

from __future__ import annotations

import contextlib
from functools import wraps
from typing import Any, Callable

import mindspore as ms
import mindspore.onnx
from mindspore import nn


def wrap_exports(decelerated: Callable[[nn.Cell], Any]) -> None:
    """Has MindSpore's exports run within `decelerated(net)`."""
    for module in (ms, ms.train.serialization, ms.onnx):
        module.export = _within(decelerated, module.export)


def _within(decelerated: Callable[[nn.Cell], Any], export: Callable) -> Callable:
    @wraps(export)
    def plain_export(net: Any, *inputs: Any, **options: Any) -> Any:
        with decelerated(net) if isinstance(net, nn.Cell) else contextlib.nullcontext():
            return export(net, *inputs, **options)

    return plain_export
