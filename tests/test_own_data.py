"""One's own images: one folder in two parts, lists, some of the classes, tar files, and a look through them."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from commands import SETTINGS, rows, run, script, train
from PIL import Image
from test_data import PIXELS, noise_image, write_folder

from mindska import builders
from mindska.config import Config
from mindska.data import Augmentation, EvalLoader, EvalTransform, TrainLoader, TrainTransform, open_dataset
from mindska.data.datasets import chosen_classes
from mindska.data.lists import write_list
from mindska.data.shards import find_shards
from mindska.data.splits import split_by_ratio
from mindska.errors import ConfigError, DataError


def members(dataset):
    return sorted((dataset.member(i)[0], dataset.class_names[label]) for i, label in enumerate(dataset.labels))


# ------------------------------------------------------------------------------------------------- val_ratio


def test_a_split_by_ratio_is_by_class_and_depends_on_names_and_seed_alone(tmp_path):
    write_folder(tmp_path / "one", {"ant": 10, "bee": 21, "cat": 2})
    for name in ("cat", "bee", "ant"):  # another order in the folder
        for path in sorted((tmp_path / "one" / name).iterdir(), reverse=True):
            (tmp_path / "two" / name).mkdir(parents=True, exist_ok=True)
            os.link(path, tmp_path / "two" / name / path.name)
    whole = open_dataset("", tmp_path, "one")
    parts = split_by_ratio(whole, 0.2, 0)
    again = split_by_ratio(open_dataset("", tmp_path, "two"), 0.2, 0)
    assert [part.identity() for part in parts] == [part.identity() for part in again]
    train_set, val_set = parts
    assert np.bincount(val_set.labels).tolist() == [2, 4, 1] and np.bincount(train_set.labels).tolist() == [8, 17, 1]
    assert sorted(members(train_set) + members(val_set)) == members(whole)
    assert train_set.held_out is val_set
    assert members(split_by_ratio(whole, 0.2, 1)[1]) != members(val_set)
    # A new file: all but two of the others stay where they are. One of another class moves none.
    noise_image(1).save(tmp_path / "two" / "bee" / "0a.jpg")
    new = split_by_ratio(open_dataset("", tmp_path, "two"), 0.2, 0)[1]
    assert len(set(members(val_set)) - set(members(new))) <= 1
    assert [m for m in members(new) if m[1] != "bee"] == [m for m in members(val_set) if m[1] != "bee"]
    for ratio, counts in ((0.001, [1, 1, 1]), (0.999, [9, 20, 1])):  # at least one, and not all
        assert np.bincount(split_by_ratio(whole, ratio, 0)[1].labels).tolist() == counts
    for path in (tmp_path / "one" / "cat" / "00.jpg", tmp_path / "two" / "cat" / "00.jpg"):
        path.unlink()
    with pytest.raises(DataError, match=r"1 classes in .* have one image only \(cat\)"):
        split_by_ratio(open_dataset("", tmp_path, "one"), 0.2, 0)


def test_one_folder_may_be_data_dir_or_its_training_folder(tmp_path, caplog):
    caplog.set_level("INFO", logger="mindska")
    write_folder(tmp_path / "plain", {"ant": 5, "bee": 5})
    write_folder(tmp_path / "both" / "train", {"ant": 5, "bee": 5})
    found = [builders.open_training_data(Config(data_dir=str(tmp_path / n), val_ratio=0.4)) for n in ("plain", "both")]
    assert [[part.identity() for part in pair] for pair in found] == 2 * [[part.identity() for part in found[0]]]
    assert len(found[0][0]) == 6 and len(found[0][1]) == 4
    assert builders.open_training_data(Config(data_dir=str(tmp_path / "plain"), val_ratio=0.4, val_while_train=False))[
        0
    ].identity() == (found[0][0].identity())
    (tmp_path / "both" / "val").mkdir()
    builders.open_training_data(Config(data_dir=str(tmp_path / "both"), val_ratio=0.4))
    assert "val is not used" in caplog.text
    with pytest.raises(DataError, match="No split 'train' in .*its folders: ant, bee.*--val_ratio 0.2"):
        builders.open_training_data(Config(data_dir=str(tmp_path / "plain")))
    with pytest.raises(ConfigError, match="val_ratio is 0.2 and val_split is 'test'"):
        Config(val_ratio=0.2, val_split="test")
    # What the checkpoint was trained on is compared: another seed would evaluate on training images without a word.
    for seed, warned in ((0, 0), (1, 1)):
        caplog.clear()
        config = Config(data_dir=str(tmp_path / "plain"), val_ratio=0.4, val_seed=seed)
        builders.open_validation_data(config, dict(train_set=found[0][0].identity()))
        assert caplog.text.count("it may have seen some") == warned


@pytest.mark.slow
def test_a_run_by_ratio_records_its_validation_files_and_validate_takes_the_same(images, whole_run, tmp_path):
    whole, out = images / "train", tmp_path / "run"
    settings = dict(val_ratio=0.25, epoch_size=2)
    train(whole, out, **settings)
    with (out / "val_files.csv").open() as file:
        listed = list(csv.DictReader(file))
    assert len(listed) == 9 and {row["label"] for row in listed} == {"class0", "class1", "class2"}
    assert all((whole / row["path"]).is_file() for row in listed)
    before = (out / "val_files.csv").read_bytes()
    last = rows(out)[-1]
    (out / "val_files.csv").unlink()
    assert "other settings" in train_refused(whole, out, **{**settings, "val_ratio": 0.5})
    train(whole, out, **settings)  # finished: it only writes what is missing
    assert (out / "val_files.csv").read_bytes() == before
    best = dict(ckpt_path=out / "tiny_bn_best.ckpt", batch_size=5)
    results = []
    for number, other in enumerate((dict(val_ratio=0.25), dict(val_split=out / "val_files.csv"))):
        run("validate.py", whole, result_json=tmp_path / f"{number}.json", **best, **other)
        results.append(json.loads((tmp_path / f"{number}.json").read_text()))
    assert results[0]["top1"] == results[1]["top1"] and results[0]["images"] == results[1]["images"] == 9
    assert last["top1"]


def train_refused(images, out, **settings):
    return run("train.py", images, out, expect=1, **{**SETTINGS, **settings})


# ------------------------------------------------------------------------------------------------- lists


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for i in range(6):
        noise_image(i).save(root / f"{i}.png")
    (root / "b").mkdir()
    noise_image(9).save(root / "b" / "0,1.png")
    return root


@pytest.mark.parametrize(
    "text, names, labels",
    [
        ("path,label\n0.png,dog\n1.png,cat\n", ["cat", "dog"], [1, 0]),
        ("0.png,dog\n\n1.png,cat\n", ["cat", "dog"], [1, 0]),
        ("﻿label,what,filename\r\n2,x,0.png\r\n0,,1.png\r\n", ["0", "1", "2"], [2, 0]),
        ('path,label\n"b/0,1.png",10\n./0.png,2\n', [str(i) for i in range(11)], [10, 2]),
        ("b/../0.png,a\n1.png,b", ["a", "b"], [0, 1]),
    ],
)
def test_a_list_names_images_and_labels(photos, tmp_path, text, names, labels):
    (tmp_path / "train.csv").write_text(text, encoding="utf-8")
    dataset = open_dataset("imagenet", photos, str(tmp_path / "train.csv"))
    assert dataset.class_names == names and dataset.labels.tolist() == labels
    assert dataset.load(0).size == (40, 30)
    # Beside its images it needs no data_dir, and the same images have the same identity.
    place = photos / "here.csv"
    place.write_text(text, encoding="utf-8")
    try:
        assert open_dataset("imagenet", "", str(place)).identity() == dataset.identity()
        assert open_dataset("imagenet", photos, "here.csv").identity() == dataset.identity()
    finally:
        place.unlink()
    write_list(tmp_path / "again.csv", dataset, photos)
    again = open_dataset("imagenet", photos, str(tmp_path / "again.csv"), trained_on=names)
    assert again.identity() == dataset.identity()


@pytest.mark.fault("lists")
def test_labels_of_a_list_are_numbers_or_names_of_the_classes_that_are_known(photos, tmp_path):
    known = ["0", "1", "10", "2"]
    cases = {
        "0.png,2\n1.png,10\n": [3, 2],  # names first
        "0.png,3\n1.png,1\n": [3, 1],  # 3 is no name: numbers
        "0.png,2\n": [3],  # a class may have no image
    }
    for text, labels in cases.items():
        (tmp_path / "val.csv").write_text(text)
        dataset = open_dataset("", photos, str(tmp_path / "val.csv"), trained_on=known)
        assert dataset.class_names == known and dataset.labels.tolist() == labels
    (tmp_path / "val.csv").write_text("0.png,2\n1.png,7\n2.png,cow\n")
    with pytest.raises(DataError, match=r"2 labels are none of the 4 classes .*\n.*\n  line 2: '7'\n  line 3: 'cow'"):
        open_dataset("", photos, str(tmp_path / "val.csv"), trained_on=known)
    (tmp_path / "map.txt").write_text("cow\ndog\n")
    (tmp_path / "val.csv").write_text("0.png,1\n1.png,0\n")
    dataset = open_dataset("", photos, str(tmp_path / "val.csv"), class_map=tmp_path / "map.txt")
    assert dataset.class_names == ["cow", "dog"] and dataset.labels.tolist() == [1, 0]


@pytest.mark.fault("lists")
@pytest.mark.parametrize(
    "text, said",
    [
        ("", "names no image"),
        ("path,label\n", "names no image"),
        ("0.png;dog\n", "begins with '0.png;dog'; expected path,label with a comma"),
        ("a,b,c\n0.png,1,2\n", "or a header that names these columns"),
        ("path,label\n0.png,a\n1.png\n,b\n", r"2 of 3 rows(.|\n)*line 3: path '1.png' and label ''(.|\n)*line 4"),
        ("0.png,a\n../x.png,b\n", r"line 2: '../x.png' is outside of .*--allow_outside_data_dir"),
        ("0.png,a\n/etc/passwd,b\n", r"line 2: '/etc/passwd' is outside"),
        ("0.png,a\nno.png,b\nb,c\n", r"line 2: no file at 'no.png'\n  line 3: no file at 'b'"),
        ("0.png,a\n1.png,b\n./0.png,b\n", "line 3: './0.png' is the image of line 1 again"),
        ('0.png,a\n"1.png,b\n', "cannot be read"),
        ("0.png,a\n1.png\0,b\n", "line 2|cannot be read"),
    ],
)  # fmt: skip
def test_a_list_that_is_wrong_is_refused_by_its_lines(photos, tmp_path, text, said):
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(DataError, match=said):
        open_dataset("", photos, str(tmp_path / "train.csv"))


@pytest.mark.fault("lists")
def test_a_list_may_lead_outside_where_that_is_asked_for(photos, tmp_path):
    noise_image(3).save(tmp_path / "x.png")
    (tmp_path / "train.csv").write_text(f"0.png,a\n{tmp_path / 'x.png'},b\n")
    with pytest.raises(DataError, match="outside"):
        open_dataset("", photos, str(tmp_path / "train.csv"))
    dataset = open_dataset("", photos, str(tmp_path / "train.csv"), allow_outside_data_dir=True)
    assert dataset.describe(1) == str(tmp_path / "x.png") and dataset.load(1).size == (40, 30)
    with pytest.raises(DataError, match="No list of images at"):
        open_dataset("", photos, "none.csv")
    assert Config(train_split="x.csv").data_dir == ""


def test_a_list_is_split_by_ratio(zoo, tmp_path):
    """With data_dir or without; what was kept is a list again."""
    place = zoo / "all.csv"
    lines = [f"{path.relative_to(zoo)},{path.parent.name}" for path in sorted((zoo / "train").rglob("*.jpg"))]
    place.write_text("\n".join(lines))
    try:
        found = [
            builders.open_training_data(Config(train_split=split, data_dir=data_dir, val_ratio=0.3))
            for split, data_dir in ((str(place), ""), ("all.csv", str(zoo)))
        ]
    finally:
        place.unlink()
    assert [[part.identity() for part in pair] for pair in found] == 2 * [[part.identity() for part in found[0]]]
    for data_dir, (train_set, val_set) in zip(("", zoo), found):
        write_list(tmp_path / "val.csv", train_set.held_out, data_dir)
        again = open_dataset("", zoo, str(tmp_path / "val.csv"), trained_on=train_set.class_names)
        assert again.identity() == val_set.identity()


# ------------------------------------------------------------------------------------------------- classes


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    root = tmp_path_factory.mktemp("zoo")
    for split in ("train", "val"):
        write_folder(root / split, {"ant": 3, "bee": 4, "cat": 2, "dog": 3})
    return root


def test_some_of_the_classes_are_taken(zoo, tmp_path):
    (tmp_path / "some.txt").write_text("dog\nbee\n")
    for classes in ("dog,bee", str(tmp_path / "some.txt"), " bee , dog,"):
        train_set, val_set = builders.open_training_data(Config(data_dir=str(zoo), classes=classes))
        assert train_set.class_names == val_set.class_names == ["bee", "dog"]
        assert np.bincount(train_set.labels).tolist() == [4, 3]
        assert {Path(train_set.describe(i)).parent.name for i in np.flatnonzero(train_set.labels)} == {"dog"}
    split = builders.open_training_data(Config(data_dir=str(zoo), classes="cat,ant", val_ratio=0.4))
    assert [np.bincount(part.labels).tolist() for part in split] == [[2, 1], [1, 1]]
    for classes, said in (
        ("dog,cow", r"classes names \['cow'\], which .*zoo.* does not have"),
        ("dog,dog", "names twice"),
        (",", "names none"),
    ):
        with pytest.raises(DataError, match=said):
            builders.open_training_data(Config(data_dir=str(zoo), classes=classes))
    assert chosen_classes("a") == ["a"]


def test_folders_are_mapped_to_classes(zoo, tmp_path):
    """ImageNet-V2's folders are numbers; and several folders may be one class."""
    (tmp_path / "map.csv").write_text("folder,class\ndog,mammal\ncat,mammal\nant,insect\nbee,insect\n")
    dataset = open_dataset("", zoo, "val", class_map=tmp_path / "map.csv")
    assert dataset.class_names == ["mammal", "insect"] and np.bincount(dataset.labels).tolist() == [5, 7]
    other = open_dataset("", zoo, "val", class_map=tmp_path / "map.csv", trained_on=["insect", "mammal"])
    assert other.class_names == ["insect", "mammal"] and np.bincount(other.labels).tolist() == [7, 5]
    for text, said in (
        ("dog,mammal\n", "it lacks classes: .*'ant', 'bee', 'cat'"),
        ("dog\n", r"line 1: \['dog'\]; expected FOLDER,CLASS"),
        ("dog,a\ndog,b\n", "line 2: it names the folder 'dog' twice"),
        ("", "names no folder"),
    ):
        (tmp_path / "map.csv").write_text(text)
        with pytest.raises(DataError, match=said):
            open_dataset("", zoo, "val", class_map=tmp_path / "map.csv")


def test_validation_on_some_classes_keeps_the_numbers_of_the_network(zoo):
    recorded = ["dog", "cow", "bee", "ant", "cat"]
    dataset = builders.open_validation_data(Config(data_dir=str(zoo), classes="bee,dog"), dict(class_names=recorded))
    assert dataset.class_names == recorded and np.bincount(dataset.labels).tolist() == [3, 0, 4]
    with pytest.raises(ConfigError, match=r"classes names \['cat'\], which the network of .* does not know"):
        builders.open_validation_data(Config(data_dir=str(zoo), classes="cat"), dict(class_names=["dog", "bee"]))


# ------------------------------------------------------------------------------------------------- tar files


def jpg(seed: int) -> bytes:
    buffer = io.BytesIO()
    noise_image(seed).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, files, **options):
    """files: name -> content, or a prepared TarInfo."""
    with tarfile.open(path, "w", **options) as archive:
        for name, content in files:
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MINDSKA_CACHE", str(folder))
    return folder


def shards_of(root, count=2, each=4):
    root.mkdir(exist_ok=True)
    for number in range(count):
        files = []
        for i in range(each):
            key = f"{number:04}/{i:06}" if number else f"{i:06}"
            label = (number + i) % 3
            files.append((f"{key}.png", jpg(10 * number + i)))
            files.append(
                (f"{key}.cls", str(label).encode())
                if i % 2
                else (f"{key}.json", json.dumps(dict(label=label)).encode())
            )
            files.append((f"{key}.txt", b"a caption"))
        write_tar(root / f"train-{number:04}.tar", files, format=tarfile.PAX_FORMAT if number else tarfile.GNU_FORMAT)
    return root


def test_tar_files_are_read_in_place(tmp_path, cache, monkeypatch):
    root = shards_of(tmp_path / "data")
    dataset = open_dataset("imagenet", root, "train")
    assert len(dataset) == 8 and dataset.class_names == ["0", "1", "2"]
    assert dataset.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert dataset.describe(5).endswith("train-0001.tar: 0001/000001.png")
    assert np.array_equal(np.asarray(dataset.load(5)), np.asarray(noise_image(11)))
    assert "passed over: 8 .txt files" in str(dataset) and "2 tar files" in str(dataset)
    # A folder of them, a pattern, and the classes of the network.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train").symlink_to(root)
    names = ["ant", "bee", "cat"]
    other = open_dataset("imagenet", tmp_path / "other", "train", trained_on=names)
    assert other.class_names == names and other.labels.tolist() == dataset.labels.tolist()
    assert len(open_dataset("imagenet", root, "train-{0000..0001}.tar")) == 8
    assert len(open_dataset("imagenet", root, "train-0001.tar")) == 4
    with pytest.raises(DataError, match="1 of 3 tar files are not in .*train-0002.tar"):
        open_dataset("imagenet", root, "train-{0000..0002}.tar")
    with pytest.raises(DataError, match="leads out of data_dir"):
        open_dataset("imagenet", root, "../x.tar")
    # The index is kept, and used as long as the file is the same.
    kept = sorted((cache / "shards").iterdir())
    assert len(kept) == 2
    from mindska.data import shards

    monkeypatch.setattr(shards, "_read", lambda *_: pytest.fail("read again"))
    assert open_dataset("imagenet", root, "train").identity() == dataset.identity()
    monkeypatch.undo()
    monkeypatch.setenv("MINDSKA_CACHE", str(cache))
    kept[0].write_text("[1, {")
    kept[1].write_text(kept[1].read_text().replace("00000", "../00"))
    assert len(open_dataset("imagenet", root, "train")) == 8
    # Of the same size, another time: another label.
    whole = (root / "train-0001.tar").read_bytes()
    with tarfile.open(root / "train-0001.tar") as archive:
        start = archive.getmember("0001/000001.cls").offset_data
    (root / "train-0001.tar").write_bytes(whole[:start] + b"0" + whole[start + 1 :])
    os.utime(root / "train-0001.tar", ns=(2, 2))
    assert open_dataset("imagenet", root, "train").labels[5] == 0 != dataset.labels[5]
    write_tar(root / "train-0000.tar", [("a.png", jpg(3)), ("a.cls", b"2")])
    os.utime(root / "train-0000.tar", ns=(1, 1))
    assert len(open_dataset("imagenet", root, "train")) == 5
    with pytest.raises(DataError, match="has changed since the start"):
        dataset.load(0)


def test_samples_of_tar_files_depend_on_their_position_alone(tmp_path, cache):
    root = shards_of(tmp_path / "data", 3, 6)
    dataset = open_dataset("", root, "train")
    images = tmp_path / "images"
    for i in range(len(dataset)):
        name = f"{dataset.class_names[dataset.labels[i]]}/{dataset.member(i)[0].replace('/', '_')}"
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(dataset.content(i))
    whole = TrainLoader(dataset, TrainTransform(PIXELS, Augmentation()), 4, seed=3)
    later = TrainLoader(dataset, TrainTransform(PIXELS, Augmentation()), 4, seed=3, num_workers=3)
    for batch, other in zip(list(whole.batches(0, 7))[5:], later.batches(5, 2)):
        assert all(np.array_equal(a, b) for a, b in zip(batch, other))
    train_set, val_set = split_by_ratio(dataset, 0.3, 0)
    shares = [list(EvalLoader(val_set, EvalTransform(PIXELS), 2, rank=rank, world_size=2)) for rank in (0, 1)]
    labels = sorted(int(label) for share in shares for _, labels in share for label in labels if label >= 0)
    assert labels == sorted(val_set.labels.tolist()) and len(train_set) + len(val_set) == 18


def link(name, kind, target="/etc/passwd"):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return name, entry


GOOD = [("a.png", jpg(1)), ("a.cls", b"0")]


@pytest.mark.fault("tar")
@pytest.mark.parametrize(
    "files, said",
    [
        ([*GOOD, link("b.png", tarfile.SYMTYPE)], "'b.png' is a link, a device or a sparse file"),
        ([*GOOD, link("b.png", tarfile.LNKTYPE, "a.png")], "'b.png' is a link"),
        ([*GOOD, link("b.png", tarfile.CHRTYPE)], "'b.png' is a link, a device"),
        ([*GOOD, link("b.png", tarfile.FIFOTYPE)], "'b.png' is a link, a device"),
        ([*GOOD, ("../b.png", jpg(2)), ("../b.cls", b"1")], "leads elsewhere"),
        ([*GOOD, ("/b.png", jpg(2))], "leads elsewhere"),
        ([*GOOD, ("b.png", jpg(2))], r"1 of 2 images have no label \(b\)"),
        ([*GOOD, ("a.jpg", jpg(2))], "a has two images, a.png and this one"),
        ([*GOOD, ("a.png", jpg(2))], "'a.png' is in it twice"),
        ([*GOOD, ("a.json", b'{"label": 4}')], "a has two labels, '0' and '4'"),
        ([*GOOD, ("b.png", jpg(2)), ("b.json", b'{"label": [1]}')], "b.json' is no label: its label is"),
        ([*GOOD, ("b.png", jpg(2)), ("b.json", b"[" * 60000)], "b.json' is no label"),
        ([*GOOD, ("b.png", jpg(2)), ("b.cls", b"")], "b.cls' is empty"),
        ([*GOOD, ("b.png", jpg(2)), ("b.cls", b"\xff\xfe")], "b.cls' is no label"),
        ([*GOOD, ("b.png", jpg(2)), ("b.cls", b"1" * 70000)], "70,000 bytes; expected a label"),
        ([("notes.txt", b"hello")], "no image with a label"),
        ([("a.png", b"no image at all"), ("a.cls", b"0")], "it is no image that we open"),
    ],
)  # fmt: skip
def test_hostile_tar_files_are_refused(tmp_path, cache, files, said):
    write_tar(tmp_path / "train.tar", files)
    with pytest.raises(DataError, match=said):
        open_dataset("", tmp_path, "train")


@pytest.mark.fault("tar")
def test_damaged_tar_files_lose_nothing_without_a_word(tmp_path, cache):
    path = tmp_path / "train.tar"
    files = [(f"{i}.{end}", jpg(i) if end == "png" else b"%d" % (i % 2)) for i in range(30) for end in ("png", "cls")]
    write_tar(path, files)
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        entries = archive.getmembers()
    header = entries[20].offset
    cases = {
        "cut": whole[: entries[20].offset_data + 100],
        "cut between": whole[:header],
        "header": whole[:header] + b"\x07" * 512 + whole[header + 512 :],
        "compressed": b"\x1f\x8b" + whole[2:],
        "empty": b"",
        "long name": whole[:header] + long_header() + whole[header:],
    }
    for name, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(DataError, match="a header of 8,589,934,592 bytes" if name == "long name" else "train.tar"):
            open_dataset("", tmp_path, "train")
    # A damaged image is an image that cannot be read: counted, replaced or refused as in folders.
    start = entries[20].offset_data
    path.write_bytes(whole[:start] + b"\0" * 64 + whole[start + 64 :])
    dataset = open_dataset("", tmp_path, "train")
    assert len(dataset) == 30
    with pytest.raises(DataError, match=r"train.tar: 10.png cannot be read"):
        dataset.load(10)
    loader = TrainLoader(dataset, TrainTransform(PIXELS, Augmentation()), 30, max_damaged=0.1)
    assert len(list(loader.batches(0, 1))) == 1 and list(loader.damaged.reasons) == [dataset.describe(10)]


def long_header() -> bytes:
    entry = tarfile.TarInfo("././@LongLink")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    return entry.tobuf(tarfile.GNU_FORMAT)


def test_tar_files_beside_class_folders_are_what_these_were_unpacked_from(tmp_path, cache):
    write_folder(tmp_path / "train", {"ant": 2, "bee": 2})
    write_tar(tmp_path / "train" / "ant.tar", GOOD)
    assert find_shards(tmp_path, "train") == []
    assert len(open_dataset("", tmp_path, "train")) == 4


# ------------------------------------------------------------------------------------------------- check_data


def check(capsys, *words, expect=0):
    with pytest.raises(SystemExit) as ended:
        script("check_data").main([str(word) for word in words])
    said = capsys.readouterr().out
    assert ended.value.code == expect, said
    return said


@pytest.mark.fault("looked-through")
def test_check_data_finds_what_is_wrong(tmp_path, capsys):
    root = tmp_path / "data"
    write_folder(root / "train", {"ant": 12, "bee": 30, "cat": 2})
    write_folder(root / "val", {"ant": 2, "bee": 2, "cat": 2})
    for split, name in (("train", "cat"), ("val", "cat")):  # the same seeds gave the same images: others here
        for i, path in enumerate(sorted((root / split / name).iterdir())):
            noise_image(1000 + i + 10 * len(split)).save(path)
    (root / "val" / "bee" / "00.jpg").write_bytes((root / "train" / "ant" / "03.jpg").read_bytes())
    (root / "train" / "bee" / "x.jpg").write_bytes((root / "train" / "ant" / "04.jpg").read_bytes())
    Image.new("P", (300, 20)).save(root / "train" / "bee" / "p.png")
    files = dict(json=tmp_path / "r.json", contact_sheet=tmp_path / "s.png")
    words = ["--data_dir", root, "--json", files["json"], "--contact_sheet", files["contact_sheet"]]
    said = check(capsys, *words)
    report = json.loads(files["json"].read_text())
    assert report["splits"]["train"]["classes"] == dict(ant=12, bee=32, cat=2) and report["faults"] == []
    assert report["splits"]["train"]["modes"] == {"RGB": 45, "P": 1}
    assert "1 images are neither RGB nor grey" in said and "300x20 pixels" in said
    assert "bee has 32 images and cat 2" in said and "fewer than 5 images: cat" in said
    assert "train: 1 images have the content of another" in said and "1 contents are in several classes" in said
    between = report["duplicates"]["between"]
    assert [str(root / "train" / "ant" / "03.jpg"), str(root / "val" / "bee" / "00.jpg")] in between
    assert "4 of 6 validation images are training images as well" in said  # so are those that write_folder made alike
    with Image.open(files["contact_sheet"]) as sheet:
        assert sheet.format == "PNG" and sheet.width > 1000 and np.asarray(sheet).std() > 10
    # What would end a run: unreadable images, too many for max_damaged and any for validation.
    (root / "val" / "ant" / "00.jpg").write_bytes(b"damaged")
    said = check(capsys, "--data_dir", root, expect=1)
    assert "FAULT: val: 1 of 6 images cannot be read" in said and "Training would fail" in said
    check(capsys, "--data_dir", root, "--val_skip_damaged", "true")
    for i in range(3):
        (root / "train" / "bee" / f"{i:02}.jpg").write_bytes(b"damaged")
    assert "FAULT: train: 3 of 46" in check(capsys, "--data_dir", root, "--val_skip_damaged", expect=1)
    check(capsys, "--data_dir", root, "--val_skip_damaged", "--max_damaged", "0.1")
    said = check(capsys, "--data_dir", root / "train", "--val_ratio", "0.2", "--batch_size", "64", expect=1)
    assert "fewer than one batch of 64" in said
    (root / "val" / "dog").mkdir()
    said = check(capsys, "--data_dir", root, "--json", files["json"], expect=1)  # and the training images all the same
    assert "FAULT: " in said and "dog has no image" in said and "train: 46 images of 3 classes" in said
    report = json.loads(files["json"].read_text())
    assert len(report["faults"]) == 2 and report["splits"]["train"]["unreadable"] == 3


@pytest.mark.fault("looked-through")
def test_check_data_tells_mistakes_of_its_options(tmp_path, capsys):
    main = script("check_data").main
    for words, said in (
        (["--data_dir", str(tmp_path / "none")], "No data folder at"),
        ([], "data_dir is not set"),
        (["--data_dir", str(tmp_path), "--json", str(tmp_path / "no" / "x.json")], "does not exist"),
        (["--data_dir", str(tmp_path), "--contact_sheet", str(tmp_path / "x.jpg")], "should end with .png"),
    ):
        with pytest.raises(SystemExit, match=said):
            main(words)
    with pytest.raises(SystemExit):
        main(["--data_dri", "x"])
    assert "did you mean 'data_dir'" in capsys.readouterr().err
