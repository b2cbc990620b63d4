"""The names of models, to be had without loading MindSpore or MindCV: commands check them before."""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path

from .arguments import nearest
from .errors import ConfigError

VAN_SIZES = ("tiny", "small", "base", "large")
VAN_KERNELS = (7, 11, 23, 35, 41, 53)
# The rows of VARIANTS of the files in models/, which a test compares.
OUR_MODELS = (
    "skanet_s", "skanet_nano",
    *(f"van_{size}{kernel}" for size in VAN_SIZES for kernel in ("", *(f"_lska_k{k}" for k in VAN_KERNELS))),
    "sknet26", "sknet29_16x32d", "sknet50", "sknet101",
    "sk_resnet18", "sk_resnet34", "sk_resnet50", "sk_resnext50_32x4d",
)  # fmt: skip
TASKS = ("classification", "segmentation", "detection")
METHODS = dict(  # what is built on a backbone -> its task; such a network is called METHOD_BACKBONE
    semantic_fpn="segmentation", upernet="segmentation", deeplabv3="segmentation",
    retinanet="detection", mask_rcnn="detection", ssdlite="detection",
)  # fmt: skip
# Any of our models may be a backbone; MindCV's factory knows the pairs whose figures are published.
OUR_SEGMENTERS, OUR_DETECTORS = (
    tuple(f"{method}_{backbone}" for method, task in METHODS.items() if task == each for backbone in OUR_MODELS)
    for each in TASKS[1:]
)
OUR_NETWORKS = (*OUR_MODELS, *OUR_SEGMENTERS, *OUR_DETECTORS)


def method_and_backbone(name: str) -> tuple[str, str]:
    """("semantic_fpn", "skanet_s") of "semantic_fpn_skanet_s"; ("", name) of what is no method on a backbone."""
    for method in METHODS:
        if name.startswith(f"{method}_"):
            return method, name[len(method) + 1 :]
    return "", name


def task_of(model: str) -> str:
    """What a model of this name is made for."""
    return METHODS.get(method_and_backbone(model)[0], "classification")


@cache
def _in_mindcvs_sources() -> frozenset[str]:
    """The models that MindCV's files register."""
    spec = importlib.util.find_spec("mindcv")
    names: set[str] = set()
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder, "models").glob("*.py")):
            text = path.read_text(encoding="utf-8", errors="replace")
            names.update(re.findall(r"^@register_model\s+def (\w+)\(", text, re.MULTILINE))
    return frozenset(names)


def known_models() -> frozenset[str]:
    """The classifiers that MindCV's factory knows, or will know when it is loaded."""
    registry = sys.modules.get("mindcv.models.registry")
    registered = registry.list_models() if registry else ()  # a program may have registered its own
    return frozenset((*OUR_MODELS, *_in_mindcvs_sources(), *registered)) - {*OUR_SEGMENTERS, *OUR_DETECTORS}


def check_model(name: str) -> None:
    """Checks that there is a model: one that MindCV's factory knows, or a method on one of our backbones.

    Raises:
        ConfigError: there is none.
    """
    method, backbone = method_and_backbone(name)
    if method and backbone not in OUR_MODELS:
        raise ConfigError(
            f"model is {name!r}; {method} is there on our backbones, and {backbone!r} is none of them"
            f"{nearest(backbone, OUR_MODELS, '{}', 3) or '.'} They are: {', '.join(sorted(OUR_MODELS))}"
        )
    if method:
        return
    known = known_models()
    if name not in known:
        meant = nearest(name, sorted(known), "{}", 3)
        raise ConfigError(
            f"model is {name!r}; MindCV's factory does not know it{meant or '.'} Ours: {', '.join(sorted(OUR_MODELS))}"
        )
