"""Which device a rank takes, and how many cores and threads."""

import contextlib
import logging
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Optional

from ..errors import SettingError

log = logging.getLogger("mindska")

_share: Optional[int] = None  # the threads of this rank, once it is known; MindSpore takes a number once in a process
_listeners: list[Callable[[int], object]] = []


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
    """Return how many cores of this host one of its ``local_size`` processes may use.

    A container's quota of CPU time counts as that many cores: more threads would be stopped midway.
    """
    quota = math.ceil(cpu_quota())
    if not hasattr(os, "sched_getaffinity"):  # macOS, Windows
        return max(1, min(os.cpu_count() or 1, quota) // max(1, local_size))
    mine = host = len(os.sched_getaffinity(0))
    if by_mpirun:
        # mpirun may have bound this rank to some cores (two ranks: to one core each); its own process is not bound.
        with contextlib.suppress(OSError):
            host = max(mine, len(os.sched_getaffinity(os.getppid())))
    return min(mine, max(1, min(host, quota) // max(1, local_size)))


def cpu_quota(root: Path = Path("/")) -> float:
    """Return the cores' worth of CPU time that control groups (cgroups, versions 1 and 2) leave this process.

    ``sys.maxsize`` where there is no limit. `root`: where /proc and /sys are.
    """
    quota = float(sys.maxsize)
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / controllers
            parts = Path(path).parts[1:]
            for count in range(len(parts) + 1):  # a limit of any group around counts; in a container some are not seen
                folder = top.joinpath(*parts[:count])
                with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                    if controllers:
                        limit, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                    else:
                        limit, period = (folder / "cpu.max").read_text().split()
                    if limit != "max" and int(limit) > 0:
                        quota = min(quota, int(limit) / int(period))
    return quota


def operator_threads() -> int:
    """Return the threads of this process's operators: OMP_NUM_THREADS up to the cores, or its share of them."""
    cores = share_of_cores(1)
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if not wanted.isdecimal() or int(wanted) == 0:
        return _share or cores
    if int(wanted) > cores:
        log.warning("OMP_NUM_THREADS is %s, and this process has %d cores: %d threads are used", wanted, cores, cores)
    return min(int(wanted), cores)


def on_threads(listener: Callable[[int], object]) -> None:
    """Have a library of operators told the number of their threads, now and when it changes."""
    _listeners.append(listener)
    listener(operator_threads())


def limit_threads(threads: int) -> None:
    """Set MindSpore's and the operators' threads: two ranks that both use all cores take three times as long."""
    global _share
    if _share:
        return
    import mindspore as ms

    _share = threads
    for listener in _listeners:
        listener(operator_threads())
    ms.device_context.cpu.op_tuning.threads_num(threads)
    ms.runtime.dispatch_threads_num(min(threads, 5))  # 5 is MindSpore's default
