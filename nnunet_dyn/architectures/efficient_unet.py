"""U-Nets from EfficientNet encoders and the FullyEfficient decoder, in 2D and 3D.

Source: Martinho, "Efficient Algorithms for Medical Image Segmentation", Section III: nnU-Net's decoder on an
EfficientNet encoder (EfficientUNet), the decoder built of MBConv blocks (FullyEfficientUNet), and that decoder on
nnU-Net's own encoder (FullyEffGenericUNet). Parameter and FLOP counts follow its Table 1 exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from dynamic_network_architectures.building_blocks.helper import get_matching_batchnorm, get_matching_convtransp
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from dynamic_network_architectures.initialization.weight_init import InitWeights_He, init_last_bn_before_add_to_0
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from nnunet_dyn.architectures.blocks import (
    FusedMBConv,
    MBConv,
    fast_norm_op,
    kept_maps,
    strided_size,
    to_fast_layout,
)
from nnunet_dyn.architectures.efficientnet import BATCH_NORM_KWARGS, DeepGroups, EfficientNetEncoder, per_stage
from nnunet_dyn.architectures.imagenet import load_imagenet

DecoderKind = Literal["plain", "fully_efficient"]

#: Expansion of the decoder's MBConv blocks and the share of a block's input channels that its
#: squeeze-and-excitation keeps (Section III-B).
DECODER_EXPANSION = 6
DECODER_SQUEEZE = 0.25

#: What a residual branch contributes at the start, relative to its input. With 1, every block adds its share to the
#: map it passes on, and b7's skips start up to 15 standard deviations wide (docs/efficient_unet.md).
RESIDUAL_SCALE = 0.2


class EfficientDecoder(nn.Module):
    """Decoder whose width is the plan's, whatever the width of the skips (DNA's takes the skip's).

    Per level: transposed convolution to the level's width, concatenation with the skip, blocks, 1×1 head. The
    transposed convolutions and the heads have no bias, as in the paper's networks.

    Args:
        skip_channels: channels of the encoder's outputs, the largest resolution first, bottleneck last.
        features_per_stage: the plan's widths, of which level ``s`` takes entry ``s``.
        kernel_sizes, strides: the plan's, per resolution and axis.
        n_conv_per_stage: blocks per level, the deepest level first, as in the plans.
        kind: ``plain`` for nnU-Net's convolutions, ``fully_efficient`` for MBConv blocks in all levels but the one
            at full resolution (the paper does not say that this one stays plain; its counts do).
        deep_supervision: return the logits of every level, not only of the largest.
        plain_block_kwargs: what DNA's ``StackedConvBlocks`` takes besides shapes.
        mbconv_norm: class and arguments of the MBConv blocks' normalisation.
    """

    def __init__(
        self,
        skip_channels: Sequence[int],
        num_classes: int,
        conv_op: type[_ConvNd],
        features_per_stage: Sequence[int],
        kernel_sizes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        n_conv_per_stage: Sequence[int],
        kind: DecoderKind,
        deep_supervision: bool,
        plain_block_kwargs: dict,
        mbconv_norm: tuple[type[nn.Module], dict],
    ):
        super().__init__()
        self.deep_supervision = deep_supervision
        self.skip_channels = skip_channels
        self.strides = strides
        self.total_stride = tuple(math.prod(axis) for axis in zip(*strides, strict=True))
        transpconv_op = get_matching_convtransp(conv_op=conv_op)
        transpconvs, stages, seg_layers = [], [], []
        channels_below = skip_channels[-1]
        for order, level in enumerate(reversed(range(len(skip_channels) - 1))):
            width = features_per_stage[level]
            stride = tuple(strides[level + 1])
            transpconvs.append(transpconv_op(channels_below, width, stride, stride, bias=False))
            concatenated = width + skip_channels[level]
            n_blocks = n_conv_per_stage[order]
            if kind == "plain" or level == 0:
                stage = StackedConvBlocks(
                    n_blocks, conv_op, concatenated, width, kernel_sizes[level], 1, **plain_block_kwargs
                )
            else:
                widths = [concatenated] + [width] * n_blocks
                stage = nn.Sequential(
                    *(
                        MBConv(
                            conv_op,
                            channels,
                            width,
                            kernel_sizes[level],
                            1,
                            DECODER_EXPANSION,
                            int(DECODER_SQUEEZE * channels),
                            *mbconv_norm,
                        )
                        for channels in widths[:-1]
                    )
                )
            stages.append(stage)
            seg_layers.append(conv_op(width, num_classes, 1, bias=False))
            channels_below = width
        self.transpconvs = nn.ModuleList(transpconvs)
        self.stages = nn.ModuleList(stages)
        self.seg_layers = nn.ModuleList(seg_layers)

    def forward(self, skips: Sequence[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """``skips``, the largest first → logits ``(B, num_classes, *spatial)``, or a list of them, largest first."""
        x = skips[-1]
        outputs = []
        for level, (transpconv, stage, seg_layer) in enumerate(
            zip(self.transpconvs, self.stages, self.seg_layers, strict=True)
        ):
            x = stage(to_fast_layout(torch.cat((transpconv(x), skips[-(level + 2)]), 1)))
            if self.deep_supervision or level == len(self.stages) - 1:
                outputs.append(seg_layer(x))
        return outputs[::-1] if self.deep_supervision else outputs[0]

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> np.int64:
        """Memory of one training sample, in nnU-Net's unit; ``input_size`` is that of the network's input."""
        sizes = []
        for stride in self.strides[:-1]:
            input_size = strided_size(input_size, stride)
            sizes.append(input_size)
        total = np.int64(0)
        for level, (transpconv, stage, seg_layer) in enumerate(
            zip(self.transpconvs, self.stages, self.seg_layers, strict=True)
        ):
            size = sizes[-(level + 1)]
            # Of the transposed convolution and the skip, their concatenation is what is kept.
            total += kept_maps(1, transpconv.out_channels + self.skip_channels[-(level + 2)], size)
            for block in stage if isinstance(stage, nn.Sequential) else [stage]:
                total += block.compute_conv_feature_map_size(size)
            if self.deep_supervision or level == len(self.stages) - 1:
                total += kept_maps(2, seg_layer.out_channels, size)
        return total


class _UNet(nn.Module):
    """Encoder, decoder, and what nnU-Net asks of a network."""

    encoder: nn.Module
    decoder: EfficientDecoder

    def _check_divisible(self, spatial: Sequence[int]) -> None:
        divisor = self.decoder.total_stride
        if any(size % d for size, d in zip(spatial, divisor, strict=True)):
            raise ValueError(
                f"Got an input of {tuple(spatial)} voxels; expected every axis divisible by the product of the "
                f"strides, {divisor}. Change the patch size of the plans, or pad."
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """``x: (B, C, *spatial)`` → raw logits ``(B, num_classes, *spatial)``.

        Under deep supervision a list with one entry per decoder level, the largest resolution first.

        Raises:
            ValueError: an axis of ``x`` is not divisible by the product of its strides.
        """
        self._check_divisible(x.shape[2:])
        return self.decoder(self.encoder(to_fast_layout(x)))

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> np.int64:
        """Memory of one training sample of ``input_size`` voxels, in nnU-Net's unit (``blocks.kept_maps``).

        Two fp32 maps are one unit per element; within a few per cent of what autograd keeps
        (``benchmarks/memory.py``).
        """
        return self.encoder.compute_conv_feature_map_size(input_size) + self.decoder.compute_conv_feature_map_size(
            input_size
        )

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """He initialisation as in nnU-Net (``network.apply(network.initialize)``), with small residual branches."""
        if getattr(module, "keeps_weights", False):
            return
        InitWeights_He(1e-2)(module)
        init_last_bn_before_add_to_0(module)
        if isinstance(module, (MBConv, FusedMBConv)) and module.has_shortcut and module.project.norm.affine:
            nn.init.constant_(module.project.norm.weight, RESIDUAL_SCALE)


class EfficientUNet(_UNet):
    """EfficientNet encoder with nnU-Net's decoder (``decoder="plain"``) or the FullyEfficient one.

    Takes the architecture arguments of nnU-Net's plans except the encoder's ``n_conv_per_stage`` or
    ``n_blocks_per_stage``; ``features_per_stage`` gives the decoder's widths (the encoder's come from the variant).
    ``nonlin`` and ``dropout_op`` reach the plain convolutions; MBConv blocks have SiLU and no dropout.

    Args:
        encoder: a key of :data:`nnunet_dyn.architectures.efficientnet.VARIANTS`.
        decoder: ``plain`` or ``fully_efficient``.
        mbconv_norm: ``plan`` normalises the EfficientNet blocks as the plans say (InstanceNorm), ``batch`` as the
            paper does (BatchNorm, eps 1e-3, momentum 0.01).
        deep_groups: see :data:`nnunet_dyn.architectures.efficientnet.DeepGroups`.
        drop_path_rate: stochastic depth of the encoder, see there; 0 turns it off. The originals use 0.2.
        pretrained: start the encoder from timm's ImageNet weights, which are fetched if need be; ``initialize``
            then leaves the encoder alone. For training runs use the trainers that end in ``_ImageNet``: a plans file
            with ``pretrained`` would fetch the weights for every prediction too.

    Raises:
        ValueError: unknown variant, decoder or norm, or per-stage lists of the wrong length.
        JobError: the ImageNet weights cannot be had.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        encoder: str,
        n_stages: int,
        features_per_stage: Sequence[int],
        conv_op: type[_ConvNd],
        kernel_sizes: int | Sequence,
        strides: int | Sequence,
        n_conv_per_stage_decoder: int | Sequence[int] = 2,
        decoder: DecoderKind = "plain",
        conv_bias: bool = True,
        norm_op: type[nn.Module] | None = None,
        norm_op_kwargs: dict | None = None,
        dropout_op: type[_DropoutNd] | None = None,
        dropout_op_kwargs: dict | None = None,
        nonlin: type[nn.Module] | None = nn.LeakyReLU,
        nonlin_kwargs: dict | None = None,
        deep_supervision: bool = False,
        mbconv_norm: Literal["plan", "batch"] = "plan",
        deep_groups: DeepGroups = "truncate",
        drop_path_rate: float = 0.0,
        pretrained: bool = False,
    ):
        super().__init__()
        norm = _mbconv_norm(mbconv_norm, conv_op, norm_op, norm_op_kwargs)
        self.encoder = EfficientNetEncoder(
            input_channels,
            encoder,
            n_stages,
            conv_op,
            kernel_sizes,
            strides,
            *norm,
            deep_groups=deep_groups,
            drop_path_rate=drop_path_rate,
        )
        self.decoder = _planned_decoder(
            self.encoder.output_channels,
            num_classes,
            conv_op,
            features_per_stage,
            self.encoder.kernel_sizes,
            self.encoder.strides,
            n_conv_per_stage_decoder,
            decoder,
            deep_supervision,
            _plain_block_kwargs(
                conv_bias, norm_op, norm_op_kwargs, dropout_op, dropout_op_kwargs, nonlin, nonlin_kwargs
            ),
            norm,
        )
        if pretrained:
            self.encoder.apply(self.initialize)
            load_imagenet(self.encoder)
            for module in self.encoder.modules():
                module.keeps_weights = True


class GenericUNet(_UNet):
    """nnU-Net's own encoder (plain, or residual where the plans give ``n_blocks_per_stage``) with either decoder.

    With ``decoder="fully_efficient"`` this is the paper's FullyEffGenericUNet; with ``plain`` it is its baseline,
    GenericUNet, which differs from today's ``PlainConvUNet`` by the biases of transposed convolutions and heads.

    Raises:
        ValueError: neither or both of ``n_conv_per_stage`` and ``n_blocks_per_stage``, or an unknown decoder.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        n_stages: int,
        features_per_stage: Sequence[int],
        conv_op: type[_ConvNd],
        kernel_sizes: int | Sequence,
        strides: int | Sequence,
        n_conv_per_stage: int | Sequence[int] | None = None,
        n_conv_per_stage_decoder: int | Sequence[int] = 2,
        n_blocks_per_stage: int | Sequence[int] | None = None,
        decoder: DecoderKind = "fully_efficient",
        conv_bias: bool = True,
        norm_op: type[nn.Module] | None = None,
        norm_op_kwargs: dict | None = None,
        dropout_op: type[_DropoutNd] | None = None,
        dropout_op_kwargs: dict | None = None,
        nonlin: type[nn.Module] | None = nn.LeakyReLU,
        nonlin_kwargs: dict | None = None,
        deep_supervision: bool = False,
        mbconv_norm: Literal["plan", "batch"] = "plan",
    ):
        super().__init__()
        if (n_conv_per_stage is None) == (n_blocks_per_stage is None):
            raise ValueError(
                f"Got n_conv_per_stage={n_conv_per_stage} and n_blocks_per_stage={n_blocks_per_stage}; expected one "
                "of them: the first for a plain encoder, the second for a residual one."
            )
        kernel_sizes = per_stage(kernel_sizes, n_stages, conv_op, "kernel_sizes")
        strides = per_stage(strides, n_stages, conv_op, "strides")
        block_kwargs = _plain_block_kwargs(
            conv_bias, norm_op, norm_op_kwargs, dropout_op, dropout_op_kwargs, nonlin, nonlin_kwargs
        )
        encoder_class = PlainConvEncoder if n_blocks_per_stage is None else ResidualEncoder
        self.encoder = encoder_class(
            input_channels,
            n_stages,
            features_per_stage,
            conv_op,
            kernel_sizes,
            strides,
            n_conv_per_stage if n_blocks_per_stage is None else n_blocks_per_stage,
            return_skips=True,
            **block_kwargs,
        )
        self.decoder = _planned_decoder(
            self.encoder.output_channels,
            num_classes,
            conv_op,
            features_per_stage,
            kernel_sizes,
            strides,
            n_conv_per_stage_decoder,
            decoder,
            deep_supervision,
            block_kwargs,
            _mbconv_norm(mbconv_norm, conv_op, norm_op, norm_op_kwargs),
        )


def _plain_block_kwargs(
    conv_bias, norm_op, norm_op_kwargs, dropout_op, dropout_op_kwargs, nonlin, nonlin_kwargs
) -> dict:
    """The arguments that DNA's convolution blocks and encoders share."""
    return {
        "conv_bias": conv_bias,
        "norm_op": fast_norm_op(norm_op),
        "norm_op_kwargs": norm_op_kwargs,
        "dropout_op": dropout_op,
        "dropout_op_kwargs": dropout_op_kwargs,
        "nonlin": nonlin,
        "nonlin_kwargs": nonlin_kwargs,
    }


def _mbconv_norm(choice: str, conv_op, norm_op, norm_op_kwargs) -> tuple[type[nn.Module], dict]:
    if choice == "batch":
        return get_matching_batchnorm(conv_op), BATCH_NORM_KWARGS
    if choice != "plan":
        raise ValueError(f"mbconv_norm got {choice!r}; expected 'plan' or 'batch'.")
    if norm_op is None:
        raise ValueError("MBConv blocks got norm_op=None; expected a normalisation. Give the plans one.")
    return fast_norm_op(norm_op), {"affine": True} | (norm_op_kwargs or {})


def _planned_decoder(
    skip_channels,
    num_classes,
    conv_op,
    features_per_stage,
    kernel_sizes,
    strides,
    n_conv_per_stage,
    kind,
    *args,
) -> EfficientDecoder:
    """Check what the plans give for a decoder, then build it."""
    levels = len(skip_channels) - 1
    if kind not in ("plain", "fully_efficient"):
        raise ValueError(f"decoder got {kind!r}; expected 'plain' or 'fully_efficient'.")
    if isinstance(n_conv_per_stage, int):
        n_conv_per_stage = [n_conv_per_stage] * levels
    if len(n_conv_per_stage) != levels or len(features_per_stage) != levels + 1:
        raise ValueError(
            f"Got {len(features_per_stage)} features_per_stage and {len(n_conv_per_stage)} n_conv_per_stage_decoder; "
            f"expected {levels + 1} and {levels} (n_stages and one less). Correct the architecture block of the plans."
        )
    return EfficientDecoder(
        skip_channels, num_classes, conv_op, features_per_stage, kernel_sizes, strides, n_conv_per_stage, kind, *args
    )
