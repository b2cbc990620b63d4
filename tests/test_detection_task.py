"""Detection through the one trainer and the commands: its promises are those of classification."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dense_runs import fit, last, trainer
from PIL import Image
from sklearn.datasets import load_digits

from mindska.config import Config
from mindska.data.digit_scenes import split_scans, write_digit_scenes
from mindska.detection import mask_rcnn
from mindska.detection.coco import open_coco
from mindska.detection.evaluation import DetectionEvaluator, DetectionOptions
from mindska.detection.metrics import CocoEvaluator
from mindska.detection.postprocess import Detections
from mindska.errors import ConfigError, PredictionError, WeightsError
from mindska.modes import pynative_mode
from mindska.segmentation.factory import create_segmenter
from mindska.tasks import task_of_file
from mindska.tasks.detection.opening import open_detector
from mindska.tasks.detection.prediction import DetectionPredictor
from mindska.tasks.detection.validation import _prepare
from mindska.weights.files import read_file
from mindska.weights.write import write_weights

ROOT = Path(__file__).parents[1]
MODEL = "ssdlite_skanet_nano"


def settings(scenes, out, **more):
    given = dict(
        model=MODEL, data_dir=str(scenes), ckpt_save_dir=str(out), image_resize=(64,), batch_size=4, epoch_size=2,
        warmup_epochs=0, lr=1e-3, log_interval=1, ckpt_save_steps=1, keep_checkpoint_max=0, val_interval=2, max_boxes=4,
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
    kept = ("step", "loss", "lr", "grad_norm", "ap", "ap50", "ap75", "ap_averaged", "ap_raw")
    assert [[row[name] for name in kept] for row in rows[0]] == [[row[name] for name in kept] for row in rows[1]]
    assert rows[0][-1]["ap"] and not rows[0][0]["ap"]


@pytest.mark.fault("dense-runs")
@pytest.mark.slow
def test_a_bad_batch_changes_nothing(scenes, tmp_path):
    made = trainer(settings(scenes, tmp_path / "out", max_steps=2, val_while_train=False))
    before = {p.name: p.asnumpy().copy() for p in made.step.network.get_parameters()}
    fit(made, spoil=0, until=1)
    for parameter in made.step.network.get_parameters():
        np.testing.assert_array_equal(parameter.asnumpy(), before[parameter.name], err_msg=parameter.name)
    assert int(made.step.skipped.asnumpy()) == 1


@pytest.mark.fault("dense-runs")
@pytest.mark.slow
def test_figures_do_not_depend_on_ranks_and_batches(scenes, whole):
    """What is found in original pixels is the same; the record says what it is."""
    path = str(whole / f"{MODEL}_best.ckpt")
    detector, dataset = _prepare(settings(scenes, "out", ckpt_path=path))
    assert read_file(Path(path))[1]["task"] == task_of_file(path) == "detection"
    found = []
    for world, batch in ((1, 1), (2, 3)):
        everything = {}
        for rank in range(world):
            evaluator = DetectionEvaluator(
                detector.network, dataset, detector.transform, batch, DetectionOptions(), rank=rank, world_size=world
            )
            with pynative_mode():
                evaluator.evaluate([lambda: None])
            assert not everything.keys() & evaluator.found[0].state().keys()
            everything.update(evaluator.found[0].state())
        found.append(everything)
    assert found[0].keys() == found[1].keys() == set(range(5))
    for index, one in found[0].items():
        np.testing.assert_allclose(one["boxes"], found[1][index]["boxes"], atol=1e-3)
        assert (one["boxes"][:, :2] >= 0).all() and (one["boxes"][:, :2] + one["boxes"][:, 2:] <= 48).all()


@pytest.mark.slow
def test_objects_are_found_at_the_same_place_in_a_larger_image(scenes, whole):
    """An image of twice the size: boxes twice as large; mirrored, they are mirrored."""
    predictor = DetectionPredictor(Config(ckpt_path=str(whole / f"{MODEL}_best.ckpt"), score_threshold=0.01))
    image = Image.open(sorted((scenes / "val2017").iterdir())[0]).convert("RGB")
    one, two = (predictor(each) for each in (image, image.resize((96, 96), Image.Resampling.NEAREST)))
    assert len(one) and len(two)
    assert (two.boxes <= 96).all() and two.boxes.max() > 48


@pytest.mark.fault("coco-ids")
def test_the_data_may_have_its_categories_in_any_order(scenes, tmp_path, monkeypatch):
    """Matched by name: truths as detections score 1, whatever the order in the file; an unknown class is refused."""
    text = json.loads((scenes / "annotations" / "instances_val2017.json").read_text())
    text["categories"] = text["categories"][::-1]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(text))
    names = [str(number) for number in range(10)]
    fake = type("Opened", (), dict(record=dict(class_names=names), num_classes=10, has_masks=False))()
    fake.config = settings(scenes, "out", val_split=str(other), val_images=str(scenes / "val2017"))
    monkeypatch.setattr("mindska.tasks.detection.validation.open_detector", lambda config: fake)
    _, dataset = _prepare(fake.config)
    assert dataset.class_names == names
    evaluator = CocoEvaluator(dataset)
    for index in range(len(dataset)):
        objects = dataset.objects(index)
        scores = np.linspace(1, 0.5, len(objects.labels), dtype=np.float32)
        evaluator.update(index, Detections(objects.boxes, scores, objects.labels))
    assert evaluator.figures()["bbox"]["AP"] == 1
    fake.record = dict(class_names=names[:9])
    with pytest.raises(ConfigError, match="unknown to the checkpoint: .'9'"):
        _prepare(fake.config)


def test_an_exported_model_is_refused(scenes):
    with pytest.raises(PredictionError, match="is an exported model"):
        open_detector(settings(scenes, "out", ckpt_path="detector.onnx"))


@pytest.mark.slow
def test_a_detector_starts_from_a_segmenters_backbone(scenes, tmp_path):
    """And not from one that is built on another backbone."""
    for backbone in ("skanet_nano", "sk_resnet18"):
        segmenter, path = create_segmenter("semantic_fpn", backbone=backbone, num_classes=5), tmp_path / "a.ckpt"
        arrays = {p.name: p.asnumpy() for p in segmenter.get_parameters()}
        write_weights(path, arrays, {"model": f"semantic_fpn_{backbone}", "num_classes": 5})
        config = settings(scenes, tmp_path / "run", ckpt_path=str(path))
        if backbone == "sk_resnet18":
            with pytest.raises(
                WeightsError, match="holds semantic_fpn_sk_resnet18, but the model asked for is ssdlite"
            ):
                trainer(config)
            continue
        ours = {p.name: p.asnumpy() for p in trainer(config).step.network.get_parameters()}
        moved = [name for name in arrays if name.startswith("backbone.")]
        assert moved and all(np.array_equal(arrays[name], ours[name]) for name in moved)


def test_without_iou_crop_an_object_stays_where_it_is(scenes, tmp_path):
    """The boxes are those of the file, for the input's size, whatever is drawn."""
    config = settings(scenes, tmp_path, iou_crop=False, hflip=0.0, max_boxes=12)
    transform, data = trainer(config).loader.transform, open_coco(scenes, "train", None, "train")
    for index in range(4):
        truth, (height, width) = data.objects(index).boxes, data.load(index).size[::-1]
        for seed in range(5):
            _, boxes, labels, _ = transform.sample(data, index, np.random.default_rng(seed))
            np.testing.assert_allclose(boxes[labels >= 0], truth * ([64 / width, 64 / height] * 2), rtol=1e-5)


@pytest.mark.slow
def test_box_and_mask_ap_of_mask_rcnn_rise(graph, tmp_path, monkeypatch):
    """It learns four scenes by heart: with few channels and proposals, a step takes a tenth of a second."""
    monkeypatch.setattr(mask_rcnn, "CHANNELS", 32)
    monkeypatch.setattr(mask_rcnn, "BOX_SAMPLES", 32)
    monkeypatch.setattr(mask_rcnn, "MASK_SLOTS", (8, 8, 8))
    for name, number in dict(num_proposals=64, candidates_in_training=200, candidates=200).items():
        monkeypatch.setattr(mask_rcnn.MaskRCNN, name, number)
    digits, data = load_digits(), tmp_path / "data"
    scans = split_scans(digits.images, digits.target)
    write_digit_scenes(data, scans, dict(train=4, val=1), size=(64, 64), digits=(2, 2))
    config = settings(
        data, tmp_path / "out", model="mask_rcnn_skanet_nano", image_resize=None, img_scale=(64, 64), epoch_size=60,
        val_interval=4, opt="adamw", weight_decay=0.0, hflip=0.0, drop_path_rate=0.0, ckpt_save_steps=0,
        ckpt_save_interval=60, val_split="train", val_images="train2017", lr_epoch_stair=False, warmup_epochs=1,
        warmup_lr=1e-6, clip_grad=True, clip_value=5.0,
    )  # fmt: skip
    trainer(config).fit()
    rows = [row for row in csv.DictReader((tmp_path / "out" / "metrics.csv").open()) if row["ap"]]
    for name in ("ap", "mask_ap"):
        figures = [float(row[name]) for row in rows]
        assert max(figures) > max(12, figures[0] + 5), figures


def words(command, *more):
    return [sys.executable, f"{command}.py", *map(str, more)]


@pytest.mark.slow
def test_train_validate_predict(scenes, tmp_path):
    """Two ranks, as a user does it; scores of validation are those of training; pictures and results are written."""
    out, environment = tmp_path / "run", {**os.environ, "PYTHONPATH": str(ROOT)}
    train = (
        "mpirun", "-n", "2", "--oversubscribe", "--bind-to", "none",
        *words("train", "--model", MODEL, "--data_dir", scenes, "--image_resize", 64, "--batch_size", 2,
               "--max_steps", 3, "--val_steps", 3, "--lr", "1e-3", "--ckpt_save_dir", out, "--max_boxes", 4),
    )  # fmt: skip
    result = subprocess.run(train, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    assert "Done: best box AP" in result.stderr
    best, seen = out / f"{MODEL}_best.ckpt", tmp_path / "seen"
    names = {name: tmp_path / name for name in ("result.json", "classes.csv", "found.json")}
    result = subprocess.run(
        words("validate", "--data_dir", scenes, "--ckpt_path", best, "--result_json", names["result.json"],
              "--class_csv", names["classes.csv"], "--details", names["found.json"]),
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    figures = json.loads(names["result.json"].read_text())
    row = list(csv.DictReader((out / "metrics.csv").open()))[-1]
    assert 100 * figures["bbox"]["AP"] == pytest.approx(float(row["ap"]), rel=1e-6) and figures["images"] == 5
    assert "AP_small" in result.stdout
    assert [each["class"] for each in csv.DictReader(names["classes.csv"].open())] == [str(i) for i in range(10)]
    evaluator = CocoEvaluator(open_coco(scenes, "val"))
    evaluator.read_results(names["found.json"])
    assert evaluator.figures()["bbox"]["AP"] == pytest.approx(figures["bbox"]["AP"], abs=1e-3)  # of rounded boxes
    images = sorted((scenes / "val2017").iterdir())
    result = subprocess.run(
        words("scripts/predict", *images[:2], "--ckpt_path", best, "--out", seen, "--format", "json",
              "--score_threshold", 0.05),
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    entries = json.loads(result.stdout)
    assert [entry["path"] for entry in entries] == [str(path) for path in images[:2]]
    for entry, path in zip(entries, images):
        assert Image.open(seen / f"{path.stem}.png").width >= 48
        assert all(0 <= side <= 48 for each in entry["objects"] for side in each["box"])
