"""Trainers for dynamic convolutions in the planned network. Networks: ``architectures/dynamic_convs``."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch.nn.modules.batchnorm import _BatchNorm

from nnunet_dyn.architectures.dynamic_convs import upcycle
from nnunet_dyn.architectures.dynamic_convs.magic import MAGICConv
from nnunet_dyn.errors import UsageError
from nnunet_dyn.plans_templates import load_template
from nnunet_dyn.trainers.base import DynTrainer, network_builder


class DynamicConvTrainer(DynTrainer):
    """nnU-Net's training of the planned network with dynamic convolutions in its encoder."""

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.current_epoch > 0:
            return
        encoder = list(getattr(self.network, "module", self.network).encoder.modules())
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
        source: a checkpoint that nnU-Net or this package wrote for a network without dynamic convolutions. It is
            unpickled, as nnU-Net does: load only what you trust.
        target: the file to write.
        template: name of a template of dynamic convolutions, such as ``magic4x``.

    Raises:
        UsageError: there is no such template, or ``source`` is not a checkpoint of nnU-Net's.
        ValueError: the template is not one of dynamic convolutions, or nothing in the network can be replaced.
    """
    options = load_template(template).arch_kwargs.get("dynamic")
    if options is None:
        raise ValueError(f"template got {template!r}; expected one of dynamic convolutions, such as 'magic4x'.")
    try:
        checkpoint = torch.load(source, map_location="cpu", weights_only=False)
        arguments, trainer, weights = (checkpoint[key] for key in ("init_args", "trainer_name", "network_weights"))
    except (OSError, RuntimeError, KeyError, TypeError, EOFError, UnpicklingError) as error:
        raise UsageError(
            f"{source} got {type(error).__name__}: {error}; expected a checkpoint that nnU-Net wrote, such as "
            "checkpoint_final.pth. Name that."
        ) from error
    plans = PlansManager(arguments["plans"])
    configuration = plans.get_configuration(arguments["configuration"])
    labels = plans.get_label_manager(arguments["dataset_json"])
    channels = determine_num_input_channels(plans, configuration, arguments["dataset_json"])
    build = recursive_find_trainer_class_by_name(trainer).build_network_architecture
    network = build(plans, configuration, channels, labels.num_segmentation_heads, True)
    network.load_state_dict(weights)
    weights = upcycle(network, **options).state_dict()
    partial = Path(f"{target}.partial")
    try:
        torch.save({"network_weights": weights, "init_args": arguments, "upcycled_from": str(source)}, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
