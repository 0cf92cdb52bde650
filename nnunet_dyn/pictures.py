"""Pictures of what a network did with the slices of a case, as in Figure 4 of the Med-DANet V2 paper."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nnunet_dyn.decisions import SKIP

if TYPE_CHECKING:  # importing it takes seconds
    from nnunet_dyn.decisions import CaseDecisions, TileDecision

#: The later ones weigh more where several tiles of a slice differ.
_COLOURS = {SKIP: "tab:red", "crop": "tab:orange", "whole": "tab:green"}
_OTHER, _REVIEW = "tab:blue", "magenta"


def plot_decisions(
    image: np.ndarray,
    segmentation: np.ndarray,
    decisions: CaseDecisions,
    path: str | Path,
    columns: int = 8,
    most: int = 48,
) -> None:
    """Draw slices with their segmentation, decisions, boxes and bits below a bar of all slices, as one picture.

    Of more slices than ``most`` those are shown that deserve a look and others at equal distances; the bar has all.
    What several tiles or folds decided for a slice is drawn together, bits that differ as a range.

    Args:
        image: one channel of the preprocessed image, ``(Z, H, W)``.
        segmentation: labels, ``(Z, H, W)``; 0 is not drawn.
        decisions: of the same image.
        path: a file whose name ends in a format that matplotlib writes, such as ``.png``.

    Raises:
        ValueError: shapes that differ, or no slice.
    """
    if not image.shape == segmentation.shape == decisions.shape or image.ndim != 3 or not image.size:
        raise ValueError(
            f"Got an image of {image.shape}, a segmentation of {segmentation.shape} and decisions on {decisions.shape} "
            "voxels; expected one shape (Z, H, W). Give one channel of the preprocessed image."
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    of_slice: list[list[TileDecision]] = [[] for _ in image]
    for tile in decisions.tiles:
        for index in range(*tile.tile[0]):
            of_slice[index].append(tile)
    shown = chosen_slices([any(tile.decision.review for tile in tiles) for tiles in of_slice], most)
    columns = min(columns, max(4, len(shown)))
    rows = math.ceil(len(shown) / columns)
    width = 1.7 * columns
    height = min(max(width / columns * image.shape[1] / image.shape[2], 0.8), 5.0) + 0.45
    head = 1.2
    figure = Figure(figsize=(width, head + rows * height))
    FigureCanvasAgg(figure)
    total = head + rows * height
    bar = figure.add_axes((0.05, 1 - 0.95 / total, 0.93, 0.5 / total))
    _draw_bar(bar, of_slice, shown, decisions)
    low, high = np.percentile(image, (1, 99))
    labels = max(1, int(segmentation.max()))
    for place, index in enumerate(shown):
        row, column = divmod(place, columns)
        left, bottom = column / columns, 1 - (head + (row + 1) * height) / total
        ax = figure.add_axes((left + 0.03 / columns, bottom, 0.94 / columns, (height - 0.4) / total))
        ax.imshow(image[index], cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
        found = np.ma.masked_equal(segmentation[index], 0)
        ax.imshow(found, cmap="viridis", vmin=1, vmax=labels, alpha=0.5, interpolation="nearest")
        _draw_slice(ax, index, of_slice[index], image.shape)
        ax.set_axis_off()
    figure.savefig(path, dpi=120)


def chosen_slices(deserve_a_look: Sequence[bool], most: int) -> list[int]:
    """Numbers of at most ``most`` slices: those that deserve a look first, then others at equal distances.

    >>> chosen_slices([False, False, False, True, False, False], 3)
    [0, 3, 5]
    """

    def spread(numbers: list[int], count: int) -> list[int]:
        at = np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int)
        return [numbers[index] for index in at]

    first = spread([index for index, flag in enumerate(deserve_a_look) if flag], most)
    others = [index for index, flag in enumerate(deserve_a_look) if not flag]
    return sorted(first + spread(others, most - len(first)))


def _draw_bar(ax, of_slice: list[list[TileDecision]], shown: list[int], decisions: CaseDecisions) -> None:
    """Every slice as a column with the share of each action, dots at those below, triangles at those for review."""
    shares = [Counter(tile.decision.action for tile in tiles) for tiles in of_slice]
    base, total = np.zeros(len(shares)), decisions.totals()
    for action, share in total["shares"].items():
        heights = np.array([count[action] / max(1, count.total()) for count in shares])
        name = f"{action}: {100 * share:.0f} %"
        ax.bar(range(len(shares)), heights, 1.0, base, color=_COLOURS.get(action, _OTHER), label=name)
        base += heights
    if not all(of_slice):
        ax.bar(range(len(shares)), [not tiles for tiles in of_slice], 1.0, color=_COLOURS[SKIP], label="no tile")
    review = [index for index, tiles in enumerate(of_slice) if any(tile.decision.review for tile in tiles)]
    if review:
        kind = {"marker": "v", "color": _REVIEW, "linestyle": "", "clip_on": False, "markersize": 5}
        ax.plot(review, [1.12] * len(review), label=f"review: {total['review']}", **kind)
    if len(shown) < len(of_slice):
        kind = {"marker": ".", "color": "black", "linestyle": "", "clip_on": False, "markersize": 3}
        ax.plot(shown, [-0.1] * len(shown), label="shown below", **kind)
    ax.set(xlim=(-0.5, len(shares) - 0.5), ylim=(0, 1), yticks=[])
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.tick_params(labelsize=7)
    title = f"{len(shares)} slices, {total['tiles']} decisions, {100 * total['relative_macs']:.0f} % of the full cost"
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1.15), ncols=6, fontsize=7, frameon=False, borderaxespad=0)
    ax.set_title(title, fontsize=8, loc="left", pad=10)


def _draw_slice(ax, index: int, tiles: list[TileDecision], shape: tuple[int, ...]) -> None:
    from matplotlib.patches import Rectangle

    for tile in tiles:
        colour = _COLOURS.get(tile.decision.action, _OTHER)
        for (first, behind), (top, bottom), (left, right) in tile.boxes:
            if first <= index < behind and (bottom - top, right - left) != shape[1:]:
                corner, size = (left - 0.5, top - 0.5), (right - left, bottom - top)
                ax.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=1.2))
    actions = Counter(tile.decision.action for tile in tiles) or Counter({"no tile": 1})
    bits = [widths for tile in tiles if (widths := getattr(tile.decision, "bits", None))]
    review = any(tile.decision.review for tile in tiles)
    names = [action if len(tiles) < 2 else f"{count} {action}" for action, count in sorted(actions.items())]
    text = f"{index}: {', '.join(names)}{' (review)' if review else ''}"
    if bits:
        ranges = [sorted({min(stage), max(stage)}) for stage in zip(*bits, strict=True)]
        text += "\n" + " ".join("–".join(map(str, ends)) for ends in ranges)
    colours = [colour for action, colour in _COLOURS.items() if action in actions] or [_OTHER]
    ax.set_title(text, fontsize=6.5, color=_REVIEW if review else colours[-1], pad=2)
