"""What a checkpoint holds, and how a run goes on from one.

A checkpoint is one MindSpore file: the weights under their names, the averaged weights under `ema.` (MindCV's
convention, so that its factory can load either), everything else that a resumed run needs under `state.`, and a record
(JSON) that says what it is. It is written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import mindspore as ms
import numpy as np
from mindspore import Parameter

from ..data import Preprocessing
from ..errors import RunError, WeightsError
from ..models.factory import own_preprocessing
from ..weights.convert import EMA_PREFIX, STATE_PREFIX
from ..weights.files import read_file
from ..weights.loading import load_into
from .folder import Saved
from .step import TrainStep

NOT_STATE = "learning_rate"  # the optimiser's table of learning rates: it follows from the configuration


def _state_parameters(step: TrainStep) -> dict[str, Parameter]:
    return {f"{STATE_PREFIX}{p.name}": p for p in step.state() if not p.name.startswith(NOT_STATE)}


def weight_parameters(step: TrainStep) -> dict[str, Parameter]:
    """The network's parameters and, when there is one, their average under `ema.`."""
    weights = {p.name: p for p in step.network.get_parameters()}
    return {**weights, **{p.name: p for p in step.ema or ()}}


def check_finite(parameters: Mapping[str, Parameter], step: int) -> None:
    """Checks what is to be saved.

    Raises:
        RunError: a value is not finite; such weights must not take the place of good ones.
    """
    bad = [name for name, value in parameters.items() if not np.isfinite(value.asnumpy()).all()]
    if bad:
        raise RunError(
            f"After step {step} {len(bad)} of {len(parameters)} parameters are not finite ({', '.join(bad[:3])}): they "
            f"are not saved, and the earlier checkpoints stay. Lower the learning rate, clip the gradients, or look at "
            f"the data; the same command goes on from the last checkpoint."
        )


def checkpoint_parameters(step: TrainStep) -> dict[str, Parameter]:
    """All that a resumed run needs, under the names that it has in a checkpoint; between two updates."""
    return {**weight_parameters(step), **_state_parameters(step)}


@dataclass
class Progress:
    """Where a run stands; kept in every checkpoint.

    Attributes:
        step: finished batches; losses, norms: those since the last row of metrics.csv.
        scores: top-1 (percent) of evaluated steps, of the better of averaged and raw weights.
        validation: which images, prepared how, the scores are of (`None`: an earlier version did not say).
        plateau: the state of the schedule of that name.
        best: the (first) step with the highest score.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)
    validation: Optional[dict[str, Any]] = None
    plateau: Optional[dict[str, Any]] = None

    @property
    def best(self) -> Optional[int]:
        return max(self.scores, key=lambda step: (self.scores[step], -step)) if self.scores else None

    @property
    def since_best(self) -> int:
        """Evaluations after the best one."""
        best = self.best
        return sum(step > best for step in self.scores) if best is not None else 0

    def to_json(self) -> dict[str, Any]:
        return dict(
            step=self.step,
            losses=[_number(value) for value in self.losses],
            norms=[_number(value) for value in self.norms],
            scores={str(step): score for step, score in self.scores.items()},
            validation=self.validation,
            **({"plateau": self.plateau} if self.plateau else {}),
        )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Progress:
        """Raises TypeError, ValueError or KeyError when this is not what `to_json` returned."""
        validation = values.get("validation")
        if not (validation is None or isinstance(validation, dict)):
            raise TypeError("validation")
        return cls(
            int(values["step"]),
            [float(value) for value in values["losses"]],
            [float(value) for value in values["norms"]],
            {int(step): float(score) for step, score in dict(values["scores"]).items()},
            validation,
            values.get("plateau"),
        )


def _number(value: float) -> Union[float, str]:
    """JSON has no NaN and no infinity: they become "nan" and "inf", which `float` reads."""
    return value if np.isfinite(value) else str(value)


@dataclass
class State:
    """A training checkpoint that was read: its arrays, its record, and the progress in that."""

    path: Path
    arrays: dict[str, np.ndarray]
    record: dict[str, Any]
    progress: Progress


def read_state(saved: Saved) -> State:
    """Reads a training checkpoint.

    Raises:
        WeightsError: it is damaged, or its record is not that of a training checkpoint of its name.
    """
    arrays, record = read_file(saved.path, checksum_required=True)
    try:
        progress = Progress.from_json(record["progress"])
        Preprocessing(**record.get("preprocessing", own_preprocessing("")))
        sound = isinstance(record["config"], dict) and isinstance(record.get("network", {}), dict)
        sound &= isinstance(record["world_size"], int) and progress.step == saved.step
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        sound = False
    if not sound:
        raise WeightsError(f"{saved.path}: its record is not that of a training checkpoint after step {saved.step}")
    return State(saved.path, arrays, record, progress)


def restore(state: State, step: TrainStep) -> None:
    """Puts the state that was read into the step.

    Raises:
        WeightsError: it belongs to another network or optimiser. The step is then unchanged.
    """
    path, arrays = state.path, state.arrays
    targets = _state_parameters(step)
    lost = sorted(set(targets) ^ {name for name in arrays if name.startswith(STATE_PREFIX)})
    if lost:
        raise WeightsError(f"{path}: its training state does not fit this configuration; first difference: {lost[0]}")
    targets.update({p.name: p for p in step.ema or ()})
    for name, parameter in targets.items():
        if name not in arrays or arrays[name].size != parameter.size:
            raise WeightsError(f"{path}: {name} is missing or has another shape")
    network = {n: a for n, a in arrays.items() if not n.startswith((STATE_PREFIX, EMA_PREFIX))}
    load_into(step.network, network, str(path))
    for name, parameter in targets.items():
        parameter.set_data(ms.Tensor(arrays[name].reshape(parameter.shape), parameter.dtype))
