"""Do the networks train? Loss and gradient norm of every iteration, through nnU-Net's trainer, on generated data.

Plans: six stages, patch 64³, five halvings, batch 2 (the depth at which the paper's b1 to b7 could not be trained),
nnU-Net's learning rate of 0.01 throughout. The seed sets the initial weights; nnU-Net draws batches in worker processes
of its own, which are not seeded. Exit status 1 if a run is not finite or its loss does not fall. Example:

    python benchmarks/stability.py --output stability.json --iterations 30
    python benchmarks/stability.py --output stability.json --iterations 100 --seeds 0 1 2 \\
        --trainers nnUNetTrainerEffB0 nnUNetTrainerEffB3
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import machine
import numpy as np
import torch

DATASET = "Dataset998_Stability"


def prepare(folder: Path, features: list[int]) -> None:
    """Generate and preprocess the data, and write six-stage plans."""
    from nnunet_dyn.demo.generator import generate_dataset

    generate_dataset(
        folder / "nnUNet_raw", n_train=6, n_test=1, seed=0, size=(72, 80, 80), dataset_id=998, name="Stability"
    )
    command = [sys.executable, "-c", "from nnunetv2.experiment_planning import plan_and_preprocess_entrypoints as e;"
               "e.plan_and_preprocess_entry()", "-d", "998", "-c", "3d_fullres", "-np", "1", "-npfp", "1"]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    path = folder / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    configuration["patch_size"], configuration["batch_size"] = [64, 64, 64], 2
    configuration["architecture"]["arch_kwargs"].update(
        n_stages=6,
        features_per_stage=features,
        kernel_sizes=[[3, 3, 3]] * 6,
        strides=[[1, 1, 1]] + [[2, 2, 2]] * 5,
        n_conv_per_stage=[2] * 6,
        n_conv_per_stage_decoder=[2] * 5,
    )
    path.write_text(json.dumps(plans))


def train(name: str, iterations: int, seed: int, folder: Path) -> dict:
    """Run ``iterations`` training steps of trainer ``name`` and return what happened at each."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    preprocessed = folder / "nnUNet_preprocessed" / DATASET
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    dataset = json.loads((preprocessed / "dataset.json").read_text())
    trainer_class = recursive_find_trainer_class_by_name(f"{name}_1epochs_{iterations}iters")
    trainer = trainer_class(plans, "3d_fullres", "all", dataset, torch.device("cpu"))
    trainer.initialize()
    trainer.dataloader_train, _ = trainer.get_dataloaders()
    norms = []
    clip = torch.nn.utils.clip_grad_norm_
    torch.nn.utils.clip_grad_norm_ = lambda *args, **kwargs: norms.append(clip(*args, **kwargs).item())
    trainer.network.train()
    try:
        losses = [float(trainer.train_step(next(trainer.dataloader_train))["loss"]) for _ in range(iterations)]
    finally:
        torch.nn.utils.clip_grad_norm_ = clip
        trainer.dataloader_train._finish()
    third = max(1, iterations // 3)
    first, last = float(np.mean(losses[:third])), float(np.mean(losses[-third:]))
    return {
        "trainer": name,
        "seed": seed,
        "iterations": iterations,
        "finite": bool(np.isfinite(losses).all() and np.isfinite(norms).all()),
        "falling": last < first,
        "loss_first_third": round(first, 4),
        "loss_last_third": round(last, 4),
        "largest_gradient_norm": round(max(norms), 3),
        "losses": [round(loss, 4) for loss in losses],
        "gradient_norms": [round(norm, 3) for norm in norms],
    }


def main() -> None:
    from nnunet_dyn.trainers import trainer_names

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON; runs already in it are not repeated")
    parser.add_argument("--trainers", nargs="+", default=[n for n in trainer_names() if "ImageNet" not in n])
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--features", type=int, nargs=6, default=[32, 64, 128, 256, 320, 320], help="decoder widths")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {"machine": machine.describe(), "features_per_stage": args.features, "runs": []}
    if args.output.exists():
        result = json.loads(args.output.read_text())
        if result["features_per_stage"] != args.features:
            parser.error(f"{args.output} holds runs with --features {result['features_per_stage']}; use another file")
    done = {(run["trainer"], run["seed"], run["iterations"]) for run in result["runs"]}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for kind in ("raw", "preprocessed", "results"):
            (folder / f"nnUNet_{kind}").mkdir()
            os.environ[f"nnUNet_{kind}"] = str(folder / f"nnUNet_{kind}")
        os.environ["nnUNet_n_proc_DA"] = "1"
        prepare(folder, args.features)
        for seed in args.seeds:
            for name in args.trainers:
                if (name, seed, args.iterations) in done:
                    continue
                run = train(name, args.iterations, seed, folder)
                result["runs"].append(run)
                partial = args.output.with_suffix(".partial")
                partial.write_text(json.dumps(result, indent=1))
                partial.replace(args.output)
                print({key: value for key, value in run.items() if not isinstance(value, list)}, flush=True)
    sys.exit(not all(run["finite"] and run["falling"] for run in result["runs"]))


if __name__ == "__main__":
    main()
