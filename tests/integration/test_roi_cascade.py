"""The ROI cascade through nnU-Net's own commands, from planning to a prediction in two calls, with two folds."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage
from workspace import Workspace

from nnunet_dyn.architectures.roi import read_boxes

DATASET, TRAINER, PLANS = "Dataset998_Cascade", "nnUNetTrainerROICascade_2epochs_30iters", "nnUNetDynPlans"
SHAPE = (24, 32, 32)


def write_case(raw, kind, name, seed):
    """Bright blocks of two classes, the second darker and apart, in noise."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(SHAPE, np.uint8)
    z, y, x = rng.integers(0, 6, 3)
    labels[z : z + 8, y : y + 9, x : x + 8] = 1
    labels[z + 12 : z + 18, y + 16 : y + 24, x + 16 : x + 24] = 2
    image = (np.array([0, 900, -900])[labels] + rng.normal(0, 60, SHAPE)).astype(np.float32)
    for folder, array, ending in ((f"images{kind}", image, "_0000"), (f"labels{kind}", labels, "")):
        (raw / folder).mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(sitk.GetImageFromArray(array), str(raw / folder / f"{name}{ending}.nii.gz"))


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Workspace:
    """Planned, preprocessed, and the detector trained on both folds, the segmentor on the first."""
    space = Workspace(tmp_path_factory.mktemp("cascade"), DATASET)
    raw = space.raw = space.folder / "raw" / DATASET
    names = [f"case_{number}" for number in range(4)]
    for seed, name in enumerate(names):
        write_case(raw, "Tr", name, seed)
    write_case(raw, "Ts", "case_9", 9)
    description = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "a": 1, "b": 2},
        "numTraining": 4,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(description))
    space.run("nnUNetv2_plan_and_preprocess", "-d", 998, "-c", "3d_fullres", "-np", 1, "-npfp", 1)
    space.run("nnunet_dyn", "plan", "-d", 998, "-t", "roi_cascade")
    plans = space.folder / "preprocessed" / DATASET / f"{PLANS}.json"
    content = json.loads(plans.read_text())
    narrow = content["configurations"]["3d_roi"]["architecture"]["arch_kwargs"]
    narrow["features_per_stage"] = [min(32, width // 4) for width in narrow["features_per_stage"]]
    plans.write_text(json.dumps(content))
    space.run("nnUNetv2_preprocess", "-d", 998, "-plans_name", PLANS, "-c", "3d_detect", "-np", 1)
    splits = [{"train": names[:2], "val": names[2:]}, {"train": names[2:], "val": names[:2]}]
    (space.folder / "preprocessed" / DATASET / "splits_final.json").write_text(json.dumps(splits))
    for configuration, fold in (("3d_detect", 0), ("3d_detect", 1), ("3d_roi", 0)):
        space.run("nnUNetv2_train", 998, configuration, fold, "-tr", TRAINER, "-p", PLANS, "-device", "cpu")
    return space


def test_the_detector_hands_its_boxes_on(space):
    model = space.model("3d_detect", TRAINER, PLANS)
    handed = model / "predicted_next_stage" / "3d_roi"
    assert {path.stem for path in handed.iterdir()} == {f"case_{number}" for number in range(4)}
    for fold in (0, 1):
        calibration = json.loads((model / f"fold_{fold}" / "calibration.json").read_text())
        weights = torch.load(model / f"fold_{fold}" / "checkpoint_final.pth", weights_only=False)["network_weights"]
        assert weights["labels.seg_layers.margin"][1:].tolist() == list(calibration["margin"].values())
        assert (model / f"fold_{fold}" / "validation" / "summary.json").exists()


def test_the_segmentor_is_tuned_and_validated_on_them(space):
    fold = space.model("3d_roi", TRAINER, PLANS) / "fold_0"
    (log,) = fold.glob("training_log_*.txt")
    assert "Fine-tuning on the boxes of the detector" in log.read_text()
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    assert summary["foreground_mean"]["Dice"] > 0.5
    # Both configurations share what 3d_fullres has preprocessed.
    data = {path.name for path in (space.folder / "preprocessed" / DATASET).iterdir() if path.is_dir()}
    assert data == {"gt_segmentations", "nnUNetPlans_3d_fullres", f"{PLANS}_3d_detect"}


def test_predicting_in_two_calls(space, tmp_path):
    common = ("-d", 998, "-p", PLANS, "-tr", TRAINER, "-f", 0, "-device", "cpu", "-npp", 1, "-nps", 1)
    space.run("nnUNetv2_predict", *common, "-c", "3d_detect", "-i", space.raw / "imagesTs", "-o", tmp_path / "boxes")
    space.run("nnUNetv2_predict", *common, "-c", "3d_roi", "-i", space.raw / "imagesTs", "-o", tmp_path / "out",
              "-prev_stage_predictions", tmp_path / "boxes")  # fmt: skip
    truth, boxes, found = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "case_9.nii.gz")))
        for folder in (space.raw / "labelsTs", tmp_path / "boxes", tmp_path / "out")
    )
    assert sum(map(len, read_boxes(boxes).values())) >= 2
    assert (boxes > 0)[truth > 0].mean() > 0.7 and (boxes > 0).mean() < 0.6
    assert not (found > 0)[~ndimage.binary_dilation(boxes > 0, iterations=2)].any()
    assert 2 * (found == truth)[truth > 0].sum() / ((truth > 0).sum() + (found > 0).sum()) > 0.5
