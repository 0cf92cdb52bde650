"""The demo from its own data to scores, through nnU-Net's commands, with the smallest lengths."""

import csv
import json
import subprocess
import sys

from nnunet_dyn.demo import LABELS


def test_the_demo_ends_with_a_table_and_a_picture(tmp_path):
    output = tmp_path / "demo"
    tiny = "--size 20 28 28 --train-cases 5 --test-cases 1 --epochs 1 --iterations 2 --trainer nnUNetTrainerEffB0"
    program = "import sys; from nnunet_dyn.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, "demo", "--output", str(output), *tiny.split()],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr

    names = [name for name, value in LABELS.items() if value]
    scores = json.loads((output / "dice.json").read_text())
    assert list(scores["mean"]) == list(scores["cases"]["test_000"]) == names
    assert all(0 <= value <= 1 for value in scores["cases"]["test_000"].values())
    assert scores["trainer"] == "nnUNetTrainerEffB0_1epochs_2iters"
    with open(output / "dice.csv", newline="") as file:
        assert [row["label"] for row in csv.DictReader(file)] == names
    assert (output / "overlay.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((output / "demo.json").read_text())["status"] == "finished"
    assert not list(output.glob("*.partial"))

    assert "[6/6]" in done.stdout
    assert "SYNTHETIC" in done.stdout
    assert "nnUNetv2_train 1 3d_fullres 0 -tr nnUNetTrainerEffB0 -device cpu" in done.stdout
    assert all(name in done.stdout for name in names)
