"""Images with masks: which belong together, what a mask's numbers mean, and what is refused before it is learnt."""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mindska.data.images import read_image
from mindska.data.loader import Damaged
from mindska.errors import DataError
from mindska.segmentation import datasets
from mindska.segmentation.class_names import ADE20K, PASCAL_VOC
from mindska.segmentation.datasets import (
    open_segmentation_dataset,
    open_training_and_validation,
    split_segmentation_by_ratio,
)
from mindska.segmentation.masks import MaskError, mask_size, read_mask, to_labels

NUMBERS = np.array([[0, 1, 2, 3], [3, 2, 1, 255]], np.uint8)


def palette_image(numbers: np.ndarray) -> Image.Image:
    image = Image.fromarray(numbers.astype(np.uint8))
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    assert image.mode == "P"
    return image


def write_pair(folder: Path, image: str, mask: str, numbers: np.ndarray = NUMBERS, kind: str = "RGB") -> None:
    """An image, and a mask unless its name is empty."""
    height, width = numbers.shape
    pixels = np.random.default_rng(zlib.crc32(image.encode())).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for name in filter(None, (image, mask)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(kind).save(folder / image)
    if mask:
        Image.fromarray(numbers).save(folder / mask)


def write_folders(root: Path, train: int = 3, val: int = 2, names: str = "sky\ntree\ncar\nroad\n") -> Path:
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            write_pair(root, f"images/{split}/{i}.png", f"masks/{split}/{i}.png")
    (root / "classes.txt").write_text(names, encoding="utf-8")
    return root


def grey_png(numbers: np.ndarray, bits: int) -> bytes:
    """A grey PNG with so many bits a pixel, as optimisers of PNG files write it; Pillow writes no such."""
    height, width = numbers.shape
    rows = b""
    for row in numbers:
        text = "".join(f"{value:0{bits}b}" for value in row.tolist())
        text += "0" * (-len(text) % 8)
        rows += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


# ------------------------------------------------------------------------------------------------- masks


@pytest.mark.fault("mask-files")
def test_a_mask_is_read_as_its_numbers_whatever_file_holds_them(tmp_path):
    wide = np.array([[0, 1, 300, 256], [65535, 2, 1, 255]], np.uint16)
    files = {
        "grey.png": Image.fromarray(NUMBERS),
        "palette.png": palette_image(NUMBERS),
        "palette.bmp": palette_image(NUMBERS),
        "grey.tif": Image.fromarray(NUMBERS),
        "grey.pgm": Image.fromarray(NUMBERS),
    }
    for name, image in files.items():
        image.save(tmp_path / name)
        np.testing.assert_array_equal(read_mask(tmp_path / name), NUMBERS, err_msg=name)
        assert mask_size(tmp_path / name) == NUMBERS.shape
    for name, image in (("wide.png", Image.fromarray(wide)), ("wide.tif", Image.fromarray(wide)),
                        ("deep.tif", Image.fromarray(wide.astype(np.int32)))):  # fmt: skip
        image.save(tmp_path / name)
        np.testing.assert_array_equal(read_mask(tmp_path / name), wide, err_msg=name)
    for bits in (1, 2, 4, 8, 16):  # Pillow spreads grey of 2 and 4 bits over 0 to 255
        numbers = np.arange(15).reshape(3, 5) % (1 << bits)
        (tmp_path / "bits.png").write_bytes(grey_png(numbers, bits))
        np.testing.assert_array_equal(read_mask(tmp_path / "bits.png"), numbers, err_msg=f"{bits} bits")
    numbers = np.arange(8).reshape(2, 4)
    palette_image(numbers).save(tmp_path / "palette.gif")
    np.testing.assert_array_equal(read_mask(tmp_path / "palette.gif"), numbers)
    binary = Image.fromarray(NUMBERS == 1)
    for name in ("binary.png", "binary.tif", "binary.bmp"):
        binary.save(tmp_path / name)
        np.testing.assert_array_equal(read_mask(tmp_path / name), NUMBERS == 1, err_msg=name)


@pytest.mark.fault("mask-files")
def test_labels_of_8_and_16_bits_are_equal_and_int32(tmp_path):
    for kind in (np.uint8, np.uint16):
        Image.fromarray(NUMBERS.astype(kind)).save(tmp_path / "mask.png")
        labels = to_labels(read_mask(tmp_path / "mask.png"), 4, False, "mask.png")
        assert labels.dtype == np.int32
        np.testing.assert_array_equal(labels, NUMBERS)


@pytest.mark.fault("mask-numbers")
def test_reduce_zero_label_shifts_all_but_what_is_ignored():
    numbers = np.array([[0, 1, 2, 150, 255]])
    for kind in (np.uint8, np.uint16, np.int32):
        assert to_labels(numbers.astype(kind), 150, True, "m").tolist() == [[255, 0, 1, 149, 255]]
    with pytest.raises(MaskError, match=r"m holds 151 in 1 pixels; expected 1 to 150 \(150 classes, reduce_zero_label "
                       r"true, 0 is ignored\) or 255"):  # fmt: skip
        to_labels(np.array([[151, 3]], np.uint8), 150, True, "m")
    with pytest.raises(MaskError, match=r"m holds 256 in 2 pixels; expected 1 to 254"):
        to_labels(np.array([[256, 256, 0]], np.uint16), 254, True, "m")  # not 255, which would be ignored


@pytest.mark.fault("mask-numbers")
@pytest.mark.parametrize(
    "numbers, classes, said",
    [
        ([[4, 4, 9, 0]], 4, r"m holds 4 in 2 pixels, 9 in 1 pixels; expected 0 to 3 \(4 classes, reduce_zero_label "
         r"false\) or 255 \(ignored\): the classes are more than the names"),
        ([[1, 2, 3, 4]], 4, "--reduce_zero_label true makes 1 the first"),
        ([[0, 257]], 4, "m holds 257 in 1 pixels"),  # in 8 bits it would be 1
        ([[0, -1]], 4, "m holds -1 in 1 pixels"),
        ([[0, 70000]], 4, "m holds 70000 in 1 pixels"),
        ([[0, 65535]], 2, "such masks are pictures: divide them by their white"),
        ([[0, 128]], 2, "such masks are pictures"),
    ],
)  # fmt: skip
def test_a_number_beyond_the_classes_is_refused(numbers, classes, said):
    with pytest.raises(MaskError, match=said):
        to_labels(np.array(numbers, np.int32), classes, False, "m")


@pytest.mark.fault("mask-files")
def test_what_is_no_mask_is_refused_with_what_to_do(tmp_path):
    grey = Image.fromarray(NUMBERS)
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    jpeg, buffer = tmp_path / "jpeg.png", io.BytesIO()  # told by the content, not by the name
    grey.save(buffer, format="JPEG")
    jpeg.write_bytes(buffer.getvalue())
    grey.save(tmp_path / "webp.webp", lossless=True)
    Image.merge("LA", (grey, grey)).save(tmp_path / "la.png")
    colours.save(tmp_path / "rgb.png")
    grey.convert("RGB").save(tmp_path / "equal.png")
    grey.convert("RGBA").save(tmp_path / "rgba.png")
    Image.fromarray(NUMBERS.astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(NUMBERS == 1).save(tmp_path / "inverted.pbm")
    (tmp_path / "scaled.pgm").write_bytes(b"P5 2 1 20\n\x01\x14")
    for name, said in {
        "jpeg.png": "is a mask in JPEG, which changes the numbers near edges; expected PNG",
        "webp.webp": "is a mask in WebP",
        "la.png": r"with 2 channels \(LA\)",
        "rgb.png": r"with 3 channels \(RGB\); expected one channel .* Colours have to be translated .*first$",
        "equal.png": r"\. Here the three are equal, so that the first may be the mask: .*getchannel\(\"R\"\)",
        "rgba.png": r"with 4 channels \(RGBA\).*Here the three are equal",
        "float.tif": "is a mask of kind F; expected whole numbers of 8 or 16 bits",
        "inverted.pbm": "0 is written as white",
        "scaled.pgm": "numbers are brightness of 20",
    }.items():
        for reader in (read_mask, mask_size):
            with pytest.raises(MaskError, match=f"{name} {said}" if said.startswith("is") else said):
                reader(tmp_path / name)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match="cannot be read") as raised:
        read_mask(tmp_path / "text.png")
    assert not isinstance(raised.value, MaskError)  # another image can take its place
    (tmp_path / "half.png").write_bytes(grey_png(np.zeros((50, 50), int), 8)[:60])
    with pytest.raises(DataError, match="half.png cannot be read"):
        read_mask(tmp_path / "half.png")


def test_a_mask_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    Image.fromarray(NUMBERS).save(tmp_path / "mask.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(DataError, match="4x2 pixels are more than the 5"):
        read_mask(tmp_path / "mask.png")


# ------------------------------------------------------------------------------------------------- layouts


def loaded(dataset):
    return {Path(dataset.member(i)[0]).stem: dataset.load(i)[1].tolist() for i in range(len(dataset))}


def test_ade20k(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    numbers = np.array([[0, 1, 150], [255, 2, 3]], np.uint8)
    for split in ("training", "validation"):
        for i in range(2):
            write_pair(root, f"images/{split}/ADE_{i}.jpg", f"annotations/{split}/ADE_{i}.png", numbers)
    train, val = open_training_and_validation("", tmp_path)
    assert (len(train), len(val)) == (2, 2) and train.class_names == list(ADE20K) and len(ADE20K) == 150
    assert train.load(0)[1].tolist() == [[255, 0, 149], [255, 1, 2]] == val.load(1)[1].tolist()
    assert train.reduce_zero_label and (train.split, val.split) == ("train", "val")
    for dataset in (train, val):
        dataset.check()
    plain = open_segmentation_dataset("ade20k", root, "training", reduce_zero_label=False)
    with pytest.raises(MaskError, match="reduce_zero_label false.*--reduce_zero_label true makes 1 the first"):
        plain.check()
    assert plain.identity() != train.identity()


def test_pascal_voc(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for i, mask in enumerate(("SegmentationClass", "SegmentationClass", "SegmentationClassAug")):
        write_pair(root, f"JPEGImages/2007_{i}.jpg", f"{mask}/2007_{i}.png", NUMBERS + np.uint8(i))
    write_pair(root, "JPEGImages/2007_0.jpg", "SegmentationClassAug/2007_0.png", NUMBERS + np.uint8(9))
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name, lines in {
        "train": "2007_0\n2007_1\n",
        "val": "\ufeff2007_1\r\n\r\n",
        "trainaug": "2007_0\n2007_1\n2007_2",
        "pairs": "/JPEGImages/2007_0.jpg /SegmentationClassAug/2007_0.png\n"
        "JPEGImages\\2007_1.jpg\tSegmentationClass/2007_1.png",
        "wrong": "2007_0\n2007_9\na b c\nJPEGImages/2007_0.jpg SegmentationClass/x.png\n../a.jpg ../b.png\n",
        "empty": "\n",
        "twice": "2007_0\n2007_0\n",
    }.items():
        (lists / f"{name}.txt").write_text(lines, encoding="utf-8")
    train, val = open_training_and_validation("", tmp_path)
    assert loaded(train) == {"2007_0": NUMBERS.tolist(), "2007_1": (NUMBERS + np.uint8(1)).tolist()}
    assert train.class_names == list(PASCAL_VOC) and list(loaded(val)) == ["2007_1"]
    augmented = open_segmentation_dataset("voc", root, "trainaug")
    assert [Path(path).parent.name for path in augmented.mask_paths] == [
        "SegmentationClassAug", "SegmentationClass", "SegmentationClassAug"]  # fmt: skip
    pairs = open_segmentation_dataset("voc", root, str(lists / "pairs.txt"))
    assert loaded(pairs) == {"2007_0": (NUMBERS + np.uint8(9)).tolist(), "2007_1": (NUMBERS + np.uint8(1)).tolist()}
    with pytest.raises(DataError, match="No list test.txt in .*its lists: empty.txt, pairs.txt"):
        open_segmentation_dataset("voc", root, "test")
    with pytest.raises(DataError, match="4 of 5 lines are wrong") as raised:
        open_segmentation_dataset("voc", root, "wrong")
    for said in ("line 2: no image 2007_9 in", "line 3: 'a b c' is no name", "line 4: no mask at",
                 "line 5: '../a.jpg' is outside of"):  # fmt: skip
        assert said in str(raised.value)
    with pytest.raises(DataError, match="0 of 0 lines are wrong; expected the name of an image a line"):
        open_segmentation_dataset("voc", root, "empty")
    with pytest.raises(DataError, match="names 1 images twice"):
        open_segmentation_dataset("voc", root, "twice")
    (root / "classes.txt").write_text("a\nb\nc\nd\n")  # one's own data in VOC's folders
    assert open_segmentation_dataset("voc", root, "train").class_names == ["a", "b", "c", "d"]


def test_a_pair_of_folders_in_every_place(tmp_path):
    first = write_folders(tmp_path / "one")
    train, val = open_training_and_validation("", first)
    there = [loaded(part) for part in (train, val)]
    assert (len(train), len(val)) == (3, 2) and train.class_names == ["sky", "tree", "car", "road"]
    assert str(val).startswith("val: 2 images with masks of 4 classes in")
    second = tmp_path / "two"
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (second / split).mkdir(parents=True, exist_ok=True)
            (first / kind / split).rename(second / split / kind)
    (second / "classes.txt").write_text("sky\ntree\ncar\nroad")
    again = open_training_and_validation("folders", second)
    assert [loaded(part) for part in again] == there
    flat = tmp_path / "flat"
    for i in range(5):
        write_pair(flat, f"images/{i} é.jpg", f"masks/{i} é.png")
    (flat / "classes.txt").write_text("sky\ntree\ncar\nroad")
    with pytest.raises(DataError, match="No 'train' in .*--val_ratio 0.2"):
        open_training_and_validation("", flat)
    parts = open_training_and_validation("", flat, val_ratio=0.4)
    assert [len(part) for part in parts] == [3, 2]
    (flat / "train.txt").write_text("0 é\n1 é.jpg\nimages/2 é.jpg\tmasks/3 é.png", encoding="utf-8")
    listed = open_segmentation_dataset("", flat, "train")
    assert [Path(path).name for path in listed.mask_paths] == ["0 é.png", "1 é.png", "3 é.png"]
    with pytest.raises(DataError, match="No classes.txt in .*one a line"):
        (flat / "classes.txt").unlink()
        open_segmentation_dataset("", flat, "train")


@pytest.mark.fault("pairs")
def test_pairs_are_by_name_whatever_the_order_of_the_listing(tmp_path, monkeypatch):
    root = tmp_path / "data"
    (root / "masks").mkdir(parents=True)
    for i in (3, 1, 10, 2):
        write_pair(root, f"images/train/{i}.jpg", f"masks/train/sub/{i}.png", np.full((2, 4), i, np.uint8))
        (root / "images" / "train" / "sub").mkdir(exist_ok=True)
        (root / "images" / "train" / f"{i}.jpg").rename(root / "images" / "train" / "sub" / f"{i}.jpg")
    (root / "classes.txt").write_text("\n".join(map(str, range(11))))
    dataset = open_segmentation_dataset("", root, "train")
    assert {name: labels[0][0] for name, labels in loaded(dataset).items()} == {str(i): i for i in (1, 2, 3, 10)}
    scandir = os.scandir

    class Reversed:
        def __init__(self, folder):
            with scandir(folder) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(os, "scandir", Reversed)
    again = open_segmentation_dataset("", root, "train")
    assert again.identity() == dataset.identity() and loaded(again) == loaded(dataset)


@pytest.mark.fault("pairs")
def test_names_in_nfc_and_nfd_belong_together(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    write_pair(tmp_path, f"images/train/{nfc}.png", f"masks/train/{nfd}.png")
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd")
    assert len(open_segmentation_dataset("", tmp_path, "train")) == 1


@pytest.mark.fault("pairs")
def test_missing_masks_and_two_of_a_name_are_refused(tmp_path, caplog):
    root = write_folders(tmp_path / "data")
    write_pair(root, "images/train/9.png", "")
    with pytest.raises(DataError, match="1 of 4 images in .*train have no mask in .*a.jpg: a.png") as raised:
        open_segmentation_dataset("", root, "train")
    assert str(raised.value).endswith("images/train/9.png")
    (root / "images" / "train" / "9.png").unlink()
    write_pair(root, "images/train/0.jpg", "")
    with pytest.raises(DataError, match="0.jpg and .*0.png have the same name but for the ending"):
        open_segmentation_dataset("", root, "train")
    (root / "images" / "train" / "0.jpg").unlink()
    Image.fromarray(NUMBERS).save(root / "masks" / "train" / "alone.png")
    assert len(open_segmentation_dataset("", root, "train")) == 3
    assert "1 masks in" in caplog.text and "alone.png" in caplog.text
    for i in range(3):
        (root / "masks" / "train" / f"{i}.png").rename(root / "masks" / "train" / f"{i}_mask.png")
    with pytest.raises(DataError, match="3 of 3 images .*the first mask there is 0_mask.png"):
        open_segmentation_dataset("", root, "train")
    with pytest.raises(DataError, match="No 'test' in"):
        open_segmentation_dataset("", root, "test")
    with pytest.raises(DataError, match="No data folder at"):
        open_segmentation_dataset("", root / "nowhere", "train")
    with pytest.raises(DataError, match="dataset is 'coco'; expected one of ade20k, voc, folders"):
        open_segmentation_dataset("coco", root, "train")


@pytest.mark.fault("pairs")
def test_class_names_are_utf_8_in_any_locale(tmp_path):
    for name in ("é", unicodedata.normalize("NFD", "ö")):
        write_pair(tmp_path, f"images/{name}.png", f"masks/{unicodedata.normalize('NFC', name)}.png")
    (tmp_path / "classes.txt").write_text("\ufeffnoël\n樹\nбуква\n# no class\nwater\n", encoding="utf-8")
    (tmp_path / "train.txt").write_text("\ufeffé\nö\n", encoding="utf-8")
    code = (
        "import sys; from mindska.segmentation.datasets import open_segmentation_dataset as o;"
        "d = o('', sys.argv[1], 'train'); d.load(0), d.load(1);"
        "print(ascii(d.class_names), 'mindspore' in sys.modules)"
    )
    environment = dict(os.environ, PYTHONUTF8="0", LC_ALL="C")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == f"{ascii(['noël', '樹', 'буква', 'water'])} False", done.stderr


@pytest.mark.parametrize("count", [0, 256])
def test_as_many_classes_as_numbers_beside_255(count, tmp_path):
    write_folders(tmp_path, names="\n".join(f"c{i}" for i in range(count)) or "\n")
    with pytest.raises(DataError, match="names no class" if not count else "256 classes; expected 1 to 255"):
        open_segmentation_dataset("", tmp_path, "train")


# ------------------------------------------------------------------------------------------------- before training


@pytest.mark.fault("mask-numbers")
def test_another_size_than_the_image_is_found_before_training(tmp_path):
    root = write_folders(tmp_path, train=200)
    Image.fromarray(NUMBERS[:, :3]).save(root / "masks" / "train" / "137.png")
    dataset = open_segmentation_dataset("", root, "train")
    with pytest.raises(MaskError, match="1 of 200 masks are not as they should be") as raised:
        dataset.check(sample=1)
    said = r"137.png has 4x2 pixels \(width x height\) and its mask .*masks/train/137.png 3x2; expected the same size"
    assert re.search(said, str(raised.value))
    with pytest.raises(MaskError, match=said):
        dataset.load([Path(path).stem for path in dataset.paths].index("137"))
    Image.fromarray(NUMBERS.T.copy()).save(root / "masks" / "train" / "137.png")
    with pytest.raises(MaskError, match="one of them is turned: by an EXIF tag"):
        dataset.check(sample=1)


def test_the_kind_of_every_mask_and_the_numbers_of_some_are_looked_at_before_training(tmp_path):
    root = write_folders(tmp_path, train=100)
    Image.fromarray(NUMBERS).convert("RGB").save(root / "masks" / "train" / "61.png")
    with pytest.raises(MaskError, match="61.png is a mask with 3 channels"):
        open_segmentation_dataset("", root, "train").check(sample=1)
    Image.fromarray(NUMBERS + np.uint8(2)).save(root / "masks" / "train" / "61.png")
    dataset = open_segmentation_dataset("", root, "train")
    dataset.check(sample=2)  # the first and the last
    with pytest.raises(MaskError, match="1 of 100 masks looked at .*") as raised:
        dataset.check(sample=1000)
    assert "61.png holds 4 in 2 pixels, 5 in 2 pixels" in str(raised.value)
    index = [Path(path).stem for path in dataset.paths].index("61")
    with pytest.raises(MaskError, match="61.png holds 4"):
        dataset.load(index)
    # Where most cannot be read, nothing is begun.
    kept = {path: path.read_bytes() for path in (root / "masks" / "train").iterdir()}
    for path in list(kept)[:60]:
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="60 of 100 masks cannot be read"):
        open_segmentation_dataset("", root, "train").check()
    for path, content in kept.items():
        path.write_bytes(content)
    # A damaged file is left to the loader, which may bear it.
    (root / "masks" / "train" / "61.png").write_bytes(b"no image")
    dataset = open_segmentation_dataset("", root, "train")
    dataset.check(sample=1000)
    with pytest.raises(DataError, match="61.png cannot be read"):
        dataset.load(index)


@pytest.mark.fault("mask-files")
def test_two_classes_in_black_and_white_are_refused_before_training(tmp_path):
    root = write_folders(tmp_path, names="background\ncrack\n")
    for path in root.glob("masks/*/*.png"):
        Image.fromarray(np.uint8(NUMBERS == 1) * np.uint8(255)).save(path)
    dataset = open_segmentation_dataset("", root, "train")
    with pytest.raises(MaskError, match="hold 0 and 255 only, and there are two classes; expected 0 and 1.*Divide"):
        dataset.check()
    # 255 beside a 1 is what it is elsewhere, in one image as well: ignored.
    Image.fromarray(np.uint8(NUMBERS == 1)).save(root / "masks" / "train" / "0.png")
    dataset = open_segmentation_dataset("", root, "train")
    dataset.check()
    assert dataset.load(1)[1].max() == 255
    # As it is where the masks are of one class in black and white PNG: there white is 1.
    for path in root.glob("masks/*/*.png"):
        Image.fromarray(NUMBERS == 1).save(path)
    open_segmentation_dataset("", root, "train").check()


@pytest.mark.fault("mask-numbers")
def test_exif_turns_an_image_and_never_its_mask(tmp_path):
    root = write_folders(tmp_path, train=1)
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (4, 2)).save(root / "images" / "train" / "0.jpg", exif=exif)
    (root / "images" / "train" / "0.png").unlink()
    stored = open_segmentation_dataset("", root, "train")
    stored.check()
    assert stored.load(0)[0].size == (4, 2)
    turned = open_segmentation_dataset("", root, "train", exif_orientation=True)
    with pytest.raises(MaskError, match="has 2x4 pixels .*--exif_orientation false"):
        turned.check()
    with pytest.raises(MaskError, match="has 2x4 pixels"):
        turned.load(0)
    Image.fromarray(NUMBERS.T.copy()).save(root / "masks" / "train" / "0.png")
    turned.check()
    assert turned.load(0)[0].size == (2, 4)
    with pytest.raises(MaskError, match="--exif_orientation true turns it"):
        stored.check()


@pytest.mark.fault("any-image")
@pytest.mark.parametrize("kind", ["RGBA", "L", "CMYK", "P", "1", "LA"])
def test_an_image_of_any_kind_becomes_rgb(kind, tmp_path):
    name = "0.tif" if kind == "CMYK" else "0.png"
    write_pair(tmp_path, f"images/train/{name}", "masks/train/0.png", kind=kind)
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd")
    dataset = open_segmentation_dataset("", tmp_path, "train")
    dataset.check()
    image, mask = dataset.load(0)
    assert image.mode == "RGB" and mask.shape == NUMBERS.shape
    np.testing.assert_array_equal(image, read_image(dataset.paths[0]))


def test_the_identity_is_of_images_masks_and_what_numbers_mean(tmp_path):
    root = write_folders(tmp_path)
    first = open_segmentation_dataset("", root, "train")
    assert first.identity() == open_segmentation_dataset("", root, "train").identity()
    assert first.identity() != open_segmentation_dataset("", root, "train", reduce_zero_label=True).identity()
    assert [len(first.members(label)) for label in range(4)] == [6, 0, 0, 0]
    Image.fromarray(np.zeros((20, 40), np.uint8)).save(root / "masks/train/1.png")
    assert first.identity() != open_segmentation_dataset("", root, "train").identity()
    assert first.describe(1).endswith("images/train/1.png") and first.member(1)[0] == "images/train/1.png"


def test_a_split_by_ratio_depends_on_names_alone(tmp_path):
    write_folders(tmp_path, train=10)
    whole = open_segmentation_dataset("", tmp_path, "train")
    train, val = split_segmentation_by_ratio(whole, 0.3, 0)
    assert (len(train), len(val)) == (7, 3) and train.held_out is val
    assert sorted(train.paths + val.paths) == whole.paths
    assert [Path(p).stem for p in train.mask_paths] == [Path(p).stem for p in train.paths]
    reordered = whole.subset(range(9, -1, -1), "other order")
    assert sorted(split_segmentation_by_ratio(reordered, 0.3, 0)[1].paths) == sorted(val.paths)
    assert split_segmentation_by_ratio(whole, 0.3, 1)[1].paths != val.paths
    with pytest.raises(DataError, match="one image only"):
        split_segmentation_by_ratio(whole.subset([0], "one"), 0.3, 0)
    assert datasets.find_layout(tmp_path) == "folders"


@pytest.mark.fault("mask-numbers")
def test_a_wrong_mask_ends_a_run_and_a_damaged_file_is_replaced(tmp_path):
    root = write_folders(tmp_path)
    Image.fromarray(NUMBERS + np.uint8(2)).save(root / "masks" / "train" / "0.png")
    (root / "masks" / "train" / "1.png").write_bytes(b"damaged")
    dataset = open_segmentation_dataset("", root, "train")
    damaged = Damaged("replaced by another image", 2, 3)
    errors = []
    for index in range(2):
        with pytest.raises(DataError) as raised:
            dataset.load(index)
        errors.append(raised.value)
    damaged.note("1", errors[1])
    assert list(damaged.reasons) == ["1"]
    with pytest.raises(MaskError, match="0.png holds 4"):
        damaged.note("0", errors[0])
    assert list(damaged.reasons) == ["1"]
