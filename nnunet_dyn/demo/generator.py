"""Synthetic CT-like volumes in nnU-Net's raw format: small enough for a CPU, hard enough to need a network.

The anatomy is defined in millimetres and sampled on whatever grid a case has, so the number of voxels can be
chosen freely. Arrays are (z, y, x), axes pointing to the patient's left, back and head as in DICOM.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from nnunet_dyn.errors import UsageError

LABELS: dict[str, int] = {"background": 0, "large_organ": 1, "small_organ": 2, "tumour": 3}
LARGE_ORGAN, SMALL_ORGAN, TUMOUR = LABELS["large_organ"], LABELS["small_organ"], LABELS["tumour"]

# Field of view in mm (z, y, x) before each case scales it. The organs fill the middle two thirds along z.
FIELD_OF_VIEW = (240.0, 300.0, 330.0)
MINIMUM_SIZE = 12
# Every fourth case has no tumour: real cohorts have such cases, and false positives only show up there.
TUMOUR_FREE_EVERY = 4

AIR, FAT, MUSCLE, BONE, BOWEL = -1000.0, -95.0, 45.0, 420.0, 15.0


@dataclass(frozen=True)
class Case:
    """One synthetic patient.

    Attributes:
        image: int16, (C, z, y, x), Hounsfield-like units in channel 0.
        labels: uint8, (z, y, x), values of `LABELS`.
        spacing: mm along (z, y, x).
    """

    image: np.ndarray
    labels: np.ndarray
    spacing: tuple[float, float, float]


class Anatomy:
    """Soft shapes on one grid; each is an occupancy in [0, 1], so borders have partial volume."""

    def __init__(self, rng: np.random.Generator, size: Sequence[int], spacing: Sequence[float]):
        self.rng = rng
        self.spacing = np.asarray(spacing)
        # Millimetres from the middle of the volume, as open grids that broadcast to (z, y, x).
        self.grid = np.meshgrid(
            *[(np.arange(n) - (n - 1) / 2) * s for n, s in zip(size, spacing, strict=True)], indexing="ij", sparse=True
        )

    def waves(self, wavelength: float, count: int = 6) -> np.ndarray:
        """Smooth random field (z, y, x) with unit variance and no feature smaller than about `wavelength` mm."""
        field = 0.0
        for _ in range(count):
            direction = self.rng.normal(size=3)
            k = 2 * np.pi / (wavelength * self.rng.uniform(1, 2)) * direction / np.linalg.norm(direction)
            field = field + np.cos(
                sum(g * ki for g, ki in zip(self.grid, k, strict=True)) + self.rng.uniform(0, 2 * np.pi)
            )
        return field * np.sqrt(2 / count)

    def ellipsoid(
        self, centre: Sequence[float], radii: Sequence[float], deform: float = 0.0, wavelength: float = 60.0
    ) -> np.ndarray:
        """Occupancy (z, y, x) of an ellipsoid with `centre` and `radii` in mm (z, y, x).

        `deform` is the standard deviation of the surface's displacement as a fraction of the radii.
        """
        unit = [(g - c) / r for g, c, r in zip(self.grid, centre, radii, strict=True)]
        distance = np.sqrt(sum(u**2 for u in unit))
        slope = np.sqrt(sum((u / r) ** 2 for u, r in zip(unit, radii, strict=True))) / np.maximum(distance, 1e-3)
        surface = 1.0 + (deform * self.waves(wavelength) if deform else 0.0)
        signed_mm = (distance - surface) / np.maximum(slope, 1e-6)
        # One voxel wide ramp: the share of the voxel that lies inside.
        return np.clip(0.5 - signed_mm / self.spacing.mean(), 0.0, 1.0)


def _jitter(rng: np.random.Generator, values: Sequence[float], amount: float) -> np.ndarray:
    return np.asarray(values) + rng.uniform(-amount, amount, size=len(values))


def check_size(size: Sequence[int]) -> None:
    """Raise UsageError unless `size` is three numbers of voxels (z, y, x) that hold the anatomy."""
    if len(size) != 3 or any(int(n) != n or n < MINIMUM_SIZE for n in size):
        raise UsageError(f"Wrong size {tuple(size)}. Expected whole numbers (z, y, x), each at least {MINIMUM_SIZE}.")


def generate_case(
    seed: int, index: int, size: Sequence[int] = (48, 72, 72), channels: int = 1, tumour: bool = True
) -> Case:
    """One synthetic patient, the same for the same arguments and independent of every other index.

    Args:
        seed: of the data set.
        index: of the case within the data set; anatomy, spacing and size vary with it.
        size: nominal voxels along (z, y, x), at least 12 each; a case has up to 10 % more or fewer.
        channels: number of image channels. Channel 0 looks like CT, others like further contrasts of it.
        tumour: whether there is one inside the large organ.

    Raises:
        UsageError: a size or a number of channels that cannot be generated.
    """
    check_size(size)
    if channels < 1:
        raise UsageError(f"Wrong number of channels {channels}. Expected 1 or more.")

    rng = np.random.default_rng([seed, index])
    size = [max(MINIMUM_SIZE, round(n * f)) for n, f in zip(size, rng.uniform(0.9, 1.1, 3), strict=True)]
    fov = np.asarray(FIELD_OF_VIEW) * rng.uniform(0.94, 1.06, 3)
    spacing = np.round(fov / size, 3)
    anatomy = Anatomy(rng, size, spacing)
    scale = rng.uniform(0.92, 1.08)

    body = anatomy.ellipsoid((0, 0, 0), (2000, 118 * scale, 145 * scale), deform=0.015, wavelength=120)
    inner = anatomy.ellipsoid((0, 0, 0), (2000, 104 * scale, 131 * scale), deform=0.015, wavelength=120)
    spine = anatomy.ellipsoid((0, 78 * scale, 0), (2000, 19, 20))
    bowel = anatomy.ellipsoid(_jitter(rng, (-25, -48, 45), 12) * scale, (55, 26, 40), deform=0.1)
    gas = anatomy.ellipsoid(_jitter(rng, (-25, -62, 45), 12) * scale, (22, 10, 20), deform=0.1)

    # The patient's right is at low x, left in a radiological display.
    large_centre = _jitter(rng, (5, -12, -58), 8) * scale
    large_radii = np.asarray((66, 62, 54)) * scale * rng.uniform(0.92, 1.08, 3)
    large = anatomy.ellipsoid(large_centre, large_radii, deform=0.05, wavelength=70)
    small = np.zeros_like(large)
    for side in (-1, 1):
        centre = _jitter(rng, (-32, 66, side * 62), 7) * scale
        radii = np.asarray((38, 19, 21)) * scale * rng.uniform(0.9, 1.1, 3)
        small = np.maximum(small, anatomy.ellipsoid(centre, radii, deform=0.05, wavelength=50))
    # Drawn in any case, so that a case with a tumour differs from the one without in nothing else.
    tumour_centre = large_centre + large_radii * rng.uniform(-0.3, 0.3, 3)
    tumour_radii = rng.uniform(21, 31, 3) * scale
    lesion = anatomy.ellipsoid(tumour_centre, tumour_radii, deform=0.07, wavelength=35)
    lesion = np.minimum(lesion, large) if tumour else np.zeros_like(large)

    labels = np.zeros(size, dtype=np.uint8)
    labels[(large > 0.5) & (small <= 0.5)] = LARGE_ORGAN
    labels[small > 0.5] = SMALL_ORGAN
    labels[(lesion > 0.5) & (labels == LARGE_ORGAN)] = TUMOUR

    # Every label has its own brightness, or a short training would not get as far as the tumour.
    contrast = rng.uniform(0.85, 1.15)
    layers = (
        (body, FAT),
        (inner, MUSCLE),
        (spine, BONE),
        (bowel, BOWEL),
        (gas, AIR * 0.9),
        (large, 125 * contrast),
        (lesion, 270 * contrast),
        (small, 185 * contrast),
    )
    image = np.stack([_render(anatomy, layers, channel) for channel in range(channels)])
    return Case(np.clip(np.rint(image), -1024, 3071).astype(np.int16), labels, tuple(float(s) for s in spacing))


def _render(anatomy: Anatomy, layers: Sequence[tuple[np.ndarray, float]], channel: int) -> np.ndarray:
    """Image (z, y, x): tissues painted in order, texture, the scanner's blur, then correlated noise."""
    rng = anatomy.rng
    image = np.full(np.broadcast_shapes(*[occupancy.shape for occupancy, _ in layers]), AIR)
    for occupancy, hounsfield in layers:
        if channel:
            # Another contrast of the same anatomy: every tissue that is not air moves by its own amount.
            hounsfield = hounsfield if hounsfield < -500 else 150.0 - 0.6 * hounsfield + rng.uniform(-30, 30)
        image = image * (1 - occupancy) + hounsfield * occupancy
    tissue = layers[0][0]
    image = image + tissue * (8 * anatomy.waves(45) + 6 * anatomy.waves(15))
    image = gaussian_filter(image, 0.6)
    noise = gaussian_filter(rng.normal(size=image.shape), 0.6)
    return image + noise * (rng.uniform(16, 24) / noise.std())


def generate_dataset(
    folder: str | Path,
    n_train: int = 10,
    n_test: int = 3,
    seed: int = 0,
    size: Sequence[int] = (48, 72, 72),
    channels: int = 1,
    dataset_id: int = 999,
    name: str = "SyntheticCT",
) -> Path:
    """Write a synthetic data set in nnU-Net's raw format and return its folder, `folder/DatasetXXX_Name`.

    Training cases go to `imagesTr` and `labelsTr`, held-out ones to `imagesTs` and `labelsTs`, all as `.nii.gz`.
    Every fourth case has no tumour. The same arguments give the same bytes. `dataset.json` is written last, so a
    folder that has one is complete.

    Args:
        folder: usually `nnUNet_raw`; made if it does not exist.
        n_train: training cases, at least 1 (nnU-Net's five folds want 5 or more).
        n_test: held-out cases, 0 or more.
        seed: 0 or larger.
        size: nominal voxels of a case along (z, y, x); see `generate_case`.
        channels: image channels per case; the first is 'CT'.
        dataset_id: nnU-Net's number of the data set, 1 to 999.
        name: letters and digits only.

    Raises:
        UsageError: an argument outside its range, or a data set of this name that exists already.
    """
    import SimpleITK as sitk

    if n_train < 1 or n_test < 0:
        raise UsageError(f"Wrong number of cases: {n_train} for training, {n_test} held out. Expected >= 1 and >= 0.")
    if seed < 0:
        raise UsageError(f"Wrong seed {seed}. Expected 0 or larger.")
    if not 1 <= dataset_id <= 999 or not name.isalnum():
        raise UsageError(
            f"Wrong data set {dataset_id} '{name}'. Expected a number from 1 to 999 and a name of letters and digits."
        )
    dataset = Path(folder) / f"Dataset{dataset_id:03d}_{name}"
    if dataset.exists():
        raise UsageError(f"{dataset} exists already. Choose another folder, dataset_id or name, or delete it first.")

    def write(array: np.ndarray, spacing: tuple[float, ...], target: Path) -> None:
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(spacing[::-1])
        sitk.WriteImage(image, str(target), useCompression=True)

    plan: list[tuple[str, str]] = [("Tr", f"train_{i:03d}") for i in range(n_train)]
    plan += [("Ts", f"test_{i:03d}") for i in range(n_test)]
    for index, (part, case_id) in enumerate(plan):
        number = int(case_id.rsplit("_", 1)[1])
        case = generate_case(seed, index, size, channels, tumour=number % TUMOUR_FREE_EVERY != TUMOUR_FREE_EVERY - 2)
        for kind in ("images", "labels"):
            (dataset / f"{kind}{part}").mkdir(parents=True, exist_ok=True)
        for channel in range(channels):
            write(case.image[channel], case.spacing, dataset / f"images{part}" / f"{case_id}_{channel:04d}.nii.gz")
        write(case.labels, case.spacing, dataset / f"labels{part}" / f"{case_id}.nii.gz")

    description = {
        "name": name,
        "description": "Synthetic data made by nnunet_dyn; not images of patients.",
        "channel_names": {str(c): "CT" if c == 0 else f"contrast{c}" for c in range(channels)},
        "labels": LABELS,
        "numTraining": n_train,
        "file_ending": ".nii.gz",
    }
    (dataset / "dataset.json").write_text(json.dumps(description, indent=4) + "\n", encoding="utf-8")
    return dataset
