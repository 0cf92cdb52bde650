"""Pictures of decisions: what is drawn where."""

from dataclasses import replace

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.patches import Rectangle

from nnunet_dyn.architectures.med_danet import Decision
from nnunet_dyn.decisions import CaseDecisions, TileDecision
from nnunet_dyn.pictures import chosen_slices, plot_decisions

SHAPE = (3, 32, 40)
DECISIONS = [
    Decision("skip", bits=(), cost=0.1),
    Decision("crop", ((8, 24), (4, 28)), (8, 16, 8), 0.4),
    Decision("whole", bits=(16, 16, 8), cost=0.7, review=True),
]


def of_slices(decisions, shape=SHAPE, columns=(0,), width=40) -> CaseDecisions:
    """Tiles of ``width`` columns beside each other, with the decisions in the order of slices and columns."""
    slicers = [
        (slice(None), z, slice(0, shape[1]), slice(left, left + width)) for z in range(shape[0]) for left in columns
    ]
    tiles = [TileDecision.make(at, (0, 0, 0), shape, one, 1.0) for at, one in zip(slicers, decisions, strict=True)]
    window = (len(tiles), len(tiles) * shape[1] * width)
    return CaseDecisions((tuple(tiles),), shape, shape, tuple((0, size) for size in shape), (0, 1, 2), 1, 1.0, window)


@pytest.fixture
def figures(monkeypatch):
    found = []
    original = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda f, *a, **k: (found.append(f), original(f, *a, **k)))
    return found


@pytest.mark.parametrize("count", [0, 1])
def test_slices_without_a_tile(tmp_path, figures, count):
    """As of a network whose tiles lie on regions; of the second slice alone, or of none."""
    whole = of_slices([Decision("crop", ((8, 24), (4, 28)))] * SHAPE[0])
    decisions = replace(whole, folds=(whole.tiles[1 : 1 + count],))
    plot_decisions(np.zeros(SHAPE), np.zeros(SHAPE, int), decisions, tmp_path / "slices.png")
    bar, *slices = figures[0].axes
    names = [text.get_text() for text in bar.get_legend().get_texts()]
    assert names == ["crop: 100 %"] * count + ["no tile"]
    assert [ax.get_title() for ax in slices][:2] == ["0: no tile", "1: crop" if count else "1: no tile"]


def test_every_slice_shows_its_decision_box_and_bits(tmp_path, figures):
    image = np.random.default_rng(0).normal(size=SHAPE)
    segmentation = np.zeros(SHAPE, int)
    segmentation[1, 10:14, 8:20] = 2
    plot_decisions(image, segmentation, of_slices(DECISIONS), tmp_path / "case.png", columns=2)
    assert (tmp_path / "case.png").read_bytes()[:4] == b"\x89PNG"
    bar, *axes = figures[0].axes
    assert [ax.get_title() for ax in axes] == ["0: skip", "1: crop\n8 16 8", "2: whole (review)\n16 16 8"]
    boxes = [[p for p in ax.patches if isinstance(p, Rectangle)] for ax in axes]
    assert [len(found) for found in boxes] == [0, 1, 0]
    (box,) = boxes[1]
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (3.5, 7.5, 24, 16)  # columns across, rows down
    assert bar.get_title(loc="left") == "3 slices, 3 decisions, 40 % of the full cost"
    labels = [text.get_text() for text in bar.get_legend().get_texts()]
    assert sorted(labels) == ["crop: 33 %", "review: 1", "skip: 33 %", "whole: 33 %"]
    assert [patch.get_x() + 0.5 for patch in bar.patches if patch.get_height() == 1] == [1, 0, 2]  # by action


def test_tiles_of_a_slice_are_drawn_together(tmp_path, figures):
    shape = (1, 32, 40)
    tiles = [DECISIONS[0], DECISIONS[2], DECISIONS[0]]
    zeros = np.zeros(shape)
    plot_decisions(zeros, zeros, of_slices(tiles, shape, (0, 8, 16), 24), tmp_path / "case.png")
    bar, ax = figures[0].axes
    assert ax.get_title() == "0: 2 skip, 1 whole (review)\n16 16 8"
    (box,) = ax.patches
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (7.5, -0.5, 24, 32)
    assert sorted(patch.get_height() for patch in bar.patches) == pytest.approx([1 / 3, 2 / 3])


def test_bits_that_differ_between_tiles_are_a_range(tmp_path, figures):
    shape, zeros = (1, 32, 40), np.zeros((1, 32, 40))
    tiles = [Decision("whole", bits=(8, 8, 16)), Decision("skip", bits=()), Decision("whole", bits=(16, 8, 12))]
    plot_decisions(zeros, zeros, of_slices(tiles, shape, (0, 8, 16), 24), tmp_path / "case.png")
    assert figures[0].axes[1].get_title() == "0: 1 skip, 2 whole\n8–16 8 12–16"


def test_of_many_slices_a_part_is_shown_and_all_that_deserve_a_look(tmp_path, figures):
    shape = (50, 8, 8)
    decisions = [Decision("skip", bits=(), review=index in (7, 31)) for index in range(50)]
    plot_decisions(np.zeros(shape), np.zeros(shape), of_slices(decisions, shape, width=8), tmp_path / "c.png", most=10)
    shown = [int(ax.get_title().split(":")[0]) for ax in figures[0].axes[1:]]
    assert len(shown) == 10 and {0, 7, 31, 49} <= set(shown) and shown == sorted(shown)
    assert len(figures[0].axes[0].patches) == 50, "the bar has all of them"
    assert chosen_slices([True] * 9, 3) == [0, 4, 8] and chosen_slices([False] * 2, 3) == [0, 1]


def test_what_does_not_fit_together(tmp_path):
    image = np.zeros((3, 8, 8))
    with pytest.raises(ValueError, match=r"\(3, 8, 8\), .* decisions on \(3, 32, 40\) voxels; expected one shape"):
        plot_decisions(image, image, of_slices(DECISIONS), tmp_path / "case.png")
    with pytest.raises(ValueError, match="expected one shape"):
        plot_decisions(np.zeros(SHAPE), np.zeros(SHAPE)[:, :4], of_slices(DECISIONS), tmp_path / "case.png")
    assert not list(tmp_path.iterdir())
