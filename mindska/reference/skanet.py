"""SkaNet in plain PyTorch, with the authors' state-dict keys: what the port is compared with.

Written from the paper (ICANN 2023) and from figures of the authors' network; `test_reference.py` shows that it
reproduces those figures, which is what makes it a reference. It is written to be read, not to be fast, but the
relative-position map is computed once per size, so that it is a fair opponent in a benchmark.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

VARIANTS = {
    "skanet_s": dict(dims=(64, 96, 128, 256), mlp_ratios=(8, 8, 4, 4), depths=(3, 3, 12, 2), k=5),
    "skanet_nano": dict(dims=(16, 32, 64, 96), mlp_ratios=(4, 4, 4, 4), depths=(1, 1, 2, 1), k=4),
}
REDUCTIONS = (4, 2, 1, 1)


def sincos(channels: int, grid: int) -> np.ndarray:
    """Sine-cosine codes (grid * grid, channels) in float64: half of the channels for each axis."""

    def one_axis(positions: np.ndarray) -> np.ndarray:
        omega = 1.0 / 10000 ** (np.arange(channels // 4, dtype=np.float64) / (channels / 4.0))
        angle = np.outer(positions.reshape(-1), omega)
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    axis = np.arange(grid, dtype=np.float32)
    across, down = np.meshgrid(axis, axis)
    return np.concatenate([one_axis(across), one_axis(down)], axis=1)


@lru_cache(maxsize=64)
def relative_position(channels: int, nodes: int, reduced_nodes: int) -> torch.Tensor:
    """The map (nodes, reduced_nodes) added to the distances; it interpolates along the flattened index."""
    codes = sincos(channels, int(math.sqrt(nodes)))
    similarity = torch.from_numpy(2 * codes @ codes.T / channels).float()[None, None]
    return -F.interpolate(similarity, size=(nodes, reduced_nodes), mode="bicubic", align_corners=False)[0, 0]


def nearest(x: torch.Tensor, y: torch.Tensor, position: torch.Tensor, k: int, dilation: int) -> torch.Tensor:
    """Indices (B, N, k) of every dilation-th of the k * dilation nodes of y (B, M, C) nearest to x (B, N, C)."""
    x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    distance = (x * x).sum(-1, keepdim=True) - 2 * x @ y.transpose(1, 2) + (y * y).sum(-1)[:, None] + position
    return torch.topk(-distance, k * dilation).indices[:, :, ::dilation]


class Conv1x1Bn(nn.Module):
    """Keys `nn.0` (convolution) and `nn.1` (batch norm) of the graph convolution."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.nn = nn.Sequential(nn.Conv2d(cin, cout, 1, groups=4), nn.BatchNorm2d(cout), nn.GELU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.nn(x)


class MaxRelativeConv(nn.Module):
    def __init__(self, dim: int, k: int, dilation: int, r: int) -> None:
        super().__init__()
        self.gconv = Conv1x1Bn(2 * dim, dim)
        self.k, self.dilation, self.r = k, dilation, r
        self.neighbours: Optional[torch.Tensor] = None  # those of the last forward pass
        self.imposed: Optional[torch.Tensor] = None  # when set, used instead of a search

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        keys = F.avg_pool2d(x, self.r, self.r) if self.r > 1 else x
        queries, keys = x.flatten(2).transpose(1, 2), keys.flatten(2).transpose(1, 2)  # (B, N, C), (B, M, C)
        n, m = queries.shape[1], keys.shape[1]
        if self.imposed is None:
            with torch.no_grad():
                position = relative_position(c, n, m).to(x)
                # Where the authors' code crashes (fewer nodes than k * dilation) the port's definition holds.
                self.neighbours = nearest(queries, keys, position, self.k, min(self.dilation, m // self.k))
        else:
            self.neighbours = self.imposed
        flat = self.neighbours.reshape(b, -1, 1).expand(-1, -1, c)
        gathered = torch.gather(keys, 1, flat).reshape(b, n, self.k, c)
        relative = (gathered - queries[:, :, None]).max(2).values  # (B, N, C)
        interleaved = torch.stack([queries, relative], dim=3).reshape(b, n, 2 * c)  # x0, d0, x1, d1, ...
        return self.gconv(interleaved.transpose(1, 2).reshape(b, 2 * c, h, w))


class SplitKernelAttention(nn.Module):
    def __init__(self, dim: int, k: int, dilation: int, r: int) -> None:
        super().__init__()
        self.splits = [dim // 8, dim * 3 // 8, dim // 2]
        self.conv0 = MaxRelativeConv(dim, k, dilation, r)
        self.DW_conv1 = nn.Conv2d(self.splits[1], self.splits[1], 5, padding=4, dilation=2, groups=self.splits[1])
        self.DW_conv2 = nn.Conv2d(self.splits[2], self.splits[2], 7, padding=9, dilation=3, groups=self.splits[2])
        self.PW_conv = nn.Conv2d(dim, dim, 1)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        graph = self.conv0(x)
        kept, five, seven = torch.split(graph, self.splits, dim=1)
        attention = torch.cat([kept, self.DW_conv1(five), self.DW_conv2(seven)], dim=1) + graph
        return self.norm(F.silu(self.PW_conv(attention)) * x)


class Attention(nn.Module):
    def __init__(self, dim: int, k: int, dilation: int, r: int) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(dim, dim, 1)
        self.ska = SplitKernelAttention(dim, k, dilation, r)
        self.proj_2 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.proj_2(self.ska(F.gelu(self.proj_1(x))))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(x))))


def drop_path(x: torch.Tensor, rate: float, uniform: Optional[torch.Tensor]) -> torch.Tensor:
    """Stochastic depth whose decisions are given: sample i is kept where uniform[i] < 1 - rate."""
    if uniform is None or rate == 0:
        return x
    keep = 1 - rate
    return x * ((uniform < keep).to(x) / keep)[:, None, None, None]


class Block(nn.Module):
    def __init__(self, dim: int, mlp_ratio: int, k: int, dilation: int, r: int, rate: float) -> None:
        super().__init__()
        self.layer_scale_1 = nn.Parameter(1e-2 * torch.ones(dim))
        self.layer_scale_2 = nn.Parameter(1e-2 * torch.ones(dim))
        self.norm1 = nn.BatchNorm2d(dim)
        self.attn = Attention(dim, k, dilation, r)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = Mlp(dim, dim * mlp_ratio)
        self.rate = rate

    def forward(self, x: torch.Tensor, uniform: Optional[torch.Tensor] = None) -> torch.Tensor:
        u1, u2 = (None, None) if uniform is None else uniform.unbind(1)
        x = x + drop_path(self.layer_scale_1[:, None, None] * self.attn(self.norm1(x)), self.rate, u1)
        return x + drop_path(self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x)), self.rate, u2)


class PatchEmbed(nn.Module):
    def __init__(self, cin: int, cout: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(cin, cout, kernel, stride, kernel // 2)
        self.norm = nn.BatchNorm2d(cout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x))


class Classifier(nn.Module):
    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class SkaNet(nn.Module):
    """SkaNet. `noise` (B, 2 * blocks + dims[-1]): uniform numbers for drop path, then for the classifier's dropout."""

    def __init__(
        self, dims, mlp_ratios, depths, k, num_classes: int = 1000, drop_path_rate: float = 0.1, drop_rate: float = 0.1
    ) -> None:
        super().__init__()
        self.drop_rate, blocks = drop_rate, sum(depths)
        rates = np.linspace(0, drop_path_rate, blocks)
        index, cin = 0, 3
        self.classifier = Classifier(dims[-1], num_classes)
        for i, (dim, ratio, depth, r) in enumerate(zip(dims, mlp_ratios, depths, REDUCTIONS), start=1):
            setattr(self, f"patch_embed{i}", PatchEmbed(cin, dim, 7 if i == 1 else 3, 4 if i == 1 else 2))
            stage = [Block(dim, ratio, k, j // 4 + 1, r, float(rates[j])) for j in range(index, index + depth)]
            setattr(self, f"block{i}", nn.ModuleList(stage))
            setattr(self, f"norm{i}", nn.LayerNorm(dim, eps=1e-6))
            index, cin = index + depth, dim
        self.blocks = blocks

    def graphs(self) -> dict[str, MaxRelativeConv]:
        """The graph convolutions by the name of their block, in order."""
        found = ((name, module) for name, module in self.named_modules() if isinstance(module, MaxRelativeConv))
        return {name.split(".attn.")[0]: module for name, module in found}

    def taps(self, x: torch.Tensor, noise: Optional[torch.Tensor] = None) -> dict[str, torch.Tensor]:
        """Every intermediate result that the tests look at, and `logits`."""
        out, index = {}, 0
        for i in range(1, 5):
            x = out[f"stage{i}_embed"] = getattr(self, f"patch_embed{i}")(x)
            for block in getattr(self, f"block{i}"):
                x = block(x, None if noise is None else noise[:, 2 * index : 2 * index + 2])
                index += 1
            out[f"stage{i}_block"] = x
            x = getattr(self, f"norm{i}")(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            out[f"stage{i}_norm"] = x
        pooled = x.flatten(2).mean(2)
        if noise is not None and self.drop_rate:
            keep = 1 - self.drop_rate
            pooled = pooled * ((noise[:, 2 * self.blocks :] < keep).to(pooled) / keep)
        out["logits"] = self.classifier(pooled)
        return out

    def forward(self, x: torch.Tensor, noise: Optional[torch.Tensor] = None) -> torch.Tensor:
        return self.taps(x, noise)["logits"]


def create(name: str, **overrides) -> SkaNet:
    return SkaNet(**{**VARIANTS[name], **overrides})
