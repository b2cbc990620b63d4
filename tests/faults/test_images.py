"""Faults 9, 11: damaged images, sets that ranks do not divide (the latter also in tests/test_commands.py).

And images that would harm: of too many pixels, for foreign decoders, without an end; ranks that see different images.
"""

import io
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from commands import PROGRAMS, ROOT, assert_same_losses, losses, mpirun, run, train
from PIL import EpsImagePlugin, Image
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from mindska.data import EvalTransform, Preprocessing, TrainTransform, open_dataset, transforms
from mindska.data.images import MAX_BYTES, read_image
from mindska.data.transforms import Augmentation
from mindska.errors import DataError


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


@pytest.mark.fault("images")
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


@pytest.mark.fault("decoders")
@pytest.mark.parametrize(
    "error", [MemoryError(), KeyError("x"), struct.error("y"), ZeroDivisionError("z"), RecursionError(), TypeError("t")]
)
@pytest.mark.parametrize("place", ["_open", "load"])
def test_whatever_a_decoder_raises_the_image_is_unreadable(images, monkeypatch, error, place):
    def fail(self, *_):
        raise error

    monkeypatch.setattr(PngImageFile, place, fail)
    path = images / "train" / "class0" / "000.png"
    with pytest.raises(DataError, match=r"000\.png cannot be read: \S+"):
        read_image(path)
    if place == "_open":
        with pytest.raises(DataError, match="nor can the next"):
            open_dataset("", images, "train")


def test_an_interrupt_while_decoding_is_no_damage(images, monkeypatch):
    monkeypatch.setattr(PngImageFile, "load", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        read_image(images / "train" / "class0" / "000.png")


@pytest.mark.fault("decoders")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_decoders_see_no_file(images, tmp_path, monkeypatch):
    """EPS would start Ghostscript; DDS and others raise what nobody expects; AVIF is not in every Pillow."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    Image.init()
    image, formats = Image.open(images / "train" / "class0" / "000.png").convert("RGB"), []
    for name in Image.SAVE:
        path, content = tmp_path / f"{name}.png", io.BytesIO()
        try:
            image.save(content, name)  # not to a path: one of them takes the ending for its own from then on
            path.write_bytes(content.getvalue())
            with Image.open(path) as opened:
                formats.append(opened.format)
        except Exception:  # a format that cannot be written, or not read again
            continue
        if formats[-1] in ("JPEG", "MPO", "PNG", "BMP", "DIB", "WEBP", "PPM", "TIFF", "GIF"):
            continue
        with pytest.raises(DataError, match="cannot be read: it is no image that we open"):
            read_image(path)
    assert {"EPS", "DDS", "ICO", "TGA", "JPEG2000"} <= set(formats)


@pytest.mark.fault("decoders")
def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "empty.png").write_bytes(b"")
    with (tmp_path / "huge.webp").open("wb") as file:
        file.write(b"RIFF\xff\xff\xff\x7fWEBPVP8L")
        file.truncate(MAX_BYTES + 1)  # takes no space
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        for path, said in [
            (tmp_path / "pipe.png", "it is a pipe, no regular file"),
            (tmp_path / "socket", "it is a socket"),
            (tmp_path, "it is a folder"),
            ("/dev/zero", "it is a device"),
            (tmp_path / "empty.png", "it is no image that we open"),
            (tmp_path / "huge.webp", "it has 1,073,741,825 bytes, more than"),
            (tmp_path / "missing.png", "No such file or directory"),
        ]:
            with pytest.raises(DataError, match=said):
                read_image(path)


@pytest.mark.fault("image-bombs")
def test_the_number_of_pixels_has_a_limit(tmp_path, monkeypatch):
    """Pillow's own, above which it warns; a JPEG file is decoded at half its size up to twice as many."""
    for name in ("a.png", "a.jpg", "a.tif", "a.gif", "a.webp", "a.ppm", "a.bmp"):
        Image.new("RGB", (60, 50), (200, 100, 50)).save(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    for path in tmp_path.iterdir():
        with pytest.warns(Image.DecompressionBombWarning):
            if path.suffix == ".jpg":
                assert read_image(path).size == (30, 25)
                assert read_image(path, lambda size: size).size == (30, 25)
                assert read_image(path, lambda size: (1, 1)).size == (8, 7)
                continue
            with pytest.raises(DataError, match="its 60x50 pixels are more than the 2,000 that an image may have"):
                read_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for path in tmp_path.iterdir():
        with pytest.raises(DataError, match="cannot be read: .* exceeds limit of 2000"):
            read_image(path)


@pytest.mark.fault("image-bombs")
def test_a_tile_of_a_tiff_has_the_limit_as_well(tmp_path):
    """It is decoded as a whole, however small the image."""
    data = zlib.compress(bytes(64))
    tags = {256: 10, 257: 10, 258: 8, 259: 8, 262: 1, 277: 1, 322: 60000, 323: 60000, 324: 8, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    path = tmp_path / "a.tif"
    path.write_bytes(header + data + struct.pack("<H", len(tags)) + entries + bytes(4))
    with Image.open(path) as image:
        assert image.size == (10, 10)
    with pytest.raises(DataError, match="its 60000x60000 pixels are more than"):
        read_image(path)


def png_strip(path, width: int, height: int) -> None:
    """A PNG of so many grey pixels in a few KB."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(1 + width)) for _ in range(height)) + rows.flush()
    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


STRIPS = [(30000, 4), (60000, 1), (1, 80000), (4, 30000), (7, 300000)]
INPUTS = [((224, 224), 0.9), ((64, 64), 1.0), ((64, 96), 0.9), ((32, 32), 1e-5)]


@pytest.mark.fault("image-bombs")
@pytest.mark.parametrize("size", STRIPS, ids=str)
def test_a_strip_makes_no_large_image(size, monkeypatch):
    """Not when it is resized, nor between the passes of Pillow's resize (over the rows, then over the columns)."""
    largest, plain = [], Image.Image.resize

    def resize(self, size, resample=None, box=None, **options):
        rows = self.height if box is None else box[3] - box[1]
        largest.append(max(size[0] * size[1], size[0] * rows))
        return plain(self, size, resample, box, **options)

    monkeypatch.setattr(Image.Image, "resize", resize)
    monkeypatch.setattr(transforms, "MAX_RESIZED_PIXELS", 1 << 20)
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    largest.clear()
    for shape, crop_pct in INPUTS:
        pixels = Preprocessing(shape, crop_pct, "bicubic", (0.0,) * 3, (1.0,) * 3)
        assert EvalTransform(pixels)(image).shape == (3, *shape)
        for augmentation in (Augmentation(), Augmentation(pad_crop=4)):
            transform = TrainTransform(pixels, augmentation)
            for seed in range(5):
                assert transform(image, np.random.default_rng(seed)).shape == (3, *shape)
    assert max(largest) <= max(1 << 20, size[0] * size[1])


@pytest.mark.fault("image-bombs")
@pytest.mark.slow
def test_memory_for_strips(tmp_path):
    """Strips of 8 million pixels in files of 15 KB, with 700 MB more than the program needs."""
    png_strip(tmp_path / "column.png", 1, 8_000_000)
    png_strip(tmp_path / "row.png", 8_000_000, 1)
    png_strip(tmp_path / "strip.png", 30000, 4)
    program = """
import resource, sys
import numpy as np
from mindska.data import Augmentation, EvalTransform, Preprocessing, TrainTransform
from mindska.data.images import read_image
now = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (now + (700 << 20),) * 2)
for path in sys.argv[1:]:
    for shape in ((64, 64), (224, 160)):
        pixels = Preprocessing(shape, 0.9, "bicubic", (0,) * 3, (1,) * 3)
        image = read_image(path)
        EvalTransform(pixels)(image)
        for augmentation in (Augmentation(), Augmentation(pad_crop=4)):
            TrainTransform(pixels, augmentation)(image, np.random.default_rng(0))
"""
    files = sorted(tmp_path.glob("*.png"))
    done = subprocess.run(
        [sys.executable, "-c", program, *files],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.fault("other-data")
@pytest.mark.slow
def test_ranks_that_see_different_images_end_with_the_difference(images, tmp_path):
    for rank in (0, 1):
        shutil.copytree(images, tmp_path / f"data{rank}")
    (tmp_path / "data1" / "val" / "class1" / "003.png").unlink()
    options = dict(launcher=mpirun(2), script=PROGRAMS / "per_rank.py")
    printed = train(tmp_path / "dataRANK", tmp_path / "run", expect=1, batch_size=4, **options)
    assert "rank 0: val: 36 images of 3 classes in" in printed and "rank 1: val: 35 images" in printed
    assert "class1/003.png is on rank 0 only" in printed and "Traceback" not in printed
    assert not (tmp_path / "run" / "metrics.csv").exists()


@pytest.mark.fault("images")
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


@pytest.mark.fault("images")
@pytest.mark.slow
def test_two_ranks_with_damaged_images_do_not_hang(damaged, tmp_path):
    folder, _ = damaged
    train(folder, tmp_path / "run", max_damaged=0.12, epoch_size=4, batch_size=5, launcher=mpirun(2))
    assert np.isfinite(losses(tmp_path / "run")).all()


@pytest.mark.fault("images")
def test_more_than_the_allowed_share_is_an_error(damaged, tmp_path):
    folder, bad = damaged
    printed = train(folder, tmp_path / "run", expect=1, epoch_size=6)
    # More than one when workers find them at the same time.
    assert re.search(r"\d of 36 training images cannot be read, more than the 0 that max_damaged allows", printed)
    assert any(str(path) in printed for path in bad) and "Traceback" not in printed


@pytest.mark.fault("images")
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
