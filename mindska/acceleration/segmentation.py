"""Accelerated forms of what segmenters are made of besides convolutions: the loss, and other sizes of maps."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor
from mindspore.ops import constexpr

from ..kernels import operators
from ..models.layers.pixel_loss import IGNORED, PixelLosses
from ..models.layers.resize import Bilinear, bilinear_places
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
        overhang = size_tensor(size[0] - labels.shape[1], size[1] - labels.shape[2])
        return self.operator(logits, labels, overhang)

    in_training = in_inference


@constexpr
def place_tensor(size: int, new_size: int, align_corners: bool) -> Tensor:
    return Tensor(bilinear_places(size, new_size, align_corners))


class FusedBilinear(AcceleratedForm, Bilinear):
    """In one operator, and its gradient in another."""

    plain_class, plain = Bilinear, Bilinear.construct

    def prepare(self) -> None:
        self.operator = operators.Resize()

    def in_inference(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if (x.shape[2], x.shape[3]) == (size[0], size[1]):
            return x
        rows = place_tensor(x.shape[2], size[0], self.align_corners)
        return self.operator(x, rows, place_tensor(x.shape[3], size[1], self.align_corners))

    in_training = in_inference
