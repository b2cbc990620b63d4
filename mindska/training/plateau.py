"""The schedule `plateau`: the learning rate falls where the score does not rise any more."""

from __future__ import annotations

import logging
from typing import Any, Optional

import numpy as np
from mindspore import Tensor, nn

from ..config import Config
from ..errors import WeightsError

log = logging.getLogger("mindska")

TABLE = "learning_rate"  # how MindSpore's optimisers call their tables of learning rates


class Plateau:
    """PyTorch's ReduceLROnPlateau, of the score by which the best weights are chosen, with a threshold of 0.

    After more than `patience` evaluations in a row without a better score, the learning rate is multiplied by `factor`,
    but falls no lower than `min_lr`. The warm-up and the cooldown are those of any schedule.

    The optimiser reads its rates from tables with an entry an update; their rest is multiplied. What was multiplied is
    in `state`, which belongs into a checkpoint: a run that resumes has the same tables to the bit.

    Args:
        rates: learning rate of every update; they change in place.
        optimizer: with tables made of them.
    """

    def __init__(self, config: Config, rates: list[float], optimizer: nn.Optimizer) -> None:
        self.patience, self.factor, self.min_lr = config.patience, config.factor, config.min_lr
        self.rates, self.begun_with = rates, list(rates)
        self.tables = [p for p in optimizer.get_parameters() if p.name.startswith(TABLE) and p.size == len(rates)]
        self.originals = [table.asnumpy().copy() for table in self.tables]
        self.state: dict[str, Any] = dict(best=None, waited=0, reductions=[])

    def note(self, score: float, updates: int) -> None:
        """Takes the score of an evaluation after so many updates."""
        best = self.state["best"]
        if best is None or score > best:
            self.state.update(best=score, waited=0)
            return
        self.state["waited"] += 1
        if self.state["waited"] <= self.patience:
            return
        self.state["waited"] = 0
        if updates >= len(self.rates) or self.rates[updates] <= self.min_lr:
            return
        self.state["reductions"].append(updates)
        before = self.rates[updates]
        self._apply()
        log.info(
            "plateau: no better score than %.2f in %d evaluations; the learning rate falls from %.3e to %.3e",
            best, self.patience + 1, before, self.rates[updates],
        )  # fmt: skip

    def restore(self, state: Optional[dict[str, Any]]) -> None:
        """Goes on from the state of a checkpoint; None: of a run that has not evaluated yet.

        Raises:
            WeightsError: it is no such state.
        """
        if state is None:
            return
        try:
            best, waited = state["best"], int(state["waited"])
            found = dict(
                best=None if best is None else float(best),
                waited=waited,
                reductions=[int(update) for update in state["reductions"]],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"The checkpoint's state of the schedule `plateau` is damaged ({error})") from None
        self.state = found
        self._apply()

    def _apply(self) -> None:
        """Puts the reductions into the rates and the tables, always from those that the run began with."""
        rates = list(self.begun_with)
        for update in self.state["reductions"]:
            rates[update:] = [min(rate, max(rate * self.factor, self.min_lr)) for rate in rates[update:]]
        self.rates[:] = rates
        share = np.array([new / old if old else 1.0 for new, old in zip(rates, self.begun_with)])
        for table, original in zip(self.tables, self.originals):
            table.set_data(Tensor((original * share).astype(original.dtype)))
