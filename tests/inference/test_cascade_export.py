"""The ROI cascade exported: both stages in one folder, with the decisions of torch."""

import itertools
import json
import shutil
from pathlib import Path

import models
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from cascades import CUBE, ROI_NAMES, bright_cubes, write_cascade, write_preprocessed
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from plans import arch_kwargs, narrow_resnet

from nnunet_dyn import cli, plans_templates
from nnunet_dyn.architectures import triplane
from nnunet_dyn.architectures.roi_segmentor import ROISegmentor
from nnunet_dyn.errors import JobError, UsageError
from nnunet_dyn.inference import Predictor, cascade, conversion
from nnunet_dyn.inference.conversion import ENDINGS
from nnunet_dyn.inference.exported import sha256
from nnunet_dyn.inference.model_folder import load_model
from nnunet_dyn.inference.predictor import NOTHING_FOUND
from nnunet_dyn.inference.preprocessed import Cases

for package in ("openvino", "onnxruntime", "nncf"):
    pytest.importorskip(package, reason="the extras nnunet-dyn[openvino,onnx] are not installed")

pytestmark = pytest.mark.integration

TRI_PLANE = {"size": 32, "backbone": "resnet18", "pyramid": 16, "width": 16, "hidden": 16, "heads": 2, "stages": 1}
TRI_PLANE |= {"filter": "sobel"}
FAR = ((13, 21), (18, 29), (28, 39))
NETWORKS = {
    "stages": {},
    "efficient": {"network_class": "nnunet_dyn.architectures.efficient_unet.EfficientUNet", "encoder": "b0"},
}


@pytest.fixture(scope="module")
def segmentors(tmp_path_factory):
    """A cascade by the network inside the segmentor, and its preprocessed cases."""
    made = {}
    for name, kwargs in NETWORKS.items():
        folder = tmp_path_factory.mktemp(name)
        template = "roi_cascade"
        if kwargs:
            template = folder / "mine.json"
            own = json.loads((Path(plans_templates.__file__).parent / "roi_cascade.json").read_text())
            template.write_text(json.dumps(own | {"arch_kwargs": kwargs}))
        segmentor = write_cascade(folder / "results", str(template))
        cases = [bright_cubes(CUBE, FAR, seed=seed) for seed in range(3)]
        made[name] = segmentor, write_preprocessed(folder / "data", segmentor, cases, training=2)
    return made


def export(segmentor, data, output, engine, precision, *flags) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_preprocessed", str(data))
        command = ["export", "-m", str(segmentor), "-o", str(output), "--engine", engine, "--precision", precision]
        return cli.main([*command, "--threads", "1", *map(str, flags)])


@pytest.fixture(scope="module")
def exported(segmentors, tmp_path_factory):
    """By network and engine, in fp32, which the export has checked."""
    made = {}
    for network, engine in (("stages", "openvino"), ("efficient", "onnxruntime")):
        made[network] = tmp_path_factory.mktemp(network) / "exported"
        assert export(*segmentors[network], made[network], engine, "fp32") == 0
    return made


@pytest.fixture
def sizes(monkeypatch):
    """Of the crops that have a model of their own; ``None`` of what takes any."""
    from nnunet_dyn.inference import openvino_engine

    compiled, seen = openvino_engine.compiled, []

    def spy(model, precision, threads, shape=None, *more):
        seen.append(shape)
        return compiled(model, precision, threads, shape, *more)

    monkeypatch.setattr(openvino_engine, "compiled", spy)
    return seen


@pytest.mark.parametrize("network", list(NETWORKS))
def test_the_exported_cascade_is_that_of_torch(segmentors, exported, sizes, network):
    """On a case of two targets, with all decisions; and on boxes that need other models, one of a size of its own."""
    original = Predictor.from_folder(segmentors[network][0], (0,), device="cpu", threads=1)
    predictor = Predictor.from_folder(exported[network], threads=1)
    assert predictor.engine.name == predictor.first_stage.engine.name == original_engine(network)
    array = bright_cubes(FAR, ((3, 9), (5, 13), (7, 20)), seed=9)
    boxes = np.zeros(array.shape[1:], np.uint8)
    boxes[2:6, 3:8, 4:9], boxes[10:20, 15:25, 30:40] = 1, 2
    for given in (None, boxes):
        expected, got = (each.predict(array, (1, 1, 1), previous_stage=given) for each in (original, predictor))
        assert (expected.segmentation == got.segmentation).mean() >= 0.9999 and len(np.unique(got.segmentation)) > 2
        mine, theirs = (each.decisions for each in (got, expected))
        assert [tile.boxes for tile in mine.tiles] == [tile.boxes for tile in theirs.tiles]
        assert [tile.decision.to_json() for tile in mine.tiles] == [tile.decision.to_json() for tile in theirs.tiles]
        assert {tile.decision.action for tile in mine.tiles} == {"crop"} and mine.totals() == theirs.totals()
        assert given is not None or mine.first_stage.totals() == theirs.first_stage.totals()
    if network == "stages":
        assert len({stages for tile in mine.tiles for stages in tile.decision.stages}) == 2
        own = {tuple(size) for size in json.loads((exported[network] / "fold_0.json").read_text())["sizes"]}
        compiled_alone = {shape[2:] for shape in sizes if shape is not None}
        assert None in sizes and 1 < len(own) <= 4 and compiled_alone <= own and len(compiled_alone) > 1


def original_engine(network: str) -> str:
    return {"stages": "openvino", "efficient": "onnxruntime"}[network]


def test_the_manifest_has_both_stages(exported):
    folder = exported["stages"]
    outer, inner = (json.loads((each / "manifest.json").read_text()) for each in (folder, folder / "first_stage"))
    (found,) = outer["accuracy"]
    assert found["cases"] == ["case_2"] and found["dice_original"] > 0.9 and found["same_voxels"] > 0.9999
    assert (outer["configuration"], inner["configuration"]) == ("3d_roi", "3d_detect")
    for each, manifest in ((folder, outer), (folder / "first_stage", inner)):
        assert {path.name for path in each.iterdir() if path.is_file()} == {*manifest["files"], "manifest.json"}
        assert len(manifest["accuracy"]) == 1


def test_one_call_by_the_command(segmentors, exported, tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something was unpickled")

    images = models.write_cases(tmp_path / "images", {"case_0": bright_cubes(FAR, seed=7)})
    common = ["predict", "-i", str(images), "--threads", "1", "--json", "--save-decisions"]
    assert cli.main([*common, "-m", str(segmentors["stages"][0]), "-f", "0", "-o", str(tmp_path / "torch")]) == 0
    capsys.readouterr()
    for name in ("pickle.load", "pickle.loads", "torch.load"):
        monkeypatch.setattr(name, refuse)
    assert cli.main([*common, "-m", str(exported["stages"]), "-o", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    first = {"model": str(exported["stages"] / "first_stage"), "folds": [0], "checkpoint": "checkpoint_final.pth"}
    assert report["first_stage"] == first
    assert (report["engine"], report["precision"]) == ("openvino", "fp32") and "first_stage" in shown.err
    one, other = (sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name / "case_0.nii.gz")))
                  for name in ("out", "torch"))  # fmt: skip
    assert (one == other).mean() >= 0.9999 and len(np.unique(one)) > 2
    saved = json.loads((tmp_path / "out/decisions/case_0.json").read_text())
    assert set(saved["totals"]["shares"]) == {"crop"} and saved["first_stage"]["totals"]["shares"]


def test_where_nothing_is_detected_nothing_is_run(exported, monkeypatch):
    predictor = Predictor.from_folder(exported["stages"], threads=1)
    predictor.first_stage.engine.network.score_threshold.fill_(1.1)
    monkeypatch.setattr(predictor.engine.network, "segment_crops", lambda x: 1 / 0)
    predicted = predictor.predict(bright_cubes(), (1, 1, 1))
    assert predicted.decisions.warnings == (NOTHING_FOUND,) and not predicted.segmentation.any()
    assert predicted.decisions.tiles == ()


@pytest.mark.parametrize("network", list(NETWORKS))
def test_nothing_is_read_in_the_middle_of_a_case(exported, sizes, tmp_path, network):
    """What is compiled then is what had the hash."""
    folder = shutil.copytree(exported[network], tmp_path / "copy")
    predictors = [Predictor.from_folder(each, threads=1) for each in (exported[network], folder)]
    shutil.rmtree(folder)
    loaded = len(sizes)
    one, other = (predictor.predict(bright_cubes(FAR), (1, 1, 1)).segmentation for predictor in predictors)
    assert len(np.unique(one)) > 2 and (one == other).all()
    assert network != "stages" or len(sizes) > loaded


def test_boxes_may_still_come_from_files(exported):
    predictor = Predictor.from_folder(exported["stages"], threads=1, first_stage=False)
    assert predictor.first_stage is None
    with pytest.raises(UsageError, match="expected the first one, 3d_detect"):
        predictor.predict(bright_cubes(), (1, 1, 1))


@pytest.fixture
def converted(exported, monkeypatch):
    """Whatever is converted becomes what was converted before, of fold 0: that takes less time."""

    def convert(network, engine, shape, multiples=None):
        folder = exported[{"openvino": "stages", "onnxruntime": "efficient"}[engine]]
        if isinstance(network, cascade._DetectorLayers):
            file = folder / "first_stage" / f"fold_0{ENDINGS[engine]}"
        else:
            parts = json.loads((folder / "fold_0.json").read_text())["parts"]
            (file,) = (folder / part["file"] for part in parts if tuple(part["variant"]) == network.stages)
        return onnx.load(file) if engine == "onnxruntime" else openvino.Core().read_model(file)

    import onnx
    import openvino

    monkeypatch.setattr(cascade, "convert", convert)


def test_two_folds_each_behind_its_own_detector(segmentors, converted, tmp_path, capsys):
    """Where one is missing, behind all that there are. What the others have lost is found by the check."""
    segmentor, data = segmentors["stages"]
    results, preprocessed = (shutil.copytree(each, tmp_path / each.name) for each in (segmentor.parent, data))
    segmentor, detector = results / ROI_NAMES[1], results / ROI_NAMES[0]
    shutil.copytree(segmentor / "fold_0", segmentor / "fold_1")
    path = segmentor / "fold_1" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["network_weights"]["network.decoder.seg_layers.1.bias"][1] += 9
    torch.save(checkpoint, path)
    (splits,) = preprocessed.glob("*/splits_final.json")
    splits.write_text(json.dumps([*json.loads(splits.read_text()), {"train": ["case_2"], "val": ["case_0"]}]))
    for there in ([0], [0, 1]):
        folder = tmp_path / f"exported_{len(there)}"
        assert export(segmentor, preprocessed, folder, "openvino", "fp32", "--force", "-f", 0, 1) == 0
        manifest, inner = (
            json.loads((each / "manifest.json").read_text()) for each in (folder, folder / "first_stage")
        )
        assert manifest["folds"] == [0, 1] and inner["folds"] == there
        kept, lost = (found["same_voxels"] for found in manifest["accuracy"])
        assert kept > 0.9999 and lost < 0.999
        assert Predictor.from_folder(folder, (1,), threads=1).first_stage.folds == ((1,) if len(there) == 2 else (0,))
        shutil.copytree(detector / "fold_0", detector / "fold_1", dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("network", "engine", "precision", "max_drop"),
    [
        ("stages", "openvino", "bf16", 0.02),
        ("stages", "openvino", "int8", 0.2),
        ("efficient", "onnxruntime", "int8", 0.1),
    ],
)
def test_lower_precision(segmentors, converted, tmp_path, monkeypatch, network, engine, precision, max_drop):
    """Each loses about half of ``max_drop``: classes of an untrained network are close to each other."""
    folder = tmp_path / "exported"
    if engine == "openvino":  # nothing goes where temporary files do, which is often memory
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "which is memory"))
    assert export(*segmentors[network], folder, engine, precision, "--max-dice-drop", max_drop) == 0
    outer, inner = (json.loads((each / "manifest.json").read_text()) for each in (folder, folder / "first_stage"))
    assert (outer["precision"], inner["precision"]) == (precision, "fp32"), "the detector is calibrated in fp32"
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob(f"*{ENDINGS[engine]}")}
    quantised = {name for name, content in files.items() if b"FakeQuantize" in content or b"QuantizeLinear" in content}
    # The second model of "stages" is of crops that no case has.
    assert quantised == ({f"fold_0.0{ENDINGS[engine]}"} if precision == "int8" else set())
    assert not any(path.name.startswith((".", "tmp")) for path in folder.rglob("*")), "nothing else is left"
    if precision == "int8":
        assert outer["calibration"]["fold_0"]["cases"] == ["case_0", "case_1"]
        # Of two regions in each of two cases, both as they are and mirrored along the one axis that is allowed.
        assert outer["calibration"]["fold_0"]["patches"] == 8
    else:
        assert outer["calibration"] == {}
    assert inner["calibration"] == {}
    array = bright_cubes(FAR, seed=7)
    predictors = (Predictor.from_folder(each, (0,), device="cpu") for each in (segmentors[network][0], folder))
    expected, got = (predictor.predict(array, (1, 1, 1)) for predictor in predictors)
    assert [tile.boxes for tile in expected.decisions.tiles] == [tile.boxes for tile in got.decisions.tiles]
    masks = expected.segmentation > 0, got.segmentation > 0
    assert 2 * (masks[0] & masks[1]).sum() / sum(map(np.sum, masks)) > 0.8
    if precision == "int8":
        assert (expected.segmentation != got.segmentation).any()


def test_what_loses_too_much_after_every_attempt_is_not_written(segmentors, converted, tmp_path, monkeypatch, capsys):
    """Without a search, whose candidates are all alike."""
    asked, made = [], {}

    def quantise(plain, inputs, score, max_drop, *options):
        if score is not None:
            asked.append(max_drop)
        else:
            made[id(plain)] = conversion.quantise(plain, inputs, None, 0.0, *options)
        return made[id(plain)]

    monkeypatch.setattr("nnunet_dyn.inference.parts.quantise", quantise)
    flags = ["--max-dice-drop", 0.001, "--calibration-cases", 1]
    assert export(*segmentors["stages"], tmp_path / "new" / "exported", "openvino", "int8", *flags) == 1
    shown = capsys.readouterr().err
    assert "putting the layers back" in shown and "expected 0.001 at most. Nothing was written. Take bf16" in shown
    assert asked == [pytest.approx(share * 2 * asked[0]) for share in (1 / 2, 1 / 4, 1 / 8)] and asked[0] > 0
    assert not any((tmp_path / "new").iterdir())


def test_layers_of_onnx_are_known_where_the_file_has_no_shapes(exported):
    import onnx

    model = onnx.load(exported["efficient"] / "fold_0.0.onnx")
    layers = conversion._layers(model)
    assert len(model.graph.value_info) > len(layers)
    del model.graph.value_info[:]
    assert conversion._layers(model) == layers
    assert {layer.size for layer in layers} == {(0, 0, 0), (1, 1, 1)}, "any side, and squeeze-and-excitation"


def test_without_the_detectors_data_nothing_is_checked(segmentors, converted, tmp_path, capsys):
    segmentor, data = segmentors["stages"]
    data = shutil.copytree(data, tmp_path / "data")
    (of_detector,) = data.glob("*/*_3d_detect")
    shutil.rmtree(of_detector)
    folder = tmp_path / "exported"
    for precision, flags in (("fp32", ()), ("int8", ["--force"])):
        assert export(segmentor, data, folder, "openvino", precision, *flags) == 2 and not folder.exists()
        assert "No preprocessed cases" in capsys.readouterr().err
    assert export(segmentor, data, folder, "openvino", "fp32", "--force") == 0
    assert "not checked: there were no preprocessed cases" in capsys.readouterr().out
    for each in (folder, folder / "first_stage"):
        manifest = json.loads((each / "manifest.json").read_text())
        assert manifest["accuracy"] == [] and manifest["max_dice_drop"] is None
    assert json.loads((folder / "fold_0.json").read_text())["sizes"] == []
    assert Predictor.from_folder(folder, threads=1).predict(bright_cubes(FAR), (1, 1, 1)).segmentation.any()


def test_paper_mode(tmp_path):
    """A model for each cube, which crops are resampled to."""
    template = tmp_path / "mine.json"
    own = json.loads((Path(plans_templates.__file__).parent / "roi_cascade.json").read_text())
    own["arch_kwargs"]["mode"] = "paper"
    template.write_text(json.dumps(own))
    segmentor = write_cascade(tmp_path / "results", str(template), patch_size=(16, 32, 32))
    folder = tmp_path / "exported"
    assert export(segmentor, tmp_path, folder, "openvino", "fp32", "--force") == 0
    listed = json.loads((folder / "fold_0.json").read_text())
    assert [part["variant"] for part in listed["parts"]] == [[16] * 3, [32] * 3, [64] * 3] and listed["sizes"] == []
    predictors = (Predictor.from_folder(each, (0,), device="cpu", threads=1) for each in (segmentor, folder))
    expected, got = (predictor.predict(bright_cubes(FAR), (1, 1, 1)) for predictor in predictors)
    assert (expected.segmentation == got.segmentation).mean() >= 0.9999 and len(np.unique(got.segmentation)) > 2


@pytest.mark.parametrize("has_final", [True, False])
def test_the_detector_is_the_calibrated_one_whatever_the_segmentors_checkpoint(tmp_path, has_final):
    segmentor, checkpoints = write_cascade(tmp_path / "results"), ["checkpoint_best.pth"] * 2
    (segmentor / "fold_0" / "checkpoint_final.pth").rename(segmentor / "fold_0" / "checkpoint_best.pth")
    if has_final:
        checkpoints[0] = "checkpoint_final.pth"
    else:
        detector = segmentor.with_name(ROI_NAMES[0]) / "fold_0"
        (detector / "checkpoint_final.pth").rename(detector / "checkpoint_best.pth")
    folder, flags = tmp_path / "exported", ("-chk", "checkpoint_best.pth")
    assert export(segmentor, tmp_path, folder, "openvino", "fp32", "--force", *flags) == 0
    manifests = [json.loads((each / "manifest.json").read_text()) for each in (folder / "first_stage", folder)]
    assert [manifest["checkpoint"] for manifest in manifests] == checkpoints
    predictors = [Predictor.from_folder(each, (0,), "checkpoint_best.pth", threads=1) for each in (segmentor, folder)]
    for predictor in predictors:
        assert [predictor.first_stage.checkpoint, predictor.checkpoint] == checkpoints
    expected, got = (predictor.predict(bright_cubes(FAR), (1, 1, 1)).segmentation for predictor in predictors)
    assert (expected == got).mean() >= 0.9999 and got.any()


def test_a_full_disk_is_one_error(segmentors, tmp_path, monkeypatch, capsys):
    """Where the detector's boxes are written for the segmentor."""
    segmentor, data = segmentors["stages"]
    monkeypatch.setenv("nnUNet_preprocessed", str(data))
    parts = [load_model(folder, (0,)) for folder in (segmentor.with_name(ROI_NAMES[0]), segmentor)]
    first, second = (Cases.of(part, segmentor, hands_on=False) for part in parts)
    predictor = Predictor.from_folder(segmentor.with_name(ROI_NAMES[0]), (0,), device="cpu", threads=1)

    def full(*_, **__):
        raise RuntimeError("Error while creating the NDArray")  # as blosc2 says it

    monkeypatch.setattr(nnUNetDatasetBlosc2, "save_seg", full)
    with pytest.raises(JobError, match=r"Cannot write case_0: Error while creating the NDArray. Make space, or take"):
        first.hand_on(predictor, ["case_0"], second, tmp_path)


def test_a_detector_alone_is_exported_in_fp32(segmentors, tmp_path, capsys):
    segmentor, data = segmentors["stages"]
    assert export(segmentor.with_name(ROI_NAMES[0]), data, tmp_path / "exported", "openvino", "int8") == 2
    assert "Got int8 for a detector; expected fp32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda folder: shutil.rmtree(folder / "first_stage"), "first_stage/manifest.json is missing, or not the file"),
        (
            lambda folder: (folder / "first_stage" / "fold_0.npz").write_bytes(b""),
            "fold_0.npz is not the file",
        ),
        (lambda folder: replace(folder, "fold_0.1.xml", b""), "OpenVINO .* cannot run .*fold_0.1.xml"),
        (lambda folder: relist(folder, parts=[]), r"Cannot read .*fold_0.json: ValueError: variants got \[\]"),
        (lambda folder: relist(folder, rest="plans.json"), r"Cannot read .*fold_0.json: .*"),
        (lambda folder: relist(folder, rest="../other"), r"lists \.\./other, of which .* has no hash"),
        (lambda folder: relist(folder, sizes=7), "Cannot read .*fold_0.json: TypeError"),
    ],
)
def test_a_damaged_folder_is_one_error(exported, tmp_path, spoil, expected):
    folder = shutil.copytree(exported["stages"], tmp_path / "copy")
    spoil(folder)
    with pytest.raises(JobError, match=expected):
        Predictor.from_folder(folder, threads=1)


def relist(folder, **changes):
    """Change what a fold lists, and its hash."""
    content = json.loads((folder / "fold_0.json").read_text()) | changes
    replace(folder, "fold_0.json", json.dumps(content).encode())


def replace(folder, name, content):
    """Write another file in the place of one, and its hash."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = sha256(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_segmentor_without_its_detector(segmentors, tmp_path, capsys):
    segmentor, data = segmentors["stages"]
    alone = shutil.copytree(segmentor, tmp_path / ROI_NAMES[1])
    assert export(alone, data, tmp_path / "exported", "openvino", "fp32") == 2
    shown = capsys.readouterr().err
    assert f"expected its detector in {tmp_path / ROI_NAMES[0]}" in shown and shown.count("\n") == 1


@pytest.mark.parametrize("engine", list(ENDINGS))
def test_the_tri_plane_detector_finds_what_it_finds_in_torch(tmp_path, monkeypatch, engine):
    """Its slices are filtered in torch; of a volume in which one class is there and the others are not."""
    monkeypatch.setattr(triplane, "get_model", narrow_resnet)
    torch.manual_seed(0)
    network, other = (triplane.TriPlaneDetector(1, 3, patch_size=(16, 24, 20), **TRI_PLANE).eval() for _ in range(2))
    x = torch.from_numpy(bright_cubes(CUBE))[None]
    with torch.no_grad():
        raw = network.raw(x)
        scores = torch.sigmoid(raw["present"].mean(1))[0]
        network.score_threshold.copy_(torch.tensor([0, scores[1] - 0.01, scores[2] + 0.01]))
        network.margin.fill_(1)
        parts = cascade.convert_detector(network, engine, (1, 1, 16, 24, 20), "fold_0")
        file = tmp_path / parts.write(tmp_path, {})
        converted = cascade.CascadeEngine(other, [file], engine, "fp32", (1, 1, 16, 24, 20), 1)
        converted.load(0)
        for name, found in converted.network.raw(x).items():
            assert torch.allclose(found, raw[name], atol=1e-4) and found.shape == raw[name].shape
        (expected,), (got,) = network.decide(x), converted.decide(x)
    assert got.boxes == expected.boxes and got.classes == expected.classes == (1,) and got.cost == expected.cost
    assert got.scores == pytest.approx(expected.scores, abs=1e-4)


def test_a_model_folder_of_the_tri_plane_detector(tmp_path, monkeypatch):
    monkeypatch.setattr(triplane, "get_model", narrow_resnet)
    own = json.loads((Path(plans_templates.__file__).parent / "roi_cascade.json").read_text())
    name = f"{triplane.TriPlaneDetector.__module__}.TriPlaneDetector"
    own["configurations"]["3d_detect"] |= {"network_class_name": name, "arch_kwargs": TRI_PLANE}
    (tmp_path / "mine.json").write_text(json.dumps(own))
    options = {"template": str(tmp_path / "mine.json"), "part": "3d_detect", "patch_size": (16, 24, 20)}
    options |= {"trainer": triplane.TriPlaneDetector.trainer, "mirroring": None, "prepare": lambda network: None}
    model, folder = models.write_model(tmp_path / "model", **options), tmp_path / "exported"
    assert export(model, tmp_path, folder, "openvino", "fp32", "--force") == 0
    predictors = [Predictor.from_folder(each, (0,), device="cpu", threads=1) for each in (model, folder)]
    x = torch.from_numpy(bright_cubes(CUBE))[None]
    with torch.no_grad():
        for predictor in predictors:
            predictor.engine.load(0)
        expected, got = (predictor.engine.network.raw(x) for predictor in predictors)
    assert predictors[1].engine.name == "openvino" and expected.keys() == got.keys()
    assert all(torch.allclose(got[key], expected[key], atol=1e-4) for key in expected)


def test_crops_of_every_size_have_a_variant():
    """Also where axes differ, in ``paper`` mode, and of networks that skip nothing."""
    kwargs = arch_kwargs(3, 4, features=(8, 8, 8, 8), strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]])
    plain = kwargs | {"network_class": PlainConvUNet, "n_conv_per_stage": 1}
    skipping = {key: kwargs[key] for key in ("n_stages", "features_per_stage", "conv_op", "kernel_sizes", "strides")}
    patch = (16, 48, 64)
    for options in (plain, skipping):
        network = ROISegmentor(2, 2, image_channels=1, deep_supervision=False, **options)
        variants = network.variants(patch)
        for corner in itertools.product((1, 5, 16), (1, 9, 17, 48), (3, 30, 64)):
            box = network.crop(tuple((0, side) for side in corner), patch)
            size = network.run_size(box)
            _, multiples = variants[network.variant(size)]
            assert all(side % step == 0 and side >= 2 * step for side, step in zip(size, multiples, strict=True))
    network = ROISegmentor(2, 2, image_channels=1, deep_supervision=False, mode="paper", **skipping)
    assert {variant: size for variant, (size, _) in network.variants(patch).items()} == {
        (side,) * 3: (side,) * 3 for side in (16, 32, 64)
    }
