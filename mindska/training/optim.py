"""Learning-rate schedule and optimiser, from MindCV's parts."""

from __future__ import annotations

from mindcv.optim import create_optimizer
from mindcv.scheduler import dynamic_lr
from mindspore import nn

from ..config import Config


def learning_rates(config: Config, steps_per_epoch: int) -> list[float]:
    """The learning rate of every update of the run.

    As timm does, and with it the authors: the cosine counts its epochs from the start of the run, the warm-up replaces
    its first ones, and the cooldown follows at `min_lr`. (MindCV's `create_scheduler` starts the cosine after the
    warm-up.)
    """
    steps = dict(steps_per_epoch=steps_per_epoch, epochs=config.epoch_size)
    epochs = config.epoch_size - config.cooldown_epochs
    if config.scheduler == "cosine_decay":
        decay = dynamic_lr.cosine_decay_lr if config.lr_epoch_stair else dynamic_lr.cosine_decay_refined_lr
        rates = decay(decay_epochs=epochs, eta_min=config.min_lr, eta_max=config.lr, **steps)
    elif config.scheduler == "step_decay":
        rates = dynamic_lr.step_lr(config.decay_epochs, config.decay_rate, lr=config.lr, **steps)
    else:
        rates = [config.lr] * (steps_per_epoch * config.epoch_size)
    rates[epochs * steps_per_epoch :] = [config.min_lr] * (config.cooldown_epochs * steps_per_epoch)
    if config.warmup_epochs:
        rise = dynamic_lr.linear_lr if config.lr_epoch_stair else dynamic_lr.linear_refined_lr
        steps["epochs"] = config.warmup_epochs
        warmup = rise(config.warmup_lr / config.lr, 1.0, config.warmup_epochs, lr=config.lr, **steps)
        rates[: len(warmup)] = warmup
    # One update takes several batches when gradients are accumulated.
    return rates[:: config.gradient_accumulation_steps]


def build_optimizer(config: Config, network: nn.Cell, rates: list[float]) -> nn.Optimizer:
    """MindCV's optimiser with the network's own list of parameters that carry no weight decay."""
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
