"""MAGIC: Li et al. 2024, "MAGIC: Rethinking Dynamic Convolution Design for Medical Image Segmentation".

Widths that the paper leaves open are those that reproduce the parameters of its Table 5; ``docs/magic.md`` has them.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from nnunet_dyn.architectures.blocks import without_autocast
from nnunet_dyn.architectures.dynamic_convs.base import (
    BatchNorm,
    KernelBank,
    LayerNorm,
    Linear,
    reduced,
)

# Elements of a map that are summarised at a time: few enough for the last cache, enough to start threads for.
_CHUNK_ON_CPU = 2**21
_CHUNK_ELSEWHERE = 2**25

Summary = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class MAGICConv(KernelBank):
    """Kernels mixed by attention over space, channels and the whole map, and weighed by kernel recalculation.

    Dimensional-reciprocal fusion (DRF) makes ``β`` from three summaries of the input (Eqs. 3 to 8), and ``α`` by a
    softmax (Eq. 9); kernel recalculation (KR) makes ``φ`` (Eq. 11); ``W = Σ_i φ_i α_i W_i`` (Eq. 10).

    Args:
        geometry, named_geometry: see :class:`~nnunet_dyn.architectures.dynamic_convs.base.DynamicConv`.
        n_kernels: n; with 1, ``α`` is 1 and only ``φ`` acts.
        spatial, channel, non_local: the three summaries, ``β_s``, ``β_c`` and ``β_g`` (the paper's Table 6). Without
            any, a learned vector takes their place, the same for every input.
        recalculation: KR (Table 7).
        recalculation_norm: ``"layer"``, or ``"batch"`` as in the paper, which cannot be trained at batch 1.

    Raises:
        ValueError: one kernel without recalculation, which would be a static convolution; another norm.
    """

    def __init__(
        self,
        *geometry,
        n_kernels: int = 4,
        spatial: bool = True,
        channel: bool = True,
        non_local: bool = True,
        recalculation: bool = True,
        recalculation_norm: str = "layer",
        **named_geometry,
    ):
        super().__init__(*geometry, n_kernels=n_kernels, **named_geometry)
        if n_kernels == 1 and not recalculation:
            raise ValueError(
                "MAGIC got one kernel without recalculation, which is a static convolution; expected more kernels or "
                "recalculation. Set n_kernels=2, or leave recalculation on."
            )
        switches = {"spatial": spatial, "channel": channel, "non_local": non_local, "recalculation": recalculation}
        if wrong := {name: value for name, value in switches.items() if not isinstance(value, bool)}:
            raise ValueError(f"MAGIC got {wrong}; expected true or false for each.")
        norms = {"layer": LayerNorm, "batch": BatchNorm}
        if recalculation_norm not in norms:
            raise ValueError(f"recalculation_norm got {recalculation_norm!r}; expected 'layer' or 'batch'.")
        channels = self.in_channels
        self.spatial, self.channel = spatial, channel
        self.non_local = _GlobalContext(channels) if non_local else None
        self.summary = None if spatial or channel or non_local else nn.Parameter(torch.randn(channels))
        hidden = reduced(channels, 1, minimum=8)  # with one channel, a ReLU can be off for every input
        self.fusion = nn.Sequential(
            Linear(channels, hidden, bias=False), nn.ReLU(), Linear(hidden, channels, bias=False)
        )
        self.mixture = Linear(channels, n_kernels, bias=False) if n_kernels > 1 else None
        self.recalculation = None
        if recalculation:
            hidden = reduced(channels, 8)
            self.recalculation = nn.Sequential(
                Linear(channels, hidden, bias=False),
                norms[recalculation_norm](hidden),
                nn.ReLU(),
                Linear(hidden, n_kernels, bias=False),
                nn.Sigmoid(),
            )

    def coefficients(self, x: torch.Tensor) -> torch.Tensor:
        beta = self.fusion(self._summarise(x))
        mixture = None if self.mixture is None else torch.softmax(self.mixture(beta), 1)
        if self.recalculation is None:
            return mixture
        importance = self.recalculation(beta)
        return importance if mixture is None else importance * mixture

    def _runs_one_by_one(self, x: torch.Tensor) -> bool:
        return not self._scales_its_output() and super()._runs_one_by_one(x)

    def _convolve(self, x: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        if not self._scales_its_output():
            return super()._convolve(x, coefficients)
        bias = None if self.biases is None else self.biases[0].to(x.dtype)
        y = self._static._conv_forward(x, self.kernels[0].to(x.dtype), bias)
        return y.mul_(coefficients.view(-1, *(1,) * (y.ndim - 1)))

    def _scales_its_output(self) -> bool:
        """Whether to scale the output by the coefficient of the one kernel, which then serves the whole batch as it is.

        Not in training, where the map before it is scaled would have to be kept.
        """
        return self.n_kernels == 1 and not torch.is_grad_enabled()

    def _summarise(self, x: torch.Tensor) -> torch.Tensor:
        """``β_s + β_c + β_g``, ``(B, C)``."""
        if self.summary is not None:
            return self.summary.float().expand(len(x), -1)
        key = None if self.non_local is None else self.non_local.key.float()
        mean, mean_of_maximum, context = summarise(x, key, self.spatial)
        total = mean if self.channel else torch.zeros_like(mean)
        if self.spatial:
            # The two maps alternate along the channels; each is then averaged over space (Eq. 4).
            pair = torch.stack([mean.mean(1), mean_of_maximum], 1)
            total = total + pair.repeat(1, -(-self.in_channels // 2))[:, : self.in_channels]
        if self.non_local is not None:
            total = total + self.non_local(context)
        return total

    def freeze_coefficients(self) -> torch.Tensor:
        if self.recalculation is None:
            return torch.ones(self.n_kernels)
        nn.init.zeros_(self.recalculation[-2].weight)  # φ = 1/2
        return torch.full((self.n_kernels,), 2.0)


class _GlobalContext(nn.Module):
    """What follows the weighted sum of Eq. 7: ``L_v`` and the channel transform of Cao et al. 2020 (global context).

    ``L_v`` is linear, so it acts on the sum instead of on every position: ``(B, C)`` → ``(B, C)``.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.key = nn.Parameter(torch.empty(channels))
        bound = channels**-0.5
        nn.init.uniform_(self.key, -bound, bound)
        hidden = reduced(channels, 2)
        self.transform = nn.Sequential(
            Linear(channels, channels, bias=False),
            Linear(channels, hidden, bias=False),
            LayerNorm(hidden),
            nn.ReLU(),
            Linear(hidden, channels, bias=False),
        )

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        return self.transform(context)


def summarise(x: torch.Tensor, key: torch.Tensor | None, with_maximum: bool) -> Summary:
    """What MAGIC's attention reads from a map, in fp32 whatever ``x`` is.

    Args:
        x: ``(B, C, *spatial)``.
        key: ``L_k`` of Eq. 7, ``(C,)``, or ``None`` for no context.
        with_maximum: whether the maximum over channels is wanted.

    Returns:
        The mean over space, ``(B, C)``; the mean over space of the maximum over channels, ``(B,)``; the mean over
        space weighed by a softmax of ``key · x``, ``(B, C)``. What is not wanted is ``None``.
    """
    flat = x.flatten(2)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _summarise_plainly(flat, key, with_maximum)
    return _Summarise.apply(flat, key, with_maximum)


def _summarise_plainly(x: torch.Tensor, key: torch.Tensor | None, with_maximum: bool) -> Summary:
    """:func:`summarise` in plain operators, which a compiler fuses and an exporter knows. ``x``: ``(B, C, N)``."""
    x = x.float()
    maximum = x.amax(1).mean(1) if with_maximum else None
    context = None
    if key is not None:
        weights = torch.softmax(torch.matmul(key, x), 1)
        context = torch.matmul(x, weights.unsqueeze(2)).squeeze(2)
    return x.mean(2), maximum, context


class _Summarise(torch.autograd.Function):
    """:func:`summarise` in one pass over the map, a chunk at a time.

    Plain operators read the map once for each term, keep its attention for the backward pass, and copy a map in half
    precision. This keeps nothing but the map itself, and computes a chunk's attention again in the backward pass.
    """

    @staticmethod
    def forward(ctx, x, key, with_maximum):
        batch, channels, positions = x.shape
        new = {"dtype": torch.float32, "device": x.device}
        mean = torch.zeros(batch, channels, **new)
        maximum = torch.zeros(batch, **new) if with_maximum else None
        context = None if key is None else torch.zeros(batch, channels, **new)
        # The softmax is computed with the largest logit so far, and what is summed is rescaled when that grows.
        top, total = torch.full((batch,), -torch.inf, **new), torch.zeros(batch, **new)
        for sample, part in _chunks(x):
            values = x[sample, :, part].float()
            mean[sample] += values.sum(1)
            if with_maximum:
                maximum[sample] += values.amax(0).sum()
            if key is not None:
                logits = (key.unsqueeze(0) @ values)[0]
                new_top = torch.maximum(top[sample], logits.max())
                weights = torch.exp(logits - new_top)
                rescale = torch.exp(top[sample] - new_top)
                context[sample] = context[sample] * rescale + (values @ weights.unsqueeze(1))[:, 0]
                total[sample] = total[sample] * rescale + weights.sum()
                top[sample] = new_top
        mean /= positions
        if with_maximum:
            maximum /= positions
        if key is not None:
            context /= total.unsqueeze(1)
        ctx.save_for_backward(x, key, top, total, context)
        return mean, maximum, context

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mean, grad_maximum, grad_context):
        with without_autocast(ctx.saved_tensors[0]):  # the caller's backward pass may run under it
            return _Summarise._gradients(*ctx.saved_tensors, grad_mean, grad_maximum, grad_context)

    @staticmethod
    def _gradients(x, key, top, total, context, grad_mean, grad_maximum, grad_context):
        grad_x = torch.empty_like(x)
        grad_key = None if key is None else torch.zeros_like(key)
        positions = x.shape[2]
        for sample, part in _chunks(x):
            values = x[sample, :, part].float()
            grad = (grad_mean[sample] / positions).unsqueeze(1).expand_as(values)
            if key is not None:
                both = torch.stack([key, grad_context[sample]])
                logits, along_grad = both @ values
                weights = torch.exp(logits - top[sample]) / total[sample]
                grad_logits = weights * (along_grad - grad_context[sample] @ context[sample])
                grad_key += (values @ grad_logits.unsqueeze(1))[:, 0]
                grad = torch.addmm(grad, both.T, torch.stack([grad_logits, weights]))
            if grad_maximum is not None:
                is_maximum = (values - values.amax(0)).eq_(0)  # in place, so that ones and zeros are floats
                grad = torch.addcmul(grad, is_maximum, grad_maximum[sample] / positions / is_maximum.sum(0))
            grad_x[sample, :, part] = grad
        return grad_x, grad_key, None


def _chunks(x: torch.Tensor):
    """Pairs (sample, slice of positions) that cover ``x``, ``(B, C, N)``."""
    limit = {"cpu": _CHUNK_ON_CPU, "meta": x.numel()}.get(x.device.type, _CHUNK_ELSEWHERE)
    step = max(1, limit // x.shape[1])
    for sample in range(len(x)):
        for start in range(0, x.shape[2], step):
            yield sample, slice(start, start + step)
