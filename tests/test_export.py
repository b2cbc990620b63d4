"""scripts/export.py and scripts/predict.py: out to MindIR and ONNX, checked; classes of images from either."""

import csv
import errno
import io
import json
from pathlib import Path

import mindcv
import mindspore as ms
import numpy as np
import pytest
from commands import script
from PIL import Image
from test_folding import settled

from mindska import export as exporting
from mindska import exported, verification
from mindska.acceleration import decelerate, is_accelerated
from mindska.data.imagenet import imagenet_classes, readable_names
from mindska.models.factory import own_preprocessing
from mindska.models.layers.graph import MaxRelativeConv
from mindska.prediction import Prediction, open_predictor
from mindska.weights.files import write_checkpoint

pytestmark = pytest.mark.slow
CLASSES = [f"kind {i}" for i in range(10)]


def checkpoint(path, name, **keywords):
    net = settled(name, **keywords)
    classes = {} if keywords else {"class_names": CLASSES}
    record = dict(model=name, num_classes=10, preprocessing=own_preprocessing(name), **classes)
    inner = getattr(net, "net", net)
    write_checkpoint(path, {p.name: p for p in inner.get_parameters()}, record)
    return path


def run(name, *words):
    script(name).main([str(word) for word in words])


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """A checkpoint, and what is exported from it for two images of 64x64; MindSpore's exports refuse such a path."""
    folder = tmp_path_factory.mktemp("nano") / "my models+ü'\"猫"
    folder.mkdir()
    path = checkpoint(folder / "nano.ckpt", "skanet_nano")
    for kind in exporting.FORMATS:
        run("export", "--ckpt_path", path, "--format", kind, "--batch", 2, "--fold")
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    (folder / "inner").mkdir()
    for i in range(5):
        image = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize((200, 150))
        image.save(folder / ("inner" if i > 2 else ".") / f"{i}.png")
    (folder / "broken.jpg").write_text("no image")
    return folder


def predict(capsys, *words, status=0):
    if status:
        with pytest.raises(SystemExit) as ended:
            run("predict", *words, "--format", "json")
        assert ended.value.code == status
    else:
        run("predict", *words, "--format", "json")
    return {entry.pop("path"): entry for entry in json.loads(capsys.readouterr().out)}


@pytest.mark.parametrize(
    "name, fold, kind",
    [
        ("skanet_nano", (), "onnx"),  # below folded, in both formats
        ("van_tiny", ("--fold",), "mindir"),
        ("van_tiny_lska_k11", (), "onnx"),
        ("sknet26", ("--fold",), "onnx"),
        ("sk_resnet18", (), "mindir"),
    ],
)
def test_every_family(tmp_path, capsys, name, fold, kind):
    path = checkpoint(tmp_path / "a.ckpt", name)
    run("export", "--ckpt_path", path, "--format", kind, "--input_size", 96, 128, "--to", tmp_path / f"a.{kind}", *fold)
    printed = capsys.readouterr().out
    assert "run from the file, its outputs differ" in printed
    assert ("relative position belongs to one height and width" in printed) == (name == "skanet_nano")
    record = json.loads((tmp_path / f"a.{kind}.json").read_text())
    free = [None, 3, None, None] if name != "skanet_nano" else [None, 3, 96, 128]
    assert record["input_shape"] == ([1, 3, 96, 128] if kind == "mindir" else free)
    assert record["model"] == name and record["folded"] == bool(fold)
    assert record["class_names"] == CLASSES and record["preprocessing"]["image_size"] == [96, 128]
    assert exporting.read_model_record(tmp_path / f"a.{kind}") == record


def test_a_backbone(tmp_path, photos):
    path = checkpoint(tmp_path / "a.ckpt", "van_tiny_lska_k7", features_only=True)
    run("export", "--ckpt_path", path, "--format", "onnx", "--input_size", 64, "--fold", "--to", tmp_path / "a.onnx")
    features = exporting.open_model(tmp_path / "a.onnx")(np.zeros((1, 3, 64, 64), np.float32))
    assert [f.shape[1:] for f in features] == [(32, 16, 16), (64, 8, 8), (160, 4, 4), (256, 2, 2)]
    with pytest.raises(SystemExit, match="predicts nothing"):
        run("predict", photos, "--ckpt_path", path)


def test_an_onnx_file_says_what_it_is(nano):
    import onnx

    model = onnx.load(str(nano.with_name("skanet_nano.onnx")))
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["images", "logits"]
    record = json.loads({p.key: p.value for p in model.metadata_props}["mindska"])
    assert record["model"] == "skanet_nano" and record["class_names"] == CLASSES
    operators = {node.op_type for node in model.graph.node}
    assert "Erf" in operators and not operators & {"Softsign", "BatchNormalization"}


def test_a_difference_fails_the_command(nano, tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "TOLERANCE", -1.0)
    with pytest.raises(SystemExit, match="differ from the network's by .* nothing was written"):
        run("export", "--ckpt_path", nano, "--format", "mindir", "--to", tmp_path / "a.mindir")
    assert not list(tmp_path.iterdir())


def test_neighbours_can_be_read_out_of_an_onnx_file(nano):
    """In the order of the network's searches, and they are its own."""
    images = np.random.default_rng(0).standard_normal((2, 3, 64, 64), dtype=np.float32)
    model = verification.with_neighbours(exported.read_exported(nano.with_name("skanet_nano.onnx")))
    logits, *chosen = exporting._runnable(model)(images)
    net = mindcv.create_model("skanet_nano", num_classes=10, checkpoint_path=str(nano)).set_train(False)
    decelerate(net)
    graphs = [cell for _, cell in net.cells_and_names() if isinstance(cell, MaxRelativeConv)]
    own = []
    for graph in graphs:
        graph.register_forward_hook(lambda cell, inputs, _: own.append(cell.neighbours(inputs[0]).asnumpy()))
    net(ms.Tensor(images))
    assert [array.shape for array in chosen] == [(2, n, 4) for n in (256, 64, 16, 16, 4)] and logits.shape == (2, 10)
    assert sum(int((a != b).sum()) for a, b in zip(chosen, own)) < 10  # but for swaps by rounding


def test_a_model_never_lies_beside_the_record_of_another(nano, tmp_path, monkeypatch):
    """A record that cannot be written leaves the model that was there."""
    path, write = tmp_path / "a.mindir", Path.write_text

    def full(self, *words, **keywords):
        if self.suffix == ".json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *words, **keywords)

    path.write_text("what was there")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SystemExit, match="No space left on device. What was there before is intact"):
        run("export", "--ckpt_path", nano, "--format", "mindir", "--to", path, "--overwrite")
    assert path.read_text() == "what was there" and list(tmp_path.iterdir()) == [path]


def test_nothing_is_overwritten(nano):
    before = nano.with_name("skanet_nano.onnx").read_bytes()
    with pytest.raises(SystemExit, match="exists; choose another name"):
        run("export", "--ckpt_path", nano, "--format", "onnx")
    assert nano.with_name("skanet_nano.onnx").read_bytes() == before


@pytest.mark.parametrize(
    "words, message",
    [
        (("--format", "onnx", "--input_size", "16"), "smallest square input is 33x33"),
        (("--format", "onnx", "--input_size", "1", "2", "3"), "expected height and width"),
        (("--format", "onnx", "--to", "a.mindir"), "ends in .onnx"),
        (("--format", "onnx", "--batch", "0"), "expected a number of images"),
        (("--format", "onnx", "--to", "none/a.onnx"), "The folder of none/a.onnx does not exist"),
        (("--format", "mindir", "--to", "folder.mindir"), "folder.mindir is a folder"),
    ],
)
def test_wrong_words(nano, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.mindir").mkdir()
    with pytest.raises(SystemExit) as ended:
        run("export", "--ckpt_path", nano, *words, *(() if "--to" in words else ("--to", tmp_path / "a.onnx")))
    assert message in str(ended.value) + capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["folder.mindir"]


def test_predictions_agree(nano, photos, capsys):
    """The checkpoint, the ONNX file and the MindIR file tell the same classes, in batches of 16, 2 and 2."""
    ours = predict(capsys, photos, "--ckpt_path", nano, "--topk", 3, status=1)
    assert len(ours) == 6 and "cannot be read" in ours[str(photos / "broken.jpg")]["error"]
    net = mindcv.create_model("skanet_nano", num_classes=10, checkpoint_path=str(nano)).set_train(False)
    for suffix in exporting.FORMATS:
        theirs = predict(capsys, photos, "--ckpt_path", nano.with_name(f"skanet_nano.{suffix}"), "--topk", 3, status=1)
        assert set(theirs) == set(ours)
        for path, found in ours.items():
            for one, other in zip(found.get("classes", ()), theirs[path].get("classes", ())):
                assert one["name"] == other["name"] == CLASSES[one["index"]]
                assert one["probability"] == pytest.approx(other["probability"], rel=1e-4)
    # Against Pillow and the network, written out.
    from mindspore import Tensor, ops

    from mindska.data import EvalTransform, Preprocessing

    transform = EvalTransform(Preprocessing(**own_preprocessing("skanet_nano")))
    image = transform(Image.open(photos / "0.png").convert("RGB"))
    row = ops.softmax(net(Tensor(image[None])))[0].asnumpy()
    best = ours[str(photos / "0.png")]["classes"]
    assert [c["index"] for c in best] == np.argsort(-row)[:3].tolist()
    np.testing.assert_allclose([c["probability"] for c in best], np.sort(row)[::-1][:3], rtol=1e-4)


def test_a_network_is_exported_without_its_operators(tmp_path):
    """A network as the README makes it, whose MindIR would name libraries of this machine. It stays accelerated."""
    net = mindcv.create_model("skanet_nano", num_classes=10).set_train(False)
    before = is_accelerated(net)
    for kind in exporting.FORMATS:
        path = tmp_path / f"a.{kind}"
        exporting.export(net, path, (1, 3, 64, 64), {"model": "skanet_nano"})
        assert exporting.open_model(path) and is_accelerated(net) == before


def test_mindspores_own_export_is_without_operators_as_well(tmp_path):
    net = mindcv.create_model("skanet_nano", num_classes=10).set_train(False)
    images = ms.Tensor(np.zeros((1, 3, 64, 64), np.float32))
    ms.export(net, images, file_name=str(tmp_path / "a"), file_format="MINDIR")
    assert b".so:" not in (tmp_path / "a.mindir").read_bytes()


def test_what_was_written_is_checked_for_operators(nano, tmp_path, monkeypatch):
    monkeypatch.setattr(exported, "MINDIR_OPERATORS", exported.MINDIR_OPERATORS - {"Conv2D"})
    monkeypatch.setattr(exported, "ONNX_OPERATORS", exported.ONNX_OPERATORS - {"Conv"})
    for kind in exporting.FORMATS:
        with pytest.raises(SystemExit, match="operators that are not plain: Conv"):
            run("export", "--ckpt_path", nano, "--format", kind, "--to", tmp_path / f"a.{kind}")
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("records")
def test_a_record_of_another_model(nano, photos, tmp_path):
    """Of another shape, damaged, or not finite: a message that names the file and the field."""
    path = tmp_path / "a.mindir"
    path.write_bytes(nano.with_name("skanet_nano.mindir").read_bytes())
    record = json.loads(nano.with_name("skanet_nano.mindir.json").read_text())
    for changes, message in (
        (dict(input_shape=[2, 3, 96, 96]), "it is the record of another model"),
        (dict(input_shape=[2, 3, 10**6, 64]), r"input_shape\[2\], the height is 1000000"),
        (dict(num_classes=None), "is a backbone without a classifier"),
        (dict(num_classes=12), "outputs of the shape \\(2, 10\\); expected 2 images by 12 classes"),
        (dict(preprocessing=None), "preprocessing is None; expected a mapping"),
    ):
        path.with_name("a.mindir.json").write_text(json.dumps({**record, **changes}))
        with pytest.raises(SystemExit, match=message):
            run("predict", photos, "--ckpt_path", path)
    path.with_name("a.mindir.json").write_text("[" * 100_000)
    with pytest.raises(SystemExit, match="a.mindir.json: its record is nested too deeply"):
        run("predict", photos, "--ckpt_path", path)
    with pytest.raises(SystemExit, match="which weights are in it was chosen by the export"):
        run("predict", photos, "--ckpt_path", nano.with_name("skanet_nano.mindir"), "--use_ema")


@pytest.mark.fault("records")
def test_what_is_printed_can_be_read_by_anything(nano, photos, tmp_path, capsys, monkeypatch):
    """No formulas in tables, no control characters on terminals, no NaN and no broken text in JSON."""
    predict = script("predict")
    names = ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\tx", "\rx", "a\x1b[2J", "猫", "\udcff", " =1"]
    found = [Prediction(f"{i}.png", [(i, name, 0.5)]) for i, name in enumerate(names)]
    found += [Prediction("=a.png", error="=a.png: cannot be read")]
    predict.write_csv(found)
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert [row[3] for row in rows[1:11]] == [
        "'=cmd|' /C calc'!A0", "'+1", "'-1", "'@SUM(A1)", r"'\tx", r"'\rx", r"a\x1b[2J", "猫", r"\udcff", "' =1",
    ]  # fmt: skip
    assert rows[11][0] == "'=a.png" and rows[11][5].startswith("'=")
    predict.write_json(found)
    printed = capsys.readouterr().out
    printed.encode("utf-8")
    assert [entry["classes"][0]["name"] for entry in json.loads(printed)[:10]] == names
    predict.write_text(found)
    assert "\x1b" not in capsys.readouterr().out
    weights = open_predictor(nano, batch_size=1)
    weights.logits = lambda images: np.full((1, 10), np.nan)
    (only,) = weights([str(photos / "0.png")])
    assert "outputs for this image are NaN or infinite" in only.error and not only.classes


def test_formats(nano, photos, capsys):
    run("predict", photos / "0.png", photos / "1.png", "--ckpt_path", nano, "--topk", 2, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["rank"], row["name"]) for row in rows][0] == ("1", f"kind {rows[0]['index']}") and len(rows) == 4
    run("predict", photos / "0.png", "--ckpt_path", nano, "--topk", 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(photos / "0.png") and "%  kind" in lines[1] and len(lines) == 3


def test_messages_of_predict(nano, photos, tmp_path):
    for words, message in (
        ((tmp_path / "none.jpg", "--ckpt_path", nano), "No image or folder at"),
        ((tmp_path, "--ckpt_path", nano), "No image in"),
        ((photos, "--ckpt_path", tmp_path / "none.onnx"), "No model at"),
        ((photos, "--ckpt_path", tmp_path / "none.ckpt"), "No checkpoint at"),
    ):
        with pytest.raises(SystemExit, match=message):
            run("predict", *words)
    (tmp_path / "a.mindir").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="has no record"):
        run("predict", photos, "--ckpt_path", tmp_path / "a.mindir")
    (tmp_path / "a.mindir.json").write_text(nano.with_name("skanet_nano.mindir.json").read_text())
    with pytest.raises(SystemExit, match="is not a readable mindir model"):
        run("predict", photos, "--ckpt_path", tmp_path / "a.mindir")


def test_imagenets_names():
    known = imagenet_classes()
    assert len(known) == len(set(known.values())) == 1000 and list(known) == sorted(known)
    assert readable_names(1000)[:2] == ["tench", "goldfish"] and readable_names(1000)[-1] == "toilet tissue"
    assert readable_names(2, ["n01440764", "other"]) == ["tench", "other"]
    assert readable_names(3) == ["class 0", "class 1", "class 2"]
