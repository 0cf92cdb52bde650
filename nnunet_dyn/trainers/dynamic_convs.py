"""Trainers for dynamic convolutions in the planned network. Networks: ``architectures/dynamic_convs``."""

from __future__ import annotations

from pathlib import Path

import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch.nn.modules.instancenorm import _InstanceNorm

from nnunet_dyn.architectures.dynamic_convs import set_annealing, upcycle
from nnunet_dyn.architectures.dynamic_convs.magic import MAGICConv
from nnunet_dyn.plans_templates import load_template
from nnunet_dyn.trainers.base import DynTrainer, network_builder


class DynamicConvTrainer(DynTrainer):
    """nnU-Net's training of the planned network with dynamic convolutions in its encoder.

    Where attention has a temperature (DYConv, ODConv), it falls over the first tenth of the training, and at most
    2,500 iterations, ten of nnU-Net's epochs.
    """

    def initialize(self) -> None:
        super().initialize()
        set_annealing(self.network, min(2500, self.num_epochs * self.num_iterations_per_epoch // 10))
        if any(isinstance(module, MAGICConv) and module.n_kernels == 1 for module in self.network.modules()) and any(
            isinstance(module, _InstanceNorm) for module in self.network.modules()
        ):
            self.print_to_log_file(
                "MAGIC with one kernel scales the output of a convolution, and this network's instance normalisation "
                "removes that scale: it is the static network, at a higher cost. Take nnUNetTrainerMAGIC2x or 4x."
            )


def make_trainer(name: str) -> tuple[type, dict]:
    """The base class and the members of the trainer called ``name``, a name of this family in the catalogue."""
    return DynamicConvTrainer, network_builder(name)


def upcycle_checkpoint(source: str | Path, target: str | Path, template: str) -> None:
    """Turn a checkpoint of a static network into one of a dynamic network with the same output.

    The new checkpoint is for ``nnUNetv2_train … -pretrained_weights``, with a trainer or a configuration of
    ``template``; nnU-Net starts the segmentation heads anew, as it always does then.

    Args:
        source: a checkpoint that nnU-Net or this package wrote for a network without dynamic convolutions. It is
            unpickled, as nnU-Net does: load only what you trust.
        target: the file to write.
        template: name of a template of dynamic convolutions, such as ``magic4x``.

    Raises:
        UsageError: there is no such template.
        ValueError: the template is not one of dynamic convolutions, or nothing in the network can be replaced.
    """
    options = load_template(template).arch_kwargs.get("dynamic")
    if options is None:
        raise ValueError(f"template got {template!r}; expected one of dynamic convolutions, such as 'magic4x'.")
    checkpoint = torch.load(source, map_location="cpu", weights_only=False)
    arguments = checkpoint["init_args"]
    plans = PlansManager(arguments["plans"])
    configuration = plans.get_configuration(arguments["configuration"])
    labels = plans.get_label_manager(arguments["dataset_json"])
    channels = determine_num_input_channels(plans, configuration, arguments["dataset_json"])
    build = recursive_find_trainer_class_by_name(checkpoint["trainer_name"]).build_network_architecture
    network = build(plans, configuration, channels, labels.num_segmentation_heads, True)
    network.load_state_dict(checkpoint["network_weights"])
    weights = upcycle(network, **options).state_dict()
    torch.save({"network_weights": weights, "init_args": arguments, "upcycled_from": str(source)}, target)
