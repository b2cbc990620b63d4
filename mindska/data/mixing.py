"""Mixup (Zhang et al., 2018) and cutmix (Yun et al., 2019) of a batch with its reverse, as in MindCV's batch mode.

`mindcv.data.mixup.Mixup` draws from numpy's global generator, which training and other threads share with it; here the
generator is passed in. Label smoothing is left to the loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Mixing:
    """How batches are mixed; the names are MindCV's options.

    Attributes:
        mixup, cutmix: alpha of the Beta distribution of the share that an image keeps; 0: off.
        cutmix_prob: probability that a batch is mixed at all.
        mixup_switch_prob: probability of cutmix rather than mixup when both are on.
    """

    num_classes: int
    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_prob: float = 1.0
    mixup_switch_prob: float = 0.5

    def __call__(
        self, images: np.ndarray, labels: np.ndarray, rng: np.random.Generator, off: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mixes images (B, C, H, W), in place, and labels (B,) into (B, num_classes) float32; nothing when `off`."""
        share = self._mix(images, rng) if not off and rng.random() < self.cutmix_prob else 1.0
        mixed = np.zeros((len(labels), self.num_classes), np.float32)
        rows = np.arange(len(labels))
        mixed[rows, labels] += share
        mixed[rows, labels[::-1]] += 1 - share
        return images, mixed

    def _mix(self, images: np.ndarray, rng: np.random.Generator) -> float:
        """Mixes `images` in place; returns the share of each that remains its own."""
        cut = self.cutmix > 0 and (self.mixup == 0 or rng.random() < self.mixup_switch_prob)
        alpha = self.cutmix if cut else self.mixup
        share = rng.beta(alpha, alpha)
        if not cut:
            other = images[::-1] * np.float32(1 - share)  # a copy, before the images change
            images *= np.float32(share)
            images += other
            return share
        height, width = images.shape[2:]
        side = math.sqrt(1 - share)
        rows, columns = (self._interval(length, int(length * side), rng) for length in (height, width))
        images[:, :, rows, columns] = images[::-1, :, rows, columns].copy()
        # The border may have cut the box: count what was really replaced.
        return 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)

    @staticmethod
    def _interval(length: int, cut: int, rng: np.random.Generator) -> slice:
        """`cut` pixels about a random centre, as far as they are within 0..length."""
        centre = int(rng.integers(length))
        return slice(max(centre - cut // 2, 0), min(centre + cut // 2, length))
