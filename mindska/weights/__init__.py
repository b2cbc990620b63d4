"""Weights in and out: PyTorch's and Caffe's published ones, safetensors, MindSpore checkpoints.

One entry point: `open_weights(path)` gives a file's weights with their record; `load_into` puts them into a network.
"""

from ..errors import MissingWeights, WeightsError
from . import factory  # noqa: F401  MindCV's factory loads our models strictly from now on
from .convert import from_caffe, from_torch, to_torch
from .foreign import read_caffemodel, read_torch
from .loading import Weights, load_into, non_default_options, open_weights

__all__ = [
    "MissingWeights",
    "Weights",
    "WeightsError",
    "from_caffe",
    "from_torch",
    "load_into",
    "open_weights",
    "read_caffemodel",
    "read_torch",
    "to_torch",
    "non_default_options",
]
