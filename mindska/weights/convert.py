"""Weights from and to what others published: PyTorch state dicts, Caffe blobs."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any, Optional

import mindspore as ms
import numpy as np
from mindspore import nn
from mindspore.nn.utils import no_init_parameters

from .. import kernels
from ..errors import WeightsError, formatted_list
from ..models.factory import OUR_MODELS
from . import methods
from .methods import AUXILIARY, METHODS, card, split_name
from .names import BACKBONE, Dialect, dialects
from .wrappers import COUNTERS, Named, is_array, split

log = logging.getLogger("mindska")

HEAD = "classifier."
KERNEL_SIZE = re.compile(r"_k\d+$")  # models of several have the same names of parameters
HEADS_BEGIN = (  # the names of the other parts of what is built on a backbone
    *("neck.", "decode_head.", "auxiliary_head.", "seg_head."),
    *("bbox_head.", "rpn_head.", "roi_head.", "extra_layers.", "ssd_heads."),
)
EMA_PREFIX = "ema."  # MindCV's convention: averaged weights lie beside the raw ones under this prefix
STATE_PREFIX = "state."  # everything else that a training checkpoint of ours holds


def is_ours(model_name: str) -> bool:
    """Whether it is a model of ours; "semantic_fpn_van_tiny" is, and any other method on any backbone."""
    return model_name in OUR_MODELS or split_name(model_name) is not None


WIDEST_HEAD = 4096  # channels; a file that claims more makes no network of that size


def check_ours(model_name: str) -> None:
    """ValueError where it is no model of ours."""
    if not is_ours(model_name):
        raise ValueError(
            f"{model_name!r} is not a model of mindska; known: {', '.join(sorted(OUR_MODELS))}; and for segmentation "
            f"and detection {', '.join(METHODS)}, an underscore, and one of these"
        )


def create(model_name: str, num_classes: Optional[int] = None, **options: Any) -> nn.Cell:
    """A model of ours with initial values, a segmenter or detector included; `num_classes` None: its default.

    Raises:
        ValueError: the model is unknown.
    """
    check_ours(model_name)
    if num_classes is not None:
        options["num_classes"] = num_classes
    return methods.create(model_name, **options)


@cache
def _blank(model_name: str, **head: int) -> nn.Cell:
    """A model of ours as it is made by default, or with such a head (see `head_options`), without values."""
    with no_init_parameters(), kernels.plain():  # the plain cells are made faster
        return create(model_name, **head)


def classifier_prefixes(model_name: str) -> tuple[str, ...]:
    """How the names of the parameters begin whose first axis is the classes; the model may be any of MindCV's."""
    if split_name(model_name):
        return methods.classifiers(model_name)
    classifier = card(model_name).get("classifier")
    return (f"{classifier}." if isinstance(classifier, str) and classifier else HEAD,)


def initial_classifier(model_name: str, num_classes: int, parameters: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A classifier's initial values, name -> array; of an auxiliary head only where `parameters` have one."""
    ms.set_seed(0)
    heads = classifier_prefixes(model_name)
    if not any(name.startswith(heads[-1]) for name in parameters):
        heads = heads[:1]
    new = create(model_name, num_classes, **head_options(model_name, parameters)).get_parameters()
    return {p.name: p.asnumpy() for p in new if p.name.startswith(heads)}


def head_options(model_name: str, weights: Mapping[str, Any], key: str = "") -> dict[str, int]:
    """dict(head_channels=...) of a segmenter's weights, unless it is the default; of another model nothing.

    Args:
        key: what they call the classifier's weight; empty: as we do.
    """
    if not split_name(model_name) or methods.is_detector(model_name):
        return {}
    found = _shape(weights.get(key or f"{classifier_prefixes(model_name)[0]}weight"))
    default = default_options(model_name)["head_channels"]
    known = len(found) == 4 and found[1] != default and 2 <= found[1] <= WIDEST_HEAD
    return dict(head_channels=found[1]) if known else {}


def optional_prefix(model_name: str) -> str:
    """How the names of the parameters begin without which there is a network: a classifier, or a segmenter's
    auxiliary head; a detector has none such."""
    return AUXILIARY if split_name(model_name) else HEAD


def in_network(named: Named, model_name: str) -> Named:
    """A file's weights, those of a backbone in a segmenter or detector under names that say so."""
    return named.whole() if split_name(model_name) else named


def default_options(model_name: str) -> dict[str, Any]:
    """The arguments of `create_model` that weights depend on though no shape tells, and their defaults."""
    return _blank(model_name).options


@cache
def parameter_shapes(model_name: str, **head: int) -> dict[str, tuple[int, ...]]:
    """Parameters and statistics of a model of ours, or of one with such a head (see `head_options`): name -> shape.

    Raises:
        ValueError: the model is unknown.
    """
    return {p.name: tuple(p.shape) for p in _blank(model_name, **head).get_parameters()}


def first_weight(model_name: str) -> str:
    """The parameter's name of the first convolution's weight."""
    return f"{card(model_name)['first_conv']}.weight"


def for_channels(weights: dict[str, np.ndarray], model_name: str, in_channels: int) -> dict[str, np.ndarray]:
    """Weights of a model of ours (name -> array) for images of 1 or 3 channels.

    From three channels to one, the first convolution's weights are summed over them, as timm does it. From one to
    three, they are repeated and divided by three. So the output for a grey image stays the same. The log says what
    changes. Weights of a model that is not ours are returned as they are.

    Raises:
        WeightsError: the weights take another number of channels than 1 or 3.
    """
    name = first_weight(model_name) if is_ours(model_name) else ""
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
    Of segmenters and detectors, MMSegmentation's (semantic FPN, UPerNet), MMDetection's (RetinaNet, Mask R-CNN) and
    ml-cvnets' (DeepLabv3, SSDLite), on a backbone with any of these.

    Args:
        model_name: a model of mindska, for example "skanet_s" or "semantic_fpn_van_tiny".
        state_dict: the state dict (values: torch tensors or numpy arrays), or the authors' checkpoint around it
            (`state_dict`, `state_dict_ema`, `model`, `model_ema`, ...; with or without the prefix `module.`).
        use_ema: True for the averaged weights, False for the raw ones, None for the averaged where there are any.

    Raises:
        WeightsError: keys are missing or unknown, have other shapes, or no finite real values; the message lists them.
    """
    named = in_network(split(state_dict).take(use_ema)[0], model_name)
    return translate(model_name, named.arrays, "torch", beside=named.beside)[0]


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
    mapping, optional = key_map(model_name), optional_prefix(model_name)
    if not any(name.startswith(optional) for name in parameters):  # a backbone's
        mapping = {name: key for name, key in mapping.items() if not name.startswith(optional)}
    missing = [name for name in mapping if name not in parameters]
    if missing:
        raise WeightsError(f"These parameters are not {model_name}'s." + formatted_list("missing", missing))
    return {key: np.asarray(parameters[name], np.float32) for name, key in mapping.items()}


def _differences(
    model_name: str, source: Mapping, dialect: Dialect, beside: Collection[str] = ()
) -> tuple[list[str], list[str], list[str]]:
    """Missing keys, unknown keys, and keys of another shape. Numbers of classes, of input channels and of a segmenter's
    head's channels are left open."""
    mapping, classifiers = key_map(model_name, dialect), classifier_prefixes(model_name)
    head = head_options(model_name, source, mapping.get(f"{classifiers[0]}weight", ""))
    shapes, wanted = parameter_shapes(model_name, **head), set(mapping.values())
    first, optional = first_weight(model_name), optional_prefix(model_name)

    def fits(name: str, found: tuple[int, ...]) -> bool:
        expected = shapes[name]
        if name.startswith(classifiers):
            return found[1:] == expected[1:] and len(found) == len(expected)
        return found == ((*expected[:1], *found[1:2], *expected[2:]) if name == first else expected)

    absent = [name for name, key in mapping.items() if key not in source]
    alone = all(name.startswith(optional) for name in absent) and not any(
        key in source for name, key in mapping.items() if name.startswith(optional)
    )
    missing = [] if alone else [mapping[name] for name in absent]
    # A number or a text is no weight of any model of ours.
    unknown = [str(key) for key, value in source.items() if key not in wanted and key not in beside and _shape(value)]
    wrong = [
        f"{key}: {_shape(source[key]) if is_array(source[key]) else value_problem(source[key])} in the file, "
        f"{shapes[name]} in the network"
        for name, key in mapping.items()
        if key in source and not fits(name, _shape(source[key]))
    ]
    return missing, unknown, wrong


def _without_counters(source: Mapping) -> dict[str, Any]:
    return {key: value for key, value in source.items() if key.rpartition(".")[2] not in COUNTERS}


def suggestion(model_name: str, source: Mapping, *frameworks: str, beside: Collection[str] = ()) -> str:
    """Return ", but NAME's" where the weights fit a relative of the model (another kernel or size), else nothing."""
    method, backbone = split_name(model_name) or ("", model_name)
    relatives = [name for name, module in OUR_MODELS.items() if module == OUR_MODELS.get(backbone) and name != backbone]
    if method:  # by the backbone alone; where that fits, another one is not meant
        inside = {str(key).removeprefix(BACKBONE): value for key, value in source.items()}
        beside = [key for key in inside if key.startswith(HEADS_BEGIN)]
        if models_that_fit(inside, *frameworks, among=[backbone], beside=beside):
            return ""
        fitting = models_that_fit(inside, *frameworks, among=relatives, beside=beside)
        return f", but {' or '.join(f'{method}_{name}' for name in fitting)}'s" if fitting else ""
    fitting = models_that_fit(source, *frameworks, among=relatives, beside=beside)
    return f", but {' or '.join(fitting)}'s" if fitting else ""


def models_that_fit(
    source: Mapping, *frameworks: str, among: Optional[Sequence[str]] = None, beside: Collection[str] = ()
) -> list[str]:
    """Our models whose names and shapes are exactly those of `source` (the number of classes left open).

    `beside`: names in it that may be left over (see `wrappers.Named`).
    """
    source = _without_counters(source)
    fitting: list[str] = []
    other_names: set[str] = set()  # models, with or without their kernel size, whose names are not the source's
    for name in sorted(OUR_MODELS) if among is None else among:
        but_for_its_kernel = KERNEL_SIZE.sub("", name)
        if but_for_its_kernel in other_names:
            continue  # making one more takes a second
        found = [
            _differences(name, _shaped(name, source, dialect), dialect, beside)
            for framework in frameworks
            for dialect in dialects(name, framework)
            # Most models are told apart by one name, without making them all.
            if dialect.key(first_weight(name)) in source
        ]
        if all(missing or unknown for missing, unknown, _ in found):
            other_names.add(but_for_its_kernel)
        fitting += [name for differences in found if not any(differences)]
    return fitting


def translate(
    model_name: str, source: Mapping, *frameworks: str, beside: Collection[str] = ()
) -> tuple[dict[str, np.ndarray], Dialect]:
    """MindSpore parameters (name -> float32 array) of a model from weights under the names of some framework.

    Every weight of `source` is used, but for those `beside` a backbone, and every parameter filled; weights without a
    classifier are a backbone's.

    Returns:
        The parameters, and the dialect in which the source names them.

    Raises:
        WeightsError: names are missing or unknown, have other shapes, or values that are no weights; the message lists
            them.
    """
    source = _without_counters(source)
    dialect = recognise(model_name, source, *frameworks)
    source = _shaped(model_name, source, dialect)
    missing, unknown, wrong = _differences(model_name, source, dialect, beside)
    if missing or unknown or wrong:
        others = suggestion(model_name, source, *frameworks, beside=beside)
        raise WeightsError(
            f"These weights are not {model_name}'s{others}.{_headless(model_name, source, dialect, missing, wrong)}"
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


def _headless(model_name: str, source: Mapping, dialect: Dialect, *others: list[str]) -> str:
    """A sentence when nothing but a known classifier is missing; `others`: what else is missing or wrong."""
    head = [key for name, key in key_map(model_name, dialect).items() if name.startswith(HEAD)]
    if not head or any(others) or any(key in source for key in head):
        return ""
    return (
        f" All of its backbone is there; its classifier ({' and '.join(head)}) is missing, and there are others that "
        f"are not its own: save the backbone alone, or the classifier under these names."
    )


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
    if getattr(value, "is_nested", False) is True:
        return "nested: a list of tensors of several shapes; save each alone"
    if not is_array(value):
        return f"{type(value).__name__}, no array"
    if hasattr(value, "untyped_storage") or hasattr(value, "layout"):  # PyTorch's, which need not be installed
        if value.device.type == "meta":
            return "on the device meta, which has a shape and no values; save the model after loading its weights"
        if str(value.layout) != "torch.strided":
            return f"sparse ({str(value.layout).removeprefix('torch.')}); save it .to_dense()"
        if value.is_quantized:
            return f"quantised ({str(value.dtype).removeprefix('torch.')}); save the model as it was before quantising"
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
