"""The written record of a run; rank 0 writes it."""

from __future__ import annotations

import csv
import logging
import re
from pathlib import Path
from typing import Any

from ..weights.files import replacing

COLUMNS = (
    "step", "epoch", "loss", "lr", "grad_norm", "loss_scale", "skipped", "images_per_s", "top1", "top5", "val_loss"
)  # fmt: skip


def read_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv; none where there is no such file."""
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        # A killed process may have left half a row at the end.
        return [row for row in csv.DictReader(file) if None not in row.values() and None not in row]


class RunRecord:
    """One continuous record of a run, over any number of restarts: metrics.csv, train.log, TensorBoard, curves.png.

    What lies after the step from which a run is resumed is taken back, so that nothing is doubled. A context: on
    leaving, the files are closed and the curves drawn.
    """

    def __init__(self, folder: Path, resumed_step: int) -> None:
        from tensorboardX import SummaryWriter  # imports PyTorch where there is one: a second, for one rank only

        self.path, self.log_path, self.curves = folder / "metrics.csv", folder / "train.log", folder / "curves.png"
        self.rows = [row for row in read_rows(folder) if int(row["step"]) <= resumed_step]
        with replacing(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        self._take_back_log(resumed_step)
        self.summary = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)
        self.handler = logging.FileHandler(self.log_path, encoding="utf-8")
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    def __enter__(self) -> RunRecord:
        logging.getLogger("mindska").addHandler(self.handler)
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger("mindska").removeHandler(self.handler)
        self.handler.close()
        self.summary.close()
        if error[0] is None:
            self.draw()

    def _take_back_log(self, resumed_step: int) -> None:
        if not self.log_path.exists():
            return
        lines = self.log_path.read_text(encoding="utf-8").splitlines(keepends=True)
        steps = ((line, re.search(r"\bstep (\d+)", line)) for line in lines)
        kept = [line for line, step in steps if line.endswith("\n") and (not step or int(step[1]) <= resumed_step)]
        with replacing(self.log_path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def add(self, step: int, epoch: float, **values: Any) -> None:
        """Adds a row; columns that are not given stay empty."""
        row = {"step": step, "epoch": f"{epoch:.4f}"}
        for name, value in values.items():
            row[name] = f"{value:.8g}" if isinstance(value, float) else str(value)
            self.summary.add_scalar(name, value, step)
        row = {name: row.get(name, "") for name in COLUMNS}
        self.rows.append(row)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Epochs and values of a column, where it has a value."""
        rows = [row for row in self.rows if row[name] != ""]
        return [float(row["epoch"]) for row in rows], [float(row[name]) for row in rows]

    def draw(self) -> None:
        """Draws curves.png: loss, accuracy and learning rate against the epoch."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
        left.plot(*self.series("loss"), label="training loss")
        left.plot(*self.series("val_loss"), "o-", markersize=3, label="validation loss")
        middle.plot(*self.series("top1"), "o-", markersize=3, label="top-1")
        middle.plot(*self.series("top5"), "o-", markersize=3, label="top-5")
        right.plot(*self.series("lr"), label="learning rate")
        for axes, unit in ((left, "cross entropy"), (middle, "validation accuracy in %"), (right, "")):
            axes.set(xlabel="epoch", ylabel=unit)
            axes.grid(alpha=0.3)
            axes.legend()
        figure.savefig(self.curves, dpi=100)
        pyplot.close(figure)
