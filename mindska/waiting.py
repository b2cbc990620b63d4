"""Long work within a library, while nothing of ours runs: a thread says that it goes on, and ends it at a signal."""

from __future__ import annotations

import logging
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Callable, Optional

log = logging.getLogger("mindska")

INTERVAL = 10.0  # seconds between two signs of life
SIGNALS = {getattr(signal, name, 0) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")} - {0}
END = b"\0"


@contextmanager
def waiting(
    what: str, quiet_for: float = 0.0, on_signal: Optional[Callable[[int], None]] = None, note: str = ""
) -> Iterator[None]:
    """Within, a line says every ten seconds that `what` goes on, and at the end how long it took.

    Args:
        quiet_for: seconds after which the first line comes; what takes less is not mentioned.
        on_signal: what a signal that the process handles (or Ctrl-C) calls, in another thread, while the main thread is
            in a library. It must end the process: nothing else does.
        note: for the last line.
    """
    begun, receiver, sender = time.monotonic(), *socket.socketpair()
    said = not quiet_for
    if said:
        log.info("%s ...", what)

    def watch() -> None:
        nonlocal said
        due = begun + (quiet_for or INTERVAL)
        while True:
            if not select.select([receiver], [], [], max(0.0, due - time.monotonic()))[0]:
                said, due = True, time.monotonic() + INTERVAL
                log.info("%s ... (%.0f s)", what, time.monotonic() - begun)
                continue
            received = receiver.recv(64)
            for number in SIGNALS & set(received):
                if on_signal:
                    on_signal(number)
            if END[0] in received or not received:
                return

    thread = threading.Thread(target=watch, name="mindska-waiting", daemon=True)
    with ExitStack() as stack:
        stack.enter_context(receiver)
        stack.enter_context(sender)
        if on_signal and threading.current_thread() is threading.main_thread():
            sender.setblocking(False)
            # The system's own handler writes there, also while the main thread is in a library.
            stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False))
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # which raises in the midst of a library
                stack.callback(signal.signal, signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGINT, lambda *_: None)
        thread.start()
        try:
            yield
        finally:
            with suppress(OSError):
                sender.send(END)
            thread.join()
    if said:
        log.info("%s took %.1f s%s", what, time.monotonic() - begun, note and f" ({note})")
