"""Building blocks shared by the efficient networks, written once for 2D and 3D.

Sources: MBConv from Sandler et al. 2018 (MobileNetV2) and Tan & Le 2019 (EfficientNet), FusedMBConv from Tan & Le
2021 (EfficientNetV2), squeeze-and-excitation from Hu et al. 2018, stochastic depth from Huang et al. 2016.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from dynamic_network_architectures.building_blocks.helper import maybe_convert_scalar_to_list
from dynamic_network_architectures.building_blocks.regularization import DropPath
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

from nnunet_dyn.architectures.fast_convs import fast_conv_op, is_eager_on_cpu

SpatialSize = int | Sequence[int]


def to_fast_layout(x: torch.Tensor) -> torch.Tensor:
    """Return ``x: (B, C, *spatial)`` in the memory layout in which the blocks of this module run fastest.

    On a CPU that is channels-last: a 1×1 convolution is then one matrix product, and oneDNN's depthwise kernels run
    without reordering. Elsewhere ``x`` comes back unchanged.
    """
    if x.device.type != "cpu":
        return x
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


class _PerSampleBatchNorm:
    """Instance normalisation computed on a CPU as batch normalisation of one sample at a time.

    ``torch.nn.InstanceNorm*d`` copies a channels-last map to a contiguous one and normalises that; PyTorch's batch
    normalisation reads the map where it lies.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not is_eager_on_cpu(x) or self.track_running_stats:
            return super().forward(x)
        if self.training and x.shape[2:].numel() == 1:
            raise ValueError(
                f"Instance normalisation got maps of one voxel in training ({tuple(x.shape)}); expected more. Use a "
                "larger patch or fewer stages."
            )
        samples = [
            torch.batch_norm(sample, self.weight, self.bias, None, None, True, self.momentum, self.eps, False)
            for sample in x.split(1)
        ]
        return samples[0] if len(samples) == 1 else torch.cat(samples)


class InstanceNorm2d(_PerSampleBatchNorm, nn.InstanceNorm2d):
    """``torch.nn.InstanceNorm2d`` with the faster CPU path."""


class InstanceNorm3d(_PerSampleBatchNorm, nn.InstanceNorm3d):
    """``torch.nn.InstanceNorm3d`` with the faster CPU path."""


def fast_norm_op(norm_op: type[nn.Module]) -> type[nn.Module]:
    """Return the class of this module that computes what ``norm_op`` computes, or ``norm_op`` itself."""
    return {nn.InstanceNorm2d: InstanceNorm2d, nn.InstanceNorm3d: InstanceNorm3d}.get(norm_op, norm_op)


class SiLU(nn.Module):
    """SiLU, in place where no gradient is wanted: a map six times as wide as its block is worth not copying."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x, inplace=not torch.is_grad_enabled())


class ConvNormAct(nn.Module):
    """Convolution without bias, normalisation, and SiLU unless ``activation`` is false.

    ``(B, input_channels, *spatial)`` → ``(B, output_channels, *spatial / stride)``.
    Padding is ``kernel // 2``, so the output has ``ceil(size / stride)`` voxels per axis.
    """

    def __init__(
        self,
        conv_op: type[_ConvNd],
        input_channels: int,
        output_channels: int,
        kernel_size: SpatialSize,
        stride: SpatialSize,
        norm_op: type[nn.Module],
        norm_op_kwargs: dict,
        groups: int = 1,
        activation: bool = True,
    ):
        super().__init__()
        kernel_size = maybe_convert_scalar_to_list(conv_op, kernel_size)
        stride = maybe_convert_scalar_to_list(conv_op, stride)
        self.conv = fast_conv_op(conv_op)(
            input_channels,
            output_channels,
            tuple(kernel_size),
            tuple(stride),
            padding=tuple(k // 2 for k in kernel_size),
            groups=groups,
            bias=False,
        )
        self.norm = norm_op(output_channels, **norm_op_kwargs)
        self.nonlin = SiLU() if activation else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        is_static = isinstance(self.conv, _ConvNd)  # a dynamic convolution has no weights to fold into
        if is_static and not self.training and not torch.is_grad_enabled() and isinstance(self.norm, _BatchNorm):
            return self.nonlin(self._normalised_conv(x))
        return self.nonlin(self.norm(self.conv(x)))

    def _normalised_conv(self, x: torch.Tensor) -> torch.Tensor:
        """Convolution with the stored statistics folded into its weights: one pass over the map instead of two."""
        weight, bias = fuse_conv_bn_weights(
            self.conv.weight,
            None,
            self.norm.running_mean,
            self.norm.running_var,
            self.norm.eps,
            self.norm.weight,
            self.norm.bias,
        )
        return self.conv._conv_forward(x, weight, bias)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> np.int64:
        """Memory of one training sample of ``input_size`` voxels, in the unit of :func:`kept_maps`."""
        # The convolution's output, the normalised map, and SiLU's (which does not work in place).
        kept = 2 if isinstance(self.nonlin, nn.Identity) else 3
        return kept_maps(kept, self.conv.out_channels, strided_size(input_size, self.conv.stride))


def kept_maps(maps: int, channels: int, size: Sequence[int]) -> np.int64:
    """Elements of ``maps`` maps that autograd keeps, in nnU-Net's unit of memory.

    That unit is what a convolution of ``PlainConvUNet`` costs per element it writes: two kept maps, its output and the
    normalised one, on which the activation works in place.
    """
    return np.int64(maps * channels * math.prod(int(s) for s in size) / 2)


def strided_size(input_size: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Voxels per axis after a convolution of this module with ``stride``."""
    return [-(-size // step) for size, step in zip(input_size, stride, strict=True)]


class SqueezeExcite(nn.Module):
    """Channel gate: global average pool, 1×1 to ``squeezed_channels``, SiLU, 1×1 back, sigmoid (Hu et al. 2018).

    ``(B, C, *spatial)`` → the same shape. Without gradients the input is overwritten.
    """

    def __init__(self, conv_op: type[_ConvNd], channels: int, squeezed_channels: int):
        super().__init__()
        self.reduce = conv_op(channels, squeezed_channels, 1, bias=True)
        self.expand = conv_op(squeezed_channels, channels, 1, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = x.mean(tuple(range(2, x.ndim)), keepdim=True)
        gate = torch.sigmoid(self.expand(F.silu(self.reduce(pooled))))
        return x * gate if torch.is_grad_enabled() else x.mul_(gate)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> np.int64:
        """Memory of one training sample of ``input_size`` voxels: the gated map, in the unit of :func:`kept_maps`."""
        return kept_maps(1, self.expand.out_channels, input_size)


class _ResidualBlock(nn.Module):
    """What MBConv and FusedMBConv share: the branch, the shortcut where shapes allow, and stochastic depth."""

    def __init__(self, branch: dict[str, nn.Module], has_shortcut: bool, drop_path_rate: float):
        super().__init__()
        self.branch_names = tuple(branch)
        for name, module in branch.items():
            self.add_module(name, module)
        self.has_shortcut = has_shortcut
        self.drop_path = DropPath(drop_path_rate) if has_shortcut and drop_path_rate else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for name in self.branch_names:
            y = getattr(self, name)(y)
        if not self.has_shortcut:
            return y
        y = self.drop_path(y)
        return y + x if torch.is_grad_enabled() else y.add_(x)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> np.int64:
        """Memory of one training sample of ``input_size`` voxels, in the unit of :func:`kept_maps`."""
        total = np.int64(0)
        for name in self.branch_names:
            module = getattr(self, name)
            total += module.compute_conv_feature_map_size(input_size)
            if isinstance(module, ConvNormAct):
                input_size = strided_size(input_size, module.conv.stride)
        return total


class MBConv(_ResidualBlock):
    """Inverted residual: 1×1 expansion, depthwise convolution, squeeze-and-excitation, 1×1 projection.

    ``(B, input_channels, *spatial)`` → ``(B, output_channels, *spatial / stride)``. The expansion is left out when
    ``expansion`` is 1. The shortcut exists iff nothing changes the shape.

    Args:
        squeezed_channels: width of the squeeze-and-excitation bottleneck.
        drop_path_rate: probability of dropping the branch of a sample in training.
    """

    def __init__(
        self,
        conv_op: type[_ConvNd],
        input_channels: int,
        output_channels: int,
        kernel_size: SpatialSize,
        stride: SpatialSize,
        expansion: int,
        squeezed_channels: int,
        norm_op: type[nn.Module],
        norm_op_kwargs: dict,
        drop_path_rate: float = 0.0,
    ):
        expanded = expansion * input_channels
        norm = (norm_op, norm_op_kwargs)
        branch: dict[str, nn.Module] = {}
        if expansion != 1:
            branch["expand"] = ConvNormAct(conv_op, input_channels, expanded, 1, 1, *norm)
        branch["depthwise"] = ConvNormAct(conv_op, expanded, expanded, kernel_size, stride, *norm, groups=expanded)
        branch["squeeze_excite"] = SqueezeExcite(conv_op, expanded, squeezed_channels)
        branch["project"] = ConvNormAct(conv_op, expanded, output_channels, 1, 1, *norm, activation=False)
        super().__init__(branch, _keeps_shape(stride, input_channels, output_channels), drop_path_rate)


class FusedMBConv(_ResidualBlock):
    """MBConv whose expansion and depthwise convolution are one full convolution; no squeeze-and-excitation.

    ``(B, input_channels, *spatial)`` → ``(B, output_channels, *spatial / stride)``.
    The 1×1 projection stays for ``expansion`` 1.
    """

    def __init__(
        self,
        conv_op: type[_ConvNd],
        input_channels: int,
        output_channels: int,
        kernel_size: SpatialSize,
        stride: SpatialSize,
        expansion: int,
        norm_op: type[nn.Module],
        norm_op_kwargs: dict,
        drop_path_rate: float = 0.0,
    ):
        expanded = expansion * input_channels
        norm = (norm_op, norm_op_kwargs)
        branch = {
            "expand": ConvNormAct(conv_op, input_channels, expanded, kernel_size, stride, *norm),
            "project": ConvNormAct(conv_op, expanded, output_channels, 1, 1, *norm, activation=False),
        }
        super().__init__(branch, _keeps_shape(stride, input_channels, output_channels), drop_path_rate)


def _keeps_shape(stride: SpatialSize, input_channels: int, output_channels: int) -> bool:
    return input_channels == output_channels and np.all(np.asarray(stride) == 1).item()


def without_autocast(x: torch.Tensor) -> AbstractContextManager:
    """A context in which operators on the device of ``x`` compute in the dtype of their arguments."""
    if not torch.amp.is_autocast_available(x.device.type):  # such as meta, and MPS before torch 2.5
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
