"""Faults 4, 5, 6, 14: no room to save, signals, lost ranks, folders that cannot be used."""

import contextlib
import errno
import fcntl
import gc
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from commands import (
    PROGRAMS,
    ROOT,
    assert_same_losses,
    assert_same_state,
    finished_steps,
    mpirun,
    processes,
    start_training,
    train,
    wait_for,
    wait_for_steps,
    words,
)
from commands import (
    SETTINGS as TINY,
)
from runs import Killed, trainer

from mindska.errors import RunError
from mindska.training.folder import RunFolder
from mindska.training.interrupt import EXIT_CODE, StopRequest
from mindska.training.record import RunRecord

LONG = dict(epoch_size=4000, val_while_train="false", ckpt_save_interval=1000)


@pytest.mark.fault("no-room")
@pytest.mark.slow
def test_no_room_for_a_checkpoint(images, tmp_path):
    """A limit on the size of files stands for a full disk: the earlier checkpoint stays, a message says what to do."""
    out = tmp_path / "run"
    train(images, out)
    (out / "tiny_bn-3_12.ckpt").unlink()
    earlier = (out / "tiny_bn-2_8.ckpt").read_bytes()
    command = words("train.py", images, out, **{**TINY, "val_while_train": "false"})
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "-", *command]
    done = subprocess.run(
        limited, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 1, printed
    assert "tiny_bn-3_12.ckpt could not be written" in printed and "the same command goes on" in printed
    assert (out / "tiny_bn-2_8.ckpt").read_bytes() == earlier
    assert not list(out.glob(".*.tmp*")) and not (out / "tiny_bn-3_12.ckpt").exists()
    assert "Resuming after step 8" in train(images, out)


@pytest.mark.fault("signals")
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_run_after_a_step(images, tmp_path, number):
    out = tmp_path / "run"
    process = start_training(images, out, **LONG)
    wait_for_steps(out, 5)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE, printed
    stopped = finished_steps(out)
    assert f"Stopped on request after step {stopped}" in printed and "Traceback" not in printed
    assert [path.name for path in out.glob("tiny_bn-*.ckpt")] == [f"tiny_bn-{stopped // 4}_{stopped}.ckpt"]
    process = start_training(images, out, **LONG)
    wait_for_steps(out, stopped + 1)
    process.kill()
    assert f"Resuming after step {stopped} of 1600" in process.communicate()[0]


@pytest.mark.fault("signals")
def test_a_signal_that_is_ignored_stays_ignored():
    """As nohup has SIGHUP ignored, and a shell's script Ctrl-C of what it starts in the background."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.fault("signals")
@pytest.mark.slow
def test_a_signal_to_mpirun_ends_all_ranks_with_a_checkpoint(images, tmp_path):
    out = tmp_path / "run"
    process = start_training(images, out, launcher=mpirun(2), **{**LONG, "batch_size": 4})
    wait_for_steps(out, 5)
    process.send_signal(signal.SIGUSR1)  # which mpirun passes on
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE, printed
    assert len(list(out.glob("tiny_bn-*.ckpt"))) == 1, printed
    assert "scheduler" not in printed and "MPI_ABORT" not in printed
    wait_for(lambda: not processes(str(out)), what="the end of all processes")


def started_by(pid):
    """The processes that this one has started, and those that they have."""
    with contextlib.suppress(psutil.Error):
        return [each.pid for each in psutil.Process(pid).children(recursive=True)]
    return []


@pytest.mark.fault("lost-rank")
@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank", "mpirun", "keeper", "keeper and rank 0", "terminal"])
def test_what_is_killed_takes_all_with_it(images, tmp_path, victim):
    """A rank; mpirun, which then cannot end its ranks; what watches MindSpore's scheduler; the terminal of it all.

    Where the ranks live on, they end on their own, with a checkpoint.
    """
    out = tmp_path / "run"
    process = start_training(images, out, launcher=mpirun(2), **{**LONG, "batch_size": 4})
    wait_for_steps(out, 5)
    everything = started_by(process.pid)
    rank_0 = next(pid for pid in everything if started_by(pid))
    keeper, scheduler = started_by(rank_0)
    others = [pid for pid in processes(str(out)) if pid not in (process.pid, rank_0)]
    kills = {
        "rank": [others[-1]],
        "mpirun": [process.pid],
        "keeper": [keeper],
        "keeper and rank 0": [keeper, rank_0],
        "terminal": [process.pid],
    }
    for pid in kills[victim]:
        os.kill(pid, signal.SIGHUP if victim == "terminal" else signal.SIGKILL)
    start = time.monotonic()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE if victim == "keeper" else process.returncode != 0
    wait_for(
        lambda: not any(map(psutil.pid_exists, everything)),
        seconds=60 - (time.monotonic() - start),
        what="the end of all processes",
    )
    assert victim != "keeper" or printed.count("MindSpore's scheduler, or the process that watches it, has ended") == 1
    assert "Traceback" not in printed and "MPI_ABORT" not in printed and "\0" not in printed
    saved = list(out.glob("tiny_bn-*.ckpt"))
    assert len(saved) == 1 if victim in ("mpirun", "keeper") else len(saved) <= 1, printed


@pytest.mark.fault("lost-rank")
@pytest.mark.slow
def test_when_nobody_reads_on_the_run_ends_with_a_checkpoint(images, tmp_path):
    """`mpirun ... 2>&1 | head -1`: mpirun dies of its next line."""
    out = tmp_path / "run"
    command = words("train.py", images, out, launcher=mpirun(2), **{**TINY, **LONG, "batch_size": 4})
    script = '"$@" 2>&1 | head -1; exit ${PIPESTATUS[0]}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script, "-", *command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0 and len(done.stdout.splitlines()) == 1 and not done.stderr
    wait_for(lambda: not processes(str(out)), what="the end of all processes")
    assert len(list(out.glob("tiny_bn-*.ckpt"))) == 1


@pytest.mark.fault("settings-of-ranks")
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, message, seconds",
    [
        (dict(lr="much"), "error: command line: lr is 'much'; expected float", 4),
        (dict(data_dir="nowhere"), "error: No data folder at", 4),
        (dict(num_classes=2), "error: num_classes is 2, but the data has 3 classes", 60),  # once the ranks have met
    ],
)
def test_a_mistake_in_the_settings_is_said_once(images, tmp_path, settings, message, seconds):
    """By rank 0, before MindSpore and MPI start where they are not needed, without MPI's own pages."""
    command = words("train.py", images, tmp_path / "run", launcher=mpirun(2), **{**TINY, **settings})
    if "num_classes" not in settings:  # the program of the tests loads MindSpore first
        command.remove(str(PROGRAMS / "tiny.py"))
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert time.monotonic() - start < seconds
    printed = done.stdout + done.stderr
    assert done.returncode in (1, 2) and printed.count(message) == 1
    assert "MPI_ABORT" not in printed and "\0" not in printed and "Traceback" not in printed


@pytest.mark.fault("lost-rank")
@pytest.mark.slow
def test_a_rank_that_fails_takes_all_with_it_and_says_why(images, tmp_path):
    """All images of one class are damaged: a rank meets them while the other waits for it."""
    damaged = tmp_path / "images"
    shutil.copytree(images, damaged)
    for path in sorted((damaged / "train" / "class1").iterdir())[3:]:
        path.write_bytes(path.read_bytes()[:300])
    start = time.monotonic()
    printed = train(damaged, tmp_path / "run", launcher=mpirun(2), expect=1, batch_size=4)
    assert time.monotonic() - start < 60 + 30  # start and compilation included
    assert "[rank " in printed and "cannot be read, more than the 0 that max_damaged allows" in printed
    wait_for(lambda: not processes(str(tmp_path / "run")), what="the end of all processes")


@pytest.mark.fault("folders")
@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(images, tmp_path):
    out = tmp_path / "run"
    settings = dict(LONG, log_interval=20)  # a line a step would fill the pipe, and the run would wait for its reader
    process = start_training(images, out, **settings)
    wait_for_steps(out, 2)
    printed = train(images, out, expect=1, **settings)
    assert f"Another run (process {process.pid} on" in printed and "choose another --ckpt_save_dir" in printed
    before = finished_steps(out)
    wait_for_steps(out, before + 1)
    process.kill()
    process.communicate()


@pytest.mark.fault("folders")
def test_an_output_folder_that_cannot_be_written(images, tmp_path):
    (tmp_path / "file").write_text("no folder")
    printed = train(images, tmp_path / "file" / "run", expect=1)
    assert "cannot be written: Not a directory" in printed and "Traceback" not in printed


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunFolder(tmp_path, "tiny", 1).locked():
        assert "cannot be locked (No locks available)" in caplog.text


@pytest.mark.fault("folders")
def test_a_lock_that_cannot_be_written(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(RunError, match="cannot be written: File too large. Make room"):
            RunFolder(tmp_path, "tiny", 1).locked().__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.fault("no-room-records")
def test_metrics_that_cannot_be_written(tmp_path):
    with pytest.raises(RunError, match="metrics.csv cannot be written: No space left"), RunRecord(tmp_path) as record:
        record.begin(0)
        record.path.unlink()
        record.path.symlink_to("/dev/full")
        record.add(1, 0.5, loss=1.0)


@pytest.mark.fault("no-room-records")
def test_a_run_goes_on_without_events_and_log(tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda path: open("/dev/full", "wb"))  # noqa: SIM115, PTH123
    with RunRecord(tmp_path) as record:
        record.begin(0)
        for step in range(1, 30):
            record.add(step, step, loss=1.0)
        record.log_file.setStream(open("/dev/full", "w"))  # noqa: SIM115, PTH123
        for _ in range(2):
            logging.getLogger("mindska").warning("a message")
    assert len(record.rows) == 29 == finished_steps(tmp_path)
    assert caplog.text.count("TensorBoard's events cannot be written") == 1
    assert caplog.text.count("train.log cannot be written") == 1 and caplog.text.count("a message") == 2
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.fault("no-room-records")
def test_a_run_goes_on_without_curves(tmp_path, monkeypatch, caplog):
    def savefig(figure, path, **_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with RunRecord(tmp_path) as record:
        record.begin(0)
        record.add(1, 0.5, loss=1.0, lr=0.1)
        record.draw()
        before = record.curves.read_bytes()
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    assert record.curves.read_bytes() == before and "curves.png could not be written" in caplog.text


def broken(package, tmp_path, monkeypatch):
    """A package that raises something of its own at import, as one that was built for other versions does."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "broken" / package).mkdir(parents=True)
    (tmp_path / "broken" / package / "__init__.py").write_text("raise TypeError('Descriptors cannot be created')")
    monkeypatch.syspath_prepend(tmp_path / "broken")


@pytest.mark.fault("only-shown")
@pytest.mark.parametrize("package", ["matplotlib", "tensorboardX"])
def test_a_run_goes_on_whatever_a_library_raises(tmp_path, monkeypatch, caplog, package):
    broken(package, tmp_path, monkeypatch)
    with RunRecord(tmp_path) as record:
        record.begin(0)
        record.add(1, 0.5, loss=1.0, lr=0.1)
    assert finished_steps(tmp_path) == 1
    (said,) = [entry.getMessage() for entry in caplog.records]
    assert "(Descriptors cannot be created): the run goes on without" in said and "pip install" not in said


@pytest.mark.fault("only-shown")
def test_a_run_goes_on_without_events_whatever_is_raised_later(tmp_path, monkeypatch, caplog):
    with RunRecord(tmp_path) as record:
        record.begin(0)
        monkeypatch.setattr(record.events, "write_event", lambda _: 1 / 0)
        record.add(1, 0.5, loss=1.0)
        record.add(2, 1.0, loss=1.0)
    assert finished_steps(tmp_path) == 2 and caplog.text.count("(division by zero)") == 1


@pytest.mark.slow
def test_a_picture_leaves_nothing_in_memory(tmp_path):
    from matplotlib.figure import Figure

    def figures():
        return sum(type(each) is Figure for each in gc.get_objects())

    before = figures()
    with RunRecord(tmp_path) as record:
        record.begin(0)
        record.add(1, 0.5, loss=1.0, lr=0.1)
        gc.disable()  # Python would notice some pictures later
        try:
            record.draw()
            assert figures() <= before and record.curves.exists()
        finally:
            gc.enable()


@pytest.mark.fault("only-shown")
def test_checkpoints_are_written_before_the_curves(images, tmp_path, monkeypatch):
    """An error of the picture that nobody foresaw, or an end of the process while it is drawn, costs no checkpoint."""
    monkeypatch.setattr(RunRecord, "draw", lambda record: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        trainer(images, tmp_path / "run", "val").fit()
    assert {path.name for path in (tmp_path / "run").glob("*.ckpt")} == {"tiny-1_5.ckpt", "tiny_best.ckpt"}


@pytest.mark.fault("only-shown")
@pytest.mark.slow
@pytest.mark.parametrize("streams", [">&- 2>&-", ">/dev/full 2>/dev/full", "2>&1 | true"])
def test_a_run_and_a_validation_go_on_without_a_stream_to_print_on(images, tmp_path, streams):
    """And without a place for matplotlib's fonts, with a backend that does not exist: the curves are drawn."""
    out, result = tmp_path / "run", tmp_path / "result.json"
    (tmp_path / "fonts").write_text("no folder")
    environment = dict(
        os.environ, PYTHONPATH=str(ROOT), MPLBACKEND="module://nosuch", MPLCONFIGDIR=str(tmp_path / "fonts")
    )
    best = out / "tiny_bn_best.ckpt"
    for command in (
        words("train.py", images, out, **TINY),
        words("validate.py", images, ckpt_path=best, batch_size=8, result_json=result),
    ):
        script = f'set -o pipefail; "$@" {streams}'
        done = subprocess.run(["bash", "-c", script, "-", *command], cwd=tmp_path, env=environment, timeout=240)
        assert done.returncode == 0
    assert finished_steps(out) == 12 and json.loads(result.read_text())["images"] == 36
    assert (out / "curves.png").read_bytes()[1:4] == b"PNG"
    assert (out / ".lock").read_text().startswith("process ") and len((out / ".lock").read_text()) < 200


@pytest.mark.fault("only-shown", "output")
@pytest.mark.slow
def test_a_result_that_cannot_be_printed_is_an_error_that_has_it(whole_run, images, tmp_path):
    command = words("validate.py", images, ckpt_path=whole_run[0] / "tiny_bn_best.ckpt", batch_size=8)
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            command,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: standard output cannot be written ([Errno 28] No space left" in done.stderr
    assert "tiny_bn_best.ckpt: top-1 " in done.stderr


@pytest.mark.fault("folders")
@pytest.mark.slow
def test_a_data_folder_that_vanishes(images, tmp_path):
    data, out = tmp_path / "images", tmp_path / "run"
    shutil.copytree(images, data)
    process = start_training(data, out, **{**LONG, "max_damaged": 1.0})
    wait_for_steps(out, 5)
    shutil.rmtree(data)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "is the data folder still there?" in printed and "Traceback" not in printed


@pytest.mark.fault("signals")
@pytest.mark.slow
def test_the_whole_story(images, tmp_path, whole_run):
    """Stopped by a signal, then finished: the same figures as the uninterrupted run."""
    whole, _ = whole_run
    out = tmp_path / "run"
    process = start_training(images, out)
    wait_for(lambda: finished_steps(out) >= 1 or process.poll() is not None, what="the first step")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    train(images, out)
    assert_same_losses(out, whole)
    assert_same_state(out / "tiny_bn-3_12.ckpt", whole / "tiny_bn-3_12.ckpt")
