"""scripts/benchmark.py: what it measures and prints. Not how fast anything is: that differs from minute to minute."""

import json
import logging
import re
import threading
import time

import numpy as np
import pytest
from commands import script

from mindska.benchmark import measure, tables
from mindska.benchmark.worker import Variant, pytorch_step, targets
from mindska.names import task_of
from mindska.recipes import find

benchmark = script("benchmark")


def result(name, what, median, **further):
    library = {"PyTorch": "pytorch"}.get(name, "mindska")
    return dict(
        model="skanet_nano", size=64, batch=8, what=what, library=library, name=name, median=median, fastest=median / 2,
        slowest=median * 2, first=1.5, memory=2**30, ranks=1, **further,
    )  # fmt: skip


def test_tables():
    results = [
        result("PyTorch", "forward", 2.0),
        result("mindska", "forward", 1.0),
        result("mindska, folded", "folded", 0.5),
        result("PyTorch", "train", 3.0),
        result("mindska", "train", 2.0),
    ]
    assert tables.summary(results).splitlines()[2:] == [
        "| `skanet_nano`, 64, batch 8 | forward | 2.000 s | 2.00 | 4.00 |",
        "| `skanet_nano`, 64, batch 8 | train | 3.000 s | 1.50 | — |",
        "",
    ]
    rows = tables.table(results, 1e9, {"skanet_nano": 1e7}).splitlines()[2:]
    assert len(rows) == 5 and "| 0.500 (0.250 to 1.000) | 4.00 | 1.00 GB (1.00) | 1.5 s | 16 % |" in rows[2]
    assert rows[4].endswith("12 % |"), "a training step has three times the forward's products"
    assert tables.summary(results[1:2]) == ""
    assert "| `skanet_nano` | forward | 64 | 8 | 1 | PyTorch | 2.000 | 4.0 |" in tables.scaling_table(results)
    orders = [result("mindska", "forward", seconds, busy=busy) for busy in (False, True) for seconds in (2.0, 1.0)]
    rows = tables.import_orders_table(orders).splitlines()[2:]
    assert rows[0] == "| `skanet_nano` | 1 | none | 2.000 s (1.000 to 4.000) | 1.000 s (0.500 to 2.000) | 0.50 |"
    assert "| one, on the first core |" in rows[1]


def test_what_is_asked_for_is_what_is_measured():
    options = benchmark.parse(["--what", "forward", "train", "--kernels", "off", "--batch", "4", "--compile"])
    asked = measure.ours("sknet50", options)
    assert [(v.what, v.kernels, v.size, v.batch) for v in asked] == [
        ("forward", False, 224, 4),
        ("train", False, 224, 4),
    ]
    assert [v.library for v in measure.others("train", "sknet50", (224, 224), 4, options)] == ["pytorch", "compiled"]
    assert [v.kernels for v in measure.ours("sknet50", benchmark.parse(["--what", "train"]))] == [True, False]
    # What is built on a backbone is not folded, and has a size of its own.
    dense = [(v.what, v.image_size, v.task) for v in measure.ours("retinanet_van_tiny", benchmark.parse([]))]
    assert dense == [(what, (512, 640), "detection") for what in ("forward", "train") for _ in range(2)]


@pytest.mark.parametrize("model", ["semantic_fpn_skanet_nano", "mask_rcnn_skanet_nano", "ssdlite_skanet_nano"])
def test_targets_are_what_training_takes(model):
    """Of the shapes and types that the networks ask for; objects lie within the images and have masks."""
    task = task_of(model)
    arrays = targets(Variant("mindska", model, "train", 64, 2, width=96, task=task))
    shapes = dict(segmentation=[(2, 64, 96)], detection=[(2, 10, 4), (2, 10), (2, 2)])[task]
    assert [array.shape for array in arrays[:3]] == shapes
    if model.startswith("mask_rcnn"):
        boxes, masks = arrays[0].astype(int), np.unpackbits(arrays[3], axis=3).astype(bool)
        area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
        assert masks.shape == (2, 10, 64, 96) and np.array_equal(masks.sum((2, 3)), area)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["semantic_fpn", "upernet", "deeplabv3", "retinanet", "mask_rcnn", "ssdlite"])
def test_pytorch_trains_every_method(method):
    model = f"{method}_skanet_nano"
    variant = Variant("pytorch", model, "train", 128, 2, width=96, task=task_of(model))
    pytorch_step(variant, np.random.default_rng(0).random((2, 3, 128, 96), np.float32))()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--models", "skanet"], "did you mean skanet_s"),
        (["--rounds", "0"], "--rounds is 0; expected at least 1"),
        (["--what", "backward"], "invalid choice"),
        (["--engines", "onnxruntime", "--what", "train"], "--engines are compared in forward passes"),
        (["--engines", "onnxruntime", "--scaling"], "--engines are compared in forward passes"),
    ],
)
def test_wrong_words(words, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse(words)
    assert message in capsys.readouterr().err


def test_the_loaders_rate_leaves_nobody_who_reads(caplog):
    """What is read ahead would look for images that are gone: it was hundreds of warnings."""
    assert measure.loader_rate(find("skanet_s"), (64, 48), rounds=1) > 0
    time.sleep(0.5)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data")]


@pytest.mark.slow
def test_a_measurement(tmp_path, capsys):
    words = ["--models", "skanet_nano", "--batch", "2", "--what", "forward", "--kernels", "on", "--rounds", "1"]
    benchmark.main([*words, "--json", str(tmp_path / "a.json")])
    printed = capsys.readouterr().out
    assert re.search(r"^\| `skanet_nano`, 64, batch 2 \| forward \| PyTorch \| \d+\.\d{3} ", printed, re.M), printed
    assert re.search(r"^\| `skanet_nano`, 64, batch 2 \| forward \| mindska \| \d+\.\d{3} ", printed, re.M), printed
    assert {r["name"] for r in json.loads((tmp_path / "a.json").read_text())["results"]} == {"PyTorch", "mindska"}
