"""Graph layers: nearest neighbours among pooled nodes, and the max-relative convolution over them.

Source: SkaNet (ICANN 2023), which takes them from Vision GNN (Han et al., 2022).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import constexpr

from .blocks import GELU, batch_norm, conv
from .precision import Float32Cell

GROUPS = 4


def sincos_pos_embed(channels: int, grid: int) -> np.ndarray:
    """Sine-cosine position embedding of a square grid: (grid * grid, channels) float64, half of them per axis."""
    omega = 1.0 / 10000 ** (np.arange(channels // 4, dtype=np.float64) / (channels // 4))
    angle = np.outer(np.arange(grid, dtype=np.float64), omega)  # (grid, channels / 4)
    axis = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    return np.concatenate([np.tile(axis, (grid, 1)), np.repeat(axis, grid, axis=0)], axis=1)


def bicubic_taps(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sources (new_size, 4) and float32 weights (new_size, 4) of bicubic interpolation, as PyTorch defines it.

    a = -0.75, pixel centres at half-integers (`align_corners=False`), edges repeated, no antialiasing.
    """
    position = (np.arange(new_size, dtype=np.float32) + np.float32(0.5)) * np.float32(size / new_size)
    position -= np.float32(0.5)
    first = np.floor(position)
    t = position - first
    a = np.float32(-0.75)

    def near(d):  # |d| <= 1
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d):  # 1 < |d| < 2
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    weights = np.stack([far(t + 1), near(t), near(1 - t), far(2 - t)], axis=1).astype(np.float32)
    sources = first.astype(np.int64)[:, None] + np.arange(-1, 3)
    return np.clip(sources, 0, size - 1), weights


@lru_cache(maxsize=32)
def relative_position(channels: int, nodes: int, reduced_nodes: int) -> np.ndarray:
    """What is added to the distances between `nodes` queries and `reduced_nodes` keys: (nodes, reduced_nodes) float32.

    The similarity 2 E E^T / C of position embeddings is taken on a square grid of int(sqrt(nodes)) and interpolated
    along the flattened index, as the authors do. For an image that is not square the geometry is skewed, as theirs is.
    """
    grid = int(math.sqrt(nodes))
    embedding = sincos_pos_embed(channels, grid)
    columns, column_weights = bicubic_taps(grid * grid, reduced_nodes)
    rows, row_weights = bicubic_taps(grid * grid, nodes)
    # Rounded to float32 before the interpolation, as in the definition; in strips, since the whole is nodes^2.
    narrow = np.empty((grid * grid, reduced_nodes), np.float32)
    for start in range(0, grid * grid, 1024):
        strip = (2 * embedding[start : start + 1024] @ embedding.T / channels).astype(np.float32)
        narrow[start : start + 1024] = sum(strip[:, columns[:, i]] * column_weights[:, i] for i in range(4))
    if grid * grid == nodes:
        return -narrow
    return -sum(narrow[rows[:, i]] * row_weights[:, i, None] for i in range(4))


@constexpr
def relative_position_tensor(channels: int, nodes: int, reduced_nodes: int) -> Tensor:
    # A compile-time constant in graph mode: off the hot path, and not in the checkpoint.
    return Tensor(relative_position(channels, nodes, reduced_nodes))


class NearestNodes(Float32Cell):
    """The neighbour search: indices (B, N, k) int32, nearest first, of each query's neighbours among the keys.

    Every dilation-th of the k * dilation nearest keys is taken; where there are fewer, the dilation shrinks to what
    fits (the authors' code stops there). The distance is the squared Euclidean one between L2-normalised features, plus
    the relative position.

    Always in float32, whatever mixed precision the network around it is given: in half precision most distances would
    be ties.

    Inputs:
        queries (B, N, C), keys (B, M, C)
    """

    def __init__(self, k: int, dilation: int) -> None:
        super().__init__()
        self.k, self.dilation = k, dilation

    def closeness(self, queries: Tensor, keys: Tensor) -> Tensor:
        """How near each key is to each query, (B, N, M); the negative distance, but for a term that all keys share."""
        queries = ops.stop_gradient(queries).astype(mstype.float32)
        keys = ops.stop_gradient(keys).astype(mstype.float32)
        queries = queries / ops.maximum(ops.sqrt((queries * queries).sum(-1, keepdims=True)), 1e-12)
        keys = keys / ops.maximum(ops.sqrt((keys * keys).sum(-1, keepdims=True)), 1e-12)
        position = relative_position_tensor(queries.shape[2], queries.shape[1], keys.shape[1])
        # |query|^2 is the same for all keys: it does not change their order.
        offset = (keys * keys).sum(-1).expand_dims(1) + position  # (B, N, M)
        return ops.bmm(queries * 2, keys.swapaxes(1, 2)) - offset

    def fitting_dilation(self, keys: Tensor) -> int:
        """The dilation, or the largest for which there are enough keys (B, M, C)."""
        return min(self.dilation, keys.shape[1] // self.k)

    def construct(self, queries: Tensor, keys: Tensor) -> Tensor:
        dilation = self.fitting_dilation(keys)
        return ops.topk(self.closeness(queries, keys), self.k * dilation)[1][:, :, ::dilation]


class MaxRelativeConv(nn.Cell):
    """Max-relative graph convolution (Vision GNN, equation 4) over `k` dilated neighbours. (B, C, H, W) -> same

    Each node x_i takes max_j(x_j - x_i) over its neighbours j among the nodes pooled by `reduction`; then the channels,
    interleaved x_0, d_0, x_1, d_1, ..., go through a grouped 1x1 convolution, batch norm and GELU.
    """

    def __init__(self, dim: int, k: int, dilation: int, reduction: int) -> None:
        super().__init__()
        self.search = NearestNodes(k, dilation)
        self.pool = nn.AvgPool2d(reduction, reduction) if reduction > 1 else nn.Identity()
        self.conv = conv(2 * dim, dim, group=GROUPS)
        self.norm = batch_norm(dim)
        self.act = GELU()

    def nodes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, N, C) and pooled keys (B, M, C) of a map (B, C, H, W)."""
        return x.flatten(start_dim=2).swapaxes(1, 2), self.pool(x).flatten(start_dim=2).swapaxes(1, 2)

    def neighbours(self, x: Tensor) -> Tensor:
        """The nodes that a map's nodes are compared with, (B, N, k) int32, the nearest first."""
        return self.search(*self.nodes(x))

    def max_relative(self, x: Tensor) -> Tensor:
        """A map's channels and their max-relative features, interleaved: (B, C, H, W) -> (B, 2 C, H, W)"""
        b, c, h, w = x.shape
        queries, keys = self.nodes(x)
        n, m = queries.shape[1], keys.shape[1]
        index = self.search(queries, keys) + (ops.arange(b, dtype=mstype.int32) * m).reshape(b, 1, 1)
        rows = keys.reshape(b * m, c)
        # max(x_j) - x_i is max(x_j - x_i) to the bit; a chain of maxima avoids the arg-max that `max(axis)` computes.
        nearest = ops.gather(rows, index[:, :, 0], 0)  # (B, N, C)
        for j in range(1, index.shape[2]):
            nearest = ops.maximum(nearest, ops.gather(rows, index[:, :, j], 0))
        interleaved = ops.stack((queries, nearest - queries), axis=3).reshape(b, n, 2 * c)
        return interleaved.swapaxes(1, 2).reshape(b, 2 * c, h, w)

    def construct(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(self.max_relative(x))))
