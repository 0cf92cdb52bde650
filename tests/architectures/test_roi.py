"""Boxes: of a segmentation, rendered as logits, and read back."""

import tracemalloc
from itertools import combinations

import numpy as np
import pytest
import torch

from nnunet_dyn.architectures.roi import (
    SPECKLE,
    Detection,
    enlarge,
    jitter,
    label_boxes,
    mask_boxes,
    merge,
    merge_nearest,
    read_boxes,
    render_boxes,
    volume,
)

DISJOINT = {
    1: [((0, 3), (0, 4), (2, 5)), ((10, 12), (8, 16), (8, 16))],  # at the border, and far from it
    2: [((4, 5), (7, 8), (9, 10))],  # one voxel
    3: [((5, 9), (0, 2), (15, 16))],  # touches none of its own label
}


def filled(boxes, shape):
    union = np.zeros(shape, bool)
    for found in boxes.values():
        for box in found:
            union[tuple(slice(*axis) for axis in box)] = True
    return union


@pytest.mark.parametrize("shape", [(12, 16, 16), (12, 40, 16)])
def test_disjoint_boxes_come_back_exactly(shape):
    logits = render_boxes(DISJOINT, shape, 4)
    assert logits.shape == (4, *shape)
    read = read_boxes(logits.argmax(0).numpy())
    assert {label: sorted(boxes) for label, boxes in read.items()} == {k: sorted(v) for k, v in DISJOINT.items()}


def test_two_dimensions():
    boxes = {1: [((0, 3), (2, 9))], 2: [((5, 8), (0, 1))]}
    assert read_boxes(render_boxes(boxes, (8, 9), 3).argmax(0).numpy()) == boxes


def test_smaller_boxes_win_and_the_union_is_kept():
    boxes = {1: [((0, 8), (0, 8), (0, 8))], 2: [((2, 4), (2, 4), (2, 4))], 3: [((3, 10), (3, 10), (3, 10))]}
    labels = render_boxes(boxes, (12, 12, 12), 4).argmax(0).numpy()
    assert (labels[2:4, 2:4, 2:4] == 2).all()
    assert (labels[4:8, 4:8, 4:8] == 3).all()  # 343 voxels against 512
    assert np.array_equal(labels > 0, filled(boxes, labels.shape))
    assert (filled(read_boxes(labels), labels.shape) | ~(labels > 0)).all()


def test_regions_keep_every_box():
    boxes = {0: [((0, 8), (0, 8))], 1: [((2, 4), (2, 4))]}
    logits = render_boxes(boxes, (10, 10), 2, regions=True)
    for label, found in boxes.items():
        assert np.array_equal((logits[label] > 0).numpy(), filled({0: found}, (10, 10)))


def averaged(folds, weights):
    """What nnU-Net makes of the boxes that each fold found in each of some overlapping tiles, in half precision."""
    of_folds = []
    for tiles in folds:
        weighted, total = torch.zeros_like(tiles[0]).half(), torch.zeros(()).half()
        for logits, weight in zip(tiles, weights, strict=True):
            weighted += logits.half() * torch.tensor(weight).half()
            total += torch.tensor(weight).half()
        of_folds.append(weighted / total)
    return sum(of_folds) / len(of_folds)


@pytest.mark.parametrize("total", [10, 80])  # nnU-Net's Gaussian, and the most that tiles add up to
@pytest.mark.parametrize("share", [0.1, 0.9, 1.0])
def test_a_box_that_one_of_five_folds_finds_in_one_of_two_tiles_is_kept(share, total):
    weights = (share * total, (1 - share) * total)
    for regions in (False, True):
        found, none = (render_boxes(boxes, (4,), 3, regions) for boxes in ({1: [((0, 2),)]}, {}))
        mean = averaged([(found, none), *[(none, none)] * 4], weights)
        expected = [[False] * 4, [True, True, False, False], [False] * 4]
        if regions:
            assert (mean > 0).tolist() == expected
        else:
            assert mean.argmax(0).tolist() == [1, 1, 0, 0]
        nothing = averaged([(none, none)] * 5, weights)
        assert not (nothing > 0).any() if regions else (nothing.argmax(0) == 0).all()


def test_boxes_of_different_labels_do_not_average_into_background():
    shape = (4,)
    first, second, none = (render_boxes(boxes, shape, 3) for boxes in ({1: [((0, 3),)]}, {2: [((1, 4),)]}, {}))
    assert (averaged([(first,), (second,), *[(none,)] * 3], (10,)).argmax(0) > 0).all()
    assert averaged([(first,), (first,), (second,)], (10,)).argmax(0).tolist() == [1, 1, 1, 2]


def test_the_smaller_box_wins_in_an_average_too():
    boxes = {1: [((0, 8),)], 2: [((2, 4),)]}
    found, none = render_boxes(boxes, (10,), 3), render_boxes({}, (10,), 3)
    mean = averaged([(found, none), *[(none, none)] * 4], (1, 9))
    assert mean.argmax(0).tolist() == [1, 1, 2, 2, 1, 1, 1, 1, 0, 0]


def test_no_boxes():
    assert read_boxes(np.zeros((4, 4, 4), np.int16)) == {}
    assert label_boxes(np.zeros((4, 4, 4), np.int16), [1, 2]) == {1: [], 2: []}


class TestLabelBoxes:
    def test_far_targets_stay_apart_and_an_absent_class_has_none(self):
        labels = np.zeros((30, 12, 12), np.int16)
        labels[1:3, 4:6, 4:6] = labels[20:25, 4:6, 4:6] = 1
        labels[10, 0, 11] = 3
        labels[0, 0, 0] = -1  # what nnU-Net pads with
        assert label_boxes(labels, [1, 2, 3]) == {
            1: [((1, 3), (4, 6), (4, 6)), ((20, 25), (4, 6), (4, 6))],
            2: [],
            3: [((10, 11), (0, 1), (11, 12))],
        }

    def test_near_targets_are_one(self):
        mask = np.zeros((12, 12), bool)
        mask[0:2, 0:2] = mask[4:6, 0:2] = True  # two voxels between them
        assert mask_boxes(mask, gap=2) == [((0, 6), (0, 2))]
        assert mask_boxes(mask, gap=1) == [((0, 2), (0, 2)), ((4, 6), (0, 2))]

    def test_a_target_inside_anothers_box_is_one_with_it(self):
        mask = np.zeros((20, 20), bool)
        mask[0:12, 0] = mask[0, 0:12] = mask[8, 8] = True
        assert mask_boxes(mask, gap=0) == [((0, 12), (0, 12))]

    def test_regions(self):
        labels = np.zeros((20, 8), np.int16)
        labels[2:4, 2:4], labels[4:6, 2:4], labels[15, 5] = 1, 2, 2
        assert label_boxes(labels, [(1, 2), (2,), (3,)]) == {
            0: [((2, 6), (2, 4)), ((15, 16), (5, 6))],
            1: [((4, 6), (2, 4)), ((15, 16), (5, 6))],
            2: [],
        }


def test_merging_goes_on_until_nothing_overlaps():
    # The first two make a box that holds the third.
    boxes = [((0, 2), (0, 10)), ((1, 10), (0, 2)), ((6, 8), (6, 8))]
    assert merge(boxes) == [((0, 10), (0, 10))]
    assert merge([((0, 2),), ((2, 4),)]) == [((0, 2),), ((2, 4),)]
    assert merge([]) == []


def test_speckle_is_merged_soon():
    near = [((2 * i, 2 * i + 2), (0, 1)) for i in range(SPECKLE + 1)]
    assert merge([*near, ((0, 1), (40, 50))]) == [((0, 2 * SPECKLE + 2), (0, 1)), ((0, 1), (40, 50))]
    assert len(merge(near[:SPECKLE])) == SPECKLE


@pytest.mark.parametrize(("gap", "side"), [(0, 60), (2, 80)])
def test_many_boxes_are_merged_as_by_a_look_at_each_pair(gap, side):
    rng = np.random.default_rng(0)
    start, size = rng.integers(0, side, (150, 3)), rng.integers(1, 7, (150, 3))
    boxes = [tuple(zip(*pair, strict=True)) for pair in zip(start.tolist(), (start + size).tolist(), strict=True)]

    def is_near(a, b):
        reach = gap + (gap > 0)
        return all(c < f + reach and e < d + reach for (c, d), (e, f) in zip(a, b, strict=True))

    expected = list(boxes)
    while pair := next((pair for pair in combinations(expected, 2) if is_near(*pair)), None):
        for box in pair:
            expected.remove(box)
        expected.append(tuple((min(a, c), max(b, d)) for (a, b), (c, d) in zip(*pair, strict=True)))
    assert 10 < len(expected) < 150 and sorted(merge(boxes, gap)) == sorted(expected)


def test_thousands_of_boxes_do_not_take_the_square_of_their_number():
    places = np.random.default_rng(0).choice(128**3, 5000, replace=False)
    boxes = [tuple((int(a), int(a) + 1) for a in place) for place in np.stack(np.unravel_index(places, (128,) * 3), 1)]
    tracemalloc.start()
    try:
        merged = merge(boxes)
        nearest = merge_nearest(boxes, 512)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 4500 < len(merged) <= 5000 and len(nearest) == 512
    assert most < 40 * 2**20, "a matrix of all pairs would be 75 MB"
    inside = np.zeros((128,) * 3, bool)
    for box in nearest:
        inside[tuple(slice(*axis) for axis in box)] = True
    assert inside.flat[places].all()


def test_no_more_are_merged_than_must_be():
    boxes = [((100 * i, 100 * i + 10), (0, 10)) for i in range(5)] + [((5, 9), (12, 14)), ((204, 206), (3, 20))]
    assert merge_nearest(boxes, 7) == boxes
    assert sorted(merge_nearest(boxes, 6)) == sorted([*boxes[1:5], boxes[6], ((0, 10), (0, 14))])
    assert sorted(merge_nearest(boxes, 5)) == sorted(
        [*boxes[1:2], *boxes[3:5], ((0, 10), (0, 14)), ((200, 210), (0, 20))]
    )
    assert merge_nearest([boxes[0]] * 3, 1) == [boxes[0]] and merge_nearest([], 1) == []


def test_enlarged_boxes_stay_inside():
    assert enlarge(((0, 2), (5, 9)), (1, 3), (4, 10)) == ((0, 3), (2, 10))
    assert enlarge(((1, 2),), 1, (9,)) == ((0, 3),)


def test_jitter_changes_position_and_size_and_stays_inside():
    box, shape, rng = ((0, 20), (10, 11), (30, 60)), (24, 24, 64), np.random.default_rng(0)
    moved = [jitter(box, shape, rng) for _ in range(200)]
    assert len(set(moved)) > 150
    for one in moved:
        assert volume(one) > 0 and all(0 <= a < b <= size for (a, b), size in zip(one, shape, strict=True))
    sizes = np.array([[b - a for a, b in one] for one in moved]).mean(0)
    assert (sizes > [20, 1, 30]).all()  # outwards more than inwards
    assert any(one[2][0] > 30 for one in moved) and any(one[2][0] < 30 for one in moved)


@pytest.mark.parametrize(("box", "score", "message"), [(((3, 3),), 0.5, "start < stop"), (((0, 3),), 1.5, "0 to 1")])
def test_a_detection_is_checked(box, score, message):
    with pytest.raises(ValueError, match=message):
        Detection(box, score)


def test_rendering_takes_boxes_of_any_class_order():
    boxes = {2: [((0, 1), (0, 1))], 1: [((0, 1), (0, 1))]}
    assert int(torch.count_nonzero(render_boxes(boxes, (2, 2), 3).argmax(0))) == 1
