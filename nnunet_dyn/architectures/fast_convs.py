"""Convolutions that compute what PyTorch's compute, by ways that are faster in eager mode on a CPU.

Three of PyTorch's choices cost the networks of this package much time there:

- The input gradient of a depthwise convolution takes oneDNN's slow path, many times as long as the convolution. It is
  a depthwise convolution too, of the output's gradient with the mirrored kernel, and that one is fast.
- At batch 1, a convolution of a map with few channels and slices goes to a general routine that copies its input once
  per kernel position and leaves channels-last. oneDNN does not, and is asked by name.
- A 1×1 convolution in channels-last is a matrix product and needs no convolution routine.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

# Up to this many voxels a map, the weight gradient is faster as one product and sum per kernel position than in
# oneDNN: the wide, small maps of the last stages.
_SMALL_MAP = 256
# Up to this many voxels a map, PyTorch's own choice of a matrix product beats oneDNN: wide maps of 4² or 2³.
_TINY_MAP = 64


class _DepthwiseFunction(torch.autograd.Function):
    """``conv(x, weight, stride, padding, groups=channels)`` for odd kernels padded by half their size."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return _conv(x, weight, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            spread = grad
            if any(step != 1 for step in ctx.stride):
                spread = torch.zeros_like(x)
                spread[(..., *(slice(None, None, step) for step in ctx.stride))] = grad
            mirrored = weight.flip(tuple(range(2, weight.ndim)))
            grad_x = _conv(spread, mirrored, (1,) * len(ctx.stride), ctx.padding)
        if ctx.needs_input_grad[1]:
            small = math.prod(grad.shape[2:]) <= _SMALL_MAP
            weight_gradient = _weight_gradient_by_offset if small else _weight_gradient
            grad_weight = weight_gradient(x, grad, weight, ctx.stride, ctx.padding)
        return grad_x, grad_weight, None, None


def _weight_gradient(x, grad, weight, stride, padding):
    no_dilation, no_output_padding = (1,) * len(stride), (0,) * len(stride)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, no_dilation, False, no_output_padding, x.shape[1], (False, True, False)
    )[1]


def _weight_gradient_by_offset(x, grad, weight, stride, padding):
    """One product and sum per kernel position."""
    padded = F.pad(x, [p for axis in reversed(padding) for p in (axis, axis)])
    summed = (0, *range(2, x.ndim))
    positions = []
    for offset in itertools.product(*(range(size) for size in weight.shape[2:])):
        window = tuple(
            slice(start, start + step * (size - 1) + 1, step)
            for start, step, size in zip(offset, stride, grad.shape[2:], strict=True)
        )
        positions.append((padded[(..., *window)] * grad).sum(summed))
    return torch.stack(positions, 1).view_as(weight)


def _conv(x, weight, stride, padding):
    conv = F.conv2d if x.ndim == 4 else F.conv3d
    return conv(x, weight, None, stride, padding, groups=x.shape[1])


def is_eager_on_cpu(x: torch.Tensor) -> bool:
    """Whether operators run one at a time on a CPU; autocast, a compiler or an exporter do better with plain ones."""
    return (
        x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
    )


class _FastConv:
    """Picks the way by the layer's shape. No dilation, ``padding = kernel // 2``."""

    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if not is_eager_on_cpu(x):
            return super()._conv_forward(x, weight, bias)
        if self.groups != 1:
            is_depthwise = self.groups == self.in_channels == self.out_channels
            if not (is_depthwise and bias is None and torch.is_grad_enabled()):
                return super()._conv_forward(x, weight, bias)
            return _DepthwiseFunction.apply(x, weight, self.stride, self.padding)
        if math.prod(self.kernel_size) == math.prod(self.stride) == 1:
            return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
        is_tiny = math.prod(x.shape[2:]) <= _TINY_MAP
        if is_tiny or x.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
            return super()._conv_forward(x, weight, bias)
        return torch.mkldnn_convolution(x, weight, bias, self.padding, self.stride, self.dilation, 1)


class FastConv2d(_FastConv, nn.Conv2d):
    """``torch.nn.Conv2d`` with an odd kernel, ``padding = kernel // 2`` and no dilation."""


class FastConv3d(_FastConv, nn.Conv3d):
    """``torch.nn.Conv3d`` with an odd kernel, ``padding = kernel // 2`` and no dilation."""


def is_fast_geometry(conv: _ConvNd) -> bool:
    """Whether ``conv`` is what the classes of this module are made for."""
    return (
        conv.padding_mode == "zeros"
        and all(
            size % 2 and padding == size // 2 for size, padding in zip(conv.kernel_size, conv.padding, strict=False)
        )
        and all(step == 1 for step in conv.dilation)
    )


def fast_conv_op(conv_op: type[_ConvNd]) -> type[_ConvNd]:
    """The class of this module for ``conv_op``; a class it does not know comes back unchanged."""
    return {nn.Conv2d: FastConv2d, nn.Conv3d: FastConv3d}.get(conv_op, conv_op)
