"""The training loop: batches -> steps -> rows, evaluations and checkpoints; and how a run resumes."""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import mindspore as ms
import numpy as np
from mindspore import Tensor
from tqdm import tqdm

from ..compile_cache import compile_cached
from ..config import Config, settings_that, to_dict
from ..data import TrainLoader, write_list
from ..distributed import World, all_reduce_sum, barrier, broadcast_object
from ..errors import RunError, WeightsError
from ..evaluation import ACCURACY, Evaluator, Metric, Score
from ..streams import unfailing_stderr
from ..waiting import waiting
from ..weights.convert import EMA_PREFIX, STATE_PREFIX
from ..weights.files import read_file, write_checkpoint
from . import resume
from .folder import RunFolder
from .interrupt import EXIT_CODE, StopRequest, end_before_the_first_step
from .messages import TimeLeft, say_end, say_start
from .optim import total_updates
from .plateau import Plateau
from .record import CROSS_ENTROPY, RunRecord, read_rows
from .state import Progress, check_finite, checkpoint_parameters, restore, weight_parameters
from .step import TrainStep

log = logging.getLogger("mindska")


class Trainer:
    """Trains for `config.epoch_size` epochs or `config.max_steps` updates, going on from the newest good checkpoint in
    `config.ckpt_save_dir`. It knows no task: what differs between them is in the arguments.

    Args:
        step: the training step with network, loss and optimiser.
        loader: this rank's training batches.
        rates: learning rate of every update.
        evaluator: evaluates the weights, averaged and raw, in a network of its own; None: no evaluation.
        record: what a checkpoint says of itself (model, preprocessing, classes).
        metric: what the evaluator measures.
        measure: what the training loss is, in words.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        step: TrainStep,
        loader: TrainLoader,
        rates: list[float],
        evaluator: Optional[Evaluator],
        record: dict[str, Any],
        metric: Metric = ACCURACY,
        measure: str = CROSS_ENTROPY,
    ) -> None:
        self.config, self.world, self.step, self.loader, self.rates = config, world, step, loader, rates
        # An epoch is a whole number of updates: what is left of its batches is dropped, as what is left of a batch is.
        self.accumulation = config.gradient_accumulation_steps
        self.steps_per_epoch = loader.steps_per_epoch = loader.steps_per_epoch // self.accumulation * self.accumulation
        self.total_steps = total_updates(config, self.steps_per_epoch) * self.accumulation
        self.evaluator, self.metric, self.measure = evaluator, metric, measure
        self.prepared: set[tuple] = set()  # shapes of the batches for which the step is compiled
        self.record = dict(record, config=to_dict(config), world_size=world.size)
        self.better: dict[str, Any] = {}  # which weights scored higher after the last step, where that is known
        self.folder = RunFolder(Path(config.ckpt_save_dir), config.model, config.keep_checkpoint_max)
        self.progress = Progress()
        self.plateau = Plateau(config, rates, step.optimizer) if config.scheduler == "plateau" else None
        self.pending: list[tuple[Tensor, Tensor]] = []  # outputs of steps that may still be running on the device
        self.on_cpu = ms.get_context("device_target") == "CPU"
        # Reading a result makes the host wait for a device, but costs nothing on CPU.
        self.collect_interval = 1 if self.on_cpu else min(config.log_interval, config.max_skipped_steps)
        self.main = world.rank == 0
        self.time_left = TimeLeft(config, self.steps_per_epoch, self.total_steps, evaluator is not None)
        self.compiling = 0.0  # seconds of the time since the last row that were no training

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
                rows = stack.enter_context(RunRecord(self.folder.folder, self.measure, self.metric))
            barrier()  # nobody reads before the folder is this run's
            resumed = self._resume()
            self._check_equal_start()
            if rows:
                self.folder.begin(self.record["run_id"], self.progress.step)
                rows.begin(self.progress.step)
                self.folder.write_settings(dict(self._settings(), first_save=self._first_save()))
                if self.loader.dataset.held_out is not None:
                    write_list(self.folder.val_files, self.loader.dataset.held_out, self.config.data_dir)
            if resumed:
                log.info("Resuming after step %d of %d from %s", self.progress.step, self.total_steps, resumed)
            self._keep_best()
            self.step.set_train(True)
            say_start(self.config, self.world, self.step, self.loader, self.evaluator, self.record)
            bar = tqdm(
                total=self.total_steps,
                initial=self.progress.step,
                unit="step",
                disable=None if self.main else True,
                file=unfailing_stderr(),
            )
            with bar:
                if not self._stops_early():
                    self._train(rows, bar, stop)
            if self.progress.step < self.total_steps and self._stops_early():
                self._say_early_stop()
            elif self.progress.step < self.total_steps:
                self._save(self.progress.step // self.steps_per_epoch)
                barrier()  # a rank that leaves ends the others
                log.info("Stopped on request after step %d; the same command goes on", self.progress.step)
                raise SystemExit(EXIT_CODE)
            barrier()
            say_end(self.folder, self.progress, self.steps_per_epoch, self.metric)
        return self.progress

    def _train(self, rows: Optional[RunRecord], bar: tqdm, stop: StopRequest) -> None:
        """The steps that remain, until all are done or a rank is asked to stop."""
        first = self.progress.step + 1
        started, done = time.perf_counter(), 0
        self.compiling = 0.0
        for outputs in self._run(self.total_steps - self.progress.step, stop):
            self.pending.append(outputs)
            self.progress.step += 1
            done += self.config.batch_size * self.world.size
            step, epoch = self.progress.step, self.progress.step / self.steps_per_epoch
            end_of_epoch = step % self.steps_per_epoch == 0
            evaluation_due = self._evaluation_due(step)
            row_due = end_of_epoch or evaluation_due or step % self.config.log_interval == 0
            save_due = self._save_due(step)
            if row_due or save_due or step % self.collect_interval == 0:
                self._collect()
                bar.set_postfix(loss=f"{self.progress.losses[-1]:.3f}", lr=f"{self._rate():.2e}", refresh=False)
            bar.update()
            if row_due:
                if rows:
                    self.folder.check_own()
                row = self._summary(epoch, done / (time.perf_counter() - started - self.compiling), bar)
                if evaluation_due:
                    row.update(self._evaluate(bar))
                if rows:
                    self.folder.check_own()  # again: an evaluation may take long
                    rows.add(step, epoch, **row)
            ends = evaluation_due and self._stops_early()
            if save_due or ends:
                self._save(int(epoch))
            if rows and evaluation_due:
                rows.draw()  # after the checkpoints: it is only shown
            if ends:
                break
            if row_due or save_due or self.progress.step == first:
                # What comes between steps (compilation, evaluation, saving) is not the speed of training.
                started, done, self.compiling = time.perf_counter(), 0, 0.0
        self._collect()

    def _stops_early(self) -> bool:
        """Whether there were so many evaluations without a better score that the run ends."""
        patience = self.config.early_stopping
        # Rank 0's, for all: it may have lost scores together with their checkpoints.
        return bool(patience) and broadcast_object(self.progress.since_best >= patience)

    def _say_early_stop(self) -> None:
        best, step = self.progress.best, self.progress.step
        log.info(
            "Early stopping after epoch %g of %g: no better %s in %d evaluations%s. A larger early_stopping goes on",
            self._epoch(step), self._epoch(self.total_steps), self.metric.title, self.progress.since_best,
            f" (best: {self.progress.scores[best]:.2f} % after epoch {self._epoch(best):g})" if best else "",
        )  # fmt: skip

    def _epoch(self, step: int) -> float:
        """So many epochs are done after `step`, to two digits."""
        return round(step / self.steps_per_epoch, 2)

    def _rate(self) -> float:
        """Learning rate of the last update (skipped ones do not advance the schedule)."""
        updates = int(self.step.optimizer.global_step.asnumpy().item())
        return self.rates[max(updates, 1) - 1]

    def _settings(self) -> dict[str, Any]:
        """What settings.json says of the run."""
        known = {name: self.record.get(name) for name in ("world_size", "run_id", "environment", "train_set")}
        data = dict(images=self.record["train_set"]["images"], class_names=self.loader.dataset.class_names)
        return {**resume.effective_settings(self.record["config"], self.record), **known, **data}

    def _resume(self) -> Optional[Path]:
        """Restores the newest readable checkpoint of this run; None when there is none."""
        # Rank 0's, for all: hosts may differ, and counting files takes time.
        here = (resume.environment(), resume.identity(self.loader.dataset), self._validation()) if self.main else None
        self.record["environment"], self.record["train_set"], validation = broadcast_object(here)
        folder, old = self.folder.folder, resume.read_settings(self.folder)
        saved = self.folder.saved()
        if saved and not self.config.resume:
            raise RunError(
                f"{folder} already holds a run (newest checkpoint: {saved[0].path.name}), and resume is "
                f"false. Choose another --ckpt_save_dir, or leave out --resume false to go on with it."
            )
        if not saved:
            self.record["run_id"] = old.get("run_id") or secrets.token_hex(8)
            self._check_nothing_lost(old)
            self.progress.validation = validation
            log.info("No checkpoint in %s: starting from the beginning", folder)
            return None
        for state in resume.own_checkpoints(self.folder, old, quiet=not self.main):
            self._check_same_run({**old, **resume.settings_of_checkpoint(state.record)})
            try:
                restore(state, self.step)
            except WeightsError as error:
                log.warning("Skipping a checkpoint that cannot be used: %s", error)
                continue
            self._adopt_checkpoint(state, validation)
            if not old:
                log.info("settings.json is missing or damaged: the checkpoint's own record was compared instead")
            return state.path
        raise RunError(
            f"None of the {len(saved)} checkpoints in {folder} can be used; see above. Choose another "
            f"--ckpt_save_dir, or remove them to start again."
        )

    def _adopt_checkpoint(self, state: resume.State, validation: Optional[dict[str, Any]]) -> None:
        """Takes over what a checkpoint says of its run."""
        began, self.progress = state.record["config"], state.progress
        if self.plateau:
            self.plateau.restore(self.progress.plateau)
        resume.say_initial_weights(began, self.config)
        self.record["run_id"] = state.record.get("run_id")
        self.better = {
            name: state.record[name] for name in ("weights", self.metric.score, "validation") if name in state.record
        }
        self.record["config"].update({n: began[n] for n in settings_that("first_start") if n in began})
        before = self.progress.validation
        if validation is not None:
            if self.progress.scores and before is not None and before != validation:
                log.info(
                    "The validation set is another one (%s images, now %s): best starts anew with the next evaluation. "
                    "metrics.csv keeps the scores so far, which cannot be compared with those to come",
                    before.get("images"), validation["images"],
                )  # fmt: skip
                self.progress.scores = {}
            self.progress.validation = validation

    def _validation(self) -> Optional[dict[str, Any]]:
        return None if self.evaluator is None else resume.identity(self.evaluator)

    def _check_nothing_lost(self, old: dict[str, Any]) -> None:
        """RunError when the folder, which holds no checkpoint, has the record of a run that did more than begin."""
        rows, _ = read_rows(self.folder.folder, self.metric)
        if not rows:
            return
        if old:
            self._check_same_run(dict(old, environment=self.record["environment"]))  # it begins again: any will do
        last, first_save = int(rows[-1]["step"]), old.get("first_save")
        if not self.config.resume or last > (first_save if isinstance(first_save, int) else 0):
            raise RunError(
                f"{self.folder.folder} holds the record of a run up to step {last} (metrics.csv), but none of its "
                f"checkpoints. Choose another --ckpt_save_dir, or remove metrics.csv to start again."
            )

    def _check_same_run(self, old: dict[str, Any]) -> None:
        """RunError when the folder's run had other settings than may change, or another environment."""
        folder = self.folder.folder
        at_epoch = old.get("step", 0) % self.steps_per_epoch == 0
        new = self._settings()
        for name in resume.LENGTH:  # compared below, after all the others
            new[name] = old.get(name, getattr(self.config, name))
        resume.check_same_settings(folder, old, new, at_epoch)
        resume.check_length(folder, old, self.config, self.steps_per_epoch)
        resume.check_same_environment(
            folder, old.get("environment"), self.record["environment"], self.config.allow_other_environment
        )

    def _first_save(self) -> int:
        """Up to which step the folder may have rows without having a checkpoint; 0 when it has one."""
        if self.progress.step:
            return 0
        return next(step for step in range(1, self.total_steps + 1) if self._save_due(step))

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
        sinks, advance = self.config.dataset_sink_mode and not self.on_cpu, None
        if sinks:
            advance = ms.data_sink(self.step, self.loader.as_dataset(self.progress.step, steps)) if steps else None
        else:
            batches = self.loader.batches(self.progress.step, steps)
            if self.config.dataset_sink_mode:
                log.info("dataset_sink_mode has no effect on CPU")
        stopping, began = False, None
        for done in range(steps):
            tensors = () if sinks else [Tensor(array) for array in next(batches)]
            shapes = tuple(tensor.shape for tensor in tensors)
            if tensors and shapes not in self.prepared:
                if self._any_rank(stop.requested):
                    return
                began = time.perf_counter()
                with tqdm.external_write_mode(file=unfailing_stderr()):
                    compile_cached(
                        self.step,
                        *tensors,
                        options=self.config,
                        what="the training step",
                        on_signal=end_before_the_first_step,
                    )
                    if (
                        self.evaluator is not None and not self.prepared
                    ):  # later, a signal meanwhile would cost the steps of an epoch
                        self.evaluator.prepare(self.config, end_before_the_first_step)
                self.prepared.add(shapes)
            # All ranks must stop after the same step. On CPU they meet before every step: MindSpore's collectives fail
            # there when a rank comes 30 s after another, and this has no limit.
            if self.on_cpu or done % self.collect_interval == 0:
                stopping = self._any_rank(stop.requested)
            if began is not None:  # and until all ranks have met
                self.compiling, began = time.perf_counter() - began, None
            if stopping and self.progress.step % self.accumulation == 0:
                return
            yield self.step(*tensors) if advance is None else advance()

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
        losses = [loss for loss in self.progress.losses if np.isfinite(loss)]
        norms = [norm for norm in self.progress.norms if np.isfinite(norm)]
        row = dict(
            loss=float(np.mean(losses)) if losses else float("nan"),
            lr=self._rate(),
            grad_norm=max(norms, default=float("nan")),
            loss_scale=float(self.step.loss_scale.asnumpy()),
            skipped=int(self.step.skipped.asnumpy()),
            images_per_s=float(speed),
        )
        self.progress.losses, self.progress.norms = [], []
        left = self.time_left.seconds(self.progress.step, speed / (self.config.batch_size * self.world.size))
        # On a terminal the bar shows it; the file has it in any case.
        log.log(
            logging.INFO if bar.disable else logging.DEBUG,
            "epoch %.2f, step %d/%d: loss %.4f, lr %.3e, %.1f images/s, %s left",
            epoch, self.progress.step, self.total_steps, row["loss"], row["lr"], speed, tqdm.format_interval(left),
        )  # fmt: skip
        return row

    def _evaluation_due(self, step: int) -> bool:
        if self.evaluator is None:
            return False
        every = self.config.val_steps or self.config.val_interval * self.steps_per_epoch
        return step % every == 0 or step == self.total_steps

    def _evaluate(self, bar: tqdm) -> dict[str, float]:
        """Evaluates, keeps the best weights, and returns the row's further values."""
        begun = time.perf_counter()
        with waiting("Evaluating", quiet_for=10.0):
            results = self.evaluate()
        self.time_left.note_evaluation(time.perf_counter() - begun)
        # At equal scores the average, as where only one kind is evaluated.
        scores = {kind: result.columns() for kind, result in results.items()}
        kind = max(results, key=lambda kind: (scores[kind][self.metric.score], kind == "averaged"))
        score = scores[kind][self.metric.score]
        self.better = {"weights": kind, self.metric.score: score, "validation": self.progress.validation}
        best_before = self.progress.best
        self.progress.scores[self.progress.step] = score
        if self.plateau:
            self.plateau.note(score, int(self.step.optimizer.global_step.asnumpy().item()))
            self.progress.plateau = self.plateau.state
        said, columns = str(results[kind]), dict(scores[kind])
        if len(results) > 1:
            (other,) = set(results) - {kind}
            said += f" with the {kind} weights (the {other} ones: {results[other]})"
            for each in results:
                columns.update({f"{name}_{each}": value for name, value in scores[each].items()})
        if self.main:
            with bar.external_write_mode():
                log.info("epoch %g, step %d: %s", self._epoch(self.progress.step), self.progress.step, said)
            if self.progress.best != best_before:
                self._write_best()
            self._keep_best()
        return columns

    def _write_best(self) -> None:
        epoch = self.progress.step // self.steps_per_epoch
        self._write(self.folder.best_path, weight_parameters(self.step), dict(self.better, epoch=epoch))

    def _keep_best(self) -> None:
        """Writes the best weights again where their file has vanished, from the checkpoint of their step.

        Where that has vanished too, the best of those that are left count as best from now on.
        """
        path = self.folder.best_path
        if not self.main or path.exists() or not self.progress.scores:
            return
        kept = {entry.step: entry for entry in self.folder.saved() if self.folder.owns(entry.path)}
        while (best := self.progress.best) is not None and best != self.progress.step and best not in kept:
            del self.progress.scores[best]
        if best is None:
            log.warning("%s has vanished, and so have the checkpoints of all scores: the next one is best", path)
            return
        log.warning("%s has vanished: the weights of step %d are written again", path, best)
        if best == self.progress.step:
            self._write_best()
            return
        arrays, record = read_file(kept[best].path, checksum_required=True)
        weights = {name: array for name, array in arrays.items() if not name.startswith(STATE_PREFIX)}
        with self.folder.writing_checkpoint(path):
            write_checkpoint(path, weights, {name: value for name, value in record.items() if name != "progress"})

    def _save_due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after `step`: only between updates, whose gradients it does not hold."""
        if step % self.accumulation:
            return False
        every, epochs = self.config.ckpt_save_steps, self.config.ckpt_save_interval * self.steps_per_epoch
        within = every and step // every > (step - self.accumulation) // every
        return bool(within) or step % epochs == 0 or step == self.total_steps

    def evaluate(self) -> dict[str, Score]:
        """Scores of the averaged weights, where there are any, and of the raw ones."""
        assert self.evaluator is not None  # nobody asks without a validation set
        kinds = {"raw": self.step.all_parameters}
        if self.step.ema is not None:
            kinds = {"averaged": self.step.ema, **(kinds if self.config.val_raw else {})}
        statistics = {p.name for p in self.step.statistics}
        # Batch-norm statistics differ between ranks; those of rank 0 are saved, so they are what is evaluated.
        every = [p for source in kinds.values() for p in source]
        ours = {p.name: p.asnumpy() for p in every if p.name.removeprefix(EMA_PREFIX) in statistics}
        shared = broadcast_object(ours)
        targets = list(self.evaluator.network.get_parameters())

        def putting_in(source: list[ms.Parameter]) -> Callable[[], None]:
            values = [ms.Tensor(shared.get(p.name, p.asnumpy()), target.dtype) for p, target in zip(source, targets)]

            def put_in() -> None:
                for target, value in zip(targets, values):
                    target.set_data(value)

            return put_in

        each = [putting_in(source) for source in kinds.values()]
        return dict(zip(kinds, self.evaluator.evaluate(each, self.config)))

    def _save(self, epoch: int) -> None:
        if self.main:
            begun = time.perf_counter()
            record = dict(self.better if self.progress.step in self.progress.scores else {}, epoch=epoch)
            path = self.folder.path(epoch, self.progress.step)
            self._write(path, checkpoint_parameters(self.step), dict(record, progress=self.progress.to_json()))
            self.folder.prune(self.progress.scores)
            self.time_left.saving = time.perf_counter() - begun

    def _write(self, path: Path, parameters: dict[str, ms.Parameter], facts: dict[str, Any]) -> None:
        check_finite(parameters, self.progress.step)
        with self.folder.writing_checkpoint(path):
            write_checkpoint(path, parameters, {**self.record, **facts})
