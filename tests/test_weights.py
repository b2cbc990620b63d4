"""Weights in and out: explicit keys, wrapped checkpoints, strict loading, safe reading."""

import argparse
import os
import pickle

import mindcv
import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor

from mindska import builders
from mindska.config import parse_args
from mindska.errors import WeightsError
from mindska.models.factory import OUR_MODELS
from mindska.reference import skanet as torch_skanet
from mindska.weights import convert, from_torch, open_weights, read_torch, to_torch
from mindska.weights.files import write_checkpoint

MODEL = "skanet_nano"


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    return torch_skanet.create(MODEL).eval()


@pytest.fixture
def state(reference):
    return {key: value.clone() for key, value in reference.state_dict().items()}


@pytest.fixture
def images():
    return np.random.default_rng(0).standard_normal((2, 3, 64, 64), dtype=np.float32)


def logits(path, images, **kwargs):
    return mindcv.create_model(MODEL, checkpoint_path=str(path), **kwargs).set_train(False)(Tensor(images)).asnumpy()


def expected_logits(reference, images):
    with torch.no_grad():
        return reference(torch.from_numpy(images)).numpy()


def test_a_round_trip_is_bit_exact(state):
    back = to_torch(MODEL, from_torch(MODEL, state))
    assert set(back) == {key for key in state if not key.endswith("num_batches_tracked")}
    for key, value in back.items():
        np.testing.assert_array_equal(value, state[key].numpy())


@pytest.mark.parametrize("wrapper", ["state_dict", "state_dict_ema", "model"])
def test_wrapped_checkpoints_and_prefixes(state, wrapper):
    wrapped = {wrapper: {f"module.{key}": value for key, value in state.items()}, "epoch": 3}
    weights = from_torch(MODEL, wrapped, use_ema=wrapper == "state_dict_ema")
    np.testing.assert_array_equal(weights["classifier.weight"], state["classifier.fc.weight"].numpy())


def test_averaged_weights_are_chosen_by_name(state):
    averaged = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    wrapped = {"state_dict": state, "state_dict_ema": averaged}
    raw = from_torch(MODEL, wrapped, use_ema=False)["classifier.bias"]
    for choice in (None, True):
        np.testing.assert_array_equal(from_torch(MODEL, wrapped, use_ema=choice)["classifier.bias"], raw + 1)
    with pytest.raises(WeightsError, match="averaged weights .* only; take them: --use_ema"):
        from_torch(MODEL, {"state_dict_ema": averaged}, use_ema=False)
    with pytest.raises(WeightsError, match="no 'state_dict_ema'"):
        from_torch(MODEL, {"state_dict": state}, use_ema=True)


def averaged_of(state):
    return {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}


def below(prefix, state):
    return {prefix + key: value for key, value in state.items()}


WRAPPED = {  # how training tools save the raw weights and their average
    "timm": lambda raw, ema: {"state_dict": raw, "state_dict_ema": ema},
    "DeiT": lambda raw, ema: {"model": raw, "model_ema": ema, "optimizer": {}},
    "torchvision": lambda raw, ema: {
        "model": raw, "model_ema": {"n_averaged": torch.tensor(7), **below("module.", ema)},
    },
    "model_ema_state_dict": lambda raw, ema: {"model_state_dict": raw, "model_ema_state_dict": ema},
    "nested": lambda raw, ema: {"state_dict": below("module._orig_mod.", raw), "ema": {"decay": 0.9, "module": ema}},
    "MMEngine swaps them": lambda raw, ema: {
        "state_dict": ema, "ema_state_dict": {"steps": torch.tensor(7), **below("module.", raw)}, "message_hub": {},
    },
    "beside": lambda raw, ema: {**raw, **below("ema.", ema)},
}  # fmt: skip


@pytest.mark.fault("averaged")
@pytest.mark.parametrize("tool", WRAPPED)
def test_averaged_weights_of_other_tools(state, tmp_path, caplog, tool):
    """Taken where there are any, in one line that names the other choice; either by choice, without a line."""
    path = tmp_path / "a.pth"
    torch.save(WRAPPED[tool](state, averaged_of(state)), path)
    raw = state["classifier.fc.bias"].numpy()
    for ema, expected, lines in ((None, raw + 1, 1), (True, raw + 1, 0), (False, raw, 0)):
        caplog.clear()
        weights = open_weights(path, MODEL, ema)
        np.testing.assert_array_equal(weights.parameters["classifier.bias"], expected)
        assert weights.source.averaged == (ema is not False) and len(caplog.messages) == lines
    caplog.clear()
    np.testing.assert_array_equal(
        mindcv.create_model(MODEL, checkpoint_path=str(path)).classifier.bias.asnumpy(), raw + 1
    )
    assert len(caplog.messages) == 1 and "the averaged (EMA) weights are taken" in caplog.messages[0]


@pytest.mark.fault("averaged")
def test_the_configuration_chooses(state, tmp_path):
    path = str(tmp_path / "a.pth")
    torch.save({"model": state, "model_ema": averaged_of(state)}, path)
    raw = state["classifier.fc.bias"].numpy()
    for words, expected in (((), raw + 1), (("--use_ema",), raw + 1), (("--use_ema", "false"), raw)):
        config = parse_args(["--model", MODEL, "--ckpt_path", path, *words])
        net = builders.build_network(config, 1000, weights=builders.configured_weights(config))
        np.testing.assert_array_equal(net.classifier.bias.asnumpy(), expected)
    torch.save(state, path)
    config = parse_args(["--model", MODEL, "--ckpt_path", path, "--use_ema"])
    with pytest.raises(WeightsError, match="no averaged"):
        builders.configured_weights(config)


def test_an_average_of_an_unknown_kind_is_said(state, tmp_path, caplog):
    torch.save({"state_dict": state, "emaModel_v2": {"weights": 1, "state_dict": state}}, tmp_path / "a.pth")
    assert not open_weights(tmp_path / "a.pth", MODEL).source.averaged
    assert "also has weights under emaModel_v2, which are not read" in caplog.text


def test_two_weights_of_one_name_are_refused(state):
    with pytest.raises(WeightsError, match="two weights called classifier.fc.bias"):
        from_torch(MODEL, {**state, "module.classifier.fc.bias": state["classifier.fc.bias"]})


@pytest.mark.fault("values")
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t + 1j, "complex; a network has real weights"),
        (lambda t: t.to(torch.int8), "of the type int8; expected floating point"),
        (lambda t: t > 0, "of the type bool; expected floating point"),
        (lambda t: t.to("meta"), "on the device meta, which has a shape and no values"),
        (lambda t: t.to_sparse(), "sparse (sparse_coo); save it .to_dense()"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "quantised (qint8); save the model as it was"),
        (lambda t: torch.nested.nested_tensor([t, t[:3]]), "nested: a list of tensors of several shapes"),
        (lambda t: t[:1].clone().expand(t.shape), "of 1,000 values, but the file has 4 bytes"),
        (lambda t: t / 0, "classifier.fc.bias: 1,000 of 1,000"),
        (lambda t: torch.where(t == t[3], torch.nan, t), "classifier.fc.bias: 1 of 1,000"),
        (lambda t: t.double() * 1e300, "NaN or infinite (in float32)"),
    ],
    ids=["complex", "int8", "bool", "meta", "sparse", "quantised", "nested", "expanded", "infinite", "nan", "overflow"],
)
def test_values_that_are_no_weights(state, tmp_path, change, message):
    """Refused by name in every way to open a file, never turned into something else."""
    state["classifier.fc.bias"] = change(state["classifier.fc.bias"])
    path = tmp_path / "a.pth"
    torch.save(state, path)
    for read in (
        lambda: open_weights(path, MODEL),
        lambda: mindcv.create_model(MODEL, checkpoint_path=str(path)),
    ):
        with pytest.raises(WeightsError) as error:
            read()
        assert (
            message in str(error.value) and "classifier.fc.bias" in str(error.value) and str(path) in str(error.value)
        )


@pytest.mark.fault("values")
def test_values_that_are_no_weights_in_our_own_files(tmp_path):
    """Without a record, and of MindCV's models, whose arrays are taken as they are."""
    for name, options in ((MODEL, {}), ("skresnet18", {})):
        net = mindcv.create_model(name, num_classes=3, **options)
        first = next(net.get_parameters())
        first.set_data(Tensor(np.full(first.shape, np.nan, np.float32)))
        ms.save_checkpoint(net, str(tmp_path / f"{name}.ckpt"))
        with pytest.raises(WeightsError, match="NaN or infinite"):
            open_weights(tmp_path / f"{name}.ckpt", name, any_model=True)


@pytest.mark.parametrize("change", [torch.nn.Parameter, torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.double])
def test_kinds_of_tensors_that_are_weights(state, tmp_path, change):
    changed = {key: change(value) if value.is_floating_point() else value for key, value in state.items()}
    torch.save(changed, tmp_path / "a.pth")
    ours = open_weights(tmp_path / "a.pth", MODEL).parameters["classifier.bias"]
    np.testing.assert_array_equal(ours, changed["classifier.fc.bias"].detach().float().numpy())


def test_unknown_and_missing_keys_are_listed(state):
    state["head.weight"] = state.pop("classifier.fc.weight")
    with pytest.raises(WeightsError) as error:
        from_torch(MODEL, state)
    assert "missing (1):\n  classifier.fc.weight" in str(error.value)
    assert "unknown (1):\n  head.weight" in str(error.value)


def test_an_unknown_model_is_an_error(state):
    with pytest.raises(ValueError, match="'resnet50' is not a model of mindska; known: sk_resnet18, .*skanet_nano"):
        from_torch("resnet50", state)


@pytest.mark.parametrize("suffix", [".pth", ".pth.tar"])
def test_the_factory_takes_the_authors_file(reference, state, images, tmp_path, suffix):
    """As timm saves it: weights, their average, the optimiser's state and the command line in one file."""
    path = tmp_path / f"model_best{suffix}"
    torch.save(
        {"state_dict": state, "arch": "skanet_small", "args": argparse.Namespace(lr=1e-3), "optimizer": {"state": {}}},
        path,
    )
    np.testing.assert_allclose(logits(path, images), expected_logits(reference, images), atol=1e-5)


def test_a_mindspore_checkpoint_comes_back(images, tmp_path):
    net = mindcv.create_model(MODEL).set_train(False)
    ms.save_checkpoint(net, str(tmp_path / "a.ckpt"))
    np.testing.assert_array_equal(logits(tmp_path / "a.ckpt", images), net(Tensor(images)).asnumpy())


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.ckpt"):
        mindcv.create_model(MODEL, checkpoint_path=str(tmp_path / "nothing.ckpt"))


def test_a_checkpoint_that_does_not_fit_is_an_error_with_names_and_shapes(tmp_path):
    ms.save_checkpoint(mindcv.create_model(MODEL, num_classes=7), str(tmp_path / "a.ckpt"))
    with pytest.raises(WeightsError) as error:
        mindcv.create_model(MODEL, checkpoint_path=str(tmp_path / "a.ckpt"))
    assert "classifier.weight: (7, 96) in the file, (1000, 96) in the network" in str(error.value)
    with pytest.raises(WeightsError, match=r"but skanet_nano's.\nkeys that are missing \(\d+\):\n  stages\.\d"):
        mindcv.create_model("skanet_s", checkpoint_path=str(tmp_path / "a.ckpt"))


def test_a_damaged_checkpoint_is_an_error(tmp_path):
    path = tmp_path / "a.ckpt"
    ms.save_checkpoint(mindcv.create_model(MODEL), str(path))
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="a.ckpt"):
        mindcv.create_model(MODEL, checkpoint_path=str(path))


@pytest.mark.slow
def test_what_a_file_says_of_itself_is_believed(tmp_path):
    """sknet50 and sk_resnext50_32x4d have the same names and shapes, and are not the same function."""
    record = dict(model="sk_resnet18", num_classes=7)
    net = mindcv.create_model("sk_resnet18", num_classes=7)
    write_checkpoint(tmp_path / "a.ckpt", {p.name: p for p in net.get_parameters()}, dict(record, model="sk_resnet34"))
    with pytest.raises(WeightsError, match="a.ckpt holds sk_resnet34, but the model asked for is sk_resnet18"):
        mindcv.create_model("sk_resnet18", num_classes=7, checkpoint_path=str(tmp_path / "a.ckpt"))
    write_checkpoint(tmp_path / "b.ckpt", {p.name: p for p in net.get_parameters()}, record)
    with pytest.raises(WeightsError, match="trained with stem='timm'.* the network was made with 'mindcv'"):
        mindcv.create_model("sk_resnet18", num_classes=7, stem="mindcv", checkpoint_path=str(tmp_path / "b.ckpt"))
    mindcv.create_model("sk_resnet18", num_classes=7, checkpoint_path=str(tmp_path / "b.ckpt"))


def test_averaged_weights_lie_beside_the_raw_ones(tmp_path):
    net = mindcv.create_model(MODEL)
    entries = [{"name": p.name, "data": p} for p in net.get_parameters()]
    entries += [{"name": f"ema.{p.name}", "data": Tensor(p.asnumpy() + 1)} for p in net.get_parameters()]
    ms.save_checkpoint(entries, str(tmp_path / "a.ckpt"))
    raw = open_weights(tmp_path / "a.ckpt", MODEL, ema=False).parameters
    assert set(raw) == {p.name for p in net.get_parameters()}
    np.testing.assert_array_equal(
        open_weights(tmp_path / "a.ckpt", MODEL).parameters["classifier.bias"], raw["classifier.bias"] + 1
    )
    ms.save_checkpoint(net, str(tmp_path / "b.ckpt"))
    with pytest.raises(WeightsError, match="no averaged"):
        open_weights(tmp_path / "b.ckpt", MODEL, ema=True)


def test_mindcvs_own_models_load_as_before(tmp_path):
    net = mindcv.create_model("skresnet18", num_classes=3)
    ms.save_checkpoint(net, str(tmp_path / "a.ckpt"))
    again = mindcv.create_model("skresnet18", num_classes=3, checkpoint_path=str(tmp_path / "a.ckpt"))
    for ours, theirs in zip(again.get_parameters(), net.get_parameters()):
        np.testing.assert_array_equal(ours.asnumpy(), theirs.asnumpy())


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    harm = tmp_path / "harm"
    torch.save({"state_dict": Harmful(harm)}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Harmful(harm)))
    for name in ("a.pth", "b.pth"):
        with pytest.raises(WeightsError, match="was not opened"):
            read_torch(tmp_path / name)
    assert not harm.exists()


def test_a_damaged_archive_is_refused(state, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(state, path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"PK\x01\x02", b"XX\x01\x02"))  # the entries of its directory
    with pytest.raises(WeightsError, match="was not opened: it is damaged"):
        read_torch(path)


def test_an_average_that_is_not_there(state, tmp_path):
    torch.save({"state_dict": state, "state_dict_ema": None}, tmp_path / "a.pth")
    assert open_weights(tmp_path / "a.pth", MODEL).parameters["classifier.bias"].shape == (1000,)
    with pytest.raises(WeightsError, match="no 'state_dict_ema'"):
        open_weights(tmp_path / "a.pth", MODEL, ema=True)


@pytest.mark.slow
def test_models_of_several_kernel_sizes_have_the_same_names():
    """`models_that_fit` makes one of them, where the names are not those of a file."""
    first = convert.parameter_shapes("van_tiny_lska_k7")
    other = convert.parameter_shapes("van_tiny_lska_k23")
    assert list(first) == list(other) and first != other
    assert [name for name in OUR_MODELS if convert.KERNEL_SIZE.search(name) and "_lska_k" not in name] == []
    arrays = {name: np.zeros(shape, np.float32) for name, shape in other.items()}
    assert convert.models_that_fit(arrays, "mindspore") == ["van_tiny_lska_k23"]
