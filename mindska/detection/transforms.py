"""From an image with its objects to the network's input, for training and for evaluation.

Two recipes' pixels are had: MMDetection's (ratio kept, OpenCV's resize, padded at right and bottom) and cvnets' for SSD
(a fixed size, Pillow's bicubic resize, / 255). All that is random comes from the generator that is passed in. Images
are RGB, sizes (height, width), boxes x1, y1, x2, y2 in pixels.

A graph is compiled for each shape, so training pads images to a few sizes (buckets), and objects to a maximum: boxes of
zeros with the label -1 fill up. Of an image with more objects so many are drawn anew for each sample.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Optional

import numpy as np
from PIL import Image

from ..data import dense
from ..data.dense import IMAGENET_MEAN, IMAGENET_STD, AnyImage, Size
from ..data.transforms import FILTERS, Preprocessing
from ..errors import SettingError
from .coco import CocoDataset
from .masks import pack
from .nms import intersections
from .postprocess import Detections

log = logging.getLogger("mindska")

DIVISOR = 32  # of the sides of padded images
MAX_BOXES = 100
PADDING_LABEL = -1
LEAST_CROP = 0.3  # of the image's sides, in SSD's crops


def mmdetection_pixels(image_size: Size = (800, 1333)) -> Preprocessing:
    """What networks of LSKA, VAN and MMDetection expect: ImageNet's mean and std; `image_size` is the largest, the
    shorter side before the longer."""
    return Preprocessing(image_size, 1.0, "bilinear", IMAGENET_MEAN, IMAGENET_STD)


def ssd_pixels(image_size: Size = (320, 320)) -> Preprocessing:
    """What cvnets' SSD expects: a fixed size, pixels / 255, no mean and std."""
    return Preprocessing(image_size, 1.0, "bicubic", (0.0,) * 3, (1.0,) * 3)


@dataclass(frozen=True)
class Truth:
    """The objects of an image in training: boxes (n, 4) float32, labels (n,) int32, and the annotations' numbers."""

    boxes: np.ndarray
    labels: np.ndarray
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, which: np.ndarray) -> Truth:
        return Truth(self.boxes[which], self.labels[which], self.numbers[which])


def truth_of(dataset: CocoDataset, index: int, rng: np.random.Generator, max_boxes: int) -> Truth:
    """The objects of image `index`, without crowds; of more than `max_boxes` so many are drawn."""
    objects = dataset.objects(index)
    truth = Truth(objects.boxes, objects.labels, objects.numbers).take(~objects.crowd)
    if len(truth) > max_boxes:
        truth = truth.take(np.sort(rng.choice(len(truth), max_boxes, replace=False)))
    return truth


def check_max_boxes(dataset: CocoDataset, max_boxes: int) -> int:
    """How many images have more objects than `max_boxes`; it is said."""
    counts = np.bincount(dataset.objects_of[~dataset.crowd], minlength=1)
    more = int((counts > max_boxes).sum())
    if more:
        log.warning(
            "%s: %s images have more than max_boxes (%s) objects, up to %s: so many are drawn each time",
            dataset.split, f"{more:,}", max_boxes, int(counts.max()),
        )  # fmt: skip
    return more


def padded_truth(truth: Truth, max_boxes: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (max_boxes, 4) float32 and labels (max_boxes,) int32, filled up with zeros and -1."""
    boxes, labels = np.zeros((max_boxes, 4), np.float32), np.full(max_boxes, PADDING_LABEL, np.int32)
    boxes[: len(truth)], labels[: len(truth)] = truth.boxes, truth.labels
    return boxes, labels


def without_padding(boxes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The objects themselves, of a sample's boxes and labels."""
    there = labels != PADDING_LABEL
    return boxes[there], labels[there]


def flip_boxes(boxes: np.ndarray, width: int) -> np.ndarray:
    """The boxes of the mirrored image."""
    return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)


def scaled_boxes(boxes: np.ndarray, old: Size, new: Size) -> np.ndarray:
    """Boxes float32 of an image that is resized, within it."""
    factors = np.asarray([new[1] / old[1], new[0] / old[0]] * 2, np.float32)
    return np.clip(boxes * factors, 0, np.asarray([new[1], new[0]] * 2, np.float32))


@dataclass(frozen=True)
class DetectionAugmentation:
    """How training images vary.

    Attributes:
        scales: (longer, shorter) sides in pixels that images are resized to, their ratio kept; one of them is drawn.
        hflip: probability of a horizontal flip.
        buckets: sizes (height, width) that images are padded to; default: that of the largest scale, lying and
            standing. An image goes to the smallest that holds it at the largest scale.
        max_boxes: objects of a sample.

    Raises:
        SettingError: a value is out of range.
    """

    scales: tuple[tuple[int, int], ...] = ((1333, 800),)
    hflip: float = 0.5
    buckets: tuple[Size, ...] = ()
    max_boxes: int = MAX_BOXES

    def __post_init__(self) -> None:
        if not self.scales or any(len(scale) != 2 or min(scale) < 1 for scale in self.scales):
            raise SettingError(f"scales is {self.scales}; expected pairs of sides in pixels, such as (1333, 800)")
        if not 0 <= self.hflip <= 1:
            raise SettingError(f"hflip is {self.hflip}; expected a probability from 0 to 1")
        if self.max_boxes < 1:
            raise SettingError(f"max_boxes is {self.max_boxes}; expected at least 1")
        if not self.buckets:
            longer = dense.multiple_size((max(map(min, self.scales)), max(map(max, self.scales))), DIVISOR)
            object.__setattr__(self, "buckets", tuple(dict.fromkeys((longer, longer[::-1]))))
        if any(side % DIVISOR or side < 1 for bucket in self.buckets for side in bucket):
            raise SettingError(f"buckets is {self.buckets}; expected sizes whose sides are multiples of {DIVISOR}")

    def bucket(self, size: Size) -> Size:
        """The padded size of an image of this size, whichever scale is drawn.

        Raises:
            SettingError: no bucket holds it.
        """
        sizes = [dense.keep_ratio_size(size, scale) for scale in self.scales]
        height, width = (max(side) for side in zip(*sizes))
        fitting = [one for one in self.buckets if one[0] >= height and one[1] >= width]
        if not fitting:
            raise SettingError(
                f"an image of {size[0]}x{size[1]} pixels (height x width) becomes {height}x{width}, which none of the "
                f"buckets {self.buckets} holds"
            )
        return min(fitting, key=lambda one: one[0] * one[1])


class DetectionTrainTransform:
    """MMDetection's training: one of several scales with the ratio kept, flip, normalise, pad to the image's bucket.

    Args:
        masks: whether samples have the objects' masks.
    """

    def __init__(
        self,
        preprocessing: Optional[Preprocessing] = None,
        augmentation: Optional[DetectionAugmentation] = None,
        masks: bool = False,
    ) -> None:
        self.preprocessing = preprocessing or mmdetection_pixels()
        self.augmentation = augmentation or DetectionAugmentation(
            scales=((max(self.preprocessing.image_size), min(self.preprocessing.image_size)),)
        )
        self.masks = masks

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of a sample's arrays."""
        return ("image", "boxes", "labels", "image_shape", *(("masks",) if self.masks else ()))

    def bucket(self, dataset: CocoDataset, index: int) -> Size:
        """The padded size of image `index`: a batch is of one bucket."""
        width, height = dataset.widths_heights[index].tolist()
        return self.augmentation.bucket((height, width))

    def sample(self, dataset: CocoDataset, index: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Image `index` with its objects.

        Returns:
            image (3, H, W) float32 of the bucket's size; boxes (max_boxes, 4) float32 and labels (max_boxes,) int32, -1
            for what fills up; image_shape (2,) int32, height and width before padding; with `masks`, those as bits
            (max_boxes, H, W / 8) uint8, as of `mindska.detection.masks`: a hundredth of a gigabyte instead of a tenth.

        Raises:
            DataError: the image or a mask cannot be read.
        """
        options, image = self.augmentation, dense.rgb_array(dataset.load(index))
        old = image.shape[0], image.shape[1]
        truth = truth_of(dataset, index, rng, options.max_boxes)
        scale = options.scales[rng.integers(len(options.scales)) if len(options.scales) > 1 else 0]
        size, padded, flip = dense.keep_ratio_size(old, scale), options.bucket(old), rng.random() < options.hflip
        image = dense.resize_linear(image, size)
        boxes = scaled_boxes(truth.boxes, old, size)
        if flip:
            image, boxes = image[:, ::-1], flip_boxes(boxes, size[1])
        sample = (
            dense.pad(dense.network_pixels(image, self.preprocessing), padded, 0),
            *padded_truth(Truth(boxes, truth.labels, truth.numbers), options.max_boxes),
            np.asarray(size, np.int32),
        )
        if not self.masks:
            return sample
        bits = np.zeros((options.max_boxes, padded[0], padded[1] // 8), np.uint8)
        for row, number in zip(bits, truth.numbers):
            mask = dense.resize_nearest(dataset.mask(number), size)
            row[:] = pack(dense.pad(mask[:, ::-1] if flip else mask, padded, 0))
        return (*sample, bits)


@dataclass(frozen=True)
class SsdAugmentation:
    """How SSD's training images vary.

    Attributes:
        iou_thresholds: one is drawn: 0 leaves the image as it is, else a crop has at least this IoU with an object.
        trials: crops that are drawn before another threshold is.
        aspect_ratio: height / width of a crop, from to.
        photometric: whether brightness, contrast, saturation and hue change.
        hflip, max_boxes: as of `DetectionAugmentation`.
    """

    iou_thresholds: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    trials: int = 40
    aspect_ratio: tuple[float, float] = (0.5, 2.0)
    photometric: bool = True
    hflip: float = 0.5
    max_boxes: int = MAX_BOXES

    def __post_init__(self) -> None:
        if 0.0 not in self.iou_thresholds or not all(0 <= threshold <= 1 for threshold in self.iou_thresholds):
            raise SettingError(
                f"iou_thresholds is {self.iou_thresholds}; expected numbers from 0 to 1, and 0 among them: "
                f"the image as it is, where no crop is found"
            )
        if not 0 < self.aspect_ratio[0] <= self.aspect_ratio[1]:
            raise SettingError(f"aspect_ratio is {self.aspect_ratio}; expected two positive numbers, from to")
        if not 0 <= self.hflip <= 1:
            raise SettingError(f"hflip is {self.hflip}; expected a probability from 0 to 1")
        if self.trials < 1 or self.max_boxes < 1:
            raise SettingError(f"trials is {self.trials} and max_boxes is {self.max_boxes}; expected at least 1")


class SsdTrainTransform:
    """SSD's training as cvnets': a crop by IoU, colours, flip, a fixed size, normalise."""

    columns: tuple[str, ...] = ("image", "boxes", "labels", "image_shape")

    def __init__(
        self, preprocessing: Optional[Preprocessing] = None, augmentation: Optional[SsdAugmentation] = None
    ) -> None:
        self.preprocessing, self.augmentation = preprocessing or ssd_pixels(), augmentation or SsdAugmentation()

    def bucket(self, dataset: CocoDataset, index: int) -> Size:
        """The size of every sample."""
        return self.preprocessing.image_size

    def sample(self, dataset: CocoDataset, index: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Image `index` with its objects: as of `DetectionTrainTransform`, boxes in pixels of the input.

        Raises:
            DataError: the image cannot be read.
        """
        options, image = self.augmentation, dense.rgb_array(dataset.load(index))
        truth = truth_of(dataset, index, rng, options.max_boxes)
        image, truth = self.cropped(image, truth, rng)
        if options.photometric:
            image = dense.photometric_distortion(image, rng)
        boxes = truth.boxes
        if rng.random() < options.hflip:
            image, boxes = image[:, ::-1], flip_boxes(boxes, image.shape[1])
        size = self.preprocessing.image_size
        boxes = scaled_boxes(boxes, (image.shape[0], image.shape[1]), size)
        resized = fixed_size(image, self.preprocessing)
        return (
            dense.network_pixels(resized, self.preprocessing),
            *padded_truth(Truth(boxes, truth.labels, truth.numbers), options.max_boxes),
            np.asarray(size, np.int32),
        )

    def cropped(self, image: np.ndarray, truth: Truth, rng: np.random.Generator) -> tuple[np.ndarray, Truth]:
        """A part of the image, with the objects whose centre lies in it, cut to it."""
        options, (height, width) = self.augmentation, image.shape[:2]
        if not len(truth):
            return image, truth
        centres = (truth.boxes[:, :2] + truth.boxes[:, 2:]) / 2
        while True:
            threshold = options.iou_thresholds[rng.integers(len(options.iou_thresholds))]
            if threshold == 0:
                return image, truth
            for _ in range(options.trials):
                w, h = int(rng.uniform(LEAST_CROP * width, width)), int(rng.uniform(LEAST_CROP * height, height))
                if min(w, h) < 1 or not options.aspect_ratio[0] <= h / w <= options.aspect_ratio[1]:
                    continue
                left, top = int(rng.uniform(0, width - w)), int(rng.uniform(0, height - h))
                part = np.asarray([left, top, left + w, top + h], np.float32)
                shared = intersections(truth.boxes, part[None])[:, 0]
                sides = truth.boxes[:, 2:] - truth.boxes[:, :2]
                if (shared / (sides[:, 0] * sides[:, 1] + w * h - shared)).max() < threshold:
                    continue
                inside = ((centres > part[:2]) & (centres < part[2:])).all(1)
                if inside.any():
                    truth = truth.take(inside)
                    boxes = np.clip(truth.boxes - np.tile(part[:2], 2), 0, [w, h, w, h]).astype(np.float32)
                    return image[top : top + h, left : left + w], Truth(boxes, truth.labels, truth.numbers)


def fixed_size(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """(H, W, 3) uint8 at the network's size by Pillow's filter; the ratio is lost."""
    resized = dense.resize_pillow(
        Image.fromarray(np.ascontiguousarray(image)), preprocessing.image_size, FILTERS[preprocessing.interpolation]
    )
    return np.asarray(resized)


class Prepared(NamedTuple):
    """An image as the network takes it in evaluation, and the way back.

    Attributes:
        image: (3, H, W) float32. image_shape: (height, width) before padding.
        scale_factor: (width, height) of the resized image over that of the original; original_shape: (height, width).
    """

    image: np.ndarray
    image_shape: Size
    scale_factor: tuple[float, float]
    original_shape: Size

    def to_original(self, detections: Detections) -> Detections:
        """Detections in the input's pixels as those in the original's; masks are pasted after this."""
        return detections.in_original_pixels(self.scale_factor, self.original_shape)


@dataclass(frozen=True)
class DetectionEvalTransform:
    """MMDetection's evaluation: the ratio kept, normalise, pad to multiples of 32 as there, or to a bucket.

    Attributes:
        preprocessing: `image_size` is the largest, whichever side is longer.
        buckets: few sizes are few graphs; but what lies beyond the image is seen by the network's last rows.
        exif_orientation: turn image files as their EXIF tag says.
    """

    preprocessing: Preprocessing = field(default_factory=mmdetection_pixels)
    buckets: tuple[Size, ...] = ()
    exif_orientation: bool = False

    @property
    def scale(self) -> tuple[int, int]:
        """The longer and the shorter side that images get at most."""
        return max(self.preprocessing.image_size), min(self.preprocessing.image_size)

    def padded_size(self, size: Size) -> Size:
        """What the network sees of an image of (height, width).

        Raises:
            SettingError: no bucket holds it.
        """
        if self.buckets:
            return DetectionAugmentation(scales=(self.scale,), buckets=self.buckets).bucket(size)
        return dense.multiple_size(dense.keep_ratio_size(size, self.scale), DIVISOR)

    def __call__(self, image: AnyImage) -> Prepared:
        """An image of any kind that `dense.rgb_array` takes.

        Raises:
            DataError: it cannot be read. SettingError: no bucket holds it.
        """
        array = dense.rgb_array(image, self.exif_orientation)
        old = array.shape[0], array.shape[1]
        size, padded = dense.keep_ratio_size(old, self.scale), self.padded_size(old)
        pixels = dense.pad(dense.network_pixels(dense.resize_linear(array, size), self.preprocessing), padded, 0)
        return Prepared(pixels, size, (size[1] / old[1], size[0] / old[0]), old)

    def sample(self, dataset: CocoDataset, index: int) -> Prepared:
        """Image `index` of a data set; errors as of `CocoDataset.load`."""
        return self(dataset.load(index))


@dataclass(frozen=True)
class SsdEvalTransform:
    """SSD's evaluation: a fixed size, the ratio lost."""

    preprocessing: Preprocessing = field(default_factory=ssd_pixels)
    exif_orientation: bool = False

    def padded_size(self, size: Size) -> Size:
        """What the network sees of an image of (height, width)."""
        return self.preprocessing.image_size

    def __call__(self, image: AnyImage) -> Prepared:
        """An image of any kind that `dense.rgb_array` takes; DataError where it cannot be read."""
        array = dense.rgb_array(image, self.exif_orientation)
        old, size = (array.shape[0], array.shape[1]), self.preprocessing.image_size
        pixels = dense.network_pixels(fixed_size(array, self.preprocessing), self.preprocessing)
        return Prepared(pixels, size, (size[1] / old[1], size[0] / old[0]), old)

    def sample(self, dataset: CocoDataset, index: int) -> Prepared:
        """Image `index` of a data set; errors as of `CocoDataset.load`."""
        return self(dataset.load(index))


def batches_of_one_size(sizes: Sequence[Size], order: Sequence[int], batch_size: int) -> list[list[int]]:
    """Images in an order, as batches in which all have one padded size, as MMDetection groups lying and standing ones.

    An image waits until its bucket is full; what is left at the end, of all buckets, is left out. So the number of
    batches is the same for every order.

    Args:
        sizes: the padded size of each image; order: numbers of images.
    """
    waiting: dict[Size, list[int]] = {}
    batches = []
    for index in order:
        group = waiting.setdefault(sizes[index], [])
        group.append(int(index))
        if len(group) == batch_size:
            batches.append(waiting.pop(sizes[index]))
    return batches
