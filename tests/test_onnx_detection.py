"""Detectors as ONNX and MindIR: the raw maps of every level in onnxruntime, at several sizes."""

import json

import numpy as np
import pytest
from mindspore import Tensor
from test_detector_networks import with_some_weights

from mindska import create_detector
from mindska import export as exporting
from mindska.acceleration import decelerate

pytestmark = pytest.mark.slow
CASES = {  # detector -> (size it is made with, others; none where SkaNet belongs to one)
    "retinanet_sk_resnet18": ((65, 96), [(97, 64)]),
    "mask_rcnn_van_tiny_lska_k7": ((64, 96), [(75, 50)]),
    "ssdlite_skanet_nano": ((96, 96), []),
    "ssdlite_sk_resnet18": ((96, 96), [(65, 90)]),
    "retinanet_skanet_nano": ((20, 90), []),  # padded inside
}


def images(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("name", CASES)
def test_maps_at_several_sizes(tmp_path, name):
    (size, others), path = CASES[name], tmp_path / "a.onnx"
    net = with_some_weights(create_detector(name, num_classes=3)).set_train(False)
    exporting.export(net, path, (1, 3, *size), {"model": name})
    run, net = exporting.open_model(path), decelerate(net)
    for batch, side in ((3, size), *((2, other) for other in others)):
        x = images(batch, 3, *side)
        scores, deltas = net(Tensor(x))
        found = run(x)
        assert len(found) == len(scores) + len(deltas)
        for ours, theirs in zip(found, (*scores, *deltas)):
            theirs, bound = theirs.asnumpy(), 0.05 if "skanet" in name else 1e-4  # swapped neighbours
            assert ours.shape == theirs.shape
            assert np.abs(ours - theirs).max() < bound * np.abs(theirs).max()
    record = json.loads((tmp_path / "a.onnx.json").read_text())
    levels = len(found) // 2
    assert record["outputs"] == [f"{kind}{i}" for kind in ("scores", "deltas") for i in range(levels)]
    assert record["input_shape"] == [None, 3, *((None, None) if others else size)]


def test_half_and_mindir(tmp_path):
    net = with_some_weights(create_detector("ssdlite_sk_resnet18", num_classes=3)).set_train(False)
    exporting.export(net, tmp_path / "a.onnx", (1, 3, 64, 64), {"model": net.model_name}, half=True)
    agreement = exporting.export(net, tmp_path / "a.mindir", (2, 3, 64, 64), {"model": net.model_name})
    assert agreement.difference < 1e-4
    assert len(exporting.open_model(tmp_path / "a.mindir")(images(2, 3, 64, 64))) == 12
