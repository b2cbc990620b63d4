"""What a checkpoint holds, and how a run goes on from one.

A checkpoint is one MindSpore file: the weights under their names, the averaged weights under `ema.` (MindCV's
convention, so that its factory can load either), everything else that a resumed run needs under `state.`, and a record
(JSON) that says what it is. It is written beside its place and moved there, so that no reader ever sees half of one.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore import Parameter

from ..weights import WeightsError
from ..weights.files import EMA_PREFIX, RECORD, STATE_PREFIX, load_into, read_file
from .step import TrainStep

KEEP_NEWEST = 2  # so that a damaged newest file leaves one to fall back to
NOT_STATE = "learning_rate"  # the optimiser's table of learning rates: it follows from the configuration


def write_checkpoint(path: Path, parameters: dict[str, Parameter], record: dict[str, Any]) -> None:
    """Writes parameters and record to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    entries = [{"name": name, "data": parameter} for name, parameter in parameters.items()]
    try:
        ms.save_checkpoint(entries, str(temporary), append_dict={RECORD: json.dumps(record)}, crc_check=True)
        temporary.chmod(0o644)  # MindSpore makes it readable for its owner only
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
    arrays, record = read_file(path)
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


@dataclass(frozen=True)
class Saved:
    """A checkpoint in the output folder, after so many finished epochs and steps."""

    path: Path
    epoch: int
    step: int


class CheckpointFolder:
    """The checkpoints of one run: the newest two, the best `keep_best`, and `{model}_best.ckpt` (weights only)."""

    def __init__(self, folder: Path, model: str, keep_best: int) -> None:
        self.folder, self.model, self.keep_best = folder, model, keep_best
        self.pattern = re.compile(rf"{re.escape(model)}-(\d+)_(\d+)\.ckpt")

    @property
    def best_path(self) -> Path:
        return self.folder / f"{self.model}_best.ckpt"

    def clean(self) -> None:
        """Removes what a killed process left half-written."""
        for path in self.folder.glob(".*.tmp*"):
            path.unlink()

    def saved(self) -> list[Saved]:
        """The run's checkpoints, newest first."""
        found = ((path, self.pattern.fullmatch(path.name)) for path in self.folder.glob(f"{self.model}-*.ckpt"))
        all_saved = [Saved(path, int(match[1]), int(match[2])) for path, match in found if match]
        return sorted(all_saved, key=lambda saved: saved.step, reverse=True)

    def path(self, epoch: int, step: int) -> Path:
        """`{model}-{finished epochs}_{finished steps}.ckpt`"""
        return self.folder / f"{self.model}-{epoch}_{step}.ckpt"

    def prune(self, scores: dict[int, float]) -> None:
        """Deletes all but the newest two and the best `keep_best`; `scores`: top-1 of the evaluated steps."""
        saved = self.saved()
        ranked = sorted((s for s in saved if s.step in scores), key=lambda s: (-scores[s.step], s.step))
        keep = {s.path for s in saved[:KEEP_NEWEST] + ranked[: self.keep_best]}
        for entry in saved:
            if entry.path not in keep:
                entry.path.unlink()
