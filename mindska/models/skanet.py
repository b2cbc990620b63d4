"""SkaNet: split kernel attention over a graph convolution.

Source: SkaNet, ICANN 2023, and the authors' network (PyTorch). The port computes the same function; the parity tests
hold it to the authors' figures. Where it departs from the authors' code:

- Input sizes at which their code stops are defined here. The relative position is as wide as the true number of pooled
  nodes, and the dilation shrinks to what fits (see `layers/graph.py`).
- Their factory ignores its keyword arguments; here `drop_rate` and `drop_path_rate` are obeyed (defaults: theirs, 0.1).
- `skanet_nano` is a small member of the family of our own, for the quick start and the tests.

The paper gives 2.36 G multiply-accumulates for SkaNet-S at 256x256. Counting output elements times weights per output,
convolutions and the classifier come to 2.496 G, and the pairwise distances to 0.380 G more; `scripts/count.py` prints
both. No plain convention gives the published figure.
"""

from __future__ import annotations

from functools import partial
from typing import Optional

from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from .factory import register_variants
from .layers.backbone import refuse_too_small
from .layers.blocks import Attention, batch_norm, conv
from .layers.graph import MaxRelativeConv
from .layers.pyramid import STRIDES, Pyramid

__all__ = ["SkaNet"]

GRAPH_REDUCTIONS = (4, 2, 1, 1)  # pooling of the graph's keys, by stage


def fewest_nodes(height: int, width: int, reductions: tuple[int, ...] = STRIDES) -> int:
    """The smallest number of graph nodes among the stages for an input of height x width pixels."""
    return min((-(-height // s) // r) * (-(-width // s) // r) for s, r in zip(reductions, GRAPH_REDUCTIONS))


def why_too_small(height: int, width: int, k: int, reductions: tuple[int, ...] = STRIDES) -> str:
    """Why images of so few pixels are too small for `k` neighbours a node; empty when they are not."""
    nodes = fewest_nodes(height, width, reductions)
    if nodes >= k:
        return ""
    return (
        f"SkaNet's graph needs at least {k} nodes in every stage, but an input of {height}x{width} pixels leaves "
        f"{nodes}"
    )


@constexpr
def check_input_size(height: int, width: int, k: int, reductions: tuple[int, ...]) -> None:
    """SettingError when a stage has fewer nodes than the `k` neighbours it needs."""
    refuse_too_small(partial(why_too_small, k=k, reductions=reductions), height, width)


class SplitKernelAttention(nn.Cell):
    """Split kernel attention (paper, section 3.2). (B, C, H, W) -> (B, C, H, W)

    The graph convolution's output is split 1/8, 3/8, 4/8 over the channels: untouched, depthwise 5x5 dilated by 2,
    depthwise 7x7 dilated by 3. The sum with what was split makes a gate, 1x1 convolution and SiLU, on the input.
    """

    def __init__(self, dim: int, k: int, dilation: int, reduction: int) -> None:
        super().__init__()
        self.splits = (dim // 8, dim * 3 // 8, dim // 2)
        self.graph = MaxRelativeConv(dim, k, dilation, reduction)
        self.dw_conv1 = conv(self.splits[1], self.splits[1], 5, dilation=2, group=self.splits[1])
        self.dw_conv2 = conv(self.splits[2], self.splits[2], 7, dilation=3, group=self.splits[2])
        self.pw_conv = conv(dim, dim)
        self.norm = batch_norm(dim)

    def construct(self, x: Tensor) -> Tensor:
        graph = self.graph(x)
        untouched, five, seven = ops.split(graph, self.splits, axis=1)
        gate = self.pw_conv(ops.concat((untouched, self.dw_conv1(five), self.dw_conv2(seven)), axis=1) + graph)
        return self.norm(gate * ops.sigmoid(gate) * x)


class SkaNet(Pyramid):
    """SkaNet. `k`: neighbours of a node; the other arguments, inputs and outputs are those of `Pyramid`.

    Block number i (from 0) keeps every (i // 4 + 1)-th of its nearest nodes.

    Raises:
        SettingError: the input is so small that a stage has fewer than `k` nodes (the message gives the smallest size).
    """

    def __init__(self, k: int = 5, drop_rate: float = 0.1, drop_path_rate: float = 0.1, **kwargs) -> None:
        def attention(dim: int, index: int, stage: int) -> nn.Cell:
            return Attention(dim, SplitKernelAttention(dim, k, index // 4 + 1, GRAPH_REDUCTIONS[stage]))

        super().__init__(attention, drop_rate=drop_rate, drop_path_rate=drop_path_rate, **kwargs)
        self.k = k

    def why_too_small(self, height: int, width: int) -> str:
        """A stage must have `k` nodes."""
        return why_too_small(height, width, self.k, self.reductions)

    stages_of_pyramid = Pyramid.forward_stages  # in graph mode `super()` is that of the instance's own class

    def forward_stages(self, x: Tensor, noise: Optional[Tensor] = None) -> list[Tensor]:
        check_input_size(x.shape[2], x.shape[3], self.k, self.reductions)
        return self.stages_of_pyramid(x, noise)


PREPROCESSING = dict(
    input_size=(3, 256, 256),
    crop_pct=0.9,
    interpolation="bicubic",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)

default_cfgs = {
    "skanet_s": dict(
        url="", num_classes=1000, first_conv="stages.0.patch_embed.proj", classifier="classifier", **PREPROCESSING
    ),
    "skanet_nano": dict(
        url="",
        num_classes=1000,
        first_conv="stages.0.patch_embed.proj",
        classifier="classifier",
        **{**PREPROCESSING, "input_size": (3, 64, 64), "crop_pct": 1.0},
    ),
}

VARIANTS = {
    "skanet_s": dict(dims=(64, 96, 128, 256), mlp_ratios=(8, 8, 4, 4), depths=(3, 3, 12, 2), k=5),
    "skanet_nano": dict(dims=(16, 32, 64, 96), mlp_ratios=(4, 4, 4, 4), depths=(1, 1, 2, 1), k=4),
}

register_variants(__name__, SkaNet, VARIANTS)
