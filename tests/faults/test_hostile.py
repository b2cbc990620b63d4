"""Faults 12, 13: files that lie or attack, and runs that do not fit their folder. All are refused before training."""

import argparse
import json
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict

import mindcv
import mindspore as ms
import numpy as np
import pytest
import torch
from commands import SETTINGS, losses, mpirun, rows, run, script, train
from mindspore.train import mind_ir_pb2
from safetensors.numpy import save_file
from test_convert import caffemodel, message

from mindska import export
from mindska.benchmark.worker import peak_memory
from mindska.config import read_yaml
from mindska.errors import ConfigError, WeightsError
from mindska.models.factory import own_preprocessing
from mindska.weights import open_weights
from mindska.weights.convert import key_map, parameter_shapes
from mindska.weights.files import METADATA, write_checkpoint, write_safetensors
from mindska.weights.record import read_record
from mindska.weights.source import open_source

MODEL = "skanet_nano"


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pickled(path, harm):
    path.write_bytes(pickle.dumps({"state_dict": Harmful(harm)}))


def saved_by_torch(path, harm):
    torch.save({"state_dict": Harmful(harm)}, path)


def zip_bomb(path, harm):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        with archive.open("archive/data/0", "w", force_zip64=True) as entry:
            for _ in range(1024):
                entry.write(bytes(1 << 20))


def lying_header(path, harm):
    """A safetensors header that claims exabytes."""
    path.write_bytes(struct.pack("<Q", 1 << 60) + b'{"a": {"dtype": "F32", "shape": [1099511627776], ')


def lying_shape(path, harm):
    """A MindSpore checkpoint whose parameter claims more values than it has."""
    from mindspore.train.checkpoint_pb2 import Checkpoint

    checkpoint = Checkpoint()
    value = checkpoint.value.add()
    value.tag = "classifier.weight"
    value.tensor.dims.extend([1 << 40])
    value.tensor.tensor_type = "Float32"
    value.tensor.tensor_content = b"1234"
    path.write_bytes(checkpoint.SerializeToString())


def expanded(path, harm):
    """A classifier of sixteen million classes, whose weights are one number with steps of 0."""
    keys, number = key_map(MODEL), torch.zeros(1)
    state = {keys[name]: torch.zeros(shape) for name, shape in parameter_shapes(MODEL).items()}
    state["classifier.fc.weight"] = number.as_strided((1 << 24, 96), (0, 0))
    state["classifier.fc.bias"] = number.expand(1 << 24)
    torch.save(state, path)


class Sized:
    """A size, of which a pickle makes as many bytes."""

    def __reduce__(self):
        return bytearray, (1 << 31,)


def sized_by_a_pickle(path, harm):
    torch.save({"state_dict": Sized()}, path)


def sized_in_the_old_format(path, harm):
    torch.save({"state_dict": Sized()}, path, _use_new_zipfile_serialization=False)


def millions_of_lists(path, harm):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"]" * 20_000_000 + b".")
        archive.writestr("archive/version", b"3\n")


def millions_of_blobs(path, harm):
    path.write_bytes(message((1, b"net"), (100, message((1, b"fc")) + message((7, b"")) * 3_000_000)))


def millions_of_values(path, harm):
    path.write_bytes(message((1, message((1, b"a")))) + message((1, b"")) * 3_000_000)


def a_long_header(path, harm):
    header = json.dumps(
        {f"w{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(250_000)}
    ).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def a_file_of_holes(path, harm):
    with path.open("wb") as file:
        file.write(message((1, message((1, b"a")))))
        file.truncate(1 << 40)


def a_deep_record(path, harm):
    save_file({"classifier.weight": np.zeros((7, 96), np.float32)}, path, {METADATA: '{"a":' * 100_000})


def text(path, harm):
    path.write_text("not a checkpoint")


def other_model(path, harm):
    ms.save_checkpoint(mindcv.create_model("skresnet18", num_classes=3), str(path))


def partial(path, harm):
    ms.save_checkpoint(list(mindcv.create_model(MODEL).get_parameters())[:20], str(path))


@pytest.mark.fault("hostile-weights")
@pytest.mark.parametrize(
    "make, suffix, message",
    [
        (pickled, ".pth", "was not opened"),
        (saved_by_torch, ".pth.tar", "was not opened"),
        (zip_bomb, ".pth", "was not opened: it would unpack to 1,07"),
        (zip_bomb, ".ckpt", "was not opened: it would unpack to 1,07"),
        (lying_header, ".safetensors", "not a readable safetensors file"),
        (lying_shape, ".ckpt", "not a readable MindSpore checkpoint"),
        (expanded, ".pth", "classifier.fc.weight: of 1,610,612,736 values, but the file has 4 bytes of them"),
        (sized_by_a_pickle, ".pth", "holds more than plain weights (__builtin__.bytearray)"),
        (sized_in_the_old_format, ".pth", "holds more than plain weights (__builtin__.bytearray)"),
        pytest.param(millions_of_lists, ".pth", "its pickle has more than", marks=pytest.mark.slow),
        (millions_of_blobs, ".caffemodel", "it has more than 100,000 fields"),
        pytest.param(millions_of_values, ".ckpt", "it has more than 1,000,000 fields", marks=pytest.mark.slow),
        (a_long_header, ".safetensors", "its header claims 1"),
        (a_file_of_holes, ".ckpt", "has 1,099,511,627,776 bytes; expected at most"),
        (a_deep_record, ".safetensors", "its record is nested too deeply"),
        (text, ".ckpt", "is no file of weights"),
        (text, ".pth", "is no file of weights"),
        (other_model, ".ckpt", "does not fit skanet_nano"),
        (partial, ".ckpt", "keys that are missing"),
    ],
)
def test_a_hostile_file_is_refused(tmp_path, make, suffix, message):
    path, harm = tmp_path / f"file{suffix}", tmp_path / "harm"
    make(path, harm)
    before = peak_memory(reset=True)
    with pytest.raises(WeightsError) as error:
        mindcv.create_model(MODEL, checkpoint_path=str(path))
    assert message in str(error.value) and str(path) in str(error.value)
    assert not harm.exists(), "code from the file was run"
    # What was read may be twice the file, and never what a header claims.
    assert peak_memory() - before < 200e6


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small file of every kind."""
    folder = tmp_path_factory.mktemp("files")
    arrays = {p.name: p.asnumpy() for p in mindcv.create_model(MODEL, num_classes=3).get_parameters()}
    write_checkpoint(folder / "a.ckpt", arrays, RECORD)
    write_safetensors(folder / "a.safetensors", arrays, RECORD)
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    torch.save({"state_dict": state, "epoch": 1}, folder / "a.pth")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    (folder / "a.caffemodel").write_bytes(caffemodel({"fc": [np.ones((3, 4)), np.zeros(3)]}))
    return sorted(folder.iterdir())


RECORD = dict(model=MODEL, num_classes=3, class_names=["a", "b", "c"], preprocessing=own_preprocessing(MODEL), epoch=1)


@pytest.mark.fault("hostile-weights")
def test_damaged_bytes_end_in_messages(files, tmp_path):
    """Files of every kind with bytes changed, left out and put in: what is read or refused, never a traceback."""
    choose = random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    for i in range(120):
        source = files[i % len(files)]
        content = bytearray(source.read_bytes())
        for _ in range(choose.choice((1, 2, 8))):
            at = choose.randrange(min(len(content) - 60, 3000)) * choose.choice((1, -1))
            change = choose.randrange(4)
            if change == 0:
                content[at] ^= 1 << choose.randrange(8)
            elif change == 1:
                del content[at : at + choose.randrange(1, 40)]
            elif change == 2:
                content[at:at] = choose.randbytes(choose.randrange(1, 20))
            else:
                content[at : at + 8] = struct.pack("<Q", choose.choice((0, 1 << 31, 1 << 63, (1 << 64) - 1)))
        if source.suffix == ".ckpt":  # its checksum would tell
            content = content[:-17]
        path = tmp_path / source.name
        path.write_bytes(content)
        try:
            open_source(path)
            outcomes["read"] += 1
        except WeightsError as error:
            assert str(path) in str(error) and len(str(error)) < 5000
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 5


@pytest.mark.fault("records")
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model=5), "model is 5; expected a text"),
        (dict(model="x" * 5000), "model is 'xxx"),
        (dict(num_classes=-1), "num_classes is -1; expected a whole number from 1 to 1,000,000"),
        (dict(num_classes=10**12), "num_classes is 1000000000000; expected"),
        (dict(num_classes=True), "num_classes is True; expected"),
        (dict(class_names="abc"), "class_names is 'abc'; expected a list"),
        (dict(class_names=["a", 5, "c"]), "class_names[1] is 5; expected a text"),
        (dict(class_names=["a", "b" * 2000, "c"]), "class_names[1] is 'bbb"),
        (dict(class_names=list("abcd")), "4 class_names for num_classes 3"),
        (dict(preprocessing=[1]), "preprocessing is [1]; expected a mapping"),
        (dict(preprocessing={"image_size": [64, 64]}), "expected the key 'crop_pct' in it"),
        (dict(pixels={"image_size": [10**9, 64]}), "preprocessing.image_size[0] is 1000000000; expected"),
        (dict(pixels={"image_size": [64.5, 64]}), "preprocessing.image_size[0] is 64.5; expected a whole number"),
        (dict(pixels={"crop_pct": float("nan")}), "preprocessing.crop_pct is nan; expected a number above 0 to 1"),
        (dict(pixels={"interpolation": ["bicubic"]}), "preprocessing.interpolation is ['bicubic']; expected one of"),
        (dict(pixels={"std": [1, 0, 1]}), "preprocessing.std[1] is 0; expected a number above 0"),
        (dict(pixels={"mean": [0.5] * 4}), "4 means and 3 standard deviations"),
        (dict(pixels={"code": "os.system"}), "preprocessing.code is 'os.system'; expected the keys"),
        (dict(network={"norm_eps": [1]}), "network.norm_eps is [1]; expected a number"),
        (dict(network={"norm_eps": "1e-5"}), "its record says norm_eps='1e-5'; expected something like 1e-06"),
        (dict(network={"harm": 1}), "options that skanet_nano does not have: harm"),
        (dict(source={"averaged": "yes"}), "source.averaged is 'yes'; expected true or false"),
        (dict(epoch="\x1b[31m7"), r"epoch is '\x1b[31m7'; expected a number"),
        (dict(mean_of=5), "mean_of is 5; expected a list"),
        (dict(input_shape=[1, 3, 64]), "input_shape is [1, 3, 64]; expected a list of 4 entries"),
        (dict(input_shape=[1, 3, 64, 10**7]), "input_shape[3], the width is 10000000; expected"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)  # fmt: skip
def test_what_a_record_claims_is_checked(tmp_path, changes, message):
    path = tmp_path / "a.safetensors"
    record = {**RECORD, **changes}
    record["preprocessing"] = (
        {**RECORD["preprocessing"], **record.pop("pixels")} if "pixels" in record else record["preprocessing"]
    )
    arrays = {p.name: p.asnumpy() for p in mindcv.create_model(MODEL, num_classes=3).get_parameters()}
    save_file(arrays, path, {METADATA: json.dumps(record)})
    with pytest.raises(WeightsError) as error:
        open_weights(path)
    assert message in str(error.value) and str(path) in str(error.value)


@pytest.mark.fault("records")
@pytest.mark.parametrize(
    "text", ["", "nothing", "[]", "null", '"a"', "9" * 5000, '{"a":' * 100_000, '{"num_classes": NaN}']
)
def test_a_record_that_is_none(text):
    with pytest.raises(WeightsError, match="its record|the record"):
        read_record(text)


def plain_mindir():
    """A graph that gives what it gets, as MindSpore writes it; what it is changed to is what a test is about."""
    model = mind_ir_pb2.ModelProto(ir_version="0.1.0", producer_name="MindSpore", little_endian=True)
    image = model.graph.input.add(name="x").tensor.add(data_type=1)
    image.dims.extend([1, 3, 8, 8])
    model.primitives.add(name="ReLU:1", op_type="ReLU", prim_type=2)
    model.graph.node.add(name="y", op_type="REF::ReLU:1", input=["x"], output=["y"])
    model.graph.output.add(name="y").tensor.add(data_type=1).dims.extend([1, 3, 8, 8])
    weight = model.graph.parameter.add(name="w", data_type=1, raw_data=bytes(8))
    weight.dims.extend([2])
    return model


def custom_operator(model):
    custom = model.primitives.add(name="Custom:2", op_type="Custom", prim_type=1)
    custom.attribute.add(name="func_name", type=8, s=b"./evil.so:run")


def custom_operator_by_another_name(model):
    model.primitives[0].name = "Custom:1"


def operator_without_a_primitive(model):
    model.graph.node[0].op_type = "Custom"


def attribute_that_names_a_file(model):
    model.primitives[0].attribute.add(name="func_name", type=8, s=b"./evil.so:run")


def values_in_another_file(model):
    model.graph.parameter[0].external_data.location = "/etc/passwd"


def gradient_in_another_file(model):
    model.graph.bprop_filepath = "evil.mindir"


def graph_in_an_attribute(model):
    model.graph.node[0].attribute.add(name="value", type=18).g.name = "inner"


def functions(model):
    model.functions.add(name="f")


def data_operations(model):
    model.preprocessor.op.add(
        op_type="map", input_columns="x", output_columns="y", project_columns="y", operations="{}"
    )


def fewer_values_than_claimed(model):
    model.graph.parameter[0].dims[0] = 1 << 20


def input_that_is_nowhere(model):
    model.graph.node[0].input[0] = "z"


@pytest.mark.fault("exported")
@pytest.mark.parametrize(
    "change, message",
    [
        (custom_operator, "operators that are not plain: Custom"),
        (custom_operator_by_another_name, "it calls the operator ReLU Custom:1"),
        (operator_without_a_primitive, "operators that are not plain: Custom"),
        (attribute_that_names_a_file, "attributes that are not plain: func_name"),
        (values_in_another_file, "values of w elsewhere: external_data"),
        (gradient_in_another_file, "more than a graph: bprop_filepath"),
        (graph_in_an_attribute, "attributes that are not plain: value of the type GRAPH"),
        (functions, "more than one graph: functions"),
        (data_operations, "more than one graph: preprocessor"),
        (fewer_values_than_claimed, "the tensor w has the shape (1048576,) but 8 bytes of values"),
        (input_that_is_nowhere, "inputs that are nowhere: z"),
        (None, "not MindSpore"),
    ],
)
def test_a_mindir_is_read_before_mindspore_sees_it(tmp_path, monkeypatch, change, message):
    def load(path):
        raise ValueError("not MindSpore")

    monkeypatch.setattr(ms, "load", load)
    model, path = plain_mindir(), tmp_path / "a.mindir"
    if change:
        change(model)
    path.write_bytes(model.SerializeToString())
    record = dict(RECORD, input_shape=[1, 3, 8, 8])
    (tmp_path / "a.mindir.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit) as error:
        script("predict").main([str(path), "--ckpt_path", str(path)])
    assert message in str(error.value) and str(path) in str(error.value)


def other_domain(onnx, model):
    model.graph.node[0].domain = "evil.ops"


def contrib_operators(onnx, model):
    model.opset_import.add(domain="com.microsoft", version=1)


def values_elsewhere(onnx, model):
    tensor = onnx.helper.make_tensor("w", 1, [2], bytes(8), raw=True)
    tensor.external_data.add(key="location", value="../../secret")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    model.graph.initializer.append(tensor)


def branches(onnx, model):
    model.graph.node[0].attribute.append(
        onnx.helper.make_attribute("then_branch", onnx.helper.make_graph([], "g", [], []))
    )


def local_functions(onnx, model):
    model.functions.add(name="f", domain="local")


def values_without_end(onnx, model):
    model.graph.node[0].op_type = "ConstantOfShape"


@pytest.mark.fault("exported")
@pytest.mark.parametrize(
    "change, message",
    [
        (other_domain, "operators of other domains: evil.ops"),
        (contrib_operators, "operators of other domains: com.microsoft"),
        (values_elsewhere, "values of w in another file"),
        (branches, "an attribute then_branch that is not plain"),
        (local_functions, "more than one graph: functions"),
        (values_without_end, "operators that are not plain: ConstantOfShape"),
        (None, "not onnxruntime"),
    ],
)
def test_an_onnx_file_is_read_before_a_runtime_sees_it(tmp_path, monkeypatch, change, message):
    onnx = pytest.importorskip("onnx")

    def runtime(model):
        raise export.ExportError("not onnxruntime")

    monkeypatch.setattr(export, "_runnable", runtime)
    values = [onnx.helper.make_tensor_value_info(name, 1, [1, 3, 8, 8]) for name in ("images", "logits")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["images"], ["logits"])], "g", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 11)])
    onnx.helper.set_model_props(model, {METADATA: json.dumps(dict(RECORD, input_shape=[1, 3, 8, 8]))})
    if change:
        change(onnx, model)
    path = tmp_path / "a.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(SystemExit) as error:
        script("predict").main([str(path), "--ckpt_path", str(path)])
    assert message in str(error.value) and str(path) in str(error.value) or change is None


@pytest.mark.fault("records")
def test_names_of_strangers_are_escaped_and_counted(tmp_path):
    """No key or file name reaches a terminal as it is, and a message lists ten of them."""
    path = tmp_path / "a\x1b[2J.pth"
    torch.save({f"\x1b[31mkey\n{i}": torch.zeros(2) for i in range(1100)}, path)
    for ema in (None, True):
        with pytest.raises(WeightsError) as error:
            open_weights(path, MODEL, ema)
        said = str(error.value)
        assert "\x1b" not in said and r"a\x1b[2J.pth" in said and "and 1090 more" in said
        assert said.count(r"\x1b[31mkey\n") == 10 and len(said) < 5000
    with pytest.raises(SystemExit) as ended:
        script("convert").main(["--model", MODEL, "--from", str(path), "--to", str(tmp_path / "a.ckpt")])
    assert "\x1b" not in str(ended.value)


@pytest.mark.fault("hostile-weights")
def test_yaml_that_makes_objects_is_refused(tmp_path):
    harm = tmp_path / "harm"
    (tmp_path / "a.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{harm}']\n")
    with pytest.raises(ConfigError, match="is not plain YAML"):
        read_yaml(tmp_path / "a.yaml")
    assert not harm.exists()


@pytest.mark.fault("hostile-weights")
@pytest.mark.parametrize(
    "text, message",
    [
        ("model: " + "[" * 20_000 + "]" * 20_000, "nested too deeply"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nmodel: [*b, *b]\n", "aliases"),
        ("model: \udcff", "is not plain YAML"),
    ],
    ids=["deep", "aliases", "bytes"],
)
def test_yaml_that_grows_is_refused(tmp_path, text, message):
    (tmp_path / "a.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=message):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.fault("hostile-weights")
def test_objects_that_pose_as_arrays(tmp_path):
    """The safe loader makes namespaces and dictionaries with any attributes."""
    posing = OrderedDict()
    posing.shape = (3,)
    for value in (
        argparse.Namespace(shape=5, dtype="float32"),
        argparse.Namespace(shape=(3,)),
        posing,
        [1.0],
        "text",
        None,
    ):
        torch.save({"classifier.fc.bias": value, "a": torch.zeros(2)}, tmp_path / "a.pth")
        with pytest.raises(WeightsError, match="does not fit skanet_nano"):
            open_weights(tmp_path / "a.pth", MODEL)
        script("inspect_checkpoint").main([str(tmp_path / "a.pth"), "--keys"])


@pytest.mark.slow
@pytest.mark.fault("hostile-weights")
def test_the_command_refuses_before_it_trains(images, tmp_path):
    saved_by_torch(tmp_path / "a.pth", tmp_path / "harm")
    printed = train(images, tmp_path / "run", expect=1, ckpt_path=tmp_path / "a.pth", model=MODEL, image_resize=64)
    assert "was not opened" in printed and "Traceback" not in printed
    assert not (tmp_path / "harm").exists() and not (tmp_path / "run").exists()


@pytest.mark.fault("hostile-weights")
def test_weights_of_another_head_are_refused(tmp_path):
    ms.save_checkpoint(mindcv.create_model(MODEL, num_classes=7), str(tmp_path / "a.ckpt"))
    weights = open_weights(tmp_path / "a.ckpt", MODEL)
    assert weights.parameters["classifier.weight"].shape == (7, 96)
    with pytest.raises(WeightsError, match=r"classifier.weight: \(7, 96\) in the file, \(1000, 96\) in the network"):
        mindcv.create_model(MODEL, checkpoint_path=str(tmp_path / "a.ckpt"))


@pytest.mark.fault("other-settings")
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_classes=5), "num_classes: 3 -> 5"),
        (dict(model="tiny"), "model: 'tiny_bn' -> 'tiny'"),
        (dict(batch_size=4), "batch_size: 8 -> 4"),
        (dict(gradient_accumulation_steps=2), "gradient_accumulation_steps: 1 -> 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_run_does_not_go_on_with_other_settings(whole_run, images, settings, message):
    out, _ = whole_run
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    printed = train(images, out, expect=1, **settings)
    assert message in printed and "choose another --ckpt_save_dir" in printed and "Traceback" not in printed
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()} | {".lock": before[".lock"]}


@pytest.mark.fault("other-settings")
@pytest.mark.slow
def test_another_number_of_ranks(images, tmp_path):
    """Accepted at the end of an epoch with the same global batch, and said; refused within an epoch."""
    settings = dict(model="tiny", epoch_size=2)
    train(images, tmp_path / "whole", **settings)
    out = tmp_path / "run"
    train(images, out, ckpt_save_steps=3, **settings)
    (out / "tiny-2_8.ckpt").unlink()
    (out / "tiny-1_6.ckpt").rename(tmp_path / "tiny-1_6.ckpt")
    printed = train(images, out, batch_size=4, launcher=mpirun(2), ckpt_save_steps=3, **settings)
    assert "Going on with 2 instead of 1 ranks" in printed and "Resuming after step 4" in printed
    assert [int(row["step"]) for row in rows(out)] == list(range(1, 9))
    for ours, theirs in zip(losses(out), losses(tmp_path / "whole")):
        assert ours == pytest.approx(theirs, abs=1e-5)
    for path in out.glob("tiny-*.ckpt"):
        path.unlink()
    (tmp_path / "tiny-1_6.ckpt").rename(out / "tiny-1_6.ckpt")
    others = dict(batch_size=4, launcher=mpirun(2), ckpt_save_steps=3)  # than those of the checkpoint
    printed = run("train.py", images, out, expect=1, **{**SETTINGS, **settings, **others})
    assert "world_size: 1 -> 2" in printed
