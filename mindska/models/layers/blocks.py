"""Blocks of SkaNet and VAN: patch embedding, convolutional MLP, layer scale, initial values; and what all networks use:
convolution, batch norm, stochastic layers.

Sources: VAN (Guo et al., Visual Attention Network, 2022), section 3.3; SkaNet (ICANN 2023) builds on the same parts.
"""

from __future__ import annotations

import math
from typing import Optional, Union

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer

SQRT_HALF = math.sqrt(0.5)
BN_EPS = 1e-5
BN_MOMENTUM = 0.9  # MindSpore keeps this share of the old value: PyTorch's momentum 0.1


def batch_norm(channels: int, momentum: float = BN_MOMENTUM) -> nn.BatchNorm2d:
    """Batch norm over (B, C, H, W); epsilon and the default momentum are PyTorch's. SKNet passes Caffe's momentum."""
    return nn.BatchNorm2d(channels, eps=BN_EPS, momentum=momentum)


def conv(
    cin: int,
    cout: int,
    kernel: Union[int, tuple[int, int]] = 1,
    stride: int = 1,
    dilation: int = 1,
    group: int = 1,
    has_bias: bool = True,
) -> nn.Conv2d:
    """Convolution whose padding keeps the size (divided by the stride). `kernel`: of both sides, or (height, width)."""
    high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
    vertical, horizontal = dilation * (high - 1) // 2, dilation * (wide - 1) // 2
    padding = vertical if vertical == horizontal else (vertical, vertical, horizontal, horizontal)
    # Weights get their values when the network is complete.
    initial = dict(weight_init="zeros", bias_init="zeros")
    options = dict(dilation=dilation, group=group, has_bias=has_bias)
    return nn.Conv2d(cin, cout, (high, wide), stride, "pad", padding, **options, **initial)


class GELU(nn.Cell):
    """Exact GELU, x * Phi(x), element-wise.

    `nn.GELU` is three times slower on CPU, and the automatic gradient of erf contains a power (see `bprop`).
    """

    def construct(self, x: Tensor) -> Tensor:
        return x * 0.5 * (1.0 + ops.erf(x * SQRT_HALF))

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        # ops.exp is off by 6e-6 on CPU; expm1 is exact to float32.
        density = (1.0 + ops.expm1(-0.5 * x * x)) * (1.0 / math.sqrt(2.0 * math.pi))
        return (dout * (0.5 * (1.0 + ops.erf(x * SQRT_HALF)) + x * density),)


def drop_mask(noise: Tensor, rate: float, dtype: ms.Type) -> Tensor:
    """1 / (1 - rate) where noise < 1 - rate, else 0."""
    return (noise < 1 - rate).astype(dtype) / (1 - rate)


class DropPath(nn.Cell):
    """Stochastic depth (Huang et al., 2016): drops a sample's residual branch with probability `rate`.

    `noise` (B,) in [0, 1) decides: sample i is kept where noise[i] < 1 - rate, and scaled by 1 / (1 - rate). The
    trainer passes it, so that a resumed run drops what the uninterrupted one would have; else MindSpore draws.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = float(rate)
        self.dropout = nn.Dropout(p=self.rate)

    def mask(self, x: Tensor, noise: Optional[Tensor]) -> Tensor:
        """What each sample of x is multiplied with: (B,), or (1,) where that is 1 for all."""
        if not self.training or self.rate == 0:
            return ops.ones((1,), x.dtype)
        if noise is None:
            return self.dropout(ops.ones((x.shape[0],), x.dtype))
        return drop_mask(noise, self.rate, x.dtype)

    def construct(self, x: Tensor, noise: Optional[Tensor] = None) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        return x * self.mask(x, noise).reshape(-1, 1, 1, 1)


class Dropout(nn.Cell):
    """Dropout of features (B, C); `noise` (B, C) decides as in `DropPath`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = float(rate)
        self.dropout = nn.Dropout(p=self.rate)

    def construct(self, x: Tensor, noise: Optional[Tensor] = None) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        if noise is None:
            return self.dropout(x)
        return x * drop_mask(noise, self.rate, x.dtype)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W)."""

    over_last = nn.LayerNorm.construct  # in graph mode `super()` is that of the instance's own class

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__((channels,), epsilon=eps)

    def construct(self, x: Tensor) -> Tensor:
        return self.over_last(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


class PatchEmbed(nn.Cell):
    """Overlapping patch embedding: strided convolution and batch norm. (B, Cin, H, W) -> (B, C, H/s, W/s)"""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, dilation: int = 1) -> None:
        super().__init__()
        self.proj = conv(cin, cout, kernel, stride, dilation)
        self.norm = batch_norm(cout)

    def construct(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class ConvMlp(nn.Cell):
    """1x1 convolution, depthwise 3x3, GELU, 1x1 convolution. (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = conv(dim, hidden)
        self.dwconv = conv(hidden, hidden, 3, group=hidden)
        self.act = GELU()
        self.fc2 = conv(hidden, dim)

    def construct(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.dwconv(self.fc1(x))))


class Attention(nn.Cell):
    """1x1 convolution, GELU, the spatial part of the attention, 1x1 convolution, and a shortcut.

    (B, C, H, W) -> (B, C, H, W)
    """

    def __init__(self, dim: int, spatial: nn.Cell) -> None:
        super().__init__()
        self.proj_1 = conv(dim, dim)
        self.act = GELU()
        self.spatial = spatial
        self.proj_2 = conv(dim, dim)

    def construct(self, x: Tensor) -> Tensor:
        return x + self.proj_2(self.spatial(self.act(self.proj_1(x))))


class Block(nn.Cell):
    """x + layer_scale_1 * attention(norm(x)), then x + layer_scale_2 * mlp(norm(x)). (B, C, H, W) -> (B, C, H, W)

    `noise` (B, 2) drives the two stochastic depths.
    """

    def __init__(self, dim: int, attention: nn.Cell, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = batch_norm(dim)
        self.attn = attention
        self.norm2 = batch_norm(dim)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.layer_scale_1 = Parameter(Tensor(np.full(dim, 1e-2, np.float32)), name="layer_scale_1")
        self.layer_scale_2 = Parameter(Tensor(np.full(dim, 1e-2, np.float32)), name="layer_scale_2")

    def construct(self, x: Tensor, noise: Optional[Tensor] = None) -> Tensor:
        first, second = drop_path_noise(noise)
        x = x + self.drop_path(self.layer_scale_1.reshape(-1, 1, 1) * self.attn(self.norm1(x)), first)
        return x + self.drop_path(self.layer_scale_2.reshape(-1, 1, 1) * self.mlp(self.norm2(x)), second)


def drop_path_noise(noise: Optional[Tensor]) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """The columns of a block's noise (B, 2), one for each stochastic depth: (B,).

    It is a function of its own because MindSpore (2.8, graph mode) finds no gradient where the choice stands inside
    another function.
    """
    return (None, None) if noise is None else (noise[:, 0], noise[:, 1])


def init_weights(net: nn.Cell) -> None:
    """Initial values of the authors of SkaNet and VAN, the ones that win where their initialisers are nested.

    Convolutions normal(0, sqrt(2 / fan_out)), with fan_out = kh * kw * out / groups; linear layers normal(0, 0.02)
    (theirs is truncated at +-2, a hundred deviations away; MindSpore's `TruncatedNormal` would cut at two); biases 0.
    """
    for _, cell in net.cells_and_names():
        if isinstance(cell, nn.Conv2d):
            fan_out = cell.kernel_size[0] * cell.kernel_size[1] * cell.out_channels // cell.group
            cell.weight.set_data(initializer(Normal(math.sqrt(2.0 / fan_out)), cell.weight.shape, cell.weight.dtype))
        elif isinstance(cell, nn.Dense):
            cell.weight.set_data(initializer(Normal(0.02), cell.weight.shape, cell.weight.dtype))
            cell.bias.set_data(initializer("zeros", cell.bias.shape, cell.bias.dtype))
