"""`mindska train_reference`: the PyTorch reference takes the steps that ours takes."""

import json
import subprocess
import sys

import numpy as np
import pytest
from commands import PROGRAMS, ROOT, rows
from test_data import idx

from mindska import commands
from mindska.config import Config
from mindska.errors import SettingError

RECIPES = ("skanet_nano_fashion_mnist", "van_tiny_lska_k7_fashion_mnist")
STEPS = "--mode pynative --batch_size 8 --epoch_size 1 --log_interval 1 --mixup 0.2 --clip_grad"
STEPS += " --warmup_epochs 0 --warmup_steps 0"
AVERAGE = "--ema --ema_decay 0.5 --clip_value 0.5 --gradient_accumulation_steps 2"


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    """36 training images, so that an epoch has two updates of two batches of eight, and 12 for validation."""
    folder, rng = tmp_path_factory.mktemp("clothes"), np.random.default_rng(0)
    for prefix, number in (("train", 36), ("t10k", 12)):
        labels = np.arange(number) % 10
        images = rng.integers(0, 100, (number, 28, 28)) + 15 * labels[:, None, None]
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


@pytest.mark.slow
def test_the_reference_trains_as_ours_does(clothes, tmp_path):
    """From the same values on the same batches, with the recipe's optimiser and schedule: losses, norm-clipped updates,
    averaged weights and accuracies agree to the noise of float32 (of which AdamW makes more in its first updates)."""
    common = ["--data_dir", str(clothes), *STEPS.split()]
    extra = {RECIPES[0]: [*AVERAGE.split(), "--drop_path_rate", "0.3", "--drop_rate", "0.2"], RECIPES[1]: []}
    ran = []
    for recipe in RECIPES:
        words = ["--config", recipe, *common, *extra[recipe]]
        ran.append(["train", [*words, "--seed", "3", "--ckpt_save_dir", str(tmp_path / recipe)], ""])
        ran.append(["train_reference", [*words, "--seeds", "3", "--out", str(tmp_path / f"{recipe}_reference")], ""])
    done = subprocess.run(
        [sys.executable, PROGRAMS / "run_commands.py"], input=json.dumps(ran), capture_output=True, text=True,
        cwd=ROOT,
    )  # fmt: skip
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(ran) and not any(code for code, *_ in results), (results, done.stderr)
    for recipe, (_, printed, _) in zip(RECIPES, results[1::2]):
        ours, theirs = rows(tmp_path / recipe), rows(tmp_path / f"{recipe}_reference" / "seed_3")
        assert len(ours) == len(theirs) == 4
        for name, tolerance in (("step", 0), ("loss", 1e-5), ("lr", 1e-12)):
            values = [[float(row[name]) for row in each] for each in (theirs, ours)]
            np.testing.assert_allclose(*values, rtol=tolerance, err_msg=f"{recipe} {name}")
        columns = [name for name in ours[-1] if name.startswith(("top", "val_loss")) and ours[-1][name]]
        assert len(columns) == (9 if extra[recipe] else 3)
        for name in columns:
            assert float(theirs[-1][name]) == pytest.approx(float(ours[-1][name]), rel=1e-3), (recipe, name)
        (line,) = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        assert (line["seed"], line["step"], line["epoch"]) == (3, 4, 1)
        assert line["top1"] == pytest.approx(float(theirs[-1]["top1"]))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(opt="lion"), "opt is lion; the reference is trained with adamw, sgd, momentum only"),
        (dict(scheduler="plateau"), "schedules that are known at the start"),
        (dict(amp_level="O2"), "amp_level is 'O2'; the reference is trained with 'O0' only: give --amp_level"),
        (dict(freeze=("stem",)), "freeze is .* only"),
    ],
)
def test_what_the_reference_cannot_be_trained_with(settings, message):
    from mindska.reference.training import check_settings

    check_settings(Config(model="skanet_nano"))
    with pytest.raises(SettingError, match=message):
        check_settings(Config(model="skanet_nano", **settings))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--threads", "0"], "threads is 0; expected at least 1"),
        (["--seeds", "1", "2"], "seed_2 holds a run already; choose another --out, or remove the folder"),
    ],
)
def test_mistakes_are_told_before_the_work(tmp_path, words, message):
    (tmp_path / "seed_2").mkdir()
    (tmp_path / "seed_2" / "metrics.csv").write_text("step\n")
    with pytest.raises(SystemExit, match=message):
        commands.main(
            ["train_reference", "--model", "skanet_nano", "--data_dir", str(tmp_path), "--out", str(tmp_path), *words]
        )
