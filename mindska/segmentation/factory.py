"""Segmenters by name: `create_segmenter`, and the published pairs of method and backbone in MindCV's factory."""

from __future__ import annotations

from typing import Any, Optional

import mindcv

from ..errors import SettingError
from ..models import factory, methods
from ..models.factory import AFTER_CREATION, OUR_MODELS
from ..models.methods import DENSE_NORM_EPS, published_names
from .deeplabv3 import DeepLabV3
from .published import PUBLISHED
from .segmenter import Segmenter
from .semantic_fpn import SemanticFPN
from .upernet import UPerNet

METHODS: dict[str, type[Segmenter]] = {network.method: network for network in (SemanticFPN, UPerNet, DeepLabV3)}
SEGMENTERS = published_names(PUBLISHED)


def split_name(name: str) -> Optional[tuple[str, str]]:
    """(method, backbone) of a segmenter's name, as "semantic_fpn_van_tiny"; None when it is none of ours."""
    return methods.split_name(name, METHODS)


def card(name: str) -> dict[str, Any]:
    """What MindCV calls a model's configuration: of a segmenter, or of any other model of the factory."""
    return methods.card(name, PUBLISHED)


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
    head_channels: Optional[int] = None,
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
        head_channels: of the head; None for the method's: 128 of semantic_fpn, whose neck has twice as many, 512 of
            upernet and deeplabv3.
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
    options: dict[str, Any] = dict(drop_rate=drop_rate, head_channels=head_channels)
    if network.has_auxiliary_head:
        options["auxiliary_head"] = auxiliary_head
    classes = PUBLISHED[parts[0]].card["num_classes"] if num_classes is None else num_classes
    net: Any = network(features.net, classes, **options)
    for change in AFTER_CREATION:
        net = change(net)
    return net
