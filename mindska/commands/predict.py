"""Tells the classes of images; by a segmenter, those of their pixels; by a detector, the objects in them.

    mindska predict cat.jpg --ckpt_path skanet_s.ckpt
    mindska predict photos/ --ckpt_path skanet_s.onnx --format csv > classes.csv
    mindska predict photos/ --ckpt_path skanet_s.ckpt --contact_sheet classes.png
    mindska predict photos/ --ckpt_path semantic_fpn_van_tiny.ckpt --out found/
    mindska predict photos/ --ckpt_path retinanet_van_tiny.ckpt --out found/ --format json > found.json

Model, preprocessing and class names come from the record in the checkpoint (of an exported model: beside it). An image
that cannot be read is reported, and the rest go on; then the exit code is 1.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Optional

from mindska.arguments import Parser, add_model, add_use_ema
from mindska.errors import clear_errors, printable
from mindska.files import check_there, check_writable, user_path
from mindska.names import OUR_NETWORKS


def parse(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "images", nargs="+", type=user_path, metavar="IMAGE|FOLDER", help="image files, or folders of them"
    )
    parser.add_argument(
        "--ckpt_path", required=True, type=user_path, metavar="FILE", help="weights, or an exported .onnx or .mindir"
    )
    add_model(parser, OUR_NETWORKS, "model of mindska, where the file does not say it")
    add_use_ema(parser, "take")
    parser.add_argument("--exif_orientation", action="store_true", help="turn photos as their EXIF tag says")
    parser.add_argument("--topk", type=int, default=5, help="how many classes an image (default: 5)")
    parser.add_argument("--format", choices=("text", "json", "csv"), default="text", help="of what is printed")
    parser.add_argument(
        "--contact_sheet", type=user_path, metavar="FILE", help="write the pictures with their classes (PNG)"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="images at once (default: 16)")
    add = parser.add_argument_group("segmentation and detection").add_argument
    add("--out", type=user_path, metavar="DIR", help="folder for what is found in the images")
    add(
        "--save", choices=("labels", "overlay", "both", "none"), default="both",
        help="of segmentation: label maps (palette PNG), pictures with the classes over them, or both (default)",
    )  # fmt: skip
    add("--scales", type=float, nargs="+", default=[1.0], metavar="X", help="mean over these scales (default: 1)")
    add("--flip", action="store_true", help="see mirror images as well")
    add("--score_threshold", type=float, metavar="X", help="objects of no higher score are left out (default: 0.3)")
    add("--slide_stride", type=int, nargs="+", metavar="N", help="step of a sliding window; default: images are whole")
    options = parser.parse_args(arguments)
    if options.topk < 1 or options.batch_size < 1:
        parser.error("--topk and --batch_size must be at least 1")
    return options


def write_text(predictions: Iterable[Any]) -> None:
    for prediction in predictions:
        print(*map(printable, prediction.lines()), sep="\n")


def write_json(predictions: Iterable[Any]) -> None:
    entries = [prediction.as_dict() for prediction in predictions]
    ascii_only = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") != "utf8"
    text = json.dumps(entries, indent=1, ensure_ascii=ascii_only, allow_nan=False)
    # Of a file name that is not UTF-8, Python keeps the bytes as characters that cannot be written: JSON's escapes can.
    print(re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text))


def write_csv(predictions: Iterable[Any]) -> None:
    from mindska.data.lists import table_cell

    writer, begun = csv.writer(sys.stdout, lineterminator="\n"), False
    for prediction in predictions:
        if not begun:
            writer.writerow(prediction.HEADER)
        begun = True
        writer.writerows([table_cell(c) if isinstance(c, str) else c for c in row] for row in prediction.rows())


def main(arguments: Optional[Sequence[str]] = None) -> None:
    options = parse(arguments)
    with clear_errors():
        if options.contact_sheet:
            check_writable(options.contact_sheet)
        for place in options.images:
            check_there(place, "image or folder")
        check_there(options.ckpt_path, "model" if options.ckpt_path.suffix in (".onnx", ".mindir") else "checkpoint")

    # Only now, since they load MindSpore, which takes seconds.
    from tqdm import tqdm

    from mindska.prediction import find_images
    from mindska.tasks import predict_images

    with clear_errors():
        paths = find_images(options.images)
        if len(paths) > 1:
            print(f"{len(paths):,} images", file=sys.stderr)
        unreadable = []

        def predictions() -> Iterable[Any]:
            # For what is redirected only: on a terminal the lines themselves show how far it is.
            hidden = True if len(paths) == 1 or sys.stdout.isatty() else None  # None: where stderr is no terminal
            for prediction in tqdm(predict_images(options, paths), total=len(paths), unit="image", disable=hidden):
                if prediction.error:
                    unreadable.append(prediction)
                yield prediction

        {"text": write_text, "json": write_json, "csv": write_csv}[options.format](predictions())
    if unreadable:
        print(f"{len(unreadable)} of {len(paths)} images could not be read:", file=sys.stderr)
        print(*(f"  {printable(prediction.error)}" for prediction in unreadable), sep="\n", file=sys.stderr)
        sys.exit(1)
