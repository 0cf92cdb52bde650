"""Pictures of what a network did with the slices of a case, as in Figure 4 of the Med-DANet V2 paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # importing it takes seconds
    from nnunet_dyn.architectures.med_danet import Decision

_COLOURS = {"skip": "tab:red", "crop": "tab:orange", "whole": "tab:green"}


def plot_decisions(
    image: np.ndarray,
    segmentation: np.ndarray,
    decisions: Sequence[Decision],
    path: str | Path,
    columns: int = 6,
) -> None:
    """Draw every slice with its segmentation, its decision, its box and its bits, and write them as one picture.

    Args:
        image: one channel, ``(Z, H, W)``.
        segmentation: labels, ``(Z, H, W)``; 0 is not drawn.
        decisions: one a slice.
        path: a file whose name ends in a format that matplotlib writes, such as ``.png``.

    Raises:
        ValueError: not as many decisions as slices, or shapes that differ.
    """
    if image.shape != segmentation.shape or image.ndim != 3 or len(decisions) != len(image) or not len(image):
        raise ValueError(
            f"Got an image of {image.shape}, a segmentation of {segmentation.shape} and {len(decisions)} decisions; "
            "expected one shape (Z, H, W) and Z decisions, one or more. Give one channel, and the decisions of one "
            "pass over the case."
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = min(columns, len(image))
    rows = math.ceil(len(image) / columns)
    figure = Figure(figsize=(2.2 * columns, 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    low, high = np.percentile(image, (1, 99))
    labels = max(1, int(segmentation.max()))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for index, (ax, decision) in enumerate(zip(axes[: len(image)], decisions, strict=True)):
        ax.imshow(image[index], cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
        shown = np.ma.masked_equal(segmentation[index], 0)
        ax.imshow(shown, cmap="viridis", vmin=1, vmax=labels, alpha=0.5, interpolation="nearest")
        if decision.box is not None:
            (top, bottom), (left, right) = decision.box
            corner, width, height = (left - 0.5, top - 0.5), right - left, bottom - top
            ax.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=_COLOURS["crop"], linewidth=1.5))
        bits = " ".join(map(str, decision.bits or ()))
        title = f"{index}: {decision.action}{' (review)' if decision.review else ''}"
        ax.set_title(f"{title}\n{bits}" if bits else title, fontsize=7, color=_COLOURS[decision.action])
    for ax in axes:
        ax.set_axis_off()
    figure.savefig(path, dpi=120)
