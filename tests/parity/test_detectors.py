"""Detectors compute the originals' functions: maps, losses, gradients, detections."""

import mindspore as ms
import numpy as np
import pytest
from detector_ports import (
    MASK_RCNN,
    MODELS,
    RETINANET,
    SSDLITE,
    Gradients,
    MaskRcnnGradients,
    batch,
    fixed_proposals,
    gradient_errors,
    gradient_values,
    image_shapes,
    images,
    mask_rcnn_batch,
    objects,
    port,
    trained,
)
from detectors import dense_golden
from mindspore import Tensor

from mindska import create_detector

NOISE = 2e-5  # of maps: the largest difference over the standard deviation


def at(case: str, tap: str, array) -> float:
    """The largest difference of an array from a golden's float64 values, over their standard deviation."""
    arrays = dense_golden(case)[1]
    expected = arrays[f"{tap}/val_f64"]
    found = array.asnumpy() if isinstance(array, Tensor) else array
    return float(np.abs(found.reshape(-1)[arrays[f"{tap}/idx"]] - expected).max() / expected.std())


def check_detections(found, case: str, name: str) -> None:
    arrays = dense_golden(case)[1]
    assert np.array_equal(found.labels, arrays[f"{name}/labels_f64"])
    assert np.abs(found.boxes - arrays[f"{name}/boxes_f64"]).max() < 1e-3
    assert np.abs(found.scores - arrays[f"{name}/scores_f64"]).max() < 2e-5
    assert (found.boxes.dtype, found.scores.dtype, found.labels.dtype) == (np.float32, np.float32, np.int32)


@pytest.mark.parametrize("case", MODELS)
def test_parameters(case):
    net = create_detector(MODELS[case])
    assert sum(p.size for p in net.trainable_params()) == dense_golden(case)[0]["params"]


def check_retinanet(net) -> None:
    scores, deltas = net(images(RETINANET))
    for level in range(5):
        assert at(RETINANET, f"cls{level}", scores[level]) < NOISE
        assert at(RETINANET, f"reg{level}", deltas[level]) < NOISE
    for i, found in enumerate(net.detect(images(RETINANET), image_shapes(RETINANET))):
        check_detections(found, RETINANET, f"det/{i}")


def check_retinanet_training(net) -> None:
    losses, gradients = trained(Gradients(net), RETINANET, *batch(RETINANET))
    expected = dense_golden(RETINANET)[0]["losses"]["f64"]
    assert losses[0] == pytest.approx(sum(expected["loss_cls_per_level"]), rel=1e-6)
    assert losses[1] == pytest.approx(sum(expected["loss_bbox_per_level"]), rel=1e-6)
    assert sum(losses) == pytest.approx(expected["total"], rel=1e-6)
    errors = gradient_errors(gradients, RETINANET)
    assert max(errors.values()) < 1e-4, sorted(errors.items(), key=lambda item: -item[1])[:5]
    assert max(gradient_values(gradients, RETINANET).values()) < 1e-3


@pytest.mark.slow
def test_retinanets_maps_and_detections():
    check_retinanet(port(RETINANET))


@pytest.mark.slow
@pytest.mark.parametrize("accelerated", [True, False])
def test_retinanets_losses_and_gradients(accelerated):
    check_retinanet_training(port(RETINANET, accelerated))


@pytest.mark.slow
def test_retinanet_in_graph_mode(graph):
    net = port(RETINANET)
    check_retinanet(net)
    check_retinanet_training(net)
    assert ms.get_context("mode") == ms.GRAPH_MODE


def check_ssdlite(net) -> None:
    """Neighbours of SkaNet's graphs that are equally near to rounding may be swapped by a correct float32 network: what
    then may differ is what PyTorch's own runs do."""
    meta, arrays = dense_golden(SSDLITE)
    scores, deltas, priors = net.flat_maps(images(SSDLITE))
    errors = at(SSDLITE, "confidences", scores), at(SSDLITE, "locations", deltas)
    swapped = max(errors) > NOISE
    assert max(errors) < (1e-2 if swapped else NOISE)
    assert np.array_equal(priors, arrays["anchors"])
    for i, found in enumerate(net.detect(images(SSDLITE))):
        expected = {name: arrays[f"det/{i}/{name}_f64"] for name in ("boxes", "scores", "labels")}
        assert len(found) == 200
        if swapped:
            assert np.abs(found.scores - expected["scores"]).max() < 2e-3
            continue
        ours = np.lexsort((found.labels, np.round(found.scores, 5)))
        theirs = np.lexsort((expected["labels"] - 1, np.round(expected["scores"], 5)))
        assert np.array_equal(found.labels[ours] + 1, expected["labels"][theirs])
        assert np.abs(found.boxes[ours] - 160 * expected["boxes"][theirs]).max() < 1e-3
        assert np.abs(found.scores[ours] - expected["scores"][theirs]).max() < 2e-5


def check_ssdlite_training(net) -> None:
    losses, gradients = trained(Gradients(net), SSDLITE, *batch(SSDLITE))
    expected = dense_golden(SSDLITE)[0]["loss"]["f64"]
    errors, values = gradient_errors(gradients, SSDLITE), gradient_values(gradients, SSDLITE)
    swapped = max(errors.values()) > 1e-4
    tolerance = 1e-2 if swapped else 1e-6
    assert losses == pytest.approx([expected["cls_loss"], expected["reg_loss"]], rel=tolerance)
    assert sum(losses) == pytest.approx(expected["total_loss"], rel=tolerance)
    assert max(errors.values()) < (5e-2 if swapped else 1e-4)
    assert max(values.values()) < (1.0 if swapped else 1e-3)


@pytest.mark.slow
def test_ssdlites_maps_and_detections():
    check_ssdlite(port(SSDLITE))


@pytest.mark.slow
@pytest.mark.parametrize("accelerated", [True, False])
def test_ssdlites_losses_and_gradients(accelerated):
    check_ssdlite_training(port(SSDLITE, accelerated))


@pytest.mark.slow
def test_ssdlite_in_graph_mode(graph):
    check_ssdlite_training(port(SSDLITE))


def check_mask_rcnn(net) -> None:
    meta, arrays = dense_golden(MASK_RCNN)
    shapes = image_shapes(MASK_RCNN)
    pyramid, scores, deltas = net.graphs["maps"](images(MASK_RCNN))
    for level in range(5):
        assert at(MASK_RCNN, f"rpn_cls{level}", scores[level]) < NOISE
        assert at(MASK_RCNN, f"rpn_reg{level}", deltas[level]) < NOISE
    for level in range(4):
        assert at(MASK_RCNN, f"neck{level}", pyramid[level]) < NOISE
    boxes, valid = (x.asnumpy() for x in net.proposals(scores, deltas, Tensor(shapes)))
    assert valid.sum(1).tolist() == [data["n_train"] for data in meta["proposals"]]
    for i in range(2):
        assert np.abs(boxes[i, :100] - arrays[f"prop_train/{i}/boxes_f64"]).max() < 1e-3
    sizes = [tuple(shape) for shape in shapes.tolist()]
    for kind, found in (
        ("fixed", net.detections_in(pyramid, fixed_proposals(), sizes, 0.05, 100)),
        ("full", net.detect(images(MASK_RCNN), shapes)),
    ):
        for i, some in enumerate(found):
            check_detections(some, MASK_RCNN, f"det_{kind}/{i}")
            expected = meta["detections"][f"det_{kind}/{i}"]
            assert list(some.masks.shape) == expected["mask_shape"] and some.masks.dtype == bool
            # The full ones come from boxes with their own rounding.
            assert np.abs(some.masks.sum((1, 2)) - expected["mask_areas_f64"]).sum() <= (1 if kind == "fixed" else 2)


def check_mask_rcnn_heads(net) -> None:
    """What the heads see and say of the fixed proposals, all maps of the masks included."""
    pyramid = net.graphs["maps"](images(MASK_RCNN))[0]
    rois = net._filled_up(fixed_proposals(), 30)
    used = np.concatenate([np.arange(30 * i, 30 * i + len(boxes)) for i, boxes in enumerate(fixed_proposals())])
    small, large = (align(pyramid, rois).asnumpy()[used] for align in (net.box_roi_align, net.mask_roi_align))
    assert at(MASK_RCNN, "roi7", small) < 2e-5 and at(MASK_RCNN, "roi14", large) < 2e-5
    scores, deltas = net.roi_head.bbox_head(Tensor(small))
    assert at(MASK_RCNN, "cls_score", scores) < NOISE and at(MASK_RCNN, "bbox_pred", deltas) < NOISE
    maps = net.roi_head.mask_head(Tensor(large)).asnumpy()
    assert at(MASK_RCNN, "mask", maps) < NOISE
    classes = np.arange(len(maps), dtype=np.int32) % 80
    own = net.roi_head.mask_head.of_classes(Tensor(large), Tensor(classes)).asnumpy()
    np.testing.assert_allclose(own, maps[np.arange(len(maps)), classes], atol=1e-4)


def check_mask_rcnn_training(net) -> None:
    losses, gradients = trained(MaskRcnnGradients(net), MASK_RCNN, *mask_rcnn_batch())
    expected = dense_golden(MASK_RCNN)[0]["losses"]["f64"]
    names = ("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask")
    assert losses == pytest.approx([expected[name] for name in names], rel=1e-6)
    errors = gradient_errors(gradients, MASK_RCNN)
    assert max(errors.values()) < 1e-4, sorted(errors.items(), key=lambda item: -item[1])[:5]
    assert max(gradient_values(gradients, MASK_RCNN).values()) < 1e-3


@pytest.mark.slow
def test_mask_rcnns_maps_heads_and_detections():
    net = port(MASK_RCNN)
    check_mask_rcnn(net)
    check_mask_rcnn_heads(net)


@pytest.mark.slow
@pytest.mark.parametrize("accelerated", [True, False])
def test_mask_rcnns_losses_and_gradients(accelerated):
    check_mask_rcnn_training(port(MASK_RCNN, accelerated))


def test_mask_rcnns_targets():
    """What is sampled of the fixed proposals, and what of it is positive."""
    meta, arrays = dense_golden(MASK_RCNN)
    net = create_detector(MODELS[MASK_RCNN])
    _, boxes, labels, _, _, _, _, _, proposed, valid, noise = mask_rcnn_batch()
    boxes, labels = net.checked_targets(images(MASK_RCNN), boxes, labels, Tensor(image_shapes(MASK_RCNN)))
    rois, positive, negative, numbers = net.sampled_rois(proposed, valid, boxes, labels, noise)
    for i in range(2):
        is_positive, is_negative = positive.asnumpy()[i], negative.asnumpy()[i]
        priors, count = arrays[f"rcnn_targets/{i}/priors"], len(arrays[f"rcnn_targets/{i}/pos_idx"])

        def ordered(some):
            return some[np.lexsort(some.T)]

        np.testing.assert_array_equal(ordered(rois.asnumpy()[i][is_positive]), ordered(priors[:count]))
        np.testing.assert_array_equal(ordered(rois.asnumpy()[i][is_negative]), ordered(priors[count:]))
        found = np.sort(numbers.asnumpy()[i][is_positive])
        np.testing.assert_array_equal(found, np.sort(arrays[f"rcnn_targets/{i}/pos_gt"]))
    assert objects(MASK_RCNN)[1].max() == max(map(max, meta["gt_labels"]))


@pytest.mark.slow
def test_mask_rcnn_in_graph_mode(graph):
    """Detection is in graphs as well: boxes must not be compiled into them."""
    net = port(MASK_RCNN)
    check_mask_rcnn(net)
    check_mask_rcnn_training(net)
