"""A contact sheet: many small pictures with a line or two under each, in one PNG file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Optional, Union

from PIL import Image, ImageDraw, ImageFont

from ..errors import SettingError, printable
from ..files import replacing

SIDE = 160  # pixels of a picture's cell
GAP = 8
LINE = 15  # pixels of a line of text
MOST = 400  # pictures of a sheet
BACKGROUND, TEXT, FAINT, MISSING = (255, 255, 255), (20, 20, 20), (110, 110, 110), (200, 60, 60)

Font = Union[ImageFont.ImageFont, ImageFont.FreeTypeFont]


@dataclass(frozen=True)
class Picture:
    """A picture of a sheet; without an image its place is crossed out.

    Attributes:
        lines: what stands under it: the first is dark, the others are faint.
    """

    image: Optional[Image.Image]
    lines: Sequence[str] = ()


def check_sheet(path: Path) -> None:
    """SettingError where a file is not called as a contact sheet is."""
    if path.suffix.lower() != ".png":
        raise SettingError(f"A contact sheet is a PNG file; {path} should end with .png")


def write_contact_sheet(path: Path, pictures: Iterable[Optional[Picture]], title: str = "", columns: int = 0) -> int:
    """Writes the first `MOST` pictures as a PNG file; returns how many they are.

    Args:
        pictures: None leaves a place empty.
        columns: default: so many that the sheet is about as wide as it is high.

    Raises:
        SettingError: the file's name does not end with .png.
        WriteError: it cannot be written.
    """
    check_sheet(path)
    cells = [picture and _small(picture) for picture in islice(pictures, MOST)]
    lines = max((len(picture.lines) for picture in cells if picture), default=0)
    width, height = SIDE + GAP, SIDE + LINE * lines + GAP
    columns = columns or max(1, math.ceil(math.sqrt(len(cells) * height / width)))
    columns = min(columns, max(1, len(cells)))
    top = GAP + (LINE + GAP if title else 0)
    sheet = Image.new(
        "RGB", (GAP + columns * width, top + math.ceil(len(cells) / columns) * height + (not cells)), BACKGROUND
    )
    draw, font = ImageDraw.Draw(sheet), default_font()
    if title:
        draw.text((GAP, GAP), fitting(title, font, sheet.width - 2 * GAP), TEXT, font)
    for number, picture in enumerate(cells):
        left, upper = GAP + number % columns * width, top + number // columns * height
        if picture is None:
            continue
        if picture.image is None:
            box = (left, upper, left + SIDE - 1, upper + SIDE - 1)
            draw.rectangle(box, outline=MISSING)
            draw.line(box, MISSING)
            draw.line((box[0], box[3], box[2], box[1]), MISSING)
        else:
            sheet.paste(
                picture.image,
                (left + (SIDE - picture.image.width) // 2, upper + (SIDE - picture.image.height) // 2),
            )
        for i, line in enumerate(picture.lines):
            draw.text((left, upper + SIDE + LINE * i), fitting(line, font, SIDE), FAINT if i else TEXT, font)
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")
    return sum(picture is not None for picture in cells)


def _small(picture: Picture) -> Picture:
    """The picture at the size of a cell: its ratio stays, small ones are enlarged by whole numbers."""
    image = picture.image
    if image is None:
        return picture
    image = image.convert("RGB")
    times = SIDE // max(image.size)
    if times > 1:
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    elif times < 1:
        scale = SIDE / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    return Picture(image, picture.lines)


def default_font(size: int = 12) -> Font:
    """Pillow's own font, of so many pixels where it has sizes."""
    try:
        return ImageFont.load_default(size=size)
    except (TypeError, OSError):  # before Pillow 10.1, or without FreeType
        return ImageFont.load_default()


def fitting(text: str, font: Font, width: int) -> str:
    """A text that is no wider than so many pixels; what is left out is in its middle."""
    text = printable(text)[:500]
    if not isinstance(font, ImageFont.FreeTypeFont):  # Pillow's first font has Latin letters only
        text = text.encode("latin-1", "replace").decode("latin-1")
    kept = len(text)
    shown = text
    while kept > 3 and font.getlength(shown) > width:
        kept -= 1
        shown = f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"
    return shown
