"""scripts/convert.py: files of every kind, made here, give the reference's logits; wrong ones are refused."""

import struct
import subprocess
import sys

import families
import golden
import mindcv
import mindspore as ms
import numpy as np
import pytest
import torch
from commands import ROOT, script
from mindspore import Tensor
from safetensors.numpy import save_file

from mindska import builders
from mindska.config import Config
from mindska.models.factory import own_preprocessing
from mindska.reference import skanet as torch_skanet
from mindska.reference import sknet as torch_sknet
from mindska.weights import open_weights, read_caffemodel
from mindska.weights.convert import key_map
from mindska.weights.names import dialects

MODEL = "skanet_nano"
NOISE = 5e-6  # float32 against float64, see tests/parity


@pytest.fixture
def convert(capsys):
    """Runs the command, returns what it printed; `error`: the words of the message with which it must fail."""
    main = script("convert").main

    def run(*words, error=None):
        if error is None:
            main([str(word) for word in words])
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        assert error in str(ended.value), ended.value
        return str(ended.value)

    return run


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    return torch_skanet.create(MODEL).eval()


def images(size=64, count=2):
    return np.random.default_rng(0).standard_normal((count, 3, size, size), dtype=np.float32)


def logits(path, model=MODEL, x=None, **keywords):
    net = mindcv.create_model(model, checkpoint_path=str(path), **keywords).set_train(False)
    return net(Tensor(images() if x is None else x)).asnumpy()


def expected(reference, x=None):
    with torch.no_grad():
        return reference(torch.from_numpy(images() if x is None else x)).numpy()


def moved(state):
    """Other weights of the same names, for the average."""
    return {key: value + 0.01 if value.is_floating_point() else value for key, value in state.items()}


def torch_file(path, state, kind):
    files = {
        "raw": state,
        "state_dict": {"epoch": 7, "state_dict": {f"module.{key}": value for key, value in state.items()}},
        "state_dict_ema": {"state_dict": moved(state), "state_dict_ema": state},
        "model": {"model": state, "optimizer": {}},
    }
    torch.save(files[kind], path)


@pytest.mark.parametrize(
    "kind, suffix", [("raw", ".bin"), ("state_dict", ".pth"), ("state_dict_ema", ".pth.tar"), ("model", ".pth")]
)
def test_pytorch_files(convert, reference, tmp_path, kind, suffix):
    source, target = tmp_path / f"a{suffix}", tmp_path / "a.ckpt"
    torch_file(source, reference.state_dict(), kind)
    printed = convert("--model", MODEL, "--from", source, "--to", target, "--verify")
    assert f"{source}: skanet_nano, PyTorch with the names of the authors of SkaNet" in printed
    assert "verified" in printed and "the same to the bit" in printed
    assert golden.rms(logits(target), expected(reference)) < NOISE
    record = open_weights(target).source.record
    assert (record["model"], record["num_classes"], record["source"]["kind"]) == (MODEL, 1000, "PyTorch")
    assert record["source"]["averaged"] == (kind == "state_dict_ema")
    assert record["parity"]["difference"] < record["parity"]["bound"]
    assert record.get("epoch") == (7 if kind == "state_dict" else None)


def test_averaged_weights_by_choice(convert, reference, tmp_path):
    torch_file(tmp_path / "a.pth", reference.state_dict(), "state_dict_ema")
    convert("--from", tmp_path / "a.pth", "--to", tmp_path / "raw.ckpt", "--model", MODEL, "--no-use_ema")
    raw, averaged = (open_weights(tmp_path / name, MODEL).parameters for name in ("raw.ckpt", "a.pth"))
    np.testing.assert_array_equal(
        raw["classifier.bias"], averaged["classifier.bias"] + np.float32(0.01), "the file's `state_dict` is moved"
    )
    torch_file(tmp_path / "b.pth", reference.state_dict(), "raw")
    convert("--from", tmp_path / "b.pth", "--to", tmp_path / "b.ckpt", "--use_ema", error="no 'state_dict_ema'")


def test_the_old_format_of_pytorch(convert, reference, tmp_path):
    torch.save(reference.state_dict(), tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    convert("--model", MODEL, "--from", tmp_path / "a.pth", "--to", tmp_path / "a.ckpt")
    assert golden.rms(logits(tmp_path / "a.ckpt"), expected(reference)) < NOISE


@pytest.mark.slow
@pytest.mark.parametrize(
    "precision",
    [torch.float32, *(pytest.param(half, marks=pytest.mark.slow) for half in (torch.float16, torch.bfloat16))],
)
def test_safetensors_with_timms_names(convert, tmp_path, precision):
    from safetensors.torch import save_file as save_torch

    torch.manual_seed(0)
    reference = torch_sknet.create("sk_resnet18", num_classes=10).eval()
    state = {k: v.to(precision) if v.is_floating_point() else v for k, v in reference.state_dict().items()}
    save_torch(state, tmp_path / "model.safetensors")
    printed = convert("--from", tmp_path / "model.safetensors", "--to", tmp_path / "a.ckpt", "--verify")
    assert "sk_resnet18, safetensors with the names of timm" in printed and "10 classes" in printed
    reference.load_state_dict(state)  # rounded, in float32 again
    x = images(64)
    assert golden.rms(logits(tmp_path / "a.ckpt", "sk_resnet18", x, num_classes=10), expected(reference, x)) < NOISE


@pytest.mark.slow
def test_mindcvs_checkpoint(convert, tmp_path):
    """MindCV's skresnet18 is timm's but for the pooling after the stem, and expects bilinear pixels."""
    theirs = mindcv.create_model("skresnet18", num_classes=5).set_train(False)
    ms.save_checkpoint(theirs, str(tmp_path / "skresnet18-868228e5.ckpt"))
    words = ("--from", tmp_path / "skresnet18-868228e5.ckpt", "--to", tmp_path / "a.safetensors")
    assert "sk_resnet18, MindSpore with the names of MindCV" in convert(*words)
    convert(*words, "--overwrite", "--verify", error="the reference has no option stem")
    assert open_weights(tmp_path / "a.safetensors").source.record["preprocessing"]["interpolation"] == "bilinear"
    for size in ((64, 64), (65, 97)):
        x = np.random.default_rng(1).standard_normal((2, 3, *size), dtype=np.float32)
        expected = theirs(Tensor(x)).asnumpy()
        ours = logits(tmp_path / "a.safetensors", "sk_resnet18", x, num_classes=5, stem="mindcv")
        assert golden.rms(ours, expected) < NOISE
        direct = open_weights(tmp_path / "skresnet18-868228e5.ckpt").network()(Tensor(x)).asnumpy()
        np.testing.assert_array_equal(direct, ours)
    # Trained and validated with MindCV's pooling as well, and what is trained says so.
    for file in ("skresnet18-868228e5.ckpt", "a.safetensors"):
        config = Config(model="sk_resnet18", ckpt_path=str(tmp_path / file), drop_path_rate=0.0)
        net = builders.build_network(config, 5, weights=builders.configured_weights(config)).set_train(False)
        np.testing.assert_array_equal(net(Tensor(x)).asnumpy(), ours)
        record = builders.checkpoint_record(config, net, list("abcde"), builders.build_preprocessing(config))
        assert record["network"] == {"stem": "mindcv"}
    with pytest.raises(ValueError, match="Pass stem='mindcv'"):
        logits(tmp_path / "a.safetensors", "sk_resnet18", num_classes=5)


@pytest.mark.slow
def test_mmsegmentations_backbone(convert, tmp_path):
    name = "van_tiny_lska_k7"
    net = mindcv.create_model(name)
    keys = key_map(name, dialects(name, "torch")[1])
    state = {keys[p.name]: torch.from_numpy(p.asnumpy()) for p in net.get_parameters() if p.name in keys}
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "a.pth")
    printed = convert("--from", tmp_path / "a.pth", "--to", tmp_path / "a.ckpt", "--verify")
    assert f"{name}, PyTorch with the names of mmsegmentation" in printed and "no classifier: a backbone" in printed
    assert open_weights(tmp_path / "a.ckpt").source.record["network"] == {"norm_eps": 1e-5}
    arguments = dict(features_only=True, checkpoint_path=str(tmp_path / "a.ckpt"))
    with pytest.raises(ValueError, match="Pass norm_eps=1e-05"):
        mindcv.create_model(name, **arguments)
    mindcv.create_model(name, norm_eps=1e-5, **arguments)
    convert("--from", tmp_path / "a.ckpt", "--to", tmp_path / "back.pth", "--verify")
    assert set(torch.load(tmp_path / "back.pth")) == set(key_map(name).values()) - {"head.weight", "head.bias"}


def message(*fields):
    """Protobuf's wire format, written out: (number, bytes) for what has a length, (number, int) for a number."""

    def varint(value):
        out = b""
        while value > 127:
            out, value = out + bytes([value & 127 | 128]), value >> 7
        return out + bytes([value])

    return b"".join(
        varint(number << 3) + varint(value)
        if isinstance(value, int)
        else varint(number << 3 | 2) + varint(len(value)) + value
        for number, value in fields
    )


def blob(array, legacy=False):
    data = (5, np.ascontiguousarray(array, "<f4").tobytes())
    if legacy:
        dims = (1,) * (4 - array.ndim) + array.shape
        return message(data, *enumerate(dims, start=1))
    packed = b"".join(message((0, size))[1:] for size in array.shape)
    return message(data, (7, message((1, packed))))


def caffemodel(layers, **keywords):
    """A binary .caffemodel with a layer without blobs among the others."""
    parts = [(100, message((1, b"data"), (2, b"Input")))]
    for name, blobs in layers.items():
        parts.append((100, message((1, name.encode()), (2, b"Any"), *((7, blob(b, **keywords)) for b in blobs))))
    return message((1, b"SKNet"), *parts)


@pytest.mark.parametrize("legacy", [False, True])
def test_read_caffemodel(tmp_path, legacy):
    layers = {"conv1/7x7_s2": [np.arange(24.0).reshape(2, 3, 2, 2)], "fc": [np.ones((3, 200)), np.zeros(3)]}
    (tmp_path / "a.caffemodel").write_bytes(caffemodel(layers, legacy=legacy))
    found = read_caffemodel(tmp_path / "a.caffemodel")
    assert list(found) == list(layers)
    for name, blobs in layers.items():
        for ours, theirs in zip(found[name], blobs):
            np.testing.assert_array_equal(ours.reshape(theirs.shape), theirs)
            assert ours.ndim == (4 if legacy else theirs.ndim)


@pytest.mark.slow
def test_caffes_sknet50(convert, tmp_path):
    """From a binary caffemodel to the authors' logits."""
    (tmp_path / "a.caffemodel").write_bytes(caffemodel(families.caffe_layers("sknet50")))
    words = ("--from", tmp_path / "a.caffemodel", "--to", tmp_path / "a.ckpt", "--verify")
    printed = convert("--model", "sknet50", *words)
    assert "sknet50, Caffe with the names of the authors of SKNet" in printed and "verified" in printed
    x = families.network_input("sknet50_224")
    ours = logits(tmp_path / "a.ckpt", "sknet50", x)
    assert golden.rms(ours, golden.golden("sknet50_224")[1]["logits_f64"]) < NOISE
    assert open_weights(tmp_path / "a.ckpt").source.record["preprocessing"]["std"][0] == pytest.approx(1 / 255)
    assert "sknet50's" in convert("--model", "sknet101", *words[:2], "--to", tmp_path / "b.ckpt", error="does not fit")


@pytest.mark.parametrize("middle", ["a.ckpt", "a.safetensors", pytest.param("a.bin", marks=pytest.mark.slow)])
def test_a_round_trip_is_bit_exact(convert, reference, tmp_path, middle):
    state = reference.state_dict()
    torch.save(state, tmp_path / "first.pth")
    convert("--model", MODEL, "--from", tmp_path / "first.pth", "--to", tmp_path / middle)
    convert("--from", tmp_path / middle, "--to", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth")
    assert set(back) == {key for key in state if not key.endswith("num_batches_tracked")}
    assert all(torch.equal(back[key], state[key]) for key in back)
    torch_skanet.create(MODEL).load_state_dict(back)  # PyTorch starts its counters itself


@pytest.mark.slow
def test_the_head_is_dropped_only_when_asked(convert, reference, tmp_path):
    torch.save(reference.state_dict(), tmp_path / "a.pth")
    printed = convert("--from", tmp_path / "a.pth", "--to", tmp_path / "a.ckpt", "--num_classes", 7)
    assert "the classifier for 1000 classes is dropped; the one for 7 starts from random values" in printed
    weights = open_weights(tmp_path / "a.ckpt")
    assert weights.num_classes == 7 and weights.source.record["classifier"] == "initial values"
    np.testing.assert_array_equal(
        weights.parameters["stages.0.patch_embed.proj.weight"], reference.state_dict()["patch_embed1.proj.weight"]
    )
    (tmp_path / "names.txt").write_text("a\nb\n")
    names = ("--class_names", tmp_path / "names.txt")
    words = ("--from", tmp_path / "a.ckpt", "--to", tmp_path / "b.ckpt", *names)
    convert(*words, error="has 2 names, but the weights have 7")
    convert(*words, "--num_classes", 2)
    assert open_weights(tmp_path / "b.ckpt").source.record["class_names"] == ["a", "b"]
    assert open_weights(tmp_path / "b.ckpt").source.record["source"]["source"]["file"] == "a.pth"


@pytest.mark.slow
def test_the_weights_of_another_model_are_named(convert, tmp_path):
    state = {key: torch.zeros(shape) for key, shape in golden.authors_keys("lska_van_tiny_k23").items()}
    torch.save(state, tmp_path / "k23.pth")
    words = ("--from", tmp_path / "k23.pth", "--to", tmp_path / "a.ckpt")
    convert("--model", "van_tiny_lska_k7", *words, error="not van_tiny_lska_k7's, but van_tiny_lska_k23's")
    assert "missing" in convert("--model", "skanet_s", *words, error="These weights are not skanet_s's.")
    assert not (tmp_path / "a.ckpt").exists()


def test_a_file_that_fits_two_models_asks_for_the_name(convert, tmp_path):
    state = {key: torch.zeros(shape) for key, shape in golden.authors_keys("skresnext50_32x4d").items()}
    torch.save(state, tmp_path / "a.pth")
    words = ("--from", tmp_path / "a.pth", "--to", tmp_path / "a.ckpt")
    convert(*words, error="it fits sk_resnext50_32x4d and sknet50); name it with --model")


def test_the_reference_takes_three_channels(convert, tmp_path):
    net = mindcv.create_model(MODEL, in_channels=1)
    ms.save_checkpoint(net, str(tmp_path / "a.ckpt"))
    words = ("--model", MODEL, "--from", tmp_path / "a.ckpt", "--to", tmp_path / "b.ckpt")
    convert(*words, "--verify", error="the reference takes images of 3 channels, these weights 1")


def test_missing_and_unknown_keys_are_listed(convert, reference, tmp_path):
    state = dict(reference.state_dict())
    del state["norm4.weight"]
    state["surplus"] = torch.zeros(3)
    torch.save(state, tmp_path / "a.pth")
    words = ("--from", tmp_path / "a.pth", "--to", tmp_path / "a.ckpt")
    said = convert("--model", MODEL, *words, error="does not fit skanet_nano")
    assert "missing (1):\n  norm4.weight" in said and "unknown (1):\n  surplus" in said
    convert(*words, error="no model of mindska has just these weights")


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("a.pth", b"not weights", "is no file of weights"),
        ("a.pth", b"PK\x03\x04 and then nothing", "was not opened"),
        ("a.caffemodel", b"\x89HDF\r\n\x1a\n", "HDF5"),
        ("a.caffemodel", message((1, b"net"), (2, message((4, b"conv1")))), "caffemodel of version 1 (1 layers"),
        ("a.caffemodel", caffemodel({"fc": [np.ones((3, 4))]})[:-9], "is damaged or no caffemodel"),
        ("a.caffemodel", message((1, b"net"), (100, message((1, b"data")))), "no layer with blobs"),
        (
            "a.caffemodel",
            message((1, b"n"), (100, message((1, b"fc"), (7, message((7, message((1, b"\x05"))), (5, b"1234")))))),
            "a blob of layer fc has the shape (5,) but 4 bytes of values",
        ),
        ("a.safetensors", struct.pack("<Q", 1 << 60) + b'{"a": {"dtype": "F32"', "not a readable safetensors file"),
        ("a.ckpt", b"\x0a\x20\x0a\x03abc" + bytes(30), "not a readable MindSpore checkpoint"),
        ("a.onnx", b"\x08\x07\x12\x04", "an exported model is for predicting"),
    ],
)  # fmt: skip
def test_wrong_files_are_refused(convert, tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    said = convert("--model", "sknet50", "--from", tmp_path / name, "--to", tmp_path / "out.ckpt", error=reason)
    assert str(tmp_path / name) in said and not (tmp_path / "out.ckpt").exists()


def test_nothing_is_overwritten(convert, reference, tmp_path):
    torch.save(reference.state_dict(), tmp_path / "a.pth")
    (tmp_path / "a.ckpt").write_text("precious")
    words = ("--model", MODEL, "--from", tmp_path / "a.pth", "--to")
    convert(*words, tmp_path / "a.ckpt", error="exists; choose another name")
    assert (tmp_path / "a.ckpt").read_text() == "precious"
    convert(*words, tmp_path / "a.txt", error="expected a name that ends in .ckpt, .safetensors or .pth")
    convert(*words, tmp_path / "none" / "a.ckpt", error="folder")
    convert("--from", tmp_path / "none.pth", "--to", tmp_path / "b.ckpt", error="No checkpoint at")
    convert(*words, tmp_path / "a.ckpt", "--overwrite")
    assert logits(tmp_path / "a.ckpt").shape == (2, 1000)


def test_without_pytorch_its_absence_is_said(convert, tmp_path, monkeypatch):
    save_file({"x": np.zeros(3)}, tmp_path / "a.safetensors")
    torch.save({}, tmp_path / "a.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    convert("--from", tmp_path / "a.pth", "--to", tmp_path / "b.ckpt", error="pip install torch")
    convert("--from", tmp_path / "a.safetensors", "--to", tmp_path / "b.ckpt", error="no model of mindska has just")


def test_weights_that_do_not_verify_are_not_written(convert, reference, tmp_path, monkeypatch):
    from mindska.reference import verify

    monkeypatch.setitem(verify.BOUNDS, "skanet", 0.0)
    torch.save(reference.state_dict(), tmp_path / "a.pth")
    words = ("--model", MODEL, "--from", tmp_path / "a.pth", "--to", tmp_path / "a.ckpt", "--verify")
    convert(*words, error="does not compute what the reference does")
    assert not (tmp_path / "a.ckpt").exists()


@pytest.mark.slow
def test_the_command_line(reference, tmp_path):
    torch.save(reference.state_dict(), tmp_path / "a.pth")
    words = [sys.executable, ROOT / "scripts" / "convert.py", "--from", "a.pth", "--to", "a.ckpt"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "wrote a.ckpt, and read it again: the same to the bit" and not done.stderr
    assert open_weights(tmp_path / "a.ckpt").source.record["preprocessing"] == {
        key: list(value) if isinstance(value, tuple) else value for key, value in own_preprocessing(MODEL).items()
    }
