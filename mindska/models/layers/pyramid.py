"""The four-stage network that SkaNet and VAN share; only the attention inside its blocks differs."""

from __future__ import annotations

from typing import Callable, Optional

import numpy as np
from mindspore import Tensor, nn, ops

from ...errors import SettingError
from .blocks import Block, Dropout, LayerNorm2d, PatchEmbed, init_weights

REDUCTIONS = (4, 8, 16, 32)  # stride of each stage's output


class Stage(nn.Cell):
    """Patch embedding, blocks, layer norm. (B, Cin, H, W) -> (B, C, H/s, W/s), rounded up"""

    def __init__(self, patch_embed: PatchEmbed, blocks: list[Block], dim: int, norm_eps: float) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.blocks = nn.CellList(blocks)
        self.norm = LayerNorm2d(dim, norm_eps)

    def construct(self, x: Tensor, uniform: Optional[Tensor] = None) -> Tensor:
        x = self.patch_embed(x)
        for i, block in enumerate(self.blocks):
            x = block(x, None if uniform is None else uniform[:, 2 * i : 2 * i + 2])
        return self.norm(x)


class Pyramid(nn.Cell):
    """Four stages and a classifier.

    Args:
        attention: makes the attention of block number `index` (0-based, over the whole network) with `dim` channels
            in stage `stage` (0-based): attention(dim, index, stage).
        dims, mlp_ratios, depths: channels, MLP expansion and number of blocks of each stage.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first.
        drop_rate: dropout before the classifier.
        features_only: return the four stages' outputs, at strides 4, 8, 16 and 32, and have no classifier.

    Inputs:
        x (B, in_channels, H, W); noise (B, `noise_size`), optional: uniform numbers in [0, 1) that drive the stochastic
        layers in training mode (two columns a block, then one a feature of the classifier's input).

    Returns:
        Logits (B, num_classes), or a list of four maps when `features_only`.
    """

    is_rewritten = True  # MindCV's FeatureExtractWrapper: this network returns its features itself

    def __init__(
        self,
        attention: Callable[[int, int, int], nn.Cell],
        dims: tuple[int, ...],
        mlp_ratios: tuple[float, ...],
        depths: tuple[int, ...],
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        features_only: bool = False,
    ) -> None:
        super().__init__()
        for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            if not 0 <= rate < 1:
                raise SettingError(f"{name} is {rate}; expected a probability in [0, 1)")
        rates = np.linspace(0, drop_path_rate, sum(depths)).tolist()
        stages, index, cin = [], 0, in_channels
        for stage, (dim, ratio, depth) in enumerate(zip(dims, mlp_ratios, depths)):
            blocks = [Block(dim, attention(dim, i, stage), ratio, rates[i]) for i in range(index, index + depth)]
            patch_embed = PatchEmbed(cin, dim, kernel=3 if stage else 7, stride=2 if stage else 4)
            stages.append(Stage(patch_embed, blocks, dim, norm_eps))
            index, cin = index + depth, dim
        self.stages = nn.CellList(stages)
        self.stage_columns = [2 * sum(depths[:i]) for i in range(len(depths) + 1)]  # of `noise`
        self.noise_size = self.stage_columns[-1] + dims[-1]
        self.feature_info = [
            dict(chs=dim, reduction=reduction, name=f"stages.{i}")
            for i, (dim, reduction) in enumerate(zip(dims, REDUCTIONS))
        ]
        self.num_classes = num_classes
        self.features_only = features_only
        if not features_only:
            self.dropout = Dropout(drop_rate)
            self.classifier = nn.Dense(dims[-1], num_classes)
        init_weights(self)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay: all of one dimension (asked for by MindCV's optimisers)."""
        return {p.name for p in self.trainable_params() if p.ndim <= 1}

    def forward_features(self, x: Tensor, noise: Optional[Tensor] = None) -> list[Tensor]:
        """The four stages' outputs, at strides 4, 8, 16 and 32."""
        features = []
        for i, stage in enumerate(self.stages):
            uniform = None if noise is None else noise[:, self.stage_columns[i] : self.stage_columns[i + 1]]
            x = stage(x, uniform)
            features.append(x)
        return features

    def construct(self, x: Tensor, noise: Optional[Tensor] = None) -> Tensor:
        features = self.forward_features(x, noise)
        if self.features_only:
            return features
        pooled = ops.mean(features[-1], (2, 3))  # (B, C)
        return self.classifier(self.dropout(pooled, None if noise is None else noise[:, self.stage_columns[-1] :]))
