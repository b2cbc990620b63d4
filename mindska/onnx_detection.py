"""Detectors as ONNX graphs: the writers of their heads, registered on import (see `onnx_graph`).

What is written are the raw maps of every level, `scores0`, ..., `deltas0`, ...: of Mask R-CNN those of its RPN.
"""

from __future__ import annotations

import numpy as np

from .detection.detector import Detector
from .detection.mask_rcnn import MaskRCNN, RPNHead
from .detection.retinanet import RetinaHead, RetinaNet
from .detection.ssdlite import PooledConv, Separable, SSDHead, SSDLite
from .onnx_graph import OnnxGraph, backbone_features, writes
from .onnx_segmentation import padded_images


@writes(RetinaHead)
def _retina_head(graph: OnnxGraph, cell: RetinaHead, x: str) -> list[str]:
    scores = deltas = x
    for layer in cell.cls_convs:
        scores = graph("Relu", graph.write(layer, scores))
    for layer in cell.reg_convs:
        deltas = graph("Relu", graph.write(layer, deltas))
    return [graph.write(cell.retina_cls, scores), graph.write(cell.retina_reg, deltas)]


@writes(RPNHead)
def _rpn_head(graph: OnnxGraph, cell: RPNHead, x: str) -> list[str]:
    x = graph("Relu", graph.write(cell.rpn_conv, x))
    return [graph.write(cell.rpn_cls, x), graph.write(cell.rpn_reg, x)]


@writes(Separable)
def _separable(graph: OnnxGraph, cell: Separable, x: str) -> str:
    return graph.write(cell.pointwise, graph.write(cell.depthwise, x))


@writes(PooledConv)
def _pooled_conv(graph: OnnxGraph, cell: PooledConv, x: str) -> str:
    return graph("Relu", graph.write(cell.conv, graph("GlobalAveragePool", x)))


@writes(SSDHead)
def _ssd_head(graph: OnnxGraph, cell: SSDHead, x: str) -> str:
    return graph.write(cell.predictor, graph.write(cell.proj, x))


def _features(graph: OnnxGraph, net: Detector, x: str) -> list[str]:
    features = backbone_features(graph, net.backbone, padded_images(graph, net, x))
    return [features[i] for i in net.levels]


@writes(RetinaNet, MaskRCNN)
def _with_pyramid(graph: OnnxGraph, net: Detector, x: str) -> list[str]:
    head = net.bbox_head if isinstance(net, RetinaNet) else net.rpn_head
    pairs = [graph.write(head, level) for level in graph.write(net.neck, _features(graph, net, x))]
    return [score for score, _ in pairs] + [delta for _, delta in pairs]


@writes(SSDLite)
def _ssdlite(graph: OnnxGraph, net: SSDLite, x: str) -> list[str]:
    maps = _features(graph, net, x)[-net.num_backbone_maps :]
    for layer in net.extra_layers:
        maps.append(graph.write(layer, maps[-1]))
    scores, deltas = [], []
    for head, level, priors in zip(net.ssd_heads, maps, net.num_priors):
        # Of each prior the deltas and then the scores: as their channels' numbers.
        rows = np.arange(priors * (5 + net.num_classes)).reshape(priors, -1)
        y = graph.write(head, level)
        scores.append(graph("Gather", y, graph.integers(*rows[:, 4:].reshape(-1).tolist()), axis=1))
        deltas.append(graph("Gather", y, graph.integers(*rows[:, :4].reshape(-1).tolist()), axis=1))
    return scores + deltas
