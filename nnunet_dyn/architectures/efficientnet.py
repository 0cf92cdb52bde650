"""EfficientNet-b0 to b7 and EfficientNetV2-S/M/L as U-Net encoders, in 2D and 3D.

Sources: Tan & Le 2019 (EfficientNet: Table 1 and the compound scaling of Section 3.3), Tan & Le 2021
(EfficientNetV2: Table 4 and its public configuration for M and L), and Martinho, "Efficient Algorithms for Medical
Image Segmentation", Section III-A, for the change that makes an encoder of them: the stem keeps the resolution, and
the stride it lost moves to the first block of the first stage.

The blocks are held in groups G0 to G5, one a resolution. The output of a group is that of its last block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from dynamic_network_architectures.building_blocks.helper import convert_conv_op_to_dim
from torch import nn
from torch.nn.modules.conv import _ConvNd

from nnunet_dyn.architectures.blocks import (
    ConvNormAct,
    FusedMBConv,
    MBConv,
    fast_norm_op,
    strided_size,
    to_fast_layout,
)

#: What to do with the resolutions that a plan of fewer than six stages does not have: keep the first groups only, or
#: run the blocks of the missing groups at stride 1 in the last stage.
DeepGroups = Literal["truncate", "merge"]

#: The paper's normalisation (the b nets' original one).
BATCH_NORM_KWARGS = {"eps": 1e-3, "momentum": 0.01, "affine": True}


@dataclass(frozen=True)
class Stage:
    """One row of an EfficientNet table.

    Attributes:
        group: index of the resolution the stage runs at (1 is half the input's, 5 a thirty-second).
        op: the block.
        kernel: kernel size along every axis.
        expansion: width of the expanded map relative to the block's input.
        channels: output channels.
        repeats: number of blocks; the first one takes the group's stride if the stage is the group's first.
    """

    group: int
    op: Literal["mbconv", "fused"]
    kernel: int
    expansion: int
    channels: int
    repeats: int


@dataclass(frozen=True)
class Variant:
    """An encoder: its name, stem width and stages.

    Attributes:
        head_channels: width of the classification head. It never runs here and is not built, but the parameter
            counts of the paper's Table 1 include it.
        timm_name: the timm model, weights included, that was trained on ImageNet-1k for this variant.
        squeeze: how a quarter of the input channels becomes a whole number in squeeze-and-excitation.
    """

    name: str
    stem_channels: int
    stages: tuple[Stage, ...]
    head_channels: int
    timm_name: str
    squeeze: Literal["floor", "round8"]

    def squeezed_channels(self, input_channels: int) -> int:
        """Width of the squeeze-and-excitation bottleneck of a block with ``input_channels``, a quarter of them."""
        if self.squeeze == "floor":
            return max(1, int(0.25 * input_channels))
        return round_to_8(input_channels / 4)


def round_to_8(channels: float) -> int:
    """Round to a multiple of 8, upwards where rounding down would lose more than a tenth (Tan & Le 2019)."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


# Tan & Le 2019, Table 1: the stages of b0, scaled by width and depth for the others.
_B0_STAGES = (
    Stage(1, "mbconv", 3, 1, 16, 1),
    Stage(2, "mbconv", 3, 6, 24, 2),
    Stage(3, "mbconv", 5, 6, 40, 2),
    Stage(4, "mbconv", 3, 6, 80, 3),
    Stage(4, "mbconv", 5, 6, 112, 3),
    Stage(5, "mbconv", 5, 6, 192, 4),
    Stage(5, "mbconv", 3, 6, 320, 1),
)


def _scaled_b_net(index: int, width: float, depth: float) -> Variant:
    return Variant(
        name=f"b{index}",
        stem_channels=round_to_8(32 * width),
        stages=tuple(
            Stage(s.group, s.op, s.kernel, s.expansion, round_to_8(s.channels * width), math.ceil(s.repeats * depth))
            for s in _B0_STAGES
        ),
        head_channels=round_to_8(1280 * width),
        timm_name=f"tf_efficientnet_b{index}.aa_in1k",
        squeeze="floor",
    )


# Tan & Le 2021, Table 4 for S; M and L as published with its code. Per stage: channels × repeats. The stem of all
# three has 24 channels in Martinho's networks (in the original L it has 32).
_V2_ROWS = (
    # group, op, expansion
    (1, "fused", 1),
    (2, "fused", 4),
    (3, "fused", 4),
    (4, "mbconv", 4),
    (4, "mbconv", 6),
    (5, "mbconv", 6),
    (5, "mbconv", 6),
)
_V2_WIDTHS_AND_REPEATS = {
    "s": ((24, 2), (48, 4), (64, 4), (128, 6), (160, 9), (256, 15)),
    "m": ((24, 3), (48, 5), (80, 5), (160, 7), (176, 14), (304, 18), (512, 5)),
    "l": ((32, 4), (64, 7), (96, 7), (192, 10), (224, 19), (384, 25), (640, 7)),
}


def _v2_net(size: str) -> Variant:
    rows = zip(_V2_ROWS, _V2_WIDTHS_AND_REPEATS[size], strict=False)  # S has no seventh stage
    return Variant(
        name=f"v2{size}",
        stem_channels=24,
        stages=tuple(Stage(group, op, 3, expansion, *width) for (group, op, expansion), width in rows),
        head_channels=1792,
        timm_name=f"tf_efficientnetv2_{size}.in1k",
        squeeze="round8",
    )


# Width and depth: Tan & Le 2019 and its public code.
_B_SCALING = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8), (1.6, 2.2), (1.8, 2.6), (2.0, 3.1))

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        *(_scaled_b_net(index, width, depth) for index, (width, depth) in enumerate(_B_SCALING)),
        *(_v2_net(size) for size in "sml"),
    )
}


@dataclass(frozen=True)
class BlockSpec:
    """One block of an encoder: what it is, its shape, and whether it opens its resolution (takes the stride)."""

    stage: Stage
    input_channels: int
    takes_stride: bool


def blocks_per_resolution(variant: Variant, n_stages: int, deep_groups: DeepGroups) -> list[list[BlockSpec]]:
    """Distribute the blocks of ``variant`` over ``n_stages`` resolutions (the first one, the stem, has none).

    Fewer than six resolutions: see :data:`DeepGroups`. More: each further one repeats the variant's last stage.

    Raises:
        ValueError: fewer than two resolutions, or another word for ``deep_groups``.
    """
    if deep_groups not in get_args(DeepGroups):
        raise ValueError(f"deep_groups got {deep_groups!r}; expected one of {get_args(DeepGroups)}.")
    if n_stages < 2:
        raise ValueError(
            f"An EfficientNet encoder got n_stages={n_stages}; expected at least 2 (the stem and one group). "
            "Plan a larger patch."
        )
    by_group: dict[int, list[Stage]] = {}
    for stage in variant.stages:
        by_group.setdefault(stage.group, []).append(stage)
    groups = list(by_group.values())
    while len(groups) < n_stages - 1:
        groups.append(groups[-1][-1:])
    if deep_groups == "merge":
        groups[n_stages - 2] = [stage for group in groups[n_stages - 2 :] for stage in group]

    resolutions: list[list[BlockSpec]] = [[]]
    channels = variant.stem_channels
    for stages in groups[: n_stages - 1]:
        blocks = []
        for stage in stages:
            for _ in range(stage.repeats):
                blocks.append(BlockSpec(stage, channels, takes_stride=not blocks))
                channels = stage.channels
        resolutions.append(blocks)
    return resolutions


class EfficientNetEncoder(nn.Module):
    """An EfficientNet with one output a resolution, ready for a U-Net decoder.

    Args:
        input_channels: image channels.
        variant: a key of :data:`VARIANTS` (``b0`` … ``b7``, ``v2s``, ``v2m``, ``v2l``).
        n_stages: resolutions, as nnU-Net plans them.
        conv_op: ``torch.nn.Conv2d`` or ``torch.nn.Conv3d``.
        kernel_sizes: the plan's kernels per resolution. An axis with kernel 1 keeps 1; any other takes the variant's
            3 or 5.
        strides: the plan's strides per resolution. The first one belongs to the stem.
        norm_op, norm_op_kwargs: the normalisation of every block.
        deep_groups: what happens to the groups that a plan of fewer than six stages has no resolution for.
        drop_path_rate: stochastic depth; block i of n drops its branch at ``drop_path_rate · i / n``, as the originals
            have it.

    Raises:
        ValueError: unknown variant or ``deep_groups``, or lists whose length is not ``n_stages``.
    """

    def __init__(
        self,
        input_channels: int,
        variant: str,
        n_stages: int,
        conv_op: type[_ConvNd],
        kernel_sizes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        norm_op: type[nn.Module],
        norm_op_kwargs: dict | None = None,
        deep_groups: DeepGroups = "truncate",
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"Unknown EfficientNet variant {variant!r}. Expected one of {', '.join(VARIANTS)}.")
        self.variant = VARIANTS[variant]
        self.conv_op = conv_op
        self.kernel_sizes = per_stage(kernel_sizes, n_stages, conv_op, "kernel_sizes")
        self.strides = per_stage(strides, n_stages, conv_op, "strides")
        self._norm = (fast_norm_op(norm_op), norm_op_kwargs or {})

        stem_kernel = self._kernel(3, self.kernel_sizes[0])
        stem = ConvNormAct(
            conv_op, input_channels, self.variant.stem_channels, stem_kernel, self.strides[0], *self._norm
        )
        self.blocks = blocks_per_resolution(self.variant, n_stages, deep_groups)
        n_blocks = sum(len(blocks) for blocks in self.blocks)
        self.stages = nn.ModuleList([nn.Sequential(stem)])
        self.output_channels = [self.variant.stem_channels]
        built = 0
        for blocks, kernel, stride in zip(self.blocks[1:], self.kernel_sizes[1:], self.strides[1:], strict=True):
            modules = []
            for block in blocks:
                modules.append(self._build(block, kernel, stride, drop_path_rate * built / n_blocks))
                built += 1
            self.stages.append(nn.Sequential(*modules))
            self.output_channels.append(blocks[-1].stage.channels)

    @staticmethod
    def _kernel(size: int, planned: Sequence[int]) -> list[int]:
        """The variant's kernel, flat along the axes where the plan's is."""
        return [1 if k == 1 else size for k in planned]

    def _build(self, block: BlockSpec, kernel: Sequence[int], stride: Sequence[int], drop_path_rate: float):
        stage = block.stage
        shape = (
            self.conv_op,
            block.input_channels,
            stage.channels,
            self._kernel(stage.kernel, kernel),
            stride if block.takes_stride else 1,
            stage.expansion,
        )
        if stage.op == "fused":
            return FusedMBConv(*shape, *self._norm, drop_path_rate=drop_path_rate)
        squeezed = self.variant.squeezed_channels(block.input_channels)
        return MBConv(*shape, squeezed, *self._norm, drop_path_rate=drop_path_rate)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """``x: (B, C, *spatial)`` → one map a resolution, the largest first."""
        outputs = []
        for stage in self.stages:
            x = to_fast_layout(stage(x))
            outputs.append(x)
        return outputs

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> np.int64:
        """Memory of one training sample of ``input_size`` voxels, in nnU-Net's unit (``blocks.kept_maps``)."""
        total = np.int64(0)
        for stage, stride in zip(self.stages, self.strides, strict=True):
            size = strided_size(input_size, stride)
            for index, block in enumerate(stage):
                total += block.compute_conv_feature_map_size(input_size if index == 0 else size)
            input_size = size
        return total


def per_stage(value: int | Sequence, n_stages: int, conv_op: type[_ConvNd], name: str) -> list[list[int]]:
    """Expand a number, one number a stage, or one number a stage and axis to the last form, checking the lengths.

    Raises:
        ValueError: the lengths do not fit ``n_stages`` and the dimension of ``conv_op``.
    """
    dimension = convert_conv_op_to_dim(conv_op)
    values = [value] * n_stages if isinstance(value, int) else list(value)
    values = [[v] * dimension if isinstance(v, int) else list(v) for v in values]
    if len(values) != n_stages or any(len(v) != dimension for v in values):
        raise ValueError(
            f"{name} got {value}; expected {n_stages} entries (n_stages) of {dimension} numbers (the axes of "
            f"{conv_op.__name__}). Correct the architecture block of the plans."
        )
    return values
