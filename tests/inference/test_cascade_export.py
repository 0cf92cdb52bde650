"""The ROI cascade exported: both stages in one folder, with the decisions of torch."""

import json

import models
import numpy as np
import pytest
from cascades import CUBE, bright_cubes, write_cascade, write_preprocessed

from nnunet_dyn import cli
from nnunet_dyn.inference import Predictor
from nnunet_dyn.plans_templates import load_template

for package in ("openvino", "onnxruntime", "nncf"):
    pytest.importorskip(package, reason="the extras nnunet-dyn[openvino,onnx] are not installed")

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
            own = json.loads((models.Path(load_template.__code__.co_filename).parent / "roi_cascade.json").read_text())
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


@pytest.mark.parametrize(
    ("network", "engine"), [("stages", "openvino"), ("stages", "onnxruntime"), ("efficient", "openvino")]
)
def test_the_exported_cascade_is_that_of_torch(segmentors, tmp_path, network, engine):
    """In fp32, checked by the export, and on a case of two targets with all decisions."""
    segmentor, data = segmentors[network]
    folder = tmp_path / "exported"
    assert export(segmentor, data, folder, engine, "fp32") == 0
    manifest = json.loads((folder / "manifest.json").read_text())
    (found,) = manifest["accuracy"]
    assert found["cases"] == ["case_2"] and found["dice_original"] > 0.9 and found["same_voxels"] > 0.9999
    original = Predictor.from_folder(segmentor, (0,), device="cpu", threads=1)
    exported = Predictor.from_folder(folder, threads=1)
    assert exported.engine.name == exported.first_stage.engine.name == engine
    array = bright_cubes(FAR, ((3, 9), (5, 13), (7, 20)), seed=9)
    expected, got = (predictor.predict(array, (1, 1, 1)) for predictor in (original, exported))
    assert (expected.segmentation == got.segmentation).mean() >= 0.9999 and len(np.unique(got.segmentation)) > 2
    assert got.decisions.to_json("a").keys() == expected.decisions.to_json("a").keys()
    mine, theirs = (each.decisions for each in (got, expected))
    assert [tile.boxes for tile in mine.tiles] == [tile.boxes for tile in theirs.tiles]
    assert {tile.decision.action for tile in mine.tiles} == {"crop", "skip"} and mine.totals() == theirs.totals()
    assert len({len(tile.boxes) for tile in mine.tiles}) > 1
    assert mine.first_stage.totals() == theirs.first_stage.totals()
