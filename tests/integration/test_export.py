"""A network that chooses its bits: from a model folder to a prediction in real integers."""

import json

import models
import numpy as np
import pytest
import torch
from preprocessed import write_preprocessed

from nnunet_dyn import cli
from nnunet_dyn.inference import Predictor


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
