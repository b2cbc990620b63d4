"""Weights of detectors, in and out: names of MMDetection and ml-cvnets, files of every kind, classes, backbones."""

import mindcv
import numpy as np
import pytest
import torch
from mindspore import Tensor

from mindska import create_detector
from mindska.errors import WeightsError
from mindska.weights import from_torch, open_weights, to_torch
from mindska.weights.convert import key_map
from mindska.weights.names import dialects
from mindska.weights.write import write_weights

NETWORKS = {"retinanet": "van_tiny_lska_k7", "mask_rcnn": "sk_resnet18", "ssdlite": "skanet_nano"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Of each method a network for three classes, and its weights in files of two kinds."""
    folder, networks = tmp_path_factory.mktemp("weights"), {}
    for method, backbone in NETWORKS.items():
        net = networks[method] = create_detector(method, backbone, num_classes=3)
        parameters = {p.name: p.asnumpy() for p in net.get_parameters()}
        record = dict(model=net.model_name, num_classes=3, class_names=["a", "b", "c"])
        for suffix in ("pth", "ckpt"):
            write_weights(folder / f"{method}.{suffix}", parameters, record)
    return folder, networks


@pytest.mark.parametrize("method", NETWORKS)
@pytest.mark.parametrize("suffix", ["pth", "ckpt"])
def test_files_of_detectors(saved, method, suffix):
    folder, networks = saved
    net = networks[method]
    weights = open_weights(folder / f"{method}.{suffix}", net.model_name if suffix == "pth" else "")
    assert (weights.model, weights.num_classes, weights.in_channels) == (net.model_name, 3, 3)
    assert weights.record["task"] == "detection"
    size = (320, 320) if method == "ssdlite" else (800, 1333)
    assert tuple(weights.preprocessing["image_size"]) == size
    again = weights.network()
    for ours, theirs in zip(again.get_parameters(), net.get_parameters()):
        np.testing.assert_array_equal(ours.asnumpy(), theirs.asnumpy(), err_msg=ours.name)


def test_published_names(saved):
    """A part of each file, under the names of MMDetection and of ml-cvnets."""
    folder, networks = saved
    expected = {
        "retinanet": (
            *(
                "backbone.patch_embed1.projection.weight",
                "neck.lateral_convs.0.conv.weight",
                "neck.fpn_convs.4.conv.bias",
            ),
            *("bbox_head.cls_convs.3.conv.weight", "bbox_head.reg_convs.0.conv.bias", "bbox_head.retina_cls.weight"),
        ),
        "mask_rcnn": (
            *("neck.fpn_convs.3.conv.weight", "rpn_head.rpn_conv.weight", "rpn_head.rpn_cls.bias"),
            *("roi_head.bbox_head.shared_fcs.0.weight", "roi_head.bbox_head.fc_reg.bias"),
            *("roi_head.mask_head.convs.0.conv.weight", "roi_head.mask_head.upsample.weight"),
        ),
        "ssdlite": (
            *("extra_layers.os_64.dw_conv.block.conv.weight", "extra_layers.os_-1.1.block.conv.weight"),
            *("ssd_heads.0.proj_layer.block.norm.running_mean", "ssd_heads.5.loc_cls_layer.block.conv.bias"),
            "ssd_heads.2.loc_cls_layer.pw_conv.block.conv.bias",
        ),
    }
    for method, keys in expected.items():
        state = torch.load(folder / f"{method}.pth", weights_only=True)
        state = state.get("state_dict", state)
        assert set(keys) <= set(state), method
        name = networks[method].model_name
        parameters = from_torch(name, state)
        assert set(to_torch(name, parameters)) == set(key_map(name).values())


@pytest.mark.slow
def test_mmdetections_file_of_lska(tmp_path):
    """As their toolbox saves it: OpenMMLab's names of the backbone, and what stands beside the weights."""
    net = create_detector("retinanet_van_tiny_lska_k23", num_classes=80)
    names = key_map(net.model_name, next(d for d in dialects(net.model_name, "torch") if "mmseg" in d.name))
    assert "backbone.blocks1.0.attn.spatial_gating_unit.DW_conv_h.weight" in names.values()
    rng = np.random.default_rng(0)
    state = {names[p.name]: torch.from_numpy(rng.random(p.shape, np.float32)) for p in net.get_parameters()}
    state["backbone.patch_embed1.norm.num_batches_tracked"] = torch.tensor(7)
    torch.save(dict(meta=dict(epoch=12), state_dict=state, optimizer={}), tmp_path / "epoch_12.pth")
    weights = open_weights(tmp_path / "epoch_12.pth", model="retinanet_van_tiny_lska_k23")
    weights.load_into(net)
    for p in net.get_parameters():
        np.testing.assert_array_equal(p.asnumpy(), state[names[p.name]].numpy())
    with pytest.raises(WeightsError, match="not retinanet_van_small_lska_k23's, but retinanet_van_tiny_lska_k23's"):
        open_weights(tmp_path / "epoch_12.pth", model="retinanet_van_small_lska_k23")


@pytest.mark.slow
@pytest.mark.parametrize("method", NETWORKS)
def test_other_classes(saved, method):
    """A network for others refuses them, takes them with a classifier of its own, and classes change places."""
    folder, networks = saved
    weights = open_weights(folder / f"{method}.ckpt")
    other = create_detector(method, NETWORKS[method], num_classes=5)
    with pytest.raises(WeightsError, match="classifier for|another shape"):
        weights.load_into(other)
    weights.with_new_classifier().load_into(other)
    order = [2, 0, 1]
    net = networks[method]
    moved = weights.reordered(order).network().set_train(False)
    net.set_train(False)
    x = Tensor(np.random.default_rng(1).standard_normal((1, 3, 96, 96), dtype=np.float32))
    if method == "mask_rcnn":
        rois = Tensor(np.random.default_rng(2).standard_normal((2, 256, 7, 7), dtype=np.float32))
        (scores, deltas), (others, other_deltas) = (n.roi_head.bbox_head(rois) for n in (moved, net))
        np.testing.assert_allclose(scores.asnumpy(), others.asnumpy()[:, [*order, 3]], atol=1e-5)
        np.testing.assert_allclose(
            deltas.asnumpy().reshape(2, 3, 4), other_deltas.asnumpy().reshape(2, 3, 4)[:, order], atol=1e-5
        )
        large = Tensor(np.random.default_rng(3).standard_normal((2, 256, 14, 14), dtype=np.float32))
        maps, other_maps = (n.roi_head.mask_head(large).asnumpy() for n in (moved, net))
        np.testing.assert_allclose(maps, other_maps[:, order], atol=1e-5)
        return
    (scores, deltas), (others, other_deltas) = moved(x), net(x)
    first = 1 if method == "ssdlite" else 0  # the background stays
    rows = [*range(first), *(first + i for i in order)]
    for ours, theirs in zip(scores, others):
        b, channels, h, w = ours.shape
        shape = (b, channels // len(rows), len(rows), h, w)
        np.testing.assert_allclose(
            ours.asnumpy().reshape(shape), theirs.asnumpy().reshape(shape)[:, :, rows], atol=1e-4
        )
    for ours, theirs in zip(deltas, other_deltas):
        np.testing.assert_allclose(ours.asnumpy(), theirs.asnumpy(), atol=1e-4)


@pytest.mark.slow
def test_a_backbone_from_a_classifiers_weights(saved, tmp_path):
    folder, networks = saved
    for method, backbone in NETWORKS.items():
        classifier = mindcv.create_model(backbone, num_classes=4)
        parameters = {p.name: p.asnumpy() for p in classifier.get_parameters()}
        write_weights(tmp_path / f"{method}.ckpt", parameters, dict(model=backbone, num_classes=4))
        net = create_detector(method, backbone, num_classes=3)
        open_weights(tmp_path / f"{method}.ckpt").load_into(net.backbone)
        for p in net.backbone.get_parameters():
            np.testing.assert_array_equal(p.asnumpy(), parameters[p.name.removeprefix("backbone.")], err_msg=p.name)
    weights = open_weights(folder / "retinanet.pth", "van_tiny_lska_k7")
    assert weights.num_classes is None  # a detector's file has a backbone
    with pytest.raises(WeightsError, match="holds van_tiny_lska_k7, but the model asked for is retinanet"):
        open_weights(tmp_path / "retinanet.ckpt", "retinanet_van_tiny_lska_k7")
