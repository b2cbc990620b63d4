"""Detectors: the ports with the goldens' weights, and one training step of theirs."""

from __future__ import annotations

from functools import cache
from typing import Any

import mindspore as ms
import numpy as np
from dense_inputs import ellipse
from detectors import dense_golden, dense_input, dense_weights
from mindspore import ParameterTuple, Tensor, nn, ops

from mindska import create_detector
from mindska.acceleration import decelerate
from mindska.detection.mask_rcnn import joined
from mindska.detection.masks import pack
from mindska.models.layers.boxes import KEY_NOISE
from mindska.weights import from_torch, load_into
from mindska.weights.convert import key_map, recognise

RETINANET, MASK_RCNN, SSDLITE = "retinanet_tiny_k23_160x192_b2", "maskrcnn_tiny_k23_128x160_b2", "ssdlite_skanet_160_b2"
MODELS = {
    RETINANET: "retinanet_van_tiny_lska_k23",
    MASK_RCNN: "mask_rcnn_van_tiny_lska_k23",
    SSDLITE: "ssdlite_skanet_s",
}
PADDED = 5  # rows of the goldens' objects


@cache
def our_parameters(case: str) -> dict[str, np.ndarray]:
    """The golden's weights under our names."""
    return from_torch(MODELS[case], dense_weights(case))


def port(case: str, accelerated: bool = True, **options: Any) -> nn.Cell:
    """The port with the golden's weights and without anything that is drawn, in evaluation."""
    net = create_detector(MODELS[case], **{"drop_path_rate": 0.0, **options})
    load_into(net, our_parameters(case))
    return (net if accelerated else decelerate(net)).set_train(False)


def images(case: str) -> Tensor:
    return Tensor(dense_input(case).numpy())


def image_shapes(case: str) -> np.ndarray:
    """(B, 2) int32, before padding."""
    meta, _ = dense_golden(case)
    if "img_metas" not in meta:
        return np.tile(np.int32(meta["input"][2:]), (meta["input"][0], 1))
    return np.int32([data["img_shape"] for data in meta["img_metas"]])


def objects(case: str) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (B, PADDED, 4) in pixels and labels (B, PADDED) from 0; what fills up has strange boxes."""
    meta, _ = dense_golden(case)
    height, width = meta["input"][2:]
    boxes = np.full((meta["input"][0], PADDED, 4), np.float32([3, 3, 90, 90]), np.float32)
    labels = np.full((meta["input"][0], PADDED), -1, np.int32)
    for i, classes in enumerate(meta["gt_labels"]):
        if "gt_boxes" in meta:
            boxes[i, : len(classes)], labels[i, : len(classes)] = meta["gt_boxes"][i], classes
        else:
            shares = np.float32(meta["gt_boxes_xyxy_normalised"][i])
            boxes[i, : len(classes)] = shares * np.float32([width, height, width, height])
            labels[i, : len(classes)] = np.subtract(classes, 1)
    return boxes, labels


def batch(case: str) -> tuple[Tensor, ...]:
    """Images and what `losses` takes after them."""
    return (images(case), *map(Tensor, objects(case)), Tensor(image_shapes(case)))


def fixed_proposals() -> list[np.ndarray]:
    """The Mask R-CNN golden's, of each image."""
    return [np.float32(boxes) for boxes in dense_golden(MASK_RCNN)[0]["fixed_proposals"]]


def mask_rcnn_batch() -> tuple[Tensor, ...]:
    """Images; objects with masks; the anchors that the golden draws; its fixed proposals; noise."""
    meta, arrays = dense_golden(MASK_RCNN)
    height, width = meta["input"][2:]
    masks = np.zeros((2, PADDED, height, width // 8), np.uint8)
    indices, positive = np.zeros((2, 256), np.int32), np.zeros((2, 256), bool)
    proposed, valid = np.zeros((2, 30, 4), np.float32), np.zeros((2, 30), bool)
    for i, boxes in enumerate(fixed_proposals()):
        for j, box in enumerate(meta["gt_boxes"][i]):
            masks[i, j] = pack(ellipse(box, height, width)[None])[0]
        drawn = [arrays[f"rpn_targets/{i}/{kind}_idx"] for kind in ("pos", "neg")]
        indices[i], positive[i, : len(drawn[0])] = np.concatenate(drawn), True
        proposed[i, : len(boxes)], valid[i, : len(boxes)] = boxes, True
    noise = np.random.default_rng(0).random((2, KEY_NOISE), np.float32)
    return (*batch(MASK_RCNN), *map(Tensor, (masks, indices, positive, ~positive, proposed, valid, noise)))


class Gradients(nn.Cell):
    """Losses by name, and the gradients of their sum."""

    def __init__(self, net: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.net, self.weights = net, ParameterTuple(net.trainable_params())
        self.gradient = ms.value_and_grad(self.total, None, self.weights, has_aux=True)

    def losses(self, *inputs: Tensor) -> dict[str, Tensor]:
        return self.net.losses(*inputs)

    def total(self, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        values = list(self.losses(*inputs).values())
        return ops.addn(values), tuple(values)

    def construct(self, *inputs: Tensor) -> tuple:
        return self.gradient(*inputs)


class MaskRcnnGradients(Gradients):
    """With the anchors that the golden draws, and its fixed proposals."""

    def losses(self, images, boxes, labels, shapes, masks, indices, positive, negative, proposed, valid, noise):
        net = self.net
        pyramid = net.neck(net.features(net.prepared(images)))
        scores, deltas = net.rpn_maps(pyramid)
        boxes, labels = net.checked_targets(images, boxes, labels, shapes)
        matched = net.matched_anchors(scores, boxes, shapes)
        first = net.rpn_losses(scores, deltas, boxes, matched, indices, positive, negative)
        second = net.roi_losses(pyramid[: net.num_levels], proposed, valid, boxes, labels, masks, noise)
        return joined(first, second)


def trained(step: Gradients, case: str, *inputs: Tensor) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses, and gradients by the golden's keys, with batch norms in evaluation."""
    step.net.set_train(True)
    for _, cell in step.net.cells_and_names():
        if isinstance(cell, nn.BatchNorm2d):
            cell.set_train(False)
    names = key_map(MODELS[case], recognise(MODELS[case], dense_weights(case), "torch"))
    (_, losses), gradients = step(*inputs)
    found = {names[p.name]: gradient.asnumpy() for p, gradient in zip(step.weights, gradients)}
    return [float(loss.asnumpy()) for loss in losses], found


def gradient_errors(found: dict[str, np.ndarray], case: str) -> dict[str, float]:
    """Relative difference of each gradient's norm; of those that are zero in exact arithmetic, the norm itself over the
    largest of all."""
    meta, arrays = dense_golden(case)
    norms, errors = dict(zip(meta["grad_norm_names"], arrays["grad_norm_f64"])), {}
    assert set(norms) == set(found)
    for name, expected in norms.items():
        norm = np.linalg.norm(found[name].astype(np.float64))
        zero = name in meta["grad_norm_tiny"]
        errors[name] = norm / max(norms.values()) if zero else abs(norm - expected) / expected
    return errors


def gradient_values(found: dict[str, np.ndarray], case: str) -> dict[str, float]:
    """Of the first values of each gradient that the golden has: the largest difference over the root mean square."""
    _, arrays = dense_golden(case)
    errors = {}
    for key in [key for key in arrays if key.startswith("grad/") and key.endswith("/f64")]:
        expected, name = arrays[key], key.split("/")[1]
        scale = np.sqrt(np.mean(expected**2))
        if scale > 0:
            errors[name] = float(np.abs(found[name].reshape(-1)[: expected.size] - expected).max() / scale)
    return errors
