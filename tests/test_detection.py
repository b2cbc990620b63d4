"""Boxes, targets and detections where no original's figure decides: by the originals' rules, and at the borders."""

from __future__ import annotations

import math
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mindska.detection import assign, postprocess
from mindska.detection.anchors import RETINANET_ANCHORS, RPN_ANCHORS, ssd_priors
from mindska.detection.coder import BOX_HEAD_CODER, RETINANET_CODER, SSD_CODER, to_centre_form, to_corner_form
from mindska.detection.masks import mask_targets, pack, unpack
from mindska.detection.nms import nms, nms_per_class
from mindska.errors import DataError, SettingError

NUMPY = {
    "anchors", "assign", "check", "coco", "coco_file", "coder", "masks", "metrics", "nms", "pictures", "postprocess",
    "rle", "roi_align", "transforms",
}  # fmt: skip
EMPTY = np.zeros((0, 4), np.float32)


def random_boxes(count: int, side: float = 800, largest: float = 200, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    corners = rng.random((count, 2)) * (side - largest)
    return np.concatenate([corners, corners + 2 + rng.random((count, 2)) * (largest - 2)], 1).astype(np.float32)


def test_what_is_numpy_loads_no_mindspore():
    names = [path.stem for path in Path(assign.__file__).parent.glob("*.py") if path.stem in NUMPY]
    assert len(names) == len(NUMPY)
    imports = "; ".join(f"import mindska.detection.{name}" for name in names)
    program = f"import sys; {imports}; assert 'mindspore' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


# Anchors


def test_another_number_of_maps_is_refused():
    with pytest.raises(SettingError, match=r"4 maps.*strides \(8, 16, 32, 64, 128\)"):
        RETINANET_ANCHORS([(8, 8)] * 4)
    with pytest.raises(SettingError, match="5 maps; expected 6"):
        ssd_priors([(8, 8)] * 5)


def test_anchors_are_computed_once_and_cannot_be_changed():
    sizes = RPN_ANCHORS.map_sizes((64, 96))
    assert RPN_ANCHORS(sizes) is RPN_ANCHORS(sizes)
    with pytest.raises(ValueError, match="read-only"):
        RPN_ANCHORS(sizes)[0] = 0


def test_anchors_beyond_the_own_padding_are_ignored():
    sizes = RETINANET_ANCHORS.map_sizes((128, 256))
    valid = RETINANET_ANCHORS.valid(sizes, (128, 128))
    alone = RETINANET_ANCHORS.map_sizes((128, 128))
    assert valid.sum() == sum(RETINANET_ANCHORS.level_sizes(alone)) < len(valid)
    standing = RETINANET_ANCHORS.valid(RETINANET_ANCHORS.map_sizes((256, 256)), (128, 256))
    assert standing.sum() == sum(RETINANET_ANCHORS.level_sizes(sizes))
    assert standing[: 16 * 32 * 9].all() and not standing[16 * 32 * 9 : 32 * 32 * 9].any()
    box, anchors = np.float32([[10, 10, 60, 60]]), RETINANET_ANCHORS(sizes)
    targets = assign.retinanet_targets(anchors, box, [3], valid)
    assert (targets.labels[~valid] == assign.IGNORED).all()
    assert np.array_equal(targets.labels[valid], assign.retinanet_targets(RETINANET_ANCHORS(alone), box, [3]).labels)


def test_priors_of_an_image_that_is_not_square():
    priors = ssd_priors([(2, 4), (1, 2), (1, 1), (1, 1), (1, 1), (1, 1)])
    assert priors[:, :2].reshape(-1, 2)[0].tolist() == [0.125, 0.25]  # a share of the width, and of the height
    assert priors.min() >= 0 and priors.max() <= 1 and priors[0, 2] == priors[0, 3]


# Coders


def test_the_clamp_of_a_decoded_box():
    prior, limit = np.float32([[0, 0, 10, 20]]), math.log(1000 / 16)
    for coder, std in ((RETINANET_CODER, 1.0), (BOX_HEAD_CODER, 0.2)):
        wide = coder.decode(prior, np.float32([[0, 0, 50, -50]]))[0]
        assert wide[2] - wide[0] == pytest.approx(10 * 1000 / 16, rel=1e-5)
        assert wide[3] - wide[1] == pytest.approx(20 * 16 / 1000, rel=1e-4)
        within = coder.decode(prior, np.float32([[0, 0, (limit - 0.01) / std, 0]]))[0]
        assert within[2] - within[0] == pytest.approx(10 * math.exp(limit - 0.01), rel=1e-5)
    assert np.isfinite(SSD_CODER.decode(np.float32([[0.5, 0.5, 0.1, 0.1]]), np.float32([[0, 0, 25, 0]]))).all()
    assert SSD_CODER.decode(np.float32([[0.5, 0.5, 0.1, 0.1]]), np.float32([[0, 0, 25, 0]]))[0, 2] > 7  # no clamp


@pytest.mark.parametrize("coder", [RETINANET_CODER, BOX_HEAD_CODER])
def test_what_is_encoded_is_decoded(coder):
    priors, boxes = random_boxes(50), random_boxes(50, seed=1)
    assert coder.decode(priors, coder.encode(priors, boxes)) == pytest.approx(boxes, abs=1e-2)
    assert to_corner_form(to_centre_form(boxes)) == pytest.approx(boxes, abs=1e-4)


# Non-maximum suppression


def plain_nms(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    kept: list[int] = []
    for i in np.argsort(-scores, kind="stable"):
        if all(assign.box_iou(boxes[i : i + 1], boxes[j : j + 1], 0)[0, 0] <= np.float32(threshold) for j in kept):
            kept.append(int(i))
    return kept


@pytest.mark.parametrize("count", [0, 1, 2, 600])
def test_nms_of_blocks_is_the_plain_one(count):
    boxes, scores = random_boxes(count, 400), np.random.default_rng(1).integers(0, 20, count).astype(np.float32)
    expected = plain_nms(boxes, scores, 0.3)
    assert nms(boxes, scores, 0.3).tolist() == expected
    assert nms(boxes, scores, 0.3, limit=7).tolist() == expected[:7]
    classes = np.arange(count) % 3
    by_class = [np.flatnonzero(classes == c) for c in range(3)]
    kept = sorted(int(some[i]) for some in by_class for i in plain_nms(boxes[some], scores[some], 0.3))
    found = nms_per_class(boxes, scores, classes, 0.3)
    assert sorted(found.tolist()) == kept
    assert (np.diff(scores[found]) <= 0).all()
    for limit in (5, count, 10 * count):
        assert nms_per_class(boxes, scores, classes, 0.3, limit).tolist() == found[:limit].tolist()


def test_a_box_goes_only_above_the_threshold_and_the_first_of_equal_ones_stays():
    boxes = np.float32([[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 10]])  # the IoU is a half
    assert nms(boxes, np.float32([0.5, 0.5, 0.5]), 0.5).tolist() == [0, 1]
    assert nms(boxes, np.float32([0.5, 0.5, 0.6]), 0.49).tolist() == [2]


# Assigners


def test_an_image_without_objects_is_background():
    sizes = RETINANET_ANCHORS.map_sizes((64, 64))
    anchors = RETINANET_ANCHORS(sizes)
    for boxes in (EMPTY, np.zeros(0), []):
        targets = assign.retinanet_targets(anchors, boxes, np.zeros(0, int))
        assert (targets.labels == assign.BACKGROUND).all() and not targets.deltas.any()
        targets = assign.rpn_targets(anchors, boxes)
        samples = assign.sample_rpn(targets.matched, np.random.default_rng(0))
        assert len(samples.positive) == 0 and len(samples.negative) == 256
        heads = assign.box_head_targets(random_boxes(30), boxes, [], 80, np.random.default_rng(0))
        assert heads.num_positive == 0 and (heads.labels == 80).all() and len(heads.boxes) == 30
        targets = assign.ssd_targets(ssd_priors([(4, 4)] * 6), boxes, [])
        assert (targets.labels == assign.BACKGROUND).all()
    nothing = assign.box_head_targets(EMPTY, EMPTY, [], 80, np.random.default_rng(0))
    assert nothing.boxes.shape == (0, 4) and nothing.num_positive == 0


def test_a_batch_without_objects_has_no_mined_negatives():
    assert not assign.hard_negatives(np.ones((2, 9), np.float32), np.zeros((2, 9), bool)).any()


@pytest.mark.fault("coco-boxes")
@pytest.mark.parametrize("box", [[0, 0, 0, 0], [5, 5, 5, 9], [9, 5, 5, 9], [0, 0, np.nan, 5], [0, 0, np.inf, 5]])
def test_a_box_without_area_is_refused_with_a_hint(box):
    boxes = np.float32([[1, 1, 8, 8], box])
    priors = ssd_priors([(4, 4)] * 6)
    for assigned in (
        lambda: assign.retinanet_targets(random_boxes(9), boxes, [0, 1]),
        lambda: assign.rpn_targets(random_boxes(9), boxes),
        lambda: assign.box_head_targets(random_boxes(9), boxes, [0, 1], 80, np.random.default_rng(0)),
        lambda: assign.ssd_targets(priors, boxes, [0, 1]),
    ):
        with pytest.raises(DataError, match=r"Box 1 of 2 is .*shape \(0, 4\), no box of zeros"):
            assigned()
    with pytest.raises(DataError, match=r"shape \(4,\); expected \(n, 4\)"):
        assign.check_boxes(np.ones(4))


def test_an_object_takes_all_anchors_that_tie_for_its_best():
    anchors = np.float32([[0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30], [100, 100, 110, 110]])
    boxes = np.float32([[0, 0, 10, 30]])  # an IoU of a third
    assert assign.assign_by_max_iou(boxes, anchors, 0.5, 0.4).tolist() == [0, 0, -1, -1]
    assert assign.assign_by_max_iou(boxes, anchors, 0.5, 0.4, match_low_quality=False).tolist() == [-1] * 4
    assert assign.assign_by_max_iou(boxes, anchors, 0.7, 0.3, 0.34).tolist() == [-2, -2, -1, -1]  # below the least
    # Of two objects that have the same best anchor, the later one takes it, even from a better match.
    both = np.float32([[0, 0, 10, 10], [0, 0, 10, 30]])
    assert assign.assign_by_max_iou(both, anchors, 0.5, 0.4).tolist() == [1, 1, -1, -1]
    # One that touches nothing takes nothing: in the original it would take all.
    assert assign.assign_by_max_iou(np.float32([[500, 0, 510, 9]]), anchors, 0.5, 0.4).tolist() == [-1] * 4


def test_the_box_head_matches_low_quality():
    """From 0.5 on, and there an object's best proposal is positive by its IoU in any case: nothing changes below."""
    proposals = np.float32([[0, 0, 10, 10], [0, 0, 10, 11]])
    heads = assign.box_head_targets(proposals, np.float32([[0, 0, 10, 21]]), [7], 80, np.random.default_rng(0))
    # the object itself, then the second (11 / 21 > 0.5); the first is below
    assert heads.samples.positive.tolist() == [0, 2] and heads.samples.negative.tolist() == [1]
    assert heads.labels.tolist() == [7, 7, 80] and not heads.deltas[0].any() and heads.deltas[1].any()
    # Where two objects share their best proposal, the later takes it although the first fits it better.
    objects = np.float32([[0, 0, 10, 11], [0, 0, 10, 17]])
    heads = assign.box_head_targets(proposals, objects, [1, 2], 80, np.random.default_rng(0))
    assert heads.matched[heads.samples.positive.tolist().index(3)] == 1


def test_two_objects_that_share_a_prior():
    priors = np.float32([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]])
    boxes = np.float32([[0, 0, 0.5, 0.5], [0, 0, 0.4, 0.4]])
    assert assign.match_ssd(boxes, priors).tolist() == [1, -1]  # the later one
    assert assign.match_ssd(boxes[::-1], priors).tolist() == [1, -1]
    assert assign.match_ssd(np.float32([[0, 0, 0.05, 0.05]]), priors).tolist() == [0, -1]  # forced, whatever its IoU


def test_the_term_in_the_iou_of_ssd():
    """1e-5 in the denominator: an IoU of just a half is below it."""
    priors = np.float32([[0.5, 0.5, 0.02, 0.01], [0.5, 0.5, 0.02, 0.0101], [0.5, 0.5, 0.02, 0.02]])
    box = np.float32([[0.49, 0.49, 0.51, 0.51]])
    shared = np.float32([0.02 * 0.01, 0.02 * 0.0101])
    assert (shared / np.float32(0.02 * 0.02) >= 0.4999).all()
    assert (shared / np.float32(0.02 * 0.02 + 1e-5) < 0.5).all()
    assert assign.match_ssd(box, priors).tolist() == [-1, -1, 0]


@pytest.mark.fault("many-objects")
def test_thousands_of_boxes_take_bounded_memory(monkeypatch):
    sizes = RETINANET_ANCHORS.map_sizes((256, 320))
    anchors, boxes = RETINANET_ANCHORS(sizes), random_boxes(2000, 320, 80)
    boxes[1000:] = boxes[:1000]  # of two that are alike the first has the anchors, in whatever chunks they are
    labels = np.arange(2000) % 80
    priors, shares = ssd_priors([(20, 20), (10, 10), (5, 5), (3, 3), (2, 2), (1, 1)]), boxes / np.float32(320)
    monkeypatch.setattr(assign, "CHUNK", 1 << 40)
    whole, whole_ssd = assign.retinanet_targets(anchors, boxes, labels), assign.ssd_targets(priors, shares, labels)
    monkeypatch.setattr(assign, "CHUNK", 1 << 20)
    tracemalloc.start()
    chunked, chunked_ssd = assign.retinanet_targets(anchors, boxes, labels), assign.ssd_targets(priors, shares, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    for one, other in ((whole, chunked), (whole_ssd, chunked_ssd)):
        assert all(np.array_equal(a, b) for a, b in zip(one, other))
    assert peak < 64 << 20  # all pairs at once: 117 MiB an array


def test_samples_come_from_the_generator_alone():
    matched = np.full(5000, assign.BACKGROUND, np.int32)
    matched[::7], matched[::11] = 3, assign.IGNORED
    first = assign.sample_rpn(matched, np.random.default_rng(5))
    again = assign.sample_rpn(matched, np.random.default_rng(5))
    other = assign.sample_rpn(matched, np.random.default_rng(6))
    assert len(first.positive) == len(first.negative) == 128
    assert (matched[first.positive] == 3).all() and (matched[first.negative] == assign.BACKGROUND).all()
    assert np.array_equal(first.positive, again.positive) and np.array_equal(first.negative, again.negative)
    assert not np.array_equal(first.positive, other.positive)
    few = assign.sample(matched[:40], 512, 0.25, lambda candidates, count: pytest.fail("nothing is to be drawn"))
    assert len(few.positive) + len(few.negative) == (matched[:40] != assign.IGNORED).sum()


def test_targets_of_fixed_shapes():
    sizes = RPN_ANCHORS.map_sizes((64, 96))
    anchors, boxes = RPN_ANCHORS(sizes), np.float32([[5, 5, 40, 40], [30, 10, 90, 60]])
    targets = assign.rpn_targets(anchors, boxes)
    samples = assign.sample(targets.matched, 20, 0.05, np.random.default_rng(0))
    assert len(samples.positive) == 1 < (targets.matched >= 0).sum()
    fixed = assign.sampled_targets(targets, samples)
    assert [array.shape for array in fixed] == [array.shape for array in targets]
    assert [array.dtype for array in fixed] == [np.int32, np.int32, np.float32]
    assert np.array_equal(np.flatnonzero(fixed.labels == 0), samples.positive)
    assert np.array_equal(np.flatnonzero(fixed.labels == assign.BACKGROUND), samples.negative)
    assert np.array_equal(fixed.deltas[samples.positive], targets.deltas[samples.positive])
    assert (fixed.labels == assign.IGNORED).sum() == len(anchors) - 20 and not fixed.deltas[fixed.labels < 0].any()

    for objects, labels in ((boxes, [3, 7]), (EMPTY, [])):
        heads = assign.box_head_targets(random_boxes(30, 100, 60), objects, labels, 80, np.random.default_rng(0))
        rois, classes, deltas, matched = heads.padded(64)
        assert rois.shape == deltas.shape == (64, 4) and classes.shape == matched.shape == (64,)
        count = len(heads.boxes)
        assert np.array_equal(rois[:count], heads.boxes) and np.array_equal(classes[:count], heads.labels)
        assert (classes[count:] == assign.IGNORED).all() and not rois[count:].any()
        assert matched[: heads.num_positive].tolist() == heads.matched.tolist()
        assert (matched[heads.num_positive :] == assign.BACKGROUND).all()
        with pytest.raises(ValueError, match="do not fit into 5"):
            heads.padded(5)


def test_hard_negatives_are_the_hardest():
    positive = np.zeros((2, 10), bool)
    positive[0, 2] = True
    loss = np.float32([np.arange(10), np.arange(10)])
    mined = assign.hard_negatives(loss, positive)
    assert np.flatnonzero(mined[0]).tolist() == [2, 7, 8, 9] and not mined[1].any()
    assert np.flatnonzero(assign.hard_negatives(loss * 0, positive)[0]).tolist() == [0, 1, 2, 3]  # the first of equals
    positive[0, :5] = True
    assert assign.hard_negatives(loss, positive)[0].all()  # no more than there are


# Detections


def retinanet_maps(value: float, size: tuple[int, int] = (64, 64), classes: int = 3):
    sizes = RETINANET_ANCHORS.map_sizes(size)
    return [np.full((9 * classes, *s), value, np.float32) for s in sizes], [
        np.zeros((36, *s), np.float32) for s in sizes
    ]


def test_a_blank_image_has_no_detections():
    found = postprocess.retinanet_detections(*retinanet_maps(-9.0), (64, 64))
    assert found.boxes.shape == (0, 4) and found.scores.shape == found.labels.shape == (0,) and len(found) == 0
    priors = ssd_priors([(4, 4)] * 6)
    scores = np.zeros((len(priors), 4), np.float32)
    scores[:, 0] = 20
    found = postprocess.ssd_detections(scores, np.zeros_like(priors), priors, (50, 100))
    assert found.boxes.shape == (0, 4) and found.boxes.dtype == np.float32
    for rois in (EMPTY, random_boxes(3)):
        scores = np.zeros((len(rois), 4), np.float32)
        scores[:, -1] = 20
        assert len(postprocess.box_head_detections(rois, scores, np.zeros((len(rois), 12), np.float32), (50, 50))) == 0
    assert postprocess.no_detections((5, 7)).masks.shape == (0, 5, 7)
    assert postprocess.paste_masks(np.zeros((0, 28, 28)), EMPTY, (5, 7)).shape == (0, 5, 7)


def test_detections_of_retinanet_are_what_the_plain_rule_gives():
    rng = np.random.default_rng(3)
    scores, deltas = retinanet_maps(0.0)
    scores = [rng.normal(-3, 1.5, level.shape).astype(np.float32) for level in scores]
    deltas = [rng.normal(0, 0.3, level.shape).astype(np.float32) for level in deltas]
    boxes, confidences, labels = [], [], []
    for i, (logits, regression) in enumerate(zip(scores, deltas)):  # everything is decoded, in the anchors' order
        probabilities = postprocess.sigmoid(logits.transpose(1, 2, 0).reshape(-1, 3)).reshape(-1)
        order = np.argsort(-probabilities, kind="stable")[:40]
        order = order[probabilities[order] > np.float32(0.05)]
        anchors = RETINANET_ANCHORS.level(i, logits.shape[1:])
        decoded = RETINANET_CODER.decode(anchors, regression.transpose(1, 2, 0).reshape(-1, 4), (60, 50))
        boxes.append(decoded[order // 3])
        confidences.append(probabilities[order])
        labels.append(order % 3)
    boxes, confidences, labels = map(np.concatenate, (boxes, confidences, labels))
    in_image = (boxes[:, 2:] > boxes[:, :2]).all(1)
    boxes, confidences, labels = boxes[in_image], confidences[in_image], labels[in_image]
    kept = nms_per_class(boxes, confidences, labels, 0.5, 25)
    found = postprocess.retinanet_detections(scores, deltas, (60, 50), max_candidates=40, max_detections=25)
    assert np.array_equal(found.boxes, boxes[kept]) and np.array_equal(found.scores, confidences[kept])
    assert np.array_equal(found.labels, labels[kept])
    assert found.boxes[:, 2].max() <= 50 and found.boxes[:, 3].max() <= 60


def test_of_equal_scores_the_first_candidates_are_taken():
    scores, deltas = retinanet_maps(2.0)
    found = postprocess.retinanet_detections(scores[:1], deltas[:1], (64, 64), max_candidates=5, nms_threshold=1.0)
    anchors = RETINANET_ANCHORS.level(0, (8, 8))
    expected = np.clip(anchors[[0, 0, 0, 1, 1]], 0, 64)
    assert np.array_equal(found.boxes, expected) and found.labels.tolist() == [0, 1, 2, 0, 1]


def test_a_map_of_nan_gives_no_detections():
    scores, deltas = retinanet_maps(2.0)
    deltas = [level * np.nan for level in deltas]
    assert len(postprocess.retinanet_detections(scores, deltas, (64, 64))) == 0
    priors = ssd_priors([(4, 4)] * 6)
    with np.errstate(over="ignore"):
        found = postprocess.ssd_detections(np.zeros((len(priors), 3), np.float32), np.full_like(priors, 1e4), priors)
    assert len(found) == 0  # nor does one without end


def test_the_top_400_of_a_class_of_ssd():
    priors = np.float32([[0.5, 0.5, 0.001, 0.001]]).repeat(900, 0)
    priors[:, 0] = np.arange(900) / 900
    scores = np.zeros((900, 3), np.float32)
    scores[:, 1] = 5 + np.arange(900) / 900
    found = postprocess.ssd_detections(scores, np.zeros((900, 4), np.float32), priors, max_detections=10_000)
    of_class = found.labels == 0
    assert of_class.sum() == 400 and found.scores[of_class].min() == postprocess.softmax(scores)[500:, 1].min()
    assert (found.labels == 1).sum() == 0  # exp(0) of exp(5) is below 0.01
    assert len(postprocess.ssd_detections(scores, np.zeros((900, 4), np.float32), priors)) == 200


def test_boxes_of_ssd_in_pixels_lie_within_the_image():
    priors = ssd_priors([(4, 4)] * 6)
    scores = np.random.default_rng(0).normal(0, 2, (len(priors), 5)).astype(np.float32)
    shares = postprocess.ssd_detections(scores, np.zeros_like(priors), priors)
    pixels = postprocess.ssd_detections(scores, np.zeros_like(priors), priors, (100, 300))
    assert shares.boxes.min() < 0
    assert np.allclose(pixels.boxes, np.clip(shares.boxes * np.float32([300, 100, 300, 100]), 0, [300, 100, 300, 100]))


@pytest.mark.fault("coco-figures")
def test_detections_return_to_the_original_pixels():
    found = postprocess.Detections(np.float32([[20, 30, 90, 400]]), np.float32([0.5]), np.int32([1]))
    assert found.in_original_pixels((2.0, 3.0), (120, 40)).boxes.tolist() == [[10, 10, 40, 120]]


def test_a_mask_of_a_box_without_area_is_empty_and_others_stay_in_the_image():
    masks = np.ones((3, 28, 28), np.float32)
    boxes = np.float32([[5, 5, 5, 9], [-10, -10, 10, 10], [18, 3, 40, 90]])
    with np.errstate(all="raise"):
        pasted = postprocess.paste_masks(masks, boxes, (20, 30))
    assert not pasted[0].any()
    assert pasted[1][:10, :10].all() and pasted[1].sum() == 100
    assert pasted[2][3:, 18:].all() and pasted[2].sum() == 17 * 12


# Targets of masks


def test_masks_as_bits_and_their_targets():
    masks = np.zeros((2, 32, 40), np.uint8)
    masks[0, 4:20, 8:24] = 1
    masks[0, 10:14, 14:18] = 0  # a hole
    bits = pack(masks)
    assert bits.shape == (2, 32, 5) and np.array_equal(unpack(bits, 40), masks)
    targets = mask_targets(bits, np.float32([[8, 4, 24, 20], [8, 4, 24, 20], [30, 30, 39, 31]]), [0, 1, 0], 16)
    assert np.array_equal(targets[0], masks[0, 4:20, 8:24]) and not targets[1:].any()
    assert mask_targets(bits, EMPTY, []).shape == (0, 28, 28)
