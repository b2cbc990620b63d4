"""The C++ operators as cells, each with its gradient.

Sizes in docstrings: batch B, channels C (of the output O), height H, width W. Tensors are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import signature

from .build import keep_library, library
from .signatures import enumerators, signatures

TYPES = {"float32": ms.float32, "int32": ms.int32, "uint8": ms.uint8}


def operator(name: str, **numbers: int) -> ops.Custom:
    """The C++ operator mindska_NAME as a primitive of MindSpore.

    Args:
        name: the operator's name, without "mindska_".
        numbers: the numbers that its signature names, in its order.

    Called with tensors that its signature does not allow it raises a SettingError, before anything runs.
    """
    spec = signatures()[name]
    if tuple(numbers) != spec.numbers:
        raise TypeError(f"{name} takes the numbers {spec.numbers}, not {tuple(numbers)}")
    numbers = {key: int(value) for key, value in numbers.items()}

    def shapes(*found: list[int]) -> Any:
        keep_library(spec.file)  # this is called when something is compiled, which then looks for the file
        inferred = spec.infer(found, numbers)
        return tuple(inferred) if len(inferred) > 1 else inferred[0]

    def types(*found: ms.Type) -> Any:
        inferred = spec.check_types([_name_of(kind) for kind in found])
        return tuple(TYPES[kind] for kind in inferred) if len(inferred) > 1 else TYPES[inferred[0]]

    made = ops.Custom(f"{library(spec.file)}:mindska_{name}", shapes, types, func_type="aot")
    # PyNative mode keeps the shapes of operators with the same attributes and inputs: what else they depend on, such as
    # a stride, has to be among the attributes.
    for key, value in numbers.items():
        made.add_prim_attr(key, value)
    return made


def in_place_operator(name: str, written: Sequence[bool], **numbers: int) -> ops.Custom:
    """The same for an operator that writes some of its inputs, which have to be parameters.

    MindSpore orders it among all that reads and writes these parameters, as it does with its own optimisers: without
    that, what reads them in the same step may come before or after it.

    Args:
        written: of each input, in their order, whether the operator writes it.
    """
    made, access = operator(name, **numbers), signature.sig_rw
    kinds = [access.RW_WRITE if writes else access.RW_READ for writes in written]
    made.set_signatures([signature.make_sig(f"input{i}", kind) for i, kind in enumerate(kinds)])
    made.add_prim_attr("side_effect_mem", True)
    return made


def _name_of(kind: ms.Type) -> str:
    return str(getattr(kind, "element_type", lambda: kind)()).lower()


def int32_tensor(**numbers: int) -> Tensor:
    """The numbers of a signature as its operator reads them, in the same order: (count,) int32."""
    return Tensor(np.array(list(numbers.values()), np.int32))


class Gelu(nn.Cell):
    """GELU, exact: (...,) -> (...,). Its gradient is an operator as well."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("gelu")
        self.backward = operator("gelu_grad")

    def construct(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (self.backward(x, dout),)


class Depthwise(nn.Cell):
    """Depthwise convolution that keeps the size: (B, C, H, W).

    Inputs: x (B, C, H, W), weight (C, 1, KH, KW), bias (C,).
    """

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = int32_tensor(dilation=dilation)
        self.forward = operator("depthwise", dilation=dilation)
        self.backward = operator("depthwise_grad", dilation=dilation)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.forward(x, weight, bias, self.dilation)

    def bprop(self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return self.backward(x, weight, self.dilation, dout)


class DepthwiseGelu(nn.Cell):
    """GELU of a depthwise convolution, (B, C, H, W). Inputs as of `Depthwise`.

    In training the pre-activation is saved for the gradient; else the gradient computes it again.
    """

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.saving, self.recomputing = DepthwiseGeluWithPreactivation(dilation), DepthwiseGeluRecomputing(dilation)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if self.training:
            return self.saving(x, weight, bias)[0]
        return self.recomputing(x, weight, bias)


class DepthwiseGeluWithPreactivation(nn.Cell):
    """GELU of a depthwise convolution, saving the pre-activation. Inputs as of `Depthwise`.

    Returns:
        GELU(y) and y, each (B, C, H, W), for the convolution's result y. Only the first has a gradient.
    """

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = int32_tensor(dilation=dilation)
        self.forward = operator("depthwise_gelu_with_preactivation", dilation=dilation)
        self.backward = operator("depthwise_gelu_grad", dilation=dilation)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(x, weight, bias, self.dilation)

    def bprop(self, x: Tensor, weight: Tensor, bias: Tensor, out: tuple, dout: tuple) -> tuple[Tensor, ...]:
        return self.backward(x, weight, self.dilation, dout[0], out[1])


class DepthwiseGeluRecomputing(nn.Cell):
    """GELU of a depthwise convolution, (B, C, H, W); the gradient computes the pre-activation again.

    Inputs as of `Depthwise`.
    """

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = int32_tensor(dilation=dilation)
        self.forward = operator("depthwise_gelu", dilation=dilation)
        self.recompute = operator("depthwise_gelu_with_preactivation", dilation=dilation)
        self.backward = operator("depthwise_gelu_grad", dilation=dilation)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.forward(x, weight, bias, self.dilation)

    def bprop(self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        pre_activation = self.recompute(x, weight, bias, self.dilation)[1]
        return self.backward(x, weight, self.dilation, dout, pre_activation)


class Pointwise(nn.Cell):
    """1x1 convolution, (B, O, H, W). Inputs: x (B, C, H, W), weight (O, C / groups, 1, 1), bias (O,)."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("pointwise")
        self.backward = operator("pointwise_grad")

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.forward(x, weight, bias)

    def bprop(self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return self.backward(x, weight, dout)


EPILOGUES = enumerators("Epilogue")


def epilogue_grad(epilogue: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The gradient of an epilogue: (value, other, out, dout) -> (dvalue, dother), for out = epilogue(value, other)."""
    gelu_grad = operator("gelu_grad")

    def none(value, other, out, dout):
        return dout, ops.zeros_like(other)

    def gelu(value, other, out, dout):
        return gelu_grad(value, dout), ops.zeros_like(other)

    def relu(value, other, out, dout):
        return dout * (out > 0), ops.zeros_like(other)

    def add(value, other, out, dout):
        return dout, dout

    def add_relu(value, other, out, dout):
        dsum = dout * (out > 0)
        return dsum, dsum

    def silu_mul(value, other, out, dout):
        gate = ops.sigmoid(value)
        return dout * other * (gate + value * gate * (1 - gate)), dout * value * gate

    def mul(value, other, out, dout):
        return dout * other, dout * value

    grads = {"none": none, "gelu": gelu, "relu": relu, "add": add, "add_relu": add_relu}
    return {**grads, "silu_mul": silu_mul, "mul": mul}[epilogue]


class PointwiseEpilogue(nn.Cell):
    """epilogue(scale * conv(x) + shift) for a 1x1 convolution without bias, (B, O, H, W), for inference.

    A gradient computes again what it needs.

    Args:
        epilogue: one of `EPILOGUES`. With v the value: "none" v, "gelu" GELU(v), "relu" ReLU(v), "add" v + other,
            "add_relu" ReLU(v + other), "silu_mul" SiLU(v) * other, "mul" v * other.

    Inputs: x (B, C, H, W), weight (O, C / groups, 1, 1), scale (O,), shift (O,), other (B, O, H, W) or, where it is not
        used, any tensor (O,).
    """

    def __init__(self, epilogue: str) -> None:
        super().__init__()
        number = EPILOGUES.index(epilogue)
        self.epilogue = int32_tensor(epilogue=number)
        self.forward = operator("pointwise_epilogue", epilogue=number)
        self.pointwise, self.epilogue_grad = Pointwise(), epilogue_grad(epilogue)

    def construct(self, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, other: Tensor) -> Tensor:
        return self.forward(x, weight, scale, shift, other, self.epilogue)

    def bprop(self, x, weight, scale, shift, other, out, dout) -> tuple[Tensor, ...]:
        scaled = weight * scale.reshape(-1, 1, 1, 1)
        dvalue, dother = self.epilogue_grad(self.pointwise(x, scaled, shift), other, out, dout)
        dx, dscaled, dshift = self.pointwise.backward(x, scaled, dvalue)
        return dx, dscaled * scale.reshape(-1, 1, 1, 1), (dscaled * weight).sum((1, 2, 3)), dshift, dother


class FusedMlp(nn.Cell):
    """1x1 convolution, depthwise 3x3, GELU, 1x1 convolution: (B, C, H, W).

    The hidden feature maps are not kept: the gradient computes them again.

    Inputs: x (B, C, H, W); weight1 (N, C, 1, 1), bias1 (N,); dw_weight (N, 1, 3, 3), dw_bias (N,);
        weight2 (C, N, 1, 1), bias2 (C,).
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("fused_mlp")
        self.backward = operator("fused_mlp_grad")

    def construct(self, x, weight1, bias1, dw_weight, dw_bias, weight2, bias2) -> Tensor:
        return self.forward(x, weight1, bias1, dw_weight, dw_bias, weight2, bias2)

    def bprop(self, x, weight1, bias1, dw_weight, dw_bias, weight2, bias2, out, dout) -> tuple[Tensor, ...]:
        return self.backward(x, weight1, bias1, dw_weight, dw_bias, weight2, dout)


class FusedMlpResidual(nn.Cell):
    """shortcut + scale * mlp(x), (B, C, H, W), for inference. A gradient computes again what it needs.

    Inputs: those of `FusedMlp`, scale (C,), shortcut (B, C, H, W).
    """

    def __init__(self) -> None:
        super().__init__()
        self.mlp = FusedMlp()
        self.forward = operator("fused_mlp_residual")

    def construct(self, x, weight1, bias1, dw_weight, dw_bias, weight2, bias2, scale, shortcut) -> Tensor:
        return self.forward(x, weight1, bias1, dw_weight, dw_bias, weight2, bias2, scale, shortcut)

    def bprop(
        self, x, weight1, bias1, dw_weight, dw_bias, weight2, bias2, scale, shortcut, out, dout
    ) -> tuple[Tensor, ...]:
        dscale = (dout * self.mlp(x, weight1, bias1, dw_weight, dw_bias, weight2, bias2)).sum((0, 2, 3))
        grads = self.mlp.backward(x, weight1, bias1, dw_weight, dw_bias, weight2, dout * scale.reshape(-1, 1, 1))
        dx, dweight1, dbias1, ddw_weight, ddw_bias, dweight2, dbias2 = grads
        return dx, dweight1, dbias1, ddw_weight, ddw_bias, dweight2, dbias2, dscale, dout


class LayerNorm(nn.Cell):
    """Layer norm over the channels, (B, C, H, W). Inputs: x (B, C, H, W), gamma (C,), beta (C,)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = Tensor(np.array([eps], np.float32))
        self.forward = operator("layer_norm")
        self.backward = operator("layer_norm_grad")

    def construct(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return self.forward(x, gamma, beta, self.eps)

    def bprop(self, x: Tensor, gamma: Tensor, beta: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return self.backward(x, gamma, self.eps, dout)


class BatchNorm(nn.Cell):
    """Batch norm in training, and ReLU when `relu`.

    `momentum`: the share of their old value that running statistics keep, as in MindSpore (PyTorch's is 1 minus that).

    Inputs: x (B, C, H, W); gamma, beta, running mean and variance (C,).

    Returns:
        The result (B, C, H, W); the batch's mean and 1 / sqrt(variance + eps), the new running mean and variance, each
        (C,). Only the result has a gradient.
    """

    def __init__(self, eps: float, momentum: float, relu: bool = False) -> None:
        super().__init__()
        self.options = Tensor(np.array([eps, momentum, relu], np.float32))
        self.forward = operator("batch_norm")
        self.backward = operator("batch_norm_grad")

    def construct(self, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
        return self.forward(x, gamma, beta, mean, variance, self.options)

    def bprop(self, x, gamma, beta, mean, variance, out: tuple, dout: tuple) -> tuple[Tensor, ...]:
        dx, dgamma, dbeta = self.backward(x, gamma, out[1], out[2], out[0], self.options, dout[0])
        return dx, dgamma, dbeta, ops.zeros_like(mean), ops.zeros_like(variance)


class NormScaleShift(nn.Cell):
    """(scale, shift), each (C,): in evaluation norm(x) = scale * x + shift.

    Inputs: gamma, beta, running mean and variance of a batch norm, each (C,).
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = Tensor(np.array([eps], np.float32))
        self.forward = operator("norm_scale_shift")

    def construct(self, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(gamma, beta, mean, variance, self.eps)

    def bprop(self, gamma, beta, mean, variance, out: tuple, dout: tuple) -> tuple[Tensor, ...]:
        inv_std = 1 / ops.sqrt(variance + self.eps)
        dscale = dout[0] - mean * dout[1]
        return dscale * inv_std, dout[1], -out[0] * dout[1], -0.5 * dscale * out[0] * inv_std * inv_std


class FoldNormIntoNextConv(nn.Cell):
    """Folds a norm into the 1x1 convolution after it: conv(scale * x + shift) as one convolution of x.

    Inputs: weight (O, C, 1, 1), bias (O,) of the convolution; scale, shift (C,) of the norm, see `NormScaleShift`.

    Returns:
        The weight (O, C, 1, 1) and the bias (O,) of the one convolution.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("fold_norm_into_next_conv")

    def construct(self, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(weight, bias, scale, shift)

    def bprop(self, weight, bias, scale, shift, out: tuple, dout: tuple) -> tuple[Tensor, ...]:
        dscaled, dbias = dout[0], dout[1].reshape(-1, 1, 1, 1)
        columns = (1, -1, 1, 1)
        dweight = dscaled * scale.reshape(columns) + dbias * shift.reshape(columns)
        return dweight, dout[1], (dscaled * weight).sum((0, 2, 3)), (dbias * weight).sum((0, 2, 3))


class SquareSum(nn.Cell):
    """The sum of the squares of all elements of a tuple of tensors of any shapes: ()."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("square_sum")

    def construct(self, tensors: tuple[Tensor, ...]) -> Tensor:
        return self.forward(*tensors).reshape(())


class Grouped(nn.Cell):
    """Grouped convolution that keeps the size, and ReLU when `relu`: (B, O, H, W).

    Inputs: x (B, C, H, W), weight (O, C / groups, K, K), bias (O,).
    """

    def __init__(self, dilation: int, relu: bool = False) -> None:
        super().__init__()
        numbers = dict(dilation=dilation, relu=relu)
        self.relu, self.options = relu, int32_tensor(**numbers)
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
        self.relu, self.options = relu, int32_tensor(**numbers)
        self.forward = operator("strided", **numbers)
        # Two operators: the first layer of a network needs the weight's gradient only.
        self.input_grad = operator("strided_input_grad", **numbers)
        self.weight_grad = operator("strided_weight_grad", **numbers)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.forward(x, weight, bias, self.options)

    def bprop(self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        dconv = dout * (out > 0) if self.relu else dout
        dweight, dbias = self.weight_grad(x, weight, self.options, dconv)
        return self.input_grad(x, weight, self.options, dconv), dweight, dbias


class Winograd(nn.Cell):
    """3x3 convolution that keeps the size, and ReLU when `relu`: (B, O, H, W).

    Inputs: x (B, C, H, W), weight (O, C, 3, 3), bias (O,).
    """

    def __init__(self, dilation: int, relu: bool = False) -> None:
        super().__init__()
        numbers = dict(dilation=dilation, relu=relu)
        self.relu, self.options = relu, int32_tensor(**numbers)
        self.forward = operator("winograd", **numbers)
        # Two operators: the first layer of a network needs the weight's gradient only.
        self.input_grad = operator("winograd_input_grad", **numbers)
        self.weight_grad = operator("winograd_weight_grad", **numbers)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.forward(x, weight, bias, self.options)

    def bprop(self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        dconv = dout * (out > 0) if self.relu else dout
        dweight, dbias = self.weight_grad(x, self.options, dconv)
        return self.input_grad(weight, self.options, dconv), dweight, dbias


class PixelCrossEntropy(nn.Cell):
    """The cross-entropy of each pixel for logits that are enlarged (bilinear): (B, H, W).

    0 where the label is `ignored`, NaN where no class has its number. The enlarged logits are not kept.

    Inputs: logits (B, K, h, w), labels (B, H, W) int32, overhang (2,) int32: rows and columns that the enlarged logits
        have beyond the labels'.
    """

    def __init__(self, align_corners: bool, ignored: int) -> None:
        super().__init__()
        numbers = dict(align_corners=align_corners, ignored=ignored)
        self.options = int32_tensor(**numbers)
        self.forward = operator("pixel_cross_entropy", **numbers)
        self.backward = operator("pixel_cross_entropy_grad", **numbers)

    def construct(self, logits: Tensor, labels: Tensor, overhang: Tensor) -> Tensor:
        return self.forward(logits, labels, overhang, self.options)

    def bprop(self, logits: Tensor, labels: Tensor, overhang: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return (
            self.backward(logits, labels, overhang, self.options, dout),
            ops.zeros_like(labels),
            ops.zeros_like(overhang),
        )


class Resize(nn.Cell):
    """Feature maps at another size, linear between the pixels of both axes: (B, C, H, W).

    Inputs: x (B, C, h, w); rows (H,) and columns (W,), where the new pixels lie among the old ones, in order: at 1.25
        between number 1, weighed 0.75, and number 2, weighed 0.25.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward, self.backward = operator("resize"), operator("resize_grad")

    def construct(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return self.forward(x, rows, columns)

    def bprop(self, x: Tensor, rows: Tensor, columns: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return self.backward(x, rows, columns, dout), ops.zeros_like(rows), ops.zeros_like(columns)


class MeanOfSum(nn.Cell):
    """The mean over the pixels of first + second, (B, C, 1, 1). Inputs: first, second (B, C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("mean_of_sum")

    def construct(self, first: Tensor, second: Tensor) -> Tensor:
        return self.forward(first, second)

    def bprop(self, first: Tensor, second: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        grad = ops.broadcast_to(dout / (first.shape[2] * first.shape[3]), first.shape)
        return grad, grad


class WeightedSum(nn.Cell):
    """weights[:, 0] * first + weights[:, 1] * second, (B, C, H, W).

    Inputs: first, second (B, C, H, W), weights (B, 2, C).
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("weighted_sum")
        self.backward = operator("weighted_sum_grad")

    def construct(self, first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
        return self.forward(first, second, weights)

    def bprop(self, first: Tensor, second: Tensor, weights: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return self.backward(first, second, weights, dout)


class SplitDepthwise(nn.Cell):
    """Depthwise convolutions of the last channels, the others untouched, plus `identity` times the input: (B, C, H, W).

    Inputs: x (B, C, H, W); weight (P, 1, K, K) and bias (P,) of the first convolution, for the P channels before the
        last Q; weight (Q, 1, L, L) and bias (Q,) of the second, for the last Q.
    """

    def __init__(self, dilation1: int, dilation2: int, identity: int) -> None:
        super().__init__()
        numbers = dict(dilation1=dilation1, dilation2=dilation2, identity=identity)
        self.options = int32_tensor(**numbers)
        self.forward = operator("split_depthwise", **numbers)
        self.backward = operator("split_depthwise_grad", **numbers)

    def construct(self, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        return self.forward(x, weight1, bias1, weight2, bias2, self.options)

    def bprop(self, x, weight1, bias1, weight2, bias2, out, dout) -> tuple[Tensor, ...]:
        return self.backward(x, weight1, weight2, self.options, dout)


class Residual(nn.Cell):
    """shortcut + drop_path_mask * scale * (first + second), (B, C, H, W): a residual branch, its layer scale and
    stochastic depth.

    Inputs: first, second, shortcut (B, C, H, W), scale (C,), drop_path_mask (B,) or (1,). A tensor (1,) stands for a
        `second` or a `shortcut` that is absent. `drop_path_mask` gets no gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("residual")
        self.backward = operator("residual_grad")

    def construct(self, first, second, shortcut, scale, drop_path_mask) -> Tensor:
        return self.forward(first, second, shortcut, scale, drop_path_mask)

    def bprop(self, first, second, shortcut, scale, drop_path_mask, out, dout) -> tuple[Tensor, ...]:
        dbranch, dscale = self.backward(first, second, scale, drop_path_mask, dout)
        dsecond = dbranch if second.ndim == 4 else ops.zeros_like(second)
        dshortcut = dout if shortcut.ndim == 4 else ops.zeros_like(shortcut)
        return dbranch, dsecond, dshortcut, dscale, ops.zeros_like(drop_path_mask)


class SiluMul(nn.Cell):
    """SiLU(gate) * x, (...,). Inputs: gate, x (...,)."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("silu_mul")
        self.backward = operator("silu_mul_grad")

    def construct(self, gate: Tensor, x: Tensor) -> Tensor:
        return self.forward(gate, x)

    def bprop(self, gate: Tensor, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        return self.backward(gate, x, dout)


class MaxRelative(nn.Cell):
    """Max-relative graph aggregation: each node's nearest neighbours, and the maximum of their differences to it.

    `k`: neighbours of a node; `dilation`: every dilation-th of the nearest k * dilation is one.

    Inputs: x (B, C, H, W), the nodes; y (B, C, h, w), where neighbours are sought; position (h w, H W), which is added
        to the squared distances of L2-normalised features.

    Returns:
        (B, 2 C, H, W), the channels x_0, d_0, x_1, d_1, ... with d the maximum over the neighbours less x; and the
        neighbours (B, H W, k) int32, places in y.
    """

    def __init__(self, k: int, dilation: int) -> None:
        super().__init__()
        self.k = k
        numbers = dict(k=k, dilation=dilation)
        self.options = int32_tensor(**numbers)
        self.forward, self.backward = operator("max_relative", **numbers), operator("max_relative_grad", **numbers)

    def construct(self, x: Tensor, y: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(x, y, position, self.options)

    def bprop(self, x: Tensor, y: Tensor, position: Tensor, out: tuple, dout: tuple) -> tuple[Tensor, ...]:
        dx, dy = self.backward(y, out[1], dout[0], self.options)
        return dx, dy, ops.zeros_like(position)


class Float32Operator(nn.Cell):
    """An operator on boxes, whose coordinates mixed precision must not make half ones."""

    def add_flags_recursive(self, **flags) -> nn.Cell:
        if flags.get("fp16") or flags.get("bf16"):
            flags.update(fp16=False, bf16=False, fp32=True)
        return super().add_flags_recursive(**flags)


class AssignMaxIou(Float32Operator):
    """Which object each prior is matched with, (B, A) int32: MMDetection's `MaxIoUAssigner`. It has no gradient.

    Args:
        min_positive_iou: of low-quality matches; above 1 there are none.

    Inputs: priors (B, A, 4), boxes (B, M, 4); what has no area matches nothing.
    """

    def __init__(self, positive_iou: float, negative_iou: float, min_positive_iou: float) -> None:
        super().__init__()
        self.thresholds = Tensor(np.array([positive_iou, negative_iou, min_positive_iou], np.float32))
        self.forward = operator("assign_max_iou")

    def construct(self, priors: Tensor, boxes: Tensor) -> Tensor:
        return self.forward(priors, boxes, self.thresholds)

    def bprop(self, priors: Tensor, boxes: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        return ops.zeros_like(priors), ops.zeros_like(boxes)


class Suppress(Float32Operator):
    """Which of sorted boxes (B, N, 4) stay, (B, N) int32 of 0 and 1: greedy suppression, the best first. It has no
    gradient."""

    def __init__(self, iou_threshold: float) -> None:
        super().__init__()
        self.threshold = Tensor(np.array([iou_threshold], np.float32))
        self.forward = operator("suppress")

    def construct(self, boxes: Tensor) -> Tensor:
        return self.forward(boxes, self.threshold)

    def bprop(self, boxes: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (ops.zeros_like(boxes),)


class RoiAlign(Float32Operator):
    """RoIAlign, aligned and adaptive, on four levels of a pyramid: (B * R, C, out, out)

    Args:
        stride: pixels of a cell of the first level; of each further one it is twice as large.

    Inputs: four levels (B, C, H, W); rois (B, R, 5), x1 y1 x2 y2 in pixels and the number of the level (with another
        number the result is 0). Rois get no gradient.
    """

    def __init__(self, out: int, stride: int) -> None:
        super().__init__()
        self.options = int32_tensor(out=out, stride=stride)
        self.forward = operator("roi_align", out=out, stride=stride)
        self.backward = operator("roi_align_grad", out=out, stride=stride)

    def construct(self, p0: Tensor, p1: Tensor, p2: Tensor, p3: Tensor, rois: Tensor) -> Tensor:
        return self.forward(p0, p1, p2, p3, rois, self.options)

    def bprop(self, p0, p1, p2, p3, rois, out, dout) -> tuple[Tensor, ...]:
        return (*self.backward(p0, p1, p2, p3, rois, self.options, dout), ops.zeros_like(rois))


class MaskTargets(Float32Operator):
    """The masks of objects in boxes, 0 or 1: (B, R, out, out). It has no gradient.

    Inputs: masks (B, M, H, W / 8) uint8, eight pixels a byte; rois (B, R, 5), x1 y1 x2 y2 and the number of the object
        (with another number the result is 0).
    """

    def __init__(self, out: int) -> None:
        super().__init__()
        self.options = int32_tensor(out=out)
        self.forward = operator("mask_targets", out=out)

    def construct(self, masks: Tensor, rois: Tensor) -> Tensor:
        return self.forward(masks, rois, self.options)

    def bprop(self, masks: Tensor, rois: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        return ops.zeros_like(masks), ops.zeros_like(rois)
