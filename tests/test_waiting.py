"""What a run says of itself, that it is not silent for long, and that it can be stopped while a library works."""

import logging
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from commands import ROOT, rows, wait_for
from mindspore import Tensor
from runs import fit, trainer

from mindska import builders, evaluation, waiting
from mindska.config import Config
from mindska.distributed import World
from mindska.training import loop
from mindska.training.interrupt import end_before_the_first_step
from mindska.training.messages import TimeLeft


def test_signs_of_life(caplog, monkeypatch):
    monkeypatch.setattr(waiting, "INTERVAL", 0.1)
    handler = signal.getsignal(signal.SIGINT)
    with caplog.at_level(logging.INFO, "mindska"):
        with waiting.waiting("Working", on_signal=lambda number: pytest.fail("nobody sent a signal"), note="again"):
            time.sleep(0.35)
        with waiting.waiting("Quick", quiet_for=0.5):
            pass
        with waiting.waiting("Slow", quiet_for=0.05):
            time.sleep(0.1)
        with pytest.raises(ValueError, match="x"), waiting.waiting("Failing"):
            raise ValueError("x")
    lines = [record.message for record in caplog.records]
    assert lines[0] == "Working ..." and lines[1] == "Working ... (0 s)"
    assert re.fullmatch(r"Working took 0\.\d s \(again\)", next(line for line in lines if "took" in line))
    assert not any("Quick" in line for line in lines) and "Slow took 0.1 s" in lines
    assert lines[-1] == "Failing ..."
    assert signal.getsignal(signal.SIGINT) is handler and signal.set_wakeup_fd(-1) == -1


PROGRAM = """
import ctypes, os, sys, time
from mindska.waiting import waiting
def end(number):
    print("ended by", number, flush=True)
    os._exit(3)
with waiting("Working", on_signal=end):
    print("ready", flush=True)
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):  # the second never ends; as in a library, no handler of Python's runs
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.mark.fault("compiling")
def test_a_signal_ends_the_process_within_a_library():
    """The main thread waits in C, and does not come back for a signal."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    assert process.stdout.read() == "ended by 2\n" and process.wait(30) == 3
    assert time.monotonic() - begun < 10


@pytest.mark.fault("compiling")
@pytest.mark.slow
@pytest.mark.parametrize("command, code", [("train", 75), ("predict", 130)])
def test_a_run_ends_within_seconds_while_it_compiles(images, tmp_path, command, code):
    """Ctrl-C, and a scheduler's SIGTERM: MindSpore would go on for half a minute. Nothing is left in the way."""
    (tmp_path / "tmp").mkdir()
    size = ["--data_dir", str(images), "--image_resize", "64", "--batch_size", "4", "--ckpt_save_dir", "run"]
    words = ["train", "--config", "skanet_nano_digits", *size]
    if command == "predict":
        words = [
            "predict",
            str(images / "val" / "class0" / "000.png"),
            "--ckpt_path",
            str(nano(tmp_path / "nano.ckpt")),
        ]
    program = "import sys; sys.argv[0] = __file__; from mindska.commands import main; import logging;"
    (tmp_path / "run.py").write_text(
        f"{program} logging.basicConfig(level=logging.INFO); logging.getLogger('mindska').setLevel(10); main()\n"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "MINDSKA_COMPILE_CACHE": "on"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "run.py", *words], cwd=tmp_path, env=env, stderr=log, stdout=log)
        said = lambda: (tmp_path / "log").read_text()  # noqa: E731
        wait_for(lambda: "Compiling" in said() or process.poll() is not None, 120, "the compilation")
        time.sleep(0.5)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM if command == "train" else signal.SIGINT)
        assert process.wait(60) == code, said()
    assert time.monotonic() - begun < 10
    assert "topped" in said() and "took" not in said() and "Traceback" not in said(), said()
    assert not list((tmp_path / "tmp").glob("mindska-graph-*"))
    assert not list(tmp_path.glob("run/*.ckpt")) and not list(tmp_path.glob("run/.*.tmp*"))


@pytest.mark.slow
@pytest.mark.fault("compiling")
def test_the_network_for_evaluation_is_compiled_before_the_first_step(images, tmp_path, monkeypatch):
    """So a signal meanwhile ends the run at once, as it does while the training step compiles, and no step is lost."""
    compiled = []

    def note(cell, *inputs, options=None, what="", on_signal=None):
        compiled.append((what, on_signal, [(x.shape, x.dtype) for x in inputs], running.progress.step))

    for module in (loop, evaluation):
        monkeypatch.setattr(module, "compile_cached", note)
    running = trainer(images, tmp_path / "run", "val", epoch_size=1, warmup_epochs=0)
    batches = [[(Tensor(array).shape, Tensor(array).dtype) for array in batch] for batch in running.evaluator.loader]
    fit(running)
    assert [(what, on_signal, step) for what, on_signal, _, step in compiled] == [
        ("the training step", end_before_the_first_step, 0),
        ("the network for evaluation", end_before_the_first_step, 0),
    ]
    assert all(batch == compiled[1][2] for batch in batches), "else it would be compiled again"


def nano(path):
    from test_messages import nano

    return nano(path, 3)


def test_what_a_run_says_at_its_start_and_at_its_end(whole_run):
    out, printed = whole_run
    for line in (
        r"model +tiny_bn: \d+ parameters, [\d.]+ M MACs an image, 3x16x16 pixels, 3 classes",
        r"device +CPU: 1 process x \d+ threads, graph mode, float32, (C\+\+|MindSpore's) operators",
        r"data +36 images of 3 classes, validation: 36; global batch 8 \(8 images\), 4 steps an epoch, 3 epochs",
        rf"written to {re.escape(str(out))}",
        r"Compiling the training step \.\.\.",
        r"Compiling the training step took [\d.]+ s",
        r"Done: best top-1 [\d.]+ %, in epoch \d of 3",
        rf"  mindska predict IMAGE --ckpt_path {re.escape(str(out / 'tiny_bn_best.ckpt'))}",
    ):
        assert re.search(line, printed), line
        assert re.search(line, (out / "train.log").read_text()), line


def test_the_first_row_does_not_count_the_compilation(whole_run):
    """A batch has 8 images, and a row is written at each step."""
    out, printed = whole_run
    seconds = float(re.search(r"Compiling the training step took ([\d.]+) s", printed)[1])
    assert float(rows(out)[0]["images_per_s"]) > 2 * 8 / seconds


def test_half_precision_on_cpu_is_told(caplog):
    with caplog.at_level(logging.INFO, "mindska"):
        builders.set_up(Config(mode="pynative"), World())
        assert "amp_level" not in caplog.text
        builders.set_up(Config(mode="pynative", amp_level="O2"), World())
    assert "amp_level O2 computes in float16, which CPUs are slow at; --amp_level O0" in caplog.text


def test_the_time_left_counts_what_comes_between_the_steps():
    config = Config(epoch_size=10, val_interval=2, ckpt_save_interval=5, ckpt_save_steps=30)
    left = TimeLeft(config, steps_per_epoch=10, total_steps=100, evaluates=True)
    assert left.seconds(0, 2.0) == 50
    left.note_evaluation(11.0)
    left.note_evaluation(7.0)
    left.note_evaluation(9.0)
    assert left.seconds(0, 2.0) == 50 + 5 * 7
    left.saving = 1.0
    assert left.seconds(0, 2.0) == 50 + 5 * 7 + 2 + 4
    assert left.seconds(60, 2.0) == 20 + 2 * 7 + 1 + 2 and left.seconds(100, 2.0) == 0
    assert TimeLeft(config, 10, 100, evaluates=False).seconds(50, 1.0) == 50
