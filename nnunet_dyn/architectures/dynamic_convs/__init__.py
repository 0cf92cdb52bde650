"""Dynamic convolutions: MAGIC and those it is compared to, one paper a file; ``base.py`` is their contract."""

from nnunet_dyn.architectures.dynamic_convs.base import DynamicConv, set_annealing
from nnunet_dyn.architectures.dynamic_convs.replacement import METHODS, dynamic_network, make_dynamic, upcycle

__all__ = ["METHODS", "DynamicConv", "dynamic_network", "make_dynamic", "set_annealing", "upcycle"]
