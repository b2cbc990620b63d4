"""Data sets and figures in COCO's format: what people have in such files, and what must come of it."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from coco_data import SQUARE, annotation, content, write
from PIL import Image

from mindska.detection.coco import CocoDataset, open_coco
from mindska.detection.metrics import CocoEvaluator, table
from mindska.detection.postprocess import Detections, no_detections
from mindska.detection.rle import _runs, as_json, decode, encode
from mindska.errors import DataError, SettingError, WriteError

GOLDENS = Path(__file__).parent / "parity" / "goldens_dense"


def read(folder: Path, data: dict, **options) -> CocoDataset:
    return CocoDataset(write(folder, data), folder, **options)


def warned(dataset: CocoDataset) -> str:
    return "\n".join(dataset.warnings)


def perfect(dataset: CocoDataset, evaluator: CocoEvaluator) -> CocoEvaluator:
    """What is there is found."""
    for index in range(len(dataset)):
        objects = dataset.objects(index)
        some = np.flatnonzero(~objects.crowd)
        masks = None
        if "segm" in evaluator.kinds:
            masks = np.stack([dataset.mask(n) for n in objects.numbers[some]]) if len(some) else np.zeros((0, 80, 100))
        scores = np.full(len(some), 0.9, np.float32)
        evaluator.update(index, Detections(objects.boxes[some], scores, objects.labels[some], masks))
    return evaluator


def ap(dataset: CocoDataset, kind: str = "bbox") -> float:
    """pycocotools gives 1 - 2e-16 for what is perfect."""
    return round(perfect(dataset, CocoEvaluator(dataset, (kind,))).figures()[kind]["AP"], 12)


# ------------------------------------------------------------------------------------------- reading


def test_what_a_data_set_is(tmp_path):
    data = content([annotation(5, 2, 7, (1.5, 2, 10, 20)), annotation(6, 2, 3, iscrowd_=0)], 3, ((7, "b"), (3, "a")))
    dataset = read(tmp_path, data)
    assert (len(dataset), dataset.class_names, dataset.category_ids) == (3, ["a", "b"], [3, 7])
    assert "3 images (2 without objects) with 2 objects of 2 classes" in str(dataset)
    objects = dataset.objects(1)
    assert objects.boxes.tolist() == [[1.5, 2, 11.5, 22], [10, 10, 30, 40]] and objects.labels.tolist() == [1, 0]
    assert objects.boxes.dtype == np.float32 and objects.labels.dtype == np.int32
    assert len(dataset.objects(0).boxes) == 0 and dataset.objects(0).boxes.shape == (0, 4)
    assert dataset.load(1).size == (100, 80) and dataset.describe(1).endswith("2.png")
    assert dataset.member(1)[0] == "2.png" and dataset.warnings == []
    part = dataset.with_objects()
    assert len(part) == 1 and part.image_ids == [2] and np.array_equal(part.objects(0).boxes, objects.boxes)
    assert len(dataset.subset(np.zeros(0, int))) == 0
    # The identity is that of images and objects, wherever they lie.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert read(elsewhere, data).identity() == dataset.identity()
    data["annotations"][0]["bbox"][0] = 2
    assert read(elsewhere, data).identity() != dataset.identity()
    polygon = [annotation(1, segmentation=SQUARE)]
    with_masks = read(elsewhere, content(polygon), masks=True).identity()
    assert with_masks == read(elsewhere, content(copy.deepcopy(polygon)), masks=True).identity()
    polygon[0]["segmentation"] = [[10, 10, 30, 10, 30, 41, 10, 40]]
    assert read(elsewhere, content(polygon), masks=True).identity() != with_masks
    nothing = content([], 1)
    with pytest.raises(DataError, match="no image has an object"):
        read(elsewhere, nothing).with_objects()


def test_cocos_layout(tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").mkdir()
        (tmp_path / "annotations").mkdir(exist_ok=True)
        path = tmp_path / "annotations" / f"instances_{split}2017.json"
        write(tmp_path / f"{split}2017", content()).rename(path)
    assert len(open_coco(tmp_path, "train")) == len(open_coco(tmp_path, "val")) == 2
    path.rename(tmp_path / "annotations" / "mine.json")
    with pytest.raises(DataError, match=r"no annotation file .*instances_val2017.json; there are .*mine.json"):
        open_coco(tmp_path, "val")
    for given in ("annotations/mine.json", str(tmp_path / "annotations" / "mine.json")):
        dataset = open_coco(tmp_path, given, "train2017", said="val")
        assert len(dataset) == 2 and dataset.split == "val"
    with pytest.raises(DataError, match="no folder .*nowhere"):
        open_coco(tmp_path, given, "nowhere")


@pytest.mark.parametrize(
    "file, images",
    [("train/_annotations.coco.json", "train"), ("train.json", "train"), ("annotations/instances_mine.json", "mine"),
     ("labels/a.json", "images"), ("a.json", ".")],
)  # fmt: skip
def test_other_layouts(tmp_path, file, images):
    (tmp_path / images).mkdir(exist_ok=True)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    write(tmp_path / images, content()).rename(tmp_path / file)
    assert open_coco(tmp_path, file).root == tmp_path / images
    (tmp_path / images / "1.png").unlink()
    with pytest.raises(DataError, match=r"There is no folder|not on disk"):
        open_coco(tmp_path, file)


@pytest.mark.parametrize(
    "text, said",
    [
        ("[1, 2", "is no JSON file"),
        ("", "is no JSON file"),
        ("[" * 100_000, "is no JSON file"),
        ("3", "holds int; expected an object"),
        ('[{"score": 1}]', "looks like a file of results"),
        ('{"images": []}', "no list of objects 'annotations'"),
        ('{"images": [1], "annotations": [], "categories": []}', "no list of objects 'images'"),
        ('{"images": [], "annotations": [], "categories": []}', "has no categories"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "has no images"),
    ],
)
def test_other_files_are_refused(tmp_path, text, said):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=said) as caught:
        CocoDataset(tmp_path / "a.json", tmp_path)
    assert "a.json" in str(caught.value)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda d: d["annotations"][1].update(category_id=9), "annotation 2 has the category 9.*1 cat, 2 dog"),
        (lambda d: d["annotations"][1].pop("category_id"), "annotation 2 has the category None"),
        (lambda d: d["annotations"][1].update(category_id="2"), "annotation 2 has the category '2'"),
        (lambda d: d["annotations"][1].update(category_id=[2]), "annotation 2 has the category None"),
        (lambda d: d["annotations"][1].update(bbox=[1, 2, 3]), r"annotation 2 has the box \[1, 2, 3\]: expected four"),
        (lambda d: d["annotations"][1].update(bbox=[1, 2, 3, None]), "annotation 2 has the box"),
        (lambda d: d["annotations"][1].update(bbox=[1, 2, 3, float("nan")]), "annotation 2 has the box"),
        (lambda d: d["annotations"][1].update(bbox=[1, 2, 3, "4"]), "annotation 2 has the box"),
        (lambda d: d["annotations"][1].pop("bbox"), "annotation 2 has the box None"),
        (lambda d: d["annotations"][1].update(iscrowd=2), "annotation 2 has iscrowd 2"),
        (lambda d: d["annotations"][1].update(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "annotation 2: .*7 numbers.*odd"),
        (lambda d: d["annotations"][1].update(segmentation=[[1, 2, 3, 4, 5, None]]), "annotation 2: .*no finite"),
        (lambda d: d["annotations"][1].update(segmentation=[SQUARE[0], 5]), "annotation 2: .*5 where a polygon"),
        (lambda d: d["annotations"][1].update(segmentation={"size": [1, 2]}), "annotation 2: .*expected a list"),
        (lambda d: d["annotations"][1].update(segmentation="abc"), "annotation 2: .*is str"),
        (lambda d: d["categories"][1].update(id=1), "several categories have the id 1"),
        (lambda d: d["categories"][1].update(name="cat"), "several categories have the name cat"),
        (lambda d: d["categories"][1].pop("name"), "category 2 has no name"),
        (lambda d: d["categories"][1].update(id=None), "a category has the id None"),
        (lambda d: d["images"][1].update(id=1), "several images have the id 1"),
        (lambda d: d["images"][1].pop("file_name"), "image 2 has no file_name"),
        (lambda d: d["images"][1].update(id=[1]), "an image has the id None"),
        (lambda d: [a.update(image_id=str(a["id"])) for a in d["annotations"]], "the images '1', '2', .*are 1, 2"),
        (lambda d: [a.update(image_id="x") for a in d["annotations"]], "no annotation is of an image.*are 1, 2"),
    ],
)  # fmt: skip
def test_a_damaged_annotation_is_named(tmp_path, change, said):
    data = content()
    write(tmp_path, data)
    change(data)
    with pytest.raises(DataError, match=said) as caught:
        CocoDataset(write(tmp_path, data, make_images=False), tmp_path)
    assert "a.json" in str(caught.value)


def test_a_name_that_no_file_can_have(tmp_path):
    data = content()
    write(tmp_path, data)
    for name in ("\ud800.png", "a" * 5000):
        data["images"][1]["file_name"] = name
        (tmp_path / "a.json").write_text(json.dumps(data))
        with pytest.raises(DataError, match=r"1 of the 2 images .* not on disk"):
            CocoDataset(tmp_path / "a.json", tmp_path)


def test_annotations_of_images_that_are_not_there(tmp_path):
    dataset = read(tmp_path, content([annotation(1), annotation(2, 99)]))
    assert len(dataset.boxes) == 1 and "1 annotations are left out, since their image is not in the file: 2" in warned(
        dataset
    )


@pytest.mark.fault("coco-ids")
def test_names_are_utf8_whatever_the_locale(tmp_path):  # G1
    data = content(categories=((1, "Fußgänger"), (2, "自行车")))
    data["images"][1]["file_name"] = "größe 图.png"
    write(tmp_path, data)
    program = (
        "from mindska.detection.coco import CocoDataset\n"
        f"dataset = CocoDataset({str(tmp_path / 'a.json')!r}, {str(tmp_path)!r})\n"
        "assert dataset.load(1).size == (100, 80)\n"
        "print(ascii(dataset.class_names))"
    )
    ascii_only = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX"}
    for settings in ({"PYTHONUTF8": "0", "LC_ALL": "C"}, ascii_only, {"PYTHONUTF8": "1"}):
        run = subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, **settings}, capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == ascii(["Fußgänger", "自行车"])
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    (tmp_path / "a.json").write_text(text, encoding="utf-8-sig")  # Windows puts a mark in front
    assert CocoDataset(tmp_path / "a.json", tmp_path).class_names[0] == "Fußgänger"
    (tmp_path / "a.json").write_text(text, encoding="gbk", errors="replace")
    with pytest.raises(DataError, match=r"is not UTF-8 \(byte"):
        CocoDataset(tmp_path / "a.json", tmp_path)


@pytest.mark.fault("coco-ids")
@pytest.mark.parametrize("ids", [(0, 1), (1, 2), (7, 90), (90, 7), ("a", "b")])  # G2
def test_any_category_ids(tmp_path, ids):
    data = content([annotation(1, 1, ids[0]), annotation(2, 2, ids[1])], categories=zip(ids, ("cat", "dog")))
    dataset = read(tmp_path, data)
    evaluator = perfect(dataset, CocoEvaluator(dataset))
    assert evaluator.figures()["bbox"]["AP"] == pytest.approx(1)
    assert [result["category_id"] for result in evaluator.results()] == list(ids)
    assert sorted(dataset.object_labels.tolist()) == [0, 1]


@pytest.mark.fault("coco-ids")
def test_numbers_with_a_point_are_ids(tmp_path):  # G2
    data = content([annotation(1, 1, 3.0), annotation(2, 2.0, 4)], categories=((3, "cat"), (4.0, "dog")))
    data["images"][0]["id"] = 1.0
    dataset = read(tmp_path, data)
    assert (dataset.category_ids, dataset.image_ids, dataset.object_labels.tolist()) == ([3, 4], [1, 2], [0, 1])


@pytest.mark.fault("coco-ids")
def test_a_category_that_is_only_a_parent(tmp_path):  # G3
    data = content(categories=((0, "animals"), (1, "cat"), (2, "dog")))
    for category in data["categories"][1:]:
        category["supercategory"] = "animals"
    data["categories"][0]["supercategory"] = "none"
    dataset = read(tmp_path, data)
    assert dataset.class_names == ["cat", "dog"] and "category 0 animals" in warned(dataset) and ap(dataset) == 1
    # COCO's person is the parent of itself, and another without boxes is a class all the same.
    data = content([annotation(1)], categories=((1, "cat"), (2, "dog")))
    data["categories"][1]["supercategory"] = "dog"
    assert read(tmp_path, data).class_names == ["cat", "dog"]
    # The parent may be called as its child is; and one with boxes is a class.
    data = content(categories=((0, "cat"), (1, "cat"), (2, "dog")))
    data["categories"][1]["supercategory"] = "cat"
    assert read(tmp_path, data).category_ids == [1, 2]
    data = content([annotation(1), annotation(2, 2, 2)], categories=((1, "cat"), (2, "dog")))
    data["categories"][0]["supercategory"] = "dog"
    assert read(tmp_path, data).class_names == ["cat", "dog"]


@pytest.mark.fault("coco-ids")
def test_categories_are_training_s_by_name(tmp_path):  # G4
    train = read(tmp_path, content())
    data = content()
    data["categories"].reverse()
    val = read(tmp_path, data, categories=train.categories)
    assert val.class_names == train.class_names and np.array_equal(val.object_labels, train.object_labels)
    assert ap(val) == 1
    # Other ids: by the names, and results have this file's.
    data = content([annotation(1, 1, 5), annotation(2, 2, 4)], categories=((4, "dog"), (5, "cat")))
    val = read(tmp_path, data, categories=train.categories)
    assert val.object_labels.tolist() == [0, 1] and val.category_ids == [5, 4]
    # A class less is said, one more is refused if it has objects.
    val = read(tmp_path, content([annotation(1)], categories=((1, "cat"),)), categories=train.categories)
    assert val.class_names == ["cat", "dog"] and "classes of training are not among its categories: dog" in warned(val)
    three = ((1, "cat"), (2, "dog"), (3, "horse"))
    val = read(tmp_path, content(categories=three), categories=train.categories)
    assert val.class_names == ["cat", "dog"] and "does not have, and without objects: horse" in warned(val)
    with pytest.raises(DataError, match="categories that the training set does not have: horse"):
        read(tmp_path, content([annotation(1, 1, 3)], categories=three), categories=train.categories)
    with pytest.raises(DataError, match="2 is 'mouse' here and 'dog' there"):
        read(tmp_path, content(categories=((1, "cat"), (2, "mouse"))), categories=train.categories)


@pytest.mark.fault("coco-ids")
def test_repeated_annotation_ids_lose_no_box(tmp_path):  # G5
    same = [annotation(0, 1), annotation(0, 1, 2, (50, 10, 20, 20)), annotation(0, 2), annotation(3, 2, 2)]
    dataset = read(tmp_path, content(same))
    assert len(dataset.boxes) == 4 and ap(dataset) == 1
    assert "1 annotation ids are repeated (0): annotations are numbered anew, and none is lost" in warned(dataset)


@pytest.mark.fault("coco-boxes")
def test_boxes_without_area_are_left_out_and_counted(tmp_path):  # G6
    flat = [annotation(11, box=(5, 5, 0, 9)), annotation(12, box=(5, 5, 9, 0)), annotation(13, box=(5, 5, 1e-9, 9))]
    dataset = read(tmp_path, content([*flat, annotation(14)]))
    assert dataset.annotation_ids == [14]
    assert "3 boxes without area are left out (annotations 11, 12, 13)" in warned(dataset)
    assert "box of zeros" not in warned(dataset)


@pytest.mark.fault("coco-boxes")
def test_a_box_of_zeros_for_an_empty_image(tmp_path):  # G45
    dataset = read(tmp_path, content([annotation(1, box=(0, 0, 0, 0)), annotation(2, 2)]))
    assert len(dataset.objects(0).boxes) == 0 and len(dataset.with_objects()) == 1
    assert "an image without objects needs no annotation, and no box of zeros" in warned(dataset)


@pytest.mark.fault("coco-boxes")
def test_corners_in_the_place_of_sizes(tmp_path):  # G7
    corners = [annotation(i, box=(40 + i, 30, 80 + i, 70)) for i in range(10)]
    with pytest.raises(DataError, match="boxes look like x1, y1, x2, y2.*10 of 10.*annotations 0, 1"):
        read(tmp_path, content(corners))
    with pytest.raises(DataError, match="1 boxes have a negative width or height .annotations 2"):
        read(tmp_path, content([annotation(1), annotation(2, box=(10, 40, 20, -30))]))
    # Small ones in the upper left corner would stay within the image: their polygons tell.
    with pytest.raises(DataError, match=r"annotation 3: \[0.5, .*look like shares of the image; expected .* in pixels"):
        read(tmp_path, content([annotation(3, box=(0.5, 0.5, 0.2, 0.3)), annotation(4, box=(0, 0, 1, 1))]))
    small = [annotation(i, box=(10, 10, 30, 40), segmentation=SQUARE) for i in range(5)]
    with pytest.raises(DataError, match="look like x1, y1, x2, y2: 5 polygons fit them so"):
        read(tmp_path, content(small))
    sound = [annotation(i, box=(10, 10, 20, 30), segmentation=SQUARE) for i in range(5)]
    assert len(read(tmp_path, content(sound)).boxes) == 5


@pytest.mark.fault("coco-boxes")
def test_boxes_beyond_the_border_are_cut(tmp_path):  # G8
    boxes = [(-3, -2, 20, 30), (90, 70, 12, 13), (0, 0, 101, 81), (100, 10, 5, 5), (-9, 3, 9, 9), (10, 10, 5, 5)]
    dataset = read(tmp_path, content([annotation(i, box=box) for i, box in enumerate(boxes)]))
    assert dataset.objects(0).boxes.tolist() == [[0, 0, 17, 28], [90, 70, 100, 80], [0, 0, 100, 80], [10, 10, 15, 15]]
    assert "3 boxes reach beyond their image and are cut (annotations 0, 1, 2)" in warned(dataset)
    assert "2 boxes wholly outside of their image are left out (annotations 3, 4)" in warned(dataset)
    polygon = [[-5, -5, 20, -5, 20, 20, -5, 20]]
    dataset = read(tmp_path, content([annotation(1, box=(-5, -5, 25, 25), segmentation=polygon)]), masks=True)
    assert dataset.mask(0).sum() == 400 and dataset.mask(0)[:20, :20].all()
    far = [[-1e12, -1e12, 1e12, -1e12, 1e12, 1e12, -1e12, 1e12]]
    dataset = read(tmp_path, content([annotation(1, box=(0, 0, 100, 80), segmentation=far)]), masks=True)
    assert dataset.mask(0).all()


@pytest.mark.fault("coco-masks")
def test_short_polygons_are_left_out(tmp_path):  # G9
    both = [[5, 5, 20, 20], *SQUARE]
    data = content([annotation(1, segmentation=both), annotation(2, segmentation=[[1, 2, 3, 4]]), annotation(3)])
    dataset = read(tmp_path, data)
    assert len(dataset.boxes) == 3 and np.array_equal(dataset.mask(0), decode(SQUARE, (80, 100)))
    assert "polygons of fewer than three points are left out, of 2 annotations: 1, 2" in warned(dataset)
    dataset = read(tmp_path, data, masks=True)
    assert dataset.annotation_ids == [1] and "2 objects have no mask and are left out (annotations 2, 3)" in warned(
        dataset
    )
    with pytest.raises(DataError, match="no annotation has a segmentation"):
        read(tmp_path, content(), masks=True)


@pytest.mark.fault("coco-masks")
def test_polygons_and_run_lengths_are_the_same_mask(tmp_path):  # G10
    mask = decode(SQUARE, (80, 100))
    hollow = mask.copy()
    hollow[20:25, 15:20] = 0
    for one in (mask, hollow):
        flat = one.T.reshape(-1)
        ends = np.flatnonzero(np.diff(flat)) + 1
        counts = np.diff([0, *ends, flat.size]).tolist()
        text = as_json(encode(one[None])[0])
        assert _runs(text["counts"]) == counts
        masks = [dict(size=[80, 100], counts=counts), text]
        if one is mask:
            masks += [SQUARE, SQUARE[0], [[float(number) for number in SQUARE[0]]]]
        dataset = read(
            tmp_path, content([annotation(i, segmentation=each) for i, each in enumerate(masks)]), masks=True
        )
        for number in range(len(masks)):
            assert np.array_equal(dataset.mask(number), one) and dataset.mask(number).dtype == np.uint8
        assert ap(dataset, "segm") == 1


@pytest.mark.fault("coco-masks")
@pytest.mark.parametrize(
    "segmentation, said",
    [
        (dict(size=[100, 80], counts=[8000]), "of 80x100 pixels.*height and width exchanged; the image has 100x80"),
        (dict(size=[10, 10], counts=[100]), "of 10x10 pixels"),
        (dict(counts=[8000]), "have no size"),
        (dict(size=[80], counts=[8000]), "run lengths are of 80 pixels"),
        (dict(size=[80, 100], counts=[10, 20]), "are 30 pixels together; the image has 8,000"),
        (dict(size=[80, 100], counts=[10, -20, 8010]), "negative or not whole"),
        (dict(size=[80, 100], counts=[8000.0]), "negative or not whole"),
        (dict(size=[80, 100], counts="PPPPPPPPPPPP"), "no string of COCO's"),
        (dict(size=[80, 100], counts="0\x00"), "no string of COCO's"),
        (dict(size=[80, 100], counts="ä"), "no string of COCO's"),
        (dict(size=[80, 100], counts="oooooo0"), "pixels together|no string|negative"),
        (dict(size=[80, 100], counts="P"), "end in the middle|no string"),
        (dict(size=[80, 100], counts=5), "no string of COCO's"),
        (dict(size=[80, 100], counts=2**70), "no string of COCO's"),
        (dict(size=[80, 100], counts={}), "no string of COCO's"),
    ],
)
def test_damaged_run_lengths_never_reach_pycocotools(tmp_path, segmentation, said):
    dataset = read(tmp_path, content([annotation(41, segmentation=segmentation)]), masks=True)
    with pytest.raises(DataError, match=f"annotation 41: .*({said})") as caught:
        dataset.mask(0)
    assert "a.json" in str(caught.value)


@pytest.mark.fault("coco-masks")
def test_area_and_iscrowd_may_be_missing(tmp_path):  # G11
    data = content([annotation(1, segmentation=SQUARE), annotation(2, 2, 2)])
    whole = read(tmp_path, data)
    for each in data["annotations"]:
        del each["area"], each["iscrowd"]
    bare = read(tmp_path, data)
    assert [bare.area(0), bare.area(1)] == [600, 600] and not bare.crowd.any()
    figures = [perfect(one, CocoEvaluator(one)).figures()["bbox"] for one in (whole, bare)]
    assert json.dumps(figures[0]) == json.dumps(figures[1])  # nan and all
    data["annotations"][0]["segmentation"] = [[10, 10, 30, 10, 30, 40]]  # half of the box
    assert read(tmp_path, data).area(0) == pytest.approx(300, abs=25)
    read(tmp_path, data).segmentations[0] = None
    data["annotations"][1].update(area=None, iscrowd=None)
    assert read(tmp_path, data).area(1) == 600


def turned_jpeg(path: Path, orientation: int = 6) -> None:
    image = Image.new("RGB", (100, 80))
    exif = image.getexif()
    exif[274] = orientation
    image.save(path, exif=exif)


@pytest.mark.fault("coco-files")
def test_a_turned_jpeg(tmp_path):  # G12
    data = content([annotation(1)], 1)
    data["images"][0]["file_name"] = "1.jpg"
    turned_jpeg(tmp_path / "1.jpg")
    assert read(tmp_path, data).load(0).size == (100, 80)  # as it is stored
    with pytest.raises(DataError, match=r"say 100x80.*file has 80x100.*exchanged.*exif_orientation is on; turn it off"):
        read(tmp_path, data, exif_orientation=True)
    data["images"][0].update(width=80, height=100)
    with pytest.raises(
        DataError, match=r"1.jpg: .*say 80x100 .*file has 100x80; .*exif_orientation is off; turn it on"
    ):
        read(tmp_path, data)
    assert read(tmp_path, data, exif_orientation=True).load(0).size == (80, 100)


@pytest.mark.fault("coco-files")
@pytest.mark.parametrize("missing", [-1, 0, None, "absent"])
def test_sizes_that_the_file_does_not_say(tmp_path, missing):  # G13
    data = content()
    write(tmp_path, data)
    for side in ("width", "height"):
        if missing == "absent":
            del data["images"][0][side]
        else:
            data["images"][0][side] = missing
    dataset = CocoDataset(write(tmp_path, data, make_images=False), tmp_path)
    assert dataset.widths_heights.tolist() == [[100, 80], [100, 80]]
    assert "1 images have no size in the file: it is read from them" in warned(dataset)


@pytest.mark.fault("coco-files")
@pytest.mark.parametrize("size, said", [((80, 100), "exchanged"), ((200, 160), "was resized")])
def test_a_size_that_is_not_the_image_s(tmp_path, size, said):  # G13
    Image.new("RGB", size).save(tmp_path / "1.png")
    with pytest.raises(DataError, match=rf"1.png: the annotations say 100x80 .*file has {size[0]}x{size[1]}; .*{said}"):
        read(tmp_path, content())


def test_a_size_is_compared_when_an_image_is_read(tmp_path, monkeypatch):
    dataset = read(tmp_path, content())
    Image.new("RGB", (50, 50)).save(dataset.paths[1])
    with pytest.raises(DataError, match="2.png: the annotations say 100x80 .*file has 50x50"):
        dataset.load(1)


@pytest.mark.fault("coco-files")
def test_names_written_on_windows(tmp_path):  # G14
    (tmp_path / "sub" / "dir").mkdir(parents=True)
    data = content(images=3)
    names = ["sub\\dir\\1.png", "sub/2.png", "..\\images\\3.png"]
    folder = tmp_path / "images"
    folder.mkdir()
    for image, name in zip(data["images"], names):
        image["file_name"] = name
        path = folder / name.replace("\\", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100, 80)).save(path)
    path = write(tmp_path, data, make_images=False)
    dataset = CocoDataset(path, folder)
    assert [dataset.load(i).size for i in range(3)] == [(100, 80)] * 3
    (folder / "sub" / "dir" / "1.png").unlink()
    with pytest.raises(DataError, match=r"1 of the 3 images.*not on disk: .*images/sub/dir/1.png"):
        CocoDataset(path, folder)


@pytest.mark.fault("coco-files")
def test_images_that_are_not_on_disk(tmp_path):  # G15
    data = content([annotation(i, i) for i in range(1, 10)], 9)
    path = write(tmp_path, data)
    for number in (2, 5, 6, 7, 8, 9):
        (tmp_path / f"{number}.png").unlink()
    with pytest.raises(DataError, match=r"6 of the 9 images of .*a.json are not on disk: .*2.png, .* and 1 more"):
        CocoDataset(path, tmp_path)
    dataset = CocoDataset(path, tmp_path, skip_missing=True)
    assert dataset.image_ids == [1, 3, 4] and dataset.annotation_ids == [1, 3, 4] and "6 of the 9" in warned(dataset)
    assert [len(dataset.objects(i).boxes) for i in range(3)] == [1, 1, 1]
    for number in (1, 3, 4):
        (tmp_path / f"{number}.png").unlink()
    with pytest.raises(DataError, match="9 of the 9 images"):
        CocoDataset(path, tmp_path, skip_missing=True)


@pytest.mark.fault("any-image")
def test_all_kinds_of_pixels_become_rgb(tmp_path):  # G37
    data = content([annotation(1)], 6)
    for image, mode in zip(data["images"], ("RGBA", "L", "CMYK", "P", "1", "LA")):
        image["file_name"] = f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (100, 80)).save(tmp_path / image["file_name"])
    dataset = read(tmp_path, data)
    assert {dataset.load(i).mode for i in range(6)} == {"RGB"}


# ------------------------------------------------------------------------------------------- figures


@pytest.fixture(scope="module")
def coco_a(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco_a")
    for image in json.loads((GOLDENS / "coco_a_gt.json").read_text())["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(folder / image["file_name"])
    return folder


def figures_of(folder: Path, truth: dict, results: list, kinds=("bbox",), **options) -> dict:
    path = folder / "truth.json"
    path.write_text(json.dumps(truth))
    evaluator = CocoEvaluator(CocoDataset(path, folder, masks="segm" in kinds), kinds, **options)
    evaluator.add_results(results)
    return evaluator.figures()


def golden_coco() -> tuple[dict, list, dict]:
    return tuple(json.loads((GOLDENS / f"coco_a_{name}.json").read_text()) for name in ("gt", "dt", "expected"))


def test_the_twelve_figures_are_pycocotools(coco_a):
    truth, results, expected = golden_coco()
    figures = figures_of(coco_a, truth, results, ("bbox", "segm"))
    for kind in ("bbox", "segm"):
        assert {name: figures[kind][name] for name in expected[kind]} == pytest.approx(expected[kind], abs=1e-12)
        for category, value in expected[f"{kind}_AP_per_category"].items():
            found = figures[kind]["AP_per_category"][f"class{category}"]
            assert math.isnan(found) if value is None else found == pytest.approx(value, abs=1e-12)
    assert (figures["images"], figures["objects"]) == (12, 60)
    assert "n/a" in table(figures, per_class=True) and "AP 23.1" in table(figures)
    for annotation_ in truth["annotations"]:
        annotation_["iscrowd"] = 0
    found = figures_of(coco_a, truth, results)["bbox"]
    assert {name: found[name] for name in expected["bbox"]} == pytest.approx(expected["bbox_no_crowd_flags"], abs=1e-12)


@pytest.mark.fault("coco-figures")
def test_the_main_ap_is_that_of_the_largest_limit(coco_a):  # G28
    truth, results, expected = golden_coco()
    found = figures_of(coco_a, truth, results, max_detections=(1, 2, 3))["bbox"]
    golden = expected["bbox_maxdets_1_2_3"]
    for own, name in (("AR_1", "AR_1"), ("AR_2", "AR_10"), ("AR_3", "AR_100")):
        assert found[own] == pytest.approx(golden[name], abs=1e-12)
    for name in ("AP50", "AP75", "AP_small", "AP_large", "AR_medium"):
        assert found[name] == pytest.approx(golden[name], abs=1e-12)
    assert golden["AP"] == -1 and 0 < found["AP"] < expected["bbox"]["AP"]
    for limits in ((), (0, 5), (10, 1), (5, 5)):
        with pytest.raises(SettingError, match="rising numbers"):
            figures_of(coco_a, truth, results, max_detections=limits)


@pytest.mark.fault("coco-figures")
def test_more_objects_than_count_are_said(tmp_path, caplog):  # G28
    boxes = [annotation(i, box=(i % 10 * 10, i // 10 * 6, 8, 5)) for i in range(130)]
    dataset = read(tmp_path, content(boxes))
    with caplog.at_level(logging.WARNING, "mindska"):
        evaluator = CocoEvaluator(dataset)
    assert "1 images have more objects than the 100 detections" in caplog.text
    caplog.clear()
    larger = CocoEvaluator(dataset, max_detections=(1, 10, 200))
    assert not caplog.text
    assert perfect(dataset, evaluator).figures()["bbox"]["AP"] < 0.8
    figures = perfect(dataset, larger).figures()
    assert figures["bbox"]["AP"] == pytest.approx(1) and "at most 200 detections" in table(figures)


@pytest.mark.fault("coco-figures")
def test_ranks_that_repeat_images(coco_a):  # G24
    truth, results, _ = golden_coco()
    truth = copy.deepcopy(truth)
    first = truth["images"][0]
    for number in range(9):  # 21 images
        truth["images"].append(dict(first, id=1000 + number))
    path = coco_a / "many.json"
    path.write_text(json.dumps(truth))
    dataset = CocoDataset(path, coco_a)
    alone = CocoEvaluator(dataset)
    alone.add_results(results)
    ranks = [CocoEvaluator(dataset) for _ in range(2)]
    for rank, evaluator in enumerate(ranks):
        for position in range(rank, 22, 2):  # the second rank pads with the first image
            index = position % 21
            found = alone.found[index]
            boxes = found["boxes"]
            corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
            evaluator.update(index, Detections(corners, found["scores"], found["labels"]))
    whole = CocoEvaluator(dataset)
    whole.merge(json_copy(evaluator.state()) for evaluator in ranks)
    figures, expected = whole.figures(), alone.figures()
    assert figures["images"] == expected["images"] == 21
    assert figures["bbox"]["AP"] == pytest.approx(expected["bbox"]["AP"], abs=1e-9)
    assert len(whole.results()) == len(results)
    ranks[0].update(0, no_detections())  # the first of an image counts
    assert len(ranks[0].found[0]["scores"]) == len(alone.found[0]["scores"])


def json_copy(state):
    return copy.deepcopy(state)


@pytest.mark.fault("coco-figures")
def test_no_ground_truth_is_said(tmp_path):  # G25
    for found in ([], [dict(annotation(1), iscrowd=1)]):
        dataset = read(tmp_path, content(found))
        evaluator = CocoEvaluator(dataset)
        evaluator.update(0, Detections(np.float32([[1, 1, 9, 9]]), np.float32([0.9]), np.int32([0])))
        figures = evaluator.figures()
        assert all(math.isnan(value) for name, value in figures["bbox"].items() if name != "AP_per_category")
        assert "no ground truth of any class" in table(figures) and "AP n/a" in table(figures)
        assert "-1" not in table(figures) and "-100" not in table(figures)


@pytest.mark.fault("coco-figures")
def test_results_of_other_images_or_categories_are_refused(tmp_path):  # G25
    evaluator = CocoEvaluator(read(tmp_path, content()))
    result = dict(image_id=1, category_id=1, bbox=[1, 1, 5, 5], score=0.5)
    for key, said in (
        ("image_id", "1 images are not in .*a.json: 77; it has 1, 2"),
        ("category_id", "1 categories.*77"),
    ):
        with pytest.raises(DataError, match=said):
            evaluator.add_results([result, {**result, key: 77}])
    with pytest.raises(DataError, match="no results of COCO's .KeyError: 'score'"):
        evaluator.add_results([{k: v for k, v in result.items() if k != "score"}])
    for key, value in (("bbox", [1, 2, 3]), ("bbox", None), ("score", float("nan")), ("score", "x")):
        with pytest.raises(DataError, match="no results of COCO's"):
            evaluator.add_results([{**result, key: value}])
    masks = CocoEvaluator(read(tmp_path, content([annotation(1, segmentation=SQUARE)]), masks=True), ("segm",))
    for value in (None, 5, "x", dict(size=[80, 100], counts=[1]), dict(size=[5, 5], counts="1")):
        with pytest.raises(DataError, match="no results of COCO's .SegmentationError"):
            masks.add_results([dict(result, segmentation=value)])
    masks.add_results([dict(image_id=1, category_id=1, score=0.5, segmentation=SQUARE)])  # others write polygons
    assert masks.figures()["segm"]["AP"] == pytest.approx(1)
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(DataError, match=r"r.json holds dict; expected a list of results"):
        evaluator.read_results(tmp_path / "r.json")


@pytest.mark.fault("coco-figures")
def test_annotations_numbered_from_0(tmp_path):  # G26
    data = content([annotation(0), annotation(1, 2, 2)])
    assert ap(read(tmp_path, data)) == 1


@pytest.mark.fault("coco-figures")
def test_nothing_was_detected(tmp_path):  # G27
    for kinds in (("bbox",), ("bbox", "segm")):
        dataset = read(tmp_path, content([annotation(1, segmentation=SQUARE)]), masks="segm" in kinds)
        evaluator = CocoEvaluator(dataset, kinds)
        for index in range(2):
            evaluator.update(index, no_detections((80, 100)))
        figures = evaluator.figures()
        assert all(figures[kind]["AP"] == 0 and figures[kind]["AR_100"] == 0 for kind in kinds)
        assert math.isnan(figures["bbox"]["AP_large"]) and figures["images"] == 2
        assert "nothing was detected in any image" in table(figures) and evaluator.results() == []
        assert math.isnan(CocoEvaluator(dataset, kinds).figures()["bbox"]["AP"])  # of no image at all
    evaluator = CocoEvaluator(dataset)
    evaluator.add_results([])
    assert evaluator.figures()["bbox"]["AP"] == 0


@pytest.mark.fault("coco-figures")
def test_a_false_alarm_in_an_empty_image_counts(tmp_path):  # G29
    dataset = read(tmp_path, content([annotation(1), annotation(2, 2, 2)], 3))
    evaluator = CocoEvaluator(dataset)
    evaluator.update(2, Detections(np.float32([[1, 1, 9, 9]]), np.float32([0.99]), np.int32([0])))
    figures = perfect(dataset, evaluator).figures()
    assert figures["bbox"]["AP"] == pytest.approx(0.75) and figures["images"] == 3
    assert "3 images with 2 objects" in table(figures)


def test_images_that_were_not_looked_at_are_said(tmp_path):
    dataset = read(tmp_path, content())
    evaluator = CocoEvaluator(dataset)
    evaluator.update(0, no_detections())
    assert "1 images of train were not looked at" in table(evaluator.figures())


def test_results_go_out_and_come_back(tmp_path):
    both = [annotation(1, 1, 7, segmentation=SQUARE), annotation(2, 2, 90, segmentation=SQUARE)]
    data = content(both, 2, ((7, "a"), (90, "b")))
    dataset = read(tmp_path, data, masks=True)
    evaluator = perfect(dataset, CocoEvaluator(dataset, ("bbox", "segm")))
    evaluator.write_results(tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results[0]["image_id"] == 1 and results[0]["category_id"] == 7 and results[0]["bbox"] == [10, 10, 20, 30]
    assert results[0]["score"] == 0.9 and isinstance(results[0]["segmentation"]["counts"], str)
    again = CocoEvaluator(dataset, ("bbox", "segm"))
    again.read_results(tmp_path / "results.json")
    assert json.dumps(again.figures()) == json.dumps(evaluator.figures())  # nan and all
    with pytest.raises(WriteError):
        evaluator.write_results(tmp_path / "nowhere" / "results.json")


def test_masks_are_asked_for(tmp_path):
    dataset = read(tmp_path, content([annotation(1, segmentation=SQUARE)]))
    with pytest.raises(DataError, match="opened without its masks"):
        CocoEvaluator(dataset, ("segm",))
    with pytest.raises(SettingError, match="expected bbox, segm or both"):
        CocoEvaluator(dataset, ("box",))
    evaluator = CocoEvaluator(read(tmp_path, content([annotation(1, segmentation=SQUARE)]), masks=True), ("segm",))
    with pytest.raises(DataError, match="segm needs masks"):
        evaluator.update(0, Detections(np.float32([[1, 1, 9, 9]]), np.float32([0.9]), np.int32([0])))


def test_without_pycocotools_the_message_says_what_to_install(tmp_path, monkeypatch):
    dataset = read(tmp_path, content([annotation(1, segmentation=SQUARE)]))
    for name in [name for name in sys.modules if name.split(".")[0] == "pycocotools"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    for use in (lambda: CocoEvaluator(dataset), lambda: dataset.mask(0)):
        with pytest.raises(DataError, match=r"pip install 'mindska\[detection\]'"):
            use()
    assert len(dataset.objects(0).boxes) == 1  # boxes need none
