"""The door to MindCV's factory: variants become entry points of `mindcv.create_model`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable, Optional

from mindcv.models.features import FeatureExtractWrapper
from mindcv.models.registry import get_pretrained_cfg, register_model
from mindspore import nn

from ..errors import SettingError

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

    `resolve`: the name of the model that an entry point makes with some keywords, where these choose another variant.
    """
    for name, row in variants.items():
        OUR_MODELS[name] = module
        register_model(_entry_point(module, name, network, row, resolve))


def _entry_point(module: str, name: str, network, row: dict, resolve) -> Callable[..., nn.Cell]:
    def create(
        pretrained: bool = False,
        num_classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        out_indices: Optional[Sequence[int]] = None,
        **kwargs,
    ) -> nn.Cell:
        if pretrained:
            raise SettingError(
                f"No MindSpore weights are published for {name}, so pretrained=True cannot be honoured. "
                f"Convert the authors' weights with mindska.weights and pass checkpoint_path instead."
            )
        net = network(
            **{**row, **kwargs}, num_classes=num_classes, in_channels=in_channels, features_only=features_only
        )
        net.model_name = resolve(name, kwargs)
        for change in AFTER_CREATION:
            net = change(net)
        if not features_only:
            return net
        out_indices = range(len(net.feature_info)) if out_indices is None else out_indices
        wrong = [i for i in out_indices if not 0 <= i < len(net.feature_info)]
        if wrong:
            raise SettingError(
                f"out_indices {list(out_indices)}: {wrong} do not exist; {name} has the features "
                + ", ".join(f"{i} (stride {info['reduction']})" for i, info in enumerate(net.feature_info))
            )
        return FeatureExtractWrapper(net, out_indices=list(out_indices))

    create.__name__ = create.__qualname__ = name
    create.__module__ = module
    create.__doc__ = f"{name}: {network.__name__} with {row}."
    return create
