"""Parameters and multiply-accumulates of the models."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn
from mindspore.nn.utils import no_init_parameters

from .. import kernels, summary
from ..weights import methods


def empty(name: str) -> nn.Cell:
    """A network of plain operators without values: for what does not depend on them."""
    with kernels.plain(), no_init_parameters():
        net = methods.create(name)
    for parameter in net.get_parameters():
        parameter.set_data(Tensor(np.zeros(parameter.shape, np.float32)))
    return net


def count(name: str, height: int, width: int) -> tuple[int, int, int]:
    """(parameters, multiply-accumulates of convolutions and linear layers, of pairwise distances) for one image."""
    rows = summary.layers(empty(name), 3, height, width)
    return tuple(sum(values) for values in list(zip(*rows))[3:])
