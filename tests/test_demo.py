"""The generated data set is what it claims to be, and the demo refuses what it cannot run."""

import argparse
import hashlib
import io
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_dyn.demo import add_arguments, generate_case, generate_dataset, results, run, runner, steps
from nnunet_dyn.demo.generator import LABELS, LARGE_ORGAN, SMALL_ORGAN, TUMOUR
from nnunet_dyn.errors import JobError, UsageError

SMALL = (28, 40, 40)


@pytest.fixture(scope="module")
def cases():
    return [generate_case(seed, index) for seed in (0, 1) for index in range(4)]


def parse(*argv):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(argument) for argument in argv])


def _running(pid):
    # A killed process whose parent has gone may stay in the table until init collects it.
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self").exists():
        return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]


def test_a_few_per_cent_are_foreground_and_every_label_is_there(cases):
    for case in cases:
        assert 0.02 < (case.labels > 0).mean() < 0.08
        assert set(np.unique(case.labels)) == set(LABELS.values())
        volume = np.bincount(case.labels.ravel())
        assert volume[LARGE_ORGAN] > 3 * max(volume[SMALL_ORGAN], volume[TUMOUR])


def test_the_tumour_lies_inside_the_large_organ(cases):
    for index, case in enumerate(cases):
        without = generate_case(index // 4, index % 4, tumour=False)
        assert not (without.labels == TUMOUR).any()
        assert (without.labels[case.labels == TUMOUR] == LARGE_ORGAN).all()
        np.testing.assert_array_equal(without.labels[case.labels != TUMOUR], case.labels[case.labels != TUMOUR])


def test_slices_above_and_below_are_empty(cases):
    for case in cases:
        filled = np.flatnonzero((case.labels > 0).any(axis=(1, 2)))
        assert filled[0] >= 3
        assert filled[-1] <= case.labels.shape[0] - 4


def test_sizes_and_spacings_vary(cases):
    assert len({case.spacing for case in cases}) == len(cases)
    assert len({case.labels.shape for case in cases}) > 1


def test_intensities_are_like_ct(cases):
    for case in cases:
        image = case.image[0]
        assert image.dtype == np.int16
        medians = {name: np.median(image[case.labels == value]) for name, value in LABELS.items()}
        assert medians["large_organ"] + 20 < medians["small_organ"] < medians["tumour"] - 20
        assert image[:, 0, 0].mean() < -950
        assert 5 < image[case.labels == LARGE_ORGAN].std() < 60


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    first, again, other = (
        generate_dataset(tmp_path / name, 2, 1, seed, SMALL) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert digest(first) == digest(again) != digest(other)


def test_a_case_does_not_depend_on_how_many_there_are(tmp_path):
    few, many = (
        generate_dataset(tmp_path / "few", 1, 0, size=SMALL),
        generate_dataset(tmp_path / "many", 3, 0, size=SMALL),
    )
    name = "imagesTr/train_000_0000.nii.gz"
    assert (few / name).read_bytes() == (many / name).read_bytes()


def test_some_training_and_some_test_cases_have_no_tumour(tmp_path):
    dataset = generate_dataset(tmp_path, 5, 3, size=SMALL)
    for folder in ("labelsTr", "labelsTs"):
        present = [
            (sitk.GetArrayFromImage(sitk.ReadImage(str(f))) == TUMOUR).any() for f in (dataset / folder).iterdir()
        ]
        assert len(present) - sum(present) == 1


def test_nnunet_accepts_the_data_set(tmp_path):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    dataset = generate_dataset(tmp_path, 2, 1, size=SMALL, channels=2, dataset_id=7, name="Tiny")
    assert dataset.name == "Dataset007_Tiny"
    verify_dataset_integrity(str(dataset), num_processes=1)
    assert json.loads((dataset / "dataset.json").read_text())["channel_names"]["0"] == "CT"
    assert len(list((dataset / "imagesTs").iterdir())) == 2


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ({"size": (8, 40, 40)}, "size"),
        ({"size": (40, 40)}, "size"),
        ({"channels": 0}, "channels"),
        ({"n_train": 0}, "cases"),
        ({"seed": -1}, "seed"),
        ({"dataset_id": 1000}, "1000"),
        ({"name": "two words"}, "two words"),
    ],
)
def test_the_generator_refuses_what_it_cannot_make(tmp_path, arguments, problem):
    with pytest.raises(UsageError, match=problem):
        generate_dataset(tmp_path / "raw", **arguments)
    assert not (tmp_path / "raw").exists()


def test_the_generator_never_writes_into_an_existing_data_set(tmp_path):
    generate_dataset(tmp_path, 1, 0, size=SMALL)
    before = digest(tmp_path)
    with pytest.raises(UsageError, match="exists"):
        generate_dataset(tmp_path, 1, 0, size=SMALL)
    assert digest(tmp_path) == before


@pytest.mark.parametrize(
    "options, problem",
    [
        (["--epochs", 0], "--epochs is 0"),
        (["--train-cases", 4], "--train-cases is 4"),
        (["--test-cases", 0], "--test-cases is 0"),
        (["--size", 4, 80, 80], "size"),
        (["--trainer", "nnUNetTrainerEffV2X"], "nnUNetTrainerEffV2S"),
        (["--trainer", "nnUNetTrainerEffB0_5epochs", "--epochs", 3], "not both"),
        (["--device", "cuda"], "--device cpu"),
    ],
)
def test_bad_options_end_the_demo_before_it_writes(tmp_path, monkeypatch, options, problem):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    output = tmp_path / "out"
    with pytest.raises(UsageError, match=problem):
        run(parse("--output", output, *options))
    assert not output.exists()


@pytest.mark.parametrize("overwrite, problem", [([], "--overwrite"), (["--overwrite"], "not written by this demo")])
def test_a_folder_with_other_files_is_left_alone(tmp_path, overwrite, problem):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match=problem):
        run(parse("--output", tmp_path, *overwrite))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_output_may_not_be_a_file(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UsageError, match="Cannot write"):
        run(parse("--output", file))


def test_a_failed_command_names_the_step_the_log_and_the_last_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "find_command", lambda name: sys.executable)
    runs = steps.Steps(1, tmp_path, {}, io.StringIO())
    runs.begin("train something")
    with pytest.raises(JobError, match=r"'train something' failed.*status 3.*nnUNetv2_train\.log.*out of luck"):
        runs.command("nnUNetv2_train", ["-c", "print('out of luck'); raise SystemExit(3)"])
    assert "out of luck" in (tmp_path / "nnUNetv2_train.log").read_text()


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups here")
def test_a_request_to_terminate_ends_the_command_and_its_workers(tmp_path):
    program = "import subprocess, sys; w = subprocess.Popen(['sleep', '60']); print(w.pid, flush=True); w.wait()"
    # In a process of its own: the signal is for the whole process, and this one runs the other tests.
    demo = f"""
import os, signal, sys
from pathlib import Path
from nnunet_dyn.demo import steps
from nnunet_dyn.interrupts import interruptible

def terminate(line):
    print(line, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

steps.find_command = lambda name: sys.executable
before = signal.getsignal(signal.SIGTERM)
runs = steps.Steps(1, Path({str(tmp_path)!r}), os.environ, sys.stderr)
runs.begin("train")
try:
    with interruptible():
        runs.command("nnUNetv2_train", ["-c", {program!r}], terminate)
except KeyboardInterrupt:
    sys.exit(0 if signal.getsignal(signal.SIGTERM) == before else 5)
sys.exit(4)
"""
    ended = subprocess.run([sys.executable, "-c", demo], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 0, ended.stderr
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _running(int(ended.stdout)):
        time.sleep(0.05)
    assert not _running(int(ended.stdout))


def test_a_failed_run_says_so_and_can_be_overwritten(tmp_path, monkeypatch):
    output = tmp_path / "out"
    monkeypatch.setattr(steps, "find_command", lambda name: sys.executable)
    for overwrite in ([], ["--overwrite"]):
        with pytest.raises(JobError, match="plan and preprocess"):
            run(parse("--output", output, "--size", *SMALL, "--train-cases", 5, "--test-cases", 1, *overwrite))
        assert json.loads((output / "demo.json").read_text())["status"] == "failed"
        assert not (output / "dice.json").exists()


def test_the_progress_of_a_training_is_read_from_its_log():
    progress = runner._TrainingProgress("nnUNetTrainerEffB0_3epochs_2iters")
    assert progress("2026-01-01 00:00:00.0: Epoch 0") == "epoch 1 of 3"
    assert progress("2026-01-01 00:00:01.0: Pseudo dice [np.float32(0.8123), np.float32(nan), 0.0]") is None
    assert progress("2026-01-01 00:00:02.0: Epoch 1").startswith(
        "epoch 2 of 3, about 0:00 left, patch Dice 0.81 nan 0.00"
    )
    assert runner._TrainingProgress("nnUNetTrainer")("2026-01-01 00:00:00.0: Epoch 4") == "epoch 5"


def test_scores_skip_what_is_absent_and_stay_valid_json(tmp_path):
    def case(name, *dice):
        metrics = {str(label): {"Dice": value} for label, value in enumerate(dice, start=1)}
        return {"reference_file": f"/somewhere/{name}.nii.gz", "metrics": metrics}

    dice = results.dice_per_case({"metric_per_case": [case("a", 0.9, 0.5, math.nan), case("b", 0.7, 0.7, math.nan)]})
    mean = results.mean_dice(dice)
    assert mean["large_organ"] == pytest.approx(0.8)
    assert math.isnan(mean["tumour"])
    results.write_json(tmp_path / "dice.json", {"mean": mean})
    assert json.loads((tmp_path / "dice.json").read_text())["mean"]["tumour"] is None
    results.write_table(tmp_path / "dice.csv", dice)
    assert (tmp_path / "dice.csv").read_text().splitlines()[1:4] == [
        "a,large_organ,0.9000",
        "a,small_organ,0.5000",
        "a,tumour,",
    ]
