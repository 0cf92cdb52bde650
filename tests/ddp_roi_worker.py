"""What each process of the ROI segmentor's DistributedDataParallel test runs; a new process can import it."""

import torch
import torch.distributed as dist
from plans import arch_kwargs
from torch.nn.parallel import DistributedDataParallel

from nnunet_dyn.architectures.roi_segmentor import ROISegmentor

#: Sides of the gate in each step, by process: other stages, and none at all.
SIDES = ((0, 3), (20, 0), (3, 20), (0, 0))
KEYS = ("n_stages", "features_per_stage", "conv_op", "kernel_sizes", "strides", "norm_op", "norm_op_kwargs")


def segmentor() -> ROISegmentor:
    torch.manual_seed(0)
    planned = arch_kwargs(3, n_stages=4, features=(8, 8, 8, 8))
    return ROISegmentor(2, 2, image_channels=1, **{key: planned[key] for key in KEYS})


def train(rank: int, folder: str) -> None:
    """A step for each of :data:`SIDES`, wrapped as ``ROISegmentor`` asks for."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    network = DistributedDataParallel(segmentor(), find_unused_parameters=True, broadcast_buffers=False)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    for step, sides in enumerate(SIDES):
        torch.manual_seed(10 * step + rank)
        x = torch.randn(1, 2, 32, 32, 32)
        x[:, 1] = 0
        x[(slice(None), 1, *[slice(sides[rank])] * 3)] = 1
        optimizer.zero_grad()
        sum(output.square().mean() for output in network(x)).backward()
        optimizer.step()
    torch.save(dict(network.module.named_parameters()), f"{folder}/{rank}.pth")
    dist.destroy_process_group()
