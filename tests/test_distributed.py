"""Real launches of tests/programs/ranks.py on CPU: worlds that form, compute and end, and worlds that fail."""

import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from commands import free_port

from mindska import distributed as module

PROGRAM = Path(__file__).parent / "programs" / "ranks.py"
BIN = Path(sys.executable).parent
LAUNCHED = re.compile(r"OMPI_|PMIX_|PRTE_|PMI_|MS_|RANK_|DEVICE_ID")
LAUNCHERS = [
    pytest.param(name, marks=pytest.mark.skipif(not shutil.which(name, path=BIN), reason=f"{name} is not installed"))
    for name in ("mpirun", "msrun")
]


def launch(launcher, tmp_path, scenario, **extra):
    """Run the scenario on two ranks; return exit code, what all ranks printed, and seconds. Nothing may stay behind."""
    token = f"mindska-{uuid.uuid4()}"
    environment = {name: value for name, value in os.environ.items() if not LAUNCHED.match(name)}
    environment.update(
        extra,
        MINDSKA_TEST=token,
        OMPI_ALLOW_RUN_AS_ROOT="1",
        OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
        PRTE_MCA_rmaps_default_mapping_policy=":oversubscribe",
    )
    command = {
        "mpirun": [BIN / "mpirun", "-n", "2", sys.executable, PROGRAM, scenario],
        "msrun": [
            BIN / "msrun",
            "--worker_num=2",
            "--local_worker_num=2",
            "--join=True",
            f"--master_port={free_port()}",
        ]
        + [f"--log_dir={tmp_path}", PROGRAM, scenario],
        "single": [sys.executable, PROGRAM, scenario],
    }[launcher]
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"  # msrun starts "python"
    start = time.monotonic()
    try:
        result = subprocess.run(
            command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=90
        )
        seconds = time.monotonic() - start
        deadline = time.monotonic() + 10  # the scheduler leaves a few seconds after rank 0
        while left_behind(token) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left_behind(token)
    finally:
        for pid in left_behind(token):
            os.kill(pid, 9)
    return result.returncode, result.stdout.decode(), seconds


def left_behind(token):
    """Return the ids of the processes, schedulers too, that were started with the token in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if token.encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_ranks_compute_together(launcher, tmp_path):
    code, output, _ = launch(launcher, tmp_path, "collectives")
    assert code == 0, output
    for rank in (0, 1):
        assert f"World(rank={rank}, size=2, local_rank={rank}, local_size=2, threads=" in output
    assert f"mpi {launcher == 'mpirun'}" in output
    assert output.count("done") == 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_may_end_at_different_times(launcher, tmp_path):
    code, output, _ = launch(launcher, tmp_path, "uneven")
    assert code == 0, output
    assert output.count("done") == 2


@pytest.mark.slow
def test_barrier_waits_longer_than_collectives(tmp_path):
    code, output, _ = launch("msrun", tmp_path, "patient")
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_one_rank_raises_and_all_end(launcher, tmp_path):
    code, output, seconds = launch(launcher, tmp_path, "raises")
    assert code != 0 and seconds < 60
    assert "[rank 1 of 2] Traceback" in output
    assert output.count("ValueError: the reason of rank 1") == 1, output
    assert "done" not in output


@pytest.mark.slow
def test_exit_code_of_one_rank_is_that_of_the_job(tmp_path):
    code, output, _ = launch("mpirun", tmp_path, "exits")
    assert code == 7, output


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "victim"), [("mpirun", 0), ("mpirun", 1), ("msrun", 1)])
def test_one_rank_is_killed_and_all_end(launcher, victim, tmp_path):
    code, output, seconds = launch(launcher, tmp_path, "killed", VICTIM=str(victim))
    assert code != 0 and seconds < 60
    assert "done" not in output


@pytest.mark.slow
def test_a_world_that_does_not_form_says_where_and_why(tmp_path):
    code, output, _ = launch("mpirun", tmp_path, "without_scheduler", MS_TOPO_TIMEOUT="10")
    assert code != 0
    assert re.search(r"no world of 2 ranks has formed at the scheduler 127.0.0.1:\d+ within 10 seconds", output), output
    assert "the scheduler says no" in output


@pytest.mark.slow
def test_alone_without_mpi(tmp_path):
    code, output, _ = launch("single", tmp_path, "uneven")
    assert code == 0, output
    assert "World(rank=0, size=1, local_rank=0, local_size=1, threads=" in output
    assert "mpi False" in output


def test_alone_the_collectives_return_what_they_get():
    assert module.all_reduce_sum(np.array([2**40 + 1])).tolist() == [2**40 + 1]
    assert module.all_reduce_sum(0.5) == 0.5
    assert module.broadcast_object("x") == "x"
    module.barrier()
    with pytest.raises(TypeError, match="booleans, integers or floats"):
        module.all_reduce_sum(np.array(["a"]))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "single"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, "single"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "MS_ROLE": "MS_WORKER"}, "mpirun"),  # after it has formed the cluster
        ({"PMI_SIZE": "4"}, "mpirun"),
        ({"MS_ROLE": "MS_WORKER"}, "msrun"),
    ],
)
def test_launcher(variables, expected, monkeypatch):
    for name in [name for name in os.environ if LAUNCHED.match(name)]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert module.launcher() == expected


def test_missing_device_target_names_the_available_ones():
    with pytest.raises(ValueError, match="'TPU' is not available: MindSpore .* finds .*CPU"), module.distributed("TPU"):
        pass


def test_missing_mpi_names_the_remedy(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(RuntimeError, match="pip install"):
        module._mpi_communicator()
