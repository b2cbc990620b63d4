"""Weights from and to what others published: PyTorch state dicts, Caffe blobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Optional

import mindcv
import numpy as np
from mindspore.nn.utils import no_init_parameters

from ..errors import UserError
from ..models.factory import OUR_MODELS
from .names import Dialect, dialects

WRAPPERS = ("state_dict", "state_dict_ema", "model")  # of published training checkpoints
IGNORED = "num_batches_tracked"  # PyTorch's counter of batches: no part of the function
HEAD = "classifier."


class WeightsError(UserError, ValueError):
    """Weights that do not fit the network; the message lists the names and shapes."""


def listing(title: str, names: list[str], limit: int = 20) -> str:
    """`title` and at most `limit` names, one a line; an empty string when there are none."""
    if not names:
        return ""
    more = [f"... and {len(names) - limit} more"] if len(names) > limit else []
    return "\n  ".join([f"\n{title} ({len(names)}):", *names[:limit], *more])


@cache
def parameter_shapes(model_name: str) -> dict[str, tuple[int, ...]]:
    """Parameters and statistics of a model of ours: name -> shape.

    Raises:
        ValueError: the model is unknown.
    """
    if model_name not in OUR_MODELS:
        raise ValueError(f"{model_name!r} is not a model of mindska; known: {', '.join(sorted(OUR_MODELS))}")
    with no_init_parameters():
        return {p.name: tuple(p.shape) for p in mindcv.create_model(model_name).get_parameters()}


def key_map(model_name: str, dialect: Optional[Dialect] = None) -> dict[str, str]:
    """MindSpore parameter name -> name in files of a dialect, by default the one of PyTorch that we write."""
    names = parameter_shapes(model_name)
    dialect = dialect or dialects(model_name, "torch")[0]
    return {name: dialect.key(name) for name in names if not (dialect.backbone and name.startswith(HEAD))}


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


def recognise(model_name: str, source: Mapping, framework: str) -> Dialect:
    """The dialect of the model in which the most names of `source` are found."""
    candidates = dialects(model_name, framework)
    if not candidates:
        parameter_shapes(model_name)  # an unknown model is an error of its own
        raise WeightsError(f"No {framework} weights of {model_name} are published by anyone")
    return max(candidates, key=lambda dialect: len(source.keys() & set(key_map(model_name, dialect).values())))


def from_torch(model_name: str, state_dict: Mapping, use_ema: bool = False) -> dict[str, np.ndarray]:
    """MindSpore parameters (name -> float32 array) of `model_name` from PyTorch weights.

    Recognised by their names: the authors' (SkaNet, VAN, LSKA), timm's for the SK-ResNets, and mmsegmentation's for
    LSKA's backbone. The latter have no classifier: they fit a network made with `features_only`, and `norm_eps=1e-5`.

    Args:
        model_name: a model of mindska, for example "skanet_s".
        state_dict: the state dict (values: torch tensors or numpy arrays), or the authors' checkpoint around it
            (`state_dict`, `state_dict_ema`, `model`; with or without the prefix `module.`).
        use_ema: take `state_dict_ema` instead of `state_dict`.

    Raises:
        WeightsError: keys are missing or unknown, or have other shapes; the message lists them.
    """
    source = unwrap(state_dict, use_ema)
    source = {key: value for key, value in source.items() if not key.endswith(IGNORED)}
    return _translate(model_name, source, "torch")


def from_caffe(model_name: str, layers: Mapping[str, Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
    """MindSpore parameters (name -> float32 array) of `sknet50` or `sknet101` from the authors' Caffe layers.

    The first convolution is turned from BGR to RGB: the network then takes what its preprocessing gives (RGB in 0..255
    less the means 123, 117, 104), and computes what Caffe does with the same pixels in BGR.

    Args:
        layers: layer name -> its blobs in order. Vectors may have Caffe's shape (1, C, 1, 1).

    Raises:
        WeightsError: layers are missing or unknown, or have other shapes; the message lists them.
    """
    source = {f"{layer}.{i}": np.asarray(blob) for layer, blobs in layers.items() for i, blob in enumerate(blobs)}
    # Caffe pads shapes with ones: (C,) is (1, C, 1, 1), and (out, in) was once (1, 1, out, in).
    shapes = parameter_shapes(model_name)
    for dialect in dialects(model_name, "caffe"):
        for name, key in key_map(model_name, dialect).items():
            if key in source and len(shapes[name]) < 4 and source[key].ndim == 4:
                blob = source[key]
                source[key] = blob.reshape(-1) if len(shapes[name]) == 1 else blob.reshape(blob.shape[-2:])
    parameters = _translate(model_name, source, "caffe")
    parameters["stem.conv.weight"] = np.ascontiguousarray(parameters["stem.conv.weight"][:, ::-1])
    return parameters


def to_torch(model_name: str, parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The authors' (of the SKNets: timm's) state dict, key -> float32 array, from MindSpore parameters.

    The inverse of `from_torch`.

    Raises:
        WeightsError: parameters are missing; the message lists them.
    """
    mapping = key_map(model_name)
    missing = [name for name in mapping if name not in parameters]
    if missing:
        raise WeightsError(f"These parameters are not {model_name}'s." + listing("missing", missing))
    return {key: np.asarray(parameters[name], np.float32) for name, key in mapping.items()}


def _differences(model_name: str, source: Mapping, dialect: Dialect) -> tuple[list[str], list[str], list[str]]:
    """Missing keys, unknown keys, and keys of another shape. A classifier may have any number of classes."""
    shapes, mapping = parameter_shapes(model_name), key_map(model_name, dialect)
    wanted = set(mapping.values())
    missing = [key for key in mapping.values() if key not in source]
    unknown = [key for key in source if key not in wanted]
    wrong = [
        f"{key}: {tuple(source[key].shape)} in the file, {shapes[name]} in the network"
        for name, key in mapping.items()
        if key in source and not name.startswith(HEAD) and tuple(source[key].shape) != shapes[name]
    ]
    return missing, unknown, wrong


def rather(model_name: str, source: Mapping, framework: str) -> str:
    """Return ", but NAME's" where the weights fit a relative of the model (another kernel or size), else nothing."""
    relatives = [name for name, module in OUR_MODELS.items() if module == OUR_MODELS.get(model_name)]
    fitting = models_that_fit(source, framework, relatives)
    return f", but {' or '.join(fitting)}'s" if fitting else ""


def models_that_fit(source: Mapping, framework: str, among: Optional[Sequence[str]] = None) -> list[str]:
    """Our models whose names and shapes are exactly those of `source` (the number of classes left open)."""
    return [
        name
        for name in (sorted(OUR_MODELS) if among is None else among)
        if any(not any(_differences(name, source, dialect)) for dialect in dialects(name, framework))
    ]


def _translate(model_name: str, source: Mapping, framework: str) -> dict[str, np.ndarray]:
    dialect = recognise(model_name, source, framework)
    missing, unknown, wrong = _differences(model_name, source, dialect)
    if missing or unknown or wrong:
        raise WeightsError(
            f"These weights are not {model_name}'s{rather(model_name, source, framework)}."
            + listing("keys that are missing", missing)
            + listing("keys that are unknown", unknown)
            + listing("keys of another shape", wrong)
        )
    return {name: np.asarray(source[key], dtype=np.float32) for name, key in key_map(model_name, dialect).items()}
