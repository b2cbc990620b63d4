"""Configurations as plain values, and in what two of them differ."""

from __future__ import annotations

import dataclasses
import reprlib
from typing import Any

from .settings import Config


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings in which two configurations differ, one line each, `NAME: OLD -> NEW`."""
    keys = sorted(set(old) | set(new))
    return [_difference(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def _difference(name: str, old: Any, new: Any) -> str:
    said = reprlib.Repr()
    said.maxstring = said.maxother = 150
    said.maxlist = 10
    place = ""
    if isinstance(old, list) and isinstance(new, list) and max(len(old), len(new)) > said.maxlist:
        first = next((i for i, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
        place = f" (of {len(old)} and {len(new)}, from number {first + 1} on)"
        old, new = old[first:], new[first:]
    return f"{name}: {said.repr(old)} -> {said.repr(new)}{place}"


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain values (tuples become lists), for JSON and YAML."""
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()
    }
