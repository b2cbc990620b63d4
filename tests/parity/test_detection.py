"""What of detection is NumPy, against the originals' figures: anchors, targets, coders, detections, masks."""

from __future__ import annotations

import zlib
from functools import cache

import numpy as np
import pytest
from dense_inputs import ellipse, sampled
from detectors import MaskRcnn, dense_golden, retinanet_maps, ssdlite_outputs
from golden import image

from mindska.detection import assign, postprocess
from mindska.detection.anchors import RETINANET_ANCHORS, RPN_ANCHORS, ssd_priors, ssd_priors_per_cell
from mindska.detection.coder import BOX_HEAD_CODER, RPN_CODER
from mindska.detection.masks import mask_targets, pack
from mindska.detection.nms import nms, nms_per_class
from mindska.detection.roi_align import roi_align, roi_levels

RETINANET, MASK_RCNN, SSDLITE = "retinanet_tiny_k23_160x192_b2", "maskrcnn_tiny_k23_128x160_b2", "ssdlite_skanet_160_b2"
SSD_MAPS = [(10, 10), (5, 5), (3, 3), (2, 2), (1, 1), (1, 1)]


def boxes_of(case: str, i: int) -> np.ndarray:
    return np.asarray(dense_golden(case)[0]["gt_boxes"][i], np.float32)


def at(case: str, tap: str, array: np.ndarray) -> float:
    """The largest difference of an array from a golden's float64 values, over their standard deviation."""
    arrays = dense_golden(case)[1]
    expected = arrays[f"{tap}/val_f64"]
    return float(np.abs(array.reshape(-1)[arrays[f"{tap}/idx"]] - expected).max() / expected.std())


def check_detections(found: postprocess.Detections, case: str, name: str) -> None:
    arrays = dense_golden(case)[1]
    assert np.array_equal(found.labels, arrays[f"{name}/labels_f64"])
    assert np.abs(found.boxes - arrays[f"{name}/boxes_f64"]).max() < 1e-3
    assert np.abs(found.scores - arrays[f"{name}/scores_f64"]).max() < 2e-5
    assert (found.boxes.dtype, found.scores.dtype, found.labels.dtype) == (np.float32, np.float32, np.int32)


# Single operators


@pytest.mark.parametrize("size", ["800x1216", "800x1344", "256x320"])
@pytest.mark.parametrize("kind", ["retina", "rpn"])
def test_anchors_to_the_bit(kind, size):
    expected = dense_golden("ops")[0]["anchors"][f"{kind}_{size}"]
    generator = RETINANET_ANCHORS if kind == "retina" else RPN_ANCHORS
    sizes = generator.map_sizes(tuple(map(int, size.split("x"))))
    levels = [generator.level(i, size) for i, size in enumerate(sizes)]
    assert generator.level_sizes(sizes) == expected["n"]
    assert [zlib.crc32(level.tobytes()) for level in levels] == expected["crc32"]
    assert np.array_equal(generator(sizes), np.concatenate(levels))


@pytest.mark.parametrize("case, generator", [(RETINANET, RETINANET_ANCHORS), (MASK_RCNN, RPN_ANCHORS)])
def test_anchors_of_the_networks(case, generator):
    meta, _ = dense_golden(case)
    for level, expected in enumerate(meta["anchors"]):
        anchors = generator.level(level, tuple(expected["feature_size"]))
        assert len(anchors) == expected["n"] and zlib.crc32(anchors.tobytes()) == expected["crc32_float32"]
        assert np.array_equal(generator.base_anchors(level), np.float32(meta["base_anchors"][level]))
        assert np.array_equal(anchors[[0, -1]], np.float32([expected["first"], expected["last"]]))
    sizes = generator.map_sizes(tuple(meta["input"][2:]))
    assert sizes == [tuple(level["feature_size"]) for level in meta["anchors"]]


def test_ssd_priors_to_the_bit():
    meta, arrays = dense_golden(SSDLITE)
    priors = ssd_priors(SSD_MAPS)
    assert (
        np.array_equal(priors, arrays["anchors"]) and zlib.crc32(priors.tobytes()) == meta["anchors"]["crc32_float32"]
    )
    assert ssd_priors_per_cell() == [6, 6, 6, 6, 6, 4]
    assert len(ssd_priors([(20, 20), (10, 10), (5, 5), (3, 3), (2, 2), (1, 1)])) == 3232


@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_nms_keeps_what_the_original_keeps(threshold):
    arrays = dense_golden("ops")[1]
    boxes, scores, classes = (arrays[f"nms/{name}"] for name in ("boxes", "scores", "classes"))
    assert np.array_equal(nms(boxes, scores, threshold), arrays[f"nms/keep_{threshold}"])
    assert np.array_equal(nms_per_class(boxes, scores, classes, threshold), arrays[f"nms/keep_per_class_{threshold}"])


def test_delta_coders():
    arrays = dense_golden("ops")[1]
    priors, deltas, boxes = (arrays[f"coder/{name}"] for name in ("priors", "deltas", "gt"))
    for name, array in {
        "decode_std1_deltas_times_2_clipped_150x180": RPN_CODER.decode(priors, deltas * 2, (150, 180)),
        "decode_rcnn_deltas_times_2_clipped_150x180": BOX_HEAD_CODER.decode(priors, deltas * 2, (150, 180)),
        "decode_std1_deltas_times_6_clamped_by_16_1000": RPN_CODER.decode(priors, deltas * 6),
        "encode_std1": RPN_CODER.encode(priors, boxes),
        "encode_rcnn": BOX_HEAD_CODER.encode(priors, boxes),
    }.items():
        assert array.dtype == np.float32 and at("ops", name, array) < 1e-6, name
    by_class = BOX_HEAD_CODER.decode(priors, np.repeat(deltas[:, None], 3, 1), (150, 180))
    assert np.array_equal(by_class[:, 2], BOX_HEAD_CODER.decode(priors, deltas, (150, 180)))


@pytest.mark.parametrize("out, sampling_ratio", [(7, 0), (7, 2), (14, 0), (14, 2)])
def test_roi_align(out, sampling_ratio):
    features, rois = image(1004, (2, 5, 24, 32)), dense_golden("ops")[1]["roi/rois"]
    found = [roi_align(features[int(roi[0])], roi[None, 1:], (out, out), 0.25, sampling_ratio) for roi in rois]
    assert at("ops", f"roi_align_out{out}_sr{sampling_ratio}_aligned1", np.concatenate(found)) < 2e-5
    assert sampling_ratio or not found[-1].any()  # the last box is empty


def test_levels_of_boxes():
    expected = dense_golden("ops")[0]["roi_levels"]
    sides = np.float32(expected["square_sides"])
    assert roi_levels(np.stack([sides * 0, sides * 0, sides, sides], 1)).tolist() == expected["levels"]
    meta, _ = dense_golden(MASK_RCNN)
    assert roi_levels(np.float32(sum(meta["fixed_proposals"], []))).tolist() == meta["roi_levels"]


def test_pasting_a_mask():
    meta, arrays = dense_golden("ops")
    masks, boxes = postprocess.sigmoid(2 * image(1008, (4, 1, 28, 28)))[:, 0], arrays["paste/boxes"]
    probabilities = [postprocess.mask_probabilities(m, box, (0, 64), (0, 96)) for m, box in zip(masks, boxes)]
    assert at("ops", "paste_probability_64x96", np.stack(probabilities)) < 2e-5
    expected = np.unpackbits(arrays["paste/mask_packed"], axis=1).reshape(4, 64, 96)
    pasted = postprocess.paste_masks(masks, boxes, (64, 96))
    assert (pasted != expected).sum() <= 1 and pasted.dtype == bool
    assert np.abs(pasted.sum((1, 2)) - meta["paste"]["areas"]).max() <= 1


# Targets


@pytest.mark.parametrize("i", [0, 1])
def test_targets_of_retinanet(i):
    meta, arrays = dense_golden(RETINANET)
    anchors = RETINANET_ANCHORS(RETINANET_ANCHORS.map_sizes((160, 192)))
    targets = assign.retinanet_targets(anchors, boxes_of(RETINANET, i), meta["gt_labels"][i])
    positive = np.flatnonzero(targets.labels >= 0)
    assert np.array_equal(positive, arrays[f"targets/{i}/pos_idx"])
    assert np.array_equal(targets.labels[positive], arrays[f"targets/{i}/pos_label"])
    assert np.array_equal(np.flatnonzero(targets.labels == assign.IGNORED), arrays[f"targets/{i}/ignored_idx"])
    assert np.abs(targets.deltas[positive] - arrays[f"targets/{i}/pos_delta"]).max() < 1e-6
    assert not targets.deltas[targets.labels < 0].any()
    counts = meta["targets"]["per_image"][i]
    assert (len(positive), (targets.labels == assign.IGNORED).sum()) == (counts["n_pos"], counts["n_ignored"])
    best = assign.box_iou(boxes_of(RETINANET, i), anchors).max(1)
    assert best == pytest.approx(counts["best_iou_per_gt"], abs=1e-6)


def test_targets_of_mask_rcnn():
    meta, arrays = dense_golden(MASK_RCNN)
    anchors, draws = RPN_ANCHORS(RPN_ANCHORS.map_sizes((128, 160))), iter(range(7001, 7100))

    def choose(candidates: np.ndarray, count: int) -> np.ndarray:
        return sampled(candidates, count, next(draws))

    labels, deltas, masks = [], [], []
    for i in range(2):
        boxes = boxes_of(MASK_RCNN, i)
        targets = assign.rpn_targets(anchors, boxes)
        samples = assign.sample_rpn(targets.matched, choose)
        assert np.array_equal(samples.positive, arrays[f"rpn_targets/{i}/pos_idx"])
        assert np.array_equal(samples.negative, arrays[f"rpn_targets/{i}/neg_idx"])
        assert np.array_equal(targets.matched[samples.positive], arrays[f"rpn_targets/{i}/pos_gt"])
        assert np.abs(targets.deltas[samples.positive] - arrays[f"rpn_targets/{i}/pos_delta"]).max() < 1e-6

        proposals = np.float32(meta["fixed_proposals"][i])
        heads = assign.box_head_targets(proposals, boxes, meta["gt_labels"][i], 80, choose)
        assert np.array_equal(heads.samples.positive, arrays[f"rcnn_targets/{i}/pos_idx"])
        assert np.array_equal(heads.samples.negative, arrays[f"rcnn_targets/{i}/neg_idx"])
        assert np.array_equal(heads.matched, arrays[f"rcnn_targets/{i}/pos_gt"])
        assert np.array_equal(heads.boxes, arrays[f"rcnn_targets/{i}/priors"])
        labels.append(heads.labels)
        deltas.append(heads.deltas)
        bits = pack(np.stack([ellipse(box, 128, 160) for box in boxes]))
        masks.append(mask_targets(bits, heads.boxes[: heads.num_positive], heads.matched))
    assert np.array_equal(np.concatenate(labels), arrays["rcnn_targets/labels"])
    assert np.abs(np.concatenate(deltas) - arrays["rcnn_targets/deltas"]).max() < 1e-6
    expected = np.unpackbits(arrays["rcnn_targets/mask_packed"], axis=1).reshape(-1, 28, 28)
    assert np.array_equal(np.concatenate(masks), expected)
    assert expected.sum((1, 2)).tolist() == meta["mask_targets"]["sums"]


def test_targets_of_ssd():
    meta, arrays = dense_golden(SSDLITE)
    deltas = []
    for i in range(2):
        boxes, labels = meta["gt_boxes_xyxy_normalised"][i], np.asarray(meta["gt_labels"][i]) - 1
        targets = assign.ssd_targets(ssd_priors(SSD_MAPS), np.float32(boxes), labels)
        assert np.array_equal(np.maximum(targets.labels + 1, 0), arrays["targets/labels"][i])
        deltas.append(targets.deltas[targets.labels >= 0])
        assert len(deltas[-1]) == meta["targets"]["positives"][i]
    assert np.abs(np.concatenate(deltas) - arrays["targets/deltas_positive"]).max() < 2e-6


# Detections from the networks' maps


@pytest.mark.slow
def test_detections_of_retinanet():
    meta, _ = dense_golden(RETINANET)
    maps = retinanet_maps(RETINANET)
    for kind, levels in maps.items():
        for level, array in enumerate(levels):
            assert at(RETINANET, f"{kind}{level}", array) < 5e-5
    for i, data in enumerate(meta["img_metas"]):
        arguments = [level[i] for level in maps["cls"]], [level[i] for level in maps["reg"]], tuple(data["img_shape"])
        found = postprocess.retinanet_detections(*arguments)
        check_detections(found, RETINANET, f"det/{i}")
        check_detections(
            postprocess.retinanet_detections(*arguments, scale_factor=tuple(data["scale_factor"])),
            RETINANET, f"det_rescaled/{i}",
        )  # fmt: skip
        in_original = found.in_original_pixels(tuple(data["scale_factor"]), tuple(data["ori_shape"]))
        check_detections(in_original, RETINANET, f"det_rescaled/{i}")
        above = sum((postprocess.sigmoid(level) > np.float32(0.05)).sum() for level in arguments[0])
        assert above == meta["scores_above_0.05"][i]


def binary_cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return np.maximum(logits, 0) - logits * targets + np.log1p(np.exp(-np.abs(logits)))


@pytest.mark.slow
def test_targets_give_the_losses_of_retinanet():
    meta, _ = dense_golden(RETINANET)
    maps, anchors = retinanet_maps(RETINANET), RETINANET_ANCHORS(RETINANET_ANCHORS.map_sizes((160, 192)))
    targets = [assign.retinanet_targets(anchors, boxes_of(RETINANET, i), meta["gt_labels"][i]) for i in range(2)]
    factor = sum(max(1, (each.labels >= 0).sum()) for each in targets)
    assert factor == meta["targets"]["avg_factor"]
    ends = np.cumsum([0, *(level["n"] for level in meta["anchors"])])
    for level, (first, last) in enumerate(zip(ends, ends[1:])):
        focal = l1 = 0.0
        for i, (_, labels, deltas) in enumerate(targets):
            labels, deltas = labels[first:last], deltas[first:last]
            logits = maps["cls"][level][i].transpose(1, 2, 0).reshape(-1, 80)[labels != assign.IGNORED]
            truth = labels[labels != assign.IGNORED, None] == np.arange(80)
            wrong = np.where(truth, 1 - postprocess.sigmoid(logits), postprocess.sigmoid(logits))
            focal += (binary_cross_entropy(logits, truth) * np.where(truth, 0.25, 0.75) * wrong**2).sum()
            regression = maps["reg"][level][i].transpose(1, 2, 0).reshape(-1, 4)
            l1 += np.abs(regression - deltas)[labels >= 0].sum()
        expected = meta["losses"]["f64"]
        assert focal / factor == pytest.approx(expected["loss_cls_per_level"][level], rel=2e-5)
        assert l1 / factor == pytest.approx(expected["loss_bbox_per_level"][level], rel=1e-6)


@cache
def mask_rcnn() -> MaskRcnn:
    return MaskRcnn(MASK_RCNN)


def features_of(i: int, boxes: np.ndarray, size: int) -> np.ndarray:
    """(n, 256, size, size) from the pyramid's levels."""
    levels = roi_levels(boxes)
    result = np.zeros((len(boxes), 256, size, size), np.float32)
    for level in range(4):
        some = np.flatnonzero(levels == level)
        result[some] = roi_align(mask_rcnn().pyramid[level][i], boxes[some], (size, size), 1 / (4 << level))
    return result


@pytest.mark.parametrize("i", [0, 1])
def test_proposals(i):
    meta, arrays = dense_golden(MASK_RCNN)
    network, size = mask_rcnn(), tuple(meta["img_metas"][i]["img_shape"])
    for kind, most in (("train", 2000), ("test", 1000)):
        boxes, scores = postprocess.proposals(
            [level[i] for level in network.rpn_cls], [level[i] for level in network.rpn_reg], size, most
        )
        assert len(boxes) == meta["proposals"][i]["n_train"] == 1000
        assert np.abs(boxes[:100] - arrays[f"prop_{kind}/{i}/boxes_f64"]).max() < 1e-3
        assert np.abs(scores[:100] - arrays[f"prop_{kind}/{i}/scores_f64"]).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("i", [0, 1])
@pytest.mark.parametrize("kind", ["fixed", "full"])
def test_detections_and_masks_of_mask_rcnn(i, kind):
    meta, arrays = dense_golden(MASK_RCNN)
    network, size = mask_rcnn(), tuple(meta["img_metas"][i]["img_shape"])
    rois = np.float32(meta["fixed_proposals"][i])
    if kind == "full":
        maps = [level[i] for level in network.rpn_cls], [level[i] for level in network.rpn_reg]
        rois, _ = postprocess.proposals(*maps, size, 1000)
    found = postprocess.box_head_detections(rois, *network.box_head(features_of(i, rois, 7)), size)
    check_detections(found, MASK_RCNN, f"det_{kind}/{i}")
    probabilities = postprocess.class_masks(network.mask_head(features_of(i, found.boxes, 14)), found.labels)
    masks = postprocess.paste_masks(probabilities, found.boxes, size)
    expected = meta["detections"][f"det_{kind}/{i}"]
    assert list(masks.shape) == expected["mask_shape"]
    assert np.abs(masks.sum((1, 2)) - expected["mask_areas_f64"]).sum() <= 1


@pytest.mark.slow
def test_targets_give_the_losses_of_mask_rcnn():
    meta, _ = dense_golden(MASK_RCNN)
    anchors, draws = RPN_ANCHORS(RPN_ANCHORS.map_sizes((128, 160))), iter(range(7001, 7100))
    network, losses = mask_rcnn(), dict.fromkeys(("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox"), 0.0)
    counts, masks = dict(rpn=0, heads=0), []
    for i in range(2):
        boxes = boxes_of(MASK_RCNN, i)

        def choose(candidates: np.ndarray, count: int) -> np.ndarray:
            return sampled(candidates, count, next(draws))

        targets = assign.rpn_targets(anchors, boxes)
        fixed = assign.sampled_targets(targets, assign.sample_rpn(targets.matched, choose))
        logits, regression = (
            np.concatenate([level[i].transpose(1, 2, 0).reshape(-1, size) for level in levels])
            for levels, size in ((network.rpn_cls, 1), (network.rpn_reg, 4))
        )
        there = fixed.labels != assign.IGNORED
        losses["loss_rpn_cls"] += binary_cross_entropy(logits[there, 0], fixed.labels[there] == 0).sum()
        losses["loss_rpn_bbox"] += np.abs(regression - fixed.deltas)[fixed.labels == 0].sum()
        counts["rpn"] += there.sum()
        heads = assign.box_head_targets(np.float32(meta["fixed_proposals"][i]), boxes, meta["gt_labels"][i], 80, choose)
        rois, labels, deltas, _ = (array[: len(heads.boxes)] for array in heads.padded())
        scores, regression = network.box_head(features_of(i, rois, 7))
        scores = scores.astype(np.float64) - scores.max(1, keepdims=True)
        rows = np.arange(len(rois))
        losses["loss_cls"] += (np.log(np.exp(scores).sum(1)) - scores[rows, labels]).sum()
        positive = labels < 80
        own = regression.reshape(-1, 80, 4)[rows[positive], labels[positive]]
        losses["loss_bbox"] += np.abs(own - deltas[positive]).sum()
        counts["heads"] += len(rois)
        logits = network.mask_head(features_of(i, rois[positive], 14))[np.arange(positive.sum()), labels[positive]]
        bits = pack(np.stack([ellipse(box, 128, 160) for box in boxes]))
        masks.append(binary_cross_entropy(logits, mask_targets(bits, rois[positive], heads.matched)))
    for name, value in losses.items():
        found = value / counts["rpn" if "rpn" in name else "heads"]
        assert found == pytest.approx(meta["losses"]["f64"][name], rel=5e-6), name
    assert np.concatenate(masks).mean() == pytest.approx(meta["losses"]["f64"]["loss_mask"], rel=5e-6)


def test_detections_and_mining_of_ssdlite():
    """The neighbours of SkaNet's graphs may swap in float32; in this run they do not."""
    meta, arrays = dense_golden(SSDLITE)
    outputs = ssdlite_outputs(SSDLITE)
    assert at(SSDLITE, "confidences", outputs["confidences"]) < 1e-2
    priors = ssd_priors(SSD_MAPS)
    boxes = postprocess.SSD_CODER.decode(np.broadcast_to(priors, outputs["locations"].shape), outputs["locations"])
    assert at(SSDLITE, "boxes", boxes) < 1e-2
    swapped = at(SSDLITE, "confidences", outputs["confidences"]) > 1e-4
    for i in range(2):
        found = postprocess.ssd_detections(outputs["confidences"][i], outputs["locations"][i], priors)
        assert len(found) == 200
        if swapped:
            close = np.abs(found.scores - arrays[f"det/{i}/scores_f64"]).max()
            assert close < 2e-3
            continue
        order = np.lexsort((found.labels, np.round(found.scores, 5)))
        expected = np.lexsort((arrays[f"det/{i}/labels_f64"] - 1, np.round(arrays[f"det/{i}/scores_f64"], 5)))
        check = {name: arrays[f"det/{i}/{name}_f64"][expected] for name in ("boxes", "scores", "labels")}
        assert np.array_equal(found.labels[order] + 1, check["labels"])
        assert np.abs(found.boxes[order] - check["boxes"]).max() < 5e-5
        assert np.abs(found.scores[order] - check["scores"]).max() < 2e-5
    positive = arrays["targets/labels"] > 0
    loss = -np.log(postprocess.softmax(outputs["confidences"])[..., 0])
    mined = assign.hard_negatives(loss, positive)
    expected = np.unpackbits(arrays["targets/mined"], axis=1)[:, : len(priors)].astype(bool)
    assert mined.sum(1).tolist() == meta["mined"]["kept_per_image"]
    assert (mined != expected).sum() <= (2 if swapped else 0)

    classes, shares = arrays["targets/labels"], [np.float32(boxes) for boxes in meta["gt_boxes_xyxy_normalised"]]
    entropy = -np.log(postprocess.softmax(outputs["confidences"]))[
        np.arange(2)[:, None], np.arange(len(priors)), classes
    ]
    deltas = np.stack([assign.ssd_targets(priors, shares[i], [0] * len(shares[i])).deltas for i in range(2)])
    off = np.abs(outputs["locations"] - deltas)[positive]
    smooth = np.where(off < 1, off**2 / 2, off - 0.5)
    for name, value in (("cls_loss", entropy[mined].sum()), ("reg_loss", smooth.sum())):
        assert value / positive.sum() == pytest.approx(meta["loss"]["f64"][name], rel=1e-2 if swapped else 1e-5)
