"""Detectors: the contract that both share, and that the low-resolution one finds boxes."""

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_dyn.architectures.roi import label_boxes, volume
from nnunet_dyn.architectures.roi_detectors import LowResDetector, generalised_iou

ISOTROPIC = {"strides": [[1] * 3] + [[2] * 3] * 2, "kernel_sizes": [[3] * 3] * 3, "patch_size": [16, 16, 16]}
ANISOTROPIC = {
    "strides": [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2]],
    "kernel_sizes": [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "patch_size": [8, 32, 16],
}


def detector(channels=1, classes=3, **changes) -> LowResDetector:
    torch.manual_seed(0)
    arguments = ISOTROPIC | changes
    network = LowResDetector(channels, classes, base_features=8, max_features=16, pyramid=8, **arguments)
    network.apply(network.initialize)
    return network


def targets(shape, batch=1):
    """Labels 1 and 2, the second with two targets far apart; the later samples have none."""
    labels = torch.zeros(batch, 1, *shape, dtype=torch.int16)
    z, y, x = (size // 8 for size in shape)
    labels[0, 0, 2 * z : 5 * z, y : 4 * y, x : 3 * x] = 1
    labels[0, 0, :z, 6 * y : 7 * y, x : 2 * x] = 2
    labels[0, 0, 7 * z :, 6 * y :, 6 * x :] = 2
    return labels


def image_of(labels, channels):
    noise = torch.randn(len(labels), channels, *labels.shape[2:], generator=torch.Generator().manual_seed(1))
    return (labels == 1).float() - (labels == 2).float() + 0.1 * noise


@pytest.mark.parametrize(
    ("plan", "channels", "batch", "regions"),
    [(ISOTROPIC, 1, 2, False), (ANISOTROPIC, 2, 1, False), (ISOTROPIC, 2, 1, True)],
    ids=["two samples, one without targets", "anisotropic, batch 1", "regions"],
)
def test_contract(plan, channels, batch, regions):
    network = detector(channels, 3, **plan)
    labels = targets(plan["patch_size"], batch)
    target = labels
    if regions:
        target = torch.cat([labels > 0, labels == 2, labels == 1], 1)
    network.set_labels(regions, None)
    x = image_of(labels, channels)
    network.train()
    loss = network.loss(network(x), target)
    loss.backward()
    assert loss.ndim == 0 and torch.isfinite(loss)
    assert all(parameter.grad is not None for parameter in network.parameters())
    learns = {name for name, parameter in network.named_parameters() if parameter.grad.abs().sum() > 0}
    assert {"head.seg_layers.mask.weight", "head.seg_layers.sides.weight", "lateral.0.weight"} <= learns
    network.eval()
    with torch.no_grad():
        logits = network(x)
        assert logits.shape == (batch, 3, *plan["patch_size"])
        copy = detector(channels, 3, **plan).eval()
        network.margin.fill_(1)
        network.score_threshold.fill_(0.001)
        copy.load_state_dict(network.state_dict())
        assert copy.has_regions == regions
        copy.detections = []
        assert torch.equal(copy(x), network(x))
        assert len(copy.detections) == batch and set(copy.detections[0]) == set(network.classes)


def test_each_class_has_its_own_score_and_margin():
    """The same is seen of both classes, and taken of the one whose score it reaches."""
    network = detector().eval()
    mask = torch.full((1, 3, 16, 16, 16), -9.0)
    mask[0, 1:, 4:8, 4:8, 4:8] = 0.0  # a probability of 1/2
    network.raw = lambda x: {"mask": mask, "sides": torch.zeros(1, 3, 2, 3, 8, 8, 8)}
    network.score_threshold.copy_(torch.tensor([0.0, 0.4, 0.6]))
    network.margin[1] = torch.tensor([0, 1, 2])
    x = torch.zeros(1, 1, 16, 16, 16)
    (decision,) = network.decide(x)
    assert (decision.classes, decision.boxes) == ((1,), (((4, 8), (3, 9), (2, 10)),))
    network.score_threshold[2] = 0.5
    assert network.decide(x)[0].boxes == (((4, 8), (3, 9), (2, 10)), ((4, 8),) * 3)


def test_a_box_is_the_component_and_the_mean_of_its_voxels_boxes():
    """Weighted by their probabilities; components do not mix, and where there is none there is no box."""
    network = detector().eval()
    mask, sides = torch.full((1, 3, 16, 16, 16), -9.0), torch.zeros(1, 3, 2, 3, 8, 8, 8)
    mask[0, 1, 4:6, 4:6, 4:6] = mask[0, 1, 12:14, 12:14, 12:14] = 9.0
    mask[0, 1, 6:8, 4:6, 4:6] = float(torch.logit(torch.tensor(0.5 + 1e-6)))  # half as sure as the voxels beside them
    sides[0, 1, 0, 2, 2, 2, 2] = 4.0  # from 5 to 1, from 5 to 5
    sides[0, 1, 1, 0, 6:, 6:, 6:] = 9.0  # from 13 to 22, which is outside
    (found,) = network.read({"mask": mask, "sides": sides}, (16, 16, 16))
    boxes = [one.box for one in found[1]]
    # The first's mean on the last axis is (1 + 5 / 2) / (3 / 2) = 2.33.
    assert boxes == [((4, 8), (4, 6), (2, 6)), ((12, 16), (12, 14), (12, 14))] and found[2] == []


def test_a_batch_without_any_target_gives_every_parameter_a_gradient():
    network = detector()
    empty = torch.zeros(1, 1, 16, 16, 16, dtype=torch.int16)
    network.loss(network(image_of(empty, 1)), empty).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_it_finds_the_boxes():
    """After some dozens of steps the boxes hold every voxel, far targets stay apart, and they are not much too big."""
    network = detector(strides=[[1] * 3] + [[2] * 3] * 3, kernel_sizes=[[3] * 3] * 4, patch_size=[32, 32, 32])
    labels = targets((32, 32, 32), 2)
    labels[1, 0, 20:30, 3:9, 12:30] = 1
    optimizer = torch.optim.AdamW(network.parameters(), 5e-3)
    for step in range(100):
        axes = [axis + 2 for axis in range(3) if step >> axis & 1]  # positions are not learnt by heart
        x, target = image_of(labels, 1).flip(axes), labels.flip(axes)
        optimizer.zero_grad()
        network.loss(network(x), target).backward()
        optimizer.step()
    network.eval()
    network.detections = []
    with torch.no_grad():
        rendered = network(image_of(labels, 1)).argmax(1).numpy()
    for sample, (found, drawn) in enumerate(zip(network.detections, rendered, strict=True)):
        of_sample = labels[sample, 0].numpy()
        wanted = label_boxes(of_sample, [1, 2])
        assert (drawn > 0)[of_sample > 0].mean() >= 0.995
        assert (drawn > 0).sum() <= 2 * sum(volume(box) for boxes in wanted.values() for box in boxes)
        for label, boxes in wanted.items():
            assert len(found[label]) >= len(boxes)  # those far apart are not one
            assert all(one.score >= 0.5 for one in found[label])


def test_every_box_counts_the_same():
    """A target twice as large takes nothing from the weight of another."""
    network, weight = detector(), []
    for length in (2, 4):
        labels = torch.zeros(1, 1, 16, 16, 16, dtype=torch.int16)
        labels[0, 0, :2, :2, :4], labels[0, 0, 10 : 10 + length, 10:12, 10:12] = 1, 2
        sides = torch.full((1, 3, 2, 3, 8, 8, 8), 3.0, requires_grad=True)
        network.loss({"mask": torch.zeros(1, 3, 16, 16, 16), "sides": sides}, labels).backward()
        weight.append(sides.grad[0, 1])
        assert weight[-1].any() and sides.grad[0, 2].any()
    assert torch.allclose(*weight)


def test_the_masks_of_small_targets_count_as_much():
    """What is missing of a target of 27 voxels pulls nearly as hard as what is missing of one of 512."""
    network = detector()
    labels = torch.zeros(1, 1, 16, 16, 16, dtype=torch.int16)
    labels[0, 0, :3, :3, :3], labels[0, 0, 8:, 8:, 8:] = 1, 2
    mask = torch.full((1, 3, 16, 16, 16), -3.0, requires_grad=True)
    network.loss({"mask": mask, "sides": torch.ones(1, 3, 2, 3, 8, 8, 8)}, labels).backward()
    small, large = (mask.grad[0, label][labels[0, 0] == label].sum() for label in (1, 2))
    assert small < 0 and 0.5 < small / large < 2


def test_ignored_voxels_do_not_count():
    network = detector().train()
    labels = targets((16, 16, 16))
    x = image_of(labels, 1)
    network.set_labels(False, 3)
    outputs = network(x)
    labels[0, 0, :, :4] = 3
    before = network.loss(outputs, labels)
    outputs["mask"] = outputs["mask"].clone()
    outputs["mask"][:, :, :, :4] += 5  # only there
    assert torch.allclose(network.loss(outputs, labels), before)
    outputs["mask"][:, :, :, 4:] += 5
    assert not torch.allclose(network.loss(outputs, labels), before)
    regions = torch.cat([labels == 1, labels == 2, labels == 9, labels == 3], 1)
    network.set_labels(True, 3)
    masks, known = network.foreground(regions)
    assert masks.shape[1] == 3 and torch.equal(known, labels[:, 0] != 3)


def test_nothing_found_is_background():
    network = detector().eval()
    with torch.no_grad():
        logits = network(torch.zeros(1, 1, 16, 16, 16))
    assert (logits.argmax(1) == 0).all() and (logits[:, 0] > 0).all()


def test_wrong_plans_are_refused():
    with pytest.raises(ValueError, match=r"deep supervision.* Train with -tr nnUNetTrainerROICascade\."):
        LowResDetector(1, 2, True, **ISOTROPIC)
    with pytest.raises(ValueError, match=r"divisible by the product of the strides, \[4, 4, 4\]"):
        detector(patch_size=[16, 18, 16])
    with pytest.raises(ValueError, match="got 3 and 1 entries"):
        detector(kernel_sizes=[[3, 3, 3]])


def test_a_mask_as_fine_as_the_input():
    """Sides of boxes lie at any voxel, not at every other one."""
    network = detector()
    mask, sides = torch.full((1, 3, 16, 16, 16), -9.0), torch.zeros(1, 3, 2, 3, 8, 8, 8)
    mask[0, 1, 3:8, 5:6, 7:12] = 2
    assert network.raw(torch.zeros(1, 1, 16, 16, 16))["mask"].shape == mask.shape
    (found,) = network.read({"mask": mask, "sides": sides}, (16, 16, 16))
    assert [one.box for one in found[1]] == [((3, 8), (5, 6), (7, 12))] and not found[2]
    # What the mask leaves out, the sides reach.
    sides[0, 1, 1, 0] = 10
    (found,) = network.read({"mask": mask, "sides": sides}, (16, 16, 16))
    assert found[1][0].box == ((3, 15), (5, 6), (7, 12))


def test_two_dimensions():
    network = LowResDetector(
        1,
        2,
        patch_size=[16, 16],
        base_features=8,
        strides=[[1, 1], [2, 2], [2, 2]],
        kernel_sizes=[[3, 3]] * 3,
        conv_op=nn.Conv2d,
        norm_op=nn.InstanceNorm2d,
    )
    labels = torch.zeros(1, 1, 16, 16, dtype=torch.int16)
    labels[..., 3:7, 8:12] = 1
    assert torch.isfinite(network.loss(network(torch.randn(1, 1, 16, 16)), labels))
    assert network.eval()(torch.randn(1, 1, 16, 16)).shape == (1, 2, 16, 16)


def test_memory_is_what_convolutions_write():
    network, written = detector(), []

    def hook(module, inputs, output):
        written.append(output[0].numel())

    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(hook)
    network(torch.zeros(1, 1, 16, 16, 16))
    assert network.compute_conv_feature_map_size([16, 16, 16]) == sum(written)


def test_generalised_iou():
    unit = torch.tensor([[[1.0, 1.0], [1.0, 1.0]]])  # a box of 2 × 2 around the point
    assert generalised_iou(unit, unit).item() == 1
    half = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]])
    assert generalised_iou(half, unit).item() == pytest.approx(0.5)
    apart = torch.tensor([[[-3.0, 1.0], [5.0, 1.0]]])  # from 3 to 5 on the first axis; the hull is from -1 to 5
    assert generalised_iou(apart, unit).item() == pytest.approx(-(12 - 8) / 12)
    assert np.isclose(generalised_iou(2 * unit, unit).item(), 0.25)
