"""The short version of benchmarks/stability.py: deep encoders on a six-stage plan learn from the first iterations."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "stability.py"


def test_b0_and_b3_with_the_plain_decoder(tmp_path):
    output = tmp_path / "stability.json"
    arguments = "--iterations 12 --features 8 16 32 64 80 80 --trainers nnUNetTrainerEffB0 nnUNetTrainerEffB3"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--output", output, *arguments.split()], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    runs = json.loads(output.read_text())["runs"]
    assert [run["trainer"] for run in runs] == ["nnUNetTrainerEffB0", "nnUNetTrainerEffB3"]
    for run in runs:
        assert run["finite"] and len(run["losses"]) == 12
        assert run["loss_last_third"] < run["loss_first_third"] - 0.1
        assert run["largest_gradient_norm"] < 12  # nnU-Net's clipping never had to act
