"""A user's mistake ends in a message that says what to do, not in a traceback; and what else the commands print."""

import io
import logging
import runpy
import subprocess
import sys
from types import SimpleNamespace

import mindcv
import pytest
from commands import ROOT, script

from mindska import training
from mindska.errors import PredictionError
from mindska.models.factory import own_preprocessing
from mindska.prediction import Prediction, open_predictor
from mindska.weights import source
from mindska.weights.files import write_checkpoint

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
        (
            ["--ckpt_path", "BEST", "--model", "skanet_s"],
            "holds tiny_bn, but the model asked for is skanet_s",
        ),
        (["--ckpt_path", "BEST", "--num_classes", "5"], "has 3 classes, but num_classes is 5"),
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


def nano(path, num_classes, **recorded):
    net = mindcv.create_model("skanet_nano", num_classes=num_classes)
    record = dict(model="skanet_nano", num_classes=num_classes, preprocessing=own_preprocessing("skanet_nano"))
    write_checkpoint(path, {p.name: p for p in net.get_parameters()}, dict(record, **recorded))
    return str(path)


@pytest.fixture
def training_of(images, tmp_path, monkeypatch):
    """What train.py gives to the trainer, instead of training."""

    def run(*words):
        given = {}

        def trainer(config, world, step, loader, rates, eval_network, val_loader, record):
            given.update(step=step, eval_network=eval_network, val_loader=val_loader, record=record)
            return SimpleNamespace(fit=lambda: None)

        monkeypatch.setattr(training, "Trainer", trainer)
        monkeypatch.setattr(sys, "argv", ["train.py", "--data_dir", str(images), *NANO, *map(str, words)])
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        return SimpleNamespace(**given)

    return run


def test_a_network_for_evaluation_is_like_the_trained_one(training_of, tmp_path, monkeypatch):
    """It has the options of the weights' file, whose arrays it does not need: the trainer fills it. None where nothing
    is evaluated."""
    path = nano(tmp_path / "a.ckpt", 3, network={"norm_eps": 1e-4})
    read = []
    monkeypatch.setattr(
        source, "read_file", lambda path, read_file=source.read_file: read.append(path) or read_file(path)
    )
    given = training_of("--ckpt_path", path)
    assert given.eval_network.options == given.step.network.options == {"norm_eps": 1e-4}
    assert not given.eval_network.training and len(read) == 1
    given = training_of("--val_while_train", "false")
    assert given.eval_network is None and given.val_loader is None


def test_more_outputs_than_classes(training_of, tmp_path, caplog):
    """The ImageNet recipes' thousand on data of three classes: said, recorded, and the others have a number as name."""
    with caplog.at_level(logging.INFO, "mindska"):
        record = training_of("--num_classes", 5).record
    assert "num_classes is 5, but the data has 3 classes" in caplog.text
    assert record["num_classes"] == 5 and record["class_names"] == ["class0", "class1", "class2"]
    path = nano(tmp_path / "a.ckpt", 5, class_names=["cat", "n01440764", "dog"])
    assert open_predictor(path).class_names == ["cat", "tench", "dog", "class 3", "class 4"]
    with pytest.raises(PredictionError, match="has 5 classes, but 2 class names were given"):
        open_predictor(path, class_names=["a", "b"])


def test_class_names_are_checked_before_anything_else(tmp_path, monkeypatch):
    convert = script("convert")
    monkeypatch.setattr(convert, "verify", lambda weights: pytest.fail("it was verified first"))
    names = tmp_path / "names.txt"
    words = ["--from", str(tmp_path / "a.ckpt"), "--to", str(tmp_path / "b.ckpt"), "--class_names", str(names)]
    with pytest.raises(SystemExit, match="names.txt cannot be read: .* expected a text file"):
        convert.main(words)
    nano(tmp_path / "a.ckpt", 3)
    names.write_text("a\nb\n")
    with pytest.raises(SystemExit, match="has 2 names, but the weights have 3 classes"):
        convert.main([*words, "--verify"])


@pytest.mark.parametrize("terminal", [True, False])
def test_predictions_and_their_progress_do_not_mix(images, monkeypatch, terminal):
    """On a terminal the lines are the progress; what is redirected has no bar in it."""
    predict = script("predict")

    def predictor(paths, topk):
        return (Prediction(path, [(0, "cat", 1.0)]) for path in paths)

    monkeypatch.setattr(predict, "open_predictor", lambda *_, **__: predictor)
    out, err = io.StringIO(), io.StringIO()
    for stream in (out, err):
        stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    predict.main([str(images / "val"), "--ckpt_path", "a.ckpt"])
    assert out.getvalue().count("cat (0)") == 36 and err.getvalue() == "36 images\n"


def test_a_program_with_a_network_ends_in_silence():
    """MindSpore's destructor of cells prints an error for each that lives to the end."""
    program = "import mindcv, mindska\nnet = mindcv.create_model('skanet_nano')"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
