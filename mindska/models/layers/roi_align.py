"""RoIAlign in a graph: features of boxes from a pyramid, and masks of objects in boxes.

Source: He et al., Mask R-CNN, 2017; aligned (half a cell is taken off) and adaptive (a bin has as many samples along an
axis as it has cells, rounded up), as MMDetection runs it. Both axes are apart, so a box is two matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

from mindspore import Tensor, ops
from mindspore import dtype as mstype

from .boxes import count
from .precision import Float32Cell

LEVELS = 4  # of the pyramid
FINEST_SCALE = 56  # pixels: boxes below twice this size are taken from the finest level
MOST_WEIGHTS = 1 << 24  # that are computed at once


def interpolation_matrices(start: Tensor, length: Tensor, out: int, cells: int) -> Tensor:
    """The weights of a map's cells along one axis in the bins of boxes: (N, out, cells).

    Args:
        start, length: of the boxes in cells, half a cell taken off, (N,). One without a length has none.
    """
    most = -(-2 * cells // out) + 1  # samples of a bin: of boxes up to twice as long as the map
    size = length / out
    samples = ops.ceil(size)
    first = start.reshape(-1, 1) + count(out).astype(mstype.float32).reshape(1, -1) * size.reshape(-1, 1)
    first, size, samples = first.expand_dims(2), size.reshape(-1, 1, 1), samples.reshape(-1, 1, 1)
    places = count(cells).astype(mstype.float32).reshape(1, 1, 1, -1)
    total = ops.zeros((start.shape[0], out, cells), mstype.float32)
    block = max(1, MOST_WEIGHTS // (start.shape[0] * out * cells))
    for begin in range(0, most, block):
        steps = (count(min(block, most - begin)) + begin).astype(mstype.float32).reshape(1, 1, -1)
        at = first + (steps + 0.5) * size / ops.maximum(samples, 1.0)  # (N, out, block)
        inside = ops.logical_and(ops.logical_and(at >= -1, at <= cells), steps < samples)
        at = ops.clamp(at, 0.0, float(cells - 1)).expand_dims(3)
        weights = ops.relu(1 - ops.abs(at - places))
        total = total + ops.sum(weights * inside.astype(mstype.float32).expand_dims(3), 2)
    return total / ops.maximum(samples, 1.0)


def box_matrices(rois: Tensor, scale: float, out: int, high: int, wide: int) -> tuple[Tensor, Tensor]:
    """Rows (N, out, high) and columns (N, out, wide) of boxes (N, 4) in pixels on a map."""
    boxes = rois[:, :4] * scale - 0.5
    rows = interpolation_matrices(boxes[:, 1], boxes[:, 3] - boxes[:, 1], out, high)
    return rows, interpolation_matrices(boxes[:, 0], boxes[:, 2] - boxes[:, 0], out, wide)


def with_levels(boxes: Tensor, valid: Tensor, levels: int = LEVELS) -> Tensor:
    """Boxes (B, R, 4) with the level of the pyramid that each takes its features from, (B, R, 5); -1 where not valid.

    It is floor(log2(sqrt(w h) / 56 + 1e-6)), within the levels.
    """
    scale = ops.sqrt((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])) / FINEST_SCALE + 1e-6
    level = ops.zeros_like(scale)
    for i in range(1, levels):
        level = level + (scale >= 2.0**i).astype(mstype.float32)
    return ops.concat((boxes, ops.select(valid, level, ops.full_like(level, -1.0)).expand_dims(2)), 2)


class RoIAlign(Float32Cell):
    """Features of boxes: (B * R, C, out, out)

    Args:
        stride: pixels of a cell of the finest level; of each further one it is twice as large.

    Inputs:
        pyramid: up to four levels (B, C, H, W); rois (B, R, 5), as of `with_levels`. Rois get no gradient.
    """

    def __init__(self, out: int, stride: int) -> None:
        super().__init__()
        self.out, self.stride = out, stride

    def on_level(self, x: Tensor, rois: Tensor, level: int) -> Tensor:
        """Of a map (C, H, W), for boxes (R, 5), 0 for those on another level: (R, C, out, out)"""
        (c, h, w), r = x.shape, rois.shape[0]
        rows, columns = box_matrices(rois, 1.0 / (self.stride << level), self.out, h, w)
        rows = rows * (rois[:, 4] == level).astype(mstype.float32).reshape(-1, 1, 1)
        x = x.astype(mstype.float32).transpose(1, 0, 2).reshape(h, c * w)
        x = ops.matmul(rows.reshape(r * self.out, h), x).reshape(r, self.out * c, w)
        x = ops.bmm(x, columns.transpose(0, 2, 1))  # (R, out * C, out)
        return x.reshape(r, self.out, c, self.out).transpose(0, 2, 1, 3)

    def construct(self, pyramid: Sequence[Tensor], rois: Tensor) -> Tensor:
        images, rois = [], ops.stop_gradient(rois)
        for i in range(rois.shape[0]):
            levels = [self.on_level(x[i], rois[i], level) for level, x in enumerate(pyramid)]
            images.append(ops.addn(levels))
        return ops.concat(images, 0)


class MaskTargets(Float32Cell):
    """The masks of objects in boxes, by RoIAlign, from 0.5 on: (B, R, out, out) float32 of 0 and 1

    Inputs:
        masks (B, M, H, W / 8) uint8, eight pixels a byte, the first in the highest bit (`numpy.packbits`); rois (B, R,
        5), x1 y1 x2 y2 in pixels and the number of the object (-1: the result is 0).
    """

    def __init__(self, out: int) -> None:
        super().__init__()
        self.out = out

    def construct(self, masks: Tensor, rois: Tensor) -> Tensor:
        images, (b, r, _) = [], rois.shape
        _, _, h, width = masks.shape
        shifts = 7 - count(8)
        for i in range(b):
            number = rois[i, :, 4]
            there = (number >= 0).astype(mstype.float32).reshape(-1, 1, 1)
            rows, columns = box_matrices(rois[i], 1.0, self.out, h, 8 * width)
            words = ops.gather(masks[i].astype(mstype.int32), ops.relu(number).astype(mstype.int32), 0)
            bits = ops.bitwise_and(ops.bitwise_right_shift(words.expand_dims(3), shifts), 1)
            x = ops.bmm(rows * there, bits.reshape(r, h, 8 * width).astype(mstype.float32))
            images.append((ops.bmm(x, columns.transpose(0, 2, 1)) >= 0.5).astype(mstype.float32))
        return ops.stack(images)
