"""Inputs of the dense goldens that are not images or weights (numpy only)."""

import numpy as np


def _rng(seed):
    return np.random.Generator(np.random.PCG64(seed))


def label_map(seed, shape, classes, ignore=255, fraction=0.08, block=8):
    """(N, H, W) int32: blocks of one class, about `fraction` of the blocks ignored."""
    rng = _rng(seed)
    n, h, w = shape
    label = rng.integers(0, classes, (n, -(-h // block), -(-w // block)))
    label = np.where(rng.random(label.shape) < fraction, ignore, label)
    return np.repeat(np.repeat(label, block, 1), block, 2)[:, :h, :w].astype(np.int32)


def picture(seed, h, w):
    """(H, W, 3) uint8 RGB: 16x16 blocks of colour with noise on them."""
    rng = _rng(seed)
    coarse = rng.integers(0, 256, (-(-h // 16), -(-w // 16), 3))
    fine = rng.integers(-20, 21, (h, w, 3))
    return np.clip(np.repeat(np.repeat(coarse, 16, 0), 16, 1)[:h, :w] + fine, 0, 255).astype(np.uint8)


def ellipse(box, h, w):
    """(H, W) uint8 mask: the ellipse inscribed in an x1, y1, x2, y2 box; pixel centres at +0.5."""
    x1, y1, x2, y2 = box
    yy, xx = np.mgrid[:h, :w] + 0.5
    inside = ((xx - (x1 + x2) / 2) / ((x2 - x1) / 2)) ** 2 + ((yy - (y1 + y2) / 2) / ((y2 - y1) / 2)) ** 2 <= 1
    return inside.astype(np.uint8)


def sampled(gallery, count, seed):
    """The deterministic stand-in for mmdet's random choice (see README, Mask R-CNN)."""
    return np.asarray(gallery)[np.sort(_rng(seed).permutation(len(gallery))[:count])]
