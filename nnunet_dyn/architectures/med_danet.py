"""Med-DANet V2: Shen et al. 2023, "Med-DANet V2: A Flexible Dynamic Architecture for Efficient Medical Volumetric
Segmentation", around any 2D U-Net.

Per slice, a policy network chooses to skip it, to segment a crop of it or all of it; a position network places the
crop; before each stage of the U-Net a selector chooses the width in bits. :meth:`MedDANetV2.decide` makes a
:class:`Decision` a slice and :meth:`MedDANetV2.execute` carries it out, so that what was not chosen is not computed.
``docs/med_danet.md`` has what differs from the paper and why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from math import log, prod
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from dynamic_network_architectures.building_blocks.helper import get_matching_convtransp
from dynamic_network_architectures.initialization.weight_init import InitWeights_He, init_last_bn_before_add_to_0
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torchvision.models import ShuffleNetV2

from nnunet_dyn.accounting import count_operations, training_memory
from nnunet_dyn.architectures.blocks import kept_maps, strided_size, without_autocast
from nnunet_dyn.decisions import EVERYTHING_ON, EVERYTHING_SKIPPED
from nnunet_dyn.quantization import FULL_PRECISION, quantized
from nnunet_dyn.safety import NEVER

#: Size of a skipped slice's logits. Averages over tiles and flips in half precision neither overflow nor lose it.
SKIP_LOGIT = 8.0
#: Both sides of a slice are at least this long where the policy and the position network see it: four of their five
#: halvings leave batch normalisation more than one value even for a batch of one.
_SMALLEST_VIEW = 64
#: What five halvings divide.
_VIEW_STEP = 32
#: Which way of deciding weights are trained for; to be raised where scores or places change their meaning.
_DECIDING = 2
#: How near to a threshold a decision deserves a look, in logits.
_REVIEW = 0.5

Size = tuple[int, int]
Box = tuple[Size, Size]
Run = Callable[..., torch.Tensor]


# --- what can be chosen ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """One part of the training.

    Attributes:
        share: of all epochs, relative to the other phases in which something learns that the network has; the last
            phase has an epoch at least.
        learns: parts of the network whose parameters change, of :data:`PARTS`.
        random_centres: crops are placed at random, not by the position network.
        quantised: stages run at the widths that the selectors choose, else in full precision.
        cost: whether the cost is part of the loss.
        segments: whether anything is segmented; if not, what decides learns from guidance alone, at a fraction of the
            time.
        rate: of learning, relative to the trainer's.

    Every choice that runs counts in the loss, and while the policy learns, so does what it mixes.
    """

    name: str
    share: float
    learns: frozenset[str]
    random_centres: bool
    quantised: bool
    cost: bool
    segments: bool = True
    rate: float = 1.0


#: The parts that a :class:`Phase` may train.
PARTS = ("segmentation", "policy", "position", "selectors")

#: Phases by name. ``paper`` is Section 3.5 with the lengths of Section 4.1, ``published`` what the authors' code does.
#: ``guided`` is for trainings of hours: what decides learns first, in many cheap epochs, and crops are never placed at
#: random, so that choosing them can pay from the start of the segmentation.
SCHEDULES: dict[str, tuple[Phase, ...]] = {
    "paper": (
        Phase("full precision", 200 / 350, frozenset({"segmentation", "policy"}), True, False, True),
        Phase("position and bits", 100 / 350, frozenset({"segmentation", "position", "selectors"}), False, True, True),
        Phase("everything", 50 / 350, frozenset(PARTS), False, True, True),
    ),
    "published": (
        Phase("full precision", 150 / 350, frozenset({"segmentation", "position"}), False, False, False),
        Phase("bits", 150 / 350, frozenset({"segmentation", "position", "selectors"}), False, True, True),
        Phase("policy", 50 / 350, frozenset({"policy"}), False, True, True),
    ),
    "guided": (
        Phase("deciding", 0.80, frozenset({"policy", "position"}), False, False, False, segments=False, rate=15.0),
        Phase("full precision", 0.12, frozenset({"segmentation", "policy", "position"}), False, False, True, rate=5.0),
        Phase("bits", 0.04, frozenset({"segmentation", "position", "selectors"}), False, True, True, rate=5.0),
        Phase("everything", 0.04, frozenset(PARTS), False, True, True, rate=5.0),
    ),
}


@dataclass(frozen=True)
class MedDANetOptions:
    """The configuration of the method, as plans have it under ``med_danet``.

    Attributes:
        policy_space: out of ``"skip"``, crop sizes in voxels, and ``"whole"`` (Table 3d). Without ``"skip"`` and
            crops there is no policy network.
        bits: widths that the selectors choose from (Table 3c); with one width there are no selectors, and
            ``(32,)`` is full precision.
        quantise: the stages that have a selector, ``"all"`` or, as behind the paper's Table 3, ``"encoder"``.
        cost_weight: λ' of the cost, which is 1 for the whole slice in full precision, per summed class Dice. The
            paper's λ = 0.06 weighs 17 GFLOPs, so that 1.0 is its counterpart (Table 3b: 0.7 to 1.7).
        guidance: weight of terms that the paper does not have: the cross-entropy of the cheapest choice that should
            lose nothing, which is to skip the slices without foreground as the predecessor did (Eq. 3) and to crop
            where a crop holds it, the distance between a crop and the nearest one centred on the foreground, and for
            both networks the cross-entropy of coarse maps of the foreground. With 0 policies tend to skip everything,
            since that is better than an untrained segmentation, and gradients through sampling see no further than a
            voxel. One label a slice teaches little; the maps have hundreds.
        view_stride: by how much slices are averaged for the policy and the position network.
        schedule: the training phases, a key of :data:`SCHEDULES`.

    Raises:
        ValueError: an empty or repeated choice, a width that cannot be executed, a negative weight.
    """

    policy_space: tuple[str | int, ...] = ("skip", 96, "whole")
    bits: tuple[int, ...] = (8, 16)
    quantise: Literal["all", "encoder"] = "all"
    cost_weight: float = 1.0
    guidance: float = 1.0
    view_stride: int = 1
    schedule: str = "paper"

    def __post_init__(self):
        for name in ("policy_space", "bits"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

        def expect(condition: bool, name: str, expected: str) -> None:
            if not condition:
                raise ValueError(f"med_danet: {name} got {getattr(self, name)!r}; expected {expected}.")

        choices = [c for c in self.policy_space if c not in ("skip", "whole")]
        expect(
            all(_is_whole_number(c, 1) for c in choices) and len(set(self.policy_space)) == len(self.policy_space),
            "policy_space",
            "different ones of 'skip', crop sizes in voxels, and 'whole'",
        )
        expect(bool(set(self.policy_space) - {"skip"}), "policy_space", "a crop size or 'whole' to segment with")
        expect(
            bool(self.bits)
            and len(set(self.bits)) == len(self.bits)
            and all(_is_whole_number(b, 2) and (b <= 16 or b == FULL_PRECISION) for b in self.bits),
            "bits",
            f"different widths from 2 to 16, or {FULL_PRECISION}",
        )
        expect(self.quantise in ("all", "encoder"), "quantise", "'all' or 'encoder'")
        expect(self.cost_weight >= 0, "cost_weight", "0 or more")
        expect(self.guidance >= 0, "guidance", "0 or more")
        expect(_is_whole_number(self.view_stride, 1), "view_stride", "a whole number above 0")
        expect(self.schedule in SCHEDULES, "schedule", f"one of {', '.join(SCHEDULES)}")
        expect(self.schedule != "guided" or self.guidance > 0, "guidance", "more than 0 for the schedule 'guided'")

    @property
    def crops(self) -> tuple[int, ...]:
        return tuple(choice for choice in self.policy_space if choice not in ("skip", "whole"))


def _is_whole_number(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True)
class Decision:
    """What is done with one slice.

    Attributes:
        action: ``skip`` answers background, ``crop`` segments ``box``, ``whole`` all of the slice.
        box: first row or column and the one behind the last, per axis; ``None`` unless it is a crop.
        bits: width of each stage, encoder first; ``None`` lets the selectors choose, empty if nothing is segmented.
        cost: multiply-accumulates as in :mod:`nnunet_dyn.accounting`, those of a stage times its bits / 32, with the
            networks that decide.
        skip_probability, crop_probability: the policy's; the latter of the crop it likes best, among what is not skip.
        review: whether a probability that counted is within half a logit of its threshold, so that the slice deserves
            a look.
        deciding: what the networks that decided cost, which is part of ``cost``.
    """

    action: Literal["skip", "crop", "whole"]
    box: Box | None = None
    bits: tuple[int, ...] | None = None
    cost: float = 0.0
    skip_probability: float = 0.0
    crop_probability: float = 0.0
    review: bool = False
    deciding: float = 0.0

    def mirrored(self, axes: Sequence[int], size: Size) -> Decision:
        """The same decision for the slice of ``size`` voxels flipped along ``axes``, 0 for rows and 1 for columns."""
        if self.box is None:
            return self
        box = tuple(
            (size[axis] - stop, size[axis] - start) if axis in axes else (start, stop)
            for axis, (start, stop) in enumerate(self.box)
        )
        return replace(self, box=box)

    def within(self, image: Box) -> Decision:
        """The same decision: it does not depend on where the slice lies."""
        return self

    def computed(self, size: Size) -> tuple[Box, ...]:
        """What is segmented of a slice of ``size`` voxels."""
        if self.action == "skip":
            return ()
        return (self.box or tuple((0, side) for side in size),)

    def to_json(self) -> dict:
        """The fields but for the box; ``macs`` is the cost of one pass."""
        return {
            "action": self.action,
            "bits": None if self.bits is None else list(self.bits),
            "macs": round(self.cost),
            "skip_probability": round(self.skip_probability, 6),
            "crop_probability": round(self.crop_probability, 6),
            "review": self.review,
        }


def _is_near(probability: float, threshold: float) -> bool:
    """Whether the two are within :data:`_REVIEW` in logits, where probabilities near 0 and 1 do not crowd."""
    if not (0 < probability < 1 and 0 < threshold < 1):
        return probability == threshold
    return abs(log(probability / (1 - probability)) - log(threshold / (1 - threshold))) < _REVIEW


def crop_size(crop: int, patch: Sequence[int], divisor: Sequence[int]) -> Size:
    """The size of a crop of ``crop`` voxels in a slice of ``patch`` voxels.

    An axis that is not longer than the crop keeps the whole slice, or 3/4 of it if a U-Net whose strides multiply to
    ``divisor`` can take that.

    >>> crop_size(96, (256, 112), (8, 8))
    (96, 96)
    >>> crop_size(96, (112, 64), (8, 8))
    (96, 48)

    Raises:
        ValueError: the crop is larger than the slice on every axis, leaves nothing out, or the U-Net cannot take it.
    """
    patch = tuple(map(int, patch))  # nnU-Net plans with numpy's numbers
    if all(crop > size for size in patch):
        raise ValueError(
            f"med_danet: the crop of {crop} voxels is larger than the patch, {patch}; expected a crop that is "
            "smaller on one axis at least. Set a smaller one in policy_space."
        )
    result = []
    for size, step in zip(patch, divisor, strict=True):
        smaller = size * 3 // 4
        fits = size * 3 % 4 == 0 and smaller % step == 0 and smaller >= 2 * step
        if size > crop and (crop % step or crop < 2 * step):
            raise ValueError(
                f"med_danet: policy_space got a crop of {crop} voxels; expected a multiple of the U-Net's strides, "
                f"{step}, and {2 * step} at least. Take {max(2 * step, round(crop / step) * step)}, or a U-Net with "
                "fewer stages."
            )
        result.append(crop if size > crop else smaller if fits else size)
    if tuple(result) == patch:
        raise ValueError(
            f"med_danet: the crop of {crop} voxels leaves nothing of the patch {patch} out; expected a smaller "
            "one. Set it in policy_space."
        )
    return tuple(result)


# --- crop and restoration ----------------------------------------------------------------------------------------


def _sampling(corner: torch.Tensor, size: int, full: int) -> torch.Tensor:
    """Weights of bilinear sampling at ``corner + 0 … size - 1``: ``(B,)`` → ``(B, size, full)``."""
    at = corner.unsqueeze(1) + torch.arange(size, device=corner.device)
    return torch.relu(1 - (at.unsqueeze(2) - torch.arange(full, device=corner.device)).abs())


def crop_at(x: torch.Tensor, corner: torch.Tensor, size: Size) -> torch.Tensor:
    """Eq. 5: cut ``size`` out of ``x`` at a continuous corner by bilinear sampling.

    Args:
        x: ``(B, C, H, W)``.
        corner: row and column of the crop's first voxel, ``(B, 2)``; it gets a gradient.

    Returns:
        ``(B, C, *size)``; at whole numbers exactly ``x[..., row : row + size[0], column : column + size[1]]``.
    """
    rows, columns = (_sampling(corner[:, axis], size[axis], x.shape[2 + axis]) for axis in (0, 1))
    return rows.unsqueeze(1) @ x @ columns.unsqueeze(1).transpose(2, 3)


def restore_at(x: torch.Tensor, corner: torch.Tensor, full: Size) -> torch.Tensor:
    """Place the crop ``x`` at ``corner`` of a zero map of size ``full``: the transpose of :func:`crop_at`."""
    rows, columns = (_sampling(corner[:, axis], x.shape[2 + axis], full[axis]) for axis in (0, 1))
    return rows.unsqueeze(1).transpose(2, 3) @ x @ columns.unsqueeze(1)


def at_whole_voxels(sample: Run, x: torch.Tensor, corner: torch.Tensor, size: Size) -> torch.Tensor:
    """:func:`crop_at` or :func:`restore_at` at the nearest whole voxels, with the corner's gradient of where it is.

    Inference cuts whole voxels, and bilinear sampling between them smooths: a network that is trained on smoothed crops
    alone errs on others.
    """
    at_nearest = sample(x, corner.detach().round(), size)
    if not corner.requires_grad:
        return at_nearest
    moved = sample(x.detach(), corner, size)
    return at_nearest + (moved - moved.detach())


def corner_around(centre: torch.Tensor, size: Sequence[int], full: Sequence[int]) -> torch.Tensor:
    """First row and column, not rounded, of crops of ``size`` in slices of ``full`` voxels.

    ``centre: (B, 2)``, in voxels, is in their middle, or as near to it as they can be. The gradient passes straight
    through to a centre beyond that, or it would never come back.
    """
    size, full = (torch.tensor([*sides]).to(centre) for sides in (size, full))
    corner = centre - size / 2
    inside = torch.minimum(corner.clamp(min=0), full - size)
    return inside.detach() + (corner - corner.detach())


def _cut(x: torch.Tensor, boxes: Sequence[Box]) -> torch.Tensor:
    pieces = [slice_[:, r0:r1, c0:c1] for slice_, ((r0, r1), (c0, c1)) in zip(x, boxes, strict=True)]
    return torch.stack(pieces)


def _paste(x: torch.Tensor, boxes: Sequence[Box], full: Size) -> torch.Tensor:
    result = x.new_zeros(*x.shape[:2], *full)
    for target, piece, ((r0, r1), (c0, c1)) in zip(result, x, boxes, strict=True):
        target[:, r0:r1, c0:c1] = piece
    return result


# --- networks that decide ----------------------------------------------------------------------------------------


class GuidedShuffleNet(ShuffleNetV2):
    """Torchvision's ShuffleNetV2 0.5×, which may also say where there is foreground (``guidance``).

    Args:
        guided: whether it has the 1×1 convolutions for that, at an eighth, a sixteenth and a thirty-second of the view.
    """

    def __init__(self, input_channels: int, outputs: int, guided: bool):
        widths = [24, 48, 96, 192, 1024]
        super().__init__([4, 8, 4], widths, num_classes=outputs)
        self.conv1[0] = nn.Conv2d(input_channels, self.conv1[0].out_channels, 3, 2, 1, bias=False)
        self.where = nn.ModuleList(nn.Conv2d(channels, 1, 1) for channels in (*widths[1:3], widths[-1]) if guided)
        for convolution in self.where:
            convolution.own_initialize = _start_with_background

    def with_maps(self, view: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """``(B, C, H, W)`` → what :meth:`forward` returns, and logits ``(B, 1, H', W')`` of foreground in each cell,
        the finest first; without guidance there are none."""
        features = self._features(view)
        return self.fc(features[-1].mean((2, 3))), self._maps(features)

    def _features(self, view: torch.Tensor) -> list[torch.Tensor]:
        eighth = self.stage2(self.maxpool(self.conv1(view)))
        sixteenth = self.stage3(eighth)
        return [eighth, sixteenth, self.conv5(self.stage4(sixteenth))]

    def _maps(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        return [where(x) for where, x in zip(self.where, features, strict=False)]


class PositionNetwork(GuidedShuffleNet):
    """Where crops lie in a slice, ``(B, 2)``.

    With guidance that is the middle of the foreground in the finest map, relative to the slice: features averaged over
    the slice, from which the published network answers, say little of places. Each map is the sum of what its own
    features say and of the coarser map. Without guidance it is the crop's corner, relative to the room that it has.
    """

    def __init__(self, input_channels: int, guided: bool):
        super().__init__(input_channels, 2, guided)
        if guided:
            self.fc = nn.Identity()

    def forward(self, view: torch.Tensor) -> torch.Tensor:
        return self.with_maps(view)[0]

    def with_maps(self, view: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        features = self._features(view)
        maps = self._maps(features)
        if not maps:
            return torch.sigmoid(self.fc(features[-1].mean((2, 3)))), []
        for finer in (1, 0):
            size = maps[finer].shape[2:]
            maps[finer] = maps[finer] + F.interpolate(maps[finer + 1], size=size, mode="bilinear")
        foreground = torch.sigmoid(maps[0][:, 0])
        middles = []
        for axis in (1, 2):
            along = foreground.sum(3 - axis) + 1e-6  # of nothing the middle is that of the slice
            cells = (torch.arange(along.shape[1], device=along.device) + 0.5) / along.shape[1]
            middles.append((along * cells).sum(1) / along.sum(1))
        return torch.stack(middles, 1), maps


def _start_with_background(convolution: nn.Conv2d) -> None:
    """Little foreground everywhere, since it is rare."""
    nn.init.normal_(convolution.weight, std=0.02)
    nn.init.constant_(convolution.bias, -2.0)


class BitSelector(nn.Module):
    """Probabilities of the widths of one stage, from the standard deviation of each channel of the stage's input and
    the mean absolute gradient of each channel of the image (Section 3.4)."""

    def __init__(self, stage_channels: int, image_channels: int, widths: int):
        super().__init__()
        self.linear = nn.Linear(stage_channels + image_channels, widths)

    def forward(self, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """``x: (B, C, H, W)``, ``gradient: (B, image channels)`` → ``(B, widths)``. The features get no gradient."""
        spread = x.detach().float().flatten(2).std(2)
        return torch.softmax(self.linear(torch.cat((spread, gradient), 1)), 1)


def image_gradient(x: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of neighbouring voxels: ``(B, C, H, W)`` → ``(B, C)``."""
    return x.diff(dim=2).abs().mean((2, 3)) + x.diff(dim=3).abs().mean((2, 3))


def straight_through(probabilities: torch.Tensor) -> torch.Tensor:
    """One-hot of the largest entry of each row; its gradient is that of ``probabilities`` (Eq. 7): ``(B, K)``."""
    chosen = F.one_hot(probabilities.argmax(1), probabilities.shape[1]).to(probabilities.dtype)
    return chosen + (probabilities - probabilities.detach())


# --- the network -------------------------------------------------------------------------------------------------


class MedDANetV2(nn.Module):
    """A 2D U-Net that decides per slice what it computes.

    In evaluation mode it decides, executes and returns logits. In training mode it computes every choice and returns
    what the losses need (:meth:`forward`); :meth:`enter` says which parts learn.

    Args:
        network_class: class of the U-Net, with ``encoder.stages`` and ``decoder.transpconvs``, ``.stages`` and
            ``.seg_layers`` as in nnU-Net's networks.
        med_danet: fields of :class:`MedDANetOptions`.
        arch_kwargs: the other arguments of ``network_class``.

    Attributes:
        decisions: set it to a list, and evaluation appends the :class:`Decision` of each slice.

    Raises:
        ValueError: see :class:`MedDANetOptions`; 3D plans; deep supervision, which trainers ask for that do not know
            the method.
    """

    #: The trainer that knows the procedure.
    trainer: ClassVar[str] = "nnUNetTrainerMedDANetV2"

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        network_class: type[nn.Module],
        med_danet: dict | None = None,
        deep_supervision: bool = False,
        **arch_kwargs,
    ):
        super().__init__()
        if deep_supervision:
            raise ValueError(self._refusal("deep supervision, as trainers ask for it that do not know the method"))
        if arch_kwargs.get("conv_op", nn.Conv2d) is not nn.Conv2d:
            raise ValueError(
                "Med-DANet V2 got a 3D configuration; expected a 2D one, since it decides slice by slice. Train the "
                "configuration 2d."
            )
        self.options = MedDANetOptions(**(med_danet or {}))
        self.num_classes, self.input_channels = num_classes, input_channels
        self.backbone = network_class(
            input_channels=input_channels, num_classes=num_classes, deep_supervision=False, **arch_kwargs
        )
        if (own := getattr(network_class, "initialize", None)) is not None:
            for module in self.backbone.modules():  # ``initialize`` sees one module at a time, not whose it is
                module.own_initialize = own
        encoder, decoder = self.backbone.encoder, self.backbone.decoder
        decoder.seg_layers = nn.ModuleList([decoder.seg_layers[-1]])  # the others would never learn
        self.divisor: Size = tuple(prod(axis) for axis in zip(*encoder.strides, strict=True))
        space = self.options.policy_space
        guided = self.options.guidance > 0
        self.policy = GuidedShuffleNet(input_channels, len(space), guided) if len(space) > 1 else None
        self.position = PositionNetwork(input_channels, guided) if self.options.crops else None
        self.crop_tail = _Tail(decoder) if self.options.crops else None
        self.n_encoder_stages, self.n_stages = len(encoder.stages), len(encoder.stages) + len(decoder.stages)
        self.selectors = nn.ModuleList()
        if len(self.options.bits) > 1:
            channels = [input_channels, *encoder.output_channels]
            if self.options.quantise == "all":
                channels += [transposed_input(level) for level in decoder.transpconvs][1:]
            else:
                channels.pop()
            self.selectors.extend(BitSelector(c, input_channels, len(self.options.bits)) for c in channels)
        self.labels = _Labels()
        # An untrained, uncalibrated network segments everything in full.
        self.register_buffer("skip_threshold", torch.tensor(NEVER))
        self.register_buffer("crop_threshold", torch.tensor(NEVER))
        self.register_buffer("is_quantised", torch.tensor(False))
        self.register_buffer("deciding", torch.tensor(_DECIDING))
        self.register_load_state_dict_pre_hook(self._check_deciding)
        self.phase: Phase | None = None
        self.decisions: list[Decision] | None = None
        self._counts: dict[Size, dict[str, int]] = {}

    # --- configuration ---

    @staticmethod
    def _check_deciding(network: MedDANetV2, weights: dict, prefix: str, *_) -> None:
        """Thresholds mean nothing to a policy that sees or says something else than they were set for."""
        is_older = f"{prefix}skip_threshold" in weights and f"{prefix}deciding" not in weights
        if is_older or weights.get(f"{prefix}deciding", _DECIDING) != _DECIDING:
            raise ValueError(
                "Got weights of Med-DANet V2 from another version of nnunet_dyn, which decided in another way; "
                "expected those of this one. Train again, or predict with the version that they are from."
            )

    @classmethod
    def _refusal(cls, got: str) -> str:
        return f"Med-DANet V2 got {got}; expected a trainer that knows the method. Train with -tr {cls.trainer}."

    def __getattr__(self, name: str) -> Any:
        if name == "decoder":  # nnU-Net's trainers look for it to set deep supervision, before anything is trained
            raise AttributeError(self._refusal("a trainer that sets deep supervision"))
        return super().__getattr__(name)

    def set_regions(self, regions: bool) -> None:
        """Say whether the classes are regions, none of which is the background."""
        self.labels.seg_layers.are_regions.fill_(regions)

    @property
    def background_logits(self) -> torch.Tensor:
        """The logits of a skipped slice's voxels, ``(num_classes,)``."""
        are_regions = self.labels.seg_layers.are_regions
        logits = torch.full((self.num_classes,), -SKIP_LOGIT, device=are_regions.device)
        logits[0] = torch.where(are_regions, -SKIP_LOGIT, SKIP_LOGIT)
        return logits

    def check_patch(self, patch: Sequence[int]) -> None:
        """Check that slices of ``patch`` voxels can be segmented whole and in crops.

        Raises:
            ValueError: see :func:`crop_size`; an axis is not divisible by the U-Net's strides.
        """
        if any(size % step for size, step in zip(patch, self.divisor, strict=True)):
            raise ValueError(
                f"Got slices of {tuple(patch)} voxels; expected every axis divisible by the product of the strides, "
                f"{self.divisor}. Change the patch size of the plans."
            )
        for crop in self.options.crops:
            crop_size(crop, patch, self.divisor)

    def parts(self) -> dict[str, list[nn.Module]]:
        """Every part of :data:`PARTS` that this network has, as modules."""
        parts = {
            "segmentation": [self.backbone, self.crop_tail],
            "policy": [self.policy],
            "position": [self.position],
            "selectors": [self.selectors if len(self.selectors) else None],
        }
        parts = {name: [module for module in modules if module is not None] for name, modules in parts.items()}
        return {name: modules for name, modules in parts.items() if modules}

    def enter(self, phase: Phase) -> None:
        """Train what ``phase`` says from now on; the rest stays as it is, statistics of batches included."""
        self.phase = phase
        for name, modules in self.parts().items():
            for module in modules:
                module.requires_grad_(name in phase.learns)
        self.is_quantised.fill_(phase.quantised)
        self.train(self.training)

    def train(self, mode: bool = True) -> MedDANetV2:
        super().train(mode)
        if mode and self.phase is not None:
            for name, modules in self.parts().items():
                for module in modules:
                    module.train(name in self.phase.learns)
        return self

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """The U-Net by its own ``initialize``, the rest by He (``network.apply(network.initialize)``, root last)."""
        if isinstance(module, MedDANetV2):
            if module.crop_tail is not None:
                module.crop_tail.start_from(module.backbone.decoder)
        elif (own := getattr(module, "own_initialize", None)) is not None:
            own(module)
        else:
            InitWeights_He(1e-2)(module)
            init_last_bn_before_add_to_0(module)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> np.int64:
        """Memory of one training sample, in nnU-Net's unit: every choice at every width is kept for its gradient.

        Counted by :func:`nnunet_dyn.accounting.training_memory`: what is rounded is kept besides, and the last stage
        of a crop is as large as the slice.

        Raises:
            ValueError: see :meth:`check_patch`.
        """
        self.check_patch(input_size)
        bytes_of_a_unit = 2 * 4  # two maps in single precision, as in ``blocks.kept_maps``
        return np.int64(training_memory(self, (1, self.input_channels, *input_size)) // bytes_of_a_unit)

    # --- forward ---

    @torch.compiler.disable
    def forward(self, x: torch.Tensor, centres: torch.Tensor | None = None) -> torch.Tensor | dict:
        """``x: (B, C, H, W)`` → logits ``(B, num_classes, H, W)``, decided slice by slice.

        In training mode, for every choice of the policy space, in its order:

        - ``logits``: a list of ``(B, num_classes, H, W)``;
        - ``scores``: the policy's logits, ``(B, choices)``, if there is a policy network;
        - ``policy_maps``, ``position_maps``: under guidance, where these networks see foreground
          (:meth:`GuidedShuffleNet.with_maps`);
        - ``choice``: ``(B, choices)``, one-hot, by straight-through Gumbel-softmax while the policy learns;
        - ``corners``: of each crop size, ``(B, 2)``;
        - ``cost``: of what was chosen, relative to the whole slice in full precision, ``(B,)``.

        Args:
            centres: ``(B, 2)``, rows and columns where crops are placed instead of by the position network.

        Raises:
            RuntimeError: training by a trainer that does not know the method.
        """
        if x.is_meta:  # sizes and costs only: what can be had without looking at the slice
            view = self._view(x)  # autocast does not know the meta device
            scores, places = (None if network is None else network(view) for network in (self.policy, self.position))
            if self.training and torch.is_grad_enabled():
                return [scores, *self._every_choice(x, places)]
            return self.segment_whole(x)
        if self.training:
            if self.phase is None:
                raise RuntimeError(self._refusal("a training pass outside of its phases"))
            return self._training_pass(x, centres)
        logits, decisions = self.execute(x, self.decide(x))
        if self.decisions is not None:
            self.decisions.extend(decisions)
        return logits

    def _view(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` as the policy and the position network see it, in single precision.

        Its sides are multiples of theirs, so that the cells of their maps fill the slice.
        """
        cells = [-(-side // (self.options.view_stride * _VIEW_STEP)) for side in x.shape[2:]]
        size = [max(_SMALLEST_VIEW, count * _VIEW_STEP) for count in cells]
        return F.adaptive_avg_pool2d(x.float(), size)

    def segment_whole(self, x: torch.Tensor) -> torch.Tensor:
        """The U-Net as it is, in full precision: ``(B, C, H, W)`` → logits."""
        return self._segment(x, lambda stage, run, gradient, x, *others: run(x, *others))

    def _segment(self, x: torch.Tensor, at_width: Run, restore: Run | None = None, *where) -> torch.Tensor:
        """Run the U-Net's stages one after another, each through ``at_width(stage, run, gradient, *inputs)``.

        Args:
            restore: for a crop, what brings the last stage's input to full size; it gets ``where``, too.
        """
        gradient = image_gradient(x.detach())  # the cost must not move the crop
        skips = []
        for stage in range(self.n_encoder_stages):
            x = at_width(stage, partial(self._encode, stage), gradient, x)
            skips.append(x)
        levels = self.n_stages - self.n_encoder_stages
        for level in range(levels):
            stage = self.n_encoder_stages + level
            inputs = (x, skips[-2 - level])
            if level < levels - 1:
                x = at_width(stage, partial(self._decode, level), gradient, *inputs)
            else:
                x = at_width(stage, partial(self._finish, restore), gradient, *inputs, *where)
        return x

    def _encode(self, stage: int, x: torch.Tensor) -> torch.Tensor:
        encoder = self.backbone.encoder
        if stage == 0 and getattr(encoder, "stem", None) is not None:
            x = encoder.stem(x)
        return encoder.stages[stage](x)

    def _decode(self, level: int, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        decoder = self.backbone.decoder
        return decoder.stages[level](torch.cat((decoder.transpconvs[level](x), skip), 1))

    def _finish(self, restore: Run | None, x: torch.Tensor, skip: torch.Tensor, *where) -> torch.Tensor:
        """The last decoder stage: up at the size of the crop, then its convolutions and the head at full size."""
        decoder = self.backbone.decoder
        x = torch.cat((decoder.transpconvs[-1](x), skip), 1)
        if restore is None:
            return decoder.seg_layers[-1](decoder.stages[-1](x))
        return self.crop_tail(restore(x, *where))

    # --- decide, then execute ---

    @torch.no_grad()
    def decide(self, x: torch.Tensor) -> list[Decision]:
        """What to do with each slice of ``x``, ``(B, C, H, W)``: the policy, and the position of crops alone."""
        space, crops = self.options.policy_space, self.options.crops
        patch = tuple(x.shape[2:])
        policy_macs, position_macs = self.deciding_macs(patch)
        view = self._view(x)
        decisions = []
        skip_above, crop_above = self.skip_threshold.item(), self.crop_threshold.item()
        scores = x.new_zeros(len(x), 1) if self.policy is None else self.score(view)
        skips = torch.softmax(scores, 1)[:, space.index("skip")].tolist() if "skip" in space else [0.0] * len(x)
        # A softmax of their own: dividing by 1 - skip would exceed 1 where that is rounded to nothing.
        segmenting = [choice for choice in space if choice != "skip"]
        others = torch.softmax(scores[:, [space.index(choice) for choice in segmenting]], 1).tolist()
        best_crops = []
        for skip, row in zip(skips, others, strict=True):
            by_choice = dict(zip(segmenting, row, strict=True))
            best = max(crops, key=by_choice.get, default=None)
            crop = by_choice.get(best, 0.0)
            action = "whole"
            if skip > skip_above:
                action = "skip"
            elif crop > crop_above or "whole" not in space:
                action = "crop"
            deciding = policy_macs + position_macs * (action == "crop")
            decisions.append(
                Decision(
                    action,
                    bits=() if action == "skip" else None,
                    cost=deciding,
                    skip_probability=skip,
                    crop_probability=crop,
                    review=_is_near(skip, skip_above) or (action != "skip" and _is_near(crop, crop_above)),
                    deciding=deciding,
                )
            )
            best_crops.append(best)
        cropped = [index for index, decision in enumerate(decisions) if decision.action == "crop"]
        if cropped:
            boxes = self._boxes(self.place(view[cropped]), patch, [best_crops[index] for index in cropped])
            for index, box in zip(cropped, boxes, strict=True):
                decisions[index] = replace(decisions[index], box=box)
        return decisions

    def score(self, view: torch.Tensor) -> torch.Tensor:
        """The policy's logits, ``(B, choices)``."""
        return self._precisely(self.policy, view)

    def place(self, view: torch.Tensor) -> torch.Tensor:
        """Where crops lie, as :class:`PositionNetwork` says it: ``(B, 2)``."""
        return self._precisely(self.position, view)

    @staticmethod
    def _precisely(network: Callable[[torch.Tensor], Any], view: torch.Tensor) -> Any:
        """Run what decides in single precision: half of it moves scores by more than a threshold's margin."""
        with without_autocast(view):
            return network(view)

    def _boxes(self, places: torch.Tensor, patch: Size, crops: Sequence[int]) -> list[Box]:
        boxes = []
        for place, crop in zip(places.cpu().split(1), crops, strict=True):
            size = crop_size(crop, patch, self.divisor)
            (corner,) = self._corners(place, size, patch).round().int().tolist()
            boxes.append(tuple((start, start + side) for start, side in zip(corner, size, strict=True)))
        return boxes

    def _corners(self, places: torch.Tensor, size: Size, patch: Size) -> torch.Tensor:
        """First row and column of crops of ``size``, not rounded: ``(B, 2)``."""
        full = torch.tensor(patch).to(places)
        if self.options.guidance > 0:
            return corner_around(places * full, size, patch)
        return places * (full - torch.tensor(size).to(places))

    @torch.no_grad()
    def probe(self, x: torch.Tensor) -> tuple[list[Decision], list[Box | None]]:
        """:meth:`decide`, and for every slice the box it would have if it were cropped."""
        decisions = self.decide(x)
        if self.position is None:
            return decisions, [None] * len(x)
        view = self._view(x)
        best = [self.options.crops[0]] * len(x)
        if len(self.options.crops) > 1:
            columns = [self.options.policy_space.index(crop) for crop in self.options.crops]
            best = [self.options.crops[index] for index in self.score(view)[:, columns].argmax(1).tolist()]
        return decisions, self._boxes(self.place(view), tuple(x.shape[2:]), best)

    @torch.no_grad()
    def execute(self, x: torch.Tensor, decisions: Sequence[Decision]) -> tuple[torch.Tensor, list[Decision]]:
        """Carry out one decision a slice; the same decisions give the same logits, and what comes back, itself.

        Args:
            x: ``(B, C, H, W)``.
            decisions: their ``bits`` may be left to the selectors.

        Returns:
            Logits ``(B, num_classes, H, W)``, and the decisions with the bits and costs they came to.
        """
        full, done = tuple(x.shape[2:]), list(decisions)
        logits = self.background_logits.to(x.dtype).view(1, -1, 1, 1).repeat(len(x), 1, *full)
        groups: dict[Size, list[int]] = {}
        for index, decision in enumerate(decisions):
            if decision.action != "skip":
                box = decision.box or tuple((0, size) for size in full)
                groups.setdefault((decision.action, *(stop - start for start, stop in box)), []).append(index)
        for (action, *size), members in groups.items():
            chosen = [decisions[index].bits for index in members]
            at_width = _Executor(self, chosen)
            if action == "whole":
                result = self._segment(x[members], at_width)
            else:
                boxes = [decisions[index].box for index in members]
                result = self._segment(_cut(x[members], boxes), at_width, partial(_paste, full=full), boxes)
            logits[members] = result.to(logits.dtype)
            macs = self.stage_macs(full, tuple(size))
            for place, index in enumerate(members):
                bits = tuple(widths[place] for widths in at_width.widths)
                cost = sum(m * b for m, b in zip(macs, bits, strict=True)) / FULL_PRECISION
                selecting = self.selector_macs if decisions[index].bits is None and self.is_quantised else 0
                deciding = decisions[index].deciding + selecting
                done[index] = replace(decisions[index], bits=bits, cost=deciding + cost, deciding=deciding)
        return logits, done

    def _selector(self, stage: int) -> BitSelector | None:
        return self.selectors[stage] if stage < len(self.selectors) else None

    def fixed_width(self, stage: int) -> int:
        """The width of a stage that has no selector."""
        is_reached = self.options.quantise == "all" or stage < self.n_encoder_stages
        only = self.options.bits[0] if len(self.options.bits) == 1 else FULL_PRECISION
        return only if is_reached else FULL_PRECISION

    # --- training ---

    def _training_pass(self, x: torch.Tensor, centres: torch.Tensor | None) -> dict:
        space, patch = self.options.policy_space, tuple(x.shape[2:])
        view = self._view(x)
        choice, outputs = x.new_ones(len(x), 1), {}
        if self.policy is not None:
            scores, outputs["policy_maps"] = self._precisely(self.policy.with_maps, view)
            outputs["scores"] = scores
            if "policy" in self.phase.learns:
                choice = straight_through(F.gumbel_softmax(scores))
            else:
                choice = F.one_hot(scores.argmax(1), len(space)).to(scores.dtype)
        place = None
        if self.position is not None and centres is None:
            place, outputs["position_maps"] = self._precisely(self.position.with_maps, view)
        if not self.phase.segments:
            sizes = [crop_size(crop, patch, self.divisor) for crop in self.options.crops]
            return outputs | {"corners": [self._corners(place, size, patch) for size in sizes]}
        policy_macs, position_macs = self.deciding_macs(patch)
        unit = sum(self.stage_macs(patch, patch))
        logits, costs, corners = [], [], []
        for option in space:
            if option == "skip":
                logits.append(self.background_logits.to(x.dtype).view(1, -1, 1, 1).expand(len(x), -1, *patch))
                costs.append(x.new_full((len(x),), policy_macs / unit))
                continue
            at_width = _Mixture(self, len(x), self.phase.quantised)
            deciding = policy_macs + (self.selector_macs if self.phase.quantised else 0)
            if option == "whole":
                size = patch
                logits.append(self._segment(x, at_width))
            else:
                size = crop_size(option, patch, self.divisor)
                corner = self._corners(place, size, patch) if centres is None else corner_around(centres, size, patch)
                corners.append(corner)
                deciding += position_macs
                cut = at_whole_voxels(crop_at, x, corner, size)
                restore = partial(at_whole_voxels, restore_at, size=patch)
                logits.append(self._segment(cut, at_width, restore, corner))
            macs = torch.tensor(self.stage_macs(patch, size), dtype=torch.float64)
            weights = (macs / unit / FULL_PRECISION).to(x.device, torch.float32)
            costs.append(torch.stack(at_width.widths, 1) @ weights + deciding / unit)
        cost = (choice * torch.stack(costs, 1)).sum(1)
        return outputs | {"logits": logits, "choice": choice, "corners": corners, "cost": cost}

    def _every_choice(self, x: torch.Tensor, places: torch.Tensor | None) -> list[torch.Tensor]:
        """Logits of every choice but skipping, at every width, with crops at ``places: (B, 2)``: for sizes alone."""
        patch, logits = tuple(x.shape[2:]), []
        for option in self.options.policy_space:
            if option == "whole":
                logits.append(self._segment(x, _Mixture(self, len(x), quantised=True)))
            elif option != "skip":
                cut = at_whole_voxels(crop_at, x, places, crop_size(option, patch, self.divisor))
                restore = partial(at_whole_voxels, restore_at, size=patch)
                logits.append(self._segment(cut, _Mixture(self, len(x), quantised=True), restore, places))
        return logits

    # --- costs ---

    def stage_macs(self, patch: Size, size: Size) -> list[int]:
        """Multiply-accumulates of each stage for ``size`` voxels out of a slice of ``patch``, for one slice.

        Counted on this network by :func:`nnunet_dyn.accounting.count_operations`; the last decoder stage's
        convolutions and head run at the size of the slice.
        """
        inner, outer = self._count(size), self._count(patch)
        encoder, decoder = "backbone.encoder", "backbone.decoder"
        macs = [inner[f"{encoder}.stages.{stage}"] for stage in range(self.n_encoder_stages)]
        macs[0] += inner.get(f"{encoder}.stem", 0)
        last = self.n_stages - self.n_encoder_stages - 1
        for level in range(last + 1):
            convolutions = outer if level == last else inner
            macs.append(inner[f"{decoder}.transpconvs.{level}"] + convolutions[f"{decoder}.stages.{level}"])
        macs[-1] += outer[f"{decoder}.seg_layers.0"]
        return macs

    def operations(self, decision: Decision, patch: Size) -> int:
        """Multiply-accumulates of deciding and executing once on a slice of ``patch``, of whatever width in bits."""
        policy, position = self.deciding_macs(patch)
        if decision.action == "skip":
            return policy
        (box,) = decision.computed(patch)
        size = tuple(stop - start for start, stop in box)
        selecting = self.selector_macs if self.is_quantised else 0
        return policy + position * (decision.action == "crop") + sum(self.stage_macs(patch, size)) + selecting

    def profile_paths(self, patch: Size) -> dict[str, Decision]:
        """The most that can be chosen in full precision, and a skipped slice where the policy may skip."""
        most = Decision("whole", bits=(FULL_PRECISION,) * self.n_stages)
        if "whole" not in self.options.policy_space:
            size = crop_size(max(self.options.crops), patch, self.divisor)
            most = replace(most, action="crop", box=tuple((0, side) for side in size))
        paths = {EVERYTHING_ON: most}
        if "skip" in self.options.policy_space:
            paths[EVERYTHING_SKIPPED] = Decision("skip", bits=())
        return {name: self._costed(path, patch) for name, path in paths.items()}

    def _costed(self, path: Decision, patch: Size) -> Decision:
        """``path`` with the cost of all that decides, and of executing it in full precision."""
        cost = float(self.operations(path, patch))
        sizes = [tuple(stop - start for start, stop in box) for box in path.computed(patch)]
        return replace(path, cost=cost, deciding=cost - sum(sum(self.stage_macs(patch, size)) for size in sizes))

    def deciding_macs(self, patch: Size) -> tuple[int, int]:
        """Multiply-accumulates of the policy and of the position network, for one slice."""
        counted = self._count(patch)
        return counted.get("policy", 0), counted.get("position", 0)

    def _count(self, size: Size) -> dict[str, int]:
        """Multiply-accumulates of every module, for one slice of ``size`` that is segmented whole."""
        if size not in self._counts:
            # What a slice costs is what inference computes; and in training mode SyncBatchNorm refuses the meta device.
            modes = {module: module.training for module in self.modules()}
            self.eval()
            try:
                with torch.inference_mode(False):  # within it operators pass by the counter
                    self._counts[size] = count_operations(self, (1, self.input_channels, *size)).by_module
            finally:
                for module, mode in modes.items():
                    module.training = mode
        return self._counts[size]

    @property
    def selector_macs(self) -> int:
        """Multiply-accumulates of all selectors' linear layers."""
        return sum(selector.linear.weight.numel() for selector in self.selectors)


class _Labels(nn.Module):
    """Whether the classes are regions, as a buffer: prediction loads weights and knows no more of the labels."""

    def __init__(self):
        super().__init__()
        # nnU-Net passes over keys with ".seg_layers." when it loads pretrained weights, whose labels are others.
        self.seg_layers = nn.Module()
        self.seg_layers.register_buffer("are_regions", torch.tensor(False))


class _Tail(nn.Module):
    """The last decoder stage's convolutions and head with weights of their own, for the crop path."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.stage = deepcopy(decoder.stages[-1])
        self.seg_layers = nn.ModuleList([deepcopy(decoder.seg_layers[-1])])

    def start_from(self, decoder: nn.Module) -> None:
        """Take the decoder's weights, as when it was made."""
        self.stage.load_state_dict(decoder.stages[-1].state_dict())
        self.seg_layers[0].load_state_dict(decoder.seg_layers[-1].state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.seg_layers[0](self.stage(x))


class _Executor:
    """Runs each stage at the width decided for each slice, or that its selector chooses; slices of a width together.

    Attributes:
        widths: per stage that has run, the width of each slice.
    """

    def __init__(self, network: MedDANetV2, chosen: Sequence[tuple[int, ...] | None]):
        self.network, self.chosen = network, chosen
        self.widths: list[list[int]] = []

    def __call__(self, stage: int, run: Run, gradient: torch.Tensor, *inputs) -> torch.Tensor:
        widths = self._choose(stage, inputs[0], gradient)
        self.widths.append(widths)
        different = sorted(set(widths))
        if len(different) == 1:
            with quantized(different[0]):
                return run(*inputs)
        result = None
        for width in different:
            members = [index for index, chosen in enumerate(widths) if chosen == width]
            with quantized(width):
                part = run(*(_take(entry, members) for entry in inputs))
            if result is None:
                result = part.new_empty(len(widths), *part.shape[1:])
            result[members] = part
        return result

    def _choose(self, stage: int, x: torch.Tensor, gradient: torch.Tensor) -> list[int]:
        network = self.network
        widths = [None if bits is None else bits[stage] for bits in self.chosen]
        if None not in widths:
            return widths
        free = [FULL_PRECISION] * len(widths)
        if network.is_quantised:
            free = [network.fixed_width(stage)] * len(widths)
            if (selector := network._selector(stage)) is not None:
                free = [network.options.bits[index] for index in selector(x, gradient).argmax(1).tolist()]
        return [width or own for width, own in zip(widths, free, strict=True)]


def _take(entry: torch.Tensor | Sequence, members: list[int]) -> torch.Tensor | list:
    return entry[members] if isinstance(entry, torch.Tensor) else [entry[index] for index in members]


class _Mixture:
    """Runs each stage at every width and keeps what the selector chooses; gradients are those of the expectation.

    Args:
        quantised: or in full precision, without selectors.

    Attributes:
        widths: per stage that has run, the width of each slice, ``(B,)``, with the gradient of Eq. 7.
    """

    def __init__(self, network: MedDANetV2, batch: int, quantised: bool):
        self.network, self.batch, self.quantised = network, batch, quantised
        self.widths: list[torch.Tensor] = []

    def __call__(self, stage: int, run: Run, gradient: torch.Tensor, *inputs) -> torch.Tensor:
        network = self.network
        selector = network._selector(stage) if self.quantised else None
        if selector is None:
            width = network.fixed_width(stage) if self.quantised else FULL_PRECISION
            self.widths.append(torch.full((self.batch,), float(width), device=gradient.device))
            with quantized(width):
                return run(*inputs)
        weights = straight_through(selector(inputs[0], gradient))
        bits = network.options.bits
        self.widths.append(weights.float() @ torch.tensor(bits, dtype=torch.float32, device=weights.device))
        result = 0
        for width, weight in zip(bits, weights.unbind(1), strict=True):
            with quantized(width):
                part = run(*inputs)
            result = result + part * weight.to(part.dtype).view(-1, *(1,) * (part.ndim - 1))
        return result


def transposed_input(level: nn.Module) -> int:
    """Input channels of a decoder level's way up."""
    return next(module.in_channels for module in level.modules() if isinstance(module, _ConvNd))


# --- the paper's U-Net -------------------------------------------------------------------------------------------


class ModifiedUNet(nn.Module):
    """The 2D U-Net of the paper's experiments: few channels, pre-activation residual blocks, three halvings.

    Each stage begins with a strided convolution and each decoder level has a 1×1 convolution, a transposed one, the
    concatenation with the skip, a 1×1 convolution and one block.

    Args:
        strides: the plan's, of which the first four stages are used.
        base_features: channels of the first stage; they double from stage to stage.
        blocks: residual blocks of each encoder stage.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        strides: Sequence[Sequence[int]],
        conv_op: type[_ConvNd] = nn.Conv2d,
        norm_op: type[nn.Module] = nn.InstanceNorm2d,
        norm_op_kwargs: dict | None = None,
        nonlin: type[nn.Module] = nn.LeakyReLU,
        nonlin_kwargs: dict | None = None,
        base_features: int = 16,
        blocks: Sequence[int] = (1, 2, 2, 4),
        deep_supervision: bool = False,
    ):
        super().__init__()
        block = partial(
            ResidualBlock,
            conv_op=conv_op,
            norm=partial(norm_op, **({"affine": True} | (norm_op_kwargs or {}))),
            nonlin=partial(nonlin, **(nonlin_kwargs or {})),
        )
        stages = min(len(blocks), len(strides))
        widths = [base_features * 2**stage for stage in range(stages)]
        self.encoder = _Encoder(conv_op, block, input_channels, widths, strides[:stages], blocks)
        self.decoder = _Decoder(conv_op, block, num_classes, widths, self.encoder.strides, deep_supervision)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C, H, W)`` → logits ``(B, num_classes, H, W)``."""
        return self.decoder(self.encoder(x))

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> np.int64:
        """Memory of one training sample, in nnU-Net's unit (``blocks.kept_maps``)."""
        total, size = np.int64(0), tuple(input_size)
        encoder, levels = self.encoder, len(self.decoder.stages)
        for stage, (stride, width) in enumerate(zip(encoder.strides, encoder.output_channels, strict=True)):
            size = strided_size(size, stride)
            in_decoder = 0 if stage == levels else 2 * 2 + 2 + 1  # a block, the concatenation, what merges it
            total += kept_maps(2 * 2 * encoder.blocks[stage] + 1 + in_decoder, width, size)
        return total

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """He initialisation as in nnU-Net."""
        InitWeights_He(1e-2)(module)


class TransBTS2D(ModifiedUNet):
    """The same U-Net with transformer layers on its lowest resolution, after Wang et al. 2021, "TransBTS".

    Positions are encoded by a depthwise convolution, so that crops and whole slices of any size can be segmented.

    Args:
        embedding: width of the transformer.
        layers, heads: of the transformer; the hidden layers are four times as wide.
        unet: arguments of :class:`ModifiedUNet`.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        strides: Sequence[Sequence[int]],
        conv_op: type[_ConvNd] = nn.Conv2d,
        norm_op: type[nn.Module] = nn.InstanceNorm2d,
        norm_op_kwargs: dict | None = None,
        nonlin: type[nn.Module] = nn.LeakyReLU,
        nonlin_kwargs: dict | None = None,
        embedding: int = 256,
        layers: int = 4,
        heads: int = 8,
        deep_supervision: bool = False,
        **unet,
    ):
        planned = (strides, conv_op, norm_op, norm_op_kwargs, nonlin, nonlin_kwargs)
        super().__init__(input_channels, num_classes, *planned, deep_supervision=deep_supervision, **unet)
        self.embedding, self.layers, self.heads = embedding, layers, heads
        transformer = _Transformer(self.encoder.output_channels[-1], embedding, layers, heads)
        self.encoder.stages[-1].append(transformer)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> np.int64:
        tokens = prod(
            size // prod(axis) for size, axis in zip(input_size, zip(*self.encoder.strides, strict=True), strict=True)
        )
        kept = kept_maps(16, self.embedding, (tokens,)) + kept_maps(2, self.heads, (tokens, tokens))
        return super().compute_conv_feature_map_size(input_size) + self.layers * kept


class _Transformer(nn.Module):
    """``(B, C, H, W)`` → the same shape: each position attends to all others."""

    def __init__(self, channels: int, embedding: int, layers: int, heads: int):
        super().__init__()
        self.embed = nn.Conv2d(channels, embedding, 3, padding=1)
        self.positions = nn.Conv2d(embedding, embedding, 3, padding=1, groups=embedding)
        self.layers = nn.Sequential(*(_TransformerLayer(embedding, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(embedding)
        self.project = nn.Conv2d(embedding, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x = x + self.positions(x)
        tokens = self.norm(self.layers(x.flatten(2).transpose(1, 2)))
        return self.project(tokens.transpose(1, 2).reshape(x.shape))


class _TransformerLayer(nn.Module):
    """Attention and two linear layers, each behind a normalisation and beside a shortcut: ``(B, N, C)``.

    Plain matrix products, of which the linear layers can be quantised and all be counted.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_hidden = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.query_key_value, self.merge = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.hidden = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, channels = x.shape
        split = self.query_key_value(self.norm_attention(x)).view(batch, tokens, 3, self.heads, channels // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        weights = torch.softmax(query @ key.transpose(2, 3) * (channels // self.heads) ** -0.5, 3)
        x = x + self.merge((weights @ value).transpose(1, 2).reshape(batch, tokens, channels))
        return x + self.hidden(self.norm_hidden(x))


class ResidualBlock(nn.Sequential):
    """``x + conv(act(norm(conv(act(norm(x))))))``, with 3×3 convolutions."""

    def __init__(self, channels: int, conv_op, norm, nonlin):
        convs = [(norm(channels), nonlin(), conv_op(channels, channels, 3, padding=1)) for _ in range(2)]
        super().__init__(*(layer for conv in convs for layer in conv))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class _Encoder(nn.Module):
    def __init__(self, conv_op, block, input_channels, widths, strides, blocks):
        super().__init__()
        self.output_channels, self.strides, self.blocks = widths, [list(stride) for stride in strides], blocks
        self.stem = conv_op(input_channels, widths[0], 3, tuple(strides[0]), padding=1)
        self.stages = nn.ModuleList()
        for stage, width in enumerate(widths):
            down = [] if stage == 0 else [conv_op(widths[stage - 1], width, 3, tuple(strides[stage]), padding=1)]
            self.stages.append(nn.Sequential(*down, *(block(width) for _ in range(blocks[stage]))))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x, outputs = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


class _Decoder(nn.Module):
    def __init__(self, conv_op, block, num_classes, widths, strides, deep_supervision):
        super().__init__()
        self.deep_supervision = deep_supervision
        transpconv_op = get_matching_convtransp(conv_op)
        self.transpconvs, self.stages = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(widths) - 1)):
            width, stride = widths[level], tuple(strides[level + 1])
            up = nn.Sequential(conv_op(widths[level + 1], width, 1), transpconv_op(width, width, stride, stride))
            self.transpconvs.append(up)
            self.stages.append(nn.Sequential(conv_op(2 * width, width, 1), block(width)))
        self.seg_layers = nn.ModuleList([conv_op(widths[0], num_classes, 1)])

    def forward(self, skips: list[torch.Tensor]) -> torch.Tensor:
        x = skips[-1]
        for level, (up, stage) in enumerate(zip(self.transpconvs, self.stages, strict=True)):
            x = stage(torch.cat((up(x), skips[-2 - level]), 1))
        return self.seg_layers[-1](x)
