"""SKNet and the SK-ResNets in MindCV's factory: counts, attention, sizes, what MindCV's own differ in."""

import json
from pathlib import Path

import mindcv
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from mindspore.nn.utils import no_init_parameters

from mindska.errors import SettingError, WeightsError
from mindska.models import sk_resnet, sknet
from mindska.models.layers.pooling import StemPool
from mindska.weights import from_caffe, from_torch

COUNTS = json.loads((Path(__file__).parent / "parity" / "goldens" / "counts.json").read_text())
PARAMETERS = {"sknet26": 16_746_408, "sknet29_16x32d": 28_828_200}  # no published definition


def images(*shape, seed=0):
    return Tensor(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


@pytest.mark.parametrize("name", [*sknet.VARIANTS, *sk_resnet.VARIANTS])
def test_parameter_count_of_every_variant(name):
    expected = PARAMETERS.get(name) or COUNTS[name.replace("sk_", "sk")]["params"]
    with no_init_parameters():
        net = mindcv.create_model(name)
    assert sum(p.size for p in net.trainable_params()) == expected


def test_published_widths_of_the_attention():
    for name, widths in (("sknet50", [32, 32, 32, 64]), ("sknet101", [32, 16, 32, 64])):
        with no_init_parameters():
            net = mindcv.create_model(name)
        for stage, width in zip(net.stages, widths):
            assert {unit.sk.fc2.in_channels for unit in stage} == {width}


@pytest.mark.parametrize("name, strides", [("sk_resnet18", (2, 4, 8, 16, 32)), ("sknet29_16x32d", (1, 1, 2, 4))])
def test_features(name, strides):
    net = mindcv.create_model(name, features_only=True).set_train(False)
    x = images(1, 3, 32, 64)
    features = net(x)
    assert [tuple(f.shape[2:]) for f in features] == [(32 // s, 64 // s) for s in strides]
    assert [f.shape[1] for f in features] == net.out_channels
    last = mindcv.create_model(name, features_only=True, out_indices=[len(strides) - 1]).set_train(False)
    assert len(last(x)) == 1


@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE])
def test_too_small_is_an_error_that_says_the_smallest_size(mode, tmp_path, monkeypatch):
    """Before anything is compiled: MindSpore would leave files where it fails."""
    monkeypatch.chdir(tmp_path)
    with no_init_parameters():
        nets = [mindcv.create_model("sknet26", features_only=features).set_train(False) for features in (False, True)]
    ms.set_context(mode=mode)
    for net in nets:
        with pytest.raises(SettingError, match="at least 3 pixels on each side, .* 2x9. The smallest .* is 3x3"):
            net(images(1, 3, 2, 9))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_smallest_sizes():
    for name, side in (("sknet26", 3), ("sk_resnet18", 1), ("sknet29_16x32d", 1)):
        net = mindcv.create_model(name, num_classes=2).set_train(False)
        assert np.isfinite(net(images(1, 3, side, side)).asnumpy()).all()
        assert net(images(1, 3, side, 8)).shape == net(images(1, 3, 4, side)).shape == (1, 2)


def test_attention_weights_choose_between_the_paths():
    net = mindcv.create_model("sk_resnet18").set_train(False)
    x = images(2, 3, 64, 64)
    weights = net.attention_weights(x)
    assert list(weights)[:3] == ["stages.0.0", "stages.0.1", "stages.1.0"] and len(weights) == 8
    for name, weight in weights.items():
        stage = int(name.split(".")[1])
        assert weight.shape == (2, 2, 64 * 2**stage)
        np.testing.assert_allclose(weight.asnumpy().sum(1), 1, atol=1e-6)
    # They decide: a path that is chosen alone is the whole output.
    unit = net.stages[0][0].sk
    unit.fc2.weight.set_data(ms.ops.zeros_like(unit.fc2.weight))
    y = images(1, 64, 8, 8)
    half, even = unit(y), unit.attention(unit.fuse(unit.split(y)))
    np.testing.assert_allclose(even.asnumpy(), 0.5)
    parts = ms.ops.chunk(y, 2, axis=1)
    np.testing.assert_allclose(
        half.asnumpy(), (0.5 * (unit.paths[0](parts[0]) + unit.paths[1](parts[1]))).asnumpy(), atol=1e-6
    )


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (8, 9), (11, 6)])
def test_pooling_after_the_stem_is_caffes_or_timms(size):
    import torch

    x = abs(images(1, 2, *size).asnumpy())
    caffe = torch.nn.functional.max_pool2d(torch.from_numpy(x), 3, 2, ceil_mode=True).numpy()
    np.testing.assert_array_equal(StemPool(padded=False)(Tensor(x)).asnumpy(), caffe)
    timm = torch.nn.functional.max_pool2d(torch.from_numpy(x), 3, 2, padding=1).numpy()
    np.testing.assert_array_equal(StemPool(padded=True)(Tensor(x)).asnumpy(), timm)


@pytest.mark.parametrize("size", [(32, 32), (65, 97), (320, 320)])
def test_any_size(size):
    net = mindcv.create_model("sknet26", num_classes=7).set_train(False)
    out = net(images(1, 3, *size)).asnumpy()
    assert out.shape == (1, 7) and np.isfinite(out).all()


def test_timms_units_start_as_their_shortcut():
    zero = [cell.increase.norm.gamma.asnumpy().any() for cell in mindcv.create_model("sk_resnet18").stages[1]]
    assert zero == [False, False]
    assert all(unit.increase.norm.gamma.asnumpy().all() for unit in mindcv.create_model("sknet26").stages[0])


def test_initial_values():
    net = mindcv.create_model("sknet50")
    weight = net.stages[2][1].increase.conv.weight.asnumpy()
    assert weight.std() == pytest.approx((2 / 1024) ** 0.5, rel=0.02)
    bound = 1 / 2048**0.5
    classifier = net.classifier.weight.asnumpy()
    assert abs(classifier).max() <= bound and classifier.std() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_mindcvs_own_are_left_alone_and_differ():
    theirs = mindcv.create_model("skresnext50_32x4d")
    assert type(theirs).__module__.startswith("mindcv.")
    assert sum(p.size for p in theirs.trainable_params()) == 37_245_352


def test_pretrained_is_an_error():
    with pytest.raises(ValueError, match="No MindSpore weights are published for sknet50"):
        mindcv.create_model("sknet50", pretrained=True)


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(WeightsError, match="No caffe weights of sk_resnet18 are published"):
        from_caffe("sk_resnet18", {})
    with pytest.raises(WeightsError, match=r"keys that are missing \(442\):\s+classifier.0"):
        from_caffe("sknet50", {"conv2_1/1x1_reduce": [np.zeros((128, 64, 1, 1))]})
    with pytest.raises(WeightsError, match="not sk_resnet34's"):
        from_torch("sk_resnet34", {"conv1.weight": np.zeros((64, 3, 7, 7))})


@pytest.mark.slow
def test_graph_and_pynative_agree():
    net, x = mindcv.create_model("sk_resnet18", num_classes=10).set_train(False), images(2, 3, 65, 64)
    interpreted = net(x).asnumpy()
    ms.set_context(mode=ms.GRAPH_MODE)
    np.testing.assert_allclose(net(x).asnumpy(), interpreted, atol=1e-5 * np.abs(interpreted).max())


def test_drop_path_follows_the_given_numbers():
    net = mindcv.create_model("sk_resnet18", num_classes=5, drop_path_rate=0.5, drop_rate=0.2).set_train(True)
    for stage in net.stages:  # else the units start as their shortcut, and nothing is dropped
        for unit in stage:
            unit.increase.norm.gamma.set_data(ms.ops.ones_like(unit.increase.norm.gamma))
    noise = np.random.default_rng(1).random((4, net.noise_size), dtype=np.float32)
    first = net(images(4, 3, 64, 64), Tensor(noise)).asnumpy()
    np.testing.assert_array_equal(first, net(images(4, 3, 64, 64), Tensor(noise)).asnumpy())
    assert not np.allclose(first, net(images(4, 3, 64, 64), Tensor(1 - noise)).asnumpy())
