"""Explicit name maps: MindSpore parameter name -> name in a published file, one a way of naming ("dialect")."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Callable, Optional, Union

from .methods import split_name

Rule = tuple[str, Union[str, Callable[[re.Match], str]]]


def _counted(template: str, *offsets: int) -> Callable[[re.Match], str]:
    """Where others count from another number than 0: the i-th group plus the i-th offset, put into the template."""
    return lambda match: template.format(*(int(match[i]) + offset for i, offset in enumerate(offsets, start=1)))


TORCH_NORM: tuple[Rule, ...] = (
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"\.moving_mean$", ".running_mean"),
    (r"\.moving_variance$", ".running_var"),
)

SKANET: tuple[Rule, ...] = (
    (r"^stages\.(\d+)\.patch_embed\.", _counted("patch_embed{}.", 1)),
    (r"^stages\.(\d+)\.blocks\.", _counted("block{}.", 1)),
    (r"^stages\.(\d+)\.norm\.", _counted("norm{}.", 1)),
    (r"^classifier\.", "classifier.fc."),
    (r"\.spatial\.graph\.conv\.", ".ska.conv0.gconv.nn.0."),
    (r"\.spatial\.graph\.norm\.", ".ska.conv0.gconv.nn.1."),
    (r"\.spatial\.dw_conv(\d)\.", r".ska.DW_conv\1."),
    (r"\.spatial\.pw_conv\.", ".ska.PW_conv."),
    (r"\.spatial\.norm\.", ".ska.norm."),
    *TORCH_NORM,
)

# VAN's and LSKA's classifiers. A large kernel is one convolution (LKA) or a horizontal and a vertical one (LSKA).
VAN: tuple[Rule, ...] = (
    (r"^stages\.(\d+)\.patch_embed\.", _counted("patch_embed{}.", 1)),
    (r"^stages\.(\d+)\.blocks\.", _counted("block{}.", 1)),
    (r"^stages\.(\d+)\.norm\.", _counted("norm{}.", 1)),
    (r"^classifier\.", "head."),
    (r"\.mlp\.dwconv\.", ".mlp.dwconv.dwconv."),
    (r"\.spatial\.pw_conv\.", ".spatial_gating_unit.conv1."),
    *TORCH_NORM,
)
LKA: tuple[Rule, ...] = (
    (r"\.spatial\.dw_conv\.0\.", ".spatial_gating_unit.conv0."),
    (r"\.spatial\.dw_d_conv\.0\.", ".spatial_gating_unit.conv_spatial."),
    *VAN,
)
LSKA: tuple[Rule, ...] = (
    (r"\.spatial\.dw_conv\.0\.", ".spatial_gating_unit.conv0h."),
    (r"\.spatial\.dw_conv\.1\.", ".spatial_gating_unit.conv0v."),
    (r"\.spatial\.dw_d_conv\.0\.", ".spatial_gating_unit.conv_spatial_h."),
    (r"\.spatial\.dw_d_conv\.1\.", ".spatial_gating_unit.conv_spatial_v."),
    *VAN,
)
# OpenMMLab's; of mmpretrain's files (VAN) and mmsegmentation's alike, without the prefix `backbone.`.
OPENMMLAB: tuple[Rule, ...] = (
    (r"^stages\.(\d+)\.patch_embed\.proj\.", _counted("patch_embed{}.projection.", 1)),
    (r"^stages\.(\d+)\.patch_embed\.", _counted("patch_embed{}.", 1)),
    (r"^stages\.(\d+)\.blocks\.", _counted("blocks{}.", 1)),
    (r"^stages\.(\d+)\.norm\.", _counted("norm{}.", 1)),
    (r"^classifier\.", "head.fc."),
    (r"\.spatial\.pw_conv\.", ".spatial_gating_unit.conv1."),
    *TORCH_NORM,
)
LKA_OPENMMLAB: tuple[Rule, ...] = (
    (r"\.spatial\.dw_conv\.0\.", ".spatial_gating_unit.DW_conv."),
    (r"\.spatial\.dw_d_conv\.0\.", ".spatial_gating_unit.DW_D_conv."),
    *OPENMMLAB,
)
LSKA_OPENMMLAB: tuple[Rule, ...] = (
    (r"\.spatial\.dw_conv\.0\.", ".spatial_gating_unit.DW_conv_h."),
    (r"\.spatial\.dw_conv\.1\.", ".spatial_gating_unit.DW_conv_v."),
    (r"\.spatial\.dw_d_conv\.0\.", ".spatial_gating_unit.DW_D_conv_h."),
    (r"\.spatial\.dw_d_conv\.1\.", ".spatial_gating_unit.DW_D_conv_v."),
    *OPENMMLAB,
)
# Hugging Face's transformers, without the prefixes `van.` and `encoder.`; beside these lies a norm that nothing uses.
HUGGING_FACE: tuple[Rule, ...] = (
    (r"\.patch_embed\.proj\.", ".embeddings.convolution."),
    (r"\.patch_embed\.norm\.", ".embeddings.normalization."),
    (r"^(stages\.\d+)\.norm\.", r"\1.normalization."),
    (r"\.blocks\.", ".layers."),
    (r"\.norm1\.", ".pre_normomalization."),  # their spelling
    (r"\.norm2\.", ".post_normalization."),
    (r"\.spatial\.dw_conv\.0\.", ".attention_layer.attention.depth_wise."),
    (r"\.spatial\.dw_d_conv\.0\.", ".attention_layer.attention.depth_wise_dilated."),
    (r"\.spatial\.pw_conv\.", ".attention_layer.attention.point_wise."),
    (r"\.attn\.proj_1\.", ".attn.pre_projection.conv."),
    (r"\.attn\.proj_2\.", ".attn.post_projection."),
    (r"\.attn\.", ".attention."),
    (r"\.layer_scale_1$", ".attention_scaling.weight"),
    (r"\.layer_scale_2$", ".mlp_scaling.weight"),
    (r"\.mlp\.fc1\.", ".mlp.in_dense."),
    (r"\.mlp\.dwconv\.", ".mlp.depth_wise."),
    (r"\.mlp\.fc2\.", ".mlp.out_dense."),
    *TORCH_NORM,
)

TIMM: tuple[Rule, ...] = (
    (r"^stem\.conv\.", "conv1."),
    (r"^stem\.norm\.", "bn1."),
    (r"^classifier\.", "fc."),
    (r"^stages\.(\d+)\.", _counted("layer{}.", 1)),
    (r"\.proj\.conv\.", ".downsample.0."),
    (r"\.proj\.norm\.", ".downsample.1."),
    (r"\.sk\.fc1\.conv\.", ".sk.attn.fc_reduce."),
    (r"\.sk\.fc1\.norm\.", ".sk.attn.bn."),
    (r"\.sk\.fc2\.", ".sk.attn.fc_select."),
    (r"\.norm\.", ".bn."),
    *TORCH_NORM,
)
TIMM_BASIC: tuple[Rule, ...] = (*TIMM, (r"\.sk\.", ".conv1."), (r"\.increase\.", ".conv2."))
TIMM_BOTTLENECK: tuple[Rule, ...] = (
    *TIMM,
    (r"\.reduce\.", ".conv1."),
    (r"\.sk\.", ".conv2."),
    (r"\.increase\.", ".conv3."),
)

# MindCV's skresnet18 and skresnet34: timm's but for the pooling after the stem.
MINDCV: tuple[Rule, ...] = (
    (r"^stem\.conv\.", "conv1."),
    (r"^stem\.norm\.", "bn1."),
    (r"^classifier\.", "classifier."),
    (r"^stages\.(\d+)\.", _counted("layer{}.", 1)),
    (r"\.proj\.conv\.", ".down_sample.0."),
    (r"\.proj\.norm\.", ".down_sample.1."),
    (r"\.increase\.conv\.", ".conv2.0."),
    (r"\.increase\.norm\.", ".conv2.1."),
    (r"\.sk\.fc1\.conv\.", ".conv1.attn.fc_reduce."),
    (r"\.sk\.fc1\.norm\.", ".conv1.attn.bn."),
    (r"\.sk\.fc2\.", ".conv1.attn.fc_select."),
    (r"\.sk\.paths\.(\d)\.conv\.", r".conv1.paths.\1.features.0."),
    (r"\.sk\.paths\.(\d)\.norm\.", r".conv1.paths.\1.features.1."),
)

# Layer name, a dot, number of the blob.
CAFFE: tuple[Rule, ...] = (
    (r"^stem\.", "conv1/7x7_s2."),
    (r"^stages\.(\d+)\.(\d+)\.", _counted("conv{}_{}/", 2, 1)),
    (r"/(reduce|increase|proj)\.", r"/1x1_\1."),
    (r"/sk\.paths\.0\.", "/3x3g32."),
    (r"/sk\.paths\.1\.", "/3x3g32d2."),
    (r"/sk\.fc1\.", "/B_fc1."),
    (r"/sk\.fc2\.", "/B_fc2."),
    (r"\.conv\.weight$", ".0"),
    (r"\.norm\.gamma$", "/bn.0"),
    (r"\.norm\.beta$", "/bn.1"),
    (r"\.norm\.moving_mean$", "/bn.2"),
    (r"\.norm\.moving_variance$", "/bn.3"),
    (r"\.weight$", ".0"),
    (r"\.bias$", ".1"),
)


@dataclass(frozen=True)
class Dialect:
    """How the published files of some models name their weights.

    Args:
        name: who names them so.
        models: regular expression that the names of our models match.
        rules: what turns a parameter's name into theirs, in order.
        framework: "torch", "caffe", or "mindspore" for our own.
        backbone: the files have no classifier.
        network: arguments of `create_model` that the files' weights need, where they are not our models' defaults.
        bgr: the first convolution expects the channels in the order blue, green, red.
        preprocessing: what the files' weights expect of an image where it is not what our models do.
    """

    name: str
    models: str
    rules: tuple[Rule, ...]
    framework: str = "torch"
    backbone: bool = False
    network: Mapping[str, Any] = field(default_factory=dict)
    bgr: bool = False
    preprocessing: Mapping[str, Any] = field(default_factory=dict)

    def key(self, name: str) -> str:
        """Their name of the MindSpore parameter `name`."""
        for pattern, replacement in self.rules:
            name = re.sub(pattern, replacement, name)
        return name


# Heads of segmenters: MMSegmentation's (semantic FPN, UPerNet), and ml-cvnets' (DeepLabv3).
MMSEGMENTATION: tuple[Rule, ...] = (
    (r"^(neck\.(?:lateral|fpn)_convs\.\d+)\.", r"\1.conv."),
    # Enlargements stand between the convolutions.
    (r"(\.scale_heads\.\d+)\.convs\.(\d+)\.", lambda match: f"{match[1]}.{2 * int(match[2])}."),
    (r"\.psp\.convs\.(\d+)\.", r".psp_modules.\1.1."),
    (r"\.norm\.", ".bn."),
    *TORCH_NORM,
)
CVNETS: tuple[Rule, ...] = (
    (r"^decode_head\.aspp\.4\.", "seg_head.aspp.aspp_layer.convs.4.aspp_pool.conv_1x1.block."),
    (r"^decode_head\.aspp\.(\d)\.", r"seg_head.aspp.aspp_layer.convs.\1.block."),
    (r"^decode_head\.project\.", "seg_head.aspp.aspp_layer.project.block."),
    (r"^decode_head\.conv_seg\.", "seg_head.classifier.block.conv."),
    (r"^auxiliary_head\.convs\.0\.", "seg_head.aux_head.0.block."),
    (r"^auxiliary_head\.conv_seg\.", "seg_head.aux_head.2.block.conv."),
    *TORCH_NORM,
)
# Heads of detectors: MMDetection's, and ml-cvnets' (SSDLite).
MMDETECTION: tuple[Rule, ...] = (
    (r"^(neck\.(?:lateral|fpn)_convs\.\d+)\.", r"\1.conv."),
    (r"(\.(?:cls_|reg_|mask_head\.)convs\.\d+)\.", r"\1.conv."),
)
CVNETS_SSD: tuple[Rule, ...] = (
    (r"^extra_layers\.\d\.conv\.", "extra_layers.os_-1.1.block.conv."),
    (r"^extra_layers\.(\d)\.", lambda match: f"extra_layers.os_{64 << int(match[1])}."),
    (r"\.proj\.", ".proj_layer.block."),
    (r"\.predictor\.(weight|bias)$", r".loc_cls_layer.block.conv.\1"),
    (r"\.predictor\.", ".loc_cls_layer."),
    (r"\.pointwise\.(weight|bias)$", r".pw_conv.block.conv.\1"),
    (r"\.pointwise\.", ".pw_conv.block."),
    (r"\.depthwise\.", ".dw_conv.block."),
    *TORCH_NORM,
)
HEADS = {"semantic_fpn": ("MMSegmentation", MMSEGMENTATION), "upernet": ("MMSegmentation", MMSEGMENTATION),
         "deeplabv3": ("ml-cvnets", CVNETS), "retinanet": ("MMDetection", MMDETECTION),
         "mask_rcnn": ("MMDetection", MMDETECTION), "ssdlite": ("ml-cvnets", CVNETS_SSD)}  # fmt: skip
BACKBONE = "backbone."

# Of the dialects of a model and a framework, the first is the one that we write.
DIALECTS = (
    Dialect("the authors of SkaNet", r"skanet_\w+", SKANET),
    Dialect("the authors of VAN", r"van_[a-z]+", LKA),
    Dialect("the authors of LSKA", r"van_[a-z]+_lska_k\d+", LSKA),
    Dialect("mmpretrain", r"van_[a-z]+", LKA_OPENMMLAB, network={"norm_eps": 1e-5}),
    Dialect("Hugging Face", r"van_[a-z]+", HUGGING_FACE),
    Dialect("mmsegmentation", r"van_[a-z]+_lska_k\d+", LSKA_OPENMMLAB, backbone=True, network={"norm_eps": 1e-5}),
    Dialect("timm", r"sk_resnet(18|34)", TIMM_BASIC),
    Dialect("timm", r"sk_resnet50|sk_resnext50_32x4d|sknet\w+", TIMM_BOTTLENECK),
    Dialect("the authors of SKNet", r"sknet(50|101)", CAFFE, framework="caffe", bgr=True),
    Dialect("mindska", r".*", (), framework="mindspore"),
    Dialect(
        "MindCV",
        r"sk_resnet(18|34)",
        MINDCV,
        framework="mindspore",
        network={"stem": "mindcv"},
        preprocessing={"interpolation": "bilinear"},
    ),
)


@dataclass(frozen=True)
class SegmenterDialect(Dialect):
    """How files name the weights of a segmenter; `rules` are of its heads.

    Args:
        of_backbone: how they name the backbone's.
        prefix: what stands before these: "backbone." or nothing.
    """

    of_backbone: Optional[Dialect] = None
    prefix: str = BACKBONE

    def key(self, name: str) -> str:
        if self.of_backbone and name.startswith(BACKBONE):
            return self.prefix + self.of_backbone.key(name.removeprefix(BACKBONE))
        return super().key(name)


def _segmenters_dialects(method: str, backbone: str, framework: str) -> list[Dialect]:
    who, rules = HEADS[method]
    inner = sorted(dialects(backbone, framework), key=lambda dialect: dialect.name != "mmsegmentation")
    prefixes = (BACKBONE, "") if method in ("deeplabv3", "ssdlite") else (BACKBONE,)
    return [
        SegmenterDialect(f"{who}, {dialect.name}", "", rules, framework, of_backbone=dialect, prefix=prefix)
        for prefix in prefixes
        for dialect in inner
    ]


def dialects(model_name: str, framework: str) -> list[Dialect]:
    """The ways in which files of `framework` name the weights of a model."""
    parts = split_name(model_name)
    if parts and framework != "mindspore":
        return _segmenters_dialects(*parts, framework) if framework == "torch" else []
    return [d for d in DIALECTS if d.framework == framework and re.fullmatch(d.models, model_name)]
