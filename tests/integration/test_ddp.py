"""Two processes train one network with DistributedDataParallel, wrapped as nnU-Net wraps it."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from plans import build
from torch.nn.parallel import DistributedDataParallel


def train(rank: int, folder: str, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    network = DistributedDataParallel(build(name, dimension=2, n_stages=3, features=(8, 12, 16)))
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    for step in range(2):
        torch.manual_seed(10 * step + rank)  # every process has its own batch, of one sample
        optimizer.zero_grad()
        # As in nnU-Net under DDP, no output has weight 0.
        sum(output.square().mean() for output in network(torch.randn(1, 1, 16, 16))).backward()
        optimizer.step()
    torch.save(network.module.state_dict(), f"{folder}/{rank}.pth")
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["EfficientUNet-b0", "FullyEfficientUNet-v2s"])
def test_processes_stay_in_step_without_unused_parameters(tmp_path, name):
    mp.spawn(train, args=(str(tmp_path), name), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    start = build(name, dimension=2, n_stages=3, features=(8, 12, 16)).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], start[key]) for key in first)
