"""Accelerated forms of the cells that SkaNet and VAN are made of.

In inference, batch norms are folded into the convolutions next to them at every call (the weights may have changed),
which takes less time than norms of feature maps. `norm(x)` is scale * x + shift then, with
scale = gamma / sqrt(variance + eps) and shift = beta - mean * scale, each (C,).
"""

from __future__ import annotations

from typing import Optional

import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import constexpr

from ..kernels import operators
from ..models.layers.blocks import Attention, Block, ConvMlp, PatchEmbed, drop_path_noise
from ..models.layers.graph import MaxRelativeConv, relative_position
from ..models.skanet import SplitKernelAttention
from ..models.van import LargeKernelAttention
from .folded import FoldedBlock, FoldedSplitKernelAttention
from .form import AcceleratedForm, plain_class_of
from .layers import conv_kind, conv_operator

# Pixels (H * W) from which the fused MLP, which keeps the hidden feature maps out of the memory and computes them again
# for the gradient, is faster than its layers. Measured on two cores of an x86-64 with AVX-512 and 32 MiB of cache.
FUSED_MLP_MIN_PIXELS, FUSED_MLP_MIN_PIXELS_IN_TRAINING = 512, 2048
ABSENT = np.zeros(1, np.float32)  # stands for an operator's optional input that is absent


def unit_scale(conv: nn.Conv2d) -> Tensor:
    """Ones, the scale that changes nothing: (O,) for a convolution of O outputs."""
    return Tensor(np.ones(conv.out_channels, np.float32))


class FusedPatchEmbed(AcceleratedForm, PatchEmbed):
    """In inference, convolution and batch norm in one operator."""

    plain_class, plain = PatchEmbed, PatchEmbed.construct
    in_training = plain

    @classmethod
    def supports(cls, cell: PatchEmbed) -> bool:
        # Without a norm (it is folded) there is nothing to fuse.
        return conv_kind(cell.proj) == "strided" and isinstance(cell.norm, nn.BatchNorm2d)

    def prepare(self) -> None:
        self.operator: nn.Cell = conv_operator(self.proj)
        self.norm_scale_shift = operators.NormScaleShift(self.norm.eps)

    def has_norm_in_training(self) -> bool:
        return self.norm.training

    def in_inference(self, x: Tensor) -> Tensor:
        norm, proj = self.norm, self.proj
        scale, shift = self.norm_scale_shift(norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance)
        return self.operator(x, proj.weight * scale.reshape(-1, 1, 1, 1), shift + scale * proj.bias)


class FusedConvMlp(AcceleratedForm, ConvMlp):
    """Large images: the MLP in one operator, which computes the hidden feature maps again for the gradient. Small ones:
    layer by layer, the depthwise convolution and the GELU in one operator."""

    plain_class, plain = ConvMlp, ConvMlp.construct

    def prepare(self) -> None:
        self.fused_mlp, self.fused_mlp_residual = operators.FusedMlp(), operators.FusedMlpResidual()
        self.pointwise, self.pointwise_add = operators.Pointwise(), operators.PointwiseEpilogue("add")
        self.depthwise_gelu = operators.DepthwiseGelu(self.dwconv.dilation[0])

    def layer_by_layer(self, x: Tensor) -> Tensor:
        """mlp(x), (B, C, H, W), the hidden feature maps in memory."""
        return self.fc2(self.depthwise_gelu(self.fc1(x), self.dwconv.weight, self.dwconv.bias))

    def fused(self, x: Tensor) -> Tensor:
        """mlp(x), (B, C, H, W), in one operator."""
        fc1, dwconv, fc2 = self.fc1, self.dwconv, self.fc2
        return self.fused_mlp(x, fc1.weight, fc1.bias, dwconv.weight, dwconv.bias, fc2.weight, fc2.bias)

    def in_training(self, x: Tensor) -> Tensor:
        return self.fused(x) if x.shape[2] * x.shape[3] >= FUSED_MLP_MIN_PIXELS_IN_TRAINING else self.layer_by_layer(x)

    def in_inference(self, x: Tensor) -> Tensor:
        return self.fused(x) if x.shape[2] * x.shape[3] >= FUSED_MLP_MIN_PIXELS else self.layer_by_layer(x)

    def with_shortcut(self, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        """x + scale * mlp(x), (B, C, H, W), for inference.

        weight (N, C, 1, 1) and bias (N,) stand for those of `fc1`; scale (C,).
        """
        dwconv, fc2 = self.dwconv, self.fc2
        if x.shape[2] * x.shape[3] >= FUSED_MLP_MIN_PIXELS:
            return self.fused_mlp_residual(x, weight, bias, dwconv.weight, dwconv.bias, fc2.weight, fc2.bias, scale, x)
        hidden = self.depthwise_gelu(self.pointwise(x, weight, bias), dwconv.weight, dwconv.bias)
        return self.pointwise_add(hidden, fc2.weight, scale, scale * fc2.bias, x)


class FusedLargeKernelAttention(AcceleratedForm, LargeKernelAttention):
    """In inference, the 1x1 convolution and the product with x in one operator."""

    plain_class, plain = LargeKernelAttention, LargeKernelAttention.construct
    in_training = plain

    def prepare(self) -> None:
        self.pointwise_mul, self.ones = operators.PointwiseEpilogue("mul"), unit_scale(self.pw_conv)

    def before_norm(self, x: Tensor) -> Tensor:
        """The output (B, C, H, W) before a last batch norm, which this attention has not; for inference."""
        y = self.dw_d_conv(self.dw_conv(x))
        return self.pointwise_mul(y, self.pw_conv.weight, self.ones, self.pw_conv.bias, x)

    def in_inference(self, x: Tensor) -> Tensor:
        return self.before_norm(x)


class FusedSplitKernelAttention(AcceleratedForm, SplitKernelAttention):
    """Both depthwise convolutions of the split and the sum in one operator, the gate SiLU(.) * x in another."""

    plain_class, plain = SplitKernelAttention, SplitKernelAttention.construct
    identity = 1  # times the graph's output, which is added to what was split

    def prepare(self) -> None:
        dilations = self.dw_conv1.dilation[0], self.dw_conv2.dilation[0]
        self.split_depthwise, self.silu_mul = operators.SplitDepthwise(*dilations, self.identity), operators.SiluMul()
        self.pointwise_silu_mul, self.ones = operators.PointwiseEpilogue("silu_mul"), unit_scale(self.pw_conv)

    def has_norm_in_training(self) -> bool:
        return self.norm.training

    def split_convolutions(self, graph: Tensor) -> Tensor:
        """The convolutions of the split of `graph` (B, C, H, W), plus `identity` times it: (B, C, H, W)."""
        first, second = self.dw_conv1, self.dw_conv2
        return self.split_depthwise(graph, first.weight, first.bias, second.weight, second.bias)

    def before_norm(self, x: Tensor) -> Tensor:
        """The output (B, C, H, W) before the last batch norm; for inference."""
        y = self.split_convolutions(self.graph(x))
        return self.pointwise_silu_mul(y, self.pw_conv.weight, self.ones, self.pw_conv.bias, x)

    def in_training(self, x: Tensor) -> Tensor:
        return self.norm(self.silu_mul(self.pw_conv(self.split_convolutions(self.graph(x))), x))

    def in_inference(self, x: Tensor) -> Tensor:
        return self.norm(self.before_norm(x))


class FusedFoldedSplitKernelAttention(AcceleratedForm, FoldedSplitKernelAttention):
    """As `FusedSplitKernelAttention` in inference."""

    plain_class, plain = FoldedSplitKernelAttention, FoldedSplitKernelAttention.construct
    in_training = plain
    identity = 0
    prepare, split_convolutions = FusedSplitKernelAttention.prepare, FusedSplitKernelAttention.split_convolutions
    in_inference = FusedSplitKernelAttention.before_norm


def transposed_position_array(channels: int, nodes: int, reduced_nodes: int) -> np.ndarray:
    """The relative position as the operator reads it: (reduced_nodes, nodes)"""
    return np.ascontiguousarray(relative_position(channels, nodes, reduced_nodes).T)


@constexpr
def transposed_position(channels: int, nodes: int, reduced_nodes: int) -> Tensor:
    return Tensor(transposed_position_array(channels, nodes, reduced_nodes))


class FusedMaxRelativeConv(AcceleratedForm, MaxRelativeConv):
    """Neighbours, maximum and interleaving in one operator. In inference, convolution, norm and GELU in another."""

    plain_class, plain = MaxRelativeConv, MaxRelativeConv.construct
    plain_neighbours = MaxRelativeConv.neighbours

    def prepare(self) -> None:
        self.operator = operators.MaxRelative(self.search.k, self.search.dilation)
        self.pointwise_gelu, self.ones = operators.PointwiseEpilogue("gelu"), unit_scale(self.conv)
        self.is_folded = not isinstance(self.norm, nn.BatchNorm2d)
        if not self.is_folded:
            self.norm_scale_shift = operators.NormScaleShift(self.norm.eps)

    def has_norm_in_training(self) -> bool:
        return not self.is_folded and self.norm.training

    def max_relative_and_neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `operators.MaxRelative`: the interleaved features (B, 2 C, H, W), and the neighbours (B, H W, k)."""
        y = self.pool(x)
        return self.operator(x, y, transposed_position(x.shape[1], x.shape[2] * x.shape[3], y.shape[2] * y.shape[3]))

    def neighbours(self, x: Tensor) -> Tensor:
        return self.max_relative_and_neighbours(x)[1] if self.accepts(x) else self.plain_neighbours(x)

    def in_training(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(self.max_relative_and_neighbours(x)[0])))

    def in_inference(self, x: Tensor) -> Tensor:
        norm, conv, interleaved = self.norm, self.conv, self.max_relative_and_neighbours(x)[0]
        if self.is_folded:
            return self.pointwise_gelu(interleaved, conv.weight, self.ones, conv.bias, self.ones)
        scale, shift = self.norm_scale_shift(norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance)
        return self.pointwise_gelu(interleaved, conv.weight, scale, shift + scale * conv.bias, self.ones)


class FusedBlock(AcceleratedForm, Block):
    """In training, a branch's layer scale, stochastic depth and shortcut in one operator. In inference, batch norms are
    folded into the 1x1 convolutions after them, and GELU, layer scale and shortcut are epilogues of these."""

    plain_class, plain = Block, Block.construct

    @classmethod
    def supports(cls, cell: Block) -> bool:
        spatial = plain_class_of(cell.attn.spatial)
        parts = plain_class_of(cell.attn), plain_class_of(cell.mlp)
        return spatial in (SplitKernelAttention, LargeKernelAttention) and parts == (Attention, ConvMlp)

    def prepare(self) -> None:
        self.residual, self.norm_scale_shift = operators.Residual(), operators.NormScaleShift(self.norm1.eps)
        self.fold_norm = operators.FoldNormIntoNextConv()
        self.pointwise_gelu = operators.PointwiseEpilogue("gelu")
        self.pointwise_add = operators.PointwiseEpilogue("add")
        self.absent, self.one = Tensor(ABSENT), Tensor(np.ones(1, np.float32))
        self.ones = unit_scale(self.attn.proj_1)
        self.spatial_has_norm = isinstance(self.attn.spatial, SplitKernelAttention)

    def has_norm_in_training(self) -> bool:
        spatial = self.attn.spatial
        return self.norm1.training or self.norm2.training or (self.spatial_has_norm and spatial.norm.training)

    def in_training(self, x: Tensor, noise: Optional[Tensor] = None) -> Tensor:
        first, second = drop_path_noise(noise)
        attn, y = self.attn, self.norm1(x)
        branch = attn.proj_2(attn.spatial(attn.act(attn.proj_1(y))))
        x = self.residual(branch, y, x, self.layer_scale_1, self.drop_path.mask(x, first))
        y = self.mlp(self.norm2(x))
        return self.residual(y, self.absent, x, self.layer_scale_2, self.drop_path.mask(x, second))

    def in_inference(self, x: Tensor, noise: Optional[Tensor] = None) -> Tensor:
        norm1, norm2, layer_scale = self.norm1, self.norm2, self.layer_scale_1
        proj_1, spatial, proj_2, fc1 = self.attn.proj_1, self.attn.spatial, self.attn.proj_2, self.mlp.fc1
        scale, shift = self.norm_scale_shift(norm1.gamma, norm1.beta, norm1.moving_mean, norm1.moving_variance)
        # x + layer_scale * (norm1(x) + branch) is x * (1 + layer_scale * scale) + layer_scale * (shift + branch)
        shortcut = self.residual(x, self.absent, self.absent, 1 + layer_scale * scale, self.one)
        weight, bias = self.fold_norm(proj_1.weight, proj_1.bias, scale, shift)
        y = spatial.before_norm(self.pointwise_gelu(x, weight, self.ones, bias, self.ones))
        weight, bias = proj_2.weight, proj_2.bias
        if self.spatial_has_norm:
            last = spatial.norm
            weight, bias = self.fold_norm(
                weight, bias, *self.norm_scale_shift(last.gamma, last.beta, last.moving_mean, last.moving_variance)
            )
        x = self.pointwise_add(y, weight, layer_scale, layer_scale * shift + layer_scale * bias, shortcut)
        scale, shift = self.norm_scale_shift(norm2.gamma, norm2.beta, norm2.moving_mean, norm2.moving_variance)
        return self.mlp.with_shortcut(x, *self.fold_norm(fc1.weight, fc1.bias, scale, shift), self.layer_scale_2)


class FusedFoldedBlock(AcceleratedForm, FoldedBlock):
    """As `FusedBlock` in inference."""

    plain_class, plain = FoldedBlock, FoldedBlock.construct
    in_training = plain

    def prepare(self) -> None:
        self.residual = operators.Residual()
        self.pointwise_gelu = operators.PointwiseEpilogue("gelu")
        self.pointwise_add = operators.PointwiseEpilogue("add")
        self.absent, self.one = Tensor(ABSENT), Tensor(np.ones(1, np.float32))
        self.ones = unit_scale(self.proj_1)

    def in_inference(self, x: Tensor, noise: Optional[Tensor] = None) -> Tensor:
        proj_1, proj_2, fc1 = self.proj_1, self.proj_2, self.mlp.fc1
        shortcut = self.residual(x, self.absent, self.absent, self.shortcut, self.one)
        y = self.spatial(self.pointwise_gelu(x, proj_1.weight, self.ones, proj_1.bias, self.ones))
        x = self.pointwise_add(y, proj_2.weight, self.ones, proj_2.bias, shortcut)
        return self.mlp.with_shortcut(x, fc1.weight, fc1.bias, self.ones)
