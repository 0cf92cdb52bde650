"""Trainers for EfficientNet encoders and FullyEfficient decoders. Networks: ``architectures/efficient_unet.py``."""

from __future__ import annotations

import re
from functools import partial

from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_dyn.architectures.efficient_unet import EfficientUNet, GenericUNet
from nnunet_dyn.architectures.imagenet import load_imagenet
from nnunet_dyn.planning import adapt_arch_kwargs, check_patch_size
from nnunet_dyn.trainers.base import DynTrainer

_NAME = re.compile(r"nnUNetTrainer(?P<fully>Fully)?Eff(?P<encoder>B\d|V2[SML]|Generic)(?P<imagenet>_ImageNet)?")


def build_network(
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    num_input_channels: int,
    num_output_channels: int,
    enable_deep_supervision: bool = True,
    *,
    network_class: type[nn.Module],
    overlay: dict,
) -> nn.Module:
    """Build ``network_class`` for a configuration that was planned for one of nnU-Net's U-Nets.

    Raises:
        ValueError: the configuration's architecture is not a U-Net, or its patch does not fit the strides.
    """
    arch_kwargs = adapt_arch_kwargs(network_class, configuration_manager.network_arch_init_kwargs, overlay)
    strides = [[s] * len(configuration_manager.patch_size) if isinstance(s, int) else s for s in arch_kwargs["strides"]]
    check_patch_size(configuration_manager.patch_size, strides, plans_manager.plans_name)
    to_import = configuration_manager.network_arch_init_kwargs_req_import
    return get_network_from_plans(
        f"{network_class.__module__}.{network_class.__qualname__}",
        arch_kwargs,
        [key for key in to_import if key in arch_kwargs],
        num_input_channels,
        num_output_channels,
        deep_supervision=enable_deep_supervision,
    )


class EfficientTrainer(DynTrainer):
    """nnU-Net's training of a network from Martinho, "Efficient Algorithms for Medical Image Segmentation"."""


class ImageNetTrainer(EfficientTrainer):
    """Starts the encoder from timm's ImageNet weights. A checkpoint that is loaded takes their place unfetched."""

    fetch_weights = True

    def initialize(self) -> None:
        super().initialize()
        if not self.fetch_weights:
            return
        network = self.network.module if self.is_ddp else self.network
        encoder = getattr(network, "_orig_mod", network).encoder
        without = load_imagenet(encoder)
        self.print_to_log_file(
            f"Encoder initialised from timm's {encoder.variant.timm_name} (ImageNet); "
            f"{len(without)} parameter tensors have no counterpart there: {', '.join(without) or 'none'}"
        )

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        self.fetch_weights = False
        super().load_checkpoint(filename_or_checkpoint)


def make_trainer(name: str) -> tuple[type, dict]:
    """The base class and the members of the trainer called ``name``, a name of this family in the catalogue."""
    match = _NAME.fullmatch(name)
    decoder = "fully_efficient" if match["fully"] else "plain"
    if match["encoder"] == "Generic":
        build = partial(build_network, network_class=GenericUNet, overlay={"decoder": decoder})
    else:
        overlay = {"encoder": match["encoder"].lower(), "decoder": decoder}
        build = partial(build_network, network_class=EfficientUNet, overlay=overlay)
    return ImageNetTrainer if match["imagenet"] else EfficientTrainer, {
        "build_network_architecture": staticmethod(build)
    }
