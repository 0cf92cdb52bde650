"""Tiles on the regions of interest of an image, for a network that segments nothing else: that of the ROI cascade.

nnU-Net's tiles lie on the image, whatever is in it, so that a small region is in up to 27 of them, cut off in some.
Here a region has a tile of its own, in whose middle it lies, or where it is larger than one, tiles that overlap as
nnU-Net's do. Regions share a tile only where one crop serves them: crops are what costs, and a tile without is nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window

from nnunet_dyn.architectures.roi import Box, box_size, box_slices, intersection, merge, shifted

if TYPE_CHECKING:
    from nnunet_dyn.architectures.roi_segmentor import ROIDecision
    from nnunet_dyn.decisions import GatedNetwork

Size = tuple[int, ...]


@dataclass(frozen=True)
class RegionTile:
    """A tile of an image.

    Attributes:
        box: where it lies.
        region: the box, without margin, that it is for. The network decides on all that the gate has inside of it,
            which may be a part of another region, too; what the gate has outside of it has tiles of its own.
        decision: what is done with the tile, in its voxels, and what that costs.
    """

    box: Box
    region: Box
    decision: ROIDecision

    @property
    def slicer(self) -> tuple[slice, ...]:
        """What takes it out of (C, *shape), as nnU-Net's slicers do."""
        return (slice(None), *box_slices(self.box))


@dataclass(frozen=True)
class Crop:
    """What is run for a tile.

    Attributes:
        box: in voxels of the image.
        target: the part that it is run for.
        size: of what the network gets.
    """

    box: Box
    target: Box
    tile: RegionTile
    size: Size


def region_tiles(network: GatedNetwork, data: torch.Tensor, patch: Size, step_size: float) -> list[RegionTile]:
    """The tiles of an image in which something is segmented.

    The network decides on each as in training, and is shown the gate of one region.

    Args:
        data: (C, *shape), the gate behind the image; no smaller than a tile.
    """
    gate, shape = data[network.image_channels :], tuple(data.shape[1:])

    def count(size: Size) -> int:
        return math.prod(map(len, _steps(size, patch, step_size)))

    channels = ((channel > 0.5).cpu().numpy() for channel in gate)
    tiles = []
    for region, target in network.regions(channels, shape, patch, count):
        for box in tile_boxes(target, shape, patch, step_size):
            alone = _gate_of(region, gate, box)
            if alone.any():
                decision = network.counted(network.decide_gate(alone.cpu().numpy()))
                tiles.append(RegionTile(box, region, decision))
    return tiles


def tile_boxes(target: Box, shape: Sequence[int], patch: Size, step_size: float) -> list[Box]:
    """The tiles that cover ``target``, in an image of ``shape``, which is no smaller than a tile.

    Along an axis where one is enough, the target is in its middle, or as near to it as the image's border allows.

    >>> tile_boxes(((10, 14), (0, 2), (3, 15)), (32, 32, 32), (8, 8, 8), 0.5)
    [((8, 16), (0, 8), (3, 11)), ((8, 16), (0, 8), (7, 15))]
    """
    first = [
        start if stop - start > side else min(max(0, start - (side - (stop - start)) // 2), full - side)
        for (start, stop), side, full in zip(target, patch, shape, strict=True)
    ]
    whole = shifted(tuple((0, side) for side in patch), first)
    return [shifted(whole, step) for step in product(*_steps(box_size(target), patch, step_size))]


def _steps(size: Size, patch: Size, step_size: float) -> list[list[int]]:
    return compute_steps_for_sliding_window(tuple(map(max, size, patch)), patch, step_size)


def _gate_of(region: Box, gate: torch.Tensor, tile: Box) -> torch.Tensor:
    """(channels, *patch): where ``tile`` is segmented for ``region``, by the image's ``gate``, (channels, *shape)."""
    alone = torch.zeros((len(gate), *box_size(tile)), dtype=torch.bool, device=gate.device)
    if (inside := intersection(region, tile)) is not None:
        alone[_slicer(inside, tile)] = gate[_slicer(inside)] > 0.5
    return alone


def _slicer(box: Box, within: Box | None = None) -> tuple[slice, ...]:
    """What takes ``box`` out of (channels, *shape) of an image, or of what lies in it at ``within``."""
    return (slice(None), *box_slices(box if within is None else _seen_from(box, within)))


def _seen_from(box: Box, other: Box) -> Box:
    return shifted(box, [-start for start, _ in other])


def seen_in(tile: RegionTile, network: GatedNetwork, data: torch.Tensor) -> torch.Tensor:
    """(C, *patch) of ``data``, (C, *shape), on which ``network`` decides as on ``tile``."""
    seen = data[tile.slicer].clone()
    seen[network.image_channels :] = _gate_of(tile.region, data[network.image_channels :], tile.box)
    return seen


def crops_of_tiles(network: GatedNetwork, tiles: Sequence[RegionTile]) -> list[Crop]:
    """Of each tile in turn."""
    return [
        Crop(*(shifted(either, [start for start, _ in tile.box]) for either in pair), tile, network.run_size(pair[0]))
        for tile in tiles
        for pair in zip(tile.decision.boxes, tile.decision.targets, strict=True)
    ]


class RegionLogits:
    """The logits of an image: where crops lie, their mean, weighted as nnU-Net weights tiles; elsewhere background.

    Weights are a Gaussian over each crop, so that of two that overlap the one counts more that has the voxel in its
    middle. Where crops of one tile or of two regions overlap, that counts which has its target there, or else of one
    tile the last.

    Sums and weights are in single precision: near the corners of a tile, which in nnU-Net are those of the image and
    here lie anywhere, a weight in half precision would leave too few digits.

    Args:
        crops: all that will be added.
        background: (classes,) logits.
        shape: of the image.
        use_gaussian: otherwise all voxels of a crop weigh the same.
    """

    def __init__(
        self,
        crops: Sequence[Crop],
        background: torch.Tensor,
        shape: Size,
        use_gaussian: bool = True,
        device: torch.device | str = "cpu",
    ):
        self.crops, self.background, self.shape = crops, background.tolist(), shape
        self.use_gaussian, self.device = use_gaussian, device
        # Nothing is kept for the rest of the image, which may be large.
        self.boxes = merge([crop.box for crop in crops])
        self.sums = [torch.zeros((len(background), *box_size(box)), device=device) for box in self.boxes]
        self.weights = [torch.zeros(box_size(box), device=device) for box in self.boxes]

    def add(self, crop: Crop, logits: torch.Tensor) -> None:
        """Add (classes, *size) logits of ``crop``, at the size of its box."""
        (place,) = _that_meet(crop.box, self.boxes)
        weight = self._weight(crop).to(self.device)
        self.sums[place][_slicer(crop.box, self.boxes[place])] += logits.to(weight) * weight
        self.weights[place][box_slices(_seen_from(crop.box, self.boxes[place]))] += weight

    def _weight(self, crop: Crop) -> torch.Tensor:
        """Of each voxel of ``crop``; 0 where another one counts."""
        weight = _gaussian(box_size(crop.box)) if self.use_gaussian else torch.ones(box_size(crop.box))
        near = [self.crops[place] for place in _that_meet(crop.box, [other.box for other in self.crops])]
        if len(near) == 1:
            return weight
        counts = torch.ones_like(weight, dtype=torch.bool)

        def set_counts(box: Box, value: bool) -> None:
            if (inside := intersection(box, crop.box)) is not None:
                counts[box_slices(_seen_from(inside, crop.box))] = value

        of_tile = [other for other in near if other.tile is crop.tile]
        for later in of_tile[of_tile.index(crop) + 1 :]:
            set_counts(later.box, False)
        for other in near:
            if other.tile.region != crop.tile.region:
                set_counts(other.target, False)
        for other in of_tile:
            set_counts(other.target, other is crop)
        return weight * counts

    def mean(self) -> torch.Tensor:
        """(classes, *shape) in half precision, once all crops are added."""
        values = torch.tensor(self.background, dtype=torch.half, device=self.device)
        logits = values.view(-1, *(1,) * len(self.shape)).repeat(1, *self.shape)
        for box, sums, weight in zip(self.boxes, self.sums, self.weights, strict=True):
            for into, of_class, background in zip(logits[_slicer(box)], sums, self.background, strict=True):
                into.copy_(of_class.div_(weight).masked_fill_(weight == 0, background))
        return logits


def _that_meet(box: Box, others: Sequence[Box]) -> list[int]:
    """Which of ``others`` have voxels of ``box``."""
    start, stop = np.array(others).transpose(2, 0, 1)
    first, last = np.array(box).T
    return np.flatnonzero(((start < last) & (first < stop)).all(1)).tolist()


def _gaussian(size: Size) -> torch.Tensor:
    """(*size) single precision: nnU-Net's weights of a tile, as the product of those along each axis."""
    weight = torch.ones(())
    for side in size:
        weight = weight[..., None] * compute_gaussian((side,), 1 / 8, dtype=torch.float32, device=torch.device("cpu"))
    return weight
