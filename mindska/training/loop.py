"""The training loop: batches -> steps -> rows, evaluations and checkpoints; and how a run resumes."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from tqdm import tqdm

from ..compile_cache import compile_cached
from ..config import Config, differences, to_dict
from ..data import EvalLoader, TrainLoader
from ..distributed import World, all_reduce_sum, barrier, broadcast_object
from ..evaluation import EvalStep, Result, evaluate
from ..weights import WeightsError
from ..weights.files import EMA_PREFIX, write_checkpoint
from .folder import RunError, RunFolder
from .interrupt import EXIT_CODE, StopRequest
from .record import RunRecord, read_rows
from .state import load_state, save_state, weight_parameters
from .step import TrainStep

log = logging.getLogger("mindska")

# What may differ between a run and the one that it goes on from.
FREE = {
    "device_target", "mode", "data_dir", "max_damaged", "val_skip_damaged", "num_parallel_workers", "dataset_sink_mode",
    "ckpt_save_dir", "resume", "distribute", "keep_checkpoint_max", "ckpt_save_interval", "ckpt_save_steps",
    "val_while_train", "val_interval", "val_split", "log_interval", "max_skipped_steps", "result_json",
}  # fmt: skip


@dataclass
class Progress:
    """Where a run stands; kept in every checkpoint.

    Attributes:
        step: finished batches; losses: those since the last row of metrics.csv; scores: top-1 (percent) of evaluated
        steps; best: the step with the highest.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)

    @property
    def best(self) -> Optional[int]:
        return max(self.scores, key=lambda step: (self.scores[step], -step)) if self.scores else None

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self), scores={str(step): score for step, score in self.scores.items()})

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Progress:
        return cls(**{**values, "scores": {int(step): score for step, score in values["scores"].items()}})


class Trainer:
    """Trains for `config.epoch_size` epochs, going on from the newest good checkpoint in `config.ckpt_save_dir`.

    Args:
        step: the training step with network, loss and optimiser.
        loader: this rank's training batches.
        rates: learning rate of every update.
        eval_network: a second instance of the network, in which the (averaged) weights are evaluated.
        eval_loader: this rank's validation batches. None for both: no evaluation.
        record: what a checkpoint says of itself (model, preprocessing, classes).
    """

    def __init__(
        self,
        config: Config,
        world: World,
        step: TrainStep,
        loader: TrainLoader,
        rates: list[float],
        eval_network: Optional[nn.Cell],
        eval_loader: Optional[EvalLoader],
        record: dict[str, Any],
    ) -> None:
        self.config, self.world, self.step, self.loader, self.rates = config, world, step, loader, rates
        # An epoch is a whole number of updates: what is left of its batches is dropped, as what is left of a batch is.
        self.accumulation = config.gradient_accumulation_steps
        self.steps_per_epoch = loader.steps_per_epoch = loader.steps_per_epoch // self.accumulation * self.accumulation
        self.total_steps = self.steps_per_epoch * config.epoch_size
        self.eval_network, self.eval_loader = eval_network, eval_loader
        self.eval_step = EvalStep(eval_network).set_train(False) if eval_network is not None else None
        self.prepared = False
        self.record = dict(record, config=to_dict(config), world_size=world.size)
        self.folder = RunFolder(Path(config.ckpt_save_dir), config.model, config.keep_checkpoint_max)
        self.progress = Progress()
        self.pending: list[tuple[Tensor, Tensor]] = []  # outputs of steps that may still be running on the device
        self.on_cpu = ms.get_context("device_target") == "CPU"
        # Reading a result makes the host wait for a device, but costs nothing on CPU.
        self.collect_interval = 1 if self.on_cpu else min(config.log_interval, config.max_skipped_steps)
        self.main = world.rank == 0

    def fit(self) -> Progress:
        """Runs to the end and returns where it stands.

        Raises:
            RunError: the output folder belongs to another run or cannot be written, the loss stays non-finite, ranks
                start unequal.
            SystemExit: a signal asked the run to stop; it did, after an update and with a checkpoint.
        """
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            rows = None
            if self.main:
                stack.enter_context(self.folder.locked())
                rows = stack.enter_context(RunRecord(self.folder.folder))
            barrier()  # nobody reads before the folder is this run's
            resumed = self._resume()
            self._check_equal_start()
            if rows:
                self.folder.set_aside(after=self.progress.step)
                rows.begin(self.progress.step)
                self.folder.write_settings(dict(self._settings(), first_save=self._first_save()))
            if resumed:
                log.info("Resuming after step %d of %d from %s", self.progress.step, self.total_steps, resumed)
            self.step.set_train(True)
            bar = tqdm(
                total=self.total_steps, initial=self.progress.step, unit="step", disable=None if self.main else True
            )
            with bar:
                self._train(rows, bar, stop)
            if self.progress.step < self.total_steps:
                self._save(self.progress.step // self.steps_per_epoch)
                barrier()  # a rank that leaves ends the others
                log.info("Stopped on request after step %d; the same command goes on", self.progress.step)
                raise SystemExit(EXIT_CODE)
            barrier()
        return self.progress

    def _train(self, rows: Optional[RunRecord], bar: tqdm, stop: StopRequest) -> None:
        """The steps that remain, until all are done or a rank is asked to stop."""
        first = self.progress.step + 1
        started, done = time.perf_counter(), 0
        for outputs in self._run(self.total_steps - self.progress.step, stop):
            self.pending.append(outputs)
            self.progress.step += 1
            done += self.config.batch_size * self.world.size
            step, epoch = self.progress.step, self.progress.step / self.steps_per_epoch
            end_of_epoch = step % self.steps_per_epoch == 0
            row_due = end_of_epoch or step % self.config.log_interval == 0
            save_due = self._due(step)
            if row_due or save_due or step % self.collect_interval == 0:
                self._collect()
                bar.set_postfix(loss=f"{self.progress.losses[-1]:.3f}", lr=f"{self._rate():.2e}", refresh=False)
            bar.update()
            if row_due:
                row = self._summary(epoch, done / (time.perf_counter() - started), bar)
                if end_of_epoch:
                    row.update(self._evaluate_epoch(round(epoch), bar))
                if rows:
                    rows.add(step, epoch, **row)
                    if "top1" in row:
                        rows.draw()
            if save_due:
                self._save(int(epoch))
            if row_due or save_due or self.progress.step == first:
                # What comes between steps (compilation, evaluation, saving) is not the speed of training.
                started, done = time.perf_counter(), 0
        self._collect()

    def _rate(self) -> float:
        """Learning rate of the last update (skipped ones do not advance the schedule)."""
        updates = int(self.step.optimizer.global_step.asnumpy().item())
        return self.rates[max(updates, 1) - 1]

    def _settings(self) -> dict[str, Any]:
        data = dict(images=len(self.loader.dataset), class_names=self.loader.dataset.class_names)
        return dict(self.record["config"], world_size=self.world.size, **data)

    def _resume(self) -> Optional[Path]:
        """Restores the newest readable checkpoint of this run; None when there is none."""
        saved = self.folder.saved()
        if saved and not self.config.resume:
            raise RunError(
                f"{self.folder.folder} already holds a run (newest checkpoint: {saved[0].path.name}), and resume is "
                f"false. Choose another --ckpt_save_dir, or leave out --resume false to go on with it."
            )
        if not saved:
            self._check_nothing_lost()
            log.info("No checkpoint in %s: starting from the beginning", self.folder.folder)
            return None
        for entry in saved:
            self._check_same_run(self.folder.settings(), at_epoch=entry.step % self.steps_per_epoch == 0)
            try:
                record = load_state(entry.path, self.step)
            except WeightsError as error:
                log.warning("Skipping a checkpoint that cannot be used: %s", error)
                continue
            self.progress = Progress.from_json(record["progress"])
            return entry.path
        raise RunError(
            f"None of the {len(saved)} checkpoints in {self.folder.folder} can be used; see above. Choose another "
            f"--ckpt_save_dir, or remove them to start again."
        )

    def _check_nothing_lost(self) -> None:
        """RunError when the folder, which holds no checkpoint, has the record of a run that did more than begin."""
        rows = read_rows(self.folder.folder)
        if not rows:
            return
        self._check_same_run(self.folder.settings(), at_epoch=True)
        last = int(rows[-1]["step"])
        if not self.config.resume or last > self.folder.settings().get("first_save", 0):
            raise RunError(
                f"{self.folder.folder} holds the record of a run up to step {last} (metrics.csv), but none of its "
                f"checkpoints. Choose another --ckpt_save_dir, or remove metrics.csv to start again."
            )

    def _first_save(self) -> int:
        """Up to which step the folder may have rows without having a checkpoint; 0 when it has one."""
        if self.progress.step:
            return 0
        return next(step for step in range(1, self.total_steps + 1) if self._due(step))

    def _check_same_run(self, old: dict[str, Any], at_epoch: bool) -> None:
        """RunError when the folder's run had other settings than may change."""
        new, ignored = self._settings(), FREE | {"first_save"}
        if not old:
            return
        same_batches = old["batch_size"] * old["world_size"] == new["batch_size"] * new["world_size"]
        if at_epoch and same_batches and not (self.config.mixup or self.config.cutmix):
            # The same global batches on another number of ranks: sound at the boundary of an epoch. But mixing pairs
            # the samples of one rank.
            ignored |= {"batch_size", "world_size"}
        changed = [line for line in differences(old, new) if line.split(":")[0] not in ignored]
        if changed:
            raise RunError(
                f"{self.folder.folder} holds a run with other settings:\n  "
                + "\n  ".join(changed)
                + "\nGo on with those, or choose another --ckpt_save_dir."
            )
        if old["world_size"] != new["world_size"]:
            log.info("Going on with %d instead of %d ranks", new["world_size"], old["world_size"])

    def _check_equal_start(self) -> None:
        """All ranks must start from the same weights: a different seed or file on one would go unnoticed."""
        total = self.progress.step + sum(
            float(np.abs(p.asnumpy()).sum(dtype=np.float64)) for p in self.step.network.get_parameters()
        )
        mean = float(all_reduce_sum(np.array([total]))[0]) / self.world.size
        if not np.isclose(mean, total, rtol=1e-12, atol=0):
            raise RunError(
                f"Rank {self.world.rank} starts from other weights than the other ranks. Do all hosts see the same "
                f"{self.folder.folder} and the same --ckpt_path?"
            )

    def _run(self, steps: int, stop: StopRequest) -> Iterator[tuple[Tensor, Tensor]]:
        """Runs so many steps, fewer when a rank is asked to stop; yields the outputs of each."""
        sinks = self.config.dataset_sink_mode and not self.on_cpu
        if sinks:
            advance = ms.data_sink(self.step, self.loader.as_dataset(self.progress.step, steps)) if steps else None
        else:
            batches = self.loader.batches(self.progress.step, steps)
            if self.config.dataset_sink_mode:
                log.info("dataset_sink_mode has no effect on CPU")
        stopping = False
        for done in range(steps):
            tensors = () if sinks else [Tensor(array) for array in next(batches)]
            if tensors and not self.prepared:
                compile_cached(self.step, *tensors, options=self.config)
                self.prepared = True
            # All ranks must stop after the same step. On CPU they meet before every step: MindSpore's collectives fail
            # there when a rank comes 30 s after another, and this has no limit.
            if self.on_cpu or done % self.collect_interval == 0:
                stopping = self._any_rank(stop.requested)
            if stopping and self.progress.step % self.accumulation == 0:
                return
            yield advance() if sinks else self.step(*tensors)

    @staticmethod
    def _any_rank(flag: bool) -> bool:
        return bool(all_reduce_sum(np.array([float(flag)]))[0] > 0)

    def _collect(self) -> None:
        """Takes the pending outputs into the progress.

        Raises:
            RunError: too many updates in a row were skipped.
        """
        first = self.progress.step - len(self.pending) + 1
        for step, (loss, norm) in enumerate(self.pending, start=first):
            self.progress.losses.append(float(loss.asnumpy()))
            self.progress.norms.append(float(norm.asnumpy()))
            if not np.isfinite(self.progress.losses[-1] + self.progress.norms[-1]):
                log.warning("Step %d was skipped: its loss or gradients are not finite", step)
        self.pending = []
        skipped = int(self.step.skipped_in_a_row.asnumpy())
        if skipped >= self.config.max_skipped_steps:
            raise RunError(
                f"The loss was not finite in {skipped} updates in a row, up to step {self.progress.step} "
                f"(max_skipped_steps). Lower the learning rate, clip the gradients, or look at the data."
            )

    def _summary(self, epoch: float, speed: float, bar: tqdm) -> dict[str, Any]:
        """The row of metrics.csv for the steps since the last one."""
        finite = [loss for loss in self.progress.losses if np.isfinite(loss)]
        row = dict(
            loss=float(np.mean(finite)) if finite else float("nan"),
            lr=self._rate(),
            grad_norm=max(self.progress.norms),
            loss_scale=float(self.step.loss_scale.asnumpy()),
            skipped=int(self.step.skipped.asnumpy()),
            images_per_s=float(speed),
        )
        self.progress.losses, self.progress.norms = [], []
        left = (self.total_steps - self.progress.step) * self.config.batch_size * self.world.size / speed
        # On a terminal the bar shows it; the file has it in any case.
        log.log(
            logging.INFO if bar.disable else logging.DEBUG,
            "epoch %.2f, step %d/%d: loss %.4f, lr %.3e, %.1f images/s, %s left",
            epoch, self.progress.step, self.total_steps, row["loss"], row["lr"], speed, tqdm.format_interval(left),
        )  # fmt: skip
        return row

    def _evaluate_epoch(self, epoch: int, bar: tqdm) -> dict[str, float]:
        """Evaluates when it is time, keeps the best weights, and returns the row's further values."""
        last = epoch == self.config.epoch_size
        if self.eval_loader is None or not (last or epoch % self.config.val_interval == 0):
            return {}
        result = self.evaluate()
        best_before = self.progress.best
        self.progress.scores[self.progress.step] = result.top1
        if self.main:
            with bar.external_write_mode():
                log.info("epoch %d, step %d: %s", epoch, self.progress.step, result)
            if self.progress.best != best_before:
                record = dict(self.record, epoch=epoch, top1=result.top1)
                write_checkpoint(self.folder.best_path, weight_parameters(self.step), record)
        return dict(top1=result.top1, top5=result.top5, val_loss=result.loss)

    def _due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after `step`: only between updates, whose gradients it does not hold."""
        if step % self.accumulation:
            return False
        every, epochs = self.config.ckpt_save_steps, self.config.ckpt_save_interval * self.steps_per_epoch
        within = every and step // every > (step - self.accumulation) // every
        return bool(within) or step % epochs == 0 or step == self.total_steps

    def evaluate(self) -> Result:
        """Accuracy of the (averaged) weights on the validation set."""
        source = self.step.ema if self.step.ema is not None else self.step.averaged
        statistics = {p.name for p in self.step.statistics}
        # Batch-norm statistics differ between ranks; those of rank 0 are saved, so they are what is evaluated.
        ours = {p.name: p.asnumpy() for p in source if p.name.removeprefix(EMA_PREFIX) in statistics}
        shared = broadcast_object(ours)
        for target, parameter in zip(self.eval_network.get_parameters(), source):
            value = shared[parameter.name] if parameter.name in shared else parameter.asnumpy()
            target.set_data(ms.Tensor(value, target.dtype))
        return evaluate(self.eval_step, self.eval_loader, all_reduce_sum, self.config)

    def _save(self, epoch: int) -> None:
        if self.main:
            record = dict(self.record, epoch=epoch, progress=self.progress.to_json())
            save_state(self.folder.path(epoch, self.progress.step), self.step, record)
            self.folder.prune(self.progress.scores)
