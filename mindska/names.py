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
SEGMENTATION_METHODS = ("semantic_fpn", "upernet", "deeplabv3")
# Any of our models may be a segmenter's backbone; MindCV's factory knows the pairs whose figures are published.
OUR_SEGMENTERS = tuple(f"{method}_{backbone}" for method in SEGMENTATION_METHODS for backbone in OUR_MODELS)
OUR_NETWORKS = (*OUR_MODELS, *OUR_SEGMENTERS)


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
    return frozenset((*OUR_MODELS, *_in_mindcvs_sources(), *registered)) - {*OUR_SEGMENTERS}


def check_segmenter(name: str) -> None:
    """Checks that a name is a segmenter's.

    Raises:
        ConfigError: it is not.
    """
    if name not in OUR_SEGMENTERS:
        meant = nearest(name, OUR_SEGMENTERS, "{}", 3)
        raise ConfigError(
            f"model is {name!r}, which is no network for segmentation{meant or '.'} Expected one of "
            f"{', '.join(SEGMENTATION_METHODS)}, an underscore, and a backbone of ours, as semantic_fpn_van_tiny"
        )


def check_model(name: str) -> None:
    """Checks that MindCV's factory knows a model.

    Raises:
        ConfigError: it does not.
    """
    known = known_models()
    if name not in known:
        meant = nearest(name, sorted(known), "{}", 3)
        raise ConfigError(
            f"model is {name!r}; MindCV's factory does not know it{meant or '.'} Ours: {', '.join(sorted(OUR_MODELS))}"
        )
