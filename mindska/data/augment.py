"""RandAugment and its relatives on Pillow images, by MindCV's names, with timm's meaning (the authors trained with it).

`mindcv.data.auto_augment` is not used beyond its AutoAugment tables (tests/parity/test_preprocessing.py shows why):

- Its shear takes a tangent for degrees and its posterize drops the bits that it should keep: at magnitude 9 neither
  changes an image visibly. Shear turns about the centre instead of the corner, `SolarizeAdd` is missing.
- It ignores the configured `mstd`, and reads `inc0` as true.
- It draws from the global generators of Python and numpy, so that with several workers no draw can be repeated.
"""

from __future__ import annotations

import math
import re
from typing import Any, Callable, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from ..errors import SettingError

MAX_MAGNITUDE = 10.0
TRIVIAL_MAX_MAGNITUDE = 31.0
DEFAULT_DEVIATION = 0.5  # MindCV's

RAND_OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
)  # fmt: skip
ENHANCERS = ("Color", "Contrast", "Brightness", "Sharpness")
INCREASING = ("Posterize", "Solarize", *ENHANCERS)
TRIVIAL_OPERATIONS = (
    "Identity", "AutoContrast", "Equalize", "RotateWide", "PosterizeWide", "Solarize", "ColorWide", "ContrastWide",
    "BrightnessWide", "SharpnessWide", "ShearXWide", "ShearYWide", "TranslateXWide", "TranslateYWide",
)  # fmt: skip

OPTIONS = {
    "randaug": ("m", "n", "mstd", "mmax", "inc"),
    "autoaug": ("mstd",),
    "autoaugr": ("mstd",),
    "3a": ("mstd",),
    "trivialaugwide": ("m",),
}
TIMMS_NAMES = {"rand": "randaug", "original": "autoaug", "originalr": "autoaugr"}

Strength = Callable[[float, np.random.Generator], Any]
Apply = Callable[[Image.Image, Any, "AffineOptions"], Image.Image]


class AffineOptions(NamedTuple):
    """Of rotations, shears and translations: Pillow's filter, and the colour (0 to 255 a channel) of what moves in."""

    resample: Image.Resampling
    fill: tuple[int, ...]


def _linear(span: float, start: float = 0.0) -> Strength:
    return lambda level, rng: start + span * level


def _whole(span: int, start: int = 0) -> Strength:
    return lambda level, rng: start + int(span * level)


def _either_way(span: float, about: float = 0.0) -> Strength:
    return lambda level, rng: about + (span * level if rng.random() < 0.5 else -span * level)


def _enhance(name: str) -> Apply:
    return lambda image, factor, affine: getattr(ImageEnhance, name)(image).enhance(max(factor, 0.0))


def _posterize(image: Image.Image, bits: int, affine: AffineOptions) -> Image.Image:
    # Not ImageOps.posterize: newer Pillows refuse 0 bits (black), which timm's strongest level asks for.
    mask = 256 - (1 << (8 - min(max(bits, 0), 8)))
    return _by_value(image, lambda v: v & mask)


def _by_value(image: Image.Image, change: Callable[[int], int]) -> Image.Image:
    return image.point([change(v) for v in range(256)] * len(image.getbands()))


def _move(matrix: Callable[[float, int, int], tuple]) -> Apply:
    def apply(image: Image.Image, value: float, affine: AffineOptions) -> Image.Image:
        coefficients = matrix(value, *image.size)
        return image.transform(image.size, Image.Transform.AFFINE, coefficients, affine.resample, fillcolor=affine.fill)

    return apply


# What a level (0 to 1, drawn by the policy) is to each operation: degrees, tangent, share of the side, bits kept,
# threshold, factor. In an "increasing" operation the effect grows with the level, in its namesake the value does.
STRENGTHS: dict[str, Strength] = {
    "Rotate": _either_way(30),
    "ShearX": _either_way(0.3),
    "ShearY": _either_way(0.3),
    "TranslateX": _either_way(0.45),
    "TranslateY": _either_way(0.45),
    "Posterize": _whole(4),
    "PosterizeIncreasing": lambda level, rng: 4 - int(4 * level),
    "PosterizeOriginal": _whole(4, 4),
    "Solarize": _whole(256),
    "SolarizeIncreasing": lambda level, rng: 256 - int(256 * level),
    "SolarizeAdd": _whole(110),
    **dict.fromkeys(ENHANCERS, _linear(1.8, 0.1)),
    **{f"{name}Increasing": _either_way(0.9, 1.0) for name in ENHANCERS},
    "Desaturate": _linear(-0.5, 0.5),
    "GaussianBlurRand": lambda level, rng: rng.uniform(0.1, max(2 * level, 0.1)),
    "RotateWide": _either_way(135),
    "ShearXWide": _either_way(0.99),
    "ShearYWide": _either_way(0.99),
    "TranslateXWide": _either_way(32 / 224),
    "TranslateYWide": _either_way(32 / 224),
    "PosterizeWide": _whole(6, 2),
    **{f"{name}Wide": _linear(1.99, 0.01) for name in ENHANCERS},
}
APPLY: dict[str, Apply] = {
    "Identity": lambda image, _, affine: image,
    "AutoContrast": lambda image, _, affine: ImageOps.autocontrast(image),
    "Equalize": lambda image, _, affine: ImageOps.equalize(image),
    "Invert": lambda image, _, affine: ImageOps.invert(image),
    "Posterize": _posterize,
    "Solarize": lambda image, threshold, affine: ImageOps.solarize(image, threshold),
    "SolarizeAdd": lambda image, add, affine: _by_value(image, lambda v: min(v + add, 255) if v < 128 else v),
    **{name: _enhance(name) for name in ENHANCERS},
    "Desaturate": _enhance("Color"),
    "GaussianBlurRand": lambda image, radius, affine: image.filter(ImageFilter.GaussianBlur(radius)),
    "Rotate": lambda image, degrees, affine: image.rotate(degrees, affine.resample, fillcolor=affine.fill),
    "ShearX": _move(lambda tangent, width, height: (1, tangent, 0, 0, 1, 0)),
    "ShearY": _move(lambda tangent, width, height: (1, 0, 0, tangent, 1, 0)),
    "TranslateX": _move(lambda share, width, height: (1, 0, share * width, 0, 1, 0)),
    "TranslateY": _move(lambda share, width, height: (1, 0, 0, 0, 1, share * height)),
}


class Operation(NamedTuple):
    """A row of a policy.

    Attributes:
        name: of the operation; probability: of its being applied; magnitude: 0 to 10 (TrivialAugment: 0 to 31).
    """

    name: str
    probability: float
    magnitude: float

    def apply(self, image: Image.Image, level: float, affine: AffineOptions, rng: np.random.Generator) -> Image.Image:
        """The operation, at a level of 0 to 1, on an RGB or grey image (whose saturation stays)."""
        strength = STRENGTHS.get(self.name)
        value = strength(level, rng) if strength else None
        return APPLY[re.sub("(Increasing|Original|Wide)$", "", self.name)](image, value, affine)


class AutoAugment:
    """A policy given by MindCV's or timm's string, such as `randaug-m9-mstd0.5-inc1` or `rand-m9-mstd0.5-inc1`.

    - `randaug`: n operations (2), each with probability 0.5 and magnitude m (10), clipped to 0..mmax (10); inc1: the
      effect of every operation grows with its magnitude. Cubuk et al., 2019.
    - `autoaug`, `autoaugr` (posterize as in Google's research code): one of 25 pairs. Cubuk et al., 2018.
    - `3a`: grey, solarize or blur. Touvron et al., 2022.
    - `trivialaugwide`: one operation of a magnitude uniform in 0..m (31). Müller and Hutter, 2021.

    mstd is the standard deviation of magnitudes (default: MindCV's 0.5); above 100, they are uniform from 0 on.

    Args:
        policy: the string.
        fill: colour (one number a channel, 0 to 255) of what moves into the image.
        resample: Pillow's filter for rotation, shear and translation: nearest, bilinear or bicubic.

    Raises:
        ValueError: the string is not understood; the message names the part.
    """

    def __init__(self, policy: str, fill: tuple[int, ...], resample: Image.Resampling) -> None:
        self.affine = AffineOptions(resample, fill)
        name, *parts = policy.split("-")
        name = TIMMS_NAMES.get(name, name)
        if name not in OPTIONS:
            raise SettingError(f"auto_augment is {policy!r}: {name!r} is not one of {', '.join(OPTIONS)}")
        options = {}
        for part in parts:
            match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
            if not match or match[1] not in OPTIONS[name] or (match[1] in ("n", "inc") and not match[2].isdigit()):
                known = ", ".join(f"{option}NUMBER" for option in OPTIONS[name])
                raise SettingError(f"auto_augment is {policy!r}: {part!r} is not one of {name}'s options {known}")
            options[match[1]] = float(match[2])

        deviation = options.get("mstd", DEFAULT_DEVIATION)
        self.deviation = math.inf if deviation > 100 else deviation
        self.draws = int(options.get("n", 2)) if name == "randaug" else 1
        self.choices: list[tuple[Operation, ...]]
        self.limit, self.unit = options.get("mmax", MAX_MAGNITUDE), MAX_MAGNITUDE
        if name == "randaug":
            increasing = INCREASING if options.get("inc") else ()
            names = [f"{each}Increasing" if each in increasing else each for each in RAND_OPERATIONS]
            self.choices = [(Operation(each, 0.5, options.get("m", MAX_MAGNITUDE)),) for each in names]
        elif name == "trivialaugwide":
            self.deviation, self.limit, self.unit = math.inf, TRIVIAL_MAX_MAGNITUDE, TRIVIAL_MAX_MAGNITUDE
            magnitude = options.get("m", TRIVIAL_MAX_MAGNITUDE)
            self.choices = [(Operation(each, 1.0, magnitude),) for each in TRIVIAL_OPERATIONS]
        else:
            from mindcv.data.auto_augment import auto_augment_policy  # only now: it loads MindSpore

            self.choices = [
                tuple(Operation(row.name, row.prob, row.magnitude) for row in rows)
                for rows in auto_augment_policy(name)
            ]

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Augments an RGB or grey image; the same state of `rng` gives the same image."""
        for choice in rng.integers(len(self.choices), size=self.draws):
            for operation in self.choices[choice]:
                if rng.random() < operation.probability:
                    level = self._magnitude(operation.magnitude, rng) / self.unit
                    image = operation.apply(image, level, self.affine, rng)
        return image

    def _magnitude(self, magnitude: float, rng: np.random.Generator) -> float:
        drawn = rng.uniform(0, magnitude) if math.isinf(self.deviation) else rng.normal(magnitude, self.deviation)
        return min(max(drawn, 0.0), self.limit)
