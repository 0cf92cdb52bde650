"""nnU-Net's predictor with tiles in batches, constant tiles computed once, and an export that needs little memory."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from batchgenerators.utilities.file_and_folder_operations import save_json, save_pickle
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from tqdm import tqdm

from nnunet_dyn.decisions import (
    CALIBRATED_STEP_SIZE,
    EVERYTHING_ON,
    SKIP,
    CaseDecisions,
    Decision,
    GatedNetwork,
    TileDecision,
)
from nnunet_dyn.errors import JobError, NotFiniteError, TooThinError, UsageError
from nnunet_dyn.inference.conversion import converted_engine
from nnunet_dyn.inference.engines import Engine, TorchEngine, check_engine, on_threads
from nnunet_dyn.inference.export import complete_files, probabilities_file, segment
from nnunet_dyn.inference.exported import is_exported, load_exported
from nnunet_dyn.inference.model_folder import (
    CHECKPOINT,
    available_folds,
    calibrated_checkpoint,
    first_stage_folder,
    load_model,
    same_or_all,
)
from nnunet_dyn.inference.regions import Crop, RegionLogits, RegionTile, crops_of_tiles, region_tiles, seen_in
from nnunet_dyn.pictures import plot_decisions

STAGES = ("read", "preprocess", "network", "export")

# On one Xeon core small tiles were mostly faster in a batch and large ones slower (docs/predict.md, noted by hand). A
# fixed rule gives the same result in every run, which a measurement at the start would not.
BATCH_VOXELS = 2**16
# Predictions of constant tiles to remember; an image has one or two values that fill a tile.
CONSTANT_TILES = 4
# Tiles of a network that decides are decided together, up to so many voxels: policies are small, and sixteen slices of
# 256² at once take 0.4 of the time (docs/predict.md). Their logits wait in memory, 4 MB a class at most.
DECIDED_VOXELS = 2**20
# Where the decisions of a case go, inside the output folder: nnU-Net's other commands do not look into folders.
DECISIONS = "decisions"
#: Of a cascade that segments nothing else than what the first stage has found.
NOTHING_FOUND = "The first stage found nothing in the image, so nothing was segmented."
#: The same, where the first stage works at so coarse a spacing that it has no voxel of an image.
TOO_THIN = "The image is too thin for the first stage, so that all of it was segmented."
#: The same, where a box of a voxel or so was lost when it was resampled, or lay where the image is zero.
NOTHING_LEFT = "Nothing was left of what the first stage found once it was preprocessed, so nothing was segmented."


@dataclass(frozen=True)
class Prediction:
    """Of one image.

    Attributes:
        segmentation: (z, y, x), the axes and the size of the image, uint8 (uint16 from 255 labels on).
        probabilities: (classes or regions, z, y, x) float32, ``None`` unless asked for.
        seconds: per stage, of ``read``, ``preprocess``, ``network`` and ``export``.
        decisions: of every tile; ``None`` where the network makes none.
    """

    segmentation: np.ndarray
    probabilities: np.ndarray | None
    seconds: dict[str, float]
    decisions: CaseDecisions | None = None


@dataclass
class Outcome:
    """Of one case of ``Predictor.predict_files``.

    Attributes:
        case: the name of its files without channel and ending.
        output: where the segmentation is written. With an ``error`` it is not: what is there, if anything, is older.
        seconds: per stage.
        error: what went wrong, in one line.
        decisions: of every tile; ``None`` where the network makes none.
    """

    case: str
    output: Path
    seconds: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    decisions: CaseDecisions | None = None


class Predictor(nnUNetPredictor):
    """Predicts with any nnU-Net model. Make one with ``from_folder``.

    Its sliding window adds up the same logits in the same order and half precision as nnU-Net's, so that the
    segmentation is the same; what nnU-Net offers beside ``predict`` and ``predict_files`` works as always. A network
    that decides what it computes is asked once a tile, not once a mirrored copy, so that its segmentations may differ.
    One that segments regions (:class:`nnunet_dyn.decisions.GatedNetwork`) has its tiles on them.

    Attributes:
        engine: runs the network.
        decided: by ``predict_logits_from_preprocessed_data``, of each fold the tiles in order; empty where the network
            does not decide.
        folder, folds, checkpoint: what ``from_folder`` has loaded; of an exported folder, what it was exported from.
        first_stage: of a cascade, what segments each case first where no segmentation of that stage is given.
    """

    engine: Engine
    folder: Path | None = None
    folds: tuple[int | str, ...] = ()
    checkpoint: str = CHECKPOINT
    first_stage: Predictor | None = None
    decided: tuple[tuple[TileDecision, ...], ...] = ()
    _keeps_tiles: bool = False
    _kept_tiles: list[RegionTile] | None = None

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        folds: Sequence[int | str] | int | str | None = None,
        checkpoint: str = CHECKPOINT,
        *,
        engine: str | None = None,
        precision: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        tile_step_size: float = 0.5,
        use_mirroring: bool = True,
        perform_everything_on_device: bool = True,
        verbose: bool = False,
        progress: bool = False,
        first_stage: bool = True,
    ) -> Predictor:
        """Load a model folder of nnU-Net, or one that ``nnunet_dyn export`` wrote.

        Args:
            folds: to average over, or the one; ``None`` takes all that are there.
            checkpoint: file name in each fold's folder; an exported folder has its own.
            engine: ``torch``, ``openvino`` or ``onnxruntime``; ``None`` takes torch, or what the folder was exported
                for.
            precision: ``fp32``, ``bf16`` (not in ONNX Runtime) or, on CUDA, ``fp16``; ``None`` computes as nnU-Net
                does: fp32, on CUDA half precision by autocast. An exported folder has its own, which may be ``int8``.
            device: ``cpu``, ``cuda`` or ``mps``; ``None`` takes CUDA where there is one and the engine is torch, or
                else the CPU.
            threads: on the CPU; ``None`` takes every core this process may use.
            tile_step_size: of the patch, more than 0 and at most 1.
            use_mirroring: average over flipped copies, along the axes that the trainer allows.
            perform_everything_on_device: keep the logits on a GPU.
            progress: show a bar on standard error while a case is predicted.
            first_stage: of a cascade, also load the model folder of the first stage where it stands beside this one,
                as nnU-Net has it: with the same folds, or if one of them is missing there, with all that there are,
                and with everything else as here. An exported folder has it inside, if at all.

        Raises:
            UsageError: no such folder, fold, engine, precision or device.
            JobError: a model that cannot be loaded.
        """
        folds = [folds] if isinstance(folds, (int, str)) else folds
        exported = load_exported(Path(folder)) if is_exported(folder) else None
        if exported is not None:
            engine, precision = exported.check(engine, precision, checkpoint)
        engine = engine or "torch"
        if device is None:
            device = "cuda" if engine == "torch" and torch.cuda.is_available() else "cpu"
        precision = check_engine(engine, precision, device)
        if not {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[device]:
            raise UsageError(f"Got device {device}, which this machine or its torch does not have. Take cpu.")
        if not 0 < tile_step_size <= 1:
            raise UsageError(f"Got a step size of {tile_step_size}; expected a part of the patch, more than 0 up to 1.")
        if threads is not None and threads < 1:
            raise UsageError(f"Got {threads} threads; expected 1 or more.")
        with redirect_stdout(StringIO()):  # nnU-Net explains perform_everything_on_device
            predictor = cls(
                tile_step_size=tile_step_size,
                use_mirroring=use_mirroring,
                perform_everything_on_device=perform_everything_on_device,
                device=torch.device(device),
                verbose=verbose,
                verbose_preprocessing=verbose,
                allow_tqdm=progress,
            )
        predictor.checkpoint = checkpoint
        if exported is None:
            predictor.initialize_from_trained_model_folder(
                folder, folds, checkpoint, engine=engine, precision=precision, threads=threads
            )
            predictor.folder, predictor.folds = Path(folder), tuple(folds or available_folds(Path(folder), checkpoint))
            before = predictor.configuration_manager.previous_stage_name
            beside = None if before is None else first_stage_folder(predictor.folder, before)
            if beside is not None and predictor.gated is not None:
                checkpoint = calibrated_checkpoint(beside, checkpoint)
            folds_before = [] if beside is None else same_or_all(predictor.folds, beside, checkpoint)
        else:
            predictor.folder, predictor.folds = Path(folder), tuple(folds or exported.manifest.folds)
            predictor.checkpoint = exported.manifest.checkpoint
            predictor.manual_initialization(
                nn.Identity(),  # nnU-Net wants a network; the engine has its own
                exported.plans,
                exported.configuration,
                None,
                exported.dataset,
                exported.manifest.trainer,
                exported.manifest.mirroring_axes,
                engine=exported.engine(folds, threads),
            )
            beside, folds_before = exported.first_stage, exported.first_stage_folds(predictor.folds)
            checkpoint = CHECKPOINT  # what the first stage was exported from, its manifest says
        if first_stage and folds_before:
            predictor.first_stage = cls.from_folder(
                beside,
                folds_before,
                checkpoint,
                engine=engine,
                precision=precision if exported is None else None,  # it has its own
                device=device,
                threads=threads,
                tile_step_size=tile_step_size,
                use_mirroring=use_mirroring,
                perform_everything_on_device=perform_everything_on_device,
                verbose=verbose,
                progress=progress,
            )
        return predictor

    def initialize_from_trained_model_folder(
        self,
        model_training_output_dir: str | Path,
        use_folds: Sequence[int | str] | int | str | None,
        checkpoint_name: str = CHECKPOINT,
        *,
        engine: str = "torch",
        precision: str | None = None,
        threads: int | None = None,
    ) -> None:
        """As nnU-Net's, but unpickles only tensors and plain values where the checkpoint allows it."""
        if isinstance(use_folds, (int, str)):
            use_folds = [use_folds]
        model = load_model(Path(model_training_output_dir), use_folds, checkpoint_name)
        converted = None
        if engine != "torch":
            precision = check_engine(engine, precision, self.device.type)
            converted = converted_engine(model, engine, precision, threads)
        self.manual_initialization(
            model.network,
            model.plans,
            model.configuration,
            model.parameters,
            model.dataset,
            model.trainer,
            model.mirroring_axes,
            engine=converted,
            precision=precision,
            threads=threads,
        )

    def manual_initialization(
        self,
        network: nn.Module,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        parameters: list[dict] | None,
        dataset_json: dict,
        trainer_name: str,
        inference_allowed_mirroring_axes: tuple[int, ...] | None,
        *,
        engine: Engine | None = None,
        precision: str | None = None,
        threads: int | None = None,
    ) -> None:
        """As nnU-Net's.

        Args:
            network: with deep supervision off.
            parameters: a state dictionary per fold; ``None`` predicts with those that the network has.
            engine: runs the folds instead of ``network`` and ``parameters``, with its own precision and threads.

        Raises:
            JobError: parameters that do not fit the network.
        """
        super().manual_initialization(
            network,
            plans_manager,
            configuration_manager,
            parameters,
            dataset_json,
            trainer_name,
            inference_allowed_mirroring_axes,
        )
        skip = {"resampling_fn_seg": "no_resampling_hack", "resampling_fn_seg_kwargs": {}}
        self._image_only = ConfigurationManager(configuration_manager.configuration | skip)
        if engine is None:
            precision = check_engine("torch", precision, self.device.type)
            engine = TorchEngine(self.network, parameters, self.device, precision, threads)
        self.engine = engine
        for fold in reversed(range(self.engine.folds)):  # each, so that a wrong one is found before the first case
            self.engine.load(fold)

    # ------------------------------------------------------------------------------------------------ sliding window

    @torch.inference_mode()
    def predict_logits_from_preprocessed_data(self, data: torch.Tensor) -> torch.Tensor:
        """Logits of a preprocessed image, the mean over the folds.

        Args:
            data: (C, *shape), as nnU-Net's preprocessor leaves it, for a cascade with the one-hot segmentation of the
                previous stage behind the image.

        Returns:
            (classes, *shape) in half precision on the CPU.
        """
        logits, self.decided = None, ()
        with on_threads(self.engine.threads), self._tiles_kept():
            for fold in range(self.engine.folds):
                self.engine.load(fold)
                of_fold = self.predict_sliding_window_return_logits(data).to("cpu")
                logits = of_fold if logits is None else logits.add_(of_fold)
                if self.engine.decides:
                    self.decided = (*self.decided, self._placed(tuple(data.shape)))
        self._warn_of_tiles_not_calibrated_for(tuple(data.shape[1:]))
        return logits.div_(self.engine.folds) if self.engine.folds > 1 else logits

    def _placed(self, shape: tuple[int, ...]) -> tuple[TileDecision, ...]:
        """The decisions of the last sliding window, over an image of ``shape``, (C, *shape)."""
        inside, _ = self._image_in_padded(shape[1:])
        offset = [part.start for part in inside]
        return tuple(TileDecision.make(slicer, offset, shape[1:], *rest) for slicer, *rest in self._decided)

    def _warn_of_tiles_not_calibrated_for(self, shape: tuple[int, ...]) -> None:
        """Where a part of an image of ``shape`` was left out and its tiles lie elsewhere than in calibration.

        Of regions nothing is left out, wherever their tiles lie.
        """
        if self.gated is not None:
            return
        patch = tuple(self.configuration_manager.patch_size)
        padded = [max(size, side) for size, side in zip(shape[-len(patch) :], patch, strict=True)]
        steps = (self.tile_step_size, CALIBRATED_STEP_SIZE)
        tiles, calibrated = (compute_steps_for_sliding_window(padded, patch, step) for step in steps)
        whole = (tuple((0, side) for side in patch),)
        decisions = (tile.decision for fold in self.decided for tile in fold)
        if tiles != calibrated and any(decision.computed(patch) != whole for decision in decisions):
            warnings.warn(
                f"Got a step size of {self.tile_step_size:g} of the patch; expected {CALIBRATED_STEP_SIZE:g}, with "
                f"which {self.trainer_name} has calibrated what may be skipped or cropped: its coverage is not known "
                "for other tiles. Leave out -step_size.",
                stacklevel=2,
            )

    @torch.inference_mode()
    def predict_sliding_window_return_logits(self, input_image: torch.Tensor) -> torch.Tensor:
        """As nnU-Net's: (classes, *shape) in half precision from (C, *shape).

        Raises:
            NotFiniteError: logits that are not finite.
        """
        logits = super().predict_sliding_window_return_logits(input_image)
        # Not before: nnU-Net would take the error for a lack of memory and predict once more.
        if not all(bool(of_class.isfinite().all()) for of_class in logits):
            raise NotFiniteError(
                "The network gave logits that are NaN or too large for half precision; expected finite ones. Check "
                "the checkpoint, and that the images are like those of the training."
            )
        return logits

    @torch.inference_mode()
    def _internal_predict_sliding_window_return_logits(
        self, data: torch.Tensor, slicers: list[tuple], do_on_device: bool = True
    ) -> torch.Tensor:
        device = self.device if do_on_device else torch.device("cpu")
        self._decided: list[tuple[tuple, Decision, float]] = []
        try:
            if self.gated is not None:
                return self._predict_regions(data.to(device))
            return self._predict_window(data.to(device), slicers)
        except RuntimeError as error:
            # nnU-Net takes it for a lack of memory and tries again on the CPU while it handles the error, whose
            # traceback would keep the tensors of all these frames on the device.
            traceback.clear_frames(error.__traceback__)
            raise

    def _predict_window(self, data: torch.Tensor, slicers: list[tuple]) -> torch.Tensor:
        """nnU-Net's accumulation: half precision, its order of tiles. Anything else would change some voxels."""
        logits = data.new_zeros((self.label_manager.num_segmentation_heads, *data.shape[1:]), dtype=torch.half)
        weights, gaussian = torch.zeros_like(logits[0]), self._gaussian(data.device)
        with self._bar(len(slicers), "tile") as bar:
            for slicer, prediction in self._predict_tiles(data, slicers):
                logits[slicer] += prediction.to(data.device) * gaussian
                weights[slicer[1:]] += gaussian
                bar.update()
        for of_class in logits:
            of_class /= weights
        return logits

    def _gaussian(self, device: torch.device) -> torch.Tensor:
        """(*patch) weights of a tile's voxels, half precision."""
        patch = tuple(self.configuration_manager.patch_size)
        if not self.use_gaussian:
            return torch.ones(patch, dtype=torch.half, device=device)
        return compute_gaussian(patch, sigma_scale=1 / 8, value_scaling_factor=10, device=device)

    def _bar(self, total: int, unit: str) -> tqdm:
        return tqdm(total=total, disable=None if self.allow_tqdm else True, leave=False, unit=unit)

    @property
    def gated(self) -> GatedNetwork | None:
        """The network, if tiles lie on the regions that its gate asks for. Slices have nnU-Net's."""
        return self.engine.gated if len(self.configuration_manager.patch_size) == 3 else None

    def _predict_regions(self, data: torch.Tensor) -> torch.Tensor:
        """(classes, *shape) of an image of which only regions are segmented: see :mod:`nnunet_dyn.inference.regions`.

        Mirrored copies are those of the crops, and averaged before the tile has them.
        """
        network, copies, tiles = self.gated, self.mirrored_axes(), self._region_tiles(data)
        if self._keeps_tiles:
            self._kept_tiles = tiles
        self._decided = [(tile.slicer, tile.decision, len(copies) * tile.decision.cost) for tile in tiles]
        crops = crops_of_tiles(network, tiles)
        total = RegionLogits(crops, network.background_logits, tuple(data.shape[1:]), self.use_gaussian, data.device)
        alike: dict[tuple[int, ...], list[Crop]] = {}
        for crop in crops:
            alike.setdefault(crop.size, []).append(crop)
        with self._bar(len(crops), "crop") as bar:
            for size, members in alike.items():
                batch = max(1, BATCH_VOXELS // math.prod(size))
                together = max(1, batch // len(copies))
                for start in range(0, len(members), together):
                    group = members[start : start + together]
                    cut = [network.cut(data, crop.box) for crop in group]
                    means = self._mean_of_copies(cut, copies, batch, self.engine.infer_crops)
                    for crop, (logits,) in zip(group, means, strict=True):
                        total.add(crop, network.restore(logits, crop.box))
                        bar.update()
        return total.mean()

    def _region_tiles(self, data: torch.Tensor) -> list[RegionTile]:
        if self._kept_tiles is not None:
            return self._kept_tiles
        patch = tuple(self.configuration_manager.patch_size)
        return region_tiles(self.gated, data, patch, self.tile_step_size)

    @contextmanager
    def _tiles_kept(self) -> Iterator[None]:
        """For the folds of one image: its tiles, and what they cost, do not depend on weights."""
        self._keeps_tiles = True
        try:
            yield
        finally:
            self._keeps_tiles, self._kept_tiles = False, None

    def _predict_tiles(self, data: torch.Tensor, slicers: list[tuple]) -> Iterator[tuple[tuple, torch.Tensor]]:
        """Each slicer with its tile's (classes, *patch) logits, in order."""
        copies = self.mirrored_axes()
        voxels = math.prod(self.configuration_manager.patch_size)
        batch = max(1, BATCH_VOXELS // voxels)
        together = max(1, batch // len(copies))
        predict = self._mean_of_copies
        if self.engine.decides:
            together, predict = max(1, DECIDED_VOXELS // voxels), self._mean_of_decided_copies
        constant: dict[tuple[float, ...], tuple] = {}
        for start in range(0, len(slicers), together):
            group = slicers[start : start + together]
            tiles = [data[slicer] for slicer in group]
            # What a tile is known by: its values where it is constant, or else its number.
            keys = [constant_values(tile) or number for number, tile in enumerate(tiles)]
            new = {key: tile for key, tile in zip(keys, tiles, strict=True) if key not in constant}
            known = constant | dict(zip(new, predict(list(new.values()), copies, batch), strict=True))
            for slicer, key in zip(group, keys, strict=True):
                logits, *decided = known[key]
                if decided:
                    self._decided.append((slicer, *decided))
                yield slicer, logits
            constant = {key: known[key] for key in [key for key in known if isinstance(key, tuple)][-CONSTANT_TILES:]}

    def mirrored_axes(self) -> list[tuple[int, ...]]:
        """Axes of (C, *patch) to flip for each copy of a tile, in nnU-Net's order; no axis for the tile itself."""
        allowed = [axis + 1 for axis in (self.allowed_mirroring_axes or ()) if self.use_mirroring]
        return [axes for n in range(len(allowed) + 1) for axes in itertools.combinations(allowed, n)]

    def _mean_of_copies(
        self,
        tiles: list[torch.Tensor],
        copies: list[tuple[int, ...]],
        batch: int,
        infer: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> list[tuple[torch.Tensor]]:
        """(classes, *size) logits of each (C, *size) tile, the mean over its mirrored copies.

        Args:
            infer: of a batch of copies; ``None`` is the engine's.
        """
        infer = infer or self.engine.infer
        work = [(index, axes) for index in range(len(tiles)) for axes in copies]
        sums: list[torch.Tensor | None] = [None] * len(tiles)
        for start in range(0, len(work), batch):
            part = work[start : start + batch]
            stacked = torch.stack([tiles[index].flip(axes) for index, axes in part]).to(self.device)
            for (index, axes), logits in zip(part, infer(stacked), strict=True):
                sums[index] = logits if sums[index] is None else sums[index].add_(logits.flip(axes))
        return [(total.div_(len(copies)),) for total in sums]

    def _mean_of_decided_copies(
        self, tiles: list[torch.Tensor], copies: list[tuple[int, ...]], batch: int
    ) -> list[tuple[torch.Tensor, Decision, float]]:
        """The same of a network that decides, with the decision of each tile and what carrying it out cost.

        The decision on the tile itself serves all of its copies, with what was left open in it when it was first
        executed. Of a skipped tile nothing more is computed. What was decided alike is executed together.
        """
        if not tiles:
            return []
        stacked = torch.stack(tiles).to(self.device)
        decisions, patch = self.engine.decide(stacked), tuple(stacked.shape[2:])
        results: list[tuple[torch.Tensor, Decision, float] | None] = [None] * len(tiles)
        alike: dict[tuple, list[int]] = {}
        for index, decision in enumerate(decisions):
            sizes = tuple(tuple(stop - start for start, stop in box) for box in decision.computed(patch))
            alike.setdefault((decision.action, sizes), []).append(index)
        for (action, _), members in alike.items():
            if action == SKIP:
                first = members[0]
                (background,), _ = self.engine.execute(stacked[first : first + 1], [decisions[first]])
                for index in members:
                    results[index] = (background, decisions[index], decisions[index].cost)
                continue
            done: dict[int, Decision] = {}
            sums: dict[int, torch.Tensor] = {}
            for work in ([(index, ()) for index in members], [(i, axes) for i in members for axes in copies[1:]]):
                for start in range(0, len(work), batch):
                    part = work[start : start + batch]
                    x = torch.stack([stacked[index].flip(axes) for index, axes in part])
                    orders = [
                        done.get(index, decisions[index]).mirrored([axis - 1 for axis in axes], patch)
                        for index, axes in part
                    ]
                    for (index, axes), logits, decision in zip(part, *self.engine.execute(x, orders), strict=True):
                        if index in done:
                            sums[index].add_(logits.flip(axes))
                        else:
                            done[index], sums[index] = decision, logits.clone()  # not a view of the whole batch
            for index in members:
                decided, executed = decisions[index].cost, done[index].cost
                macs = decided + len(copies) * (executed - decided)
                results[index] = (sums[index].div_(len(copies)), done[index], macs)
        return results

    # ------------------------------------------------------------------------------------------------------- one case

    def predict(
        self,
        array: np.ndarray,
        spacing: Sequence[float],
        *,
        previous_stage: np.ndarray | None = None,
        probabilities: bool = False,
    ) -> Prediction:
        """Segment one image.

        Args:
            array: (channels, z, y, x), any number type, as SimpleITK orders axes; a 2D image is (channels, 1, y, x).
                Intensities as in the files the model was trained on: they are normalised here.
            spacing: (z, y, x) in mm per voxel, in the order of the array's axes. For a 2D image nnU-Net's readers give
                the first axis a large one, 999.
            previous_stage: (z, y, x) labels of a cascade's first stage; ``None`` takes those of ``first_stage``.
            probabilities: return them too.

        Raises:
            UsageError: a cascade without its previous stage, or one for a model that is no cascade.
            JobError: an array or spacing that this model cannot take, or not finite.
        """
        array = np.asarray(array)
        spacing = [float(value) for value in spacing]
        if array.ndim != 4 or len(spacing) != 3 or not all(math.isfinite(value) and value > 0 for value in spacing):
            raise JobError(
                f"Got an array of shape {array.shape} and spacing {spacing}; expected (channels, z, y, x) and three "
                "numbers of mm, more than 0. A 2D image is (channels, 1, y, x)."
            )
        self.check_cascade(previous_stage is not None)
        if previous_stage is not None:
            previous_stage = np.asarray(previous_stage)[None]
        seconds = dict.fromkeys(STAGES, 0.0)
        allocate = (lambda shape: np.zeros(shape, np.float32)) if probabilities else None
        segmentation, into, decisions = self._predict_case(
            [array], {"spacing": spacing}, previous_stage, seconds, allocate
        )
        return Prediction(segmentation, into, seconds, decisions)

    def _predict_case(
        self,
        image: list[np.ndarray],
        properties: dict,
        previous_stage: np.ndarray | None,
        seconds: dict[str, float],
        allocate_probabilities: Callable[[tuple[int, ...]], np.ndarray] | None,
        picture: Path | None = None,
        scratch: Path | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None, CaseDecisions | None]:
        """Segmentation, probabilities and decisions.

        Adds to ``seconds``, takes the array out of ``image`` to free it, and draws the decisions into ``picture``. What
        does not go into memory is kept in ``scratch``.
        """
        before, warning, channels = None, (), len(image[0])
        if previous_stage is None and self.first_stage is not None:
            previous_stage, before, warning = self._segment_first(image[0], properties, seconds, scratch)
        has_found = previous_stage is not None and bool((previous_stage > 0).any())
        with _timed(seconds, "preprocess"):
            data, properties = self.preprocess(image, properties, previous_stage)
        if previous_stage is not None and not (data[channels:] > 0.5).any():
            warning = (*warning, NOTHING_LEFT if has_found else NOTHING_FOUND)
        with _timed(seconds, "network"):
            logits = self.predict_logits_from_preprocessed_data(data)
        decisions = self._case_decisions(tuple(data.shape[1:]), properties)
        if decisions is not None:
            decisions = replace(decisions, warnings=warning, first_stage=before)
        with _timed(seconds, "export"), on_threads(self.engine.threads):
            if picture is not None:
                plot_decisions(data[0].numpy(), self._labels(logits), decisions, picture)
            del data
            segmentation, probabilities = segment(
                logits,
                self.plans_manager,
                self.configuration_manager,
                self.label_manager,
                properties,
                allocate_probabilities,
                scratch,
            )
        return segmentation, probabilities, decisions

    def _segment_first(
        self, image: np.ndarray, properties: dict, seconds: dict[str, float], scratch: Path | None = None
    ) -> tuple[np.ndarray, CaseDecisions | None, tuple[str, ...]]:
        """(1, z, y, x) labels by the first stage, which has its own preprocessing and properties, its decisions, and
        warnings."""
        try:
            labels, _, decisions = self.first_stage._predict_case(
                [image], dict(properties), None, seconds, None, scratch=scratch
            )
        except TooThinError:
            if self.gated is None:
                raise
            # Its boxes only say where to look; the finer grid of this stage may have voxels of the image.
            whole = np.full((1, *image.shape[1:]), self.label_manager.foreground_labels[0], np.int16)
            return whole, None, (TOO_THIN,)
        return labels[None], decisions, ()

    def preprocess(
        self, image: list[np.ndarray], properties: dict, previous_stage: np.ndarray | None = None
    ) -> tuple[torch.Tensor, dict]:
        """What the network gets of an image, (C, *shape) float32, and nnU-Net's properties of it.

        Args:
            image: the one array, (channels, z, y, x), which is taken out of the list to free it.
            properties: as nnU-Net's readers leave them, the spacing at least.
            previous_stage: (1, z, y, x) labels of a cascade's first stage; ``None`` takes those of ``first_stage``.

        Raises:
            JobError: an image that this model cannot take.
        """
        if previous_stage is None and self.first_stage is not None:
            previous_stage, *_ = self._segment_first(image[0], properties, {})
        self._check_image(image[0], previous_stage)
        if previous_stage is not None:  # as nnU-Net's readers have it; the preprocessor writes -1 into it
            previous_stage = previous_stage.astype(np.float32)
        # Without a previous stage nobody looks at the segmentation that the preprocessor would resample.
        configuration = self._image_only if previous_stage is None else self.configuration_manager
        preprocessor = configuration.preprocessor_class(verbose=self.verbose_preprocessing)
        try:
            data, labels, properties = preprocessor.run_case_npy(
                image.pop(), previous_stage, properties, self.plans_manager, configuration, self.dataset_json
            )
        except (ValueError, RuntimeError):  # what nnU-Net's resampling says of no voxels, if anything
            self._check_thickness(properties)
            raise
        if 0 in data.shape:
            self._check_thickness(properties, data.shape[1:])
        if previous_stage is not None:  # as nnU-Net's one-hot encoding, without a second copy of all classes
            image_only, classes = data, self.label_manager.foreground_labels
            data = np.empty((len(image_only) + len(classes), *image_only.shape[1:]), np.float32)
            data[: len(image_only)] = image_only
            for channel, label in zip(data[len(image_only) :], classes, strict=True):
                channel[...] = labels[0] == label
        return torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)), properties

    def _check_thickness(self, properties: dict, left: Sequence[int] | None = None) -> None:
        """Raises TooThinError if the image has no voxel at the network's spacing, ``properties`` being nnU-Net's.

        Args:
            left: the voxels it has there; ``None``: as many as nnU-Net's resampling would leave.
        """
        shape = properties.get("shape_after_cropping_and_before_resampling")
        if shape is None:  # nnU-Net did not come that far
            return
        spacing = [properties["spacing"][axis] for axis in self.plans_manager.transpose_forward]
        own = list(self.configuration_manager.spacing)
        own = spacing[: len(spacing) - len(own)] + own  # 2D leaves the first axis as it is
        left = compute_new_shape(shape, spacing, own) if left is None else left
        if 0 in left:
            raise TooThinError(
                f"Got an image that has {' × '.join(map(str, left))} voxels at the network's spacing of "
                f"{' × '.join(f'{mm:g}' for mm in own)} mm; expected one at least on every axis. Check the image's "
                "spacing, or take a model for images as thin as this one."
            )

    def tiles(self, data: torch.Tensor) -> Iterator[torch.Tensor]:
        """(C, *patch) of each tile that is predicted of ``data``, (C, *shape), in order.

        Of a network that segments regions those are the tiles on them, each with the gate of one region.
        """
        data, _ = pad_nd_image(data, self.configuration_manager.patch_size, "constant", {"value": 0}, True, None)
        if self.gated is not None:
            yield from (seen_in(tile, self.gated, data) for tile in self._region_tiles(data))
            return
        for slicer in self._internal_get_sliding_window_slicers(data.shape[1:]):
            yield data[slicer]

    def _case_decisions(self, shape: tuple[int, ...], properties: dict) -> CaseDecisions | None:
        if not self.decided:
            return None
        forward = self.plans_manager.transpose_forward
        cropped = properties["bbox_used_for_cropping"]
        paths = self.engine.profile_paths(tuple(self.configuration_manager.patch_size))
        return CaseDecisions(
            self.decided,
            shape,
            tuple(int(properties["shape_before_cropping"][axis]) for axis in self.plans_manager.transpose_backward),
            tuple((int(start), int(stop)) for start, stop in cropped),
            tuple(forward),
            len(self.mirrored_axes()),
            paths[EVERYTHING_ON].cost,
            self.window(shape),
        )

    def window(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """How many tiles nnU-Net's sliding window has on an image of ``shape``, and how many voxels of it are in them,
        counted in each."""
        inside, padded = self._image_in_padded(shape)
        in_tiles = [
            math.prod(
                min(at.stop, image.stop) - max(at.start, image.start) if isinstance(at, slice) else 1
                for at, image in zip(slicer[1:], inside, strict=True)
            )
            for slicer in self._internal_get_sliding_window_slicers(padded)
        ]
        return len(in_tiles), int(sum(in_tiles))

    def _image_in_padded(self, shape: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[int, ...]]:
        """Where an image of ``shape`` lies in what nnU-Net's sliding window makes of it, and the shape of that."""
        image = torch.empty((1, *shape), device="meta")
        padded, inside = pad_nd_image(
            image, self.configuration_manager.patch_size, "constant", {"value": 0}, True, None
        )
        return inside[1:], tuple(padded.shape[1:])

    def _labels(self, logits: torch.Tensor) -> np.ndarray:
        """(*shape) labels at the network's spacing, a slice at a time."""
        slices = [self.label_manager.convert_logits_to_segmentation(part.float()) for part in logits.split(1, 1)]
        return torch.cat(slices).numpy()

    def _check_image(self, image: np.ndarray, previous_stage: np.ndarray | None) -> None:
        names = self.dataset_json.get("channel_names") or self.dataset_json.get("modality")
        if len(image) != len(names):
            raise JobError(
                f"Got {len(image)} channel{'s' * (len(image) != 1)}; expected {len(names)}: {', '.join(names.values())}"
                " (what the model was trained on, in that order). Give all of them."
            )
        if not image.size:
            raise JobError(
                f"Got an image of {' × '.join(map(str, image.shape[1:]))} voxels; expected some in every axis."
            )
        for channel, values in enumerate(image):
            if bad := values.size - int(np.count_nonzero(np.isfinite(values))):
                raise JobError(
                    f"{bad} of {values.size} voxels of channel {channel} are NaN or infinite; expected numbers. "
                    "Replace them, for example by the value of air."
                )
        if previous_stage is not None and previous_stage.shape[1:] != image.shape[1:]:
            raise JobError(
                f"Got a segmentation of the previous stage of {previous_stage.shape[1:]} voxels for an image of "
                f"{image.shape[1:]}; expected the same."
            )

    def check_cascade(self, has_previous_stage: bool) -> None:
        """Check that there are segmentations of a previous stage, or its model, for a cascade, and only for one.

        Raises:
            UsageError: otherwise.
        """
        name = self.configuration_manager.previous_stage_name
        if name is not None and not has_previous_stage and self.first_stage is None:
            remedy = "Give its segmentations with -prev_stage_predictions"
            if self.folder is not None and not is_exported(self.folder):
                beside = first_stage_folder(self.folder, name)
                remedy += f", or train it, or copy its model folder, so that {beside} has the checkpoint of a fold"
            raise UsageError(f"This is the second stage of a cascade; expected the first one, {name}. {remedy}.")
        if name is None and has_previous_stage:
            raise UsageError(
                "Got segmentations of a previous stage for a model that has none. Leave out -prev_stage_predictions."
            )

    # -------------------------------------------------------------------------------------------------------- files

    def predict_files(
        self,
        images: str | Path | Sequence[Sequence[str | Path]],
        output: str | Path,
        *,
        save_probabilities: bool = False,
        overwrite: bool = True,
        previous_stage: str | Path | None = None,
        num_parts: int = 1,
        part_id: int = 0,
        save_decisions: bool = False,
        decision_pictures: bool = False,
        report: Callable[[int, int, Outcome], None] | None = None,
    ) -> list[Outcome]:
        """Segment image files one after the other, in this process.

        A case that fails is recorded and the next one is taken. Files appear under their names when they are complete.

        Args:
            images: a folder in nnU-Net's naming (``case_0000.nii.gz``), or a list of channel files per case.
            output: folder for ``case.nii.gz`` (the ending of the data set), with ``save_probabilities`` also nnU-Net's
                ``.npz`` and ``.pkl``; made if it does not exist.
            overwrite: ``False`` leaves out cases that are there.
            previous_stage: folder with the segmentations of a cascade's first stage; ``None`` takes ``first_stage``.
            num_parts, part_id: take every ``num_parts``-th case from number ``part_id`` on.
            save_decisions: write what the network decided to ``decisions/case.json`` in ``output``.
            decision_pictures: draw it into ``decisions/case.png``.
            report: called after each case with its number from 1, their number, and its outcome.

        Raises:
            UsageError: a folder or part that is not there, a folder without images, an output folder that cannot be
                written to, or decisions asked of a network that makes none.
        """
        if not 0 <= part_id < num_parts:
            raise UsageError(f"Got part {part_id} of {num_parts}; expected 0 to {num_parts - 1}.")
        endings = [ending for ending, wanted in ((".json", save_decisions), (".png", decision_pictures)) if wanted]
        if endings and not self.engine.decides:
            raise UsageError(
                f"{self.trainer_name} trains a network that makes no decisions: it computes the same on every image. "
                "Leave out --save-decisions and --decision-pictures, or take a model of a dynamic method."
            )
        self.check_cascade(previous_stage is not None)
        output, ending = Path(output), self.dataset_json["file_ending"]
        cases = list_cases(images, ending)[part_id::num_parts]
        outcomes = [Outcome(case, output / f"{case}{ending}") for case, _ in cases]
        files = [files for _, files in cases]
        if not overwrite:
            wanted = ["{}" + ending, *[f"{DECISIONS}/{{}}{suffix}" for suffix in endings]]
            wanted += ["{}.npz"] * save_probabilities
            todo = [not all((output / name.format(outcome.case)).is_file() for name in wanted) for outcome in outcomes]
            outcomes, files = list(itertools.compress(outcomes, todo)), list(itertools.compress(files, todo))
        for folder in (output, *[output / DECISIONS] * bool(endings)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"Cannot make the folder {folder}: {error.strerror}. Name another.") from error
        try:
            with complete_files(output) as folder:  # nnU-Net's evaluation and postprocessing look for them
                for name, content in (("dataset.json", self.dataset_json), ("plans.json", self.plans_manager.plans)):
                    save_json(content, str(folder / name), sort_keys=False)
        except OSError as error:
            raise UsageError(
                f"Cannot write dataset.json and plans.json into {output}: {error.strerror}. Expected a folder that "
                "takes files of these names; make it writable, or name another."
            ) from error
        for number, (outcome, channels) in enumerate(zip(outcomes, files, strict=True), 1):
            try:
                before = previous_stage and Path(previous_stage, f"{outcome.case}{ending}")
                self._predict_file(channels, outcome, before, save_probabilities, endings)
            except Exception as error:  # whatever it is, the other cases are still wanted
                if self.verbose:
                    traceback.print_exc()
                kind = "" if isinstance(error, (JobError, UsageError)) else f"{type(error).__name__}: "
                outcome.error = " ".join(f"{kind}{error}".split())
            if report is not None:
                report(number, len(outcomes), outcome)
        compute_gaussian.cache_clear()
        return outcomes

    def read(self, files: Sequence[Path]) -> tuple[np.ndarray, dict]:
        """(channels, z, y, x) of a case's channel files and their properties, by the reader that the plans name.

        Raises:
            JobError: a file that cannot be read, or not all of it.
        """
        return _read(self.plans_manager.image_reader_writer_class().read_images, [str(path) for path in files])

    def _predict_file(
        self,
        files: Sequence[Path],
        outcome: Outcome,
        previous_stage: Path | None,
        save_probabilities: bool,
        decision_files: Sequence[str],
    ) -> None:
        outcome.seconds = dict.fromkeys(STAGES, 0.0)
        reader = self.plans_manager.image_reader_writer_class()
        with _timed(outcome.seconds, "read"):
            image, properties = self.read(files)
            before = None
            if previous_stage is not None:
                before, _ = _read(reader.read_seg, str(previous_stage))
        image = [image]
        with ExitStack() as stack:
            folder = stack.enter_context(complete_files(outcome.output.parent, last=outcome.output.name))
            names: dict[str, Path] = {}
            if decision_files:  # entered after the other folder, so that its files are moved before the segmentation
                beside = stack.enter_context(complete_files(outcome.output.parent / DECISIONS))
                names = {ending: beside / f"{outcome.case}{ending}" for ending in decision_files}
            packing = stack.enter_context(ExitStack())
            allocate = None
            if save_probabilities:
                allocate = packing.enter_context(probabilities_file(folder / f"{outcome.case}.npz"))
            segmentation, probabilities, decisions = self._predict_case(
                image, properties, before, outcome.seconds, allocate, names.get(".png"), folder
            )
            with _timed(outcome.seconds, "export"):
                del probabilities  # mapped from the file that is packed, and then removed
                if ".json" in names:
                    names[".json"].write_text(json.dumps(decisions.to_json(outcome.case)) + "\n")
                packing.close()
                if save_probabilities:
                    save_pickle(properties, str(folder / f"{outcome.case}.pkl"))
                reader.write_seg(segmentation, str(folder / outcome.output.name), properties)
                stack.close()
        outcome.decisions = decisions


def constant_values(tile: torch.Tensor) -> tuple[float, ...] | None:
    """The value of each channel of (C, *patch), or ``None`` unless each has only one."""
    flat = tile.flatten(1)
    first = flat[:, :1]
    return tuple(first[:, 0].tolist()) if bool((flat == first).all()) else None


def list_cases(images: str | Path | Sequence[Sequence[str | Path]], ending: str) -> list[tuple[str, list[Path]]]:
    """Name and channel files of each case; of a folder, in the order of their names.

    Files with the ending but another naming are left out, with a line on standard error.

    Raises:
        UsageError: no folder, or nothing in it that nnU-Net would take for an image; of a list, other names, or two
            cases of one name.
    """
    if not isinstance(images, (str, Path)):
        cases: dict[str, list[Path]] = {}
        for files in ([Path(path) for path in each] for each in images):
            first = files[0] if files else Path()
            if not first.match(f"*_[0-9][0-9][0-9][0-9]{ending}"):
                raise UsageError(f"Got a case of {[*map(str, files)]}; expected channel files as case_0000{ending}.")
            case = first.name[: -len(ending) - 5]
            if case in cases:
                raise UsageError(
                    f"Got two cases called {case}, {cases[case][0]} and {first}; expected names of their own, as "
                    "segmentations have. Rename them, or predict them into two folders."
                )
            cases[case] = files
        return list(cases.items())
    folder = Path(images)
    if not folder.is_dir():
        raise UsageError(f"No folder {folder}; expected one with images named as case_0000{ending}.")
    found: dict[str, list[Path]] = {}
    others = []
    for path in sorted(folder.glob(f"*{ending}")):
        if path.match(f"*_[0-9][0-9][0-9][0-9]{ending}"):
            found.setdefault(path.name[: -len(ending) - 5], []).append(path)
        else:
            others.append(path.name)
    named = f"{len(others)} file{'s' * (len(others) != 1)} without a channel in the name: {', '.join(others[:3])}"
    named += ", …" if len(others) > 3 else ""
    if not found:
        raise UsageError(
            f"{folder} has no images; expected names as case_0000{ending}, the ending of the training data."
            + (f" It has {named}. Rename them." if others else "")
        )
    if others:
        print(f"Left out {named}; expected names as case_0000{ending}.", file=sys.stderr)
    return sorted(found.items())


def _read(read: Callable, files: list[str] | str) -> tuple[np.ndarray, dict]:
    """What ``read`` returns, or a JobError of one line."""
    output = StringIO()
    names = [files] if isinstance(files, str) else files
    try:
        for name in names:
            _check_complete(name)
        with redirect_stdout(output):  # nnU-Net's readers print what is wrong and raise an empty error
            array, properties = read(files)
    except Exception as error:  # each reader's library has errors of its own
        said = str(error) or output.getvalue()
        raise JobError(f"Cannot read {', '.join(names)}: {type(error).__name__}: {said}") from error
    print(output.getvalue(), end="", file=sys.stderr)
    return array, properties


def _check_complete(name: str) -> None:
    """Refuse a NIfTI file that ends too early: ITK fills what is missing with zeros and says nothing.

    What else may be wrong with the file is for the reader to say, which takes some that neither gzip nor nibabel does.

    Raises:
        EOFError, zlib.error: there is too little, or it cannot be unpacked.
    """
    if not name.endswith((".nii", ".nii.gz")):
        return
    import nibabel

    size = 0
    try:
        with (gzip.open if name.endswith(".gz") else open)(name, "rb") as file:
            while part := file.read(2**20):
                size += len(part)
    except OSError:  # such as one that is called .gz and is not packed
        return
    try:
        header = nibabel.load(name)
        expected = header.dataobj.offset + math.prod(header.shape) * header.get_data_dtype().itemsize
    except Exception:  # nibabel has many, also for headers that ITK reads
        return
    if size < expected:
        raise EOFError(f"truncated, {size} of {expected} bytes are there. Copy it again.")


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
