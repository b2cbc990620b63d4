"""Learning-rate schedule and optimiser, from MindCV's parts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import mindcv.optim.adamw
import mindcv.optim.lion
import mindspore as ms
from mindcv.optim.optim_factory import init_group_params
from mindcv.scheduler import dynamic_lr
from mindspore import Parameter, Tensor, nn, ops

from ..config import Config
from ..errors import SettingError
from .finetune import learning_rate_factors

FLOAT32_TINY = 2.0**-126

_update = ops.MultitypeFuncGraph("update")


@_update.register("Function", *["Tensor"] * 5, "Number", *["Tensor"] * 4)
def _update_tensor(adam, beta1, beta2, eps, decay_factor, rate, weight_decay, parameter, m, v, gradient):
    return adam(parameter, m, v, rate, beta1, beta2, eps, decay_factor * weight_decay, gradient)


_times = ops.MultitypeFuncGraph("times")


@_times.register("Tensor", "Tensor")
def _times_tensor(factor, value):
    return (factor * value).reshape(())


class AdamW(mindcv.optim.adamw.AdamW):
    """MindCV's AdamW, with the same state, but one operator a parameter instead of twenty, which are a fifth of a step
    on CPU. For parameters in float32."""

    beta1_power: Parameter
    beta2_power: Parameter

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.adam = ops.AdamWeightDecay()
        self.decays = tuple(weight_decays(self))

    def construct(self, gradients: tuple[Tensor, ...]) -> bool:
        self.beta1_power = self.beta1_power * self.beta1
        self.beta2_power = self.beta2_power * self.beta2
        # The operator does not correct the moments' bias: its rate and epsilon do, so that the step is PyTorch's.
        # It multiplies the decay with its own rate, PyTorch with the learning rate.
        root = ops.sqrt(1 - self.beta2_power)
        correction = root / (1 - self.beta1_power)
        scalars = (self.beta1, self.beta2, self.eps * root, 1 / correction)
        beta1, beta2, eps, decay_factor = [scalar.reshape(()) for scalar in scalars]
        rates = self.get_lr()
        if self.is_group_lr:  # one for each parameter
            rates = self.hyper_map(ops.partial(_times, correction), rates)
            update = ops.partial(_update, self.adam, beta1, beta2, eps, decay_factor)
            self.hyper_map(update, rates, self.decays, self.parameters, self.moments1, self.moments2, gradients)
        else:
            rate = (rates * correction).reshape(())
            update = ops.partial(_update, self.adam, beta1, beta2, eps, decay_factor, rate)
            self.hyper_map(update, self.decays, self.parameters, self.moments1, self.moments2, gradients)
        return True


def weight_decays(optimizer: nn.Optimizer) -> list[float]:
    """The weight decay of each parameter of an optimiser."""
    each = optimizer.weight_decay if optimizer.is_group else [optimizer.weight_decay] * len(optimizer.parameters)
    return [float(decay) if decays else 0.0 for decay, decays in zip(each, optimizer.decay_flags)]


def learning_rates(config: Config, steps_per_epoch: int) -> list[float]:
    """The learning rate of every update of the run.

    As timm does, and with it the authors: the cosine counts its epochs from the start of the run, the warm-up replaces
    its first ones, and the cooldown follows at `min_lr`. (MindCV's `create_scheduler` starts the cosine after the
    warm-up.)

    A run of `max_steps` updates has a schedule in updates, as MMCV's by iteration. A warm-up in updates
    is MMCV's, too: its factor rises linearly to 1, and multiplies the schedule.

    Raises:
        SettingError: an epoch has too few steps for one update, or float32 cannot hold a rate.
    """
    total, updates = total_updates(config, steps_per_epoch), steps_per_epoch // config.gradient_accumulation_steps
    rates = _rates_of_steps(config, updates) if config.max_steps else _rates_of_epochs(config, updates)
    if config.warmup_steps:
        if config.warmup_steps >= total:
            raise SettingError(f"warmup_steps is {config.warmup_steps}, but the run has {total} updates in all")
        first = config.warmup_lr / config.lr
        for update in range(config.warmup_steps):
            rates[update] *= first + (1 - first) * update / config.warmup_steps
    lost = next((update for update, rate in enumerate(rates) if 0 < rate < FLOAT32_TINY), None)
    if lost is not None:
        raise SettingError(
            f"The learning rate falls to {rates[lost]:.3g} in epoch {lost // updates + 1}, below what float32 holds "
            f"({FLOAT32_TINY:.3g}); raise lr or decay_rate, or let it fall less often (decay_epochs)"
        )
    return rates


def total_updates(config: Config, steps_per_epoch: int) -> int:
    """The updates of a run.

    Raises:
        SettingError: an epoch has too few steps for one, or there are too many to count.
    """
    updates = steps_per_epoch // config.gradient_accumulation_steps
    if updates == 0:
        raise SettingError(
            f"gradient_accumulation_steps is {config.gradient_accumulation_steps}, but an epoch has only "
            f"{steps_per_epoch} batches, too few for one update; lower it or batch_size"
        )
    if config.max_steps:
        return config.max_steps
    if updates * config.epoch_size >= 2**31:  # the optimiser counts them in an int32
        raise SettingError(f"epoch_size is {config.epoch_size}: with {updates} updates each, more than 2**31 in all")
    return updates * config.epoch_size


def _rates_of_steps(config: Config, updates: int) -> list[float]:
    """The schedule of a run of `max_steps` updates; steps of step_decay and multi_step_decay come after epochs."""
    total, lowest = config.max_steps, config.min_lr
    if config.scheduler == "polynomial_decay":
        return [lowest + (config.lr - lowest) * (1 - update / total) ** config.power for update in range(total)]
    if config.scheduler == "cosine_decay":
        half = (config.lr - lowest) / 2
        return [lowest + half * (1 + math.cos(math.pi * update / total)) for update in range(total)]
    whole: dict[str, Any] = dict(epoch_size=-(-total // updates), max_steps=0)
    if config.scheduler == "one_cycle":
        whole, updates = dict(epoch_size=total, max_steps=0), 1
    return _rates_of_epochs(replace(config, **whole, warmup_epochs=0, cooldown_epochs=0), updates)[:total]


def _rates_of_epochs(config: Config, updates: int) -> list[float]:
    """The schedule of a run of `epoch_size` epochs of so many updates."""
    steps = dict(steps_per_epoch=updates, epochs=config.epoch_size)
    epochs = config.epoch_size - config.cooldown_epochs
    if config.scheduler == "cosine_decay":
        decay = dynamic_lr.cosine_decay_lr if config.lr_epoch_stair else dynamic_lr.cosine_decay_refined_lr
        rates = decay(decay_epochs=epochs, eta_min=config.min_lr, eta_max=config.lr, **steps)
    elif config.scheduler == "polynomial_decay":
        decay = dynamic_lr.polynomial_lr if config.lr_epoch_stair else dynamic_lr.polynomial_refined_lr
        above = decay(epochs, config.power, lr=config.lr - config.min_lr, **steps)  # as in timm: it ends at min_lr
        rates = [config.min_lr + rate for rate in above]
    elif config.scheduler == "step_decay":
        rates = dynamic_lr.step_lr(config.decay_epochs, config.decay_rate, lr=config.lr, **steps)
    elif config.scheduler == "multi_step_decay":
        rates = dynamic_lr.multi_step_lr(config.multi_step_decay_milestones, config.decay_rate, lr=config.lr, **steps)
    elif config.scheduler == "one_cycle":
        if 0.3 * updates * config.epoch_size < 2:  # MindCV's and PyTorch's rise in 0.3 of the updates
            raise SettingError(f"one_cycle needs 7 updates or more; a run of {updates * config.epoch_size} has too few")
        rates = dynamic_lr.one_cycle_lr(config.lr, **steps)
    else:
        rates = [config.lr] * (updates * config.epoch_size)
    rates[epochs * updates :] = [config.min_lr] * (config.cooldown_epochs * updates)
    if config.warmup_epochs:
        rise = dynamic_lr.linear_lr if config.lr_epoch_stair else dynamic_lr.linear_refined_lr
        steps["epochs"] = config.warmup_epochs
        warmup = rise(config.warmup_lr / config.lr, 1.0, config.warmup_epochs, lr=config.lr, **steps)
        rates[: len(warmup)] = warmup
    return rates


def _by_decay(parameters: list[Parameter], weight_decay: float, how: str, without: set[str]) -> list[dict[str, Any]]:
    """MindCV's groups; or, "by name", only what `without` names has no weight decay."""
    if how != "by name":
        return init_group_params(parameters, weight_decay, how, without)
    decays = [p for p in parameters if p.name not in without]
    rest = [p for p in parameters if p.name in without]
    groups = [dict(params=decays, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]
    return [*groups, dict(order_params=parameters)]


def parameter_groups(config: Config, network: nn.Cell, rates: list[float]) -> list[dict[str, Any]]:
    """The trained parameters by weight decay, and by the factor of their learning rate where that is not 1 for all."""
    parameters = network.trainable_params()
    unfiltered = network.no_weight_decay() if hasattr(network, "no_weight_decay") else {}
    options: tuple[float, str, set[str]] = (config.weight_decay, config.weight_decay_filter, set(unfiltered))
    if config.weight_decay_filter == "norm":
        # MMSegmentation's {"norm": decay_mult 0}: the batch norms of its heads are called bn there, and decay.
        kept = {p.name for p in parameters if p.name.startswith("backbone.") and ".norm" in p.name}
        options = (config.weight_decay, "by name", kept)
    factors = learning_rate_factors(config, network)
    if set(factors.values()) == {1.0}:
        return [group for group in _by_decay(parameters, *options) if group.get("params") != []]
    groups: list[dict[str, Any]] = []
    for factor in sorted(set(factors.values())):
        own = _by_decay([p for p in parameters if factors[p.name] == factor], *options)
        table = [rate * factor for rate in rates]
        groups += [dict(group, lr=table) for group in own if group.get("params")]
    return [*groups, {"order_params": parameters}]


def build_optimizer(config: Config, network: nn.Cell, rates: list[float]) -> nn.Optimizer:
    """The optimiser, MindCV's or MindSpore's, with the network's own list of parameters that carry no weight decay.

    LAMB and LARS are MindSpore's, on the devices that have them (`device_support`): nobody could compare them here.
    """
    groups = parameter_groups(config, network, rates)
    betas = dict(beta1=config.beta1, beta2=config.beta2)
    momentum = dict(momentum=config.momentum)
    if config.opt == "adamw":
        in_float32 = all(p.dtype == ms.float32 for p in network.trainable_params())
        return (AdamW if in_float32 else mindcv.optim.adamw.AdamW)(groups, rates, **betas)
    if config.opt == "adam":
        return nn.Adam(groups, rates, **betas)
    if config.opt == "lion":
        return mindcv.optim.lion.Lion(groups, rates, **betas)
    if (
        config.opt == "sgd" or config.use_nesterov
    ):  # nn.Momentum's use_nesterov is not PyTorch's on CPU; else they agree
        return nn.SGD(groups, rates, nesterov=config.use_nesterov, **momentum)
    if config.opt == "lamb":
        return nn.Lamb(groups, rates, **betas)
    if config.opt == "lars":  # of parameters with weight decay only, as in its paper
        return nn.LARS(nn.Momentum(groups, rates, **momentum), lars_filter=lambda p: p.ndim > 1)
    if config.opt == "rmsprop":
        return nn.RMSProp(groups, rates, **momentum)
    return nn.Momentum(groups, rates, **momentum)
