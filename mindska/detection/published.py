"""The published detectors, which MindCV's factory knows: their backbones, and what they expect of an image."""

from __future__ import annotations

from typing import Any

from mindspore import nn

from ..models.methods import Method, register_methods

COCO_CLASSES = 80
COCO: dict[str, Any] = dict(
    num_classes=COCO_CLASSES,
    input_size=(3, 800, 1333),
    crop_pct=1.0,
    interpolation="bilinear",
    mean=(123.675 / 255, 116.28 / 255, 103.53 / 255),
    std=(58.395 / 255, 57.12 / 255, 57.375 / 255),
)
COCO_SSD: dict[str, Any] = dict(  # pixels are divided by 255, and nothing else; the ratio of the sides is not kept
    num_classes=COCO_CLASSES,
    input_size=(3, 320, 320),
    crop_pct=1.0,
    interpolation="bicubic",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)
LSKA = ("van_tiny_lska_k23", "van_small_lska_k23", "van_base_lska_k23")
PUBLISHED = dict(
    retinanet=Method(LSKA, COCO, "bbox_head.retina_cls"),
    mask_rcnn=Method(LSKA, COCO, "roi_head.bbox_head.fc_cls"),
    ssdlite=Method(("skanet_s",), COCO_SSD, "ssd_heads.5.predictor"),
)


def _create(name: str, **options: Any) -> nn.Cell:
    from .factory import create_detector

    return create_detector(name, **options)


register_methods(__name__, "detector", PUBLISHED, _create)
