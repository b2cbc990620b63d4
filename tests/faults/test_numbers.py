"""Faults 7, 8, 10: losses that are not finite, overflow, repeatability."""

from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from commands import assert_same_losses, losses, train
from mindcv.loss import create_loss
from mindspore import Tensor
from tiny import Tiny

from mindska.config import Config
from mindska.training import StepOptions, Trainer, TrainStep, build_optimizer
from mindska.training.state import Progress

RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((8, 3, 16, 16), dtype=np.float32)
LABELS = RNG.integers(0, 3, 8).astype(np.int32)
NOISE = RNG.random((8, 8), dtype=np.float32)


def step(**options):
    net = Tiny(3, bn=True)
    optimizer = build_optimizer(Config(), net, [1e-2, 2e-2, 3e-2, 4e-2, 5e-2, 6e-2])
    options = StepOptions(**{"ema_decay": 0.9, **options})
    return TrainStep(net, create_loss("CE"), optimizer, options).set_train(True)


def run(train_step, images=IMAGES):
    loss, norm = train_step(Tensor(images), Tensor(LABELS), Tensor(NOISE))
    return float(loss.asnumpy()), float(norm.asnumpy())


def everything(train_step):
    """All values but the counters of skipped and good updates and the loss scale."""
    counters = ("skipped", "skipped_in_a_row", "good_steps", "loss_scale")
    kept = [*train_step.network.get_parameters(), *train_step.ema, *train_step.state()]
    return {p.name: p.asnumpy().copy() for p in kept if p.name not in counters}


def assert_same(left, right):
    for name, value in left.items():
        np.testing.assert_array_equal(right[name], value, err_msg=name)


@pytest.mark.fault("not-finite")
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE])
def test_a_batch_without_a_finite_loss_changes_nothing(value, mode):
    ms.set_context(mode=mode)
    train_step = step()
    run(train_step)
    before = everything(train_step)
    bad = IMAGES.copy()
    bad[0, 0, 0, 0] = value
    assert not np.isfinite(sum(run(train_step, bad)))
    assert_same(before, everything(train_step))
    assert int(train_step.skipped.asnumpy()) == int(train_step.skipped_in_a_row.asnumpy()) == 1
    assert np.isfinite(sum(run(train_step)))
    assert int(train_step.skipped.asnumpy()) == 1 and int(train_step.skipped_in_a_row.asnumpy()) == 0
    after = everything(train_step)
    assert any((after[name] != before[name]).any() for name in before)


@pytest.mark.fault("overflow")
def test_an_overflow_halves_the_scale_and_advances_nothing():
    ms.set_context(mode=ms.GRAPH_MODE)
    train_step = step(loss_scale=2.0**120, dynamic_loss_scale=True)
    train_step.loss_scale.set_data(Tensor(3e38, ms.float32))
    before = everything(train_step)
    loss, norm = run(train_step)
    assert np.isfinite(loss) and not np.isfinite(norm)  # the gradients overflowed, not the loss
    assert float(train_step.loss_scale.asnumpy()) == np.float32(3e38) / 2
    assert_same(before, everything(train_step))
    assert int(train_step.optimizer.global_step.asnumpy().item()) == 0
    train_step.loss_scale.set_data(Tensor(0.5, ms.float32))  # a scale below 1 halves as well
    bad = IMAGES.copy()
    bad[0, 0, 0, 0] = np.inf
    run(train_step, bad)
    assert float(train_step.loss_scale.asnumpy()) == 0.25


@pytest.mark.fault("overflow")
@pytest.mark.slow
def test_the_scale_doubles_after_its_window_and_does_not_change_the_update():
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(1)
    scaled = step(loss_scale=1024.0, dynamic_loss_scale=True, scale_window=2)
    ms.set_seed(1)
    plain = step()
    for _ in range(2):
        run(scaled)
        run(plain)
    assert float(scaled.loss_scale.asnumpy()) == 2048.0
    for ours, theirs in zip(scaled.network.get_parameters(), plain.network.get_parameters()):
        np.testing.assert_allclose(ours.asnumpy(), theirs.asnumpy(), atol=1e-6)  # 1024 is a power of two


@pytest.mark.fault("overflow")
def test_accumulation_is_the_mean_of_its_batches():
    """Two halves accumulated are the whole batch (without batch norm); a bad half spoils the update, not the state."""
    ms.set_context(mode=ms.GRAPH_MODE)
    updates = []
    for accumulation in (1, 2):
        ms.set_seed(1)
        net = Tiny(3)
        optimizer = build_optimizer(Config(opt="momentum", weight_decay=0.0), net, [0.1] * 4)
        train_step = TrainStep(net, create_loss("CE"), optimizer, StepOptions(accumulation=accumulation)).set_train(
            True
        )
        for part in np.split(np.arange(8), accumulation):
            train_step(Tensor(IMAGES[part]), Tensor(LABELS[part]), Tensor(NOISE[part]))
        updates.append([p.asnumpy().copy() for p in net.get_parameters()])
    for whole, halves in zip(*updates):
        np.testing.assert_allclose(halves, whole, atol=1e-6)
    half = np.arange(4)
    bad = IMAGES[half] * np.float32(np.nan)
    for images in (bad, IMAGES[half]):
        train_step(Tensor(images), Tensor(LABELS[half]), Tensor(NOISE[half]))
    for value, kept in zip(net.get_parameters(), updates[1]):
        np.testing.assert_array_equal(value.asnumpy(), kept)
    for _ in range(2):
        train_step(Tensor(IMAGES[half]), Tensor(LABELS[half]), Tensor(NOISE[half]))
    assert all(np.isfinite(p.asnumpy()).all() for p in net.get_parameters())
    assert int(train_step.skipped.asnumpy()) == 1


@pytest.mark.fault("not-finite")
@pytest.mark.slow
def test_training_stops_after_too_many_skipped_updates(images, tmp_path):
    printed = train(images, tmp_path / "run", expect=1, lr=1e30, warmup_epochs=0, max_skipped_steps=3, opt="momentum")
    assert "Step 3 was skipped" in printed or "Step 2 was skipped" in printed
    assert "not finite in 3 updates in a row, up to step" in printed and "Traceback" not in printed


@pytest.mark.fault("same-seed")
@pytest.mark.slow
def test_the_same_seed_gives_the_same_losses_whatever_the_workers(images, tmp_path):
    settings = dict(epoch_size=13, val_while_train="false", ckpt_save_interval=100, mixup=0.2, cutmix=1.0)
    for name, extra in (("a", {}), ("b", {"num_parallel_workers": 5}), ("c", {"seed": 7})):
        train(images, tmp_path / name, **settings, **extra)
    assert len(losses(tmp_path / "a")) == 52
    assert_same_losses(tmp_path / "a", tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


@pytest.mark.fault("not-finite")
@pytest.mark.parametrize("norms", [[np.nan, 1.0, 2.0], [1.0, 2.0, np.nan], [2.0, np.inf, 1.0]])
def test_a_row_counts_finite_steps_only(norms):
    """Wherever the step that was skipped stands among the steps of a row of metrics.csv."""
    counters = dict(loss_scale=Tensor(1.0), skipped=Tensor(1))
    trainer = SimpleNamespace(
        progress=Progress(3, [3.0 if np.isfinite(n) else n for n in norms], list(norms)),
        step=SimpleNamespace(**counters),
        _rate=lambda: 0.1, total_steps=6, config=Config(batch_size=8), world=SimpleNamespace(size=1),
        time_left=SimpleNamespace(seconds=lambda *_: 60.0),
    )  # fmt: skip
    row = Trainer._summary(trainer, 0.5, 1.0, SimpleNamespace(disable=True))
    assert (row["loss"], row["grad_norm"], row["skipped"]) == (3.0, 2.0, 1)
