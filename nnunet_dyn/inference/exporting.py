"""From a trained model folder to an exported one: convert, quantise, check, and only then write."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nnunet_dyn import __version__
from nnunet_dyn.architectures.roi import DetectorNetwork
from nnunet_dyn.architectures.roi_segmentor import ROISegmentor
from nnunet_dyn.decisions import DecidingNetwork
from nnunet_dyn.errors import JobError, NotFiniteError, UsageError
from nnunet_dyn.inference.cascade import CascadeEngine, Crops, convert_detector, convert_segmentor, crops_of
from nnunet_dyn.inference.conversion import ENDINGS, convert, quantisations, runner, scratch, writing
from nnunet_dyn.inference.engines import MANIFEST, Engine, TorchEngine, check_engine, check_installed, on_threads
from nnunet_dyn.inference.exported import FIRST_STAGE, Manifest, engine_of, is_exported, load_exported, sha256
from nnunet_dyn.inference.model_folder import (
    CHECKPOINT,
    Model,
    available_folds,
    calibrated_checkpoint,
    first_stage_folder,
    load_model,
    same_or_all,
)
from nnunet_dyn.inference.parts import Part, Parts, Run
from nnunet_dyn.inference.predictor import Predictor
from nnunet_dyn.inference.preprocessed import Cases, Patches, dice, evenly, mean, spread

#: Packages whose versions the manifest has, where they are installed.
PACKAGES = ("nnunetv2", "torch", "openvino", "nncf", "onnx", "onnxruntime")
# Of each calibration case. Ranges are those of the widest values seen, which more patches of a case seldom change.
_PATCHES = 4
# Of a network that decides, at most: what each of its modules gets of them is on the disk at once.
_SLICES = 16
# What layers are put back on, patches, crops or slices, at most; each of them runs once for every candidate.
_SAMPLES_FOR_FALLBACK = 8
# How much of the disagreement with the original on these may stay, tried one after the other.
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
    check_installed(options.engine, *_also_needed(options), load=True)
    if output.exists() and not (overwrite and is_exported(output)):
        remedy = "Take another folder" + (", or --overwrite" if is_exported(output) and not overwrite else "")
        raise UsageError(f"{output} is there already; expected a new folder. {remedy}.")
    model = load_model(folder, folds, checkpoint)
    _check_decides(model.network, options)
    names = list(folds or available_folds(folder, checkpoint))
    cases, first = _cases(model, folder, names, options), None
    if isinstance(model.network, ROISegmentor):
        first = _FirstStage.of(model, folder, names, checkpoint, options)
        cases = None if first.cases is None else cases  # without boxes there is nothing to check
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=output.parent, prefix=f".partial-{output.name}-")
    except OSError as error:
        raise UsageError(f"Cannot write into {output.parent}: {error.strerror}. Take another folder.") from error
    try:
        manifest = _write(model, cases, names, checkpoint, options, Path(temporary), report, first)
        with writing(output):
            _put(Path(temporary), output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _cases(model: Model, folder: Path, folds: Sequence[int | str], options: ExportOptions) -> Cases | None:
    """The preprocessed cases; ``None`` where there are none, or not as they were split, and that is allowed."""
    try:
        cases = Cases.of(model, folder, hands_on=not isinstance(model.network, ROISegmentor))
        for fold in folds:
            cases.split(fold)
        return cases
    except UsageError:
        if options.precision == "int8" or not options.force:
            raise
        return None


@dataclass(frozen=True)
class _FirstStage:
    """The detector of the ROI cascade.

    Attributes:
        folds: see :func:`nnunet_dyn.inference.model_folder.same_or_all`.
        checkpoint: see :func:`nnunet_dyn.inference.model_folder.calibrated_checkpoint`.
    """

    model: Model
    folds: list[int | str]
    checkpoint: str
    cases: Cases | None

    @classmethod
    def of(cls, model: Model, folder: Path, folds: list, checkpoint: str, options: ExportOptions) -> _FirstStage:
        """That of the segmentor ``model`` in ``folder``.

        Raises:
            UsageError: it is not there.
        """
        beside = first_stage_folder(folder, model.configuration.previous_stage_name)
        checkpoint = calibrated_checkpoint(beside, checkpoint)
        chosen = same_or_all(folds, beside, checkpoint)
        if not chosen:
            raise UsageError(
                f"Got the segmentor of a cascade; expected its detector in {beside}, with the {checkpoint} of a fold. "
                "Train it, or copy its model folder."
            )
        first = load_model(beside, chosen, checkpoint)
        return cls(first, chosen, checkpoint, _cases(first, beside, chosen, options))

    def which(self, fold: int | str) -> list[int | str]:
        """Folds of the detector for the segmentor of ``fold``: the one that has not seen its validation cases."""
        return [fold] if fold in self.folds else self.folds

    def original(self, fold: int | str, threads: int | None) -> Engine:
        pairs = zip(self.folds, self.model.parameters, strict=True)
        parameters = [weights for own, weights in pairs if own in self.which(fold)]
        return TorchEngine(self.model.network, parameters, torch.device("cpu"), "fp32", threads)


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
    try:
        os.replace(temporary, output)
    except BaseException:
        os.replace(old / output.name, output)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_decides(network: nn.Module, options: ExportOptions) -> None:
    if not isinstance(network, DecidingNetwork) or isinstance(network, ROISegmentor):
        return
    if isinstance(network, DetectorNetwork):
        if options.precision != "fp32":
            raise UsageError(
                f"Got {options.precision} for a detector; expected fp32, in which its score and margin were "
                "calibrated. Export the segmentor, with its detector, in any precision."
            )
        return
    from nnunet_dyn.architectures.med_danet import MedDANetV2

    if not isinstance(network, MedDANetV2):
        raise UsageError(
            f"Got a {type(network).__name__}, which decides what it computes; expected Med-DANet V2, the ROI cascade, "
            "or a network that does not. Predict with --engine torch."
        )
    if (options.engine, options.precision) != ("openvino", "int8"):
        raise UsageError(
            f"Got {options.engine} {options.precision} for a network that chooses its bits; expected openvino int8. "
            "Take those, or predict with --engine torch."
        )


def _instead(network: nn.Module, options: ExportOptions, precision: str) -> str:
    """What to do instead: take ``precision``, or what else there is."""
    if options.precision == "fp32" or (isinstance(network, DecidingNetwork) and not isinstance(network, ROISegmentor)):
        return "Predict with --engine torch"
    return f"Take {precision if options.engine == 'openvino' and options.precision == 'int8' else 'fp32'}"


def _engine(model: Model, path: Path, options: ExportOptions) -> Engine:
    """What runs the files of one fold."""
    if path.suffix != ".json":
        return engine_of(options.engine)([path], options.precision, options.threads)
    if isinstance(model.network, (DetectorNetwork, ROISegmentor)):
        return CascadeEngine(
            model.network, [path], options.engine, options.precision, model.input_shape, options.threads
        )
    from nnunet_dyn.inference.stages import StagesEngine

    return StagesEngine(deepcopy(model.network), [path], model.input_shape[2:], options.threads)


def _convert(
    model: Model, cases: Cases | None, names: list[str], options: ExportOptions, folder: Path, name: str
) -> tuple[Parts, int]:
    """The network of ``model`` as it is, and how many inputs int8 takes its ranges from.

    Args:
        names: training cases; none where ``cases`` is ``None``.
        folder: for these inputs, as long as the result is used.
        name: of the fold.
    """
    network, shape, is_int8 = model.network, model.input_shape, options.precision == "int8"
    if isinstance(network, ROISegmentor):
        crops = Crops()
        if names:
            predictor = predictor_of(model, TorchEngine(network, None, torch.device("cpu"), "fp32"))
            crops = crops_of(network, cases, names, predictor.tiles, predictor.mirrored_axes(), folder)
        parts = convert_segmentor(network, crops, options.engine, options.precision, shape, name)
        return parts, len(crops) if is_int8 else 0
    if isinstance(network, DetectorNetwork):
        return convert_detector(network, options.engine, shape, name), 0
    patches = Patches(cases, tuple(names), _PATCHES * len(names)) if is_int8 else ()
    if isinstance(network, DecidingNetwork):
        from nnunet_dyn.inference.stages import convert_stages

        patches = replace(patches, count=min(len(patches), _SLICES))
        return convert_stages(network, patches, name, folder), len(patches)
    plain = convert(deepcopy(network), options.engine, shape)
    return Parts(name, (Part(f"{name}{ENDINGS[options.engine]}", plain, patches),)), len(patches)


class _Agreement:
    """Mean Dice between what the network says with a candidate in the place of one of its models, and what the
    original says, on some samples, all of them together.

    Not with the labels: a patch alone is segmented worse than with its overlaps and mirrored copies, and what
    quantisation loses would be lost among that.
    """

    def __init__(self, cases: Cases, part: Part, threads: int | None):
        self.cases, self.part = cases, part
        samples = part.inputs if part.samples is None else part.samples
        self.samples = evenly(samples, _SAMPLES_FOR_FALLBACK)
        self.expected = self._segment(runner(part.model, threads))

    def _segment(self, run: Run) -> list[np.ndarray]:
        network = self.part.network(run)
        segmented = (self.cases.segment(torch.from_numpy(network(sample)[0])) for sample in self.samples)
        return [labels.astype(np.int16) for labels in segmented]

    def __call__(self, run: Run) -> float:
        counts = [self.cases.count(*pair) for pair in zip(self._segment(run), self.expected, strict=True)]
        scores = dice(sum(counts))
        return 1.0 if np.isnan(scores).all() else float(mean(scores))  # neither finds anything


class _Check:
    """Dice of a fold's validation cases, predicted from their preprocessed data, mirrored as prediction does it.

    Args:
        cases_of_exported: what the exported model gets, where that is something else: the second stage of a cascade.

    Attributes:
        names: the cases.
        seen: whether the model was trained on some of them, as that of fold ``all`` was.
    """

    def __init__(
        self,
        model: Model,
        original: Engine,
        cases: Cases,
        fold: int | str,
        options: ExportOptions,
        report,
        cases_of_exported: Cases | None = None,
    ):
        self.model, self.cases, self.fold, self.report = model, cases, fold, report
        self._cases_of_exported = cases_of_exported or cases
        training, validation = cases.split(fold)
        self.names = spread(validation, options.validation_cases)
        self.seen = not set(training).isdisjoint(self.names)
        self._engine, self._original = original, None

    def _predict(self, engine: Engine, what: str, cases: Cases) -> list[np.ndarray]:
        predictor = predictor_of(self.model, engine)
        segmentations = []
        for number, name in enumerate(self.names, 1):
            self.report(f"fold {self.fold}: case {number} of {len(self.names)}, {name}, by the {what} model")
            logits = predictor.predict_logits_from_preprocessed_data(cases.load(name)[0])
            segmentations.append(cases.segment(logits))
        return segmentations

    def __call__(self, engine: Engine) -> dict[str, Any]:
        """What the manifest has of a fold: the mean over cases of each class's Dice, and their mean, as nnU-Net's.

        A class that no case has and no prediction found does not count, and is ``None``.

        Raises:
            JobError: there is no class that counts.
        """
        engine.load(0)  # what cannot run should not cost the predictions of the original
        if self._original is None:
            self._original = self._predict(self._engine, "original", self.cases)
        found = {"fold": self.fold, "cases": self.names, "cases_seen_in_training": self.seen}
        found |= {"computed_in": engine.computes_in, "finite": True}
        if engine.computes_in != "bf16" and engine.name == "openvino" and engine.precision != "fp32":
            self.report(f"fold {self.fold}: this CPU has no bf16: what is to be in bf16 is checked in fp32")
        try:
            exported = self._predict(engine, "exported", self._cases_of_exported)
        except NotFiniteError:
            return found | {"finite": False, "dice_drop": 1.0}
        scores = []
        for name, pair in zip(self.names, zip(self._original, exported, strict=True), strict=True):
            labels = self.cases.load(name)[1]
            scores.append([dice(self.cases.count(segmentation, labels)) for segmentation in pair])
        by_class = mean(np.array(scores))
        original, of_exported = (float(mean(of_model)) for of_model in by_class)
        if np.isnan(original) or np.isnan(of_exported):
            raise JobError(
                f"Fold {self.fold}: none of the cases {', '.join(self.names)} has foreground, in the labels or as "
                "predicted; expected some to measure Dice on. Take more with --validation-cases."
            )
        names = ("dice_original_by_class", "dice_exported_by_class")
        return found | {
            "dice_original": original,
            "dice_exported": of_exported,
            "dice_drop": original - of_exported,
            **{
                name: [None if np.isnan(value) else float(value) for value in of_model]
                for name, of_model in zip(names, by_class, strict=True)
            },
            "same_voxels": float(np.mean([(a == b).mean() for a, b in zip(self._original, exported, strict=True)])),
        }


def predictor_of(model: Model, engine: Engine) -> Predictor:
    """Predicts with ``engine`` what ``model`` is for, on the CPU."""
    with redirect_stdout(StringIO()):  # nnU-Net explains perform_everything_on_device
        predictor = Predictor(device=torch.device("cpu"), allow_tqdm=False)
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
    return predictor


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _hand_on(
    first: _FirstStage, cases: Cases, fold: int | str, options: ExportOptions, folder: Path, to: Path, report
) -> tuple[Cases, Cases]:
    """``cases`` with what the original detector finds in them, and with what the exported one does."""
    training, validation = cases.split(fold)
    training, validation = spread(training, options.calibration_cases), spread(validation, options.validation_cases)
    report(f"fold {fold}: the detector on {len(training)} training and {len(validation)} validation cases")
    exported = load_exported(folder / FIRST_STAGE).engine(tuple(first.which(fold)), options.threads)
    handed = []
    for engine, names in ((first.original(fold, options.threads), training + validation), (exported, validation)):
        with writing(to):
            own = Path(tempfile.mkdtemp(dir=to))
        # Of fold "all" both are the same cases.
        handed.append(first.cases.hand_on(predictor_of(first.model, engine), sorted(set(names)), cases, own))
    return handed[0], handed[1]


def _write_fold(
    model: Model, cases: Cases | None, fold: int | str, check: _Check | None, options: ExportOptions, folder, report
) -> tuple[str, dict[str, Any] | None, dict[str, Any]]:
    """Convert, quantise and check the network of ``model`` as it is.

    Returns:
        The file that was written, what the check found, and the manifest's entry on the calibration.
    """
    name, is_int8 = f"fold_{fold}", options.precision == "int8"
    names = [] if cases is None else spread(cases.split(fold)[0], options.calibration_cases)
    report(f"fold {fold}: converting" + (f", on {len(names)} cases for int8" if is_int8 else ""))
    with scratch(folder) as own:
        parts, inputs = _convert(model, cases, names, options, own, name)
        file, found = _write_parts(model, cases, parts, check, options, folder, report)
    if found is not None and found["finite"]:
        report(f"fold {fold}: Dice {found['dice_original']:.4f}, exported {found['dice_exported']:.4f}")
    return file, found, {name: {"cases": names, "patches": inputs}} if is_int8 else {}


def _write_parts(
    model: Model,
    cases: Cases | None,
    parts: Parts,
    check: _Check | None,
    options: ExportOptions,
    folder: Path,
    report: Callable[[str], object],
) -> tuple[str, dict[str, Any] | None]:
    """Write to ``folder`` and check; in int8 layers that lose most are put back until the check passes.

    Each model that loses something, all others being the original's, may keep the same share of it. If the check
    passes with no share, the best attempt stays.

    Returns:
        The file that the others belong to, and what the check found.
    """
    quantised = parts.quantised(options.threads)
    file = parts.write(folder, quantised)
    if check is None:
        return file, None

    def passes() -> bool:
        return found["finite"] and found["dice_drop"] <= options.max_dice_drop

    report(f"fold {check.fold}: checking on {len(check.names)} validation cases")
    found = check(_engine(model, folder / file, options))
    if not quantised or passes():
        return file, found
    losing = []
    for part in parts.models:
        if part.file in quantised:
            score = _Agreement(cases, part, options.threads)
            # What is lost in bf16 alone no layer gets back.
            both = part.model, quantised[part.file]
            floating, integers = (score(runner(model, options.threads, "int8")) for model in both)
            losing += [(part, floating - integers)] if integers < floating else []
    wrong = f"loses {found['dice_drop']:.4f} Dice" if found["finite"] else "gives logits that are not finite"
    remedy = f"putting the layers back that lose most, of {len(losing)} of {len(quantised)} models"
    report(f"fold {check.fold}: {wrong}; {remedy if losing else 'no model loses by itself'}")
    first = checked = {part.file: quantisations(quantised[part.file]) for part, _ in losing}
    for share in _FALLBACK:
        for part, lost in losing:
            score = _Agreement(cases, part, options.threads)
            try:
                quantised[part.file] = part.quantised(options.threads, score, lost * share)
            except JobError as error:
                report(f"fold {check.fold}: {part.file} stays as it is. {error}")
        left = {name: quantisations(quantised[name]) for name in first}
        if left == checked:
            continue
        checked = left
        with scratch(folder) as attempt:  # not over the files that were checked, which OpenVINO may still have mapped
            parts.write(attempt, quantised)
            put_back = {name: first[name] - left[name] for name in first if left[name] < first[name]}
            tried = check(_engine(model, attempt / file, options)) | {"layers_put_back": put_back}
            if (tried["finite"], -tried["dice_drop"]) > (found["finite"], -found["dice_drop"]):
                found = tried
                for written in attempt.iterdir():
                    os.replace(written, folder / written.name)
        if passes():
            break
    return file, found


def _write(
    model: Model,
    cases: Cases | None,
    folds: Sequence[int | str],
    checkpoint: str,
    options: ExportOptions,
    folder: Path,
    report: Callable[[str], object],
    first: _FirstStage | None = None,
) -> Manifest:
    accuracy, calibration, models, first_stage = [], {}, [], None
    if first is not None:
        # Never refused: what counts is Dice behind both stages.
        inner, lenient = folder / FIRST_STAGE, replace(options, precision="fp32", force=True)
        inner.mkdir()
        _write(
            first.model, first.cases, first.folds, first.checkpoint, lenient, inner, lambda s: report(f"detector: {s}")
        )
        first_stage = sha256(inner / MANIFEST)
    for fold, parameters in zip(folds, model.parameters, strict=True):
        original = TorchEngine(model.network, [parameters], torch.device("cpu"), "fp32", options.threads)
        original.load(0)
        with scratch(folder) as handed_on, on_threads(options.threads):
            cases_of_fold, of_exported = cases, None
            if first is not None and cases is not None:
                cases_of_fold, of_exported = _hand_on(first, cases, fold, options, folder, handed_on, report)
            check = None
            if cases is not None:
                check = _Check(model, original, cases_of_fold, fold, options, report, of_exported)
            name, found, calibration_of_fold = _write_fold(model, cases_of_fold, fold, check, options, folder, report)
        models.append(name)
        calibration |= calibration_of_fold
        accuracy += [found] if found else []
    lost = max((found["dice_drop"] for found in accuracy), default=0.0)
    if (bad := [str(found["fold"]) for found in accuracy if not found["finite"]]) and not options.force:
        raise JobError(
            f"The exported model of fold {', '.join(bad)} gives logits that are NaN or too large for half precision, "
            "which the original does not; expected finite ones. Nothing was written. "
            f"{_instead(model.network, options, 'fp32')}."
        )
    if lost > options.max_dice_drop and not options.force:
        raise JobError(
            f"The exported model loses {lost:.4f} of mean Dice; expected {options.max_dice_drop} at most. Nothing was "
            f"written. {_instead(model.network, options, 'bf16')}, allow more with --max-dice-drop, or write it all "
            "the same with --force."
        )
    for name, content in (("plans.json", model.plans.plans), ("dataset.json", model.dataset)):
        with writing(folder / name):
            (folder / name).write_text(json.dumps(content, indent=1))
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
        input_shape=model.input_shape,
        mirroring_axes=model.mirroring_axes,
        files={path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()},
        versions=versions,
        accuracy=tuple(accuracy),
        max_dice_drop=None if cases is None else options.max_dice_drop,
        calibration=calibration,
        first_stage=first_stage,
    )
    with writing(folder / MANIFEST):
        (folder / MANIFEST).write_text(json.dumps(manifest.to_json(), indent=1) + "\n")
    return manifest
