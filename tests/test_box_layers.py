"""Boxes in graphs decide as the NumPy functions do: matching, suppression, sampling, coders."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindska.acceleration import accelerate, decelerate
from mindska.acceleration.boxes import FusedMaxIouAssigner, FusedSuppression
from mindska.detection import assign
from mindska.detection.anchors import RPN_ANCHORS
from mindska.detection.coder import BOX_HEAD_CODER, MAX_LOG_RATIO, RPN_CODER, clip_boxes
from mindska.detection.nms import nms
from mindska.models.layers import boxes as layers

BOTH = pytest.mark.parametrize("accelerated", [True, False])


def some_boxes(rng, count, side=200.0, rounded=False):
    corners = rng.random((count, 2, 2)) * side
    corners.sort(1)
    boxes = np.concatenate([corners[:, 0], corners[:, 1] + 1], 1).astype(np.float32)
    return np.round(boxes / 8) * 8 + np.float32([0, 0, 8, 8]) if rounded else boxes


def made(cell, accelerated):
    if accelerated:
        accelerate(cell)
        assert isinstance(cell, (FusedMaxIouAssigner, FusedSuppression))
    else:
        decelerate(cell)
    return cell


@BOTH
@pytest.mark.parametrize(
    "thresholds", [(0.5, 0.4, 0.0, True), (0.7, 0.3, 0.3, True), (0.5, 0.5, 0.5, True), (0.5, 0.5, 0.0, False)]
)
def test_assigner_decides_as_numpy(thresholds, accelerated):
    """On a grid, where many IoUs are equal: of equal ones the same is taken; also among one and 3,000 priors."""
    rng, cell = np.random.default_rng(1), made(layers.MaxIouAssigner(*thresholds), accelerated)
    anchors = RPN_ANCHORS([(20, 24), (10, 12), (5, 6), (3, 3), (2, 2)])
    for priors in (anchors, some_boxes(rng, 3000, rounded=True), some_boxes(rng, 1)):
        objects = np.zeros((4, 12, 4), np.float32)
        for i, (count, rounded) in enumerate([(12, True), (7, False), (1, True), (0, False)]):
            objects[i, :count] = some_boxes(rng, count, rounded=rounded)
        objects[0, 3] = objects[0, 5]  # two that are equal
        objects[1, 6] = [900, 900, 950, 950]  # far away
        batch = np.broadcast_to(priors, (4, *priors.shape)).copy()
        found = cell(Tensor(batch), Tensor(objects)).asnumpy()
        assert found.dtype == np.int32
        for i, count in enumerate((12, 7, 1, 0)):
            expected = assign.assign_by_max_iou(objects[i, :count], priors, *thresholds)
            np.testing.assert_array_equal(found[i], expected)


@BOTH
@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_suppression_keeps_what_numpy_keeps(threshold, accelerated):
    rng, cell = np.random.default_rng(2), made(layers.Suppression(threshold), accelerated)
    for count in (1, 15, 300, 1100):
        boxes = np.stack([some_boxes(rng, count), some_boxes(rng, count, 60, rounded=True)])
        boxes[0, count // 2] = 0  # a box of no area
        found = cell(Tensor(boxes)).asnumpy()
        for i in range(2):
            stays = np.zeros(count, bool)
            stays[nms(boxes[i], -np.arange(count, dtype=np.float32), threshold)] = True
            np.testing.assert_array_equal(found[i], stays)


@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE])
def test_samples_are_the_candidates_with_the_highest_keys(mode):
    ms.set_context(mode=mode)
    rng = np.random.default_rng(3)
    noise = rng.random((4, layers.KEY_NOISE), np.float32)
    keys = layers.candidate_keys(Tensor(noise), 3000)
    assert keys.shape == (4, 3000)
    keys = keys.asnumpy()
    assert keys.min() >= 0 and keys.max() < 1 and abs(keys.mean() - 0.5) < 0.02
    matched = rng.integers(-2, 3, (4, 3000)).astype(np.int32)
    matched[1] = np.where(matched[1] > 0, -2, matched[1])  # few positives
    matched[1, ::3] = -2
    matched[2] = -1  # none
    matched[3, 20:] = -2  # few at all
    indices, positive, negative = layers.sampled(Tensor(matched), Tensor(keys), 256, 0.25)
    indices, positive, negative = indices.asnumpy(), positive.asnumpy(), negative.asnumpy()
    for i in range(4):

        def best(candidates, count):
            return candidates[np.argsort(-keys[i, candidates], kind="stable")[:count]]  # noqa: B023

        expected = assign.sample(matched[i], 256, 0.25, best)
        np.testing.assert_array_equal(np.sort(indices[i][positive[i]]), expected.positive)
        np.testing.assert_array_equal(np.sort(indices[i][negative[i]]), expected.negative)
        count = len(expected.positive)
        assert positive[i, :count].all() and not positive[i, count:].any()


def test_few_candidates_are_all_taken():
    matched, keys = Tensor(np.int32([[0, -1, -2, 1]])), Tensor(np.float32([[0.1, 0.2, 0.3, 0.05]]))
    indices, positive, negative = (x.asnumpy()[0] for x in layers.sampled(matched, keys, 256, 0.25))
    assert indices[:3].tolist() == [0, 3, 1]
    assert positive.tolist() == [True, True, False, False] and negative.tolist() == [False, False, True, False]


def test_coders_are_numpys():
    rng = np.random.default_rng(4)
    priors, boxes = some_boxes(rng, 64), some_boxes(rng, 64)
    deltas = rng.standard_normal((64, 4), dtype=np.float32) * 4
    for coder in (RPN_CODER, BOX_HEAD_CODER):
        found = layers.encode_deltas(Tensor(priors), Tensor(boxes), coder.stds).asnumpy()
        np.testing.assert_allclose(found, coder.encode(priors, boxes), rtol=2e-6, atol=2e-6)
        stds = Tensor(coder.stds, ms.float32)
        found = layers.decode_deltas(Tensor(priors), Tensor(deltas), MAX_LOG_RATIO, stds).asnumpy()
        np.testing.assert_allclose(found, coder.decode(priors, deltas), rtol=2e-6, atol=2e-4)
    found = layers.clip_to_images(Tensor(found[None]), Tensor(np.int32([[100, 150]]))).asnumpy()[0]
    np.testing.assert_allclose(found, clip_boxes(coder.decode(priors, deltas), (100, 150)), rtol=2e-6, atol=2e-4)
