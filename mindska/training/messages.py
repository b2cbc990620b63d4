"""What a run says of itself: at its start what it is, at its end what came out and what to do with it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Optional

import mindspore as ms
from mindspore import nn

from .. import kernels, summary
from ..config import Config
from ..data import Preprocessing, TrainLoader
from ..distributed import World
from ..evaluation import Evaluator, Metric
from ..waiting import waiting
from .folder import RunFolder
from .state import Progress
from .step import TrainStep

log = logging.getLogger("mindska")

PRECISIONS = {
    "O0": "float32",
    "O2": "float16, batch norms in float32",
    "O3": "float16",
    "auto": "float16 where MindSpore takes it",
}


def say_start(
    config: Config,
    world: World,
    step: TrainStep,
    loader: TrainLoader,
    evaluator: Optional[Evaluator],
    record: dict[str, Any],
) -> None:
    """Logs what is going to be trained, on what, where and how."""
    network, dataset = step.network, loader.dataset
    num_classes = record.get("num_classes") or len(dataset.class_names)
    values = sum(p.size for p in network.trainable_params())
    target, pixels = ms.get_context("device_target"), loader.transform.preprocessing
    size = "x".join(map(str, (pixels.in_channels, *pixels.image_size)))
    macs = _macs(network, pixels) if world.rank == 0 and target == "CPU" else ""
    log.info(
        "model      %s: %s parameters%s, %s pixels, %d classes", config.model, f"{values:,}", macs, size, num_classes
    )
    log.info(
        "device     %s: %d %s x %d threads, %s mode, %s, %s operators",
        target, world.size, "process" if world.size == 1 else "processes", world.threads, config.mode,
        PRECISIONS[config.amp_level], "C++" if kernels.available() else "MindSpore's",
    )  # fmt: skip
    accumulated = config.gradient_accumulation_steps
    parts = [f"{config.batch_size} images", f"{world.size} processes" if world.size > 1 else ""]
    parts += [f"{accumulated} accumulated steps" if accumulated > 1 else ""]
    steps = loader.steps_per_epoch // accumulated * accumulated
    log.info(
        "data       %s images of %d classes, validation: %s; global batch %d (%s), %d steps an epoch, %s",
        f"{len(dataset):,}", len(dataset.class_names), f"{len(evaluator.dataset):,}" if evaluator else "none",
        config.batch_size * world.size * accumulated, " x ".join(filter(None, parts)), steps,
        f"{config.max_steps} updates" if config.max_steps else f"{config.epoch_size} epochs",
    )  # fmt: skip
    log.info("written to %s", Path(config.ckpt_save_dir).absolute())


def _macs(network: nn.Cell, pixels: Preprocessing) -> str:
    """Multiply-accumulates of an image in words; empty where the network cannot be interpreted."""
    try:
        with waiting("Counting multiply-accumulates", quiet_for=10.0):
            rows = summary.layers(network, pixels.in_channels, *pixels.image_size)
    except Exception as error:  # it is only shown
        log.debug("The multiply-accumulates are not counted: %s", error)
        return ""
    return f", {sum(row.macs + row.distances for row in rows) / 1e6:,.1f} M MACs an image"


def say_end(folder: RunFolder, progress: Progress, steps_per_epoch: int, metric: Metric) -> None:
    """Logs the best epoch of a finished run, and what can be done with its weights."""
    best, epochs = progress.best, progress.step / steps_per_epoch
    if best is None:
        log.info("Done: %s has the weights, which were not evaluated", folder.path(int(epochs), progress.step))
        return
    said = (metric.title, progress.scores[best], best / steps_per_epoch, epochs)
    log.info("Done: best %s %.2f %%, in epoch %.4g of %.4g", *said)
    log.info("  mindska predict IMAGE --ckpt_path %s", folder.best_path)
    log.info("  mindska export --format onnx --ckpt_path %s", folder.best_path)


class TimeLeft:
    """How long the rest of a run takes: its steps, and what comes between them.

    Attributes:
        evaluating, saving: seconds that an evaluation (the fastest: the first one compiles) and the last checkpoint
            took; None before the first.
    """

    def __init__(self, config: Config, steps_per_epoch: int, total_steps: int, evaluates: bool) -> None:
        self.config, self.steps_per_epoch, self.evaluates = config, steps_per_epoch, evaluates
        self.total_steps = total_steps
        self.evaluating: Optional[float] = None
        self.saving: Optional[float] = None

    def note_evaluation(self, seconds: float) -> None:
        """An evaluation took so long."""
        self.evaluating = min(seconds, self.evaluating or seconds)

    def seconds(self, step: int, steps_per_second: float) -> float:
        """Of what follows `step`: training at this speed, the evaluations and the checkpoints that are due."""
        total = self.total_steps

        def due(every: int) -> int:
            """How often something is done that is done so often, and at the end."""
            return max(0, -(-total // every) - step // every - (0 if step < total else 1))

        left = (total - step) / steps_per_second
        if self.evaluates and self.evaluating:
            left += due(self.config.val_steps or self.config.val_interval * self.steps_per_epoch) * self.evaluating
        if self.saving:
            left += due(self.config.ckpt_save_interval * self.steps_per_epoch) * self.saving
            if self.config.ckpt_save_steps:
                left += due(self.config.ckpt_save_steps) * self.saving
        return left
