"""Faults 12, 13: files that lie or attack, and runs that do not fit their folder. All are refused before training."""

import os
import pickle
import struct
import zipfile

import mindcv
import mindspore as ms
import pytest
import torch
from commands import SETTINGS, losses, mpirun, rows, run, script, train

from mindska.config import ConfigError, read_yaml
from mindska.weights import WeightsError, read_weights

peak_memory = script("benchmark").peak_memory
MODEL = "skanet_nano"


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pickled(path, harm):
    path.write_bytes(pickle.dumps({"state_dict": Harmful(harm)}))


def saved_by_torch(path, harm):
    torch.save({"state_dict": Harmful(harm)}, path)


def zip_bomb(path, harm):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        with archive.open("archive/data/0", "w", force_zip64=True) as entry:
            for _ in range(1024):
                entry.write(bytes(1 << 20))


def lying_header(path, harm):
    """A safetensors header that claims exabytes."""
    path.write_bytes(struct.pack("<Q", 1 << 60) + b'{"a": {"dtype": "F32", "shape": [1099511627776], ')


def lying_shape(path, harm):
    """A MindSpore checkpoint whose parameter claims more values than it has."""
    from mindspore.train.checkpoint_pb2 import Checkpoint

    checkpoint = Checkpoint()
    value = checkpoint.value.add()
    value.tag = "classifier.weight"
    value.tensor.dims.extend([1 << 40])
    value.tensor.tensor_type = "Float32"
    value.tensor.tensor_content = b"1234"
    path.write_bytes(checkpoint.SerializeToString())


def text(path, harm):
    path.write_text("not a checkpoint")


def other_model(path, harm):
    ms.save_checkpoint(mindcv.create_model("skresnet18", num_classes=3), str(path))


def partial(path, harm):
    ms.save_checkpoint(list(mindcv.create_model(MODEL).get_parameters())[:20], str(path))


@pytest.mark.parametrize(
    "make, suffix, message",
    [
        (pickled, ".pth", "was not opened"),
        (saved_by_torch, ".pth.tar", "was not opened"),
        (zip_bomb, ".pth", "was not opened: it would unpack to 1,07"),
        (zip_bomb, ".ckpt", "was not opened: it would unpack to 1,07"),
        (lying_header, ".safetensors", "not a readable safetensors file"),
        (lying_shape, ".ckpt", "not a readable MindSpore checkpoint"),
        (text, ".ckpt", "is no file of weights"),
        (text, ".pth", "is no file of weights"),
        (other_model, ".ckpt", "does not fit skanet_nano"),
        (partial, ".ckpt", "missing in the file"),
    ],
)
def test_a_hostile_file_is_refused(tmp_path, make, suffix, message):
    path, harm = tmp_path / f"file{suffix}", tmp_path / "harm"
    make(path, harm)
    before = peak_memory(reset=True)
    with pytest.raises(WeightsError) as error:
        mindcv.create_model(MODEL, checkpoint_path=str(path))
    assert message in str(error.value) and str(path) in str(error.value)
    assert not harm.exists(), "code from the file was run"
    # What was read may be twice the file, and never what a header claims.
    assert peak_memory() - before < 200e6


def test_yaml_that_makes_objects_is_refused(tmp_path):
    harm = tmp_path / "harm"
    (tmp_path / "a.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{harm}']\n")
    with pytest.raises(ConfigError, match="is not plain YAML"):
        read_yaml(tmp_path / "a.yaml")
    assert not harm.exists()


def test_the_command_refuses_before_it_trains(images, tmp_path):
    saved_by_torch(tmp_path / "a.pth", tmp_path / "harm")
    printed = train(images, tmp_path / "run", expect=1, ckpt_path=tmp_path / "a.pth", model=MODEL, image_resize=64)
    assert "was not opened" in printed and "Traceback" not in printed
    assert not (tmp_path / "harm").exists() and not (tmp_path / "run").exists()


def test_weights_of_another_head_are_refused(tmp_path):
    ms.save_checkpoint(mindcv.create_model(MODEL, num_classes=7), str(tmp_path / "a.ckpt"))
    weights, _ = read_weights(tmp_path / "a.ckpt", MODEL)
    assert weights["classifier.weight"].shape == (7, 96)
    with pytest.raises(WeightsError, match=r"classifier.weight: \(7, 96\) in the file, \(1000, 96\) in the network"):
        mindcv.create_model(MODEL, checkpoint_path=str(tmp_path / "a.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_classes=5), "num_classes: None -> 5"),
        (dict(model="tiny"), "model: 'tiny_bn' -> 'tiny'"),
        (dict(batch_size=4), "batch_size: 8 -> 4"),
        (dict(gradient_accumulation_steps=2), "gradient_accumulation_steps: 1 -> 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_run_does_not_go_on_with_other_settings(whole_run, images, settings, message):
    out, _ = whole_run
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    printed = train(images, out, expect=1, **settings)
    assert message in printed and "choose another --ckpt_save_dir" in printed and "Traceback" not in printed
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()} | {".lock": before[".lock"]}


@pytest.mark.slow
def test_another_number_of_ranks(images, tmp_path):
    """Accepted at the end of an epoch with the same global batch, and said; refused within an epoch."""
    settings = dict(model="tiny", epoch_size=2)
    train(images, tmp_path / "whole", **settings)
    out = tmp_path / "run"
    train(images, out, ckpt_save_steps=3, **settings)
    (out / "tiny-2_8.ckpt").unlink()
    (out / "tiny-1_6.ckpt").rename(tmp_path / "tiny-1_6.ckpt")
    printed = train(images, out, batch_size=4, launcher=mpirun(2), ckpt_save_steps=3, **settings)
    assert "Going on with 2 instead of 1 ranks" in printed and "Resuming after step 4" in printed
    assert [int(row["step"]) for row in rows(out)] == list(range(1, 9))
    for ours, theirs in zip(losses(out), losses(tmp_path / "whole")):
        assert ours == pytest.approx(theirs, abs=1e-5)
    for path in out.glob("tiny-*.ckpt"):
        path.unlink()
    (tmp_path / "tiny-1_6.ckpt").rename(out / "tiny-1_6.ckpt")
    printed = run("train.py", images, out, expect=1, **{**SETTINGS, **settings, "ckpt_save_steps": 3})
    assert "world_size: 2 -> 1" in printed
