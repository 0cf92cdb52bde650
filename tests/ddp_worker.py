"""What each process of the DistributedDataParallel test runs, in a module that a new process can import."""

import torch
import torch.distributed as dist
from plans import build
from torch.nn.parallel import DistributedDataParallel

from nnunet_dyn.architectures.dynamic_convs import METHODS, make_dynamic


def network_of(name: str) -> torch.nn.Module:
    """A network of ``plans.NETWORKS``, or nnU-Net's own with the dynamic convolutions that ``name`` says."""
    base = "GenericUNet" if name in METHODS else name
    network = build(base, dimension=2, n_stages=3, features=(8, 12, 16))
    return make_dynamic(network, name) if name in METHODS else network


def train(rank: int, folder: str, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    network = DistributedDataParallel(network_of(name))
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    for step in range(2):
        torch.manual_seed(10 * step + rank)  # every process has its own batch, of one sample
        optimizer.zero_grad()
        # As in nnU-Net under DDP, no output has weight 0.
        sum(output.square().mean() for output in network(torch.randn(1, 1, 16, 16))).backward()
        optimizer.step()
    torch.save(network.module.state_dict(), f"{folder}/{rank}.pth")
    dist.destroy_process_group()


def train_med_danet(rank: int, folder: str) -> None:
    """Two steps of each phase, and of one without segmenting, wrapped anew for each as the trainer does."""
    from nnunet_dyn.architectures.med_danet import SCHEDULES, MedDANetV2, ModifiedUNet
    from nnunet_dyn.trainers.med_danet import DISTRIBUTED

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    options = {"policy_space": ["skip", 16, "whole"]}
    network = MedDANetV2(1, 2, ModifiedUNet, options, strides=[[1, 1], [2, 2]], base_features=4, blocks=(1, 1))
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for phase in (*SCHEDULES["paper"], SCHEDULES["guided"][0]):
        network.train().enter(phase)
        wrapped = DistributedDataParallel(network, **DISTRIBUTED)
        for step in range(2):
            torch.manual_seed(10 * step + rank)
            optimizer.zero_grad()
            centres = torch.full((2, 2), 12.0) if phase.random_centres else None
            outputs = wrapped(torch.randn(2, 1, 32, 32), centres)
            if not phase.segments:
                guided = [outputs["scores"], *outputs["policy_maps"], *outputs["corners"], *outputs["position_maps"]]
                sum(output.square().mean() for output in guided).backward()
                optimizer.step()
                continue
            # What was not chosen does not count, so that the processes take different ways.
            weights = outputs["choice"].unbind(1)
            chosen = zip(outputs["logits"], weights, strict=True)
            mixed = sum(logits * weight.view(-1, 1, 1, 1) for logits, weight in chosen if weight.any())
            (mixed.square().mean() + outputs["cost"].mean()).backward()
            optimizer.step()
    torch.save(dict(network.named_parameters()), f"{folder}/{rank}.pth")
    dist.destroy_process_group()
