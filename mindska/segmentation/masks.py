"""A mask file -> the class of every pixel, (H, W) int32. Every command reads its masks here.

A mask is an image file with one number a pixel: palette or grey PNG (or TIFF, BMP, GIF) of up to 16 bits. The numbers
are taken as they are stored; colours of a palette mean nothing. What would not come back as it was written is an error:
masks with several channels, lossy files (JPEG, WebP), floating-point numbers, files whose numbers stand for brightness.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Union

import numpy as np
from PIL import Image

from ..data.images import open_image
from ..errors import DataError

IGNORE = 255  # the label of pixels that have no class: they are neither learnt nor counted
MOST_CLASSES = IGNORE  # so that no class is called 255
LARGEST = 65535  # number of a mask

LOSSY = {"JPEG": "JPEG", "MPO": "JPEG", "WEBP": "WebP"}
# Pillow spreads grey of few bits over 0 to 255. Optimisers of PNG files write masks of few classes so.
SPREAD = {"L;2": 85, "L;2R": 85, "L;4": 17, "L;4R": 17}
SHOWN = 8  # numbers in a message


class MaskError(DataError):
    """A mask that does not say which class its pixels have: no other image can take its place, the data is to be
    mended."""

    replaceable = False


def mask_size(path: Union[str, Path]) -> tuple[int, int]:
    """(height, width) of a mask, by the beginning of the file.

    Raises:
        DataError: it cannot be read.
        MaskError: it is no mask of one number a pixel.
    """
    with open_image(path) as image:
        reason = _why_not(image)
        size = image.height, image.width
    if reason:
        raise MaskError(f"{path} {reason}{_equal_channels(path)}")
    return size


def read_mask(path: Union[str, Path]) -> np.ndarray:
    """The numbers of a mask file, (H, W), as they are stored: uint8, uint16 or int32.

    Raises:
        DataError: it cannot be read.
        MaskError: it is no mask of one number a pixel.
    """
    with open_image(path) as image:
        reason = _why_not(image)
        if not reason:
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(
                    f"its {image.width}x{image.height} pixels are more than the {Image.MAX_IMAGE_PIXELS:,} that an "
                    f"image may have (PIL.Image.MAX_IMAGE_PIXELS)"
                )
            divisor = SPREAD.get(_raw_mode(image), 1)
            image.load()
            numbers = np.asarray(image)
    if reason:
        raise MaskError(f"{path} {reason}{_equal_channels(path)}")
    if numbers.dtype == bool:
        return numbers.astype(np.uint8)
    if numbers.dtype.byteorder == ">":
        numbers = numbers.astype(numbers.dtype.newbyteorder("="))
    return numbers if divisor == 1 else numbers // divisor


def _why_not(image: Image.Image) -> str:
    """Why an opened file is no mask, for the end of "FILE ..."; empty when it may be one."""
    if image.format in LOSSY:
        return (
            f"is a mask in {LOSSY[image.format]}, which changes the numbers near edges; expected PNG. Write the masks "
            f"anew from their source: what {LOSSY[image.format]} has changed does not come back"
        )
    channels = len(image.getbands())
    if channels > 1:
        return (
            f"is a mask with {channels} channels ({image.mode}); expected one channel with the number of each pixel's "
            f"class (grey or palette PNG). Colours have to be translated into numbers first"
        )
    if not (image.mode in ("1", "L", "P", "I") or image.mode.startswith("I;16")):
        return f"is a mask of kind {image.mode}; expected whole numbers of 8 or 16 bits (grey or palette PNG)"
    raw = _raw_mode(image)
    if re.search(r";\d*I", raw) and not re.fullmatch(r"I;\d+\w*", raw):
        return (
            "is a mask in which 0 is written as white, so that its numbers are unsure; expected a grey or palette PNG"
        )
    codec, arguments = _tile(image)
    if codec.startswith("ppm") and arguments[1:] not in ((255,), (65535,)):
        return f"is a mask whose numbers are brightness of {arguments[1]}; expected 255 or 65535 there, or a PNG"
    return ""


def _tile(image: Image.Image) -> tuple[str, tuple]:
    """How Pillow will decode an opened file: the codec and its arguments."""
    tiles = getattr(image, "tile", None)
    if not tiles:
        return "", ("",)
    arguments = tiles[0][3]
    return tiles[0][0], arguments if isinstance(arguments, tuple) else (arguments,)


def _raw_mode(image: Image.Image) -> str:
    first = _tile(image)[1][:1]
    return first[0] if first and isinstance(first[0], str) else ""


def _equal_channels(path: Union[str, Path]) -> str:
    """For the end of a message, what to do where the colours of a mask are grey in truth."""
    try:
        with open_image(path) as image:
            if image.format in LOSSY or image.mode not in ("RGB", "RGBA"):
                return ""
            image.load()
            channels = np.asarray(image)[..., :3]
    except DataError:
        return ""
    if (channels == channels[..., :1]).all():
        return (
            '. Here the three are equal, so that the first may be the mask: Image.open(FILE).getchannel("R").save(FILE)'
        )
    return ""


@lru_cache(maxsize=16)
def _table(num_classes: int, reduce_zero_label: bool) -> np.ndarray:
    """Number in a file -> label; -1: none."""
    table = np.full(LARGEST + 1, -1, np.int32)
    first = int(reduce_zero_label)
    table[first : first + num_classes] = np.arange(num_classes)
    table[IGNORE] = IGNORE
    if reduce_zero_label:
        table[0] = IGNORE
    return table


def check_num_classes(num_classes: int, reduce_zero_label: bool) -> None:
    """DataError where so many classes have no numbers beside 255, which is ignored."""
    most = MOST_CLASSES - reduce_zero_label
    if not 1 <= num_classes <= most:
        raise DataError(
            f"{num_classes} classes; expected 1 to {most}: {IGNORE} in a mask is no class but ignored"
            + (", and 0 is as well (reduce_zero_label)" if reduce_zero_label else "")
        )


def to_labels(numbers: np.ndarray, num_classes: int, reduce_zero_label: bool, name: str) -> np.ndarray:
    """What a mask holds -> labels, int32: 0 to num_classes - 1, or 255 (ignored).

    Args:
        reduce_zero_label: 0 in the file is no class: 0 becomes 255, k becomes k - 1, 255 stays (ADE20K).
        name: what to call the mask in a message.

    Raises:
        MaskError: a number is none of a class.
    """
    table = _table(num_classes, reduce_zero_label)
    if numbers.dtype == np.uint8 or numbers.dtype == np.uint16:
        labels = table[numbers]
    else:
        labels = np.where((numbers < 0) | (numbers > LARGEST), -1, table[np.clip(numbers, 0, LARGEST)])
    if labels.size and labels.min() < 0:
        values, counts = np.unique(numbers, return_counts=True)
        raise MaskError(wrong_numbers(name, values, counts, num_classes, reduce_zero_label))
    return labels


def is_label(values: np.ndarray, num_classes: int, reduce_zero_label: bool) -> np.ndarray:
    """Of numbers in a file, whether each is that of a class, or ignored."""
    table = _table(num_classes, reduce_zero_label)
    return (values >= 0) & (values <= LARGEST) & (table[np.clip(values, 0, LARGEST)] >= 0)


def wrong_numbers(name: str, values: np.ndarray, counts: np.ndarray, num_classes: int, reduce_zero_label: bool) -> str:
    """What to say of a mask that holds numbers (in `counts` pixels each) which are none of a class."""
    wrong = ~is_label(values, num_classes, reduce_zero_label)
    first = int(reduce_zero_label)
    zero = ", 0 is ignored" if reduce_zero_label else ""
    hint = "the classes are more than the names (classes.txt), or the masks are of another data set"
    if is_binary(values):
        hint = "such masks are pictures: divide them by their white, so that they hold 0 and 1"
    elif not reduce_zero_label and values[wrong].tolist() == [num_classes]:
        hint = "where the classes begin with 1 and 0 is none, --reduce_zero_label true makes 1 the first"
    elif reduce_zero_label and values[wrong].tolist() == [num_classes + 1]:
        hint = "or there is one name too few"
    said = f"{num_classes} classes, reduce_zero_label {str(reduce_zero_label).lower()}{zero}"
    return (
        f"{name} holds {numbers_text(values[wrong], counts[wrong])}; expected {first} to {num_classes - 1 + first} "
        f"({said}) or {IGNORE} (ignored): {hint}"
    )


def is_binary(values: Iterable[int]) -> bool:
    """Whether numbers are those of a picture in black and white: white alone, or with black."""
    return {int(value) for value in values} - {0} in ({255}, {LARGEST}, {254}, {128})


def numbers_text(values: np.ndarray, counts: np.ndarray) -> str:
    """Numbers of a mask and how many pixels have them."""
    parts = [f"{value} in {count:,} pixels" for value, count in zip(values[:SHOWN].tolist(), counts[:SHOWN].tolist())]
    more = [f"{len(values) - SHOWN} other numbers"] if len(values) > SHOWN else []
    return ", ".join(parts + more)
