"""The output folder of a run: its lock, its settings, its checkpoints."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..weights.files import replacing

log = logging.getLogger("mindska")

KEEP_NEWEST = 2  # so that a damaged newest file leaves one to fall back to


class RunError(UserError, RuntimeError):
    """A run that cannot start or go on; the message says what to do."""


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
    """

    def __init__(self, folder: Path, model: str, keep_best: int) -> None:
        self.folder, self.model, self.keep_best = folder, model, keep_best
        self.pattern = re.compile(rf"{re.escape(model)}-(\d+)_(\d+)\.ckpt")
        # What `replacing` leaves when it is killed.
        others = rf"{re.escape(self.best_path.name)}|settings\.json|metrics\.csv|train\.log|curves\.png"
        self.unfinished = re.compile(rf"\.(?:{self.pattern.pattern}|{others})\.tmp\w*")

    @property
    def best_path(self) -> Path:
        return self.folder / f"{self.model}_best.ckpt"

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
                for path in self.folder.glob(".*.tmp*"):
                    if self.unfinished.fullmatch(path.name):
                        shutil.rmtree(path)
            yield

    def _lock(self, file: Any) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise RunError(
                f"Another run ({file.read().decode() or 'unknown process'}) is writing to {self.folder}; "
                f"wait for it to end, or choose another --ckpt_save_dir"
            ) from error
        except OSError as error:
            log.warning("%s cannot be locked (%s): mind that no other run writes there", self.folder, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())

    def settings(self) -> dict[str, Any]:
        """What the run in this folder was started with; empty when there is none."""
        path = self.folder / "settings.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Records what the run is started with."""
        with replacing(self.folder / "settings.json") as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    def saved(self) -> list[Saved]:
        """The run's checkpoints, newest first."""
        found = ((path, self.pattern.fullmatch(path.name)) for path in self.folder.glob(f"{self.model}-*.ckpt"))
        checkpoints = [Saved(path, int(match[1]), int(match[2])) for path, match in found if match]
        return sorted(checkpoints, key=lambda saved: saved.step, reverse=True)

    def set_aside(self, after: int) -> None:
        """Renames the checkpoints after this step, from which the run goes on: they cannot be used, and do not count as
        the newest."""
        for entry in self.saved():
            if entry.step > after:
                with writing(entry.path):
                    entry.path.replace(f"{entry.path}.damaged")

    def prune(self, scores: dict[int, float]) -> None:
        """Deletes all checkpoints but the newest two and the best `keep_best`; `scores`: top-1 of evaluated steps."""
        saved = self.saved()
        ranked = sorted((s for s in saved if s.step in scores), key=lambda s: (-scores[s.step], s.step))
        keep = {s.path for s in saved[:KEEP_NEWEST] + ranked[: self.keep_best]}
        for entry in saved:
            if entry.path not in keep:
                with writing(entry.path):
                    entry.path.unlink()
