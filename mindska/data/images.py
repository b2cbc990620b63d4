"""An image file -> a Pillow image in RGB with 8 bits a channel. Every command reads its images here.

Pillow is the definition of an image's pixels, with these rules:

- Transparency is dropped, and palettes, CMYK, YCbCr, LAB and black-and-white images become RGB, as by `convert("RGB")`.
- Grey of 16 bits is divided by 257 and rounded (grey of N bits: times 255 / (2^N - 1)); of colours with 16 bits Pillow
  takes the high byte. Numbers of floating point are taken for 0 (black) to 1 (white). 32-bit integers that reach beyond
  255 and no further than 65535 are taken for 16 bits, which is what Pillow and others write them from. Where the file
  does not say which number is white, it is an error.
- The first image of a file with several is taken.
- The EXIF tag for the orientation is ignored, as the original training and evaluation did, unless `exif_orientation`.
  (Pillow turns TIFF files by their tag itself.)
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Optional, Union

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import DataError

# What is opened at all, told by the content: no other decoder sees a file. EPS, for one, would start Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF")
EXTENSIONS = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
MAX_BYTES = 1 << 30  # of a file: more than an image within Pillow's limit of pixels needs; WebP files are read whole
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 274, 258, 262, 339  # tags of EXIF and TIFF
TILE_WIDTH, TILE_LENGTH = 322, 323
SIGNED, WHITE_IS_ZERO = 2, 0  # sample format, photometric interpretation
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}  # what Pillow converts to RGB by way of the other only

# From an image's (width, height) in pixels to the least size at which it may be decoded.
DecodeSize = Callable[[tuple[int, int]], tuple[int, int]]


def read_image(
    path: Union[str, Path],
    decode_size: Optional[DecodeSize] = None,
    exif_orientation: bool = False,
    content: Optional[bytes] = None,
) -> Image.Image:
    """An image file as RGB; this module says how unusual ones become that.

    Args:
        decode_size: from the image's (width, height) to the least at which it may be decoded. A JPEG file is decoded at
            a half, a quarter or an eighth of its size where that is no less, several times as fast.
        exif_orientation: turn the image as its EXIF tag says.
        content: the image file, where it does not lie at `path`, which is then what to call it.

    Raises:
        DataError: it cannot be read, whatever its decoder raises; it is no regular file, or has more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS` (a JPEG file with up to twice as many is decoded at half its size). The message
            names its path.
    """
    with open_image(path, content) as image:
        # Pillow turns TIFF images when it loads them, and then drops the tag.
        turned = exif_orientation and image.format != "TIFF" and image.getexif().get(ORIENTATION, 1) in range(5, 9)
        size = image.size[::-1] if turned else image.size
        wanted = decode_size(size) if decode_size is not None else size
        limit = Image.MAX_IMAGE_PIXELS
        if limit and size[0] * size[1] > limit:
            wanted = min(wanted[0], size[0] // 2), min(wanted[1], size[1] // 2)
        if wanted != size:
            image.draft(None, wanted[::-1] if turned else wanted)
        tags = getattr(image, "tag_v2", {})  # TIFF's: a tile, which is decoded as a whole, may be larger than the image
        for width, height in (image.size, (tags.get(TILE_WIDTH, 0), tags.get(TILE_LENGTH, 0))):
            if limit and width * height > limit:
                raise ValueError(
                    f"its {width}x{height} pixels are more than the {limit:,} that an image may have "
                    f"(PIL.Image.MAX_IMAGE_PIXELS)"
                )
        image.load()
        result = as_rgb(image)
        if exif_orientation:
            result.info.pop("exif", None)  # of the file's tags, take those that are left after loading
            result.getexif()[ORIENTATION] = image.getexif().get(ORIENTATION, 1)
            result = ImageOps.exif_transpose(result)
        return result


@contextmanager
def open_image(path: Union[str, Path], content: Optional[bytes] = None) -> Iterator[Image.Image]:
    """An image file (or its content), opened but not decoded; what its decoder raises in the context is a DataError.

    A decoder may raise anything on a damaged file (KeyError, struct.error, ZeroDivisionError, MemoryError, ...).
    """
    try:
        if content is None:
            found = os.stat(path)  # noqa: PTH116 - a million paths are text
            if not stat.S_ISREG(found.st_mode):
                raise ValueError(f"it is {_kind(found.st_mode)}, no regular file")
        size = found.st_size if content is None else len(content)
        if size > MAX_BYTES:
            raise ValueError(f"it has {size:,} bytes, more than the {MAX_BYTES:,} that an image file may have")
        with Image.open(path if content is None else io.BytesIO(content), formats=FORMATS) as image:
            if min(image.size) < 1:
                raise ValueError(f"it has {image.width}x{image.height} pixels")
            yield image
    except Exception as error:
        raise DataError(f"{path} cannot be read: {_reason(error)}") from error


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    }  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "something else")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"it is no image that we open ({', '.join(FORMATS)}), or its beginning is damaged"
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    expected = (OSError, EOFError, ValueError, SyntaxError, Image.DecompressionBombError)
    return str(error) if isinstance(error, expected) and str(error) else f"{type(error).__name__}: {error}"


def as_rgb(image: Image.Image) -> Image.Image:
    """A decoded image of any kind as RGB; this module says how.

    Raises:
        ValueError: it does not say which number is white.
    """
    result = _in_8_bits(image)
    if result.mode in PREMULTIPLIED:
        result = result.convert(PREMULTIPLIED[result.mode])
    return result.convert("RGB")


def _in_8_bits(image: Image.Image) -> Image.Image:
    """A decoded image with 8 bits a channel: itself, or grey if it had other numbers.

    Raises:
        ValueError: the file does not say which number is white.
    """
    tags = getattr(image, "tag_v2", {})  # TIFF's
    signed = SIGNED in tags.get(SAMPLE_FORMAT, ())
    deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
    if not deep and not signed:
        return image
    bits, pixels = tags.get(BITS_PER_SAMPLE, (16,))[0], np.asarray(image)
    low, high, white = pixels.min(), pixels.max(), 2.0**bits - 1
    if image.mode == "F":
        known, white = bool(low >= 0 and high <= 1), 1.0
        found, expected = "floating-point numbers", "0 (black) to 1 (white)"
    elif bits == 32:
        known, white = bool(low >= 0 and 255 < high <= 65535), 65535.0
        found, expected = "32-bit integers", "at least 0, beyond 255, and at most 65535"
    else:
        known, found, expected = not signed, f"signed {bits}-bit integers", "unsigned ones"
    if not known:
        raise ValueError(
            f"its pixels are {found} from {low:g} to {high:g}, expected {expected}: the file does not say which number "
            f"is white. Convert it to 8 or 16 bits without sign"
        )
    scaled = pixels.astype(np.float32)
    scaled *= np.float32(255 / white)
    grey: np.ndarray = np.rint(scaled, out=scaled).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow inverts up to 8 bits only
        grey = 255 - grey
    return Image.fromarray(grey)
