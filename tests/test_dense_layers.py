"""Resizes and the FPN against PyTorch's operators: values and gradients, odd sizes, both modes."""

import mindspore as ms
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mindspore import Tensor, nn, ops

from mindska.acceleration import accelerate
from mindska.errors import SettingError
from mindska.models.layers.fpn import FPN
from mindska.models.layers.resize import bilinear, nearest

SIZES = [
    ((8, 8), (16, 16)),
    ((5, 7), (9, 13)),
    ((3, 4), (31, 17)),
    ((1, 1), (6, 5)),
    ((16, 9), (7, 9)),
    ((6, 6), (6, 6)),
]


class Resized(nn.Cell):
    """All sizes in one graph: the outputs, and in `scalar` their sum weighted by `weights`."""

    def __init__(self, resize):
        super().__init__()
        self.resize = resize

    def construct(self, *maps):
        return tuple([self.resize(x, size) for x, (_, size) in zip(maps, SIZES)])


def up_false(x, size):
    return bilinear(x, size, False)


def up_true(x, size):
    return bilinear(x, size, True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE])
@pytest.mark.parametrize(
    "resize, options",
    [
        (nearest, dict(mode="nearest")),
        (up_false, dict(mode="bilinear", align_corners=False)),
        (up_true, dict(mode="bilinear", align_corners=True)),
    ],
)
def test_resizes_are_pytorchs(resize, options, mode):
    ms.set_context(mode=mode)
    rng = np.random.default_rng(0)
    maps = [rng.standard_normal((2, 3, *size), dtype=np.float32) for size, _ in SIZES]
    weights = [rng.standard_normal((2, 3, *size), dtype=np.float32) for _, size in SIZES]
    net, scale = Resized(resize), [Tensor(w) for w in weights]

    def weighted(*inputs):
        total = 0.0
        for output, weight in zip(net(*inputs), scale):
            total = total + ops.sum(output * weight)
        return total

    inputs = [Tensor(x) for x in maps]
    outputs, gradients = net(*inputs), ms.grad(weighted, grad_position=tuple(range(len(maps))))(*inputs)
    for i, (size, new_size) in enumerate(SIZES):
        x = torch.from_numpy(maps[i]).requires_grad_()
        expected = F.interpolate(x, size=new_size, **options)
        (expected * torch.from_numpy(weights[i])).sum().backward()
        exact = options["mode"] == "nearest"
        bound = 0 if exact else 1e-5
        np.testing.assert_allclose(
            outputs[i].asnumpy(), expected.detach().numpy(), atol=bound, rtol=0, err_msg=str(size)
        )
        np.testing.assert_allclose(gradients[i].asnumpy(), x.grad.numpy(), atol=1e-5, err_msg=str(size))


def torch_fpn(features, weights, start, extra_levels, extra):
    """The FPN in PyTorch, from MMDetection's description."""

    def convolved(x, name, **options):
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **options)

    features = features[start:]
    merged = [convolved(x, f"lateral_convs.{i}") for i, x in enumerate(features)]
    for i in range(len(merged) - 1, 0, -1):
        merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], size=merged[i - 1].shape[2:], mode="nearest")
    maps = [convolved(x, f"fpn_convs.{i}", padding=1) for i, x in enumerate(merged)]
    for i in range(extra_levels):
        if extra == "pool":
            maps.append(F.max_pool2d(maps[-1], 1, stride=2))
        else:
            source = maps[-1] if i else features[-1]
            maps.append(convolved(source, f"fpn_convs.{len(features) + i}", padding=1, stride=2))
    return maps


@pytest.mark.parametrize("accelerated", [True, False])
@pytest.mark.parametrize(
    "start, extra_levels, extra, count", [(0, 0, "on_input", 4), (1, 2, "on_input", 5), (0, 1, "pool", 5)]
)
def test_fpn_is_mmdetections(start, extra_levels, extra, count, accelerated):
    """Of semantic FPN, RetinaNet and Mask R-CNN, on maps whose sizes are odd."""
    rng, channels = np.random.default_rng(1), (4, 8, 12, 16)
    features = [rng.standard_normal((2, c, -(-27 // 2**i), -(-37 // 2**i)), np.float32) for i, c in enumerate(channels)]
    net = FPN(channels, 32, start, extra_levels, extra)
    if accelerated:
        accelerate(net)
    weights = {}
    for name, p in net.parameters_and_names():
        if name.endswith("bias"):
            assert not p.asnumpy().any()
            p.set_data(Tensor(rng.standard_normal(p.shape, np.float32)))
        weights[name] = torch.from_numpy(p.asnumpy())
    fan = 32 * 9 + 32 * 9  # Xavier's uniform: the bound is sqrt(6 / (fan_in + fan_out))
    assert 0.95 < np.abs(weights["fpn_convs.0.weight"].numpy()).max() / np.sqrt(6 / fan) <= 1.0001
    maps = net([Tensor(x) for x in features])
    expected = torch_fpn([torch.from_numpy(x) for x in features], weights, start, extra_levels, extra)
    assert len(maps) == count == len(expected)
    for ours, theirs in zip(maps, expected):
        np.testing.assert_allclose(ours.asnumpy(), theirs.numpy(), atol=2e-5)


def test_fpn_refuses_what_it_does_not_know():
    with pytest.raises(SettingError, match="start_level is 4; expected 0 to 3"):
        FPN((4, 8, 12, 16), start_level=4)
    with pytest.raises(SettingError, match="extra is 'on_lateral'; expected one of on_input, pool"):
        FPN((4, 8), extra="on_lateral")
