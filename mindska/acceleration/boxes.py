"""Accelerated forms of what detectors are trained with: matching and suppression."""

from __future__ import annotations

from mindspore import Tensor

from ..kernels import operators
from ..models.layers.boxes import MaxIouAssigner, Suppression
from .form import AcceleratedForm


class FusedMaxIouAssigner(AcceleratedForm, MaxIouAssigner):
    """In one operator, which keeps no matrix of IoUs."""

    plain_class, plain = MaxIouAssigner, MaxIouAssigner.construct

    def prepare(self) -> None:
        least = self.min_positive_iou if self.match_low_quality else 2.0
        self.operator = operators.AssignMaxIou(self.positive_iou, self.negative_iou, least)

    def in_inference(self, priors: Tensor, boxes: Tensor) -> Tensor:
        return self.operator(priors, boxes)

    in_training = in_inference


class FusedSuppression(AcceleratedForm, Suppression):
    """In one operator."""

    plain_class, plain = Suppression, Suppression.construct

    def prepare(self) -> None:
        self.operator = operators.Suppress(self.iou_threshold)

    def in_inference(self, boxes: Tensor) -> Tensor:
        return self.operator(boxes) > 0

    in_training = in_inference
