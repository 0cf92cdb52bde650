"""`nnunet_dyn export`: a trained model as files of OpenVINO or ONNX Runtime, checked before they are written."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from nnunet_dyn.errors import UsageError
from nnunet_dyn.inference.engines import CPU_PRECISIONS, check_engine, check_installed
from nnunet_dyn.predict import fold


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", metavar="DIR", required=True, type=Path, help="model folder that nnUNetv2_train wrote")
    parser.add_argument("-o", metavar="DIR", required=True, type=Path, help="a new folder for the exported model")
    parser.add_argument("-f", metavar="FOLD", nargs="+", type=fold, help="folds (default: those that are there)")
    parser.add_argument("-chk", metavar="NAME", default="checkpoint_final.pth", help="(default: %(default)s)")
    parser.add_argument("--engine", required=True, metavar="NAME", help=", ".join(CPU_PRECISIONS))
    parser.add_argument("--precision", required=True, choices=("fp32", "bf16", "int8"))
    parser.add_argument("--threads", type=int, metavar="N", help="for the check (default: every core)")
    parser.add_argument("--overwrite", action="store_true", help="replace an exported model")
    parser.add_argument("--json", action="store_true", help="print the manifest; progress is on standard error")
    check = parser.add_argument_group("the check, on validation cases in nnUNet_preprocessed")
    check.add_argument(
        "--max-dice-drop",
        type=float,
        default=0.005,
        metavar="X",
        help="most that a fold's mean Dice may lose (default: %(default)s)",
    )
    check.add_argument("--force", action="store_true", help="write it all the same; fp32 and bf16 also unchecked")
    check.add_argument(
        "--validation-cases", type=int, default=5, metavar="N", help="of each fold (default: %(default)s)"
    )
    check.add_argument(
        "--calibration-cases", type=int, default=16, metavar="N", help="training cases for int8 (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Export the model; 0, or an error."""
    # What needs neither torch nor nnU-Net first: a wrong word should not cost seconds.
    check_engine(args.engine, args.precision, "cpu")
    check_installed(args.engine)
    if not args.m.is_dir():
        raise UsageError(f"-m got {args.m}; expected the model folder that nnUNetv2_train wrote.")

    from nnunet_dyn.inference.exporting import ExportOptions, export_model

    options = ExportOptions(
        engine=args.engine,
        precision=args.precision,
        max_dice_drop=args.max_dice_drop,
        force=args.force,
        validation_cases=args.validation_cases,
        calibration_cases=args.calibration_cases,
        threads=args.threads,
    )
    with redirect_stdout(sys.stderr):  # standard output is for the result
        manifest = export_model(args.m, args.o, options, args.f, args.chk, args.overwrite, report=_report)
    if args.json:
        print(json.dumps(manifest.to_json(), indent=1))
        return 0
    size = sum(path.stat().st_size for path in args.o.rglob("*") if path.is_file())
    folds = len(manifest.folds)
    print(f"{args.o}: {folds} fold{'s' * (folds != 1)}, {args.engine} {args.precision}, {size / 1e6:.1f} MB")
    for found in manifest.accuracy:
        if not found["finite"]:
            print(f"fold {found['fold']}: the exported model gives logits that are not finite")
            continue
        seen = found["cases_seen_in_training"]
        print(
            f"fold {found['fold']}: Dice {found['dice_exported']:.4f}, original {found['dice_original']:.4f}, "
            f"on {len(found['cases'])} "
            + ("cases of the training: what new cases lose may be more" if seen else "validation cases")
        )
    if not manifest.accuracy:
        print("not checked: there were no preprocessed cases")
    return 0


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
