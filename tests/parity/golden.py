"""The goldens: figures computed with the original networks, and the weights and inputs that belong to them."""

from __future__ import annotations

import json
import sys
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "goldens")]
from fill import fill, image

from mindska.reference import rms


@cache
def golden(case: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Description and arrays of a golden case."""
    with np.load(HERE / "goldens" / f"{case}.npz") as arrays:
        return json.loads((HERE / "goldens" / f"{case}.json").read_text()), dict(arrays)


@cache
def authors_keys(model: str) -> dict[str, tuple[int, ...]]:
    """The original's keys and shapes, in order, by the original's name of the model."""
    keys = json.loads((HERE / "goldens" / "keys.json").read_text())[model]
    return {key: tuple(shape) for key, shape in keys}


@lru_cache(maxsize=4)
def golden_weights(model: str, layer_scale_factor: float = 1.0) -> dict[str, torch.Tensor]:
    """The goldens' weights under the original's keys."""
    filled = {key: fill(key, shape) for key, shape in authors_keys(model).items()}
    for key in filled:
        if "layer_scale" in key:
            filled[key] = filled[key] * np.float32(layer_scale_factor)
    return {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in filled.items()}


def golden_input(case: str) -> np.ndarray:
    meta, _ = golden(case)
    return image(meta["image_seed"], meta["input"])


def case_differences(taps: dict[str, np.ndarray], case: str) -> dict[str, float]:
    """Difference of each tap from the golden's float64 values, `logits` included."""
    _, arrays = golden(case)
    differences = {"logits": rms(taps["logits"], arrays["logits_f64"])}
    for key in arrays:
        if key.endswith("/idx"):
            name = key[: -len("/idx")]
            differences[name] = rms(taps[name].reshape(-1)[arrays[key]], arrays[f"{name}/val_f64"])
    return differences
