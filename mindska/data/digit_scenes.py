"""Scenes of real handwritten digits for segmentation and detection: scikit-learn's scans on textured backgrounds.

A scene depends on the seed, its set and its number only. Every fifth scan of a digit is kept for validation scenes, as
in `mindska prepare_digits`. Digits overlap, but at least half of each stays in sight.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
from PIL import Image

from ..errors import SettingError

SPLITS = ("train", "val")
HELD_OUT = 5  # every so many-th scan of a digit is for validation
VISIBLE = 0.5  # least share of a digit that later ones leave in sight
PLACES = 20  # tried for a digit before it is left out
SIZES = (0.22, 0.5)  # of a digit's higher side, in the image's shorter one
CLASS_NAMES = ("background", *map(str, range(10)))
# Of 255: the background's patches and the digits' channels, from to. Digits are lighter than their background, as chalk
# on a blackboard: then a few minutes are enough to learn their shapes.
DARK, LIGHT = (16, 110), (130, 255)
# Of 255: least difference of a digit's brightness from the background's, and of all channels from another digit's.
CONTRAST, DISTANCE = 90, 120
COLOURS = 200  # tried for a digit
LUMA = np.array([299, 587, 114])  # red's, green's and blue's part of the brightness, in thousandths


@dataclass(frozen=True)
class Digit:
    """A digit of a scene.

    Attributes:
        number: 0 to 9. mask: (H, W) bool: where it is seen.
    """

    number: int
    mask: np.ndarray

    @property
    def box(self) -> tuple[int, int, int, int]:
        """x, y, width, height of what is seen, in pixels."""
        rows, columns = (np.flatnonzero(self.mask.any(axis)) for axis in (1, 0))
        return (int(columns[0]), int(rows[0]), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1)


@dataclass(frozen=True)
class Scene:
    """A picture of digits.

    Attributes:
        image: (H, W, 3) uint8. digits: from the lowest to the one on top.
    """

    image: np.ndarray
    digits: list[Digit] = field(default_factory=list)

    @property
    def labels(self) -> np.ndarray:
        """(H, W) uint8: 0 background, 1 to 10 the digits 0 to 9."""
        labels = np.zeros(self.image.shape[:2], np.uint8)
        for digit in self.digits:
            labels[digit.mask] = digit.number + 1
        return labels


def split_scans(images: np.ndarray, numbers: Sequence[int]) -> dict[str, list[tuple[int, np.ndarray]]]:
    """The scans for training and for validation scenes: (digit, (8, 8) uint8) each.

    Args:
        images: (N, 8, 8), from 0 to 16; numbers: the digits.
    """
    scans: dict[str, list[tuple[int, np.ndarray]]] = {split: [] for split in SPLITS}
    seen = dict.fromkeys(range(10), 0)
    for image, number in zip(images, map(int, numbers)):
        split = "val" if seen[number] % HELD_OUT == HELD_OUT - 1 else "train"
        scans[split].append((number, (image * 255 / 16).astype(np.uint8)))
        seen[number] += 1
    return scans


class DigitScenes:
    """Scenes of one set.

    Args:
        scans: as of `split_scans`. seed, split: what all that is random comes from.
        size: (height, width) in pixels. digits: how many there are in a scene, from to.

    Raises:
        SettingError: a value is out of range.
    """

    def __init__(
        self,
        scans: Sequence[tuple[int, np.ndarray]],
        seed: int = 0,
        split: str = "train",
        size: tuple[int, int] = (128, 128),
        digits: tuple[int, int] = (2, 6),
    ) -> None:
        if not 32 <= min(size) <= max(size) <= 4096:
            raise SettingError(f"scenes of {size[0]}x{size[1]} pixels; expected 32 to 4096")
        if not 1 <= digits[0] <= digits[1] <= 100:
            raise SettingError(f"{digits[0]} to {digits[1]} digits in a scene; expected 1 to 100, from to")
        self.scans, self.seed, self.split, self.size, self.digits = scans, seed, SPLITS.index(split), size, digits

    def scene(self, index: int) -> Scene:
        """Scene `index` of the set."""
        rng = np.random.default_rng([self.seed, self.split, index])
        background = _texture(self.size, rng)
        image = background.copy()
        above = np.zeros(self.size, np.int64)  # 0: none, else the number of the digit that is seen + 1
        numbers: list[int] = []
        areas: list[int] = []
        inks: list[np.ndarray] = []
        for _ in range(int(rng.integers(self.digits[0], self.digits[1], endpoint=True))):
            number, scan = self.scans[int(rng.integers(len(self.scans)))]
            ink = self._drawn(scan, rng)
            place = self._place(ink >= 128, above, areas, rng)
            inks.append(_ink(background, inks, rng))
            if place is None:
                continue
            part = slice(place[0], place[0] + ink.shape[0]), slice(place[1], place[1] + ink.shape[1])
            share = ink[..., None].astype(np.float32) / 255
            image[part] = np.rint(image[part] * (1 - share) + inks[-1] * share)
            above[part][ink >= 128] = len(numbers) + 1
            numbers.append(number)
            areas.append(int((ink >= 128).sum()))
        digits = [Digit(number, above == i + 1) for i, number in enumerate(numbers)]
        return Scene(image.astype(np.uint8), digits)

    def _drawn(self, scan: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A scan at a random size, (h, w) uint8: how much of each pixel is ink."""
        height = int(min(self.size) * (SIZES[0] + (SIZES[1] - SIZES[0]) * rng.random()))
        width = max(8, int(height * (0.75 + 0.4 * rng.random())))
        large = Image.fromarray(scan).resize((min(width, self.size[1]), height), Image.Resampling.BICUBIC)
        return np.clip((np.asarray(large).astype(np.int32) - 70) * 3, 0, 255).astype(np.uint8)  # sharper strokes

    def _place(
        self, ink: np.ndarray, above: np.ndarray, areas: Sequence[int], rng: np.random.Generator
    ) -> Optional[tuple[int, int]]:
        """(top, left) at which enough of the digits below stays in sight; None: there was none."""
        if not ink.any():
            return None
        for _ in range(PLACES):
            top, left = (int(rng.integers(side - part + 1)) for side, part in zip(above.shape, ink.shape))
            after = above.copy()
            after[top : top + ink.shape[0], left : left + ink.shape[1]][ink] = 0
            seen = np.bincount(after.ravel(), minlength=len(areas) + 1)[1:]
            if all(count >= VISIBLE * area for count, area in zip(seen, areas)):
                return top, left
        return None


def _texture(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) float32, whole numbers from 0 to 255: soft patches of colour, stripes, and grain."""
    height, width = size
    cells = int(rng.integers(2, 7))
    coarse = rng.integers(*DARK, (cells, cells, 3), dtype=np.uint8)
    patches = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    rows, columns = np.mgrid[:height, :width]
    across, down, period = (int(value) for value in rng.integers(1, 12, 3))
    waves = np.abs((rows * down + columns * across) % (8 * period + 8) - (4 * period + 4)) / (4 * period + 4)
    stripes = (waves - 0.5) * int(rng.integers(10, 45))
    grain = rng.integers(-14, 15, (height, width, 1))
    return np.clip(np.rint(np.asarray(patches) + stripes[..., None] + grain), 0, 255).astype(np.float32)


def _ink(image: np.ndarray, others: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """(3,) int: a colour much lighter than the background, and another than those of the digits below."""
    background = int(image.sum(dtype=np.float64) / image.size)
    for _ in range(COLOURS):
        ink = rng.integers(*LIGHT, 3, endpoint=True)
        if int(ink @ LUMA) // 1000 - background < CONTRAST:
            continue
        if all(np.abs(ink - other).sum() >= DISTANCE for other in others):
            break
    return ink


# ----------------------------------------------------------------------------------------- files


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """COCO's run lengths of a mask (H, W): by columns, beginning with those of 0; not compressed."""
    flat = mask.ravel(order="F").astype(np.int8)
    turns = np.flatnonzero(np.diff(flat, prepend=0))
    counts = np.diff(np.concatenate([[0], turns, [flat.size]]))
    return dict(size=list(mask.shape), counts=counts.tolist())


def write_digit_scenes(
    out: Path,
    scans: dict[str, list[tuple[int, np.ndarray]]],
    counts: dict[str, int],
    seed: int = 0,
    size: tuple[int, int] = (128, 128),
    digits: tuple[int, int] = (2, 6),
) -> dict[str, int]:
    """Writes scenes to a new folder, which serves both tasks; returns how many digits each set has.

    ```
    JPEGImages/train_0001.png   SegmentationClass/train_0001.png   ImageSets/Segmentation/train.txt   classes.txt
    train2017/train_0001.png    annotations/instances_train2017.json                         (and the same for val)
    ```

    Args:
        scans: as of `split_scans`; counts: scenes of each set.

    Raises:
        SettingError: a value is out of range. OSError: a file cannot be written.
    """
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "annotations"):
        (out / folder).mkdir(parents=True)
    found = {}
    for split in SPLITS:
        scenes = DigitScenes(scans[split], seed, split, size, digits)
        (out / f"{split}2017").mkdir()
        coco = _write_split(out, split, (scenes.scene(i) for i in range(counts[split])))
        text = json.dumps(coco, ensure_ascii=False)
        (out / "annotations" / f"instances_{split}2017.json").write_text(text, encoding="utf-8")
        names = "".join(f"{image['file_name'][:-4]}\n" for image in coco["images"])
        (out / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(names, encoding="utf-8")
        found[split] = len(coco["annotations"])
    (out / "classes.txt").write_text("\n".join(CLASS_NAMES) + "\n", encoding="utf-8")
    return found


def _write_split(out: Path, split: str, scenes: Iterator[Scene]) -> dict[str, Any]:
    """Writes images and masks; returns what COCO's file of annotations says."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    colours = np.zeros((256, 3), np.uint8)
    for i in range(256):  # PASCAL VOC's
        colours[i] = [sum((i >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)]
    for number, scene in enumerate(scenes, start=1):
        name = f"{split}_{number:04}.png"
        image = Image.fromarray(scene.image)
        for folder in ("JPEGImages", f"{split}2017"):
            image.save(out / folder / name)
        mask = Image.fromarray(scene.labels)
        mask.putpalette(colours.tobytes())
        mask.save(out / "SegmentationClass" / name)
        images.append(dict(id=number, file_name=name, height=image.height, width=image.width))
        for digit in scene.digits:
            annotations.append(
                dict(
                    id=len(annotations) + 1, image_id=number, category_id=digit.number + 1, iscrowd=0,
                    bbox=list(digit.box), area=int(digit.mask.sum()), segmentation=run_lengths(digit.mask),
                )
            )  # fmt: skip
    categories = [dict(id=i + 1, name=str(i), supercategory="digit") for i in range(10)]
    return dict(info=dict(description="Scenes of scikit-learn's handwritten digits"), images=images,
                annotations=annotations, categories=categories)  # fmt: skip
