"""The folded network is the same function, with fewer operations."""

from contextlib import nullcontext

import mindcv
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindska import kernels
from mindska.errors import SettingError
from mindska.folding import fold

MODELS = ["skanet_nano", "van_tiny", "van_tiny_lska_k23", "sknet26", "sk_resnet18", "sknet29_16x32d"]


def settled(name, **keywords):
    """A network whose statistics, scales and biases are as different as after a training."""
    net, rng = mindcv.create_model(name, num_classes=10, **keywords).set_train(False), np.random.default_rng(0)
    for p in net.get_parameters():
        values = {
            "moving_variance": lambda shape: np.exp(0.3 * rng.standard_normal(shape)),
            "moving_mean": lambda shape: 0.2 * rng.standard_normal(shape),
            "beta": lambda shape: 0.2 * rng.standard_normal(shape),
            "gamma": lambda shape: 1 + 0.2 * rng.standard_normal(shape),
            "bias": lambda shape: 0.1 * rng.standard_normal(shape),
            "layer_scale_1": lambda shape: rng.uniform(0.01, 0.1, shape),
            "layer_scale_2": lambda shape: rng.uniform(0.01, 0.1, shape),
        }.get(p.name.split(".")[-1])
        if values:
            p.set_data(Tensor(values(p.shape).astype(np.float32)))
    return net


def outputs(net, size):
    x = Tensor(np.random.default_rng(1).standard_normal((2, 3, *size), dtype=np.float32))
    found = net(x)
    return [f.asnumpy() for f in (found if isinstance(found, (list, tuple)) else (found,))]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_same_function(name):
    """Float32 noise is 1e-6 of the deviation at each rounding."""
    net = settled(name)
    size = (64, 96) if name != "sknet29_16x32d" else (32, 32)
    before = outputs(net, size)
    fold(net)
    for ours, expected in zip(outputs(net, size), before):
        assert np.sqrt(np.mean((ours - expected) ** 2)) < 1e-4 * expected.std()
    left = [type(cell).__name__ for _, cell in net.cells_and_names() if isinstance(cell, nn.BatchNorm2d)]
    assert not left
    names = [p.name for p in net.get_parameters()]
    assert len(set(names)) == len(names) and not any("layer_scale" in name for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("folded_plain", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["skanet_nano", pytest.param("van_tiny_lska_k7", marks=pytest.mark.slow), "sknet26"])
def test_with_plain_operators(name, folded_plain):
    """As exports are folded; and a network of plain operators that is folded where others can be had."""
    with kernels.plain():
        net = settled(name)
    before = outputs(net, (64, 64))
    with kernels.plain() if folded_plain else nullcontext():
        fold(net)
    for ours, expected in zip(outputs(net, (64, 64)), before):
        assert np.sqrt(np.mean((ours - expected) ** 2)) < 1e-4 * expected.std()


def test_a_folded_network_is_not_folded_again():
    with pytest.raises(SettingError, match="folded already"):
        fold(fold(settled("sk_resnet18")))


def test_other_networks_are_not_folded():
    with pytest.raises(SettingError, match="ResNet is not one of mindska's networks"):
        fold(mindcv.create_model("resnet18"))


@pytest.mark.slow
def test_features_and_graph_mode():
    net = settled("van_tiny_lska_k7", features_only=True)
    before = outputs(net, (64, 64))
    fold(net)
    assert all(not p.name.startswith("net.") for p in net.get_parameters())
    ms.set_context(mode=ms.GRAPH_MODE)
    for ours, expected in zip(outputs(net, (64, 64)), before):
        assert np.sqrt(np.mean((ours - expected) ** 2)) < 1e-4 * expected.std()
