"""Weights into a file of the kind that its name says, checked by reading it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import WeightsError, WriteError
from ..files import as_oserror, replacing
from .convert import to_torch
from .files import write_checkpoint, write_safetensors
from .foreign import write_torch
from .loading import open_weights


def write_weights(path: Path, parameters: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    """Writes weights (under our names) and their record, and reads them again to compare them bit by bit.

    `.ckpt`: a MindSpore checkpoint with a checksum. `.safetensors`: our names, the record as metadata. `.pth` and
    relatives: a state dict with the authors' names (of the SKNets timm's); PyTorch's files have no place for a record.

    Raises:
        WriteError: it cannot be written. What was there before is intact.
    """
    with replacing(path) as temporary:
        if path.suffix == ".ckpt":
            write_checkpoint(temporary, parameters, record)
        elif path.suffix == ".safetensors":
            write_safetensors(temporary, parameters, record)
        else:
            with as_oserror(RuntimeError):
                write_torch(temporary, to_torch(record["model"], parameters))
        _compare(temporary, parameters, record["model"])


def _compare(path: Path, parameters: dict[str, np.ndarray], model: str) -> None:
    """WriteError when a file does not hold these weights."""
    try:
        again = open_weights(path, model, ema=False).parameters
    except WeightsError as error:
        raise WriteError(f"{path.name} cannot be read again, and is not kept: {error}") from error
    differing = [
        name for name, value in parameters.items() if name not in again or not np.array_equal(again[name], value, True)
    ]
    if differing or len(again) != len(parameters):
        raise WriteError(f"{path.name}, read again, has other weights, and is not kept: {differing[:5]}")
