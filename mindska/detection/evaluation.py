"""COCO's figures over a validation set: every image exactly once, in its original pixels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Callable, Optional, Union

import numpy as np
from mindspore import Tensor, nn

from ..dense_evaluation import DenseEvaluator
from ..distributed import all_gather_object
from ..evaluation import Metric
from .coco import CocoDataset
from .detector import Detector
from .metrics import MAX_DETECTIONS, CocoEvaluator, table
from .postprocess import Detections, merged
from .transforms import DetectionEvalTransform, Prepared, SsdEvalTransform

Transform = Union[DetectionEvalTransform, SsdEvalTransform]
BOX_AP = Metric(
    ("ap", "ap50", "ap75"), "box AP", dict(ap="AP", ap50="AP at IoU 0.5", ap75="AP at IoU 0.75"), "validation"
)
MASK_AP = Metric(
    ("ap", "ap50", "ap75", "mask_ap", "mask_ap50"),
    "box AP",
    dict(ap="box AP", ap50="box AP at IoU 0.5", mask_ap="mask AP", mask_ap50="mask AP at IoU 0.5"),
    "validation",
)


def metric_of(network: type[Detector]) -> Metric:
    """What detectors of a kind are judged by; with masks, also by these."""
    return MASK_AP if network.has_masks else BOX_AP


@dataclass(frozen=True)
class DetectionScore:
    """COCO's figures of a set; see `CocoEvaluator.figures`."""

    figures: dict[str, Any]

    def columns(self) -> dict[str, float]:
        """The values of the metric's columns, in percent; nan where there is no ground truth."""
        box = self.figures["bbox"]
        found = dict(ap=box["AP"], ap50=box["AP50"], ap75=box["AP75"])
        if "segm" in self.figures:
            found.update(mask_ap=self.figures["segm"]["AP"], mask_ap50=self.figures["segm"]["AP50"])
        return {name: 100 * value for name, value in found.items()}

    def __str__(self) -> str:
        kinds = [
            (what, self.figures[kind]) for kind, what in (("bbox", "box"), ("segm", "mask")) if kind in self.figures
        ]
        said = [
            ", ".join(f"{what} {name} {_percent(figures[name])}" for name in ("AP", "AP50", "AP75"))
            for what, figures in kinds
        ]
        return f"{', '.join(said)} ({self.figures['images']:,} images, {self.figures['objects']:,} objects)"

    def table(self, per_class: bool = True) -> str:
        """All figures as text."""
        return table(self.figures, per_class)


def _percent(value: float) -> str:
    return "n/a" if np.isnan(value) else f"{100 * value:.2f} %"


@dataclass(frozen=True)
class DetectionOptions:
    """How objects are found.

    Attributes:
        score_threshold: what has no higher score is left out; None: the method's own.
        max_detections: of an image; None: the method's own. flip: see the mirror image as well.
    """

    score_threshold: Optional[float] = None
    max_detections: Optional[int] = None
    flip: bool = False


def detect(
    run: Callable[..., list[Detections]], images: Sequence[Prepared], options: DetectionOptions
) -> list[Detections]:
    """What is found in each of some images of one padded size, in its original pixels.

    Args:
        run: (images (B, C, H, W), images as they were prepared) -> detections in original pixels.
    """
    pixels = np.stack([image.image for image in images])
    found = run(pixels, images)
    if not options.flip:
        return found
    turned = pixels.copy()
    for row, image in zip(turned, images):
        width = image.image_shape[1]
        row[:, :, :width] = row[:, :, :width][:, :, ::-1]
    mirrored = run(turned, images)
    most = options.max_detections or 100
    return [
        merged([one, other.mirrored(image.original_shape[1])], max_detections=most)
        for one, other, image in zip(found, mirrored, images)
    ]


class DetectionEvaluator(DenseEvaluator):
    """An `Evaluator` of detectors.

    Args:
        network: a detector. kinds, max_detections: as of `CocoEvaluator`.

    The other arguments are those of `DenseEvaluator`.
    """

    def __init__(
        self,
        network: Optional[nn.Cell],
        dataset: CocoDataset,
        transform: Transform,
        batch_size: int = 1,
        options: DetectionOptions = DetectionOptions(),  # noqa: B008
        kinds: Sequence[str] = ("bbox",),
        max_detections: Sequence[int] = MAX_DETECTIONS,
        *,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 2,
    ) -> None:
        super().__init__(network, dataset, batch_size, rank, world_size, num_workers)
        self.transform, self.options, self.kinds, self.limits = transform, options, tuple(kinds), max_detections
        self.found: list[CocoEvaluator] = []

    def identity(self) -> dict[str, Any]:
        """What a score is of: which images, prepared how."""
        said = dict(asdict(self.transform), kinds=self.kinds, limits=self.limits, options=asdict(self.options))
        return json.loads(json.dumps(dict(self.dataset.identity(), **said)))

    def sizes(self) -> list[tuple[int, int]]:
        return [self.transform.padded_size((height, width)) for width, height in self.dataset.widths_heights.tolist()]

    def call(self, network: nn.Cell, images: Tensor, *more: Any) -> list[Detections]:
        return run_detector(network, images, more[0], self.options)

    def load(self, index: int) -> Prepared:
        return self.transform.sample(self.dataset, index)

    def see(self, images: list[Prepared]) -> Iterator[Detections]:
        """What is found, in original pixels."""
        return iter(detect(lambda pixels, some: self.runner(self.filled(pixels), some), images, self.options))

    def prepare(self, options: Any, on_signal: Callable[[int], None]) -> None:
        """See `Evaluator.prepare`."""
        self.compile_for(self.transform.preprocessing.in_channels, options, on_signal)

    def evaluate(
        self, weights: Sequence[Callable[[], None]], options: Any = None, progress: bool = False
    ) -> list[DetectionScore]:
        """See `Evaluator.evaluate`; `progress`: show a bar. What was found stays in `found`.

        Raises:
            DataError: an image cannot be read.
        """
        self.found = [CocoEvaluator(self.dataset, self.kinds, self.limits) for _ in weights]
        self.visit(weights, lambda kind, index, found, _: self.found[kind].update(index, found), options, progress)
        scores = []
        for evaluator in self.found:
            evaluator.merge(all_gather_object(evaluator.state()))
            scores.append(DetectionScore(evaluator.figures()))
        return scores


def run_detector(
    network: nn.Cell, images: Tensor, prepared: Sequence[Prepared], options: DetectionOptions
) -> list[Detections]:
    """What a `Runner` of detectors does: detections in original pixels of the first images of a batch."""
    shapes = [image.image_shape for image in prepared]
    height, width = images.shape[2:]
    shapes += [(height, width)] * (images.shape[0] - len(shapes))
    found = network.detect(images, shapes, options.score_threshold, options.max_detections)
    return [image.to_original(each) for image, each in zip(prepared, found)]
