"""Exports a network to ONNX or MindIR, and checks what was written against the network.

    python scripts/export.py --ckpt_path skanet_s.ckpt --format onnx --fold
    python scripts/export.py --ckpt_path van_tiny.ckpt --format onnx --int8 --calibration DATA/train --data_dir DATA

An ONNX file takes any number of images, and of any size where the network allows it (SkaNet does not); a MindIR takes
one shape.
The record (model, preprocessing, class names) is written beside the model as JSON, and into an ONNX file's metadata.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Optional

from mindska.data import Preprocessing
from mindska.errors import clear_errors, printable
from mindska.export import FORMATS, check_packages, export, read_model_record, record_path, shape_text
from mindska.files import check_writable, user_path
from mindska.folding import fold
from mindska.models.factory import OUR_MODELS
from mindska.quantization import calibration_images, export_int8, validation_images
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
    parser.add_argument(
        "--batch", type=int, metavar="N", help="images at once; default: any number in ONNX, one in MindIR"
    )
    parser.add_argument("--fixed_size", action="store_true", help="ONNX: take the input size only, and no other")
    parser.add_argument("--half", action="store_true", help="ONNX: compute in float16 (input and outputs are float32)")
    parser.add_argument("--int8", action="store_true", help="ONNX: 8-bit weights and values; it folds")
    parser.add_argument("--calibration", type=user_path, metavar="FOLDER", help="images to calibrate --int8 with")
    parser.add_argument(
        "--calibration_images", type=int, default=256, metavar="N", help="how many of them at most (default: 256)"
    )
    parser.add_argument(
        "--data_dir", type=user_path, metavar="DATA", help="print the accuracy on DATA/val before and after --int8"
    )
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
    for name in ("batch", "calibration_images"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected a number of images")
    for name in ("half", "int8", "fixed_size"):
        if getattr(options, name) and options.format != "onnx":
            parser.error(f"--{name} is for --format onnx")
    if options.int8 and (options.half or not options.calibration):
        parser.error("--int8 wants --calibration FOLDER, with images like those it will see; and no --half")
    if (options.calibration or options.data_dir) and not options.int8:
        parser.error("--calibration and --data_dir are for --int8")
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
        record["folded"] = options.fold or options.int8
        network = weights.network()
        if record["folded"]:
            fold(network)
        shape = (options.batch or 1, weights.in_channels, height, width)
        dynamic = dict(dynamic_batch=options.batch is None, dynamic_size=not options.fixed_size)
        print("writing it, and comparing what is written with the network ...", file=sys.stderr)
        if options.int8:
            pixels = Preprocessing(**record["preprocessing"])
            images = calibration_images(options.calibration, pixels, options.calibration_images)
            val = validation_images(options.data_dir, record) if options.data_dir else None
            result = str(export_int8(network, target, shape, record, images, val, **dynamic))
        else:
            agreement = export(network, target, shape, record, half=options.half, **dynamic)
            result = f"run from the file, its outputs differ from the network's by {agreement}"
        taken = shape_text(read_model_record(target)["input_shape"])
        if options.format == "onnx" and not options.fixed_size:
            from mindska.onnx_graph import sizes_are_fixed

            taken += f" ({why})" if (why := sizes_are_fixed(network)) else ""
        print(f"wrote {printable(target)} for images {taken} and {printable(record_path(target).name)}; {result}")


if __name__ == "__main__":
    main()
