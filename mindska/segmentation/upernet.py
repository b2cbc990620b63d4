"""UPerNet: Xiao et al., Unified Perceptual Parsing for Scene Understanding, 2018, as MMSegmentation builds it.

The authors of VAN publish it on their backbone. A test holds it to MMSegmentation's figures on that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from ..models.layers.backbone import Backbone
from ..models.layers.blocks import conv
from ..models.layers.resize import Bilinear
from .segmenter import Dropout2d, FCNHead, Maps, Segmenter, conv_norm

POOL_SCALES = (1, 2, 3, 6)


def pooling_matrix(size: int, bins: int) -> np.ndarray:
    """(size, bins) float32: column i has the mean over floor(i size / bins) to ceil((i + 1) size / bins)."""
    matrix = np.zeros((size, bins), np.float32)
    for i in range(bins):
        first, end = i * size // bins, -(-(i + 1) * size // bins)
        matrix[first:end, i] = 1 / (end - first)
    return matrix


@constexpr
def _pooling(size: int, bins: int) -> Tensor:
    return Tensor(pooling_matrix(size, bins))


class AdaptivePool(nn.Cell):
    """Adaptive average pooling to bins x bins, as PyTorch's; for maps of fewer pixels as well. (B, C, H, W) -> ..."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins = bins

    def construct(self, x: Tensor) -> Tensor:
        if self.bins == 1:
            return ops.mean(x, (2, 3), keep_dims=True)
        rows = ops.matmul(x, _pooling(x.shape[3], self.bins))  # (B, C, H, bins)
        return ops.matmul(rows.swapaxes(2, 3), _pooling(x.shape[2], self.bins)).swapaxes(2, 3)


class PyramidPooling(nn.Cell):
    """A map, pooled to several sizes, each with a 1x1 convolution, and enlarged again; all concatenated.

    (B, Cin, H, W) -> (B, Cin + C * len(scales), H, W)
    """

    def __init__(self, cin: int, channels: int, scales: Sequence[int] = POOL_SCALES) -> None:
        super().__init__()
        self.pools = nn.CellList([AdaptivePool(bins) for bins in scales])
        self.convs = nn.CellList([conv_norm(cin, channels) for _ in scales])
        self.resize = Bilinear()

    def construct(self, x: Tensor) -> Tensor:
        maps = [x]
        for pool, layer in zip(self.pools, self.convs):
            maps.append(self.resize(layer(pool(x)), (x.shape[2], x.shape[3])))
        return ops.concat(maps, axis=1)


class UPerHead(nn.Cell):
    """Pyramid pooling of the coarsest level, an FPN with norms and ReLUs, and all levels together at the finest size.

    (B, Ci, H / 2^i, W / 2^i) each -> (B, classes, H, W)
    """

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.channels = channels
        self.psp = PyramidPooling(in_channels[-1], channels)
        self.bottleneck = conv_norm(in_channels[-1] + len(POOL_SCALES) * channels, channels, 3)
        self.lateral_convs = nn.CellList([conv_norm(cin, channels) for cin in in_channels[:-1]])
        self.fpn_convs = nn.CellList([conv_norm(channels, channels, 3) for _ in in_channels[:-1]])
        self.fpn_bottleneck = conv_norm(len(in_channels) * channels, channels, 3)
        self.resize = Bilinear()
        self.dropout = Dropout2d(drop_rate)
        self.conv_seg = conv(channels, num_classes)

    def norms_in_training(self) -> bool:
        """Whether the head's batch norms take the batch's statistics."""
        return self.bottleneck.norm.training

    def construct(self, maps: Maps, noise: Optional[Tensor] = None) -> Tensor:
        last = len(self.lateral_convs)
        merged = [self.bottleneck(self.psp(maps[last]))]  # from the coarsest to the finest
        for i in range(last - 1, -1, -1):
            lateral = self.lateral_convs[i](maps[i])
            merged.append(lateral + self.resize(merged[-1], (lateral.shape[2], lateral.shape[3])))
        size = (merged[-1].shape[2], merged[-1].shape[3])
        levels = [self.resize(self.fpn_convs[i](merged[last - i]), size) for i in range(last)]
        levels.append(self.resize(merged[0], size))  # which gets no further convolution
        return self.conv_seg(self.dropout(self.fpn_bottleneck(ops.concat(levels, axis=1)), noise))


class UPerNet(Segmenter):
    """UPerHead and, in training, FCNHead of half as many channels on the last feature but one.

    Args:
        drop_rate: of the heads' channels before their classifiers.
        auxiliary_head: False for a network without it.

    The other arguments, inputs and outputs are those of `Segmenter`.
    """

    method = "upernet"
    has_auxiliary_head = pools_to_one = True
    head_channels = 512

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int = 150,
        drop_rate: float = 0.1,
        head_channels: Optional[int] = None,
        auxiliary_head: bool = True,
    ) -> None:
        super().__init__(backbone, num_classes, head_channels)
        channels = self.head_channels
        self.decode_head = UPerHead(self.feature_channels, channels, num_classes, drop_rate)
        if auxiliary_head:
            self.auxiliary_head = FCNHead(self.feature_channels[-2], channels // 2, num_classes, drop_rate)
        self.complete()
