"""Optimisers, schedules, weights of the classes: PyTorch's (and timm's) in numbers."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Parameter, Tensor, nn

from mindska import builders
from mindska.config import Config, ConfigError
from mindska.errors import SettingError
from mindska.training import build_optimizer, learning_rates
from mindska.training.finetune import layer_numbers, learning_rate_factors

UPDATES, DECAY, LR = 4, 0.1, 0.05


class Blocks(nn.Cell):
    """Parameters named as those of a network of two stages."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(0)
        names = ["stem.conv", "stages.0.0.conv", "stages.1.0.conv", "stages.1.1.conv", "classifier"]
        for number, name in enumerate(names):
            for kind, shape in (("weight", (3, 4)), ("bias", (3,))):
                value = Tensor(rng.standard_normal(shape, dtype=np.float32))
                self.insert_param_to_cell(f"p{number}{kind}", Parameter(value, name=f"{name}.{kind}"), False)


class RMSpropTF(torch.optim.Optimizer):
    """timm's, which follows TensorFlow's: the mean square begins at 1, epsilon lies within the root, and the learning
    rate within the momentum."""

    def __init__(self, groups, lr, momentum):
        super().__init__(groups, dict(lr=lr, momentum=momentum, alpha=0.9, eps=1e-10))

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                square, buffer = state.setdefault("s", torch.ones_like(p)), state.setdefault("m", torch.zeros_like(p))
                with torch.no_grad():
                    gradient = p.grad + group["weight_decay"] * p
                    square.add_((1 - group["alpha"]) * (gradient**2 - square))
                    buffer.mul_(group["momentum"]).add_(group["lr"] * gradient / (square + group["eps"]).sqrt())
                    p.sub_(buffer)


class Lion(torch.optim.Optimizer):
    """Chen et al., 2023, algorithm 2."""

    def __init__(self, groups, lr, betas):
        super().__init__(groups, dict(lr=lr, betas=betas))

    def step(self):
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                with torch.no_grad():
                    p.mul_(1 - lr * group["weight_decay"]).sub_(lr * torch.sign(beta1 * m + (1 - beta1) * p.grad))
                    m.mul_(beta2).add_((1 - beta2) * p.grad)


THEIRS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999)),
    "adam": lambda groups: torch.optim.Adam(groups, lr=LR, betas=(0.9, 0.999)),
    "lion": lambda groups: Lion(groups, LR, (0.9, 0.999)),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=LR, momentum=0.9),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=LR, momentum=0.9),
    "sgd nesterov": lambda groups: torch.optim.SGD(groups, lr=LR, momentum=0.9, nesterov=True),
    "momentum nesterov": lambda groups: torch.optim.SGD(groups, lr=LR, momentum=0.9, nesterov=True),
    "rmsprop": lambda groups: RMSpropTF(groups, LR, 0.9),
}


@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.parametrize("kind", THEIRS)
def test_an_update_is_pytorchs(kind, layer_decay):
    """With one learning rate, and with one for each layer; every update with another rate."""
    check_updates(kind, layer_decay)


@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.slow
def test_our_adamw_is_pytorchs_in_graph_mode(layer_decay, graph):
    check_updates("adamw", layer_decay)


def check_updates(kind, layer_decay):
    opt, _, nesterov = kind.partition(" ")
    config = Config(
        opt=opt,
        lr=LR,
        weight_decay=DECAY,
        layer_decay=layer_decay,
        use_nesterov=bool(nesterov),
        backbone_lr_factor=0.5 if layer_decay else 1.0,
    )
    net, rates = Blocks(), [LR * (1 + i) for i in range(UPDATES)]
    ours = net.trainable_params()
    theirs = [torch.nn.Parameter(torch.from_numpy(p.asnumpy().copy())) for p in ours]
    numbers = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    factors = [(layer_decay or 1.0) ** (4 - n) * (0.5 if n < 4 and layer_decay else 1) for n in numbers]
    groups = [
        dict(params=[p], weight_decay=DECAY if p.ndim > 1 else 0.0, lr=LR * factor, factor=factor)
        for p, factor in zip(theirs, factors)
    ]
    optimizer, reference = build_optimizer(config, net, rates), THEIRS[kind](groups)
    rng = np.random.default_rng(1)
    for rate in rates:
        gradients = [rng.standard_normal(p.shape, dtype=np.float32) for p in ours]
        optimizer(tuple(map(Tensor, gradients)))
        for group in reference.param_groups:
            group["lr"] = rate * group["factor"]
        for p, gradient in zip(theirs, gradients):
            p.grad = torch.from_numpy(gradient)
        reference.step()
    for our, their in zip(ours, theirs):
        np.testing.assert_allclose(our.asnumpy(), their.detach().numpy(), rtol=2e-5, atol=1e-5, err_msg=our.name)
    tables = [p.name for p in optimizer.get_parameters() if p.size == UPDATES and p.ndim == 1]
    assert tables and all(name.startswith("learning_rate") for name in tables), "state.NOT_STATE knows them by this"


def test_layers_of_the_networks():
    import mindcv

    def numbers(model):
        net = mindcv.create_model(model)
        return layer_numbers([p.name for p in net.get_parameters()], "classifier.")

    nano = numbers("skanet_nano")  # 1, 1, 2, 1 blocks
    assert nano["stages.0.patch_embed.proj.weight"] == 0 and nano["stages.0.blocks.0.norm1.gamma"] == 1
    assert nano["stages.0.norm.gamma"] == 1 and nano["stages.1.patch_embed.proj.weight"] == 2
    assert nano["stages.2.patch_embed.norm.beta"] == nano["stages.2.blocks.0.layer_scale_1"] == 3
    assert nano["stages.2.blocks.1.mlp.fc1.weight"] == nano["stages.2.norm.beta"] == 4
    assert nano["stages.3.norm.gamma"] == 5 and nano["classifier.bias"] == 6
    sk = numbers("sk_resnet18")  # 2, 2, 2, 2 units
    assert sk["stem.conv.weight"] == 0 and sk["stages.0.1.increase.norm.beta"] == 2 and sk["classifier.weight"] == 9
    assert sorted(set(sk.values())) == list(range(10))
    with pytest.raises(ConfigError, match="layer_decay counts the blocks .* tiny has none"):
        from tiny import Tiny

        learning_rate_factors(Config(model="tiny", layer_decay=0.9), Tiny())


def theirs(make, lr, steps):
    """Learning rates of a scheduler of PyTorch's."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("power", [0.9, 2.0])
def test_schedules_are_pytorchs(power):
    kinds, options = torch.optim.lr_scheduler, dict(epoch_size=10, warmup_epochs=0, lr=0.1)
    ours = learning_rates(Config(scheduler="polynomial_decay", power=power, min_lr=0, **options), 3)
    expected = theirs(lambda o: kinds.PolynomialLR(o, 10, power), 0.1, 10)
    np.testing.assert_allclose(ours, np.repeat(expected, 3), rtol=1e-6, atol=1e-12)
    floor = learning_rates(Config(scheduler="polynomial_decay", power=power, min_lr=0.02, **options), 3)
    np.testing.assert_allclose(floor, 0.02 + 0.8 * np.array(ours))  # timm's
    ours = learning_rates(Config(scheduler="multi_step_decay", multi_step_decay_milestones=(3, 7), **options), 3)
    expected = theirs(lambda o: kinds.MultiStepLR(o, [3, 7], 0.1), 0.1, 10)
    np.testing.assert_allclose(ours, np.repeat(expected, 3), rtol=1e-6)
    ours = learning_rates(Config(scheduler="one_cycle", **options), 3)
    expected = theirs(lambda o: kinds.OneCycleLR(o, 0.1, total_steps=30), 0.1, 29)
    np.testing.assert_allclose(ours[:29], expected, rtol=1e-5, atol=1e-9)
    assert ours[29] == pytest.approx(0.1 / 25 / 1e4)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(scheduler="one_cycle"), "one_cycle rises and falls by itself, but warmup_epochs is 5"),
        (dict(scheduler="multi_step_decay"), "needs multi_step_decay_milestones"),
        (dict(scheduler="polynomial_decay", min_lr=1.0), "min_lr is 1.0, above lr"),
        (dict(use_nesterov=True), "use_nesterov is of sgd and momentum .* but opt is adamw"),
        (dict(opt="sgd", use_nesterov=True, momentum=0.0), "with a momentum above 0"),
        (dict(class_weights=("balanced", "1")), "class_weights is 'balanced'; expected float"),
        (dict(class_weights=("1", "-1")), "class_weights is -1.0; expected 0 or more"),
        (dict(class_weights=("1", "nan")), "class_weights is nan; expected a finite"),
        (dict(class_weights=("balanced",), loss="BCE"), "are of the loss CE"),
        (dict(class_weights=("balanced",), sampler="balanced"), "do the same twice"),
        (dict(early_stopping=3, val_while_train=False), "early_stopping needs evaluations"),
        (dict(backbone_lr_factor=0.0), "backbone_lr_factor is 0.0; expected a positive number .*freeze_backbone"),
        (dict(layer_decay=1.5), "layer_decay is 1.5; expected a number in"),
    ],
)
def test_settings_that_make_no_sense_together(settings, message):
    with pytest.raises(ConfigError, match=message):
        Config(**settings)


def test_a_cycle_needs_some_updates():
    with pytest.raises(SettingError, match="one_cycle needs 7 updates or more; a run of 4"):
        learning_rates(Config(scheduler="one_cycle", warmup_epochs=0, epoch_size=2), 2)


class Labelled:
    class_names = ["cat", "dog", "emu", "none"]
    labels = np.int32([0] * 6 + [1] * 3 + [2])

    def __len__(self):
        return len(self.labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_weights_of_the_classes_are_pytorchs(smoothing, soft, graph):
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((5, 4), dtype=np.float32), np.int32([0, 1, 2, 1, 0])
    config = Config(class_weights=("balanced",), label_smoothing=smoothing)
    weights = builders.class_weights(config, Labelled(), 4)
    np.testing.assert_allclose(weights, [10 / (3 * 6), 10 / (3 * 3), 10 / (3 * 1), 0], rtol=1e-6)
    given = Config(class_weights=tuple(map(str, weights)), label_smoothing=smoothing)
    np.testing.assert_array_equal(builders.class_weights(given, Labelled(), 4), weights)
    reference = torch.nn.CrossEntropyLoss(torch.from_numpy(weights), label_smoothing=smoothing)
    target = torch.from_numpy(labels).long()
    if soft:
        mixed = 0.7 * np.eye(4, dtype=np.float32)[labels] + 0.3 * np.eye(4, dtype=np.float32)[labels[::-1]]
        labels, target = mixed, torch.from_numpy(mixed)
    expected = torch.from_numpy(logits).requires_grad_()
    loss = reference(expected, target)
    loss.backward()
    ours, gradient = ms.value_and_grad(builders.build_loss(config, Labelled(), 4))(Tensor(logits), Tensor(labels))
    assert float(ours.asnumpy()) == pytest.approx(loss.item(), rel=1e-5)
    np.testing.assert_allclose(gradient.asnumpy(), expected.grad.numpy(), atol=1e-6)


def test_weights_that_do_not_fit_the_classes():
    with pytest.raises(ConfigError, match="class_weights has 2 numbers, but the network has 4 classes"):
        builders.class_weights(Config(class_weights=("1", "2")), Labelled(), 4)
    with pytest.raises(ConfigError, match="class_weights is 0 for 'dog', which has images"):
        builders.class_weights(Config(class_weights=("1", "0", "1", "0")), Labelled(), 4)
