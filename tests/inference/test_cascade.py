"""A cascade in one call: the same as in two, with the first stage's segmentations as files between them."""

import json
import shutil

import models
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from cascades import ROI_NAMES, TRAINER, bright_cubes, lattice, segment_the_lattice, write_cascade
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from scipy import ndimage

from nnunet_dyn import cli
from nnunet_dyn.errors import UsageError
from nnunet_dyn.inference import Predictor
from nnunet_dyn.inference.model_folder import first_stage_folder
from nnunet_dyn.inference.predictor import NOTHING_FOUND, NOTHING_LEFT, TOO_THIN

SPACING = (1.2, 1.0, 0.9)
NAMES = ["nnUNetTrainer__nnUNetPlans__3d_lowres", "nnUNetTrainer__nnUNetPlans__3d_cascade_fullres"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A cascade of two untrained networks at different spacings, with folds 0 and 1 of both."""
    folder = tmp_path_factory.mktemp("results") / "Dataset999_Test"
    models.write_model(folder / NAMES[0], folds=2, spacing=(1.7, 1.5, 1.4))
    models.write_model(folder / NAMES[1], folds=2, spacing=(1.2, 1, 1), previous_stage=True)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    arrays = {f"case_{n}": models.image((17, 20 + n, 22), seed=n) for n in range(2)}
    return models.write_cases(tmp_path_factory.mktemp("data") / "images", arrays, SPACING)


def predict(model, images, output, *flags) -> int:
    return cli.main(["predict", "-m", str(model), "-i", str(images), "-o", str(output), "-device", "cpu",
                     *map(str, flags)])  # fmt: skip


def labels(folder):
    return {path.name: sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in sorted(folder.glob("*.nii.gz"))}


def test_one_call_gives_what_two_give(results, images, tmp_path, monkeypatch, capsys):
    assert predict(results / NAMES[0], images, tmp_path / "first", "-f", 1) == 0
    flags = ("-f", 1, "-prev_stage_predictions", tmp_path / "first")
    assert predict(results / NAMES[1], images, tmp_path / "two", *flags) == 0
    assert "first stage" not in capsys.readouterr().err
    monkeypatch.setenv("nnUNet_results", str(results.parent))
    by_name = ["predict", "-d", "Dataset999_Test", "-c", "3d_cascade_fullres", "-f", "1", "-device", "cpu", "--json"]
    assert cli.main([*by_name, "-i", str(images), "-o", str(tmp_path / "one")]) == 0
    shown = capsys.readouterr()
    assert f"first stage: {results / NAMES[0]}, -f 1\n" in shown.err
    expected = {"model": str(results / NAMES[0]), "folds": [1], "checkpoint": "checkpoint_final.pth"}
    assert json.loads(shown.out)["first_stage"] == expected
    one, two, first = (labels(tmp_path / name) for name in ("one", "two", "first"))
    assert list(one) == list(two) == ["case_0.nii.gz", "case_1.nii.gz"]
    for name in one:
        assert np.array_equal(one[name], two[name]) and len(np.unique(one[name])) > 2
        assert not np.array_equal(one[name], first[name])


def test_the_first_stage_matters_and_arrays_are_predicted_likewise(results):
    predictor, first = (Predictor.from_folder(results / name, [0], device="cpu") for name in reversed(NAMES))
    array = models.image((17, 20, 22))
    before = first.predict(array, SPACING).segmentation
    assert before.dtype == np.uint8
    one, two, other = (
        predictor.predict(array, SPACING, previous_stage=given) for given in (None, before, np.zeros_like(before))
    )
    assert np.array_equal(one.segmentation, two.segmentation)
    assert not np.array_equal(one.segmentation, other.segmentation)
    assert all(one.seconds[stage] > 0 for stage in ("preprocess", "network", "export"))
    data = [predictor.preprocess([array], {"spacing": SPACING}, given)[0] for given in (None, before[None])]
    assert torch.equal(*data) and len(data[0]) == 5


def test_folds_that_the_first_stage_has_not(results, tmp_path):
    """All that there are, and none of them where the checkpoint is not there."""
    for name in NAMES:
        shutil.copytree(results / name, tmp_path / name)
    shutil.rmtree(tmp_path / NAMES[0] / "fold_0")
    segmentor = tmp_path / NAMES[1]
    loaded = Predictor.from_folder(segmentor, [0], device="cpu")
    assert (loaded.folds, loaded.first_stage.folds) == ((0,), (1,))
    assert Predictor.from_folder(segmentor, device="cpu").first_stage.folds == (1,)
    assert Predictor.from_folder(segmentor, [1], device="cpu", first_stage=False).first_stage is None
    assert loaded.first_stage.first_stage is None


@pytest.mark.parametrize("missing", ["folder", "checkpoint"])
def test_without_a_first_stage_there_are_two_remedies(results, images, tmp_path, capsys, missing):
    shutil.copytree(results / NAMES[1], tmp_path / NAMES[1])
    if missing == "checkpoint":
        (tmp_path / NAMES[0] / "fold_0").mkdir(parents=True)
    assert predict(tmp_path / NAMES[1], images, tmp_path / "out", "-f", 0) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "-prev_stage_predictions" in message and str(tmp_path / NAMES[0]) in message
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="expected the first one, 3d_lowres"):
        Predictor.from_folder(tmp_path / NAMES[1], [0], device="cpu").predict(models.image((9, 9, 9)), (1, 1, 1))


def test_a_broken_first_stage_is_one_line_before_any_case(results, images, tmp_path, capsys):
    for name in NAMES:
        shutil.copytree(results / name, tmp_path / name)
    checkpoint = tmp_path / NAMES[0] / "fold_0" / "checkpoint_final.pth"
    checkpoint.write_bytes(checkpoint.read_bytes()[:999])
    assert predict(tmp_path / NAMES[1], images, tmp_path / "out", "-f", 0) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and str(checkpoint) in message and not (tmp_path / "out").exists()


# --- detector and segmentor ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def roi_results(tmp_path_factory):
    return write_cascade(tmp_path_factory.mktemp("results")).parent


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return models.write_cases(tmp_path_factory.mktemp("wide") / "images", {"case_0": bright_cubes()})


def test_detector_and_segmentor_in_one_call(roi_results, wide, tmp_path, capsys):
    """The same segmentation as in two calls, and the JSON has what both of them decided."""
    assert predict(roi_results / ROI_NAMES[0], wide, tmp_path / "boxes", "-f", 0) == 0
    flags = ("-f", 0, "-prev_stage_predictions", tmp_path / "boxes", "--save-decisions")
    assert predict(roi_results / ROI_NAMES[1], wide, tmp_path / "two", *flags) == 0
    assert predict(roi_results / ROI_NAMES[1], wide, tmp_path / "one", "-f", 0, "--save-decisions") == 0
    (one,), (two,), (boxes,) = (labels(tmp_path / name).values() for name in ("one", "two", "boxes"))
    assert np.array_equal(one, two) and len(np.unique(one)) > 2
    assert 0 < (boxes > 0).mean() < 0.5
    saved, of_two = (json.loads((tmp_path / name / "decisions/case_0.json").read_text()) for name in ("one", "two"))
    detected = saved.pop("first_stage")
    assert saved == of_two and saved["warnings"] == [] and set(saved["totals"]["shares"]) == {"crop"}
    # 24 × 32 × 44 voxels, of which a patch of 16³ takes 2 × 3 × 5 tiles; the detector's, of half as many, one.
    assert saved["window"]["tiles"] == 30 and detected["window"] == {"tiles": 1, "voxels": 12 * 16 * 22}
    assert saved["folds"][0]["decisions"][0].keys() >= {"boxes", "stages", "action", "macs", "image_boxes"}
    assert set(detected["totals"]["shares"]) == {"detect"} and detected["mirrored_copies"] == 1
    shape = detected["preprocessed_shape"]
    for tile in detected["folds"][0]["decisions"]:
        ends = [a == 0 or b == size for box in tile["boxes"] for (a, b), size in zip(box, shape, strict=True)]
        assert tile["review"] == any(ends)
    inside = np.zeros_like(boxes)
    for tile in detected["folds"][0]["decisions"]:
        assert len(tile["image_boxes"]) == len(tile["classes"]) == len(tile["scores"])
        assert all(0 < score <= 1 for score in tile["scores"])
        for box in tile["image_boxes"]:
            inside[tuple(slice(*axis) for axis in box)] = 1
    # The export interpolates as far as the next voxel of the detector, whose spacing is at most twice the image's.
    grown = ndimage.binary_dilation(inside, np.ones((3, 3, 3)), iterations=2)
    assert inside.any() and (boxes > 0)[inside > 0].all() and not (boxes > 0)[~grown].any()


def test_what_is_outside_of_every_box_costs_nothing(roi_results):
    predictor = Predictor.from_folder(roi_results / ROI_NAMES[1], [0], device="cpu")
    crops = []
    predictor.network.network.register_forward_hook(
        lambda module, inputs, output: crops.extend(x.shape for x in inputs[0] if not x.is_meta)  # meta: is counted
    )
    predicted = predictor.predict(bright_cubes(), (1, 1, 1))
    tiles = predicted.decisions.tiles
    assert 0 < len(tiles) < predicted.decisions.window[0] and all(tile.boxes for tile in tiles)
    assert len(crops) == 2 * sum(len(tile.boxes) for tile in tiles)
    assert all(tile.macs == 2 * tile.decision.cost and (tile.macs > 0) == bool(tile.boxes) for tile in tiles)
    everything = predictor.network.count((16, 16, 16))
    assert predicted.decisions.everything_macs == everything > 0
    (detected,) = {tile.macs for tile in predicted.decisions.first_stage.tiles}
    assert detected == predicted.decisions.first_stage.everything_macs > 0


def by_nnunet(results, images, folder, stages=("3d_detect", "3d_roi")) -> np.ndarray:
    """The labels of the one case by nnU-Net's own predictor, without mirroring, of ``stages`` in turn.

    With mirroring it decides for each copy anew, whose crops may lie elsewhere.
    """
    for stage in stages:
        name, before = f"{TRAINER}__nnUNetDynPlans__{stage}", str(folder / "3d_detect") if stage == "3d_roi" else None
        stock = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
        stock.initialize_from_trained_model_folder(str(results / name), (0,))
        out = folder / stage
        out.mkdir()
        stock.predict_from_files_sequential(str(images), str(out), folder_with_segs_from_prev_stage=before)
    (found,) = labels(out).values()
    return found


def test_the_predictor_is_nnunets_for_both_stages(wide, tmp_path):
    """Where one tile holds the image, since nnU-Net's others do not lie on regions."""
    roi_results = write_cascade(tmp_path / "results", patch_size=(24, 32, 44)).parent
    theirs = by_nnunet(roi_results, wide, tmp_path)
    assert predict(roi_results / ROI_NAMES[1], wide, tmp_path / "ours", "-f", 0, "--disable_tta") == 0
    (ours,) = labels(tmp_path / "ours").values()
    assert (ours == theirs).mean() >= 0.9999 and len(np.unique(theirs)) > 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_where_nothing_is_detected_there_is_a_warning(roi_results, wide, tmp_path, capsys, precision):
    for name in ROI_NAMES:
        shutil.copytree(roi_results / name, tmp_path / name)
    path = tmp_path / ROI_NAMES[0] / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["network_weights"]["labels.seg_layers.score_threshold"].fill_(1.1)
    torch.save(checkpoint, path)
    flags = ("-f", 0, "--save-decisions", "--json", "--precision", precision)
    assert predict(tmp_path / ROI_NAMES[1], wide, tmp_path / "out", *flags) == 0
    shown = capsys.readouterr()
    saved = json.loads((tmp_path / "out/decisions/case_0.json").read_text())
    assert saved["warnings"] == [NOTHING_FOUND] and saved["review"] and saved["totals"]["shares"] == {}
    assert saved["folds"][0]["decisions"] == [] and saved["totals"]["relative_macs"] == 0
    assert f"nothing to segment; {NOTHING_FOUND}" in shown.err and json.loads(shown.out)["cases"][0]["decisions"][
        "warnings"
    ] == [NOTHING_FOUND]
    assert all(tile["boxes"] == [] for tile in saved["first_stage"]["folds"][0]["decisions"])
    assert not labels(tmp_path / "out")["case_0.nii.gz"].any()


def test_an_image_too_thin_for_the_detector_is_segmented_whole(roi_results, tmp_path, capsys):
    """Half of one of the detector's slices, and one of the segmentor's."""
    images = models.write_cases(tmp_path / "images", {"case_0": bright_cubes()[:, 8:9]})
    assert predict(roi_results / ROI_NAMES[1], images, tmp_path / "out", "-f", 0, "--save-decisions") == 0
    saved = json.loads((tmp_path / "out/decisions/case_0.json").read_text())
    assert saved["warnings"] == [TOO_THIN] and saved["review"]
    inside = np.zeros((32, 44), bool)
    for tile in saved["folds"][0]["decisions"]:
        for _, *box in tile["image_boxes"]:
            inside[tuple(slice(*axis) for axis in box)] = True
    assert inside.all() and labels(tmp_path / "out")["case_0.nii.gz"].any()


def test_the_detector_is_the_calibrated_one_whatever_the_segmentors_checkpoint(roi_results, wide, tmp_path):
    """nnU-Net's checkpoint_best is written before calibration."""
    for name in ROI_NAMES:
        shutil.copytree(roi_results / name, tmp_path / name)
    detector, segmentor = (tmp_path / name / "fold_0" for name in ROI_NAMES)
    (segmentor / "checkpoint_final.pth").rename(segmentor / "checkpoint_best.pth")
    (detector / "checkpoint_best.pth").write_bytes(b"not calibrated")
    flags = ("-f", 0, "-chk", "checkpoint_best.pth")
    assert predict(tmp_path / ROI_NAMES[1], wide, tmp_path / "best", *flags) == 0
    assert predict(roi_results / ROI_NAMES[1], wide, tmp_path / "final", "-f", 0) == 0
    (best,), (final,) = (labels(tmp_path / name).values() for name in ("best", "final"))
    assert np.array_equal(best, final) and final.any()


@pytest.mark.parametrize("reason", ["resampling", "nonzero"])
def test_where_preprocessing_leaves_nothing_there_is_a_warning(roi_results, reason):
    """A box of one voxel is lost between those of the plans, and one where the image is zero is cut off."""
    predictor = Predictor.from_folder(roi_results / ROI_NAMES[1], [0], device="cpu")
    array, spacing = bright_cubes(), (1, 1, 1)
    found = np.zeros(array.shape[1:], np.uint8)
    if reason == "resampling":
        found[11, 16, 21], spacing = 1, (0.4, 0.4, 0.4)
    else:
        array[:, :, :, 30:], found[4:9, 4:9, 35:40] = 0, 1
    predicted = predictor.predict(array, spacing, previous_stage=found)
    assert not predicted.segmentation.any() and predicted.decisions.tiles == ()
    assert predicted.decisions.warnings == (NOTHING_LEFT,) and predicted.decisions.review
    found[2:20, 2:20, 2:20] = 1
    assert predictor.predict(array, spacing, previous_stage=found).decisions.warnings == ()


def test_several_tiles_agree_with_nnunets(tmp_path):
    """Of a box larger than a tile, and of one apart. nnU-Net's own predictor has other tiles, in which some are cut
    off: not the same, but much alike."""
    array = np.random.default_rng(0).normal(0, 0.2, (1, 24, 32, 44)).astype(np.float32)
    array[0] += 5 * lattice(array.shape[1:])
    boxes = np.zeros(array.shape[1:], np.uint8)
    boxes[3:21, 5:29, 4:20] = boxes[12:20, 10:20, 30:40] = 1
    images = models.write_cases(tmp_path / "images", {"case_0": array})
    (tmp_path / "3d_detect").mkdir()
    sitk.WriteImage(sitk.GetImageFromArray(boxes), str(tmp_path / "3d_detect" / "case_0.nii.gz"))
    results = write_cascade(tmp_path / "results", prepare=segment_the_lattice).parent
    theirs = by_nnunet(results, images, tmp_path, ["3d_roi"])
    flags = ("-f", 0, "--disable_tta", "--save-decisions", "-prev_stage_predictions", tmp_path / "3d_detect")
    assert predict(results / ROI_NAMES[1], images, tmp_path / "ours", *flags) == 0
    (ours,) = labels(tmp_path / "ours").values()
    saved = json.loads((tmp_path / "ours" / "decisions" / "case_0.json").read_text())
    ours, theirs, target = ours == 1, theirs == 1, (array[0] > 2) & (boxes > 0)

    def dice(a, b):
        return 2 * (a & b).sum() / (a.sum() + b.sum())

    assert len(saved["folds"][0]["decisions"]) > 3
    assert dice(ours, theirs) > 0.65 and dice(ours, target) >= dice(theirs, target)


def test_profiling_images_counts_what_is_predicted_to_nnunets_tiles(roi_results, wide, tmp_path, capsys):
    predictor = Predictor.from_folder(roi_results / ROI_NAMES[1], [0], device="cpu")
    decisions = predictor.predict(bright_cubes(), (1, 1, 1)).decisions
    file, arguments = tmp_path / "profile.json", ["-m", str(roi_results / ROI_NAMES[1]), "-f", "0", "-i", str(wide)]
    assert cli.main(["profile", *arguments, "--rounds", "0", "--json", str(file)]) == 0
    mean = json.loads(file.read_text())["profiles"][-1]["paths"][-1]
    assert mean["tiles"] == 30 and mean["shares"] == {"crop": 1.0}
    assert mean["macs"] == pytest.approx(sum(tile.decision.cost for tile in decisions.tiles) / 30)
    assert mean["macs_by_bits"] == pytest.approx(decisions.totals()["mean_macs"], rel=1e-6)
    assert "30 tiles: 100 % crop" in capsys.readouterr().out


def test_the_first_stage_stands_beside_the_second(tmp_path):
    assert first_stage_folder(tmp_path / "T__P__3d_roi", "3d_detect") == tmp_path.resolve() / "T__P__3d_detect"
