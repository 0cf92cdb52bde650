"""When a dynamic network may leave voxels out: thresholds and margins set on cases whose segmentation is known.

A policy is a classifier and errs. Its thresholds are the lowest, that is the cheapest, ones that keep nearly all voxels
of every class where the network looks, and let no lesion vanish whole.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from math import inf, isinf, log, prod

import numpy as np

#: A threshold that nothing exceeds.
NEVER = inf
#: The policy's own choice between two; no threshold is set below it.
_EVEN = 0.5
#: How far a threshold lies above the probability that sets it, in logits: another batch size, device or precision
#: gives the same slice another last digit.
_MARGIN = 0.1
#: In which cases are left out in turn where a threshold or a margin is judged.
_PARTS = 5
#: Margins of boxes are looked for up to this many voxels, or an eighth of the volume's side.
_LEAST_MARGIN = 4
#: The margin of a class that no case has.
_UNKNOWN_MARGIN = 2
#: A box whose logits (``roi.INSIDE``, ``OUTSIDE``) are interpolated holds what has more than 1/65 of its weight in it.
#: Along one axis that is all up to this far, in voxels, from the middle of the first voxel outside of it; its corners
#: hold what has a quarter of the weight on each of three axes.
_END, _END_OF_CORNER = 1 / 64, 1 / 4


def _of_left_out(what: str, shares: Mapping[str, float], lost: int) -> str:
    if not shares:
        return ""
    label, share = min(shares.items(), key=lambda pair: pair[1])
    return (
        f" In cases that the {what} not set on, the lowest is class {label}, {100 * share:.2f} %, "
        f"components lost whole: {lost}."
    )


@dataclass(frozen=True)
class Calibration:
    """Thresholds and what they do on the cases they were set on.

    Attributes:
        skip_threshold, crop_threshold: a slice is skipped, or cropped, where the policy's probability is higher.
        coverage: of each class, the share of voxels that every tile with them covers: not skipped, inside its crop.
        worst: case and class of the lowest coverage, and that coverage.
        lost_components: connected components of the size that counts of which nothing is covered.
        skipped, cropped: share of all slices.
        slices, cases: how many there were; a slice counts once for every tile of it.
        unseen: classes that the cases have no voxels of.
        left_out: of each class, ``coverage`` in cases that the thresholds were not set on, each part of the cases in
            turn. Empty where fewer than two cases have foreground, and where nothing was set.
        left_out_lost: components lost there, as ``lost_components``.
        slack: logits by which both thresholds are higher than those that the cases ask for, since these are few.
    """

    skip_threshold: float
    crop_threshold: float
    coverage: dict[str, float]
    worst: tuple[str, str, float]
    lost_components: int
    skipped: float
    cropped: float
    slices: int
    cases: int
    unseen: tuple[str, ...] = ()
    left_out: dict[str, float] = field(default_factory=dict)
    left_out_lost: int = 0
    slack: float = 0.0

    @property
    def notes(self) -> list[str]:
        """What the numbers do not say."""
        return [f"class {label}: no voxels in the validation cases" for label in self.unseen]

    @property
    def is_useless(self) -> bool:
        """Whether hardly any slice can be skipped or cropped."""
        return self.skipped + self.cropped < 0.01

    def to_json(self) -> dict:
        """The fields as JSON has them, which knows no infinity: a threshold of :data:`NEVER` is ``None``."""
        thresholds = {"skip_threshold": self.skip_threshold, "crop_threshold": self.crop_threshold}
        finite = {name: None if isinf(value) else value for name, value in thresholds.items()}
        return asdict(self) | finite | {"notes": self.notes}

    def __str__(self) -> str:
        case, label, share = self.worst
        coverage = ", ".join(f"{label} {100 * value:.2f} %" for label, value in self.coverage.items())
        text = (
            f"Calibrated on {self.slices} slices of {self.cases} cases: {100 * self.skipped:.1f} % skipped, "
            f"{100 * self.cropped:.1f} % cropped. Voxels covered: {coverage or 'no foreground'}."
        )
        if case:
            text += f" Lowest: {case}, class {label}, {100 * share:.2f} %."
        text += f" Components lost whole: {self.lost_components}."
        text += _of_left_out("thresholds were", self.left_out, self.left_out_lost)
        if self.slack:
            text += f" So few cases raise the thresholds by {self.slack:.2f} logits."
        if self.unseen:
            text += f" Nothing is skipped, and cropped only what must be: {'; '.join(self.notes)}."
        elif self.is_useless:
            text += (
                " On this data set nothing can be left out safely: the network works as a static one, and another "
                "trainer will serve as well."
            )
        return text


@dataclass(frozen=True, eq=False)
class _Voxels:
    """Voxels of components, those together that the same tiles hold.

    Attributes:
        skip, crop, component, voxels: scores, number of the component and how many there are, ``(N,)``.
        label: of each component, the number of its class.
    """

    skip: np.ndarray
    crop: np.ndarray
    component: np.ndarray
    voxels: np.ndarray
    label: np.ndarray

    def of(self, components: np.ndarray) -> _Voxels:
        """Those of the components where ``components`` is true; the others have no voxels."""
        chosen = components[self.component]
        arrays = (self.skip, self.crop, self.component, self.voxels)
        return _Voxels(*(array[chosen] for array in arrays), self.label)

    @cached_property
    def total(self) -> np.ndarray:
        """Voxels of each component."""
        return np.bincount(self.component, self.voxels, len(self.label))

    def covered(self, skip_threshold: float, crop_threshold: float) -> np.ndarray:
        """Those of each component that are covered."""
        lost = np.where((self.skip > skip_threshold) | (self.crop > crop_threshold), self.voxels, 0)
        return self.total - np.bincount(self.component, lost, len(self.label))

    def lost(self, left: np.ndarray, min_component: int) -> int:
        """Components of ``min_component`` voxels or more of which nothing is ``left``."""
        return int(((left == 0) & (self.total >= max(1, min_component))).sum())

    def shares(self, left: np.ndarray, group: np.ndarray) -> np.ndarray:
        """Share of the voxels ``left`` in each group of components, whose numbers ``group`` has; 1 of no voxels."""
        count = int(group.max(initial=-1)) + 1
        left, total = (np.bincount(group, voxels, count) for voxels in (left, self.total))
        return np.divide(left, total, out=np.ones(count), where=total > 0)


class Evidence:
    """What the policy says of every tile, and what each component's voxels depend on."""

    def __init__(self):
        self._tiles: list[tuple[float, float]] = []
        self._parts: list[tuple[float, float, int, int]] = []  # skip, crop, component, voxels
        self._components: dict[Hashable, tuple[int, str, str]] = {}

    def add_tile(self, skip: float, crop: float) -> None:
        """Add a tile by its highest probabilities among the passes of test-time mirroring."""
        self._tiles.append((skip, crop))

    def add_part(self, case: str, label: str, number: int, voxels: int, skip: float, crop: float) -> None:
        """Add voxels of a component that the same tiles hold.

        A voxel is covered where every tile that contains it covers it: nnU-Net weighs tiles by a Gaussian, and what one
        sees at its border does not make up for another that leaves the voxel out.

        Args:
            number: of the component in this case and class.
            skip: the highest probability of skipping among the tiles that contain the voxels.
            crop: the highest one of cropping among those whose crop in any pass leaves them out, ``-inf`` if none does.
        """
        index, *_ = self._components.setdefault((case, label, number), (len(self._components), case, label))
        self._parts.append((skip, crop, index, voxels))

    def calibrate(
        self,
        cases: int,
        labels: Collection[str],
        min_coverage: float = 0.995,
        min_component: int = 10,
        always_crops: bool = False,
        enough: int = 0,
    ) -> Calibration:
        """The lowest thresholds, not below 1/2, that cover enough; first for skipping, then for cropping.

        Where a class has no voxels nothing is known of it, and the network neither skips nor crops.

        Args:
            labels: every class that the network segments.
            min_coverage: share of the voxels of every class that must be covered.
            min_component: components of this many voxels or more must not be lost whole.
            always_crops: every slice that is not skipped is cropped, whatever the threshold.
            enough: with fewer cases of any class, thresholds are higher by the logarithm of ``enough / cases``, in
                logits: a policy whose probabilities are right then errs as much more rarely as there are fewer cases to
                see it err.

        Raises:
            ValueError: ``min_coverage`` is no share.
        """
        if not 0 <= min_coverage <= 1:
            raise ValueError(f"min_coverage got {min_coverage}; expected a share from 0 to 1.")
        tiles = np.array(self._tiles, float).reshape(-1, 2)
        pairs = [(case, label) for _, case, label in self._components.values()]
        seen, label = _numbered([label for _, label in pairs])
        every = self._voxels(label)
        if always_crops:
            tiles[:, 1] = 1
            every = replace(every, crop=np.where(np.isneginf(every.crop), every.crop, 1))
        unseen = tuple(name for name in labels if name not in seen)
        fewest = min(Counter(name for _, name in set(pairs)).values(), default=0)
        slack = log(enough / fewest) if 0 < fewest < enough and not unseen else 0.0
        lowest_crop = -1.0 if always_crops else NEVER

        def thresholds(known: _Voxels) -> tuple[float, float]:
            """For skipping and for cropping, as ``known`` asks for them."""
            unavoidable = known.lost(known.covered(NEVER, lowest_crop), min_component)

            def is_safe(left: np.ndarray) -> bool:
                enough_left = (known.shares(left, label) >= min_coverage).all()
                return bool(enough_left) and known.lost(left, min_component) <= unavoidable

            skip = _lowest(known.skip, lambda threshold: is_safe(known.covered(threshold, lowest_crop)))
            crop = lowest_crop
            if not always_crops:
                crop = _lowest(known.crop, lambda threshold: is_safe(known.covered(skip, threshold)))
            if slack:  # behind both searches, or crops would use up what it covers
                skip, crop = (float(_raised(np.array(one), slack)) if 0 < one < 1 else one for one in (skip, crop))
            return skip, crop

        skip_threshold, crop_threshold = (NEVER, lowest_crop) if unseen else thresholds(every)
        left = every.covered(skip_threshold, crop_threshold)
        keys, key = _numbered(pairs)
        worst = min(zip(every.shares(left, key).tolist(), keys, strict=True), default=(1.0, ("", "")))
        names, case = _numbered([case for case, _ in pairs])
        parts = min(_PARTS, len(names)) if not unseen else 0
        held = np.zeros(len(pairs))
        for part in range(parts if parts > 1 else 0):
            is_out = case % parts == part
            held += every.of(is_out).covered(*thresholds(every.of(~is_out)))
        is_skipped = tiles[:, 0] > skip_threshold
        is_cropped = ~is_skipped & (tiles[:, 1] > crop_threshold)
        return Calibration(
            skip_threshold,
            crop_threshold,
            dict(zip(seen, every.shares(left, label).tolist(), strict=True)),
            (*worst[1], worst[0]),
            every.lost(left, min_component),
            float(is_skipped.mean()) if len(tiles) else 0.0,
            float(is_cropped.mean()) if len(tiles) else 0.0,
            len(tiles),
            cases,
            unseen,
            dict(zip(seen, every.shares(held, label).tolist(), strict=True)) if parts > 1 else {},
            every.lost(held, min_component) if parts > 1 else 0,
            slack,
        )

    def _voxels(self, label: np.ndarray) -> _Voxels:
        skip, crop = np.array([part[:2] for part in self._parts], float).reshape(-1, 2).T
        component, voxels = np.array([part[2:] for part in self._parts], np.int64).reshape(-1, 2).T
        return _Voxels(skip, crop, component, voxels, label)


def _numbered(values: Sequence[Hashable]) -> tuple[list, np.ndarray]:
    """What there is in ``values``, sorted, and the number in that of each one."""
    found = sorted(set(values))
    numbers = {value: number for number, value in enumerate(found)}
    return found, np.array([numbers[value] for value in values], np.int64)


def _lowest(values: np.ndarray, is_safe) -> float:
    """The lowest threshold that is safe; a higher one always is if a lower one is."""
    candidates = _raised(np.array([_EVEN, *np.unique(values[values > _EVEN])]), _MARGIN).tolist()
    found = bisect_left(candidates, True, key=lambda threshold: is_safe(threshold))
    return candidates[found] if found < len(candidates) else NEVER


def _raised(probability: np.ndarray, logits: float) -> np.ndarray:
    """Thresholds that are higher than probabilities by ``logits`` at least, in the single precision that buffers have.

    Next to 1 its numbers are so far apart that the nearest one might be the probability itself.
    """
    raised = probability / (probability + (1 - probability) * np.exp(-logits))
    rounded = raised.astype(np.float32)
    return np.where(rounded < raised, np.nextafter(rounded, np.float32(2)), rounded).astype(float)


@dataclass(frozen=True)
class BoxCalibration:
    """How a detector's boxes are taken, and what they hold on the cases that this was set on.

    Attributes:
        margin: of each class, the voxels per axis, of the detector's grid, by which its boxes are enlarged.
        score_threshold: of each class, what a detection must reach.
        coverage: of each class, the share of voxels inside any box. Of what resampling adds to a box, this counts the
            first quarter of a voxel, all of which is held; ``volume`` and ``ratio`` nearly half, all that can be.
        worst: case and class of the lowest coverage, and that coverage.
        lost_components: connected components of the size that counts of which nothing is inside a box.
        is_safe: whether every class is covered as asked for and no component is lost, in the cases left out, too.
        volume: share of all voxels, of the grid that is segmented, that are inside a box; what is run are the crops
            around them, which are larger.
        ratio: the boxes' voxels to those of boxes drawn around the targets on that grid; ``None`` where there is no
            target.
        cases: how many there were.
        unseen: classes that the cases have no voxels of.
        left_out: of each class that two cases hold or more, the share of voxels inside its own boxes in cases that the
            margin was not set on, each part of those that hold it in turn. New ones may have less, as scores are chosen
            by it. Empty where nothing was set.
        left_out_lost: components lost there, as ``lost_components``.
    """

    margin: dict[str, tuple[int, ...]]
    score_threshold: dict[str, float]
    coverage: dict[str, float]
    worst: tuple[str, str, float]
    lost_components: int
    is_safe: bool
    volume: float
    ratio: float | None
    cases: int
    unseen: tuple[str, ...] = ()
    left_out: dict[str, float] = field(default_factory=dict)
    left_out_lost: int = 0

    @property
    def is_useless(self) -> bool:
        """Whether the boxes leave hardly anything out. Crops are larger still, by what the segmentor's strides need."""
        return self.volume > 0.5

    def to_json(self) -> dict:
        """The fields as JSON has them."""
        return asdict(self)

    def __str__(self) -> str:
        case, label, share = self.worst
        coverage = ", ".join(f"{label} {100 * value:.2f} %" for label, value in self.coverage.items())
        settings = ", ".join(
            f"{label} {score:g} and {' × '.join(map(str, self.margin[label]))}"
            for label, score in self.score_threshold.items()
        )
        text = f"Calibrated on {self.cases} cases. Score and margin in voxels of each class: {settings}. "
        text += f"Boxes are {100 * self.volume:.1f} % of the volume"
        text += f", {self.ratio:.2f} times those around the targets" if self.ratio is not None else ""
        text += f". Voxels inside: {coverage or 'no foreground'}."
        if case:
            text += f" Lowest: {case}, class {label}, {100 * share:.2f} %."
        text += f" Components lost whole: {self.lost_components}."
        text += _of_left_out("margin was", self.left_out, self.left_out_lost)
        if self.unseen:
            text += f" No voxels in the validation cases, so that nothing is known: {', '.join(self.unseen)}."
        if self.is_useless:
            text += (
                " The segmentor will run nearly everywhere, and the cascade saves nothing on such cases. Train the "
                "detector for longer, or on a fold whose validation cases hold every class."
            )
        if not self.is_safe:
            text += " This is less than asked for: the segmentor will miss targets. Train the detector for longer."
        return text


#: Of each class, the score that its detections must reach, and its boxes' margin.
_Settings = Mapping[str, tuple[float, tuple[int, ...]]]


#: Of each class, its components' voxels inside a box, and all of them: ``(2, components)``.
_Held = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class _Targets:
    """The components of one class in one case."""

    component: np.ndarray  # (N,), from 0
    cells: np.ndarray  # (N, axes), places as in _places
    voxels: np.ndarray  # (N,), of the component in the cell

    def held(self, inside: np.ndarray) -> np.ndarray:
        """Voxels of each component where ``inside: (N,)``, and all: ``(2, components)``."""
        return _sums(self.component, self.voxels, inside)


@dataclass(eq=False)  # two cases of one name are two, and arrays do not compare
class _BoxCase:
    name: str
    shape: tuple[int, ...]
    places: list[np.ndarray]  # of each axis, (fine,)
    targets: dict[str, _Targets]  # by class, of those that are there
    boxes: dict[float, dict[str, np.ndarray]]  # by threshold and class: (boxes, axes, 2)
    tight: np.ndarray  # on the fine grid

    @property
    def fine(self) -> tuple[int, ...]:
        return tuple(map(len, self.places))

    def enlarged(self, settings: _Settings) -> np.ndarray:
        """The boxes of the classes in ``settings``: ``(boxes, axes, 2)``."""
        outwards = np.array([-1, 1])
        return np.concatenate(
            [
                self.boxes[threshold][label] + np.asarray(margin)[:, None] * outwards
                for label, (threshold, margin) in settings.items()
            ]
        )

    def inside(self, settings: _Settings, cells: np.ndarray) -> np.ndarray:
        """Whether each of ``cells: (N, axes)`` is in any box: ``(N,)``."""
        covered = np.zeros(len(cells), bool)
        for start, stop in _on_places(self.enlarged(settings)).transpose(0, 2, 1):
            rest = np.flatnonzero(~covered)
            covered[rest] = ((cells[rest] >= start) & (cells[rest] < stop)).all(1)
        return covered

    def resampled(self, boxes: np.ndarray) -> np.ndarray:
        """``boxes`` of the detector's grid, ``(boxes, axes, 2)``, as they are on the fine one."""
        pairs = zip(self.places, _on_places(boxes).transpose(1, 0, 2), strict=True)
        return np.stack([np.searchsorted(places, ends) for places, ends in pairs], 1)


class _Reach:
    """Which margins of a class's boxes, taken from one score on, hold which voxels of its targets.

    Attributes:
        largest: the largest margin per axis.
        part: of each component, the number of its case among those that hold the class, modulo the number of parts.
    """

    def __init__(self, cases: Sequence[_BoxCase], label: str, threshold: float):
        axes = len(cases[0].shape)
        self.largest = [max(_LEAST_MARGIN, max(case.shape[axis] for case in cases) // 8) for axis in range(axes)]
        part, component, voxels, cell, beyond = [], [], [], [], []
        components = cells = 0
        holding = [case for case in cases if label in case.targets]
        for number, case in enumerate(holding):
            targets = case.targets[label]
            is_inside = np.zeros(len(targets.cells), bool)
            for box in case.boxes[threshold][label]:  # one by one, since there may be hundreds
                rest = np.flatnonzero(~is_inside)
                at = targets.cells[rest]
                outside = np.maximum(box[:, 0] - at // 2, (at + 1) // 2 - box[:, 1]).clip(min=0)
                is_near = (outside <= self.largest).all(1)
                cell.append(rest[is_near] + cells)
                beyond.append(outside[is_near].T.astype(np.int16))
                is_inside[rest[~outside.any(1)]] = True
            component.append(targets.component + components)
            voxels.append(targets.voxels)
            part.append(np.full(targets.component.max() + 1, number % _PARTS))
            components, cells = components + len(part[-1]), cells + len(targets.cells)
        self.part, self._component, self._voxels, self._cell = (
            np.concatenate([np.zeros(0, int), *each]) for each in (part, component, voxels, cell)
        )
        self._beyond = np.concatenate([np.zeros((axes, 0), np.int16), *beyond], 1)
        self._found: dict[tuple[int, ...], np.ndarray] = {}

    def held(self, margin: tuple[int, ...]) -> np.ndarray:
        """As :data:`_Held` has it of a class."""
        if margin not in self._found:
            inside = np.zeros(len(self._component), bool)
            reached = (beyond <= more for beyond, more in zip(self._beyond, margin, strict=True))
            inside[self._cell[np.logical_and.reduce(list(reached))]] = True
            self._found[margin] = _sums(self._component, self._voxels, inside)
        return self._found[margin]


class BoxEvidence:
    """What a detector finds in cases whose targets are known: boxes of its grid, as they lie on the segmentor's."""

    def __init__(self):
        self._cases: list[_BoxCase] = []

    def add_case(
        self,
        case: str,
        shape: Sequence[int],
        fine: Sequence[int],
        targets: Iterable[tuple[str, np.ndarray, Sequence[int]]],
        boxes: Mapping[float, Mapping[str, Sequence[Sequence[tuple[int, int]]]]],
        tight: Sequence[Sequence[tuple[int, int]]],
        nearest: Collection[int] = (),
    ) -> None:
        """Add a case.

        Args:
            shape: of the case on the detector's grid.
            fine: its shape on the grid that is segmented.
            targets: a class, its components there numbered from 1, and the first voxel of that array.
            boxes: without a margin, by the score threshold that they reach, then by class.
            tight: boxes around the targets on the fine grid.
            nearest: axes along which boxes are resampled to the nearest voxel. Along others the interpolation makes
                them nearly half a voxel of the detector's grid longer at either end.
        """
        axes = [(full, size, axis in nearest) for axis, (full, size) in enumerate(zip(fine, shape, strict=True))]
        held = [_places(*axis, _END_OF_CORNER) for axis in axes]  # never more than is held
        of_class = {}
        for label, components, corner in targets:
            count = int(components.max(initial=0))
            if not count:
                continue
            at = np.nonzero(components)
            coarse = [of_axis[index + first] for index, first, of_axis in zip(at, corner, held, strict=True)]
            where = (count + 1, *(2 * size + 1 for size in shape))
            keys, voxels = np.unique(np.ravel_multi_index([components[at], *coarse], where), return_counts=True)
            number, *index = np.unravel_index(keys, where)
            cells = np.stack(index, 1).astype(np.int16)
            of_class[label] = _Targets((number - 1).astype(np.int32), cells, voxels.astype(np.int32))
        self._cases.append(
            _BoxCase(
                case,
                tuple(shape),
                [_places(*axis, _END) for axis in axes],
                of_class,
                {
                    threshold: {label: _as_array(found, len(shape)) for label, found in of_score.items()}
                    for threshold, of_score in boxes.items()
                },
                _as_array(tight, len(shape)),
            )
        )

    def calibrate(
        self, labels: Collection[str], min_coverage: float = 0.995, min_component: int = 10, enough: int = 0
    ) -> BoxCalibration:
        """Of each class the threshold and the smallest margin whose boxes are safe; of all, those of the fewest voxels.

        A class is judged by its own boxes, so that one that is hard to find does not enlarge those of others; what is
        measured afterwards are the boxes of all. A margin fits the cases that it is set on, the more so the fewer these
        are. So a threshold is judged by the cases that its margin is not set on, each of at most five parts in turn,
        and only then by the voxels. Where none is safe, the one that loses the fewest components, then the fewest
        voxels. Of a class without voxels nothing is known, and it takes the lowest threshold with a margin of two.

        Args:
            labels: every class that is to be found.
            min_coverage: share of the voxels of every class that must be inside a box.
            min_component: components of this many voxels or more must not be outside whole.
            enough: a class that fewer cases hold takes the next lower score than these cases ask for, if there is one,
                and one that fewer than half as many hold also a voxel more on every side.

        Raises:
            ValueError: ``min_coverage`` is no share, or there are no cases.
        """
        if not 0 <= min_coverage <= 1:
            raise ValueError(f"min_coverage got {min_coverage}; expected a share from 0 to 1.")
        if not self._cases:
            raise ValueError("Got no cases to calibrate on; expected one or more. Add some to the validation fold.")

        def badness(held: np.ndarray) -> tuple[int, float]:
            return self._badness({"": held}, min_coverage, min_component)

        def calibrated(label: str) -> tuple[_Settings, _Held]:
            """Score and margin of a class, and what those that are set without a part of the cases hold there."""
            thresholds, least = sorted(self._cases[0].boxes, reverse=True), 0
            holding = [case for case in self._cases if label in case.targets]
            if not holding:  # everything that may be one is kept
                thresholds, least = thresholds[-1:], _UNKNOWN_MARGIN
            parts = range(min(_PARTS, len(holding)) if len(holding) > 1 else 0)
            candidates = []
            for threshold in thresholds:
                reach = _Reach(self._cases, label, threshold)
                margin = partial(self._margin, reach, least, badness)
                found = {label: (threshold, margin(reach.part >= 0))}
                of_parts = [{label: (threshold, margin(reach.part != part))} for part in parts]
                of_all = reach.held(found[label][1])
                judged = [reach.held(one[label][1])[:, reach.part == part] for part, one in enumerate(of_parts)]
                judged = np.concatenate(judged, 1) if judged else of_all
                if 0 < len(holding) < enough:  # slack is not to be used up here
                    more = int(2 * len(holding) < enough)
                    found, *of_parts = (self._with_slack(one, more) for one in (found, *of_parts))
                order = (*badness(of_all), *badness(judged), self._voxels(found), -threshold)
                candidates.append((order, found, of_parts))
            _, found, of_parts = min(candidates, key=lambda candidate: candidate[0])
            return found, _joined(self._held(one, holding[part::_PARTS]) for part, one in enumerate(of_parts))

        settings, held = {}, {}
        for label in labels:
            found, left_out = calibrated(label)
            settings, held = settings | found, held | left_out
        scores, margins = ({label: one[place] for label, one in settings.items()} for place in (0, 1))
        found = self.measure(labels, scores, margins, min_coverage, min_component)
        return replace(
            found,
            is_safe=found.is_safe and self._badness(held, min_coverage, min_component) == (0, -min_coverage),
            left_out=self._coverage(held),
            left_out_lost=self._lost(held, min_component),
        )

    @staticmethod
    def _margin(
        reach: _Reach, least: int, badness: Callable[[np.ndarray], tuple[int, float]], counts: np.ndarray
    ) -> tuple[int, ...]:
        """The smallest margin per axis, of ``least`` voxels or more, that is no worse for the components that count,
        ``counts: (components,)``, than the largest."""
        margins = [tuple(min(step, most) for most in reach.largest) for step in range(least, max(reach.largest) + 1)]

        def badness_of(margin: tuple[int, ...]) -> tuple[int, float]:
            return badness(reach.held(margin)[:, counts])

        best = badness_of(margins[-1])

        def smallest(trials: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
            # A larger margin never covers less.
            return trials[bisect_left(trials, True, key=lambda margin: badness_of(margin) <= best)]

        margin = smallest(margins)
        for axis in range(len(margin)):
            margin = smallest([(*margin[:axis], less, *margin[axis + 1 :]) for less in range(least, margin[axis] + 1)])
        return margin

    def _with_slack(self, settings: _Settings, more: int) -> _Settings:
        """With the next lower score and ``more`` voxels on every side."""

        def lower(score: float) -> float:
            return max((other for other in self._cases[0].boxes if other < score), default=score)

        return {
            label: (lower(score), tuple(side + more for side in margin)) for label, (score, margin) in settings.items()
        }

    def measure(
        self,
        labels: Collection[str],
        score_threshold: Mapping[str, float],
        margin: Mapping[str, Sequence[int]],
        min_coverage: float = 0.995,
        min_component: int = 10,
    ) -> BoxCalibration:
        """What the boxes of a score and a margin hold, wherever these come from; arguments as :meth:`calibrate` has.

        Args:
            score_threshold: of each class, one of those that the cases were added with.
            margin: of each class.
        """
        settings = {label: (score_threshold[label], tuple(margin[label])) for label in labels}
        of_cases = [self._held(settings, [case]) for case in self._cases]
        held = _joined(of_cases)
        shares = [
            (share, case.name, label)
            for case, of_case in zip(self._cases, of_cases, strict=True)
            for label, share in self._coverage(of_case).items()
        ]
        worst = min(shares, default=(1.0, "", ""))
        voxels = sum(_union(case.resampled(case.enlarged(settings)), case.fine) for case in self._cases)
        tight = sum(_union(case.tight, case.fine) for case in self._cases)
        return BoxCalibration(
            {label: margin for label, (_, margin) in settings.items()},
            {label: score for label, (score, _) in settings.items()},
            self._coverage(held),
            (*worst[1:], worst[0]),
            self._lost(held, min_component),
            self._badness(held, min_coverage, min_component) == (0, -min_coverage),
            voxels / sum(prod(case.fine) for case in self._cases),
            voxels / tight if tight else None,
            len(self._cases),
            self._unseen(labels),
        )

    def _held(self, settings: _Settings, cases: Sequence[_BoxCase]) -> _Held:
        """What of ``cases`` is inside any box of the classes in ``settings``, of those that are there."""
        return _joined(
            [
                {
                    label: targets.held(case.inside(settings, targets.cells))
                    for label, targets in case.targets.items()
                    if label in settings
                }
                for case in cases
            ]
        )

    def _voxels(self, settings: _Settings) -> int:
        """Voxels of the detector's grid inside any box."""
        return sum(_union(case.enlarged(settings), case.shape) for case in self._cases)

    def _unseen(self, labels: Collection[str]) -> tuple[str, ...]:
        return tuple(label for label in labels if not any(label in case.targets for case in self._cases))

    @staticmethod
    def _coverage(held: _Held) -> dict[str, float]:
        """Share of the voxels of each class that has any."""
        return {
            label: float(inside.sum() / total.sum()) for label, (inside, total) in sorted(held.items()) if len(total)
        }

    @staticmethod
    def _lost(held: _Held, min_component: int) -> int:
        return sum(int(((inside == 0) & (total >= min_component)).sum()) for inside, total in held.values())

    def _badness(self, held: _Held, min_coverage: float, min_component: int) -> tuple[int, float]:
        """What is to be lowest: components lost, then what the worst class lacks."""
        return self._lost(held, min_component), -min([min_coverage, *self._coverage(held).values()])


def _sums(component: np.ndarray, voxels: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Of each component the voxels where ``inside``, and all, as :data:`_Held` has them."""
    return np.stack([np.bincount(component, voxels * counts) for counts in (inside, True)])


def _joined(parts: Iterable[_Held]) -> _Held:
    """The components of all ``parts``."""
    of_class: dict[str, list[np.ndarray]] = {}
    for part in parts:
        for label, held in part.items():
            of_class.setdefault(label, []).append(held)
    return {label: np.concatenate(held, 1) for label, held in of_class.items()}


def _places(fine: int, shape: int, is_nearest: bool, end: float) -> np.ndarray:
    """Where each of ``fine`` voxels of an axis lies among the middles of its ``shape`` coarse ones, ``(fine,)``.

    2 k + 1 is up to ``end`` from the middle of voxel k, or in it where the nearest voxel is taken; 2 k lies between the
    middles of k - 1 and k.
    """
    at = (np.arange(fine) + 0.5) * shape / fine
    if is_nearest:
        return 2 * at.astype(int) + 1
    at -= 0.5
    middle = np.rint(at)
    is_middle = np.abs(at - middle) < end - 1e-6
    return np.where(is_middle, 2 * middle + 1, 2 * np.floor(at) + 2).astype(int)


def _on_places(boxes: np.ndarray) -> np.ndarray:
    """``boxes: (boxes, axes, 2)`` of coarse voxels, as places that they hold once they are resampled."""
    return 2 * boxes + np.array([0, 1])


def _union(boxes: np.ndarray, shape: Sequence[int]) -> int:
    """Voxels of a grid of ``shape`` inside any of ``boxes: (boxes, axes, 2)``."""
    inside = np.zeros(shape, bool)
    for box in boxes:
        inside[tuple(slice(max(0, start), stop) for start, stop in box)] = True
    return int(inside.sum())


def _as_array(boxes: Sequence, axes: int) -> np.ndarray:
    return np.array(boxes, int).reshape(-1, axes, 2)
