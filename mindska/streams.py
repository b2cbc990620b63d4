"""Standard streams that are closed or full, or that nobody reads any more: what is only shown ends no work."""

from __future__ import annotations

import os
import sys
from typing import Any, Optional, TextIO


def fill_standard_descriptors() -> None:
    """Opens /dev/null in the place of a standard stream that was closed (`2>&-`).

    Else the next file of the process would take its number, and get what libraries print there.
    """
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, errors="backslashreplace", closefd=False))  # noqa: SIM115, PTH123


class Unfailing:
    """A stream that drops what cannot be written.

    Attributes:
        failed: why something was dropped last.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.failed: Optional[Exception] = None

    def _try(self, action: Any, *arguments: Any) -> None:
        try:
            action(*arguments)
        except (OSError, ValueError) as error:  # ValueError: it is closed, or does not know a letter
            self.failed = error

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def unfailing_stderr() -> Any:
    """Standard error for a progress bar: a full disk, a lost terminal or a reader who has left ends nothing."""
    if isinstance(sys.stderr, Unfailing):
        return sys.stderr
    return Unfailing(sys.stderr or open(os.devnull, "w"))  # noqa: SIM115, PTH123


def drop_what_stderr_refuses() -> None:
    """From now on no message ends the work, and the exit status is that of the work."""
    sys.stderr = unfailing_stderr()


def print_result(text: str) -> str:
    """Prints what a command was asked for; returns why it could not, empty when it could or the reader has left."""
    out = sys.stdout
    encoding = getattr(out, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except (OSError, ValueError) as error:
        sys.stdout = Unfailing(out)  # the interpreter flushes it once more at its end
        return "" if isinstance(error, BrokenPipeError) else str(error)
    return ""
