"""Trainers for dynamic convolutions in the planned network. Networks: ``architectures/dynamic_convs``."""

from __future__ import annotations

from pathlib import Path

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch.nn.modules.batchnorm import _BatchNorm

from nnunet_dyn.architectures.dynamic_convs import upcycle
from nnunet_dyn.architectures.dynamic_convs.magic import MAGICConv
from nnunet_dyn.inference.export import complete_files
from nnunet_dyn.inference.model_folder import build_network, load_checkpoint
from nnunet_dyn.plans_templates import load_template
from nnunet_dyn.trainers.base import DynTrainer, network_builder


class DynamicConvTrainer(DynTrainer):
    """nnU-Net's training of the planned network with dynamic convolutions in its encoder."""

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.current_epoch > 0:
            return
        network = getattr(self.network, "module", self.network)
        encoder = list(getattr(network, "encoder", network).modules())
        has_one_kernel = any(isinstance(module, MAGICConv) and module.n_kernels == 1 for module in encoder)
        if has_one_kernel and not any(isinstance(module, _BatchNorm) for module in encoder):
            self.print_to_log_file(
                "MAGIC with one kernel scales the output of a convolution, and this encoder's instance normalisation "
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
        source: a checkpoint that nnU-Net or this package wrote for a network without dynamic convolutions.
        target: the file to write.
        template: name of a template of dynamic convolutions, such as ``magic4x``.

    Raises:
        UsageError: there is no such template.
        JobError: ``source`` is not a checkpoint of nnU-Net's, or its trainer is not found.
        ValueError: the template is not one of dynamic convolutions, or nothing in the network can be replaced.
    """
    options = load_template(template).arch_kwargs.get("dynamic")
    if options is None:
        raise ValueError(f"template got {template!r}; expected one of dynamic convolutions, such as 'magic4x'.")
    source, target = Path(source), Path(target)
    checkpoint = load_checkpoint(source)
    arguments = checkpoint["init_args"]
    plans, dataset = PlansManager(arguments["plans"]), arguments["dataset_json"]
    configuration = plans.get_configuration(arguments["configuration"])
    network = build_network(checkpoint["trainer_name"], plans, configuration, dataset)
    network.load_state_dict(checkpoint["network_weights"])
    weights = upcycle(network, **options).state_dict()
    with complete_files(target.parent) as folder:
        torch.save(
            {"network_weights": weights, "init_args": arguments, "upcycled_from": str(source)}, folder / target.name
        )
