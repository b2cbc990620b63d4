"""Weights in and out: PyTorch's and Caffe's published ones, MindSpore checkpoints."""

from . import factory  # noqa: F401  MindCV's factory loads our models strictly from now on
from .convert import WeightsError, from_caffe, from_torch, to_torch
from .files import load_checkpoint_into, load_into, read_record, read_torch, read_weights

__all__ = [
    "WeightsError",
    "from_caffe",
    "from_torch",
    "load_checkpoint_into",
    "load_into",
    "read_record",
    "read_torch",
    "read_weights",
    "to_torch",
]
