"""DYConv: Chen et al. 2020, "Dynamic Convolution: Attention over Convolution Kernels"."""

from __future__ import annotations

import torch
from torch import nn

from nnunet_dyn.architectures.dynamic_convs.base import KernelBank, Linear, Temperature, global_average, reduced


class DYConv(KernelBank):
    """Squeeze-and-excitation attention over kernels, a softmax with falling temperature (Eqs. 2 and 3, Section 3.3)."""

    def __init__(self, *geometry, n_kernels: int = 4, reduction: int = 4, **named_geometry):
        super().__init__(*geometry, n_kernels=n_kernels, **named_geometry)
        hidden = reduced(self.in_channels, reduction, minimum=16)
        self.attention = nn.Sequential(
            Linear(self.in_channels, hidden, bias=False), nn.ReLU(), Linear(hidden, n_kernels)
        )
        self.temperature = Temperature()

    def coefficients(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.attention(global_average(x)) / self.temperature(), 1)

    def freeze_coefficients(self) -> torch.Tensor:
        return torch.ones(self.n_kernels)  # a softmax sums to 1 already
