"""Mask R-CNN: He et al., 2017, on an FPN, as MMDetection builds it.

LSKA's authors publish it on their backbones. A test holds it to MMDetection's figures.

Training is one graph of fixed shapes: proposals, what they are matched with, a sample of them, and the heads on so many
boxes, some of which fill up and count nothing. What is drawn, is drawn by the noise that the batch brings. Detection is
three graphs (maps; boxes; masks) with NumPy between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import HeNormal, Normal, XavierUniform, initializer
from mindspore.ops import constexpr

from ..errors import SettingError
from ..models.layers.backbone import Backbone
from ..models.layers.blocks import conv
from ..models.layers.boxes import (
    IGNORED,
    KEY_NOISE,
    MaxIouAssigner,
    Suppression,
    at,
    candidate_keys,
    clip_to_images,
    count,
    decode_deltas,
    encode_deltas,
    have_area,
    sampled,
)
from ..models.layers.fpn import FPN
from ..models.layers.roi_align import LEVELS, MaskTargets, RoIAlign, with_levels
from .anchors import RPN_ANCHORS, AnchorGenerator
from .coder import BOX_HEAD_CODER, MAX_LOG_RATIO
from .detector import Detector, Maps, arrays, by_anchor, map_sizes
from .masks import MASK_SIZE
from .postprocess import Detections, box_head_detections, paste_masks, proposals, sigmoid
from .retinanet import AnchorTargets, anchors_of, cells_of

CHANNELS = 256
BOX_SIZE, MASK_ROI_SIZE = 7, 14  # of the features of a box
RPN_SAMPLES, RPN_POSITIVE = 256, 0.5  # of an image, and the largest part of them that is positive
BOX_SAMPLES, BOX_POSITIVE = 512, 0.25
MASK_SLOTS = (16, 48, int(BOX_SAMPLES * BOX_POSITIVE))  # boxes of an image that the mask head may be trained on
NMS_PROPOSALS = 0.7
LEAST_SCORE = -3e38  # below those of all proposals


class RPNHead(nn.Cell):
    """Scores (B, A, h, w) and deltas (B, A * 4, h, w): a 3x3 convolution and ReLU, and a 1x1 one for each."""

    def __init__(self, channels: int, num_anchors: int) -> None:
        super().__init__()
        self.rpn_conv = conv(channels, channels, 3)
        self.rpn_cls, self.rpn_reg = conv(channels, num_anchors), conv(channels, num_anchors * 4)
        init_normal(self, 0.01)

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = ops.relu(self.rpn_conv(x))
        return self.rpn_cls(x), self.rpn_reg(x)


class BoxHead(nn.Cell):
    """(N, C, 7, 7) -> scores (N, classes + 1), the background last, and deltas (N, classes * 4), class by class."""

    def __init__(self, channels: int, num_classes: int, hidden: int = 1024) -> None:
        super().__init__()
        sizes = (channels * BOX_SIZE**2, hidden)
        self.shared_fcs = nn.CellList([nn.Dense(size, hidden) for size in sizes])
        self.fc_cls, self.fc_reg = nn.Dense(hidden, num_classes + 1), nn.Dense(hidden, num_classes * 4)
        values = (XavierUniform(), XavierUniform(), Normal(0.01), Normal(0.001))
        for layer, value in zip((*self.shared_fcs, self.fc_cls, self.fc_reg), values):
            layer.weight.set_data(initializer(value, layer.weight.shape, layer.weight.dtype))
            layer.bias.set_data(initializer("zeros", layer.bias.shape, layer.bias.dtype))

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.reshape(x.shape[0], -1)
        for layer in self.shared_fcs:
            x = ops.relu(layer(x))
        return self.fc_cls(x), self.fc_reg(x)


class MaskHead(nn.Cell):
    """(N, C, 14, 14) -> a map of logits for each class, (N, classes, 28, 28)."""

    def __init__(self, channels: int, num_classes: int, depth: int = 4) -> None:
        super().__init__()
        self.convs = nn.CellList([conv(channels, channels, 3) for _ in range(depth)])
        self.upsample = nn.Conv2dTranspose(channels, channels, 2, 2, pad_mode="valid", has_bias=True)
        self.conv_logits = conv(channels, num_classes)
        for layer in (*self.convs, self.conv_logits):
            values = HeNormal(mode="fan_out", nonlinearity="relu")
            layer.weight.set_data(initializer(values, layer.weight.shape, layer.weight.dtype))
        # Its weight is (in, out, h, w): fan_in here is PyTorch's fan_out there.
        values = HeNormal(mode="fan_in", nonlinearity="relu")
        self.upsample.weight.set_data(initializer(values, self.upsample.weight.shape, self.upsample.weight.dtype))
        self.upsample.bias.set_data(initializer("zeros", self.upsample.bias.shape, self.upsample.bias.dtype))

    def hidden(self, x: Tensor) -> Tensor:
        """What the last convolution takes: (N, C, 28, 28)"""
        for layer in self.convs:
            x = ops.relu(layer(x))
        return ops.relu(self.upsample(x))

    def construct(self, x: Tensor) -> Tensor:
        return self.conv_logits(self.hidden(x))

    def of_classes(self, x: Tensor, classes: Tensor) -> Tensor:
        """The map of one class each, (N,) int32: (N, 28, 28). The others are not computed."""
        x, last = self.hidden(x), self.conv_logits
        n, c, h, w = x.shape
        weight = ops.gather(last.weight.reshape(-1, c), classes, 0).expand_dims(1)  # (N, 1, C)
        logits = ops.bmm(weight.astype(x.dtype), x.reshape(n, c, h * w)).reshape(n, h, w)
        return logits + ops.gather(last.bias, classes, 0).reshape(n, 1, 1)


class RoIHead(nn.Cell):
    """MMDetection's name for both heads."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.bbox_head, self.mask_head = BoxHead(channels, num_classes), MaskHead(channels, num_classes)


def init_normal(cells: nn.Cell, sigma: float) -> None:
    """Normal values for the weights of convolutions."""
    for _, cell in cells.cells_and_names():
        if isinstance(cell, nn.Conv2d):
            cell.weight.set_data(initializer(Normal(sigma), cell.weight.shape, cell.weight.dtype))


@constexpr
def level_anchors(generator: AnchorGenerator, size: tuple[int, int], level: int) -> Tensor:
    """The anchors of a level: (A, 4), a constant of the graph."""
    return Tensor(generator.level(level, size).copy())


@constexpr
def check_masks(images: tuple[int, ...], labels: tuple[int, ...], masks: tuple[int, ...], is_uint8: bool) -> None:
    """SettingError where masks are not (B, M, H, W / 8) uint8 of the images."""
    if -1 in (*images, *labels, *masks):
        return
    expected = (*labels, images[2], -(-images[3] // 8))
    if masks != expected or not is_uint8:
        raise SettingError(
            f"masks have the shape {masks}{'' if is_uint8 else ', and are not uint8'}; expected {expected} uint8, "
            f"eight pixels a byte, as mindska.detection.masks.pack makes them"
        )


def binary_cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """Of each logit, float32."""
    x = logits.astype(mstype.float32)
    return ops.relu(x) - x * wanted + ops.log1p(ops.exp(-ops.abs(x)))


class Graph(nn.Cell):
    """A method of a network as a cell of its own, which graph mode compiles."""

    def __init__(self, network: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network = network


class MapsGraph(Graph):
    def construct(self, images: Tensor) -> tuple:
        return self.network.pyramid_and_maps(images)


class BoxGraph(Graph):
    def construct(self, rois: Tensor, *pyramid: Tensor) -> tuple:  # what is in a tuple would be compiled as constants
        return self.network.box_outputs(pyramid, rois)


class MaskGraph(Graph):
    def construct(self, rois: Tensor, classes: Tensor, *pyramid: Tensor) -> Tensor:
        return self.network.mask_outputs(pyramid, rois, classes)


class MaskRCNN(Detector):
    """FPN over all stages and a level beyond, the RPN, and two heads on the features of boxes.

    The arguments, inputs and targets are those of `Detector`; `losses` takes one more target: masks (B, M, H, W / 8)
    uint8, the objects' masks in the padded images, eight pixels a byte, the first in the highest bit, as
    `mindska.detection.masks.pack` makes them. `head_maps` are the RPN's.
    """

    method = "mask_rcnn"
    has_masks = True
    classifiers = ("roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg", "roi_head.mask_head.conv_logits")
    target_columns = ("boxes", "labels", "image_shapes", "masks")
    num_key_columns = 2 * KEY_NOISE  # which anchors and which proposals are drawn
    nms_threshold = 0.5
    candidates_in_training, candidates = 2000, 1000  # of each level, before suppression
    num_proposals = 1000
    mask_batch = 100  # masks that are computed at once in detection

    def __init__(self, backbone: Backbone, num_classes: int = 80) -> None:
        super().__init__(backbone, num_classes)
        self.generator = RPN_ANCHORS.for_levels(self.reductions, 1)
        self.neck = FPN(self.feature_channels, CHANNELS, extra_levels=1, extra="pool")
        self.rpn_head = RPNHead(CHANNELS, self.generator.num_anchors)
        self.roi_head = RoIHead(CHANNELS, num_classes)
        self.rpn_targets = AnchorTargets(MaxIouAssigner(0.7, 0.3, 0.3))
        self.assigner = MaxIouAssigner(0.5, 0.5, 0.5)
        self.suppression = Suppression(NMS_PROPOSALS)
        self.num_levels = min(LEVELS, len(self.levels))  # that boxes take their features from
        self.box_roi_align = RoIAlign(BOX_SIZE, self.reductions[0])
        self.mask_roi_align = RoIAlign(MASK_ROI_SIZE, self.reductions[0])
        self.mask_targets = MaskTargets(MASK_SIZE)
        # Not cells of this one: they have it inside.
        self.__dict__["graphs"] = {"maps": MapsGraph(self), "boxes": BoxGraph(self), "masks": MaskGraph(self)}

    @staticmethod
    def classes_of_rows(rows: int) -> int:
        return rows - 1

    @staticmethod
    def class_rows(layer: str, order: Sequence[int]) -> list[int]:
        if layer.endswith("fc_reg"):
            return [4 * i + side for i in order for side in range(4)]
        return [*order, *([len(order)] if layer.endswith("fc_cls") else [])]

    def rpn_maps(self, pyramid: Maps) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Scores and deltas of each level."""
        scores, deltas = [], []
        for x in pyramid:
            score, delta = self.rpn_head(x)
            scores.append(score)
            deltas.append(delta)
        return tuple(scores), tuple(deltas)

    def maps_of(self, features: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return self.rpn_maps(self.neck(features))

    def pyramid_and_maps(self, images: Tensor) -> tuple:
        """The levels that boxes take features from, and the RPN's scores and deltas."""
        pyramid = self.neck(self.features(self.prepared(images)))
        return (tuple(pyramid[: self.num_levels]), *self.rpn_maps(pyramid))

    def box_outputs(self, pyramid: Maps, rois: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B * R, classes + 1) and deltas (B * R, classes * 4) of boxes (B, R, 5)."""
        return self.roi_head.bbox_head(self.box_roi_align(pyramid, rois))

    def mask_outputs(self, pyramid: Maps, rois: Tensor, classes: Tensor) -> Tensor:
        """Logits (B * R, 28, 28) of the masks of boxes (B, R, 5) of classes (B * R,)."""
        return self.roi_head.mask_head.of_classes(self.mask_roi_align(pyramid, rois), classes)

    # Training

    def losses(
        self,
        images: Tensor,
        boxes: Tensor,
        labels: Tensor,
        image_shapes: Tensor,
        masks: Tensor,
        noise: Optional[Tensor] = None,
    ) -> dict[str, Tensor]:
        """`loss_rpn_cls`, `loss_rpn_bbox`, `loss_cls`, `loss_bbox`, `loss_mask`: see the methods. Without noise,
        MindSpore draws."""
        x = self.prepared(images, noise)
        boxes, labels = self.checked_targets(images, boxes, labels, image_shapes)
        check_masks(images.shape, labels.shape, masks.shape, masks.dtype == mstype.uint8)
        pyramid = self.neck(self.features(x, noise))
        scores, deltas = self.rpn_maps(pyramid)
        keys = ops.rand(x.shape[0], self.num_key_columns) if noise is None else noise[:, self.num_drop_paths :]
        matched = self.matched_anchors(scores, boxes, image_shapes)
        candidates = candidate_keys(keys[:, :KEY_NOISE], matched.shape[1])
        drawn = sampled(matched, candidates, RPN_SAMPLES, RPN_POSITIVE)
        first = self.rpn_losses(scores, deltas, boxes, matched, *drawn)
        proposed, valid = self.proposals(scores, deltas, image_shapes)
        pyramid = pyramid[: self.num_levels]
        second = self.roi_losses(pyramid, proposed, valid, boxes, labels, masks, keys[:, KEY_NOISE:])
        return joined(first, second)

    def matched_anchors(self, scores: Maps, boxes: Tensor, image_shapes: Tensor) -> Tensor:
        """Which object each anchor is to find: (B, A) int32, as of `MaxIouAssigner`."""
        sizes = map_sizes(scores)
        anchors, cells = anchors_of(self.generator, sizes), cells_of(self.generator, sizes)
        return ops.stop_gradient(self.rpn_targets(anchors, cells, boxes, image_shapes))

    def rpn_losses(
        self,
        scores: Maps,
        deltas: Maps,
        boxes: Tensor,
        matched: Tensor,
        indices: Tensor,
        positive: Tensor,
        negative: Tensor,
    ) -> dict[str, Tensor]:
        """`loss_rpn_cls`: binary cross-entropy of the sampled anchors; `loss_rpn_bbox`: L1 of the positives' deltas.

        Both are divided by the number of samples in the batch. `indices`, `positive`, `negative`: as of `sampled`.
        """
        per_cell = self.generator.num_anchors
        anchors = ops.gather(anchors_of(self.generator, map_sizes(scores))[0], indices, 0)  # (B, K, 4)
        logits = at(ops.concat([by_anchor(x, per_cell) for x in scores], 1).squeeze(2), indices)
        predicted = at(ops.concat([by_anchor(x, per_cell) for x in deltas], 1), indices).astype(mstype.float32)
        wanted = encode_deltas(anchors, at(boxes, ops.relu(at(matched, indices))))
        share, counted = positive.astype(mstype.float32), ops.logical_or(positive, negative).astype(mstype.float32)
        wanted = ops.stop_gradient(kept(wanted, positive))
        divisor = ops.maximum(ops.sum(counted), 1.0)
        return {
            "loss_rpn_cls": ops.sum(binary_cross_entropy(logits, share) * counted) / divisor,
            "loss_rpn_bbox": ops.sum(ops.abs(predicted - wanted) * share.expand_dims(2)) / divisor,
        }

    def proposals(self, scores: Maps, deltas: Maps, image_shapes: Tensor) -> tuple[Tensor, Tensor]:
        """The best proposals in training: boxes (B, P, 4), the best first, and which of them are any (B, P) bool."""
        boxes, values = [], []
        for level, (score, delta) in enumerate(zip(scores, deltas)):
            anchors = level_anchors(self.generator, (score.shape[2], score.shape[3]), level)
            score = ops.stop_gradient(by_anchor(score, self.generator.num_anchors)).squeeze(2).astype(mstype.float32)
            delta = ops.stop_gradient(by_anchor(delta, self.generator.num_anchors)).astype(mstype.float32)
            best, indices = ops.topk(score, min(self.candidates_in_training, score.shape[1]))
            decoded = decode_deltas(ops.gather(anchors, indices, 0), at(delta, indices), MAX_LOG_RATIO)
            decoded = clip_to_images(decoded, image_shapes)
            stays = ops.logical_and(self.suppression(decoded), have_area(decoded))
            boxes.append(decoded)
            values.append(ops.select(stays, best, ops.full_like(best, LEAST_SCORE)))
        every = ops.concat(values, 1)
        values, indices = ops.topk(every, min(self.num_proposals, every.shape[1]))
        return at(ops.concat(boxes, 1), indices), values > LEAST_SCORE

    def roi_losses(
        self,
        pyramid: Maps,
        proposed: Tensor,
        valid: Tensor,
        boxes: Tensor,
        labels: Tensor,
        masks: Tensor,
        noise: Tensor,
    ) -> dict[str, Tensor]:
        """`loss_cls`: cross-entropy of the sampled boxes; `loss_bbox`: L1 of the positives' deltas; both divided by the
        number of samples in the batch. `loss_mask`: binary cross-entropy, the mean over the positives' pixels.

        Args:
            proposed: (B, P, 4); valid: (B, P), whether each is any; noise: (B, KEY_NOISE).
        """
        rois, positive, negative, objects = self.sampled_rois(proposed, valid, boxes, labels, noise)
        counted = ops.logical_or(positive, negative)
        scores, deltas = self.box_outputs(pyramid, with_levels(rois, counted, self.num_levels))
        classes = ops.select(positive, at(labels, objects), ops.full_like(objects, self.num_classes))
        wanted = kept(encode_deltas(rois, at(boxes, objects), BOX_HEAD_CODER.stds), positive)
        share, among = positive.astype(mstype.float32), counted.astype(mstype.float32)
        divisor = ops.maximum(ops.sum(among), 1.0)
        losses = -ops.log_softmax(scores.astype(mstype.float32), 1)
        losses = ops.gather_elements(losses, 1, classes.reshape(-1, 1)) * among.reshape(-1, 1)
        own = ops.minimum(classes, self.num_classes - 1).reshape(-1, 1, 1)
        predicted = deltas.astype(mstype.float32).reshape(-1, self.num_classes, 4)
        predicted = ops.gather_elements(predicted, 1, ops.broadcast_to(own, (own.shape[0], 1, 4))).squeeze(1)
        difference = ops.abs(predicted - ops.stop_gradient(wanted).reshape(-1, 4)) * share.reshape(-1, 1)
        return {
            "loss_cls": ops.sum(losses) / divisor,
            "loss_bbox": ops.sum(difference) / divisor,
            "loss_mask": self.mask_loss(pyramid, rois, positive, objects, labels, masks),
        }

    def sampled_rois(
        self, proposed: Tensor, valid: Tensor, boxes: Tensor, labels: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes (B, R, 4) that the heads are trained on, the positive ones first; whether each is positive, and whether
        it is negative; and its object's number. The objects themselves are among the candidates."""
        proposed = kept(proposed, valid)
        matched = self.assigner(proposed, boxes)
        matched = ops.select(valid, matched, ops.full_like(matched, IGNORED))
        own = ops.broadcast_to(count(labels.shape[1]).reshape(1, -1), labels.shape)
        own = ops.select(labels >= 0, own, ops.full_like(own, IGNORED))
        matched = ops.stop_gradient(ops.concat((own, matched), 1))
        keys = candidate_keys(noise, matched.shape[1])
        indices, positive, negative = sampled(matched, keys, BOX_SAMPLES, BOX_POSITIVE)
        rois = ops.stop_gradient(at(ops.concat((boxes, proposed), 1), indices))
        return rois, positive, negative, ops.relu(at(matched, indices))

    def mask_loss(
        self, pyramid: Maps, rois: Tensor, positive: Tensor, objects: Tensor, labels: Tensor, masks: Tensor
    ) -> Tensor:
        """The mean over the positives and the pixels of their masks; 0 where there are none.

        The mask head takes as many boxes as an image has positive ones, rounded up to one of a few numbers.
        """
        most = ops.amax(ops.sum(positive.astype(mstype.float32), 1))
        if most <= MASK_SLOTS[0]:
            return self.mask_loss_of(MASK_SLOTS[0], pyramid, rois, positive, objects, labels, masks)
        if most <= MASK_SLOTS[1]:
            return self.mask_loss_of(MASK_SLOTS[1], pyramid, rois, positive, objects, labels, masks)
        return self.mask_loss_of(MASK_SLOTS[2], pyramid, rois, positive, objects, labels, masks)

    def mask_loss_of(
        self,
        slots: int,
        pyramid: Maps,
        rois: Tensor,
        positive: Tensor,
        objects: Tensor,
        labels: Tensor,
        masks: Tensor,
    ) -> Tensor:
        """The same, of at most so many boxes of each image; the positive ones come first."""
        rois, positive, objects = rois[:, :slots], positive[:, :slots], objects[:, :slots]
        numbers = ops.select(positive, objects, ops.full_like(objects, -1)).astype(mstype.float32).expand_dims(2)
        wanted = ops.stop_gradient(self.mask_targets(masks, ops.concat((rois, numbers), 2)))
        classes = ops.relu(at(labels, objects)).reshape(-1)
        logits = self.mask_outputs(pyramid, with_levels(rois, positive, self.num_levels), classes)
        share = positive.astype(mstype.float32)
        losses = binary_cross_entropy(logits, wanted.reshape(logits.shape)) * share.reshape(-1, 1, 1)
        return ops.sum(losses) / (ops.maximum(ops.sum(share), 1.0) * MASK_SIZE**2)

    # Detection

    def _detections(
        self, images: Tensor, shapes: list[tuple[int, int]], score_threshold: float, max_detections: int
    ) -> list[Detections]:
        pyramid, scores, deltas = self.graphs["maps"](images)
        scores, deltas = arrays(scores), arrays(deltas)
        rois = [
            proposals(
                [x[i] for x in scores], [x[i] for x in deltas], shape, self.candidates, self.generator, NMS_PROPOSALS,
                self.num_proposals,
            )[0]
            for i, shape in enumerate(shapes)
        ]  # fmt: skip
        return self.detections_in(pyramid, rois, shapes, score_threshold, max_detections)

    def detections_in(
        self,
        pyramid: Maps,
        rois: Sequence[np.ndarray],
        shapes: Sequence[tuple[int, int]],
        score_threshold: float,
        max_detections: int,
    ) -> list[Detections]:
        """The detections among proposals (n, 4) of each image, of at most `num_proposals`."""
        scores, deltas = self.graphs["boxes"](self._filled_up(rois, self.num_proposals), *pyramid)
        every, found = self.num_proposals, []
        scores, deltas = scores.asnumpy(), deltas.asnumpy()
        for i, (boxes, shape) in enumerate(zip(rois, shapes)):
            some = slice(i * every, i * every + len(boxes))
            found.append(
                box_head_detections(
                    boxes, scores[some], deltas[some], shape, score_threshold, self.nms_threshold, max_detections
                )
            )
        return self._with_masks(pyramid, found, shapes)

    def _with_masks(
        self, pyramid: Maps, found: Sequence[Detections], shapes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        logits: list[list[np.ndarray]] = [[np.zeros((0, MASK_SIZE, MASK_SIZE), np.float32)] for _ in found]
        step = self.mask_batch
        for start in range(0, max(map(len, found), default=0), step):
            rois = self._filled_up([some.boxes[start : start + step] for some in found], step)
            classes = np.zeros((len(found), step), np.int32)
            for i, some in enumerate(found):
                part = some.labels[start : start + step]
                classes[i, : len(part)] = part
            maps = self.graphs["masks"](rois, Tensor(classes.reshape(-1)), *pyramid).asnumpy()
            for i, some in enumerate(found):
                logits[i].append(maps[i * step : i * step + max(0, min(step, len(some) - start))])
        with_masks = []
        for some, parts, shape in zip(found, logits, shapes):
            maps = sigmoid(np.concatenate(parts))
            masks = paste_masks(maps, some.boxes, shape)
            with_masks.append(Detections(some.boxes, some.scores, some.labels, masks, mask_maps=maps))
        return with_masks

    def _filled_up(self, boxes: Sequence[np.ndarray], number: int) -> Tensor:
        """(B, number, 5): boxes and their levels, filled up with such as are on none."""
        result = np.zeros((len(boxes), number, 4), np.float32)
        valid = np.zeros((len(boxes), number), bool)
        for i, some in enumerate(boxes):
            result[i, : len(some)], valid[i, : len(some)] = some, True
        return with_levels(Tensor(result), Tensor(valid), self.num_levels)


def joined(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """Both; graph mode unpacks no dictionaries."""
    every = {}
    for part in (first, second):
        for name, value in part.items():
            every[name] = value
    return every


def kept(x: Tensor, which: Tensor) -> Tensor:
    """(B, N, 4), zeros where not which (B, N)."""
    return ops.select(ops.broadcast_to(which.expand_dims(2), x.shape), x, ops.zeros_like(x))
