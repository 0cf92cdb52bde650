"""From the architecture that nnU-Net planned to another network for the same patch, strides and kernels."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from math import prod

from torch import nn

#: What a plan's architecture must say for a U-Net to be derived from it.
UNET_KEYS = ("n_stages", "features_per_stage", "conv_op", "kernel_sizes", "strides")


def adapt_arch_kwargs(network_class: type[nn.Module], planned: dict, overlay: dict) -> dict:
    """Return the architecture arguments for ``network_class``: the planned ones it knows, then ``overlay``.

    Args:
        planned: ``arch_kwargs`` of a configuration that nnU-Net planned for one of its U-Nets.
        overlay: arguments that the new network needs beyond those.

    Raises:
        ValueError: the planned network is not a U-Net that says its stages, widths, kernels and strides.
    """
    missing = [key for key in UNET_KEYS if key not in planned]
    if missing:
        raise ValueError(
            f"The plans' architecture has {sorted(planned)}, without {', '.join(missing)}; expected the arguments of "
            "a U-Net. Plan with nnU-Net's default or a ResEnc planner."
        )
    known = inspect.signature(network_class).parameters
    return {key: value for key, value in planned.items() if key in known} | overlay


def check_patch_size(patch_size: Sequence[int], strides: Sequence[Sequence[int]], plans_name: str) -> None:
    """Check that every axis of the patch survives all strides.

    Raises:
        ValueError: an axis is not divisible by the product of its strides.
    """
    divisor = [prod(axis) for axis in zip(*strides, strict=True)]
    if any(size % d for size, d in zip(patch_size, divisor, strict=True)):
        nearest = [max(d, round(size / d) * d) for size, d in zip(patch_size, divisor, strict=True)]
        raise ValueError(
            f"{plans_name}: got patch size {list(patch_size)}; expected every axis divisible by the product of "
            f"the strides, {divisor}. Set patch_size to {nearest} in the plans, or plan again."
        )
