"""From an image to the network's input, for evaluation and for training.

Resizing is Pillow's, as in the authors' evaluation; `mindspore.dataset.vision` gives the same pixels with
`Inter.PILCUBIC` but not with `Inter.BICUBIC`, which MindCV uses (tests/parity/test_preprocessing.py shows both).
All randomness comes from the generator that is passed in.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, NamedTuple, Optional

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from ..errors import SettingError
from .augment import AutoAugment
from .base import ImageDataset

log = logging.getLogger("mindska")

MODES = {1: "L", 3: "RGB"}  # number of channels -> Pillow's mode
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
FILTER_REACH = 3  # pixels on each side, of the widest filter (Lanczos)
MAX_RESIZED_PIXELS = 1 << 26  # 8192x8192, 256 MiB in RGB
CROP_ATTEMPTS = 10
# A large crop may be decoded smaller, but not below so many times the network's input: resizing it then gives nearly
# the same pixels (Pillow's own choice for thumbnails).
DECODING_GAP = 2.0


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Preprocessing:
    """What a network's weights expect of an image; it belongs to the weights.

    Attributes:
        image_size: (height, width) of the input in pixels.
        crop_pct: evaluation resizes to image_size / crop_pct before the centre crop.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos".
        mean, std: of the channels (three: RGB, one: grey), on a scale of 0 to 1. Those on a scale of 0 to 255 (every
            mean above 1 and every std at least 1) are divided by 255, which is said.

    Raises:
        SettingError: a value is out of range, or mean and std are on different scales.
    """

    image_size: tuple[int, int]
    crop_pct: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("image_size", "mean", "std"):  # JSON has lists only
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)):
                raise SettingError(f"{name} is {value!r}; expected several numbers")
            object.__setattr__(self, name, tuple(value))
        if len(self.image_size) != 2 or not all(isinstance(n, Integral) and n >= 1 for n in self.image_size):
            raise SettingError(f"image_size is {self.image_size}; expected height and width in pixels")
        if self.image_size[0] * self.image_size[1] > MAX_RESIZED_PIXELS:
            raise SettingError(f"image_size is {self.image_size}; expected at most {MAX_RESIZED_PIXELS:,} pixels")
        if self.interpolation not in FILTERS:
            raise SettingError(f"interpolation is {self.interpolation!r}; expected one of {', '.join(FILTERS)}")
        if not _is_number(self.crop_pct) or not 0 < self.crop_pct <= 1:
            raise SettingError(f"crop_pct is {self.crop_pct}; expected a share in (0, 1], such as 0.875 for 87.5 %")
        if len(self.mean) not in MODES or len(self.std) != len(self.mean):
            raise SettingError(
                f"mean {self.mean} and std {self.std}: expected three numbers each (RGB), or one each (grey); images "
                f"of 1 and 3 channels are handled, no others"
            )
        if not all(_is_number(value) for value in self.mean + self.std) or min(self.std) <= 0:
            raise SettingError(f"mean {self.mean} and std {self.std}: expected finite numbers, std above 0")
        self._to_unit_scale()

    def _to_unit_scale(self) -> None:
        if max(map(abs, self.mean)) <= 1 and max(self.std) <= 1:
            return
        given = f"mean {self.mean} and std {self.std}"
        if min(self.mean) <= 1 or min(self.std) < 1 or max(self.mean + self.std) > 255:
            raise SettingError(
                f"{given} are neither both on a scale of 0 to 1 (nothing above 1) nor both on one of 0 to 255 (every "
                f"mean above 1, every std at least 1). Give both on the first: divide by 255 what is on the other"
            )
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(value / 255 for value in getattr(self, name)))
        log.warning(
            "%s are on a scale of 0 to 255: taken as mean %s and std %s on one of 0 to 1", given,
            *(tuple(round(value, 6) for value in values) for values in (self.mean, self.std)),
        )  # fmt: skip

    @property
    def in_channels(self) -> int:
        """Channels of the network's input: 3 (RGB) or 1 (grey)."""
        return len(self.mean)

    def for_channels(self, in_channels: int) -> Preprocessing:
        """The same for images of so many channels: from three to one by the means of mean and std.

        Raises:
            SettingError: it is neither 1 nor 3.
        """
        if in_channels not in MODES:
            raise SettingError(f"images of {in_channels} channels are not handled: expected 1 (grey) or 3 (RGB)")
        if in_channels == self.in_channels:
            return self
        mean, std = (math.fsum(values) / len(values) for values in (self.mean, self.std))
        return replace(self, mean=(mean,) * in_channels, std=(std,) * in_channels)

    def in_its_mode(self, image: Image.Image) -> Image.Image:
        """An image in RGB or grey, as the network takes it; grey is Pillow's, 0.299 R + 0.587 G + 0.114 B."""
        mode = MODES[self.in_channels]
        return image if image.mode == mode else image.convert(mode)

    def normalise(self, image: np.ndarray) -> np.ndarray:
        """(H, W, C) or (H, W) uint8 -> (C, H, W) float32"""
        image = image.reshape(*image.shape[:2], self.in_channels)
        array = image.transpose(2, 0, 1).astype(np.float32, order="C")
        # In place, one operation after the other, as PyTorch does it: the same roundings, and no copies.
        array /= np.float32(255)
        array -= np.array(self.mean, np.float32)[:, None, None]
        array /= np.array(self.std, np.float32)[:, None, None]
        return array


@dataclass(frozen=True)
class Augmentation:
    """How training images vary; the names are MindCV's options (see `mindska.config.Config`)."""

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    pad_crop: int = 0
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: Optional[tuple[float, ...]] = None
    auto_augment: Optional[str] = None
    re_prob: float = 0.0
    re_scale: tuple[float, float] = (0.02, 0.33)
    re_ratio: tuple[float, float] = (0.3, 3.3)
    re_value: str = "random"

    def __post_init__(self) -> None:
        for name in ("scale", "ratio", "re_scale", "re_ratio"):
            value = getattr(self, name)
            if len(value) != 2 or not 0 < value[0] <= value[1]:
                raise SettingError(f"{name} is {value}; expected two positive numbers, from to")
        if self.scale[1] > 1 or self.re_scale[1] > 1:
            raise SettingError(f"scale {self.scale} and re_scale {self.re_scale} are shares of the area: at most 1")
        if self.pad_crop < 0:
            raise SettingError(f"pad_crop is {self.pad_crop}; expected a number of pixels")
        if self.re_value not in ("random", "const"):
            raise SettingError(f"re_value is {self.re_value!r}; expected random or const")
        if self.color_jitter is not None and (len(self.color_jitter) not in (1, 3) or min(self.color_jitter) < 0):
            raise SettingError(
                f"color_jitter is {self.color_jitter}; expected one strength, or brightness, contrast, saturation"
            )


class EvalTransform:
    """Resize, centre crop, normalise, as timm evaluates: PIL image -> (C, H, W) float32.

    A square input of size s: the shorter side becomes floor(s / crop_pct) and the ratio of the sides stays. Another
    input: the image is resized to (floor(H / crop_pct), floor(W / crop_pct)) and its ratio changes.

    Of a strip that would be resized to more than `MAX_RESIZED_PIXELS` (at 224 pixels: 1,000 times as long as wide) only
    what the crop needs is resized; its pixels are the same but for rounding.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self.filter = FILTERS[preprocessing.interpolation]

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height to which an image is resized."""
        (h, w), crop_pct = self.preprocessing.image_size, self.preprocessing.crop_pct
        if h != w:
            return math.floor(w / crop_pct), math.floor(h / crop_pct)
        shorter = math.floor(h / crop_pct)
        if width <= height:
            return shorter, int(shorter * height / width)
        return int(shorter * width / height), shorter

    def __call__(self, image: Image.Image) -> np.ndarray:
        image = self.preprocessing.in_its_mode(image)
        width, height = self.resized(*image.size)
        h, w = self.preprocessing.image_size
        left, top = round((width - w) / 2.0), round((height - h) / 2.0)
        if width * height <= MAX_RESIZED_PIXELS:
            image = resize(image, (width, height), self.filter).crop((left, top, left + w, top + h))
        else:
            across, down = image.width / width, image.height / height
            box = (left * across, top * down, (left + w) * across, (top + h) * down)
            image = resize_part(image, (w, h), self.filter, box)
        return self.preprocessing.normalise(np.asarray(image))


def resize(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    """Pillow's resize to (width, height), with no larger an image between its two passes."""
    if size == image.size:
        return image
    if size[0] * image.height > MAX_RESIZED_PIXELS:  # Pillow begins with the width
        image = image.resize((image.width, size[1]), resample)
    return image.resize(size, resample)


def resize_part(
    image: Image.Image, size: tuple[int, int], resample: int, box: tuple[float, float, float, float]
) -> Image.Image:
    """A part of an image (left, top, right, bottom; they need not be whole), resized to (width, height).

    Pillow's resize has such a box, too, but in single precision: in an image of a million columns it is not exact.
    """
    margins = [FILTER_REACH * max(1.0, (box[i + 2] - box[i]) / size[i]) + 1 for i in (0, 1)]
    left, top = (max(0, math.floor(box[i] - margins[i])) for i in (0, 1))
    right, bottom = (min(image.size[i], math.ceil(box[i + 2] + margins[i])) for i in (0, 1))
    image = image.crop((left, top, right, bottom))
    # Rounding may put the end of the box a trifle beyond the image's.
    ends = min(box[2] - left, image.width), min(box[3] - top, image.height)
    return image.resize(size, resample, (box[0] - left, box[1] - top, *ends))


class Crop(NamedTuple):
    """A part of an image, in pixels of the whole image, whose `size` is (width, height)."""

    left: int
    top: int
    width: int
    height: int
    size: tuple[int, int]


class TrainTransform:
    """Random crop, flips, colours or a policy, normalise, random erasing: PIL image -> (C, H, W) float32."""

    columns: tuple[str, ...] = ("image", "label")

    def __init__(self, preprocessing: Preprocessing, augmentation: Augmentation) -> None:
        self.preprocessing, self.augmentation = preprocessing, augmentation
        self.filter = FILTERS[preprocessing.interpolation]
        self.policy = None
        if augmentation.auto_augment:
            fill = tuple(min(255, max(0, round(255 * value))) for value in preprocessing.mean)
            # Pillow cannot rotate or shear with Lanczos' filter.
            lanczos = self.filter == Image.Resampling.LANCZOS
            resample = Image.Resampling.BICUBIC if lanczos else self.filter
            self.policy = AutoAugment(augmentation.auto_augment, fill, resample)
        jitter = augmentation.color_jitter
        self.jitter = jitter * 3 if jitter is not None and len(jitter) == 1 else jitter

    def sample(self, dataset: ImageDataset, index: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Image `index` of a data set, augmented, and its label; the crop is drawn before the image is decoded.

        Raises:
            DataError: the image cannot be read.
        """
        crop: Optional[Crop] = None

        def decode_size(size: tuple[int, int]) -> tuple[int, int]:
            nonlocal crop
            crop = self.draw_crop(size, rng)
            return self.decode_size(crop)

        return self(dataset.load(index, decode_size), rng, crop), dataset.labels[index]

    def draw_crop(self, size: tuple[int, int], rng: np.random.Generator) -> Crop:
        """Which part of an image of so many pixels (width, height) the sample is: the first that is drawn for it."""
        if self.augmentation.pad_crop:
            pad = self.augmentation.pad_crop
            left, top = (int(offset) - pad for offset in rng.integers(2 * pad + 1, size=2))
            return Crop(left, top, *size, size)
        return Crop(*self._box(size, rng), size)

    def decode_size(self, crop: Crop) -> tuple[int, int]:
        """The least (width, height) at which the image may be decoded for this crop."""
        if self.augmentation.pad_crop:
            return crop.size
        height, width = self.preprocessing.image_size
        smaller = min(1.0, DECODING_GAP * max(width / crop.width, height / crop.height))
        return math.ceil(crop.size[0] * smaller), math.ceil(crop.size[1] * smaller)

    def __call__(self, image: Image.Image, rng: np.random.Generator, crop: Optional[Crop] = None) -> np.ndarray:
        """`crop`: what `draw_crop` drew from the same generator, before the image was decoded; else it is drawn now."""
        options = self.augmentation
        image = self._cut(self.preprocessing.in_its_mode(image), crop or self.draw_crop(image.size, rng))
        if rng.random() < options.hflip:
            image = ImageOps.mirror(image)
        if rng.random() < options.vflip:
            image = ImageOps.flip(image)
        if self.jitter is not None:
            image = _jitter(image, self.jitter, rng)
        if self.policy is not None:
            image = self.policy(image, rng)
        array = self.preprocessing.normalise(np.asarray(image))
        if rng.random() < options.re_prob:
            self._erase(array, rng)
        return array

    def _box(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
        """A crop of random area and aspect ratio (Szegedy et al., 2015, as in timm): left, top, width, height."""
        width, height = size
        low, high = np.log(self.augmentation.ratio)
        for _ in range(CROP_ATTEMPTS):
            area = width * height * rng.uniform(*self.augmentation.scale)
            ratio = math.exp(rng.uniform(low, high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
        # A very long image: the largest central crop of an allowed ratio.
        least, most = self.augmentation.ratio
        w, h = min(width, round(height * most)), min(height, round(width / least))
        return (width - w) // 2, (height - h) // 2, w, h

    def _cut(self, image: Image.Image, crop: Crop) -> Image.Image:
        """The crop at the network's input size; what lies outside of the image is black."""
        left, top, width, height, size = crop
        if image.size == size:
            return self._resize(image.crop((left, top, left + width, top + height)))
        times = round(size[0] / image.width)  # 2, 4 or 8; the smaller image's last pixels may lie half outside
        box = (left / times, top / times, (left + width) / times, (top + height) / times)
        return image.resize(self.preprocessing.image_size[::-1], self.filter, box)

    def _resize(self, image: Image.Image) -> Image.Image:
        return resize(image, self.preprocessing.image_size[::-1], self.filter)

    def _erase(self, array: np.ndarray, rng: np.random.Generator) -> None:
        """Replaces a random rectangle (Zhong et al., 2017) by normal noise a pixel, or by the mean colour."""
        channels, height, width = array.shape
        low, high = np.log(self.augmentation.re_ratio)
        for _ in range(CROP_ATTEMPTS):
            area = height * width * rng.uniform(*self.augmentation.re_scale)
            ratio = math.exp(rng.uniform(low, high))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h < height and w < width:
                top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
                noise = self.augmentation.re_value == "random"
                value = rng.standard_normal((channels, h, w), dtype=np.float32) if noise else np.float32(0)
                array[:, top : top + h, left : left + w] = value
                return


def _jitter(image: Image.Image, strengths: tuple[float, ...], rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation times random factors, in random order."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for i in rng.permutation(3):
        image = enhancers[i](image).enhance(rng.uniform(max(0, 1 - strengths[i]), 1 + strengths[i]))
    return image
