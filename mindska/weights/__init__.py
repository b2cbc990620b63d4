"""Weights in and out: the authors' PyTorch files, MindSpore checkpoints."""

from . import factory  # noqa: F401  MindCV's factory loads our models strictly from now on
from .convert import WeightsError, from_torch, to_torch
from .files import load_checkpoint_into, load_into, read_record, read_torch, read_weights

__all__ = [
    "WeightsError",
    "from_torch",
    "load_checkpoint_into",
    "load_into",
    "read_record",
    "read_torch",
    "read_weights",
    "to_torch",
]
