"""Pixels of segmentation and detection: the authors' toolboxes' (OpenMMLab, cvnets), to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from dense_inputs import picture
from PIL import Image

from mindska.data import dense
from mindska.errors import SettingError

GOLDEN = json.loads((Path(__file__).parent / "goldens_dense" / "preprocessing.json").read_text())
CASES = GOLDEN["cases"]
UNIT = ((0.0,) * 3, (1.0,) * 3)
# CRC-32 of OpenCV 4.11's cvtColor: greens and blues with every fifth red; saturations and values with every fourth hue.
OPENCV_RGB_TO_HSV, OPENCV_HSV_TO_RGB = 3333252010, 2148565918


def crc(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


def check(array: np.ndarray, case: dict, name: str, digest: str) -> None:
    assert crc(array) == case[digest]
    np.testing.assert_array_equal(array.ravel()[case[f"{name}_idx"]], np.asarray(case[f"{name}_val"], array.dtype))


def test_mean_and_std_are_those_of_the_goldens():
    np.testing.assert_allclose(np.array(dense.IMAGENET_MEAN) * 255, GOLDEN["mean"], rtol=1e-15)
    np.testing.assert_allclose(np.array(dense.IMAGENET_STD) * 255, GOLDEN["std"], rtol=1e-15)
    table = np.arange(256, dtype=np.float32)[None] - np.array(GOLDEN["mean"], np.float32)[:, None]
    table = (table.astype(np.float64) * (1 / np.array(GOLDEN["std"]))[:, None]).astype(np.float32)
    image = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, 2)
    np.testing.assert_array_equal(dense.normalise(image, dense.IMAGENET_MEAN, dense.IMAGENET_STD)[:, 0], table)
    # Nor does another record of the same numbers, divided by 255, change a bit; in float32 they are other numbers.
    close = dense.normalise(image, np.float32(dense.IMAGENET_MEAN).tolist(), dense.IMAGENET_STD)[:, 0]
    np.testing.assert_allclose(close, table, rtol=1e-6, atol=1e-6)
    close = dense.normalise(image, [m / 255 for m in GOLDEN["mean"]], [s / 255 for s in GOLDEN["std"]])[:, 0]
    np.testing.assert_array_equal(close, table)
    np.testing.assert_array_equal(
        dense.normalise(image, *UNIT)[0, 0], np.arange(256, dtype=np.float32) / np.float32(255)
    )


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("det")])
def test_detection(name):
    case = CASES[name]
    image = picture(*case["picture"])
    assert crc(image) == case["picture_crc32"]
    size = dense.keep_ratio_size(image.shape[:2], case["scale"])
    assert list(size) == case["resized_hw"]
    resized = dense.resize_linear(image, size)
    if case["flip"]:
        resized = resized[:, ::-1]
    check(resized, case, "resized", "resized_crc32_hwc_uint8")
    normalised = dense.normalise(resized, dense.IMAGENET_MEAN, dense.IMAGENET_STD)
    padded = dense.pad(normalised, dense.multiple_size(size, case["divisor"]), 0)
    assert list(padded.shape[1:]) == case["padded_hw"]
    check(padded, case, "output", "output_crc32_chw_float32")
    scale = [new / old for new, old in zip(size[::-1], image.shape[1::-1])]
    assert scale == case["scale_factor_wh"]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("seg")])
def test_segmentation(name):
    case = CASES[name]
    seed, *shape = case["picture"]
    size = dense.keep_ratio_size(shape, case["scale"])
    assert list(size) == case["resized_hw"]
    resized = dense.resize_linear(picture(seed, *shape), size)
    assert crc(resized) == case["resized_crc32_hwc_uint8"]
    if "multiple_hw" in case:
        resized = dense.resize_linear(resized, dense.multiple_size(size, 32))
        assert list(resized.shape[:2]) == case["multiple_hw"] and crc(resized) == case["multiple_crc32_hwc_uint8"]
    np.testing.assert_array_equal(resized.ravel()[case["final_idx"]], case["final_val"])
    output = dense.normalise(resized, dense.IMAGENET_MEAN, dense.IMAGENET_STD)
    check(output, case, "output", "output_crc32_chw_float32")
    label = (picture(seed + 1, *shape)[:, :, 0] // 12).astype(np.uint8)
    for kind in (np.uint8, np.int32):
        nearest = dense.resize_nearest(label.astype(kind), size).astype(np.uint8)
        assert crc(nearest) == case["label_crc32"]
    assert np.bincount(nearest.ravel()).tolist() == case["label_histogram"]


@pytest.mark.parametrize("name", ["voc", "coco_ssd"])
def test_cvnets(name):
    case = CASES[name]
    resample = Image.Resampling[case["interpolation"].upper()]
    resized = np.asarray(dense.resize_pillow(Image.fromarray(picture(*case["picture"])), case["size"], resample))
    check(resized, case, "resized", "resized_crc32_hwc_uint8")
    assert crc(dense.normalise(resized, *UNIT)) == case["output_crc32_chw_float32"]


def test_colours_are_opencvs():
    cube = np.stack(np.meshgrid(np.arange(256), np.arange(256), indexing="ij"), -1)
    colours = np.concatenate([np.zeros((256, 256, 1), np.int64), cube], -1).astype(np.uint8)
    there = back = 0
    for red in range(0, 256, 5):
        colours[..., 0] = red
        there = zlib.crc32(dense.rgb_to_hsv(colours).tobytes(), there)
    for hue in range(0, 180, 4):
        colours[..., 0] = hue
        back = zlib.crc32(dense.hsv_to_rgb(colours).tobytes(), back)
    assert (there, back) == (OPENCV_RGB_TO_HSV, OPENCV_HSV_TO_RGB)


class Scripted:
    """A generator that says what it is told, and is told how it is asked."""

    def __init__(self, coins, uniform=None, whole=None):
        self.coins, self.numbers, self.whole, self.asked = list(coins), list(uniform or []), whole, []

    def random(self):
        return self.coins.pop(0)

    def uniform(self, low, high):
        self.asked.append((low, high))
        return self.numbers.pop(0)

    def integers(self, low, high):
        self.asked.append((low, high))
        return self.whole


def test_photometric_distortion_is_mmsegmentations():
    image = picture(3, 40, 50)
    yes, no = 0.0, 0.9
    # brightness?, contrast first?, contrast?, saturation?, hue?  (or, last: contrast?)
    assert dense.photometric_distortion(image, Scripted([no, yes, no, no, no])) is image
    rng = Scripted([yes, yes, no, no, no], [20.5])
    np.testing.assert_array_equal(
        dense.photometric_distortion(image, rng), np.clip(image.astype(np.float32) + 20.5, 0, 255).astype(np.uint8)
    )
    assert rng.asked == [(-32, 32)]
    first, last = (
        dense.photometric_distortion(image, Scripted(coins, [1.5, 0.3]))
        for coins in ([no, yes, yes, yes, no], [no, no, yes, no, yes])
    )
    assert (first != last).any()  # contrast and saturation do not commute
    hsv = dense.rgb_to_hsv(np.clip(image.astype(np.float32) * 1.5, 0, 255).astype(np.uint8))
    hsv[..., 1] = (hsv[..., 1] * np.float32(0.3)).astype(np.uint8)
    np.testing.assert_array_equal(first, dense.hsv_to_rgb(hsv))
    rng = Scripted([no, yes, no, no, yes], whole=-18)
    turned = dense.photometric_distortion(image, rng)
    hsv = dense.rgb_to_hsv(image)
    hsv[..., 0] = (hsv[..., 0].astype(int) - 18) % 180
    np.testing.assert_array_equal(turned, dense.hsv_to_rgb(hsv))
    assert rng.asked == [(-18, 18)]
    kept = image.copy()
    some = [dense.photometric_distortion(image, np.random.default_rng(seed)) for seed in range(20)]
    assert all(each.shape == image.shape and each.dtype == np.uint8 for each in some)
    np.testing.assert_array_equal(image, kept)
    assert len({crc(each) for each in some}) > 15


def test_sizes_and_padding():
    assert (
        dense.keep_ratio_size((427, 640), (1333, 800)) == dense.keep_ratio_size((427, 640), (800, 1333)) == (800, 1199)
    )
    assert dense.keep_ratio_size((1, 10_000), (2048, 512)) == (1, 2048)  # never a side of none
    assert dense.short_side_size((300, 400), 256, 1024) == (256, 341)
    assert dense.short_side_size((100, 1000), 256, 1024) == (102, 1024)
    assert dense.multiple_size((512, 769), 32) == (512, 800)
    padded = dense.pad(np.ones((3, 2, 3), np.float32), (4, 5), 7)
    assert (
        padded.shape == (3, 4, 5)
        and padded[:, :2, :3].min() == 1
        and padded[:, 2:].min() == padded[:, :, 3:].min() == 7
    )
    assert dense.pad(np.ones((2, 3), np.int32), (2, 4), 255).tolist() == [[1, 1, 1, 255]] * 2
    with pytest.raises(SettingError, match="4x5 pixels cannot be padded to 4x4"):
        dense.pad(np.ones((4, 5)), (4, 4), 0)
    with pytest.raises(SettingError, match="100000x100000"):
        dense.resize_linear(np.zeros((2, 2, 3), np.uint8), (100_000, 100_000))
    grey = np.zeros((2, 2, 3), np.uint8)
    assert dense.resize_linear(grey, (2, 2)) is grey


def test_nearest_is_opencvs_at_odd_sizes():
    from mindspore.dataset import vision

    rng = np.random.default_rng(0)
    for old, new in rng.integers(2, 300, (60, 2)).tolist():
        labels = rng.integers(0, 256, (3, old), dtype=np.uint8)
        opencv = vision.Resize([3, new], vision.Inter.NEAREST)(labels).reshape(3, new)
        np.testing.assert_array_equal(dense.resize_nearest(labels, (3, new)), opencv)


def test_the_module_loads_no_mindspore():
    code = "import mindska.data.dense, sys; print('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
