"""mIoU and its relatives: MMSegmentation's figures, of the whole set, whatever its order, batches and ranks."""

from __future__ import annotations

import csv
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
from dense_inputs import label_map
from fill import image

from mindska.errors import SettingError
from mindska.segmentation.masks import to_labels
from mindska.segmentation.metrics import ConfusionMatrix, class_rows, class_table, summary, write_class_csv

GOLDENS = Path(__file__).parent / "parity" / "goldens_dense"


def golden_maps(golden):
    """(prediction, label) of each image, as the goldens' README says."""
    classes, reduced = golden["classes"], golden["reduce_zero_label"]
    for seed, (h, w), crc in zip(golden["seeds"], golden["shapes"], golden["crc32_raw_label_and_prediction_int32"]):
        raw = label_map(seed, (1, h, w), classes - 2 + reduced)[0]
        label = to_labels(raw, classes, reduced, "golden") if reduced else raw
        other = label_map(seed + 900, (1, h, w), classes - 1, fraction=0.0, block=5)[0]
        prediction = np.where(image(seed + 5000, (h, w)) > -0.5, np.where(label == 255, 0, label), other)
        assert [zlib.crc32(np.int32(each).tobytes()) for each in (raw, prediction)] == crc
        yield prediction, label


@pytest.mark.parametrize("case", ["miou_21", "miou_150_reduced"])
def test_the_figures_are_mmsegmentations(case):
    golden = json.loads((GOLDENS / f"{case}.json").read_text())
    confusion = ConfusionMatrix(golden["classes"])
    for maps in golden_maps(golden):
        confusion.update(*maps)
    figures = confusion.figures()
    for name in ("mIoU", "mAcc", "aAcc", "mDice"):
        assert figures[name] == pytest.approx(golden[name], abs=1e-7)
    for name in ("IoU", "Acc", "Dice"):
        ours, theirs = figures["per_class"][name], golden["per_class"][name]
        assert [value is None for value in ours] == [value is None for value in theirs]
        np.testing.assert_allclose(*(np.array(v, np.float64) for v in (ours, theirs)), rtol=0, atol=1e-7)
    areas = golden["areas"]
    assert figures["per_class"]["right_pixels"] == areas["intersect"]
    assert figures["per_class"]["label_pixels"] == areas["label"]
    assert figures["per_class"]["predicted_pixels"] == areas["prediction"]
    assert figures["images"] == len(golden["seeds"]) and figures["classes_averaged"] == golden["classes"] - 1


def maps(seed, count=21, classes=5):
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(0, classes, shape), np.where(rng.random(shape) < 0.2, 255, rng.integers(0, classes, shape)))
        for shape in rng.integers(3, 30, (count, 2)).tolist()
    ]


def counted(pairs, classes=5):
    confusion = ConfusionMatrix(classes)
    for prediction, label in pairs:
        confusion.update(prediction, label)
    return confusion


@pytest.mark.fault("whole-set")
def test_the_mean_is_of_the_summed_matrix_whatever_order_batches_and_ranks():
    pairs = maps(0)
    whole = counted(pairs)
    assert whole.images == 21
    assert counted(pairs[::-1]).figures() == whole.figures()
    same = [(p[:3, :3], label[:3, :3]) for p, label in pairs]
    batched = ConfusionMatrix(5)
    for first in range(0, 21, 4):
        batched.update(*(np.stack(each) for each in zip(*same[first : first + 4])))
    assert batched.figures() == counted(same).figures() and batched.images == 21
    ranks = [counted(pairs[rank::2]) for rank in range(2)]  # 11 and 10 images
    ranks[0].add(ranks[1])
    assert ranks[0].figures() == whole.figures() and ranks[0].images == 21
    by_image = np.mean([counted([pair]).figures()["mIoU"] for pair in pairs])
    assert abs(by_image - whole.figures()["mIoU"]) > 1e-3  # a mean over images is another number


@pytest.mark.fault("whole-set")
def test_a_class_that_is_nowhere_is_left_out_and_one_that_is_only_predicted_is_0():
    label = np.array([[0, 0, 1, 1]])
    prediction = np.array([[0, 0, 1, 2]])
    figures = counted([(prediction, label)]).figures()
    assert figures["per_class"]["IoU"] == [1.0, 0.5, 0.0, None, None]
    assert figures["per_class"]["Acc"] == [1.0, 0.5, None, None, None]
    assert figures["per_class"]["Dice"][2:] == [0.0, None, None]
    assert (figures["mIoU"], figures["mAcc"], figures["aAcc"]) == (0.5, 0.75, 0.75)
    assert figures["classes_averaged"] == 3
    assert "mean over 3 of 5 classes; 2 in no truth and no prediction: left out" in summary(figures)
    json.dumps(figures, allow_nan=False)


@pytest.mark.fault("whole-set")
def test_ignored_pixels_count_nowhere():
    pairs = maps(1)
    whole = counted(pairs)
    for value in (0, 4, 77, -1):  # not even as a number out of range
        changed = [(np.where(label == 255, value, prediction), label) for prediction, label in pairs]
        assert counted(changed).figures() == whole.figures()
    assert whole.ignored == sum(int((label == 255).sum()) for _, label in pairs)
    nothing = counted([(np.zeros((2, 2), int), np.full((2, 2), 255))]).figures()
    assert nothing["mIoU"] is None and nothing["aAcc"] is None and nothing["classes_averaged"] == 0
    assert "mIoU n/a" in summary(nothing) and "0 of 5 classes" in summary(nothing)


def test_what_cannot_be_counted_is_refused():
    confusion = ConfusionMatrix(3)
    with pytest.raises(SettingError, match=r"shape \(2, 2\) and labels of \(2, 3\).*never the label map"):
        confusion.update(np.zeros((2, 2), int), np.zeros((2, 3), int))
    with pytest.raises(SettingError, match="labels from 0 to 3; expected 0 to 2, or 255"):
        confusion.update(np.zeros((1, 2), int), np.array([[0, 3]]))
    with pytest.raises(SettingError, match="a prediction from 0 to 3; expected 0 to 2"):
        confusion.update(np.array([[0, 3]]), np.zeros((1, 2), int))
    with pytest.raises(SettingError, match="0 classes"):
        ConfusionMatrix(0)
    assert confusion.matrix.sum() == 0 and confusion.images == 0


def test_label_maps_of_8_bits_do_not_overflow():
    label = np.full((300, 300), 200, np.uint8)
    confusion = ConfusionMatrix(250)
    confusion.update(label, label)
    assert confusion.matrix[200, 200] == 90_000


def test_rows_csv_and_table(tmp_path):
    figures = counted([(np.array([[0, 0, 1, 2]]), np.array([[0, 0, 1, 1]]))], 4).figures()
    names = ["=cmd", "a very long name of a class, which goes on", "b\x1b[31m", "c"]
    assert class_rows(figures, names)[0] == ("=cmd", 1.0, 1.0, 1.0, 2, 2, 2)
    write_class_csv(tmp_path / "classes.csv", figures, names)
    with (tmp_path / "classes.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:4] == ["class", "IoU", "Acc", "Dice"]
    assert rows[0][0] == "'=cmd" and rows[3][1:4] == ["", "", ""] and float(rows[1][1]) == 0.5
    table = class_table(figures, names)
    lines = table.splitlines()
    assert len(lines) == 6 and len({len(line) for line in lines[:5]}) == 1
    assert lines[1].split() == ["=cmd", "100.00", "100.00", "100.00", "50.00"]
    assert lines[4].split() == ["c", "n/a", "n/a", "n/a", "0.00"]
    assert "\x1b" not in table and lines[-1].startswith("mIoU 50.00 %, mAcc 75.00 %, aAcc 75.00 %")
    assert not math.isnan(figures["mDice"])
