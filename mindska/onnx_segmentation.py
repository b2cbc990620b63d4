"""Segmenters as ONNX graphs: the writers of necks, heads and resizes, registered on import (see `onnx_graph`).

A resize takes its height and width from the map that it must fit, so that they may stay free. Bilinear ones are
`half_pixel` or `align_corners`, the nearest is `asymmetric` with `floor`: other rules shift a mask and shrink it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mindspore import Tensor

from .models.layers.fpn import FPN
from .onnx_graph import FIXED_SIZES, OnnxGraph, backbone_features, writes
from .segmentation.deeplabv3 import ASPPHead, DeepLabV3
from .segmentation.segmenter import Segmenter
from .segmentation.semantic_fpn import FPNHead, ScaleHead, SemanticFPN
from .segmentation.upernet import AdaptivePool, PyramidPooling, UPerHead, UPerNet, pooling_matrix

FIXED_SIZES[AdaptivePool] = "UPerNet's pooling belongs to one height and width"
NEAREST = dict(mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")


def _bilinear(align_corners: bool) -> dict[str, str]:
    return dict(mode="linear", coordinate_transformation_mode="align_corners" if align_corners else "half_pixel")


def _part(graph: OnnxGraph, x: str, start: int, end: int) -> str:
    """Dimensions `start` to `end` of x, as a vector."""
    return graph("Slice", graph("Shape", x), graph.integers(start), graph.integers(end))


def _resized(graph: OnnxGraph, x: str, like: str, **how: Any) -> str:
    """x at the height and width of another map."""
    sizes = graph("Concat", _part(graph, x, 0, 2), _part(graph, like, 2, 4), axis=0)
    return graph("Resize", x, "", "", sizes, **how)


def _twice(graph: OnnxGraph, x: str) -> str:
    scales = graph.constant([1, 1, 2, 2], "scales:1,1,2,2", np.float32)
    how: dict[str, Any] = _bilinear(False)
    return graph("Resize", x, "", scales, **how)


@writes(FPN)
def _fpn(graph: OnnxGraph, cell: FPN, features: Sequence[str]) -> list[str]:
    used = list(features)[cell.start_level :]
    merged = [graph.write(layer, x) for layer, x in zip(cell.lateral_convs, used)]
    for i in range(len(merged) - 1, 0, -1):
        merged[i - 1] = graph("Add", merged[i - 1], _resized(graph, merged[i], merged[i - 1], **NEAREST))
    maps = [graph.write(layer, x) for layer, x in zip(cell.fpn_convs, merged)]
    for i in range(cell.extra_levels):
        if cell.extra == "pool":
            maps.append(graph("MaxPool", maps[-1], kernel_shape=[1, 1], strides=[2, 2]))
        else:
            maps.append(graph.write(cell.fpn_convs[len(used) + i], maps[-1] if i else used[-1]))
    return maps


@writes(ScaleHead)
def _scale_head(graph: OnnxGraph, cell: ScaleHead, x: str) -> str:
    for layer in cell.convs:
        x = graph.write(layer, x)
        x = _twice(graph, x) if cell.enlarges else x
    return x


@writes(FPNHead)
def _fpn_head(graph: OnnxGraph, cell: FPNHead, maps: Sequence[str]) -> str:
    total = finest = graph.write(cell.scale_heads[0], maps[0])
    for head, x in zip(cell.scale_heads[1:], maps[1:]):
        total = graph("Add", total, _resized(graph, graph.write(head, x), finest, **_bilinear(False)))
    return graph.write(cell.conv_seg, total)


@writes(PyramidPooling)
def _pyramid_pooling(graph: OnnxGraph, cell: PyramidPooling, x: str) -> str:
    maps, (height, width) = [x], graph.size
    assert height and width
    for pool, layer in zip(cell.pools, cell.convs):
        if pool.bins == 1:
            pooled = graph("GlobalAveragePool", x)
        else:
            rows = graph.constant(pooling_matrix(height, pool.bins).T, f"pooling_rows:{pool.bins}:{height}")
            columns = graph.constant(pooling_matrix(width, pool.bins), f"pooling_columns:{width}:{pool.bins}")
            pooled = graph("MatMul", rows, graph("MatMul", x, columns))
        maps.append(_resized(graph, graph.write(layer, pooled), x, **_bilinear(False)))
    return graph("Concat", *maps, axis=1)


@writes(UPerHead)
def _uper_head(graph: OnnxGraph, cell: UPerHead, maps: Sequence[str]) -> str:
    how = _bilinear(False)
    merged = [graph.write(layer, x) for layer, x in zip(cell.lateral_convs, maps)]
    merged.append(graph.write(cell.bottleneck, graph.write(cell.psp, maps[-1])))
    for i in range(len(merged) - 1, 0, -1):
        merged[i - 1] = graph("Add", merged[i - 1], _resized(graph, merged[i], merged[i - 1], **how))
    levels = [graph.write(layer, x) for layer, x in zip(cell.fpn_convs, merged)]
    levels.append(merged[-1])
    levels = [levels[0], *(_resized(graph, x, levels[0], **how) for x in levels[1:])]
    return graph.write(cell.conv_seg, graph.write(cell.fpn_bottleneck, graph("Concat", *levels, axis=1)))


@writes(ASPPHead)
def _aspp_head(graph: OnnxGraph, cell: ASPPHead, maps: Sequence[str]) -> str:
    branches = [graph.write(layer, maps[-1]) for layer in cell.aspp[:-1]]
    mean = graph.write(cell.aspp[-1], graph("GlobalAveragePool", maps[-1]))
    branches.append(graph("Expand", mean, graph("Shape", branches[0])))
    return graph.write(cell.conv_seg, graph.write(cell.project, graph("Concat", *branches, axis=1)))


def padded_images(graph: OnnxGraph, net: Any, x: str) -> str:
    """Images of the size that a network pads them to; of a free size nothing is known, and none is padded."""
    height, width = graph.size
    if not (height and width) or (size := net.padded_size(height, width)) == (height, width):
        return x
    graph.size = size
    pads = graph.integers(0, 0, 0, 0, 0, 0, size[0] - height, size[1] - width)
    return graph("Pad", x, pads, graph.scalar(0.0))


@writes(SemanticFPN, UPerNet, DeepLabV3)
def _segmenter(graph: OnnxGraph, net: Segmenter, x: str) -> str:
    height, width = graph.size
    whole = padded_images(graph, net, x)
    features = backbone_features(graph, net.backbone, whole)
    if height and width:
        images = np.zeros((1, net.in_channels, height, width), np.float32)
        graph.size = tuple(net.features(net.prepared(Tensor(images), None))[-1].shape[2:])
    maps = [features[i] for i in net.levels]
    logits = graph.write(net.decode_head, graph.write(net.neck, maps))
    logits = _resized(graph, logits, whole, **_bilinear(net.resize.align_corners))
    if whole != x and height and width:
        logits = graph("Slice", logits, graph.integers(0, 0), graph.integers(height, width), graph.integers(2, 3))
    return logits
