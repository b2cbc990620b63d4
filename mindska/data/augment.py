"""MindCV's RandAugment and relatives, made right and repeatable.

What differs from `mindcv.data.auto_augment` as it stands:

- It draws from Python's and numpy's global generators: with several workers no draw could be repeated. Here each call
  brings its own generator.
- The configured `mstd` is ignored (a default is set before the string is read).
- `Posterize` drops the bits that it should keep, and `Shear` takes a tangent for degrees: at magnitude 9 neither
  changes an image visibly.
"""

from __future__ import annotations

import math
import random
import re
import threading

import numpy as np
from mindcv.data import auto_augment
from mindspore.dataset.vision import Inter
from PIL import Image, ImageOps

POLICIES = {
    "randaug": auto_augment.rand_augment_transform,
    "autoaug": auto_augment.auto_augment_transform,
    "autoaugr": auto_augment.auto_augment_transform,
    "3a": auto_augment.auto_augment_transform,
    "trivialaugwide": auto_augment.trivial_augment_wide_transform,
}
INTERPOLATION = {"bilinear": Inter.BILINEAR, "bicubic": Inter.BICUBIC, "nearest": Inter.NEAREST}


class _ThreadRandom(threading.local):
    """Stands in for the module `random` inside MindCV's augmentations: each worker thread has its own state."""

    def __init__(self) -> None:
        self.generator = random.Random()

    def __getattr__(self, name: str):
        return getattr(self.generator, name)


_thread_random = _ThreadRandom()
auto_augment.random = _thread_random


def _posterize(image: np.ndarray, bits_to_keep: int, **_) -> np.ndarray:
    return np.asarray(ImageOps.posterize(Image.fromarray(image), max(bits_to_keep, 0)))


def _shear_x(image: np.ndarray, tangent: float, **kwargs) -> np.ndarray:
    return auto_augment.shear_x(image, math.degrees(math.atan(tangent)), **kwargs)


def _shear_y(image: np.ndarray, tangent: float, **kwargs) -> np.ndarray:
    return auto_augment.shear_y(image, math.degrees(math.atan(tangent)), **kwargs)


CORRECTED = {
    "Posterize": _posterize,
    "PosterizeIncreasing": _posterize,
    "PosterizeOriginal": _posterize,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
}


class AutoAugment:
    """A policy given by MindCV's string, such as `randaug-m9-mstd0.5-inc1` (timm's `rand-...` is understood too).

    Args:
        policy: the string.
        image_size: shorter side of the image in pixels (for AutoAugment's absolute translations).
        mean: colour (0 to 255, three channels) that fills what moves into the image.
        interpolation: "bilinear" or "bicubic".

    Raises:
        ValueError: the string is not understood.
    """

    def __init__(self, policy: str, image_size: int, mean: tuple[float, ...], interpolation: str) -> None:
        name, _, options = policy.partition("-")
        name = {"rand": "randaug", "original": "autoaug"}.get(name, name)
        if name not in POLICIES:
            raise ValueError(f"auto_augment is {policy!r}; expected one of {', '.join(POLICIES)} and its options")
        for option in options.split("-") if options else ():
            if not re.fullmatch(r"(mstd|mmax|inc|m|n|w)\d+(\.\d+)?", option):
                raise ValueError(f"auto_augment is {policy!r}: {option!r} is no option (m, n, w, mstd, mmax, inc)")
        parameters = dict(
            translate_const=int(image_size * 0.45),
            img_mean=tuple(min(255, round(value)) for value in mean),
            interpolation=INTERPOLATION.get(interpolation, Inter.BICUBIC),
        )
        deviation = re.search(r"mstd(\d+(\.\d+)?)", options)
        if deviation:
            parameters["magnitude_std"] = float(deviation[1]) if float(deviation[1]) <= 100 else math.inf
        self.policy = POLICIES[name](f"{name}-{options}" if options else name, parameters)
        for operation in self._operations():
            operation.aug_fn = CORRECTED.get(operation.name, operation.aug_fn)

    def _operations(self) -> list[auto_augment.AugmentOp]:
        if isinstance(self.policy, auto_augment.AutoAugment):
            return [operation for sub_policy in self.policy.policy for operation in sub_policy]
        return self.policy.ops

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Augments an image (H, W, 3) uint8; the same generator state gives the same result."""
        _thread_random.generator.seed(int(rng.integers(2**63)))
        if isinstance(self.policy, auto_augment.AutoAugment):
            return self.policy(image)
        # These two choose their operations with numpy's global generator: the choice is made here instead.
        layers = getattr(self.policy, "num_layers", 1)
        weights = getattr(self.policy, "choice_weights", None)
        for i in rng.choice(len(self.policy.ops), layers, replace=weights is None, p=weights):
            image = self.policy.ops[i](image)
        return image
