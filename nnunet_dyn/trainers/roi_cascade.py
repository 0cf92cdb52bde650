"""Trainers for the cascade of a detector and a segmentor of its regions of interest. ``docs/roi_cascade.md``."""

from __future__ import annotations

import contextlib
import glob
import inspect
import json
import multiprocessing
import os
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import product
from math import pi
from pathlib import Path
from pydoc import locate
from typing import ClassVar

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from batchgeneratorsv2.transforms.nnunet.random_binary_operator import ApplyRandomBinaryOperatorTransform
from batchgeneratorsv2.transforms.nnunet.remove_connected_components import (
    RemoveRandomConnectedComponentFromOneHotEncodingTransform,
)
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis
from nnunetv2.training.dataloading.nnunet_dataset import (
    infer_dataset_class,
    nnUNetBaseDataset,
    nnUNetDatasetBlosc2,
    nnUNetDatasetNumpy,
)
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.utilities.helpers import dummy_context
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_dyn.architectures.roi import (
    Box,
    DetectorNetwork,
    box_slices,
    component_boxes,
    connected_targets,
    free_boxes,
    intersection,
    jitter,
    label_boxes,
    read_boxes,
    shifted,
    volume,
)
from nnunet_dyn.architectures.roi_detectors import LowResDetector
from nnunet_dyn.architectures.roi_segmentor import ROISegmentor, StageSkippingUNet, without_benchmark
from nnunet_dyn.errors import JobError
from nnunet_dyn.planning import build_network
from nnunet_dyn.safety import BoxCalibration, BoxEvidence
from nnunet_dyn.trainers.base import DISTRIBUTED, CalibratedTrainer, DynTrainer

#: The paper's detector, for the plans that name the default one.
TRI_PLANE = "nnunet_dyn.architectures.triplane.TriPlaneDetector"
#: What each trainer puts in the place of the default detector.
DETECTORS: dict[str, str | None] = {"nnUNetTrainerROICascade": None, "nnUNetTrainerROICascadeTriPlane": TRI_PLANE}

#: Scores that calibration may ask of a detection. What is less sure than the last is noise.
SCORES = (0.5, 0.3, 0.2, 0.15, 0.12, 0.1, 0.05)
#: The margin of boxes that are not calibrated; their score is the lowest one.
_SAFE_MARGIN = 4

#: Share of the labels' boxes that are as loose as those of a detector that is badly calibrated, and how far a side of
#: them moves outwards at most, as a share of the box's extent on that axis.
LOOSE_SHARE, LOOSE_GROWTH = 0.25, 1.0
#: Share of the cases that get boxes around nothing beside the labels' (each case without targets does), and how many
#: at most.
FREE_SHARE, MOST_FREE = 0.5, 3
#: Share of the tiles of a case with boxes around nothing, and targets, that are placed on one of the former.
FREE_TILES = 0.4
#: Seconds after which a prediction is read in training: nnU-Net writes it in place.
SETTLED = 60.0


def build_roi_cascade(
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    num_input_channels: int,
    num_output_channels: int,
    enable_deep_supervision: bool = True,
    *,
    detector: str | None,
) -> DetectorNetwork | ROISegmentor:
    """Build the detector or the segmentor, whichever the configuration names.

    Args:
        detector: dotted path of the detector that takes the place of the default one.

    Raises:
        ValueError: a configuration of another network.
    """
    architecture = configuration_manager.configuration["architecture"]
    network_class = _network_class(configuration_manager)
    if issubclass(network_class, ROISegmentor):
        return build_network(
            architecture, num_input_channels, num_output_channels, deep_supervision=enable_deep_supervision
        )
    if not issubclass(network_class, DetectorNetwork):
        raise ValueError(
            f"{plans_manager.plans_name}: got the trainer of the ROI cascade for a configuration of "
            f"{architecture['network_class_name']}; expected 3d_detect or 3d_roi. Make them with 'nnunet_dyn plan -t "
            "roi_cascade'."
        )
    if detector is not None and network_class is LowResDetector:
        patch = list(configuration_manager.patch_size)
        architecture = {
            "network_class_name": detector,
            "arch_kwargs": {"patch_size": patch},
            "_kw_requires_import": [],
        }
    return build_network(architecture, num_input_channels, num_output_channels, deep_supervision=False)


def _network_class(configuration_manager: ConfigurationManager) -> type[nn.Module]:
    found = locate(configuration_manager.network_arch_class_name)
    return found if isinstance(found, type) else nn.Module


def _segmentor_class(configuration_manager: ConfigurationManager) -> object:
    """What :class:`ROISegmentor` runs on its crops."""
    default = inspect.signature(ROISegmentor).parameters["network_class"].default
    found = configuration_manager.network_arch_init_kwargs.get("network_class", default)
    return locate(found) if isinstance(found, str) else found


class _GateDataset(nnUNetBaseDataset):
    """nnU-Net's data set whose previous stage is the detector's boxes, or those of the labels.

    Attributes:
        boxes: of each case's labels. Without them a case that the detector has not predicted cannot be loaded, as
            validation wants it, where boxes of the labels would tell the truth.
        is_switched: a value shared with worker processes; until it is true, the labels' boxes are taken even where
            the detector's exist. ``None`` takes the detector's wherever they are.
        host: nnU-Net's class for the same files.
    """

    host: ClassVar[type[nnUNetBaseDataset]]
    boxes: Mapping[str, Mapping[int, Sequence[Box]]] | None = None
    is_switched = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._free: dict[tuple[str, float], list[Box]] = {}

    def predicted_at(self, identifier: str) -> float | None:
        """When the detector has predicted this case, in seconds of the clock; ``None`` if it has not."""
        folder = self.folder_with_segs_from_previous_stage
        for ending in (".b2nd", ".npz", ".npy"):
            with contextlib.suppress(FileNotFoundError):
                return os.path.getmtime(os.path.join(folder, identifier + ending))
        return None

    def load_case(self, identifier: str):
        """As nnU-Net's; the previous stage is ``(*spatial)``, labels in boxes, by :func:`draw_gate` if they are the
        labels' own.

        Where some of the boxes hold no target, it is they instead of targets that some tiles are placed on.
        """
        if self.boxes is None:
            return super().load_case(identifier)
        rng = np.random.default_rng(np.random.randint(2**31))  # nnU-Net seeds each worker's own
        waits = self.is_switched is not None and not self.is_switched.value
        written = None if waits else self.predicted_at(identifier)
        if written is not None and time.time() - written >= SETTLED:
            data, seg, gate, properties = super().load_case(identifier)
            if (identifier, written) not in self._free:
                found = [box for boxes in read_boxes(np.asarray(gate[:])).values() for box in boxes]
                free = [box for box in found if not (seg[(0, *box_slices(box))] > 0).any()]
                self._free[identifier, written] = free
            free = self._free[identifier, written]
        else:
            data, seg, _, properties = self.host(self.source_folder, [identifier]).load_case(identifier)
            gate, free = draw_gate(seg, self.boxes[identifier], rng)
        has_targets = any(self.boxes[identifier].values())
        if free and not (has_targets and rng.random() >= FREE_TILES):
            voxels = [[0, *(rng.integers(*axis) for axis in box)] for box in free]
            properties = properties | {"class_locations": {"no target": np.array(voxels)}}
        return data, seg, gate, properties


def draw_gate(
    labels: np.ndarray, boxes: Mapping[int, Sequence[Box]], rng: np.random.Generator
) -> tuple[np.ndarray, list[Box]]:
    """What a detector might have said of a case, made of the boxes of its labels.

    Most boxes are those of a good detector, some as loose as a bad one's, and some of no target at all.

    Args:
        labels: ``(1, *spatial)``.
        boxes: of the targets of each class, by label; a class that the case has not has none.

    Returns:
        ``(*spatial)`` labels in boxes, of which smaller ones win, and the boxes without a target.
    """
    shape, own = labels.shape[1:], [(label, box) for label, found in boxes.items() for box in found]
    drawn = []
    for label, box in own:
        options = {"grow": LOOSE_GROWTH} if rng.random() < LOOSE_SHARE else {}
        drawn.append((label, jitter(box, shape, rng, **options)))
    free = []
    if not own or rng.random() < FREE_SHARE:
        free = free_boxes(labels, [box for _, box in own], rng.integers(1, MOST_FREE + 1), rng)
        drawn += [(int(rng.choice(list(boxes))), box) for box in free]
    gate = np.zeros(shape, np.uint8 if max(boxes, default=0) < 256 else np.int16)
    for label, box in sorted(drawn, key=lambda pair: -volume(pair[1])):
        gate[box_slices(box)] = label
    return gate, free


class GateDatasetBlosc2(_GateDataset, nnUNetDatasetBlosc2):
    """For data that nnU-Net has stored by Blosc2."""

    host = nnUNetDatasetBlosc2


class GateDatasetNumpy(_GateDataset, nnUNetDatasetNumpy):
    """For data that nnU-Net has stored by NumPy."""

    host = nnUNetDatasetNumpy


class _WholeVolumeDataset(nnUNetBaseDataset):
    """nnU-Net's data set for a patch that holds the volume, which is to lie in its middle.

    With an ignore label nnU-Net's loader places every patch on an annotated voxel, forced onto the foreground or not,
    which moves a part of the volume out of it.
    """

    def load_case(self, identifier: str):
        """As nnU-Net's; of every class the volume's middle is the one voxel to place a patch on."""
        data, segmentation, previous, properties = super().load_case(identifier)
        middle = np.array([[0, *(size // 2 for size in data.shape[1:])]])
        locations = dict.fromkeys(properties["class_locations"], middle)
        return data, segmentation, previous, properties | {"class_locations": locations}


class WholeVolumeDatasetBlosc2(_WholeVolumeDataset, nnUNetDatasetBlosc2):
    """For data that nnU-Net has stored by Blosc2."""


class WholeVolumeDatasetNumpy(_WholeVolumeDataset, nnUNetDatasetNumpy):
    """For data that nnU-Net has stored by NumPy."""


class ROICascadeTrainer(CalibratedTrainer):
    """Trains the detector (``3d_detect``), then the segmentor of its boxes (``3d_roi``); the plans say which.

    The segmentor learns on boxes of the labels, moved and resized at random, so that it need not wait for the detector.
    For the last epochs it takes the detector's boxes of the cases that have them.

    Attributes:
        min_coverage: share of the voxels of every class that the detector's boxes must hold.
        min_component: components of this many voxels or more must not be outside them whole.
        enough_cases: calibration leaves some slack for classes that fewer cases hold, more for those that fewer than
            half as many hold, and always in fold ``all``.
        fine_tuning: share of the epochs in which the segmentor sees the detector's boxes.
        detector_rotation: the largest angle by which augmentation turns a volume for the detector, half of nnU-Net's:
            one that fills its patch is turned out of it.
        detector_lr, segmentor_lr, adamw_decay: learning rates and weight decay of AdamW, with nnU-Net's polynomial
            schedule. The paper has rates of 1e-3 to 2e-3 (Table 6) for larger batches. The second is of
            :class:`StageSkippingUNet`, which hardly moves under nnU-Net's SGD; other segmentors keep that.
    """

    min_coverage: ClassVar[float] = 0.995
    min_component: ClassVar[int] = 10
    enough_cases: ClassVar[int] = 20
    fine_tuning: ClassVar[float] = 0.2
    detector_rotation: ClassVar[float] = pi / 12
    detector_lr: ClassVar[float] = 2e-3
    segmentor_lr: ClassVar[float] = 4e-3
    adamw_decay: ClassVar[float] = 0.01

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net reads this signature
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.is_detector = issubclass(_network_class(self.configuration_manager), DetectorNetwork)
        if self.is_detector:
            self.enable_deep_supervision = False
            self.oversample_foreground_percent = 0.0  # it would move the volume, which fills the patch, out of it
        else:
            # On targets, or boxes around none: a tile without a gate teaches nothing.
            self.oversample_foreground_percent = 1.0
        self.has_adamw = self.is_detector or _segmentor_class(self.configuration_manager) is StageSkippingUNet
        if self.has_adamw:
            self.initial_lr = self.detector_lr if self.is_detector else self.segmentor_lr
            self.weight_decay = self.adamw_decay
        self._is_loaded = False
        self._is_switched = multiprocessing.Value("b", 0)
        self._predicted: int | None = None

    # --- set-up ---

    @property
    def module(self) -> DetectorNetwork | ROISegmentor:
        return self.network.module if self.is_ddp else self.network

    def initialize(self) -> None:
        super().initialize()
        manager = self.label_manager
        if self.is_detector:
            self.module.set_labels(manager.has_regions, manager.ignore_label)
            self.take_safe_settings()
            self.loss = self._detector_loss
            # nnU-Net loads a checkpoint, or weights of another training, behind this.
            self.module.register_load_state_dict_post_hook(lambda *_: setattr(self, "_is_loaded", True))
        else:
            self.module.set_regions(manager.has_regions)
        is_blosc2 = issubclass(infer_dataset_class(self.preprocessed_dataset_folder), nnUNetDatasetBlosc2)
        if self.is_detector:
            self.dataset_class = WholeVolumeDatasetBlosc2 if is_blosc2 else WholeVolumeDatasetNumpy
        else:
            self.dataset_class = GateDatasetBlosc2 if is_blosc2 else GateDatasetNumpy
        if self.is_ddp:
            options = DISTRIBUTED | {"find_unused_parameters": not self.is_detector}
            self.network = DistributedDataParallel(self.module, device_ids=[self.local_rank], **options)

    def on_train_start(self) -> None:
        if not self.was_initialized:
            self.initialize()
        if self.is_detector and not self._is_loaded:
            self.module.load_pretrained()
        super().on_train_start()

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """nnU-Net's.

        Raises:
            JobError: a checkpoint of another optimiser, as this network had before it was trained by AdamW.
        """
        checkpoint = filename_or_checkpoint
        if isinstance(checkpoint, str):
            # Without the weights, which nnU-Net reads.
            checkpoint = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=False)
        if self.has_adamw and "betas" not in checkpoint["optimizer_state"]["param_groups"][0]:
            raise JobError(
                f"{self.configuration_name} of {self.plans_manager.plans_name} got a checkpoint of nnU-Net's SGD, as "
                "an earlier version trained this network; expected one of AdamW. Train it again, also for --val; "
                "prediction takes the weights as they are."
            )
        super().load_checkpoint(filename_or_checkpoint)

    def _do_i_compile(self) -> bool:
        return False  # what runs depends on the data

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        if not self.is_detector:
            super().set_deep_supervision_enabled(enabled)

    def configure_optimizers(self):
        if not self.has_adamw:
            return super().configure_optimizers()
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        rotation, is_2d, initial_patch, mirrored = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if self.is_detector:
            self.inference_allowed_mirroring_axes = None  # boxes are not averaged, and one pass has calibrated margins
            rotation = (-self.detector_rotation, self.detector_rotation)
            mirrored = ()  # what is never seen mirrored need not be learnt so; sides of the body stay apart
        return rotation, is_2d, initial_patch, mirrored

    @staticmethod
    def get_training_transforms(*args, **kwargs):
        """nnU-Net's, without those that erode the previous stage's segmentation or remove its components."""
        transforms = DynTrainer.get_training_transforms(*args, **kwargs)
        left_out = (ApplyRandomBinaryOperatorTransform, RemoveRandomConnectedComponentFromOneHotEncodingTransform)
        transforms.transforms = [
            one
            for one in transforms.transforms
            if not (isinstance(one, RandomTransform) and isinstance(one.transform, left_out))
        ]
        return transforms

    # --- detector ---

    def _detector_loss(self, output: dict | torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if isinstance(output, dict):
            return self.module.loss(output, target)
        return output.new_zeros(())  # of rendered boxes; validation_step has the detector's own

    def train_step(self, batch: dict) -> dict:
        if self.is_detector:
            self.module.give_masks(batch["target"].to(self.device, non_blocking=True))
            return super().train_step(batch)
        with without_benchmark():  # on the way back, too
            return super().train_step(batch)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        if self.is_detector:
            self._set_boxes(0.5, [0] * len(self.module.patch_size))

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        super().on_validation_epoch_end(val_outputs)
        if self.is_detector:
            self.take_safe_settings()

    def validation_step(self, batch: dict) -> dict:
        """For a detector the pseudo Dice is that of its boxes."""
        if not self.is_detector:
            return super().validation_step(batch)
        data, target = (batch[key].to(self.device, non_blocking=True) for key in ("data", "target"))
        with self._autocast():
            loss = self.module.loss(self.module.raw(data), target)
        return super().validation_step(batch) | {"loss": loss.detach().cpu().numpy()}

    def _autocast(self):
        return torch.autocast(self.device.type) if self.device.type == "cuda" else dummy_context()

    def on_train_end(self) -> None:
        if self.is_detector:
            super().on_train_end()
        else:
            DynTrainer.on_train_end(self)

    def _set_boxes(self, score_threshold: float, margin: Sequence[int], channels: int | slice = slice(None)) -> None:
        self.module.score_threshold[channels] = score_threshold
        self.module.margin[channels] = torch.tensor(margin, device=self.device)

    def take_safe_settings(self) -> str:
        """A checkpoint that is not calibrated takes too much rather than too little."""
        self._set_boxes(SCORES[-1], [_SAFE_MARGIN] * len(self.module.patch_size))
        return f"the boxes are taken from a score of {SCORES[-1]} on with a margin of {_SAFE_MARGIN} voxels"

    def _expect_calibration(self) -> None:
        """Raises JobError where score and margin of every class are the safe ones, and calibration did not ask so."""
        classes = slice(self.module.classes.start, None)
        scores, margins = (each[classes].tolist() for each in (self.module.score_threshold, self.module.margin))
        is_safe = np.allclose(scores, SCORES[-1]) and np.all(np.equal(margins, _SAFE_MARGIN))
        path = Path(self.output_folder, "calibration.json")
        if is_safe and path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            own = {"score_threshold": np.round(scores, 6), "margin": margins}
            is_safe = not all(np.array_equal(list(found[key].values()), values) for key, values in own.items())
        if is_safe:
            raise JobError(
                "Validation got a detector that is not calibrated, as checkpoint_best is, or one whose calibration "
                f"failed (see the log); its boxes, taken from a score of {SCORES[-1]} on with a margin of "
                f"{_SAFE_MARGIN} voxels, may be most of a volume, and would replace those that the next stage has. "
                "Expected the calibrated checkpoint_final. Run this command again with --val and without --val_best; "
                "where calibration failed, with --c, which repeats it."
            )

    @torch.no_grad()
    def calibrate(self) -> BoxCalibration:
        """Set the detector's scores and margins on the validation cases, as ``nnUNetv2_predict`` would tile them.

        Raises:
            RuntimeError: it failed in another process.
        """
        self.module.eval()
        _, keys = self.do_split()
        evidence, fine = BoxEvidence(), self._next_stage(keys)
        for key in keys:
            self.on_first(partial(self._observe, evidence, key, fine))
        names = [str(entry) for entry in self._classes]
        enough = 2 * len(keys) + 1 if self.fold == "all" else self.enough_cases  # its cases were trained on
        asked = (self.min_coverage, self.min_component, enough)
        found = self.on_first(partial(evidence.calibrate, names, *asked))
        for channel, name in zip(self.module.classes, names, strict=True):
            self._set_boxes(found.score_threshold[name], found.margin[name], channel)
        return found

    @property
    def _classes(self) -> Sequence[int | tuple[int, ...]]:
        manager = self.label_manager
        return manager.foreground_regions if manager.has_regions else manager.foreground_labels

    def _observe(self, evidence: BoxEvidence, key: str, fine: nnUNetBaseDataset | None) -> None:
        """Add a case, whose targets are those of ``fine``, or its own."""
        data, segmentation, _, properties = self.dataset_class(self.preprocessed_dataset_folder, [key]).load_case(key)
        shape = data.shape[1:]
        labels = np.asarray((segmentation if fine is None else fine.load_case(key)[1])[0])
        network, patch = self.module, self.configuration_manager.patch_size
        with self._autocast():
            found = boxes_of_case(network, torch.from_numpy(np.asarray(data[:])).to(self.device), patch, SCORES)
        nearest = nearest_axes(self.plans_manager, self.configuration_manager, properties.get("spacing"))
        add_case(evidence, key, labels, self._classes, shape, found, nearest)

    def _next_stage(self, keys: Sequence[str]) -> nnUNetBaseDataset | None:
        """The cases on the grid that will be segmented, or ``None`` where they are not all there."""
        name = (self.configuration_manager.next_stage_names or [None])[0]
        if name is None:
            return None
        identifier = self.plans_manager.get_configuration(name).data_identifier
        folder = os.path.join(self.preprocessed_dataset_folder_base, identifier)
        if not os.path.isdir(folder):
            return None
        dataset = infer_dataset_class(folder)(folder)
        if set(keys) <= set(dataset.identifiers):
            return dataset
        self.print_to_log_file(f"{name} has not all cases preprocessed: calibrating on the detector's own grid.")
        return None

    # --- segmentor ---

    def get_tr_and_val_datasets(self):
        training, validation = super().get_tr_and_val_datasets()
        if not self.is_detector:
            keys = sorted({*training.identifiers, *validation.identifiers})
            training.boxes = validation.boxes = self._label_boxes(keys)
            training.is_switched = self._is_switched
            self._training = training
        return training, validation

    def _label_boxes(self, keys: Sequence[str]) -> dict[str, dict[int, list[Box]]]:
        """The boxes of the labels of every case, kept beside the results; the data folder has nothing but data."""
        path = Path(self.output_folder_base, "label_boxes.json")
        stored = json.loads(path.read_text()) if path.is_file() else {}
        folder = self.preprocessed_dataset_folder
        stamps = {key: os.path.getmtime(os.path.join(folder, f"{key}.pkl")) for key in keys}
        missing = [key for key in keys if stored.get(key, {}).get("stamp") != stamps[key]]
        if missing:
            self.print_to_log_file(f"Finding the boxes of the labels of {len(missing)} cases")
            dataset = infer_dataset_class(folder)(folder, list(missing))
            for key in missing:
                labels = np.asarray(dataset.load_case(key)[1][0])
                stored[key] = {"stamp": stamps[key], "boxes": label_boxes(labels, self.label_manager.foreground_labels)}
            written = path.with_suffix(f".{os.getpid()}.tmp")
            written.write_text(json.dumps(stored))
            os.replace(written, path)  # other folds may read and write it at the same time
        return {
            key: {
                int(label): [tuple(map(tuple, box)) for box in found] for label, found in stored[key]["boxes"].items()
            }
            for key in keys
        }

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.is_detector or self.current_epoch < int((1 - self.fine_tuning) * self.num_epochs):
            return
        self._is_switched.value = 1
        cases = self._training.identifiers
        predicted = sum(self._training.predicted_at(case) is not None for case in cases)
        if predicted != self._predicted:
            self._predicted = predicted
            self.print_to_log_file(
                f"Fine-tuning on the boxes of the detector, which stays as it is, in {predicted} of {len(cases)} "
                "training cases."
            )
            if predicted < len(cases):
                self.print_to_log_file(
                    "On the others the boxes of the labels go on. Train "
                    f"{self.configuration_manager.previous_stage_name} on every fold first to have the detector's."
                )

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's, on the detector's boxes.

        Raises:
            JobError: a detector that is not calibrated, whose boxes would be handed to the segmentor. Or it has not
                predicted all validation cases; boxes of the labels would tell the truth.
        """
        if self.is_detector:
            self._expect_calibration()
            if self.fold == "all" and self.configuration_manager.next_stage_names and self._has_other_boxes():
                return self._validate_alone(save_probabilities)
        else:
            dataset = self.dataset_class(
                self.preprocessed_dataset_folder, self.do_split()[1], self.folder_with_segs_from_previous_stage
            )
            missing = [key for key in dataset.identifiers if dataset.predicted_at(key) is None]
            if missing:
                raise JobError(
                    f"Validation got no boxes of the detector for {len(missing)} of {len(dataset.identifiers)} cases, "
                    f"such as {missing[0]}; expected them in {self.folder_with_segs_from_previous_stage}. Train "
                    f"{self.configuration_manager.previous_stage_name} on fold {self.fold} with -tr "
                    f"{type(self).__name__}, then run this command again with --val."
                )
        super().perform_actual_validation(save_probabilities)

    def _has_other_boxes(self) -> bool:
        """Whether other folds have predicted every case; what fold ``all`` has written itself does not count."""
        keys, base = self.dataset_class(self.preprocessed_dataset_folder).identifiers, Path(self.output_folder_base)
        return all(any(base.glob(f"fold_[0-9]*/validation/{glob.escape(key)}.*")) for key in keys)

    def _validate_alone(self, save_probabilities: bool) -> None:
        """Validation of fold ``all``, whose boxes are of cases that it has seen: those of other folds stay."""
        self.print_to_log_file("The segmentor keeps the boxes of the other folds, which have not seen the cases.")
        configuration = self.configuration_manager.configuration
        following, configuration["next_stage"] = configuration["next_stage"], None
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            configuration["next_stage"] = following


@torch.no_grad()
def boxes_of_case(
    network: DetectorNetwork, data: torch.Tensor, patch: Sequence[int], scores: Sequence[float]
) -> dict[float, dict[int, list[Box]]]:
    """The boxes of a case, ``data: (C, *spatial)``, in any tile of it, as ``nnUNetv2_predict`` would tile it.

    Args:
        scores: thresholds that detections are asked to reach, in the place of the network's own.

    Returns:
        By score, then by class, without the margin.
    """
    padded, revert = pad_nd_image(data.float(), tuple(patch), "constant", {"value": 0}, True)
    before = [part.start for part in revert[1:]]
    boxes: dict[float, dict[int, list[Box]]] = {score: {label: [] for label in network.classes} for score in scores}
    image, own_score = tuple((0, size) for size in data.shape[1:]), network.score_threshold.clone()
    try:
        for corner in product(*compute_steps_for_sliding_window(padded.shape[1:], patch, 0.5)):
            window = tuple(slice(start, start + size) for start, size in zip(corner, patch, strict=True))
            # On the CPU, and in single precision, once for all scores.
            outputs = {
                name: output.float().cpu() for name, output in network.raw(padded[(slice(None), *window)][None]).items()
            }
            moved = [at - pad for at, pad in zip(corner, before, strict=True)]
            for score in scores:
                network.score_threshold.fill_(score)
                for label, found in network.read(outputs, patch)[0].items():
                    inside = (intersection(shifted(one.box, moved), image) for one in found)
                    boxes[score][label] += [box for box in inside if box is not None]
    finally:
        network.score_threshold.copy_(own_score)
    return boxes


def add_case(
    evidence: BoxEvidence,
    case: str,
    labels: np.ndarray,
    classes: Sequence[int | Sequence[int]],
    shape: Sequence[int],
    found: Mapping[float, Mapping[int, Sequence[Box]]],
    nearest: Collection[int] = (),
) -> None:
    """Add a case to ``evidence`` by its ``labels`` on the grid that is segmented, and what :func:`boxes_of_case` found.

    Args:
        classes: a label each, or for a region the labels in it.
        shape: of the case on the detector's grid.
        nearest: as :func:`nearest_axes` says.
    """
    targets, tight = [], []
    for entry in classes:
        components, corner = connected_targets(np.isin(labels, entry))
        targets.append((str(entry), components, corner))
        tight += component_boxes(components, corner)
    boxes = {
        score: {str(entry): of_class for entry, of_class in zip(classes, of_score.values(), strict=True)}
        for score, of_score in found.items()
    }
    evidence.add_case(case, shape, labels.shape, targets, boxes, tight, nearest)


def nearest_axes(
    plans_manager: PlansManager, detector: ConfigurationManager, spacing: Sequence[float] | None
) -> tuple[int, ...]:
    """Axes along which nnU-Net resamples the boxes of the configuration ``detector`` to the nearest voxel.

    It does so along thick slices: in training straight to the grid of the next stage, in prediction to the image's own.
    An axis counts if it is one of either.

    Args:
        spacing: of the image, in mm, in the order of nnU-Net's readers; ``None`` if it is not known.
    """
    options = detector.configuration.get("resampling_fn_probabilities_kwargs", {})
    if options.get("order_z", 0):
        return ()
    to = [detector.spacing, *(plans_manager.get_configuration(n).spacing for n in detector.next_stage_names or [])]
    if spacing is not None:
        to.append([spacing[axis] for axis in plans_manager.transpose_forward])
    force = options.get("force_separate_z", False)
    found = (determine_do_sep_z_and_axis(force, detector.spacing, other) for other in to)
    return tuple(sorted({int(axis) for is_apart, axis in found if is_apart}))


def make_trainer(name: str) -> tuple[type, dict]:
    """The base class and the members of the trainer called ``name``, a name of this family in the catalogue."""
    build = partial(build_roi_cascade, detector=DETECTORS[name])
    return ROICascadeTrainer, {"build_network_architecture": staticmethod(build)}
