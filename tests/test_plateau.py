"""The schedule `plateau` is PyTorch's ReduceLROnPlateau, and resumes to the bit."""

import logging

import numpy as np
import pytest
import torch
from runs import fit, trainer
from test_optimizers import Blocks

from mindska.config import Config, ConfigError
from mindska.errors import WeightsError
from mindska.evaluation import Result
from mindska.training import Trainer, build_optimizer, learning_rates
from mindska.training.plateau import Plateau

SCORES = [50.0, 50.0, 40.0, 60.0, 60.0, 60.0, 60.0, 61.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
OPTIONS = dict(
    scheduler="plateau", warmup_epochs=0, epoch_size=len(SCORES), lr=0.1, patience=1, factor=0.5, min_lr=0.02
)


def tables(optimizer):
    """The optimiser's learning rates of every update, one row a group."""
    return np.stack([p.asnumpy() for p in optimizer.get_parameters() if p.name.startswith("learning_rate")])


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_the_learning_rate_is_pytorchs(layer_decay):
    config = Config(**OPTIONS, layer_decay=layer_decay)
    rates, net = learning_rates(config, 2), Blocks()
    optimizer = build_optimizer(config, net, rates)
    plateau, before = Plateau(config, rates, optimizer), tables(optimizer)
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        theirs, "max", factor=0.5, patience=1, threshold=0, min_lr=0.02
    )
    expected = []
    for epoch, score in enumerate(SCORES):
        expected += [theirs.param_groups[0]["lr"]] * 2
        plateau.note(score, 2 * epoch + 2)
        scheduler.step(score)
    np.testing.assert_allclose(rates, expected, rtol=1e-12)
    assert rates[0] == 0.1 and rates[-1] == 0.02 and len(set(rates)) == 4
    np.testing.assert_allclose(tables(optimizer), before * np.float32(np.divide(expected, 0.1)), rtol=1e-6)
    # What a checkpoint holds makes the same tables, to the bit.
    other = build_optimizer(config, net, again := learning_rates(config, 2))
    Plateau(config, again, other).restore(plateau.state)
    assert again == rates and (tables(other) == tables(optimizer)).all()


def test_the_warm_up_and_the_cooldown_are_those_of_any_schedule():
    config = Config(**{**OPTIONS, "warmup_epochs": 2, "cooldown_epochs": 1, "warmup_lr": 1e-3, "lr_epoch_stair": False})
    rates = learning_rates(config, 2)
    before, plateau = list(rates), Plateau(config, rates, build_optimizer(config, Blocks(), rates))
    for updates in (2, 4, 6):
        plateau.note(1.0, updates)
    assert rates[:6] == before[:6] and set(rates[6:-2]) == {0.05} and rates[-2:] == [0.02] * 2


@pytest.mark.slow
@pytest.mark.fault("plateau")
def test_a_run_resumes_to_the_bit(images, tmp_path, monkeypatch, caplog):
    """Stopped right after the learning rate fell, and resumed: every learning rate, weight and state is the same."""
    scores = {4: 70.0, 8: 60.0, 12: 50.0, 16: 40.0, 20: 30.0}
    monkeypatch.setattr(
        Trainer, "evaluate", lambda self: {"raw": Result(scores[self.progress.step // 5 * 4], 100.0, 1.0, 36)}
    )
    settings = dict(scheduler="plateau", patience=0, factor=0.5, epoch_size=5, lr=0.02, warmup_epochs=0, ema=True)
    states = []
    for name, stop in (("whole", None), ("resumed", 17)):
        out = tmp_path / name
        with caplog.at_level(logging.INFO, "mindska"):
            if stop:
                fit(trainer(images, out, "val", **settings), until=stop)
            last = trainer(images, out, "val", **settings)
            fit(last)
        states.append(({p.name: p.asnumpy() for p in last.step.get_parameters()}, last.rates, last.progress.plateau))
    (whole, rates, state), (resumed, rates_2, state_2) = states
    assert rates == rates_2 and state == state_2 and state["reductions"] == [10, 15, 20]
    assert rates[::5] == pytest.approx([0.02, 0.02, 0.01, 0.005, 0.0025])
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)
    assert (
        "no better score than 70.00 in 1 evaluations; the learning rate falls from 2.000e-02 to 1.000e-02"
        in caplog.text
    )


@pytest.mark.fault("plateau")
@pytest.mark.parametrize(
    "state", [{}, {"best": 1}, dict(best="x", waited=0, reductions=[]), dict(best=1, waited=0, reductions=3)]
)
def test_a_damaged_state_is_an_error(state):
    config = Config(**OPTIONS)
    rates = learning_rates(config, 2)
    with pytest.raises(WeightsError, match="`plateau` is damaged"):
        Plateau(config, rates, build_optimizer(config, Blocks(), rates)).restore(state)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(val_while_train=False), "plateau needs evaluations, but val_while_train is false"),
        (dict(factor=1.0), "factor is 1.0; expected a number in"),
        (dict(min_lr=1.0), "min_lr is 1.0, above lr"),
        (dict(patience=-1), "patience is -1; expected 0 or more"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ConfigError, match=message):
        Config(**{**OPTIONS, **settings})
