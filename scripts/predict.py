"""Tells the classes of images.

    python scripts/predict.py cat.jpg --ckpt_path skanet_s.ckpt
    python scripts/predict.py photos/ --ckpt_path skanet_s.onnx --format csv > classes.csv

Model, preprocessing and class names come from the record in the checkpoint (of an exported model: beside it). An image
that cannot be read is reported, and the rest go on; then the exit code is 1.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable
from typing import Optional

from tqdm import tqdm

from mindska.errors import clear_errors, end_with_the_reader
from mindska.models.factory import OUR_MODELS
from mindska.prediction import Prediction, as_dict, find_images, open_predictor


def parse(arguments: Optional[list[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER", help="image files, or folders of them")
    parser.add_argument("--ckpt_path", required=True, metavar="FILE", help="weights, or an exported .onnx or .mindir")
    parser.add_argument(
        "--model", default="", choices=["", *sorted(OUR_MODELS)], metavar="NAME",
        help="model of mindska, where the file does not say it",
    )  # fmt: skip
    parser.add_argument("--topk", type=int, default=5, help="how many classes an image (default: 5)")
    parser.add_argument("--format", choices=("text", "json", "csv"), default="text", help="of what is printed")
    parser.add_argument("--batch_size", type=int, default=16, help="images at once (default: 16)")
    options = parser.parse_args(arguments)
    if options.topk < 1 or options.batch_size < 1:
        parser.error("--topk and --batch_size must be at least 1")
    return options


def write_text(predictions: Iterable[Prediction]) -> None:
    for prediction in predictions:
        print(prediction.path if not prediction.error else f"error: {prediction.error}")
        for index, name, probability in prediction.classes:
            print(f"  {100 * probability:6.2f} %  {name} ({index})")


def write_json(predictions: Iterable[Prediction]) -> None:
    json.dump([as_dict(prediction) for prediction in predictions], sys.stdout, indent=1, ensure_ascii=False)
    print()


def write_csv(predictions: Iterable[Prediction]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("path", "rank", "index", "name", "probability", "error"))
    for prediction in predictions:
        if prediction.error:
            writer.writerow((prediction.path, "", "", "", "", prediction.error))
        for rank, (index, name, probability) in enumerate(prediction.classes, start=1):
            writer.writerow((prediction.path, rank, index, name, f"{probability:.6f}", ""))


def main(arguments: Optional[list[str]] = None) -> None:
    options = parse(arguments)
    with clear_errors():
        paths = find_images(options.images)
        # One image or whole batches: every other number would be a compilation of its own.
        batch_size = options.batch_size if len(paths) > 1 else 1
        predictor = open_predictor(options.ckpt_path, options.model, batch_size=batch_size)
        unreadable = []

        def predictions() -> Iterable[Prediction]:
            # For what is redirected only: on a terminal the lines themselves show how far it is.
            hidden = True if len(paths) == 1 or sys.stdout.isatty() else None  # None: where stderr is no terminal
            for prediction in tqdm(predictor(paths, options.topk), total=len(paths), unit="image", disable=hidden):
                if prediction.error:
                    unreadable.append(prediction)
                yield prediction

        {"text": write_text, "json": write_json, "csv": write_csv}[options.format](predictions())
    if unreadable:
        print(f"{len(unreadable)} of {len(paths)} images could not be read:", file=sys.stderr)
        print(*(f"  {prediction.error}" for prediction in unreadable), sep="\n", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    end_with_the_reader()
    main()
