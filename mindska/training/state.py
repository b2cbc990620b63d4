"""What a checkpoint holds, and how a run goes on from one.

A checkpoint is one MindSpore file: the weights under their names, the averaged weights under `ema.` (MindCV's
convention, so that its factory can load either), everything else that a resumed run needs under `state.`, and a record
(JSON) that says what it is. It is written beside its place and moved there, so that no reader ever sees half of one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore import Parameter

from ..weights import WeightsError
from ..weights.files import EMA_PREFIX, RECORD, STATE_PREFIX, load_into, read_file
from .folder import RunError
from .step import TrainStep

NOT_STATE = "learning_rate"  # the optimiser's table of learning rates: it follows from the configuration


def write_checkpoint(path: Path, parameters: dict[str, Parameter], record: dict[str, Any]) -> None:
    """Writes parameters and record to `path`, whole or not at all.

    Raises:
        RunError: it cannot be written; what lay there before is intact.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    entries = [{"name": name, "data": parameter} for name, parameter in parameters.items()]
    try:
        ms.save_checkpoint(entries, str(temporary), append_dict={RECORD: json.dumps(record)}, crc_check=True)
        temporary.chmod(0o644)  # MindSpore makes it readable for its owner only
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise RunError(
            f"The checkpoint {path} could not be written: {error}. Earlier checkpoints are intact; make room or mend "
            f"the folder, and the same command goes on from the newest."
        ) from error
    finally:
        for left in path.parent.glob(f"{temporary.stem}*"):  # MindSpore writes to yet another temporary file
            left.unlink()


def _state_parameters(step: TrainStep) -> dict[str, Parameter]:
    return {f"{STATE_PREFIX}{p.name}": p for p in step.state() if not p.name.startswith(NOT_STATE)}


def weight_parameters(step: TrainStep) -> dict[str, Parameter]:
    """The network's parameters and, when there is one, their average under `ema.`."""
    weights = {p.name: p for p in step.network.get_parameters()}
    return {**weights, **{p.name: p for p in step.ema or ()}}


def save_state(path: Path, step: TrainStep, record: dict[str, Any]) -> None:
    """Writes all that a resumed run needs."""
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
