"""Shows a page on this machine: drop an image, see its classes and, of SKNets, which kernels the network chose.

    mindska demo --ckpt_path skanet_s.ckpt

The page is at http://127.0.0.1:7860/ and cannot be reached from other machines; of a machine far away,
`ssh -L 7860:localhost:7860 HOST` brings it to one's own. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from typing import Optional

from mindska.arguments import Parser, add_model, add_use_ema
from mindska.errors import clear_errors
from mindska.files import check_there, user_path
from mindska.names import OUR_MODELS


def parse(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--ckpt_path", required=True, type=user_path, metavar="FILE", help="weights, or an exported .onnx or .mindir"
    )
    add_model(parser, OUR_MODELS, "model of mindska, where the file does not say it")
    add_use_ema(parser, "take")
    parser.add_argument("--exif_orientation", action="store_true", help="turn photos as their EXIF tag says")
    parser.add_argument("--topk", type=int, default=5, help="how many classes are shown (default: 5)")
    parser.add_argument("--port", type=int, default=7860, help="of the page (default: 7860); 0: any that is free")
    options = parser.parse_args(arguments)
    if options.topk < 1:
        parser.error(f"--topk {options.topk}: expected a number of classes")
    if not 0 <= options.port <= 65535:
        parser.error(f"--port {options.port}: expected a number from 0 to 65535")
    return options


def main(arguments: Optional[Sequence[str]] = None) -> None:
    options = parse(arguments)
    with clear_errors():
        check_there(options.ckpt_path, "model")

    # Only now, since they load MindSpore, which takes seconds.
    from mindska.demo import open_demo
    from mindska.prediction import open_predictor

    with clear_errors():
        predictor = open_predictor(
            options.ckpt_path, options.model, options.use_ema, 1, exif_orientation=options.exif_orientation
        )
        with open_demo(predictor, options.port, options.topk) as server, suppress(KeyboardInterrupt):
            print(f"{predictor.model} is shown at {server.url} (Ctrl-C ends it)", flush=True)
            server.serve_forever()
