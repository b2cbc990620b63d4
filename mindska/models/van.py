"""VAN, the visual attention network, with its two attentions: large kernels (LKA) and large separable ones (LSKA).

Sources: LKA and the network: Guo et al., Visual Attention Network, 2022. LSKA: Lau et al., Large Separable Kernel
Attention, 2023. The port computes the functions of the authors' PyTorch networks; the parity tests hold it to figures
of the latter. Where the two differ, and where this file departs from the authors' code:

- LKA decomposes a large kernel into a depthwise convolution, a dilated depthwise one and a 1x1 one. LSKA splits each
  of the first two into a horizontal and a vertical line; both have biases, so their order matters (horizontal first).
- LSKA's authors choose the kernel by `k_size`, and an unknown one fails at the first forward pass. Here it is part of
  the model's name, or a keyword of the plain one (`create_model("van_tiny", k_size=23)`), and an unknown one fails at
  once.
- Their segmentation backbone is the same network with 1e-5 for the epsilon of the layer norms: `norm_eps=1e-5`.
- Their preprocessing is what timm 0.4.12's `vision_transformer._cfg` says: mean and standard deviation 0.5.
"""

from __future__ import annotations

from typing import Any, Optional

from mindspore import Tensor, nn

from ..errors import SettingError
from .factory import register_variants
from .layers.blocks import Attention, conv
from .layers.pyramid import Pyramid

__all__ = ["VAN"]

# Size of the whole kernel -> (kernel, dilated kernel, dilation).
KERNELS = {
    7: (3, 3, 2),
    11: (3, 5, 2),
    23: (5, 7, 3),
    35: (5, 11, 3),
    41: (5, 13, 3),
    53: (5, 17, 3),
}
# The only one that VAN's authors built. Their paper calls it 21x21; LSKA's authors count 5 + 3 * (7 - 1) = 23.
LKA_SIZE = 23


class LargeKernelAttention(nn.Cell):
    """x times a 1x1 convolution of a large depthwise kernel's output. (B, C, H, W) -> (B, C, H, W)

    The large kernel is a depthwise convolution followed by a dilated one (VAN, section 3.1); when `separable`, each of
    them is a horizontal line followed by a vertical one (LSKA, section 3).
    """

    def __init__(self, dim: int, size: int, separable: bool) -> None:
        super().__init__()
        kernel, dilated, dilation = KERNELS[size]

        def depthwise(side: int, dilation: int = 1) -> list[nn.Cell]:
            shapes = [(1, side), (side, 1)] if separable else [(side, side)]
            return [conv(dim, dim, shape, dilation=dilation, group=dim) for shape in shapes]

        self.dw_conv = nn.SequentialCell(*depthwise(kernel))
        self.dw_d_conv = nn.SequentialCell(*depthwise(dilated, dilation))
        self.pw_conv = conv(dim, dim)

    def construct(self, x: Tensor) -> Tensor:
        return x * self.pw_conv(self.dw_d_conv(self.dw_conv(x)))


class VAN(Pyramid):
    """VAN. The other arguments, inputs and outputs are those of `Pyramid`.

    Args:
        k_size: None for VAN's own attention (LKA); the size of LSKA's kernel for separable ones.

    Raises:
        SettingError: there is no such kernel; the message lists those that there are.
    """

    def __init__(self, k_size: Optional[int] = None, **kwargs) -> None:
        if k_size is not None and k_size not in KERNELS:
            raise SettingError(f"k_size is {k_size!r}; LSKA's kernels are {', '.join(map(str, KERNELS))}")

        def attention(dim: int, index: int, stage: int) -> nn.Cell:
            return Attention(dim, LargeKernelAttention(dim, k_size or LKA_SIZE, separable=k_size is not None))

        super().__init__(attention, **kwargs)


PREPROCESSING = dict(
    input_size=(3, 224, 224), crop_pct=0.9, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)

SIZES: dict[str, dict[str, Any]] = {
    "van_tiny": dict(dims=(32, 64, 160, 256), mlp_ratios=(8, 8, 4, 4), depths=(3, 3, 5, 2)),
    "van_small": dict(dims=(64, 128, 320, 512), mlp_ratios=(8, 8, 4, 4), depths=(2, 2, 4, 2)),
    "van_base": dict(dims=(64, 128, 320, 512), mlp_ratios=(8, 8, 4, 4), depths=(3, 3, 12, 3)),
    "van_large": dict(dims=(64, 128, 320, 512), mlp_ratios=(8, 8, 4, 4), depths=(3, 5, 27, 3)),
}

VARIANTS = {
    name if k is None else f"{name}_lska_k{k}": row if k is None else {**row, "k_size": k}
    for name, row in SIZES.items()
    for k in (None, *KERNELS)
}

default_cfgs = {
    name: dict(
        url="", num_classes=1000, first_conv="stages.0.patch_embed.proj", classifier="classifier", **PREPROCESSING
    )
    for name in VARIANTS
}


def resolve(name: str, keywords: dict) -> str:
    """The variant that an entry point makes: van_tiny with k_size=23 is van_tiny_lska_k23."""
    asked, own = keywords.get("k_size"), VARIANTS[name].get("k_size")
    if asked in (None, own):
        return name
    if own is not None:
        raise SettingError(f"{name} has the kernel {own}, but k_size={asked} was asked for; leave one of them out")
    return f"{name}_lska_k{asked}"


register_variants(__name__, VAN, VARIANTS, resolve)
