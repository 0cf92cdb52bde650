"""Trainers for EfficientNet encoders and FullyEfficient decoders. Networks: ``architectures/efficient_unet.py``."""

from __future__ import annotations

from nnunet_dyn.architectures.imagenet import load_imagenet
from nnunet_dyn.trainers.base import DynTrainer, network_builder


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
    return ImageNetTrainer if name.endswith("_ImageNet") else EfficientTrainer, network_builder(name)
