"""Weights from a file into a network, strictly: a file that is missing or does not fit is an error that says why."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Optional, Union

import mindcv
import mindspore as ms
import numpy as np
from mindspore import nn
from mindspore.nn.utils import no_init_parameters

from ..data.transforms import Preprocessing
from ..errors import SettingError, WeightsError, few, formatted_list, printable
from ..models.factory import OUR_MODELS
from ..models.layers.backbone import Backbone
from .convert import (
    HEAD,
    check_finite,
    check_ours,
    classifier_prefixes,
    default_options,
    first_weight,
    for_channels,
    head_options,
    in_network,
    is_ours,
    key_map,
    models_that_fit,
    optional_prefix,
    suggestion,
    translate,
)
from .files import with_path
from .methods import AUXILIARY, create, num_classes, own_preprocessing, reordered, split_name, task_of
from .names import DIALECTS, Dialect
from .source import Source, open_source
from .wrappers import ELSEWHERE, SLOT, as_saved

log = logging.getLogger("mindska")

UNSAID = ("num_batches_tracked", "n_averaged", "steps")  # counters of PyTorch's and MMEngine's, in most of their files
KEPT = (
    "class_names",
    "epoch",
    "metric",
    "top1",
    "miou",
    "ap",
    "evaluation",
)  # of a file's record, in the record of a file made from it


@dataclass(frozen=True)
class Weights:
    """Weights under our names, with all that is known of them.

    Attributes:
        parameters: name -> float32 array.
        source: what they are in the file.
        dialect: who named them in the file; None of a model that is not ours, whose names stay as they are.
        new_classifier: the network that they are put into keeps its own classifier.
    """

    model: str
    parameters: dict[str, np.ndarray]
    source: Source
    dialect: Optional[Dialect]
    new_classifier: bool = False

    @property
    def num_classes(self) -> Optional[int]:
        """Number of classes; None of a backbone, which has no classifier."""
        head = classifier_prefixes(self.model)[0]
        last = self.parameters.get(f"{head}bias", self.parameters.get(f"{head}weight"))
        return None if last is None or not last.shape else num_classes(self.model, len(last))

    @property
    def in_channels(self) -> int:
        """Number of the image's channels."""
        return self.parameters[first_weight(self.model)].shape[1]

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `create_model` that the weights need; none of a model that is not ours."""
        if self.dialect is None:
            return {}
        default = default_options(self.model)
        recorded = dict(self.source.record.get("network", {}))
        recorded.pop("head_channels", None)  # the shapes tell it, whatever the record claims
        return {**default, **self.dialect.network, **recorded, **head_options(self.model, self.parameters)}

    @property
    def non_default_options(self) -> dict[str, Any]:
        """The options that are not the model's defaults."""
        return non_default_options(self.model, self.options)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What the weights expect of an image: the arguments of `mindska.data.Preprocessing`, for their channels.

        Raises:
            WeightsError: they are of other channels than 1 (grey) or 3 (RGB).
        """
        recorded = self.source.record.get("preprocessing")
        of_dialect = self.dialect.preprocessing if self.dialect else {}
        known = recorded or {**own_preprocessing(self.model), **of_dialect}
        try:
            return asdict(Preprocessing(**known).for_channels(self.in_channels))
        except SettingError as error:
            raise WeightsError(f"{self.source.path}: {error}") from None

    @cached_property
    def record(self) -> dict[str, Any]:
        """What a file with these weights should say of itself: model, classes, pixels, options, and their source.

        Of a model that is not ours, what its file says.
        """
        origin = self.source
        if self.dialect is None:
            return origin.record
        record = {name: origin.record[name] for name in KEPT if name in origin.record}
        record.update(model=self.model, num_classes=self.num_classes, preprocessing=self.preprocessing)
        if self.non_default_options:
            record["network"] = self.non_default_options
        record["source"] = dict(
            file=origin.path.name,
            sha256=origin.sha256,
            kind=origin.kind,
            names=self.dialect.name,
            averaged=origin.averaged or origin.record.get("source", {}).get("averaged", False),
        )
        if split_name(self.model):
            record["task"] = task_of(self.model)
        if "source" in origin.record:  # it was made from another file itself
            record["source"]["source"] = origin.record["source"]
        return record

    def network(self) -> nn.Cell:
        """The network with these weights, for inference; of a backbone, the one that returns its features."""
        keywords = dict(self.non_default_options, features_only=self.num_classes is None)
        with no_init_parameters():
            if split_name(self.model):
                return self._with_head()
            net = mindcv.create_model(self.model, self.num_classes or 1000, in_channels=self.in_channels, **keywords)
        self.load_into(getattr(net, "net", net))
        return net.set_train(False)

    def _with_head(self) -> nn.Cell:
        keywords = self.non_default_options
        if task_of(self.model) == "segmentation":
            keywords["auxiliary_head"] = any(name.startswith(AUXILIARY) for name in self.parameters)
        net = create(self.model, num_classes=self.num_classes, in_channels=self.in_channels, **keywords)
        self.load_into(net)
        return net.set_train(False)

    def load_into(self, network: nn.Cell) -> None:
        """Puts them into a network, strictly (see `load_into`).

        The backbone of a segmenter, `segmenter.backbone`, takes the weights of a classifier.

        Raises:
            WeightsError: they do not fit, or were trained with other options than the network was made with.
        """
        path = self.source.path
        for name, value in self.options.items():
            if name == "output_stride":
                continue  # weights are made for another one as well: 16 first, then 8 from these
            if name in network.options and value != network.options[name]:
                raise WeightsError(
                    f"{path} was trained with {name}={value!r}; the network was made with {network.options[name]!r}. "
                    f"Pass {name}={value!r} to create_model."
                )
        load_into(network, self._with_classifier_of(network) if self.new_classifier else self.parameters, str(path))

    def _with_classifier_of(self, network: nn.Cell) -> dict[str, np.ndarray]:
        head = classifier_prefixes(self.model)
        own = {p.name: p.asnumpy() for p in network.get_parameters() if p.name.startswith(head)}
        if not own:
            raise WeightsError(
                f"{self.source.path} has other classes than the data, and which parameters of {self.model} are its "
                f"classifier is not known (none begins with {' or '.join(head)}); make a new one in a file of your own"
            )
        return {**{name: value for name, value in self.parameters.items() if not name.startswith(head)}, **own}

    def of_backbone(self) -> Weights:
        """Those of a segmenter's or detector's backbone alone, which another network built on the same one takes."""
        start = "backbone."
        own = {name[len(start) :]: value for name, value in self.parameters.items() if name.startswith(start)}
        return replace(self, model=(split_name(self.model) or ("", self.model))[1], parameters=own)

    def with_new_classifier(self) -> Weights:
        """The same but for the classifier, which stays the network's own when they are put into one."""
        return replace(self, new_classifier=True)

    def reordered(self, order: Sequence[int]) -> Weights:
        """The same with the classes in another order; order: the old number of each."""
        head = classifier_prefixes(self.model)
        moved = {name: value[list(order)] for name, value in self.parameters.items() if name.startswith(head)}
        if task_of(self.model) == "detection":
            moved = reordered(self.model, self.parameters, order)
        return replace(self, parameters={**self.parameters, **moved})

    def for_channels(self, in_channels: int) -> Weights:
        """The same for images of 1 or 3 channels: see `convert.for_channels`."""
        return replace(self, parameters=for_channels(self.parameters, self.model, in_channels))


def non_default_options(model_name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a network's options (see `Backbone.options`) that are not the defaults of its model."""
    return {name: value for name, value in options.items() if value != default_options(model_name)[name]}


def open_weights(
    path: Union[str, Path], model: str = "", ema: Optional[bool] = None, any_model: bool = False
) -> Weights:
    """The weights in a file of any kind that we read: PyTorch, safetensors, Caffe, MindSpore (see `open_source`).

    Args:
        model: its name; empty: the one that the file names, or the only one that it fits.
        ema: True for the averaged weights (an error when there are none), False for the raw ones, None for the averaged
            where the file has them (of a run's best checkpoint: for the kind that scored higher), which is said.
        any_model: take a model of MindCV's that is not ours as well; its parameters stay as they are in the file.

    Raises:
        MissingWeights, WeightsError: the file does not fit the model; the message says whose it is where that is known.
    """
    source = open_source(path, ema)
    if ema is None and source.choice:
        log.warning("%s", printable(source.choice))
    recorded = source.record.get("model", "")
    if model and recorded and model != recorded:
        raise WeightsError(f"{path} holds {recorded}, but the model asked for is {model}; leave --model out")
    name = model or recorded
    if any_model and name and not is_ours(name):
        if source.kind not in ("MindSpore", "safetensors"):
            raise WeightsError(f"{path} is of {source.kind}; of {name}, which is MindCV's, MindSpore's files are read")
        parameters = as_saved(source.named)
        with_path(source.path, check_finite, parameters)
        _say_left_out(source, source.named.left_out)
        return Weights(name, parameters, source, None)
    return _translated(source, name)


def _translated(source: Source, model_name: str) -> Weights:
    path = source.path
    model_name = model_name or _only_model(source)
    try:
        check_ours(model_name)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from None
    named = in_network(source.named, model_name)
    try:
        parameters, dialect = translate(model_name, named.arrays, *source.frameworks, beside=named.beside)
    except WeightsError as error:
        raise WeightsError(f"{path} does not fit {model_name}. {error}{_hints(source, model_name)}") from None
    recorded, default = source.record.get("network", {}), default_options(model_name)
    strange = set(recorded) - set(default)
    if strange:
        raise WeightsError(f"{path} was trained with options that {model_name} does not have: {few(sorted(strange))}")
    for name, value in recorded.items():
        kinds = (int, float) if isinstance(default[name], float) else type(default[name])
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default[name], bool):
            raise WeightsError(f"{path}: its record says {name}={value!r}; expected something like {default[name]!r}")
    used = set(key_map(model_name, dialect).values())
    unused = [key for key in named.arrays if key not in used and key.rpartition(".")[2] not in UNSAID]
    _say_left_out(source, [*(named.in_file[key] for key in unused), *named.left_out])
    return Weights(model_name, parameters, source, dialect)


def _say_left_out(source: Source, names: Sequence[str]) -> None:
    """One line on what a file has beside the network's weights: names, or their first part and how many there are."""
    groups = defaultdict(list)
    for name in names:
        groups[name.partition(".")[0]].append(name)
    if groups:
        said = [f"{group}.* ({len(members)})" if members[1:] else members[0] for group, members in groups.items()]
        path = printable(source.path)
        log.warning("%s also has what is no part of the network, and is not read: %s", path, few(said))


def _hints(source: Source, *models: str) -> str:
    """Where the weights may be that were not found; `models`: whose they should be, any of ours if none is given."""
    hints = [source.choice] if source.both else []
    if any(SLOT.fullmatch(name) for name in source.named.left_out):
        hints.append(ELSEWHERE)
    containers = [name for name, value in source.arrays.items() if isinstance(value, Mapping)]
    if containers:
        hints.append(
            f"Under other names there is more, which is not searched: {few(containers)}; save the weights alone"
        )
    firsts = {dialect.key(first_weight(name)) for name in models or OUR_MODELS for dialect in DIALECTS}
    ends = [(key, first) for key in source.arrays for first in firsts if str(key).endswith(f".{first}")]
    for prefix in sorted({key.removesuffix(first) for key, first in ends})[:5]:
        inside = {key.removeprefix(prefix): v for key, v in source.arrays.items() if str(key).startswith(prefix)}
        fitting = models_that_fit(inside, *source.frameworks, among=models or None)
        if fitting:
            hints.append(f"The names that begin with {prefix} are {' or '.join(fitting)}'s: save these, without it")
    return "".join(f"\n{hint}" for hint in hints)


def _only_model(source: Source) -> str:
    fitting = models_that_fit(source.arrays, *source.frameworks, beside=source.named.beside)
    if len(fitting) == 1:
        return fitting[0]
    which = f"it fits {' and '.join(fitting)}" if fitting else "no model of mindska has just these weights"
    names = formatted_list("it has", sorted(map(str, source.arrays))) if not fitting else ""
    raise WeightsError(
        f"{source.path} does not say which model it is ({which}); name it with --model.{names}{_hints(source)}"
    )


def load_into(net: nn.Cell, weights: Mapping[str, np.ndarray], source: str = "these weights") -> None:
    """Puts weights into a network; every parameter is filled and every weight used.

    A network made with `features_only` or `num_classes=0` has no classifier: the classifier's weights are left out. So
    are numbers that a trainer appended (a seed, a score), which are no weights. The log says so.

    Raises:
        WeightsError: names or shapes differ; the message lists them, or says that the network has other classes or
            channels, or that the classifier is missing, and what to do. The network is then unchanged.
    """
    # A backbone inside another network has its own names there.
    named = net.parameters_and_names() if isinstance(net, Backbone) else ((p.name, p) for p in net.get_parameters())
    parameters = dict(named)
    missing = [name for name in parameters if name not in weights]
    headless = getattr(net, "features_only", False) or getattr(net, "num_classes", None) == 0
    optional = optional_prefix(getattr(net, "model_name", ""))
    headless = headless or (optional == AUXILIARY and not getattr(net, "has_auxiliary", True))
    head = [name for name in weights if headless and name.startswith(optional)]
    others = [name for name in weights if name not in parameters and name not in head]
    numbers = [name for name in others if not weights[name].shape]
    unknown = [name for name in others if name not in numbers]
    shapes = {name: (tuple(weights[name].shape), tuple(p.shape)) for name, p in parameters.items() if name in weights}
    wrong = [name for name, (found, expected) in shapes.items() if found != expected]
    if missing or unknown or wrong:
        model_name = getattr(net, "model_name", type(net).__name__)
        known = _other_network(model_name, source, missing, unknown, {name: shapes[name] for name in wrong})
        if known:
            raise WeightsError(known)
        raise WeightsError(
            f"{source} does not fit {model_name}{suggestion(model_name, weights, 'mindspore')}."
            + formatted_list("missing in the file", [f"{name} {parameters[name].shape}" for name in missing])
            + formatted_list("unknown to the network", [f"{name} {tuple(weights[name].shape)}" for name in unknown])
            + formatted_list(
                "of another shape", [f"{n}: {shapes[n][0]} in the file, {shapes[n][1]} in the network" for n in wrong]
            )
        )
    if numbers:
        log.warning("%s also has numbers that are no part of the network: %s", printable(source), few(numbers))
    if head:
        what = "classifier" if optional == HEAD else "auxiliary head"
        log.warning("%s: its %s is left out, for the network has none", printable(source), what)
    for name, parameter in parameters.items():
        parameter.set_data(ms.Tensor(np.ascontiguousarray(weights[name]), parameter.dtype))


def _other_network(
    model_name: str,
    source: str,
    missing: Sequence[str],
    unknown: Sequence[str],
    wrong: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> str:
    """What to do when the weights are the model's, but of other classes or channels, or without a classifier.

    An empty string when something else differs. `wrong`: name -> shape in the file, shape in the network.
    """
    optional = optional_prefix(model_name)
    if not is_ours(model_name) or unknown or not all(name.startswith(optional) for name in missing):
        return ""
    head = [name for name in wrong if name.startswith(classifier_prefixes(model_name))]
    stem = [name for name in wrong if name == first_weight(model_name)]
    if len(head) + len(stem) < len(wrong) or (missing and head):
        return ""
    said = [f"{source} holds {model_name}'s weights."]
    new = f"mindska convert --model {model_name} --from {source} --to NEW.ckpt --num_classes"
    if missing and optional == AUXILIARY:
        said.append(
            "The auxiliary head is missing, which is for training only, and the network has one. Make the network with "
            "auxiliary_head=False."
        )
    elif missing:
        said.append(
            f"The classifier is missing (it is a backbone), and the network has one. For features, make the network "
            f"with features_only=True. To train a classifier on this backbone, pass the file to `mindska train` as "
            f"--ckpt_path: it makes a new one (as does {new} N)."
        )
    if head:
        found, expected = (shape[0] for shape in wrong[head[-1]])
        said.append(
            f"They have a classifier for {found} classes, the network one for {expected}. To use it, make the network "
            f"with num_classes={found}. To train one for {expected} classes, pass the file to `mindska train` as "
            f"--ckpt_path: it makes a new one (as does {new} {expected})."
        )
    if stem:
        found, expected = (shape[1] for shape in wrong[stem[0]])
        said.append(
            f"They take images of {found} channels, the network of {expected}. Make it with in_channels={found}, or "
            f"adapt them (1 or 3 channels): open_weights(FILE).for_channels({expected}).load_into(network); "
            f"`mindska train` does so."
        )
    shapes = [f"{name}: {found} in the file, {expected} in the network" for name, (found, expected) in wrong.items()]
    return " ".join(said) + formatted_list("of another shape", shapes)
