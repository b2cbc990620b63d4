"""A class for every pixel."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, Optional

from mindspore import nn

from ... import builders
from ...config import Config
from ...data import Preprocessing, TrainLoader, check_same_on_all_ranks
from ...errors import ConfigError, DataError
from ...segmentation.datasets import SegmentationDataset, open_training_and_validation
from ...segmentation.evaluation import MEAN_IOU, Inference, SegmentationEvaluator
from ...segmentation.transforms import (
    EvaluationSize,
    SegmentationAugmentation,
    SegmentationEvalTransform,
    SegmentationTrainTransform,
)
from ...weights import Weights
from ..base import Task

IMG_SCALE = (2048, 512)  # MMSegmentation's for ADE20K


def pair(values: tuple[int, ...]) -> tuple[int, int]:
    """One number twice, or two."""
    if len(values) > 2:
        raise ConfigError(f"{values} are {len(values)} numbers of pixels; expected one or two")
    return values[0], values[-1]


def evaluation_size(config: Config, recorded: dict[str, Any], pixels: Preprocessing) -> EvaluationSize:
    """To which size images are brought for evaluation: the configuration's, else the checkpoint's, else (2048, 512).

    Args:
        recorded: the field "evaluation" of a checkpoint's record; {} where it has none.
    """
    given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in recorded.items()}
    known = EvaluationSize(**given)
    changes: dict[str, Any] = {}
    how = config.val_resize or ("keep_ratio" if config.img_scale else None)
    if how == "keep_ratio":
        changes.update(scale=pair(config.img_scale) if config.img_scale else known.scale or IMG_SCALE, fixed=None)
    elif how == "fixed":
        changes.update(scale=None, fixed=pixels.image_size)
    elif how == "none":
        changes.update(scale=None, fixed=None)
    for setting, name in (("size_divisor", "size_divisor"), ("resize_library", "library")):
        if getattr(config, setting) is not None:
            changes[name] = getattr(config, setting)
    return replace(known, **changes)


def inference(config: Config, pixels: Preprocessing) -> Inference:
    """How label maps are found, as configured."""
    stride = pair(config.slide_stride) if config.slide_stride else None
    return Inference(config.scales, config.flip, pixels.image_size if stride else None, stride)


def augmentation(config: Config) -> SegmentationAugmentation:
    """How training images vary, as configured."""
    return SegmentationAugmentation(
        scale=pair(config.img_scale or IMG_SCALE),
        ratio_range=config.ratio_range,  # type: ignore[arg-type]
        short_side=pair(config.short_side) if config.short_side else None,
        longest=config.longest_side,
        cat_max_ratio=config.cat_max_ratio,
        hflip=config.hflip,
        photometric=config.photometric,
        rotate=config.rotate,
        blur=config.blur,
        library=config.resize_library or "opencv",
    )


class Segmentation(Task):
    """See `Task`."""

    metric = MEAN_IOU
    train_set: SegmentationDataset
    val_set: Optional[SegmentationDataset]

    @property
    def measure(self) -> str:
        return "cross entropy of pixels"

    def open_data(self, validation: bool) -> None:
        config = self.config
        options = ("class_map", "reduce_zero_label", "exif_orientation", "allow_outside_data_dir")
        self.train_set, self.val_set = open_training_and_validation(
            config.dataset or "",
            config.data_dir,
            config.train_split,
            config.val_split,
            config.val_ratio,
            config.val_seed,
            validation,
            **{name: getattr(config, name) for name in options},
        )
        for part in filter(None, (self.train_set, self.val_set)):
            check_same_on_all_ranks(part)
            part.check()
        if self.val_set is not None and self.val_set.class_names != self.train_set.class_names:
            raise DataError(
                f"training has {len(self.train_set.class_names)} classes and validation "
                f"{len(self.val_set.class_names)}, or others; expected the same, in the same order"
            )
        self.num_classes = builders.training_classes(config, self.train_set.class_names)

    def fit_weights(self, weights: Optional[Weights]) -> Optional[Weights]:
        if weights is None or weights.model != self.config.model:  # a backbone's
            return weights
        return builders.weights_for_classes(self.config, weights, self.train_set.class_names, self.num_classes)

    def build_network(self, weights: Optional[Weights], record: dict[str, Any]) -> nn.Cell:
        if record.get("model") != self.config.model:
            record = {}  # of a classifier, whose pixels are no segmenter's
        self.pixels = builders.build_preprocessing(self.config, record.get("preprocessing"))
        self.evaluation_size = evaluation_size(self.config, record.get("evaluation", {}), self.pixels)
        network = builders.build_network(self.config, self.num_classes, self.pixels.in_channels, weights, record)
        if network.pools_to_one and self.config.batch_size == 1:
            raise ConfigError(
                f"batch_size is 1, but {self.config.model} pools a map to one pixel before a batch norm, which makes a "
                f"constant of one value a channel; expected at least 2 images a device"
            )
        return network

    def loss(self) -> None:
        """None: the network has its own."""

    def train_loader(self, network: nn.Cell) -> TrainLoader:
        return TrainLoader(
            self.train_set,
            SegmentationTrainTransform(self.pixels, augmentation(self.config)),
            self.config.batch_size,
            seed=self.config.seed,
            noise_size=network.noise_size,
            max_damaged=self.config.max_damaged,
            **builders.loader_share(self.config, self.world),
        )

    def evaluator(self, network: nn.Cell) -> Optional[SegmentationEvaluator]:
        if self.val_set is None:
            return None
        config = self.config
        own = builders.build_evaluation_network(config, self.num_classes, self.pixels.in_channels, network)
        return SegmentationEvaluator(
            own,
            self.val_set,
            SegmentationEvalTransform(self.pixels, self.evaluation_size),
            self.num_classes,
            config.batch_size,
            inference(config, self.pixels),
            align_corners=own.align_corners,
            **builders.loader_share(config, self.world),
        )

    def record(self, network: nn.Cell) -> dict[str, Any]:
        known = builders.checkpoint_record(self.config, network, self.train_set.class_names, self.pixels)
        return dict(known, task="segmentation", evaluation=asdict(self.evaluation_size))
