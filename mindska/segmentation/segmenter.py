"""What every segmenter is: a backbone, a head that gives logits, perhaps an auxiliary head, and the loss.

Parts have MMSegmentation's names: `backbone`, `neck`, `decode_head`, `auxiliary_head`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable, Optional

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import HeNormal, Normal, initializer
from mindspore.ops import constexpr

from ..errors import SettingError
from ..models.layers.backbone import Backbone
from ..models.layers.blocks import Dropout, conv
from ..models.layers.pixel_loss import PixelCrossEntropy, cropped
from ..models.layers.resize import Bilinear
from ..models.sknet import ConvNorm

Maps = Sequence[Tensor]
BN_MOMENTUM = 0.9  # of batch norms in heads: the share of the old value


def conv_norm(cin: int, cout: int, kernel: int = 1, dilation: int = 1) -> ConvNorm:
    """Convolution without bias that keeps the size, batch norm (PyTorch's epsilon and momentum), ReLU."""
    return ConvNorm(cin, cout, BN_MOMENTUM, kernel=kernel, dilation=dilation)


class Dropout2d(nn.Cell):
    """Dropout of whole channels of (B, C, H, W); `noise` (B, C) decides as in `DropPath`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = float(rate)
        self.channels = Dropout(rate)

    def construct(self, x: Tensor, noise: Optional[Tensor] = None) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        b, c = x.shape[0], x.shape[1]
        return x * self.channels(ops.ones((b, c), x.dtype), noise).reshape(b, c, 1, 1)


class FCNHead(nn.Cell):
    """A 3x3 convolution, dropout and the classifier on one feature: (B, C, H, W) -> (B, classes, H, W)

    Source: Long et al., 2015, as MMSegmentation's and ml-cvnets' auxiliary heads have it.
    """

    def __init__(self, cin: int, channels: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.channels = channels
        self.convs = nn.CellList([conv_norm(cin, channels, 3)])
        self.dropout = Dropout2d(drop_rate)
        self.conv_seg = conv(channels, num_classes)

    def construct(self, x: Tensor, noise: Optional[Tensor] = None) -> Tensor:
        return self.conv_seg(self.dropout(self.convs[0](x), noise))


def padded(x: Tensor, height: int, width: int) -> Tensor:
    """(B, C, H, W) with zeros at the right and below."""
    b, c, h, w = x.shape
    if h < height:  # joined on: the gradient of `ops.pad` is wrong (see `StemPool`)
        x = ops.concat((x, ops.zeros((b, c, height - h, w), x.dtype)), axis=2)
    return x if w >= width else ops.concat((x, ops.zeros((b, c, x.shape[2], width - w), x.dtype)), axis=3)


def init_head(head: nn.Cell) -> None:
    """MMSegmentation's initial values: convolutions He's normal by fan_out, the classifier normal(0, 0.01)."""
    for name, cell in head.cells_and_names():
        if isinstance(cell, nn.Conv2d):
            last = name.rpartition(".")[2] == "conv_seg"
            values = Normal(0.01) if last else HeNormal(mode="fan_out", nonlinearity="relu")
            cell.weight.set_data(initializer(values, cell.weight.shape, cell.weight.dtype))


@constexpr
def check_inputs(images: tuple[int, ...], channels: int, noise: Optional[tuple[int, ...]], noise_size: int) -> None:
    """SettingError where shapes are not (B, channels, H, W) and, if there is noise, (B, noise_size)."""
    if len(images) != 4 or images[1] not in (channels, -1) or 0 in images:
        raise SettingError(f"the network takes images (B, {channels}, H, W), at least one; found {images}")
    if noise is not None and noise != (images[0], noise_size) and -1 not in (*images, *noise):
        raise SettingError(f"the network takes noise {(images[0], noise_size)}; found {noise}")


@constexpr
def check_labels(images: tuple[int, ...], labels: tuple[int, ...]) -> None:
    """SettingError where labels are not (B, H, W) of the images."""
    if labels != (images[0], *images[2:]) and -1 not in (*images, *labels):
        raise SettingError(f"labels have the shape {labels}; images {images} take labels {(images[0], *images[2:])}")


@constexpr
def check_values(images: tuple[int, ...], stride: int, pools_to_one: bool, norms_in_training: bool) -> None:
    """SettingError where a batch norm in training would have one value a channel, whose variance is none.

    stride: of the coarsest feature; pools_to_one: whether a batch norm follows its mean.
    """
    values = images[0] * (1 if pools_to_one else -(-images[2] // stride) * -(-images[3] // stride))
    if norms_in_training and values == 1:
        what = "the map is pooled to one pixel" if pools_to_one else "the coarsest map has one pixel"
        raise SettingError(
            f"training with one image a batch: a batch norm would have one value a channel ({what}), and no variance; "
            f"expected at least two images a batch (of each process)" + ("" if pools_to_one else ", or larger ones")
        )


def size_padding(backbone: Backbone) -> Callable[[int, int], tuple[int, int]]:
    """What gives the size to which images of (height, width) pixels are padded: their own unless the backbone needs
    more."""

    @constexpr
    def padded_size(height: int, width: int) -> tuple[int, int]:
        if not backbone.why_too_small(height, width):
            return height, width
        smallest = next(side for side in range(1, 1025) if not backbone.why_too_small(side, side))
        return max(height, smallest), max(width, smallest)

    return padded_size


class Segmenter(nn.Cell):
    """A network that gives logits for each pixel.

    Args:
        backbone: a network of ours, made with `features_only`.
        num_classes: of the logits.
        align_corners: of every enlargement of logits.
        over_valid: see `PixelCrossEntropy`.

    A subclass sets `decode_head`, which has `channels` (those that its dropout drops) and `norms_in_training()`, and
    may set `neck` and `auxiliary_head`; then it calls `complete`.

    Inputs:
        images (B, in_channels, H, W), of any size: where the backbone needs more pixels, zeros are added at the right
        and below, and the logits there cut off. noise (B, `noise_size`), optional: uniform numbers in [0, 1) that drive
        the stochastic layers in training mode: the backbone's, then a column a channel of each head's dropout.

    Returns:
        Logits (B, num_classes, H, W).

    Raises:
        SettingError: the inputs have other shapes.
    """

    method = ""
    output_stride: Optional[int] = None  # by default; None for the backbone's own
    head_channels = 0  # by default
    auxiliary_weight = 0.4
    align_corners = False  # how logits get the images' size, see `bilinear`
    over_valid = False  # whether the loss is a mean over the labelled pixels, see `PixelCrossEntropy`
    has_auxiliary_head = False
    pools_to_one = False  # whether a batch norm follows a pooling over the whole map
    neck: nn.Cell
    decode_head: nn.Cell
    auxiliary_head: nn.Cell

    def __init__(self, backbone: Backbone, num_classes: int, head_channels: Optional[int] = None) -> None:
        super().__init__()
        if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
            raise SettingError(f"num_classes is {num_classes!r}; expected a number of classes")
        if head_channels is not None:
            if not isinstance(head_channels, int) or isinstance(head_channels, bool) or head_channels < 2:
                raise SettingError(f"head_channels is {head_channels!r}; expected a number of channels, at least 2")
            self.head_channels = head_channels
        self.backbone, self.num_classes = backbone, num_classes
        self.model_name = f"{self.method}_{backbone.model_name}"
        self.in_channels = backbone.in_channels
        # The stages' features, from the finest to the coarsest: a stem's is left out.
        self.levels = [i for i, info in enumerate(backbone.feature_info) if info["name"].startswith("stages.")]
        self.feature_channels = [backbone.feature_info[i]["chs"] for i in self.levels]
        self.reductions = [backbone.feature_info[i]["reduction"] for i in self.levels]
        # Arguments of `create_segmenter` that checkpoints record. The epsilon of a dense backbone may differ from the
        # classifier's whose weights it starts from: it is the segmenter's.
        self.options: dict[str, Any] = dict(
            backbone.options, output_stride=self.reductions[-1], head_channels=self.head_channels
        )
        backbone.options.pop("norm_eps", None)
        self.padded_size = size_padding(backbone)
        self.resize = Bilinear(self.align_corners)
        self.criterion = PixelCrossEntropy(self.align_corners, self.over_valid)

    def complete(self) -> None:
        """What follows from the heads: initial values, and how much noise they take."""
        if "neck" not in self._cells:
            self.neck = nn.Identity()
        self.has_auxiliary = "auxiliary_head" in self._cells
        heads = [self.decode_head, *([self.auxiliary_head] if self.has_auxiliary else [])]
        for head in heads:
            init_head(head)
        self.noise_columns = np.cumsum([0, self.backbone.num_drop_paths, *(head.channels for head in heads)]).tolist()
        self.noise_size = self.noise_columns[-1]

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay: all of one dimension (asked for by MindCV's optimisers)."""
        return {p.name for p in self.trainable_params() if p.ndim <= 1}

    def why_too_small(self, height: int, width: int) -> str:
        """Empty: no image is too small, for small ones are padded."""
        return ""

    def check_image_size(self, height: int, width: int) -> None:
        """Nothing: images of any size are taken."""

    def features(self, images: Tensor, noise: Optional[Tensor] = None) -> list[Tensor]:
        """The features of the backbone's stages for padded images, from the finest to the coarsest."""
        columns = None if noise is None else noise[:, : self.noise_columns[1]]
        features = self.backbone.forward_stages(images, columns)
        return [features[i] for i in self.levels]

    def decode(self, features: list[Tensor], noise: Optional[Tensor] = None) -> Tensor:
        """Logits (B, num_classes, h, w) at the head's stride."""
        columns = None if noise is None else noise[:, self.noise_columns[1] : self.noise_columns[2]]
        return self.decode_head(self.neck(features), columns)

    def auxiliary(self, features: list[Tensor], noise: Optional[Tensor] = None) -> Tensor:
        """Logits (B, num_classes, h, w) of the auxiliary head, on the last feature but one."""
        columns = None if noise is None else noise[:, self.noise_columns[2] :]
        return self.auxiliary_head(features[-2], columns)

    def prepared(self, images: Tensor, noise: Optional[Tensor]) -> Tensor:
        """Checked and padded images."""
        check_inputs(images.shape, self.in_channels, None if noise is None else noise.shape, self.noise_size)
        height, width = self.padded_size(images.shape[2], images.shape[3])
        return padded(images, height, width)

    def head_logits(self, images: Tensor, noise: Optional[Tensor] = None) -> Tensor:
        """Logits (B, num_classes, h, w) at the head's stride, of the padded images."""
        return self.decode(self.features(self.prepared(images, noise), noise), noise)

    def construct(self, images: Tensor, noise: Optional[Tensor] = None) -> Tensor:
        x = self.prepared(images, noise)
        logits = self.resize(self.decode(self.features(x, noise), noise), (x.shape[2], x.shape[3]))
        return cropped(logits, images.shape[2], images.shape[3])

    def losses(self, images: Tensor, labels: Tensor, noise: Optional[Tensor] = None) -> Tensor:
        """What training minimises, a scalar float32: the loss of the logits, plus the weighted auxiliary one.

        Args:
            labels: (B, H, W) int32; `IGNORED` counts nothing. Where all are ignored it is 0, and so are the gradients.

        Raises:
            SettingError: the inputs have other shapes; in training, a batch norm would see one value only.
        """
        check_labels(images.shape, labels.shape)
        x, in_training = self.prepared(images, noise), self.training and self.decode_head.norms_in_training()
        check_values(x.shape, self.reductions[-1], self.pools_to_one, in_training)
        size, features = (x.shape[2], x.shape[3]), self.features(x, noise)
        total = self.criterion(self.decode(features, noise), labels, size)
        if not self.has_auxiliary:
            return total
        return total + self.auxiliary_weight * self.criterion(self.auxiliary(features, noise), labels, size)
