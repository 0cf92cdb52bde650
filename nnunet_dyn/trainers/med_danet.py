"""Trainers for Med-DANet V2. Network, options and phases: ``architectures/med_danet.py``."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, combinations, product
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.utilities.helpers import dummy_context
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from nnunet_dyn.architectures.med_danet import (
    PARTS,
    SCHEDULES,
    Decision,
    MedDANetV2,
    Phase,
    corner_around,
    crop_size,
)
from nnunet_dyn.architectures.roi import connected_targets
from nnunet_dyn.decisions import CALIBRATED_STEP_SIZE
from nnunet_dyn.planning import build_network, derived_architecture
from nnunet_dyn.plans_templates import load_template
from nnunet_dyn.safety import NEVER, Calibration, Evidence
from nnunet_dyn.trainers.base import DISTRIBUTED, CalibratedTrainer

#: What each trainer changes in the options of the plans: the rows of Table 3a.
ABLATIONS = {
    "nnUNetTrainerMedDANetV2": {},
    "nnUNetTrainerMedDANetV2SpatialOnly": {"bits": [32]},
    "nnUNetTrainerMedDANetV2QuantOnly": {"policy_space": ["whole"]},
}

#: Logged once an epoch, from validation. ``gmacs`` are 10⁹ multiply-accumulates a slice, each times its bits / 32.
COSTS = ("skipped", "cropped", "whole", "gmacs", "bits")

#: Of cells with foreground in the coarse maps, relative to those without.
FOREGROUND_WEIGHT = 3.0

#: What a crop must have to spare beside the foreground, of its side, to be taken before it is known where it lies.
TO_SPARE = 1 / 8


def build_med_danet(
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    num_input_channels: int,
    num_output_channels: int,
    enable_deep_supervision: bool = True,
    *,
    options: dict,
) -> MedDANetV2:
    """Build the network that the configuration names, or for a planned U-Net that of the template ``meddanetv2``.

    The method has no deep supervision: a crop has no target at lower resolutions.

    Args:
        options: fields of :class:`~nnunet_dyn.architectures.med_danet.MedDANetOptions` that take the plans' place.

    Raises:
        ValueError: a 3D configuration, or options that do not fit it.
    """
    patch = tuple(configuration_manager.patch_size)
    if len(patch) != 2:
        raise ValueError(
            f"Med-DANet V2 got a configuration with patches of {patch} voxels; expected a 2D one, since it decides "
            "slice by slice. Train the configuration 2d."
        )
    architecture, template = configuration_manager.configuration["architecture"], load_template("meddanetv2")
    if architecture["network_class_name"] != template.network_class_name:
        architecture = derived_architecture(template, architecture)
    kwargs = architecture["arch_kwargs"]
    kwargs = kwargs | {"med_danet": kwargs.get("med_danet", {}) | options}
    network = build_network(architecture | {"arch_kwargs": kwargs}, num_input_channels, num_output_channels)
    network.check_patch(patch)
    return network


class PartPolyLR(PolyLRScheduler):
    """nnU-Net's polynomial decay with a linear rise over the first twentieth, for each part over its own epochs.

    Counted over the whole training, what learns late would start from a rate that has decayed for others.

    Args:
        optimizer: its groups say their ``part``.
        phases: of each epoch; where a part does not learn, its rate is 0.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, initial_lr: float, phases: Sequence[Phase]):
        self.phases = phases
        self.epochs = {part: [epoch for epoch, phase in enumerate(phases) if part in phase.learns] for part in PARTS}
        super().__init__(optimizer, initial_lr, len(phases))

    def step(self, current_step: int | None = None) -> None:
        if current_step in (None, -1):
            current_step, self.ctr = self.ctr, self.ctr + 1
        for group in self.optimizer.param_groups:
            own = self.epochs[group["part"]]
            done, rise = bisect_left(own, current_step), max(1, len(own) // 20)
            rate = self.initial_lr * (1 - done / max(1, len(own))) ** self.exponent * min(1, (done + 1) / rise)
            group["lr"] = rate * self.phases[current_step].rate if current_step in own else 0.0
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


class MedDANetTrainer(CalibratedTrainer):
    """Trains Med-DANet V2 in phases, then sets when it may skip and crop on the validation cases.

    Attributes:
        min_coverage: share of the voxels of every class that must lie where the network looks.
        min_component: components of this many voxels or more must not be left out whole.
        enough_cases: with fewer cases to calibrate on, the thresholds leave slack.
    """

    min_coverage: ClassVar[float] = 0.995
    min_component: ClassVar[int] = 10
    enough_cases: ClassVar[int] = 20
    #: Share of random crops that are placed on a foreground voxel, where there is one.
    foreground_centres: ClassVar[float] = 2 / 3

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net reads this signature
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False
        self.initial_lr = 2e-4
        self.weight_decay = 1e-5

    # --- set-up ---

    @property
    def module(self) -> MedDANetV2:
        return self.network.module if isinstance(self.network, DistributedDataParallel) else self.network

    def initialize(self) -> None:
        super().initialize()
        self.module.set_regions(self.label_manager.has_regions)
        self._register_costs()
        if self.is_ddp:  # validation alone enters no phase
            self._distribute()

    def _distribute(self) -> None:
        """Wrap the network anew: which parameters get a gradient has changed, and it depends on the data besides."""
        devices = None if self.device.type == "cpu" else [self.local_rank]
        self.network = DistributedDataParallel(self.module, device_ids=devices, **DISTRIBUTED)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        super().load_checkpoint(filename_or_checkpoint)
        self._register_costs()

    def _register_costs(self) -> None:
        """nnU-Net's log wants every key from the first epoch on."""
        log = self.logger.local_logger.my_fantastic_logging
        for key in COSTS:
            log.setdefault(key, [None] * self.current_epoch)

    def _do_i_compile(self) -> bool:
        return False  # which parts run depends on the data

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """There is none."""

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PartPolyLR]:
        """Adam with one group a part, the same over all phases, so that a checkpoint fits whatever phase it is from."""
        parts = self.module.parts()
        groups = [
            {"params": [p for module in parts[name] for p in module.parameters()], "part": name}
            for name in PARTS
            if name in parts
        ]
        optimizer = torch.optim.Adam(groups, self.initial_lr, weight_decay=self.weight_decay)
        phases = [self.schedule[self.phase_index(epoch)] for epoch in range(self.num_epochs)]
        return optimizer, PartPolyLR(optimizer, self.initial_lr, phases)

    # --- phases ---

    @property
    def schedule(self) -> tuple[Phase, ...]:
        """The phases in which something learns that this network has."""
        parts = self.module.parts()
        return tuple(phase for phase in SCHEDULES[self.module.options.schedule] if phase.learns & set(parts))

    def phase_index(self, epoch: int) -> int:
        """Which phase ``epoch`` belongs to; the last one has one epoch at least.

        Where phases are left out, the others have their shares.
        """
        ends = list(accumulate(phase.share for phase in self.schedule))
        ends = [int(end / ends[-1] * self.num_epochs + 1e-9) for end in ends]
        return min(sum(epoch >= end for end in ends), len(ends) - 1)

    def enter_phase(self) -> None:
        """Prepare network and optimiser for the current epoch; run anew it changes nothing."""
        phase = self.schedule[self.phase_index(self.current_epoch)]
        if self.module.phase is not phase:
            self.print_to_log_file(f"Phase '{phase.name}': {', '.join(sorted(phase.learns))} learn.")
            self.module.enter(phase)
            if self.is_ddp:
                self._distribute()

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.enter_phase()

    # --- training ---

    def train_step(self, batch: dict) -> dict:
        data = batch["data"].to(self.device, non_blocking=True)
        target = batch["target"].to(self.device, non_blocking=True)
        self.optimizer.zero_grad(set_to_none=True)
        centres = self.random_centres(target) if self.module.phase.random_centres else None
        with self._autocast():
            loss = self.total_loss(self.network(data, centres), target)
        scaler = self.grad_scaler
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        return {"loss": loss.detach().cpu().numpy()}

    def _autocast(self):
        return torch.autocast(self.device.type) if self.device.type == "cuda" else dummy_context()

    def total_loss(self, outputs: dict, target: torch.Tensor) -> torch.Tensor:
        """Eq. 10 with nnU-Net's loss: of every choice, of what the policy mixes, of the cost, and guidance."""
        network = self.module
        options, phase = network.options, network.phase
        total = self._segmentation_loss(outputs, target) if phase.segments else 0
        if network.policy is not None and "policy" in phase.learns:
            corners = [] if phase.random_centres else outputs["corners"]
            total = total + options.guidance * self.choice_loss(outputs["scores"], corners, target)
        for part in ("policy", "position"):
            if part in phase.learns and outputs.get(f"{part}_maps"):
                total = total + options.guidance * self.map_loss(outputs[f"{part}_maps"], target)
        if network.position is not None and "position" in phase.learns:
            total = total + options.guidance * self.position_loss(outputs["corners"], target)
        return total

    def _segmentation_loss(self, outputs: dict, target: torch.Tensor) -> torch.Tensor:
        """That of :meth:`total_loss` without guidance."""
        network = self.module
        options, phase = network.options, network.phase
        segmented = [
            logits for choice, logits in zip(options.policy_space, outputs["logits"], strict=True) if choice != "skip"
        ]
        total = sum(self.loss(logits, target) for logits in segmented) / len(segmented)
        if network.policy is not None and "policy" in phase.learns:
            weights = outputs["choice"].unbind(1)
            mixed = sum(
                logits * weight.view(-1, 1, 1, 1) for logits, weight in zip(outputs["logits"], weights, strict=True)
            )
            total = total + self.loss(mixed, target)
        if phase.cost:
            classes = self.label_manager.num_segmentation_heads - (not self.label_manager.has_regions)
            total = total + options.cost_weight / max(1, classes) * outputs["cost"].mean()
        return total

    def foreground(self, target: torch.Tensor) -> torch.Tensor:
        """``target: (B, 1 or regions, H, W)`` → ``(B, H, W)``, true where there is a class; ignored voxels are not."""
        if self.label_manager.has_regions:
            return target[:, : self.label_manager.num_segmentation_heads].bool().any(1)
        return (target[:, 0] > 0) & ~self.ignored(target)

    def random_centres(self, target: torch.Tensor) -> torch.Tensor:
        """Where crops are placed before the position network has learned to: ``(B, 2)``, in voxels."""
        foreground = self.foreground(target).cpu()
        centres = torch.rand(len(target), 2) * torch.tensor(target.shape[2:])
        for index, slice_ in enumerate(foreground):
            voxels = slice_.nonzero()
            if len(voxels) and torch.rand(()) < self.foreground_centres:
                centres[index] = voxels[torch.randint(len(voxels), ())] + 0.5
        return centres.to(target.device)

    def ignored(self, target: torch.Tensor) -> torch.Tensor:
        """``target: (B, 1 or regions, H, W)`` → ``(B, H, W)``, true where nothing is known."""
        ignore = self.label_manager.ignore_label
        if ignore is None:
            return torch.zeros_like(target[:, 0], dtype=torch.bool)
        return target[:, -1].bool() if self.label_manager.has_regions else target[:, 0] == ignore

    def map_loss(self, maps: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of coarse maps, ``(B, 1, H', W')``, a cell of which is whether there is any foreground in it.

        Cells that have no foreground but ignored voxels tell nothing.
        """
        foreground, ignored = self.foreground(target)[:, None].float(), self.ignored(target)[:, None].float()
        total = 0
        for logits in maps:
            has_any, is_ignored = (F.adaptive_max_pool2d(voxels, logits.shape[2:]) for voxels in (foreground, ignored))
            # Foreground fills few cells, and to miss it is what costs.
            weight = logits.new_tensor(FOREGROUND_WEIGHT)
            losses = F.binary_cross_entropy_with_logits(logits, has_any, reduction="none", pos_weight=weight)
            known = torch.maximum(has_any, 1 - is_ignored)
            total = total + (losses * known).sum() / known.sum().clamp(min=1)
        return total / len(maps)

    def choice_loss(self, scores: torch.Tensor, corners: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the cheapest choice that should lose nothing.

        That is to skip without foreground (Eq. 3), then the smallest crop that holds all of it where it lies, else the
        largest choice. A voxel that is ignored may be foreground too, and slices that have ignored voxels but no
        foreground tell nothing.

        Args:
            corners: of each crop size, ``(B, 2)``; none where crops lie at random: then one should hold what is smaller
                by :data:`TO_SPARE`.
        """
        network, patch = self.module, tuple(target.shape[2:])
        space, crops = network.options.policy_space, network.options.crops
        foreground, ignored = self.foreground(target), self.ignored(target)
        has_any = foreground.flatten(1).any(1)
        first, behind = _extents(foreground | ignored)
        sizes = {crop: torch.tensor(crop_size(crop, patch, network.divisor), device=target.device) for crop in crops}
        where = dict(zip(crops, corners, strict=True)) if corners else {}
        dearest_first = sorted(crops, key=lambda crop: sizes[crop].prod().item(), reverse=True)
        wanted = torch.full_like(
            has_any, space.index("whole" if "whole" in space else dearest_first[0]), dtype=torch.long
        )
        for crop in dearest_first:
            if crop in where:
                corner = where[crop].detach().round()
                holds = (first >= corner) & (behind <= corner + sizes[crop])
            else:
                full = torch.tensor(patch, device=target.device)
                holds = behind - first <= torch.where(sizes[crop] < full, sizes[crop] * (1 - TO_SPARE), full)
            wanted[holds.all(1) | ~has_any] = space.index(crop)
        if "skip" in space:
            wanted[~has_any] = space.index("skip")
        known = has_any | ~ignored.flatten(1).any(1)
        losses = F.cross_entropy(scores, wanted, reduction="none")
        return (losses * known).sum() / known.sum().clamp(min=1)

    def position_loss(self, corners: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        """How far crops are from those centred on the foreground's bounding box, relative to the patch."""
        patch, network = tuple(target.shape[2:]), self.module
        foreground = self.foreground(target)
        has_any = foreground.flatten(1).any(1)
        middle, extent = sum(_extents(foreground)) / 2, torch.tensor(patch, device=target.device)
        total = 0
        for crop, corner in zip(network.options.crops, corners, strict=True):
            wanted = corner_around(middle, crop_size(crop, patch, network.divisor), patch)
            distance = F.smooth_l1_loss(corner / extent, wanted / extent, reduction="none", beta=0.05).mean(1)
            total = total + (distance * has_any).sum() / has_any.sum().clamp(min=1)
        return total / len(corners)

    # --- validation ---

    def on_validation_epoch_start(self) -> None:
        """Until it is calibrated, the network never skips or crops, but for here, where it shows what it would do."""
        super().on_validation_epoch_start()
        network = self.module
        learned = set().union(*(p.learns for p in self.schedule[: self.phase_index(self.current_epoch) + 1]))
        if "policy" in learned:
            network.skip_threshold.fill_(0.5)
            network.crop_threshold.fill_(0.5 if "position" in learned else NEVER)
        network.decisions = []

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        super().on_validation_epoch_end(val_outputs)
        network = self.module
        decisions, network.decisions = network.decisions, None
        network.skip_threshold.fill_(NEVER)
        network.crop_threshold.fill_(NEVER)
        if self.is_ddp:
            gathered: list = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, decisions)
            decisions = [decision for part in gathered for decision in part]
        for key, value in mean_costs(decisions, network.n_stages).items():
            self.logger.log(key, value, self.current_epoch)

    def on_epoch_end(self) -> None:
        shares = [f"{100 * self.logger.get_value(key, step=-1):.1f} % {key}" for key in COSTS[:3]]
        bits = ", ".join(f"{value:.1f}" for value in self.logger.get_value("bits", step=-1))
        self.print_to_log_file(
            f"Slices: {', '.join(shares)}; {self.logger.get_value('gmacs', step=-1):.3f} GMACs each (times bits / 32); "
            f"bits per stage: {bits}"
        )
        super().on_epoch_end()
        if self.local_rank == 0:
            plot_costs(self.logger.local_logger.my_fantastic_logging, Path(self.output_folder, "costs.png"))

    # --- calibration ---

    def take_safe_settings(self) -> str:
        self.module.skip_threshold.fill_(NEVER)
        self.module.crop_threshold.fill_(NEVER)
        return "the network will not skip or crop"

    @torch.no_grad()
    def calibrate(self) -> Calibration | None:
        """Set the network's thresholds on the validation cases, as ``nnUNetv2_predict`` would tile and mirror them.

        Returns:
            What was found, or ``None`` for a network that neither skips nor crops.

        Raises:
            RuntimeError: it failed in another process.
        """
        network = self.module
        if network.policy is None and network.position is None:
            return None
        network.eval()
        self.take_safe_settings()
        _, keys = self.do_split()
        dataset = self.dataset_class(self.preprocessed_dataset_folder, keys)
        evidence = Evidence()
        with self._autocast():
            for key in dataset.identifiers:
                self.on_first(lambda key=key: self._observe(evidence, key, *dataset.load_case(key)[:2]))
        manager = self.label_manager
        labels = manager.foreground_regions if manager.has_regions else manager.foreground_labels
        always_crops = "whole" not in network.options.policy_space
        names = [str(label) for label in labels]
        asked = (self.min_coverage, self.min_component, always_crops, self.enough_cases)
        found = self.on_first(partial(evidence.calibrate, len(keys), names, *asked))
        network.skip_threshold.fill_(found.skip_threshold)
        network.crop_threshold.fill_(found.crop_threshold)
        return found

    def _observe(self, evidence: Evidence, case: str, data, segmentation) -> None:
        """Add every tile of a case, ``data: (C, Z, H, W)`` and ``segmentation: (1, Z, H, W)``."""
        patch = tuple(self.configuration_manager.patch_size)
        data = pad_nd_image(torch.from_numpy(np.asarray(data[:])), patch, "constant", {"value": 0})
        labels = pad_nd_image(np.asarray(segmentation[0]), patch, "constant", {"constant_values": 0})
        # The highest score among the tiles with a voxel: of skipping, and of cropping by those that leave it out.
        skips, crops = (np.full(labels.shape, -np.inf, np.float32) for _ in range(2))
        steps = compute_steps_for_sliding_window(data.shape[2:], patch, CALIBRATED_STEP_SIZE)
        batch = max(1, self.batch_size)
        for row, column in product(*steps):
            window = (slice(row, row + patch[0]), slice(column, column + patch[1]))
            for start in range(0, data.shape[1], batch):
                tiles = data[(slice(None), slice(start, start + batch), *window)].transpose(0, 1)
                seen = self._probe_mirrored(tiles.to(self.device, torch.float32))
                for index, (skip, crop, inside) in enumerate(seen, start):
                    evidence.add_tile(skip, crop)
                    skipped, cropped = skips[(index, *window)], crops[(index, *window)]
                    np.maximum(skipped, skip, out=skipped)
                    kept = cropped[inside].copy()
                    np.maximum(cropped, crop, out=cropped)
                    cropped[inside] = kept
        classes = self.label_manager.foreground_regions if self.label_manager.has_regions else None
        for label in classes or self.label_manager.foreground_labels:
            components, corner = connected_targets(np.isin(labels, label))
            box = tuple(slice(start, start + size) for start, size in zip(corner, components.shape, strict=True))
            for number, voxels, skip, crop in _parts(components, skips[box], crops[box]):
                evidence.add_part(case, str(label), number, voxels, skip, crop)

    def _probe_mirrored(self, tiles: torch.Tensor) -> list[tuple[float, float, tuple[slice, slice]]]:
        """For each tile the highest probabilities, and the box that the crops of all mirrored passes share."""
        patch = tiles.shape[2:]
        allowed = self.inference_allowed_mirroring_axes or ()
        result = [(0.0, 0.0, tuple((0, size) for size in patch))] * len(tiles)
        for axes in (axes for count in range(len(allowed) + 1) for axes in combinations(allowed, count)):
            decisions, boxes = self.module.probe(tiles.flip([axis + 2 for axis in axes]) if axes else tiles)
            for index, (decision, box) in enumerate(zip(decisions, boxes, strict=True)):
                skip, crop, shared = result[index]
                if box is not None:
                    box = replace(decision, box=box).mirrored(axes, patch).box
                    shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(shared, box, strict=True))
                result[index] = (
                    max(skip, decision.skip_probability),
                    max(crop, decision.crop_probability),
                    shared,
                )
        return [
            (skip, crop, tuple(slice(start, max(start, stop)) for start, stop in box)) for skip, crop, box in result
        ]


def _extents(foreground: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(B, H, W)`` → first row and column with foreground, and those behind the last, ``(B, 2)`` each."""
    first, behind = [], []
    for axis in (1, 2):
        present = foreground.any(3 - axis).float()
        first.append(present.argmax(1))
        behind.append(present.shape[1] - present.flip(1).argmax(1))
    return torch.stack(first, 1), torch.stack(behind, 1)


def _parts(components: np.ndarray, skips: np.ndarray, crops: np.ndarray) -> list[tuple[int, int, float, float]]:
    """Number, voxels and the two scores of the voxels of each component that share both: three volumes of a shape."""
    is_any = components > 0
    columns = [np.unique(volume[is_any], return_inverse=True) for volume in (components, skips, crops)]
    shape = tuple(len(values) for values, _ in columns)
    if not all(shape):
        return []
    keys, voxels = np.unique(np.ravel_multi_index([index for _, index in columns], shape), return_counts=True)
    numbers, *scores = (values[at] for (values, _), at in zip(columns, np.unravel_index(keys, shape), strict=True))
    return list(zip(numbers.tolist(), voxels.tolist(), *(score.tolist() for score in scores), strict=True))


def mean_costs(decisions: list[Decision], n_stages: int) -> dict[str, float | list[float]]:
    """:data:`COSTS` of ``decisions``; bits are means over the slices that were segmented, 0 where none was."""
    actions = [decision.action for decision in decisions]
    bits = [decision.bits for decision in decisions if decision.bits] or [(0,) * n_stages]
    return {
        "skipped": actions.count("skip") / len(actions),
        "cropped": actions.count("crop") / len(actions),
        "whole": actions.count("whole") / len(actions),
        "gmacs": sum(decision.cost for decision in decisions) / len(decisions) / 1e9,
        "bits": [sum(stage) / len(bits) for stage in zip(*bits, strict=True)],
    }


def plot_costs(log: dict[str, list], path: Path) -> None:
    """Draw :data:`COSTS` over the epochs, the neighbour of nnU-Net's ``progress.png``."""
    import matplotlib.pyplot as plt

    epochs = [epoch for epoch, value in enumerate(log["gmacs"]) if value is not None]
    with plt.style.context("default"):  # nnU-Net has set fonts for its own picture, which is three times as wide
        figure, (shares, cost, bits) = plt.subplots(3, 1, figsize=(10, 14), sharex=True, layout="constrained")
        for key in COSTS[:3]:
            shares.plot(epochs, [log[key][epoch] for epoch in epochs], label=key)
        shares.set(ylabel="share of slices", ylim=(-0.02, 1.02))
        cost.plot(epochs, [log["gmacs"][epoch] for epoch in epochs])
        cost.set(ylabel="GMACs per slice, times bits / 32")
        stages = list(zip(*(log["bits"][epoch] for epoch in epochs), strict=True))
        for stage, values in enumerate(stages):
            bits.plot(epochs, values, label=f"stage {stage}", color=plt.get_cmap("viridis", len(stages))(stage))
        bits.set(ylabel="mean bits", xlabel="epoch")
        for axis in (shares, bits):  # beside the lines, which may be anywhere
            axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
        for axis in (shares, cost, bits):
            axis.grid(alpha=0.3)
        figure.savefig(path)
    plt.close(figure)


def make_trainer(name: str) -> tuple[type, dict]:
    """The base class and the members of the trainer called ``name``, a name of this family in the catalogue."""
    build = partial(build_med_danet, options=ABLATIONS[name])
    return MedDANetTrainer, {"build_network_architecture": staticmethod(build)}
