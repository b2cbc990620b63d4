"""How ranks end: all of them when one fails, with its reason, and none that is forgotten."""

import contextlib
import ctypes
import os
import signal
import sys
import textwrap
import threading
import time
import traceback
from typing import NoReturn

from ..errors import UserError, let_rank_0_speak
from .environment import mpi

ORPHANS_TIME = 40  # seconds for a rank to save after mpirun is gone
_parent = None  # mpirun's process, once this rank is to end with it


def launcher_is_gone() -> bool:
    """Whether mpirun has ended before this rank."""
    return _parent is not None and os.getppid() != _parent


def exit_code(error: BaseException) -> int:
    """Return the exit code of a program that ends with this exception."""
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        return 1  # Python's rule for a message
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def end_everything(how: str, error: BaseException, code: int) -> NoReturn:
    """Say what went wrong on this rank, and end every process of the job without waiting for any."""
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        prefix = "[scheduler] "
    else:
        rank = os.environ.get("MS_NODE_ID") or os.environ.get("OMPI_COMM_WORLD_RANK", "?")
        prefix = f"[rank {rank} of {mpi('SIZE') or os.environ.get('MS_WORKER_NUM')}] "
    if isinstance(error, SystemExit):
        text = f"exit: {error.code}\n"
    elif isinstance(error, UserError):
        text = f"error: {error}\n"
    else:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    if isinstance(error, UserError) or (isinstance(error, SystemExit) and isinstance(error.code, int)):
        let_rank_0_speak()
    with contextlib.suppress(Exception):  # a closed stdout must not keep the others waiting
        sys.stdout.flush()
        sys.stderr.write(textwrap.indent(text, prefix))  # in one piece: the ranks share a terminal
        sys.stderr.flush()
    # No clean-up: MindSpore's would wait for the others. Both launchers end the other ranks of one that ends like this.
    # Nor MPI's own abort: it adds two pages and a NUL byte to the message.
    os._exit(code)


def end_without_teardown() -> None:
    """Ends a rank that ended well, without MindSpore's own teardown of its cluster on CPU.

    There (MindSpore 2.8), one of twenty pairs of ranks had a crash: a thread of one that is half torn down learns that
    the other is gone. mpirun's scheduler needs no farewell, its keeper ends it with rank 0; msrun's would wait for one.
    """
    if hasattr(sys, "last_value"):  # an exception after the block: let Python end as it does
        return
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    library = sys.modules.get("mpi4py.MPI")
    if library is not None and not library.Is_finalized():
        library.Finalize()
    os._exit(0)


def end_with_parent() -> None:
    """Has the system stop this rank when mpirun is gone: nobody else would (Linux only).

    By SIGTERM, so that a run finishes its update and saves; what has not ended after that is ended by a thread.
    """
    global _parent
    if not sys.platform.startswith("linux"):
        return
    _parent = parent = os.getppid()
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != parent:  # it was killed before the call
        os.kill(os.getpid(), signal.SIGKILL)

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(ORPHANS_TIME)
        os._exit(1)

    threading.Thread(target=wait, name="mindska-watch-mpirun", daemon=True).start()
