"""The console command `mindska`: its table, recipes by name, names that all commands share, mistakes told at once."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import mindcv
import numpy as np
import onnxruntime
import pytest
from commands import ROOT, rows
from documented import five_commands
from mindspore.nn.utils import no_init_parameters
from test_messages import nano
from tiny import make_images

from mindska import commands, config, names, recipes
from mindska.arguments import ALIASES, Parser, add_use_ema
from mindska.detection import factory as detection
from mindska.models import factory
from mindska.segmentation import factory as segmentation
from mindska.weights import methods

SCRIPTS = {path.stem: path.read_text() for path in (ROOT / "scripts").glob("*.py")}


def said(capsys, *words):
    """What the console command prints, and its exit status."""
    with pytest.raises(SystemExit) as error:
        commands.main(list(words))
    printed = capsys.readouterr()
    return printed.out + printed.err, error.value.code


def test_every_command_is_in_the_table():
    modules = {path.stem for path in (ROOT / "mindska" / "commands").glob("*.py")} - {"__init__"}
    assert modules == set(commands.COMMANDS)
    called = {name: re.search(r'run\("(\w+)"\)', text)[1] for name, text in SCRIPTS.items()}
    assert set(called.values()) | {"train", "validate", "recipes", "compare"} == modules


def test_help_and_words_that_are_no_command(capsys):
    text, code = said(capsys, "-h")
    assert code == 0 and all(f"\n  {name} " in text for name in commands.COMMANDS)
    commands.main([])
    assert capsys.readouterr().out == text
    for words in (("train", "-h"), ("help", "train")):
        text, code = said(capsys, *words)
        assert code == 0 and "usage: mindska train" in text and "--warmup_epochs" in text
    text, code = said(capsys, "trian")
    assert code == 2 and "unknown command 'trian'; did you mean 'train'?" in text
    assert "expected one of train, validate, " in said(capsys, "xyz")[0]
    assert said(capsys, "--version") == ("mindska 0.1.0\n", 0)


@pytest.mark.parametrize("name", list(commands.COMMANDS))
def test_every_command_has_help_that_names_it(capsys, name):
    text, code = said(capsys, name, "--help")
    assert code == 0 and f"usage: mindska {name}" in text and "scripts/" not in text.replace("scripts/)", "")


def test_recipes_are_found_by_name(tmp_path, monkeypatch, capsys):
    """From any folder; a file of that name wins, a folder does not."""
    monkeypatch.chdir(tmp_path)
    ours = ROOT / "configs" / "skanet_nano_digits.yaml"
    for name in ("skanet_nano_digits", "skanet_nano_digits.yaml", "configs/skanet_nano_digits.yaml", str(ours)):
        assert recipes.find(name) == ours
    (tmp_path / "skanet_nano_digits").mkdir()
    assert recipes.find("skanet_nano_digits") == ours
    (tmp_path / "skanet_nano_digits.yaml").write_text("model: skanet_s\n")
    assert config.parse_args(["-c", "skanet_nano_digits.yaml"]).model == "skanet_s"
    for name, hint in (("skanet_nano_digit", "did you mean skanet_nano_digits"), ("xyz", "`mindska recipes` lists")):
        with pytest.raises(config.ConfigError, match=f"no recipe is called '{name}'; {hint}"):
            recipes.find(name)
    with pytest.raises(config.ConfigError, match="No configuration file at /nowhere/van.yaml"):
        recipes.find("/nowhere/van.yaml")
    commands.main(["recipes"])
    text = capsys.readouterr().out
    for path in (ROOT / "configs").glob("*.yaml"):
        first = path.read_text().splitlines()[0].lstrip("# ")
        model = config.read_yaml(path).get("model", "")  # that of fine-tuning has none
        assert re.search(rf"^{path.stem} +{model} +{re.escape(first)}$", text, re.M)


def test_models_are_known_without_loading_them():
    assert sorted(names.OUR_MODELS) == sorted(factory.OUR_MODELS)
    assert list(segmentation.METHODS) == [name for name, task in names.METHODS.items() if task == "segmentation"]
    assert list(detection.METHODS) == [name for name, task in names.METHODS.items() if task == "detection"]
    registered = {name for name in mindcv.list_models() if mindcv.is_model(name)}
    assert registered & set(names.OUR_SEGMENTERS) == set(segmentation.SEGMENTERS)
    assert registered & set(names.OUR_DETECTORS) == set(detection.DETECTORS)
    theirs = registered - set(names.OUR_NETWORKS) - {"tiny", "tiny_bn"}
    assert names._in_mindcvs_sources() == theirs
    assert "tiny" in names.known_models()  # registered by this program
    assert names.known_models() & set(names.OUR_NETWORKS) == set(names.OUR_MODELS)
    names.check_model("upernet_sk_resnet18")
    with pytest.raises(config.ConfigError, match="semantic_fpn is there on our backbones.*did you mean van_tiny"):
        names.check_model("semantic_fpn_van_tin")


@pytest.mark.slow
def test_parts_are_known_without_loading_the_model():
    for model in (
        "skanet_nano",
        "van_tiny",
        "sknet29_16x32d",
        "sk_resnet18",
        *(f"{m}_skanet_nano" for m in names.METHODS),
    ):
        with no_init_parameters():
            parameters = [p.name for p in methods.create(model).get_parameters()]
        known = names.parts_of(model)
        assert all(name.startswith(tuple(f"{part}." for part in known)) for name in parameters), model
        assert all(any(name.startswith(f"{part}.") for name in parameters) for part in known), model
        names.check_parts(model, (known[0], f"{known[-1]}.", parameters[0].rpartition(".")[0]))
    names.check_parts("skanet_s", ("stages",))
    names.check_parts("resnet50", ("whatever",))  # MindCV's: told when it is there
    with pytest.raises(config.ConfigError, match="freeze names 'stages.4', but van_tiny has no such part.*stages.0"):
        names.check_parts("van_tiny", ("stages.0", "stages.4"))


MISTAKES = [
    # words, what is said
    (["trian"], "did you mean 'train'?"),
    (["train", "--data_dir", "DATA", "--lerning_rate", "1"], "unrecognized arguments: --lerning_rate 1"),
    (["train", "--data_dir", "DATA", "--lr", "fast"], "lr is 'fast'; expected float"),
    (["train", "--config", "skanet_nano_digit"], "did you mean skanet_nano_digits"),
    (["train", "--config", "skanet_s", "--data_dir", "nowhere"], "No data folder at"),
    (
        ["train", "--config", "skanet_s", "--data_dir", "DATA", "--model", "skanet_z"],
        "did you mean skanet_s or skanet_nano",
    ),
    (["train", "--data_dir", "DATA", "--model", "resnet51"], "did you mean resnet50"),
    (["train", "--data_dir", "DATA", "--model", "van_tiny", "--freeze", "stage.0"], "did you mean 'stages.0'"),
    (["train", "--data_dir", "DATA", "--model", "upernet_van_tin"], "did you mean van_tiny"),
    (["train", "--data_dir", "DATA", "--model", "skanet_s", "--ckpt_path", "none.ckpt"], "No checkpoint at"),
    (["validate", "--data_dir", "DATA", "--ckpt_path", "none.ckpt"], "No checkpoint at"),
    (["validate", "--data_dir", "DATA"], "needs --ckpt_path"),
    (["validate", "--data_dir", "DATA", "--ckpt_path", "DATA", "--class_map", "none.txt"], "No class map at"),
    (["validate", "--data_dir", "DATA", "--ckpt_path", "DATA", "--result_json", "none/r.json"], "does not exist"),
    (["predict", "DATA", "--ckpt_path", "none.ckpt"], "No checkpoint at"),
    (["predict", "DATA", "--ckpt_path", "none.onnx"], "No model at"),
    (["predict", "none.jpg", "--ckpt_path", "a.ckpt"], "No image or folder at"),
    (["predict", "DATA", "--ckpt_path", "a.ckpt", "--modle", "x"], "did you mean --model"),
    (["export", "--ckpt_path", "none.ckpt", "--format", "mindir"], "No checkpoint at"),
    (["export", "--ckpt_path", "none.ckpt", "--format", "onx"], "invalid choice: 'onx'"),
    (["convert", "--from", "none.ckpt", "--to", "a.ckpt"], "No checkpoint at"),
    (["convert", "--from", "none.ckpt", "--to", "a.zip"], "expected a name that ends in"),
    (["convert", "--model", "skanet_z", "--from", "a.ckpt", "--to", "b.ckpt"], "did you mean 'skanet_s'"),
    (["inspect", "none.ckpt"], "No checkpoint at"),
    (["average", "none.ckpt", "--to", "a.ckpt"], "No checkpoint at"),
    (["clean", "none.ckpt"], "No checkpoint at"),
    (["count", "sknet51"], "did you mean sknet50"),
    (["benchmark", "--models", "sknet51"], "did you mean sknet50"),
    (["recipes", "--al"], "unrecognized arguments: --al"),
]
PROGRAM = """
import contextlib, io, json, sys, time
from mindska.commands import main
told = []
for words in json.load(sys.stdin):
    begun, out = time.process_time(), io.StringIO()
    with contextlib.redirect_stderr(out):
        try:
            main(words)
        except SystemExit as error:
            print(error.code, file=out)
    told.append((out.getvalue(), time.process_time() - begun))
print(json.dumps([told, [name for name in ("mindspore", "mindcv", "torch") if name in sys.modules]]))
"""


@pytest.mark.fault("mistakes")
def test_mistakes_are_told_before_anything_is_loaded(tmp_path):
    """One process, whose own time counts: a first command takes the interpreter's start besides."""
    begun = time.perf_counter()
    (tmp_path / "data").mkdir()
    words = [["data" if word == "DATA" else word for word in words] for words, _ in MISTAKES]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(words), capture_output=True, text=True, cwd=tmp_path
    )
    told, loaded = json.loads(done.stdout)
    assert loaded == []
    for (words, message), (text, seconds) in zip(MISTAKES, told):
        assert message in text and "Traceback" not in text, (words, text)
        assert seconds < 0.5, (words, seconds)
    assert time.perf_counter() - begun < 30 and not list(tmp_path.glob("*.ckpt"))


def test_a_run_that_goes_on_needs_its_first_weights_no_more(tmp_path):
    settings = dict(data_dir=str(tmp_path), model="sknet26", ckpt_path="gone.ckpt", ckpt_save_dir=str(tmp_path))
    with pytest.raises(config.ConfigError, match="No checkpoint at"):
        config.check_given(config.Config(**settings), "data_dir", "model")
    (tmp_path / "sknet26-1_1.ckpt").touch()
    config.check_given(config.Config(**settings), "data_dir", "model")


def test_one_name_for_one_thing():
    """Older names are understood in every command, and in no help."""
    for words in (["--input_size", "64", "32"], ["--input_size=64,32"], ["--img-size", "64,32"]):
        assert config.parse_args(words).image_resize == (64, 32)
    for words in (["--batch", "8"], ["-b", "8"], ["-b8"], ["--batch=8"], ["--batch-size", "8"]):
        assert config.parse_args(words).batch_size == 8
    assert config.parse_args(["--no-use_ema"]).use_ema is False and config.parse_args(["--use_ema"]).use_ema is True
    assert config.parse_args(["--use_ema", "null"]).use_ema is None
    parser = Parser(aliases={"--ckpt_path": ""})
    parser.add_argument("paths", nargs="+")
    add_use_ema(parser, "take")
    for words, value in ((["--use_ema"], True), (["--use_ema", "false"], False), (["--no-use_ema"], False)):
        for place in (["a", *words], [*words, "a"], ["--ckpt_path", "a", *words]):
            options = parser.parse_args(place)
            assert (options.paths, options.use_ema) == (["a"], value), place
    assert parser.parse_args(["--", "--use_ema"]).paths == ["--use_ema"]
    assert not any(alias in parser.format_help() for alias in ALIASES)


def test_the_commands_take_the_same_names():
    export = importlib.import_module("mindska.commands.export")
    benchmark = importlib.import_module("mindska.commands.benchmark")
    words = ["--ckpt_path", "a", "--format", "onnx"]
    for size, batch in (("--input_size", "--batch"), ("--image_resize", "-b"), ("--image_resize", "--batch_size")):
        options = export.parse([*words, size, "64", "32", batch, "2"])
        assert (options.image_resize, options.batch_size) == ([64, 32], 2)
        options = benchmark.parse([size, "64", batch, "2", "--model", "sknet50"])
        assert (options.image_resize, options.batch, options.models) == ([64], 2, ["sknet50"])


@pytest.mark.slow
def test_the_help_of_validation_shows_what_it_reads(images, whole_run, monkeypatch, capsys, tmp_path):
    """Neither less nor more."""
    text, _ = said(capsys, "validate", "--help")
    shown = set(re.findall(r"^  --(\w+)", text, re.M))
    assert shown - {"ignore_unknown"} == config.VALIDATION
    read = set()

    class Watched(config.Config):
        def __getattribute__(self, name):
            code = sys._getframe(1).f_code
            if Path(code.co_filename).is_relative_to(ROOT / "mindska") and code.co_name not in (
                "__post_init__",
                "_check_training",
                "check_task",
            ):
                read.add(name)
            return super().__getattribute__(name)

    words = ["--data_dir", str(images), "--ckpt_path", str(whole_run[0] / "tiny_bn_best.ckpt"), "--batch_size", "8"]
    settings = vars(config.parse_args([*words, "--result_json", str(tmp_path / "r.json")]))
    validate = importlib.import_module("mindska.commands.validate")
    monkeypatch.setattr(validate, "parse_args", lambda *_, **__: Watched(**settings))
    validate.main([])
    # A network is always made with these, which change training only.
    read -= {"drop_rate", "drop_path_rate", "pretrained", "freeze", "freeze_backbone", "sync_bn", "opt"}
    read |= {"train_split", "val_seed"}  # of a val_ratio above 0
    read |= {"severities", "corruptions_dir"}  # of corruptions
    read |= {"task"}  # where the model is named
    read |= {name for name in config.VALIDATION if "classification" not in config.TASKS_OF.get(name, names.TASKS)}
    assert read & set(config.TYPES) == config.VALIDATION


@pytest.mark.slow
def test_a_wheel_in_a_fresh_environment(tmp_path):
    """Outside of a clone, the five commands of docs/own_data.md: from nothing to a network fine-tuned on one's own
    folder, the figures of each class, and an ONNX of any batch. The wheel holds every file of the package.

    The first command's place is taken by the installation of the wheel, and the network is the smallest.
    """
    source, outside = tmp_path / "source", tmp_path / "outside"
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    for name in tracked:
        if name.startswith(("mindska/", "configs/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {f"mindska/{name}" if name.startswith("configs/") else name for name in tracked}
    assert packed == {name for name in files if name.startswith("mindska/")}

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    place = subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it may name this clone
    install = [*pip, "--python", python, "install", "-q", "--no-deps", wheel]
    subprocess.run(install, check=True, capture_output=True, env=alone)
    # What mindska needs, from the environment of the tests; .pth files in that folder do not count.
    others = next(path for path in sys.path if (Path(path) / "mindspore").is_dir())
    (Path(place) / "others.pth").write_text(others)
    command = str(tmp_path / "venv" / "bin" / "mindska")
    outside.mkdir()
    make_images(outside / "images", per_class=14)
    (outside / "images" / "train").rename(outside / "DATA")
    Path(nano(outside / "weights.ckpt", 5)).rename(outside / "WEIGHTS")
    environment = {**alone, "PATH": f"{tmp_path / 'venv' / 'bin'}{os.pathsep}{alone['PATH']}"}

    def run(*words):
        done = subprocess.run(words, cwd=outside, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    where = run(str(python), "-c", "import mindska; print(mindska.__file__)")
    assert where.startswith(place)
    assert "\n  train " in run(str(python), "-m", "mindska", "-h")
    assert "\nskanet_nano_digits " in run(command, "recipes")
    install, *four = five_commands()
    assert install.text == "pip install '.[train,onnx]'"
    said = [run(*one.text.replace("skanet_s", "skanet_nano").split()) for one in four]
    assert "classifier: 5 classes of WEIGHTS -> 3 of the data" in said[1] and len(rows(outside / "output/mine")) == 30
    result = json.loads((outside / "result.json").read_text())
    assert result["images"] == 9 and {each["name"] for each in result["classes"]} == {"class0", "class1", "class2"}
    session = onnxruntime.InferenceSession(outside / "output" / "mine" / "skanet_nano.onnx")
    for batch in (1, 5):
        (logits,) = session.run(None, {session.get_inputs()[0].name: np.zeros((batch, 3, 64, 64), np.float32)})
        assert logits.shape == (batch, 3) and np.isfinite(logits).all()
