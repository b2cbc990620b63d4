"""Label maps as pictures: a palette PNG, an overlay on the image with a legend, a sheet of several.

Colours are those of PASCAL VOC's palette, which is defined for all 256 numbers: the three lowest bits of a class's
number become the highest bits of red, green and blue, the next three the next ones. 255 (ignored) is (224, 224, 192).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ..data.contact_sheet import Picture, default_font, fitting, write_contact_sheet
from ..errors import SettingError
from ..files import replacing
from .masks import IGNORE

OPACITY = 0.6  # of the colours over the image
EDGE = 0.25  # of the colour of the pixels at the border of two classes, the rest white
MOST_ROWS = 40  # classes in a legend; the others are counted
LEAST_WIDTH = 150  # pixels of a legend, and
LEAST_HEIGHT = 96  # of a picture that has one


@lru_cache(maxsize=1)
def palette() -> np.ndarray:
    """(256, 3) uint8: PASCAL VOC's colours."""
    numbers = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((numbers >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def palette_image(labels: np.ndarray) -> Image.Image:
    """A label map (H, W) as a palette image: its numbers are the classes, its colours PASCAL VOC's.

    Raises:
        SettingError: a number is not in 0 to 255.
    """
    labels = np.asarray(labels)
    if labels.ndim != 2 or (labels.size and not 0 <= labels.min() <= labels.max() <= 255):
        raise SettingError(f"a label map of shape {labels.shape}; expected (height, width), numbers from 0 to 255")
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(palette().tobytes())
    return image


def check_label_map_name(path: Path) -> None:
    """SettingError where a label map would not be written as PNG: JPEG, for one, changes the numbers."""
    if path.suffix.lower() != ".png":
        raise SettingError(f"A label map is a PNG file, which keeps its numbers; {path} should end with .png")


def write_label_map(path: Path, labels: np.ndarray) -> None:
    """Writes a label map as palette PNG, which `read_mask` and others read as its numbers.

    Raises:
        SettingError: the file's name does not end with .png. WriteError: it cannot be written.
    """
    check_label_map_name(path)
    image = palette_image(labels)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def overlay(
    image: Image.Image,
    labels: np.ndarray,
    class_names: Sequence[str] = (),
    legend: bool = True,
    title: str = "",
    opacity: float = OPACITY,
) -> Image.Image:
    """The image in the colours of its classes, with light borders, and a legend of those that it shows.

    A first class called background keeps the colours of the image; its field in the legend is white.

    Args:
        labels: (H, W), of the image's size.
        class_names: for the legend, in which the class of most pixels is the first; none: no legend.
        title: what stands above the legend. opacity: of the colours, from 0 to 1.

    Raises:
        SettingError: the label map has another size.
    """
    labels = np.asarray(labels)
    if image.size != labels.shape[::-1]:
        raise SettingError(f"an image of {image.width}x{image.height} pixels and a label map of shape {labels.shape}")
    pixels = np.asarray(image.convert("RGB"), np.float32)
    colours = palette()[np.clip(labels, 0, 255)].astype(np.float32)
    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)  # so that colours are told apart on any image
    mixed = opacity * colours + (1 - opacity) * grey[..., None]
    if _has_background(class_names):
        mixed[labels == 0] = pixels[labels == 0]
    border = _borders(labels)
    mixed[border] = EDGE * mixed[border] + (1 - EDGE) * 255
    picture = Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))
    if not class_names or not legend:
        return picture
    return _with_legend(picture, labels, class_names, title)


def _has_background(class_names: Sequence[str]) -> bool:
    return bool(class_names) and class_names[0].strip().lower() == "background"


def _borders(labels: np.ndarray) -> np.ndarray:
    """Which pixels have another class below or to the right; of large pictures, those near them as well."""
    border = np.zeros(labels.shape, bool)
    border[:-1] |= labels[:-1] != labels[1:]
    border[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    wide = min(labels.shape) // 400
    if wide > 1:
        border = np.asarray(Image.fromarray(border).convert("L").filter(ImageFilter.MaxFilter(wide // 2 * 2 + 1))) > 0
    return border


def _with_legend(picture: Image.Image, labels: np.ndarray, class_names: Sequence[str], title: str) -> Image.Image:
    """The picture with a column at its right: a field of colour, the name and the share of each class.

    Small pictures are enlarged by whole numbers until the legend of a few classes fits beside them.
    """
    times = max(1, -(-LEAST_HEIGHT * 2 // max(1, min(picture.size)))) if min(picture.size) < LEAST_HEIGHT * 2 else 1
    if times > 1:
        picture = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    size = max(12, round(min(picture.size) / 40))  # of the letters
    font, line, gap = default_font(size), round(size * 1.5), round(size * 0.6)
    numbers, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    room = max(3, (picture.height - 2 * gap) // line - bool(title))
    shown = order[: min(room, MOST_ROWS) - (len(order) > min(room, MOST_ROWS))]
    colours = palette().copy()
    if _has_background(class_names):
        colours[0] = 255
    rows = [(colours[int(numbers[i])], _name(int(numbers[i]), class_names), counts[i] / labels.size) for i in shown]
    texts = [f"{name}  {100 * share:.3g} %" for _, name, share in rows]
    if len(shown) < len(order):
        texts.append(f"and {len(order) - len(shown)} more")
    texts = [title, *texts] if title else texts
    wanted = max(round(font.getlength(text)) for text in texts) + line + 3 * gap
    width = min(max(LEAST_WIDTH, wanted), max(LEAST_WIDTH, round(picture.width * 0.6), 20 * size))
    height = max(picture.height, 2 * gap + line * len(texts))
    canvas = Image.new("RGB", (picture.width + width, height), (255, 255, 255))
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    left, top = picture.width + gap, gap
    for i, text in enumerate(texts):
        row = i - bool(title)
        field = 0 <= row < len(rows)
        if field:
            box = (left, top + line // 8, left + size, top + line // 8 + size)
            draw.rectangle(box, tuple(int(value) for value in rows[row][0]), (120, 120, 120))
        start = left + (line if field else 0)
        draw.text((start, top), fitting(text, font, canvas.width - start - gap), (20, 20, 20), font)
        top += line
    return canvas


def _name(number: int, class_names: Sequence[str]) -> str:
    if number < len(class_names):
        return class_names[number]
    return "ignored" if number == IGNORE else str(number)


def write_overlay_sheet(
    path: Path,
    rows: Iterable[tuple[str, Image.Image, Mapping[str, np.ndarray]]],
    class_names: Sequence[str],
    title: str = "",
) -> int:
    """Writes a contact sheet (PNG): each image with its label maps over it at its right; returns how many pictures.

    Args:
        rows: (name, image, what a label map is called -> the label map), all with as many label maps.

    Raises:
        SettingError: the file's name does not end with .png, or a label map has another size than its image.
        WriteError: it cannot be written.
    """
    rows = list(rows)

    def pictures() -> Iterator[Picture]:
        for name, image, maps in rows:
            yield Picture(image, [name])
            for what, labels in maps.items():
                picture = overlay(image, labels, class_names, legend=False)
                yield Picture(picture, [what, most_classes(labels, class_names)])

    each = 1 + max((len(maps) for _, _, maps in rows), default=0)
    return write_contact_sheet(path, pictures(), title, each * max(1, round((len(rows) / each) ** 0.5)))


def most_classes(labels: np.ndarray, class_names: Sequence[str], limit: int = 3) -> str:
    """The names of the classes that have most of the pixels, the first one first."""
    numbers, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:limit]
    return ", ".join(_name(int(numbers[i]), class_names) for i in order)
