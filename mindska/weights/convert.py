"""Weights from and to what others published: PyTorch state dicts, Caffe blobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Optional

import mindcv
import numpy as np
from mindcv.models.registry import get_pretrained_cfg
from mindspore import nn
from mindspore.nn.utils import no_init_parameters

from .. import kernels
from ..errors import UserError
from ..models.factory import OUR_MODELS
from .names import Dialect, dialects

WRAPPERS = ("state_dict", "model")  # of published training checkpoints
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
def _blank(model_name: str) -> nn.Cell:
    """A model of ours as it is made by default, without values."""
    if model_name not in OUR_MODELS:
        raise ValueError(f"{model_name!r} is not a model of mindska; known: {', '.join(sorted(OUR_MODELS))}")
    with no_init_parameters(), kernels.plain():  # the plain cells are made faster
        return mindcv.create_model(model_name)


def default_options(model_name: str) -> dict[str, Any]:
    """The arguments of `create_model` that weights depend on though no shape tells, and their defaults."""
    return _blank(model_name).options


@cache
def parameter_shapes(model_name: str) -> dict[str, tuple[int, ...]]:
    """Parameters and statistics of a model of ours: name -> shape.

    Raises:
        ValueError: the model is unknown.
    """
    return {p.name: tuple(p.shape) for p in _blank(model_name).get_parameters()}


def first_weight(model_name: str) -> str:
    """The parameter's name of the first convolution's weight."""
    return f"{get_pretrained_cfg(model_name)['first_conv']}.weight"


def key_map(model_name: str, dialect: Optional[Dialect] = None) -> dict[str, str]:
    """MindSpore parameter name -> name in files of a dialect, by default the one of PyTorch that we write."""
    names = parameter_shapes(model_name)
    dialect = dialect or dialects(model_name, "torch")[0]
    return {name: dialect.key(name) for name in names if not (dialect.backbone and name.startswith(HEAD))}


def unwrap(checkpoint: Mapping, use_ema: bool = False) -> dict:
    """The state dict in a published checkpoint: `state_dict` or `model`, `state_dict_ema` when `use_ema`, or itself.

    The prefix `module.` of data-parallel training is removed.
    """
    if use_ema:
        if not isinstance(checkpoint.get("state_dict_ema"), Mapping):
            raise WeightsError(
                f"use_ema: no 'state_dict_ema' in this checkpoint; it has {sorted(map(str, checkpoint))}"
            )
        checkpoint = checkpoint["state_dict_ema"]
    elif isinstance(checkpoint.get("state_dict_ema"), Mapping) and not any(name in checkpoint for name in WRAPPERS):
        raise WeightsError("There are averaged weights (state_dict_ema) only; take them: --use_ema, in Python ema=True")
    else:
        wrapped = [name for name in WRAPPERS if isinstance(checkpoint.get(name), Mapping)]
        checkpoint = checkpoint[wrapped[0]] if wrapped else checkpoint
    return {str(key).removeprefix("module."): value for key, value in checkpoint.items()}


def from_layers(layers: Mapping[str, Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
    """Caffe's layers (name -> blobs) as one mapping: layer name, a dot, number of the blob -> array."""
    return {f"{layer}.{i}": np.asarray(blob) for layer, blobs in layers.items() for i, blob in enumerate(blobs)}


def recognise(model_name: str, source: Mapping, *frameworks: str) -> Dialect:
    """The dialect of the model, among those of some frameworks, in which the most names of `source` are found.

    Raises:
        WeightsError: there is no such dialect.
    """
    parameter_shapes(model_name)  # an unknown model is an error of its own
    candidates = [dialect for framework in frameworks for dialect in dialects(model_name, framework)]
    if not candidates:
        raise WeightsError(f"No {' or '.join(frameworks)} weights of {model_name} are published by anyone")
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
    return translate(model_name, unwrap(state_dict, use_ema), "torch")[0]


def from_caffe(model_name: str, layers: Mapping[str, Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
    """MindSpore parameters (name -> float32 array) of `sknet50` or `sknet101` from the authors' Caffe layers.

    The first convolution is turned from BGR to RGB: the network then takes what its preprocessing gives (RGB in 0..255
    less the means 123, 117, 104), and computes what Caffe does with the same pixels in BGR.

    Args:
        layers: layer name -> its blobs in order. Vectors may have Caffe's shape (1, C, 1, 1).

    Raises:
        WeightsError: layers are missing or unknown, or have other shapes; the message lists them.
    """
    return translate(model_name, from_layers(layers), "caffe")[0]


def to_torch(model_name: str, parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The authors' (of the SKNets: timm's) state dict, key -> float32 array, from MindSpore parameters.

    The inverse of `from_torch`.

    Raises:
        WeightsError: parameters are missing; the message lists them.
    """
    mapping = key_map(model_name)
    if not any(name.startswith(HEAD) for name in parameters):  # a backbone's
        mapping = {name: key for name, key in mapping.items() if not name.startswith(HEAD)}
    missing = [name for name in mapping if name not in parameters]
    if missing:
        raise WeightsError(f"These parameters are not {model_name}'s." + listing("missing", missing))
    return {key: np.asarray(parameters[name], np.float32) for name, key in mapping.items()}


def _differences(model_name: str, source: Mapping, dialect: Dialect) -> tuple[list[str], list[str], list[str]]:
    """Missing keys, unknown keys, and keys of another shape. Numbers of classes and of input channels are left open."""
    shapes, mapping = parameter_shapes(model_name), key_map(model_name, dialect)
    wanted, first = set(mapping.values()), first_weight(model_name)

    def fits(name: str, found: tuple[int, ...]) -> bool:
        expected = shapes[name]
        if name.startswith(HEAD):
            return found[1:] == expected[1:] and len(found) == len(expected)
        return found == ((*expected[:1], *found[1:2], *expected[2:]) if name == first else expected)

    absent = [name for name, key in mapping.items() if key not in source]
    backbone = all(name.startswith(HEAD) for name in absent) and not any(
        key in source for name, key in mapping.items() if name.startswith(HEAD)
    )
    missing = [] if backbone else [mapping[name] for name in absent]
    unknown = [str(key) for key in source if key not in wanted]
    wrong = [
        f"{key}: {_shape(source[key])} in the file, {shapes[name]} in the network"
        for name, key in mapping.items()
        if key in source and not fits(name, _shape(source[key]))
    ]
    return missing, unknown, wrong


def rather(model_name: str, source: Mapping, *frameworks: str) -> str:
    """Return ", but NAME's" where the weights fit a relative of the model (another kernel or size), else nothing."""
    relatives = [name for name, module in OUR_MODELS.items() if module == OUR_MODELS.get(model_name)]
    fitting = models_that_fit(source, *frameworks, among=relatives)
    return f", but {' or '.join(fitting)}'s" if fitting else ""


def models_that_fit(source: Mapping, *frameworks: str, among: Optional[Sequence[str]] = None) -> list[str]:
    """Our models whose names and shapes are exactly those of `source` (the number of classes left open)."""
    source = {key: value for key, value in source.items() if not key.endswith(IGNORED)}
    return [
        name
        for name in (sorted(OUR_MODELS) if among is None else among)
        for dialect in [dialect for framework in frameworks for dialect in dialects(name, framework)]
        # Most models are told apart by one name, without making them all.
        if dialect.key(first_weight(name)) in source
        and not any(_differences(name, _shaped(name, source, dialect), dialect))
    ]


def translate(model_name: str, source: Mapping, *frameworks: str) -> tuple[dict[str, np.ndarray], Dialect]:
    """MindSpore parameters (name -> float32 array) of a model from weights under the names of some framework.

    Every weight of `source` is used and every parameter filled; weights without a classifier are a backbone's.

    Returns:
        The parameters, and the dialect in which the source names them.

    Raises:
        WeightsError: names are missing or unknown, or have other shapes; the message lists them.
    """
    source = {key: value for key, value in source.items() if not key.endswith(IGNORED)}
    dialect = recognise(model_name, source, *frameworks)
    source = _shaped(model_name, source, dialect)
    missing, unknown, wrong = _differences(model_name, source, dialect)
    if missing or unknown or wrong:
        raise WeightsError(
            f"These weights are not {model_name}'s{rather(model_name, source, *frameworks)}."
            + listing("keys that are missing", missing)
            + listing("keys that are unknown", unknown)
            + listing("keys of another shape", wrong)
        )
    keys = key_map(model_name, dialect).items()
    parameters = {name: as_float32(source[key]) for name, key in keys if key in source}
    if dialect.bgr:
        first = first_weight(model_name)
        parameters[first] = np.ascontiguousarray(parameters[first][:, ::-1])
    return parameters, dialect


def _shaped(model_name: str, source: Mapping, dialect: Dialect) -> Mapping:
    """The weights without the ones that pad shapes in Caffe: (1, C, 1, 1) is (C,), (1, 1, out, in) is (out, in)."""
    if dialect.framework != "caffe":
        return source
    shapes, shaped = parameter_shapes(model_name), dict(source)
    for name, key in key_map(model_name, dialect).items():
        if key in source and len(shapes[name]) < 4 and len(_shape(source[key])) == 4:
            blob = source[key]
            shaped[key] = blob.reshape(-1) if len(shapes[name]) == 1 else blob.reshape(blob.shape[-2:])
    return shaped


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))  # a hostile file may have anything under a known name


def as_float32(value: Any) -> np.ndarray:
    """An array, or a tensor of PyTorch's, as float32; numpy does not know PyTorch's bfloat16."""
    return np.asarray(value.float() if hasattr(value, "float") else value, dtype=np.float32)
