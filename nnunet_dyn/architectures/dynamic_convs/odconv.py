"""ODConv: Li, Zhou & Yao 2022, "Omni-Dimensional Dynamic Convolution"."""

from __future__ import annotations

import math

import torch
from torch import nn

from nnunet_dyn.architectures.dynamic_convs.base import (
    Kernel,
    KernelBank,
    LayerNorm,
    Linear,
    Temperature,
    global_average,
    reduced,
)


class ODConv(KernelBank):
    """Four attentions: over positions in the kernel, input channels, output channels and kernels (Eq. 3, Fig. 2).

    As in the authors' code, a 1×1 kernel has no attention over positions and a depthwise one none over output
    channels. Their batch normalisation of one vector a sample is a layer normalisation here: it must work at batch 1.
    """

    def __init__(self, *geometry, n_kernels: int = 4, reduction: int = 16, **named_geometry):
        super().__init__(*geometry, n_kernels=n_kernels, **named_geometry)
        hidden = reduced(self.in_channels, reduction, minimum=16)
        self.squeeze = nn.Sequential(Linear(self.in_channels, hidden, bias=False), LayerNorm(hidden), nn.ReLU())
        positions = math.prod(self.kernel_size)
        is_depthwise = self.groups == self.in_channels == self.out_channels
        self.input_channels = Linear(hidden, self.in_channels)
        self.output_channels = None if is_depthwise else Linear(hidden, self.out_channels)
        self.positions = Linear(hidden, positions) if positions > 1 else None
        self.mixture = Linear(hidden, n_kernels) if n_kernels > 1 else None
        self.temperature = Temperature()

    def coefficients(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(x)[0]

    def attend(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        squeezed, temperature = self.squeeze(global_average(x)), self.temperature()
        mixture = squeezed.new_ones(len(x), 1)
        if self.mixture is not None:
            mixture = torch.softmax(self.mixture(squeezed) / temperature, 1)
        gates = (self.input_channels, self.output_channels, self.positions)
        return mixture, *(torch.sigmoid(gate(squeezed) / temperature) for gate in gates if gate is not None)

    def assemble(self, mixture: torch.Tensor, input_channels: torch.Tensor, *others: torch.Tensor) -> Kernel:
        weight, bias = super().assemble(mixture)
        batch, out, per_group, *kernel = weight.shape
        weight = weight.view(batch, self.groups, out // self.groups, per_group, -1)
        weight = weight * input_channels.view(batch, self.groups, 1, per_group, 1)
        gates = iter(others)
        if self.output_channels is not None:
            gate = next(gates)
            weight = weight * gate.view(batch, self.groups, -1, 1, 1)
            bias = None if bias is None else bias * gate
        if self.positions is not None:
            weight = weight * next(gates).view(batch, 1, 1, 1, -1)
        return weight.view(batch, out, per_group, *kernel), bias

    @torch.no_grad()
    def start_from(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().start_from(weight, bias)
        if bias is not None:  # of the gates, only that of the output channels acts on it
            self.biases.copy_((bias if self.output_channels is None else 2 * bias).expand_as(self.biases))

    def freeze_coefficients(self) -> torch.Tensor:
        gates = [gate for gate in (self.input_channels, self.output_channels, self.positions) if gate is not None]
        for parameter in nn.ModuleList(gates).parameters():
            nn.init.zeros_(parameter)
        return torch.full((self.n_kernels,), 2.0 ** len(gates))
