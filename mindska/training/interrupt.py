"""Requests to stop: a signal to any rank ends a run after the current update, with a checkpoint.

SIGTERM is a scheduler's, SIGINT is Ctrl-C, SIGHUP is a terminal that has gone, SIGUSR1 is for launchers: Open MPI's
mpirun passes it on to the ranks and leaves them the time they need, while after the others it kills them within a
quarter of a second. A signal that the process was started to ignore (by `nohup`, or as a job in the background) stays
ignored.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Callable, NoReturn, Optional, Union

log = logging.getLogger("mindska")

EXIT_CODE = 75  # EX_TEMPFAIL: nothing is wrong, the same command goes on
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]

Handler = Union[Callable[[int, Optional[FrameType]], Any], int, None]  # what `signal.signal` takes and returns


def end_before_the_first_step(number: int) -> NoReturn:
    """Ends the process at once: nothing has been trained that is not in a checkpoint. The launcher ends other ranks."""
    log.warning("Stopped on request (%s) before the first step; the same command goes on", signal.Signals(number).name)
    sys.stderr.flush()
    os._exit(EXIT_CODE)


class StopRequest:
    """Within this context the signals set `requested`; a second SIGINT interrupts at once, as usual."""

    def __init__(self) -> None:
        self.requested = False
        self.previous: dict[int, Handler] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: Optional[type], error: Optional[BaseException], trace: Optional[TracebackType]) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Optional[FrameType]) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
