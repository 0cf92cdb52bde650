"""Crops of many sizes in OpenVINO: one model for any size beside a model compiled for each, and what compiling takes.

The network is that of the ROI cascade's segmentor; weights are random, and int8 is calibrated on noise. Every round
runs both models on a crop of each size, the one for any size first in every second round; the median of the ratios is
reported. Example, on a machine that does nothing else:

    python benchmarks/crop_sizes.py --threads 2 --output benchmarks/results/crop_sizes.json
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import engines
import machine
import torch

from nnunet_dyn.inference.conversion import convert, quantise, save
from nnunet_dyn.inference.openvino_engine import compiled, run

STEP = 32
SIZES = ((64, 64, 64), (96, 64, 64), (96, 96, 64))


def measure(name: str, precisions: list[str], threads: int, rounds: int) -> list[dict]:
    network, rows = engines.build("3d", name), []
    plain = convert(network, "openvino", (1, 1, *SIZES[0]), multiples=(STEP,) * 3)
    crops = [torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(0)) for size in SIZES]
    with tempfile.TemporaryDirectory() as folder:
        for precision in precisions:
            file = Path(folder) / f"{precision}.xml"
            model = quantise(plain, [crops[0].numpy()], threads=threads) if precision == "int8" else plain
            save(model, file)
            ready, taken = {}, {}
            for shape in (None, *(tuple(crop.shape) for crop in crops)):
                start = time.perf_counter()
                ready[shape] = compiled(file, precision, threads, shape).create_infer_request()
                taken[shape] = time.perf_counter() - start
            for crop in crops:
                both = [lambda: run(ready[None], crop), lambda: run(ready[tuple(crop.shape)], crop)]  # noqa: B023
                first = engines.seconds(both[0])
                engines.seconds(both[1])
                pairs = []
                for number in range(rounds):
                    taken_by = [engines.seconds(each) for each in (reversed(both) if number % 2 else both)]
                    pairs.append(taken_by[::-1] if number % 2 else taken_by)
                rows.append(
                    {
                        "network": name,
                        "precision": precision,
                        "size": crop.shape[2:],
                        "ratio_of_any_size": round(statistics.median(one / own for one, own in pairs), 3),
                        "seconds": round(statistics.median(own for _, own in pairs), 4),
                        "first_seconds_of_any_size": round(first, 4),
                        "compile_seconds": round(taken[tuple(crop.shape)], 2),
                        "compile_seconds_of_any_size": round(taken[None], 2),
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=engines.NETWORKS["3d"], default="EfficientUNet-v2s")
    parser.add_argument("--precisions", nargs="+", choices=engines.PRECISIONS["openvino"], default=["bf16", "int8"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = measure(args.network, args.precisions, args.threads, args.rounds)
    if args.output:
        result = {"machine": machine.describe(), "rounds": args.rounds, "rows": rows}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
