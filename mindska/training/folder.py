"""The output folder of a run: its lock, its settings, its checkpoints."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from ..errors import RunError, WeightsError
from ..files import replacing
from ..weights.files import read_file

log = logging.getLogger("mindska")

KEEP_NEWEST = 2  # so that a damaged newest file leaves one to fall back to
MAX_SETTINGS = 1 << 26  # bytes of a settings.json that is read


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error of the file system within the block into a RunError about `path`."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {error.strerror}. Make room or mend the folder, and the same command goes on; "
            f"or choose another --ckpt_save_dir."
        ) from error


def set_aside(path: Path, why: str) -> Path:
    """Renames a file to NAME.WHY, with a number where there is one already; returns its new path."""
    number = 1
    while os.path.lexists(target := Path(f"{path}.{why}{number if number > 1 else ''}")):
        number += 1
    with writing(path):
        path.replace(target)
    return target


@dataclass(frozen=True)
class Saved:
    """A checkpoint in the output folder, after so many finished epochs and steps."""

    path: Path
    epoch: int
    step: int


class RunFolder:
    """The output folder of one run of `model`.

    It holds `settings.json` (what the run was started with), the checkpoints `{model}-{epochs}_{steps}.ckpt` (the
    newest two and the best `keep_best`), and `{model}_best.ckpt` (weights only). Checkpoints that cannot be used are
    called `*.ckpt.damaged`.

    A run has an identity, made at random when it begins: it is in settings.json, in the lock and in every checkpoint.
    Files of another run are neither read nor written nor deleted.

    Attributes:
        run_id: the run's identity; None of one that an earlier version began.
    """

    def __init__(self, folder: Path, model: str, keep_best: int) -> None:
        self.folder, self.model, self.keep_best = folder, model, keep_best
        self.run_id: Optional[str] = None
        self.start = secrets.token_hex(4)  # this process's, where a host's name and a number do not tell it
        self.lock: Any = None
        self.signature = b""
        self.owners: dict[tuple, Any] = {}  # of files that were read or written
        self.pattern = re.compile(rf"{re.escape(model)}-(\d+)_(\d+)\.ckpt")
        # What `replacing` leaves when it is killed.
        others = rf"{re.escape(self.best_path.name)}|settings\.json|metrics\.csv|train\.log|curves\.png|val_files\.csv"
        self.unfinished = re.compile(rf"\.(?:{self.pattern.pattern}|{others})\.tmp\w*")

    @property
    def best_path(self) -> Path:
        return self.folder / f"{self.model}_best.ckpt"

    @property
    def val_files(self) -> Path:
        """The images that val_ratio keeps for validation, as a list that val_split takes."""
        return self.folder / "val_files.csv"

    def path(self, epoch: int, step: int) -> Path:
        """Where the checkpoint after so many finished epochs and steps lies."""
        return self.folder / f"{self.model}-{epoch}_{step}.ckpt"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps the folder for this process, and removes what a killed one left half-written.

        The system takes the lock back when a process ends, however it ends.

        Raises:
            RunError: the folder cannot be written, or another run is writing to it.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            # Without a buffer: nothing is left that closing it could fail to write.
            file = (self.folder / ".lock").open("a+b", buffering=0)
        with file:
            with writing(self.folder):
                self._lock(file)
                self.lock = file
                for path in self.folder.glob(".*.tmp*"):
                    if self.unfinished.fullmatch(path.name):
                        shutil.rmtree(path)
            yield
        self.lock = None

    def _lock(self, file: Any) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            self._sign(file)
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise RunError(
                f"Another run ({self._holder(file)}) is writing to {self.folder}; "
                f"wait for it to end, or choose another --ckpt_save_dir"
            ) from error
        except OSError as error:
            log.warning("%s cannot be locked (%s): mind that no other run writes there", self.folder, error.strerror)
        self._sign(file)

    @staticmethod
    def _holder(file: Any) -> str:
        text = file.read(200).decode(errors="replace")
        return "".join(c if c.isprintable() else "?" for c in text) or "unknown process"

    def _sign(self, file: Any) -> None:
        run = f", run {self.run_id}" if self.run_id else ""
        self.signature = f"process {os.getpid()} on {socket.gethostname()}{run}, start {self.start}".encode()
        file.truncate(0)
        file.write(self.signature)

    def begin(self, run_id: Optional[str], step: int) -> None:
        """Takes the folder for the run of this identity, from this step on.

        Later checkpoints cannot be used, and do not count as the newest: they are renamed, as is what is in the way of
        the best weights.
        """
        self._check_lock()
        self.run_id = run_id
        with writing(self.folder):
            self._sign(self.lock)
        for entry in self.saved():
            if entry.step > step:
                self._put_away(entry.path, "damaged")
        if self.best_path.exists():
            self._put_away(self.best_path)

    def _put_away(self, path: Path, reason: str = "") -> None:
        """Renames a checkpoint: for this reason, or because it is another run's or cannot be read."""
        try:
            reason = reason if self.owner(path) == self.run_id else "other_run"
        except WeightsError:
            reason = "damaged"
        if reason:
            log.warning("%s is not used, and is now called %s", path, set_aside(path, reason).name)

    def check_own(self) -> None:
        """Checks that this folder is still this run's, and no other process has taken it.

        Raises:
            RunError: it was removed, or another run was begun in it; nothing may be written there.
        """
        self._check_lock()
        try:
            settings = self.settings()
        except OSError as error:
            raise self._lost(f"settings.json: {error.strerror}") from error
        if not settings:
            raise self._lost("settings.json is gone or damaged")
        if settings.get("run_id") != self.run_id:
            raise self._lost(f"settings.json is of another run, {str(settings.get('run_id'))!r}")

    def _check_lock(self) -> None:
        try:
            with (self.folder / ".lock").open("rb") as file:
                if not os.path.samestat(os.fstat(self.lock.fileno()), os.fstat(file.fileno())):
                    raise self._lost("it was removed, and another run was begun")
                # Where files cannot be locked: the process that came last goes on.
                if file.read(len(self.signature)) != self.signature:
                    file.seek(0)
                    raise self._lost(f"taken by another start: {self._holder(file)}")
        except OSError as error:
            raise self._lost(f".lock: {error.strerror}") from error

    def _lost(self, reason: str) -> RunError:
        return RunError(
            f"{self.folder} no longer belongs to this run ({reason}). It ends, and writes nothing more there. If that "
            f"was not meant, choose another --ckpt_save_dir for one of the two."
        )

    def owner(self, path: Path) -> Optional[str]:
        """The identity of the run that wrote a checkpoint; None: an earlier version did, which gave none.

        Raises:
            WeightsError: the file cannot be read.
        """
        key = self._version(path)
        if key not in self.owners:
            try:
                record = read_file(path, checksum_required=True)[1]
                self.owners[key] = record.get("run_id") if isinstance(record, dict) else None
            except WeightsError as error:
                self.owners[key] = error
        if isinstance(self.owners[key], WeightsError):
            raise self.owners[key]
        return self.owners[key]

    @staticmethod
    def _version(path: Path) -> tuple:
        stat = path.stat()
        return path, stat.st_ino, stat.st_mtime_ns, stat.st_size

    @contextmanager
    def writing_checkpoint(self, path: Path) -> Iterator[Path]:
        """Within this block a checkpoint of this run is written to `path`.

        Raises:
            RunError: the folder, or the file that is there, is another run's.
        """
        self.check_own()
        if path.exists() and not self.owns(path):
            raise RunError(
                f"{path} is in the way: it is damaged, or another run's. Move it away; the same command goes on"
            )
        yield path
        self.owners[self._version(path)] = self.run_id

    def owns(self, path: Path) -> bool:
        """Whether a checkpoint can be read and is this run's."""
        try:
            return self.owner(path) == self.run_id
        except WeightsError:
            return False

    def settings(self) -> dict[str, Any]:
        """What the run in this folder was started with; empty when that is missing or damaged.

        Raises:
            OSError: it cannot be read.
        """
        path = self.folder / "settings.json"
        if not path.is_file() or path.stat().st_size > MAX_SETTINGS:
            return {}
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            return {}
        if not isinstance(settings, dict) or not isinstance(settings.get("run_id"), (str, type(None))):
            return {}
        return settings

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Records what the run is started with. A damaged record of it is kept under another name."""
        path = self.folder / "settings.json"
        if os.path.lexists(path) and not self.settings():
            log.warning("%s is damaged, and is now called %s", path, set_aside(path, "damaged").name)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    def saved(self) -> list[Saved]:
        """The folder's checkpoints, newest first.

        Raises:
            RunError: the folder cannot be listed, so that a run in it would be begun again.
        """
        try:
            names = os.listdir(self.folder)  # noqa: PTH208 - Path.glob says nothing where it may not read
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise RunError(
                f"{self.folder} cannot be listed: {error.strerror}. Mend its permissions, or choose another "
                f"--ckpt_save_dir"
            ) from error
        found = ((name, self.pattern.fullmatch(name)) for name in names)
        checkpoints = [Saved(self.folder / name, int(match[1]), int(match[2])) for name, match in found if match]
        return sorted(checkpoints, key=lambda saved: saved.step, reverse=True)

    def prune(self, scores: dict[int, float]) -> None:
        """Deletes the run's checkpoints but the newest two and the best `keep_best`; `scores`: top-1 by step."""
        self.check_own()
        saved = [entry for entry in self.saved() if self.owns(entry.path)]
        ranked = sorted((s for s in saved if s.step in scores), key=lambda s: (-scores[s.step], s.step))
        keep = {s.path for s in saved[:KEEP_NEWEST] + ranked[: self.keep_best]}
        for entry in saved:
            if entry.path not in keep:
                with writing(entry.path):
                    entry.path.unlink()
