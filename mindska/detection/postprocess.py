"""From a network's maps to detections, image by image: what the originals do after their last layer.

Maps are float32 as the network gives them. Of equal scores the first one comes first, in the originals' order of
anchors; PyTorch promises none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Optional

import numpy as np

from .anchors import RETINANET_ANCHORS, RPN_ANCHORS, AnchorGenerator
from .coder import BOX_HEAD_CODER, RETINANET_CODER, RPN_CODER, SSD_CODER, clip_boxes
from .nms import nms_per_class

Size = tuple[int, int]  # height, width

MASK_REACH = 1  # pixels around a box within which its mask is looked at


@dataclass(frozen=True)
class Detections:
    """What was found in an image, the most certain first.

    Attributes:
        boxes: (n, 4) float32 x1, y1, x2, y2 in pixels; scores: (n,) float32; labels: (n,) int32, classes from 0.
        masks: (n, H, W) bool, or None where the method has none.
        kept: (n,) int64, of which proposals (box head) the detections are.
        mask_maps: (n, m, m) float32, the probabilities that the masks were pasted from; or None.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: Optional[np.ndarray] = None
    kept: Optional[np.ndarray] = None
    mask_maps: Optional[np.ndarray] = None

    def __len__(self) -> int:
        return len(self.scores)

    def in_original_pixels(self, scale_factor: tuple[float, float], original_size: Size) -> Detections:
        """The boxes in the image before it was resized, and within it; masks are pasted anew.

        Args:
            scale_factor: (width, height) of the resized image over that of the original.
            original_size: (height, width).
        """
        factors = np.asarray([*scale_factor, *scale_factor], np.float32)
        boxes = clip_boxes(self.boxes / factors, original_size)
        masks = None if self.mask_maps is None else paste_masks(self.mask_maps, boxes, original_size)
        return replace(self, boxes=boxes, masks=masks)

    def mirrored(self, width: int) -> Detections:
        """Those of the mirrored image, in this one, which has so many columns."""
        x1, y1, x2, y2 = self.boxes.T
        boxes = np.stack([width - x2, y1, width - x1, y2], 1)
        return replace(self, boxes=boxes, masks=None if self.masks is None else self.masks[..., ::-1])


def no_detections(mask_size: Optional[Size] = None) -> Detections:
    """Those of an image in which nothing was found."""
    masks = None if mask_size is None else np.zeros((0, *mask_size), bool)
    return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32), masks)


def merged(views: Sequence[Detections], nms_threshold: float = 0.5, max_detections: int = 100) -> Detections:
    """The detections of several views of an image (mirrored, of other sizes) in the same pixels, as those of one.

    All are put together and suppressed as in one view, as MMDetection does it.
    """
    boxes, scores, labels = (
        np.concatenate([getattr(view, name) for view in views]) for name in ("boxes", "scores", "labels")
    )
    best = nms_per_class(boxes, scores, labels, nms_threshold, max_detections)
    all_masks = [view.masks for view in views if view.masks is not None]
    masks = np.concatenate(all_masks)[best] if len(all_masks) == len(views) else None
    return Detections(boxes[best], scores[best], labels[best], masks)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) in float32."""
    with np.errstate(over="ignore"):
        return np.float32(1) / (np.float32(1) + np.exp(-logits.astype(np.float32, copy=False)))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float32."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True, dtype=np.float32)


def _best_pairs(logits: np.ndarray, score_threshold: float, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The places (flat, in the order y, x, channel) and scores of the best values of a map (channels, h, w).

    A sigmoid of all of them would take longer than the rest: most are far below the threshold.
    """
    channels, cells = logits.shape[0], logits.shape[1] * logits.shape[2]
    if score_threshold > 0:
        nearly = math.log(score_threshold / (1 - score_threshold)) - 1e-3 if score_threshold < 1 else np.inf
        places = np.flatnonzero(logits.reshape(-1) > nearly)
    else:
        places = np.arange(logits.size)
    scores = sigmoid(logits.reshape(-1)[places])
    above = scores > np.float32(score_threshold) if score_threshold > 0 else np.ones(len(places), bool)
    places, scores = places[above], scores[above]
    places = places % cells * channels + places // cells
    if len(places) > most:  # all that may be among the best, so that the order below decides between equal ones
        least = np.partition(scores, len(scores) - most)[len(scores) - most]
        places, scores = places[scores >= least], scores[scores >= least]
    order = np.argsort(places)
    order = order[np.argsort(-scores[order], kind="stable")][:most]
    return places[order], scores[order]


def _size(array: np.ndarray) -> Size:
    return array.shape[-2], array.shape[-1]


def _deltas_at(deltas: np.ndarray, anchors: np.ndarray, num_anchors: int) -> np.ndarray:
    """(n, 4) of a map (num_anchors * 4, h, w) at the anchors with these numbers."""
    cells, which = np.divmod(anchors, num_anchors)
    return deltas.reshape(num_anchors, 4, -1)[which, :, cells]


def retinanet_detections(
    scores: Sequence[np.ndarray],
    deltas: Sequence[np.ndarray],
    image_size: Size,
    generator: AnchorGenerator = RETINANET_ANCHORS,
    score_threshold: float = 0.05,
    max_candidates: int = 1000,
    nms_threshold: float = 0.5,
    max_detections: int = 100,
    scale_factor: Optional[tuple[float, float]] = None,
) -> Detections:
    """The detections of RetinaNet in an image.

    Args:
        scores: of each level (anchors * classes, h, w), logits; deltas: (anchors * 4, h, w).
        image_size: (height, width) of the image before padding, in pixels of the input: boxes are clipped to it.
        max_candidates: pairs of an anchor and a class of a level that are decoded.
        scale_factor: (width, height) by which the boxes are divided before they are suppressed, as MMDetection does for
            boxes in pixels of the original image.
    """
    boxes, confidences, labels = [], [], []
    for level, (logits, regression) in enumerate(zip(scores, deltas)):
        places, found = _best_pairs(logits, score_threshold, max_candidates)
        anchors, classes = np.divmod(places, logits.shape[0] // generator.num_anchors)
        priors = generator.level(level, _size(logits))[anchors]
        differences = _deltas_at(regression, anchors, generator.num_anchors)
        boxes.append(RETINANET_CODER.decode(priors, differences, image_size))
        confidences.append(found)
        labels.append(classes)
    return _suppressed(
        np.concatenate(boxes), np.concatenate(confidences), np.concatenate(labels), nms_threshold, max_detections,
        scale_factor,
    )  # fmt: skip


def _suppressed(
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    nms_threshold: float,
    max_detections: int,
    scale_factor: Optional[tuple[float, float]] = None,
    kept: Optional[np.ndarray] = None,
) -> Detections:
    """The best of each class among boxes that have an area and numbers for scores."""
    if scale_factor is not None:
        boxes = boxes / np.asarray([*scale_factor, *scale_factor], np.float32)
    sound = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(1) & np.isfinite(scores) & np.isfinite(boxes).all(1))
    boxes, scores, labels = boxes[sound], scores[sound], labels[sound]
    best = nms_per_class(boxes, scores, labels, nms_threshold, max_detections)
    return Detections(
        boxes[best], scores[best], labels[best].astype(np.int32), kept=None if kept is None else kept[sound][best]
    )


def proposals(
    scores: Sequence[np.ndarray],
    deltas: Sequence[np.ndarray],
    image_size: Size,
    max_candidates: int,
    generator: AnchorGenerator = RPN_ANCHORS,
    nms_threshold: float = 0.7,
    max_proposals: int = 1000,
) -> tuple[np.ndarray, np.ndarray]:
    """The RPN's proposals in an image, the best first: boxes (n, 4) and scores (n,), both float32.

    Args:
        scores: of each level (anchors, h, w), logits; deltas: (anchors * 4, h, w).
        image_size: (height, width) of the image before padding.
        max_candidates: of a level; 2,000 in training, 1,000 in evaluation.
    """
    boxes, confidences, levels = [], [], []
    for level, (logits, regression) in enumerate(zip(scores, deltas)):
        anchors, found = _best_pairs(logits, 0, max_candidates)
        priors = generator.level(level, _size(logits))[anchors]
        differences = _deltas_at(regression, anchors, generator.num_anchors)
        boxes.append(RPN_CODER.decode(priors, differences, image_size))
        confidences.append(found)
        levels.append(np.full(len(found), level))
    best = _suppressed(
        np.concatenate(boxes), np.concatenate(confidences), np.concatenate(levels), nms_threshold, max_proposals
    )
    return best.boxes, best.scores


def box_head_detections(
    rois: np.ndarray,
    scores: np.ndarray,
    deltas: np.ndarray,
    image_size: Size,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    max_detections: int = 100,
    scale_factor: Optional[tuple[float, float]] = None,
) -> Detections:
    """The detections of Mask R-CNN's box head in an image; `.kept` are the proposals that they come from.

    Args:
        rois: (n, 4); scores: (n, classes + 1), logits, the background last; deltas: (n, classes * 4), class by class.
        image_size, scale_factor: as of `retinanet_detections`.
    """
    probabilities = softmax(scores)[:, :-1]
    numbers, classes = np.nonzero(probabilities > np.float32(score_threshold))
    differences = deltas.reshape(len(rois), scores.shape[1] - 1, 4)[numbers, classes]
    boxes = BOX_HEAD_CODER.decode(rois[numbers], differences, image_size)
    return _suppressed(
        boxes, probabilities[numbers, classes], classes, nms_threshold, max_detections, scale_factor, numbers
    )


def ssd_detections(
    scores: np.ndarray,
    deltas: np.ndarray,
    priors: np.ndarray,
    image_size: Optional[Size] = None,
    score_threshold: float = 0.01,
    max_candidates: int = 400,
    nms_threshold: float = 0.5,
    max_detections: int = 200,
) -> Detections:
    """The detections of SSD in an image.

    Args:
        scores: (priors, 1 + classes), logits, the background first; deltas: (priors, 4); priors: (priors, 4) cx cy w h.
        image_size: (height, width) of the image, whatever its size as input was: boxes are multiplied by it and
            clipped to it. None: boxes as the original's, in shares of the image and not clipped.
        max_candidates: of a class.
    """
    probabilities, boxes = softmax(scores)[:, 1:], SSD_CODER.decode(priors, deltas)
    numbers, labels = [], []
    for label in np.flatnonzero((probabilities > np.float32(score_threshold)).any(0)):
        column = probabilities[:, label]
        above = np.flatnonzero(column > np.float32(score_threshold))
        numbers.append(above[np.argsort(-column[above], kind="stable")[:max_candidates]])
        labels.append(np.full(len(numbers[-1]), label))
    if not numbers:
        return no_detections()
    rows, classes = np.concatenate(numbers), np.concatenate(labels)
    found = _suppressed(boxes[rows], probabilities[rows, classes], classes, nms_threshold, max_detections)
    if image_size is None:
        return found
    height, width = image_size
    return replace(found, boxes=clip_boxes(found.boxes * np.asarray([width, height] * 2, np.float32), image_size))


def paste_masks(
    masks: np.ndarray, boxes: np.ndarray, image_size: Size, threshold: float = 0.5, reach: int = MASK_REACH
) -> np.ndarray:
    """Masks (n, m, m) of probabilities, each put into its box (n, 4) of an image: (n, H, W) bool.

    A pixel's probability is the bilinear value at its centre, outside of the box that of a border of zeros. The mask of
    a box without area is empty.
    """
    height, width = image_size
    result = np.zeros((len(masks), height, width), bool)
    for mask, box, image in zip(masks, boxes.astype(np.float32), result):
        x1, y1, x2, y2 = box.tolist()
        if not (x2 > x1 and y2 > y1):
            continue
        left, upper = max(math.floor(x1) - reach, 0), max(math.floor(y1) - reach, 0)
        right, lower = min(math.ceil(x2) + reach, width), min(math.ceil(y2) + reach, height)
        if left < right and upper < lower:
            image[upper:lower, left:right] = mask_probabilities(mask, box, (upper, lower), (left, right)) >= threshold
    return result


def mask_probabilities(mask: np.ndarray, box: np.ndarray, rows: Size, columns: Size) -> np.ndarray:
    """The probabilities (float32) of a mask (m, m) in a box at the pixels of some rows and columns, `range(*rows)`."""
    top = _pasting_matrix(box[1], box[3], rows, mask.shape[0])
    return top @ mask.astype(np.float32, copy=False) @ _pasting_matrix(box[0], box[2], columns, mask.shape[1]).T


def _pasting_matrix(start: np.float32, end: np.float32, pixels: Size, cells: int) -> np.ndarray:
    """(pixels, cells) float32: the weights of a mask's cells along one axis; outside of the mask is 0."""
    one, half = np.float32(1), np.float32(0.5)
    relative = (np.arange(*pixels, dtype=np.float32) + half - start) / (end - start) * np.float32(2) - one
    places = ((relative + one) * np.float32(cells) - one) * half
    low = np.floor(places).astype(np.int64)
    share, matrix = places - low.astype(np.float32), np.zeros((len(places), cells), np.float32)
    for cell, weight in ((low, one - share), (low + 1, share)):
        inside = np.flatnonzero((cell >= 0) & (cell < cells))
        matrix[inside, cell[inside]] += weight[inside]
    return matrix


def class_masks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of a mask head's maps (n, classes, m, m) those of the detected classes, as probabilities (n, m, m) float32."""
    return sigmoid(logits[np.arange(len(labels)), labels])
