"""Classes of images, by a checkpoint or an exported model; pixels and class names come from its record."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Optional, Union

import numpy as np
from mindspore import Tensor, nn

from .compile_cache import compile_cached
from .data import EvalTransform, Preprocessing
from .data.contact_sheet import MOST, SIDE, Picture, write_contact_sheet
from .data.datasets import image_files
from .data.folders import is_folder
from .data.imagenet import readable_names
from .data.images import read_image
from .data.loader import default_workers, in_parallel
from .errors import DataError, PredictionError, printable
from .export import open_with_record
from .modes import graph_mode
from .weights import open_weights

Logits = Callable[[np.ndarray], np.ndarray]  # images (B, C, H, W) float32 -> (B, classes)


@dataclass(frozen=True)
class Prediction:
    """What was found in one image.

    Attributes:
        classes: (number, name, probability) of the likeliest classes, the likeliest first; empty when it is unreadable.
        error: why the image could not be read.
    """

    path: str
    classes: Sequence[tuple[int, str, float]] = ()
    error: Optional[str] = None

    HEADER = ("path", "rank", "index", "name", "probability", "error")

    def lines(self) -> list[str]:
        """As text: the path, and a line a class."""
        if self.error:
            return [f"error: {self.error}"]
        return [self.path, *(f"  {100 * p:6.2f} %  {name} ({i})" for i, name, p in self.classes)]

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        if self.error:
            return {"path": self.path, "error": self.error}
        return {"path": self.path, "classes": [dict(index=i, name=name, probability=p) for i, name, p in self.classes]}

    def rows(self) -> list[tuple[Any, ...]]:
        """Rows of `HEADER`: one a class."""
        if self.error:
            return [(self.path, "", "", "", "", self.error)]
        ranked = enumerate(self.classes, start=1)
        return [(self.path, rank, index, name, f"{p:.6f}", "") for rank, (index, name, p) in ranked]


class Predictor:
    """A network with its pixels and its class names.

    Args:
        logits: images (batch_size, 3 or 1, H, W) float32 -> logits (batch_size, classes).
    """

    def __init__(
        self,
        model: str,
        logits: Logits,
        preprocessing: Preprocessing,
        class_names: Sequence[str],
        batch_size: int,
        exif_orientation: bool = False,
    ) -> None:
        self.model, self.logits, self.class_names, self.batch_size = model, logits, class_names, batch_size
        self.preprocessing, self.transform = preprocessing, EvalTransform(preprocessing)
        self.exif_orientation = exif_orientation
        self.network: Optional[nn.Cell] = None  # of weights, not of an exported model

    def __call__(self, paths: Sequence[str], topk: int = 5) -> Iterator[Prediction]:
        """The predictions of image files, in their order, read a few batches ahead."""
        batches = (paths[i : i + self.batch_size] for i in range(0, len(paths), self.batch_size))
        for batch, samples in in_parallel(
            self._sample, batches, lambda ids, samples: (ids, samples), default_workers()
        ):
            images = np.zeros(
                (self.batch_size, self.preprocessing.in_channels, *self.preprocessing.image_size), np.float32
            )
            for i, (image, _) in enumerate(samples):
                if image is not None:
                    images[i] = image
            logits = self.logits(images)
            if logits.shape != (self.batch_size, len(self.class_names)):
                raise PredictionError(
                    f"The network gives outputs of the shape {logits.shape}; expected {self.batch_size} images by "
                    f"{len(self.class_names)} classes"
                )
            for path, (_, error), row in zip(batch, samples, logits):
                if error is None and not np.isfinite(row).all():
                    error = f"{path}: the network's outputs for this image are NaN or infinite"
                if error is not None:
                    yield Prediction(path, error=error)
                    continue
                probabilities = softmax(row[None])[0]
                best = np.argsort(-probabilities, kind="stable")[:topk]
                yield Prediction(path, [(int(i), self.class_names[i], float(probabilities[i])) for i in best])

    def _sample(self, path: str) -> tuple[Optional[np.ndarray], Optional[str]]:
        try:
            return self.transform(read_image(path, exif_orientation=self.exif_orientation)), None
        except DataError as error:
            return None, str(error)


def softmax(logits: np.ndarray) -> np.ndarray:
    """(B, classes) -> probabilities (B, classes) float64"""
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def is_exported(path: Union[str, Path]) -> bool:
    """Whether a file is an exported model, by its name."""
    return Path(path).suffix in (".onnx", ".mindir")


def open_exported(path: Path, ema: Optional[bool] = None) -> tuple[Logits, dict[str, Any], Preprocessing, int]:
    """An exported model as a function, its record, its pixels, and the batch that it was exported for (0: any).

    Args:
        ema: which weights are asked for; they cannot be chosen any more.

    Raises:
        UserError: the file is missing, damaged, or is no classifier.
    """
    if not path.is_file():
        raise PredictionError(f"No model at {path.absolute()}")
    if ema is not None:
        raise PredictionError(f"{path} is an exported model: which weights are in it was chosen by the export")
    run, record = open_with_record(path)
    batch_size, channels, *size = record["input_shape"]
    fixed = [length for length in (batch_size, *size) if isinstance(length, int) and length > 0]
    pixels = Preprocessing(**{**record["preprocessing"], **({"image_size": size} if len(fixed) == 3 else {})})
    if channels != pixels.in_channels:
        raise PredictionError(
            f"{path} was exported for images of {channels} channels, but its record has {pixels.in_channels} means; "
            f"expected 1 (grey) or 3 (RGB) of both"
        )

    def logits(images: np.ndarray) -> np.ndarray:
        return run(images)[0]

    return logits, record, pixels, batch_size if batch_size in fixed else 0


def open_predictor(
    path: Union[str, Path],
    model_name: str = "",
    ema: Optional[bool] = None,
    batch_size: int = 16,
    image_size: Optional[tuple[int, int]] = None,
    class_names: Optional[Sequence[str]] = None,
    exif_orientation: bool = False,
) -> Predictor:
    """The predictor in a file: weights of any kind that we read, or a model exported to `.onnx` or `.mindir`.

    Args:
        model_name, ema: see `mindska.weights.open_weights`; an exported model needs neither.
        batch_size, image_size: of an exported model those that it was exported for, where these are not free.
        class_names: in the place of the recorded ones.
        exif_orientation: turn photos as their EXIF tag says.

    Raises:
        UserError: the file is missing, damaged, or is no classifier.
    """
    path, network = Path(path), None
    if is_exported(path):
        logits, record, recorded, fixed_batch = open_exported(path, ema)
        model, batch_size = record["model"], fixed_batch or batch_size
        wanted = image_size or recorded.image_size
        size = tuple(own or side for own, side in zip(record["input_shape"][2:], wanted))
        recorded = replace(recorded, image_size=(size[0], size[1]))
        if tuple(wanted) != size:
            raise PredictionError(f"{path} was exported for {size[0]}x{size[1]} pixels; it takes no other size")
    else:
        weights = open_weights(path, model_name, ema)
        record, model = weights.record, weights.model
        recorded = Preprocessing(**{**record["preprocessing"], **({"image_size": image_size} if image_size else {})})
        network = weights.network()
        getattr(network, "net", network).check_image_size(*recorded.image_size)

        compiled: set[tuple[int, ...]] = set()

        def logits(images: np.ndarray) -> np.ndarray:
            with graph_mode():
                if images.shape not in compiled:
                    compile_cached(network, Tensor(images), options=(model, weights.options))
                    compiled.add(images.shape)
                return network(Tensor(images)).asnumpy()

    num_classes = record["num_classes"]
    if num_classes is None:
        raise PredictionError(
            f"{path} is a backbone without a classifier: it predicts nothing. Give it one (mindska convert "
            f"--num_classes N) and train that (mindska train --ckpt_path)"
        )
    names = _class_names(path, num_classes, class_names or record.get("class_names"), class_names is not None)
    predictor = Predictor(model, logits, recorded, names, batch_size, exif_orientation)
    predictor.network = network
    return predictor


def _class_names(path: Path, num_classes: int, names: Optional[Sequence[str]], given: bool) -> list[str]:
    """A name for every class; of a network with more outputs than its training data had classes some are not recorded.

    Raises:
        PredictionError: the names are those of another number of classes.
    """
    if names is not None and (len(names) > num_classes or given and len(names) != num_classes):
        origin = "were given" if given else "are recorded"
        raise PredictionError(f"{path} has {num_classes} classes, but {len(names)} class names {origin}")
    known = readable_names(num_classes, names)
    return known + [f"class {i}" for i in range(len(known), num_classes)]


class ContactSheet:
    """Predictions with their pictures, for a sheet: the first ones, as many as it takes."""

    def __init__(self, exif_orientation: bool = False) -> None:
        self.exif_orientation, self.pictures, self.total = exif_orientation, [], 0  # type: ignore[var-annotated]

    def add(self, prediction: Prediction) -> None:
        """Takes in one more, whose image is read again, at the size of a thumbnail."""
        self.total += 1
        if len(self.pictures) == MOST:
            return
        name = Path(prediction.path).name
        if prediction.error:
            self.pictures.append(Picture(None, ("unreadable", name)))
            return
        try:
            image = read_image(
                prediction.path, lambda size: (min(size[0], 2 * SIDE), min(size[1], 2 * SIDE)), self.exif_orientation
            )
            image.thumbnail((SIDE, SIDE))
        except DataError:  # it has vanished since
            self.pictures.append(Picture(None, ("unreadable", name)))
            return
        classes = [f"{100 * p:.1f} % {name}" for _, name, p in prediction.classes[:2]]
        self.pictures.append(Picture(image, (*classes, name)))

    def write(self, path: Path) -> str:
        """Writes the sheet; returns what it shows.

        Raises:
            SettingError, WriteError: as of `write_contact_sheet`.
        """
        shown = write_contact_sheet(path, self.pictures)
        return f"{shown:,} pictures" + (f", the first of {self.total:,}" if shown < self.total else "")


def find_images(places: Iterable[Union[str, Path]]) -> list[str]:
    """The image files in some files and folders (at any depth).

    Raises:
        PredictionError: a place does not exist, or there is no image.
    """
    found: list[str] = []
    for place in map(Path, places):
        if is_folder(place):
            found += image_files(place)
        elif os.path.lexists(place):
            found.append(str(place))
        else:
            raise PredictionError(f"No image or folder at {printable(place.absolute())}")
    if not found:
        raise PredictionError(f"No image in {', '.join(map(str, places))}")
    return found
