"""Detectors on any backbone: against PyTorch, sizes, targets, images without objects, settings that are refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, nn
from mindspore.nn.utils import no_init_parameters
from parity.detector_ports import Gradients

from mindska import create_detector
from mindska.detection import assign
from mindska.detection.anchors import RETINANET_ANCHORS, ssd_priors
from mindska.detection.factory import DETECTORS, METHODS
from mindska.detection.masks import pack
from mindska.detection.retinanet import anchors_of, cells_of
from mindska.errors import SettingError
from mindska.models.layers.boxes import mark_objects
from mindska.modes import pynative_mode
from mindska.reference import create as create_reference
from mindska.reference.verify import reference_keys

# Of each method and family; sizes that no power of two divides, and images smaller than the batch.
CASES = [
    ("retinanet", "sk_resnet18", (75, 98)),
    ("mask_rcnn", "sk_resnet18", (90, 130)),
    ("ssdlite", "van_tiny", (66, 97)),
    ("retinanet", "skanet_nano", (96, 112)),
    ("mask_rcnn", "van_tiny_lska_k7", (70, 96)),
    ("ssdlite", "skanet_nano", (96, 128)),
]


def batch(size, noise_size, seed=0):
    """Two images, the first with three objects and the second with none; M is 5."""
    rng, (height, width) = np.random.default_rng(seed), size
    images = rng.standard_normal((2, 3, *size), dtype=np.float32)
    boxes, labels = np.zeros((2, 5, 4), np.float32), np.full((2, 5), -1, np.int32)
    boxes[0, :3] = np.float32([[0.05, 0.1, 0.5, 0.8], [0.4, 0.3, 0.9, 0.95], [0.6, 0.05, 0.7, 0.2]])
    boxes[0, :3] *= np.float32([width, height, width, height])
    boxes[0, 3], labels[0, 3] = [20, 20, 20, 40], 1  # an object without an area is none
    labels[0, :3] = [0, 2, 1]
    bitmaps = np.zeros((2, 5, *size), bool)
    bitmaps[0, :3, height // 4 : height // 2, 5 : width // 2] = True
    bits = np.stack([pack(image) for image in bitmaps])
    shapes = np.int32([[height - 3, width - 1], [height, width]])
    noise = rng.random((2, noise_size), np.float32)
    return images, boxes, labels, shapes, bits, noise


def arguments(net, images, boxes, labels, shapes, bits, noise):
    targets = (images, boxes, labels, shapes, *((bits,) if net.method == "mask_rcnn" else ()), noise)
    return [Tensor(x) for x in targets]


def with_some_weights(net):
    """Other values than the initial ones for norms and biases, and heads whose scores differ."""
    rng = np.random.default_rng(0)
    for p in net.get_parameters():
        array = p.asnumpy()
        if array.ndim <= 1:
            positive = p.name.endswith(("moving_variance", "gamma"))
            array = array + rng.uniform(-0.1, 0.4 if positive else 0.1, array.shape).astype(np.float32)
        elif p.name.endswith(("retina_cls.weight", "retina_reg.weight", "rpn_cls.weight", "rpn_reg.weight")):
            array = rng.standard_normal(array.shape, np.float32) * 0.03
        p.set_data(Tensor(array.astype(np.float32)))
    return net


def reference_like(net):
    names, result = reference_keys(net.model_name), create_reference(net.model_name, num_classes=net.num_classes)
    state = {names[p.name]: torch.from_numpy(p.asnumpy()) for p in net.get_parameters()}
    loaded = result.load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys and all(key.endswith("num_batches_tracked") for key in loaded.missing_keys)
    return result.eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, backbone, size",
    [pytest.param(*entry, marks=() if i in (0, 2) else pytest.mark.slow) for i, entry in enumerate(CASES)],
)
def test_any_backbone_equals_the_reference(method, backbone, size):
    """Maps, losses and, in the norm, gradients; an image without objects among them."""
    net = with_some_weights(create_detector(method, backbone, num_classes=3, drop_path_rate=0.0))
    net.set_train(False)
    reference, (images, *targets) = reference_like(net), batch(size, net.noise_size)
    scores, deltas = net(Tensor(images))
    with torch.no_grad():
        expected = reference(torch.from_numpy(images))
    for ours, theirs in zip((*scores, *deltas), (*expected[0], *expected[1])):
        np.testing.assert_allclose(ours.asnumpy(), theirs.numpy(), atol=2e-4 * max(1, theirs.abs().max().item()))
    boxes, labels, shapes, bits, noise = targets
    boxes, labels = (x.asnumpy() for x in net.checked_targets(*map(Tensor, (images, boxes, labels, shapes))))
    keys = noise[:, net.num_drop_paths :]
    losses = reference.losses(torch.from_numpy(images), boxes, labels, shapes, bits, keys)
    step = Gradients(net)
    (total, parts), gradients = step(*arguments(net, images, *targets))
    swapped = 1e-2 if "skanet" in backbone else 2e-4  # neighbours that are equally near
    found = [float(x.asnumpy()) for x in parts]
    assert found == pytest.approx([losses[name].item() for name in losses], rel=swapped)
    sum(losses.values()).backward()
    names, state = reference_keys(net.model_name), dict(reference.named_parameters())
    norms = np.float64([np.linalg.norm(gradient.asnumpy()) for gradient in gradients])
    theirs = np.float64([state[names[p.name]].grad.norm() for p in step.weights])
    np.testing.assert_allclose(norms, theirs, rtol=0.1 if "skanet" in backbone else 5e-3, atol=1e-4 * theirs.max())
    for i, some in enumerate(net.detect(images, shapes, score_threshold=0.0 if method == "ssdlite" else 0.02)):
        assert len(some.boxes) == len(some.scores) == len(some.labels) and (np.diff(some.scores) <= 0).all()
        assert len(some) == 0 or (some.labels.min() >= 0 and some.labels.max() < 3)
        assert (some.masks is not None) == (method == "mask_rcnn")
        if some.masks is not None:
            assert some.masks.shape == (len(some), *shapes[i])


@pytest.mark.parametrize("method", ["retinanet", "ssdlite"])
def test_targets_are_numpys(method):
    """With cells that an image does not have by itself, two objects that share a prior, and images without objects."""
    net, rng = create_detector(method, "sk_resnet18", num_classes=3), np.random.default_rng(2)
    images, boxes, labels, shapes, _, _ = batch((160, 192), 0)
    shapes[0] = [90, 101]
    boxes[0, 1] = boxes[0, 0] + 1
    marked, labels = net.checked_targets(*map(Tensor, (images, boxes, labels, shapes)))
    if method == "retinanet":
        sizes = RETINANET_ANCHORS.map_sizes((160, 192))
        anchors, cells = anchors_of(RETINANET_ANCHORS, tuple(sizes)), cells_of(RETINANET_ANCHORS, tuple(sizes))
        matched = net.targets(anchors, cells, marked, Tensor(shapes)).asnumpy()
        for i, count in enumerate((3, 0)):
            padded = tuple(-(-side // 32) * 32 for side in shapes[i].tolist())
            valid = RETINANET_ANCHORS.valid(sizes, padded)
            assert valid.all() == (i == 1)
            classes = labels.asnumpy()[i, :count]
            expected = assign.retinanet_targets(RETINANET_ANCHORS(sizes), boxes[i, :count], classes, valid)
            np.testing.assert_array_equal(matched[i], expected.matched)
        return
    sizes = ((10, 12), (5, 6), (3, 3), (2, 2), (1, 1), (1, 1))
    shared = np.float32([[50, 50, 54, 54], [50, 50, 54, 54]])  # both have the same best prior
    boxes[0, :2], marked = shared, Tensor(np.concatenate([shared[None], np.zeros((1, 2, 4), np.float32)]))
    classes, deltas = net.targets(sizes, marked, Tensor(np.int32([[0, 2], [-1, -1]])), (160.0, 192.0))
    for i, (objects, numbers) in enumerate(((shared, [0, 2]), (np.zeros((0, 4)), []))):
        shares = np.float32(objects).reshape(-1, 4) / np.float32([192, 160, 192, 160])
        expected = assign.ssd_targets(ssd_priors(sizes), shares, np.int32(numbers))
        np.testing.assert_array_equal(classes.asnumpy()[i], np.maximum(expected.labels + 1, 0))
        np.testing.assert_allclose(deltas.asnumpy()[i], expected.deltas, atol=2e-5)
    assert sorted(classes.asnumpy()[0][classes.asnumpy()[0] > 0].tolist()) == [3]
    predicted = rng.standard_normal((2, 50, 8)).astype(np.float32)
    wanted = (rng.random((2, 50)) < [[0.1], [0.0]]).astype(np.int32) * 2
    scores, deltas = Tensor(predicted[..., 4:]), Tensor(predicted[..., :4])
    cls, _ = net.criterion(scores, deltas, Tensor(wanted), deltas)
    losses = -torch.log_softmax(torch.from_numpy(predicted[..., 4:]), 2).numpy()
    counted = assign.hard_negatives(losses[..., 0], wanted > 0)
    chosen = np.take_along_axis(losses, wanted[..., None].astype(np.int64), 2)[..., 0]
    assert float(cls.asnumpy()) == pytest.approx(chosen[counted].sum() / (wanted > 0).sum(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.fault("detector-input")
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_without_objects(method):
    net = create_detector(method, "sk_resnet18", num_classes=3)
    images, boxes, labels, shapes, bits, noise = batch((64, 96), net.noise_size)
    labels[:] = -1
    boxes[:] = 7.5
    step = Gradients(net)
    (total, parts), gradients = step(*arguments(net, images, boxes, labels, shapes, bits, noise))
    losses = dict(zip(net.losses(*arguments(net, images, boxes, labels, shapes, bits, noise)), parts))
    assert all(np.isfinite(gradient.asnumpy()).all() for gradient in gradients)
    for name, loss in losses.items():
        value = float(loss.asnumpy())
        assert np.isfinite(value)
        if "bbox" in name or name == "loss_mask" or method == "ssdlite":
            assert value == 0
    assert (float(total.asnumpy()) > 0) == (method != "ssdlite")


@pytest.mark.slow
def test_what_is_drawn_depends_on_the_noise_alone():
    net = create_detector("mask_rcnn", "sk_resnet18", num_classes=3, drop_path_rate=0.2)
    given = batch((64, 96), net.noise_size)

    def losses(noise):
        return [float(x.asnumpy()) for x in net.losses(*arguments(net, *given[:5], noise)).values()]

    first = losses(given[5])
    assert losses(given[5]) == first
    assert losses(given[5][::-1].copy()) != first


@pytest.mark.fault("detector-input")
def test_objects_are_what_has_a_label_and_an_area():
    boxes = np.float32([[[0, 0, 5, 5], [1, 1, 1, 4], [2, 2, 9, 9], [3, 5, 4, 4]]])
    marked, real = mark_objects(Tensor(boxes), Tensor(np.int32([[0, 0, -1, 1]])))
    assert real.asnumpy().tolist() == [[True, False, False, False]]
    assert not marked.asnumpy()[0, 1:].any()


def test_published_pairs_are_in_mindcvs_factory():
    import mindcv

    expected = {f"{m}_van_{size}_lska_k23" for m in ("retinanet", "mask_rcnn") for size in ("tiny", "small", "base")}
    assert set(DETECTORS) == expected | {"ssdlite_skanet_s"}
    assert all(mindcv.is_model(name) for name in DETECTORS)
    net = mindcv.create_model("ssdlite_skanet_s", num_classes=7)
    assert net.num_classes == 7 and net.model_name == "ssdlite_skanet_s"
    with pytest.raises(SettingError, match="is a detector; for features make its backbone"):
        mindcv.create_model("ssdlite_skanet_s", features_only=True)


COUNTS = {
    "retinanet_van_tiny_lska_k23": 13_309_268, "retinanet_van_small_lska_k23": 23_469_748,
    "retinanet_van_base_lska_k23": 36_029_748, "mask_rcnn_van_tiny_lska_k23": 23_808_336,
    "mask_rcnn_van_small_lska_k23": 33_387_184, "mask_rcnn_van_base_lska_k23": 45_947_184,
    "ssdlite_skanet_s": 6_167_154,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_parameters(name):
    assert sum(p.size for p in create_detector(name).trainable_params()) == COUNTS[name]


def test_small_images_are_padded():
    """SkaNet needs more pixels than there are: the maps are those of the padded image, detections lie in the image."""
    net = with_some_weights(create_detector("retinanet", "skanet_nano", num_classes=2)).set_train(False)
    images = np.random.default_rng(0).standard_normal((1, 3, 21, 30), dtype=np.float32)
    assert net.backbone.why_too_small(21, 30)
    found = net.detect(images, score_threshold=0.0)[0]
    assert 0 < len(found) <= 100 and found.boxes.min() >= 0
    assert found.boxes[:, 0::2].max() <= 30 and found.boxes[:, 1::2].max() <= 21


@pytest.mark.fault("detector-input")
def test_settings_and_shapes_that_are_refused():
    with pytest.raises(SettingError, match=r"no detector 'faster_rcnn' on 'van_tiny'; expected one of retinanet"):
        create_detector("faster_rcnn", "van_tiny")
    with pytest.raises(SettingError, match="num_classes is 0; expected a number of classes, without the background"):
        create_detector("retinanet", "sk_resnet18", num_classes=0)
    net = create_detector("mask_rcnn", "sk_resnet18", num_classes=3)
    images, boxes, labels, shapes, bits, noise = batch((64, 96), net.noise_size)
    for change, message in (
        (dict(images=images[:, :1]), r"images \(B, 3, H, W\), at least one; found \(2, 1, 64, 96\)"),
        (dict(boxes=boxes[:, :3]), r"targets have the shapes \(2, 3, 4\), \(2, 5\) and \(2, 2\)"),
        (dict(shapes=shapes[:1]), r"image_shapes \(2, 2\)"),
        (dict(bits=bits[..., :7]), r"masks have the shape \(2, 5, 64, 7\); expected \(2, 5, 64, 12\) uint8"),
        (dict(bits=bits.astype(np.float32)), "and are not uint8"),
        (dict(noise=noise[:, :9]), r"takes noise \(2, \d+\); found \(2, 9\)"),
    ):
        given = dict(images=images, boxes=boxes, labels=labels, shapes=shapes, bits=bits, noise=noise) | change
        with pytest.raises(SettingError, match=message):
            net.losses(*arguments(net, *given.values()))
    for change, message in (
        (dict(score_threshold=1.5), "score_threshold is 1.5; expected 0 to 1"),
        (dict(max_detections=0), "max_detections is 0; expected a number from 1 on"),
        (dict(image_shapes=[[64, 97], [64, 96]]), "at most 64 and 96"),
        (dict(image_shapes=[[64, 96]]), r"expected \(2, 2\)"),
    ):
        with pytest.raises(SettingError, match=message):
            net.detect(images, **change)


@pytest.mark.fault("detector-input")
def test_one_image_of_one_cell_cannot_train():
    net = create_detector("ssdlite", "sk_resnet18", num_classes=3).set_train()
    given = batch((64, 64), net.noise_size)
    with pytest.raises(SettingError, match="training with one image a batch"):
        net.losses(*[Tensor(x[:1]) for x in (*given[:4], given[5])])
    assert isinstance(net.ssd_heads[0].proj, nn.Cell) and ms.get_context("mode") == ms.PYNATIVE_MODE


@pytest.mark.fault("detector-ranks")
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_mixed_precision_leaves_boxes_whole(method):
    """Far to the right in a wide image, where float16 is half a pixel off; weights and noise are the same."""
    net = create_detector(method, "sk_resnet18", num_classes=3, drop_path_rate=0.0).set_train()
    given = list(batch((64, 640), net.noise_size))
    given[1][0, :3] = np.float32([[601.3, 5.3, 632.1, 40.7], [560.4, 20.2, 639.4, 60.1], [590.6, 40.4, 606.2, 55.9]])
    expected = {name: float(x.asnumpy()) for name, x in net.losses(*arguments(net, *given)).items()}
    ms.amp.auto_mixed_precision(net, "O2")
    halves = [cell for _, cell in net.cells_and_names() if isinstance(cell, nn.Conv2d) and cell.get_flags().get("fp16")]
    assert len(halves) > 20
    found = {name: float(x.asnumpy()) for name, x in net.losses(*arguments(net, *given)).items()}
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.fault("detector-ranks")
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("mpirun", path=Path(sys.executable).parent), reason="mpirun is not installed")
def test_retinanet_divides_by_the_mean_over_the_ranks():
    """Of two ranks with other numbers of positives, loss and gradients are those of both batches in one process."""
    program = Path(__file__).parent / "programs" / "detector_ranks.py"
    launcher = str(Path(sys.executable).parent / "mpirun")
    done = subprocess.run([launcher, "-n", "2", sys.executable, program], capture_output=True, text=True, timeout=600)
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith(("rank ", "whole "))]
    assert sorted(name for name, *_ in lines) == ["rank", "rank", "whole"], done.stderr[-2000:]
    figures = [[float(x) for x in numbers] for _, *numbers in lines]
    np.testing.assert_allclose(figures, [figures[0]] * 3, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_backbone_of_finer_levels(method):
    """CIFAR's network has three levels of 1, 2 and 4 pixels: anchors are in the strides of these."""
    net = create_detector(method, "sknet29_16x32d", num_classes=3).set_train(False)
    images, boxes, labels, shapes, bits, noise = batch((24, 32), net.noise_size)
    with pynative_mode():
        losses = net.losses(*arguments(net, images, boxes, labels, shapes, bits, noise))
        found = net.detect(images, shapes, score_threshold=0.0, max_detections=5)
        scores, deltas = net.head_maps(Tensor(images))
    assert all(np.isfinite(loss.asnumpy()) for loss in losses.values()) and len(found) == 2
    sizes = [x.shape[2:] for x in scores]
    if method == "ssdlite":
        assert sizes[:2] == [(12, 16), (6, 8)]
        return
    strides = dict(retinanet=(2, 4, 8, 16), mask_rcnn=(1, 2, 4, 8))[method]
    assert net.generator.strides == strides and sizes == [tuple(size) for size in net.generator.map_sizes((24, 32))]
    anchors = net.generator(sizes)
    first = (strides[0] * net.generator.scales[0]) ** 2  # the area of the finest level's smallest anchors
    assert (anchors[0, 2] - anchors[0, 0]) * (anchors[0, 3] - anchors[0, 1]) == pytest.approx(first, rel=1e-5)
    for found in net.detect(images, shapes, score_threshold=0.0):
        assert len(found) and (found.boxes >= 0).all() and (found.boxes[:, 2:] <= [32, 24]).all()


def test_anchors_of_the_published_backbones_are_mmdetections():
    with no_init_parameters():
        for name, strides in (("retinanet", (8, 16, 32, 64, 128)), ("mask_rcnn", (4, 8, 16, 32, 64))):
            assert create_detector(name, "van_tiny_lska_k23").generator.strides == strides
