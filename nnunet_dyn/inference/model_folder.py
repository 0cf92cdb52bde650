"""Read an nnU-Net model folder: plans, data set description and the checkpoints of the folds."""

from __future__ import annotations

import inspect
import json
import pickle
import warnings
import zipfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from pydoc import ErrorDuringImport, locate

import numpy as np
import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_dyn.errors import JobError, UsageError

CHECKPOINT = "checkpoint_final.pth"


@dataclass(frozen=True)
class Model:
    """A trained model.

    Attributes:
        parameters: a state dictionary per fold, mapped from the files.
        mirroring_axes: spatial axes that prediction may flip; ``None`` where the trainer forbids it.
    """

    network: nn.Module
    plans: PlansManager
    configuration: ConfigurationManager
    parameters: list[dict]
    dataset: dict
    trainer: str
    mirroring_axes: tuple[int, ...] | None
    configuration_name: str

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(1, C, *patch): one tile."""
        channels = determine_num_input_channels(self.plans, self.configuration, self.dataset)
        return (1, channels, *self.configuration.patch_size)


def available_folds(folder: Path, checkpoint: str = CHECKPOINT) -> list[int | str]:
    """Folds of ``folder`` that have ``checkpoint``: numbers, or ``all`` where that is the only one."""
    names = [path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{checkpoint}")]
    return sorted(int(name) for name in names if name.isdecimal()) or [name for name in names if name == "all"]


def same_or_all(folds: Sequence[int | str], folder: Path, checkpoint: str = CHECKPOINT) -> list[int | str]:
    """Which folds of a cascade's first stage, in ``folder``, go before ``folds`` of the second one: the same, or if one
    of them is missing, all that there are, which may be none."""
    has_all = all((folder / f"fold_{fold}" / checkpoint).is_file() for fold in folds)
    return list(folds) if has_all else available_folds(folder, checkpoint)


def calibrated_checkpoint(folder: Path, checkpoint: str) -> str:
    """Of the ROI cascade's detector in ``folder``, which is calibrated at the end of its training, the last checkpoint;
    ``checkpoint`` where it has none."""
    return CHECKPOINT if available_folds(folder) else checkpoint


def first_stage_folder(folder: Path, configuration: str) -> Path:
    """Where nnU-Net has the model of a cascade's first stage, ``configuration``: beside ``folder``, the second one's.

    >>> first_stage_folder(Path("/results/nnUNetTrainer__nnUNetPlans__3d_cascade_fullres"), "3d_lowres").as_posix()
    '/results/nnUNetTrainer__nnUNetPlans__3d_lowres'
    """
    folder = folder.resolve()
    return folder.with_name("__".join([*folder.name.split("__")[:2], configuration]))


def load_model(folder: Path, folds: Sequence[int | str] | None = None, checkpoint: str = CHECKPOINT) -> Model:
    """Load ``folder``, which nnU-Net calls the trained model's output folder.

    Args:
        folds: ``None`` takes those that are there.
        checkpoint: file name in each fold's folder.

    Raises:
        UsageError: no model folder, or one without the folds that were asked for.
        JobError: a file that cannot be read, a trainer that nnU-Net does not find, or a network that cannot be built.
    """
    if not folder.is_dir():
        raise UsageError(f"No model folder {folder}; expected the one that nnUNetv2_train wrote.")
    dataset, plans = (_load_json(folder / name) for name in ("dataset.json", "plans.json"))
    there = available_folds(folder, checkpoint)
    if missing := [str(fold) for fold in folds or there if not (folder / f"fold_{fold}" / checkpoint).is_file()]:
        raise UsageError(
            f"{folder} has no {checkpoint} of fold {', '.join(missing)}; there are folds: "
            f"{', '.join(map(str, there)) or 'none'}. Name some of those with -f, or another checkpoint with -chk."
        )
    if not there and not folds:
        raise UsageError(f"{folder} has no fold with a {checkpoint}. Finish the training, or name another with -chk.")
    checkpoints = [load_checkpoint(folder / f"fold_{fold}" / checkpoint) for fold in folds or there]
    first = checkpoints[0]
    try:
        manager = PlansManager(plans)
        configuration = manager.get_configuration(first["init_args"]["configuration"])
        network = build_network(first["trainer_name"], manager, configuration, dataset)
    except (KeyError, TypeError, ValueError, RuntimeError, ImportError) as error:
        if isinstance(error, JobError):
            raise
        raise JobError(
            f"Cannot build the network of {folder}: {type(error).__name__}: {error}. Expected plans.json and "
            "dataset.json as the training left them, and the packages it used."
        ) from error
    axes = first.get("inference_allowed_mirroring_axes")
    weights = [content["network_weights"] for content in checkpoints]
    return Model(
        network,
        manager,
        configuration,
        weights,
        dataset,
        first["trainer_name"],
        axes and tuple(axes),
        first["init_args"]["configuration"],
    )


def _load_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise JobError(f"Cannot read {path}: {error}. Expected a model folder of nnU-Net; copy it again.") from error


def load_checkpoint(path: Path) -> dict:
    """The parts of a checkpoint that prediction needs; tensors stay in the file until they are used.

    Only tensors and plain values are unpickled. A checkpoint with anything else is still loaded, as nnU-Net would
    load it, with a warning.

    Raises:
        JobError: it cannot be read, or is not one of nnU-Net's.
    """
    if not zipfile.is_zipfile(path):  # torch would take any other file for a bare pickle
        raise JobError(
            f"{path} is truncated or no checkpoint of nnU-Net v2; expected torch's zip format. Copy it again."
        )
    # nnU-Net logs numpy's numbers beside the weights; nothing in them can run code.
    plain = [
        np.dtype,
        *(getattr(np.dtypes, name) for name in ("Float32DType", "Float64DType", "Int64DType", "BoolDType")),
    ]
    plain.append((np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"))
    plain.append((np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"))
    try:
        try:
            with torch.serialization.safe_globals(plain):
                content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (pickle.UnpicklingError, AttributeError):  # torch before 2.6 takes no names of other numpy versions
            warnings.warn(
                f"{path} holds more than tensors and plain values, so it is loaded with pickle, which can run code: go "
                "on only with a model folder from a source you trust.",
                stacklevel=2,
            )
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        needed = ("network_weights", "trainer_name", "init_args", "inference_allowed_mirroring_axes")
        missing = [key for key in needed[:-1] if key not in content]
    except (OSError, RuntimeError, EOFError, ValueError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise JobError(f"Cannot load {path}: {type(error).__name__}: {error}. Copy it again.") from error
    if missing:
        raise JobError(f"{path} has no {', '.join(missing)}; expected a checkpoint of nnU-Net v2.")
    return {key: content[key] for key in needed if key in content}


def check_classes(configuration: ConfigurationManager, packages: Sequence[str] | None = None) -> None:
    """Check that what the plans name is made of networks and layers: nnU-Net calls whatever it is, as they tell it to.

    Args:
        packages: those whose classes may be named; ``None``: any. Names of others are not even imported.

    Raises:
        JobError: something else is named.
    """
    kwargs = configuration.network_arch_init_kwargs
    keys = {*configuration.network_arch_init_kwargs_req_import, "network_class"}
    for name in (configuration.network_arch_class_name, *(kwargs.get(key) for key in sorted(keys))):
        if name is None:
            continue
        inside = packages is None or str(name).partition(".")[0] in packages
        try:
            found = locate(name) if inside else None
        except ErrorDuringImport as error:
            raise JobError(f"Cannot import {name}, which plans.json names: {error}. Install what it needs.") from error
        if found is None and packages is None:  # nnU-Net looks for it elsewhere, among its own networks
            continue
        # Asked of what was found: a dotted path leads through modules to what they import.
        origin = getattr(found, "__module__", "") or ""
        own = inspect.isfunction(found) and origin.startswith("nnunet_dyn.architectures.")
        if not (own or (inspect.isclass(found) and issubclass(found, nn.Module))) or not (
            packages is None or origin.partition(".")[0] in packages
        ):
            where = "" if packages is None else f" of {', '.join(packages)}"
            raise JobError(
                f"plans.json names {name}, which is no network or layer{where}; expected only those, because whatever "
                "it names is run. Take a model from a source you trust."
            )


def build_network(trainer: str, plans: PlansManager, configuration: ConfigurationManager, dataset: dict) -> nn.Module:
    """The network that trainer ``trainer`` trains, without deep supervision.

    Raises:
        JobError: nnU-Net does not find the trainer, or the plans name something else than networks and layers.
    """
    check_classes(configuration)
    try:
        with redirect_stdout(StringIO()):  # nnU-Net reports its search
            trainer_class = recursive_find_trainer_class_by_name(trainer)
    except RuntimeError as error:
        raise JobError(
            f"The model was made by trainer {trainer}, which nnU-Net does not find here. Run 'nnunet_dyn doctor "
            f"{trainer}'; install the package it comes from, or name its folder in nnUNet_extTrainer."
        ) from error
    channels = determine_num_input_channels(plans, configuration, dataset)
    heads = plans.get_label_manager(dataset).num_segmentation_heads
    build = trainer_class.build_network_architecture
    if "plans_manager" in inspect.signature(build).parameters:
        return build(plans, configuration, channels, heads, enable_deep_supervision=False)
    return build(  # the signature before nnU-Net 2.8
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        channels,
        heads,
        enable_deep_supervision=False,
    )
