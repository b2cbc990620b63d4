"""SkaNet in MindCV's factory: sizes, features, precision, errors."""

import json
from pathlib import Path

import mindcv
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from mindska.errors import SettingError
from mindska.models.layers import graph
from mindska.models.layers.graph import NearestNodes, bicubic_taps, relative_position
from mindska.models.skanet import VARIANTS, fewest_nodes

PARAMETERS = {"skanet_s": 5_535_120, "skanet_nano": 419_140}
SIZES = json.loads((Path(__file__).parent / "parity" / "goldens" / "skanet_input_sizes.json").read_text())


def images(*shape, seed=0):
    return Tensor(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def nano(**kwargs):
    return mindcv.create_model("skanet_nano", num_classes=10, **kwargs).set_train(False)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_count_of_every_variant(name):
    assert sum(p.size for p in mindcv.create_model(name).trainable_params()) == PARAMETERS[name]


def test_the_factory_lists_them():
    assert mindcv.list_models("skanet*") == sorted(VARIANTS)
    assert mindcv.list_models("skanet*", pretrained=True) == []


def test_classes_and_channels():
    assert nano(in_channels=1)(images(2, 1, 64, 64)).shape == (2, 10)


def test_initial_values():
    net = mindcv.create_model("skanet_s")
    values = {p.name: p.asnumpy() for p in net.get_parameters()}
    fan_out = 512 * 9 // 512  # a depthwise 3x3
    assert values["stages.0.blocks.0.mlp.dwconv.weight"].std() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    assert values["stages.0.blocks.0.mlp.fc1.weight"].std() == pytest.approx((2 / 512) ** 0.5, rel=0.05)
    assert values["classifier.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert abs(values["classifier.weight"]).max() > 0.06  # not cut at two deviations
    assert all((value == 0).all() for name, value in values.items() if name.endswith("bias"))
    assert (values["stages.3.blocks.1.layer_scale_2"] == np.float32(1e-2)).all()


def test_no_decay_on_one_dimension():
    net = nano()
    names = net.no_weight_decay()
    assert names == {p.name for p in net.trainable_params() if len(p.shape) == 1}
    assert "stages.0.blocks.0.layer_scale_1" in names


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (96, 160)])
def test_features_at_four_strides(size):
    net = nano(features_only=True)
    features = net(images(1, 3, *size))
    expected = [(1, c, -(-size[0] // s), -(-size[1] // s)) for c, s in zip((16, 32, 64, 96), (4, 8, 16, 32))]
    assert [f.shape for f in features] == expected
    assert net.out_channels == [16, 32, 64, 96]


def test_selected_features_are_those_of_the_classifier(tmp_path):
    full = nano()
    ms.save_checkpoint(full, str(tmp_path / "a.ckpt"))
    some = nano(features_only=True, out_indices=[1, 3], checkpoint_path=str(tmp_path / "a.ckpt"))
    x = images(2, 3, 64, 64)
    second, last = some(x)
    assert second.shape[1] == 32
    logits = full.classifier(ops.mean(last, (2, 3))).asnumpy()
    np.testing.assert_array_equal(logits, full(x).asnumpy())
    with pytest.raises(ValueError, match=r"\[4\] do not exist.*3 \(stride 32\)"):
        nano(features_only=True, out_indices=[0, 4])


@pytest.mark.parametrize(
    "out_indices, channels",
    [
        (None, [16, 32, 64, 96]),
        ([3, 0], [16, 96]),  # in the order of the network
        ((-1,), [96]),
        ([-1, 1, 3], [32, 96]),
        (2, [64, 96]),  # the last two
        (np.int64(1), [96]),
        (range(1, 3), [32, 64]),
    ],
)
def test_features_are_chosen_as_in_timm(out_indices, channels):
    net = nano(features_only=True, out_indices=out_indices)
    assert [feature.shape[1] for feature in net(images(1, 3, 64, 64))] == channels == net.out_channels


@pytest.mark.parametrize("out_indices", [[4], [-5], 5, 0, -1, [], "1", [1.5], 2.0])
def test_features_that_there_are_not(out_indices):
    with pytest.raises(SettingError, match=r"out_indices is .* do not exist.*3 \(stride 32\)"):
        nano(features_only=True, out_indices=out_indices)


def test_pretrained_is_an_error_and_not_a_random_network():
    with pytest.raises(ValueError, match="No MindSpore weights are published for skanet_nano"):
        nano(pretrained=True)


@pytest.mark.parametrize("size", [(32, 32), (16, 16), (64, 31)])
def test_too_small_is_an_error_that_says_the_smallest_size(size):
    with pytest.raises(ValueError, match="at least 4 nodes.*smallest square input is 33x33") as error:
        nano()(images(1, 3, *size))
    assert f"{size[0]}x{size[1]}" in str(error.value)


def test_features_of_too_small_an_image_are_an_error():
    with pytest.raises(ValueError, match="smallest square input is 33x33"):
        mindcv.create_model("skanet_nano").forward_features(images(1, 3, 32, 32))


@pytest.mark.slow
def test_smallest_size_of_skanet_s():
    net = mindcv.create_model("skanet_s").set_train(False)
    with pytest.raises(ValueError, match="smallest square input is 65x65"):
        net(images(1, 3, 64, 64))
    assert np.isfinite(net(images(1, 3, 65, 65)).asnumpy()).all()


@pytest.mark.parametrize("size", [s for s in SIZES if not s.startswith("32x")][::7] + ["128x128", "129x129"])
def test_sizes_at_which_the_authors_code_stops_work_here(size):
    """Any of the sizes they list, those with an error included: one batch, square or not."""
    h, w = map(int, size.split("x"))
    out = nano()(images(2, 3, h, w)).asnumpy()
    assert out.shape == (2, 10) and np.isfinite(out).all()


def test_the_map_is_as_wide_as_the_number_of_pooled_nodes():
    # 129x129: 33x33 nodes, pooled by 4 to 8x8; the authors' map has 33 * 33 // 16 = 68 columns, and their sum fails.
    assert relative_position(64, 33 * 33, 64).shape == (33 * 33, 64)
    assert fewest_nodes(129, 129) == 25


def test_dilation_shrinks_to_what_fits():
    rng = np.random.default_rng(0)
    x = Tensor(rng.standard_normal((1, 16, 64), dtype=np.float32))
    np.testing.assert_array_equal(NearestNodes(5, 5)(x, x).asnumpy(), NearestNodes(5, 3)(x, x).asnumpy())


def test_bicubic_weights_sum_to_one_and_interpolate_exactly_at_the_same_size():
    sources, weights = bicubic_taps(100, 7)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    assert sources.min() >= 0 and sources.max() <= 99
    _, identity = bicubic_taps(9, 9)
    np.testing.assert_array_equal(identity, np.tile(np.float32([0, 1, 0, 0]), (9, 1)))


@pytest.mark.slow
def test_graph_and_pynative_agree():
    net, x = nano(), images(2, 3, 96, 64)
    interpreted = net(x).asnumpy()
    ms.set_context(mode=ms.GRAPH_MODE)
    np.testing.assert_allclose(net(x).asnumpy(), interpreted, atol=1e-5 * np.abs(interpreted).max())


def test_a_batch_is_its_samples():
    net, x = nano(), images(3, 3, 64, 64)
    together = net(x).asnumpy()
    for i in range(3):
        np.testing.assert_allclose(net(x[i : i + 1]).asnumpy()[0], together[i], atol=1e-5)


class Searches(nn.Cell):
    """What a graph convolution searches among, and what it finds."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def construct(self, x):
        queries, keys = self.graph.nodes(x)
        return queries, keys, self.graph.search(queries, keys), self.graph(x)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE])
@pytest.mark.parametrize("level", ["O2", "O3", "auto"])
def test_neighbour_search_stays_in_float32_under_mixed_precision(level, mode):
    """Features whose distances differ by less than half precision resolves are still told apart."""
    ms.set_context(mode=mode)
    probe = Searches(mindcv.create_model("skanet_nano").stages[1].blocks[0].attn.spatial.graph).set_train(False)
    ms.amp.auto_mixed_precision(probe, level)
    x = (1 + 1e-2 * np.random.default_rng(0).standard_normal((1, 32, 16, 16))).astype(np.float16)
    queries, keys, found, out = probe(Tensor(x.astype(np.float32)))
    assert out.dtype == ms.float16 or level == "auto", "the network around it is not in half precision"
    exact = [Tensor(side.asnumpy().astype(np.float32)) for side in (queries, keys)]
    np.testing.assert_array_equal(found.asnumpy(), NearestNodes(4, 1)(*exact).asnumpy())


@pytest.mark.slow
@pytest.mark.parametrize("level", ["O2", "O3", "auto"])
def test_whole_network_under_mixed_precision(level):
    net = nano()
    exact = net(images(2, 3, 64, 64)).asnumpy()
    ms.amp.auto_mixed_precision(net, level)
    half = net(images(2, 3, 64, 64)).asnumpy().astype(np.float32)
    assert 0 < np.abs(half - exact).max() < 0.05 * np.abs(exact).max() + 0.01


def test_drop_path_follows_the_given_numbers():
    net = nano(drop_path_rate=0.5, drop_rate=0.5).set_train(True)
    x = images(4, 3, 64, 64)
    noise = np.random.default_rng(1).random((4, net.noise_size), dtype=np.float32)
    first = net(x, Tensor(noise)).asnumpy()
    np.testing.assert_array_equal(first, net(x, Tensor(noise)).asnumpy())
    other = np.random.default_rng(2).random((4, net.noise_size), dtype=np.float32)
    assert not np.allclose(first, net(x, Tensor(other)).asnumpy())
    assert not np.allclose(first, net(x).asnumpy())  # without them MindSpore draws
    net.set_train(False)
    np.testing.assert_array_equal(net(x, Tensor(noise)).asnumpy(), net(x).asnumpy())


@pytest.mark.parametrize("name", ["drop_rate", "drop_path_rate"])
def test_rates_are_probabilities(name):
    with pytest.raises(ValueError, match=rf"{name} is 1.5"):
        nano(**{name: 1.5})


@pytest.mark.slow
def test_the_relative_position_of_a_dense_size_is_made_in_strips():
    """Of 512x512 the whole map of the first stage has 16,384 x 16,384 numbers, a gigabyte: it is never made. What is
    made is, to rounding, what the whole map would give when it is interpolated."""
    import tracemalloc

    for channels, nodes, reduced in ((64, 1600, 100), (16, 1156, 64), (96, 1300, 324)):
        grid = int(nodes**0.5)
        embedding = graph.sincos_pos_embed(channels, grid)
        whole = (2 * embedding @ embedding.T / channels).astype(np.float32)
        columns, weights = graph.bicubic_taps(grid * grid, reduced)
        whole = sum(whole[:, columns[:, i]] * weights[:, i] for i in range(4))
        if grid * grid != nodes:
            rows, weights = graph.bicubic_taps(grid * grid, nodes)
            whole = sum(whole[rows[:, i]] * weights[:, i, None] for i in range(4))
        np.testing.assert_allclose(graph.relative_position(channels, nodes, reduced), -whole, atol=3e-7)
    graph.relative_position.cache_clear()
    tracemalloc.start()
    result = graph.relative_position(16, 128 * 128, 32 * 32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    graph.relative_position.cache_clear()
    assert result.shape == (16384, 1024) and peak < 0.6 * 2**30
