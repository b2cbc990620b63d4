"""Label maps as pictures that other programs read and people understand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dense_inputs import label_map as blocks
from dense_inputs import picture
from PIL import Image

from mindska.errors import SettingError
from mindska.segmentation.masks import read_mask
from mindska.segmentation.pictures import (
    most_classes,
    overlay,
    palette,
    palette_image,
    write_label_map,
    write_overlay_sheet,
)

NAMES = ["background", "cat", "dog", "b\x1b[31md", "樹", "a class with a very long name that goes on and on and on"]


def test_the_palette_is_pascal_vocs():
    colours = palette().tolist()
    assert colours[:9] == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128], [0, 128, 128], [128, 128, 128],
        [64, 0, 0],
    ]  # fmt: skip
    assert colours[20] == [0, 64, 128] and colours[255] == [224, 224, 192]
    assert len(set(map(tuple, colours))) == 256


@pytest.mark.fault("mask-files")
def test_a_label_map_is_read_back_as_its_numbers(tmp_path):
    labels = np.arange(256).reshape(8, 32)
    write_label_map(tmp_path / "a.png", labels)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), labels)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), palette()[labels])
    for name in ("a.jpg", "a.jpeg", "a"):
        with pytest.raises(SettingError, match="A label map is a PNG file, which keeps its numbers"):
            write_label_map(tmp_path / name, labels)
    for wrong in (np.full((2, 2), 256), np.full((2, 2), -1), np.zeros((1, 2, 2), int)):
        with pytest.raises(SettingError, match="expected .height, width., numbers from 0 to 255"):
            palette_image(wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("side", [1, 16, 128, 2000])
def test_an_overlay_has_a_legend_that_fits(side):
    image = Image.fromarray(picture(1, side, side))
    labels = blocks(2, (1, side, side), 6, block=max(1, side // 4))[0]
    shown = overlay(image, labels, NAMES, title="prediction")
    scale = max(1, -(-192 // side)) if side < 192 else 1
    assert shown.width >= side * scale + 150 and shown.height >= side * scale
    legend = np.asarray(shown)[:600, side * scale :]
    for number in np.unique(labels):  # a field of each colour; background's is white
        if number:
            assert (legend == palette()[number]).all(-1).sum() >= 100
    assert ((legend < 60).all(-1)).any()  # letters
    assert (legend[:, -2:] == 255).all()  # nothing is cut off


def test_an_overlay_shows_the_image_and_the_classes():
    image = Image.fromarray(picture(1, 64, 64))
    labels = np.zeros((64, 64), np.int32)
    labels[20:40, 20:40] = 1
    labels[50:, 50:] = 255
    plain = np.asarray(overlay(image, labels, NAMES, legend=False)).astype(int)
    assert plain.shape == (64, 64, 3)
    np.testing.assert_array_equal(plain[:10], np.asarray(image)[:10])  # background as it is
    inside = plain[22:38, 22:38].reshape(-1, 3)
    assert (inside[:, 0] >= 76).all() and (inside[:, 1] == inside[:, 2]).all()  # red over grey
    assert (plain[39, 22:38] > 190).any(-1).all()  # the border is light
    coloured = np.asarray(overlay(image, labels)).astype(int)  # without names the first class has its colour, too
    assert (coloured[:10] != np.asarray(image)[:10]).any()
    assert overlay(image.convert("L"), labels).mode == "RGB"
    with pytest.raises(SettingError, match="an image of 64x64 pixels and a label map of shape"):
        overlay(image, labels[:, :32])


def test_a_legend_of_many_classes_counts_the_rest():
    image = Image.fromarray(picture(1, 200, 300))
    labels = blocks(3, (1, 200, 300), 150)[0]
    few = overlay(image, np.zeros((200, 300), int), ["wall"])
    assert overlay(image, labels, [f"class {i}" for i in range(150)]).height == few.height == 200
    assert most_classes(np.array([[7, 7, 7, 255, 255, 1]]), NAMES) == "7, ignored, cat"


def test_a_sheet_of_several(tmp_path):
    rows = [
        (f"{i}.jpg", Image.fromarray(picture(i, 96, 128)), dict.fromkeys(("truth", "prediction"), labels))
        for i, labels in enumerate(blocks(5, (3, 96, 128), 6))
    ]
    assert write_overlay_sheet(Path(tmp_path / "sheet.png"), rows, NAMES, "validation") == 9
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 3 * 168 + 8
    with pytest.raises(SettingError, match="should end with .png"):
        write_overlay_sheet(tmp_path / "sheet.jpg", rows, NAMES)
