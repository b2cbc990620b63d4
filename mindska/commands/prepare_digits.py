"""Writes scikit-learn's handwritten digits as folders of PNG images: OUT/train/DIGIT/*.png and OUT/val/DIGIT/*.png.

The 1,797 scans (8x8 pixels, 17 grey levels; UCI's test set of optically recognised digits) are enlarged to 64x64.
Every fifth image of a class is held out for validation.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
from PIL import Image

from mindska.arguments import Parser

SIZE = 64


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write to")
    out = parser.parse_args(arguments).out.expanduser()
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        parser.error("scikit-learn holds the digits: pip install scikit-learn")
    try:
        if os.path.lexists(out):
            parser.error(f"{out} exists already; remove it, or name another folder")
        print(write(load_digits(), out))
    except OSError as error:
        parser.error(f"{out} cannot be written: {error.strerror or error}")


def write(digits: Any, whole: Path) -> str:
    """Writes the images and says how many there are."""
    out = whole.with_name(f".{whole.name}.tmp")  # a half-written set is never taken for a whole one
    shutil.rmtree(out, ignore_errors=True)
    counts = dict.fromkeys(range(10), 0)
    for scan, digit in zip(digits.images, digits.target):
        split = "val" if counts[digit] % 5 == 4 else "train"
        folder = out / split / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.uint8(scan * 255 / 16)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        image.save(folder / f"{counts[digit]:03}.png")
        counts[digit] += 1
    out.rename(whole)
    held_out = sum(count // 5 for count in counts.values())
    return f"{sum(counts.values()) - held_out} training and {held_out} validation images of 10 digits in {whole}"
