"""train.py and validate.py as their users run them: alone, under mpirun and msrun, interrupted and resumed."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = Path(__file__).parent / "programs"
sys.path.insert(0, str(PROGRAMS))
BIN = Path(sys.executable).parent
SETTINGS = dict(
    model="tiny_bn", image_resize=16, crop_pct=1.0, batch_size=8, epoch_size=3, warmup_epochs=1, log_interval=1,
    lr=0.02, ema="true", ema_decay=0.9, auto_augment="randaug-m5", re_prob=0.2, color_jitter="null",
)  # fmt: skip


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    from tiny import make_images

    folder = tmp_path_factory.mktemp("images")
    make_images(folder)
    return folder


def run(command, images, out=None, launcher=(), expect=0, script=PROGRAMS / "tiny.py", **settings):
    """Runs `train.py` or `validate.py`; returns what it printed."""
    options = {"data_dir": images, **({"ckpt_save_dir": out} if out else {}), **settings}
    arguments = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    python = [] if launcher and launcher[0].endswith("msrun") else [sys.executable]
    words = [*launcher, *python, script, ROOT / command, *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=240,
        env=env,
        cwd=out and Path(out).parent,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def train(images, out, **settings):
    return run("train.py", images, out, **{**SETTINGS, **settings})


def rows(out):
    with (Path(out) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def losses(out):
    return [float(row["loss"]) for row in rows(out)]


def parameters(path):
    return {
        name: value.asnumpy() for name, value in ms.load_checkpoint(str(path)).items() if isinstance(value, ms.Tensor)
    }


@pytest.fixture(scope="session")
def whole_run(images, tmp_path_factory):
    """An uninterrupted run of three epochs (12 steps)."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, train(images, out)


def test_what_a_run_leaves_behind(whole_run):
    out, printed = whole_run
    table = rows(out)
    assert [int(row["step"]) for row in table] == list(range(1, 13))
    assert [row["top1"] != "" for row in table] == [False, False, False, True] * 3
    assert all(float(row["images_per_s"]) > 0 for row in table)
    assert {path.name for path in out.iterdir()} == {
        "metrics.csv", "curves.png", "tensorboard", "tiny_bn_best.ckpt", "tiny_bn-1_4.ckpt", "tiny_bn-2_8.ckpt",
        "tiny_bn-3_12.ckpt",
    }  # fmt: skip
    assert (out / "curves.png").read_bytes()[1:4] == b"PNG"
    assert any((out / "tensorboard").iterdir())
    assert "epoch 3: top-1" in printed and "images/s" in printed
    assert "WARNING" not in printed and "Traceback" not in printed


def test_validation_repeats_the_best_figure(whole_run, images, tmp_path):
    out, _ = whole_run
    best = max(float(row["top1"]) for row in rows(out) if row["top1"])
    printed = run(
        "validate.py", images, ckpt_path=out / "tiny_bn_best.ckpt", result_json=tmp_path / "r.json", batch_size=5
    )
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["top1"] == pytest.approx(best) and result["images"] == 36
    assert f"top-1 {best:.2f} %" in printed


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_validation_on_several_ranks_is_the_same(whole_run, images, tmp_path, ranks):
    """36 images in batches of 5: neither ranks nor batches divide them."""
    out, _ = whole_run
    results = []
    for launcher in ((), (BIN / "mpirun", "-n", ranks, "--oversubscribe")):
        launcher = tuple(map(str, launcher))
        path = tmp_path / "r.json"
        run(
            "validate.py",
            images,
            launcher=launcher,
            ckpt_path=out / "tiny_bn-3_12.ckpt",
            result_json=path,
            batch_size=5,
        )
        results.append(json.loads(path.read_text()))
    assert results[0]["top1"] == results[1]["top1"] and results[0]["images"] == results[1]["images"] == 36
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=1e-6)


@pytest.mark.parametrize("stop", [8, 10])
def test_a_resumed_run_is_the_uninterrupted_one(whole_run, images, tmp_path, stop):
    """Stopped at the end of an epoch (8) or within one (10): losses, weights, averages, optimiser equal to the bit."""
    whole, _ = whole_run
    out = tmp_path / "run"
    train(images, out, ckpt_save_steps=5)
    for path in out.glob("tiny_bn*.ckpt"):
        if f"_{stop}.ckpt" not in path.name:
            path.unlink()
    printed = train(images, out, ckpt_save_steps=5)
    assert f"Resuming after step {stop} of 12" in printed
    assert [int(row["step"]) for row in rows(out)] == list(range(1, 13))
    assert losses(out) == losses(whole)
    ours, theirs = parameters(out / "tiny_bn-3_12.ckpt"), parameters(whole / "tiny_bn-3_12.ckpt")
    assert set(ours) == set(theirs)
    assert any(name.startswith("ema.") for name in ours) and any("adam_m" in name for name in ours)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_a_finished_run_is_left_alone(whole_run, images):
    out, _ = whole_run
    before = (out / "metrics.csv").read_bytes(), (out / "tiny_bn-3_12.ckpt").stat().st_mtime_ns
    assert "Resuming after step 12 of 12" in train(images, out)
    assert before == ((out / "metrics.csv").read_bytes(), (out / "tiny_bn-3_12.ckpt").stat().st_mtime_ns)


def test_another_run_in_the_same_folder_is_refused(whole_run, images):
    out, _ = whole_run
    printed = train(images, out, expect=1, lr=0.5)
    assert "lr: 0.02 -> 0.5" in printed and "choose another --ckpt_save_dir" in printed
    assert "already holds a run" in train(images, out, expect=1, resume="false")


def test_errors_are_messages(images, tmp_path):
    printed = train(tmp_path / "nowhere", tmp_path / "run", expect=1)
    assert "error: No data folder at" in printed and "Traceback" not in printed
    printed = train(images, tmp_path / "run", expect=1, model="skanet_x")
    assert "does not know it. Ours: skanet_nano, skanet_s" in printed and "Traceback" not in printed
    printed = run("validate.py", images, expect=1)
    assert "needs --ckpt_path" in printed
    printed = run("validate.py", images, expect=1, ckpt_path=tmp_path / "none.ckpt")
    assert "No checkpoint at" in printed and "Traceback" not in printed


def test_best_checkpoints_are_kept(images, tmp_path):
    out = tmp_path / "run"
    train(images, out, epoch_size=6, keep_checkpoint_max=1)
    scores = {int(row["step"]): float(row["top1"]) for row in rows(out) if row["top1"]}
    best = min(step for step, score in scores.items() if score == max(scores.values()))
    kept = {int(path.stem.split("_")[-1]) for path in out.glob("tiny_bn-*.ckpt")}
    assert kept == {20, 24, best}


@pytest.mark.parametrize(
    "settings",
    [
        dict(gradient_accumulation_steps=2, clip_grad="true", clip_value=0.5),
        dict(amp_level="O2", loss_scale_type="dynamic", loss_scale=1024),
        dict(amp_level="O3", loss_scale=128, opt="momentum", weight_decay=1e-4),
        dict(amp_level="auto", opt="lion", scheduler="step_decay", decay_epochs=1),
        dict(mixup=0.2, cutmix=1.0, loss="BCE", aug_repeats=3),
        dict(mode="pynative", opt="sgd", scheduler="constant", warmup_epochs=0, lr_epoch_stair="false"),
        dict(val_while_train="false", ema="false", opt="adam", dataset_sink_mode="true"),
    ],
    ids=lambda settings: "-".join(settings),
)
def test_options_work(images, tmp_path, settings):
    out = tmp_path / "run"
    train(images, out, **settings)
    assert len(rows(out)) == 12 and np.isfinite(losses(out)).all()
    assert np.mean(losses(out)[-4:]) < np.mean(losses(out)[:4]) * 1.1


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["mpirun", "msrun"])
def test_two_ranks_follow_one(images, tmp_path, launcher):
    """The same global batches on one rank and on two, without batch norm, whose statistics are a rank's own.

    Gradients are summed in another order, and float32 rounds: 1e-5 of losses about 1.
    """
    settings = dict(model="tiny", drop_rate=0.3, epoch_size=2)
    words = {
        "mpirun": (BIN / "mpirun", "-n", 2, "--oversubscribe"),
        "msrun": (
            BIN / "msrun",
            "--worker_num=2",
            "--local_worker_num=2",
            "--join=True",
            f"--log_dir={tmp_path / 'log'}",
        ),
    }[launcher]
    train(images, tmp_path / "one", batch_size=8, **settings)
    train(images, tmp_path / "two", batch_size=4, launcher=tuple(map(str, words)), **settings)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=1e-5)
    one, two = (parameters(tmp_path / name / "tiny-2_8.ckpt") for name in ("one", "two"))
    for name in one:
        np.testing.assert_allclose(two[name], one[name], atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_a_failing_rank_ends_all(images, tmp_path):
    """Rank 1 finds a damaged image; rank 0 waits for it in a collective."""
    import shutil

    damaged = tmp_path / "images"
    shutil.copytree(images, damaged)
    for path in sorted((damaged / "train" / "class1").iterdir())[3:]:
        path.write_bytes(path.read_bytes()[:300])
    launcher = tuple(map(str, (BIN / "mpirun", "-n", 2, "--oversubscribe")))
    printed = train(damaged, tmp_path / "run", launcher=launcher, expect=1)
    assert "cannot be read" in printed and "[rank " in printed
