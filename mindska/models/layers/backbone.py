"""What every network of ours is: stages whose outputs are features, and a classifier on the mean of the last."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Callable, Optional

from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from ...errors import SettingError
from .blocks import Dropout


@constexpr
def check_inputs(
    images: tuple[int, ...], channels: int, smallest_side: int, noise: Optional[tuple[int, ...]], noise_size: int
) -> None:
    """SettingError where shapes are not (B, channels, H, W) and, if there is noise, (B, noise_size)."""
    if len(images) != 4 or images[1] not in (channels, -1) or 0 in images:
        raise SettingError(f"the network takes images (B, {channels}, H, W), at least one; found {images}")
    refuse_too_small(partial(why_below, smallest_side=smallest_side), *images[2:])
    if noise is not None and noise != (images[0], noise_size) and -1 not in (*images, *noise):
        raise SettingError(f"the network takes noise {(images[0], noise_size)}; found {noise}")


def refuse_too_small(why_too_small: Callable[[int, int], str], height: int, width: int) -> None:
    """SettingError where `why_too_small(height, width)` has a reason; it names the smallest square images."""
    if reason := why_too_small(height, width):
        smallest = next(side for side in range(1, 1025) if not why_too_small(side, side))
        raise SettingError(f"{reason}. The smallest square input is {smallest}x{smallest}.")


def why_below(height: int, width: int, smallest_side: int) -> str:
    """Why images of so few pixels are too small; empty when they are not (or not known in a graph, -1)."""
    if min((side for side in (height, width) if side > 0), default=smallest_side) >= smallest_side:
        return ""
    return f"the network needs at least {smallest_side} pixels on each side, but the input has {height}x{width}"


def check_compiled(backbone: Backbone, inputs: Sequence[Any]) -> None:
    """SettingError where images are too small. Before MindSpore compiles a graph, whose errors are pages with files."""
    shape: tuple[int, ...] = getattr(inputs[0], "shape", ()) if inputs else ()
    if (
        len(shape) == 4 and min(shape) > 0 and shape[1] == backbone.in_channels
    ):  # else `check_inputs` says what is wrong
        backbone.check_image_size(*shape[2:])


class Backbone(nn.Cell):
    """A network that gives logits or its stages' features.

    Args:
        in_channels: of the images.
        channels, reductions: channels and stride of each feature, as `forward_features` returns them.
        names: of the features, as "stages.0".
        num_drop_paths: stochastic depths in `forward_features`, each of which takes a column of `noise`.
        num_classes: length of the logits.
        drop_rate: dropout before the classifier.
        drop_path_rate: of the last stochastic depth; only its range is checked here.
        features_only: return the features, and have no classifier.

    Inputs:
        x (B, in_channels, H, W); noise (B, `noise_size`), optional: uniform numbers in [0, 1) that drive the stochastic
        layers in training mode (`num_drop_paths` columns for the stages, then one a feature of the classifier's input).

    Returns:
        Logits (B, num_classes), or the list of features (B, C, H / stride, W / stride) when `features_only`.

    Raises:
        SettingError: the inputs have other shapes, are too small, or there are no images.
    """

    smallest_side = 1  # of an image, in pixels
    options: dict[str, Any] = {}  # arguments of create_model that no parameter's shape shows: checkpoints record them
    is_rewritten = True  # MindCV's FeatureExtractWrapper: this network returns its features itself

    def __init__(
        self,
        channels: Sequence[int],
        reductions: Sequence[int],
        names: Sequence[str],
        num_drop_paths: int,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        features_only: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            if not 0 <= rate < 1:
                raise SettingError(f"{name} is {rate}; expected a probability in [0, 1)")
        self.num_drop_paths = num_drop_paths
        self.noise_size = num_drop_paths + channels[-1]
        self.feature_info = [
            dict(chs=chs, reduction=reduction, name=name) for chs, reduction, name in zip(channels, reductions, names)
        ]
        self.num_classes = num_classes
        self.features_only = features_only
        if not features_only:
            self.dropout = Dropout(drop_rate)
            self.classifier = nn.Dense(channels[-1], num_classes)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay: all of one dimension (asked for by MindCV's optimisers)."""
        return {p.name for p in self.trainable_params() if p.ndim <= 1}

    def why_too_small(self, height: int, width: int) -> str:
        """Why the network cannot take images of so few pixels; empty when it can."""
        return why_below(height, width, self.smallest_side)

    def check_image_size(self, height: int, width: int) -> None:
        """SettingError where images of height x width pixels are too small."""
        refuse_too_small(self.why_too_small, height, width)

    def compile(self, *args, **kwargs) -> None:
        check_compiled(self, args)
        super().compile(*args, **kwargs)

    def forward_features(self, x: Tensor, noise: Optional[Tensor] = None) -> list[Tensor]:
        """The features, from the finest to the coarsest."""
        raise NotImplementedError

    def construct(self, x: Tensor, noise: Optional[Tensor] = None) -> Tensor:
        check_inputs(
            x.shape, self.in_channels, self.smallest_side, None if noise is None else noise.shape, self.noise_size
        )
        features = self.forward_features(x, noise)
        if self.features_only:
            return features
        pooled = ops.mean(features[-1], (2, 3))  # (B, C)
        return self.classifier(self.dropout(pooled, None if noise is None else noise[:, self.num_drop_paths :]))
