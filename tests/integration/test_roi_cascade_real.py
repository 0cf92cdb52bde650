"""The ROI cascade through nnU-Net's own commands on a few real volumes, on both folds of both stages.

The data, part of the Medical Segmentation Decathlon's Task04, are looked for in the folder that NNUNET_DYN_TEST_DATA
names, or else in shared/data beside the project.
"""

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage
from workspace import Workspace

DATASET, TRAINER, PLANS = "Dataset501_MSDHippoDev", "nnUNetTrainerROICascade_2epochs_1iters", "nnUNetDynPlans"
COMMON = ("-tr", TRAINER, "-p", PLANS)
BESIDE = Path(__file__).parents[3] / "shared" / "data"
DATA = Path(os.environ.get("NNUNET_DYN_TEST_DATA") or BESIDE, DATASET)

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"NNUNET_DYN_TEST_DATA names no folder with {DATASET}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Workspace, list[str]]:
    """Planned, preprocessed, trained for two iterations on two cases each, which validate the other fold.

    A fifth case is held out.
    """
    space = Workspace(tmp_path_factory.mktemp("real"), DATASET)
    raw, found = space.folder / "raw" / DATASET, sorted(path.name[:-7] for path in (DATA / "labelsTr").iterdir())
    *names, held_out = found[:5]
    for kind, ending in (("imagesTr", "_0000"), ("labelsTr", "")):
        (raw / kind).mkdir(parents=True)
        for name in names:
            shutil.copy(DATA / kind / f"{name}{ending}.nii.gz", raw / kind)
    (raw / "imagesTs").mkdir()
    shutil.copy(DATA / "imagesTr" / f"{held_out}_0000.nii.gz", raw / "imagesTs")
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
            space.run("nnUNetv2_train", 501, configuration, fold, *COMMON, "-device", "cpu", "--npz")
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


def test_both_commands_predict_with_all_folds_and_nnunet_ensembles_them(trained, tmp_path):
    space, _ = trained
    images = ("-i", space.folder / "raw" / DATASET / "imagesTs")
    common, workers = ("-d", 501, *COMMON, *images, "-device", "cpu", "--disable_tta"), ("-npp", 1, "-nps", 1)
    both = (*common, "-f", 0, 1)
    space.run("nnUNetv2_predict", *both, *workers, "-c", "3d_detect", "-o", tmp_path / "boxes")
    for name, folds in (("both", (0, 1)), ("first", (0,)), ("second", (1,))):
        space.run("nnUNetv2_predict", *common, *workers, "-f", *folds, "-c", "3d_roi", "-o", tmp_path / name,
                  "-prev_stage_predictions", tmp_path / "boxes", "--save_probabilities")  # fmt: skip
    space.run("nnUNetv2_ensemble", "-i", tmp_path / "first", tmp_path / "second", "-o", tmp_path / "mean", "-np", 1)
    space.run("nnunet_dyn", "predict", *both, "-c", "3d_roi", "-o", tmp_path / "one_call")
    boxes, two_calls, mean, one_call = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(*(tmp_path / folder).glob("*.nii.gz"))))
        for folder in ("boxes", "both", "mean", "one_call")
    )
    for found in (two_calls, mean, one_call):
        assert found.shape == boxes.shape and not (found > 0)[~ndimage.binary_dilation(boxes > 0, iterations=2)].any()
    first, second = (
        np.load(str(*(tmp_path / folder).glob("*.npz")))["probabilities"] for folder in ("first", "second")
    )
    assert (mean == (first + second).argmax(0)).mean() > 0.999


def test_nnunet_chooses_and_packs_the_segmentor(trained, tmp_path):
    space, _ = trained
    space.run("nnUNetv2_find_best_configuration", 501, "-c", "3d_roi", *COMMON, "-f", 0, 1, "-np", 1)
    best = json.loads((space.folder / "results" / DATASET / "inference_information.json").read_text())
    (chosen,) = best["best_model_or_ensemble"]["selected_model_or_models"]
    assert (chosen["configuration"], chosen["trainer"]) == ("3d_roi", TRAINER)
    archive = tmp_path / "model.zip"
    space.run("nnUNetv2_export_model_to_zip", "-d", 501, "-o", archive, "-c", "3d_detect", "3d_roi", *COMMON,
              "-f", 0, 1)  # fmt: skip
    with zipfile.ZipFile(archive) as packed:
        held = {Path(name).parts[-3:] for name in packed.namelist()}
    for configuration in ("3d_detect", "3d_roi"):
        model = space.model(configuration, TRAINER, PLANS).name
        assert {(model, f"fold_{fold}", "checkpoint_final.pth") for fold in (0, 1)} <= held
