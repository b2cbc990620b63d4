"""RoIAlign in NumPy (aligned, as many samples as a bin has cells): for targets of masks, and to compare with.

A bin is the mean of its samples, a sample the bilinear value at its place. Both axes are apart, so a box is two
matrices: out = rows @ features @ columns^T.
"""

from __future__ import annotations

import math

import numpy as np


def interpolation_matrix(
    start: np.float32, length: np.float32, out: int, cells: int, sampling_ratio: int = 0
) -> np.ndarray:
    """(out, cells): the weights of a map's cells along one axis in the bins of a box.

    Args:
        start, length: of the box in cells, half a cell taken off (aligned).
        sampling_ratio: samples of a bin; 0: the bin's length, rounded up.
    """
    size = length / np.float32(out)
    samples = sampling_ratio or math.ceil(size)
    matrix = np.zeros((out, cells), np.float32)
    if samples < 1:  # a box of no size
        return matrix
    bins, steps = np.arange(out, dtype=np.float32), np.arange(samples, dtype=np.float32)
    places = (start + bins[:, None] * size) + (steps + np.float32(0.5)) * size / np.float32(samples)
    inside = (places >= -1) & (places <= cells)
    places = np.clip(places, 0, None)
    low = np.minimum(np.floor(places).astype(np.int64), cells - 1)
    high = np.minimum(low + 1, cells - 1)
    share = np.where(low >= cells - 1, np.float32(0), places - low.astype(np.float32))
    rows = np.broadcast_to(np.arange(out)[:, None], places.shape)
    np.add.at(matrix, (rows[inside], low[inside]), (np.float32(1) - share)[inside])
    np.add.at(matrix, (rows[inside], high[inside]), share[inside])
    return matrix / np.float32(samples)


def roi_align(
    features: np.ndarray,
    boxes: np.ndarray,
    out_size: tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
) -> np.ndarray:
    """A map (C, H, W) in boxes (n, 4), as (n, C, height, width) float32; a box of no area gives 0.

    Args:
        out_size: (height, width); spatial_scale: cells of the map in a pixel of the boxes.
        sampling_ratio: samples of a bin along an axis; 0: its length, rounded up.
    """
    result = np.zeros((len(boxes), len(features), *out_size), np.float32)
    for i, box in enumerate(boxes.astype(np.float32)):
        rows, columns, touched = box_matrices(box, out_size, features.shape[1:], spatial_scale, sampling_ratio)
        result[i] = rows @ features[:, touched[0], touched[1]] @ columns.T
    return result


def box_matrices(
    box: np.ndarray,
    out_size: tuple[int, int],
    map_size: tuple[int, ...],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
) -> tuple[np.ndarray, np.ndarray, tuple[slice, slice]]:
    """The two matrices of a box (4,), for the cells that it touches only, and which those are (rows, columns)."""
    x1, y1, x2, y2 = box.astype(np.float32) * np.float32(spatial_scale) - np.float32(0.5)
    both, touched = [], []
    for start, end, out, cells in zip((y1, x1), (y2, x2), out_size, map_size):
        matrix = interpolation_matrix(start, end - start, out, cells, sampling_ratio)
        some = matrix.any(0).nonzero()[0]
        part = slice(some[0], some[-1] + 1) if len(some) else slice(0, 0)
        both.append(matrix[:, part])
        touched.append(part)
    return both[0], both[1], (touched[0], touched[1])


def roi_levels(boxes: np.ndarray, levels: int = 4, finest_scale: int = 56) -> np.ndarray:
    """The level (n,) of a pyramid that each box takes its features from: floor(log2(sqrt(w h) / 56 + 1e-6))."""
    scale = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    level = np.floor(np.log2(scale / np.float32(finest_scale) + np.float32(1e-6)))
    return np.clip(level, 0, levels - 1).astype(np.int64)
