"""Cells of a folded network: the equations that are left when batch norms and layer scales are in the convolutions."""

from __future__ import annotations

from typing import Optional

from mindspore import Parameter, Tensor, nn, ops

from ..models.layers.blocks import GELU, ConvMlp
from ..models.layers.graph import MaxRelativeConv


class FoldedSplitKernelAttention(nn.Cell):
    """`SplitKernelAttention` without its batch norm; "plus what was split" is in the convolutions.

    (B, C, H, W) -> (B, C, H, W)
    """

    def __init__(
        self,
        splits: tuple[int, int, int],
        graph: MaxRelativeConv,
        dw_conv1: nn.Conv2d,
        dw_conv2: nn.Conv2d,
        pw_conv: nn.Conv2d,
    ) -> None:
        super().__init__()
        self.splits, self.graph = splits, graph
        self.dw_conv1, self.dw_conv2, self.pw_conv = dw_conv1, dw_conv2, pw_conv

    def construct(self, x: Tensor) -> Tensor:
        untouched, five, seven = ops.split(self.graph(x), self.splits, axis=1)
        gate = self.pw_conv(ops.concat((untouched, self.dw_conv1(five), self.dw_conv2(seven)), axis=1))
        return gate * ops.sigmoid(gate) * x


class FoldedBlock(nn.Cell):
    """`Block` without batch norms and layer scales; of the attention's shortcut one factor a channel is left.

    (B, C, H, W) -> (B, C, H, W)
    """

    def __init__(
        self, shortcut: Parameter, proj_1: nn.Conv2d, act: GELU, spatial: nn.Cell, proj_2: nn.Conv2d, mlp: ConvMlp
    ) -> None:
        super().__init__()
        self.shortcut = shortcut  # (C,)
        self.proj_1, self.act, self.spatial, self.proj_2, self.mlp = proj_1, act, spatial, proj_2, mlp

    def construct(self, x: Tensor, noise: Optional[Tensor] = None) -> Tensor:
        x = x * self.shortcut.reshape(-1, 1, 1) + self.proj_2(self.spatial(self.act(self.proj_1(x))))
        return x + self.mlp(x)
