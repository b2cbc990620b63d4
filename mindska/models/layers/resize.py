"""Feature maps and logits at another size: bilinear and nearest, as PyTorch and MMSegmentation define them.

Sizes are known when a graph is compiled. A map that has the size already is returned as it is.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import constexpr


def bilinear(x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Bilinear interpolation. (B, C, h, w) -> (B, C, *size)

    Output pixel i lies at (i + 0.5) * h / H - 0.5, edges repeated; with `align_corners` at i * (h - 1) / (H - 1).
    """
    if (x.shape[2], x.shape[3]) == (size[0], size[1]):
        return x
    return ops.interpolate(x, size=(size[0], size[1]), mode="bilinear", align_corners=align_corners)


def bilinear_places(size: int, new_size: int, align_corners: bool) -> np.ndarray:
    """Where the pixels of `bilinear`'s result lie among those of its input, in float32 as PyTorch computes it:
    (new_size,)"""
    number = np.arange(new_size, dtype=np.float32)
    if align_corners:
        places = number * np.float32((size - 1) / max(new_size - 1, 1))
    else:
        places = np.maximum((number + np.float32(0.5)) * np.float32(size / new_size) - np.float32(0.5), 0)
    return np.minimum(places, np.float32(size - 1))


@constexpr
def _sources(size: int, new_size: int) -> Tensor:
    # In float32, as PyTorch computes them.
    sources = np.floor(np.arange(new_size, dtype=np.float32) * np.float32(size / new_size))
    return Tensor(np.minimum(sources, size - 1).astype(np.int32), mstype.int32)


def nearest(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The nearest pixel at the upper left: output pixel i is number floor(i * h / H). (B, C, h, w) -> (B, C, *size)"""
    b, c, h, w = x.shape
    if size[0] == 2 * h and size[1] == 2 * w:  # the usual case, whose gradient is a plain sum
        return ops.broadcast_to(x.reshape(b, c, h, 1, w, 1), (b, c, h, 2, w, 2)).reshape(b, c, 2 * h, 2 * w)
    if size[0] != h:
        x = ops.gather(x, _sources(h, size[0]), 2)
    return ops.gather(x, _sources(w, size[1]), 3) if size[1] != w else x


@constexpr
def _even(size: int) -> Tensor:
    return Tensor(np.arange(0, size, 2, dtype=np.int32))


def every_second(x: Tensor) -> Tensor:
    """Every second pixel of both axes, from the first on: (B, C, h, w) -> (B, C, ceil(h / 2), ceil(w / 2))

    Not a slice with a step: on CPU (2.8) the gradient of one fails or writes beyond its memory where a side is odd.
    """
    return ops.gather(ops.gather(x, _even(x.shape[2]), 2), _even(x.shape[3]), 3)


class Bilinear(nn.Cell):
    """`bilinear` as a cell: what exports and faster forms know by its class."""

    def __init__(self, align_corners: bool = False) -> None:
        super().__init__()
        self.align_corners = align_corners

    def construct(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return bilinear(x, size, self.align_corners)
