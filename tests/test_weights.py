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

from mindska.reference import skanet as torch_skanet
from mindska.weights import WeightsError, from_torch, read_torch, read_weights, to_torch
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
    raw = from_torch(MODEL, wrapped)["classifier.bias"]
    np.testing.assert_array_equal(from_torch(MODEL, wrapped, use_ema=True)["classifier.bias"], raw + 1)
    with pytest.raises(WeightsError, match="averaged weights .* only; take them: --use_ema"):
        from_torch(MODEL, {"state_dict_ema": averaged})
    with pytest.raises(WeightsError, match="no 'state_dict_ema'"):
        from_torch(MODEL, {"state_dict": state}, use_ema=True)


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
    with pytest.raises(WeightsError, match=r"missing in the file \(\d+\):\n  stages\.\d"):
        mindcv.create_model("skanet_s", checkpoint_path=str(tmp_path / "a.ckpt"))


def test_a_damaged_checkpoint_is_an_error(tmp_path):
    path = tmp_path / "a.ckpt"
    ms.save_checkpoint(mindcv.create_model(MODEL), str(path))
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="a.ckpt"):
        mindcv.create_model(MODEL, checkpoint_path=str(path))


def test_what_a_file_says_of_itself_is_believed(tmp_path):
    """sknet50 and sk_resnext50_32x4d have the same names and shapes, and are not the same function."""
    record = dict(model="sk_resnet18", num_classes=7)
    net = mindcv.create_model("sk_resnet18", num_classes=7)
    write_checkpoint(tmp_path / "a.ckpt", {p.name: p for p in net.get_parameters()}, dict(record, model="sk_resnet34"))
    with pytest.raises(WeightsError, match="a.ckpt does not fit sk_resnet18: it holds sk_resnet34"):
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
    raw = read_weights(tmp_path / "a.ckpt", MODEL, ema=False)[0]
    assert set(raw) == {p.name for p in net.get_parameters()}
    np.testing.assert_array_equal(
        read_weights(tmp_path / "a.ckpt", MODEL)[0]["classifier.bias"], raw["classifier.bias"] + 1
    )
    ms.save_checkpoint(net, str(tmp_path / "b.ckpt"))
    with pytest.raises(WeightsError, match="no averaged"):
        read_weights(tmp_path / "b.ckpt", MODEL, ema=True)


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
    assert read_weights(tmp_path / "a.pth", MODEL)[0]["classifier.bias"].shape == (1000,)
    with pytest.raises(WeightsError, match="no 'state_dict_ema'"):
        read_weights(tmp_path / "a.pth", MODEL, ema=True)
