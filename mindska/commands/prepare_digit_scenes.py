"""Writes scenes of scikit-learn's handwritten digits, for segmentation and for detection.

The 1,797 scans (8x8 pixels; UCI's test set of optically recognised digits) lie at random sizes and places, one over the
other, on textured backgrounds. Every fifth scan of a digit is in validation scenes only. The folder has PASCAL VOC's
layout (JPEGImages, SegmentationClass, ImageSets/Segmentation; classes: background and 0 to 9) and COCO's (train2017,
val2017, annotations/instances_*.json; boxes and masks of what is seen; 10 categories), of the same pictures. The same
options give the same scenes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from mindska.arguments import Parser
from mindska.errors import SettingError


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--train", type=int, default=400, metavar="N", help="training scenes (default: 400)")
    parser.add_argument("--val", type=int, default=100, metavar="N", help="validation scenes (default: 100)")
    parser.add_argument(
        "--image_size", type=int, nargs=2, default=(128, 128), metavar=("HEIGHT", "WIDTH"),
        help="pixels of a scene (default: 128 128)",
    )  # fmt: skip
    parser.add_argument(
        "--digits", type=int, nargs=2, default=(2, 6), metavar=("FROM", "TO"), help="digits of a scene (default: 2 6)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other scenes (default: 0)")
    options = parser.parse_args(arguments)
    for name in ("train", "val"):
        if not 1 <= getattr(options, name) <= 1_000_000:
            parser.error(f"--{name} is {getattr(options, name)}; expected 1 to 1,000,000 scenes")
    if not 0 <= options.seed < 2**32:
        parser.error(f"--seed is {options.seed}; expected a number from 0 to {2**32 - 1}")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        parser.error("scikit-learn holds the digits: pip install scikit-learn")
    from mindska.data.digit_scenes import DigitScenes, split_scans, write_digit_scenes

    digits = load_digits()
    scans = split_scans(digits.images, digits.target)
    out = options.out.expanduser()
    size, number = tuple(options.image_size), tuple(options.digits)
    try:
        DigitScenes(scans["train"], size=size, digits=number)  # whether the options are in range, before any file
        if os.path.lexists(out):
            parser.error(f"{out} exists already; remove it, or name another folder")
        half = out.with_name(f".{out.name}.tmp")  # a half-written set is never taken for a whole one
        shutil.rmtree(half, ignore_errors=True)
        found = write_digit_scenes(
            half, scans, dict(train=options.train, val=options.val), options.seed, size, number
        )  # fmt: skip
        half.rename(out)
    except SettingError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{out} cannot be written: {error.strerror or error}")
    print(
        f"{options.train:,} training and {options.val:,} validation scenes of {size[0]}x{size[1]} pixels with "
        f"{found['train']:,} and {found['val']:,} digits in {out}"
    )
