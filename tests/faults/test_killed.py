"""Faults 1, 2, 3, 15: killed at any moment, killed while saving, damaged checkpoints, one continuous record."""

import csv
import logging
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import (
    PROGRAMS,
    ROOT,
    assert_same_losses,
    assert_same_state,
    finished_steps,
    mpirun,
    rows,
    start_training,
    train,
    wait_for_steps,
)
from mindspore import Parameter, Tensor
from runs import fit, trainer

from mindska.errors import WeightsError
from mindska.evaluation import Result
from mindska.training import Trainer
from mindska.training.folder import RunFolder
from mindska.training.record import RunRecord, early_messages
from mindska.weights.files import read_file, write_checkpoint

KILLS = 20
STEPS = 800
LONG = dict(epoch_size=STEPS // 4, ckpt_save_steps=1, keep_checkpoint_max=1, val_while_train="false")


@pytest.mark.fault("killed", "one-record")
@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_as_the_uninterrupted_one(images, tmp_path):
    train(images, tmp_path / "whole", **LONG)
    out = tmp_path / "run"
    generator = random.Random(0)
    for kill in range(KILLS):
        process = start_training(images, out, **LONG)
        if kill % 2:  # imports and compilation
            time.sleep(generator.uniform(0.5, 3))
        else:  # some steps later than the last one
            wait_for_steps(out, finished_steps(out) + generator.randrange(1, 30))
            time.sleep(generator.uniform(0, 0.05))
        assert process.poll() is None, f"the run is too short: it ended before kill {kill}"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    train(images, out, **LONG)
    name = f"tiny_bn-{STEPS // 4}_{STEPS}.ckpt"
    assert_same_state(out / name, tmp_path / "whole" / name)
    # 15: one record, without lost or doubled rows, the same as the uninterrupted one.
    assert [int(row["step"]) for row in rows(out)] == list(range(1, STEPS + 1))
    assert_same_losses(out, tmp_path / "whole")
    log = (out / "train.log").read_text()
    assert [log.count(f", step {step}/{STEPS}:") for step in range(1, STEPS + 1)] == [1] * STEPS
    assert not list(out.glob(".*.tmp*"))


def some_parameters(size=20_000):
    rng = np.random.default_rng(0)
    return {f"p{i}": Parameter(Tensor(rng.standard_normal(size, dtype=np.float32)), name=f"p{i}") for i in range(5)}


@pytest.mark.fault("killed-writing")
@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(tmp_path):
    """50 times: the newest checkpoint is always readable, and nothing stray is left after the next start."""
    # In a process of its own: it forks, which one that has computed must not.
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / "torn.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) > 5, "no kill hit a write: the test proves nothing"


@pytest.mark.fault("umask")
@pytest.mark.parametrize("umask, mode", [(0o077, 0o600), (0o002, 0o664), (0o022, 0o644)])
def test_what_a_run_writes_follows_the_umask_of_the_moment(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_checkpoint(tmp_path / "a.ckpt", some_parameters(3), {"step": 1})
        RunFolder(tmp_path, "tiny", 1).write_settings({"run_id": None})
        with RunRecord(tmp_path) as record:
            record.begin(0)
            record.add(1, 0.5, loss=1.0, lr=0.1)
    finally:
        os.umask(before)
    written = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert set(written.values()) == {mode} and len(written) == 6, written


@pytest.mark.fault("damaged-checkpoint")
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_every_damage_is_detected(tmp_path, damage):
    """Fifty random truncations, fifty random flipped bits, the ends of the file among them."""
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, some_parameters(300), {"step": 1})
    whole = path.read_bytes()
    generator = random.Random(0)
    places = [0, 1, len(whole) // 2, *range(len(whole) - 20, len(whole))]
    places += [generator.randrange(len(whole)) for _ in range(50 - len(places))]
    for place in places:
        if damage == "truncated":
            path.write_bytes(whole[:place])
        else:
            flipped = bytearray(whole)
            flipped[place] ^= 1 << generator.randrange(8)
            path.write_bytes(flipped)
        with pytest.raises(WeightsError, match="a.ckpt"):
            read_file(path, checksum_required=True)
    path.write_bytes(whole)
    read_file(path, checksum_required=True)


@pytest.mark.fault("damaged-checkpoint")
@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(whole_run, images, tmp_path):
    whole, _ = whole_run
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    newest = out / "tiny_bn-3_12.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1])
    printed = train(images, out)
    assert "Skipping a checkpoint that cannot be used" in printed and str(newest) in printed
    assert "Resuming after step 8 of 12" in printed
    assert_same_state(newest, whole / newest.name)
    assert_same_losses(out, whole)


@pytest.mark.fault("damaged-checkpoint")
def test_when_no_checkpoint_can_be_used_nothing_is_overwritten(whole_run, images, tmp_path):
    whole, _ = whole_run
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for path in out.glob("tiny_bn-*.ckpt"):
        path.write_bytes(b"")
    before = (out / "metrics.csv").read_bytes()
    assert "None of the 3 checkpoints" in train(images, out, expect=1)
    assert (out / "metrics.csv").read_bytes() == before


def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(whole_run, images, tmp_path):
    whole, _ = whole_run
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for path in out.glob("tiny_bn-*.ckpt"):
        path.unlink()
    before = {path: path.read_bytes() for path in out.iterdir() if path.suffix in (".csv", ".ckpt")}
    assert "up to step 12 (metrics.csv), but none of its checkpoints" in train(images, out, expect=1)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.fault("one-record")
@pytest.mark.slow
def test_half_a_row_at_the_end_is_taken_back(whole_run, images, tmp_path):
    whole, _ = whole_run
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "tiny_bn-3_12.ckpt").unlink()
    with (out / "metrics.csv").open("a") as file:
        file.write("13,3.25,0.9")
    train(images, out)
    with (out / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == [str(step) for step in range(1, 13)]
    assert_same_losses(out, whole)


@pytest.mark.slow
def test_a_resumed_run_on_two_ranks_accumulates_as_the_uninterrupted_one(images, tmp_path):
    """Each rank accumulates gradients of its own: there is no checkpoint between two updates."""
    out = tmp_path / "run"
    settings = dict(batch_size=4, gradient_accumulation_steps=2, epoch_size=2, ckpt_save_steps=5, launcher=mpirun(2))
    settings.update(ckpt_save_interval=100, val_while_train="false")
    train(images, out, **settings)
    shutil.move(out / "tiny_bn-2_8.ckpt", tmp_path / "whole.ckpt")
    assert "Resuming after step 6 of 8" in train(images, out, **settings)
    assert_same_state(out / "tiny_bn-2_8.ckpt", tmp_path / "whole.ckpt")


def test_logging_is_left_as_it_was(tmp_path):
    logging.getLogger("mindska").removeHandler(early_messages)  # of another test
    before = list(logging.getLogger("mindska").handlers)
    with RunRecord(tmp_path) as record:
        record.begin(0)
        record.add(1, 0.5, loss=1.0)
    assert logging.getLogger("mindska").handlers == before


def best_of(out):
    arrays, record = read_file(out / "tiny_best.ckpt")
    return {name: value.tobytes() for name, value in arrays.items()}, record


@pytest.mark.slow
@pytest.mark.fault("best-vanished")
@pytest.mark.parametrize(
    "when",
    [
        pytest.param("during the run", marks=pytest.mark.slow),
        "before the next start",
        pytest.param("with the checkpoints of all scores", marks=pytest.mark.slow),
    ],
)
def test_best_weights_that_vanished_are_written_again(images, tmp_path, monkeypatch, caplog, when):
    """From the checkpoint of their step, the same to the bit."""
    scores = iter([50.0, 70.0, 60.0])  # in the order of the epochs: the second is best

    def evaluate(trainer):
        top1 = next(scores)
        if top1 == 60 and "next" not in when:
            kept.update(best=best_of(out))
            vanish()
        return {"raw": Result(top1, 100.0, 1.0, 36)}

    def vanish():
        (out / "tiny_best.ckpt").unlink()
        if "all" in when:
            for path in out.glob("tiny-?_*.ckpt"):
                path.unlink()

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    out, kept = tmp_path / "run", {}
    if "next" in when:
        fit(trainer(images, out, "val"), until=14)
        kept.update(best=best_of(out))
        vanish()
    fit(trainer(images, out, "val"))
    weights, record = best_of(out)
    if "all" in when:
        assert record["top1"] == 60 and record["epoch"] == 3
    else:
        assert (weights, record) == kept["best"] and record["top1"] == 70 and record["epoch"] == 2
    assert caplog.text.count("tiny_best.ckpt has vanished: the weights of step") == 1


@pytest.mark.fault("one-record")
def test_the_log_has_what_comes_before_it_is_opened_and_no_step_twice(tmp_path):
    log = logging.getLogger("mindska")
    for message in ("Skipping a checkpoint", "Going on with 2 ranks"):
        with RunRecord(tmp_path) as record:
            log.warning(message)
            record.begin(2)
            for step in (3, 4):
                log.warning("Step %d was skipped", step)
    lines = [line.split(" ", 2)[2] for line in (tmp_path / "train.log").read_text().splitlines()]
    assert lines == ["Skipping a checkpoint", "Going on with 2 ranks", "Step 3 was skipped", "Step 4 was skipped"]


def events(folder):
    """What TensorBoard reads in all files of a run: (step, name) -> value."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in (folder / "tensorboard").iterdir():
        data = path.read_bytes()
        while data:
            size = struct.unpack("Q", data[:8])[0]
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            for value in event.summary.value:
                assert (event.step, value.tag) not in found, "doubled"
                found[event.step, value.tag] = value.simple_value
    return found


@pytest.mark.fault("one-record")
def test_the_events_are_the_rows_of_metrics_at_any_time(tmp_path):
    for start in range(2):
        record = RunRecord(tmp_path)  # never left: a killed process
        record.begin(2 * start)
        for step in range(2 * start + 1, 5):
            record.add(step, step / 4, loss=step + start / 2, **({"top1": 50.0} if step == 4 else {}))
        kept = {(int(row["step"]), n): float(row[n]) for row in rows(tmp_path) for n in ("loss", "top1") if row[n]}
        assert events(tmp_path) == kept and len(kept) == 5
