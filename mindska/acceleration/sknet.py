"""Accelerated forms of SKNet's cells."""

from __future__ import annotations

from typing import Optional

import numpy as np
from mindspore import Tensor, nn

from ..kernels import operators
from ..models.sknet import ConvNorm, SelectiveKernel, SKUnit
from .form import AcceleratedForm
from .layers import batch_norm_in_training, bias_or_zeros, conv_kind, conv_operator, min_pixels, pixels


class FusedConvNorm(AcceleratedForm, ConvNorm):
    """In training, batch norm and ReLU in one operator; in inference, convolution, batch norm and ReLU."""

    plain_class, plain = ConvNorm, ConvNorm.construct

    def prepare(self) -> None:
        conv, norm = self.conv, self.norm
        self.kind, self.is_folded = conv_kind(conv), not isinstance(norm, nn.BatchNorm2d)
        self.min_pixels = min_pixels(conv)
        self.bias, self.ones = bias_or_zeros(conv), Tensor(np.ones(conv.out_channels, np.float32))
        self.operator: Optional[nn.Cell]
        if self.kind == "pointwise":
            self.operator = operators.PointwiseEpilogue("relu" if self.relu else "none")
        else:
            self.operator = conv_operator(conv, self.relu)
        if not self.is_folded:
            self.norm_scale_shift = operators.NormScaleShift(norm.eps)
            # nn.BatchNorm2d keeps 1 minus the momentum that it was given.
            self.batch_norm = operators.BatchNorm(norm.eps, 1 - norm.momentum, self.relu)

    def has_norm_in_training(self) -> bool:
        return not self.is_folded and self.norm.training

    def epilogue_scale_shift(self) -> tuple[Tensor, Tensor]:
        """(scale, shift), each (O,): in inference norm(conv(x)) = scale * (weight x) + shift."""
        if self.is_folded:
            return self.ones, self.conv.bias
        norm = self.norm
        return self.norm_scale_shift(norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance)

    def in_training(self, x: Tensor) -> Tensor:
        norm = self.norm
        if self.is_folded or not norm.training:  # statistics are frozen
            return self.plain(x)
        return batch_norm_in_training(
            self.batch_norm, self.conv(x), norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance
        )

    def in_inference(self, x: Tensor) -> Tensor:
        if self.operator is None or pixels(x) < self.min_pixels:
            return self.plain(x)
        scale, shift = self.epilogue_scale_shift()
        if self.kind == "pointwise":
            return self.operator(x, self.conv.weight, scale, shift, self.ones)
        return self.operator(x, self.conv.weight * scale.reshape(-1, 1, 1, 1), shift)


class FusedSelectiveKernel(AcceleratedForm, SelectiveKernel):
    """Two paths: the mean of their sum in one operator, their weighted sum in another."""

    plain_class, plain = SelectiveKernel, SelectiveKernel.construct

    @classmethod
    def supports(cls, cell: SelectiveKernel) -> bool:
        return cell.num_paths == 2

    def prepare(self) -> None:
        self.mean_of_sum, self.weighted_sum = operators.MeanOfSum(), operators.WeightedSum()

    def in_inference(self, x: Tensor) -> Tensor:
        first, second = self.split(x)
        return self.weighted_sum(first, second, self.attention(self.mean_of_sum(first, second)))

    in_training = in_inference


class FusedSKUnit(AcceleratedForm, SKUnit):
    """In inference, the last convolution, its batch norm, the shortcut and the ReLU in one operator."""

    plain_class, plain = SKUnit, SKUnit.construct
    in_training = plain

    @classmethod
    def supports(cls, cell: SKUnit) -> bool:
        return conv_kind(cell.increase.conv) == "pointwise"

    def prepare(self) -> None:
        self.operator = operators.PointwiseEpilogue("add_relu")

    def has_norm_in_training(self) -> bool:
        return self.increase.has_norm_in_training()

    def in_inference(self, x: Tensor, noise: Optional[Tensor] = None) -> Tensor:
        y = self.sk(self.reduce(x))
        scale, shift = self.increase.epilogue_scale_shift()
        return self.operator(y, self.increase.conv.weight, scale, shift, self.proj(x))
