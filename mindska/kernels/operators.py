"""The C++ operators as cells, each with its gradient."""

from __future__ import annotations

from inspect import getclosurevars
from typing import Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from .build import library


def operator(file: str, name: str, shapes: Callable, types: Callable) -> ops.Custom:
    """The operator mindska_NAME of FILE.cc; its outputs' shapes and types from its inputs'."""
    made = ops.Custom(f"{library(file)}:mindska_{name}", shapes, types, func_type="aot")
    # PyNative mode keeps the shapes of operators with the same attributes and inputs: what else they depend on, such as
    # a stride, has to be among the attributes.
    for key, value in getclosurevars(shapes).nonlocals.items():
        made.add_prim_attr(key, value)
    return made


class Operator(nn.Cell):
    """The base of the operators, which know float32 only."""

    def __init__(self) -> None:
        super().__init__()
        self.in_half_precision = False

    def add_flags_recursive(self, **flags) -> nn.Cell:
        # The levels of mixed precision O2 and O3 set these on every cell of a network. In PyNative mode the inputs of
        # each operator are turned afterwards, where no layer sees it.
        if "fp16" in flags or "bf16" in flags:  # others come this way as well: `training`
            self.in_half_precision = bool(flags.get("fp16") or flags.get("bf16"))
        return super().add_flags_recursive(**flags)

    def takes(self, x: Tensor) -> bool:
        """Whether a layer may give x to the operator."""
        return x.dtype == ms.float32 and not self.in_half_precision


class Gelu(Operator):
    """GELU; its gradient is an operator as well."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("gelu", "gelu", lambda x: x, lambda x: x)
        self.backward = operator("gelu", "gelu_grad", lambda x, dy: x, lambda x, dy: x)

    def construct(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (self.backward(x, dout),)


class Depthwise(Operator):
    """Depthwise convolution. Inputs: x (B, C, H, W), weight (C, 1, KH, KW), bias (C,)."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = Tensor(np.int32([dilation]))
        self.forward = operator("depthwise", "depthwise", lambda x, w, b, d: x, lambda x, w, b, d: x)
        self.backward = operator(
            "depthwise", "depthwise_grad", lambda x, w, d, dy: (x, w, [w[0]]), lambda x, w, d, dy: (x, x, x)
        )

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.forward(x, weight, bias, self.dilation)

    def bprop(self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return self.backward(x, weight, self.dilation, dout)


class DepthwiseGelu(Operator):
    """Depthwise convolution and GELU. Inputs as of `Depthwise`."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.keeping, self.forgetting = KeepingDepthwiseGelu(dilation), ForgettingDepthwiseGelu(dilation)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if self.training:
            return self.keeping(x, weight, bias)[0]
        return self.forgetting(x, weight, bias)


class KeepingDepthwiseGelu(Operator):
    """(after the GELU, before it): the gradient needs both."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = Tensor(np.int32([dilation]))
        self.forward = operator(
            "depthwise", "depthwise_gelu_keeping", lambda x, w, b, d: (x, x), lambda x, w, b, d: (x, x)
        )
        self.backward = operator(
            "depthwise", "depthwise_gelu_grad", lambda x, w, d, dz, y: (x, w, [w[0]]), lambda x, w, d, dz, y: (x, x, x)
        )

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(x, weight, bias, self.dilation)

    def bprop(self, x: Tensor, weight: Tensor, bias: Tensor, out: tuple, dout: tuple) -> tuple[Tensor, ...]:
        return self.backward(x, weight, self.dilation, dout[0], out[1])


class ForgettingDepthwiseGelu(KeepingDepthwiseGelu):
    """After the GELU only, for inference; a gradient computes again what it needs."""

    def __init__(self, dilation: int) -> None:
        super().__init__(dilation)
        self.lean = operator("depthwise", "depthwise_gelu", lambda x, w, b, d: x, lambda x, w, b, d: x)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.lean(x, weight, bias, self.dilation)

    def bprop(self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return self.backward(x, weight, self.dilation, dout, self.forward(x, weight, bias, self.dilation)[1])


class Pointwise(Operator):
    """1x1 convolution. Inputs: x (B, C, H, W), weight (O, C / groups, 1, 1), bias (O,)."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("pointwise", "pointwise", lambda x, w, b: [x[0], w[0], x[2], x[3]], lambda x, w, b: x)
        self.backward = operator(
            "pointwise", "pointwise_grad", lambda x, w, dy: (x, w, [w[0]]), lambda x, w, dy: (x, x, x)
        )

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.forward(x, weight, bias)

    def bprop(self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return self.backward(x, weight, dout)


THEN = ("", "gelu", "relu", "add", "add_relu", "gate", "times")


class PointwiseThen(Operator):
    """1x1 convolution times scale plus shift, and what follows by `kind`, for inference; a gradient computes again what
    it needs.

    GELU, ReLU, plus `other` ("add"), ReLU of that sum, SiLU times `other` ("gate"), or times `other`.

    Inputs: x (B, C, H, W), weight (O, C / groups, 1, 1), scale (O,), shift (O,), other (B, O, H, W) or, where it is not
        used, any tensor.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.number = kind, Tensor(np.int32([THEN.index(kind)]))
        self.pointwise, self.gelu = Pointwise(), Gelu()
        self.forward = operator(
            "pointwise", "pointwise_then",
            lambda x, w, s, t, o, k: [x[0], w[0], x[2], x[3]], lambda x, w, s, t, o, k: x,
        )  # fmt: skip

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


class Mlp(Operator):
    """1x1 convolution, depthwise 3x3, GELU, 1x1 convolution; the gradient computes the hidden maps again.

    Inputs: x (B, C, H, W); weight and bias of the three convolutions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("mlp", "mlp", lambda x, *others: x, lambda x, *others: x)
        self.backward = operator(
            "mlp", "mlp_grad",
            lambda x, w1, b1, t, b, w2, dy: (x, w1, b1, t, b, w2, [w2[0]]),
            lambda x, w1, b1, t, b, w2, dy: (x, x, x, x, x, x, x),
        )  # fmt: skip

    def construct(self, x, weight1, bias1, taps, bias, weight2, bias2) -> Tensor:
        return self.forward(x, weight1, bias1, taps, bias, weight2, bias2)

    def bprop(self, x, weight1, bias1, taps, bias, weight2, bias2, out, dout) -> tuple[Tensor, ...]:
        return self.backward(x, weight1, bias1, taps, bias, weight2, dout)


class MlpAdded(Operator):
    """shortcut + scale * mlp(x), for inference. Inputs: those of `Mlp`, scale (C,), shortcut (B, C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()
        self.forward = operator("mlp", "mlp_added", lambda x, *others: x, lambda x, *others: x)

    def construct(self, x, weight1, bias1, taps, bias, weight2, bias2, scale, shortcut) -> Tensor:
        return self.forward(x, weight1, bias1, taps, bias, weight2, bias2, scale, shortcut)

    def bprop(self, x, weight1, bias1, taps, bias, weight2, bias2, scale, shortcut, out, dout) -> tuple[Tensor, ...]:
        dscale = (dout * self.mlp(x, weight1, bias1, taps, bias, weight2, bias2)).sum((0, 2, 3))
        slopes = self.mlp.backward(x, weight1, bias1, taps, bias, weight2, dout * scale.reshape(-1, 1, 1))
        dx, dweight1, dbias1, dtaps, dbias, dweight2, dbias2 = slopes
        return dx, dweight1, dbias1, dtaps, dbias, dweight2, dbias2, dscale, dout


class LayerNorm(Operator):
    """Layer norm over the channels. Inputs: x (B, C, H, W), gamma (C,), beta (C,)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = Tensor(np.float32([eps]))
        self.forward = operator("layer_norm", "layer_norm", lambda x, g, b, e: x, lambda x, g, b, e: x)
        self.backward = operator(
            "layer_norm", "layer_norm_grad", lambda x, g, e, dy: (x, g, g), lambda x, g, e, dy: (x, x, x)
        )

    def construct(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return self.forward(x, gamma, beta, self.eps)

    def bprop(self, x: Tensor, gamma: Tensor, beta: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return self.backward(x, gamma, self.eps, dout)


class BatchNorm(Operator):
    """Batch norm in training, and ReLU when `relu`.

    Inputs: x (B, C, H, W); gamma, beta, running mean and variance (C,).

    Returns:
        The result, the mean and one over the standard deviation, the new running mean and variance.
    """

    def __init__(self, eps: float, momentum: float, relu: bool = False) -> None:
        super().__init__()
        self.options = Tensor(np.float32([eps, momentum, relu]))
        self.forward = operator(
            "batch_norm", "batch_norm", lambda x, g, b, m, v, o: (x, g, g, g, g), lambda x, g, b, m, v, o: (x,) * 5
        )
        self.backward = operator(
            "batch_norm", "batch_norm_grad", lambda x, g, m, i, y, o, d: (x, g, g), lambda x, g, m, i, y, o, d: (x,) * 3
        )

    def construct(self, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
        return self.forward(x, gamma, beta, mean, variance, self.options)

    def bprop(self, x, gamma, beta, mean, variance, out: tuple, dout: tuple) -> tuple[Tensor, ...]:
        dx, dgamma, dbeta = self.backward(x, gamma, out[1], out[2], out[0], self.options, dout[0])
        return dx, dgamma, dbeta, ops.zeros_like(mean), ops.zeros_like(variance)


class AffineOfNorm(Operator):
    """Scale and shift (C,) of a batch norm in evaluation. Inputs: gamma, beta, running mean and variance (C,)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = Tensor(np.float32([eps]))
        self.forward = operator("fold", "affine", lambda g, b, m, v, e: (g, g), lambda g, b, m, v, e: (g, g))

    def construct(self, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(gamma, beta, mean, variance, self.eps)

    def bprop(self, gamma, beta, mean, variance, out: tuple, dout: tuple) -> tuple[Tensor, ...]:
        inverse = 1 / ops.sqrt(variance + self.eps)
        dscale = dout[0] - mean * dout[1]
        return dscale * inverse, dout[1], -out[0] * dout[1], -0.5 * dscale * out[0] * inverse * inverse


class Behind(Operator):
    """Weight and bias of the 1x1 convolution of scale * x + shift.

    Inputs: weight (O, C, 1, 1), bias (O,), scale, shift (C,).
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("fold", "behind", lambda w, b, s, t: (w, b), lambda w, b, s, t: (w, b))

    def construct(self, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(weight, bias, scale, shift)

    def bprop(self, weight, bias, scale, shift, out: tuple, dout: tuple) -> tuple[Tensor, ...]:
        dscaled, dbias = dout[0], dout[1].reshape(-1, 1, 1, 1)
        columns = (1, -1, 1, 1)
        dweight = dscaled * scale.reshape(columns) + dbias * shift.reshape(columns)
        return dweight, dout[1], (dscaled * weight).sum((0, 2, 3)), (dbias * weight).sum((0, 2, 3))


class SquareSum(Operator):
    """The sum of the squares of tensors, one operator for all of them: (...,), ... -> ()"""

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("square_sum", "square_sum", lambda *xs: [1], lambda *xs: xs[0])

    def construct(self, tensors: tuple[Tensor, ...]) -> Tensor:
        return self.forward(*tensors).reshape(())


class Grouped(Operator):
    """Convolution in groups, and ReLU when `relu`. Inputs: x (B, C, H, W), weight (O, C / groups, K, K), bias (O,)."""

    def __init__(self, dilation: int, relu: bool = False) -> None:
        super().__init__()
        self.relu, self.options = relu, Tensor(np.int32([dilation, relu]))
        self.forward = operator("grouped", "grouped", lambda x, w, b, d: [x[0], w[0], x[2], x[3]], lambda x, w, b, d: x)
        self.backward = operator(
            "grouped", "grouped_grad", lambda x, w, d, dy: (x, w, [w[0]]), lambda x, w, d, dy: (x, x, x)
        )

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.forward(x, weight, bias, self.options)

    def bprop(self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return self.backward(x, weight, self.options, dout * (out > 0) if self.relu else dout)


class Strided(Operator):
    """Convolution with a stride, and ReLU when `relu`: (B, O, H / stride, W / stride), rounded up.

    Inputs: x (B, C, H, W), weight (O, C, K, K), bias (O,).
    """

    def __init__(self, stride: int, dilation: int, relu: bool = False) -> None:
        super().__init__()
        self.relu, self.options = relu, Tensor(np.int32([stride, dilation, relu]))
        self.forward = operator(
            "strided", "strided",
            lambda x, w, b, o: [x[0], w[0], -(-x[2] // stride), -(-x[3] // stride)], lambda x, w, b, o: x,
        )  # fmt: skip
        # Two operators: the first layer of a network needs the weight's gradient only.
        self.input_gradient = operator("strided", "strided_input_grad", lambda x, w, o, dy: x, lambda x, w, o, dy: x)
        self.weight_gradient = operator(
            "strided", "strided_weight_grad", lambda x, w, o, dy: (w, [w[0]]), lambda x, w, o, dy: (x, x)
        )

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.forward(x, weight, bias, self.options)

    def bprop(self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        slope = dout * (out > 0) if self.relu else dout
        dweight, dbias = self.weight_gradient(x, weight, self.options, slope)
        return self.input_gradient(x, weight, self.options, slope), dweight, dbias


class Fuse(Operator):
    """The mean over the pixels of the sum of two maps (B, C, H, W): (B, C, 1, 1)"""

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("select", "fuse", lambda x, y: [x[0], x[1], 1, 1], lambda x, y: x)

    def construct(self, first: Tensor, second: Tensor) -> Tensor:
        return self.forward(first, second)

    def bprop(self, first: Tensor, second: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        slope = ops.broadcast_to(dout / (first.shape[2] * first.shape[3]), first.shape)
        return slope, slope


class Select(Operator):
    """Two maps (B, C, H, W), each times its weights, and summed. weights (B, 2, C)"""

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("select", "select", lambda x, y, w: x, lambda x, y, w: x)
        self.backward = operator("select", "select_grad", lambda x, y, w, dz: (x, y, w), lambda x, y, w, dz: (x, x, x))

    def construct(self, first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
        return self.forward(first, second, weights)

    def bprop(self, first: Tensor, second: Tensor, weights: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return self.backward(first, second, weights, dout)


class SplitDepthwise(Operator):
    """Two depthwise convolutions on the last channels, the others untouched, plus `identity` times the input.

    Inputs: x (B, C, H, W); weight and bias of the first convolution (C1, 1, K, K), (C1,) and of the second.
    """

    def __init__(self, dilation1: int, dilation2: int, identity: int) -> None:
        super().__init__()
        self.options = Tensor(np.int32([dilation1, dilation2, identity]))
        self.forward = operator("depthwise", "split_depthwise", lambda x, v, a, w, b, o: x, lambda x, v, a, w, b, o: x)
        self.backward = operator(
            "depthwise", "split_depthwise_grad",
            lambda x, v, w, o, dy: (x, v, [v[0]], w, [w[0]]),
            lambda x, v, w, o, dy: (x, x, x, x, x),
        )  # fmt: skip

    def construct(self, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        return self.forward(x, weight1, bias1, weight2, bias2, self.options)

    def bprop(self, x, weight1, bias1, weight2, bias2, out, dout) -> tuple[Tensor, ...]:
        return self.backward(x, weight1, weight2, self.options, dout)


class Residual(Operator):
    """shortcut + keep * scale * (first + second): a residual branch, stochastic depth included.

    Inputs: first, second, shortcut (B, C, H, W), scale (C,), keep (B,) or (1,). A tensor of one number stands for a
        `second` or a `shortcut` that is not there. `keep` gets no gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("residual", "residual", lambda x, y, z, s, k: x, lambda x, y, z, s, k: x)
        self.backward = operator(
            "residual", "residual_grad", lambda x, y, s, k, d: (x, s), lambda x, y, s, k, d: (x, x)
        )

    def construct(self, first: Tensor, second: Tensor, shortcut: Tensor, scale: Tensor, keep: Tensor) -> Tensor:
        return self.forward(first, second, shortcut, scale, keep)

    def bprop(self, first, second, shortcut, scale, keep, out, dout) -> tuple[Tensor, ...]:
        slope, dscale = self.backward(first, second, scale, keep, dout)
        dsecond = slope if second.ndim == 4 else ops.zeros_like(second)
        dshortcut = dout if shortcut.ndim == 4 else ops.zeros_like(shortcut)
        return slope, dsecond, dshortcut, dscale, ops.zeros_like(keep)


class Gate(Operator):
    """SiLU(gate) * x. Inputs: gate, x of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("gate", "gate", lambda g, x: x, lambda g, x: x)
        self.backward = operator("gate", "gate_grad", lambda g, x, dy: (g, x), lambda g, x, dy: (g, x))

    def construct(self, gate: Tensor, x: Tensor) -> Tensor:
        return self.forward(gate, x)

    def bprop(self, gate: Tensor, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        return self.backward(gate, x, dout)


class MaxRelative(Operator):
    """Nearest nodes and the maximum over them. Inputs: x (B, C, H, W), y (B, C, h, w), position (h w, H W).

    Returns:
        (B, 2 C, H, W), the channels x_0, d_0, x_1, d_1, ...; and the neighbours (B, H W, k) int32.
    """

    def __init__(self, k: int, dilation: int) -> None:
        super().__init__()
        self.k = k
        self.options = Tensor(np.int32([k, dilation]))
        self.forward = operator(
            "max_relative", "max_relative",
            lambda x, y, p, o: ([x[0], 2 * x[1], x[2], x[3]], [x[0], x[2] * x[3], k]),
            lambda x, y, p, o: (x, ms.int32),
        )  # fmt: skip
        self.backward = operator(
            "max_relative", "max_relative_grad",
            lambda y, i, dz, o: ([dz[0], dz[1] // 2, dz[2], dz[3]], y),
            lambda y, i, dz, o: (y, y),
        )  # fmt: skip

    def construct(self, x: Tensor, y: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(x, y, position, self.options)

    def bprop(self, x: Tensor, y: Tensor, position: Tensor, out: tuple, dout: tuple) -> tuple[Tensor, ...]:
        dx, dy = self.backward(y, out[1], dout[0], self.options)
        return dx, dy, ops.zeros_like(position)
