"""A detector in a file of weights, ready to run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mindspore import nn

from ... import builders
from ...config import Config
from ...detection.evaluation import DetectionOptions, Transform
from ...errors import PredictionError
from ...names import task_of
from ...prediction import is_exported
from .task import build_pixels, detection_options, evaluation_transform, method_of


@dataclass(frozen=True)
class OpenedDetector:
    """What it takes to find objects.

    Attributes:
        config: with the model that the file names.
    """

    config: Config
    network: nn.Cell
    record: dict[str, Any]
    transform: Transform
    options: DetectionOptions
    num_classes: int

    @property
    def class_names(self) -> list[str]:
        """A name for every class."""
        known = list(self.record.get("class_names") or [])[: self.num_classes]
        return known + [f"class {i}" for i in range(len(known), self.num_classes)]

    @property
    def has_masks(self) -> bool:
        """Whether objects have masks."""
        return method_of(self.config.model).has_masks


def open_detector(config: Config) -> OpenedDetector:
    """The detector in the file that the configuration names.

    Raises:
        UserError: it is missing, damaged, or is no detector.
    """
    if is_exported(config.ckpt_path):
        raise PredictionError(
            f"{config.ckpt_path} is an exported model, which gives the raw maps; objects are found with the weights "
            f"that it was made from"
        )
    weights = builders.configured_weights(config)
    assert weights is not None  # the command asks for a checkpoint
    record = weights.record
    model = record.get("model") or config.model
    if task_of(model) != "detection" or weights.num_classes is None:
        raise PredictionError(f"{config.ckpt_path} holds {model or 'a model without a name'}, which is no detector")
    if not config.model:
        config = replace(config, model=model, task="detection", dataset=None)
    pixels = build_pixels(config, record.get("preprocessing"))
    network = builders.build_network(config, weights.num_classes, pixels.in_channels, weights).set_train(False)
    options, transform = detection_options(config), evaluation_transform(config, pixels)
    return OpenedDetector(config, network, record, transform, options, weights.num_classes)
