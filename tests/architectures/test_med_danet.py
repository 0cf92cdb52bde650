"""Med-DANet V2: crop and restoration, decisions and their execution, costs, and what a training pass returns."""

import math
from dataclasses import replace

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from plans import arch_kwargs
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

from nnunet_dyn.accounting import count_operations, training_memory
from nnunet_dyn.architectures.blocks import MBConv
from nnunet_dyn.architectures.efficient_unet import EfficientUNet
from nnunet_dyn.architectures.med_danet import (
    PARTS,
    Decision,
    MedDANetOptions,
    MedDANetV2,
    ModifiedUNet,
    Phase,
    TransBTS2D,
    at_whole_voxels,
    corner_around,
    crop_at,
    crop_size,
    image_gradient,
    restore_at,
    straight_through,
)
from nnunet_dyn.inference.engines import TorchEngine

EVERYTHING = Phase("everything", 1.0, frozenset(PARTS), random_centres=False, quantised=True, cost=True)
PATCH = (64, 48)


def build(channels=2, classes=3, backbone="modified", seed=0, **options) -> MedDANetV2:
    """A network for 64×48 slices with crops of 32 voxels, three stages."""
    torch.manual_seed(seed)
    options = {"policy_space": ["skip", 32, "whole"]} | options
    planned = arch_kwargs(2, n_stages=3, features=(8, 12, 16))
    if backbone == "modified":
        kwargs = {"strides": planned["strides"], "base_features": 8, "blocks": (1, 1, 1)}
        network = MedDANetV2(channels, classes, ModifiedUNet, options, **kwargs)
    elif backbone == "transbts":
        kwargs = {"strides": planned["strides"], "base_features": 8, "blocks": (1, 1, 1), "embedding": 16, "layers": 2}
        network = MedDANetV2(channels, classes, TransBTS2D, options, **kwargs)
    elif backbone == "plain":
        network = MedDANetV2(channels, classes, PlainConvUNet, options, **planned, n_conv_per_stage=[2] * 3)
    elif backbone == "residual":
        network = MedDANetV2(channels, classes, ResidualEncoderUNet, options, **planned, n_blocks_per_stage=[1] * 3)
    else:
        network = MedDANetV2(channels, classes, EfficientUNet, options, **planned, encoder="b0")
    return network.eval()


def crop(row, column, bits=None, size=32):
    return Decision("crop", ((row, row + size), (column, column + size)), bits)


# --- crop and restoration ---------------------------------------------------------------------------------------


def test_integer_positions_are_exact_and_do_not_swap_the_axes():
    x = torch.randn(2, 3, 40, 56)
    corner = torch.tensor([[8.0, 24.0], [5.0, 0.0]])
    cut = crop_at(x, corner, (16, 24))
    assert torch.equal(cut[0], x[0, :, 8:24, 24:48]) and torch.equal(cut[1], x[1, :, 5:21, 0:24])
    expected = torch.zeros_like(x)
    expected[0, :, 8:24, 24:48], expected[1, :, 5:21, 0:24] = cut[0], cut[1]
    assert torch.equal(restore_at(cut, corner, (40, 56)), expected)


def test_fractional_positions_match_bilinear_sampling():
    x, corner, size, full = torch.randn(1, 2, 20, 30).double(), torch.tensor([[3.3, 7.85]]).double(), (8, 12), (20, 30)

    def sample(image, rows, columns):
        height, width = image.shape[2:]
        grid = torch.stack(
            [
                ((columns * 2 + 1) / width - 1).expand(len(rows), -1),
                ((rows * 2 + 1) / height - 1)[:, None].expand(-1, len(columns)),
            ],
            -1,
        )
        return F.grid_sample(image, grid[None], align_corners=False, padding_mode="zeros")

    cut = crop_at(x, corner, size)
    assert torch.allclose(cut, sample(x, 3.3 + torch.arange(8).double(), 7.85 + torch.arange(12).double()), atol=1e-6)
    restored = restore_at(cut, corner, full)
    expected = sample(cut, torch.arange(20).double() - 3.3, torch.arange(30).double() - 7.85)
    assert torch.allclose(restored, expected, atol=1e-6) and restored[0, :, :3].abs().max() == 0


def test_gradients_of_the_position_agree_with_finite_differences():
    torch.manual_seed(0)
    x, y = torch.randn(2, 1, 12, 14).double(), torch.randn(2, 1, 5, 6).double()
    corner = torch.tensor([[2.3, 4.6], [6.1, 1.7]]).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda c: crop_at(x, c, (5, 6)), corner, eps=1e-4)
    assert torch.autograd.gradcheck(lambda c: restore_at(y, c, (12, 14)), corner, eps=1e-4)


def test_crop_sizes_follow_the_patch_and_the_strides():
    assert crop_size(96, (256, 256), (8, 8)) == (96, 96)
    assert crop_size(96, (112, 64), (8, 8)) == (96, 48)
    assert crop_size(96, (112, 56), (16, 16)) == (96, 56)  # 42 is no multiple of 16
    assert crop_size(96, (96, 96), (8, 8)) == (72, 72)
    with pytest.raises(ValueError, match=r"crop of 96 voxels is larger than the patch, \(64, 80\); expected .* Set a"):
        crop_size(96, (64, 80), (8, 8))
    with pytest.raises(ValueError, match=r"got a crop of 96 voxels; expected a multiple .* 128 at least\. Take 128"):
        crop_size(96, (256, 256), (64, 64))
    with pytest.raises(ValueError, match="leaves nothing of the patch"):
        crop_size(48, (48, 48), (16, 16))


# --- straight-through -------------------------------------------------------------------------------------------


def test_selection_is_argmax_forward_and_expectation_backward():
    scores = torch.tensor([[0.2, 1.0], [2.0, -1.0]], requires_grad=True)
    bits = torch.tensor([8.0, 16.0])
    chosen = straight_through(torch.softmax(scores, 1)) @ bits
    assert chosen.tolist() == [16, 8]
    (gradient,) = torch.autograd.grad(chosen.sum(), scores)
    (expected,) = torch.autograd.grad((torch.softmax(scores, 1) @ bits).sum(), scores)
    assert torch.equal(gradient, expected)


def test_gradient_of_an_image_by_hand():
    x = torch.tensor([[[[0.0, 2.0], [3.0, 1.0]]]])  # down 3 and 1, across 2 and 2
    assert image_gradient(x).item() == 2 + 2


# --- decide and execute -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["modified", "transbts", "plain", "residual", "efficient"])
def test_whole_in_full_precision_is_the_plain_network(backbone):
    network = build(backbone=backbone)
    planned = arch_kwargs(2, n_stages=3, features=(8, 12, 16))
    if backbone == "modified":
        plain = ModifiedUNet(2, 3, planned["strides"], base_features=8, blocks=(1, 1, 1))
    elif backbone == "transbts":
        kwargs = {"base_features": 8, "blocks": (1, 1, 1), "embedding": 16, "layers": 2}
        plain = TransBTS2D(2, 3, planned["strides"], **kwargs)
    elif backbone == "plain":
        plain = PlainConvUNet(2, num_classes=3, n_conv_per_stage=[2] * 3, **planned)
    elif backbone == "residual":
        plain = ResidualEncoderUNet(2, num_classes=3, n_blocks_per_stage=[1] * 3, **planned)
    else:
        plain = EfficientUNet(2, 3, "b0", **planned)
    weights = network.backbone.state_dict()
    head = len(plain.decoder.seg_layers) - 1
    weights = {key.replace("seg_layers.0", f"seg_layers.{head}"): value for key, value in weights.items()}
    assert not plain.load_state_dict(weights, strict=False).unexpected_keys
    x = torch.randn(2, 2, *PATCH)
    with torch.no_grad():
        expected = plain.eval()(x)
    logits, _ = network.execute(x, [Decision("whole", bits=(32,) * network.n_stages)] * 2)
    assert torch.allclose(logits, expected, atol=1e-5) and torch.allclose(network.segment_whole(x), expected, atol=1e-5)
    eight, _ = network.execute(x, [Decision("whole", bits=(8,) * network.n_stages)] * 2)
    noise = (eight - logits).square().mean() / logits.var()
    assert 0 < noise < 0.1
    cropped, _ = network.execute(x, [crop(8, 12, (16,) * 5), crop(32, 0, (16,) * 5)])
    assert cropped.shape == (2, 3, *PATCH)


def mixed_decisions(network):
    bits = [(8, 16, 8, 16, 8), (16, 8, 8, 8, 16), None]
    return [
        Decision("skip", bits=()),
        crop(8, 12, bits[0]),
        Decision("whole", bits=bits[1]),
        crop(31, 3, bits[1]),
        crop(8, 12),
        Decision("whole"),
    ]


def test_a_batch_is_its_slices_one_by_one():
    network = build()
    network.is_quantised.fill_(True)
    x = torch.randn(6, 2, *PATCH) * torch.tensor([1.0, 5, 0.2, 1, 2, 3]).view(-1, 1, 1, 1)
    decisions = mixed_decisions(network)
    together, done = network.execute(x, decisions)
    one_by_one = [network.execute(x[i : i + 1], [decisions[i]]) for i in range(6)]
    # A convolution may sum in another order in another batch, which moves a value to the next level now and then.
    apart = together - torch.cat([logits for logits, _ in one_by_one])
    assert apart.square().mean() < 1e-5 * together.var() and (apart.abs() > 1e-4).float().mean() < 0.05
    assert done == [decision for _, (decision,) in one_by_one]
    assert done[1].bits == decisions[1].bits and set(done[4].bits) <= {8, 16} and len(done[5].bits) == 5
    precise = [replace(d, bits=None if d.bits is None else (32,) * len(d.bits)) for d in done]
    together_32, _ = network.execute(x, precise)
    one_by_one_32 = [network.execute(x[i : i + 1], [precise[i]])[0] for i in range(6)]
    assert torch.allclose(together_32, torch.cat(one_by_one_32), atol=1e-5)
    assert not torch.allclose(together_32, together, atol=1e-3)
    again, replayed = network.execute(x, done)  # what came of the decisions can be replayed, and costs the same
    assert torch.equal(again, together) and replayed == done


def test_one_decision_serves_all_flips():
    network = build()
    x = torch.randn(1, 2, *PATCH)
    decision = crop(8, 12, (32,) * 5)
    for axes in ((0,), (1,), (0, 1)):
        flipped = decision.mirrored(axes, PATCH)
        dims = [axis + 2 for axis in axes]
        (r0, r1), (c0, c1) = flipped.box
        assert torch.equal(x.flip(dims)[..., r0:r1, c0:c1].flip(dims), x[..., 8:40, 12:44])
        assert flipped.mirrored(axes, PATCH) == decision
        assert network.execute(x.flip(dims), [flipped])[1][0].cost == network.execute(x, [decision])[1][0].cost
    assert Decision("whole").mirrored((0, 1), PATCH) == Decision("whole")


def test_a_crop_sees_its_box_and_nothing_else():
    network = build()
    x = torch.randn(1, 2, *PATCH)
    decision = [crop(8, 12, (32,) * 5)]
    logits, _ = network.execute(x, decision)
    outside = x.clone()
    outside[:, :, :8], outside[:, :, 40:], outside[..., :12], outside[..., 44:] = 9, 9, 9, 9
    assert torch.equal(network.execute(outside, decision)[0], logits)
    # The same by the continuous path of the training: sampled crop, restored before the last stage.
    corner = torch.tensor([[8.0, 12.0]])
    with torch.no_grad():
        trained = network._segment(
            crop_at(x, corner, (32, 32)),
            lambda stage, run, gradient, *inputs: run(*inputs),
            lambda y, where: restore_at(y, where, PATCH),
            corner,
        )
    assert torch.allclose(trained, logits, atol=1e-6)


def spy(network):
    """Names of the parts that run, with the size of what they get."""
    ran = []
    parts = {"policy": network.policy, "position": network.position, "encoder": network.backbone.encoder.stages[0]}
    for name, module in parts.items():
        module.register_forward_hook(lambda _, args, __, name=name: ran.append((name, tuple(args[0].shape))))
    network.decide(torch.zeros(1, 2, *PATCH))  # costs are counted once
    network.stage_macs(PATCH, PATCH)
    network.stage_macs(PATCH, (32, 32))
    ran.clear()
    return ran


def force(network, skip, crop_, whole):
    network.policy.fc.weight.data.zero_()
    network.policy.fc.bias.data = torch.tensor([skip, crop_, whole])


def test_what_is_not_chosen_does_not_run():
    network = build()
    ran = spy(network)
    x = torch.randn(2, 2, *PATCH)
    network.decisions = []
    force(network, 5.0, 0.0, 0.0)
    with torch.no_grad():
        network(x)
    assert {d.action for d in network.decisions} == {"whole"}, "without calibration nothing is skipped or cropped"
    network.skip_threshold.fill_(0.9)
    network.crop_threshold.fill_(0.5)
    ran.clear()
    with torch.no_grad():
        logits = network(x)
    assert [name for name, _ in ran] == ["policy"]
    assert (logits.argmax(1) == 0).all() and logits[:, 0].min() == 8 and logits[:, 1:].max() == -8
    ran.clear()
    force(network, 0.0, 5.0, 0.0)
    with torch.no_grad():
        network(x)
    assert [name for name, _ in ran] == ["policy", "position", "encoder"]
    assert ran[2][1] == (2, 8, 32, 32)  # behind the stem, the size of the crop
    assert [d.action for d in network.decisions] == ["whole"] * 2 + ["skip"] * 2 + ["crop"] * 2
    ((r0, r1), (c0, c1)) = network.decisions[-1].box
    assert (r1 - r0, c1 - c0) == (32, 32) and r0 >= 0 and r1 <= 64 and c0 >= 0 and c1 <= 48
    force(network, 2.3, -0.1, 0.1)  # 0.83 with a threshold of 0.9
    network.skip_threshold.fill_(0.85)
    assert network.decide(x)[0].review and network.decide(x)[0].action == "whole"


def test_a_policy_that_is_sure_of_skipping_does_not_crop_uncalibrated():
    network = build()
    x = torch.randn(1, 2, *PATCH)
    for skip in (16.0, 30.0, 500.0):  # where 1 - skip is rounded to little or nothing
        force(network, skip, 2.0, 0.0)
        (decision,) = network.decide(x)
        assert decision.action == "whole" and decision.skip_probability > 0.999999
        assert decision.crop_probability == pytest.approx(1 / (1 + math.exp(-2.0)))


def test_decisions_do_not_hang_on_autocast():
    network = build(policy_space=["skip", 16, 32, "whole"])
    network.crop_threshold.fill_(0.0)
    x = torch.randn(4, 2, *PATCH)
    expected = network.decide(x), network.probe(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (network.decide(x), network.probe(x)) == expected
        network.train().enter(EVERYTHING)
        assert network(x)["scores"].dtype == torch.float32
    assert expected[0][0].action == "crop"


def test_devices_without_autocast_decide_too(monkeypatch):
    """Such as MPS before PyTorch 2.5, where even turning it off is an error."""
    network, x = build(), torch.randn(1, 2, *PATCH)
    expected = network.decide(x)

    def autocast(*_, **__):
        raise RuntimeError("User specified an unsupported autocast device_type 'cpu'")

    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda device_type: False)
    monkeypatch.setattr(torch, "autocast", autocast)
    assert network.decide(x) == expected
    with torch.no_grad():
        assert torch.equal(TorchEngine(network, None, torch.device("cpu"), "fp32").infer(x), network(x))


def test_slices_near_a_threshold_in_logits_are_for_review():
    network = build()
    x = torch.randn(1, 2, *PATCH)

    def is_for_review(skip, crop_, skip_above, crop_above):
        force(network, skip, crop_, 0.0)
        network.skip_threshold.fill_(torch.tensor(skip_above).sigmoid())
        network.crop_threshold.fill_(torch.tensor(crop_above).sigmoid())
        return network.decide(x)[0].review

    two = math.log(2)  # of the crop and the whole slice together, both 0
    assert is_for_review(7.0 + two, 0.0, 7.4, 9.0) and is_for_review(7.0 + two, 0.0, 6.6, 9.0)
    assert not is_for_review(7.0 + two, 0.0, 7.6, 9.0) and not is_for_review(7.0 + two, 0.0, 6.4, 9.0)
    assert is_for_review(0.0, 3.0, 9.0, 3.4) and not is_for_review(0.0, 3.0, 9.0, 3.6)
    assert not is_for_review(9.0, 3.0, 1.0, 3.1)  # a skipped slice is not cropped, however near that was
    network.skip_threshold.fill_(math.inf)
    network.crop_threshold.fill_(math.inf)
    assert not network.decide(x)[0].review


def test_regions_are_all_negative_where_a_slice_is_skipped():
    network = build()
    network.set_regions(True)
    logits, _ = network.execute(torch.randn(1, 2, *PATCH), [Decision("skip")])
    assert (logits == -8).all()


def test_decisions_travel_with_the_weights():
    network, again = build(), build(seed=1)
    network.skip_threshold.fill_(0.7)
    network.set_regions(True)
    network.is_quantised.fill_(True)
    again.load_state_dict(network.state_dict())
    x = torch.randn(3, 2, *PATCH)
    assert again.decide(x) == network.decide(x)
    with torch.no_grad():
        assert torch.equal(again(x), network(x))
    assert again.background_logits.tolist() == [-8] * 3


@pytest.mark.parametrize("regions", [False, True])
def test_pretrained_weights_of_other_labels_load(regions, tmp_path):
    pretrained, network = build(classes=4), build(classes=3, seed=1)
    pretrained.set_regions(not regions)
    network.set_regions(regions)
    torch.save({"network_weights": pretrained.state_dict()}, tmp_path / "checkpoint.pth")
    load_pretrained_weights(network, tmp_path / "checkpoint.pth")
    assert torch.equal(network.backbone.encoder.stem.weight, pretrained.backbone.encoder.stem.weight)
    assert network.background_logits.tolist() == ([-8] * 3 if regions else [8, -8, -8])


@pytest.mark.parametrize(
    "options", [{"policy_space": ["whole"]}, {"bits": [32]}, {"policy_space": ["whole"], "bits": [32]}]
)
def test_parts_that_are_not_asked_for_are_not_there(options):
    network = build(**options)
    assert (network.policy is None) == ("policy_space" in options) and (len(network.selectors) == 0) == (
        "bits" in options
    )
    network.is_quantised.fill_("bits" not in options)
    network.decisions = []
    with torch.no_grad():
        assert network(torch.randn(1, 2, *PATCH)).shape == (1, 3, *PATCH)
    assert set(network.decisions[0].bits) <= ({32} if "bits" in options else {8, 16})


def test_one_channel_one_class_and_other_choices():
    network = build(channels=1, classes=1, policy_space=["skip", 16, 32], bits=[4, 8, 12], quantise="encoder")
    network.is_quantised.fill_(True)
    network.decisions = []
    with torch.no_grad():
        network(torch.randn(2, 1, *PATCH))
    for decision in network.decisions:
        assert decision.action == "crop"  # there is no whole slice to fall back on
        assert set(decision.bits[:3]) <= {4, 8, 12} and decision.bits[3:] == (32, 32)


# --- costs ------------------------------------------------------------------------------------------------------


def test_costs_by_hand():
    network = MedDANetV2(
        1, 2, ModifiedUNet, {"policy_space": ["skip", 32, "whole"]}, strides=[[1, 1], [2, 2]], blocks=(1, 1)
    )
    network.eval()

    def block(channels, voxels):  # two 3×3 convolutions and two normalisations of 5 operations an element
        return 2 * (9 * channels * channels + 5 * channels) * voxels

    def by_hand(inner, outer):
        small = inner // 4
        stem_and_first = 9 * 16 * inner + block(16, inner)
        second = 9 * 16 * 32 * small + block(32, small)
        up = 32 * 16 * small + 4 * 16 * 16 * small
        last = 32 * 16 * outer + block(16, outer) + 16 * 2 * outer
        return [stem_and_first, second, up + last]

    full = 64 * 48
    assert network.stage_macs(PATCH, PATCH) == by_hand(full, full)
    assert network.stage_macs(PATCH, (32, 32)) == by_hand(32 * 32, full)
    deciding = [count_operations(part, (1, 1, 64, 64)).total for part in (network.policy, network.position)]
    selecting = 2 * ((1 + 1) + (16 + 1) + (32 + 1))
    assert network.selector_macs == selecting
    network.is_quantised.fill_(True)
    force(network, 0.0, 9.0, 0.0)
    network.crop_threshold.fill_(0.5)
    x = torch.randn(1, 1, *PATCH)
    _, (done,) = network.execute(x, network.decide(x))
    expected = sum(m * b / 32 for m, b in zip(by_hand(1024, full), done.bits, strict=True))
    assert done.cost == expected + sum(deciding) + selecting and done.deciding == sum(deciding) + selecting
    assert network.execute(x, [done])[1] == [done], "replayed, nothing is counted twice"
    force(network, 9.0, 0.0, 0.0)
    network.skip_threshold.fill_(0.5)
    assert network.decide(x)[0].cost == deciding[0]


def test_costs_are_those_of_inference_under_synchronised_batch_norm(tmp_path):
    expected = build().deciding_macs(PATCH), build().stage_macs(PATCH, (32, 32))
    network = nn.SyncBatchNorm.convert_sync_batchnorm(build())
    network.enter(replace(EVERYTHING, learns=frozenset({"policy"})))
    network.train()
    modes = [module.training for module in network.modules()]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        assert (network.deciding_macs(PATCH), network.stage_macs(PATCH, (32, 32))) == expected
    finally:
        dist.destroy_process_group()
    assert [module.training for module in network.modules()] == modes and True in modes and False in modes


def test_the_papers_network_costs_what_the_paper_says():
    network = MedDANetV2(4, 4, ModifiedUNet, strides=[[1, 1]] + [[2, 2]] * 3)
    published = [94, 170, 170, 315, 319]  # MMAC at 128² of the four encoder stages and the decoder; 1068 in all
    macs = network.stage_macs((128, 128), (128, 128))
    ours = [m / 1e6 for m in (*macs[:4], sum(macs[4:]))]
    assert sum(ours) == pytest.approx(sum(published), rel=0.05)
    assert ours[1:4] == pytest.approx(published[1:4], rel=0.05)
    full = sum(network.stage_macs((256, 256), (256, 256)))
    deciding = sum(network.deciding_macs((256, 256))) + network.selector_macs
    assert deciding < 0.05 * full
    # A crop of 96 out of 256: 14 % of the voxels, and the last stage at full size.
    assert sum(network.stage_macs((256, 256), (96, 96))) < 0.25 * full


def test_transbts_costs_what_table_3e_says_relative_to_the_unet():
    strides = [[1, 1]] + [[2, 2]] * 3
    macs = {
        network: count_operations(network(4, 4, strides), (1, 4, 128, 128)).total
        for network in (ModifiedUNet, TransBTS2D)
    }
    assert macs[TransBTS2D] / macs[ModifiedUNet] == pytest.approx(37.73 / 17.07, rel=0.1)


# --- training ---------------------------------------------------------------------------------------------------


def terms(outputs):
    logits = torch.stack(outputs["logits"], 1)
    mixed = (logits * outputs["choice"][..., None, None, None]).sum(1)
    maps = [logits.square().mean() for part in ("policy", "position") for logits in outputs[f"{part}_maps"]]
    return logits.square().mean() + mixed.square().mean() + outputs["cost"].mean() + sum(maps)


@pytest.mark.parametrize("learns", [PARTS, ("segmentation", "policy"), ("policy",), ("position", "selectors")])
def test_what_a_phase_trains_gets_gradients_and_nothing_else_changes(learns):
    network = build().train()
    network.enter(replace(EVERYTHING, learns=frozenset(learns)))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    optimizer = torch.optim.Adam(network.parameters(), 1e-2, weight_decay=0.1)
    torch.manual_seed(3)
    terms(network(torch.randn(12, 2, *PATCH))).backward()
    optimizer.step()
    parts = network.parts()
    for name, modules in parts.items():
        for module in modules:
            for key, parameter in module.named_parameters():
                # An instance normalisation takes away the bias of the convolution before it, but for rounding.
                if name in learns:
                    assert parameter.grad is not None and parameter.grad.abs().sum() > 0, f"{name}: {key}"
                else:
                    assert parameter.grad is None, f"{name}: {key}"
    changed = {
        key.partition(".")[0] for key, value in network.state_dict().items() if not torch.equal(value, before[key])
    }
    owners = {
        "segmentation": {"backbone", "crop_tail"},
        "policy": {"policy"},
        "position": {"position"},
        "selectors": {"selectors"},
    }
    assert changed == set().union(*(owners[name] for name in learns))


def test_the_training_forward_is_what_evaluation_computes():
    network = build()
    network.enter(replace(EVERYTHING, learns=frozenset({"segmentation"})))
    network.train()
    x = torch.randn(2, 2, *PATCH)
    centres = torch.tensor([[24.0, 28.0], [48.0, 16.0]])
    with torch.no_grad():
        outputs = network(x, centres)
    network.eval()
    assert (outputs["logits"][0][:, 0] == 8).all()
    expected, done = network.execute(x, [crop(8, 12), crop(32, 0)])
    assert torch.allclose(outputs["logits"][1], expected, atol=1e-5)
    whole, done_whole = network.execute(x, [Decision("whole")] * 2)
    assert torch.allclose(outputs["logits"][2], whole, atol=1e-5)
    unit = sum(network.stage_macs(PATCH, PATCH))
    policy, position = network.deciding_macs(PATCH)
    by_choice = [
        torch.full((2,), policy / unit),
        torch.tensor([(d.cost + policy + position) / unit for d in done]),
        torch.tensor([(d.cost + policy) / unit for d in done_whole]),
    ]
    expected = (outputs["choice"] * torch.stack(by_choice, 1)).sum(1)
    assert torch.allclose(outputs["cost"], expected, atol=1e-5)


def saved_bytes(network, x):
    """Of the storages that autograd keeps of a training step, but for those of the parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    seen = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that its place is not taken
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(x)
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize(
    "options", [{}, {"policy_space": ["whole"]}, {"bits": [32]}, {"policy_space": ["whole"], "bits": [32]}], ids=repr
)
def test_planned_and_counted_memory_is_what_a_training_step_keeps(options):
    network = build(**options).train()
    network.enter(EVERYTHING)
    kept = saved_bytes(network, torch.randn(2, 2, *PATCH)) / 2
    counted = training_memory(network, (1, 2, *PATCH))
    assert counted == pytest.approx(kept, rel=0.05)
    assert network.compute_conv_feature_map_size(PATCH) == counted // 8  # a unit of nnU-Net's is two maps in fp32
    training, inference = (
        count_operations(network.train(mode), (1, 2, *PATCH)).by_module["backbone.encoder.stages.0"]
        for mode in (True, False)
    )
    assert training == inference, "operations are those of one pass, not of all"


def test_the_cost_reaches_the_policy_and_the_selectors_only():
    network = build().train()
    network.enter(EVERYTHING)
    torch.manual_seed(0)
    network(torch.randn(8, 2, *PATCH))["cost"].mean().backward()
    reached = {name.partition(".")[0] for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"policy", "selectors"}


def test_maps_are_beside_what_the_networks_return():
    network = build().eval()
    x = torch.randn(2, 2, *PATCH)
    for part in (network.policy, network.position):
        with torch.no_grad():
            returned, maps = part.with_maps(x)
            assert torch.equal(returned, part(x))
        assert [tuple(logits.shape[1:]) for logits in maps] == [
            (1, *(-(-side // s) for side in PATCH)) for s in (8, 16, 32)
        ]
    unguided = build(guidance=0).eval()
    with torch.no_grad():
        assert unguided.policy.with_maps(x)[1] == unguided.position.with_maps(x)[1] == []


def test_crops_lie_around_the_middle_of_the_foreground_in_the_map():
    """With a map of one voxel a cell, by hand: half of a cell is its middle, and no crop leaves the slice."""
    network = build(policy_space=["skip", 16, 32, "whole"]).eval()
    cells = torch.full((2, 1, *(side // 8 for side in PATCH)), -30.0)
    cells[0, 0, 1, 2] = cells[0, 0, 2, 2] = 30  # rows 8 to 24, columns 16 to 24
    cells[1, 0, 0, -1] = 30
    network.position._maps = lambda features: [cells.clone(), *(torch.zeros(2, 1, n, n) for n in (2, 1))]
    with torch.no_grad():
        places = network.place(torch.randn(2, 2, *PATCH))
    assert torch.allclose(places[0] * torch.tensor(PATCH), torch.tensor([16.0, 20.0]))
    assert network._boxes(places, PATCH, [16, 32]) == [
        ((8, 24), (12, 28)),
        ((0, 32), (PATCH[1] - 32, PATCH[1])),
    ]


@pytest.mark.parametrize("guidance", [0, 1])
def test_gradients_reach_the_position_network_through_the_crop_and_its_restoration(guidance):
    network = build(guidance=guidance).train()
    network.enter(replace(EVERYTHING, learns=frozenset({"position"})))
    network(torch.randn(4, 2, *PATCH))["logits"][1].square().mean().backward()
    assert all(p.grad is not None for p in network.position.parameters())
    last = network.position.where[0] if guidance else network.position.fc
    assert last.weight.grad.abs().sum() > 0


def test_training_crops_whole_voxels_as_inference_does_with_the_gradient_of_the_place():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 2, 12, 14), torch.randn(1, 2, 5, 6)
    corner = torch.tensor([[2.7, 3.2]], requires_grad=True)
    cut = at_whole_voxels(crop_at, x, corner, (5, 6))
    assert torch.allclose(cut, x[..., 3:8, 3:9], atol=1e-6)
    (given,) = torch.autograd.grad((cut * weight).sum(), corner)
    (expected,) = torch.autograd.grad((crop_at(x, corner, (5, 6)) * weight).sum(), corner)
    assert torch.allclose(given, expected)
    features = torch.randn(1, 2, 5, 6, requires_grad=True)
    restored = at_whole_voxels(restore_at, features, corner, (12, 14))
    assert torch.allclose(restored[..., 3:8, 3:9], features, atol=1e-6) and restored[..., :3, :].abs().max() < 1e-6
    restored[..., 3, 3].sum().backward()
    assert torch.equal(features.grad[..., 0, 0], torch.ones(1, 2)) and corner.grad.abs().sum() > 0


def test_a_middle_beyond_what_a_crop_reaches_still_gets_a_gradient():
    centre = torch.tensor([[2.0, 20.0], [60.0, 40.0]], requires_grad=True)
    corner = corner_around(centre, (32, 32), (64, 48))
    assert corner.tolist() == [[0, 4], [32, 16]]
    corner.sum().backward()
    assert centre.grad.tolist() == [[1, 1], [1, 1]]


def test_cells_of_the_maps_fill_a_slice_of_any_size():
    """A bright spot is found where it is, also in its mirror image: sides are no multiples of 32."""
    network = build().eval()
    x = torch.zeros(2, 2, 112, 72)
    x[0, :, 8:16, 60:68] = 1
    x[1] = x[0].flip(1, 2)
    assert network._view(x).shape[2:] == (128, 96)
    network.position._maps = lambda features: [
        100 * (torch.nn.functional.adaptive_avg_pool2d(network._view(x)[:, :1], (16, 12)) - 0.3),
        *(torch.zeros(2, 1, *size) for size in ((8, 6), (4, 3))),
    ]
    with torch.no_grad():
        places = network.place(network._view(x)) * torch.tensor([112, 72])
    assert torch.allclose(places[0], torch.tensor([12.0, 64.0]), atol=2)
    assert torch.allclose(places.sum(0), torch.tensor([112.0, 72.0]), atol=1e-3)


def test_weights_that_decide_in_another_way_do_not_load():
    network = build()
    older = {key: value for key, value in network.state_dict().items() if key != "deciding"}
    with pytest.raises(ValueError, match="from another version of nnunet_dyn, which decided in another way"):
        build().load_state_dict(older)
    with pytest.raises(ValueError, match="Train again"):
        build().load_state_dict(network.state_dict() | {"deciding": torch.tensor(1)})


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy_space": []}, r"policy_space got \(\); expected a crop size or 'whole'"),
        ({"policy_space": ["skip"]}, r"policy_space got \('skip',\); expected a crop size or 'whole'"),
        ({"policy_space": ["skip", "half"]}, "policy_space got .* expected different ones of 'skip', crop sizes"),
        ({"policy_space": ["whole", "whole"]}, "policy_space got .* expected different ones"),
        ({"bits": []}, r"bits got \(\); expected different widths from 2 to 16, or 32"),
        ({"bits": [8, 24]}, r"bits got \(8, 24\); expected"),
        ({"quantise": "decoder"}, "quantise got 'decoder'; expected 'all' or 'encoder'"),
        ({"cost_weight": -0.1}, "cost_weight got -0.1; expected 0 or more"),
        ({"view_stride": 0}, "view_stride got 0; expected a whole number above 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        MedDANetOptions(**options)


def test_the_backbone_is_initialised_by_its_own_rule():
    network = build(backbone="efficient")
    kept = network.backbone.encoder.stages[1]
    before = [parameter.clone() for parameter in kept.parameters()]
    for module in kept.modules():
        module.keeps_weights = True
    network.apply(network.initialize)
    assert all(torch.equal(old, new) for old, new in zip(before, kept.parameters(), strict=True))
    network = build(backbone="efficient")
    network.apply(network.initialize)
    branches = [m for m in network.backbone.modules() if isinstance(m, MBConv) and m.has_shortcut]
    assert branches and all((branch.project.norm.weight == 0.2).all() for branch in branches)
    for backbone in ("efficient", "plain", "modified"):
        network = build(backbone=backbone)
        network.apply(network.initialize)
        own, tail = network.backbone.decoder, network.crop_tail
        for one, other in ((own.stages[-1], tail.stage), (own.seg_layers[-1], tail.seg_layers[0])):
            assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_networks_that_cannot_be():
    planned = arch_kwargs(3, n_stages=3)
    with pytest.raises(ValueError, match=r"got a 3D configuration; expected a 2D one, .* Train the configuration 2d"):
        MedDANetV2(1, 2, PlainConvUNet, **planned, n_conv_per_stage=[2] * 3)
    with pytest.raises(ValueError, match=r"got deep supervision, .* Train with -tr nnUNetTrainerMedDANetV2"):
        MedDANetV2(1, 2, ModifiedUNet, strides=[[1, 1], [2, 2]], deep_supervision=True)
    network = build()
    with pytest.raises(RuntimeError, match=r"outside of its phases; .* Train with -tr nnUNetTrainerMedDANetV2"):
        network.train()(torch.randn(1, 2, *PATCH))
    network.check_patch(PATCH)
    with pytest.raises(ValueError, match=r"Got slices of \(64, 50\) voxels; expected every axis divisible"):
        network.check_patch((64, 50))
    with pytest.raises(ValueError, match="larger than the patch"):
        network.check_patch((16, 24))


def test_no_dropout_and_no_batch_statistics_at_inference():
    network = build()
    x = torch.randn(2, 2, *PATCH)
    assert not any(isinstance(module, nn.Dropout) for module in network.backbone.modules())
    assert network.decide(x)[0] == network.decide(x[:1])[0]


# --- for the predictor and the profile --------------------------------------------------------------------------


class Executes(nn.Module):
    """Carries out one decision, for counting."""

    def __init__(self, network, decision):
        super().__init__()
        self.network, self.decision = network, decision

    def forward(self, x):
        return self.network.execute(x, [self.decision])[0]


@pytest.mark.parametrize(
    "decision", [Decision("whole", bits=(8,) * 5), crop(8, 0, (16,) * 5), Decision("skip", bits=())]
)
def test_operations_of_a_decision_are_those_that_run(decision):
    network = build(bits=[32])
    policy, position = network.deciding_macs(PATCH)
    deciding = policy + position * (decision.action == "crop")
    expected = network.operations(decision, PATCH) - deciding
    counted = count_operations(Executes(network, decision), (1, 2, *PATCH)).total
    assert counted == expected
    assert (counted == 0) == (decision.action == "skip")


def test_paths_are_the_extremes_that_the_policy_may_choose():
    network = build()
    paths = network.profile_paths(PATCH)
    assert list(paths) == ["everything on", "everything skipped"]
    everything, skipped = paths.values()
    assert everything.action == "whole" and everything.bits == (32,) * 5 and skipped.action == "skip"
    x = torch.randn(1, 2, *PATCH)
    assert torch.equal(network.execute(x, [everything])[0], network.segment_whole(x))
    assert (network.execute(x, [skipped])[0].argmax(1) == 0).all()
    assert everything.cost == network.operations(everything, PATCH) > 5 * skipped.cost
    assert [network.execute(x, [path])[1] for path in paths.values()] == [[everything], [skipped]]
    assert list(build(policy_space=["whole"]).profile_paths(PATCH)) == ["everything on"]
    largest = build(policy_space=["skip", 32, 24]).profile_paths(PATCH)["everything on"]
    assert largest.action == "crop" and largest.box == ((0, 32), (0, 32))


def test_what_a_decision_computes_and_its_json():
    one = crop(8, 4, (8, 16, 8, 8, 8))
    assert one.computed(PATCH) == (one.box,) and Decision("skip").computed(PATCH) == ()
    assert Decision("whole").computed(PATCH) == (((0, 64), (0, 48)),)
    one = replace(one, cost=1234.6, skip_probability=0.25, crop_probability=0.75, review=True)
    assert one.to_json() == {"action": "crop", "bits": [8, 16, 8, 8, 8], "macs": 1235, "skip_probability": 0.25,
                             "crop_probability": 0.75, "review": True}  # fmt: skip
    assert Decision("whole").to_json()["bits"] is None
