"""The four-stage network that SkaNet and VAN share; only the attention inside its blocks differs."""

from __future__ import annotations

from typing import Callable, Optional

import numpy as np
from mindspore import Tensor, nn

from .backbone import Backbone, stage_strides
from .blocks import Block, LayerNorm2d, PatchEmbed, init_weights

STRIDES = (4, 8, 16, 32)  # stride of each stage's output


class Stage(nn.Cell):
    """Patch embedding, blocks, layer norm. (B, Cin, H, W) -> (B, C, H/s, W/s), rounded up"""

    def __init__(self, patch_embed: PatchEmbed, blocks: list[Block], dim: int, norm_eps: float) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.blocks = nn.CellList(blocks)
        self.norm = LayerNorm2d(dim, norm_eps)

    def construct(self, x: Tensor, noise: Optional[Tensor] = None) -> Tensor:
        x = self.patch_embed(x)
        for i, block in enumerate(self.blocks):
            x = block(x, None if noise is None else noise[:, 2 * i : 2 * i + 2])
        return self.norm(x)


class Pyramid(Backbone):
    """Four stages, at strides 4, 8, 16 and 32 (or less, by `output_stride`).

    Args:
        attention: makes the attention of block number `index` (0-based, over the whole network) with `dim` channels
            in stage `stage` (0-based): attention(dim, index, stage).
        dims, mlp_ratios, depths: channels, MLP expansion and number of blocks of each stage.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first.
        norm_eps: epsilon of the stages' layer norms.

    The other arguments, inputs and outputs are those of `Backbone`; two columns of `noise` a block.
    """

    def __init__(
        self,
        attention: Callable[[int, int, int], nn.Cell],
        dims: tuple[int, ...],
        mlp_ratios: tuple[float, ...],
        depths: tuple[int, ...],
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        output_stride: Optional[int] = None,
        **kwargs,
    ) -> None:
        names = [f"stages.{i}" for i in range(len(dims))]
        columns = 2 * sum(depths)
        placed = stage_strides(STRIDES, output_stride)
        self.reductions = tuple(reduction for reduction, _, _ in placed)
        kwargs.update(in_channels=in_channels, drop_path_rate=drop_path_rate, output_stride=output_stride)
        super().__init__(dims, self.reductions, names, columns, **kwargs)
        rates = np.linspace(0, drop_path_rate, sum(depths)).tolist()
        stages, index, cin = [], 0, in_channels
        for stage, (dim, ratio, depth) in enumerate(zip(dims, mlp_ratios, depths)):
            blocks = [Block(dim, attention(dim, i, stage), ratio, rates[i]) for i in range(index, index + depth)]
            _, stride, dilation = placed[stage]
            patch_embed = PatchEmbed(cin, dim, kernel=3 if stage else 7, stride=stride, dilation=dilation)
            stages.append(Stage(patch_embed, blocks, dim, norm_eps))
            index, cin = index + depth, dim
        self.stages = nn.CellList(stages)
        self.stage_columns = [2 * sum(depths[:i]) for i in range(len(depths) + 1)]  # of `noise`
        self.options["norm_eps"] = norm_eps
        init_weights(self)

    def init_classifier(self) -> None:
        """The authors' initial values."""
        init_weights(self.classifier)

    def forward_stages(self, x: Tensor, noise: Optional[Tensor] = None) -> list[Tensor]:
        """The four stages' outputs, at the strides of `reductions`: 4, 8, 16 and 32."""
        features = []
        for i, stage in enumerate(self.stages):
            x = stage(x, None if noise is None else noise[:, self.stage_columns[i] : self.stage_columns[i + 1]])
            features.append(x)
        return features

    def stage_cells(self) -> list[list[nn.Cell]]:
        return [[stage] for stage in self.stages]
