"""When a dynamic network may leave voxels out: thresholds set on cases whose segmentation is known.

A policy is a classifier and errs. Its thresholds are the lowest, that is the cheapest, ones that keep nearly all voxels
of every class where the network looks, and let no lesion vanish whole.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Hashable
from dataclasses import asdict, dataclass
from math import inf, isinf

import numpy as np

#: A threshold that nothing exceeds.
NEVER = inf
#: The policy's own choice between two; no threshold is set below it.
_EVEN = 0.5
#: How far a threshold lies above the probability that sets it, in logits: another batch size, device or precision
#: gives the same slice another last digit.
_MARGIN = 0.1


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
        if self.unseen:
            text += f" Nothing is skipped, and cropped only what must be: {'; '.join(self.notes)}."
        elif self.is_useless:
            text += (
                " On this data set nothing can be left out safely: the network works as a static one, and another "
                "trainer will serve as well."
            )
        return text


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
    ) -> Calibration:
        """The lowest thresholds, not below 1/2, that cover enough; first for skipping, then for cropping.

        Where a class has no voxels nothing is known of it, and the network neither skips nor crops.

        Args:
            labels: every class that the network segments.
            min_coverage: share of the voxels of every class that must be covered.
            min_component: components of this many voxels or more must not be lost whole.
            always_crops: every slice that is not skipped is cropped, whatever the threshold.

        Raises:
            ValueError: ``min_coverage`` is no share.
        """
        if not 0 <= min_coverage <= 1:
            raise ValueError(f"min_coverage got {min_coverage}; expected a share from 0 to 1.")
        tiles = np.array(self._tiles, float).reshape(-1, 2)
        skip, crop = np.array([part[:2] for part in self._parts], float).reshape(-1, 2).T
        component, voxels = np.array([part[2:] for part in self._parts], np.int64).reshape(-1, 2).T
        if always_crops:
            tiles[:, 1], crop = 1, np.where(np.isneginf(crop), crop, 1)
        count = len(self._components)
        keys = [(case, label) for _, case, label in self._components.values()]
        seen = sorted({label for _, label in keys})
        unseen = tuple(label for label in labels if label not in seen)
        total = np.bincount(component, voxels, count)

        def covered(skip_threshold: float, crop_threshold: float) -> np.ndarray:
            lost = np.where((skip > skip_threshold) | (crop > crop_threshold), voxels, 0)
            return total - np.bincount(component, lost, count)

        def share(left: np.ndarray, of: list[bool]) -> float:
            return float(left[of].sum() / total[of].sum())

        def coverage(left: np.ndarray) -> dict[str, float]:
            return {label: share(left, [own == label for _, own in keys]) for label in seen}

        def lost(left: np.ndarray) -> int:
            return int(((left == 0) & (total >= min_component)).sum())

        lowest_crop = -1.0 if always_crops else NEVER
        unavoidable = lost(covered(NEVER, lowest_crop))

        def is_safe(left: np.ndarray) -> bool:
            return lost(left) <= unavoidable and all(value >= min_coverage for value in coverage(left).values())

        skip_threshold, crop_threshold = NEVER, lowest_crop
        if not unseen:
            skip_threshold = _lowest(skip, lambda threshold: is_safe(covered(threshold, lowest_crop)))
        if not unseen and not always_crops:
            crop_threshold = _lowest(crop, lambda threshold: is_safe(covered(skip_threshold, threshold)))
        left = covered(skip_threshold, crop_threshold)
        worst = min(((share(left, [own == key for own in keys]), *key) for key in set(keys)), default=(1.0, "", ""))
        is_skipped = tiles[:, 0] > skip_threshold
        is_cropped = ~is_skipped & (tiles[:, 1] > crop_threshold)
        return Calibration(
            skip_threshold,
            crop_threshold,
            coverage(left),
            (*worst[1:], worst[0]),
            lost(left),
            float(is_skipped.mean()) if len(tiles) else 0.0,
            float(is_cropped.mean()) if len(tiles) else 0.0,
            len(tiles),
            cases,
            unseen,
        )


def _lowest(values: np.ndarray, is_safe) -> float:
    """The lowest threshold that is safe; a higher one always is if a lower one is."""
    at = np.array([_EVEN, *np.unique(values[values > _EVEN])])
    candidates = (at / (at + (1 - at) * np.exp(-_MARGIN))).tolist()
    found = bisect_left(candidates, True, key=lambda threshold: is_safe(threshold))
    return candidates[found] if found < len(candidates) else NEVER
