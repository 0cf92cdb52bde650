"""`nnunet_dyn predict`: nnU-Net's files, its flags, and one line for what goes wrong."""

import errno
import gzip
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import imageio.v3 as imageio
import models
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_dyn import cli
from nnunet_dyn.inference import Predictor

SPACING = (1.2, 1.0, 0.9)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("models") / "model", folds=2, spacing=(1.2, 1, 1))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    arrays = {f"case_{n}": models.image((17, 20 + n, 22), seed=n) for n in range(3)}
    return models.write_cases(tmp_path_factory.mktemp("data") / "images", arrays, SPACING)


def predict(model, images, output, *flags) -> int:
    return cli.main(["predict", "-m", str(model), "-i", str(images), "-o", str(output), "-f", "0", "-device", "cpu",
                     *map(str, flags)])  # fmt: skip


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read(path: Path) -> sitk.Image:
    return sitk.ReadImage(str(path))


def test_files_are_those_of_nnunet(model, images, tmp_path, capsys):
    """Segmentations, probabilities, geometry, and what nnU-Net's other commands look for beside them."""
    stock = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(model), (0, 1))
    (tmp_path / "stock").mkdir()
    stock.predict_from_files_sequential(str(images), str(tmp_path / "stock"), save_probabilities=True)
    assert predict(model, images, tmp_path / "ours", "-f", 0, 1, "--save_probabilities") == 0
    expected = names(tmp_path / "stock")
    assert names(tmp_path / "ours") == [name for name in expected if name != "predict_from_raw_data_args.json"]
    for case in ("case_0", "case_1", "case_2"):
        ours, theirs = (read(tmp_path / who / f"{case}.nii.gz") for who in ("ours", "stock"))
        assert ours.GetSpacing() == theirs.GetSpacing() and ours.GetOrigin() == theirs.GetOrigin()
        arrays = [sitk.GetArrayFromImage(image) for image in (ours, theirs)]
        assert arrays[0].dtype == arrays[1].dtype and len(np.unique(arrays[1])) > 2
        assert (arrays[0] == arrays[1]).mean() >= 0.9999
        ours, theirs = (np.load(tmp_path / who / f"{case}.npz")["probabilities"] for who in ("ours", "stock"))
        np.testing.assert_allclose(ours, theirs, atol=2e-3)
        ours, theirs = ((tmp_path / who / f"{case}.pkl").read_bytes() for who in ("ours", "stock"))
        assert ours == theirs


def test_the_summary_has_seconds_of_each_stage_and_the_peak(model, images, tmp_path, capsys):
    assert predict(model, images, tmp_path / "out") == 0
    shown = capsys.readouterr()
    assert "3 cases in" in shown.out and "0 failed; torch fp32 on cpu" in shown.out
    for word in ("read", "preprocess", "network", "export", "start-up", "peak memory"):
        assert word in shown.out
    assert "[2/3] case_1: " in shown.err


def test_json_alone_is_on_standard_output(model, images, tmp_path, capsys):
    assert predict(model, images, tmp_path / "out", "--json", "--precision", "bf16", "--threads", 1) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["precision"], report["threads"], report["folds"], report["failed"]) == ("bf16", 1, 1, 0)
    assert [case["case"] for case in report["cases"]] == ["case_0", "case_1", "case_2"]
    assert report["peak_memory_bytes"] > 1e8
    for case in report["cases"]:
        assert Path(case["output"]).is_file()
        assert all(case["seconds"][stage] > 0 for stage in ("read", "preprocess", "network", "export"))
    total = sum(report["seconds_by_stage"].values())
    assert 0.5 * report["seconds"] < total <= report["seconds"]


def test_a_model_by_data_set(model, images, tmp_path, monkeypatch, capsys):
    results = tmp_path / "results"
    shutil.copytree(model, results / "Dataset999_Test" / "nnUNetTrainer__nnUNetPlans__3d_fullres")
    monkeypatch.setenv("nnUNet_results", str(results))
    common = ["predict", "-i", str(images), "-o", str(tmp_path / "out"), "-f", "0", "-device", "cpu"]
    assert cli.main([*common, "-d", "Dataset999_Test", "-c", "3d_fullres"]) == 0
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 3
    capsys.readouterr()
    assert cli.main([*common, "-d", "Dataset999_Test", "-c", "2d"]) == 2
    assert "there are: nnUNetTrainer__nnUNetPlans__3d_fullres" in capsys.readouterr().err


def test_parts_share_the_cases_and_a_prediction_can_be_continued(model, images, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict(model, images, out, "-num_parts", 2, "-part_id", 1) == 0
    assert [path.name for path in out.glob("*.nii.gz")] == ["case_1.nii.gz"]
    before = (out / "case_1.nii.gz").stat().st_mtime_ns
    assert predict(model, images, out, "--continue_prediction") == 0
    assert len(list(out.glob("*.nii.gz"))) == 3
    assert (out / "case_1.nii.gz").stat().st_mtime_ns == before
    assert predict(model, images, out) == 0
    assert (out / "case_1.nii.gz").stat().st_mtime_ns > before


def test_a_failed_case_does_not_stop_the_others(model, images, tmp_path, capsys):
    """Broken in four ways; the good case is written, the others leave nothing behind."""
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "case_0_0000.nii.gz").write_bytes(b"not an image")
    (folder / "case_1_0000.nii.gz").write_bytes((images / "case_1_0000.nii.gz").read_bytes()[:300])
    models.write_cases(folder, {"case_3": models.image((17, 20, 22), channels=2)})
    assert predict(model, folder, tmp_path / "out", "--save_probabilities", "--json") == 1
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert report["failed"] == 3
    assert [bool(case["error"]) for case in report["cases"]] == [True, True, False, True]
    assert names(tmp_path / "out") == ["case_2.nii.gz", "case_2.npz", "case_2.pkl", "dataset.json", "plans.json"]
    lines = [line for line in shown.err.splitlines() if line.startswith("failed: ")]
    assert [line.split(":")[1].strip() for line in lines] == ["case_0", "case_1", "case_3"]
    assert all("Cannot read" in line and "case_" in line for line in lines[:2])
    assert "Got 2 channels; expected 1: image0" in lines[2]


@pytest.mark.parametrize(
    ("ending", "length", "expected"),
    [
        (".nii.gz", 300, "end-of-stream"),
        (".nii.gz", -5, "end-of-stream"),
        (".nii", -5, "truncated, 30267 of 30272 bytes"),
        (".nii", 200, "Cannot read"),
        (".mha", -5, "Cannot read"),
    ],
)
def test_a_truncated_image_is_not_filled_with_zeros(copy, tmp_path, capsys, ending, length, expected):
    """ITK would do that with NIfTI files, and the case would be segmented as if it were complete."""
    folder = models.write_cases(tmp_path / "images", {"case": models.image((17, 20, 22))}, ending=ending)
    use_ending(copy, ending)
    path = folder / f"case_0000{ending}"
    path.write_bytes(path.read_bytes()[:length])
    assert predict(copy, folder, tmp_path / "out") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert "Cannot read" in line and expected in line
    assert names(tmp_path / "out") == ["dataset.json", "plans.json"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_voxel_that_is_no_number(copy, tmp_path, capsys, value):
    array = models.image((17, 20, 22))
    array[0, 3, 3, 3] = value
    folder = models.write_cases(tmp_path / "images", {"case": array}, ending=".mha")
    use_ending(copy, ".mha")
    assert predict(copy, folder, tmp_path / "out") == 1
    assert "1 of 7480 voxels of channel 0 are NaN or infinite" in capsys.readouterr().err


def use_ending(folder: Path, ending: str) -> None:
    """Let the model at ``folder`` be one of images with another file ending."""
    dataset = json.loads((folder / "dataset.json").read_text()) | {"file_ending": ending}
    (folder / "dataset.json").write_text(json.dumps(dataset))


def test_an_error_while_writing_leaves_no_half_written_file(model, images, tmp_path, monkeypatch, capsys):
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    def fill_the_disk(self, segmentation, name, properties):
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    assert predict(model, images, out) == 0
    complete = (out / "case_0.nii.gz").read_bytes()
    monkeypatch.setattr(SimpleITKIO, "write_seg", fill_the_disk)
    assert predict(model, images, out) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert (out / "case_0.nii.gz").read_bytes() == complete
    assert not [name for name in names(out) if "partial" in name]


# In a process of its own: the signal is for the whole process, and this one runs the other tests.
TERMINATED = """
import os, signal, sys, tempfile
from nnunet_dyn import cli
from nnunet_dyn.inference import predictor

clean_up = tempfile.TemporaryDirectory.cleanup

def clean_up_interrupted(folder):
    os.kill(os.getpid(), signal.SIGTERM)  # some programs send it twice
    clean_up(folder)

def request_to_terminate(*arguments):
    assert [name for name in os.listdir(sys.argv[1]) if name.startswith(".partial-")]
    os.kill(os.getpid(), signal.SIGTERM)

predictor.segment = request_to_terminate
tempfile.TemporaryDirectory.cleanup = clean_up_interrupted
sys.exit(cli.main(["predict", "-o", sys.argv[1], "-f", "0", "-device", "cpu", *sys.argv[2:]]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no signals of this kind on Windows")
@pytest.mark.parametrize("ignored", [False, True], ids=["ended", "ignored"])
def test_a_request_to_terminate_leaves_nothing_half_written(model, images, tmp_path, ignored):
    def ignore():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    out = tmp_path / "out"
    ended = subprocess.run(
        [sys.executable, "-c", TERMINATED, out, "-m", model, "-i", images],
        capture_output=True, text=True, timeout=120, preexec_fn=ignore if ignored else None,
    )  # fmt: skip
    if ignored:  # as under nohup; each case then fails, since nothing is returned
        assert ended.returncode == 1 and ended.stderr.count("failed: case_") == 3, ended.stderr
    else:
        assert ended.returncode == 130 and "interrupted" in ended.stderr, ended.stderr
    assert not [name for name in names(out) if "partial" in name or name.endswith(".nii.gz")]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of mapped files here")
def test_probabilities_are_not_mapped_any_more_when_their_file_goes(model, images, tmp_path, monkeypatch):
    """Windows refuses to remove it, and a network drive keeps it."""
    unlink, seen = Path.unlink, []

    def spy(path, **options):
        if path.name.endswith(".npz.npy"):
            seen.append(path.name in Path("/proc/self/maps").read_text())
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", spy)
    assert predict(model, images, tmp_path / "out", "--save_probabilities") == 0
    assert seen == [False] * 3


def test_checkpoint_and_fold_by_name(model, copy, images, tmp_path):
    (copy / "fold_0" / "checkpoint_final.pth").rename(copy / "fold_0" / "checkpoint_best.pth")
    (copy / "fold_0").rename(copy / "fold_all")
    shutil.rmtree(copy / "fold_1", ignore_errors=True)
    assert predict(copy, images, tmp_path / "named", "-f", "all", "-chk", "checkpoint_best.pth") == 0
    assert predict(model, images, tmp_path / "expected") == 0
    for case in ("case_0.nii.gz", "case_1.nii.gz"):
        named, expected = (sitk.GetArrayFromImage(read(tmp_path / each / case)) for each in ("named", "expected"))
        assert (named == expected).all() and len(np.unique(expected)) > 2


def test_pictures_are_predicted_as_nnunet_does(tmp_path):
    """PNG files of three colours, by the reader that nnU-Net has for them."""
    options = {"dimension": 2, "patch_size": (24, 16), "channels": 3, "reader": "NaturalImage2DIO"}
    folder = models.write_model(tmp_path / "model", **options)
    use_ending(folder, ".png")
    (tmp_path / "images").mkdir()
    colours = np.random.default_rng(0).integers(0, 256, (40, 31, 3), dtype=np.uint8)
    imageio.imwrite(tmp_path / "images" / "case_0000.png", colours)
    stock = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(folder), (0,))
    (tmp_path / "stock").mkdir()
    stock.predict_from_files_sequential(str(tmp_path / "images"), str(tmp_path / "stock"))
    assert predict(folder, tmp_path / "images", tmp_path / "ours") == 0
    ours, expected = (imageio.imread(tmp_path / each / "case.png") for each in ("ours", "stock"))
    assert ours.shape == (40, 31) and (ours == expected).mean() >= 0.9999 and len(np.unique(ours)) > 2


def test_what_is_resampled_on_the_disk_lies_beside_the_output(images, tmp_path, monkeypatch):
    """The system's temporary folder may be memory."""
    function = ("resample_data_or_seg_to_shape", {**models.LINEAR, "order": 3})
    folder = models.write_model(tmp_path / "model", spacing=(1.5, 1, 1), resampling=function)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "memory"))
    assert predict(folder, images, tmp_path / "out") == 0
    assert len(names(tmp_path / "out")) == 5


def test_a_tiff_has_its_spacing_beside_it(copy, tmp_path, capsys):
    """In a file that nnU-Net's reader names after the segmentation."""
    folder = tmp_path / "images"
    folder.mkdir()
    tifffile.imwrite(folder / "case_0000.tif", models.image((17, 20, 22))[0])
    (folder / "case.json").write_text('{"spacing": [1.2, 1.0, 0.9]}')
    use_ending(copy, ".tif")
    plans = json.loads((copy / "plans.json").read_text()) | {"image_reader_writer": "Tiff3DIO"}
    (copy / "plans.json").write_text(json.dumps(plans))
    assert predict(copy, folder, tmp_path / "out") == 0
    assert names(tmp_path / "out") == ["case.json", "case.tif", "dataset.json", "plans.json"]
    assert json.loads((tmp_path / "out" / "case.json").read_text()) == {"spacing": [1.2, 1.0, 0.9]}
    assert tifffile.imread(tmp_path / "out" / "case.tif").shape == (17, 20, 22)


def test_a_full_disk_fails_one_case(model, images, tmp_path, monkeypatch, capsys):
    """Asked for before the probabilities are mapped: writing to a mapped file that has no space kills the process."""
    reserve, calls = os.posix_fallocate, []

    def full_for_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", full_for_the_second)
    assert predict(model, images, tmp_path / "out", "--save_probabilities") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert line.startswith("failed: case_1: OSError") and "No space left" in line
    written = [f"{case}{suffix}" for case in ("case_0", "case_2") for suffix in (".nii.gz", ".npz", ".pkl")]
    assert names(tmp_path / "out") == sorted([*written, "dataset.json", "plans.json"])


def change_header(path: Path, *changes: tuple[int, bytes]) -> None:
    content = bytearray(path.read_bytes())
    for start, value in changes:
        content[start : start + len(value)] = value
    path.write_bytes(content)


def test_a_header_that_only_nibabel_refuses(copy, tmp_path, capsys):
    """A rotation whose quaternion is too long, and no other; ITK scales it."""
    folder = models.write_cases(tmp_path / "images", {"case": models.image((17, 20, 22))}, ending=".nii")
    path = folder / "case_0000.nii"
    change_header(path, (254, struct.pack("<h", 0)), (256, struct.pack("<3f", 0.8, 0.8, 0.8)))
    with pytest.raises(ValueError, match="w2"):
        nibabel.load(path)
    use_ending(copy, ".nii")
    assert predict(copy, folder, tmp_path / "out") == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "case.nii").is_file()


def test_a_nifti_that_is_not_packed_though_its_name_says_so(model, images, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "case_0000.nii.gz").write_bytes(gzip.decompress((images / "case_0_0000.nii.gz").read_bytes()))
    assert predict(model, folder, tmp_path / "out") == 0, capsys.readouterr().err
    assert predict(model, images, tmp_path / "packed") == 0
    ours, packed = (read(tmp_path / name) for name in ("out/case.nii.gz", "packed/case_0.nii.gz"))
    assert (sitk.GetArrayFromImage(ours) == sitk.GetArrayFromImage(packed)).all()


def test_files_of_another_naming_are_named(model, images, tmp_path, capsys):
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    for number in range(2):
        (folder / f"case_{number}_0000.nii.gz").rename(folder / f"patient{number}.nii.gz")
    (folder / "notes.txt").write_text("no image")
    assert predict(model, folder, tmp_path / "out") == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Left out")]
    assert "2 files" in line and "patient0.nii.gz, patient1.nii.gz;" in line and "case_0000.nii.gz" in line
    (folder / "case_2_0000.nii.gz").unlink()
    assert predict(model, folder, tmp_path / "none") == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "patient0.nii.gz, patient1.nii.gz. Rename them" in shown


@pytest.mark.parametrize("way", ["read-only", "dataset.json is a folder"])
def test_an_output_folder_that_cannot_be_written_to(model, images, tmp_path, monkeypatch, capsys, way):
    out = tmp_path / "out"
    out.mkdir()

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    if way == "read-only":  # not by the folder's mode, which root does not heed
        monkeypatch.setattr("tempfile.mkdtemp", read_only)
    else:
        (out / "dataset.json").mkdir()
    before = names(out)
    assert predict(model, images, out) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"nnunet_dyn: Cannot write dataset.json and plans.json into {out}")
    assert shown.err.count("\n") == 1 and not shown.out and names(out) == before


def test_a_wrong_fold_is_found_before_the_cases(copy, images, tmp_path, capsys):
    """Not only the first one: two folds are averaged."""
    change_checkpoint(copy, fold=1, network_weights=MANY_OTHERS)
    assert predict(copy, images, tmp_path / "out", "-f", 0, 1) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nnunet_dyn: The checkpoint of fold number 1 does not fit")
    assert not (tmp_path / "out").exists()


def test_an_image_without_voxels(copy, tmp_path, capsys):
    """ITK writes none, so the header of a small file is changed to a size of 0."""
    folder = tmp_path / "images"
    folder.mkdir()
    path = folder / "case_0000.nii"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 4, 4), np.float32)), str(path))
    content = bytearray(path.read_bytes())
    content[42:44] = (0).to_bytes(2, "little")  # dim[1]
    path.write_bytes(content)
    use_ending(copy, ".nii")
    assert predict(copy, folder, tmp_path / "out") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert "case" in line and ("Cannot read" in line or "voxels" in line)


@pytest.fixture
def copy(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def change_checkpoint(folder: Path, fold: int = 0, **changes) -> None:
    path = folder / f"fold_{fold}" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False) | changes
    torch.save({key: value for key, value in content.items() if value is not None}, path)


def truncate(folder: Path) -> None:
    path = folder / "fold_0" / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[:-1000])


MANY_OTHERS = {f"encoder.{number}": torch.zeros(1) for number in range(999)}  # torch's error names each of them
BROKEN = {
    "no folder": (shutil.rmtree, 2, "No model folder"),
    "no checkpoint": (lambda f: (f / "fold_0" / "checkpoint_final.pth").unlink(), 2, "there are folds: 1"),
    "truncated checkpoint": (truncate, 1, "is truncated or no checkpoint"),
    "no plans": (lambda f: (f / "plans.json").unlink(), 1, "plans.json"),
    "broken plans": (lambda f: (f / "plans.json").write_text("{"), 1, "plans.json"),
    "empty plans": (lambda f: (f / "plans.json").write_text("{}"), 1, "Cannot build the network"),
    "unknown trainer": (lambda f: change_checkpoint(f, trainer_name="nnUNetTrainerOfSomebody"), 1,
                        "made by trainer nnUNetTrainerOfSomebody, which nnU-Net does not find"),
    "other weights": (lambda f: change_checkpoint(f, network_weights=MANY_OTHERS),
                      1, "does not fit"),
    "no weights": (lambda f: change_checkpoint(f, network_weights=None), 1, "has no network_weights"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_gets_one_line(copy, images, tmp_path, capsys, name):
    break_it, status, expected = BROKEN[name]
    break_it(copy)
    assert predict(copy, images, tmp_path / "out") == status
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("nnunet_dyn: ") and expected in message and len(message) < 1000
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--engine", "onnxruntime", "--precision", "bf16"], "Engine onnxruntime has no bf16 on cpu"),
        (["--engine", "tensorrt"], "Unknown engine 'tensorrt'"),
        (["--precision", "int8", "--engine", "torch"], "no int8 on cpu"),
        (["--precision", "fp16"], "no fp16 on cpu"),
        (["-num_parts", "2", "-part_id", "2"], "expected 0 to num_parts - 1"),
        (["-d", "501"], "one of the two ways"),
        (["-step_size", "1.5"], "step size"),
        (["-i", "nowhere"], "expected a folder with images"),
        (["-o", "{model}/plans.json"], "Cannot make the folder"),
        (["-prev_stage_predictions", "{model}"], "for a model that has none"),
        (["-i", "{model}"], "has no images"),
    ],
)
def test_bad_usage_is_one_line(model, images, tmp_path, capsys, flags, expected):
    assert predict(model, images, tmp_path / "out", *(flag.format(model=model) for flag in flags)) == 2
    shown = capsys.readouterr()
    assert expected in shown.err and shown.err.count("\n") == 1 and not shown.out
    assert not (tmp_path / "out").exists()


def test_bad_usage_imports_nothing_heavy(tmp_path):
    code = (
        "import sys; from nnunet_dyn import cli\n"
        f"status = cli.main(['predict', '-m', 'x', '-i', {str(tmp_path)!r}, '-o', 'y', '--engine', 'tensorrt'])\n"
        "print(status, sorted({'torch', 'numpy', 'nnunetv2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "2 []\n", done.stdout + done.stderr


def test_there_are_no_worker_processes(model, images, tmp_path, monkeypatch):
    def no_process(*_):
        raise AssertionError("a worker process was started")

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", no_process)
    assert predict(model, images, tmp_path / "out", "-npp", 3, "-nps", 3) == 0


class Runs:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nnunets_checkpoints_are_loaded_without_pickle(copy, images, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it would warn
        predictor = Predictor.from_folder(copy, device="cpu")
    assert predictor.engine.folds == len(list(copy.glob("fold_*/checkpoint_final.pth")))


def test_a_checkpoint_that_needs_pickle_warns(copy, tmp_path):
    change_checkpoint(copy, extra=Runs(tmp_path / "ran"))
    with pytest.warns(UserWarning, match="which can run code"):
        Predictor.from_folder(copy, device="cpu")


def test_a_cascade_takes_the_segmentation_of_its_first_stage(tmp_path, images, capsys):
    """The same as nnU-Net's, and one line without it, for all cases or for one."""
    folder = models.write_model(tmp_path / "model", channels=1, previous_stage=True)
    previous = tmp_path / "previous"
    previous.mkdir()
    rng = np.random.default_rng(0)
    for path in images.iterdir():
        image = read(path)
        labels = sitk.GetImageFromArray(rng.integers(0, 5, image.GetSize()[::-1]).astype(np.uint8))
        labels.CopyInformation(image)
        sitk.WriteImage(labels, str(previous / path.name.replace("_0000", "")))
    stock = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(folder), (0,))
    (tmp_path / "stock").mkdir()
    stock.predict_from_files_sequential(
        str(images), str(tmp_path / "stock"), folder_with_segs_from_prev_stage=str(previous)
    )
    assert predict(folder, images, tmp_path / "ours", "-prev_stage_predictions", previous) == 0
    for case in ("case_0", "case_1", "case_2"):
        ours, theirs = (sitk.GetArrayFromImage(read(tmp_path / who / f"{case}.nii.gz")) for who in ("ours", "stock"))
        assert (ours == theirs).mean() >= 0.9999 and len(np.unique(ours)) > 2
    capsys.readouterr()
    assert predict(folder, images, tmp_path / "without") == 2
    assert "-prev_stage_predictions" in capsys.readouterr().err
    (previous / "case_1.nii.gz").unlink()
    assert predict(folder, images, tmp_path / "two", "-prev_stage_predictions", previous) == 1
    assert sorted(path.name for path in (tmp_path / "two").glob("*.gz")) == ["case_0.nii.gz", "case_2.nii.gz"]
