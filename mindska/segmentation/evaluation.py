"""From images to label maps, and mean IoU over a validation set: every image exactly once, at its own size.

Images have many sizes, and a graph is compiled for one. So those of the commonest sizes are evaluated in graph mode, in
batches, and the others one by one in PyNative mode. Which these are follows from the data set alone: figures do not
depend on the number of ranks.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Callable, Optional, Union

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from tqdm import tqdm

from ..compile_cache import compile_cached
from ..data.loader import in_parallel
from ..distributed import all_reduce_sum
from ..errors import DataError, SettingError
from ..evaluation import Metric
from ..modes import pynative_mode
from ..streams import unfailing_stderr
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
GRAPHS = 4  # sizes of input that are compiled
COMMON = 0.05  # share of the images that a size must have to be compiled

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


class Runner:
    """A network as a function of images; in graph mode, those of other sizes than some run in PyNative mode.

    Args:
        sizes: (height, width) of the inputs that are compiled. options: for the cache of graphs, see `compile_cached`.
    """

    def __init__(self, network: nn.Cell, sizes: Sequence[Size] = (), options: Any = None) -> None:
        self.network, self.sizes, self.options = network, set(sizes), options
        self.compiled: set[tuple[int, ...]] = set()

    def compile(self, images: Tensor, on_signal: Optional[Callable[[int], None]] = None) -> None:
        """Compiles the network for images of this shape; see `compile_cached` for `on_signal`."""
        if images.shape not in self.compiled:
            compile_cached(
                self.network, images, options=self.options, what="the network for evaluation", on_signal=on_signal
            )
            self.compiled.add(images.shape)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        tensor, listed = Tensor(images), images.shape[2:] in self.sizes
        if listed:
            self.compile(tensor)
        with contextlib.nullcontext() if listed else pynative_mode():
            return self.network(tensor).astype(ms.float32).asnumpy()


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


class SegmentationEvaluator:
    """An `Evaluator` of segmenters.

    Args:
        network: gives logits (B, classes, h, w) of images (B, C, h, w); None: `runner` does.
        batch_size: images of one size that the network sees at once.
        rank, world_size: this rank takes every world_size-th image of each size.

    Attributes:
        runner: a `Runner` or what is like one; it is made of the network at the first use.
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
        self.network, self.dataset, self.transform, self.num_classes = network, dataset, transform, num_classes
        self.batch_size, self.inference, self.align_corners = batch_size, inference, align_corners
        self.rank, self.world_size, self.workers = rank, world_size, num_workers
        self._sizes: Optional[list[Size]] = None
        self.runner: Any = None
        self.each: Optional[Callable[[int, np.ndarray, np.ndarray], None]] = None

    def identity(self) -> dict[str, Any]:
        """What a score is of: which images, prepared how."""
        said = dict(preprocessing=asdict(self.transform.preprocessing), **asdict(self.transform.evaluation_size))
        return json.loads(json.dumps(dict(self.dataset.identity(), **said, **asdict(self.inference))))

    def sizes(self) -> list[Size]:
        """(height, width) that the network sees of each image."""
        if self._sizes is None:
            evaluation_size = self.transform.evaluation_size
            self._sizes = [evaluation_size.sizes(size)[-1] for size in self.dataset.image_sizes()]
        return self._sizes

    def graph_sizes(self) -> list[Size]:
        """The sizes for which the network is compiled: the commonest ones; with a sliding window, its own."""
        if self.inference.window is not None:
            return [self.inference.window]
        if not self.inference.single:
            return []
        counted = Counter(self.sizes())
        common = sorted(counted.items(), key=lambda item: (-item[1], item[0]))[:GRAPHS]
        return [size for size, count in common if count >= COMMON * len(self.dataset)]

    def groups(self) -> list[list[int]]:
        """This rank's images, in groups that the network sees at once: of one size that is compiled, or single ones."""
        compiled = set() if self.inference.window is not None else set(self.graph_sizes())
        by_size: dict[Optional[Size], list[int]] = {}
        for index, size in enumerate(self.sizes() if compiled else [(0, 0)] * len(self.dataset)):
            by_size.setdefault(size if size in compiled else None, []).append(index)
        groups = []
        for group, indices in by_size.items():
            ours, step = indices[self.rank :: self.world_size], 1 if group is None else self.batch_size
            groups += [ours[i : i + step] for i in range(0, len(ours), step)]
        return groups

    def prepare(self, options: Any, on_signal: Callable[[int], None]) -> None:
        """See `Evaluator.prepare`."""
        assert self.network is not None
        self.runner = Runner(self.network, self.graph_sizes(), options)
        batch = 1 if self.inference.window is not None else self.batch_size
        for size in sorted(self.runner.sizes):
            images = np.zeros((batch, self.transform.preprocessing.in_channels, *size), np.float32)
            self.runner.compile(Tensor(images), on_signal)

    def evaluate(
        self, weights: Sequence[Callable[[], None]], options: Any = None, progress: bool = False
    ) -> list[SegmentationScore]:
        """See `Evaluator.evaluate`; `progress`: show a bar.

        Raises:
            DataError: an image or a mask cannot be read.
        """
        if self.runner is None:
            assert self.network is not None
            self.runner = Runner(self.network, self.graph_sizes(), options)
        counted = [ConfusionMatrix(self.num_classes) for _ in weights]
        order, inside = list(range(len(weights))), None
        error: Optional[DataError] = None
        shown = tqdm(total=len(self.dataset) // self.world_size, unit="image", file=unfailing_stderr(),
                     disable=None if progress else True)  # fmt: skip
        try:
            for indices, images, masks in self._batches():
                for kind in order:
                    if kind != inside:
                        weights[kind]()
                        inside = kind
                    for index, found, mask in zip(indices, self._label_maps(images), masks):
                        counted[kind].update(found, mask)
                        if self.each:
                            self.each(index, found, mask)
                order.reverse()  # the last weights are in the network: they come first in the next batch
                shown.update(len(masks))
        except DataError as raised:
            error = raised
        shown.close()
        failed = all_reduce_sum(np.array([float(error is not None)]))[0]
        if failed:  # all ranks end: none waits for another
            raise error or DataError("Another rank cannot read an image of the validation set; see its message")
        scores = []
        for matrix in counted:
            totals = np.concatenate([matrix.matrix.ravel(), [matrix.images, matrix.ignored]]).astype(np.int64)
            totals = all_reduce_sum(totals)
            matrix.matrix = totals[:-2].reshape(matrix.matrix.shape).astype(np.int64)
            matrix.images, matrix.ignored = int(totals[-2]), int(totals[-1])
            scores.append(SegmentationScore(matrix.figures()))
        return scores

    def _batches(self) -> Iterator[tuple[Sequence[int], list[Any], list[np.ndarray]]]:
        """Numbers, images (an `EvaluationImage`, or as it was read where it is seen several times) and masks of each
        group."""

        def load(index: int) -> tuple[Any, np.ndarray]:
            image, mask = self.dataset.load(index)
            return (self.transform(image) if self.inference.single else np.asarray(image)), mask

        def collate(
            indices: Sequence[int], samples: list[tuple[Any, np.ndarray]]
        ) -> tuple[Sequence[int], list[Any], list[np.ndarray]]:
            return indices, [image for image, _ in samples], [mask for _, mask in samples]

        return in_parallel(load, self.groups(), collate, self.workers)

    def _label_maps(self, images: list[Any]) -> Iterator[np.ndarray]:
        if not self.inference.single:
            for image in images:
                yield predict(self.runner, image, self.transform, self.inference, self.align_corners)
            return
        if self.inference.window is not None:
            for image in images:
                yield label_map(_seen(self.runner, image, self.inference), image.size, self.align_corners)
            return
        pixels = np.stack([image.pixels for image in images])
        if pixels.shape[2:] in self.runner.sizes:  # always as many: every other number would be a graph of its own
            missing = self.batch_size - len(images)
            pixels = np.concatenate([pixels, np.zeros((missing, *pixels.shape[1:]), np.float32)]) if missing else pixels
        for image, found in zip(images, self.runner(pixels)):
            yield label_map(found, image.size, self.align_corners)
