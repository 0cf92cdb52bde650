"""DCD: Li et al. 2021, "Revisiting Dynamic Convolution via Matrix Decomposition"."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from nnunet_dyn.architectures.dynamic_convs.base import DynamicConv, Kernel, LayerNorm, Linear, fresh_kernel, reduced


class DCDConv(DynamicConv):
    """One kernel, scaled per output channel, plus a dynamic residual of low rank: ``W(x) = Λ(x) W0 + P Φ(x) Qᵀ``.

    Eq. 4 of the paper; for kernels larger than 1 the residual acts at the kernel's centre (its Section 3.3 with
    ``L_k = 1``). Widths as in the authors' block for ResNet-18: the map is pooled to 2×2 in the last two axes, which
    gives 4C numbers; the reduced space has ``√(4C)`` dimensions. Their batch normalisations inside the residual are
    replaced by a layer normalisation of the squeezed vector, so that Λ, P, Φ and Q make one kernel, which does not grow
    with the input.
    """

    def __init__(self, *geometry, reduction: int = 16, **named_geometry):
        super().__init__(*geometry, **named_geometry)
        self.kernel = nn.Parameter(torch.empty(self.kernel_shape))
        self.bias = nn.Parameter(torch.empty(self.out_channels)) if self.has_bias else None
        pooled = 4 * self.in_channels
        self.rank = math.isqrt(pooled)
        hidden = reduced(max(pooled, self.rank**2), reduction)
        self.squeeze = nn.Sequential(Linear(pooled, hidden, bias=False), LayerNorm(hidden))
        self.gate = Linear(hidden, hidden, bias=False)
        self.scale = Linear(hidden, self.out_channels, bias=False)
        self.fusion = Linear(hidden, self.rank**2, bias=False)
        self.q = nn.Parameter(torch.empty(self.in_channels, self.rank))
        self.p = nn.Parameter(torch.empty(self.out_channels, self.rank))
        nn.init.normal_(self.q, std=self.in_channels**-0.5)
        nn.init.normal_(self.p, std=self.rank**-0.5)
        self.draw(lambda: fresh_kernel(self))

    def attend(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        squeezed = self.squeeze(_quarters(x).flatten(1))
        squeezed = squeezed * _hard_sigmoid(self.gate(squeezed))
        return _hard_sigmoid(self.scale(squeezed)), self.fusion(squeezed).view(-1, self.rank, self.rank)

    def assemble(self, scale: torch.Tensor, fusion: torch.Tensor) -> Kernel:
        batch, axes = len(scale), len(self.kernel_size)
        left = (self.p.float() @ fusion).view(batch, self.groups, -1, self.rank)
        right = self.q.float().view(self.groups, -1, self.rank)
        residual = (left @ right.transpose(1, 2)).reshape(batch, self.out_channels, -1, *(1,) * axes)
        # F.pad lists the last axis first.
        around = [side for size in reversed(self.kernel_size) for side in (size // 2, size - 1 - size // 2)]
        weight = scale.view(batch, -1, 1, *(1,) * axes) * self.kernel.float() + F.pad(residual, around)
        return weight, None if self.bias is None else scale * self.bias.float()

    @torch.no_grad()
    def draw(self, kernel: Callable[[], Kernel]) -> None:
        weight, bias = kernel()
        self.kernel.copy_(weight)
        if self.bias is not None:
            self.bias.copy_(bias)

    @torch.no_grad()
    def start_from(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.draw(lambda: (weight, bias))
        nn.init.zeros_(self.scale.weight)  # Λ = 1
        nn.init.zeros_(self.fusion.weight)  # Φ = 0


def _quarters(x: torch.Tensor) -> torch.Tensor:
    """Adaptive average pooling to 2×2 in the last two axes and 1 elsewhere, fp32: ``(B, C, *spatial)`` → ``(B, C, 4)``.

    PyTorch's keeps its input for the backward pass, which would be a copy of the map in fp32.
    """
    halves = [(slice(-(-size // 2)), slice(size // 2, None)) for size in x.shape[-2:]]
    space = tuple(range(2, x.ndim))
    cells = [x[..., rows, columns].mean(space, dtype=torch.float32) for rows in halves[0] for columns in halves[1]]
    return torch.stack(cells, 2)


def _hard_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """The authors' gate, 1 at zero and 0 to 2 elsewhere."""
    return F.relu6(x + 3) / 3
