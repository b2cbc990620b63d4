"""Files are written whole or not at all, it is checked before the work that they can be, messages name the user's."""

import errno
import io
import json
import os
import re
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import script

from mindska import prediction, tasks
from mindska.errors import UserError, WeightsError, WriteError, clear_errors
from mindska.files import check_writable, replacing, user_path
from mindska.prediction import Prediction
from mindska.weights.files import write_checkpoint, write_safetensors


@pytest.mark.parametrize("error", [WeightsError, OSError, lambda text: OSError(errno.EIO, "Input/output error", text)])
def test_a_message_names_the_file_that_was_asked_for(tmp_path, error):
    """And not the temporary one, of which there may be one in another."""
    path = tmp_path / "my model.ckpt"
    with pytest.raises((UserError, WriteError)) as raised, replacing(path) as outer, replacing(outer) as inner:
        raise error(str(inner))
    assert str(path) in str(raised.value) and ".tmp" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("umask")
@pytest.mark.parametrize("mask", [0o077, 0o027, 0o002])
def test_files_have_the_mode_that_the_umask_leaves(tmp_path, mask):
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "a.json") as temporary:
            temporary.write_text("{}")
        write_checkpoint(tmp_path / "a.ckpt", {"a": np.zeros(3, np.float32)}, {})
        write_safetensors(tmp_path / "a.safetensors", {"a": np.zeros(3, np.float32)}, {})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~mask}


@pytest.mark.fault("permissions")
def test_what_cannot_be_written_is_known_before_the_work(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    check_writable(tmp_path / "a.json")
    check_writable(tmp_path / "b.json", overwrite=False)
    for path, message in (
        (tmp_path / "none" / "a.json", "The folder of .* does not exist"),
        (tmp_path / "a.json" / "b.json", "The folder of .* does not exist"),
        (tmp_path, "is a folder; expected the name of a file"),
        (tmp_path / "a.json", "exists; choose another"),
    ):
        with pytest.raises(WriteError, match=message):
            check_writable(path, overwrite=False, otherwise="choose another name")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert user_path("~/a.ckpt") == Path("/home/me/a.ckpt") and user_path("~") == Path("/home/me")
    assert user_path("~nosuchuser/a") == Path("~nosuchuser/a") and user_path("a~/~") == Path("a~/~")


@pytest.mark.parametrize("name", ["convert", "predict", "export", "inspect_checkpoint", "average_checkpoints"])
def test_every_path_of_every_command_may_begin_at_home(name, tmp_path, monkeypatch):
    """`--from=~/a.ckpt`, where no shell replaces it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    words = {
        "convert": ["--from=~/none.ckpt", f"--to={tmp_path}/a.ckpt"],
        "predict": ["~", "--ckpt_path=~/none.ckpt"],
        "export": ["--format", "mindir", "--ckpt_path=~/none.ckpt", "--to=~/a.mindir"],
        "inspect_checkpoint": ["~/none.ckpt"],
        "average_checkpoints": ["~/none.ckpt", "--to=~/a.ckpt"],
    }[name]
    (tmp_path / "a.png").touch()
    with pytest.raises(SystemExit, match=f"No checkpoint at {tmp_path}/none.ckpt"):
        script(name).main(words)


@pytest.mark.fault("permissions")
@pytest.mark.parametrize(
    "error, said",
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/data/a\udcff"),
            r"/data/a\\udcff: Permission denied; whose",
        ),
        (OSError(errno.ENOSPC, "No space left on device", b"/data"), "/data: No space left on device; make room"),
        (OSError(errno.ENOSPC, "No space left on device"), "the output: No space left on device; make room"),
        (OSError(errno.ESTALE, "Stale file handle", "/nfs/a"), "/nfs/a: Stale file handle"),
    ],
)
def test_an_error_of_the_file_system_is_a_message(error, said):
    with pytest.raises(SystemExit, match=f"^error: {said}"), clear_errors():
        raise error


def test_other_errors_keep_their_traceback():
    for error in (OSError("a library's own"), ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")):
        with pytest.raises(OSError, match=re.escape(str(error))), clear_errors():
            raise error


@pytest.mark.fault("output")
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a full disk is made by Linux's /dev/full")  # noqa: PTH110
def test_output_to_a_full_disk_is_a_message(monkeypatch):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit, match="the output: No space left on device"), clear_errors():
            print("result")


@pytest.mark.fault("output")
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "gb18030"])
@pytest.mark.parametrize("format", ["text", "csv", "json"])
def test_a_name_that_the_output_cannot_have_ends_nothing(tmp_path, monkeypatch, encoding, format):
    """A file's name that is no UTF-8, and classes whose names the terminal's encoding lacks."""
    for name in (b"\xff.png", b"ok.png", "猫.png".encode()):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
    predict = script("predict")

    def predictor(paths, topk):
        return (Prediction(path, [(0, "猫 \U0001f431", 1.0)]) for path in paths)

    monkeypatch.setattr(prediction, "open_predictor", lambda *_, **__: predictor)
    monkeypatch.setattr(tasks, "task_of_file", lambda *_: "classification")
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    predict.main([str(tmp_path), "--ckpt_path", str(tmp_path), "--format", format])
    out.flush()
    said = out.buffer.getvalue().decode(encoding)
    assert said.count("ok.png") == 1 and r"\udcff.png" in said
    if format == "json":
        entries = json.loads(said)
        assert len(entries) == 3 and {entry["classes"][0]["name"] for entry in entries} == {"猫 \U0001f431"}
