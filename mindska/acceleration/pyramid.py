"""Forms of the cells that SkaNet and VAN are made of.

In inference, batch norms are worked into the weights of the convolutions beside them at every call (the weights may
have changed), which takes less time than norms of whole maps. `norm(x)` is scale * x + shift then, with
scale = gamma / sqrt(variance + eps) and shift = beta - mean * scale, each (C,).
"""

from __future__ import annotations

from typing import Optional

import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import constexpr

from ..kernels import operators
from ..models.layers.blocks import Block, ConvMlp, PatchEmbed, drop_path_noise
from ..models.layers.graph import MaxRelativeConv, relative_position
from ..models.skanet import SplitKernelAttention
from ..models.van import LargeKernelAttention
from .folded import FoldedBlock, FoldedSplitKernelAttention
from .form import Form
from .layers import geometry, operator_of

# Pixels from which keeping an MLP's hidden maps out of the memory is worth computing them again: in inference and in
# training. Measured on two cores of an x86-64 with AVX-512 and 32 MiB of cache.
LARGE_MAP, LARGE_MAP_IN_TRAINING = 512, 2048
NOTHING = np.zeros(1, np.float32)  # stands for a tensor that an operator is not to use


def ones_like_outputs(conv: nn.Conv2d) -> Tensor:
    """A scale that changes nothing: (O,)"""
    return Tensor(np.ones(conv.out_channels, np.float32))


class FusedPatchEmbed(Form, PatchEmbed):
    """In inference, convolution and batch norm in one operator."""

    stands_for, plain = PatchEmbed, PatchEmbed.construct
    in_training = plain

    @classmethod
    def fits(cls, cell: PatchEmbed) -> bool:
        # Without a norm (it is folded) there is nothing to fuse.
        return geometry(cell.proj) == "strided" and isinstance(cell.norm, nn.BatchNorm2d)

    def prepare(self) -> None:
        self.operator, self.scale_shift = operator_of(self.proj), operators.AffineOfNorm(self.norm.eps)

    def has_norm_in_training(self) -> bool:
        return self.norm.training

    def in_inference(self, x: Tensor) -> Tensor:
        norm, proj = self.norm, self.proj
        scale, shift = self.scale_shift(norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance)
        return self.operator(x, proj.weight * scale.reshape(-1, 1, 1, 1), shift + scale * proj.bias)


class FusedConvMlp(Form, ConvMlp):
    """Large maps: the whole MLP in one operator, which computes the hidden maps again for the gradient. Small ones: the
    depthwise convolution and the GELU in one."""

    stands_for, plain = ConvMlp, ConvMlp.construct

    def prepare(self) -> None:
        self.mlp, self.mlp_residual = operators.Mlp(), operators.MlpAdded()
        self.pointwise, self.pointwise_add = operators.Pointwise(), operators.PointwiseThen("add")
        self.depthwise_gelu = operators.DepthwiseGelu(1)

    def small(self, x: Tensor) -> Tensor:
        return self.fc2(self.depthwise_gelu(self.fc1(x), self.dwconv.weight, self.dwconv.bias))

    def whole(self, x: Tensor) -> Tensor:
        fc1, dwconv, fc2 = self.fc1, self.dwconv, self.fc2
        return self.mlp(x, fc1.weight, fc1.bias, dwconv.weight, dwconv.bias, fc2.weight, fc2.bias)

    def in_training(self, x: Tensor) -> Tensor:
        return self.whole(x) if x.shape[2] * x.shape[3] >= LARGE_MAP_IN_TRAINING else self.small(x)

    def in_inference(self, x: Tensor) -> Tensor:
        return self.whole(x) if x.shape[2] * x.shape[3] >= LARGE_MAP else self.small(x)

    def residual(self, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        """x + scale * mlp(x), with another weight and bias of the first convolution; for inference. scale (C,)"""
        dwconv, fc2 = self.dwconv, self.fc2
        if x.shape[2] * x.shape[3] >= LARGE_MAP:
            return self.mlp_residual(x, weight, bias, dwconv.weight, dwconv.bias, fc2.weight, fc2.bias, scale, x)
        hidden = self.depthwise_gelu(self.pointwise(x, weight, bias), dwconv.weight, dwconv.bias)
        return self.pointwise_add(hidden, fc2.weight, scale, scale * fc2.bias, x)


class FusedLargeKernelAttention(Form, LargeKernelAttention):
    """In inference, the 1x1 convolution and the product in one operator."""

    stands_for, plain = LargeKernelAttention, LargeKernelAttention.construct
    in_training = plain

    def prepare(self) -> None:
        self.pointwise_times, self.ones = operators.PointwiseThen("times"), ones_like_outputs(self.pw_conv)

    def before_norm(self, x: Tensor) -> Tensor:
        """What a last batch norm would see; here there is none."""
        y = self.dw_d_conv(self.dw_conv(x))
        return self.pointwise_times(y, self.pw_conv.weight, self.ones, self.pw_conv.bias, x)

    def in_inference(self, x: Tensor) -> Tensor:
        return self.before_norm(x)


class FusedSplitKernelAttention(Form, SplitKernelAttention):
    """Both depthwise convolutions of the split and the sum in one operator, the gate in another."""

    stands_for, plain = SplitKernelAttention, SplitKernelAttention.construct
    identity = 1  # times the graph's output, which is added to what was split

    def prepare(self) -> None:
        self.split_depthwise, self.gate = operators.SplitDepthwise(2, 3, self.identity), operators.Gate()
        self.pointwise_gate, self.ones = operators.PointwiseThen("gate"), ones_like_outputs(self.pw_conv)

    def has_norm_in_training(self) -> bool:
        return self.norm.training

    def mixed(self, graph: Tensor) -> Tensor:
        first, second = self.dw_conv1, self.dw_conv2
        return self.split_depthwise(graph, first.weight, first.bias, second.weight, second.bias)

    def before_norm(self, x: Tensor) -> Tensor:
        """What the last batch norm sees; for inference."""
        return self.pointwise_gate(self.mixed(self.graph(x)), self.pw_conv.weight, self.ones, self.pw_conv.bias, x)

    def in_training(self, x: Tensor) -> Tensor:
        return self.norm(self.gate(self.pw_conv(self.mixed(self.graph(x))), x))

    def in_inference(self, x: Tensor) -> Tensor:
        return self.norm(self.before_norm(x))


class FusedFoldedSplitKernelAttention(Form, FoldedSplitKernelAttention):
    """As `FusedSplitKernelAttention`, for inference."""

    stands_for, plain = FoldedSplitKernelAttention, FoldedSplitKernelAttention.construct
    in_training = plain
    identity = 0
    prepare, mixed = FusedSplitKernelAttention.prepare, FusedSplitKernelAttention.mixed
    in_inference = FusedSplitKernelAttention.before_norm


@constexpr
def transposed_position(channels: int, nodes: int, reduced_nodes: int) -> Tensor:
    """The relative position as the operator reads it: (reduced_nodes, nodes)"""
    return Tensor(np.ascontiguousarray(relative_position(channels, nodes, reduced_nodes).T))


class FusedMaxRelativeConv(Form, MaxRelativeConv):
    """Search, maximum and interleaving in one operator; in inference, convolution, batch norm and GELU in another."""

    stands_for, plain = MaxRelativeConv, MaxRelativeConv.construct
    plain_neighbours = MaxRelativeConv.neighbours

    def prepare(self) -> None:
        self.operator = operators.MaxRelative(self.search.k, self.search.dilation)
        self.pointwise_gelu, self.ones = operators.PointwiseThen("gelu"), ones_like_outputs(self.conv)
        self.is_folded = not isinstance(self.norm, nn.BatchNorm2d)
        self.scale_shift = None if self.is_folded else operators.AffineOfNorm(self.norm.eps)

    def has_norm_in_training(self) -> bool:
        return not self.is_folded and self.norm.training

    def searched(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 2 C, H, W), the channels interleaved, and the neighbours (B, H W, k)."""
        y = self.pool(x)
        return self.operator(x, y, transposed_position(x.shape[1], x.shape[2] * x.shape[3], y.shape[2] * y.shape[3]))

    def neighbours(self, x: Tensor) -> Tensor:
        return self.searched(x)[1] if self.accepts(x) else self.plain_neighbours(x)

    def in_training(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(self.searched(x)[0])))

    def in_inference(self, x: Tensor) -> Tensor:
        norm, conv, interleaved = self.norm, self.conv, self.searched(x)[0]
        if self.is_folded:
            return self.pointwise_gelu(interleaved, conv.weight, self.ones, conv.bias, self.ones)
        scale, shift = self.scale_shift(norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance)
        return self.pointwise_gelu(interleaved, conv.weight, scale, shift + scale * conv.bias, self.ones)


class FusedBlock(Form, Block):
    """In training, a branch's layer scale, stochastic depth and shortcut in one operator. In inference, batch norms go
    into the 1x1 convolutions after them, and these take along what follows them."""

    stands_for, plain = Block, Block.construct

    @classmethod
    def fits(cls, cell: Block) -> bool:
        return isinstance(cell.attn.spatial, (SplitKernelAttention, LargeKernelAttention))

    def prepare(self) -> None:
        self.residual, self.scale_shift = operators.Residual(), operators.AffineOfNorm(self.norm1.eps)
        self.fold_norm = operators.Behind()
        self.pointwise_gelu, self.pointwise_add = operators.PointwiseThen("gelu"), operators.PointwiseThen("add")
        self.nothing, self.one = Tensor(NOTHING), Tensor(np.ones(1, np.float32))
        self.ones = ones_like_outputs(self.attn.proj_1)
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
        return self.residual(y, self.nothing, x, self.layer_scale_2, self.drop_path.mask(x, second))

    def in_inference(self, x: Tensor, noise: Optional[Tensor] = None) -> Tensor:
        norm1, norm2, weight = self.norm1, self.norm2, self.layer_scale_1
        proj_1, spatial, proj_2, fc1 = self.attn.proj_1, self.attn.spatial, self.attn.proj_2, self.mlp.fc1
        scale, shift = self.scale_shift(norm1.gamma, norm1.beta, norm1.moving_mean, norm1.moving_variance)
        # x + weight * (norm1(x) + branch) is x * (1 + weight * scale) + weight * (shift + branch)
        shortcut = self.residual(x, self.nothing, self.nothing, 1 + weight * scale, self.one)
        kernel, bias = self.fold_norm(proj_1.weight, proj_1.bias, scale, shift)
        y = spatial.before_norm(self.pointwise_gelu(x, kernel, self.ones, bias, self.ones))
        kernel, bias = proj_2.weight, proj_2.bias
        if self.spatial_has_norm:
            last = spatial.norm
            kernel, bias = self.fold_norm(
                kernel, bias, *self.scale_shift(last.gamma, last.beta, last.moving_mean, last.moving_variance)
            )
        x = self.pointwise_add(y, kernel, weight, weight * shift + weight * bias, shortcut)
        scale, shift = self.scale_shift(norm2.gamma, norm2.beta, norm2.moving_mean, norm2.moving_variance)
        return self.mlp.residual(x, *self.fold_norm(fc1.weight, fc1.bias, scale, shift), self.layer_scale_2)


class FusedFoldedBlock(Form, FoldedBlock):
    """As `FusedBlock` in inference."""

    stands_for, plain = FoldedBlock, FoldedBlock.construct
    in_training = plain

    def prepare(self) -> None:
        self.residual = operators.Residual()
        self.pointwise_gelu, self.pointwise_add = operators.PointwiseThen("gelu"), operators.PointwiseThen("add")
        self.nothing, self.one = Tensor(NOTHING), Tensor(np.ones(1, np.float32))
        self.ones = ones_like_outputs(self.proj_1)

    def in_inference(self, x: Tensor, noise: Optional[Tensor] = None) -> Tensor:
        proj_1, proj_2, fc1 = self.proj_1, self.proj_2, self.mlp.fc1
        shortcut = self.residual(x, self.nothing, self.nothing, self.shortcut, self.one)
        y = self.spatial(self.pointwise_gelu(x, proj_1.weight, self.ones, proj_1.bias, self.ones))
        x = self.pointwise_add(y, proj_2.weight, self.ones, proj_2.bias, shortcut)
        return self.mlp.residual(x, fc1.weight, fc1.bias, self.ones)
