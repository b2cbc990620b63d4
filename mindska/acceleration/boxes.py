"""Accelerated forms of what detectors do with boxes: matching, suppression, RoIAlign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mindspore import Tensor
from mindspore import dtype as mstype

from ..kernels import operators
from ..models.layers.boxes import MaxIouAssigner, Suppression
from ..models.layers.roi_align import LEVELS, MaskTargets, RoIAlign
from .form import AcceleratedForm


class Float32Form(AcceleratedForm):
    """A form of a cell that stays in float32, whatever the network around it is given."""

    def uses_plain(self, x: Any) -> bool:
        return False


class FusedMaxIouAssigner(Float32Form, MaxIouAssigner):
    """In one operator, which keeps no matrix of IoUs."""

    plain_class, plain = MaxIouAssigner, MaxIouAssigner.construct

    def prepare(self) -> None:
        least = self.min_positive_iou if self.match_low_quality else 2.0
        self.operator = operators.AssignMaxIou(self.positive_iou, self.negative_iou, least)

    def in_inference(self, priors: Tensor, boxes: Tensor) -> Tensor:
        return self.operator(priors.astype(mstype.float32), boxes.astype(mstype.float32))

    in_training = in_inference


class FusedSuppression(Float32Form, Suppression):
    """In one operator."""

    plain_class, plain = Suppression, Suppression.construct

    def prepare(self) -> None:
        self.operator = operators.Suppress(self.iou_threshold)

    def in_inference(self, boxes: Tensor) -> Tensor:
        return self.operator(boxes.astype(mstype.float32)) > 0

    in_training = in_inference


class FusedRoIAlign(Float32Form, RoIAlign):
    """In one operator for all levels, with its gradient in another."""

    plain_class, plain = RoIAlign, RoIAlign.construct

    def prepare(self) -> None:
        self.operator = operators.RoiAlign(self.out, self.stride)

    def uses_plain(self, x: Sequence[Tensor]) -> bool:
        return len(x) > LEVELS

    def in_inference(self, pyramid: Sequence[Tensor], rois: Tensor) -> Tensor:
        levels = [x.astype(mstype.float32) for x in pyramid]
        levels = [*levels, *[levels[-1]] * (LEVELS - len(levels))]  # no box is on what fills up
        return self.operator(levels[0], levels[1], levels[2], levels[3], rois.astype(mstype.float32))

    in_training = in_inference


class FusedMaskTargets(Float32Form, MaskTargets):
    """In one operator, which unpacks what the boxes touch."""

    plain_class, plain = MaskTargets, MaskTargets.construct

    def prepare(self) -> None:
        self.operator = operators.MaskTargets(self.out)

    def in_inference(self, masks: Tensor, rois: Tensor) -> Tensor:
        return self.operator(masks, rois.astype(mstype.float32))

    in_training = in_inference
