"""`nnunet_dyn predict` beside nnU-Net's own command: the same model, the same images, the same machine, one run.

Seconds per case are (time for n cases - time for 1) / (n - 1); the rest of the time for one case is start-up. CPU
seconds are those of all processes together, which other jobs on the machine change less. The peak is the largest sum of
the proportional set sizes of the process and its children, sampled; Linux only. The network is untrained, so every
class wins somewhere: cropping to the foreground saves nothing here. Example:

    python benchmarks/predict.py --classes 13 --size 300 300 200 --patch 64 112 64 --output predict.json
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import machine
import numpy as np
import SimpleITK as sitk
import torch
from commands import measure
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_dyn.demo import generate_case
from nnunet_dyn.profiling import planned_configuration

STOCK = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder as main; main()"
OURS = "import sys; from nnunet_dyn.cli import main; sys.exit(main())"
FORWARD = (
    "import sys, torch; from pathlib import Path; from nnunet_dyn.inference.model_folder import load_model\n"
    "model = load_model(Path(sys.argv[1]))\n"
    "with torch.inference_mode(): model.network.eval()(torch.zeros(1, 1, *model.configuration.patch_size))"
)
LINEAR = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}


def write_model(folder: Path, patch: list[int], spacing: list[float], classes: int, width: int) -> None:
    """A model folder as nnU-Net leaves it, of the network that it would plan for ``patch``, untrained."""
    configuration = planned_configuration(tuple(patch))
    kwargs = configuration["architecture"]["arch_kwargs"]
    kwargs["features_per_stage"] = [features * width // 32 for features in kwargs["features_per_stage"]]
    name = "resample_data_or_seg_to_shape"
    configuration |= {
        "spacing": spacing,
        "data_identifier": "nnUNetPlans",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": name,
        "resampling_fn_data_kwargs": {**LINEAR, "order": 3},
        "resampling_fn_seg": name,
        "resampling_fn_seg_kwargs": {**LINEAR, "is_seg": True},
        "resampling_fn_probabilities": name,
        "resampling_fn_probabilities_kwargs": LINEAR,
    }
    plans = {
        "dataset_name": "Dataset999_Benchmark",
        "plans_name": "nnUNetPlans",
        "configurations": {"3d_fullres": configuration},
        "label_manager": "LabelManager",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {"0": {}},
    }
    labels = {"background": 0, **{f"label{n}": n for n in range(1, classes)}}
    dataset = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"}
    manager = PlansManager(plans)
    torch.manual_seed(0)
    network = nnUNetTrainer.build_network_architecture(
        manager, manager.get_configuration("3d_fullres"), 1, classes, enable_deep_supervision=False
    )
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    checkpoint = {
        "network_weights": network.state_dict(),
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "3d_fullres"},
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20, help="n (default: %(default)s)")
    parser.add_argument("--size", type=int, nargs=3, default=(100, 150, 150), metavar="N", help="voxels, z y x")
    parser.add_argument("--patch", type=int, nargs=3, default=(64, 112, 64), metavar="N")
    parser.add_argument("--classes", type=int, default=13)
    parser.add_argument("--width", type=int, default=32, help="channels of the first stage (default: %(default)s)")
    parser.add_argument("--coarser", type=float, default=1.5, help="network's spacing / image's (default: %(default)s)")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--workers", type=int, default=3, help="nnU-Net's -npp and -nps (default: %(default)s, as its)")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    case = generate_case(0, 0, args.size)
    result = {"settings": {key: value for key, value in vars(args).items() if key != "output"}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", args.patch, [s * args.coarser for s in case.spacing], args.classes, args.width)
        for count in (1, args.cases):
            (folder / f"images_{count}").mkdir()
            for number in range(count):
                image = sitk.GetImageFromArray(case.image[0])
                image.SetSpacing(case.spacing[::-1])
                sitk.WriteImage(image, str(folder / f"images_{count}" / f"case{number:03d}_0000.nii.gz"))
        forward = measure([sys.executable, "-c", FORWARD, folder / "model"])[2]
        for who, code, command, more in (
            ("stock", STOCK, [], ["-npp", args.workers, "-nps", args.workers]),
            ("ours", OURS, ["predict"], ["--precision", args.precision]),
        ):
            seconds, cpu, peaks = {}, {}, {}
            for count in (1, args.cases):
                flags = [
                    "-m",
                    folder / "model",
                    "-f",
                    0,
                    "-i",
                    folder / f"images_{count}",
                    "-o",
                    folder / f"{who}_{count}",
                ]
                seconds[count], cpu[count], peaks[count] = measure(
                    [sys.executable, "-c", code, *command, *flags, "-device", "cpu", *more]
                )
            per_case = (seconds[args.cases] - seconds[1]) / (args.cases - 1)
            result[who] = {
                "seconds_per_case": round(per_case, 2),
                "seconds_startup": round(seconds[1] - per_case, 2),
                "cpu_seconds_per_case": round((cpu[args.cases] - cpu[1]) / (args.cases - 1), 2),
                "seconds": {str(count): round(value, 2) for count, value in seconds.items()},
                "peak_bytes": max(peaks.values()),
                "peak_bytes_1": peaks[1],
                "peak_bytes_above_forward": max(peaks.values()) - forward,
            }
            print(who, json.dumps(result[who]), flush=True)
        segmentations = [
            sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{who}_1" / "case000.nii.gz")))
            for who in ("stock", "ours")
        ]
    result["agreement"] = float(np.mean(segmentations[0] == segmentations[1]))
    result["labels"] = np.unique(segmentations[0]).tolist()
    result["forward_peak_bytes"] = forward
    result["ratios"] = {
        key: round(result["ours"][key] / result["stock"][key], 3)
        for key in (
            "seconds_per_case",
            "cpu_seconds_per_case",
            "seconds_startup",
            "peak_bytes",
            "peak_bytes_above_forward",
        )
    }
    result["shape"], result["machine"] = list(case.image.shape[1:]), machine.describe()
    print(json.dumps({key: result[key] for key in ("ratios", "agreement", "shape")}))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
