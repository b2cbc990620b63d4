"""`mindska check_data --task segmentation`: all masks are walked, and what would end a run is found."""

from __future__ import annotations

import json

import numpy as np
import pytest
from commands import script
from PIL import Image
from test_segmentation_data import NUMBERS, write_folders, write_pair

from mindska.segmentation.check import check_masks, look_through, open_for_check, write_sheet
from mindska.segmentation.datasets import open_segmentation_dataset, open_training_and_validation


def checked(root, **options):
    sets, faults = open_for_check("", root, **options)
    return check_masks(sets, faults=faults, num_workers=2)


def run(capsys, *words):
    with pytest.raises(SystemExit) as exit_:
        script("check_data").main([str(word) for word in ("--task", "segmentation", *words)])
    return exit_.value.code, " ".join(capsys.readouterr().out.split())


def test_sound_data_can_be_trained_on(tmp_path, capsys):
    root = write_folders(tmp_path / "data")
    status, out = run(capsys, "--data_dir", root, "--json", tmp_path / "a.json", "--contact_sheet", tmp_path / "a.png")
    assert status == 0 and "Training can begin" in out and "train: 3 images with masks of 4 classes" in out
    assert "ignored: 12.50 % of the pixels" in out and "a.png: 6 pictures" in out and "tree 28.57 % in 3 images" in out
    facts = json.loads((tmp_path / "a.json").read_text())["splits"]["train"]
    assert facts["pixels"] == dict(sky=3, tree=6, car=6, road=6) and facts["ignored_pixels"] == 3
    assert facts["numbers"] == {"0": 3, "1": 6, "2": 6, "3": 6, "255": 3}
    assert facts["classes"] == dict.fromkeys(["sky", "tree", "car", "road"], 3)
    status, out = run(capsys, "--data_dir", root, "--val_ratio", 0.4)
    assert status == 0
    out = " ".join(str(checked(root, reduce_zero_label=True)).split())
    assert "Training can begin" in out and "ignored: 25.00 % of the pixels" in out
    assert "1 classes have no pixel, they cannot be learnt: 'road'" in out


@pytest.mark.fault("mask-numbers")
def test_every_fault_of_every_mask_is_found(tmp_path, capsys):
    root = write_folders(tmp_path / "data", train=12)
    masks, images = root / "masks" / "train", root / "images" / "train"
    (masks / "1.png").unlink()
    Image.fromarray(NUMBERS[:, :3]).save(masks / "2.png")
    Image.fromarray(NUMBERS + np.uint8(2)).save(masks / "3.png")
    Image.fromarray(NUMBERS).convert("RGB").save(masks / "4.png")
    Image.fromarray(NUMBERS).save(masks / "5.png", format="JPEG")
    Image.fromarray(np.full_like(NUMBERS, 255)).save(masks / "6.png")
    images.joinpath("7.png").write_bytes(b"no image")
    masks.joinpath("8.png").write_bytes(b"no image")
    (root / "images" / "val" / "0.png").write_bytes((images / "9.png").read_bytes())
    status, out = run(capsys, "--data_dir", root, "--json", tmp_path / "a.json")
    assert status == 1 and "Training would fail" in out
    report = json.loads((tmp_path / "a.json").read_text())
    missing, unreadable, faulty = report["faults"]
    assert "1 of 12 images in" in missing and missing.endswith("images/train/1.png")
    assert (
        "2 of 11 images cannot be read" in unreadable and "7.png cannot" in unreadable and "8.png cannot" in unreadable
    )
    assert "4 of 11 masks are not as they should be" in faulty
    for said in ("2.png 3x2; expected the same size", "3.png holds 4 in 2 pixels, 5 in 2 pixels; expected 0 to 3",
                 "4.png is a mask with 3 channels", "5.png is a mask in JPEG"):  # fmt: skip
        assert said in faulty, said
    warnings = " | ".join(report["warnings"])
    assert "train: 1 images have no labelled pixel" in warnings and "6.png" in warnings
    assert "1 of 2 validation images are training images as well" in warnings
    assert report["splits"]["train"]["faulty_masks"] == 4
    # The share of files that a run may bear.
    sets, _ = open_for_check("", root)
    assert not any("cannot be read" in fault for fault in check_masks(sets, max_damaged=0.5).faults)


def test_a_set_that_cannot_be_opened_is_a_fault_and_the_other_is_looked_at(tmp_path):
    root = write_folders(tmp_path / "data")
    for path in (root / "masks" / "val").iterdir():
        path.unlink()
    report = checked(root)
    assert "2 of 2 images in" in report.faults[0] and "train" in report.facts["splits"]
    (root / "classes.txt").unlink()
    report = checked(root)
    assert "No classes.txt" in report.faults[0] and not report.facts["splits"]
    assert "Training would fail." in str(report)


def test_lists_with_missing_files_are_looked_at_without_them(tmp_path):
    for i in range(3):
        write_pair(tmp_path, f"JPEGImages/{i}.jpg", f"SegmentationClass/{i}.png")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n1\n9\n")
    (lists / "val.txt").write_text("2\n")
    report = checked(tmp_path)
    assert len(report.faults) == 1 and "line 3: no image 9" in report.faults[0]
    assert report.facts["splits"]["train"]["images"] == 2 and report.facts["splits"]["val"]["images"] == 1


def test_two_classes_in_black_and_white_and_nothing_to_learn(tmp_path):
    root = write_folders(tmp_path, names="background\ncrack")
    for path in root.glob("masks/*/*.png"):
        Image.fromarray(np.uint8(NUMBERS == 1) * np.uint8(255)).save(path)
    report = checked(root)
    assert any("hold 0 and 255 only, and there are two classes" in fault for fault in report.faults)
    assert any("all labelled pixels are of one class (background)" in fault for fault in report.faults)
    for path in root.glob("masks/*/*.png"):
        Image.fromarray(np.full_like(NUMBERS, 255)).save(path)
    assert any("no mask has a pixel of a class" in fault for fault in checked(root).faults)


def test_classes_that_are_rare_or_everywhere_are_warned_of(tmp_path):
    root = write_folders(tmp_path)
    for i, path in enumerate(sorted(root.glob("masks/train/*.png"))):
        numbers = np.zeros((40, 40), np.uint8)
        numbers[0, : 1 + i] = 1
        Image.fromarray(numbers).save(path)
        Image.new("RGB", (40, 40), (i, 0, 0)).save(root / "images" / "train" / path.name)
    (root / "masks" / "train" / "0.png").write_bytes((root / "masks" / "train" / "1.png").read_bytes())
    warnings = " | ".join(checked(root, validation=False).warnings)
    assert "sky has 99.9 % of the labelled pixels: look at the IoU of the other classes" in warnings
    assert "2 classes have no pixel, they cannot be learnt: 'car', 'road'" in warnings
    batch = check_masks(open_for_check("", root)[0], global_batch=64)
    assert any("3 images are fewer than one batch of 64" in fault for fault in batch.faults)


def test_counts_do_not_depend_on_the_number_of_workers(tmp_path):
    dataset = open_segmentation_dataset("", write_folders(tmp_path, train=150), "train")
    one, several = look_through(dataset, 1), look_through(dataset, 5)
    assert one == several and one.numbers[255] == 150


def test_a_sheet_shows_images_and_masks(tmp_path):
    train, _ = open_training_and_validation("", write_folders(tmp_path, train=30))
    assert write_sheet(tmp_path / "sheet.png", train) == 24
