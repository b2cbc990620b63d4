"""Converted weights against the PyTorch reference with the source's own (for `mindska convert --verify`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mindspore import Tensor

from ..errors import SettingError
from ..weights import Weights
from ..weights.convert import as_float32, in_network, key_map
from ..weights.methods import is_detector, split_name
from ..weights.names import SegmenterDialect, dialects
from . import create, rms

# Float32 against float64 (tests/parity/test_families.py). SkaNet may swap neighbours that are equally near to rounding.
BOUNDS = {"skanet": 1e-3}
DETECTORS_SIZE = (320, 320)  # at most, of images for detectors: they take any


def reference_keys(model_name: str) -> dict[str, str]:
    """MindSpore parameter name -> the reference's key; of what is built on a backbone, its authors' below
    `backbone.`."""
    parts = split_name(model_name)
    if not parts:
        return key_map(model_name)
    authors = dialects(parts[1], "torch")[0]
    found = [d for d in dialects(model_name, "torch") if isinstance(d, SegmenterDialect) and d.of_backbone == authors]
    return key_map(model_name, found[0])


def flat(output: Any) -> list[Any]:
    """The tensors of an output: one, or those of several tuples."""
    return [x for part in output for x in flat(part)] if isinstance(output, (tuple, list)) else [output]


def compare(weights: Weights) -> tuple[float, float]:
    """The rms difference of the outputs over their standard deviation, on two random images, and its bound."""
    built_on = split_name(weights.model)
    family = (built_on[1] if built_on else weights.model).split("_")[0].rstrip("0123456789")
    if weights.in_channels != 3:
        raise SettingError(f"--verify: the reference takes images of 3 channels, these weights {weights.in_channels}")
    overrides = {"num_classes": weights.num_classes} if weights.num_classes else {}
    try:
        reference: Any = create(weights.model, **{**overrides, **weights.non_default_options})
    except TypeError as error:
        raise SettingError(f"--verify: the reference has no option {', '.join(weights.non_default_options)}") from error
    arrays = in_network(weights.source.named, weights.model).arrays
    theirs, state = key_map(weights.model, weights.dialect), reference.state_dict()
    for name, key in reference_keys(weights.model).items():
        if name in theirs and name in weights.parameters:  # a backbone has no classifier
            value = as_float32(arrays[theirs[name]])
            state[key] = torch.from_numpy(value).reshape(state[key].shape)
    reference.load_state_dict(state)
    size = weights.preprocessing["image_size"]
    size = tuple(map(min, size, DETECTORS_SIZE)) if is_detector(weights.model) else size
    images = np.random.default_rng(0).standard_normal((1 if built_on else 2, 3, *size), dtype=np.float32)
    network: Any = weights.network()
    bgr = weights.dialect is not None and weights.dialect.bgr
    inputs = np.ascontiguousarray(images[:, ::-1]) if bgr else images
    if built_on:
        with torch.no_grad():
            expected = reference.double().eval()(torch.from_numpy(inputs).double())
        pairs = list(zip(flat(network(Tensor(images))), flat(expected)))
        return max(rms(ours.asnumpy(), theirs.numpy()) for ours, theirs in pairs), BOUNDS.get(family, 5e-6)
    with torch.no_grad():
        taps = reference.double().eval().taps(torch.from_numpy(inputs).double())
    outputs = network(Tensor(images))
    if weights.num_classes:
        return rms(outputs.asnumpy(), taps["logits"].numpy()), BOUNDS.get(family, 5e-6)
    stages = [rms(outputs[i].asnumpy(), taps[f"stage{i + 1}_norm"].numpy()) for i in range(len(outputs))]
    return max(stages), BOUNDS.get(family, 5e-6)
