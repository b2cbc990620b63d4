"""Weights from and to the authors' PyTorch state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import mindcv
import numpy as np

from ..errors import UserError
from ..models.factory import OUR_MODELS
from .names import FAMILIES, torch_key

WRAPPERS = ("state_dict", "state_dict_ema", "model")  # of published training checkpoints
IGNORED = "num_batches_tracked"  # PyTorch's counter of batches: no part of the function


class WeightsError(UserError, ValueError):
    """Weights that do not fit the network; the message lists the names and shapes."""


def listing(title: str, names: list[str], limit: int = 20) -> str:
    """`title` and at most `limit` names, one a line; an empty string when there are none."""
    if not names:
        return ""
    more = [f"... and {len(names) - limit} more"] if len(names) > limit else []
    return "\n  ".join([f"\n{title} ({len(names)}):", *names[:limit], *more])


@cache
def key_map(model_name: str) -> dict[str, str]:
    """MindSpore parameter name -> PyTorch key, for every parameter and statistic of the model."""
    if model_name not in OUR_MODELS:
        raise ValueError(f"{model_name!r} is not a model of mindska; known: {', '.join(sorted(OUR_MODELS))}")
    rules = FAMILIES[OUR_MODELS[model_name]]
    return {p.name: torch_key(p.name, rules) for p in mindcv.create_model(model_name).get_parameters()}


def unwrap(checkpoint: Mapping, use_ema: bool = False) -> dict:
    """The state dict inside a published checkpoint: `state_dict`, or `state_dict_ema` when `use_ema`, or itself.

    The prefix `module.` of data-parallel training is removed.
    """
    if use_ema:
        if "state_dict_ema" not in checkpoint:
            raise WeightsError(
                f"use_ema: no 'state_dict_ema' in this checkpoint; it has {sorted(map(str, checkpoint))}"
            )
        checkpoint = checkpoint["state_dict_ema"]
    else:
        wrapped = [name for name in WRAPPERS if isinstance(checkpoint.get(name), Mapping)]
        checkpoint = checkpoint[wrapped[0]] if wrapped else checkpoint
    return {str(key).removeprefix("module."): value for key, value in checkpoint.items()}


def from_torch(model_name: str, state_dict: Mapping, use_ema: bool = False) -> dict[str, np.ndarray]:
    """MindSpore parameters (name -> float32 array) of `model_name` from the authors' PyTorch weights.

    Args:
        model_name: a model of mindska, for example "skanet_s".
        state_dict: the authors' state dict (values: torch tensors or numpy arrays), or their checkpoint around it
            (`state_dict`, `state_dict_ema`, `model`; with or without the prefix `module.`).
        use_ema: take `state_dict_ema` instead of `state_dict`.

    Raises:
        WeightsError: keys are missing or unknown; the message lists them.
    """
    source = unwrap(state_dict, use_ema)
    mapping = key_map(model_name)
    wanted = set(mapping.values())
    missing = [key for key in mapping.values() if key not in source]
    unknown = [key for key in source if key not in wanted and not key.endswith(IGNORED)]
    if missing or unknown:
        raise WeightsError(
            f"These weights are not {model_name}'s."
            + listing("keys that are missing", missing)
            + listing("keys that are unknown", unknown)
        )
    return {name: np.asarray(source[key], dtype=np.float32) for name, key in mapping.items()}


def to_torch(model_name: str, parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The authors' state dict (key -> float32 array) from MindSpore parameters; the inverse of `from_torch`.

    Raises:
        WeightsError: parameters are missing; the message lists them.
    """
    mapping = key_map(model_name)
    missing = [name for name in mapping if name not in parameters]
    if missing:
        raise WeightsError(f"These parameters are not {model_name}'s." + listing("missing", missing))
    return {key: np.asarray(parameters[name], np.float32) for name, key in mapping.items()}
