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
from nnunet_dyn.inference import Predictor
from nnunet_dyn.inference.conversion import runner


@pytest.fixture(autouse=True)
def engines():
    for package in ("openvino", "nncf"):
        pytest.importorskip(package, reason="the extra nnunet-dyn[openvino] is not installed")


def export(model, data, output, limit) -> dict:
    flags = ["--engine", "openvino", "--precision", "int8", "--calibration-cases", "1", "--validation-cases", "1"]
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


def silenced(model):
    """``model`` of OpenVINO that gives zeros."""
    import openvino
    from openvino import opset13

    made = model.clone()
    zeros = opset13.multiply(made.get_results()[0].input_value(0), np.float32(0))
    return openvino.Model([zeros], made.get_parameters())


def test_layers_of_a_network_that_chooses_its_bits_are_put_back(tmp_path, monkeypatch, capsys):
    """Those of a stage that has lost everything, in the second attempt, and none of what decides."""

    @torch.no_grad()
    def prepare(network):
        network.is_quantised.fill_(True)
        for selector in network.selectors:
            selector.linear.weight.zero_()
            selector.linear.bias.copy_(torch.tensor([1.0, 0.0]))
        models._let_every_class_win(network, (32, 32), 1)

    options = {"dimension": 2, "patch_size": (32, 32), "mirroring": None, "prepare": prepare}
    model = models.write_model(tmp_path / "model", trainer="nnUNetTrainerMedDANetV2QuantOnly", **options)
    data = write_preprocessed(tmp_path / "data", model, shape=(4, 32, 32))
    drops = []

    def quantise(plain, inputs, score, max_drop, *_):
        if tuple(plain.input(0).shape) != (1, 1, 32, 32):
            return plain
        bad = silenced(plain)
        if score is not None:
            assert score(runner(plain)) == 1 > score(runner(bad)) + 0.3
            drops.append(max_drop)
        return plain if len(drops) == 2 else bad

    monkeypatch.setattr("nnunet_dyn.inference.parts.quantise", quantise)
    found = export(model, data, tmp_path / "exported", limit=0.3)
    assert found["layers_put_back"] and found["dice_drop"] < 0.3 < lost(capsys)
    assert drops[0] == pytest.approx(2 * drops[1]) and 0.1 < drops[0] <= 0.5


def lost(capsys) -> float:
    """Dice, before layers were put back."""
    lines = capsys.readouterr().err.splitlines()
    (line,) = (line for line in lines if "putting the layers back that lose most" in line)
    return float(line.split("loses ")[1].split()[0])


def test_layers_of_a_segmentor_are_put_back(tmp_path, capsys):
    """By NNCF, of a layer that int8 is too coarse for. What is left in bf16 an untrained network does not take well."""

    def prepare(network):
        models.lose_in_int8(network.network.encoder)
        give_every_class(network)

    template = json.loads((Path(plans_templates.__file__).parent / "roi_cascade.json").read_text())
    template["arch_kwargs"] = {"network_class": "dynamic_network_architectures.architectures.unet.PlainConvUNet"}
    (tmp_path / "plain.json").write_text(json.dumps(template))
    model = write_cascade(tmp_path / "results", str(tmp_path / "plain.json"), prepare=prepare)
    cases = [bright_cubes(CUBE, seed=seed) for seed in range(2)]
    data = write_preprocessed_cascade(tmp_path / "data", model, cases, training=1)
    found = export(model, data, tmp_path / "exported", limit=0.5)
    assert found["layers_put_back"] and found["dice_drop"] < 0.5 < lost(capsys)
