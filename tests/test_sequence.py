"""A folded network as one operator: the same bits as its accelerated cells one after the other, and when it is used."""

from functools import cache

import mindcv
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from test_folding import settled

from mindska import kernels
from mindska.acceleration import decelerated, sequence
from mindska.acceleration.form import apply_form, clear_compile_cache, remove_form
from mindska.folding import fold
from mindska.modes import graph_mode, pynative_mode

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C++ operators")
MODES = {"graph": graph_mode, "PyNative": pynative_mode}
# Of sums in another order, through all layers: the classifier's, and of what MindSpore computes for single cells.
ROUNDING = 1e-5


def images(*shape, seed=0):
    return Tensor(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


@cache
def folded(name, **keywords):
    return fold(settled(name, **keywords))


def arrays(outputs):
    return [o.asnumpy() for o in (outputs if isinstance(outputs, (tuple, list)) else (outputs,))]


def backbone(net):
    return getattr(net, "net", net)


def cell_by_cell(net, x):
    """What the accelerated cells give without the sequence."""
    form = type(backbone(net))
    remove_form(backbone(net))
    clear_compile_cache(net)
    try:
        with pynative_mode():  # which compiles nothing
            return arrays(net(x))
    finally:
        apply_form(backbone(net), form)
        clear_compile_cache(net)


def has_sequence(net, x):
    return backbone(net).sequences.plan(x.shape) is not None


FAST = {"van_tiny_lska_k23": (2, 64, 96)}
SLOW = {
    "van_tiny": (1, 96, 64), "van_tiny_lska_k7": (3, 100, 70), "van_small_lska_k53": (1, 64, 64),
    "skanet_nano": (2, 64, 96), "skanet_s": (1, 128, 96), "sknet26": (2, 64, 96), "sknet29_16x32d": (3, 32, 32),
    "sk_resnet18": (2, 100, 71), "sk_resnet50": (1, 64, 64), "sk_resnext50_32x4d": (1, 65, 90),
}  # fmt: skip


def compare(net, x, exact):
    """In both modes."""
    expected = cell_by_cell(net, x)
    for mode in MODES.values():
        with mode():
            for ours, cells in zip(arrays(net(x)), expected):
                np.testing.assert_allclose(ours, cells, atol=0 if exact else ROUNDING * np.abs(cells).max(), rtol=0)


@pytest.mark.parametrize(
    "name, shape", [*FAST.items(), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW.items())]
)
def test_it_computes_what_the_cells_do(name, shape):
    """VAN's maps are the same to the bit: the same operators run. Other cells have poolings of MindSpore's."""
    batch, height, width = shape
    features, logits = folded(name, features_only=True), folded(name)
    x = images(batch, 3, height, width)
    assert has_sequence(features, x) and has_sequence(logits, x)
    compare(features, x, exact=name.startswith("van"))
    compare(logits, x, exact=False)


@pytest.mark.slow
def test_other_strides_and_stems():
    for name, keywords in (("van_tiny_lska_k7", dict(output_stride=8)), ("sknet26", dict(output_stride=16)),
                           ("sk_resnext50_32x4d", dict(stem="mindcv"))):  # fmt: skip
        net = folded(name, features_only=True, **keywords)
        for size in ((64, 64), (67, 75)):
            x = images(2, 3, *size)
            assert has_sequence(net, x)
            compare(net, x, exact=False)


@pytest.mark.slow
@pytest.mark.fault("sequence")
def test_changed_weights_are_seen():
    net, x = fold(settled("van_tiny_lska_k7")), images(1, 3, 64, 64)
    for mode in MODES.values():
        with mode():
            before = net(x).asnumpy()
            for parameter in net.get_parameters():
                parameter.set_data(parameter.value() * 1.01)
            after = net(x).asnumpy()
            assert np.abs(after - before).max() > 1e-3
            np.testing.assert_allclose(after, cell_by_cell(net, x)[0], atol=ROUNDING * np.abs(after).max(), rtol=0)


@pytest.mark.slow
def test_one_network_takes_many_shapes_and_another_classifier():
    net = fold(settled("van_tiny_lska_k7"))
    for shape in ((1, 3, 64, 64), (2, 3, 64, 64), (1, 3, 40, 72), (1, 3, 64, 64), (2, 3, 9, 7)):
        (ours,), (expected,) = arrays(net(images(*shape))), cell_by_cell(net, images(*shape))
        np.testing.assert_allclose(ours, expected, atol=ROUNDING * np.abs(expected).max(), rtol=0)
    net.reset_classifier(3, "max")
    x = images(1, 3, 64, 64)
    assert has_sequence(net, x) and net(x).shape == (1, 3)
    np.testing.assert_allclose(net(x).asnumpy(), cell_by_cell(net, x)[0], atol=1e-5, rtol=0)
    net.reset_classifier(0, "")
    np.testing.assert_array_equal(net(x).asnumpy(), cell_by_cell(net, x)[0])


def test_networks_of_the_same_shapes_have_their_own():
    first, second = folded("van_tiny_lska_k7"), fold(mindcv.create_model("van_tiny_lska_k7", num_classes=7))
    x = images(1, 3, 64, 64)
    for net in (second, first, second):
        np.testing.assert_allclose(net(x).asnumpy(), cell_by_cell(net, x)[0], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_where_it_is_not_used():
    net, x = folded("van_tiny_lska_k7"), images(1, 3, 64, 64)
    assert isinstance(net, sequence.SequencedBackbone)
    assert not isinstance(settled("van_tiny_lska_k7"), sequence.SequencedBackbone)  # not folded
    with kernels.plain():
        plain = fold(settled("van_tiny_lska_k7"))
    assert not isinstance(plain, sequence.SequencedBackbone)
    expected = cell_by_cell(net, x)[0]
    for change in (
        lambda: net.set_train(True),
        lambda: net.add_flags_recursive(fp16=False),
        lambda: net.set_train(False),
    ):
        change()
        np.testing.assert_allclose(net(x).asnumpy(), expected, atol=1e-5, rtol=0)
    with decelerated(net):
        assert not isinstance(net, sequence.SequencedBackbone)
        np.testing.assert_allclose(net(x).asnumpy(), expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(net(x).asnumpy(), expected, atol=1e-5, rtol=0)


def test_a_plan_reuses_its_buffers():
    net = backbone(folded("van_tiny_lska_k7"))
    plan = net.sequences.plan((1, 3, 224, 224))
    largest = 32 * 56 * 56  # floats of the largest map
    assert plan.arena <= 4 * largest


def test_half_precision_weights_have_no_sequence():
    net, x = fold(settled("van_tiny_lska_k7")), images(1, 3, 64, 64)
    net.to_float(ms.float16)
    assert np.isfinite(net(x).asnumpy()).all()


@pytest.mark.slow
@pytest.mark.fault("sequence")
def test_it_says_that_it_has_no_gradient():
    net, x = folded("van_tiny_lska_k7"), images(1, 3, 64, 64)

    def total(batch):  # graph mode parses no lambda here
        return net(batch).sum()

    for mode in MODES.values():
        with mode(), pytest.raises(ValueError, match="has no gradient on the CPU: take that of the network before"):
            ms.grad(total)(x)
    with decelerated(net):
        assert np.abs(ms.grad(total)(x).asnumpy()).max() > 0
