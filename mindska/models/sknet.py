"""SKNet, selective kernel networks, as its authors published them.

Source: Li et al., Selective Kernel Networks, CVPR 2019, and the authors' Caffe networks, to whose figures the parity
tests hold this port. Where theirs (`sknet50`, `sknet101`) differ from their paper or from a usual ResNet:

- The attention's reduced width is 32, 32, 32, 64 by stage; in SKNet-101 it is 32, 16, 32, 64. The paper's formula,
  max(C / 16, 32), gives 32 in SKNet-101's second stage: the published network is followed.
- The pooling after the stem has no padding and rounds up (its last window hangs over the lower right border).
- Batch norm keeps 95 % of the old statistics, not 90 %.
- The last pooling is over the whole map, as in the paper; theirs is 7x7, which is the same at 224x224 only.
- Their weights expect BGR pixels in 0..255 less (104, 117, 123). Here every network takes RGB: `mindska.weights`
  reverses the first convolution's input channels, and the preprocessing does the rest.

`sknet26` is the paper's smaller network (two units a stage) and `sknet29_16x32d` its CIFAR network: for neither is a
definition published. The latter is ResNeXt-29 16x32d with a 1x1 and a 3x3 path, G = 16 and r = 32: with two 3x3 paths
it would grow by 11 M parameters over ResNeXt-29's 25 M, more than the network of the paper does.
"""

from __future__ import annotations

from typing import Any, Optional

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import HeNormal, initializer

from .factory import register_variants
from .layers.backbone import Backbone, stage_strides
from .layers.blocks import DropPath, batch_norm, conv
from .layers.pooling import StemPool

__all__ = ["SKNet"]
CAFFE_MOMENTUM = 0.95


class ConvNorm(nn.Cell):
    """Convolution without bias, batch norm, and ReLU unless `relu` is false. (B, Cin, H, W) -> (B, C, H/s, W/s)"""

    def __init__(self, cin: int, cout: int, momentum: float, relu: bool = True, **kwargs) -> None:
        super().__init__()
        self.conv = conv(cin, cout, has_bias=False, **kwargs)
        self.norm = batch_norm(cout, momentum)
        self.relu = relu

    def construct(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return ops.relu(x) if self.relu else x


class SelectiveKernel(nn.Cell):
    """Selective kernel convolution (paper, section 3.1). (B, Cin, H, W) -> (B, C, H/s, W/s)

    Args:
        reduced: channels between the two layers of the attention (the paper's d).
        paths: (kernel, dilation) of each path.
        split_input: path number i sees only the i-th part of the input's channels (timm).
    """

    def __init__(self, cin, cout, reduced, paths, group, stride, momentum, split_input) -> None:
        super().__init__()
        self.cout, self.num_paths, self.split_input = cout, len(paths), split_input
        cin = cin // self.num_paths if split_input else cin
        options = dict(stride=stride, group=group)
        self.paths = nn.CellList([ConvNorm(cin, cout, momentum, kernel=k, dilation=d, **options) for k, d in paths])
        self.fc1 = ConvNorm(cout, reduced, momentum)
        self.fc2 = conv(reduced, self.num_paths * cout, has_bias=False)

    def split(self, x: Tensor) -> list[Tensor]:
        """Split: one convolution a path, each (B, C, H/s, W/s)."""
        parts = ops.chunk(x, self.num_paths, axis=1) if self.split_input else (x,) * self.num_paths
        return [path(part) for path, part in zip(self.paths, parts)]

    def fuse(self, outputs: list[Tensor]) -> Tensor:
        """Fuse: the mean over the pixels of the paths' sum, (B, C, 1, 1)."""
        total = outputs[0]
        for output in outputs[1:]:
            total = total + output
        return ops.mean(total, (2, 3), keep_dims=True)

    def attention(self, fused: Tensor) -> Tensor:
        """The softmax weights of the paths for each channel, (B, paths, C)."""
        logits = self.fc2(self.fc1(fused))  # (B, paths * C, 1, 1)
        return ops.softmax(logits.reshape(-1, self.num_paths, self.cout), axis=1)

    def select(self, outputs: list[Tensor], weights: Tensor) -> Tensor:
        """Select: the paths' sum, each times its weights."""
        selected = outputs[0] * weights[:, 0].reshape(-1, self.cout, 1, 1)
        for i in range(1, self.num_paths):
            selected = selected + outputs[i] * weights[:, i].reshape(-1, self.cout, 1, 1)
        return selected

    def construct(self, x: Tensor) -> Tensor:
        outputs = self.split(x)
        return self.select(outputs, self.attention(self.fuse(outputs)))


class SKUnit(nn.Cell):
    """Residual unit around a selective kernel convolution (paper, section 3.2). (B, Cin, H, W) -> (B, C, H/s, W/s)

    A 1x1 convolution before it (`reduce`; none in timm's basic units), another after it, and a projection of the
    shortcut where the size or the number of channels changes.
    """

    def __init__(self, reduce: nn.Cell, sk: nn.Cell, increase: nn.Cell, proj: nn.Cell, drop_path: float) -> None:
        super().__init__()
        self.reduce, self.sk, self.increase, self.proj = reduce, sk, increase, proj
        self.drop_path = DropPath(drop_path)

    def construct(self, x: Tensor, noise: Optional[Tensor] = None) -> Tensor:
        return ops.relu(self.drop_path(self.increase(self.sk(self.reduce(x))), noise) + self.proj(x))


class SKNet(Backbone):
    """SKNet.

    Args:
        depths, widths, channels, reduced: units, width inside the units, output channels, and the attention's reduced
            width of each stage.
        paths, groups: (kernel, dilation) of each path, and the groups of their convolutions.
        bottleneck: units with a 1x1 convolution before and after; else timm's basic ones, with a 3x3 convolution after.
        split_input: each path sees its share of the input's channels only (timm).
        stem: "caffe" (7x7, stride 2, pooling without padding), "timm" (the same, pooling padded by 1), "mindcv" (the
            same, pooling padded at the lower right where the size is even), "cifar" (3x3).
        momentum: share of the old value in batch norm's running statistics.
        zero_init_last: the last batch norm of a unit starts at 0, so that the unit starts as its shortcut (timm).
        drop_path_rate: stochastic depth of the last unit; it rises linearly from 0 at the first.

    The other arguments, inputs and outputs are those of `Backbone`; one column of `noise` a unit. The features are the
    stem's (stride 2; 1 for "cifar") and the stages', as of MindCV's ResNets.
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        channels: tuple[int, ...],
        reduced: tuple[int, ...],
        paths: tuple[tuple[int, int], ...] = ((3, 1), (3, 2)),
        groups: int = 32,
        bottleneck: bool = True,
        split_input: bool = False,
        stem: str = "caffe",
        momentum: float = CAFFE_MOMENTUM,
        zero_init_last: bool = False,
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        output_stride: Optional[int] = None,
        **kwargs,
    ) -> None:
        first, pooled = (1, 1) if stem == "cifar" else (2, 4)  # strides after the stem's convolution, and its pooling
        placed = stage_strides([pooled * 2**i for i in range(len(depths))], output_stride)
        names = ["stem", *(f"stages.{i}" for i in range(len(depths)))]
        kwargs.update(in_channels=in_channels, drop_path_rate=drop_path_rate, output_stride=output_stride)
        super().__init__((64, *channels), (first, *(entry[0] for entry in placed)), names, sum(depths), **kwargs)
        self.stem = ConvNorm(in_channels, 64, momentum, kernel=3 if stem == "cifar" else 7, stride=first)
        self.pool = {
            "caffe": StemPool(padded=False),
            "timm": StemPool(padded=True),
            "mindcv": nn.MaxPool2d(3, 2, pad_mode="same"),
            "cifar": nn.Identity(),
        }[stem]
        self.options["stem"], self.smallest_side = stem, 3 if stem == "caffe" else 1  # for one window of its pooling

        def unit(cin: int, stage: int, stride: int, dilation: int, drop_path: float) -> SKUnit:
            width, cout, dilated = widths[stage], channels[stage], [(k, d * dilation) for k, d in paths]
            kernels = dict(paths=dilated, group=groups, stride=stride, momentum=momentum, split_input=split_input)
            keeps_shape = stride == 1 and cin == cout
            return SKUnit(
                reduce=ConvNorm(cin, width, momentum) if bottleneck else nn.Identity(),
                sk=SelectiveKernel(width if bottleneck else cin, width, reduced[stage], **kernels),
                increase=ConvNorm(width, cout, momentum, relu=False, kernel=1 if bottleneck else 3),
                proj=nn.Identity() if keeps_shape else ConvNorm(cin, cout, momentum, relu=False, stride=stride),
                drop_path=drop_path,
            )

        rates, stages, cin = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist()), [], 64
        for stage, depth in enumerate(depths):
            units = []
            for i in range(depth):
                strided = placed[stage][1:] if stage and i == 0 else (1, 1)
                units.append(unit(cin, stage, *strided, next(rates)))
                cin = channels[stage]
            stages.append(nn.CellList(units))
        self.stages = nn.CellList(stages)
        self._init_weights(zero_init_last)

    def _init_weights(self, zero_init_last: bool) -> None:
        """He's normal distribution for convolutions, PyTorch's uniform one for the classifier (as in timm)."""
        for _, cell in self.cells_and_names():
            if isinstance(cell, nn.Conv2d):
                cell.weight.set_data(initializer(HeNormal(mode="fan_out", nonlinearity="relu"), cell.weight.shape))
            elif isinstance(cell, nn.Dense):
                self.init_classifier()
            elif isinstance(cell, SKUnit) and zero_init_last:
                cell.increase.norm.gamma.set_data(ops.zeros_like(cell.increase.norm.gamma))

    def forward_stages(self, x: Tensor, noise: Optional[Tensor] = None) -> list[Tensor]:
        """The outputs of the stem and of the stages."""
        features, index = [self.stem(x)], 0
        x = self.pool(features[0])
        for stage in self.stages:
            for unit in stage:
                x = unit(x, None if noise is None else noise[:, index])
                index += 1
            features.append(x)
        return features

    def stage_cells(self) -> list[list[nn.Cell]]:
        return [[self.stem], [self.pool, *self.stages[0]], *(list(stage) for stage in self.stages[1:])]

    def attention_weights(self, x: Tensor) -> dict[str, Tensor]:
        """What each unit's softmax chooses (section 5): unit, as "stages.0.0" -> (B, paths, C), summing to 1 over the
        paths, the smallest kernel first."""
        weights, x = {}, self.pool(self.stem(x))
        for i, stage in enumerate(self.stages):
            for j, unit in enumerate(stage):
                weights[f"stages.{i}.{j}"] = unit.sk.attention(unit.sk.fuse(unit.sk.split(unit.reduce(x))))
                x = unit(x)
        return weights


CAFFE = dict(
    input_size=(3, 224, 224),
    crop_pct=0.875,
    interpolation="bilinear",
    mean=(123 / 255, 117 / 255, 104 / 255),
    std=(1 / 255, 1 / 255, 1 / 255),
)
CIFAR = dict(
    input_size=(3, 32, 32),
    crop_pct=1.0,
    interpolation="bilinear",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)

WIDE = dict(widths=(128, 256, 512, 1024), channels=(256, 512, 1024, 2048))
CIFAR_NET = dict(widths=(512, 1024, 2048), channels=(256, 512, 1024), groups=16, stem="cifar", momentum=0.9)

VARIANTS: dict[str, dict[str, Any]] = {
    "sknet26": dict(depths=(2, 2, 2, 2), reduced=(32, 32, 32, 64), **WIDE),
    "sknet50": dict(depths=(3, 4, 6, 3), reduced=(32, 32, 32, 64), **WIDE),
    "sknet101": dict(depths=(3, 4, 23, 3), reduced=(32, 16, 32, 64), **WIDE),
    "sknet29_16x32d": dict(depths=(3, 3, 3), reduced=(32, 32, 64), paths=((1, 1), (3, 1)), **CIFAR_NET),
}

HEAD = dict(url="", first_conv="stem.conv", classifier="classifier")
default_cfgs = {name: dict(num_classes=1000, **HEAD, **CAFFE) for name in VARIANTS}
default_cfgs["sknet29_16x32d"] = dict(num_classes=10, **HEAD, **CIFAR)
register_variants(__name__, SKNet, VARIANTS)
