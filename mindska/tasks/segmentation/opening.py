"""A segmenter in a file, weights or an exported model, ready to run."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable

import numpy as np

from ... import builders
from ...config import Config
from ...data import Preprocessing
from ...dense_evaluation import Runner
from ...errors import ConfigError, PredictionError
from ...names import method_and_backbone, task_of
from ...prediction import is_exported, open_exported
from ...segmentation.evaluation import Inference, Logits, logits_of
from ...segmentation.factory import METHODS
from ...segmentation.transforms import SegmentationEvalTransform, Size
from .task import evaluation_size, inference

log = logging.getLogger("mindska")


@dataclass(frozen=True)
class Segmenter:
    """What it takes to find label maps.

    Attributes:
        config: with the model that the file names.
        run: images (B, C, h, w) -> logits (B, classes, h, w); a `Runner` is made by it, for the sizes that it compiles.
        batch_size: images of one size that it takes at once.
    """

    config: Config
    run: Callable[[Collection[Size]], Any]
    record: dict[str, Any]
    transform: SegmentationEvalTransform
    inference: Inference
    num_classes: int
    align_corners: bool
    batch_size: int

    @property
    def class_names(self) -> list[str]:
        """A name for every class."""
        known = list(self.record.get("class_names") or [])[: self.num_classes]
        return known + [f"class {i}" for i in range(len(known), self.num_classes)]


class ExportedRunner:
    """An exported segmenter as a function.

    Args:
        batch: images that it takes at once; 0: any number.
    """

    def __init__(self, logits: Logits, batch: int) -> None:
        self.logits, self.batch, self.sizes = logits, batch, set()  # type: ignore[var-annotated]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        if not self.batch or len(images) == self.batch:
            return self.logits(images)
        found = []
        for first in range(0, len(images), self.batch):
            part = images[first : first + self.batch]
            filled = np.concatenate([part, np.zeros((self.batch - len(part), *part.shape[1:]), np.float32)])
            found.append(self.logits(filled)[: len(part)])
        return np.concatenate(found)


def open_segmenter(config: Config) -> Segmenter:
    """The segmenter in the file that the configuration names.

    Raises:
        UserError: it is missing, damaged, or is no segmenter; its sizes are not those that are asked for.
    """
    if is_exported(config.ckpt_path):
        logits, record, pixels, batch = open_exported(Path(config.ckpt_path), config.use_ema)
        if config.model not in ("", record["model"]):
            raise ConfigError(f"{config.ckpt_path} holds {record['model']}, but the model asked for is {config.model}")
    else:
        weights = builders.configured_weights(config)
        assert weights is not None  # the command asks for a checkpoint
        record = weights.record
    model = record.get("model") or config.model
    if task_of(model) != "segmentation":
        raise PredictionError(f"{config.ckpt_path} holds {model or 'a model without a name'}, which is no segmenter")
    if not config.model:
        config = replace(config, model=model, task="segmentation", dataset=None)
    if is_exported(config.ckpt_path):
        return _exported(config, logits, record, pixels, batch)
    assert weights is not None
    if weights.num_classes is None:
        raise PredictionError(f"{config.ckpt_path} has no classifier: it predicts nothing")
    pixels = builders.build_preprocessing(config, record.get("preprocessing"))
    network = builders.build_network(config, weights.num_classes, pixels.in_channels, weights).set_train(False)
    key = repr((config.model, weights.num_classes, weights.options, config.amp_level))

    def run(sizes: Collection[Size]) -> Runner:
        return Runner(network, logits_of, sizes, key)

    return Segmenter(
        config,
        run,
        record,
        SegmentationEvalTransform(pixels, evaluation_size(config, record.get("evaluation", {}), pixels)),
        inference(config, pixels),
        weights.num_classes,
        network.align_corners,
        config.batch_size,
    )


def _exported(
    config: Config,
    logits: Callable[[np.ndarray], np.ndarray],
    record: dict[str, Any],
    pixels: Preprocessing,
    batch: int,
) -> Segmenter:
    size = record["input_shape"][2:]
    own = builders.build_preprocessing(config, record.get("preprocessing"))
    sizes, how = evaluation_size(config, record.get("evaluation", {}), own), inference(config, own)
    if all(isinstance(side, int) and side > 0 for side in size):
        # Every image gets this size, or is seen through a window of it.
        own = replace(own, image_size=pixels.image_size)
        if how.window is None:
            log.info("Every image is resized to %dx%d, the only size that the model takes", *own.image_size)
            sizes = replace(sizes, scale=None, fixed=own.image_size, size_divisor=1)
        else:
            how = replace(how, window=own.image_size)
    return Segmenter(
        config,
        lambda sizes: ExportedRunner(logits, batch),
        record,
        SegmentationEvalTransform(own, sizes),
        how,
        record["num_classes"],
        METHODS[method_and_backbone(config.model)[0]].align_corners,
        batch or config.batch_size,
    )
