"""The demo's Dice table and its picture, from nnU-Net's evaluation and segmentations."""

import csv
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nnunet_dyn.demo.generator import LABELS, SMALL_ORGAN, TUMOUR
from nnunet_dyn.errors import JobError

# Case, then label, then Dice in [0, 1]; NaN where neither the truth nor the prediction has the label.
Scores = Mapping[str, Mapping[str, float]]

# Readable on grey for the colour-blind too (Okabe and Ito).
COLOURS = {"large_organ": "#56B4E9", "small_organ": "#E69F00", "tumour": "#F0E442"}
WINDOW = (-160.0, 260.0)


def foreground_names() -> list[str]:
    """The labels that are scored."""
    return [name for name, value in LABELS.items() if value]


def read_json(path: Path) -> dict:
    """Contents of a file that one of nnU-Net's commands should have written.

    Raises:
        JobError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError(f"nnU-Net ended without an error, but {path} cannot be read: {error}") from error


def write_json(path: Path, content: dict) -> None:
    """Write `content` at once or not at all; NaN becomes null, which JSON has."""

    def plain(value):
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return None if isinstance(value, float) and math.isnan(value) else value

    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(plain(content), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def write_table(path: Path, dice: Scores) -> None:
    """Write one row per case and label: case, label, dice (empty where it is not defined)."""
    partial = path.with_suffix(".partial")
    with open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("case", "label", "dice"))
        for case, scores in dice.items():
            for name, value in scores.items():
                writer.writerow((case, name, "" if math.isnan(value) else f"{value:.4f}"))
    os.replace(partial, path)


def dice_per_case(summary: dict) -> dict[str, dict[str, float]]:
    """Dice of each label in each case, from nnU-Net's `summary.json`."""
    return {
        Path(case["reference_file"]).name.removesuffix(".nii.gz"): {
            name: float(case["metrics"][str(LABELS[name])]["Dice"]) for name in foreground_names()
        }
        for case in summary["metric_per_case"]
    }


def mean_dice(dice: Scores) -> dict[str, float]:
    """Mean over the cases where a label's Dice is defined, as nnU-Net averages; NaN if there is none."""
    means = {}
    for name in foreground_names():
        values = [case[name] for case in dice.values() if not math.isnan(case[name])]
        means[name] = sum(values) / len(values) if values else math.nan
    return means


def _views(truth: np.ndarray) -> list[tuple[str, tuple]]:
    """Title and index of three slices: two axial ones and a coronal one through the middle of what is to be seen."""

    def middle(value: int, axis: int) -> int:
        found = np.nonzero(truth == value if (truth == value).any() else truth > 0)[axis]
        return int(np.median(found)) if found.size else truth.shape[axis] // 2

    tumour_z, organ_z, tumour_y = middle(TUMOUR, 0), middle(SMALL_ORGAN, 0), middle(TUMOUR, 1)
    every = slice(None)
    return [
        (f"axial, slice {tumour_z}", (tumour_z, every, every)),
        (f"axial, slice {organ_z}", (organ_z, every, every)),
        # The head is up.
        (f"coronal, row {tumour_y}", (slice(None, None, -1), tumour_y, every)),
    ]


def draw_overlay(dataset: Path, predictions: Path, dice: Scores, trainer: str, target: Path) -> None:
    """Draw a held-out case: three slices, each plain, with the true contours and with the predicted ones.

    The case is the first that has a tumour. Contours lie on the borders of voxels, so nothing is smoothed away.
    """
    import SimpleITK as sitk
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    def read(path: Path) -> sitk.Image:
        return sitk.ReadImage(str(path))

    def labels_of(folder: Path, case: str) -> np.ndarray:
        return sitk.GetArrayFromImage(read(folder / f"{case}.nii.gz"))

    cases = sorted(dice)
    case = next((c for c in cases if (labels_of(dataset / "labelsTs", c) == TUMOUR).any()), cases[0])
    image = read(dataset / "imagesTs" / f"{case}_0000.nii.gz")
    spacing = image.GetSpacing()[::-1]
    volume = sitk.GetArrayFromImage(image)
    truth, prediction = labels_of(dataset / "labelsTs", case), labels_of(predictions, case)

    views = _views(truth)
    columns = (("CT-like image", None), ("ground truth", truth), ("prediction", prediction))
    extents = []
    for _, index in views:
        rows, cols = (axis for axis, i in enumerate(index) if isinstance(i, slice))
        extents.append((volume.shape[cols] * spacing[cols], volume.shape[rows] * spacing[rows]))

    heights = [height for _, height in extents]
    width = max(width for width, _ in extents)
    scale = 3.6 / width
    inches = scale * sum(heights) + 1.3
    figure = Figure(figsize=(3 * 3.6 + 0.3, inches), dpi=130, facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 3, gridspec_kw={"height_ratios": heights, "wspace": 0.02, "hspace": 0.03}, squeeze=False)
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.75 / inches, bottom=0.45 / inches)
    for row, ((title, index), (width, height)) in enumerate(zip(views, extents, strict=True)):
        for column, (heading, labels) in enumerate(columns):
            axis = axes[row][column]
            axis.set_axis_off()
            axis.imshow(
                volume[index],
                cmap="gray",
                vmin=WINDOW[0],
                vmax=WINDOW[1],
                extent=(0, width, height, 0),
                interpolation="nearest",
            )
            if labels is not None:
                for name in foreground_names():
                    _outline(axis, labels[index] == LABELS[name], (width, height), COLOURS[name])
            if row == 0:
                axis.set_title(heading, color="white", fontsize=11)
            if column == 0:
                axis.text(
                    0.02,
                    0.97,
                    title,
                    color="white",
                    fontsize=9,
                    va="top",
                    transform=axis.transAxes,
                    backgroundcolor="black",
                )

    scores = ", ".join(
        f"{name} {'absent' if math.isnan(value) else f'{value:.2f}'}" for name, value in dice[case].items()
    )
    figure.suptitle(
        f"Synthetic data, held-out {case}, {trainer}\nDice: {scores}",
        color="white",
        fontsize=11,
        y=1 - 0.08 / inches,
    )
    figure.legend(
        handles=[Line2D([], [], color=COLOURS[name], label=name, linewidth=2) for name in foreground_names()],
        loc="lower center",
        ncols=3,
        frameon=False,
        labelcolor="white",
    )
    partial = target.with_suffix(".partial")
    figure.savefig(partial, format="png", facecolor="black")
    os.replace(partial, target)


def _outline(axis, mask: np.ndarray, extent: tuple[float, float], colour: str) -> None:
    """Draw the borders of the voxels of `mask` (rows, columns), `extent` mm wide and high."""
    from matplotlib.collections import LineCollection

    rows, columns = mask.shape
    dx, dy = extent[0] / columns, extent[1] / rows
    padded = np.pad(mask, 1)
    segments = [
        ((x * dx, y * dy), (x * dx, (y + 1) * dy)) for y, x in np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])
    ]
    segments += [
        ((x * dx, y * dy), ((x + 1) * dx, y * dy)) for y, x in np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])
    ]
    axis.add_collection(LineCollection(segments, colors=colour, linewidths=1.2))
