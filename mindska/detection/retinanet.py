"""RetinaNet: Lin et al., Focal Loss for Dense Object Detection, 2017, as MMDetection builds it.

LSKA's authors publish it on their backbones. A test holds it to MMDetection's figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Optional

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import Normal, initializer
from mindspore.ops import constexpr

from ..models.layers.backbone import Backbone
from ..models.layers.blocks import conv
from ..models.layers.boxes import IGNORED, MaxIouAssigner, at, encode_deltas
from ..models.layers.fpn import FPN
from ..models.layers.precision import Float32Cell
from .anchors import RETINANET_ANCHORS, AnchorGenerator
from .detector import SIZE_DIVISOR, Detector, Maps, arrays, by_anchor, map_sizes
from .postprocess import Detections, retinanet_detections

ALPHA = 0.25  # of the focal loss: the positives' share
PRIOR_PROBABILITY = 0.01  # of a class at the start


class RetinaHead(nn.Cell):
    """Two towers of 3x3 convolutions, shared by the levels: scores (B, A * classes, h, w) and deltas (B, A * 4, h, w).

    Convolutions have a bias and no norm; a ReLU follows all but the last.
    """

    def __init__(self, channels: int, num_anchors: int, num_classes: int, depth: int = 4) -> None:
        super().__init__()
        self.cls_convs = nn.CellList([conv(channels, channels, 3) for _ in range(depth)])
        self.reg_convs = nn.CellList([conv(channels, channels, 3) for _ in range(depth)])
        self.retina_cls = conv(channels, num_anchors * num_classes, 3)
        self.retina_reg = conv(channels, num_anchors * 4, 3)
        for _, cell in self.cells_and_names():
            if isinstance(cell, nn.Conv2d):
                cell.weight.set_data(initializer(Normal(0.01), cell.weight.shape, cell.weight.dtype))
        bias = -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY)
        self.retina_cls.bias.set_data(initializer(bias, self.retina_cls.bias.shape, self.retina_cls.bias.dtype))

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = deltas = x
        for layer in self.cls_convs:
            scores = ops.relu(layer(scores))
        for layer in self.reg_convs:
            deltas = ops.relu(layer(deltas))
        return self.retina_cls(scores), self.retina_reg(deltas)


@constexpr
def anchors_of(generator: AnchorGenerator, sizes: tuple[tuple[int, int], ...]) -> Tensor:
    """The anchors of all levels: (1, A, 4), a constant of the graph."""
    return Tensor(generator(sizes)[None].copy())


@constexpr
def cells_of(generator: AnchorGenerator, sizes: tuple[tuple[int, int], ...]) -> Tensor:
    """The upper left corner of each anchor's cell: (1, A, 2) int32, y and x in pixels."""
    corners = [
        np.stack(np.meshgrid(np.arange(h) * stride, np.arange(w) * stride, indexing="ij"), 2).reshape(-1, 2)
        for (h, w), stride in zip(sizes, generator.strides)
    ]
    return Tensor(np.repeat(np.concatenate(corners), generator.num_anchors, 0)[None].astype(np.int32))


def valid_anchors(cells: Tensor, image_shapes: Tensor) -> Tensor:
    """Which anchors lie on cells that each image has by itself, padded to a multiple of 32: (B, A) bool.

    cells: (1, A, 2); image_shapes: (B, 2), both int32.
    """
    sizes = (image_shapes.astype(mstype.int32) + (SIZE_DIVISOR - 1)) // SIZE_DIVISOR * SIZE_DIVISOR
    sizes = sizes.expand_dims(1)  # (B, 1, 2)
    return ops.logical_and(cells[..., 0] < sizes[..., 0], cells[..., 1] < sizes[..., 1])


class AnchorTargets(Float32Cell):
    """What anchors are to predict.

    Args:
        assigner: see `MaxIouAssigner`.

    Inputs:
        anchors (1, A, 4), cells (1, A, 2), boxes (B, M, 4), image_shapes (B, 2).

    Returns:
        Which object each anchor is to find, (B, A) int32, or BACKGROUND, or IGNORED.
    """

    def __init__(self, assigner: MaxIouAssigner) -> None:
        super().__init__()
        self.assigner = assigner

    def construct(self, anchors: Tensor, cells: Tensor, boxes: Tensor, image_shapes: Tensor) -> Tensor:
        valid = valid_anchors(cells, image_shapes)
        b, a = valid.shape
        anchors = ops.broadcast_to(anchors, (b, a, 4))
        anchors = ops.select(ops.broadcast_to(valid.expand_dims(2), (b, a, 4)), anchors, ops.zeros_like(anchors))
        matched = self.assigner(anchors, boxes)  # zeros match nothing
        return ops.select(valid, matched, ops.full_like(matched, IGNORED))


class FocalLoss(Float32Cell):
    """The sum of the focal losses (alpha 0.25, gamma 2) of logits (B, A, classes), and it is float32.

    Inputs:
        logits; labels (B, A) int32: a class from 0, or BACKGROUND (all classes are negative), or IGNORED (none counts).
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def construct(self, logits: Tensor, labels: Tensor) -> Tensor:
        x = logits.astype(mstype.float32)
        # Of all as if they were negative; what positives have in its place follows.
        wrong = ops.sigmoid(x)
        softplus = ops.relu(x) + ops.log1p(ops.exp(-ops.abs(x)))  # -log(1 - p)
        counted = (labels != IGNORED).astype(mstype.float32)
        total = ops.sum(ops.sum(wrong * wrong * softplus, 2) * counted) * (1 - ALPHA)
        positive = labels >= 0
        classes = ops.select(positive, labels, ops.zeros_like(labels)).expand_dims(2)
        x = ops.gather_elements(x, 2, classes).squeeze(2)  # (B, A)
        wrong, right = ops.sigmoid(x), ops.sigmoid(-x)
        rest = ops.log1p(ops.exp(-ops.abs(x)))
        other = ALPHA * right * right * (ops.relu(-x) + rest) - (1 - ALPHA) * wrong * wrong * (ops.relu(x) + rest)
        return total + ops.sum(other * positive.astype(mstype.float32))


class RetinaNet(Detector):
    """FPN over the last three stages and two levels beyond, of 256 channels, and the shared head.

    The arguments, inputs, outputs and targets are those of `Detector`.
    """

    method = "retinanet"
    classifiers = ("bbox_head.retina_cls",)
    max_candidates = 1000  # of each level, in `detect`
    nms_threshold = 0.5

    def __init__(self, backbone: Backbone, num_classes: int = 80) -> None:
        super().__init__(backbone, num_classes)
        self.generator = RETINANET_ANCHORS.for_levels(self.reductions[1:], 2)
        self.neck = FPN(self.feature_channels, 256, start_level=1, extra_levels=2, extra="on_input")
        self.bbox_head = RetinaHead(256, self.generator.num_anchors, num_classes)
        self.targets = AnchorTargets(MaxIouAssigner(0.5, 0.4, 0.0))
        self.focal_loss = FocalLoss(num_classes)

    @staticmethod
    def classes_of_rows(rows: int) -> int:
        return rows // RETINANET_ANCHORS.num_anchors

    @staticmethod
    def class_rows(layer: str, order: Sequence[int]) -> list[int]:
        return [anchor * len(order) + i for anchor in range(RETINANET_ANCHORS.num_anchors) for i in order]

    def maps_of(self, features: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        scores, deltas = [], []
        for x in self.neck(features):
            score, delta = self.bbox_head(x)
            scores.append(score)
            deltas.append(delta)
        return tuple(scores), tuple(deltas)

    def losses(
        self,
        images: Tensor,
        boxes: Tensor,
        labels: Tensor,
        image_shapes: Tensor,
        noise: Optional[Tensor] = None,
    ) -> dict[str, Tensor]:
        """`loss_cls`: focal; `loss_bbox`: L1 of the positives' deltas. Both are divided by the sum over the images of
        max(1, positives). See `Detector`."""
        x = self.prepared(images, noise)
        boxes, labels = self.checked_targets(images, boxes, labels, image_shapes)
        return self.map_losses(*self.maps_of(self.features(x, noise)), boxes, labels, image_shapes)

    def map_losses(
        self, scores: Maps, deltas: Maps, boxes: Tensor, labels: Tensor, image_shapes: Tensor
    ) -> dict[str, Tensor]:
        """The losses of maps."""
        sizes, generator = map_sizes(scores), self.generator
        anchors = anchors_of(generator, sizes)
        matched = self.targets(anchors, cells_of(generator, sizes), boxes, image_shapes)
        matched = ops.stop_gradient(matched)
        found = matched >= 0
        objects = ops.select(found, matched, ops.zeros_like(matched))
        classes = ops.select(found, at(labels, objects), matched)
        positive = found.astype(mstype.float32)
        divisor = self.over_processes(ops.sum(ops.maximum(ops.sum(positive, 1), 1.0)))

        logits = ops.concat([by_anchor(x, generator.num_anchors) for x in scores], 1)
        predicted = ops.concat([by_anchor(x, generator.num_anchors) for x in deltas], 1).astype(mstype.float32)
        wanted = encode_deltas(anchors, at(boxes, objects))
        wanted = ops.select(ops.broadcast_to(found.expand_dims(2), wanted.shape), wanted, ops.zeros_like(wanted))
        difference = ops.abs(predicted - ops.stop_gradient(wanted)) * positive.expand_dims(2)
        return {"loss_cls": self.focal_loss(logits, classes) / divisor, "loss_bbox": ops.sum(difference) / divisor}

    def _detections(
        self, images: Tensor, shapes: list[tuple[int, int]], score_threshold: float, max_detections: int
    ) -> list[Detections]:
        scores, deltas = map(arrays, self(images))
        return [
            retinanet_detections(
                [x[i] for x in scores], [x[i] for x in deltas], shape, self.generator, score_threshold,
                self.max_candidates, self.nms_threshold, max_detections,
            )
            for i, shape in enumerate(shapes)
        ]  # fmt: skip
