"""From images with objects to arrays: the originals' pixels and boxes, fixed shapes, chance by the generator alone."""

from __future__ import annotations

import json
import logging
import zlib
from pathlib import Path

import numpy as np
import pytest
from coco_data import SQUARE, annotation, content, write
from dense_inputs import picture
from PIL import Image

from mindska.data import dense
from mindska.data.dense import multiple_size
from mindska.detection import assign
from mindska.detection.coco import CocoDataset
from mindska.detection.masks import unpack
from mindska.detection.postprocess import Detections, merged, no_detections
from mindska.detection.transforms import (
    DetectionAugmentation,
    DetectionEvalTransform,
    DetectionTrainTransform,
    SsdAugmentation,
    SsdEvalTransform,
    SsdTrainTransform,
    Truth,
    batches_of_one_size,
    check_max_boxes,
    mmdetection_pixels,
    ssd_pixels,
    without_padding,
)
from mindska.errors import DataError, SettingError

CASES = json.loads((Path(__file__).parent / "parity" / "goldens_dense" / "preprocessing.json").read_text())["cases"]
SMALL = DetectionAugmentation(scales=((160, 96),), hflip=0)


def crc(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def data_set(
    folder: Path, annotations: list, size: tuple[int, int] = (100, 80), images: int = 1, **options
) -> CocoDataset:
    data = content(annotations, images)
    for i, image in enumerate(data["images"]):
        image["width"], image["height"] = size
        Image.fromarray(picture(i, size[1], size[0])).save(folder / image["file_name"])
    return CocoDataset(write(folder, data), folder, **options)


@pytest.mark.parametrize("name", ["det_landscape", "det_flip"])
def test_pixels_and_boxes_of_mmdetection(name, tmp_path):
    case = CASES[name]
    seed, height, width = case["picture"]
    boxes = [(x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in case["boxes_in"]]
    Image.fromarray(picture(seed, height, width)).save(tmp_path / "1.png")
    data = content([annotation(i, box=box) for i, box in enumerate(boxes)], 1)
    data["images"][0].update(width=width, height=height)
    dataset = CocoDataset(write(tmp_path, data), tmp_path)
    padded = tuple(case["padded_hw"])
    options = DetectionAugmentation(scales=(tuple(case["scale"]),), hflip=float(case["flip"]), buckets=(padded,))
    image, found, labels, shape = DetectionTrainTransform(augmentation=options).sample(dataset, 0, rng())
    assert crc(image) == case["output_crc32_chw_float32"] and image.dtype == np.float32
    found, labels = without_padding(found, labels)
    assert np.abs(found - case["boxes_out"]).max() < 1e-3 and shape.tolist() == case["resized_hw"]
    prepared = DetectionEvalTransform().sample(dataset, 0)
    assert list(prepared.image.shape[1:]) == case["padded_hw"] and list(prepared.image_shape) == case["resized_hw"]
    assert list(prepared.scale_factor) == case["scale_factor_wh"] and prepared.original_shape == (height, width)
    if not case["flip"]:
        assert crc(prepared.image) == case["output_crc32_chw_float32"]


def test_pixels_of_ssd(tmp_path):
    case = CASES["coco_ssd"]
    prepared = SsdEvalTransform()(picture(*case["picture"]))
    assert crc(prepared.image) == case["output_crc32_chw_float32"] and prepared.image.shape == (3, 320, 320)
    assert prepared.scale_factor == (0.5, 320 / 427)
    # The same in training, where nothing is changed by chance.
    seed, height, width = case["picture"]
    Image.fromarray(picture(seed, height, width)).save(tmp_path / "1.png")
    data = content([annotation(1, box=(64, 42.7, 128, 85.4))], 1)
    data["images"][0].update(width=width, height=height)
    options = SsdAugmentation(iou_thresholds=(0.0,), photometric=False, hflip=0)
    dataset = CocoDataset(write(tmp_path, data), tmp_path)
    image, boxes, labels, shape = SsdTrainTransform(augmentation=options).sample(dataset, 0, rng())
    assert crc(image) == case["output_crc32_chw_float32"]
    assert boxes[0] == pytest.approx([32, 32, 96, 96]) and labels[0] == 0 and shape.tolist() == [320, 320]


def test_samples_have_fixed_shapes_and_depend_on_the_generator_alone(tmp_path):
    dataset = data_set(
        tmp_path, [annotation(i, box=(10 + i, 10, 20, 30), segmentation=SQUARE) for i in range(3)], masks=True
    )
    augmentation = DetectionAugmentation(scales=((160, 96), (128, 64), (96, 90)), max_boxes=5)
    with_masks = DetectionTrainTransform(mmdetection_pixels((96, 160)), augmentation, masks=True)
    ssd = SsdTrainTransform(ssd_pixels((64, 64)), SsdAugmentation(max_boxes=5))
    both = {with_masks: [(3, 96, 160), (5, 4), (5,), (2,), (5, 96, 20)], ssd: [(3, 64, 64), (5, 4), (5,), (2,)]}
    for transform, shapes in both.items():
        for seed in range(12):
            sample, again = (transform.sample(dataset, 0, rng(seed)) for _ in range(2))
            assert [array.shape for array in sample] == shapes and len(sample) == len(transform.columns)
            assert [array.dtype for array in sample[:4]] == [np.float32, np.float32, np.int32, np.int32]
            assert all(np.array_equal(one, other) for one, other in zip(sample, again))
            boxes, labels = without_padding(sample[1], sample[2])
            assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min() >= 0
            assert (boxes[:, 2] <= sample[3][1]).all() and (boxes[:, 3] <= sample[3][0]).all()
            assert (sample[2][len(labels) :] == -1).all() and not sample[1][len(labels) :].any()
        different = {crc(transform.sample(dataset, 0, rng(seed))[0]) for seed in range(12)}
        assert len(different) > 3


def test_masks_go_with_their_boxes(tmp_path):
    polygon = [[10, 10, 50, 10, 50, 40, 10, 40]]
    one = annotation(1, box=(10, 10, 40, 30), segmentation=polygon)
    dataset = data_set(tmp_path, [one, dict(one, id=2, iscrowd=1)], masks=True)
    for flip in (0, 1):
        options = DetectionAugmentation(scales=((200, 160),), hflip=flip)
        _, boxes, labels, shape, bits = DetectionTrainTransform(augmentation=options, masks=True).sample(
            dataset, 0, rng()
        )
        masks = unpack(bits, bits.shape[2] * 8)
        left = 100 if flip else 20
        assert shape.tolist() == [160, 200] and boxes[0].tolist() == [left, 20, left + 80, 80]
        rows, columns = masks[0].nonzero()
        assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (20, 80, left, left + 80)
        assert not masks[1:].any() and (labels[1:] == -1).all()  # the crowd is none
    bits_of = DetectionTrainTransform(augmentation=DetectionAugmentation(), masks=True).sample(dataset, 0, rng())[4]
    assert bits_of.nbytes == 100 * 800 * 1344 // 8


def test_buckets(tmp_path):
    augmentation = DetectionAugmentation()
    assert augmentation.buckets == ((800, 1344), (1344, 800))
    assert augmentation.bucket((427, 640)) == (800, 1344) and augmentation.bucket((640, 427)) == (1344, 800)
    assert augmentation.bucket((500, 500)) == (800, 1344)
    three = DetectionAugmentation(buckets=((800, 1344), (1344, 800), (832, 832)))
    assert three.bucket((500, 500)) == (832, 832)
    several = DetectionAugmentation(scales=((1333, 640), (1333, 800)))
    assert several.bucket((427, 640)) == (800, 1344)
    square = DetectionAugmentation(scales=((512, 512),))
    assert square.buckets == ((512, 512),)
    with pytest.raises(SettingError, match=r"100x100 pixels .* becomes 800x800, which none of the buckets"):
        DetectionAugmentation(buckets=((640, 640),)).bucket((100, 100))
    for options in (
        dict(buckets=((800, 1333),)), dict(scales=()), dict(scales=((0, 5),)), dict(hflip=2), dict(max_boxes=0),
    ):  # fmt: skip
        with pytest.raises(SettingError):
            DetectionAugmentation(**options)
    dataset = data_set(tmp_path, [annotation(1)], (60, 90))
    assert DetectionTrainTransform(augmentation=SMALL).bucket(dataset, 0) == (160, 96)
    assert SsdTrainTransform().bucket(dataset, 0) == (320, 320)


def test_batches_are_of_one_size():
    sizes = [(8, 4) if i % 3 else (4, 8) for i in range(20)]
    batches = batches_of_one_size(sizes, rng().permutation(20), 3)
    assert {len(batches_of_one_size(sizes, rng(seed).permutation(20), 3)) for seed in range(9)} == {6}
    assert all(len({sizes[i] for i in batch}) == 1 and len(batch) == 3 for batch in batches)
    together = [i for batch in batches for i in batch]
    assert len(set(together)) == len(together) >= 20 - 2 * 2


def test_more_objects_than_the_maximum(tmp_path, caplog):
    boxes = [annotation(i, category=1 + i % 2, box=(i % 10 * 10, i // 10 * 10, 8, 8)) for i in range(40)]
    dataset = data_set(tmp_path, boxes)
    transform = DetectionTrainTransform(augmentation=DetectionAugmentation(scales=((100, 80),), hflip=0, max_boxes=15))
    seen = set()
    for seed in range(20):
        _, found, labels, _ = transform.sample(dataset, 0, rng(seed))
        assert (labels >= 0).all() and len(np.unique(found, axis=0)) == 15
        assert all(label == int(box[0] / 10) % 2 for box, label in zip(found, labels))  # each keeps its own
        seen |= {tuple(box) for box in found.tolist()}
    assert len(seen) == 40  # none is left out for ever
    with caplog.at_level(logging.WARNING, "mindska"):
        assert check_max_boxes(dataset, 15) == 1 and check_max_boxes(dataset, 40) == 0
    assert "1 images have more than max_boxes (15) objects, up to 40" in caplog.text


@pytest.mark.fault("many-objects")
def test_an_image_without_objects_becomes_a_sample(tmp_path):  # G44, G45
    dataset = data_set(tmp_path, [])
    for transform in (DetectionTrainTransform(augmentation=SMALL), SsdTrainTransform(ssd_pixels((64, 64)))):
        sample = transform.sample(dataset, 0, rng())
        boxes, labels = without_padding(sample[1], sample[2])
        assert boxes.shape == (0, 4) and labels.shape == (0,)
        assert (assign.ssd_targets(np.float32([[0.5, 0.5, 1, 1]]), boxes, labels).labels == assign.BACKGROUND).all()
    dataset = data_set(tmp_path, [annotation(1, iscrowd_=1)])
    dataset.crowd[:] = True
    assert (DetectionTrainTransform(augmentation=SMALL).sample(dataset, 0, rng())[2] == -1).all()


def test_crops_of_ssd(tmp_path):
    boxes = [(5, 5, 30, 40), (40, 30, 20, 20), (70, 50, 25, 25), (0, 60, 8, 8)]
    dataset = data_set(tmp_path, [annotation(i, category=1 + i % 2, box=box) for i, box in enumerate(boxes)])
    image, objects = dense.rgb_array(dataset.load(0)), dataset.objects(0)
    truth = Truth(objects.boxes, objects.labels, objects.numbers)
    for threshold in (0.1, 0.3, 0.5):
        transform = SsdTrainTransform(
            augmentation=SsdAugmentation(iou_thresholds=(0.0, threshold, threshold, threshold))
        )
        smaller = 0
        for seed in range(60):
            part, kept = transform.cropped(image, truth, rng(seed))
            height, width = part.shape[:2]
            if part.shape == image.shape:
                assert kept is truth
                continue
            smaller += 1
            assert 0.5 <= height / width <= 2 and height >= 0.3 * 80 - 1 and width >= 0.3 * 100 - 1
            assert len(kept) >= 1 and (kept.boxes[:, 2:] > kept.boxes[:, :2]).all()
            assert kept.boxes.min() >= 0 and (kept.boxes[:, 2] <= width).all() and (kept.boxes[:, 3] <= height).all()
            assert np.array_equal(kept.labels, objects.labels[kept.numbers])
            # Where the part lies in the image, the objects do, too.
            top, left = next(
                (y, x) for y in range(81 - height) for x in range(101 - width)
                if np.array_equal(image[y : y + height, x : x + width], part)
            )  # fmt: skip
            place = np.float32([[left, top, left + width, top + height]])
            assert assign.box_iou(objects.boxes, place).max() >= threshold
            centres = (objects.boxes[:, :2] + objects.boxes[:, 2:]) / 2
            inside = ((centres > place[0, :2]) & (centres < place[0, 2:])).all(1)
            assert kept.numbers.tolist() == np.flatnonzero(inside).tolist()
            whole = np.clip(objects.boxes[inside] - [left, top, left, top], 0, [width, height, width, height])
            assert kept.boxes == pytest.approx(whole)
        assert smaller > 5
    assert transform.cropped(image, truth.take(np.zeros(0, int)), rng())[0] is image
    for options in (
        dict(iou_thresholds=(0.5,)), dict(iou_thresholds=(0, 2)), dict(trials=0), dict(aspect_ratio=(2, 1)),
        dict(hflip=-1),
    ):  # fmt: skip
        with pytest.raises(SettingError):
            SsdAugmentation(**options)


def test_a_tiny_image_is_cropped_without_end(tmp_path):
    dataset = data_set(tmp_path, [annotation(1, box=(0, 0, 1, 1))], (1, 1))
    for seed in range(20):
        assert SsdTrainTransform(ssd_pixels((32, 32))).sample(dataset, 0, rng(seed))[2][0] == 0


@pytest.mark.fault("any-image")
def test_all_kinds_of_images_give_the_same_pixels(tmp_path):  # G37, G38
    array = picture(3, 40, 60)
    Image.fromarray(array).save(tmp_path / "a.png")
    transform = DetectionEvalTransform(mmdetection_pixels((64, 96)))
    expected = transform(array)
    assert expected.image.shape == (3, 64, 96) and expected.original_shape == (40, 60)
    rgba = Image.fromarray(array).convert("RGBA")
    for other in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(array), rgba, np.asarray(rgba)):
        assert np.array_equal(transform(other).image, expected.image)
    assert not np.array_equal(transform(array[..., ::-1]).image, expected.image)  # BGR is another image
    grey = Image.fromarray(array).convert("L")
    Image.fromarray(array).convert("CMYK").save(tmp_path / "cmyk.jpg")
    for other in (grey, np.asarray(grey), np.asarray(grey)[..., None], tmp_path / "cmyk.jpg"):
        assert transform(other).image.shape == (3, 64, 96)
    assert SsdEvalTransform(ssd_pixels((32, 32)))(grey).image.shape == (3, 32, 32)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)  # Pillow's convert would cut it at 255
    np.testing.assert_array_equal(transform(deep).image, transform(grey).image)
    for bad in (
        array.astype(np.float32),
        array[..., :2],
        np.zeros((0, 5, 3), np.uint8),
        array[None],
        Image.new("F", (5, 5), 300.0),  # which does not say which number is white
    ):
        with pytest.raises(DataError, match="expected"):
            transform(bad)
    with pytest.raises(DataError, match="nowhere.png"):
        transform(tmp_path / "nowhere.png")


def bright_box(image: np.ndarray) -> Detections:
    """A detector that finds what is bright."""
    rows, columns = (image[0] > 0.8 * image[0].max()).nonzero()
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    return Detections(np.float32([box]), np.float32([0.9]), np.int32([0]))


@pytest.mark.fault("coco-figures")
@pytest.mark.parametrize("kind", ["keep_ratio", "fixed"])
def test_boxes_are_those_of_the_original_pixels(kind):  # G39
    keep_ratio = DetectionEvalTransform(mmdetection_pixels((160, 256)))
    transform = keep_ratio if kind == "keep_ratio" else SsdEvalTransform(ssd_pixels((128, 128)))
    found = []
    for times in (1, 2):
        image = np.zeros((60 * times, 90 * times, 3), np.uint8)
        image[20 * times : 40 * times, 60 * times : 90 * times] = 255
        prepared = transform(image)
        found.append(prepared.to_original(bright_box(prepared.image)).boxes[0])
    assert found[0] == pytest.approx([60, 20, 90, 40], abs=1.5) and found[1] == pytest.approx(2 * found[0], abs=3)
    assert found[0][2] <= 90 and found[1][2] <= 180


def test_evaluation_pads_to_a_bucket_where_there_are_some():
    array = picture(1, 60, 90)
    small = mmdetection_pixels((64, 96))
    plain, padded = DetectionEvalTransform(small)(array), DetectionEvalTransform(small, ((96, 128), (128, 128)))(array)
    assert plain.image.shape[1:] == multiple_size(plain.image_shape, 32) and padded.image.shape == (3, 96, 128)
    height, width = plain.image_shape
    assert np.array_equal(padded.image[:, :height, :width], plain.image[:, :height, :width])
    assert not padded.image[:, height:].any()


def test_a_network_of_one_channel(tmp_path):
    pixels = ssd_pixels((32, 32)).for_channels(1)
    assert SsdEvalTransform(pixels)(picture(1, 20, 30)).image.shape == (1, 32, 32)


def test_views_of_an_image_become_one():
    one = Detections(np.float32([[10, 10, 30, 30], [50, 50, 60, 60]]), np.float32([0.9, 0.5]), np.int32([0, 1]))
    mirrored = Detections(np.float32([[71, 10, 90, 30], [20, 5, 40, 9]]), np.float32([0.8, 0.7]), np.int32([0, 2]))
    found = merged([one, mirrored.mirrored(100)])
    assert found.boxes.tolist() == [[10, 10, 30, 30], [60, 5, 80, 9], [50, 50, 60, 60]]
    assert found.labels.tolist() == [0, 2, 1] and found.masks is None
    assert len(merged([no_detections((5, 5)), no_detections((5, 5))])) == 0
    masks = np.zeros((1, 4, 6), bool)
    masks[0, 1, 0] = True
    view = Detections(np.float32([[0, 1, 1, 2]]), np.float32([0.5]), np.int32([0]), masks).mirrored(6)
    assert view.boxes.tolist() == [[5, 1, 6, 2]] and view.masks[0, 1, 5] and view.masks.sum() == 1
