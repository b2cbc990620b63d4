"""Weights from files, strictly: a file that is missing or does not fit is an error that says what differs."""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, Union

import mindspore as ms
import numpy as np
from mindspore import nn

from ..errors import UserError
from .convert import WeightsError, from_torch, listing, rather, recognise, unwrap

EMA_PREFIX = "ema."  # MindCV's convention: averaged weights lie beside the raw ones under this prefix
STATE_PREFIX = "state."  # everything else that a training checkpoint holds
RECORD = "state.record"  # JSON: what the file is (model, preprocessing, classes, epoch, ...)
CHECKSUM = b"crc_num"  # what MindSpore writes before the ten bytes of a checkpoint's checksum, at its end
NORM_EPS = 1e-6  # of the authors' classifiers
TORCH_SUFFIXES = (".pth", ".pt", ".tar", ".bin")


class MissingWeights(UserError, FileNotFoundError):
    """A checkpoint file that does not exist."""


def read_torch(path: Union[str, Path]) -> Mapping:
    """A PyTorch checkpoint, read by the safe loader only (tensors and plain containers; no code is run).

    Raises:
        WeightsError: PyTorch is not installed, or the file holds anything else.
    """
    try:
        import torch
    except ImportError as error:
        raise WeightsError(
            f"Reading {path} needs PyTorch (pip install torch), or convert the file elsewhere."
        ) from error
    _refuse_compressed(Path(path))
    try:
        # timm saves its command line, an argparse.Namespace, with the weights: a plain container as well.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch's message would advise to switch the safe loader off
        raise WeightsError(
            f"{path} was not opened: it is damaged, no PyTorch file, or holds more than plain weights, and to run "
            f"code from a file is not safe. Save its state dict alone (torch.save(model.state_dict(), FILE))."
        ) from error
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path} holds a {type(loaded).__name__}; expected a state dict")
    return loaded


def _refuse_compressed(path: Path) -> None:
    """PyTorch stores its arrays uncompressed; a compressed archive may be a bomb that fills the memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size:
            raise WeightsError(
                f"{path} was not opened: it would unpack to {unpacked:,} bytes from {path.stat().st_size:,}, but "
                f"PyTorch's files are not compressed"
            )


def read_file(path: Union[str, Path], checksum_required: bool = False) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All arrays of a MindSpore checkpoint, and its record (empty when it was not written by mindska).

    Raises:
        MissingWeights; WeightsError when the file is damaged, is no checkpoint, or lacks a checksum that is required.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingWeights(f"No checkpoint at {path.absolute()}")
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(CHECKSUM) - 10))
        checked = file.read(len(CHECKSUM)) == CHECKSUM
    if checksum_required and not checked:
        raise WeightsError(f"{path} is damaged: its end, with the checksum, is missing")
    try:
        loaded = ms.load_checkpoint(str(path), crc_check=checked)
        # Strings and numbers (MindCV appends some) are no parameters.
        arrays = {name: value.asnumpy() for name, value in loaded.items() if isinstance(value, ms.Tensor)}
        record = json.loads(loaded.get(RECORD, "{}"))
    except Exception as error:  # a hostile or damaged file may break MindSpore's reader anywhere
        raise WeightsError(
            f"{path} is not a readable MindSpore checkpoint: {str(error).partition(chr(10))[0]}"
        ) from error
    if record and not checked:
        raise WeightsError(f"{path} is damaged: its end, with the checksum, is missing")
    return arrays, record


def read_record(path: Union[str, Path]) -> dict[str, Any]:
    """What a checkpoint says of itself (model, classes, preprocessing, ...); empty for files that say nothing."""
    path = Path(path)
    return {} if path.suffix in TORCH_SUFFIXES else read_file(path)[1]


def read_weights(
    path: Union[str, Path], model_name: str, ema: Optional[bool] = None, norm_eps: Optional[float] = None
) -> dict[str, np.ndarray]:
    """Parameters (name -> array) of `model_name` in a MindSpore checkpoint or the authors' PyTorch file.

    Args:
        ema: True for the averaged weights (an error when there are none), False for the raw ones, None for the averaged
            where the file has them.
        norm_eps: epsilon of the network's layer norms, if it has any: compared with what published weights mean.

    Raises:
        FileNotFoundError, WeightsError.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingWeights(f"No checkpoint at {path.absolute()}")
    if path.suffix in TORCH_SUFFIXES:
        loaded = read_torch(path)
        use_ema = "state_dict_ema" in loaded if ema is None else ema
        weights = from_torch(model_name, loaded, use_ema)
        dialect = recognise(model_name, unwrap(loaded, use_ema), "torch")
        if norm_eps is not None and norm_eps != (dialect.norm_eps or NORM_EPS):
            raise WeightsError(
                f"{path} comes from {dialect.name}, whose layer norms have the epsilon {dialect.norm_eps or NORM_EPS}; "
                f"the network was made with {norm_eps}. Pass norm_eps={dialect.norm_eps or NORM_EPS} to create_model."
            )
        return weights
    arrays, _ = read_file(path)
    averaged = {name[len(EMA_PREFIX) :]: array for name, array in arrays.items() if name.startswith(EMA_PREFIX)}
    if ema and not averaged:
        raise WeightsError(f"{path} has no averaged (EMA) weights")
    if averaged and ema is not False:
        return averaged
    return {name: array for name, array in arrays.items() if not name.startswith((EMA_PREFIX, STATE_PREFIX))}


def load_into(net: nn.Cell, weights: Mapping[str, np.ndarray], source: str = "these weights") -> None:
    """Puts weights into a network; every parameter is filled and every weight used.

    A network made with `features_only` has no classifier: then the classifier's weights may be left over.

    Raises:
        WeightsError: names or shapes differ; the message lists them. The network is then unchanged.
    """
    parameters = {p.name: p for p in net.get_parameters()}
    missing = [f"{name} {parameters[name].shape}" for name in parameters if name not in weights]
    spare = "classifier." if getattr(net, "features_only", False) else ()
    unknown = [
        f"{name} {tuple(weights[name].shape)}"
        for name in weights
        if name not in parameters and not (spare and name.startswith(spare))
    ]
    wrong = [
        f"{name}: {tuple(weights[name].shape)} in the file, {tuple(p.shape)} in the network"
        for name, p in parameters.items()
        if name in weights and tuple(weights[name].shape) != tuple(p.shape)
    ]
    if missing or unknown or wrong:
        model_name = getattr(net, "model_name", type(net).__name__)
        raise WeightsError(
            f"{source} does not fit {model_name}{rather(model_name, weights, 'mindspore')}."
            + listing("missing in the file", missing)
            + listing("unknown to the network", unknown)
            + listing("of another shape", wrong)
        )
    for name, parameter in parameters.items():
        parameter.set_data(ms.Tensor(np.ascontiguousarray(weights[name]), parameter.dtype))


def load_checkpoint_into(net: nn.Cell, path: Union[str, Path], ema: Optional[bool] = None) -> None:
    """Loads a checkpoint file (see `read_weights`) into a model of mindska (see `load_into`)."""
    weights = read_weights(path, net.model_name, ema, getattr(net, "norm_eps", None))
    load_into(net, weights, str(path))
