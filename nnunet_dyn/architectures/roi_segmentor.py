"""Segmentation of regions of interest (ROIs): Kim et al. 2025, "Multi-Stage Hierarchical Feature Extraction for
Efficient 3D Medical Image Segmentation", Section 3.2.

:class:`ROISegmentor` runs any U-Net on the crops of a tile that a gate asks for, and on nothing else.
:class:`StageSkippingUNet` is the paper's segmentor, which leaves out the stages that a small ROI does not need.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from math import ceil, log2, prod
from pydoc import locate
from typing import ClassVar, Literal

import numpy as np
import torch
from dynamic_network_architectures.building_blocks.helper import (
    convert_conv_op_to_dim,
    get_matching_convtransp,
    get_matching_instancenorm,
)
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from nnunet_dyn.accounting import count_operations, training_memory
from nnunet_dyn.architectures.blocks import fast_norm_op, to_fast_layout
from nnunet_dyn.architectures.efficientnet import per_stage
from nnunet_dyn.architectures.fast_convs import fast_conv_op
from nnunet_dyn.architectures.roi import (
    Box,
    Labels,
    box_size,
    box_slices,
    component_boxes,
    connected_targets,
    end_at_border,
    enlarge,
    intersection,
    merge_nearest,
    mirrored_box,
    volume,
)
from nnunet_dyn.decisions import EVERYTHING_ON, EVERYTHING_SKIPPED, SKIP

Size = tuple[int, ...]

#: The deepest map of a crop has at least this many voxels an axis: instance normalisation refuses a single voxel.
_DEEPEST = 2
#: Crops are run one by one if together they have less than this share of the voxels of the crop that holds them all.
_CLEARLY_SMALLER = 0.8
#: More targets than these in one tile are speckle, of which the nearest are one.
_MOST_TARGETS = 32
#: So many boxes in one image are speckle, too. Each has a tile of its own, which takes milliseconds before it is run.
_MOST_REGIONS = 512

#: Logit of the background where no crop lies.
_BACKGROUND = 8.0

_INTERPOLATION = {2: "bilinear", 3: "trilinear"}


# --- boxes -------------------------------------------------------------------------------------------------------


def _joint(boxes: Sequence[Box]) -> Box:
    return tuple((min(a for a, _ in axis), max(b for _, b in axis)) for axis in zip(*boxes, strict=True))


def join(boxes: Sequence[Box], voxels: Callable[[Box], int]) -> list[Box]:
    """``boxes``, those of them as one that together would not be clearly smaller than their joint one.

    Args:
        voxels: what segmenting a box takes, no fewer than the box has.
    """

    found: dict[Box, int] = {}  # in order
    for box in boxes:
        taken = voxels(box)
        while found:
            ends, own = np.array(list(found)), np.array(box)
            joint = (np.maximum(ends[..., 1], own[:, 1]) - np.minimum(ends[..., 0], own[:, 0])).prod(1)
            # Segmenting a box takes its own voxels at least, so that most pairs are too far apart at sight.
            is_near = np.array(list(found.values())) + taken >= _CLEARLY_SMALLER * joint
            near = (tuple(map(tuple, ends[place].tolist())) for place in np.flatnonzero(is_near))
            for other in near:
                together = voxels(_joint((other, box)))
                if found[other] + taken >= _CLEARLY_SMALLER * together:
                    box, taken = _joint((other, box)), together
                    del found[other]
                    break
            else:
                break
        found[box] = taken
    if len(found) > 1 and sum(found.values()) >= _CLEARLY_SMALLER * voxels(_joint(list(found))):
        return [_joint(list(found))]
    return list(found)


def _gate_boxes(gate: Iterable[np.ndarray]) -> list[Box]:
    """The boxes that the channels of a gate, ``(*spatial)``, were filled with.

    A box of the detector may hold another label's, or meet it at an edge; it is a box of its own all the same.
    """
    return [
        box for channel in gate if channel.any() for box in component_boxes(*connected_targets(channel, connectivity=1))
    ]


def fit_box(box: Box, patch: Sequence[int], divisor: Sequence[int], least: Sequence[int], aligned: bool) -> Box:
    """The smallest crop around ``box`` whose sides are multiples of ``divisor``, inside a tile of ``patch`` voxels.

    >>> fit_box(((10, 15),), (64,), (8,), (16,), aligned=False)
    ((5, 21),)
    >>> fit_box(((10, 15),), (64,), (8,), (16,), aligned=True)
    ((8, 24),)

    Args:
        least: voxels an axis that the crop has at least, where the tile has them.
        aligned: also start at a multiple of ``divisor``, so that the crop lies on voxels at lower resolutions.
    """
    crop = []
    for (start, stop), full, step, smallest in zip(box, patch, divisor, least, strict=True):
        size = min(full, -(-max(stop - start, smallest) // step) * step)
        first = min(max(0, start - (size - (stop - start)) // 2), full - size)
        if aligned:
            first = min(start, full - size) // step * step
            if first + size < stop:
                size += step
        crop.append((first, first + size))
    return tuple(crop)


def threshold_index(size: float, stages: int, smallest: float) -> int:
    """Eq. 3: the first of ``stages`` stages that an ROI of ``size`` voxels a side needs, 1 to ``stages``.

    Stage k takes cubes of ``2 ** (stages - k) * smallest``. The paper's r is whole only for those; with the ceiling
    Eq. 2 holds, and the ROI is resampled to the largest cube that it is not smaller than.

    >>> [threshold_index(size, 3, 16) for size in (10, 16, 50, 64, 100)]
    [3, 3, 2, 1, 1]
    """
    return min(max(1, ceil(stages - log2(size / smallest))), stages)


@dataclass(frozen=True)
class ROIDecision:
    """What is done with one tile.

    Attributes:
        boxes: the crops that are run, in voxels of the tile. None: the tile is background.
        targets: the part of each crop that it is run for, the gate and its margin. Where crops overlap, this is what
            counts.
        stages: of each crop, the active stages of a network that skips some; empty for any other network.
        cost: multiply-accumulates of the crops as in :mod:`nnunet_dyn.accounting`; 0 before they are run, since looking
            at a gate takes none.
        review: whether an ROI, with its margin, ends at the border of the image; not known before :meth:`within`.
    """

    boxes: tuple[Box, ...] = ()
    targets: tuple[Box, ...] = ()
    stages: tuple[tuple[int, ...], ...] = ()
    cost: float = 0.0
    review: bool = False

    @property
    def action(self) -> str:
        return "crop" if self.boxes else SKIP

    def computed(self, size: Size) -> tuple[Box, ...]:
        """The crops."""
        return self.boxes

    def mirrored(self, axes: Sequence[int], size: Size) -> ROIDecision:
        """The same decision for the tile of ``size`` voxels flipped along ``axes``, 0 for its first spatial one."""
        boxes, targets = (
            tuple(mirrored_box(box, axes, size) for box in either) for either in (self.boxes, self.targets)
        )
        return replace(self, boxes=boxes, targets=targets)

    def within(self, image: Box) -> ROIDecision:
        """The same for a tile in which the image lies at ``image``, with ``review`` known."""
        return replace(self, review=end_at_border(self.targets, image))

    def to_json(self) -> dict:
        """The fields but for the boxes; ``macs`` is the cost of one pass."""
        return {
            "action": self.action,
            "stages": [list(active) for active in self.stages],
            "macs": round(self.cost),
            "review": self.review,
        }


# --- any network on its regions of interest ----------------------------------------------------------------------


class ROISegmentor(nn.Module):
    """Runs a network on the regions of interest of each tile; everything else is background.

    The channels behind the image are the gate: nnU-Net's one-hot encoding of the previous stage's segmentation, which a
    detector fills with boxes. Their union is segmented, and the image alone enters the network. Each part of a channel
    that is connected by faces is an ROI, grown by ``margin`` voxels and to sizes that the network takes; several ROIs
    are run as one crop where that costs hardly more, and only there. A tile without a gate is background at once.
    ``decide`` chooses, ``execute`` carries out.

    Under deep supervision crops start at multiples of the strides of the stages that run, so that they lie on voxels at
    these resolutions, and are stretched to voxels of coarser ones; without it they are as small as can be.

    In training a tile without a gate keeps a graph to the heads, with gradients of zero. Parameters that no crop of a
    batch needs get none: wrap with ``find_unused_parameters=True`` in DistributedDataParallel.

    Args:
        input_channels: those of the image and of the gate.
        image_channels: those of the image; all others are the gate.
        network_class: the class, or its dotted path, of a U-Net as nnU-Net's plans name them.
        margin: voxels around the gate that are segmented, too; nnU-Net's export interpolates between neighbours.
        mode: ``own`` keeps the ROI's resolution; ``paper`` resamples it to the cube that :func:`threshold_index`
            says for its longest side, of 16, 32 or 64 voxels, and the logits back.
        arch_kwargs: the other arguments of ``network_class``, with its ``strides`` and ``conv_op``.

    Attributes:
        decisions: set it to a list, and evaluation appends the :class:`ROIDecision` of each tile, its cost counted.

    Raises:
        ValueError: no gate channels, an unknown mode or network, a negative margin, ``paper`` mode around a network
            whose strides are too large for the smallest cube, or batch normalisation.
    """

    #: The trainer that knows the procedure.
    trainer: ClassVar[str] = "nnUNetTrainerROICascade"
    #: The cubes of ``paper`` mode: how many there are, and the smallest (N and s₀ of Eq. 3; Section 4.1).
    paper_cubes: ClassVar[tuple[int, int]] = (3, 16)

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        image_channels: int,
        network_class: str | type[nn.Module] = "nnunet_dyn.architectures.roi_segmentor.StageSkippingUNet",
        margin: int = 1,
        mode: Literal["own", "paper"] = "own",
        deep_supervision: bool = True,
        **arch_kwargs,
    ):
        super().__init__()
        if not 1 <= image_channels < input_channels:
            raise ValueError(
                f"ROISegmentor got {input_channels} input channels, {image_channels} of them the image; expected a "
                "gate behind the image. Train it as a configuration with a previous_stage."
            )
        if mode not in ("own", "paper"):
            raise ValueError(f"mode got {mode!r}; expected 'own' or 'paper'. Correct the plans.")
        if margin < 0:
            raise ValueError(f"margin got {margin}; expected 0 voxels or more. Correct the plans.")
        found = locate(network_class) if isinstance(network_class, str) else network_class
        if not isinstance(found, type):
            raise ValueError(
                f"network_class got {network_class!r}; expected the dotted path of a class that can be imported here. "
                "Correct the plans, or install the package that has it."
            )
        options = {"mode": mode} if "mode" in inspect.signature(found).parameters else {}
        self.network = found(
            input_channels=image_channels,
            num_classes=num_classes,
            deep_supervision=deep_supervision,
            **arch_kwargs,
            **options,
        )
        if (own := getattr(found, "initialize", None)) is not None:
            for module in self.network.modules():  # ``initialize`` sees one module at a time, not whose it is
                module.own_initialize = own
        self.image_channels, self.num_classes, self.margin, self.mode = image_channels, num_classes, margin, mode
        self.dimension = convert_conv_op_to_dim(arch_kwargs["conv_op"])
        strides = np.array([np.broadcast_to(stride, self.dimension) for stride in arch_kwargs["strides"]])
        self.divisor: Size = tuple(strides.prod(0).tolist())
        #: Voxels of the patch to one of each output, the largest output first.
        self.scales: list[Size] = [tuple(row) for row in strides.cumprod(0).tolist()][:-1]
        if mode == "paper" and not options and any(self.paper_cubes[1] % (_DEEPEST * step) for step in self.divisor):
            raise ValueError(
                f"paper mode got a network whose strides multiply to {self.divisor}; expected that they leave two "
                f"voxels or more of cubes of {self.paper_cubes[1]}, so {self.paper_cubes[1] // _DEEPEST} or a divisor "
                "of it. Take mode='own', a network of fewer stages, or StageSkippingUNet."
            )
        if any(isinstance(module, _BatchNorm) for module in self.network.modules()):
            raise ValueError(
                f"{found.__name__} got batch normalisation; expected another one, since statistics of crops, as many "
                "as a batch has, mean little, and processes that run different numbers of crops would wait for each "
                "other for ever. Set norm_op, or of an EfficientNet mbconv_norm='plan'."
            )
        self.labels = Labels()
        self.decisions: list[ROIDecision] | None = None
        self._counts: dict[Size, int] = {}

    # --- configuration ---

    @property
    def decoder(self) -> nn.Module:
        """The network's; nnU-Net sets its ``deep_supervision``."""
        return self.network.decoder

    def set_regions(self, regions: bool) -> None:
        """Say whether the classes are regions, none of which is the background."""
        self.labels.seg_layers.are_regions.fill_(regions)

    @property
    def background_logits(self) -> torch.Tensor:
        """The logits of voxels that no crop holds, ``(num_classes,)``."""
        are_regions = self.labels.seg_layers.are_regions
        logits = torch.full((self.num_classes,), -_BACKGROUND, device=are_regions.device)
        logits[0] = torch.where(are_regions, -_BACKGROUND, _BACKGROUND)
        return logits

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """The network by its own ``initialize`` (``network.apply(network.initialize)``)."""
        if (own := getattr(module, "own_initialize", None)) is not None:
            own(module)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> np.int64:
        """The network's for the whole patch, which is the worst case."""
        return self.network.compute_conv_feature_map_size(input_size)

    # --- forward ---

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """``x: (B, input_channels, *patch)`` → logits ``(B, num_classes, *patch)``, or under deep supervision those of
        every resolution, the largest first."""
        if x.is_meta:  # sizes and costs only: the whole patch
            return self.network(x[:, : self.image_channels])
        decisions = self.decide(x)
        if self.decisions is not None and not self.training:
            self.decisions.extend(map(self.counted, decisions))
        return self._run(x, decisions)

    @torch.no_grad()
    def decide(self, x: torch.Tensor) -> list[ROIDecision]:
        """What to do with each tile of a batch.

        Args:
            x: ``(B, input_channels, *patch)``; voxels above 1/2 in any channel of the gate are to be segmented.
        """
        gate = x[:, self.image_channels :]
        is_present = (gate.flatten(2).amax(2) > 0.5).cpu()  # of many classes few are in a tile
        return [
            self.decide_gate((tile[present] > 0.5).cpu().numpy()) if present.any() else ROIDecision()
            for tile, present in zip(gate, is_present, strict=True)
        ]

    def decide_gate(self, gate: np.ndarray) -> ROIDecision:
        """What to do with a tile, of which ``gate: (channels, *patch)`` says where to segment."""
        patch = gate.shape[1:]
        targets = [enlarge(box, self.margin, patch) for box in _gate_boxes(gate)]
        targets = merge_nearest(targets, _MOST_TARGETS)
        targets = join(targets, lambda box: volume(self.crop(box, patch)))
        return self._decision([self.crop(box, patch) for box in targets], targets)

    def regions(
        self, gate: Iterable[np.ndarray], shape: Size, patch: Size, count_tiles: Callable[[Size], int]
    ) -> list[tuple[Box, Box]]:
        """The boxes of an image's gate, each of which is best segmented in tiles of its own.

        Those are one that would not be clearly smaller apart, as in a tile. Of very many the nearest are one.

        Args:
            gate: its channels, ``(*shape)``.
            count_tiles: of ``patch`` voxels, for a box of some size.

        Returns:
            Each box, and what is segmented for it: the box and its margin.
        """
        boxes = merge_nearest(_gate_boxes(gate), _MOST_REGIONS)

        def with_margin(box: Box) -> Box:
            return enlarge(box, self.margin, shape)

        def voxels(box: Box) -> int:
            size = box_size(with_margin(box))
            in_tile = tuple((0, min(pair)) for pair in zip(size, patch, strict=True))
            return count_tiles(size) * volume(self.crop(in_tile, patch))

        return [(box, with_margin(box)) for box in join(boxes, voxels)]

    def _decision(self, boxes: Sequence[Box], targets: Sequence[Box]) -> ROIDecision:
        active = getattr(self.network, "active_stages", None)
        stages = tuple(active(self.run_size(box)) for box in boxes) if active else ()
        return ROIDecision(tuple(boxes), tuple(targets), stages)

    def counted(self, decision: ROIDecision) -> ROIDecision:
        """``decision`` with its cost."""
        return replace(decision, cost=float(sum(self.count(self.run_size(box)) for box in decision.boxes)))

    def crop(self, target: Box, patch: Sequence[int]) -> Box:
        """What is cut out of a tile of ``patch`` voxels to segment ``target``."""
        if self.mode == "paper":
            return target
        divisor, least = self._divisor(box_size(target))
        while True:
            box = fit_box(target, patch, divisor, least, aligned=self.decoder.deep_supervision)
            needed, least = self._divisor(box_size(box))  # the larger crop may need more stages
            if needed == divisor:
                return box
            divisor = needed

    def _divisor(self, size: Size) -> tuple[Size, Size]:
        """What an ROI of ``size`` must be a multiple of, and its least sides."""
        if (divisor := getattr(self.network, "divisor", None)) is not None:
            return divisor(size)
        return self.divisor, tuple(_DEEPEST * step for step in self.divisor)

    def run_size(self, box: Box) -> Size:
        """Voxels of the network's input for a crop."""
        size = box_size(box)
        if self.mode == "own":
            return size
        cubes, smallest = self.paper_cubes
        return (2 ** (cubes - threshold_index(max(size), cubes, smallest)) * smallest,) * self.dimension

    def execute(
        self, x: torch.Tensor, decisions: Sequence[ROIDecision]
    ) -> tuple[torch.Tensor | list[torch.Tensor], list[ROIDecision]]:
        """Carry out one decision a tile; crops of the same size are run as one batch.

        Args:
            x: ``(B, input_channels, *patch)``; the gate is not looked at.

        Returns:
            What :meth:`forward` does, and the decisions with their cost.
        """
        return self._run(x, decisions), [self.counted(decision) for decision in decisions]

    def profile_paths(self, patch: Size) -> dict[str, ROIDecision]:
        """A tile that is one ROI, and one without any."""
        whole = tuple((0, size) for size in patch)
        everything = self.counted(self._decision([whole], [whole]))
        return {EVERYTHING_ON: everything, EVERYTHING_SKIPPED: ROIDecision()}

    def operations(self, decision: ROIDecision, patch: Size) -> int:
        """Multiply-accumulates of ``decision``."""
        return round(self.counted(decision).cost)

    def _run(self, x: torch.Tensor, decisions: Sequence[ROIDecision]) -> torch.Tensor | list[torch.Tensor]:
        image, full = x[:, : self.image_channels], x.shape[2:]
        groups: dict[Size, list[tuple[int, int]]] = {}
        for tile, decision in enumerate(decisions):
            for index, box in enumerate(decision.boxes):
                groups.setdefault(self.run_size(box), []).append((tile, index))
        pieces: dict[tuple[int, int], list[torch.Tensor]] = {}
        for members in groups.values():
            crops = [self.cut(image[tile], decisions[tile].boxes[index]) for tile, index in members]
            logits = self.segment_crops(torch.stack(crops))
            logits = logits if isinstance(logits, (list, tuple)) else [logits]
            if self.mode == "paper":  # one resolution, that of the cube, whatever the output's
                logits = logits[:1] * len(self.scales)
            pieces |= {member: [level[place] for level in logits] for place, member in enumerate(members)}
        scales = self.scales if self.decoder.deep_supervision else self.scales[:1]
        outputs = []
        for level, scale in enumerate(scales):
            shape = [-(-size // step) for size, step in zip(full, scale, strict=True)]
            dtype = next((piece[level].dtype for piece in pieces.values()), x.dtype)
            output = self.background_logits.to(dtype).view(1, -1, *(1,) * len(full)).repeat(len(x), 1, *shape)
            for tile, decision in enumerate(decisions):
                _paste(output[tile], decision, [pieces[tile, i][level] for i in range(len(decision.boxes))], scale)
            outputs.append(output)
        if not pieces and torch.is_grad_enabled() and self.training:
            outputs[0] = outputs[0] + 0 * sum(parameter.sum() for parameter in self.decoder.seg_layers.parameters())
        return outputs if self.decoder.deep_supervision else outputs[0]

    def cut(self, image: torch.Tensor, box: Box) -> torch.Tensor:
        """The network's input, ``(image_channels, *size)``, for a crop of a tile's ``image: (C, *patch)``."""
        return _resize(image[(slice(self.image_channels), *box_slices(box))][None], self.run_size(box))[0]

    def restore(self, logits: torch.Tensor, box: Box) -> torch.Tensor:
        """The logits of a crop, ``(num_classes, *size)``, at the size of its ``box``: the way back from :meth:`cut`."""
        return _resize(logits[None], box_size(box))[0]

    def segment_crops(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """What the network says of crops of one size, ``(B, image_channels, *size)``; an engine puts itself here."""
        with without_benchmark():
            return self.network(x)

    def variant(self, size: Size) -> tuple[int, ...]:
        """What the network's operators depend on, of an input of ``size``: the active stages of a network that skips
        some, in ``paper`` mode the cube, or else nothing."""
        if self.mode == "paper":
            return tuple(size)
        active = getattr(self.network, "active_stages", None)
        return active(size) if active else ()

    def variants(self, patch: Size) -> dict[tuple[int, ...], tuple[Size, Size | None]]:
        """Of each :meth:`variant` that crops of tiles of ``patch`` voxels can be: one size, and the sides that all of
        its sizes are multiples of, ``None`` if there is no other."""
        if self.mode == "paper":
            cubes, smallest = self.paper_cubes
            sizes = [(2**cube * smallest,) * self.dimension for cube in range(cubes)]
            return {self.variant(size): (size, None) for size in sizes}
        cubes = getattr(self.network, "cubes", [])
        sizes = [tuple(patch), *(tuple(map(min, cube, patch)) for cube in cubes)]
        return {self.variant(size): (size, self._divisor(size)[0]) for size in sizes}

    def count(self, size: Size) -> int:
        """Multiply-accumulates of one input of ``size`` voxels, without deep supervision."""
        if size not in self._counts:
            modes = {module: module.training for module in self.network.modules()}
            supervised, self.decoder.deep_supervision = self.decoder.deep_supervision, False
            self.network.eval()
            try:
                with torch.inference_mode(False):  # within it operators pass by the counter
                    self._counts[size] = count_operations(self.network, (1, self.image_channels, *size)).total
            finally:
                self.decoder.deep_supervision = supervised
                for module, mode in modes.items():
                    module.training = mode
        return self._counts[size]


@contextmanager
def without_benchmark() -> Iterator[None]:
    """cuDNN does not time its algorithms in here, as nnU-Net has it do: of crops every size would be timed anew.

    ``torch.backends.cudnn.flags`` would set its other flags, too.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _resize(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """``x: (B, C, *spatial)`` by linear interpolation, or as it is."""
    if x.shape[2:] == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode=_INTERPOLATION[x.ndim - 2])


def _paste(output: torch.Tensor, decision: ROIDecision, pieces: Sequence[torch.Tensor], scale: Size) -> None:
    """Write the logits of each crop where it lies: ``output: (C, *spatial)``, at ``scale`` voxels of the tile to one.

    Where a crop is no whole number of voxels of ``output``, it is rounded up and the logits are resampled.
    """

    def lies(box: Box) -> Box:
        return tuple((start // step, -(-stop // step)) for (start, stop), step in zip(box, scale, strict=True))

    places = [lies(box) for box in decision.boxes]
    pieces = [_resize(piece[None], box_size(place))[0] for piece, place in zip(pieces, places, strict=True)]
    for piece, place in zip(pieces, places, strict=True):
        output[(slice(None), *box_slices(place))] = piece
    if any(intersection(*pair) for pair in combinations(places, 2)):
        for piece, place, target in zip(pieces, places, decision.targets, strict=True):
            inner = lies(target)
            within = [slice(a - p, b - p) for (a, b), (p, _) in zip(inner, place, strict=True)]
            output[(slice(None), *box_slices(inner))] = piece[(slice(None), *within)]


# --- the paper's segmentor ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hierarchy:
    """The stages of a :class:`StageSkippingUNet`.

    Attributes:
        widths: channels of the stem, then of each stage.
        blocks: refinement blocks of each stage, on the way down and again on the way up.
        expansion: how much wider the blocks are inside.
        kernel_sizes, strides: of the stem, then of each stage, per axis. The stem of stride p is a convolution of
            kernel p, and the head its transposed counterpart; at stride 1 it is an ordinary convolution.
        entries: N, the number of stages that an input can enter first; those behind run for every input.
        smallest: s₀, voxels per side of the smallest cube, which enters stage N.
        norm_op, norm_op_kwargs: the normalisation.
    """

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    expansion: int
    kernel_sizes: tuple[Size, ...]
    strides: tuple[Size, ...]
    entries: int
    smallest: int
    norm_op: type[nn.Module]
    norm_op_kwargs: dict

    def __post_init__(self):
        lengths = {len(self.widths), len(self.blocks) + 1, len(self.kernel_sizes), len(self.strides)}
        if len(lengths) != 1 or len(self.widths) < 2:
            raise ValueError(
                f"Got {len(self.widths)} widths, {len(self.kernel_sizes)} kernels and {len(self.strides)} strides for "
                f"{len(self.blocks)} stages; expected one for the stem and one a stage. Correct the plans."
            )
        if self.smallest < 1 or self.smallest % 4:
            raise ValueError(f"smallest got {self.smallest}; expected a multiple of 4 voxels. Correct the plans.")


def paper_hierarchy(dimension: int = 3) -> Hierarchy:
    """Three stages for cubes of 64, 32 and 16 voxels (Section 4.1), and the bottleneck of Slim UNETR behind them.

    The paper has no widths. These come near the parameters of its Table 5, 9.4, 10.3 and 10.5 million for cubes of 16,
    32 and 64 (here 9.3, 10.2 and 10.3 with one channel and two classes). Its 40, 154 and 276 million FLOPs are 43, 106
    and 265 million multiply-accumulates here, which are twice as many FLOPs if multiplication and addition are two.
    ``benchmarks/roi_stages.py`` counts both.
    """
    return Hierarchy(
        widths=(64, 40, 96, 232, 384),
        blocks=(1, 2, 2, 1),
        expansion=4,
        kernel_sizes=((4,) * dimension, *((3,) * dimension,) * 4),
        strides=((4,) * dimension, *((2,) * dimension,) * 4),
        entries=3,
        smallest=16,
        norm_op=LayerNorm,
        norm_op_kwargs={},
    )


class LayerNorm(nn.GroupNorm):
    """Normalisation over channels and voxels, as in Slim UNETR, whose lowest map is one voxel."""

    def __init__(self, channels: int):
        super().__init__(1, channels)


class StageSkippingUNet(nn.Module):
    """The paper's hierarchical segmentor: an input runs through the stages that its size needs, and no others.

    Stage k of N halves its input and takes cubes of up to 2^(N − k)·s₀ voxels. The first active stage r is the one with
    the smallest cube that holds the input (in ``paper`` mode inputs are cubes, so that this is Eq. 3). With the stem
    G₀ = stem(x), a gate a stage, and ⊕ for concatenation::

        F_{r-1} = gate_r(G₀)                F_k  = E_k(F_{k-1})               k = r … N
        F'_N = F_N                          F'_j = D_j(up(F'_{j+1}) ⊕ F_j)    j = N-1 … r      (Eq. 1)
        logits = head(G₀ ⊕ gate'_r(up(F'_r)))

    Stages 1 … r-1 and the gates of other stages run no operation and get no gradient. An E_k is a depthwise and a
    pointwise convolution, then refinement blocks; a D_j merges by a pointwise convolution, then refinement blocks; a
    gate is a pointwise convolution. Each of the pointwise ones is followed by normalisation and activation.

    In ``own`` mode the stages are the plan's, the first of which, at full resolution, is stem and head: N is
    ``n_stages - 1``. In ``paper`` mode they are :func:`paper_hierarchy`'s.

    Args:
        n_stages, features_per_stage, conv_op, kernel_sizes, strides: the plan's. ``paper`` mode takes ``conv_op``
            alone.
        mode: ``own`` or ``paper``.
        width: share of ``features_per_stage`` that the stages have; the blocks are wider inside.
        smallest: s₀ of ``own`` mode, in voxels. With strides of 2 the cubes are s₀, 2·s₀, 4·s₀, …
        deep_supervision: return the logits of every resolution of the plan, those of a small input's missing ones
            resampled. ``paper`` mode has one resolution.

    Raises:
        ValueError: an unknown mode, or stages that do not fit together.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        n_stages: int,
        features_per_stage: Sequence[int],
        conv_op: type[_ConvNd],
        kernel_sizes: int | Sequence,
        strides: int | Sequence,
        norm_op: type[nn.Module] | None = None,
        norm_op_kwargs: dict | None = None,
        nonlin: type[nn.Module] = nn.LeakyReLU,
        nonlin_kwargs: dict | None = None,
        mode: Literal["own", "paper"] = "own",
        width: float = 0.5,
        smallest: int = 8,
        deep_supervision: bool = False,
    ):
        super().__init__()
        if mode not in ("own", "paper"):
            raise ValueError(f"mode got {mode!r}; expected 'own' or 'paper'. Correct the plans.")
        dimension = convert_conv_op_to_dim(conv_op)
        if mode == "paper":
            hierarchy = paper_hierarchy(dimension)
        else:
            hierarchy = Hierarchy(
                widths=tuple(max(8, round(f * width / 8) * 8) for f in features_per_stage[:n_stages]),
                blocks=(1,) * (n_stages - 1),
                expansion=2,
                kernel_sizes=tuple(map(tuple, per_stage(kernel_sizes, n_stages, conv_op, "kernel_sizes"))),
                strides=tuple(map(tuple, per_stage(strides, n_stages, conv_op, "strides"))),
                entries=n_stages - 1,
                smallest=smallest,
                norm_op=fast_norm_op(norm_op or get_matching_instancenorm(conv_op)),
                norm_op_kwargs={"affine": True} | (norm_op_kwargs or {}),
            )
        self.hierarchy, self.mode, self.input_channels = hierarchy, mode, input_channels
        norm = partial(hierarchy.norm_op, **hierarchy.norm_op_kwargs)
        make = _Layers(conv_op, norm, partial(nonlin, **(nonlin_kwargs or {})))
        self.encoder = _Encoder(make, hierarchy, input_channels)
        self.decoder = _Decoder(make, hierarchy, num_classes, deep_supervision, has_levels=mode == "own")
        steps = np.array(hierarchy.strides)
        self._scales = [tuple(row) for row in steps.cumprod(0).tolist()][:-1]
        #: The largest input that enters each stage, and whether an earlier stage would make an axis of it smaller.
        self.cubes: list[Size] = []
        self._can_shrink: list[tuple[bool, ...]] = []
        for k in range(1, hierarchy.entries + 1):
            self.cubes.append(tuple((hierarchy.smallest * steps[k : hierarchy.entries].prod(0)).tolist()))
            self._can_shrink.append(tuple((steps[1:k].prod(0) > 1).tolist()))

    def active_stages(self, size: Sequence[int]) -> tuple[int, ...]:
        """The stages that an input of ``size`` voxels runs through, r and all behind it, counted from 1."""
        first = 1
        for k, (cube, can_shrink) in enumerate(zip(self.cubes, self._can_shrink, strict=True), 1):
            if all(side <= most or not can for side, most, can in zip(size, cube, can_shrink, strict=True)):
                first = k
        return tuple(range(first, len(self.hierarchy.blocks) + 1))

    def divisor(self, size: Sequence[int]) -> tuple[Size, Size]:
        """What the sides of an input of about ``size`` must be multiples of, and how long they must be at least."""
        steps = np.array(self.hierarchy.strides)
        step = steps[0] * steps[list(self.active_stages(size))].prod(0)
        return tuple(step.tolist()), tuple(np.maximum(_DEEPEST * step, self.hierarchy.smallest).tolist())

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """``(B, C, *size)`` → logits ``(B, num_classes, *size)``; under deep supervision of each resolution."""
        size = x.shape[2:]
        outputs = self.enter(x, self.active_stages(size)[0])
        if self.mode == "paper" or not self.decoder.deep_supervision:
            return outputs[0]
        outputs += outputs[-1:] * (len(self._scales) - len(outputs))
        return [
            _resize(output, [-(-side // step) for side, step in zip(size, scale, strict=True)])
            for output, scale in zip(outputs, self._scales, strict=True)
        ]

    def enter(self, x: torch.Tensor, first: int) -> list[torch.Tensor]:
        """The logits of ``x: (B, C, *size)`` by stage ``first`` and those behind it, the largest first."""
        stem, features = self.encoder(to_fast_layout(x), first)
        return self.decoder(stem, features, first)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> np.int64:
        """Memory of one training sample, in nnU-Net's unit (``blocks.kept_maps``): half of the elements kept."""
        kept = training_memory(self, (1, self.input_channels, *input_size))
        return np.int64(kept // (2 * torch.float32.itemsize))

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """He initialisation as in nnU-Net."""
        InitWeights_He(1e-2)(module)


class _Layers:
    """Makes the layers of the plan's kind."""

    def __init__(self, conv_op: type[_ConvNd], norm, nonlin):
        self.conv_op, self.norm, self.nonlin = fast_conv_op(conv_op), norm, nonlin
        self.transpconv_op = get_matching_convtransp(conv_op)

    def pointwise(self, inputs: int, outputs: int) -> nn.Module:
        return self.conv_op(inputs, outputs, 1, bias=False)

    def depthwise(self, channels: int, kernel: Size, stride: Size | int = 1) -> nn.Module:
        return self.conv_op(channels, channels, kernel, stride, [k // 2 for k in kernel], groups=channels, bias=False)

    def conv(self, inputs: int, outputs: int, kernel: Size) -> nn.Sequential:
        conv = self.conv_op(inputs, outputs, kernel, 1, [k // 2 for k in kernel], bias=False)
        return nn.Sequential(conv, self.norm(outputs), self.nonlin())

    def channels(self, inputs: int, outputs: int) -> nn.Sequential:
        """Pointwise convolution, normalisation and activation.

        Without the last the way through the stages would be all but linear.
        """
        return nn.Sequential(self.pointwise(inputs, outputs), self.norm(outputs), self.nonlin())

    def refine(self, channels: int, count: int, kernel: Size, reduction: Size, expansion: int) -> nn.Sequential:
        return nn.Sequential(*(RefineBlock(self, channels, kernel, reduction, expansion) for _ in range(count)))


class RefineBlock(nn.Module):
    """The block of Slim UNETR (Pang et al. 2023), six branches, each beside a shortcut: ``(B, C, *spatial)``.

    Depthwise convolution as positional encoding; pointwise, depthwise and pointwise convolution (local
    representations); two linear layers; positional encoding; attention among every ``reduction``-th voxel, spread by a
    depthwise transposed convolution; two linear layers. Here every branch but the encodings begins with the plan's
    normalisation, and its activation stands in for GELU.
    """

    def __init__(self, make: _Layers, channels: int, kernel: Size, reduction: Size, expansion: int):
        super().__init__()

        def linear() -> nn.Sequential:
            inside = expansion * channels
            layers = make.pointwise(channels, inside), make.nonlin(), make.pointwise(inside, channels)
            return nn.Sequential(make.norm(channels), *layers)

        local = nn.Sequential(
            make.norm(channels),
            make.pointwise(channels, channels),
            make.depthwise(channels, kernel),
            make.norm(channels),
            make.pointwise(channels, channels),
        )
        self.branches = nn.ModuleList(
            [
                make.depthwise(channels, kernel),
                local,
                linear(),
                make.depthwise(channels, kernel),
                SparseAttention(make, channels, reduction),
                linear(),
            ]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for branch in self.branches:
            x = x + branch(x)
        return x


class SparseAttention(nn.Module):
    """Attention among every ``reduction``-th voxel, its result spread over the voxels between: ``(B, C, *spatial)``.

    Slim UNETR's global sparse transformer and local reverse diffusion.
    """

    def __init__(self, make: _Layers, channels: int, reduction: Size):
        super().__init__()
        self.heads = max(heads for heads in (1, 2, 4, 8) if channels % heads == 0 and heads <= max(1, channels // 24))
        self.reduction = reduction
        self.norm = make.norm(channels)
        self.query_key_value = make.pointwise(channels, 3 * channels)
        self.spread = make.transpconv_op(channels, channels, reduction, reduction, groups=channels, bias=False)
        self.norm_spread = make.norm(channels)
        self.merge = make.pointwise(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        x = x[(..., *(slice(None, None, step) for step in self.reduction))]
        size = x.shape[2:]
        split = self.query_key_value(x).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(3, 4)
        query, key, value = split.unbind(1)
        x = F.scaled_dot_product_attention(query, key, value).transpose(2, 3).flatten(1, 2).unflatten(2, size)
        return self.merge(self.norm_spread(self.spread(x)))


class _Encoder(nn.Module):
    """Stem, gates into each stage, and the stages on the way down."""

    def __init__(self, make: _Layers, hierarchy: Hierarchy, input_channels: int):
        super().__init__()
        widths, strides, kernels = hierarchy.widths, hierarchy.strides, hierarchy.kernel_sizes
        if prod(strides[0]) == 1:
            self.stem = make.conv(input_channels, widths[0], kernels[0])
        else:
            patches = make.conv_op(input_channels, widths[0], strides[0], strides[0], bias=False)
            self.stem = nn.Sequential(patches, make.norm(widths[0]))
        self.gates, self.stages = nn.ModuleList(), nn.ModuleList()
        for k, count in enumerate(hierarchy.blocks):
            if k < hierarchy.entries:
                self.gates.append(make.channels(widths[0], widths[k]))
            down = make.depthwise(widths[k], kernels[k + 1], strides[k + 1]), *make.channels(widths[k], widths[k + 1])
            refine = make.refine(widths[k + 1], count, kernels[k + 1], _reduction(strides, k + 1), hierarchy.expansion)
            self.stages.append(nn.Sequential(*down, *refine))

    def forward(self, x: torch.Tensor, first: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What the stem makes of ``x``, and the features of the stages from ``first`` on."""
        stem = self.stem(x)
        x, features = self.gates[first - 1](stem), []
        for stage in self.stages[first - 1 :]:
            x = stage(x)
            features.append(x)
        return stem, features


class _Decoder(nn.Module):
    """The stages on the way up, gates out of each stage, and the heads."""

    def __init__(self, make: _Layers, hierarchy: Hierarchy, num_classes: int, deep_supervision: bool, has_levels: bool):
        super().__init__()
        self.deep_supervision, self.has_levels = deep_supervision, has_levels
        widths, strides, kernels = hierarchy.widths, hierarchy.strides, hierarchy.kernel_sizes
        self.transpconvs, self.stages, self.gates = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for k, count in enumerate(hierarchy.blocks):
            self.transpconvs.append(
                make.transpconv_op(widths[k + 1], widths[k], strides[k + 1], strides[k + 1], bias=False)
            )
            if k < hierarchy.entries:
                self.gates.append(make.channels(widths[k], widths[0]))
            if k + 1 < len(hierarchy.blocks):
                width = widths[k + 1]
                refine = make.refine(width, count, kernels[k + 1], _reduction(strides, k + 1), hierarchy.expansion)
                self.stages.append(nn.Sequential(*make.channels(2 * width, width), *refine))
        heads = [make.conv_op(width, num_classes, 1) for width in widths[-2:0:-1]] if has_levels else []
        if prod(strides[0]) == 1:
            self.final = make.conv(2 * widths[0], widths[0], kernels[0])
            heads.append(make.conv_op(widths[0], num_classes, 1))
        else:
            self.final = make.channels(2 * widths[0], widths[0])
            heads.append(make.transpconv_op(widths[0], num_classes, strides[0], strides[0]))
        self.seg_layers = nn.ModuleList(heads)

    def forward(self, stem: torch.Tensor, features: list[torch.Tensor], first: int) -> list[torch.Tensor]:
        """Logits, the largest first."""
        x, outputs = features[-1], []
        for k in reversed(range(first - 1, len(self.transpconvs) - 1)):
            x = self.stages[k](torch.cat((self.transpconvs[k + 1](x), features[k + 1 - first]), 1))
            if self.deep_supervision and self.has_levels:
                outputs.insert(0, self.seg_layers[len(self.stages) - 1 - k](x))
        x = self.gates[first - 1](self.transpconvs[first - 1](x))
        return [self.seg_layers[-1](self.final(torch.cat((x, stem), 1))), *outputs]


def _reduction(strides: Sequence[Size], k: int) -> Size:
    """How sparse stage k's attention is: as its map after the next two stages, and so divides it."""
    return tuple(np.array(strides)[k + 1 : k + 3].prod(0).tolist())
