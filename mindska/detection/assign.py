"""Which anchors are to find which objects: the assigners and samplers of MMDetection and of SSD.

An assignment is one number for each anchor: that of its object, or BACKGROUND, or IGNORED. All decisions are float32,
as the originals', so that ties are the same. Objects are compared in chunks: 2,000 of them take no more memory than a
few dozen.
"""

from __future__ import annotations

from typing import Callable, NamedTuple, Optional, Union

import numpy as np

from ..errors import DataError
from .coder import BOX_HEAD_CODER, RETINANET_CODER, RPN_CODER, SSD_CODER, DeltaCoder, to_corner_form
from .nms import box_areas, intersections

BACKGROUND, IGNORED = -1, -2  # instead of an object's number
CHUNK = 1 << 22  # pairs of an object and an anchor that are compared at once: 16 MiB an array

# From candidates (n,) and how many are wanted (fewer) to those that are taken.
Choice = Callable[[np.ndarray, int], np.ndarray]


class Targets(NamedTuple):
    """What the anchors of an image are to predict.

    Attributes:
        matched: (anchors,) int32, the object's number, or BACKGROUND, or IGNORED.
        labels: (anchors,) int32, the object's class from 0, or BACKGROUND, or IGNORED.
        deltas: (anchors, 4) float32, 0 where there is no object.
    """

    matched: np.ndarray
    labels: np.ndarray
    deltas: np.ndarray


class Samples(NamedTuple):
    """The anchors or proposals that a loss is made of: their numbers, rising (int64)."""

    positive: np.ndarray
    negative: np.ndarray


def check_boxes(boxes: np.ndarray) -> np.ndarray:
    """Objects' boxes as float32 (n, 4), n may be 0.

    Raises:
        DataError: they have another shape, or one has no area or is not finite.
    """
    boxes = np.asarray(boxes, np.float32)
    if boxes.size == 0 and boxes.ndim in (1, 2):
        return boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise DataError(f"Boxes of the shape {boxes.shape}; expected (n, 4), and (0, 4) for an image without objects")
    bad = ~(np.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1))
    if bad.any():
        number = int(bad.argmax())
        raise DataError(
            f"Box {number} of {len(boxes)} is {boxes[number].tolist()}: expected x1 < x2 and y1 < y2 in "
            f"x1, y1, x2, y2. An image without objects has boxes of the shape (0, 4), no box of zeros"
        )
    return boxes


def box_iou(boxes: np.ndarray, others: np.ndarray, least_union: float = 1e-6) -> np.ndarray:
    """IoU (n, m) float32 of boxes (n, 4) and others (m, 4), as MMDetection's: the union is at least `least_union`."""
    shared = intersections(boxes, others)
    union = box_areas(boxes)[:, None] + box_areas(others)[None]
    union -= shared
    np.maximum(union, np.float32(least_union), out=union)
    return np.divide(shared, union, out=shared)


def assign_by_max_iou(
    boxes: np.ndarray,
    priors: np.ndarray,
    positive_iou: float,
    negative_iou: float,
    min_positive_iou: float = 0.0,
    match_low_quality: bool = True,
) -> np.ndarray:
    """MMDetection's `MaxIoUAssigner`: (priors,) int32 of objects' numbers, BACKGROUND or IGNORED.

    A prior belongs to the object with which its IoU is highest if that is at least `positive_iou`; it is background if
    it is less than `negative_iou`. With `match_low_quality` each object also takes all priors that tie for its best
    IoU, if that is at least `min_positive_iou` (and above 0, unlike the original: an object that touches no prior takes
    none, not all); of two objects the later one gets a prior that both take so.

    Args:
        boxes: the objects (n, 4); priors: (m, 4).
    """
    boxes, priors = check_boxes(boxes), priors.astype(np.float32, copy=False)
    best = np.full(len(priors), -1, np.float32)
    object_of_best, taken = np.zeros(len(priors), np.int32), np.full(len(priors), -1, np.int32)
    rows = max(1, CHUNK // max(1, len(priors)))
    for start in range(0, len(boxes), rows):
        overlaps = box_iou(boxes[start : start + rows], priors)
        highest = overlaps.max(0)
        better = highest > best  # the first of equal ones stays
        object_of_best[better] = start + overlaps.argmax(0)[better]
        best[better] = highest[better]
        if match_low_quality:
            for i, (row, iou) in enumerate(zip(overlaps, overlaps.max(1)), start):
                if iou > 0 and iou >= np.float32(min_positive_iou):
                    taken[row == iou] = i
    if not len(boxes):
        return np.full(len(priors), BACKGROUND, np.int32)
    matched = np.full(len(priors), IGNORED, np.int32)
    matched[best < np.float32(negative_iou)] = BACKGROUND
    positive = best >= np.float32(positive_iou)
    matched[positive] = object_of_best[positive]
    return np.where(taken >= 0, taken, matched)


def targets_of(
    matched: np.ndarray, boxes: np.ndarray, labels: np.ndarray, priors: np.ndarray, coder: DeltaCoder
) -> Targets:
    """Labels and deltas of an assignment."""
    positive = np.flatnonzero(matched >= 0)
    classes, deltas = matched.astype(np.int32), np.zeros((len(priors), 4), np.float32)
    classes[positive] = np.asarray(labels)[matched[positive]]
    deltas[positive] = coder.encode(priors[positive], boxes[matched[positive]])
    return Targets(matched, classes, deltas)


def retinanet_targets(
    anchors: np.ndarray, boxes: np.ndarray, labels: np.ndarray, valid: Optional[np.ndarray] = None
) -> Targets:
    """RetinaNet's targets of an image: positive from IoU 0.5, background below 0.4, each object its best anchors.

    Args:
        boxes: (n, 4) in pixels of the input; labels: (n,) from 0.
        valid: (anchors,) bool, as of `AnchorGenerator.valid`; the others are ignored.
    """
    boxes = check_boxes(boxes)
    matched = _among(valid, anchors, lambda some: assign_by_max_iou(boxes, some, 0.5, 0.4, 0.0))
    return targets_of(matched, boxes, labels, anchors, RETINANET_CODER)


def rpn_targets(anchors: np.ndarray, boxes: np.ndarray, valid: Optional[np.ndarray] = None) -> Targets:
    """The RPN's targets of an image before sampling; the only class is 0. Arguments as of `retinanet_targets`."""
    boxes = check_boxes(boxes)
    matched = _among(valid, anchors, lambda some: assign_by_max_iou(boxes, some, 0.7, 0.3, 0.3))
    return targets_of(matched, boxes, np.zeros(len(boxes), np.int32), anchors, RPN_CODER)


def _among(valid: Optional[np.ndarray], anchors: np.ndarray, assign: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    if valid is None or valid.all():
        return assign(anchors)
    matched = np.full(len(anchors), IGNORED, np.int32)
    matched[valid] = assign(anchors[valid])
    return matched


def random_choice(rng: np.random.Generator) -> Choice:
    """Draws from a generator: any that are wanted, without repetition."""
    return lambda candidates, count: rng.choice(candidates, count, replace=False)


def sample(
    matched: np.ndarray, number: int, positive_fraction: float, choose: Union[np.random.Generator, Choice]
) -> Samples:
    """Positive and negative samples of an assignment, as MMDetection's `RandomSampler`.

    At most so large a part is positive; negatives fill up to the number, as far as there are any.

    Args:
        choose: a generator, or what takes some of the candidates; it is asked only where there are more of them than
            are wanted, for positives before negatives.
    """
    if isinstance(choose, np.random.Generator):
        choose = random_choice(choose)

    def some(candidates: np.ndarray, count: int) -> np.ndarray:
        return candidates if len(candidates) <= count else np.sort(choose(candidates, count))

    positive = some(np.flatnonzero(matched >= 0), int(number * positive_fraction))
    return Samples(positive, some(np.flatnonzero(matched == BACKGROUND), number - len(positive)))


def sample_rpn(matched: np.ndarray, choose: Union[np.random.Generator, Choice]) -> Samples:
    """256 anchors, at most half of them positive."""
    return sample(matched, 256, 0.5, choose)


def sampled_targets(targets: Targets, samples: Samples) -> Targets:
    """The targets with all ignored that is not sampled: of fixed shapes, for a masked sum in a compiled graph."""
    sampled = np.zeros(len(targets.matched), bool)
    for part in samples:
        sampled[part] = True
    matched = np.where(sampled, targets.matched, np.int32(IGNORED))
    return Targets(matched, np.where(sampled, targets.labels, np.int32(IGNORED)), targets.deltas * sampled[:, None])


class BoxHeadTargets(NamedTuple):
    """What the box head and the mask head are to predict in an image.

    Attributes:
        boxes: (n, 4) float32 of the sampled proposals, the positives in front.
        num_positive: how many are positive.
        matched: (num_positive,) int32, the objects' numbers.
        labels: (n,) int32 from 0; background is `num_classes`.
        deltas: (n, 4) float32, divided by the stds; 0 for negatives.
        samples: the numbers of the samples in [objects, proposals].
    """

    boxes: np.ndarray
    num_positive: int
    matched: np.ndarray
    labels: np.ndarray
    deltas: np.ndarray
    samples: Samples

    def padded(self, number: int = 512) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Arrays of fixed shapes for a compiled graph, filled up with boxes of zeros that are IGNORED.

        Returns:
            boxes (number, 4) float32, labels (number,) int32, deltas (number, 4) float32, and matched (number,) int32,
            BACKGROUND where a box has no object.

        Raises:
            ValueError: there are more samples.
        """
        count = len(self.boxes)
        if count > number:
            raise ValueError(f"{count} samples do not fit into {number}")
        boxes, deltas = np.zeros((number, 4), np.float32), np.zeros((number, 4), np.float32)
        labels, matched = np.full(number, IGNORED, np.int32), np.full(number, BACKGROUND, np.int32)
        boxes[:count], labels[:count], deltas[:count] = self.boxes, self.labels, self.deltas
        matched[: self.num_positive] = self.matched
        return boxes, labels, deltas, matched


def box_head_targets(
    proposals: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    choose: Union[np.random.Generator, Choice],
    number: int = 512,
) -> BoxHeadTargets:
    """Samples proposals for the heads of Mask R-CNN: at most a quarter positive (IoU from 0.5, and each object's best).

    The objects themselves are put in front of the proposals, each as its own match.

    Args:
        proposals: (m, 4) float32; boxes: the objects (n, 4); labels: (n,) from 0.
        choose: as of `sample`.
    """
    boxes = check_boxes(boxes)
    matched = assign_by_max_iou(boxes, proposals, 0.5, 0.5, 0.5)
    matched = np.concatenate([np.arange(len(boxes), dtype=np.int32), matched])
    candidates = np.concatenate([boxes, proposals.astype(np.float32, copy=False)])
    samples = sample(matched, number, 0.25, choose)
    rois, objects = candidates[np.concatenate(samples)], matched[samples.positive]
    count = len(samples.positive)
    classes, deltas = np.full(len(rois), num_classes, np.int32), np.zeros((len(rois), 4), np.float32)
    classes[:count] = np.asarray(labels)[objects]
    deltas[:count] = BOX_HEAD_CODER.encode(rois[:count], boxes[objects])
    return BoxHeadTargets(rois, count, objects, classes, deltas, samples)


def match_ssd(boxes: np.ndarray, priors: np.ndarray, iou_threshold: float = 0.5) -> np.ndarray:
    """SSD's matching as cvnets': (priors,) int32 of objects' numbers or BACKGROUND.

    A prior belongs to the object with which its IoU is highest, from `iou_threshold` on; and each object gets the prior
    that it overlaps best. Of two objects with the same best prior the later one gets it.

    Args:
        boxes: (n, 4) x1 y1 x2 y2; priors: (m, 4) cx cy w h; both in shares of the image.
    """
    boxes = check_boxes(boxes)
    if not len(boxes):
        return np.full(len(priors), BACKGROUND, np.int32)
    corners = to_corner_form(priors.astype(np.float32, copy=False))
    best, matched = np.full(len(priors), -1, np.float32), np.zeros(len(priors), np.int32)
    own = np.empty(len(boxes), np.int64)
    rows = max(1, CHUNK // len(priors))
    for start in range(0, len(boxes), rows):
        chunk = boxes[start : start + rows]
        overlaps = intersections(chunk, corners)
        union = box_areas(chunk)[:, None] + box_areas(corners)[None] - overlaps
        overlaps /= union + np.float32(1e-5)
        highest = overlaps.max(0)
        better = highest > best
        matched[better] = start + overlaps.argmax(0)[better]
        best[better] = highest[better]
        own[start : start + rows] = overlaps.argmax(1)
    matched[best < np.float32(iou_threshold)] = BACKGROUND
    matched[own] = np.arange(len(boxes))  # the last one of several stays
    return matched


def ssd_targets(priors: np.ndarray, boxes: np.ndarray, labels: np.ndarray) -> Targets:
    """SSD's targets of an image.

    Args:
        priors: (m, 4) cx cy w h; boxes: (n, 4) x1 y1 x2 y2, both in shares of the image; labels: (n,) from 0.
    """
    boxes = check_boxes(boxes)
    matched = match_ssd(boxes, priors)
    positive = np.flatnonzero(matched >= 0)
    classes, deltas = matched.astype(np.int32), np.zeros((len(priors), 4), np.float32)
    classes[positive] = np.asarray(labels)[matched[positive]]
    deltas[positive] = SSD_CODER.encode(priors[positive], boxes[matched[positive]])
    return Targets(matched, classes, deltas)


def hard_negatives(background_loss: np.ndarray, positive: np.ndarray, ratio: int = 3) -> np.ndarray:
    """Which priors count in SSD's loss of scores: the positives, and as many times `ratio` of the hardest others.

    Args:
        background_loss: (B, priors), -log of the background's probability; positive: (B, priors) bool.

    Returns:
        (B, priors) bool; of equal losses the first ones are taken, in an image without objects none.
    """
    loss = np.where(positive, -np.inf, background_loss)
    order = np.argsort(-loss, 1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(loss.shape[1]), loss.shape), 1)
    return positive | (ranks < ratio * positive.sum(1, keepdims=True))
