"""A user's mistake ends in a message that says what to do, not in a traceback."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NANO = ["--model", "skanet_nano", "--image_resize", "64", "--batch_size", "4"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "data_dir is not set"),
        (["--data_dir", "DATA"], "model is not set"),
        (
            ["--data_dir", "DATA", "--model", "skanet_x"],
            "does not know it; did you mean skanet_s or skanet_nano",
        ),
        (["--data_dir", "nowhere"], "No data folder at"),
        (["--data_dir", "DATA", *NANO, "--device_target", "GPU"], "'GPU' is not available"),
        (["--data_dir", "DATA", *NANO, "--pretrained"], "No MindSpore weights are published for skanet_nano"),
        (["--data_dir", "DATA", *NANO, "--auto_augment", "randaug-q3"], "auto_augment is 'randaug-q3'"),
        (["--data_dir", "DATA", *NANO, "--drop_rate", "1.5"], "drop_rate is 1.5"),
        (["--data_dir", "DATA", *NANO, "--mean", "0.5", "0.5"], "expected three numbers"),
        (["--data_dir", "DATA", *NANO, "--crop_pct", "1.5"], "crop_pct is 1.5"),
        (["--data_dir", "DATA", *NANO, "--scale", "0.5"], "scale is (0.5,)"),
        (["--data_dir", "DATA", *NANO, "--num_classes", "2"], "num_classes is 2, but the data has 3"),
        (["--data_dir", "DATA", *NANO, "--ckpt_path", "none.ckpt"], "No checkpoint at"),
        (["--data_dir", "DATA", *NANO, "--batch_size", "99"], "fewer than one global batch of 99"),
        (["--data_dir", "DATA", *NANO, "--distribute", "true"], "distribute is True, but the number of processes is 1"),
    ],
)
def test_train(images, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    words = [str(images) if word == "DATA" else word for word in arguments]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert message in str(error.value) and str(error.value).startswith("error: ")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "needs --ckpt_path"),
        (["--ckpt_path", "none.ckpt"], "No checkpoint at"),
        (["--ckpt_path", "BEST", "--model", "skanet_s"], "holds tiny_bn, but model is skanet_s; leave --model out"),
        (["--ckpt_path", "BEST", "--result_json", "nowhere/r.json"], "nowhere/r.json does not exist"),
    ],
)
def test_validate(images, whole_run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    best = str(whole_run[0] / "tiny_bn_best.ckpt")
    words = [best if word == "BEST" else word for word in arguments]
    monkeypatch.setattr(sys, "argv", ["validate.py", "--data_dir", str(images), *words])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(ROOT / "validate.py"), run_name="__main__")
    assert message in str(error.value) and str(error.value).startswith("error: ")


def test_a_program_with_a_network_ends_in_silence():
    """MindSpore's destructor of cells prints an error for each that lives to the end."""
    program = "import mindcv, mindska\nnet = mindcv.create_model('skanet_nano')"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
