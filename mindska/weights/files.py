"""Our own weights files: MindSpore checkpoints and safetensors, read and written with their record."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Union

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import UserError
from .convert import WeightsError

EMA_PREFIX = "ema."  # MindCV's convention: averaged weights lie beside the raw ones under this prefix
STATE_PREFIX = "state."  # everything else that a training checkpoint holds
RECORD = "state.record"  # JSON: what the file is (model, preprocessing, classes, epoch, ...)
CHECKSUM = b"crc_num"  # what MindSpore writes before the ten bytes of a checkpoint's checksum, at its end
METADATA = "mindska"  # the record's name among a safetensors file's texts


class WriteError(UserError, OSError):
    """A file that cannot be written; what lay there before is intact."""


def sha256(path: Union[str, Path]) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file of the same name in a temporary folder beside `path`, which is moved to `path` when the block ends.

    So no reader ever sees half a file, and when the block fails nothing has changed.

    Raises:
        WriteError: it cannot be written.
    """
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.tmp"))
        temporary = folder / path.name
        yield temporary
        temporary.chmod(0o644)  # MindSpore makes it readable for its owner only
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise WriteError(
            f"{path} could not be written: {error}. What was there before is intact; make room or mend the folder, "
            f"and the same command goes on."
        ) from error
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def as_oserror(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds, in which a library hides that a file cannot be written, become OSErrors."""
    try:
        yield
    except kinds as error:
        raise OSError(str(error)) from error


def write_checkpoint(
    path: Path, parameters: Mapping[str, Union[Parameter, np.ndarray]], record: dict[str, Any]
) -> None:
    """Writes parameters and record to `path` as a MindSpore checkpoint with a checksum, whole or not at all.

    Raises:
        WriteError: it cannot be written.
    """
    entries = [
        {"name": name, "data": value if isinstance(value, Parameter) else Tensor(np.ascontiguousarray(value))}
        for name, value in parameters.items()
    ]
    with replacing(path) as temporary, as_oserror(RuntimeError, ValueError):
        ms.save_checkpoint(entries, str(temporary), append_dict={RECORD: json.dumps(record)}, crc_check=True)


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray], record: dict[str, Any]) -> None:
    """Writes arrays under our names, and the record among the file's metadata, whole or not at all.

    Raises:
        WriteError: it cannot be written.
    """
    with replacing(path) as temporary, as_oserror(SafetensorError):
        # The library takes an array's memory as it lies.
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save_file(contiguous, str(temporary), {"format": "np", METADATA: json.dumps(record)})


def read_file(path: Union[str, Path], checksum_required: bool = False) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All arrays of a MindSpore checkpoint, and its record (empty when it was not written by mindska).

    Raises:
        WeightsError: the file is damaged, is no checkpoint, or lacks a checksum that is required.
    """
    path = Path(path)
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(CHECKSUM) - 10))
        checked = file.read(len(CHECKSUM)) == CHECKSUM
    if checksum_required and not checked:
        raise WeightsError(f"{path} is damaged: its end, with the checksum, is missing")
    try:
        loaded = ms.load_checkpoint(str(path), crc_check=checked)
        # Strings and numbers (MindCV appends some) are no parameters.
        arrays = {name: value.asnumpy() for name, value in loaded.items() if isinstance(value, ms.Tensor)}
        record = json.loads(loaded.get(RECORD, "{}"))
    except Exception as error:  # a hostile or damaged file may break MindSpore's reader anywhere
        raise WeightsError(
            f"{path} is not a readable MindSpore checkpoint: {str(error).partition(chr(10))[0]}"
        ) from error
    if record and not checked:
        raise WeightsError(f"{path} is damaged: its end, with the checksum, is missing")
    return arrays, record


def read_safetensors(path: Union[str, Path]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All arrays of a safetensors file, under its own names, and its record (empty when it is not ours).

    Raises:
        WeightsError: the file is damaged or no safetensors file.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata.get(METADATA, "{}"))  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}") from error
