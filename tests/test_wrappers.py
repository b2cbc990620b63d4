"""Weights as training tools leave them: prefixes, containers, optimisers' state, shards, no classifier, other names."""

import json
import logging
import os
import re
import time
import zipfile

import mindcv
import mindspore as ms
import numpy as np
import pytest
import torch
from commands import script
from mindcv.optim import create_optimizer
from mindcv.utils import TrainStep
from mindspore import Tensor, nn
from safetensors.torch import save_file

from mindska.errors import UserError
from mindska.reference import van as torch_van
from mindska.weights import MissingWeights, WeightsError, open_weights, to_torch
from mindska.weights.convert import parameter_shapes
from mindska.weights.source import kind_of
from mindska.weights.wrappers import AVERAGED, NUMBER, SLOT, WRAPPERS

MODEL = "skanet_nano"
BIAS = "classifier.bias"


def parameters(model=MODEL, seed=0):
    """Random weights under our names."""
    random = np.random.default_rng(seed)
    return {name: random.random(shape, np.float32) for name, shape in parameter_shapes(model).items()}


@pytest.fixture(scope="module")
def ours():
    return parameters()


@pytest.fixture(scope="module")
def state(ours):
    return {key: torch.from_numpy(value.copy()) for key, value in to_torch(MODEL, ours).items()}


def below(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def moved(state):
    return {key: value + 1 for key, value in state.items()}


@pytest.fixture
def said(caplog):
    """The lines of the log since the last call."""

    def lines():
        found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        caplog.clear()
        return found

    return lines


def check_same(weights, ours, shift=0):
    assert weights.parameters.keys() == ours.keys()
    np.testing.assert_array_equal(weights.parameters[BIAS], ours[BIAS] + np.float32(shift))


# Prefixes and containers

PREFIXED = [
    "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.", "network.", "backbone.",
    "encoder.", "model.backbone.", "module.model.net.", "_forward_module.module.", "_fsdp_wrapped_module.",
    "_backbone.", "_network._backbone.", "model._orig_mod.backbone.module.",
]  # fmt: skip


@pytest.mark.fault("wrappers")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_prefixes(state, ours, tmp_path, said, suffix):
    for prefix in PREFIXED:
        path = tmp_path / f"{prefix}{suffix}"
        torch.save(below(prefix, state), path) if suffix == ".pth" else save_file(below(prefix, state), path)
        check_same(open_weights(path, MODEL), ours)
        assert not said()


@pytest.mark.fault("wrappers")
def test_prefixes_of_mindspores_cells(ours, tmp_path):
    """Names of ours below the member of another cell, in MindSpore's own files."""
    for prefix in ("network.", "_backbone.", "net.backbone.", "ema.network."):
        entries = [{"name": prefix + name, "data": Tensor(value)} for name, value in ours.items()]
        ms.save_checkpoint(entries, str(tmp_path / "a.ckpt"))
        weights = open_weights(tmp_path / "a.ckpt", MODEL)
        check_same(weights, ours)
        assert weights.source.averaged == prefix.startswith("ema.")


@pytest.mark.fault("wrappers")
def test_parts_of_names_inside(state, ours, tmp_path):
    """torch.compile, FSDP and activation checkpointing of single blocks."""
    words = ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod._fsdp_wrapped_module."]
    changed = {
        re.sub(r"(block\d\.\d\.)", rf"\1{words[i % 4]}", key): value for i, (key, value) in enumerate(state.items())
    }
    assert changed.keys() != state.keys()
    torch.save(changed, tmp_path / "a.pth")
    check_same(open_weights(tmp_path / "a.pth", MODEL), ours)


CONTAINERS = {  # -> the file, and whether its weights are averaged
    "net": lambda s: ({"net": s}, False),
    "network": lambda s: ({"epoch": 3, "network": s}, False),
    "model_state_dict": lambda s: ({"model_state_dict": s, "optimizer_state_dict": {}}, False),
    "DeepSpeed": lambda s: ({"module": s, "ds_version": "0.9", "optimizer": None, "lr_scheduler": {}}, False),
    "nested": lambda s: ({"checkpoint": 1, "model": {"state_dict": {"module": below("model.", s)}}}, False),
    "averaged inside": lambda s: ({"model": {"state_dict": moved(s), "model_ema": {"module": s}}}, True),
    "state_dict_ema alone": lambda s: ({"state_dict_ema": s}, True),
    "model_ema alone": lambda s: ({"model_ema": {"module": below("module.", s)}}, True),
    "params_ema": lambda s: ({"params": moved(s), "params_ema": s}, True),
    "AveragedModel": lambda s: ({"n_averaged": torch.tensor(1), **below("module.", s)}, True),
    "AveragedModel inside": lambda s: ({"state_dict": {"n_averaged": torch.tensor(1), **below("module.", s)}}, True),
    "ModelEma beside": lambda s: ({"state_dict": {**below("model.", moved(s)), **below("ema_model.module.", s)}}, True),
    "model_ema beside": lambda s: ({**moved(s), "model_ema": {"module": s}}, True),
    "a container of less": lambda s: ({**s, "net": {"mean": torch.zeros(3)}}, False),
    "an array beside": lambda s: ({"net": s, "losses": torch.zeros(3)}, False),
    "an array beside the average": lambda s: ({"model_ema": s, "losses": torch.zeros(3)}, True),
    "WeightAveraging": lambda s: (
        {
            "state_dict": below("model.", s), "current_model_state": below("model.", moved(s)),
            "averaging_state": {"n_averaged": torch.tensor(3)},
        },
        True,
    ),
    "thop": lambda s: ({**s, "total_ops": torch.zeros(1), "block1.0.total_params": torch.zeros(1)}, False),
    "numbers beside": lambda s: ({**s, "epoch": 3, "lr": 0.1, "loss": torch.tensor(0.5), "arch": "skanet"}, False),
    "NumPy numbers": lambda s: (
        {"state_dict": s, "metric": np.float64(75.4), "epoch": np.int64(7), "bad": np.bool_(True), "f": np.float32(1)},
        False,
    ),
    "NumPy numbers in the old format": lambda s: ({"state_dict": s, "metric": np.float64(75.4)}, False),
    "parameters": lambda s: ({"state_dict": {key: torch.nn.Parameter(value) for key, value in s.items()}}, False),
}  # fmt: skip


@pytest.mark.fault("wrappers")
@pytest.mark.parametrize("tool", CONTAINERS)
def test_containers(state, ours, tmp_path, tool):
    content, averaged = CONTAINERS[tool](state)
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization="old" not in tool)
    weights = open_weights(tmp_path / "a.pth", MODEL)
    check_same(weights, ours)
    assert weights.source.averaged == averaged
    if tool == "NumPy numbers":
        assert weights.record["epoch"] == 7 and weights.record["metric"] == 75.4
    if weights.source.both:
        check_same(open_weights(tmp_path / "a.pth", MODEL, ema=False), ours, shift=1)


@pytest.mark.parametrize("version", [1, 2])
def test_numpys_numbers_of_either_version(state, ours, tmp_path, version):
    """NumPy 2 has another name for what makes a number; big-endian numbers are told as such."""
    torch.save({"state_dict": state, "metric": np.float64(75.25), "epoch": np.array(7, ">i4")[()]}, tmp_path / "a.pth")
    names = {1: b"cnumpy.core.multiarray\n", 2: b"cnumpy._core.multiarray\n"}
    with zipfile.ZipFile(tmp_path / "a.pth") as old, zipfile.ZipFile(tmp_path / "b.pth", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            found = next((known for known in names.values() if known in content), b"")
            assert found or not name.endswith("data.pkl")
            new.writestr(name, content.replace(found, names[version]) if found else content)
    weights = open_weights(tmp_path / "b.pth", MODEL)
    check_same(weights, ours)
    assert weights.record["metric"] == 75.25 and weights.record["epoch"] == 7


def test_what_lies_beside_is_said_once(state, tmp_path, said):
    torch.save({**state, "epoch": 3, "history": [1.0], "total_ops": torch.zeros(1)}, tmp_path / "a.pth")
    open_weights(tmp_path / "a.pth", MODEL)
    (line,) = said()
    assert line.endswith("is no part of the network, and is not read: history, total_ops, epoch")


@pytest.mark.fault("wrappers")
@pytest.mark.slow
def test_weights_below_unknown_names_are_pointed_at(state, tmp_path):
    below_two = {**below("student.", state), **below("teacher.head_of_it.", moved(state))}
    for content, hints in (
        (below_two, ("begin with student. are skanet_nano's", "begin with teacher.head_of_it. are skanet_nano's")),
        ({"student": state, "teacher": state, "epoch": 1}, ("not searched: student, teacher; save the weights alone",)),
    ):
        torch.save(content, tmp_path / "a.pth")
        for model in (MODEL, ""):
            with pytest.raises(WeightsError) as error:
                open_weights(tmp_path / "a.pth", model)
            for hint in hints:
                assert hint in str(error.value)


def test_pytorchs_files_of_mindcvs_models(state, tmp_path):
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(
        WeightsError, match="is of PyTorch; of skresnet18, which is MindCV's, MindSpore's files are read"
    ):
        open_weights(tmp_path / "a.pth", "skresnet18", any_model=True)


def test_a_number_under_the_name_of_a_weight_is_no_weight(state, tmp_path):
    for value, message in ((0.5, "float, no array"), ([0.5] * 1000, "list, no array"), (torch.tensor(0.5), ": () in")):
        torch.save({**state, "classifier.fc.bias": value}, tmp_path / "a.pth")
        with pytest.raises(WeightsError) as error:
            open_weights(tmp_path / "a.pth", MODEL)
        assert "classifier.fc.bias" in str(error.value) and message in str(error.value)


@pytest.mark.fault("hostile-weights")
def test_containers_that_hold_themselves_many_times(tmp_path):
    """Small files whose containers, followed by name, would take hours."""
    inside = {}
    for _ in range(8):
        inside = dict.fromkeys((*WRAPPERS, *AVERAGED, "my_ema"), inside)
    torch.save(inside, tmp_path / "a.pth")
    start = time.monotonic()
    with pytest.raises(WeightsError):
        open_weights(tmp_path / "a.pth", MODEL)
    assert time.monotonic() - start < 20


@pytest.mark.fault("hostile-weights")
def test_numpy_types_of_any_size_are_refused(state, tmp_path):
    for value in (np.void(b"123"), np.str_("text"), np.datetime64("2020-01-01"), np.zeros(3)):
        torch.save({"state_dict": state, "metric": value}, tmp_path / "a.pth")
        with pytest.raises(WeightsError, match="was not opened"):
            open_weights(tmp_path / "a.pth", MODEL)
    assert "numpy" in str(pytest.raises(WeightsError, open_weights, tmp_path / "a.pth").value)


# What MindSpore and MindCV save


class Tiny(nn.Cell):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.classifier = nn.Dense(4, 2)

    def construct(self, x):
        return self.classifier(self.norm(self.conv(x)).mean((2, 3)))


OPTIMIZERS = {
    **{name: lambda p, name=name: getattr(nn, name)(p) for name in (
        "Adam", "AdamWeightDecay", "AdaMax", "RMSProp", "Adagrad", "FTRL", "ASGD", "Rprop",
    )},
    "Momentum": lambda p: nn.Momentum(p, 0.1, 0.9),
    "SGD": lambda p: nn.SGD(p, 0.1, momentum=0.9),
    "Lamb": lambda p: nn.Lamb(p, 0.1),
    "AMSGrad": lambda p: nn.Adam(p, use_amsgrad=True),
    "RMSProp centered": lambda p: nn.RMSProp(p, centered=True),
    "LARS": lambda p: nn.LARS(nn.Momentum(p, 0.1, 0.9)),
    "rates": lambda p: nn.Momentum(p, [0.1, 0.2, 0.3], 0.9, weight_decay=1e-4),
    "groups": lambda p: nn.Momentum([{"params": p[:2], "lr": 0.1, "weight_decay": 0.1}, {"params": p[2:]}], 0.2, 0.9),
    "schedule": lambda p: nn.Adam(p, nn.CosineDecayLR(0.0, 0.1, 10)),
    **{f"MindCV's {name}": lambda p, name=name: create_optimizer(p, name, 0.1, 1e-4) for name in (
        "sgd", "momentum", "nesterov", "adam", "adamw", "lion", "nadam", "adan", "rmsprop", "adagrad", "lamb",
    )},
}  # fmt: skip


@pytest.mark.fault("training-state")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimisers_state_is_known(name):
    """Whatever MindSpore's and MindCV's optimisers keep is in the table of what no network has."""
    net = Tiny()
    own = {p.name for p in net.get_parameters()}
    found = [p.name for p in OPTIMIZERS[name](net.trainable_params()).get_parameters() if p.name not in own]
    assert found
    assert not [n for n in found if not NUMBER.fullmatch(n) and not SLOT.fullmatch(n)], found


def test_no_network_has_such_names():
    families = ("skanet_nano", "van_tiny", "van_tiny_lska_k7", "sk_resnet18", "sknet26")
    names = {name for model in families for name in parameter_shapes(model)}
    assert not [n for n in names if NUMBER.fullmatch(n) or SLOT.fullmatch(n)]


def test_groups_of_optimisers_that_mean_nothing_alone(ours, tmp_path):
    """A slot's name is no reason to leave a weight out: only beside the weight that it is of."""
    entries = [{"name": name, "data": Tensor(value)} for name, value in ours.items()]
    entries.append({"name": "linear.weight", "data": Tensor(np.zeros((2, 2), np.float32))})
    ms.save_checkpoint(entries, str(tmp_path / "a.ckpt"))
    with pytest.raises(WeightsError, match=r"unknown \(1\):\n  linear.weight"):
        open_weights(tmp_path / "a.ckpt", MODEL)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """MindCV's skresnet18 after a step, as MindSpore's ModelCheckpoint and MindCV's trainer save it; its weights."""
    folder = tmp_path_factory.mktemp("trained")
    net = mindcv.create_model("skresnet18", num_classes=3)
    images, labels = np.zeros((2, 3, 32, 32), np.float32), np.array([0, 2], np.int32)

    def data():
        yield from [(images, labels)] * 2

    model = ms.train.Model(
        net, nn.CrossEntropyLoss(), create_optimizer(net.trainable_params(), "momentum", 0.1, 1e-4),
        loss_scale_manager=ms.amp.FixedLossScaleManager(1024, drop_overflow_update=False),
    )  # fmt: skip
    config = ms.train.CheckpointConfig(save_checkpoint_steps=2, append_info=["epoch_num", "step_num", {"seed": 7}])
    saving = ms.train.ModelCheckpoint("model", str(folder), config)
    dataset = ms.dataset.GeneratorDataset(data, ["x", "y"], shuffle=False)
    model.train(1, dataset, callbacks=[saving], dataset_sink_mode=False)
    (folder / "model-1_2.ckpt").rename(folder / "model.ckpt")

    parameters = {p.name: p.asnumpy() for p in net.get_parameters()}
    step = mindcvs_step(net, nn.DynamicLossScaleUpdateCell(1024, 2, 1000))  # cannot run on CPU
    ms.save_checkpoint(step, str(folder / "scaled.safetensors"), format="safetensors")
    net = mindcv.create_model("skresnet18", num_classes=3)
    step = mindcvs_step(net, Tensor(1024.0, ms.float32))
    step(Tensor(images), Tensor(labels))
    ms.save_checkpoint(step, str(folder / "mindcv.ckpt"))
    ms.save_checkpoint(step.optimizer, str(folder / "optim_skresnet18.ckpt"))
    own = {p.name for p in net.get_parameters()}
    state = [{"name": p.name, "data": p} for p in step.optimizer.get_parameters() if p.name not in own]
    ms.save_checkpoint(state, str(folder / "optim.ckpt"))
    step = mindcvs_step(net, Tensor(1024.0, ms.float32), gradient_accumulation_steps=2)  # renames the parameters
    assert "optimizer.conv1.weight" in {p.name for p in net.get_parameters()}
    step(Tensor(images), Tensor(labels))
    ms.save_checkpoint(step, str(folder / "accumulated.ckpt"))
    return folder, parameters


def mindcvs_step(net, scale, **options):
    optimizer = create_optimizer(net.trainable_params(), "adamw", 0.1, 1e-4)
    loss = nn.WithLossCell(net, nn.CrossEntropyLoss())
    return TrainStep(loss, optimizer, scale_sense=scale, ema=True, clip_grad=True, **options)


@pytest.mark.fault("training-state")
@pytest.mark.slow
def test_trained_checkpoints_of_mindspore_and_mindcv(trained, said):
    folder, parameters = trained
    held = ms.load_checkpoint(str(folder / "model.ckpt"))
    assert {"moments.conv1.weight", "epoch_num", "step_num", "seed", "global_step"} <= held.keys()
    for name in ("model.ckpt", "mindcv.ckpt", "accumulated.ckpt", "scaled.safetensors"):
        weights = open_weights(folder / name, "sk_resnet18")
        assert weights.num_classes == 3 and weights.source.averaged == (name != "model.ckpt")
        lines = [line for line in said() if "no part of the network" in line]
        assert len(lines) == 1 and ("moments.* (" if name == "model.ckpt" else "scale_sense") in lines[0]
        # MindCV's own network, under its own names.
        theirs = open_weights(folder / name, "skresnet18", any_model=True, ema=False)
        assert theirs.parameters.keys() - {"seed"} == parameters.keys()
        theirs.load_into(mindcv.create_model("skresnet18", num_classes=3))
        if name in ("model.ckpt", "scaled.safetensors"):
            raw = open_weights(folder / name, "sk_resnet18", ema=False)
            np.testing.assert_array_equal(raw.parameters["classifier.bias"], parameters["classifier.bias"])
        said()


@pytest.mark.fault("training-state")
@pytest.mark.slow
def test_an_optimisers_state_alone(trained):
    folder, _ = trained
    # MindCV's own file has the weights as well, but not the statistics of batch norms.
    for name, message in (
        ("optim.ckpt", "optimiser's state and no weights"),
        ("optim_skresnet18.ckpt", "missing (72)"),
    ):
        with pytest.raises(WeightsError) as error:
            open_weights(folder / name, "sk_resnet18")
        for words in (str(folder / name), message, "MODEL-EPOCH_STEP.ckpt, beside optim_MODEL.ckpt"):
            assert words in str(error.value)


# Other numbers of classes, no classifier


@pytest.mark.fault("no-classifier")
def test_a_backbone_where_a_classifier_is_wanted(ours, state, tmp_path):
    """As dense models' authors and users of features_only have it."""
    ms.save_checkpoint(mindcv.create_model(MODEL, features_only=True), str(tmp_path / "a.ckpt"))
    torch.save({k: v for k, v in state.items() if not k.startswith("classifier")}, tmp_path / "a.pth")
    for name in ("a.ckpt", "a.pth"):
        with pytest.raises(WeightsError) as error:
            mindcv.create_model(MODEL, checkpoint_path=str(tmp_path / name))
        message = str(error.value)
        assert f"{tmp_path / name} holds {MODEL}'s weights. The classifier is missing" in message
        for word in ("features_only=True", "mindska convert", "--num_classes N", "mindska train", "--ckpt_path"):
            assert word in message
        assert "does not fit" not in message
        mindcv.create_model(MODEL, features_only=True, checkpoint_path=str(tmp_path / name))


@pytest.mark.fault("no-classifier")
def test_weights_of_other_classes_and_channels(tmp_path):
    ms.save_checkpoint(mindcv.create_model(MODEL, num_classes=7), str(tmp_path / "a.ckpt"))
    with pytest.raises(WeightsError) as error:
        mindcv.create_model(MODEL, num_classes=10, checkpoint_path=str(tmp_path / "a.ckpt"))
    assert "a classifier for 7 classes, the network one for 10" in str(error.value)
    assert "num_classes=7" in str(error.value) and "--num_classes 10)" in str(error.value)
    with pytest.raises(WeightsError) as error:
        mindcv.create_model(MODEL, num_classes=7, in_channels=1, checkpoint_path=str(tmp_path / "a.ckpt"))
    assert "images of 3 channels, the network of 1" in str(error.value) and "classifier" not in str(error.value)
    with pytest.raises(WeightsError, match="7 classes, the network one for 9.* 3 channels, the network of 1"):
        mindcv.create_model(MODEL, num_classes=9, in_channels=1, checkpoint_path=str(tmp_path / "a.ckpt"))
    mindcv.create_model(MODEL, features_only=True, checkpoint_path=str(tmp_path / "a.ckpt"))


def dense(state, prefix="backbone."):
    """A segmenter's file: a backbone without classifier, a neck and heads, one with names like a backbone's."""
    body = {key: value for key, value in state.items() if not key.startswith("classifier")}
    heads = {
        "decode_head.conv_seg.weight": torch.zeros(5, 8, 1, 1), "decode_head.norm1.weight": torch.zeros(8),
        "neck.patch_embed1.proj.weight": torch.zeros(8, 8), "auxiliary_head.bias": torch.zeros(3),
    }  # fmt: skip
    return {"state_dict": {**below(prefix, body), **heads}, "meta": {}}


@pytest.mark.fault("no-classifier")
@pytest.mark.slow
def test_a_dense_models_backbone(state, ours, tmp_path, said):
    for prefix in ("backbone.", "module.backbone.", "model.encoder."):
        torch.save(dense(state, prefix), tmp_path / "a.pth")
        weights = open_weights(tmp_path / "a.pth")
        assert weights.model == MODEL and weights.num_classes is None
        (line,) = said()
        assert "is not read: decode_head.* (2), neck.patch_embed1.proj.weight, auxiliary_head.bias" in line
        net = mindcv.create_model(MODEL, features_only=True, checkpoint_path=str(tmp_path / "a.pth"))
        first = "stages.0.patch_embed.proj.weight"
        loaded = {p.name: p.asnumpy() for p in net.get_parameters()}
        np.testing.assert_array_equal(loaded[first], ours[first])
        with pytest.raises(WeightsError, match="The classifier is missing"):
            mindcv.create_model(MODEL, checkpoint_path=str(tmp_path / "a.pth"))
        said()


@pytest.mark.fault("no-classifier")
def test_a_classifier_under_other_names(state, tmp_path):
    state = dict(state)
    for name in ("weight", "bias"):
        state[f"fc.{name}"] = state.pop(f"classifier.fc.{name}")
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(WeightsError) as error:
        open_weights(tmp_path / "a.pth", MODEL)
    assert "its classifier (classifier.fc.weight and classifier.fc.bias) is missing" in str(error.value)
    assert "unknown (2):\n  fc.weight\n  fc.bias" in str(error.value)


# VAN in others' names


def published(model, kind):
    """The reference's weights in the names of transformers' `VanForImageClassification` or of mmpretrain's `VAN`."""
    torch.manual_seed(0)
    reference = torch_van.create(model, num_classes=5, **({"norm_eps": 1e-5} if kind == "mmpretrain" else {})).eval()
    rules = {
        "mmpretrain": [
            (r"^patch_embed(\d)\.proj\.", r"backbone.patch_embed\1.projection."),
            (r"^patch_embed(\d)\.norm\.", r"backbone.patch_embed\1.norm."),
            (r"^block(\d)\.", r"backbone.blocks\1."),
            (r"^norm(\d)\.", r"backbone.norm\1."),
            (r"conv0\.", "DW_conv."), (r"conv_spatial\.", "DW_D_conv."), (r"dwconv\.dwconv", "dwconv"),
            (r"^head\.", "head.fc."),
        ],
        "Hugging Face": [
            *((rf"^(patch_embed|block|norm){i + 1}\.", rf"van.encoder.stages.{i}.\1.") for i in range(4)),
            (r"patch_embed\.proj\.", "embeddings.convolution."), (r"patch_embed\.norm\.", "embeddings.normalization."),
            (r"^(van\.encoder\.stages\.\d)\.norm\.", r"\1.normalization."), (r"\.block\.", ".layers."),
            (r"\.norm1\.", ".pre_normomalization."), (r"\.norm2\.", ".post_normalization."),
            (r"attn\.proj_1\.", "attention.pre_projection.conv."), (r"attn\.proj_2\.", "attention.post_projection."),
            (r"attn\.spatial_gating_unit\.conv0\.", "attention.attention_layer.attention.depth_wise."),
            (r"attn\.spatial_gating_unit\.conv_spatial\.", "attention.attention_layer.attention.depth_wise_dilated."),
            (r"attn\.spatial_gating_unit\.conv1\.", "attention.attention_layer.attention.point_wise."),
            (r"layer_scale_1$", "attention_scaling.weight"), (r"layer_scale_2$", "mlp_scaling.weight"),
            (r"mlp\.fc1\.", "mlp.in_dense."), (r"mlp\.dwconv\.dwconv\.", "mlp.depth_wise."),
            (r"mlp\.fc2\.", "mlp.out_dense."), (r"^head\.", "classifier."),
        ],
    }[kind]  # fmt: skip
    state = {}
    for key, value in reference.state_dict().items():
        for pattern, name in rules:
            key = re.sub(pattern, name, key)
        state[key] = value.clone()
    if kind == "Hugging Face":
        state.update({"van.layernorm.weight": torch.ones(256), "van.layernorm.bias": torch.zeros(256)})
    return reference, state


# Some names as they stand in the two repositories' code.
THEIRS = {
    "mmpretrain": [
        "backbone.patch_embed1.projection.weight", "backbone.blocks3.4.attn.spatial_gating_unit.DW_D_conv.bias",
        "backbone.blocks1.0.layer_scale_2", "backbone.blocks2.0.mlp.dwconv.weight", "backbone.norm4.bias",
        "backbone.blocks1.0.attn.spatial_gating_unit.conv1.weight", "head.fc.weight",
    ],
    "Hugging Face": [
        "van.encoder.stages.0.embeddings.convolution.weight", "van.encoder.stages.3.normalization.bias",
        "van.encoder.stages.2.layers.4.attention.attention_layer.attention.depth_wise_dilated.bias",
        "van.encoder.stages.0.layers.0.pre_normomalization.running_mean", "classifier.weight",
        "van.encoder.stages.0.layers.0.attention.pre_projection.conv.weight",
        "van.encoder.stages.1.layers.2.attention_scaling.weight", "van.encoder.stages.1.layers.2.mlp.depth_wise.bias",
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", THEIRS)
def test_van_in_others_names(tmp_path, said, kind):
    """From the file to the reference's logits, by the command, which verifies as well."""
    reference, state = published("van_tiny", kind)
    assert set(THEIRS[kind]) <= state.keys()
    torch.save({"state_dict": state, "meta": {}} if kind == "mmpretrain" else state, tmp_path / "a.bin")
    script("convert").main(["--from", str(tmp_path / "a.bin"), "--to", str(tmp_path / "a.ckpt"), "--verify"])
    assert [line for line in said() if "no part of the network" in line] == (
        [f"{tmp_path / 'a.bin'} also has what is no part of the network, and is not read: van.* (2)"]
        if kind == "Hugging Face"
        else []
    )
    weights = open_weights(tmp_path / "a.bin", "van_tiny")
    assert weights.dialect.name == kind and weights.num_classes == 5
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = reference(images).numpy()
    for file in ("a.bin", "a.ckpt"):
        logits = open_weights(tmp_path / file).network()(Tensor(images.numpy())).asnumpy()
        np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())
    # Without the classifier: transformers' VanModel, a backbone of OpenMMLab's.
    body = {key.removeprefix("van."): value for key, value in state.items() if not re.match(r"head\.|classifier", key)}
    torch.save(body, tmp_path / "b.bin")
    weights = open_weights(tmp_path / "b.bin")
    assert weights.model == "van_tiny" and weights.num_classes is None
    weights.network()


# Files of several parts


def sharded(folder, state, suffix="safetensors", parts=3):
    """As Hugging Face's tools write it; returns the index."""
    folder.mkdir(exist_ok=True)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    where = {key: f"{stem}-{i % parts + 1:05}-of-{parts:05}.{suffix}" for i, key in enumerate(state)}
    for name in set(where.values()):
        part = {key: state[key] for key in state if where[key] == name}
        save_file(part, folder / name) if suffix == "safetensors" else torch.save(part, folder / name)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}, indent=2))
    return index


@pytest.mark.slow
@pytest.mark.fault("shards")
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_with_an_index(state, ours, tmp_path, capsys, suffix):
    index = sharded(tmp_path / "folder", below("module.", state), suffix)
    for path in (index, index.parent):
        weights = open_weights(path, MODEL)
        check_same(weights, ours)
        assert weights.source.path == index and len(weights.source.shards) == 3
    digest = weights.record["source"]["sha256"]
    script("inspect_checkpoint").main([str(index.parent)])
    printed = capsys.readouterr().out
    assert f"sha256:   {digest}" in printed and f"{weights.source.size:,} bytes" in printed and MODEL in printed
    shard = index.parent / weights.source.shards[0]
    shard.write_bytes(shard.read_bytes()[:-4] + b"1234")
    assert open_weights(index, MODEL).source.sha256 != digest if suffix == "safetensors" else True
    shard.unlink()
    with pytest.raises(WeightsError, match=f"1 of the 3 files .* are missing: {shard.name}"):
        open_weights(index, MODEL)


def change_index(index, change):
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


@pytest.mark.fault("hostile-weights", "shards")
def test_indices_that_lie(state, tmp_path):
    key = "norm4.bias"
    for name in ("../a.safetensors", "/etc/passwd", "..", "", "sub/a.safetensors", "a\\b", "C:a", "x" * 5000, "a\0"):
        index = sharded(tmp_path / "a", state)
        change_index(index, lambda where, name=name: where.update({key: name}))
        with pytest.raises(WeightsError, match="names files outside of its folder"):
            open_weights(index, MODEL)
    first = f"model-{1:05}-of-{3:05}.safetensors"
    for change, message in (
        (lambda where: where.update(more=first), "lacks more"),
        (lambda where: where.pop(key), f"also has {key}"),
        (lambda where: where.update({key: "a.ckpt"}), "names files of MindSpore and safetensors"),
        (lambda where: where.update({key: "lfs.safetensors"}), "git-lfs"),
        (lambda where: where.clear(), "no index of weights in several files"),
        (lambda where: where.update({key: 5}), "no index of weights in several files"),
        (lambda where: where.update({f"x{i}": f"{i}.bin" for i in range(2000)}), "expected at most 1,000"),
        (lambda where: where.update({key: "model.safetensors.index.json"}), "names files of index"),
    ):
        index = sharded(tmp_path / "a", state)
        (tmp_path / "a" / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
        ms.save_checkpoint([{"name": key, "data": Tensor(np.zeros(3, np.float32))}], str(tmp_path / "a" / "a.ckpt"))
        change_index(index, change)
        with pytest.raises(WeightsError, match=message):
            open_weights(index, MODEL)
    for text in ("{", '{"a":' * 100_000, '{"a": 1}', '{"weight_map": []}'):
        index.write_text(text)
        with pytest.raises(WeightsError, match="no readable JSON|no index"):
            open_weights(index, MODEL)


# What is no file of weights


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 22130000\n"


@pytest.mark.fault("no-weights")
@pytest.mark.parametrize(
    "content, message",
    [
        (LFS, "is no file of weights: it is a git-lfs pointer, which names the file; `git lfs pull` fetches"),
        (b"<!DOCTYPE html>\n<html><head>", "it is a page"),
        (b"\xef\xbb\xbf\r\n  <HTML lang='de'>\xc3\xbc", "it is a page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "it is a page"),
        (b'{"error": "Repository not found"}', "is JSON, but no index of weights"),
        (b"", "it is empty"),
        (b"\x1f\x8b\x08\x00abc", "it is an archive (gzip); unpack it first"),
        (b"\xfd7zXZ\x00abc", "it is an archive (xz)"),
        (b"\x93NUMPY\x01\x00", "it is one array of NumPy's"),
        (bytes(257) + b"ustar\x0000" + bytes(300), "it is an archive (tar); unpack it first"),
    ],
    ids=["lfs", "html", "html-bom", "xml", "json", "empty", "gzip", "xz", "npy", "tar"],
)  # fmt: skip
def test_what_is_no_file_of_weights_is_named(tmp_path, content, message):
    for name in ("a.ckpt", "a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError) as error:
            open_weights(tmp_path / name, MODEL)
        assert message in str(error.value) and str(tmp_path / name) in str(error.value)


@pytest.mark.fault("no-weights")
def test_archives_of_other_kinds(state, tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "a.pt")
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pth")
    torch.save({"a": torch.zeros(3).to(torch.float8_e4m3fn)}, tmp_path / "eight.pth")
    torch.save(state, tmp_path / "protocol.pth", pickle_protocol=4)
    ms.save_checkpoint(nn.Dense(2, 2), str(tmp_path / "secret.ckpt"), enc_key=b"0123456789abcdef", enc_mode="AES-GCM")
    for name, message in (
        ("a.pt", "TorchScript archive"),
        ("a.npz", "NumPy arrays"),
        ("a.zip", "was not opened"),
        ("protocol.pth", "was not opened: it was pickled with protocol 4; expected torch.save's default, 2"),
        ("eight.pth", "in float32 or float16 (not in eight bits)"),
        ("secret.ckpt", "it is encrypted (MindSpore's enc_key)"),
        ("whole.pth", "holds more than plain weights (torch.nn.modules.linear.Linear)"),
    ):
        with pytest.raises(WeightsError) as error:
            open_weights(tmp_path / name, MODEL)
        assert message in str(error.value)


@pytest.mark.fault("no-weights")
def test_folders_pipes_and_what_may_not_be_read(state, tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match="is a folder; expected a file of weights .it holds no file"):
        open_weights(tmp_path, MODEL)
    torch.save(state, tmp_path / "b.pth")
    (tmp_path / "a.ckpt").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(WeightsError, match=r"is a folder; expected a file of weights \(it holds a.ckpt, b.pth\)"):
        open_weights(tmp_path, MODEL)
    os.mkfifo(tmp_path / "pipe.ckpt")
    with pytest.raises(WeightsError, match="a pipe, a socket or a device"):
        open_weights(tmp_path / "pipe.ckpt", MODEL)
    for path in (tmp_path / "none.ckpt", tmp_path / "notes.txt" / "a.ckpt"):
        with pytest.raises(MissingWeights, match="No checkpoint at"):
            open_weights(path, MODEL)
    with pytest.raises(WeightsError, match="is no name of a file"):
        open_weights("a\0b.ckpt", MODEL)
    with pytest.raises(WeightsError, match="cannot be read: File name too long"):
        open_weights(tmp_path / ("x" * 300), MODEL)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    for function in ("stat", "open"):
        with monkeypatch.context() as patched:
            patched.setattr(type(tmp_path), function, refuse)
            with pytest.raises(WeightsError, match="b.pth cannot be read: Permission denied"):
                kind_of(tmp_path / "b.pth")


@pytest.mark.fault("no-weights")
@pytest.mark.parametrize("command", ["convert", "inspect_checkpoint", "export", "predict", "clean_checkpoint"])
def test_every_command_has_the_same_door(tmp_path, command):
    (tmp_path / "a.pth").write_bytes(LFS)
    path, image = str(tmp_path / "a.pth"), str(tmp_path / "a.png")
    (tmp_path / "a.png").touch()
    words = {
        "convert": ["--from", path, "--to", str(tmp_path / "b.ckpt")],
        "export": ["--ckpt_path", path, "--format", "mindir"],
        "predict": [image, "--ckpt_path", path],
    }.get(command, [path])
    with pytest.raises((SystemExit, UserError)) as error:
        script(command).main(words)
    assert "it is a git-lfs pointer" in str(error.value)
