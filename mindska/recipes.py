"""The recipes that travel in the package: configs/ of a clone, mindska/configs of an installed wheel."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple, Union

from .arguments import nearest
from .errors import ConfigError

PACKAGE = Path(__file__).parent


class Recipe(NamedTuple):
    """A recipe: its name, its file, the model that it trains, and the first line of its head comment."""

    name: str
    path: Path
    model: str
    title: str


def folder() -> Path:
    """Where the recipes are."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def recipes() -> list[Recipe]:
    """All recipes, by name."""
    found = []
    for path in sorted(folder().glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        title = re.match(r"#\s*(.*)", text)
        model = re.search(r"^model:\s*([\w.-]+)", text, re.MULTILINE)
        found.append(Recipe(path.stem, path, model[1] if model else "", title[1].strip() if title else ""))
    return found


def find(name: Union[str, Path]) -> Path:
    """The file of a recipe: the path itself where there is such a file, else the package's recipe of this name.

    A name may have `.yaml` at its end and `configs/` at its beginning.

    Raises:
        ConfigError: there is neither.
        OSError: the system does not let us look.
    """
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - see files.user_path
    if path.is_file():
        return path
    ours = {entry.stem: entry for entry in sorted(folder().glob("*.yaml"))}
    if str(path.parent) in (".", "configs") and path.suffix in ("", ".yaml", ".yml") and path.stem in ours:
        return ours[path.stem]
    meant = nearest(path.stem, ours, "{}")
    if not meant and path.parent == Path():
        meant = "; `mindska recipes` lists them"
    raise ConfigError(f"No configuration file at {path.absolute()}, and no recipe is called {path.stem!r}{meant}")
