"""Runs a command of the project with a network that compiles in seconds: `python tiny.py train.py --model tiny ...`.

`tiny` has no batch norm, so that N ranks follow one rank to rounding. `tiny_bn` has one, drop path and dropout.
"""

import runpy
import sys

import numpy as np
from mindcv.models.registry import register_model
from mindspore import nn, ops

from mindska.models.layers.blocks import Dropout, batch_norm


class Tiny(nn.Cell):
    def __init__(self, num_classes=10, in_channels=3, bn=False, drop_rate=0.0, drop_path_rate=0.0):
        super().__init__()
        self.noise_size = 8
        self.conv = nn.Conv2d(in_channels, 8, 4, 4, has_bias=True)
        self.norm = batch_norm(8) if bn else nn.Identity()
        self.dropout = Dropout(drop_rate)
        self.classifier = nn.Dense(8, num_classes)

    def construct(self, x, noise=None):
        x = ops.relu(self.norm(self.conv(x)))
        return self.classifier(self.dropout(ops.mean(x, (2, 3)), noise))


@register_model
def tiny(pretrained=False, num_classes=10, in_channels=3, **kwargs):
    return Tiny(num_classes, in_channels, **kwargs)


@register_model
def tiny_bn(pretrained=False, num_classes=10, in_channels=3, **kwargs):
    return Tiny(num_classes, in_channels, bn=True, **{"drop_rate": 0.3, **kwargs})


def make_images(root, per_class=12, size=16):
    """Three classes of noisy stripes under root/train and root/val."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(3):
            (root / split / f"class{label}").mkdir(parents=True)
            for i in range(per_class):
                stripes = 128 + 90 * np.sin(np.arange(size) * (label + 1))[:, None, None]
                noise = rng.integers(-30, 31, (size, size, 3))
                Image.fromarray(np.uint8(stripes + noise)).save(root / split / f"class{label}" / f"{i:03}.png")


if __name__ == "__main__":
    import tiny as _  # noqa: F401  again, as a module of its own: run_path puts another module in the place of __main__

    sys.argv = sys.argv[1:]
    if not any(".pth" in word for word in sys.argv):
        # Nothing else needs PyTorch, and TensorBoard's writer imports it where it is: longer than most of these runs.
        sys.modules["torch"] = None
    runpy.run_path(sys.argv[0], run_name="__main__")
