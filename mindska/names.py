"""The names of models, to be had without loading MindSpore or MindCV: commands check them before."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
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

CORRUPTIONS = (  # of ImageNet-C: the 15 of its paper, and the 4 that its authors add
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
    "speckle_noise", "gaussian_blur", "spatter", "saturate",
)  # fmt: skip


def chosen_corruptions(words: Sequence[str]) -> list[str]:
    """The corruptions that an option names: "all" the 19, "common" the 15 of the paper, or names.

    Raises:
        ConfigError: there is none of such a name.
    """
    found: list[str] = []
    for word in words:
        if word not in ("all", "common", *CORRUPTIONS):
            raise ConfigError(f"corruptions has {word!r}; expected all, common, or some of {', '.join(CORRUPTIONS)}")
        found += dict(all=CORRUPTIONS, common=CORRUPTIONS[:15]).get(word, (word,))
    return list(dict.fromkeys(found))


def method_and_backbone(name: str) -> tuple[str, str]:
    """("semantic_fpn", "skanet_s") of "semantic_fpn_skanet_s"; ("", name) of what is no method on a backbone."""
    for method in METHODS:
        if name.startswith(f"{method}_"):
            return method, name[len(method) + 1 :]
    return "", name


def task_of(model: str) -> str:
    """What a model of this name is made for."""
    return METHODS.get(method_and_backbone(model)[0], "classification")


METHODS_PARTS = dict(  # what a network of a method consists of
    semantic_fpn=("backbone", "neck", "decode_head"),
    upernet=("backbone", "decode_head", "auxiliary_head"),
    deeplabv3=("backbone", "decode_head", "auxiliary_head"),
    retinanet=("backbone", "neck", "bbox_head"),
    mask_rcnn=("backbone", "neck", "rpn_head", "roi_head"),
    ssdlite=("backbone", "extra_layers", "ssd_heads"),
)


def parts_of(model: str) -> tuple[str, ...]:
    """The parts of a network of ours, by the names of its parameters; none of a model that is not ours."""
    method, backbone = method_and_backbone(model)
    if method or backbone not in OUR_MODELS:
        return METHODS_PARTS.get(method, ())
    stem = () if backbone.startswith(("skanet", "van")) else ("stem",)
    stages = 3 if backbone == "sknet29_16x32d" else 4
    return (*stem, *(f"stages.{i}" for i in range(stages)), "classifier")


def check_parts(model: str, named: tuple[str, ...]) -> None:
    """Checks that a network has parts of these names, as far as that is known without it.

    Raises:
        ConfigError: it does not.
    """
    known = parts_of(model)
    for part in (name.rstrip(".") for name in named):
        if known and not any(f"{part}.".startswith(f"{each}.") or f"{each}.".startswith(f"{part}.") for each in known):
            raise ConfigError(
                f"freeze names {part!r}, but {model} has no such part{nearest(part, known)} It has {', '.join(known)} "
                f"(and parts of these)"
            )


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
