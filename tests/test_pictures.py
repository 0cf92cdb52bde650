"""Pictures of decisions: what is drawn where."""

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.patches import Rectangle

from nnunet_dyn.architectures.med_danet import Decision
from nnunet_dyn.pictures import plot_decisions

DECISIONS = [
    Decision("skip", bits=()),
    Decision("crop", ((8, 24), (4, 28)), (8, 16, 8)),
    Decision("whole", bits=(16, 16, 8), review=True),
]


def test_every_slice_shows_its_decision_box_and_bits(tmp_path, monkeypatch):
    figures = []
    original = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda f, *a, **k: (figures.append(f), original(f, *a, **k))
    )
    image = np.random.default_rng(0).normal(size=(3, 32, 40))
    segmentation = np.zeros((3, 32, 40), int)
    segmentation[1, 10:14, 8:20] = 2
    plot_decisions(image, segmentation, DECISIONS, tmp_path / "case.png", columns=2)
    assert (tmp_path / "case.png").read_bytes()[:4] == b"\x89PNG"
    axes = figures[0].axes
    titles = [ax.get_title() for ax in axes]
    assert titles == ["0: skip", "1: crop\n8 16 8", "2: whole (review)\n16 16 8", ""]
    boxes = [[p for p in ax.patches if isinstance(p, Rectangle)] for ax in axes]
    assert [len(found) for found in boxes] == [0, 1, 0, 0]
    (box,) = boxes[1]
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (3.5, 7.5, 24, 16)  # columns across, rows down


def test_what_does_not_fit_together(tmp_path):
    image = np.zeros((3, 8, 8))
    with pytest.raises(ValueError, match=r"\(3, 8, 8\), .* and 2 decisions; expected one shape \(Z, H, W\) and Z"):
        plot_decisions(image, image, DECISIONS[:2], tmp_path / "case.png")
    with pytest.raises(ValueError, match="expected one shape"):
        plot_decisions(image, image[:, :4], DECISIONS, tmp_path / "case.png")
    assert not list(tmp_path.iterdir())
