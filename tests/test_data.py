"""Images on disk -> batches: what is found, what is refused, and that a sample depends on nothing but its position."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import logging
import os
import pickle
import random
import socket
import struct
import threading
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from commands import rows, run, train
from PIL import Image, ImageOps

from mindska import builders
from mindska.config import Config
from mindska.data import (
    Augmentation,
    EvalLoader,
    EvalTransform,
    Preprocessing,
    TrainLoader,
    TrainTransform,
    check_same_classes,
    check_same_on_all_ranks,
    comparison,
    natural_order,
    open_dataset,
)
from mindska.data.augment import APPLY, STRENGTHS, AffineOptions, AutoAugment, Operation
from mindska.data.class_order import read_class_map
from mindska.data.datasets import image_files
from mindska.data.images import read_image
from mindska.data.mixing import Mixing
from mindska.errors import ConfigError, DataError

PIXELS = Preprocessing((24, 24), 0.9, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
EVERYTHING = Augmentation(vflip=0.3, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.5)
RAW = Preprocessing((32, 32), 1.0, "bilinear", (0, 0, 0), (1 / 255, 1 / 255, 1 / 255))  # gives back the pixels' values
NO_CHANGE = dict(scale=(1, 1), ratio=(1, 1), hflip=0)


def noise_image(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.BICUBIC)


def write_folder(root, counts: dict[str, int], extension: str = "jpg"):
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise_image(100 * label + i).save(root / name / f"{i:02}.{extension}")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """21 images: 8 + 7 + 6."""
    root = tmp_path_factory.mktemp("images")
    write_folder(root / "train", {"ant": 8, "bee": 7, "cat": 6})
    return root


@pytest.fixture
def train_set(folder):
    return open_dataset("imagenet", folder, "train")


def loader(dataset, batch_size=4, augmentation=EVERYTHING, **options) -> TrainLoader:
    return TrainLoader(dataset, TrainTransform(PIXELS, augmentation), batch_size, **{"noise_size": 3, **options})


def assert_same(batches, others):
    batches, others = list(batches), list(others)
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others):
        for array, expected in zip(batch, other):
            assert np.array_equal(array, expected)


# ------------------------------------------------------------------------------------------------- data sets


def test_folders_are_classes_in_the_order_of_their_names(tmp_path):
    train = write_folder(tmp_path / "train", {"b": 1, "a": 2, "B": 1}, "PNG")
    (train / "a" / "more").mkdir()
    noise_image(7).save(train / "a" / "more" / "x.webp")
    noise_image(8).save(train / "a" / "more" / "y.JFIF", "JPEG")  # as some browsers name photos
    for name in (".hidden.png", "notes.txt"):
        (train / "a" / name).write_text("no image")
    (train / "a" / ".thumbnails").mkdir()
    (train / "a" / ".thumbnails" / "00.png").write_text("no image")
    (train / ".cache").mkdir()
    dataset = open_dataset("", tmp_path, "train")
    assert dataset.class_names == ["B", "a", "b"]
    assert [dataset.describe(i)[len(str(train)) :] for i in range(len(dataset))] == [
        "/B/00.PNG", "/a/00.PNG", "/a/01.PNG", "/a/more/x.webp", "/a/more/y.JFIF", "/b/00.PNG",
    ]  # fmt: skip
    assert dataset.labels.dtype == np.int32 and dataset.labels.tolist() == [0, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_image_comes_as_rgb(tmp_path, mode):
    (tmp_path / "val" / "a").mkdir(parents=True)
    image = noise_image(0).convert(mode)
    image.save(tmp_path / "val" / "a" / ("0.jpg" if mode == "CMYK" else "0.png"))
    loaded = open_dataset("imagenet", tmp_path, "val").load(0)
    assert loaded.mode == "RGB" and loaded.size == (40, 30)


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    def message(*arguments):
        with pytest.raises(DataError) as caught:
            open_dataset(*arguments)
        return str(caught.value)

    assert "data_dir is not set" in message("imagenet", "", "train")
    assert "No data folder at" in message("imagenet", tmp_path / "nowhere", "train")
    assert "'cifar1O'; expected imagenet" in message("cifar1O", tmp_path, "train")
    (tmp_path / "test").mkdir()
    (tmp_path / "training").mkdir()
    assert "No split 'train'" in message("imagenet", tmp_path, "train")
    assert "test, training" in message("imagenet", tmp_path, "train")
    assert "has no class folders" in message("imagenet", tmp_path, "test")
    write_folder(tmp_path / "test", {"a": 1})
    (tmp_path / "test" / "b").mkdir()
    (tmp_path / "test" / "b" / "readme.txt").write_text("")
    assert f"{tmp_path / 'test' / 'b'} has no image" in message("imagenet", tmp_path, "test")
    (tmp_path / "test" / "b" / "0.jpg").write_text("<html>404</html>")
    text = message("imagenet", tmp_path, "test")
    assert str(tmp_path / "test" / "b" / "0.jpg") in text and "no image" in text


def test_splits_must_have_the_same_classes(tmp_path):
    write_folder(tmp_path / "train", {"ant": 1, "bee": 1})
    write_folder(tmp_path / "val", {"ant": 1, "wasp": 1})
    train, val = (open_dataset("imagenet", tmp_path, split) for split in ("train", "val"))
    check_same_classes(train, train)
    with pytest.raises(DataError, match=r"only in training: \['bee'\], only in validation: \['wasp'\]$"):
        check_same_classes(train, val)


@pytest.mark.fault("look-alike")
def test_classes_that_look_alike(tmp_path):
    """Of one name, as Linux and as macOS write it: between splits, in one split, in a class map."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    write_folder(tmp_path / "train", {"ant": 1, composed: 1})
    write_folder(tmp_path / "val", {"ant": 1, decomposed: 1})
    write_folder(tmp_path / "both", {composed: 1, decomposed: 1})
    train, val = (open_dataset("imagenet", tmp_path, split) for split in ("train", "val"))
    hint = r"'caf(e\\u0301|\\xe9)' and 'caf(e\\u0301|\\xe9)', Unicode's NFC and NFD.: rename one"
    with pytest.raises(DataError, match=hint):
        check_same_classes(train, val)
    with pytest.raises(DataError, match=f"both has class folders that look the same.*{hint}"):
        open_dataset("imagenet", tmp_path, "both")
    (tmp_path / "map.txt").write_text(f"ant\n{decomposed}\n", encoding="utf-8")
    with pytest.raises(DataError, match=hint):
        open_dataset("imagenet", tmp_path, "train", class_map=tmp_path / "map.txt")


def write_cifar(folder, names: str, files: dict[str, list[int]], label_bytes: int, meta: str):
    """Record i of a file has constant planes i, i + 1, i + 2 but for one red pixel of 255 in row 1, column 2."""
    folder.mkdir()
    (folder / meta).write_text(names)
    for file, labels in files.items():
        data = b""
        for i, label in enumerate(labels):
            planes = np.repeat(np.arange(i, i + 3, dtype=np.uint8), 1024)
            planes[32 * 1 + 2] = 255
            data += bytes([99] * (label_bytes - 1) + [label]) + planes.tobytes()
        (folder / file).write_bytes(data)


def test_cifar10(tmp_path):
    files = {f"data_batch_{i}.bin": [i % 3, 2] for i in range(1, 6)}
    folder = tmp_path / "cifar-10-batches-bin"
    write_cifar(folder, "cat\ndog\nfrog\n\n", {**files, "test_batch.bin": [0]}, 1, "batches.meta.txt")
    train = open_dataset("cifar10", tmp_path, "train")
    assert train.class_names == ["cat", "dog", "frog"]
    assert train.labels.tolist() == [1, 2, 2, 2, 0, 2, 1, 2, 2, 2]
    pixels = np.asarray(train.load(3))
    assert pixels.shape == (32, 32, 3) and pixels[0, 0].tolist() == [1, 2, 3] and pixels[1, 2].tolist() == [255, 2, 3]
    assert train.describe(3) == "cifar10 train image 3"
    for place, split in ((tmp_path, "val"), (folder, "test")):
        assert len(open_dataset("cifar10", place, split)) == 1


def test_cifar100_takes_the_fine_label(tmp_path):
    folder = tmp_path / "cifar-100-binary"
    write_cifar(folder, "\n".join("abc"), {"train.bin": [2, 0], "test.bin": [1]}, 2, "fine_label_names.txt")
    assert open_dataset("cifar100", tmp_path, "train").labels.tolist() == [2, 0]
    assert np.asarray(open_dataset("cifar100", tmp_path, "val").load(0))[0, 0].tolist() == [0, 1, 2]


def test_what_is_wrong_with_cifar_is_said(tmp_path):
    with pytest.raises(DataError, match="missing test.bin, fine_label_names.txt"):
        open_dataset("cifar100", tmp_path, "val")
    folder = tmp_path / "cifar-100-binary"
    write_cifar(folder, "a\nb", {"train.bin": [0, 2], "test.bin": [1]}, 2, "fine_label_names.txt")
    with pytest.raises(DataError, match="no split 'validation'; its splits: train, val"):
        open_dataset("cifar100", tmp_path, "validation")
    with pytest.raises(DataError, match="label 2 but 2 class names"):
        open_dataset("cifar100", tmp_path, "train")
    (folder / "test.bin").write_bytes(bytes(3000))
    with pytest.raises(DataError, match="3000 bytes; expected a multiple of 3074"):
        open_dataset("cifar100", tmp_path, "val")


# ------------------------------------------------------------------------------------------------- MNIST's files


def idx(array: np.ndarray) -> bytes:
    """An idx file of unsigned bytes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_mnist(folder, labels=(9, 0, 9), test=(1, 0), names="{}-{}-ubyte", packed=False):
    """Image i is i grey, but for a pixel of 255 in row 1, column 2."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, numbers in (("train", labels), ("t10k", test)):
        images = np.repeat(np.arange(len(numbers), dtype=np.uint8), 28 * 28).reshape(-1, 28, 28)
        images[:, 1, 2] = 255
        for what, array in (("images-idx3", images), ("labels-idx1", np.array(numbers))):
            content = idx(array)
            (folder / names.format(prefix, what)).write_bytes(gzip.compress(content) if packed else content)
    return folder


@pytest.mark.parametrize("names", ["{}-{}-ubyte", "{}-{}-ubyte.gz"])
@pytest.mark.parametrize("packed", [False, True])
def test_mnist(tmp_path, names, packed):
    """The content says whether a file is compressed: some browsers unpack it and leave its name."""
    train = open_dataset("mnist", write_mnist(tmp_path, names=names, packed=packed), "train")
    assert train.class_names == list("0123456789") and train.labels.tolist() == [9, 0, 9]
    image = train.load(2)
    pixels = np.asarray(image)
    assert image.mode == "RGB" and pixels.shape == (28, 28, 3)
    assert pixels[0, 0].tolist() == [2] * 3 and pixels[1, 2].tolist() == [255] * 3
    with train.open(2) as opened:
        assert (opened.mode, opened.size) == ("L", (28, 28))
    assert train.describe(2) == "mnist train image 2" and str(train).startswith("mnist train: 3 images of 10 classes")
    assert [len(open_dataset("mnist", tmp_path, split)) for split in ("val", "test")] == [2, 2]
    assert train.identity() != open_dataset("mnist", tmp_path, "val").identity()
    assert train.identity() == open_dataset("mnist", write_mnist(tmp_path / "again"), "train").identity()


def test_where_mnists_relatives_lie(tmp_path):
    """Other names of the files, torchvision's folders, and an order of the classes from elsewhere."""
    write_mnist(tmp_path / "FashionMNIST" / "raw")
    names = open_dataset("fashion_mnist", tmp_path, "train").class_names
    assert (names[0], names[9]) == ("T-shirt/top", "Ankle boot")
    write_mnist(tmp_path / "dots", names="{}-{}-ubyte")
    for path in list((tmp_path / "dots").iterdir()):
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    assert open_dataset("kmnist", tmp_path / "dots", "val").class_names[:2] == ["o", "ki"]
    turned = open_dataset("fashion_mnist", tmp_path, "train", trained_on=names[::-1])
    assert turned.class_names == names[::-1] and turned.labels.tolist() == [0, 9, 0]
    some = open_dataset("fashion_mnist", tmp_path, "train", classes="Ankle boot,Bag")
    assert some.class_names == ["Bag", "Ankle boot"] and some.labels.tolist() == [1, 1]


def test_grey_pixels_are_taken_as_they_are(tmp_path):
    """By a network for one channel; one for three gets them three times."""
    dataset = open_dataset("mnist", write_mnist(tmp_path), "train")
    rng = np.random.default_rng(0)
    dataset.pixels = rng.integers(0, 256, (3, 28, 28), np.uint8)
    grey, rgb = (
        EvalTransform(Preprocessing((28, 28), 1.0, "bilinear", (0.0,) * n, (1.0,) * n))(dataset.load(1)) for n in (1, 3)
    )
    np.testing.assert_array_equal(grey, dataset.pixels[1][None] / np.float32(255))
    np.testing.assert_array_equal(rgb, np.repeat(grey, 3, 0))


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def header(*shape, dimensions=None):
    return struct.pack(f">HBB{len(shape)}I", 0, 8, dimensions or len(shape), *shape)


WRONG = [
    (IMAGES, None, "No train-images-idx3-ubyte, with or without .gz, in .*: name the folder of the four files"),
    (IMAGES, b"", r"begins with the bytes \(none\); expected 00 00 08 03: an idx file .* in 3 dimensions"),
    (IMAGES, b"\x89PNG", "begins with the bytes 89 50 4e 47; expected 00 00 08 03"),
    (IMAGES, idx(np.zeros(3)), "begins with the bytes 00 00 08 01; expected 00 00 08 03"),
    (LABELS, idx(np.zeros((3, 28, 28))), "begins with the bytes 00 00 08 03; expected 00 00 08 01.* dimension$"),
    (IMAGES, b"\0\0\x0d\3" + bytes(12), "begins with the bytes 00 00 0d 03"),  # float32
    (IMAGES, header(3, 28, 28)[:9], "ends after 9 bytes, within its header of 16: is it complete"),
    (IMAGES, idx(np.zeros((3, 28, 28)))[:-1], "says that it has 3x28x28 bytes, but ends after 2,351 bytes"),
    (IMAGES, idx(np.zeros((3, 28, 28))) + b"x", "says that it has 3x28x28 bytes, but goes on after that"),
    (IMAGES, header(0, 28, 28), "says that it has 0x28x28 bytes; expected 1 to 1,073,741,824 in all"),
    (IMAGES, header(2**32 - 1, 2**32 - 1, 2**32 - 1), "expected 1 to 1,073,741,824 in all"),
    (IMAGES, header(2**20, 32, 32), "says that it has 1,048,576x32x32 bytes, but ends after 0 bytes"),
    (IMAGES, gzip.compress(header(2**20, 32, 32)), "but ends after 0 bytes"),
    (IMAGES, gzip.compress(idx(np.zeros((3, 28, 28))))[:-20], "cannot be read: .*; is it complete"),
    (IMAGES, gzip.compress(idx(np.zeros((3, 28, 28))))[:-8] + bytes(8), "cannot be read: CRC check failed"),
    (IMAGES, b"\x1f\x8b" + bytes(20), "cannot be read: Unknown compression method"),
    (LABELS, idx(np.zeros(4)), r"has 3 images, but .*-ubyte 4 labels; expected as many: are they of one set"),
    (LABELS, idx(np.array([0, 1, 10])), "has the label 10 for image 2, but mnist has 10 classes; expected 0 to 9"),
]


@pytest.mark.fault("idx-files")
@pytest.mark.parametrize("file, content, said", WRONG, ids=range(len(WRONG)))  # gzip's bytes depend on the time
def test_what_is_wrong_with_mnist_is_said(tmp_path, file, content, said):
    """The message names the file, and no header makes much memory be taken."""
    write_mnist(tmp_path)
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_bytes(content)
    tracemalloc.start()
    with pytest.raises(DataError, match=said) as error:
        open_dataset("mnist", tmp_path, "train")
    assert file in str(error.value) and tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_what_else_is_wrong_with_mnist_is_said(tmp_path):
    with pytest.raises(DataError, match="mnist has no split 'validation'; its splits: train, val"):
        open_dataset("mnist", write_mnist(tmp_path), "validation")
    (tmp_path / IMAGES).unlink()
    (tmp_path / IMAGES).mkdir()
    with pytest.raises(DataError, match="No train-images-idx3-ubyte"):
        open_dataset("mnist", tmp_path, "train")


# ------------------------------------------------------------------------------------------------- folders


def links_of(folder, *links):
    """Two classes of two images, with links in the folder of the first."""
    train = write_folder(folder / "train", {"a": 2, "b": 2}, "png")
    for name, target in links:
        (train / name).symlink_to(target)
    return folder


def names(dataset):
    return [(path[len(str(dataset.root)) + 1 :], int(label)) for path, label in zip(dataset.paths, dataset.labels)]


PLAIN = [("a/00.png", 0), ("a/01.png", 0), ("b/00.png", 1), ("b/01.png", 1)]


@pytest.mark.fault("links")
@pytest.mark.parametrize(
    "links, said",
    [
        ([("a/self", ".")], "a/self is passed over: it leads to a folder above"),
        ([("a/one", "."), ("a/two", ".")], "a/two is passed over: it leads to a folder above"),
        ([("a/up", "..")], "a/up is passed over: it leads to a folder above"),
        ([("a/top", "../../..")], "a/top is passed over: it leads to a folder above"),
        ([("a/b", "../b")], "a/b is passed over: it leads into class b, whose images keep their class"),
        ([("a/x", "../b"), ("b/x", "../a")], "b/x is passed over: it leads into class a"),
    ],
    ids=str,
)
def test_links_neither_multiply_images_nor_change_their_class(tmp_path, caplog, links, said):
    dataset = open_dataset("", links_of(tmp_path, *links), "train")
    assert names(dataset) == PLAIN
    assert said in caplog.text and f"{len(links)} links to folders" in str(dataset)


@pytest.mark.fault("links")
def test_a_folder_counts_once_by_its_real_name(tmp_path, caplog):
    train = write_folder(tmp_path / "train", {"a": 1, "b": 1}, "png")
    for i in range(2):
        (train / "a" / f"zz{i}").mkdir()
        noise_image(i).save(train / "a" / f"zz{i}" / "x.png")
        (train / "a" / f"link{i}").symlink_to(f"zz{i}")
    dataset = open_dataset("", tmp_path, "train")
    assert names(dataset) == [("a/00.png", 0), ("a/zz0/x.png", 0), ("a/zz1/x.png", 0), ("b/00.png", 1)]
    assert "a/link0 is passed over: it leads to a folder that is listed already" in caplog.text


@pytest.mark.fault("links")
def test_links_to_other_places_are_followed(tmp_path, caplog):
    """A class folder that is a link is that class, whatever it leads to; so are folders and files that links bring."""
    write_folder(tmp_path / "elsewhere", {"more": 2, "c": 1}, "png")
    (tmp_path / "elsewhere" / "more" / "back").symlink_to("..")  # above what the link has brought
    more = tmp_path / "elsewhere" / "more"
    links = ("c", "../elsewhere/c"), ("d", "b"), ("a/more", more), ("a/2.png", "00.png"), ("b/all", more.parent)
    dataset = open_dataset("", links_of(tmp_path, *links), "train")
    assert names(dataset) == [
        ("a/00.png", 0), ("a/01.png", 0), ("a/2.png", 0), ("a/more/00.png", 0), ("a/more/01.png", 0),
        ("b/00.png", 1), ("b/01.png", 1), ("c/00.png", 2), ("d/00.png", 3), ("d/01.png", 3),
    ]  # fmt: skip
    assert "d are the same folder: its images are in both classes" in caplog.text
    assert "more/back is passed over: it leads to a folder above" in caplog.text
    assert "b/all is passed over: it leads to a folder above" in caplog.text  # above class c


@pytest.mark.fault("unlistable")
def test_system_folders_and_what_is_no_image_are_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train = write_folder(tmp_path / "train", {"a": 2, "b": 2}, "png")
    for place in (train, train / "a"):
        for name in ("@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "__MACOSX", "lost+found", ".x"):
            (place / name).mkdir()
            noise_image(0).save(place / name / "0.png")
    (train / "a" / "notes.txt").write_text("")
    (train / "b" / "photo.avif").write_text("")
    (train / "b" / "Thumbs.db").write_text("")
    (train / "b" / "._00.png").write_text("")
    noise_image(0).save(train / "stray.png")
    noise_image(0).save(train / "b" / "more.JFIF", "JPEG")
    os.mkfifo(train / "b" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(train / "b" / "s.png"))
    dataset = open_dataset("", tmp_path, "train")
    assert names(dataset) == [*PLAIN, ("b/more.JFIF", 1)]
    said = caplog.messages[-1]
    assert said.startswith(f"train: 5 images of 2 classes in {train}; passed over: ")
    for part in (
        "2 system folders (@eaDir)",
        "2 system folders (lost+found)",
        "3 hidden",
        "2 pipes, devices or sockets",
    ):
        assert part in said
    assert sum(dataset.found.passed_over.values()) == 2 * 7 + 3 + 1 + 1 + 2  # the strays, ._00.png, stray.png, pipes
    assert image_files(train / "b") == [str(train / "b" / name) for name in ("00.png", "01.png", "more.JFIF")]
    assert f"3 images in {train / 'b'}; passed over: " in caplog.messages[-1]


@pytest.mark.fault("folders", "unlistable")
@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE], ids=errno.errorcode.get)
@pytest.mark.parametrize("where", ["train", "train/a", "train/a/more"])
@pytest.mark.parametrize("late", [False, True], ids=["at once", "later"])
def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch, code, where, late):
    train = write_folder(tmp_path / "train", {"a": 2, "b": 2}, "png")
    write_folder(train / "a", {"more": 2}, "png")
    scandir = os.scandir

    class Flaky:
        def __init__(self, path):
            if os.fspath(path) != str(tmp_path / where):
                self.entries = scandir(path)
            elif late:
                self.entries = self.failing(scandir(path))
            else:
                raise OSError(code, os.strerror(code), path)

        def failing(self, listing):
            yield next(listing)
            raise OSError(code, os.strerror(code))

        def __enter__(self):
            return self.entries

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Flaky)
    with pytest.raises(DataError, match=f"{tmp_path / where} cannot be listed: {os.strerror(code)}"):
        open_dataset("", tmp_path, "train")
    with pytest.raises(DataError, match=f"{tmp_path / where} cannot be listed: {os.strerror(code)}"):
        image_files(train)


@pytest.mark.fault("unlistable")
@pytest.mark.parametrize("place, split", [("train/c", "train"), ("train/a/more", "train"), ("val", "val")])
def test_a_folder_that_is_not_mounted_is_an_error(tmp_path, place, split):
    links_of(
        tmp_path,
    )
    (tmp_path / place).symlink_to("/nowhere/share")
    with pytest.raises(DataError, match=rf"{place} \(a link to /nowhere/share\) cannot be listed: No such file"):
        open_dataset("", tmp_path, split)


def test_an_image_that_a_link_does_not_reach_is_an_unreadable_image(tmp_path):
    """As in a repository of git-annex without its contents: counted, named, and limited by max_damaged."""
    dataset = open_dataset("", links_of(tmp_path, ("a/away.png", "/nowhere/1.png"), ("a/x.png", "x.png")), "train")
    assert len(dataset) == 6 and dataset.found.sizes.count(-1) == 2
    for index in (2, 3):
        with pytest.raises(DataError, match=r"(away|x)\.png cannot be read: (No such file|Too many levels)"):
            dataset.load(index)
    assert len(dataset.identity()["digest"]) == 32


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="root may list everything")
def test_without_permission_nothing_vanishes(tmp_path):
    (links_of(tmp_path) / "train" / "b").chmod(0)
    with pytest.raises(DataError, match="b cannot be listed: Permission denied"):
        open_dataset("", tmp_path, "train")


def test_the_identity_of_a_folder(folder, tmp_path, monkeypatch):
    dataset = open_dataset("", folder, "train")
    digest = hashlib.sha256(repr(["ant", "bee", "cat"]).encode())
    for path, label in zip(dataset.paths, dataset.labels):
        digest.update(f"{os.path.relpath(path, dataset.root)}\0{Path(path).stat().st_size}\0{label}\0".encode())
    expected = dict(images=21, classes=3, digest=digest.hexdigest()[:32])
    assert dataset.identity() == expected == dataset.identity()
    monkeypatch.chdir(folder / "train")
    for place, split in ((".", "."), ("..", "train"), (folder / "train", ""), (f"{folder}/", "train/")):
        assert open_dataset("", place, split).identity() == expected


# ------------------------------------------------------------------------------------------------- order of classes


def test_the_natural_order_is_timms():
    assert natural_order(["10", "2", "1"]) == ["1", "2", "10"]
    assert natural_order(["b", "A", "a10x2", "a9", "a10x1"]) == ["A", "a9", "a10x1", "a10x2", "b"]
    assert natural_order(["B", "a"]) == ["a", "B"]
    assert natural_order(["x²", "x3"]) == ["x3", "x²"]  # a power is no number


@pytest.mark.fault("class-order")
@pytest.mark.parametrize("name", ["imagenet", "cifar10"])
def test_a_class_map_numbers_the_classes(tmp_path, name):
    if name == "imagenet":
        write_folder(tmp_path / "train", {"cat": 1, "dog": 2, "frog": 1})
    else:
        files = {f"data_batch_{i}.bin": [0, 1, 2] for i in range(1, 6)}
        write_cifar(tmp_path / "cifar-10-batches-bin", "cat\ndog\nfrog", files, 1, "batches.meta.txt")
    (tmp_path / "map.txt").write_bytes("\ufeff# of the network\r\nfrog\r\n\r\ncat\r\ndog".encode())
    plain = open_dataset(name, tmp_path, "train")
    mapped = open_dataset(name, tmp_path, "train", tmp_path / "map.txt")
    assert plain.class_names == ["cat", "dog", "frog"] and mapped.class_names == ["frog", "cat", "dog"]
    counts = np.bincount(plain.labels), np.bincount(mapped.labels)
    assert counts[1].tolist() == counts[0][[2, 0, 1]].tolist()
    for index in range(len(mapped)):
        if name == "imagenet":
            assert f"/{mapped.class_names[mapped.labels[index]]}/" in mapped.describe(index)
        else:
            assert mapped.class_names[mapped.labels[index]] == plain.class_names[plain.labels[index]]
    assert mapped.identity() != plain.identity()
    # A network's own order is taken where the classes are the same, and no other.
    assert open_dataset(name, tmp_path, "train", trained_on=["dog", "frog", "cat"]).class_names[0] == "dog"
    assert open_dataset(name, tmp_path, "train", trained_on=["dog", "frog"]).class_names[0] == "cat"


@pytest.mark.fault("class-order")
@pytest.mark.parametrize(
    "content, said",
    [
        (b"a\nb\nwasp", r"no class there: \['wasp'\]"),
        (b"a", r"lacks classes: \['b'\]"),
        (b"a\nb\na", r"names classes twice: \['a'\]"),
        (b"# a\n\n", "names no class"),
        ("a\nb".encode("utf-16"), "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_class_map_that_does_not_fit_is_refused(tmp_path, content, said):
    write_folder(tmp_path / "train", {"a": 1, "b": 1})
    if content is not None:
        (tmp_path / "map.txt").write_bytes(content)
    with pytest.raises(DataError, match=said):
        open_dataset("imagenet", tmp_path, "train", tmp_path / "map.txt")
    with pytest.raises(DataError, match="cannot be read"):
        read_class_map(tmp_path)


@pytest.mark.fault("class-order")
def test_an_order_that_nobody_knows_is_refused():
    numbers = [str(i) for i in range(12)]
    config, text = Config(), sorted(numbers)
    with pytest.raises(ConfigError, match="class 2 is '10' in the order of text .* '2' in the natural .*--class_map"):
        builders.evaluated_classes(config, dict(num_classes=12), text)
    with pytest.raises(ConfigError, match="ambiguous"):
        builders.evaluated_classes(config, {}, ["B", "a"])
    assert builders.evaluated_classes(config, dict(num_classes=12, class_names=text), text) == 12
    assert builders.evaluated_classes(config, dict(num_classes=10), numbers[:10]) == 10
    assert builders.evaluated_classes(Config(class_map="map.txt"), dict(num_classes=12), numbers) == 12
    assert builders.evaluated_classes(Config(dataset="cifar100"), {}, ["b2", "b10"]) == 2  # its labels are numbers
    with pytest.raises(ConfigError, match="in another order than --class_map map.txt"):
        builders.evaluated_classes(Config(class_map="map.txt"), dict(num_classes=12, class_names=text), numbers)


@pytest.mark.slow
def test_commands_say_which_data_and_keep_the_order_of_classes(images, tmp_path):
    """A run with a class map records its order; validation takes it from the checkpoint, whatever the folders' is."""
    (tmp_path / "map.txt").write_text("class2\nclass0\nclass1\n")
    (images / "val" / "@eaDir").mkdir(exist_ok=True)
    scale = ",".join(["127.5"] * 3)
    said = train(images, tmp_path / "run", class_map=tmp_path / "map.txt", ema="false", mean=scale, std=scale)
    log = (tmp_path / "run" / "train.log").read_text()
    for text in (said, log):
        assert f"train: 36 images of 3 classes in {images / 'train'}\n" in text
        assert f"val: 36 images of 3 classes in {images / 'val'}; passed over: 1 system folders (@eaDir)\n" in text
        assert "are on a scale of 0 to 255: taken as mean (0.5, 0.5, 0.5)" in text
    result = dict(ckpt_path=tmp_path / "run" / "tiny_bn_best.ckpt", result_json=tmp_path / "r.json")
    said = run("validate.py", images, **result)
    assert f"val: 36 images of 3 classes in {images / 'val'}; passed over: 1 system folders" in said
    scores = [float(row["top1"]) for row in rows(tmp_path / "run") if row["top1"]]
    assert json.loads((tmp_path / "r.json").read_text())["top1"] == pytest.approx(max(scores), abs=0.01)
    (tmp_path / "other.txt").write_text("class0\nclass1\nclass2\n")
    said = run("validate.py", images, expect=1, class_map=tmp_path / "other.txt", **result)
    assert "in another order than --class_map" in said and "Traceback" not in said


def on_ranks(monkeypatch, datasets):
    """What each rank's comparison raises, as text, with a gather between threads."""
    here, shared, barrier = threading.local(), {}, threading.Barrier(len(datasets), timeout=20)

    def gather(value):
        barrier.wait()
        shared[here.rank] = pickle.loads(pickle.dumps(value))
        barrier.wait()
        return [shared[rank] for rank in range(len(datasets))]

    def compare(rank):
        here.rank = rank
        try:
            return check_same_on_all_ranks(datasets[rank])
        except DataError as error:
            return str(error)

    monkeypatch.setattr(comparison, "all_gather_object", gather)
    with ThreadPoolExecutor(len(datasets)) as pool:
        return list(pool.map(compare, range(len(datasets))))


@pytest.mark.fault("other-data")
def test_ranks_that_see_other_data_all_say_so(tmp_path, monkeypatch):
    def other(rank):
        root = tmp_path / str(rank)
        write_folder(root / "val", {"a": 3, "b": 3}, "png")
        return root / "val"

    def said(rank):
        texts = on_ranks(monkeypatch, [open_dataset("", tmp_path / str(r), "val") for r in (0, 1, rank)])
        assert len(set(texts)) == 1
        return texts[0]

    for rank in (0, 1, 2, 3, 4):
        other(rank)
    assert said(1) is None
    (tmp_path / "2" / "val" / "b" / "01.png").unlink()
    assert "rank 0: val: 6 images of 2 classes in" in said(2) and "rank 2: val: 5 images of 2 classes in" in said(2)
    assert "b/01.png is on rank 0 only" in said(2)
    noise_image(9, 50).save(tmp_path / "3" / "val" / "a" / "01.png")
    assert "a/01.png differs" in said(3)
    (tmp_path / "4" / "val" / "c").mkdir()
    noise_image(0).save(tmp_path / "4" / "val" / "c" / "0.png")
    assert "c is on rank 2 only" in said(4)
    (tmp_path / "map").write_text("b\na")
    sets = [open_dataset("", tmp_path / "0", "val", class_map) for class_map in ("", tmp_path / "map")]
    assert "the order of the classes" in on_ranks(monkeypatch, sets)[1]


def test_ranks_compare_cifar_by_its_pixels(tmp_path, monkeypatch):
    for rank in (0, 1):
        folder = tmp_path / str(rank)
        folder.mkdir()
        write_cifar(folder / "cifar-100-binary", "a\nb", {"test.bin": [0, 1]}, 2, "fine_label_names.txt")
    file = tmp_path / "1" / "cifar-100-binary" / "test.bin"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    first, second = on_ranks(monkeypatch, [open_dataset("cifar100", tmp_path / str(rank), "val") for rank in (0, 1)])
    assert first == second and "image 1 differs" in first


# ------------------------------------------------------------------------------------------------- reading images


def tiff(values: np.ndarray, bits: int, sample_format: int = 1, photometric: int = 1, order: str = "<") -> bytes:
    """An uncompressed grey TIFF of one strip; `values` (H, W), of 12 bits packed."""
    height, width = values.shape
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(int)
        data = b"".join(struct.pack(">I", a << 12 | b)[1:] for a, b in pairs)
    else:
        data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data),
            339: sample_format}  # fmt: skip
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(data))
    return header + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def png(rows: np.ndarray, colour: int, bits: int = 16) -> bytes:
    """A PNG of (H, W * samples) big-endian rows; colour: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    samples = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    size = struct.pack(">IIBBBBB", rows.shape[1] // samples, len(rows), bits, colour, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)
SCALED = np.round(RAMP / 257).astype(np.uint8)
TWELVE = np.arange(4096, dtype=np.uint16).reshape(64, 64)


def pnm(array: np.ndarray, magic: str, top: int) -> bytes:
    return f"{magic} {array.shape[1]} {array.shape[0]} {top}\n".encode() + array.astype(">u2").tobytes()


@pytest.mark.fault("pixels")
@pytest.mark.parametrize(
    "content, expected",
    [
        (png(RAMP.astype(">u2"), 0), SCALED),
        (tiff(RAMP, 16), SCALED),
        (tiff(RAMP, 16, order=">"), SCALED),
        (tiff(RAMP, 16, photometric=0), 255 - SCALED),
        (tiff(TWELVE, 12), np.round(TWELVE * (255 / 4095))),
        (tiff(RAMP.astype(np.int32), 32, 2), SCALED),
        (tiff(RAMP.astype(np.uint32), 32, 1), SCALED),
        (tiff((RAMP / 65535).astype(np.float32), 32, 3), SCALED),
        (tiff((RAMP / 65535).astype(np.float32), 32, 3, photometric=0, order=">"), 255 - SCALED),
        (tiff(RAMP[:1].astype(np.uint8), 8), RAMP[:1]),
        (tiff(RAMP[:1].astype(np.uint8), 8, photometric=0), 255 - RAMP[:1]),
        (pnm(RAMP, "P5", 65535), SCALED),
        (pnm(TWELVE, "P5", 4095), np.round(TWELVE * (255 / 4095))),
        (png(np.repeat(RAMP, 3, 1).astype(">u2"), 2), RAMP >> 8),  # Pillow's, of colours
    ],
    ids=["png", "tiff", "tiff >", "white is 0", "12 bits", "int32", "uint32", "float", "float, white is 0", "8 bits",
         "8 bits, white is 0", "pgm", "pgm 12", "rgb"],
)  # fmt: skip
def test_the_range_of_a_type_becomes_black_to_white(tmp_path, content, expected):
    (tmp_path / "a.png").write_bytes(content)
    image = read_image(tmp_path / "a.png")
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.repeat(expected[..., None], 3, 2))


@pytest.mark.fault("pixels")
@pytest.mark.parametrize(
    "content, said",
    [
        (tiff(RAMP.astype(np.int32) * 2, 32, 2), "32-bit integers from 0 to 131070"),
        (tiff(RAMP.astype(np.int32) - 1000, 32, 2), "32-bit integers from -1000 to 64535"),
        (tiff(RAMP[:1].astype(np.int32), 32, 2), "32-bit integers from 0 to 255"),  # of 8 bits, or dark ones of 16
        (tiff(RAMP[:64].astype(np.int16), 16, 2), "signed 16-bit integers from 0 to 16383"),
        (tiff(RAMP[:1].astype(np.uint8), 8, 2), "signed 8-bit integers"),
        (tiff(RAMP[:1].astype(np.float32), 32, 3), "floating-point numbers from 0 to 255"),
        (tiff(RAMP[:1].astype(np.float32) / 255 - 0.1, 32, 3), "floating-point numbers from -0.1 to 0.9"),
        (tiff(np.full((4, 4), np.nan, np.float32), 32, 3), "floating-point numbers from nan"),
    ],
)
def test_numbers_of_unknown_range_are_refused(tmp_path, content, said):
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.tif cannot be read: its pixels are {said}.*Convert it to 8 or 16 bits"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB", "transparent palette", "rgba16"])
def test_unusual_images_are_as_pillow_converts_them(tmp_path, mode, recwarn):
    image, path, options = noise_image(0), tmp_path / "a.png", {}
    if mode == "transparent palette":
        image, options = image.convert("P"), dict(transparency=bytes(range(256)))
    elif mode == "rgba16":
        path.write_bytes(png(np.tile(RAMP[:, :64], (1, 4)).astype(">u2"), 6))
    else:
        image = image.convert(mode) if mode != "LAB" else Image.merge("LAB", image.split())
    if mode != "rgba16":
        image.save(path, "TIFF" if mode in ("CMYK", "YCbCr", "LAB") else "PNG", **options)
    with Image.open(path) as opened:
        expected = opened.convert("RGB")
    assert read_image(path).tobytes() == expected.tobytes()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photos_are_turned_only_when_asked(tmp_path, format):
    root = tmp_path / "val" / "a"
    root.mkdir(parents=True)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        noise_image(0, 160, 120).save(root / f"{orientation}.png", format, exif=exif)
    plain, turned = (open_dataset("", tmp_path, "val", exif_orientation=value) for value in (False, True))
    for index in range(8):
        with Image.open(plain.paths[index]) as image:
            expected = ImageOps.exif_transpose(image).convert("RGB")
        assert turned.load(index).tobytes() == expected.tobytes() and turned.load(index).size == expected.size
        if format != "TIFF":  # Pillow turns these itself
            assert plain.load(index).size == (160, 120)
        sizes = []
        small = turned.load(index, lambda size: sizes.append(size) or (size[0] // 4, size[1] // 4))  # noqa: B023
        assert sizes == [expected.size]
        times = 4 if format == "JPEG" else 1
        assert small.size == (expected.width // times, expected.height // times)
        assert np.abs(np.float32(small.resize((8, 8))) - np.float32(expected.resize((8, 8)))).mean() < 8


# ------------------------------------------------------------------------------------------------- transforms


def test_a_large_photo_is_decoded_no_larger_than_its_crop_needs(tmp_path):
    """The pixels are nearly those of the whole photo's crop, and a small crop's the same."""
    root = tmp_path / "train" / "a"
    root.mkdir(parents=True)
    noise_image(0, 900, 700).save(root / "photo.jpg", quality=95)
    dataset, transform = open_dataset("", tmp_path, "train"), TrainTransform(RAW, Augmentation(scale=(0.001, 0.3)))
    whole, widths = dataset.load(0), set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        crop = transform.draw_crop((900, 700), rng)
        image = dataset.load(0, lambda size: transform.decode_size(crop._replace(size=size)))  # noqa: B023
        widths.add(image.width)
        assert image.width >= transform.decode_size(crop)[0]
        ours = transform(image, rng, crop)
        exact = transform(whole, np.random.default_rng(seed))
        if image.size == whole.size:
            np.testing.assert_array_equal(ours, exact)
        assert np.abs(ours - exact).mean() < 0.5  # of a colour's 256 steps
    assert len(widths) > 2 and max(widths) == 900


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(),
        EVERYTHING,
        Augmentation(color_jitter=(0.4,), re_prob=1, re_value="const"),
        Augmentation(pad_crop=4),
        *(Augmentation(auto_augment=name) for name in ("autoaug", "autoaugr-mstd1", "3a", "trivialaugwide-m20")),
    ],
    ids=str,
)
def test_a_training_image_depends_on_its_generator_alone(augmentation):
    transform, image = TrainTransform(PIXELS, augmentation), noise_image(0, 50, 37)
    states = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    results = [transform(image, np.random.default_rng(seed)) for seed in range(12)]
    assert all(result.shape == (3, 24, 24) and result.dtype == np.float32 for result in results)
    assert len({result.tobytes() for result in results}) > 6
    copy = pickle.loads(pickle.dumps(transform))
    for seed in (5, 0, 11):
        assert np.array_equal(copy(image, np.random.default_rng(seed)), results[seed])
    assert states[0] == random.getstate() and np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002


def test_augmentation_in_many_threads_is_that_in_one():
    policy, image = AutoAugment("randaug-m9-mstd0.5-inc1-n4", (124, 116, 104), Image.BICUBIC), noise_image(3, 64, 64)

    def augmented(seed):
        return policy(image, np.random.default_rng(seed)).tobytes()

    expected = [augmented(seed) for seed in range(60)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(augmented, range(60))) == expected


def test_random_crops_are_of_the_asked_area_and_ratio(monkeypatch):
    boxes = []
    crop = Image.Image.crop
    monkeypatch.setattr(Image.Image, "crop", lambda self, box: boxes.append(box) or crop(self, box))
    transform = TrainTransform(PIXELS, Augmentation(scale=(0.2, 0.5), ratio=(0.5, 2)))
    image = noise_image(0, 400, 300)
    for seed in range(300):
        transform(image, np.random.default_rng(seed))
    left, top, right, bottom = np.array(boxes).T
    share, ratio = (right - left) * (bottom - top) / 120000, (right - left) / (bottom - top)
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 400 and bottom.max() <= 300
    assert 0.19 < share.min() < 0.22 and 0.47 < share.max() < 0.51
    assert 0.49 < ratio.min() < 0.55 and 1.8 < ratio.max() < 2.02
    assert abs(np.log(ratio).mean()) < 0.1, "ratios are uniform in the logarithm"


@pytest.mark.parametrize("size, box", [((300, 10), (143, 0, 156, 10)), ((10, 300), (0, 143, 10, 156))])
def test_a_very_long_image_is_cropped_in_the_middle(monkeypatch, size, box):
    boxes = []
    crop = Image.Image.crop
    monkeypatch.setattr(Image.Image, "crop", lambda self, box: boxes.append(box) or crop(self, box))
    transform = TrainTransform(PIXELS, Augmentation(scale=(1, 1)))
    transform(noise_image(0, *size), np.random.default_rng(0))
    assert boxes == [box]


def test_flips_happen_as_often_as_asked():
    image = noise_image(0, 32, 32)
    pixels = np.asarray(image).transpose(2, 0, 1)
    transform = TrainTransform(RAW, Augmentation(**{**NO_CHANGE, "hflip": 0.25, "vflip": 0.5}))
    forms = {"as it is": pixels, "h": pixels[:, :, ::-1], "v": pixels[:, ::-1], "hv": pixels[:, ::-1, ::-1]}
    counts = dict.fromkeys(forms, 0)
    for seed in range(400):
        result = np.rint(transform(image, np.random.default_rng(seed)))
        counts[next(name for name, form in forms.items() if np.array_equal(form, result))] += 1
    assert abs(counts["h"] + counts["hv"] - 100) < 30 and abs(counts["v"] + counts["hv"] - 200) < 35


def test_pad_crop_shifts_by_at_most_the_padding_and_fills_with_black():
    image = Image.fromarray(np.full((32, 32, 3), 200, np.uint8))
    transform = TrainTransform(RAW, Augmentation(pad_crop=4, hflip=0))
    shifts = set()
    for seed in range(300):
        inside = np.rint(transform(image, np.random.default_rng(seed)))[0] == 200
        rows, columns = inside.any(1), inside.any(0)
        assert np.array_equal(inside, np.outer(rows, columns))
        shifts.add((32 - rows.sum(), 32 - columns.sum(), rows[0], columns[0]))
    assert max(shift[0] for shift in shifts) == max(shift[1] for shift in shifts) == 4
    assert len(shifts) > 60  # of 81


@pytest.mark.parametrize("re_value", ["random", "const"])
def test_erasing_takes_the_asked_share(re_value):
    image = Image.fromarray(np.full((64, 64, 3), 255, np.uint8))
    pixels = Preprocessing((64, 64), 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    transform = TrainTransform(pixels, Augmentation(**NO_CHANGE, re_prob=0.4, re_value=re_value))
    erased, values = [], []
    for seed in range(400):
        result = transform(image, np.random.default_rng(seed))
        changed = result[0] != 1
        erased.append(changed.mean())
        values.append(result[:, changed].ravel())
    erased, values = np.array(erased), np.concatenate(values)
    assert abs((erased > 0).mean() - 0.4) < 0.08
    assert erased[erased > 0].min() > 0.015 and 0.25 < erased.max() < 0.34
    if re_value == "const":
        assert not values.any()  # the mean colour
    else:  # a number for each pixel and channel
        assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02
        assert len(np.unique(values)) > 0.9 * len(values)


def test_colour_jitter_keeps_to_its_strength():
    image = Image.fromarray(np.full((32, 32, 3), 100, np.uint8))
    transform = TrainTransform(RAW, Augmentation(**NO_CHANGE, color_jitter=(0.4, 0, 0)))
    values = [float(transform(image, np.random.default_rng(seed))[0, 0, 0]) for seed in range(200)]
    assert 59 <= min(values) < 65 and 135 < max(values) <= 140


@pytest.mark.parametrize(
    "policy, part",
    [
        ("randomaug-m9", "'randomaug'"),
        ("randaug-x9", "'x9'"),
        ("rand-m9-mstd", "'mstd'"),
        ("randaug-n1.5", "'n1.5'"),
        ("autoaug-m9", "'m9'"),
        ("randaug-m9-", "''"),
        ("augmix-m5", "'augmix'"),
    ],
)
def test_a_policy_that_is_not_understood_is_refused(policy, part):
    with pytest.raises(ValueError, match="auto_augment") as caught:
        TrainTransform(PIXELS, Augmentation(auto_augment=policy))
    assert part in str(caught.value)


def test_policies_mean_what_they_say():
    def policy(text):
        return AutoAugment(text, (0, 0, 0), Image.BILINEAR)

    rand = policy("rand-m7-mstd2-n3-inc1")
    assert (rand.draws, rand.deviation, len(rand.choices)) == (3, 2.0, 15)
    assert {operation.magnitude for (operation,) in rand.choices} == {7.0}
    names = {operation.name for (operation,) in rand.choices}
    assert {"PosterizeIncreasing", "ColorIncreasing", "ShearX"} <= names and "Posterize" not in names
    assert "Posterize" in {operation.name for (operation,) in policy("randaug-inc0").choices}
    assert policy("randaug-mstd101").deviation == np.inf
    assert [len(choice) for choice in policy("autoaug").choices] == [2] * 25


@pytest.mark.parametrize(
    "policy, mean, deviation, low, high",
    [
        ("randaug-m5-mstd1", 0.5, 0.1, 0.1, 0.9),
        ("randaug-m9-mstd2", 0.85, 0.15, 0, 1),  # clipped
        ("randaug-m9-mstd0-mmax20", 0.9, 0, 0.9, 0.9),
        ("randaug-m12-mstd0-mmax20", 1.2, 0, 1.2, 1.2),
        ("randaug-m8-mstd101", 0.4, 0.23, 0, 0.8),  # uniform
        ("trivialaugwide", 0.5, 0.29, 0, 1),
    ],
)
def test_magnitudes_are_drawn_as_asked(monkeypatch, policy, mean, deviation, low, high):
    levels = []
    monkeypatch.setattr(Operation, "apply", lambda self, image, level, look, rng: levels.append(level))
    for seed in range(1000):
        AutoAugment(policy, (0, 0, 0), Image.BILINEAR)(None, np.random.default_rng(seed))
    assert len(levels) > 900
    assert np.allclose([np.mean(levels), np.std(levels)], [mean, deviation], atol=0.02)
    assert low <= min(levels) + 1e-9 and max(levels) - 1e-9 <= high


@pytest.mark.parametrize("policy", ["randaug-m10-mmax20-mstd9-inc1", "randaug-m10-mmax20-mstd9", "trivialaugwide"])
def test_extreme_magnitudes_are_harmless(policy):
    """The strongest posterize keeps no bit at all, which Pillow's own refuses."""
    policy, image = AutoAugment(policy, (0, 0, 0), Image.BICUBIC), noise_image(0, 20, 16)
    for seed in range(200):
        assert policy(image, np.random.default_rng(seed)).size == (20, 16)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(scale=(0.5, 0.1)),
        dict(scale=(0.5, 2.0)),
        dict(ratio=(0.0, 1.0)),
        dict(re_scale=(0.1,)),
        dict(re_value="pixel"),
        dict(color_jitter=(0.1, 0.1)),
        dict(pad_crop=-1),
    ],
    ids=str,
)
def test_a_meaningless_augmentation_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Augmentation(**wrong)


def test_a_meaningless_preprocessing_is_refused():
    good = dict(image_size=(8, 8), crop_pct=0.9, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
    for wrong in (dict(crop_pct=1.1), dict(interpolation="cubic"), dict(std=(1, 1, 0)), dict(mean=(0,))):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Preprocessing(**{**good, **wrong})


def test_preprocessing_from_strangers_is_checked():
    good = dict(image_size=(8, 8), crop_pct=0.9, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
    nan, inf = float("nan"), float("inf")
    for name, value in [
        ("image_size", 8), ("image_size", (8,)), ("image_size", (8, 0)), ("image_size", (8.5, 8)),
        ("image_size", (1 << 20, 1 << 20)), ("image_size", ("8", "8")), ("crop_pct", "0.9"), ("crop_pct", nan),
        ("mean", 0.5), ("mean", (0, 0, nan)), ("mean", ("a", 0, 0)), ("std", (inf, 1, 1)), ("std", (-1, 1, 1)),
        ("mean", (0, 0)), ("mean", (0,) * 4), ("std", (1,)), ("mean", None), ("crop_pct", None),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=name):
            Preprocessing(**{**good, name: value})
    with pytest.raises(ValueError, match="images of 1 and 3 channels are handled"):
        Preprocessing(**{**good, "mean": (0,) * 4, "std": (1,) * 4})


@pytest.mark.fault("scale-255")
@pytest.mark.parametrize(
    "mean, std, expected",
    [
        ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
        ((104, 117, 123), (1, 1, 1), ((104 / 255, 117 / 255, 123 / 255), (1 / 255,) * 3)),  # Caffe's
        ((127.5,) * 3, (127.5,) * 3, ((0.5,) * 3, (0.5,) * 3)),
        ((33.3184,), (78.5675,), ((0.13066,), (0.30811,))),
    ],
)
def test_the_scale_of_255_is_recognised_and_said(caplog, mean, std, expected):
    pixels = Preprocessing((24, 24), 0.9, "bicubic", mean, std)
    np.testing.assert_allclose((pixels.mean, pixels.std), expected, rtol=1e-4)
    assert "are on a scale of 0 to 255: taken as mean" in caplog.text
    caplog.clear()
    Preprocessing(**vars(pixels))  # as from a record
    assert not caplog.text


@pytest.mark.fault("scale-255")
@pytest.mark.parametrize(
    "mean, std",
    [
        ((0.485, 0.456, 0.406), (58.395, 57.12, 57.375)),
        ((123.675, 116.28, 103.53), (0.229, 0.224, 0.225)),
        ((0, 0, 0), (255, 255, 255)),
        ((0.5, 0.5, 104), (0.5, 0.5, 0.5)),
        ((123.675, 0.4, 103.53), (58.395, 57.12, 57.375)),
        ((1000, 1000, 1000), (58, 57, 57)),
    ],
)
def test_mixed_scales_are_refused(mean, std):
    with pytest.raises(ValueError, match="Give both on the first: divide by 255"):
        Preprocessing((24, 24), 0.9, "bicubic", mean, std)


@pytest.mark.parametrize("mean, std", [((123 / 255,) * 3, (1 / 255,) * 3), ((0,) * 3, (1,) * 3), ((1,), (0.5,))])
def test_small_numbers_stay_as_they_are(caplog, mean, std):
    pixels = Preprocessing((24, 24), 0.9, "bicubic", mean, std)
    assert (pixels.mean, pixels.std) == (mean, std) and not caplog.text


def test_preprocessing_for_another_number_of_channels():
    grey = PIXELS.for_channels(1)
    np.testing.assert_allclose((grey.mean[0], grey.std[0]), (0.449, 0.226))
    assert grey.in_channels == 1 and PIXELS.in_channels == 3 and PIXELS.for_channels(3) is PIXELS
    assert grey.for_channels(3).mean == grey.mean * 3 and grey.for_channels(3).crop_pct == PIXELS.crop_pct
    with pytest.raises(ValueError, match="4 channels are not handled"):
        PIXELS.for_channels(4)


GREY = PIXELS.for_channels(1)
RAW_GREY = RAW.for_channels(1)


def test_grey_evaluation_is_that_of_the_grey_image():
    image = noise_image(0, 50, 37)
    (ours,) = EvalTransform(GREY)(image)
    grey = image.convert("L").convert("RGB")
    expected = EvalTransform(GREY.for_channels(3))(grey)
    assert all(np.array_equal(ours, channel) for channel in expected)
    assert np.array_equal(EvalTransform(GREY)(image.convert("L"))[0], ours)
    assert np.array_equal(EvalTransform(PIXELS)(image.convert("L")), EvalTransform(PIXELS)(grey))


@pytest.mark.parametrize("name", sorted({*APPLY, *STRENGTHS} - {"Identity"}))
def test_operations_take_grey_images(name):
    """A grey image is changed as its RGB form is (whose saturation has nothing to change)."""
    grey = noise_image(0, 50, 37).convert("L")
    for level in (0.1, 0.9):
        draws = (np.random.default_rng(0) for _ in range(2))
        result = Operation(name, 1.0, 9).apply(grey, level, AffineOptions(Image.BICUBIC, (120,)), next(draws))
        expected = Operation(name, 1.0, 9).apply(
            grey.convert("RGB"), level, AffineOptions(Image.BICUBIC, (120,) * 3), next(draws)
        )
        assert result.mode == "L"
        assert np.abs(np.float32(result) - np.float32(expected.convert("L"))).max() <= 1, name


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(color_jitter=(0.4,), re_prob=1, re_value="const"),
        Augmentation(pad_crop=4, re_prob=1),
        *(
            Augmentation(auto_augment=name)
            for name in (
                "randaug-m9-mstd0.5-inc1",
                "randaug-m9-n9",
                "autoaug",
                "autoaugr-mstd1",
                "3a",
                "trivialaugwide",
            )
        ),
    ],
    ids=str,
)
def test_grey_training_images(augmentation):
    transform, image = TrainTransform(GREY, augmentation), noise_image(0, 50, 37)
    results = [transform(image, np.random.default_rng(seed)) for seed in range(40)]
    assert all(result.shape == (1, 24, 24) and result.dtype == np.float32 for result in results)
    assert len({result.tobytes() for result in results}) > 20


def test_grey_batches(train_set):
    images, labels, _ = next(TrainLoader(train_set, TrainTransform(GREY, EVERYTHING), 4, cutmix=1.0).batches())
    assert images.shape == (4, 1, 24, 24) and labels.shape == (4, 3)
    shards = [list(EvalLoader(train_set, EvalTransform(GREY), 4, rank=rank, world_size=2)) for rank in (0, 1)]
    assert all(images.shape == (4, 1, 24, 24) for shard in shards for images, _ in shard)
    assert sum(int((labels >= 0).sum()) for shard in shards for _, labels in shard) == 21


# ------------------------------------------------------------------------------------------------- mixing


def mixed(batch_size=6, seed=0, **options):
    """A batch in which image i has value i + 1 everywhere and label i, mixed; images, labels."""
    images = np.empty((batch_size, 3, 20, 30), np.float32)
    images[:] = np.arange(1, batch_size + 1)[:, None, None, None]
    return Mixing(10, **options)(images, np.arange(batch_size, dtype=np.int32), np.random.default_rng(seed))


@pytest.mark.parametrize("options", [dict(mixup=0.8), dict(cutmix=1.0), dict(mixup=0.8, cutmix=1.0)], ids=str)
def test_labels_are_mixed_as_the_images_are(options):
    for seed in range(50):
        images, labels = mixed(seed=seed, **options)
        assert labels.shape == (6, 10) and labels.dtype == np.float32 and images.dtype == np.float32
        np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-6)
        # The mean of an image is its own value and its partner's (the batch in reverse) in the shares of the label.
        np.testing.assert_allclose(images.mean((1, 2, 3)), labels[:, :6] @ np.arange(1, 7), rtol=1e-5)


def test_cutmix_replaces_a_box_and_mixup_everything():
    shares, whole = [], 0
    for seed in range(300):
        images, labels = mixed(seed=seed, cutmix=1.0)
        box = images[0, 0] == 6
        assert np.array_equal(box, np.outer(box.any(1), box.any(0))) and set(np.unique(images[0])) <= {1, 6}
        shares.append(labels[0, 0])
        images, _ = mixed(seed=seed, mixup=0.8)
        whole += len(np.unique(images[0])) == 1
    assert whole == 300
    assert 0.55 < np.mean(shares) < 0.75  # 1 / 2, and more where the border cuts the box


@pytest.mark.parametrize("name, share", [("cutmix_prob", 0.3), ("mixup_switch_prob", 0.3)])
def test_probabilities_of_mixing(name, share):
    is_mixed = is_cut = 0
    for seed in range(400):
        images, labels = mixed(seed=seed, mixup=1.0, cutmix=1.0, **{name: share})
        is_mixed += labels[0, 0] < 1
        is_cut += set(np.unique(images[0])) <= {1, 6}  # no value in between
    assert abs((is_mixed if name == "cutmix_prob" else is_cut) / 400 - share) < 0.08


# ------------------------------------------------------------------------------------------------- loaders


def test_a_batch_has_the_promised_shapes(train_set):
    images, labels, noise = next(loader(train_set).batches())
    assert images.shape == (4, 3, 24, 24) and images.dtype == np.float32 and images.flags.c_contiguous
    assert labels.shape == (4,) and labels.dtype == np.int32
    assert noise.shape == (4, 3) and noise.dtype == np.float32 and noise.min() >= 0 and noise.max() < 1
    images, labels, _ = next(loader(train_set, cutmix=1.0, num_classes=5).batches())
    assert images.shape == (4, 3, 24, 24) and labels.shape == (4, 5) and labels.dtype == np.float32


def test_an_epoch_shows_every_image_once_in_another_order(train_set):
    batches = loader(train_set, batch_size=5, augmentation=Augmentation())
    assert batches.steps_per_epoch == 4  # 21 images: the remainder is left out
    orders = [batches.order(epoch) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(21))
    assert not np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[1], orders[2])
    expected = [train_set.labels[orders[step // 4][5 * (step % 4) :][:5]].tolist() for step in range(8)]
    assert [labels.tolist() for _, labels, _ in batches.batches(0, 8)] == expected
    assert not np.array_equal(loader(train_set, seed=1).order(0), orders[0])


@pytest.mark.parametrize("mixing", [{}, dict(mixup=0.2, cutmix=1.0)], ids=str)
def test_samples_do_not_depend_on_workers_or_chance(train_set, mixing):
    expected = list(loader(train_set, num_workers=1, seed=3, **mixing).batches(0, 7))
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    assert_same(loader(train_set, num_workers=5, seed=3, **mixing).batches(0, 7), expected)
    different = next(loader(train_set, seed=4, **mixing).batches())
    assert not any(np.array_equal(array, other) for array, other in zip(different, expected[0]))


@pytest.mark.parametrize("start", [1, 4, 5, 7, 13])
def test_starting_anywhere_gives_the_rest_of_the_run(train_set, start):
    """Five steps an epoch: within an epoch, at its end, in a later one."""
    options = dict(seed=2, mixup=0.2, cutmix=1.0)
    whole = list(loader(train_set, **options).batches(0, 16))
    assert_same(loader(train_set, **options).batches(start, 16 - start), whole[start:])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_samples_of_one(train_set, world_size):
    alone = list(loader(train_set, batch_size=8).batches(0, 4))
    ranks = [
        list(loader(train_set, batch_size=8 // world_size, rank=rank, world_size=world_size).batches(0, 4))
        for rank in range(world_size)
    ]
    for step, (images, labels, noise) in enumerate(alone):
        for rank in range(world_size):
            for array, part in zip((images, labels, noise), ranks[rank][step]):
                assert np.array_equal(array[rank::world_size], part)


def test_the_batches_for_a_device_are_the_same(train_set):
    batches = loader(train_set, mixup=0.2)
    dataset = batches.as_dataset(2, 5)  # into the second epoch
    assert dataset.get_dataset_size() == 5 and dataset.get_col_names() == ["image", "label", "noise"]
    assert_same(dataset.create_tuple_iterator(num_epochs=1, output_numpy=True), batches.batches(2, 5))


def test_every_rank_and_step_mixes_differently(train_set):
    train_set.labels = np.arange(21, dtype=np.int32)
    shares = set()
    for rank in range(2):
        mixed_loader = loader(train_set, 4, rank=rank, world_size=2, mixup=1.0, num_classes=21)
        shares.update(labels.max().item() for _, labels, _ in mixed_loader.batches(0, 4))
    assert len(shares) == 2 * 4


def test_an_image_looks_different_at_every_position_of_every_epoch(tmp_path):
    write_folder(tmp_path / "train", {"a": 1})
    dataset = open_dataset("imagenet", tmp_path, "train")
    dataset.paths, dataset.labels = dataset.paths * 8, np.zeros(8, np.int32)
    images, _, noise = (np.concatenate(column) for column in zip(*loader(dataset).batches(0, 3 * 2)))
    assert len({image.tobytes() for image in images}) == len({row.tobytes() for row in noise}) == 3 * 8


def test_repeats_are_neighbours_that_look_different(train_set):
    batches = loader(train_set, batch_size=6, aug_repeats=3)
    order = batches.order(0)
    assert len(order) == 21 and np.array_equal(order[0::3], order[1::3]) and np.array_equal(order[0::3], order[2::3])
    assert len(set(order)) == 7
    images, labels, noise = next(batches.batches())
    assert labels[0] == labels[1] == labels[2]
    assert not np.array_equal(images[0], images[1]) and not np.array_equal(noise[0], noise[1])


def test_too_few_images_for_a_batch_is_said(train_set):
    with pytest.raises(DataError, match="21 images, fewer than one global batch of 24 .2 ranks of 12."):
        loader(train_set, batch_size=12, world_size=2)


def workers() -> int:
    return sum(thread.name.startswith(("data", "batch")) for thread in threading.enumerate())


def wait_until(condition) -> bool:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.fixture
def broken_folder(tmp_path):
    """The second image of class b breaks off in the middle."""
    write_folder(tmp_path / "train", {"a": 3, "b": 3})
    path = tmp_path / "train" / "b" / "01.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    return tmp_path, path


def test_a_broken_image_ends_training_with_its_path(broken_folder):
    folder, path = broken_folder
    with pytest.raises(DataError) as caught:
        list(loader(open_dataset("imagenet", folder, "train"), batch_size=2, num_workers=3).batches(0, 3))
    assert str(path) in str(caught.value) and "truncated" in str(caught.value)
    assert wait_until(lambda: workers() == 0)


def test_a_broken_image_ends_evaluation_with_its_path(broken_folder):
    folder, path = broken_folder
    with pytest.raises(DataError, match="01.jpg"):
        list(EvalLoader(open_dataset("imagenet", folder, "train"), EvalTransform(PIXELS), 2))


def test_leaving_early_ends_the_workers(train_set):
    assert wait_until(lambda: workers() == 0)  # those of other tests
    batches = loader(train_set).batches()
    next(batches)
    assert workers() > 0
    batches.close()
    assert wait_until(lambda: workers() == 0)


def test_batches_are_made_ahead_but_not_without_bound(train_set):
    loaded, load = [], train_set.load
    train_set.load = lambda index, decode_size: loaded.append(index) or load(index)
    batches = loader(train_set).batches(0, 50)
    next(batches)
    assert wait_until(lambda: len(loaded) >= 8), "nothing is prepared while the network trains"
    time.sleep(0.1)
    assert len(loaded) <= 5 * 4, "much more is prepared than the network soon needs"
    batches.close()


@pytest.mark.parametrize("world_size, batch_size", [(1, 4), (1, 21), (2, 4), (4, 5), (5, 4), (3, 7), (32, 2)])
def test_evaluation_sees_every_image_once_in_full_batches(train_set, world_size, batch_size):
    transform = EvalTransform(PIXELS)
    expected = {transform(train_set.load(i)).tobytes(): train_set.labels[i] for i in range(len(train_set))}
    assert len(expected) == 21
    lengths, seen = set(), []
    for rank in range(world_size):
        shard = EvalLoader(train_set, transform, batch_size, rank=rank, world_size=world_size)
        batches = list(shard)
        assert len(batches) == len(shard)
        lengths.add(len(shard))
        for images, labels in batches:
            assert images.shape == (batch_size, 3, 24, 24) and images.dtype == np.float32
            assert labels.shape == (batch_size,) and labels.dtype == np.int32
            assert not images[labels < 0].any()
            for image, label in zip(images[labels >= 0], labels[labels >= 0]):
                assert expected[image.tobytes()] == label
                seen.append(image.tobytes())
    assert len(lengths) == 1 and sorted(seen) == sorted(expected)
