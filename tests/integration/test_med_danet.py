"""Med-DANet V2 through nnU-Net's own commands: training, resuming, validation alone, and a prediction."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from workspace import Workspace

from nnunet_dyn.inference import Predictor
from nnunet_dyn.planning import derived_architecture
from nnunet_dyn.plans_templates import load_template

DATASET, TRAINER = "Dataset997_Slices", "nnUNetTrainerMedDANetV2_2epochs_2iters"
#: One axis is not longer than the crop, so that crops have three quarters of it.
PATCH, CROP = (32, 16), 16


def write_case(raw, name, seed):
    """Six slices of 40×20, of which the last three have a bright block with another in it."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((6, 40, 20), np.uint8)
    row = rng.integers(4, 24)
    labels[3:, row : row + 9, 4:14], labels[4:, row + 2 : row + 6, 6:11] = 1, 2
    image = (np.array([0, 900, 1800])[labels] + rng.normal(0, 60, labels.shape)).astype(np.float32)
    for folder, array, ending in (("imagesTr", image, "_0000"), ("labelsTr", labels, "")):
        (raw / folder).mkdir(parents=True, exist_ok=True)
        made = sitk.GetImageFromArray(array)
        made.SetSpacing((1.0, 1.0, 4.0))
        sitk.WriteImage(made, str(raw / folder / f"{name}{ending}.nii.gz"))


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Workspace:
    space = Workspace(tmp_path_factory.mktemp("slices"), DATASET)
    raw = space.raw = space.folder / "raw" / DATASET
    names = [f"case_{number}" for number in range(4)]
    for seed, name in enumerate(names):
        write_case(raw, name, seed)
    description = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "a": 1, "b": 2},
        "numTraining": 4,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(description))
    space.run("nnUNetv2_plan_and_preprocess", "-d", 997, "-c", "2d", "-np", 1, "-npfp", 1)
    preprocessed = space.folder / "preprocessed" / DATASET
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    configuration = plans["configurations"]["2d"]
    architecture = derived_architecture(load_template("meddanetv2"), configuration["architecture"])
    options = {"policy_space": ["skip", CROP, "whole"]}
    architecture["arch_kwargs"] |= {"med_danet": options, "base_features": 4, "blocks": [1, 1, 1]}
    configuration |= {"patch_size": PATCH, "batch_size": 4, "architecture": architecture}
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
    (preprocessed / "splits_final.json").write_text(json.dumps([{"train": names[:2], "val": names[2:]}]))
    return space


def test_from_training_to_a_prediction(space, tmp_path):
    arguments = (997, "2d", 0, "-tr", TRAINER, "-device", "cpu")
    space.run("nnUNetv2_train", *arguments)
    model = space.model("2d", TRAINER)
    fold, final = model / "fold_0", model / "fold_0" / "checkpoint_final.pth"
    assert (fold / "costs.png").exists() and (fold / "progress.png").exists()

    # Cut off after its first epoch, before it was calibrated.
    checkpoint = torch.load(final, weights_only=False)
    checkpoint["current_epoch"] = 1
    checkpoint["logging"] = {
        key: values[:1] if isinstance(values, list) else values for key, values in checkpoint["logging"].items()
    }
    torch.save(checkpoint, fold / "checkpoint_latest.pth")
    for file in (final, fold / "calibration.json"):
        file.unlink()
    resumed = space.run("nnUNetv2_train", *arguments, "--c").stdout
    assert "Epoch 1" in resumed and "Epoch 0" not in resumed and "Phase 'everything'" in resumed
    found = json.loads((fold / "calibration.json").read_text())
    assert found["cases"] == 2 and found["slack"] == pytest.approx(np.log(10)) and set(found["left_out"]) == {"1", "2"}
    checkpoint = torch.load(final, weights_only=False)
    weights = checkpoint["network_weights"]
    for name in ("skip_threshold", "crop_threshold"):
        assert weights[name].item() == (np.inf if found[name] is None else found[name])
    assert len(checkpoint["logging"]["gmacs"]) == 2

    (fold / "validation" / "summary.json").unlink()
    space.run("nnUNetv2_train", *arguments, "--val", "--npz")
    assert set(json.loads((fold / "validation" / "summary.json").read_text())["mean"]) == {"1", "2"}
    assert {file.name for file in (fold / "validation").glob("*.npz")} == {"case_2.npz", "case_3.npz"}

    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    (images / "case_3_0000.nii.gz").write_bytes((space.raw / "imagesTr" / "case_3_0000.nii.gz").read_bytes())
    space.run("nnUNetv2_predict", "-d", 997, "-c", "2d", "-f", 0, "-tr", TRAINER, "-i", images, "-o", out, "-device",
              "cpu", "-npp", 1, "-nps", 1)  # fmt: skip
    predicted, validated = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "case_3.nii.gz"))) for folder in (out, fold / "validation")
    )
    assert predicted.shape == (6, 40, 20) and (predicted == validated).mean() > 0.999

    network = Predictor.from_folder(model, (0,), device="cpu", threads=1).engine.network
    network.skip_threshold.fill_(np.inf)
    network.crop_threshold.fill_(-1)
    ((rows, columns),) = (decision.box for decision in network.decide(torch.randn(1, 1, *PATCH)))
    assert (rows[1] - rows[0], columns[1] - columns[0]) == (CROP, 12)
