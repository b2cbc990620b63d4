"""Protobuf messages of strangers: schemas without generated code, and a bound on how much a file unpacks to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Union

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

Field = descriptor_pb2.FieldDescriptorProto
# message -> (field, number, type or name of a message, whether it is repeated)
Schema = Mapping[str, Sequence[tuple[str, int, Union[int, str], bool]]]
MOST_FIELDS = 1_000_000  # in a file: a message may take a hundred times as many bytes of memory as of the file
DEEPEST = 32  # messages in one another


def message_classes(package: str, schema: Schema) -> dict[str, Any]:
    """The protobuf classes of a schema's messages. Fields that it does not name are kept aside by protobuf, unread."""
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto2")
    for message, fields in schema.items():
        definition = file.message_type.add(name=message)
        for field, number, kind, repeated in fields:
            label = Field.LABEL_REPEATED if repeated else Field.LABEL_OPTIONAL
            entry = definition.field.add(name=field, number=number, label=label)
            if isinstance(kind, str):
                entry.type, entry.type_name = Field.TYPE_MESSAGE, f".{package}.{kind}"
            else:
                entry.type = kind
                entry.options.packed = repeated and kind not in (Field.TYPE_BYTES, Field.TYPE_STRING)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}")) for name in schema}


def check_fields(data: bytes, message: Any, most: int = MOST_FIELDS) -> None:
    """ValueError when a serialised message is no protobuf, or has more than `most` fields or `DEEPEST` levels.

    Reads the wire format only: nothing is made of what it finds.
    """
    fields_of: dict[str, dict[int, Any]] = {}
    count, waiting = 0, [(0, len(data), message.DESCRIPTOR, 0)]

    def varint(position: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while position < end and shift < 70:
            byte = data[position]
            value, position, shift = value | (byte & 127) << shift, position + 1, shift + 7
            if byte < 128:
                return value, position
        raise ValueError("it is cut or damaged")

    while waiting:
        position, end, descriptor, depth = waiting.pop()
        inner = fields_of.setdefault(
            descriptor.full_name, {f.number: f.message_type for f in descriptor.fields if f.message_type}
        )
        while position < end:
            key, position = varint(position, end)
            count += 1
            if count > most:
                raise ValueError(f"it has more than {most:,} fields")
            wire = key & 7
            if wire == 0:
                _, position = varint(position, end)
            elif wire in (1, 5):
                position += 8 if wire == 1 else 4
            elif wire == 2:
                length, position = varint(position, end)
                if key >> 3 in inner:
                    if depth == DEEPEST:
                        raise ValueError(f"it has more than {DEEPEST} levels")
                    waiting.append((position, min(end, position + length), inner[key >> 3], depth + 1))
                position += length
            else:
                raise ValueError("it is cut or damaged")
            if position > end:
                raise ValueError("it is cut or damaged")
