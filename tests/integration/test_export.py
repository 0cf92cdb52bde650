"""int8 with NNCF's own fallback: the layers that lose most keep their precision."""

import json

import models
import pytest
from preprocessed import write_preprocessed

from nnunet_dyn import cli


@pytest.mark.parametrize("limit", [0.06])
def test_nncf_puts_layers_back(tmp_path, monkeypatch, capsys, limit):
    pytest.importorskip("openvino", reason="the extra nnunet-dyn[openvino] is not installed")
    pytest.importorskip("nncf", reason="the extra nnunet-dyn[openvino] is not installed")
    model = models.write_model(tmp_path / "model", dimension=2, patch_size=(24, 16), mirroring=None)
    monkeypatch.setenv("nnUNet_preprocessed", str(write_preprocessed(tmp_path / "data", model, shape=(4, 32, 32))))
    output = tmp_path / "exported"
    flags = ["--engine", "openvino", "--precision", "int8", "--calibration-cases", "1", "--validation-cases", "1"]
    assert cli.main(["export", "-m", str(model), "-o", str(output), *flags, "--max-dice-drop", str(limit)]) == 0
    assert "putting the layers back that lose most" in capsys.readouterr().err
    (found,) = json.loads((output / "manifest.json").read_text())["accuracy"]
    assert found["layers_put_back"] and found["dice_drop"] <= limit
    assert 'type="FakeQuantize"' in (output / "fold_0.xml").read_text(), "others stay in int8"
