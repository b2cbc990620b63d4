"""Detectors by name: `create_detector`, and the published pairs of method and backbone in MindCV's factory."""

from __future__ import annotations

import sys
from typing import Any, Callable, Optional

import mindcv
from mindcv.models.registry import get_pretrained_cfg, register_model

from ..errors import SettingError
from ..models.factory import AFTER_CREATION, OUR_MODELS
from .detector import Detector
from .mask_rcnn import MaskRCNN
from .retinanet import RetinaNet
from .ssdlite import SSDLite

METHODS: dict[str, type[Detector]] = {network.method: network for network in (RetinaNet, MaskRCNN, SSDLite)}
DETECTORS = tuple(f"{method}_{backbone}" for method, network in METHODS.items() for backbone in network.published)
DENSE_NORM_EPS = 1e-5  # of the layer norms of VAN's stages in the authors' dense backbones; their classifiers have 1e-6


def split_name(name: str) -> Optional[tuple[str, str]]:
    """(method, backbone) of a detector's name, as "retinanet_van_tiny"; None when it is none of ours."""
    for method in METHODS:
        backbone = name.removeprefix(f"{method}_")
        if backbone != name and backbone in OUR_MODELS:
            return method, backbone
    return None


def card(name: str) -> dict[str, Any]:
    """What MindCV calls a model's configuration, of a detector."""
    method, backbone = split_name(name) or ("", name)
    network = METHODS[method]
    first = f"backbone.{get_pretrained_cfg(backbone)['first_conv']}"
    return dict(url="", first_conv=first, classifier=network.classifiers[0], **network.card)


def own_preprocessing(name: str) -> dict[str, Any]:
    """What a detector expects of an image: the arguments of `mindska.data.Preprocessing`."""
    own = card(name)
    size = tuple(own["input_size"][1:])
    return dict(image_size=size, **{key: own[key] for key in ("crop_pct", "interpolation", "mean", "std")})


def create_detector(
    method: str,
    backbone: str = "",
    num_classes: Optional[int] = None,
    in_channels: int = 3,
    **backbone_options: Any,
) -> Detector:
    """A network for object detection on a backbone of ours.

    Args:
        method: "retinanet", "mask_rcnn" or "ssdlite"; or, without `backbone`, a whole name: "retinanet_van_tiny".
        backbone: any of our models, as "van_tiny_lska_k23".
        num_classes: of objects, without the background; None for COCO's 80.
        backbone_options: arguments of the backbone's `create_model`, as `drop_path_rate`, `norm_eps` (of VAN 1e-5
            unless it is given, as in its authors' dense backbones) and `k_size`.

    Raises:
        SettingError: there is no such method or backbone, or an argument is out of range.
    """
    parts = split_name(method) if not backbone else (method, backbone)
    if not parts or parts[0] not in METHODS or parts[1] not in OUR_MODELS:
        found = f"{method!r}" + (f" on {backbone!r}" if backbone else "")
        raise SettingError(
            f"there is no detector {found}; expected one of {', '.join(METHODS)} on a backbone of ours: "
            f"{', '.join(sorted(OUR_MODELS))}"
        )
    network, name = METHODS[parts[0]], parts[1]
    if name.startswith("van_"):
        backbone_options.setdefault("norm_eps", DENSE_NORM_EPS)
    features = mindcv.create_model(name, in_channels=in_channels, features_only=True, **backbone_options)
    net: Any = network(features.net, network.card["num_classes"] if num_classes is None else num_classes)
    for change in AFTER_CREATION:
        net = change(net)
    return net


def _entry_point(module: str, name: str) -> Callable[..., Detector]:
    def create(
        pretrained: bool = False,
        num_classes: int = 1000,
        in_channels: int = 3,
        in_chans: Optional[int] = None,
        **options: Any,
    ) -> Detector:
        if pretrained:
            raise SettingError(
                f"No MindSpore weights are published for {name}, so pretrained=True cannot be honoured. "
                f"Convert the authors' weights with mindska.weights and pass checkpoint_path instead."
            )
        if options.pop("features_only", False):
            raise SettingError(f"{name} is a detector; for features make its backbone with features_only=True")
        channels = in_channels if in_chans is None else in_chans
        return create_detector(name, num_classes=num_classes, in_channels=channels, **options)

    create.__name__ = create.__qualname__ = name
    create.__module__ = module
    create.__doc__ = f"{name}: see `mindska.create_detector`; `num_classes` is MindCV's default, 1000, unless given."
    return create


def _register() -> None:
    for method, network in METHODS.items():
        names = [f"{method}_{backbone}" for backbone in network.published]
        module: Any = sys.modules[network.__module__]
        module.default_cfgs = {name: card(name) for name in names}
        for name in names:
            register_model(_entry_point(network.__module__, name))


_register()
