"""The C++ operators as cells, each with its gradient."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from .build import keep_library, library
from .signatures import signatures

TYPES = {"float32": ms.float32, "int32": ms.int32}


def operator(name: str, **numbers: int) -> ops.Custom:
    """The operator mindska_NAME. `numbers`: those that its signature names, in its order.

    Called with tensors that its signature does not allow it raises a SettingError, before anything runs.
    """
    signature = signatures()[name]
    if tuple(numbers) != signature.numbers:
        raise TypeError(f"{name} takes the numbers {signature.numbers}, not {tuple(numbers)}")
    numbers = {key: int(value) for key, value in numbers.items()}

    def shapes(*found: list[int]) -> Any:
        keep_library(signature.file)  # this is called when something is compiled, which then looks for the file
        inferred = signature.infer(found, numbers)
        return tuple(inferred) if len(inferred) > 1 else inferred[0]

    def types(*found: ms.Type) -> Any:
        inferred = signature.check_types([_name_of(kind) for kind in found])
        return tuple(TYPES[kind] for kind in inferred) if len(inferred) > 1 else TYPES[inferred[0]]

    made = ops.Custom(f"{library(signature.file)}:mindska_{name}", shapes, types, func_type="aot")
    # PyNative mode keeps the shapes of operators with the same attributes and inputs: what else they depend on, such as
    # a stride, has to be among the attributes.
    for key, value in numbers.items():
        made.add_prim_attr(key, value)
    return made


def _name_of(kind: ms.Type) -> str:
    return str(getattr(kind, "element_type", lambda: kind)()).lower()


def array(**numbers: int) -> Tensor:
    """The numbers of a signature as the operator takes them, in its order."""
    return Tensor(np.int32(list(numbers.values())))


class Gelu(nn.Cell):
    """GELU; its gradient is an operator as well."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("gelu")
        self.backward = operator("gelu_grad")

    def construct(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (self.backward(x, dout),)


class Depthwise(nn.Cell):
    """Depthwise convolution. Inputs: x (B, C, H, W), weight (C, 1, KH, KW), bias (C,)."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = array(dilation=dilation)
        self.forward = operator("depthwise", dilation=dilation)
        self.backward = operator("depthwise_grad", dilation=dilation)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.forward(x, weight, bias, self.dilation)

    def bprop(self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return self.backward(x, weight, self.dilation, dout)


class DepthwiseGelu(nn.Cell):
    """Depthwise convolution and GELU. Inputs as of `Depthwise`."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.keeping, self.forgetting = KeepingDepthwiseGelu(dilation), ForgettingDepthwiseGelu(dilation)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if self.training:
            return self.keeping(x, weight, bias)[0]
        return self.forgetting(x, weight, bias)


class KeepingDepthwiseGelu(nn.Cell):
    """(after the GELU, before it): the gradient needs both."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = array(dilation=dilation)
        self.forward = operator("depthwise_gelu_keeping", dilation=dilation)
        self.backward = operator("depthwise_gelu_grad", dilation=dilation)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(x, weight, bias, self.dilation)

    def bprop(self, x: Tensor, weight: Tensor, bias: Tensor, out: tuple, dout: tuple) -> tuple[Tensor, ...]:
        return self.backward(x, weight, self.dilation, dout[0], out[1])


class ForgettingDepthwiseGelu(KeepingDepthwiseGelu):
    """After the GELU only, for inference; a gradient computes again what it needs."""

    def __init__(self, dilation: int) -> None:
        super().__init__(dilation)
        self.lean = operator("depthwise_gelu", dilation=dilation)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.lean(x, weight, bias, self.dilation)

    def bprop(self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return self.backward(x, weight, self.dilation, dout, self.forward(x, weight, bias, self.dilation)[1])


class Pointwise(nn.Cell):
    """1x1 convolution. Inputs: x (B, C, H, W), weight (O, C / groups, 1, 1), bias (O,)."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("pointwise")
        self.backward = operator("pointwise_grad")

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.forward(x, weight, bias)

    def bprop(self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return self.backward(x, weight, dout)


THEN = ("", "gelu", "relu", "add", "add_relu", "gate", "times")


class PointwiseThen(nn.Cell):
    """1x1 convolution times scale plus shift, and what follows by `kind`, for inference; a gradient computes again what
    it needs.

    GELU, ReLU, plus `other` ("add"), ReLU of that sum, SiLU times `other` ("gate"), or times `other`.

    Inputs: x (B, C, H, W), weight (O, C / groups, 1, 1), scale (O,), shift (O,), other (B, O, H, W) or, where it is not
        used, any tensor.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.number = kind, array(kind=THEN.index(kind))
        self.pointwise, self.gelu = Pointwise(), Gelu()
        self.forward = operator("pointwise_then", kind=THEN.index(kind))

    def construct(self, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, other: Tensor) -> Tensor:
        return self.forward(x, weight, scale, shift, other, self.number)

    def bprop(self, x, weight, scale, shift, other, out, dout) -> tuple[Tensor, ...]:
        scaled = weight * scale.reshape(-1, 1, 1, 1)
        value = self.pointwise(x, scaled, shift)
        dvalue, dother = dout, other
        if self.kind == "gelu":
            dvalue = self.gelu.backward(value, dout)
        elif self.kind == "relu":
            dvalue = dout * (out > 0)
        elif self.kind == "add":
            dother = dout
        elif self.kind == "add_relu":
            dvalue = dother = dout * (out > 0)
        elif self.kind == "gate":
            gate = ops.sigmoid(value)
            dvalue, dother = dout * other * (gate + value * gate * (1 - gate)), dout * value * gate
        elif self.kind == "times":
            dvalue, dother = dout * other, dout * value
        if self.kind in ("", "gelu", "relu"):
            dother = ops.zeros_like(other)
        dx, dscaled, dshift = self.pointwise.backward(x, scaled, dvalue)
        return dx, dscaled * scale.reshape(-1, 1, 1, 1), (dscaled * weight).sum((1, 2, 3)), dshift, dother


class Mlp(nn.Cell):
    """1x1 convolution, depthwise 3x3, GELU, 1x1 convolution; the gradient computes the hidden maps again.

    Inputs: x (B, C, H, W); weight and bias of the three convolutions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("mlp")
        self.backward = operator("mlp_grad")

    def construct(self, x, weight1, bias1, taps, bias, weight2, bias2) -> Tensor:
        return self.forward(x, weight1, bias1, taps, bias, weight2, bias2)

    def bprop(self, x, weight1, bias1, taps, bias, weight2, bias2, out, dout) -> tuple[Tensor, ...]:
        return self.backward(x, weight1, bias1, taps, bias, weight2, dout)


class MlpAdded(nn.Cell):
    """shortcut + scale * mlp(x), for inference. Inputs: those of `Mlp`, scale (C,), shortcut (B, C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()
        self.forward = operator("mlp_added")

    def construct(self, x, weight1, bias1, taps, bias, weight2, bias2, scale, shortcut) -> Tensor:
        return self.forward(x, weight1, bias1, taps, bias, weight2, bias2, scale, shortcut)

    def bprop(self, x, weight1, bias1, taps, bias, weight2, bias2, scale, shortcut, out, dout) -> tuple[Tensor, ...]:
        dscale = (dout * self.mlp(x, weight1, bias1, taps, bias, weight2, bias2)).sum((0, 2, 3))
        slopes = self.mlp.backward(x, weight1, bias1, taps, bias, weight2, dout * scale.reshape(-1, 1, 1))
        dx, dweight1, dbias1, dtaps, dbias, dweight2, dbias2 = slopes
        return dx, dweight1, dbias1, dtaps, dbias, dweight2, dbias2, dscale, dout


class LayerNorm(nn.Cell):
    """Layer norm over the channels. Inputs: x (B, C, H, W), gamma (C,), beta (C,)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = Tensor(np.float32([eps]))
        self.forward = operator("layer_norm")
        self.backward = operator("layer_norm_grad")

    def construct(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return self.forward(x, gamma, beta, self.eps)

    def bprop(self, x: Tensor, gamma: Tensor, beta: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return self.backward(x, gamma, self.eps, dout)


class BatchNorm(nn.Cell):
    """Batch norm in training, and ReLU when `relu`.

    Inputs: x (B, C, H, W); gamma, beta, running mean and variance (C,).

    Returns:
        The result, the mean and one over the standard deviation, the new running mean and variance.
    """

    def __init__(self, eps: float, momentum: float, relu: bool = False) -> None:
        super().__init__()
        self.options = Tensor(np.float32([eps, momentum, relu]))
        self.forward = operator("batch_norm")
        self.backward = operator("batch_norm_grad")

    def construct(self, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
        return self.forward(x, gamma, beta, mean, variance, self.options)

    def bprop(self, x, gamma, beta, mean, variance, out: tuple, dout: tuple) -> tuple[Tensor, ...]:
        dx, dgamma, dbeta = self.backward(x, gamma, out[1], out[2], out[0], self.options, dout[0])
        return dx, dgamma, dbeta, ops.zeros_like(mean), ops.zeros_like(variance)


class AffineOfNorm(nn.Cell):
    """Scale and shift (C,) of a batch norm in evaluation. Inputs: gamma, beta, running mean and variance (C,)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = Tensor(np.float32([eps]))
        self.forward = operator("affine")

    def construct(self, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(gamma, beta, mean, variance, self.eps)

    def bprop(self, gamma, beta, mean, variance, out: tuple, dout: tuple) -> tuple[Tensor, ...]:
        inverse = 1 / ops.sqrt(variance + self.eps)
        dscale = dout[0] - mean * dout[1]
        return dscale * inverse, dout[1], -out[0] * dout[1], -0.5 * dscale * out[0] * inverse * inverse


class Behind(nn.Cell):
    """Weight and bias of the 1x1 convolution of scale * x + shift.

    Inputs: weight (O, C, 1, 1), bias (O,), scale, shift (C,).
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("behind")

    def construct(self, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(weight, bias, scale, shift)

    def bprop(self, weight, bias, scale, shift, out: tuple, dout: tuple) -> tuple[Tensor, ...]:
        dscaled, dbias = dout[0], dout[1].reshape(-1, 1, 1, 1)
        columns = (1, -1, 1, 1)
        dweight = dscaled * scale.reshape(columns) + dbias * shift.reshape(columns)
        return dweight, dout[1], (dscaled * weight).sum((0, 2, 3)), (dbias * weight).sum((0, 2, 3))


class SquareSum(nn.Cell):
    """The sum of the squares of tensors, one operator for all of them: (...,), ... -> ()"""

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("square_sum")

    def construct(self, tensors: tuple[Tensor, ...]) -> Tensor:
        return self.forward(*tensors).reshape(())


class Grouped(nn.Cell):
    """Convolution in groups, and ReLU when `relu`. Inputs: x (B, C, H, W), weight (O, C / groups, K, K), bias (O,)."""

    def __init__(self, dilation: int, relu: bool = False) -> None:
        super().__init__()
        numbers = dict(dilation=dilation, relu=relu)
        self.relu, self.options = relu, array(**numbers)
        self.forward, self.backward = operator("grouped", **numbers), operator("grouped_grad", **numbers)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.forward(x, weight, bias, self.options)

    def bprop(self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return self.backward(x, weight, self.options, dout * (out > 0) if self.relu else dout)


class Strided(nn.Cell):
    """Convolution with a stride, and ReLU when `relu`: (B, O, H / stride, W / stride), rounded up.

    Inputs: x (B, C, H, W), weight (O, C, K, K), bias (O,).
    """

    def __init__(self, stride: int, dilation: int, relu: bool = False) -> None:
        super().__init__()
        numbers = dict(stride=stride, dilation=dilation, relu=relu)
        self.relu, self.options = relu, array(**numbers)
        self.forward = operator("strided", **numbers)
        # Two operators: the first layer of a network needs the weight's gradient only.
        self.input_gradient = operator("strided_input_grad", **numbers)
        self.weight_gradient = operator("strided_weight_grad", **numbers)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.forward(x, weight, bias, self.options)

    def bprop(self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        slope = dout * (out > 0) if self.relu else dout
        dweight, dbias = self.weight_gradient(x, weight, self.options, slope)
        return self.input_gradient(x, weight, self.options, slope), dweight, dbias


class Fuse(nn.Cell):
    """The mean over the pixels of the sum of two maps (B, C, H, W): (B, C, 1, 1)"""

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("fuse")

    def construct(self, first: Tensor, second: Tensor) -> Tensor:
        return self.forward(first, second)

    def bprop(self, first: Tensor, second: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        slope = ops.broadcast_to(dout / (first.shape[2] * first.shape[3]), first.shape)
        return slope, slope


class Select(nn.Cell):
    """Two maps (B, C, H, W), each times its weights, and summed. weights (B, 2, C)"""

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("select")
        self.backward = operator("select_grad")

    def construct(self, first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
        return self.forward(first, second, weights)

    def bprop(self, first: Tensor, second: Tensor, weights: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return self.backward(first, second, weights, dout)


class SplitDepthwise(nn.Cell):
    """Two depthwise convolutions on the last channels, the others untouched, plus `identity` times the input.

    Inputs: x (B, C, H, W); weight and bias of the first convolution (C1, 1, K, K), (C1,) and of the second.
    """

    def __init__(self, dilation1: int, dilation2: int, identity: int) -> None:
        super().__init__()
        numbers = dict(dilation1=dilation1, dilation2=dilation2, identity=identity)
        self.options = array(**numbers)
        self.forward = operator("split_depthwise", **numbers)
        self.backward = operator("split_depthwise_grad", **numbers)

    def construct(self, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        return self.forward(x, weight1, bias1, weight2, bias2, self.options)

    def bprop(self, x, weight1, bias1, weight2, bias2, out, dout) -> tuple[Tensor, ...]:
        return self.backward(x, weight1, weight2, self.options, dout)


class Residual(nn.Cell):
    """shortcut + keep * scale * (first + second): a residual branch, stochastic depth included.

    Inputs: first, second, shortcut (B, C, H, W), scale (C,), keep (B,) or (1,). A tensor of one number stands for a
        `second` or a `shortcut` that is not there. `keep` gets no gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("residual")
        self.backward = operator("residual_grad")

    def construct(self, first: Tensor, second: Tensor, shortcut: Tensor, scale: Tensor, keep: Tensor) -> Tensor:
        return self.forward(first, second, shortcut, scale, keep)

    def bprop(self, first, second, shortcut, scale, keep, out, dout) -> tuple[Tensor, ...]:
        slope, dscale = self.backward(first, second, scale, keep, dout)
        dsecond = slope if second.ndim == 4 else ops.zeros_like(second)
        dshortcut = dout if shortcut.ndim == 4 else ops.zeros_like(shortcut)
        return slope, dsecond, dshortcut, dscale, ops.zeros_like(keep)


class Gate(nn.Cell):
    """SiLU(gate) * x. Inputs: gate, x of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("gate")
        self.backward = operator("gate_grad")

    def construct(self, gate: Tensor, x: Tensor) -> Tensor:
        return self.forward(gate, x)

    def bprop(self, gate: Tensor, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        return self.backward(gate, x, dout)


class MaxRelative(nn.Cell):
    """Nearest nodes and the maximum over them. Inputs: x (B, C, H, W), y (B, C, h, w), position (h w, H W).

    Returns:
        (B, 2 C, H, W), the channels x_0, d_0, x_1, d_1, ...; and the neighbours (B, H W, k) int32.
    """

    def __init__(self, k: int, dilation: int) -> None:
        super().__init__()
        self.k = k
        numbers = dict(k=k, dilation=dilation)
        self.options = array(**numbers)
        self.forward, self.backward = operator("max_relative", **numbers), operator("max_relative_grad", **numbers)

    def construct(self, x: Tensor, y: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(x, y, position, self.options)

    def bprop(self, x: Tensor, y: Tensor, position: Tensor, out: tuple, dout: tuple) -> tuple[Tensor, ...]:
        dx, dy = self.backward(y, out[1], dout[0], self.options)
        return dx, dy, ops.zeros_like(position)
