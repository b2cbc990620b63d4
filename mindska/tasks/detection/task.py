"""Boxes around objects, and with some methods their masks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Optional

from mindspore import nn

from ... import builders
from ...config import Config
from ...data import Preprocessing, TrainLoader, check_same_on_all_ranks
from ...detection.coco import CocoDataset, open_coco
from ...detection.detector import Detector
from ...detection.evaluation import DetectionEvaluator, DetectionOptions, Transform, metric_of
from ...detection.factory import METHODS
from ...detection.metrics import MAX_DETECTIONS
from ...detection.transforms import (
    DetectionAugmentation,
    DetectionEvalTransform,
    DetectionTrainTransform,
    SsdAugmentation,
    SsdEvalTransform,
    SsdTrainTransform,
    check_max_boxes,
)
from ...evaluation import Metric
from ...names import method_and_backbone
from ...weights import Weights
from ..base import Task
from ..segmentation.task import pair


def method_of(model: str) -> type[Detector]:
    """The class of a detector by its name."""
    return METHODS[method_and_backbone(model)[0]]


def build_pixels(config: Config, recorded: Optional[dict[str, Any]] = None) -> Preprocessing:
    """How images become the network's input: `image_size` is the largest that they get, or the fixed one."""
    pixels = builders.build_preprocessing(config, recorded)
    if config.img_scale and not method_of(config.model).fixed_size:
        longer, shorter = pair(config.img_scale)
        pixels = Preprocessing(
            (min(longer, shorter), max(longer, shorter)), 1.0, pixels.interpolation, pixels.mean, pixels.std
        )
    return pixels


def evaluation_transform(config: Config, pixels: Preprocessing) -> Transform:
    """What is done to an image for evaluation."""
    if method_of(config.model).fixed_size:
        return SsdEvalTransform(pixels, config.exif_orientation)
    return DetectionEvalTransform(pixels, exif_orientation=config.exif_orientation)


def detection_options(config: Config) -> DetectionOptions:
    """How objects are found, as configured."""
    return DetectionOptions(config.score_threshold, config.max_detections, config.flip)


def limits(config: Config) -> tuple[int, ...]:
    """How many detections count, as `CocoEvaluator` takes them."""
    if config.max_detections is None:
        return MAX_DETECTIONS
    return (*(limit for limit in MAX_DETECTIONS if limit < config.max_detections), config.max_detections)


def open_set(config: Config, split: str, masks: bool, categories: Any = None) -> CocoDataset:
    """The training or the validation images.

    Args:
        split: "train" or "val". categories: of training, for validation.
    """
    training = split == "train"
    dataset = open_coco(
        config.data_dir,
        config.train_split if training else config.val_split,
        (config.train_images if training else config.val_images) or None,
        split,
        categories=categories,
        masks=masks,
        skip_missing=config.skip_missing,
        exif_orientation=config.exif_orientation,
    )
    check_same_on_all_ranks(dataset)
    return dataset


class Detection(Task):
    """See `Task`."""

    train_set: CocoDataset
    val_set: Optional[CocoDataset]

    @property
    def method(self) -> type[Detector]:
        """The detector's class."""
        return method_of(self.config.model)

    @property
    def metric(self) -> Metric:  # type: ignore[override]
        return metric_of(self.method)

    @property
    def measure(self) -> str:
        return f"sum of {self.method.method}'s losses"

    def open_data(self, validation: bool) -> None:
        masks = self.method.has_masks
        whole = open_set(self.config, "train", masks)
        self.train_set = whole.with_objects()
        self.val_set = open_set(self.config, "val", masks, whole.categories) if validation else None
        check_max_boxes(self.train_set, self.config.max_boxes)
        self.num_classes = builders.training_classes(self.config, self.train_set.class_names)

    def fit_weights(self, weights: Optional[Weights]) -> Optional[Weights]:
        if weights is None or weights.model != self.config.model:  # a backbone's
            return weights
        return builders.weights_for_classes(self.config, weights, self.train_set.class_names, self.num_classes)

    def build_network(self, weights: Optional[Weights], record: dict[str, Any]) -> nn.Cell:
        if record.get("model") != self.config.model:
            record = {}  # of a classifier, whose pixels are no detector's
        self.pixels = build_pixels(self.config, record.get("preprocessing"))
        return builders.build_network(self.config, self.num_classes, self.pixels.in_channels, weights, record)

    def loss(self) -> None:
        """None: the network has its own."""

    def _transform(self) -> Any:
        config = self.config
        if self.method.fixed_size:
            varied = SsdAugmentation(photometric=config.photometric, hflip=config.hflip, max_boxes=config.max_boxes)
            if not config.iou_crop:
                varied = replace(varied, iou_thresholds=(0.0,))
            return SsdTrainTransform(self.pixels, varied)
        longer, shorter = max(self.pixels.image_size), min(self.pixels.image_size)
        scales = tuple((longer, side) for side in config.multi_scale or (shorter,))
        return DetectionTrainTransform(
            self.pixels,
            DetectionAugmentation(scales=scales, hflip=config.hflip, max_boxes=config.max_boxes),
            masks=self.method.has_masks,
        )

    def train_loader(self, network: nn.Cell) -> TrainLoader:
        transform = self._transform()
        return TrainLoader(
            self.train_set,
            transform,
            self.config.batch_size,
            seed=self.config.seed,
            noise_size=network.noise_size,
            max_damaged=self.config.max_damaged,
            buckets=[transform.bucket(self.train_set, index) for index in range(len(self.train_set))],
            **builders.loader_share(self.config, self.world),
        )

    def evaluator(self, network: nn.Cell) -> Optional[DetectionEvaluator]:
        if self.val_set is None:
            return None
        config = self.config
        own = builders.build_evaluation_network(config, self.num_classes, self.pixels.in_channels, network)
        return DetectionEvaluator(
            own,
            self.val_set,
            evaluation_transform(config, self.pixels),
            config.batch_size,
            DetectionOptions(max_detections=config.max_detections),
            ("bbox", "segm") if self.method.has_masks else ("bbox",),
            limits(config),
            **builders.loader_share(config, self.world),
        )

    def record(self, network: nn.Cell) -> dict[str, Any]:
        known = builders.checkpoint_record(self.config, network, self.train_set.class_names, self.pixels)
        return dict(known, task="detection")
