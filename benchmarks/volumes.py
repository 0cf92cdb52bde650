"""Generated volumes in nnU-Net's raw format with a few small targets, bright and so easily found: for costs.

Example:

    python benchmarks/volumes.py nnUNet_raw --size 256 --test 2
"""

import argparse
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
from scipy.ndimage import gaussian_filter

#: Brightness above the noise, whose standard deviation is 1, by class.
BRIGHTNESS = {"bright": 6.0, "brighter": 12.0}
#: Half the sides of a target's box, in voxels.
RADII = (12, 32)


def generate(seed: int, index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Image, float32, and labels, uint8, of ``size``³ voxels with one ellipsoid of each class."""
    rng = np.random.default_rng([seed, index, size])
    image = gaussian_filter(rng.normal(size=(size,) * 3).astype(np.float32), 1)
    image /= image.std()
    labels = np.zeros(image.shape, np.uint8)
    grid = np.ogrid[(slice(0, size),) * 3]
    for label, more in enumerate(BRIGHTNESS.values(), 1):
        radii = rng.uniform(RADII[0], min(RADII[1], size / 5), 3)
        centre = [rng.uniform(radius + 1, size - radius - 1) for radius in radii]
        squares = (((at - c) / radius) ** 2 for at, c, radius in zip(grid, centre, radii, strict=True))
        inside = sum(squares) <= 1
        labels[inside] = label
        image[inside] += more
    return image, labels


def write_dataset(folder: Path, size: int, train: int, test: int, seed: int = 0, number: int = 997) -> Path:
    """Write cases of ``size``³ voxels, and one of an eighth of that to validate on and one to begin prediction with.

    Returns:
        The data set's folder.
    """
    dataset = folder / f"Dataset{number}_GeneratedTargets"
    for kind in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (dataset / kind).mkdir(parents=True)
    cases = [("Tr", f"train_{index}", size) for index in range(train)] + [("Tr", "val_0", size // 2)]
    cases += [("Ts", "case_0", size // 2)] + [("Ts", f"case_{index + 1}", size) for index in range(test)]
    for index, (part, case, side) in enumerate(cases):
        image, labels = generate(seed, index, side)
        for name, volume in ((f"images{part}/{case}_0000", image), (f"labels{part}/{case}", labels)):
            sitk.WriteImage(sitk.GetImageFromArray(volume), str(dataset / f"{name}.nii.gz"), useCompression=True)
    labels = {"background": 0} | {name: label for label, name in enumerate(BRIGHTNESS, 1)}
    origin = {"license": "generated", "converted_by": Path(__file__).name}
    generate_dataset_json(str(dataset), {0: "noise"}, labels, train + 1, ".nii.gz", **origin)
    return dataset


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=256, help="voxels of a side (default: %(default)s)")
    parser.add_argument("--train", type=int, default=2)
    parser.add_argument("--test", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(write_dataset(args.folder, args.size, args.train, args.test, args.seed))
