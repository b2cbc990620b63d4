"""Several runs beside each other: their curves in one picture, their figures and the settings that differ."""

from __future__ import annotations

import json
import math
import reprlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import Config, settings_that, to_dict
from .errors import RunError, printable
from .files import replacing
from .training.record import read_rows

# Columns of metrics.csv that say when and how fast, not how well.
NO_FIGURES = ("step", "epoch", "time", "lr", "grad_norm", "loss_scale", "skipped", "images_per_s")
# What settings.json has that tells one run from another and is no setting.
NO_SETTINGS = ("run_id", "first_save", "ckpt_save_dir", "step", "train_set")
NAMES = {
    "loss": "training loss", "val_loss": "validation loss", "lr": "learning rate", "top1": "top-1 in %",
    "miou": "mean IoU in %", "ap": "box AP in %",
}  # fmt: skip
# What the training loss is depends on these: of runs that differ there, it cannot be compared.
MEASURE = ("loss", "label_smoothing", "mixup", "cutmix", "class_weights")
SHOWN = 40  # settings in the table


@dataclass
class Run:
    """A run: what it is called here, the rows of its metrics.csv, and its settings."""

    name: str
    rows: list[dict[str, str]]
    settings: dict[str, Any]

    def series(self, column: str) -> tuple[list[float], list[float]]:
        """Epochs and values of a column, where it has a value."""
        rows = [row for row in self.rows if row.get(column)]
        return [float(row["epoch"]) for row in rows], [float(row[column]) for row in rows]

    def figures(self) -> list[str]:
        """The columns that say how well, and have a value."""
        columns = self.rows[-1] if self.rows else {}
        return [name for name in columns if name not in NO_FIGURES and self.series(name)[0]]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders.

    Raises:
        RunError: one holds no run, or its record cannot be read.
    """
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):  # of the same name: whole paths
        names = [str(folder) for folder in folders]
    return [Run(printable(name), _rows(folder), _settings(folder)) for name, folder in zip(names, folders)]


def _rows(folder: Path) -> list[dict[str, str]]:
    rows, _ = read_rows(folder, None)
    if not rows:
        raise RunError(f"{folder / 'metrics.csv'} has no row: this run has not come that far, or is damaged")
    return rows


def _settings(folder: Path) -> dict[str, Any]:
    """What settings.json says, one level deep; what an earlier version did not know has its default."""
    try:
        found = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing or damaged: there are still the figures
        return {}
    if not isinstance(found, dict):
        return {}
    flat = to_dict(Config())
    for name, value in found.items():
        parts = value.items() if isinstance(value, dict) else ()
        flat.update({f"{name}.{part}": each for part, each in parts} if parts else {name: value})
    return {name: value for name, value in flat.items() if name.split(".")[0] not in NO_SETTINGS}


def differing_settings(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs, with the value in each."""
    names = sorted({name for run in runs for name in run.settings})
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}


def best_and_last(run: Run, column: str) -> tuple[float, float, float]:
    """(best value, the epoch of the first such row, last value) of a figure: of a loss, the smallest is best."""
    epochs, values = run.series(column)
    best = (min if "loss" in column else max)(values)
    return best, epochs[values.index(best)], values[-1]


def table(runs: Sequence[Run]) -> str:
    """Epochs, and of each figure the best (with its epoch) and the last value; then the settings that differ."""
    figures = list(dict.fromkeys(name for run in runs for name in run.figures()))
    lines = [["run", "epochs", *figures]]
    for run in runs:
        cells = [_cell(run, name) for name in figures]
        lines.append([run.name, f"{float(run.rows[-1]['epoch']):g}", *cells])
    text = "Best (epoch), and last:\n\n" + _markdown(lines)
    missing = [run.name for run in runs if not run.settings]
    if missing:
        text += f"\n\nsettings.json is missing or damaged in {', '.join(missing)}: settings are not compared"
        return text
    different = differing_settings(runs)
    if len(runs) > 1 and not different:
        text += "\n\nThe settings are the same."
    if different:
        shown = list(different.items())[:SHOWN]
        rows = [[name, *map(_short, values)] for name, values in shown]
        text += "\n\nSettings that differ:\n\n" + _markdown([["setting", *(run.name for run in runs)], *rows])
        text += f"\n\nand {len(different) - SHOWN} more" if len(different) > SHOWN else ""
    if said := sorted(set(different) & set(MEASURE)):
        text += f"\n\nThe training losses are of different measures ({', '.join(said)}): compare the validation's."
    return text


def over_seeds(runs: Sequence[Run]) -> str:
    """Mean and standard deviation of the figures at the end of runs that differ in their seed only: a row for these.

    Runs of the PyTorch reference have rows of their own. Of two rows, the difference of the means follows, with its
    standard error.

    Raises:
        RunError: two runs of a row have the same seed.
    """
    groups: dict[str, list[Run]] = {}
    no_matter = {"seed", *settings_that("may_change")}
    for run in runs:
        settings = {name: value for name, value in run.settings.items() if name not in no_matter}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    figures = list(dict.fromkeys(name for run in runs for name in run.figures()))
    lines, ends = [["model", "trained by", "seeds", "epochs", *figures]], []
    for some in groups.values():
        seeds = [run.settings.get("seed") for run in some]
        if len(set(seeds)) < len(seeds):
            raise RunError(f"{some[0].name} and others have the same settings and seeds ({seeds}); name each run once")
        end = {name: [run.series(name)[1][-1] for run in some if run.series(name)[1]] for name in figures}
        first = some[0].settings
        by = "PyTorch reference" if "environment.pytorch" in first else "mindska"
        epochs = "/".join(dict.fromkeys(f"{float(run.rows[-1]['epoch']):g}" for run in some))
        cells = [_mean_and_spread(name, values) for name, values in end.items()]
        lines.append([str(first.get("model", "—")), by, ", ".join(map(str, seeds)), epochs, *cells])
        ends.append(end)
    text = "Mean ± standard deviation at the end (of each run):\n\n" + _markdown(lines)
    if len(ends) == 2:
        said = list(filter(None, (_difference(name, *(end[name] for end in ends)) for name in figures)))
        text += f"\n\nThe first row less the second: {'; '.join(said)}" if said else ""
    return text


def _mean_and_spread(column: str, values: Sequence[float]) -> str:
    digits = 4 if "loss" in column else 2
    if not values:
        return "—"
    each = ", ".join(f"{value:.{digits}f}" for value in values)
    if len(values) == 1:
        return each
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f} ({each})"


def _difference(column: str, ours: Sequence[float], theirs: Sequence[float]) -> str:
    if min(len(ours), len(theirs)) < 2:
        return ""
    digits = 4 if "loss" in column else 2
    error = math.sqrt(statistics.variance(ours) / len(ours) + statistics.variance(theirs) / len(theirs))
    difference = statistics.mean(ours) - statistics.mean(theirs)
    return f"{column} {difference:+.{digits}f} (standard error {error:.{digits}f})"


def _cell(run: Run, column: str) -> str:
    if not run.series(column)[0]:
        return "—"
    best, epoch, last = best_and_last(run, column)
    digits = 4 if "loss" in column else 2
    return f"{best:.{digits}f} ({epoch:g}), {last:.{digits}f}"


def _short(value: Any) -> str:
    said = reprlib.Repr()
    said.maxstring = said.maxother = 60
    said.maxlist = 4
    return printable(said.repr(value)) if value not in (None, "", []) else "—"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(
        "| " + " | ".join(row) + " |" + ("\n|" + "---|" * len(row) if not i else "") for i, row in enumerate(rows)
    )


def draw(path: Path, runs: Sequence[Run]) -> None:
    """Draws the runs' losses, first score and learning rate against the epoch, as PNG: a colour a run.

    Raises:
        WriteError: the file cannot be written.
        ModuleNotFoundError: matplotlib is missing.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    scores = [name for run in runs for name in run.figures() if "loss" not in name]
    columns = ["loss", *(["val_loss"] if any(run.series("val_loss")[0] for run in runs) else []), *scores[:1], "lr"]
    figure = Figure(figsize=(5 * len(columns), 4), layout="constrained")
    for axes, column in zip(figure.subplots(1, len(columns)), columns):
        for number, run in enumerate(runs):
            epochs, values = run.series(column)
            style = "o-" if column not in ("loss", "lr") else "-"
            axes.plot(epochs, values, style, color=f"C{number % 10}", markersize=3, label=run.name)
        axes.set(xlabel="epoch", ylabel=NAMES.get(column, column))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
