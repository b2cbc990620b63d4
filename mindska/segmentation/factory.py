"""Segmenters by name: `create_segmenter`, and the published pairs of method and backbone in MindCV's factory."""

from __future__ import annotations

import sys
from typing import Any, Callable, Optional

import mindcv
from mindcv.models.registry import get_pretrained_cfg, register_model

from ..errors import SettingError
from ..models import factory
from ..models.factory import AFTER_CREATION, OUR_MODELS
from .deeplabv3 import DeepLabV3
from .segmenter import Segmenter
from .semantic_fpn import SemanticFPN
from .upernet import UPerNet

METHODS: dict[str, type[Segmenter]] = {network.method: network for network in (SemanticFPN, UPerNet, DeepLabV3)}
SEGMENTERS = tuple(f"{method}_{backbone}" for method, network in METHODS.items() for backbone in network.published)
DENSE_NORM_EPS = 1e-5  # of the layer norms of VAN's stages in the authors' dense backbones; their classifiers have 1e-6


def split_name(name: str) -> Optional[tuple[str, str]]:
    """(method, backbone) of a segmenter's name, as "semantic_fpn_van_tiny"; None when it is none of ours."""
    for method in METHODS:
        backbone = name.removeprefix(f"{method}_")
        if backbone != name and backbone in OUR_MODELS:
            return method, backbone
    return None


def card(name: str) -> dict[str, Any]:
    """What MindCV calls a model's configuration: of a segmenter, or of any other model of the factory."""
    parts = split_name(name)
    if not parts:
        return get_pretrained_cfg(name)
    method, backbone = parts
    first = f"backbone.{get_pretrained_cfg(backbone)['first_conv']}"
    return dict(url="", first_conv=first, classifier="decode_head.conv_seg", **METHODS[method].card)


def own_preprocessing(name: str) -> dict[str, Any]:
    """What a segmenter or another model expects of an image: the arguments of `mindska.data.Preprocessing`."""
    if not split_name(name):
        return factory.own_preprocessing(name)
    own = card(name)
    size = tuple(own["input_size"][1:])
    return dict(image_size=size, **{key: own[key] for key in ("crop_pct", "interpolation", "mean", "std")})


def create_segmenter(
    method: str,
    backbone: str = "",
    num_classes: Optional[int] = None,
    in_channels: int = 3,
    output_stride: Optional[int] = None,
    drop_rate: float = 0.1,
    auxiliary_head: bool = True,
    **backbone_options: Any,
) -> Segmenter:
    """A network for semantic segmentation on a backbone of ours.

    Args:
        method: "semantic_fpn", "upernet" or "deeplabv3"; or, without `backbone`, a whole name: "upernet_van_tiny".
        backbone: any of our models, as "van_tiny_lska_k23".
        num_classes: None for the published number: 150 (ADE20K), of deeplabv3 21 (PASCAL VOC 2012).
        output_stride: of the coarsest feature; None for the method's: 8 of deeplabv3, of the others the backbone's own.
        drop_rate: of the heads' dropout.
        auxiliary_head: False for upernet and deeplabv3 without theirs, which only training needs.
        backbone_options: arguments of the backbone's `create_model`, as `drop_path_rate`, `norm_eps` (of VAN 1e-5
            unless it is given, as in its authors' dense backbones) and `k_size`.

    Raises:
        SettingError: there is no such method or backbone, or an argument is out of range.
    """
    parts = split_name(method) if not backbone else (method, backbone)
    if not parts or parts[0] not in METHODS or parts[1] not in OUR_MODELS:
        found = f"{method!r}" + (f" on {backbone!r}" if backbone else "")
        raise SettingError(
            f"there is no segmenter {found}; expected one of {', '.join(METHODS)} on a backbone of ours: "
            f"{', '.join(sorted(OUR_MODELS))}"
        )
    network, name = METHODS[parts[0]], parts[1]
    if name.startswith("van_"):
        backbone_options.setdefault("norm_eps", DENSE_NORM_EPS)
    features = mindcv.create_model(
        name,
        in_channels=in_channels,
        features_only=True,
        output_stride=network.output_stride if output_stride is None else output_stride,
        **backbone_options,
    )
    options: dict[str, Any] = dict(drop_rate=drop_rate)
    if network.has_auxiliary_head:
        options["auxiliary_head"] = auxiliary_head
    classes = network.card["num_classes"] if num_classes is None else num_classes
    net: Any = network(features.net, classes, **options)
    for change in AFTER_CREATION:
        net = change(net)
    return net


def _entry_point(module: str, name: str) -> Callable[..., Segmenter]:
    def create(
        pretrained: bool = False,
        num_classes: int = 1000,
        in_channels: int = 3,
        in_chans: Optional[int] = None,
        **options: Any,
    ) -> Segmenter:
        if pretrained:
            raise SettingError(
                f"No MindSpore weights are published for {name}, so pretrained=True cannot be honoured. "
                f"Convert the authors' weights with mindska.weights and pass checkpoint_path instead."
            )
        if options.pop("features_only", False):
            raise SettingError(f"{name} is a segmenter; for features make its backbone with features_only=True")
        channels = in_channels if in_chans is None else in_chans
        return create_segmenter(name, num_classes=num_classes, in_channels=channels, **options)

    create.__name__ = create.__qualname__ = name
    create.__module__ = module
    create.__doc__ = f"{name}: see `mindska.create_segmenter`; `num_classes` is MindCV's default, 1000, unless given."
    return create


def _register() -> None:
    for method, network in METHODS.items():
        names = [f"{method}_{backbone}" for backbone in network.published]
        vars(sys.modules[network.__module__])["default_cfgs"] = {name: card(name) for name in names}
        for name in names:
            register_model(_entry_point(network.__module__, name))


_register()
