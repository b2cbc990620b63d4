"""Files of other frameworks: PyTorch's, read by its safe loader only, and Caffe's."""

from __future__ import annotations

import argparse
import io
import math
import pickletools
import re
import tarfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Union

import numpy as np
from google.protobuf.message import DecodeError

from ..errors import WeightsError, few
from .files import read_bytes
from .protobuf import Field, check_fields, message_classes

# What PyTorch's safe loader would make of a size in a pickle alone, without a byte of content.
ALLOCATING = re.compile(
    r"(builtins|__builtin__) bytearray|torch(\.\w+)? \w*Tensor|torch\.storage (Typed|Untyped)Storage"
)
MOST_PICKLED = 32_000_000  # bytes of a pickle: names, shapes, settings
MOST_OPCODES = 3_000_000  # of a pickle; each may make an object
# What is refused, in PyTorch's message.
NOT_ALLOWED = re.compile(r"GLOBAL (\S+)(?: was not an allowed| whose module)|must be imported to load ([\w ]+)")
PROTOCOL = 2  # of pickles, torch.save's default: the only one that the safe loader reads whole


def read_torch(path: Union[str, Path]) -> Mapping:
    """A PyTorch checkpoint, read by the safe loader only (tensors and plain containers; no code is run).

    Raises:
        WeightsError: PyTorch is not installed, or the file holds anything else, or claims more than it holds.
    """
    try:
        import torch
    except ImportError as error:
        raise WeightsError(
            f"Reading {path} needs PyTorch (pip install torch), or convert the file elsewhere."
        ) from error
    path = Path(path)
    protocol = 0
    try:
        _refuse_compressed(path)
        protocol = _refuse_bombs(path)
        with torch.serialization.safe_globals(PLAIN), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on protocols and types that are refused or not used
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as error:  # PyTorch's message would advise to switch the safe loader off
        met = NOT_ALLOWED.search(str(error))
        reason = "it is damaged, no PyTorch file, or holds more than plain weights"
        if met:
            reason = f"it holds more than plain weights ({met[1] or met[2]})"
        elif protocol > PROTOCOL:
            reason = f"it was pickled with protocol {protocol}; expected torch.save's default, {PROTOCOL}"
        raise WeightsError(
            f"{path} was not opened: {reason}, and to run code from a file is not safe. Save its state dict alone "
            f"(torch.save(model.state_dict(), FILE))."
        ) from error
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path} holds a {type(loaded).__name__}; expected a state dict")
    return loaded


class _NumberType:
    """A NumPy type in a pickle: a stand-in for numpy.dtype, which would make types of any size."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[biufc](1|2|4|8|16)", code):
            raise ValueError("no type of a number")
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="


def _number(kind: _NumberType, content: bytes) -> Any:
    """A NumPy number in a pickle, as Python's: a stand-in for NumPy's function `scalar`."""
    dtype = np.dtype(kind.order + kind.code)
    if not isinstance(content, bytes) or len(content) != dtype.itemsize:
        raise ValueError("no number")
    return np.frombuffer(content, dtype)[0].item()


# Plain values that others save with weights: timm its command line; whoever measures with NumPy its numbers.
PLAIN: list[Any] = [
    argparse.Namespace,
    (_NumberType, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
]


def _refuse_compressed(path: Path) -> None:
    """PyTorch stores its arrays uncompressed; a compressed archive may be a bomb that fills the memory.

    An archive of another kind is named as what it is.
    """
    if _is_zip(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            names = archive.namelist()
        if any(re.fullmatch(r"[^/]+/(constants\.pkl|code/.*)", name) for name in names):
            raise WeightsError(
                f"{path} was not opened: it is a TorchScript archive, a program. Save its weights alone "
                f"(torch.save(torch.jit.load(FILE).state_dict(), NEW))."
            )
        if any(name.endswith(".npy") for name in names):
            raise WeightsError(f"{path} was not opened: it is an archive of NumPy arrays (.npz), no PyTorch file")
        if unpacked > path.stat().st_size:
            raise WeightsError(
                f"{path} was not opened: it would unpack to {unpacked:,} bytes from {path.stat().st_size:,}, but "
                f"PyTorch's files are not compressed"
            )


def _is_zip(path: Path) -> bool:
    """Whether PyTorch takes the file for a zip archive: by its beginning, whatever lies at its end."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _refuse_bombs(path: Path) -> int:
    """WeightsError when the pickles in a file make more than they hold: read, not run. Returns their protocol."""
    protocol = 0
    if _is_zip(path):
        with zipfile.ZipFile(path) as archive:
            pickles = [entry for entry in archive.infolist() if entry.filename.lower().endswith("pkl")]
            if sum(entry.file_size for entry in pickles) > MOST_PICKLED:
                _too_much(path)
            streams = [_Bounded(io.BytesIO(archive.read(entry)), entry.file_size) for entry in pickles]
    else:  # until version 1.5: five pickles, one behind the other, and then the arrays
        with path.open("rb") as file:
            if tarfile.is_tarfile(file):
                raise WeightsError(f"{path} was not opened: it is a tar archive, as PyTorch wrote until version 0.1")
        streams = [_Bounded(path.open("rb"), MOST_PICKLED)] * 5
    try:
        opcodes = 0
        for stream in streams:
            # The stubs ask for a whole file, but two methods do.
            for opcode, argument, _ in pickletools.genops(stream):  # type: ignore[arg-type]
                opcodes += 1
                if opcode.name == "PROTO":
                    protocol = max(protocol, int(argument or 0))
                if opcodes > MOST_OPCODES:
                    _too_much(path)
                if opcode.name == "GLOBAL" and (name := ALLOCATING.fullmatch(str(argument))):
                    raise WeightsError(
                        f"{path} was not opened: it holds more than plain weights ({name[0].replace(' ', '.')}). "
                        f"Save a state dict of plain tensors, in float32 or float16 (not in eight bits)."
                    )
    finally:
        for stream in streams:
            stream.file.close()
    return protocol


def _too_much(path: Path) -> NoReturn:
    raise WeightsError(
        f"{path} was not opened: it holds more than plain weights (its pickle has more than {MOST_PICKLED:,} bytes or "
        f"{MOST_OPCODES:,} operations)"
    )


class _Bounded:
    """What pickletools needs of a file, that never reads more than so many bytes, whatever a pickle claims."""

    def __init__(self, file: BinaryIO, left: int) -> None:
        self.file, self.left = file, left

    def read(self, size: int) -> bytes:
        content = self.file.read(max(0, min(size, self.left)))
        self.left -= len(content)
        return content

    def readline(self) -> bytes:
        content = self.file.readline(max(0, min(10_000, self.left)))
        self.left -= len(content)
        return content


def write_torch(path: Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes a plain state dict, as `torch.save(model.state_dict(), path)` does.

    Raises:
        WeightsError: PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise WeightsError(f"Writing {path} needs PyTorch (pip install torch)") from error
    torch.save({key: torch.from_numpy(np.array(value)) for key, value in state_dict.items()}, path)


# The part of Caffe's schema that weights need.
CAFFE = message_classes(
    "mindska_caffe",
    {
        "BlobShape": [("dim", 1, Field.TYPE_INT64, True)],
        "BlobProto": [
            ("num", 1, Field.TYPE_INT32, False),  # the four dimensions of old files
            ("channels", 2, Field.TYPE_INT32, False),
            ("height", 3, Field.TYPE_INT32, False),
            ("width", 4, Field.TYPE_INT32, False),
            # Packed numbers are bytes to protobuf's wire format; as numbers they would pass through Python's.
            ("data", 5, Field.TYPE_BYTES, False),
            ("shape", 7, "BlobShape", False),
            ("double_data", 8, Field.TYPE_BYTES, False),
        ],
        "LayerParameter": [
            ("name", 1, Field.TYPE_STRING, False),
            ("type", 2, Field.TYPE_STRING, False),
            ("blobs", 7, "BlobProto", True),
        ],
        "NetParameter": [
            ("name", 1, Field.TYPE_BYTES, False),
            ("layers", 2, Field.TYPE_BYTES, True),  # of version 1; only counted
            ("layer", 100, "LayerParameter", True),
        ],
    },
)
MOST_CAFFE_FIELDS = 100_000  # of the net, its layers and its blobs; SKNet-101 has some 15,000


def read_caffemodel(path: Union[str, Path]) -> dict[str, list[np.ndarray]]:
    """The layers of a binary `.caffemodel` that have blobs: layer name -> float32 arrays in the file's shapes.

    Raises:
        WeightsError: the file is damaged, no caffemodel, or of version 1.
    """
    try:
        content = read_bytes(Path(path))
        check_fields(content, CAFFE["NetParameter"], MOST_CAFFE_FIELDS)
        net = CAFFE["NetParameter"].FromString(content)
        names = [layer.name for layer in net.layer if layer.blobs]
    except (DecodeError, ValueError) as error:  # the latter of names that are no text as well
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path} is damaged or no caffemodel: {error}") from error
    if net.layers:
        raise WeightsError(
            f"{path} is a caffemodel of version 1 ({len(net.layers)} layers in the field `layers`); Caffe's "
            f"upgrade_net_proto_binary makes the present version of it"
        )
    if not names:
        raise WeightsError(f"{path} is no caffemodel with weights: it has no layer with blobs")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise WeightsError(f"{path} is damaged: several layers are called {few(twice)}")
    return {layer.name: [_blob(path, layer.name, blob) for blob in layer.blobs] for layer in net.layer if layer.blobs}


def _blob(path: Union[str, Path], layer: str, blob: Any) -> np.ndarray:
    content, dtype = (blob.double_data, np.dtype("<f8")) if blob.double_data else (blob.data, np.dtype("<f4"))
    shape = tuple(blob.shape.dim) if blob.HasField("shape") else (blob.num, blob.channels, blob.height, blob.width)
    if min(shape, default=1) < 0 or len(content) != dtype.itemsize * math.prod(shape):
        raise WeightsError(
            f"{path} is damaged: a blob of layer {layer} has the shape {shape} but {len(content):,} bytes of values"
        )
    return np.frombuffer(content, dtype).astype(np.float32).reshape(shape)
