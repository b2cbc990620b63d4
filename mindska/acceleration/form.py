"""The base class of accelerated forms, and how a form is applied to a cell and removed from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import mindspore as ms
from mindspore import Tensor, nn

from ..models.layers.precision import Float32Cell


class AcceleratedForm:
    """Mixed into the class of a cell: the same function by C++ operators.

    `class FusedBlock(AcceleratedForm, Block)` is the accelerated form of `Block`. A cell of that class gets the form by
    changing its class, so that parameters, their names and order, hooks and `isinstance` stay.

    A form states in its body:
        plain_class: the class whose instances may have it, as `Block`; not those of its subclasses.
        plain: the equation of that class, as `Block.construct`.
        prepare: makes its operators.
        in_training, in_inference: the function by these operators; either may be `plain`.

    Inputs that the operators do not accept go to `plain` as well.
    """

    plain_class: ClassVar[type[nn.Cell]]
    plain: Callable[..., Tensor]
    in_training: Callable[..., Tensor]
    in_inference: Callable[..., Tensor]
    training: bool  # the cell's
    in_half_precision = False

    @classmethod
    def supports(cls, cell: nn.Cell) -> bool:
        """Whether the form can compute what a cell of `plain_class` does."""
        return True

    def prepare(self) -> None:
        """Makes the operators that the form needs, as attributes; they are removed with the form."""

    def has_norm_in_training(self) -> bool:
        """Whether a batch norm of the cell is in training; where it alone is, its running statistics are updated."""
        return False

    def accepts(self, x: Tensor) -> bool:
        """Whether the operators accept x: they know float32 only."""
        return x.dtype == ms.float32 and not self.in_half_precision

    def uses_plain(self, x: Tensor) -> bool:
        """Whether `construct` leaves x to `plain`; what a form computes may fall back to it as well."""
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
        return super().add_flags_recursive(**flags)  # type: ignore[misc]  # the cell's


def plain_class_of(cell: nn.Cell) -> type[nn.Cell]:
    """A cell's class without a form: what a form of the cell around it may rely on, where a subclass would not do."""
    return cell.plain_class if isinstance(cell, AcceleratedForm) else type(cell)


def set_class(cell: nn.Cell, its_class: type[nn.Cell]) -> None:
    """Gives a cell another class; one that stays in float32 has its `construct` in itself."""
    cell.__class__ = its_class
    if isinstance(cell, Float32Cell):
        cell.bind_construct()


def apply_form(cell: nn.Cell, form: type[AcceleratedForm]) -> None:
    """Gives a cell of `form.plain_class` that form, in place."""
    before = set(cell._cells) | set(cell.__dict__)
    set_class(cell, form)
    flags = cell.get_flags()
    cell.in_half_precision = bool(flags.get("fp16") or flags.get("bf16"))
    cell.prepare()
    cell.form_attributes = sorted((set(cell._cells) | set(cell.__dict__)) - before)  # for `remove_form`
    for name in cell.form_attributes:
        if name in cell._cells:
            cell._cells[name].set_train(cell.training)


def remove_form(cell: nn.Cell) -> None:
    """Gives a cell its own class back, in place, and removes what the form has made."""
    for name in cell.form_attributes:
        delattr(cell, name)
    del cell.form_attributes
    set_class(cell, cell.plain_class)


def clear_compile_cache(net: nn.Cell) -> None:
    """Has MindSpore compile a network again: it does not notice that cells have another class."""
    for _, cell in net.cells_and_names():
        if cell.compile_cache:
            cell.compile_cache.clear()
