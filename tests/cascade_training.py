"""Trainers of the ROI cascade for the tests, on a small data set as nnU-Net leaves it after preprocessing."""

import json
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from plans import plans_manager
from training import LABELS, trainer_class

from nnunet_dyn.planning import derived_architecture
from nnunet_dyn.plans_templates import load_template

NAME = "nnUNetTrainerROICascade_5epochs_2iters"
CASES = ("case_0", "case_1", "case_2")
SHAPE = (20, 24, 20)
# In the volume of the segmentor; the detector's has half as many voxels per axis.
BOXES = {1: (slice(2, 8), slice(4, 12), slice(4, 10)), 2: (slice(14, 18), slice(16, 22), slice(10, 16))}


def cascade_plans() -> dict:
    """What ``nnunet_dyn plan -t roi_cascade`` makes of a configuration with patches of 16 voxels."""
    made = plans_manager(3, [16] * 3, n_stages=3, features=(4, 6, 8)).plans
    base = made["configurations"]["3d_fullres"]
    base["data_identifier"] = "full"
    parts = load_template("roi_cascade").parts
    for name, patch in (("3d_detect", [12, 12, 12]), ("3d_roi", [16, 16, 16])):
        made["configurations"][name] = {
            "inherits_from": "3d_fullres",
            "patch_size": patch,
            "architecture": derived_architecture(parts[name], base["architecture"], patch, 1),
            **parts[name].configuration,
        }
    made["configurations"]["3d_detect"] |= {"data_identifier": "low", "spacing": [2.0] * 3}
    made["configurations"]["3d_detect"]["architecture"]["arch_kwargs"] |= {"base_features": 8, "pyramid": 8}
    return made


def write_cases(root: Path) -> None:
    """Three cases on both grids, one of them for validation; ``root`` is ``nnUNet_preprocessed``."""
    base, rng = root / "Dataset999_Test", np.random.default_rng(0)
    for folder, step in (("full", 1), ("low", 2)):
        (base / folder).mkdir(parents=True)
        for case in CASES:
            segmentation = np.zeros((1, *SHAPE), np.int16)
            for label, part in BOXES.items():
                segmentation[(0, *part)] = label
            segmentation = segmentation[:, ::step, ::step, ::step]
            image = (segmentation + rng.normal(0, 0.1, segmentation.shape)).astype(np.float32)
            locations = {label: np.argwhere(segmentation == label) for label in BOXES}
            locations[(1, 2)] = np.argwhere(segmentation > 0)
            locations[(-1, 0, 1)] = np.subtract(segmentation.shape, 1)[None]  # annotated, where label 2 is ignored
            blocks = comp_blosc2_params(image.shape, (16,) * 3, image.itemsize)
            nnUNetDatasetBlosc2.save_case(
                image, segmentation, {"class_locations": locations}, str(base / folder / case), blocks[1], blocks[0]
            )
    (base / "splits_final.json").write_text(json.dumps([{"train": list(CASES[:2]), "val": list(CASES[2:])}]))


def make_trainer(
    configuration: str, labels: dict = LABELS["classes"], name: str = NAME, fold: int | str = 0, **segmentor: object
):
    """A trainer for one of the two configurations, where nnU-Net's variables point to :func:`write_cases`' folder.

    Args:
        segmentor: other arguments of its network.
    """
    plans = json.loads(json.dumps(cascade_plans()))
    plans["configurations"]["3d_roi"]["architecture"]["arch_kwargs"] |= segmentor
    dataset = {"channel_names": {"0": "CT"}, "numTraining": 3, "file_ending": ".nii.gz", **labels}
    return trainer_class(name)(
        plans | {"continue_training": False},
        configuration,
        fold,
        dataset,
        torch.device("cpu"),
    )
