"""VAN with both attentions in plain PyTorch, with the authors' state-dict keys: what the port is compared with.

Written from the papers (VAN 2022, LSKA 2023) and from figures of LSKA's authors' networks; `test_families.py` shows
that it reproduces those figures, which is what makes it a reference.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import nn

from .skanet import PatchEmbed

SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(dims=(32, 64, 160, 256), depths=(3, 3, 5, 2)),
    "small": dict(dims=(64, 128, 320, 512), depths=(2, 2, 4, 2)),
    "base": dict(dims=(64, 128, 320, 512), depths=(3, 3, 12, 3)),
    "large": dict(dims=(64, 128, 320, 512), depths=(3, 5, 27, 3)),
}
# kernel, dilated kernel, dilation
KERNELS = {7: (3, 3, 2), 11: (3, 5, 2), 23: (5, 7, 3), 35: (5, 11, 3), 41: (5, 13, 3), 53: (5, 17, 3)}


def depthwise(dim: int, height: int, width: int, dilation: int = 1) -> nn.Conv2d:
    padding = (dilation * (height // 2), dilation * (width // 2))
    return nn.Conv2d(dim, dim, (height, width), padding=padding, dilation=dilation, groups=dim)


class LKA(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv0 = depthwise(dim, 5, 5)
        self.conv_spatial = depthwise(dim, 7, 7, 3)
        self.conv1 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.conv1(self.conv_spatial(self.conv0(x)))


class LSKA(nn.Module):
    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        kernel, dilated, dilation = KERNELS[size]
        self.conv0h = depthwise(dim, 1, kernel)
        self.conv0v = depthwise(dim, kernel, 1)
        self.conv_spatial_h = depthwise(dim, 1, dilated, dilation)
        self.conv_spatial_v = depthwise(dim, dilated, 1, dilation)
        self.conv1 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.conv1(self.conv_spatial_v(self.conv_spatial_h(self.conv0v(self.conv0h(x)))))


class Attention(nn.Module):
    def __init__(self, dim: int, size: Optional[int]) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(dim, dim, 1)
        self.spatial_gating_unit = LKA(dim) if size is None else LSKA(dim, size)
        self.proj_2 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.proj_2(self.spatial_gating_unit(F.gelu(self.proj_1(x))))


class DWConv(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = depthwise(dim, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dwconv(x)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.dwconv = DWConv(hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(x))))


class Block(nn.Module):
    def __init__(self, dim: int, ratio: int, size: Optional[int]) -> None:
        super().__init__()
        self.layer_scale_1 = nn.Parameter(1e-2 * torch.ones(dim))
        self.layer_scale_2 = nn.Parameter(1e-2 * torch.ones(dim))
        self.norm1 = nn.BatchNorm2d(dim)
        self.attn = Attention(dim, size)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = Mlp(dim, dim * ratio)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.layer_scale_1[:, None, None] * self.attn(self.norm1(x))
        return x + self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x))


class VAN(nn.Module):
    def __init__(self, dims, depths, size: Optional[int], num_classes: int = 1000, norm_eps: float = 1e-6) -> None:
        super().__init__()
        cin = 3
        for i, (dim, ratio, depth) in enumerate(zip(dims, (8, 8, 4, 4), depths), start=1):
            setattr(self, f"patch_embed{i}", PatchEmbed(cin, dim, 7 if i == 1 else 3, 4 if i == 1 else 2))
            setattr(self, f"block{i}", nn.ModuleList([Block(dim, ratio, size) for _ in range(depth)]))
            setattr(self, f"norm{i}", nn.LayerNorm(dim, eps=norm_eps))
            cin = dim
        self.head = nn.Linear(cin, num_classes)

    def taps(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every intermediate result that the tests look at, and `logits`."""
        out = {}
        for i in range(1, 5):
            x = out[f"stage{i}_embed"] = getattr(self, f"patch_embed{i}")(x)
            for block in getattr(self, f"block{i}"):
                x = block(x)
            out[f"stage{i}_block"] = x
            x = getattr(self, f"norm{i}")(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            out[f"stage{i}_norm"] = x
        out["logits"] = self.head(x.flatten(2).mean(2))
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.taps(x)["logits"]


def create(name: str, **overrides) -> VAN:
    """`name`: van_tiny, van_tiny_lska_k23, ..."""
    size, _, kernel = name.removeprefix("van_").partition("_lska_k")
    return VAN(**SIZES[size], size=int(kernel) if kernel else None, **overrides)
