"""What is built on a backbone of ours, segmenters and detectors, as weights see it: names, classifiers, creation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import mindcv
import numpy as np
from mindspore import nn

from ..detection import factory as detection
from ..detection.factory import create_detector
from ..segmentation import factory as segmentation
from ..segmentation.factory import create_segmenter

METHODS = (*segmentation.METHODS, *detection.METHODS)
AUXILIARY = "auxiliary_head."  # of segmenters, for training only
SEGMENTERS_CLASSIFIERS = ("decode_head.conv_seg.", f"{AUXILIARY}conv_seg.")


def split_name(name: str) -> Optional[tuple[str, str]]:
    """(method, backbone) of "semantic_fpn_van_tiny" or "retinanet_van_tiny"; None when it is none of ours."""
    return segmentation.split_name(name) or detection.split_name(name)


def is_detector(name: str) -> bool:
    return detection.split_name(name) is not None


def task_of(name: str) -> str:
    """What a record calls the task of such a network."""
    return "detection" if is_detector(name) else "segmentation"


def card(name: str) -> dict[str, Any]:
    """What MindCV calls a model's configuration: of these networks, or of any other model of the factory."""
    return detection.card(name) if is_detector(name) else segmentation.card(name)


def own_preprocessing(name: str) -> dict[str, Any]:
    """What a model expects of an image: the arguments of `mindska.data.Preprocessing`."""
    return detection.own_preprocessing(name) if is_detector(name) else segmentation.own_preprocessing(name)


def create(name: str, **keywords: Any) -> nn.Cell:
    """A network with initial values: a segmenter, a detector, or a model of MindCV's factory."""
    if is_detector(name):
        return create_detector(name, **keywords)
    return (create_segmenter if split_name(name) else mindcv.create_model)(name, **keywords)


def classifiers(name: str) -> tuple[str, ...]:
    """How the names of the parameters begin whose first axis depends on the classes."""
    parts = detection.split_name(name)
    return tuple(f"{layer}." for layer in detection.METHODS[parts[0]].classifiers) if parts else SEGMENTERS_CLASSIFIERS


def num_classes(name: str, rows: int) -> int:
    """The number of classes for which the first of a network's classifiers has so many rows."""
    parts = detection.split_name(name)
    return detection.METHODS[parts[0]].classes_of_rows(rows) if parts else rows


def reordered(name: str, parameters: Mapping[str, np.ndarray], order: Sequence[int]) -> dict[str, np.ndarray]:
    """A detector's classifiers with the classes in another order; order: the old number of each."""
    parts, found = detection.split_name(name), {}
    for key, value in parameters.items():
        layer = key.rpartition(".")[0]
        if parts and f"{layer}." in classifiers(name):
            found[key] = value[detection.METHODS[parts[0]].class_rows(layer, order)]
    return found
