"""Segmenters as ONNX and MindIR: the network's logits in onnxruntime, at several sizes, whole and folded."""

import json

import numpy as np
import pytest
from mindspore import Tensor, nn

from mindska import export as exporting
from mindska.acceleration import decelerate
from mindska.errors import ExportError
from mindska.folding import fold
from mindska.segmentation.factory import create_segmenter

pytestmark = pytest.mark.slow
CASES = {  # segmenter -> (size it is made with, others; none where SkaNet or UPerNet belongs to one)
    "semantic_fpn_van_tiny_lska_k7": ((64, 96), [(75, 50), (33, 31)]),
    "semantic_fpn_sk_resnet18": ((65, 64), [(97, 64)]),
    "deeplabv3_sknet26": ((64, 64), [(80, 47)]),
    "upernet_van_tiny_lska_k7": ((75, 50), []),
    "deeplabv3_skanet_nano": ((64, 80), []),
    "semantic_fpn_skanet_nano": ((20, 90), []),  # padded inside
}


def images(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def settled(name):
    """A segmenter whose norms and classifiers are away from their trivial values."""
    net, rng = create_segmenter(name, num_classes=4).set_train(False), np.random.default_rng(0)
    for p in net.get_parameters():
        if p.ndim == 1 or "conv_seg" in p.name:
            around = 1 if p.name.endswith(("gamma", "moving_variance")) else 0
            p.set_data(Tensor((around + rng.uniform(-0.2, 0.2, p.shape)).astype(np.float32)))
    return net


@pytest.mark.parametrize("name", CASES)
def test_logits_at_several_sizes(tmp_path, name):
    import onnx

    (size, others), path = CASES[name], tmp_path / "a.onnx"
    net = settled(name)
    if "sk_resnet18" in name:
        fold(net)
    exporting.export(net, path, (1, 3, *size), {"model": name})
    run, net = exporting.open_model(path), decelerate(net)
    for batch, side in ((1, size), (3, size), *((2, other) for other in others)):
        x = images(batch, 3, *side)
        (found,), expected = run(x), net(Tensor(x)).asnumpy()
        assert found.shape == (batch, 4, *side)
        bound = 0.05 if "skanet" in name else 1e-4  # swapped neighbours
        assert np.abs(found - expected).max() < bound * np.abs(expected).max(), (batch, side)
        assert (found.argmax(1) == expected.argmax(1)).mean() > 0.999
    record = json.loads((tmp_path / "a.onnx.json").read_text())
    assert record["outputs"] == ["logits"]
    assert record["input_shape"] == [None, 3, *((None, None) if others else size)]
    if not others:
        with pytest.raises(ExportError, match="takes images of the shape"):
            run(images(1, 3, 96, 96))
    model = onnx.load(str(path))
    assert not [a for node in model.graph.node for a in node.attribute if a.name in ("auto_pad", "ceil_mode")]
    rules = {
        (a.s.decode(), node.op_type)
        for node in model.graph.node
        for a in node.attribute
        if a.name == "coordinate_transformation_mode"
    }
    expected = {"semantic": {"half_pixel", "asymmetric"}, "deeplabv3": {"align_corners"}, "upernet": {"half_pixel"}}
    assert {rule for rule, _ in rules} == expected[name.partition("_")[0]]


def test_a_resize_by_another_rule_is_not_written(tmp_path, monkeypatch):
    from mindska import onnx_segmentation

    monkeypatch.setattr(
        onnx_segmentation, "_bilinear", lambda corners: dict(mode="linear", coordinate_transformation_mode="asymmetric")
    )
    with pytest.raises(ExportError, match="outputs differ from the network's"):
        exporting.export(settled("semantic_fpn_sk_resnet18"), tmp_path / "a.onnx", (1, 3, 64, 64), {"model": "x"})
    assert not list(tmp_path.iterdir())


def test_half_and_mindir(tmp_path):
    net = settled("semantic_fpn_skanet_nano")
    exporting.export(net, tmp_path / "a.onnx", (1, 3, 64, 64), {"model": net.model_name}, half=True)
    agreement = exporting.export(net, tmp_path / "a.mindir", (2, 3, 64, 64), {"model": net.model_name})
    assert agreement.difference < 1e-4
    assert exporting.open_model(tmp_path / "a.mindir")(images(2, 3, 64, 64))[0].shape == (2, 4, 64, 64)


@pytest.mark.parametrize("name", ["semantic_fpn_skanet_nano", "upernet_sk_resnet18"])
def test_folding_changes_no_logits(name):
    net, x = settled(name), Tensor(images(2, 3, 64, 80))
    before = net(x).asnumpy()
    names = [p.name for p in net.get_parameters() if p.name.startswith("backbone.")]
    fold(net)
    assert not any(isinstance(cell, nn.BatchNorm2d) for _, cell in net.cells_and_names())
    after = net(x).asnumpy()
    bound = 0.05 if "skanet" in name else 1e-4
    assert names and np.abs(after - before).max() < bound * np.abs(before).max()
