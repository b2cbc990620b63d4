"""Which device a rank takes, and how many cores of its host."""

import contextlib
import os

from ..errors import SettingError

_threads_fixed = False  # MindSpore takes its number of threads once in a process


def set_device(target: str, local_rank: int = 0) -> None:
    """Have MindSpore compute on the device; with several of them, on number ``local_rank``.

    Raises:
        SettingError: there is no such device.
    """
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


def share_of_cores(local_size: int, by_mpirun: bool = False) -> int:
    """Return how many cores of this host one of its ``local_size`` processes may use."""
    if not hasattr(os, "sched_getaffinity"):  # macOS, Windows
        return max(1, (os.cpu_count() or 1) // max(1, local_size))
    mine = host = len(os.sched_getaffinity(0))
    if by_mpirun:
        # mpirun may have bound this rank to some cores (two ranks: to one core each); its own process is not bound.
        with contextlib.suppress(OSError):
            host = max(mine, len(os.sched_getaffinity(os.getppid())))
    return min(mine, max(1, host // max(1, local_size)))


def limit_threads(threads: int) -> None:
    """Set MindSpore's and the operators' threads: two ranks that both use all cores take three times as long."""
    global _threads_fixed
    if _threads_fixed:
        return
    import mindspore as ms

    if not os.environ.get("OMP_NUM_THREADS"):
        os.environ["MINDSKA_THREADS"] = str(threads)  # our operators read it when they are first used
    ms.device_context.cpu.op_tuning.threads_num(threads)
    ms.runtime.dispatch_threads_num(min(threads, 5))  # 5 is MindSpore's default
    _threads_fixed = True
