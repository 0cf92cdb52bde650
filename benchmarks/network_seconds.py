"""Models beside each other on the same images: CPU seconds of the sliding window alone, without reading and export.

A row is a model folder, which PyTorch runs eagerly, or one that ``nnunet_dyn export`` wrote. Mirroring is on where the
models have it; what decides is part of the time, the first stage of a cascade is not. Each row predicts the first case
once before it is timed, since engines compile then; after that the rows take turns, case by case. Example:

    python benchmarks/network_seconds.py imagesTs --cases 4 --output network.json \\
        --row stock nnUNetTrainer__nnUNetPlans__2d --row "int8 stages" exported
"""

import argparse
import json
import time
from pathlib import Path

import machine

from nnunet_dyn.inference.predictor import Predictor, list_cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of nnU-Net's images")
    parser.add_argument("--row", nargs=2, action="append", required=True, metavar=("NAME", "FOLDER"))
    parser.add_argument("--cases", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = {
        name: Predictor.from_folder(folder, device="cpu", threads=args.threads, first_stage=False)
        for name, folder in args.row
    }
    cases = list_cases(args.images, next(iter(rows.values())).dataset_json["file_ending"])[: args.cases]
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for index, (case, files) in enumerate(cases):
        for name, predictor in rows.items():
            image, properties = predictor.read(files)
            data, _ = predictor.preprocess([image], properties)
            for _ in range(2 if index == 0 else 1):
                start = time.process_time()
                predictor.predict_logits_from_preprocessed_data(data)
                taken = time.process_time() - start
            seconds[name].append(taken)
            print(case, name, round(taken, 2), flush=True)
    first = sum(next(iter(seconds.values())))
    result = {
        "machine": machine.describe(),
        "cases": len(cases),
        "rows": {
            name: {
                "folder": Path(folder).name,
                "cpu_seconds_per_case": round(sum(seconds[name]) / len(cases), 3),
                "ratio": round(sum(seconds[name]) / first, 4),
            }
            for name, folder in args.row
        },
    }
    print(json.dumps(result["rows"]))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
