"""Trains the PyTorch reference by a recipe, so that its accuracy can be set beside ours.

What `mindska train` has, it has as well: initial values, batches, noise of stochastic depth and dropout, learning rate
of every update, weight decay of every parameter, loss, average of the weights, and validation images. Network,
gradients and updates are PyTorch's.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import numpy as np
import PIL
import torch
from mindspore import nn
from tqdm import tqdm

from .. import builders
from ..config import Config, to_dict
from ..data import EvalLoader
from ..distributed import World, all_reduce_sum
from ..errors import RunError, SettingError
from ..evaluation import EvalStep, Result, evaluate
from ..files import replacing
from ..models.layers.blocks import Dropout, DropPath
from ..streams import unfailing_stderr
from ..tasks import create_task
from ..training.optim import learning_rates, parameter_groups, total_updates
from ..training.record import RunRecord
from ..training.resume import effective_settings
from ..training.step import CLIP_EPS
from ..weights import non_default_options
from . import create
from .skanet import SkaNet
from .verify import reference_keys

log = logging.getLogger("mindska")

OPTIMIZERS = ("adamw", "sgd", "momentum")
# What a recipe may not ask for: setting -> the only value that is understood.
ONLY: dict[str, Any] = dict(
    task="classification", amp_level="O0", loss="CE", class_weights=(), freeze=(), freeze_backbone=False,
    early_stopping=0, sync_bn=False, loss_scale=1.0, loss_scale_type="fixed",
)  # fmt: skip


def check_settings(config: Config) -> None:
    """Whether the reference can be trained so.

    Raises:
        SettingError: a setting has no counterpart here; the message says which value has.
    """
    if config.opt not in OPTIMIZERS:
        raise SettingError(f"opt is {config.opt}; the reference is trained with {', '.join(OPTIMIZERS)} only")
    if config.scheduler == "plateau":
        raise SettingError("scheduler is plateau; the reference is trained with schedules that are known at the start")
    for name, value in ONLY.items():
        if getattr(config, name) != value:
            found = getattr(config, name)
            raise SettingError(f"{name} is {found!r}; the reference is trained with {value!r} only: give --{name}")


def reference_of(config: Config, network: nn.Cell, num_classes: int) -> torch.nn.Module:
    """The reference of a network of ours, with its values.

    Raises:
        SettingError: there is none, or it lacks something that the network has.
    """
    options = non_default_options(config.model, getattr(network, "options", {}))
    rates = {name: getattr(config, name) for name in ("drop_rate", "drop_path_rate")}
    if config.model.startswith("skanet"):
        options.update({name: value for name, value in rates.items() if value is not None})
    elif any(cell.rate for _, cell in network.cells_and_names() if isinstance(cell, (DropPath, Dropout))):
        raise SettingError(
            f"the reference of {config.model} has neither stochastic depth nor dropout; give --drop_path_rate 0 "
            f"--drop_rate 0"
        )
    if network.in_channels != 3:
        raise SettingError(f"the reference takes images of 3 channels, in_channels is {network.in_channels}")
    try:
        reference = create(config.model, num_classes=num_classes, **options)
    except TypeError as error:
        raise SettingError(f"the reference of {config.model} does not have all of {', '.join(options)}") from error
    state, ours = reference.state_dict(), {p.name: p.asnumpy() for p in network.get_parameters()}
    for name, key in reference_keys(config.model).items():
        state[key] = torch.from_numpy(ours[name].copy()).reshape(state[key].shape)
    reference.load_state_dict(state)
    return reference


def build_optimizer(
    config: Config, network: nn.Cell, reference: torch.nn.Module, rates: list[float]
) -> torch.optim.Optimizer:
    """PyTorch's optimiser, with our groups of parameters; a group's `rates` are its learning rate at each update."""
    keys, theirs = reference_keys(config.model), dict(reference.named_parameters())
    groups = [
        dict(
            params=[theirs[keys[p.name]] for p in group["params"]],
            weight_decay=group.get("weight_decay", 0.0),
            rates=group.get("lr", rates),
        )
        for group in parameter_groups(config, network, rates)
        if "params" in group
    ]
    if config.opt == "adamw":
        return torch.optim.AdamW(groups, config.lr, (config.beta1, config.beta2), eps=1e-8)
    return torch.optim.SGD(groups, config.lr, config.momentum, nesterov=config.use_nesterov)


class Step:
    """Updates the reference as `mindska.training.TrainStep` updates our network.

    Attributes:
        averaged: the network with averaged weights; None where the recipe does not average.
        updates: so many were made.
    """

    def __init__(self, config: Config, reference: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.config, self.reference, self.optimizer = config, reference.train(), optimizer
        self.averaged = copy.deepcopy(reference) if config.ema else None
        self.updates = self.batches = 0

    def __call__(self, images: np.ndarray, labels: np.ndarray, noise: np.ndarray) -> float:
        """The loss of a batch, before the update that it makes or contributes to.

        Raises:
            RunError: it is not finite.
        """
        inputs = [torch.from_numpy(images)]
        if isinstance(self.reference, SkaNet):
            inputs.append(torch.from_numpy(noise))
        targets = torch.from_numpy(labels)
        targets = targets if targets.is_floating_point() else targets.long()
        logits = self.reference(*inputs)
        loss = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=self.config.label_smoothing)
        if not torch.isfinite(loss):
            raise RunError(f"The reference's loss is {loss.item()} after {self.updates} updates; lower --lr")
        (loss / self.config.gradient_accumulation_steps).backward()
        self.batches += 1
        if self.batches % self.config.gradient_accumulation_steps == 0:
            self._update()
        return loss.item()

    def _update(self) -> None:
        if self.config.clip_grad:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.reference.parameters() if p.grad is not None])
            factor = torch.clamp(self.config.clip_value / (norm + CLIP_EPS), max=1.0)
            for parameter in self.reference.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rates"][self.updates]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        if self.averaged is not None:
            decay = self.config.ema_decay
            for average, value in zip(self.averaged.state_dict().values(), self.reference.state_dict().values()):
                if average.is_floating_point():  # not batch norm's counters
                    average.mul_(decay).add_(value, alpha=1 - decay)


def logits_of(reference: torch.nn.Module, loader: EvalLoader) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The reference's logits of each validation batch, and the labels."""
    with torch.no_grad():
        for images, labels in loader:
            yield reference(torch.from_numpy(images)).numpy(), labels


def evaluate_reference(config: Config, step: Step, loader: EvalLoader, counting: EvalStep) -> dict[str, float]:
    """The columns of metrics.csv for an evaluation: of the better weights, and of both kinds where there are two."""
    kinds = {"raw": step.reference}
    if step.averaged is not None:
        kinds = {"averaged": step.averaged, **(kinds if config.val_raw else {})}
    found: dict[str, Result] = {}
    for kind, reference in kinds.items():
        reference.eval()
        found[kind] = evaluate(counting, logits_of(reference, loader), all_reduce_sum, options="logits")
    step.reference.train()
    best = max(found, key=lambda kind: (found[kind].top1, kind == "averaged"))
    columns = found[best].columns()
    for kind, result in found.items() if len(found) > 1 else ():
        columns.update({f"{name}_{kind}": value for name, value in result.columns().items()})
    return columns


def train(config: Config, world: World, folder: Path, threads: Optional[int] = None) -> Iterator[dict[str, Any]]:
    """Trains the reference of the configuration's model; yields the rows of the run's metrics.csv as they come.

    The folder gets metrics.csv, settings.json, train.log and curves, as one of `mindska train`, and no checkpoints.

    Args:
        threads: PyTorch's; default: this process's share of the cores.

    Raises:
        UserError: something is missing, cannot be trained so, or cannot be written.
    """
    check_settings(config)
    torch.set_num_threads(threads or world.threads)
    builders.set_up(config, world)
    task = create_task(config, world)
    weights = builders.configured_weights(config)
    task.open_data(validation=config.val_while_train)
    network = task.build_network(task.fit_weights(weights), weights.record if weights else {})
    loader, evaluator = task.train_loader(network), task.evaluator(network)
    val_loader = getattr(evaluator, "loader", None)
    every = config.gradient_accumulation_steps
    loader.steps_per_epoch = loader.steps_per_epoch // every * every
    rates = learning_rates(config, loader.steps_per_epoch)
    record = task.record(network)
    reference = reference_of(config, network, record["num_classes"])
    step = Step(config, reference, build_optimizer(config, network, reference, rates))
    counting = EvalStep(nn.Identity()).set_train(False)  # of logits: what counts ours counts theirs
    folder.mkdir(parents=True, exist_ok=True)
    versions = dict(pytorch=torch.__version__, numpy=np.__version__, pillow=PIL.__version__)
    known, train_set = effective_settings(to_dict(config), json.loads(json.dumps(record))), task.train_set
    settings = dict(
        known, world_size=1, environment=versions, train_set=train_set.identity(), images=len(train_set),
        class_names=train_set.class_names,
    )  # fmt: skip
    with replacing(folder / "settings.json") as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    values = sum(p.numel() for p in reference.parameters())
    log.info(
        "PyTorch reference of %s: %s parameters, %d threads, seed %d, %d steps an epoch; written to %s",
        config.model, f"{values:,}", torch.get_num_threads(), config.seed, loader.steps_per_epoch, folder.absolute(),
    )  # fmt: skip
    with RunRecord(folder, task.measure, task.metric) as rows:
        rows.begin(0)
        yield from _steps(config, loader, val_loader, step, counting, rows)


def _steps(
    config: Config, loader: Any, val_loader: Optional[EvalLoader], step: Step, counting: EvalStep, rows: RunRecord
) -> Iterator[dict[str, Any]]:
    an_epoch = loader.steps_per_epoch
    total = total_updates(config, an_epoch) * config.gradient_accumulation_steps
    due = config.val_steps or config.val_interval * an_epoch
    losses: list[float] = []
    bar = tqdm(loader.batches(0, total), total=total, unit="step", disable=None, file=unfailing_stderr())
    began = time.perf_counter()
    for number, batch in enumerate(bar, start=1):
        losses.append(step(*batch))
        evaluates = val_loader is not None and (number % due == 0 or number == total)
        if not evaluates and number % an_epoch and number % config.log_interval:
            continue
        speed = len(losses) * config.batch_size / (time.perf_counter() - began)
        row = dict(loss=float(np.mean(losses)), lr=step.optimizer.param_groups[0]["lr"], images_per_s=speed)
        if evaluates and val_loader is not None:
            row.update(evaluate_reference(config, step, val_loader, counting))
        epoch = number / an_epoch
        rows.add(number, epoch, **row)
        log.info("epoch %.2f, step %d/%d: loss %.4f, %.1f images/s", epoch, number, total, row["loss"], speed)
        yield dict(seed=config.seed, step=number, epoch=round(epoch, 4), **row)
        losses, began = [], time.perf_counter()
