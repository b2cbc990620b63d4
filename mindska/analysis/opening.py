"""A network to look into, and the images that it is shown."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
from mindspore import nn
from PIL import Image

from .. import builders
from ..acceleration import decelerate
from ..config import Config
from ..data import EvalTransform, ImageDataset, Preprocessing
from ..data.imagenet import readable_names
from ..data.images import read_image
from ..data.loader import in_parallel
from ..detection.detector import Detector
from ..detection.mask_rcnn import MaskRCNN
from ..distributed import World
from ..errors import ConfigError, DataError, few, printable
from ..models.layers.backbone import Backbone
from ..names import task_of
from ..prediction import find_images, is_exported
from ..segmentation.segmenter import Segmenter
from ..tasks.detection.task import open_set
from ..tasks.segmentation.opening import open_segmenter
from ..tasks.segmentation.validation import open_data
from .stages import backbone_of

log = logging.getLogger("mindska")
OBJECT = "object"  # what an RPN finds


@dataclass(frozen=True)
class Subject:
    """A network that is looked into.

    Attributes:
        config: with the model that the checkpoint names.
        network: in evaluation, in MindSpore's plain operators where it was opened so.
        record: of the checkpoint. pixels: what the network expects of an image.
        class_names: a name for every class; empty of a backbone. Of Mask R-CNN the only one is "object": its maps are
            the RPN's.
    """

    config: Config
    network: nn.Cell
    record: dict[str, Any]
    pixels: Preprocessing
    class_names: list[str]

    @property
    def is_segmenter(self) -> bool:
        """Whether it gives a class to every pixel."""
        return isinstance(self.network, Segmenter)

    @property
    def is_detector(self) -> bool:
        """Whether it finds objects."""
        return isinstance(self.network, Detector)

    @property
    def backbone(self) -> Backbone:
        """Its stages."""
        return backbone_of(self.network)

    def name(self) -> str:
        """What to call it in a message."""
        return f"{self.config.model} ({self.config.ckpt_path or 'initial weights'})"


def open_subject(config: Config, plain: bool = True) -> Subject:
    """The network in the checkpoint that the configuration names.

    Args:
        plain: without accelerated cells, whose parts cannot be seen and have no gradients in evaluation.

    Raises:
        UserError: it is missing, damaged, an exported model, or none of our models.
    """
    path = config.ckpt_path
    if is_exported(path):
        raise ConfigError(
            f"{path} is an exported model, whose inside cannot be seen; name the checkpoint it is made of"
        )
    weights = builders.configured_weights(config)
    assert weights is not None  # the command asks for a checkpoint
    if not config.model and task_of(weights.model) != "classification":
        config = replace(config, model=weights.model, task=task_of(weights.model), dataset=None)
    config = builders.with_recorded_model(config, weights.record)
    if weights.dialect is None:
        raise ConfigError(f"{path} holds {weights.model} of MindCV; the analyses know the models of mindska only")
    network = weights.network()
    network = getattr(network, "net", network)  # of a backbone
    pixels = builders.build_preprocessing(config, weights.record.get("preprocessing"))
    if pixels.in_channels != weights.in_channels:
        raise ConfigError(f"{path} takes images of {weights.in_channels} channels, not {pixels.in_channels}")
    builders.check_image_size(network, pixels)
    number = weights.num_classes or 0
    names = list(readable_names(number, weights.record.get("class_names"))[:number]) if number else []
    names += [f"class {i}" for i in range(len(names), number)]
    record = weights.record
    if isinstance(network, MaskRCNN):
        names = [OBJECT]
        record = {**record, "class_names": names}
    return Subject(config, decelerate(network) if plain else network, record, pixels, names)


def initial_subject(config: Config) -> Subject:
    """A network of the configured model with initial weights, by the configured seed.

    Raises:
        UserError: there is no such model, or images are too small for it.
    """
    pixels = builders.build_preprocessing(config)
    network = builders.build_network(config, config.num_classes or 1000, pixels.in_channels).set_train(False)
    builders.check_image_size(network, pixels)
    return Subject(config, decelerate(network), {}, pixels, [])


@dataclass(frozen=True)
class Images:
    """Images that a network is shown.

    Attributes:
        names: what each is called. load: an image by its place in `names`.
        labels: (N,) numbers of classes; None where they are not known.
    """

    names: Sequence[str]
    load: Callable[[int], Image.Image]
    labels: Optional[np.ndarray] = None

    def __len__(self) -> int:
        return len(self.names)


def spread(labels: np.ndarray, number: int) -> list[int]:
    """The numbers of so many images, in turn one of each class; the images of a class in their order."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])
    turns = np.arange(len(labels)) - starts  # the how-many-th of its class
    return order[np.lexsort((labels[order], turns))][:number].tolist()


def some_images(subject: Subject, files: Sequence[Path], number: int) -> Images:
    """The images in some files and folders; without any, so many of the validation set, in turn one of each class.

    Raises:
        UserError: there is no image, or the data does not fit the network.
    """
    config = subject.config
    if files:
        paths = find_images(files)
        if len(paths) > number:
            log.warning("%s images: the first %d are shown (--number)", f"{len(paths):,}", number)
        paths = paths[:number]
        return Images(paths, lambda i: read_image(paths[i], exif_orientation=config.exif_orientation))
    if not config.data_dir:
        raise ConfigError("No images: name some with --images FILE or FOLDER, or a data set with --data_dir")
    dataset: Any
    if subject.is_segmenter or subject.is_detector:
        dataset = open_set(config, "val", masks=False) if subject.is_detector else open_data(open_segmenter(config))
        load = dataset.load if subject.is_detector else dataset.load_image
        chosen = np.unique(np.linspace(0, len(dataset) - 1, min(number, len(dataset))).astype(int)).tolist()
        return Images([dataset.describe(i) for i in chosen], lambda i: load(chosen[i]))
    dataset = open_labelled(subject)
    chosen = spread(dataset.labels, number)
    return Images([dataset.describe(i) for i in chosen], lambda i: dataset.load(chosen[i]), dataset.labels[chosen])


def open_labelled(subject: Subject) -> ImageDataset:
    """The validation images of the classes of a classifier.

    Raises:
        UserError: they are missing, or of other classes.
    """
    config = subject.config
    if task_of(config.model) != "classification":
        raise ConfigError(f"{config.ckpt_path} holds {config.model}, which gives no class to an image")
    dataset = builders.open_validation_data(config, subject.record)
    builders.evaluated_classes(config, subject.record, dataset.class_names)
    return dataset


def batches(
    images: Images, transforms: Sequence[EvalTransform], batch_size: int, config: Config, pad: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images through each transform, each image read once and a few batches ahead.

    Args:
        pad: fill the last batch up with zeros: a compiled network takes one shape.

    Yields:
        places in `images` (n,), and pixels (transforms, n, C, H, W) float32 (with `pad`: batch_size of them).

    Raises:
        DataError: an image cannot be read, and `val_skip_damaged` is not set.
    """

    def sample(place: int) -> Optional[np.ndarray]:
        try:
            image = images.load(place)
        except DataError as error:
            if not config.val_skip_damaged:
                raise
            log.warning("Left out: %s", error)
            return None
        return np.stack([transform(image) for transform in transforms])

    def collate(places: Sequence[int], samples: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        known = [(place, pixels) for place, pixels in zip(places, samples) if pixels is not None]
        if not known:
            return np.zeros(0, np.int64), np.zeros((0,))
        found = np.stack([pixels for _, pixels in known], axis=1)
        if pad and found.shape[1] < batch_size:
            zeros = np.zeros((found.shape[0], batch_size - found.shape[1], *found.shape[2:]), np.float32)
            found = np.concatenate([found, zeros], axis=1)
        return np.array([place for place, _ in known]), found

    groups = (range(i, min(i + batch_size, len(images))) for i in range(0, len(images), batch_size))
    workers = config.num_parallel_workers or 2
    for places, pixels in in_parallel(sample, groups, collate, workers):
        if len(places):
            yield places, pixels


def displayed(pixels: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """A network's input (C, H, W) as a picture again, (H, W, 3) uint8."""
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    image = np.clip(np.rint((pixels * std + mean) * 255), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


def feature_names(backbone: Backbone) -> list[str]:
    """What the features of a network are called: "stages.0", ..., before them a "stem" where there is one."""
    return [str(info["name"]) for info in backbone.feature_info]


def find_features(subject: Subject, asked: Sequence[str]) -> list[int]:
    """The numbers of the features that are asked for by name or number (negative ones count from the end).

    Raises:
        ConfigError: there is no such feature.
    """
    names = feature_names(subject.backbone)
    found = []
    for word in asked or ["-1"]:
        number = names.index(word) if word in names else None
        if number is None and word.lstrip("-").isdigit() and -len(names) <= int(word) < len(names):
            number = int(word) % len(names)
        if number is None:
            raise ConfigError(
                f"{subject.config.model} has no stage {printable(word)!r}; expected one of {', '.join(names)}, or a "
                f"number from 0 to {len(names) - 1} (negative ones count from the end)"
            )
        found.append(number)
    return found


def find_classes(subject: Subject, asked: Sequence[str]) -> list[int]:
    """The numbers of classes that are asked for by name or number.

    Raises:
        ConfigError: there is no such class.
    """
    names, recorded = subject.class_names, subject.record.get("class_names") or []
    found = []
    for word in asked:
        if word in names:
            found.append(names.index(word))
        elif word in recorded:
            found.append(recorded.index(word))
        elif word.isdigit() and int(word) < len(names):
            found.append(int(word))
        else:
            raise ConfigError(
                f"{subject.config.model} has no class {printable(word)!r}; expected one of {few(names)}, or a number "
                f"below {len(names)}"
            )
    return found


def one_process(world: World) -> None:
    """ConfigError where several processes were started."""
    if world.size > 1:
        raise ConfigError(f"mindska analyze works in one process; {world.size} were started. Leave mpirun out")
