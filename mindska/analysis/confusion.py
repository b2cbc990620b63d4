"""Which classes a network takes for which, and its most confident mistakes.

The figures of the classes follow scikit-learn's `classification_report`: what would be 0/0 is 0, the macro mean is over
all classes, the weighted one by their support.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config
from ..data import ImageDataset
from ..data.contact_sheet import MOST, SIDE, Picture, check_sheet, write_contact_sheet
from ..data.lists import table_cell, write_table
from ..distributed import World
from ..errors import DataError
from ..segmentation.metrics import ConfusionMatrix
from ..tasks.segmentation.opening import open_segmenter
from ..tasks.segmentation.validation import open_data, open_evaluator
from ..validation import Outcomes, Shared, predict_all, prepare
from .drawing import LONGEST, MOST_NAMED, name_classes, new_figure, save_figure, shown, write_json

WRITTEN = 25  # classes up to which a picture has the numbers
AVERAGES = ("macro avg", "weighted avg")


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """(classes, classes) int64: of the row's class, how many were taken for the column's."""
    pairs = labels.astype(np.int64) * classes + predictions.astype(np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def report(matrix: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Precision, recall, F1 and support of each class, the accuracy, and the means: fractions, as scikit-learn's
    `classification_report(output_dict=True)` has them, with the classes as a list under "classes"."""
    right, support, called = np.diag(matrix).astype(float), matrix.sum(1), matrix.sum(0)

    def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)

    precision, recall = share(right, called), share(right, support)
    f1 = share(2 * right, (support + called).astype(float))
    columns = {"precision": precision, "recall": recall, "f1-score": f1}
    classes = [
        {"index": i, "name": name, **{key: float(each[i]) for key, each in columns.items()}, "support": int(support[i])}
        for i, name in enumerate(names)
    ]
    total = int(support.sum())
    weights = support / max(total, 1)
    means = {
        "macro avg": {key: float(each.mean()) for key, each in columns.items()},
        "weighted avg": {key: float((each * weights).sum()) for key, each in columns.items()},
    }
    found: dict[str, Any] = {"accuracy": float(right.sum() / max(total, 1)), "support": total, "classes": classes}
    return {**found, **{key: {**value, "support": total} for key, value in means.items()}}


def text(found: dict[str, Any], most: int = 30) -> Iterator[str]:
    """The report as lines; of many classes those with the lowest F1."""
    rows = found["classes"]
    if len(rows) > most:
        rows = sorted((row for row in rows if row["support"]), key=lambda row: row["f1-score"])[:most]
    width = max(14, *(len(shown(row["name"])) for row in rows)) + 2
    yield " " * width + "".join(f"{name:>11}" for name in ("precision", "recall", "f1-score", "support"))
    for row in [*rows, *(dict(found[name], name=name) for name in AVERAGES)]:
        figures = "".join(f"{row[name]:11.4f}" for name in ("precision", "recall", "f1-score"))
        yield f"{shown(row['name']):<{width}}{figures}{row['support']:11,}"
    if len(rows) < len(found["classes"]):
        yield f"(the {len(rows)} classes with the lowest F1 of {len(found['classes']):,})"
    yield f"{'accuracy':<{width}}{found['accuracy']:33.4f}{found['support']:11,}"


def confused(matrix: np.ndarray, names: Sequence[str], most: int = 10) -> list[tuple[str, str, int, float]]:
    """The commonest mistakes: true class, answered class, how often, and the share of the true class's."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [divmod(int(place), len(names)) for place in order]
    return [(names[i], names[j], int(wrong[i, j]), wrong[i, j] / matrix[i].sum()) for i, j in pairs if wrong[i, j]]


def draw(path: Path, matrix: np.ndarray, names: Sequence[str], what: str, title: str) -> None:
    """Draws a matrix: a row's colours are shares of its class, its numbers (of few classes) counts."""
    support = matrix.sum(1, keepdims=True)
    shares = np.divide(matrix, support, out=np.zeros(matrix.shape), where=support > 0)
    side = float(np.clip(0.42 * len(names) + 2, 4.5, 11))
    figure = new_figure(side + 0.8, side)
    axes = figure.subplots()
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if len(names) <= WRITTEN:
        for i in range(len(names)):
            for j in range(len(names)):
                if matrix[i, j]:
                    colour = "white" if shares[i, j] > 0.5 else "black"
                    axes.text(j, i, _count(matrix[i, j]), ha="center", va="center", color=colour, fontsize=7)
    turned = 0 if len(names) <= MOST_NAMED and max(map(len, names)) <= 3 else 90
    name_classes(axes.xaxis, names, rotation=turned if len(names) <= MOST_NAMED else 0)
    name_classes(axes.yaxis, names)
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    figure.colorbar(drawn, ax=axes, label=f"share of the true class's {what}", shrink=0.8)
    save_figure(figure, path)


def _count(number: int) -> str:
    if number < 10_000:
        return str(number)
    return f"{number / 1e6:.1f}M" if number >= 1_000_000 else f"{number / 1e3:.0f}k"


def evaluated(config: Config, world: World) -> tuple[Config, Outcomes, ImageDataset, list[str]]:
    """What a classifier, a checkpoint or an exported model, says of the validation images: one pass over them.

    Raises:
        UserError: the checkpoint or the data cannot be used.
    """
    prepared = prepare(config, world, Shared())
    dataset = prepared.loader.dataset
    allowed = prepared.chosen if prepared.config.mask_classes else None
    outcomes = predict_all(prepared.logits, prepared.loader, prepared.num_classes, allowed, config.tta, progress=True)
    known = dataset.class_names
    names = [*known, *(f"class {i}" for i in range(len(known), prepared.num_classes))]
    return prepared.config, outcomes, dataset, names


def predictions(outcomes: Outcomes) -> np.ndarray:
    """(N,) the class that each image was taken for; outputs that are NaN are for no class, and refused.

    Raises:
        DataError: there are such.
    """
    if not np.isfinite(outcomes.losses).all():
        many = int((~np.isfinite(outcomes.losses)).sum())
        raise DataError(f"The network's outputs for {many:,} images are NaN or infinite: they are of no class")
    return outcomes.classes[:, 0]


def count_pixels(config: Config) -> tuple[Config, np.ndarray, list[str], int]:
    """A segmenter's configuration, matrix of pixels, class names, and number of images: one pass over them."""
    segmenter = open_segmenter(config)
    dataset = open_data(segmenter)
    counted = ConfusionMatrix(segmenter.num_classes)
    evaluator = open_evaluator(segmenter, dataset, num_workers=config.num_parallel_workers or 2)
    evaluator.each = lambda index, found, mask: counted.update(found, mask)
    evaluator.evaluate([lambda: None], progress=True)
    names = [*dataset.class_names, *segmenter.class_names[len(dataset.class_names) :]]
    return segmenter.config, counted.matrix, names, counted.images


def write_confusion(out: Path, config: Config, world: World, pixels: bool, ending: str) -> Iterator[str]:
    """Everything that `mindska analyze confusion` writes; yields what it says.

    Args:
        pixels: the checkpoint is a segmenter.
    """
    if pixels:
        config, matrix, names, images = count_pixels(config)
    else:
        config, outcomes, _, names = evaluated(config, world)
        matrix, images = confusion_matrix(outcomes.labels, predictions(outcomes), len(names)), len(outcomes.labels)
    what = "pixels" if pixels else "images"
    write_table(
        out / "confusion.csv",
        ["true class", *map(table_cell, names)],
        ([name, *row] for name, row in zip(names, matrix)),
    )
    found = report(matrix, names)
    header = ("index", "name", "precision", "recall", "f1-score", "support")
    write_table(out / "classes.csv", header, ([row[key] for key in header] for row in found["classes"]))
    pairs = confused(matrix, names)
    facts: dict[str, Any] = dict(model=config.model, ckpt_path=config.ckpt_path, counted=what, images=images)
    most = [dict(true=true, predicted=guess, count=count, share=share) for true, guess, count, share in pairs]
    write_json(out / "confusion.json", {**facts, **found, "most_confused": most})
    title = f"{config.model}: {100 * found['accuracy']:.2f} % of {found['support']:,} {what}"
    draw(out / f"confusion.{ending}", matrix, names, what, title)
    yield from text(found)
    for true, guess, count, share in pairs[:5]:
        yield f"{shown(true)} taken for {shown(guess)}: {count:,} ({100 * share:.1f} %)"
    yield f"{out / f'confusion.{ending}'}, {out / 'confusion.csv'}, {out / 'classes.csv'}, {out / 'confusion.json'}"


def write_errors(out: Path, config: Config, world: World, number: int) -> Iterator[str]:
    """Everything that `mindska analyze errors` writes; yields what it says."""
    check_sheet(out / "errors.png")
    config, outcomes, dataset, names = evaluated(config, world)
    guessed = predictions(outcomes)
    confidence = outcomes.probabilities[:, 0]
    wrong = np.flatnonzero(guessed != outcomes.labels)
    wrong = wrong[np.lexsort((outcomes.indices[wrong], -confidence[wrong]))]
    rows = (
        [
            dataset.describe(int(outcomes.indices[i])),
            names[outcomes.labels[i]],
            names[guessed[i]],
            round(float(confidence[i]), 6),
            round(float(np.exp(-outcomes.losses[i])), 6),
            int(outcomes.before[i]) + 1,
        ]
        for i in wrong
    )
    header = ("path", "label", "prediction", "probability", "probability_of_label", "rank_of_label")
    write_table(out / "errors.csv", header, rows)
    total = len(guessed)
    yield f"{len(wrong):,} of {total:,} images are taken for another class ({100 * len(wrong) / total:.2f} %)"
    if not len(wrong):
        yield f"{out / 'errors.csv'} has none, and there is nothing to draw"
        return
    shown_ones = wrong[: min(number, MOST)]

    def pictures() -> Iterator[Picture]:
        for i in shown_ones:
            image = dataset.load(
                int(outcomes.indices[i]), lambda size: (min(size[0], 2 * SIDE), min(size[1], 2 * SIDE))
            )
            said = f"{names[guessed[i]]}, {100 * confidence[i]:.1f} %"
            yield Picture(image, (said, f"is {names[outcomes.labels[i]]}", Path(dataset.describe(int(outcomes.indices[i]))).name))  # fmt: skip # noqa: E501

    title = f"{config.model}: the most confident mistakes"
    count = write_contact_sheet(out / "errors.png", pictures(), title[: 2 * LONGEST + 40])
    yield f"{out / 'errors.png'}: the {count} most confident; {out / 'errors.csv'}: all"
