"""Pixels of segmentation and detection: resized as by OpenCV; distorted, normalised and padded as by OpenMMLab.

Images are (H, W, 3) uint8 arrays in the order RGB; sizes are (height, width) in pixels.

Where the results are equal to the bit: `resize_linear` and `resize_nearest` to OpenCV 4 and 5; `normalise` to mmcv;
the colours of `photometric_distortion` to OpenCV 4, but for the last few pixels of a row (see `hsv_to_rgb`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Union

import numpy as np
from PIL import Image, ImageEnhance

from ..errors import DataError, SettingError
from .images import as_rgb, read_image
from .transforms import MAX_RESIZED_PIXELS, Preprocessing, resize

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # OpenMMLab's 123.675 ... on a scale of 0..1
HUES = 180  # OpenCV's hue of 8 bits counts half degrees
AT_ONCE = 8192  # pixels whose intermediate results stay in the processor's cache

Size = tuple[int, int]  # height, width


AnyImage = Union[str, Path, Image.Image, np.ndarray]


def rgb_array(image: AnyImage, exif_orientation: bool = False) -> np.ndarray:
    """An image as (H, W, 3) uint8 in the order RGB: a file, a Pillow image of any kind, or an array.

    Args:
        image: arrays are uint8, (H, W, 3) in the order RGB (not OpenCV's BGR), (H, W) or (H, W, 1) for grey, or
            (H, W, 4) with transparency, which is dropped.

    Raises:
        DataError: a file cannot be read, a Pillow image does not say which number is white, or an array is of another
            kind.
    """
    if isinstance(image, (str, Path)):
        return np.asarray(read_image(image, exif_orientation=exif_orientation))
    if isinstance(image, Image.Image):
        try:
            return np.asarray(as_rgb(image))
        except ValueError as error:
            raise DataError(f"an image of Pillow's kind {image.mode}: {error}") from error
    image = np.asarray(image)
    if image.ndim == 2:
        image = image[..., None]
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3, 4) or not image.size:
        raise DataError(
            f"an image of the shape {image.shape} and kind {image.dtype}; expected (height, width, 3), uint8, in the "
            f"order RGB (of OpenCV's BGR: image[..., ::-1])"
        )
    return np.repeat(image, 3, 2) if image.shape[2] == 1 else image[..., :3]


def keep_ratio_size(size: Size, scale: Size) -> Size:
    """The largest size within `scale` that has the ratio of `size`, as mmcv's `rescale_size` rounds it.

    Args:
        size: (height, width) of the image.
        scale: the longer side is at most its larger number, and the shorter one at most its smaller: (1333, 800).
    """
    factor = min(max(scale) / max(size), min(scale) / min(size))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


def short_side_size(size: Size, shorter: int, longest: int) -> Size:
    """The size at which the shorter side is `shorter`, or less where the longer one would be more than `longest`."""
    return keep_ratio_size(size, (longest, shorter) if longest >= shorter else (longest, longest))


def multiple_size(size: Size, multiple: int) -> Size:
    """Both sides, up to multiples of a number."""
    return -(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple


def resize_linear(image: np.ndarray, size: Size) -> np.ndarray:
    """(H, W, 3) uint8 to another size, to the bit as OpenCV's bilinear one: without smoothing when it gets smaller.

    Raises:
        SettingError: `size` has more than `MAX_RESIZED_PIXELS`.
    """
    _check_size(size)
    if image.shape[:2] == tuple(size):
        return image
    return _opencv_resize(tuple(size))(np.ascontiguousarray(image))


@lru_cache(maxsize=4096)
def _opencv_resize(size: Size) -> Any:
    from mindspore.dataset import vision  # only now: it takes seconds

    return vision.Resize(list(size), vision.Inter.LINEAR)


def resize_nearest(labels: np.ndarray, size: Size) -> np.ndarray:
    """(H, W) of any kind to another size, to the bit as OpenCV's nearest neighbour (floor, not the closest centre)."""
    _check_size(size)
    if labels.shape[:2] == tuple(size):
        return labels
    rows, columns = (_nearest(old, new) for old, new in zip(labels.shape, size))
    return np.take(np.take(labels, rows, 0), columns, 1)


def _nearest(old: int, new: int) -> np.ndarray:
    """The place that each new one takes; in OpenCV's roundings: the inverse of a quotient, times the place."""
    return np.minimum(np.floor(np.arange(new) * (1.0 / (new / old))).astype(np.int64), old - 1)


def resize_pillow(image: Image.Image, size: Size, resample: int = Image.Resampling.BILINEAR) -> Image.Image:
    """A Pillow image to another size by Pillow's own filter, which smooths when it gets smaller, as cvnets does it."""
    _check_size(size)
    return resize(image, (size[1], size[0]), resample)


def _check_size(size: Size) -> None:
    if min(size) < 1 or size[0] * size[1] > MAX_RESIZED_PIXELS:
        raise SettingError(f"an image of {size[0]}x{size[1]} pixels: expected 1 to {MAX_RESIZED_PIXELS:,} pixels")


def normalise(image: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """(H, W, C) uint8 -> (C, H, W) float32: to the bit as mmcv's `imnormalize`.

    Args:
        mean, std: of the channels, on a scale of 0 to 1 (`mindska.data.Preprocessing` has them so). Means 0 and stds 1
            are a division by 255 alone.
    """
    table = _pixel_table(tuple(map(float, mean)), tuple(map(float, std)))
    result = np.empty((image.shape[2], *image.shape[:2]), np.float32)
    for channel, values in enumerate(table):
        np.take(values, image[:, :, channel], out=result[channel], mode="clip")
    return result


def network_pixels(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """(H, W, 3) uint8 -> (C, H, W) float32, of one channel where the network takes grey; see `normalise`."""
    if preprocessing.in_channels == 1:
        image = np.asarray(Image.fromarray(np.ascontiguousarray(image)).convert("L"))[..., None]
    return normalise(image, preprocessing.mean, preprocessing.std)


@lru_cache(maxsize=64)
def _pixel_table(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """(C, 256) float32: what becomes of each value: a subtraction in float32, a product in float64, then float32."""
    values = np.arange(256, dtype=np.float32)
    # 0.485 x 255 is 123.675 but for the last bit of float64, which could decide a rounding.
    means, stds = (np.round(np.asarray(each, np.float64) * 255, 9) for each in (mean, std))
    shifted = values[None] - means.astype(np.float32)[:, None]
    return (shifted.astype(np.float64) * (1 / stds)[:, None]).astype(np.float32)


def pad(array: np.ndarray, size: Size, value: float) -> np.ndarray:
    """(..., h, w) -> (..., H, W): at the right and at the bottom; itself where it is as large."""
    more = [size[0] - array.shape[-2], size[1] - array.shape[-1]]
    if more == [0, 0]:
        return array
    if min(more) < 0:
        raise SettingError(f"{array.shape[-2]}x{array.shape[-1]} pixels cannot be padded to {size[0]}x{size[1]}")
    return np.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, more[0]), (0, more[1])], constant_values=value)


# ----------------------------------------------------------------------------------------- colours


def photometric_distortion(
    image: np.ndarray,
    rng: np.random.Generator,
    brightness: int = 32,
    contrast: tuple[float, float] = (0.5, 1.5),
    saturation: tuple[float, float] = (0.5, 1.5),
    hue: int = 18,
) -> np.ndarray:
    """(H, W, 3) uint8 with other colours: each of four changes has probability 1/2, as in MMSegmentation.

    Brightness, then contrast (or contrast at the end, with probability 1/2), saturation, hue. After each change the
    pixels are 8 bits again; what is beyond 0..255 is cut, and fractions are dropped.

    Args:
        brightness: largest shift; contrast, saturation: factors, from to; hue: largest shift in half degrees.
    """
    if rng.random() < 0.5:
        image = _scaled(image, 1.0, rng.uniform(-brightness, brightness))
    contrast_first = rng.random() < 0.5
    if contrast_first and rng.random() < 0.5:
        image = _scaled(image, rng.uniform(*contrast), 0.0)
    if rng.random() < 0.5:
        hsv = rgb_to_hsv(image)
        hsv[..., 1] = _scaled(hsv[..., 1], rng.uniform(*saturation), 0.0)
        image = hsv_to_rgb(hsv)
    if rng.random() < 0.5:
        hsv = rgb_to_hsv(image)
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + int(rng.integers(-hue, hue))) % HUES
        image = hsv_to_rgb(hsv)
    if not contrast_first and rng.random() < 0.5:
        image = _scaled(image, rng.uniform(*contrast), 0.0)
    return image


def pillow_distortion(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The changes of cvnets' PhotometricDistort to an RGB image, each with probability 1/2, with torchvision's pixels.

    Brightness by 0.875 to 1.125, contrast and saturation by 0.5 to 1.5, hue by up to 0.05 of its circle, in the order
    of `photometric_distortion`; then the channels change places.
    """

    def enhanced(image: Image.Image, how: type, low: float, high: float) -> Image.Image:
        return how(image).enhance(rng.uniform(low, high))

    if rng.random() < 0.5:
        image = enhanced(image, ImageEnhance.Brightness, 0.875, 1.125)
    contrast_first = rng.random() < 0.5
    if contrast_first and rng.random() < 0.5:
        image = enhanced(image, ImageEnhance.Contrast, 0.5, 1.5)
    if rng.random() < 0.5:
        image = enhanced(image, ImageEnhance.Color, 0.5, 1.5)
    if rng.random() < 0.5:
        hue, *others = image.convert("HSV").split()
        shift = int(rng.uniform(-0.05, 0.05) * 255)
        turned = Image.fromarray(np.asarray(hue) + np.uint8(shift % 256))
        image = Image.merge("HSV", (turned, *others)).convert("RGB")
    if not contrast_first and rng.random() < 0.5:
        image = enhanced(image, ImageEnhance.Contrast, 0.5, 1.5)
    if rng.random() < 0.5:
        channels = image.split()
        image = Image.merge("RGB", [channels[i] for i in rng.permutation(3)])
    return image


def _scaled(channel: np.ndarray, factor: float, shift: float) -> np.ndarray:
    """Of uint8: times, plus, cut to 0..255, fractions dropped; in float32."""
    values = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(shift)
    return np.clip(values, 0, 255).astype(np.uint8)[channel]


@lru_cache(maxsize=1)
def _divisions() -> tuple[np.ndarray, np.ndarray]:
    """OpenCV's 255 / i and 30 / i in fixed point of 12 bits; 0 for i = 0."""
    i = np.arange(1, 256, dtype=np.float64)
    return tuple(  # type: ignore[return-value]
        np.concatenate(([0], np.rint((number << 12) / (i * parts)))).astype(np.int32)
        for number, parts in ((255, 1), (HUES, 6))
    )


def rgb_to_hsv(image: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 -> the same: hue in half degrees, saturation and value of 255; OpenCV's integers, to the bit."""
    saturations, hues = _divisions()
    red, green, blue = (image[..., i].astype(np.int32) for i in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    hue = np.where(
        value == red,
        green - blue,
        np.where(value == green, blue - red + 2 * spread, red - green + 4 * spread),
    )
    hue = (hue * hues[spread] + (1 << 11)) >> 12
    hsv = np.empty(image.shape, np.uint8)
    hsv[..., 0] = hue + HUES * (hue < 0)
    hsv[..., 1] = (spread * saturations[value] + (1 << 11)) >> 12
    hsv[..., 2] = value
    return hsv


@lru_cache(maxsize=1)
def _hue_sectors() -> tuple[np.ndarray, np.ndarray]:
    """Of each hue: which of (v, p, q, t) are its red, green and blue; and what is left of the sixth, in float32."""
    hue = np.arange(256, dtype=np.float32) * np.float32(6 / HUES)
    sector = np.trunc(hue)
    which = np.array([[0, 3, 1], [2, 0, 1], [1, 0, 3], [1, 2, 0], [3, 1, 0], [0, 1, 2]])
    return which[sector.astype(np.int64) % 6], hue - sector


def hsv_to_rgb(hsv: np.ndarray) -> np.ndarray:
    """The way back from `rgb_to_hsv`: to the bit as OpenCV's vector code, which drops fractions.

    (Where a row is no multiple of its vectors, OpenCV rounds the last pixels instead: they may be one higher there.)
    """
    which, rest = _hue_sectors()
    flat = hsv.reshape(-1, 3)
    rgb = np.empty_like(flat)
    one, scale = np.float32(1), np.float32(1 / 255)
    for first in range(0, len(flat), AT_ONCE):
        hue = flat[first : first + AT_ONCE, 0]
        saturation, value = (flat[first : first + AT_ONCE, i].astype(np.float32) * scale for i in (1, 2))
        parts = np.empty((4, len(hue)), np.float32)  # v, p, q, t
        parts[0] = value
        parts[1] = value * (one - saturation)
        for place, share in ((2, rest[hue]), (3, one - rest[hue])):
            # A fused multiply-add, which rounds once.
            parts[place] = value * (1 - saturation.astype(np.float64) * share).astype(np.float32)
        parts *= np.float32(255)
        places = which[hue] * len(hue) + np.arange(len(hue))[:, None]
        rgb[first : first + AT_ONCE] = parts.astype(np.uint8).ravel()[places]
    return rgb.reshape(hsv.shape)
