"""What a weights file is, told from its content, and what it holds before any translation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from ..errors import MissingWeights, WeightsError, few, printable
from .convert import STATE_PREFIX, from_layers, split
from .files import MOST_BYTES, read_file, read_safetensors
from .foreign import read_caffemodel, read_torch

log = logging.getLogger("mindska")

# kind of file -> the frameworks whose names its weights may have (see `names.py`)
KINDS = {
    "PyTorch": ("torch",),
    "safetensors": ("torch", "mindspore"),
    "Caffe": ("caffe",),
    "MindSpore": ("mindspore",),
}


@dataclass(frozen=True)
class Source:
    """The weights in a file, under the file's own names.

    Attributes:
        kind: "PyTorch", "safetensors", "Caffe" or "MindSpore".
        averaged: they are an average over the training (EMA).
        both: the file has averaged and raw weights.
        record: what the file says of itself; of a file of ours everything, of others the epoch where it is known.
    """

    path: Path
    kind: str
    arrays: Mapping[str, Any]
    averaged: bool = False
    both: bool = False
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def choice(self) -> str:
        """A line on the choice between averaged and raw weights; empty where there is none."""
        if not self.both:
            return ""
        taken, other, words = (
            ("averaged (EMA)", "raw", "--no-use_ema") if self.averaged else ("raw", "averaged (EMA)", "--use_ema")
        )
        value = not self.averaged
        return (
            f"{self.path}: the {taken} weights are taken; the file has the {other} ones as well ({words}, in train.py "
            f"and validate.py --use_ema {str(value).lower()}; in Python open_weights(path, ema={value}))"
        )

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
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    if path.stat().st_size > MOST_BYTES:
        raise WeightsError(f"{path} has {path.stat().st_size:,} bytes; expected at most {MOST_BYTES:,}")
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
        choice = split(loaded)
        record = {name: loaded[name] for name in ("epoch", "metric") if _is_number(loaded.get(name))}
    else:
        if kind == "Caffe":
            arrays, record = from_layers(read_caffemodel(path)), {}
        else:
            arrays, record = (read_safetensors if kind == "safetensors" else read_file)(path)
        choice = split({name: array for name, array in arrays.items() if not name.startswith(STATE_PREFIX)})
    if ema is None and choice.both and record.get("weights") == "raw":
        ema = False  # of a run: the raw weights scored higher
    weights, averaged = choice.take(ema, str(path))
    if choice.others:
        log.warning("%s also has weights under %s, which are not read", printable(path), few(choice.others))
    return Source(path, kind, weights, averaged, choice.both, record)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9  # no NaN either
