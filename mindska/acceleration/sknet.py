"""Forms of SKNet's cells."""

from __future__ import annotations

from typing import Optional

import numpy as np
from mindspore import Tensor, nn

from ..kernels import operators
from ..models.sknet import ConvNorm, SelectiveKernel, SKUnit
from .form import Form
from .layers import bias_of, geometry, normalised, operator_of


class FusedConvNorm(Form, ConvNorm):
    """In training, batch norm and ReLU in one operator. In inference, the convolution, its batch norm and the ReLU."""

    stands_for, plain = ConvNorm, ConvNorm.construct

    def prepare(self) -> None:
        conv, norm = self.conv, self.norm
        self.geometry, self.is_folded = geometry(conv), not isinstance(norm, nn.BatchNorm2d)
        self.bias, self.ones = bias_of(conv), Tensor(np.ones(conv.out_channels, np.float32))
        if self.geometry == "pointwise":
            self.operator = operators.PointwiseThen("relu" if self.relu else "")
        else:
            self.operator = operator_of(conv, self.relu)
        if not self.is_folded:
            self.scale_shift = operators.AffineOfNorm(norm.eps)
            self.batch_norm = operators.BatchNorm(norm.eps, 1 - norm.momentum, self.relu)

    def has_norm_in_training(self) -> bool:
        return not self.is_folded and self.norm.training

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """What follows the convolution's product in inference: batch norm and bias, each (O,)."""
        if self.is_folded:
            return self.ones, self.conv.bias
        norm = self.norm
        return self.scale_shift(norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance)

    def in_training(self, x: Tensor) -> Tensor:
        norm = self.norm
        if self.is_folded or not norm.training:  # statistics are frozen
            return self.plain(x)
        return normalised(self.batch_norm, self.conv(x), norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance)

    def in_inference(self, x: Tensor) -> Tensor:
        if self.operator is None:
            return self.plain(x)
        scale, shift = self.scale_and_shift()
        if self.geometry == "pointwise":
            return self.operator(x, self.conv.weight, scale, shift, self.ones)
        return self.operator(x, self.conv.weight * scale.reshape(-1, 1, 1, 1), shift)


class FusedSelectiveKernel(Form, SelectiveKernel):
    """Two paths: the mean of their sum in one operator, their weighted sum in another."""

    stands_for, plain = SelectiveKernel, SelectiveKernel.construct

    @classmethod
    def fits(cls, cell: SelectiveKernel) -> bool:
        return cell.count == 2

    def prepare(self) -> None:
        self.mean_of_sum, self.weighted_sum = operators.Fuse(), operators.Select()

    def in_inference(self, x: Tensor) -> Tensor:
        first, second = self.split(x)
        return self.weighted_sum(first, second, self.attention(self.mean_of_sum(first, second)))

    in_training = in_inference


class FusedSKUnit(Form, SKUnit):
    """In inference, the last convolution, its batch norm, the shortcut and the ReLU in one operator."""

    stands_for, plain = SKUnit, SKUnit.construct
    in_training = plain

    @classmethod
    def fits(cls, cell: SKUnit) -> bool:
        return geometry(cell.increase.conv) == "pointwise"

    def prepare(self) -> None:
        self.operator = operators.PointwiseThen("add_relu")

    def has_norm_in_training(self) -> bool:
        return self.increase.has_norm_in_training()

    def in_inference(self, x: Tensor, noise: Optional[Tensor] = None) -> Tensor:
        y = self.sk(self.reduce(x))
        scale, shift = self.increase.scale_and_shift()
        return self.operator(y, self.increase.conv.weight, scale, shift, self.proj(x))
