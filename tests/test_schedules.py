"""Runs of so many updates: schedules by update, warm-up as MMCV's, epochs of several sizes of samples."""

import dataclasses

import numpy as np
import pytest
from test_finetune import Unequal

from mindska.config import Config
from mindska.data import DataError, TrainLoader
from mindska.errors import ConfigError, SettingError
from mindska.training import learning_rates
from mindska.training.optim import total_updates


def rates(steps_per_epoch=7, **settings):
    return learning_rates(Config(**{"lr": 1e-4, "min_lr": 0.0, **settings}), steps_per_epoch)


def test_poly_with_warm_up_is_mmcvs():
    """MMCV's PolyLrUpdaterHook with a linear warm-up by iteration, written out."""
    found = rates(max_steps=100, scheduler="polynomial_decay", power=0.9, warmup_steps=10, warmup_lr=1e-10)
    expected = []
    for i in range(100):
        regular = 1e-4 * (1 - i / 100) ** 0.9
        expected.append(regular * (1 - (1 - i / 10) * (1 - 1e-6)) if i < 10 else regular)
    np.testing.assert_allclose(found, expected, rtol=1e-9)  # 1 - (1 - 1e-6), as MMCV has it, loses six digits


def test_a_run_of_updates_has_its_length_in_updates():
    """Whatever an epoch has; the last rate is near the lowest. Steps of a multi-step schedule come after epochs."""
    for per_epoch in (3, 7, 1000):
        assert len(rates(per_epoch, max_steps=50, scheduler="cosine_decay")) == 50
        assert len(rates(per_epoch, max_steps=50, scheduler="one_cycle", warmup_epochs=0)) == 50
    cosine = rates(max_steps=50, scheduler="cosine_decay", min_lr=1e-6)
    assert cosine[0] == pytest.approx(1e-4) and cosine[-1] < 1.2e-6 and sorted(cosine, reverse=True) == cosine
    stepped = rates(7, max_steps=20, scheduler="multi_step_decay", multi_step_decay_milestones=(1, 2))
    assert stepped == pytest.approx([1e-4] * 7 + [1e-5] * 7 + [1e-6] * 6)
    assert total_updates(Config(max_steps=20, gradient_accumulation_steps=3), 7) == 20


def test_epochs_with_a_warm_up_in_updates():
    """MMDetection's 1x schedule: 12 epochs, a tenth after 8 and 11, a factor rises in the first updates."""
    settings = dict(epoch_size=12, scheduler="multi_step_decay", multi_step_decay_milestones=(8, 11))
    found = rates(10, **settings, warmup_steps=25, warmup_lr=1e-7)
    assert len(found) == 120
    np.testing.assert_allclose(found[:25], [1e-4 * (1e-3 + (1 - 1e-3) * i / 25) for i in range(25)], rtol=1e-12)
    np.testing.assert_allclose(found[25:80] + found[80:110] + found[110:], [1e-4] * 55 + [1e-5] * 30 + [1e-6] * 10)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(SettingError, match="warmup_steps is 20, but the run has 20 updates"):
        rates(max_steps=20, warmup_steps=20)
    with pytest.raises(ConfigError, match="cooldown_epochs are of a run of epochs"):
        Config(max_steps=20, cooldown_epochs=2)
    with pytest.raises(SettingError, match="gradient_accumulation_steps is 8"):
        rates(7, max_steps=20, gradient_accumulation_steps=8)
    assert dataclasses.asdict(Config(max_steps=20))["warmup_epochs"] == 0


def test_batches_are_of_one_size():
    """Images of two sizes: every global batch has one, each image comes once at most; what is left over stays out."""
    dataset = Unequal()
    sizes = [("lying", "standing")[index % 3 == 0] for index in range(len(dataset))]
    counts = [sizes.count("lying"), sizes.count("standing")]
    made = [TrainLoader(dataset, None, 2, rank=rank, world_size=2, seed=3, buckets=sizes) for rank in range(2)]
    assert made[0].steps_per_epoch == sum(count // 4 for count in counts)
    for epoch in range(3):
        orders = [loader.order(epoch) for loader in made]
        np.testing.assert_array_equal(*orders)
        batches = orders[0].reshape(-1, 4)
        assert len(batches) == made[0].steps_per_epoch and len(set(orders[0])) == orders[0].size
        assert all(len({sizes[index] for index in batch}) == 1 for batch in batches)
    assert not np.array_equal(made[0].order(0), made[0].order(1))
    plain = TrainLoader(dataset, None, 2, seed=3, buckets=["one"] * len(dataset))
    np.testing.assert_array_equal(plain.order(2), TrainLoader(dataset, None, 2, seed=3).order(2))
    with pytest.raises(DataError, match=r"images of \d+ sizes"):
        TrainLoader(dataset, None, 50, seed=3, buckets=sizes)
