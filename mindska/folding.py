"""Folding for inference: the same function with fewer operations.

- A batch norm goes into the convolution before it, or into a 1x1 convolution after it (one without padding).
- Layer scale goes into the projection that it scales; of the attention's shortcut one factor a channel is left.
- SkaNet's "plus what was split": the untouched eighth becomes twice itself, which goes into the 1x1 convolution behind
  it; the other parts' identity becomes a tap in the middle of their depthwise kernels.

Folded values are computed in float64 and rounded once.
"""

from __future__ import annotations

from typing import Optional

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from . import kernels
from .errors import SettingError
from .models.layers.blocks import BatchNorm2d, Block, FusingConv, NoNorm, PatchEmbed
from .models.layers.graph import MaxRelativeConv
from .models.skanet import SplitKernelAttention
from .models.sknet import ConvNorm

ScaleShift = tuple[np.ndarray, np.ndarray]  # scale and shift, one a channel


def fold(net: nn.Cell) -> nn.Cell:
    """Folds a network of mindska for inference, in place, and returns it (in evaluation mode; it cannot be trained).

    Raises:
        SettingError: it is folded already.
    """
    if any(isinstance(cell, NoNorm) for _, cell in net.cells_and_names()):
        raise SettingError("The network is folded already; fold a network once")
    for _, cell in list(net.cells_and_names()):
        if isinstance(cell, (ConvNorm, MaxRelativeConv)):
            cell.conv, cell.norm = _after(cell.conv, _affine(cell.norm)), _no_norm(cell.norm)
        elif isinstance(cell, PatchEmbed):
            cell.proj, cell.norm = _after(cell.proj, _affine(cell.norm)), _no_norm(cell.norm)
    for _, cell in list(net.cells_and_names()):
        if isinstance(cell, nn.CellList):
            for i, block in enumerate(cell):
                if isinstance(block, Block):
                    cell[i] = FoldedBlock(block)
    for name, parameter in getattr(net, "net", net).parameters_and_names():  # MindCV's feature extractor wraps it
        parameter.name = name
    return net.set_train(False)


class FoldedSplitKernelAttention(SplitKernelAttention):
    """`SplitKernelAttention` without its last batch norm. (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, attention: SplitKernelAttention) -> None:
        nn.Cell.__init__(self)
        self.splits, self.graph = attention.splits, attention.graph
        self.dw_conv1, self.dw_conv2 = _plus_identity(attention.dw_conv1), _plus_identity(attention.dw_conv2)
        doubled = np.ones(sum(self.splits))
        doubled[: self.splits[0]] = 2
        self.pw_conv = _before(attention.pw_conv, (doubled, np.zeros_like(doubled)))
        self.kernel, self.gate = kernels.split_depthwise(2, 3, identity=0), attention.gate

    def mixed(self, graph: Tensor) -> Tensor:
        first, second = self.dw_conv1, self.dw_conv2
        if self.kernel is not None and self.kernel.takes(graph):
            return self.kernel(graph, first.weight, first.bias, second.weight, second.bias)
        untouched, five, seven = ops.split(graph, self.splits, axis=1)
        return ops.concat((untouched, first(five), second(seven)), axis=1)

    def construct(self, x: Tensor) -> Tensor:
        return self.gated(x)


class FoldedBlock(nn.Cell):
    """`Block` without batch norms and layer scales. (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, block: Block) -> None:
        super().__init__()
        attention, norm1 = block.attn, _affine(block.norm1)
        scale1, scale2 = (_array(p) for p in (block.layer_scale_1, block.layer_scale_2))
        zeros = np.zeros_like(scale1)
        self.act, self.spatial, projected = attention.act, attention.spatial, attention.proj_2
        if isinstance(self.spatial, SplitKernelAttention):
            projected = _before(projected, _affine(self.spatial.norm))
            self.spatial = FoldedSplitKernelAttention(self.spatial)
        self.proj_1 = _before(attention.proj_1, norm1)
        # x + scale1 * (norm1(x) + proj_2(...)) is x * shortcut + proj_2'(...)
        self.shortcut = Parameter(Tensor(1 + scale1 * norm1[0], ms.float32), requires_grad=False)
        self.residual, self.none, self.one = block.residual, block.none, block.one
        self.proj_2 = _after(projected, (scale1, scale1 * norm1[1]))
        self.ones = Tensor(np.ones(len(scale1), np.float32))
        self.mlp = block.mlp
        self.mlp.fc1 = _before(block.mlp.fc1, _affine(block.norm2))
        self.mlp.fc2 = _after(block.mlp.fc2, (scale2, zeros))

    def construct(self, x: Tensor, uniform: Optional[Tensor] = None) -> Tensor:
        if self.residual is not None and self.proj_1.fuses(x):
            shortcut = self.residual(x, self.none, self.none, self.shortcut, self.one)
            x = self.proj_2.then(self.spatial(self.proj_1.then(x)), shortcut)
            return self.mlp.add_to(x, x, self.ones)
        x = x * self.shortcut.reshape(-1, 1, 1) + self.proj_2(self.spatial(self.act(self.proj_1(x))))
        return x + self.mlp(x)


def _array(parameter: Parameter) -> np.ndarray:
    return parameter.asnumpy().astype(np.float64)


def _affine(norm: nn.BatchNorm2d) -> ScaleShift:
    """What a batch norm does in evaluation."""
    scale = _array(norm.gamma) / np.sqrt(_array(norm.moving_variance) + norm.eps)
    return scale, _array(norm.beta) - _array(norm.moving_mean) * scale


def _values(conv: nn.Conv2d) -> tuple[np.ndarray, np.ndarray]:
    weight = _array(conv.weight)
    return weight, _array(conv.bias) if conv.has_bias else np.zeros(len(weight))


def _after(conv: nn.Conv2d, affine: ScaleShift) -> nn.Conv2d:
    """The convolution followed by scale and shift."""
    (weight, bias), (scale, shift) = _values(conv), affine
    return _like(conv, weight * scale.reshape(-1, 1, 1, 1), bias * scale + shift)


def _before(conv: nn.Conv2d, affine: ScaleShift) -> nn.Conv2d:
    """The 1x1 convolution of one group behind scale and shift."""
    (weight, bias), (scale, shift) = _values(conv), affine
    return _like(conv, weight * scale.reshape(1, -1, 1, 1), bias + weight[:, :, 0, 0] @ shift)


def _plus_identity(conv: nn.Conv2d) -> nn.Conv2d:
    """The depthwise convolution of odd kernels, plus its input."""
    weight, bias = _values(conv)
    weight[:, 0, weight.shape[2] // 2, weight.shape[3] // 2] += 1
    return _like(conv, weight, bias)


def _no_norm(norm: BatchNorm2d) -> NoNorm:
    return NoNorm(norm.num_features, norm.relu)


def _like(conv: nn.Conv2d, weight: np.ndarray, bias: np.ndarray) -> nn.Conv2d:
    """A convolution of the same geometry with other values."""
    own = {"then": conv.after} if isinstance(conv, FusingConv) else {}
    return type(conv)(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride[0],
        conv.pad_mode,
        conv.padding,
        dilation=conv.dilation[0],
        group=conv.group,
        has_bias=True,
        weight_init=Tensor(weight, ms.float32),
        bias_init=Tensor(bias, ms.float32),
        **own,
    )
