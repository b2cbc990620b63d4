"""Whether the weights in several files belong to one network, so that they may be averaged."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..data.transforms import Preprocessing
from ..errors import few
from .loading import Weights


def unlike(first: Weights, other: Weights) -> list[str]:
    """What differs between two files' networks and what these expect, one line each.

    What a file does not say is left out. Compared: model, arguments, numbers of classes and channels, classes and their
    order, how images are prepared, and whether the weights are averages over a training (EMA) or as trained.
    """
    left, right = _identity(first), _identity(other)
    return [
        f"{name}: {_shown(left[name])} -> {_shown(right[name])}"
        for name in left
        if left[name] is not None and right[name] is not None and left[name] != right[name]
    ]


def _identity(weights: Weights) -> dict[str, Any]:
    record = weights.record
    return dict(
        model=weights.model,
        num_classes=weights.num_classes or "none: a backbone",
        in_channels=weights.in_channels,
        class_names=record.get("class_names"),
        **asdict(Preprocessing(**weights.preprocessing)),
        **weights.options,
        weights="averaged (EMA)" if record["source"]["averaged"] else "raw",
    )


def _shown(value: Any) -> str:
    return f"[{few(value, 5)}]" if isinstance(value, list) else str(value)
