"""The update of a step by C++ operators that take all parameters at once ("fused", "multi-tensor").

An update by MindSpore's operators is several of them a parameter, and a branch for batches that are not finite. In a
small network starting them takes a good part of a step. These few write parameters and state in place. The state is
that of the optimisers whose update they compute, and so are the results, to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from .. import kernels
from ..kernels import operators
from .optim import AdamW, weight_decays


def fits(parameters: Sequence[Parameter]) -> bool:
    """Whether the operators can be had, and take these parameters."""
    return kernels.available() and all(p.dtype == ms.float32 for p in parameters)


class FusedOptimizer(nn.Cell):
    """What an optimiser does, by one operator.

    Inputs: whether to make it, () int32; a factor of the gradients, (); the gradients.
    """

    def __init__(self, optimizer: nn.Optimizer) -> None:
        super().__init__(auto_prefix=False)
        self.parameters, self.global_step = optimizer.parameters, optimizer.global_step
        of_each = optimizer.get_lr_parameter(list(self.parameters))
        tables = list({id(table): table for table in of_each}.values())  # parameters of one rate share theirs
        place = {id(table): i for i, table in enumerate(tables)}
        self.tables = ParameterTuple(tables)
        self.table_of = Tensor(np.array([place[id(table)] for table in of_each], np.int32))
        self.decays = Tensor(np.array(weight_decays(optimizer), np.float32))

    def operator(self, name: str, numbers: Sequence[bool], lists: int) -> ops.Custom:
        """The operator; `numbers`: which of the inputs before the tables it writes; `lists`: how many after the
        gradients, of which it writes all."""
        count = len(self.parameters)
        written = [*numbers, *[False] * (len(self.tables) + count), *[True] * (lists * count)]
        return operators.in_place_operator(name, written)


class FusedAdamW(FusedOptimizer):
    """Our AdamW."""

    def __init__(self, optimizer: AdamW) -> None:
        super().__init__(optimizer)
        self.beta1_power, self.beta2_power = optimizer.beta1_power, optimizer.beta2_power
        self.moments1, self.moments2 = optimizer.moments1, optimizer.moments2
        options = (optimizer.beta1, optimizer.beta2, optimizer.eps)
        self.betas_eps = Tensor(np.concatenate([option.asnumpy() for option in options]))
        numbers = [False, False, True, True, True, False, False, False]
        self.adamw = self.operator("multi_tensor_adamw", numbers, 3)

    def construct(self, finite: Tensor, factor: Tensor, gradients: tuple[Tensor, ...]) -> Tensor:
        numbers = (finite, factor, self.beta1_power, self.beta2_power, self.global_step, self.betas_eps)
        lists = (*self.tables, *gradients, *self.parameters, *self.moments1, *self.moments2)
        return self.adamw(*numbers, self.decays, self.table_of, *lists)


class FusedMomentum(FusedOptimizer):
    """MindSpore's momentum."""

    def __init__(self, optimizer: nn.Momentum) -> None:
        super().__init__(optimizer)
        self.momentum, self.moments = optimizer.momentum, optimizer.moments
        self.sgd = self.operator("multi_tensor_momentum", [False, False, False, True, False, False], 2)

    def construct(self, finite: Tensor, factor: Tensor, gradients: tuple[Tensor, ...]) -> Tensor:
        lists = (*self.tables, *gradients, *self.parameters, *self.moments)
        return self.sgd(finite, factor, self.momentum, self.global_step, self.decays, self.table_of, *lists)


class FusedAverage(nn.Cell):
    """What follows an update, by one operator: averages of the weights, and the statistics that are kept, to go back
    to after none.

    Inputs: whether there was an update, () int32.
    """

    def __init__(self, decay: float, averages: tuple, values: tuple, kept: tuple, statistics: tuple) -> None:
        super().__init__(auto_prefix=False)
        self.averages, self.values = averages, values
        self.kept, self.statistics = kept, statistics
        self.decay_rest = Tensor(np.array([decay, 1 - decay], np.float32))
        self.counts = operators.int32_tensor(averages=len(averages))
        written = [*[False] * 3, *[True] * len(averages), *[False] * len(values), *[True] * (2 * len(kept))]
        self.average = operators.in_place_operator("multi_tensor_average", written, averages=len(averages))

    def construct(self, finite: Tensor) -> Tensor:
        lists = (*self.averages, *self.values, *self.kept, *self.statistics)
        return self.average(finite, self.decay_rest, self.counts, *lists)


class FusedUpdate(nn.Cell):
    """An update: what the optimiser does, and what follows it. Inputs as of `FusedOptimizer`."""

    def __init__(self, optimizer: FusedOptimizer, average: Optional[FusedAverage]) -> None:
        super().__init__(auto_prefix=False)
        self.optimizer, self.average = optimizer, average

    def construct(self, finite: Tensor, factor: Tensor, gradients: tuple[Tensor, ...]) -> Tensor:
        done = self.optimizer(finite, factor, gradients)
        if self.average is not None:
            done = ops.depend(self.average(finite), done)
        return done


_KINDS: dict[type, type[FusedOptimizer]] = {AdamW: FusedAdamW, nn.Momentum: FusedMomentum}


def fused_update(
    optimizer: nn.Optimizer, decay: float, averages: tuple, values: tuple, kept: tuple, statistics: tuple
) -> Optional[FusedUpdate]:
    """An update by operators for all parameters at once; None where there are none for it.

    Args:
        decay: share of their old value that `averages` (of `values`) keep.
        kept: what `statistics` were, to go back to where there is no update.
    """
    kind = _KINDS.get(type(optimizer))  # exact classes: a subclass may compute something else
    others = [p for parameters in (averages, values, kept, statistics) for p in parameters]
    if kind is None or not fits([*optimizer.parameters, *others]):
        return None
    has_tables = optimizer.dynamic_lr and all(
        isinstance(table, Parameter) and table.ndim == 1
        for table in optimizer.get_lr_parameter(list(optimizer.parameters))
    )
    more = (
        optimizer.dynamic_weight_decay
        or optimizer.need_scale
        or optimizer.use_parallel
        or any(getattr(optimizer, "grad_centralization_flags", ()))
        or getattr(optimizer, "use_nesterov", False)
        or getattr(optimizer, "clip", False)
    )
    if more or not has_tables:
        return None
    average = FusedAverage(decay, averages, values, kept, statistics) if others else None
    return FusedUpdate(kind(optimizer), average)
