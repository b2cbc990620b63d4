"""Robustness: figures of made results, ImageNet-C's layout, and corrupted images that are made."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_validation import checkpoint

from mindska.analysis import corruptions
from mindska.analysis.corruptions import ALEXNET, ALEXNET_CLEAN, COMMON, Robustness
from mindska.config import Config, check_results, parse_args
from mindska.data import Preprocessing, open_dataset
from mindska.distributed import World
from mindska.errors import ConfigError, DataError, SettingError
from mindska.evaluation import Result
from mindska.names import CORRUPTIONS, chosen_corruptions

FIVE = (1, 2, 3, 4, 5)


def made(names=CORRUPTIONS, severities=FIVE, clean=100 - ALEXNET_CLEAN, worse=0.0):
    """A network that errs as AlexNet does, or by so many percent more often; the mean of its severities does."""
    results = {}
    for name in names:
        for severity in severities:
            error = ALEXNET[name] + worse + (severity - 3)
            results[name, severity] = Result(100 - error, 0.0, 1.0, 10)
    return Robustness("net.ckpt", "alexnet", clean and Result(clean, 0.0, 1.0, 10), results)


def test_alexnet_is_the_measure():
    same, worse = made(), made(worse=2.0)
    for names in (COMMON, CORRUPTIONS):
        assert same.mce(names) == pytest.approx(100) and same.mce(names, relative=True) == pytest.approx(100)
        assert worse.mce(names) == pytest.approx(np.mean([100 * (ALEXNET[n] + 2) / ALEXNET[n] for n in names]))
    expected = np.mean([100 * (ALEXNET[n] + 2 - 43.5) / (ALEXNET[n] - 43.5) for n in CORRUPTIONS])
    assert worse.mce(CORRUPTIONS, relative=True) == pytest.approx(expected)
    assert tuple(ALEXNET) == CORRUPTIONS
    assert len(CORRUPTIONS) == 19 and len(COMMON) == 15 and COMMON[-1] == "jpeg_compression"


def test_means_that_lack_a_part_are_none():
    part = made(names=("fog", "snow"))
    assert part.figures()["mCE"] is None and part.figures()["relative_mCE_19"] is None
    assert part.mean_error() == pytest.approx((81.9 + 86.7) / 2) and part.mce(("fog",)) == pytest.approx(100)
    assert (
        made(severities=(1, 2)).mce(COMMON) is None
        and made(severities=(1, 2)).figures()["corruptions"][0]["CE"] is None
    )
    assert made(clean=None).mce(COMMON, relative=True) is None and made(clean=None).mce(COMMON) == pytest.approx(100)
    assert made(names=COMMON).figures()["mCE_19"] is None
    said = "\n".join(made().lines())
    assert "mCE (15) 100.00 %" in said and "relative mCE (19) 100.00 %" in said and "mCE" not in part.lines()[-1]


def test_names_of_corruptions():
    assert chosen_corruptions(["all"]) == list(CORRUPTIONS) and chosen_corruptions(["common", "fog"]) == list(COMMON)
    assert chosen_corruptions(["fog", "saturate", "fog"]) == ["fog", "saturate"]
    with pytest.raises(ConfigError, match="'frog'; expected all, common, or some of gaussian_noise"):
        chosen_corruptions(["frog"])
    config = parse_args(["--corruptions", "fog,snow", "--severities", "1", "5"])
    assert config.corruptions == ("fog", "snow") and config.severities == (1, 5)
    with pytest.raises(SystemExit):
        parse_args(["--severities", "6"])


@pytest.fixture(scope="module")
def layout(images, tmp_path_factory):
    """ImageNet-C's layout of the validation images, darkened by severity; fog lies in its group."""
    root = tmp_path_factory.mktemp("imagenet-c")
    for name, folder in (("brightness", root / "brightness"), ("fog", root / "weather" / "fog")):
        for severity in (1, 2):
            shutil.copytree(images / "val", folder / str(severity))
            for path in (folder / str(severity)).rglob("*.png"):
                pixels = np.asarray(Image.open(path)) // (1 + severity)
                Image.fromarray(pixels if name == "brightness" else np.roll(pixels, severity, 1)).save(path)
    return root


def configured(images, path, **settings):
    settings = dict(data_dir=str(images), corruptions=("brightness", "fog"), severities=(1, 2), **settings)
    return Config(ckpt_path=str(path), batch_size=5, **settings)


def test_a_folder_in_imagenet_cs_layout(images, layout, tmp_path, capsys):
    """Each figure is that of `validate` on the folder; several networks, one table and picture."""
    from mindska.validation import validate

    first, second = (checkpoint(tmp_path / f"{seed}.ckpt", seed) for seed in (3, 4))
    files = dict(result_json=str(tmp_path / "r.json"), result_csv=str(tmp_path / "r.csv"))
    config = configured(
        images, first, corruptions_dir=str(layout), corruptions_plot=str(tmp_path / "p.png"),
        more_ckpt_paths=(str(second),), **files,
    )  # fmt: skip
    corruptions.validate(config, World())
    assert "mean error under corruption" in capsys.readouterr().out
    found = json.loads((tmp_path / "r.json").read_text())["networks"]
    assert len(found) == 2 and found[0]["mCE"] is None and found[0]["severities"] == [1, 2]
    with (tmp_path / "r.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (1 + 4) and rows[0]["corruption"] == "none"
    for row in rows:
        place = dict(none=images, brightness=layout / "brightness", fog=layout / "weather" / "fog")[row["corruption"]]
        split = "val" if row["corruption"] == "none" else row["severity"]
        one = Config(data_dir=str(place), val_split=split, ckpt_path=row["ckpt_path"], batch_size=7,
                     result_json=str(tmp_path / "one.json"))  # fmt: skip
        validate(one, World())
        assert float(row["top1"]) == pytest.approx(json.loads((tmp_path / "one.json").read_text())["top1"])
    assert Image.open(tmp_path / "p.png").size[0] > 300
    # Without clean images: the same corrupted ones, and no figures on clean ones.
    corruptions.validate(configured("", first, corruptions_dir=str(layout), result_json=files["result_json"]), World())
    alone = json.loads((tmp_path / "r.json").read_text())["networks"][0]
    assert alone["clean_top1"] is None and alone["corruptions"] == found[0]["corruptions"]


def test_corrupted_images_are_not_cropped_again(images, layout, tmp_path):
    """ImageNet-C's images are the crops that networks are shown."""
    from mindska.validation import validate

    path, file = checkpoint(tmp_path / "net.ckpt", 3), str(tmp_path / "r.json")
    chosen = dict(corruptions=("brightness",), severities=(1,), corruptions_dir=str(layout))
    corruptions.validate(
        Config(**chosen, data_dir=str(images), ckpt_path=str(path), crop_pct=0.4, result_json=file), World()
    )
    found = json.loads(Path(file).read_text())["networks"][0]
    top1 = []
    for crop_pct in (1.0, 0.4):
        validate(Config(data_dir=str(layout / "brightness"), val_split="1", ckpt_path=str(path), crop_pct=crop_pct,
                        result_json=file), World())  # fmt: skip
        top1.append(json.loads(Path(file).read_text())["top1"])
    assert top1[0] != top1[1] and found["corruptions"][0]["top1"]["1"] == pytest.approx(top1[0])


@pytest.mark.fault("corruptions")
def test_what_is_missing_of_the_layout(images, layout, tmp_path):
    path = checkpoint(tmp_path / "net.ckpt")
    for settings, said in (
        (dict(corruptions=("snow",)), "No corruption 'snow' in .*; its folders: brightness, weather"),
        (dict(severities=(3,)), "No severity 3 of brightness in .*; its folders: 1, 2"),
        (dict(corruptions_dir=str(layout / "none")), "No folder at"),
    ):
        config = Config(**{
            **dict(data_dir=str(images), ckpt_path=str(path), corruptions=("brightness",), severities=(1,)),
            **dict(corruptions_dir=str(layout)), **settings,
        })  # fmt: skip
        with pytest.raises(DataError, match=said):
            corruptions.validate(config, World())
    other = shutil.copytree(layout, tmp_path / "other")
    (other / "brightness" / "1" / "class0").rename(other / "brightness" / "1" / "class9")
    with pytest.raises(ConfigError, match="missing class0, unknown class9"):
        corruptions.validate(configured(images, path, corruptions_dir=str(other)), World())


@pytest.mark.fault("corruptions")
def test_the_package_may_be_missing(images, tmp_path, monkeypatch):
    monkeypatch.setattr(corruptions, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match="pip install imagecorruptions-imaug"):
        corruptions.validate(configured(images, checkpoint(tmp_path / "net.ckpt")), World())


def test_images_are_corrupted_as_the_network_sees_them(images, monkeypatch):
    """After the resize and the crop; random numbers follow from corruption, severity and the image's name."""
    seen = []

    def fake(image, corruption, severity, seed):
        seen.append(seed)
        return image

    monkeypatch.setattr(corruptions, "corrupted", fake)
    dataset = open_dataset("", images, "val")
    pixels = Preprocessing((8, 8), 0.5, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    transform, whole = (
        corruptions.EvalTransform(pixels),
        corruptions.EvalTransform(Preprocessing((8, 8), 1.0, "bicubic", pixels.mean, pixels.std)),
    )
    one = corruptions.CorruptedDataset(dataset, pixels, "fog", 1)
    np.testing.assert_array_equal(whole(one.load(3)), transform(dataset.load(3)))
    corruptions.CorruptedDataset(dataset, pixels, "fog", 2).load(3)
    one.load(4)
    one.load(3)
    assert len(set(seen)) == 3 and seen[0] == seen[3] and "fog 1" in one.describe(3)


@pytest.mark.slow
def test_all_corruptions_of_the_package(tmp_path):
    """The same seed gives the same pixels, whatever else was drawn; a higher severity changes more."""
    pytest.importorskip("imagecorruptions")
    image = np.asarray(Image.effect_mandelbrot((48, 40), (-2, -1.5, 1, 1.5), 60).convert("RGB"))
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    for name in CORRUPTIONS:
        found = [corruptions.corrupted(image, name, severity, 5) for severity in (1, 5)]
        np.random.random(3)  # noqa: NPY002
        np.testing.assert_array_equal(corruptions.corrupted(image, name, 1, 5), found[0], err_msg=name)
        changes = [np.abs(each.astype(int) - image).mean() for each in found]
        assert found[0].shape == image.shape and changes[1] > 0, name
        if name not in ("brightness", "saturate"):  # which may leave a picture of two colours as it is
            assert changes[1] > changes[0], name
    for name in ("gaussian_noise", "impulse_noise", "glass_blur"):
        assert (corruptions.corrupted(image, name, 3, 6) != corruptions.corrupted(image, name, 3, 7)).any()
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    corruptions.corrupted(image, "shot_noise", 2, 1)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert len(state) == len(before)
    with pytest.raises(ConfigError, match="at least 32x32"):
        corruptions.corrupted(image[:16], "fog", 1, 0)


def test_made_corruptions_are_evaluated(images, tmp_path):
    pytest.importorskip("imagecorruptions")
    path = checkpoint(tmp_path / "net.ckpt", 3)
    settings = dict(image_resize=(32,), result_json=str(tmp_path / "r.json"))
    results = []
    for _ in range(2):
        corruptions.validate(configured(images, path, **settings), World())
        results.append(Path(settings["result_json"]).read_text())
    assert results[0] == results[1]
    found = json.loads(results[0])["networks"][0]
    assert [row["name"] for row in found["corruptions"]] == ["brightness", "fog"]
    assert found["clean_top1"] is not None


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(details="d.csv"), "details is of images as they are"),
        (dict(corruptions_plot="p.gif"), "ends in .png, .pdf or .svg"),
        (dict(class_csv="c.csv", more_ckpt_paths=("b",)), "class_csv is of one checkpoint"),
    ],
)
def test_results_of_corrupted_images(settings, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        check_results(Config(ckpt_path="a", corruptions=("fog",), **settings))
    check_results(Config(ckpt_path="a", corruptions=("fog",), more_ckpt_paths=("b",), result_json="r.json"))


def test_the_command_validate(images, tmp_path, monkeypatch):
    """With corruptions it is this validation, without them the usual one."""
    from mindska import tasks
    from mindska.commands import validate

    called = []
    monkeypatch.setattr(corruptions, "validate", lambda config, world: called.append(config.corruptions))
    monkeypatch.setattr(tasks, "validate", lambda config, world: called.append("usual"))
    words = ["--ckpt_path", str(checkpoint(tmp_path / "net.ckpt")), "--data_dir", str(images), "--mode", "pynative"]
    validate.main(words)
    validate.main([*words, "--corruptions", "fog", "snow"])
    assert called == ["usual", ("fog", "snow")]
