"""What the registration file adds to the start of Python: two empty environments, one with it, interleaved starts.

python benchmarks/startup.py --output startup.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import machine

ROOT = Path(__file__).parents[1]


def environment(folder: Path, registered: bool) -> Path:
    """Make an environment without packages, and put what the wheel adds to every start into it. Returns its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    if registered:
        answer = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, capture_output=True
        )
        site_packages = Path(answer.stdout.decode().strip())
        subprocess.run([sys.executable, "setup.py", "-q", "build_py", "-d", site_packages], cwd=ROOT, check=True)
    subprocess.run([python, "-c", "pass"], check=True)  # writes the bytecode
    return python


def start(python: Path) -> float:
    begin = time.perf_counter()
    subprocess.run([python, "-c", "pass"], check=True)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--starts", type=int, default=200)
    args = parser.parse_args()
    os.environ.pop("nnUNet_extTrainer", None)  # this Python may be registered itself
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # pip compiles what it installs
    with tempfile.TemporaryDirectory() as folder:
        plain, registered = (environment(Path(folder, name), name == "with") for name in ("without", "with"))
        variable = "import os; print(os.environ.get('nnUNet_extTrainer', ''))"
        answers = [subprocess.check_output([python, "-c", variable]).decode() for python in (plain, registered)]
        if "ext_trainer" in answers[0] or "ext_trainer" not in answers[1]:
            raise SystemExit(f"The two environments are not what they should be: nnUNet_extTrainer is {answers}.")
        times = [(start(plain), start(registered)) for _ in range(args.starts)]
    result = {
        "machine": machine.describe(),
        "starts": args.starts,
        "median_ms_without": round(1e3 * statistics.median(without for without, _ in times), 2),
        "median_ms_with": round(1e3 * statistics.median(with_ for _, with_ in times), 2),
        "median_difference_ms": round(1e3 * statistics.median(with_ - without for without, with_ in times), 2),
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(result)


if __name__ == "__main__":
    main()
