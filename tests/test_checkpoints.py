"""scripts/inspect_checkpoint.py, average_checkpoints.py, clean_checkpoint.py."""

import hashlib

import mindcv
import numpy as np
import pytest
import torch
from commands import parameters, script

from mindska.models.factory import own_preprocessing
from mindska.weights import open_weights, to_torch
from mindska.weights.files import write_checkpoint

MODEL = "skanet_nano"


def run(name, *words):
    script(f"{name}_checkpoint{'s' if name == 'average' else ''}").main([str(word) for word in words])


def saved(path, seed, classes=4, ema=True):
    """A checkpoint as training writes it: weights, average, state, record."""
    rng = np.random.default_rng(seed)
    shapes = {p.name: p.shape for p in mindcv.create_model(MODEL, num_classes=classes).get_parameters()}
    weights = {name: rng.uniform(0.5, 1.5, shape).astype(np.float32) for name, shape in shapes.items()}
    everything = {**weights, "state.step": np.float32([seed])}
    if ema:
        everything.update({f"ema.{name}": value + np.float32(1) for name, value in weights.items()})
    record = dict(
        model=MODEL,
        num_classes=classes,
        preprocessing=own_preprocessing(MODEL),
        class_names=[f"kind {i}" for i in range(classes)],
        epoch=seed,
        progress={"step": 8, "best": 77.0, "scores": [1, 2]},
    )
    write_checkpoint(path, everything, record)
    return weights


def test_inspect(tmp_path, capsys):
    weights = saved(tmp_path / "a.ckpt", 3)
    run("inspect", tmp_path / "a.ckpt", "--keys")
    printed = capsys.readouterr().out
    assert "kind:     MindSpore (checksum right)" in printed and f"model:    {MODEL}" in printed
    assert f"holds:    {len(weights)} weights, {len(weights)} of averaged, 1 of training state" in printed
    assert "epoch: 3" in printed and "'best': 77.0" in printed and "class_names: [kind 0, kind 1" in printed
    assert hashlib.sha256((tmp_path / "a.ckpt").read_bytes()).hexdigest() in printed
    assert "  classifier.weight (4, 96) float32" in printed


@pytest.mark.slow
def test_inspect_of_others(tmp_path, capsys):
    state = to_torch(MODEL, open_weights_of(tmp_path))
    torch.save({"state_dict": {k: torch.from_numpy(v) for k, v in state.items()}, "epoch": 9}, tmp_path / "a.pth")
    run("inspect", tmp_path / "a.pth")
    printed = capsys.readouterr().out
    assert "kind:     PyTorch" in printed and f"model:    {MODEL}" in printed and "epoch: 9" in printed
    torch.save({"net": {"a": torch.zeros(2)}, "scale": torch.zeros(3), "epoch": 9}, tmp_path / "b.pth")
    run("inspect", tmp_path / "b.pth", "--keys")
    printed = capsys.readouterr().out
    assert "weights:  1 tensors, 3 values" in printed and "also:     net (dict)\ntraining: 1 " in printed
    (tmp_path / "b.ckpt").write_text("nothing")
    with pytest.raises(SystemExit, match="is no file of weights"):
        run("inspect", tmp_path / "b.ckpt")
    (tmp_path / "c.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes()[:-5])
    with pytest.raises(SystemExit, match="c.ckpt"):
        run("inspect", tmp_path / "c.ckpt")


def open_weights_of(folder):
    saved(folder / "a.ckpt", 1, ema=False)
    return open_weights(folder / "a.ckpt").parameters


@pytest.mark.parametrize("ema", [None, False, True])
def test_average(tmp_path, ema):
    each = [saved(tmp_path / f"{i}.ckpt", i) for i in range(3)]
    paths = [tmp_path / f"{i}.ckpt" for i in range(3)]
    word = {None: [], False: ["--no-use_ema"], True: ["--use_ema"]}[ema]
    run("average", *paths, "--to", tmp_path / "mean.ckpt", *word)
    mean = parameters(tmp_path / "mean.ckpt")
    assert set(mean) == set(each[0])
    for name, value in mean.items():
        expected = np.mean([weights[name] for weights in each], axis=0, dtype=np.float64) + (ema is not False)
        np.testing.assert_allclose(value, expected, rtol=2e-7, err_msg=name)
    record = open_weights(tmp_path / "mean.ckpt").source.record
    assert [source["file"] for source in record["mean_of"]] == ["0.ckpt", "1.ckpt", "2.ckpt"]
    assert record["model"] == MODEL and record["class_names"][0] == "kind 0" and "epoch" not in record


def test_only_checkpoints_of_one_network_are_averaged(tmp_path):
    saved(tmp_path / "a.ckpt", 0)
    saved(tmp_path / "b.ckpt", 1, classes=5, ema=False)
    paths = (tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    with pytest.raises(SystemExit, match="b.ckpt and .*a.ckpt do not belong together") as error:
        run("average", *paths, "--to", tmp_path / "mean.ckpt")
    assert "num_classes: 4 -> 5" in str(error.value) and "weights: averaged (EMA) -> raw" in str(error.value)
    with pytest.raises(SystemExit, match="b.ckpt has no averaged"):
        run("average", *paths, "--to", tmp_path / "mean.ckpt", "--use_ema")
    assert not (tmp_path / "mean.ckpt").exists()


@pytest.mark.fault("unlike")
@pytest.mark.parametrize(
    "changes, difference",
    [
        (
            dict(class_names=["kind 1", "kind 0", "kind 2", "kind 3"]),
            "class_names: [kind 0, kind 1, kind 2, kind 3] -> ",
        ),
        (dict(image_size=(96, 96)), "image_size: (64, 64) -> (96, 96)"),
        (dict(mean=(0.5, 0.5, 0.5)), "mean: (0.485, 0.456, 0.406) -> (0.5, 0.5, 0.5)"),
        (dict(interpolation="bilinear"), "interpolation: bicubic -> bilinear"),
        (dict(network={"norm_eps": 1e-3}), "norm_eps: 1e-06 -> 0.001"),
        (dict(source={"averaged": True}), "weights: raw -> averaged (EMA)"),
        (dict(), ""),
    ],
    ids=lambda value: next(iter(value), "alike") if isinstance(value, dict) else "",
)
def test_what_does_not_belong_together_is_not_averaged(tmp_path, changes, difference):
    net = mindcv.create_model(MODEL, num_classes=4)
    for i, changed in enumerate(({}, changes)):
        pixels = own_preprocessing(MODEL)
        pixels.update({name: changed[name] for name in pixels if name in changed})
        record = dict(model=MODEL, num_classes=4, class_names=[f"kind {i}" for i in range(4)], preprocessing=pixels)
        record.update({name: value for name, value in changed.items() if name not in pixels})
        write_checkpoint(tmp_path / f"{i}.ckpt", {p.name: p for p in net.get_parameters()}, record)
    words = (tmp_path / "0.ckpt", tmp_path / "1.ckpt", "--to", tmp_path / "mean.ckpt")
    if difference:
        with pytest.raises(SystemExit, match="do not belong together") as error:
            run("average", *words)
        assert f"what differs (1):\n  {difference}" in str(error.value) and not (tmp_path / "mean.ckpt").exists()
    else:
        run("average", *words)
        assert open_weights(tmp_path / "mean.ckpt").source.record["num_classes"] == 4


def test_inspect_shows_either_weights_and_what_is_damaged(tmp_path, capsys):
    saved(tmp_path / "a.ckpt", 3)
    run("inspect", tmp_path / "a.ckpt")
    printed = capsys.readouterr().out
    assert "values, averaged" in printed and "the file has the raw ones as well" in printed
    run("inspect", tmp_path / "a.ckpt", "--no-use_ema")
    printed = capsys.readouterr().out
    assert "averaged\n" not in printed.split("weights: ")[1] and "damaged" not in printed
    torch.save(
        {"a\x1b[2J": torch.tensor([1.0, torch.nan]), "b": torch.zeros(3), "c": torch.zeros(2).to("meta")},
        tmp_path / "b.pth",
    )
    run("inspect", tmp_path / "b.pth", "--keys")
    printed = capsys.readouterr().out
    assert r"damaged:  1 tensors have values that are NaN or infinite: a\x1b[2J" in printed and "\x1b" not in printed


@pytest.mark.parametrize("ema", [None, False])
def test_clean(tmp_path, capsys, ema):
    weights = saved(tmp_path / "skanet_nano_best.ckpt", 5)
    run("clean", tmp_path / "skanet_nano_best.ckpt", *(["--no-use_ema"] if ema is False else []))
    (cleaned,) = tmp_path.glob("skanet_nano-*.ckpt")
    assert cleaned.name == f"skanet_nano-{hashlib.sha256(cleaned.read_bytes()).hexdigest()[:8]}.ckpt"
    assert f"wrote {cleaned}" in capsys.readouterr().out
    kept = parameters(cleaned)
    assert set(kept) == set(weights)
    np.testing.assert_array_equal(
        kept["classifier.weight"], weights["classifier.weight"] + np.float32(0 if ema is False else 1)
    )
    record = open_weights(cleaned).source.record
    assert record["epoch"] == 5 and "progress" not in record and record["source"]["averaged"] == (ema is None)
    assert not list(tmp_path.glob(".*"))
