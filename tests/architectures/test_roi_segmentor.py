"""Networks on regions of interest: what is run, what it costs, and that the result is the network's own on the crop."""

from itertools import pairwise

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from plans import arch_kwargs
from torch.nn import functional as F

from nnunet_dyn.accounting import count_operations
from nnunet_dyn.architectures.efficient_unet import EfficientUNet
from nnunet_dyn.architectures.roi import enlarge
from nnunet_dyn.architectures.roi_segmentor import (
    RefineBlock,
    ROIDecision,
    ROISegmentor,
    StageSkippingUNet,
    fit_box,
    threshold_index,
)
from nnunet_dyn.decisions import EVERYTHING_ON, EVERYTHING_SKIPPED, SKIP, DecidingNetwork
from nnunet_dyn.trainers.roi_cascade import ROICascadeTrainer

PATCH = (32, 32, 32)
BACKGROUND = 8.0
ANISOTROPIC = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
PLAN_KEYS = ("n_stages", "features_per_stage", "conv_op", "kernel_sizes", "strides", "norm_op", "norm_op_kwargs")


def planned(dimension=3, n_stages=3, features=(8, 12, 16), **plan) -> dict:
    return arch_kwargs(dimension, n_stages, features=features, **plan)


def build(network="plain", channels=1, gates=2, classes=3, deep_supervision=False, seed=0, options=None, **plan):
    """A segmentor of three small stages, whose strides multiply to 4, in evaluation mode."""
    torch.manual_seed(seed)
    kwargs = planned(**plan)
    if network == "plain":
        kwargs |= {"network_class": PlainConvUNet, "n_conv_per_stage": 1}
    elif network == "residual":
        kwargs |= {"network_class": ResidualEncoderUNet, "n_blocks_per_stage": 1}
    elif network == "efficient":
        kwargs |= {"network_class": EfficientUNet, "encoder": "b0"}
    else:
        kwargs = {key: kwargs[key] for key in PLAN_KEYS}
    made = ROISegmentor(
        channels + gates,
        classes,
        image_channels=channels,
        deep_supervision=deep_supervision,
        **kwargs,
        **(options or {}),
    )
    made.apply(made.initialize)
    return made.eval()


def tiles(*boxes_of_each, patch=PATCH, channels=1, gates=2):
    """One tile for each list of boxes: noise, and gates that alternate between the channels."""
    x = torch.cat(
        [torch.randn(len(boxes_of_each), channels, *patch), torch.zeros(len(boxes_of_each), gates, *patch)], 1
    )
    for tile, boxes in zip(x, boxes_of_each, strict=True):
        for index, box in enumerate(boxes):
            tile[(channels + index % gates, *at(box))] = 1
    return x


def at(box):
    return tuple(slice(start, stop) for start, stop in box)


def cube(start, side, dimension=3):
    return ((start, start + side),) * dimension


def background(shape, classes=3):
    expected = torch.full((classes, *shape), -BACKGROUND)
    expected[0] = BACKGROUND
    return expected


# --- boxes ------------------------------------------------------------------------------------------------------


def test_crops_are_the_smallest_that_fit():
    assert fit_box(((10, 15),), (64,), (8,), (16,), aligned=False) == ((5, 21),)
    assert fit_box(((10, 30), (0, 1)), (64, 64), (8, 4), (16, 8), False) == ((8, 32), (0, 8))
    assert fit_box(((60, 64), (0, 64)), (64, 64), (8, 8), (16, 16), False) == ((48, 64), (0, 64))
    assert fit_box(((12, 36),), (64,), (16,), (32,), aligned=False) == ((8, 40),)
    assert fit_box(((12, 36),), (64,), (16,), (32,), aligned=True) == ((0, 48),)
    assert fit_box(((50, 63),), (64,), (16,), (32,), aligned=True) == ((32, 64),)
    for first in range(30):
        for stop in range(first + 1, 33):
            for aligned in (False, True):
                ((a, b),) = fit_box(((first, stop),), (32,), (8,), (16,), aligned)
                assert 0 <= a <= first and stop <= b <= 32 and (b - a) % 8 == 0 and b - a >= 16
                assert not aligned or a % 8 == 0


def test_the_threshold_index_is_that_of_the_paper():
    assert [threshold_index(size, 3, 16) for size in (1, 15, 16, 31, 32, 50, 63, 64, 65, 200)] == [3] * 4 + [2] * 3 + [
        1
    ] * 3
    for size in range(16, 64):  # Eq. 2: the stage's cube is not larger than the ROI, and the one before it is
        r = threshold_index(size, 3, 16)
        assert 2 ** (3 - r) * 16 <= size < 2 ** (4 - r) * 16


# --- any network ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["plain", "residual", "efficient", "stages"])
def test_a_crop_is_the_networks_own_output_and_the_rest_background(network):
    made = build(network)
    x = tiles([cube(9, 6)])
    (decision,) = made.decide(x)
    (box,), (target,) = decision.boxes, decision.targets
    assert target == cube(8, 8) and box == cube(8, 8)
    with torch.no_grad():
        logits = made(x)
        expected = background(PATCH)
        expected[(slice(None), *at(box))] = made.network(x[(slice(None), slice(0, 1), *at(box))])[0]
    assert torch.allclose(logits[0], expected, atol=1e-5)
    assert made.operations(decision, PATCH) == count_operations(made.network, (1, 1, 8, 8, 8)).total


@pytest.mark.parametrize("options", [{}, {"mode": "paper"}], ids=["own", "paper"])
@pytest.mark.parametrize("network", ["plain", "stages"])
def test_a_batch_is_its_tiles_one_by_one(network, options):
    made = build(network, options=options, **({"n_stages": 4, "features": (4, 4, 8, 8)} if options else {}))
    x = tiles([cube(3, 5)], [], [cube(0, 3), cube(27, 5)], [cube(20, 6)], [cube(0, 32)])
    with torch.no_grad():
        together, alone = made(x), torch.cat([made(tile[None]) for tile in x])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.equal(together[1], background(PATCH))
    decisions = made.decide(x)
    assert [len(decision.boxes) for decision in decisions] == [1, 0, 2, 1, 1]
    with torch.no_grad():
        x[:, 1:] = 0.0  # the gate does not enter the network
        logits, done = made.execute(x, decisions)
        assert torch.equal(logits, together)
        again, same = made.execute(x, done)
    assert torch.equal(again, logits) and same == done
    assert [decision.cost for decision in done] == [made.operations(decision, PATCH) for decision in decisions]
    assert done[1].cost == 0 and all(decision.cost == 0 for decision in decisions)


def test_a_decision_is_mirrored_with_its_tile():
    """The crops of the flipped tile are the flipped crops, and the whole tile is the most that can be run."""
    made = build("stages")
    assert isinstance(made, DecidingNetwork)
    x = tiles([((3, 8), (0, 3), (9, 20))], [], patch=(16, 24, 32))
    decision, none = made.decide(x)
    assert (decision.action, none.action, none.computed((16, 24, 32))) == ("crop", SKIP, ())
    flipped = decision.mirrored((0, 2), (16, 24, 32))
    assert flipped != decision and flipped.mirrored((0, 2), (16, 24, 32)) == decision
    with torch.no_grad():
        logits = made.execute(x[:1].flip(2, 4), [flipped])[0].flip(2, 4)
        (box,) = decision.boxes
        own = made.network(x[(slice(0, 1), slice(0, 1), *at(box))].flip(2, 4)).flip(2, 4)
    expected = background((16, 24, 32))
    expected[(slice(None), *at(box))] = own[0]
    assert torch.allclose(logits[0], expected, atol=1e-5)
    paths = made.profile_paths((16, 24, 32))
    assert paths[EVERYTHING_ON].cost == made.count((16, 24, 32)) and paths[EVERYTHING_SKIPPED] == none
    assert paths[EVERYTHING_ON].to_json() == {
        "action": "crop",
        "stages": [[1, 2]],
        "macs": made.count((16, 24, 32)),
        "review": False,
    }


def test_nothing_runs_without_a_gate():
    made = build()
    ran = []
    made.network.register_forward_hook(lambda *_: ran.append(1))
    x = tiles([], [])
    assert torch.equal(made(x), background(PATCH).expand(2, -1, *PATCH)) and not ran
    assert made.decide(x) == [ROIDecision()] * 2
    x[0, 1] = 0.5  # nnU-Net's spline may leave such a voxel; only what rounds to a label counts
    assert made.decide(x)[0].boxes == ()


@pytest.mark.parametrize(
    ("box", "crop"),
    [
        (((0, 3), (30, 32), (10, 12)), ((0, 8), (24, 32), (7, 15))),
        (cube(16, 1), cube(13, 8)),
        (cube(31, 1), cube(24, 8)),
        (cube(0, 32), cube(0, 32)),
        (((0, 32), (5, 6), (0, 2)), ((0, 32), (2, 10), (0, 8))),
    ],
    ids=["border", "voxel", "corner", "whole", "slab"],
)
def test_crops_at_borders_of_one_voxel_and_of_the_whole_tile(box, crop):
    made = build()
    x = tiles([box])
    (decision,) = made.decide(x)
    assert decision.boxes == (crop,) and decision.targets == (enlarge(box, 1, PATCH),)
    with torch.no_grad():
        logits = made(x)[0]
        own = made.network(x[(slice(None), slice(0, 1), *at(crop))])[0]
    assert torch.allclose(logits[(slice(None), *at(crop))], own, atol=1e-5)
    if crop == cube(0, 32):
        assert not (logits == background(PATCH)).all(0).any()


def test_targets_far_apart_are_run_one_by_one_and_near_ones_together():
    made = build()
    x = tiles([cube(1, 5), cube(26, 5)], [cube(1, 5), ((8, 13), (1, 6), (1, 6))], [cube(4, 8), cube(6, 12)])
    apart, near, overlapping = made.decide(x)
    assert apart.boxes == (cube(0, 8), cube(24, 8)) and made.operations(apart, PATCH) == 2 * made.count((8, 8, 8))
    assert near.boxes == (((0, 16), (0, 8), (0, 8)),)
    assert overlapping.targets == (cube(3, 16),)
    specks = [((z, z + 1), (y, y + 1), (x, x + 1)) for z in (0, 4, 8) for y in (0, 4, 8, 12) for x in (0, 4, 8)]
    few = made.decide(tiles([*specks, cube(60, 2)], patch=(64,) * 3))[0]  # 37, of which the nearest are one
    assert len(few.boxes) == 2 and cube(56, 8) in few.boxes and made.operations(few, PATCH) < made.count(PATCH)


def test_boxes_that_overlap_or_meet_at_an_edge_are_one_only_where_that_is_cheaper():
    made = build(options={"margin": 0})
    long, across = ((0, 32), (0, 8), (0, 8)), ((0, 8), (0, 32), (0, 8))
    at_an_edge = [((0, 8), (0, 8), (0, 32)), ((8, 16), (8, 32), (0, 8))]
    inside = [cube(0, 32), cube(8, 8)]
    x = tiles([long, across], at_an_edge, at_an_edge, inside)
    x[2, 1] += x[2, 2]
    x[2, 2] = 0  # both in one channel
    overlapping, edge, same_channel, nested = made.decide(x)
    assert set(overlapping.boxes) == {long, across}  # 4,096 of the 8,192 voxels around both
    assert set(edge.boxes) == set(same_channel.boxes) == set(at_an_edge)
    assert nested.boxes == (cube(0, 32),)
    with torch.no_grad():
        logits = made(x)
    for tile, gate in zip(logits, x[:, 1:].any(1), strict=True):
        assert (tile != background(PATCH)).any(0)[gate].all()


def test_where_crops_overlap_each_target_is_its_own_crops():
    made = build(options={"margin": 0})
    targets = (((4, 5), (12, 13), (12, 13)), ((10, 11), (18, 19), (18, 19)))
    boxes = tuple(fit_box(target, PATCH, (4,) * 3, (8,) * 3, False) for target in targets)
    assert boxes[0][0][1] > boxes[1][0][0]
    x = tiles(targets)
    with torch.no_grad():
        logits = made.execute(x, [ROIDecision(boxes, targets)])[0][0]
        for box, target in zip(boxes, targets, strict=True):
            own = made.network(x[(slice(None), slice(0, 1), *at(box))])[0]
            inside = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(target, box, strict=True))
            assert torch.allclose(logits[(slice(None), *at(target))], own[(slice(None), *inside)], atol=1e-5)


def test_crops_follow_anisotropic_strides_and_two_dimensions():
    made = build(strides=ANISOTROPIC, kernel_sizes=[[1, 3, 3], [3] * 3, [3] * 3])
    x = tiles([((5, 7), (9, 15), (20, 21))], patch=(10, 32, 32))
    (decision,) = made.decide(x)
    assert decision.boxes == (((4, 8), (8, 16), (17, 25)),)
    assert made(x).shape == (1, 3, 10, 32, 32)
    flat = build(dimension=2)
    x = tiles([cube(9, 6, 2)], patch=(32, 24))
    assert flat.decide(x)[0].boxes == (cube(8, 8, 2),) and flat(x).shape == (1, 3, 32, 24)


@pytest.mark.parametrize("network", ["plain", "stages"])
@pytest.mark.parametrize("strides", [None, ANISOTROPIC], ids=["isotropic", "anisotropic"])
def test_deep_supervision_pastes_every_resolution(network, strides):
    made = build(network, deep_supervision=True, strides=strides)
    patch = (16, 32, 32)
    boxes = [((5, 7), (9, 15), (20, 21))], [], [((0, 16), (0, 32), (0, 32))]
    x = tiles(*boxes, patch=patch)
    with torch.no_grad():
        outputs = made(x)
    steps = (strides or [[1] * 3, [2] * 3, [2] * 3])[1]
    smaller = tuple(size // step for size, step in zip(patch, steps, strict=True))
    assert [tuple(output.shape[2:]) for output in outputs] == [patch, smaller]
    for decision, tile, full, half in zip(made.decide(x), x, *outputs, strict=True):
        expected = background(patch), background(smaller)
        for box in decision.boxes:
            assert all(start % step == 0 for (start, _), step in zip(box, steps, strict=True))
            with torch.no_grad():
                pieces = made.network(tile[(slice(0, 1), *at(box))][None])
            low = tuple((start // step, stop // step) for (start, stop), step in zip(box, steps, strict=True))
            expected[0][(slice(None), *at(box))], expected[1][(slice(None), *at(low))] = pieces[0][0], pieces[1][0]
        assert torch.allclose(full, expected[0], atol=1e-5) and torch.allclose(half, expected[1], atol=1e-5)
    made.decoder.deep_supervision = False
    with torch.no_grad():
        assert made(x).shape == (3, 3, *patch)


def test_regions_have_no_background():
    made = build()
    made.set_regions(True)
    x = tiles([], [cube(9, 6)])
    with torch.no_grad():
        logits = made(x)
    assert (logits[0] == -BACKGROUND).all() and (logits[1, :, :8] == -BACKGROUND).all()
    other = build(seed=1)
    other.load_state_dict(made.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x), logits)


def test_pretrained_weights_of_other_labels_load(tmp_path):
    pretrained, made = build(classes=2), build(seed=1)
    pretrained.set_regions(True)
    torch.save({"network_weights": pretrained.state_dict()}, tmp_path / "checkpoint.pth")
    load_pretrained_weights(made, tmp_path / "checkpoint.pth")
    key = "encoder.stages.0.0.convs.0.conv.weight"
    assert torch.equal(made.network.state_dict()[key], pretrained.network.state_dict()[key])
    assert made.background_logits.tolist() == [BACKGROUND, -BACKGROUND, -BACKGROUND]


def test_gradients_reach_every_parameter_of_the_network():
    made = build(deep_supervision=True).train()
    sum(output.square().mean() for output in made(tiles([cube(9, 6)], []))).backward()
    assert [name for name, p in made.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("network", ["plain", "stages"])
def test_a_batch_without_a_gate_can_be_trained_on(network):
    made = build(network, deep_supervision=True).train()
    outputs = made(tiles([], []))
    sum(F.cross_entropy(output, torch.zeros(2, *output.shape[2:], dtype=torch.long)) for output in outputs).backward()
    gradients = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    assert gradients and all("seg_layers" in name and not gradient.any() for name, gradient in gradients.items())


def test_training_takes_the_crops_of_evaluation():
    made = build("stages", deep_supervision=True)
    x = tiles([cube(3, 5), cube(24, 4)])
    assert made.decide(x) == made.train().decide(x)


def test_decisions_are_collected_in_evaluation_alone():
    made = build()
    made.decisions = []
    x = tiles([cube(9, 6)], [])
    made(x)
    assert made.decisions == made.execute(x, made.decide(x))[1] and made.decisions[1] == ROIDecision()
    assert made.decisions[0].cost > 0
    made.train()(x)
    assert len(made.decisions) == 2


@pytest.mark.parametrize("network", ["plain", "stages"])
def test_costs_grow_with_the_target_and_not_with_the_tile(network):
    made = build(network, n_stages=4, features=(4, 4, 8, 8))
    sides = [2, 20, 30] if network == "plain" else [2, 14, 20, 30]

    def cost(x):
        return made.operations(made.decide(x)[0], tuple(x.shape[2:]))

    macs = [cost(tiles([cube(0, side)])) for side in sides]
    assert all(b > 2 * a for a, b in pairwise(macs))
    large = tiles([cube(40, 2)], patch=(64, 64, 64))
    assert cost(large) == macs[0] < made.count((64, 64, 64)) / 50
    assert count_operations(made, (1, 3, 64, 64, 64)).total == made.count((64, 64, 64))  # the worst case
    assert made.compute_conv_feature_map_size((32,) * 3) == made.network.compute_conv_feature_map_size((32,) * 3)


def test_paper_mode_resamples_to_the_cube():
    made = build("stages", options={"mode": "paper"})
    seen = []
    made.network.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    x = tiles([cube(9, 6)], [((0, 3), (4, 9), (0, 31))], [cube(0, 32)])
    with torch.no_grad():
        logits = made(x)
    assert seen == [(1, 1, 16, 16, 16), (2, 1, 32, 32, 32)]
    first, second, third = made.decide(x)
    assert first.boxes == (cube(8, 8),) and second.boxes == (((0, 4), (3, 10), (0, 32)),)
    assert first.stages == ((3, 4),) and second.stages == third.stages == ((2, 3, 4),)
    with torch.no_grad():
        small = made.network(F.interpolate(x[:1, :1, 8:16, 8:16, 8:16], size=(16,) * 3, mode="trilinear"))
        expected = background(PATCH)
        expected[:, 8:16, 8:16, 8:16] = F.interpolate(small, size=(8,) * 3, mode="trilinear")[0]
    assert torch.allclose(logits[0], expected, atol=1e-5)
    made.decoder.deep_supervision = True
    with torch.no_grad():
        assert [output.shape[2] for output in made(x)] == [32, 16]


def test_what_cannot_be_built_says_why():
    with pytest.raises(ValueError, match="got 2 input channels, 2 of them the image; expected a gate"):
        build(channels=2, gates=0)
    with pytest.raises(ValueError, match="mode got 'papre'; expected 'own' or 'paper'"):
        build(options={"mode": "papre"})
    with pytest.raises(ValueError, match=r"network_class got 'nowhere\.Net'; expected the dotted path"):
        ROISegmentor(2, 2, image_channels=1, network_class="nowhere.Net", **planned())
    with pytest.raises(ValueError, match="margin got -1"):
        build(options={"margin": -1})
    with pytest.raises(ValueError, match="smallest got 6; expected a multiple of 4"):
        build("stages", options={"smallest": 6})
    with pytest.raises(ValueError, match=r"paper mode got .* \(16, 16, 16\); .* cubes of 16, so 8 or a divisor"):
        build(n_stages=5, features=(4,) * 5, options={"mode": "paper"})
    with pytest.raises(ValueError, match=r"EfficientUNet got batch normalisation; .*mbconv_norm='plan'"):
        build("efficient", options={"mbconv_norm": "batch"})


# --- the paper's segmentor --------------------------------------------------------------------------------------


def stages(mode="own", n_stages=4, features=(8, 12, 16, 24), classes=2, **options) -> StageSkippingUNet:
    torch.manual_seed(0)
    kwargs = planned(n_stages=n_stages, features=features, **options.pop("plan", {}))
    made = StageSkippingUNet(1, classes, **{key: kwargs[key] for key in PLAN_KEYS}, mode=mode, width=1, **options)
    made.apply(made.initialize)
    return made


def ran(network, *shape) -> set[str]:
    """Names of the modules with weights that ran on an input of ``shape``."""
    names, found = {}, set()
    for name, module in network.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            names[module] = name
    handles = [module.register_forward_pre_hook(lambda module, _: found.add(names[module])) for module in names]
    with torch.no_grad():
        network(torch.randn(shape))
    for handle in handles:
        handle.remove()
    return found


def belongs(name: str, first: int, heads: int) -> bool:
    """Whether a module of that name is active when ``first`` is the first stage, of a network with so many heads."""
    part, kind, *rest = name.split(".")
    index = int(rest[0]) + 1 if rest and rest[0].isdigit() else 0
    if kind == "gates":
        return index == first
    if part == "encoder" and kind == "stages":
        return index >= first
    if kind == "transpconvs":
        return index >= first
    if part == "decoder" and kind == "stages":  # stage k is refined on the way up unless it is the last
        return index >= first
    if kind == "seg_layers":  # the deepest level's first; full resolution's last
        return index == heads or heads - index >= first
    return kind in ("stem", "final")


@pytest.mark.parametrize(("mode", "sides"), [("own", (8, 16, 32)), ("paper", (16, 32))])
def test_skipped_stages_run_no_operation_and_get_no_gradient(mode, sides):
    network = stages(mode, deep_supervision=mode == "own")
    heads, last = len(network.decoder.seg_layers), len(network.hierarchy.blocks)
    everything = {
        name for name, module in network.named_modules() if next(module.parameters(recurse=False), None) is not None
    }
    for side in sides:
        first = {"own": {8: 3, 16: 2, 32: 1}, "paper": {16: 3, 32: 2}}[mode][side]
        assert network.active_stages((side,) * 3) == tuple(range(first, last + 1))
        expected = {name for name in everything if belongs(name, first, heads)}
        assert ran(network, 1, 1, side, side, side) == expected
        counted = count_operations(network.eval(), (1, 1, side, side, side)).by_module
        for k in range(1, last + 1):
            assert (counted.get(f"encoder.stages.{k - 1}", 0) > 0) == (k >= first)
            assert (counted.get(f"decoder.transpconvs.{k - 1}", 0) > 0) == (k >= first)
        network.train().zero_grad()
        outputs = network(torch.randn(1, 1, side, side, side))
        sum(output.square().mean() for output in (outputs if mode == "own" else [outputs])).backward()
        reached = {name.rpartition(".")[0] for name, p in network.named_parameters() if p.grad is not None}
        assert reached == expected
        silent = [n for n, p in network.named_parameters() if p.grad is not None and not p.grad.any()]
        assert silent == []


def test_inputs_of_all_sizes_reach_every_parameter():
    network = stages(deep_supervision=True)
    for side in (8, 16, 32):
        sum(output.square().mean() for output in network(torch.randn(1, 1, side, side, side))).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("strides", [None, [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2]]], ids=["isotropic", "thick"])
def test_every_crop_fits_the_stages_it_enters(strides):
    network = stages(plan={"strides": strides})
    if strides:
        assert network.active_stages((4, 8, 8)) == (3,) and network.active_stages((16, 16, 16)) == (2, 3)
        assert network.active_stages((30, 8, 8)) == (2, 3)  # stage 1 would not make the first axis smaller
    segmentor = build("stages", n_stages=4, features=(8, 8, 8, 8), strides=strides)
    for box in (cube(3, 1), cube(2, 9), cube(1, 17), ((0, 3), (5, 25), (7, 8)), ((0, 29), (5, 8), (7, 8))):
        for deep in (False, True):
            segmentor.decoder.deep_supervision = deep
            crop = segmentor.crop(box, (64, 64, 64))
            size = tuple(stop - start for start, stop in crop)
            step, least = segmentor.network.divisor(size)
            assert all(side % s == 0 and side >= low for side, s, low in zip(size, step, least, strict=True))
            assert all(a <= c and d <= b for (a, b), (c, d) in zip(crop, box, strict=True))


def test_deep_supervision_has_the_plans_resolutions_for_every_input():
    network = stages(deep_supervision=True)
    for side in (8, 16, 32):
        outputs = network(torch.randn(2, 1, side, side, side))
        assert [tuple(output.shape) for output in outputs] == [(2, 2, *(side // step,) * 3) for step in (1, 2, 4)]
    network.decoder.deep_supervision = False
    assert network(torch.randn(1, 1, 16, 16, 16)).shape == (1, 2, 16, 16, 16)
    assert len(network.decoder.seg_layers) == 3 and len(stages().decoder.seg_layers) == 3


@pytest.mark.parametrize("mode", ["own", "paper"])
def test_the_way_through_the_stages_is_not_linear(mode):
    """Each change of channels ends with the activation, also where refinement follows."""
    network = stages(mode)
    encoder, decoder = network.encoder, network.decoder
    ends = [list(layers)[-1] for layers in (*encoder.gates, *decoder.gates)]
    for layers in (*encoder.stages, *decoder.stages):
        ends.append([layer for layer in layers if not isinstance(layer, RefineBlock)][-1])
    assert len(ends) == 2 * len(encoder.gates) + len(encoder.stages) + len(decoder.stages) > 8
    assert {type(layer) for layer in ends} == {torch.nn.LeakyReLU}


def test_segmenting_a_ball_can_be_learned_at_the_trainers_learning_rate():
    network = ROISegmentor(2, 2, image_channels=1, deep_supervision=False, **{
        key: value for key, value in planned(n_stages=4, features=(16, 16, 16, 16)).items() if key in PLAN_KEYS
    })  # fmt: skip
    network.apply(network.initialize)
    optimizer = torch.optim.AdamW(network.parameters(), ROICascadeTrainer.segmentor_lr)
    generator, losses = torch.Generator().manual_seed(0), []
    grid = torch.stack(torch.meshgrid(*(torch.arange(24),) * 3, indexing="ij"))
    for step in range(75):
        centre = torch.randint(8, 16, (3,), generator=generator)
        radius = (2, 3, 6)[step % 3]  # of each number of stages
        target = (grid - centre.view(3, 1, 1, 1)).square().sum(0) <= radius**2
        gate = torch.zeros_like(target)
        gate[tuple(slice(c - radius, c + radius + 1) for c in centre.tolist())] = True
        image = target.float() + 0.5 * torch.randn(target.shape, generator=generator)
        logits = network(torch.stack([image, gate.float()])[None])
        probability = torch.softmax(logits, 1)[0, 1]
        dice = 1 - 2 * (probability * target).sum() / (probability.sum() + target.sum())
        optimizer.zero_grad()
        (F.cross_entropy(logits, target.long()[None]) + dice).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimizer.step()
        losses.append(dice.item())
    assert sum(losses[-9:]) / 9 < 0.3 < sum(losses[:9]) / 9
