"""nnU-Net's own commands, from planning to a model that another machine can install, with this package's trainers."""

import json

import pytest
import SimpleITK as sitk
import torch
from workspace import Workspace

from nnunet_dyn.demo import generate_dataset

TRAINER = "nnUNetTrainerEffV2S_2epochs_2iters"
DATASET = "Dataset999_SyntheticCT"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    space = Workspace(tmp_path_factory.mktemp("nnunet"), DATASET)
    raw = generate_dataset(space.folder / "raw", n_train=4, n_test=1, size=(24, 32, 32))
    space.raw = raw
    space.run("nnUNetv2_plan_and_preprocess", "-d", 999, "-c", "2d", "3d_fullres", "-np", 1, "-npfp", 1)
    splits = space.folder / "preprocessed" / DATASET / "splits_final.json"
    names = sorted(path.name[: -len(".nii.gz")] for path in (raw / "labelsTr").iterdir())
    splits.write_text(json.dumps([{"train": names[:3], "val": names[3:]}, {"train": names[1:], "val": names[:1]}]))
    return space


@pytest.fixture(scope="module")
def trained(workspace) -> Workspace:
    for configuration, trainer in (("3d_fullres", TRAINER), ("2d", "nnUNetTrainerFullyEffB0_1epochs_2iters")):
        workspace.run("nnUNetv2_train", 999, configuration, 0, "-tr", trainer, "-device", "cpu", "--npz")
    return workspace


def test_training_leaves_an_ordinary_model(trained):
    model = trained.model("3d_fullres", TRAINER)
    assert {path.name for path in model.iterdir()} >= {"plans.json", "dataset.json", "fold_0"}
    fold = model / "fold_0"
    assert (fold / "checkpoint_final.pth").exists() and (fold / "progress.png").exists()
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    assert set(summary["mean"]) == {"1", "2", "3"}
    assert (trained.model("2d", "nnUNetTrainerFullyEffB0_1epochs_2iters") / "fold_0" / "checkpoint_final.pth").exists()


def test_predict_and_evaluate(trained, tmp_path):
    images, labels = trained.raw / "imagesTs", trained.raw / "labelsTs"
    trained.run("nnUNetv2_predict", "-d", 999, "-i", images, "-o", tmp_path, "-c", "3d_fullres", "-f", 0,
                "-tr", TRAINER, "-device", "cpu", "-npp", 1, "-nps", 1, "--disable_tta")  # fmt: skip
    predicted = sorted(path.name for path in tmp_path.glob("*.nii.gz"))
    assert predicted == sorted(path.name for path in labels.iterdir())
    size = [sitk.ReadImage(str(folder / predicted[0])).GetSize() for folder in (tmp_path, labels)]
    assert size[0] == size[1]
    trained.run("nnUNetv2_evaluate_folder", labels, tmp_path, "-djfile", trained.raw / "dataset.json",
                "-pfile", tmp_path / "plans.json", "-np", 1)  # fmt: skip
    assert set(json.loads((tmp_path / "summary.json").read_text())["mean"]) == {"1", "2", "3"}


def test_nnunet_dyn_predict_gives_the_same_segmentation(trained, tmp_path):
    """The two commands with the same flags, on the two kinds of model."""
    for configuration, trainer in (("3d_fullres", TRAINER), ("2d", "nnUNetTrainerFullyEffB0_1epochs_2iters")):
        flags = ("-d", 999, "-i", trained.raw / "imagesTs", "-c", configuration, "-f", 0, "-tr", trainer, "-device",
                 "cpu", "-npp", 1, "-nps", 1)  # fmt: skip
        trained.run("nnUNetv2_predict", *flags, "-o", tmp_path / configuration / "stock")
        done = trained.run("nnunet_dyn", "predict", *flags, "-o", tmp_path / configuration / "ours")
        assert "1 case in" in done.stdout and "pickle" not in done.stderr
        (stock,) = (tmp_path / configuration / "stock").glob("*.nii.gz")
        arrays = [
            sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
            for path in (stock, tmp_path / configuration / "ours" / stock.name)
        ]
        assert (arrays[0] == arrays[1]).mean() >= 0.9999


@pytest.mark.parametrize("name", ["nnUNetTrainerEffB0", "nnUNetTrainerODConv4x"])
def test_resuming_continues_a_run_by_name_alone(workspace, name):
    """A run that was cut off after its checkpoint goes on to its end."""
    trainer = f"{name}_2epochs_1iters"
    arguments = (999, "3d_fullres", 0, "-tr", trainer, "-device", "cpu")
    workspace.run("nnUNetv2_train", *arguments)
    fold = workspace.model("3d_fullres", trainer) / "fold_0"
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["current_epoch"] == 2
    checkpoint["current_epoch"] = 1
    checkpoint["logging"] = {
        key: values[:1] if isinstance(values, list) else values for key, values in checkpoint["logging"].items()
    }
    torch.save(checkpoint, fold / "checkpoint_latest.pth")
    (fold / "checkpoint_final.pth").unlink()
    again = workspace.run("nnUNetv2_train", *arguments, "--c")
    assert "Epoch 1" in again.stdout and "Epoch 0" not in again.stdout
    finished = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert finished["current_epoch"] == 2
    before, after = (saved["network_weights"] for saved in (checkpoint, finished))
    assert not all(torch.equal(before[key], after[key]) for key in before)
    done = [key for key in after if key.endswith("passes_done")]
    assert bool(done) == ("ODConv" in name) and all(after[key] == before[key] + 1 for key in done)


def test_find_best_configuration_and_move_the_model(trained, tmp_path):
    trained.run("nnUNetv2_find_best_configuration", 999, "-c", "3d_fullres", "-tr", TRAINER, "-f", 0, "-np", 1)
    best = json.loads((trained.folder / "results" / DATASET / "inference_information.json").read_text())
    assert best["best_model_or_ensemble"]["selected_model_or_models"][0]["trainer"] == TRAINER
    archive = tmp_path / "model.zip"
    trained.run("nnUNetv2_export_model_to_zip", "-d", 999, "-o", archive, "-c", "3d_fullres", "-tr", TRAINER, "-f", 0)
    elsewhere = tmp_path / "results"
    elsewhere.mkdir()
    here, trained.environment["nnUNet_results"] = trained.environment["nnUNet_results"], str(elsewhere)
    try:
        trained.run("nnUNetv2_install_pretrained_model_from_zip", archive)
    finally:
        trained.environment["nnUNet_results"] = here
    assert (
        elsewhere / DATASET / trained.model("3d_fullres", TRAINER).name / "fold_0" / "checkpoint_final.pth"
    ).exists()


def test_derived_configurations_train_with_nnunets_own_trainer(workspace, tmp_path):
    """From ``nnunet_dyn plan`` to a prediction of the best of two configurations, over two folds."""
    shown = workspace.run("nnunet_dyn", "plan", "-d", 999, "-t", "effb0", "magic2x", "-gpu_memory_target", 1)
    assert "3d_fullres_effb0" in shown.stdout and "not there yet" not in shown.stdout
    data = sorted(path.name for path in (workspace.folder / "preprocessed" / DATASET).iterdir() if path.is_dir())
    trainer, plans = "nnUNetTrainer_1epochs_1iters", "nnUNetDynPlans"
    common = ("-p", plans, "-tr", trainer)
    for configuration in ("3d_fullres_effb0", "2d_magic2x"):
        for fold in (0, 1):
            workspace.run("nnUNetv2_train", 999, configuration, fold, *common, "-device", "cpu", "--npz")
    workspace.run("nnUNetv2_find_best_configuration", 999, "-c", "3d_fullres_effb0", "2d_magic2x",
                  "-p", plans, "-tr", trainer, "-f", 0, 1, "-np", 1)  # fmt: skip
    best = json.loads((workspace.folder / "results" / DATASET / "inference_information.json").read_text())
    assert len(best["all_results"]) == 3  # each of them and their ensemble
    chosen = best["best_model_or_ensemble"]["selected_model_or_models"]
    assert {model["plans_identifier"] for model in chosen} == {plans}
    workspace.run("nnUNetv2_predict", "-d", 999, "-i", workspace.raw / "imagesTs", "-o", tmp_path, "-c",
                  chosen[0]["configuration"], *common, "-f", 0, 1, "-device", "cpu", "-npp", 1, "-nps", 1,
                  "--disable_tta")  # fmt: skip
    assert len(list(tmp_path.glob("*.nii.gz"))) == 1
    # Nothing was preprocessed again.
    assert data == sorted(p.name for p in (workspace.folder / "preprocessed" / DATASET).iterdir() if p.is_dir())


def test_an_unknown_name_gets_a_hint(workspace):
    done = workspace.run("nnUNetv2_train", 999, "3d_fullres", 0, "-tr", "nnUNetTrainerEffV2X", check=False)
    assert done.returncode != 0
    assert "has no trainer called nnUNetTrainerEffV2X. Did you mean nnUNetTrainerEffV2S" in done.stderr
