"""Prints parameters and multiply-accumulates of our models: `python scripts/count.py [MODEL ...] [--image_resize N]`.

Counted: output elements times weights per output of every convolution and linear layer ("conv + linear"), and the
pairwise distances of the neighbour search ("distances"). Not counted: biases, norms, activations, pooling, gathering.
"""

from __future__ import annotations

import argparse

import mindcv
import numpy as np
from mindcv.models.registry import get_pretrained_cfg
from mindspore import Tensor, nn
from mindspore.nn.utils import no_init_parameters

from mindska import kernels
from mindska.models.factory import OUR_MODELS
from mindska.models.layers.graph import MaxRelativeConv


def count(name: str, height: int, width: int) -> tuple[int, int, int]:
    """(parameters, multiply-accumulates of convolutions and linear layers, of pairwise distances) for one image."""
    macs = {"layers": 0, "distances": 0}
    with kernels.plain(), no_init_parameters():  # every convolution is a layer whose hook is called
        net = mindcv.create_model(name)
    for parameter in net.get_parameters():  # no value matters
        parameter.set_data(Tensor(np.zeros(parameter.shape, np.float32)))

    def layer(cell, inputs, output):
        macs["layers"] += output.size * cell.weight.size // cell.weight.shape[0]

    def distances(cell, inputs, output):
        queries, keys = cell.nodes(inputs[0])
        macs["distances"] += queries.size * keys.shape[1]

    for _, cell in net.cells_and_names():
        if isinstance(cell, (nn.Conv2d, nn.Dense)):
            cell.register_forward_hook(layer)
        elif isinstance(cell, MaxRelativeConv):
            cell.register_forward_hook(distances)
    net.set_train(False)(Tensor(np.zeros((1, 3, height, width), np.float32)))
    return sum(p.size for p in net.trainable_params()), macs["layers"], macs["distances"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=sorted(OUR_MODELS), metavar="MODEL")
    parser.add_argument("--image_resize", type=int, help="input size in pixels; default: the model's own")
    arguments = parser.parse_args()
    print("| model | input | parameters | conv + linear, G MACs | distances, G MACs |\n|---|---|---|---|---|")
    for name in arguments.models:
        if name not in OUR_MODELS:
            parser.error(f"unknown model {name!r}; known: {', '.join(sorted(OUR_MODELS))}")
        size = arguments.image_resize or get_pretrained_cfg(name)["input_size"][1]
        parameters, layers, distances = count(name, size, size)
        print(f"| {name} | {size} | {parameters:,} | {layers / 1e9:.4f} | {distances / 1e9:.4f} |")


if __name__ == "__main__":
    main()
