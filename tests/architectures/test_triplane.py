"""The paper's detector: what it sees, what it returns, and that three planes find a box in a volume."""

import numpy as np
import pytest
import torch
from plans import narrow_resnet
from skimage.exposure import equalize_adapthist
from torch import nn
from torch.nn import functional as F
from torchvision.models import get_model

from nnunet_dyn.accounting import count_operations, count_parameters
from nnunet_dyn.architectures import triplane
from nnunet_dyn.architectures.roi import intersection, label_boxes, volume
from nnunet_dyn.architectures.triplane import (
    FILTERS,
    DecoderStage,
    MultiScaleAttention,
    SliceDetector,
    TriPlaneDetector,
    sine_positions,
)
from nnunet_dyn.errors import JobError

PATCH = (16, 24, 20)
SMALL = {"size": 32, "backbone": "resnet18", "pyramid": 16, "width": 16, "hidden": 32, "heads": 2, "stages": 2}


@pytest.fixture(autouse=True, scope="module")
def narrow_backbone():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triplane, "get_model", narrow_resnet)
        yield


def detector(channels=1, classes=3, patch=PATCH, seed=0, **options) -> TriPlaneDetector:
    torch.manual_seed(seed)
    return TriPlaneDetector(channels, classes, patch_size=patch, **(SMALL | options))


@pytest.fixture(scope="module")
def small():
    return detector()


def labels(*boxes_of_each, patch=PATCH):
    """``(B, 1, *patch)``: sample by sample the box of each label from 1 on; ``None`` where it is absent."""
    target = torch.zeros(len(boxes_of_each), 1, *patch)
    for sample, boxes in zip(target, boxes_of_each, strict=True):
        for label, box in enumerate(boxes, 1):
            if box is not None:
                sample[(0, *(slice(*axis) for axis in box))] = label
    return target


BOXES = [((2, 9), (3, 14), (5, 17)), ((10, 14), (15, 23), (0, 6))], [None, ((4, 12), (4, 12), (6, 14))]


# --- what it sees -----------------------------------------------------------------------------------------------


def test_views_are_taken_along_each_axis_of_the_volume_in_0_to_1():
    x = torch.rand(2, 2, 32, 32, 32) * 40 - 7
    unit = torch.stack([torch.stack([(c - c.min()) / (c.max() - c.min()) for c in sample]) for sample in x])
    expected = {
        "centre": [unit[:, :, 16], unit[:, :, :, 16], unit[..., 16]],
        "mean": [unit.mean(axis) for axis in (2, 3, 4)],
        "std": [unit.std(axis) for axis in (2, 3, 4)],
        "subregions": [torch.cat([part.mean(axis) for part in unit.split(8, axis)], 1) for axis in (2, 3, 4)],
    }
    for view, slices in expected.items():
        network = detector(channels=2, patch=(32, 32, 32), view=view)
        for found, wanted in zip(network.slices(x), slices, strict=True):
            assert torch.allclose(found, wanted, atol=1e-5)
        assert network.raw(x)["boxes"].shape == (2, 3, 3, 2, 2)
    assert torch.isfinite(torch.stack(detector().slices(torch.full((1, 1, *PATCH), 3.0)))).all()


@pytest.mark.parametrize("name", [name for name in FILTERS if name != "none"])
def test_filters_are_applied_to_each_slice(small, name):
    x = torch.rand(2, 1, *PATCH)
    small.filter = name
    try:
        filtered = small.slices(x)
    finally:
        small.filter = "none"
    for found, slices in zip(filtered, small.slices(x), strict=True):
        for image, plain in zip(found[:, 0].numpy(), slices[:, 0].numpy(), strict=True):
            if name == "clahe":
                assert np.allclose(image, equalize_adapthist(plain), atol=1e-5) and image.std() > plain.std()
            elif name == "gaussian":
                assert image.std() < plain.std() and abs(image.mean() - plain.mean()) < 0.02
            else:  # edges alone: what has none is zero
                assert not np.allclose(image, plain) and np.allclose(FILTERS[name](np.full((8, 8), 0.7)), 0)


# --- the modules ------------------------------------------------------------------------------------------------


def test_attention_reaches_everywhere_and_knows_positions_and_stages():
    torch.manual_seed(0)
    attention = MultiScaleAttention(16, 2, 32)
    x = torch.randn(1, 16, 4, 6)
    changed = x.clone()
    changed[..., 3, 5] += torch.randn(16)
    assert ((attention(x, changed) - attention(x, x)).abs().amax(1) > 0).all()
    assert not torch.allclose(attention(x, x.flip(2)), attention(x, x), atol=1e-4)
    before = attention(x, x)
    with torch.no_grad():
        attention.stage += torch.randn(16)
    assert not torch.allclose(attention(x, x), before, atol=1e-4)
    encoded = sine_positions((4, 6), 16, x)[0]
    assert encoded.shape == (24, 16) and len(encoded.unique(dim=0)) == 24


def test_a_decoder_stage_asks_with_what_comes_from_below_and_answers_from_the_skip():
    torch.manual_seed(0)
    stage = DecoderStage(16, 2, 32)
    asked = []
    stage.second.register_forward_pre_hook(lambda _, args: asked.append(args))
    below, skip = torch.randn(2, 1, 16, 4, 4)
    stage(below, skip)
    ((query, other),) = asked
    assert other is skip and torch.equal(query, stage.first(*[stage.merge(torch.cat((below, skip), 1))] * 2))


def test_a_slice_is_halved_and_doubled_by_its_stages():
    torch.manual_seed(0)
    module = SliceDetector(1, 3, "resnet18", False, 16, 16, 32, 2, stages=3)
    sizes = []
    for part in (module.encoder, module.decoder):
        for stage in part:
            stage.register_forward_hook(lambda _, __, output: sizes.append(tuple(output.shape[1:])))
    boxes, present = module(torch.rand(2, 1, 64, 64), None)
    assert sizes == [(16, 8, 8), (16, 4, 4), (16, 2, 2), (16, 2, 2), (16, 4, 4), (16, 8, 8)]
    assert boxes.shape == (2, 3, 2, 2) and present.shape == (2, 3) and (boxes[..., 0] < boxes[..., 1]).all()


# --- the contract of a detector ---------------------------------------------------------------------------------


@pytest.mark.parametrize("regions", [False, True])
def test_gradients_reach_every_parameter(regions):
    network = detector(channels=2).train()
    network.set_labels(regions, None)
    target = labels(*BOXES, [None, None])
    if regions:
        target = torch.cat([target > 0, target == 2, target == 1], 1)
    torch.manual_seed(3)  # half of the samples are shown their mask
    network.give_masks(target)
    loss = network.loss(network(torch.randn(3, 2, *PATCH)), target)
    loss.backward()
    assert loss.ndim == 0 and [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_no_target_at_all_has_a_graph_and_unknown_voxels_say_nothing(small):
    small.train()
    x = torch.randn(1, 1, *PATCH)
    empty = torch.zeros(1, 1, *PATCH)
    loss = small.loss(small(x), empty)
    loss.backward()
    assert loss > 0 and all(p.grad is not None for p in small.parameters())
    small.set_labels(False, 3)
    try:
        assert small.loss(small(x), torch.full_like(empty, 3)) == 0
        assert small.loss(small(x), labels(BOXES[0])) > 0
    finally:
        small.set_labels(False, None)


def test_the_loss_is_that_of_the_boxes_that_are_there(small):
    target = labels(*BOXES)
    sides, present = small._wanted(torch.cat([target == 1, target == 2], 1))
    assert present.tolist() == [[True, True], [False, True]]
    wanted = label_boxes(target[0, 0].numpy(), [1, 2])
    for place, label in enumerate((1, 2)):
        scaled = sides[0, place] * torch.tensor(PATCH).unsqueeze(1)
        assert scaled.round().int().tolist() == [list(axis) for axis in wanted[label][0]]
    perfect = torch.zeros(2, 3, 3, 2, 2)
    for axis, others in enumerate(([1, 2], [0, 2], [0, 1])):
        perfect[:, axis, 1:] = sides[:, :, others]
    logits = torch.full((2, 3, 3), 20.0)
    logits[1, :, 1] = -20
    assert small.loss({"boxes": perfect, "present": logits}, target) < 1e-4
    absent = perfect.clone()
    absent[1, :, 1] = torch.rand(2, 2)  # a box for what is not there does not count
    assert small.loss({"boxes": absent, "present": logits}, target) < 1e-4
    off = perfect.clone()
    off[0, 2, 2, 0] += 0.1  # in one plane, of one class, along one axis
    assert small.loss({"boxes": off, "present": logits}, target) > 0.05
    assert small.loss({"boxes": perfect, "present": -logits}, target) > 10


def test_pretrained_weights_are_fetched_on_demand_alone(monkeypatch):
    class Weights:
        class DEFAULT:
            @staticmethod
            def get_state_dict(progress):
                torch.manual_seed(1)
                state = narrow_resnet(SMALL["backbone"], None, nn.BatchNorm2d).state_dict()
                return state | {"fc.weight": torch.zeros(1)}

    def offline(name):
        raise OSError("no route")

    monkeypatch.setattr(triplane, "get_model_weights", offline)
    network = detector(pretrained=True)  # as planning and prediction build it
    with pytest.raises(JobError, match=r"Got no weights of torchvision's resnet18 \(no route\); .* TORCH_HOME"):
        network.load_pretrained()
    detector().load_pretrained()  # without the option nothing is fetched
    monkeypatch.setattr(triplane, "get_model_weights", lambda name: Weights)
    network.load_pretrained()
    expected = Weights.DEFAULT.get_state_dict(False)
    for plane in network.planes:
        state = plane.backbone.state_dict()
        assert state and all(torch.equal(value, expected[key]) for key, value in state.items())


def test_two_planes_make_each_axis_and_absent_classes_give_no_box(small, monkeypatch):
    boxes = torch.zeros(1, 3, 3, 2, 2)
    boxes[0, 0, 1] = torch.tensor([[0.20, 0.50], [0.10, 0.30]])  # sees axes 1 and 2
    boxes[0, 1, 1] = torch.tensor([[0.25, 0.75], [0.20, 0.40]])  # 0 and 2
    boxes[0, 2, 1] = torch.tensor([[0.25, 0.50], [0.30, 0.60]])  # 0 and 1
    present = torch.tensor([[[9.0, 3.0, 1.0], [9.0, 1.0, -3.0], [9.0, 2.0, -1.0]]])
    monkeypatch.setattr(small, "raw", lambda _: {"boxes": boxes, "present": present})
    (found,) = small.detect(torch.zeros(1, 1, 16, 20, 40))
    (detection,) = found[1]
    assert detection.box == ((4, 10), (5, 11), (6, 14)) and found[2] == []
    assert abs(detection.score - torch.sigmoid(torch.tensor(2.0)).item()) < 1e-6
    small.score_threshold.fill_(0.95)
    try:
        assert small.detect(torch.zeros(1, 1, 16, 20, 40)) == [{1: [], 2: []}]
    finally:
        small.score_threshold.fill_(0.5)


def test_masks_enter_in_training_alone_and_once(small):
    x, target = torch.rand(1, 1, *PATCH), labels(BOXES[0])
    seen = []
    handles = [plane.register_forward_pre_hook(lambda _, args: seen.append(args[1])) for plane in small.planes]
    small.train()
    torch.manual_seed(1)
    small.give_masks(target)
    small(x)
    shown = seen[:3]
    small(x)
    small.eval()
    small.give_masks(target)
    with torch.no_grad():
        small(x)
    for handle in handles:
        handle.remove()
    assert seen[3:] == [None] * 6 and any(mask.any() for mask in shown)
    for axis, mask in enumerate(shown):
        if mask.any():
            expected = F.adaptive_max_pool2d((target == 2).any(axis + 2).float(), 32)
            assert torch.equal(mask[:, 2:], expected) and not mask[:, 0].any()


def test_boxes_in_volumes_are_learned():
    generator = torch.Generator().manual_seed(0)
    target = labels(
        [((3, 9), (4, 14), (5, 15)), ((10, 15), (14, 22), (2, 8))],
        [((6, 14), (8, 20), (2, 9)), None],
    )
    x = (target == 1).float() - (target == 2).float() + 0.1 * torch.randn(target.shape, generator=generator)
    network = detector(view="mean")
    optimizer = torch.optim.Adam(network.parameters())
    # At a constant rate where it ends depends on the processor.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=140, pct_start=0.2)
    for _ in range(140):
        optimizer.zero_grad()
        network.loss(network(x), target).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    found = network.eval().detect(x)
    assert [[len(one[label]) for label in (1, 2)] for one in found] == [[1, 1], [1, 0]]
    ious = []
    for sample, one in zip(target, found, strict=True):
        for label, (box,) in label_boxes(sample[0].numpy(), [label for label in (1, 2) if one[label]]).items():
            common = intersection(box, one[label][0].box)
            inter = volume(common) if common else 0
            ious.append(inter / (volume(box) + volume(one[label][0].box) - inter))
    assert np.mean(ious) > 0.5 and min(ious) > 0.25
    with torch.no_grad():
        logits = network(x)
    assert logits.shape == (2, 3, *PATCH) and (logits.argmax(1)[1] == 2).sum() == 0
    other = detector(view="mean", seed=1).eval()
    other.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x), logits)


def test_the_defaults_come_near_the_papers_counts(monkeypatch):
    monkeypatch.setattr(triplane, "get_model", get_model)
    with torch.device("meta"):
        network = TriPlaneDetector(1, 2, patch_size=(128,) * 3)
    assert count_parameters(network) == pytest.approx(192.6659e6, rel=0.01)
    operations = 3 * count_operations(network.planes[0], (1, 1, 128, 128)).total
    assert operations == pytest.approx(13.4684e9, rel=0.11)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": (32, 32)}, r"patch_size got \(32, 32\); expected three numbers"),
        ({"view": "middle"}, "view got 'middle'; expected one of centre, mean, std, subregions"),
        ({"filter": "canny"}, "filter got 'canny'; expected one of none, clahe"),
        ({"size": 40}, "size got 40; expected a multiple of 16, for 2 stages"),
        ({"heads": 3}, "width got 16; expected a multiple of 4 and of the 3 heads"),
    ],
)
def test_what_cannot_be_built_says_why(options, message):
    with pytest.raises(ValueError, match=message):
        detector(**options)
