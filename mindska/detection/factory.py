"""Detectors by name: `create_detector`, and the published pairs of method and backbone in MindCV's factory."""

from __future__ import annotations

from typing import Any, Optional

import mindcv

from ..errors import SettingError
from ..models import methods
from ..models.factory import AFTER_CREATION, OUR_MODELS
from ..models.methods import DENSE_NORM_EPS, published_names
from .detector import Detector
from .mask_rcnn import MaskRCNN
from .published import PUBLISHED
from .retinanet import RetinaNet
from .ssdlite import SSDLite

METHODS: dict[str, type[Detector]] = {network.method: network for network in (RetinaNet, MaskRCNN, SSDLite)}
DETECTORS = published_names(PUBLISHED)


def split_name(name: str) -> Optional[tuple[str, str]]:
    """(method, backbone) of a detector's name, as "retinanet_van_tiny"; None when it is none of ours."""
    return methods.split_name(name, METHODS)


def card(name: str) -> dict[str, Any]:
    """What MindCV calls a model's configuration, of a detector."""
    return methods.card(name, PUBLISHED)


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
    net: Any = network(features.net, PUBLISHED[parts[0]].card["num_classes"] if num_classes is None else num_classes)
    for change in AFTER_CREATION:
        net = change(net)
    return net
