"""Pictures by matplotlib, without a display; tables and facts beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SettingError, printable
from ..files import replacing

DPI = 120
MOST_NAMED = 40  # classes that are named along an axis
LONGEST = 24  # characters of a name in a picture


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches.

    Raises:
        SettingError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise SettingError("The pictures are drawn by matplotlib, which is missing: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def grid(rows: int, columns: int, side: float = 1.8, more: float = 0.3) -> tuple[Any, Any]:
    """A figure of small pictures, and its axes (rows, columns), without ticks; `more`: inches of a title."""
    figure = new_figure(max(3.0, columns * side), max(2.0, rows * (side + more)))
    axes = figure.subplots(rows, columns, squeeze=False)
    for each in axes.ravel():
        each.set_xticks([])
        each.set_yticks([])
    return figure, axes


def show_picture(axes: Any, picture: np.ndarray, **options: Any) -> None:
    """Shows a picture; the pixels of a small one stay squares, a large one is made smaller smoothly."""
    small = max(picture.shape[:2]) < 1.5 * DPI
    axes.imshow(picture, interpolation="nearest" if small else "auto", **options)


def save_figure(figure: Any, path: Path, dpi: int = DPI) -> None:
    """Writes a figure, in the format that the file's name ends with (png, pdf, svg).

    Raises:
        WriteError: the file cannot be written.
    """
    with replacing(path) as temporary:
        small = {"pil_kwargs": {"optimize": True}} if path.suffix == ".png" else {}
        figure.savefig(temporary, dpi=dpi, format=path.suffix[1:], **small)


def shown(name: str, longest: int = LONGEST) -> str:
    """A name as a picture has it: one line, without what would be read as a formula, shortened in its middle."""
    text = printable(name).replace("$", r"\$")
    return text if len(text) <= longest else f"{text[: longest // 2 - 1]}…{text[-(longest // 2 - 1) :]}"


def short_name(path: str) -> str:
    """What to call a file in a picture: its name, and the folder that it is in."""
    return "/".join(Path(path).parts[-2:])


def network_names(models: Sequence[str], paths: Sequence[str]) -> list[str]:
    """What to call networks in a picture: by their models, where these differ, else by their checkpoints as well."""
    if len(set(models)) == len(models):
        return list(models)
    return [f"{model} ({short_name(path) or 'initial weights'})" for model, path in zip(models, paths)]


def name_classes(axis: Any, names: Sequence[str], rotation: int = 0) -> None:
    """Names along an axis where they have room, else every so many-th number."""
    if len(names) <= MOST_NAMED:
        size = 9 if len(names) <= 20 else 6
        axis.set_ticks(range(len(names)), [shown(name, 18) for name in names], rotation=rotation, fontsize=size)
    else:
        step = 10 ** (len(str(len(names) - 1)) - 1)
        axis.set_ticks(range(0, len(names), step))


def write_json(path: Path, facts: dict[str, Any]) -> None:
    """Writes facts as JSON; what is not a number becomes null.

    Raises:
        WriteError: the file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_plain(facts), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
