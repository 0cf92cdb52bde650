"""Dynamic convolutions beside the static network: parameters, operations, memory and time, in one run, as ratios.

The network is nnU-Net's PlainConvUNet as it plans it, static and with dynamic convolutions in its encoder; in 2D also
torchvision's ResNet-18, the network of the paper's Table 5. Each measurement of a dynamic network is preceded by one
of the static network; the median of the ratios is reported. Forward: evaluation mode, no gradients, batch 1. Training
step: forward, backward with deep supervision, gradient clipping and nnU-Net's optimiser, batch 2. Memory: the bytes
that autograd keeps in training, batch 2. Example:

    python benchmarks/dynamic_convs.py --output dynamic_convs.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import machine
import speed
import torch
from memory import saved_bytes
from torch import nn
from torchvision.models import resnet18

from nnunet_dyn.accounting import count_operations, count_parameters
from nnunet_dyn.architectures.dynamic_convs import DynamicConv, make_dynamic
from nnunet_dyn.plans_templates import load_template

TEMPLATES = ("magic1x", "magic2x", "magic4x", "dyconv4x", "condconv8x", "odconv4x", "dcd", "ddconv")
RESNET = "resnet18"
SETTINGS = {**speed.SETTINGS, RESNET: {"patch": (256, 256)}}


def static_network(setting: str) -> nn.Module:
    if setting != RESNET:
        return speed.build(speed.networks(setting)["PlainConvUNet"])
    torch.manual_seed(0)
    network = resnet18()
    # ResNet has no decoder; the shared functions only set its deep supervision.
    network.decoder = nn.Module()
    return network


def training_step(network: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
    network.train()
    network.decoder.deep_supervision = True
    start = time.perf_counter()
    optimizer.zero_grad()
    outputs = network(x)
    sum(output.square().mean() for output in outputs).backward()
    nn.utils.clip_grad_norm_(network.parameters(), 12)
    optimizer.step()
    return time.perf_counter() - start


def measure(setting: str, templates: list[str], rounds: int) -> list[dict]:
    channels = 3 if setting == RESNET else 1
    one, two = (torch.randn(batch, channels, *SETTINGS[setting]["patch"]) for batch in (1, 2))
    static = static_network(setting)
    kept = saved_bytes(static, two)
    operations = count_operations(static, one.shape).total
    rows = []
    for template in templates:
        if len(one.shape) - 2 not in load_template(template).dimensions:
            continue
        network = make_dynamic(static_network(setting), **load_template(template).arch_kwargs["dynamic"])
        total = count_operations(network, one.shape).total
        mixing = sum(conv.kernels.numel() for conv in network.modules() if hasattr(conv, "kernels"))
        row = {
            "setting": setting,
            "template": template,
            "replaced": sum(isinstance(module, DynamicConv) for module in network.modules()),
            "parameters_added": count_parameters(network) - count_parameters(static),
            "parameters_ratio": round(count_parameters(network) / count_parameters(static), 3),
            "operations_ratio": round(total / operations, 5),
            "operations_added": total - operations,
            "of_these_mixing_kernels": mixing,
            "memory_ratio": round(saved_bytes(network, two) / kept, 4),
        }
        for candidate in (static, network):
            speed.forward(candidate, one)
        pairs = [(speed.forward(static, one), speed.forward(network, one)) for _ in range(3 * rounds)]
        row |= summary("forward", pairs)
        if setting != RESNET:
            steps = []
            for candidate in (static, network):
                optimizer = torch.optim.SGD(
                    candidate.parameters(), 1e-2, momentum=0.99, nesterov=True, weight_decay=3e-5
                )
                training_step(candidate, two, optimizer)
                steps.append((candidate, two, optimizer))
            row |= summary("training", [[training_step(*step) for step in steps] for _ in range(rounds)])
        rows.append(row)
        print(row, flush=True)
    return rows


def summary(kind: str, pairs: list) -> dict[str, float]:
    ratios = [ours / theirs for theirs, ours in pairs]
    return {
        f"{kind}_ratio": round(statistics.median(ratios), 3),
        f"{kind}_ratios": [round(ratio, 3) for ratio in sorted(ratios)],
        f"{kind}_static_seconds": round(statistics.median(theirs for theirs, _ in pairs), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--templates", nargs="+", choices=TEMPLATES, default=list(TEMPLATES))
    parser.add_argument(
        "--rounds", type=int, default=3, help="of a training step; a forward pass has three times as many"
    )
    args = parser.parse_args()
    result = {
        "machine": machine.describe(),
        "patch": {setting: SETTINGS[setting]["patch"] for setting in args.settings},
        "rows": [row for setting in args.settings for row in measure(setting, args.templates, args.rounds)],
    }
    args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
