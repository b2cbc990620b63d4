"""Every accelerated form computes what its plain cell does: forward and gradient, in every state, in either mode."""

import re
from functools import cache

import mindcv
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindska import kernels
from mindska.acceleration import (
    FORMS,
    accelerate,
    boxes,
    decelerate,
    decelerated,
    is_accelerated,
    sequence,
    slow_convolutions,
    summary,
)
from mindska.acceleration.form import AcceleratedForm
from mindska.folding import fold
from mindska.models.layers.blocks import GELU, Attention, Block, ConvMlp, LayerNorm2d, PatchEmbed, batch_norm, conv
from mindska.models.layers.graph import MaxRelativeConv
from mindska.models.layers.pixel_loss import IGNORED, PixelCrossEntropy
from mindska.models.layers.resize import Bilinear
from mindska.models.skanet import SplitKernelAttention
from mindska.models.sknet import ConvNorm, SelectiveKernel, SKUnit
from mindska.models.van import LargeKernelAttention

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C++ operators")

TRAINING, INFERENCE, NORMS_ALONE = "training", "inference", "batch norms alone in training"
# Rounding of float32 in cells of a few layers, in parts of the largest value: sums of up to 2,000 products.
ROUNDING = 2e-5


def sk_unit(cin, stride):
    sk = SelectiveKernel(16, 16, 8, ((3, 1), (3, 2)), 4, stride, 0.9, split_input=False)
    proj = ConvNorm(cin, 32, 0.9, relu=False, stride=stride) if cin != 32 else nn.Identity()
    return SKUnit(ConvNorm(cin, 16, 0.9), sk, ConvNorm(16, 32, 0.9, relu=False), proj, 0.5)


def attention(dim):
    return Attention(dim, SplitKernelAttention(dim, 4, 1, 2))


class Enlarged(nn.Cell):
    """Twice as large, and a bit."""

    def __init__(self) -> None:
        super().__init__()
        self.resize = Bilinear()

    def construct(self, x):
        return self.resize(x, (2 * x.shape[2], 2 * x.shape[3] + 1))


class PixelLoss(nn.Cell):
    """The loss of logits that are enlarged beyond the labels."""

    def __init__(self) -> None:
        super().__init__()
        labels = np.random.default_rng(3).integers(0, 12, (2, 33, 26)).astype(np.int32)
        labels[:, ::3, ::2] = IGNORED
        self.labels, self.loss = Tensor(labels), PixelCrossEntropy(False, True)

    def construct(self, x):
        return self.loss(x, self.labels, (36, 28)).reshape(1)


# A cell's maker, and the shape of its input.
CELLS = {
    "pointwise": (lambda: conv(12, 20), (2, 12, 9, 7)),
    "pointwise without bias": (lambda: conv(12, 20, has_bias=False), (2, 12, 9, 7)),
    "pointwise in groups": (lambda: conv(12, 20, group=4), (2, 12, 9, 7)),
    "depthwise": (lambda: conv(12, 12, 3, group=12), (2, 12, 9, 7)),
    "depthwise line": (lambda: conv(12, 12, (1, 7), dilation=3, group=12), (2, 12, 9, 7)),
    "grouped": (lambda: conv(12, 8, 3, dilation=2, group=4), (2, 12, 9, 7)),
    "strided": (lambda: conv(3, 8, 7, 4), (2, 3, 33, 20)),
    "GELU": (GELU, (2, 12, 9, 7)),
    "layer norm": (lambda: LayerNorm2d(12), (2, 12, 9, 7)),
    "batch norm": (lambda: batch_norm(12), (2, 12, 9, 7)),
    "patch embedding": (lambda: PatchEmbed(3, 16, 7, 4), (2, 3, 33, 20)),
    "MLP, small map": (lambda: ConvMlp(16, 32), (2, 16, 9, 7)),
    "MLP, large map": (lambda: ConvMlp(8, 16), (2, 8, 48, 48)),
    "LKA": (lambda: LargeKernelAttention(16, 23, separable=False), (2, 16, 9, 7)),
    "LSKA": (lambda: LargeKernelAttention(16, 7, separable=True), (2, 16, 9, 7)),
    "split kernel attention": (lambda: SplitKernelAttention(16, 4, 1, 2), (2, 16, 8, 6)),
    "max-relative convolution": (lambda: MaxRelativeConv(16, 4, 2, 1), (2, 16, 8, 6)),
    "SkaNet's block": (lambda: Block(16, attention(16), 2, 0.5), (2, 16, 8, 6)),
    "SkaNet's block, large map": (lambda: Block(8, attention(8), 2, 0.5), (2, 8, 48, 48)),
    "VAN's block": (lambda: Block(16, Attention(16, LargeKernelAttention(16, 7, True)), 2, 0.0), (2, 16, 9, 7)),
    "ConvNorm": (lambda: ConvNorm(12, 20, 0.9), (2, 12, 9, 7)),
    "ConvNorm without ReLU": (lambda: ConvNorm(12, 20, 0.9, relu=False), (2, 12, 9, 7)),
    "ConvNorm, grouped": (lambda: ConvNorm(12, 8, 0.9, kernel=3, group=4), (2, 12, 9, 7)),
    "ConvNorm, strided": (lambda: ConvNorm(3, 8, 0.9, kernel=3, stride=2), (2, 3, 33, 20)),
    "ConvNorm, MindSpore's": (lambda: ConvNorm(12, 8, 0.9, kernel=3), (2, 12, 9, 7)),
    "selective kernel": (lambda: SelectiveKernel(16, 16, 8, ((3, 1), (3, 2)), 4, 1, 0.9, False), (3, 16, 9, 7)),
    "SK unit": (lambda: sk_unit(32, 1), (3, 32, 9, 7)),
    "SK unit, smaller": (lambda: sk_unit(24, 2), (3, 24, 9, 7)),
}
# Of heads. Apart from the others: random values of those stay.
DENSE = {
    "winograd": (lambda: conv(16, 20, 3), (2, 16, 9, 17)),
    "winograd without bias": (lambda: conv(20, 16, 3, dilation=2, has_bias=False), (2, 20, 12, 15)),
    "winograd, small map": (lambda: conv(16, 20, 3), (2, 16, 9, 7)),
    "ConvNorm, winograd": (lambda: ConvNorm(16, 20, 0.9, kernel=3), (2, 16, 9, 17)),
    "ConvNorm, winograd, small map": (lambda: ConvNorm(16, 20, 0.9, kernel=3), (2, 16, 9, 7)),
    "bilinear": (Enlarged, (2, 12, 9, 7)),
    "loss of a segmenter": (PixelLoss, (2, 12, 9, 7)),
}
FOLDED = (
    "max-relative convolution", "SkaNet's block", "SkaNet's block, large map", "VAN's block", "ConvNorm",
    "SK unit",
)  # fmt: skip
STATES = [("cells", TRAINING), ("cells", INFERENCE), ("cells", NORMS_ALONE), ("folded", INFERENCE)]
STATES += [("dense", state) for state in (TRAINING, INFERENCE, NORMS_ALONE)]
QUICK = [("pynative", "folded", INFERENCE), *(("pynative", "dense", state) for state in (TRAINING, INFERENCE))]


class SideBySide(nn.Cell):
    """Many cells, compiled at once: the sum of their outputs times `factors`, and the outputs."""

    def __init__(self, cells: dict[str, nn.Cell]) -> None:
        super().__init__()
        self.cells_ = nn.CellList(list(cells.values()))
        self.takes_noise = [isinstance(cell, (Block, SKUnit)) for cell in cells.values()]

    def construct(self, inputs, noise, factors):
        outputs, total = (), 0.0
        for cell, takes_noise, x, cell_noise, factor in zip(self.cells_, self.takes_noise, inputs, noise, factors):
            y = cell(x, cell_noise) if takes_noise else cell(x)
            outputs += (y,)
            total = total + (y * factor).sum()
        return total, outputs


@cache
def networks() -> dict[str, tuple[SideBySide, tuple, tuple, list[str]]]:
    """Cells to train and folded ones: the network, its inputs, its parameters' values, its cells' names."""
    rng = np.random.default_rng(0)
    made, makers = {}, {**CELLS, **DENSE}
    for kind, names in (("cells", list(CELLS)), ("folded", list(FOLDED)), ("dense", list(DENSE))):
        cells = {name: makers[name][0]() for name in names}
        for i, cell in enumerate(cells.values()):
            for p in cell.get_parameters():
                value = rng.standard_normal(p.shape)
                if p.ndim > 1:
                    value /= np.sqrt(np.prod(p.shape[1:]))  # products keep their inputs' size
                p.set_data(Tensor(np.float32(np.abs(value) + 0.5 if "variance" in p.name else value)))
                p.name = f"{i}.{p.name}"
        if kind == "folded":
            holder = nn.CellList([fold(nn.CellList([cell])) for cell in cells.values()])
            cells = {name: holder[i][0] for i, name in enumerate(names)}
        net = SideBySide(cells)
        for name, p in net.parameters_and_names():
            p.name = name
        shapes = [makers[name][1] for name in names]
        inputs = tuple(Tensor(rng.standard_normal(shape).astype(np.float32)) for shape in shapes)
        # Of each stochastic depth, some samples are kept and others dropped.
        drop_path_noise = np.float32([[0.2, 0.7], [0.7, 0.2], [0.3, 0.3]])
        noise = tuple(
            Tensor(drop_path_noise[: shape[0]] if "block" in name else drop_path_noise[: shape[0], 0].copy())
            for name, shape in zip(names, shapes)
        )
        made[kind] = net, (inputs, noise), {p.name: p.asnumpy().copy() for p in net.get_parameters()}, names
    return made


def results(kind: str, change, state: str) -> dict[str, np.ndarray]:
    """Outputs, gradients and new statistics of the cells, accelerated or not."""
    net, (inputs, noise), values, names = networks()[kind]
    change(net).set_train(state == TRAINING)
    if state == NORMS_ALONE:
        for _, cell in net.cells_and_names():
            if isinstance(cell, nn.BatchNorm2d):
                cell.set_train(True)
    for p in net.get_parameters():
        p.set_data(Tensor(values[p.name]))
    shapes = [y.shape for y in net(inputs, noise, tuple(Tensor(np.float32(0)) for _ in inputs))[1]]
    for p in net.get_parameters():
        p.set_data(Tensor(values[p.name]))
    rng = np.random.default_rng(1)
    factors = tuple(Tensor(rng.standard_normal(shape).astype(np.float32)) for shape in shapes)

    def loss(inputs):
        return net(inputs, noise, factors)

    weights = net.trainable_params()
    (_, outputs), (dinputs, dweights) = ms.value_and_grad(loss, 0, weights, has_aux=True)(inputs)
    found = {f"{name}: output": y.asnumpy() for name, y in zip(names, outputs)}
    found.update({f"{name}: gradient of the input": d.asnumpy() for name, d in zip(names, dinputs)})
    for p, d in zip(weights, dweights):
        found[f"{names[int(p.name.split('.')[1])]}: gradient of {p.name}"] = d.asnumpy()
    for p in net.get_parameters():
        if "moving" in p.name:
            found[f"{names[int(p.name.split('.')[1])]}: {p.name}"] = p.asnumpy()
    return found


@cache
def plain_results(kind: str, state: str) -> dict[str, np.ndarray]:
    """In PyNative mode: it takes long to compile them."""
    return results(kind, decelerate, state)


@pytest.mark.parametrize(
    "mode, kind, state",
    [
        pytest.param(mode, *state, marks=() if (mode, *state) in QUICK else pytest.mark.slow)
        for mode in ("pynative", "graph")
        for state in STATES
    ],
)
def test_every_form_computes_what_its_plain_cell_does(mode, kind, state):
    plain = plain_results(kind, state)
    ms.set_context(mode=ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)
    ours = results(kind, accelerate, state)
    assert ours.keys() == plain.keys()
    largest: dict[str, float] = {}  # gradient of each cell: what cancels in one parameter has come from there
    for name, value in plain.items():
        if "gradient" in name:
            cell = name.split(":")[0]
            largest[cell] = max(largest.get(cell, 0), float(np.abs(value).max()))
    wrong = []
    for name, value in plain.items():
        scale = largest[name.split(":")[0]] if "gradient" in name else float(np.abs(value).max())
        assert scale > 0, name
        difference = float(np.abs(ours[name] - value).max()) / scale
        if not difference < ROUNDING:
            wrong.append(f"{name}: {difference:.1e}")
    assert not wrong


def test_every_form_has_a_case():
    met = set()
    for net, *_ in networks().values():
        met |= {type(cell) for _, cell in accelerate(net).cells_and_names() if isinstance(cell, AcceleratedForm)}
    # test_box_layers.py, test_roi_align.py; test_sequence.py
    elsewhere = {form for form in FORMS if form.__module__ in (boxes.__name__, sequence.__name__)}
    assert len(elsewhere) == 4 + 3 and met == set(FORMS) - elsewhere


@pytest.mark.slow
@pytest.mark.parametrize("level", ["O2", "O3"])
def test_half_precision_goes_by_the_plain_equations(level):
    """To the bit, but for norms, which O2 leaves in float32: a rounding of their results to float16.

    In PyNative mode each operator's inputs are cast after the cell has seen float32.
    """
    for name, (make, shape) in CELLS.items():
        x, found = Tensor(np.random.default_rng(0).standard_normal(shape).astype(np.float32)), []
        for change in (decelerate, accelerate):
            ms.set_seed(0)
            net = nn.SequentialCell(change(make()))
            for i, p in enumerate(net.get_parameters()):
                p.set_data(
                    Tensor(np.abs(np.random.default_rng(i).standard_normal(p.shape)).astype(np.float32) / 9 + 0.1)
                )
            ms.amp.auto_mixed_precision(net, level)
            found.append(net.set_train(False)(x).asnumpy())
        assert level == "auto" or found[0].dtype == np.float16
        rounding = 0 if level == "O3" else 2**-10
        np.testing.assert_allclose(found[1], found[0], atol=rounding / 100, rtol=rounding, err_msg=name)


@pytest.mark.parametrize("name", ["skanet_nano", "van_tiny_lska_k7", "sknet26"])
def test_acceleration_can_be_taken_back(name, monkeypatch):
    net = mindcv.create_model(name, num_classes=10).set_train(False)
    monkeypatch.setattr(ms, "__version__", "2.10.0")  # slow at convolutions that have no form of ours
    assert slow_convolutions(net) == 0
    with decelerated(net):
        assert slow_convolutions(net) == sum(isinstance(cell, nn.Conv2d) for _, cell in net.cells_and_names()) > 9
        monkeypatch.setattr(ms, "__version__", "2.8.0")
        assert slow_convolutions(net) == 0
    assert is_accelerated(net) and re.fullmatch(r"C\+\+ operators: \d+ kinds in \d+ cells", summary(net))
    names, described = [p.name for p in net.get_parameters()], str(net)
    parameters = list(net.get_parameters())
    with decelerated(net):
        assert not is_accelerated(net) and summary(net) == "C++ operators: none"
        plain = [(p.name, p) for p in net.get_parameters()]
        assert not any(hasattr(cell, "form_attributes") for _, cell in net.cells_and_names())
    assert is_accelerated(net) and str(net) == described
    assert [p.name for p in net.get_parameters()] == names == [name for name, _ in plain]
    assert all(ours is theirs for ours, (_, theirs) in zip(parameters, plain))


def test_a_compiled_network_forgets_its_graph(graph):
    """MindSpore would go on with the graph of the classes that cells had."""
    net, x = nn.SequentialCell(conv(4, 4)).set_train(False), Tensor(np.ones((1, 4, 2, 2), np.float32))
    net(x)
    phases = set(net.compile_cache)
    assert phases and not accelerate(net).compile_cache
    net(x)
    assert net.compile_cache and not decelerate(net).compile_cache


def test_features_are_accelerated_as_well():
    net = mindcv.create_model("van_tiny", features_only=True)
    assert is_accelerated(net) and len(net.set_train(False)(Tensor(np.zeros((1, 3, 64, 64), np.float32)))) == 4


def test_a_subclass_has_no_form():
    """It may compute something else; the cells around it go by their plain equations then."""

    class Doubled(LargeKernelAttention):
        def construct(self, x):
            return 2 * x

    block = Block(16, Attention(16, Doubled(16, 7, True)), 2, 0.0).set_train(False)
    x = Tensor(np.random.default_rng(0).standard_normal((1, 16, 4, 4)).astype(np.float32))
    expected = block(x).asnumpy()
    accelerate(block)
    assert type(block) is Block and type(block.attn.spatial) is Doubled and is_accelerated(block)
    np.testing.assert_allclose(block(x).asnumpy(), expected, rtol=1e-5, atol=1e-5)
