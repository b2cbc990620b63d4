"""From an image with its mask to the network's input, for training and for evaluation; and from logits to label maps.

Two recipes' pixels are had: MMSegmentation's (OpenCV's resize, colours as of its PhotoMetricDistortion) and cvnets'
(Pillow's resize, torchvision's colours). All that is random comes from the generator that is passed in. Images are RGB.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Callable, NamedTuple, Optional

import numpy as np
from PIL import Image, ImageFilter

from ..data import dense
from ..data.dense import IMAGENET_MEAN, IMAGENET_STD, AnyImage, Size
from ..data.transforms import FILTERS, Preprocessing
from ..errors import SettingError
from .datasets import SegmentationDataset
from .masks import IGNORE

ATTEMPTS = 10  # further crops that are drawn where one class has too much of it
LIBRARIES = ("opencv", "pillow")
ROWS = 32  # of logits that are resized at once: all classes of a large image would take gigabytes


def mmsegmentation_pixels(image_size: Size = (512, 512)) -> Preprocessing:
    """What networks of LSKA, VAN and MMSegmentation expect: ImageNet's mean and std."""
    return Preprocessing(image_size, 1.0, "bilinear", IMAGENET_MEAN, IMAGENET_STD)


def cvnets_pixels(image_size: Size = (512, 512)) -> Preprocessing:
    """What cvnets' networks expect: pixels / 255, no mean and std."""
    return Preprocessing(image_size, 1.0, "bilinear", (0.0,) * 3, (1.0,) * 3)


@dataclass(frozen=True)
class SegmentationAugmentation:
    """How training images vary. The defaults are MMSegmentation's for ADE20K.

    Attributes:
        scale: images are resized, their ratio kept, to at most this longer and shorter side, times
        ratio_range: a factor from .. to (drawn evenly).
        short_side: instead, the shorter side gets so many pixels from .. to, and the longer one at most `longest`
            (cvnets).
        cat_max_ratio: share of a crop's labelled pixels that one class should stay below; 1: any crop will do.
        hflip: probability of a horizontal flip.
        photometric: probability 1/2 each of changes in brightness, contrast, saturation, hue.
        rotate: degrees to either side; 0: none. blur: probability of a Gaussian blur of radius 0 to 1.
        library: whose pixels resizing and colours have: "opencv" (MMSegmentation's) or "pillow" (cvnets').

    Raises:
        SettingError: a value is out of range.
    """

    scale: tuple[int, int] = (2048, 512)
    ratio_range: tuple[float, float] = (0.5, 2.0)
    short_side: Optional[tuple[int, int]] = None
    longest: int = 1024
    cat_max_ratio: float = 0.75
    hflip: float = 0.5
    photometric: bool = True
    rotate: float = 0.0
    blur: float = 0.0
    library: str = "opencv"

    def __post_init__(self) -> None:
        for name in ("scale", "ratio_range", "short_side"):
            value = getattr(self, name)
            if value is None and name == "short_side":
                continue
            ordered = name == "scale" or value[0] <= value[1]
            if len(value) != 2 or min(value) <= 0 or not ordered:
                what = "longer and shorter side" if name == "scale" else "two positive numbers, from to"
                raise SettingError(f"{name} is {value}; expected {what}")
        if self.library not in LIBRARIES:
            raise SettingError(f"library is {self.library!r}; expected one of {', '.join(LIBRARIES)}")
        if not 0 < self.cat_max_ratio <= 1:
            raise SettingError(f"cat_max_ratio is {self.cat_max_ratio}; expected a share in (0, 1]")
        for name in ("hflip", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(f"{name} is {getattr(self, name)}; expected a probability from 0 to 1")
        if not 0 <= self.rotate <= 180:
            raise SettingError(f"rotate is {self.rotate}; expected degrees from 0 to 180")


# cvnets' deeplabv3_mobilevit.yaml for PASCAL VOC.
CVNETS_AUGMENTATION = SegmentationAugmentation(short_side=(256, 768), rotate=10.0, blur=0.5, library="pillow")


class SegmentationTrainTransform:
    """Random size, crop, flip, blur, colours, rotation: an image and its mask -> normalised arrays of fixed shapes.

    The order is MMSegmentation's. What the crop does not fill is 0 after normalising, and 255 (ignored) in the labels.

    Args:
        preprocessing: `image_size` is the crop's. augmentation: how images vary.
    """

    columns: tuple[str, ...] = ("image", "label")

    def __init__(
        self, preprocessing: Preprocessing, augmentation: SegmentationAugmentation = SegmentationAugmentation()
    ) -> None:  # noqa: B008
        self.preprocessing, self.augmentation = preprocessing, augmentation
        self.filter = FILTERS["bicubic"]  # of cvnets' training; its evaluation is bilinear

    def sample(
        self, dataset: SegmentationDataset, index: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Image `index` and its labels: (C, H, W) float32, (H, W) int32 with 255 for what is ignored.

        Raises:
            DataError: the image or the mask cannot be used.
        """
        return self(*dataset.load(index), rng)

    def __call__(self, image: AnyImage, labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The same of an image and its labels (H, W)."""
        options, crop_size = self.augmentation, self.preprocessing.image_size
        pixels, labels = self._resized(image, labels, self.draw_size(labels.shape, rng))
        top, left = self.draw_crop(labels, rng)
        part = slice(top, top + crop_size[0]), slice(left, left + crop_size[1])
        pixels, labels = pixels[part], labels[part]
        if rng.random() < options.hflip:
            pixels, labels = pixels[:, ::-1], labels[:, ::-1]
        if options.blur and rng.random() < options.blur:
            radius = ImageFilter.GaussianBlur(rng.random())
            pixels = np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).filter(radius))
        if options.photometric and options.library == "opencv":
            pixels = dense.photometric_distortion(pixels, rng)
        elif options.photometric:
            pixels = np.asarray(dense.pillow_distortion(Image.fromarray(np.ascontiguousarray(pixels)), rng))
        if options.rotate:
            pixels, labels = self._rotated(pixels, labels, rng.uniform(-options.rotate, options.rotate))
        normalised = dense.network_pixels(pixels, self.preprocessing)
        return dense.pad(normalised, crop_size, 0), dense.pad(np.ascontiguousarray(labels), crop_size, IGNORE)

    def draw_size(self, size: Sequence[int], rng: np.random.Generator) -> Size:
        """The size to which an image of (height, width) is resized."""
        options = self.augmentation
        if options.short_side is not None:
            shorter = int(rng.integers(options.short_side[0], options.short_side[1], endpoint=True))
            factor = min(shorter / min(size), options.longest / max(size))
            height, width = (max(1, int(side * factor)) for side in size)  # cvnets does not round
            return height, width
        ratio = rng.uniform(*options.ratio_range)
        longer, shorter = (max(1, int(side * ratio)) for side in options.scale)
        return dense.keep_ratio_size((size[0], size[1]), (longer, shorter))

    def draw_crop(self, labels: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
        """(top, left) of a crop in which no class has `cat_max_ratio` of the labelled pixels, or of the last drawn."""
        (height, width), (crop_height, crop_width) = labels.shape, self.preprocessing.image_size

        def draw() -> tuple[int, int]:
            top = int(rng.integers(max(height - crop_height, 0) + 1))
            return top, int(rng.integers(max(width - crop_width, 0) + 1))

        top, left = draw()
        if self.augmentation.cat_max_ratio == 1:
            return top, left
        for _ in range(ATTEMPTS):
            counts = np.bincount(labels[top : top + crop_height, left : left + crop_width].ravel(), minlength=IGNORE)
            counts = counts[:IGNORE]
            if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < self.augmentation.cat_max_ratio:
                break
            top, left = draw()
        return top, left

    def _resized(self, image: AnyImage, labels: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
        if self.augmentation.library == "opencv":
            return dense.resize_linear(dense.rgb_array(image), size), dense.resize_nearest(labels, size)
        pixels = np.asarray(dense.resize_pillow(Image.fromarray(dense.rgb_array(image)), size, self.filter))
        small = Image.fromarray(labels.astype(np.uint8))  # labels are at most 255
        resized = dense.resize_pillow(small, size, Image.Resampling.NEAREST)
        return pixels, np.asarray(resized).astype(np.int32)

    def _rotated(self, pixels: np.ndarray, labels: np.ndarray, degrees: float) -> tuple[np.ndarray, np.ndarray]:
        """Both, turned about the middle of the crop; what was outside is black, and ignored."""
        size = self.preprocessing.image_size
        pixels = dense.pad(pixels.transpose(2, 0, 1), size, 0).transpose(1, 2, 0)
        image = Image.fromarray(np.ascontiguousarray(pixels)).rotate(degrees, Image.Resampling.BILINEAR, fillcolor=0)
        small = Image.fromarray(dense.pad(labels, size, IGNORE).astype(np.uint8))
        turned = small.rotate(degrees, Image.Resampling.NEAREST, fillcolor=IGNORE)
        return np.asarray(image), np.asarray(turned).astype(np.int32)


class EvaluationImage(NamedTuple):
    """A network's input, and what brings its output back.

    Attributes:
        pixels: (C, h, w) float32; size: (height, width) of the image as it was.
    """

    pixels: np.ndarray
    size: Size


@dataclass(frozen=True)
class EvaluationSize:
    """To which size an image is brought for evaluation; at most one of `scale` and `fixed`, else it stays.

    Attributes:
        scale: keep the ratio, at most this longer and shorter side. (2048, 512): MMSegmentation's for ADE20K.
        size_divisor: then up to multiples of this, by a second resize (VAN: 32); 1: no second one.
        fixed: (height, width), the ratio is lost (cvnets' validation).
        library: whose resize: "opencv" (MMSegmentation's) or "pillow" (cvnets', with the preprocessing's filter).

    Raises:
        SettingError: a value is out of range.
    """

    scale: Optional[tuple[int, int]] = (2048, 512)
    size_divisor: int = 1
    fixed: Optional[Size] = None
    library: str = "opencv"

    def __post_init__(self) -> None:
        if self.scale is not None and self.fixed is not None:
            raise SettingError(f"scale is {self.scale} and fixed is {self.fixed}; expected one of them")
        for name in ("scale", "fixed"):
            value = getattr(self, name)
            if value is not None and (len(value) != 2 or min(value) < 1):
                raise SettingError(f"{name} is {value}; expected two numbers of pixels")
        if self.size_divisor < 1:
            raise SettingError(f"size_divisor is {self.size_divisor}; expected at least 1")
        if self.library not in LIBRARIES:
            raise SettingError(f"library is {self.library!r}; expected one of {', '.join(LIBRARIES)}")

    def sizes(self, size: Size, ratio: float = 1.0) -> list[Size]:
        """The sizes that an image of (height, width) gets, one after the other."""
        if self.fixed is not None:
            height, width = (max(1, int(side * ratio)) for side in self.fixed)
            sizes = [(height, width)]
        elif self.scale is not None:
            longer, shorter = (max(1, int(side * ratio)) for side in self.scale)
            sizes = [dense.keep_ratio_size(size, (longer, shorter))]
        else:
            height, width = (max(1, int(side * ratio + 0.5)) for side in size)
            sizes = [(height, width)]
        return [*sizes, dense.multiple_size(sizes[-1], self.size_divisor)]


class SegmentationEvalTransform:
    """Resize and normalise: an image -> the network's input, of a size that depends on the image's.

    Args:
        preprocessing: mean and std (`image_size` is the training's). evaluation_size: to which size images are brought.
    """

    def __init__(self, preprocessing: Preprocessing, evaluation_size: EvaluationSize = EvaluationSize()) -> None:  # noqa: B008
        self.preprocessing, self.evaluation_size = preprocessing, evaluation_size

    def sample(self, dataset: SegmentationDataset, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image `index`, (C, h, w) float32, and its mask at its own size, (H, W) int32.

        Raises:
            DataError: the image or the mask cannot be used.
        """
        image, mask = dataset.load(index)
        return self(image).pixels, mask

    def __call__(self, image: AnyImage, ratio: float = 1.0, flip: bool = False) -> EvaluationImage:
        """An image, as a file, a Pillow image or an array (H, W, 3) in the order RGB.

        Args:
            ratio: of the size that it would have; flip: from left to right. See `label_map` for the way back.
        """
        pixels = dense.rgb_array(image)
        size = pixels.shape[0], pixels.shape[1]
        for target in self.evaluation_size.sizes(size, ratio):
            pixels = self._resized(pixels, target)
        if flip:
            pixels = pixels[:, ::-1]
        return EvaluationImage(dense.network_pixels(pixels, self.preprocessing), size)

    def _resized(self, pixels: np.ndarray, size: Size) -> np.ndarray:
        if self.evaluation_size.library == "opencv":
            return dense.resize_linear(pixels, size)
        resample = FILTERS[self.preprocessing.interpolation]
        return np.asarray(dense.resize_pillow(Image.fromarray(pixels), size, resample))

    def variants(
        self, image: AnyImage, ratios: Sequence[float] = (1.0,), flip: bool = False
    ) -> Iterator[tuple[EvaluationImage, bool]]:
        """The image at several sizes, each also flipped, and whether it is."""
        pixels = dense.rgb_array(image)
        for ratio in ratios:
            for flipped in (False, True)[: 1 + flip]:
                yield self(pixels, ratio, flipped), flipped


# ----------------------------------------------------------------------------------------- logits


def _places(old: int, new: int, align_corners: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of bilinear interpolation: both neighbours of each new place, and the share of the second; PyTorch's."""
    if align_corners:
        step = np.float32(old - 1) / np.float32(new - 1) if new > 1 else np.float32(0)
        place = step * np.arange(new, dtype=np.float32)
    else:
        step = np.float32(old) / np.float32(new)
        place = np.maximum(step * (np.arange(new, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), 0)
    first = np.minimum(place.astype(np.int64), old - 1)
    return first, np.minimum(first + 1, old - 1), place - first.astype(np.float32)


def _bands(logits: np.ndarray, size: Size, align_corners: bool) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows of the resized logits, some at a time: (which, (C, rows, W) float32)."""
    tops, bottoms, down = _places(logits.shape[1], size[0], align_corners)
    lefts, rights, across = _places(logits.shape[2], size[1], align_corners)
    for first in range(0, size[0], ROWS):
        rows = slice(first, first + ROWS)
        upper, lower = logits[:, tops[rows]], logits[:, bottoms[rows]]
        share = down[rows][None, :, None]
        band = upper * (1 - share) + lower * share
        yield rows, band[:, :, lefts] * (1 - across) + band[:, :, rights] * across


def resize_logits(logits: np.ndarray, size: Size, align_corners: bool = False) -> np.ndarray:
    """(C, h, w) float32 -> (C, H, W), bilinear, as PyTorch's interpolate but for rounding."""
    if logits.shape[1:] == tuple(size):
        return logits
    result = np.empty((len(logits), *size), np.float32)
    for rows, band in _bands(logits, size, align_corners):
        result[:, rows] = band
    return result


def label_map(logits: np.ndarray, size: Size, align_corners: bool = False, flipped: bool = False) -> np.ndarray:
    """The class of every pixel of the image as it was: (C, h, w) logits -> (H, W) int32.

    Args:
        size: of the image (`EvaluationImage.size`). flipped: the logits are of the flipped image.
    """
    logits = logits[:, :, ::-1] if flipped else logits
    if logits.shape[1:] == tuple(size):
        return logits.argmax(0).astype(np.int32)
    labels = np.empty(size, np.int32)
    for rows, band in _bands(logits, size, align_corners):
        labels[rows] = band.argmax(0)
    return labels


def add_probabilities(
    total: Optional[np.ndarray], logits: np.ndarray, size: Size, align_corners: bool = False, flipped: bool = False
) -> np.ndarray:
    """The sum of the classes' probabilities over several variants of an image: (C, H, W) float32, `total` or a new one.

    Its argmax is what MMSegmentation predicts with several scales and flips. It takes 4 bytes a class and pixel.
    """
    logits = logits[:, :, ::-1] if flipped else logits
    total = np.zeros((len(logits), *size), np.float32) if total is None else total
    for rows, band in _bands(logits, size, align_corners):
        band -= band.max(0)
        np.exp(band, out=band)
        band /= band.sum(0)
        total[:, rows] += band
    return total


def sliding_windows(size: Size, window: Size, stride: Size) -> list[tuple[int, int]]:
    """(top, left) of windows that cover an image, MMSegmentation's: the last of a row or column ends with it."""
    if min(stride) < 1 or min(window) < 1:
        raise SettingError(f"a window of {window} with stride {stride}; expected at least 1 pixel")
    if stride[0] > window[0] or stride[1] > window[1]:
        raise SettingError(
            f"stride {stride} is more than the window's {window}: pixels between them would have no class"
        )
    tops, lefts = (
        [min(i * step, max(side - part, 0)) for i in range(max(side - part + step - 1, 0) // step + 1)]
        for side, part, step in zip(size, window, stride)
    )
    return [(top, left) for top in tops for left in lefts]


def slide(pixels: np.ndarray, predict: Callable[[np.ndarray], np.ndarray], window: Size, stride: Size) -> np.ndarray:
    """The mean of the logits of all windows that see a pixel: (C, h, w) -> (classes, h, w) float32.

    Args:
        predict: from (1, C, *window), always of that size, to its logits (1, classes, *window). A smaller image is
            padded with zeros at the right and at the bottom.
    """
    height, width = pixels.shape[1:]
    padded = dense.pad(pixels, (max(height, window[0]), max(width, window[1])), 0)
    total, seen = None, np.zeros(padded.shape[1:], np.float32)
    for top, left in sliding_windows((padded.shape[1], padded.shape[2]), window, stride):
        part = slice(None), slice(top, top + window[0]), slice(left, left + window[1])
        logits = predict(np.ascontiguousarray(padded[part])[None])[0]
        if total is None:
            total = np.zeros((len(logits), *padded.shape[1:]), np.float32)
        total[part] += logits
        seen[part[1:]] += 1
    assert total is not None
    return (total / seen)[:, :height, :width]
