"""Scenes of digits: deterministic, train and validation scans kept apart, both layouts saying the same."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json

import numpy as np
import pytest
from commands import script
from PIL import Image
from pycocotools.coco import COCO
from sklearn.datasets import load_digits

from mindska.data.digit_scenes import CLASS_NAMES, DigitScenes, run_lengths, split_scans
from mindska.errors import SettingError
from mindska.segmentation.datasets import open_training_and_validation

# Of six scenes' pixels and labels: what they look like may not change without a word.
DIGEST = "e986952dce2d597f83e7491cd502dddb"


@pytest.fixture(scope="module")
def scans():
    digits = load_digits()
    return split_scans(digits.images, digits.target)


def prepare(*words):
    """Runs the command; (exit status, what it printed)."""
    said, status = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            script("prepare_digit_scenes").main([str(word) for word in words])
        except SystemExit as error:
            status = error.code
    return status, said.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "digits"
    status, said = prepare(out, "--train", 12, "--val", 5)
    assert not status and "12 training and 5 validation scenes of 128x128 pixels with" in said
    return out


def test_scenes_are_the_same_everywhere(scans):
    digest = hashlib.sha256()
    for split, count in (("train", 4), ("val", 2)):
        scenes = DigitScenes(scans[split], split=split)
        for index in reversed(range(count)):  # in any order
            scene = scenes.scene(index)
            digest.update(scene.image.tobytes() + scene.labels.tobytes())
    assert digest.hexdigest()[:32] == DIGEST


def test_training_and_validation_scans_are_kept_apart(scans):
    assert [len(scans[split]) for split in ("train", "val")] == [1442, 355]
    contents = [{scan.tobytes() for _, scan in scans[split]} for split in ("train", "val")]
    assert len(contents[0] | contents[1]) > 1700  # scans differ; a few are equal by chance, if any
    first, other = (DigitScenes(scans["train"], seed=seed).scene(0).image for seed in (0, 1))
    assert (first != other).any()
    same = [DigitScenes(scans["train"], split=split).scene(0).image for split in ("train", "val")]
    assert (same[0] != same[1]).any()


def test_digits_stay_in_sight_and_their_boxes_fit(scans):
    scenes = DigitScenes(scans["train"], size=(96, 160), digits=(3, 8))
    seen = set()
    for index in range(15):
        scene = scenes.scene(index)
        assert scene.image.shape == (96, 160, 3) and scene.image.dtype == np.uint8
        total = np.zeros((96, 160), int)
        for digit in scene.digits:
            seen.add(digit.number)
            total += digit.mask
            x, y, width, height = digit.box
            assert digit.mask[y : y + height, x : x + width].sum() == digit.mask.sum() > 20
            inside = digit.mask[y : y + height, x : x + width]
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            assert (scene.labels[digit.mask] == digit.number + 1).all()
        assert total.max() <= 1 and ((total > 0) == (scene.labels > 0)).all()
    assert seen == set(range(10))


def test_run_lengths_are_cocos():
    rng = np.random.default_rng(0)
    coco = COCO()
    for mask in [rng.random((7, 5)) < 0.5 for _ in range(20)] + [np.zeros((3, 4), bool), np.ones((3, 4), bool)]:
        coco.imgs = {1: dict(id=1, height=mask.shape[0], width=mask.shape[1])}
        decoded = coco.annToMask(dict(image_id=1, segmentation=run_lengths(mask)))
        np.testing.assert_array_equal(decoded, mask)


def test_the_folder_has_both_layouts_and_they_agree(folder):
    train, val = open_training_and_validation("", folder)
    for dataset in (train, val):
        dataset.check()
        assert dataset.class_names == list(CLASS_NAMES)
    for dataset, split in ((train, "train"), (val, "val")):
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(folder / "annotations" / f"instances_{split}2017.json")
        assert [coco.cats[i]["name"] for i in coco.getCatIds()] == list("0123456789")
        assert len(coco.imgs) == len(dataset)
        names = [dataset.member(i)[0].rpartition("/")[2] for i in range(len(dataset))]
        for number, image in coco.imgs.items():
            picture, mask = dataset.load(names.index(image["file_name"]))
            with Image.open(folder / f"{split}2017" / image["file_name"]) as same:
                np.testing.assert_array_equal(np.asarray(same), picture)
            union = np.zeros_like(mask)
            for annotation in coco.loadAnns(coco.getAnnIds(imgIds=[number])):
                seen = coco.annToMask(annotation).astype(bool)
                assert seen.sum() == annotation["area"] and (mask[seen] == annotation["category_id"]).all()
                rows, columns = (np.flatnonzero(seen.any(axis)) for axis in (1, 0))
                box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
                assert annotation["bbox"] == box and annotation["iscrowd"] == 0
                union[seen] = annotation["category_id"]
            np.testing.assert_array_equal(union, mask)
    text = json.loads((folder / "annotations" / "instances_train2017.json").read_text(encoding="utf-8"))
    assert len({each["id"] for each in text["annotations"]}) == len(text["annotations"])


def test_the_command_tells_mistakes_and_loses_nothing(folder, tmp_path):
    for words, said in (
        ((folder,), "exists already; remove it, or name another folder"),
        ((tmp_path / "a", "--train", 0), "--train is 0; expected 1 to 1,000,000 scenes"),
        ((tmp_path / "a", "--image_size", 8, 8), "scenes of 8x8 pixels; expected 32 to 4096"),
        ((tmp_path / "a", "--digits", 5, 2), "5 to 2 digits in a scene"),
        ((tmp_path / "a", "--seed", -1), "--seed is -1"),
        ((folder / "classes.txt" / "b",), "cannot be written: Not a directory"),
    ):
        status, printed = prepare(*words)
        assert status == 2 and said in " ".join(printed.split()), printed
    assert not list(tmp_path.iterdir())
    for wrong in (dict(size=(31, 64)), dict(digits=(0, 1)), dict(digits=(1, 101))):
        with pytest.raises(SettingError):
            DigitScenes([], **wrong)
