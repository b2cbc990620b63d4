"""FPN, the feature pyramid network, as MMSegmentation and MMDetection build it.

Source: Lin et al., Feature Pyramid Networks for Object Detection, 2017. As in OpenMMLab's, and unlike the usual pair of
convolution and batch norm, the convolutions have biases, no norm and no activation.
"""

from __future__ import annotations

from collections.abc import Sequence

from mindspore import Tensor, nn
from mindspore.common.initializer import XavierUniform, initializer

from ...errors import SettingError
from .blocks import conv
from .resize import every_second, nearest

EXTRA_LEVELS = ("on_input", "pool")


class FPN(nn.Cell):
    """Maps of one number of channels from a backbone's features, each (B, C, H, W), from the finest to the coarsest.

    A 1x1 convolution of each feature, plus the coarser result made as large (nearest); then a 3x3 convolution.

    Args:
        in_channels: of each feature.
        channels: of each map.
        start_level: number of the first feature that is used.
        extra_levels: maps beyond the backbone's, each half as large as the one before.
        extra: where they come from. "on_input": a 3x3 convolution of stride 2 of the last feature, then of each other,
            without an activation between (RetinaNet). "pool": every second pixel of the last map (Mask R-CNN).

    Inputs:
        features: all of the backbone's.

    Returns:
        A tuple of len(in_channels) - start_level + extra_levels maps.

    Raises:
        SettingError: `start_level` or `extra` is out of range.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 256,
        start_level: int = 0,
        extra_levels: int = 0,
        extra: str = "on_input",
    ) -> None:
        super().__init__()
        if not 0 <= start_level < len(in_channels):
            raise SettingError(f"start_level is {start_level}; expected 0 to {len(in_channels) - 1}")
        if extra not in EXTRA_LEVELS:
            raise SettingError(f"extra is {extra!r}; expected one of {', '.join(EXTRA_LEVELS)}")
        self.start_level, self.extra_levels, self.extra = start_level, extra_levels, extra
        used = list(in_channels[start_level:])
        self.num_levels, self.channels = len(used), channels
        self.lateral_convs = nn.CellList([conv(cin, channels) for cin in used])
        maps = [conv(channels, channels, 3) for _ in used]
        if extra == "on_input":
            sources = [used[-1], *[channels] * extra_levels]
            maps += [conv(sources[i], channels, 3, stride=2) for i in range(extra_levels)]
        self.fpn_convs = nn.CellList(maps)
        for _, cell in self.cells_and_names():
            if isinstance(cell, nn.Conv2d):
                cell.weight.set_data(initializer(XavierUniform(), cell.weight.shape, cell.weight.dtype))

    def construct(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        last = self.num_levels - 1
        merged = [self.lateral_convs[last](features[self.start_level + last])]  # from the coarsest to the finest
        for i in range(last - 1, -1, -1):
            lateral = self.lateral_convs[i](features[self.start_level + i])
            merged.append(lateral + nearest(merged[-1], (lateral.shape[2], lateral.shape[3])))
        maps = [self.fpn_convs[i](merged[last - i]) for i in range(self.num_levels)]
        for i in range(self.extra_levels):
            if self.extra == "pool":
                maps.append(every_second(maps[-1]))
            else:
                maps.append(self.fpn_convs[self.num_levels + i](features[-1] if i == 0 else maps[-1]))
        return tuple(maps)
