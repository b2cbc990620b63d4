"""A network cut in two at one of its features, and gradients between the parts."""

from __future__ import annotations

from typing import Any, Callable, Optional

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from ..models.layers.backbone import Backbone
from ..models.sknet import SKNet
from ..modes import pynative_mode
from ..segmentation.segmenter import Segmenter, cropped


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
        network: a classifier or a segmenter, without accelerated cells.
        index: of the feature.
    """

    def __init__(self, network: Any, index: int) -> None:
        self.network, self.index = network, index
        self.is_segmenter = isinstance(network, Segmenter)
        self.backbone: Backbone = network.backbone if self.is_segmenter else network

    def features(self, images: np.ndarray) -> list[Tensor]:
        """All features of images (B, C, H, W)."""
        with pynative_mode():
            x = Tensor(images)
            x = self.network.prepared(x, None) if self.is_segmenter else x
            return list(self.backbone.forward_stages(x))

    def output(self, feature: Tensor, features: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Logits (B, classes), or of a segmenter (B, classes, H, W), from the feature.

        Args:
            features: all of the images', of which a segmenter takes the earlier ones. size: of the images.
        """
        later = later_features(self.backbone, self.index, feature)
        if not self.is_segmenter:
            return self.network.forward_head(later[-1])
        every = [*features[: self.index], *later]
        logits = self.network.decode([every[i] for i in self.network.levels])
        height, width = self.network.padded_size(*size)
        return cropped(self.network.resize(logits, (height, width)), *size)

    def scores(self, logits: Tensor, targets: Tensor, masks: Optional[Tensor]) -> Tensor:
        """What is explained, summed over the images: the target's logit; of a segmenter, its sum over `masks`.

        Args:
            targets: (B,) int32. masks: (B, H, W), the pixels that were taken for the target.
        """
        chosen = ops.one_hot(targets, logits.shape[1]).astype(logits.dtype)
        if masks is None:
            return (logits * chosen).sum()
        return (logits * chosen.reshape(*chosen.shape, 1, 1) * masks.expand_dims(1)).sum()

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
