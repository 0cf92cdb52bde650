"""Model folders for the tests, as nnU-Net leaves them, with untrained networks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from plans import plans_manager

from nnunet_dyn.inference.model_folder import build_network
from nnunet_dyn.planning import derived_architecture
from nnunet_dyn.plans_templates import load_template

LABELS = {"background": 0, "a": 1, "b": 2, "c": 3, "d": 4}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "active": 3}

LINEAR = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}


def plans(
    dimension: int = 3,
    patch_size: Sequence[int] = (16, 16, 16),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    channels: int = 1,
    transpose: Sequence[int] = (0, 1, 2),
    resampling: tuple[str, dict] = ("resample_data_or_seg_to_shape", LINEAR),
    residual: bool = False,
    reader: str = "SimpleITKIO",
) -> dict:
    """Plans with one configuration of a network of three small stages, plain or with nnU-Net's residual encoder."""
    made = plans_manager(dimension, patch_size, n_stages=3, features=(8, 16, 32)).plans
    made["image_reader_writer"] = reader
    (configuration,) = made["configurations"].values()
    if residual:
        architecture = configuration["architecture"]
        architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
        architecture["arch_kwargs"]["n_blocks_per_stage"] = architecture["arch_kwargs"].pop("n_conv_per_stage")
    name, kwargs = resampling
    configuration |= {
        "spacing": list(spacing)[-dimension:],
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {**LINEAR, "order": 3},
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {**LINEAR, "is_seg": True},
        "resampling_fn_probabilities": name,
        "resampling_fn_probabilities_kwargs": kwargs,
    }
    made["transpose_forward"] = list(transpose)
    made["transpose_backward"] = [list(transpose).index(axis) for axis in range(3)]
    made["foreground_intensity_properties_per_channel"] = {str(c): {} for c in range(channels)}
    return made


def dataset(labels: dict = LABELS, channels: int = 1) -> dict:
    regions = any(isinstance(label, list) for label in labels.values())
    return {
        "channel_names": {str(channel): f"image{channel}" for channel in range(channels)},
        "labels": labels,
        "file_ending": ".nii.gz",
        **({"regions_class_order": [1, 2, 3]} if regions else {}),
    }


def write_model(
    folder: Path,
    labels: dict = LABELS,
    folds: int = 1,
    channels: int = 1,
    trainer: str = "nnUNetTrainer",
    mirroring: Sequence[int] | None = (0, 1, 2),
    previous_stage: bool | str = False,
    template: str | None = None,
    part: str | None = None,
    arch_kwargs: dict | None = None,
    prepare: Callable[[torch.nn.Module], None] | None = None,
    **options,
) -> Path:
    """Write a model folder with random weights; ``options`` are those of ``plans``.

    Args:
        previous_stage: its name, or whether it is 3d_lowres.
        template, part, arch_kwargs: whose network it is, of a template of several the configuration, and arguments.
        prepare: changes the network before it is written; without it its classes are made to win equally often.
    """
    content, description = plans(channels=channels, **options), dataset(labels, channels)
    (configuration,) = content["configurations"]
    if template is not None:
        planned = content["configurations"][configuration]
        chosen = load_template(template) if part is None else load_template(template).parts[part]
        architecture = derived_architecture(chosen, planned["architecture"], planned["patch_size"], channels)
        architecture["arch_kwargs"] |= arch_kwargs or {}
        source, configuration = configuration, part or f"{configuration}_{template}"
        content["configurations"][configuration] = {"inherits_from": source, "architecture": architecture}
    if previous_stage:
        content["configurations"][configuration]["previous_stage"] = (
            previous_stage if isinstance(previous_stage, str) else "3d_lowres"
        )
    manager = PlansManager(content)
    inputs = determine_num_input_channels(manager, configuration, description)
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(content))
    (folder / "dataset.json").write_text(json.dumps(description))
    for fold in range(folds):
        torch.manual_seed(fold)
        network = build_network(trainer, manager, manager.get_configuration(configuration), description)
        if prepare is None:
            _let_every_class_win(network, manager.get_configuration(configuration).patch_size, inputs)
        else:
            prepare(network.eval())
        (folder / f"fold_{fold}").mkdir()
        checkpoint = {
            "network_weights": network.state_dict(),
            "trainer_name": trainer,
            "init_args": {"configuration": configuration, "fold": fold, "device": torch.device("cpu")},
            "inference_allowed_mirroring_axes": mirroring and tuple(mirroring[: content_dimension(content)]),
            "logging": {"train_losses": [np.float32(0.5)], "val_losses": [np.float64(0.25)]},
        }
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder


def _let_every_class_win(network: torch.nn.Module, patch_size: Sequence[int], channels: int) -> None:
    """Give the classes the same mean, so that an untrained network does not predict one of them everywhere."""
    with torch.no_grad():
        logits = network.eval()(torch.randn(1, channels, *patch_size)).flatten(2)
        head = getattr(network, "backbone", network).decoder.seg_layers[-1]
        head.weight *= 3 / logits.std()
        if head.bias is not None:
            head.bias -= logits.mean(2)[0]
            head.bias *= 3 / logits.std()


@torch.no_grad()
def lose_in_int8(norm: torch.nn.Module, conv: torch.nn.Module) -> None:
    """Let ``conv``, behind ``norm``, lose everything in int8 and nothing in floating point.

    One of the channels that it gets is so much larger than the others, and its weights so much smaller, that one range
    holds neither.
    """
    norm.weight[0] *= 2**16
    norm.bias[0] *= 2**16
    conv.weight[:, 0] /= 2**16


def write_deciding_model(folder: Path, tiles: torch.Tensor, **options) -> Path:
    """A folder of Med-DANet V2 whose untrained policy skips a third of ``tiles``, crops a third, and has every class.

    Args:
        tiles: (B, C, *patch), a few different ones.
    """

    @torch.no_grad()
    def prepare(network):
        network.is_quantised.fill_(True)
        network.set_regions(any(isinstance(label, list) for label in options.get("labels", LABELS).values()))
        view = network._view(tiles)
        network.policy.fc.weight *= 30 / network.score(view).std(0).mean()
        network.policy.fc.bias -= network.score(view).mean(0)
        for selector in network.selectors:
            selector.linear.weight *= 30
        scores = sorted(decision.skip_probability for decision in network.decide(tiles))
        network.skip_threshold.fill_(scores[-1 - len(tiles) // 3])
        rest = sorted(d.crop_probability for d in network.decide(tiles) if d.action != "skip")
        network.crop_threshold.fill_(rest[len(rest) // 2 - 1])
        logits = network.segment_whole(tiles).transpose(0, 1).flatten(1)
        for head in (network.backbone.decoder.seg_layers[0], network.crop_tail.seg_layers[0]):
            head.bias -= logits.mean(1)
            head.weight *= 3 / logits.std()
            head.bias *= 3 / logits.std()

    decides = {"policy_space": ["skip", 16, "whole"], "guidance": 0}
    small = {"base_features": 4, "blocks": [1, 1, 1], "med_danet": decides}
    options = {"dimension": 2, "patch_size": tiles.shape[2:], "channels": tiles.shape[1]} | options
    trainer = "nnUNetTrainerMedDANetV2"
    return write_model(folder, trainer=trainer, template="meddanetv2", arch_kwargs=small, prepare=prepare, **options)


def content_dimension(content: dict) -> int:
    return len(next(iter(content["configurations"].values()))["patch_size"])


def image(shape: Sequence[int], channels: int = 1, seed: int = 0) -> np.ndarray:
    """(channels, z, y, x): smooth shapes with noise, between margins of zeros that nnU-Net crops away."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(0, 6, n) for n in shape), indexing="ij")
    smooth = sum(np.sin(axis + shift) for axis, shift in zip(axes, rng.uniform(0, 6, 3), strict=True))
    made = np.stack([smooth * (c + 1) + rng.normal(0, 0.3, shape) for c in range(channels)]).astype(np.float32)
    made[..., :2] = made[..., -3:] = 0
    return made


def write_cases(
    folder: Path,
    arrays: dict[str, np.ndarray],
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    ending: str = ".nii.gz",
) -> Path:
    """Write (channels, z, y, x) arrays in nnU-Net's naming."""
    folder.mkdir(parents=True, exist_ok=True)
    for case, array in arrays.items():
        for channel, values in enumerate(array):
            file = sitk.GetImageFromArray(values)
            file.SetSpacing([float(value) for value in spacing[::-1]])
            file.SetOrigin((3.0, -4.0, 5.0))
            sitk.WriteImage(file, str(folder / f"{case}_{channel:04d}{ending}"))
    return folder
