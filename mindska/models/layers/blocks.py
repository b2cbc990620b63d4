"""Blocks that SkaNet and VAN share: patch embedding, convolutional MLP, layer scale, stochastic layers, initial values.

Sources: VAN (Guo et al., Visual Attention Network, 2022), section 3.3; SkaNet (ICANN 2023) builds on the same parts.
"""

from __future__ import annotations

import math
from typing import Optional, Union

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer

from ... import kernels

LARGE_MAP, LARGE_MAP_IN_TRAINING = 512, 2048  # pixels
Affine = tuple[Tensor, Tensor]  # scale and shift of each channel, (C,)
SQRT_HALF = math.sqrt(0.5)
BN_EPS = 1e-5
BN_MOMENTUM = 0.9  # MindSpore keeps this share of the old value: PyTorch's momentum 0.1


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm over (B, C, H, W), followed by ReLU when `relu`."""

    def __init__(self, channels: int, eps: float, momentum: float, relu: bool = False) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        self.relu = relu
        self.kernel, self.evaluated = kernels.batch_norm(eps, momentum, relu), kernels.affine_of_norm(eps)

    def affine(self) -> Affine:
        """What it does in evaluation, for inference by operators."""
        return self.evaluated(self.gamma, self.beta, self.moving_mean, self.moving_variance)

    def construct(self, x: Tensor) -> Tensor:
        if self.kernel is not None and self.training and self.kernel.takes(x):
            y, _, _, mean, variance = self.kernel(x, self.gamma, self.beta, self.moving_mean, self.moving_variance)
            y = ops.depend(y, ops.assign(self.moving_mean, ops.stop_gradient(mean)))
            return ops.depend(y, ops.assign(self.moving_variance, ops.stop_gradient(variance)))
        y = super().construct(x)
        return ops.relu(y) if self.relu else y


class NoNorm(nn.Cell):
    """What is left of a batch norm that was folded into its convolution."""

    def __init__(self, channels: int, relu: bool) -> None:
        super().__init__()
        self.scale, self.shift = Tensor(np.ones(channels, np.float32)), Tensor(np.zeros(channels, np.float32))
        self.relu = relu

    def affine(self) -> Affine:
        return self.scale, self.shift

    def construct(self, x: Tensor) -> Tensor:
        return ops.relu(x) if self.relu else x


def batch_norm(channels: int, momentum: float = BN_MOMENTUM, relu: bool = False) -> BatchNorm2d:
    """Batch norm over (B, C, H, W); epsilon, and by default momentum, are PyTorch's, which all three papers use."""
    return BatchNorm2d(channels, BN_EPS, momentum, relu)


class DepthwiseConv(nn.Conv2d):
    """A convolution of one input channel an output channel, with stride 1 and a bias, whose padding keeps the size."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.kernel = kernels.depthwise(self.dilation[0])

    def construct(self, x: Tensor) -> Tensor:
        if self.kernel is not None and self.kernel.takes(x):
            return self.kernel(x, self.weight, self.bias)
        return super().construct(x)


class FusingConv(nn.Conv2d):
    """A convolution that has its own operators, and in inference one of them for itself and what follows it.

    Args (besides those of `nn.Conv2d`):
        kernel: the operator of the convolution alone, or None.
        fused: the operator of `then`, or None.
        after: what follows in the network.
    """

    plain = nn.Conv2d.construct  # in graph mode `super()` is that of the instance's own class

    def __init__(self, *args, kernel: Optional[nn.Cell], fused: Optional[nn.Cell], after: str, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.kernel, self.fused, self.after = kernel, fused, after
        self.zeros = Tensor(np.zeros(self.out_channels, np.float32))

    def fuses(self, x: Tensor) -> bool:
        """Whether `then` can be used for x."""
        return self.fused is not None and not self.training and self.fused.takes(x)

    def then(self, x: Tensor, other: Optional[Tensor] = None, norm: Optional[Affine] = None) -> Tensor:
        """The convolution, batch norm where there is one, and what follows, with `other`."""
        raise NotImplementedError

    def construct(self, x: Tensor) -> Tensor:
        if self.kernel is not None and self.kernel.takes(x):
            return self.kernel(x, self.weight, self.bias if self.has_bias else self.zeros)
        return self.plain(x)


class PointwiseConv(FusingConv):
    """A 1x1 convolution with stride 1, with a bias or not, in groups or not.

    `then` names what follows it in the network: see `kernels.operators.THEN`.
    """

    def __init__(self, *args, then: str = "", **kwargs) -> None:
        super().__init__(*args, kernel=kernels.pointwise(), fused=kernels.pointwise_then(then), after=then, **kwargs)
        self.ones, self.absorbed = Tensor(np.ones(self.out_channels, np.float32)), kernels.behind()

    def behind(self, norm: Affine) -> tuple[Tensor, Tensor]:
        """Weight (O, C, 1, 1) and bias (O,) of a batch norm and the convolution (of one group) in one."""
        return self.absorbed(self.weight, self.bias if self.has_bias else self.zeros, norm[0], norm[1])

    def then(
        self, x: Tensor, other: Optional[Tensor] = None, norm: Optional[Affine] = None, before: Optional[Affine] = None
    ) -> Tensor:
        """As of `FusingConv`; `before`: a batch norm that x has not seen yet."""
        if before is None:
            weight, bias = self.weight, self.bias if self.has_bias else self.zeros
        else:
            weight, bias = self.behind(before)
        scale, shift = (self.ones, bias) if norm is None else (norm[0], norm[1] + norm[0] * bias)
        return self.fused(x, weight, scale, shift, self.ones if other is None else other)


class SpatialConv(FusingConv):
    """A convolution with an odd square kernel, in groups or with a stride, which divides the size.

    `then` names what follows it in the network: "relu", or nothing (all else is left to others).
    """

    def __init__(self, cin: int, cout: int, side, stride: int, *args, dilation=1, then: str = "", **kwargs) -> None:
        def operator(relu: bool) -> Optional[nn.Cell]:
            return kernels.grouped(dilation, relu) if stride == 1 else kernels.strided(stride, dilation, relu)

        own = dict(kernel=operator(False), fused=operator(then == "relu") if then in ("", "relu") else None, after=then)
        super().__init__(cin, cout, side, stride, *args, dilation=dilation, **own, **kwargs)

    def then(self, x: Tensor, other: Optional[Tensor] = None, norm: Optional[Affine] = None) -> Tensor:
        bias = self.bias if self.has_bias else self.zeros
        if norm is None:
            return self.fused(x, self.weight, bias)
        scale, shift = norm
        return self.fused(x, self.weight * scale.reshape(-1, 1, 1, 1), shift + scale * bias)


def conv(
    cin: int,
    cout: int,
    kernel: Union[int, tuple[int, int]] = 1,
    stride: int = 1,
    dilation: int = 1,
    group: int = 1,
    has_bias: bool = True,
    then: str = "",
) -> nn.Conv2d:
    """Convolution whose padding keeps the size (divided by the stride).

    `kernel`: of both sides, or (height, width). `then`: see `PointwiseConv` and `SpatialConv`.
    """
    high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
    vertical, horizontal = dilation * (high - 1) // 2, dilation * (wide - 1) // 2
    padding = vertical if vertical == horizontal else (vertical, vertical, horizontal, horizontal)
    # Weights get their values when the network is complete.
    initial = dict(has_bias=has_bias, weight_init="zeros", bias_init="zeros")
    layer = nn.Conv2d
    if high == wide == stride == 1:
        layer = PointwiseConv
    elif cin == cout == group and stride == 1 and has_bias:
        layer = DepthwiseConv
    elif high == wide and (group > 1) != (stride > 1):  # where our operators are the faster ones
        layer = SpatialConv
    if issubclass(layer, FusingConv):
        initial["then"] = then
    return layer(cin, cout, (high, wide), stride, "pad", padding, dilation=dilation, group=group, **initial)


class GELU(nn.Cell):
    """Exact GELU, x * Phi(x), element-wise.

    `nn.GELU` is three times slower on CPU, and the automatic gradient of erf contains a power (see `bprop`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernel = kernels.gelu()

    def construct(self, x: Tensor) -> Tensor:
        if self.kernel is not None and self.kernel.takes(x):
            return self.kernel(x)
        return x * 0.5 * (1.0 + ops.erf(x * SQRT_HALF))

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        if self.kernel is not None and self.kernel.takes(x):
            return self.kernel.bprop(x, out, dout)
        # ops.exp is off by 6e-6 on CPU; expm1 is exact to float32.
        phi = (1.0 + ops.expm1(-0.5 * x * x)) * (1.0 / math.sqrt(2.0 * math.pi))
        return (dout * (0.5 * (1.0 + ops.erf(x * SQRT_HALF)) + x * phi),)


def _kept(uniform: Tensor, rate: float, dtype: ms.Type) -> Tensor:
    """1 / (1 - rate) where uniform < 1 - rate, else 0."""
    return (uniform < 1 - rate).astype(dtype) / (1 - rate)


class DropPath(nn.Cell):
    """Stochastic depth (Huang et al., 2016): drops a sample's residual branch with probability `rate`.

    `uniform` (B,) in [0, 1) decides: sample i is kept where uniform[i] < 1 - rate, and scaled by 1 / (1 - rate).
    The trainer passes it, so that a resumed run drops what the uninterrupted one would have; else MindSpore draws.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = float(rate)
        self.dropout = nn.Dropout(p=self.rate)

    def factors(self, x: Tensor, uniform: Optional[Tensor]) -> Tensor:
        """What each sample of x is multiplied with: (B,), or (1,) where that is 1 for all."""
        if not self.training or self.rate == 0:
            return ops.ones((1,), x.dtype)
        if uniform is None:
            return self.dropout(ops.ones((x.shape[0],), x.dtype))
        return _kept(uniform, self.rate, x.dtype)

    def construct(self, x: Tensor, uniform: Optional[Tensor] = None) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        return x * self.factors(x, uniform).reshape(-1, 1, 1, 1)


class Dropout(nn.Cell):
    """Dropout of features (B, C); `uniform` (B, C) decides as in `DropPath`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = float(rate)
        self.dropout = nn.Dropout(p=self.rate)

    def construct(self, x: Tensor, uniform: Optional[Tensor] = None) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        if uniform is None:
            return self.dropout(x)
        return x * _kept(uniform, self.rate, x.dtype)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W)."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__((channels,), epsilon=eps)
        self.kernel = kernels.layer_norm(eps)

    def construct(self, x: Tensor) -> Tensor:
        if self.kernel is not None and self.kernel.takes(x):
            return self.kernel(x, self.gamma, self.beta)
        return super().construct(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


class PatchEmbed(nn.Cell):
    """Overlapping patch embedding: strided convolution and batch norm. (B, Cin, H, W) -> (B, C, H/s, W/s)"""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = conv(cin, cout, kernel, stride)
        self.norm = batch_norm(cout)

    def construct(self, x: Tensor) -> Tensor:
        if not self.norm.training and self.proj.fuses(x):
            return self.proj.then(x, None, self.norm.affine())
        return self.norm(self.proj(x))


class ConvMlp(nn.Cell):
    """1x1 convolution, depthwise 3x3, GELU, 1x1 convolution. (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = conv(dim, hidden)
        self.dwconv = conv(hidden, hidden, 3, group=hidden)
        self.act = GELU()
        self.fc2 = conv(hidden, dim, then="add")
        self.depthwise_gelu, self.whole, self.added = kernels.depthwise_gelu(1), kernels.mlp(), kernels.mlp_added()

    def weights(self, before: Optional[Affine] = None) -> tuple[Tensor, ...]:
        """Weight and bias of the three convolutions, the first with the batch norm before it where one is given."""
        fc1, dwconv, fc2 = self.fc1, self.dwconv, self.fc2
        weight, bias = (fc1.weight, fc1.bias) if before is None else fc1.behind(before)
        return weight, bias, dwconv.weight, dwconv.bias, fc2.weight, fc2.bias

    def is_one_operator(self, x: Tensor) -> bool:
        """Whether the hidden maps are so large that keeping them out of the memory is worth computing them again."""
        least = LARGE_MAP_IN_TRAINING if self.training else LARGE_MAP
        return self.whole is not None and self.whole.takes(x) and x.shape[2] * x.shape[3] >= least

    def add_to(self, shortcut: Tensor, x: Tensor, scale: Tensor, before: Optional[Affine] = None) -> Tensor:
        """shortcut + scale * mlp(x), for inference by operators. scale (C,); `before`: see `PointwiseConv.then`."""
        if self.is_one_operator(x):
            return self.added(x, *self.weights(before), scale, shortcut)
        hidden = self.depthwise_gelu(self.fc1.then(x, None, None, before), self.dwconv.weight, self.dwconv.bias)
        return self.fc2.then(hidden, shortcut, (scale, self.fc2.zeros))

    def construct(self, x: Tensor) -> Tensor:
        if self.is_one_operator(x):
            return self.whole(x, *self.weights())
        x = self.fc1(x)
        if self.depthwise_gelu is not None and self.depthwise_gelu.takes(x):
            return self.fc2(self.depthwise_gelu(x, self.dwconv.weight, self.dwconv.bias))
        return self.fc2(self.act(self.dwconv(x)))


class Attention(nn.Cell):
    """1x1 convolution, GELU, the spatial part of the attention, 1x1 convolution, and a shortcut.

    (B, C, H, W) -> (B, C, H, W)
    """

    def __init__(self, dim: int, spatial: nn.Cell) -> None:
        super().__init__()
        self.proj_1 = conv(dim, dim, then="gelu")
        self.act = GELU()
        self.spatial = spatial
        self.proj_2 = conv(dim, dim, then="add")

    def branch(self, x: Tensor) -> Tensor:
        """What is added to the shortcut."""
        return self.proj_2(self.spatial(self.act(self.proj_1(x))))

    def add_to(self, shortcut: Tensor, x: Tensor, norm: Affine, before: Affine) -> Tensor:
        """shortcut + norm(branch(before(x))), for inference by operators."""
        attended, last_norm = self.spatial.before_norm(self.proj_1.then(x, None, None, before))
        return self.proj_2.then(attended, shortcut, norm, last_norm)

    def construct(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Block(nn.Cell):
    """x + scale_1 * attention(norm(x)), then x + scale_2 * mlp(norm(x)). (B, C, H, W) -> (B, C, H, W)

    `uniform` (B, 2) drives the two stochastic depths.
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
        self.residual = kernels.residual()
        self.none, self.one = Tensor(np.zeros(1, np.float32)), Tensor(np.ones(1, np.float32))

    def construct(self, x: Tensor, uniform: Optional[Tensor] = None) -> Tensor:
        if self.residual is None or not self.residual.takes(x):
            return self._by_plain_operators(x, uniform)
        # Batch norms may be in training alone, to take new statistics.
        training = self.training or self.norm1.training or self.norm2.training
        return self._trained(x, uniform) if training else self._inferred(x)

    def _by_plain_operators(self, x: Tensor, uniform: Optional[Tensor]) -> Tensor:
        first, second = _decisions(uniform)
        x = x + self.drop_path(self.layer_scale_1.reshape(-1, 1, 1) * self.attn(self.norm1(x)), first)
        return x + self.drop_path(self.layer_scale_2.reshape(-1, 1, 1) * self.mlp(self.norm2(x)), second)

    def _trained(self, x: Tensor, uniform: Optional[Tensor]) -> Tensor:
        first, second = _decisions(uniform)
        y = self.norm1(x)
        x = self.residual(self.attn.branch(y), y, x, self.layer_scale_1, self.drop_path.factors(x, first))
        y = self.mlp(self.norm2(x))
        return self.residual(y, self.none, x, self.layer_scale_2, self.drop_path.factors(x, second))

    def _inferred(self, x: Tensor) -> Tensor:
        """The norms are worked into the weights behind them, which takes less time than norms of whole maps."""
        weight = self.layer_scale_1
        scale, shift = self.norm1.affine()
        # x + weight * (norm1(x) + branch) is x * (1 + weight * scale) + weight * (shift + branch)
        shortcut = self.residual(x, self.none, self.none, 1 + weight * scale, self.one)
        x = self.attn.add_to(shortcut, x, (weight, weight * shift), (scale, shift))
        return self.mlp.add_to(x, x, self.layer_scale_2, self.norm2.affine())


def _decisions(uniform: Optional[Tensor]) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """The numbers of either stochastic depth."""
    return (None, None) if uniform is None else (uniform[:, 0], uniform[:, 1])


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
