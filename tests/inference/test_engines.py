"""Every engine computes what torch computes, from a model folder or an exported one."""

import os
import subprocess
import sys
from functools import partial

import models
import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from nnunet_dyn.architectures.dynamic_convs.magic import MAGICConv
from nnunet_dyn.errors import JobError, UsageError
from nnunet_dyn.inference import Predictor
from nnunet_dyn.inference.conversion import OPSET, _kept, _Layer, _layers, convert, quantise, runner
from nnunet_dyn.inference.exporting import ExportOptions, export_model

ENGINES = {3: "openvino", 2: "onnxruntime"}
SHAPES = {2: (2, 30, 20), 3: (16, 20, 18)}


def need(engine: str) -> None:
    pytest.importorskip(engine, reason=f"the package of engine {engine} is not installed")


def write_model(folder, trainer="nnUNetTrainer", dimension=3, **options):
    patch = {"patch_size": (24, 16)} if dimension == 2 else {}
    options = {"mirroring": (0,)} | options
    return models.write_model(folder, trainer=trainer, dimension=dimension, **patch, **options)


@pytest.fixture(scope="module")
def planar(tmp_path_factory):
    """nnU-Net's network for slices, two folds."""
    return write_model(tmp_path_factory.mktemp("planar") / "model", dimension=2, folds=2)


@pytest.mark.parametrize(("trainer", "dimension"), [("MAGIC2x", 2), ("EffB0", 2), ("FullyEffB0", 3), ("", 3)])
def test_the_segmentation_is_that_of_torch(tmp_path, trainer, dimension):
    """Converted as it is loaded; mirrored copies, two rows or more at once. nnU-Net's own for slices: below."""
    need(ENGINES[dimension])
    folder = write_model(tmp_path / "model", f"nnUNetTrainer{trainer}", dimension)
    array = models.image(SHAPES[dimension])
    results = []
    for engine in ("torch", ENGINES[dimension]):
        predictor = Predictor.from_folder(folder, engine=engine, device="cpu", threads=1)
        assert predictor.engine.name == engine and predictor.engine.precision == "fp32"
        results.append(predictor.predict(array, (1, 1, 1)).segmentation)
    assert (results[0] == results[1]).mean() >= 0.9999
    assert len(np.unique(results[0])) > 1


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_folds_have_their_own_weights(planar, engine, monkeypatch):
    """A converted model shares the tensors of the network it was made from. Each is compiled once."""
    need(engine)
    converted, original = (Predictor.from_folder(planar, engine=e, device="cpu") for e in (engine, "torch"))
    tile = torch.randn(2, 1, 24, 16)
    outputs = []
    monkeypatch.setattr("nnunet_dyn.inference.openvino_engine.compiled", None)
    monkeypatch.setattr("nnunet_dyn.inference.onnxruntime_engine.session", None)
    for fold in (0, 1, 0):
        for predictor in (converted, original):
            predictor.engine.load(fold)
        with torch.inference_mode():
            expected = original.engine.infer(tile)
        outputs.append(converted.engine.infer(tile))
        torch.testing.assert_close(outputs[-1], expected, atol=1e-4, rtol=1e-4)
    assert (outputs[0] == outputs[2]).all() and not torch.allclose(outputs[0], outputs[1], atol=0.1)


def test_an_exported_folder_of_onnx(planar, tmp_path, monkeypatch):
    need("onnxruntime")
    import onnx

    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    options = ExportOptions("onnxruntime", "fp32", force=True)
    manifest = export_model(planar, tmp_path / "exported", options)
    assert manifest.models == ("fold_0.onnx", "fold_1.onnx") and manifest.mirroring_axes == (0,)
    written = onnx.load(tmp_path / "exported" / "fold_0.onnx")
    assert {entry.domain: entry.version for entry in written.opset_import}[""] == OPSET
    assert [size.dim_value for size in written.graph.input[0].type.tensor_type.shape.dim] == [1, 1, 24, 16]
    array = models.image(SHAPES[2])
    for folds in (None, [1]):
        results = [
            Predictor.from_folder(source, folds, device="cpu").predict(array, (1, 1, 1)).segmentation
            for source in (planar, tmp_path / "exported")
        ]
        assert (results[0] == results[1]).mean() >= 0.9999 and len(np.unique(results[0])) > 2


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize(
    "options", [{"residual": True}, {"previous_stage": True}], ids=["residual encoder", "second stage of a cascade"]
)
def test_nnunets_other_networks_are_exported(tmp_path, monkeypatch, engine, options):
    need(engine)
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    folder = write_model(tmp_path / "model", **options)
    export_model(folder, tmp_path / "exported", ExportOptions(engine, "fp32", force=True))
    array, given = models.image(SHAPES[3]), {}
    if "previous_stage" in options:
        given = {"previous_stage": np.random.default_rng(0).integers(0, 5, SHAPES[3])}
    results = [
        Predictor.from_folder(source, device="cpu").predict(array, (1, 1, 1), **given).segmentation
        for source in (folder, tmp_path / "exported")
    ]
    assert (results[0] == results[1]).mean() >= 0.9999 and len(np.unique(results[0])) > 2
    if given:
        with pytest.raises(UsageError, match="Give its segmentations with -prev_stage_predictions"):
            Predictor.from_folder(tmp_path / "exported", device="cpu").predict(array, (1, 1, 1))


def test_bf16_is_close(planar):
    need("openvino")
    data = torch.from_numpy(models.image(SHAPES[2]))
    full, low = (
        Predictor.from_folder(planar, (0,), engine=engine, precision=precision, device="cpu")
        for engine, precision in (("torch", "fp32"), ("openvino", "bf16"))
    )
    expected, got = (predictor.predict_logits_from_preprocessed_data(data).float() for predictor in (full, low))
    assert (expected - got).abs().mean() / expected.abs().mean() < 0.05


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (dict(engine="openvino", precision="int8"), "nnunet_dyn export --engine openvino --precision int8"),
        (dict(engine="openvino", precision="fp16"), "Engine openvino has no fp16 on cpu"),
        (
            dict(engine="onnxruntime", precision="bf16"),
            "Engine onnxruntime has no bf16 on cpu; expected one of fp32",
        ),
        (dict(engine="openvino", device="cuda"), "Engine openvino runs on the CPU; got device cuda"),
    ],
)
def test_requests_that_cannot_be_met(planar, change, expected):
    need(change["engine"])
    with pytest.raises(UsageError, match=expected):
        Predictor.from_folder(planar, **{"device": "cpu", **change})


class Unpredictable(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def test_a_network_that_cannot_be_converted():
    need("openvino")
    with pytest.raises(JobError, match="cannot be converted for engine openvino"):
        convert(Unpredictable(), "openvino", (1, 1, 4, 4))


def test_a_damaged_model_is_a_job_error(tmp_path):
    from nnunet_dyn.inference.exported import engine_of

    for engine, name in (("openvino", "a.xml"), ("onnxruntime", "a.onnx")):
        need(engine)
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(JobError, match=f"cannot run .*{name}"):
            engine_of(engine)([tmp_path / name], "fp32").load(0)


def test_layers_that_lose_most_are_put_back(monkeypatch):
    """By NNCF, until half of the disagreement is left. Candidates compute what the result will, on as many threads."""
    need("openvino")
    need("nncf")
    import openvino

    compile_model, configs = openvino.Core.compile_model, []

    def spy(core, model, device=None, config=None):
        configs.append({key: str(value) for key, value in config.items()})
        return compile_model(core, model, device, config)

    monkeypatch.setattr(openvino.Core, "compile_model", spy)
    torch.manual_seed(0)
    convs = [nn.Conv2d(n, m, 3, padding=1) for n, m in ((1, 4), (4, 4), (4, 4), (4, 3))]
    network = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2], nn.ReLU(), convs[3])
    patches = [torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(seed)).numpy() for seed in range(3)]
    plain = convert(network, "openvino", (1, 1, 16, 16))
    expected = [runner(plain)(patch) for patch in patches]

    scores = []

    def score(run) -> float:
        scores.append(run)
        pairs = zip(patches, expected, strict=True)
        return 1 - float(np.mean([np.abs(run(patch) - logits).mean() for patch, logits in pairs]))

    def count(model) -> int:
        return sum(op.get_type_name() == "FakeQuantize" for op in model.get_ops())

    quantised = quantise(plain, patches, keep_first=False, keep_last=False)
    lost = 1 - score(runner(quantised, 1, "int8"))
    before = len(configs)
    better = quantise(plain, patches, score, lost / 2, keep_first=False, keep_last=False, threads=1)
    used = configs[before:]
    assert {config["INFERENCE_NUM_THREADS"] for config in used} == {"1"}
    # Ranges are taken in fp32.
    assert {config["INFERENCE_PRECISION_HINT"] for config in used} == {"bf16", "<Type: 'float32'>"}
    assert 0 < 1 - score(runner(better, 1, "int8")) <= lost / 2
    assert 0 < count(better) < count(quantised)
    scores.clear()
    assert count(quantise(plain, patches, score, 1.0, keep_first=False, keep_last=False)) == count(quantised)
    assert len(scores) == 5, "not more for more patches"
    assert openvino.Core.compile_model is spy


def test_magic_in_3d_and_in_int8():
    """Its own kernels, which are computed from the image, keep their precision."""
    need("openvino")
    need("nncf")
    torch.manual_seed(0)
    magic = MAGICConv(nn.Conv3d, 8, 8, 3, padding=1, n_kernels=2)
    convs = [nn.Conv3d(n, m, 3, padding=1) for n, m in ((1, 8), (8, 8), (8, 3))]
    network = nn.Sequential(convs[0], nn.ReLU(), magic, nn.ReLU(), convs[1], nn.ReLU(), convs[2]).eval()
    patches = [torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    plain = convert(network, "openvino", (1, 1, 8, 8, 8))
    with torch.no_grad():
        expected = network(patches[0])
    exact = torch.from_numpy(runner(plain, 1)(patches[0].numpy()).copy())
    torch.testing.assert_close(exact, expected, atol=1e-4, rtol=1e-4)
    quantised = quantise(plain, [patch.numpy() for patch in patches])
    moving = {layer.name for layer in _layers(plain) if not layer.static}
    kinds = {op.get_friendly_name(): op for op in quantised.get_ops() if "Convolution" in op.get_type_name()}
    sources = {
        name: {op.input_value(index).get_node().get_type_name() for index in (0, 1)} for name, op in kinds.items()
    }
    assert moving & sources.keys() and not any("FakeQuantize" in sources[name] for name in moving & sources.keys())
    assert sum("FakeQuantize" in found for found in sources.values()) == 1, "the convolution between the ends"
    got = torch.from_numpy(runner(quantised, 1)(patches[0].numpy()))
    assert 1e-4 < float((got - expected).square().mean() / expected.square().mean()) ** 0.5 < 0.2


@pytest.mark.parametrize("affine", [False, True])
def test_instance_normalisation_is_one_operation_of_openvino(affine):
    need("openvino")
    torch.manual_seed(0)
    norm = nn.InstanceNorm3d(4, affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    tracked = nn.InstanceNorm3d(4, track_running_stats=True)
    nn.init.normal_(tracked.running_mean)
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), norm, nn.LeakyReLU(), tracked, nn.Conv3d(4, 2, 1)).eval()
    x = torch.randn(2, 1, 8, 8, 8)
    converted = convert(network, "openvino", tuple(x.shape))
    kinds = [op.get_type_name() for op in converted.get_ops()]
    assert kinds.count("MVN") == 1 and "ReduceMean" not in kinds
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(runner(converted, 1)(x.numpy())), network(x), atol=1e-5, rtol=1e-5)


def test_group_normalisation_does_not_crash_openvino():
    need("openvino")
    torch.manual_seed(0)
    blocks = [BasicBlock(16, 16, norm_layer=partial(nn.GroupNorm, 4)) for _ in range(2)]
    network, x = nn.Sequential(*blocks).eval(), torch.randn(2, 16, 8, 8)
    for norm in (module for module in network.modules() if isinstance(module, nn.GroupNorm)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    converted = convert(network, "openvino", tuple(x.shape))
    kinds = [op.get_type_name() for op in converted.get_ops()]
    assert kinds.count("MVN") == 4 and "GroupNormalization" not in kinds
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(runner(converted, 1)(x.numpy())), network(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_switched_off", [True, False])
def test_nothing_is_reported_to_others(tmp_path, is_switched_off):
    """OpenVINO and NNCF would, from their import on."""
    need("openvino")
    need("nncf")
    need("openvino_telemetry")
    code = f"""
from openvino_telemetry.utils.sender import TelemetrySender
sent = []
TelemetrySender.send = lambda *message: sent.append(message)
if {is_switched_off}:
    from nnunet_dyn.inference.engines import check_installed
    check_installed("openvino", "nncf", load=True)
import openvino.tools.ovc.telemetry_utils as ovc
import nncf.telemetry
ovc.init_ovc_telemetry().send_event("ovc", "version", "1")
nncf.telemetry.telemetry.send_event("nncf", "quantize", "1")
print(len(sent))
"""
    env = {key: value for key, value in os.environ.items() if key not in ("CI", "TF_BUILD", "JENKINS_URL")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | {"HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (int(done.stdout.split()[-1]) == 0) == is_switched_off
    assert is_switched_off != any(path.is_file() for path in tmp_path.rglob("*"))


def test_what_nncf_cannot_read_is_a_job_error():
    need("nncf")
    with pytest.raises(JobError, match="NNCF cannot quantise the network: AttributeError"):
        quantise(object(), [])


def test_what_is_not_quantised():
    def layer(name, kind="convolution", grouped=False, static=True, size=(4, 4, 4)):
        return _Layer(name, kind, grouped, static, size)

    layers = [
        layer("first"),
        layer("depthwise", grouped=True),
        layer("gate", size=(1, 1, 1)),
        layer("plain"),
        layer("attention", "product", size=(1,)),
        layer("dynamic", static=False),
        layer("up", "transposed"),
        layer("depthwise in 2D", grouped=True, size=(4, 4)),
        layer("head"),
    ]
    assert set(_kept(layers)) == {"first", "depthwise", "gate", "attention", "dynamic", "head"}
