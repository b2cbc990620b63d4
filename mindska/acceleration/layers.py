"""Accelerated forms of single layers: convolutions, norms, GELU."""

from __future__ import annotations

from typing import Optional

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ..kernels import operators
from ..models.layers.blocks import GELU, LayerNorm2d
from .form import AcceleratedForm

# Where Winograd's algorithm is faster than MindSpore's own convolution: with fewer pixels in a batch, transforming the
# weight costs more than it saves; with fewer channels or a larger dilation, transforming the maps.
WINOGRAD_MIN_PIXELS = 256
WINOGRAD_MIN_CHANNELS = 16
WINOGRAD_MAX_DILATION = 4


def has_odd_kernel_and_keeps_size(conv: nn.Conv2d) -> bool:
    """Whether a convolution's padding keeps the size (divided by the stride), its kernel's sides are odd, and stride
    and dilation are the same for both axes."""
    (high, wide), (dilation, _) = conv.kernel_size, conv.dilation
    padding = (conv.padding,) * 4 if isinstance(conv.padding, int) else tuple(conv.padding)
    vertical, horizontal = dilation * (high // 2), dilation * (wide // 2)
    keeps_size = conv.pad_mode == "pad" and padding == (vertical, vertical, horizontal, horizontal)
    return keeps_size and high % 2 == wide % 2 == 1 and len({*conv.stride}) == len({*conv.dilation}) == 1


def conv_kind(conv: nn.Conv2d) -> str:
    """Which operator computes a convolution: "pointwise", "depthwise", "grouped", "strided", "winograd" (on maps of at
    least `min_pixels`), or "" for MindSpore's own.

    The padding must keep the size (divided by the stride). Where several could compute it, this is the one that was the
    fastest on two cores of an x86-64 with AVX-512.
    """
    (high, wide), (dilation, _), stride = conv.kernel_size, conv.dilation, conv.stride[0]
    if not has_odd_kernel_and_keeps_size(conv):
        return ""
    if high == wide == stride == 1:
        return "pointwise"
    if conv.in_channels == conv.out_channels == conv.group and stride == 1:
        return "depthwise"
    if high == wide and (conv.group > 1) != (stride > 1):
        return "grouped" if conv.group > 1 else "strided"
    if high == wide == 3 and dilation <= WINOGRAD_MAX_DILATION and conv.group == 1:
        return "winograd" if min(conv.in_channels, conv.out_channels) >= WINOGRAD_MIN_CHANNELS else ""
    return ""


def min_pixels(conv: nn.Conv2d) -> int:
    """The pixels of a batch from which on a convolution is computed by its operator; with fewer by MindSpore's own."""
    return WINOGRAD_MIN_PIXELS if conv_kind(conv) == "winograd" else 0


def pixels(x: Tensor) -> int:
    """Of a batch (B, C, H, W)."""
    return x.shape[0] * x.shape[2] * x.shape[3]


def bias_or_zeros(conv: nn.Conv2d) -> Tensor:
    """A convolution's bias (O,): zeros where it has none."""
    return conv.bias if conv.has_bias else Tensor(np.zeros(conv.out_channels, np.float32))


def conv_operator(conv: nn.Conv2d, relu: bool = False) -> Optional[nn.Cell]:
    """The operator (x, weight, bias) -> y of a convolution, and of a ReLU after it when `relu`; None: there is none."""
    kind, dilation, stride = conv_kind(conv), conv.dilation[0], conv.stride[0]
    if kind == "grouped":
        return operators.Grouped(dilation, relu)
    if kind == "strided":
        return operators.Strided(stride, dilation, relu)
    if kind == "winograd":
        return operators.Winograd(dilation, relu)
    if kind == "pointwise" and not relu:
        return operators.Pointwise()
    return operators.Depthwise(dilation) if kind == "depthwise" and not relu else None


class FusedConv2d(AcceleratedForm, nn.Conv2d):
    """Convolution and bias in one operator."""

    plain_class, plain = nn.Conv2d, nn.Conv2d.construct

    @classmethod
    def supports(cls, cell: nn.Conv2d) -> bool:
        return bool(conv_kind(cell))

    def prepare(self) -> None:
        self.operator: nn.Cell = conv_operator(self)
        self.min_pixels = min_pixels(self)
        if not self.has_bias:
            self.zeros = bias_or_zeros(self)

    def uses_plain(self, x: Tensor) -> bool:
        return not self.accepts(x) or pixels(x) < self.min_pixels

    def in_inference(self, x: Tensor) -> Tensor:
        return self.operator(x, self.weight, self.bias if self.has_bias else self.zeros)

    in_training = in_inference


class FusedGELU(AcceleratedForm, GELU):
    """GELU in one operator, and its gradient in another."""

    plain_class, plain, plain_bprop = GELU, GELU.construct, GELU.bprop

    def prepare(self) -> None:
        self.operator = operators.Gelu()

    def in_inference(self, x: Tensor) -> Tensor:
        return self.operator(x)

    in_training = in_inference

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return self.operator.bprop(x, out, dout) if self.accepts(x) else self.plain_bprop(x, out, dout)


class FusedLayerNorm2d(AcceleratedForm, LayerNorm2d):
    """Layer norm over the channels of (B, C, H, W) without transposing."""

    plain_class, plain = LayerNorm2d, LayerNorm2d.construct

    def prepare(self) -> None:
        self.operator = operators.LayerNorm(self.epsilon)

    def in_inference(self, x: Tensor) -> Tensor:
        return self.operator(x, self.gamma, self.beta)

    in_training = in_inference


class FusedBatchNorm2d(AcceleratedForm, nn.BatchNorm2d):
    """Batch norm in training in one operator: statistics of the batch, result and running statistics."""

    plain_class, plain = nn.BatchNorm2d, nn.BatchNorm2d.construct
    in_inference = plain

    @classmethod
    def supports(cls, cell: nn.BatchNorm2d) -> bool:
        return cell.use_batch_statistics is None  # as `training` says

    def prepare(self) -> None:
        # nn.BatchNorm2d keeps 1 minus the momentum that it was given.
        self.operator = operators.BatchNorm(self.eps, 1 - self.momentum)

    def in_training(self, x: Tensor) -> Tensor:
        return batch_norm_in_training(self.operator, x, self.gamma, self.beta, self.moving_mean, self.moving_variance)


def batch_norm_in_training(
    operator: operators.BatchNorm, x: Tensor, gamma: Parameter, beta: Parameter, mean: Parameter, variance: Parameter
) -> Tensor:
    """Batch norm of x (B, C, H, W) in training, and ReLU where the operator has it; updates the running statistics."""
    y, _, _, new_mean, new_variance = operator(x, gamma, beta, mean, variance)
    y = ops.depend(y, ops.assign(mean, ops.stop_gradient(new_mean)))
    return ops.depend(y, ops.assign(variance, ops.stop_gradient(new_variance)))
