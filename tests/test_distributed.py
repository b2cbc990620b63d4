"""Real launches of tests/programs/ranks.py on CPU: worlds that form, compute and end, and worlds that fail."""

import contextlib
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import psutil
import pytest
from commands import free_port

from mindska import distributed as module
from mindska.distributed import cluster, environment
from mindska.errors import SettingError

PROGRAM = Path(__file__).parent / "programs" / "ranks.py"
BIN = Path(sys.executable).parent
LAUNCHED = re.compile(r"OMPI_|PMIX_|PRTE_|PMI_|MS_|RANK_|DEVICE_ID")
LAUNCHERS = [
    pytest.param(name, marks=pytest.mark.skipif(not shutil.which(name, path=BIN), reason=f"{name} is not installed"))
    for name in ("mpirun", "msrun")
]


def launch(launcher, tmp_path, scenario, token=None, **extra):
    """Run the scenario on two ranks; return exit code, what all ranks printed, and seconds. Nothing may stay behind."""
    token = token or f"mindska-{uuid.uuid4()}"
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
    """Than they were made to wait, here."""
    code, output, _ = launch("msrun", tmp_path, "patient")
    assert code == 0, output


@pytest.mark.fault("silent-rank")
@pytest.mark.slow
def test_a_rank_may_be_silent_for_longer_than_mindspore_waits_by_default(tmp_path):
    code, output, _ = launch("mpirun", tmp_path, "stopped")
    assert code == 0, output
    assert output.count("done") == 2


@pytest.mark.fault("strangers")
@pytest.mark.slow
def test_strangers_at_all_ports_while_the_world_forms(tmp_path):
    token, stop, found = f"mindska-{uuid.uuid4()}", threading.Event(), set()
    strangers = threading.Thread(target=knock_at_all_ports, args=(token, stop, found))
    strangers.start()
    try:
        code, output, _ = launch("mpirun", tmp_path, "strangers", token)
    finally:
        stop.set()
        strangers.join()
    assert code == 0, output
    assert output.count("done") == 2
    assert len(found) >= 3, "rank 0's, the scheduler's, and MindSpore's of the ranks"


def knock_at_all_ports(token, stop, found):
    """Connect to every port of the ranks and the scheduler, again and again; say nothing, or something strange."""
    silent = []
    while not stop.wait(0.02):
        for pid in left_behind(token):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if not process.name().startswith("python"):
                    continue  # mpirun's own port is Open MPI's
                find = getattr(process, "net_connections", None) or process.connections
                for port in [each.laddr.port for each in find("tcp") if each.status == psutil.CONN_LISTEN]:
                    with contextlib.suppress(OSError):
                        silent.append(socket.create_connection(("127.0.0.1", port), timeout=0.3))
                        with socket.create_connection(("127.0.0.1", port), timeout=0.3) as connection:
                            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
                        found.add(port)


@pytest.mark.fault("scheduler-port")
@pytest.mark.slow
def test_a_port_that_another_program_takes_first_is_changed(tmp_path):
    code, output, _ = launch("mpirun", tmp_path, "port_taken")
    assert code == 0, output
    assert "Starting MindSpore's scheduler anew" in output and "may have taken its port" in output
    assert output.count("done") == 2


@pytest.mark.fault("damaged-records")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (dict(MS_SCHED_HOST="nowhere.invalid"), "MS_SCHED_HOST, 'nowhere.invalid', leads to no IPv4 address"),
        (dict(MS_SCHED_PORT="8118x"), "MS_SCHED_PORT is '8118x': expected a whole number from 1 to 65535"),
    ],
)
def test_what_makes_no_sense_is_said_without_traceback(variables, message, tmp_path):
    code, output, seconds = launch("mpirun", tmp_path, "uneven", **variables)
    assert code != 0 and seconds < 60
    assert message in output
    assert "Traceback" not in output or "SettingError" in output  # a program that lets it pass shows it as Python does


@pytest.mark.fault("lost-rank")
@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_one_rank_raises_and_all_end(launcher, tmp_path):
    code, output, seconds = launch(launcher, tmp_path, "raises")
    assert code != 0 and seconds < 60
    assert "[rank 1 of 2] Traceback" in output
    assert output.count("ValueError: the reason of rank 1") == 1, output
    assert "done" not in output


@pytest.mark.fault("lost-rank")
@pytest.mark.slow
def test_exit_code_of_one_rank_is_that_of_the_job(tmp_path):
    code, output, _ = launch("mpirun", tmp_path, "exits")
    assert code == 7, output


@pytest.mark.fault("lost-rank")
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
        cluster.mpi_communicator()


def clean(monkeypatch, **variables):
    for name in [name for name in os.environ if LAUNCHED.match(name) or name == "OMP_NUM_THREADS"]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.fault("threads")
@pytest.mark.parametrize(
    "files, cores",
    [
        ({}, float(sys.maxsize)),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, float(sys.maxsize)),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        # The group's own limit, one around it, and a path of the host that a container does not see.
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "3 1\n", "sys/fs/cgroup/cpu.max": "2 1\n"}, 2),
        ({"proc/self/cgroup": "0::/docker/1\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        (
            {
                "proc/self/cgroup": "3:memory:/x\n2:cpu,cpuacct:/x\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "2:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            float(sys.maxsize),
        ),
        ({"proc/self/cgroup": "what is this\n", "sys/fs/cgroup/cpu.max": "many\n"}, float(sys.maxsize)),
    ],
)
def test_quota_of_cpu_time(tmp_path, files, cores, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert module.cores.cpu_quota(tmp_path) == cores
    monkeypatch.setattr(module.cores, "cpu_quota", lambda: cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert module.cores.share_of_cores(1) == min(8, math.ceil(cores))
    assert module.cores.share_of_cores(2) == max(1, min(8, math.ceil(cores)) // 2)


MSRUN = dict(MS_ROLE="MS_WORKER", MS_WORKER_NUM="2", MS_SCHED_HOST="127.0.0.1", MS_SCHED_PORT="8118")
MPIRUN = dict(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_LOCAL_SIZE="2")


@pytest.mark.fault("hosts")
@pytest.mark.parametrize(
    ("variables", "named"),
    [
        (dict(OMPI_COMM_WORLD_SIZE="x"), "OMPI_COMM_WORLD_SIZE"),
        (dict(OMPI_COMM_WORLD_SIZE="0"), "OMPI_COMM_WORLD_SIZE"),
        (dict(PMI_SIZE="-2"), "PMI_SIZE"),
        (dict(MPIRUN, OMPI_COMM_WORLD_LOCAL_SIZE="two"), "OMPI_COMM_WORLD_LOCAL_SIZE"),
        (dict(MPIRUN, MS_TOPO_TIMEOUT="1.5"), "MS_TOPO_TIMEOUT"),
        (dict(MPIRUN, MS_NODE_TIMEOUT="long"), "MS_NODE_TIMEOUT"),
        (dict(MPIRUN, MS_NODE_TIMEOUT="9999999999"), "MS_NODE_TIMEOUT"),
        (dict(MPIRUN, MS_RECEIVE_MSG_TIMEOUT="5s"), "MS_RECEIVE_MSG_TIMEOUT"),
        (dict(MPIRUN, MS_RETRY_INTERVAL_LOWER="9"), "MS_RETRY_INTERVAL_LOWER"),
        (dict(MPIRUN, MS_SCHED_PORT="65536"), "MS_SCHED_PORT"),
        (dict(MPIRUN, OMP_NUM_THREADS="many"), "OMP_NUM_THREADS"),
        (dict(OMP_NUM_THREADS="0"), "OMP_NUM_THREADS"),
        (dict(MSRUN, MS_ROLE="worker"), "MS_ROLE"),
        (dict(MSRUN, MS_WORKER_NUM="0"), "MS_WORKER_NUM"),
        (dict(MSRUN, MS_SCHED_PORT=""), "MS_SCHED_PORT"),
        (dict(MSRUN, DEVICE_ID="gpu0"), "DEVICE_ID"),
        (dict(MS_ROLE="MS_WORKER"), "MS_WORKER_NUM, MS_SCHED_HOST, MS_SCHED_PORT"),
    ],
)
def test_variables_that_make_no_sense_are_named(variables, named, monkeypatch):
    clean(monkeypatch, **variables)
    module.prepare()  # when mindska is imported: says nothing, but does not fail either
    with pytest.raises(SettingError, match=f"(?s)(variable |^|not ){named}"), module.distributed("CPU"):
        pass


@pytest.mark.parametrize("variables", [{}, MPIRUN, MSRUN, dict(MPIRUN, MS_TOPO_TIMEOUT="-1", OMP_NUM_THREADS="2, 1")])
def test_variables_that_make_sense(variables, monkeypatch):
    clean(monkeypatch, **variables)
    module.prepare()
    environment.check_environment()


def test_what_the_user_has_set_stays(monkeypatch):
    clean(monkeypatch, **MPIRUN, MS_NODE_TIMEOUT="45", MS_RECEIVE_MSG_TIMEOUT="")
    module.prepare()
    assert os.environ["MS_NODE_TIMEOUT"] == "45"
    assert os.environ["MS_RECEIVE_MSG_TIMEOUT"] == str(environment.RECEIVE_TIMEOUT)
    assert environment.formation_timeout() == environment.FORMATION_TIMEOUT
    monkeypatch.setenv("MS_TOPO_TIMEOUT", "-1")
    assert environment.formation_timeout() == float("inf")


@pytest.mark.fault("hosts")
@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "::1", "[::1]", "0:0:0:0:0:0:0:1", "localhost", "LOCALHOST.", "localhost.localdomain", "127.1"]
    + ["::ffff:127.0.0.1", " 127.0.0.1 ", "ipv4.example"],
)
def test_hosts_that_lead_to_an_ipv4_address(host, monkeypatch):
    known = {"ipv4.example": "127.0.0.1", "127.0.0.1": "127.0.0.1", "127.1": "127.0.0.1"}
    monkeypatch.setattr(socket, "getaddrinfo", resolver(known))
    assert cluster.ipv4_address(host, "MS_SCHED_HOST") == "127.0.0.1"


@pytest.mark.fault("hosts")
@pytest.mark.parametrize("host", ["", ".", "nowhere.invalid", "ipv6only.example", "2001:db8::1", "fe80::1%eth0"])
@pytest.mark.parametrize("really", [False, True])
def test_hosts_that_lead_to_none(host, really, monkeypatch):
    if not really:
        monkeypatch.setattr(socket, "getaddrinfo", resolver({}))
    with pytest.raises(SettingError, match=f"MS_SCHED_HOST, '{re.escape(host)}'.*IPv4 address"):
        cluster.ipv4_address(host, "MS_SCHED_HOST")


@pytest.mark.fault("hosts")
@pytest.mark.parametrize("host", ["a..b", "x" * 70 + ".example", "zero\0byte", "0.0.0.0", "\udcff"])
def test_impossible_hosts(host):
    with pytest.raises(SettingError, match="MS_SCHED_HOST"):
        cluster.ipv4_address(host, "MS_SCHED_HOST")


def resolver(known):
    """A getaddrinfo that knows some names, each by its IPv4 address."""

    def getaddrinfo(host, port, family=0, *_):
        assert family == socket.AF_INET
        if host not in known:
            raise socket.gaierror(-2, "Name or service not known")
        return [(family, socket.SOCK_STREAM, 6, "", (known[host], 0))]

    return getaddrinfo


@pytest.mark.fault("hosts")
def test_the_address_of_rank_0(monkeypatch):
    clean(monkeypatch)
    assert cluster.address_of_rank_0(["no.such.name"] * 3) == "127.0.0.1", "one host: its name is not asked for"
    with pytest.raises(SettingError, match="another rank's host, 'b.invalid', leads to no IPv4 .* set MS_SCHED_HOST"):
        cluster.address_of_rank_0(["a.invalid", "a.invalid", "b.invalid"])
    with pytest.raises(SettingError, match="hosts are a, localhost, .* 127.0.0.1, which only its own .* MS_SCHED_HOST"):
        cluster.address_of_rank_0(["a", "localhost"])
    monkeypatch.setenv("MS_SCHED_HOST", "::1")
    assert cluster.address_of_rank_0(["a", "a"]) == "127.0.0.1"
    monkeypatch.setenv("MS_SCHED_HOST", "192.0.2.1")
    with pytest.raises(SettingError, match="'192.0.2.1', is no address of rank 0's host"):
        cluster.address_of_rank_0(["a", "a"])
