"""Validation: figures of each class and of each image, of several checkpoints, on any number of ranks."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import tiny  # noqa: F401  registers the networks
from commands import mpirun, run, script
from PIL import Image

from mindska import builders, validation
from mindska.config import Config, check_given, check_results, matching, parse_args
from mindska.data import EvalLoader, EvalTransform, Preprocessing, contact_sheet, open_dataset
from mindska.data.contact_sheet import Picture, write_contact_sheet
from mindska.distributed import World
from mindska.errors import ConfigError, DataError, PredictionError, RunError
from mindska.evaluation import EvalStep, evaluate
from mindska.export import export
from mindska.prediction import Predictor
from mindska.validation import outcomes_of, predict_all, read_real_labels, validate
from mindska.weights.files import write_checkpoint

PIXELS = Preprocessing((16, 16), 1.0, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NAMES = ["class0", "class1", "class2"]


def record(names=NAMES, **more):
    pixels = dict(image_size=[16, 16], crop_pct=1.0, interpolation="bicubic", mean=[0.5] * 3, std=[0.5] * 3)
    return dict(model="tiny", num_classes=len(names), class_names=list(names), preprocessing=pixels, **more)


def checkpoint(path, seed=0, names=NAMES, **more):
    """Weights that tell the stripes of `images` apart, more or less."""
    ms.set_seed(seed)
    net = tiny.Tiny(len(names))
    rng = np.random.default_rng(seed)
    for parameter in net.get_parameters():
        parameter.set_data(ms.Tensor(rng.normal(0, 0.5, parameter.shape).astype(np.float32)))
    write_checkpoint(path, {p.name: p for p in net.get_parameters()}, record(names, **more))
    return path


def validated(images, path, capsys, tmp_path, more=(), **settings):
    """(result_json, details, what was printed)"""
    files = dict(result_json=str(tmp_path / "r.json"), details=str(tmp_path / "d.csv"))
    config = Config(
        data_dir=str(images), ckpt_path=str(path), batch_size=5, more_ckpt_paths=tuple(map(str, more)),
        **{**({} if more else files), **settings},
    )  # fmt: skip
    capsys.readouterr()
    validate(config, World())
    if more:
        return capsys.readouterr().out
    with (tmp_path / "d.csv").open(encoding="utf-8") as file:
        return json.loads((tmp_path / "r.json").read_text()), list(csv.DictReader(file)), capsys.readouterr().out


def test_figures_of_classes_and_images_are_those_of_the_network(images, tmp_path, capsys):
    path = checkpoint(tmp_path / "net.ckpt", 3)
    result, details, said = validated(images, path, capsys, tmp_path)
    dataset = open_dataset("", images, "val")
    assert [row["path"] for row in details] == dataset.paths and result["images"] == 36
    network = builders.build_network(
        Config(model="tiny"), 3, 3, builders.configured_weights(Config(ckpt_path=str(path)))
    )
    transform = EvalTransform(PIXELS)
    logits = network(ms.Tensor(np.stack([transform(dataset.load(i)) for i in range(36)]))).asnumpy().astype(np.float64)
    powers = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = powers / powers.sum(1, keepdims=True)
    guessed = logits.argmax(1)
    for i, row in enumerate(details):
        assert row["label"] == NAMES[dataset.labels[i]] and row["prediction"] == row["class_1"] == NAMES[guessed[i]]
        assert [row[f"class_{k}"] for k in (1, 2, 3)] == [NAMES[c] for c in np.argsort(-logits[i])]
        assert float(row["probability_1"]) == pytest.approx(probabilities[i].max(), abs=1e-4) and row["error"] == ""
    for label, row in enumerate(result["classes"]):
        hits = int(((guessed == label) & (dataset.labels == label)).sum())
        assert row["name"] == NAMES[label] and row["support"] == 12
        assert row["recall"] == row["accuracy"] == pytest.approx(100 * hits / 12)
        called = int((guessed == label).sum())
        assert row["precision"] == (pytest.approx(100 * hits / called) if called else None)
    assert result["mean_class_accuracy"] == pytest.approx(result["top1"])  # of equal classes
    # The figures are those that training reports for the same weights.
    loader = EvalLoader(dataset, EvalTransform(PIXELS), 5)
    other = evaluate(EvalStep(network).set_train(False), loader, lambda total: total)
    assert (result["top1"], result["top5"]) == (other.top1, other.top5)
    assert result["loss"] == pytest.approx(other.loss, rel=1e-5) and str(other) in said


def test_ties_and_what_is_not_finite_win_nothing():
    """As in EvalStep: a constant network is not right for the first class of all, and NaN is right for none."""
    logits = np.zeros((4, 3), np.float32)
    logits[2], logits[3] = [np.nan] * 3, [0, np.nan, 5]
    labels = np.array([0, 2, 1, 2], np.int32)
    found = outcomes_of(logits, labels)
    assert found["before"].tolist() == [0, 2, 3, 1]
    step = evaluate(EvalStep(_Fixed()), [(logits, labels)], lambda total: total)
    assert step.top1 == 100 * (found["before"] < 1).mean()
    masked = outcomes_of(
        np.array([[3.0, 2.0, 1.0]], np.float32), np.array([1], np.int32), np.array([False, True, True])
    )
    assert masked["before"].tolist() == [0] and masked["classes"].tolist() == [[1, 2]]
    assert masked["losses"][0] == pytest.approx(np.log(1 + np.exp(-1.0)))
    assert masked["probabilities"].sum() == pytest.approx(1)


class _Fixed(ms.nn.Cell):
    def construct(self, x):
        return x


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_details_are_exact_over_ranks(images, monkeypatch, ranks):
    dataset = open_dataset("", images, "val")

    def logits(x):
        return np.stack([x.mean((1, 2, 3)), x[:, 0, 3].mean(1), x[:, 1, :, 5].mean(1)], 1)

    def on(rank, world_size, answers):
        gathered = []
        monkeypatch.setattr(validation, "all_gather_object", lambda value: gathered.append(value) or [*answers, value])
        loader = EvalLoader(dataset, EvalTransform(PIXELS), 5, rank=rank, world_size=world_size)
        return predict_all(logits, loader, 3), gathered[0]

    alone, _ = on(0, 1, [])
    answers = [on(rank, ranks, [])[1] for rank in range(ranks - 1)]
    together, _ = on(ranks - 1, ranks, answers)
    assert together.indices.tolist() == list(range(36))
    for name in ("labels", "classes", "probabilities", "before", "losses"):
        assert np.array_equal(getattr(alone, name), getattr(together, name)), name
    assert alone.result() == together.result()


@pytest.mark.fault("one-rank")
def test_an_error_of_one_rank_is_one_of_all(images, monkeypatch):
    """Else the others would wait, or take what comes next for its figures."""
    dataset = open_dataset("", images, "val")
    answer = ({}, {}, "b.png cannot be read")
    monkeypatch.setattr(validation, "all_gather_object", lambda value: [value, answer])
    with pytest.raises(DataError, match="b.png cannot be read"):
        loader = EvalLoader(dataset, EvalTransform(PIXELS), 5, rank=0, world_size=2)
        predict_all(lambda x: np.zeros((len(x), 3), np.float32), loader, 3)
    with pytest.raises(PredictionError, match=r"outputs of the shape \(5, 4\); expected 5 images by 3 classes"):
        predict_all(lambda x: np.zeros((len(x), 4), np.float32), loader, 3)


@pytest.mark.slow
def test_details_under_mpirun_are_those_of_one_process(images, whole_run, tmp_path):
    best, written = whole_run[0] / "tiny_bn_best.ckpt", []
    for launcher in ((), mpirun(3)):
        out = dict(details=tmp_path / "d.csv", result_csv=tmp_path / "r.csv")
        run("validate.py", images, launcher=launcher, ckpt_path=best, batch_size=5, tta="flip", **out)
        written.append([path.read_text() for path in out.values()])
    assert written[0] == written[1] and written[0][0].count("\n") == 37


def test_unreadable_images_are_rows_of_the_details(images, tmp_path, capsys):
    shutil.copytree(images / "val", tmp_path / "data" / "val")
    damaged = tmp_path / "data" / "val" / "class1" / "003.png"
    damaged.write_bytes(b"damaged")
    path = checkpoint(tmp_path / "net.ckpt")
    with pytest.raises(DataError, match="003.png"):
        validated(tmp_path / "data", path, capsys, tmp_path)
    result, details, _ = validated(tmp_path / "data", path, capsys, tmp_path, val_skip_damaged=True)
    assert result["images"] == 35 and result["unreadable"] == 1 and len(details) == 36
    assert result["classes"][1]["support"] == 11
    (row,) = [row for row in details if row["error"]]
    assert row["path"] == str(damaged) and row["prediction"] == "" and "003.png cannot be read" in row["error"]


def test_mirror_images_are_averaged_in(images, tmp_path, capsys):
    path = checkpoint(tmp_path / "net.ckpt", 3)
    plain, _, _ = validated(images, path, capsys, tmp_path)
    shutil.copytree(images / "val", tmp_path / "data" / "val")
    for file in (tmp_path / "data").rglob("*.png"):
        with Image.open(file) as image:
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(file)
    both = [validated(folder, path, capsys, tmp_path, tta="flip")[0] for folder in (images, tmp_path / "data")]
    assert both[0]["loss"] == pytest.approx(both[1]["loss"], rel=1e-6) != plain["loss"]
    assert both[0]["tta"] == "flip" and plain["tta"] is None


def test_some_of_the_classes_of_a_network(images, tmp_path, capsys):
    """The network knows six classes, the data has three of them; other classes may be chosen or not."""
    names = ["x", "class2", "y", "class0", "z", "class1"]
    path = checkpoint(tmp_path / "net.ckpt", 1, names)
    with pytest.raises(ConfigError, match="The checkpoint knows 6 classes, the data has 3"):
        validated(images, path, capsys, tmp_path)
    chosen = dict(classes="class0,class1,class2")
    masked, details, said = validated(images, path, capsys, tmp_path, **chosen)
    assert {row["prediction"] for row in details} <= {"class0", "class1", "class2"} and "class_4" not in details[0]
    assert "of 3 of 6 classes (the others masked)" in said
    assert [row["name"] for row in masked["classes"]] == ["class2", "class0", "class1"]
    assert masked["classes_evaluated"] == 3 and masked["other_classes_masked"] is True
    among_all, details, said = validated(images, path, capsys, tmp_path, mask_classes=False, **chosen)
    assert "the others not masked" in said and among_all["top1"] <= masked["top1"] and "class_5" in details[0]
    assert among_all["loss"] > masked["loss"]
    two, details, _ = validated(images, path, capsys, tmp_path, classes="class2,class0")
    assert two["images"] == 24 and {row["label"] for row in details} == {"class0", "class2"}
    with pytest.raises(DataError, match=r"classes names \['x'\], which .* does not have"):
        validated(images, path, capsys, tmp_path, classes="x,class0")


def test_numbered_folders_are_mapped_to_the_networks_classes(images, tmp_path, capsys):
    """ImageNet-V2's folders."""
    for number, name in enumerate(("class1", "class0", "class2")):
        shutil.copytree(images / "val" / name, tmp_path / "data" / "val" / str(number))
    (tmp_path / "map.csv").write_text("folder,class\n0,class1\n1,class0\n2,class2\n")
    path = checkpoint(tmp_path / "net.ckpt", 2)
    expected, _, _ = validated(images, path, capsys, tmp_path)
    with pytest.raises(ConfigError, match="unknown to the checkpoint: .*'0', '1', '2'"):
        validated(tmp_path / "data", path, capsys, tmp_path)
    mapped, _, _ = validated(tmp_path / "data", path, capsys, tmp_path, class_map=str(tmp_path / "map.csv"))
    assert mapped["top1"] == expected["top1"] and mapped["classes"] == expected["classes"]
    # A list of files says the same.
    lines = [f"{file.relative_to(images)},{file.parent.name}" for file in sorted((images / "val").rglob("*.png"))]
    (tmp_path / "val.csv").write_text("\n".join(lines))
    listed, _, _ = validated(images, path, capsys, tmp_path, val_split=str(tmp_path / "val.csv"))
    assert listed["top1"] == expected["top1"] and listed["classes"] == expected["classes"]


@pytest.mark.fault("several")
@pytest.mark.slow
def test_several_checkpoints_make_one_table(images, tmp_path, capsys, graph, monkeypatch):
    paths = [checkpoint(tmp_path / f"{seed}.ckpt", seed) for seed in (1, 2, 3)]
    single = [validated(images, path, capsys, tmp_path)[0] for path in paths]
    compiled = []
    monkeypatch.setattr(validation, "compile_cached", lambda net, *_, **__: compiled.append(net))
    table = tmp_path / "r.csv"
    said = validated(images, paths[0], capsys, tmp_path, more=paths[1:], result_csv=str(table))
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert len(compiled) == 1  # one graph for all
    assert [row["ckpt_path"] for row in rows] == list(map(str, paths)) and said.count("top-1") == 3
    for row, result in zip(rows, single):
        assert float(row["top1"]) == result["top1"] and float(row["loss"]) == pytest.approx(result["loss"], rel=1e-5)
    assert len({row["loss"] for row in rows}) == 3
    # One that cannot be used ends nothing, is named, and counts.
    (tmp_path / "2.ckpt").write_bytes(b"damaged")
    other = checkpoint(tmp_path / "4.ckpt", 4, ["a", "b", "c"])
    with pytest.raises(RunError, match=r"2 of 4 checkpoints could not be evaluated: .*2.ckpt, .*4.ckpt"):
        validated(images, paths[0], capsys, tmp_path, more=[paths[1], other, paths[2]], result_csv=str(table))
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert ["2.ckpt is no file of weights" in row["error"] for row in rows] == [False, True, False, False]
    assert "unknown to the checkpoint" in rows[2]["error"] and float(rows[3]["top1"]) == single[2]["top1"]


def test_patterns_and_several_files_are_checked_before_mindspore_is_loaded(images, tmp_path, monkeypatch):
    for name in ("b.ckpt", "a.ckpt", "c[1].ckpt"):
        (tmp_path / name).write_bytes(b"")
    config = parse_args(["--ckpt_path", str(tmp_path / "*.ckpt"), "--data_dir", str(images)])
    assert [config.ckpt_path, *config.more_ckpt_paths] == [str(tmp_path / n) for n in ("a.ckpt", "b.ckpt", "c[1].ckpt")]
    assert matching([str(tmp_path / "c[1].ckpt")]) == [str(tmp_path / "c[1].ckpt")]
    config = parse_args(["--ckpt_path", str(tmp_path / "a.ckpt"), str(tmp_path / "none*"), "--data_dir", str(images)])
    with pytest.raises(ConfigError, match=r"No checkpoint at .*none\*"):
        check_given(config, "ckpt_path")
    config = parse_args(["--ckpt_path", str(tmp_path / "*.ckpt"), "--data_dir", str(images), "--model", "skanet_s"])
    with pytest.raises(ConfigError, match="ckpt_path names 3 files; a run starts from one"):
        check_given(config, "data_dir", "model")
    for name in ("details", "result_json"):
        with pytest.raises(ConfigError, match=f"{name} is of one checkpoint, ckpt_path names 2"):
            check_results(Config(more_ckpt_paths=("b",), **{name: str(tmp_path / "x")}))


@pytest.mark.parametrize("kind", ["mindir"])  # ONNX is written of our networks only: tests/test_onnx.py
@pytest.mark.slow
def test_exported_models_are_evaluated(images, tmp_path, capsys, kind, graph):
    """Of a fixed batch, which does not divide the images."""
    path = checkpoint(tmp_path / "net.ckpt", 3)
    expected, before, _ = validated(images, path, capsys, tmp_path)
    weights = builders.configured_weights(Config(ckpt_path=str(path)))
    network = builders.build_network(Config(model="tiny"), 3, 3, weights).set_train(False)
    export(network, tmp_path / f"net.{kind}", (7, 3, 16, 16), weights.record)
    found, details, _ = validated(images, tmp_path / f"net.{kind}", capsys, tmp_path)
    assert found["top1"] == expected["top1"] and found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert [row["prediction"] for row in details] == [row["prediction"] for row in before]
    with pytest.raises(ConfigError, match="image_resize is .*32.* was exported for 16x16 pixels"):
        validated(images, tmp_path / f"net.{kind}", capsys, tmp_path, image_resize=(32,))
    with pytest.raises(PredictionError, match="is an exported model"):
        validated(images, tmp_path / f"net.{kind}", capsys, tmp_path, use_ema=True)


def test_real_labels(images, tmp_path, capsys):
    """Of ReaL's format, by the names of the files: several labels an image, or none."""
    data = tmp_path / "data" / "val"
    number = 0
    for name in NAMES:
        (data / name).mkdir(parents=True)
        for file in sorted((images / "val" / name).iterdir()):
            number += 7
            shutil.copy(file, data / name / f"ILSVRC2012_val_{number % 37:08}.png")
    path = checkpoint(tmp_path / "net.ckpt", 3)
    _, details, _ = validated(tmp_path / "data", path, capsys, tmp_path)
    labels = [[] for _ in range(36)]
    right = 0
    for row in details:
        index = int(Path(row["path"]).stem[-8:]) - 1
        guess = NAMES.index(row["prediction"])
        labels[index] = [[guess, (guess + 1) % 3], [(guess + 1) % 3], []][index % 3]
        right += index % 3 == 0
    real = tmp_path / "real.json"
    real.write_text(json.dumps(labels))
    result, _, said = validated(tmp_path / "data", path, capsys, tmp_path, real_labels=str(real))
    assert result["real_images"] == 24 and result["real_top1"] == pytest.approx(100 * right / 24)
    assert result["real_top5"] == 100 and "ReaL: top-1 50.00 %" in said
    dataset = open_dataset("", tmp_path / "data", "val")
    table = read_real_labels(real, dataset)
    assert [table[i] for i in range(36)] == [set(labels[int(Path(p).stem[-8:]) - 1]) for p in dataset.paths]
    for text, message in (
        ("{}", "no list of lists"),
        ("[[1], 2]", "no list of lists"),
        ("[[true]]", "no list of lists"),
        ("[[", "cannot be read"),
        (json.dumps([[0]] * 35), "there is one of number 36"),
        (json.dumps([[3]] * 36), "has label 3, but there are 3 classes"),
    ):
        real.write_text(text)
        with pytest.raises(DataError, match=message):
            read_real_labels(real, dataset)
    # Files of other names: as many as lists, sorted by name.
    with pytest.raises(DataError, match="the validation set has 36, of 12 names"):
        real.write_text(json.dumps([[0]] * 36))
        read_real_labels(real, open_dataset("", images, "val"))


def test_predictions_go_onto_a_contact_sheet(images, tmp_path, capsys, monkeypatch):
    def logits(images):
        return np.stack([images.mean((1, 2, 3)), images[:, 0, 3].mean(1), images[:, 1, :, 5].mean(1)], 1)

    photos = tmp_path / "photos"
    shutil.copytree(images / "val" / "class1", photos)
    (photos / "x.png").write_bytes(b"damaged")
    sheet = tmp_path / "sheet.png"
    predict = script("predict")
    monkeypatch.setattr("mindska.prediction.open_predictor", lambda *_, **__: Predictor("", logits, PIXELS, NAMES, 5))
    monkeypatch.setattr("mindska.tasks.task_of_file", lambda *_: "classification")
    with pytest.raises(SystemExit) as ended:
        predict.main([str(photos), "--ckpt_path", str(photos / "x.png"), "--contact_sheet", str(sheet)])
    assert ended.value.code == 1  # of the damaged one
    assert f"{sheet}: 13 pictures" in capsys.readouterr().err
    with Image.open(sheet) as written:
        pixels = np.asarray(written.convert("RGB"))
    crossed = (pixels == (200, 60, 60)).all(2).sum()
    assert pixels.shape[1] > 500 and pixels.std() > 20 and crossed > 300
    with pytest.raises(SystemExit, match="should end with .png"):
        path = str(photos / "x.png")
        predict.main([str(photos), "--ckpt_path", path, "--contact_sheet", str(tmp_path / "sheet.jpg")])


def test_a_contact_sheet_has_a_limit_and_takes_any_picture_and_text(tmp_path, monkeypatch):
    monkeypatch.setattr(contact_sheet, "MOST", 7)
    sizes = [(1, 1), (3000, 2), (2, 3000), (160, 160), (161, 159)]
    pictures = [Picture(Image.new("RGB", size, (0, 90, 200)), ["a\x1b[2J" * 90, "日本語", ""]) for size in sizes]
    assert write_contact_sheet(tmp_path / "a.png", [*pictures, *[Picture(None)] * 9], "title\n" * 99) == 7
    assert write_contact_sheet(tmp_path / "b.png", []) == 0
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width < 1200
