"""Our own weights files: MindSpore checkpoints and safetensors, read and written with their record."""

from __future__ import annotations

import binascii
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, Union

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor
from mindspore.train.checkpoint_pb2 import Checkpoint
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import WeightsError
from ..files import as_oserror, replacing
from .protobuf import check_fields
from .record import read_record

RECORD = "state.record"  # JSON: what the file is (model, preprocessing, classes, epoch, ...)
CHECKSUM = b"crc_num"  # what MindSpore writes before the ten bytes of a checkpoint's checksum, at its end
METADATA = "mindska"  # the record's name among a safetensors file's texts
MOST_BYTES = 2**31  # of a file; the largest training checkpoint of ours has less than one 2**30
MOST_HEADER = 10_000_000  # bytes of a safetensors file's header
TYPES = {  # MindSpore's name of a type -> numpy's
    "Float32": "<f4", "Float16": "<f2", "Float64": "<f8", "BFloat16": "<u2", "Bool": "?",
    "Int8": "i1", "Int16": "<i2", "Int32": "<i4", "Int64": "<i8",
    "UInt8": "u1", "UInt16": "<u2", "UInt32": "<u4", "UInt64": "<u8",
}  # fmt: skip


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


def read_bytes(path: Path) -> bytes:
    """The content of a file that is not larger than any file of weights.

    Raises:
        WeightsError: it is larger, or cannot be read.
    """
    size = path.stat().st_size
    if size > MOST_BYTES:  # a file with holes may claim more than the memory has
        raise WeightsError(f"{path} has {size:,} bytes; expected at most {MOST_BYTES:,}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error


def read_file(path: Union[str, Path], checksum_required: bool = False) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All arrays of a MindSpore checkpoint, and its record (empty when it was not written by mindska).

    Not by MindSpore's own reader, which believes the shapes that a file claims.

    Raises:
        WeightsError: the file is damaged, is no checkpoint, or lacks a checksum that is required.
    """
    path = Path(path)
    content = read_bytes(path)
    checked = content[-len(CHECKSUM) - 10 : -10] == CHECKSUM
    if checksum_required and not checked:
        raise WeightsError(f"{path} is damaged: its end, with the checksum, is missing")
    try:
        if checked:
            expected, content = int.from_bytes(content[-10:], "big"), content[: -len(CHECKSUM) - 10]
            if binascii.crc32(content) != expected:
                raise ValueError("its checksum is wrong")
        check_fields(content, Checkpoint)
        values = Checkpoint.FromString(content).value
        del content
        arrays, texts = _entries(values)
    except Exception as error:  # a hostile or damaged file may break protobuf anywhere
        raise WeightsError(
            f"{path} is not a readable MindSpore checkpoint: {str(error).partition(chr(10))[0][:300]}"
        ) from error
    record = with_path(path, read_record, texts.get(RECORD, "{}"))
    if record and not checked:
        raise WeightsError(f"{path} is damaged: its end, with the checksum, is missing")
    return arrays, record


def _entries(values: Sequence[Any]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the texts of a checkpoint; ValueError when an entry does not have the values that it claims."""
    arrays: dict[str, np.ndarray] = {}
    texts: dict[str, str] = {}
    parts: list[bytes] = []  # a large array lies in slices under one name
    for i, value in enumerate(values):
        name, tensor = value.tag, value.tensor
        parts.append(tensor.tensor_content)
        if i + 1 < len(values) and values[i + 1].tag == name:
            continue
        content, parts = b"".join(parts), []
        if name in arrays or name in texts:
            raise ValueError(f"{name!r} is in it twice")
        if tensor.tensor_type == "str":
            texts[name] = content.decode("utf-32-le").rstrip("\0")
            continue
        if tensor.tensor_type not in TYPES:
            raise ValueError(f"{name!r} has the type {tensor.tensor_type!r}; expected one of {', '.join(TYPES)}")
        dtype, shape = np.dtype(TYPES[tensor.tensor_type]), tuple(tensor.dims)
        if shape == (0,) and len(content) == dtype.itemsize:
            shape = ()  # MindSpore writes a number so
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(content):
            raise ValueError(f"{name!r} has the shape {shape} but {len(content):,} bytes of values")
        array = np.frombuffer(content, dtype)
        if tensor.tensor_type == "BFloat16":  # the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        arrays[name] = array.reshape(shape).copy()
    return arrays, texts


def with_path(path: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result; its WeightsError gets the path before it."""
    try:
        return function(*arguments)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None


def read_safetensors(path: Union[str, Path]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All arrays of a safetensors file, under its own names, and its record (empty when it is not ours).

    Raises:
        WeightsError: the file is damaged or no safetensors file.
    """
    path = Path(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > min(MOST_HEADER, path.stat().st_size):
        raise WeightsError(
            f"{path} is not a readable safetensors file: its header claims {length:,} bytes; expected at most "
            f"{min(MOST_HEADER, path.stat().st_size):,}"
        )
    try:
        with safe_open(str(path), framework="numpy") as file:
            text = (file.metadata() or {}).get(METADATA, "{}")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, AttributeError, OSError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {str(error)[:300]}") from error
    return arrays, with_path(path, read_record, text)
