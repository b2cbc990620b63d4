"""Files of other frameworks: PyTorch's, read by its safe loader only, and Caffe's."""

from __future__ import annotations

import argparse
import math
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Union

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from .convert import WeightsError


def read_torch(path: Union[str, Path]) -> Mapping:
    """A PyTorch checkpoint, read by the safe loader only (tensors and plain containers; no code is run).

    Raises:
        WeightsError: PyTorch is not installed, or the file holds anything else.
    """
    try:
        import torch
    except ImportError as error:
        raise WeightsError(
            f"Reading {path} needs PyTorch (pip install torch), or convert the file elsewhere."
        ) from error
    try:
        _refuse_compressed(Path(path))
        # timm saves its command line, an argparse.Namespace, with the weights: a plain container as well.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as error:  # PyTorch's message would advise to switch the safe loader off
        raise WeightsError(
            f"{path} was not opened: it is damaged, no PyTorch file, or holds more than plain weights, and to run "
            f"code from a file is not safe. Save its state dict alone (torch.save(model.state_dict(), FILE))."
        ) from error
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path} holds a {type(loaded).__name__}; expected a state dict")
    return loaded


def _refuse_compressed(path: Path) -> None:
    """PyTorch stores its arrays uncompressed; a compressed archive may be a bomb that fills the memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size:
            raise WeightsError(
                f"{path} was not opened: it would unpack to {unpacked:,} bytes from {path.stat().st_size:,}, but "
                f"PyTorch's files are not compressed"
            )


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


# The part of Caffe's schema that weights need: message -> (field, number, type, whether it is repeated).
Field = descriptor_pb2.FieldDescriptorProto
CAFFE_SCHEMA = {
    "BlobShape": [("dim", 1, Field.TYPE_INT64, True)],
    "BlobProto": [
        ("num", 1, Field.TYPE_INT32, False),  # the four dimensions of old files
        ("channels", 2, Field.TYPE_INT32, False),
        ("height", 3, Field.TYPE_INT32, False),
        ("width", 4, Field.TYPE_INT32, False),
        # Packed floats and doubles are bytes to protobuf's wire format; as numbers they would pass through Python's.
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
}


@cache
def caffe_message(name: str) -> Any:
    """The protobuf class of a message of Caffe's, for example "NetParameter"."""
    file = descriptor_pb2.FileDescriptorProto(name="mindska_caffe.proto", package="mindska_caffe", syntax="proto2")
    for message, fields in CAFFE_SCHEMA.items():
        definition = file.message_type.add(name=message)
        for field, number, kind, repeated in fields:
            label = Field.LABEL_REPEATED if repeated else Field.LABEL_OPTIONAL
            entry = definition.field.add(name=field, number=number, label=label)
            if isinstance(kind, str):
                entry.type, entry.type_name = Field.TYPE_MESSAGE, f".mindska_caffe.{kind}"
            else:
                entry.type = kind
                entry.options.packed = repeated
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"mindska_caffe.{name}"))


def read_caffemodel(path: Union[str, Path]) -> dict[str, list[np.ndarray]]:
    """The layers of a binary `.caffemodel` that have blobs: layer name -> float32 arrays in the file's shapes.

    Raises:
        WeightsError: the file is damaged, no caffemodel, or of version 1.
    """
    try:
        net = caffe_message("NetParameter").FromString(Path(path).read_bytes())
    except DecodeError as error:
        raise WeightsError(f"{path} is damaged or no caffemodel: {error}") from error
    if net.layers:
        raise WeightsError(
            f"{path} is a caffemodel of version 1 ({len(net.layers)} layers in the field `layers`); Caffe's "
            f"upgrade_net_proto_binary makes the present version of it"
        )
    layers = {layer.name: [_blob(path, layer.name, blob) for blob in layer.blobs] for layer in net.layer if layer.blobs}
    if not layers:
        raise WeightsError(f"{path} is no caffemodel with weights: it has no layer with blobs")
    return layers


def _blob(path: Union[str, Path], layer: str, blob: Any) -> np.ndarray:
    content, dtype = (blob.double_data, np.dtype("<f8")) if blob.double_data else (blob.data, np.dtype("<f4"))
    shape = tuple(blob.shape.dim) if blob.HasField("shape") else (blob.num, blob.channels, blob.height, blob.width)
    if min(shape, default=1) < 0 or len(content) != dtype.itemsize * math.prod(shape):
        raise WeightsError(
            f"{path} is damaged: a blob of layer {layer} has the shape {shape} but {len(content):,} bytes of values"
        )
    return np.frombuffer(content, dtype).astype(np.float32).reshape(shape)
