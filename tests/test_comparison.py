"""`mindska compare`: several runs beside each other."""

import csv
import json
import sys
from pathlib import Path

import pytest

from mindska import commands
from mindska.config import Config, to_dict
from mindska.evaluation import ACCURACY
from mindska.segmentation.evaluation import MEAN_IOU
from mindska.training.record import columns_of


def make_run(folder, scores, **settings):
    """A run's record as training writes it: two rows an epoch, the second one with an evaluation."""
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns_of(ACCURACY))
        writer.writeheader()
        for epoch, score in enumerate(scores, start=1):
            common = dict(time=0, loss=2 / epoch, lr=0.1, images_per_s=9)
            writer.writerow(dict(common, step=10 * epoch - 5, epoch=epoch - 0.5))
            writer.writerow(dict(common, step=10 * epoch, epoch=epoch, top1=score, top5=100, val_loss=1 / score))
    environment = dict(mindspore=settings.pop("mindspore", "2.8.0"), mode="graph")
    known = dict(to_dict(Config(**settings)), run_id=str(folder), environment=environment, class_names=["a", "b"])
    (folder / "settings.json").write_text(json.dumps(known))
    return str(folder)


def test_figures_settings_and_picture(tmp_path, capsys):
    one = make_run(tmp_path / "one", [50, 80, 70], lr=0.1, freeze=("stem",))
    two = make_run(tmp_path / "two", [60, 65], lr=0.2, mixup=0.2, mindspore="2.7.1")
    commands.main(["compare", one, two, "--out", str(tmp_path / "both.png")])
    printed = capsys.readouterr().out
    for line in (
        "| run | epochs | loss | top1 | top5 | val_loss |",
        "| one | 3 | 0.6667 (2.5), 0.6667 | 80.00 (2), 70.00 | 100.00 (1), 100.00 | 0.0125 (2), 0.0143 |",
        "| two | 2 | 1.0000 (1.5), 1.0000 | 65.00 (2), 65.00 | 100.00 (1), 100.00 | 0.0154 (2), 0.0154 |",
        "| setting | one | two |",
        "| lr | 0.1 | 0.2 |",
        "| freeze | ['stem'] | — |",
        "| environment.mindspore | '2.8.0' | '2.7.1' |",
        "The training losses are of different measures (mixup): compare the validation's.",
    ):
        assert line in printed.splitlines(), printed
    assert "run_id" not in printed and "mode" not in printed and "weight_decay" not in printed
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_differ_in_their_seed_are_one_row(tmp_path, capsys):
    """Ours and the reference's are two; a setting that may change makes no row of its own, another one does."""
    ours = [make_run(tmp_path / f"ours{s}", [50, 80 + s], seed=s, log_interval=s + 1, model="a|b") for s in (1, 2, 3)]
    theirs = [make_run(tmp_path / f"theirs{s}", [60, 80 - s], seed=s, model="a|b") for s in (1, 2)]
    for run in theirs:
        settings = json.loads((Path(run) / "settings.json").read_text())
        (Path(run) / "settings.json").write_text(json.dumps({**settings, "environment": {"pytorch": "2.8"}}))
    words = ["compare", *ours, *theirs, "--out", str(tmp_path / "both.png"), "--over_seeds"]
    commands.main(words)
    printed = capsys.readouterr().out
    for line in (
        "| model | trained by | seeds | epochs | loss | top1 | top5 | val_loss |",
        "| a\\|b | mindska | 1, 2, 3 | 2 | 1.0000 ± 0.0000 (1.0000, 1.0000, 1.0000) | 82.00 ± 1.00 (81.00, 82.00, ",
        "| a\\|b | PyTorch reference | 1, 2 | 2 | 1.0000 ± 0.0000 (1.0000, 1.0000) | 78.50 ± 0.71 (79.00, 78.00) |",
        "The first row less the second: loss +0.0000 (standard error 0.0000); top1 +3.50 (standard error 0.76); ",
    ):
        assert line in printed, printed
    commands.main([*words[:1], make_run(tmp_path / "other", [70], seed=1, lr=0.5, model="a|b"), *words[1:]])
    printed = capsys.readouterr().out
    assert "| mindska | 1 | 1 | 2.0000 | 70.00 |" in printed and "less the second" not in printed
    with pytest.raises(SystemExit, match="have the same settings and seeds .*name each run once"):
        commands.main([*words[:1], make_run(tmp_path / "again", [70], seed=1, model="a|b"), *words[1:]])


def test_runs_of_other_tasks_have_their_own_figures(tmp_path, capsys):
    for name, score in (("one", 50.0), ("two", 60.0)):
        (tmp_path / name).mkdir()
        columns = columns_of(MEAN_IOU)
        values = dict.fromkeys(columns, "") | dict(step=10, epoch=1.0, time=0, loss=0.5, lr=0.1, miou=score, macc=70.0)
        rows = [",".join(columns), ",".join(str(values[column]) for column in columns)]
        (tmp_path / name / "metrics.csv").write_text("\n".join(rows) + "\n")
    commands.main(["compare", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "both.png")])
    printed = capsys.readouterr().out
    assert (
        "| run | epochs | loss | miou | macc |" in printed and "| two | 1 | 0.5000 (1), 0.5000 | 60.00 (1)" in printed
    )
    assert (tmp_path / "both.png").read_bytes()[:4] == b"\x89PNG"


def test_names_settings_and_packages_that_are_missing(tmp_path, capsys, monkeypatch):
    """Runs of one name have their paths, an older run has defaults; without settings or matplotlib the rest stays."""
    runs = [make_run(tmp_path / name / "run", [50], seed=seed) for name, seed in (("a", 1), ("b", 1))]
    settings = json.loads((tmp_path / "a" / "run" / "settings.json").read_text())
    del settings["sampler"]
    (tmp_path / "a" / "run" / "settings.json").write_text(json.dumps(settings))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    commands.main(["compare", *runs])
    printed = capsys.readouterr()
    assert f"| {runs[0]} | 1 |" in printed.out and "The settings are the same." in printed.out
    assert "no picture" in printed.err and "mindska[train]" in printed.err and not (tmp_path / "compare.png").exists()
    (tmp_path / "b" / "run" / "settings.json").write_text("{")
    commands.main(["compare", *runs])
    assert f"settings.json is missing or damaged in {runs[1]}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: None, "does not exist; expected the folder of a run"),
        (lambda folder: folder.mkdir(), "holds no run: it has no metrics.csv"),
        (lambda folder: make_run(folder, []), "has no row"),
    ],
)
def test_what_is_no_run(tmp_path, capsys, make, message):
    make(tmp_path / "run")
    with pytest.raises(SystemExit) as error:
        commands.main(["compare", str(tmp_path / "run"), "--out", str(tmp_path / "a.png")])
    assert message in str(error.value) and not (tmp_path / "a.png").exists()
