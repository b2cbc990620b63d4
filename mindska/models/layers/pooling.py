"""Pooling after a stem, where Caffe, PyTorch and MindSpore differ at the border."""

from __future__ import annotations

from mindspore import Tensor, nn, ops


class StemPool(nn.Cell):
    """Maximum over 3x3 with stride 2. (B, C, H, W), not negative -> (B, C, H/2, W/2), rounded up or down

    `padded`: by 1 on every side (timm). Else not, and the number of windows is rounded up (Caffe).
    """

    def __init__(self, padded: bool) -> None:
        super().__init__()
        self.padded = padded
        self.overhanging = nn.MaxPool2d(3, 2, pad_mode="same")
        self.fitting = nn.MaxPool2d(3, 2, pad_mode="valid")

    def construct(self, x: Tensor) -> Tensor:
        even = (x.shape[2] % 2 == 0, x.shape[3] % 2 == 0)
        if not self.padded and all(even):  # "same" then pads one row and column, at the lower right
            return self.overhanging(x)
        # After a ReLU a border of zeros changes no maximum. It is joined on because the gradient of `ops.pad` is wrong
        # from its second run on (MindSpore 2.8, graph mode on CPU).
        row = ops.zeros_like(x[:, :, :1])
        if self.padded:
            x = ops.concat((row, x, row), axis=2)
        elif even[0]:
            x = ops.concat((x, row), axis=2)
        column = ops.zeros_like(x[:, :, :, :1])
        if self.padded:
            x = ops.concat((column, x, column), axis=3)
        elif even[1]:
            x = ops.concat((x, column), axis=3)
        return self.fitting(x)
