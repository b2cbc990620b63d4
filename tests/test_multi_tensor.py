"""The update of a training step for all parameters at once: its numbers, its order, and when it is used."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from test_kernels import pytestmark  # noqa: F401  these need a compiler
from test_signatures import entry

from mindska import kernels
from mindska.config import Config
from mindska.training import StepOptions, TrainStep, build_optimizer, multi_tensor

UPDATES, LR, DECAY, CLIP, AVERAGE = 6, 0.05, 0.1, 1.0, 0.9
SHAPES = {  # several tasks of the operator, remainders of its vectors, one number
    "stem.conv.weight": (3, 5, 7), "stem.conv.bias": (1,), "stages.0.0.conv.weight": (150, 251),
    "stages.0.1.conv.bias": (17,), "stages.1.0.conv.weight": (1, 1), "classifier.weight": (33, 31),
}  # fmt: skip


class Given(nn.Cell):
    """A network whose gradients are its batch; its one statistic follows the batch, too."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        rng = np.random.default_rng(0)
        made = [Parameter(Tensor(rng.standard_normal(s, dtype=np.float32)), name=n) for n, s in SHAPES.items()]
        self.weights = ParameterTuple(made)
        self.statistic = Parameter(Tensor(np.zeros(3, np.float32)), name="norm.moving_mean", requires_grad=False)

    def losses(self, *gradients):
        ops.assign(self.statistic, 0.5 * self.statistic + gradients[0].reshape(-1)[:3])
        return ops.addn([(p * g).sum() for p, g in zip(self.weights, gradients)])


def made(opt, fused, grouped=True, accumulation=1, **settings):
    groups = dict(layer_decay=0.5, backbone_lr_factor=0.5) if grouped else {}
    config = Config(**{**dict(opt=opt, lr=LR, weight_decay=DECAY, **groups), **settings})
    net, rates = Given(), [LR / (1 + i) for i in range(UPDATES)]
    options = StepOptions(clip_value=CLIP, ema_decay=AVERAGE, accumulation=accumulation)
    if fused:
        return TrainStep(net, None, build_optimizer(config, net, rates), options).set_train(True)
    with kernels.plain():
        return TrainStep(net, None, build_optimizer(config, net, rates), options).set_train(True)


def gradients(update):
    """Of very different sizes: below and above the norm that is clipped."""
    rng = np.random.default_rng(100 + update)
    return [0.003 * (1 + 5 * (update % 3)) * rng.standard_normal(s, dtype=np.float32) for s in SHAPES.values()]


def exact(opt, grouped):
    """The same in float64, by PyTorch."""
    start = [torch.nn.Parameter(torch.from_numpy(p.asnumpy()).double()) for p in Given().weights]
    # layers from the last one: stem 3, stages.0 2 and 1, stages.1 0, classifier
    factors = [0.5**4 * 0.5] * 2 + [0.5**3 * 0.5, 0.5**2 * 0.5, 0.5 * 0.5, 1.0] if grouped else [1.0] * 6
    groups = [
        dict(params=[p], weight_decay=DECAY if p.ndim > 1 else 0.0, lr=LR, factor=factor)
        for p, factor in zip(start, factors)
    ]
    kinds = dict(adamw=torch.optim.AdamW, momentum=lambda g: torch.optim.SGD(g, momentum=0.9))
    optimizer, averages, statistic = kinds[opt](groups), [p.detach().clone() for p in start], np.zeros(3)
    for update in range(UPDATES):
        for p, gradient in zip(start, gradients(update)):
            p.grad = torch.from_numpy(gradient).double()
        statistic = 0.5 * statistic + gradients(update)[0].reshape(-1)[:3]
        torch.nn.utils.clip_grad_norm_(start, CLIP)
        for group in optimizer.param_groups:
            group["lr"] = LR / (1 + update) * group["factor"]
        optimizer.step()
        averages = [AVERAGE * a + (1 - AVERAGE) * p.detach() for a, p in zip(averages, start)]
    return [p.detach().numpy() for p in start], [a.numpy() for a in averages], statistic


def values(step):
    """Network, averages and state, by name."""
    kept = [*step.network.get_parameters(), *step.ema, *step.state()]
    return {p.name: p.asnumpy().copy() for p in kept}


def call(step, arrays):
    return [float(result.asnumpy()) for result in step(*map(Tensor, arrays))]


def distance(step, expected):
    weights, averages, statistic = expected
    ours = [p.asnumpy() for p in (*step.network.weights, *step.ema[: len(SHAPES)], step.network.statistic)]
    return max(abs(o - e).max() / abs(e).max() for o, e in zip(ours, [*weights, *averages, statistic]))


@pytest.mark.parametrize(
    "mode", [pytest.param(ms.GRAPH_MODE, marks=pytest.mark.slow), ms.PYNATIVE_MODE], ids=["graph", "pynative"]
)
@pytest.mark.parametrize("opt, grouped", [("adamw", True), ("adamw", False), ("momentum", True)])
def test_updates_are_those_of_float64(opt, grouped, mode):
    """As near as the plain path's, with a rate for each layer and one for all; a bad batch in between moves nothing."""
    ms.set_context(mode=mode)
    fused, plain, expected = made(opt, True, grouped), made(opt, False, grouped), exact(opt, grouped)
    assert fused.fused_update is not None and plain.fused_update is None
    assert list(values(fused)) == list(values(plain)), "a checkpoint of one path resumes with the other"
    clipped = []
    for update in range(UPDATES):
        if update == 3:
            counters = {"skipped": 1, "skipped_in_a_row": 1, "good_steps": 0}
            before = {**values(fused), **counters}
            bad = gradients(3)
            bad[-1][5, 5] = np.nan
            call(fused, bad)
            for name, value in values(fused).items():
                np.testing.assert_array_equal(value, before[name], err_msg=name)
        ours, theirs = call(fused, gradients(update)), call(plain, gradients(update))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)
        clipped.append(ours[1] > CLIP)
    assert any(clipped) and not all(clipped)
    noise = distance(plain, expected)
    assert 0 < distance(fused, expected) <= 1.5 * noise < 1e-5
    for name, value in values(plain).items():
        if name not in ("skipped", "good_steps"):
            np.testing.assert_allclose(values(fused)[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    assert int(fused.optimizer.global_step.asnumpy().item()) == UPDATES


def test_an_accumulated_update_is_one_of_the_sum(graph):
    """The gradients are parameters then, which are cleared afterwards."""
    whole, halves = made("adamw", True), made("adamw", True, accumulation=2)
    for update in range(3):
        call(whole, gradients(update))
        for share in (0.5, 1.5):
            call(halves, [np.float32(share) * g for g in gradients(update)])
    for name, value in values(whole).items():
        if name != "norm.moving_mean" and "last_good" not in name and "ema.norm" not in name:
            np.testing.assert_allclose(values(halves)[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert not any(p.asnumpy().any() for p in halves.accumulated)


class ReadLate(Given):
    """A loss that reads its parameters in long work which no gradient waits for."""

    def losses(self, *gradients):
        late = self.weights[2]
        for _ in range(20):
            late = ops.matmul(late, self.weights[2].T) * 0.001
            late = ops.matmul(late, self.weights[2]) * 0.1 + self.weights[2]
        return super().losses(*gradients) + ops.stop_gradient(late.mean())


def test_what_a_step_reads_is_what_was_there_before_the_update(graph):
    """The parameters are written in place: MindSpore has to know, or what reads them comes before or after it."""
    steps = []
    for fused in (True, False):
        net = ReadLate()
        optimizer = build_optimizer(Config(opt="momentum", lr=1.0), net, [10.0] * 100)
        with kernels.plain():
            steps.append(TrainStep(net, None, optimizer, StepOptions()).set_train(True))
        if fused:
            steps[0] = TrainStep(net, None, optimizer, StepOptions()).set_train(True)
            assert steps[0].fused_update is not None
    for _ in range(20):
        (ours, _), (theirs, _) = (call(step, gradients(2)) for step in steps)
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_which_updates_are_fused():
    """Those of the recipes, AdamW and momentum; the others, and parameters in half precision, take the plain path."""
    for opt, kind in (("adamw", multi_tensor.FusedAdamW), ("momentum", multi_tensor.FusedMomentum)):
        assert type(made(opt, True).fused_update.optimizer) is kind
    for opt in ("sgd", "lion", "adam", "rmsprop"):
        assert made(opt, True).fused_update is None
    assert made("momentum", True, use_nesterov=True).fused_update is None
    net = Given()

    def fused(optimizer, *lists):
        return multi_tensor.fused_update(optimizer, 0.5, *lists, *[()] * (4 - len(lists)))

    assert fused(nn.Momentum(list(net.weights), [0.1, 0.1], 0.9)).average is None
    for other in (
        nn.Momentum(list(net.weights), 0.1, 0.9),  # no table of learning rates
        nn.Momentum(list(net.weights), [0.1, 0.1], 0.9, use_nesterov=True),
        nn.Momentum(list(net.weights), [0.1, 0.1], 0.9, loss_scale=2.0),
        nn.Momentum([dict(params=list(net.weights), grad_centralization=True)], [0.1, 0.1], 0.9),
        type("Other", (nn.Momentum,), {})(list(net.weights), [0.1, 0.1], 0.9),
    ):
        assert fused(other) is None
    half = [Parameter(Tensor(np.ones(3, np.float16)), name=f"half{i}") for i in range(2)]
    assert fused(nn.Momentum(half, [0.1, 0.1], 0.9)) is None
    assert fused(nn.Momentum(list(net.weights), [0.1, 0.1], 0.9), half[:1], half[1:]) is None


@pytest.mark.fault("operators")
def test_what_does_not_fit_together_is_refused(capfd):
    """And nothing is written."""

    def ones(*shape):
        return np.ones(shape, np.float32)

    def refused(name, changes, why):
        arrays = dict(adamw=adamw, momentum=momentum, average=average)[name]()
        for place, array in changes.items():
            arrays[place] = array
        before = [a.copy() for a in arrays]
        assert entry(f"multi_tensor_{name}", arrays) != 0
        assert why in capfd.readouterr().err
        for old, new in list(zip(before, arrays))[:-1]:
            np.testing.assert_array_equal(new, old)

    def adamw():
        numbers = [np.int32([1]), ones(1), ones(1), ones(1), np.int32([1]), ones(3) / 2, ones(2), np.int32([0, 0])]
        return [*numbers, ones(2), *[ones(*shape) for _ in range(4) for shape in ((3, 2), (5,))], ones(1)]

    def momentum():
        numbers = [np.int32([1]), ones(1), ones(1), np.int32([1]), ones(2), np.int32([0, 0])]
        return [*numbers, ones(2), *[ones(*shape) for _ in range(3) for shape in ((3, 2), (5,))], ones(1)]

    def average():
        lists = [ones(3, 2), ones(3, 2), ones(5), ones(7), ones(5), ones(7)]
        return [np.int32([1]), ones(2), np.int32([1]), *lists, ones(1)]

    for name, arrays in (("adamw", adamw()), ("momentum", momentum())):
        assert entry(f"multi_tensor_{name}", arrays) == 0
        tables = {"adamw": 8, "momentum": 6}[name]
        assert arrays[tables + 3][0, 0] < 1, "a parameter has moved"
        refused(name, {1: ones(2)}, "tensor 1 is not one number")
        refused(name, {tables - 1: np.int32([0, 1])}, "no such table of learning rates")
        refused(name, {tables - 1: np.int32([0, -1])}, "no such table of learning rates")
        refused(name, {tables: ones(1)}, "there is no learning rate for update 1")
        refused(name, {tables - 4: np.int32([-1])} if name == "adamw" else {3: np.int32([-1])}, "for update -1")
        refused(name, {tables + 3: ones(2, 3)}, "differ in shape")
        refused(name, {len(arrays) - 2: ones(6)}, "differ in shape")
        refused(name, {tables - 2: ones(4), tables - 1: np.int32([0] * 4)}, "there are too few tensors")
    assert entry("multi_tensor_average", average()) == 0
    refused("average", {4: ones(2, 3)}, "differ in shape")
    refused("average", {8: ones(8)}, "differ in shape")
    refused("average", {2: np.int32([4])}, "there are too few tensors")
