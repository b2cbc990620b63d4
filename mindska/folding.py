"""Folding for inference: the same function with fewer operations.

- A batch norm goes into the convolution before it, or into a 1x1 convolution after it (one without padding).
- Layer scale goes into the projection that it scales; of the attention's shortcut one factor a channel is left.
- SkaNet's "plus what was split": the untouched eighth becomes twice itself, which goes into the 1x1 convolution behind
  it; the other parts' identity becomes a tap in the middle of their depthwise kernels.

Folded values are computed in float64 and rounded once. What is left of the cells stands in `acceleration/folded.py`.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from .acceleration import decelerated
from .acceleration.folded import FoldedBlock, FoldedSplitKernelAttention
from .errors import SettingError
from .models.layers.blocks import Block, PatchEmbed
from .models.layers.graph import MaxRelativeConv
from .models.skanet import SplitKernelAttention
from .models.sknet import ConvNorm

ScaleShift = tuple[np.ndarray, np.ndarray]  # of each channel, (C,)


def fold(net: nn.Cell) -> nn.Cell:
    """Folds a network of mindska for inference, in place, and returns it (in evaluation mode; it cannot be trained).

    An accelerated network stays accelerated.

    Raises:
        SettingError: it is no network of mindska, or folded already.
    """
    cells = [cell for _, cell in net.cells_and_names()]
    if not any(isinstance(cell, (ConvNorm, MaxRelativeConv, PatchEmbed, Block, FoldedBlock)) for cell in cells):
        raise SettingError(f"{type(net).__name__} is not one of mindska's networks, and only these can be folded")
    if not any(isinstance(cell, nn.BatchNorm2d) for cell in cells):
        raise SettingError("The network is folded already; fold a network once")
    with decelerated(net):
        for _, cell in list(net.cells_and_names()):
            if isinstance(cell, (ConvNorm, MaxRelativeConv)):
                cell.conv, cell.norm = _fold_into_previous_conv(cell.conv, _scale_shift(cell.norm)), nn.Identity()
            elif isinstance(cell, PatchEmbed):
                cell.proj, cell.norm = _fold_into_previous_conv(cell.proj, _scale_shift(cell.norm)), nn.Identity()
        for _, cell in list(net.cells_and_names()):
            if isinstance(cell, nn.CellList):
                for i, block in enumerate(cell):
                    if isinstance(block, Block):
                        cell[i] = _folded_block(block)
        for name, parameter in getattr(net, "net", net).parameters_and_names():  # MindCV's feature extractor wraps it
            parameter.name = name
        net.set_train(False)
    return net


def _folded_block(block: Block) -> FoldedBlock:
    attention, mlp = block.attn, block.mlp
    (scale, shift), spatial, proj_2 = _scale_shift(block.norm1), attention.spatial, attention.proj_2
    layer_scale_1, layer_scale_2 = _array(block.layer_scale_1), _array(block.layer_scale_2)
    if isinstance(spatial, SplitKernelAttention):
        proj_2 = _fold_into_next_conv(proj_2, _scale_shift(spatial.norm))
        spatial = _folded_attention(spatial)
    mlp.fc1 = _fold_into_next_conv(mlp.fc1, _scale_shift(block.norm2))
    mlp.fc2 = _fold_into_previous_conv(mlp.fc2, (layer_scale_2, np.zeros_like(layer_scale_2)))
    return FoldedBlock(
        # x + layer_scale_1 * (norm1(x) + branch) is x * shortcut + layer_scale_1 * (shift + branch)
        shortcut=Parameter(Tensor(1 + layer_scale_1 * scale, ms.float32), name="shortcut", requires_grad=False),
        proj_1=_fold_into_next_conv(attention.proj_1, (scale, shift)),
        act=attention.act,
        spatial=spatial,
        proj_2=_fold_into_previous_conv(proj_2, (layer_scale_1, layer_scale_1 * shift)),
        mlp=mlp,
    )


def _folded_attention(attention: SplitKernelAttention) -> FoldedSplitKernelAttention:
    doubled = np.ones(sum(attention.splits))
    doubled[: attention.splits[0]] = 2
    return FoldedSplitKernelAttention(
        attention.splits,
        attention.graph,
        _plus_identity(attention.dw_conv1),
        _plus_identity(attention.dw_conv2),
        _fold_into_next_conv(attention.pw_conv, (doubled, np.zeros_like(doubled))),
    )


def _array(parameter: Parameter) -> np.ndarray:
    return parameter.asnumpy().astype(np.float64)


def _scale_shift(norm: nn.BatchNorm2d) -> ScaleShift:
    """In evaluation norm(x) is scale * x + shift."""
    scale = _array(norm.gamma) / np.sqrt(_array(norm.moving_variance) + norm.eps)
    return scale, _array(norm.beta) - _array(norm.moving_mean) * scale


def _values(conv: nn.Conv2d) -> tuple[np.ndarray, np.ndarray]:
    weight = _array(conv.weight)
    return weight, _array(conv.bias) if conv.has_bias else np.zeros(len(weight))


def _fold_into_previous_conv(conv: nn.Conv2d, scale_shift: ScaleShift) -> nn.Conv2d:
    """scale * conv(x) + shift as one convolution."""
    (weight, bias), (scale, shift) = _values(conv), scale_shift
    return _like(conv, weight * scale.reshape(-1, 1, 1, 1), bias * scale + shift)


def _fold_into_next_conv(conv: nn.Conv2d, scale_shift: ScaleShift) -> nn.Conv2d:
    """conv(scale * x + shift) as one convolution; a 1x1 one, of one group."""
    (weight, bias), (scale, shift) = _values(conv), scale_shift
    return _like(conv, weight * scale.reshape(1, -1, 1, 1), bias + weight[:, :, 0, 0] @ shift)


def _plus_identity(conv: nn.Conv2d) -> nn.Conv2d:
    """conv(x) + x as one convolution; a depthwise one, of odd kernels."""
    weight, bias = _values(conv)
    weight[:, 0, weight.shape[2] // 2, weight.shape[3] // 2] += 1
    return _like(conv, weight, bias)


def _like(conv: nn.Conv2d, weight: np.ndarray, bias: np.ndarray) -> nn.Conv2d:
    """A convolution of the same geometry with other values."""
    return nn.Conv2d(
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
    )
