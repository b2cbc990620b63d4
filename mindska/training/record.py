"""The written record of a run; rank 0 writes it."""

from __future__ import annotations

import contextlib
import csv
import gc
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, Optional

from ..errors import RunError, printable
from ..evaluation import ACCURACY, Metric
from ..files import replacing
from .folder import set_aside, writing

log = logging.getLogger("mindska")

KINDS = ("averaged", "raw")  # of weights; where both are evaluated, the plain columns are of the better
CROSS_ENTROPY = "cross entropy"


def values_of(metric: Metric) -> tuple[str, ...]:
    """The columns of metrics.csv that are measured."""
    of_each = (f"{score}_{kind}" for kind in KINDS for score in metric.columns)
    return ("loss", "lr", "grad_norm", "loss_scale", "skipped", "images_per_s", *metric.columns, *of_each)


def columns_of(metric: Metric) -> tuple[str, ...]:
    """The columns of metrics.csv; time: in seconds since 1970."""
    return ("step", "epoch", "time", *values_of(metric))


def read_rows(folder: Path, metric: Optional[Metric] = ACCURACY) -> tuple[list[dict[str, str]], bool]:
    """The good rows of a run's metrics.csv, none where there is no such file; and whether there is anything else in it.

    A row of an earlier version lacks columns: they are empty. Half a row at the end is no damage: a killed process left
    it. `metric`: of the run; None: whatever columns the file has.

    Raises:
        RunError: the file cannot be read.
    """
    path = folder / "metrics.csv"
    if not os.path.lexists(path):
        return [], False
    if not path.is_file():
        return [], True
    try:
        lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from error
    lines.pop()  # empty, or half a row
    columns = lines[0].strip("\r").split(",") if lines else []
    known = columns_of(metric) if metric else tuple(columns)
    if not lines or not {"step", "epoch", "time"} <= set(columns):
        return [], bool(lines)
    rows: list[dict[str, str]] = []
    damaged = not set(columns) <= set(known)
    for line in lines[1:]:
        cells = line.strip("\r").split(",")
        row = {name: dict(zip(columns, cells)).get(name, "") for name in known}
        if len(cells) == len(columns) and _is_row(row, after=int(rows[-1]["step"]) if rows else 0):
            rows.append(row)
        else:
            damaged = True
    return rows, damaged


def _is_row(row: dict[str, str], after: int) -> bool:
    """Whether these cells are numbers, and the step comes after that of the row before."""
    try:
        for name, cell in row.items():
            if name != "step" and (cell or name in ("epoch", "time")):
                float(cell)
        return int(row["step"]) > after
    except ValueError:
        return False


def _reason(error: Exception) -> str:
    """What an error of a library says, on one line; its kind where it says nothing."""
    return printable(str(error).strip().partition("\n")[0][:300]) or type(error).__name__


@contextlib.contextmanager
def _environment_without(name: str) -> Iterator[None]:
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


INSTALL = " (pip install 'mindska[train]')"

# Keeps the messages from before a run's record is open (which data, which pixels) for its train.log.
early_messages = MemoryHandler(1)


class RunRecord:
    """One continuous record of a run, over any number of restarts: metrics.csv, train.log, TensorBoard, curves.png.

    A context: within it messages are kept, and `begin` opens the files; on leaving, they are closed and the curves
    drawn. A run ends when metrics.csv cannot be written; it goes on, with a warning, without one of the others,
    whatever the libraries that write them raise.
    """

    def __init__(self, folder: Path, measure: str = CROSS_ENTROPY, metric: Metric = ACCURACY) -> None:
        """measure: what the training loss is; the validation loss is the plain cross entropy."""
        self.metric, self.columns, self.values = metric, columns_of(metric), values_of(metric)
        self.folder, self.path, self.log_path = folder, folder / "metrics.csv", folder / "train.log"
        self.measure = measure
        self.curves = folder / "curves.png"
        self.rows: list[dict[str, str]] = []
        self.events: Any = None
        self.log_file: Optional[logging.FileHandler] = None
        self.messages = MemoryHandler(1)  # passes each message on to train.log, once it is open

    def __enter__(self) -> RunRecord:
        log.removeHandler(early_messages)
        self.messages.buffer, early_messages.buffer = early_messages.buffer, []
        log.addHandler(self.messages)
        return self

    def __exit__(self, *error: object) -> None:
        log.removeHandler(self.messages)
        self.messages.close()
        with contextlib.suppress(OSError):  # what could not be written is known
            if self.log_file:
                self.log_file.close()
        with contextlib.suppress(Exception):
            if self.events:
                self.events.close()
        if error[0] is None:
            self.draw()

    def begin(self, resumed_step: int) -> None:
        """Opens the files. What lies after the step from which a run is resumed is taken back: nothing is doubled.

        Raises:
            WriteError: metrics.csv cannot be written.
        """
        rows, damaged = read_rows(self.folder, self.metric)
        self.rows = [row for row in rows if int(row["step"]) <= resumed_step]
        if damaged:
            aside = set_aside(self.path, "damaged").name
            log.warning("%s is damaged, and is now called %s; %d rows of it are good", self.path, aside, len(rows))
        with replacing(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)
        try:
            self._take_back_log(resumed_step)
            self.log_file = logging.FileHandler(self.log_path, encoding="utf-8", errors="backslashreplace")
        except OSError:
            self._without_log()
        else:
            self.log_file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
            # Of this handler alone: without it logging prints a traceback and goes on.
            self.log_file.handleError = self._without_log  # type: ignore[method-assign]
            self.messages.setTarget(self.log_file)
        self._open_events()

    def _take_back_log(self, resumed_step: int) -> None:
        if not self.log_path.exists():
            return
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        steps = ((line, re.search(r"\bstep (\d+)", line, re.IGNORECASE)) for line in lines)
        kept = [line for line, step in steps if line.endswith("\n") and (not step or int(step[1]) <= resumed_step)]
        with replacing(self.log_path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def _without_log(self, record: Optional[logging.LogRecord] = None) -> None:
        log.removeHandler(self.messages)
        log.warning("%s cannot be written (%s): the run goes on without it", self.log_path, sys.exc_info()[1])

    def _open_events(self) -> None:
        """Writes TensorBoard's events anew from the rows, so that they are the same.

        Not with tensorboardX's own SummaryWriter: its thread ends silently when a disk is full, and whoever adds events
        then waits for ever.
        """
        folder = self.folder / "tensorboard"
        try:
            # Imports PyTorch where there is one: a second, for one rank only.
            from tensorboardX.event_file_writer import EventsWriter

            folder.mkdir(exist_ok=True)
            for path in folder.glob("events.out.tfevents.*"):
                path.unlink()
            self.events = EventsWriter(str(folder / "events"))
        except Exception as error:
            self._without_events(error)
        self._add_events(self.rows)

    def _add_events(self, rows: list[dict[str, str]]) -> None:
        if not self.events:
            return
        try:
            from tensorboardX.proto.event_pb2 import Event
            from tensorboardX.proto.summary_pb2 import Summary

            for row in rows:
                values = [Summary.Value(tag=name, simple_value=float(row[name])) for name in self.values if row[name]]
                step, seconds = int(row["step"]), float(row["time"])
                self.events.write_event(Event(step=step, wall_time=seconds, summary=Summary(value=values)))
            self.events.flush()
        except Exception as error:
            self._without_events(error)

    def _without_events(self, error: Exception) -> None:
        self.events = None
        log.warning(
            "TensorBoard's events cannot be written (%s): the run goes on without them; the next start writes them%s",
            _reason(error),
            INSTALL if isinstance(error, ModuleNotFoundError) else "",
        )

    def add(self, step: int, epoch: float, **values: Any) -> None:
        """Adds a row; columns that are not given stay empty.

        Raises:
            RunError: metrics.csv cannot be written.
        """
        given = {"step": step, "epoch": f"{epoch:.4f}", "time": f"{time.time():.3f}", **values}
        given = {name: f"{value:.8g}" if isinstance(value, float) else str(value) for name, value in given.items()}
        row = {name: given.get(name, "") for name in self.columns}
        self.rows.append(row)
        with writing(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerow(row)
        self._add_events([row])

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Epochs and values of a column, where it has a value."""
        rows = [row for row in self.rows if row[name] != ""]
        return [float(row["epoch"]) for row in rows], [float(row[name]) for row in rows]

    def draw(self) -> None:
        """Draws curves.png: loss, scores and learning rate against the epoch.

        No picture ends a run: a warning says what fails.
        """
        try:
            self._draw()
        except Exception as error:
            hint = INSTALL if isinstance(error, ModuleNotFoundError) else ""
            log.warning("%s is not drawn (%s): the run goes on without%s", self.curves, _reason(error), hint)
        gc.collect()  # a picture is full of cycles: of many, tens of megabytes would wait for Python to notice

    def _draw(self) -> None:
        figure = self.figure()
        with replacing(self.curves) as temporary:
            figure.savefig(temporary, dpi=100)

    def figure(self) -> Any:
        """The curves as matplotlib's Figure."""
        with _environment_without("MPLBACKEND"):  # a notebook's or a desktop's, whose absence would be an error
            from matplotlib.figure import Figure
            from matplotlib.ticker import MaxNLocator

        # Losses stand on one axis only where they are the same measure.
        has_loss = "val_loss" in self.columns and bool(self.series("val_loss")[0])
        apart = self.measure != CROSS_ENTROPY and has_loss
        figure = Figure(figsize=(18 if apart else 14, 4), layout="constrained")
        panels = list(figure.subplots(1, 4 if apart else 3))
        panels[0].plot(*self.series("loss"), label="training loss")
        panels[0].set(ylabel=self.measure)
        if apart:
            panels[1].set(ylabel=f"{CROSS_ENTROPY} (another measure than the training loss)")
        if "val_loss" in self.columns:
            panels[int(apart)].plot(*self.series("val_loss"), "o-", markersize=3, label="validation loss")
        middle, right = panels[-2:]
        for name, label in self.metric.shown.items():
            middle.plot(*self.series(name), "o-", markersize=3, label=label)
        middle.set(ylabel=f"{self.metric.what} in %")
        for kind in KINDS:
            score = f"{self.metric.score}_{kind}"
            if any(row[score] for row in self.rows):
                middle.plot(*self.series(score), "--", label=f"{self.metric.title}, {kind} weights")
        right.plot(*self.series("lr"), label="learning rate")
        for axes in panels:
            axes.set(xlabel="epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.grid(alpha=0.3)
            axes.legend()
        return figure
