"""Regions of interest: boxes around targets, how they travel as a segmentation, and what every detector shares.

After Kim et al. 2025, "Multi-Stage Hierarchical Feature Extraction for Efficient 3D Medical Image Segmentation": a
detector finds the region in which a segmentor works. nnU-Net's cascade carries a label map from one configuration to
the next, so that boxes are rendered as logits in which each box is filled with its label. ``docs/roi_cascade.md`` has
what differs from the paper and why.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

import numpy as np
import torch
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from torch import nn

from nnunet_dyn.accounting import count_operations
from nnunet_dyn.decisions import EVERYTHING_ON

#: Per axis the first voxel and the one behind the last.
Box = tuple[tuple[int, int], ...]

#: How much a box's label is preferred inside it, and the background outside. A box outlives every average, of folds and
#: of overlapping tiles, in which those that found it have more than 1/65 of the weight: OUTSIDE / (INSIDE + OUTSIDE).
#: So one of five folds is enough where its tile has a tenth of the weight. Half precision holds the weighted sums.
INSIDE, OUTSIDE = 16.0, 0.25

#: The sides of a box around nothing: times those of another, or where there is none, as a share of the volume's.
_FREE_TIMES, _FREE_SHARE = (0.5, 1.5), (0.05, 0.3)
#: So many places are tried for it.
_ATTEMPTS = 10

#: So many boxes of one class are speckle, whose neighbours need not be told apart.
SPECKLE = 512


@dataclass(frozen=True)
class Detection:
    """A box that a detector has found.

    Attributes:
        score: how sure it is, from 0 to 1.

    Raises:
        ValueError: an empty box, or no such score.
    """

    box: Box
    score: float

    def __post_init__(self):
        if any(start >= stop for start, stop in self.box):
            raise ValueError(f"box got {self.box}; expected start < stop on every axis.")
        if not 0 <= self.score <= 1:
            raise ValueError(f"score got {self.score}; expected 0 to 1.")


@dataclass(frozen=True)
class DetectorDecision:
    """What a detector has found in one tile, all of which it looks at.

    Attributes:
        boxes: of each detection, with the margin, in voxels of the tile.
        classes, scores: of each detection.
        cost: multiply-accumulates as in :mod:`nnunet_dyn.accounting`.
        review: whether a box ends at the border of the image; not known before :meth:`within`.
    """

    boxes: tuple[Box, ...] = ()
    classes: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    cost: float = 0.0
    review: bool = False
    action: ClassVar[str] = "detect"

    def computed(self, size: tuple[int, ...]) -> tuple[Box, ...]:
        """The boxes, which are what is worth recording of a detector."""
        return self.boxes

    def mirrored(self, axes: Sequence[int], size: tuple[int, ...]) -> DetectorDecision:
        """The same for the tile of ``size`` voxels flipped along ``axes``, 0 for its first spatial one."""
        return replace(self, boxes=tuple(mirrored_box(box, axes, size) for box in self.boxes))

    def within(self, image: Box) -> DetectorDecision:
        """The same for a tile in which the image lies at ``image``, with ``review`` known."""
        return replace(self, review=end_at_border(self.boxes, image))

    def to_json(self) -> dict:
        """The fields but for the boxes; ``macs`` is the cost."""
        return {
            "action": self.action,
            "classes": list(self.classes),
            "scores": [round(score, 6) for score in self.scores],
            "macs": round(self.cost),
            "review": self.review,
        }


# --- boxes of a segmentation ---------------------------------------------------------------------------------------


def label_boxes(labels: np.ndarray, classes: Iterable[int | Sequence[int]], gap: int = 2) -> dict[int, list[Box]]:
    """The boxes of the connected targets of each class of one case.

    Args:
        labels: ``(*spatial)``, whole numbers.
        classes: a label each, or for a region the labels in it.
        gap: see :func:`mask_boxes`.

    Returns:
        Boxes by class: by the label, or by a region's place in ``classes``. A class that is absent has none.
    """
    found = {}
    for place, entry in enumerate(classes):
        is_label = isinstance(entry, (int, np.integer))
        found[int(entry) if is_label else place] = mask_boxes(np.isin(labels, entry), gap)
    return found


def mask_boxes(mask: np.ndarray, gap: int = 2, connectivity: int | None = None) -> list[Box]:
    """The bounding boxes of the connected components of ``mask``, ``(*spatial)``.

    Args:
        gap: boxes with at most this many voxels between them on every axis are one; ``0`` merges those that overlap.
        connectivity: along how many axes at once voxels are neighbours; ``None`` means all, so corners count.
    """
    return merge(component_boxes(*connected_targets(mask, connectivity)), gap)


def connected_targets(mask: np.ndarray, connectivity: int | None = None) -> tuple[np.ndarray, tuple[int, ...]]:
    """The connected components of ``mask``, ``(*spatial)``, as :func:`mask_boxes` has them.

    Returns:
        Their numbers, from 1, in the box that holds them all, and that box's first voxel.
    """
    extents, view = [], mask  # labelling takes long, so only where there is something
    for axis in range(mask.ndim):
        occupied = np.flatnonzero(view.any(tuple(other for other in range(mask.ndim) if other != axis)))
        if not len(occupied):
            return np.zeros((1,) * mask.ndim, np.int32), (0,) * mask.ndim
        extents.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
        view = view[(*[slice(None)] * axis, extents[-1])]
    structure = ndimage.generate_binary_structure(mask.ndim, connectivity or mask.ndim)
    return ndimage.label(view, structure)[0], tuple(axis.start for axis in extents)


def component_boxes(components: np.ndarray, corner: Sequence[int]) -> list[Box]:
    """The bounding box of each of ``components``, as :func:`connected_targets` gives them."""
    return [
        tuple((first + axis.start, first + axis.stop) for axis, first in zip(box, corner, strict=True))
        for box in ndimage.find_objects(components)
    ]


def merge(boxes: Sequence[Box], gap: int = 0) -> list[Box]:
    """The bounding boxes of groups of ``boxes`` that overlap or have at most ``gap`` voxels between them.

    Of more than :data:`SPECKLE` boxes those that touch are merged, too, which takes less.
    """
    if len(boxes) > SPECKLE:
        filled = np.zeros(np.array(boxes).max((0, 2)), bool)
        for box in boxes:
            filled[box_slices(box)] = True
        boxes = component_boxes(*connected_targets(filled))
    while len(boxes) > 1:
        ends = np.array(boxes)
        start, stop = ends[np.argsort(ends[:, 0, 0], kind="stable")].transpose(2, 0, 1)
        # Without a gap, boxes that only touch stay apart.
        reach = stop + gap + (gap > 0)
        # Box by box, since a matrix of all pairs would not fit into memory: those behind that begin before it ends.
        behind = np.searchsorted(start[:, 0], reach[:, 0])
        near = [
            np.flatnonzero(((start[i + 1 : end] < reach[i]) & (start[i] < reach[i + 1 : end])).all(1)) + i + 1
            for i, end in enumerate(behind)
        ]
        pairs = np.repeat(np.arange(len(boxes)), list(map(len, near))), np.concatenate(near)
        graph = coo_array((np.ones(len(pairs[0]), bool), pairs), (len(boxes), len(boxes)))
        count, group = connected_components(graph, directed=False)
        if count == len(boxes):
            break
        first, last = (np.full((count, ends.shape[1]), fill) for fill in (ends.max(), 0))
        np.minimum.at(first, group, start)
        np.maximum.at(last, group, stop)
        boxes = _as_boxes(first, last)
    return list(boxes)


def merge_nearest(boxes: Sequence[Box], most: int) -> list[Box]:
    """``boxes``, of which near ones are one until there are at most ``most``: as few are merged as must be.

    In each round every box proposes to the one whose middle is nearest, and the pairs with the smallest joint boxes
    are merged.
    """
    while len(boxes) > most:
        ends = np.array(boxes)
        start, stop = ends[..., 0], ends[..., 1]
        _, nearest = cKDTree(start + stop).query(start + stop, 2)
        own = np.arange(len(boxes))
        other = np.where(nearest[:, 0] == own, nearest[:, 1], nearest[:, 0])  # of equal middles either may come first
        first, last = np.minimum(start, start[other]), np.maximum(stop, stop[other])
        is_left, kept = np.ones(len(boxes), bool), []
        for i in np.argsort((last - first).prod(1), kind="stable"):
            if is_left[i] and is_left[other[i]] and len(boxes) - len(kept) > most:
                is_left[[i, other[i]]] = False
                kept.append(i)
        boxes = [*(box for box, left in zip(boxes, is_left, strict=True) if left), *_as_boxes(first[kept], last[kept])]
    return list(boxes)


def _as_boxes(start: np.ndarray, stop: np.ndarray) -> list[Box]:
    """From (boxes, axes) each."""
    return [tuple(map(tuple, ends)) for ends in np.stack((start, stop), 2).tolist()]


def enlarge(box: Box, margin: int | Sequence[int], shape: Sequence[int]) -> Box:
    """``box`` with ``margin`` voxels more on either side of each axis, within ``shape``."""
    margins = [margin] * len(box) if isinstance(margin, int) else margin
    return tuple(
        (max(0, int(start - more)), min(int(size), int(stop + more)))
        for (start, stop), more, size in zip(box, margins, shape, strict=True)
    )


def mirrored_box(box: Box, axes: Sequence[int], size: Sequence[int]) -> Box:
    """``box`` in the tile of ``size`` voxels flipped along ``axes``.

    >>> mirrored_box(((1, 3), (0, 4)), (0,), (8, 8))
    ((5, 7), (0, 4))
    """
    return tuple(
        (size[axis] - stop, size[axis] - start) if axis in axes else (start, stop)
        for axis, (start, stop) in enumerate(box)
    )


def end_at_border(boxes: Iterable[Box], image: Box) -> bool:
    """Whether any of ``boxes`` ends at the border of an image that lies at ``image`` in the same voxels, or beyond it.

    What such a box holds may have been cut off by the scan.

    >>> end_at_border([((2, 8), (0, 4))], ((0, 16), (-4, 12)))
    False
    >>> end_at_border([((2, 8), (0, 4))], ((0, 16), (0, 16)))
    True
    """
    return any(
        start <= first or stop >= last for box in boxes for (start, stop), (first, last) in zip(box, image, strict=True)
    )


def jitter(box: Box, shape: Sequence[int], rng: np.random.Generator, shrink: float = 0.05, grow: float = 0.25) -> Box:
    """``box`` as an imperfect detector would give it: each side moves on its own, so position and size change.

    Args:
        shrink, grow: how far a side moves inwards and outwards at most, as a share of the box's extent on that axis;
            outwards at least two voxels. Detectors are calibrated to leave hardly anything out, hence the difference.
    """
    moved = []
    for (start, stop), size in zip(box, shape, strict=True):
        extent = stop - start
        low, high = -shrink * extent, max(2.0, grow * extent)
        first = max(0, start - round(rng.uniform(low, high)))
        behind = min(int(size), stop + round(rng.uniform(low, high)))
        moved.append((first, behind) if first < behind else (start, stop))
    return tuple(moved)


def free_boxes(labels: np.ndarray, own: Sequence[Box], count: int, rng: np.random.Generator) -> list[Box]:
    """Boxes around nothing, as a detector's false ones: at random places where no voxel is above 0.

    Args:
        labels: ``(1, *spatial)`` as nnU-Net stores them, also on the disk: only what lies in boxes is read.
        own: boxes of targets, whose middles they do not hold, and whose sizes they have, half to one and a half times
            on each axis; where there are none, sizes are a twentieth to three tenths of the volume's.
        count: how many are looked for. One for which no place is found in ten attempts is left out.
    """
    shape, found = np.array(labels.shape[1:]), []
    middles = np.array(own).reshape(-1, len(shape), 2).sum(2) // 2
    for _ in range(count):
        for _ in range(_ATTEMPTS):
            if own:
                extent = np.array(box_size(own[rng.integers(len(own))])) * rng.uniform(*_FREE_TIMES, len(shape))
            else:
                extent = shape * rng.uniform(*_FREE_SHARE, len(shape))
            size = np.clip(extent.round(), 1, shape).astype(int)
            first = rng.integers(0, shape - size + 1)
            (box,) = _as_boxes(first[None], (first + size)[None])
            holds_one = ((middles >= first) & (middles < first + size)).all(1).any()  # reading takes longer
            if not holds_one and not (labels[(0, *box_slices(box))] > 0).any():
                found.append(box)
                break
    return found


def box_size(box: Box) -> tuple[int, ...]:
    """Voxels along each axis of ``box``."""
    return tuple(stop - start for start, stop in box)


def box_slices(box: Box) -> tuple[slice, ...]:
    """What takes ``box`` out of an array."""
    return tuple(slice(start, stop) for start, stop in box)


def intersection(a: Box, b: Box) -> Box | None:
    """What the boxes have in common, ``None`` if that is nothing."""
    common = tuple((max(a0, b0), min(a1, b1)) for (a0, a1), (b0, b1) in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def shifted(box: Box, by: Sequence[int]) -> Box:
    """``box`` moved by so many voxels along each axis."""
    return tuple((start + step, stop + step) for (start, stop), step in zip(box, by, strict=True))


def volume(box: Box) -> int:
    """Voxels in ``box``."""
    return prod(stop - start for start, stop in box)


# --- boxes as logits and back --------------------------------------------------------------------------------------


def render_boxes(
    boxes: Mapping[int, Sequence[Box]], shape: Sequence[int], num_classes: int, regions: bool = False
) -> torch.Tensor:
    """Logits whose segmentation fills each box with its label; where boxes overlap, smaller ones win.

    The box that wins a voxel is the foreground there, so the union of the boxes is kept. With regions, each class has
    logits of its own and all boxes stay. The other labels have the same logits inside a box as outside, so that an
    average of boxes of different labels is one of them and not the background.

    Args:
        boxes: by class, which is its channel in the logits: the label, or the region's place.

    Returns:
        ``(num_classes, *shape)``.
    """
    logits = torch.full((num_classes, *shape), -OUTSIDE)
    if not regions:
        logits[0] = OUTSIDE
    pairs = [(label, box) for label, found in boxes.items() for box in found]
    for label, box in sorted(pairs, key=lambda pair: -volume(pair[1])):
        inside = box_slices(box)
        if not regions:
            logits[(slice(None), *inside)] = -OUTSIDE
            logits[(0, *inside)] = -INSIDE
        logits[(label, *inside)] = INSIDE
    return logits


def read_boxes(label_map: np.ndarray) -> dict[int, list[Box]]:
    """The boxes that a rendered segmentation, ``(*spatial)``, was made of, by label.

    Exact for boxes that do not overlap, and of which none of one label touch. Of others the union lies inside what
    comes back.
    """
    present = [label + 1 for label, box in enumerate(ndimage.find_objects(label_map)) if box is not None]
    return {label: mask_boxes(label_map == label, gap=0, connectivity=1) for label in present}


# --- detectors -----------------------------------------------------------------------------------------------------


class Labels(nn.Module):
    """Whether the classes are regions. Prediction has no other source for it than the state dictionary.

    A detector's score and margin of each class are here, too, as nnU-Net passes over ".seg_layers." in weights that it
    takes from a network of other labels.
    """

    def __init__(self):
        super().__init__()
        # nnU-Net passes over keys with ".seg_layers." when it loads pretrained weights, whose labels are others.
        self.seg_layers = nn.Module()
        self.seg_layers.register_buffer("are_regions", torch.tensor(False))


class DetectorNetwork(nn.Module, ABC):
    """A network that finds boxes in a patch; as nnU-Net sees it, one that segments them.

    In training mode :meth:`forward` returns what :meth:`loss` takes. In evaluation mode it returns logits
    ``(B, num_classes, *patch)`` with the boxes rendered, enlarged by ``margin``. In two steps, :meth:`decide` detects
    and :meth:`execute` renders.

    Args:
        patch_size: voxels per axis that the network is trained on.

    Attributes:
        margin: ``(num_classes, axes)``, voxels by which the boxes of a class are enlarged; a buffer, as calibration
            sets it.
        score_threshold: ``(num_classes,)``, detections of a class below it do not count; a buffer likewise.
        detections: set it to a list, and evaluation appends what :meth:`detect` finds in each sample, by class.

    Raises:
        ValueError: deep supervision, which trainers ask for that do not know the method.
    """

    #: The trainer that knows the procedure.
    trainer: ClassVar[str] = "nnUNetTrainerROICascade"

    def __init__(
        self, input_channels: int, num_classes: int, deep_supervision: bool = False, *, patch_size: Sequence[int]
    ):
        super().__init__()
        if deep_supervision:
            raise ValueError(
                f"{type(self).__name__} got deep supervision, as trainers ask for it that do not know the method; "
                f"expected the method's own. Train with -tr {self.trainer}."
            )
        self.input_channels, self.num_classes, self.patch_size = input_channels, num_classes, tuple(patch_size)
        self.labels = Labels()
        self.labels.seg_layers.register_buffer("ignored", torch.tensor(-1))
        margin = torch.zeros(num_classes, len(self.patch_size), dtype=torch.long)
        self.labels.seg_layers.register_buffer("margin", margin)
        self.labels.seg_layers.register_buffer("score_threshold", torch.full((num_classes,), 0.5))
        self.detections: list[dict[int, list[Detection]]] | None = None
        self._counts: dict[tuple[int, ...], int] = {}

    @property
    def margin(self) -> torch.Tensor:
        return self.labels.seg_layers.margin

    @property
    def score_threshold(self) -> torch.Tensor:
        return self.labels.seg_layers.score_threshold

    def set_labels(self, regions: bool, ignored: int | None) -> None:
        """Say whether the classes are regions, none of which is the background, and which label is ignored."""
        self.labels.seg_layers.are_regions.fill_(regions)
        self.labels.seg_layers.ignored.fill_(-1 if ignored is None else ignored)

    @property
    def has_regions(self) -> bool:
        return bool(self.labels.seg_layers.are_regions)

    @property
    def classes(self) -> range:
        """The channels of the logits that are foreground, which are the classes of every mapping here."""
        return range(0 if self.has_regions else 1, self.num_classes)

    def foreground(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a batch's targets say of each class.

        Args:
            target: ``(B, 1, *patch)`` labels, or with regions ``(B, regions, *patch)``, behind which nnU-Net puts a
                channel for the ignored label if there is one.

        Returns:
            Masks of :attr:`classes`, ``(B, classes, *patch)``, and of the voxels that are known, ``(B, *patch)``.
        """
        ignored = int(self.labels.seg_layers.ignored)
        if self.has_regions:
            masks = target[:, : self.num_classes].bool()
            known = ~target[:, self.num_classes].bool() if ignored >= 0 else torch.ones_like(masks[:, 0])
            return masks, known
        masks = torch.cat([target == label for label in self.classes], 1)
        return masks, target[:, 0] != ignored

    def give_masks(self, target: torch.Tensor) -> None:
        """Called with the batch's targets ahead of each training step, for detectors that learn from seeing them."""

    def load_pretrained(self) -> None:
        """Called when a training starts from nothing, for detectors that begin with weights of others."""

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> dict | torch.Tensor:
        """``x: (B, input_channels, *patch)``; see the class."""
        if self.training or x.is_meta:  # sizes and costs only
            return self.raw(x)
        found = self.detect(x)
        if self.detections is not None:
            self.detections.extend(found)
        return self.execute(x, [self._decision(sample, x.shape[2:]) for sample in found])[0]

    def decide(self, x: torch.Tensor) -> list[DetectorDecision]:
        """The boxes in each sample of ``x: (B, input_channels, *patch)``."""
        shape = tuple(x.shape[2:])
        cost = float(self.operations(DetectorDecision(), shape))
        return [replace(self._decision(sample, shape), cost=cost) for sample in self.detect(x)]

    def _decision(self, found: Mapping[int, Sequence[Detection]], shape: Sequence[int]) -> DetectorDecision:
        margin = self.margin.tolist()
        pairs = [(label, one) for label, each in found.items() for one in each]
        return DetectorDecision(
            tuple(enlarge(one.box, margin[label], shape) for label, one in pairs),
            tuple(label for label, _ in pairs),
            tuple(float(one.score) for _, one in pairs),
        )

    def execute(
        self, x: torch.Tensor, decisions: Sequence[DetectorDecision]
    ) -> tuple[torch.Tensor, list[DetectorDecision]]:
        """Logits ``(B, num_classes, *patch)`` with the boxes of each sample, and the decisions as they are."""
        rendered = []
        for decision in decisions:
            boxes: dict[int, list[Box]] = {}
            for label, box in zip(decision.classes, decision.boxes, strict=True):
                boxes.setdefault(label, []).append(box)
            rendered.append(render_boxes(boxes, x.shape[2:], self.num_classes, self.has_regions))
        return torch.stack(rendered).to(x.device), list(decisions)

    def profile_paths(self, patch: tuple[int, ...]) -> dict[str, DetectorDecision]:
        """Everything: a detector leaves nothing out."""
        return {EVERYTHING_ON: DetectorDecision(cost=float(self.operations(DetectorDecision(), patch)))}

    def operations(self, decision: DetectorDecision, patch: tuple[int, ...]) -> int:
        """Multiply-accumulates on a tile of ``patch``, whatever is found in it."""
        if patch not in self._counts:
            with torch.inference_mode(False):  # within it operators pass by the counter
                self._counts[patch] = count_operations(self, (1, self.input_channels, *patch)).total
        return self._counts[patch]

    def raw(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the layers say of ``x: (B, input_channels, *patch)``, for :meth:`loss`."""
        return self.layers(self.prepare(x))

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        """What :meth:`layers` gets for ``x: (B, input_channels, *patch)``; nothing is learnt here."""
        return x

    @abstractmethod
    def layers(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """:meth:`raw` of what :meth:`prepare` returned, which may be converted for another engine."""

    @abstractmethod
    def loss(self, outputs: dict, target: torch.Tensor) -> torch.Tensor:
        """A scalar; the boxes to find are those of ``target``, which :meth:`foreground` explains."""

    @torch.no_grad()
    def detect(self, x: torch.Tensor) -> list[dict[int, list[Detection]]]:
        """For each sample of ``x`` the boxes of each class whose score reaches its threshold, without the margin."""
        return self.read(self.raw(x), x.shape[2:])

    @abstractmethod
    def read(self, outputs: dict, patch: Sequence[int]) -> list[dict[int, list[Detection]]]:
        """What :meth:`detect` finds in patches of that size of which :meth:`raw` says ``outputs``."""
