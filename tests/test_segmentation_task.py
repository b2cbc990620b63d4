"""Segmentation through the one trainer and the commands: its promises are those of classification."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from dense_runs import fit, last, trainer
from PIL import Image

from mindska import builders, tasks
from mindska.config import Config
from mindska.distributed import World
from mindska.errors import ConfigError, SettingError, WeightsError
from mindska.modes import pynative_mode
from mindska.segmentation import evaluation
from mindska.segmentation.masks import MaskError, read_mask
from mindska.tasks import create_task
from mindska.tasks.segmentation.opening import open_segmenter
from mindska.weights.files import read_file

ROOT = Path(__file__).parents[1]
MODEL = "semantic_fpn_skanet_nano"


def settings(scenes, out, **more):
    given = dict(
        model=MODEL, dataset="voc", data_dir=str(scenes), ckpt_save_dir=str(out), image_resize=(32,),
        img_scale=(48, 48), batch_size=4, epoch_size=2, warmup_epochs=0, lr=1e-3, log_interval=1,
        ckpt_save_steps=1, keep_checkpoint_max=0,
        val_interval=2,
    )  # fmt: skip
    return Config(**{**given, **more})


@pytest.fixture(scope="module")
def whole(scenes, tmp_path_factory):
    """A run of two epochs of two steps that nothing interrupts, with its averages."""
    out = tmp_path_factory.mktemp("whole")
    fit(trainer(settings(scenes, out, ema=True, ema_decay=0.9)))
    return out


@pytest.mark.fault("dense-runs")
@pytest.mark.slow
def test_a_killed_run_resumes_to_the_bit(scenes, whole, tmp_path):
    config = settings(scenes, tmp_path, ema=True, ema_decay=0.9)
    fit(trainer(config), until=3)
    fit(trainer(config))
    before, after = last(whole, MODEL), last(tmp_path, MODEL)
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
    rows = [list(csv.DictReader((out / "metrics.csv").open())) for out in (whole, tmp_path)]
    kept = ("step", "loss", "lr", "grad_norm", "miou", "macc", "aacc", "miou_averaged", "miou_raw")
    assert [[row[name] for name in kept] for row in rows[0]] == [[row[name] for name in kept] for row in rows[1]]
    assert float(rows[0][-1]["miou"]) > 0 and not rows[0][0]["miou"]


@pytest.mark.fault("dense-runs")
@pytest.mark.slow
def test_a_bad_batch_changes_nothing(scenes, tmp_path):
    out = tmp_path / "out"
    config = settings(scenes, out, max_steps=2, val_while_train=False)
    made = trainer(config)
    before = {p.name: p.asnumpy().copy() for p in made.step.network.get_parameters()}
    fit(made, spoil=0, until=1)
    for parameter in made.step.network.get_parameters():
        np.testing.assert_array_equal(parameter.asnumpy(), before[parameter.name], err_msg=parameter.name)
    assert int(made.step.skipped.asnumpy()) == 1


@pytest.mark.fault("whole-set")
@pytest.mark.slow
def test_figures_do_not_depend_on_ranks_batches_or_mode(scenes, whole):
    """Of the whole image, of a sliding window, of several scales; against all images one by one."""
    path = str(whole / f"{MODEL}_best.ckpt")
    for more in (dict(), dict(slide_stride=(20,)), dict(scales=(0.75, 1.0), flip=True)):
        segmenter = open_segmenter(settings(scenes, "out", ckpt_path=path, **more))
        _, val = create_task_data(scenes)
        matrices = []
        for world, batch in ((1, 1), (2, 3)):
            total = 0
            for rank in range(world):
                evaluator = evaluation.SegmentationEvaluator(
                    None, val, segmenter.transform, 11, batch, segmenter.inference, rank=rank, world_size=world
                )
                evaluator.runner = segmenter.run(evaluator.graph_sizes())
                with pynative_mode():
                    figures = evaluator.evaluate([lambda: None])[0].figures
                total += np.array(
                    [figures["per_class"][n] for n in ("label_pixels", "predicted_pixels", "right_pixels")]
                )
            matrices.append(total)
        np.testing.assert_array_equal(*matrices)
        assert matrices[0][0].sum() == 5 * 48 * 48


def create_task_data(scenes):
    task = create_task(settings(scenes, "out"), World())
    task.open_data(validation=True)
    return task.train_set, task.val_set


@pytest.mark.slow
def test_a_segmenter_starts_from_a_classifier_and_takes_other_classes(scenes, whole, tmp_path, caplog):
    """A backbone's weights go into the backbone; a segmenter of other classes keeps all but its classifier."""
    nano = tmp_path / "nano.ckpt"
    subprocess.run(
        [sys.executable, "-c", f"import mindcv, mindska, mindspore as ms\nms.save_checkpoint("
         f"mindcv.create_model('skanet_nano', num_classes=7), {str(nano)!r})"], check=True, cwd=ROOT,
    )  # fmt: skip
    config = settings(scenes, tmp_path / "a", ckpt_path=str(nano))
    with caplog.at_level("INFO", "mindska"):
        made = trainer(config)
    assert "the backbone starts from them" in caplog.text
    arrays = read_file(nano)[0]
    ours = {p.name: p.asnumpy() for p in made.step.network.get_parameters()}
    moved = [name for name in arrays if not name.startswith("classifier.")]
    assert moved and all(np.array_equal(arrays[name], ours[f"backbone.{name}"]) for name in moved)
    (scenes / "classes.txt").rename(scenes / "kept.txt")
    try:
        (scenes / "classes.txt").write_text("\n".join(["background", *"ABCDEFGHIJ"]))
        with caplog.at_level("INFO", "mindska"):
            made = trainer(settings(scenes, tmp_path / "b", ckpt_path=str(whole / f"{MODEL}_best.ckpt")))
        assert "classifier: 11 classes of" in caplog.text
        with pytest.raises(ConfigError, match="The checkpoint knows 11 classes, the data has 11"):
            from mindska.tasks.segmentation import validation

            validation.open_data(open_segmenter(settings(scenes, "o", ckpt_path=str(whole / f"{MODEL}_best.ckpt"))))
    finally:
        (scenes / "kept.txt").replace(scenes / "classes.txt")
    other = tmp_path / "other.ckpt"
    ms.save_checkpoint([dict(name="x", data=ms.Tensor(np.zeros(3, np.float32)))], str(other))
    with pytest.raises(WeightsError):
        trainer(settings(scenes, tmp_path / "c", ckpt_path=str(other)))


def test_settings_that_do_not_fit_the_task(scenes):
    with pytest.raises(ConfigError, match="dataset is 'imagenet', but the task is segmentation"):
        Config(model=MODEL, dataset="imagenet")
    with pytest.raises(ConfigError, match="task is detection, but semantic_fpn_skanet_nano is made for segmentation"):
        Config(model=MODEL, task="detection")
    with pytest.raises(ConfigError, match="'van_tin' is none of them; did you mean van_tiny"):
        from mindska.names import check_model

        check_model("upernet_van_tin")


@pytest.mark.fault("ignored-batch")
def test_one_image_a_batch_is_refused_where_a_map_is_pooled(scenes, tmp_path):
    config = settings(scenes, tmp_path, model="deeplabv3_skanet_nano", batch_size=1)
    task = create_task(config, World())
    task.open_data(validation=False)
    with pytest.raises(ConfigError, match="expected at least 2 images a device"):
        task.build_network(None, {})


@pytest.mark.fault("mask-numbers")
def test_a_mask_is_never_replaced_by_another_image(scenes, tmp_path):
    """Unreadable images may be: max_damaged says how many."""
    task = create_task(settings(scenes, tmp_path, max_damaged=1.0), World())
    task.open_data(validation=False)
    task.pixels = builders.build_preprocessing(task.config)
    loader = task.train_loader(type("Network", (), dict(noise_size=1)))
    loader.dataset.class_names = ["background", "0"]  # so that other digits are beyond the classes
    with pytest.raises(MaskError, match="SegmentationClass"):
        list(loader.batches(0, 4))


def words(command, *more):
    return [sys.executable, f"{command}.py", *map(str, more)]


@pytest.mark.slow
def test_train_validate_predict(scenes, tmp_path):
    """Two ranks, as a user does it; scores of validation are those of training; label maps and pictures are written."""
    out, environment = tmp_path / "run", {**os.environ, "PYTHONPATH": str(ROOT)}
    common = ("--data_dir", scenes, "--dataset", "voc", "--image_resize", 32, "--img_scale", 48, 48, "--batch_size", 2)
    schedule = ("--max_steps", 3, "--val_steps", 3, "--scheduler", "polynomial_decay", "--warmup_steps", 1)
    train = ("mpirun", "-n", "2", "--oversubscribe", "--bind-to", "none", *words("train", "--model", MODEL, *common),
             *map(str, schedule), "--ckpt_save_dir", str(out), "--lr", "1e-3")  # fmt: skip
    result = subprocess.run(train, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    assert "3 updates" in result.stderr and "Done: best mean IoU" in result.stderr
    best, seen = out / f"{MODEL}_best.ckpt", tmp_path / "seen"
    record = read_file(best)[1]
    assert record["task"] == "segmentation" and record["evaluation"]["scale"] == [48, 48]
    names = {name: tmp_path / name for name in ("result.json", "classes.csv", "images.csv", "all.csv")}
    result = subprocess.run(
        words("validate", "--data_dir", scenes, "--dataset", "voc", "--ckpt_path", best,
              "--result_json", names["result.json"], "--class_csv", names["classes.csv"],
              "--details", names["images.csv"], "--result_csv", names["all.csv"]),
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    figures = json.loads(names["result.json"].read_text())
    row = list(csv.DictReader((out / "metrics.csv").open()))[-1]
    assert 100 * figures["mIoU"] == pytest.approx(float(row["miou"]), rel=1e-7) and figures["images"] == 5
    assert "mIoU" in result.stdout and "background" in result.stdout
    classes = list(csv.DictReader(names["classes.csv"].open()))
    assert [each["class"] for each in classes] == ["background", *map(str, range(10))]
    assert len(list(csv.DictReader(names["images.csv"].open()))) == 5
    images = sorted((scenes / "val2017").iterdir())
    result = subprocess.run(
        words("scripts/predict", *images[:2], "--ckpt_path", best, "--out", seen, "--format", "json"),
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    entries = json.loads(result.stdout)
    assert [entry["path"] for entry in entries] == [str(path) for path in images[:2]]
    for entry, path in zip(entries, images):
        labels = read_mask(seen / f"{path.stem}.png")
        assert labels.shape == (48, 48) and sum(each["share"] for each in entry["classes"]) == pytest.approx(1)
        assert {each["index"] for each in entry["classes"]} == set(np.unique(labels))
        assert Image.open(seen / f"{path.stem}_overlay.png").size > (48, 48)


@pytest.mark.parametrize("task, name", [("segmentation", "contact_sheet"), ("classification", "out")])
def test_options_of_another_task_are_refused(task, name, monkeypatch):
    monkeypatch.setattr(tasks, "task_of_file", lambda *_: task)
    given = dict.fromkeys((*tasks.OF_CLASSIFIERS, *tasks.OF_OTHERS)) | {name: "x", "ckpt_path": "a.ckpt", "model": ""}
    with pytest.raises(SettingError, match=f"--{name} has no meaning for a.ckpt, a model for {task}"):
        tasks.predict_images(SimpleNamespace(**given), ["a.png"])
