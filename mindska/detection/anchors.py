"""Anchors of RetinaNet and of Mask R-CNN's RPN, and the priors of SSD: to the bit those of the originals.

They depend on the sizes of the maps only, so they are constants of a compiled graph; each size is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from ..errors import SettingError

Size = tuple[int, int]  # height, width

RETINANET_STRIDES = (8, 16, 32, 64, 128)
RPN_STRIDES = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class AnchorGenerator:
    """Anchors as MMDetection makes them: around the upper left corner of each cell.

    Attributes:
        strides: of the levels in pixels, the finest first.
        scales: sides of the square anchor in strides; ratios: height / width. The ratio varies slowest.
    """

    strides: tuple[int, ...]
    scales: tuple[float, ...]
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)

    @property
    def num_anchors(self) -> int:
        """Anchors of a cell."""
        return len(self.scales) * len(self.ratios)

    def for_levels(self, strides: Sequence[int], extra: int) -> AnchorGenerator:
        """The same anchors, in strides, for a backbone's levels and so many more, each half as large as the one before.

        For backbones whose levels are those of MMDetection's, 4 to 32 pixels, nothing changes.
        """
        return replace(self, strides=(*strides, *(strides[-1] << i for i in range(1, extra + 1))))

    def map_sizes(self, image_size: Size) -> list[Size]:
        """The levels' (height, width) for a padded image of this (height, width): rounded up."""
        return [(-(-image_size[0] // stride), -(-image_size[1] // stride)) for stride in self.strides]

    def base_anchors(self, level: int) -> np.ndarray:
        """(num_anchors, 4) float32, of the cell at 0, 0."""
        stride, half = np.float32(self.strides[level]), np.float32(0.5)
        root = np.sqrt(np.asarray(self.ratios, np.float32))
        scales = np.asarray(self.scales, np.float32)
        heights = (stride * root[:, None] * scales).reshape(-1)
        widths = (stride * (np.float32(1) / root)[:, None] * scales).reshape(-1)
        return np.stack([-half * widths, -half * heights, half * widths, half * heights], 1)

    def level(self, level: int, map_size: Size) -> np.ndarray:
        """(height * width * num_anchors, 4) float32, row by row; read-only."""
        return _level(self, level, map_size)

    def __call__(self, map_sizes: Sequence[Size]) -> np.ndarray:
        """The anchors of all levels, one after the other: (anchors, 4) float32; read-only.

        Raises:
            SettingError: there is another number of maps than of levels.
        """
        return _all_levels(self, tuple(map_sizes))

    def level_sizes(self, map_sizes: Sequence[Size]) -> list[int]:
        """The number of anchors of each level."""
        return [height * width * self.num_anchors for height, width in map_sizes]

    def valid(self, map_sizes: Sequence[Size], padded_size: Size) -> np.ndarray:
        """Which anchors lie on cells that an image has by itself, before it is padded with others: (anchors,) bool.

        Args:
            padded_size: of the image alone, (height, width), a multiple of 32 in MMDetection. Anchors of cells beyond
                it are neither positive nor negative.
        """
        flags = []
        for (height, width), (rows, columns) in zip(map_sizes, self.map_sizes(padded_size)):
            cells = np.zeros((height, width, self.num_anchors), bool)
            cells[:rows, :columns] = True
            flags.append(cells.reshape(-1))
        return np.concatenate(flags)


@lru_cache(maxsize=256)
def _level(generator: AnchorGenerator, level: int, map_size: Size) -> np.ndarray:
    height, width = map_size
    stride = generator.strides[level]
    x, y = np.meshgrid(np.arange(width) * stride, np.arange(height) * stride)
    shifts = np.stack([x, y, x, y], 2).reshape(-1, 1, 4).astype(np.float32)
    return _constant((shifts + generator.base_anchors(level)).reshape(-1, 4))


@lru_cache(maxsize=64)
def _all_levels(generator: AnchorGenerator, map_sizes: tuple[Size, ...]) -> np.ndarray:
    if len(map_sizes) != len(generator.strides):
        raise SettingError(f"There are {len(map_sizes)} maps; expected one for each of the strides {generator.strides}")
    return _constant(np.concatenate([_level(generator, i, size) for i, size in enumerate(map_sizes)]))


def _constant(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False  # it is shared
    return array


RETINANET_ANCHORS = AnchorGenerator(RETINANET_STRIDES, tuple(4 * 2 ** (i / 3) for i in range(3)))
RPN_ANCHORS = AnchorGenerator(RPN_STRIDES, (8.0,))

# (ratios of each map); sizes are shares of the image's sides.
SSD_RATIOS = ((2.0, 3.0),) * 5 + ((2.0,),)
SSD_SIZE_RANGE = (0.1, 1.05)


def ssd_priors_per_cell(ratios: Sequence[Sequence[float]] = SSD_RATIOS) -> list[int]:
    """How many priors each cell of a map has: 6 6 6 6 6 4."""
    return [2 + 2 * len(others) for others in ratios]


def ssd_backbone_maps(backbone: str) -> tuple[int, int]:
    """How many of a backbone's last maps SSD takes, and the channels of the first one's head.

    Two, of strides 16 and 32. Of skanet_nano, which is ours and for images of up to 192 pixels, three, of 8 to 32:
    an object of 30 pixels covers one cell of coarser maps, and hardly ever half of a prior there.
    """
    return (3, 128) if backbone == "skanet_nano" else (2, 512)


def ssd_priors(
    map_sizes: Sequence[Size],
    ratios: Sequence[Sequence[float]] = SSD_RATIOS,
    size_range: tuple[float, float] = SSD_SIZE_RANGE,
) -> np.ndarray:
    """SSD's priors as cvnets makes them: (priors, 4) float32 cx, cy, w, h in shares of the image, clipped to 0..1.

    Map by map, row by row; in a cell: the small square, the one between this size and the next, and for each ratio the
    wide and the tall form of the small one. Read-only.

    Raises:
        SettingError: there is another number of maps than of `ratios`.
    """
    return _ssd_priors(tuple(map_sizes), tuple(map(tuple, ratios)), tuple(size_range))


@lru_cache(maxsize=64)
def _ssd_priors(
    map_sizes: tuple[Size, ...], ratios: tuple[tuple[float, ...], ...], size_range: tuple[float, ...]
) -> np.ndarray:
    if len(map_sizes) != len(ratios):
        raise SettingError(f"There are {len(map_sizes)} maps; expected {len(ratios)}, one for each list of ratios")
    sizes = np.linspace(size_range[0], size_range[1], len(ratios) + 1)
    parts = []
    for (height, width), small, large, others in zip(map_sizes, sizes, sizes[1:], ratios):
        shapes = [(small, small), (np.sqrt(small * large),) * 2]
        for root in np.sqrt(others):
            shapes += [(small * root, small / root), (small / root, small * root)]
        priors = np.empty((height, width, len(shapes), 4))
        priors[..., 0] = ((np.arange(width) + 0.5) / width)[None, :, None]
        priors[..., 1] = ((np.arange(height) + 0.5) / height)[:, None, None]
        priors[..., 2:] = shapes
        parts.append(priors.reshape(-1, 4))
    return _constant(np.clip(np.concatenate(parts), 0, 1).astype(np.float32))
