"""What every trainer of this package shares."""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc import locate
from typing import ClassVar, Protocol, TypeVar

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import distributed as dist
from torch import nn

from nnunet_dyn.architectures.dynamic_convs import set_annealing
from nnunet_dyn.planning import build_network, check_patch_size, derived_architecture
from nnunet_dyn.plans_templates import Template, load_template
from nnunet_dyn.trainers.catalogue import template_name

_T = TypeVar("_T")

#: Which parameters get a gradient may depend on the data of each process, and validation runs a different number of
#: passes in each.
DISTRIBUTED = {"find_unused_parameters": True, "broadcast_buffers": False}


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


class _Calibration(Protocol):
    def to_json(self) -> dict: ...


class CalibratedTrainer(DynTrainer):
    """One that sets buffers of its network on the validation cases behind the last epoch."""

    @abstractmethod
    def take_safe_settings(self) -> str:
        """Give the network the settings of a checkpoint that is not calibrated, and say what they do."""

    @abstractmethod
    def calibrate(self) -> _Calibration | None:
        """Set the network's buffers, the same in every process; ``None`` where there is nothing to set."""

    def on_train_end(self) -> None:
        """Saves what a training of days has learned, then calibrates and saves again, whatever fails there."""
        self.take_safe_settings()
        super().on_train_end()
        kept = Path(self.output_folder, "calibration.json")
        self.on_first(partial(kept.unlink, missing_ok=True))  # of an earlier training, should this one's fail
        try:
            if (calibration := self.calibrate()) is None:
                return
            self.print_to_log_file(calibration)
            if self.fold == "all":
                self.print_to_log_file("Fold all has no cases of its own for this: expect less on new ones.")
            self.on_first(partial(self._keep, calibration))
        except Exception as error:
            self.print_to_log_file(f"Calibration failed, {self.take_safe_settings()}: {error!r}")

    def _keep(self, calibration: _Calibration) -> None:
        text = json.dumps(calibration.to_json(), indent=1, allow_nan=False)
        Path(self.output_folder, "calibration.json").write_text(text, encoding="utf-8")
        final = Path(self.output_folder, "checkpoint_final.pth")
        self.current_epoch -= 1  # as nnU-Net does for this checkpoint
        try:
            self.save_checkpoint(f"{final}.tmp")
        finally:
            self.current_epoch += 1
        if not self.disable_checkpointing:
            os.replace(f"{final}.tmp", final)

    def on_first(self, work: Callable[[], _T]) -> _T:
        """What ``work`` returns in the first process of DistributedDataParallel, for all, which wait for it.

        A wait of ten minutes ends the training: give it one case at a time.

        Raises:
            RuntimeError: it failed; in every process, so that none waits for another. Without others its own error.
        """
        if not self.is_ddp:
            return work()
        found: list = [None, None]
        if self.local_rank == 0:
            try:
                found[0] = work()
            except Exception as error:
                found[1] = repr(error)
        dist.broadcast_object_list(found)
        if found[1] is not None:
            raise RuntimeError(f"The first process got {found[1]}. See its log.")
        return found[0]
