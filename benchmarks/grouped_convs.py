"""Kernels of their own for every sample: one convolution a sample, or one with a group for each.

What ``DynamicConv`` chooses by. Seconds of a forward pass and of one with both gradients, relative to a convolution
that shares one kernel. Example:

    python benchmarks/grouped_convs.py --output grouped_convs.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import machine
import torch
from torch.nn import functional as F

# Channels in and out, map, stride.
LAYERS = [
    (16, 16, (40, 56, 40), 1),
    (32, 32, (20, 28, 20), 1),
    (32, 64, (64, 64, 64), 2),
    (64, 64, (10, 14, 10), 1),
    (128, 128, (16, 16, 16), 1),
    (320, 320, (4, 4, 4), 1),
    (320, 320, (8, 8, 8), 1),
    (32, 32, (256, 256), 1),
    (128, 128, (64, 64), 1),
    (512, 512, (16, 16), 1),
    (512, 512, (4, 4), 1),
]


def seconds(call: Callable, rounds: int) -> float:
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(batch: int, rounds: int) -> list[dict]:
    rows = []
    for channels, filters, size, stride in LAYERS:
        axes = len(size)
        conv = F.conv2d if axes == 2 else F.conv3d
        x = torch.randn(batch, channels, *size, requires_grad=True)
        weight = torch.randn(batch, filters, channels, *(3,) * axes, requires_grad=True)
        gradient = torch.randn_like(conv(x, weight[0], None, stride, 1))

        def shared(x=x, weight=weight, conv=conv, stride=stride):
            return conv(x, weight[0], None, stride, 1)

        def one_by_one(x=x, weight=weight, axes=axes, stride=stride):
            ones = [1] * axes
            samples = zip(x.split(1), weight, strict=True)
            return torch.cat([torch.mkldnn_convolution(s, w, None, ones, [stride] * axes, ones, 1) for s, w in samples])

        def groups(x=x, weight=weight, conv=conv, stride=stride, gradient=gradient):
            return conv(x.flatten(0, 1)[None], weight.flatten(0, 1), None, stride, 1, 1, len(x)).view_as(gradient)

        row = {"channels": [channels, filters], "map": size, "stride": stride, "batch": batch}
        for kind in ("forward", "training"):
            times = {}
            for way in (shared, one_by_one, groups):

                def call(way=way, kind=kind, x=x, weight=weight, gradient=gradient):
                    with torch.set_grad_enabled(kind == "training"):
                        y = way()
                    if kind == "training":
                        torch.autograd.grad(y, (x, weight), gradient)

                times[way.__name__] = seconds(call, rounds)
            row[kind] = {name: round(value / times["shared"], 2) for name, value in times.items() if name != "shared"}
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows = [row for batch in args.batch for row in measure(batch, args.rounds)]
    args.output.write_text(json.dumps({"machine": machine.describe(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
