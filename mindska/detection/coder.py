"""From boxes to what a network predicts, and back: the coders of MMDetection (RetinaNet, Mask R-CNN) and of SSD."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

import numpy as np

MAX_LOG_RATIO = math.log(1000 / 16)  # how much larger than its anchor a box is decoded at most


@dataclass(frozen=True)
class DeltaCoder:
    """(dx, dy, dw, dh): the shift of the centre in sides of the prior, and the logarithm of the sides' ratio.

    Attributes:
        stds: what the deltas are divided by; their means are 0.
        max_log_ratio: |dw| and |dh| are clamped to this before they are decoded.
    """

    stds: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    max_log_ratio: float = MAX_LOG_RATIO

    def encode(self, priors: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """Deltas (n, 4) float32 of boxes (n, 4) from their priors (n, 4); all must have an area."""
        priors, boxes, half = priors.astype(np.float32), boxes.astype(np.float32), np.float32(0.5)
        sides, target_sides = priors[..., 2:] - priors[..., :2], boxes[..., 2:] - boxes[..., :2]
        shift = ((boxes[..., :2] + boxes[..., 2:]) * half - (priors[..., :2] + priors[..., 2:]) * half) / sides
        return np.concatenate([shift, np.log(target_sides / sides)], -1) / np.asarray(self.stds, np.float32)

    def decode(
        self, priors: np.ndarray, deltas: np.ndarray, image_size: Optional[tuple[int, int]] = None
    ) -> np.ndarray:
        """Boxes float32 of deltas (n, 4) or (n, classes, 4) from priors (n, 4).

        Args:
            image_size: (height, width) that the boxes are clipped to.
        """
        priors, half = priors.astype(np.float32, copy=False), np.float32(0.5)
        if deltas.ndim == 3:
            priors = priors[:, None]
        deltas = deltas.astype(np.float32, copy=False) * np.asarray(self.stds, np.float32)
        sides = priors[..., 2:] - priors[..., :2]
        centres = (priors[..., :2] + priors[..., 2:]) * half + sides * deltas[..., :2]
        limit = np.float32(self.max_log_ratio)
        halves = sides * np.exp(np.clip(deltas[..., 2:], -limit, limit)) * half
        boxes = np.concatenate([centres - halves, centres + halves], -1)
        return boxes if image_size is None else clip_boxes(boxes, image_size)


RETINANET_CODER = RPN_CODER = DeltaCoder()
BOX_HEAD_CODER = DeltaCoder((0.1, 0.1, 0.2, 0.2))


@dataclass(frozen=True)
class SsdCoder:
    """SSD's coder: as `DeltaCoder`, from priors cx, cy, w, h, without a clamp.

    Attributes:
        centre_variance, size_variance: what shifts and logarithms are divided by.
    """

    centre_variance: float = 0.1
    size_variance: float = 0.2

    def encode(self, priors: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """Deltas (n, 4) float32 of boxes x1 y1 x2 y2 from priors cx cy w h, both (n, 4) in shares of the image."""
        boxes = to_centre_form(boxes.astype(np.float32))
        centres = (boxes[..., :2] - priors[..., :2]) / priors[..., 2:] / np.float32(self.centre_variance)
        sizes = np.log(boxes[..., 2:] / priors[..., 2:]) / np.float32(self.size_variance)
        return np.concatenate([centres, sizes], -1)

    def decode(self, priors: np.ndarray, deltas: np.ndarray) -> np.ndarray:
        """Boxes x1 y1 x2 y2 float32 in shares of the image, neither clamped nor clipped."""
        centres = deltas[..., :2] * np.float32(self.centre_variance) * priors[..., 2:] + priors[..., :2]
        sizes = np.exp(deltas[..., 2:] * np.float32(self.size_variance)) * priors[..., 2:]
        return to_corner_form(np.concatenate([centres, sizes], -1))


SSD_CODER = SsdCoder()


def to_corner_form(boxes: np.ndarray) -> np.ndarray:
    """cx cy w h -> x1 y1 x2 y2"""
    half = boxes[..., 2:] / 2
    return np.concatenate([boxes[..., :2] - half, boxes[..., :2] + half], -1)


def to_centre_form(boxes: np.ndarray) -> np.ndarray:
    """x1 y1 x2 y2 -> cx cy w h"""
    return np.concatenate([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)


def clip_boxes(boxes: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Boxes (..., 4) with no part beyond an image of this (height, width)."""
    height, width = image_size
    return np.clip(boxes, 0, np.asarray([width, height, width, height], boxes.dtype))
