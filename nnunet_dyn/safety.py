"""When a dynamic network may leave voxels out: thresholds set on cases whose segmentation is known.

A policy is a classifier and errs. Its thresholds are the lowest, that is the cheapest, ones that keep nearly all voxels
of every class where the network looks, and let no lesion vanish whole.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from math import inf, isinf

import numpy as np

#: A threshold that nothing exceeds.
NEVER = inf
#: The policy's own choice between two; no threshold is set below it.
_EVEN = 0.5
#: How far a threshold lies above the probability that sets it, in logits: another batch size, device or precision
#: gives the same slice another last digit.
_MARGIN = 0.01


@dataclass(frozen=True)
class Calibration:
    """Thresholds and what they do on the cases they were set on.

    Attributes:
        skip_threshold, crop_threshold: a slice is skipped, or cropped, where the policy's probability is higher.
        coverage: of each class, the share of voxels that lie in slices that are not skipped and inside their crops.
        worst: case and class of the lowest coverage, and that coverage.
        lost_components: connected components of the size that counts of which nothing is covered.
        skipped, cropped: share of all slices.
        slices, cases: how many there were.
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

    @property
    def is_useless(self) -> bool:
        """Whether hardly any slice can be skipped or cropped."""
        return self.skipped + self.cropped < 0.01

    def to_json(self) -> dict:
        """The fields as JSON has them, which knows no infinity: a threshold of :data:`NEVER` is ``None``."""
        thresholds = {"skip_threshold": self.skip_threshold, "crop_threshold": self.crop_threshold}
        return asdict(self) | {name: None if isinf(value) else value for name, value in thresholds.items()}

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
        if self.is_useless:
            text += (
                " On this data set nothing can be left out safely: the network works as a static one, and another "
                "trainer will serve as well."
            )
        return text


class Evidence:
    """What the policy says of every slice, and how much of every component each slice holds."""

    def __init__(self):
        self._slices: list[tuple[float, float]] = []
        self._parts: list[tuple[int, int, int, int]] = []  # slice, component, voxels, those outside of the crop
        self._components: dict[Hashable, tuple[int, str, str]] = {}

    def add(self, skip: float, crop: float, case: str, parts: Sequence[tuple[str, int, int, int]] = ()) -> None:
        """Add a slice.

        Args:
            skip, crop: the highest probability among the passes of test-time mirroring.
            parts: class, number of the component in this case and class, its voxels in the slice, and those of them
                outside of the crop of any pass.
        """
        for label, number, voxels, outside in parts:
            index, *_ = self._components.setdefault((case, label, number), (len(self._components), case, label))
            self._parts.append((len(self._slices), index, voxels, outside))
        self._slices.append((skip, crop))

    def calibrate(
        self, cases: int, min_coverage: float = 0.995, min_component: int = 10, always_crops: bool = False
    ) -> Calibration:
        """The lowest thresholds, not below 1/2, that cover enough; first for skipping, then for cropping.

        Args:
            min_coverage: share of the voxels of every class that must be covered.
            min_component: components of this many voxels or more must not be lost whole.
            always_crops: every slice that is not skipped is cropped, whatever the threshold.

        Raises:
            ValueError: ``min_coverage`` is no share.
        """
        if not 0 <= min_coverage <= 1:
            raise ValueError(f"min_coverage got {min_coverage}; expected a share from 0 to 1.")
        slices = np.array(self._slices, float).reshape(-1, 2)
        owner, component, voxels, outside = np.array(self._parts, np.int64).reshape(-1, 4).T
        skip, crop = slices[owner].T
        if always_crops:
            slices[:, 1], crop = 1, np.ones(len(owner))
        count = len(self._components)
        keys = [(case, label) for _, case, label in self._components.values()]
        labels = sorted({label for _, label in keys})
        total = np.bincount(component, voxels, count)

        def covered(skip_threshold: float, crop_threshold: float) -> np.ndarray:
            lost = np.where(skip > skip_threshold, voxels, np.where(crop > crop_threshold, outside, 0))
            return total - np.bincount(component, lost, count)

        def share(left: np.ndarray, of: list[bool]) -> float:
            return float(left[of].sum() / total[of].sum())

        def coverage(left: np.ndarray) -> dict[str, float]:
            return {label: share(left, [own == label for _, own in keys]) for label in labels}

        def lost(left: np.ndarray) -> int:
            return int(((left == 0) & (total >= min_component)).sum())

        lowest_crop = -1.0 if always_crops else NEVER
        unavoidable = lost(covered(NEVER, lowest_crop))

        def is_safe(left: np.ndarray) -> bool:
            return lost(left) <= unavoidable and all(value >= min_coverage for value in coverage(left).values())

        skip_threshold = _lowest(skip, lambda threshold: is_safe(covered(threshold, lowest_crop)))
        crop_threshold = lowest_crop
        if not always_crops:
            crop_threshold = _lowest(crop, lambda threshold: is_safe(covered(skip_threshold, threshold)))
        left = covered(skip_threshold, crop_threshold)
        worst = min(((share(left, [own == key for own in keys]), *key) for key in set(keys)), default=(1.0, "", ""))
        is_skipped = slices[:, 0] > skip_threshold
        is_cropped = ~is_skipped & (slices[:, 1] > crop_threshold)
        return Calibration(
            skip_threshold,
            crop_threshold,
            coverage(left),
            (*worst[1:], worst[0]),
            lost(left),
            float(is_skipped.mean()) if len(slices) else 0.0,
            float(is_cropped.mean()) if len(slices) else 0.0,
            len(slices),
            cases,
        )


def _lowest(values: np.ndarray, is_safe) -> float:
    """The lowest threshold that is safe; a higher one always is if a lower one is."""
    at = np.array([_EVEN, *np.unique(values[values > _EVEN])])
    candidates = (at / (at + (1 - at) * np.exp(-_MARGIN))).tolist()
    found = bisect_left(candidates, True, key=lambda threshold: is_safe(threshold))
    return candidates[found] if found < len(candidates) else NEVER
