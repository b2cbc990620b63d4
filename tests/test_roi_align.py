"""RoIAlign from a pyramid and masks in boxes: as in NumPy, with C++ operators and without, and the gradients."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from mindska.acceleration import accelerate, decelerate
from mindska.acceleration.boxes import FusedMaskTargets, FusedRoIAlign
from mindska.detection import masks as packed
from mindska.detection.roi_align import box_matrices, roi_align, roi_levels
from mindska.models.layers.roi_align import MaskTargets, RoIAlign, with_levels

BOTH = pytest.mark.parametrize("accelerated", [True, False])
SIZES = [(40, 52), (20, 26), (10, 13), (5, 7)]  # of maps of 160x208 pixels


def made(cell, accelerated):
    (accelerate if accelerated else decelerate)(cell)
    assert isinstance(cell, (FusedRoIAlign, FusedMaskTargets)) == accelerated
    return cell


def some_boxes(rng, count):
    """Small and large, long and beyond the border; the last two have no area."""
    corners = rng.random((count, 2, 2)) * [208, 160]
    corners.sort(1)
    boxes = corners.reshape(count, 4).astype(np.float32)
    boxes[0], boxes[1], boxes[2] = [0, 0, 208, 160], [3, 50, 206, 55], [100, -20, 110, 200]
    boxes[3], boxes[4] = [50, 50, 51, 51.5], [-40, -40, 300, 300]
    boxes[-2], boxes[-1] = [20, 20, 20, 40], [300, 300, 350, 350]
    return boxes


def case(channels):
    rng = np.random.default_rng(5)
    pyramid = [rng.standard_normal((2, channels, *size), dtype=np.float32) for size in SIZES]
    boxes = np.stack([some_boxes(rng, 40) for _ in range(2)])
    valid = rng.random((2, 40)) < 0.9
    return pyramid, boxes, valid


def expected_of(pyramid, boxes, valid, out):
    result = np.zeros((2, 40, pyramid[0].shape[1], out, out), np.float32)
    for i in range(2):
        levels = roi_levels(boxes[i])
        for j in np.flatnonzero(valid[i]):
            scale = 1 / (4 << int(levels[j]))
            result[i, j] = roi_align(pyramid[levels[j]][i], boxes[i, j : j + 1], (out, out), scale)[0]
    return result.reshape(80, -1, out, out)


@BOTH
@pytest.mark.parametrize("out, channels", [(7, 11), (14, 8), (5, 3)])
def test_roi_align_is_numpys(out, channels, accelerated):
    pyramid, boxes, valid = case(channels)
    cell = made(RoIAlign(out, 4), accelerated)
    rois = with_levels(Tensor(boxes), Tensor(valid))
    levels = rois.asnumpy()[..., 4]
    for i in range(2):
        np.testing.assert_array_equal(levels[i], np.where(valid[i], roi_levels(boxes[i]), -1))
    found = cell([Tensor(x) for x in pyramid], rois).asnumpy()
    np.testing.assert_allclose(found, expected_of(pyramid, boxes, valid, out), atol=2e-5)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE])
def test_gradient_of_roi_align(mode, accelerated):
    """A linear function: its gradient is the transposed matrices'."""
    ms.set_context(mode=mode)
    pyramid, boxes, valid = case(9)
    cell, rois = made(RoIAlign(7, 4), accelerated), with_levels(Tensor(boxes), Tensor(valid))
    dout = np.random.default_rng(6).standard_normal((80, 9, 7, 7), dtype=np.float32)

    def total(p0, p1, p2, p3):
        return ops.sum(cell((p0, p1, p2, p3), rois) * Tensor(dout))

    found = ms.grad(total, grad_position=(0, 1, 2, 3))(*[Tensor(x) for x in pyramid])
    wanted = [np.zeros_like(x) for x in pyramid]
    for i in range(2):
        levels = roi_levels(boxes[i])
        for j in np.flatnonzero(valid[i]):
            level = levels[j]
            rows, columns, (high, wide) = box_matrices(boxes[i, j], (7, 7), SIZES[level], 1 / (4 << int(level)))
            wanted[level][i][:, high, wide] += rows.T @ dout[40 * i + j] @ columns
    for ours, theirs in zip(found, wanted):
        np.testing.assert_allclose(ours.asnumpy(), theirs, atol=2e-5)


def test_fewer_levels_than_four():
    pyramid, boxes, valid = case(4)
    rois = with_levels(Tensor(boxes), Tensor(valid), 3)
    both = [made(RoIAlign(7, 4), accelerated)([Tensor(x) for x in pyramid[:3]], rois) for accelerated in (True, False)]
    np.testing.assert_allclose(both[0].asnumpy(), both[1].asnumpy(), atol=1e-5)
    assert both[0].asnumpy()[0].any()  # the largest box is on the last level


@BOTH
def test_mask_targets_are_numpys(accelerated):
    rng = np.random.default_rng(7)
    bitmaps = rng.random((2, 3, 20, 27)).repeat(8, 2).repeat(8, 3)[:, :, :160, :208] < 0.5
    bits = np.stack([packed.pack(image) for image in bitmaps])
    boxes, objects = np.stack([some_boxes(rng, 40) for _ in range(2)]), rng.integers(-1, 3, (2, 40))
    rois = np.concatenate([boxes, objects[..., None].astype(np.float32)], 2).astype(np.float32)
    found = made(MaskTargets(28), accelerated)(Tensor(bits), Tensor(rois)).asnumpy()
    assert found.shape == (2, 40, 28, 28)
    for i in range(2):
        there = np.flatnonzero(objects[i] >= 0)
        expected = packed.mask_targets(bits[i], boxes[i, there], objects[i, there])
        different = (found[i, there] != expected).mean()
        assert different < 2e-4, different  # a value of a half to rounding
        assert not found[i, objects[i] < 0].any()
