"""A two-rank run, killed and restarted at random for 15 minutes, ends as the undisturbed one.

Outside the default test run:

    python -m pytest tests/faults/test_soak.py -o addopts=--import-mode=importlib -s

MINDSKA_SOAK_MINUTES sets another time.
"""

import os
import random
import signal
import time

import pytest
from commands import assert_same_losses, assert_same_state, mpirun, processes, rows, start_training, train, wait_for

MINUTES = float(os.environ.get("MINDSKA_SOAK_MINUTES", "15"))
EPOCHS = max(int(MINUTES * 500), 10)  # of 4 steps: more than the kills leave time for


@pytest.mark.soak
def test_soak(images, tmp_path):
    settings = dict(
        epoch_size=EPOCHS,
        batch_size=4,
        log_interval=20,
        ckpt_save_interval=5,
        val_while_train="false",
        launcher=mpirun(2),
    )
    out, generator = tmp_path / "run", random.Random(0)
    kinds = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]
    end, kills = time.monotonic() + 60 * MINUTES, 0
    while time.monotonic() < end:
        process = start_training(images, out, **settings)
        time.sleep(generator.uniform(5, 20))
        if process.poll() is not None:
            break
        number = generator.choice(kinds)
        ranks = processes(str(out))
        victim = process.pid if number == signal.SIGTERM else generator.choice(ranks)
        os.kill(victim, number)
        kills += 1
        process.communicate(timeout=60)
        wait_for(lambda: not processes(str(out)), what="the end of all processes")
    train(images, out, timeout=3600, **settings)
    train(images, tmp_path / "whole", timeout=3600, **settings)
    last = f"tiny_bn-{EPOCHS}_{4 * EPOCHS}.ckpt"
    assert_same_state(out / last, tmp_path / "whole" / last)
    assert_same_losses(out, tmp_path / "whole")
    assert [row["step"] for row in rows(out)] == [row["step"] for row in rows(tmp_path / "whole")]
    print(f"\nsoak: {kills} kills in {MINUTES:g} minutes, {4 * EPOCHS} steps on two ranks: the same to the bit")
