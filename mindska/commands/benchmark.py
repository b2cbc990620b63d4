"""Measures the speed of our networks, and of the PyTorch references beside them, on this machine.

    mindska benchmark                                  five models, with and without the C++ operators
    mindska benchmark --models sknet50 --what forward folded --kernels both --compile
    mindska benchmark --models skanet_s --batch_size 1 --what forward folded --engines onnxruntime openvino
    mindska benchmark --models skanet_s --scaling      cost against image size, batch and ranks
    mindska benchmark --starts                         the first step of a first and of a second start
    mindska benchmark --import_orders                  whether the order of imports matters
    mindska benchmark --loader                         images a second of the training data alone

Every variant is a process; one after the other runs two steps, of which the second is timed, round by round: a slow
minute of the machine meets all of them. Printed: how many times as fast as PyTorch each is; then the median of the
rounds with the spread from the fastest to the slowest, the ratio of PyTorch's median to it, peak memory above the
empty process, the time of the first step (compilation), and the share of the machine's matrix-product rate
(multiply-accumulates as `mindska count` counts them; a training step has three times the forward's).
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Optional

from mindska.arguments import Parser, nearest
from mindska.benchmark import MODELS, WHAT
from mindska.benchmark.worker import ENGINES
from mindska.distributed.cores import share_of_cores
from mindska.errors import clear_errors
from mindska.files import check_writable, replacing, user_path
from mindska.names import OUR_MODELS, OUR_NETWORKS
from mindska.recipes import find


def parse(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, aliases={"--model": "--models"})
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help=f"default: {' '.join(MODELS)}")
    parser.add_argument(
        "--image_resize", type=int, nargs="+", metavar="N", help="height and width in pixels, or one number for both; "
        "default: the model's own (segmenters 512 512, RetinaNet and Mask R-CNN 512 640)",
    )  # fmt: skip
    parser.add_argument("--batch_size", dest="batch", type=int, default=8, metavar="N", help="images (default: 8)")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT, help="default: all")
    parser.add_argument("--kernels", choices=("on", "off", "both"), default="both", help="C++ operators")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="steps, not with --starts (default: 7)")
    parser.add_argument("--no_pytorch", dest="pytorch", action="store_false", help="leave PyTorch out")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    engines: Any = dict(nargs="+", choices=list(ENGINES), default=[], metavar="NAME")
    parser.add_argument("--engines", **engines, help="onnxruntime, openvino: the exported ONNX file's forward as well")
    parser.add_argument("--scaling", action="store_true", help="cost against size, batch and ranks instead")
    parser.add_argument("--starts", action="store_true", help="first step of a first and a second start instead")
    parser.add_argument("--import_orders", action="store_true", help="forward, after either order of imports instead")
    parser.add_argument("--loader", action="store_true", help="images a second of the training data alone instead")
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write all figures there as well")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.models if name not in OUR_NETWORKS]
    if unknown:
        hint = nearest(unknown[0], OUR_NETWORKS, "{}") or f"; known: {', '.join(OUR_MODELS)}"
        parser.error(f"{unknown[0]} is not a model of mindska{hint}")
    size = options.image_resize or [1]
    for name, value in dict(rounds=options.rounds, batch_size=options.batch, image_resize=min(size)).items():
        if value < 1:
            parser.error(f"--{name} is {value}; expected at least 1")
    if len(size) > 2:
        parser.error(f"--image_resize has {len(size)} numbers; expected one or two")
    compared = (options.pytorch or options.compile) and not (options.loader or options.starts)
    if options.engines and (options.scaling or options.starts or options.import_orders or options.what == ["train"]):
        parser.error(
            "--engines are compared in forward passes; leave out --scaling, --starts, --what train and the like"
        )
    for name in options.engines:
        if not find_spec(name):
            parser.error(f"{name} is not installed (pip install {name}); leave --engines {name} out")
    if compared and not find_spec("torch"):
        parser.error("PyTorch is not installed (pip install torch); --no_pytorch leaves it out")
    return options


def main(arguments: Optional[Sequence[str]] = None) -> None:
    options = parse(arguments)
    with clear_errors():
        if options.json:
            check_writable(options.json)
        measure(options)


def measure(options: argparse.Namespace) -> None:
    # Only now, since they load MindSpore, which takes seconds.
    from mindska.benchmark import measure as measured
    from mindska.benchmark.count import count
    from mindska.benchmark.tables import import_orders_table, scaling_table, starts_table, summary, table

    results: list[dict[str, Any]]
    machine = f"{platform.machine()}, {share_of_cores(1)} cores"
    if options.loader:
        for photo in measured.PHOTOS:
            rate = measured.loader_rate(find("skanet_s"), photo, options.rounds)
            print(f"{photo[0]}x{photo[1]} pixels: {rate:.0f} images/s on {machine}")
        return
    sizes = {model: measured.asked_size(model, options) for model in options.models}
    costs = {model: sum(count(model, *size)[1:]) for model, size in sizes.items()}  # or it is too small
    if options.starts:
        results = measured.starts(
            [variant for model in options.models for variant in measured.ours(model, options, cached=True)]
        )
        text = starts_table(results)
        finish(options, dict(machine=machine, results=results), f"{machine}, without imports\n\n{text}")
        return
    if options.import_orders:
        results = [result for model in options.models for result in measured.import_orders(model, options)]
        finish(options, dict(machine=machine, results=results), f"{machine}\n\n{import_orders_table(results)}")
        return
    rate = measured.gemm_rate()
    results = []
    for model in options.models:
        results += measured.scaling(model, options) if options.scaling else measured.compare(model, options)
    machine += f", GEMM {2 * rate / 1e9:.0f} GFLOP/s"
    text = scaling_table(results) if options.scaling else summary(results) + table(results, rate, costs)
    figures = dict(machine=machine, gemm=rate, results=results)
    finish(options, figures, f"{machine}, float32, median of {options.rounds} rounds\n\n{text}")


def finish(options: argparse.Namespace, figures: dict[str, Any], text: str) -> None:
    """Prints the text, and writes the figures where they were asked for."""
    print(text)
    if options.json:
        with replacing(options.json) as temporary:
            temporary.write_text(json.dumps(figures, indent=1) + "\n")
