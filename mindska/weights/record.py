"""Records of files, as read: what strangers wrote is typed and bounded before anything is made of it.

A record is JSON: in a checkpoint the text `state.record`, in a safetensors file the metadata `mindska`, of an exported
model the file beside it or ONNX's metadata. Fields that are known have a type and a range here; others are kept as they
are, if they are small.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Callable, Optional, Union

from ..data.transforms import FILTERS, Preprocessing
from ..errors import WeightsError, printable

MOST_CLASSES = 1_000_000
MOST_PIXELS = 16_384  # of a side
MOST_BATCH = 65_536
MOST_CHANNELS = 4_096
LONGEST_NAME = 1_000  # of a class, a model, a file
LONGEST_TEXT = 100_000_000  # of a whole record; a million class names have room
DEEPEST = 20  # lists and mappings in one another

Check = Callable[[Any, str], Any]


def _refuse(field: str, value: Any, expected: str) -> WeightsError:
    shown = repr(value)[:80]
    return WeightsError(f"its record is damaged or not ours: {printable(field)} is {shown}; expected {expected}")


def _text(longest: int = LONGEST_NAME) -> Check:
    def check(value: Any, field: str) -> str:
        if not isinstance(value, str) or len(value) > longest:
            raise _refuse(field, value, f"a text of at most {longest:,} characters")
        return value

    return check


def _number(lowest: float, highest: float, above: bool = False, whole: bool = False) -> Check:
    def check(value: Any, field: str) -> Union[int, float]:
        kind = int if whole else (int, float)
        fits = isinstance(value, kind) and not isinstance(value, bool) and lowest <= value <= highest
        if not fits or (above and value == lowest):
            what = "a whole number" if whole else "a number"
            raise _refuse(field, value, f"{what} {'above' if above else 'from'} {lowest:,} to {highest:,}")
        return value

    return check


def _list(item: Check, shortest: int, longest: int) -> Check:
    def check(value: Any, field: str) -> list:
        if not isinstance(value, (list, tuple)) or not shortest <= len(value) <= longest:
            length = f"{shortest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"
            raise _refuse(field, value, f"a list of {length} entries")
        return [item(entry, f"{field}[{i}]") for i, entry in enumerate(value)]

    return check


def _mapping(required: Mapping[str, Check], optional: Optional[Mapping[str, Check]] = None, more: bool = True) -> Check:
    """`more`: other keys may stand there as well."""

    def check(value: Any, field: str) -> dict:
        if not isinstance(value, Mapping):
            raise _refuse(field, value, "a mapping")
        known = {**required, **(optional or {})}
        missing = [name for name in required if name not in value]
        if missing:
            raise _refuse(field, value, f"the key {missing[0]!r} in it")
        strange = [name for name in value if name not in known]
        if strange and not more:
            raise _refuse(f"{field}.{strange[0]}"[:80], value[strange[0]], f"the keys {', '.join(known)} only")
        return {
            name: known[name](entry, f"{field}.{name}") if name in known else entry for name, entry in value.items()
        }

    return check


def _or_none(check: Check) -> Check:
    return lambda value, field: None if value is None else check(value, field)


def _choice(*choices: str) -> Check:
    def check(value: Any, field: str) -> str:
        if not isinstance(value, str) or value not in choices:
            raise _refuse(field, value, f"one of {', '.join(choices)}")
        return value

    return check


def _flag(value: Any, field: str) -> bool:
    if not isinstance(value, bool):
        raise _refuse(field, value, "true or false")
    return value


def _option(value: Any, field: str) -> Any:
    """The value of an argument of a network: a text, a number, true or false."""
    if isinstance(value, (bool, str)):
        return value if isinstance(value, bool) else _text()(value, field)
    return _number(-1e9, 1e9)(value, field)


def _options(value: Any, field: str) -> dict[str, Any]:
    return {
        _text(100)(name, field): _option(entry, f"{field}.{name}") for name, entry in _mapping({})(value, field).items()
    }


def _source(value: Any, field: str) -> dict[str, Any]:
    return _mapping(
        {}, dict(file=_text(), sha256=_text(64), kind=_text(), names=_text(), averaged=_flag, source=_source)
    )(value, field)


def _shape(value: Any, field: str) -> list[Optional[int]]:
    """(B, C, H, W) of the images that an exported model takes; None (null) where it takes any."""
    sizes = _list(_or_none(_number(1, math.inf, whole=True)), 4, 4)(value, field)
    names = (f"{field}[{i}], the {what}" for i, what in enumerate(("batch", "channels", "height", "width")))
    checks = [_number(1, most, whole=True) for most in (MOST_BATCH, MOST_CHANNELS, MOST_PIXELS, MOST_PIXELS)]
    return [
        (check if i == 1 else _or_none(check))(sizes[i], name) for i, (check, name) in enumerate(zip(checks, names))
    ]


_PIXELS: dict[str, Check] = dict(
    image_size=_list(_number(1, MOST_PIXELS, whole=True), 2, 2),
    crop_pct=_number(0, 1, above=True),
    interpolation=_choice(*FILTERS),
    mean=_list(_number(-1000, 1000), 1, MOST_CHANNELS),
    std=_list(_number(0, 1000, above=True), 1, MOST_CHANNELS),
)
PREPROCESSING = _mapping(_PIXELS, {f.name: _option for f in fields(Preprocessing) if f.name not in _PIXELS}, more=False)
FIELDS: dict[str, Check] = dict(
    model=_text(100),
    num_classes=_or_none(_number(1, MOST_CLASSES, whole=True)),
    class_names=_or_none(_list(_text(), 1, MOST_CLASSES)),
    preprocessing=PREPROCESSING,
    network=_options,
    source=_source,
    mean_of=_list(_source, 1, 10_000),
    epoch=_number(0, 1e9),
    metric=_number(-1e9, 1e9),
    top1=_number(0, 100),
    weights=_choice("averaged", "raw"),  # of a run's best checkpoint: which of them scored higher
    run_id=_or_none(_text(100)),
    environment=_or_none(_mapping({})),
    train_set=_or_none(_mapping({})),
    validation=_or_none(_mapping({})),
    config=_mapping({}),
    progress=_mapping({}),
    world_size=_number(1, 1_000_000, whole=True),
    input_shape=_shape,
    inputs=_list(_text(), 1, 1),
    outputs=_list(_text(), 1, 100),
    folded=_flag,
    half=_flag,
)
EXPORTED = ("model", "num_classes", "preprocessing", "input_shape")  # what predicting with an exported model needs


def read_record(text: Union[str, bytes], required: tuple[str, ...] = ()) -> dict[str, Any]:
    """The record in a JSON text, its known fields typed and bounded; `required`: those that must be there.

    Raises:
        WeightsError: it is not such a record; the message names the field, not the file.
    """
    if len(text) > LONGEST_TEXT:
        raise WeightsError(f"its record has {len(text):,} bytes; expected at most {LONGEST_TEXT:,}")
    try:
        loaded = json.loads(text)
    except RecursionError:
        raise WeightsError(f"its record is nested too deeply; expected at most {DEEPEST} levels") from None
    except (ValueError, UnicodeDecodeError, MemoryError) as error:
        raise WeightsError(f"its record is no JSON: {str(error)[:200]}") from None
    return checked_record(loaded, required)


def checked_record(loaded: Any, required: tuple[str, ...] = ()) -> dict[str, Any]:
    """A record whose known fields are typed and bounded (see `read_record`).

    Raises:
        WeightsError: it is not such a record.
    """
    _bounded(loaded)
    if not isinstance(loaded, Mapping):
        raise _refuse("the record", loaded, "a mapping")
    missing = [name for name in required if name not in loaded]
    if missing:
        raise WeightsError(f"its record lacks {', '.join(missing)}")
    record = {name: FIELDS[name](value, name) if name in FIELDS else value for name, value in loaded.items()}
    names, number = record.get("class_names"), record.get("num_classes")
    if names is not None and number is not None and len(names) > number:
        raise WeightsError(f"its record has {len(names)} class_names for num_classes {number}")
    pixels = record.get("preprocessing")
    if pixels and len(pixels["mean"]) != len(pixels["std"]):
        raise WeightsError(f"its record has {len(pixels['mean'])} means and {len(pixels['std'])} standard deviations")
    return record


def _bounded(value: Any) -> None:
    """WeightsError when lists and mappings lie too deep in one another."""
    level = [value]
    for _ in range(DEEPEST):
        containers = (entry for entry in level if isinstance(entry, (dict, list, tuple)))
        level = [item for entry in containers for item in (entry.values() if isinstance(entry, dict) else entry)]
    if level:
        raise WeightsError(f"its record is nested too deeply; expected at most {DEEPEST} levels")
