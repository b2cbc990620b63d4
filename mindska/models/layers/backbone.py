"""What every network of ours is: stages whose outputs are features, and a classifier on the mean of the last."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from numbers import Integral
from typing import Any, Callable, Optional

from mindspore import Tensor, nn, ops
from mindspore.common.initializer import HeUniform, initializer
from mindspore.ops import constexpr

from ...errors import SettingError
from .blocks import Dropout

GLOBAL_POOLS = ("avg", "max", "")


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


def stage_strides(reductions: Sequence[int], output_stride: Optional[int]) -> list[tuple[int, int, int]]:
    """(reduction, stride, dilation) of each stage where no feature may be coarser than `output_stride`.

    A stage that would make it coarser has stride 1 and, in its strided convolutions, the dilation that makes up for the
    strides removed before it; what follows in the stage is not dilated. This is what apple/ml-cvnets does to MobileViT;
    for the networks here it is our reading, for no authors published dilated ones.

    Args:
        reductions: of the stages' outputs as the network is published. The first stage keeps its stride.
        output_stride: None for the network as it is.

    Raises:
        SettingError: the output stride is none of the stages', or finer than the first.
    """
    if output_stride is not None and output_stride < reductions[-1] and output_stride not in reductions:
        raise SettingError(f"output_stride is {output_stride!r}; expected one of {', '.join(map(str, reductions))}")
    placed, dilation = [(reductions[0], reductions[0], 1)], 1
    for before, after in zip(reductions, reductions[1:]):
        stride = after // before
        if output_stride is not None and after > output_stride:
            placed.append((output_stride, 1, dilation))
            dilation *= stride
        else:
            placed.append((after, stride, 1))
    return placed


class Backbone(nn.Cell):
    """A network that gives logits, pooled features or its stages' features.

    Args:
        in_channels: of the images.
        channels, reductions: channels and stride of each feature, as `forward_stages` returns them.
        names: of the features, as "stages.0".
        num_drop_paths: stochastic depths in `forward_stages`, each of which takes a column of `noise`.
        num_classes: length of the logits; 0 for no classifier.
        global_pool: of the last feature over its pixels: "avg", "max", or "" for none (without a classifier only).
        drop_rate: dropout before the classifier.
        drop_path_rate: of the last stochastic depth; only its range is checked here.
        features_only: return the features, and have no classifier.
        output_stride: of the coarsest feature, for features only (see `stage_strides`, which `reductions` follow).

    Inputs:
        x (B, in_channels, H, W); noise (B, `noise_size`), optional: uniform numbers in [0, 1) that drive the stochastic
        layers in training mode (`num_drop_paths` columns for the stages, then one a feature of the classifier's input).

    Returns:
        Logits (B, num_classes); with num_classes=0 the pooled features (B, num_features), or without pooling the last
        map; when `features_only` the list of features (B, C, H / stride, W / stride).

    Raises:
        SettingError: the inputs have other shapes, are too small, or there are no images.
    """

    classifier: nn.Cell  # the last layer; an identity where there are no classes
    global_pool: str
    smallest_side = 1  # of an image, in pixels
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
        global_pool: str = "avg",
        output_stride: Optional[int] = None,
    ) -> None:
        super().__init__()
        if output_stride is not None and not features_only:
            raise SettingError("output_stride is for features: make the network with features_only=True")
        self.in_channels = in_channels
        for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            if not 0 <= rate < 1:
                raise SettingError(f"{name} is {rate}; expected a probability in [0, 1)")
        self.num_drop_paths = num_drop_paths
        self.noise_size = num_drop_paths + channels[-1]
        self.feature_info: list[dict[str, Any]] = [
            dict(chs=chs, reduction=reduction, name=name) for chs, reduction, name in zip(channels, reductions, names)
        ]
        self.num_features = channels[-1]
        self.features_only = features_only
        # Arguments of create_model that no parameter's shape shows: checkpoints record them.
        self.options: dict[str, Any] = {}
        self.dropout = Dropout(drop_rate)
        self._make_head(0 if features_only else num_classes, global_pool)

    def _make_head(self, num_classes: int, global_pool: str) -> None:
        if not isinstance(num_classes, Integral) or isinstance(num_classes, bool) or num_classes < 0:
            raise SettingError(f"num_classes is {num_classes!r}; expected a number of classes, or 0 for no classifier")
        if global_pool not in GLOBAL_POOLS:
            raise SettingError(f"global_pool is {global_pool!r}; expected 'avg', 'max', or '' for no pooling")
        if num_classes and not global_pool:
            raise SettingError("global_pool='' leaves a map, which the classifier cannot take; it needs num_classes=0")
        self.num_classes, self.global_pool = num_classes, global_pool
        self.options.pop("global_pool", None)
        if num_classes:  # without a classifier, nothing was trained on what is pooled
            self.options["global_pool"] = global_pool
        self.classifier = nn.Dense(self.num_features, num_classes) if num_classes else nn.Identity()

    def init_classifier(self) -> None:
        """Initial values of a new classifier: PyTorch's uniform distribution, as timm has it."""
        self.classifier.weight.set_data(initializer(HeUniform(5**0.5), self.classifier.weight.shape))

    def get_classifier(self) -> nn.Cell:
        """The last layer: a linear one, or an identity where there are no classes."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Makes a new classifier with initial values, in place; `num_classes` 0: none. The rest of the network stays.

        An optimiser must be made afterwards: it holds the old classifier's parameters.

        Args:
            global_pool: "avg", "max" or "" (see the class); None: as it is.

        Raises:
            SettingError: the arguments are out of range, or the network was made with `features_only`.
        """
        if self.features_only:
            raise SettingError(
                "a network made with features_only has no classifier to reset; make it with num_classes instead"
            )
        self._make_head(num_classes, self.global_pool if global_pool is None else global_pool)
        if num_classes:
            self.init_classifier()
        self.classifier.set_train(self.training)
        for _, cell in self.cells_and_names():  # MindSpore does not notice that a network has another cell
            if cell.compile_cache:
                cell.compile_cache.clear()

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

    def forward_stages(self, x: Tensor, noise: Optional[Tensor] = None) -> list[Tensor]:
        """The features, from the finest to the coarsest."""
        raise NotImplementedError

    def stage_cells(self) -> list[list[nn.Cell]]:
        """The cells that make each feature of the one before (the first of the images), in the order of their use."""
        raise NotImplementedError

    def checked_stages(self, x: Tensor, noise: Optional[Tensor]) -> list[Tensor]:
        """As `forward_stages`, of inputs that are checked first."""
        shape = None if noise is None else noise.shape
        check_inputs(x.shape, self.in_channels, self.smallest_side, shape, self.noise_size)
        return self.forward_stages(x, noise)

    def forward_features(self, x: Tensor, noise: Optional[Tensor] = None) -> Tensor:
        """The last feature, before pooling and classifier: (B, num_features, H / stride, W / stride)."""
        return self.checked_stages(x, noise)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False, noise: Optional[Tensor] = None) -> Tensor:
        """Pooling, dropout and classifier on the last feature.

        Args:
            x: (B, num_features, H', W'), from `forward_features`.
            pre_logits: leave the classifier out.
            noise: (B, num_features), for the dropout in training.
        """
        if self.global_pool == "":
            return x
        pooled = ops.amax(x, (2, 3)) if self.global_pool == "max" else ops.mean(x, (2, 3))  # (B, C)
        pooled = self.dropout(pooled, noise)
        return pooled if pre_logits else self.classifier(pooled)

    def construct(self, x: Tensor, noise: Optional[Tensor] = None) -> Tensor:
        features = self.checked_stages(x, noise)
        if self.features_only:
            return features
        return self.forward_head(features[-1], False, None if noise is None else noise[:, self.num_drop_paths :])
