"""A network cut in two at one of its features, and gradients between the parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable, Optional

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from ..detection.detector import Detector, by_anchor
from ..detection.mask_rcnn import MaskRCNN
from ..detection.postprocess import sigmoid, softmax
from ..detection.ssdlite import SSDLite
from ..models.layers.backbone import Backbone
from ..models.sknet import SKNet
from ..modes import pynative_mode
from ..segmentation.segmenter import Segmenter, cropped

BUILT_ON_BACKBONE = (Segmenter, Detector)


def backbone_of(network: Any) -> Backbone:
    """The network itself, or what it is built on."""
    return network.backbone if isinstance(network, BUILT_ON_BACKBONE) else network


def later_features(backbone: Backbone, index: int, feature: Tensor) -> list[Tensor]:
    """Feature number `index` of a network and those after it, computed from that one."""
    features = [feature]
    if isinstance(backbone, SKNet):
        has_stem = len(backbone.feature_info) - len(backbone.stages)
        x = backbone.pool(feature) if index < has_stem else feature
        for stage in backbone.stages[max(0, index + 1 - has_stem) :]:
            for unit in stage:
                x = unit(x)
            features.append(x)
        return features
    for stage in backbone.stages[index + 1 :]:
        features.append(stage(features[-1]))
    return features


class Cut:
    """A network in two parts: images -> a feature -> what it gives. In PyNative mode.

    Args:
        network: a classifier, a segmenter or a detector, without accelerated cells.
        index: of the feature.

    Attributes:
        first_class: the column of the logits that has the first class: 1 where the background is before it.
    """

    def __init__(self, network: Any, index: int) -> None:
        self.network, self.index = network, index
        self.is_segmenter, self.is_detector = isinstance(network, Segmenter), isinstance(network, Detector)
        self.backbone: Backbone = backbone_of(network)
        self.first_class = int(isinstance(network, SSDLite))

    def prepared(self, images: Tensor) -> Tensor:
        """What the backbone is given."""
        return self.network.prepared(images, None) if self.is_segmenter or self.is_detector else images

    def features(self, images: np.ndarray) -> list[Tensor]:
        """All features of images (B, C, H, W)."""
        with pynative_mode():
            return list(self.backbone.forward_stages(self.prepared(Tensor(images))))

    def output(self, feature: Tensor, features: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Logits (B, classes) from the feature, of a segmenter (B, classes, H, W), of a detector (B, classes, anchors).

        Args:
            features: all of the images', of which a segmenter or a detector takes the earlier ones. size: of the
                images.
        """
        later = later_features(self.backbone, self.index, feature)
        if not (self.is_segmenter or self.is_detector):
            return self.network.forward_head(later[-1])
        every = [*features[: self.index], *later]
        taken = [every[i] for i in self.network.levels]
        if self.is_detector:
            return self._by_anchor(self.network.maps_of(taken)[0])
        logits = self.network.decode(taken)
        height, width = self.network.padded_size(*size)
        return cropped(self.network.resize(logits, (height, width)), *size)

    def _by_anchor(self, maps: Sequence[Tensor]) -> Tensor:
        """Scores of all levels, places and anchors, (B, classes, anchors): a background before the classes is kept."""
        classes = 1 if isinstance(self.network, MaskRCNN) else self.network.num_classes  # of an RPN: objectness
        columns = classes + self.first_class
        return ops.concat([by_anchor(x, x.shape[1] // columns) for x in maps], 1).swapaxes(1, 2)

    def whole(self, images: np.ndarray) -> np.ndarray:
        """The logits of images (B, C, H, W), as `output` has them, from the whole network."""
        with pynative_mode():
            found = self.network(Tensor(images.astype(np.float32)))
            return (self._by_anchor(found[0]) if self.is_detector else found).asnumpy()

    def certainties(self, logits: np.ndarray) -> np.ndarray:
        """(B, classes): the highest probability of each class over a detector's anchors, of (B, classes, anchors)."""
        found = softmax(logits.swapaxes(1, 2)).swapaxes(1, 2) if self.first_class else sigmoid(logits)
        return found[:, self.first_class :].max(2)

    def scores(self, logits: Tensor, targets: Tensor, masks: Optional[Tensor]) -> Tensor:
        """What is explained, summed over the images: the target's logit; where there are masks its sum over them.

        Args:
            targets: (B,) int32, numbers of columns. masks: (B, H, W), the pixels that were taken for the target; of a
                detector (B, anchors), the anchor with its highest score.
        """
        chosen = ops.one_hot(targets, logits.shape[1]).astype(logits.dtype)
        if masks is None:
            return (logits * chosen).sum()
        return (logits * chosen.reshape(*chosen.shape, *[1] * (logits.ndim - 2)) * masks.expand_dims(1)).sum()

    def gradient(
        self, features: list[Tensor], size: tuple[int, int], targets: np.ndarray, masks: Optional[np.ndarray]
    ) -> np.ndarray:
        """Of the scores by the feature, (B, C, h, w)."""
        with pynative_mode():
            wanted = Tensor(targets.astype(np.int32))
            pixels = None if masks is None else Tensor(masks.astype(np.float32))

            def score(feature: Tensor) -> Tensor:
                return self.scores(self.output(feature, features, size), wanted, pixels)

            return ms.grad(score)(features[self.index]).asnumpy()


def input_gradient(function: Callable[[Tensor], Tensor], images: np.ndarray) -> np.ndarray:
    """Of a scalar by images (B, C, H, W), in PyNative mode."""
    with pynative_mode():
        return ms.grad(function)(Tensor(images)).asnumpy()
