"""What a network decided for the tiles of a case: the protocol of networks that decide, records, and their JSON.

The predictor asks such a network once a tile (in 2D a slice, or a part of one) and carries the decision out in every
mirrored copy. ``docs/predict.md`` describes the JSON.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

#: First voxel and the one behind the last, per axis.
Box = tuple[tuple[int, int], ...]

#: Raised whenever a field changes its meaning or is taken away; new fields do not raise it.
FORMAT_VERSION = 1
#: The action of a tile that is background at once: nothing is computed of it, in no mirrored copy.
SKIP = "skip"
#: Of the patch: where tiles lie in calibration. Others may leave out what calibration never saw left out.
CALIBRATED_STEP_SIZE = 0.5
#: What ``profile_paths`` calls the extremes; a network that never skips has only the first.
EVERYTHING_ON, EVERYTHING_SKIPPED = "everything on", "everything skipped"


class Decision(Protocol):
    """What is done with one tile.

    Attributes:
        action: :data:`SKIP`, or another word for what is computed.
        cost: multiply-accumulates of deciding and of executing once.
        review: whether the tile deserves a look.
    """

    action: str
    cost: float
    review: bool

    def computed(self, size: tuple[int, ...]) -> tuple[Box, ...]:
        """The parts of a tile of ``size`` voxels that are computed; none of a skipped one."""

    def mirrored(self, axes: Sequence[int], size: tuple[int, ...]) -> Decision:
        """The same for the tile flipped along ``axes``, 0 for its first spatial one."""

    def within(self, image: Box) -> Decision:
        """The same for a tile in which the image begins and ends at ``image``, in voxels of the tile: here ``review``
        can depend on what lies at the image's border."""

    def to_json(self) -> dict:
        """The fields but for boxes, as JSON has them."""


@runtime_checkable
class DecidingNetwork(Protocol):
    """A network in two steps, of which the second one does what it is told."""

    def decide(self, x: torch.Tensor) -> list[Decision]:
        """What to do with each tile of ``x``, ``(B, C, *patch)``; the same tile alone gives the same decision."""

    def execute(self, x: torch.Tensor, decisions: Sequence[Decision]) -> tuple[torch.Tensor, list[Decision]]:
        """Logits ``(B, classes, *patch)``, and the decisions with all that was left open in them.

        What comes back is executed again as it is. A skipped tile's logits do not depend on the tile.
        """

    def profile_paths(self, patch: tuple[int, ...]) -> dict[str, Decision]:
        """Decisions for a tile of ``patch`` voxels by what they are called, the extremes among them."""

    def operations(self, decision: Decision, patch: tuple[int, ...]) -> int:
        """Multiply-accumulates of deciding and executing on one tile, of whatever width in bits."""


@runtime_checkable
class GatedNetwork(DecidingNetwork, Protocol):
    """One that segments the parts of a tile that a gate asks for, the channels behind the image, and nothing else.

    Each part is cut out, segmented, and put back alone, so that tiles may lie on the parts and not on the image. The
    members are those of :class:`nnunet_dyn.architectures.roi_segmentor.ROISegmentor`.
    """

    image_channels: int
    background_logits: torch.Tensor

    def regions(self, gate, shape, patch, count_tiles) -> list[tuple[Box, Box]]:
        """The boxes of an image's gate that have tiles of their own, each without and with its margin."""

    def decide_gate(self, gate) -> Decision:
        """What to do with a tile of which the gate is known."""

    def counted(self, decision: Decision) -> Decision:
        """``decision`` with what it costs to execute."""

    def run_size(self, box: Box) -> tuple[int, ...]:
        """Voxels of what is computed for ``box``."""

    def cut(self, image: torch.Tensor, box: Box) -> torch.Tensor:
        """What is computed for ``box``, ``(C, *size)``."""

    def segment_crops(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of what was cut out, in batches of one size."""

    def restore(self, logits: torch.Tensor, box: Box) -> torch.Tensor:
        """Logits of what was cut out, ``(classes, *size)``, at the size of ``box``."""


@dataclass(frozen=True)
class TileDecision:
    """A decision, and where in the preprocessed image it holds.

    Attributes:
        tile: (3 axes) the part of the tile that lies in the image; in 2D its first axis is one slice.
        boxes: what is computed, within ``tile``.
        macs: multiply-accumulates of deciding once and executing in every mirrored copy.
    """

    tile: Box
    boxes: tuple[Box, ...]
    decision: Decision
    macs: float

    @classmethod
    def make(
        cls, slicer: Sequence, offset: Sequence[int], shape: Sequence[int], decision: Decision, macs: float
    ) -> TileDecision:
        """From where the sliding window found the tile.

        Args:
            slicer: of the padded image, (channels, 3 axes), with a number for the axis of 2D slices.
            offset: voxels of padding before the image, per axis.
            shape: of the image without padding.
        """
        spans = [at if isinstance(at, slice) else slice(at, at + 1) for at in slicer[1:]]
        ranges = [(span.start, span.stop) for span in spans]
        flat = sum(not isinstance(at, slice) for at in slicer[1:])  # the axis of the slices, the first one
        patch = tuple(stop - start for start, stop in ranges[flat:])

        def place(box: Box) -> Box:
            inside = [*((0, 1),) * flat, *box]
            moved = [
                tuple(int(min(max(first + end - pad, 0), size)) for end in ends)  # nnU-Net's are numpy's numbers
                for (first, _), ends, pad, size in zip(ranges, inside, offset, shape, strict=True)
            ]
            return tuple(moved)

        whole = tuple((0, size) for size in patch)
        image = tuple(
            (int(pad - first), int(pad - first + size))
            for (first, _), pad, size in list(zip(ranges, offset, shape, strict=True))[flat:]
        )
        boxes = tuple(place(box) for box in decision.computed(patch))
        return cls(place(whole), boxes, decision.within(image), macs)


@dataclass(frozen=True)
class CaseDecisions:
    """Every decision of a case.

    Attributes:
        folds: of each fold that was averaged over, its tiles in the order of the sliding window, or those on the
            regions that are segmented.
        shape: of the preprocessed image.
        image_shape: of the image as it was read.
        crop: the part of the image, its axes in the preprocessed order, that the preprocessed one shows.
        axes: of the image, in the preprocessed order.
        mirrored_copies: in how many each decision was executed, the tile itself included.
        everything_macs: multiply-accumulates of one tile on which everything is computed once.
        window: how many tiles nnU-Net's sliding window has on the image, and how many of the image's voxels are in
            them, counted in each: what a network computes that does not decide.
        warnings: what is wrong with the case as a whole, a sentence each.
        first_stage: of a cascade whose first stage was predicted, too, what that decided; ``None`` if that stage does
            not decide, or the image was too thin for it.
    """

    folds: tuple[tuple[TileDecision, ...], ...]
    shape: tuple[int, ...]
    image_shape: tuple[int, ...]
    crop: Box
    axes: tuple[int, ...]
    mirrored_copies: int
    everything_macs: float
    window: tuple[int, int]
    warnings: tuple[str, ...] = ()
    first_stage: CaseDecisions | None = None

    @property
    def tiles(self) -> tuple[TileDecision, ...]:
        """Of all folds."""
        return tuple(tile for fold in self.folds for tile in fold)

    @property
    def review(self) -> bool:
        return bool(self.warnings) or any(tile.decision.review for tile in self.tiles)

    def to_image(self, box: Box) -> Box:
        """The voxels of the image, in its own order of axes, that ``box`` of the preprocessed one lies in."""
        placed: list = [None] * len(box)
        for axis, (start, stop), (first, last), size in zip(self.axes, box, self.crop, self.shape, strict=True):
            voxels = last - first
            placed[axis] = (first + start * voxels // size, first - (-stop * voxels // size))
        return tuple(placed)

    def totals(self, *folds: tuple[TileDecision, ...]) -> dict:
        """Numbers and shares over some of :attr:`folds`, or all: see ``docs/predict.md``."""
        folds = folds or self.folds
        tiles = [tile for fold in folds for tile in fold]
        actions = Counter(tile.decision.action for tile in tiles)
        mean = sum(tile.decision.cost for tile in tiles) / (len(folds) * self.window[0])
        return {
            "tiles": len(tiles),
            "shares": {action: round(count / len(tiles), 6) for action, count in sorted(actions.items())},
            "review": sum(tile.decision.review for tile in tiles),
            "mean_macs": round(mean),
            "relative_macs": round(mean / self.everything_macs, 6),
            "macs_all_copies": round(sum(tile.macs for tile in tiles)),
        }

    def to_json(self, case: str) -> dict:
        return {
            "format": "nnunet_dyn decisions",
            "version": FORMAT_VERSION,
            "case": case,
            "review": self.review,
            "warnings": list(self.warnings),
            "image_shape": list(self.image_shape),
            "preprocessed_shape": list(self.shape),
            "mirrored_copies": self.mirrored_copies,
            "everything_macs": round(self.everything_macs),
            "window": {"tiles": self.window[0], "voxels": self.window[1]},
            "totals": self.totals(),
            "folds": [
                {"totals": self.totals(fold), "decisions": [self._tile_json(tile) for tile in fold]}
                for fold in self.folds
            ],
            **({"first_stage": self.first_stage.to_json(case)} if self.first_stage else {}),
        }

    def _tile_json(self, tile: TileDecision) -> dict:
        return {
            "tile": tile.tile,
            "image_tile": self.to_image(tile.tile),
            "boxes": tile.boxes,
            "image_boxes": [self.to_image(box) for box in tile.boxes],
            **tile.decision.to_json(),
        }
