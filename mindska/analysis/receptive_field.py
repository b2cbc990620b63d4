"""Effective receptive fields (Luo et al., 2016): how far around it the middle of a feature map sees.

Measured as RepLKNet (Ding et al., 2022) and after it LSKA do it: the gradient of the middle output, summed over its
channels where they are positive, by the input's pixels; what is positive of it is summed over colours and images. The
area is that of the smallest square around the middle which holds a share of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
from mindspore import Tensor, ops
from tqdm import tqdm

from ..data import EvalTransform
from ..data.lists import write_table
from ..errors import PredictionError
from ..files import replacing
from ..streams import unfailing_stderr
from .drawing import network_names, new_figure, save_figure, shown, write_json
from .opening import Subject, batches, feature_names, find_features, some_images
from .stages import Cut, input_gradient

SHARES = (0.2, 0.3, 0.5, 0.99)  # those of RepLKNet's and LSKA's tables
HEAD = "decode_head"  # a segmenter's logits, before they are enlarged


@dataclass(frozen=True)
class ReceptiveField:
    """What the middle of a feature map sees.

    Attributes:
        scores: (H, W), each input pixel's contribution, summed over the images.
    """

    name: str
    feature: str
    scores: np.ndarray
    images: int

    def side(self, share: float) -> int:
        """The side in pixels of the smallest square around the middle that holds more than this share.

        As in RepLKNet's program, sides are odd and from 3 on; where none inside the image holds so much, it is the
        image's longer side.
        """
        height, width = self.scores.shape
        total = self.scores.sum()
        for reach in range(1, max(height, width) // 2):
            if self.within(reach).sum() / total > share:
                return 2 * reach + 1
        return max(height, width)

    def within(self, reach: int) -> np.ndarray:
        """The scores of at most `reach` pixels from the middle along each side."""
        height, width = self.scores.shape
        top, left = max(0, height // 2 - reach), max(0, width // 2 - reach)
        return self.scores[top : height // 2 + reach + 1, left : width // 2 + reach + 1]

    def area(self, share: float) -> float:
        """The share of the image's area that this square takes."""
        side = self.side(share)
        height, width = self.scores.shape
        return min(1.0, side / height) * min(1.0, side / width)


def contributions(subject: Subject, images: np.ndarray, feature: Optional[int]) -> np.ndarray:
    """(H, W): of images (B, C, H, W), summed over them; one forward and one backward pass.

    Args:
        feature: its number; None: a segmenter's logits.
    """
    cut = Cut(subject.network, 0)

    def middle(x: Tensor) -> Tensor:
        x = cut.prepared(x)
        if feature is None:
            found = subject.network.decode(subject.network.features(x))
        else:
            found = cut.backbone.forward_stages(x)[feature]
        return ops.relu(found[:, :, found.shape[2] // 2, found.shape[3] // 2]).sum()

    return np.maximum(input_gradient(middle, images), 0).astype(np.float64).sum((0, 1))


def receptive_field(subject: Subject, files: Sequence[Path], number: int, stage: str) -> ReceptiveField:
    """The receptive field of a network over some images.

    Args:
        stage: name or number of the feature; "": the last one, of a segmenter its logits.

    Raises:
        UserError: there is no such stage, there are no images, or the middle of the map sees nothing.
    """
    feature = None
    if stage or not subject.is_segmenter:
        feature = find_features(subject, [stage] if stage else [])[0]
    name = HEAD if feature is None else feature_names(subject.backbone)[feature]
    images = some_images(subject, files, number)
    scores = np.zeros(subject.pixels.image_size)
    seen = 0
    with tqdm(total=len(images), unit="image", disable=None, file=unfailing_stderr()) as bar:
        for places, pixels in batches(
            images, [EvalTransform(subject.pixels)], subject.config.batch_size, subject.config
        ):
            scores += contributions(subject, pixels[0], feature)
            seen += len(places)
            bar.update(len(places))
    if not scores.sum() > 0:
        raise PredictionError(f"{subject.name()}: the middle of {name} has no gradient by the images (all 0 or NaN)")
    return ReceptiveField(subject.name(), name, scores, seen)


def draw(path: Path, fields: Sequence[ReceptiveField], names: Sequence[str]) -> None:
    """Draws the fields side by side, log10(1 + score) from 0 to 1 as RepLKNet does, and what squares of them hold."""
    columns = len(fields)
    figure = new_figure(max(6.0, 2.4 * columns + 0.8), 5.6)
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    axes = upper.subplots(1, columns, squeeze=False)[0]
    for place, field, name in zip(axes, fields, names):
        values = np.log10(1 + field.scores)
        drawn = place.imshow(values / values.max(), cmap="YlGn", vmin=0, vmax=1)
        side = field.side(0.5)
        height, width = field.scores.shape
        corner = (width // 2 - side // 2 - 0.5, height // 2 - side // 2 - 0.5)
        place.add_patch(_square(corner, side))
        place.set_title(f"{shown(name, 22)}\nhalf in {side}x{side}", fontsize=8)
        place.set_xticks([])
        place.set_yticks([])
    upper.colorbar(drawn, ax=list(axes), label="contribution (log)", shrink=0.8)
    curve = lower.subplots()
    for field, name in zip(fields, names):
        reaches = np.arange(0, max(field.scores.shape) // 2 + 1)
        held = [field.within(int(reach)).sum() / field.scores.sum() for reach in reaches]
        curve.plot(2 * reaches + 1, held, label=shown(name, 30))
    for share in SHARES:
        curve.axhline(share, color="grey", linewidth=0.5, linestyle=":")
    curve.set(xlabel="side of the square, pixels", ylabel="share held", ylim=(0, 1.02))
    curve.legend(fontsize=8)
    save_figure(figure, path)


def _square(corner: tuple[float, float], side: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, side, side, fill=False, edgecolor="crimson", linewidth=1)


def write(
    out: Path, subjects: Iterator[Subject], files: Sequence[Path], number: int, stage: str, ending: str
) -> Iterator[str]:
    """Everything that `mindska analyze receptive_field` writes; yields what it says."""
    fields, opened = [], []
    for subject in subjects:  # one network at a time
        fields.append(receptive_field(subject, files, number, stage))
        opened.append(subject)
    names = network_names([each.config.model for each in opened], [each.config.ckpt_path for each in opened])
    table = [
        dict(
            network=name, feature=field.feature, share=share, side=field.side(share), area=round(field.area(share), 6),
            image_height=field.scores.shape[0], image_width=field.scores.shape[1], images=field.images,
        )
        for name, field in zip(names, fields)
        for share in SHARES
    ]  # fmt: skip
    write_table(out / "receptive_field.csv", list(table[0]), (list(row.values()) for row in table))
    write_json(out / "receptive_field.json", dict(networks=table))
    with replacing(out / "receptive_field.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, names=np.array(names), **{f"scores_{i}": f.scores for i, f in enumerate(fields)})
    draw(out / f"receptive_field.{ending}", fields, names)
    width = max(len(name) for name in ("network", *names)) + 2
    yield f"{'network':<{width}}" + "".join(f"{f'{100 * share:g} %':>15}" for share in SHARES) + "   (side, area)"
    for name, field in zip(names, fields):
        cells = (f"{field.side(share)} px {100 * field.area(share):.1f} %" for share in SHARES)
        yield f"{name:<{width}}" + "".join(f"{cell:>15}" for cell in cells)
    yield f"{fields[0].images} images each: {out / f'receptive_field.{ending}'}, {out / 'receptive_field.csv'}"
