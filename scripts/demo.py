"""Shows a page on this machine: drop an image, see its classes and, of SKNets, which kernels the network chose.

    python scripts/demo.py --ckpt_path skanet_s.ckpt

The page is at http://127.0.0.1:7860/ and cannot be reached from other machines; of a machine far away,
`ssh -L 7860:localhost:7860 HOST` brings it to one's own. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
from contextlib import suppress
from typing import Optional

from mindska.errors import clear_errors
from mindska.files import user_path


def parse(arguments: Optional[list[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ckpt_path", required=True, type=user_path, metavar="FILE", help="weights, or an exported .onnx or .mindir"
    )
    parser.add_argument("--model", default="", metavar="NAME", help="model of mindska, where the file does not say it")
    parser.add_argument(
        "--use_ema", action=argparse.BooleanOptionalAction,
        help="take the averaged weights, or the raw ones; default: the averaged where the file has them",
    )  # fmt: skip
    parser.add_argument("--exif_orientation", action="store_true", help="turn photos as their EXIF tag says")
    parser.add_argument("--topk", type=int, default=5, help="how many classes are shown (default: 5)")
    parser.add_argument("--port", type=int, default=7860, help="of the page (default: 7860); 0: any that is free")
    options = parser.parse_args(arguments)
    if options.topk < 1:
        parser.error(f"--topk {options.topk}: expected a number of classes")
    if not 0 <= options.port <= 65535:
        parser.error(f"--port {options.port}: expected a number from 0 to 65535")
    return options


def main(arguments: Optional[list[str]] = None) -> None:
    options = parse(arguments)
    from mindska.demo import open_demo
    from mindska.prediction import open_predictor

    with clear_errors():
        predictor = open_predictor(
            options.ckpt_path, options.model, options.use_ema, 1, exif_orientation=options.exif_orientation
        )
        with open_demo(predictor, options.port, options.topk) as server, suppress(KeyboardInterrupt):
            print(f"{predictor.model} is shown at {server.url} (Ctrl-C ends it)", flush=True)
            server.serve_forever()


if __name__ == "__main__":
    main()
