"""Strict loading behind `mindcv.create_model(..., checkpoint_path=...)`, for our models only.

Of a file with averaged and raw weights the averaged are taken, as everywhere, and it is said. MindCV's `ema=False` is
its default, so it cannot mean "the raw ones": for these, `open_weights(path, ema=False).network()`. `ema=True` insists.
"""

from __future__ import annotations

from mindcv.models import model_factory
from mindcv.models.features import FeatureExtractWrapper
from mindspore import nn

from .convert import is_ours
from .loading import open_weights

_mindcvs = model_factory.load_model_checkpoint


def _load_model_checkpoint(model: nn.Cell, checkpoint_path: str = "", ema: bool = False, auto_mapping: bool = False):
    # MindCV's loader does nothing, without a word, when the file is missing or no name fits.
    inner = model.net if isinstance(model, FeatureExtractWrapper) else model
    if is_ours(getattr(inner, "model_name", "")):
        open_weights(checkpoint_path, inner.model_name, ema or None).load_into(inner)
    else:
        _mindcvs(model, checkpoint_path, ema, auto_mapping)


model_factory.load_model_checkpoint = _load_model_checkpoint
