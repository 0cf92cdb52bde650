"""A network that decides, in the predictor: one decision for all mirrored copies, and what is kept of it."""

import itertools
import json
from dataclasses import replace

import models
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_dyn import cli
from nnunet_dyn.architectures.med_danet import Decision
from nnunet_dyn.architectures.roi import DetectorDecision
from nnunet_dyn.architectures.roi_segmentor import ROIDecision
from nnunet_dyn.decisions import CaseDecisions, DecidingNetwork, TileDecision
from nnunet_dyn.errors import UsageError
from nnunet_dyn.inference import Predictor
from nnunet_dyn.inference import predictor as module

PATCH = (32, 24)
SPACING = (3.0, 1.0, 1.0)


def slices(count=8, seed=0) -> torch.Tensor:
    """(1, count, 40, 40), each another pattern."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn((1, count, 5, 5), generator=generator)
    return torch.nn.functional.interpolate(coarse, (40, 40), mode="bicubic") * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two folds that decide differently."""
    tiles = slices()[0, :, None, : PATCH[0], : PATCH[1]]
    folder = tmp_path_factory.mktemp("models") / "model"
    return models.write_deciding_model(folder, tiles, folds=2, spacing=SPACING)


class OneDecision(nnUNetPredictor):
    """nnU-Net's own sliding window, one tile at a time, with one decision for all flips."""

    def _internal_maybe_mirror_and_predict(self, x):
        decided = self.network.decide(x)
        logits, done = self.network.execute(x, decided)
        copies = [axes for n in (1, 2) for axes in itertools.combinations(self.allowed_mirroring_axes, n)]
        for axes in copies:
            flip = [axis + 2 for axis in axes]
            mirrored = [decision.mirrored(axes, tuple(x.shape[2:])) for decision in done]
            logits = logits + self.network.execute(x.flip(flip), mirrored)[0].flip(flip)
        return logits / (len(copies) + 1)


def actions(tiles) -> set[str]:
    return {tile.decision.action for tile in tiles}


@pytest.mark.parametrize(("folds", "limit"), [((0,), 1), ((0, 1), 10**6)], ids=["one by one", "in batches"])
def test_one_decision_serves_all_flips(model, folds, limit, monkeypatch):
    """The same logits as by a slow loop over the slices, whatever runs together; the image is padded on one axis."""
    monkeypatch.setattr(module, "BATCH_VOXELS", limit)
    monkeypatch.setattr(module, "DECIDED_VOXELS", 1 if limit == 1 else 10 * 32 * 24)  # windows of ten tiles
    data = slices()[:, :, :30]
    reference = OneDecision(device=torch.device("cpu"), allow_tqdm=False)
    reference.initialize_from_trained_model_folder(str(model), folds)
    expected = reference.predict_logits_from_preprocessed_data(data)
    predictor = Predictor.from_folder(model, folds, device="cpu")
    logits = predictor.predict_logits_from_preprocessed_data(data)
    difference = (logits - expected).float().abs()  # another last digit is rounded to another of 8 bits here and there
    assert difference.mean() < 1e-3 and (difference > 0.02).float().mean() < 0.01
    assert len(predictor.decided) == len(folds) and all(len(fold) == 8 * 3 for fold in predictor.decided)
    assert all(actions(fold) == {"skip", "crop", "whole"} for fold in predictor.decided), "nothing is compared"
    assert all(0 < (logits.argmax(0) == label).float().mean() < 1 for label in range(5))
    if len(folds) == 2:
        first, second = ([tile.decision.action for tile in fold] for fold in predictor.decided)
        assert first != second, "each fold decides for itself"


def rows_of(layer) -> list[int]:
    """The batches that come to it, but for those of the meta device, where costs are counted."""
    rows = []

    def count(module, inputs, output):
        if not output.is_meta:
            rows.append(len(output))

    layer.register_forward_hook(count)
    return rows


def test_policies_run_once_a_tile_and_skipped_tiles_in_no_copy(model):
    predictor = Predictor.from_folder(model, (0,), device="cpu")
    network = predictor.network
    policy, position, unet = map(rows_of, (network.policy, network.position, network.backbone.encoder.stages[0]))
    predictor.predict_logits_from_preprocessed_data(slices())
    (tiles,) = predictor.decided
    found = [tile.decision.action for tile in tiles]
    assert sum(policy) == len(tiles) == 8 * 2 * 3 and sum(position) == found.count("crop")
    assert sum(unet) == 4 * (len(tiles) - found.count("skip"))
    assert len(policy) == 1, "they are decided together"


def test_what_a_tile_cost(model):
    predictor = Predictor.from_folder(model, (0,), device="cpu")
    predictor.predict_logits_from_preprocessed_data(slices())
    policy, position = predictor.network.deciding_macs(PATCH)
    for tile in predictor.decided[0]:
        decision = tile.decision
        if decision.action == "skip":
            assert tile.macs == decision.cost == policy and decision.bits == ()
        else:
            deciding = policy + position * (decision.action == "crop")
            assert tile.macs == pytest.approx(deciding + 4 * (decision.cost - deciding))
            assert len(decision.bits) == 5 and set(decision.bits) <= {8, 16}


def test_every_constant_tile_has_its_decision_though_it_is_computed_once(model):
    predictor = Predictor.from_folder(model, (0,), device="cpu")
    policy = rows_of(predictor.network.policy)
    data = torch.zeros(1, 6, 32, 24)
    data[:, 2] = slices()[:, 0, :32, :24]
    predictor.predict_logits_from_preprocessed_data(data)
    (tiles,) = predictor.decided
    assert sum(policy) == 2 and [tile.tile[0][0] for tile in tiles] == list(range(6))
    assert len({tile.decision for number, tile in enumerate(tiles) if number != 2}) == 1


def test_a_second_attempt_starts_with_no_decisions(model, monkeypatch):
    predictor = Predictor.from_folder(model, (0,), device="cpu")
    predictor.perform_everything_on_device = True  # turns nnU-Net's second attempt on
    monkeypatch.setattr(module, "DECIDED_VOXELS", 1)
    execute, calls = predictor.engine.execute, itertools.count()

    def lack_memory(*arguments):
        if next(calls) == 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return execute(*arguments)

    monkeypatch.setattr(predictor.engine, "execute", lack_memory)
    predictor.predict_logits_from_preprocessed_data(slices())
    assert len(predictor.decided[0]) == 8 * 2 * 3


def test_no_mirroring_and_bf16(model):
    predictor = Predictor.from_folder(model, (0,), device="cpu", use_mirroring=False, precision="bf16")
    full = Predictor.from_folder(model, (0,), device="cpu", use_mirroring=False)
    logits, expected = (p.predict_logits_from_preprocessed_data(slices()).float() for p in (predictor, full))
    first, second = ([tile.decision.action for tile in p.decided[0]] for p in (predictor, full))
    assert first == second, "what decides runs in full precision"
    error = (logits - expected).abs().mean() / expected.abs().mean()
    assert 1e-4 < error < 0.1
    assert all(tile.macs == tile.decision.cost for tile in full.decided[0])


def test_regions_and_one_mirrored_axis(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_VOXELS", 1)
    tiles = slices()[0, :, None, : PATCH[0], : PATCH[1]]
    options = dict(labels=models.REGIONS, mirroring=(1,), spacing=SPACING, folds=3)
    folder = models.write_deciding_model(tmp_path / "model", tiles, **options)
    reference = OneDecision(device=torch.device("cpu"), allow_tqdm=False)
    reference.initialize_from_trained_model_folder(str(folder), (2,))
    data = slices()[..., : PATCH[0], : PATCH[1]]  # a slice is a tile
    expected = reference.predict_logits_from_preprocessed_data(data)
    predictor = Predictor.from_folder(folder, (2,), device="cpu")
    unet = rows_of(predictor.network.backbone.encoder.stages[0])
    logits = predictor.predict_logits_from_preprocessed_data(data)
    assert (logits - expected).float().abs().mean() < 1e-3 and logits.shape[0] == 3
    found = [tile.decision.action for tile in predictor.decided[0]]
    assert set(found) == {"skip", "crop", "whole"} and sum(unet) == 2 * (8 - found.count("skip"))
    skipped = [index for index, action in enumerate(found) if action == "skip"]
    assert (logits[:, skipped] < 0).all() and (logits > 0).any(), "of no region"


@pytest.mark.filterwarnings("error:Got a step size")
def test_another_step_size_than_that_of_calibration_is_a_warning(model):
    predictor = Predictor.from_folder(model, (0,), device="cpu", use_mirroring=False, tile_step_size=0.9)
    message = r"step size of 0\.9 of the patch; expected 0\.5, .* has calibrated .* Leave out -step_size"
    wide = torch.cat([slices(), slices()], 3)
    with pytest.warns(UserWarning, match=message) as said:
        predictor.predict_logits_from_preprocessed_data(wide)
    assert len(said) == 1
    predictor.predict_logits_from_preprocessed_data(wide[..., : PATCH[0], : PATCH[1]])  # one tile, whatever the step
    predictor.network.skip_threshold.fill_(2)  # nothing is left out
    predictor.network.crop_threshold.fill_(2)
    predictor.predict_logits_from_preprocessed_data(wide)
    Predictor.from_folder(model, (0,), device="cpu", use_mirroring=False).predict_logits_from_preprocessed_data(wide)


# --- where things are -------------------------------------------------------------------------------------------


def test_places_in_the_preprocessed_image_by_hand():
    """A tile of 8×6 at row 4 and column 0 of slice 5; the image of 10×4 was padded by 1 and 2 behind, 1 and 1."""
    crop = Decision("crop", ((2, 6), (0, 3)))
    tile = TileDecision.make((slice(None), 5, slice(4, 12), slice(0, 6)), (0, 1, 1), (9, 10, 4), crop, 7.0)
    assert tile.tile == ((5, 6), (3, 10), (0, 4)) and tile.boxes == (((5, 6), (5, 9), (0, 2)),)
    whole, skip = Decision("whole"), Decision("skip", bits=())
    assert TileDecision.make((slice(None), 0, slice(0, 8), slice(0, 6)), (0, 1, 1), (9, 10, 4), whole, 0).boxes == (
        ((0, 1), (0, 7), (0, 4)),
    )
    solid = (slice(None), slice(2, 6), slice(0, 8), slice(0, 6))
    assert TileDecision.make(solid, (0, 0, 0), (9, 10, 7), skip, 0) == TileDecision(
        ((2, 6), (0, 8), (0, 6)), (), skip, 0
    )


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        (((1, 5), (2, 6), (0, 3)), False),  # where the tile begins, and the image goes on
        (((1, 5), (2, 8), (2, 3)), False),
        (((0, 5), (2, 6), (2, 3)), False),
        (((1, 8), (2, 6), (2, 3)), True),  # where the image ends, two voxels ahead of the padded one
        (((1, 5), (1, 6), (2, 3)), True),
    ],
)
@pytest.mark.parametrize("kind", ["detector", "segmentor"])
def test_a_box_at_the_images_border_is_for_review(box, expected, kind):
    """A tile of 10×8×6 at 4, 0, 3; the image of 9×9×20 was padded by 3 and 2 before and behind, 1 and 1, nothing."""
    slicer = (slice(None), slice(4, 14), slice(0, 8), slice(3, 9))
    decision = DetectorDecision((box,), (1,), (0.9,)) if kind == "detector" else ROIDecision((box,), (box,))
    made = TileDecision.make(slicer, (3, 1, 0), (9, 9, 20), decision, 0)
    assert made.decision.review == expected == made.decision.to_json()["review"]
    assert replace(made.decision, review=False) == decision


def test_places_in_the_image_by_hand():
    """Slices are the image's last axis; 20×30 voxels from (3, 5) on were resampled to 10×45."""
    decisions = CaseDecisions((), (4, 10, 45), (40, 50, 6), ((1, 5), (3, 23), (5, 35)), (2, 0, 1), 4, 1.0, (0, 0))
    assert decisions.to_image(((0, 1), (0, 10), (0, 45))) == ((3, 23), (5, 35), (1, 2))
    assert decisions.to_image(((3, 4), (2, 3), (1, 3))) == ((7, 9), (5, 7), (4, 5))  # two thirds to two: outwards


def test_the_box_of_a_crop_shows_where_the_network_looked(tmp_path):
    """Through cropping, transposition and resampling: outside of all boxes the segmentation is background."""
    tiles = slices()[0, :, None, : PATCH[0], : PATCH[1]]
    options = dict(spacing=(3, 2, 1.5), transpose=(1, 2, 0))
    model = models.write_deciding_model(tmp_path / "model", tiles, **options)
    array = slices(12)[0].permute(1, 0, 2)[None].repeat(1, 1, 2, 1).numpy()  # 40 × 24 × 40
    array[:, :3], array[..., -2:] = 0, 0
    predictor = Predictor.from_folder(model, (0,), device="cpu")
    predicted = predictor.predict(array, (1, 1.5, 1.2))
    decisions = predicted.decisions
    assert decisions.image_shape == array.shape[1:] == predicted.segmentation.shape
    assert decisions.shape != tuple(stop - start for start, stop in decisions.crop), "nothing was resampled"
    assert {"skip", "crop"} <= actions(decisions.tiles)
    seen = np.zeros(array.shape[1:], bool)
    for tile in decisions.tiles:
        for box in tile.boxes:
            reached = [slice(max(0, start - 1), stop + 1) for start, stop in decisions.to_image(box)]  # interpolated
            seen[tuple(reached)] = True
    assert seen.mean() < 0.99 and (predicted.segmentation[seen] > 0).any() and not (predicted.segmentation[~seen]).any()


# --- files ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    arrays = {f"case_{n}": slices(6, seed=n).numpy() for n in range(2)}
    return models.write_cases(tmp_path_factory.mktemp("data") / "images", arrays, SPACING)


def predict(model, images, output, *flags) -> int:
    return cli.main(["predict", "-m", str(model), "-i", str(images), "-o", str(output), "-f", "0", "-device", "cpu",
                     *map(str, flags)])  # fmt: skip


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_json_and_a_picture_per_case(model, images, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict(model, images, out, "--save-decisions", "--decision-pictures", "--json", "-f", 0, 1) == 0
    shown = capsys.readouterr()
    assert names(out) == ["case_0.nii.gz", "case_1.nii.gz", "dataset.json", "decisions", "plans.json"]
    assert names(out / "decisions") == ["case_0.json", "case_0.png", "case_1.json", "case_1.png"]
    assert (out / "decisions" / "case_0.png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads((out / "decisions" / "case_0.json").read_text())
    assert (found["format"], found["version"], found["case"]) == ("nnunet_dyn decisions", 1, "case_0")
    assert found["image_shape"] == found["preprocessed_shape"] == [6, 40, 40] and found["mirrored_copies"] == 4
    first, second = found["folds"]
    totals, decisions = found["totals"], first["decisions"] + second["decisions"]
    assert totals["tiles"] == len(decisions) == 2 * 6 * 6 and first["totals"]["tiles"] == 36
    assert sum(totals["shares"].values()) == pytest.approx(1, abs=1e-5)
    assert totals["shares"]["skip"] == pytest.approx(
        sum(one["action"] == "skip" for one in decisions) / len(decisions), abs=1e-6
    )
    assert totals["mean_macs"] == pytest.approx(sum(one["macs"] for one in decisions) / len(decisions), abs=1)
    assert totals["relative_macs"] == pytest.approx(totals["mean_macs"] / found["everything_macs"], abs=1e-5)
    assert totals["mean_macs"] * len(decisions) < totals["macs_all_copies"]
    assert found["review"] == (totals["review"] > 0) == any(one["review"] for one in decisions)
    for one in decisions:
        assert set(one) == {"tile", "image_tile", "boxes", "image_boxes", "action", "bits", "macs", "review",
                            "skip_probability", "crop_probability"}  # fmt: skip
        assert len(one["boxes"]) == (one["action"] != "skip") and one["image_boxes"] == one["boxes"]
    report = json.loads(shown.out)["cases"][0]["decisions"]
    assert report == {"review": found["review"], "warnings": [], **totals}
    assert "% skip" in shown.err


def test_a_tile_near_a_threshold_is_for_review(model, images, tmp_path):
    weights = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    predictor = Predictor.from_folder(model, (0,), device="cpu")
    assert predictor.network.skip_threshold == weights["skip_threshold"]

    def near(probability, threshold):
        one, other = torch.logit(torch.tensor([probability, weights[threshold].item()]).double())
        return abs(one - other).item() < 0.5

    outcomes = predictor.predict_files(images, tmp_path / "out", save_decisions=True)
    for outcome in outcomes:
        found = json.loads((tmp_path / "out" / "decisions" / f"{outcome.case}.json").read_text())
        expected = [
            near(one.skip_probability, "skip_threshold")
            or (one.action != "skip" and near(one.crop_probability, "crop_threshold"))
            for one in (tile.decision for tile in outcome.decisions.tiles)
        ]
        assert found["review"] == outcome.decisions.review == any(expected)
        assert [one["review"] for one in found["folds"][0]["decisions"]] == expected
    assert any(outcome.decisions.review for outcome in outcomes), "nothing is near"


def test_decisions_are_the_last_to_appear_before_the_segmentation(model, images, tmp_path, monkeypatch, capsys):
    """A case that fails leaves none, and one is predicted again whose decisions are missing."""
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(SimpleITKIO, "write_seg", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        assert predict(model, images, out, "--save-decisions") == 1
    assert names(out) == ["dataset.json", "decisions", "plans.json"] and not names(out / "decisions")
    assert predict(model, images, out) == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    assert predict(model, images, out, "--continue_prediction", "--save-decisions", "-num_parts", 2) == 0
    assert names(out / "decisions") == ["case_0.json"]
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    assert after["case_0.nii.gz"] > before["case_0.nii.gz"] and after["case_1.nii.gz"] == before["case_1.nii.gz"]
    (out / "decisions" / "case_0.json").unlink()
    (out / "decisions" / "case_0.json").mkdir()
    capsys.readouterr()
    assert predict(model, images, out, "--save-decisions", "-num_parts", 2) == 1
    assert "failed: case_0" in capsys.readouterr().err and not [n for n in names(out) if "partial" in n]


@pytest.mark.parametrize("flag", ["--save-decisions", "--decision-pictures"])
def test_a_network_without_decisions_is_one_line(tmp_path, images, capsys, flag):
    folder = models.write_model(tmp_path / "model", dimension=2, patch_size=(16, 16))
    assert predict(folder, images, tmp_path / "out", flag) == 2
    shown = capsys.readouterr().err
    assert "nnUNetTrainer trains a network that makes no decisions" in shown and shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_same_in_python(tmp_path, model):
    stock = Predictor.from_folder(models.write_model(tmp_path / "model"), device="cpu")
    assert stock.predict(models.image((16, 16, 16)), (1, 1, 1)).decisions is None and stock.decided == ()
    with pytest.raises(UsageError, match="makes no decisions"):
        stock.predict_files([["a_0000.nii.gz"]], tmp_path / "out", save_decisions=True)
    predictor = Predictor.from_folder(model, (0,), device="cpu")
    assert isinstance(predictor.network, DecidingNetwork) and not isinstance(stock.network, DecidingNetwork)
    assert len(predictor.predict(slices().numpy(), SPACING).decisions.tiles) == 8 * 6


def test_nnunets_evaluation_does_not_see_them(model, images, tmp_path):
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder2

    out = tmp_path / "out"
    assert predict(model, images, out, "--decision-pictures") == 0
    reference = tmp_path / "labels"
    reference.mkdir()
    for path in out.glob("*.nii.gz"):
        sitk.WriteImage(sitk.ReadImage(str(path)), str(reference / path.name))
    compute_metrics_on_folder2(
        str(reference), str(out), str(out / "dataset.json"), str(out / "plans.json"), num_processes=1
    )
    assert len(json.loads((out / "summary.json").read_text())["metric_per_case"]) == 2
