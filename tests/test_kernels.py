"""The C++ operators: against float64, at sizes that are odd and small; their gradients; building; falling back."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import mindcv
import mindspore as ms
import numpy as np
import pytest
import torch
from commands import ROOT
from mindspore import Tensor, nn
from scipy.special import ndtr

from mindska import kernels
from mindska.acceleration import accelerate, decelerate
from mindska.acceleration.layers import conv_kind
from mindska.errors import SettingError
from mindska.kernels import build, operators
from mindska.kernels.signatures import signatures
from mindska.models.layers.blocks import GELU, conv
from mindska.models.layers.graph import MaxRelativeConv, relative_position
from mindska.models.layers.resize import bilinear_places


def has_compiler():
    try:
        return bool(build._compiler())
    except build.BuildError:
        return False


pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
SPECIAL = np.float32([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 1e30, -1e30])


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def gradients(function, inputs, dout):
    """Of sum(function(*inputs) * dout)."""
    scaled = ms.grad(lambda *a: (function(*a) * Tensor(dout)).sum(), grad_position=tuple(range(len(inputs))))
    found = scaled(*[Tensor(i) for i in inputs])
    return [g.asnumpy() for g in (found if isinstance(found, tuple) else (found,))]


def rounding(values, terms=1):
    """Float32 rounding of sums of so many terms: a few units in the last place of the largest."""
    return 2e-7 * (3 + terms**0.5) * max(1.0, float(np.abs(np.asarray(values)).max()))


@pytest.mark.parametrize("shape", [(1,), (7,), (16,), (3, 5, 7), (2, 64, 33, 17), (1 << 14,), ((1 << 14) + 1,)])
def test_gelu(shape):
    x, dout = 4 * random(*shape), random(*shape, seed=1)
    net, wide = operators.Gelu(), x.astype(np.float64)
    expected = wide * ndtr(wide)
    np.testing.assert_allclose(net(Tensor(x)).asnumpy(), expected, atol=4e-7, rtol=3e-7)
    grad = ndtr(wide) + wide * np.exp(-0.5 * wide**2) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(gradients(net, [x], dout)[0], dout * grad, atol=6e-7 * np.abs(dout).max(), rtol=3e-7)


def test_gelu_of_nan_and_infinity():
    plain = GELU()
    with np.errstate(all="ignore"):
        ones = np.ones_like(SPECIAL)
        for result in (lambda net: net(Tensor(SPECIAL)).asnumpy(), lambda net: gradients(net, [SPECIAL], ones)[0]):
            ours, theirs = result(operators.Gelu()), result(plain)
            np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
            np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=1e-6)


SHAPES = [  # batch, channels, height, width, kernel, dilation
    (2, 3, 9, 11, (3, 3), 1),
    (1, 1, 1, 1, (3, 3), 1),
    (1, 5, 1, 40, (5, 5), 2),
    (2, 3, 40, 1, (7, 7), 3),
    (1, 2, 64, 64, (7, 7), 3),
    (2, 4, 7, 7, (1, 17), 3),
    (2, 4, 7, 7, (17, 1), 3),
    (1, 3, 5, 130, (1, 5), 1),
    (1, 3, 33, 70, (5, 1), 2),
    (3, 2, 16, 32, (5, 5), 2),
]


@pytest.mark.parametrize("batch, channels, height, width, kernel, dilation", SHAPES, ids=str)
def test_depthwise(batch, channels, height, width, kernel, dilation):
    x, dout = random(batch, channels, height, width), random(batch, channels, height, width, seed=1)
    weight, bias = random(channels, 1, *kernel, seed=2), random(channels, seed=3)
    operator = operators.Depthwise(dilation)
    wide = [torch.from_numpy(a).double().requires_grad_() for a in (x, weight, bias)]
    padding = [dilation * (side // 2) for side in kernel]
    expected = torch.nn.functional.conv2d(*wide, padding=padding, dilation=dilation, groups=channels)
    (expected * torch.from_numpy(dout)).sum().backward()
    ours = operator(Tensor(x), Tensor(weight), Tensor(bias)).asnumpy()
    np.testing.assert_allclose(ours, expected.detach(), atol=rounding(ours, kernel[0] * kernel[1]), rtol=0)
    for found, exact, terms in zip(
        gradients(operator, [x, weight, bias], dout), wide, (kernel[0] * kernel[1], *[batch * height * width] * 2)
    ):
        np.testing.assert_allclose(found, exact.grad, atol=rounding(exact.grad, terms), rtol=0)


@pytest.mark.parametrize("identity", [0, 1])
@pytest.mark.parametrize("channels, height, width", [(8, 9, 11), (16, 1, 1), (40, 16, 33)])
def test_split_depthwise(channels, height, width, identity):
    first, second = channels * 3 // 8, channels // 2
    arrays = [
        random(2, channels, height, width), random(first, 1, 5, 5, seed=1), random(first, seed=2),
        random(second, 1, 7, 7, seed=3), random(second, seed=4),
    ]  # fmt: skip
    dout = random(2, channels, height, width, seed=5)
    wide = [torch.from_numpy(a).double().requires_grad_() for a in arrays]
    x, weight1, bias1, weight2, bias2 = wide
    parts = x.split([channels - first - second, first, second], dim=1)
    five = torch.nn.functional.conv2d(parts[1], weight1, bias1, padding=4, dilation=2, groups=first)
    seven = torch.nn.functional.conv2d(parts[2], weight2, bias2, padding=9, dilation=3, groups=second)
    expected = torch.cat([parts[0], five, seven], dim=1) + identity * x
    (expected * torch.from_numpy(dout)).sum().backward()
    operator = operators.SplitDepthwise(2, 3, identity)
    np.testing.assert_allclose(
        operator(*map(Tensor, arrays)).asnumpy(), expected.detach(), atol=rounding(expected.detach(), 49), rtol=0
    )
    for found, exact in zip(gradients(operator, arrays, dout), wide):
        np.testing.assert_allclose(found, exact.grad, atol=rounding(exact.grad, 2 * height * width), rtol=0)


POINTWISE = [  # batch, channels in and out, height, width, groups
    (1, 1, 1, 1, 1, 1),
    (2, 5, 7, 3, 3, 1),
    (3, 20, 12, 7, 7, 4),
    (2, 64, 100, 1, 97, 1),
    (1, 33, 90, 64, 40, 1),
    (20, 16, 24, 1, 1, 2),
]


def scale_shift_epilogue(epilogue, x, weight, scale, shift, other):
    """What `operators.PointwiseEpilogue` computes, in PyTorch."""
    groups = x.shape[1] // weight.shape[1]
    v = torch.nn.functional.conv2d(x, weight, groups=groups) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    functional = torch.nn.functional
    return {
        "none": lambda: v,
        "gelu": lambda: functional.gelu(v),
        "relu": lambda: v.relu(),
        "add": lambda: v + other,
        "add_relu": lambda: (v + other).relu(),
        "silu_mul": lambda: functional.silu(v) * other,
        "mul": lambda: v * other,
    }[epilogue]()


def compare(operator, reference, arrays, terms):
    """Values and gradients of an operator against PyTorch's in float64. `terms`: in the longest sum."""
    wide = [torch.from_numpy(a).double().requires_grad_() for a in arrays]
    expected = reference(*wide)
    dout = random(*expected.shape, seed=9)
    (expected * torch.from_numpy(dout)).sum().backward()
    exact = expected.detach().numpy()
    np.testing.assert_allclose(operator(*map(Tensor, arrays)).asnumpy(), exact, atol=rounding(exact, terms), rtol=0)
    for found, parameter in zip(gradients(operator, arrays, dout), wide):
        grad = np.zeros(found.shape) if parameter.grad is None else parameter.grad.numpy()
        np.testing.assert_allclose(found, grad, atol=rounding(grad, terms), rtol=0)


@pytest.mark.parametrize("batch, cin, cout, height, width, groups", POINTWISE, ids=str)
def test_pointwise(batch, cin, cout, height, width, groups):
    arrays = [
        random(batch, cin, height, width), random(cout, cin // groups, 1, 1, seed=1), random(cout, seed=2),
    ]  # fmt: skip
    compare(
        operators.Pointwise(),
        lambda x, weight, bias: torch.nn.functional.conv2d(x, weight, bias, groups=groups),
        arrays,
        max(cin, batch * height * width),
    )


@pytest.mark.parametrize("epilogue", operators.EPILOGUES)
@pytest.mark.parametrize("batch, cin, cout, height, width, groups", POINTWISE[1:4], ids=str)
def test_pointwise_epilogue(epilogue, batch, cin, cout, height, width, groups):
    arrays = [
        random(batch, cin, height, width), random(cout, cin // groups, 1, 1, seed=1) / cin**0.5,
        random(cout, seed=2), random(cout, seed=3), random(batch, cout, height, width, seed=4),
    ]  # fmt: skip
    compare(
        operators.PointwiseEpilogue(epilogue),
        lambda *inputs: scale_shift_epilogue(epilogue, *inputs),
        arrays,
        max(cin, cin * batch * height * width),
    )


@pytest.mark.parametrize("outputs, channels", [(1, 1), (7, 33), (64, 16)])
def test_a_norm_is_folded_into_the_next_convolution(outputs, channels):
    """`NormScaleShift` and `FoldNormIntoNextConv`, and their gradients: the weight and the bias side by side."""
    arrays = [
        random(outputs, channels, 1, 1), random(outputs, seed=1), random(channels, seed=2), random(channels, seed=3),
        random(channels, seed=4), np.abs(random(channels, seed=5)) + 0.5,
    ]  # fmt: skip
    norm_scale_shift, fold_norm = operators.NormScaleShift(1e-5), operators.FoldNormIntoNextConv()

    def ours(weight, bias, gamma, beta, mean, variance):
        new_weight, new_bias = fold_norm(weight, bias, *norm_scale_shift(gamma, beta, mean, variance))
        return ms.ops.concat((new_weight.reshape(outputs, channels), new_bias.reshape(outputs, 1)), 1)

    def reference(weight, bias, gamma, beta, mean, variance):
        scale = gamma / (variance + 1e-5).sqrt()
        flat = weight.reshape(outputs, channels)
        return torch.cat((flat * scale, (bias + flat @ (beta - mean * scale)).reshape(outputs, 1)), 1)

    compare(ours, reference, arrays, max(outputs, channels) * 4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch, channels, height, width", [(1, 1, 1, 1), (2, 5, 9, 21), (3, 2, 40, 3)])
def test_depthwise_gelu(batch, channels, height, width, training):
    operator = operators.DepthwiseGelu(1).set_train(training)
    functional = torch.nn.functional
    compare(
        operator,
        lambda x, w, b: functional.gelu(functional.conv2d(x, w, b, padding=1, groups=channels)),
        [random(batch, channels, height, width), random(channels, 1, 3, 3, seed=1), random(channels, seed=2)],
        batch * height * width,
    )


@pytest.mark.parametrize("batch, channels, height, width", [(1, 2, 1, 1), (2, 5, 9, 21), (3, 40, 8, 8), (1, 64, 3, 70)])
def test_layer_norm(batch, channels, height, width):
    def reference(x, gamma, beta):
        x = torch.nn.functional.layer_norm(x.permute(0, 2, 3, 1), (channels,), gamma, beta, eps=1e-5)
        return x.permute(0, 3, 1, 2)

    x = 3 + random(batch, channels, height, width)
    arrays = [x, random(channels, seed=1), random(channels, seed=2)]
    # A gradient is divided by the standard deviation, which two channels can make small.
    spread = max(1.0, 1 / x.std(axis=1).min())
    compare(operators.LayerNorm(1e-5), reference, arrays, int(spread**2 * max(channels, batch * height * width)))


@pytest.mark.parametrize("has_second", [False, True])
@pytest.mark.parametrize("has_shortcut", [False, True])
@pytest.mark.parametrize("samples_kept", [False, True])
@pytest.mark.parametrize("batch, channels, height, width", [(1, 1, 1, 1), (2, 5, 9, 21)])
def test_residual(batch, channels, height, width, has_second, has_shortcut, samples_kept):
    def reference(first, second, shortcut, scale, drop_path_mask):
        branch = first + second if has_second else first
        branch = branch * scale.reshape(-1, 1, 1) * drop_path_mask.detach().reshape(-1, 1, 1, 1)
        return shortcut + branch if has_shortcut else branch

    shape, nothing = (batch, channels, height, width), np.zeros(1, np.float32)
    arrays = [
        random(*shape),
        random(*shape, seed=1) if has_second else nothing,
        random(*shape, seed=2) if has_shortcut else nothing,
        random(channels, seed=3),
        np.float32([0, 1.5])[:batch] if samples_kept else np.ones(1, np.float32),
    ]
    compare(operators.Residual(), reference, arrays, batch * height * width)


@pytest.mark.parametrize("shape", [(1,), (2, 3, 5, 7), (1, 1, 1 << 7, (1 << 7) + 1)])
def test_silu_mul(shape):
    arrays = [4 * random(*shape), random(*shape, seed=1)]
    compare(operators.SiluMul(), lambda gate, x: torch.nn.functional.silu(gate) * x, arrays, 1)


def test_silu_mul_and_residual_of_nan_and_infinity():
    wide, x = np.float64(SPECIAL), np.ones_like(SPECIAL)
    with np.errstate(all="ignore"):
        expected = torch.nn.functional.silu(torch.from_numpy(wide)).numpy()
    expected[np.isneginf(SPECIAL)] = np.nan  # -infinity * 0
    ours = operators.SiluMul()(Tensor(SPECIAL), Tensor(x)).asnumpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-30)
    nothing, ones = Tensor(np.zeros(1, np.float32)), Tensor(np.ones(1, np.float32))
    maps = SPECIAL.reshape(1, 1, 1, -1)
    np.testing.assert_array_equal(operators.Residual()(Tensor(maps), nothing, nothing, ones, ones).asnumpy(), maps)


@pytest.mark.parametrize("sizes", [[1], [17, 1 << 16], [(1 << 16) + 5, 3, 300_000, 1]], ids=str)
def test_square_sum(sizes):
    arrays = [random(size) for size in sizes]
    exact = sum((array.astype(np.float64) ** 2).sum() for array in arrays)
    np.testing.assert_allclose(operators.SquareSum()([Tensor(a) for a in arrays]).asnumpy(), exact, rtol=1e-6)
    arrays[-1][-1] = np.nan
    assert np.isnan(operators.SquareSum()([Tensor(a) for a in arrays]).asnumpy())


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("batch, channels, height, width", [(2, 1, 1, 1), (2, 5, 9, 21), (3, 4, 33, 20)])
def test_batch_norm(batch, channels, height, width, relu):
    x = 3 + random(batch, channels, height, width)
    gamma, beta, mean, variance = (random(channels, seed=i) for i in range(1, 5))
    operator = operators.BatchNorm(1e-5, 0.9, relu)
    running = [torch.from_numpy(a.copy()).double() for a in (mean, variance)]

    def reference(x, gamma, beta):
        y = torch.nn.functional.batch_norm(x, *running, gamma, beta, training=True, momentum=0.1, eps=1e-5)
        return y.relu() if relu else y

    spread = max(1.0, 1 / x.std(axis=(0, 2, 3)).min())
    compare(
        lambda *inputs: operator(*inputs, Tensor(mean), Tensor(variance))[0], reference, [x, gamma, beta],
        int(spread**2 * batch * height * width),
    )  # fmt: skip
    results = operator(*map(Tensor, (x, gamma, beta, mean, variance)))
    for ours, theirs in zip(results[3:], running):
        np.testing.assert_allclose(ours.asnumpy(), theirs, atol=rounding(theirs))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(
    "batch, cin, cout, height, width, groups, side",
    [(2, 8, 8, 7, 7, 2, 3), (1, 4, 6, 1, 1, 2, 3), (3, 15, 9, 5, 30, 3, 3), (1, 32, 16, 33, 20, 2, 5)],
)
def test_grouped(batch, cin, cout, height, width, groups, side, dilation, relu):
    def reference(x, weight, bias):
        y = torch.nn.functional.conv2d(x, weight, bias, **options)
        return y.relu() if relu else y

    arrays = [
        random(batch, cin, height, width), random(cout, cin // groups, side, side, seed=1), random(cout, seed=2),
    ]  # fmt: skip
    options = dict(padding=dilation * (side // 2), dilation=dilation, groups=groups)
    terms = max(cin // groups * side**2, batch * height * width)
    compare(operators.Grouped(dilation, relu), reference, arrays, terms)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    "batch, cin, cout, height, width, side, stride, dilation",
    [
        (2, 3, 8, 33, 20, 7, 4, 1),
        (1, 1, 1, 1, 1, 3, 2, 1),
        (3, 8, 12, 9, 8, 3, 2, 2),
        (2, 20, 90, 1, 70, 1, 2, 1),
        (70, 6, 6, 3, 2, 3, 4, 1),
        (1, 6, 5, 2, 100, 5, 3, 3),
        (2, 90, 4, 40, 30, 3, 2, 1),
    ],
    ids=str,
)
def test_strided(batch, cin, cout, height, width, side, stride, dilation, relu):
    def reference(x, weight, bias):
        y = torch.nn.functional.conv2d(x, weight, bias, **options)
        return y.relu() if relu else y

    arrays = [
        random(batch, cin, height, width), random(cout, cin, side, side, seed=1), random(cout, seed=2),
    ]  # fmt: skip
    options = dict(stride=stride, padding=dilation * (side // 2), dilation=dilation)
    terms = max(max(cin, cout) * side**2, batch * height * width)
    compare(operators.Strided(stride, dilation, relu), reference, arrays, terms)


def test_what_a_strided_convolution_saw_before_does_not_come_back():
    """Planes are kept for the next call: NaN of an earlier batch lies after them."""
    conv = operators.Strided(2, 2)
    for size in (16, 10):
        x, weight, bias = random(2, 4, size, size), random(4, 4, 3, 3), random(4)
        clean = gradients(conv, [x, weight, bias], random(2, 4, size // 2, size // 2))
        gradients(conv, [np.full((4, 8, 32, 32), np.nan, np.float32), random(4, 8, 3, 3), bias], random(4, 4, 16, 16))
        again = gradients(conv, [x, weight, bias], random(2, 4, size // 2, size // 2))
        for first, second in zip(clean, again):
            np.testing.assert_array_equal(second, first)


WINOGRAD = [  # batch, channels in and out, height, width, dilation
    (1, 1, 1, 1, 1, 1),
    (2, 5, 7, 9, 11, 1),
    (1, 3, 20, 1, 40, 1),
    (2, 20, 6, 40, 1, 1),
    (1, 17, 9, 32, 32, 1),  # tiles fill their vectors
    (1, 7, 33, 65, 57, 1),  # vectors hold the end of a line and the beginning of the next
    (3, 16, 8, 7, 7, 1),  # ... several lines, and several images
    (1, 5, 49, 3, 150, 1),  # several parts of a line
    (1, 300, 70, 6, 5, 1),  # several blocks of channels
    (2, 9, 10, 9, 20, 2),
    (1, 4, 5, 13, 3, 3),
    (2, 5, 6, 4, 5, 40),  # taps beyond the map
]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("batch, cin, cout, height, width, dilation", WINOGRAD, ids=str)
def test_winograd(batch, cin, cout, height, width, dilation, relu):
    def reference(x, weight, bias):
        y = torch.nn.functional.conv2d(x, weight, bias, padding=dilation, dilation=dilation)
        return y.relu() if relu else y

    arrays = [random(batch, cin, height, width), random(cout, cin, 3, 3, seed=1), random(cout, seed=2)]
    compare(operators.Winograd(dilation, relu), reference, arrays, max(9 * max(cin, cout), batch * height * width))


def test_winograd_is_as_exact_as_a_direct_convolution():
    """Against float64, at the channels of heads: root mean square, and the largest error."""
    arrays = [np.abs(random(1, 256, 24, 40)), random(64, 256, 3, 3, seed=1), np.zeros(64, np.float32)]
    dout = random(1, 64, 24, 40, seed=3)
    errors = []
    for dtype in (torch.float64, torch.float32):
        x, weight, bias = (torch.from_numpy(a).to(dtype).requires_grad_() for a in arrays)
        y = torch.nn.functional.conv2d(x, weight, bias, padding=1)
        y.backward(torch.from_numpy(dout).to(dtype))
        errors.append([t.detach().numpy() for t in (y, x.grad, weight.grad, bias.grad)])
    exact, direct = errors
    conv = operators.Winograd(1)
    ours = [conv(*map(Tensor, arrays)).asnumpy(), *gradients(conv, arrays, dout)]
    for found, theirs, true in zip(ours, direct, exact):
        error, usual = found - true, theirs - true
        assert np.sqrt((error**2).mean()) < max(3 * np.sqrt((usual**2).mean()), 3e-7 * np.sqrt((true**2).mean()))
        assert np.abs(error).max() < 2e-6 * np.abs(true).max()


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_winograd_spreads_nan_and_infinity_to_what_sees_them(value, dilation):
    for row, column in ((0, 0), (4, 10), (5, 11), (8, 39)):
        x, weight = random(1, 2, 9, 40), np.abs(random(2, 2, 3, 3, seed=1)) + 0.1
        x[0, 1, row, column] = value
        ours = operators.Winograd(dilation)(Tensor(x), Tensor(weight), Tensor(np.zeros(2, np.float32))).asnumpy()
        wide = torch.nn.functional.conv2d(
            torch.from_numpy(x).double(), torch.from_numpy(weight).double(), padding=dilation, dilation=dilation
        ).numpy()
        seen = np.isfinite(wide)
        np.testing.assert_array_equal(np.isfinite(ours), seen)
        np.testing.assert_allclose(ours[seen], wide[seen], atol=rounding(wide[seen], 18), rtol=0)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    "batch, channels, source, size",
    [
        (1, 1, (1, 1), (1, 1)),
        (2, 3, (7, 9), (14, 18)),
        (1, 2, (32, 32), (128, 128)),
        (1, 2, (5, 40), (3, 17)),
        (2, 1, (3, 2), (70, 90)),
        (1, 2, (33, 50), (40, 51)),
    ],
    ids=str,
)
def test_resize(batch, channels, source, size, align_corners):
    places = [Tensor(bilinear_places(old, new, align_corners)) for old, new in zip(source, size)]
    operator = operators.Resize()
    x, dout = random(batch, channels, *source), random(batch, channels, *size, seed=1)
    wide = torch.from_numpy(x).double().requires_grad_()
    exact = torch.nn.functional.interpolate(wide, size=size, mode="bilinear", align_corners=align_corners)
    (exact * torch.from_numpy(dout)).sum().backward()
    place = 2e-7 * max(source) * np.abs(x).max()  # float32's, as in PyTorch's own
    np.testing.assert_allclose(operator(Tensor(x), *places).asnumpy(), exact.detach(), atol=1e-6 + 2 * place, rtol=0)
    (found,) = gradients(lambda a: operator(a, *places), [x], dout)
    terms = 4 * max(1, size[0] * size[1] // (source[0] * source[1]))
    np.testing.assert_allclose(found, wide.grad, atol=rounding(wide.grad, terms) + terms * place, rtol=0)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    "batch, classes, source, labelled, size",
    [
        (1, 1, (1, 1), (1, 1), (1, 1)),
        (2, 150, (16, 16), (64, 64), (64, 64)),
        (1, 21, (9, 7), (33, 26), (36, 28)),  # what overhangs is cut off
        (2, 33, (20, 33), (20, 33), (20, 33)),  # no enlargement
        (1, 3, (40, 21), (13, 9), (13, 9)),  # smaller
        (1, 5, (3, 2), (90, 70), (91, 70)),
    ],
    ids=str,
)
def test_pixel_cross_entropy(batch, classes, source, labelled, size, align_corners):
    labels = np.random.default_rng(5).integers(0, classes, (batch, *labelled)).astype(np.int32)
    labels[:, ::5, ::3] = 255
    logits, dout = 3 * random(batch, classes, *source), random(batch, *labelled, seed=1)
    wide = torch.from_numpy(logits).double().requires_grad_()
    enlarged = torch.nn.functional.interpolate(wide, size=size, mode="bilinear", align_corners=align_corners)
    enlarged = enlarged[:, :, : labelled[0], : labelled[1]]
    exact = torch.nn.functional.cross_entropy(
        enlarged, torch.from_numpy(labels).long(), ignore_index=255, reduction="none"
    )
    (exact * torch.from_numpy(dout)).sum().backward()
    operator = operators.PixelCrossEntropy(align_corners, 255)
    others = Tensor(labels), Tensor(np.int32(size) - np.int32(labelled))
    # Places are float32 numbers, as in PyTorch's own: a unit in the last place of the farthest.
    place = 2e-7 * max(source) * np.abs(logits).max()
    losses = operator(Tensor(logits), *others).asnumpy()
    assert (losses[:, ::5, ::3] == 0).all()
    np.testing.assert_allclose(losses, exact.detach(), atol=rounding(exact.detach(), classes) + place, rtol=0)
    (found,) = gradients(lambda x: operator(x, *others), [logits], dout)
    terms = max(1, size[0] * size[1] // (source[0] * source[1])) * 4
    np.testing.assert_allclose(found, wide.grad, atol=rounding(wide.grad, terms) + terms * place, rtol=0)


def test_pixel_cross_entropy_of_nan_and_of_labels_beyond_the_classes():
    logits, labels = random(1, 4, 6, 6), np.zeros((1, 24, 24), np.int32)
    logits[0, 1, 5, 5], logits[0, 2, 0, 5] = np.nan, np.inf
    labels[0, 20, 1], labels[0, 21, 1], labels[0, 23, 23] = 4, -1, 255
    operator, size = operators.PixelCrossEntropy(False, 255), Tensor(np.int32([0, 0]))
    losses = operator(Tensor(logits), Tensor(labels), size).asnumpy()[0]
    assert np.isnan(losses[[20, 21, 22, 0, 3], [1, 1, 22, 23, 20]]).all() and losses[23, 23] == 0
    assert np.isfinite(losses[:16, :16]).all() and np.isfinite(losses[22:, :16]).all()
    (grad,) = gradients(lambda x: operator(x, Tensor(labels), size), [logits], np.ones((1, 24, 24), np.float32))
    assert (
        np.isnan(grad[0, :, 5, 0]).all() and np.isnan(grad[0, :, 5, 5]).all() and np.isfinite(grad[0, :, :4, :4]).all()
    )


def test_pixel_cross_entropy_is_the_same_on_any_number_of_threads():
    logits, size = Tensor(random(2, 20, 37, 21)), Tensor(np.int32([0, 0]))
    labels = Tensor(np.random.default_rng(5).integers(0, 20, (2, 148, 84)).astype(np.int32))
    operator, dout = operators.PixelCrossEntropy(False, 255), Tensor(random(2, 148, 84))
    threads, found = build._loaded["threads"].handle, []
    before = threads.mindska_threads()
    try:
        for count in (1, 2, 7):
            threads.mindska_set_threads(count)
            losses, grads = operator(logits, labels, size), operator.bprop(logits, labels, size, None, dout)
            found.append([losses.asnumpy(), grads[0].asnumpy()])
    finally:
        threads.mindska_set_threads(before)
    for other in found[1:]:
        for first, second in zip(found[0], other):
            np.testing.assert_array_equal(second, first)


def test_what_a_winograd_convolution_saw_before_does_not_come_back():
    conv, bias = operators.Winograd(2), random(40)
    for size in (16, 11):
        x, weight, dout = random(2, 20, size, size), random(40, 20, 3, 3), random(2, 40, size, size)
        clean = gradients(conv, [x, weight, bias], dout)
        gradients(
            conv, [np.full((4, 64, 40, 40), np.nan, np.float32), random(64, 64, 3, 3), random(64)],
            random(4, 64, 40, 40),
        )  # fmt: skip
        for first, second in zip(clean, gradients(conv, [x, weight, bias], dout)):
            np.testing.assert_array_equal(second, first)


def test_a_winograd_convolution_is_the_same_on_any_number_of_threads():
    arrays = [Tensor(a) for a in (random(2, 40, 21, 37), random(50, 40, 3, 3, seed=1), random(50, seed=2))]
    conv, dout = operators.Winograd(1), Tensor(random(2, 50, 21, 37, seed=3))
    threads, found = build._loaded["threads"].handle, []
    before = threads.mindska_threads()
    try:
        for count in (1, 2, 7):
            threads.mindska_set_threads(count)
            found.append([t.asnumpy() for t in (conv(*arrays), *conv.bprop(*arrays, None, dout))])
    finally:
        threads.mindska_set_threads(before)
    for other in found[1:]:
        for first, second in zip(found[0], other):
            np.testing.assert_array_equal(second, first)


@pytest.mark.fault("threads")
@pytest.mark.parametrize(
    "first, asked, share, threads",
    [
        pytest.param("mindspore", "", 0, 0, marks=pytest.mark.slow),
        ("mindska", "", 0, 0),
        ("mindspore", "1,4", 0, 1),
        pytest.param("mindspore", "64", 0, 0, marks=pytest.mark.slow),
        ("mindspore", "", 1, 1),
    ],
)
def test_threads_are_the_cores_or_a_ranks_share(first, asked, share, threads):
    """Whatever is imported first. MindSpore sets OMP_NUM_THREADS itself. `threads`: expected; 0: the cores."""
    program = """
import importlib, logging, os, sys
logging.basicConfig()
importlib.import_module(sys.argv[1])
from mindska.distributed import cores
from mindska.kernels import build
build.library("gelu")
if int(sys.argv[2]):
    cores.limit_threads(int(sys.argv[2]))
count, expected = build._loaded["threads"].handle.mindska_threads(), int(sys.argv[3]) or cores.share_of_cores(1)
assert count == expected, count
"""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS=asked)
    words = [sys.executable, "-c", program, first, str(share), str(threads)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("OMP_NUM_THREADS is 64" in done.stderr) == (asked == "64")


def built(source, program, *flags) -> None:
    """Builds a program of tests/programs."""
    words = ["g++", "-std=c++17", "-O1", "-g", "-march=native", "-pthread", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    words += [*flags, f"-I{build.FOLDER}", str(ROOT / "tests" / "programs" / source), "-o", str(program)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.fault("threads")
@pytest.mark.parametrize("flags", [[], ["-fsanitize=thread"]])
def test_pool_of_threads(tmp_path, flags):
    """Every task once: from several callers, in a loop within a loop, with tasks that throw, after a fork."""
    program = tmp_path / "parallel"
    built("parallel.cc", program, *flags)
    for threads in ("1", "2", "5"):
        done = subprocess.run([program, threads], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0 and done.stdout.strip() == threads, done.stderr[-3000:]


@pytest.mark.parametrize("batch, channels, height, width", [(1, 1, 1, 1), (2, 5, 7, 7), (3, 4, 33, 20)])
def test_mean_of_sum_and_weighted_sum(batch, channels, height, width):
    maps = [random(batch, channels, height, width, seed=i) for i in range(2)]
    compare(operators.MeanOfSum(), lambda x, y: (x + y).mean((2, 3), keepdim=True), maps, 2 * height * width)
    compare(
        operators.WeightedSum(),
        lambda x, y, w: x * w[:, 0, :, None, None] + y * w[:, 1, :, None, None],
        [*maps, random(batch, 2, channels, seed=3)],
        height * width,
    )


def infer(name, *arrays, **numbers):
    """The result of an operator for inference, which has no cell; its numbers come last."""
    tensors = [Tensor(a) for a in arrays] + ([operators.int32_tensor(**numbers)] if numbers else [])
    return operators.operator(name, **numbers)(*tensors).asnumpy()


@pytest.mark.parametrize("batch, channels, height, width", [(1, 1, 3, 3), (2, 5, 8, 7), (3, 4, 33, 20), (1, 2, 3, 130)])
def test_pooling(batch, channels, height, width):
    x = random(batch, channels, height, width)
    wide, pool = torch.from_numpy(x).double(), torch.nn.functional
    x[0, 0, 0, 0] = np.nan
    assert np.isnan(infer("global_max_pool", x)[0, 0]) and np.isnan(infer("global_avg_pool", x)[0, 0])
    x[0, 0, 0, 0] = wide[0, 0, 0, 0]
    np.testing.assert_array_equal(infer("global_max_pool", x), wide.amax((2, 3)))
    means = wide.mean((2, 3))
    np.testing.assert_allclose(infer("global_avg_pool", x), means, atol=rounding(means, height * width), rtol=0)
    for before in (0, 1, 2):
        for rounds_up in (False, True):
            padded = pool.pad(wide, (before, 0, before, 0), value=-torch.inf)
            expected = pool.max_pool2d(padded, 3, 2, ceil_mode=rounds_up)
            high, wide_ = expected.shape[2:]
            ours = infer("max_pool", x, top=before, left=before, high=high, wide=wide_)
            np.testing.assert_array_equal(ours, expected)
    for size in (1, 2, 3):
        expected = pool.avg_pool2d(wide, size)
        np.testing.assert_allclose(infer("avg_pool", x, size=size), expected, atol=rounding(expected, size**2), rtol=0)


@pytest.mark.parametrize("batch, channels, outputs", [(1, 1, 1), (2, 15, 9), (3, 300, 100), (8, 64, 7)])
def test_dense(batch, channels, outputs):
    arrays = random(batch, channels), random(outputs, channels, seed=1), random(outputs, seed=2)
    expected = torch.nn.functional.linear(*(torch.from_numpy(a).double() for a in arrays))
    np.testing.assert_allclose(infer("dense", *arrays), expected, atol=rounding(expected, channels), rtol=0)


@pytest.mark.parametrize("batch, parts, channels", [(1, 1, 1), (2, 2, 17), (3, 5, 40)])
def test_softmax(batch, parts, channels):
    x = 5 * random(batch, parts, channels)
    expected = torch.from_numpy(x).double().softmax(1)
    np.testing.assert_allclose(infer("softmax", x), expected, atol=rounding(expected, parts), rtol=0)


def test_slices_of_channels_and_add_relu():
    x, other = random(3, 9, 5, 7), random(3, 9, 5, 7, seed=1)
    for first, count in ((0, 9), (2, 3), (8, 1)):
        np.testing.assert_array_equal(infer("slice_channels", x, first=first, count=count), x[:, first : first + count])
    np.testing.assert_array_equal(infer("add_relu", x, other), np.maximum(x + other, 0))


@pytest.mark.parametrize("batch, cin, cout, height, width, groups, side, stride, dilation", [
    (1, 4, 6, 1, 1, 2, 3, 2, 1), (2, 64, 64, 14, 14, 32, 3, 2, 2), (3, 15, 9, 5, 30, 3, 5, 2, 1),
    (2, 12, 24, 9, 7, 4, 1, 2, 1), (1, 16, 32, 33, 8, 2, 3, 1, 2),
])  # fmt: skip
def test_strided_in_groups(batch, cin, cout, height, width, groups, side, stride, dilation):
    x, weight = random(batch, cin, height, width), random(cout, cin // groups, side, side, seed=1)
    bias = random(cout, seed=2)
    wide, padding = [torch.from_numpy(a).double() for a in (x, weight, bias)], dilation * (side // 2)
    expected = torch.nn.functional.conv2d(*wide, stride, padding, dilation, groups)
    terms = cin // groups * side * side
    ours = infer("strided", x, weight, bias, stride=stride, dilation=dilation, relu=0)
    np.testing.assert_allclose(ours, expected, atol=rounding(expected, terms), rtol=0)
    ours = infer("strided", x, weight, bias, stride=stride, dilation=dilation, relu=1)
    np.testing.assert_allclose(ours, expected.relu(), atol=rounding(expected, terms), rtol=0)


MLPS = [
    (1, 3, 5, 1, 1),
    (1, 6, 40, 130, 33),
    (2, 5, 70, 7, 9),
    (3, 16, 64, 33, 20),
    (1, 40, 100, 3, 130),
    (2, 64, 96, 90, 70),
]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("batch, channels, hidden, height, width", MLPS, ids=str)
def test_fused_mlp(batch, channels, hidden, height, width, residual):
    def reference(x, weight1, bias1, dw_weight, dw_bias, weight2, bias2, scale=None, shortcut=None):
        conv2d, gelu = torch.nn.functional.conv2d, torch.nn.functional.gelu
        inner = gelu(conv2d(conv2d(x, weight1, bias1), dw_weight, dw_bias, padding=1, groups=hidden))
        y = conv2d(inner, weight2, bias2)
        return y if scale is None else shortcut + scale.view(-1, 1, 1) * y

    arrays = [
        random(batch, channels, height, width),
        random(hidden, channels, 1, 1, seed=1) / channels**0.5, random(hidden, seed=2),
        random(hidden, 1, 3, 3, seed=3) / 3, random(hidden, seed=4),
        random(channels, hidden, 1, 1, seed=5) / hidden**0.5, random(channels, seed=6),
    ]  # fmt: skip
    if residual:
        arrays += [random(channels, seed=7), random(batch, channels, height, width, seed=8)]
    operator = operators.FusedMlpResidual() if residual else operators.FusedMlp()
    compare(operator, reference, arrays, channels * batch * height * width)


@pytest.mark.parametrize("epilogue", ["none", "gelu", "relu", "add_relu", "silu_mul"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pointwise_spreads_nan_and_infinity_as_plain_operators_do(epilogue, value):
    x, other = random(1, 4, 5, 9), random(1, 6, 5, 9, seed=2)
    x[0, 1, 2, 3] = value
    weight, one, zero = np.abs(random(6, 4, 1, 1, seed=1)) + 0.1, np.ones(6, np.float32), np.zeros(6, np.float32)
    ours = operators.PointwiseEpilogue(epilogue)(*map(Tensor, (x, weight, one, zero, other))).asnumpy()
    wide = [torch.from_numpy(a).double() for a in (x, weight, one, zero, other)]
    theirs = scale_shift_epilogue(epilogue, *wide).numpy()
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    np.testing.assert_allclose(ours, theirs, atol=rounding(theirs[np.isfinite(theirs)], 4))


def test_which_operator_computes_a_convolution():
    cases = {
        "pointwise": (conv(4, 8), conv(4, 8, group=2)),
        "depthwise": (conv(4, 4, 3, group=4), conv(4, 4, (1, 5), group=4)),
        "grouped": (conv(4, 8, 3, group=4),),
        "strided": (conv(4, 8, 3, 2),),
        "winograd": (conv(16, 20, 3), conv(20, 16, 3, dilation=4, has_bias=False)),
        "": (
            conv(4, 4, 3),
            conv(16, 15, 3),
            conv(16, 16, 3, dilation=5),
            conv(16, 16, 5),
            conv(4, 4, (3, 1), group=2),
            conv(4, 4, 3, 2, group=4),
            nn.Conv2d(4, 4, 3),
            conv(4, 4, 2),
        ),
    }
    for expected, convs in cases.items():
        assert [conv_kind(each) for each in convs] == [expected] * len(convs)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_depthwise_spreads_nan_and_infinity_as_plain_operators_do(value):
    x = random(1, 2, 9, 20)
    x[0, 1, 4, 10] = value
    net, plain = accelerate(conv(2, 2, 3, dilation=2, group=2)), conv(2, 2, 3, dilation=2, group=2)
    for each in (net, plain):
        each.weight.set_data(Tensor(np.abs(random(2, 1, 3, 3)) + 0.1))
    np.testing.assert_allclose(net(Tensor(x)).asnumpy(), plain(Tensor(x)).asnumpy(), atol=1e-6)


GRAPHS = [  # batch, channels, height, width, reduction, k, dilation
    (2, 64, 16, 16, 2, 5, 2),
    (2, 16, 9, 7, 1, 4, 1),
    (1, 96, 12, 20, 2, 5, 3),
    (3, 8, 3, 2, 1, 5, 4),  # the dilation shrinks to 1
    (1, 24, 1, 70, 1, 5, 5),
]


@pytest.mark.parametrize("batch, channels, height, width, reduction, k, dilation", GRAPHS, ids=str)
def test_max_relative_is_the_plain_operators(batch, channels, height, width, reduction, k, dilation):
    net, x = MaxRelativeConv(channels, k, dilation, reduction), Tensor(random(batch, channels, height, width))
    pooled = net.pool(x).asnumpy().copy()
    position = relative_position(channels, height * width, pooled[0, 0].size)
    position = Tensor(np.ascontiguousarray(position.T))
    operator = operators.MaxRelative(k, dilation)
    found, chosen = operator(x, Tensor(pooled), position)
    np.testing.assert_array_equal(chosen.asnumpy(), net.search(*net.nodes(x)).asnumpy())
    np.testing.assert_array_equal(found.asnumpy(), net.max_relative(x).asnumpy())
    dout = random(batch, 2 * channels, height, width, seed=1)
    ours = gradients(lambda a: operator(a, net.pool(a), position)[0], [x.asnumpy()], dout)[0]
    theirs = gradients(net.max_relative, [x.asnumpy()], dout)[0]
    np.testing.assert_allclose(ours, theirs, atol=rounding(theirs, batch * height * width), rtol=0)


def test_max_relative_of_nan():
    """A NaN reaches its own node and what it is a neighbour of, and nothing breaks."""
    x = random(1, 8, 6, 6)
    x[0, 3, 2, 2] = np.nan
    out = accelerate(MaxRelativeConv(8, 5, 1, 1)).max_relative_and_neighbours(Tensor(x))[0].asnumpy()
    assert np.isnan(out[0, 6, 2, 2]) and np.isnan(out[0, 7, 2, 2]) and np.isfinite(out[0, 6]).sum() == 35


SLOW_NETWORKS = (("skanet_nano", 64), ("van_tiny_lska_k11", 64), ("van_tiny", 65), ("sknet26", 64))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, size", [("skanet_nano", 33), *[pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_NETWORKS]]
)
def test_networks_give_the_same_with_and_without(name, size):
    x, outputs, all_gradients = Tensor(random(2, 3, size, size)), [], []
    net = mindcv.create_model(name, num_classes=10, drop_rate=0.0, drop_path_rate=0.0).set_train(False)
    for change in (accelerate, decelerate):
        change(net)
        outputs.append(net(x).asnumpy())
        found = ms.grad(lambda a: (net(a) ** 2).sum(), None, net.trainable_params())(x)
        all_gradients.append([g.asnumpy() for g in found])
    assert np.sqrt(np.mean((outputs[0] - outputs[1]) ** 2)) < 5e-6 * outputs[0].std()
    for ours, theirs in zip(*all_gradients):
        assert np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(theirs) + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["skanet_nano", *(pytest.param(n, marks=pytest.mark.slow) for n in ("van_tiny_lska_k7", "sknet26"))]
)
def test_batch_norms_may_be_in_training_alone(name):
    """So users take new statistics for old weights.

    SKNet's attention has a batch norm over two numbers a channel here, which divides rounding by their difference.
    """
    bound = 1e-3 if name == "sknet26" else 5e-6
    x, results = Tensor(random(2, 3, 64, 64)), []
    for context in (kernels.plain, nullcontext):
        with context():
            ms.set_seed(1)
            net = mindcv.create_model(name, num_classes=10).set_train(False)
        for _, cell in net.cells_and_names():
            if isinstance(cell, nn.BatchNorm2d):
                cell.set_train(True)
        results.append((net(x).asnumpy(), {p.name: p.asnumpy() for p in net.get_parameters() if "moving" in p.name}))
    (logits, statistics), (theirs, others) = results
    assert np.sqrt(np.mean((logits - theirs) ** 2)) < bound * theirs.std()
    for key, values in statistics.items():
        assert not np.array_equal(values, np.full_like(values, "variance" in key)), key
        np.testing.assert_allclose(values, others[key], atol=bound, rtol=bound)


def test_fewer_nodes_than_neighbours_are_an_error():
    with pytest.raises(ValueError, match="max_relative: not k <= h . w with k = 5, h = 2, w = 2"):
        accelerate(MaxRelativeConv(8, 5, 1, 1))(Tensor(random(1, 8, 2, 2))).asnumpy()


def test_operators_of_the_same_inputs_and_other_options_have_their_own_shapes():
    x, weight, bias = Tensor(random(1, 8, 8, 8)), Tensor(random(4, 8, 3, 3)), Tensor(random(4))
    for stride in (2, 4):
        assert operators.Strided(stride, 1)(x, weight, bias).shape == (1, 4, 8 // stride, 8 // stride)
    for k in (4, 5):
        assert operators.MaxRelative(k, 1)(x, x, Tensor(random(64, 64)))[1].shape == (1, 64, k)


def test_they_can_be_had():
    assert kernels._why_not() == ""


def test_modes(monkeypatch):
    monkeypatch.setenv("MINDSKA_KERNELS", "off")
    assert not kernels.available()
    monkeypatch.setenv("MINDSKA_KERNELS", "require")
    assert kernels.available()
    with kernels.plain():
        assert not kernels.available()
    monkeypatch.setenv("MINDSKA_KERNELS", "sometimes")
    with pytest.raises(SettingError, match="MINDSKA_KERNELS is 'sometimes'; expected one of auto, off, require"):
        kernels.available()


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache, and nothing remembered."""
    monkeypatch.setenv("MINDSKA_CACHE", str(tmp_path / "cache"))
    build.library.cache_clear()
    kernels._why_not.cache_clear()
    yield tmp_path / "cache"
    build.library.cache_clear()
    kernels._why_not.cache_clear()


@pytest.mark.parametrize(
    "compiler, words",
    [
        ("no-such-compiler", "no C++ compiler"),
        (" ", "no C++ compiler"),
        ('g++ "', "cannot be started"),
        ("false", "false failed on"),
    ],
)
def test_without_a_compiler_plain_operators_do_it(fresh, monkeypatch, caplog, compiler, words):
    monkeypatch.setenv("CXX", compiler)
    assert not kernels.available()
    assert len(caplog.records) == 1 and words in caplog.text and "the same results to rounding, slower" in caplog.text
    monkeypatch.setenv("MINDSKA_KERNELS", "require")
    with pytest.raises(SettingError, match="cannot be had"):
        kernels.available()


def test_an_unwritable_cache_is_no_disaster(fresh, caplog):
    fresh.write_text("a file")
    assert not kernels.available() and "cannot be used" in caplog.text


def test_a_cache_that_cannot_be_searched_is_no_disaster(fresh, monkeypatch, caplog):
    def read(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(build, "_read", read)
    assert not kernels.available() and "cannot be used: [Errno 13]" in caplog.text


def test_a_cache_with_a_colon_is_no_disaster(fresh, monkeypatch, caplog):
    monkeypatch.setenv("MINDSKA_CACHE", str(fresh / "a:b"))
    assert not kernels.available() and "has a colon" in caplog.text


def test_libraries_that_cannot_be_loaded_are_no_disaster(fresh, monkeypatch, caplog):
    """On a file system that does not execute, without a run-time library, ..."""
    monkeypatch.setattr(build, "_build", lambda source, path, command: b"no library")
    assert not kernels.available() and "file too short" in caplog.text


@pytest.fixture(scope="module")
def gelu_library():
    path = build.library("gelu")
    return path.name, path.read_bytes()


@pytest.fixture(scope="module")
def threads_library():
    path = build.library(build.THREADS)
    return path.name, path.read_bytes()


@pytest.fixture
def filled(fresh, gelu_library, threads_library, monkeypatch):
    """A cache with one library, which is "built" at once from now on; the file, and how often it was built."""
    name, content = gelu_library
    fresh.mkdir()
    for each, its_content in (gelu_library, threads_library):
        (fresh / each).write_bytes(its_content)
        (fresh / each).chmod(0o755)
    built = []

    def quickly(source, path, command):
        if source.stem == build.THREADS:
            return threads_library[1]
        built.append(path)
        return content

    monkeypatch.setattr(build, "_build", quickly)
    return fresh / name, built


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def put_a_link(path):
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def put_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def put_another_operator(path):
    """A whole library, but under another name, which its checksum has in it."""
    library = path.read_bytes().rpartition(build.MARK)[0]
    path.write_bytes(library + build.MARK + build._checksum(path.with_name("gate-0123.so"), library))


DAMAGES = {
    "cut": lambda path: os.truncate(path, path.stat().st_size * 6 // 10),
    "empty": lambda path: os.truncate(path, 0),
    "without its end": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "a bit": flip_a_bit,
    "foreign": lambda path: path.write_bytes(Path(ms.__file__).read_bytes()),
    "without checksum": lambda path: path.write_bytes(path.read_bytes().rpartition(build.MARK)[0]),
    "another": put_another_operator,
    "link": put_a_link,
    "pipe": put_a_pipe,
    "group": lambda path: path.chmod(0o775),
    "all": lambda path: path.chmod(0o757),
    "owner": lambda path: os.chown(path, 12345, -1),
}


@pytest.mark.fault("caches")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_library_that_is_damaged_or_not_ours_is_built_anew(filled, caplog, gelu_library, damage):
    if damage == "owner" and os.geteuid():
        pytest.skip("only root can give a file away")
    path, built = filled
    DAMAGES[damage](path)
    assert build.library("gelu") == path and built == [path]
    words = {"link": "it is a link", "group": "mode 775", "all": "mode 757", "owner": "belongs to user 12345"}
    reason = words.get(damage, "its checksum is wrong")
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{path} is not loaded (") and said.endswith("): it is built anew") and reason in said
    assert path.read_bytes() == gelu_library[1] and path.stat().st_mode & 0o777 == 0o755 and not path.is_symlink()
    assert not build.why_untrusted(path.stat())
    np.testing.assert_allclose(operators.Gelu()(Tensor(np.float32([0, 10]))).asnumpy(), [0, 10])


def test_a_sound_library_is_loaded_from_a_cache_that_cannot_be_written(filled, monkeypatch):
    """As one that root has filled for all."""

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(build, "_write", refuse)
    monkeypatch.setattr(build.tempfile, "TemporaryDirectory", refuse)
    assert build.library("gelu") == filled[0] and not filled[1]


@pytest.mark.fault("caches")
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775])
def test_a_cache_that_others_can_write_is_not_used(filled, caplog, mode):
    path, built = filled
    path.parent.chmod(mode)
    assert not kernels.available() and not built
    assert f"others can write it (mode {mode:o}); MINDSKA_CACHE can name a folder of your own" in caplog.text
    with pytest.raises(build.BuildError, match="is not used"):
        build.library("gelu")


@pytest.mark.fault("caches")
def test_a_cache_that_all_can_replace_is_not_used(filled, caplog, tmp_path):
    tmp_path.chmod(0o777)
    assert not kernels.available() and not filled[1] and f"all can write {tmp_path} (mode 777)" in caplog.text
    caplog.clear()
    kernels._why_not.cache_clear()
    tmp_path.chmod(0o1777)  # as /tmp: nobody else can rename what is in it
    assert build.library("gelu") == filled[0] and not caplog.records


@pytest.mark.fault("caches")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_cache_of_another_user_is_not_used(filled, caplog):
    os.chown(filled[0].parent, 12345, -1)
    assert not kernels.available() and not filled[1] and "it belongs to user 12345" in caplog.text


def test_what_is_made_only_the_user_can_write(fresh, monkeypatch, tmp_path, gelu_library, threads_library):
    """Whatever the umask; and the default cache becomes so, if it is from before."""
    contents = dict([gelu_library, threads_library])
    monkeypatch.setattr(build, "_build", lambda source, path, command: contents[path.name])
    monkeypatch.delenv("MINDSKA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "mindska").mkdir()
    (tmp_path / "mindska").chmod(0o775)
    before = os.umask(0o002)
    try:
        path = build.library("gelu")
        assert path.parent == tmp_path / "mindska"
        monkeypatch.setenv("MINDSKA_CACHE", str(fresh))
        build.library.cache_clear()
        for made in (path, path.parent, build.library("gelu"), fresh):
            assert not build.why_untrusted(made.stat())
    finally:
        os.umask(before)


@pytest.mark.fault("cache-deleted")
@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE])
def test_a_process_keeps_what_it_loaded(filled, mode, gelu_library, caplog):
    """The cache is deleted during a run, or its files are replaced: new shapes, gradients and layers still work."""
    ms.set_context(mode=mode)
    path, built = filled
    net = operators.Gelu()

    def works(size):
        values = np.float32([0] * size + [10])
        np.testing.assert_allclose(net(Tensor(values)).asnumpy(), values)
        np.testing.assert_allclose(ms.grad(net)(Tensor(values)).asnumpy(), [0.5] * size + [1], atol=1e-6)

    works(3)
    shutil.rmtree(path.parent)
    works(3)
    works(4)
    assert path.read_bytes() == gelu_library[1] and not built  # MindSpore looks whether it is there
    path.parent.rename(path.parent.with_name("gone"))
    net = operators.Gelu()
    works(5)
    path.unlink()
    path.write_bytes(b"no library")
    works(6)


def test_a_cache_that_was_deleted_and_cannot_be_made_again_is_said(filled, monkeypatch):
    path, _ = filled
    net = operators.Gelu()
    shutil.rmtree(path.parent)
    path.parent.write_text("a file")
    with pytest.raises(build.BuildError, match="was deleted and cannot be made again"):
        net(Tensor(np.ones(3, np.float32)))


def test_the_fingerprint_is_that_of_sources_and_compiler(filled, monkeypatch):
    """Not that of the place, nor of a file that was built again."""
    monkeypatch.setattr(kernels, "FILES", ("gelu",))
    first = kernels.fingerprint()
    assert first.startswith("C++ ")
    kernels._why_not.cache_clear()
    build.library.cache_clear()
    # As another file: this process may have loaded the library, and what of it is cut off would end it with SIGBUS.
    cut = Path(f"{filled[0]}.cut")
    cut.write_bytes(Path(filled[0]).read_bytes()[:100])
    cut.replace(filled[0])
    assert kernels.fingerprint() == first and filled[1]
    monkeypatch.setattr(build, "_processor", lambda: "another")
    build.library.cache_clear()
    assert kernels.fingerprint() != first
    with kernels.plain():
        assert kernels.fingerprint() == "plain"


@pytest.mark.slow
def test_a_library_is_built_once_by_many_at_a_time(fresh, tmp_path):
    compiler, log = tmp_path / "compiler.sh", tmp_path / "log"
    compiler.write_text(f'case "$*" in *" -o "*) echo "$*" >> {log};; esac\nexec g++ "$@"\n')
    program = "from mindska.kernels.build import library; print(library('gelu'))"
    words = [sys.executable, "-c", program]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), MINDSKA_CACHE=str(fresh), CXX=f"sh {compiler}")

    def ask(_):
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout

    with ThreadPoolExecutor(3) as pool:
        answers = set(pool.map(ask, range(3)))
    assert len(answers) == 1
    assert {path.suffix for path in fresh.iterdir() if path.suffix != ".lock"} == {".so"}  # nothing half-built
    ask(0)
    built = [Path(line.split(" -o ")[0].split()[-1]).name for line in log.read_text().splitlines()]
    assert sorted(built) == ["gelu.cc", "threads.cc"]


@pytest.mark.slow
def test_another_source_is_another_library(fresh, monkeypatch, tmp_path):
    first = build.library("gelu")
    for path in (build.FOLDER / "gelu.cc", build.FOLDER / "threads.cc", *build.FOLDER.glob("*.h")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "gelu.cc").write_text((tmp_path / "gelu.cc").read_text() + "// changed\n")
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    build.library.cache_clear()
    assert build.library("gelu") != first


has_avx512 = "avx512f" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else False
without_avx512 = pytest.mark.skipif(not has_avx512, reason="no processor that could do more")


@pytest.mark.fault("operators")
@pytest.mark.fault("sequence")
@pytest.mark.slow
@pytest.mark.parametrize("options", [[], pytest.param(["-mno-avx512f"], marks=without_avx512)])
def test_memory_is_not_touched_outside(tmp_path, options):
    """Built with AddressSanitizer and UndefinedBehaviorSanitizer; with one thread and with three.

    Each operator is also called with every size, rank, type and number wrong: it refuses, and writes nothing. And two
    live buffers cannot share a workspace.
    """
    program = tmp_path / "sanitize"
    # Nine tenths of the time goes into compiling: not optimised it takes a quarter.
    built("sanitize.cc", program, "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", *options)
    for threads in ("1", "3"):
        done = subprocess.run([program, threads], capture_output=True, text=True, check=False)
        assert done.returncode == 0, "".join(line for line in done.stderr.splitlines(True) if "did not run" not in line)
        names = {f"mindska_{name}" for name in signatures()}
        assert set(done.stdout.split()) == {*names, "clean"}  # an operator without a case is missing here
    done = subprocess.run([program, "0"], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGABRT and "is acquired twice in one thread" in done.stderr


@pytest.mark.slow
@without_avx512
def test_narrower_vectors(tmp_path):
    """These tests again, as on a processor without AVX-512, for which some operators have other tiles."""
    environment = dict(os.environ, CXX="g++ -mno-avx512f", MINDSKA_CACHE=str(tmp_path))
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist"]
    chosen = (
        "pointwise or matrix or mlp or grouped or strided or winograd or max_relative or neighbours or resize or pixel"
    )
    done = subprocess.run([*words, "-k", chosen, __file__], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout and " skipped" not in done.stdout, done.stdout[-3000:]
