"""`nnunet_dyn demo`: from generated data to a Dice table and a picture, with nnU-Net's own commands."""

import argparse
import io
import math
import os
import re
import shutil
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from nnunet_dyn import _register
from nnunet_dyn.demo.generator import check_size, generate_dataset
from nnunet_dyn.demo.results import (
    dice_per_case,
    draw_overlay,
    foreground_names,
    mean_dice,
    read_json,
    write_json,
    write_table,
)
from nnunet_dyn.demo.steps import Steps, minutes
from nnunet_dyn.errors import UsageError

DEFAULT_OUTPUT = "demo_output"
# The cheapest iteration of the EfficientNet family on a CPU.
DEFAULT_TRAINER = "nnUNetTrainerEffB0"
DEFAULT_EPOCHS = 12
DEFAULT_ITERATIONS = 25
DEFAULT_SIZE = (48, 72, 72)
# Gigabytes that nnU-Net's planner may plan for. Its default of 8 takes the whole volume as a patch, which costs
# several times the minutes on a CPU.
MEMORY_TARGET = 0.25
# nnU-Net's cross-validation makes five folds.
MINIMUM_TRAINING_CASES = 5
# Marks a folder as the demo's, so that --overwrite never deletes anything else.
RECORD = "demo.json"
LENGTH_SUFFIX = re.compile(r"_\d+epochs?(_\d+iters)?$|_\d+iters$")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `nnunet_dyn demo`."""
    parser.add_argument(
        "-o", "--output", default=DEFAULT_OUTPUT, metavar="DIR", help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete DIR first if it is an earlier demo's")
    parser.add_argument(
        "-tr", "--trainer", default=DEFAULT_TRAINER, help="any trainer that nnU-Net finds (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, metavar="N", help=f"epochs of the training (default: {DEFAULT_EPOCHS})")
    parser.add_argument(
        "--iterations", type=int, metavar="N", help=f"training iterations per epoch (default: {DEFAULT_ITERATIONS})"
    )
    parser.add_argument(
        "-c", "--configuration", choices=("3d_fullres", "2d"), default="3d_fullres", help="(default: %(default)s)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the generated data; nnU-Net does not seed its training (default: 0)"
    )
    parser.add_argument("--train-cases", type=int, default=10, metavar="N", help="5 or more (default: %(default)s)")
    parser.add_argument("--test-cases", type=int, default=3, metavar="N", help="held out (default: %(default)s)")
    parser.add_argument(
        "--size",
        type=int,
        nargs=3,
        default=DEFAULT_SIZE,
        metavar=("Z", "Y", "X"),
        help=f"voxels of a case, which vary by a tenth (default: {' '.join(map(str, DEFAULT_SIZE))})",
    )


@dataclass(frozen=True)
class Layout:
    """Where everything lies under the output folder."""

    output: Path

    @property
    def raw(self) -> Path:
        return self.output / "nnUNet_raw"

    @property
    def preprocessed(self) -> Path:
        return self.output / "nnUNet_preprocessed"

    @property
    def results(self) -> Path:
        return self.output / "nnUNet_results"

    @property
    def predictions(self) -> Path:
        return self.output / "predictions"

    @property
    def logs(self) -> Path:
        return self.output / "logs"

    @property
    def record(self) -> Path:
        return self.output / RECORD

    @property
    def dice(self) -> Path:
        return self.output / "dice.json"

    @property
    def table(self) -> Path:
        return self.output / "dice.csv"

    @property
    def picture(self) -> Path:
        return self.output / "overlay.png"


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns 0.

    Raises:
        UsageError: bad options, or an output folder that must not be touched.
        JobError: one of nnU-Net's commands failed. Nothing is deleted; `demo.json` says that the run failed.
    """
    _check_numbers(args)
    _check_device(args.device)
    trainer = _trainer_with_length(args.trainer, args.epochs, args.iterations)
    _check_trainer(trainer)
    layout = Layout(Path(args.output).absolute())
    _prepare_output(layout, args.overwrite)

    settings = {
        "synthetic_data": True,
        "trainer": trainer,
        "configuration": args.configuration,
        "device": args.device,
        "seed": args.seed,
        "training_cases": args.train_cases,
        "test_cases": args.test_cases,
        "size": list(args.size),
    }
    write_json(layout.record, {"status": "running", **settings})
    try:
        steps, dice = _run_steps(args, trainer, layout, settings)
    except BaseException:
        write_json(layout.record, {"status": "failed", **settings})
        raise
    write_json(layout.record, {"status": "finished", **settings, "seconds": steps.seconds})
    _print_results(args, trainer, layout, steps, dice)
    return 0


def _run_steps(
    args: argparse.Namespace, trainer: str, layout: Layout, settings: dict
) -> tuple[Steps, dict[str, dict[str, float]]]:
    print(
        "This demo trains on SYNTHETIC data: generated volumes that look like CT, not images of patients.\n"
        f"Its scores say that the installation works, and nothing about clinical data. Output: {layout.output}\n",
        flush=True,
    )
    steps = Steps(6, layout.logs, _environment(layout))

    steps.begin("generate data")
    dataset = generate_dataset(layout.raw, args.train_cases, args.test_cases, args.seed, args.size)
    dataset_id = dataset.name[len("Dataset") :].split("_")[0]
    steps.end(f"{args.train_cases} training and {args.test_cases} held-out cases")

    steps.begin("plan and preprocess")
    steps.command(
        "nnUNetv2_plan_and_preprocess",
        [
            "-d",
            dataset_id,
            "-c",
            args.configuration,
            "-gpu_memory_target",
            MEMORY_TARGET,
            "-npfp",
            1,
            "-np",
            1,
            "--verify_dataset_integrity",
        ],
    )
    plans_file = layout.preprocessed / dataset.name / "nnUNetPlans.json"
    plan = read_json(plans_file)["configurations"][args.configuration]
    patch = "x".join(map(str, plan["patch_size"]))
    steps.end(f"patch {patch}, batch {plan['batch_size']} (small because of -gpu_memory_target {MEMORY_TARGET})")

    steps.begin(f"train {trainer}")
    model = ["-tr", trainer, "-device", args.device]
    steps.command("nnUNetv2_train", [dataset_id, args.configuration, 0, *model], _TrainingProgress(trainer))
    steps.end("fold 0, with nnU-Net's validation on its held-back cases")

    steps.begin("predict")
    steps.command(
        "nnUNetv2_predict",
        [
            "-i",
            dataset / "imagesTs",
            "-o",
            layout.predictions,
            "-d",
            dataset_id,
            "-c",
            args.configuration,
            "-f",
            0,
            *model,
            "-npp",
            1,
            "-nps",
            1,
        ],
        _prediction_progress,
    )
    steps.end(f"{args.test_cases} held-out cases, with nnU-Net's test-time mirroring")

    steps.begin("evaluate")
    summary_file = layout.output / "summary.json"
    steps.command(
        "nnUNetv2_evaluate_folder",
        [
            dataset / "labelsTs",
            layout.predictions,
            "-djfile",
            dataset / "dataset.json",
            "-pfile",
            plans_file,
            "-o",
            summary_file,
            "-np",
            1,
        ],
    )
    dice = dice_per_case(read_json(summary_file))
    steps.end()

    steps.begin("draw")
    draw_overlay(dataset, layout.predictions, dice, trainer, layout.picture)
    write_table(layout.table, dice)
    write_json(layout.dice, {**settings, "mean": mean_dice(dice), "cases": dice})
    steps.end()
    return steps, dice


def _check_numbers(args: argparse.Namespace) -> None:
    check_size(args.size)
    for option, value, least in (
        ("--epochs", args.epochs, 1),
        ("--iterations", args.iterations, 1),
        ("--train-cases", args.train_cases, MINIMUM_TRAINING_CASES),
        ("--test-cases", args.test_cases, 1),
        ("--seed", args.seed, 0),
    ):
        if value is not None and value < least:
            raise UsageError(f"{option} is {value}. Expected {least} or more.")


def _check_device(device: str) -> None:
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UsageError("--device cuda, but PyTorch finds no CUDA device here. Use --device cpu.")


def _trainer_with_length(trainer: str, epochs: int | None, iterations: int | None) -> str:
    """The name that nnU-Net is given: with the demo's length, unless the trainer brings its own."""
    if LENGTH_SUFFIX.search(trainer):
        if epochs is not None or iterations is not None:
            raise UsageError(
                f"{trainer} says its length already. Give either that or --epochs and --iterations, not both."
            )
        return trainer
    return f"{trainer}_{epochs or DEFAULT_EPOCHS}epochs_{iterations or DEFAULT_ITERATIONS}iters"


def _check_trainer(trainer: str) -> None:
    """Find the trainer before minutes are spent on preprocessing."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunet_dyn.trainers import suggest

    before = os.environ.get(_register.VARIABLE)
    os.environ[_register.VARIABLE] = _register.with_trainer_directory()
    try:
        # nnU-Net reports every folder and module that it searches.
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            found = recursive_find_trainer_class_by_name(trainer)
    except RuntimeError:
        found = None
    finally:
        if before is None:
            del os.environ[_register.VARIABLE]
        else:
            os.environ[_register.VARIABLE] = before
    if found is None:
        close = suggest(trainer)
        raise UsageError(
            f"No trainer is called {trainer}. "
            + (f"Did you mean {' or '.join(close)}?" if close else f"Expected a name such as {DEFAULT_TRAINER}.")
        )


def _prepare_output(layout: Layout, overwrite: bool) -> None:
    output = layout.output
    try:
        if output.is_dir() and any(output.iterdir()):
            if not overwrite:
                raise UsageError(
                    f"{output} exists and is not empty. Give another folder with --output, or --overwrite."
                )
            if not layout.record.is_file():
                raise UsageError(
                    f"{output} was not written by this demo (it has no {RECORD}), so --overwrite does not delete it. "
                    "Give another folder with --output."
                )
            shutil.rmtree(output)
        layout.logs.mkdir(parents=True)
    except OSError as error:
        raise UsageError(
            f"Cannot write to {output}: {error.strerror}. Give a folder that can be written with --output."
        ) from error


def _environment(layout: Layout) -> dict[str, str]:
    """The environment of nnU-Net's commands: this demo's folders, few processes, the trainers registered."""
    environment = dict(os.environ)
    environment.update(
        nnUNet_raw=str(layout.raw),
        nnUNet_preprocessed=str(layout.preprocessed),
        nnUNet_results=str(layout.results),
        nnUNet_n_proc_DA="1",
        nnUNet_def_n_proc="1",
        # Compiling takes longer than so short a training gains from it.
        nnUNet_compile="f",
        nnUNet_wandb_enabled="0",
        PYTHONUNBUFFERED="1",
        # nnU-Net draws with matplotlib; a display may be configured but absent.
        MPLBACKEND="Agg",
    )
    # nnU-Net takes every core for the network and starts augmentation workers besides. Threads that spin while they
    # wait then take the cores from each other: measured up to 2.5 times slower on a busy machine.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment[_register.VARIABLE] = _register.with_trainer_directory(environment)
    return environment


class _TrainingProgress:
    """Turns nnU-Net's training log into 'epoch 4 of 12, about 2:10 left, …'."""

    def __init__(self, trainer: str) -> None:
        length = re.search(r"_(\d+)epochs?", trainer)
        self.total = int(length.group(1)) if length else None
        self.scores = ""
        self.started = 0.0

    def __call__(self, line: str) -> str | None:
        epoch = re.search(r": Epoch (\d+)\s*$", line)
        if epoch:
            return self._epoch(int(epoch.group(1)))
        if "Pseudo dice" in line:
            values = re.findall(r"(?<![\w.])(?:nan|\d\.\d+)", line.split("Pseudo dice", 1)[1])
            self.scores = f", patch Dice {' '.join(f'{float(value):.2f}' for value in values)}"
        if "Training done" in line:
            return f"all epochs done{self.scores}; validating whole cases"
        return None

    def _epoch(self, done: int) -> str:
        if not done:
            self.started = time.monotonic()
        if self.total is None:
            return f"epoch {done + 1}{self.scores}"
        left = f", about {minutes((time.monotonic() - self.started) / done * (self.total - done))} left" if done else ""
        return f"epoch {done + 1} of {self.total}{left}{self.scores}"


def _prediction_progress(line: str) -> str | None:
    case = re.match(r"Predicting (\w+):$", line)
    return case.group(1) if case else None


def _print_results(
    args: argparse.Namespace, trainer: str, layout: Layout, steps: Steps, dice: dict[str, dict[str, float]]
) -> None:
    means = mean_dice(dice)
    lines = ["", f"Dice on the {len(dice)} held-out synthetic cases ({trainer}, nnU-Net's own evaluation)"]
    lines.append(f"{'label':<14}{'mean':>8}{'worst':>8}{'best':>8}{'cases':>8}")
    for name in foreground_names():
        scores = [case[name] for case in dice.values() if not math.isnan(case[name])]
        values = (means[name], min(scores), max(scores)) if scores else ()
        columns = "".join(f"{value:8.3f}" for value in values) or f"{'-':>8}" * 3
        lines.append(f"{name:<14}{columns}{len(scores):>8}")
    lines += ["", f"Table    {layout.table}", f"Picture  {layout.picture}", f"Time     {minutes(steps.elapsed)}"]
    print("\n".join(lines))
    print(_own_data(args, trainer, layout))


def _own_data(args: argparse.Namespace, trainer: str, layout: Layout) -> str:
    dataset = next(layout.raw.iterdir())
    name = LENGTH_SUFFIX.sub("", trainer)
    device = f" -device {args.device}" if args.device != "cuda" else ""
    c = args.configuration
    note = "leave out -device cpu where there is a GPU" if device else "add -device cpu where there is no GPU"
    return f"""
The same on your own data (1 is the number of your data set; {note}):
  export nnUNet_raw=/data/raw nnUNet_preprocessed=/data/preprocessed nnUNet_results=/data/results
  # put imagesTr, labelsTr and dataset.json into $nnUNet_raw/Dataset001_Name, as in
  # {dataset}
  nnUNetv2_plan_and_preprocess -d 1 -c {c} --verify_dataset_integrity
  nnUNetv2_train 1 {c} 0 -tr {name}{device}
  nnUNetv2_predict -i IMAGES -o PREDICTIONS -d 1 -c {c} -f 0 -tr {name}{device}
  nnUNetv2_evaluate_folder LABELS PREDICTIONS -djfile PREDICTIONS/dataset.json -pfile PREDICTIONS/plans.json
nnU-Net trains 1000 epochs by default, hours to days on a GPU; {name}_100epochs is a shorter one."""
