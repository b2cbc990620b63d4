"""Targets of the mask head, from masks that are kept as bits: an image's hundred masks of 800x1344 pixels take 13 MB
and not 107."""

from __future__ import annotations

import numpy as np

from .roi_align import box_matrices

MASK_SIZE = 28  # of the mask head's maps


def pack(masks: np.ndarray) -> np.ndarray:
    """(n, H, W) of 0 and 1 -> (n, H, ceil(W / 8)) uint8, eight pixels a byte."""
    return np.packbits(masks.astype(bool, copy=False), axis=-1)


def unpack(bits: np.ndarray, width: int) -> np.ndarray:
    """(..., H, ceil(W / 8)) -> (..., H, W) uint8 of 0 and 1."""
    return np.unpackbits(bits, axis=-1, count=width)


def mask_targets(bits: np.ndarray, rois: np.ndarray, matched: np.ndarray, size: int = MASK_SIZE) -> np.ndarray:
    """What the mask head is to predict in the positive samples of an image: (n, size, size) float32 of 0 and 1.

    The object's mask in the sample's box, by RoIAlign, from 0.5 on.

    Args:
        bits: the objects' masks, packed, (objects, H, W / 8) uint8, in pixels of the padded image.
        rois: (n, 4) of the positive samples; matched: (n,) their objects' numbers.
    """
    targets = np.zeros((len(rois), size, size), np.float32)
    width = bits.shape[-1] * 8
    for target, roi, number in zip(targets, np.asarray(rois, np.float32), matched):
        rows, columns, (vertical, horizontal) = box_matrices(roi, (size, size), (bits.shape[1], width))
        mask = unpack(bits[number, vertical], width)[:, horizontal].astype(np.float32)
        target[:] = rows @ mask @ columns.T >= 0.5
    return targets
