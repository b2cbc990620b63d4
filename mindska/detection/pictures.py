"""Detections drawn on their image: boxes, masks, names and scores.

Lines and letters are as large as the image asks for, and a small image is enlarged by a whole number first, so that one
of 128 pixels can be read as one of 2,000.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Union

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from ..errors import SettingError, printable
from ..files import replacing
from .postprocess import Detections

LEAST_SIDE = 640  # pixels of the longer side that a small image is enlarged towards
OPACITY = 0.45  # of masks
SCORE = 0.3  # least that is drawn
LONGEST_NAME = 40  # letters
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]
Font = Union[ImageFont.ImageFont, ImageFont.FreeTypeFont]


def class_colour(label: int) -> Colour:
    """A class's colour: neighbours among the numbers have hues that are far apart."""
    hue = label * 0.61803398875 % 1  # the golden section
    value, saturation = (1.0, 0.78, 0.9)[label % 3], (0.85, 0.95, 0.6)[label // 3 % 3]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def draw_detections(
    image: Union[Image.Image, np.ndarray],
    detections: Detections,
    class_names: Sequence[str],
    score_threshold: float = SCORE,
    show_scores: bool = True,
    viewed_at: int = 0,
) -> Image.Image:
    """A picture of an image with what was found in it.

    Args:
        image: a Pillow image, or (H, W, 3) uint8 RGB.
        detections: in the image's pixels; those below `score_threshold` are not drawn.
        class_names: by the detections' labels; a label without a name is drawn as its number.
        show_scores: write the score, in per cent, after the name.
        viewed_at: pixels of the longer side at which the picture will be looked at, when it is made smaller.

    Raises:
        SettingError: the masks are of another size than the image.
    """
    picture = (Image.fromarray(image) if isinstance(image, np.ndarray) else image).convert("RGB")
    masks = detections.masks
    if masks is not None and len(masks) and masks.shape[1:] != (picture.height, picture.width):
        raise SettingError(
            f"The masks have {masks.shape[2]}x{masks.shape[1]} pixels (width x height), the image has "
            f"{picture.width}x{picture.height}"
        )
    times = max(1, math.ceil(LEAST_SIDE / max(picture.size)))
    if times > 1:
        picture = picture.resize((picture.width * times, picture.height * times), Image.Resampling.BICUBIC)
    drawn = np.flatnonzero(detections.scores >= score_threshold)
    drawn = drawn[np.argsort(-detections.scores[drawn], kind="stable")]
    side = math.sqrt(picture.width * picture.height)
    line, letters = max(2, round(side / 350)), min(48, max(14, round(side / 50)))
    if viewed_at:
        smaller = max(1.0, max(picture.size) / viewed_at)
        line, letters = round(1.2 * smaller), round(11 * smaller)
    font = _font(letters)
    if masks is not None:
        for i in drawn[::-1]:
            picture = _with_mask(picture, masks[i], class_colour(int(detections.labels[i])), line)
    draw = ImageDraw.Draw(picture)
    boxes: list[Box] = [tuple(box) for box in (detections.boxes[drawn] * times).tolist()]
    for box, i in list(zip(boxes, drawn))[::-1]:  # the best are on top
        _frame(draw, box, class_colour(int(detections.labels[i])), line, picture.size)
    tags: list[Box] = []
    for box, i in zip(boxes, drawn):  # the best have the choice of places
        label = int(detections.labels[i])
        text = _name(class_names, label) + (f" {100 * detections.scores[i]:.0f}%" if show_scores else "")
        tags.append(_tag(draw, text, box, class_colour(label), font, line, picture.size, tags))
    return picture


def _name(class_names: Sequence[str], label: int) -> str:
    name = printable(class_names[label]) if 0 <= label < len(class_names) else str(label)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."


def _font(size: int) -> Font:
    try:
        return ImageFont.load_default(size=size)
    except (TypeError, OSError):  # before Pillow 10.1, or without FreeType
        return ImageFont.load_default()


def _with_mask(picture: Image.Image, mask: np.ndarray, colour: Colour, line: int) -> Image.Image:
    """The picture under the colour where the mask is, with a border of the full colour."""
    if not mask.any():
        return picture
    shape = Image.fromarray(mask.astype(np.uint8) * 255).resize(picture.size, Image.Resampling.NEAREST)
    width = 2 * max(1, line // 2) + 1
    inner = shape.filter(ImageFilter.MinFilter(width))
    opacity = np.where(np.asarray(inner) > 0, round(255 * OPACITY), np.asarray(shape))
    picture.paste(colour, (0, 0, *picture.size), Image.fromarray(opacity.astype(np.uint8)))
    return picture


def _frame(draw: ImageDraw.ImageDraw, box: Box, colour: Colour, line: int, size: tuple[int, int]) -> None:
    """A box's frame, dark outside of its colour, so that it is seen on its own colour, too."""
    left, top = max(0.0, min(box[0], size[0] - 1)), max(0.0, min(box[1], size[1] - 1))
    right, bottom = max(left, min(box[2] - 1, size[0] - 1)), max(top, min(box[3] - 1, size[1] - 1))
    draw.rectangle((left, top, right, bottom), outline=(0, 0, 0), width=line + max(1, line // 2))
    draw.rectangle((left, top, right, bottom), outline=colour, width=line)


def _tag(
    draw: ImageDraw.ImageDraw,
    text: str,
    box: Box,
    colour: Colour,
    font: Font,
    line: int,
    size: tuple[int, int],
    taken: Sequence[Box],
) -> Box:
    """Writes a text on a ground of its colour where no other text is, at the box as far as there is room; its place."""
    if not isinstance(font, ImageFont.FreeTypeFont):  # Pillow's first font has Latin letters only
        text = text.encode("latin-1", "replace").decode("latin-1")
    left, top, right, bottom = draw.textbbox((0, 0), text, font)
    width, height = right - left + 2 * line, bottom - top + 2 * line
    places = [
        (max(0.0, min(x, size[0] - width)), max(0.0, min(y, size[1] - height)))
        for x, y in _corners(box, width, height, line)
    ]
    free = [(x, y) for x, y in places if not any(_overlap((x, y, x + width, y + height), other) for other in taken)]
    x, y = (free or places)[0]
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 130
    draw.text((x + line - left, y + line - top), text, (0, 0, 0) if dark else (255, 255, 255), font)
    return x, y, x + width, y + height


def _corners(box: Box, width: float, height: float, line: int) -> Iterator[tuple[float, float]]:
    """Where a text of this size may stand: above the box, within it, below it, and then lower and lower."""
    if box[1] >= height:
        yield box[0], box[1] - height
        yield box[2] - width, box[1] - height
    yield box[0], box[1]
    yield box[2] - width, box[1]
    yield box[0], box[3]
    yield box[0], box[3] - height
    for i in range(1, 12):
        yield box[0], box[1] + i * (height + line)


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def check_picture_name(path: Path) -> None:
    """SettingError where a picture's file is not called as one."""
    if path.suffix.lower() not in SUFFIXES:
        raise SettingError(f"A picture's name ends with one of {', '.join(SUFFIXES)}; {path} does not")


def write_picture(path: Path, picture: Image.Image) -> None:
    """Writes a picture, whole or not at all.

    Raises:
        SettingError: its name ends with none of `SUFFIXES`. WriteError: it cannot be written.
    """
    check_picture_name(path)
    with replacing(path) as temporary:
        picture.save(temporary, quality=92)  # of JPEG and WebP
