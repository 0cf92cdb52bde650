"""Med-DANet V2 exported: the same decisions, in integers and half precision that are real."""

import json
import shutil

import numpy as np
import pytest
import torch

from nnunet_dyn.architectures.med_danet import Decision, MedDANetV2, ModifiedUNet
from nnunet_dyn.errors import JobError
from nnunet_dyn.inference import stages
from nnunet_dyn.inference.conversion import scratch
from nnunet_dyn.inference.stages import StagesEngine, _Compiled, _fuse, _seen, _stages, convert_stages, precision_of
from nnunet_dyn.quantization import FULL_PRECISION, current_width, quantized

pytest.importorskip("openvino", reason="the extra nnunet-dyn[openvino] is not installed")
pytest.importorskip("nncf", reason="the extra nnunet-dyn[openvino] is not installed")

pytestmark = pytest.mark.integration

PATCH = (64, 48)
BOX = ((8, 40), (16, 48))


def build(seed: int, crops: tuple[int, ...] = (32,)) -> MedDANetV2:
    torch.manual_seed(seed)
    options = {"policy_space": ["skip", *crops, "whole"]}
    kwargs = {"strides": [[1, 1], [2, 2]], "base_features": 8, "blocks": (1, 1)}
    return MedDANetV2(1, 3, ModifiedUNet, options, **kwargs).eval()


@pytest.fixture(scope="module")
def slices() -> torch.Tensor:
    smooth = torch.nn.functional.avg_pool2d(
        torch.randn(6, 1, *PATCH, generator=torch.Generator().manual_seed(1)), 5, 1, 2
    )
    return smooth * torch.arange(1, 7).view(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def network(slices) -> MedDANetV2:
    network = build(0)
    network.is_quantised.fill_(True)
    with torch.no_grad():
        for stage, selector in enumerate(network.selectors):
            selector.linear.weight.zero_()
            selector.linear.bias.copy_(torch.tensor([1.0, 0.0] if stage % 2 else [0.0, 1.0]))
        scores = network.score(network._view(slices)).softmax(1)[:, 0].sort().values
        network.skip_threshold.fill_(float(scores[3] + scores[4]) / 2)
        network.crop_threshold.fill_(0.1)
    return network


@pytest.fixture(scope="module")
def exported(network, slices, tmp_path_factory) -> StagesEngine:
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(folder / "which is memory"))
        with scratch(folder) as own:
            parts = convert_stages(network, [x.numpy() for x in slices.split(1)], "fold_0", own)
            name = parts.write(folder, parts.quantised())
    engine = StagesEngine(build(7), [folder / name], PATCH, threads=1)  # other weights, none of which may matter
    engine.load(0)
    return engine


def test_crops_are_where_the_position_network_puts_them(slices, tmp_path):
    network = build(0, crops=(16, 32))
    with torch.no_grad():
        for where in network.position.where:
            where.weight *= 500
        probed = [network.probe(x)[1][0] for x in slices.split(1)]
        _fuse(network, PATCH)
        first = network.backbone.encoder.stages[0]
        with scratch(tmp_path) as own:
            seen = _seen(network, _stages(network), [x.numpy() for x in slices.split(1)], own)
            boxes = []
            for side in (16, 32):
                inputs, samples = seen["backbone.encoder.stages.1", (side, side)]
                boxes.append([decision.box for _, decision in samples])
                for x, box, got in zip(slices.split(1), boxes[-1], inputs, strict=True):
                    crop = first(x[(..., *(slice(*axis) for axis in box))])
                    assert torch.allclose(torch.from_numpy(got), crop, atol=1e-4)
            inputs, samples = seen["crop_tail", PATCH]
            assert len(inputs) == len(samples) == 2 * len(slices), "of both crops"
    assert len(set(boxes[1])) > 1, "not all in the middle"
    assert all(box in of_slice for box, of_slice in zip(probed, zip(*boxes, strict=True), strict=True))


def noise(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Signal-to-noise ratio in dB."""
    return -10 * float(torch.log10((expected - got).square().mean() / expected.square().mean()))


def test_files_are_of_each_stage_and_size(exported):
    (folder,) = {path.parent for part in exported._networks for path in part.policy.files.values()}
    parts = json.loads((folder / "fold_0.json").read_text())["parts"]
    first = {(tuple(p["size"]), p["precision"]) for p in parts if p["module"] == "backbone.encoder.stages.1"}
    assert first == {(size, precision) for size in (PATCH, (32, 32)) for precision in ("int8", "bf16")}
    assert {p["precision"] for p in parts if p["module"] in ("policy", "position")} == {"fp32"}
    for part in parts:
        has_integers = 'type="FakeQuantize"' in (folder / part["file"]).read_text()
        assert has_integers == (part["precision"] == "int8"), part
    rest = np.load(folder / "fold_0.npz", allow_pickle=False)
    assert "skip_threshold" in rest and not [key for key in rest if key.startswith(("backbone", "policy"))]


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda parts, rest: parts.pop(), "modules got .* expected .*position"),
        (lambda parts, rest: parts[0].pop("size"), "Cannot read .*fold_0.json: KeyError: 'size'"),
        (lambda parts, rest: rest.pop("skip_threshold"), "fold_0.npz differs in skip_threshold"),
        (lambda parts, rest: rest.update(other=np.zeros(1)), "fold_0.npz differs in other"),
        (lambda parts, rest: rest.update(skip_threshold=np.zeros(7)), "size mismatch for skip_threshold"),
    ],
)
def test_files_that_are_not_those_of_the_network(exported, tmp_path, spoil, expected):
    (folder,) = {path.parent for part in exported._networks for path in part.policy.files.values()}
    content = json.loads((folder / "fold_0.json").read_text())
    with np.load(folder / "fold_0.npz") as rest:
        rest = dict(rest)
    spoil(content["parts"], rest)
    content["parts"] = [part | {"file": str(folder / part["file"])} for part in content["parts"]]
    (tmp_path / "fold_0.json").write_text(json.dumps(content))
    np.savez(tmp_path / "fold_0.npz", **rest)
    with pytest.raises(JobError, match=expected):
        StagesEngine(build(7), [tmp_path / "fold_0.json"], PATCH, threads=1)


def fail(*arguments, **options):
    raise JobError("no memory")


@torch.inference_mode()
def test_models_are_read_at_once_and_compiled_when_first_used(exported, slices, tmp_path):
    (folder,) = {path.parent for part in exported._networks for path in part.policy.files.values()}
    shutil.copytree(folder, tmp_path / "moved")
    engine = StagesEngine(build(7), [tmp_path / "moved" / "fold_0.json"], PATCH, threads=1)
    engine.load(0)
    ready = [len(part._requests) for part in engine.network.modules() if isinstance(part, _Compiled)]
    assert sum(ready) == 3, "one of each precision, which shows that they run"
    assert engine.computes_in == exported.computes_in
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "compiled", fail)
        for _ in range(2):  # the second case gets the same error as the first one
            with pytest.raises(JobError, match="no memory"):
                engine.network.execute(slices[:1], [Decision("whole", None, (8,) * 3)])
    decision = [Decision("whole", None, (8,) * 3)]
    expected = exported.network.execute(slices[:1], decision)[0]
    shutil.rmtree(tmp_path / "moved")
    assert torch.equal(engine.network.execute(slices[:1], decision)[0], expected), "what had the hashes"
    parts = [part for part in engine.network.backbone.modules() if isinstance(part, _Compiled)]
    sizes = {size for part in parts for size, _ in part._requests}
    assert sizes == {PATCH, (PATCH[0] // 2, PATCH[1] // 2)}, "none of crops"


@torch.inference_mode()
def test_decisions_and_costs_are_those_of_torch(network, exported, slices):
    expected, done = network.execute(slices, network.decide(slices))
    logits, decisions = exported.network.execute(slices, exported.network.decide(slices))
    assert [d.action for d in decisions] == [d.action for d in done]
    assert {"skip", "crop"} <= {d.action for d in done}
    for ours, theirs in zip(decisions, done, strict=True):
        assert (ours.box, ours.bits) == (theirs.box, theirs.bits) and ours.cost == pytest.approx(theirs.cost)
        assert ours.skip_probability == pytest.approx(theirs.skip_probability, abs=1e-4)
    assert {d.bits for d in done if d.action != "skip"} == {(16, 8, 16)}
    skipped = [index for index, d in enumerate(done) if d.action == "skip"]
    assert torch.equal(logits[skipped], expected[skipped])
    assert noise(expected, logits) > 15
    assert torch.equal(exported.infer(slices), logits)


@torch.inference_mode()
@pytest.mark.parametrize("action", ["whole", "crop"])
def test_every_width_is_what_it_says(network, exported, slices, action):
    x = slices[4:]
    box = BOX if action == "crop" else None
    errors = {}
    reference = network.execute(x, [Decision(action, box, (FULL_PRECISION,) * 3)] * 2)[0]
    for width in network.options.bits:
        errors[width] = noise(reference, exported.network.execute(x, [Decision(action, box, (width,) * 3)] * 2)[0])
    assert errors[8] > 12 and errors[16] > 30 and errors[16] > errors[8] + 6


def test_widths_that_are_known_outside_of_torch():
    assert [precision_of(width) for width in (2, 8, 12, 16, FULL_PRECISION)] == ["int8", "int8", "bf16", "bf16", "fp32"]
    assert current_width() == FULL_PRECISION
    with quantized(16):
        with quantized(8):
            assert current_width() == 8
        assert current_width() == 16
    assert current_width() == FULL_PRECISION
