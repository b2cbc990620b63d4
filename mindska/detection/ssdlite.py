"""SSDLite: Liu et al., SSD, 2016, with separable heads (Sandler et al., MobileNetV2, 2018), as ml-cvnets builds it.

It is the protocol that SkaNet's paper follows for COCO (that of MobileViT; its authors published no code for it). How a
backbone of ours is joined to it is our reading: the last stage but one and the last one are its first two maps. A test
holds it to figures of ml-cvnets' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import HeNormal, XavierUniform, initializer
from mindspore.ops import constexpr

from ..errors import SettingError
from ..models.layers.backbone import Backbone
from ..models.layers.blocks import conv
from ..models.layers.boxes import at, box_iou, count
from ..models.layers.precision import Float32Cell
from ..models.sknet import ConvNorm
from .anchors import SSD_RATIOS, ssd_backbone_maps, ssd_priors, ssd_priors_per_cell
from .coder import SSD_CODER, to_corner_form
from .detector import Detector, by_anchor, map_sizes
from .postprocess import Detections, ssd_detections
from .published import COCO_CLASSES

BN_MOMENTUM = 0.9
EXTRA_CHANNELS = (256, 128, 128)  # of the maps beyond the backbone's, each half as large as the one before
POOLED_CHANNELS = 64  # of the last map, one cell
HEAD_CHANNELS = (256, 256, 128, 128, 64)  # that a head's input is brought to where it has others, after the first's
MINED = 3  # negatives that count for each positive


class Separable(nn.Cell):
    """Depthwise 3x3 convolution and batch norm, then a 1x1 one: with batch norm and ReLU, or a bias alone when `last`.

    (B, Cin, H, W) -> (B, Cout, H/s, W/s)
    """

    def __init__(self, cin: int, cout: int, stride: int = 1, last: bool = False) -> None:
        super().__init__()
        self.depthwise = ConvNorm(cin, cin, BN_MOMENTUM, relu=False, kernel=3, stride=stride, group=cin)
        self.pointwise = conv(cin, cout) if last else ConvNorm(cin, cout, BN_MOMENTUM)

    def construct(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class PooledConv(nn.Cell):
    """A 1x1 convolution without bias, and ReLU, of the mean over the map: (B, Cin, H, W) -> (B, Cout, 1, 1)"""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.conv = conv(cin, cout, has_bias=False)

    def construct(self, x: Tensor) -> Tensor:
        return ops.relu(self.conv(ops.mean(x, (2, 3), keep_dims=True)))


class SSDHead(nn.Cell):
    """(B, Cin, h, w) -> (B, A * (4 + 1 + classes), h, w): of each prior deltas, the background's score, the others'.

    A projection to `channels` where there are others; then a separable convolution, or a 1x1 one when `pooled`.
    """

    def __init__(self, cin: int, channels: int, cout: int, pooled: bool) -> None:
        super().__init__()
        self.proj = ConvNorm(cin, channels, BN_MOMENTUM) if cin != channels else nn.Identity()
        self.predictor = conv(channels, cout) if pooled else Separable(channels, cout, last=True)

    def construct(self, x: Tensor) -> Tensor:
        return self.predictor(self.proj(x))


@constexpr
def priors_of(sizes: tuple[tuple[int, int], ...]) -> Tensor:
    """SSD's priors cx cy w h in shares of the image: (1, A, 4), a constant of the graph."""
    return Tensor(ssd_priors(sizes)[None].copy())


@constexpr
def corners_of(sizes: tuple[tuple[int, int], ...]) -> Tensor:
    """The same as x1 y1 x2 y2."""
    return Tensor(to_corner_form(ssd_priors(sizes))[None])


@constexpr
def check_values(images: int, size: tuple[int, int], norms_in_training: bool) -> None:
    """SettingError where a batch norm in training would have one value a channel, whose variance is none."""
    if norms_in_training and images * size[0] * size[1] == 1:
        raise SettingError(
            "training with one image a batch: a batch norm would have one value a channel (the smallest map has one "
            "cell), and no variance; expected at least two images a batch (of each process), or larger ones"
        )


class SSDMatcher(Float32Cell):
    """Which object each prior is to find: (B, A) int32, -1 for the background.

    A prior belongs to the object with which its IoU is highest, from 0.5 on; and each object gets the prior that it
    overlaps best, the later one of two with the same.

    Inputs:
        corners (1, A, 4) of the priors; boxes (B, M, 4), zeros where there is no object; real (B, M) bool.
    """

    def __init__(self, iou_threshold: float = 0.5) -> None:
        super().__init__()
        self.iou_threshold = iou_threshold

    def construct(self, corners: Tensor, boxes: Tensor, real: Tensor) -> Tensor:
        overlaps = box_iou(boxes, corners, 0.0, 1e-5)  # (B, M, A)
        matched = ops.argmax(overlaps, 1).astype(mstype.int32)
        matched = ops.select(ops.amax(overlaps, 1) >= self.iou_threshold, matched, ops.full_like(matched, -1))
        own = ops.argmax(overlaps, 2).astype(mstype.int32).expand_dims(2)  # (B, M, 1)
        takes = ops.logical_and(own == count(overlaps.shape[2]).reshape(1, 1, -1), real.expand_dims(2))
        numbers = ops.broadcast_to(count(overlaps.shape[1]).reshape(1, -1, 1), takes.shape).astype(mstype.float32)
        taken = ops.amax(ops.select(takes, numbers, ops.full_like(numbers, -1.0)), 1).astype(mstype.int32)
        return ops.select(taken >= 0, taken, matched)


class MultiBoxLoss(Float32Cell):
    """SSD's losses: of scores and of deltas.

    Cross-entropy over the positives and, in each image, over three times as many priors of those whose background's
    probability is the least; smooth L1 over the positives. Both are divided by the number of positives in the batch.

    Inputs:
        scores (B, A, 1 + classes), deltas (B, A, 4); labels (B, A) int32, 0 for the background; wanted (B, A, 4).
    """

    def construct(self, scores: Tensor, deltas: Tensor, labels: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        positive = labels > 0
        losses = -ops.log_softmax(scores.astype(mstype.float32), 2)
        background = ops.stop_gradient(losses[:, :, 0])
        hardness = ops.select(positive, ops.full_like(background, -1.0), background)
        _, order = ops.sort(hardness, 1, True)  # of equal ones the first comes first
        _, ranks = ops.sort(order.astype(mstype.float32), 1)
        share = positive.astype(mstype.float32)
        mined = ranks.astype(mstype.float32) < MINED * ops.sum(share, 1, True)
        counted = ops.logical_or(positive, mined).astype(mstype.float32)
        chosen = ops.gather_elements(losses, 2, labels.expand_dims(2)).squeeze(2)
        difference = ops.abs(deltas.astype(mstype.float32) - wanted)
        smooth = ops.select(difference < 1, 0.5 * difference * difference, difference - 0.5)
        divisor = ops.maximum(ops.sum(share), 1.0)
        return ops.sum(chosen * counted) / divisor, ops.sum(smooth * share.expand_dims(2)) / divisor


class SSDLite(Detector):
    """Six maps, the backbone's last two (see `ssd_backbone_maps`) and further ones, and a head for each.

    The arguments, inputs, outputs and targets are those of `Detector`; the scores' maps have the background's first.
    Priors are shares of the padded image, and decoded boxes are not clipped to it, as in the original.
    """

    method = "ssdlite"
    fixed_size = True
    classifiers = ("ssd_heads.5.predictor", *(f"ssd_heads.{i}.predictor.pointwise" for i in range(5)))
    score_threshold, max_detections = 0.01, 200
    max_candidates = 400  # of each class, in `detect`
    nms_threshold = 0.5

    def __init__(self, backbone: Backbone, num_classes: int = COCO_CLASSES) -> None:
        super().__init__(backbone, num_classes)
        self.num_backbone_maps, first = ssd_backbone_maps(backbone.model_name)
        further = 5 - self.num_backbone_maps
        channels = [*self.feature_channels[-self.num_backbone_maps :], *EXTRA_CHANNELS[:further], POOLED_CHANNELS]
        extra: list[nn.Cell] = [
            Separable(channels[i], channels[i + 1], stride=2) for i in range(self.num_backbone_maps - 1, 4)
        ]
        self.extra_layers = nn.CellList([*extra, PooledConv(channels[4], channels[5])])
        self.num_priors = ssd_priors_per_cell(SSD_RATIOS)
        last = len(channels) - 1
        self.ssd_heads = nn.CellList(
            [
                SSDHead(cin, width, priors * (5 + num_classes), i == last)
                for i, (cin, width, priors) in enumerate(zip(channels, (first, *HEAD_CHANNELS), self.num_priors))
            ]
        )
        self.matcher, self.criterion = SSDMatcher(), MultiBoxLoss()
        for cells, values in (
            (self.extra_layers, HeNormal(mode="fan_out", nonlinearity="relu")),
            (self.ssd_heads, XavierUniform()),
        ):
            for _, cell in cells.cells_and_names():
                if isinstance(cell, nn.Conv2d):
                    cell.weight.set_data(initializer(values, cell.weight.shape, cell.weight.dtype))

    @staticmethod
    def classes_of_rows(rows: int) -> int:
        return rows // ssd_priors_per_cell(SSD_RATIOS)[-1] - 5

    @staticmethod
    def class_rows(layer: str, order: Sequence[int]) -> list[int]:
        rows = [*range(5), *(5 + i for i in order)]  # of a prior
        priors = ssd_priors_per_cell(SSD_RATIOS)[int(layer.split(".")[1])]
        return [prior * len(rows) + i for prior in range(priors) for i in rows]

    def raw_maps(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        """(B, priors * (4 + 1 + classes), h, w) of each level."""
        maps = features[-self.num_backbone_maps :]
        for i, layer in enumerate(self.extra_layers):
            if i == len(self.extra_layers) - 1:
                in_training = self.training and self.extra_layers[0].depthwise.norm.training
                check_values(maps[-1].shape[0], (maps[-1].shape[2], maps[-1].shape[3]), in_training)
            maps.append(layer(maps[-1]))
        return tuple([head(x) for head, x in zip(self.ssd_heads, maps)])

    def maps_of(self, features: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        scores, deltas = [], []
        for x, priors in zip(self.raw_maps(features), self.num_priors):
            b, channels, h, w = x.shape
            x = x.reshape(b, priors, channels // priors, h, w)
            deltas.append(x[:, :, :4].reshape(b, priors * 4, h, w))
            scores.append(x[:, :, 4:].reshape(b, channels - priors * 4, h, w))
        return tuple(scores), tuple(deltas)

    def losses(
        self,
        images: Tensor,
        boxes: Tensor,
        labels: Tensor,
        image_shapes: Tensor,
        noise: Optional[Tensor] = None,
    ) -> dict[str, Tensor]:
        """`loss_cls`: cross-entropy with hard negatives; `loss_bbox`: smooth L1. See `Detector`, `MultiBoxLoss`.

        Raises:
            SettingError: the inputs have other shapes; in training, a batch norm would see one value only.
        """
        x = self.prepared(images, noise)
        boxes, labels = self.checked_targets(images, boxes, labels, image_shapes)
        maps = self.raw_maps(self.features(x, noise))
        predicted = ops.concat([by_anchor(maps[i], priors) for i, priors in enumerate(self.num_priors)], 1)
        size = (float(x.shape[2]), float(x.shape[3]))
        return self.flat_losses(predicted, map_sizes(maps), boxes, labels, size)

    def targets(
        self, sizes: tuple[tuple[int, int], ...], boxes: Tensor, labels: Tensor, size: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        """Labels (B, A) int32, 0 for the background, and deltas (B, A, 4), 0 there, for objects in pixels."""
        priors, shares = priors_of(sizes), Tensor([size[1], size[0], size[1], size[0]], mstype.float32)
        boxes = boxes / shares
        matched = self.matcher(corners_of(sizes), boxes, labels >= 0)
        found = matched >= 0
        objects = ops.select(found, matched, ops.zeros_like(matched))
        classes = ops.select(found, at(labels, objects) + 1, ops.zeros_like(matched))
        boxes = at(boxes, objects)
        centres, sides = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
        shift = (centres - priors[..., :2]) / priors[..., 2:] / SSD_CODER.centre_variance
        deltas = ops.concat((shift, ops.log(sides / priors[..., 2:]) / SSD_CODER.size_variance), -1)
        found = ops.broadcast_to(found.expand_dims(2), deltas.shape)
        return classes, ops.select(found, deltas, ops.zeros_like(deltas))

    def flat_losses(
        self,
        predicted: Tensor,
        sizes: tuple[tuple[int, int], ...],
        boxes: Tensor,
        labels: Tensor,
        size: tuple[float, float],
    ) -> dict[str, Tensor]:
        """The losses of what priors predict, (B, A, 4 + 1 + classes)."""
        classes, wanted = self.targets(sizes, boxes, labels, size)
        cls, bbox = self.criterion(
            predicted[..., 4:], predicted[..., :4], ops.stop_gradient(classes), ops.stop_gradient(wanted)
        )
        return {"loss_cls": cls, "loss_bbox": bbox}

    def flat_maps(self, images: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores (B, A, 1 + classes), deltas (B, A, 4) and priors (A, 4), in NumPy."""
        scores, deltas = self(images)

        def flat(maps: Any) -> np.ndarray:
            parts = []
            for x, priors in zip(maps, self.num_priors):
                array = x.asnumpy()
                b, channels, h, w = array.shape
                array = array.reshape(b, priors, channels // priors, h * w).transpose(0, 3, 1, 2)
                parts.append(array.reshape(b, h * w * priors, channels // priors))
            return np.concatenate(parts, 1)

        return flat(scores), flat(deltas), ssd_priors(map_sizes(scores))

    def _detections(
        self, images: Tensor, shapes: list[tuple[int, int]], score_threshold: float, max_detections: int
    ) -> list[Detections]:
        scores, deltas, priors = self.flat_maps(images)
        height, width = self.padded_size(images.shape[2], images.shape[3])
        pixels, found = np.asarray([width, height, width, height], np.float32), []
        for i in range(len(shapes)):
            some = ssd_detections(
                scores[i], deltas[i], priors, None, score_threshold, self.max_candidates, self.nms_threshold,
                max_detections,
            )  # fmt: skip
            found.append(Detections(some.boxes * pixels, some.scores, some.labels))
        return found
