"""Learning-rate schedule and optimiser, from MindCV's parts."""

from __future__ import annotations

import mindcv.optim.adamw
import mindspore as ms
from mindcv.optim import create_optimizer
from mindcv.optim.optim_factory import init_group_params
from mindcv.scheduler import dynamic_lr
from mindspore import Parameter, Tensor, nn, ops

from ..config import Config
from ..errors import SettingError

FLOAT32_TINY = 2.0**-126

_update = ops.MultitypeFuncGraph("update")


@_update.register("Function", *["Tensor"] * 5, "Number", *["Tensor"] * 4)
def _update_tensor(adam, rate, beta1, beta2, eps, decay_factor, weight_decay, parameter, m, v, gradient):
    return adam(parameter, m, v, rate, beta1, beta2, eps, decay_factor * weight_decay, gradient)


class AdamW(mindcv.optim.adamw.AdamW):
    """MindCV's AdamW, with the same state, but one operator a parameter instead of twenty, which are a fifth of a step
    on CPU. For parameters in float32."""

    beta1_power: Parameter
    beta2_power: Parameter

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.adam = ops.AdamWeightDecay()
        each = self.weight_decay if self.is_group else [self.weight_decay] * len(self.parameters)
        self.decays = tuple(float(decay) if decays else 0.0 for decay, decays in zip(each, self.decay_flags))

    def construct(self, gradients: tuple[Tensor, ...]) -> bool:
        self.beta1_power = self.beta1_power * self.beta1
        self.beta2_power = self.beta2_power * self.beta2
        # The operator does not correct the moments' bias: its rate and epsilon do, so that the step is PyTorch's.
        # It multiplies the decay with its own rate, PyTorch with the learning rate.
        root = ops.sqrt(1 - self.beta2_power)
        correction = root / (1 - self.beta1_power)
        scalars = (self.get_lr() * correction, self.beta1, self.beta2, self.eps * root, 1 / correction)
        rate, beta1, beta2, eps, decay_factor = [scalar.reshape(()) for scalar in scalars]
        update = ops.partial(_update, self.adam, rate, beta1, beta2, eps, decay_factor)
        self.hyper_map(update, self.decays, self.parameters, self.moments1, self.moments2, gradients)
        return True


def learning_rates(config: Config, steps_per_epoch: int) -> list[float]:
    """The learning rate of every update of the run.

    As timm does, and with it the authors: the cosine counts its epochs from the start of the run, the warm-up replaces
    its first ones, and the cooldown follows at `min_lr`. (MindCV's `create_scheduler` starts the cosine after the
    warm-up.)

    Raises:
        SettingError: an epoch has too few steps for one update, or float32 cannot hold a rate.
    """
    updates = steps_per_epoch // config.gradient_accumulation_steps
    if updates == 0:
        raise SettingError(
            f"gradient_accumulation_steps is {config.gradient_accumulation_steps}, but an epoch has only "
            f"{steps_per_epoch} batches, too few for one update; lower it or batch_size"
        )
    if updates * config.epoch_size >= 2**31:  # the optimiser counts them in an int32
        raise SettingError(f"epoch_size is {config.epoch_size}: with {updates} updates each, more than 2**31 in all")
    steps = dict(steps_per_epoch=updates, epochs=config.epoch_size)
    epochs = config.epoch_size - config.cooldown_epochs
    if config.scheduler == "cosine_decay":
        decay = dynamic_lr.cosine_decay_lr if config.lr_epoch_stair else dynamic_lr.cosine_decay_refined_lr
        rates = decay(decay_epochs=epochs, eta_min=config.min_lr, eta_max=config.lr, **steps)
    elif config.scheduler == "step_decay":
        rates = dynamic_lr.step_lr(config.decay_epochs, config.decay_rate, lr=config.lr, **steps)
    else:
        rates = [config.lr] * (updates * config.epoch_size)
    rates[epochs * updates :] = [config.min_lr] * (config.cooldown_epochs * updates)
    if config.warmup_epochs:
        rise = dynamic_lr.linear_lr if config.lr_epoch_stair else dynamic_lr.linear_refined_lr
        steps["epochs"] = config.warmup_epochs
        warmup = rise(config.warmup_lr / config.lr, 1.0, config.warmup_epochs, lr=config.lr, **steps)
        rates[: len(warmup)] = warmup
    lost = next((update for update, rate in enumerate(rates) if 0 < rate < FLOAT32_TINY), None)
    if lost is not None:
        raise SettingError(
            f"The learning rate falls to {rates[lost]:.3g} in epoch {lost // updates + 1}, below what float32 holds "
            f"({FLOAT32_TINY:.3g}); raise lr or decay_rate, or let it fall less often (decay_epochs)"
        )
    return rates


def build_optimizer(config: Config, network: nn.Cell, rates: list[float]) -> nn.Optimizer:
    """MindCV's optimiser with the network's own list of parameters that carry no weight decay."""
    if config.opt == "adamw" and all(p.dtype == ms.float32 for p in network.trainable_params()):
        unfiltered = network.no_weight_decay() if hasattr(network, "no_weight_decay") else {}
        groups = init_group_params(
            network.trainable_params(), config.weight_decay, config.weight_decay_filter, unfiltered
        )
        return AdamW(groups, rates, config.beta1, config.beta2)
    betas = dict(beta1=config.beta1, beta2=config.beta2) if config.opt in ("adamw", "adam", "lion") else {}
    return create_optimizer(
        network,
        config.opt,
        lr=rates,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        weight_decay_filter=config.weight_decay_filter,
        **betas,
    )
