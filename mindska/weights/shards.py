"""Weights in several files with an index, as Hugging Face's tools write them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable

from ..errors import WeightsError, few
from .files import MOST_BYTES, read_bytes

SUFFIXES = (".safetensors.index.json", ".bin.index.json")  # of an index's name; the first is taken where both are
MOST_INDEX = 10_000_000  # bytes
MOST_SHARDS = 1_000
LONGEST_NAME = 200  # of a file


def index_in(folder: Path) -> list[Path]:
    """The indices in a folder, of the kind that is preferred."""
    found = ([path for path in sorted(folder.iterdir()) if path.name.endswith(suffix)] for suffix in SUFFIXES)
    return next((paths for paths in found if paths), [])


def read_index(index: Path) -> dict[str, list[str]]:
    """Which weights lie in which shard: name of a file beside the index -> names of its weights.

    Raises:
        WeightsError: it is no index, shards are missing, or lie outside of its folder.
    """
    if index.stat().st_size > MOST_INDEX:
        raise WeightsError(f"{index} has {index.stat().st_size:,} bytes; expected an index of at most {MOST_INDEX:,}")
    try:
        content = json.loads(read_bytes(index))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{index} is no readable JSON: {str(error)[:200]}") from None
    files = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(files, Mapping) or not files or not all(isinstance(name, str) for name in files.values()):
        raise WeightsError(
            f"{index} is JSON, but no index of weights in several files: expected a mapping `weight_map` from names of "
            f"weights to names of files"
        )
    shards: dict[str, list[str]] = defaultdict(list)
    for weight, name in files.items():
        shards[name].append(weight)
    if len(shards) > MOST_SHARDS:
        raise WeightsError(f"{index} names {len(shards):,} files; expected at most {MOST_SHARDS:,}")
    outside = [n for n in shards if n in ("", ".", "..") or len(n) > LONGEST_NAME or set(n) & {"/", "\\", ":", "\0"}]
    if outside:
        raise WeightsError(f"{index} names files outside of its folder ({few(outside)}); expected plain file names")
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise WeightsError(
            f"{len(missing)} of the {len(shards)} files that {index} names are missing: {few(sorted(missing))}; "
            f"expected all of them beside it"
        )
    size = sum((index.parent / name).stat().st_size for name in shards)
    if size > MOST_BYTES:
        raise WeightsError(f"The files that {index} names have {size:,} bytes; expected at most {MOST_BYTES:,}")
    return dict(shards)


def read_shards(index: Path, shards: Mapping[str, list[str]], read: Callable[[Path], Mapping]) -> dict[str, Any]:
    """The weights in all shards of an index, each read by `read`.

    Raises:
        WeightsError: a shard does not hold just what the index says.
    """
    arrays: dict[str, Any] = {}
    for name, expected in shards.items():
        found = read(index.parent / name)
        missing, unknown = [key for key in expected if key not in found], sorted(map(str, found.keys() - set(expected)))
        if missing or unknown:
            raise WeightsError(
                f"{index.parent / name} is not the file that {index.name} describes: "
                + "; ".join(
                    [f"it lacks {few(missing, 3)}"] * bool(missing) + [f"it also has {few(unknown, 3)}"] * bool(unknown)
                )
            )
        arrays.update(found)
    return arrays
