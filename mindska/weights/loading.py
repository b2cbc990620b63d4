"""Weights from a file into a network, strictly: a file that is missing or does not fit is an error that says why."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional, Union

import mindcv
import mindspore as ms
import numpy as np
from mindspore import nn
from mindspore.nn.utils import no_init_parameters

from ..data.transforms import Preprocessing
from ..errors import SettingError, few, listing, printable
from ..models.factory import OUR_MODELS, own_preprocessing
from .convert import (
    HEAD,
    WeightsError,
    check_finite,
    default_options,
    first_weight,
    models_that_fit,
    rather,
    recognise,
    translate,
)
from .files import sha256, with_path
from .names import Dialect
from .source import Source, open_source

log = logging.getLogger("mindska")

KEPT = ("class_names", "epoch", "metric", "top1")  # of a file's record, in the record of a file made from it


@dataclass(frozen=True)
class Weights:
    """Weights under our names, with all that is known of them.

    Attributes:
        parameters: name -> float32 array.
        dialect: who named them in the file.
    """

    model: str
    parameters: dict[str, np.ndarray]
    source: Source
    dialect: Dialect

    @property
    def num_classes(self) -> Optional[int]:
        """Number of classes; None of a backbone, which has no classifier."""
        bias = self.parameters.get(f"{HEAD}bias")
        return None if bias is None else len(bias)

    @property
    def in_channels(self) -> int:
        """Number of the image's channels."""
        return self.parameters[first_weight(self.model)].shape[1]

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `create_model` that the weights need and no shape tells."""
        default = default_options(self.model)
        return {**default, **self.dialect.network, **self.source.record.get("network", {})}

    @property
    def unusual(self) -> dict[str, Any]:
        """The options that are not the model's defaults."""
        return unusual_options(self.model, self.options)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What the weights expect of an image: the arguments of `mindska.data.Preprocessing`, for their channels.

        Raises:
            WeightsError: they are of other channels than 1 (grey) or 3 (RGB).
        """
        recorded = self.source.record.get("preprocessing")
        known = recorded or {**own_preprocessing(self.model), **self.dialect.preprocessing}
        try:
            return asdict(Preprocessing(**known).for_channels(self.in_channels))
        except SettingError as error:
            raise WeightsError(f"{self.source.path}: {error}") from None

    def description(self) -> dict[str, Any]:
        """The record's part on the network: model, classes, pixels, options."""
        known = dict(model=self.model, num_classes=self.num_classes, preprocessing=self.preprocessing)
        return dict(known, network=self.unusual) if self.unusual else known

    def record(self) -> dict[str, Any]:
        """What a file with these weights should say of itself."""
        origin = self.source
        record = {name: origin.record[name] for name in KEPT if name in origin.record}
        record.update(self.description())
        record["source"] = dict(
            file=origin.path.name,
            sha256=sha256(origin.path),
            kind=origin.kind,
            names=self.dialect.name,
            averaged=origin.averaged or origin.record.get("source", {}).get("averaged", False),
        )
        if "source" in origin.record:  # it was made from another file itself
            record["source"]["source"] = origin.record["source"]
        return record

    def network(self) -> nn.Cell:
        """The network with these weights, for inference; of a backbone, the one that returns its features."""
        keywords = dict(self.unusual, features_only=self.num_classes is None)
        with no_init_parameters():
            net = mindcv.create_model(self.model, self.num_classes or 1000, in_channels=self.in_channels, **keywords)
        load_into(getattr(net, "net", net), self.parameters, str(self.source.path))
        return net.set_train(False)


def unusual_options(model_name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a network's options (see `Backbone.options`) that are not the defaults of its model."""
    return {name: value for name, value in options.items() if value != default_options(model_name)[name]}


def open_weights(path: Union[str, Path], model_name: str = "", ema: Optional[bool] = None) -> Weights:
    """The weights of one of our models in a file of any kind that we read (see `open_source`).

    Args:
        model_name: the model; empty: the one that the file names, or the only one that it fits.
        ema: True for the averaged weights (an error when there are none), False for the raw ones, None for the averaged
            where the file has them.

    Raises:
        MissingWeights, WeightsError: the file does not fit the model; the message says whose it is where that is known.
    """
    weights = _translated(open_source(path, ema), model_name)
    if ema is None:
        say(weights.source, logging.WARNING)
    return weights


def say(source: Source, level: int) -> None:
    """One line in the log where a file has averaged and raw weights: which are taken."""
    if source.choice:
        log.log(level, "%s", printable(source.choice))


def describe(path: Union[str, Path], model_name: str = "", ema: Optional[bool] = None) -> dict[str, Any]:
    """The record of a file of weights: its own, else what its content tells (see `Weights.record`).

    Args:
        model_name: the model, where it is known; of a model that is not ours only the file's own record is returned.
        ema: see `open_weights`.

    Raises:
        MissingWeights, WeightsError.
    """
    source = open_source(path, ema)
    if (model_name or source.record.get("model")) not in (None, "", *OUR_MODELS):
        return source.record
    weights = _translated(source, model_name)
    return {**source.record, **weights.description()}


def _translated(source: Source, model_name: str) -> Weights:
    path, recorded = source.path, source.record.get("model", "")
    if model_name and recorded and model_name != recorded:
        raise WeightsError(f"{path} does not fit {model_name}: it holds {recorded}")
    model_name = model_name or recorded or _only_model(source)
    if model_name not in OUR_MODELS:
        raise WeightsError(f"{path}: {model_name!r} is not a model of mindska; known: {', '.join(sorted(OUR_MODELS))}")
    try:
        parameters, dialect = translate(model_name, source.arrays, *source.frameworks)
    except WeightsError as error:
        raise WeightsError(f"{path} does not fit {model_name}. {error}{_other_weights(source)}") from None
    recorded, default = source.record.get("network", {}), default_options(model_name)
    strange = set(recorded) - set(default)
    if strange:
        raise WeightsError(f"{path} was trained with options that {model_name} does not have: {few(sorted(strange))}")
    for name, value in recorded.items():
        kinds = (int, float) if isinstance(default[name], float) else type(default[name])
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default[name], bool):
            raise WeightsError(f"{path}: its record says {name}={value!r}; expected something like {default[name]!r}")
    return Weights(model_name, parameters, source, dialect)


def _other_weights(source: Source) -> str:
    return f"\n{source.choice}" if source.both else ""


def _only_model(source: Source) -> str:
    fitting = models_that_fit(source.arrays, *source.frameworks)
    if len(fitting) == 1:
        return fitting[0]
    which = f"it fits {' and '.join(fitting)}" if fitting else "no model of mindska has just these weights"
    names = listing("it has", sorted(map(str, source.arrays))) if not fitting else ""
    raise WeightsError(f"{source.path} does not say which model it is ({which}); name it with --model.{names}")


def read_weights(
    path: Union[str, Path], model_name: str, ema: Optional[bool] = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Parameters (name -> array) for `model_name` in a file of any kind that we read, and the network's options.

    Options (see `Backbone.options`) are those that the weights were trained with, empty where the file does not tell. A
    file with the network's own names and no record is returned as it is: `load_into` says what does not fit.

    Args:
        ema: see `open_weights`.

    Raises:
        MissingWeights, WeightsError.
    """
    return _read(path, model_name, ema, logging.INFO)


def _read(
    path: Union[str, Path], model_name: str, ema: Optional[bool], level: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    source = open_source(path, ema)
    say(source, level)
    ours = model_name in OUR_MODELS
    if ours and (source.record or recognise(model_name, source.arrays, *source.frameworks).rules):
        weights = _translated(source, model_name)
        return weights.parameters, weights.options
    with_path(source.path, check_finite, source.arrays)
    return dict(source.arrays), {}


def load_into(net: nn.Cell, weights: Mapping[str, np.ndarray], source: str = "these weights") -> None:
    """Puts weights into a network; every parameter is filled and every weight used.

    A network made with `features_only` has no classifier: then the classifier's weights may be left over.

    Raises:
        WeightsError: names or shapes differ; the message lists them. The network is then unchanged.
    """
    parameters = {p.name: p for p in net.get_parameters()}
    missing = [f"{name} {parameters[name].shape}" for name in parameters if name not in weights]
    spare = HEAD if getattr(net, "features_only", False) else ()
    unknown = [
        f"{name} {tuple(weights[name].shape)}"
        for name in weights
        if name not in parameters and not (spare and name.startswith(spare))
    ]
    wrong = [
        f"{name}: {tuple(weights[name].shape)} in the file, {tuple(p.shape)} in the network"
        for name, p in parameters.items()
        if name in weights and tuple(weights[name].shape) != tuple(p.shape)
    ]
    if missing or unknown or wrong:
        model_name = getattr(net, "model_name", type(net).__name__)
        raise WeightsError(
            f"{source} does not fit {model_name}{rather(model_name, weights, 'mindspore')}."
            + listing("missing in the file", missing)
            + listing("unknown to the network", unknown)
            + listing("of another shape", wrong)
        )
    for name, parameter in parameters.items():
        parameter.set_data(ms.Tensor(np.ascontiguousarray(weights[name]), parameter.dtype))


def load_checkpoint_into(net: nn.Cell, path: Union[str, Path], ema: Optional[bool] = None) -> None:
    """Loads a file of weights (see `read_weights`) into a model of mindska (see `load_into`)."""
    weights, options = _read(path, net.model_name, ema, logging.WARNING)
    for name, value in options.items():
        if value != net.options[name]:
            raise WeightsError(
                f"{path} was trained with {name}={value!r}; the network was made with {net.options[name]!r}. "
                f"Pass {name}={value!r} to create_model."
            )
    load_into(net, weights, str(path))
