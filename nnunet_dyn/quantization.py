"""Uniform symmetric quantisation, simulated: values are rounded to the grid of an integer type and stay floats.

Source: Eq. 6 of Shen et al. 2023, "Med-DANet V2", ``Q_b(w) = round(clip(w, a) · r / a) · a / r`` with ``a = max|w|``.
The paper's ``r = 2^(b-1)`` needs one integer more than a signed type of ``b`` bits has, so ``r = 2^(b-1) - 1`` here.
"""

from __future__ import annotations

from contextvars import ContextVar

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

#: Width of numbers that are not quantised, and the one that costs are relative to.
FULL_PRECISION = 32


def levels(bits: int) -> int:
    """``r``, the largest integer of ``bits`` bits; there are as many levels below zero."""
    return 2 ** (bits - 1) - 1


def quantize(x: torch.Tensor, bits: int, per_sample: bool = False) -> torch.Tensor:
    """Round ``x`` to ``bits`` bits (Eq. 6); gradients pass as if nothing had been rounded.

    Args:
        x: of any shape; ``(B, …)`` with ``per_sample``.
        bits: 2 or more; :data:`FULL_PRECISION` returns ``x`` itself.
        per_sample: one scale ``a`` for each entry of the first axis, instead of one for all of ``x``.
    """
    if bits == FULL_PRECISION:
        return x
    return _Quantize.apply(x, levels(bits), per_sample)


class _Quantize(torch.autograd.Function):
    """With ``a = max|x|`` nothing is clipped, so that the straight-through gradient is the identity everywhere."""

    @staticmethod
    def forward(ctx, x, r, per_sample):
        wide = x.float()  # half precision has not enough digits for 16 bits
        axes = tuple(range(int(per_sample), x.ndim))
        a = torch.maximum(wide.amax(axes, keepdim=True), -wide.amin(axes, keepdim=True))  # max|x| without a copy
        a = torch.where(a > 0, a, 1)
        return (wide * (r / a)).round_().mul_(a / r).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


_WIDTH: ContextVar[int] = ContextVar("width", default=FULL_PRECISION)


def current_width() -> int:
    """The bits of the innermost :class:`quantized`, for what does not run its layers in torch."""
    return _WIDTH.get()


_LAYERS = (torch.conv2d, torch.conv_transpose2d, torch.mkldnn_convolution, F.linear)


class quantized(TorchFunctionMode):
    """Within this context every 2D convolution and linear layer runs with weights and inputs of ``bits`` bits.

    Weights have one scale a layer, inputs one a sample. What lies between the layers keeps its precision.

    >>> with quantized(8):
    ...     y = stage(x)
    """

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def __enter__(self):
        self._outer = _WIDTH.set(self.bits)
        return super().__enter__()

    def __exit__(self, *error):
        _WIDTH.reset(self._outer)
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _LAYERS and self.bits != FULL_PRECISION:
            x, weight, *others = args
            args = (quantize(x, self.bits, per_sample=True), quantize(weight, self.bits), *others)
        return func(*args, **(kwargs or {}))
