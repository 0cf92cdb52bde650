"""The ROI cascade through nnU-Net's own commands on a few real volumes, on both folds of both stages.

The data, part of the Medical Segmentation Decathlon's Task04, are looked for in the folder that NNUNET_DYN_TEST_DATA
names.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage
from workspace import Workspace

DATASET, TRAINER, PLANS = "Dataset501_MSDHippoDev", "nnUNetTrainerROICascade_2epochs_1iters", "nnUNetDynPlans"
DATA = Path(os.environ.get("NNUNET_DYN_TEST_DATA", ""), DATASET)

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"NNUNET_DYN_TEST_DATA names no folder with {DATASET}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Workspace, list[str]]:
    """Planned and preprocessed, and trained for two iterations on two cases each, which validate the other fold."""
    space = Workspace(tmp_path_factory.mktemp("real"), DATASET)
    raw, names = space.folder / "raw" / DATASET, sorted(path.name[:-7] for path in (DATA / "labelsTr").iterdir())[:4]
    for kind, ending in (("imagesTr", "_0000"), ("labelsTr", "")):
        (raw / kind).mkdir(parents=True)
        for name in names:
            shutil.copy(DATA / kind / f"{name}{ending}.nii.gz", raw / kind)
    description = json.loads((DATA / "dataset.json").read_text()) | {"numTraining": len(names)}
    (raw / "dataset.json").write_text(json.dumps(description))
    space.run("nnUNetv2_plan_and_preprocess", "-d", 501, "-c", "3d_fullres", "-np", 1, "-npfp", 1)
    space.run("nnunet_dyn", "plan", "-d", 501, "-t", "roi_cascade")
    base = space.folder / "preprocessed" / DATASET
    plans = json.loads((base / f"{PLANS}.json").read_text())
    narrow = plans["configurations"]["3d_roi"]["architecture"]["arch_kwargs"]
    narrow["features_per_stage"] = [width // 4 for width in narrow["features_per_stage"]]
    for name in ("3d_detect", "3d_roi"):
        plans["configurations"][name]["batch_size"] = 2
    (base / f"{PLANS}.json").write_text(json.dumps(plans))
    space.run("nnUNetv2_preprocess", "-d", 501, "-plans_name", PLANS, "-c", "3d_detect", "-np", 1)
    splits = [{"train": names[:2], "val": names[2:]}, {"train": names[2:], "val": names[:2]}]
    (base / "splits_final.json").write_text(json.dumps(splits))
    for configuration in ("3d_detect", "3d_roi"):
        for fold in (0, 1):
            space.run("nnUNetv2_train", 501, configuration, fold, "-tr", TRAINER, "-p", PLANS, "-device", "cpu")
    return space, names


def test_every_case_is_segmented_in_the_boxes_of_a_detector_that_has_not_seen_it(trained):
    space, names = trained
    detector, segmentor = (space.model(configuration, TRAINER, PLANS) for configuration in ("3d_detect", "3d_roi"))
    assert {path.stem for path in (detector / "predicted_next_stage" / "3d_roi").iterdir()} == set(names)
    for fold, validated in enumerate((names[2:], names[:2])):
        assert json.loads((detector / f"fold_{fold}" / "calibration.json").read_text())["cases"] == 2
        (log,) = (segmentor / f"fold_{fold}").glob("training_log_*.txt")
        assert "boxes of the detector, which stays as it is, in 2 of 2 training cases." in log.read_text()
        for name in validated:
            truth, boxes, found = (
                sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{name}.nii.gz")))
                for folder in (DATA / "labelsTr", *(m / f"fold_{fold}" / "validation" for m in (detector, segmentor)))
            )
            assert truth.shape == boxes.shape == found.shape
            assert boxes.any() and (boxes > 0)[truth > 0].mean() > 0.9  # with the slack for few cases
            assert not (found > 0)[~ndimage.binary_dilation(boxes > 0, iterations=2)].any()
        scores = json.loads((segmentor / f"fold_{fold}" / "validation" / "summary.json").read_text())
        assert len(scores["metric_per_case"]) == 2 and np.isfinite(scores["foreground_mean"]["Dice"])
