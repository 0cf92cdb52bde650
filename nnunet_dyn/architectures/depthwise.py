"""Depthwise convolutions whose gradient on a CPU does not cost many times their forward pass.

PyTorch's input gradient of a depthwise convolution takes oneDNN's slow path, many times as long as the convolution
itself. It is a depthwise convolution too, of the output's gradient with
the mirrored kernel, and that one is fast.
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


class _CheapGradient:
    """Takes :class:`_DepthwiseFunction` where it is both valid and wanted: eager training in fp32 on a CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (
            x.device.type != "cpu"
            or not torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or torch.jit.is_tracing()
            or torch.compiler.is_compiling()
        ):
            return super().forward(x)
        return _DepthwiseFunction.apply(x, self.weight, self.stride, self.padding)


class DepthwiseConv2d(_CheapGradient, nn.Conv2d):
    """``torch.nn.Conv2d`` with ``groups = channels``, odd kernel, ``padding = kernel // 2`` and no bias."""


class DepthwiseConv3d(_CheapGradient, nn.Conv3d):
    """``torch.nn.Conv3d`` with ``groups = channels``, odd kernel, ``padding = kernel // 2`` and no bias."""


def depthwise_op(conv_op: type[_ConvNd]) -> type[_ConvNd]:
    """The depthwise class of this module for ``conv_op``; a class it does not know comes back unchanged."""
    return {nn.Conv2d: DepthwiseConv2d, nn.Conv3d: DepthwiseConv3d}.get(conv_op, conv_op)
