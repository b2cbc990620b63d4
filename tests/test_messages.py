"""A user's mistake ends in a message that says what to do, not in a traceback; and what else the commands print."""

import io
import logging
import re
import runpy
import subprocess
import sys
from types import SimpleNamespace

import mindcv
import numpy as np
import pytest
from commands import ROOT, script
from mindspore import Tensor, nn

from mindska import kernels, prediction, tasks, training
from mindska.errors import PredictionError, SettingError
from mindska.kernels import build
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
        (
            ["--data_dir", "DATA", *NANO, "--image_resize", "16"],
            "16x16 pixels leaves 1. The smallest square input is 33x33",
        ),
        (["--data_dir", "DATA", *NANO, "--image_resize", "16", "--batch_size", "1"], "smallest square input is 33x33"),
        (["--data_dir", "DATA", *NANO, "--model", "sknet26", "--image_resize", "2"], "smallest square input is 3x3"),
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
        (["--ckpt_path", "BEST", "--result_json", "."], ". is a folder; expected the name of a file"),
        (
            ["--ckpt_path", "NANO", "--image_resize", "16"],
            "image_resize is 16 16: .* The smallest square input is 33x33",
        ),
    ],
)
def test_validate(images, whole_run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    best = str(whole_run[0] / "tiny_bn_best.ckpt")
    files = {"BEST": best, "NANO": nano(tmp_path / "nano.ckpt", 3)}
    words = [files.get(word, word) for word in arguments]
    monkeypatch.setattr(sys, "argv", ["validate.py", "--data_dir", str(images), *words])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(ROOT / "validate.py"), run_name="__main__")
    assert re.search(message, str(error.value)) and str(error.value).startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["nano.ckpt"]


@pytest.mark.fault("too-small")
@pytest.mark.parametrize(
    "name, words, message",
    [
        ("predict", ["IMAGES", "--ckpt_path", "SMALL"], "16x16 pixels leaves 1. The smallest square input is 33x33"),
        ("export", ["--format", "mindir", "--ckpt_path", "SMALL"], "The smallest square input is 33x33"),
        ("count", ["skanet_nano", "--image_resize", "16"], "The smallest square input is 33x33"),
        ("count", ["sknet26", "--image_resize", "2"], "The smallest square input is 3x3"),
        ("benchmark", ["--models", "skanet_nano", "--image_resize", "16"], "The smallest square input is 33x33"),
        ("benchmark", ["--models", "skanet_nano", "--image_resize", "16", "--starts"], "square input is 33x33"),
    ],
)
def test_images_that_are_too_small_for_the_network(images, tmp_path, monkeypatch, name, words, message):
    """Told before anything is compiled, and nothing is left."""
    monkeypatch.chdir(tmp_path)
    pixels = dict(own_preprocessing("skanet_nano"), image_size=[16, 16])
    small = nano(tmp_path / "small.ckpt", 3, preprocessing=pixels)
    monkeypatch.setattr(nn.Cell, "compile", lambda *_: pytest.fail("it was compiled"))
    files = {"IMAGES": str(images / "val"), "SMALL": small}
    words = [files.get(word, word) for word in words]
    with pytest.raises(SystemExit) as error:
        script(name).main(words)
    assert message in str(error.value) and str(error.value).startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["small.ckpt"]


@pytest.mark.fault("too-small")
@pytest.mark.parametrize("keywords", [{}, {"features_only": True}])
def test_images_that_are_too_small_in_python(tmp_path, monkeypatch, keywords, graph):
    monkeypatch.chdir(tmp_path)
    net = mindcv.create_model("skanet_nano", **keywords).set_train(False)
    with pytest.raises(SettingError, match="The smallest square input is 33x33"):
        net(Tensor(np.zeros((1, 3, 32, 32), np.float32)))
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("missing-package")
@pytest.mark.parametrize(
    "missing, name, words, message",
    [
        ("onnxruntime", "export", ["--format", "onnx", "--ckpt_path", "none.ckpt"], "ONNX needs more packages"),
        ("onnx", "export", ["--format", "onnx", "--ckpt_path", "none.ckpt"], "ONNX needs more packages"),
        ("torch", "convert", ["--from", "none.ckpt", "--to", "a.pth"], "Writing a.pth needs PyTorch"),
        ("torch", "convert", ["--from", "none.ckpt", "--to", "a.ckpt", "--verify"], "--verify needs PyTorch"),
        ("torch", "average_checkpoints", ["none.ckpt", "--to", "a.pt"], "Writing a.pt needs PyTorch"),
        ("torch", "benchmark", ["--models", "skanet_nano"], "PyTorch is not installed"),
    ],
)
def test_a_missing_package_is_told_before_the_work(tmp_path, monkeypatch, capsys, missing, name, words, message):
    """Before the weights are read: there are none here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as error:
        script(name).main(words)
    said = str(error.value) + capsys.readouterr().err
    assert message in said and "pip install" in said


def test_the_report_without_the_test_extra():
    program = (
        f"import sys, runpy; sys.modules['torch'] = None; runpy.run_path({str(ROOT / 'tests/parity/report.py')!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install -e '.[test]'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.fault("missing-package")
def test_a_compiler_that_fails_without_a_word(tmp_path, monkeypatch, caplog):
    """Its exit status is the reason; and who requires the operators is not promised that it goes on without them."""
    monkeypatch.setenv("MINDSKA_CACHE", str(tmp_path))
    for compiler, reason in (("false", "exit status 1"), ("true", "exit status 0"), ("killed", "killed by signal 9")):
        (tmp_path / "killed").write_text("#!/bin/sh\n[ $1 = --version ] || kill -9 $$\n")
        (tmp_path / "killed").chmod(0o700)
        monkeypatch.setenv("CXX", str(tmp_path / "killed") if compiler == "killed" else compiler)
        for mode in ("require", "auto"):
            monkeypatch.setenv("MINDSKA_KERNELS", mode)
            build.library.cache_clear()
            kernels._why_not.cache_clear()
            caplog.clear()
            if mode == "require":
                with pytest.raises(SettingError, match=f"cannot be had: .*{reason}.: it says nothing more"):
                    kernels.available()
            else:
                assert not kernels.available()
            assert ("the same results to rounding, slower" in caplog.text) == (mode == "auto")
    build.library.cache_clear()
    kernels._why_not.cache_clear()


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

        def trainer(config, world, step, loader, rates, evaluator, record, *rest):
            given.update(step=step, evaluator=evaluator, record=record)
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
    network = given.evaluator.network
    assert network.options == given.step.network.options == {"norm_eps": 1e-4, "global_pool": "avg"}
    assert not network.training and len(read) == 1
    given = training_of("--val_while_train", "false")
    assert given.evaluator is None


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

    monkeypatch.setattr(prediction, "open_predictor", lambda *_, **__: predictor)
    monkeypatch.setattr(tasks, "task_of_file", lambda *_: "classification")
    out, err = io.StringIO(), io.StringIO()
    for stream in (out, err):
        stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    predict.main([str(images / "val"), "--ckpt_path", str(images)])
    assert out.getvalue().count("cat (0)") == 36 and err.getvalue() == "36 images\n"


def test_a_program_with_a_network_ends_in_silence():
    """MindSpore's destructor of cells prints an error for each that lives to the end. After a reload as well."""
    program = "import importlib, mindcv, mindska\nimportlib.reload(mindska)\nnet = mindcv.create_model('skanet_nano')"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
