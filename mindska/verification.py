"""Whether an exported model computes what the network does.

SkaNet is discontinuous: of two neighbours that are equally near up to rounding either may be taken, and every library
rounds in its own way. A difference that comes from there is no fault of the export, and may be as large as one. So,
where outputs differ, the neighbours that the exported model takes are read out of it: each must be as near as the
network's own, to rounding, and the network, when it is handed them, must give the exported model's outputs. What is
left is rounding and nothing else (the parity tests compare with the authors' network in the same way).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from .errors import ExportError
from .exported import Exported
from .models.layers.graph import NearestNodes

TOLERANCE = 1e-4  # of the largest output: other libraries sum in another order; and of distances, which are about 1
# The same of a model that computes in float16, whose rounding is 5e-4 in each layer: of outputs, and of distances.
HALF_TOLERANCE, HALF_DISTANCE = 3e-2, 1e-1


@dataclass(frozen=True)
class Agreement:
    """How far an exported model agrees with its network.

    Attributes:
        difference: the largest one of their outputs, over the largest magnitude; given the same neighbours.
        tolerance: the most that it may be.
        swapped, neighbours: how many were taken otherwise, of how many; 0 and 0 where that need not be known.
    """

    difference: float
    tolerance: float = TOLERANCE
    swapped: int = 0
    neighbours: int = 0

    def __str__(self) -> str:
        swaps = f", given its neighbours ({self.swapped} of {self.neighbours:,} others, as near to rounding)"
        return f"{self.difference:.1e} of the largest{swaps if self.neighbours else ''} (bound {self.tolerance:.0e})"


def compare(
    net: nn.Cell,
    images: np.ndarray,
    expected: Sequence[np.ndarray],
    model: Exported,
    runnable: Callable[[Exported], Callable[[np.ndarray], Sequence[np.ndarray]]],
    half: bool = False,
) -> Agreement:
    """Compares an exported model with its network, which is without acceleration.

    Args:
        images: (B, C, H, W); expected: the network's outputs for them.
        runnable: from a model to the function that runs it.
        half: the model computes in float16.

    Raises:
        ExportError: they differ.
    """
    tolerance, distance = (HALF_TOLERANCE, HALF_DISTANCE) if half else (TOLERANCE, TOLERANCE)
    difference = _difference(runnable(model)(images), expected)
    searches = [cell for _, cell in net.cells_and_names() if isinstance(cell, NearestNodes)]
    if difference <= tolerance or not searches or model.path.suffix != ".onnx":  # MindIR: MindSpore's own kernels
        return _checked(Agreement(difference, tolerance))
    found = runnable(with_neighbours(model))(images)
    outputs, chosen = found[: len(expected)], found[len(expected) :]
    if len(chosen) != len(searches):
        raise ExportError(f"The exported model has {len(chosen)} neighbour searches, the network {len(searches)}")
    counts: list[int] = []
    with _handed(searches, chosen, counts, distance):
        given = as_arrays(net(Tensor(images)))
    total = sum(index.size for index in chosen)
    return _checked(Agreement(_difference(outputs, given), tolerance, sum(counts), total))


def as_arrays(outputs: Any) -> list[np.ndarray]:
    """A network's output, or its outputs one after the other, in NumPy."""
    if isinstance(outputs, (tuple, list)):
        return [array for output in outputs for array in as_arrays(output)]
    return [outputs.asnumpy()]


def with_neighbours(model: Exported) -> Exported:
    """The ONNX model with more outputs: the indices (B, N, k) of each of its neighbour searches, in their order."""
    import onnx

    changed = onnx.load_from_string(model.content)
    for node in changed.graph.node:
        if node.op_type == "TopK":
            indices = onnx.helper.make_tensor_value_info(node.output[1], onnx.TensorProto.INT64, None)
            changed.graph.output.append(indices)
    return replace(model, content=changed.SerializeToString())


def _checked(agreement: Agreement) -> Agreement:
    if not agreement.difference <= agreement.tolerance:
        raise ExportError(f"The exported model's outputs differ from the network's by {agreement}; nothing was written")
    return agreement


def _difference(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """The largest difference over the largest magnitude expected."""
    if [output.shape for output in found] != [output.shape for output in expected]:
        raise ExportError(
            f"The exported model gives outputs of the shapes {[output.shape for output in found]}, the network "
            f"{[output.shape for output in expected]}; nothing was written"
        )
    scale = max(np.abs(output).max() for output in expected)
    return float(max(np.abs(a - b).max() for a, b in zip(found, expected)) / scale)


@contextmanager
def _handed(
    searches: Sequence[nn.Cell], chosen: Sequence[np.ndarray], counts: list[int], tolerance: float
) -> Iterator[None]:
    """Has the searches, in PyNative mode, take these neighbours; ExportError where they are not the nearest.

    `counts` gets how many of each search are not its own.
    """

    def hand(cell: NearestNodes, indices: np.ndarray) -> Callable[..., Tensor]:
        def construct(self: nn.Cell, queries: Tensor, keys: Tensor) -> Tensor:
            closeness = self.closeness(queries, keys)
            theirs = Tensor(indices.astype(np.int32))
            values, own = ops.topk(closeness, indices.shape[2])
            farther = float((values - ops.gather_elements(closeness, 2, theirs)).abs().max().asnumpy())
            if not farther <= tolerance:
                raise ExportError(
                    f"The exported model takes neighbours that are farther than the nearest by {farther:.1e}; nothing "
                    f"was written"
                )
            counts.append(int((own != theirs).sum().asnumpy()))
            return theirs[:, :, :: self.fitting_dilation(keys)]

        return MethodType(construct, cell)

    mode, before = ms.get_context("mode"), [cell.construct for cell in searches]
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        for cell, indices in zip(searches, chosen):
            cell.construct = hand(cell, indices)
        yield
    finally:
        for cell, construct in zip(searches, before):
            cell.construct = construct
        ms.set_context(mode=mode)
