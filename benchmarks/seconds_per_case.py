"""Commands that predict, beside each other on the same images: seconds per case, start-up, memory.

Seconds per case are (time for n cases - time for 1) / (n - 1), so that start-up does not hide the work. The start-up is
reported beside them, or null where it comes out below 0, since the first case is smaller than others; the time for one
case is the median of ``--repeats`` runs. Each command gets ``-i`` and ``-o``. Ratios are to the first one. The rows are
run in turn, for one case and then for all, or for fewer (``--cases-of``) where a case takes minutes and all cost alike.
Any command will do, also ``nnUNetv2_predict`` with ``nnUNet_results`` set, and ``nnunet_dyn predict`` of a model folder
or of an exported one. Example:

    python benchmarks/seconds_per_case.py imagesTs \\
        --row stock "nnUNetv2_predict -d 521 -c 3d_fullres -f 0 -device cpu" \\
        --row "ROI cascade, torch" "nnunet_dyn predict -m CASCADE -f 0 -device cpu" \\
        --row "ROI cascade, int8" "nnunet_dyn predict -m EXPORTED" --output seconds.json
"""

import argparse
import json
import shlex
import statistics
import tempfile
from pathlib import Path

import machine
from commands import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of nnU-Net's images")
    parser.add_argument("--row", nargs=2, action="append", required=True, metavar=("NAME", "COMMAND"))
    parser.add_argument("--cases", type=int, default=20, help="n (default: %(default)s)")
    parser.add_argument(
        "--cases-of", nargs=2, action="append", default=[], metavar=("NAME", "N"), help="of one row, fewer"
    )
    parser.add_argument("--repeats", type=int, default=3, help="of the run on one case (default: %(default)s)")
    parser.add_argument("--ending", default=".nii.gz")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if len({name for name, _ in args.row}) < len(args.row):
        parser.error("two rows have the same name")
    if args.cases < 2:
        parser.error(f"--cases got {args.cases}; expected two at least")
    cases_of = dict.fromkeys((name for name, _ in args.row), args.cases)
    cases_of |= {name: int(count) if count.isdecimal() else 0 for name, count in args.cases_of}
    if len(cases_of) > len(args.row) or not all(2 <= count <= args.cases for count in cases_of.values()):
        parser.error(f"--cases-of: expected the name of a row and from 2 to {args.cases} cases")
    cases: dict[str, list[Path]] = {}
    for image in sorted(args.images.glob(f"*{args.ending}")):
        cases.setdefault(image.name.removesuffix(args.ending)[: -len("_0000")], []).append(image)
    names = sorted(cases)[: args.cases]
    if len(names) < args.cases:
        raise SystemExit(f"{args.images} has {len(cases)} cases; expected {args.cases}.")
    measured: dict[str, dict[int, tuple]] = {name: {} for name, _ in args.row}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in {1, *cases_of.values()}:
            (folder / f"images_{count}").mkdir()
            for case in names[:count]:
                for image in cases[case]:
                    (folder / f"images_{count}" / image.name).symlink_to(image.absolute())
        for is_first in (True, False):
            for number, (row, command) in enumerate(args.row):
                count, runs = 1 if is_first else cases_of[row], []
                for repeat in range(args.repeats if is_first else 1):
                    flags = ["-i", folder / f"images_{count}", "-o", folder / f"out_{number}_{count}_{repeat}"]
                    runs.append(measure([*shlex.split(command), *flags]))
                measured[row][count] = tuple(statistics.median(values) for values in zip(*runs, strict=True))
                print(row, count, [round(value, 2) for value in measured[row][count][:2]], flush=True)
    rows = {}
    for row, command in args.row:
        more = cases_of[row] - 1
        (one, one_cpu, _), (many, many_cpu, peak) = (measured[row][count] for count in (1, cases_of[row]))
        per_case = (many - one) / more
        rows[row] = {
            "command": " ".join(Path(word).name for word in shlex.split(command)),
            "seconds_per_case": round(per_case, 3),
            "cpu_seconds_per_case": round((many_cpu - one_cpu) / more, 3),
            "cases": cases_of[row],
            "startup_seconds": round(one - per_case, 2) if one > per_case else None,
            "peak_bytes": peak,
        }
    reference = rows[args.row[0][0]]
    for row in rows.values():
        keys = ("seconds_per_case", "cpu_seconds_per_case", "startup_seconds", "peak_bytes")
        row["ratios"] = {
            key: None if row[key] is None or reference[key] is None else round(row[key] / reference[key], 3)
            for key in keys
        }
        print(json.dumps(row))
    if args.output:
        result = {"machine": machine.describe(), "rows": rows}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
