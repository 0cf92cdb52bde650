"""CondConv: Yang et al. 2019, "CondConv: Conditionally Parameterized Convolutions for Efficient Inference"."""

from __future__ import annotations

import torch
from torch import nn

from nnunet_dyn.architectures.dynamic_convs.base import KernelBank, Linear, global_average


class CondConv(KernelBank):
    """Routing weights ``sigmoid(R · mean(x))``, one a kernel, without a constraint on their sum (Eqs. 1 and 2)."""

    def __init__(self, *geometry, n_kernels: int = 8, **named_geometry):
        super().__init__(*geometry, n_kernels=n_kernels, **named_geometry)
        self.routing = Linear(self.in_channels, n_kernels)

    def coefficients(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.routing(global_average(x)))

    def freeze_coefficients(self) -> torch.Tensor:
        for parameter in self.routing.parameters():
            nn.init.zeros_(parameter)
        # Every coefficient is now a half. Equal kernels with equal coefficients would stay equal for ever, so each
        # starts at another scale; their sum is 2.
        spread = torch.linspace(0.5, 1.5, self.n_kernels) if self.n_kernels > 1 else torch.ones(1)
        return spread * 2 / self.n_kernels
