"""Trainers for dynamic convolutions in the planned network. Networks: ``architectures/dynamic_convs``."""

from __future__ import annotations

from nnunet_dyn.architectures.dynamic_convs import set_annealing
from nnunet_dyn.trainers.base import DynTrainer, network_builder


class DynamicConvTrainer(DynTrainer):
    """nnU-Net's training of the planned network with dynamic convolutions in its encoder.

    Where attention has a temperature (DYConv, ODConv), it falls over the first tenth of the training, and at most
    2,500 iterations, ten of nnU-Net's epochs.
    """

    def initialize(self) -> None:
        super().initialize()
        set_annealing(self.network, min(2500, self.num_epochs * self.num_iterations_per_epoch // 10))


def make_trainer(name: str) -> tuple[type, dict]:
    """The base class and the members of the trainer called ``name``, a name of this family in the catalogue."""
    return DynamicConvTrainer, network_builder(name)
