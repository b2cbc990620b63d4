"""What the ranks of test_distributed.py run: ``ranks.py SCENARIO``."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np

from mindska.distributed import (
    all_gather_object,
    all_reduce_sum,
    barrier,
    broadcast_object,
    cluster,
    distributed,
    links,
)


def collectives(world):
    import mindspore as ms
    from mindspore import Tensor, nn, ops

    class Sum(nn.Cell):
        def __init__(self):
            super().__init__()
            self.all_reduce = ops.AllReduce()

        def construct(self, x):
            return self.all_reduce(x) * 2

    ms.set_context(mode=ms.GRAPH_MODE)
    reduced = Sum()(Tensor(np.arange(3, dtype=np.float32) + world.rank)).asnumpy()
    ranks = sum(range(world.size))
    assert reduced.tolist() == [2 * (world.size * i + ranks) for i in range(3)], reduced

    total = all_reduce_sum(np.array([2**40 + 1, world.rank]))
    assert total.dtype == np.int64 and total.tolist() == [world.size * (2**40 + 1), ranks], total
    assert all_reduce_sum(np.float32(0.5)) == 0.5 * world.size
    assert broadcast_object({"from": world.rank}) == {"from": 0}
    assert all_gather_object({"from": world.rank}) == [{"from": rank} for rank in range(world.size)]
    assert str(world.threads) in (os.environ.get("OMP_NUM_THREADS"), os.environ.get("MINDSKA_THREADS"))


def port_taken(world):
    collectives(world)


def strangers(world):
    collectives(world)


def uneven(world):
    time.sleep(5 * (world.rank == 0))


def stopped(world):
    """Longer than MindSpore's own limit (30 seconds) for heartbeats, and for a rank that is late for a collective."""
    if world.rank == 1:
        subprocess.Popen(["sh", "-c", f"sleep 40; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    collectives(world)


def patient(world):
    time.sleep(40 * (world.rank == 0))
    barrier()
    collectives(world)


def raises(world):
    if world.rank == 1:
        raise ValueError("the reason of rank 1")
    stuck()


def exits(world):
    if world.rank == 1:
        sys.exit(7)
    stuck()


def killed(world):
    if world.rank == int(os.environ["VICTIM"]):
        os.kill(os.getpid(), signal.SIGKILL)
    stuck()


def stuck():
    from mindspore import Tensor, ops

    ops.AllReduce()(Tensor(np.zeros(3, np.float32))).asnumpy()


if __name__ == "__main__":
    if sys.argv[1] == "without_scheduler":
        cluster.SCHEDULER = "raise SystemExit('the scheduler says no')"
    if sys.argv[1] == "port_taken":  # by another program, between rank 0's choice and the scheduler's start
        squatter = socket.create_server(("127.0.0.1", 0), backlog=100)
        ports = iter([squatter.getsockname()[1]] * 2)  # asked for once to see whether the address is this host's
        free_port = cluster.free_port
        cluster.free_port = lambda host: next(ports, None) or free_port(host)
    if sys.argv[1] == "strangers" and os.environ["OMPI_COMM_WORLD_RANK"] == "1":
        connect = links.connect_to_rank_0
        links.connect_to_rank_0 = lambda *arguments: time.sleep(3) or connect(*arguments)  # they come first
    with distributed("CPU") as world:
        assert world.rank == int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("MS_NODE_ID", "0"))
        print(f"world {world} mpi {'mpi4py.MPI' in sys.modules}", flush=True)
        globals()[sys.argv[1]](world)
    print("done", flush=True)
