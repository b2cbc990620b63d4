"""SKNet and timm's SK-ResNets in plain PyTorch, with timm's state-dict keys: what the port is compared with.

Written from the paper (CVPR 2019) and from figures of the authors' Caffe networks and of timm's; `test_families.py`
shows that it reproduces those figures, which is what makes it a reference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

BASIC = dict(out=(64, 128, 256, 512), width=(64, 128, 256, 512), reduced=(16, 16, 32, 64), groups=1, split=True)
WIDE = dict(out=(256, 512, 1024, 2048), width=(128, 256, 512, 1024), reduced=(32, 32, 32, 64), groups=32)
VARIANTS = {
    "sknet26": dict(depths=(2, 2, 2, 2), caffe=True, **WIDE),
    "sknet50": dict(depths=(3, 4, 6, 3), caffe=True, **WIDE),
    "sknet101": dict(depths=(3, 4, 23, 3), caffe=True, **{**WIDE, "reduced": (32, 16, 32, 64)}),
    "sknet29_16x32d": dict(
        depths=(3, 3, 3),
        out=(256, 512, 1024),
        width=(512, 1024, 2048),
        reduced=(32, 32, 64),
        groups=16,
        paths=((1, 1), (3, 1)),
        cifar=True,
    ),
    "sk_resnet18": dict(depths=(2, 2, 2, 2), basic=True, **BASIC),
    "sk_resnet34": dict(depths=(3, 4, 6, 3), basic=True, **BASIC),
    "sk_resnet50": dict(depths=(3, 4, 6, 3), **{**BASIC, "out": (256, 512, 1024, 2048), "reduced": (8, 8, 16, 32)}),
    "sk_resnext50_32x4d": dict(depths=(3, 4, 6, 3), **WIDE),
}


class ConvBn(nn.Module):
    def __init__(self, cin: int, cout: int, kernel=1, stride=1, dilation=1, groups=1, relu=True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, dilation * (kernel // 2), dilation, groups, bias=False)
        self.bn = nn.BatchNorm2d(cout)
        self.relu = relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.conv(x))
        return F.relu(x) if self.relu else x


class Attention(nn.Module):
    def __init__(self, dim: int, reduced: int) -> None:
        super().__init__()
        self.fc_reduce = nn.Conv2d(dim, reduced, 1, bias=False)
        self.bn = nn.BatchNorm2d(reduced)
        self.fc_select = nn.Conv2d(reduced, 2 * dim, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Weights (B, 2, C, 1, 1)."""
        pooled = x.mean((2, 3), keepdim=True)
        logits = self.fc_select(F.relu(self.bn(self.fc_reduce(pooled))))
        return logits.reshape(x.shape[0], 2, x.shape[1], 1, 1).softmax(1)


class SelectiveKernel(nn.Module):
    def __init__(self, cin: int, cout: int, reduced: int, stride: int, groups: int, split: bool, paths) -> None:
        super().__init__()
        self.split = split
        cin = cin // 2 if split else cin
        self.paths = nn.ModuleList([ConvBn(cin, cout, kernel, stride, dilation, groups) for kernel, dilation in paths])
        self.attn = Attention(cout, reduced)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.chunk(2, 1) if self.split else (x, x)
        y = torch.stack([path(part) for path, part in zip(self.paths, parts)], 1)
        self.weights = self.attn(y.sum(1))
        return (y * self.weights).sum(1)


class Unit(nn.Module):
    def __init__(self, cin, width, cout, reduced, stride, groups, split, basic, paths) -> None:
        super().__init__()
        if basic:
            self.conv1: nn.Module = SelectiveKernel(cin, width, reduced, stride, groups, split, paths)
            self.conv2: nn.Module = ConvBn(width, cout, 3, relu=False)
            self.chain: tuple[str, ...] = ("conv1", "conv2")
        else:
            self.conv1 = ConvBn(cin, width)
            self.conv2 = SelectiveKernel(width, width, reduced, stride, groups, split, paths)
            self.conv3 = ConvBn(width, cout, relu=False)
            self.chain = ("conv1", "conv2", "conv3")
        if stride > 1 or cin != cout:
            self.downsample: nn.Module = nn.Sequential(
                nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout)
            )
        else:
            self.downsample = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for name in self.chain:
            y = getattr(self, name)(y)
        return F.relu(y + self.downsample(x))


class SKNet(nn.Module):
    def __init__(
        self,
        depths,
        out,
        width,
        reduced,
        groups,
        split=False,
        basic=False,
        caffe=False,
        cifar=False,
        paths=((3, 1), (3, 2)),
        num_classes=1000,
    ) -> None:
        super().__init__()
        self.caffe, self.cifar, self.stages = caffe, cifar, len(depths)
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False) if cifar else nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        cin = 64
        for i, depth in enumerate(depths):
            units = []
            for j in range(depth):
                stride = 2 if i and j == 0 else 1
                units.append(Unit(cin, width[i], out[i], reduced[i], stride, groups, split, basic, paths))
                cin = out[i]
            setattr(self, f"layer{i + 1}", nn.Sequential(*units))
        self.fc = nn.Linear(cin, num_classes)
        if caffe:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 0.05

    def taps(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every intermediate result that the tests look at, and `logits`."""
        x = F.relu(self.bn1(self.conv1(x)))
        if not self.cifar:
            x = F.max_pool2d(x, 3, 2, ceil_mode=True) if self.caffe else F.max_pool2d(x, 3, 2, 1)
        out = {"stem": x}
        for i in range(1, self.stages + 1):
            x = out[f"layer{i}"] = getattr(self, f"layer{i}")(x)
        out["pool"] = x.mean((2, 3), keepdim=True)
        out["logits"] = self.fc(out["pool"].flatten(1))
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.taps(x)["logits"]


def create(name: str, **overrides) -> SKNet:
    return SKNet(**{**VARIANTS[name], **overrides})
