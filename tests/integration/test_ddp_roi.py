"""Two processes train the ROI segmentor with DistributedDataParallel, each on stages of its own, and calibrate."""

import json

import torch
import torch.multiprocessing as mp
from ddp_calibration_worker import calibrate
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
