"""Gradients and training steps, ours and the PyTorch references', on a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mindspore as ms
import numpy as np
import torch
from mindcv.loss import create_loss
from mindspore import Tensor, nn, ops

from mindska.config import Config
from mindska.training import StepOptions, TrainStep, build_optimizer, learning_rates
from mindska.weights.convert import key_map


class Gradients(NamedTuple):
    """Loss, gradients and parameters (statistics included) after one pass in training mode, by PyTorch's keys."""

    loss: float
    gradients: dict[str, np.ndarray]
    state: dict[str, np.ndarray]


class CrossEntropy(nn.Cell):
    """Mean cross entropy of a network of ours on a batch."""

    def __init__(self, net: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, x: Tensor, labels: Tensor) -> Tensor:
        return ops.cross_entropy(self.net(x), labels)


def gradients(net: nn.Cell, x: np.ndarray, labels: Sequence[int]) -> Gradients:
    """Of a network of ours."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    net.set_train(True)
    step = ms.value_and_grad(CrossEntropy(net), None, weights=net.trainable_params())
    loss, values = step(Tensor(x), Tensor(labels, ms.int32))
    keys = key_map(net.model_name)
    by_key = {keys[p.name]: g.asnumpy() for p, g in zip(net.trainable_params(), values)}
    return Gradients(float(loss.asnumpy()), by_key, {keys[p.name]: p.asnumpy() for p in net.get_parameters()})


def reference_gradients(net: torch.nn.Module, x: np.ndarray, labels: Sequence[int]) -> Gradients:
    """Of a PyTorch reference, in its own precision."""
    dtype = next(net.parameters()).dtype
    loss = torch.nn.functional.cross_entropy(net.train()(torch.from_numpy(x).to(dtype)), torch.tensor(labels))
    loss.backward()
    state = {key: value.numpy() for key, value in net.state_dict().items()}
    return Gradients(loss.item(), {key: p.grad.numpy() for key, p in net.named_parameters()}, state)


def train_step(net: nn.Cell, config: Config, updates: int, **options) -> TrainStep:
    """The trainer's step with the configuration's loss, optimiser and schedule."""
    rates = learning_rates(config, updates // config.epoch_size)
    loss = create_loss("CE", label_smoothing=config.label_smoothing)
    return TrainStep(net, loss, build_optimizer(config, net, rates), StepOptions(**options)).set_train(True)


def sgd_losses(net: nn.Cell, x: np.ndarray, labels: Sequence[int], lr: float, steps: int) -> np.ndarray:
    """Loss before each of some SGD steps of the trainer on one batch, in the mode that is set."""
    config = Config(
        opt="sgd", momentum=0.0, weight_decay=0.0, lr=lr, scheduler="constant", warmup_epochs=0, epoch_size=1,
        label_smoothing=0.0,
    )  # fmt: skip
    step = train_step(net, config, updates=steps)
    noise = Tensor(np.zeros((len(labels), net.noise_size), np.float32))
    return np.array([step(Tensor(x), Tensor(labels, ms.int32), noise)[0].asnumpy() for _ in range(steps)], np.float64)


def reference_sgd_losses(net: torch.nn.Module, x: np.ndarray, labels: Sequence[int], lr: float, steps: int):
    """The same of a PyTorch reference, in its own precision."""
    dtype = next(net.parameters()).dtype
    optimizer, losses = torch.optim.SGD(net.train().parameters(), lr=lr), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(torch.from_numpy(x).to(dtype)), torch.tensor(labels))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)
