"""VAN and SKNet: the measured differences between the port, the goldens and the PyTorch references."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import mindcv
import mindspore as ms
import numpy as np
import torch
import training
from golden import golden_input, golden_weights, rms
from mindspore import Tensor, nn, ops
from training import Gradients

import mindska  # noqa: F401  registers the models
from mindska.reference import sknet as torch_sknet
from mindska.reference import van as torch_van
from mindska.weights import from_caffe, from_torch, load_into, to_torch

# golden case -> our model
CASES = {
    "lska_van_tiny_k23_224": "van_tiny_lska_k23",
    "lska_van_base_k7_224": "van_base_lska_k7",
    "sknet50_224": "sknet50",
    "timm_skresnet18_224": "sk_resnet18",
    "timm_skresnext50_32x4d_224": "sk_resnext50_32x4d",
}
# our model -> the original's name, where the goldens have its keys
ORIGINALS = {
    "van_tiny_lska_k23": "lska_van_tiny_k23",
    "van_base_lska_k7": "lska_van_base_k7",
    "sknet50": "sknet50",
    "sknet101": "sknet101",
    "sk_resnet18": "skresnet18",
    "sk_resnet34": "skresnet34",
    "sk_resnet50": "skresnet50",
    "sk_resnext50_32x4d": "skresnext50_32x4d",
}
CAFFE = ("sknet50", "sknet101")
# The models whose training is compared, what is overridden there, and the size and seed of the images.
# In SKNet-50 a batch norm in every unit divides by the deviation of a few pooled numbers, about 1e-2: over 16 units
# float32 loses five digits, PyTorch's own as well (gradients 2 % from float64's). One unit a stage loses none.
# A ReLU whose input is zero to rounding opens here and not there, and moves a gradient by 1e-3. The SKNets' images
# were searched: with them PyTorch's float32 gradients stay within 7e-6 of float64's when the images get noise of 3e-7.
# (sk_resnet18's once more, for MindSpore's plain operators on a processor with other roundings.)
TRAINED = {
    "van_tiny_lska_k23": ({}, 64, 0),
    "sknet50": (dict(depths=(1, 1, 1, 1)), 32, 3),
    "sk_resnet18": ({}, 64, 14),
}
LEARNING_RATE = 1e-4
# The goldens' names of what the references call otherwise.
CAFFE_TAPS = dict(
    pool1_3x3_s2="stem", conv2_3="layer1", conv3_4="layer2", conv4_6="layer3", conv5_3="layer4", avepool_7x7="pool"
)


def caffe_layers(model: str) -> dict[str, list[np.ndarray]]:
    """The goldens' weights as Caffe has them: layer -> blobs, vectors as (1, C, 1, 1)."""
    layers: dict[str, list[np.ndarray]] = {}
    for key, tensor in golden_weights(model).items():
        layer, _, _ = key.rpartition(".")
        blob = tensor.numpy()
        layers.setdefault(layer, []).append(blob.reshape(1, -1, 1, 1) if "/bn" in layer else blob)
    return layers


@cache
def weights(model: str) -> Mapping[str, np.ndarray]:
    """The goldens' weights for one of our models."""
    if model in CAFFE:
        return from_caffe(model, caffe_layers(model))
    return from_torch(model, golden_weights(ORIGINALS[model]))


def network_input(case: str) -> np.ndarray:
    """What the port and the references get. The Caffe golden's input is in BGR, as its network wants it."""
    x = golden_input(case)
    return np.ascontiguousarray(x[:, ::-1]) if CASES[case] in CAFFE else x


def reference(model: str, **overrides) -> torch.nn.Module:
    """The PyTorch reference with the goldens' weights, in eval mode."""
    module = torch_van if model.startswith("van") else torch_sknet
    net = module.create(model, **overrides)
    state, own = to_torch(model, weights(model)), net.state_dict()
    state = {key: torch.from_numpy(value) for key, value in state.items() if key in own or not overrides}
    result = net.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and all(key.endswith("num_batches_tracked") for key in result.missing_keys)
    return net.eval()


def port(model: str, **kwargs) -> nn.Cell:
    """The port with the goldens' weights, in eval mode."""
    net = mindcv.create_model(model, **kwargs)
    own = {p.name for p in net.get_parameters()}
    load_into(net, {name: value for name, value in weights(model).items() if name in own or not kwargs})
    return net.set_train(False)


def named(taps: Mapping, case: str) -> dict[str, np.ndarray]:
    """Taps under the golden's names."""
    if CASES[case] in CAFFE:
        taps = {**{name: taps[ours] for name, ours in CAFFE_TAPS.items()}, "logits": taps["logits"]}
    return {name: np.asarray(tap) for name, tap in taps.items()}


@cache
def reference_taps(case: str) -> dict[str, np.ndarray]:
    net = reference(CASES[case])
    with torch.no_grad():
        return named(net.taps(torch.from_numpy(network_input(case))), case)


@cache
def port_taps(case: str) -> dict[str, np.ndarray]:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    net, x = port(CASES[case]), Tensor(network_input(case))
    taps = {}
    if CASES[case].startswith("van"):
        for i, stage in enumerate(net.stages, start=1):
            x = stage.patch_embed(x)
            taps[f"stage{i}_embed"] = x
            for block in stage.blocks:
                x = block(x)
            taps[f"stage{i}_block"] = x
            x = stage.norm(x)
            taps[f"stage{i}_norm"] = x
    else:
        stem, *stages = net.forward_stages(x)
        taps = {"stem": net.pool(stem), **{f"layer{i}": stage for i, stage in enumerate(stages, start=1)}}
        taps["pool"] = ops.mean(stages[-1], (2, 3), keep_dims=True)
    taps["logits"] = net(Tensor(network_input(case)))
    return named({name: tap.asnumpy() for name, tap in taps.items()}, case)


@cache
def batch(model: str) -> tuple[np.ndarray, list[int]]:
    """Eight images and labels for the training comparisons."""
    _, size, seed = TRAINED[model]
    rng = np.random.default_rng(seed)
    return rng.standard_normal((8, 3, size, size), dtype=np.float32), rng.integers(0, 1000, 8).tolist()


@cache
def port_gradients(model: str) -> Gradients:
    return training.gradients(port(model, **TRAINED[model][0]), *batch(model))


@cache
def reference_gradients(model: str) -> Gradients:
    """In float64."""
    return training.reference_gradients(reference(model, **TRAINED[model][0]).double(), *batch(model))


@cache
def sgd_losses(model: str) -> tuple[np.ndarray, np.ndarray]:
    """Losses before and after five steps, ours (in the mode that is set) and the reference's in float64."""
    overrides = TRAINED[model][0]
    ours = training.sgd_losses(port(model, **overrides), *batch(model), lr=LEARNING_RATE, steps=6)
    theirs = reference(model, **overrides).double()
    return ours, training.reference_sgd_losses(theirs, *batch(model), lr=LEARNING_RATE, steps=6)


def statistics_error(model: str) -> float:
    """Largest difference of a running statistic after one step, relative to the largest of its tensor."""
    ours, theirs = port_gradients(model).state, reference_gradients(model).state
    return max(
        float(np.abs(ours[key] - theirs[key]).max() / np.abs(theirs[key]).max()) for key in ours if "running" in key
    )


def gradient_errors(model: str) -> tuple[dict[str, float], dict[str, float]]:
    """Per parameter: relative difference of the gradient's norm, and, where it is zero in exact arithmetic (a bias
    before a batch norm), our norm itself."""
    ours, theirs = port_gradients(model).gradients, reference_gradients(model).gradients
    relative, absolute = {}, {}
    for name, expected in theirs.items():
        norm, found = np.linalg.norm(expected), np.linalg.norm(ours[name].astype(np.float64))
        if norm > 1e-9:
            relative[name] = abs(found - norm) / norm
        else:
            absolute[name] = found
    return relative, absolute


def random_case(model: str, size: tuple[int, int], seed: int = 1) -> float:
    """Difference of the logits from the float64 reference's, with random weights and a batch of two random images."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    net = (torch_van if model.startswith("van") else torch_sknet).create(model).eval()
    for name, p in net.named_parameters():
        if "layer_scale" in name:  # of both signs: with one the sum over 38 blocks explodes
            torch.nn.init.uniform_(p, -0.5, 0.5)
        elif p.ndim == 1:  # batch norms and biases: away from their trivial values
            torch.nn.init.uniform_(p, 0.3, 1.2)
    for name, statistic in net.named_buffers():
        if "running" in name:
            statistic.copy_(torch.from_numpy(rng.uniform(0.5, 1.5, statistic.shape)))
    ours = mindcv.create_model(model).set_train(False)
    load_into(ours, from_torch(model, net.state_dict()))
    x = rng.standard_normal((2, 3, *size), dtype=np.float32)
    with torch.no_grad():
        expected = net.double()(torch.from_numpy(x).double()).numpy()
    return rms(ours(Tensor(x)).asnumpy(), expected)
