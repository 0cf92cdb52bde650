"""From a trained model folder to an exported one: convert, quantise, check, and only then write."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nnunet_dyn import __version__
from nnunet_dyn.errors import JobError, UsageError
from nnunet_dyn.inference.conversion import ENDINGS, convert, quantise, runner, save
from nnunet_dyn.inference.engines import MANIFEST, Engine, TorchEngine, check_engine, check_installed
from nnunet_dyn.inference.exported import Manifest, engine_of, is_exported, sha256
from nnunet_dyn.inference.model_folder import CHECKPOINT, Model, available_folds, load_model
from nnunet_dyn.inference.predictor import Predictor
from nnunet_dyn.inference.preprocessed import Cases, dice, spread

#: Packages whose versions the manifest has, where they are installed.
PACKAGES = ("nnunetv2", "torch", "openvino", "nncf", "onnx", "onnxruntime")
# Of each calibration case. Ranges are those of the widest values seen, which more patches of a case seldom change.
_PATCHES = 4
# The patches that layers are put back on; each of them runs once for every candidate.
_PATCHES_FOR_FALLBACK = 8
# How much of the disagreement with the original on these patches may stay, tried one after the other.
_FALLBACK = (1 / 2, 1 / 4, 1 / 8)


@dataclass(frozen=True)
class ExportOptions:
    """What ``nnunet_dyn export`` is asked for.

    Attributes:
        engine: ``openvino`` or ``onnxruntime``.
        precision: ``fp32``, ``bf16`` (OpenVINO) or ``int8``.
        max_dice_drop: the most mean Dice, from 0 to 1, that a fold may lose on the checked cases.
        force: write the model even if it loses more, and fp32 and bf16 even if there is nothing to check them on.
        validation_cases: of each fold to check on, at most.
        calibration_cases: training cases of each fold that int8 takes its ranges from, at most.
        threads: on the CPU; ``None`` takes every core this process may use.

    Raises:
        UsageError: what cannot be.
    """

    engine: str
    precision: str = "fp32"
    max_dice_drop: float = 0.005
    force: bool = False
    validation_cases: int = 5
    calibration_cases: int = 16
    threads: int | None = None

    def __post_init__(self):
        if self.engine == "torch":
            raise UsageError("Got engine torch, which predicts from a model folder; expected openvino or onnxruntime.")
        check_engine(self.engine, self.precision, "cpu")
        if not 0 <= self.max_dice_drop <= 1:
            raise UsageError(f"Got --max-dice-drop {self.max_dice_drop}; expected 0 to 1, such as 0.005.")
        for name in ("validation_cases", "calibration_cases"):
            if getattr(self, name) < 1:
                raise UsageError(f"Got --{name.replace('_', '-')} {getattr(self, name)}; expected 1 or more.")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"Got {self.threads} threads; expected 1 or more.")


def export_model(
    folder: Path,
    output: Path,
    options: ExportOptions,
    folds: Sequence[int | str] | None = None,
    checkpoint: str = CHECKPOINT,
    overwrite: bool = False,
    report: Callable[[str], object] = lambda line: None,
) -> Manifest:
    """Export the model folder ``folder`` to ``output``, or write nothing.

    Args:
        folds: ``None`` takes those that are there.
        overwrite: replace an exported model in ``output``.
        report: called with a line on what is being done.

    Raises:
        UsageError: see :class:`ExportOptions`; an engine that is not installed; no preprocessed cases; something else
            than an exported model in ``output``.
        JobError: the model cannot be converted, or loses more than ``max_dice_drop``.
    """
    check_installed(options.engine, *_also_needed(options))
    if output.exists() and not (overwrite and is_exported(output)):
        remedy = "Take another folder" + (", or --overwrite" if is_exported(output) and not overwrite else "")
        raise UsageError(f"{output} is there already; expected a new folder. {remedy}.")
    model = load_model(folder, folds, checkpoint)
    names = list(folds or available_folds(folder, checkpoint))
    try:
        cases = Cases.of(model, folder)
    except UsageError:
        if options.precision == "int8" or not options.force:
            raise
        cases = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=output.parent, prefix=f".partial-{output.name}-")
    except OSError as error:
        raise UsageError(f"Cannot write into {output.parent}: {error.strerror}. Take another folder.") from error
    try:
        manifest = _write(model, cases, names, checkpoint, options, Path(temporary), report)
        _put(Path(temporary), output)
    except OSError as error:
        raise JobError(f"Cannot write {output}: {error}. Make space, or take another folder.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _also_needed(options: ExportOptions) -> list[str]:
    converting = ["onnx", "onnxscript"] if options.engine == "onnxruntime" else []
    return [*converting, "nncf"] if options.precision == "int8" else converting


def _put(temporary: Path, output: Path) -> None:
    """Rename ``temporary`` to ``output``; what was there is removed last."""
    os.chmod(temporary, 0o777 & ~_umask())  # a temporary folder is for its owner alone
    if not output.exists():
        os.replace(temporary, output)
        return
    old = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".old-{output.name}-"))
    os.replace(output, old / output.name)
    os.replace(temporary, output)
    shutil.rmtree(old, ignore_errors=True)


def _write_stages(model: Model, patches: Sequence[np.ndarray], folder: Path, name: str) -> str:
    from nnunet_dyn.architectures.med_danet import MedDANetV2
    from nnunet_dyn.inference.stages import write_stages

    if not isinstance(model.network, MedDANetV2):
        raise UsageError(
            f"Got a {type(model.network).__name__}, which decides what it computes; expected Med-DANet V2 or a network "
            "that does not. Predict with --engine torch."
        )
    return write_stages(model.network, patches, folder, name)


def _engine(model: Model, path: Path, options: ExportOptions) -> Engine:
    """What runs the files of one fold."""
    if path.suffix == ".json":
        from nnunet_dyn.inference.stages import StagesEngine

        return StagesEngine(deepcopy(model.network), [path], model.input_shape[2:], options.threads)
    return engine_of(options.engine)([path], options.precision, options.threads)


class _Agreement:
    """Mean Dice between what a candidate and what the original say of some patches, all of them together.

    Not with the labels: a patch alone is segmented worse than with its overlaps and mirrored copies, and what
    quantisation loses would be lost among that.
    """

    def __init__(self, cases: Cases, original: Any, patches: Sequence[np.ndarray]):
        self.cases, self.patches = cases, patches[:: -(-len(patches) // _PATCHES_FOR_FALLBACK)]
        self.expected = self._segment(runner(original))

    def _segment(self, run: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
        return [self.cases.segment(torch.from_numpy(run(patch)[0])) for patch in self.patches]

    def __call__(self, run: Callable[[np.ndarray], np.ndarray]) -> float:
        counts = [self.cases.count(*pair) for pair in zip(self._segment(run), self.expected, strict=True)]
        return float(dice(sum(counts)).mean())


class _Check:
    """Dice of a fold's validation cases, predicted from their preprocessed data, mirrored as prediction does it.

    Attributes:
        names: the cases.
    """

    def __init__(self, model: Model, original: Engine, cases: Cases, fold: int | str, options: ExportOptions):
        self.model, self.cases, self.fold = model, cases, fold
        self.names = spread(cases.split(fold)[1], options.validation_cases)
        self._original = self._predict(original)

    def _predict(self, engine: Engine) -> list[np.ndarray]:
        with redirect_stdout(StringIO()):  # nnU-Net explains perform_everything_on_device
            predictor = Predictor(device=torch.device("cpu"), allow_tqdm=False)
        model = self.model
        predictor.manual_initialization(
            nn.Identity(),
            model.plans,
            model.configuration,
            None,
            model.dataset,
            model.trainer,
            model.mirroring_axes,
            engine=engine,
        )
        return [
            self.cases.segment(predictor.predict_logits_from_preprocessed_data(self.cases.load(name)[0]))
            for name in self.names
        ]

    def __call__(self, engine: Engine) -> dict[str, Any]:
        """What the manifest has of a fold: the mean over cases of each class's Dice, and their mean."""
        exported, scores = self._predict(engine), []
        for name, pair in zip(self.names, zip(self._original, exported, strict=True), strict=True):
            labels = self.cases.load(name)[1]
            scores.append([dice(self.cases.count(segmentation, labels)) for segmentation in pair])
        original, of_exported = np.mean(scores, axis=0)
        return {
            "fold": self.fold,
            "cases": self.names,
            "dice_original": float(original.mean()),
            "dice_exported": float(of_exported.mean()),
            "dice_drop": float(original.mean() - of_exported.mean()),
            "dice_original_by_class": original.tolist(),
            "dice_exported_by_class": of_exported.tolist(),
            "same_voxels": float(np.mean([(a == b).mean() for a, b in zip(self._original, exported, strict=True)])),
        }


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write(model, cases: Cases | None, folds, checkpoint, options: ExportOptions, folder: Path, report) -> Manifest:
    accuracy, calibration, models, shape = [], {}, [], model.input_shape
    decides = hasattr(model.network, "decide")
    if decides and (options.engine, options.precision) != ("openvino", "int8"):
        raise UsageError(
            f"Got {options.engine} {options.precision} for a network that chooses its bits; expected openvino int8."
        )
    for fold, parameters in zip(folds, model.parameters, strict=True):
        original = TorchEngine(model.network, [parameters], torch.device("cpu"), "fp32", options.threads)
        original.load(0)
        check = None if cases is None else _Check(model, original, cases, fold, options)
        patches: list[np.ndarray] = []
        if options.precision == "int8":
            names = spread(cases.split(fold)[0], options.calibration_cases)
            patches = cases.patches(names, _PATCHES * len(names))
            calibration = {"cases": len(names), "patches": len(patches)}
        report(f"fold {fold}: converting" + (f", on {len(patches)} patches for int8" if patches else ""))
        plain = None
        if decides:
            path = folder / _write_stages(model, patches, folder, f"fold_{fold}")
        else:
            path = folder / f"fold_{fold}{ENDINGS[options.engine]}"
            plain = convert(deepcopy(model.network), options.engine, shape)
            exported = quantise(plain, patches) if patches else plain
            save(exported, path)
        models.append(path.name)
        if check is not None:
            report(f"fold {fold}: checking on {len(check.names)} validation cases")
            found = check(_engine(model, path, options))
            if plain is not None and patches and found["dice_drop"] > options.max_dice_drop:
                report(f"fold {fold}: loses {found['dice_drop']:.4f} Dice; putting the layers back that lose most")
                score = _Agreement(cases, plain, patches)
                lost = 1 - score(runner(exported))
                for share in _FALLBACK:
                    # Not over the file that was checked, which OpenVINO may still have mapped.
                    attempt = Path(tempfile.mkdtemp(dir=folder))
                    save(quantise(plain, patches, score, lost * share), attempt / path.name)
                    found = check(_engine(model, attempt / path.name, options)) | {"layers_put_back": True}
                    for file in attempt.iterdir():
                        os.replace(file, folder / file.name)
                    attempt.rmdir()
                    if found["dice_drop"] <= options.max_dice_drop:
                        break
            report(f"fold {fold}: Dice {found['dice_original']:.4f}, exported {found['dice_exported']:.4f}")
            accuracy.append(found)
    lost = max((found["dice_drop"] for found in accuracy), default=0.0)
    if lost > options.max_dice_drop and not options.force:
        raise JobError(
            f"The exported model loses {lost:.4f} of mean Dice; expected {options.max_dice_drop} at most. Nothing was "
            "written. Take bf16, allow more with --max-dice-drop, or write it all the same with --force."
        )
    (folder / "plans.json").write_text(json.dumps(model.plans.plans, indent=1))
    (folder / "dataset.json").write_text(json.dumps(model.dataset, indent=1))
    versions = {"nnunet_dyn": __version__}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    manifest = Manifest(
        engine=options.engine,
        precision=options.precision,
        trainer=model.trainer,
        configuration=model.configuration_name,
        checkpoint=checkpoint,
        folds=tuple(folds),
        models=tuple(models),
        input_shape=shape,
        mirroring_axes=model.mirroring_axes,
        files={path.name: sha256(path) for path in sorted(folder.iterdir())},
        versions=versions,
        accuracy=tuple(accuracy),
        max_dice_drop=None if cases is None else options.max_dice_drop,
        calibration=calibration,
    )
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json(), indent=1) + "\n")
    return manifest
