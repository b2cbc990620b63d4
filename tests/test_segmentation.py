"""Segmenters by name and by number: parameter counts, sizes, strides, noise, losses, errors, weights in and out."""

import logging

import mindcv
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore.nn.utils import no_init_parameters

import mindska
from mindska.errors import SettingError, WeightsError
from mindska.models.factory import OUR_MODELS
from mindska.modes import pynative_mode
from mindska.segmentation import factory
from mindska.segmentation.upernet import AdaptivePool, pooling_matrix
from mindska.weights import from_torch, open_weights, to_torch
from mindska.weights.convert import head_options
from mindska.weights.write import write_weights

# Trainable parameters, as the published networks have them (of the others VAN's README gives 44, 57 and 75 M).
COUNTS = {
    "semantic_fpn_van_tiny_lska_k23": 7_907_574,
    "semantic_fpn_van_small_lska_k23": 17_486_422,
    "semantic_fpn_van_base_lska_k23": 30_046_422,
    "upernet_van_tiny": 32_133_004,
    "deeplabv3_skanet_s": 10_557_266,
}
WITHOUT_AUXILIARY = {"deeplabv3_skanet_s": 10_406_845}


def count(net):
    return sum(p.size for p in net.trainable_params())


def images(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def small(method="semantic_fpn", backbone="skanet_nano", **options):
    return factory.create_segmenter(method, backbone, num_classes=3, **options).set_train(False)


@pytest.mark.parametrize("name", COUNTS)
def test_exact_parameter_counts(name):
    with no_init_parameters():
        assert count(mindska.create_segmenter(name)) == COUNTS[name]
        if name in WITHOUT_AUXILIARY:
            assert count(mindska.create_segmenter(name, auxiliary_head=False)) == WITHOUT_AUXILIARY[name]


def test_published_pairs_are_in_mindcvs_factory():
    assert set(factory.SEGMENTERS) <= set(mindcv.list_models())
    assert set(COUNTS) <= set(factory.SEGMENTERS)
    assert set(mindcv.list_models(module="deeplabv3")) == {"deeplabv3_skanet_s"}
    net = mindcv.create_model("semantic_fpn_van_tiny", num_classes=5, in_chans=1)
    assert (net.model_name, net.num_classes, net.in_channels) == ("semantic_fpn_van_tiny", 5, 1)
    with pytest.raises(SettingError, match="No MindSpore weights are published for upernet_van_tiny"):
        mindcv.create_model("upernet_van_tiny", pretrained=True)
    with pytest.raises(SettingError, match="make its backbone with features_only=True"):
        mindcv.create_model("upernet_van_tiny", features_only=True)


@pytest.mark.parametrize("method, backbone", [("semanticfpn", "van_tiny"), ("upernet", "resnet50"), ("van_tiny", "")])
def test_unknown_names(method, backbone):
    with pytest.raises(
        SettingError, match="expected one of semantic_fpn, upernet, deeplabv3 on a backbone of ours: sk"
    ):
        factory.create_segmenter(method, backbone)


@pytest.mark.parametrize("number", [0, -1, 2.5, True])
def test_wrong_numbers_of_classes(number):
    with pytest.raises(SettingError, match="num_classes is"):
        factory.create_segmenter("semantic_fpn", "skanet_nano", num_classes=number)


@pytest.mark.fault("any-image")
@pytest.mark.parametrize(
    "method", ["semantic_fpn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("upernet", "deeplabv3"))]
)
def test_logits_have_the_size_of_the_images(method):
    """Of any size; SkaNet's graph needs more pixels than some of these have."""
    net = small(method)
    for size in [(33, 31), (1, 1), *([(7, 90), (103, 205)] if method == "semantic_fpn" else [])]:
        x, labels = Tensor(images(1, 3, *size)), Tensor(np.zeros((1, *size), np.int32))
        logits = net(x)
        assert logits.shape == (1, 3, *size)
        assert np.isfinite(logits.asnumpy()).all() and np.isfinite(net.losses(x, labels).asnumpy())


@pytest.mark.fault("any-image")
def test_padding_adds_zeros_and_cuts_after_enlarging():
    net, x = small(), images(1, 3, 20, 50)
    height, width = net.padded_size(20, 50)
    assert height > 20 and net.padded_size(64, 64) == (64, 64)
    padded = np.zeros((1, 3, height, width), np.float32)
    padded[:, :, :20, :50] = x
    np.testing.assert_array_equal(net(Tensor(x)).asnumpy(), net(Tensor(padded)).asnumpy()[:, :, :20, :50])
    assert net.head_logits(Tensor(x)).shape == net.head_logits(Tensor(padded)).shape


ALIKE = ("base", "large", "k11", "k35", "k41")  # the equations of others with other numbers


@pytest.mark.parametrize("backbone", [name for name in sorted(OUR_MODELS) if not any(part in name for part in ALIKE)])
def test_every_backbone_can_be_had(backbone):
    """All features are the stages', and the head is at the finest one's stride. Nothing is computed here."""
    with no_init_parameters():
        net = factory.create_segmenter("semantic_fpn", backbone)
    levels = 3 if backbone == "sknet29_16x32d" else 4
    assert net.reductions == [(1 if levels == 3 else 4) * 2**i for i in range(levels)]
    assert net.options["output_stride"] == net.reductions[-1]
    assert ("norm_eps" in net.options) == (not backbone.startswith("sk") or backbone.startswith("skanet"))
    if backbone.startswith("van"):
        assert net.options["norm_eps"] == 1e-5
        assert all(c.epsilon == 1e-5 for _, c in net.cells_and_names() if isinstance(c, nn.LayerNorm))


@pytest.mark.slow
@pytest.mark.parametrize("method", factory.METHODS)
def test_a_backbone_of_finer_levels(method):
    """CIFAR's network has three levels of 1, 2 and 4 pixels; its coarsest is finer than deeplabv3's output stride."""
    net = small(method, "sknet29_16x32d")
    x = np.random.default_rng(0).standard_normal((2, 3, 17, 24), dtype=np.float32)
    with pynative_mode():
        logits = net(Tensor(x)).asnumpy()
        loss = net.set_train(True).losses(Tensor(x), Tensor(np.ones((2, 17, 24), np.int32)))
    assert net.reductions == [1, 2, 4] and logits.shape == (2, 3, 17, 24) and np.isfinite(logits).all()
    assert np.isfinite(loss.asnumpy())


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["skanet_nano", "van_tiny_lska_k7", "sk_resnet18"])
@pytest.mark.parametrize("output_stride, strides", [(8, [4, 8, 8, 8]), (16, [4, 8, 16, 16]), (32, [4, 8, 16, 32])])
def test_output_strides(backbone, output_stride, strides):
    """The strided layer of a stage gets stride 1 and the dilation before it; nothing else is dilated by it."""
    net = small("deeplabv3", backbone, output_stride=output_stride)
    assert net.reductions == strides
    features = net.features(Tensor(images(1, 3, 64, 64)))
    assert [f.shape[2] for f in features] == [64 // s for s in strides]
    if backbone != "sk_resnet18":
        layers = [stage.patch_embed.proj for stage in net.backbone.stages]
        dilations = {8: [1, 1, 1, 2], 16: [1, 1, 1, 1], 32: [1, 1, 1, 1]}[output_stride]
        assert [layer.dilation[0] for layer in layers] == dilations
        assert [layer.padding for layer in layers][1:] == dilations[1:]


@pytest.mark.parametrize("method", factory.METHODS)
def test_heads_of_other_widths(method, tmp_path):
    net = small(method, head_channels=24)
    assert net.head_channels == net.options["head_channels"] == 24
    assert net.decode_head.channels == net.decode_head.conv_seg.in_channels == 24
    weights = {p.name: p.asnumpy() for p in net.get_parameters()}
    recorded = {name: value for name, value in net.options.items() if name in ("head_channels", "output_stride")}
    write_weights(tmp_path / "a.ckpt", weights, dict(model=net.model_name, network=recorded))
    other = open_weights(tmp_path / "a.ckpt").network()
    x = ms.Tensor(images(1, 3, 48, 32))
    np.testing.assert_array_equal(other(x).asnumpy(), net(x).asnumpy())
    for channels in (0, 1, 2.5, True):
        with pytest.raises(SettingError, match="head_channels is .*; expected a number of channels, at least 2"):
            small(method, head_channels=channels)


def test_a_file_does_not_say_how_large_a_network_is_made():
    for channels, found in (
        (24, dict(head_channels=24)),
        (4096, dict(head_channels=4096)),
        (4097, {}),
        (128, {}),
        (1, {}),
    ):
        weights = {"decode_head.conv_seg.weight": np.zeros((1, channels, 1, 1), np.float32)}
        assert head_options("semantic_fpn_skanet_nano", weights) == found


def test_a_records_width_is_not_believed(tmp_path):
    net = small()
    weights = {p.name: p.asnumpy() for p in net.get_parameters()}
    write_weights(tmp_path / "a.ckpt", weights, dict(model=net.model_name, network=dict(head_channels=1_000_000)))
    assert open_weights(tmp_path / "a.ckpt").network().head_channels == 128


def test_unknown_output_strides():
    with pytest.raises(SettingError, match="output_stride is 12; expected one of 4, 8, 16, 32"):
        small("deeplabv3", output_stride=12)
    with pytest.raises(SettingError, match="output_stride is for features"):
        mindcv.create_model("skanet_nano", output_stride=16)
    assert (
        mindcv.create_model("sk_resnet18", features_only=True, output_stride=16).net.feature_info[-1]["reduction"] == 16
    )


def test_noise_decides_what_is_dropped():
    """A step depends on its inputs only: the same noise gives the same loss, other noise another."""
    net = factory.create_segmenter("deeplabv3", "skanet_nano", num_classes=3, drop_path_rate=0.3, drop_rate=0.5)
    net.set_train(True)
    for _, cell in net.cells_and_names():
        if isinstance(cell, nn.BatchNorm2d):
            cell.set_train(False)  # else the first step changes the statistics
    assert net.noise_size == 2 * 5 + 512 + 128
    x, labels = Tensor(images(2, 3, 64, 64)), Tensor(np.ones((2, 64, 64), np.int32))
    rng = np.random.default_rng(0)
    noises = [Tensor(rng.random((2, net.noise_size), np.float32)) for _ in range(2)]
    losses = [float(net.losses(x, labels, noise).asnumpy()) for noise in (*noises, noises[0])]
    assert losses[0] == losses[2] != losses[1]
    kept = Tensor(np.zeros((2, net.noise_size), np.float32))
    head = net.decode_head.dropout
    np.testing.assert_array_equal(head(Tensor(np.ones((2, 512, 1, 1), np.float32)), kept[:, 10:522]).asnumpy(), 2)
    with pytest.raises(SettingError, match=r"the network takes noise \(2, 650\); found \(2, 5\)"):
        net.losses(x, labels, Tensor(np.zeros((2, 5), np.float32)))
    net.losses(x, labels)  # without noise MindSpore draws


@pytest.mark.slow
@pytest.mark.fault("ignored-batch")
@pytest.mark.parametrize("method", factory.METHODS)
def test_ignored_labels_alone(method):
    """The loss is 0, and so are all gradients: nothing is NaN."""
    net = small(method)
    net.set_train(True)
    x, labels = Tensor(images(2, 3, 64, 64)), Tensor(np.full((2, 64, 64), 255, np.int32))
    loss, gradients = ms.value_and_grad(net.losses, None, net.trainable_params())(x, labels)
    assert float(loss.asnumpy()) == 0
    assert all(not gradient.asnumpy().any() for gradient in gradients)


def test_shapes_that_do_not_fit():
    net = small()
    with pytest.raises(SettingError, match=r"takes images \(B, 3, H, W\), at least one; found \(1, 4, 64, 64\)"):
        net(Tensor(images(1, 4, 64, 64)))
    with pytest.raises(SettingError, match=r"labels have the shape \(1, 32, 64\); images .* take labels \(1, 64, 64\)"):
        net.losses(Tensor(images(1, 3, 64, 64)), Tensor(np.zeros((1, 32, 64), np.int32)))


@pytest.mark.fault("ignored-batch")
@pytest.mark.parametrize("method, size", [("upernet", 64), ("deeplabv3", 64), ("semantic_fpn", 32)])
def test_one_value_a_channel_cannot_be_normalised(method, size):
    """One image, and a batch norm on one pixel: its variance would be NaN. With statistics as they are it can."""
    net = small(method, "van_tiny_lska_k7").set_train(True)
    x, labels = Tensor(images(1, 3, size, size)), Tensor(np.zeros((1, size, size), np.int32))
    with pytest.raises(SettingError, match="training with one image a batch: .* expected at least two images"):
        net.losses(x, labels)
    for _, cell in net.cells_and_names():
        if isinstance(cell, nn.BatchNorm2d):
            cell.set_train(False)
    assert np.isfinite(net.losses(x, labels).asnumpy())


@pytest.mark.parametrize("size", [1, 3, 5, 6, 16])
def test_adaptive_pooling_is_pytorchs(size):
    import torch

    x = images(2, 3, size, size + 2)
    for bins in (1, 2, 3, 6):
        expected = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(x), bins).numpy()
        np.testing.assert_allclose(AdaptivePool(bins)(Tensor(x)).asnumpy(), expected, atol=1e-6)
    np.testing.assert_allclose(pooling_matrix(7, 3).sum(0), 1, rtol=1e-6)


@pytest.mark.slow
def test_published_names_of_weights():
    """MMSegmentation's of semantic FPN and UPerNet, ml-cvnets' of DeepLabv3: out and back, bit for bit."""
    samples = {
        ("semantic_fpn", "van_tiny_lska_k7"): (
            "backbone.blocks3.4.attn.spatial_gating_unit.DW_D_conv_v.weight",
            "neck.fpn_convs.3.conv.bias",
            "decode_head.scale_heads.3.4.bn.running_var",
            "decode_head.conv_seg.weight",
        ),
        ("upernet", "van_tiny"): (
            "backbone.block1.0.attn.spatial_gating_unit.conv_spatial.weight",
            "decode_head.psp_modules.3.1.conv.weight",
            "decode_head.fpn_bottleneck.bn.weight",
            "auxiliary_head.convs.0.bn.bias",
        ),
        ("deeplabv3", "sk_resnet18"): (
            "backbone.layer4.1.conv1.paths.0.conv.weight",
            "seg_head.aspp.aspp_layer.convs.4.aspp_pool.conv_1x1.block.norm.running_mean",
            "seg_head.aux_head.2.block.conv.bias",
        ),
    }
    for (method, backbone), names in samples.items():
        net = small(method, backbone)
        parameters = {p.name: p.asnumpy() for p in net.get_parameters()}
        theirs = to_torch(net.model_name, parameters)
        assert set(names) <= set(theirs) and len(theirs) == len(parameters)
        back = from_torch(net.model_name, {f"module.{key}": value for key, value in theirs.items()})
        assert all(np.array_equal(back[name], value) for name, value in parameters.items())
        for key in names[-1:]:
            with pytest.raises(WeightsError, match=rf"(?s)keys that are missing.*{key}"):
                from_torch(net.model_name, {k: v for k, v in theirs.items() if k != key})
            with pytest.raises(WeightsError, match="(?s)keys that are unknown.*decode_head.more"):
                from_torch(net.model_name, {**theirs, "decode_head.more": theirs[key]})


@pytest.mark.slow
def test_the_weights_of_another_segmenter_are_recognised():
    net = small("semantic_fpn", "van_tiny_lska_k11")
    theirs = to_torch(net.model_name, {p.name: p.asnumpy() for p in net.get_parameters()})
    with pytest.raises(WeightsError, match="not semantic_fpn_van_tiny_lska_k7's, but semantic_fpn_van_tiny_lska_k11's"):
        from_torch("semantic_fpn_van_tiny_lska_k7", theirs)


def test_prefixes_of_a_backbone_in_ml_cvnets():
    """`encoder.` as in its own files, or none."""
    net = small("deeplabv3", "skanet_nano")
    theirs = to_torch(net.model_name, {p.name: p.asnumpy() for p in net.get_parameters()})
    for prefix in ("encoder.", ""):
        renamed = {
            prefix + key.removeprefix("backbone.") if key.startswith("backbone.") else key: value
            for key, value in theirs.items()
        }
        back = from_torch(net.model_name, renamed)
        assert all(np.array_equal(back[p.name], p.asnumpy()) for p in net.get_parameters())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A network, and its weights in files of every kind."""
    folder, net = tmp_path_factory.mktemp("saved"), small("deeplabv3", "skanet_nano", output_stride=16)
    pixels = factory.own_preprocessing(net.model_name)
    record = dict(
        model=net.model_name, num_classes=3, class_names=["a", "b", "c"], task="segmentation", preprocessing=pixels,
        network={"output_stride": 16},
    )  # fmt: skip
    parameters = {p.name: p.asnumpy() for p in net.get_parameters()}
    for suffix in ("ckpt", "safetensors", "pth"):
        write_weights(folder / f"a.{suffix}", parameters, record)
    return net, folder


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors", "pth"])
def test_files_of_every_kind(saved, suffix):
    net, folder = saved
    weights = open_weights(folder / f"a.{suffix}", "" if suffix != "pth" else net.model_name)
    assert (weights.model, weights.num_classes, weights.in_channels) == (net.model_name, 3, 3)
    assert weights.record["task"] == "segmentation" and weights.preprocessing["image_size"] == (512, 512)
    if suffix != "pth":  # PyTorch's files have no place for a record
        assert weights.record["class_names"] == ["a", "b", "c"] and weights.non_default_options == {"output_stride": 16}
    other = weights.network()
    assert other.reductions == (net.reductions if suffix != "pth" else [4, 8, 8, 8])
    for mine, theirs in zip(net.get_parameters(), other.get_parameters()):
        assert mine.name == theirs.name and np.array_equal(mine.asnumpy(), theirs.asnumpy())
    weights.load_into(small("deeplabv3", "skanet_nano"))  # made for output stride 16, used with 8: no error


def test_without_the_auxiliary_head(saved, tmp_path, caplog):
    net, folder = saved
    alone = small("deeplabv3", "skanet_nano", auxiliary_head=False)
    with caplog.at_level(logging.WARNING, "mindska"):
        open_weights(folder / "a.ckpt").load_into(alone)
    assert "its auxiliary head is left out, for the network has none" in caplog.text
    parameters = {p.name: p.asnumpy() for p in alone.get_parameters()}
    write_weights(tmp_path / "b.pth", parameters, dict(model=net.model_name))
    weights = open_weights(tmp_path / "b.pth", net.model_name)
    assert not weights.network().has_auxiliary
    with pytest.raises(WeightsError, match="auxiliary head is missing, .* Make the network with auxiliary_head=False"):
        weights.load_into(net)


def test_other_numbers_of_classes(saved):
    _, folder = saved
    weights, net = open_weights(folder / "a.ckpt"), factory.create_segmenter("deeplabv3", "skanet_nano", num_classes=5)
    with pytest.raises(WeightsError, match="a classifier for 3 classes, the network one for 5"):
        weights.load_into(net)
    before = net.decode_head.conv_seg.weight.asnumpy().copy(), net.auxiliary_head.conv_seg.weight.asnumpy().copy()
    weights.with_new_classifier().load_into(net)
    np.testing.assert_array_equal(net.decode_head.conv_seg.weight.asnumpy(), before[0])
    np.testing.assert_array_equal(net.auxiliary_head.conv_seg.weight.asnumpy(), before[1])
    moved = weights.reordered([2, 0, 1]).parameters
    for name in ("decode_head.conv_seg.bias", "auxiliary_head.conv_seg.weight"):
        np.testing.assert_array_equal(moved[name], weights.parameters[name][[2, 0, 1]])


@pytest.mark.slow
def test_a_backbone_from_a_classifiers_weights(tmp_path, caplog):
    """Of any kind that is read: every weight is used, or the classifier named; the epsilon stays the segmenter's."""
    classifier = mindcv.create_model("van_tiny_lska_k7", num_classes=4)
    parameters = {p.name: p.asnumpy() for p in classifier.get_parameters()}
    for suffix in ("ckpt", "pth"):
        write_weights(tmp_path / f"c.{suffix}", parameters, dict(model="van_tiny_lska_k7", num_classes=4))
        net = small("semantic_fpn", "van_tiny_lska_k7")
        with caplog.at_level(logging.WARNING, "mindska"):
            open_weights(tmp_path / f"c.{suffix}", "van_tiny_lska_k7").load_into(net.backbone)
        assert "its classifier is left out" in caplog.text
        for p in net.backbone.get_parameters():
            np.testing.assert_array_equal(p.asnumpy(), parameters[p.name.removeprefix("backbone.")])
        assert net.options["norm_eps"] == 1e-5
    with pytest.raises(WeightsError, match="does not fit van_tiny"):
        open_weights(tmp_path / "c.ckpt").load_into(small("semantic_fpn", "van_tiny").backbone)
    with pytest.raises(WeightsError, match="does not fit semantic_fpn_van_tiny_lska_k7"):
        open_weights(tmp_path / "c.pth", "semantic_fpn_van_tiny_lska_k7")


def test_a_segmenters_file_has_a_backbone(saved):
    """Detectors and classifiers start from it as from MMSegmentation's."""
    net, folder = saved
    weights = open_weights(folder / "a.pth", "skanet_nano")
    backbone = mindcv.create_model("skanet_nano", features_only=True).net
    weights.load_into(backbone)
    np.testing.assert_array_equal(backbone.stages[3].norm.gamma.asnumpy(), net.backbone.stages[3].norm.gamma.asnumpy())


@pytest.mark.slow
def test_commands(saved, tmp_path, capsys):
    """Converted to PyTorch and back, compared with the PyTorch reference; averaged; exported."""
    from mindska.commands import main

    _, folder = saved
    pth, back = tmp_path / "b.pth", tmp_path / "c.ckpt"
    main(["convert", "--from", str(folder / "a.ckpt"), "--to", str(pth)])
    model = ["--model", "deeplabv3_skanet_nano"]
    main(["convert", *model, "--from", str(pth), "--to", str(back), "--num_classes", "4"])
    assert "PyTorch with the names of ml-cvnets, the authors of SkaNet" in capsys.readouterr().out
    weights = open_weights(back)
    assert weights.num_classes == 4 and weights.parameters["auxiliary_head.conv_seg.bias"].shape == (4,)
    main(["average", str(folder / "a.ckpt"), str(folder / "a.safetensors"), "--to", str(tmp_path / "mean.ckpt")])
    first, mean = open_weights(folder / "a.ckpt"), open_weights(tmp_path / "mean.ckpt")
    assert mean.options["output_stride"] == 16 and mean.record["class_names"] == ["a", "b", "c"]
    for name, value in first.parameters.items():
        np.testing.assert_allclose(mean.parameters[name], value, rtol=1e-6)
    words = ["--ckpt_path", str(folder / "a.ckpt"), "--format", "onnx", "--input_size", "64"]
    main(["export", *words, "--to", str(tmp_path / "a.onnx")])
    from mindska.export import open_with_record

    run, record = open_with_record(tmp_path / "a.onnx")
    assert run(images(2, 3, 64, 64))[0].shape == (2, 3, 64, 64)
    assert (record["model"], record["task"], record["class_names"]) == (
        "deeplabv3_skanet_nano",
        "segmentation",
        ["a", "b", "c"],
    )
