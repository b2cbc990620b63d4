"""Tells the classes of images.

    mindska predict cat.jpg --ckpt_path skanet_s.ckpt
    mindska predict photos/ --ckpt_path skanet_s.onnx --format csv > classes.csv
    mindska predict photos/ --ckpt_path skanet_s.ckpt --contact_sheet classes.png

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
from typing import TYPE_CHECKING, Optional

from mindska.arguments import Parser, add_model, add_use_ema
from mindska.errors import clear_errors, printable
from mindska.files import check_there, check_writable, user_path
from mindska.names import OUR_MODELS

if TYPE_CHECKING:
    from mindska.prediction import Prediction


def parse(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "images", nargs="+", type=user_path, metavar="IMAGE|FOLDER", help="image files, or folders of them"
    )
    parser.add_argument(
        "--ckpt_path", required=True, type=user_path, metavar="FILE", help="weights, or an exported .onnx or .mindir"
    )
    add_model(parser, OUR_MODELS, "model of mindska, where the file does not say it")
    add_use_ema(parser, "take")
    parser.add_argument("--exif_orientation", action="store_true", help="turn photos as their EXIF tag says")
    parser.add_argument("--topk", type=int, default=5, help="how many classes an image (default: 5)")
    parser.add_argument("--format", choices=("text", "json", "csv"), default="text", help="of what is printed")
    parser.add_argument(
        "--contact_sheet", type=user_path, metavar="FILE", help="write the pictures with their classes (PNG)"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="images at once (default: 16)")
    options = parser.parse_args(arguments)
    if options.topk < 1 or options.batch_size < 1:
        parser.error("--topk and --batch_size must be at least 1")
    return options


def write_text(predictions: Iterable[Prediction]) -> None:
    for prediction in predictions:
        print(printable(f"error: {prediction.error}" if prediction.error else prediction.path))
        for index, name, probability in prediction.classes:
            print(f"  {100 * probability:6.2f} %  {printable(name)} ({index})")


def write_json(predictions: Iterable[Prediction]) -> None:
    from mindska.prediction import as_dict

    entries = [as_dict(prediction) for prediction in predictions]
    ascii_only = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") != "utf8"
    text = json.dumps(entries, indent=1, ensure_ascii=ascii_only, allow_nan=False)
    # Of a file name that is not UTF-8, Python keeps the bytes as characters that cannot be written: JSON's escapes can.
    print(re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text))


def write_csv(predictions: Iterable[Prediction]) -> None:
    from mindska.data.lists import table_cell

    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("path", "rank", "index", "name", "probability", "error"))
    for prediction in predictions:
        if prediction.error:
            writer.writerow((table_cell(prediction.path), "", "", "", "", table_cell(prediction.error)))
        for rank, (index, name, probability) in enumerate(prediction.classes, start=1):
            writer.writerow((table_cell(prediction.path), rank, index, table_cell(name), f"{probability:.6f}", ""))


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

    from mindska.data.contact_sheet import check_sheet
    from mindska.prediction import ContactSheet, find_images, open_predictor

    with clear_errors():
        if options.contact_sheet:
            check_sheet(options.contact_sheet)
        paths = find_images(options.images)
        if len(paths) > 1:
            print(f"{len(paths):,} images", file=sys.stderr)
        # One image or whole batches: every other number would be a compilation of its own.
        batch_size = options.batch_size if len(paths) > 1 else 1
        predictor = open_predictor(
            options.ckpt_path, options.model, options.use_ema, batch_size, exif_orientation=options.exif_orientation
        )
        unreadable = []
        sheet = ContactSheet(options.exif_orientation)

        def predictions() -> Iterable[Prediction]:
            # For what is redirected only: on a terminal the lines themselves show how far it is.
            hidden = True if len(paths) == 1 or sys.stdout.isatty() else None  # None: where stderr is no terminal
            for prediction in tqdm(predictor(paths, options.topk), total=len(paths), unit="image", disable=hidden):
                if prediction.error:
                    unreadable.append(prediction)
                if options.contact_sheet:
                    sheet.add(prediction)
                yield prediction

        {"text": write_text, "json": write_json, "csv": write_csv}[options.format](predictions())
        if options.contact_sheet:
            print(f"{printable(options.contact_sheet)}: {sheet.write(options.contact_sheet)}", file=sys.stderr)
    if unreadable:
        print(f"{len(unreadable)} of {len(paths)} images could not be read:", file=sys.stderr)
        print(*(f"  {printable(prediction.error)}" for prediction in unreadable), sep="\n", file=sys.stderr)
        sys.exit(1)
