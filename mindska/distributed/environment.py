"""What launchers, users and libraries say to each other by environment variables: defaults, and checks."""

import contextlib
import os
import re
from typing import Optional

from ..errors import SettingError
from .cores import share_of_cores

FORMATION_TIMEOUT = 300  # seconds; on loaded cores, loading MindSpore alone takes more than one minute
NODE_TIMEOUT = 600
RECEIVE_TIMEOUT = 300


def launcher() -> str:
    """Return who started this process: ``"mpirun"``, ``"msrun"``, or ``"single"`` (also for mpirun's only rank).

    Raises:
        SettingError: mpirun's number of ranks in the environment is none.
    """
    if mpi("SIZE"):
        return "mpirun" if mpi("SIZE") > 1 else "single"
    return "msrun" if "MS_ROLE" in os.environ else "single"


def prepare() -> None:
    """Set what libraries read from the environment when they load; does the most when called before they do.

    `distributed` calls it too, but what came before (MindSpore's log level, OpenMP's threads) is then fixed already.
    What the user has set stays. Values that make no sense are for `distributed` to refuse.
    """
    _default("GLOG_v", 3)  # building a cluster is a hundred lines of warnings about itself
    # Ranks knock at the scheduler again every 3 to 5 seconds by default: 10 seconds to form a world of two.
    _default("MS_RETRY_INTERVAL_LOWER", 1)
    _default("MS_RETRY_INTERVAL_UPPER", 1)
    _default("MS_NODE_TIMEOUT", NODE_TIMEOUT)
    _default("MS_RECEIVE_MSG_TIMEOUT", RECEIVE_TIMEOUT)
    # OpenMP's threads spin while they wait, on the cores that MindSpore's own threads then need: a fifth of the time.
    _default("OMP_WAIT_POLICY", "passive")
    with contextlib.suppress(SettingError):
        if launcher() == "mpirun":
            _default("MS_TOPO_TIMEOUT", FORMATION_TIMEOUT)
            _default("OMP_NUM_THREADS", share_of_cores(mpi("LOCAL_SIZE"), by_mpirun=True))


def check_environment() -> None:
    """Refuse what makes no sense before C++ reads it, which takes "5x" for 5 and ends the process over "x".

    Raises:
        SettingError: names the variable, its value and what is expected.
    """
    threads = os.environ.get("OMP_NUM_THREADS", "").strip()
    if threads and not re.fullmatch(r"0*[1-9]\d*(\s*,\s*0*[1-9]\d*)*", threads, re.ASCII):
        raise SettingError(f"the environment variable OMP_NUM_THREADS is {threads!r}: expected a number of threads")
    how = launcher()
    if how == "single":
        return
    for name in ("MS_TOPO_TIMEOUT", "MS_NODE_TIMEOUT", "MS_RECEIVE_MSG_TIMEOUT", "MS_HEARTBEAT_RETRY_TIMEOUT"):
        whole_number(name, -1)
    lower, upper = (whole_number(f"MS_RETRY_INTERVAL_{bound}", 0) or 0 for bound in ("LOWER", "UPPER"))
    if lower > upper:
        raise SettingError(f"MS_RETRY_INTERVAL_LOWER ({lower}) is more than MS_RETRY_INTERVAL_UPPER ({upper})")
    port = whole_number("MS_SCHED_PORT", 1, 65535)
    if how == "mpirun":
        mpi("LOCAL_SIZE")
        return
    alone = "start with msrun or mpirun, or unset MS_ROLE to run alone"
    role = os.environ["MS_ROLE"]
    if role not in ("MS_WORKER", "MS_SCHED"):
        raise SettingError(
            f"the environment variable MS_ROLE is {role!r}: expected MS_WORKER or MS_SCHED, as msrun sets it; {alone}"
        )
    whole_number("DEVICE_ID", 0)
    needed = dict(
        MS_WORKER_NUM=whole_number("MS_WORKER_NUM", 1),
        MS_SCHED_HOST=os.environ.get("MS_SCHED_HOST"),
        MS_SCHED_PORT=port,
    )
    missing = [name for name, value in needed.items() if not value]
    if missing:
        raise SettingError(
            f"the environment variable MS_ROLE is set, as in a process of msrun, but not {', '.join(missing)}: {alone}"
        )


def formation_timeout() -> float:
    """Return the seconds for the ranks to find each other; infinite when the variable is negative, as in MindSpore."""
    seconds = whole_number("MS_TOPO_TIMEOUT", -1)
    if seconds is None:
        return FORMATION_TIMEOUT
    return seconds if seconds >= 0 else float("inf")


def mpi(name: str) -> int:
    """Return "SIZE" or "LOCAL_SIZE" as mpirun has put it into the environment; 0 without mpirun."""
    known = {  # Open MPI, then MPICH and Intel MPI
        "SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
        "LOCAL_SIZE": ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"),
    }
    return next(filter(None, (whole_number(key, 1) for key in known[name])), 0)


def whole_number(name: str, lowest: int, highest: int = 2**31 - 1) -> Optional[int]:
    """Return an environment variable's value; None when it is unset or empty."""
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not re.fullmatch(r"[+-]?\d{1,12}", text, re.ASCII) or not lowest <= int(text) <= highest:
        raise SettingError(
            f"the environment variable {name} is {text!r}: expected a whole number from {lowest} to {highest}"
        )
    return int(text)


def _default(name: str, value: object) -> None:
    if not os.environ.get(name):
        os.environ[name] = str(value)
