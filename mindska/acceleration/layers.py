"""Forms of single layers: convolutions, norms, GELU."""

from __future__ import annotations

from typing import Optional

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ..kernels import operators
from ..models.layers.blocks import GELU, LayerNorm2d
from .form import Form


def geometry(conv: nn.Conv2d) -> str:
    """Which operator computes a convolution: "pointwise", "depthwise", "grouped", "strided", or "" for none.

    The padding must keep the size (divided by the stride). Where more than one operator could do it, or MindSpore's own
    is the faster one, the choice is the measured one (docs/speed.md).
    """
    (high, wide), (dilation, _), stride = conv.kernel_size, conv.dilation, conv.stride[0]
    padding = (conv.padding,) * 4 if isinstance(conv.padding, int) else tuple(conv.padding)
    vertical, horizontal = dilation * (high // 2), dilation * (wide // 2)
    keeps_size = conv.pad_mode == "pad" and padding == (vertical, vertical, horizontal, horizontal)
    if not keeps_size or high % 2 == 0 or wide % 2 == 0 or len({*conv.stride}) > 1 or len({*conv.dilation}) > 1:
        return ""
    if high == wide == stride == 1:
        return "pointwise"
    if conv.in_channels == conv.out_channels == conv.group and stride == 1:
        return "depthwise"
    if high == wide and (conv.group > 1) != (stride > 1):
        return "grouped" if conv.group > 1 else "strided"
    return ""


def bias_of(conv: nn.Conv2d) -> Tensor:
    """A convolution's bias (O,): zeros where it has none."""
    return conv.bias if conv.has_bias else Tensor(np.zeros(conv.out_channels, np.float32))


def operator_of(conv: nn.Conv2d, relu: bool = False) -> Optional[nn.Cell]:
    """The operator (x, weight, bias) of a convolution, and a ReLU where asked for; None where there is none."""
    dilation, stride = conv.dilation[0], conv.stride[0]
    return {
        "pointwise": lambda: None if relu else operators.Pointwise(),
        "depthwise": lambda: None if relu else operators.Depthwise(dilation),
        "grouped": lambda: operators.Grouped(dilation, relu),
        "strided": lambda: operators.Strided(stride, dilation, relu),
        "": lambda: None,
    }[geometry(conv)]()


class FusedConv2d(Form, nn.Conv2d):
    """Convolution and bias in one operator."""

    stands_for, plain = nn.Conv2d, nn.Conv2d.construct

    @classmethod
    def fits(cls, cell: nn.Conv2d) -> bool:
        return bool(geometry(cell))

    def prepare(self) -> None:
        self.operator = operator_of(self)
        if not self.has_bias:
            self.zeros = bias_of(self)

    def in_inference(self, x: Tensor) -> Tensor:
        return self.operator(x, self.weight, self.bias if self.has_bias else self.zeros)

    in_training = in_inference


class FusedGELU(Form, GELU):
    """GELU in one operator, and its gradient in another."""

    stands_for, plain, plain_bprop = GELU, GELU.construct, GELU.bprop

    def prepare(self) -> None:
        self.operator = operators.Gelu()

    def in_inference(self, x: Tensor) -> Tensor:
        return self.operator(x)

    in_training = in_inference

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return self.operator.bprop(x, out, dout) if self.accepts(x) else self.plain_bprop(x, out, dout)


class FusedLayerNorm2d(Form, LayerNorm2d):
    """Layer norm over the channels where they lie, without transposing."""

    stands_for, plain = LayerNorm2d, LayerNorm2d.construct

    def prepare(self) -> None:
        self.operator = operators.LayerNorm(self.epsilon)

    def in_inference(self, x: Tensor) -> Tensor:
        return self.operator(x, self.gamma, self.beta)

    in_training = in_inference


class FusedBatchNorm2d(Form, nn.BatchNorm2d):
    """Batch norm in training: statistics, result and running statistics in one pass less."""

    stands_for, plain = nn.BatchNorm2d, nn.BatchNorm2d.construct
    in_inference = plain

    @classmethod
    def fits(cls, cell: nn.BatchNorm2d) -> bool:
        return cell.use_batch_statistics is None  # as `training` says

    def prepare(self) -> None:
        self.operator = operators.BatchNorm(self.eps, 1 - self.momentum)

    def in_training(self, x: Tensor) -> Tensor:
        return normalised(self.operator, x, self.gamma, self.beta, self.moving_mean, self.moving_variance)


def normalised(
    operator: operators.BatchNorm, x: Tensor, gamma: Parameter, beta: Parameter, mean: Parameter, variance: Parameter
) -> Tensor:
    """Batch norm of x in training (and ReLU, where the operator has it); moves the running statistics."""
    y, _, _, new_mean, new_variance = operator(x, gamma, beta, mean, variance)
    y = ops.depend(y, ops.assign(mean, ops.stop_gradient(new_mean)))
    return ops.depend(y, ops.assign(variance, ops.stop_gradient(new_variance)))
