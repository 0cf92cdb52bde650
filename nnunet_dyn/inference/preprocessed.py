"""Cases as nnU-Net's preprocessing left them: patches to calibrate on, and whole cases to measure Dice on."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import TypeVar

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn, region_or_label_to_mask
from nnunetv2.inference.export_prediction import resample_and_save
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager, convert_labelmap_to_one_hot

from nnunet_dyn.errors import JobError, UsageError
from nnunet_dyn.inference.conversion import writing
from nnunet_dyn.inference.model_folder import Model, first_stage_folder

T = TypeVar("T")
# Patches that are sure to show foreground; the others show what is around it.
_FOREGROUND = 0.5


@dataclass(frozen=True)
class Cases:
    """The preprocessed cases of a model's configuration.

    Attributes:
        model_folder: where the model was trained to.
        folder: of the configuration's data, inside that of the data set.
        previous_stage: folder of the segmentations of a cascade's first stage.
    """

    model: Model
    model_folder: Path
    folder: Path
    previous_stage: Path | None

    @classmethod
    def of(cls, model: Model, model_folder: Path, hands_on: bool = True) -> Cases:
        """Those in ``nnUNet_preprocessed``.

        Args:
            hands_on: whether the training of a cascade's first stage must have left its segmentations. Without them
                :meth:`hand_on` makes some.

        Raises:
            UsageError: they are not there.
        """
        root, name = os.environ.get("nnUNet_preprocessed", ""), model.plans.dataset_name
        folder = Path(root) / name / model.configuration.data_identifier
        if not root or not next(folder.glob("*.pkl"), None):
            raise UsageError(
                f"No preprocessed cases {folder if root else ''}".rstrip()
                + f"; expected those of {name}, {model.configuration.data_identifier}, to calibrate and to check the "
                "exported model on. Set nnUNet_preprocessed to where they are, or run nnUNetv2_preprocess. fp32 and "
                "bf16 can be exported unchecked, with --force."
            )
        before, previous = model.configuration.previous_stage_name, None
        if before is not None and hands_on:
            parts = model_folder.resolve().name.split("__")
            previous = first_stage_folder(model_folder, before)
            previous = previous / "predicted_next_stage" / (parts[2] if len(parts) == 3 else "")
            if not previous.is_dir():
                raise UsageError(
                    f"No segmentations {previous} of the previous stage, {before}; expected those that its training "
                    "wrote. Export the second stage beside the first one's model folder."
                )
        return cls(model, model_folder, folder, previous)

    def split(self, fold: int | str) -> tuple[list[str], list[str]]:
        """Training and validation cases of ``fold``, as nnU-Net splits them; of fold ``all`` both are all cases.

        Raises:
            UsageError: no splits, from which nnU-Net would make new ones, or others than those of the training.
            JobError: a summary of the validation that cannot be read.
        """
        splits = self.folder.parent / "splits_final.json"
        if fold != "all" and not splits.is_file():
            raise UsageError(
                f"No {splits}; expected the splits of the training, without which a case of the training may be taken "
                "for one of the validation. Copy that file from where the model was trained, or write fp32 or bf16 "
                "unchecked with --force."
            )
        trainer = SimpleNamespace(
            fold=fold,
            dataset_class=infer_dataset_class(str(self.folder)),
            preprocessed_dataset_folder=str(self.folder),
            preprocessed_dataset_folder_base=str(self.folder.parent),
            folder_with_segs_from_previous_stage=None,
            print_to_log_file=lambda *_: None,
        )
        training, validation = map(list, nnUNetTrainer.do_split(trainer))
        summary = self.model_folder / f"fold_{fold}" / "validation" / "summary.json"
        if summary.is_file():
            ending = self.model.dataset["file_ending"]
            try:
                cases = json.loads(summary.read_text())["metric_per_case"]
                # Wherever it was trained: this class takes both kinds of separators.
                done = {PureWindowsPath(case["prediction_file"]).name.removesuffix(ending) for case in cases}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise JobError(f"Cannot read {summary}: {type(error).__name__}: {error}. Remove it.") from error
            if done != set(validation):
                raise UsageError(
                    f"{splits} has other validation cases of fold {fold} than {summary}, such as "
                    f"{min(done ^ set(validation))}; expected the splits of the training. Put that file back."
                )
        return training, validation

    def _dataset(self, names: Sequence[str]):
        previous = None if self.previous_stage is None else str(self.previous_stage)
        return infer_dataset_class(str(self.folder))(str(self.folder), list(names), previous)

    def _labels(self) -> LabelManager:
        return self.model.plans.get_label_manager(self.model.dataset)

    def patches(self, names: Sequence[str], count: int) -> Iterator[np.ndarray]:
        """``count`` patches of the cases ``names``, (1, C, *patch) float32; the same ones in every call."""
        size, labels = self.model.configuration.patch_size, self._labels()
        loader = nnUNetDataLoader(
            self._dataset(names), 1, size, size, labels, _FOREGROUND, probabilistic_oversampling=True
        )
        own = np.random.RandomState(0).get_state()
        for _ in range(count):
            state = np.random.get_state()
            np.random.set_state(own)
            try:
                batch = loader.generate_train_batch()
            finally:
                own = np.random.get_state()
                np.random.set_state(state)
            if self.previous_stage is None:
                yield batch["data"].numpy()
            else:
                yield np.concatenate((batch["data"][0], _one_hot(batch["target"][0, 1].numpy(), labels)))[None]

    def load(self, name: str) -> tuple[torch.Tensor, np.ndarray]:
        """The network's input, (C, *shape) float32, and the labels, (*shape).

        Raises:
            JobError: they cannot be read.
        """
        try:
            image, labels, previous, _ = self._dataset([name]).load_case(name)
            image, labels = np.asarray(image[:], dtype=np.float32), np.asarray(labels[0])
        except Exception as error:  # each file format has many
            raise JobError(
                f"Cannot read the preprocessed case {name} in {self.folder}: {type(error).__name__}: {error}. Run "
                "nnUNetv2_preprocess again."
            ) from error
        if previous is not None:
            image = np.concatenate((image, _one_hot(np.asarray(previous[:]), self._labels())))
        return torch.from_numpy(image), labels

    def hand_on(self, predictor: nnUNetPredictor, names: Sequence[str], to: Cases, folder: Path) -> Cases:
        """``to``, the cases of the next stage, with what ``predictor`` segments in the cases ``names`` of this one, as
        nnU-Net's training does it.

        Args:
            folder: an empty one, for the segmentations.

        Raises:
            JobError: a case cannot be read, or its segmentation not written.
        """
        dataset_class = infer_dataset_class(str(to.folder))
        for name in names:
            logits = predictor.predict_logits_from_preprocessed_data(self.load(name)[0])
            shape = dataset_class(str(to.folder), [name]).load_case(name)[0].shape[1:]
            properties = self._dataset([name]).load_case(name)[3]
            with writing(folder / name):
                resample_and_save(
                    logits,
                    shape,
                    str(folder / name),
                    self.model.plans,
                    self.model.configuration,
                    properties,
                    self.model.dataset,
                    torch.get_num_threads(),
                    dataset_class,
                )
        return replace(to, previous_stage=folder)

    def segment(self, logits: torch.Tensor) -> np.ndarray:
        """(classes, *shape) → labels, (*shape)."""
        return self._labels().convert_logits_to_segmentation(logits.float()).numpy()

    def count(self, segmentation: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """True positive, false positive and false negative voxels of each foreground class or region: (classes, 3)."""
        manager = self._labels()
        ignored = labels == manager.ignore_label if manager.has_ignore_label else None
        foreground = manager.foreground_regions if manager.has_regions else manager.foreground_labels
        masks = ([region_or_label_to_mask(array, label) for array in (labels, segmentation)] for label in foreground)
        return np.array([compute_tp_fp_fn_tn(*pair, ignored)[:3] for pair in masks])


@dataclass(frozen=True)
class Patches:
    """Patches of the cases ``names``, read anew whenever they are gone through, so that memory holds one at a time."""

    cases: Cases
    names: tuple[str, ...]
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.cases.patches(self.names, self.count)


def dice(counts: np.ndarray) -> np.ndarray:
    """Of (…, 3) counts as :meth:`Cases.count` has them; as in nnU-Net, NaN where nothing is and nothing was found."""
    found, wrong, missed = np.moveaxis(counts, -1, 0)
    size = 2 * found + wrong + missed
    return np.where(size, 2 * found / np.maximum(size, 1), np.nan)


def mean(scores: np.ndarray) -> np.ndarray:
    """Over the first axis, without NaN; NaN where there is nothing else."""
    there = ~np.isnan(scores)
    return np.where(there.any(0), np.nansum(scores, 0) / np.maximum(there.sum(0), 1), np.nan)


def _one_hot(segmentation: np.ndarray, labels: LabelManager) -> np.ndarray:
    return convert_labelmap_to_one_hot(segmentation, labels.foreground_labels, np.float32)


def spread(names: Sequence[str], count: int) -> list[str]:
    """``count`` of ``names``, or all, evenly spaced.

    Raises:
        JobError: there are none.
    """
    if not names:
        raise JobError("The fold has no cases to calibrate or check on; expected some. Look into splits_final.json.")
    return evenly(sorted(names), count)


def evenly(samples: Collection[T], count: int) -> list[T]:
    """``count`` of ``samples``, or all, evenly spaced."""
    count = min(count, len(samples))
    chosen = {number * len(samples) // count for number in range(count)}
    return [sample for number, sample in enumerate(samples) if number in chosen]
