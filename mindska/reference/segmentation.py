"""Segmenters in plain PyTorch on the backbones of this package, with MMSegmentation's and ml-cvnets' state-dict keys.

Written from their descriptions and from figures of their code; `test_segmentation.py` shows that the port, which these
networks are compared with, reproduces those figures. The backbone's keys are its authors', below `backbone.`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import nn

METHODS = ("semantic_fpn", "upernet", "deeplabv3")
Maps = list[torch.Tensor]


def resized(x: torch.Tensor, size: Sequence[int], align_corners: bool = False) -> torch.Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)


class ConvModule(nn.Module):
    """Keys `conv` and `bn`; without a norm a convolution with bias alone."""

    def __init__(self, cin: int, cout: int, kernel: int = 1, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, padding=kernel // 2, bias=not norm)
        if norm:
            self.bn = nn.BatchNorm2d(cout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return F.relu(self.bn(x)) if hasattr(self, "bn") else x


class Block(nn.Module):
    """ml-cvnets' layer: keys `block.conv` and `block.norm`."""

    def __init__(self, cin: int, cout: int, kernel: int = 1, dilation: int = 1, norm: bool = True) -> None:
        super().__init__()
        conv = nn.Conv2d(cin, cout, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=not norm)
        self.block = nn.ModuleDict({"conv": conv, "norm": nn.BatchNorm2d(cout)} if norm else {"conv": conv})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block["conv"](x)
        return F.relu(self.block["norm"](x)) if "norm" in self.block else x


class FPN(nn.Module):
    def __init__(self, cin: Sequence[int], channels: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList([ConvModule(c, channels, norm=False) for c in cin])
        self.fpn_convs = nn.ModuleList([ConvModule(channels, channels, 3, norm=False) for _ in cin])

    def forward(self, features: Maps) -> Maps:
        maps = [layer(x) for layer, x in zip(self.lateral_convs, features)]
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = maps[i - 1] + F.interpolate(maps[i], size=maps[i - 1].shape[2:], mode="nearest")
        return [layer(x) for layer, x in zip(self.fpn_convs, maps)]


class FPNHead(nn.Module):
    def __init__(self, cin: int, channels: int, levels: int, num_classes: int) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.scale_heads = nn.ModuleList()
        for level in range(levels):
            layers: list[nn.Module] = []
            for i in range(max(1, level)):
                layers += [ConvModule(channels if i else cin, channels, 3), *([up] if level else [])]
            self.scale_heads.append(nn.Sequential(*layers))

    def forward(self, maps: Maps) -> torch.Tensor:
        total = self.scale_heads[0](maps[0])
        for head, x in zip(self.scale_heads[1:], maps[1:]):
            total = total + resized(head(x), total.shape[2:])
        return self.conv_seg(total)


class UPerHead(nn.Module):
    def __init__(self, cin: Sequence[int], channels: int, num_classes: int, scales: Sequence[int] = (1, 2, 3, 6)):
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        self.psp_modules = nn.ModuleList(
            [nn.Sequential(nn.AdaptiveAvgPool2d(s), ConvModule(cin[-1], channels)) for s in scales]
        )
        self.bottleneck = ConvModule(cin[-1] + len(scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList([ConvModule(c, channels) for c in cin[:-1]])
        self.fpn_convs = nn.ModuleList([ConvModule(channels, channels, 3) for _ in cin[:-1]])
        self.fpn_bottleneck = ConvModule(len(cin) * channels, channels, 3)

    def forward(self, maps: Maps) -> torch.Tensor:
        last = maps[-1]
        pooled = self.bottleneck(torch.cat([last, *(resized(m(last), last.shape[2:]) for m in self.psp_modules)], 1))
        merged = [*(layer(x) for layer, x in zip(self.lateral_convs, maps)), pooled]
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = merged[i - 1] + resized(merged[i], merged[i - 1].shape[2:])
        levels = [*(layer(x) for layer, x in zip(self.fpn_convs, merged)), merged[-1]]
        return self.conv_seg(self.fpn_bottleneck(torch.cat([resized(x, levels[0].shape[2:]) for x in levels], 1)))


class FCNHead(nn.Module):
    def __init__(self, cin: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        self.convs = nn.Sequential(ConvModule(cin, channels, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_seg(self.convs(x))


class ASPP(nn.Module):
    def __init__(self, cin: int, channels: int, dilations: Sequence[int] = (12, 24, 36)) -> None:
        super().__init__()
        pool: Any = nn.ModuleDict({"aspp_pool": nn.ModuleDict({"conv_1x1": Block(cin, channels)})})
        self.convs = nn.ModuleList([Block(cin, channels), *(Block(cin, channels, 3, d) for d in dilations), pool])
        self.project = Block(5 * channels, channels)

    def branches(self, x: torch.Tensor) -> Maps:
        maps = [layer(x) for layer in self.convs[:-1]]
        pool: Any = self.convs[-1]
        pooled = pool["aspp_pool"]["conv_1x1"](x.mean((2, 3), keepdim=True))
        return [*maps, pooled.expand(-1, -1, *x.shape[2:])]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(torch.cat(self.branches(x), 1))


class DeepLabHead(nn.Module):
    def __init__(self, cin: Sequence[int], channels: int, num_classes: int) -> None:
        super().__init__()
        middle = max(cin[-2] // 4, 128)
        head = Block(middle, num_classes, norm=False)
        self.aux_head = nn.Sequential(Block(cin[-2], middle, 3), nn.Identity(), head)  # dropout between
        self.aspp = nn.ModuleDict({"aspp_layer": ASPP(cin[-1], channels)})
        self.classifier = Block(channels, num_classes, norm=False)

    def forward(self, maps: Maps) -> torch.Tensor:
        return self.classifier(self.aspp["aspp_layer"](maps[-1]))


def set_output_stride(backbone: nn.Module, output_stride: int) -> None:
    """Replaces strides of a reference backbone by dilation, in place (see `stage_strides` of the port)."""
    stages = [i for i in range(1, 5) if hasattr(backbone, f"layer{i}") or hasattr(backbone, f"patch_embed{i}")]
    reduction, dilation = 1 if getattr(backbone, "cifar", False) else 4, 1
    for i in stages[1:]:
        if 2 * reduction <= output_stride:
            reduction *= 2
            continue
        first = getattr(backbone, f"layer{i}")[0] if hasattr(backbone, f"layer{i}") else None
        embed: Any = getattr(backbone, f"patch_embed{i}", first)
        for conv in embed.modules():
            if isinstance(conv, nn.Conv2d) and conv.stride == (2, 2):
                conv.stride = (1, 1)
                conv.dilation = tuple(d * dilation for d in conv.dilation)
                conv.padding = tuple(d * (k // 2) for d, k in zip(conv.dilation, conv.kernel_size))
        dilation *= 2


class Segmenter(nn.Module):
    """`method` on a reference backbone, without dropout. Images (B, 3, H, W) -> logits (B, classes, H, W)"""

    decode_head: nn.Module

    def __init__(self, method: str, backbone: Any, cin: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.method, self.backbone, self.stages = method, backbone, len(cin)
        self.align_corners = method == "deeplabv3"
        if method == "semantic_fpn":
            self.neck, self.decode_head = FPN(cin, 256), FPNHead(256, 128, len(cin), num_classes)
        elif method == "upernet":
            self.decode_head, self.auxiliary_head = UPerHead(cin, 512, num_classes), FCNHead(cin[-2], 256, num_classes)
        else:
            self.seg_head = DeepLabHead(cin, 512, num_classes)

    def features(self, x: torch.Tensor) -> Maps:
        taps = self.backbone.taps(x)
        name = "layer{}" if "layer1" in taps else "stage{}_norm"
        return [taps[name.format(i)] for i in range(1, self.stages + 1)]

    def decode(self, features: Maps) -> torch.Tensor:
        if self.method == "deeplabv3":
            return self.seg_head(features)
        return self.decode_head(self.neck(features) if self.method == "semantic_fpn" else features)

    def auxiliary(self, features: Maps) -> Optional[torch.Tensor]:
        if self.method == "semantic_fpn":
            return None
        return (self.auxiliary_head if self.method == "upernet" else self.seg_head.aux_head)(features[-2])

    def head_logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.features(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return resized(self.head_logits(x), x.shape[2:], self.align_corners)

    def losses(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The training loss; labels (B, H, W) int64, 255 ignored."""

        def loss(logits: torch.Tensor) -> torch.Tensor:
            logits = resized(logits, labels.shape[1:], self.align_corners)
            total = F.cross_entropy(logits, labels, ignore_index=255, reduction="sum")
            return total / ((labels != 255).sum().clamp(min=1) if self.method == "deeplabv3" else labels.numel())

        features = self.features(x)
        auxiliary = self.auxiliary(features)
        main = loss(self.decode(features))
        return main if auxiliary is None else main + 0.4 * loss(auxiliary)


def headless(backbone: str, **options: Any) -> tuple[nn.Module, list[int]]:
    """A reference backbone without its classifier, and the channels of its stages; VAN's with the dense epsilon."""
    from . import create as create_backbone
    from . import sknet

    if backbone.startswith("van_"):
        options.setdefault("norm_eps", 1e-5)
    net: Any = create_backbone(backbone, **options)
    for name in ("classifier", "head", "fc"):
        if hasattr(net, name):
            setattr(net, name, nn.Identity())
    if hasattr(net, "patch_embed1"):
        return net, [getattr(net, f"patch_embed{i}").proj.out_channels for i in range(1, 5)]
    row: Any = sknet.VARIANTS[backbone]
    return net, list(row["out"])


def create(
    method: str, backbone: str, num_classes: Optional[int] = None, output_stride: Optional[int] = None, **options: Any
) -> Segmenter:
    """The reference of `mindska.create_segmenter`; `options`: of the reference backbone."""
    net, cin = headless(backbone, **options)
    if output_stride is None and method == "deeplabv3":
        output_stride = 8
    if output_stride is not None:
        set_output_stride(net, output_stride)
    return Segmenter(method, net, cin, num_classes or (21 if method == "deeplabv3" else 150))
