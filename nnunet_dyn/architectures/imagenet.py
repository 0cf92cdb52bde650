"""ImageNet weights for EfficientNet encoders: timm's 2D kernels inflated along the axes that a 3D plan adds.

Inflation repeats a kernel along the new axis and divides by its length, so that a volume which does not change along
that axis gives the 2D network's response (Carreira & Zisserman 2017, Section 2.2).
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from nnunet_dyn.architectures.blocks import FusedMBConv, MBConv
from nnunet_dyn.architectures.efficientnet import EfficientNetEncoder
from nnunet_dyn.errors import JobError

# Our part of a block → timm's (convolution, norm), by kind of block and whether it expands.
_MBCONV = {
    "expand": ("conv_pw", "bn1"),
    "depthwise": ("conv_dw", "bn2"),
    "project": ("conv_pwl", "bn3"),
}
_MBCONV_NOT_EXPANDED = {"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")}
_FUSED = {"expand": ("conv_exp", "bn1"), "project": ("conv_pwl", "bn2")}
# The original first stage of V2 is one convolution without a projection; ours keeps the projection (Table 1).
_FUSED_NOT_EXPANDED = {"expand": ("conv", "bn1")}


def imagenet_state(encoder: EfficientNetEncoder) -> dict[str, torch.Tensor]:
    """Fetch timm's ImageNet weights for the variant of ``encoder`` (from its cache, or the network).

    Raises:
        JobError: timm is not installed, or the weights are not at hand.
    """
    name = encoder.variant.timm_name
    try:
        import timm
    except ImportError as error:
        raise JobError("ImageNet weights come from timm, which is not installed: pip install timm") from error
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # timm's sources raise whatever their network library raises
        raise JobError(
            f"Got no ImageNet weights for timm's {name} ({type(error).__name__}: {error}); expected them in the cache "
            "or over the network. Download them on a connected machine and point HF_HOME to that cache, or train "
            "without _ImageNet."
        ) from error


def load_imagenet(encoder: EfficientNetEncoder, timm_state: dict[str, torch.Tensor] | None = None) -> list[str]:
    """Copy timm's weights into ``encoder`` and return the names of its parameters that timm has no weights for.

    Those keep their values: blocks beyond the original depth, the projections of V2's first stage, and the stem and
    first block of V2-L, whose stem the paper made narrower. Where our squeeze-and-excitation is wider than timm's
    (some blocks of V2-M and L) the further channels start without influence, so the gate is the trained one.

    Args:
        timm_state: state dictionary of a timm model of the encoder's variant; fetched if not given.
    """
    source = imagenet_state(encoder) if timm_state is None else timm_state
    loaded: set[str] = set()
    targets = dict(encoder.named_parameters()) | dict(encoder.named_buffers())
    with torch.no_grad():
        for ours, theirs in _name_pairs(encoder):
            for suffix in ("weight", "bias", "running_mean", "running_var"):
                target, value = targets.get(f"{ours}.{suffix}"), source.get(f"{theirs}.{suffix}")
                if target is not None and value is not None and _copy(target, value):
                    loaded.add(f"{ours}.{suffix}")
    return [name for name, _ in encoder.named_parameters() if name not in loaded]


def _name_pairs(encoder: EfficientNetEncoder) -> list[tuple[str, str]]:
    """Names of corresponding modules, ours and timm's."""
    pairs = [("stages.0.0.conv", "conv_stem"), ("stages.0.0.norm", "bn1")]
    position = Counter()
    stages = encoder.variant.stages
    for resolution, specs in enumerate(encoder.blocks):
        for index, spec in enumerate(specs):
            number = stages.index(spec.stage)
            theirs = f"blocks.{number}.{position[number]}"
            position[number] += 1
            ours = f"stages.{resolution}.{index}"
            block = encoder.get_submodule(ours)
            for part, (conv, norm) in _parts(block).items():
                pairs += [(f"{ours}.{part}.conv", f"{theirs}.{conv}"), (f"{ours}.{part}.norm", f"{theirs}.{norm}")]
            if isinstance(block, MBConv):
                pairs += [
                    (f"{ours}.squeeze_excite.reduce", f"{theirs}.se.conv_reduce"),
                    (f"{ours}.squeeze_excite.expand", f"{theirs}.se.conv_expand"),
                ]
    return pairs


def _parts(block: nn.Module) -> dict[str, tuple[str, str]]:
    if isinstance(block, MBConv):
        return _MBCONV if hasattr(block, "expand") else _MBCONV_NOT_EXPANDED
    assert isinstance(block, FusedMBConv)
    expands = block.expand.conv.out_channels != block.expand.conv.in_channels
    return _FUSED if expands else _FUSED_NOT_EXPANDED


def _copy(target: torch.Tensor, value: torch.Tensor) -> bool:
    """Inflate ``value`` to the shape of ``target`` and copy it; false if it does not fit."""
    if target.ndim >= 4:
        value = _fit_kernel(value, target.shape[2:])
        if target.shape[1] != value.shape[1] and value.shape[1] == 3:
            # The stem: the colours' kernels are summed and shared out, so equal channels give the trained response.
            value = value.sum(1, keepdim=True).expand(-1, target.shape[1], *value.shape[2:]) / target.shape[1]
        if target.shape[2:].numel() == 1 and target.shape != value.shape:
            return _copy_narrower(target, value)
    elif target.ndim == 1 and target.shape[0] > value.shape[0]:
        return _copy_narrower(target, value)
    if target.shape != value.shape:
        return False
    target.copy_(value)
    return True


def _copy_narrower(target: torch.Tensor, value: torch.Tensor) -> bool:
    """Copy into the leading channels; where the input is wider than timm's, the further inputs get weight 0."""
    if any(have < need for have, need in zip(target.shape[:2], value.shape[:2], strict=True)):
        return False
    if target.ndim > 1 and target.shape[0] == value.shape[0]:
        target.zero_()
    target[tuple(slice(size) for size in value.shape)] = value
    return True


def _fit_kernel(value: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """``(out, in, k, k)`` → ``(out, in, *size)``: repeated along a leading axis, summed along axes that are flat."""
    if len(size) == 3:
        value = value.unsqueeze(2)
        value = value.expand(-1, -1, size[0], -1, -1) / size[0]
    for axis, length in enumerate(size, start=2):
        if length == 1 and value.shape[axis] > 1:
            value = value.sum(axis, keepdim=True)
    return value
