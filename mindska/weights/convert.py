"""Weights from and to what others published: PyTorch state dicts, Caffe blobs."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Optional

import mindcv
import numpy as np
from mindcv.models.registry import get_pretrained_cfg
from mindspore import nn
from mindspore.nn.utils import no_init_parameters

from .. import kernels
from ..errors import WeightsError, few, formatted_list
from ..models.factory import OUR_MODELS
from .names import Dialect, dialects

# Of published training checkpoints: where the weights lie, and where their average (EMA) over the training.
log = logging.getLogger("mindska")

WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "net", "network")
AVERAGED = (
    "state_dict_ema",  # timm
    "model_ema",  # DeiT, ConvNeXt, torchvision's references
    "ema_state_dict",  # MMEngine; see `split`
    "model_ema_state_dict", "ema_model_state_dict", "state_dict_averaged", "averaged_state_dict",
    "ema_model", "ema", "ema_net", "averaged_model", "swa_state_dict", "swa_model",
)  # fmt: skip
INNER = ("state_dict", "module", "model", "shadow", "params")  # what may lie between such a name and the weights
PREFIXES = ("module.", "_orig_mod.")  # of data-parallel training, of torch.compile
COUNTERS = {"num_batches_tracked", "n_averaged", "steps", "total_ops", "total_params"}  # no part of the function
HEAD = "classifier."
EMA_PREFIX = "ema."  # MindCV's convention: averaged weights lie beside the raw ones under this prefix
STATE_PREFIX = "state."  # everything else that a training checkpoint of ours holds


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


def for_channels(weights: dict[str, np.ndarray], model_name: str, in_channels: int) -> dict[str, np.ndarray]:
    """Weights of a model of ours (name -> array) for images of 1 or 3 channels.

    From three channels to one, the first convolution's weights are summed over them, as timm does it. From one to
    three, they are repeated and divided by three. So the output for a grey image stays the same. The log says what
    changes. Weights of a model that is not ours are returned as they are.

    Raises:
        WeightsError: the weights take another number of channels than 1 or 3.
    """
    name = first_weight(model_name) if model_name in OUR_MODELS else ""
    if name not in weights or weights[name].shape[1] == in_channels:
        return weights
    first, found = weights[name], weights[name].shape[1]
    if (found, in_channels) == (3, 1):
        changed, how = first.sum(1, keepdims=True), "summed over them"
    elif (found, in_channels) == (1, 3):
        changed, how = np.repeat(first / 3, 3, 1), "repeated and divided by 3"
    else:
        raise WeightsError(f"The weights take {found} channels; expected 1 or 3 to adapt them to {in_channels}")
    log.info(
        "The weights take images of %d channels, the network of %d: the first convolution is %s",
        found,
        in_channels,
        how,
    )
    return {**weights, name: changed.astype(first.dtype)}


def key_map(model_name: str, dialect: Optional[Dialect] = None) -> dict[str, str]:
    """MindSpore parameter name -> name in files of a dialect, by default the one of PyTorch that we write."""
    names = parameter_shapes(model_name)
    dialect = dialect or dialects(model_name, "torch")[0]
    return {name: dialect.key(name) for name in names if not (dialect.backbone and name.startswith(HEAD))}


@dataclass(frozen=True)
class Choice:
    """The weights in a published checkpoint: those as trained, and their average (EMA), where it has either.

    Attributes:
        others: names under which there may be another average, of a kind that is not known.
    """

    raw: Optional[Mapping]
    averaged: Optional[Mapping]
    others: Sequence[str] = ()

    def take(self, ema: Optional[bool], what: str = "This checkpoint") -> tuple[Mapping, bool]:
        """The averaged weights where there are any, or, by `ema`, those (True) or the raw ones (False).

        Returns:
            The weights, and whether they are averaged.

        Raises:
            WeightsError: there are none of the kind that is asked for.
        """
        averaged = self.averaged is not None if ema is None else ema
        weights = self.averaged if averaged else self.raw
        if weights is not None:
            return weights, averaged
        if averaged:
            names, there = ", ".join(map(repr, AVERAGED[:3])), few(self.raw or ())
            raise WeightsError(f"{what} has no averaged (EMA) weights: no {names} or the like; it has {there}")
        raise WeightsError(f"{what} has averaged weights (EMA) only; take them: --use_ema, in Python ema=True")

    @property
    def both(self) -> bool:
        """Whether there is a choice at all."""
        return self.raw is not None and self.averaged is not None


def split(checkpoint: Mapping) -> Choice:
    """Finds the raw and the averaged weights in a published checkpoint, by their names in it (see `AVERAGED`)."""
    averaged = _first(checkpoint, AVERAGED)
    flat = any(is_array(value) and value.shape for value in checkpoint.values())
    raw = _first(checkpoint, WRAPPERS[:2] if flat else WRAPPERS)
    if raw is None and averaged is None:
        raw = checkpoint
    if "ema_state_dict" in checkpoint and "message_hub" in checkpoint and raw is not None and averaged is not None:
        raw, averaged = averaged, raw  # MMEngine swaps the two when it saves, so that its tests take the average
    raw, averaged = (None if weights is None else _without_prefixes(weights) for weights in (raw, averaged))
    if raw and averaged is None:  # MindCV's convention: they lie beside the raw ones
        inside = {name[len(EMA_PREFIX) :]: value for name, value in raw.items() if name.startswith(EMA_PREFIX)}
        if inside:
            rest = {name: value for name, value in raw.items() if not name.startswith(EMA_PREFIX)}
            return Choice(rest or None, inside)
    alike = [name for name in checkpoint if re.search("ema|averag|swa|shadow", str(name), re.IGNORECASE)]
    others = [str(n) for n in alike if n not in AVERAGED and _weights_in(checkpoint[n]) is not None]
    return Choice(raw, averaged, others)


def _first(checkpoint: Mapping, names: Sequence[str]) -> Optional[Mapping]:
    """The weights under the first of some names under which there are any."""
    found = (_weights_in(checkpoint[name]) for name in names if name in checkpoint)
    return next((weights for weights in found if weights is not None), None)


def _weights_in(value: Any, depth: int = 2) -> Optional[Mapping]:
    if not isinstance(value, Mapping):
        return None
    if any(is_array(entry) for entry in value.values()):
        return value
    inner = (_weights_in(value[name], depth - 1) for name in INNER if name in value and depth)
    return next((weights for weights in inner if weights is not None), None)


def _without_prefixes(weights: Mapping) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for key, value in weights.items():
        name = str(key)
        while prefix := next((p for p in PREFIXES if name.startswith(p)), ""):
            name = name[len(prefix) :]
        if name in named:
            raise WeightsError(f"There are two weights called {name}, with and without the prefix of a training tool")
        named[name] = value
    return named


def unwrap(checkpoint: Mapping, use_ema: Optional[bool] = None) -> Mapping:
    """The state dict in a published checkpoint, or itself (see `Choice.take`), without training tools' prefixes."""
    return split(checkpoint).take(use_ema)[0]


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


def from_torch(model_name: str, state_dict: Mapping, use_ema: Optional[bool] = None) -> dict[str, np.ndarray]:
    """MindSpore parameters (name -> float32 array) of `model_name` from PyTorch weights.

    Recognised by their names: the authors' (SkaNet, VAN, LSKA), timm's for the SK-ResNets, and mmsegmentation's for
    LSKA's backbone. The latter have no classifier: they fit a network made with `features_only`, and `norm_eps=1e-5`.

    Args:
        model_name: a model of mindska, for example "skanet_s".
        state_dict: the state dict (values: torch tensors or numpy arrays), or the authors' checkpoint around it
            (`state_dict`, `state_dict_ema`, `model`, `model_ema`, ...; with or without the prefix `module.`).
        use_ema: True for the averaged weights, False for the raw ones, None for the averaged where there are any.

    Raises:
        WeightsError: keys are missing or unknown, have other shapes, or no finite real values; the message lists them.
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
        raise WeightsError(f"These parameters are not {model_name}'s." + formatted_list("missing", missing))
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


def _without_counters(source: Mapping) -> dict[str, Any]:
    return {key: value for key, value in source.items() if key.rpartition(".")[2] not in COUNTERS}


def suggestion(model_name: str, source: Mapping, *frameworks: str) -> str:
    """Return ", but NAME's" where the weights fit a relative of the model (another kernel or size), else nothing."""
    relatives = [name for name, module in OUR_MODELS.items() if module == OUR_MODELS.get(model_name)]
    fitting = models_that_fit(source, *frameworks, among=relatives)
    return f", but {' or '.join(fitting)}'s" if fitting else ""


def models_that_fit(source: Mapping, *frameworks: str, among: Optional[Sequence[str]] = None) -> list[str]:
    """Our models whose names and shapes are exactly those of `source` (the number of classes left open)."""
    source = _without_counters(source)
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
        WeightsError: names are missing or unknown, have other shapes, or values that are no weights; the message lists
            them.
    """
    source = _without_counters(source)
    dialect = recognise(model_name, source, *frameworks)
    source = _shaped(model_name, source, dialect)
    missing, unknown, wrong = _differences(model_name, source, dialect)
    if missing or unknown or wrong:
        raise WeightsError(
            f"These weights are not {model_name}'s{suggestion(model_name, source, *frameworks)}."
            + formatted_list("keys that are missing", missing)
            + formatted_list("keys that are unknown", unknown)
            + formatted_list("keys of another shape", wrong)
        )
    keys = key_map(model_name, dialect).items()
    parameters = to_float32({name: source[key] for name, key in keys if key in source}, dict(keys))
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


def is_array(value: Any) -> bool:
    """Whether it is an array or a tensor; a hostile file may have anything under a known name, with any attributes."""
    plain = isinstance(value, (Mapping, argparse.Namespace))
    return isinstance(getattr(value, "shape", None), tuple) and not plain


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if is_array(value) else ()


def to_float32(weights: Mapping[str, Any], keys: Mapping[str, str] = MappingProxyType({})) -> dict[str, np.ndarray]:
    """Arrays, or PyTorch's tensors, as float32; `keys`: what a name is called in the file.

    Raises:
        WeightsError: values cannot be read as they are meant, or are NaN or infinite; the message lists the keys.
    """
    unfit = {keys.get(name, name): reason for name, value in weights.items() if (reason := value_problem(value))}
    if unfit:
        raise WeightsError(
            "These are no plain weights."
            + formatted_list("keys", [f"{key}: {reason}" for key, reason in unfit.items()])
        )
    with np.errstate(over="ignore"):
        arrays = {name: as_float32(value) for name, value in weights.items()}
    check_finite({keys.get(name, name): array for name, array in arrays.items()})
    return arrays


def check_finite(arrays: Mapping[str, np.ndarray]) -> None:
    """WeightsError when values of some arrays are NaN, or infinite in float32."""
    counts = {name: array.size - np.isfinite(array).sum() for name, array in arrays.items() if array.dtype.kind == "f"}
    bad = [f"{name}: {count:,} of {arrays[name].size:,}" for name, count in counts.items() if count]
    if bad:
        raise WeightsError(
            "Weights are NaN or infinite (in float32): the training that made them diverged, or the file is damaged; "
            "take an earlier checkpoint." + formatted_list("keys with such values", bad)
        )


def value_problem(value: Any) -> str:
    """Why an array or a tensor cannot be made float32 without a loss; empty when it can."""
    if not is_array(value):
        return f"{type(value).__name__}, no array"
    if hasattr(value, "untyped_storage") or hasattr(value, "layout"):  # PyTorch's, which need not be installed
        if value.device.type == "meta":
            return "on the device meta, which has a shape and no values; save the model after loading its weights"
        if str(value.layout) != "torch.strided" or value.is_quantized or getattr(value, "is_nested", False):
            return "sparse, quantised or nested; save it dense, in floating point"
        held = value.untyped_storage().nbytes()
        if value.numel() * value.element_size() > held:  # expanded: steps of 0
            return f"of {value.numel():,} values, but the file has {held:,} bytes of them; save it .contiguous()"
        kind = "c" if value.is_complex() else "f" if value.is_floating_point() else "i"
    else:
        value = np.asanyarray(value)
        kind = "f" if "float" in value.dtype.name else value.dtype.kind  # ml_dtypes' have a kind of their own
    if kind == "c":
        return "complex; a network has real weights, and to drop the imaginary part would change them"
    return "" if kind == "f" else f"of the type {str(value.dtype).removeprefix('torch.')}; expected floating point"


def as_float32(value: Any) -> np.ndarray:
    """An array, or a tensor of PyTorch's, as float32; numpy does not know PyTorch's bfloat16."""
    return np.asarray(value.detach().cpu().float() if hasattr(value, "detach") else value, dtype=np.float32)
