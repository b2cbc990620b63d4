"""What a weights file is, told from its content, and what it holds before any translation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from ..errors import UserError
from .convert import WeightsError, from_layers, unwrap
from .files import EMA_PREFIX, STATE_PREFIX, read_file, read_safetensors
from .foreign import read_caffemodel, read_torch

# kind of file -> the frameworks whose names its weights may have (see `names.py`)
KINDS = {
    "PyTorch": ("torch",),
    "safetensors": ("torch", "mindspore"),
    "Caffe": ("caffe",),
    "MindSpore": ("mindspore",),
}


class MissingWeights(UserError, FileNotFoundError):
    """A checkpoint file that does not exist."""


@dataclass(frozen=True)
class Source:
    """The weights in a file, under the file's own names.

    Attributes:
        kind: "PyTorch", "safetensors", "Caffe" or "MindSpore".
        averaged: they are an average over the training (EMA).
        record: what the file says of itself; of a file of ours everything, of others the epoch where it is known.
    """

    path: Path
    kind: str
    arrays: Mapping[str, Any]
    averaged: bool = False
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def frameworks(self) -> tuple[str, ...]:
        """The frameworks whose names the weights may have."""
        return KINDS[self.kind]


def kind_of(path: Union[str, Path]) -> str:
    """The kind of a weights file, by its first bytes.

    Raises:
        MissingWeights: there is no such file.
        WeightsError: it is nothing that holds weights.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingWeights(f"No checkpoint at {path.absolute()}")
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"):
        return "PyTorch"  # a zip archive, or a pickle as PyTorch wrote until version 1.5
    if head[8:9] == b"{":
        return "safetensors"
    if (
        head[:1] == b"\x0a"
    ):  # protobuf, field 1: of a checkpoint a message that begins with a field 1, of a net its name
        length = next((i for i in range(1, 10) if head[i : i + 1] < b"\x80"), 0)
        return "MindSpore" if head[1 + length : 2 + length] == b"\x0a" else "Caffe"
    if head[:1] in (b"\x12", b"\x1a") or head.startswith(b"\xa2\x06"):  # a net without a name: layers, inputs, layer
        return "Caffe"
    reason = "it is in HDF5, which only Caffe reads" if head.startswith(b"\x89HDF") else "its content is none of these"
    if path.suffix in (".onnx", ".mindir"):
        reason = "an exported model is for predicting"
    raise WeightsError(
        f"{path} is no file of weights ({reason}); known: PyTorch (.pth, .pth.tar, .bin), safetensors, Caffe "
        f"(.caffemodel) and MindSpore (.ckpt)"
    )


def open_source(path: Union[str, Path], ema: Optional[bool] = None) -> Source:
    """The weights in a file, whatever its kind.

    Args:
        ema: True for the averaged weights (an error when there are none), False for the raw ones, None for the averaged
            where the file has them, unless its record says that the raw ones scored higher (`weights: raw`).

    Raises:
        MissingWeights, WeightsError.
    """
    path, kind = Path(path), kind_of(path)
    if kind == "PyTorch":
        loaded = read_torch(path)
        averaged = isinstance(loaded.get("state_dict_ema"), Mapping) if ema is None else ema
        known = {name: loaded[name] for name in ("epoch", "metric") if isinstance(loaded.get(name), (int, float))}
        return Source(path, kind, unwrap(loaded, averaged), averaged, known)
    if kind == "Caffe":
        arrays, record = from_layers(read_caffemodel(path)), {}
    else:
        arrays, record = (read_safetensors if kind == "safetensors" else read_file)(path)
    average = {name[len(EMA_PREFIX) :]: array for name, array in arrays.items() if name.startswith(EMA_PREFIX)}
    if ema and not average:
        raise WeightsError(f"{path} has no averaged (EMA) weights")
    if average and (ema or (ema is None and record.get("weights") != "raw")):  # the raw ones scored higher
        return Source(path, kind, average, True, record)
    raw = {name: array for name, array in arrays.items() if not name.startswith((EMA_PREFIX, STATE_PREFIX))}
    return Source(path, kind, raw, False, record)
