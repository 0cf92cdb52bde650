"""Trainers for EfficientNet encoders and FullyEfficient decoders. Networks: ``architectures/efficient_unet.py``."""

from __future__ import annotations

from functools import partial

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_dyn.architectures.imagenet import load_imagenet
from nnunet_dyn.planning import build_network, check_patch_size, derived_architecture
from nnunet_dyn.plans_templates import Template, load_template
from nnunet_dyn.trainers.base import DynTrainer
from nnunet_dyn.trainers.catalogue import template_name


def build_from_plans(
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    num_input_channels: int,
    num_output_channels: int,
    enable_deep_supervision: bool = True,
    *,
    template: Template,
) -> nn.Module:
    """Build ``template``'s network for a configuration that was planned for one of nnU-Net's U-Nets.

    Raises:
        ValueError: the configuration's architecture is not a U-Net, or its patch does not fit the strides.
    """
    architecture = derived_architecture(template, configuration_manager.configuration["architecture"])
    strides = architecture["arch_kwargs"]["strides"]
    strides = [[s] * len(configuration_manager.patch_size) if isinstance(s, int) else s for s in strides]
    check_patch_size(configuration_manager.patch_size, strides, plans_manager.plans_name)
    return build_network(
        architecture, num_input_channels, num_output_channels, deep_supervision=enable_deep_supervision
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
    build = partial(build_from_plans, template=load_template(template_name(name)))
    return ImageNetTrainer if name.endswith("_ImageNet") else EfficientTrainer, {
        "build_network_architecture": staticmethod(build)
    }
