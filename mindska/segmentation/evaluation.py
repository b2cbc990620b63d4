"""From images to label maps, and mean IoU over a validation set: every image exactly once, at its own size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Callable, Optional, Union

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from ..dense_evaluation import DenseEvaluator
from ..distributed import all_reduce_sum
from ..errors import SettingError
from ..evaluation import Metric
from .datasets import SegmentationDataset
from .metrics import ConfusionMatrix, summary
from .transforms import (
    EvaluationImage,
    SegmentationEvalTransform,
    Size,
    add_probabilities,
    label_map,
    slide,
    sliding_windows,
)

MEAN_IOU = Metric(
    ("miou", "macc", "aacc"),
    "mean IoU",
    dict(miou="mean IoU", macc="mean accuracy of the classes", aacc="accuracy of the pixels"),
    "validation",
)
Logits = Callable[[np.ndarray], np.ndarray]  # images (B, C, h, w) -> (B, classes, h, w)


@dataclass(frozen=True)
class Inference:
    """How an image's label map is found.

    Attributes:
        scales: of the image; the classes' probabilities are averaged over them. flip: and over mirror images.
        window, stride: see the image through a sliding window of (height, width) pixels, of each scale; else whole.

    Raises:
        SettingError: a value is out of range.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: Optional[Size] = None
    stride: Optional[Size] = None

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) <= 0:
            raise SettingError(f"scales is {self.scales}; expected factors of the size, such as 0.75 1.0 1.25")
        if self.window is not None:
            sliding_windows(self.window, self.window, self.stride or self.window)  # checks both

    @property
    def single(self) -> bool:
        """Whether an image is seen once, as it is."""
        return self.scales == (1.0,) and not self.flip


def logits_of(network: nn.Cell, images: Tensor) -> np.ndarray:
    """(B, C, h, w) -> (B, classes, h, w) float32, what a `Runner` of segmenters does."""
    return network(images).astype(ms.float32).asnumpy()


def predict(
    logits: Logits,
    image: Union[np.ndarray, Any],
    transform: SegmentationEvalTransform,
    inference: Inference = Inference(),  # noqa: B008
    align_corners: bool = False,
) -> np.ndarray:
    """The class of every pixel of an image (a file, a Pillow image or an array in the order RGB): (H, W) int32.

    Args:
        align_corners: how logits get the image's size, as the network's own do.
    """
    total: Optional[np.ndarray] = None
    for seen, flipped in transform.variants(image, inference.scales, inference.flip):
        found = _seen(logits, seen, inference)
        if inference.single:
            return label_map(found, seen.size, align_corners)
        total = add_probabilities(total, found, seen.size, align_corners, flipped)
    assert total is not None  # there is a scale
    return total.argmax(0).astype(np.int32)


def _seen(logits: Logits, image: EvaluationImage, inference: Inference) -> np.ndarray:
    if inference.window is None:
        return logits(image.pixels[None])[0]
    return slide(image.pixels, logits, inference.window, inference.stride or inference.window)


@dataclass(frozen=True)
class SegmentationScore:
    """The figures of a set; see `ConfusionMatrix.figures`."""

    figures: dict[str, Any]

    def columns(self) -> dict[str, float]:
        """The values of the columns of `MEAN_IOU`, in percent; nan where nothing was counted."""
        found = dict(miou=self.figures["mIoU"], macc=self.figures["mAcc"], aacc=self.figures["aAcc"])
        return {name: float("nan") if value is None else 100 * value for name, value in found.items()}

    def __str__(self) -> str:
        return summary(self.figures)


class SegmentationEvaluator(DenseEvaluator):
    """An `Evaluator` of segmenters.

    Args:
        network: gives logits (B, classes, h, w) of images (B, C, h, w); None: `runner` does.

    The other arguments are those of `DenseEvaluator`.

    Attributes:
        each: called with every image's number, label map and mask.
    """

    def __init__(
        self,
        network: Optional[nn.Cell],
        dataset: SegmentationDataset,
        transform: SegmentationEvalTransform,
        num_classes: int,
        batch_size: int = 1,
        inference: Inference = Inference(),  # noqa: B008
        *,
        align_corners: bool = False,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 2,
    ) -> None:
        # What is seen several times, or through a window, is seen one by one.
        batch_size = batch_size if inference.single and inference.window is None else 1
        super().__init__(network, dataset, batch_size, rank, world_size, num_workers)
        self.transform, self.num_classes = transform, num_classes
        self.inference, self.align_corners = inference, align_corners
        self.each: Optional[Callable[[int, np.ndarray, np.ndarray], None]] = None
        self._sizes: Optional[list[Size]] = None

    def identity(self) -> dict[str, Any]:
        """What a score is of: which images, prepared how."""
        said = dict(preprocessing=asdict(self.transform.preprocessing), **asdict(self.transform.evaluation_size))
        return json.loads(json.dumps(dict(self.dataset.identity(), **said, **asdict(self.inference))))

    def sizes(self) -> Sequence[Size]:
        if self.inference.window is not None:
            return [self.inference.window] * len(self.dataset)
        if self._sizes is None:
            evaluation_size = self.transform.evaluation_size
            self._sizes = [evaluation_size.sizes(size)[-1] for size in self.dataset.image_sizes()]
        return self._sizes

    def graph_sizes(self) -> list[Size]:
        """The sizes for which the network is compiled; none where an image is seen at several scales as a whole."""
        if self.inference.window is None and not self.inference.single:
            return []
        return super().graph_sizes()

    def call(self, network: nn.Cell, images: Tensor, *more: Any) -> np.ndarray:
        return logits_of(network, images)

    def load(self, index: int) -> tuple[Any, np.ndarray]:
        """Image (an `EvaluationImage`, or as it was read where it is seen several times) and mask."""
        image, mask = self.dataset.load(index)
        return (self.transform(image) if self.inference.single else np.asarray(image)), mask

    def see(self, images: list[Any]) -> Iterator[np.ndarray]:
        """Label maps at the images' sizes."""
        if not self.inference.single:
            for image, _ in images:
                yield predict(self.runner, image, self.transform, self.inference, self.align_corners)
        elif self.inference.window is not None:
            for image, _ in images:
                yield label_map(_seen(self.runner, image, self.inference), image.size, self.align_corners)
        else:
            found = self.runner(self.filled(np.stack([image.pixels for image, _ in images])))
            for (image, _), logits in zip(images, found):
                yield label_map(logits, image.size, self.align_corners)

    def prepare(self, options: Any, on_signal: Callable[[int], None]) -> None:
        """See `Evaluator.prepare`."""
        self.compile_for(self.transform.preprocessing.in_channels, options, on_signal)

    def evaluate(
        self, weights: Sequence[Callable[[], None]], options: Any = None, progress: bool = False
    ) -> list[SegmentationScore]:
        """See `Evaluator.evaluate`; `progress`: show a bar.

        Raises:
            DataError: an image or a mask cannot be read.
        """
        counted = [ConfusionMatrix(self.num_classes) for _ in weights]

        def note(kind: int, index: int, found: np.ndarray, sample: tuple[Any, np.ndarray]) -> None:
            counted[kind].update(found, sample[1])
            if self.each:
                self.each(index, found, sample[1])

        self.visit(weights, note, options, progress)
        scores = []
        for matrix in counted:
            totals = np.concatenate([matrix.matrix.ravel(), [matrix.images, matrix.ignored]]).astype(np.int64)
            totals = all_reduce_sum(totals)
            matrix.matrix = totals[:-2].reshape(matrix.matrix.shape)
            matrix.images, matrix.ignored = int(totals[-2]), int(totals[-1])
            scores.append(SegmentationScore(matrix.figures()))
        return scores
