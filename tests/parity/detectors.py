"""The detectors in plain PyTorch, with the originals' keys, from their maps on to what NumPy takes over.

Written from MMDetection's and cvnets' structure; that their maps are the goldens' is what makes them a reference.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from golden import fill, image
from torch import nn

from mindska.reference import skanet, van

HERE = Path(__file__).parent / "goldens_dense"


@cache
def dense_golden(case: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Description and arrays of a golden of dense prediction."""
    with np.load(HERE / f"{case}.npz") as arrays:
        return json.loads((HERE / f"{case}.json").read_text()), dict(arrays)


def dense_weights(case: str) -> dict[str, torch.Tensor]:
    """The golden's weights under the original's keys."""
    meta, _ = dense_golden(case)
    weights = {}
    for key, shape in meta["keys"]:
        array = fill(key, shape)
        if "layer_scale" in key:
            array = array * np.float32(meta.get("layer_scale_factor", 1))
        for pattern, (factor, shift) in meta["weight_override"].items():
            if re.fullmatch(pattern, key):
                array = (array * np.float32(factor) + np.float32(shift)).astype(np.float32)
        weights[key] = torch.from_numpy(np.ascontiguousarray(array))
    return weights


def dense_input(case: str) -> torch.Tensor:
    meta, _ = dense_golden(case)
    return torch.from_numpy(image(meta["image_seed"], meta["input"]))


NAMES = {
    r"patch_embed(\d)\.projection": r"patch_embed\1.proj",
    r"blocks(\d)\.": r"block\1.",
    r"\.DW_conv_([hv])": r".conv0\1",
    r"\.DW_D_conv_([hv])": r".conv_spatial_\1",
    r"mlp\.dwconv\.": "mlp.dwconv.dwconv.",
}


def van_tiny_lska_k23(weights: dict[str, torch.Tensor]) -> van.VAN:
    """The backbone of MMDetection's files."""
    network = van.create("van_tiny_lska_k23", norm_eps=1e-5)
    renamed = {}
    for key, value in weights.items():
        if key.startswith("backbone."):
            name = key[len("backbone.") :]
            for pattern, new in NAMES.items():
                name = re.sub(pattern, new, name)
            renamed[name] = value
    left = network.load_state_dict(renamed, strict=False)
    assert not left.unexpected_keys and all(key.startswith("head.") for key in left.missing_keys), left
    return network.eval()


class Convolutions:
    """Convolutions whose weights are looked up by their names."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights

    def __call__(self, name: str, x: torch.Tensor, stride: int = 1, groups: int = 1) -> torch.Tensor:
        weight = self.weights[f"{name}.weight"]
        padding = weight.shape[-1] // 2
        return F.conv2d(x, weight, self.weights.get(f"{name}.bias"), stride, padding, groups=groups)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        values = [self.weights[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *values)

    def fpn(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        laterals = [self(f"neck.lateral_convs.{i}.conv", x) for i, x in enumerate(features)]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=laterals[i - 1].shape[2:])
        return [self(f"neck.fpn_convs.{i}.conv", x) for i, x in enumerate(laterals)]


def stages(network: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    taps = network.taps(images)
    return [taps[f"stage{i}_norm"] for i in range(1, 5)]


@cache
@torch.no_grad()
def retinanet_maps(case: str) -> dict[str, list[np.ndarray]]:
    """`cls` and `reg` of each level, (B, channels, h, w)."""
    weights = dense_weights(case)
    conv = Convolutions(weights)
    features = stages(van_tiny_lska_k23(weights), dense_input(case))
    levels = conv.fpn(features[1:])
    levels.append(conv("neck.fpn_convs.3.conv", features[-1], stride=2))
    levels.append(conv("neck.fpn_convs.4.conv", levels[-1], stride=2))
    maps: dict[str, list[np.ndarray]] = {"cls": [], "reg": []}
    for x in levels:
        for kind, out in maps.items():
            y = x
            for i in range(4):
                y = F.relu(conv(f"bbox_head.{kind}_convs.{i}.conv", y))
            out.append(conv(f"bbox_head.retina_{kind}", y).numpy())
    return maps


class MaskRcnn:
    """Maps of the RPN, and the heads on features of boxes."""

    @torch.no_grad()
    def __init__(self, case: str) -> None:
        weights = dense_weights(case)
        self.conv = Convolutions(weights)
        levels = self.conv.fpn(stages(van_tiny_lska_k23(weights), dense_input(case)))
        self.pyramid = [x.numpy() for x in levels]
        levels.append(F.max_pool2d(levels[-1], 1, stride=2))
        self.rpn_cls, self.rpn_reg = [], []
        for x in levels:
            y = F.relu(self.conv("rpn_head.rpn_conv", x))
            self.rpn_cls.append(self.conv("rpn_head.rpn_cls", y).numpy())
            self.rpn_reg.append(self.conv("rpn_head.rpn_reg", y).numpy())

    @torch.no_grad()
    def box_head(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, 256, 7, 7) -> scores (n, 81), deltas (n, 320)."""
        x, weights = torch.from_numpy(features).flatten(1), self.conv.weights

        def linear(name: str, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, weights[f"roi_head.bbox_head.{name}.weight"], weights[f"roi_head.bbox_head.{name}.bias"])

        for i in range(2):
            x = F.relu(linear(f"shared_fcs.{i}", x))
        return linear("fc_cls", x).numpy(), linear("fc_reg", x).numpy()

    @torch.no_grad()
    def mask_head(self, features: np.ndarray) -> np.ndarray:
        """(n, 256, 14, 14) -> (n, 80, 28, 28)."""
        x, name = torch.from_numpy(features), "roi_head.mask_head"
        for i in range(4):
            x = F.relu(self.conv(f"{name}.convs.{i}.conv", x))
        weights = self.conv.weights
        x = F.relu(F.conv_transpose2d(x, weights[f"{name}.upsample.weight"], weights[f"{name}.upsample.bias"], 2))
        return self.conv(f"{name}.conv_logits", x).numpy()


@cache
@torch.no_grad()
def ssdlite_outputs(case: str) -> dict[str, np.ndarray]:
    """`confidences` (B, priors, 81) and `locations` (B, priors, 4)."""
    weights = dense_weights(case)
    backbone = skanet.create("skanet_s")
    left = backbone.load_state_dict(weights, strict=False)
    assert all(re.match(r"(extra_layers|ssd_heads)\.", key) for key in left.unexpected_keys), left
    conv = Convolutions(weights)

    def separable(name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        x = conv.norm(f"{name}.dw_conv.block.norm", conv(f"{name}.dw_conv.block.conv", x, stride, x.shape[1]))
        x = conv(f"{name}.pw_conv.block.conv", x)
        if f"{name}.pw_conv.block.norm.weight" in weights:
            x = F.relu(conv.norm(f"{name}.pw_conv.block.norm", x))
        return x

    maps = stages(backbone.eval(), dense_input(case))[2:]
    for stride in (64, 128, 256):
        maps.append(separable(f"extra_layers.os_{stride}", maps[-1], 2))
    maps.append(F.relu(conv("extra_layers.os_-1.1.block.conv", maps[-1].mean((2, 3), keepdim=True))))
    scores, places = [], []
    for i, x in enumerate(maps):
        name = f"ssd_heads.{i}"
        if f"{name}.proj_layer.block.conv.weight" in weights:
            x = F.relu(conv.norm(f"{name}.proj_layer.block.norm", conv(f"{name}.proj_layer.block.conv", x)))
        name = f"{name}.loc_cls_layer"
        x = separable(name, x) if i < 5 else conv(f"{name}.block.conv", x)
        x = x.permute(0, 2, 3, 1).reshape(len(x), -1, 85)
        places.append(x[..., :4])
        scores.append(x[..., 4:])
    return dict(confidences=torch.cat(scores, 1).numpy(), locations=torch.cat(places, 1).numpy())
