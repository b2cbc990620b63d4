"""Prints parameters and multiply-accumulates of our models: `mindska count [MODEL ...] [--image_resize N] [--layers]`.

Counted: output elements times weights per output of every convolution and linear layer ("conv + linear"), and the
pairwise distances of the neighbour search ("distances"). Not counted: biases, norms, activations, pooling, gathering.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from mindska.arguments import Parser, nearest
from mindska.errors import clear_errors
from mindska.names import OUR_MODELS


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = Parser(description=__doc__, aliases={"--model": "", "--models": ""})
    parser.add_argument("models", nargs="*", default=sorted(OUR_MODELS), metavar="MODEL")
    parser.add_argument("--image_resize", type=int, metavar="N", help="input size in pixels; default: the model's own")
    parser.add_argument("--layers", action="store_true", help="a table of the layers of each model, in place of a row")
    options = parser.parse_args(arguments)
    if options.image_resize is not None and options.image_resize < 1:
        parser.error(f"--image_resize is {options.image_resize}; expected at least 1")
    for name in options.models:
        if name not in OUR_MODELS:
            known = nearest(name, OUR_MODELS, "{}") or f"; known: {', '.join(sorted(OUR_MODELS))}"
            parser.error(f"unknown model {name!r}{known}")

    # Only now, since they load MindSpore, which takes seconds.
    from mindcv.models.registry import get_pretrained_cfg

    from mindska import summary
    from mindska.benchmark.count import count, empty

    if options.layers:
        for name in options.models:
            size = options.image_resize or get_pretrained_cfg(name)["input_size"][1]
            with clear_errors():
                print(f"{name}, 3x{size}x{size}\n\n{summary.table(summary.layers(empty(name), 3, size, size))}\n")
        return
    print("| model | input | parameters | conv + linear, G MACs | distances, G MACs |\n|---|---|---|---|---|")
    for name in options.models:
        size = options.image_resize or get_pretrained_cfg(name)["input_size"][1]
        with clear_errors():
            parameters, layers, distances = count(name, size, size)
        print(f"| {name} | {size} | {parameters:,} | {layers / 1e9:.4f} | {distances / 1e9:.4f} |")
