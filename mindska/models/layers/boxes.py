"""Boxes in a graph: what priors are matched with, samples of them, deltas, and suppression.

All shapes are fixed: what an image has fewer of is filled up. Boxes are x1, y1, x2, y2; one without an area is none.
The sizes in the docstrings: images B, priors A, objects M. mindska.detection has the same in NumPy, for an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import numpy as np
from mindspore import Tensor, ops
from mindspore import dtype as mstype
from mindspore.ops import constexpr

from .precision import Float32Cell

BACKGROUND, IGNORED = -1, -2  # instead of an object's number
KEY_COLUMNS, KEY_ROWS = 1024, 512  # uniform numbers from which the keys of up to 512 * 1024 candidates are made
KEY_NOISE = KEY_COLUMNS + KEY_ROWS


@constexpr
def count(number: int) -> Tensor:
    """0, 1, 2, ...: (number,) int32"""
    return Tensor(np.arange(number, dtype=np.int32))


def box_areas(boxes: Tensor) -> Tensor:
    """(..., 4) -> (...)"""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def have_area(boxes: Tensor) -> Tensor:
    """Whether x1 < x2 and y1 < y2: (..., 4) -> (...) bool"""
    return ops.logical_and(boxes[..., 2] > boxes[..., 0], boxes[..., 3] > boxes[..., 1])


def box_iou(boxes: Tensor, others: Tensor, least_union: float, added: float = 0.0) -> Tensor:
    """IoU of boxes (B, M, 4) and others (B, A, 4): (B, M, A).

    The union is at least `least_union`, and then enlarged by `added`.
    """
    rows, columns = boxes.expand_dims(2), others.expand_dims(1)
    wide = ops.minimum(rows[..., 2], columns[..., 2]) - ops.maximum(rows[..., 0], columns[..., 0])
    high = ops.minimum(rows[..., 3], columns[..., 3]) - ops.maximum(rows[..., 1], columns[..., 1])
    shared = ops.relu(wide) * ops.relu(high)
    union = (box_areas(rows) + box_areas(columns)) - shared
    if least_union > 0:
        union = ops.maximum(union, least_union)
    return shared / (union + added if added > 0 else union)


def at(values: Tensor, indices: Tensor) -> Tensor:
    """The values (B, N, ...) at indices (B, K) of each image: (B, K, ...)."""
    if values.ndim == 2:
        return ops.gather_elements(values, 1, indices)
    return ops.gather_elements(values, 1, ops.broadcast_to(indices.expand_dims(2), (*indices.shape, values.shape[2])))


class MaxIouAssigner(Float32Cell):
    """MMDetection's `MaxIoUAssigner`: which object each prior is to find.

    A prior belongs to the object with which its IoU is highest, if that is at least `positive_iou`; it is background if
    it is less than `negative_iou`. With `match_low_quality` each object also takes all priors that tie for its best
    IoU, if that is at least `min_positive_iou` and above 0; of two objects that take the same prior, the later gets it.

    Inputs:
        priors (B, A, 4), boxes (B, M, 4), float32; boxes of zeros stand for no objects, and match no prior.

    Returns:
        (B, A) int32: an object's number, or BACKGROUND, or IGNORED.
    """

    def __init__(
        self,
        positive_iou: float,
        negative_iou: float,
        min_positive_iou: float = 0.0,
        match_low_quality: bool = True,
    ) -> None:
        super().__init__()
        self.positive_iou, self.negative_iou = positive_iou, negative_iou
        self.min_positive_iou, self.match_low_quality = min_positive_iou, match_low_quality

    def construct(self, priors: Tensor, boxes: Tensor) -> Tensor:
        numbers = count(boxes.shape[1])
        overlaps = box_iou(boxes, priors, 1e-6)  # (B, M, A)
        best, matched = ops.amax(overlaps, 1), ops.argmax(overlaps, 1).astype(mstype.int32)
        others = ops.select(
            best < self.negative_iou, ops.full_like(matched, BACKGROUND), ops.full_like(matched, IGNORED)
        )
        matched = ops.select(best >= self.positive_iou, matched, others)
        if not self.match_low_quality:
            return matched
        best = ops.amax(overlaps, 2, True)  # (B, M, 1)
        takes = ops.logical_and(best >= self.min_positive_iou, best > 0)
        takes = ops.logical_and(overlaps == best, takes)  # (B, M, A)
        numbers = ops.broadcast_to(numbers.reshape(1, -1, 1), takes.shape)
        taken = ops.select(takes, numbers, ops.full_like(numbers, -1))
        taken = ops.amax(taken.astype(mstype.float32), 1).astype(mstype.int32)
        return ops.select(taken >= 0, taken, matched)


class Suppression(Float32Cell):
    """Non-maximum suppression of sorted boxes (B, N, 4), the best first: which of them stay, (B, N) bool.

    A box goes when its IoU with a better one that stays is above the threshold (strictly).
    """

    def __init__(self, iou_threshold: float) -> None:
        super().__init__()
        self.iou_threshold = iou_threshold
        self.nms = ops.NMSWithMask(iou_threshold)

    def construct(self, boxes: Tensor) -> Tensor:
        b, n = boxes.shape[0], boxes.shape[1]
        ranks = ops.broadcast_to(((n - count(n)).astype(mstype.float32) / n).reshape(1, n, 1), (b, n, 1))
        scored = ops.concat((boxes, ranks), 2)  # that operator sorts them by score
        return ops.stack([self.nms(scored[i])[2] for i in range(b)])


def candidate_keys(noise: Tensor, number: int) -> Tensor:
    """Uniform numbers in [0, 1) for candidates, those with the highest of which are drawn: (B, number).

    Args:
        noise: (B, KEY_NOISE) uniform in [0, 1).
    """
    rows = min(KEY_ROWS, -(-number // KEY_COLUMNS))
    keys = noise[:, KEY_COLUMNS : KEY_COLUMNS + rows].expand_dims(2) + noise[:, :KEY_COLUMNS].expand_dims(1)
    keys = ops.select(keys >= 1, keys - 1, keys).reshape(noise.shape[0], rows * KEY_COLUMNS)
    if rows * KEY_COLUMNS < number:  # equal keys: the first comes first
        keys = ops.tile(keys, (1, -(-number // (rows * KEY_COLUMNS))))
    return keys[:, :number]


def sampled(matched: Tensor, keys: Tensor, number: int, positive_fraction: float) -> tuple[Tensor, Tensor, Tensor]:
    """Positive and negative samples of an assignment, as MMDetection's `RandomSampler`.

    At most so large a part is positive; negatives fill up to the number, as far as there are any. The candidates with
    the highest keys are taken.

    Args:
        matched: (B, A) int32, as of `MaxIouAssigner`; keys: (B, A) in [0, 1).

    Returns:
        Indices (B, number or A where that is less) int32, the positives first; whether each is positive, and whether it
        is negative (bool). What is neither fills up.
    """
    candidates = matched.shape[1]
    wanted, number = min(int(number * positive_fraction), candidates), min(number, candidates)
    absent = ops.full_like(keys, -1.0)
    values, positive = ops.topk(ops.select(matched >= 0, keys, absent), wanted)
    other_values, negative = ops.topk(ops.select(matched == BACKGROUND, keys, absent), number)
    # Positives are put above all others, and what is missing below.
    values = ops.select(values >= 0, values + 2, values)
    values, order = ops.topk(ops.concat((values, other_values), 1), number)
    indices = ops.gather_elements(ops.concat((positive, negative), 1).astype(mstype.int32), 1, order)
    return indices, values >= 2, ops.logical_and(values >= 0, values < 2)


def encode_deltas(priors: Tensor, boxes: Tensor, stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """(dx, dy, dw, dh) of boxes from their priors, both (..., 4) with an area: (..., 4)"""
    sides, target_sides = priors[..., 2:] - priors[..., :2], boxes[..., 2:] - boxes[..., :2]
    shift = ((boxes[..., :2] + boxes[..., 2:]) * 0.5 - (priors[..., :2] + priors[..., 2:]) * 0.5) / sides
    deltas = ops.concat((shift, ops.log(target_sides / sides)), -1)
    return deltas if tuple(stds) == (1.0, 1.0, 1.0, 1.0) else deltas / Tensor(stds, mstype.float32)


def decode_deltas(priors: Tensor, deltas: Tensor, max_log_ratio: float, stds: Optional[Tensor] = None) -> Tensor:
    """Boxes of deltas from priors, both (..., 4)."""
    deltas = deltas if stds is None else deltas * stds
    sides = priors[..., 2:] - priors[..., :2]
    centres = (priors[..., :2] + priors[..., 2:]) * 0.5 + sides * deltas[..., :2]
    # ops.exp is off by 6e-6 on CPU; expm1 is exact to float32.
    halves = sides * (ops.expm1(ops.clamp(deltas[..., 2:], -max_log_ratio, max_log_ratio)) + 1.0) * 0.5
    return ops.concat((centres - halves, centres + halves), -1)


def clip_to_images(boxes: Tensor, image_shapes: Tensor) -> Tensor:
    """Boxes (B, N, 4) with no part beyond images of the sizes (B, 2): height, width."""
    sizes = image_shapes.astype(mstype.float32)
    limits = ops.stack((sizes[:, 1], sizes[:, 0], sizes[:, 1], sizes[:, 0]), 1).expand_dims(1)  # (B, 1, 4)
    return ops.minimum(ops.maximum(boxes, 0.0), limits)


def mark_objects(boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes (B, M, 4), zeros for what is no object, and which are objects (B, M) bool: they have a label from 0 on, and
    an area."""
    boxes = boxes.astype(mstype.float32)
    real = ops.logical_and(labels >= 0, have_area(boxes))
    return ops.select(ops.broadcast_to(real.expand_dims(2), boxes.shape), boxes, ops.zeros_like(boxes)), real
