"""Detectors compute the originals' functions: maps, losses, gradients, detections."""

import mindspore as ms
import numpy as np
import pytest
from detector_ports import (
    MODELS,
    RETINANET,
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


@pytest.mark.parametrize("case", [RETINANET])
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
def test_retinanets_maps_and_detections_without_cpp_operators():
    check_retinanet(port(RETINANET, accelerated=False))


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
