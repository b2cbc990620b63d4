"""Kills a process that writes checkpoints, 50 times; prints how many kills tore a file: `torn.py FOLDER`."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor

from mindska.training.folder import RunFolder
from mindska.weights.files import read_file, write_checkpoint


def write(folder: RunFolder, parameters: dict[str, Parameter]) -> None:
    """Writes checkpoints as a run does, without end."""
    with folder.locked():
        folder.begin("torn", step=10_000)
        for step in range(1, 10_000):
            with folder.writing_checkpoint(folder.path(0, step)) as path:
                write_checkpoint(path, parameters, {"step": step, "run_id": "torn"})
            folder.prune({})


def main(root: Path) -> None:
    values = np.random.default_rng(0).standard_normal(20_000, dtype=np.float32)
    parameters = {f"p{i}": Parameter(Tensor(values), name=f"p{i}") for i in range(5)}
    folder = RunFolder(root, "m", keep_best=1)
    folder.write_settings({"run_id": "torn"})
    generator, torn = random.Random(0), 0
    for _ in range(50):
        child = os.fork()
        if child == 0:  # writes one checkpoint after the other until it is killed
            try:
                write(RunFolder(root, "m", keep_best=1), parameters)
            finally:
                os._exit(1)
        time.sleep(generator.uniform(0.02, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        torn += bool(list(root.glob(".*.tmp*")))
        with folder.locked():
            assert not list(root.glob(".*.tmp*")), "a half-written file was left"
            for saved in folder.saved():
                arrays, record = read_file(saved.path, checksum_required=True)
                assert record["step"] == saved.step and len(arrays) == 5
    print("torn", torn)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
