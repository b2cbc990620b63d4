"""Acceleration on CPU: a pass over a network that gives its cells forms which compute by our C++ operators.

`accelerate` changes cells in place and `decelerate` undoes it: parameters, their names and order, and the results stay.
What `mindcv.create_model` makes is accelerated where the operators can be had (see `mindska.kernels`). Exporting and
folding undo it by themselves. Where a form's operators do not accept an input (half precision, say), the cell's plain
equation is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mindspore as ms
from mindspore import nn

from .. import kernels
from . import boxes, layers, pyramid, segmentation, sequence, sknet
from .exporting import wrap_exports
from .form import AcceleratedForm, apply_form, clear_compile_cache, remove_form

FORMS: tuple[type[AcceleratedForm], ...] = (
    layers.FusedConv2d,
    layers.FusedGELU,
    layers.FusedLayerNorm2d,
    layers.FusedBatchNorm2d,
    pyramid.FusedPatchEmbed,
    pyramid.FusedConvMlp,
    pyramid.FusedLargeKernelAttention,
    pyramid.FusedSplitKernelAttention,
    pyramid.FusedFoldedSplitKernelAttention,
    pyramid.FusedMaxRelativeConv,
    pyramid.FusedBlock,
    pyramid.FusedFoldedBlock,
    sknet.FusedConvNorm,
    sknet.FusedSelectiveKernel,
    sknet.FusedSKUnit,
    segmentation.FusedPixelLosses,
    segmentation.FusedBilinear,
    boxes.FusedMaxIouAssigner,
    boxes.FusedSuppression,
    boxes.FusedRoIAlign,
    boxes.FusedMaskTargets,
    sequence.SequencedSkaNet,
    sequence.SequencedVAN,
    sequence.SequencedSKNet,
)
_FORM_OF = {form.plain_class: form for form in FORMS}  # of exact classes: a subclass may compute something else


def accelerate(network: nn.Cell) -> nn.Cell:
    """Gives every cell of a network its accelerated form, if there is one, in place. Returns the network.

    It stays as it is where the operators cannot be had: on other devices, without a compiler, with MINDSKA_KERNELS=off.
    """
    if kernels.available():
        for _, cell in list(network.cells_and_names()):
            form = _FORM_OF.get(type(cell))
            if form and form.supports(cell):
                apply_form(cell, form)
        clear_compile_cache(network)
    return network


def decelerate(network: nn.Cell) -> nn.Cell:
    """Undoes what `accelerate` did, in place. Returns the network."""
    if is_accelerated(network):
        for _, cell in list(network.cells_and_names()):
            if isinstance(cell, AcceleratedForm):
                remove_form(cell)
        clear_compile_cache(network)
    return network


def is_accelerated(network: nn.Cell) -> bool:
    """Whether some cell of the network has an accelerated form."""
    return any(isinstance(cell, AcceleratedForm) for _, cell in network.cells_and_names())


@contextmanager
def decelerated(network: nn.Cell) -> Iterator[nn.Cell]:
    """The network without acceleration; after the block it is accelerated again if it was before."""
    was_accelerated = is_accelerated(network)
    decelerate(network)
    try:
        yield network
    finally:
        if was_accelerated:
            accelerate(network)


def summary(network: nn.Cell) -> str:
    """A line for a log: "C++ operators: 9 kinds in 214 cells", or that there are none."""
    forms = [type(cell) for _, cell in network.cells_and_names() if isinstance(cell, AcceleratedForm)]
    return f"C++ operators: {len(set(forms))} kinds in {len(forms)} cells" if forms else "C++ operators: none"


def slow_convolutions(network: nn.Cell) -> int:
    """Convolutions on CPU that this MindSpore is slow at: from 2.9 on, those without a form of ours."""
    major, minor = (int(part) for part in ms.__version__.split(".")[:2])
    if (major, minor) < (2, 9) or ms.get_context("device_target") != "CPU":
        return 0

    def plain(cell: nn.Cell) -> int:
        if isinstance(cell, AcceleratedForm):  # what is inside computes as part of it
            return 0
        return isinstance(cell, nn.Conv2d) + sum(plain(child) for child in cell.cells())

    return plain(network)


wrap_exports(decelerated)
