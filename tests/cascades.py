"""An untrained ROI cascade that works: its detector finds what is bright, its segmentor has every class."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import models
import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

from nnunet_dyn.inference import Predictor

TRAINER = "nnUNetTrainerROICascade"
ROI_NAMES = [f"{TRAINER}__nnUNetDynPlans__{configuration}" for configuration in ("3d_detect", "3d_roi")]
CUBE = ((4, 12), (6, 16), (8, 18))


@torch.no_grad()
def find_the_cube(network):
    """A detector of untrained features tells what is bright from the rest: its mask is fitted by least squares."""
    x = torch.randn(1, 1, 16, 24, 24) * 0.2
    x[..., 4:8, 4:10, 4:10] = 5
    inside = (x[0, 0] > 2).flatten()
    mask, sides = network.head.seg_layers["mask"], network.head.seg_layers["sides"]
    with mask.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs)):
        seen = []
        network.raw(x)
    features = torch.nn.functional.pad(seen[0][0].flatten(1).T, (0, 1), value=1.0)
    weight = torch.linalg.lstsq(features, torch.where(inside, 4.0, -4.0)[:, None]).solution[:, 0]
    mask.weight.copy_(weight[:-1].view(1, -1, 1, 1, 1).expand_as(mask.weight))
    mask.bias.fill_(weight[-1])
    sides.weight.zero_()
    sides.bias.fill_(-9)
    network.score_threshold.fill_(0.5)


@torch.no_grad()
def give_every_class(network):
    for parameter in network.decoder.seg_layers.parameters():
        parameter *= 10


def lattice(shape: Sequence[int], first: Sequence[int] = (0, 0, 0)) -> np.ndarray:
    """Every second cube of four voxels a side, so that every crop has as many bright voxels as dark ones."""
    return (((np.indices(shape) + np.reshape(first, (-1, 1, 1, 1))) // 4).sum(0) % 2).astype(bool)


def segment_the_lattice(network):
    """Train a segmentor for a few seconds to give what is bright the first label, wherever a crop begins and ends."""
    rng, optimizer = np.random.default_rng(0), torch.optim.Adam(network.network.parameters(), 5e-3)
    network.decoder.deep_supervision = False
    for _ in range(60):
        size = rng.choice([8, 16], 3)
        target = np.stack([lattice(size, rng.integers(0, 8, 3)) for _ in range(2)])
        x = rng.normal(0, 0.2, target.shape) + 5 * target
        logits = network.network(torch.from_numpy((x - x.mean()) / x.std()).float()[:, None])
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(target).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def write_cascade(
    results: Path,
    template: str = "roi_cascade",
    patch_size: Sequence[int] = (16, 16, 16),
    prepare: Callable = give_every_class,
    **options,
) -> Path:
    """The model folders of both stages in ``results``; that of the segmentor. Their data have folders of their own.

    Args:
        patch_size, prepare: of the segmentor.
    """
    detector, segmentor = (results / name for name in ROI_NAMES)
    common = {"trainer": TRAINER, "template": template} | options
    models.write_model(detector, part="3d_detect", spacing=(2, 2, 2), mirroring=None, patch_size=(16, 24, 24),
                       prepare=find_the_cube, **common)  # fmt: skip
    models.write_model(segmentor, part="3d_roi", previous_stage="3d_detect", mirroring=(2,),
                       patch_size=patch_size, prepare=prepare, **common)  # fmt: skip
    plans = json.loads((detector / "plans.json").read_text())
    plans["configurations"]["3d_detect"]["data_identifier"] = "nnUNetDynPlans_3d_detect"
    (detector / "plans.json").write_text(json.dumps(plans))
    return segmentor


def bright_cubes(*cubes: Sequence[tuple[int, int]], seed: int = 0) -> np.ndarray:
    array = np.random.default_rng(seed).normal(0, 0.2, (1, 24, 32, 44)).astype(np.float32)
    for cube in cubes or [CUBE]:
        array[(0, *(slice(*axis) for axis in cube))] += 5
    return array


def write_preprocessed(root: Path, segmentor: Path, cases: Sequence[np.ndarray], training: int) -> Path:
    """``cases`` as preprocessed for both stages, labelled with what the cascade says of them, and one fold of them.

    ``root`` is ``nnUNet_preprocessed``.
    """
    predictor = Predictor.from_folder(segmentor, (0,), device="cpu", threads=1)
    names = [f"case_{number}" for number in range(len(cases))]
    for name, array in zip(names, cases, strict=True):
        labels = predictor.predict(array, (1, 1, 1)).segmentation
        for one in (predictor, predictor.first_stage):
            data, properties = one.preprocess([array], {"spacing": [1.0, 1.0, 1.0]})
            data = data[:1].numpy()
            # The detector's are looked at only where the detector alone is exported or checked.
            own = labels if one is predictor else labels[::2, ::2, ::2]
            own = own[None].astype(np.int16)
            found = {label: np.argwhere(own == label)[:100] for label in one.label_manager.foreground_labels}
            folder = root / one.plans_manager.dataset_name / one.configuration_manager.data_identifier
            folder.mkdir(parents=True, exist_ok=True)
            properties["class_locations"] = found
            blocks, chunks = comp_blosc2_params(data.shape, (16,) * 3, data.itemsize)
            nnUNetDatasetBlosc2.save_case(data, own, properties, str(folder / name), chunks=chunks, blocks=blocks,
                                          chunks_seg=chunks, blocks_seg=blocks)  # fmt: skip
    splits = [{"train": names[:training], "val": names[training:]}]
    (folder.parent / "splits_final.json").write_text(json.dumps(splits))
    return root
