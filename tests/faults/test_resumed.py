"""Resuming where something has changed: environment, records, the owner of the folder, data, the first weights."""

import fcntl
import json
import shutil

import numpy as np
import pytest
from commands import assert_same_state, parameters, rows, train
from mindspore import Tensor
from runs import fit, trainer

from mindska.config import settings_that
from mindska.errors import RunError
from mindska.evaluation import ACCURACY
from mindska.training import resume
from mindska.training.folder import RunFolder
from mindska.training.record import RunRecord, columns_of, read_rows
from mindska.training.state import Progress
from mindska.weights.files import read_file, write_checkpoint
from mindska.weights.source import open_source


@pytest.fixture(scope="module")
def stopped(images, tmp_path_factory):
    """A run of 15 steps that was killed in its second epoch: a checkpoint after step 5, rows up to step 7."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    assert fit(trainer(images, out), until=7) == [5]
    return out


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of it."""
    return shutil.copytree(stopped, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    fit(trainer(images, out))
    return out / "tiny-3_15.ckpt"


def rewrite(path, change, arrays=None):
    """Writes a checkpoint anew with a changed record, as an earlier version or a stranger would have."""
    old, record = read_file(path)
    change(record)
    write_checkpoint(path, {**old, **(arrays or {})}, record)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


# --------------------------------------------------------------------------------------------------- environment


@pytest.mark.fault("environment")
def test_another_environment_is_refused_unless_it_is_asked_for(images, run, monkeypatch, caplog):
    """Operators gone, another MindSpore, another mode: the numbers differ though no setting does."""
    caplog.set_level("INFO", "mindska")
    found = resume.environment()
    assert {"operators", "mindspore", "pillow", "mode", "device_target", "processor"} <= set(found)
    if found["operators"] != "plain":
        monkeypatch.setenv("MINDSKA_KERNELS", "off")
        with pytest.raises(RunError, match="operators: 'C.. [0-9a-f]+' -> 'plain'"):
            fit(trainer(images, run))
        monkeypatch.delenv("MINDSKA_KERNELS")
    monkeypatch.setattr(resume, "environment", lambda: {**found, "operators": "plain (other)", "mindspore": "2.7.0"})
    before = contents(run)
    with pytest.raises(
        RunError, match="another environment:\n  mindspore: .* -> '2.7.0'\n  operators: (.|\n)*allow_other"
    ):
        fit(trainer(images, run))
    assert contents(run) == before
    fit(trainer(images, run, allow_other_environment=True), until=11)
    assert "Going on in another environment: operators: " in caplog.text
    assert read_file(run / "tiny-2_10.ckpt")[1]["environment"]["mindspore"] == "2.7.0"
    monkeypatch.setattr(resume, "environment", lambda: found)
    with pytest.raises(RunError, match="'2.7.0' -> "):
        fit(trainer(images, run))


@pytest.mark.slow
def test_a_run_of_an_earlier_version_goes_on(images, run, whole, caplog):
    """Its records know no identity, environment or validation set, and not all settings; its rows not all columns."""
    caplog.set_level("INFO", "mindska")
    later = ("val_raw", "allow_other_environment")
    settings = json.loads((run / "settings.json").read_text())
    for name in ("run_id", "environment", "train_set", *later):
        del settings[name]
    (run / "settings.json").write_text(json.dumps(settings))

    def older(record):
        for name in ("run_id", "environment", "train_set"):
            del record[name]
        for name in later:
            del record["config"][name]
        del record["progress"]["validation"]

    rewrite(run / "tiny-1_5.ckpt", older)
    table = (run / "metrics.csv").read_text().splitlines()
    (run / "metrics.csv").write_text("".join(",".join(line.split(",")[:12]) + "\n" for line in table))
    assert fit(trainer(images, run)) == [15, 10]
    assert "did not record its environment" in caplog.text and len(rows(run)) == 15
    assert_same_state(run / "tiny-3_15.ckpt", whole)
    assert json.loads((run / "settings.json").read_text())["run_id"] is None
    fit(trainer(images, run))  # nothing is left to do


# ------------------------------------------------------------------------------------------------------- records


@pytest.mark.fault("damaged-records")
@pytest.mark.parametrize(
    "damage",
    [None, b"", b"\0" * 100, b"{", b"[1]", b'{"lr": 0.5}', b"\xff\xfe", b"[" * 100_000],
    ids=["missing", "empty", "NUL", "cut", "list", "edited", "binary", "deep"],
)
def test_without_settings_the_checkpoints_own_are_compared(images, run, damage):
    path = run / "settings.json"
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    before = contents(run)
    with pytest.raises(RunError, match="lr: 0.001 -> 0.01"):
        fit(trainer(images, run, lr=0.01))
    assert contents(run) == before
    fit(trainer(images, run), until=6)
    settings = json.loads(path.read_text())
    assert settings["lr"] == 0.001 and settings["run_id"] == read_file(run / "tiny-1_5.ckpt")[1]["run_id"]
    if damage and damage != b'{"lr": 0.5}':
        assert (run / "settings.json.damaged").read_bytes() == damage


@pytest.mark.fault("damaged-records")
def test_an_edited_settings_file_does_not_hide_a_change(images, run):
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps(dict(settings, lr=0.01)))
    with pytest.raises(RunError, match="lr: 0.001 -> 0.01"):
        fit(trainer(images, run, lr=0.01))


@pytest.mark.fault("damaged-records")
@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("progress"),
        lambda record: record.update(progress=[1]),
        lambda record: record["progress"].update(scores={"a": 1}),
        lambda record: record["progress"].update(step=7),
        lambda record: record["progress"].update(losses="x"),
        lambda record: record["progress"].update(validation=3),
        lambda record: record.update(config=3),
        lambda record: record.pop("config"),
        lambda record: record.update(world_size="2"),
        lambda record: record.update(network=[1]),
        lambda record: record.update(preprocessing={"image_size": 3}),
        lambda record: record.update(preprocessing={"image_size": [16, 16], "evil": 1}),
    ],
)
def test_a_record_that_makes_no_sense_is_a_message(images, run, change):
    rewrite(run / "tiny-1_5.ckpt", change)
    before = contents(run)
    with pytest.raises(RunError, match="None of the 1 checkpoints"):
        fit(trainer(images, run))
    assert contents(run) == before


def table(*lines):
    return "\n".join(lines) + "\n"


HEADER = "step,epoch,time,loss"
ROWS = ["1,0.5,100.0,1.5", "2,1.0,101.0,1.25"]


@pytest.mark.fault("damaged-records")
@pytest.mark.parametrize(
    "content, good, damaged",
    [
        (table(HEADER, *ROWS), [1, 2], False),
        (table(HEADER, *ROWS) + "3,1.5,1", [1, 2], False),
        (table(HEADER, *ROWS) + "3,1.5,102.0,1.0", [1, 2], False),
        (table(HEADER, *ROWS).replace("\n", "\r\n"), [1, 2], False),
        ("", [], False),
        (HEADER, [], False),
        (table(HEADER, ROWS[0], "\0\0\0", ROWS[1]), [1, 2], True),
        (table(HEADER, ROWS[0], "two,1.0,101.0,1.25"), [1], True),
        (table(HEADER, ROWS[0], "2,1.0,101.0,much"), [1], True),
        (table(HEADER, ROWS[0], "2,,101.0,1.0", "3,1.5,102.0"), [1], True),
        (table(HEADER, ROWS[1], ROWS[0], ROWS[1]), [2], True),
        (table(HEADER, "9" * 5000 + ",1,1,1"), [], True),
        (table("epoch,loss", "1,2"), [], True),
        (table(HEADER + ",later", *(row + ",7" for row in ROWS)), [1, 2], True),
        ("\x00\x01\x02" * 1000, [], False),
        (b"\xff\xfe\x00" * 1000 + b"\n", [], True),
    ],
)
def test_damaged_metrics_are_set_aside_and_rebuilt(tmp_path, content, good, damaged):
    path = tmp_path / "metrics.csv"
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(content)
    found, bad = read_rows(tmp_path)
    assert ([int(row["step"]) for row in found], bad) == (good, damaged)
    with RunRecord(tmp_path) as record:
        record.begin(10)
        record.add(11, 5.5, loss=1.0)
    assert [int(row["step"]) for row in rows(tmp_path)] == [*good, 11]
    assert path.read_text().splitlines()[0] == ",".join(columns_of(ACCURACY))
    assert [other.read_bytes() for other in tmp_path.glob("metrics.csv.damaged")] == [content] * damaged


@pytest.mark.fault("damaged-records")
def test_two_damages_are_both_kept(tmp_path):
    for content in (b"\0\n", b"\1\n"):
        (tmp_path / "metrics.csv").write_bytes(content)
        with RunRecord(tmp_path) as record:
            record.begin(0)
            record.add(1, 1.0, loss=1.0)
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("*.damaged*")}
    assert kept == {"metrics.csv.damaged": b"\0\n", "metrics.csv.damaged2": b"\1\n"}


def test_progress_is_json_without_nan():
    progress = Progress(3, [1.5, float("nan")], [float("inf"), 2.0], {2: 50.0}, {"images": 5})
    text = json.dumps(progress.to_json(), allow_nan=False)
    again = Progress.from_json(json.loads(text))
    assert str(again) == str(progress)
    older = {"step": 3, "losses": [float("nan")], "norms": [], "scores": {"2": 50.0}}
    assert Progress.from_json(older).validation is None


# ------------------------------------------------------------------------------------------------- two runs


def begun_again(images, out, meanwhile):
    """A run that is interfered with after step 7: returns its error, and what the folder held then and after."""
    then = {}

    def interfere():
        meanwhile()
        then.update(contents(out) if out.exists() else {})

    running = trainer(images, out)
    batches = running.loader.batches

    def watched(start, steps):
        for done, batch in enumerate(batches(start, steps), start):
            if done == 7:
                interfere()
            yield batch

    running.loader.batches = watched
    with pytest.raises(RunError, match="no longer belongs to this run") as error:
        running.fit()
    assert running.progress.step == 8, "it notices within a row"
    return str(error.value), then, contents(out) if out.exists() else {}


@pytest.mark.fault("other-run")
@pytest.mark.parametrize(
    "how",
    [
        "removed",
        pytest.param("begun again", marks=pytest.mark.slow),
        "other settings",
        "no settings",
        "damaged settings",
        "no lock",
        "no locks at all",
    ],
)
def test_a_living_run_notices_that_the_folder_is_no_longer_its_own(images, tmp_path, how, monkeypatch):
    out = tmp_path / "run"
    if how == "no locks at all":
        monkeypatch.setattr(fcntl, "flock", lambda *_: None)

    def meanwhile():
        if how in ("removed", "begun again"):
            shutil.rmtree(out)
        if how == "begun again":
            fit(trainer(images, out, seed=7), until=6)
        if how == "other settings":
            settings = json.loads((out / "settings.json").read_text())
            (out / "settings.json").write_text(json.dumps(dict(settings, run_id="another")))
        if how == "no settings":
            (out / "settings.json").unlink()
        if how == "damaged settings":
            (out / "settings.json").write_text("{")
        if how == "no locks at all":
            with RunFolder(out, "tiny", 1).locked():
                pass  # a second start, which adopts the run's identity
        if how == "no lock":
            (out / ".lock").unlink()

    message, then, after = begun_again(images, out, meanwhile)
    assert "choose another --ckpt_save_dir" in message
    for name in ("train.log", "curves.png"):  # its own log may say why
        then.pop(name, None), after.pop(name, None)
    assert after == then
    if how == "begun again":
        assert read_file(out / "tiny-1_5.ckpt")[1]["config"]["seed"] == 7
        assert fit(trainer(images, out, seed=7)) == [15, 10]


@pytest.mark.fault("other-run")
def test_every_file_says_whose_it_is(stopped):
    (run_id,) = {read_file(path)[1]["run_id"] for path in stopped.glob("*.ckpt")}
    assert len(run_id) == 16 and run_id in (stopped / ".lock").read_text()
    assert json.loads((stopped / "settings.json").read_text())["run_id"] == run_id


@pytest.mark.fault("other-run")
@pytest.mark.slow
def test_checkpoints_of_another_run_are_left_alone(images, run, whole, caplog):
    """Neither resumed from, nor overwritten, nor deleted."""
    foreign = run / "tiny-2_10.ckpt"
    shutil.copy(run / "tiny-1_5.ckpt", foreign)
    rewrite(foreign, lambda record: (record["progress"].update(step=10), record.update(run_id="0" * 16)))
    (run / "tiny-0_1.ckpt").write_bytes(foreign.read_bytes())
    rewrite(run / "tiny-0_1.ckpt", lambda record: record["progress"].update(step=1))
    kept = [foreign.read_bytes(), (run / "tiny-0_1.ckpt").read_bytes()]
    assert fit(trainer(images, run, keep_checkpoint_max=0)) == [15, 10, 1]
    assert "Skipping a checkpoint that another run wrote" in caplog.text
    assert [(run / "tiny-2_10.ckpt.other_run").read_bytes(), (run / "tiny-0_1.ckpt").read_bytes()] == kept
    assert_same_state(run / "tiny-3_15.ckpt", whole)


@pytest.mark.fault("other-run")
def test_nothing_but_checkpoints_of_another_run(images, run):
    rewrite(run / "tiny-1_5.ckpt", lambda record: record.update(run_id="0" * 16))
    before = contents(run)
    with pytest.raises(RunError, match="None of the 1 checkpoints"):
        fit(trainer(images, run))
    assert contents(run) == before


def test_a_lock_with_junk_in_it(tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xff\x1b[31m" * 1000)
    with (
        RunFolder(tmp_path, "tiny", 1).locked(),
        pytest.raises(RunError, match=r"Another run \(process \d+ on .*\) is"),
    ):
        RunFolder(tmp_path, "tiny", 1).locked().__enter__()
    (tmp_path / "junk").write_bytes(b"\xff\x1b[31m" * 1000)
    with (tmp_path / "junk").open("rb") as file:
        held = RunFolder._holder(file)
    assert held.isprintable() and len(held) <= 200


# -------------------------------------------------------------------------------------------------- validation


@pytest.mark.fault("other-validation")
@pytest.mark.slow
def test_best_starts_anew_on_another_validation_set(images, tmp_path, caplog):
    """r15: half of the labels are wrong in the new set, so that no later score reaches the earlier ones."""
    caplog.set_level("INFO", "mindska")
    data, out = tmp_path / "images", tmp_path / "run"
    shutil.copytree(images, data)
    for label in range(3):
        shutil.copytree(
            data / "val" / f"class{label}", data / "hard" / f"class{(label + label % 2) % 3}", dirs_exist_ok=True
        )
    (data / "hard" / "class1").mkdir(exist_ok=True)
    shutil.copy(data / "val" / "class1" / "000.png", data / "hard" / "class1")
    settings = dict(lr=0.05, epoch_size=4)
    fit(trainer(data, out, "val", **settings), until=12)
    first = read_file(out / "tiny_best.ckpt")[1]
    assert first["validation"]["images"] == 36 and first["validation"]["preprocessing"]["image_size"] == [16, 16]
    again = trainer(data, out, "hard", **settings)
    fit(again)
    assert "The validation set is another one (36 images, now" in caplog.text
    second = read_file(out / "tiny_best.ckpt")[1]
    assert set(again.progress.scores) == {15, 20} and second["validation"]["digest"] != first["validation"]["digest"]
    assert second["top1"] == max(again.progress.scores.values()) and second["epoch"] > 2
    assert sum(row["top1"] != "" for row in rows(out)) == 4
    caplog.clear()
    third = trainer(data, out, "hard", **settings)
    fit(third)
    assert third.progress.scores == again.progress.scores and "another one" not in caplog.text


# ------------------------------------------------------------------------------------------- the first weights


@pytest.mark.fault("first-weights")
def test_what_a_run_needs_at_its_first_start_only(images, run, caplog):
    """The trainer's part of it; that the file is not opened: test_commands-like, below."""
    caplog.set_level("INFO", "mindska")
    assert {"ckpt_path", "pretrained"} <= settings_that("first_start")
    rewrite(run / "tiny-1_5.ckpt", lambda record: record["config"].update(ckpt_path="began/with.ckpt", pretrained=True))
    fit(trainer(images, run, ckpt_path="elsewhere.ckpt"), until=11)
    assert "--ckpt_path elsewhere.ckpt is not used: the run began with began/with.ckpt" in caplog.text
    assert json.loads((run / "settings.json").read_text())["ckpt_path"] == "began/with.ckpt"
    assert read_file(run / "tiny-2_10.ckpt")[1]["config"]["ckpt_path"] == "began/with.ckpt"


@pytest.mark.fault("no-room-records", "first-weights")
@pytest.mark.slow
def test_a_fine_tuning_goes_on_without_the_weights_that_it_began_with(images, tmp_path, whole_run):
    """r13: moved, written otherwise, left out. Its own checkpoints say what the network and its pixels are."""
    start, out = tmp_path / "start.ckpt", tmp_path / "run"
    shutil.copy(whole_run[0] / "tiny_bn_best.ckpt", start)
    pixels = dict(image_size=(16, 16), crop_pct=0.9, interpolation="bicubic", mean=(0.4,) * 3, std=(0.2,) * 3)
    rewrite(start, lambda record: record.update(preprocessing=pixels))
    settings = dict(crop_pct="null", epoch_size=2)
    train(images, out, ckpt_path=start, **settings)
    shutil.move(out / "tiny_bn-2_8.ckpt", tmp_path / "whole.ckpt")
    start.rename(tmp_path / "moved.ckpt")
    for name in (start, tmp_path / "moved.ckpt", None):
        printed = train(images, out, **({"ckpt_path": name} if name else {}), **settings)
        assert "Resuming after step 4 of 8" in printed
        assert ("moved.ckpt is not used" in printed) == (name is not None and name != start)
        assert_same_state(out / "tiny_bn-2_8.ckpt", tmp_path / "whole.ckpt")
        record = read_file(out / "tiny_bn-2_8.ckpt")[1]
        assert record["config"]["ckpt_path"] == str(start) and record["preprocessing"]["mean"] == [0.4] * 3
        (out / "tiny_bn-2_8.ckpt").unlink()
    assert "crop_pct: 0.9 -> 0.8" in train(images, out, expect=1, **{**settings, "crop_pct": 0.8})


def test_settings_that_come_to_the_same(stopped):
    """A number or null, one side or two, what the model says anyway."""
    record = dict(num_classes=3, preprocessing=dict(image_size=(16, 16), crop_pct=1.0))
    named = resume.effective_settings(dict(num_classes=3, image_resize=[16], crop_pct=1.0), record)
    assert resume.effective_settings(dict(num_classes=None, image_resize=None, crop_pct=None), record) == named
    settings = json.loads((stopped / "settings.json").read_text())
    resume.check_same_settings(stopped, settings, dict(settings, train_split="train/", data_dir="/elsewhere"), True)
    with pytest.raises(RunError, match="train_split: 'train' -> 'other'"):
        other = dict(settings, train_split="other", train_set=dict(settings["train_set"], digest="0"))
        resume.check_same_settings(stopped, settings, other, True)
    with pytest.raises(RunError, match=r"(\n  .*){10}\n  and 3 more\n"):
        resume.check_same_settings(stopped, settings, {**settings, **{f"s{i}": i for i in range(13)}}, True)


# --------------------------------------------------------------------------------------------- raw and averaged


@pytest.mark.fault("averaged")
@pytest.mark.slow
def test_the_better_of_raw_and_averaged_weights_is_best(images, tmp_path, caplog):
    """r18: an average that hardly moves; the raw weights are better, and every command takes them."""
    caplog.set_level("INFO", "mindska")
    out = tmp_path / "run"
    done = trainer(images, out, "val", ema=True, ema_decay=0.9999, lr=0.05, epoch_size=4)
    fit(done)
    evaluated = [row for row in rows(out) if row["top1"]]
    assert len(evaluated) == 4 and all(float(row["top1_raw"]) >= 0 for row in evaluated)
    best = max(evaluated, key=lambda row: float(row["top1"]))
    assert float(best["top1_raw"]) > float(best["top1_averaged"]) and best["top1"] == best["top1_raw"]
    assert "with the raw weights (the averaged ones: top-1" in caplog.text
    path = out / "tiny_best.ckpt"
    record = read_file(path)[1]
    assert record["weights"] == "raw" and record["top1"] == pytest.approx(float(best["top1"]))
    held = parameters(path)
    for ema, averaged in ((None, False), (False, False), (True, True)):
        source = open_source(path, ema)
        prefix = "ema." if averaged else ""
        assert source.averaged == averaged
        for name, value in source.arrays.items():
            np.testing.assert_array_equal(value, held[prefix + name])
    without = trainer(images, tmp_path / "averaged", "val", ema=True, ema_decay=0.9999, lr=0.05, val_raw=False)
    fit(without, until=6)
    (row,) = [row for row in rows(tmp_path / "averaged") if row["top1"]]
    assert row["top1_raw"] == row["top1_averaged"] == ""
    assert read_file(tmp_path / "averaged" / "tiny_best.ckpt")[1]["weights"] == "averaged"


# ------------------------------------------------------------------------------------------- not finite


@pytest.mark.fault("values")
@pytest.mark.parametrize("where", ["weights", "average", "state"])
def test_weights_that_are_not_finite_are_never_saved(images, run, where):
    running = trainer(images, run)
    batches = running.loader.batches

    def spoil(start, steps):
        for done, batch in enumerate(batches(start, steps), start):
            if done == 10 - 1:
                step = running.step
                bad = dict(
                    weights=step.network.conv.bias, state=step.optimizer.moments1[0], average=step.network.conv.weight
                )
                value = bad[where].asnumpy()
                value.flat[0] = np.inf if where == "state" else np.nan
                bad[where].set_data(Tensor(value))
            yield batch

    running.loader.batches = spoil
    before = (run / "tiny-1_5.ckpt").read_bytes()
    with pytest.raises(RunError, match="After step 10 .* parameters are not finite .* the earlier checkpoints stay"):
        running.fit()
    assert [path.name for path in run.glob("*.ckpt")] == ["tiny-1_5.ckpt"]
    assert (run / "tiny-1_5.ckpt").read_bytes() == before
