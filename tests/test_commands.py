"""train.py and validate.py as their users run them: alone, under mpirun and msrun, interrupted and resumed."""

import json
import runpy

import numpy as np
import pytest
from commands import (
    BIN,
    ROOT,
    assert_same_losses,
    assert_same_state,
    free_port,
    losses,
    mpirun,
    parameters,
    rows,
    run,
    train,
)


def test_what_a_run_leaves_behind(whole_run):
    out, printed = whole_run
    table = rows(out)
    assert [int(row["step"]) for row in table] == list(range(1, 13))
    assert [row["top1"] != "" for row in table] == [False, False, False, True] * 3
    assert all(float(row["images_per_s"]) > 0 for row in table)
    assert {path.name for path in out.iterdir()} == {
        ".lock", "settings.json", "metrics.csv", "train.log", "curves.png", "tensorboard", "tiny_bn_best.ckpt",
        "tiny_bn-1_4.ckpt", "tiny_bn-2_8.ckpt", "tiny_bn-3_12.ckpt",
    }  # fmt: skip
    assert (out / "curves.png").read_bytes()[1:4] == b"PNG"
    assert any((out / "tensorboard").iterdir())
    assert "epoch 3, step 12: top-1" in printed and "images/s" in printed
    assert "WARNING" not in printed and "Traceback" not in printed


@pytest.mark.slow
def test_validation_repeats_the_best_figure(whole_run, images, tmp_path):
    out, _ = whole_run
    best = max(float(row["top1"]) for row in rows(out) if row["top1"])
    printed = run(
        "validate.py", images, ckpt_path=out / "tiny_bn_best.ckpt", result_json=tmp_path / "r.json", batch_size=5
    )
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["top1"] == pytest.approx(best) and result["images"] == 36
    assert f"top-1 {best:.2f} %" in printed


@pytest.mark.fault("uneven-ranks")
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_validation_on_several_ranks_is_the_same(whole_run, images, tmp_path, ranks):
    """36 images in batches of 5: neither ranks nor batches divide them."""
    out, _ = whole_run
    results = []
    for launcher in ((), mpirun(ranks)):
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
    assert [result["world_size"] for result in results] == [1, ranks]  # not so many processes, each alone
    assert results[0]["top1"] == results[1]["top1"] and results[0]["images"] == results[1]["images"] == 36
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=1e-6)


@pytest.mark.slow
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
    assert_same_losses(out, whole)
    ours = parameters(out / "tiny_bn-3_12.ckpt")
    assert any(name.startswith("ema.") for name in ours) and any("adam_m" in name for name in ours)
    assert_same_state(out / "tiny_bn-3_12.ckpt", whole / "tiny_bn-3_12.ckpt")


@pytest.mark.slow
def test_a_finished_run_is_left_alone(whole_run, images):
    out, _ = whole_run
    before = (out / "metrics.csv").read_bytes(), (out / "tiny_bn-3_12.ckpt").stat().st_mtime_ns
    assert "Resuming after step 12 of 12" in train(images, out)
    assert before == ((out / "metrics.csv").read_bytes(), (out / "tiny_bn-3_12.ckpt").stat().st_mtime_ns)


@pytest.mark.slow
def test_another_run_in_the_same_folder_is_refused(whole_run, images):
    out, _ = whole_run
    printed = train(images, out, expect=1, lr=0.5)
    assert "lr: 0.02 -> 0.5" in printed and "choose another --ckpt_save_dir" in printed
    assert "already holds a run" in train(images, out, expect=1, resume="false")


@pytest.mark.slow
def test_errors_are_messages(images, tmp_path):
    printed = train(tmp_path / "nowhere", tmp_path / "run", expect=1)
    assert "error: No data folder at" in printed and "Traceback" not in printed
    printed = train(images, tmp_path / "run", expect=1, model="skanet_x")
    assert "does not know it; did you mean skanet_s" in printed and "Traceback" not in printed
    printed = run("validate.py", images, expect=1)
    assert "needs --ckpt_path" in printed
    printed = run("validate.py", images, expect=1, ckpt_path=tmp_path / "none.ckpt")
    assert "No checkpoint at" in printed and "Traceback" not in printed


@pytest.mark.slow
def test_best_checkpoints_are_kept(images, tmp_path):
    out = tmp_path / "run"
    train(images, out, epoch_size=6, keep_checkpoint_max=1)
    scores = {int(row["step"]): float(row["top1"]) for row in rows(out) if row["top1"]}
    best = min(step for step, score in scores.items() if score == max(scores.values()))
    kept = {int(path.stem.split("_")[-1]) for path in out.glob("tiny_bn-*.ckpt")}
    assert kept == {20, 24, best}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        dict(gradient_accumulation_steps=2, clip_grad="true", clip_value=0.5),
        dict(amp_level="O2", loss_scale_type="dynamic", loss_scale=1024),
        dict(amp_level="O3", loss_scale=128, opt="momentum", weight_decay=1e-4),
        dict(amp_level="auto", opt="lion", lr=1e-4, scheduler="step_decay", decay_epochs=1),
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
    # Twelve steps are too few to learn from; a sign or a scale that is wrong makes them diverge.
    assert max(losses(out)) < 2.5 * losses(out)[0]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["mpirun", "msrun"])
def test_two_ranks_follow_one(images, tmp_path, launcher):
    """The same global batches on one rank and on two, without batch norm, whose statistics are a rank's own.

    Gradients are summed in another order, and float32 rounds: 1e-5 of losses about 1.
    """
    settings = dict(model="tiny", drop_rate=0.3, epoch_size=2)
    words = {
        "mpirun": mpirun(2),
        "msrun": (
            BIN / "msrun",
            "--worker_num=2",
            "--local_worker_num=2",
            "--join=True",
            f"--master_port={free_port()}",
            f"--log_dir={tmp_path / 'log'}",
        ),
    }[launcher]
    train(images, tmp_path / "one", batch_size=8, **settings)
    train(images, tmp_path / "two", batch_size=4, launcher=tuple(map(str, words)), **settings)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=1e-5)
    one, two = (parameters(tmp_path / name / "tiny-2_8.ckpt") for name in ("one", "two"))
    for name in one:
        np.testing.assert_allclose(two[name], one[name], atol=1e-4, err_msg=name)


def test_a_fault_without_its_tests_is_not_as_it_must():
    """The table of tests/faults/report.py: a row must have a test, and all of its tests must have run and passed."""
    outcomes = runpy.run_path(str(ROOT / "tests" / "faults" / "report.py"))["Outcomes"]()
    outcomes.tests = {"a.py::test_one": "passed", "a.py::test_other": "failed"}
    outcomes.faults = {"a": ["a.py::test_one"], "b": ["a.py::test_one", "a.py::test_other"], "c": [], "d": ["a.py::x"]}
    assert outcomes.reasons("a") == [] and outcomes.reasons("b") == ["a.py::test_other failed"]
    assert outcomes.reasons("c") == ["no test has this mark"] and outcomes.reasons("d") == ["a.py::x did not run"]
