"""The contract of a dynamic convolution, and what the methods share.

A dynamic convolution takes the place of a static one: the same constructor behind ``conv_op``, the same ``forward(x)``.
It makes a kernel for each sample from the sample itself, and then convolves once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import checkpoint

from nnunet_dyn.architectures.blocks import without_autocast
from nnunet_dyn.architectures.fast_convs import fast_conv_op, is_fast_geometry

Kernel = tuple[torch.Tensor, torch.Tensor | None]

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class DynamicConv(nn.Module, ABC):
    """A convolution with a kernel of its own for each sample.

    ``(B, in_channels, *spatial)`` → what ``conv_op`` with the same arguments returns. The attention that makes the
    kernel is computed in fp32, also under autocast and with parameters in half precision.

    Args:
        conv_op: class of the convolution that is replaced, ``nn.Conv2d``, ``nn.Conv3d`` or a subclass.
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as ``conv_op``
            has them.

    Raises:
        ValueError: arguments that ``conv_op`` refuses; in ``forward``, an input of other channels or dimensions.
    """

    def __init__(
        self,
        conv_op: type[_ConvNd],
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
    ):
        super().__init__()
        geometry = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        conv = conv_op(*geometry, device="meta")
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            setattr(self, name, getattr(conv, name))
        self.padding_mode = padding_mode
        self.kernel_shape, self.has_bias = tuple(conv.weight.shape), bias
        # It convolves with any kernel it is given. Kept out of the submodules: without weights, it has nothing to
        # train or to initialise.
        if is_fast_geometry(conv):
            conv = fast_conv_op(conv_op)(*geometry, device="meta")
        conv.weight = conv.bias = None
        object.__setattr__(self, "_static", conv)

    @classmethod
    def like(cls, conv: _ConvNd, **options) -> DynamicConv:
        """A dynamic convolution that can take the place of ``conv``, on its device and in its dtype."""
        geometry = {
            name: getattr(conv, name)
            for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        }
        has_bias = conv.bias is not None
        new = cls(type(conv), **geometry, bias=has_bias, padding_mode=conv.padding_mode, **options)
        return new.to(conv.weight).train(conv.training) if not conv.weight.is_meta else new.to("meta")

    @abstractmethod
    def attend(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the kernels of ``x`` are made from, each ``(B, …)``; it is kept for the backward pass."""

    @abstractmethod
    def assemble(self, *attention: torch.Tensor) -> Kernel:
        """Kernels ``(B, out_channels, in_channels / groups, *kernel_size)`` and biases ``(B, out_channels)``, fp32."""

    @abstractmethod
    def draw(self, kernel: Callable[[], Kernel]) -> None:
        """Set the weights of every kernel to those that one call of ``kernel`` returns."""

    @abstractmethod
    def start_from(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Set the parameters so that the output is that of the static convolution with ``weight`` and ``bias``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != len(self.kernel_size) + 2 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"{type(self).__name__} got an input of shape {tuple(x.shape)}; expected (batch, {self.in_channels}, "
                f"and {len(self.kernel_size)} spatial axes)."
            )
        with without_autocast(x):
            attention = self.attend(x)
        run, is_eager = self._convolve, not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        if is_eager and torch.is_grad_enabled():
            # The backward pass makes the kernels again: kept, they can be larger than the maps. The checkpoint stops
            # once it has what was not kept, so the convolution itself is seldom repeated.
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        if len(x) == 1 or not (is_eager and self._runs_one_by_one(x)):
            return run(x, *attention)
        parts = zip(x.split(1), *(part.split(1) for part in attention), strict=True)
        return torch.cat([run(*part) for part in parts])

    def _runs_one_by_one(self, x: torch.Tensor) -> bool:
        """Whether samples are convolved one after the other, rather than as groups of one convolution.

        Measured on a CPU (``benchmarks/grouped_convs.py``): in 2D, groups of many channels are slow; in 3D, PyTorch
        takes a slow routine for the gradients of one small map. Groups would take a map out of channels-last. For
        other devices this follows what is known of cuDNN's 3D groups; it has not been measured.
        """
        if x.device.type == "cpu":
            return x.ndim == 4 or not x.is_contiguous()
        return x.ndim == 5

    def _convolve(self, x: torch.Tensor, *attention: torch.Tensor) -> torch.Tensor:
        with without_autocast(x):
            weight, bias = self.assemble(*attention)
        return self.convolve(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def convolve(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Each sample of ``x`` with its own kernel and bias, as :meth:`assemble` returns them."""
        if len(x) == 1:
            return self._static._conv_forward(x, weight[0], None if bias is None else bias[0])
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._static._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        y = _CONVOLUTIONS[x.ndim - 2](
            x.reshape(1, -1, *x.shape[2:]),
            weight.flatten(0, 1),
            None if bias is None else bias.flatten(),
            self.stride,
            padding,
            self.dilation,
            self.groups * len(x),
        )
        return y.view(len(x), -1, *y.shape[2:])

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"


class KernelBank(DynamicConv):
    """Mixes ``n_kernels`` kernels by one coefficient each: ``W(x) = Σ_i c_i(x) W_i``, the bias likewise.

    Raises:
        ValueError: ``n_kernels`` below 1.
    """

    def __init__(self, *geometry, n_kernels: int, **named_geometry):
        super().__init__(*geometry, **named_geometry)
        if n_kernels < 1:
            raise ValueError(f"n_kernels got {n_kernels}; expected 1 or more.")
        self.n_kernels = n_kernels
        self.kernels = nn.Parameter(torch.empty(n_kernels, *self.kernel_shape))
        self.biases = nn.Parameter(torch.empty(n_kernels, self.out_channels)) if self.has_bias else None
        self.draw(lambda: fresh_kernel(self))

    @abstractmethod
    def coefficients(self, x: torch.Tensor) -> torch.Tensor:
        """The coefficient of each kernel, ``(B, n_kernels)``."""

    @abstractmethod
    def freeze_coefficients(self) -> torch.Tensor:
        """Set the attention so that ``Σ_i c_i(x) s_i`` is 1 for every ``x``; return ``s``, ``(n_kernels,)``."""

    def attend(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.coefficients(x),)

    def assemble(self, coefficients: torch.Tensor) -> Kernel:
        weight = (coefficients @ self.kernels.float().flatten(1)).view(-1, *self.kernel_shape)
        return weight, None if self.biases is None else coefficients @ self.biases.float()

    @torch.no_grad()
    def draw(self, kernel: Callable[[], Kernel]) -> None:
        for index in range(self.n_kernels):
            weight, bias = kernel()
            self.kernels[index].copy_(weight)
            if self.biases is not None:
                self.biases[index].copy_(bias)

    @torch.no_grad()
    def start_from(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        scales = iter(self.freeze_coefficients().to(weight))
        self.draw(lambda: (weight * (scale := next(scales)), None if bias is None else bias * scale))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, n_kernels={self.n_kernels}"


def fresh_kernel(conv: DynamicConv, initialize: Callable[[nn.Module], object] | None = None) -> Kernel:
    """A kernel as the static convolution in the place of ``conv`` would start with, and its bias.

    Args:
        initialize: what is applied to the static convolution after its own initialisation.
    """
    weight = next(conv.parameters())
    static = type(conv._static)(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.has_bias,
        conv.padding_mode,
        device=weight.device,
    )
    if initialize is not None:
        initialize(static)
    return static.weight, static.bias


class Linear(nn.Linear):
    """``nn.Linear`` that computes in fp32 whatever its parameters are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class BatchNorm(nn.BatchNorm1d):
    """``nn.BatchNorm1d`` that takes and returns fp32 whatever its parameters are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.weight.dtype)).float()


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` that computes in fp32 whatever its parameters are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class Temperature(nn.Module):
    """Temperature of an attention: ``start`` at first, falling by a line to 1 over ``passes`` training passes.

    Early on, a high temperature lets every kernel learn (Chen et al. 2020, Section 3.3). Both numbers are buffers, so
    that a training that is resumed and a prediction see the temperature they should. Passes in evaluation mode do not
    count.
    """

    def __init__(self, start: float = 30.0, passes: int = 2500):
        super().__init__()
        self.start = start
        self.register_buffer("passes_done", torch.zeros((), dtype=torch.long))
        self.register_buffer("passes_to_one", torch.tensor(passes))

    def forward(self) -> torch.Tensor:
        """The temperature of this pass, a scalar."""
        left = 1 - self.passes_done / self.passes_to_one
        if self.training:
            # Not in place: what a compiled backward pass computes again must see the number of its own pass.
            self.passes_done = self.passes_done + 1
        return 1 + (self.start - 1) * left.clamp(min=0)


def set_annealing(network: nn.Module, passes: int) -> None:
    """Let every :class:`Temperature` of ``network`` reach 1 after ``passes`` training passes, at least one."""
    for module in network.modules():
        if isinstance(module, Temperature):
            module.passes_to_one.fill_(max(1, passes))


def global_average(x: torch.Tensor) -> torch.Tensor:
    """Mean over space in fp32: ``(B, C, *spatial)`` → ``(B, C)``."""
    return x.flatten(2).mean(2, dtype=torch.float32)


def reduced(channels: int, reduction: int, minimum: int = 4) -> int:
    """Width of a bottleneck of ``channels``; below ``minimum`` a normalisation would leave nothing."""
    return max(channels // reduction, minimum)
