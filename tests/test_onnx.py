"""ONNX files: any number of images and any size, right in several runtimes, in float16 and in 8 bits."""

import json

import mindcv
import numpy as np
import pytest
from commands import script
from mindspore import Tensor
from PIL import Image
from test_export import checkpoint
from test_folding import settled

from mindska import export as exporting
from mindska import verification
from mindska.acceleration import decelerate
from mindska.errors import ExportError, UserError
from mindska.folding import fold
from mindska.models.factory import own_preprocessing
from mindska.weights.files import write_checkpoint

pytestmark = pytest.mark.slow
FAMILIES = {  # model -> whether height and width stay free
    "skanet_nano": False,
    "van_tiny_lska_k7": True,
    "sknet26": True,
    "sk_resnet18": True,
}
OTHERS = [(96, 64), (65, 79), (64, 65)]  # sizes that the file was not made with


def images(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def outputs(net, x):
    found = net(Tensor(x))
    return [output.asnumpy() for output in (found if isinstance(found, (list, tuple)) else (found,))]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Model -> (network, ONNX file), folded or not by turns."""
    folder, nets = tmp_path_factory.mktemp("onnx"), {}
    for i, name in enumerate(FAMILIES):
        net = settled(name)
        if i % 2:
            fold(net)
        exporting.export(net, folder / f"{name}.onnx", (1, 3, 64, 64), {"model": name})
        nets[name] = decelerate(net), folder / f"{name}.onnx"
    return nets


def assert_right(net, path, x, found, bound=1e-4):
    """Outputs are the network's; of SkaNet's, given the neighbours that were taken."""
    expected = outputs(net, x)
    difference = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, expected))
    assert difference < bound or path.name.startswith("skanet") and difference < 0.05, (path.name, x.shape, difference)


@pytest.mark.parametrize("name", FAMILIES)
def test_any_number_of_images_and_any_size(made, name):
    net, path = made[name]
    run = exporting.open_model(path)
    for batch in (1, 3, 8):
        x = images(batch, 3, 64, 64)
        assert_right(net, path, x, run(x))
    for size in OTHERS:
        x = images(2, 3, *size)
        if FAMILIES[name]:
            assert_right(net, path, x, run(x))
        else:
            with pytest.raises(ExportError, match=r"shape \(batch, 3, 64, 64\); these have \(2, 3,"):
                run(x)
    with pytest.raises(ExportError, match="takes images of the shape"):
        run(images(1, 1, 64, 64))


def test_what_other_runtimes_ask_for(made):
    """Opset 17, names that are used once, explicit pads, no sequences, no shapes that hold the batch."""
    import onnx

    for name, (_, path) in made.items():
        model = onnx.load(str(path))
        onnx.checker.check_model(model, full_check=True)
        nodes = model.graph.node
        assert model.opset_import[0].version >= 17 and len(model.opset_import) == 1
        assert len({node.name for node in nodes}) == len(nodes)
        assert not [node.op_type for node in nodes if "Sequence" in node.op_type or node.op_type == "Softsign"]
        assert not [a for node in nodes for a in node.attribute if a.name in ("auto_pad", "ceil_mode")]
        dims = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
        assert dims == (["batch", 3, "height", "width"] if FAMILIES[name] else ["batch", 3, 64, 64])
        assert [d.dim_param or d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim] == ["batch", 10]
        assert sum(tensor.ByteSize() for tensor in model.graph.initializer) < path.stat().st_size


@pytest.mark.parametrize("name", FAMILIES)
def test_openvino(made, name):
    openvino = pytest.importorskip("openvino")
    net, path = made[name]
    model = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch, size in ((1, (64, 64)), (3, (64, 64)), *((2, s) for s in OTHERS if FAMILIES[name])):
        x = images(batch, 3, *size)
        assert_right(net, path, x, [model(x)[0]], 1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_opencv(made, name):
    cv2 = pytest.importorskip("cv2")
    net, path = made[name]
    for batch, size in ((1, (64, 64)), (3, (64, 64)), *((2, s) for s in OTHERS if FAMILIES[name])):
        model, x = cv2.dnn.readNetFromONNX(str(path)), images(batch, 3, *size)
        model.setInput(x)
        assert_right(net, path, x, [model.forward()], 1e-3)


def test_opencvs_classic_engine_wants_a_fixed_size(tmp_path):
    cv2 = pytest.importorskip("cv2")
    net, path, x = settled("sk_resnet18"), tmp_path / "a.onnx", images(2, 3, 64, 64)
    exporting.export(net, path, (1, 3, 64, 64), {"model": "sk_resnet18"}, dynamic_size=False)
    model = cv2.dnn.readNetFromONNX(
        str(path), *([cv2.dnn.ENGINE_CLASSIC] if hasattr(cv2.dnn, "ENGINE_CLASSIC") else [])
    )
    model.setInput(x)
    assert_right(decelerate(net), path, x, [model.forward()], 1e-3)


def test_dimensions_can_be_fixed(tmp_path):
    net = settled("sk_resnet18")
    exporting.export(net, tmp_path / "a.onnx", (2, 3, 64, 96), {"model": "sk_resnet18"}, dynamic_batch=False)
    run = exporting.open_model(tmp_path / "a.onnx")
    assert run(images(2, 3, 70, 64))[0].shape == (2, 10)
    with pytest.raises(ExportError, match=r"shape \(2, 3, height, width\); these have \(1, 3, 64, 96\)"):
        run(images(1, 3, 64, 96))
    exporting.export(net, tmp_path / "a.onnx", (2, 3, 64, 96), {"model": "sk_resnet18"}, dynamic_size=False)
    run = exporting.open_model(tmp_path / "a.onnx")
    assert run(images(5, 3, 64, 96))[0].shape == (5, 10)
    with pytest.raises(ExportError, match=r"shape \(batch, 3, 64, 96\)"):
        run(images(2, 3, 96, 64))


@pytest.mark.parametrize(
    "name, keywords",
    [
        ("van_tiny_lska_k7", dict(features_only=True, out_indices=[-1, 1])),
        ("skanet_nano", dict(features_only=True)),
        ("sk_resnet18", dict(features_only=True, out_indices=2)),
        ("van_tiny_lska_k7", dict(num_classes=0, global_pool="max")),
        ("sk_resnet18", dict(num_classes=0, global_pool="")),
        ("sk_resnet18", dict(num_classes=0, stem="mindcv")),
        ("skanet_nano", dict(num_classes=0, in_chans=1)),
    ],
)
def test_features_and_pooling(tmp_path, name, keywords):
    net = mindcv.create_model(name, **keywords).set_train(False)
    channels = keywords.get("in_chans", 3)
    exporting.export(net, tmp_path / "a.onnx", (1, channels, 64, 64), {"model": name})
    x = images(3, channels, 64, 64)
    found, expected = exporting.open_model(tmp_path / "a.onnx")(x), outputs(net, x)
    assert [f.shape for f in found] == [e.shape for e in expected]
    for f, e in zip(found, expected):
        np.testing.assert_allclose(f, e, atol=1e-4 * np.abs(e).max())
    record = json.loads((tmp_path / "a.onnx.json").read_text())
    first = "feature0" if "features_only" in keywords else "features"
    assert record["outputs"][0] == first
    assert (record["input_shape"][2] is None) == (name != "skanet_nano" and "stem" not in keywords)


def test_other_networks_are_refused(tmp_path):
    with pytest.raises(ExportError, match="ResNet is not one of mindska's networks"):
        exporting.export(mindcv.create_model("resnet18"), tmp_path / "a.onnx", (1, 3, 64, 64), {"model": "resnet18"})
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("wrong-onnx")
def test_a_wrong_file_is_not_written(tmp_path, monkeypatch):
    """The comparison sees what is wrong for other numbers of images and other sizes alone."""
    from mindska import onnx_graph

    net = settled("sknet26")
    writer = onnx_graph.WRITERS[onnx_graph.StemPool]

    def ceil(graph, cell, x):
        name = writer(graph, cell, x)
        for attribute in graph.nodes[-1].attribute:
            if attribute.name == "pads":
                attribute.ints[:] = [0, 1, 1, 0]
        return name

    monkeypatch.setitem(onnx_graph.WRITERS, onnx_graph.StemPool, ceil)
    with pytest.raises(ExportError, match="outputs differ from the network's"):
        exporting.export(net, tmp_path / "a.onnx", (1, 3, 64, 64), {"model": "sknet26"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["skanet_nano", "van_tiny_lska_k7", "sknet26"])
def test_half(tmp_path, name):
    import onnx

    net, path = fold(settled(name)), tmp_path / "a.onnx"
    agreement = exporting.export(net, path, (1, 3, 64, 64), {"model": name}, half=True)
    assert agreement.difference < verification.HALF_TOLERANCE and "bound 3e-02" in str(agreement)
    graph = onnx.load(str(path)).graph
    kinds = {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in graph.initializer}
    assert all(kind in ("FLOAT16", "INT64") or "relative_position" in n or ":float32" in n for n, kind in kinds.items())
    assert json.loads((tmp_path / "a.onnx.json").read_text())["half"] is True
    logits = exporting.open_model(path)(images(2, 3, 64, 64))[0]
    assert logits.dtype == np.float32 and logits.shape == (2, 10)


@pytest.mark.fault("half")
def test_half_of_what_it_cannot_hold(tmp_path):
    net = settled("skanet_nano")
    net.classifier.weight.set_data(net.classifier.weight * 0 + 1e5)
    with pytest.raises(ExportError, match="classifier.weight has values above 65,504"):
        exporting.export(net, tmp_path / "a.onnx", (1, 3, 64, 64), {"model": "skanet_nano"}, half=True)
    with pytest.raises(ExportError, match="Half precision is written to ONNX only"):
        exporting.export(net, tmp_path / "a.mindir", (1, 3, 64, 64), {"model": "skanet_nano"}, half=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three classes of photos for `--calibration`, and a validation set."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(10):
            (folder / split / f"kind {label}").mkdir(parents=True)
            for i in range(2):
                image = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize((80, 70))
                image.save(folder / split / f"kind {label}" / f"{i}.png")
    return folder


@pytest.mark.parametrize("name", ["skanet_nano", "sk_resnet18"])
def test_int8(tmp_path, photos, capsys, name):
    import onnx

    path = checkpoint(tmp_path / "a.ckpt", name)
    words = ["--ckpt_path", path, "--format", "onnx", "--input_size", 64, "--to", tmp_path / "a.onnx", "--int8"]
    words += ["--calibration", photos / "train", "--calibration_images", 12, "--data_dir", photos]
    script("export").main([str(word) for word in words])
    printed = capsys.readouterr().out
    assert "calibrated with 12 images" in printed and "float32: top-1" in printed and "int8:    top-1" in printed
    assert "over 20 images" in printed
    model = onnx.load(str(tmp_path / "a.onnx"))
    weights = {t.name: t for t in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    makers = {output: node for node in model.graph.node for output in node.output}
    for node in convolutions:
        maker = makers[node.input[1]]
        assert maker.op_type == "DequantizeLinear" and weights[maker.input[0]].data_type == onnx.TensorProto.INT8
        assert len(weights[maker.input[1]].dims) == 1  # a scale for each channel
    assert not [n for n in model.graph.node if n.op_type == "QuantizeLinear" and "search" in n.input[0]]
    record = exporting.read_model_record(tmp_path / "a.onnx")
    assert record["int8"] is True and record["folded"] is True and record["input_shape"][0] is None
    run = exporting.open_model(tmp_path / "a.onnx")
    exact = tmp_path / "exact.onnx"
    script("export").main(["--ckpt_path", str(path), "--format", "onnx", "--input_size", "64", "--to", str(exact)])
    x = images(4, 3, 64, 64)
    a, b = run(x)[0], exporting.open_model(exact)(x)[0]
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.9


@pytest.mark.parametrize(
    "words, message",
    [
        (("--format", "mindir", "--half"), "--half is for --format onnx"),
        (("--format", "mindir", "--int8", "--calibration", "."), "--int8 is for --format onnx"),
        (("--format", "onnx", "--int8"), "--int8 wants --calibration FOLDER"),
        (("--format", "onnx", "--int8", "--calibration", ".", "--half"), "and no --half"),
        (("--format", "onnx", "--calibration", "."), "--calibration and --data_dir are for --int8"),
        (("--format", "onnx", "--int8", "--calibration", "EMPTY"), "No image below"),
        (("--format", "onnx", "--int8", "--calibration", "PHOTOS", "--data_dir", "EMPTY"), "No split 'val'"),
        (("--format", "onnx", "--int8", "--calibration", "PHOTOS", "--calibration_images", "0"), "expected a number"),
    ],
)
def test_wrong_words(tmp_path, photos, capsys, words, message):
    path = checkpoint(tmp_path / "a.ckpt", "skanet_nano")
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": str(tmp_path / "empty"), "PHOTOS": str(photos / "train")}
    words = [places.get(word, word) for word in words]
    with pytest.raises(SystemExit) as ended:
        script("export").main(["--ckpt_path", str(path), "--to", str(tmp_path / f"b.{words[1]}"), *words])
    assert message in str(ended.value) + capsys.readouterr().err
    assert not list(tmp_path.glob("b.*"))


@pytest.mark.fault("int8")
def test_a_validation_set_of_other_classes(tmp_path, photos):
    from mindska.quantization import validation_images

    with pytest.raises(UserError, match=r"has 10 classes \(kind 0, .*\), the network 3 \(a, b, c\)"):
        validation_images(photos, dict(num_classes=3, class_names=["a", "b", "c"]))


def test_a_file_is_validated_as_its_checkpoint_is(tmp_path, photos, capsys):
    """By the command: the same images, prepared in the same way, in batches that do not divide them."""
    from mindska.commands import main

    net, names = settled("skanet_nano"), [f"kind {i}" for i in range(10)]
    record = dict(
        model="skanet_nano", num_classes=10, class_names=names, preprocessing=own_preprocessing("skanet_nano")
    )
    write_checkpoint(tmp_path / "a.ckpt", {p.name: p for p in net.get_parameters()}, record)
    script("export").main(
        ["--ckpt_path", str(tmp_path / "a.ckpt"), "--format", "onnx", "--to", str(tmp_path / "a.onnx")]
    )
    found = []
    for name in ("a.ckpt", "a.onnx"):
        words = ["--data_dir", photos, "--ckpt_path", tmp_path / name, "--result_json", tmp_path / f"{name}.json"]
        main(["validate", *map(str, words), "--batch_size", "7", "--mode", "pynative"])
        found.append(json.loads((tmp_path / f"{name}.json").read_text()))
    assert found[0]["images"] == found[1]["images"] == 20 and found[0]["top1"] == found[1]["top1"]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-3)
    assert [row["accuracy"] for row in found[0]["classes"]] == [row["accuracy"] for row in found[1]["classes"]]


def test_predictions_take_any_batch(tmp_path, photos):
    """A file with free dimensions predicts in the batches that are asked for, at the size that was recorded."""
    from mindska.prediction import find_images, open_predictor

    path = checkpoint(tmp_path / "a.ckpt", "sk_resnet18")
    script("export").main(["--ckpt_path", str(path), "--format", "onnx", "--input_size", "64", "96"])
    paths = find_images([photos / "val"])
    for batch_size in (1, 7):
        predictor = open_predictor(tmp_path / "sk_resnet18.onnx", batch_size=batch_size)
        assert predictor.batch_size == batch_size and predictor.preprocessing.image_size == (64, 96)
        found = [p.classes[0] for p in predictor(paths)]
        assert len(found) == len(paths)
    assert open_predictor(tmp_path / "sk_resnet18.onnx", image_size=(80, 80)).preprocessing.image_size == (80, 80)
