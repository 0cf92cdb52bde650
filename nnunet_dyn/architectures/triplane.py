"""The detector of Kim et al. 2025, "Multi-Stage Hierarchical Feature Extraction for Efficient 3D Medical Image
Segmentation", Section 3.1: three slices of a volume, one per axis, each with a network of its own that finds boxes in
two dimensions. Its counterpart that sees the volume: ``architectures/roi_detectors.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import ceil, floor
from typing import ClassVar, Literal

import numpy as np
import torch
from scipy import ndimage
from torch import nn
from torch.nn import functional as F
from torchvision.models import get_model, get_model_weights
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d, generalized_box_iou_loss

from nnunet_dyn.accounting import training_memory
from nnunet_dyn.architectures.roi import Detection, DetectorNetwork
from nnunet_dyn.errors import JobError

View = Literal["centre", "mean", "std", "subregions"]

#: Parts of equal thickness that ``subregions`` averages apart from each other; the paper does not say how many.
_SUBREGIONS = 4
#: Weights of the boxes' L1 and generalised IoU beside the cross-entropy, as in DETR (Carion et al. 2020).
_L1, _GIOU = 5.0, 2.0
#: How often a sample's mask enters in training. Without passes of zeros the detector would rely on what is not there
#: when it is used.
_MASK_SHOWN = 0.5


# --- what a detector sees ----------------------------------------------------------------------------------------


def _clahe(image: np.ndarray) -> np.ndarray:
    from skimage.exposure import equalize_adapthist

    return equalize_adapthist(image) if image.min() < image.max() else image


#: Table 8's filters of one slice, ``(H, W)`` in [0, 1].
FILTERS: dict[str, Callable[[np.ndarray], np.ndarray] | None] = {
    "none": None,
    "clahe": _clahe,
    "laplacian": ndimage.laplace,
    "sobel": partial(ndimage.generic_gradient_magnitude, derivative=ndimage.sobel),
    "gaussian": partial(ndimage.gaussian_filter, sigma=1.0),
}


def _view(volume: torch.Tensor, axis: int, view: View) -> torch.Tensor:
    """``(B, C, D, H, W)`` → what one module sees along spatial ``axis``: ``(B, channels, two sides)``."""
    if view == "centre":
        return volume.select(axis + 2, volume.shape[axis + 2] // 2)
    if view == "mean":
        return volume.mean(axis + 2)
    if view == "std":
        return volume.std(axis + 2)
    return torch.cat([part.mean(axis + 2) for part in volume.tensor_split(_SUBREGIONS, axis + 2)], 1)


def sine_positions(size: Sequence[int], width: int, like: torch.Tensor) -> torch.Tensor:
    """DETR's positional encoding of a map, sines and cosines of each axis, as tokens: ``(1, H·W, width)``."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, device=like.device) / (width // 4))
    encoded = []
    for length in size:
        angles = 2 * torch.pi * (torch.arange(length, device=like.device) + 0.5).unsqueeze(1) / length * frequencies
        encoded.append(torch.cat([angles.sin(), angles.cos()], 1))
    rows, columns = encoded
    grid = torch.cat([rows.unsqueeze(1).expand(-1, size[1], -1), columns.unsqueeze(0).expand(size[0], -1, -1)], 2)
    return grid.flatten(0, 1).unsqueeze(0).to(like.dtype)


# --- one slice ---------------------------------------------------------------------------------------------------


class MultiScaleAttention(nn.Module):
    """Each pixel of a map attends to all pixels of another, at its resolution and at half of it; then linear layers.

    Both parts are beside a shortcut. Positions are sines and cosines plus a learned vector that says the stage.

    Args:
        hidden: width between the linear layers.
    """

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm_query, self.norm_key, self.norm_hidden = (nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.hidden = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.stage = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """``x: (B, width, H, W)`` and what it attends to, ``(B, width, H', W')`` → the shape of ``x``."""
        scales = [other, F.avg_pool2d(other, 2)] if min(other.shape[2:]) > 1 else [other]
        keys = torch.cat([scale.flatten(2).transpose(1, 2) for scale in scales], 1)
        key_positions = torch.cat([self._positions(scale) for scale in scales], 1)
        tokens = x.flatten(2).transpose(1, 2)
        query, keys = self.norm_query(tokens), self.norm_key(keys)
        attended, _ = self.attention(query + self._positions(x), keys + key_positions, keys, need_weights=False)
        tokens = tokens + attended
        tokens = tokens + self.hidden(self.norm_hidden(tokens))
        return tokens.transpose(1, 2).reshape(x.shape)

    def _positions(self, x: torch.Tensor) -> torch.Tensor:
        return sine_positions(x.shape[2:], x.shape[1], x) + self.stage


class EncoderStage(nn.Module):
    """E_i: depthwise and pointwise convolution to half the size, then attention (Fig. 2b)."""

    def __init__(self, inputs: int, width: int, heads: int, hidden: int):
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(inputs, inputs, 3, 2, 1, groups=inputs, bias=False), nn.Conv2d(inputs, width, 1)
        )
        self.attention = MultiScaleAttention(width, heads, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(x)
        return self.attention(x, x)


class DecoderStage(nn.Module):
    """D_j of Eq. 1: what comes from below ⊕ F_j, attention, then attention from there to F_j (Fig. 2c)."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.merge = nn.Conv2d(2 * width, width, 1)
        self.first = MultiScaleAttention(width, heads, hidden)
        self.second = MultiScaleAttention(width, heads, hidden)

    def forward(self, below: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """Both ``(B, width, H, W)``, and so is the result."""
        x = self.merge(torch.cat((below, skip), 1))
        return self.second(self.first(x, x), skip)


class SliceDetector(nn.Module):
    """Finds one box of each class in a slice (Fig. 2a).

    A backbone's stages are added up from the coarsest to the finest, a quarter of the slice, as in a feature pyramid
    (the paper's reference 32); this is F_0. M encoder stages halve it, M decoder stages double it again. Each class
    has a query that attends to F'_0, and linear layers make of it a box and whether there is one.

    Args:
        input_channels: of the slice; a pointwise convolution makes them the three that a backbone takes.
        backbone: name of one of torchvision's ResNets.
        pretrained: made for torchvision's weights, whose batch statistics stay; :meth:`load_pretrained` fetches them.
            Otherwise groups of channels are normalised, since batches of volumes are small.
        pyramid: width of F_0.
        width, hidden, heads: of the attention and its linear layers.
        stages: M.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        backbone: str,
        pretrained: bool,
        pyramid: int,
        width: int,
        hidden: int,
        heads: int,
        stages: int,
    ):
        super().__init__()
        self.colours = nn.Conv2d(input_channels, 3, 1)
        norm = FrozenBatchNorm2d if pretrained else partial(nn.GroupNorm, 16)
        resnet = get_model(backbone, weights=None, norm_layer=norm)
        widths = [resnet.inplanes // 2**level for level in (3, 2, 1, 0)]
        self.backbone = IntermediateLayerGetter(resnet, {f"layer{level}": f"{level}" for level in (1, 2, 3, 4)})
        self.lateral = nn.ModuleList(nn.Conv2d(channels, pyramid, 1) for channels in widths)
        sizes = [pyramid] + [width] * stages
        self.encoder = nn.ModuleList(EncoderStage(inputs, width, heads, hidden) for inputs in sizes[:-1])
        self.decoder = nn.ModuleList(DecoderStage(width, heads, hidden) for _ in range(stages))
        # nnU-Net passes over keys with ".seg_layers." when it loads pretrained weights, whose classes are others.
        self.seg_layers = nn.ModuleDict(
            {"queries": nn.Embedding(num_classes, width), "mask": nn.Conv2d(num_classes, width, 1, bias=False)}
        )
        self.norm = nn.LayerNorm(width)
        self.look = nn.MultiheadAttention(width, heads, batch_first=True)
        self.head = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, 5),
        )

    def load_pretrained(self, name: str) -> None:
        """Fetch torchvision's weights of the backbone called ``name``.

        Raises:
            JobError: they cannot be had.
        """
        try:
            state = get_model_weights(name).DEFAULT.get_state_dict(progress=False)
        except (OSError, RuntimeError) as error:
            raise JobError(
                f"Got no weights of torchvision's {name} ({error}); expected them in the cache or over the network. "
                "Download them on a connected machine and point TORCH_HOME to that cache, or plan without pretrained."
            ) from error
        self.backbone.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")})

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Find boxes.

        Args:
            x: ``(B, input_channels, H, W)``.
            mask: ``(B, num_classes, H, W)``, which enters D_M; ``None`` is one of zeros.

        Returns:
            Boxes as shares of the slice, ``(B, num_classes, 2 axes, 2)``, start and stop; logits of whether there is
            one, ``(B, num_classes)``.
        """
        maps = list(self.backbone(self.colours(x)).values())
        y = self.lateral[-1](maps[-1])
        for lateral, finer in zip(self.lateral[-2::-1], maps[-2::-1], strict=True):
            y = lateral(finer) + F.interpolate(y, finer.shape[2:], mode="nearest")
        features = []
        for stage in self.encoder:
            features.append(stage(features[-1] if features else y))
        if mask is None:
            mask = x.new_zeros(len(x), self.seg_layers["mask"].in_channels, *x.shape[2:])
        below = self.seg_layers["mask"](F.adaptive_avg_pool2d(mask, features[-1].shape[2:]))
        sizes = [y.shape[2:], *(feature.shape[2:] for feature in features[:-1])]
        for stage, skip, size in zip(self.decoder[::-1], features[::-1], sizes[::-1], strict=True):
            below = F.interpolate(stage(below, skip), size, mode="nearest")
        tokens = self.norm(below.flatten(2).transpose(1, 2))
        queries = self.seg_layers["queries"].weight.expand(len(x), -1, -1)
        positions = sine_positions(below.shape[2:], below.shape[1], below)
        found, _ = self.look(queries, tokens + positions, tokens + positions, need_weights=False)
        said = self.head(queries + found).float()
        middle, extent = torch.sigmoid(said[..., :4]).unflatten(2, (2, 2)).unbind(2)
        return torch.stack([middle - extent / 2, middle + extent / 2], 3), said[..., 4]


# --- three slices ------------------------------------------------------------------------------------------------


class TriPlaneDetector(DetectorNetwork):
    """The paper's detector: three slices, three modules with weights of their own, one box a class.

    The volume is scaled to [0, 1] and resampled to a cube; one slice along each axis goes to its
    :class:`SliceDetector`. Each axis of a class's box is seen by two modules, which are averaged, and so are the three
    logits of whether the class is there. A class has one box, however many targets: the one around them all. What a
    module is to find is this box as seen along its axis, also where the slice does not cut it.

    The attention is that of PyTorch over two scales, in place of sampling at reference points (deformable attention):
    the largest map has 16² pixels, few enough to attend to all. With the defaults, one channel and two classes the
    detector has 191.6 million parameters and takes 14.8 billion multiply-accumulates (:mod:`nnunet_dyn.accounting`).
    The paper's Table 5 says 192.7 million and 13.5 billion and not of what; backbone and widths are chosen after it.

    Args:
        patch_size: three numbers; volumes of any size are resampled.
        view: what of the volume becomes a slice (Table 8): the ``centre``, the ``mean`` or ``std`` of all slices, or
            ``subregions``, the means of four parts as channels.
        filter: applied to each slice (Table 8), a key of :data:`FILTERS`.
        size: voxels per side of the cube.
        backbone, pretrained, pyramid, width, hidden, heads, stages: see :class:`SliceDetector`.

    Raises:
        ValueError: see :class:`~nnunet_dyn.architectures.roi.DetectorNetwork`; a 2D patch; an unknown view or filter;
            more stages than the slice can be halved; widths that do not divide.
    """

    trainer: ClassVar[str] = "nnUNetTrainerROICascadeTriPlane"

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        *,
        patch_size: Sequence[int],
        view: View = "centre",
        filter: str = "none",
        size: int = 128,
        backbone: str = "resnet101",
        pretrained: bool = False,
        pyramid: int = 256,
        width: int = 384,
        hidden: int = 1152,
        heads: int = 8,
        stages: int = 4,
    ):
        super().__init__(input_channels, num_classes, deep_supervision, patch_size=patch_size)

        def expect(condition: bool, name: str, value: object, expected: str) -> None:
            if not condition:
                raise ValueError(f"TriPlaneDetector: {name} got {value!r}; expected {expected}. Correct the plans.")

        expect(len(self.patch_size) == 3, "patch_size", self.patch_size, "three numbers, since it detects in volumes")
        expect(view in View.__args__, "view", view, f"one of {', '.join(View.__args__)}")
        expect(filter in FILTERS, "filter", filter, f"one of {', '.join(FILTERS)}")
        expect(stages >= 1, "stages", stages, "1 or more")
        expect(size % 2 ** (stages + 2) == 0, "size", size, f"a multiple of {2 ** (stages + 2)}, for {stages} stages")
        expect(width % heads == 0 and width % 4 == 0, "width", width, f"a multiple of 4 and of the {heads} heads")
        self.view, self.filter, self.size = view, filter, size
        self._pretrained = backbone if pretrained else None
        channels = input_channels * (_SUBREGIONS if view == "subregions" else 1)
        self.planes = nn.ModuleList(
            SliceDetector(channels, num_classes, backbone, pretrained, pyramid, width, hidden, heads, stages)
            for _ in range(3)
        )
        self._masks: torch.Tensor | None = None

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> np.int64:
        """Memory of one training sample, in nnU-Net's unit (``blocks.kept_maps``): half of the elements kept.

        The patch does not matter, since it is resampled.
        """
        kept = 3 * training_memory(self.planes[0], (1, self.planes[0].colours.in_channels, self.size, self.size))
        return np.int64(kept // (2 * torch.float32.itemsize))

    # --- forward ---

    def slices(self, x: torch.Tensor) -> list[torch.Tensor]:
        """``x: (B, C, *patch)`` → for each axis ``(B, C or 4 C, size, size)``."""
        x = x.float()
        low, high = x.amin((2, 3, 4), keepdim=True), x.amax((2, 3, 4), keepdim=True)
        x = (x - low) / (high - low).clamp(min=torch.finfo(x.dtype).tiny)
        volume = F.interpolate(x, size=(self.size,) * 3, mode="trilinear")
        views = [_view(volume, axis, self.view) for axis in range(3)]
        filtering = FILTERS[self.filter]
        if filtering is None or x.is_meta:
            return views
        return [
            torch.from_numpy(np.stack([filtering(image) for image in view.flatten(0, 1).cpu().numpy()]))
            .view(view.shape)
            .to(view)
            for view in views
        ]

    def load_pretrained(self) -> None:
        """With ``pretrained``, fetch the weights of the three backbones. See :meth:`SliceDetector.load_pretrained`."""
        if self._pretrained is not None:
            for plane in self.planes:
                plane.load_pretrained(self._pretrained)

    def give_masks(self, target: torch.Tensor) -> None:
        """Let the next training pass see ``target``, as :meth:`loss` takes it; half of the samples see zeros anyway.

        The paper's segmentation mask, which "enhances the detector's training". Without a call there is none.
        """
        self._masks = target

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        """``x: (B, input_channels, *patch)`` → :meth:`slices`, ``(B, 3 planes, C or 4 C, size, size)``."""
        return torch.stack(self.slices(x), 1)

    def layers(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """``x`` of :meth:`prepare` → ``boxes``, shares of the volume, ``(B, 3 planes, num_classes, 2 axes, 2)``, and
        ``present``, logits ``(B, 3 planes, num_classes)``."""
        masks, self._masks = self._masks, None
        found = []
        for axis, (plane, view) in enumerate(zip(self.planes, x.unbind(1), strict=True)):
            shown = None
            if masks is not None and self.training:
                shown = self._shown(masks, axis).to(view.dtype)
            found.append(plane(view, shown))
        boxes, present = zip(*found, strict=True)
        return {"boxes": torch.stack(boxes, 1), "present": torch.stack(present, 1)}

    def _shown(self, target: torch.Tensor, axis: int) -> torch.Tensor:
        """The classes of ``target`` as seen along ``axis``, of some samples: ``(B, num_classes, size, size)``."""
        masks, _ = self.foreground(target)
        seen = F.adaptive_max_pool2d(masks.any(axis + 2).float(), self.size)
        seen = F.pad(seen, (0, 0, 0, 0, self.classes.start, 0))
        return seen * (torch.rand(len(seen), 1, 1, 1, device=seen.device) < _MASK_SHOWN)

    # --- training ---

    def loss(self, outputs: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of whether a class is there, and of those that are L1 and generalised IoU, summed over the
        three modules. In a sample with ignored voxels nothing is said of the classes that it does not show."""
        masks, known = self.foreground(target)
        boxes, is_there = self._wanted(masks)
        is_known = is_there | known.flatten(1).all(1).unsqueeze(1)
        total = 0
        for axis in range(3):
            others = [other for other in range(3) if other != axis]
            found = outputs["boxes"][:, axis, self.classes.start :].float()
            logits = outputs["present"][:, axis, self.classes.start :].float()
            entropy = F.binary_cross_entropy_with_logits(logits, is_there.float(), reduction="none")
            total = total + (entropy * is_known).sum() / is_known.sum().clamp(min=1)
            mine, wanted = found[is_there], boxes[is_there][:, others]
            iou = generalized_box_iou_loss(mine.transpose(1, 2).flatten(1), wanted.transpose(1, 2).flatten(1))
            per_box = _L1 * (mine - wanted).abs().mean((1, 2)) + _GIOU * iou
            # Without a target nothing is to be found, but every parameter stays in the graph.
            total = total + per_box.sum() / max(1, len(per_box)) + 0 * found.sum()
        return total

    @staticmethod
    def _wanted(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The box around each class of ``masks: (B, classes, *patch)`` as shares of the patch, ``(B, classes, 3, 2)``,
        and whether it is there, ``(B, classes)``."""
        sides = []
        for axis in range(3):
            present = masks.any(dim=4 - (axis == 2)).any(dim=3 - (axis > 0)).int()
            size = present.shape[2]
            sides.append(torch.stack([present.argmax(2), size - present.flip(2).argmax(2)], 2) / size)
        return torch.stack(sides, 2), masks.flatten(2).any(2)

    # --- evaluation ---

    @torch.no_grad()
    def read(self, outputs: dict[str, torch.Tensor], patch: Sequence[int]) -> list[dict[int, list[Detection]]]:
        """The box of each class of each sample whose score reaches the threshold."""
        scores = torch.sigmoid(outputs["present"].mean(1)).tolist()
        boxes = outputs["boxes"]
        seen = []  # of each axis, by the two modules that look along the others
        for axis in range(3):
            planes = [plane for plane in range(3) if plane != axis]
            places = [axis - (plane < axis) for plane in planes]
            seen.append(sum(boxes[:, plane, :, place] for plane, place in zip(planes, places, strict=True)) / 2)
        thresholds, averaged = self.score_threshold.tolist(), torch.stack(seen, 2).tolist()
        return [
            {
                label: [Detection(_voxels(sides[label], patch), score[label])] * (score[label] >= thresholds[label])
                for label in self.classes
            }
            for score, sides in zip(scores, averaged, strict=True)
        ]


def _voxels(sides: Sequence[Sequence[float]], shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """A box in shares of ``shape`` as whole voxels, rounded outwards, at least one; thousandths do not count."""
    box = []
    for (start, stop), size in zip(sides, shape, strict=True):
        first = min(max(0, floor(start * size + 1e-3)), size - 1)
        box.append((first, max(first + 1, min(size, ceil(stop * size - 1e-3)))))
    return tuple(box)
