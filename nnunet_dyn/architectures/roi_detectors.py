"""Detectors of regions of interest. What they share: ``architectures/roi.py``."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from dynamic_network_architectures.building_blocks.residual import BasicBlockD
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from scipy import ndimage
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from nnunet_dyn.architectures.roi import Box, Detection, DetectorNetwork, box_slices, mask_boxes, merge

#: Weights of the boxes' L1 and generalised IoU beside the mask's losses, as in DETR (Carion et al. 2020).
_L1, _GIOU = 5.0, 2.0
#: Of the voxels, that the focal loss of a class is divided by at least: it may have hardly any, or none.
_LEAST_SHARE = 1e-3


class LowResDetector(DetectorNetwork):
    """Finds targets in a whole volume at low resolution, by a mask and a regressed box of each.

    A residual encoder and a decoder that adds up as in a feature pyramid work behind the first stage of the plan. At
    its finest map, each voxel says of each class how far the six (in 3D) sides of its target's box are, as in FCOS
    (Tian et al. 2019), whose centre-ness is the mask's probability here. The mask, which says of each class where it
    is, has the resolution of the input: a thin layer there sees the input beside the decoder's map, since with sides
    at every other voxel only, a small target's box is half again as wide. A connected component of the mask is a
    detection. Its box is the union of the component's bounding box, which cannot miss what the mask has found, and of
    the mean of its voxels' boxes, which reaches over what the mask leaves out.

    Args:
        strides, kernel_sizes: of each stage, per axis, as nnU-Net plans them. Of the first one, at the resolution of
            the input, only the mask's layer is made.
        base_features, max_features: width of the second stage, doubled with each, and the limit to that.
        blocks_per_stage: residual blocks.
        pyramid: width of the decoder, halved for the mask's layer.

    Raises:
        ValueError: see :class:`~nnunet_dyn.architectures.roi.DetectorNetwork`; lists of different lengths; an axis of
            the patch that is not divisible by its strides.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        *,
        patch_size: Sequence[int],
        strides: Sequence[Sequence[int]],
        kernel_sizes: Sequence[Sequence[int]],
        conv_op: type[_ConvNd] = nn.Conv3d,
        norm_op: type[nn.Module] = nn.InstanceNorm3d,
        base_features: int = 16,
        max_features: int = 256,
        blocks_per_stage: int = 1,
        pyramid: int = 16,
    ):
        super().__init__(input_channels, num_classes, deep_supervision, patch_size=patch_size)
        if len(strides) != len(kernel_sizes) or len(strides) < 2:
            raise ValueError(
                f"strides and kernel_sizes got {len(strides)} and {len(kernel_sizes)} entries; expected one a stage in "
                "each, and two stages at least. Correct arch_kwargs of 3d_detect in the plans."
            )
        finest = list(kernel_sizes[0])
        strides, kernel_sizes = strides[1:], kernel_sizes[1:]
        widths = [min(max_features, base_features * 2**index) for index in range(len(strides))]
        divisor = [prod(axis) for axis in zip(*strides, strict=True)]
        if any(size % step for size, step in zip(self.patch_size, divisor, strict=True)):
            raise ValueError(
                f"Got patches of {self.patch_size} voxels; expected every axis divisible by the product of the "
                f"strides, {divisor}. Change the patch size of the plans."
            )
        self.stride = tuple(strides[0])
        shared = {
            "norm_op": norm_op,
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "nonlin": nn.LeakyReLU,
            "nonlin_kwargs": {"inplace": True},
        }
        self.stages, self.lateral, self.smooth = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        channels = input_channels
        for width, stride, kernel in zip(widths, strides, kernel_sizes, strict=True):
            blocks = [
                BasicBlockD(conv_op, channels if first else width, width, list(kernel), s, **shared)
                for first, s in [(True, list(stride)), *[(False, [1] * len(stride))] * (blocks_per_stage - 1)]
            ]
            self.stages.append(nn.Sequential(*blocks))
            self.lateral.append(conv_op(width, pyramid, 1))
            channels = width
        # The coarsest map is read as it is.
        self.smooth.extend(
            BasicBlockD(conv_op, pyramid, pyramid, list(kernel), [1] * len(kernel), **shared)
            for kernel in kernel_sizes[:-1]
        )
        thin = max(1, pyramid // 2)
        self.narrow = conv_op(pyramid, thin, 1)
        self.stem = ConvDropoutNormReLU(conv_op, input_channels, thin, finest, 1, **shared)
        self.refine = ConvDropoutNormReLU(conv_op, thin, thin, finest, 1, **shared)
        self.head = nn.Module()
        # nnU-Net passes over keys with ".seg_layers." when it loads pretrained weights.
        self.head.seg_layers = nn.ModuleDict(
            {
                "mask": conv_op(thin, num_classes, 1),
                "sides": conv_op(pyramid, num_classes * 2 * len(self.patch_size), 1),
            }
        )

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """He initialisation; masks start from a prior of one voxel in nine."""
        if isinstance(module, LowResDetector):
            nn.init.constant_(module.head.seg_layers["mask"].bias, -2.0)
            # Sides start at a tenth of the patch, so that no box is empty.
            nn.init.normal_(module.head.seg_layers["sides"].weight, std=1e-3)
            nn.init.constant_(module.head.seg_layers["sides"].bias, -2.25)
        else:
            InitWeights_He(1e-2)(module)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> np.int64:
        """Memory of one training sample of ``input_size`` voxels, in nnU-Net's unit: elements that convolutions write.

        Raises:
            ValueError: ``input_size`` is not divisible by the strides.
        """
        size = list(input_size)
        total = sum(layer.compute_conv_feature_map_size(size) for layer in (self.stem, self.refine))
        total += np.int64(self.head.seg_layers["mask"].out_channels * prod(size))
        for index, stage in enumerate(self.stages):
            for block in stage:
                total += block.compute_conv_feature_map_size(size)
                size = [length // step for length, step in zip(size, block.stride, strict=True)]
            total += np.int64(self.lateral[index].out_channels * prod(size))
            if index < len(self.smooth):
                total += self.smooth[index].compute_conv_feature_map_size(size)
            if not index:
                channels = self.narrow.out_channels + self.head.seg_layers["sides"].out_channels
                total += np.int64(channels * prod(size))
        return total

    def layers(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """``x: (B, input_channels, *patch)`` → ``mask``, logits ``(B, num_classes, *patch)``, and ``sides``, distances
        in voxels from each coarse voxel's middle to the box's sides, ``(B, num_classes, 2, axes, *coarse)``."""
        fine, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        y = self.lateral[-1](maps[-1])
        for index in reversed(range(len(self.smooth))):
            y = F.interpolate(y, maps[index].shape[2:], mode="nearest")
            y = self.smooth[index](y + self.lateral[index](maps[index]))
        fine = self.refine(fine + F.interpolate(self.narrow(y), fine.shape[2:], mode="nearest"))
        mask, sides = (self.head.seg_layers[name](z).float() for name, z in (("mask", fine), ("sides", y)))
        extent = self._per_axis([size * step for size, step in zip(y.shape[2:], self.stride, strict=True)], sides)
        sides = F.softplus(sides).unflatten(1, (self.num_classes, 2, y.ndim - 2)) * extent
        return {"mask": mask, "sides": sides}

    @staticmethod
    def _per_axis(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
        """One number an axis, ready to be multiplied with ``(…, axes, *coarse)``."""
        return torch.tensor(values, dtype=torch.float32, device=like.device).view(-1, *[1] * len(values))

    # --- training ---

    def loss(self, outputs: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        """Focal loss and Dice of the masks, L1 and generalised IoU of the boxes where there is a target.

        The focal loss is divided by the voxels of each class's targets (Lin et al. 2017): with a mean over all voxels
        small targets are not found for thousands of iterations. Every coarse voxel that holds one of a target says
        where its box ends; and every box counts the same, as the mean over them. Where a class has no target, only the
        masks count.
        """
        from torchvision.ops import sigmoid_focal_loss  # importing it takes a second

        masks, known = self.foreground(target)
        # The channel of the background, where there is one, stays as it is.
        logits, sides = (outputs[name][:, self.classes.start :] for name in ("mask", "sides"))
        known = known.unsqueeze(1)
        axes = tuple(range(2, logits.ndim))
        focal = sigmoid_focal_loss(logits, masks.float(), alpha=0.5) * known
        over = (0, *axes)
        total = (focal.sum(over) / (masks & known).sum(over).clamp(min=_LEAST_SHARE * masks[:, 0].numel())).mean()
        probabilities = torch.sigmoid(logits) * known
        overlap = (probabilities * masks).sum(axes)
        dice = (2 * overlap + 1) / (probabilities.sum(axes) + (masks & known).sum(axes) + 1)
        total = total + (1 - dice).mean()
        counts = self._coarse(masks) & ~self._coarse(~known)
        found, wanted, share = self._sides_of_targets(masks, counts, sides)
        extent = torch.tensor(target.shape[2:], device=sides.device)
        per_voxel = _L1 * ((found - wanted).abs() / extent).mean((1, 2)) + _GIOU * (1 - generalised_iou(found, wanted))
        # Without a target nothing is to be found, but every parameter stays in the graph.
        return total + (per_voxel * share).sum() / share.sum().clamp(min=1) + 0 * sides.sum()

    def _coarse(self, masks: torch.Tensor) -> torch.Tensor:
        pool = F.max_pool2d if masks.ndim == 4 else F.max_pool3d
        return pool(masks.float(), self.stride, self.stride) > 0

    def _sides_of_targets(
        self, masks: torch.Tensor, counts: torch.Tensor, sides: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The distances to the sides that were found and those to be found, ``(N, 2, axes)`` each, for the ``N`` coarse
        voxels of targets, ``counts: (B, classes, *coarse)``, and each voxel's share of its box, ``(N,)``."""
        axes, steps = masks.ndim - 2, np.array(self.stride)
        where, boxes, share = [np.zeros((0, 2 + axes), int)], [np.zeros((0, axes, 2), int)], [np.zeros(0)]
        counted = counts.cpu().numpy()
        for index, sample in enumerate(masks.cpu().numpy()):
            for channel, mask in enumerate(sample):
                for box in mask_boxes(mask, gap=max(self.stride)):
                    at = [start // step for (start, _), step in zip(box, self.stride, strict=True)]
                    stops = [-(-stop // step) for (_, stop), step in zip(box, self.stride, strict=True)]
                    inside = tuple(map(slice, at, stops))
                    voxels = np.argwhere(counted[(index, channel, *inside)]) + at
                    where.append(np.insert(voxels, 0, [[index], [channel]], 1))
                    boxes.append(np.broadcast_to(box, (len(voxels), axes, 2)))
                    share.append(np.full(len(voxels), 1 / max(1, len(voxels))))
        where, boxes = np.concatenate(where), np.concatenate(boxes)
        middles = (where[:, 2:] + 0.5) * steps
        wanted = np.stack([middles - boxes[..., 0], boxes[..., 1] - middles], 1)
        sample, channel, *voxel = torch.from_numpy(where).to(sides.device).unbind(1)
        found = sides[(sample, channel, slice(None), slice(None), *voxel)]
        return found, *(torch.from_numpy(x).to(sides) for x in (wanted, np.concatenate(share)))

    # --- evaluation ---

    @torch.no_grad()
    def read(self, outputs: dict[str, torch.Tensor], patch: Sequence[int]) -> list[dict[int, list[Detection]]]:
        """The boxes of each sample by class. Their score is the highest probability in the component; its voxels are
        those whose probability reaches the threshold."""
        thresholds = self.score_threshold.tolist()
        probabilities = torch.sigmoid(outputs["mask"].float()).cpu().numpy()  # numpy has no bf16
        sides = outputs["sides"].float().cpu().numpy()
        return [
            {label: self._found(sample[label], distances[label], thresholds[label], patch) for label in self.classes}
            for sample, distances in zip(probabilities, sides, strict=True)
        ]

    def _found(
        self, probability: np.ndarray, sides: np.ndarray, threshold: float, patch: Sequence[int]
    ) -> list[Detection]:
        components, count = ndimage.label(probability >= threshold, np.ones((3,) * probability.ndim))
        if not count:
            return []
        voxels = np.nonzero(components)
        number, weight = components[voxels] - 1, probability[voxels]
        coarse = tuple(index // step for index, step in zip(voxels, self.stride, strict=True))

        def mean(values: np.ndarray) -> np.ndarray:
            """Of each component."""
            return np.bincount(number, values * weight) / np.bincount(number, weight)

        found = np.array([[(part.start, part.stop) for part in extent] for extent in ndimage.find_objects(components)])
        for axis, (step, size) in enumerate(zip(self.stride, patch, strict=True)):
            middle = (coarse[axis] + 0.5) * step
            start, stop = (np.rint(mean(middle + side)) for side in sides[(slice(None), axis, *coarse)] * [[-1], [1]])
            found[:, axis, 0] = np.minimum(found[:, axis, 0], start).clip(min=0)
            found[:, axis, 1] = np.maximum(found[:, axis, 1], stop).clip(max=size)
        boxes: list[Box] = [tuple(map(tuple, box)) for box in found.tolist()]
        return [Detection(box, self._score(probability, box)) for box in merge(boxes)]

    @staticmethod
    def _score(probability: np.ndarray, box: Box) -> float:
        return float(probability[box_slices(box)].max())


def generalised_iou(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Rezatofighi et al. 2019, "Generalized Intersection over Union", in any number of dimensions.

    Both boxes are given as distances of their sides from one point inside the wanted one.

    Args:
        found, wanted: ``(N, 2, axes)``, to the first and to the last side.

    Returns:
        ``(N,)``, from -1 to 1 for equal boxes.
    """
    both = torch.minimum(found, wanted).sum(1).clamp(min=0).prod(1)
    hull = torch.maximum(found, wanted).sum(1).prod(1).clamp(min=1e-6)
    either = (found.sum(1).clamp(min=0).prod(1) + wanted.sum(1).clamp(min=0).prod(1) - both).clamp(min=1e-6)
    return both / either - (hull - either) / hull
