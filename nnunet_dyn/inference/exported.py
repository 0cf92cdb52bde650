"""An exported model: a folder with one model per fold, and a manifest that says what is in it. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_dyn.errors import JobError, UsageError
from nnunet_dyn.inference.engines import CPU_PRECISIONS, MANIFEST, Engine, check_installed
from nnunet_dyn.inference.model_folder import CHECKPOINT, build_network, check_classes
from nnunet_dyn.inference.parts import weights_of

#: Of the manifest. A folder with a higher one was written by a version that this one does not know.
FORMAT = 1
#: Of the ROI cascade: the folder inside that of the segmentor that is the detector's, exported likewise.
FIRST_STAGE = "first_stage"
# Whose classes the plans of an exported network may name, where it is built again.
_PACKAGES = ("nnunet_dyn", "dynamic_network_architectures", "torch")


@dataclass(frozen=True)
class Manifest:
    """What an exported folder holds.

    Attributes:
        engine, precision: the ones it was made for, and is checked with.
        models: the file of each fold, in the order of ``folds``.
        input_shape: (1, C, *patch), of what a model takes.
        mirroring_axes: spatial axes that prediction may flip; ``None`` where the trainer forbids it.
        files: sha256 of every other file of the folder, in hexadecimal.
        versions: of the packages that wrote it.
        accuracy: per fold, what the check found; empty where nothing was checked.
        max_dice_drop: the most that was allowed.
        calibration: what the ranges of an int8 model come from.
        first_stage: sha256 of the manifest in :data:`FIRST_STAGE`; ``None`` where there is no such folder.
        format: see :data:`FORMAT`.

    Raises:
        ValueError: an engine or precision that does not exist; not one model per fold; a file that has no hash.
    """

    engine: str
    precision: str
    trainer: str
    configuration: str
    checkpoint: str
    folds: tuple[int | str, ...]
    models: tuple[str, ...]
    input_shape: tuple[int, ...]
    mirroring_axes: tuple[int, ...] | None
    files: dict[str, str]
    versions: dict[str, str]
    accuracy: tuple[dict[str, Any], ...] = ()
    max_dice_drop: float | None = None
    calibration: dict[str, Any] = field(default_factory=dict)
    first_stage: str | None = None
    format: int = FORMAT

    def __post_init__(self):
        for name in ("folds", "models", "input_shape", "accuracy"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.mirroring_axes is not None:
            object.__setattr__(self, "mirroring_axes", tuple(self.mirroring_axes))
        if self.precision not in CPU_PRECISIONS.get(self.engine, ()):
            raise ValueError(f"engine and precision got {self.engine} {self.precision}; expected an engine's own.")
        if len(self.models) != len(self.folds) or not self.folds:
            raise ValueError(f"models got {self.models} for folds {self.folds}; expected one of each fold.")
        weights = weights_of(self.models)
        if missing := {"plans.json", "dataset.json", *self.models, *weights} - set(self.files):
            raise ValueError(f"files got no hash of {', '.join(sorted(missing))}; expected one of every file.")
        if any(Path(name).name != name for name in self.files):
            raise ValueError(f"files got {', '.join(self.files)}; expected files of the folder itself.")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Exported:
    """What prediction needs of an exported folder."""

    folder: Path
    manifest: Manifest
    plans: PlansManager
    configuration: ConfigurationManager
    dataset: dict

    @property
    def first_stage(self) -> Path:
        """Where the first stage of a cascade is, if there is one."""
        return self.folder / FIRST_STAGE

    def first_stage_folds(self, folds: Sequence[int | str]) -> tuple[int | str, ...]:
        """Which of the first stage go before ``folds``, the same or all; none where there is no such stage."""
        there = () if self.manifest.first_stage is None else _read_manifest(self.first_stage).folds
        return tuple(folds) if set(folds) <= set(there) else there

    def check(self, engine: str | None, precision: str | None, checkpoint: str) -> tuple[str, str]:
        """The engine and precision of the manifest, where nothing else was asked for.

        Raises:
            UsageError: something else was.
        """
        asked = {
            "engine": (engine, self.manifest.engine),
            "precision": (precision, self.manifest.precision),
            "checkpoint": (None if checkpoint == CHECKPOINT else checkpoint, self.manifest.checkpoint),
        }
        for name, (got, own) in asked.items():
            if got not in (None, own):
                raise UsageError(
                    f"Got {name} {got} for {self.folder}; expected {own}, which it was exported with and checked in. "
                    f"Leave {name} out, or export the model once more."
                )
        return self.manifest.engine, self.manifest.precision

    def engine(self, folds: tuple[int | str, ...] | None, threads: int | None) -> Engine:
        """What runs the models of ``folds``, ``None`` for all.

        Raises:
            UsageError: a fold that is not there, or an engine that is not installed.
        """
        manifest = self.manifest
        of_fold = dict(zip(manifest.folds, manifest.models, strict=True))
        if missing := [str(fold) for fold in folds or () if fold not in of_fold]:
            raise UsageError(
                f"{self.folder} has no fold {', '.join(missing)}; there are folds: "
                f"{', '.join(map(str, manifest.folds))}. Name some of those with -f, or export the others."
            )
        files = [self.folder / of_fold[fold] for fold in folds or manifest.folds]
        if files[0].suffix == ".json":
            return self._deciding_engine(files, threads)
        return engine_of(manifest.engine)(files, manifest.precision, threads)

    def _deciding_engine(self, files: list[Path], threads: int | None) -> Engine:
        check_installed(self.manifest.engine, load=True)
        from nnunet_dyn import trainers
        from nnunet_dyn.inference import cascade, stages
        from nnunet_dyn.trainers.med_danet import MedDANetTrainer
        from nnunet_dyn.trainers.roi_cascade import ROICascadeTrainer

        # The only part of an exported model that builds a network. Hashes do not help: they lie in the same folder.
        name, manifest = self.manifest.trainer, self.folder / MANIFEST
        found = getattr(trainers, name, None)
        if not (isinstance(found, type) and issubclass(found, (MedDANetTrainer, ROICascadeTrainer))):
            raise JobError(
                f"{manifest} names trainer {name} for {files[0].name}; expected one of Med-DANet V2 or of the ROI "
                "cascade. Export the model again."
            )
        is_cascade = issubclass(found, ROICascadeTrainer)
        check_classes(self.configuration, _PACKAGES)
        for file in files:
            others = (cascade if is_cascade else stages).listed(file)
            if unknown := sorted(set(others) - set(self.manifest.files)):
                raise JobError(
                    f"{file} lists {', '.join(unknown)}, of which {manifest} has no hash; expected files of the "
                    "export. Export the model again."
                )
        network = build_network(name, self.plans, self.configuration, self.dataset)
        if is_cascade:
            shape, precision = self.manifest.input_shape, self.manifest.precision
            return cascade.CascadeEngine(network, files, self.manifest.engine, precision, shape, threads)
        return stages.StagesEngine(network, files, tuple(self.configuration.patch_size), threads)


def engine_of(name: str) -> type[Engine]:
    """The class of engine ``openvino`` or ``onnxruntime``.

    Raises:
        UsageError: it is not installed.
    """
    check_installed(name, load=True)
    from nnunet_dyn.inference.onnxruntime_engine import ONNXRuntimeEngine
    from nnunet_dyn.inference.openvino_engine import OpenVINOEngine

    return {engine.name: engine for engine in (OpenVINOEngine, ONNXRuntimeEngine)}[name]


def is_exported(folder: str | Path) -> bool:
    """Whether ``folder`` is an exported model rather than nnU-Net's model folder."""
    return (Path(folder) / MANIFEST).is_file()


def load_exported(folder: Path) -> Exported:
    """Read an exported folder and check every file.

    Raises:
        JobError: it is damaged or incomplete, or was written by a newer version.
    """
    manifest = _read_manifest(folder)
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise JobError(f"{folder} has no {name}; expected every file of its {MANIFEST}. Copy the folder again.")
        if sha256(path) != expected:
            raise JobError(
                f"{path} is not the file that was exported: its sha256 differs from the one in {MANIFEST}. Copy the "
                "folder again, or export the model again."
            )
    inner = folder / FIRST_STAGE / MANIFEST
    if manifest.first_stage is not None and (not inner.is_file() or sha256(inner) != manifest.first_stage):
        raise JobError(
            f"{inner} is missing, or not the file that was exported; expected that of the cascade's first stage. Copy "
            "the folder again, or export the model again."
        )
    plans = PlansManager(json.loads((folder / "plans.json").read_text()))
    dataset = json.loads((folder / "dataset.json").read_text())
    return Exported(folder, manifest, plans, plans.get_configuration(manifest.configuration), dataset)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
        written = content["format"]
        if written > FORMAT:
            raise JobError(
                f"{folder} was exported by nnunet_dyn {content.get('versions', {}).get('nnunet_dyn', '')} in format "
                f"{written}; expected {FORMAT} or less. Update nnunet_dyn, or export the model with this version."
            )
        known = {entry.name for entry in fields(Manifest)}
        return Manifest(**{key: value for key, value in content.items() if key in known})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise JobError(
            f"Cannot read {path}: {type(error).__name__}: {error}. Expected that of an exported model; copy the folder "
            "again."
        ) from error


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
