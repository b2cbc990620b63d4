"""Every command of README.md and docs/*.md: it parses, and a test runs it or `NOT_RUN` says why none does."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import PROGRAMS, ROOT, rows
from documented import Documented, blocks, documented, five_commands, parsed
from tiny import make_images

from mindska import arguments, commands

# Commands that no test runs as they stand: the program (empty: any of mindska), words that it has or its page, and why.
NOT_RUN = [
    ("scripts/quickstart.sh", (), "installs from a package index; its steps are run by other tests"),
    ("scripts/test.sh", (), "is what runs the tests"),
    ("mkdocs", (), "test_site builds the site"),
    ("pip", (), "needs a package index; test_console installs a wheel"),
    ("demo", (), "serves until Ctrl-C; test_demo opens its page"),
    ("benchmark", (), "needs a quiet machine for minutes; test_benchmark has its parts"),
    ("convert", ("van_tiny_lska_k23",), "needs a published file; test_convert makes files of every kind"),
    ("convert", ("van_small",), "the same"),
    ("convert", ("van_tiny",), "the same"),
    ("convert", ("van_base",), "the same"),
    ("convert", ("sknet50",), "the same"),
    ("convert", ("sk_resnet18",), "the same"),
    ("", ("docs/segmentation.md",), "needs images with masks; test_segmentation_task has them"),
    ("", ("docs/detection.md",), "needs images with boxes; test_detection_task has them"),
    ("", ("docs/analysis.md",), "needs networks that learnt for minutes; test_analysis has small ones"),
    ("validate", ("--corruptions",), "only names the option; test_corruptions has its parts"),
    ("tests/parity/report.py", (), "takes minutes; tests/parity asserts the same figures"),
    ("tests/faults/report.py", (), "runs the tests of faults, which the suite runs"),
    ("tests/gpu_backend.py", (), "takes minutes, or needs a GPU"),
    ("tests/test_platforms.py", (), "takes minutes; the suite runs a part of it"),
    ("pytest", ("tests/faults/test_soak.py",), "takes a quarter of an hour"),
]


def why_not_run(one: Documented) -> str:
    """Why no test runs a command as it stands; empty where one does."""
    if not one.words and one.command in commands.COMMANDS:
        return "it is only named" if not one.block else ""
    if "--help" in one.words:
        return "test_console asks every command for help"
    return next((why for command, words, why in NOT_RUN if is_meant(one, command, words)), "")


def is_meant(one: Documented, command: str, words: tuple[str, ...]) -> bool:
    """Whether a row of `NOT_RUN` is about a command."""
    same = one.command in commands.COMMANDS if not command else one.command == command
    return same and set(words) <= {*one.words, one.page}


class Parsed(Exception):
    """The words of a command were understood."""


def check_words(command: str, words: tuple[str, ...], monkeypatch, capsys) -> None:
    """Fails where a command does not understand its words. Nothing is run."""

    def understood(*_, **__):
        raise Parsed

    parse = arguments.Parser.parse_args

    def parse_args(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    if ">" in words:
        words = words[: words.index(">")]
    module = importlib.import_module(f"mindska.commands.{command}")
    with monkeypatch.context() as patch:
        patch.chdir(ROOT)  # recipes are named by their paths in a clone
        patch.setattr(arguments.Parser, "parse_args", parse_args)
        if hasattr(module, "check_given"):  # it comes right after the settings are read
            patch.setattr(module, "check_given", understood)
        with pytest.raises((Parsed, SystemExit)) as ended:
            commands.main([command, *words])
    said = capsys.readouterr()
    assert ended.type is Parsed or ended.value.code == 0, (command, words, said.err)


def elsewhere() -> list[Documented]:
    """The commands in the heads of recipes and of the commands' own modules."""
    found = []
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        text = re.sub(r"\\\n# +", " ", path.read_text())
        found += [
            (f"configs/{path.name}", line)
            for line in re.findall(r"^# +((?:python|mpirun|msrun|mindska) .*)", text, re.M)
        ]
    for name in commands.COMMANDS:
        text = (importlib.import_module(f"mindska.commands.{name}").__doc__ or "").replace("\\\n", " ")
        lines = re.findall(r"^ {4}((?:python|mpirun|msrun|mindska) .*)", text, re.M)
        lines = [re.split(r"\s{2,}", line)[0] for line in lines]  # what it does may follow
        found += [(name, re.sub(r"[][]", "", line)) for line in lines if "..." not in line]
    return [one for page, line in found if (one := parsed(page, line, True))]


def test_every_command_parses(monkeypatch, capsys):
    """Of the pages, of the recipes' heads, and of the commands' own help.

    What runs no command of mindska is a file that knows its options.
    """
    every = [*documented(), *elsewhere()]
    pages = (
        "own_data",
        "finetune",
        "imagenet",
        "validate",
        "deploy",
        "weights",
        "segmentation",
        "detection",
        "analysis",
    )
    assert len(every) > 110 and {one.page for one in documented()} >= {
        "README.md",
        *(f"docs/{page}.md" for page in pages),
    }
    for one in every:
        if one.command in commands.COMMANDS:
            if one.words:
                check_words(one.command, one.words, monkeypatch, capsys)
        elif one.command in ("pip", "mkdocs", "pytest"):
            assert one.command != "pytest" or (ROOT / one.words[0]).exists(), one
        else:
            source = (ROOT / one.command).read_text()
            assert not [word for word in one.words if word.startswith("--") and f'"{word}"' not in source], one


@pytest.mark.parametrize(
    "text",
    [
        "python train.py --config configs/skanet_s.yaml --lerning_rate 1",
        "mindska export --ckpt_path a --frmat onnx",
        "python scripts/predict.py --ckpt_path a",
        "mindska count --mdoel x",
        "mindska train --config none",
    ],
)
def test_a_command_that_does_not_parse_is_found(text, monkeypatch, capsys):
    one = parsed("a.md", text, True)
    with pytest.raises(AssertionError, match=one.command):
        check_words(one.command, one.words, monkeypatch, capsys)


def test_what_is_not_run_is_in_the_pages():
    """No row of the list is out of date."""
    for command, words, why in NOT_RUN:
        assert any(is_meant(one, command, words) for one in documented()), (command, words, why)


ONE_EPOCH = "--mode pynative --epoch_size 1 --warmup_epochs 0 --batch_size 12 --val_interval 1 --ckpt_save_steps 1"
SMALL = {
    "train": ONE_EPOCH.split(),
    "validate": ["--mode", "pynative"],
    "convert": ["--overwrite"],
    "export": ["--overwrite"],
}


def small(word: str) -> str:
    """A word of a command for the smallest network: it has the same layers."""
    return re.sub(r"\bskanet_s(?=[\W_]|$)", "skanet_nano", word)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as a clone, with what the pages' commands need: images and a published file, of the smallest network."""
    import torch

    from mindska.reference import skanet as reference

    folder = tmp_path_factory.mktemp("clone")
    for name in ("train.py", "validate.py", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", folder / "configs")
    recipe = (folder / "configs" / "skanet_nano_digits.yaml").read_text()
    (folder / "configs" / "skanet_nano.yaml").write_text(
        recipe.replace("output/skanet_nano_digits", "output/skanet_nano")
    )
    make_images(folder / "DATA", per_class=10)
    make_images(folder / "more", per_class=1, size=40)
    (folder / "photos").mkdir()
    for number, path in enumerate(sorted((folder / "more" / "val").rglob("*.png"))):
        path.rename(folder / "photos" / f"{number}.png")
    shutil.copy(folder / "photos" / "0.png", folder / "cat.jpg")
    torch.manual_seed(0)
    state = reference.create("skanet_nano", num_classes=3).state_dict()
    torch.save({"state_dict": state, "state_dict_ema": state}, folder / "model_best.pth.tar")
    (folder / "RUN").symlink_to("output/skanet_nano")  # which the first command makes
    (folder / "FILE").symlink_to("output/skanet_nano/skanet_nano_best.ckpt")
    return folder


def prepare_digits(folder) -> None:
    """Runs the page's own script, and leaves six images of each class."""
    (script,) = [block for block in blocks("docs/finetune.md") if "\ndone" in block]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(["bash", "-euc", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "data/first/train").rglob("*.png"))) == 1014
    assert len(list((folder / "data/second/train").rglob("*.png"))) == 15
    assert len(list((folder / "data/second/val").rglob("*.png"))) == 105
    for each in [path for path in (folder / "data").rglob("*") if path.is_dir()]:
        for path in sorted(each.glob("*.png"))[6:]:
            path.unlink()


@pytest.mark.slow
def test_every_command_runs(place):
    """With the smallest network, few images and two epochs, in one process."""
    prepare_digits(place)
    here, todo = {five.text for five in five_commands()}, []
    for one in documented():
        if not why_not_run(one) and one.text not in here and one.command in commands.COMMANDS:
            words, file = list(map(small, one.words)), ""
            if ">" in words:
                *words, _, file = words
            todo.append((one, words, file))
    assert len(todo) > 20
    ran = [[one.command, [*words, *SMALL.get(one.command, [])], file] for one, words, file in todo]
    done = subprocess.run(
        [sys.executable, PROGRAMS / "run_commands.py"], input=json.dumps(ran), capture_output=True, text=True,
        cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(ran), done.stderr
    for (command, words, _), (code, printed, seconds) in zip(ran, results):
        print(f"{seconds:.1f} s: {command} {' '.join(words)}")
        assert code == 0, (command, words, printed)
    assert len(rows(place / "output" / "finetuned")) > 0 and (place / "classes.csv").read_text().count("\n") > 3
