"""What every detector is: a backbone, a neck, heads that give maps, the losses, and detections from the maps.

Parts have MMDetection's names: `backbone`, `neck`, `bbox_head`, `rpn_head`, `roi_head`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional, Union

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import constexpr

from ..errors import SettingError
from ..models.layers.backbone import Backbone
from ..models.layers.boxes import mark_objects
from ..segmentation.segmenter import padded, size_padding
from .postprocess import Detections

Maps = Sequence[Tensor]
SIZE_DIVISOR = 32  # each image of a batch counts as padded to a multiple of it, whatever the batch's size


@constexpr
def check_inputs(
    images: tuple[int, ...], channels: int, noise: Optional[tuple[int, ...]] = None, noise_size: int = 0
) -> None:
    """SettingError where shapes are not (B, channels, H, W) and, if there is noise, (B, noise_size)."""
    if len(images) != 4 or images[1] not in (channels, -1) or 0 in images:
        raise SettingError(f"the network takes images (B, {channels}, H, W), at least one; found {images}")
    if noise is not None and noise != (images[0], noise_size) and -1 not in (*images, *noise):
        raise SettingError(f"the network takes noise {(images[0], noise_size)}; found {noise}")


@constexpr
def check_targets(
    images: tuple[int, ...], boxes: tuple[int, ...], labels: tuple[int, ...], image_shapes: tuple[int, ...]
) -> None:
    """SettingError where targets are not boxes (B, M, 4), labels (B, M) and image_shapes (B, 2) of the images."""
    if -1 in (*images, *boxes, *labels, *image_shapes):
        return
    b = images[0]
    if len(boxes) != 3 or boxes[0] != b or boxes[2] != 4 or labels != boxes[:2] or image_shapes != (b, 2):
        raise SettingError(
            f"targets have the shapes {boxes}, {labels} and {image_shapes}; {b} images take boxes ({b}, M, 4), labels "
            f"({b}, M), which are -1 where there is no object, and image_shapes ({b}, 2)"
        )
    if boxes[1] < 1:
        raise SettingError("boxes have no rows; an image without objects has one with the label -1")


class Detector(nn.Cell):
    """A network that finds objects of some classes.

    Args:
        backbone: a network of ours, made with `features_only`.
        num_classes: of objects; the background is none of them.

    Inputs:
        images (B, in_channels, H, W), of any size: where the backbone needs more pixels, zeros are added at the right
        and below.

    Returns:
        `head_maps(images)`: scores and deltas, each a tuple with a map a level, the finest first.

    Raises:
        SettingError: the inputs have other shapes.

    Targets, what `losses` takes after the images, in this order (`target_columns`):
        boxes (B, M, 4) float32 x1 y1 x2 y2 in pixels of the images; labels (B, M) int32 from 0, -1 where there is no
        object (boxes without an area count as none); image_shapes (B, 2) int32, height and width of each image before
        it was padded to the batch's size. A method may take more. M is any fixed number.
    """

    method = ""
    has_masks = False  # whether objects have masks, which training then takes as well
    fixed_size = False  # whether images are resized to one size, and lose their ratio
    classifiers: tuple[str, ...] = ()  # the layers whose outputs are the classes
    target_columns: tuple[str, ...] = ("boxes", "labels", "image_shapes")
    score_threshold, max_detections = 0.05, 100  # of `detect`
    world_size = 1  # the trainer says how many processes there are: some losses are divided by means over them
    num_key_columns = 0  # columns of noise after the backbone's

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
            raise SettingError(f"num_classes is {num_classes!r}; expected a number of classes, without the background")
        self.backbone, self.num_classes = backbone, num_classes
        self.model_name = f"{self.method}_{backbone.model_name}"
        self.in_channels = backbone.in_channels
        # The stages' features, from the finest to the coarsest: a stem's is left out.
        known: Any = backbone.feature_info
        self.levels = [i for i, info in enumerate(known) if info["name"].startswith("stages.")]
        self.feature_channels = [known[i]["chs"] for i in self.levels]
        self.reductions = [known[i]["reduction"] for i in self.levels]
        # Arguments of `create_detector` that no parameter's shape shows: checkpoints record them. The epsilon of a
        # dense backbone may differ from the classifier's whose weights it starts from: it is the detector's.
        self.options: dict[str, Any] = dict(backbone.options)
        backbone.options.pop("norm_eps", None)
        self.padded_size = size_padding(backbone)
        self.num_drop_paths = backbone.num_drop_paths
        self.noise_size = self.num_drop_paths + self.num_key_columns

    def add_flags_recursive(self, **flags) -> nn.Cell:
        # Mixed precision is for backbone, neck and heads: in float16 a box of a large image would be pixels off.
        super().add_flags_recursive(**flags)
        if flags.get("fp16") or flags.get("bf16"):
            self.add_flags(fp16=False, bf16=False, fp32=True)
        return self

    @staticmethod
    def classes_of_rows(rows: int) -> int:
        """The number of classes for which the first of `classifiers` has so many rows."""
        raise NotImplementedError

    @staticmethod
    def class_rows(layer: str, order: Sequence[int]) -> list[int]:
        """Which rows one of `classifiers` takes to have its classes in another order; order: the old number of each."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay: all of one dimension (asked for by MindCV's optimisers)."""
        return {p.name for p in self.trainable_params() if p.ndim <= 1}

    def why_too_small(self, height: int, width: int) -> str:
        """Empty: no image is too small, for small ones are padded."""
        return ""

    def check_image_size(self, height: int, width: int) -> None:
        """Nothing: images of any size are taken."""

    def prepared(self, images: Tensor, noise: Optional[Tensor] = None) -> Tensor:
        """Checked and padded images."""
        check_inputs(images.shape, self.in_channels, None if noise is None else noise.shape, self.noise_size)
        height, width = self.padded_size(images.shape[2], images.shape[3])
        return padded(images, height, width)

    def features(self, images: Tensor, noise: Optional[Tensor] = None) -> list[Tensor]:
        """The features of the backbone's stages for padded images, from the finest to the coarsest."""
        columns = None if noise is None or self.num_drop_paths == 0 else noise[:, : self.num_drop_paths]
        features = self.backbone.forward_stages(images, columns)
        return [features[i] for i in self.levels]

    def maps_of(self, features: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Scores and deltas of each level, from the backbone's features."""
        raise NotImplementedError

    def head_maps(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The raw maps of each level: scores, a tuple of (B, anchors * classes, h, w); deltas, (B, anchors * 4, h, w).

        Scores are before sigmoid or softmax, and deltas before they are decoded. Anchors vary slowest in the channels.
        """
        return self.maps_of(self.features(self.prepared(images)))

    def construct(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return self.head_maps(images)

    def checked_targets(
        self, images: Tensor, boxes: Tensor, labels: Tensor, image_shapes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Boxes (B, M, 4), zeros where there is no object, and labels (B, M), -1 there."""
        check_targets(images.shape, boxes.shape, labels.shape, image_shapes.shape)
        boxes, real = mark_objects(boxes, labels)
        labels = labels.astype(mstype.int32)
        return boxes, ops.select(real, labels, ops.full_like(labels, -1))

    def over_processes(self, count: Tensor) -> Tensor:
        """The mean over all processes of a number that losses are divided by, as MMDetection's `reduce_mean`."""
        if self.world_size == 1:
            return count
        return ops.AllReduce()(count) / self.world_size

    def losses(self, images: Tensor, *targets: Tensor) -> dict[str, Tensor]:
        """What training minimises is the sum of these: name -> a scalar float32. `targets` see the class; the last of
        them may be noise (B, `noise_size`)."""
        raise NotImplementedError

    def detect(
        self,
        images: Union[Tensor, np.ndarray],
        image_shapes: Union[Tensor, np.ndarray, Sequence, None] = None,
        score_threshold: Optional[float] = None,
        max_detections: Optional[int] = None,
    ) -> list[Detections]:
        """The objects in each image, the most certain first.

        Args:
            images: (B, in_channels, H, W).
            image_shapes: (B, 2), height and width of each before it was padded; None: (H, W) of all.
            score_threshold: what has no higher score is left out; None for the method's own.
            max_detections: of an image; None for the method's own.

        Returns:
            Of each image `boxes` (n, 4) float32 x1 y1 x2 y2 in pixels of the input, `scores` (n,) float32, `labels`
            (n,) int32 from 0, and `masks` (n, H, W) bool of the size before padding where the method has them, else
            None. All NumPy.

        Raises:
            SettingError: the inputs have other shapes, or a number is out of range.
        """
        images = images if isinstance(images, Tensor) else Tensor(np.ascontiguousarray(images, np.float32))
        shapes = self._shapes(images, image_shapes)
        threshold = self.score_threshold if score_threshold is None else score_threshold
        most = self.max_detections if max_detections is None else max_detections
        if not 0 <= threshold <= 1:
            raise SettingError(f"score_threshold is {threshold!r}; expected 0 to 1")
        if isinstance(most, bool) or not isinstance(most, (int, np.integer)) or most < 1:
            raise SettingError(f"max_detections is {most!r}; expected a number from 1 on")
        was_training = self.training
        self.set_train(False)
        try:
            return self._detections(images, shapes, float(threshold), int(most))
        finally:
            self.set_train(was_training)

    def _shapes(self, images: Tensor, image_shapes: Any) -> list[tuple[int, int]]:
        check_inputs(tuple(images.shape), self.in_channels)
        b, _, height, width = images.shape
        if image_shapes is None:
            return [(height, width)] * b
        shapes = image_shapes.asnumpy() if isinstance(image_shapes, Tensor) else np.asarray(image_shapes)
        if shapes.shape != (b, 2) or (shapes < 1).any() or (shapes > [height, width]).any():
            raise SettingError(
                f"image_shapes are {shapes.tolist()}; expected ({b}, 2): height and width of each of the {b} images, "
                f"at most {height} and {width}"
            )
        return [(int(h), int(w)) for h, w in shapes]

    def _detections(
        self, images: Tensor, shapes: list[tuple[int, int]], score_threshold: float, max_detections: int
    ) -> list[Detections]:
        raise NotImplementedError


def map_sizes(maps: Maps) -> tuple[tuple[int, int], ...]:
    """(height, width) of each level."""
    return tuple([(x.shape[2], x.shape[3]) for x in maps])


def by_anchor(x: Tensor, num_anchors: int) -> Tensor:
    """A map (B, anchors * C, h, w) as (B, h * w * anchors, C): row by row, the anchors of a cell together."""
    b, channels, h, w = x.shape
    return x.reshape(b, num_anchors, channels // num_anchors, h * w).transpose(0, 3, 1, 2).reshape(
        b, h * w * num_anchors, channels // num_anchors
    )  # fmt: skip


def arrays(maps: Maps) -> list[np.ndarray]:
    """The levels in NumPy."""
    return [x.asnumpy() for x in maps]
