"""Generated brain-like volumes in nnU-Net's raw format: four contrasts, 256² slices, a tumour in under half of them.

The regions are those of the BraTS challenge: whole tumour, core, enhancing. Example:

    python benchmarks/tumours.py nnUNet_raw --train 24 --test 20
"""

import argparse
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
from scipy.ndimage import gaussian_filter

from nnunet_dyn.demo.generator import Anatomy

CONTRASTS = ("T1", "T1ce", "T2", "FLAIR")
#: Brightness of each tissue in each contrast; the background is noise around 0.
TISSUES = {
    "scalp": (60, 90, 70, 60),
    "brain": (100, 100, 100, 100),
    "grey": (85, 88, 118, 112),
    "fluid": (40, 42, 190, 45),
    "vessel": (95, 190, 60, 80),
    "oedema": (84, 86, 150, 165),
    "core": (70, 76, 165, 140),
    "enhancing": (88, 175, 140, 138),
}
OEDEMA, CORE, ENHANCING = 1, 2, 3
REGIONS = {"background": 0, "whole_tumour": [1, 2, 3], "tumour_core": [2, 3], "enhancing_tumour": [3]}
SPACING = (5.0, 1.0, 1.0)


def generate(seed: int, index: int, slices: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (4, slices, size, size) float32 and labels (slices, size, size) of one patient."""
    rng = np.random.default_rng([seed, index])
    anatomy = Anatomy(rng, (slices, size, size), (SPACING[0] * 32 / slices, 256 / size, 256 / size))
    height = SPACING[0] * 32 / 2  # mm, of half the volume
    brain_radii = np.array((height * 1.25, 88, 72)) * rng.uniform(0.93, 1.05, 3)
    head = anatomy.ellipsoid((0, 0, 0), brain_radii + np.array((40, 14, 14)), 0.01, 120)
    brain = anatomy.ellipsoid((0, 0, 0), brain_radii, 0.015, 100)
    grey = brain * (1 - anatomy.ellipsoid((0, 0, 0), brain_radii * 0.82, 0.07, 25))
    fluid = np.maximum(*[
        anatomy.ellipsoid((rng.uniform(-6, 6), rng.uniform(-8, 8), side * 14), (34, 27, 8), 0.12, 30)
        for side in (-1, 1)
    ])  # fmt: skip
    vessels = np.zeros_like(brain)
    for _ in range(6):  # bright with contrast medium, as a tumour's rim is
        centre = rng.uniform(-0.7, 0.7, 3) * brain_radii
        vessels = np.maximum(vessels, anatomy.ellipsoid(centre, rng.uniform(2, 6, 3) * (3, 1, 1), 0.1, 20))
    # From one slice in six to two in five.
    radius = np.array((height * rng.uniform(0.17, 0.42), *rng.uniform(15, 33, 2)))
    centre = rng.uniform(-1, 1, 3) * (height - radius[0], 45, 34)
    whole = np.minimum(anatomy.ellipsoid(centre, radius, 0.1, 30), brain)
    inner = centre + radius * rng.uniform(-0.15, 0.15, 3)
    core = np.minimum(anatomy.ellipsoid(inner, radius * rng.uniform(0.5, 0.7), 0.08, 20), whole)
    necrosis = np.minimum(anatomy.ellipsoid(inner, radius * rng.uniform(0.2, 0.4), 0.1, 15), core)

    labels = np.zeros((slices, size, size), np.uint8)
    labels[whole > 0.5] = OEDEMA
    labels[core > 0.5] = ENHANCING
    labels[necrosis > 0.5] = CORE
    layers = {
        "scalp": head,
        "brain": brain,
        "grey": grey,
        "fluid": np.minimum(fluid, brain),
        "vessel": np.minimum(vessels, brain),
        "oedema": whole,
        "enhancing": core,
        "core": necrosis,
    }
    strength = rng.uniform(0.55, 1.0)  # how much the tumour stands out
    image = np.zeros((len(CONTRASTS), slices, size, size), np.float32)
    for channel, volume in enumerate(image):
        for tissue, occupancy in layers.items():
            bright = TISSUES[tissue][channel]
            if tissue in ("oedema", "enhancing", "core"):
                bright = TISSUES["brain"][channel] + strength * (bright - TISSUES["brain"][channel])
            volume += occupancy * (bright * rng.uniform(0.95, 1.05) - volume)
        volume += head * (4 * anatomy.waves(40) + 3 * anatomy.waves(12))
        volume *= 1 + 0.08 * anatomy.waves(300)  # the coil's bias
        volume[:] = gaussian_filter(volume, (0, 0.7, 0.7))
        volume += gaussian_filter(rng.normal(size=volume.shape), (0, 0.5, 0.5)) * rng.uniform(10, 16)
    return image, labels


def write_dataset(
    folder: Path, train: int, test: int, slices: int = 32, size: int = 256, seed: int = 0, number: int = 998
) -> Path:
    """Write ``train`` and ``test`` cases and return the data set's folder."""
    dataset = folder / f"Dataset{number}_GeneratedTumours"
    for kind in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (dataset / kind).mkdir(parents=True)
    for index in range(train + test):
        part, case = ("Tr", f"train_{index:03d}") if index < train else ("Ts", f"test_{index - train:03d}")
        image, labels = generate(seed, index, slices, size)
        files = [(f"images{part}/{case}_{channel:04d}", volume) for channel, volume in enumerate(image)]
        for name, volume in [*files, (f"labels{part}/{case}", labels)]:
            written = sitk.GetImageFromArray(volume)
            written.SetSpacing(SPACING[::-1])
            sitk.WriteImage(written, str(dataset / f"{name}.nii.gz"), useCompression=True)
    channels, labels, order = dict(enumerate(CONTRASTS)), dict(REGIONS), (OEDEMA, CORE, ENHANCING)
    origin = {"regions_class_order": order, "license": "generated", "converted_by": Path(__file__).name}
    generate_dataset_json(str(dataset), channels, labels, train, ".nii.gz", **origin)
    return dataset


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=24)
    parser.add_argument("--test", type=int, default=20)
    parser.add_argument("--slices", type=int, default=32)
    parser.add_argument("--size", type=int, default=256, help="voxels of a slice's side (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(write_dataset(args.folder, args.train, args.test, args.slices, args.size, args.seed))
