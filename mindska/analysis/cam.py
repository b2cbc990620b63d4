"""Class activation maps: which part of an image a network's answer rests on.

Grad-CAM (Selvaraju et al., 2017), Eigen-CAM (Muhammad and Yeasin, 2020) and Score-CAM (Wang et al., 2020). The maps are
scaled as the package `grad-cam` does it: 0 to 1 over the map, enlarged to the image bilinearly, and 0 to 1 again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
from tqdm import tqdm

from ..acceleration import accelerate, decelerate
from ..data import EvalTransform
from ..data.lists import write_table
from ..errors import ConfigError
from ..files import replacing
from ..modes import pynative_mode
from ..prediction import softmax
from ..segmentation.transforms import resize_logits
from ..streams import unfailing_stderr
from .drawing import grid, save_figure, short_name, show_picture, shown, write_json
from .opening import (
    Images,
    Subject,
    batches,
    displayed,
    feature_names,
    find_classes,
    find_features,
    some_images,
)
from .stages import Cut

METHODS = ("gradcam", "eigencam", "scorecam")
TINY = 1e-7  # added to a map's largest value, as the package does


def scaled(maps: np.ndarray) -> np.ndarray:
    """(B, h, w): each from 0 to 1."""
    low = maps - maps.min((1, 2), keepdims=True)
    return (low / (TINY + low.max((1, 2), keepdims=True))).astype(np.float32)


def enlarged(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Maps (B, h, w) -> (B, H, W): what is below 0 is 0, each from 0 to 1."""
    small = scaled(np.maximum(maps, 0))
    return scaled(np.maximum(resize_logits(small, size), 0))


def gradcam(features: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """(B, C, h, w) twice -> (B, h, w): the features' sum, each times its gradient's mean over the pixels."""
    return (features * gradients.mean((2, 3), keepdims=True)).sum(1)


def eigencam(features: np.ndarray) -> np.ndarray:
    """(B, C, h, w) -> (B, h, w): the features' first principal component.

    Its sign is free; it is such that the largest magnitude is positive.
    """
    found = []
    for each in features:
        pixels = each.reshape(len(each), -1).T
        pixels = pixels - pixels.mean(0)
        first = np.linalg.svd(pixels, full_matrices=False)[2][0]
        projection = (pixels @ first).reshape(each.shape[1:])
        found.append(-projection if -projection.min() > projection.max() else projection)
    return np.stack(found).astype(np.float32)


def score_masks(features: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(C, h, w) -> (C, H, W): each feature of an image enlarged, and from 0 to 1, to be laid over the image."""
    large = resize_logits(features, size, align_corners=True)
    low = large - large.min((1, 2), keepdims=True)
    return low / (large.max((1, 2), keepdims=True) - large.min((1, 2), keepdims=True) + 1e-8)


@dataclass(frozen=True)
class Maps:
    """What is found of a batch.

    Attributes:
        maps: (stages, B, H, W), 0 to 1. targets: (B,) the classes that are explained.
        predictions: (B,) those that the network answers, of a segmenter its commonest, of a detector the most probable;
            probabilities: (B,) of these, of a segmenter their shares of the pixels.
    """

    maps: np.ndarray
    targets: np.ndarray
    predictions: np.ndarray
    probabilities: np.ndarray


def explain(
    subject: Subject, images: np.ndarray, stages: Sequence[int], method: str = "gradcam", target: Optional[int] = None
) -> Maps:
    """Maps of images (B, C, H, W) for features of a network.

    One forward pass, and for Grad-CAM one backward pass a feature; Score-CAM takes a forward pass a channel.

    Args:
        target: the class to explain; None: of each image the one that the network answers.
    """
    size = (images.shape[2], images.shape[3])
    cut = Cut(subject.network, 0)
    features = cut.features(images)
    cut.index = len(features) - 1
    with pynative_mode():
        logits = cut.output(features[-1], features, size).asnumpy()
    answers, rows = logits.argmax(1), np.arange(len(images))
    if subject.is_segmenter:
        predictions, probabilities = _commonest(answers, logits.shape[1], _background(subject))
    elif subject.is_detector:
        certainties = cut.certainties(logits)
        predictions = certainties.argmax(1)
        probabilities = certainties[rows, predictions]
    else:
        predictions = answers
        probabilities = softmax(logits)[rows, answers]
    targets = np.full(len(images), target) if target is not None else predictions
    columns = targets + cut.first_class
    masks = None
    if subject.is_segmenter:
        masks = answers == targets[:, None, None]
    elif subject.is_detector:
        masks = np.eye(logits.shape[2])[logits[rows, columns].argmax(1)]
    maps = []
    for stage in stages:
        cut.index = stage
        values = features[stage].asnumpy()
        if method == "gradcam":
            found = gradcam(values, cut.gradient(features, size, columns, masks))
        elif method == "eigencam":
            found = eigencam(values)
        else:
            found = _scorecam(cut, subject.config.batch_size, images, values, columns, masks)
        maps.append(enlarged(found, size))
    return Maps(np.stack(maps), targets, predictions, probabilities)


def _background(subject: Subject) -> Optional[int]:
    names = [name.lower() for name in subject.class_names]
    return names.index("background") if "background" in names else None


def _commonest(answers: np.ndarray, classes: int, background: Optional[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of each label map (H, W) the class of most pixels, and its share; the background only where there is no other."""
    found = []
    for each in answers:
        counts = np.bincount(each.ravel(), minlength=classes)
        if background is not None and counts.sum() > counts[background]:
            counts[background] = 0
        found.append((int(counts.argmax()), counts.max() / each.size))
    return np.array([number for number, _ in found]), np.array([share for _, share in found])


def _scorecam(
    cut: Cut, size: int, images: np.ndarray, features: np.ndarray, columns: np.ndarray, masks: Optional[np.ndarray]
) -> np.ndarray:
    found = []
    accelerate(cut.network)  # there are many passes, and none backward
    try:
        for i, image in enumerate(images):
            seen = score_masks(features[i], image.shape[1:])
            scores: list[np.ndarray] = []
            for first in range(0, len(seen), size):
                each = cut.whole(image[None] * seen[first : first + size, None])[:, columns[i]]
                scores.append(each if masks is None else (each * masks[i]).reshape(len(each), -1).sum(1))
            weights = softmax(np.concatenate(scores)[None])[0].astype(np.float32)
            found.append((features[i] * weights[:, None, None]).sum(0))
    finally:
        decelerate(cut.network)
    return np.stack(found)


def write(
    out: Path,
    subject: Subject,
    stages: Sequence[str],
    method: str,
    target: str,
    files: Sequence[Path],
    number: int,
    ending: str,
) -> Iterator[str]:
    """Everything that `mindska analyze cam` writes; yields what it says."""
    if not subject.class_names:
        raise ConfigError(f"{subject.config.ckpt_path} is a backbone without a classifier: it answers nothing")
    numbers = find_features(subject, stages)
    wanted = find_classes(subject, [target])[0] if target else None
    images = some_images(subject, files, number)
    names, labels = feature_names(subject.backbone), images.labels
    figure, axes = grid(len(images), len(numbers) + 1)
    rows: list[list[Any]] = []
    kept = np.zeros((len(images), len(numbers), *subject.pixels.image_size), np.float32)
    bar = tqdm(total=len(images), unit="image", disable=None, file=unfailing_stderr())
    transform, drawn = EvalTransform(subject.pixels), np.zeros(len(images), bool)
    for places, pixels in batches(images, [transform], subject.config.batch_size, subject.config):
        found = explain(subject, pixels[0], numbers, method, wanted)
        for i, place in enumerate(places):
            drawn[place] = True
            picture = displayed(pixels[0, i], subject.pixels)
            answer, share = subject.class_names[found.predictions[i]], float(found.probabilities[i])
            goal = subject.class_names[found.targets[i]]
            truth = _truth(subject, images, place)
            show_picture(axes[place, 0], picture)
            axes[place, 0].set_title(f"{shown(answer, 14)} {100 * share:.0f} %", fontsize=8)
            axes[place, 0].set_ylabel(shown(truth or short_name(images.names[place]), 16), fontsize=8)
            for column, stage in enumerate(numbers):
                overlay = found.maps[column, i]
                kept[place, column] = overlay
                show_picture(axes[place, column + 1], picture)
                show_picture(axes[place, column + 1], overlay, cmap="jet", alpha=0.45, vmin=0, vmax=1)
                axes[place, column + 1].set_title(f"{names[stage]}: {shown(goal, 12)}", fontsize=7)
                row, col = np.unravel_index(int(overlay.argmax()), overlay.shape)
                above = float((overlay >= 0.5).mean())
                rows.append([images.names[place], truth, answer, round(share, 6), goal, names[stage], int(row), int(col), round(above, 6)])  # fmt: skip # noqa: E501
        bar.update(len(places))
    bar.close()
    for place in np.flatnonzero(~drawn):
        for each in axes[place]:
            each.set_axis_off()
    save_figure(figure, out / f"cam.{ending}")
    header = ("image", "label", "prediction", "probability", "target", "stage", "peak_row", "peak_column", "area_above_half")  # fmt: skip # noqa: E501
    write_table(out / "cam.csv", header, rows)
    with replacing(out / "cam.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, maps=kept, stages=np.array([names[stage] for stage in numbers]))
    facts = dict(
        model=subject.config.model, ckpt_path=subject.config.ckpt_path, method=method, images=list(images.names)
    )
    write_json(out / "cam.json", dict(facts, stages=[names[stage] for stage in numbers]))
    said = "" if labels is None else f", {int(sum(row[1] == row[2] for row in rows)) // len(numbers)} of them right"
    yield f"{int(drawn.sum())} images{said}: {out / f'cam.{ending}'}, {out / 'cam.csv'}, maps in {out / 'cam.npz'}"


def _truth(subject: Subject, images: Images, place: int) -> str:
    return "" if images.labels is None else subject.class_names[images.labels[place]]
