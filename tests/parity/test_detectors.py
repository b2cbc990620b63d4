"""Detectors compute the originals' functions: maps, losses, gradients, detections."""

import mindspore as ms
import numpy as np
import pytest
from detector_ports import (
    MODELS,
    RETINANET,
    SSDLITE,
    Gradients,
    batch,
    gradient_errors,
    gradient_values,
    image_shapes,
    images,
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


@pytest.mark.parametrize("case", [RETINANET, SSDLITE])
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


def test_ssdlites_maps_and_detections():
    check_ssdlite(port(SSDLITE))


@pytest.mark.slow
@pytest.mark.parametrize("accelerated", [True, False])
def test_ssdlites_losses_and_gradients(accelerated):
    check_ssdlite_training(port(SSDLITE, accelerated))


@pytest.mark.slow
def test_ssdlite_in_graph_mode(graph):
    check_ssdlite_training(port(SSDLITE))
