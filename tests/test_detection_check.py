"""A data set in COCO's format, looked through; and detections drawn on their image."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from coco_data import SQUARE, annotation, content, write
from PIL import Image

from mindska.detection.check import check_objects, open_sets, truth_as_detections, write_sheet
from mindska.detection.coco import CocoDataset
from mindska.detection.pictures import check_picture_name, class_colour, draw_detections, write_picture
from mindska.detection.postprocess import Detections, no_detections
from mindska.errors import SettingError, WriteError


def layout(folder: Path, **splits: dict) -> Path:
    """COCO's layout, with other pixels in every image."""
    for split, data in splits.items():
        images = folder / f"{split}2017"
        images.mkdir(parents=True)
        (folder / "annotations").mkdir(exist_ok=True)
        for i, image in enumerate(data["images"]):
            colour = (i, len(split) * 9, 70)
            Image.new("RGB", (image["width"], image["height"]), colour).save(images / image["file_name"])
        write(images, data).rename(folder / "annotations" / f"instances_{split}2017.json")
    return folder


def both(folder: Path, **options):
    return open_sets(str(folder), dict(train="train", val="val"), **options)


def test_a_sound_data_set(tmp_path):
    data = content([annotation(i, 1 + i % 2, 1 + i % 2, (i, 10, 20 + i, 30), segmentation=SQUARE) for i in range(30)])
    sets, faults = both(layout(tmp_path, train=data, val=data), masks=True)
    report = check_objects(sets, faults=faults)
    assert not report.faults and "Training can begin." in str(report)
    assert "train: 30 objects (15 small, 15 medium, 0 large; 0 crowds); at most 15 in an image" in str(report)
    assert "objects of a class: 15" in str(report)
    figures = report.to_json()["splits"]["val"]
    assert figures["classes"] == {"cat": 15, "dog": 15} and figures["images_without_objects"] == 0
    json.dumps(report.to_json())


def test_what_is_strange_is_said(tmp_path):
    boxes = [annotation(i, 1, 1, (5, 5, 3, 30)) for i in range(120)] + [annotation(900, 2, 2, (0, 0, 0, 0))]
    train = content(boxes, 4, ((1, "cat"), (2, "dog"), (3, "horse")))
    sets, faults = both(layout(tmp_path, train=train, val=content([], 2)))
    for name in ("3.png", "4.png"):
        (tmp_path / "train2017" / name).write_bytes((tmp_path / "train2017" / "2.png").read_bytes())
    Image.new("CMYK", (100, 80)).save(tmp_path / "val2017" / "1.png", format="TIFF")
    (tmp_path / "val2017" / "2.png").write_bytes((tmp_path / "train2017" / "1.png").read_bytes())
    text = str(check_objects(sets, faults=faults))
    for said in (
        "train: 1 boxes without area are left out (annotations 900); an image without objects needs no annotation",
        "train: 2 classes have no object: 'dog', 'horse'",
        "train: 3 images have no object: they are left out in training",
        "val: no image has an object: all figures will be n/a",
        "train: 1 images have more than 100 objects, up to 120",
        "train: 120 of 120 boxes have a side of fewer than 4 pixels",
        "train: 120 of 120 boxes have one size: are they placeholders?",
        "train: 1 objects are there more than once",
        "train: 1 images are there more than once: 2.png = 3.png = 4.png",
        "1 images are in training and in validation: 2.png = 1.png",
        "val: 1 images are neither RGB nor grey of 8 bits and will be converted: 1 CMYK",
        "Training can begin.",
    ):  # fmt: skip
        assert f"warning: {said}" in text or said in text, said


def test_what_would_end_a_run_is_a_fault(tmp_path):
    data = content(
        [annotation(1, segmentation=dict(size=[80, 100], counts=[5, 5])), annotation(2, 2, 2, segmentation=SQUARE)]
    )
    layout(tmp_path, train=data, val=data)
    sets, faults = both(tmp_path, masks=True)
    (tmp_path / "train2017" / "1.png").write_bytes(b"no image")
    Image.new("RGB", (9, 9)).save(tmp_path / "val2017" / "2.png")
    report = check_objects(sets, faults=faults)
    assert re.search(r"train: 1 of 2 images cannot be used: .*1.png cannot be read", "\n".join(report.faults))
    assert re.search(r"val: 1 of 2 .*2.png: the annotations say 100x80 pixels", "\n".join(report.faults))
    assert re.search(
        r"train: 1 masks cannot be read: .*annotation 1: its run lengths are 10 pixels", "\n".join(report.faults)
    )
    assert "Training would fail." in str(report)
    allowed = check_objects({"train": sets["train"]}, max_damaged=0.5)
    assert not any("cannot be used" in fault for fault in allowed.faults)
    # A part that cannot be opened is a fault, and the other is looked through all the same.
    (tmp_path / "val2017" / "1.png").unlink()
    (tmp_path / "train2017" / "1.png").unlink()
    sets, faults = both(tmp_path)
    assert not sets and [fault.split(":")[0] for fault in faults] == ["train", "val"]
    sets, faults = both(tmp_path, skip_missing=True)
    assert "train" in sets
    report = check_objects({}, faults=faults)
    assert str(report).endswith("Training would fail.")
    nothing, faults = open_sets(str(tmp_path), dict(train="", val="nowhere.json"))
    assert not nothing and "There is no annotation file" in faults[0]


def test_validation_has_training_s_classes(tmp_path):
    val = content(categories=((1, "cat"), (2, "mouse")))
    sets, faults = both(layout(tmp_path, train=content(), val=val))
    assert list(sets) == ["train"] and "'mouse' here and 'dog' there" in faults[0]


@pytest.mark.slow
def test_the_command(tmp_path):
    data = content([annotation(i, 1 + i % 2, 1 + i % 2, (i, 10, 20 + i, 30), segmentation=SQUARE) for i in range(24)])
    layout(tmp_path / "data", train=data, val=data)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [
            sys.executable,
            "-m",
            "mindska",
            "check_data",
            "--task",
            "detection",
            "--data_dir",
            tmp_path / "data",
        ]
        return subprocess.run([*map(str, command), *arguments], capture_output=True, text=True, env=dict(os.environ))

    sheet, figures = tmp_path / "sheet.png", tmp_path / "report.json"
    done = run("--masks", "--json", str(figures), "--contact_sheet", str(sheet))
    assert done.returncode == 0, done.stderr
    assert "train: 24 objects" in done.stdout and "Training can begin." in done.stdout and "2 pictures" in done.stdout
    assert json.loads(figures.read_text())["splits"]["val"]["objects"] == 24 and Image.open(sheet).size[0] > 100
    (tmp_path / "data" / "val2017" / "2.png").unlink()
    done = run("--val_split", "annotations/instances_val2017.json", "--val_images", "val2017")
    assert done.returncode == 1 and "FAULT: val: 1 of the 2 images" in done.stdout and "Traceback" not in done.stderr
    done = run("--train_split", "nowhere.json")
    assert done.returncode == 1 and "There is no annotation file" in done.stdout


# ------------------------------------------------------------------------------------------- pictures


def found(count: int = 3, size: tuple[int, int] = (96, 128), masks: bool = True) -> Detections:
    rng = np.random.default_rng(0)
    corners = rng.random((count, 2)) * [size[1] / 2, size[0] / 2]
    boxes = np.concatenate([corners, corners + [size[1] / 3, size[0] / 3]], 1).astype(np.float32)
    shapes = np.zeros((count, *size), bool)
    for shape, (x1, y1, x2, y2) in zip(shapes, boxes.astype(int)):
        shape[y1 + 3 : y2 - 3, x1 + 3 : x2 - 3] = True
    scores = np.linspace(0.95, 0.2, count).astype(np.float32)
    return Detections(boxes, scores, np.arange(count, dtype=np.int32), shapes if masks else None)


@pytest.mark.parametrize(
    "size, expected", [((96, 128), (640, 480)), ((480, 640), (640, 480)), ((1500, 2000), (2000, 1500))]
)
def test_what_was_found_is_seen(size, expected):
    image = np.full((*size, 3), 128, np.uint8)
    picture = draw_detections(image, found(3, size), ["cat", "dog", "horse"])
    assert picture.size == expected and (image == 128).all()
    pixels, times = np.asarray(picture), expected[0] / size[1]
    x1, y1, x2, y2 = (found(3, size).boxes[0] * times).astype(int)
    line = max(2, round((expected[0] * expected[1]) ** 0.5 / 350))
    for label in (0, 1):  # the third is below the threshold
        assert (pixels == class_colour(label)).all(2).sum() > 100
    assert not (pixels == class_colour(2)).all(2).any()
    assert (pixels[(y1 + y2) // 2, x1 : x1 + line] == class_colour(0)).all()  # the frame of the best is on top
    inside = pixels[(y1 + y2) // 2 + 20, (x1 + x2) // 2]
    assert (inside != 128).any() and (inside != class_colour(0)).any()  # the mask can be seen through
    plain = np.asarray(draw_detections(image, no_detections(size), []))
    assert (plain == 128).all()


def test_names_and_scores(monkeypatch):
    from mindska.detection import pictures

    written = []
    original = pictures._tag
    monkeypatch.setattr(pictures, "_tag", lambda draw, text, *rest: written.append(text) or original(draw, text, *rest))
    names = ["a\x1b[31mb", "名前" * 30]
    draw_detections(np.zeros((50, 60, 3), np.uint8), found(3, (50, 60), masks=False), names, score_threshold=0)
    assert written[0] == "a\\x1b[31mb 95%" and len(written[1]) < 50 and written[2] == "2 20%"
    draw_detections(np.zeros((50, 60, 3), np.uint8), found(1, (50, 60)), names, show_scores=False)
    assert written[-1] == "a\\x1b[31mb"


def test_boxes_at_and_beyond_the_border_are_drawn():
    boxes = np.float32(
        [[-20, -20, 30, 30], [50, 40, 500, 400], [0, 0, 64, 48], [63, 47, 64, 48], [70, 60, 90, 80], [5, 5, 5, 5]]
    )
    many = Detections(boxes, np.full(6, 0.9, np.float32), np.arange(6, dtype=np.int32))
    assert draw_detections(Image.new("L", (64, 48)), many, []).size == (640, 480)
    assert draw_detections(Image.new("RGB", (1, 1)), no_detections(), []).size == (640, 640)
    crowd = Detections(np.tile(boxes[2], (60, 1)), np.full(60, 0.9, np.float32), np.zeros(60, np.int32))
    draw_detections(Image.new("RGB", (64, 48)), crowd, ["many"])


def test_masks_of_another_size_are_refused():
    with pytest.raises(SettingError, match=r"masks have 128x96 pixels .* image has 10x20"):
        draw_detections(Image.new("RGB", (10, 20)), found(), [])


def test_a_picture_is_written_whole(tmp_path):
    picture = Image.new("RGB", (10, 10))
    for name in ("a.png", "a.JPG", "a.webp"):
        write_picture(tmp_path / name, picture)
        assert Image.open(tmp_path / name).size == (10, 10)
    with pytest.raises(SettingError, match=r"ends with one of .png"):
        check_picture_name(tmp_path / "a.txt")
    with pytest.raises(WriteError):
        write_picture(tmp_path / "nowhere" / "a.png", picture)


def test_the_truth_is_drawn(tmp_path):
    data = content([annotation(1, segmentation=SQUARE), annotation(2, 2, 2, segmentation=SQUARE)], 3)
    dataset = CocoDataset(write(tmp_path, data), tmp_path, masks=True)
    truth = truth_as_detections(dataset, 0)
    assert truth.masks.sum() == 600 and truth.boxes.tolist() == [[10, 10, 30, 40]]
    assert len(truth_as_detections(dataset, 2)) == 0
    assert write_sheet(tmp_path / "sheet.png", dataset) == 2  # images with objects
    Path(dataset.paths[0]).write_bytes(b"no image")
    assert write_sheet(tmp_path / "sheet.png", dataset) == 2
