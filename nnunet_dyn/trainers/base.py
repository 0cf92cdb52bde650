"""What every trainer of this package shares."""

from __future__ import annotations

from typing import ClassVar

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


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
