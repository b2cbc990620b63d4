"""Learning-rate range test (Smith, 2017): the loss while the learning rate rises from update to update."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from mindspore import Tensor

from ..config import Config
from ..errors import RunError, SettingError
from ..files import replacing
from .step import TrainStep

SMOOTHING = 0.9  # share of the old value in the smoothed loss
DIVERGED = 4.0  # times the smallest smoothed loss: the test ends there, as in fastai


@dataclass(frozen=True)
class Point:
    """One update: its learning rate, the mean loss of its batches, and the smoothed loss up to it."""

    update: int
    lr: float
    loss: float
    smoothed_loss: float


def rising_rates(start_lr: float, end_lr: float, updates: int) -> list[float]:
    """Learning rates from `start_lr` to `end_lr`, each the same factor above the one before.

    Raises:
        SettingError: they do not rise, or there are too few to draw a curve.
    """
    if not 0 < start_lr < end_lr < math.inf:
        raise SettingError(f"start_lr is {start_lr} and end_lr is {end_lr}; expected two positive numbers that rise")
    if updates < 10:
        raise SettingError(f"updates is {updates}; expected at least 10")
    return np.geomspace(start_lr, end_lr, updates).tolist()


def range_test(
    step: TrainStep, batches: Iterator[tuple[np.ndarray, ...]], rates: list[float], accumulation: int = 1
) -> Iterator[Point]:
    """Trains with each learning rate for one update; ends early where the loss is not finite or has grown fourfold.

    Args:
        step: in training; its optimiser has these `rates`.
        batches: images, labels, noise, without end.
        accumulation: batches that make one update.
    """
    average, smallest = 0.0, math.inf
    for update, lr in enumerate(rates, start=1):
        losses = []
        for _ in range(accumulation):
            loss, _ = step(*(Tensor(array) for array in next(batches)))
            losses.append(float(loss.asnumpy()))
        loss = float(np.mean(losses))
        if not math.isfinite(loss):
            return
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed = average / (1 - SMOOTHING**update)
        yield Point(update, lr, loss, smoothed)
        smallest = min(smallest, smoothed)
        if smoothed > DIVERGED * smallest:
            return


def suggestion(points: list[Point]) -> tuple[float, float]:
    """The learning rate at which the smoothed loss falls most steeply, and the one at which it is smallest.

    Raises:
        RunError: there are too few points, or the loss does not fall.
    """
    if len(points) < 10:
        raise RunError(
            f"The loss was of use in {len(points)} updates only; lower --start_lr, or look at the data and the recipe"
        )
    smoothed = np.array([point.smoothed_loss for point in points])
    first = len(points) // 10  # before it, the smoothed loss is that of a few batches
    lowest = first + int(np.argmin(smoothed[first:]))
    slopes = np.gradient(smoothed, np.log([point.lr for point in points]))[first : lowest + 1]
    if lowest == first or slopes.min() >= 0:
        raise RunError(
            f"The loss does not fall between the learning rates {points[0].lr:.3g} and {points[-1].lr:.3g}; lower "
            f"--start_lr, or raise --end_lr or --updates"
        )
    return points[first + int(np.argmin(slopes))].lr, points[lowest].lr


def write(path: Path, points: Iterable[Point]) -> None:
    """Writes the points as CSV.

    Raises:
        WriteError: the file cannot be written.
    """
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Point)])
        writer.writeheader()
        writer.writerows(asdict(point) for point in points)


def draw(path: Path, points: list[Point], steepest: float, config: Config) -> None:
    """Draws the losses against the learning rate, as PNG.

    Raises:
        WriteError: the file cannot be written.
        ModuleNotFoundError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, rates = figure.subplots(), [point.lr for point in points]
    axes.plot(rates, [point.loss for point in points], ".", alpha=0.4, label="loss of an update")
    axes.plot(rates, [point.smoothed_loss for point in points], label="smoothed")
    axes.axvline(steepest, linestyle="--", color="grey", label=f"steepest: {steepest:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss", title=f"{config.model}, {config.opt}")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
