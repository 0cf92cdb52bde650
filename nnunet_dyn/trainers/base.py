"""What every trainer of this package shares."""

from __future__ import annotations

from functools import partial
from pydoc import locate
from typing import ClassVar

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_dyn.architectures.dynamic_convs import set_annealing
from nnunet_dyn.planning import build_network, check_patch_size, derived_architecture
from nnunet_dyn.plans_templates import Template, load_template
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
        ValueError: the configuration's architecture is not one that ``template`` can start from, or needs a trainer
            of its own, or its patch does not fit the strides.
    """
    planned = configuration_manager.configuration["architecture"]
    needed = getattr(locate(planned["network_class_name"]), "trainer", None)
    if needed is not None:
        raise ValueError(
            f"{plans_manager.plans_name}: got the trainer of template {template.name} for a configuration of "
            f"{planned['network_class_name']}; expected the one that knows its procedure. Train with -tr {needed}."
        )
    architecture = derived_architecture(template, planned)
    if strides := architecture["arch_kwargs"].get("strides"):
        strides = [[s] * len(configuration_manager.patch_size) if isinstance(s, int) else s for s in strides]
        check_patch_size(configuration_manager.patch_size, strides, plans_manager.plans_name)
    return build_network(
        architecture, num_input_channels, num_output_channels, deep_supervision=enable_deep_supervision
    )


def network_builder(name: str) -> dict[str, staticmethod]:
    """The member by which the trainer called ``name`` builds the network of its template."""
    build = partial(build_from_plans, template=load_template(template_name(name)))
    return {"build_network_architecture": staticmethod(build)}


class DynTrainer(nnUNetTrainer):
    """nnU-Net's trainer with a length that the trainer's name can set.

    Attributes:
        planned_epochs: epochs, from ``_<N>epochs`` in the name; ``None`` keeps nnU-Net's 1000.
        planned_iterations: training iterations an epoch, from ``_<N>iters``; ``None`` keeps 250. Validation then
            takes a fifth of them, at least one.
    """

    planned_epochs: ClassVar[int | None] = None
    planned_iterations: ClassVar[int | None] = None

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net reads this signature
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.planned_epochs is not None:
            self.num_epochs = self.planned_epochs
        if self.planned_iterations is not None:
            self.num_iterations_per_epoch = self.planned_iterations
            self.num_val_iterations_per_epoch = max(1, self.planned_iterations // 5)
        # A run shorter than nnU-Net's interval of 50 epochs would otherwise leave nothing to resume from.
        self.save_every = min(self.save_every, max(1, self.num_epochs // 10))

    def on_train_epoch_start(self) -> None:
        """Also lets attention with a temperature (DYConv, ODConv) cool down over the first tenth of this training.

        At most over 2,500 iterations, ten of nnU-Net's epochs. Here, behind the loading of pretrained weights, which
        bring the length of their own training.
        """
        set_annealing(self.network, min(2500, self.num_epochs * self.num_iterations_per_epoch // 10))
        super().on_train_epoch_start()
