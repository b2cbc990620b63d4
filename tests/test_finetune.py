"""Fine-tuning: new classifiers, frozen parts, balanced sampling, mixing that ends, other lengths, early stopping."""

import json
import signal

import mindcv
import mindspore as ms
import numpy as np
import pytest
from commands import ROOT, assert_same_state, mpirun, parameters, rows, run, train
from mindspore import Tensor
from runs import fit, trainer
from tiny import Tiny

from mindska import builders
from mindska.config import Config, ConfigError, parse_args
from mindska.data import TrainLoader
from mindska.distributed import World
from mindska.errors import RunError
from mindska.tasks import create_task
from mindska.training import TrainStep, build_optimizer
from mindska.training.record import RunRecord
from mindska.weights.files import read_file, write_checkpoint


def save(path, classes, names=None, drop=(), **record):
    """Writes a checkpoint of `tiny` with values that its rows tell apart."""
    rng = np.random.default_rng(0)
    arrays = {p.name: rng.standard_normal(p.shape, dtype=np.float32) for p in Tiny(classes).get_parameters()}
    arrays = {name: value for name, value in arrays.items() if not name.startswith(tuple(drop))}
    write_checkpoint(path, arrays, dict(model="tiny", num_classes=classes, class_names=names, **record))
    return arrays


def started(path, class_names, num_classes=None, **settings):
    """The network with which a training on these classes begins."""
    config = Config(**{"model": "tiny", **settings}, ckpt_path=str(path), num_classes=num_classes)
    weights = builders.configured_weights(config)
    num_classes = builders.training_classes(config, class_names)
    weights = builders.weights_for_classes(config, weights, class_names, num_classes)
    net = builders.build_network(config, num_classes, 3, weights)
    return {p.name: p.asnumpy() for p in net.get_parameters()}


DATA = ["ant", "bee", "cat"]


@pytest.mark.fault("other-classes")
@pytest.mark.parametrize(
    "classes, names, said, rows_of_data",
    [
        (3, DATA, "", [0, 1, 2]),
        (3, ["cat", "ant", "bee"], "are the data's, in another order (cat, ant, bee): put into", [1, 2, 0]),
        (
            3,
            ["dog", "ant", "bee"],
            "3 classes of a.ckpt -> 3 of the data, new (not in the file: cat; ",
            None,
        ),
        (3, None, "a.ckpt does not name its 3 classes: they are taken for the data's, in this order", [0, 1, 2]),
        (7, None, "classifier: 7 classes of a.ckpt -> 3 of the data, new; everything else from a.ckpt", None),
        (4, [*DATA, "dog"], "new (not in the file: none; not in the data: dog); everything else", None),
        (2, DATA[:2], "classifier: 2 classes of a.ckpt -> 3 of the data, new (not in the file: cat", None),
    ],
)
def test_classes_of_a_checkpoint_and_of_the_data(tmp_path, caplog, classes, names, said, rows_of_data):
    caplog.set_level("INFO", "mindska")
    held = save(tmp_path / "a.ckpt", classes, names)
    net = started(tmp_path / "a.ckpt", DATA)
    lines = [line for line in caplog.messages if "classifier" in line]
    assert (said in lines[0] and len(lines) == 1) if said else not lines
    np.testing.assert_array_equal(net["conv.weight"], held["conv.weight"])
    for name in ("classifier.weight", "classifier.bias"):
        if rows_of_data is None:
            assert net[name].shape[0] == 3 and not np.isin(net[name], held[name]).any()
        else:
            np.testing.assert_array_equal(net[name], held[name][rows_of_data])


@pytest.mark.fault("other-classes")
def test_outputs_that_mean_nothing_stay_at_the_end(tmp_path, caplog):
    caplog.set_level("INFO", "mindska")
    held = save(tmp_path / "a.ckpt", 5, ["cat", "ant", "bee"])
    net = started(tmp_path / "a.ckpt", DATA, num_classes=5)
    np.testing.assert_array_equal(net["classifier.bias"], held["classifier.bias"][[1, 2, 0, 3, 4]])
    started(tmp_path / "a.ckpt", DATA, num_classes=4)
    assert "5 classes of a.ckpt -> 3 of the data (and 1 outputs that mean nothing), new; everything" in caplog.text


@pytest.mark.fault("other-classes")
def test_weights_without_a_classifier_and_of_an_ambiguous_order(tmp_path, caplog):
    caplog.set_level("INFO", "mindska")
    held = save(tmp_path / "a.ckpt", 3, drop=["classifier."])
    net = started(tmp_path / "a.ckpt", DATA)
    assert "classifier: none in a.ckpt -> 3 of the data, new; everything else from a.ckpt" in caplog.text
    np.testing.assert_array_equal(net["conv.bias"], held["conv.bias"])
    save(tmp_path / "b.ckpt", 3)
    started(tmp_path / "b.ckpt", ["1", "10", "2"])
    assert "this is that of text (torchvision, MindCV), timm's would be 1, 2, 10" in caplog.text
    caplog.clear()
    save(tmp_path / "c.ckpt", 3, classifier="initial values")  # as scripts/convert.py --num_classes writes it
    started(tmp_path / "c.ckpt", ["1", "10", "2"])
    assert "classifier" not in caplog.text


@pytest.mark.fault("other-classes")
@pytest.mark.slow
def test_files_of_others_get_a_new_classifier(tmp_path, caplog):
    """A segmenter's backbone in PyTorch's format; MindCV's own models, whose classifiers have other names."""
    import torch

    from mindska.weights import to_torch

    caplog.set_level("INFO", "mindska")
    net = mindcv.create_model("skanet_nano", num_classes=10)
    ours = {p.name: p.asnumpy() for p in net.get_parameters()}
    theirs = to_torch("skanet_nano", ours)
    body = {f"backbone.{k}": torch.as_tensor(v) for k, v in theirs.items() if not k.startswith("classifier")}
    torch.save({"state_dict": {**body, "decode_head.weight": torch.zeros(3)}}, tmp_path / "a.pth")
    found = started(tmp_path / "a.pth", DATA, model="skanet_nano")
    assert "classifier: none in a.pth -> 3 of the data, new" in caplog.text
    for name, value in found.items():
        if not name.startswith("classifier."):
            np.testing.assert_array_equal(value, ours[name], err_msg=name)
    for model in ("resnet18", "squeezenet1_0"):
        net = mindcv.create_model(model, num_classes=5)
        ms.save_checkpoint(net, str(tmp_path / "b.ckpt"))
        found = started(tmp_path / "b.ckpt", DATA, model=model)
        same = [np.array_equal(found[p.name], p.asnumpy()) for p in net.get_parameters()]
        assert sum(not equal for equal in same) in (1, 2) and "5 classes of b.ckpt -> 3 of the data" in caplog.text


# ------------------------------------------------------------------------------------------------------- freezing


@pytest.mark.fault("frozen")
@pytest.mark.parametrize(
    "settings, message",
    [
        (
            dict(freeze=("stages.7",)),
            "freeze names 'stages.7', but skanet_nano has no such part; did you mean 'stages.",
        ),
        (dict(freeze=("stage",)), "It has stages.0, stages.1, stages.2, stages.3, classifier|did you mean"),
        (dict(freeze=("stages.0.blocks.0.norm",)), "no such part"),
        (dict(freeze=("stages", "classifier")), "names every part of skanet_nano: there is nothing left"),
        (dict(freeze_backbone=True, freeze=("classifier",)), "there is nothing left"),
    ],
)
def test_freezing_what_is_not_there(settings, message):
    with pytest.raises(ConfigError, match=message):
        builders.build_network(Config(model="skanet_nano", **settings), 3)


def test_the_command_line_and_a_recipe_name_parts(tmp_path):
    for words in (["--freeze", "stages.0,stages.1"], ["--freeze", "stages.0", "stages.1"]):
        assert parse_args(words).freeze == ("stages.0", "stages.1")
    (tmp_path / "a.yaml").write_text("freeze: stages.0, stages.1\nclass_weights: [1, 0.5]\n")
    config = parse_args(["--config", str(tmp_path / "a.yaml")])
    assert config.freeze == ("stages.0", "stages.1") and config.class_weights == ("1", "0.5")
    assert parse_args(["--class_weights", "balanced"]).class_weights == ("balanced",)


def nano_step(**settings):
    """A training step of skanet_nano and a batch for it."""
    config = Config(model="skanet_nano", lr=0.1, **settings)
    net = builders.build_network(config, 3)
    rng = np.random.default_rng(0)
    for p in net.get_parameters():
        if p.name.endswith("moving_variance"):
            p.set_data(Tensor(rng.uniform(0.5, 2, p.shape).astype(np.float32)))
    options = builders.build_step_options(config)
    step = TrainStep(net, builders.build_loss(config), build_optimizer(config, net, [0.1] * 9), options)
    batch = rng.standard_normal((2, 3, 64, 64), dtype=np.float32), np.int32([0, 2]), rng.random((2, net.noise_size))
    return step.set_train(True), [Tensor(array, ms.int32 if i == 1 else ms.float32) for i, array in enumerate(batch)]


def values(step):
    return {p.name: p.asnumpy().copy() for p in step.network.get_parameters()}


@pytest.mark.fault("frozen")
@pytest.mark.slow
def test_what_is_frozen_does_not_move_and_the_rest_does():
    step, batch = nano_step(freeze=("stages.0", "stages.2.blocks.0"), ema=True, ema_decay=0.7)
    before = values(step)
    for _ in range(3):
        step(*batch)
    after, average = values(step), {p.name.removeprefix("ema."): p.asnumpy() for p in step.ema}
    for name, value in before.items():
        frozen = name.startswith(("stages.0.", "stages.2.blocks.0."))
        assert np.array_equal(after[name], value) == frozen, name
        assert np.array_equal(average[name], after[name]) == frozen, name
    state = {p.name for p in step.state()}
    assert not any("stages.0." in name or "stages.2.blocks.0." in name for name in state)
    assert any("stages.2.blocks.1" in name for name in state)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["skanet_nano", "sk_resnet18"])
def test_gradients_through_frozen_batch_norms_are_those_of_evaluation(model):
    first = "stages.0.patch_embed.proj" if model == "skanet_nano" else "stem.conv"
    config = Config(model=model, drop_rate=0.0, drop_path_rate=0.0)
    names = [p.name for p in mindcv.create_model(model, num_classes=3).trainable_params()]
    parts = tuple(sorted({name.rpartition(".")[0] for name in names} - {first}))
    rest = tuple(part for part in parts if not any(part != p and part.startswith(p + ".") for p in parts))
    config = Config(model=model, drop_rate=0.0, drop_path_rate=0.0, freeze=rest, label_smoothing=0.0)
    net = builders.build_network(config, 3)
    left = net.trainable_params()
    assert {p.name.rpartition(".")[0] for p in left} == {first}
    step = TrainStep(
        net, builders.build_loss(config), build_optimizer(config, net, [0.1]), builders.build_step_options(config)
    )
    rng = np.random.default_rng(0)
    images, labels = Tensor(rng.standard_normal((2, 3, 64, 64), dtype=np.float32)), Tensor(np.int32([0, 2]))
    noise = Tensor(rng.random((2, net.noise_size), np.float32))
    step.set_train(True)
    assert net.training and not any(norm.training for norm in step.frozen_norms) and step.frozen_norms
    _, ours = step.gradients(Tensor(1.0), images, labels, noise)
    net.set_train(False)
    logits = ms.value_and_grad(lambda x, y: step.scaled_loss.loss(net(x), y), None, left)(images, labels)[1]
    for our, expected in zip(ours, logits):
        scale = np.abs(expected.asnumpy()).max()
        np.testing.assert_allclose(our.asnumpy(), expected.asnumpy(), atol=1e-4 * scale)


@pytest.mark.fault("frozen")
@pytest.mark.slow
def test_a_frozen_run_resumes_to_the_bit(images, tmp_path):
    """With an average and accumulation; tiny_bn has a batch norm in the frozen part."""
    settings = dict(
        model="tiny_bn", freeze_backbone=True, gradient_accumulation_steps=2, ema=True, ema_decay=0.7, lr=0.05
    )
    whole = trainer(images, tmp_path / "whole", "val", **settings)
    start = {p.name: p.asnumpy().copy() for p in whole.step.network.get_parameters()}
    assert fit(whole)[0] == 12
    out = tmp_path / "run"
    stopped = trainer(images, out, "val", **settings)
    fit(stopped, until=5, kill=lambda: signal.raise_signal(signal.SIGTERM))
    fit(trainer(images, out, "val", **settings))
    assert_same_state(out / "tiny_bn-3_12.ckpt", tmp_path / "whole" / "tiny_bn-3_12.ckpt")
    held = parameters(out / "tiny_bn-3_12.ckpt")
    for name, value in start.items():
        assert np.array_equal(held[name], value) == (not name.startswith("classifier.")), name
        assert np.array_equal(held[f"ema.{name}"], value) == (not name.startswith("classifier.")), name
    with pytest.raises(RunError, match="freeze_backbone: True -> False"):
        trainer(images, out, "val", **{**settings, "freeze_backbone": False}).fit()


@pytest.mark.slow
def test_fine_tuning_in_one_step(images, tmp_path, whole_run):
    """As a user does it: other classes, a frozen first layer, a slower backbone; it goes on after a kill."""
    data = tmp_path / "data"
    for split in ("train", "val"):
        for old, new in (("class0", "x"), ("class2", "y")):
            (data / split).mkdir(parents=True, exist_ok=True)
            (data / split / new).symlink_to(images / split / old)
    start, out = whole_run[0] / "tiny_bn_best.ckpt", tmp_path / "run"
    settings = dict(ckpt_path=start, freeze="conv", backbone_lr_factor=0.1, class_weights="balanced", epoch_size=2)
    printed = train(data, out, **settings)
    assert "classifier: 3 classes of tiny_bn_best.ckpt -> 2 of the data, new (not in the file: x, y; not in" in printed
    assert "Frozen: conv." in printed and "Weights of the classes in the loss: x 1, y 1" in printed
    arrays, record = read_file(out / "tiny_bn-2_6.ckpt")
    assert record["class_names"] == ["x", "y"] and arrays["classifier.bias"].shape == (2,)
    began = read_file(start)[0]
    assert any(np.array_equal(arrays["conv.weight"], began[name]) for name in ("conv.weight", "ema.conv.weight"))
    (out / "tiny_bn-2_6.ckpt").rename(tmp_path / "whole.ckpt")
    printed = train(data, out, **settings)
    assert "Resuming after step 3 of 6" in printed
    assert_same_state(out / "tiny_bn-2_6.ckpt", tmp_path / "whole.ckpt")


# ------------------------------------------------------------------------------------------------------- sampling


class Unequal:
    """Three classes of 30, 7 and 2 images; one without any."""

    labels = np.int32([0] * 30 + [1] * 7 + [3] * 2)
    class_names = ["a", "b", "none", "d"]

    def __len__(self):
        return len(self.labels)

    def describe(self, index):
        return str(index)


def loader(**options):
    return TrainLoader(Unequal(), lambda *_: None, 3, seed=5, **options)


def test_a_balanced_epoch():
    seen = []
    for epoch in range(4):
        order = loader(sampler="balanced").order(epoch)
        assert len(order) == 39 and loader(sampler="balanced").steps_per_epoch == loader().steps_per_epoch
        assert list(np.bincount(Unequal.labels[order], minlength=4)[[0, 1, 3]]) == [13, 13, 13]
        times = np.bincount(order, minlength=39)
        assert times[:30].max() == 1 and set(times[30:37]) == {1, 2} and set(times[37:]) == {6, 7}
        np.testing.assert_array_equal(order, loader(sampler="balanced").order(epoch))
        seen.append(tuple(order))
    assert len(set(seen)) == 4
    assert sorted(loader().order(0)) == list(range(39))


def test_balanced_positions_do_not_depend_on_ranks_or_the_start():
    def positions(start, rank, world, batch):
        made = TrainLoader(
            Unequal(), lambda *_: None, batch, seed=5, sampler="balanced", rank=rank, world_size=world
        )._positions(start)
        return [next(made) for _ in range(10)]

    alone = positions(0, 0, 1, 6)
    assert positions(4, 0, 1, 6)[:6] == alone[4:]
    both = [positions(0, rank, 2, 3) for rank in range(2)]
    for step, whole in enumerate(alone):
        assert sorted(both[0][step] + both[1][step]) == sorted(whole)


def test_mixing_ends():
    made = loader(mixup=1.0, num_classes=4, mixup_off_epoch=2)
    for epoch in range(4):
        ids = [(epoch, 0, 0), (epoch, 1, 30), (epoch, 2, 37)]
        samples = [(np.full((1, 2, 2), i, np.float32), Unequal.labels[i], np.zeros(1, np.float32)) for _, _, i in ids]
        images, labels, _ = made._collate(ids, samples)
        assert labels.shape == (3, 4) and labels.dtype == np.float32
        np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-6)
        assert (set(np.unique(labels)) == {0, 1}) == (epoch >= 2)
        assert np.array_equal(images[0], np.zeros((1, 2, 2))) == (epoch >= 2)


@pytest.mark.slow
def test_a_balanced_run_resumes_to_the_bit(images, tmp_path):
    settings = dict(model="tiny_bn", sampler="balanced", mixup=0.5, mixup_off_epoch=1, lr=0.05)
    fit(trainer(images, tmp_path / "whole", **settings))
    fit(trainer(images, tmp_path / "run", **settings), until=8)
    fit(trainer(images, tmp_path / "run", **settings))
    assert_same_state(tmp_path / "run" / "tiny_bn-3_15.ckpt", tmp_path / "whole" / "tiny_bn-3_15.ckpt")


# --------------------------------------------------------------------------------------------------------- length


@pytest.mark.fault("longer")
@pytest.mark.slow
def test_a_longer_run(images, tmp_path, caplog):
    """A constant learning rate: what goes on is the longer run, to the bit."""
    caplog.set_level("INFO", "mindska")
    constant = dict(scheduler="constant", lr=0.05)
    fit(trainer(images, tmp_path / "whole", epoch_size=5, **constant))
    out = tmp_path / "run"
    fit(trainer(images, out, **constant))
    fit(trainer(images, out, epoch_size=5, **constant))
    assert "epoch_size: 3 -> 5: the learning rates so far are those of the new length" in caplog.text
    assert_same_state(out / "tiny-5_25.ckpt", tmp_path / "whole" / "tiny-5_25.ckpt")
    assert json.loads((out / "settings.json").read_text())["epoch_size"] == 5
    with pytest.raises(RunError, match="holds a run of 5 epochs, and epoch_size is 4 now"):
        trainer(images, out, epoch_size=4, **constant).fit()
    with pytest.raises(RunError, match="lr: 0.05 -> 0.1"):  # what else differs is told first
        trainer(images, out, epoch_size=7, scheduler="constant", lr=0.1).fit()


@pytest.mark.fault("longer")
@pytest.mark.slow
def test_a_longer_run_with_another_schedule(images, tmp_path, caplog):
    caplog.set_level("INFO", "mindska")
    out = tmp_path / "run"
    fit(trainer(images, out))
    with pytest.raises(RunError, match=r"(?s)epoch_size: 3 -> 5.*cosine_decay.*--extend goes on.*--ckpt_path"):
        trainer(images, out, epoch_size=5).fit()
    assert (out / "tiny-3_15.ckpt").exists()
    longer = trainer(images, out, epoch_size=5, extend=True)
    fit(longer, until=18)  # killed before its first own checkpoint
    assert "after 3 epochs, the learning rates are those of a run of 5 epochs from here on" in caplog.text
    fit(trainer(images, out, epoch_size=5, extend=True))
    rates = {int(row["step"]): float(row["lr"]) for row in rows(out)}
    for step in (16, 20, 25):
        assert rates[step] == pytest.approx(longer.rates[step - 1])
    assert rates[15] == pytest.approx(trainer(images, tmp_path / "other").rates[14])
    fit(trainer(images, out, epoch_size=5))  # from here on it is a run of five epochs: nothing is left to do


@pytest.mark.slow
def test_early_stopping(images, tmp_path, caplog):
    """It ends after so many evaluations, also when it is started again; more patience goes on to the bit."""
    caplog.set_level("INFO", "mindska")
    settings = dict(lr=1e-9, warmup_epochs=0, min_lr=0, scheduler="constant", ckpt_save_interval=3, epoch_size=6)
    out = tmp_path / "run"
    assert fit(trainer(images, out, "val", early_stopping=2, **settings)) == [15]
    said = "Early stopping after epoch 3 of 6: no better top-1 in 2 evaluations (best: "
    assert said in caplog.text and len([row for row in rows(out) if row["top1"]]) == 3
    caplog.clear()
    again = trainer(images, out, "val", early_stopping=2, **settings)
    assert fit(again) == [15] and said in caplog.text and again.progress.step == 15
    fit(trainer(images, out, "val", **settings))
    fit(trainer(images, tmp_path / "whole", "val", **settings))
    assert_same_state(out / "tiny-6_30.ckpt", tmp_path / "whole" / "tiny-6_30.ckpt")


@pytest.mark.slow
def test_ranks_end_together(images, tmp_path):
    """With a frozen layer, weights of the classes, and layers of other learning rates, under mpirun."""
    settings = dict(lr=1e-9, min_lr=0, warmup_lr=0, epoch_size=6, early_stopping=1, batch_size=4, freeze="conv")
    settings.update(class_weights="balanced", backbone_lr_factor=0.5, launcher=mpirun(2), ema="false")
    printed = train(images, tmp_path / "run", **settings)
    assert "Early stopping after epoch 2 of 6: no better top-1 in 1 evaluations" in printed
    assert [row["step"] for row in rows(tmp_path / "run") if row["top1"]] == ["4", "8"]


# --------------------------------------------------------------------------------------------------------- curves


@pytest.mark.parametrize(
    "settings, measure",
    [
        (dict(label_smoothing=0.0), "cross entropy"),
        (dict(), "cross entropy with label smoothing 0.1"),
        (dict(label_smoothing=0.0, mixup=0.2, cutmix=1.0), "cross entropy with mixup, cutmix"),
        (dict(label_smoothing=0.0, class_weights=("balanced",)), "cross entropy with weights of the classes"),
        (dict(loss="BCE", label_smoothing=0.0), "binary cross entropy"),
    ],
)
def test_losses_share_an_axis_where_they_are_one_measure(tmp_path, settings, measure):
    assert create_task(Config(**settings), World()).measure == measure
    record = RunRecord(tmp_path, measure)
    with record:
        record.begin(0)
        record.add(1, 0.5, loss=1.5, lr=0.1)
        record.add(2, 1.0, loss=1.25, lr=0.1, val_loss=1.0, top1=50.0, top5=90.0)
    panels = record.figure().axes
    labels = [[line.get_label() for line in axes.get_lines()] for axes in panels]
    together = measure == "cross entropy"
    assert (["training loss", "validation loss"] in labels) == together
    assert (["training loss"] in labels and ["validation loss"] in labels) != together
    assert panels[0].get_ylabel() == measure and (tmp_path / "curves.png").exists()
    for axes in panels:
        assert all(float(tick).is_integer() for tick in axes.get_xticks())


# -------------------------------------------------------------------------------------------- learning-rate range


@pytest.mark.slow
def test_the_learning_rate_range_test(images, tmp_path):
    settings = dict(model="tiny_bn", image_resize=16, crop_pct=1.0, batch_size=8, start_lr=1e-4, updates=60)
    settings["ckpt_save_dir"] = tmp_path / "out"
    printed = run("scripts/lr_find.py", images, **settings)
    assert "The loss falls most steeply at a learning rate of" in printed
    lines = (tmp_path / "out" / "lr_find.csv").read_text().splitlines()
    assert lines[0] == "update,lr,loss,smoothed_loss" and lines[1].startswith("1,0.0001,") and len(lines) > 20
    assert (tmp_path / "out" / "lr_find.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["lr_find.csv", "lr_find.png"]
    printed = run("scripts/lr_find.py", images, expect=1, **{**settings, "end_lr": 1e-7})
    assert "expected two positive numbers that rise" in printed and "Traceback" not in printed


def test_the_recipe_for_fine_tuning_is_named_where_it_is_explained():
    assert "configs/finetune.yaml" in (ROOT / "docs" / "finetune.md").read_text()
