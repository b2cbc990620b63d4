"""Exports a network to MindIR or ONNX, for inputs of one shape, and checks what was written against the network.

    python scripts/export.py --ckpt_path skanet_s.ckpt --format onnx --input_size 256 256 --fold

The record (model, preprocessing, class names) is written beside the model as JSON, and into an ONNX file's metadata.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Optional

from mindska.errors import clear_errors, printable
from mindska.export import FORMATS, check_packages, export, record_path
from mindska.files import check_writable, user_path
from mindska.folding import fold
from mindska.models.factory import OUR_MODELS
from mindska.weights import open_weights


def parse(arguments: Optional[list[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="", choices=["", *sorted(OUR_MODELS)], metavar="NAME",
        help="model of mindska; default: the one that the file names, or the only one that it fits",
    )  # fmt: skip
    parser.add_argument(
        "--ckpt_path", required=True, type=user_path, metavar="FILE", help="weights of any kind that is read"
    )
    parser.add_argument(
        "--use_ema", action=argparse.BooleanOptionalAction,
        help="export the averaged weights, or the raw ones; default: the averaged where the file has them",
    )  # fmt: skip
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    parser.add_argument(
        "--input_size", type=int, nargs="+", metavar="N",
        help="height and width in pixels, or one number for both; default: what the weights were trained for",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images at once (default: 1)")
    parser.add_argument(
        "--fold", action="store_true", help="fold batch norms and layer scales: the same function, faster"
    )
    parser.add_argument(
        "--to", type=user_path, metavar="OUT", help="file to write; default: MODEL.FORMAT beside the weights"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT when it exists")
    options = parser.parse_args(arguments)
    if options.input_size and (len(options.input_size) > 2 or min(options.input_size) < 1):
        parser.error(f"--input_size {options.input_size}: expected height and width, or one number for both")
    if options.batch < 1:
        parser.error(f"--batch {options.batch}: expected a number of images")
    if options.to and options.to.suffix != f".{options.format}":
        parser.error(f"--to {options.to}: expected a name that ends in .{options.format}")
    return options


def check_target(path: Path, overwrite: bool) -> None:
    """WriteError when a model or its record cannot be written."""
    for target in (path, record_path(path)):
        check_writable(target, overwrite, "choose another name with --to, or allow it with --overwrite")


def main(arguments: Optional[list[str]] = None) -> None:
    options = parse(arguments)
    with clear_errors():
        check_packages(options.format)
        if options.to:
            check_target(options.to, options.overwrite)
        weights = open_weights(options.ckpt_path, options.model, options.use_ema)
        target = options.to or options.ckpt_path.with_name(f"{weights.model}.{options.format}")
        check_target(target, options.overwrite)
        height, width = (options.input_size or weights.preprocessing["image_size"])[:1] * 2
        if options.input_size is None or len(options.input_size) == 2:
            height, width = options.input_size or weights.preprocessing["image_size"]
        record = dict(weights.record)
        record["preprocessing"] = dict(record["preprocessing"], image_size=[height, width])
        record["folded"] = options.fold
        network = weights.network()
        if options.fold:
            fold(network)
        shape = (options.batch, weights.in_channels, height, width)
        agreement = export(network, target, shape, record)
        print(
            f"wrote {printable(target)} for images {shape} and its record {printable(record_path(target).name)}; run "
            f"from the file, its outputs differ from the network's by {agreement}"
        )


if __name__ == "__main__":
    main()
