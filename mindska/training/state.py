"""What a checkpoint holds, and how a run goes on from one.

A checkpoint is one MindSpore file: the weights under their names, the averaged weights under `ema.` (MindCV's
convention, so that its factory can load either), everything else that a resumed run needs under `state.`, and a record
(JSON) that says what it is. It is written whole or not at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore import Parameter

from ..weights import WeightsError
from ..weights.files import EMA_PREFIX, STATE_PREFIX, read_file, write_checkpoint
from ..weights.loading import load_into
from .step import TrainStep

NOT_STATE = "learning_rate"  # the optimiser's table of learning rates: it follows from the configuration


def _state_parameters(step: TrainStep) -> dict[str, Parameter]:
    return {f"{STATE_PREFIX}{p.name}": p for p in step.state() if not p.name.startswith(NOT_STATE)}


def weight_parameters(step: TrainStep) -> dict[str, Parameter]:
    """The network's parameters and, when there is one, their average under `ema.`."""
    weights = {p.name: p for p in step.network.get_parameters()}
    return {**weights, **{p.name: p for p in step.ema or ()}}


def save_state(path: Path, step: TrainStep, record: dict[str, Any]) -> None:
    """Writes all that a resumed run needs; to be called between two updates."""
    write_checkpoint(path, {**weight_parameters(step), **_state_parameters(step)}, record)


def load_state(path: Path, step: TrainStep) -> dict[str, Any]:
    """Restores what `save_state` wrote, and returns its record.

    Raises:
        WeightsError: the file is damaged or belongs to another network or optimiser.
    """
    arrays, record = read_file(path, checksum_required=True)
    targets = _state_parameters(step)
    lost = sorted(set(targets) ^ {name for name in arrays if name.startswith(STATE_PREFIX)})
    if lost:
        raise WeightsError(f"{path}: its training state does not fit this configuration; first difference: {lost[0]}")
    network = {n: a for n, a in arrays.items() if not n.startswith((STATE_PREFIX, EMA_PREFIX))}
    load_into(step.network, network, str(path))
    averaged = {p.name: p for p in step.ema or ()}
    for name, parameter in {**targets, **averaged}.items():
        if name not in arrays or arrays[name].size != parameter.size:
            raise WeightsError(f"{path}: {name} is missing or has another shape")
        parameter.set_data(ms.Tensor(arrays[name].reshape(parameter.shape), parameter.dtype))
    return record
