"""Two processes train one network with DistributedDataParallel, wrapped as nnU-Net wraps it."""

import pytest
import torch
import torch.multiprocessing as mp
from ddp_worker import network_of, train, train_med_danet

from nnunet_dyn.architectures.dynamic_convs import METHODS


@pytest.mark.parametrize("name", ["EfficientUNet-b0", "FullyEfficientUNet-v2s", *METHODS])
def test_processes_stay_in_step_without_unused_parameters(tmp_path, name):
    mp.spawn(train, args=(str(tmp_path), name), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    start = network_of(name).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], start[key]) for key in first)


def test_med_danet_stays_in_step_through_its_phases(tmp_path):
    mp.spawn(train_med_danet, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=False) for rank in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
