"""The loss of segmenters: cross-entropy of logits, made as large as the labels, with labels of pixels."""

from __future__ import annotations

from mindspore import Tensor, ops
from mindspore import dtype as mstype

from .precision import Float32Cell
from .resize import bilinear

IGNORED = 255  # the label of pixels that count in no loss and no figure


def cropped(x: Tensor, height: int, width: int) -> Tensor:
    """The upper left part of (B, C, H, W)."""
    return x if (x.shape[2], x.shape[3]) == (height, width) else x[:, :, :height, :width]


class PixelLosses(Float32Cell):
    """The cross-entropy of each pixel, (B, H, W), for logits (B, classes, h, w), made `size` large, and labels
    (B, H, W) int32; where the label is `IGNORED`, some number. `size` and `align_corners` as in `PixelCrossEntropy`.
    """

    def __init__(self, align_corners: bool) -> None:
        super().__init__()
        self.align_corners = align_corners

    def construct(self, logits: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
        logits = cropped(bilinear(logits, size, self.align_corners), labels.shape[1], labels.shape[2])
        index = ops.select(labels != IGNORED, labels, ops.zeros_like(labels)).expand_dims(1)  # (B, 1, H, W)
        return -ops.gather_elements(ops.log_softmax(logits, 1), 1, index).squeeze(1)


class PixelCrossEntropy(Float32Cell):
    """Cross-entropy of logits (B, classes, h, w), made `size` large, with labels (B, H, W) int32; a scalar float32.

    Labels of `IGNORED` do not count. The sum over the others is divided by the number of all pixels (MMSegmentation's
    `avg_non_ignore=False`), or of the others when `over_valid` (PyTorch's mean; 0 where there are none). `size` may be
    larger than the labels: what overhangs at the right and below, is cut off.
    """

    def __init__(self, align_corners: bool, over_valid: bool) -> None:
        super().__init__()
        self.over_valid = over_valid
        self.losses = PixelLosses(align_corners)

    def construct(self, logits: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
        counted = (labels != IGNORED).astype(mstype.float32)
        total = ops.sum(self.losses(logits.astype(mstype.float32), labels, size) * counted)
        if self.over_valid:
            return total / ops.maximum(ops.sum(counted), 1.0)
        return total / (labels.shape[0] * labels.shape[1] * labels.shape[2])
