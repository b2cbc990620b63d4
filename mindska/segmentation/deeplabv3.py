"""DeepLabv3: Chen et al., Rethinking Atrous Convolution for Semantic Image Segmentation, 2017, as ml-cvnets builds it.

It is the protocol that SkaNet's paper follows for PASCAL VOC 2012 (that of MobileViT; its authors published no code for
it). How a backbone of ours is joined to the head is our reading: the head takes the last stage, the auxiliary head the
one before, and output strides are made as `stage_strides` says. The dilations and channels are those of ml-cvnets'
configuration, 12, 24, 36 and 512; its code's defaults are 6, 12, 18 and 256. A test holds it to figures of its code.
"""

from __future__ import annotations

from typing import Optional

from mindspore import Tensor, nn, ops

from ..models.layers.backbone import Backbone
from ..models.layers.blocks import conv
from .segmenter import Dropout2d, FCNHead, Maps, Segmenter, conv_norm

DILATIONS = (12, 24, 36)


class ASPPHead(nn.Cell):
    """Atrous spatial pyramid pooling of the coarsest level, and the classifier: (B, C, H, W) -> (B, classes, H, W)

    A 1x1 convolution, dilated 3x3 ones, and a 1x1 one of the mean over the map; concatenated in this order.
    """

    def __init__(self, cin: int, channels: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.channels = channels
        self.aspp = nn.CellList(
            [conv_norm(cin, channels), *(conv_norm(cin, channels, 3, d) for d in DILATIONS), conv_norm(cin, channels)]
        )
        self.project = conv_norm(len(self.aspp) * channels, channels)
        self.dropout = Dropout2d(drop_rate)
        self.conv_seg = conv(channels, num_classes)

    def norms_in_training(self) -> bool:
        """Whether the head's batch norms take the batch's statistics."""
        return self.project.norm.training

    def branches(self, x: Tensor) -> list[Tensor]:
        """What is concatenated, (B, channels, H, W) each."""
        pooled = len(self.aspp) - 1
        outputs = [self.aspp[i](x) for i in range(pooled)]
        mean = self.aspp[pooled](ops.mean(x, (2, 3), keep_dims=True))
        return [*outputs, ops.broadcast_to(mean, outputs[0].shape)]

    def construct(self, maps: Maps, noise: Optional[Tensor] = None) -> Tensor:
        x = self.project(ops.concat(self.branches(maps[-1]), axis=1))
        return self.conv_seg(self.dropout(x, noise))


class DeepLabV3(Segmenter):
    """ASPPHead and, in training, FCNHead of a quarter of its input's channels (at least 128).

    Args:
        drop_rate: of the heads' channels before their classifiers.
        auxiliary_head: False for a network without it.

    The other arguments, inputs and outputs are those of `Segmenter`.
    """

    method = "deeplabv3"
    output_stride = 8
    has_auxiliary_head = pools_to_one = align_corners = over_valid = True
    head_channels = 512

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int = 21,
        drop_rate: float = 0.1,
        head_channels: Optional[int] = None,
        auxiliary_head: bool = True,
    ) -> None:
        super().__init__(backbone, num_classes, head_channels)
        self.decode_head = ASPPHead(self.feature_channels[-1], self.head_channels, num_classes, drop_rate)
        if auxiliary_head:
            cin = self.feature_channels[-2]
            self.auxiliary_head = FCNHead(cin, max(cin // 4, 128), num_classes, drop_rate)
        self.complete()
