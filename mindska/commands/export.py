"""Exports a network to MindIR or ONNX, for inputs of one shape, and checks what was written against the network.

    mindska export --ckpt_path skanet_s.ckpt --format onnx --image_resize 256 256 --fold

The record (model, preprocessing, class names) is written beside the model as JSON, and into an ONNX file's metadata.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Optional

from mindska.arguments import Parser, add_model, add_overwrite, add_use_ema
from mindska.errors import ExportError, clear_errors, printable
from mindska.files import check_there, check_writable, user_path
from mindska.names import OUR_MODELS

FORMATS = ("mindir", "onnx")


def parse(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_model(
        parser, OUR_MODELS, "model of mindska; default: the one that the file names, or the only one that it fits"
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
    parser.add_argument("--batch_size", type=int, default=1, metavar="N", help="images at once (default: 1)")
    parser.add_argument(
        "--fold", action="store_true", help="fold batch norms and layer scales: the same function, faster"
    )
    parser.add_argument(
        "--to", type=user_path, metavar="OUT", help="file to write; default: MODEL.FORMAT beside the weights"
    )
    add_overwrite(parser)
    options = parser.parse_args(arguments)
    if options.image_resize and (len(options.image_resize) > 2 or min(options.image_resize) < 1):
        parser.error(f"--image_resize {options.image_resize}: expected height and width, or one number for both")
    if options.batch_size < 1:
        parser.error(f"--batch_size {options.batch_size}: expected a number of images")
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
    from mindska.export import export, record_path
    from mindska.folding import fold
    from mindska.weights import open_weights

    with clear_errors():
        if options.to:
            check_target(options.to, options.overwrite)
        weights = open_weights(options.ckpt_path, options.model, options.use_ema)
        target = options.to or options.ckpt_path.with_name(f"{weights.model}.{options.format}")
        check_target(target, options.overwrite)
        height, width = (options.image_resize or weights.preprocessing["image_size"])[:1] * 2
        if options.image_resize is None or len(options.image_resize) == 2:
            height, width = options.image_resize or weights.preprocessing["image_size"]
        record = dict(weights.record)
        record["preprocessing"] = dict(record["preprocessing"], image_size=[height, width])
        record["folded"] = options.fold
        network = weights.network()
        if options.fold:
            fold(network)
        shape = (options.batch_size, weights.in_channels, height, width)
        agreement = export(network, target, shape, record)
        print(
            f"wrote {printable(target)} for images {shape} and its record {printable(record_path(target).name)}; run "
            f"from the file, its outputs differ from the network's by {agreement}"
        )
