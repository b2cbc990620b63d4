"""Faults 9, 11: damaged images, sets that ranks do not divide (the latter also in tests/test_commands.py)."""

import io
import json
import re
import shutil

import numpy as np
import pytest
from commands import assert_same_losses, losses, mpirun, run, train
from PIL import Image
from PIL.WebPImagePlugin import WebPImageFile

from mindska.data.datasets import DataError, read_image


def broken_webp(path):
    """A WebP image (Pillow goes by the content, not by the name) that can be opened and not decoded."""
    content = io.BytesIO()
    Image.open(path).save(content, "WEBP")
    content.seek(30)
    content.write(bytes(255 - byte for byte in content.getvalue()[30:50]))
    path.write_bytes(content.getvalue())


def damage(folder):
    """Makes some images unreadable; returns their paths. Others become unusual but readable."""
    files = sorted(folder.rglob("*.png"))
    bad = files[5::9]
    kinds = [
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(p.read_bytes()[:200]),
        lambda p: p.write_text("text"),
        broken_webp,
    ]
    for i, path in enumerate(bad):
        kinds[i % len(kinds)](path)
    good = [path for path in files if path not in bad]
    for path, mode in zip(good, ["CMYK", "I;16", "P", "RGBA", "L"]):
        image = Image.open(path).convert("RGB")
        if mode == "CMYK":
            image.convert(mode).save(path.with_suffix(".jpg"))
            path.unlink()
        elif mode == "I;16":
            Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)
        else:
            image.convert(mode).save(path)
    rotated = good[6].with_suffix(".jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by the viewer, not by Pillow
    Image.open(good[6]).convert("RGB").save(rotated, exif=exif)
    good[6].unlink()
    return bad


@pytest.fixture(scope="module")
def damaged(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "images"
    shutil.copytree(images, folder)
    return folder, damage(folder / "train")


@pytest.mark.parametrize("error", [OSError, EOFError])
def test_an_image_that_does_not_decode_is_unreadable(images, tmp_path, monkeypatch, error):
    """Pillow's decoders of WebP, GIF and TIFF end with an EOFError where there is no frame."""
    path = tmp_path / "a.png"
    shutil.copy(images / "train" / "class0" / "000.png", path)
    broken_webp(path)
    if error is EOFError:
        monkeypatch.setattr(WebPImageFile, "load", lambda self: self.seek(1))
    with Image.open(path) as image, pytest.raises(error):
        image.load()
    with pytest.raises(DataError, match=r"a\.png cannot be read"):
        read_image(path)


@pytest.mark.slow
def test_damaged_images_are_replaced_counted_and_named(damaged, tmp_path):
    folder, bad = damaged
    printed = train(folder, tmp_path / "a", max_damaged=0.12, epoch_size=6)
    for path in bad:
        assert printed.count(f"{path} cannot be read") == 1
    assert f"(replaced by another image; {len(bad)} so far)" in printed
    assert np.isfinite(losses(tmp_path / "a")).all() and len(losses(tmp_path / "a")) == 24
    train(folder, tmp_path / "b", max_damaged=0.12, epoch_size=6, num_parallel_workers=1)
    assert_same_losses(tmp_path / "a", tmp_path / "b")  # which image replaces which is no chance


@pytest.mark.slow
def test_two_ranks_with_damaged_images_do_not_hang(damaged, tmp_path):
    folder, _ = damaged
    train(folder, tmp_path / "run", max_damaged=0.12, epoch_size=4, batch_size=5, launcher=mpirun(2))
    assert np.isfinite(losses(tmp_path / "run")).all()


def test_more_than_the_allowed_share_is_an_error(damaged, tmp_path):
    folder, bad = damaged
    printed = train(folder, tmp_path / "run", expect=1, epoch_size=6)
    # More than one when workers find them at the same time.
    assert re.search(r"\d of 36 training images cannot be read, more than the 0 that max_damaged allows", printed)
    assert any(str(path) in printed for path in bad) and "Traceback" not in printed


@pytest.mark.slow
def test_validation_fails_or_leaves_out_by_choice(images, whole_run, tmp_path):
    whole, _ = whole_run
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    bad = damage(folder / "val")
    settings = dict(ckpt_path=whole / "tiny_bn_best.ckpt", result_json=tmp_path / "r.json")
    printed = run("validate.py", folder, expect=1, **settings)
    assert "cannot be read" in printed and "Traceback" not in printed
    printed = run("validate.py", folder, val_skip_damaged="true", **settings)
    assert all(f"{path} cannot be read" in printed for path in bad) and "left out" in printed
    assert json.loads((tmp_path / "r.json").read_text())["images"] == 36 - len(bad)
