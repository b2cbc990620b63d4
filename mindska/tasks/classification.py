"""Images of one class each."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, Optional

from mindspore import nn

from .. import builders, prediction
from ..data import EvalLoader, EvalTransform, TrainLoader, TrainTransform
from ..data.contact_sheet import check_sheet
from ..errors import printable
from ..evaluation import ACCURACY, ClassificationEvaluator
from ..weights import Weights
from .base import Task


def predict_images(options: Any, paths: Sequence[str]) -> Iterator[prediction.Prediction]:
    """What `mindska predict` does with a classifier; options: of the command."""
    if options.contact_sheet:
        check_sheet(options.contact_sheet)
    # One image or whole batches: every other number would be a compilation of its own.
    batch_size = options.batch_size if len(paths) > 1 else 1
    turns = options.exif_orientation
    predictor = prediction.open_predictor(
        options.ckpt_path, options.model, options.use_ema, batch_size, exif_orientation=turns
    )
    sheet = prediction.ContactSheet(turns)
    for found in predictor(paths, options.topk):
        if options.contact_sheet:
            sheet.add(found)
        yield found
    if options.contact_sheet:
        print(f"{printable(options.contact_sheet)}: {sheet.write(options.contact_sheet)}", file=sys.stderr)


class Classification(Task):
    """See `Task`."""

    metric = ACCURACY

    @property
    def measure(self) -> str:
        """What the training loss is: "cross entropy" where it is the measure of the validation loss."""
        config = self.config
        parts = [f"label smoothing {config.label_smoothing:g}" if config.label_smoothing else ""]
        parts += [name for name in ("mixup", "cutmix") if getattr(config, name)]
        parts += ["weights of the classes" if config.class_weights else ""]
        said = ", ".join(filter(None, parts))
        name = "cross entropy" if config.loss == "CE" else "binary cross entropy"
        return f"{name} with {said}" if said else name

    def open_data(self, validation: bool) -> None:
        self.train_set, self.val_set = builders.open_training_data(self.config, validation)
        builders.check_labels(self.train_set, training=True)
        self.num_classes = builders.training_classes(self.config, self.train_set.class_names)

    def fit_weights(self, weights: Optional[Weights]) -> Optional[Weights]:
        return builders.weights_for_classes(self.config, weights, self.train_set.class_names, self.num_classes)

    def build_network(self, weights: Optional[Weights], record: dict[str, Any]) -> nn.Cell:
        self.pixels = builders.build_preprocessing(self.config, record.get("preprocessing"))
        builders.check_batch(self.config, self.num_classes, self.pixels, record)
        network = builders.build_network(self.config, self.num_classes, self.pixels.in_channels, weights, record)
        builders.check_image_size(network, self.pixels)
        return network

    def loss(self) -> nn.Cell:
        return builders.build_loss(self.config, self.train_set, self.num_classes)

    def train_loader(self, network: nn.Cell) -> TrainLoader:
        return TrainLoader(
            self.train_set,
            TrainTransform(self.pixels, builders.build_augmentation(self.config)),
            self.config.batch_size,
            seed=self.config.seed,
            num_classes=self.num_classes,
            noise_size=getattr(network, "noise_size", 1),
            **builders.loading_options(self.config),
            **builders.loader_share(self.config, self.world),
        )

    def evaluator(self, network: nn.Cell) -> Optional[ClassificationEvaluator]:
        if self.val_set is None:
            return None
        config, share = self.config, builders.loader_share(self.config, self.world)
        own = builders.build_evaluation_network(config, self.num_classes, self.pixels.in_channels, network)
        transform = EvalTransform(self.pixels)
        skip = config.val_skip_damaged
        return ClassificationEvaluator(
            own, EvalLoader(self.val_set, transform, config.batch_size, skip_damaged=skip, **share)
        )

    def record(self, network: nn.Cell) -> dict[str, Any]:
        return builders.checkpoint_record(self.config, network, self.train_set.class_names, self.pixels)
