"""The door to MindCV's factory: variants become entry points of `mindcv.create_model`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Callable, Optional, Union

import numpy as np
from mindcv.models.features import FeatureExtractWrapper
from mindcv.models.registry import get_pretrained_cfg, register_model
from mindspore import nn

from ..errors import SettingError
from .layers.backbone import check_compiled

OUR_MODELS: dict[str, str] = {}  # model name -> module
AFTER_CREATION: list[Callable[[nn.Cell], nn.Cell]] = []  # what is done to every network that an entry point has made
IMAGENET = dict(  # what MindCV does with images where a model says nothing
    input_size=(3, 224, 224),
    crop_pct=0.875,
    interpolation="bilinear",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)


def own_preprocessing(model_name: str) -> dict[str, Any]:
    """What a model of MindCV's factory expects of an image: the arguments of `mindska.data.Preprocessing`."""
    card = {**IMAGENET, **get_pretrained_cfg(model_name)}
    size = tuple(card["input_size"][1:])
    return dict(image_size=size, **{name: card[name] for name in ("crop_pct", "interpolation", "mean", "std")})


def register_variants(
    module: str,
    network: Callable[..., nn.Cell],
    variants: dict[str, dict],
    resolve: Callable[[str, dict], str] = lambda name, keywords: name,
) -> None:
    """Makes one entry point a row of `variants` (model name -> keyword arguments of `network`) and registers it.

    timm's keywords are understood beside MindCV's: `in_chans`, `num_classes=0`, `global_pool`, negative `out_indices`.

    `resolve`: the name of the model that an entry point makes with some keywords, where these choose another variant.
    """
    for name, row in variants.items():
        OUR_MODELS[name] = module
        register_model(_entry_point(module, name, network, row, resolve))


class Features(FeatureExtractWrapper):
    """A network that gives its features."""

    def compile(self, *args, **kwargs) -> None:
        check_compiled(self.net, args)
        super().compile(*args, **kwargs)

    def get_classifier(self) -> nn.Cell:
        """An identity: there is no classifier."""
        return self.net.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """A SettingError: there is no classifier."""
        self.net.reset_classifier(num_classes, global_pool)


def feature_indices(net: nn.Cell, out_indices: Union[int, Sequence[int], None]) -> list[int]:
    """The numbers of the features that a network is asked for, as timm understands `out_indices`.

    None: all; a number n: the last n; a negative one counts from the end. Features come once each, in the order of the
    network, whatever the order in which they are asked for.

    Raises:
        SettingError: there is no such feature, or none is asked for.
    """
    count = len(net.feature_info)
    asked: Any = range(count) if out_indices is None else out_indices
    if isinstance(asked, (int, np.integer)):
        asked = range(-int(asked), 0)
    numbers = list(asked) if isinstance(asked, Iterable) else [asked]
    wrong = [i for i in numbers if not isinstance(i, (int, np.integer)) or not -count <= i < count]
    if wrong or not numbers:
        names = ", ".join(f"{i} (stride {info['reduction']})" for i, info in enumerate(net.feature_info))
        raise SettingError(
            f"out_indices is {out_indices!r}: {wrong or 'no features'} do not exist; expected numbers of features "
            f"(negative ones count from the end), or how many of the last ones; {net.model_name} has {names}"
        )
    return sorted({int(i) % count for i in numbers})


def _entry_point(module: str, name: str, network, row: dict, resolve) -> Callable[..., nn.Cell]:
    def create(
        pretrained: bool = False,
        num_classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        out_indices: Union[int, Sequence[int], None] = None,
        in_chans: Optional[int] = None,
        **kwargs,
    ) -> nn.Cell:
        if pretrained:
            raise SettingError(
                f"No MindSpore weights are published for {name}, so pretrained=True cannot be honoured. "
                f"Convert the authors' weights with mindska.weights and pass checkpoint_path instead."
            )
        if in_chans is not None:  # timm's word; 3 is what MindCV's create_model passes where nothing was said
            if in_channels not in (3, in_chans):
                raise SettingError(f"in_channels is {in_channels} and in_chans {in_chans}; give one of them")
            in_channels = in_chans
        net = network(
            **{**row, **kwargs}, num_classes=num_classes, in_channels=in_channels, features_only=features_only
        )
        net.model_name = resolve(name, kwargs)
        for change in AFTER_CREATION:
            net = change(net)
        if not features_only:
            return net
        return Features(net, feature_indices(net, out_indices))

    create.__name__ = create.__qualname__ = name
    create.__module__ = module
    create.__doc__ = f"{name}: {network.__name__} with {row}."
    return create
