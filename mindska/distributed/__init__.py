"""How processes find each other: the same training script under ``mpirun``, under ``msrun``, or alone.

``mpirun -n 2 python train.py``, ``msrun --worker_num=2 --local_worker_num=2 train.py`` and ``python train.py`` all read

    with distributed("CPU") as world:
        ...

MindSpore's processes meet at a *scheduler* (its "dynamic cluster"). msrun starts one; mpirun knows of none, so rank 0
starts it here, and MPI only carries its address to the other ranks and ends them all when one fails. MPI is never
touched unless mpirun started the process.

MindSpore's collectives are for gradients: on CPU they give up when one rank arrives too long after another, and they
sum no integers. `barrier`, `all_reduce_sum`, `all_gather_object` and `broadcast_object` therefore use sockets of their
own between rank 0 and every other rank (*links*): they wait as long as it takes, and are exact.

Limits, each an environment variable of MindSpore that stays as the user has set it (seconds):

- ``MS_TOPO_TIMEOUT`` (300 under mpirun, which tries twice; msrun's ``--cluster_time_out``, 600): for all ranks to find
  each other.
- ``MS_NODE_TIMEOUT`` (600; MindSpore's own default is 30): how long a rank may be silent. The scheduler gives a rank up
  whose heartbeat stays away for longer, and on CPU a collective waits that long for the slowest rank. Many ranks that
  compile on few cores are minutes apart; a rank that has really ended is noticed at once, by its launcher and by the
  links.
- ``MS_RECEIVE_MSG_TIMEOUT`` (300; MindSpore's own default is 15): for the scheduler to answer one message.

Whom the ranks trust: a link carries pickles, so both of its ends prove by HMAC that they know a random key before
anything else is read. Other connections to rank 0's port are dropped, whatever they send, and delay nobody. MindSpore's
own ports (the scheduler's, and one of each rank) ask for no such proof: other programs that connect there by accident
do no harm, but one that speaks MindSpore's protocol can hold the scheduler up; mpirun's ranks then try once more at
another port. On one host all these ports are bound to 127.0.0.1; among several, use a network that you trust. mpirun
has ports of its own: Open MPI 5 stands still, with all output of the ranks, for as long as a program holds a connection
to one of them and says nothing.

MindSpore's communication takes IPv4 addresses only: names are resolved here.

Nothing of MindSpore is imported at the top: what is put into the environment must be there before MindSpore loads.
"""

import atexit
import contextlib
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Optional

import numpy as np

from ..errors import WorldError
from .cluster import join_by_mpirun, join_by_msrun, local_rank, watch_scheduler
from .cores import cpu_quota, limit_threads, set_device, share_of_cores
from .ending import end_everything, end_without_teardown, exit_code
from .environment import check_environment, launcher, prepare
from .links import another_has_ended, exchange, watch

__all__ = [
    "World",
    "WorldError",
    "all_gather_object",
    "all_reduce_sum",
    "barrier",
    "broadcast_object",
    "check_environment",
    "distributed",
    "launcher",
    "prepare",
    "world",
]

PATIENCE = 20  # seconds for mpirun or msrun to end the other ranks, before these end by themselves


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
        SettingError: ``device_target`` is unknown, or this machine's MindSpore cannot use it; or a variable of the
            launcher, of MindSpore's cluster or of OpenMP makes no sense.
        WorldError: mpi4py or its MPI library is missing or is not the one mpirun belongs to; or the ranks did not all
            find each other in time (``MS_TOPO_TIMEOUT``).
    """
    global _world, _links
    prepare()
    how = launcher()
    check_environment()
    ended = threading.Event()
    try:
        if how == "single":
            world = World(threads=threads or share_of_cores(1))
            set_device(device_target)
            if threads or cpu_quota() <= world.threads:  # MindSpore's own choice knows no quota
                limit_threads(world.threads)
        else:
            world, _links = _join(how, device_target, threads)
        _world = world
        watch_scheduler(ended)
        watch(_links, ended, PATIENCE, functools.partial(end_everything, how, another_has_ended(), 1))
        yield world
        ended.set()
        barrier()  # the scheduler leaves with rank 0, and mpirun takes a rank that ends early for a failure
        if how == "mpirun" and device_target == "CPU":
            atexit.register(end_without_teardown)
    except BaseException as error:
        if how == "single":
            raise
        code = exit_code(error)
        if code:
            end_everything(how, error, code)
        ended.set()
        barrier()
        if how == "mpirun" and device_target == "CPU":
            atexit.register(end_without_teardown)
        raise
    finally:
        ended.set()
        for link in _links:
            link.close()
        _world, _links = World(), []


def world() -> World:
    """The processes of the enclosing `distributed` block; this process alone outside of one."""
    return _world


def barrier() -> None:
    """Wait until every rank is here, however long that takes.

    On CPU, use it where ranks may be far apart (``MS_NODE_TIMEOUT``) and a collective follows: after compiling,
    evaluating or writing a checkpoint.
    """
    all_gather_object(None)


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
    arrays = all_gather_object(array.astype(np.float64 if array.dtype.kind == "f" else np.int64))
    if len({(each.shape, each.dtype) for each in arrays}) > 1:
        raise ValueError(f"all_reduce_sum: ranks bring different arrays: {[(a.shape, str(a.dtype)) for a in arrays]}")
    return np.stack(arrays).sum(axis=0)


def broadcast_object(value: Any) -> Any:
    """Return rank 0's ``value`` (anything that pickles) on every rank."""
    return all_gather_object(value if _world.rank == 0 else None)[0]


def all_gather_object(value: Any) -> list[Any]:
    """Return every rank's ``value`` (anything that pickles), in rank order.

    All go through rank 0, one after the other: meant for small things, to compare settings, data or versions.

    Raises:
        WorldError: another rank has ended.
    """
    return exchange(_links, _world.rank, value)


def _join(how: str, device_target: str, threads: Optional[int]) -> tuple[World, list[Connection]]:
    """Form MindSpore's cluster and link every rank to rank 0."""
    links = join_by_mpirun(device_target) if how == "mpirun" else join_by_msrun(device_target)
    import mindspore as ms
    from mindspore import communication

    size, local_size = communication.get_group_size(), communication.get_local_rank_size()
    ms.set_auto_parallel_context(parallel_mode="data_parallel", gradients_mean=True, device_num=size)
    world = World(
        rank=communication.get_rank(),
        size=size,
        local_rank=local_rank(),
        local_size=local_size,
        threads=threads or share_of_cores(local_size, by_mpirun=how == "mpirun"),
    )
    if threads or local_size > 1:
        limit_threads(world.threads)
    return world, links
