"""Errors that are the user's to mend: their message says what was found, what was expected and what to do."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Base of such errors; the command lines show the message without a traceback."""


class SettingError(UserError, ValueError):
    """A setting or argument that is out of range or makes no sense."""


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turns a UserError into an exit with its message (status 1)."""
    try:
        yield
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def end_with_the_reader() -> None:
    """Has a command end quietly when nobody reads on, as in `... | head`; not for runs that have something to save."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
