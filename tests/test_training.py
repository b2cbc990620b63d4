"""Schedule, optimiser, step and evaluation, in numbers."""

import signal

import mindspore as ms
import numpy as np
import pytest
import torch
from commands import assert_same_losses, assert_same_state, rows
from mindcv.loss import create_loss
from mindspore import Tensor, nn
from runs import fit, trainer
from tiny import Tiny

from mindska import builders
from mindska.config import Config
from mindska.data import Preprocessing
from mindska.errors import RunError, SettingError, WeightsError
from mindska.evaluation import EvalStep, evaluate, evaluate_each
from mindska.training import StepOptions, TrainStep, build_optimizer, learning_rates
from mindska.weights.files import write_checkpoint


def test_the_authors_schedule():
    """configs/skanet_s.yaml: warm-up from 1e-6, a cosine over 300 epochs counted from the start, cooldown."""
    config = Config(epoch_size=310, cooldown_epochs=10, lr=1e-3, min_lr=1e-6, warmup_epochs=5, warmup_lr=1e-6)
    rates = learning_rates(config, 2)
    assert len(rates) == 620 and rates[0] == rates[1] == pytest.approx(1e-6)
    assert rates[2] == pytest.approx(1e-6 + (1e-3 - 1e-6) / 5)
    assert rates[10] == pytest.approx(1e-6 + 0.5 * (1e-3 - 1e-6) * (1 + np.cos(np.pi * 5 / 300)))
    assert rates[300] == pytest.approx((1e-3 + 1e-6) / 2)
    assert rates[600:] == [pytest.approx(1e-6)] * 20 and rates[599] > 1e-6


@pytest.mark.parametrize("scheduler", ["cosine_decay", "step_decay", "constant"])
def test_every_schedule_cools_down_and_takes_an_update_for_several_batches(scheduler):
    config = Config(
        scheduler=scheduler,
        epoch_size=6,
        cooldown_epochs=2,
        warmup_epochs=1,
        min_lr=1e-6,
        gradient_accumulation_steps=2,
    )
    rates = learning_rates(config, 5)  # the fifth batch of an epoch makes no update
    assert len(rates) == 12 and rates[8:] == [1e-6] * 4 and rates[0] == pytest.approx(config.warmup_lr)
    with pytest.raises(SettingError, match="is 2, but an epoch has only 1 batches"):
        learning_rates(config, 1)


class Linear(nn.Cell):
    """Logits that are its input times a matrix; a bias and a norm's scale take no part."""

    def __init__(self, weight):
        super().__init__()
        self.dense = nn.Dense(*weight.shape[::-1], weight_init=Tensor(weight), bias_init="zeros")

    def construct(self, x):
        return self.dense(x)


def steps(config, options, inputs, labels, weight):
    """Weights after one step on each pair, ours and torch's with the same settings."""
    net = Linear(weight)
    optimizer = build_optimizer(config, net, [config.lr] * 10)
    step = TrainStep(net, create_loss("CE"), optimizer, options).set_train(True)
    theirs = torch.nn.Linear(*weight.shape[::-1])
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(weight))
        theirs.bias.zero_()
    groups = [
        dict(params=[theirs.weight], weight_decay=config.weight_decay),
        dict(params=[theirs.bias], weight_decay=0.0),
    ]
    betas = (config.beta1, config.beta2)
    kinds = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=config.lr, betas=betas),
        "momentum": lambda: torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum),
        "sgd": lambda: torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum),
    }
    optimizer, norms = kinds[config.opt](), []
    for x, y in zip(inputs, labels):
        _, norm = step(Tensor(x), Tensor(y), Tensor(np.zeros((len(x), 1), np.float32)))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(theirs(torch.from_numpy(x)), torch.from_numpy(y).long()).backward()
        clip = options.clip_value or 1e9
        norms.append((float(norm.asnumpy()), float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip))))
        optimizer.step()
    return step, net.dense.weight.asnumpy(), theirs.weight.detach().numpy(), norms


@pytest.mark.parametrize(
    "settings, clip",
    [
        (dict(opt="adamw", weight_decay=0.1, beta1=0.8, beta2=0.95), None),
        (dict(opt="momentum", weight_decay=0.1, momentum=0.7), 0.05),
        (dict(opt="sgd", weight_decay=0.1, momentum=0.9), 0.05),
    ],
)
def test_a_step_is_torchs(settings, clip):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((3, 5), dtype=np.float32)
    inputs = [rng.standard_normal((4, 5), dtype=np.float32) for _ in range(4)]
    labels = [rng.integers(0, 3, 4).astype(np.int32) for _ in range(4)]
    options = StepOptions(clip_value=clip, ema_decay=0.5)
    step, ours, theirs, norms = steps(Config(lr=0.1, **settings), options, inputs, labels, weight)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for our_norm, their_norm in norms:
        assert our_norm == pytest.approx(their_norm, rel=1e-5)
        assert clip is None or their_norm > clip, "nothing was clipped: the test would prove nothing"
    assert (step.ema[0].asnumpy() != ours).any()


def test_evaluation_counts_what_it_should():
    """Ranks 1, 2 and 6 of the true class, a tie that its index loses, a NaN, and padding."""
    logits = np.zeros((6, 8), np.float32)
    logits[0, 3], logits[1, 2], logits[1, 5], logits[2, :5] = 5, 5, 9, 9
    logits[4, :] = np.nan
    labels = np.int32([3, 2, 6, 7, 1, -1])

    class Fixed(nn.Cell):
        def construct(self, x):
            return x

    result = evaluate(EvalStep(Fixed()), [(logits, labels)], lambda total: total)
    assert result.images == 5
    assert result.top1 == pytest.approx(100 * 1 / 5)
    assert result.top5 == pytest.approx(100 * 2 / 5)
    finite = evaluate(EvalStep(Fixed()), [(logits[:4], labels[:4])], lambda total: total)
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits[:4]), torch.from_numpy(labels[:4]).long())
    assert finite.loss == pytest.approx(float(expected), rel=1e-6)
    with pytest.raises(ValueError, match="no image"):
        evaluate(EvalStep(Fixed()), [(logits, np.full(6, -1, np.int32))], lambda total: total)


def test_several_weights_are_evaluated_in_one_pass():
    """Each with its own result, the images read once; weights are put in as rarely as may be."""
    rng = np.random.default_rng(0)
    net, filled, read = nn.Dense(5, 3), [], []
    values = [Tensor(rng.standard_normal((3, 5), dtype=np.float32)) for _ in range(2)]
    weights = [lambda i=i: (filled.append(i), net.weight.set_data(values[i])) for i in range(2)]
    batches = [
        (rng.standard_normal((4, 5), dtype=np.float32), rng.integers(0, 3, 4).astype(np.int32)) for _ in range(5)
    ]
    step = EvalStep(net)
    for _ in range(2):
        filled.clear()
        results = evaluate_each(step, weights, (read.append(b) or b for b in batches), lambda total: total)
        assert filled == [0, 1, 0, 1, 0, 1]
    assert len(read) == 10
    for put_in, result in zip(weights, results):
        put_in()
        assert evaluate(step, batches, lambda total: total) == result


@pytest.mark.fault("ranges")
def test_a_learning_rate_that_float32_cannot_hold_is_refused():
    falling = dict(scheduler="step_decay", epoch_size=50, warmup_epochs=0, decay_epochs=1)
    with pytest.raises(SettingError, match="falls to 1e-38 in epoch 36, below what float32 holds"):
        learning_rates(Config(decay_rate=0.1, **falling), 2)
    assert min(learning_rates(Config(decay_rate=0.5, **falling), 2)) > 1e-19
    with pytest.raises(SettingError, match="more than 2"):
        learning_rates(Config(epoch_size=2**31 - 1), 2)


def test_the_average_is_what_is_saved_beside_the_weights(whole_run):
    """And what validation takes: tests/test_commands.py finds the training's figure again."""
    loaded = ms.load_checkpoint(str(whole_run[0] / "tiny_bn_best.ckpt"))
    for name in ("classifier.weight", "norm.moving_mean"):
        assert (loaded[f"ema.{name}"].asnumpy() != loaded[name].asnumpy()).any()


# ------------------------------------------------------------------------------------------------- at the start


class Labelled:
    def __init__(self, *labels, names=("cat", "dog", "emu")):
        self.labels, self.class_names = np.int32(labels), list(names)

    def __len__(self):
        return len(self.labels)


@pytest.mark.fault("nothing-to-learn")
def test_nothing_to_tell_apart(caplog):
    caplog.set_level("INFO", "mindska")
    for images in (Labelled(0, 0, names=["cat"]), Labelled(1, 1, 1)):
        with pytest.raises(SettingError, match="images are of one class .*: there is nothing to learn"):
            builders.check_labels(images, training=True)
        caplog.clear()
        builders.check_labels(images, training=False)
        assert "are of one class" in caplog.text and "says little" in caplog.text
    caplog.clear()
    builders.check_labels(Labelled(0, 2, 2), training=True)
    assert "1 of 3 classes have no image ('dog')" in caplog.text
    caplog.clear()
    builders.check_labels(Labelled(0, 1, 2), training=True)
    assert not caplog.text


@pytest.mark.fault("nothing-to-learn")
@pytest.mark.slow
def test_a_batch_of_one_under_batch_norms_of_one_pixel():
    """SKNet's attention has such at any size, VAN's last stage at 32x32. And what is random stays as it was."""

    def check(model, size, batch_size=1):
        pixels = Preprocessing((size, size), 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        builders.check_batch(Config(model=model, batch_size=batch_size), 3, pixels, {})

    with pytest.raises(
        SettingError, match="batch_size is 1, but 8 batch norms of sknet26 .*sk.fc1.norm.* Raise batch_size"
    ):
        check("sknet26", 64)
    with pytest.raises(SettingError, match="Raise batch_size or image_resize"):
        check("van_tiny", 32)
    check("van_tiny", 32, batch_size=2)
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(42)
    expected = builders.build_network(Config(model="skanet_nano"), 3).trainable_params()[0].asnumpy()
    ms.set_seed(42)
    check("skanet_nano", 64)
    assert ms.get_context("mode") == ms.GRAPH_MODE
    np.testing.assert_array_equal(
        builders.build_network(Config(model="skanet_nano"), 3).trainable_params()[0].asnumpy(), expected
    )


@pytest.mark.fault("values")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_no_start(tmp_path, value):
    arrays = {p.name: p.asnumpy().copy() for p in Tiny(3).get_parameters()}
    arrays["conv.weight"].flat[5] = value
    write_checkpoint(tmp_path / "a.ckpt", arrays, {})
    with pytest.raises(WeightsError, match=r"(?s)a.ckpt: .*NaN or infinite.*conv.weight"):
        builders.configured_weights(Config(model="tiny", ckpt_path=str(tmp_path / "a.ckpt")))


# ------------------------------------------------------------------------------------------------- the loop


@pytest.mark.slow
def test_checkpoints_and_stops_come_between_two_updates(images, tmp_path):
    """Two batches make an update: an epoch has four of its five, and a resumed run is the uninterrupted one."""
    settings = dict(gradient_accumulation_steps=2, ckpt_save_interval=100)
    whole = trainer(images, tmp_path / "whole", ckpt_save_steps=3, **settings)
    assert fit(whole) == [12, 10]  # 3, 6 and 9 came to 4, 6 and 10
    assert int(whole.step.optimizer.global_step.asnumpy().item()) == 6 == len(whole.rates)
    out = tmp_path / "run"
    stopped = trainer(images, out, **settings)
    assert fit(stopped, until=5, kill=lambda: signal.raise_signal(signal.SIGTERM)) == [6]
    assert fit(trainer(images, out, **settings)) == [12, 6]
    assert_same_losses(out, tmp_path / "whole")
    assert_same_state(out / "tiny-3_12.ckpt", tmp_path / "whole" / "tiny-3_12.ckpt")


@pytest.mark.slow
def test_damaged_checkpoints_do_not_count_as_the_newest(images, tmp_path):
    fit(trainer(images, tmp_path), until=7)
    for name in ("tiny-2_10.ckpt", "tiny-3_15.ckpt"):
        (tmp_path / name).write_bytes(b"damaged")
    assert fit(trainer(images, tmp_path, ckpt_save_steps=1), until=7) == [7, 6]
    assert (tmp_path / "tiny-3_15.ckpt.damaged").read_bytes() == b"damaged"
    again = trainer(images, tmp_path)
    assert fit(again) == [15, 10] and again.progress.step == 15


@pytest.mark.slow
def test_whether_a_checkpoint_was_due_is_the_earlier_starts_business(images, tmp_path):
    """How often a run is saved may change: a lost checkpoint is noticed, and none is missed that never was."""
    fit(trainer(images, tmp_path / "never", ckpt_save_interval=2), until=8)
    assert fit(trainer(images, tmp_path / "never", ckpt_save_interval=1)) == [15, 10]
    lost = tmp_path / "lost"
    fit(trainer(images, lost), until=6)
    for start in ("the first", "one that resumed"):
        assert [path.name for path in lost.glob("*.ckpt")] == ["tiny-1_5.ckpt"], start
        fit(trainer(images, lost, ckpt_save_interval=2), until=8)
    (lost / "tiny-1_5.ckpt").unlink()
    with pytest.raises(RunError, match="up to step 8 .* none of its checkpoints"):
        trainer(images, lost, ckpt_save_interval=3).fit()
    assert len(rows(lost)) == 8
