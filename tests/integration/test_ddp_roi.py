"""Two processes train the ROI segmentor with DistributedDataParallel, each on stages of its own, and calibrate."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from cascade_training import write_cases
from ddp_calibration_worker import calibrate
from ddp_cascade_worker import NAME, train_cascade
from ddp_roi_worker import segmentor, train


def test_processes_stay_in_step_though_they_skip_different_stages(tmp_path):
    mp.spawn(train, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=False) for rank in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    start = dict(segmentor().named_parameters())
    changed = {key for key in first if not torch.equal(first[key], start[key])}
    stages = ("network.encoder.stages.0.", "network.encoder.stages.2.", "network.encoder.gates.0.")
    assert all(any(key.startswith(stage) for key in changed) for stage in stages)
    assert not any(key.startswith("network.encoder.gates.1.") for key in changed)  # no gate of 9 to 16 voxels was seen


def test_the_first_process_calibrates_case_by_case_for_all(tmp_path):
    mp.spawn(calibrate, args=(str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["worked"] == [0, 1, 2] and second["worked"] == []
    failed = "The first process got OSError('no room for the case'). See its log."
    assert first["got"] == second["got"] == [0, 10, failed]


def test_the_trainer_of_both_stages(tmp_path, monkeypatch):
    """One sample a process, whose gates lie elsewhere; the first process calibrates for both."""
    for kind in ("preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / kind))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    write_cases(tmp_path / "preprocessed")
    (tmp_path / "preprocessed" / "Dataset999_Test" / "dataset_fingerprint.json").write_text("{}")
    mp.spawn(train_cascade, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=False) for rank in range(2))
    folder = Path(tmp_path, "results", "Dataset999_Test", f"{NAME}__nnUNetPlans__3d_detect", "fold_0")
    calibration = json.loads((folder / "calibration.json").read_text())
    for configuration, found in first.items():
        other = second[configuration]
        assert found["batch"] == other["batch"] == 1 and found["changed"] == other["changed"] != []
        assert found["weights"].keys() == other["weights"].keys()
        assert all(torch.equal(value, other["weights"][key]) for key, value in found["weights"].items())
        assert found["log"] == other["log"] and np.isfinite(found["log"]["train_losses"]).all()
        assert all(len(values) == 2 for values in found["log"].values())
    for rank in (first, second):
        margin = rank["3d_detect"]["weights"]["labels.seg_layers.margin"][1:].tolist()
        assert margin == list(calibration["margin"].values())
