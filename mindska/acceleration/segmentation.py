"""The accelerated form of the loss of segmenters."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor
from mindspore.ops import constexpr

from ..kernels import operators
from ..models.layers.pixel_loss import IGNORED, PixelLosses
from .form import AcceleratedForm


@constexpr
def size_tensor(height: int, width: int) -> Tensor:
    return Tensor(np.array([height, width], np.int32))


class FusedPixelLosses(AcceleratedForm, PixelLosses):
    """Without the enlarged logits in memory. Where the label is `IGNORED` the number is 0."""

    plain_class, plain = PixelLosses, PixelLosses.construct

    def prepare(self) -> None:
        self.operator = operators.PixelCrossEntropy(self.align_corners, IGNORED)

    def in_inference(self, logits: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
        return self.operator(logits, labels, size_tensor(size[0], size[1]))

    in_training = in_inference
