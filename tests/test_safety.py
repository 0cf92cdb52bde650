"""When slices may be skipped or cropped, on evidence made by hand."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

from nnunet_dyn.architectures.roi import render_boxes
from nnunet_dyn.safety import NEVER, BoxEvidence, Evidence

LABELS = ["1"]


def near(probability):
    """A threshold that ``probability`` sets: a tenth of a logit above it."""
    return pytest.approx(1 / (1 + (1 / probability - 1) * math.exp(-0.1)))


def evidence(*slices) -> Evidence:
    """Slices as ``(skip, crop, case, parts)``; an entry of parts is ``(class, component, voxels, outside)``."""
    result = Evidence()
    for skip, crop, case, *parts in slices:
        result.add_tile(skip, crop)
        for label, component, voxels, outside in parts:
            for count, scored in ((voxels - outside, -math.inf), (outside, crop)):
                if count:
                    result.add_part(case, label, component, count, skip, scored)
    return result


def test_skips_what_is_empty_and_keeps_what_is_not():
    found = evidence(
        (0.99, 0.1, "a"),
        (0.80, 0.1, "a"),
        (0.70, 0.1, "a", ("1", 1, 500, 0)),
        (0.10, 0.1, "b", ("1", 1, 500, 0)),
    ).calibrate(2, LABELS)
    assert found.skip_threshold == near(0.7)  # the highest of a slice with foreground, which is not above itself
    assert (found.skipped, found.slices, found.cases) == (0.5, 4, 2)
    assert found.coverage == {"1": 1.0} and found.lost_components == 0 and not found.is_useless


def test_no_threshold_is_lower_than_the_policys_own_choice():
    found = evidence((0.9, 0.9, "a"), (0.2, 0.1, "a", ("1", 1, 500, 0))).calibrate(1, LABELS)
    assert (found.skip_threshold, found.crop_threshold) == (near(0.5), near(0.5))


def test_a_small_class_does_not_pay_for_a_large_one():
    slices = [(0.9, 0, "a", ("small", 1, 20, 0)), (0.1, 0, "a", ("small", 1, 180, 0), ("large", 1, 100000, 0))]
    pooled = 20 / 100200
    assert pooled < 0.005
    assert evidence(*slices).calibrate(1, ["small", "large"]).skip_threshold == near(0.9)
    assert evidence(*slices).calibrate(1, ["small", "large"], min_coverage=0.89).skip_threshold == near(0.5)


def test_no_component_vanishes_whole():
    def slices(size):
        return evidence((0.9, 0, "a", ("1", 1, size, 0)), (0.1, 0, "a", ("1", 2, 100000, 0)))

    assert slices(10).calibrate(1, LABELS).skip_threshold == near(0.9)
    assert slices(9).calibrate(1, LABELS).skip_threshold == near(0.5)
    assert slices(10).calibrate(1, LABELS, min_component=11).skip_threshold == near(0.5)
    # The same voxels at the rim of a component that is seen elsewhere may go.
    rim = evidence((0.9, 0, "a", ("1", 1, 10, 0)), (0.1, 0, "a", ("1", 1, 100000, 0)))
    assert rim.calibrate(1, LABELS).skip_threshold == near(0.5)


def test_crops_get_what_skipping_leaves_of_the_allowance():
    slices = [
        (0.8, 0.0, "a", ("1", 1, 4, 0)),
        (0.1, 0.9, "b", ("1", 1, 400, 4)),
        (0.1, 0.7, "b", ("1", 1, 596, 0)),
    ]
    found = evidence(*slices).calibrate(2, LABELS)
    assert (found.skip_threshold, found.crop_threshold) == (
        near(0.5),
        near(0.9),
    )  # 4 skipped of 1000; 4 more would be too many
    assert found.coverage == {"1": 0.996} and found.worst == ("a", "1", 0.0)
    found = evidence(*slices).calibrate(2, LABELS, min_coverage=0.992)
    assert (found.crop_threshold, found.cropped) == (near(0.5), pytest.approx(2 / 3))
    assert "a, class 1, 0.00 %" in str(found)


def test_a_network_that_cannot_segment_a_whole_slice():
    slices = [(0.9, 0.0, "a"), (0.3, 0.0, "a", ("1", 1, 1000, 1))]
    found = evidence(*slices).calibrate(1, LABELS, always_crops=True)
    assert (found.skip_threshold, found.crop_threshold, found.coverage) == (near(0.5), -1.0, {"1": 0.999})


def test_where_nothing_can_be_left_out_it_says_so():
    found = evidence(*[(0.9, 0.9, "a", ("1", n, 50, 50)) for n in range(4)]).calibrate(1, LABELS)
    assert found.is_useless and "nothing can be left out safely" in str(found)
    assert found.skipped == found.cropped == 0


def test_what_is_never_done_is_null_in_json():
    found = replace(evidence((0.9, 0.1, "a", ("1", 1, 500, 0))).calibrate(1, LABELS), crop_threshold=NEVER)
    text = json.dumps(found.to_json(), allow_nan=False)
    assert json.loads(text)["crop_threshold"] is None
    assert json.loads(text)["skip_threshold"] == found.skip_threshold


def test_a_class_without_voxels_turns_skipping_and_cropping_off():
    def slices():
        return evidence((0.9, 0.0, "a"), (0.1, 0.9, "a", ("1", 1, 500, 0)))

    known, found = slices().calibrate(1, ["1"]), slices().calibrate(1, ["1", "2"])
    assert (known.skipped, known.cropped, known.unseen) == (0.5, 0.5, ())
    assert (found.skip_threshold, found.crop_threshold, found.coverage) == (NEVER, NEVER, {"1": 1.0})
    assert "class 2: no voxels in the validation cases" in str(found)
    assert found.to_json()["notes"] == ["class 2: no voxels in the validation cases"]
    always = slices().calibrate(1, ["1", "2"], always_crops=True)
    assert (always.skip_threshold, always.crop_threshold) == (NEVER, -1.0)
    for nothing in (evidence((0.9, 0.0, "a"), (0.1, 0.9, "a")), evidence()):
        found = nothing.calibrate(1, LABELS)
        assert found.skip_threshold == found.crop_threshold == NEVER and "no foreground" in str(found)
    with pytest.raises(ValueError, match=r"min_coverage got 99.5; expected a share from 0 to 1"):
        evidence().calibrate(0, LABELS, min_coverage=99.5)


def test_the_slice_that_sets_a_threshold_does_not_hang_on_its_last_digit():
    for probability in (0.7, 0.99999):
        found = evidence((probability, 0, "a", ("1", 1, 500, 0)), (1 - (1 - probability) / 2, 0, "a")).calibrate(
            1, LABELS
        )
        assert 0 < found.skip_threshold - probability < 0.1 * (1 - probability) and found.skipped == 0.5


@pytest.mark.parametrize("probability", [0.9, 1 - 2.0**-20, 1 - 2.0**-23, 1 - 2.0**-24])
def test_the_margin_survives_single_precision(probability):
    """The buffers' precision: next to 1 the nearest number to what is wanted would be the probability itself."""
    assert probability == np.float32(probability)
    found = evidence((probability, 0, "a", ("1", 1, 500, 0))).calibrate(1, LABELS).skip_threshold
    assert found == np.float32(found) and (1 - found) / found <= (1 / probability - 1) * math.exp(-0.0999)


def test_few_cases_leave_slack():
    """Half as many cases as are enough, half the odds of an error; slack is not used up by crops."""

    def slices(*more):
        return evidence((0.7, 0.1, "a", ("1", 1, 996, 0)), (0.1, 0.8, "b", ("1", 1, 1004, 0)), *more)

    def raised(probability, logits):
        return pytest.approx(1 / (1 + (1 / probability - 1) * math.exp(-logits)))

    # Two of ten cases have the class, whatever the others are.
    found = slices().calibrate(10, LABELS, enough=4)
    assert found.skip_threshold == raised(0.7, 0.1 + math.log(2)) and found.slack == pytest.approx(math.log(2))
    assert found.crop_threshold == raised(0.5, 0.1 + math.log(2))
    assert "So few cases raise the thresholds by 0.69 logits." in str(found)
    few, asked = slices().calibrate(10, LABELS, enough=20), slices().calibrate(10, LABELS, enough=2)
    assert few.skip_threshold == raised(0.7, 0.1 + math.log(10))
    assert asked == slices().calibrate(10, LABELS) and asked.slack == 0 and "So few" not in str(asked)
    rare = slices((0.1, 0.1, "b", ("2", 1, 20, 0))).calibrate(10, [*LABELS, "2"], enough=2)
    assert rare.slack == pytest.approx(math.log(2))  # one case has class 2
    # Eight of 2008 voxels may be skipped at 0.9; raised, they are not, but crops get no more for it.
    rim = (0.9, 0.0, "b", ("1", 1, 8, 0)), (0.1, 0.95, "a", ("1", 1, 8, 8))
    for enough in (0, 20):
        found = slices(*rim).calibrate(2, LABELS, enough=enough)
        assert found.skip_threshold == raised(0.7, 0.1 + (enough and math.log(10)))
        assert found.crop_threshold == raised(0.95, 0.1 + (enough and math.log(10)))
    never = slices().calibrate(2, [*LABELS, "2"], enough=20)
    assert (never.skip_threshold, never.crop_threshold, never.slack) == (NEVER, NEVER, 0)


def test_thresholds_are_judged_by_cases_that_they_were_not_set_on():
    """One of two cases has a lesion that only itself says not to skip; the other has nothing of the kind."""
    slices = [(0.9, 0.0, "a", ("1", 1, 100, 0)), (0.1, 0.0, "a", ("1", 2, 300, 0)), (0.2, 0.0, "b", ("1", 1, 600, 0))]
    found = evidence(*slices).calibrate(2, LABELS)
    assert (found.coverage, found.lost_components) == ({"1": 1.0}, 0)
    assert (found.left_out, found.left_out_lost) == ({"1": pytest.approx(0.9)}, 1)
    expected = "In cases that the thresholds were not set on, the lowest is class 1, 90.00 %, components lost whole: 1."
    assert expected in str(found)
    assert json.loads(json.dumps(found.to_json()))["left_out"] == {"1": pytest.approx(0.9)}
    # Slack counts there, too; of a single case, and where nothing was set, nothing can be said.
    assert evidence(*slices).calibrate(2, LABELS, enough=4).left_out == {"1": pytest.approx(0.9)}
    assert evidence(*slices).calibrate(2, LABELS, enough=20).left_out == {"1": 1.0}
    for nothing in (evidence(*slices[:2]).calibrate(1, LABELS), evidence(*slices).calibrate(2, [*LABELS, "2"])):
        assert (nothing.left_out, nothing.left_out_lost) == ({}, 0) and "not set on" not in str(nothing)


@pytest.mark.parametrize("always_crops", [False, True])
def test_what_is_counted_is_what_a_loop_counts(always_crops):
    rng = np.random.default_rng(0)
    made, parts = Evidence(), []
    for _ in range(400):
        case, label, number = (str(rng.integers(7)), str(rng.integers(3)), int(rng.integers(3)))
        voxels, skip, crop = int(rng.integers(1, 30)), rng.random() ** 4, rng.choice([-math.inf, rng.random() ** 3])
        parts.append((case, label, number, voxels, skip, crop))
        made.add_part(*parts[-1])
    found = made.calibrate(30, ["0", "1", "2"], 0.9, 40, always_crops)

    def left(part, of=found):
        if always_crops and part[5] > -math.inf:
            return 0
        return part[3] * (part[4] <= of.skip_threshold and (always_crops or part[5] <= of.crop_threshold))

    def sums(value, fields):
        result = {}
        for part in parts:
            result[part[fields]] = result.get(part[fields], 0) + value(part)
        return result

    def voxels_of(part):
        return part[3]

    total, kept = (sums(value, 1) for value in (voxels_of, left))
    assert found.coverage == {label: kept[label] / total[label] for label in total}
    total, kept = (sums(value, slice(2)) for value in (voxels_of, left))
    share, key = min((kept[key] / total[key], key) for key in total)
    assert found.worst == (*key, share)
    total, kept = (sums(value, slice(3)) for value in (voxels_of, left))
    assert found.lost_components == sum(kept[key] == 0 and total[key] >= 40 for key in total)
    # The five parts take every fifth case by name.
    held = {}
    for part in range(5):
        others = Evidence()
        for one in parts:
            if int(one[0]) % 5 != part:
                others.add_part(*one)
        without = others.calibrate(30, ["0", "1", "2"], 0.9, 40, always_crops)
        for one in parts:
            if int(one[0]) % 5 == part:
                held[one[1]] = held.get(one[1], 0) + left(one, without)
    total = sums(voxels_of, 1)
    assert found.left_out == {label: held[label] / total[label] for label in total}


class TestBoxes:
    """Margin and score of a detector, on hand-made cases of a grid of 20³."""

    SHAPE = (20, 20, 20)

    def evidence(self, found, targets=None, shape=None, case="a"):
        """One case; ``found`` has boxes by threshold and class, of class 1 if they are a list, ``targets`` slices."""
        made = BoxEvidence()
        self.add(made, found, targets or {"1": [np.s_[5:10, 5:10, 5:10]]}, shape or self.SHAPE, case)
        return made

    def add(self, made, found, targets, fine, case):
        numbered = []
        for label, parts in targets.items():
            components = np.zeros(fine, int)
            for number, part in enumerate(parts, 1):
                components[part] = number
            first = int(components.any((0, 1)).argmax())
            numbered.append((label, components[..., first:], (0, 0, first)))
        tight = [[(axis.start, axis.stop) for axis in part] for parts in targets.values() for part in parts]
        boxes = {
            score: {"1": [], "2": [], "3": []} | (each if isinstance(each, dict) else {"1": each})
            for score, each in found.items()
        }
        made.add_case(case, self.SHAPE, fine, numbered, boxes, tight)

    def test_the_smallest_margin_per_axis(self):
        found = self.evidence({0.5: [((5, 10), (6, 10), (8, 9))]}).calibrate(["1"])
        assert found.margin == {"1": (0, 1, 3)} and found.score_threshold == {"1": 0.5} and found.is_safe
        assert found.coverage == {"1": 1.0} and found.lost_components == 0
        assert found.ratio == pytest.approx(5 * 6 * 7 / 125) and found.volume == pytest.approx(210 / 8000)

    def test_a_few_voxels_may_be_outside(self):
        """Of 125 + 1 voxels less than 1 % is outside; one component of one voxel is too small to count."""
        targets = {"1": [np.s_[5:10, 5:10, 5:10], np.s_[0:1, 0:1, 19:20]]}
        boxes = {0.5: [((5, 10), (5, 10), (5, 10))]}
        assert self.evidence(boxes, targets).calibrate(["1"], min_coverage=0.99).margin == {"1": (0, 0, 0)}
        strict = self.evidence(boxes, targets).calibrate(["1"], 1.0)
        assert not strict.is_safe and strict.coverage["1"] == pytest.approx(125 / 126)

    def test_a_small_component_of_ten_voxels_is_not_lost(self):
        """Two in a thousand voxels would do without it."""
        targets = {"1": [np.s_[0:18, 0:20, 0:15], np.s_[19:20, 10:20, 19:20]]}
        boxes = {0.5: [((0, 18), (0, 20), (0, 15))], 0.1: [((0, 18), (0, 20), (0, 15)), ((19, 20), (12, 14), (19, 20))]}
        found = self.evidence(boxes, targets).calibrate(["1"])
        assert (found.score_threshold, found.margin, found.lost_components) == ({"1": 0.1}, {"1": (0, 0, 0)}, 0)
        ignored = self.evidence(boxes, targets).calibrate(["1"], min_component=11)
        assert (ignored.score_threshold, ignored.margin) == ({"1": 0.5}, {"1": (0, 0, 0)})

    def test_of_safe_ones_the_fewest_voxels_win(self):
        """A lower score finds a box that needs no margin, and another that is no target."""
        tight, loose = ((5, 10), (5, 10), (5, 10)), ((6, 7), (6, 7), (6, 7))
        far = ((0, 20), (0, 20), (15, 20))
        assert self.evidence({0.5: [loose], 0.1: [tight]}).calibrate(["1"]).score_threshold == {"1": 0.1}
        found = self.evidence({0.5: [loose], 0.1: [tight, far]}).calibrate(["1"])
        assert (found.score_threshold, found.margin) == ({"1": 0.5}, {"1": (3, 3, 3)})

    def test_each_class_has_its_own_score_and_margin(self):
        """A class that only a low score finds does not enlarge the boxes of another."""
        targets = {"1": [np.s_[5:10, 5:10, 5:10]], "2": [np.s_[11:12, 5:10, 5:10]]}
        box, short = ((5, 10), (5, 10), (5, 10)), ((11, 12), (5, 10), (6, 10))
        low = {"1": [((0, 20), (0, 20), (0, 20))], "2": [short]}
        found = self.evidence({0.5: {"1": [box]}, 0.1: low}, targets).calibrate(["1", "2"])
        assert found.score_threshold == {"1": 0.5, "2": 0.1} and found.margin == {"1": (0, 0, 0), "2": (0, 0, 1)}
        assert found.coverage == {"1": 1.0, "2": 1.0} and found.is_safe and not found.unseen
        assert found.ratio == pytest.approx((125 + 30) / 150)
        assert "of each class: 1 0.5 and 0 × 0 × 0, 2 0.1 and 0 × 0 × 1." in str(found)

    def test_what_is_inside_any_box_is_inside(self):
        """Whose box it is makes no difference to the segmentor, so it makes none to what is measured."""
        targets = {"1": [np.s_[5:10, 5:10, 5:10]], "2": [np.s_[9:12, 5:10, 5:10]]}
        made = self.evidence({0.5: {"1": [((5, 10), (5, 10), (5, 10))], "2": [((10, 11), (5, 10), (5, 10))]}}, targets)
        scores = {"1": 0.5, "2": 0.5}
        found = made.measure(["1", "2"], scores, {"1": (0, 0, 0), "2": (0, 0, 0)})
        assert found.coverage == {"1": 1.0, "2": pytest.approx(2 / 3)} and not found.is_safe
        wider = made.measure(["1", "2"], scores, {"1": (2, 0, 0), "2": (0, 0, 0)})
        assert wider.coverage == {"1": 1.0, "2": 1.0} and wider.is_safe

    def test_a_class_without_voxels_is_not_trusted(self):
        box = ((5, 10), (5, 10), (5, 10))
        found = self.evidence({0.5: [box], 0.1: {"1": [box], "3": [box]}}).calibrate(["1", "3"])
        assert (found.score_threshold, found.unseen) == ({"1": 0.5, "3": 0.1}, ("3",))
        assert found.margin == {"1": (0, 0, 0), "3": (2, 2, 2)} and found.volume == pytest.approx(9**3 / 8000)
        assert "so that nothing is known: 3" in str(found)

    def test_targets_on_a_finer_grid(self):
        """A box of 5–10 voxels is 12 of the finer ones long, 9 to 20, once its logits are interpolated."""
        boxes = {0.5: [((5, 10), (5, 10), (5, 10))]}
        exact = {"1": [np.s_[9:21, 9:21, 9:21]]}
        found = self.evidence(boxes, exact, (40, 40, 40)).calibrate(["1"])
        assert found.margin == {"1": (0, 0, 0)} and found.ratio == 1 and found.coverage == {"1": 1.0}
        assert found.volume == pytest.approx(12**3 / 40**3)
        longer = {"1": [np.s_[10:20, 10:20, 10:22]]}
        found = self.evidence(boxes, longer, (40, 40, 40)).calibrate(["1"])
        assert found.margin == {"1": (0, 0, 1)} and found.ratio == pytest.approx(12 * 12 * 16 / 1200)

    @pytest.mark.parametrize(
        "fine, spacing, nearest",
        [
            ((20, 20, 20), (1, 1, 1), ()),
            ((40, 40, 40), (1, 1, 1), ()),
            ((31, 44, 60), (1, 1, 1), ()),
            ((60, 27, 33), (4, 1, 1), (0,)),
        ],
    )
    def test_boxes_hold_what_nnunets_resampling_makes_of_them(self, fine, spacing, nearest):
        """Never less, at most some corners more by ``volume``, and by ``coverage`` no voxel that is outside."""
        rng = np.random.default_rng(0)
        for _ in range(8):
            start = rng.integers(0, 16, 3)
            box = tuple(zip(start.tolist(), (start + rng.integers(2, 5, 3)).tolist(), strict=True))
            logits = render_boxes({1: [box]}, self.SHAPE, 2).numpy()
            resampled = resample_data_or_seg_to_shape(logits, fine, spacing, spacing, False, 1, 0, None)
            inside = resampled[1] > resampled[0]
            made = BoxEvidence()
            targets = [(label, part.astype(int), (0, 0, 0)) for label, part in (("1", inside), ("2", ~inside))]
            made.add_case("a", self.SHAPE, fine, targets, {0.5: {"1": [box], "2": []}}, [], nearest)
            found = made.measure(["1", "2"], {"1": 0.5, "2": 0.5}, {"1": (0, 0, 0), "2": (0, 0, 0)})
            assert inside.mean() <= found.volume + 1e-9 and found.volume <= 1.3 * inside.mean()
            assert found.coverage["2"] == 0 and found.coverage["1"] > 0.5
            if fine[0] in (20, 40):
                assert found.coverage["1"] == 1 and found.volume == pytest.approx(inside.mean())

    def test_a_margin_is_judged_by_cases_that_it_was_not_set_on(self):
        """At 0.5 one case needs three voxels that the other does not tell of; at 0.1 larger boxes need none."""
        exact, short, long = (((start, stop), (5, 10), (5, 10)) for start, stop in ((5, 10), (8, 10), (0, 14)))
        targets = {"1": [np.s_[5:10, 5:10, 5:10]]}
        made = self.evidence({0.5: [exact], 0.1: [long]}, targets)
        alone = made.calibrate(["1"])
        assert (alone.score_threshold, alone.left_out) == ({"1": 0.5}, {}) and "was not set on" not in str(alone)
        self.add(made, {0.5: [short], 0.1: [long]}, targets, self.SHAPE, "b")
        fewer = made.measure(["1"], {"1": 0.5}, {"1": (3, 0, 0)})
        found = made.calibrate(["1"])
        assert fewer.is_safe and fewer.volume < found.volume
        assert (found.score_threshold, found.margin, found.left_out) == ({"1": 0.1}, {"1": (0, 0, 0)}, {"1": 1.0})
        assert found.is_safe and found.left_out_lost == 0
        # Where nothing is better, what is to be expected is said: 2 of 5 slices in one case, all in the other.
        made = self.evidence({0.5: [exact]}, targets)
        self.add(made, {0.5: [short]}, targets, self.SHAPE, "b")
        found = made.calibrate(["1"])
        assert found.margin == {"1": (3, 0, 0)} and found.coverage == {"1": 1.0}
        assert found.left_out == {"1": pytest.approx(0.7)} and not found.is_safe
        assert "the lowest is class 1, 70.00 %, components lost whole: 0." in str(found)
        assert "the segmentor will miss targets" in str(found)
        assert json.loads(json.dumps(found.to_json()))["left_out"] == {"1": pytest.approx(0.7)}

    def test_few_cases_leave_slack(self):
        """The next lower score, and fewer than half as many as are enough a voxel more; a class without any its own."""
        box = ((5, 10), (6, 10), (8, 9))
        made = self.evidence({0.5: [box], 0.3: [box], 0.1: {"1": [box], "3": [box]}})
        assert made.calibrate(["1"], enough=1).margin == {"1": (0, 1, 3)}
        found = made.calibrate(["1"], enough=2)
        assert found.margin == {"1": (0, 1, 3)} and found.score_threshold == {"1": 0.3}
        found = made.calibrate(["1", "3"], enough=3)
        assert found.margin == {"1": (1, 2, 4), "3": (2, 2, 2)} and found.score_threshold == {"1": 0.3, "3": 0.1}
        lowest = self.evidence({0.5: [box]}).calibrate(["1"], enough=3)
        assert lowest.score_threshold == {"1": 0.5} and lowest.ratio == pytest.approx(7 * 8 * 9 / 125)

    def test_slack_goes_by_the_cases_that_hold_the_class(self):
        """Three cases have class 1, one has class 2, of which the others say nothing."""
        of_both = {"1": [np.s_[5:10, 5:10, 5:10]], "2": [np.s_[12:14, 5:10, 5:10]]}
        boxes = {
            score: {"1": [((5, 10), (5, 10), (5, 10))], "2": [((12, 14), (5, 10), (6, 10))]} for score in (0.5, 0.3)
        }
        made = self.evidence(boxes, of_both)
        for case in "bc":
            self.add(made, boxes, {"1": of_both["1"]}, self.SHAPE, case)
        found = made.calibrate(["1", "2"], enough=3)
        assert found.margin == {"1": (0, 0, 0), "2": (1, 1, 2)} and found.score_threshold == {"1": 0.5, "2": 0.3}
        assert found.left_out == {"1": 1.0} and found.is_safe

    def test_a_class_is_judged_by_the_other_cases_that_hold_it(self):
        """Two of six, the first and the last; the last needs three voxels that the first does not tell of."""
        of_both = {"1": [np.s_[5:10, 5:10, 5:10]], "2": [np.s_[12:14, 5:10, 5:10]]}
        first, short = ({"1": [((5, 10), (5, 10), (5, 10))], "2": [((12, 14), (5, 10), (n, 10))]} for n in (5, 8))
        made = self.evidence({0.5: first}, of_both)
        for case in "bcde":
            self.add(made, {0.5: first}, {"1": of_both["1"]}, self.SHAPE, case)
        self.add(made, {0.5: short}, of_both, self.SHAPE, "f")
        found = made.calibrate(["1", "2"])
        assert found.margin == {"1": (0, 0, 0), "2": (0, 0, 3)} and found.coverage == {"1": 1.0, "2": 1.0}
        assert found.left_out == {"1": 1.0, "2": pytest.approx(0.7)} and not found.is_safe

    def test_boxes_of_most_of_the_volume_are_said_to_save_nothing(self):
        made = self.evidence({0.5: [((0, 20), (0, 20), (0, 11))]})
        found = made.calibrate(["1"])
        assert found.is_safe and found.is_useless and "the cascade saves nothing" in str(found)
        less = self.evidence({0.5: [((0, 20), (0, 20), (1, 11))]}).calibrate(["1"])
        assert not less.is_useless and "saves nothing" not in str(less)

    def test_a_component_lost_in_a_case_left_out_is_not_safe(self):
        """Of 99.8 % of the voxels a whole target is missing, which a margin set on its own case holds."""
        large, small = np.s_[0:20, 0:20, 0:12], np.s_[0:10, 5:6, 14:15]
        box, targets = ((0, 20), (0, 20), (0, 12)), {"1": [large]}
        made = self.evidence({0.5: [box]}, targets)
        self.add(made, {0.5: [box]}, {"1": [large, small]}, self.SHAPE, "b")
        found = made.calibrate(["1"])
        assert found.margin == {"1": (0, 0, 3)} and found.lost_components == 0 and found.left_out["1"] > 0.995
        assert found.left_out_lost == 1 and not found.is_safe
        assert json.loads(json.dumps(found.to_json()))["left_out_lost"] == 1

    def test_two_cases_may_be_alike(self):
        """In name and in what they hold."""
        targets = {"1": [np.s_[5:10, 5:10, 5:10]]}
        made = self.evidence({0.5: [((5, 10), (5, 10), (6, 10))]}, targets)
        self.add(made, {0.5: [((5, 10), (5, 10), (6, 10))]}, targets, self.SHAPE, "a")
        found = made.calibrate(["1"])
        assert (found.cases, found.margin, found.left_out) == (2, {"1": (0, 0, 1)}, {"1": 1.0})

    def test_settings_of_others_are_measured_as_they_are(self):
        """On cases that calibration has not seen, nothing is chosen anew."""
        made = self.evidence({0.5: [((6, 10), (5, 10), (5, 10))], 0.1: [((5, 10), (5, 10), (5, 10))]})
        found = made.measure(["1", "2"], {"1": 0.5, "2": 0.5}, {"1": (0, 0, 0), "2": (0, 0, 0)})
        assert found.margin == {"1": (0, 0, 0), "2": (0, 0, 0)} and found.score_threshold == {"1": 0.5, "2": 0.5}
        assert not found.is_safe
        assert found.coverage == {"1": 0.8} and found.ratio == pytest.approx(0.8) and found.unseen == ("2",)
        wider = made.measure(["1"], {"1": 0.5}, {"1": (1, 0, 2)})
        assert wider.is_safe and wider.coverage == {"1": 1.0} and wider.ratio == pytest.approx(6 * 5 * 9 / 125)
        assert made.calibrate(["1"]) == made.measure(["1"], {"1": 0.1}, {"1": (0, 0, 0)})

    def test_what_is_never_found_is_reported(self):
        made = self.evidence({0.5: [((5, 10), (5, 10), (5, 10))], 0.1: []})
        self.add(made, {0.5: [], 0.1: []}, {"1": [np.s_[2:7, 2:7, 2:7]]}, self.SHAPE, "b")
        found = made.calibrate(["1"])
        assert (found.lost_components, found.is_safe, found.score_threshold) == (1, False, {"1": 0.5})
        assert found.worst == ("b", "1", 0.0) and found.margin == {"1": (0, 0, 0)}
        assert "the segmentor will miss targets" in str(found)
        assert json.loads(json.dumps(found.to_json()))["coverage"] == {"1": 0.5}

    def test_no_target_at_all(self):
        made = BoxEvidence()
        nothing = ("1", np.zeros((0, 0, 0), int), (0, 0, 0))
        made.add_case("a", self.SHAPE, self.SHAPE, [nothing], {0.5: {"1": []}, 0.1: {"1": []}}, [])
        found = made.calibrate(["1"])
        assert (found.score_threshold, found.margin, found.ratio) == ({"1": 0.1}, {"1": (2, 2, 2)}, None)
        with pytest.raises(ValueError, match="Got no cases"):
            BoxEvidence().calibrate(["1"])
        with pytest.raises(ValueError, match="min_coverage got 2"):
            made.calibrate(["1"], 2)
