"""`nnunet_dyn predict`: nnU-Net's prediction command in less memory, and the same segmentation."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_dyn import __version__
from nnunet_dyn.errors import UsageError
from nnunet_dyn.inference.engines import ENGINES, MANIFEST, check_engine, check_installed

if TYPE_CHECKING:
    from nnunet_dyn.inference import Outcome, Predictor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", metavar="DIR", required=True, type=Path, help="images, named as case_0000.nii.gz")
    parser.add_argument("-o", metavar="DIR", required=True, type=Path, help="where the segmentations go")
    model = parser.add_argument_group("the model: a data set's, as for nnUNetv2_predict, or a model folder")
    model.add_argument("-d", metavar="DATASET", help="name or number")
    model.add_argument("-c", metavar="CONFIG", help="such as 3d_fullres")
    model.add_argument("-p", metavar="PLANS", help="(default: nnUNetPlans)")
    model.add_argument("-tr", metavar="TRAINER", help="(default: nnUNetTrainer)")
    model.add_argument(
        "-m",
        metavar="DIR",
        type=Path,
        help="model folder, or an exported one",
    )
    model.add_argument(
        "-f", metavar="FOLD", nargs="+", type=fold, help="folds (default: 0 1 2 3 4; of an exported model, all)"
    )
    model.add_argument("-chk", metavar="NAME", default="checkpoint_final.pth", help="checkpoint (default: %(default)s)")
    how = parser.add_argument_group("how to predict")
    how.add_argument(
        "--engine", metavar="NAME", help=f"{', '.join(ENGINES)} (default: torch; of an exported model, its own)"
    )
    how.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16", "int8"),
        help="(default: nnU-Net's on that device; of an exported model, its own)",
    )
    how.add_argument("-device", choices=("cpu", "cuda", "mps"), help="(default: cuda where there is one)")
    how.add_argument("--threads", type=int, metavar="N", help="on the CPU (default: every core)")
    how.add_argument("-step_size", type=float, default=0.5, metavar="X", help="of the patch (default: %(default)s)")
    how.add_argument("--disable_tta", action="store_true", help="no mirrored copies")
    how.add_argument("--not_on_device", action="store_true", help="keep the logits off the GPU")
    how.add_argument(
        "-prev_stage_predictions",
        metavar="DIR",
        type=Path,
        help="of a cascade's first stage, instead of its model beside this one",
    )
    what = parser.add_argument_group("what to predict and to write")
    what.add_argument("--save_probabilities", action="store_true", help="for nnUNetv2_ensemble")
    what.add_argument(
        "--save-decisions",
        action="store_true",
        help="of a network that decides what it computes: what it decided, in decisions/CASE.json",
    )
    what.add_argument(
        "--decision-pictures", action="store_true", help="the same drawn, in decisions/CASE.png, beside the JSON"
    )
    what.add_argument("--continue_prediction", action="store_true", help="leave out cases that are there")
    what.add_argument("-num_parts", type=int, default=1, metavar="N", help="calls that share the cases")
    what.add_argument("-part_id", type=int, default=0, metavar="N", help="which of them this one is, from 0")
    what.add_argument("--json", action="store_true", help="print the outcome as JSON; progress is on standard error")
    what.add_argument("--verbose", action="store_true", help="nnU-Net's messages, and where an error came from")
    what.add_argument("--disable_progress_bar", action="store_true")
    for flag in ("-npp", "-nps"):
        what.add_argument(flag, type=int, metavar="N", help="taken and not needed: there are no worker processes")


def fold(text: str) -> int | str:
    return text if text == "all" else int(text)


def run(args: argparse.Namespace) -> int:
    """Predict every case; 1 if one of them failed."""
    start = time.perf_counter()
    # What needs neither torch nor nnU-Net first: a wrong word should not cost seconds.
    engine = args.engine or ("openvino" if args.precision == "int8" else "torch")  # int8: of an exported model
    check_engine(engine, args.precision, args.device or ("cuda" if args.precision == "fp16" else "cpu"))
    if args.m is None or not (args.m / MANIFEST).is_file():
        check_installed(args.engine, otherwise=", or take --engine torch")
    if not args.i.is_dir():
        raise UsageError(f"-i got {args.i}; expected a folder with images.")
    if not 0 <= args.part_id < args.num_parts:
        raise UsageError(f"Got -part_id {args.part_id} -num_parts {args.num_parts}; expected 0 to num_parts - 1.")
    folder = _model_folder(args)

    from nnunet_dyn.inference import Predictor

    with redirect_stdout(sys.stderr):  # standard output is for the result
        predictor = Predictor.from_folder(
            folder,
            args.f or (None if (folder / MANIFEST).is_file() else (0, 1, 2, 3, 4)),
            args.chk,
            engine=args.engine,
            precision=args.precision,
            device=args.device,
            threads=args.threads,
            tile_step_size=args.step_size,
            use_mirroring=not args.disable_tta,
            perform_everything_on_device=not args.not_on_device,
            verbose=args.verbose,
            progress=not args.disable_progress_bar,
            first_stage=args.prev_stage_predictions is None,
        )
        if (before := predictor.first_stage) is not None:
            folds = " ".join(map(str, before.folds))
            other = "" if before.checkpoint == predictor.checkpoint else f" -chk {before.checkpoint}"
            print(f"first stage: {before.folder}, -f {folds}{other}", file=sys.stderr, flush=True)
        ready = time.perf_counter()
        outcomes = predictor.predict_files(
            args.i,
            args.o,
            save_probabilities=args.save_probabilities,
            overwrite=not args.continue_prediction,
            previous_stage=args.prev_stage_predictions,
            num_parts=args.num_parts,
            part_id=args.part_id,
            save_decisions=args.save_decisions or args.decision_pictures,
            decision_pictures=args.decision_pictures,
            report=_report_case,
        )
    summary = _summary(predictor, folder, outcomes, ready - start, time.perf_counter() - ready)
    print(json.dumps(summary, indent=1) if args.json else _text(summary))
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        print(f"failed: {outcome.case}: {outcome.error}", file=sys.stderr)
    return 1 if failed else 0


def _model_folder(args: argparse.Namespace) -> Path:
    of_dataset = {"-d": args.d, "-c": args.c, "-p": args.p, "-tr": args.tr}
    if args.m is not None:
        if given := [flag for flag, value in of_dataset.items() if value is not None]:
            raise UsageError(f"Got -m beside {', '.join(given)}; expected one of the two ways to name a model.")
        return args.m
    if args.d is None or args.c is None:
        raise UsageError("Got neither -m nor both -d and -c; expected a model folder, or a data set and configuration.")
    results = os.environ.get("nnUNet_results", "")
    if not os.path.isdir(results):
        raise UsageError(
            f"nnUNet_results is {results or 'not set'}; expected a folder. Set it, or name a model with -m."
        )
    from nnunetv2.utilities.file_path_utilities import get_output_folder

    try:
        folder = get_output_folder(args.d, args.tr or "nnUNetTrainer", args.p or "nnUNetPlans", args.c)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"No data set {args.d!r}: {error}") from error
    if not os.path.isdir(folder):
        there = sorted(path.name for path in Path(folder).parent.glob("*__*__*"))
        raise UsageError(f"No model {folder}; there are: {', '.join(there) or 'none'}. Check -tr, -p and -c.")
    return Path(folder)


def _report_case(number: int, total: int, outcome: Outcome) -> None:
    result = f"failed: {outcome.error}" if outcome.error else f"{sum(outcome.seconds.values()):.1f} s"
    if outcome.decisions is not None:
        totals = outcome.decisions.totals()
        shares = [f"{100 * share:.0f} % {action}" for action, share in totals["shares"].items()]
        result += f"; {', '.join(shares) or 'nothing to segment'}" + (
            f"; review {totals['review']}" if totals["review"] else ""
        )
        result += "".join(f"; {warning}" for warning in outcome.decisions.warnings)
    print(f"[{number}/{total}] {outcome.case}: {result}", file=sys.stderr, flush=True)


def _summary(predictor: Predictor, folder: Path, outcomes: list[Outcome], startup: float, wall: float) -> dict:
    """What happened, in seconds and bytes, ready for JSON."""
    from nnunet_dyn.inference.predictor import STAGES

    return {
        "nnunet_dyn": __version__,
        "model": str(folder),
        "trainer": predictor.trainer_name,
        "engine": predictor.engine.name,
        "precision": predictor.engine.precision,
        "device": predictor.device.type,
        "threads": predictor.engine.threads,
        "folds": predictor.engine.folds,
        "first_stage": predictor.first_stage
        and {
            "model": str(predictor.first_stage.folder),
            "folds": list(predictor.first_stage.folds),
            "checkpoint": predictor.first_stage.checkpoint,
        },
        "failed": sum(outcome.error is not None for outcome in outcomes),
        "seconds_startup": round(startup, 3),
        "seconds": round(wall, 3),
        "seconds_by_stage": {
            stage: round(sum(outcome.seconds.get(stage, 0) for outcome in outcomes), 3) for stage in STAGES
        },
        "peak_memory_bytes": peak_memory(),
        "cases": [
            {
                "case": outcome.case,
                "output": None if outcome.error else str(outcome.output),
                "seconds": {stage: round(value, 3) for stage, value in outcome.seconds.items()},
                "error": outcome.error,
                "decisions": outcome.decisions
                and {"review": outcome.decisions.review, "warnings": list(outcome.decisions.warnings)}
                | outcome.decisions.totals(),
            }
            for outcome in outcomes
        ],
    }


def _text(summary: dict) -> str:
    cases = len(summary["cases"])
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in summary["seconds_by_stage"].items())
    peak = summary["peak_memory_bytes"]
    return (
        f"{cases} case{'s' * (cases != 1)} in {summary['seconds']:.1f} s, {summary['failed']} failed; "
        f"{summary['engine']} {summary['precision']} on {summary['device']}\n"
        f"{stages}; start-up {summary['seconds_startup']:.1f} s\n"
        f"peak memory {'unknown' if peak is None else f'{peak / 1e9:.2f} GB'}"
    )


def peak_memory() -> int | None:
    """Bytes of main memory that this process had at most, or ``None`` where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
