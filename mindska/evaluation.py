"""Accuracy and loss of a classifier, over every image exactly once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Protocol

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from tqdm import tqdm

from .compile_cache import compile_cached
from .data import EvalLoader
from .distributed import all_reduce_sum
from .errors import DataError
from .files import replacing
from .streams import unfailing_stderr

NOTHING_TO_EVALUATE = (
    "Nothing to evaluate: no image of the validation set can be read; mend those that are named above, or choose "
    "another --data_dir or --val_split"
)


@dataclass(frozen=True)
class Metric:
    """By what a run is judged.

    Attributes:
        columns: of metrics.csv that an evaluation fills; the first is the score: the higher the better.
        title: what the score is called.
        shown: the columns that are drawn, all in percent, and what they are called.
        what: all of these in words.
    """

    columns: tuple[str, ...]
    title: str
    shown: dict[str, str]
    what: str

    @property
    def score(self) -> str:
        """The column that says which weights are best."""
        return self.columns[0]


ACCURACY = Metric(("top1", "top5", "val_loss"), "top-1", dict(top1="top-1", top5="top-5"), "validation accuracy")


class Score(Protocol):
    """What an evaluation comes to; its text says all of it."""

    def columns(self) -> dict[str, float]:
        """The values of the metric's columns."""


class Evaluator(Protocol):
    """Evaluates weights on a validation set.

    Attributes:
        network: the one that the weights are put into. dataset: the validation set.
    """

    network: nn.Cell
    dataset: Any

    def identity(self) -> dict[str, Any]:
        """What a score is of: which images, prepared how."""

    def prepare(self, options: Any, on_signal: Callable[[int], None]) -> None:
        """Compiles what an evaluation needs; see `compile_cached` for `options` and `on_signal`."""

    def evaluate(self, weights: Sequence[Callable[[], None]], options: Any) -> Sequence[Score]:
        """A score for each of `weights`, which puts some into the network; over all ranks, every image once.

        `options`: what the network was made by, for the cache of its graph. Every rank must call it.
        """


@dataclass(frozen=True)
class Result:
    """Top-1 and top-5 in percent, mean cross entropy (natural logarithm, no smoothing), number of images."""

    top1: float
    top5: float
    loss: float
    images: int

    def columns(self) -> dict[str, float]:
        """The values of the columns of `ACCURACY`."""
        return dict(top1=self.top1, top5=self.top5, val_loss=self.loss)

    def write(self, path: Path, **facts: Any) -> None:
        """Writes the result and `facts` as JSON."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({**asdict(self), **facts}, indent=2) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2f} %, top-5 {self.top5:.2f} %, loss {self.loss:.4f} over {self.images} images"


class EvalStep(nn.Cell):
    """Sums over a batch, padding (label -1) left out: (correct top-1, correct top-5, cross entropy, images), float32.

    Inputs: images (B, C, H, W); labels (B,) int32.
    """

    def __init__(self, network: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        self.prepared = False

    def construct(self, images: Tensor, labels: Tensor) -> Tensor:
        logits = self.network(images).astype(ms.float32)
        real = (labels >= 0).astype(ms.float32)
        labels = ops.maximum(labels, Tensor(0, ms.int32)).expand_dims(1)
        own = ops.gather_elements(logits, 1, labels)  # (B, 1)
        # Before the true class in order of logit, then of index: a tie is not won for free. And whatever is not below
        # or equal: a NaN never counts as correct.
        tied = ops.logical_and(logits == own, ops.arange(logits.shape[1], dtype=ms.int32) < labels)
        better = ops.logical_or(tied, ops.logical_not(logits <= own)).astype(ms.float32).sum(1)
        loss = -ops.gather_elements(ops.log_softmax(logits, 1), 1, labels).squeeze(1)
        top1 = ((better < 1).astype(ms.float32) * real).sum()
        top5 = ((better < 5).astype(ms.float32) * real).sum()
        return ops.stack((top1, top5, ops.select(real > 0, loss, ops.zeros_like(loss)).sum(), real.sum()))


def prepare(step: EvalStep, loader: Any, options: Any, on_signal: Callable[[int], None]) -> None:
    """Compiles `step` for the batches of `loader`, before there is anything to evaluate.

    See `compile_cached` for `options` and `on_signal`.
    """
    if step.prepared:
        return
    pixels = loader.transform.preprocessing
    images = Tensor(np.zeros((loader.batch_size, pixels.in_channels, *pixels.image_size), np.float32))
    labels = Tensor(np.full(loader.batch_size, -1, np.int32))
    compile_cached(step, images, labels, options=options, what="the network for evaluation", on_signal=on_signal)
    step.prepared = True


def evaluate(
    step: EvalStep,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    all_reduce_sum: Callable[[np.ndarray], np.ndarray],
    options: Any = None,
    progress: bool = False,
) -> Result:
    """Runs `step` over this rank's batches and totals the sums of all ranks.

    `options`: what the step was made by, for the cache of its graph; `progress`: show a bar.

    Raises:
        DataError: there is no image.
    """
    return evaluate_each(step, [lambda: None], batches, all_reduce_sum, options, progress)[0]


def evaluate_each(
    step: EvalStep,
    weights: Sequence[Callable[[], None]],
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    all_reduce_sum: Callable[[np.ndarray], np.ndarray],
    options: Any = None,
    progress: bool = False,
) -> list[Result]:
    """Evaluates a network with several weights, in one pass over the images: they are read once.

    Args:
        weights: each puts some weights into the step's network.

    Returns:
        One result for each of `weights`.

    Raises:
        DataError: there is no image.
    """
    totals = np.zeros((len(weights), 4), np.float64)
    order, inside = list(range(len(weights))), None
    shown = tqdm(batches, unit="batch", disable=None if progress else True, file=unfailing_stderr())
    for images, labels in shown:
        tensors = Tensor(images), Tensor(labels)
        for kind in order:
            if kind != inside:
                weights[kind]()
                inside = kind
            if not step.prepared:
                compile_cached(step, *tensors, options=options, what="the network for evaluation")
                step.prepared = True
            totals[kind] += step(*tensors).asnumpy()
        order.reverse()  # the last weights are in the network: they come first in the next batch
    totals = all_reduce_sum(totals)
    if totals[0, 3] == 0:
        raise DataError(NOTHING_TO_EVALUATE)
    return [
        Result(100 * float(top1 / images), 100 * float(top5 / images), float(loss / images), int(images))
        for top1, top5, loss, images in totals
    ]


class ClassificationEvaluator:
    """An `Evaluator` of classifiers: top-1, top-5 and loss.

    Args:
        network: gives logits. loader: this rank's share of the validation set.
    """

    def __init__(self, network: nn.Cell, loader: EvalLoader) -> None:
        self.network, self.loader, self.dataset = network, loader, loader.dataset
        self.step = EvalStep(network).set_train(False)

    def identity(self) -> dict[str, Any]:
        """What a score is of: which images, prepared how."""
        pixels = asdict(self.loader.transform.preprocessing)
        return json.loads(json.dumps(dict(self.dataset.identity(), preprocessing=pixels)))

    def prepare(self, options: Any, on_signal: Callable[[int], None]) -> None:
        """See `Evaluator.prepare`."""
        prepare(self.step, self.loader, options, on_signal)

    def evaluate(self, weights: Sequence[Callable[[], None]], options: Any) -> list[Result]:
        """See `Evaluator.evaluate`."""
        return evaluate_each(self.step, weights, self.loader, all_reduce_sum, options)
