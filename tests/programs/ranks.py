"""What the ranks of test_distributed.py run: ``ranks.py SCENARIO``."""

import os
import signal
import sys
import time

import numpy as np

from mindska import distributed as module
from mindska.distributed import all_reduce_sum, barrier, broadcast_object, distributed


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
    assert str(world.threads) in (os.environ.get("OMP_NUM_THREADS"), os.environ.get("MINDSKA_THREADS"))


def uneven(world):
    time.sleep(5 * (world.rank == 0))


def patient(world):
    time.sleep(40 * (world.rank == 0))  # MindSpore's collectives on CPU give up after 30 seconds
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
        module._SCHEDULER = "raise SystemExit('the scheduler says no')"
    with distributed("CPU") as world:
        assert world.rank == int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("MS_NODE_ID", "0"))
        print(f"world {world} mpi {'mpi4py.MPI' in sys.modules}", flush=True)
        globals()[sys.argv[1]](world)
    print("done", flush=True)
