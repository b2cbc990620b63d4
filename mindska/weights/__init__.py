"""Weights in and out: PyTorch's and Caffe's published ones, safetensors, MindSpore checkpoints."""

from . import factory  # noqa: F401  MindCV's factory loads our models strictly from now on
from .convert import WeightsError, for_channels, from_caffe, from_torch, to_torch
from .foreign import read_caffemodel, read_torch
from .loading import (
    Weights,
    describe,
    load_checkpoint_into,
    load_into,
    open_weights,
    read_weights,
    unusual_options,
)
from .source import MissingWeights, open_source

__all__ = [
    "MissingWeights",
    "Weights",
    "WeightsError",
    "describe",
    "for_channels",
    "from_caffe",
    "from_torch",
    "load_checkpoint_into",
    "load_into",
    "open_source",
    "open_weights",
    "read_caffemodel",
    "read_torch",
    "read_weights",
    "to_torch",
    "unusual_options",
]
