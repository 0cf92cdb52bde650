"""Time of every network beside nnU-Net's PlainConvUNet, in one run, as ratios.

Each measurement of a network is preceded by one of the stock network, and the ratio of the two is kept; the median
over the rounds is reported. Forward: evaluation mode, no gradients, batch 1. Training: forward and backward with deep
supervision, batch 1 (no optimiser step). Example:

    python benchmarks/speed.py --output speed.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import machine
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunet_dyn.accounting import count_operations, count_parameters
from nnunet_dyn.architectures.efficient_unet import EfficientUNet, GenericUNet
from nnunet_dyn.architectures.efficientnet import VARIANTS

SETTINGS = {
    "3d": {"patch": (64, 64, 64), "features": [32, 64, 128, 256, 320, 320]},
    "2d": {"patch": (256, 256), "features": [32, 64, 128, 256, 512, 512, 512]},
}


def plan(setting: str) -> dict:
    dimension, features = len(SETTINGS[setting]["patch"]), SETTINGS[setting]["features"]
    return {
        "n_stages": len(features),
        "features_per_stage": features,
        "conv_op": (nn.Conv2d, nn.Conv3d)[dimension - 2],
        "kernel_sizes": [[3] * dimension] * len(features),
        "strides": [[1] * dimension] + [[2] * dimension] * (len(features) - 1),
        "n_conv_per_stage_decoder": [2] * (len(features) - 1),
        "conv_bias": True,
        "norm_op": (nn.InstanceNorm2d, nn.InstanceNorm3d)[dimension - 2],
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    }


def networks(setting: str, num_classes: int = 4) -> dict:
    """Name → function that builds the network; the stock one first."""
    kwargs = plan(setting)
    stages = {"n_conv_per_stage": 2}
    return {
        "PlainConvUNet": lambda: PlainConvUNet(1, num_classes=num_classes, **stages, **kwargs),
        "FullyEffGenericUNet": lambda: GenericUNet(1, num_classes, **stages, **kwargs),
        **{
            f"{prefix}EfficientUNet-{variant}": lambda variant=variant, kind=kind: EfficientUNet(
                1, num_classes, encoder=variant, decoder=kind, **kwargs
            )
            for prefix, kind in (("", "plain"), ("Fully", "fully_efficient"))
            for variant in VARIANTS
        },
        **{
            f"{prefix}EfficientUNet-{variant}-batchnorm": lambda variant=variant, kind=kind: EfficientUNet(
                1, num_classes, encoder=variant, decoder=kind, mbconv_norm="batch", **kwargs
            )
            for prefix, kind in (("", "plain"), ("Fully", "fully_efficient"))
            for variant in ("b0", "v2s")
        },
    }


def build(make) -> nn.Module:
    torch.manual_seed(0)
    network = make()
    network.apply(network.initialize)
    return network


def forward(network: nn.Module, x: torch.Tensor) -> float:
    network.eval()
    network.decoder.deep_supervision = False
    start = time.perf_counter()
    with torch.inference_mode():
        network(x)
    return time.perf_counter() - start


def training(network: nn.Module, x: torch.Tensor) -> float:
    network.train()
    network.decoder.deep_supervision = True
    start = time.perf_counter()
    sum(output.square().mean() for output in network(x)).backward()
    elapsed = time.perf_counter() - start
    network.zero_grad(set_to_none=True)
    return elapsed


def measure(setting: str, only: list[str] | None, rounds: int) -> list[dict]:
    makers = networks(setting)
    x = torch.randn(1, 1, *SETTINGS[setting]["patch"])
    stock = build(makers.pop("PlainConvUNet"))
    stock_operations = count_operations(stock, x.shape).total
    rows = []
    for name, make in makers.items():
        if only and name not in only:
            continue
        network = build(make)
        row = {
            "setting": setting,
            "network": name,
            "parameters": count_parameters(network),
            "operations_ratio": round(count_operations(network, x.shape).total / stock_operations, 3),
        }
        for kind, timed in (("forward", forward), ("training", training)):
            for candidate in (stock, network):
                timed(candidate, x)
            pairs = [(timed(stock, x), timed(network, x)) for _ in range(rounds)]
            row[f"{kind}_ratio"] = round(statistics.median(ours / theirs for theirs, ours in pairs), 3)
            row[f"{kind}_stock_seconds"] = round(statistics.median(theirs for theirs, _ in pairs), 3)
        rows.append(row)
        print(row, flush=True)
    return rows


def profile(setting: str, name: str) -> dict[str, float]:
    """Share of each operator in one forward pass, per cent of the CPU time."""
    network = build(networks(setting)[name])
    x = torch.randn(1, 1, *SETTINGS[setting]["patch"])
    forward(network, x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        forward(network, x)
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    largest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:8]
    return {event.key: round(100 * event.self_cpu_time_total / total, 1) for event in largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--networks", nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    result = {
        "machine": machine.describe(),
        "patch": {setting: SETTINGS[setting]["patch"] for setting in args.settings},
        "batch": 1,
        "rounds": args.rounds,
        "rows": [row for setting in args.settings for row in measure(setting, args.networks, args.rounds)],
        "profile_3d_forward": {
            name: profile("3d", name)
            for name in ("PlainConvUNet", "EfficientUNet-b0", "EfficientUNet-v2s", "FullyEfficientUNet-b0",
                         "FullyEfficientUNet-v2s")
        },
    }  # fmt: skip
    args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
