"""Figures of label maps: IoU, accuracy and Dice of each class, and their means, by one confusion matrix of a whole set.

A figure that would be 0/0 is not a number (nan; None in JSON, "n/a" in a table) and left out of the means: IoU and Dice
of a class that is in no truth and no prediction, accuracy of one that is in no truth. A class that is only predicted
has IoU 0. Pixels with the label 255 count nowhere. All is as in MMSegmentation's IoUMetric.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from ..data.lists import write_table
from ..errors import SettingError, printable
from .masks import IGNORE

COLUMNS = ("class", "IoU", "Acc", "Dice", "label_pixels", "predicted_pixels", "right_pixels")
FIGURES = ("mIoU", "mAcc", "aAcc", "mDice")
NAME_WIDTH = 28  # characters of a class's name in a table


class ConfusionMatrix:
    """How many pixels of each class were taken for which: summed over a set, whatever its order and batches.

    Attributes:
        matrix: (classes, classes) int64: of pixels of the class of the row, how many were predicted as the column's.
        images: label maps that were counted; ignored: pixels with the label 255.
    """

    def __init__(self, num_classes: int, ignore: int = IGNORE) -> None:
        if num_classes < 1:
            raise SettingError(f"{num_classes} classes; expected at least 1")
        self.num_classes, self.ignore = num_classes, ignore
        self.matrix = np.zeros((num_classes, num_classes), np.int64)
        self.images = self.ignored = 0

    def update(self, prediction: np.ndarray, label: np.ndarray) -> None:
        """Counts one label map (H, W), or several (N, H, W), of whole numbers.

        Raises:
            SettingError: the two differ in shape, or hold a number that is none of a class where it counts.
        """
        prediction, label = np.asarray(prediction), np.asarray(label)
        if prediction.shape != label.shape or label.ndim not in (2, 3):
            raise SettingError(
                f"a prediction of shape {prediction.shape} and labels of {label.shape}; expected the same, (H, W) or "
                f"(N, H, W): resize the logits to the label map, never the label map"
            )
        valid = label != self.ignore
        truth, guess = (array[valid].astype(np.int64) for array in (label, prediction))
        for what, numbers in (("labels", truth), ("a prediction", guess)):
            if numbers.size and not 0 <= numbers.min() <= numbers.max() < self.num_classes:
                raise SettingError(
                    f"{what} from {numbers.min()} to {numbers.max()}; expected 0 to {self.num_classes - 1}"
                    + (f", or {self.ignore} (ignored)" if what == "labels" else "")
                )
        size = self.num_classes
        self.matrix += np.bincount(truth * size + guess, minlength=size * size).reshape(size, size)
        self.images += 1 if label.ndim == 2 else len(label)
        self.ignored += int(label.size - truth.size)

    def add(self, other: ConfusionMatrix) -> None:
        """Takes in what was counted elsewhere, on another rank for one."""
        self.matrix += other.matrix
        self.images += other.images
        self.ignored += other.ignored

    def per_class(self) -> dict[str, np.ndarray]:
        """IoU, Acc and Dice of each class, float64 fractions, nan where they would be 0/0."""
        right = np.diag(self.matrix).astype(np.float64)
        label, predicted = self.matrix.sum(1).astype(np.float64), self.matrix.sum(0).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            return dict(
                IoU=right / (label + predicted - right), Acc=right / label, Dice=2 * right / (label + predicted)
            )

    def figures(self) -> dict[str, Any]:
        """All figures as JSON has them: fractions, None where nothing was counted.

        Returns:
            mIoU, mAcc, mDice: means over the classes that have the figure; aAcc: share of the pixels that are right;
            classes_averaged: how many classes mIoU is the mean of; num_classes, images, pixels, ignored_pixels;
            per_class: IoU, Acc, Dice, label_pixels, predicted_pixels, right_pixels, each a list.
        """
        each = self.per_class()
        pixels = int(self.matrix.sum())
        right = np.diag(self.matrix)
        return dict(
            mIoU=_mean(each["IoU"]),
            mAcc=_mean(each["Acc"]),
            aAcc=int(right.sum()) / pixels if pixels else None,
            mDice=_mean(each["Dice"]),
            classes_averaged=int(np.isfinite(each["IoU"]).sum()),
            num_classes=self.num_classes,
            images=self.images,
            pixels=pixels,
            ignored_pixels=self.ignored,
            per_class=dict(
                {name: [None if math.isnan(v) else v for v in values.tolist()] for name, values in each.items()},
                label_pixels=self.matrix.sum(1).tolist(),
                predicted_pixels=self.matrix.sum(0).tolist(),
                right_pixels=right.tolist(),
            ),
        )


def _mean(values: np.ndarray) -> Optional[float]:
    """The mean of the numbers among them; None where there is none."""
    numbers = values[np.isfinite(values)]
    return math.fsum(numbers.tolist()) / len(numbers) if len(numbers) else None


def class_rows(figures: dict[str, Any], class_names: Sequence[str]) -> list[tuple[Any, ...]]:
    """A row of `COLUMNS` for each class, None where a figure would be 0/0."""
    each = figures["per_class"]
    return list(zip(class_names, *(each[name] for name in COLUMNS[1:])))


def write_class_csv(path: Path, figures: dict[str, Any], class_names: Sequence[str]) -> None:
    """Writes the rows of the classes as CSV; an empty cell where a figure would be 0/0.

    Raises:
        WriteError: it cannot be written.
    """
    rows = class_rows(figures, class_names)
    write_table(path, COLUMNS, [["" if cell is None else cell for cell in row] for row in rows])


def percent(value: Optional[float]) -> str:
    """A fraction in per cent with two decimals; "n/a" where there is none."""
    return "n/a" if value is None else f"{100 * value:.2f}"


def summary(figures: dict[str, Any]) -> str:
    """One line: the means, of how many classes, and of how many images."""
    means = ", ".join(f"{name} {percent(figures[name])}" + (" %" if figures[name] is not None else "")
                      for name in FIGURES)  # fmt: skip
    averaged, total = figures["classes_averaged"], figures["num_classes"]
    classes = f"{total} classes" if averaged == total else f"{averaged} of {total} classes"
    left_out = total - averaged
    absent = f"; {left_out} in no truth and no prediction: left out" if left_out else ""
    return f"{means} ({figures['images']:,} images, mean over {classes}{absent})"


def class_table(figures: dict[str, Any], class_names: Sequence[str]) -> str:
    """A table with a line for each class, and the summary below."""
    shown = [_fitting(printable(name)) for name in class_names]
    width = max([len("class"), *map(len, shown)])
    lines = [f"{'class':{width}}  {'IoU %':>7} {'Acc %':>7} {'Dice %':>7} {'pixels %':>9}"]
    pixels = figures["pixels"]
    for name, row in zip(shown, class_rows(figures, class_names)):
        share = percent(row[4] / pixels if pixels else None)
        lines.append(f"{name:{width}}  {_cells(row[1:4])} {share:>9}")
    return "\n".join([*lines, summary(figures)])


def _cells(values: Iterable[Optional[float]]) -> str:
    return " ".join(f"{percent(value):>7}" for value in values)


def _fitting(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 3]}..."
