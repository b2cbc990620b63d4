"""From images and masks to the network's input, and from logits back to the image's size."""

from __future__ import annotations

import itertools
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_inputs import label_map as blocks
from dense_inputs import picture
from PIL import Image
from test_segmentation_data import write_folders
from torch.nn import functional

from mindska.data import Preprocessing, dense
from mindska.errors import DataError, SettingError
from mindska.segmentation.datasets import open_segmentation_dataset
from mindska.segmentation.transforms import (
    CVNETS_AUGMENTATION,
    EvaluationSize,
    SegmentationAugmentation,
    SegmentationEvalTransform,
    SegmentationTrainTransform,
    add_probabilities,
    cvnets_pixels,
    label_map,
    mmsegmentation_pixels,
    resize_logits,
    slide,
    sliding_windows,
)

CASES = json.loads((Path(__file__).parent / "parity" / "goldens_dense" / "preprocessing.json").read_text())["cases"]
PLAIN = dict(hflip=0.0, photometric=False, cat_max_ratio=1.0)


def crc(array):
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


# ------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize(
    "name, pixels, size",
    [
        ("seg_keep", mmsegmentation_pixels(), EvaluationSize()),
        ("seg_multiple", mmsegmentation_pixels(), EvaluationSize(size_divisor=32)),
        ("voc", cvnets_pixels(), EvaluationSize(scale=None, fixed=(512, 512), library="pillow")),
    ],
)
def test_evaluation_has_the_pixels_of_the_goldens(name, pixels, size):
    case = CASES[name]
    seed, *shape = case["picture"]
    transform = SegmentationEvalTransform(pixels, size)
    image = transform(Image.fromarray(picture(seed, *shape)))
    assert crc(image.pixels) == case["output_crc32_chw_float32"] and image.size == tuple(shape)
    flipped = transform(picture(seed, *shape), flip=True)
    np.testing.assert_array_equal(flipped.pixels[:, :, ::-1], image.pixels)


def test_evaluation_gives_the_mask_at_its_own_size(tmp_path):
    dataset = open_segmentation_dataset("", write_folders(tmp_path), "val")
    image, mask = SegmentationEvalTransform(mmsegmentation_pixels(), EvaluationSize((64, 32))).sample(dataset, 0)
    assert image.shape == (3, 32, 64) and image.dtype == np.float32
    np.testing.assert_array_equal(mask, dataset.load_mask(0))
    assert mask.dtype == np.int32


@pytest.mark.fault("any-image")
def test_a_file_a_pillow_image_and_an_rgb_array_give_the_same(tmp_path):
    pixels = picture(1, 40, 60)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    transform = SegmentationEvalTransform(mmsegmentation_pixels(), EvaluationSize((80, 64)))
    some = [transform(image).pixels for image in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(
        tmp_path / "a.png"), pixels)]  # fmt: skip
    for other in some[1:]:
        np.testing.assert_array_equal(other, some[0])
    assert (transform(pixels[..., ::-1].copy()).pixels != some[0]).any()
    for kind in ("RGBA", "L", "CMYK", "P", "1"):
        assert transform(Image.fromarray(pixels).convert(kind)).pixels.shape == some[0].shape
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)  # Pillow's convert would cut it at 255
    np.testing.assert_array_equal(transform(deep).pixels, transform(Image.fromarray(pixels[..., 0])).pixels)
    with pytest.raises(DataError, match="an image of Pillow's kind F: .* which number is white"):
        transform(Image.fromarray(pixels[..., 0].astype(np.float32)))
    for kind in (pixels[..., 0], pixels[..., :1]):
        np.testing.assert_array_equal(dense.rgb_array(kind), np.repeat(pixels[..., :1], 3, 2))
    for wrong in (pixels.astype(np.float32), pixels.transpose(2, 0, 1), pixels[:0]):
        with pytest.raises(DataError, match=r"expected \(height, width, 3\), uint8, in the order RGB"):
            dense.rgb_array(wrong)


def test_evaluation_sizes():
    assert EvaluationSize().sizes((427, 640))[-1] == (512, 767)
    assert EvaluationSize(size_divisor=32).sizes((427, 640)) == [(512, 767), (512, 768)]
    assert EvaluationSize().sizes((427, 640), 0.5)[-1] == dense.keep_ratio_size((427, 640), (1024, 256))
    assert EvaluationSize(scale=None).sizes((33, 31)) == [(33, 31)] * 2
    assert EvaluationSize(scale=None, size_divisor=16).sizes((33, 31), 2.0) == [(66, 62), (80, 64)]
    for wrong, said in (
        (dict(fixed=(1, 2)), "expected one of them"),
        (dict(size_divisor=0), "size_divisor is 0"),
        (dict(scale=(1,)), "two numbers"),
        (dict(library="cv2"), "expected one of opencv, pillow"),
    ):
        with pytest.raises(SettingError, match=said):
            EvaluationSize(**wrong)


def test_grey_networks_get_one_channel():
    pixels = picture(1, 40, 60)
    grey = Preprocessing((32, 32), 1.0, "bilinear", (0.5,), (0.25,))
    image = SegmentationEvalTransform(grey, EvaluationSize(scale=None))(pixels).pixels
    expected = (np.asarray(Image.fromarray(pixels).convert("L")) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(image[0], expected, atol=1e-5)
    train = SegmentationTrainTransform(grey)(pixels, np.zeros((40, 60), np.int32), np.random.default_rng(0))
    assert image.shape == (1, 40, 60) and train[0].shape == (1, 32, 32)


# ------------------------------------------------------------------------------------------------- training


@pytest.fixture
def sample():
    return picture(5, 90, 120), blocks(7, (1, 90, 120), 6)[0]


@pytest.mark.parametrize(
    "pixels, augmentation",
    [
        (mmsegmentation_pixels((64, 48)), SegmentationAugmentation(scale=(200, 60))),
        (cvnets_pixels((64, 48)), CVNETS_AUGMENTATION),
    ],
)
def test_a_sample_is_of_fixed_shape_and_depends_on_its_generator_alone(pixels, augmentation, sample):
    transform = SegmentationTrainTransform(pixels, augmentation)
    assert transform.columns == ("image", "label")
    digests = set()
    kept = [each.copy() for each in sample]
    for seed in range(12):
        image, labels = transform(*sample, np.random.default_rng(seed))
        again = transform(Image.fromarray(sample[0]), sample[1], np.random.default_rng(seed))
        for one, other in zip((image, labels), again):
            np.testing.assert_array_equal(one, other)
        assert image.shape == (3, 64, 48) and image.dtype == np.float32 and np.isfinite(image).all()
        assert labels.shape == (64, 48) and labels.dtype == np.int32
        assert set(np.unique(labels)) <= {*range(6), 255}
        digests.add((crc(image), crc(labels)))
    assert len(digests) == 12
    for one, other in zip(sample, kept):
        np.testing.assert_array_equal(one, other)


def test_image_and_labels_move_together():
    """An image that shows its labels, as colours far from each other: they still agree after resize, crop and flip."""
    labels = blocks(3, (1, 160, 200), 5, fraction=0.0, block=40)[0]
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], np.uint8)
    for augmentation in (
        SegmentationAugmentation(scale=(400, 160), photometric=False),
        SegmentationAugmentation(short_side=(120, 200), photometric=False, library="pillow", rotate=10.0),
    ):
        transform = SegmentationTrainTransform(cvnets_pixels((96, 96)), augmentation)
        for seed in range(10):
            image, moved = transform(colours[labels], labels, np.random.default_rng(seed))
            distance = np.abs(image[:, None] * 255.0 - colours.T[:, :, None, None]).sum(0)
            valid = moved != 255
            agree = (distance.argmin(0) == moved)[valid]
            assert agree.mean() > 0.93 and valid.mean() > 0.5, seed  # all but the edges of blocks


def test_what_the_crop_does_not_fill_is_0_and_ignored(sample):
    transform = SegmentationTrainTransform(
        mmsegmentation_pixels((128, 160)), SegmentationAugmentation((120, 90), (0.5, 0.5), **PLAIN)
    )
    image, labels = transform(*sample, np.random.default_rng(0))
    resized = dense.resize_linear(sample[0], (45, 60))
    np.testing.assert_array_equal(image[:, :45, :60], dense.normalise(resized, dense.IMAGENET_MEAN, dense.IMAGENET_STD))
    np.testing.assert_array_equal(labels[:45, :60], dense.resize_nearest(sample[1], (45, 60)))
    for outside in (image[:, 45:], image[:, :, 60:]):
        assert not outside.any()
    assert (labels[45:] == 255).all() and (labels[:, 60:] == 255).all()


def test_the_size_is_drawn_as_the_recipes_do():
    transform = SegmentationTrainTransform(mmsegmentation_pixels())
    sizes = np.array([transform.draw_size((300, 450), np.random.default_rng(seed)) for seed in range(300)])
    assert (
        sizes[:, 0].min() >= 256 and sizes[:, 0].max() <= 1024 and sizes[:, 0].min() < 270 and sizes[:, 0].max() > 1000
    )
    np.testing.assert_allclose(sizes[:, 1] / sizes[:, 0], 1.5, atol=0.01)
    transform = SegmentationTrainTransform(cvnets_pixels(), CVNETS_AUGMENTATION)
    sizes = np.array([transform.draw_size((300, 450), np.random.default_rng(seed)) for seed in range(300)])
    assert sizes.min() == 256 and sizes[:, 1].max() == 1024 and sizes[:, 0].max() == 682  # longest 1024


@pytest.mark.fault("ignored-batch")
def test_a_crop_with_too_much_of_one_class_is_drawn_again():
    labels = np.zeros((100, 1000), np.int32)
    labels[:, 900:] = np.arange(100) % 4 + 1
    transform = SegmentationTrainTransform(mmsegmentation_pixels((100, 100)))

    def share(seed, labels=labels, transform=transform):
        top, left = transform.draw_crop(labels, np.random.default_rng(seed))
        counts = np.bincount(labels[top : top + 100, left : left + 100].ravel(), minlength=256)[:255]
        return counts.max() / max(1, counts.sum())

    any_crop = SegmentationTrainTransform(
        mmsegmentation_pixels((100, 100)), SegmentationAugmentation(cat_max_ratio=1.0)
    )
    shares = [share(seed) for seed in range(200)]
    others = [share(seed, transform=any_crop) for seed in range(200)]
    assert np.mean(np.array(shares) < 0.75) > 3 * np.mean(np.array(others) < 0.75)
    one, nothing = np.full((200, 200), 3, np.int32), np.full((200, 200), 255, np.int32)
    for hopeless in (one, nothing):  # ends with the last that was drawn
        rng, drawn = np.random.default_rng(0), np.random.default_rng(0)
        expected = [tuple(int(drawn.integers(101)) for _ in range(2)) for _ in range(11)][-1]
        assert transform.draw_crop(hopeless, rng) == expected
    # The share is of the labelled pixels: half and half beside much that is ignored will do, nine to one will not.
    for parts, redrawn in (((1, 1), False), ((9, 1), True)):
        labels = np.full((200, 200), 255, np.int32)
        labels[:, ::10] = np.repeat([0, 1], parts)[np.arange(200) % sum(parts)][:, None]
        first = np.random.default_rng(0)
        drawn = tuple(int(first.integers(101)) for _ in range(2))
        assert (transform.draw_crop(labels, np.random.default_rng(0)) != drawn) == redrawn
    image, labels = transform(picture(1, 200, 200), nothing, np.random.default_rng(0))
    assert (labels == 255).all() and np.isfinite(image).all()  # a sample may have no label at all


def test_flip_is_drawn_and_exact(sample):
    pixels = mmsegmentation_pixels((90, 120))
    both = [
        SegmentationTrainTransform(pixels, SegmentationAugmentation((120, 90), (1.0, 1.0), flip, **other))
        for flip, other in itertools.product([None], [dict(PLAIN, hflip=0.0), dict(PLAIN, hflip=1.0)])
    ]
    (image, labels), (flipped, moved) = (each(*sample, np.random.default_rng(0)) for each in both)
    np.testing.assert_array_equal(flipped[:, :, ::-1], image)
    np.testing.assert_array_equal(moved[:, ::-1], labels)
    half = SegmentationTrainTransform(pixels, SegmentationAugmentation((120, 90), (1.0, 1.0), **dict(PLAIN, hflip=0.5)))
    images = [half(*sample, np.random.default_rng(seed))[0] for seed in range(60)]
    assert 15 < sum(np.array_equal(each, image) for each in images) < 45


def test_a_data_set_gives_samples(tmp_path):
    dataset = open_segmentation_dataset("", write_folders(tmp_path), "train")
    transform = SegmentationTrainTransform(mmsegmentation_pixels((32, 32)), SegmentationAugmentation((64, 32)))
    image, labels = transform.sample(dataset, 1, np.random.default_rng(0))
    again = transform.sample(dataset, 1, np.random.default_rng(0))
    assert image.shape == (3, 32, 32) and crc(image) == crc(again[0]) and crc(labels) == crc(again[1])
    assert set(np.unique(labels)) <= {0, 1, 2, 3, 255}


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(scale=(0, 5)), "scale is"),
        (dict(ratio_range=(2.0, 0.5)), "ratio_range is"),
        (dict(short_side=(768, 256)), "short_side is"),
        (dict(library="cv2"), "library is 'cv2'"),
        (dict(cat_max_ratio=0.0), "cat_max_ratio is"),
        (dict(hflip=1.5), "hflip is 1.5; expected a probability"),
        (dict(rotate=-10.0), "rotate is"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(SettingError, match=said):
        SegmentationAugmentation(**options)


def test_pillows_distortion_is_torchvisions_hue():
    pixels = Image.fromarray(picture(2, 30, 40))

    class Turn:  # no brightness, contrast last and not, no saturation, hue, no permutation
        coins = [0.9, 0.9, 0.9, 0.1, 0.9, 0.9]

        def random(self):
            return self.coins.pop(0)

        def uniform(self, low, high):
            assert (low, high) == (-0.05, 0.05)
            return -0.05

    hue, saturation, value = pixels.convert("HSV").split()
    hue = Image.fromarray(((np.asarray(hue).astype(int) - 12) % 256).astype(np.uint8))
    expected = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    np.testing.assert_array_equal(dense.pillow_distortion(pixels, Turn()), expected)
    some = {crc(np.asarray(dense.pillow_distortion(pixels, np.random.default_rng(seed)))) for seed in range(20)}
    assert len(some) > 15


# ------------------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("old, new", [((8, 10), (64, 80)), ((13, 9), (50, 71)), ((40, 30), (17, 29)), ((1, 1), (5, 4)),
                                      ((5, 1), (1, 7))])  # fmt: skip
def test_logits_are_resized_as_pytorch_does(old, new, align_corners):
    logits = np.random.default_rng(0).standard_normal((7, *old)).astype(np.float32)
    theirs = functional.interpolate(torch.from_numpy(logits)[None], new, mode="bilinear", align_corners=align_corners)
    ours = resize_logits(logits, new, align_corners)
    np.testing.assert_allclose(ours, theirs[0].numpy(), rtol=0, atol=2e-5)
    np.testing.assert_array_equal(label_map(logits, new, align_corners), ours.argmax(0))
    flipped = label_map(logits[:, :, ::-1], new, align_corners, flipped=True)
    np.testing.assert_array_equal(flipped, ours.argmax(0))


def test_several_scales_are_averaged_as_probabilities():
    rng = np.random.default_rng(0)
    size, total, expected = (33, 41), None, 0
    for old, flipped in (((8, 10), False), ((12, 15), True), ((33, 41), False)):
        logits = (20 * rng.standard_normal((5, *old))).astype(np.float32)
        total = add_probabilities(total, logits, size, flipped=flipped)
        tensor = torch.from_numpy(logits[:, :, ::-1].copy() if flipped else logits)[None]
        expected = expected + functional.interpolate(tensor, size, mode="bilinear").softmax(1)[0].numpy()
    np.testing.assert_allclose(total, expected, atol=1e-4)
    transform = SegmentationEvalTransform(mmsegmentation_pixels(), EvaluationSize((64, 32)))
    variants = list(transform.variants(picture(1, 40, 60), (0.5, 1.0), flip=True))
    assert [flipped for _, flipped in variants] == [False, True, False, True]
    assert [image.pixels.shape[1:] for image, _ in variants] == [(16, 24)] * 2 + [(32, 48)] * 2
    assert {image.size for image, _ in variants} == {(40, 60)}


def test_windows_cover_the_image_as_mmsegmentations():
    assert sliding_windows((512, 683), (512, 512), (341, 341)) == [(0, 0), (0, 171)]
    assert sliding_windows((100, 100), (512, 512), (341, 341)) == [(0, 0)]
    for size, window, stride in (((97, 130), (32, 48), (20, 48)), ((64, 64), (32, 32), (32, 32))):
        seen = np.zeros(size, int)
        for top, left in sliding_windows(size, window, stride):
            assert 0 <= top <= size[0] - window[0] and 0 <= left <= size[1] - window[1]
            seen[top : top + window[0], left : left + window[1]] += 1
        assert seen.min() >= 1
        grid = math.prod(max(s - w + t - 1, 0) // t + 1 for s, w, t in zip(size, window, stride))
        assert len(sliding_windows(size, window, stride)) == grid
    with pytest.raises(SettingError, match="stride .* more than the window"):
        sliding_windows((100, 100), (32, 32), (40, 32))


@pytest.mark.parametrize("size", [(50, 70), (20, 70), (20, 10)])
def test_sliding_over_a_network_that_sees_one_pixel_changes_nothing(size):
    pixels = np.random.default_rng(0).standard_normal((3, *size)).astype(np.float32)
    shapes = set()

    def predict(images):
        shapes.add(images.shape)
        return np.concatenate([images, 2 * images[:, :1]], 1)

    logits = slide(pixels, predict, (32, 32), (20, 20))
    assert shapes == {(1, 3, 32, 32)}  # one compilation
    np.testing.assert_allclose(logits, np.concatenate([pixels, 2 * pixels[:1]]), rtol=1e-6)
