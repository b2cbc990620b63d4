"""VAN and LSKA in MindCV's factory: kernels, sizes, weights."""

import json
import re
from pathlib import Path

import mindcv
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from mindspore.nn.utils import no_init_parameters

from mindska.errors import WeightsError
from mindska.models.van import KERNELS, VARIANTS
from mindska.weights import from_torch, to_torch

COUNTS = json.loads((Path(__file__).parent / "parity" / "goldens" / "counts.json").read_text())
# The goldens count LSKA's classifiers up to van_base, and the backbone of van_large_lska_k23: 43,724,224, and 513,000
# for the classifier. Another kernel differs by its taps, in each of the 11,008 channels that have an attention.
PARAMETERS = {
    "van_tiny": 4_105_800,
    "van_small": 13_861_800,
    "van_base": 26_578_472,
    "van_large": 44_765_608,
    "van_large_lska_k7": 44_105_128,
    "van_large_lska_k11": 44_149_160,
    "van_large_lska_k23": 44_237_224,
    "van_large_lska_k35": 44_325_288,
    "van_large_lska_k41": 44_369_320,
    "van_large_lska_k53": 44_457_384,
}


def images(*shape, seed=0):
    return Tensor(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def state(name):
    return to_torch(name, {p.name: p.asnumpy() for p in mindcv.create_model(name).get_parameters()})


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_count_of_every_variant(name):
    expected = PARAMETERS.get(name) or COUNTS[re.sub(r"(van_\w+)_lska", r"lska_\1", name)]["params"]
    with no_init_parameters():
        net = mindcv.create_model(name)
    assert sum(p.size for p in net.trainable_params()) == expected


def test_the_factory_lists_them():
    assert mindcv.list_models("van_tiny*") == sorted(["van_tiny", *(f"van_tiny_lska_k{k}" for k in KERNELS)])


def test_the_kernel_as_a_keyword():
    net = mindcv.create_model("van_tiny", k_size=23)
    assert net.model_name == "van_tiny_lska_k23"
    assert sum(p.size for p in net.trainable_params()) == COUNTS["lska_van_tiny_k23"]["params"]
    assert mindcv.create_model("van_tiny").model_name == "van_tiny"
    with pytest.raises(ValueError, match="k_size is 21; LSKA's kernels are 7, 11, 23, 35, 41, 53"):
        mindcv.create_model("van_tiny", k_size=21)
    with pytest.raises(ValueError, match="van_tiny_lska_k7 has the kernel 7, but k_size=23"):
        mindcv.create_model("van_tiny_lska_k7", k_size=23)


@pytest.mark.parametrize("k", KERNELS)
def test_kernels_have_their_size(k):
    """An impulse spreads as far as the kernel reaches, in both directions."""
    from mindska.models.van import LargeKernelAttention

    net = LargeKernelAttention(1, k, separable=True)
    for p in net.get_parameters():
        p.set_data(ms.ops.zeros_like(p) if p.name.endswith("bias") else ms.ops.ones_like(p))
    x = np.zeros((1, 1, 81, 81), np.float32)
    x[0, 0, 40, 40] = 1
    reached = net.dw_d_conv(net.dw_conv(Tensor(x))).asnumpy()[0, 0] > 0
    kernel, dilated, dilation = KERNELS[k]
    span = kernel + dilation * (dilated - 1)
    assert reached.any(1).sum() <= span and np.ptp(np.flatnonzero(reached.any(1))) + 1 == span
    assert np.ptp(np.flatnonzero(reached.any(0))) + 1 == span
    assert 0 <= span - k <= dilation


@pytest.mark.slow
def test_a_kernel_larger_than_the_image():
    """k=53 at 64x64 pixels, where the last stage has 2x2 positions."""
    net = mindcv.create_model("van_tiny_lska_k53").set_train(False)
    interpreted = net(images(2, 3, 64, 64)).asnumpy()
    ms.set_context(mode=ms.GRAPH_MODE)
    np.testing.assert_allclose(net(images(2, 3, 64, 64)).asnumpy(), interpreted, atol=1e-5 * abs(interpreted).max())


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (32, 32)])
def test_features_at_four_strides(size):
    net = mindcv.create_model("van_tiny_lska_k7", features_only=True, out_indices=[0, 3]).set_train(False)
    expected = [(1, c, -(-size[0] // s), -(-size[1] // s)) for c, s in ((32, 4), (256, 32))]
    assert [f.shape for f in net(images(1, 3, *size))] == expected


@pytest.mark.slow
def test_weights_of_another_kernel_are_refused_and_both_are_named(tmp_path):
    with pytest.raises(WeightsError, match="not van_tiny_lska_k7's, but van_tiny_lska_k23's"):
        from_torch("van_tiny_lska_k7", state("van_tiny_lska_k23"))
    with pytest.raises(WeightsError, match="not van_tiny_lska_k23's, but van_tiny's"):
        from_torch("van_tiny_lska_k23", state("van_tiny"))
    ms.save_checkpoint(mindcv.create_model("van_tiny_lska_k23"), str(tmp_path / "a.ckpt"))
    with pytest.raises(WeightsError, match="a.ckpt does not fit van_tiny_lska_k7. .* but van_tiny_lska_k23's"):
        mindcv.create_model("van_tiny_lska_k7", checkpoint_path=str(tmp_path / "a.ckpt"))


@pytest.mark.slow
def test_mmsegmentations_weights_need_their_epsilon(tmp_path):
    import torch

    from mindska.weights.convert import key_map
    from mindska.weights.names import dialects

    name = "van_tiny_lska_k11"
    parameters = {p.name: p.asnumpy() for p in mindcv.create_model(name).get_parameters()}
    keys = key_map(name, dialects(name, "torch")[1])
    torch.save(
        {"state_dict": {key: torch.from_numpy(parameters[ours]) for ours, key in keys.items()}}, tmp_path / "a.pth"
    )
    arguments = dict(features_only=True, checkpoint_path=str(tmp_path / "a.pth"))
    with pytest.raises(
        WeightsError, match="a.pth was trained with norm_eps=1e-05; .*Pass norm_eps=1e-05 to create_model"
    ):
        mindcv.create_model(name, **arguments)
    mindcv.create_model(name, norm_eps=1e-5, **arguments)


def test_drop_path_follows_the_given_numbers():
    net = mindcv.create_model("van_tiny_lska_k7", num_classes=5, drop_path_rate=0.5).set_train(True)
    noise = np.random.default_rng(1).random((4, net.noise_size), dtype=np.float32)
    first = net(images(4, 3, 64, 64), Tensor(noise)).asnumpy()
    np.testing.assert_array_equal(first, net(images(4, 3, 64, 64), Tensor(noise)).asnumpy())
    assert not np.allclose(first, net(images(4, 3, 64, 64), Tensor(1 - noise)).asnumpy())
