"""`nnunet_dyn export`: an exported model predicts as the original does, says so, and can be trusted to."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import models
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from preprocessed import write_preprocessed
from torch import nn

from nnunet_dyn import cli
from nnunet_dyn.architectures import med_danet
from nnunet_dyn.errors import JobError, UsageError
from nnunet_dyn.inference import Predictor, conversion, exporting
from nnunet_dyn.inference.engines import Engine
from nnunet_dyn.inference.exported import engine_of, sha256
from nnunet_dyn.inference.exporting import ExportOptions, _Check, _put
from nnunet_dyn.inference.model_folder import load_model
from nnunet_dyn.inference.parts import Part, Parts
from nnunet_dyn.inference.preprocessed import Cases, Patches, evenly

pytest.importorskip("openvino", reason="the extra nnunet-dyn[openvino] is not installed")
pytest.importorskip("nncf", reason="the extra nnunet-dyn[openvino] is not installed")

ARRAY = models.image((16, 20, 17))
SPACING = (1.0, 1.0, 1.0)
MED_DANET = "nnUNetTrainerMedDANetV2"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("models") / "model", mirroring=(0,))


@pytest.fixture(scope="module")
def preprocessed(model, tmp_path_factory) -> Path:
    return write_preprocessed(tmp_path_factory.mktemp("preprocessed"), model, shape=(16, 20, 17))


@pytest.fixture(autouse=True)
def data(preprocessed, monkeypatch):
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed))


def export(model: Path, output: Path, *flags) -> int:
    flags = ["--engine", "openvino", "--threads", "1", *map(str, flags)]
    return cli.main(["export", "-m", str(model), "-o", str(output), *flags])


@pytest.fixture(scope="module")
def quantised(model, preprocessed, tmp_path_factory) -> Path:
    """As exported by the command, with a limit that an untrained network keeps."""
    folder = tmp_path_factory.mktemp("exported") / "int8"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_preprocessed", str(preprocessed))
        assert export(model, folder, "--precision", "int8", "--max-dice-drop", 0.5, "--calibration-cases", 2) == 0
    return folder


@pytest.fixture
def copy(quantised, tmp_path) -> Path:
    return Path(shutil.copytree(quantised, tmp_path / "copy"))


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def change_manifest(folder: Path, **changes) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest_of(folder) | changes))


def partial(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_the_manifest_says_what_is_in_the_folder(quantised):
    manifest = manifest_of(quantised)
    assert sorted(path.name for path in quantised.iterdir()) == sorted([*manifest["files"], "manifest.json"])
    assert {"fold_0.xml", "fold_0.bin", "plans.json", "dataset.json"} == set(manifest["files"])
    assert (manifest["engine"], manifest["precision"], manifest["trainer"]) == ("openvino", "int8", "nnUNetTrainer")
    assert manifest["input_shape"] == [1, 1, 16, 16, 16] and manifest["mirroring_axes"] == [0]
    assert {"nnunet_dyn", "nnunetv2", "torch", "openvino", "nncf"} <= set(manifest["versions"])
    assert manifest["calibration"] == {"fold_0": {"cases": ["case_0", "case_1"], "patches": 8}}
    (found,) = manifest["accuracy"]
    assert found["cases"] == ["case_3", "case_4"] and found["dice_original"] > 0.999
    assert not found["cases_seen_in_training"] and found["finite"] and found["computed_in"] in ("bf16", "fp32")
    assert found["dice_drop"] == pytest.approx(found["dice_original"] - found["dice_exported"])
    assert 0.001 < found["dice_drop"] < 0.5, "int8 is close, and not the same"
    assert len(found["dice_exported_by_class"]) == 4 and 0.5 < found["same_voxels"] < 1
    assert not partial(quantised.parent)


def test_int8_keeps_the_logits_and_predicts_files(model, quantised, tmp_path, capsys):
    data = torch.from_numpy(ARRAY)
    original, exported = (Predictor.from_folder(f, device="cpu", threads=1) for f in (model, quantised))
    assert (exported.engine.name, exported.engine.precision, exported.engine.threads) == ("openvino", "int8", 1)
    expected, got = (p.predict_logits_from_preprocessed_data(data).float() for p in (original, exported))
    noise = (expected - got).square().mean() / expected.square().mean()
    assert -10 * float(torch.log10(noise)) > 12, "signal-to-noise ratio in dB"
    images = models.write_cases(tmp_path / "images", {"case": ARRAY})
    assert cli.main(["predict", "-m", str(quantised), "-i", str(images), "-o", str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["engine"], report["precision"], report["device"], report["folds"]) == ("openvino", "int8", "cpu", 1)
    written = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "case.nii.gz")))
    assert (written == exported.predict(ARRAY, SPACING).segmentation).all() and len(np.unique(written)) > 2


def test_layers_are_quantised(quantised):
    text = (quantised / "fold_0.xml").read_text()
    assert text.count('type="FakeQuantize"') > 10 and 'element_type="i8"' in text


@pytest.mark.parametrize("name", ["fold_0.bin", "plans.json"])
def test_a_changed_file_is_found(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(JobError, match=f"{name} is not the file that was exported"):
        Predictor.from_folder(copy)


def test_a_missing_file_is_found(copy):
    (copy / "fold_0.bin").unlink()
    with pytest.raises(JobError, match=r"has no fold_0\.bin"):
        Predictor.from_folder(copy)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(format=2, something="new"), "was exported by nnunet_dyn .* in format 2; expected 1 or less"),
        (dict(precision="fp64"), "ValueError: engine and precision got openvino fp64"),
        (dict(files={}), "ValueError: files got no hash of"),
        (dict(folds=[]), "expected one of each fold"),
    ],
)
def test_a_manifest_that_cannot_be_used(copy, changes, expected):
    change_manifest(copy, **changes)
    with pytest.raises(JobError, match=expected):
        Predictor.from_folder(copy)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--engine", "onnxruntime"], "Got engine onnxruntime"),
        (["--precision", "bf16"], "Got precision bf16"),
        (["-chk", "checkpoint_best.pth"], "Got checkpoint checkpoint_best.pth"),
        (["-f", "1"], "has no fold 1; there are folds: 0"),
        (["-device", "cuda"], "Engine openvino runs on the CPU"),
    ],
)
def test_an_exported_model_is_used_as_it_was_checked(quantised, tmp_path, capsys, flags, expected):
    images = models.write_cases(tmp_path / "images", {"case": ARRAY})
    common = ["predict", "-m", str(quantised), "-i", str(images), "-o", str(tmp_path / "out")]
    assert cli.main([*common, *flags]) == 2
    assert expected in capsys.readouterr().err and not (tmp_path / "out").exists()


def name_in_plans(folder: Path, **names: str) -> None:
    """Let plans.json name other things: the network as ``network``, or a layer."""
    plans = json.loads((folder / "plans.json").read_text())
    (configuration,) = plans["configurations"].values()
    architecture = configuration["architecture"]
    if "network" in names:
        architecture["network_class_name"] = names.pop("network")
    architecture["arch_kwargs"] |= names
    (folder / "plans.json").write_text(json.dumps(plans))


def run_nothing(monkeypatch) -> None:
    def refuse(*_, **__):
        raise AssertionError("what the plans name was run")

    for name in ("torch.hub.load", "os.system"):
        monkeypatch.setattr(name, refuse)


@pytest.mark.parametrize(
    ("trainer", "names", "expected"),
    [
        ("nnUNetTrainer", {}, "names trainer nnUNetTrainer for fold_0.json"),
        (MED_DANET, dict(network="torch.hub.load"), "names torch.hub.load, which is no network or layer of nnunet_dyn"),
        (MED_DANET, dict(network="nnunet_dyn.architectures.med_danet.torch.hub.load"), "which is no network or layer"),
        (MED_DANET, dict(nonlin="os.system"), "names os.system, which is no network or layer"),
        (MED_DANET, dict(network_class="models.Network"), "names models.Network, which is no network or layer"),
        (MED_DANET, {}, r"fold_0.json lists \.\./other.bin, \.\./other.xml, of which .* has no hash"),
    ],
)
def test_what_an_exported_folder_names_is_not_run(copy, monkeypatch, trainer, names, expected):
    """Its hashes fit: whoever writes the folder writes them too."""
    name_in_plans(copy, **names)
    part = {"module": "policy", "size": [16, 16], "precision": "fp32", "file": "../other.xml"}
    (copy / "fold_0.json").write_text(json.dumps({"parts": [part], "rest": "fold_0.bin"}))
    files = {name: sha256(copy / name) for name in ("fold_0.json", "fold_0.bin", "plans.json", "dataset.json")}
    change_manifest(copy, trainer=trainer, models=["fold_0.json"], files=files)
    run_nothing(monkeypatch)
    with pytest.raises(JobError, match=expected):
        Predictor.from_folder(copy)


@pytest.mark.parametrize("names", [dict(network="torch.hub.load"), dict(nonlin="torch.hub.load")])
def test_what_a_model_folder_names_is_not_run(model, tmp_path, monkeypatch, names):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    name_in_plans(folder, **names)
    run_nothing(monkeypatch)
    with pytest.raises(JobError, match="is no network or layer; expected only those"):
        load_model(folder)


def test_nothing_is_unpickled(quantised, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something was unpickled")

    for name in ("pickle.load", "pickle.loads", "torch.load"):
        monkeypatch.setattr(name, refuse)
    assert Predictor.from_folder(quantised).engine.folds == 1


def cases_of(model: Path, tmp_path: Path, preprocessed: Path) -> Cases:
    """With splits that a test may change."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_preprocessed", str(shutil.copytree(preprocessed, tmp_path / "data")))
        return Cases.of(load_model(model), model)


def test_cases_of_the_training_are_not_taken_for_others(model, preprocessed, tmp_path):
    copied = Path(shutil.copytree(model, tmp_path / "model"))
    cases = cases_of(copied, tmp_path, preprocessed)
    assert cases.split(0) == (["case_0", "case_1", "case_2"], ["case_3", "case_4"])
    summary = copied / "fold_0" / "validation" / "summary.json"
    summary.parent.mkdir()
    windows = "D:\\somewhere\\"  # of a model that was trained there
    for folder, names in (
        ("/somewhere/", ["case_3", "case_4"]),
        (windows, ["case_3", "case_4"]),
        ("/somewhere/", ["case_1", "case_3"]),
    ):
        files = [{"prediction_file": f"{folder}{name}.nii.gz"} for name in names]
        summary.write_text(json.dumps({"metric_per_case": files}))
        if "case_4" in names:
            assert cases.split(0)[1] == names
    with pytest.raises(UsageError, match=r"other validation cases of fold 0 than .*summary.json, such as case_1"):
        cases.split(0)
    splits = cases.folder.parent / "splits_final.json"
    splits.unlink()
    with pytest.raises(UsageError, match=r"splits_final.json; expected the splits of the training"):
        cases.split(0)
    assert not splits.exists(), "nnU-Net would write one"
    assert cases.split("all")[0] == cases.split("all")[1]


class Fixed(Engine):
    """Gives the same logits everywhere."""

    name = "torch"

    def __init__(self, logits):
        super().__init__("fp32", 1, 1)
        self.logits = torch.tensor(logits)

    def load(self, fold):
        pass

    def infer(self, tiles):
        return self.logits.view(1, -1, 1, 1, 1).expand(len(tiles), -1, *tiles.shape[2:]).clone()


def check_of(model, preprocessed, tmp_path, fold=0) -> tuple[_Check, list[str]]:
    """One whose original model finds class 1 alone, everywhere, on cases that have nothing else."""
    lines = []
    cases = cases_of(model, tmp_path, preprocessed)
    options = ExportOptions("openvino", "fp32", validation_cases=1)
    check = _Check(cases.model, Fixed([0.0, 1.0, 0.0, 0.0, 0.0]), cases, fold, options, lines.append)
    return check, lines


def test_classes_that_are_nowhere_do_not_count(model, preprocessed, tmp_path, monkeypatch):
    check, lines = check_of(model, preprocessed, tmp_path)
    shape = (16, 16, 16)
    monkeypatch.setattr(Cases, "load", lambda self, name: (torch.zeros(1, *shape), np.ones(shape, int)))
    found = check(Fixed([0.0, 1.0, 0.0, 0.0, 0.0]))
    assert found["dice_original"] == 1 and found["dice_original_by_class"] == [1, None, None, None]
    assert lines == [
        "fold 0: case 1 of 1, case_3, by the original model",
        "fold 0: case 1 of 1, case_3, by the exported model",
    ]
    found = check(Fixed([0.0, 0.0, 1.0, 0.0, 0.0]))
    assert found["dice_exported_by_class"] == [0, 0, None, None] and found["dice_drop"] == 1, "false positives are 0"
    found = check(Fixed([float("nan")] * 5))
    assert found["dice_drop"] == 1 and not found["finite"] and "dice_exported" not in found
    check._original, check._engine = None, Fixed([1.0, 0.0, 0.0, 0.0, 0.0])
    monkeypatch.setattr(Cases, "load", lambda self, name: (torch.zeros(1, *shape), np.zeros(shape, int)))
    with pytest.raises(JobError, match="none of the cases case_3 has foreground"):
        check(check._engine)
    monkeypatch.setattr(Cases, "load", lambda self, name: (_ for _ in ()).throw(AssertionError("too early")))
    check._original = None
    with pytest.raises(JobError, match="cannot run"):
        check(engine_of("openvino")([tmp_path / "nothing.xml"], "fp32", 1))


def test_fold_all_says_that_its_cases_were_trained_on(model, preprocessed, tmp_path):
    assert check_of(model, preprocessed, tmp_path, "all")[0].seen


def test_patches_are_the_same_and_one_at_a_time(model, preprocessed, tmp_path):
    patches = Patches(cases_of(model, tmp_path, preprocessed), ("case_0", "case_1"), 3)
    state = np.random.get_state()[1].copy()
    first, second = list(patches), list(patches)
    assert len(patches) == len(first) == 3 and iter(patches) is not iter(patches)
    assert all((a == b).all() for a, b in zip(first, second, strict=True)) and (first[0] != first[1]).any()
    assert (np.random.get_state()[1] == state).all()


def test_what_cannot_be_written_is_one_error(tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr("openvino.save_model", full)
    with pytest.raises(JobError, match=r"Cannot write a.xml: No space left on device. Make space"):
        conversion.save(None, tmp_path / "a.xml")


def test_what_was_there_stays_if_the_new_one_cannot_be_moved(copy, tmp_path, monkeypatch):
    new, replace = tmp_path / "new", os.replace
    new.mkdir()

    def fail(source, target):
        if Path(source) == new:
            raise OSError("a network drive went away")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="went away"):
        _put(new, copy)
    assert manifest_of(copy)["precision"] == "int8" and not partial(tmp_path)


def lose_a_class(network) -> None:
    with torch.no_grad():
        network.decoder.seg_layers[-1].bias[1] -= 100


def spoil(monkeypatch) -> None:
    """Let the conversion lose a class."""
    from nnunet_dyn.inference import exporting

    original = exporting.convert

    def convert(network, *args):
        lose_a_class(network)
        return original(network, *args)

    monkeypatch.setattr(exporting, "convert", convert)


def test_a_model_that_loses_too_much_is_not_written_unless_forced(model, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch)
    output = tmp_path / "new" / "exported"
    assert export(model, output, "--precision", "fp32") == 1
    assert "expected 0.005 at most. Nothing was written. Predict with --engine torch" in capsys.readouterr().err
    assert not output.exists() and not partial(output.parent)
    assert export(model, output, "--precision", "fp32", "--force", "--json", "--validation-cases", 1) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest == manifest_of(output)
    (found,) = manifest["accuracy"]
    assert found["dice_drop"] > 0.1 and found["dice_exported_by_class"][0] == 0 and len(found["cases"]) == 1


def test_layers_are_put_back_until_the_check_passes(model, tmp_path, monkeypatch, capsys):
    """With a quantisation that needs three attempts."""
    trained, limits = load_model(model), []
    trained.network.load_state_dict(trained.parameters[0])
    lose_a_class(trained.network)
    bad = conversion.convert(trained.network, "openvino", trained.input_shape)

    def quantise(plain, patches, score, max_drop, *_):
        if score is not None:
            assert score(conversion.runner(plain)) == 1 > score(conversion.runner(bad))
        limits.append(max_drop)
        return plain if len(limits) == 3 else bad

    monkeypatch.setattr("nnunet_dyn.inference.parts.quantise", quantise)
    monkeypatch.setattr(exporting, "quantisations", lambda made: 2 if made is bad else 0)
    output = tmp_path / "exported"
    # What is left is in bf16, which an untrained network does not take well.
    flags = ["--calibration-cases", 1, "--validation-cases", 1, "--max-dice-drop", 0.2]
    assert export(model, output, "--precision", "int8", *flags) == 0
    assert "putting the layers back that lose most" in capsys.readouterr().err
    (found,) = manifest_of(output)["accuracy"]
    assert found["layers_put_back"] == {"fold_0.xml": 2} and found["dice_drop"] < 0.2
    assert limits[0] == 0 and limits[1] == pytest.approx(2 * limits[2]) and 0 < limits[1] < 1


class Fake(NamedTuple):
    """In the place of a model: as many voxels wrong, and as many roundings to int8."""

    name: str
    wrong: int = 0
    roundings: int = 0

    def __call__(self, _):
        logits = np.zeros((1, 5, 4, 4, 4), np.float32)
        logits[0, 1], logits[0, 2].reshape(-1)[: self.wrong] = 1, 2
        return logits


def test_the_best_attempt_stays(model, preprocessed, tmp_path, monkeypatch):
    """Of three models, of which one loses nothing and is not searched, and NNCF fails on one."""
    searched, lines, drops = [], [], iter([0.5, 0.2, 0.3])

    def quantise(plain, inputs, score, max_drop, *_):
        if score is None:
            return Fake(plain.name, {"a": 8, "b": 4, "c": 0}[plain.name], 3)
        assert score(plain) == 1 > score(Fake("", 1))
        searched.append((plain.name, max_drop))
        if plain.name == "b":
            raise JobError("NNCF cannot quantise the network.")
        return Fake("a", 8, 4 - [name for name, _ in searched].count("a"))

    def check(engine):
        return {"finite": True, "dice_drop": next(drops)}

    check.fold, check.names = 0, ["case_3"]
    for name, fake in (("parts.quantise", quantise), ("parts.save", lambda made, path: path.write_text(str(made)))):
        monkeypatch.setattr(f"nnunet_dyn.inference.{name}", fake)
    for name, fake in (("runner", lambda made, *_: made), ("quantisations", lambda made: made.roundings)):
        monkeypatch.setattr(exporting, name, fake)
    monkeypatch.setattr(exporting, "_engine", lambda *_: None)
    parts = Parts("fold_0", tuple(Part(name, Fake(name), (np.zeros(1),)) for name in "abc"), {"parts": []})
    cases, options = cases_of(model, tmp_path, preprocessed), ExportOptions("openvino", "int8")
    folder = tmp_path / "folder"
    folder.mkdir()
    file, found = exporting._write_parts(None, cases, parts, check, options, folder, lines.append)
    assert found == {"finite": True, "dice_drop": 0.2, "layers_put_back": {"a": 1}} and file == "fold_0.json"
    assert (folder / "a").read_text() == str(Fake("a", 8, 2)), "not of the third attempt, which was worse"
    assert (folder / "b").read_text() == str(Fake("b", 4, 3)) and next(drops, None) is None
    shares = {name: [drop for other, drop in searched if other == name] for name in "abc"}
    assert shares["c"] == [] and 0 < shares["b"][0] < shares["a"][0]
    for asked in (shares["a"], shares["b"]):
        assert asked == [pytest.approx(asked[0] / divisor) for divisor in (1, 2, 4)]
    assert "fold 0: loses 0.5000 Dice; putting the layers back that lose most, of 2 of 3 models" in lines
    assert lines.count("fold 0: b stays as it is. NNCF cannot quantise the network.") == 3


def test_what_runs_in_torch_takes_the_threads(model, tmp_path, monkeypatch, capsys):
    used, before = [], torch.get_num_threads()

    def convert(*_):
        used.append(torch.get_num_threads())
        raise JobError("enough")

    monkeypatch.setattr(exporting, "_convert", convert)
    torch.set_num_threads(2)
    try:
        assert export(model, tmp_path / "exported", "--precision", "fp32") == 1
        assert used == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_else_to_take():
    def remedy(engine, precision, decides=False) -> str:
        network = med_danet.MedDANetV2(1, 2, med_danet.ModifiedUNet, strides=[[1, 1], [2, 2]], blocks=(1, 1))
        return exporting._instead(network if decides else nn.Identity(), ExportOptions(engine, precision), "bf16")

    assert remedy("openvino", "int8") == "Take bf16" and remedy("onnxruntime", "int8") == "Take fp32"
    assert remedy("openvino", "bf16") == "Take fp32"
    assert remedy("openvino", "fp32") == remedy("openvino", "int8", decides=True) == "Predict with --engine torch"


def test_samples_are_spread():
    assert evenly(range(11), 8) == [0, 1, 2, 4, 5, 6, 8, 9] and evenly("ab", 8) == ["a", "b"] and evenly((), 8) == []


def test_int8_needs_preprocessed_cases_and_fp32_force(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    for flags in (["int8", "--force"], ["fp32"]):
        assert export(model, tmp_path / "exported", "--precision", *flags) == 2
        assert "No preprocessed cases" in capsys.readouterr().err and not (tmp_path / "exported").exists()
    assert export(model, tmp_path / "exported", "--precision", "fp32", "--force") == 0
    assert "not checked" in capsys.readouterr().out
    manifest = manifest_of(tmp_path / "exported")
    assert manifest["accuracy"] == [] and manifest["max_dice_drop"] is None


def test_without_the_splits_of_the_training_fp32_needs_force(model, preprocessed, tmp_path, monkeypatch, capsys):
    data = Path(shutil.copytree(preprocessed, tmp_path / "data"))
    next(data.rglob("splits_final.json")).unlink()
    monkeypatch.setenv("nnUNet_preprocessed", str(data))
    assert export(model, tmp_path / "exported", "--precision", "fp32") == 2
    assert "unchecked with --force" in capsys.readouterr().err and not (tmp_path / "exported").exists()
    assert export(model, tmp_path / "exported", "--precision", "fp32", "--force") == 0
    assert manifest_of(tmp_path / "exported")["accuracy"] == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--precision", "fp32", "--engine", "torch"], "predicts from a model folder"),
        (["--precision", "fp32", "--engine", "tensorrt"], "Unknown engine 'tensorrt'"),
        (["--precision", "bf16", "--engine", "onnxruntime"], "Engine onnxruntime has no bf16"),
        (["--precision", "fp32", "--max-dice-drop", "2"], "expected 0 to 1"),
        (["--precision", "fp32", "--validation-cases", "0"], "--validation-cases 0"),
        (["--precision", "fp32", "-f", "3"], "there are folds: 0"),
        (["--precision", "fp32", "-o", "{model}", "--overwrite"], "is there already"),
        (["--precision", "fp32", "-m", "nowhere"], "expected the model folder"),
    ],
)
def test_bad_usage_is_one_line(model, tmp_path, capsys, flags, expected):
    assert export(model, tmp_path / "exported", *(flag.format(model=model) for flag in flags)) == 2
    shown = capsys.readouterr()
    assert expected in shown.err and shown.err.count("\n") == 1 and not shown.out
    assert (model / "fold_0").is_dir() and not (tmp_path / "exported").exists()


def test_an_exported_model_is_replaced_only_when_asked(model, copy, capsys):
    assert export(model, copy, "--precision", "bf16") == 2
    assert "or --overwrite" in capsys.readouterr().err and manifest_of(copy)["precision"] == "int8"
    allowed = ["--validation-cases", 1, "--max-dice-drop", 0.2]
    assert export(model, copy, "--precision", "bf16", "--overwrite", *allowed) == 0
    assert manifest_of(copy)["precision"] == "bf16" and not partial(copy.parent)
    assert Predictor.from_folder(copy).engine.precision == "bf16"


@pytest.mark.parametrize(("engine", "extra"), [("openvino", "openvino"), ("onnxruntime", "onnx")])
def test_an_engine_that_is_not_installed(model, copy, tmp_path, monkeypatch, capsys, engine, extra):
    change_manifest(copy, engine=engine)
    monkeypatch.setitem(sys.modules, engine, None)
    assert export(model, tmp_path / "exported", "--precision", "fp32", "--engine", engine) == 2
    assert f"pip install 'nnunet-dyn[{extra}]'" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"which is not installed.*, or take --engine torch"):
        Predictor.from_folder(model, engine=engine, device="cpu")
    with pytest.raises(UsageError, match=rf"nnunet-dyn\[{extra}\]'\.$"):  # an exported model has one engine
        Predictor.from_folder(copy)


def test_an_engine_that_is_broken(model, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name == "nncf" or name.startswith("nncf.")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "nncf.py").write_text("import a_library_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    assert export(model, tmp_path / "exported", "--precision", "int8") == 2
    shown = capsys.readouterr().err
    assert "needs nncf, which cannot be imported: No module named 'a_library_that_is_missing'" in shown
    assert "--engine torch" not in shown


def test_quantisation_that_is_not_installed(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nncf", None)
    assert export(model, tmp_path / "exported", "--precision", "int8") == 2
    assert "needs nncf" in capsys.readouterr().err
