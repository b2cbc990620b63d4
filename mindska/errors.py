"""Errors that are the user's to mend: their message says what was found, what was expected and what to do."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from .streams import drop_what_stderr_refuses

RANK_0S_TIME = 3  # seconds for rank 0 to find what another rank has found, before that says it
MOST_NAMES = 10  # that a message lists; the others are counted


def printable(text: object, keep: str = "") -> str:
    """The text, with the escape (\\x1b) of every character that a terminal would obey or hide, but for those to `keep`.

    Names of keys, classes and files come from strangers, and so may messages that hold them.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def few(names: Iterable[object], limit: int = MOST_NAMES) -> str:
    """At most `limit` names, with commas, and how many more there are."""
    names = list(names)
    more = [f"and {len(names) - limit} more"] if len(names) > limit else []
    return ", ".join([*(printable(name) for name in names[:limit]), *more])


def formatted_list(title: str, names: Iterable[object], limit: int = MOST_NAMES) -> str:
    """`title`, the number of names and at most `limit` of them, one a line; an empty string when there are none."""
    names = list(names)
    if not names:
        return ""
    more = [f"... and {len(names) - limit} more"] if len(names) > limit else []
    return "\n  ".join([f"\n{title} ({len(names)}):", *(printable(name) for name in names[:limit]), *more])


def look_alike(names: Iterable[str], others: Iterable[str] = ()) -> str:
    """For the end of a message, which of some names look the same and are not; empty where none do.

    Letters with marks are written as one character or as two (Unicode's NFC and NFD), the latter by macOS.
    """
    seen: dict[str, str] = {}
    for name in [*others, *names]:
        twin = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if twin != name:
            return (
                f". {name!r} looks like another of the names, but is written with other characters ({ascii(name)} and "
                f"{ascii(twin)}, Unicode's NFC and NFD): rename one of the two"
            )
    return ""


class UserError(Exception):
    """Base of such errors; the command lines show the message without a traceback."""

    def __str__(self) -> str:
        return printable(super().__str__(), keep="\n")


class SettingError(UserError, ValueError):
    """A setting or argument that is out of range or makes no sense."""


class ConfigError(SettingError):
    """A setting that is unknown or out of range; the message says what was found, what was expected, what to do."""


class DataError(UserError, ValueError):
    """Data that is missing or unreadable; the message names the path and what was expected.

    Attributes:
        replaceable: whether a run may take another image in its place (`max_damaged`).
    """

    replaceable = True


class WeightsError(UserError, ValueError):
    """Weights that do not fit the network; the message lists the names and shapes."""


class MissingWeights(UserError, FileNotFoundError):
    """A checkpoint file that does not exist."""


class WriteError(UserError, OSError):
    """A file that cannot be written; what lay there before is intact."""


class RunError(UserError, RuntimeError):
    """A run that cannot start or go on; the message says what to do."""


class ExportError(UserError, RuntimeError):
    """An export that failed, an exported model that cannot be read, or that does not compute what the network does."""


class PredictionError(UserError, ValueError):
    """A prediction that cannot be made; the message says why."""


class WorldError(UserError, RuntimeError):
    """The ranks have not found each other, or have lost each other."""


class BuildError(RuntimeError):
    """The operators cannot be had here; the message says why."""


def let_rank_0_speak() -> None:
    """On another rank of mpirun, waits a moment: rank 0 says what all of them find, and mpirun then ends the others."""
    if any(os.environ.get(name, "0").strip() != "0" for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK")):
        time.sleep(RANK_0S_TIME)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turns a UserError, and an error of the file system, into an exit with its message (status 1).

    Nothing that stderr refuses ends the block. What the output's encoding does not have, such as the bytes of a file
    name that is no UTF-8, is printed as an escape.
    """
    drop_what_stderr_refuses()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        _flush()
    except UserError as error:
        let_rank_0_speak()
        raise SystemExit(f"error: {error}") from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if error.strerror is None or (error.filename is None and not full):  # not about a file
            raise
        what = "the output" if error.filename is None else printable(os.fsdecode(error.filename))
        hint = "; make room, and try again" if full else ""
        if isinstance(error, PermissionError):
            hint = "; whose is it, and may you use it and the folders above it?"
        raise SystemExit(f"error: {what}: {error.strerror}{hint}") from None


def _flush() -> None:
    """Writes what was printed, while an error can still be a message; Python would show a traceback at its end."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):  # so that it is not tried again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def end_with_the_reader() -> None:
    """Has a command end quietly when nobody reads on, as in `... | head`; not for runs that have something to save."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
