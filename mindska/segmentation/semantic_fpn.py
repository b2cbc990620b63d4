"""Semantic FPN: Kirillov et al., Panoptic Feature Pyramid Networks, 2019, as MMSegmentation builds it.

The authors of VAN and of LSKA publish it on their backbones. A test holds it to MMSegmentation's figures on LSKA's.
"""

from __future__ import annotations

from typing import Optional

from mindspore import Tensor, nn

from ..models.layers.backbone import Backbone
from ..models.layers.blocks import conv
from ..models.layers.fpn import FPN
from ..models.layers.resize import Bilinear
from .segmenter import Dropout2d, Maps, Segmenter, conv_norm


class ScaleHead(nn.Cell):
    """Max(1, `level`) 3x3 convolutions, each followed by an enlargement to twice the size unless `level` is 0.

    (B, Cin, H, W) -> (B, C, H * 2^level, W * 2^level)
    """

    def __init__(self, cin: int, channels: int, level: int) -> None:
        super().__init__()
        self.enlarges = level > 0
        self.convs = nn.CellList([conv_norm(channels if i else cin, channels, 3) for i in range(max(1, level))])
        self.resize = Bilinear()

    def construct(self, x: Tensor) -> Tensor:
        for layer in self.convs:
            x = layer(x)
            if self.enlarges:
                x = self.resize(x, (2 * x.shape[2], 2 * x.shape[3]))
        return x


class FPNHead(nn.Cell):
    """The sum of all levels at the finest level's size, dropout and the classifier.

    (B, C, H / 2^i, W / 2^i) each -> (B, classes, H, W)
    """

    def __init__(self, cin: int, channels: int, levels: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.channels = channels
        self.scale_heads = nn.CellList([ScaleHead(cin, channels, level) for level in range(levels)])
        self.resize = Bilinear()
        self.dropout = Dropout2d(drop_rate)
        self.conv_seg = conv(channels, num_classes)

    def norms_in_training(self) -> bool:
        """Whether the head's batch norms take the batch's statistics."""
        return self.scale_heads[0].convs[0].norm.training

    def construct(self, maps: Maps, noise: Optional[Tensor] = None) -> Tensor:
        total = self.scale_heads[0](maps[0])
        for i in range(1, len(self.scale_heads)):
            # Twice as large each time; for sides that no power of 2 divides that is more than the finest level has.
            total = total + self.resize(self.scale_heads[i](maps[i]), (total.shape[2], total.shape[3]))
        return self.conv_seg(self.dropout(total, noise))


class SemanticFPN(Segmenter):
    """FPN, and FPNHead of half as many channels. The other arguments, inputs and outputs are those of `Segmenter`.

    Args:
        drop_rate: of the head's channels before the classifier.
    """

    method = "semantic_fpn"
    head_channels = 128

    def __init__(
        self, backbone: Backbone, num_classes: int = 150, drop_rate: float = 0.1, head_channels: Optional[int] = None
    ) -> None:
        super().__init__(backbone, num_classes, head_channels)
        channels = self.head_channels
        self.neck = FPN(self.feature_channels, 2 * channels)
        self.decode_head = FPNHead(2 * channels, channels, len(self.levels), num_classes, drop_rate)
        self.complete()
