"""Runs train.py and validate.py as their users do, with a network that compiles in seconds; reads what they leave."""

from __future__ import annotations

import csv
import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import mindspore as ms
import numpy as np

ROOT = Path(__file__).parent.parent
PROGRAMS = Path(__file__).parent / "programs"
BIN = Path(sys.executable).parent
SETTINGS = dict(
    model="tiny_bn", image_resize=16, crop_pct=1.0, batch_size=8, epoch_size=3, warmup_epochs=1, log_interval=1,
    lr=0.02, ema="true", ema_decay=0.9, auto_augment="randaug-m5", re_prob=0.2, color_jitter="null",
)  # fmt: skip


def free_port():
    """A port that nobody listens on: tests run beside each other, and msrun's own is always the same."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def words(command, images, out=None, launcher=(), script=PROGRAMS / "tiny.py", **settings):
    """The command line of `train.py` or `validate.py` with these settings."""
    options = {"data_dir": images, **({"ckpt_save_dir": out} if out else {}), **settings}
    arguments = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    python = [] if launcher and launcher[0].endswith("msrun") else [sys.executable]
    return [str(word) for word in (*launcher, *python, script, ROOT / command, *arguments)]


def start(command, images, out=None, **settings):
    """Starts a command; its output goes to a pipe. It is the leader of a process group of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    command = words(command, images, out, **settings)
    # MindSpore may leave files about a failed compilation in the current folder: not in ours.
    return subprocess.Popen(command, env=env, cwd=Path(images).parent, start_new_session=True, **pipes)


def run(command, images, out=None, expect=0, timeout=240, **settings):
    """Runs `train.py` or `validate.py` to its end; returns what it printed."""
    process = start(command, images, out, **settings)
    try:
        printed, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == expect, printed
    return printed


def train(images, out, **settings):
    return run("train.py", images, out, **{**SETTINGS, **settings})


def rows(out):
    with (Path(out) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def losses(out):
    return [float(row["loss"]) for row in rows(out)]


def parameters(path):
    return {
        name: value.asnumpy() for name, value in ms.load_checkpoint(str(path)).items() if isinstance(value, ms.Tensor)
    }


def mpirun(ranks: int) -> tuple[str, ...]:
    """The launcher for so many ranks on this host."""
    return (str(BIN / "mpirun"), "-n", str(ranks), "--oversubscribe")


def assert_same_losses(ours: Path, theirs: Path) -> None:
    """Two runs report the same losses. The last digit may differ: a sum's order depends on where its terms lie."""
    np.testing.assert_allclose(losses(ours), losses(theirs), rtol=1e-6)


def assert_same_state(ours: Path, theirs: Path) -> None:
    """Two checkpoints hold the same names and, to the bit, the same values."""
    left, right = parameters(ours), parameters(theirs)
    assert set(left) == set(right)
    for name, value in right.items():
        np.testing.assert_array_equal(left[name], value, err_msg=name)


def start_training(images, out, **settings):
    return start("train.py", images, out, **{**SETTINGS, **settings})


def wait_for(condition, seconds=60, what="the condition"):
    """Waits until condition() is true; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
        time.sleep(0.02)


def finished_steps(out) -> int:
    """Rows in the metrics of a run that may still be going on."""
    path = Path(out) / "metrics.csv"
    return max(0, path.read_text().count("\n") - 1) if path.exists() else 0


def wait_for_steps(out, steps: int) -> None:
    """Waits until the metrics of a run that goes on have so many rows."""
    wait_for(lambda: finished_steps(out) >= steps, what=f"step {steps}")


def processes(word: str) -> list[int]:
    """Processes of this machine with `word` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it has just ended
            pass
    return [pid for pid in found if pid != os.getpid()]


@cache
def script(name: str):
    """The command behind scripts/NAME.py as a module, to run its `main` in this process."""
    command = re.search(r'run\("(\w+)"\)', (ROOT / "scripts" / f"{name}.py").read_text())[1]
    return importlib.import_module(f"mindska.commands.{command}")
