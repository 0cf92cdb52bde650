"""The ROI cascade beside nnU-Net's 3d_fullres: what is found and how well it is segmented, and what that costs.

Each part keeps everything in a folder of its own; what is done already is not done again, so a folder is for one set of
arguments. Everything goes through the commands of nnU-Net and of this package.

- ``accuracy``: on a data set, the detector, the segmentor and nnU-Net's network are trained on fold 0 for as many
  iterations as are asked for, and predict the held-out cases. For a CPU the plans can be made smaller, for both alike.
- ``ablation``: the views and filters of the tri-plane detector (Table 8).
- ``cost``: on generated volumes with small targets, the whole commands and what grows with what.

Examples:

    python benchmarks/roi_cascade.py accuracy work --dataset nnUNet_raw/Dataset521_OpenKBPHaN \\
        --features 8 --max-features 64 --batch 2 --output roi_cascade_accuracy.json
    python benchmarks/roi_cascade.py cost other --features 8 --max-features 64 --detector-voxels 262144 \\
        --output benchmarks/results/roi_cascade_cost.json --picture docs/images/roi_cascade_cost.png
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from pathlib import Path
from statistics import mean

import machine
import numpy as np
import studies
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from studies import command
from volumes import write_dataset

from nnunet_dyn.accounting import count_operations
from nnunet_dyn.architectures.roi import Box, enlarge, mask_boxes, volume
from nnunet_dyn.architectures.triplane import FILTERS
from nnunet_dyn.inference.predictor import Predictor
from nnunet_dyn.safety import BoxEvidence
from nnunet_dyn.trainers.roi_cascade import SCORES, TRI_PLANE, add_case, boxes_of_case, nearest_axes

PLANS = "nnUNetDynPlans"
TEMPLATES = Path(__file__).parents[1] / "nnunet_dyn" / "plans_templates"
NO_CLASSES = ("background", "ignore")
#: By row, the trainer of both stages.
FAMILIES = {"cascade": "nnUNetTrainerROICascade", "tri_plane": "nnUNetTrainerROICascadeTriPlane"}
IOU_NAMES = {str(SCORES[0]): f"score {SCORES[0]}, no margin", "as_used": "as used"}
ROW_NAMES = {"stock": "nnU-Net", "cascade": "ROI cascade", "tri_plane": "ROI cascade, tri-plane detector"}
#: What the part ``cost`` measures.
MEASURED = ("commands", "commands_without_mirroring", "volume", "target")
#: View and filter. The first is the detector of Section 3.1, the second what Section 4.7 ends with.
TABLE_8 = ["centre/none", "subregions/none", *(f"{view}/{name}" for view in ("mean", "std") for name in FILTERS)]
#: By the longest side in voxels at full resolution: the cubes of Table 1.
SIZES = {"small": 16, "medium": 32, "large": 64}


# --- accuracy ------------------------------------------------------------------------------------------------------


def prepare(args: argparse.Namespace) -> str:
    """Data, plans and preprocessed volumes; returns the name of the data set."""
    raw, preprocessed = Path(os.environ["nnUNet_raw"]), Path(os.environ["nnUNet_preprocessed"])
    name = args.dataset.name
    number = name[len("Dataset") :][:3]
    if not (raw / name).exists():
        studies.hold_out(args.dataset, raw / name, args.test)
    if not (preprocessed / name / "nnUNetPlans_3d_fullres").exists():
        command("nnUNetv2_plan_and_preprocess", "-d", number, "-c", "3d_fullres", "-np", 1, "-npfp", 1)
    plan_cascade(name, args)
    return name


def plan_cascade(name: str, args: argparse.Namespace) -> None:
    """Plans with both stages and 3d_fullres, and the detector's data."""
    raw, preprocessed = Path(os.environ["nnUNet_raw"]), Path(os.environ["nnUNet_preprocessed"])
    plans = preprocessed / name / f"{PLANS}.json"
    if not plans.exists():
        template = json.loads((TEMPLATES / "roi_cascade.json").read_text())
        if args.network is not None:
            template["arch_kwargs"] |= {"network_class": args.network} | args.network_options
        if args.detector_voxels is not None:
            template["configurations"]["3d_detect"]["whole_volume"]["max_voxels"] = args.detector_voxels
        (raw / "roi_cascade.json").write_text(json.dumps(template))
        command("nnunet_dyn", "plan", "-d", name, "-t", raw / "roi_cascade.json", "-o", PLANS)
        reduce(plans, args)
    if not (preprocessed / name / f"{PLANS}_3d_detect").exists():
        number = name[len("Dataset") :][:3]
        command("nnUNetv2_preprocess", "-d", number, "-plans_name", PLANS, "-c", "3d_detect", "-np", 1)


def reduce(plans: Path, args: argparse.Namespace) -> None:
    """Make nnU-Net's network and the segmentor smaller, in the same way."""
    content = json.loads(plans.read_text())
    for name in ("3d_fullres", "3d_roi"):
        configuration = content["configurations"][name]
        arguments = configuration["architecture"]["arch_kwargs"]
        if args.features:
            stages = range(arguments["n_stages"])
            arguments["features_per_stage"] = [min(args.max_features, args.features * 2**stage) for stage in stages]
        if args.batch:
            configuration["batch_size"] = args.batch
        if args.patch:
            configuration["patch_size"] = args.patch
    plans.write_text(json.dumps(content, indent=1))


def accuracy(args: argparse.Namespace) -> dict:
    name = prepare(args)
    length = f"{args.epochs}epochs_{args.iterations}iters"
    more, output = (["--disable_tta"], "held_out_without_mirroring") if args.disable_tta else ([], "held_out")
    description = json.loads(Path(os.environ["nnUNet_raw"], name, "dataset.json").read_text())
    classes = {str(value): label for label, value in description["labels"].items() if label not in NO_CLASSES}
    result = {"dataset": name, "classes": classes, "mirroring": not args.disable_tta, "rows": {}}
    for row in args.rows:
        if row == "stock":
            model = studies.train(name, "3d_fullres", f"nnUNetTrainer_{length}", PLANS)
            predict = ("nnUNetv2_predict_from_modelfolder", "-npp", 1, "-nps", 1, *more)
            found = studies.held_out(name, model, *predict, folder=output)
        else:
            longer = f"{args.detector_epochs}epochs_{args.iterations}iters"
            detector, model = train_cascade(name, FAMILIES[row], length, longer, row not in args.detector_only)
            found = {"detector": boxes_on_held_out(name, detector)}
            if model is not None:
                predict = ("nnunet_dyn", "predict", "--save-decisions", *more)
                found |= studies.held_out(name, model, *predict, folder=output)
                found["run"] = what_ran(model / output / "decisions")
        result["rows"][row] = found
        print(row, json.dumps(found), flush=True)
    return result


def ablation(args: argparse.Namespace) -> dict:
    """Views and filters of the tri-plane detector, as in Table 8, on the same preprocessed data."""
    name = prepare(args)
    folder = Path(os.environ["nnUNet_preprocessed"], name)
    result = {"dataset": name, "rows": {}}
    for row in args.rows:
        view, filtered = row.split("/")
        content = json.loads((folder / f"{PLANS}.json").read_text())
        content["plans_name"] = f"nnUNetTriPlane{view.title()}{filtered.title()}Plans"
        detector = content["configurations"]["3d_detect"]
        options = {"patch_size": detector["patch_size"], "view": view, "filter": filtered} | args.tri_plane
        detector["architecture"] = {
            "network_class_name": TRI_PLANE,
            "arch_kwargs": options,
            "_kw_requires_import": [],
        }
        (folder / f"{content['plans_name']}.json").write_text(json.dumps(content, indent=1))
        trainer = f"{FAMILIES['tri_plane']}_{args.detector_epochs}epochs_{args.iterations}iters"
        model = studies.train(name, "3d_detect", trainer, content["plans_name"])
        result["rows"][row] = boxes_on_held_out(name, model)
        print(row, json.dumps(result["rows"][row]), flush=True)
    return result


def train_cascade(
    name: str, trainer: str, length: str, detector_length: str, both: bool = True
) -> tuple[Path, Path | None]:
    """Train the detector and, for another length, the segmentor of its boxes; the model folders."""
    detector = studies.train(name, "3d_detect", f"{trainer}_{detector_length}", PLANS)
    if not both:
        return detector, None
    # Both stages need a trainer of the same name, length included.
    beside = detector.with_name(f"{trainer}_{length}__{PLANS}__3d_detect")
    if not beside.exists():
        beside.symlink_to(detector.name)
    return detector, studies.train(name, "3d_roi", f"{trainer}_{length}", PLANS)


def boxes_on_held_out(name: str, model: Path) -> dict:
    """What the calibrated boxes hold on the held-out cases, and how near they come to the targets' boxes.

    Returns:
        ``as_used`` and ``without_margin``: as ``calibration.json`` has them. ``iou``: see
        :func:`overlaps`. ``other_settings``: what one score and one margin for all classes would have held.
        ``calibration``: that of the validation cases.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    network, configuration = predictor.network.eval(), predictor.configuration_manager
    network.load_state_dict(predictor.list_of_parameters[0])
    fine = predictor.plans_manager.get_configuration(configuration.next_stage_names[0])
    labels = predictor.label_manager
    classes = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    names, channels = [str(entry) for entry in classes], network.classes
    nearest = abs(network.score_threshold[channels, None] - torch.tensor(SCORES)).argmin(1)  # in single precision
    scores = {entry: SCORES[place] for entry, place in zip(names, nearest.tolist(), strict=True)}
    margins = dict(zip(names, network.margin[channels].tolist(), strict=True))
    evidence, compared = BoxEvidence(), []
    raw, ending = Path(os.environ["nnUNet_raw"], name), predictor.dataset_json["file_ending"]
    for label_file in sorted((raw / "labelsTs").glob(f"*{ending}")):
        case = label_file.name.removesuffix(ending)
        images = sorted(map(str, (raw / "imagesTs").glob(f"{case}_????{ending}")))
        cases = [
            configured.preprocessor_class(verbose=False).run_case(
                images, str(label_file), predictor.plans_manager, configured, predictor.dataset_json
            )
            for configured in (configuration, fine)
        ]
        data, targets, properties = torch.from_numpy(np.asarray(cases[0][0])), np.asarray(cases[1][1][0]), cases[0][2]
        shape = data.shape[1:]
        found = boxes_of_case(network, data, configuration.patch_size, SCORES)
        nearest = nearest_axes(predictor.plans_manager, configuration, properties["spacing"])
        add_case(evidence, case, targets, classes, shape, found, nearest)
        scale = [size / coarse for size, coarse in zip(targets.shape, shape, strict=True)]
        for own, entry, label in zip(names, classes, channels, strict=True):
            boxes = {str(other): of_score[label] for other, of_score in found.items()}
            boxes["as_used"] = [enlarge(box, margins[own], shape) for box in found[scores[own]][label]]
            for target in mask_boxes(np.isin(targets, entry), gap=round(2 * max(scale))):
                side = max(stop - start for start, stop in target)
                best = {
                    kind: max((overlap(target, scaled(box, scale)) for box in each), default=0.0)
                    for kind, each in boxes.items()
                }
                compared.append((own, side, best))
    axes = len(configuration.patch_size)
    return {
        "as_used": evidence.measure(names, scores, margins).to_json(),
        "without_margin": evidence.measure(names, scores, dict.fromkeys(names, [0] * axes)).to_json(),
        "iou": overlaps(compared),
        "other_settings": [
            {"score_threshold": other, "margin": [more] * axes, "coverage": held.coverage, "ratio": held.ratio}
            for other in SCORES
            for more in (0, 1, 2)
            for held in [evidence.measure(names, dict.fromkeys(names, other), dict.fromkeys(names, [more] * axes))]
        ],
        "calibration": json.loads((model / "fold_0" / "calibration.json").read_text()),
    }


def scaled(box: Box, scale: Sequence[float]) -> Box:
    """``box`` in voxels of another size, not rounded."""
    return tuple((start * step, stop * step) for (start, stop), step in zip(box, scale, strict=True))


def overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    both = prod(max(0.0, min(b, d) - max(a, c)) for (a, b), (c, d) in zip(one, other, strict=True))
    return both / (volume(one) + volume(other) - both)


def overlaps(compared: Sequence[tuple[str, int, dict[str, float]]]) -> dict:
    """Mean box IoU by the size of the target and by its class, each with the number of targets.

    Args:
        compared: of each target its class, its longest side, and the best IoU of a box by score, without the margin,
            and as used.
    """
    limits, groups = [0, *SIZES.values()], {}
    for (size, upper), lower in zip(SIZES.items(), limits, strict=False):
        # What is larger than the last cube counts for it.
        groups[size] = [row for row in compared if lower < row[1] and (row[1] <= upper or upper == limits[-1])]
    for label in dict.fromkeys(row[0] for row in compared):
        groups[f"class {label}"] = [row for row in compared if row[0] == label]
    return {
        group: {"targets": len(rows)}
        | {kind: round(mean(row[2][kind] for row in rows), 4) for kind in (rows[0][2] if rows else ())}
        for group, rows in groups.items()
    }


def what_ran(decisions: Path) -> dict:
    """What the segmentor computed, beside what nnU-Net's network would; and in how many cases a box of either stage
    ends at the border of the image.

    Returns:
        ``tiles`` are nnU-Net's, of its sliding window; ``region_tiles`` those that lay on regions, which may be more.
        ``share_of_voxels``: of the crops that were run, to those of nnU-Net's tiles, each counted as often as it is
        computed.
    """
    tiles = on_regions = voxels = covered = macs = review = 0
    for file in (files := sorted(decisions.glob("*.json"))):
        found = json.loads(file.read_text())
        review += found["review"]
        for fold in found["folds"]:
            tiles, voxels = tiles + found["window"]["tiles"], voxels + found["window"]["voxels"]
            on_regions += len(fold["decisions"])
            for one in fold["decisions"]:
                covered += sum(map(volume, one["boxes"]))
                macs += one["macs"]
    return {
        "tiles": tiles,
        "region_tiles": on_regions,
        "share_of_voxels": round(covered / voxels, 4),
        "gmacs": macs / 1e9,
        "cases": len(files),
        "review": review,
    }


# --- cost ----------------------------------------------------------------------------------------------------------


def prepare_volumes(args: argparse.Namespace) -> str:
    """Volumes, plans and preprocessed data; returns the name of the data set."""
    raw, preprocessed = Path(os.environ["nnUNet_raw"]), Path(os.environ["nnUNet_preprocessed"])
    name = "Dataset997_GeneratedTargets"
    if not (raw / name / "dataset.json").exists():
        write_dataset(raw, args.size, 2, args.cases)
    if not (preprocessed / name / "nnUNetPlans_3d_fullres").exists():
        command("nnUNetv2_plan_and_preprocess", "-d", 997, "-c", "3d_fullres", "-np", 1, "-npfp", 1)
    plan_cascade(name, args)
    # Validation costs hours where nnU-Net's network takes every tile of a large volume.
    split = [{"train": ["train_0", "train_1"], "val": ["val_0"]}]
    (preprocessed / name / "splits_final.json").write_text(json.dumps(split))
    return name


def cost(args: argparse.Namespace) -> dict:
    """The commands on volumes of one size (CPU seconds), then the networks on volumes and targets that grow.

    nnU-Net's network and the segmentor are trained for one iteration only: what they cost does not depend on it.
    """
    name = prepare_volumes(args)
    stock = studies.train(name, "3d_fullres", "nnUNetTrainer_1epochs_1iters", PLANS)
    detector, segmentor = train_cascade(
        name, FAMILIES["cascade"], "1epochs_1iters", f"{args.detector_epochs}epochs_{args.iterations}iters"
    )
    result = {"detector": boxes_on_held_out(name, detector)}
    for measured, more in (("commands", ""), ("commands_without_mirroring", " --disable_tta")):
        kept = args.folder / f"{measured}.json"
        if measured in args.measure and not kept.exists():
            rows = {"stock": f"nnUNetv2_predict_from_modelfolder -npp 1 -nps 1 -m {stock}"}
            rows["cascade"] = f"nnunet_dyn predict -m {segmentor}"
            command(
                *(sys.executable, Path(__file__).with_name("seconds_per_case.py")),
                *(Path(os.environ["nnUNet_raw"], name, "imagesTs"), "--cases", args.cases + 1, "--repeats", 1),
                *("--cases-of", "stock", min(args.cases, args.stock_cases) + 1),
                *(word for row, line in rows.items() for word in ("--row", row, f"{line} -f 0 -device cpu{more}")),
                *("--output", kept),
            )
        if kept.exists():
            keys = ("command", "cpu_seconds_per_case", "cases", "peak_bytes")
            found = json.loads(kept.read_text())["rows"]
            result[measured] = {row: {key: one.get(key) for key in keys} for row, one in found.items()}
    networks = Networks(stock, detector, segmentor)
    for part in ("volume", "target"):
        kept = args.folder / f"{part}.json"
        if part in args.measure and not kept.exists():
            kept.write_text(json.dumps(growth(part, networks, args)))
        if kept.exists():
            result[part] = json.loads(kept.read_text())
    return result


def growth(part: str, networks: "Networks", args: argparse.Namespace) -> list[dict]:
    """A target of ``args.target``³ voxels in volumes of ``args.sizes``³, or one of ``args.targets``³ in ``args.size``³.

    The gates are the targets' boxes: no detector knows volumes of all these sizes; what it takes is added. The cascade
    is timed as ``nnunet_dyn predict`` runs it, between preprocessing and export. nnUNetv2_predict lays nnU-Net's tiles
    on the volume, and takes longer.
    """
    pairs = [(size, args.target) for size in args.sizes]
    if part == "target":
        pairs = [(args.size, side) for side in args.targets]
    rows = []
    for size, side in pairs:
        rows.append({"volume": size, "target": side} | networks.measure(size, side))
        print(part, json.dumps(rows[-1]), flush=True)
    return rows


class Networks:
    """The networks of trained models, timed on one core or more without reading, preprocessing and export.

    Args:
        mirroring: as predictions have it by default; the detector has none.
    """

    def __init__(self, stock: Path, detector: Path, segmentor: Path):
        options = {"device": "cpu", "first_stage": False}
        self.stock, self.detector, self.segmentor = (
            Predictor.from_folder(model, [0], **options) for model in (stock, detector, segmentor)
        )
        for one in (self.stock, self.detector):
            one.engine.load(0)
        self.copies = len(self.stock.mirrored_axes())
        tiles = {one: torch.zeros(1, 1, *one.configuration_manager.patch_size) for one in (self.stock, self.detector)}
        self.stock_macs = self.copies * count_operations(self.stock.network, tiles[self.stock].shape).total
        self.detector_macs = count_operations(self.detector.network, tiles[self.detector].shape).total
        self.stock_seconds = self.copies * seconds(partial(self.stock.network, tiles[self.stock]))
        self.detector_seconds = seconds(partial(self.detector.network, tiles[self.detector]))

    def measure(self, size: int, side: int) -> dict:
        """Tiles, multiply-accumulates and seconds on a volume of ``size``³ with one target of ``side``³ voxels.

        nnU-Net's network costs the same on every tile of its sliding window, so that one is timed and multiplied. The
        segmentor's tiles lie on the target; adding up its logits is in its seconds, and not in nnU-Net's.
        """
        tiles = self.tiles(self.stock, size)
        detector = self.tiles(self.detector, round(size * self.coarse))
        data = torch.zeros(1 + len(self.segmentor.label_manager.foreground_labels), *(size,) * 3)
        start = (size - side) // 2
        data[(1, *(slice(start, start + side),) * 3)] = 1
        taken = seconds(partial(self.segmentor.predict_logits_from_preprocessed_data, data), 1)
        (decided,) = self.segmentor.decided
        return {
            "stock": {
                "tiles": tiles,
                "gmacs": tiles * self.stock_macs / 1e9,
                "seconds": round(tiles * self.stock_seconds, 2),
            },
            "cascade": {
                "tiles": len(decided),
                "gmacs": (sum(one.macs for one in decided) + detector * self.detector_macs) / 1e9,
                "seconds": round(taken + detector * self.detector_seconds, 2),
                "detector_gmacs": detector * self.detector_macs / 1e9,
                "detector_seconds": round(detector * self.detector_seconds, 2),
            },
        }

    @property
    def coarse(self) -> float:
        """Voxels of the detector's grid to one of full resolution, along an axis."""
        fine, coarse = (one.configuration_manager.spacing[0] for one in (self.stock, self.detector))
        return fine / coarse

    @staticmethod
    def tiles(predictor: Predictor, size: int) -> int:
        """How many the sliding window over a volume of ``size``³ voxels has."""
        patch = predictor.configuration_manager.patch_size
        padded = tuple(max(size, side) for side in patch)
        return len(predictor._internal_get_sliding_window_slicers(padded))


def seconds(run: Callable[[], object], repeats: int = 2) -> float:
    """The shortest of some runs."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        with torch.inference_mode():
            run()
        taken.append(time.process_time() - start)
    return min(taken)


# --- pictures ------------------------------------------------------------------------------------------------------


def draw_accuracy(result: dict, path: Path) -> None:
    """Dice of each class by row, and the IoU of the detectors' boxes by size."""
    rows = {row: found for row, found in result["rows"].items() if "dice" in found}
    detectors = {row: found["detector"] for row, found in result["rows"].items() if "detector" in found}
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    dice, iou = figure.subplots(1, 2, width_ratios=(3, 2))
    for place, (row, found) in enumerate(rows.items()):
        labels = [*result["classes"].values(), "mean"]
        values = [*found["dice"].values(), found["mean_dice"]]
        at = np.arange(len(values)) + 0.8 * (place + 0.5) / len(rows) - 0.4
        dice.bar(at, values, 0.8 / len(rows), label=ROW_NAMES[row])
        dice.set_xticks(np.arange(len(values)), labels, rotation=30, ha="right")
    dice.set_ylabel("Dice in percent, held-out cases")
    dice.legend()
    for place, (row, found) in enumerate(detectors.items()):
        sizes = [size for size in SIZES if found["iou"][size]["targets"]]
        for kind, more in ((str(SCORES[0]), 0.0), ("as_used", 0.2)):
            at = np.arange(len(sizes)) + 0.4 * place - 0.3 + more
            values = [found["iou"][size][kind] for size in sizes]
            iou.bar(at, values, 0.2, label=f"{ROW_NAMES[row]}, {IOU_NAMES[kind]}")
        iou.set_xticks(np.arange(len(sizes)), [f"{size}, {found['iou'][size]['targets']}" for size in sizes])
    iou.set_ylabel("box IoU")
    iou.set_xlabel("size and number of targets")
    iou.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def draw_cost(result: dict, path: Path) -> None:
    """Multiply-accumulates and seconds as volumes grow, and as targets do."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    units = {"gmacs": "billion multiply-accumulates", "seconds": "CPU seconds of the networks"}
    for column, (part, label) in enumerate((("volume", "side of the volume"), ("target", "side of the target"))):
        for axes, (unit, name) in zip(panels[:, column], units.items(), strict=True):
            points = result.get(part, [])
            at = [row[part] for row in points]
            for row, marker in (("stock", "o"), ("cascade", "s")):
                axes.plot(at, [point[row][unit] for point in points], marker=marker, label=ROW_NAMES[row])
            detector = [point["cascade"][f"detector_{unit}"] for point in points]
            axes.plot(at, detector, ":", color="tab:orange", label="detector of it")
            axes.set(yscale="log", xlabel=f"{label} in voxels", ylabel=name, xticks=at)
            axes.grid(alpha=0.3)
    panels[0, 0].set_title("a target of fixed size in a volume that grows")
    panels[0, 1].set_title("a target that grows in a volume of fixed size")
    panels[0, 0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("accuracy", help="Dice, and what the detector's boxes hold, on held-out cases")
    part.set_defaults(run=accuracy, draw=draw_accuracy)
    part.add_argument("--picture", type=Path, help="PNG with plots")
    part.add_argument("--rows", nargs="+", choices=["stock", *FAMILIES], default=["stock", "cascade"])
    part.add_argument(
        "--detector-only", nargs="*", choices=FAMILIES, default=["tri_plane"], help="no segmentor for them"
    )
    part.add_argument("--disable-tta", action="store_true", help="predict held-out cases without mirroring")
    part.add_argument("--epochs", type=int, default=10, help="of nnU-Net's network and the segmentor")
    part.add_argument("--detector-epochs", type=int, default=20)
    part.add_argument("--iterations", type=int, default=50, help="an epoch (default: %(default)s)")
    part = parts.add_parser("ablation", help="views and filters of the tri-plane detector (Table 8)")
    part.set_defaults(run=ablation, picture=None)
    part.add_argument("--rows", nargs="+", choices=TABLE_8, default=TABLE_8, metavar="VIEW/FILTER")
    part.add_argument("--tri-plane", type=json.loads, default={}, help='its options, such as {"backbone": "resnet18"}')
    part.add_argument("--detector-epochs", type=int, default=20)
    part.add_argument("--iterations", type=int, default=50, help="an epoch (default: %(default)s)")
    part = parts.add_parser("cost", help="seconds, tiles and operations on generated volumes")
    part.set_defaults(run=cost, draw=draw_cost)
    part.add_argument("--picture", type=Path, help="PNG with plots")
    part.add_argument("--size", type=int, default=256, help="voxels of a side of the volumes (default: %(default)s)")
    part.add_argument("--cases", type=int, default=1, help="beside a small one, which takes the start-up out")
    part.add_argument("--stock-cases", type=int, default=1, help="nnU-Net predicts no more (default: %(default)s)")
    part.add_argument("--sizes", type=int, nargs="+", default=[128, 192, 256, 320], help="of growing volumes")
    part.add_argument("--target", type=int, default=48, help="voxels of a side of the target in them")
    part.add_argument("--targets", type=int, nargs="+", default=[16, 32, 64, 128], help="that grow in --size")
    part.add_argument("--measure", nargs="*", choices=MEASURED, default=list(MEASURED))
    part.add_argument("--detector-epochs", type=int, default=2)
    part.add_argument("--iterations", type=int, default=30, help="an epoch of the detector (default: %(default)s)")
    for one in (parts.choices["accuracy"], parts.choices["ablation"]):
        one.add_argument("--dataset", type=Path, required=True, help="raw data set with a configuration 3d_fullres")
        one.add_argument("--test", type=int, default=6, help="held-out cases, if it has none (default: %(default)s)")
    for one in parts.choices.values():
        one.add_argument("folder", type=Path, help="where everything is kept")
        one.add_argument("--output", type=Path, help="JSON with the numbers")
        one.add_argument("--network", help="dotted path of the segmentor's network (default: the template's)")
        one.add_argument("--network-options", type=json.loads, default={}, help='of it, such as {"encoder": "v2s"}')
        one.add_argument("--detector-voxels", type=int, help="that its patch has at most (default: the template's)")
        one.add_argument("--features", type=int, help="width of the first stage (default: the plans')")
        one.add_argument("--max-features", type=int, default=128)
        one.add_argument("--batch", type=int, help="patches in a batch (default: the plans')")
        one.add_argument("--patch", type=int, nargs=3, help="voxels per axis (default: the plans')")
    args = parser.parse_args()
    if args.network_options and args.network is None:
        parser.error("--network-options are those of --network")
    own = {"part", "folder", "output", "picture", "rows", "run", "draw", "detector_only", "measure", "disable_tta"}
    settings = {
        key: value.name if isinstance(value, Path) else value for key, value in vars(args).items() if key not in own
    }
    studies.use(args.folder, settings)
    result = {"machine": machine.describe(), "settings": settings} | args.run(args)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    if args.picture:
        args.draw(result, args.picture)


if __name__ == "__main__":
    main()
