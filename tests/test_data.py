"""Images on disk -> batches: what is found, what is refused, and that a sample depends on nothing but its position."""

from __future__ import annotations

import pickle
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from mindska.data import (
    Augmentation,
    DataError,
    EvalLoader,
    EvalTransform,
    Preprocessing,
    TrainLoader,
    TrainTransform,
    check_same_classes,
    open_dataset,
)
from mindska.data.augment import AutoAugment, Operation
from mindska.data.mixing import Mixing

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
    for name in (".hidden.png", "notes.txt"):
        (train / "a" / name).write_text("no image")
    (train / "a" / ".thumbnails").mkdir()
    (train / "a" / ".thumbnails" / "00.png").write_text("no image")
    (train / ".cache").mkdir()
    dataset = open_dataset("", tmp_path, "train")
    assert dataset.class_names == ["B", "a", "b"]
    assert [dataset.describe(i)[len(str(train)) :] for i in range(len(dataset))] == [
        "/B/00.PNG", "/a/00.PNG", "/a/01.PNG", "/a/more/x.webp", "/b/00.PNG",
    ]  # fmt: skip
    assert dataset.labels.dtype == np.int32 and dataset.labels.tolist() == [0, 1, 1, 1, 2]


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
    with pytest.raises(DataError, match=r"only in training: \['bee'\], only in validation: \['wasp'\]"):
        check_same_classes(train, val)


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


# ------------------------------------------------------------------------------------------------- transforms


def test_a_large_photo_is_decoded_no_larger_than_its_crop_needs(tmp_path):
    """The pixels are nearly those of the whole photo's crop, and a small crop's the same."""
    root = tmp_path / "train" / "a"
    root.mkdir(parents=True)
    noise_image(0, 900, 700).save(root / "photo.jpg", quality=95)
    dataset, transform = open_dataset("", tmp_path, "train"), TrainTransform(RAW, Augmentation(scale=(0.001, 0.3)))
    whole, widths = dataset.load(0), set()
    for seed in range(40):
        sizes = []
        enough = lambda size: sizes.append(size) or transform.enough(size, np.random.default_rng(seed))  # noqa: B023, E731
        image = dataset.load(0, enough)
        widths.add(image.width)
        assert sizes == [(900, 700)] and image.width >= transform.enough(sizes[0], np.random.default_rng(seed))[0]
        ours = transform(image, np.random.default_rng(seed), sizes[0])
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
    train_set.load = lambda index, enough: loaded.append(index) or load(index)
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
