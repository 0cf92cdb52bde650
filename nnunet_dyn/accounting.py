"""Counting parameters, operations and activation memory of a network, in stated units.

Unit: multiply-accumulates (MACs) for convolutions, transposed convolutions and matrix products, plus the
normalisations in fvcore's convention (5 per element for statistics, scaling and affine, 4 without the affine part;
batch normalisation with stored statistics 2 and 1). Martinho's Table 1 and most papers of the field print this number
as "FLOPs". Activations, pooling, gating, additions and concatenations are not counted; :class:`OperationCount` lists
every operator that ran and was left out, but for those that only describe or copy data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import nn
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# These only describe or copy data.
_FREE = {
    "aten::view", "aten::_unsafe_view", "aten::reshape", "aten::expand", "aten::detach", "aten::alias", "aten::clone",
    "aten::copy_", "aten::_to_copy", "aten::empty", "aten::empty_strided", "aten::empty_like", "aten::permute",
    "aten::transpose", "aten::t", "aten::slice", "aten::select", "aten::squeeze", "aten::unsqueeze", "aten::repeat",
    "aten::split", "aten::_reshape_alias",
}  # fmt: skip


@dataclass(frozen=True)
class OperationCount:
    """What one forward pass costs.

    Attributes:
        total: operations in the unit of this module, for the whole batch.
        by_module: the same for every submodule, by its dotted name.
        not_counted: how often each operator ran that the convention leaves out.
    """

    total: int
    by_module: dict[str, int]
    not_counted: dict[str, int]


def count_parameters(module: nn.Module) -> int:
    """Number of parameter elements; buffers are not parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_operations(network: nn.Module, input_shape: Sequence[int]) -> OperationCount:
    """Count one forward pass of ``network`` on an input of ``input_shape``, ``(B, C, *spatial)``.

    Nothing is computed: the network runs on the meta device and comes back where it was. For a network whose path
    depends on the data this counts the path that a meta tensor can take, or raises what PyTorch raises.
    """
    counter = _Counter()
    call = _on_meta(network, input_shape)
    handles = []
    for name, module in network.named_modules():
        handles.append(module.register_forward_pre_hook(partial(counter.enter, name)))
        handles.append(module.register_forward_hook(counter.leave, always_call=True))
    try:
        with torch.no_grad(), counter:
            call()
    finally:
        for handle in handles:
            handle.remove()
    return OperationCount(counter.by_module[""], dict(counter.by_module), dict(counter.not_counted))


def training_memory(network: nn.Module, input_shape: Sequence[int]) -> int:
    """Bytes alive when the forward pass of a training step ends: all that autograd keeps, and the logits.

    Counted for an input of ``input_shape``, ``(B, C, *spatial)``, in fp32; the input, the parameters and the operators'
    workspace are not included. Nothing is computed: the operators run on the meta device, and what they would allocate
    is added up. This is the path of an accelerator; on a CPU some operators work in place that do not here.
    """
    allocations, _logits = _follow(network, input_shape, training=True)
    return allocations.alive()


def inference_memory(network: nn.Module, input_shape: Sequence[int]) -> int:
    """The most bytes alive at any time of a forward pass without gradients, counted as :func:`training_memory` does."""
    allocations, _ = _follow(network, input_shape, training=False)
    return allocations.peak


def _follow(network: nn.Module, input_shape: Sequence[int], training: bool) -> tuple[_Allocations, object]:
    """One forward pass: its allocations, and its outputs, which keep alive what autograd keeps."""
    call = _on_meta(network, input_shape)
    was_training = network.training
    try:
        network.train(training)
        with torch.set_grad_enabled(training), _Allocations(follow_peak=not training) as allocations:
            outputs = call()
    finally:
        network.train(was_training)
    return allocations, outputs


def _on_meta(network: nn.Module, input_shape: Sequence[int]) -> Callable:
    """A call of ``network`` that computes nothing and leaves the caller's parameters, and an optimiser's, untouched."""
    state = {
        name: tensor.detach().to("meta").requires_grad_(tensor.requires_grad)
        for name, tensor in (*network.named_parameters(), *network.named_buffers())
    }
    x = torch.empty(tuple(input_shape), device="meta")
    return lambda: functional_call(network, state, (x,), tie_weights=False)


def _convolution(args, out) -> int:
    x, weight, transposed = args[0], args[1], args[6]
    positions = x if transposed else out
    return positions.numel() * prod(weight.shape[1:])


def _matrix_product(left, right) -> int:
    return left.numel() * right.shape[-1]


def _normalisation(x, weight, uses_own_statistics: bool = True) -> int:
    return x.numel() * ((4 if uses_own_statistics else 1) + (weight is not None))


# Operator → operations from its arguments and its result.
_FORMULAS = {
    aten.convolution: _convolution,
    aten.mm: lambda args, out: _matrix_product(args[0], args[1]),
    aten.bmm: lambda args, out: _matrix_product(args[0], args[1]),
    aten.addmm: lambda args, out: _matrix_product(args[1], args[2]),
    aten.baddbmm: lambda args, out: _matrix_product(args[1], args[2]),
    aten.native_group_norm: lambda args, out: _normalisation(args[0], args[1]),
    aten.native_layer_norm: lambda args, out: _normalisation(args[0], args[2]),
    aten.native_batch_norm: lambda args, out: _normalisation(args[0], args[1], args[5]),
    aten._native_batch_norm_legit: lambda args, out: _normalisation(
        args[0], args[1], next(arg for arg in args[3:] if isinstance(arg, bool))
    ),
    aten._native_batch_norm_legit_no_training: lambda args, out: _normalisation(args[0], args[1], False),
}

# Operators that exist once their library is imported. Of a deformable convolution its products, not its interpolation.
_FORMULAS_OF_LIBRARIES = {
    "torchvision::deform_conv2d": lambda args, out: out.numel() * prod(args[1].shape[1:]),
}


class _Counter(TorchDispatchMode):
    """Sees every operator that runs, whoever calls it, and books it on the modules that are running."""

    def __init__(self):
        super().__init__()
        self.open_modules: list[str] = []
        self.by_module: Counter[str] = Counter()
        self.not_counted: Counter[str] = Counter()

    def enter(self, name: str, module: nn.Module, args: tuple) -> None:
        self.open_modules.append(name)

    def leave(self, module: nn.Module, args: tuple, output: object) -> None:
        self.open_modules.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name
        formula = _FORMULAS.get(func.overloadpacket) or _FORMULAS_OF_LIBRARIES.get(name)
        if formula is not None:
            operations = formula(args, out)
            for module in self.open_modules:
                self.by_module[module] += operations
        elif name not in _FREE:
            self.not_counted[name] += 1
        return out


class _Allocations(TorchDispatchMode):
    """Follows the storages that operators make, while they live.

    Args:
        follow_peak: also look after every operator what lives, which takes longer the more there is.
    """

    def __init__(self, follow_peak: bool):
        super().__init__()
        self.follow_peak = follow_peak
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def alive(self) -> int:
        """Bytes of the storages that something still holds."""
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        return sum(size for _, size in self.storages.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in inputs:
                    self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if self.follow_peak:
            self.peak = max(self.peak, self.alive())
        return out
