"""Med-DANet V2 beside the same U-Net run statically: the rows of Table 3a, on generated tumours or any 2D data set.

Everything goes through the commands of nnU-Net and of this package, in ``folder``: data are generated (or taken from
``--dataset``), planned and preprocessed, each row is trained on fold 0, held-out cases are predicted and evaluated.
What is done already is not done again, so a folder is for one set of arguments. All rows take the schedule ``guided``
(docs/med_danet.md), those that decide for five times the epochs: all segment equally often, and at the same rate of
learning. Example:

    python benchmarks/med_danet.py work --output benchmarks/results/med_danet.json
"""

import argparse
import json
import os
from itertools import combinations
from pathlib import Path

import machine
import numpy as np
import studies
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from scipy import ndimage
from studies import command, hold_out
from tumours import write_dataset

from nnunet_dyn.trainers.med_danet import mean_costs

#: Options of the rows of Table 3a: –, S, Q, S+Q.
ROWS = {
    "static": {"policy_space": ["whole"], "bits": [32]},
    "spatial": {"bits": [32]},
    "quantised": {"policy_space": ["whole"]},
    "both": {},
}
SCHEDULE = {"schedule": "guided"}
#: A fifth of the epochs of those that decide segment, so that all rows segment equally often.
LONGER = {"spatial": 5, "both": 5}
PLANS = "nnUNetDynPlans"


def prepare(args: argparse.Namespace) -> str:
    """Data, plans and preprocessed slices; returns the name of the data set."""
    raw, preprocessed = Path(os.environ["nnUNet_raw"]), Path(os.environ["nnUNet_preprocessed"])
    if args.dataset:
        name = args.dataset.name
        if not (raw / name).exists():
            hold_out(args.dataset, raw / name, args.test)
    else:
        name = "Dataset998_GeneratedTumours"
        if not (raw / name / "dataset.json").exists():
            write_dataset(raw, args.train, args.test, args.slices, args.size)
    if not (preprocessed / name / "nnUNetPlans_2d").exists():
        command("nnUNetv2_plan_and_preprocess", "-d", name[len("Dataset") :][:3], "-c", "2d", "-np", 1, "-npfp", 1)
    if not (preprocessed / name / f"{PLANS}.json").exists():
        base = Path(__file__).parents[1] / "nnunet_dyn" / "plans_templates" / "meddanetv2.json"
        template = json.loads(base.read_text())
        crop = {"policy_space": ["skip", args.crop, "whole"]}
        for row, options in ROWS.items():
            template["arch_kwargs"]["med_danet"] = crop | SCHEDULE | options
            template["configuration"] = {"batch_size": args.batch}
            (raw / f"{row}.json").write_text(json.dumps(template))
        templates = [raw / f"{row}.json" for row in ROWS]
        command("nnunet_dyn", "plan", "-d", name, "-c", "2d", "-o", PLANS, "-t", *templates)
    return name


def train(name: str, row: str, args: argparse.Namespace) -> Path:
    """Train one row on fold 0 and return the model folder."""
    epochs = args.epochs * LONGER.get(row, 1)
    return studies.train(name, f"2d_{row}", f"nnUNetTrainerMedDANetV2_{epochs}epochs_{args.iterations}iters", PLANS)


def evaluate(name: str, model: Path) -> dict:
    """Dice and costs on the held-out cases, of every pass that nnU-Net's predictor makes."""
    calibration = model / "fold_0" / "calibration.json"
    return {
        **studies.held_out(name, model, "nnUNetv2_predict_from_modelfolder", "-npp", 1, "-nps", 1),
        "calibration": json.loads(calibration.read_text()) if calibration.exists() else None,
        **costs(Path(os.environ["nnUNet_raw"], name), model),
    }


def costs(raw: Path, model: Path) -> dict:
    """What nnU-Net's predictor makes the network decide on the held-out cases, where every flip decides for itself.

    Returns:
        ``costs``: shares, bits and multiply-accumulates (times bits / 32) per tile and pass. ``coverage``: of every
        class, the share of its voxels that no tile skips or crops away in any pass, the least of a case, and
        components of ten voxels or more of which nothing is left.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    network, configuration = predictor.network, predictor.configuration_manager
    network.load_state_dict(predictor.list_of_parameters[0])
    patch = tuple(configuration.patch_size)
    axes = predictor.allowed_mirroring_axes or ()
    passes = [chosen for count in range(len(axes) + 1) for chosen in combinations(axes, count)]
    labels = predictor.label_manager
    classes = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    decided, voxels = [], {str(label): [] for label in classes}
    lost_components = 0
    preprocessor = configuration.preprocessor_class(verbose=False)
    ending = predictor.dataset_json["file_ending"]
    for label_file in sorted((raw / "labelsTs").glob(f"*{ending}")):
        files = sorted((raw / "imagesTs").glob(f"{label_file.name.removesuffix(ending)}_????{ending}"))
        data, segmentation, _ = preprocessor.run_case(
            list(map(str, files)), str(label_file), predictor.plans_manager, configuration, predictor.dataset_json
        )
        padded = pad_nd_image(np.asarray(data), patch, "constant", {"constant_values": 0})
        target = pad_nd_image(np.asarray(segmentation[0]), patch, "constant", {"constant_values": 0})
        tiles = predictor._internal_get_sliding_window_slicers(padded.shape[1:])
        network.decisions = []
        predictor.predict_sliding_window_return_logits(torch.from_numpy(np.asarray(data)).float())
        decisions, network.decisions = network.decisions, None
        decided += decisions
        covered = np.ones(target.shape, bool)
        for index, decision in enumerate(decisions):
            one = decision.mirrored(passes[index % len(passes)], patch)
            kept = np.zeros(patch, bool)
            if one.action != "skip":
                kept[tuple(slice(*side) for side in one.box) if one.box else ...] = True
            covered[tiles[index // len(passes)][1:]] &= kept
        for label in classes:
            is_class = np.isin(target, label)
            voxels[str(label)].append((int((is_class & covered).sum()), int(is_class.sum())))
            components, count = ndimage.label(is_class, np.ones((3, 3, 3)))
            sizes = np.bincount(components.ravel(), minlength=count + 1)[1:]
            left = np.bincount(components[covered], minlength=count + 1)[1:]
            lost_components += int(((left == 0) & (sizes >= 10)).sum())
    static = sum(network.stage_macs(patch, patch)) / 1e9
    mean = mean_costs(decided, network.n_stages)
    shares = {label: [kept / total for kept, total in cases if total] for label, cases in voxels.items()}
    return {
        "costs": mean | {"static_gmacs": static, "relative": mean["gmacs"] / static, "passes": len(decided)},
        "coverage": {
            "of_class": {
                label: sum(kept for kept, _ in cases) / total if (total := sum(total for _, total in cases)) else None
                for label, cases in voxels.items()
            },
            "worst_case": {label: min(of_cases, default=None) for label, of_cases in shares.items()},
            "lost_components": lost_components,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything is kept")
    parser.add_argument("--dataset", type=Path, help="raw data set with a configuration 2d, instead of generated ones")
    parser.add_argument("--train", type=int, default=24, help="generated cases (default: %(default)s)")
    parser.add_argument("--test", type=int, default=20, help="held-out cases (default: %(default)s)")
    parser.add_argument("--slices", type=int, default=32)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--crop", type=int, default=96)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=15, help="that segment (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=50, help="an epoch (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    generated = () if args.dataset is None else ("train", "slices", "size")
    own = {"folder", "dataset", "output", "rows", *generated}
    settings = {key: value for key, value in vars(args).items() if key not in own} | {"options": ROWS, **SCHEDULE}
    studies.use(args.folder, settings)
    name = prepare(args)
    result = {"machine": machine.describe(), "dataset": name, "settings": settings, "rows": {}}
    for row in args.rows:
        result["rows"][row] = {"options": SCHEDULE | ROWS[row]} | evaluate(name, train(name, row, args))
        print(row, json.dumps(result["rows"][row]), flush=True)
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
