"""Dynamic convolutions in the place of static ones, in any network."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from nnunet_dyn.architectures.blocks import ConvNormAct, MBConv
from nnunet_dyn.architectures.dynamic_convs.base import DynamicConv, KernelBank, fresh_kernel
from nnunet_dyn.architectures.dynamic_convs.condconv import CondConv
from nnunet_dyn.architectures.dynamic_convs.dcd import DCDConv
from nnunet_dyn.architectures.dynamic_convs.dyconv import DYConv
from nnunet_dyn.architectures.dynamic_convs.magic import MAGICConv
from nnunet_dyn.architectures.dynamic_convs.odconv import ODConv


def _ddconv() -> type[DynamicConv]:
    from nnunet_dyn.architectures.dynamic_convs.ddconv import DDConv  # torchvision takes a second to import

    return DDConv


_METHODS = {
    "magic": lambda: MAGICConv,
    "dyconv": lambda: DYConv,
    "condconv": lambda: CondConv,
    "odconv": lambda: ODConv,
    "dcd": lambda: DCDConv,
    "ddconv": _ddconv,
}

#: The methods' names.
METHODS = tuple(_METHODS)


def method_class(method: str) -> type[DynamicConv]:
    """The dynamic convolution of ``method``.

    Raises:
        ValueError: it is not one of :data:`METHODS`.
    """
    if method not in _METHODS:
        raise ValueError(f"method got {method!r}; expected one of {', '.join(METHODS)}.")
    return _METHODS[method]()


def make_dynamic(
    network: nn.Module, method: str, n_kernels: int | None = None, *, upcycle: bool = False, **options
) -> nn.Module:
    """Replace the convolutions of ``network``'s encoder by dynamic ones, in place.

    Replaced is every convolution with a kernel larger than 1, except the network's very first; in MBConv blocks also
    the two 1×1 convolutions. The encoder is ``network.encoder``, or the whole network where it has none. Each new
    kernel starts as the convolution it replaces would, ``network.initialize`` included where there is one.

    Args:
        method: one of :data:`METHODS`.
        n_kernels: kernels of each convolution; ``None`` for the method's own number. ``dcd`` takes none.
        upcycle: start from the weights of the network as it is, so that its output stays the same.
        options: arguments of the method's class, such as ``recalculation=False`` for MAGIC.

    Returns:
        ``network``.

    Raises:
        ValueError: an unknown method, an argument it does not take or allow, or nothing to replace. ``network`` is
            unchanged then.
    """
    dynamic_class = method_class(method)
    if n_kernels is not None:
        if not issubclass(dynamic_class, KernelBank):
            raise ValueError(f"n_kernels got {n_kernels}, but {method} has one kernel. Leave it out.")
        if not isinstance(n_kernels, int) or isinstance(n_kernels, bool):
            raise ValueError(f"n_kernels got {n_kernels!r}; expected a whole number.")
        options["n_kernels"] = n_kernels
    replaced = list(_to_replace(network))
    if not replaced:
        raise ValueError(
            f"{type(network).__name__} has nothing to replace; expected static convolutions with a kernel larger than "
            "1 in its encoder, beside the network's first."
        )
    for name, module in network.named_modules():
        if module in replaced and (type(module).forward not in _PLAIN_FORWARDS or parametrize.is_parametrized(module)):
            raise ValueError(
                f"{name} is a {type(module).__name__}, which computes more than a convolution; expected nn.Conv2d or "
                "nn.Conv3d. Replace it by one, or keep this network static."
            )
    initialize = getattr(network, "initialize", None)
    new = {}
    for conv in replaced:
        try:
            new[conv] = dynamic = dynamic_class.like(conv, **options)
        except TypeError as error:
            raise ValueError(f"{method} got {', '.join(options)}: {error}.") from error
        if upcycle:
            dynamic.start_from(conv.weight, conv.bias)
        elif initialize is not None:
            dynamic.draw(partial(fresh_kernel, dynamic, initialize))
    # A convolution may be registered in several places, as in nnU-Net's blocks.
    for parent in list(network.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
    return network


def _to_replace(network: nn.Module) -> Iterator[_ConvNd]:
    """The convolutions that :func:`make_dynamic` replaces, each once, in the order of the network."""
    first = next((module for module in network.modules() if _is_convolution(module)), None)
    encoder = getattr(network, "encoder", network)
    in_mbconv = {
        part.conv
        for block in encoder.modules()
        if isinstance(block, MBConv)
        for part in block.children()
        if isinstance(part, ConvNormAct) and _is_convolution(part.conv)
    }
    for module in encoder.modules():
        is_larger = _is_convolution(module) and max(module.kernel_size) > 1
        if module is not first and (is_larger or module in in_mbconv):
            yield module


_PLAIN_FORWARDS = {conv.forward for conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)


def upcycle(network: nn.Module, method: str, n_kernels: int | None = None, **options) -> nn.Module:
    """Make a trained network dynamic without changing its output: :func:`make_dynamic` with ``upcycle=True``."""
    return make_dynamic(network, method, n_kernels, upcycle=True, **options)


def dynamic_network(
    input_channels: int,
    num_classes: int,
    network_class: type[nn.Module],
    dynamic: dict,
    deep_supervision: bool = False,
    **arch_kwargs,
) -> nn.Module:
    """A network of ``network_class`` made dynamic, as plans name it.

    Args:
        network_class: class of the network, such as ``PlainConvUNet``.
        dynamic: arguments of :func:`make_dynamic`, such as ``{"method": "magic", "n_kernels": 4}``, but not
            ``upcycle``: there are no trained weights yet.
        arch_kwargs: the other arguments of ``network_class``.

    Raises:
        ValueError: see :func:`make_dynamic`; ``dynamic`` without a method.
    """
    if not isinstance(dynamic, dict) or "method" not in dynamic or "upcycle" in dynamic:
        raise ValueError(
            f'dynamic got {dynamic!r}; expected the arguments of make_dynamic, such as {{"method": "magic", '
            '"n_kernels": 4}, without upcycle. Correct the template or the plans.'
        )
    network = network_class(
        input_channels=input_channels, num_classes=num_classes, deep_supervision=deep_supervision, **arch_kwargs
    )
    return make_dynamic(network, **dynamic)
