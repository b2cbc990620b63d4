"""Analyses: their figures against PyTorch's, scikit-learn's and hand-made ones, and what they write."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import families
import mindcv
import mindspore as ms
import numpy as np
import pytest
import torch
from commands import ROOT
from mindspore import Tensor
from PIL import Image
from test_validation import checkpoint as tiny_checkpoint

from mindska import prediction
from mindska.acceleration import accelerate, decelerate
from mindska.analysis import attention, cam, confusion, neighbours, receptive_field, shape_bias
from mindska.analysis.opening import Subject, find_classes, find_features, open_subject, spread
from mindska.analysis.stages import later_features
from mindska.commands import analyze
from mindska.config import Config
from mindska.data import Preprocessing
from mindska.data.imagenet import imagenet_classes
from mindska.distributed import World
from mindska.errors import ConfigError, DataError
from mindska.modes import pynative_mode
from mindska.reference import create
from mindska.weights import from_torch, load_into
from mindska.weights.files import write_checkpoint

PIXELS = Preprocessing((64, 64), 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NAMES = ["class0", "class1", "class2"]


def random_images(count=2, side=64, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 3, side, side)).astype(np.float32)


@pytest.fixture(scope="module")
def pairs():
    """Model -> (our network in plain operators, the reference with the same weights in float64)."""
    torch.manual_seed(0)
    nano = create("skanet_nano", num_classes=10).eval()
    for name, parameter in nano.named_parameters():
        if "layer_scale" in name:
            parameter.data.fill_(0.3)
    ours = mindcv.create_model("skanet_nano", num_classes=10).set_train(False)
    load_into(ours, from_torch("skanet_nano", nano.state_dict()))
    made = {"skanet_nano": (decelerate(ours), nano.double())}

    class Pairs:
        def __getitem__(self, model):
            if model not in made:
                made[model] = (decelerate(families.port(model)), families.reference(model).double())
            return made[model]

    return Pairs()


def subject(network, model, names=None, **settings):
    config = Config(model=model, ckpt_path=f"{model}.ckpt", batch_size=4, **settings)
    return Subject(config, network, {}, PIXELS, names or [f"class {i}" for i in range(10)])


# --------------------------------------------------------------------------------------------- attention


@pytest.mark.slow
@pytest.mark.parametrize("accelerated", [False, True])
def test_attention_is_the_networks_own_softmax(pairs, accelerated):
    """Of the golden network: its own `attention_weights`, and the softmax of the PyTorch reference."""
    network, reference = pairs["sk_resnet18"]
    x = random_images()
    if accelerated:
        accelerate(network)
    try:
        found = attention.AttentionProbe(network)(Tensor(x)).asnumpy()
    finally:
        decelerate(network)
    own = [weights.asnumpy().mean(-1) for weights in network.attention_weights(Tensor(x)).values()]
    np.testing.assert_allclose(found, np.stack(own, 1), rtol=1e-5)
    with torch.no_grad():
        reference(torch.from_numpy(x).double())
    units = [unit.conv1.weights for i in range(1, 5) for unit in getattr(reference, f"layer{i}")]
    expected = np.stack([weights[..., 0, 0].mean(-1).numpy() for weights in units], 1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.shape == (2, 8, 2) and np.abs(found[..., 1] - found[..., 0]).max() > 1e-3
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)


def test_units_and_paths_are_the_papers():
    network = mindcv.create_model("sknet26", num_classes=2)
    assert attention.unit_names(network)[:3] == ["SK_2_1", "SK_2_2", "SK_3_1"]
    assert attention.path_names(network) == ["3x3", "5x5"] and attention.last_of_stages(network) == [1, 3, 5, 7]


def test_a_larger_object_is_the_middle_of_the_image():
    assert attention.at_scale(PIXELS, 1.25).crop_pct == 0.8
    pixels = Preprocessing((64, 64), 0.875, "bilinear", (0.5,) * 3, (0.5,) * 3)
    assert attention.at_scale(pixels, 0.875).crop_pct == 1.0
    with pytest.raises(ConfigError, match="at least 0.875"):
        attention.at_scale(pixels, 0.5)


def folders(root, counts, side=64):
    rng = np.random.default_rng(1)
    for label, count in enumerate(counts):
        (root / "val" / f"class{label}").mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "val" / f"class{label}" / f"{i}.png")
    return root


def record(model, names=NAMES):
    side = 32 if model.startswith("sk_") else 64
    pixels = dict(image_size=[side, side], crop_pct=1.0, interpolation="bilinear", mean=[0.5] * 3, std=[0.5] * 3)
    return dict(model=model, num_classes=len(names), class_names=list(names), preprocessing=pixels)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of three classes, and 7 images of them in folders."""
    root = tmp_path_factory.mktemp("analysis")
    ms.set_seed(1)
    found = {"data": folders(root / "data", (3, 2, 2))}
    for model in ("sk_resnet18", "skanet_nano"):
        net = mindcv.create_model(model, num_classes=3)
        found[model] = root / f"{model}.ckpt"
        write_checkpoint(found[model], {p.name: p for p in net.get_parameters()}, record(model))
    return found


def table(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def configured(saved, model, **settings):
    return Config(ckpt_path=str(saved[model]), data_dir=str(saved["data"]), **{"batch_size": 3, **settings})


@pytest.mark.slow
def test_attention_by_class(saved, tmp_path, monkeypatch):
    """Means over the images of each class, whatever the batches; one pass, each image read once."""
    monkeypatch.setattr(attention, "graph_mode", pynative_mode)  # compiling takes seconds
    opened = open_subject(configured(saved, "sk_resnet18"), plain=False)
    said = list(attention.write(tmp_path, opened, [1.0, 1.5], [], 1, "png"))
    rows = table(tmp_path / "attention.csv")
    assert len(rows) == 2 * 8 * 3 and "7 images at 2 scales: 5x5 minus 3x3" in said[0]
    dataset = attention.open_labelled(opened)
    network = opened.network
    for scale in (1.0, 1.5):
        transform = attention.EvalTransform(attention.at_scale(opened.pixels, scale))
        x = np.stack([transform(dataset.load(i)) for i in range(7)])
        weights = np.stack([w.asnumpy().mean(-1) for w in network.attention_weights(Tensor(x)).values()], 1)
        for row in rows:
            if float(row["scale"]) != scale:
                continue
            mine = weights[dataset.labels == NAMES.index(row["class"])]
            unit = attention.unit_names(network).index(row["unit"])
            assert int(row["images"]) == len(mine)
            expected = mine[:, unit].mean(0)
            assert float(row["mean_3x3"]) == pytest.approx(expected[0], abs=2e-6)
            assert float(row["difference"]) == pytest.approx(expected[1] - expected[0], abs=3e-6)
    overall = json.loads((tmp_path / "attention.json").read_text())["mean_difference"]["1"]["SK_2_1"]
    differences = [
        (float(r["difference"]), int(r["images"])) for r in rows if r["scale"] == "1.0" and r["unit"] == "SK_2_1"
    ]
    assert overall == pytest.approx(sum(d * n for d, n in differences) / 7, abs=1e-6)
    single = table(tmp_path / "attention_images.csv")
    assert len(single) == 2 * 8 * 2
    for name in ("attention", "attention_by_unit", "attention_images"):
        assert Image.open(tmp_path / f"{name}.png").size[0] > 300


@pytest.mark.fault("analysis")
def test_a_class_without_images_is_left_out(tmp_path):
    mean = np.full((1, 1, 3, 2), 0.5)
    mean[0, 0, :, 0], mean[0, 0, 1] = [0.1, 0.2, 0.3], np.nan
    found = attention.ClassAttention([1.0], ["SK_2_1"], ["3x3", "5x5"], NAMES, mean, np.array([2, 0, 6]))
    assert found.over_all()[0, 0] == pytest.approx((0.4 * 2 + 0.2 * 6) / 8)
    attention.draw_by_class(tmp_path / "a.png", found, [0])


# --------------------------------------------------------------------------------------------- class activation


def rescale(maps):
    low = maps - maps.amin((1, 2), keepdim=True)
    return low / (1e-7 + low.amax((1, 2), keepdim=True))


def published_cam(model, reference, x, stage, method="gradcam"):
    """The published formula in PyTorch, in float64, scaled as the package does it; (B, H, W)."""
    images = torch.from_numpy(x).double()
    taps = reference.taps(images)
    name = [f"layer{stage + 1}", f"stage{stage + 1}_norm"][not model.startswith("sk_")]
    feature, logits = taps[name], taps["logits"]
    feature.retain_grad()
    chosen = logits.argmax(1)
    logits[torch.arange(len(x)), chosen].sum().backward()
    weights = feature.grad.mean((2, 3))
    if method == "scorecam":
        with torch.no_grad():
            large = torch.nn.functional.interpolate(feature, x.shape[2:], mode="bilinear", align_corners=True)
            low = large - large.amin((2, 3), keepdim=True)
            masks = low / (large.amax((2, 3), keepdim=True) - large.amin((2, 3), keepdim=True) + 1e-8)
            scores = [reference(images[i : i + 1] * masks[i][:, None])[:, chosen[i]] for i in range(len(x))]
            weights = torch.stack(scores).softmax(-1)
    found = (weights[:, :, None, None] * feature).sum(1).detach()
    if method == "eigencam":
        flat = feature.detach().flatten(2).transpose(1, 2)
        flat = flat - flat.mean(1, keepdim=True)
        found = (flat @ torch.linalg.svd(flat, full_matrices=False)[2][:, :1].transpose(1, 2)).reshape(found.shape)
        flips = found.amax((1, 2)) < -found.amin((1, 2))
        found[flips] = -found[flips]
    small = rescale(found.clamp(min=0))
    large = torch.nn.functional.interpolate(small[:, None], x.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return rescale(large).numpy(), chosen.numpy()


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, stages, method",
    [
        pytest.param("van_tiny_lska_k23", (1, 3), "gradcam", marks=pytest.mark.slow),
        ("skanet_nano", (0, 3), "gradcam"),
        pytest.param("sk_resnet18", (0, 2, 3), "gradcam", marks=pytest.mark.slow),
        ("skanet_nano", (1,), "eigencam"),
        pytest.param("skanet_nano", (0,), "scorecam", marks=pytest.mark.slow),
    ],
)
def test_maps_are_those_of_the_published_formula(pairs, model, stages, method):
    network, reference = pairs[model]
    x = random_images(seed=2)
    stem = model.startswith("sk_")  # its features begin with the stem
    found = cam.explain(subject(network, model), x, [stage + stem for stage in stages], method)
    for each, stage in zip(found.maps, stages):
        expected, chosen = published_cam(model, reference, x, stage, method)
        assert found.targets.tolist() == chosen.tolist()
        np.testing.assert_allclose(each, expected, atol=1e-4)  # of maps from 0 to 1
        assert each.min() == 0 and each.max() == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["GradCAM", "EigenCAM", "ScoreCAM"])
def test_maps_are_those_of_the_package(pairs, method):
    """The package `grad-cam`, where it is installed: it brings torchvision, which must fit PyTorch's own build."""
    package = pytest.importorskip("pytorch_grad_cam")
    network, reference = pairs["sk_resnet18"]
    reference.float()
    try:
        x = random_images(seed=3)
        with getattr(package, method)(reference, [reference.layer1[-1]]) as theirs:
            expected = theirs(torch.from_numpy(x), None)
        found = cam.explain(subject(network, "sk_resnet18"), x, [1], method.lower()).maps[0]
        if method == "EigenCAM":  # whose sign is free: theirs is LAPACK's
            feature = reference.taps(torch.from_numpy(x))["layer1"].detach().numpy()
            same = [np.abs(a - b).max() < 1e-4 for a, b in zip(found, expected)]
            turned = [
                np.abs(a - b).max() < 1e-4 for a, b in zip(cam.enlarged(-cam.eigencam(feature), (64, 64)), expected)
            ]
            assert all(a or b for a, b in zip(same, turned))
        else:
            np.testing.assert_allclose(found, expected, atol=1e-4)
    finally:
        reference.double()


@pytest.mark.slow
def test_a_class_can_be_chosen(pairs):
    network, _ = pairs["skanet_nano"]
    x = random_images(1, seed=2)
    free = cam.explain(subject(network, "skanet_nano"), x, [2])
    other = cam.explain(subject(network, "skanet_nano"), x, [2], target=(free.targets[0] + 1) % 10)
    assert np.abs(free.maps - other.maps).max() > 0.05 and (other.targets == other.targets[0]).all()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["skanet_nano", "sk_resnet18"])
def test_features_follow_from_any_of_them(pairs, model):
    network, _ = pairs[model]
    features = network.forward_stages(Tensor(random_images()))
    for index, feature in enumerate(features):
        later = later_features(network, index, feature)
        assert len(later) == len(features) - index
        for ours, whole in zip(later, features[index:]):
            np.testing.assert_array_equal(ours.asnumpy(), whole.asnumpy())


@pytest.mark.slow
def test_maps_of_a_segmenter():
    """Of the sum of a class's logits over the pixels that are taken for it, as in the package's own example."""
    from mindska.segmentation.factory import create_segmenter

    ms.set_seed(3)
    network = decelerate(create_segmenter("semantic_fpn_skanet_nano", num_classes=4)).set_train(False)
    x = random_images(1)
    found = cam.explain(subject(network, "semantic_fpn_skanet_nano", ["background", "a", "b", "c"]), x, [1, 3])
    assert found.maps.shape == (2, 1, 64, 64) and found.targets[0] != 0
    answers = network(Tensor(x)).asnumpy()[0].argmax(0)
    counts = np.bincount(answers.ravel(), minlength=4)
    assert found.probabilities[0] == counts[found.targets[0]] / answers.size
    grows_by_its_square(cam.Cut(network, 1), x, found.targets, (answers == found.targets[0])[None])


def grows_by_its_square(cut, x, columns, masks):
    """The gradient by finite differences: along itself, the score grows by its square."""
    features = cut.features(x)
    gradient = cut.gradient(features, (64, 64), columns, masks)

    def score(step):
        moved = [*features]
        moved[cut.index] = features[cut.index] + Tensor(np.float32(step) * gradient)
        logits = cut.output(moved[cut.index], moved, (64, 64)).asnumpy()[0, columns[0]]
        return float(logits.astype(np.float64)[masks[0]].sum())

    step = 1e-2 / np.abs(gradient).max()
    slope = (score(step) - score(-step)) / (2 * step)
    assert slope == pytest.approx(float((gradient.astype(np.float64) ** 2).sum()), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("method, first", [("retinanet", 0), ("ssdlite", 1)])
def test_maps_of_a_detector(method, first):
    """Of the target's highest score over all places and anchors."""
    from mindska.detection.factory import create_detector

    ms.set_seed(3)
    model, names = f"{method}_skanet_nano", ["a", "b", "c"]
    network = decelerate(create_detector(model, num_classes=3)).set_train(False)
    x = random_images(1)
    opened = subject(network, model, names)
    found = {name: cam.explain(opened, x, [1], name).maps for name in cam.METHODS}
    assert all(maps.shape == (1, 1, 64, 64) and maps.max() > 0.99 for maps in found.values())
    with pynative_mode():
        maps = [each.asnumpy()[0] for each in network.head_maps(Tensor(x))[0]]
    channels = len(names) + first  # of an anchor
    best = [max(each[i + first :: channels].max() for each in maps) for i in range(len(names))]
    target = len(names) - 1
    cut = cam.Cut(network, 1)
    logits = cut.whole(x)
    assert cut.first_class == first and logits.shape[1] == channels
    np.testing.assert_allclose(logits[0, first:].max(1), best, rtol=1e-6)
    place = logits[0, first + target].argmax()
    masks = (np.arange(logits.shape[2]) == place)[None]
    grows_by_its_square(cut, x, np.array([first + target]), masks)
    features = cut.features(x)
    expected = cam.gradcam(features[1].asnumpy(), cut.gradient(features, (64, 64), np.array([first + target]), masks))
    explained = cam.explain(opened, x, [1], "gradcam", target)
    np.testing.assert_allclose(explained.maps[0], cam.enlarged(expected, (64, 64)), atol=1e-6)
    assert 0 < explained.probabilities[0] < 1 and explained.targets[0] == target


# --------------------------------------------------------------------------------------------- neighbours


def test_neighbours_are_the_networks(pairs):
    network, reference = pairs["skanet_nano"]
    x = random_images(seed=5)
    with torch.no_grad():
        reference(torch.from_numpy(x).double())
    found = neighbours.graphs(subject(network, "skanet_nano"), x)
    assert [graph.block for graph in found] == ["stages.0.0", "stages.1.0", "stages.2.0", "stages.2.1", "stages.3.0"]
    assert [graph.size for graph in found] == [(16, 16), (8, 8), (4, 4), (4, 4), (2, 2)]
    assert [graph.keys for graph in found] == [(4, 4), (4, 4), (4, 4), (4, 4), (2, 2)]
    for graph, theirs in zip(found, reference.graphs().values()):
        same = np.sort(graph.neighbours) == np.sort(theirs.neighbours.numpy())
        assert same.mean() > 0.99, graph.block  # a tie to rounding may be decided otherwise
    assert not any(cell._forward_hook for cell in neighbours.graph_cells(subject(network, "skanet_nano")).values())


def test_distances_are_of_middles():
    graph = neighbours.Graph("stages.0.0", (4, 4), (2, 2), np.array([[[0, 3]] * 16]))
    nodes, keys = graph.centres((32, 32))
    assert nodes[0].tolist() == [4, 4] and nodes[5].tolist() == [12, 12] and keys.tolist()[3] == [24, 24]
    distances = graph.distances((32, 32))
    assert distances.shape == (1, 16, 2) and distances[0, 0, 0] == pytest.approx(np.hypot(4, 4))
    assert graph.by_chance((32, 32)) == pytest.approx(
        np.mean([np.hypot(*(keys[j] - nodes[i])) for i in range(16) for j in range(4)])
    )
    blocks = ["stages.0.0", "stages.2.0", "stages.2.1", "stages.2.2"]
    assert neighbours.shown_blocks(blocks) == ["stages.0.0", "stages.2.0", "stages.2.2"]


def test_what_neighbours_writes(saved, tmp_path):
    opened = open_subject(configured(saved, "skanet_nano"))
    list(neighbours.write(tmp_path, opened, [(0.5, 0.5), (0.0, 1.0)], [], 3, "svg"))
    rows = table(tmp_path / "neighbours.csv")
    assert len(rows) == 3 * 5 * 2 * 4 and {row["node_column"] for row in rows if row["block"] == "stages.3.0"} == {"1"}
    summary = table(tmp_path / "neighbours_distance.csv")
    assert [row["block"] for row in summary] == list(neighbours.graph_cells(opened))
    assert (tmp_path / "neighbours.svg").read_text().startswith("<?xml")


# --------------------------------------------------------------------------------------------- receptive field


@pytest.mark.slow
def test_contributions_are_the_references(pairs):
    network, reference = pairs["skanet_nano"]
    x = random_images(1, side=64, seed=6)
    images = torch.from_numpy(x).double().requires_grad_()
    feature = reference.taps(images)["stage4_norm"]
    torch.relu(feature[:, :, feature.shape[2] // 2, feature.shape[3] // 2]).sum().backward()
    expected = images.grad.clamp(min=0).sum((0, 1)).numpy()
    found = receptive_field.contributions(subject(network, "skanet_nano"), x, 3)
    np.testing.assert_allclose(found, expected, atol=1e-4 * expected.max())


def test_the_square_that_holds_a_share():
    scores = np.zeros((11, 11))
    scores[5, 5], scores[5, 9] = 6, 4
    field = receptive_field.ReceptiveField("net", "stages.3", scores, 1)
    assert [field.side(share) for share in (0.2, 0.5, 0.7, 0.99)] == [3, 3, 9, 9]
    assert field.area(0.5) == pytest.approx(9 / 121) and field.area(0.7) == pytest.approx(81 / 121)
    even = receptive_field.ReceptiveField("net", "stages.3", np.ones((8, 8)), 1)
    assert even.side(0.99) == 8 and even.area(0.99) == 1


@pytest.mark.slow
def test_what_receptive_field_writes(saved, tmp_path):
    opened = [open_subject(configured(saved, "skanet_nano")), open_subject(configured(saved, "sk_resnet18"))]
    said = list(receptive_field.write(tmp_path, iter(opened), [], 1, "", "png"))
    rows = table(tmp_path / "receptive_field.csv")
    assert [row["network"] for row in rows[::4]] == ["skanet_nano", "sk_resnet18"] and len(rows) == 8
    assert "1 images each" in said[-1]
    scores = np.load(tmp_path / "receptive_field.npz")["scores_0"]
    assert scores.shape == (64, 64) and scores.min() >= 0


# --------------------------------------------------------------------------------------------- confusion


def test_figures_are_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels, guesses = rng.integers(0, 4, 200), rng.integers(0, 5, 200)  # class 4 has no image, class 5 nothing
    names = [f"c{i}" for i in range(6)]
    matrix = confusion.confusion_matrix(labels, guesses, 6)
    numbers = list(range(6))
    np.testing.assert_array_equal(matrix, metrics.confusion_matrix(labels, guesses, labels=numbers))
    expected = metrics.classification_report(
        labels, guesses, labels=numbers, target_names=names, output_dict=True, zero_division=0
    )
    found = confusion.report(matrix, names)
    for row in found["classes"]:
        assert {key: row[key] for key in expected[row["name"]]} == pytest.approx(expected[row["name"]])
    for name in confusion.AVERAGES:
        assert found[name] == pytest.approx(expected[name])
    assert found["accuracy"] == pytest.approx((labels == guesses).mean())
    lines = "\n".join(confusion.text(found))
    assert "macro avg" in lines and "c5" in lines


def test_what_confusion_and_errors_write(images, tmp_path):
    config = Config(data_dir=str(images), ckpt_path=str(tiny_checkpoint(tmp_path / "net.ckpt", 3)), batch_size=5)
    said = list(confusion.write_confusion(tmp_path, config, World(), False, "png"))
    matrix = np.array([[int(row[name]) for name in NAMES] for row in table(tmp_path / "confusion.csv")])
    assert matrix.sum(1).tolist() == [12, 12, 12] and len(said) > 6
    facts = json.loads((tmp_path / "confusion.json").read_text())
    assert facts["accuracy"] == pytest.approx(np.trace(matrix) / 36) and facts["support"] == 36
    assert [row["support"] for row in table(tmp_path / "classes.csv")] == ["12"] * 3
    said = list(confusion.write_errors(tmp_path, config, World(), 4))
    rows = table(tmp_path / "errors.csv")
    assert len(rows) == 36 - np.trace(matrix) and f"{len(rows)} of 36" in said[0]
    confidence = [float(row["probability"]) for row in rows]
    assert confidence == sorted(confidence, reverse=True)
    assert all(row["label"] != row["prediction"] and row["label"] in row["path"] for row in rows)
    assert all(float(row["probability_of_label"]) <= float(row["probability"]) for row in rows)
    assert Image.open(tmp_path / "errors.png").size[0] > 300


def test_matrices_of_many_classes_are_drawn(tmp_path):
    matrix = np.random.default_rng(0).integers(0, 3, (300, 300))
    matrix[7] = 0  # a class without images
    confusion.draw(tmp_path / "c.png", matrix, [f"$x_{i}$" for i in range(300)], "images", "many")
    few = list(confusion.text(confusion.report(matrix, [f"c{i}" for i in range(300)])))
    assert len(few) == 1 + 30 + 2 + 1 + 1


# --------------------------------------------------------------------------------------------- shape bias


def test_the_sixteen_classes():
    sizes = {name: len(shape_bias.members(name)) for name in shape_bias.SIXTEEN}
    assert len(sizes) == 16 and sizes["bird"] == 49 and sizes["dog"] == 109 and sum(sizes.values()) == 207
    assert len({n for name in sizes for n in shape_bias.members(name)}) == 207
    names = list(imagenet_classes().values())
    assert names[404] == "airliner" and names[499] == "cleaver" and {names[n] for n in (385, 386)} == {
        "Indian elephant", "African elephant"
    }  # fmt: skip


def test_answers_of_imagenets_classes_are_means():
    categories, names = sorted(shape_bias.SIXTEEN), list(imagenet_classes().values())
    matrix = shape_bias.decision_matrix(categories, names)
    assert matrix.shape == (1000, 16) and np.allclose(matrix.sum(0), 1)
    probabilities = np.zeros(1000)
    probabilities[[281, 282]] = 0.25  # two cats of six
    probabilities[499] = 0.2  # the one knife
    assert categories[(probabilities @ matrix).argmax()] == "knife"
    np.testing.assert_array_equal(shape_bias.decision_matrix(categories, list(imagenet_classes())), matrix)
    with pytest.raises(ConfigError, match="knows no class airplane"):
        shape_bias.decision_matrix(categories, ["cat", "dog"])


@pytest.mark.parametrize(
    "stem, parsed",
    [
        ("cat1-elephant2", ("cat", "elephant")),
        ("cat-cat", ("cat", "cat")),
        ("3-5", ("3", "5")),
        ("32-57", ("3", "5")),
        ("cat", None),
        ("cat1-cow2", None),
    ],
)
def test_names_say_shape_and_texture(stem, parsed):
    assert shape_bias.parse_name(stem, ["cat", "elephant", "3", "5"]) == parsed


@pytest.mark.fault("analysis")
def test_shape_bias_of_made_images(saved, tmp_path, monkeypatch):
    """Images whose names say what the network answers, or not."""
    monkeypatch.setattr(shape_bias, "graph_mode", pynative_mode)  # compiling takes seconds
    monkeypatch.setattr(prediction, "graph_mode", pynative_mode)
    predictor = prediction.open_predictor(saved["skanet_nano"], batch_size=4)
    paths = sorted(map(str, (saved["data"] / "val").rglob("*.png")))
    answers = [NAMES[found.classes[0][0]] for found in predictor(paths)]
    data, expected = tmp_path / "cue", dict(shape=0, texture=0, other=0, images=0)
    for i, (path, answer) in enumerate(zip(paths, answers)):
        others = [name for name in NAMES if name != answer]
        shape, texture = [(answer, others[0]), (others[0], answer), (others[0], others[1]), (answer, answer)][i % 4]
        (data / shape).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, data / shape / f"{shape}-{texture}{i}.png")
        expected["images"] += i % 4 != 3
        expected[("shape", "texture", "other", "")[i % 4]] = (
            expected.get(("shape", "texture", "other", "")[i % 4], 0) + 1
        )
    expected.pop("")
    config = Config(data_dir=str(data), ckpt_path=str(saved["skanet_nano"]), batch_size=4)
    said = list(shape_bias.write(tmp_path, config, "png"))
    found = json.loads((tmp_path / "shape_bias.json").read_text())["networks"][0]
    assert {name: found[name] for name in expected} == expected and "shape bias 50.0 %" in said[0]
    assert found["shape_bias"] == 0.5 and expected == dict(shape=2, texture=2, other=2, images=6)
    assert len(table(tmp_path / "shape_bias.csv")) == 7
    folder = next(data.iterdir())
    shutil.copy(paths[0], folder / "photo.png")
    with pytest.raises(DataError, match=r"1 of 8 images are not called.*photo.png"):
        shape_bias.read_layout(data)
    with pytest.raises(DataError, match="is not laid out as"):
        shape_bias.read_layout(folder)


# --------------------------------------------------------------------------------------------- what is asked for


def test_images_are_taken_in_turn_of_each_class():
    labels = np.array([0, 0, 0, 1, 1, 2])
    assert spread(labels, 4) == [0, 3, 5, 1] and spread(labels, 99) == [0, 3, 5, 1, 4, 2]


@pytest.mark.fault("analysis")
def test_stages_and_classes_by_name_or_number(pairs):
    opened = subject(pairs["sk_resnet18"][0], "sk_resnet18", ["cat", "dog", "7"])
    assert find_features(opened, []) == [4]
    assert find_features(opened, ["stem", "stages.3", "1", "-2"]) == [0, 4, 1, 3]
    for wrong in ("stages.4", "5", "-6", "x"):
        with pytest.raises(ConfigError, match="has no stage.*stem, stages.0"):
            find_features(opened, [wrong])
    assert find_classes(opened, ["dog", "0", "7"]) == [1, 0, 2]
    with pytest.raises(ConfigError, match="has no class 'cow'; expected one of cat, dog, 7"):
        find_classes(opened, ["cow"])


@pytest.mark.fault("analysis")
def test_networks_that_have_it_not(saved, images, tmp_path):
    nano, sk = open_subject(configured(saved, "skanet_nano")), open_subject(configured(saved, "sk_resnet18"))
    with pytest.raises(ConfigError, match="has no attention over kernels; expected an SKNet"):
        list(attention.write(tmp_path, nano, [1.0], [], 2, "png"))
    with pytest.raises(ConfigError, match="has no graph of neighbours; expected a SkaNet"):
        list(neighbours.write(tmp_path, sk, [(0.5, 0.5)], [], 2, "png"))
    with pytest.raises(ConfigError, match="exported model, whose inside cannot be seen"):
        open_subject(Config(ckpt_path=str(tmp_path / "x.onnx")))
    with pytest.raises(ConfigError, match="of MindCV; the analyses know the models of mindska only"):
        open_subject(Config(ckpt_path=str(tiny_checkpoint(tmp_path / "net.ckpt"))))
    with pytest.raises(ConfigError, match="No images: name some"):
        list(
            cam.write(
                tmp_path, open_subject(Config(ckpt_path=str(saved["skanet_nano"]))), [], "gradcam", "", [], 2, "png"
            )
        )
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.slow
def test_cam_of_named_images(saved, tmp_path):
    """Files need no data set; the maps are kept."""
    opened = open_subject(Config(ckpt_path=str(saved["skanet_nano"]), batch_size=2))
    said = list(
        cam.write(tmp_path, opened, ["stages.3"], "gradcam", "class1", [saved["data"] / "val" / "class0"], 8, "png")
    )
    rows = table(tmp_path / "cam.csv")
    assert len(rows) == 3 and {row["target"] for row in rows} == {"class1"} and {row["label"] for row in rows} == {""}
    maps = np.load(tmp_path / "cam.npz")
    assert maps["maps"].shape == (3, 1, 64, 64) and maps["stages"].tolist() == ["stages.3"]
    assert said[0].startswith("3 images:")


@pytest.mark.fault("analysis")
def test_an_unreadable_image_is_named_or_left_out(saved, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    good = next((saved["data"] / "val" / "class0").glob("*.png"))
    for skip in (False, True):
        opened = open_subject(Config(ckpt_path=str(saved["skanet_nano"]), batch_size=2, val_skip_damaged=skip))
        chosen = ([], "gradcam", "", [bad, good], 8, "png")
        if skip:
            assert next(cam.write(tmp_path, opened, *chosen)).startswith("1 images")
        else:
            with pytest.raises(DataError, match="bad.png"):
                list(cam.write(tmp_path, opened, *chosen))


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "ANALYSIS"),
        (["cams"], "invalid choice: 'cams'"),
        (["cam"], "needs --ckpt_path"),
        (["cam", "--ckpt_path", "A", "B", "--images", "x"], "cam looks into one network"),
        (["cam", "--ckpt_path", "A"], "No checkpoint at"),
        (["receptive_field", "--models", "van_tinny", "--images", "."], "van_tinny"),
        (["neighbours", "--nodes", "2,0"], "expected shares of height and width"),
        (["attention", "--scales", "0"], "invalid scale value"),
        (["cam", "--number", "0"], "expected at least 1"),
        (["cam", "--batchsize", "4"], "batch_size"),
    ],
)
def test_wrong_words(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "A" in words and "B" in words:
        for name in "AB":
            (tmp_path / name).write_text("")
    with pytest.raises(SystemExit) as ended:
        analyze.main(words)
    assert ended.value.code
    assert said in " ".join(f"{capsys.readouterr().err} {ended.value.code}".split())


def test_one_process_only():
    from mindska.analysis.run import analyse

    with pytest.raises(ConfigError, match="works in one process; 2 were started"):
        analyse("cam", Config(), SimpleNamespace(), World(0, 2))


@pytest.mark.slow
def test_the_command(saved, tmp_path):
    """In graph mode, with accelerated cells, started in a clone: the figures are those of PyNative mode."""
    words = [sys.executable, str(ROOT / "scripts" / "analyze.py"), "attention", "--ckpt_path", saved["sk_resnet18"],
             "--data_dir", saved["data"], "--scales", "1", "--number", "1", "--batch_size", "3",
             "--out", tmp_path]  # fmt: skip
    done = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert "7 images at 1 scale: 5x5 minus 3x3" in done.stdout and "SK_5_2" in done.stdout
    opened = open_subject(configured(saved, "sk_resnet18"))
    dataset = attention.open_labelled(opened)
    x = np.stack([attention.EvalTransform(opened.pixels)(dataset.load(i)) for i in range(7)])
    expected = attention.AttentionProbe(opened.network)(Tensor(x)).asnumpy()
    for row in table(tmp_path / "attention.csv"):
        mine = expected[
            dataset.labels == NAMES.index(row["class"]), attention.unit_names(opened.network).index(row["unit"])
        ]
        assert float(row["difference"]) == pytest.approx(float((mine[:, 1] - mine[:, 0]).mean()), abs=1e-5)
    words[2:6] = ["attention", "--ckpt_path", saved["skanet_nano"], "--batch_size"]
    words[6:] = ["3", "--data_dir", saved["data"]]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 1 and "has no attention over kernels" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_segmenters(tmp_path):
    """Maps, receptive field and pixels of a segmenter, on scenes of digits."""
    from mindska.analysis.run import analyse
    from mindska.commands.prepare_digit_scenes import main as prepare_digit_scenes
    from mindska.segmentation.factory import create_segmenter

    prepare_digit_scenes(["--train", "2", "--val", "4", "--image_size", "64", "64", str(tmp_path / "scenes")])
    names, model = ["background", *map(str, range(10))], "semantic_fpn_skanet_nano"
    network = create_segmenter(model, num_classes=11)
    known = dict(record(model, names), task="segmentation", evaluation=dict(scale=None))
    write_checkpoint(tmp_path / "net.ckpt", {p.name: p for p in network.get_parameters()}, known)
    config = Config(ckpt_path=str(tmp_path / "net.ckpt"), data_dir=str(tmp_path / "scenes"), batch_size=2)
    options = SimpleNamespace(
        out=tmp_path, format="png", images=[], number=3, stages=["3"], method="gradcam", target="", stage="", models=[]
    )
    said = {name: list(analyse(name, config, options, World())) for name in ("cam", "receptive_field", "confusion")}
    assert said["cam"][0].startswith("3 images:") and "3 images each" in said["receptive_field"][-1]
    assert [row["feature"] for row in table(tmp_path / "receptive_field.csv")] == ["decode_head"] * 4
    matrix = np.array([[int(row[name]) for name in names] for row in table(tmp_path / "confusion.csv")])
    assert matrix.sum() == 4 * 64 * 64
    for name in ("errors", "shape_bias"):
        with pytest.raises(ConfigError, match=f"{name} is of classifiers"):
            analyse(name, config, options, World())
    options.scales = [1.0]
    with pytest.raises(ConfigError, match="no attention"):
        list(analyse("attention", config, options, World()))


@pytest.mark.fault("analysis")
@pytest.mark.slow
def test_detectors(scenes, tmp_path):
    """Maps and receptive field of a detector, on scenes of digits; what it has not is refused.

    Of Mask R-CNN, the RPN's objectness is explained."""
    from mindska.analysis.run import analyse
    from mindska.detection.factory import create_detector

    names, model = [*map(str, range(10))], "mask_rcnn_skanet_nano"
    network = create_detector(model, num_classes=10)
    known = dict(record(model, names), task="detection")
    write_checkpoint(tmp_path / "net.ckpt", {p.name: p for p in network.get_parameters()}, known)
    config = Config(ckpt_path=str(tmp_path / "net.ckpt"), data_dir=str(scenes), batch_size=2)
    options = SimpleNamespace(
        out=tmp_path, format="png", images=[], number=3, stages=["3"], method="gradcam", target="", stage="", models=[]
    )
    said = {name: list(analyse(name, config, options, World())) for name in ("cam", "receptive_field")}
    assert said["cam"][0].startswith("3 images:") and "3 images each" in said["receptive_field"][-1]
    assert [row["feature"] for row in table(tmp_path / "receptive_field.csv")] == ["stages.3"] * 4
    assert {row["prediction"] for row in table(tmp_path / "cam.csv")} == {"object"}
    options.method = "scorecam"
    options.stages, options.number = ["0"], 1
    options.target = "object"
    assert list(analyse("cam", config, options, World()))
    assert {row["target"] for row in table(tmp_path / "cam.csv")} == {options.target}
    options.target = "7"  # one of its classes, but not of the RPN's
    with pytest.raises(ConfigError, match=f"has no class '{options.target}'"):
        list(analyse("cam", config, options, World()))
    for name in ("errors", "shape_bias", "confusion"):
        with pytest.raises(ConfigError, match=f"{name} is of classifiers.* is for detection"):
            analyse(name, config, options, World())
    options.scales, options.nodes = [1.0], [(0.5, 0.5)]
    assert list(analyse("neighbours", config, options, World()))  # of the backbone
    with pytest.raises(ConfigError, match="no attention"):
        list(analyse("attention", config, options, World()))
