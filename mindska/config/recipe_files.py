"""Recipes: plain YAML files with a setting a line. MindCV's own can be read, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional, Union

import yaml

from .. import mindcv_recipes, recipes
from ..arguments import nearest
from ..errors import ConfigError
from .settings import TYPES, converted

notes: list[str] = []  # what is to be logged of the recipe that was read last, when there is a log


def read_yaml(path: Union[str, Path], ignore_unknown: bool = False) -> dict[str, Any]:
    """Settings of a recipe, given by its path or its name, checked; only plain YAML is read. It may be MindCV's.

    Args:
        ignore_unknown: pass over MindCV's keys that have no meaning here, instead of failing.
    """
    notes.clear()
    try:
        path = recipes.find(path)
        if path.stat().st_size > 1_000_000:
            raise ConfigError(f"{path} has {path.stat().st_size:,} bytes; expected at most 1,000,000")
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > 10:
                raise ConfigError(f"{path} is not plain YAML: it is nested too deeply")
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"{path} is not plain YAML: it has aliases (*NAME), which may multiply without end")
        _refuse_twice(path, yaml.compose(text, yaml.SafeLoader))
        loaded = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError) as error:  # the latter of text that is no UTF-8, or a date that is none
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not plain YAML: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds a {type(loaded).__name__}; expected lines of `key: value`")
    if mindcv_recipes.is_mindcvs(loaded, TYPES):
        loaded = _read_mindcvs(path, loaded, ignore_unknown)
    if unknown := [key for key in loaded if key not in TYPES]:
        listed = ", ".join(f"{key!r}{nearest(str(key), TYPES)}" for key in unknown)
        raise ConfigError(f"{path}: unknown key{'s' if len(unknown) > 1 else ''} {listed}")
    loaded = {key: mindcv_recipes.value(key, value) for key, value in loaded.items()}
    return {key: converted(key, value, TYPES[key], str(path)) for key, value in loaded.items()}


def _read_mindcvs(path: Path, recipe: dict[str, Any], ignore_unknown: bool) -> dict[str, Any]:
    """A recipe of MindCV in our settings, and what there is to say of it in `notes`."""
    for name in ("lr", "warmup_factor", "epoch_size", "warmup_epochs", "decay_epochs"):
        if recipe.get(name) is not None and not mindcv_recipes.is_number(recipe[name]):
            raise ConfigError(f"{path}: {name} is {recipe[name]!r}; expected a number")
    recipe, without, said = mindcv_recipes.translated(recipe, TYPES)
    if without and not ignore_unknown:
        raise ConfigError(mindcv_recipes.without_meaning(path, without))
    said += [f"Passed over (--ignore_unknown): {', '.join(without)}"] if without else []
    notes.extend(f"{path} is a recipe of MindCV's. {line}" for line in said)
    return recipe


def _refuse_twice(path: Path, root: Optional[yaml.Node]) -> None:
    """ConfigError where a key stands twice: YAML's reader takes the last one without a word."""
    lines: dict[str, int] = {}
    for key, _ in root.value if isinstance(root, yaml.MappingNode) else ():
        line = key.start_mark.line + 1
        if str(key.value) in lines:
            raise ConfigError(
                f"{path} sets {key.value} twice, in lines {lines[key.value]} and {line}; keep one of them"
            )
        lines[str(key.value)] = line
