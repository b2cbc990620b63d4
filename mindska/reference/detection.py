"""Detectors in plain PyTorch on the backbones of this package, with MMDetection's and ml-cvnets' state-dict keys.

Written from their descriptions and from figures of their code; tests/parity shows that the port, which these networks
are compared with, reproduces those figures. The backbone's keys are its authors', below `backbone.`. What is NumPy in
the port's detection (targets, suppression, samples) is the same here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..detection import assign, masks, postprocess
from ..detection.anchors import RETINANET_ANCHORS, RPN_ANCHORS, ssd_backbone_maps, ssd_priors, ssd_priors_per_cell
from ..detection.roi_align import box_matrices, roi_levels
from .segmentation import Block, ConvModule

METHODS = ("retinanet", "mask_rcnn", "ssdlite")
KEY_COLUMNS, KEY_NOISE = 1024, 1536  # as in models.layers.boxes, whose import would load MindSpore
Maps = list[torch.Tensor]
Losses = dict[str, torch.Tensor]


class FPN(nn.Module):
    """`extra`: how many strided convolutions follow the backbone's levels, or -1 for a pooled level."""

    def __init__(self, cin: Sequence[int], channels: int, extra: int) -> None:
        super().__init__()
        self.extra = extra
        self.lateral_convs = nn.ModuleList([ConvModule(c, channels, norm=False) for c in cin])
        self.fpn_convs = nn.ModuleList([ConvModule(channels, channels, 3, norm=False) for _ in cin])
        for i in range(max(0, extra)):
            layer = ConvModule(channels if i else cin[-1], channels, 3, norm=False)
            layer.conv.stride = (2, 2)
            self.fpn_convs.append(layer)

    def forward(self, features: Maps) -> Maps:
        maps = [layer(x) for layer, x in zip(self.lateral_convs, features)]
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = maps[i - 1] + F.interpolate(maps[i], size=maps[i - 1].shape[2:], mode="nearest")
        levels = [layer(x) for layer, x in zip(self.fpn_convs, maps)]
        for i in range(self.extra):
            levels.append(self.fpn_convs[len(maps) + i](levels[-1] if i else features[-1]))
        return [*levels, F.max_pool2d(levels[-1], 1, stride=2)] if self.extra < 0 else levels


class RetinaHead(nn.Module):
    def __init__(self, channels: int, anchors: int, num_classes: int) -> None:
        super().__init__()
        self.cls_convs = nn.ModuleList([ConvModule(channels, channels, 3, norm=False) for _ in range(4)])
        self.reg_convs = nn.ModuleList([ConvModule(channels, channels, 3, norm=False) for _ in range(4)])
        self.retina_cls = nn.Conv2d(channels, anchors * num_classes, 3, padding=1)
        self.retina_reg = nn.Conv2d(channels, anchors * 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = deltas = x
        for layer in self.cls_convs:
            scores = F.relu(layer(scores))
        for layer in self.reg_convs:
            deltas = F.relu(layer(deltas))
        return self.retina_cls(scores), self.retina_reg(deltas)


class RPNHead(nn.Module):
    def __init__(self, channels: int, anchors: int) -> None:
        super().__init__()
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_cls, self.rpn_reg = nn.Conv2d(channels, anchors, 1), nn.Conv2d(channels, anchors * 4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = F.relu(self.rpn_conv(x))
        return self.rpn_cls(x), self.rpn_reg(x)


class BoxHead(nn.Module):
    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.shared_fcs = nn.ModuleList([nn.Linear(channels * 49, 1024), nn.Linear(1024, 1024)])
        self.fc_cls, self.fc_reg = nn.Linear(1024, num_classes + 1), nn.Linear(1024, 4 * num_classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.flatten(1)
        for layer in self.shared_fcs:
            x = F.relu(layer(x))
        return self.fc_cls(x), self.fc_reg(x)


class MaskHead(nn.Module):
    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([ConvModule(channels, channels, 3, norm=False) for _ in range(4)])
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.conv_logits = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.convs:
            x = F.relu(layer(x))
        return self.conv_logits(F.relu(self.upsample(x)))


class Separable(nn.Module):
    """ml-cvnets' separable convolution: keys `dw_conv` and `pw_conv`."""

    def __init__(self, cin: int, cout: int, stride: int = 1, norm: bool = True) -> None:
        super().__init__()
        self.dw_conv, self.pw_conv = Block(cin, cin, 3), Block(cin, cout, norm=norm)
        conv = nn.Conv2d(cin, cin, 3, stride, 1, groups=cin, bias=False)
        self.dw_conv.block["conv"] = conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        block = self.dw_conv.block
        return self.pw_conv(block["norm"](block["conv"](x)))  # no activation between


class Pooled(nn.Module):
    """Key `1`: the layer after the pooling."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        layer = Block(cin, cout, norm=False)
        layer.block["conv"] = nn.Conv2d(cin, cout, 1, bias=False)
        self.add_module("1", layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.get_submodule("1")(x.mean((2, 3), keepdim=True)))


class SSDHead(nn.Module):
    def __init__(self, cin: int, channels: int, cout: int, pooled: bool) -> None:
        super().__init__()
        if cin != channels:
            self.proj_layer = Block(cin, channels)
        self.loc_cls_layer = Block(channels, cout, norm=False) if pooled else Separable(channels, cout, norm=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.loc_cls_layer(self.proj_layer(x) if hasattr(self, "proj_layer") else x)


def by_anchor(x: torch.Tensor, anchors: int) -> torch.Tensor:
    """(B, anchors * C, h, w) -> (B, h * w * anchors, C)"""
    b, channels = x.shape[:2]
    return x.reshape(b, anchors, channels // anchors, -1).permute(0, 3, 1, 2).reshape(b, -1, channels // anchors)


def map_sizes(maps: Maps) -> list[tuple[int, int]]:
    return [(x.shape[2], x.shape[3]) for x in maps]


def padded_size(image_shape: np.ndarray) -> tuple[int, int]:
    """Of an image alone, to multiples of 32."""
    return -(-int(image_shape[0]) // 32) * 32, -(-int(image_shape[1]) // 32) * 32


def arrays(maps: Maps, i: int) -> list[np.ndarray]:
    return [x[i].detach().float().numpy() for x in maps]


def keys_of(noise: np.ndarray, number: int) -> np.ndarray:
    """As `candidate_keys` of the port, for an image: (KEY_NOISE,) -> (number,)"""
    keys = noise[KEY_COLUMNS:, None] + noise[None, :KEY_COLUMNS]
    return np.where(keys >= 1, keys - np.float32(1), keys).reshape(-1)[:number]


def roi_align(pyramid: Maps, i: int, boxes: np.ndarray, out: int) -> torch.Tensor:
    """Features (n, C, out, out) of boxes in image i: two small products a box, on the cells that it touches."""
    result = []
    for box, level in zip(boxes, roi_levels(boxes)):
        x = pyramid[level][i]
        rows, columns, (high, wide) = box_matrices(box, (out, out), tuple(x.shape[1:]), 1 / (4 << int(level)))
        result.append(torch.from_numpy(rows).to(x) @ x[:, high, wide] @ torch.from_numpy(columns.T.copy()).to(x))
    return torch.stack(result) if result else pyramid[0].new_zeros((0, pyramid[0].shape[1], out, out))


class Detector(nn.Module):
    """`method` on a reference backbone: images (B, 3, H, W) -> scores and deltas of each level, as the port's.

    `losses` takes what the port's does, in NumPy, and noise for what is drawn, without the backbone's.
    """

    def __init__(
        self, method: str, backbone: nn.Module, cin: Sequence[int], num_classes: int, backbone_maps: int, first: int
    ) -> None:
        super().__init__()
        self.method, self.stages, self.num_classes = method, len(cin), num_classes
        self.backbone = backbone
        if method == "retinanet":
            self.neck, self.bbox_head = FPN(cin[1:], 256, 2), RetinaHead(256, 9, num_classes)
        elif method == "mask_rcnn":
            self.neck, self.rpn_head = FPN(cin, 256, -1), RPNHead(256, 3)
            self.roi_head = nn.ModuleDict()
            self.roi_head["bbox_head"] = BoxHead(256, num_classes)
            self.roi_head["mask_head"] = MaskHead(256, num_classes)
        else:
            self.backbone_maps = backbone_maps
            channels = [*cin[-backbone_maps:], *(256, 128, 128)[: 5 - backbone_maps], 64]
            pairs = list(zip(channels, channels[1:]))[backbone_maps - 1 : -1]
            layers = {f"os_{64 << i}": Separable(c, width, 2) for i, (c, width) in enumerate(pairs)}
            self.extra_layers = nn.ModuleDict({**layers, "os_-1": Pooled(channels[4], channels[5])})
            rows = enumerate(zip(channels, (first, 256, 256, 128, 128, 64), ssd_priors_per_cell()))
            self.ssd_heads = nn.ModuleList(
                [SSDHead(c, width, priors * (5 + num_classes), i == 5) for i, (c, width, priors) in rows]
            )

    def features(self, x: torch.Tensor) -> Maps:
        backbone: Any = self.backbone
        taps = backbone.taps(x)
        name = "layer{}" if "layer1" in taps else "stage{}_norm"
        return [taps[name.format(i)] for i in range(1, self.stages + 1)]

    def pyramid(self, x: torch.Tensor) -> Maps:
        features = self.features(x)
        return self.neck(features[1:] if self.method == "retinanet" else features)

    def raw_maps(self, x: torch.Tensor) -> Maps:
        """SSDLite's: of each prior four deltas, then the scores."""
        maps = self.features(x)[-self.backbone_maps :]
        for layer in self.extra_layers.values():
            maps.append(layer(maps[-1]))
        return [head(x) for head, x in zip(self.ssd_heads, maps)]

    def forward(self, x: torch.Tensor) -> tuple[Maps, Maps]:
        if self.method != "ssdlite":
            head = self.bbox_head if self.method == "retinanet" else self.rpn_head
            pairs = [head(level) for level in self.pyramid(x)]
            return [score for score, _ in pairs], [delta for _, delta in pairs]
        scores: Maps = []
        deltas: Maps = []
        for y, priors in zip(self.raw_maps(x), ssd_priors_per_cell()):
            b, _, h, w = y.shape
            y = y.reshape(b, priors, -1, h, w)
            scores.append(y[:, :, 4:].reshape(b, -1, h, w))
            deltas.append(y[:, :, :4].reshape(b, -1, h, w))
        return scores, deltas

    def losses(
        self,
        x: torch.Tensor,
        boxes: np.ndarray,
        labels: np.ndarray,
        image_shapes: np.ndarray,
        bits: Optional[np.ndarray] = None,
        noise: Optional[np.ndarray] = None,
    ) -> Losses:
        objects = [(boxes[i][labels[i] >= 0], labels[i][labels[i] >= 0]) for i in range(len(labels))]
        if self.method == "retinanet":
            scores, deltas = self(x)
            return retinanet_losses(scores, deltas, objects, image_shapes)
        if self.method == "ssdlite":
            return ssdlite_losses(self.raw_maps(x), objects, x.shape[2:], self.num_classes)
        assert bits is not None and noise is not None
        return self.mask_rcnn_losses(x, objects, image_shapes, bits, noise, labels.shape[1])

    def mask_rcnn_losses(self, x, objects, image_shapes, bits, noise, rows) -> Losses:
        pyramid: Any = self.pyramid(x)
        pairs = [self.rpn_head(level) for level in pyramid]
        scores, deltas = [score for score, _ in pairs], [delta for _, delta in pairs]
        sizes, pyramid = map_sizes(scores), pyramid[:4]
        anchors = RPN_ANCHORS(sizes)
        logits = torch.cat([by_anchor(y, 3) for y in scores], 1)[..., 0]
        predicted = torch.cat([by_anchor(y, 3) for y in deltas], 1)
        sums, counts = dict.fromkeys(("rpn_cls", "rpn_bbox", "cls", "bbox", "mask"), x.new_zeros(())), [0, 0, 0]
        for i, (boxes, labels) in enumerate(objects):
            padded = padded_size(image_shapes[i])
            targets = assign.rpn_targets(anchors, boxes, RPN_ANCHORS.valid(sizes, padded))
            keys = keys_of(noise[i, :KEY_NOISE], len(anchors))

            def best(candidates: np.ndarray, count: int) -> np.ndarray:
                return candidates[np.argsort(-keys[candidates], kind="stable")[:count]]  # noqa: B023

            positive, negative = assign.sample_rpn(targets.matched, best)
            drawn = torch.from_numpy(np.concatenate([positive, negative]))
            wanted = (drawn < 0).to(x)
            wanted[: len(positive)] = 1
            bce = F.binary_cross_entropy_with_logits(logits[i, drawn], wanted, reduction="sum")
            sums["rpn_cls"] = sums["rpn_cls"] + bce
            l1 = (predicted[i, positive] - torch.from_numpy(targets.deltas[positive]).to(x)).abs().sum()
            sums["rpn_bbox"], counts[0] = sums["rpn_bbox"] + l1, counts[0] + len(drawn)

            maps = arrays(scores, i), arrays(deltas, i)
            proposed, _ = postprocess.proposals(*maps, tuple(image_shapes[i]), 2000)
            keys = keys_of(noise[i, KEY_NOISE:], rows + len(proposed))
            keys = np.concatenate([keys[: len(boxes)], keys[rows:]])  # without what fills the objects up
            heads = assign.box_head_targets(proposed, boxes, labels, self.num_classes, best)
            box_head, count = self.roi_head["bbox_head"], heads.num_positive
            cls, reg = box_head(roi_align(pyramid, i, heads.boxes, 7))
            classes = torch.from_numpy(heads.labels).long()
            sums["cls"] = sums["cls"] + F.cross_entropy(cls, classes, reduction="sum")
            own = reg.reshape(len(reg), -1, 4)[torch.arange(count), classes[:count]]
            l1 = (own - torch.from_numpy(heads.deltas[:count]).to(x)).abs().sum()
            sums["bbox"], counts[1] = sums["bbox"] + l1, counts[1] + len(reg)
            logit = self.roi_head["mask_head"](roi_align(pyramid, i, heads.boxes[:count], 14))
            logit = logit[torch.arange(count), classes[:count]]
            wanted = torch.from_numpy(masks.mask_targets(bits[i], heads.boxes[:count], heads.matched)).to(x)
            bce = F.binary_cross_entropy_with_logits(logit, wanted, reduction="sum")
            sums["mask"], counts[2] = sums["mask"] + bce, counts[2] + count * masks.MASK_SIZE**2
        divisors = dict(zip(sums, (counts[0], counts[0], counts[1], counts[1], counts[2])))
        return {f"loss_{name}": total / max(divisors[name], 1) for name, total in sums.items()}


def retinanet_losses(scores: Maps, deltas: Maps, objects: Sequence[Any], image_shapes: np.ndarray) -> Losses:
    sizes = map_sizes(scores)
    anchors = RETINANET_ANCHORS(sizes)
    logits = torch.cat([by_anchor(x, 9) for x in scores], 1)
    predicted = torch.cat([by_anchor(x, 9) for x in deltas], 1)
    cls = bbox = logits.new_zeros(())
    divisor = 0
    for i, (boxes, labels) in enumerate(objects):
        padded = padded_size(image_shapes[i])
        targets = assign.retinanet_targets(anchors, boxes, labels, RETINANET_ANCHORS.valid(sizes, padded))
        counted = torch.from_numpy(np.flatnonzero(targets.labels != assign.IGNORED))
        positive = np.flatnonzero(targets.labels >= 0)
        hot = torch.zeros_like(logits[i])
        hot[positive, targets.labels[positive]] = 1
        x, hot = logits[i, counted], hot[counted]
        right = torch.where(hot > 0, x.sigmoid(), 1 - x.sigmoid())
        weight = torch.where(hot > 0, 0.25, 0.75) * (1 - right) ** 2
        cls = cls + (weight * F.binary_cross_entropy_with_logits(x, hot, reduction="none")).sum()
        wanted = torch.from_numpy(targets.deltas[positive]).to(predicted)
        bbox = bbox + (predicted[i, positive] - wanted).abs().sum()
        divisor += max(1, len(positive))
    return {"loss_cls": cls / divisor, "loss_bbox": bbox / divisor}


def ssdlite_losses(maps: Maps, objects: Sequence[Any], image_size: Sequence[int], num_classes: int) -> Losses:
    priors = ssd_priors(map_sizes(maps))
    every = torch.cat([by_anchor(x, count) for x, count in zip(maps, ssd_priors_per_cell())], 1)
    shares = np.asarray([image_size[1], image_size[0]] * 2, np.float32)
    targets = [assign.ssd_targets(priors, boxes / shares, labels) for boxes, labels in objects]
    classes = torch.from_numpy(np.stack([np.maximum(t.labels + 1, 0) for t in targets])).long()
    wanted, positive = torch.from_numpy(np.stack([t.deltas for t in targets])).to(every), classes > 0
    losses = -F.log_softmax(every[..., 4:], 2)
    counted = torch.from_numpy(assign.hard_negatives(losses[..., 0].detach().numpy(), positive.numpy()))
    divisor = max(1, int(positive.sum()))
    cls = losses.gather(2, classes[..., None])[..., 0][counted].sum()
    bbox = F.smooth_l1_loss(every[..., :4][positive], wanted[positive], reduction="sum")
    return {"loss_cls": cls / divisor, "loss_bbox": bbox / divisor}


def create(method: str, backbone: str, num_classes: Optional[int] = None, **options: Any) -> Detector:
    """The reference of `mindska.create_detector`; `options`: of the reference backbone."""
    from .segmentation import headless

    net, cin = headless(backbone, **options)
    return Detector(method, net, cin, num_classes or 80, *ssd_backbone_maps(backbone))
