"""Cells that stay in float32, whatever mixed precision the network around them is given."""

from __future__ import annotations

from functools import wraps
from types import MethodType
from typing import Any, Callable

from mindspore import dtype as mstype
from mindspore import nn
from mindspore._c_expression.amp import AmpLevel, create_amp_strategy
from mindspore.train.amp import AmpDecorator

# A strategy of mixed precision that casts nothing.
NO_AMP: tuple[Any, ...] = (AmpLevel.AmpO0, mstype.float16, [], [])


def _without_amp(function: Callable) -> Callable:
    """The function, with mixed precision switched off inside."""

    @wraps(function)
    def run(*args, **kwargs):
        with AmpDecorator(*NO_AMP):
            return function(*args, **kwargs)

    return run


class Float32Cell(nn.Cell):
    """A cell of whose operators mixed precision (MindSpore's levels O2, O3 and "auto") casts none."""

    def __init__(self) -> None:
        super().__init__()
        # Against the level "auto", which goes by operator: inside, nothing is cast.
        self.amp_strategy = create_amp_strategy(*NO_AMP)
        self.bind_construct()

    def bind_construct(self) -> None:
        """Has `construct` of the cell's class run so; for this cell alone, as MindSpore does it itself."""
        self.__dict__["construct"] = MethodType(_without_amp(type(self).construct), self)

    def add_flags_recursive(self, **flags) -> nn.Cell:
        # Against the levels O2 and O3, which set these flags on every cell of a network.
        if flags.get("fp16") or flags.get("bf16"):
            flags.update(fp16=False, bf16=False, fp32=True)
        return super().add_flags_recursive(**flags)
