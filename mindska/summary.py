"""What a network is made of: its layers with the shapes of their outputs, parameters and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from .acceleration import decelerated
from .models.layers.graph import MaxRelativeConv


class Layer(NamedTuple):
    """A cell of a network that has parameters of its own, or searches neighbours.

    Attributes:
        name: where it is in the network, as in the names of its parameters; kind: its class.
        shape: of its output, for one image; empty where it returns several, or was not called.
        parameters: that are trained, of its own.
        macs: multiply-accumulates of its weights; distances: those of a neighbour search.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    distances: int


def layers(network: nn.Cell, channels: int, height: int, width: int) -> list[Layer]:
    """The layers of a network, in the order of its cells, from one pass of an empty image through it.

    Counted: output elements times weights per output of every convolution and linear layer, and the pairwise distances
    of a neighbour search. The network is as before afterwards.

    Raises:
        SettingError: the image is too small for the network (and what else the network raises).
    """
    shapes: dict[str, tuple[int, ...]] = {}
    macs: dict[str, int] = {}
    distances: dict[str, int] = {}
    with ExitStack() as stack:
        stack.enter_context(decelerated(network))  # every convolution is a cell whose hook is called
        stack.enter_context(_in_inference(network))
        cells = list(network.cells_and_names())
        for cell in {id(cell): cell for _, cell in cells}.values():
            if type(cell) in (nn.Conv2d, nn.Dense):
                stack.enter_context(_only_its_shape(cell))
        for name, cell in cells:

            def note(cell: nn.Cell, inputs: Sequence[Tensor], output: Any, name: str = name) -> None:
                if isinstance(output, Tensor):
                    shapes[name] = tuple(output.shape[1:])
                    if isinstance(cell, (nn.Conv1d, nn.Conv2d, nn.Dense)):
                        macs[name] = macs.get(name, 0) + output.size * cell.weight.size // cell.weight.shape[0]
                    elif isinstance(cell, nn.Conv2dTranspose):
                        macs[name] = macs.get(name, 0) + inputs[0].size * cell.weight.size // cell.weight.shape[0]
                if isinstance(cell, MaxRelativeConv):
                    queries, keys = cell.nodes(inputs[0])
                    distances[name] = distances.get(name, 0) + queries.size * keys.shape[1]

            stack.callback(cell.register_forward_hook(note).remove)
        network(Tensor(np.zeros((1, channels, height, width), np.float32)))
        kinds = [type(cell).__name__ for _, cell in cells]  # before they get their accelerated forms again
    found = []
    for (name, cell), kind in zip(cells, kinds):
        own = sum(p.size for p in cell.trainable_params(recurse=False))
        if own or name in macs or name in distances:
            found.append(Layer(name, kind, shapes.get(name, ()), own, macs.get(name, 0), distances.get(name, 0)))
    return found


@contextmanager
def _only_its_shape(cell: nn.Cell) -> Iterator[None]:
    """Within, a convolution or linear layer gives zeros: a pass of a large network takes half a minute otherwise."""

    def zeros(x: Tensor) -> Tensor:
        if isinstance(cell, nn.Dense):
            shape = (*x.shape[:-1], cell.out_channels)
        else:
            shape = (
                x.shape[0],
                cell.out_channels,
                *(_output_side(cell, side, i) for i, side in enumerate(x.shape[2:])),
            )
        return Tensor(np.zeros(shape, np.float32)).astype(x.dtype)

    cell.construct = zeros
    try:
        yield
    finally:
        del cell.construct


def _output_side(conv: nn.Conv2d, side: int, axis: int) -> int:
    """Height (axis 0) or width (1) of what a convolution makes of a map of this height or width."""
    kernel, stride, dilation = (each[axis] for each in (conv.kernel_size, conv.stride, conv.dilation))
    if conv.pad_mode == "same":
        return -(-side // stride)
    padding = (conv.padding,) * 4 if isinstance(conv.padding, int) else conv.padding
    padded = side + (sum(padding[2 * axis : 2 * axis + 2]) if conv.pad_mode == "pad" else 0)
    return (padded - dilation * (kernel - 1) - 1) // stride + 1


@contextmanager
def _in_inference(network: nn.Cell) -> Iterator[None]:
    """Within, the network interprets (only so cells have hooks) and is in evaluation; afterwards as it was."""
    mode, training = ms.get_context("mode"), {id(cell): cell.training for _, cell in network.cells_and_names()}
    ms.set_context(mode=ms.PYNATIVE_MODE)
    network.set_train(False)
    try:
        yield
    finally:
        ms.set_context(mode=mode)
        for _, cell in network.cells_and_names():
            cell.training = training.get(id(cell), False)


def table(rows: Sequence[Layer]) -> str:
    """The layers as a Markdown table, with a row of sums."""
    lines = ["| layer | kind | output | parameters | M MACs |\n|---|---|---|---|---|"]
    for row in rows:
        shape = "x".join(map(str, row.shape)) or "—"
        lines.append(f"| {row.name} | {row.kind} | {shape} | {row.parameters:,} | {_millions(row)} |")
    whole = Layer("", "", (), *(sum(values) for values in list(zip(*rows))[3:])) if rows else Layer("", "", (), 0, 0, 0)
    lines.append(f"| in all | {len(rows)} layers | | {whole.parameters:,} | {_millions(whole)} |")
    return "\n".join(lines)


def _millions(row: Layer) -> str:
    return f"{(row.macs + row.distances) / 1e6:,.3f}"
