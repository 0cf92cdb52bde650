"""Networks that decide: from a model folder to a prediction in real integers."""

import json
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from cascades import CUBE, bright_cubes, give_every_class, write_cascade
from cascades import write_preprocessed as write_preprocessed_cascade
from preprocessed import write_preprocessed

from nnunet_dyn import cli, plans_templates
from nnunet_dyn.inference import Predictor, exporting
from nnunet_dyn.inference.conversion import quantisations, runner
from nnunet_dyn.inference.parts import Part


@pytest.fixture(autouse=True)
def engines():
    for package in ("openvino", "nncf"):
        pytest.importorskip(package, reason="the extra nnunet-dyn[openvino] is not installed")


def export(model, data, output, limit, engine="openvino", *flags) -> dict:
    flags = ["--engine", engine, "--precision", "int8", "--calibration-cases", "1", "--validation-cases", "1", *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_preprocessed", str(data))
        status = cli.main(["export", "-m", str(model), "-o", str(output), *flags, "--max-dice-drop", str(limit)])
    assert status == 0
    (found,) = json.loads((output / "manifest.json").read_text())["accuracy"]
    return found


def test_a_network_that_chooses_its_bits(tmp_path, capsys):
    model = models.write_model(
        tmp_path / "model", trainer="nnUNetTrainerMedDANetV2QuantOnly", dimension=2, patch_size=(32, 32), mirroring=None
    )
    path = model / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["network_weights"]["is_quantised"].fill_(True)
    torch.save(checkpoint, path)
    data = write_preprocessed(tmp_path / "data", model, shape=(4, 32, 32))
    found = export(model, data, tmp_path / "exported", limit=0.9)
    assert found["dice_original"] > 0.999 and found["same_voxels"] > 0.8
    exported = Predictor.from_folder(tmp_path / "exported", threads=1)
    assert (exported.engine.name, exported.engine.precision) == ("openvino", "int8")
    array = models.image((4, 40, 31))
    original = Predictor.from_folder(model, (0,), device="cpu").predict(array, (1, 1, 1)).segmentation
    assert (exported.predict(array, (1, 1, 1)).segmentation == original).mean() > 0.8 and len(np.unique(original)) > 2
    images = models.write_cases(tmp_path / "images", {"case": array})
    flags = ["-i", str(images), "-o", str(tmp_path / "out"), "-m"]
    assert cli.main(["predict", *flags, str(tmp_path / "exported"), "--json"]) == 0
    assert cli.main(["predict", *flags, str(model), "-f", "0", "--engine", "openvino"]) == 2
    assert "a network that decides what it computes" in capsys.readouterr().err


def lost(capsys) -> float:
    """Dice, before layers were put back."""
    lines = capsys.readouterr().err.splitlines()
    (line,) = (line for line in lines if "putting the layers back that lose most" in line)
    return float(line.split("loses ")[1].split()[0])


@pytest.fixture
def quantised(monkeypatch) -> list[tuple[str, bool, int]]:
    """Every model that was quantised: its file, whether by a score, and how often it rounds."""
    made, original = [], Part.quantised

    def spy(part, threads, score=None, max_drop=0.0):
        if score is not None:
            assert score(runner(part.model, threads)) == 1 > score(runner(models_of_file[part.file], threads, "int8"))
        result = original(part, threads, score, max_drop)
        models_of_file.setdefault(part.file, result)
        made.append((part.file, score is not None, quantisations(result)))
        return result

    models_of_file = {}
    monkeypatch.setattr(Part, "quantised", spy)
    return made


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_layers_of_a_segmentor_are_put_back(tmp_path, capsys, quantised, engine):
    """By NNCF, of a layer that int8 is too coarse for. What is left in bf16 an untrained network does not take well."""
    pytest.importorskip(engine, reason="the extra of this engine is not installed")

    def prepare(network):
        first, second = network.network.encoder.stages[0][0].convs[:2]
        models.lose_in_int8(first.norm, second.conv)
        give_every_class(network)

    template = json.loads((Path(plans_templates.__file__).parent / "roi_cascade.json").read_text())
    template["arch_kwargs"] = {"network_class": "dynamic_network_architectures.architectures.unet.PlainConvUNet"}
    (tmp_path / "plain.json").write_text(json.dumps(template))
    model = write_cascade(tmp_path / "results", str(tmp_path / "plain.json"), prepare=prepare)
    cases = [bright_cubes(CUBE, seed=seed) for seed in range(2)]
    data = write_preprocessed_cascade(tmp_path / "data", model, cases, training=1)
    found = export(model, data, tmp_path / "exported", 0.5, engine)
    assert found["dice_drop"] < 0.5 < lost(capsys)
    (file, *_), (_, is_searched, left) = quantised[0], quantised[1]
    assert is_searched and left > 0 and found["layers_put_back"] == {file: quantised[0][2] - quantised[-1][2]}
    assert found["layers_put_back"][file] > 0 and {name for name, *_ in quantised} == {file}


def test_layers_of_a_network_that_crops_are_put_back(tmp_path, monkeypatch, quantised):
    """By NNCF, of a stage of the crops."""

    @torch.no_grad()
    def prepare(network):
        network.is_quantised.fill_(True)
        block, head = network.backbone.encoder.stages[0][0], network.crop_tail.seg_layers[0]
        models.lose_in_int8(block[3], block[5])
        head.weight *= 10
        head.bias -= network(torch.randn(4, 1, 32, 32)).mean((0, 2, 3))

    monkeypatch.setattr(exporting, "_FALLBACK", (1 / 2,))
    monkeypatch.setattr(exporting, "_SLICES", 3)
    kwargs = {"base_features": 4, "blocks": [1, 1], "med_danet": {"policy_space": [16], "bits": [8]}}
    options = {"dimension": 2, "patch_size": (32, 32), "mirroring": None, "prepare": prepare, "arch_kwargs": kwargs}
    model = models.write_model(tmp_path / "m", trainer="nnUNetTrainerMedDANetV2", template="meddanetv2", **options)
    data = write_preprocessed(tmp_path / "data", model, shape=(4, 32, 32), training=1, validation=1)
    export(model, data, tmp_path / "exported", 0.0, "openvino", "--force")
    assert json.loads((tmp_path / "exported" / "manifest.json").read_text())["calibration"]["fold_0"]["patches"] == 3
    first = {file: count for file, is_searched, count in quantised if not is_searched}
    searched = {file: count for file, is_searched, count in quantised if is_searched}
    stages = [f"encoder.stages.{stage}.16x16" for stage in (0, 1)] + ["decoder.transpconvs.0.8x8"]
    assert list(first) == [*(f"fold_0.backbone.{name}.int8.xml" for name in stages), "fold_0.crop_tail.32x32.int8.xml"]
    stage = "fold_0.backbone.encoder.stages.0.16x16.int8.xml"
    assert searched[stage] < first[stage]
