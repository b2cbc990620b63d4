"""One training step as a graph: loss, gradients, reduction over ranks, clipping, update, averaging, loss scaling.

MindCV's own step is not used: it refuses dynamic loss scaling on CPU, clips each rank's gradients before they are
reduced, advances the averaged weights with a warm-up of its own, and leaves batch-norm statistics damaged by a batch
whose loss is not finite.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Optional

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ..kernels import operators
from .finetune import frozen_norms, is_part
from .multi_tensor import fits, fused_update

MIN_LOSS_SCALE, MAX_LOSS_SCALE = 2.0**-24, 2.0**24
CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_

_accumulate = ops.MultitypeFuncGraph("accumulate")
_average = ops.MultitypeFuncGraph("average")
_assign = ops.MultitypeFuncGraph("assign")
_clear = ops.MultitypeFuncGraph("clear")
_square_sum = ops.MultitypeFuncGraph("square_sum")
_scale = ops.MultitypeFuncGraph("scale")
_all_reduce = ops.MultitypeFuncGraph("all_reduce")
_flatten = ops.MultitypeFuncGraph("flatten")
_part = ops.MultitypeFuncGraph("part")


@_accumulate.register("Tensor", "Tensor")
def _accumulate_tensor(total, gradient):
    return ops.assign_add(total, gradient.astype(total.dtype))


@_average.register("Number", "Tensor", "Tensor")
def _average_tensor(decay, average, value):
    return ops.assign(average, average * decay + value.astype(average.dtype) * (1 - decay))


@_assign.register("Tensor", "Tensor")
def _assign_tensor(target, value):
    return ops.assign(target, value)


@_clear.register("Tensor")
def _clear_tensor(target):
    return ops.assign(target, ops.zeros_like(target))


@_square_sum.register("Tensor")
def _square_sum_tensor(gradient):
    wide = gradient.astype(ms.float32)
    return (wide * wide).sum()


class SquareSum(nn.Cell):
    """The sum of the squares of tensors of the types of `like`, in float32: (...,), ... -> ()"""

    def __init__(self, like: tuple[Parameter, ...]) -> None:
        super().__init__(auto_prefix=False)
        self.operator = operators.SquareSum() if fits(like) else None
        self.hyper_map = ops.HyperMap()

    def construct(self, tensors: tuple[Tensor, ...]) -> Tensor:
        if self.operator is not None:
            return self.operator(tensors)
        return ops.addn(self.hyper_map(_square_sum, tensors))


@_scale.register("Tensor", "Tensor")
def _scale_tensor(factor, gradient):
    return gradient * factor.astype(gradient.dtype)


@_all_reduce.register("Function", "Tensor")
def _all_reduce_tensor(reduce, gradient):
    return reduce(gradient)


@_flatten.register("Tensor")
def _flatten_tensor(tensor):
    return tensor.reshape(-1)


@_part.register("Tensor", "Number", "Tensor")
def _part_tensor(flat, begin, like):
    return ops.slice(flat, (begin,), (like.size,)).reshape(like.shape)


class AllReduce(nn.Cell):
    """The sum over the ranks of each of the tensors, which are of the shapes and types of `like`.

    On the CPU they are one message: MindSpore sends each by itself, and waits for the other ranks each time. Other
    devices send what is ready while they compute the rest.
    """

    def __init__(self, like: tuple[Parameter, ...]) -> None:
        super().__init__(auto_prefix=False)
        self.all_reduce = ops.AllReduce()
        self.hyper_map = ops.HyperMap()
        self.together = ms.get_context("device_target") == "CPU" and len({p.dtype for p in like}) == 1
        self.begins = tuple(accumulate([p.size for p in like], initial=0))[:-1]

    def construct(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not self.together:
            return self.hyper_map(ops.partial(_all_reduce, self.all_reduce), tensors)
        summed = self.all_reduce(ops.concat(self.hyper_map(_flatten, tensors)))
        return self.hyper_map(ops.partial(_part, summed), self.begins, tensors)


@dataclass(frozen=True)
class StepOptions:
    """How a step updates the network.

    Attributes:
        clip_value: largest global norm of the gradients; None: no clipping.
        accumulation: micro-batches whose mean gradient makes one update.
        ema_decay: share of the old value that the averaged weights keep at each update; None: no average.
        loss_scale: initial loss scale; dynamic_loss_scale: halve it at an overflow, double it after `scale_window`
            updates without one.
    """

    clip_value: Optional[float] = None
    accumulation: int = 1
    ema_decay: Optional[float] = None
    loss_scale: float = 1.0
    dynamic_loss_scale: bool = False
    scale_window: int = 2000


class ScaledLoss(nn.Cell):
    """loss * scale of a batch, and the loss; logits are taken to float32 first."""

    def __init__(self, network: nn.Cell, loss: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        self.loss = loss
        self.takes_noise = getattr(network, "noise_size", 0) > 0

    def construct(self, scale: Tensor, images: Tensor, labels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network(images, noise) if self.takes_noise else self.network(images)
        loss = self.loss(logits.astype(ms.float32), labels)
        return loss * scale, loss


class ScaledLosses(nn.Cell):
    """The same for a network that states itself what training minimises: its `losses(*batch)`, or the sum of them where
    they have names."""

    def __init__(self, network: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, scale: Tensor, *batch: Tensor) -> tuple[Tensor, Tensor]:
        losses = self.network.losses(*batch)
        loss = ops.addn(list(losses.values())) if isinstance(losses, dict) else losses
        return loss * scale, loss


class TrainStep(nn.Cell):
    """A training step on one micro-batch.

    An update whose loss or gradients are not finite on any rank is skipped on all: no parameter, batch-norm statistic,
    average, optimiser state or schedule moves; it is counted, and a dynamic loss scale halves.

    Args:
        loss: of logits and labels; None: the network's own `losses`.

    Inputs:
        images (B, C, H, W); what they are compared with, such as labels (B,) int32 or (B, num_classes) float32; noise
        (B, noise_size) float32.

    Returns:
        loss (mean over the ranks), global norm of the gradients before clipping (0 for a micro-batch that only
        accumulates).
    """

    def __init__(
        self,
        network: nn.Cell,
        loss: Optional[nn.Cell],
        optimizer: nn.Optimizer,
        options: StepOptions,
        world_size: int = 1,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.options = options
        self.network = network
        self.optimizer = optimizer
        self.weights = optimizer.parameters
        if loss is None and hasattr(network, "world_size"):  # whose losses are divided by means over the processes
            network.world_size = world_size
        self.scaled_loss = ScaledLosses(network) if loss is None else ScaledLoss(network, loss)
        self.gradients = ops.value_and_grad(self.scaled_loss, None, self.weights, has_aux=True)
        self.world_size = world_size
        self.all_reduce = ops.AllReduce() if world_size > 1 else None
        self.all_reduce_gradients = AllReduce(self.weights) if world_size > 1 else None
        self.hyper_map = ops.HyperMap()
        # Whether gradients are ever multiplied before the update: thousands of small operators, which cost their start.
        unscaled = replace(options, clip_value=None, accumulation=1, loss_scale=1.0, dynamic_loss_scale=False)
        self.scales = world_size > 1 or options != unscaled
        self.square_sum = SquareSum(self.weights)

        self.loss_scale = Parameter(Tensor(options.loss_scale, ms.float32), name="loss_scale", requires_grad=False)
        self.good_steps = Parameter(Tensor(0, ms.int32), name="good_steps", requires_grad=False)
        self.skipped = Parameter(Tensor(0, ms.int32), name="skipped", requires_grad=False)
        self.skipped_in_a_row = Parameter(Tensor(0, ms.int32), name="skipped_in_a_row", requires_grad=False)
        self.micro_step = Parameter(Tensor(0, ms.int32), name="micro_step", requires_grad=False)

        self.frozen_norms = frozen_norms(network)
        parameters = list(network.get_parameters())
        trained, frozen = {p.name for p in self.weights}, getattr(network, "frozen_parts", ())
        moving = [p for p in parameters if not is_part(p.name, frozen)]
        self.statistics = ParameterTuple([p for p in moving if p.name not in trained])
        # Batch norm updates its statistics in the forward pass: what they were is kept, to go back to at a bad batch.
        self.last_good = self.statistics.clone("last_good", init="same")
        self.all_parameters = ParameterTuple(parameters)
        self.ema = self.all_parameters.clone("ema", init="same") if options.ema_decay is not None else None
        # What is frozen is its own average: averaging it would round it.
        self.averaged = ParameterTuple(moving)
        still = [is_part(p.name, frozen) for p in parameters]
        self.averages = ParameterTuple([e for e, s in zip(self.ema, still) if not s]) if self.ema is not None else None
        accumulates = options.accumulation > 1
        self.accumulated = self.weights.clone("accumulated", init="zeros") if accumulates else None
        averages, values = (self.averages, self.averaged) if self.averages is not None else ((), ())
        self.fused_update = fused_update(
            optimizer, options.ema_decay or 0.0, averages, values, self.last_good, self.statistics
        )

    def set_train(self, mode: bool = True) -> nn.Cell:
        """As of any cell, but frozen batch norms stay in evaluation."""
        super().set_train(mode)
        for norm in self.frozen_norms:
            norm.set_train(False)
        return self

    def state(self) -> list[Parameter]:
        """Everything, besides the network and its average, that a run resumed between two updates needs.

        Accumulated gradients are no part of it: between updates they are zero.
        """
        own = [self.loss_scale, self.good_steps, self.skipped, self.skipped_in_a_row]
        network = {p.name for p in self.network.get_parameters()}
        optimizer = [p for p in self.optimizer.get_parameters() if p.name not in network]
        return own + list(self.last_good) + optimizer

    def construct(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        (_, loss), gradients = self.gradients(self.loss_scale, *batch)
        if self.all_reduce is not None:
            loss = self.all_reduce(loss) / self.world_size
        if self.accumulated is None:
            return loss, self.update(loss, gradients)
        self.hyper_map(_accumulate, self.accumulated, gradients)
        self.micro_step = self.micro_step + 1
        norm = ops.zeros((), ms.float32)
        if self.micro_step == self.options.accumulation:
            norm = self.update(loss, self.accumulated)
            self.hyper_map(_clear, self.accumulated)
            self.micro_step = Tensor(0, ms.int32)
        return loss, norm

    def update(self, loss: Tensor, gradients: tuple[Tensor, ...]) -> Tensor:
        """Reduces the gradients over the ranks and applies them when all is finite; returns their norm."""
        if self.all_reduce_gradients is not None:
            gradients = self.all_reduce_gradients(gradients)
        divisor = self.loss_scale * (self.world_size * self.options.accumulation)
        norm = ops.sqrt(self.square_sum(gradients)) / divisor
        # The norm is finite only if every gradient is; after the reduction all ranks see the same.
        finite = ops.logical_and(ops.isfinite(norm), ops.isfinite(loss))
        factor = 1.0 / divisor
        if self.options.clip_value is not None:
            factor = factor * ops.minimum(self.options.clip_value / (norm + CLIP_EPS), Tensor(1.0, ms.float32))
        done = finite.astype(ms.int32)
        if self.fused_update is not None:
            self.fused_update(done, factor, gradients)
        elif finite:
            self.optimizer(self.hyper_map(ops.partial(_scale, factor), gradients) if self.scales else gradients)
            self.hyper_map(_assign, self.last_good, self.statistics)
            if self.ema is not None:
                self.hyper_map(ops.partial(_average, self.options.ema_decay), self.averages, self.averaged)
        else:
            self.hyper_map(_assign, self.statistics, self.last_good)
        self.count(done)
        return norm

    def count(self, done: Tensor) -> None:
        """Counts the updates made and skipped, and adapts the loss scale; `done`: 1 for one made, else 0."""
        skipped = 1 - done
        self.skipped = self.skipped + skipped
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * skipped
        good_steps = (self.good_steps + 1) * done
        if self.options.dynamic_loss_scale:
            is_due = good_steps == self.options.scale_window
            raised = ops.where(is_due, ops.minimum(self.loss_scale * 2, MAX_LOSS_SCALE), self.loss_scale)
            lowered = ops.maximum(self.loss_scale / 2, MIN_LOSS_SCALE)
            self.loss_scale = ops.where(done == 1, raised, lowered)
            good_steps = ops.where(is_due, 0, good_steps)
        self.good_steps = good_steps
