"""What an accelerated form of a cell is, and how a cell takes it and puts it off."""

from __future__ import annotations

from typing import ClassVar

import mindspore as ms
from mindspore import Tensor, nn


class Form:
    """Mixed into the class of a cell: the same function by C++ operators.

    `class FusedBlock(Form, Block)` with `plain = Block.construct` in its body is a form of `Block`. A cell takes it by
    changing its class, so that parameters, their names and order, hooks and `isinstance` stay.

    A form has `prepare`, which makes its operators, and `in_training` and `in_inference`, one of which may be the plain
    equation. What its operators do not accept goes to that as well.
    """

    stands_for: ClassVar[type[nn.Cell]]  # the class whose instances may take the form; not those of its subclasses
    in_half_precision = False

    @classmethod
    def fits(cls, cell: nn.Cell) -> bool:
        """Whether a cell of the class that the form stands for may take it."""
        return True

    def prepare(self) -> None:
        """Makes the operators that the form needs, as attributes."""

    def has_norm_in_training(self) -> bool:
        """Whether a batch norm of the cell is in training: alone, it takes new statistics for old weights."""
        return False

    def accepts(self, x: Tensor) -> bool:
        """Whether the operators take x: they know float32 only."""
        return x.dtype == ms.float32 and not self.in_half_precision

    def uses_plain(self, x: Tensor) -> bool:
        """Whether the plain equation computes the cell's function of x: the one place that decides it."""
        return not self.accepts(x) or (not self.training and self.has_norm_in_training())

    def construct(self, *inputs: Tensor) -> Tensor:
        if self.uses_plain(inputs[0]):
            return self.plain(*inputs)
        return self.in_training(*inputs) if self.training else self.in_inference(*inputs)

    def add_flags_recursive(self, **flags) -> nn.Cell:
        # Mixed precision of the levels O2 and O3 sets these on every cell of a network. In PyNative mode each
        # operator's inputs are then cast after the cell has seen them in float32.
        if "fp16" in flags or "bf16" in flags:  # others come this way as well: `training`
            self.in_half_precision = bool(flags.get("fp16") or flags.get("bf16"))
        return super().add_flags_recursive(**flags)


def take(cell: nn.Cell, form: type[Form]) -> None:
    """Gives a cell a form of its class."""
    before = set(cell._cells) | set(cell.__dict__)
    cell.__class__ = form
    flags = cell.get_flags()
    cell.in_half_precision = bool(flags.get("fp16") or flags.get("bf16"))
    cell.prepare()
    cell.added = sorted((set(cell._cells) | set(cell.__dict__)) - before)  # what `put_off` takes away
    for name in cell.added:
        if name in cell._cells:
            cell._cells[name].set_train(cell.training)


def put_off(cell: nn.Cell) -> None:
    """Gives a cell its own class back."""
    for name in cell.added:
        delattr(cell, name)
    del cell.added
    cell.__class__ = cell.stands_for


def forget_graphs(net: nn.Cell) -> None:
    """Has MindSpore compile a network anew: it does not look at the classes of cells."""
    for _, cell in net.cells_and_names():
        if cell.compile_cache:
            cell.compile_cache.clear()
