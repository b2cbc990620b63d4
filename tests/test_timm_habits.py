"""timm's words for networks: num_classes=0, in_chans, global_pool, reset_classifier, forward_features, forward_head."""

import logging
from functools import partial

import mindcv
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindska.acceleration import is_accelerated
from mindska.errors import SettingError
from mindska.folding import fold
from mindska.weights.files import write_checkpoint

SLOW = pytest.mark.slow
FAMILIES = ["skanet_nano", pytest.param("van_tiny_lska_k7", marks=SLOW), pytest.param("sk_resnet18", marks=SLOW)]
IMAGES = Tensor(np.random.default_rng(0).standard_normal((2, 3, 64, 64), dtype=np.float32))


def make(name, *, like=None, **keywords):
    net = mindcv.create_model(name, **keywords).set_train(False)
    if like is not None:
        values = {p.name: p for p in like.get_parameters()}
        for p in net.get_parameters():
            p.set_data(values[p.name])
    return net


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow
def test_the_parts_are_the_whole(name, folded):
    """Without a classifier a network gives its pooled features; the classifier on them gives the logits."""
    full = make(name, num_classes=7)
    bare, maps = make(name, num_classes=0, like=full), make(name, num_classes=0, global_pool="", like=full)
    greatest = make(name, num_classes=0, global_pool="max", like=full)
    accelerated = is_accelerated(full)
    for net in (full, bare, maps, greatest):
        if folded:
            fold(net)
        assert is_accelerated(net) == accelerated
    logits, pooled, last = full(IMAGES), bare(IMAGES), full.forward_features(IMAGES)
    assert pooled.shape == (2, full.num_features) and last.shape == (2, full.num_features, 2, 2)
    # Folded and accelerated, the whole is one operator, whose sums have another order.
    same = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6) if folded else np.testing.assert_array_equal
    same(full.get_classifier()(pooled).asnumpy(), logits.asnumpy())
    same(full.forward_head(last).asnumpy(), logits.asnumpy())
    same(full.forward_head(last, pre_logits=True).asnumpy(), pooled.asnumpy())
    same(maps(IMAGES).asnumpy(), last.asnumpy())
    same(greatest(IMAGES).asnumpy(), last.asnumpy().max((2, 3)))
    assert type(full.get_classifier()) is nn.Dense and type(bare.get_classifier()) is nn.Identity


@pytest.mark.slow
def test_the_parts_in_graph_mode(graph):
    full = make("skanet_nano", num_classes=7)
    bare = make("skanet_nano", num_classes=0, global_pool="max", like=full)
    expected = full.forward_features(IMAGES).asnumpy().max((2, 3))
    np.testing.assert_allclose(bare(IMAGES).asnumpy(), expected, rtol=1e-4, atol=1e-5)
    before = full(IMAGES).asnumpy()
    full.reset_classifier(3, "max")
    assert before.shape == (2, 7) and full(IMAGES).shape == (2, 3)
    full.reset_classifier(0)
    np.testing.assert_allclose(full(IMAGES).asnumpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_reset_classifier(name):
    net = make(name, num_classes=7)
    names, features = [p.name for p in net.get_parameters()], net.forward_features(IMAGES).asnumpy()
    net.reset_classifier(4)
    assert [p.name for p in net.get_parameters()] == names and net(IMAGES).shape == (2, 4)
    assert net.num_classes == 4 and net.get_classifier().weight.shape == (4, net.num_features)
    np.testing.assert_array_equal(net.forward_features(IMAGES).asnumpy(), features)
    assert 0 < float(net.get_classifier().weight.std()) < 0.1
    net.reset_classifier(0)
    assert net(IMAGES).shape == (2, net.num_features)
    net.reset_classifier(5, "max")
    assert net.global_pool == "max" and net(IMAGES).shape == (2, 5) and net.options["global_pool"] == "max"
    assert [p.name for p in net.get_parameters()] == names
    net.set_train(True).reset_classifier(2)
    assert net.get_classifier().training


def test_words_that_make_no_sense():
    for keywords, message in (
        (dict(num_classes=-1), "num_classes is -1"),
        (dict(num_classes=2.5), "num_classes is 2.5"),
        (dict(num_classes=True), "num_classes is True"),
        (dict(global_pool="catavgmax"), "global_pool is 'catavgmax'; expected 'avg', 'max', or ''"),
        (dict(global_pool=""), "it needs num_classes=0"),
        (dict(in_chans=4, in_channels=1), "in_channels is 1 and in_chans 4; give one of them"),
    ):
        with pytest.raises(SettingError, match=message):
            mindcv.create_model("skanet_nano", **keywords)
    net = make("skanet_nano", num_classes=7)
    with pytest.raises(SettingError, match="global_pool='' leaves a map"):
        net.reset_classifier(3, "")
    assert net(IMAGES).shape == (2, 7)
    features = make("skanet_nano", features_only=True)
    assert type(features.get_classifier()) is nn.Identity
    with pytest.raises(SettingError, match="features_only has no classifier to reset"):
        features.reset_classifier(3)
    with pytest.raises(SettingError, match="takes images"):
        net.forward_features(IMAGES[:, :2])


def test_in_chans_is_in_channels():
    for keywords in (dict(in_chans=1), dict(in_chans=1, in_channels=1), dict(in_channels=1)):
        assert mindcv.create_model("skanet_nano", num_classes=0, **keywords)(IMAGES[:, :1]).shape == (2, 96)


@pytest.mark.slow
def test_weights_without_their_classifier(tmp_path, caplog):
    """They load into a network without a classifier, which is said; pooling is recorded where it matters."""
    full = make("skanet_nano", num_classes=7, global_pool="max")
    record = dict(model="skanet_nano", num_classes=7, network={"global_pool": "max"})
    write_checkpoint(tmp_path / "a.ckpt", {p.name: p for p in full.get_parameters()}, record)
    path = str(tmp_path / "a.ckpt")
    with caplog.at_level(logging.WARNING, "mindska"):
        bare = mindcv.create_model("skanet_nano", num_classes=0, checkpoint_path=path).set_train(False)
    assert "a.ckpt: its classifier is left out" in caplog.text
    np.testing.assert_array_equal(bare.forward_features(IMAGES).asnumpy(), full.forward_features(IMAGES).asnumpy())
    with pytest.raises(ValueError, match="was trained with global_pool='max'.* Pass global_pool='max'"):
        mindcv.create_model("skanet_nano", num_classes=7, checkpoint_path=path)
    from mindska.weights import open_weights

    np.testing.assert_array_equal(open_weights(path).network()(IMAGES).asnumpy(), full(IMAGES).asnumpy())
    ms.save_checkpoint(bare, str(tmp_path / "bare.ckpt"))
    again = mindcv.create_model("skanet_nano", num_classes=0, checkpoint_path=str(tmp_path / "bare.ckpt"))
    np.testing.assert_array_equal(again.set_train(False)(IMAGES).asnumpy(), bare(IMAGES).asnumpy())
