"""The networks in plain PyTorch, with their authors' state-dict keys: what the port is compared with, by tests
and benchmarks. Needs PyTorch (`pip install torch`)."""

from __future__ import annotations

from typing import Any, Union

import numpy as np

from . import detection, segmentation, skanet, sknet, van

__all__ = ["create", "detection", "rms", "segmentation", "skanet", "sknet", "van"]

Reference = Union[skanet.SkaNet, sknet.SKNet, van.VAN, segmentation.Segmenter, detection.Detector]


def create(model_name: str, **options: Any) -> Reference:
    """The reference of a model of mindska.

    Raises:
        KeyError: there is no such model.
        TypeError: the reference does not have an option.
    """
    for package in (segmentation, detection):
        for method in package.METHODS:
            if model_name.startswith(f"{method}_"):
                return package.create(method, model_name.removeprefix(f"{method}_"), **options)
    families = {"skanet": skanet, "van": van}
    return families.get(model_name.split("_")[0], sknet).create(model_name, **options)


def rms(actual: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square difference over the expected values' standard deviation."""
    expected = expected.astype(np.float64)
    return float(np.sqrt(np.mean((actual.astype(np.float64) - expected) ** 2)) / expected.std())
