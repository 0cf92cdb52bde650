"""From the architecture that nnU-Net planned to another network for the same patch, strides and kernels."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from copy import deepcopy
from math import prod
from pydoc import locate
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_dyn.plans_templates import Template

if TYPE_CHECKING:  # importing it takes a second, and trainers import this module
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

# A whole volume's coarsest map has this many voxels per axis at least, and so many halvings lead to it at most: with
# more, axes would have to be multiples of more, and more of the patch would be padding.
_COARSEST, _MOST_HALVINGS = 4, 4

#: What a plan's architecture must say for a U-Net to be derived from it.
UNET_KEYS = ("n_stages", "features_per_stage", "conv_op", "kernel_sizes", "strides")


def adapt_arch_kwargs(network_class: type[nn.Module], planned: dict, overlay: dict) -> dict:
    """Return the architecture arguments for ``network_class``: the planned ones it knows, then ``overlay``.

    Args:
        planned: ``arch_kwargs`` of a configuration that nnU-Net planned for one of its U-Nets.
        overlay: arguments that the new network needs beyond those.

    Raises:
        ValueError: the planned network is not a U-Net that says its stages, widths, kernels and strides.
    """
    missing = [key for key in UNET_KEYS if key not in planned]
    if missing:
        raise ValueError(
            f"The plans' architecture has {sorted(planned)}, without {', '.join(missing)}; expected the arguments of "
            "a U-Net. Plan with nnU-Net's default or a ResEnc planner."
        )
    known = inspect.signature(network_class).parameters
    return {key: value for key, value in planned.items() if key in known} | overlay


def derived_architecture(
    template: Template, planned: dict, patch_size: Sequence[int] | None = None, image_channels: int | None = None
) -> dict:
    """The architecture block of ``template``'s network for the stages, strides and kernels of ``planned``'s.

    A template whose network takes a ``network_class`` wraps another network: the one it names, or the planned one.

    Args:
        patch_size, image_channels: what networks are told that ask for them. The channels are those of the image,
            without those of a previous stage.

    Raises:
        ValueError: see :func:`adapt_arch_kwargs`.
    """
    overlay, kwargs = template.arch_kwargs, planned["arch_kwargs"]
    imports = list(planned["_kw_requires_import"])
    if "network_class" not in inspect.signature(template.network_class).parameters:
        kwargs = adapt_arch_kwargs(template.network_class, kwargs, overlay)
    elif "network_class" in overlay:
        kwargs = adapt_arch_kwargs(_located(overlay["network_class"]), kwargs, overlay)
        imports.append("network_class")
    elif planned["network_class_name"] == template.network_class_name:
        if any(kwargs.get(key) != value for key, value in overlay.items()):
            raise ValueError(
                f"The plans name a network that is made with {overlay.keys() & kwargs.keys()} of their own, and "
                f"{template.name} has others. Take the configuration that this one comes from."
            )
    else:
        kwargs = kwargs | overlay | {"network_class": planned["network_class_name"]}
        imports.append("network_class")
    asked = inspect.signature(template.network_class).parameters
    told = {"patch_size": patch_size and list(map(int, patch_size)), "image_channels": image_channels}
    kwargs = kwargs | {key: value for key, value in told.items() if key in asked and value is not None}
    return {
        "network_class_name": template.network_class_name,
        "arch_kwargs": kwargs,
        "_kw_requires_import": [key for key in imports if key in kwargs],
    }


def _located(name: str) -> type[nn.Module]:
    found = locate(name)
    if not isinstance(found, type):
        raise ValueError(f"network_class got {name!r}; expected the dotted path of a class that can be imported here.")
    return found


def build_network(architecture: dict, input_channels: int, num_classes: int, **options) -> nn.Module:
    """Build the network of an architecture block of nnU-Net's plans; ``options`` as ``get_network_from_plans`` has."""
    keys = ("network_class_name", "arch_kwargs", "_kw_requires_import")
    return get_network_from_plans(*(architecture[key] for key in keys), input_channels, num_classes, **options)


def check_patch_size(patch_size: Sequence[int], strides: Sequence[Sequence[int]], plans_name: str) -> None:
    """Check that every axis of the patch survives all strides.

    Raises:
        ValueError: an axis is not divisible by the product of its strides.
    """
    divisor = [prod(axis) for axis in zip(*strides, strict=True)]
    if any(size % d for size, d in zip(patch_size, divisor, strict=True)):
        nearest = [max(d, round(size / d) * d) for size, d in zip(patch_size, divisor, strict=True)]
        raise ValueError(
            f"{plans_name}: got patch size {list(patch_size)}; expected every axis divisible by the product of "
            f"the strides, {divisor}. Set patch_size to {nearest} in the plans, or plan again."
        )


def is_planned_unet(configuration: dict) -> bool:
    """Whether the resolved ``configuration`` names one of nnU-Net's U-Nets, from which others can be derived."""
    architecture = configuration["architecture"]
    module = architecture["network_class_name"].partition(".")[0]
    return module != "nnunet_dyn" and all(key in architecture["arch_kwargs"] for key in UNET_KEYS)


def network_planner(
    plans: PlansManager, template: Template, gpu_memory_target_in_gb: float | None
) -> ExperimentPlanner:
    """nnU-Net's planner that made ``plans``, turned to the memory of another network.

    It finds patch, strides, widths and batch size as nnU-Net does, from what ``template``'s network says of its
    feature maps (``compute_conv_feature_map_size``, in the unit of nnU-Net's ``PlainConvUNet``).

    Args:
        gpu_memory_target_in_gb: as in ``nnUNetv2_plan_experiment``; ``None`` takes the planner's own default.

    Raises:
        RuntimeError: the data set's fingerprint is missing.
    """
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

    base = plans.experiment_planner_class or ExperimentPlanner
    target = {} if gpu_memory_target_in_gb is None else {"gpu_memory_target_in_gb": gpu_memory_target_in_gb}
    planner_class = type(f"{base.__name__}For{template.name}", (_NetworkPlanning, base), {"template": template})
    planner = planner_class(plans.dataset_name, **target)
    # The ResEnc planners have reference values of their own, tuned to residual networks.
    reference = ExperimentPlanner(plans.dataset_name)
    for name in ("UNet_reference_val_3d", "UNet_reference_val_2d", "UNet_reference_val_corresp_GB"):
        setattr(planner, name, getattr(reference, name))
    return planner


class _NetworkPlanning:
    """Makes a planner ask another network than its own for its feature maps."""

    template: ClassVar[Template]

    def static_estimate_VRAM_usage(
        self, patch_size, input_channels, output_channels, arch_class_name, arch_kwargs, arch_kwargs_req_import
    ) -> np.int64:
        planned = {
            "network_class_name": arch_class_name,
            "arch_kwargs": arch_kwargs,
            "_kw_requires_import": arch_kwargs_req_import,
        }
        architecture = derived_architecture(self.template, planned, patch_size, input_channels)
        if "image_channels" in architecture["arch_kwargs"]:
            input_channels += output_channels  # nnU-Net says those of the image alone
        with torch.device("meta"):  # sizes only; no weights are made
            network = build_network(architecture, input_channels, output_channels, allow_init=False)
        return network.compute_conv_feature_map_size(patch_size)


def derive_configuration(planner: ExperimentPlanner, plans: PlansManager, name: str, cache: dict) -> dict:
    """Plan configuration ``name`` of ``plans`` anew for the planner's network.

    Returns:
        A configuration that inherits from ``name`` and says its own architecture, patch size and batch size.

    Raises:
        ValueError: the template's patch or spacing has another dimension than ``name``, or its patch does not fit the
            strides or the memory.
    """
    planned = plans.get_configuration(name)
    template = planner.template
    spacing, median = np.array(planned.spacing, float), np.array(planned.median_image_size_in_voxels, float)
    own = {}
    for key in ("spacing", "patch_size"):
        if len(template.configuration.get(key, spacing)) != len(spacing):
            raise ValueError(f"{key} got {template.configuration[key]}; expected {len(spacing)} numbers.")
    if "spacing" in template.configuration:
        new_spacing = np.array(template.configuration["spacing"], float)
        median = np.round(median * spacing / new_spacing)
        spacing = new_spacing
        own = {"spacing": spacing, "median_image_size_in_voxels": median}
    slices = 1
    if len(median) == 2:  # the planner's batch size depends on the voxels of the whole data set
        has_fullres = "3d_fullres" in plans.available_configurations
        volume = plans.get_configuration("3d_fullres").median_image_size_in_voxels if has_fullres else None
        slices = (volume or plans.original_median_shape_after_transp)[0]
    voxels = float(prod(median)) * slices * planner.dataset_json["numTraining"]
    # The planner starts from a patch that covers the median image, so this makes it start from the wanted patch.
    start = np.array(template.configuration.get("patch_size", median), float)
    new = planner.get_plans_for_configuration(spacing, start, planned.data_identifier, voxels, cache)
    wanted = template.configuration.get("patch_size")
    if wanted is not None and list(new["patch_size"]) != wanted:
        raise ValueError(
            f"patch_size got {wanted}; the nearest that fits the strides and the memory is "
            f"{list(map(int, new['patch_size']))}. Take that, or raise -gpu_memory_target."
        )
    configuration = {
        "inherits_from": name,
        **own,
        "patch_size": new["patch_size"],
        "batch_size": new["batch_size"],
        "architecture": derived_architecture(
            template, new["architecture"], new["patch_size"], _channels(planner.dataset_json)
        ),
        **template.configuration,
    }
    recursive_fix_for_json_export(configuration)
    return configuration


def _channels(dataset_json: dict) -> int:
    return len(dataset_json["modality" if "modality" in dataset_json else "channel_names"])


def derive_whole_volume(planner: ExperimentPlanner, plans: PlansManager, name: str) -> dict:
    """Plan a configuration whose patch holds every training volume, at the finest spacing that ``whole_volume`` allows.

    As nnU-Net plans low resolution, the finer axes are coarsened first, until all are within a factor of two.

    Returns:
        A configuration that inherits from ``name`` and has a spacing, hence preprocessed data, of its own.

    Raises:
        ValueError: no spacing leaves so few voxels.
    """
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    planned, template, axes = plans.get_configuration(name), planner.template, plans.transpose_forward
    full_spacing, fingerprint = np.array(planned.spacing, float), planner.dataset_fingerprint
    extents = np.array(fingerprint["shapes_after_crop"]) * np.array(fingerprint["spacings"])
    extent = extents.max(0)[axes]  # in mm
    wanted = template.whole_volume
    limit = min(wanted["max_voxels"], wanted["max_share"] * prod(np.round(extent / full_spacing)))
    spacing = full_spacing.copy()
    while True:
        volume = np.maximum(1, np.round(extent / spacing)).astype(int)
        _, strides, kernels, patch, _ = get_pool_and_conv_props(spacing, volume, _COARSEST, _MOST_HALVINGS)
        if len(strides) < 2:
            raise ValueError(
                f"volumes of up to {np.round(extent / full_spacing).astype(int).tolist()} voxels allow a whole one of "
                f"{limit:.0f}, too few to halve. Such small volumes need no detector: train {name}."
            )
        if prod(patch) <= limit:
            break
        is_finer = spacing.max() / spacing > 2
        spacing[is_finer if is_finer.any() else slice(None)] *= 1.02
    architecture = deepcopy(planned.configuration["architecture"])
    architecture["arch_kwargs"] |= {"n_stages": len(strides), "strides": strides, "kernel_sizes": kernels}
    channels = _channels(planner.dataset_json)
    classes = plans.get_label_manager(planner.dataset_json).num_segmentation_heads
    architecture = derived_architecture(template, architecture, patch, channels)
    with torch.device("meta"):
        network = build_network(architecture, channels, classes, allow_init=False)
    # As nnU-Net does: what the memory takes, at most a twentieth of the data set, and no less than its minimum.
    memory = planner.UNet_reference_val_3d * planner.UNet_vram_target_GB / planner.UNet_reference_val_corresp_GB
    fits = int(memory / network.compute_conv_feature_map_size(patch) * planner.UNet_reference_val_corresp_bs_3d)
    twentieth = round(planner.dataset_json["numTraining"] * planner.max_dataset_covered)
    configuration = {
        "inherits_from": name,
        "spacing": spacing,
        "median_image_size_in_voxels": np.round(np.array(planned.median_image_size_in_voxels) * full_spacing / spacing),
        "patch_size": patch,
        "batch_size": max(planner.UNet_min_batch_size, min(fits, twentieth)),
        "architecture": architecture,
        **template.configuration,
    }
    recursive_fix_for_json_export(configuration)
    return configuration


def source_configurations(plans: dict) -> dict[str, int]:
    """Configurations of ``plans`` that others can be derived from, and the dimension of their patch."""
    manager = PlansManager(plans)
    resolved = {name: manager.get_configuration(name).configuration for name in manager.available_configurations}
    return {name: len(entries["patch_size"]) for name, entries in resolved.items() if is_planned_unet(entries)}
