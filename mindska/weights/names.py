"""Explicit name maps, one a model family: MindSpore parameter name -> key in the authors' PyTorch state dict."""

from __future__ import annotations

import re
from typing import Callable, Union

Rule = tuple[str, Union[str, Callable[[re.Match], str]]]


def _one_based(template: str) -> Callable[[re.Match], str]:
    """The authors number stages from 1, we from 0."""
    return lambda match: template.format(int(match[1]) + 1)


NORM: tuple[Rule, ...] = (
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"\.moving_mean$", ".running_mean"),
    (r"\.moving_variance$", ".running_var"),
)

SKANET: tuple[Rule, ...] = (
    (r"^stages\.(\d+)\.patch_embed\.", _one_based("patch_embed{}.")),
    (r"^stages\.(\d+)\.blocks\.", _one_based("block{}.")),
    (r"^stages\.(\d+)\.norm\.", _one_based("norm{}.")),
    (r"^classifier\.", "classifier.fc."),
    (r"\.ska\.graph\.conv\.", ".ska.conv0.gconv.nn.0."),
    (r"\.ska\.graph\.norm\.", ".ska.conv0.gconv.nn.1."),
    (r"\.ska\.dw_conv(\d)\.", r".ska.DW_conv\1."),
    (r"\.ska\.pw_conv\.", ".ska.PW_conv."),
    *NORM,
)

FAMILIES: dict[str, tuple[Rule, ...]] = {"mindska.models.skanet": SKANET}


def torch_key(name: str, rules: tuple[Rule, ...]) -> str:
    """The authors' key of the MindSpore parameter `name`."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
