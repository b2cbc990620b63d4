"""The network's input: Pillow's pixels, timm's evaluation rule, timm's RandAugment; and why MindCV's are not used."""

from __future__ import annotations

import numpy as np
import pytest
from mindcv.data import auto_augment as mindcv_augment
from mindspore.dataset import vision
from mindspore.dataset.vision import Inter
from PIL import Image, ImageEnhance, ImageOps

from mindska.data import EvalTransform, Preprocessing, transforms
from mindska.data.augment import AffineOptions, Operation

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SIZES = [(500, 375), (375, 500), (256, 256), (91, 640), (300, 285), (33, 40)]
FILL = (124, 116, 104)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft shapes, edges and fine grain: what resize filters disagree about."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    coarse = np.asarray(coarse) * 0.8 + 25  # leaves room for AutoContrast
    grain = rng.normal(0, 9, (height, width, 1))
    stripes = 40 * (np.arange(width)[None, :, None] // 3 % 2)
    return Image.fromarray(np.clip(coarse + grain + stripes - 20, 8, 240).astype(np.uint8))


@pytest.fixture(params=SIZES, ids=lambda size: "{}x{}".format(*size))
def jpeg(request, tmp_path):
    path = tmp_path / "photo.jpg"
    photo(*request.param).save(path, quality=90)
    with Image.open(path) as image:
        return image.convert("RGB")


def evaluated_by_timm(image, size, crop_pct, resample, mean, std):
    """timm 0.4.12's transforms_imagenet_eval for a square size, from torchvision's definitions of its three parts."""
    target = int(np.floor(size / crop_pct))
    short, long = sorted(image.size)
    other = int(target * long / short)  # torchvision's Resize truncates
    image = image.resize((target, other) if image.width <= image.height else (other, target), resample)
    top = int(round((image.height - size) / 2.0))
    left = int(round((image.width - size) / 2.0))
    pixels = np.asarray(image)[top : top + size, left : left + size].astype(np.float64) / 255
    return ((pixels - mean) / std).transpose(2, 0, 1)


@pytest.mark.parametrize(
    "size, crop_pct, interpolation",
    [(256, 0.9, "bicubic"), (224, 0.9, "bicubic"), (224, 0.875, "bilinear"), (97, 1.0, "lanczos")],
)
def test_evaluation_is_timms(jpeg, size, crop_pct, interpolation):
    transform = EvalTransform(Preprocessing((size, size), crop_pct, interpolation, **IMAGENET))
    result = transform(jpeg)
    assert result.shape == (3, size, size) and result.dtype == np.float32 and result.flags.c_contiguous
    expected = evaluated_by_timm(jpeg, size, crop_pct, getattr(Image, interpolation.upper()), **IMAGENET)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


def test_a_rectangular_input_is_resized_on_both_sides_and_cropped(jpeg):
    transform = EvalTransform(Preprocessing((97, 175), 0.9, "bicubic", **IMAGENET))
    resized = np.asarray(jpeg.resize((194, 107), Image.BICUBIC)).astype(np.float64)  # 175 / 0.9, 97 / 0.9
    # Margins are 19 and 10: 9.5 pixels on the left are rounded to the even 10.
    expected = (resized[5:102, 10:185] / 255 - IMAGENET["mean"]) / IMAGENET["std"]
    np.testing.assert_allclose(transform(jpeg), expected.transpose(2, 0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size, crop_pct", [((97, 97), 0.9), ((224, 224), 1.0), ((40, 64), 0.5), ((97, 97), 0.03)])
def test_what_is_cropped_before_it_is_resized_has_the_same_pixels(jpeg, interpolation, size, crop_pct, monkeypatch):
    """As it is done with strips that would become too large; 0.03: all images are strips then."""
    pixels = Preprocessing(size, crop_pct, interpolation, (0, 0, 0), (1 / 255,) * 3)
    expected = EvalTransform(pixels)(jpeg)
    monkeypatch.setattr(transforms, "MAX_RESIZED_PIXELS", 0)
    differences = np.abs(EvalTransform(pixels)(jpeg) - expected)
    if interpolation == "nearest":  # on a border between two pixels rounding decides
        assert np.mean(differences > 0) < 0.05
    else:
        assert differences.max() < 1.01 and np.mean(differences > 0.01) < 0.02


def resized_by_mindspore(image: Image.Image, size: tuple[int, int], filter: Inter) -> np.ndarray:
    return vision.Resize(size, filter)(np.asarray(image)).astype(int)


def test_mindspores_pilcubic_is_pillows_bicubic_and_its_bicubic_is_not(jpeg):
    """At the evaluation's sizes. Where the ratio of the sides changes much, Pillow may filter columns before rows."""
    width, height = EvalTransform(Preprocessing((160, 160), 0.9, "bicubic", **IMAGENET)).resized(*jpeg.size)
    expected = np.asarray(jpeg.resize((width, height), Image.BICUBIC)).astype(int)
    assert np.array_equal(resized_by_mindspore(jpeg, (height, width), Inter.PILCUBIC), expected)
    if min(jpeg.size) > width:  # without antialiasing: fine structure turns into something else
        assert np.abs(resized_by_mindspore(jpeg, (height, width), Inter.BICUBIC) - expected).mean() > 2


def test_jpegs_are_decoded_as_by_mindspore(tmp_path):
    path = tmp_path / "photo.jpg"
    photo(321, 217).save(path, quality=85)
    with Image.open(path) as image:
        ours = np.asarray(image.convert("RGB"))
    assert np.array_equal(vision.Decode()(np.fromfile(path, np.uint8)), ours)


class FixedDraws:
    """Stands in for a generator whose numbers are all `value`: below 0.5, the sign of a strength is plus."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self) -> float:
        return self.value

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.value


def moved(image, *matrix):
    return image.transform(image.size, Image.AFFINE, matrix, Image.BICUBIC, fillcolor=FILL)


# What timm's `rand-m9-inc1` does with magnitude 9 and a positive sign.
TIMM = {
    "AutoContrast": ImageOps.autocontrast,
    "Equalize": ImageOps.equalize,
    "Invert": ImageOps.invert,
    "Rotate": lambda image: image.rotate(27, Image.BICUBIC, fillcolor=FILL),
    "PosterizeIncreasing": lambda image: ImageOps.posterize(image, 1),
    "SolarizeIncreasing": lambda image: ImageOps.solarize(image, 26),
    "SolarizeAdd": lambda image: Image.fromarray(
        np.where(np.asarray(image) < 128, np.minimum(np.asarray(image).astype(int) + 99, 255), image).astype(np.uint8)
    ),
    "ColorIncreasing": lambda image: ImageEnhance.Color(image).enhance(1.81),
    "ContrastIncreasing": lambda image: ImageEnhance.Contrast(image).enhance(1.81),
    "BrightnessIncreasing": lambda image: ImageEnhance.Brightness(image).enhance(1.81),
    "SharpnessIncreasing": lambda image: ImageEnhance.Sharpness(image).enhance(1.81),
    "ShearX": lambda image: moved(image, 1, 0.27, 0, 0, 1, 0),
    "ShearY": lambda image: moved(image, 1, 0, 0, 0.27, 1, 0),
    "TranslateX": lambda image: moved(image, 1, 0, 0.405 * image.width, 0, 1, 0),
    "TranslateY": lambda image: moved(image, 1, 0, 0, 0, 1, 0.405 * image.height),
}


@pytest.mark.parametrize("name", TIMM)
def test_operations_are_timms(name):
    image = photo(160, 120)
    result = Operation(name, 1.0, 9).apply(image, 0.9, AffineOptions(Image.BICUBIC, FILL), FixedDraws(0.25))
    assert np.array_equal(result, TIMM[name](image))
    assert not np.array_equal(result, image), "the operation does nothing"


def test_signs_go_both_ways():
    image, look = photo(160, 120), AffineOptions(Image.BICUBIC, FILL)
    result = Operation("ShearX", 1.0, 9).apply(image, 0.9, look, FixedDraws(0.75))
    assert np.array_equal(result, moved(image, 1, -0.27, 0, 0, 1, 0))


def test_mindcvs_operations_are_not_timms():
    """When this fails, MindCV has been mended and `mindska.data.augment` may go back to its operations."""
    image = photo(160, 120)
    pixels = np.asarray(image)

    def change(result):
        return np.abs(np.asarray(result).astype(int) - pixels).mean()

    options = dict(resample=Inter.BICUBIC, fill_value=FILL)
    assert change(mindcv_augment.shear_x(pixels, 0.27, **options)) < 5 < change(TIMM["ShearX"](image))
    assert change(mindcv_augment.posterize(pixels, 1)) < 2 < 30 < change(TIMM["PosterizeIncreasing"](image))
    asked = mindcv_augment.rand_augment_transform("randaug-m9-mstd2.0", {})
    assert asked.ops[0].magnitude_std == 0.5, "MindCV now takes mstd from the string"
