"""Non-maximum suppression: of boxes that overlap, the best stays."""

from __future__ import annotations

from typing import Optional

import numpy as np

BLOCK = 256  # boxes that are compared at once


def box_areas(boxes: np.ndarray) -> np.ndarray:
    """(..., 4) -> (...)"""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersections(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The areas that boxes (n, 4) and others (m, 4) share: (n, m)."""
    sides = np.minimum(boxes[:, None, 2], others[None, :, 2])  # one axis after the other needs half of the memory
    sides -= np.maximum(boxes[:, None, 0], others[None, :, 0])
    areas = np.maximum(sides, 0, out=sides)
    heights = np.minimum(boxes[:, None, 3], others[None, :, 3])
    heights -= np.maximum(boxes[:, None, 1], others[None, :, 1])
    areas *= np.maximum(heights, 0, out=heights)
    return areas


def nms(boxes: np.ndarray, scores: np.ndarray, iou_threshold: float, limit: Optional[int] = None) -> np.ndarray:
    """The numbers (int64) of the boxes that stay, by falling score; of equal scores the first comes first.

    A box goes when its IoU with a better one that stays is above the threshold (strictly).

    Args:
        boxes: (n, 4) float32; scores: (n,).
        limit: stop after so many.
    """
    order = np.argsort(-scores, kind="stable")
    return order[_stays(boxes[order], iou_threshold, limit)]


def nms_per_class(
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    iou_threshold: float,
    limit: Optional[int] = None,
) -> np.ndarray:
    """`nms` among the boxes of each class (or level) by themselves; all that stay, by falling score.

    Args:
        limit: of all classes together.
    """
    order = np.argsort(-scores, kind="stable")
    if limit is not None:  # the best are enough, and they are soon there
        return order[_stays(boxes[order], iou_threshold, limit, classes[order])]
    if not len(order):
        return order
    grouped = order[np.argsort(classes[order], kind="stable")]
    ends = np.flatnonzero(np.diff(classes[grouped])) + 1
    stays = np.zeros(len(boxes), bool)
    for group in np.split(grouped, ends):
        stays[group[_stays(boxes[group], iou_threshold, limit)]] = True
    return order[stays[order]]


def _stays(
    boxes: np.ndarray, iou_threshold: float, limit: Optional[int], classes: Optional[np.ndarray] = None
) -> np.ndarray:
    """`nms` of boxes that are sorted: the positions of those that stay.

    Boxes come in blocks: each block is compared with those that stay so far, and then with itself.
    """
    threshold, areas = boxes.dtype.type(iou_threshold), box_areas(boxes)

    def overlap(ones: np.ndarray, others: np.ndarray) -> np.ndarray:
        shared = intersections(boxes[ones], boxes[others])
        union = areas[ones][:, None] + areas[others][None]
        union -= shared
        with np.errstate(divide="ignore", invalid="ignore"):  # two boxes without area do not overlap
            above = np.divide(shared, union, out=shared) > threshold
        return above if classes is None else above & (classes[ones][:, None] == classes[others][None])

    stays = np.zeros(0, np.int64)
    for start in range(0, len(boxes), BLOCK):
        block = np.arange(start, min(start + BLOCK, len(boxes)))
        if len(stays):
            block = block[~overlap(stays, block).any(0)]
        within, kept = overlap(block, block), np.ones(len(block), bool)
        for i in np.flatnonzero(np.triu(within, 1).any(1)):
            if kept[i]:
                kept[i + 1 :] &= ~within[i, i + 1 :]
        stays = np.concatenate([stays, block[kept]])
        if limit is not None and len(stays) >= limit:
            break
    return stays[:limit]
