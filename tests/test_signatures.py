"""Signatures of C++ operators: every wrong shape, size and type is refused before anything runs, with a message."""

import ctypes
import inspect
import re

import mindcv
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from test_kernels import pytestmark  # noqa: F401  these need a compiler as well

from mindska import kernels
from mindska.errors import SettingError
from mindska.kernels import build, operators
from mindska.kernels.signatures import Signature, enumerators, signatures

SIZES = dict(
    B=3, C=8, H=5, W=7, D=4, O=6, K=3, L=5, P=2, Q=4, N=10, A=20, M=6, h=3, w=4, k=3, dilation=1, dilation1=2,
    dilation2=3, stride=1, relu=0, identity=1, epilogue=3, align_corners=0, ignored=255,
    top=1, left=1, high=2, wide=3, size=2, first=1, count=3, R=5, out=7, H0=8, W0=9, H1=7, W1=4, H2=3, W2=5, H3=2, W3=3,
    averages=1,
)  # fmt: skip
# Sizes in conditions that others fulfil as well: more channels that stay untouched, more nodes.
UNCONSTRAINED = dict(
    split_depthwise="C",
    split_depthwise_grad="CPQ",
    max_relative_grad="hw",
    max_pool="HW",
    avg_pool="HW",
    slice_channels="C",
)


def sizes_of(name):
    return {**SIZES, **(dict(N=35) if name.startswith("max_relative") else {})}


def example(signature: Signature):
    """Shapes of inputs that are right, and the numbers."""
    sizes = sizes_of(signature.name)
    shapes = []
    for tensor in signature.inputs:
        words = {"...": "4", "*": "4"}
        shapes.append([eval(words.get(word, word), {}, sizes) for word in tensor.shapes[0]])
    return shapes, {name: sizes[name] for name in signature.numbers}


def wrong_shapes(signature: Signature):
    """(inputs' shapes, of which one is wrong; which)"""
    shapes, _ = example(signature)
    text = signature.text.partition("->")[0] + signature.text.partition("where")[2]
    for i, tensor in enumerate(signature.inputs):
        if tensor.numbers:
            continue
        for j, word in enumerate(tensor.shapes[0]):
            is_free = (
                word in ("*", *UNCONSTRAINED.get(signature.name, ""))
                or len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text)) == 1
            )
            for size in (
                0,
                -3,
                1 << 40,
                *(() if is_free and not word.isdigit() else (shapes[i][j] - 1, shapes[i][j] + 1)),
            ):
                yield [*shapes[:i], [*shapes[i][:j], size, *shapes[i][j + 1 :]], *shapes[i + 1 :]], i
        if tensor.shapes[0][0] not in ("*", "...") or (len(signature.inputs) > 1 and tensor.shapes[0] == ("...",)):
            for shape in ([*shapes[i], 1], shapes[i][1:]):
                yield [*shapes[:i], shape, *shapes[i + 1 :]], i


@pytest.mark.fault("operators")
@pytest.mark.parametrize("name", signatures())
def test_shapes_that_do_not_fit_are_refused(name):
    signature = signatures()[name]
    shapes, numbers = example(signature)
    assert len(signature.infer(shapes, numbers)) == len(signature.outputs)
    count = 0
    for count, (wrong, which) in enumerate(wrong_shapes(signature), 1):  # noqa: B007
        with pytest.raises(SettingError, match=f"^{name}: ") as error:
            signature.infer(wrong, numbers)
        for shape in wrong[: 1 + which]:
            if not signature.inputs[wrong.index(shape)].numbers:
                assert str(tuple(shape)) in str(error.value)
        assert signature.text in str(error.value)
    assert count
    for number in numbers:  # those of a convolution and of a graph have to be positive
        if number not in (
            "relu",
            "identity",
            "epilogue",
            "align_corners",
            "ignored",
            "top",
            "left",
            "first",
            "averages",
        ):
            with pytest.raises(SettingError, match=f"{number} = 0"):
                signature.infer(shapes, {**numbers, number: 0})


@pytest.mark.fault("operators")
@pytest.mark.parametrize("name", signatures())
def test_types_that_do_not_fit_are_refused(name):
    signature = signatures()[name]
    types = [tensor.type for tensor in signature.inputs]
    assert signature.check_types(types) == [tensor.type for tensor in signature.outputs]
    for i, right in enumerate(types):
        for wrong in ("float16", "float64", "int64", "int32" if right == "float32" else "float32"):
            with pytest.raises(SettingError, match=f"{name}: {signature.inputs[i].name} is {wrong}; expected {right}"):
                signature.check_types([*types[:i], wrong, *types[i + 1 :]])


def test_sizes_that_are_not_known_yet_pass():
    strided = signatures()["strided"]
    numbers = dict(stride=2, dilation=1, relu=0)
    assert strided.infer([[-1, 3, -1, 9], [4, 3, 3, 3], [4], [3]], numbers) == [[-1, 4, -1, 5]]
    assert strided.infer([[-2], [4, 3, 3, 3], [4], [3]], numbers) == [[-1, 4, -1, -1]]
    residual = signatures()["residual"]  # B and C are known from others
    assert residual.infer([[-2], [8, 4, 7, 7], [-2], [4], [8]], {}) == [[8, 4, 7, 7]]
    assert signatures()["gelu"].infer([[-2]], {}) == [[-2]]
    with pytest.raises(SettingError, match="not C % D == 0 with C = 4, D = 3"):
        strided.infer([[-1, 4, -1, 9], [4, 3, 3, 3], [4], [3]], numbers)
    with pytest.raises(SettingError, match="C is 4 and, in weight, 3"):
        signatures()["winograd"].infer([[-1, 4, -1, 9], [4, 3, 3, 3], [4], [2]], dict(dilation=1, relu=0))


def test_conditions_are_said():
    def refused(name, change, **numbers):
        shapes, right = example(signatures()[name])
        shapes[change[0]] = change[1]
        with pytest.raises(SettingError) as error:
            signatures()[name].infer(shapes, {**right, **numbers})
        return str(error.value)

    assert "not C % D == 0 with C = 8, D = 3" in refused("pointwise", (1, [6, 3, 1, 1]))
    assert "not K % 2 == 1 with K = 4" in refused("depthwise", (1, [8, 1, 4, 5]))
    assert "not k <= h * w with k = 13, h = 3, w = 4" in refused("max_relative", (0, [3, 8, 5, 7]), k=13)
    assert "not other * (epilogue / 3) == 0" in refused("pointwise_epilogue", (4, [6]), epilogue=4)
    assert "x is too large" in refused("gelu", (0, [1 << 20, 1 << 20]))


CELLS = {  # how each operator is made, and its signature
    operators.Gelu: ((), "gelu"),
    operators.SiluMul: ((), "silu_mul"),
    operators.Depthwise: ((1,), "depthwise"),
    operators.DepthwiseGelu: ((1,), "depthwise_gelu"),
    operators.DepthwiseGeluWithPreactivation: ((1,), "depthwise_gelu_with_preactivation"),
    operators.DepthwiseGeluRecomputing: ((1,), "depthwise_gelu"),
    operators.SplitDepthwise: ((2, 3, 1), "split_depthwise"),
    operators.Pointwise: ((), "pointwise"),
    operators.PointwiseEpilogue: (("add",), "pointwise_epilogue"),
    operators.Grouped: ((1,), "grouped"),
    operators.Strided: ((1, 1), "strided"),
    operators.Winograd: ((1,), "winograd"),
    operators.FusedMlp: ((), "fused_mlp"),
    operators.FusedMlpResidual: ((), "fused_mlp_residual"),
    operators.LayerNorm: ((1e-5,), "layer_norm"),
    operators.BatchNorm: ((1e-5, 0.9), "batch_norm"),
    operators.NormScaleShift: ((1e-5,), "norm_scale_shift"),
    operators.FoldNormIntoNextConv: ((), "fold_norm_into_next_conv"),
    operators.SquareSum: ((), "square_sum"),
    operators.MeanOfSum: ((), "mean_of_sum"),
    operators.WeightedSum: ((), "weighted_sum"),
    operators.Residual: ((), "residual"),
    operators.MaxRelative: ((3, 1), "max_relative"),
    operators.AssignMaxIou: ((0.5, 0.4, 0.0), "assign_max_iou"),
    operators.Suppress: ((0.5,), "suppress"),
    operators.RoiAlign: ((7, 4), "roi_align"),
    operators.MaskTargets: ((28,), "mask_targets"),
    operators.Resize: ((), "resize"),
    operators.PixelCrossEntropy: ((False, 255), "pixel_cross_entropy"),
}


FOR_SEQUENCES = {  # they have no cell, and no gradient
    "sequence", "dense", "softmax", "slice_channels", "add_relu", "max_pool", "avg_pool", "global_max_pool",
    "global_avg_pool",
}  # fmt: skip

IN_PLACE = {"multi_tensor_adamw", "multi_tensor_momentum", "multi_tensor_average"}  # cells: training/multi_tensor.py


def test_epilogues_have_one_list():
    """The C++ enumeration; every name has a gradient, and the signature admits every number."""
    names = enumerators("Epilogue")
    assert names == operators.EPILOGUES and names[0] == "none" and len(set(names)) == len(names) == 7
    assert all(callable(operators.epilogue_grad(name)) for name in names)
    assert f"epilogue <= {len(names) - 1}" in signatures()["pointwise_epilogue"].text


def test_no_operator_is_left_out():
    classes = {c for _, c in inspect.getmembers(operators, inspect.isclass) if c.__module__ == operators.__name__}
    assert set(CELLS) == classes - {operators.Float32Operator}
    made = {name for (arguments, _), cell in zip(CELLS.values(), CELLS) for name in signatures_of(cell(*arguments))}
    assert made | FOR_SEQUENCES | IN_PLACE == set(signatures()) and not made & (FOR_SEQUENCES | IN_PLACE)


def signatures_of(cell):
    """Names of the operators that a cell and the cells in it have."""
    found = set()
    for _, inner in cell.cells_and_names():
        values = [*vars(inner).values(), *getattr(inner, "_primitives", {}).values()]
        found |= {v.func.rpartition("mindska_")[2] for v in values if isinstance(v, ms.ops.Custom)}
    return found


def is_own(tensor):
    """Whether a cell has it itself."""
    return tensor.numbers or tensor.name in ("eps", "options", "threshold", "thresholds")


def tensors(signature, shapes):
    """Those that a cell takes; none where the shapes are too strange for a tensor."""
    kept = [shape for tensor, shape in zip(signature.inputs, shapes) if not is_own(tensor)]
    if any(size < 0 or size > 1 << 20 for shape in kept for size in shape):
        return None
    types = [tensor.type for tensor in signature.inputs if not is_own(tensor)]
    return [Tensor(np.ones(shape, kind)) for shape, kind in zip(kept, types * len(kept))]


def call(cell, inputs):
    return cell(inputs) if isinstance(cell, operators.SquareSum) else cell(*inputs)


@pytest.mark.fault("operators")
@pytest.mark.parametrize("operator", CELLS)
def test_operators_refuse_what_does_not_fit(operator):
    """In PyNative mode: all shapes that are wrong, forward; and an output's gradient of another shape, backward."""
    arguments, name = CELLS[operator]
    cell, signature = operator(*arguments), signatures()[name]
    inputs = tensors(signature, example(signature)[0])
    out = call(cell, inputs)
    for wrong, which in wrong_shapes(signature):
        given = tensors(signature, wrong)
        if given is not None and not is_own(signature.inputs[which]):
            with pytest.raises(ValueError, match=f"^{'depthwise_gelu' if 'gelu' in name and name != 'gelu' else name}"):
                call(cell, given)
    for i, x in enumerate(inputs):
        given = [*inputs[:i], x.astype(ms.float16), *inputs[i + 1 :]]
        with pytest.raises(ValueError, match="is float16; expected (float32|uint8|int32)"):
            call(cell, given)
    for number, grads in enumerate(wrong_grads(cell, out)):
        with pytest.raises(ValueError, match=r"^\w+: .*; expected "):
            ms.ops.stop_gradient(cell.bprop(*inputs, out, grads))
        assert number < 100


def wrong_grads(cell, out):
    """Gradients of the outputs, the first of another shape."""
    if not any(hasattr(cell, name) for name in ("backward", "weight_grad", "pointwise")):
        return
    outs = out if isinstance(out, tuple) else (out,)
    for axis in range(outs[0].ndim):
        for size in (outs[0].shape[axis] - 1, outs[0].shape[axis] + 1):
            shape = [*outs[0].shape[:axis], size, *outs[0].shape[axis + 1 :]]
            if isinstance(cell, (operators.PointwiseEpilogue, operators.Gelu)) and size == 1:
                continue
            grad = (Tensor(np.ones(shape, np.float32)), *outs[1:])
            yield grad if isinstance(out, tuple) else grad[0]


class Backward(nn.Cell):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def construct(self, *inputs):
        return self.cell.bprop(*inputs)


@pytest.mark.fault("operators")
@pytest.mark.slow
@pytest.mark.parametrize("operator", CELLS)
def test_operators_refuse_what_does_not_fit_in_graph_mode(operator, graph):
    arguments, name = CELLS[operator]
    cell, signature = operator(*arguments), signatures()[name]
    inputs = tensors(signature, example(signature)[0])
    out = call(cell, inputs)
    for wrong, which in wrong_shapes(signature):
        given = tensors(signature, wrong)
        if given is not None and not is_own(signature.inputs[which]):
            with pytest.raises(ValueError, match=r"\w+: .*; expected "):
                call(operator(*arguments), given)
            break  # each is compiled; all of them are tried in PyNative mode
    else:
        raise AssertionError("nothing was tried")
    for grads in list(wrong_grads(cell, out))[:1]:
        with pytest.raises(ValueError, match=r"\w+: .*; expected "):
            Backward(cell)(*inputs, out, grads)


SLOW_NETWORKS = [pytest.param(name, marks=pytest.mark.slow) for name in ("van_tiny", "sk_resnet18", "sknet50")]


@pytest.mark.fault("operators")
@pytest.mark.parametrize("name", ["skanet_nano", *SLOW_NETWORKS])
def test_a_network_refuses_other_channels(name):
    """And images the wrong way round, one without its batch, and no images; with C++ operators and without."""

    def refused(net, *shapes):
        for shape in shapes:
            with pytest.raises(ValueError, match=re.escape(f"(B, 3, H, W), at least one; found {shape}")):
                net(Tensor(np.ones(shape, np.float32)))

    with kernels.plain():
        plain = mindcv.create_model(name, num_classes=5).set_train(False)
    ours = mindcv.create_model(name, num_classes=5).set_train(False)
    for net in (plain, ours):
        refused(net, *((1, channels, 64, 64) for channels in (1, 4, 12, 64)))
        refused(net, (1, 64, 64, 3), (3, 64, 64), (1, 3, 64, 64, 1), (0, 3, 64, 64))
    with pytest.raises(ValueError, match=re.escape(f"{(1, ours.noise_size)}; found (1, 7)")):
        ours(Tensor(np.ones((1, 3, 64, 64), np.float32)), Tensor(np.ones((1, 7), np.float32)))
    ms.set_context(mode=ms.GRAPH_MODE)
    refused(ours, (1, 4, 64, 64), (1, 64, 64, 3), (3, 64, 64))


def entry(name, arrays, types=None):
    """What an entry of a library returns for arrays."""
    function = getattr(ctypes.CDLL(str(build.library(signatures()[name].file))), f"mindska_{name}")
    sizes = [(ctypes.c_int64 * max(1, a.ndim))(*a.shape) for a in arrays]
    count = len(arrays)
    return function(
        count, (ctypes.c_void_p * count)(*[a.ctypes.data for a in arrays]),
        (ctypes.c_int * count)(*[a.ndim for a in arrays]),
        (ctypes.c_void_p * count)(*[ctypes.addressof(s) for s in sizes]),
        (ctypes.c_char_p * count)(*(types or [str(a.dtype).encode() for a in arrays])), None, None,
    )  # fmt: skip


@pytest.mark.fault("operators")
def test_an_entry_refuses_and_says_why(capfd):
    x, y = np.ones((1, 4, 5, 5), np.float32), np.zeros((1, 2, 5, 5), np.float32)
    weight, bias = np.ones((2, 3, 1, 1), np.float32), np.ones(2, np.float32)
    assert entry("pointwise", [x, weight, bias, y]) == 3
    said = capfd.readouterr().err
    assert "mindska_pointwise did not run: not C % D == 0. Found (1, 4, 5, 5), (2, 3, 1, 1), (2), (1, 2, 5, 5)" in said
    assert entry("pointwise", [x, weight.astype(np.float64), bias, y]) == 2
    assert not y.any()
    nodes, index, grads = (
        np.ones((1, 8, 2, 2), np.float32),
        np.int32([[[0, 4]] * 4]),
        np.ones((1, 16, 2, 2), np.float32),
    )
    outputs = [np.zeros((1, 8, 2, 2), np.float32) for _ in range(2)]
    assert entry("max_relative_grad", [nodes, index, grads, np.int32([2, 1]), *outputs]) == 4
    assert "an index is not that of a node" in capfd.readouterr().err


@pytest.mark.fault("operators")
@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE])
def test_what_an_entry_refuses_is_an_error_of_mindspore(mode):
    """Where a shape came past Python's check."""

    class Unchecked(nn.Cell):
        def __init__(self):
            super().__init__()
            path = f"{build.library('pointwise')}:mindska_pointwise"
            self.operator = ms.ops.Custom(path, lambda x, w, b: [1, 2, 5, 5], lambda x, w, b: x, func_type="aot")

        def construct(self, x, weight, bias):
            return self.operator(x, weight, bias)

    ms.set_context(mode=mode)
    inputs = [Tensor(np.ones(shape, np.float32)) for shape in ((1, 4, 5, 5), (2, 3, 1, 1), (2,))]
    with pytest.raises(RuntimeError, match="mindska_pointwise.* is 3"):
        Unchecked()(*inputs).asnumpy()


@pytest.mark.parametrize("name", [b"int32", b"Int32", b"\xfdnt32"])
def test_names_of_types_are_those_of_any_locale(name):
    """MindSpore makes them lower case by the locale: Turkish has another letter for the small I."""
    x, weight, bias = (np.ones(shape, np.float32) for shape in ((1, 1, 3, 3), (1, 1, 3, 3), (1,)))
    y = np.zeros_like(x)
    types = [b"float32", b"float32", b"float32", name, b"float32"]
    assert entry("depthwise", [x, weight, bias, np.int32([1]), y], types) == 0 and y[0, 0, 1, 1] == 10
    types[3] = b"uint32"
    assert entry("depthwise", [x, weight, bias, np.int32([1]), y], types) == 2
