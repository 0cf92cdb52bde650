"""Network time of a patch by engine and precision, relative to stock nnU-Net in eager fp32, in one run.

Every measurement of an engine goes with one of the stock network, which is first in every second round; the ratio of
the two is kept, and the median over the rounds is reported. Weights are random, so int8 is calibrated on noise: this is
about time, not accuracy. Engine torch is measured eager, in channels-last layout, and compiled; on CUDA the stock
network is in half precision, too, as nnU-Net's predictor has it.
Examples, on a machine that does nothing else:

    python benchmarks/engines.py --threads 2 --output benchmarks/results/engines.json
    python benchmarks/engines.py --device cuda --engines torch --settings 3d --side 128 --output engines_cuda.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import machine
import numpy as np
import speed
import torch

from nnunet_dyn.inference.conversion import convert, quantise
from nnunet_dyn.inference.engines import TorchEngine
from nnunet_dyn.inference.exported import engine_of

STOCK = "PlainConvUNet"
NETWORKS = {
    "3d": (STOCK, "EfficientUNet-b0", "EfficientUNet-v2s", "FullyEfficientUNet-b0", "FullyEfficientUNet-v2s"),
    "2d": (STOCK,),
}
PRECISIONS = {"openvino": ("fp32", "bf16", "int8"), "onnxruntime": ("fp32", "int8"), "torch": ("eager", "compiled")}
# What torch computes in, and the layouts of its rows.
IN_TORCH = {"cpu": "fp32", "cuda": "fp16"}
LAYOUTS = {3: torch.channels_last_3d, 2: torch.channels_last}


def build(setting: str, name: str) -> torch.nn.Module:
    network = speed.build(speed.networks(setting)[name]).eval()
    network.decoder.deep_supervision = False
    return network


def ready(network, engine: str, precision: str, x: torch.Tensor, threads: int) -> Callable[[], object]:
    """A function that runs ``network`` on ``x``."""
    if engine == "torch":
        network, x = (each.to(memory_format=LAYOUTS[x.ndim - 2]) for each in (network, x))
        return in_torch(torch.compile(network) if precision == "compiled" else network, x, threads)
    model = convert(network, engine, tuple(x.shape))
    if precision == "int8":
        rng = np.random.default_rng(0)
        model = quantise(model, [rng.normal(size=tuple(x.shape)).astype(np.float32) for _ in range(2)], threads=threads)
    runs = engine_of(engine)([model.SerializeToString() if engine == "onnxruntime" else model], precision, threads)
    runs.load(0)
    return lambda: runs.infer(x)


def in_torch(network: torch.nn.Module, x: torch.Tensor, threads: int) -> Callable[[], object]:
    """The same by the engine of PyTorch, on the device of ``x``."""
    runs = TorchEngine(network, None, x.device, IN_TORCH[x.device.type], threads)
    return lambda: runs.infer(x)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    setting: str, only: list[str] | None, engines: list[str], threads: int, rounds: int, device: str
) -> list[dict]:
    x, rows = torch.randn(1, 1, *speed.SETTINGS[setting]["patch"], device=device), []
    stock = in_torch(build(setting, STOCK), x, threads)
    for name in NETWORKS[setting]:
        if only and name not in only:
            continue
        network = build(setting, name)
        for engine in engines:
            for precision in PRECISIONS[engine]:
                run = ready(network, engine, precision, x, threads)
                seconds(stock)
                first = seconds(run)
                pairs = []
                for number in range(rounds):
                    both = [stock, run]
                    taken = [seconds(each) for each in (reversed(both) if number % 2 else both)]
                    pairs.append(taken[::-1] if number % 2 else taken)
                rows.append(
                    {
                        "setting": setting,
                        "network": name,
                        "engine": engine,
                        "precision": precision,
                        "ratio": round(statistics.median(ours / theirs for theirs, ours in pairs), 3),
                        "stock_seconds": round(statistics.median(theirs for theirs, _ in pairs), 4),
                        "first_seconds": round(first, 4),
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument(
        "--networks", nargs="+", choices=sorted({name for names in NETWORKS.values() for name in names})
    )
    parser.add_argument("--engines", nargs="+", choices=PRECISIONS, default=["openvino"])
    parser.add_argument("--device", choices=IN_TORCH, default="cpu", help="cuda is for engine torch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--side", type=int, help="voxels along each axis of the patch (default: 64 in 3D, 256 in 2D)")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.networks and not any(name in NETWORKS[setting] for name in args.networks for setting in args.settings):
        parser.error(f"--settings {' '.join(args.settings)} have none of the networks {', '.join(args.networks)}")
    if args.device == "cuda" and args.engines != ["torch"]:
        parser.error("--device cuda is for --engines torch alone")
    torch.set_num_threads(args.threads)
    if args.side:
        for setting in args.settings:
            speed.SETTINGS[setting]["patch"] = (args.side,) * len(speed.SETTINGS[setting]["patch"])
    rows = []
    for setting in args.settings:
        rows += measure(setting, args.networks, args.engines, args.threads, args.rounds, args.device)
    versions = {name: version(name) for name in ("openvino", "nncf", "onnxruntime") if find_spec(name)}
    if args.device == "cuda":
        versions |= {"gpu": torch.cuda.get_device_name()}
    result = {
        "machine": machine.describe() | versions,
        "patch": {setting: speed.SETTINGS[setting]["patch"] for setting in args.settings},
        "rounds": args.rounds,
        "rows": rows,
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
