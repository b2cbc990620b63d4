"""Segmenters and detectors in MindCV's factory: names and facts of what is built on a backbone, without loading it.

The networks import the models, so the models' registration cannot import the networks: entry points do when called.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Callable, Optional

from mindcv.models.registry import get_pretrained_cfg, register_model
from mindspore import nn

from ..errors import SettingError
from .factory import OUR_MODELS

DENSE_NORM_EPS = 1e-5  # of the layer norms of VAN's stages in the authors' dense backbones; their classifiers have 1e-6


@dataclass(frozen=True)
class Method:
    """A way to build a network on a backbone.

    Attributes:
        published: backbones for which weights or figures of this method are published.
        card: classes, and what the published networks expect of an image.
        classifier: the layer whose outputs are the classes.
    """

    published: tuple[str, ...]
    card: dict[str, Any]
    classifier: str = "decode_head.conv_seg"


def published_names(methods: Mapping[str, Method]) -> tuple[str, ...]:
    """The names of the published pairs of method and backbone."""
    return tuple(f"{name}_{backbone}" for name, method in methods.items() for backbone in method.published)


def split_name(name: str, methods: Mapping[str, Any]) -> Optional[tuple[str, str]]:
    """(method, backbone) of a name, as "semantic_fpn_van_tiny"; None when it is none of these on a model of ours."""
    for method in methods:
        backbone = name.removeprefix(f"{method}_")
        if backbone != name and backbone in OUR_MODELS:
            return method, backbone
    return None


def card(name: str, methods: Mapping[str, Method]) -> dict[str, Any]:
    """What MindCV calls a model's configuration: of one of these, or of any other model of the factory."""
    parts = split_name(name, methods)
    if not parts:
        return get_pretrained_cfg(name)
    method, first = methods[parts[0]], f"backbone.{get_pretrained_cfg(parts[1])['first_conv']}"
    return dict(url="", first_conv=first, classifier=method.classifier, **method.card)


def register_methods(module: str, what: str, methods: Mapping[str, Method], create: Callable[..., nn.Cell]) -> None:
    """Makes an entry point of each published pair and registers it.

    Args:
        module: what they are registered in, a part a method. what: the word for them. create: makes one by its name.
    """
    for method, found in methods.items():
        names = [f"{method}_{backbone}" for backbone in found.published]
        place = ModuleType(f"{module}.{method}")  # MindCV's `list_models(module=...)` is of the last part
        vars(place)["default_cfgs"] = {name: card(name, methods) for name in names}
        sys.modules[place.__name__] = place
        for name in names:
            setattr(place, name, register_model(_entry_point(place.__name__, what, name, create)))


def _entry_point(module: str, what: str, name: str, create: Callable[..., nn.Cell]) -> Callable[..., nn.Cell]:
    def entry_point(
        pretrained: bool = False,
        num_classes: int = 1000,
        in_channels: int = 3,
        in_chans: Optional[int] = None,
        **options: Any,
    ) -> nn.Cell:
        if pretrained:
            raise SettingError(
                f"No MindSpore weights are published for {name}, so pretrained=True cannot be honoured. "
                f"Convert the authors' weights with mindska.weights and pass checkpoint_path instead."
            )
        if options.pop("features_only", False):
            raise SettingError(f"{name} is a {what}; for features make its backbone with features_only=True")
        channels = in_channels if in_chans is None else in_chans
        return create(name, num_classes=num_classes, in_channels=channels, **options)

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__module__ = module
    entry_point.__doc__ = f"{name}: see `mindska.create_{what}`; `num_classes` is MindCV's default, 1000, unless given."
    return entry_point
