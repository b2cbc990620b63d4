"""The published segmenters, which MindCV's factory knows: their backbones, and what they expect of an image."""

from __future__ import annotations

from typing import Any

from mindspore import nn

from ..models.methods import Method, register_methods

ADE20K: dict[str, Any] = dict(
    num_classes=150,
    input_size=(3, 512, 512),
    crop_pct=1.0,
    interpolation="bilinear",
    mean=(123.675 / 255, 116.28 / 255, 103.53 / 255),
    std=(58.395 / 255, 57.12 / 255, 57.375 / 255),
)
VOC: dict[str, Any] = dict(  # PASCAL VOC 2012; pixels are divided by 255, and nothing else
    num_classes=21,
    input_size=(3, 512, 512),
    crop_pct=1.0,
    interpolation="bilinear",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)
LSKA = ("van_tiny_lska_k23", "van_small_lska_k23", "van_base_lska_k23")
VAN = ("van_tiny", "van_small", "van_base", "van_large")  # b0 to b3
PUBLISHED = dict(
    semantic_fpn=Method((*LSKA, *VAN), ADE20K),
    upernet=Method(VAN, ADE20K),
    deeplabv3=Method(("skanet_s",), VOC),
)


def _create(name: str, **options: Any) -> nn.Cell:
    from .factory import create_segmenter

    return create_segmenter(name, **options)


register_methods(__name__, "segmenter", PUBLISHED, _create)
