"""DDConv: Lei et al. 2023, "Semi-Supervised Medical Image Segmentation Using Adversarial Consistency Learning and
Dynamic Convolution Network"."""

from __future__ import annotations

import math

import torch
from torch.nn.modules.conv import _ConvNd
from torchvision.ops import deform_conv2d

from nnunet_dyn.architectures.blocks import without_autocast
from nnunet_dyn.architectures.dynamic_convs.condconv import CondConv


class DDConv(CondConv):
    """A deformable convolution whose kernel, and the kernel that finds its offsets, are both mixed per sample.

    2D only: there is no 3D deformable convolution in torchvision.

    Raises:
        ValueError: a convolution of other dimensions, or a padding that is not zeros.
    """

    def __init__(self, conv_op: type[_ConvNd], *geometry, n_kernels: int = 8, **named_geometry):
        super().__init__(conv_op, *geometry, n_kernels=n_kernels, **named_geometry)
        if len(self.kernel_size) != 2:
            raise ValueError(
                f"DDConv got a {len(self.kernel_size)}D convolution; expected a 2D one (torchvision has no other "
                "deformable convolution). Train a 2d configuration, or take another method, such as CondConv."
            )
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            raise ValueError(
                f"DDConv got padding={self.padding!r}, padding_mode={self.padding_mode!r}; expected numbers and zeros."
            )
        self.offsets = CondConv(
            conv_op,
            self.in_channels,
            2 * math.prod(self.kernel_size),
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            n_kernels=n_kernels,
        )
        # A deformable convolution starts close to the regular grid (Dai et al. 2017).
        with torch.no_grad():
            for parameter in (self.offsets.kernels, self.offsets.biases):
                parameter.mul_(0.01)

    def attend(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.coefficients(x), self.offsets(x)

    def _convolve(self, x: torch.Tensor, coefficients: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        with without_autocast(x):
            weight, bias = self.assemble(coefficients)
            biases = [None] * len(x) if bias is None else bias
            samples = [
                deform_conv2d(sample, offset, w, b, self.stride, self.padding, self.dilation)
                for sample, offset, w, b in zip(
                    x.float().split(1), offsets.float().split(1), weight, biases, strict=True
                )
            ]
        return torch.cat(samples).to(x.dtype)

    def freeze_coefficients(self) -> torch.Tensor:
        torch.nn.init.zeros_(self.offsets.kernels)
        torch.nn.init.zeros_(self.offsets.biases)
        return super().freeze_coefficients()
