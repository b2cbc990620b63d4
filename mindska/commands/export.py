"""Exports a network to ONNX or MindIR, and checks what was written against the network.

    mindska export --ckpt_path skanet_s.ckpt --format onnx --fold
    mindska export --ckpt_path van_tiny.ckpt --format onnx --int8 --calibration DATA/train --data_dir DATA

An ONNX file takes any number of images, and of any size where the network allows it (SkaNet does not); a MindIR takes
one shape. The record (model, preprocessing, class names) is written beside it as JSON, and into ONNX's metadata.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Optional

from mindska.arguments import Parser, add_model, add_overwrite, add_use_ema
from mindska.errors import ExportError, clear_errors, printable
from mindska.files import check_there, check_writable, user_path
from mindska.names import OUR_NETWORKS

FORMATS = ("mindir", "onnx")


def parse(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_model(
        parser, OUR_NETWORKS, "model of mindska; default: the one that the file names, or the only one that it fits"
    )
    parser.add_argument(
        "--ckpt_path", required=True, type=user_path, metavar="FILE", help="weights of any kind that is read"
    )
    add_use_ema(parser, "export")
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    parser.add_argument(
        "--image_resize", type=int, nargs="+", metavar="N",
        help="height and width in pixels, or one number for both; default: what the weights were trained for",
    )  # fmt: skip
    parser.add_argument(
        "--batch_size", type=int, metavar="N", help="images at once; default: any number in ONNX, one in MindIR"
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
    parser.add_argument("--to", type=user_path, metavar="OUT", help="default: MODEL.FORMAT beside the weights")
    add_overwrite(parser)
    options = parser.parse_args(arguments)
    if options.image_resize and (len(options.image_resize) > 2 or min(options.image_resize) < 1):
        parser.error(f"--image_resize {options.image_resize}: expected height and width, or one number for both")
    for name in ("batch_size", "calibration_images"):
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
    from mindska.export import record_path

    for target in (path, record_path(path)):
        check_writable(target, overwrite, "choose another name with --to, or allow it with --overwrite")


def main(arguments: Optional[Sequence[str]] = None) -> None:
    options = parse(arguments)
    with clear_errors():
        missing = [name for name in ("onnx", "onnxruntime") if options.format == "onnx" and not find_spec(name)]
        if missing:
            raise ExportError(f"ONNX needs more packages: pip install 'mindska[onnx]' (missing: {', '.join(missing)})")
        check_there(options.ckpt_path, "checkpoint")

    # Only now, since they load MindSpore, which takes seconds.
    from mindska.data import Preprocessing
    from mindska.export import export, read_model_record, record_path, shape_text
    from mindska.folding import fold
    from mindska.quantization import calibration_images, export_int8, validation_images
    from mindska.weights import open_weights

    with clear_errors():
        if options.to:
            check_target(options.to, options.overwrite)
        weights = open_weights(options.ckpt_path, options.model, options.use_ema)
        target = options.to or options.ckpt_path.with_name(f"{weights.model}.{options.format}")
        check_target(target, options.overwrite)
        size = options.image_resize or weights.preprocessing["image_size"]
        height, width = size if len(size) == 2 else size * 2
        record = dict(weights.record)
        record["preprocessing"] = dict(record["preprocessing"], image_size=[height, width])
        record["folded"] = options.fold or options.int8
        network = weights.network()
        if record["folded"]:
            fold(network)
        shape = (options.batch_size or 1, weights.in_channels, height, width)
        dynamic = dict(dynamic_batch=options.batch_size is None, dynamic_size=not options.fixed_size)
        print("writing it, and comparing what is written with the network ...", file=sys.stderr)
        if options.int8:
            pixels = Preprocessing(**record["preprocessing"])
            images = calibration_images(options.calibration, pixels, options.calibration_images)
            val = validation_images(options.data_dir, record) if options.data_dir else None
            result = str(export_int8(network, target, shape, record, images, val, **dynamic))
        else:
            agreement = export(network, target, shape, record, half=options.half, **dynamic)
            result = f"run from the file, its outputs differ from the network's by {agreement}"
        why = ""
        if options.format == "onnx" and not options.fixed_size:
            why = importlib.import_module("mindska.onnx_graph").sizes_are_fixed(network)  # which needs onnx
        taken = shape_text(read_model_record(target)["input_shape"]) + (f" ({why})" if why else "")
        print(f"wrote {printable(target)} for images {taken} and {printable(record_path(target).name)}; {result}")
