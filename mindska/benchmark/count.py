"""Parameters and multiply-accumulates of the models."""

from __future__ import annotations

import mindcv
import numpy as np
from mindspore import Tensor, nn
from mindspore.nn.utils import no_init_parameters

from .. import kernels
from ..models.layers.graph import MaxRelativeConv


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
