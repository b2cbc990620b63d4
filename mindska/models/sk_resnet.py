"""timm's SK-ResNets: SKNet's selective kernels in ResNet and ResNeXt.

Source: timm's `sknet.py`, to whose figures the parity tests hold this port. Except in `sk_resnext50_32x4d`, each path
sees one half of the input.

MindCV's models of nearly these names, `skresnet*`, are left alone. Its `skresnext50_32x4d` has neither the 32 groups
nor the width 4 of its name (37.2 M parameters instead of 27.5 M), and its units no first ReLU.
"""

from __future__ import annotations

from .factory import register_variants
from .sknet import SKNet

TIMM = dict(stem="timm", momentum=0.9, zero_init_last=True)
SPLIT = dict(groups=1, split_input=True, **TIMM)
BASIC = dict(widths=(64, 128, 256, 512), channels=(64, 128, 256, 512), reduced=(16, 16, 32, 64), bottleneck=False)
WIDE = dict(channels=(256, 512, 1024, 2048))

VARIANTS = {
    "sk_resnet18": dict(depths=(2, 2, 2, 2), **BASIC, **SPLIT),
    "sk_resnet34": dict(depths=(3, 4, 6, 3), **BASIC, **SPLIT),
    "sk_resnet50": dict(depths=(3, 4, 6, 3), widths=(64, 128, 256, 512), reduced=(8, 8, 16, 32), **WIDE, **SPLIT),
    "sk_resnext50_32x4d": dict(
        depths=(3, 4, 6, 3), widths=(128, 256, 512, 1024), reduced=(32, 32, 32, 64), **WIDE, **TIMM
    ),
}

PREPROCESSING = dict(
    input_size=(3, 224, 224),
    crop_pct=0.875,
    interpolation="bicubic",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
default_cfgs = {
    name: dict(url="", num_classes=1000, first_conv="stem.conv", classifier="classifier", **PREPROCESSING)
    for name in VARIANTS
}

register_variants(__name__, SKNet, VARIANTS)
