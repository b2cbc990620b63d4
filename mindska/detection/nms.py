"""Non-maximum suppression: of boxes that overlap, the best stays."""

from __future__ import annotations

from typing import Optional

import numpy as np

BLOCK = 256  # boxes that are compared with all others at once


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


def _stays(boxes: np.ndarray, iou_threshold: float, limit: Optional[int]) -> np.ndarray:
    """`nms` of boxes that are sorted: the positions of those that stay."""
    threshold, areas = boxes.dtype.type(iou_threshold), box_areas(boxes)
    alive, stays, count = np.ones(len(boxes), bool), [], 0
    for start in range(0, len(boxes), BLOCK):
        block = start + np.flatnonzero(alive[start : start + BLOCK])
        overlaps = _overlap(boxes, areas, block, block, threshold)
        kept = np.ones(len(block), bool)
        for i in range(len(block)):
            if kept[i]:
                kept[i + 1 :] &= ~overlaps[i, i + 1 :]
        block = block[kept]
        stays.append(block)
        count += len(block)
        if limit is not None and count >= limit:
            break
        later = start + BLOCK + np.flatnonzero(alive[start + BLOCK :])
        if len(later):
            alive[later[_overlap(boxes, areas, block, later, threshold).any(0)]] = False
    return np.concatenate(stays)[:limit] if stays else np.zeros(0, np.int64)


def _overlap(
    boxes: np.ndarray, areas: np.ndarray, ones: np.ndarray, others: np.ndarray, threshold: np.floating
) -> np.ndarray:
    shared = intersections(boxes[ones], boxes[others])
    union = areas[ones][:, None] + areas[others][None] - shared
    with np.errstate(divide="ignore", invalid="ignore"):  # two boxes without area do not overlap
        return shared / union > threshold


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
    if not len(order):
        return order
    grouped = order[np.argsort(classes[order], kind="stable")]
    ends = np.flatnonzero(np.diff(classes[grouped])) + 1
    stays = np.zeros(len(boxes), bool)
    for group in np.split(grouped, ends):
        stays[group[_stays(boxes[group], iou_threshold, limit)] if len(group) > 1 else group] = True
    return order[stays[order]][:limit]
