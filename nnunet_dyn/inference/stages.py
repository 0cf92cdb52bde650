"""Med-DANet V2 in OpenVINO: its stages in int8 and in bf16, each run in what the network decides for a slice.

The network itself stays, with its decisions and costs; only the modules that compute maps are replaced. So that every
shape is fixed, there is a model of a module for each size that it can meet: the slice, and each crop.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from nnunet_dyn.architectures.med_danet import Decision, MedDANetV2, crop_size
from nnunet_dyn.inference.conversion import Arrays, convert
from nnunet_dyn.inference.engines import TorchEngine
from nnunet_dyn.inference.openvino_engine import compiled, computes_in, read, run
from nnunet_dyn.inference.parts import Part, Parts, Run, load_rest, reading, weights_of
from nnunet_dyn.quantization import FULL_PRECISION, current_width

if TYPE_CHECKING:
    import openvino

Size = tuple[int, int]
# A slice and what is done with it; ``None``: it is decided on.
Sample = tuple[np.ndarray, Decision | None]


def precision_of(width: int) -> str:
    """What computes a stage of ``width`` bits: OpenVINO has no integers of less than 8 bits, nor of 16."""
    return "fp32" if width == FULL_PRECISION else "int8" if width <= 8 else "bf16"


def convert_stages(network: MedDANetV2, patches: Collection[np.ndarray], name: str, folder: Path) -> Parts:
    """The models of ``network`` and what else it has learnt.

    Args:
        patches: (1, C, *patch) slices, to take the ranges of int8 from.
        name: of the fold, which the files start with.
        folder: for what the models take their ranges from, as long as they are used.

    Raises:
        JobError: a module cannot be converted.
    """
    network = deepcopy(network).eval()
    slices = list(patches)
    _fuse(network, tuple(slices[0].shape[2:]))
    stages = _stages(network)
    models, parts = [], []
    for (path, size), (inputs, samples) in _seen(network, stages, slices, folder).items():
        stage, shape = stages[path], next(iter(inputs)).shape
        precisions = {precision_of(width) for width in _widths(network, stage)}
        plain = convert(deepcopy(network.get_submodule(path)), "openvino", shape)
        start = f"{name}.{path}.{'x'.join(map(str, size))}"
        of_kind = {}
        if precisions - {"int8"}:
            of_kind["float"] = Part(f"{start}.float.xml", plain)
        if "int8" in precisions:
            of_kind["int8"] = Part(
                f"{start}.int8.xml",
                plain,
                inputs,
                # The image's own layer and the head keep their precision, as in other networks.
                keep_first=stage == 0,
                keep_last=stage == network.n_stages - 1 and "transpconvs" not in path,
                samples=samples,
                network=_around(network, path),
            )
        models += of_kind.values()
        for precision in precisions:
            file = of_kind["int8" if precision == "int8" else "float"].file
            parts.append({"module": path, "size": size, "precision": precision, "file": file})
    return Parts(name, tuple(models), {"parts": parts}, _rest(network))


def _around(network: MedDANetV2, path: str) -> Callable[[Run], Callable[[Sample], np.ndarray]]:
    """From what runs the module ``path`` to what segments a slice with it, by a decision: to its logits.

    All else is the original in full precision. So what a model loses is measured in what it is for, the segmentation,
    and in the same unit for all of them.
    """

    def around(run: Run) -> Callable[[Sample], np.ndarray]:
        def segment(sample: Sample) -> np.ndarray:
            x, decision = sample
            with mock.patch.object(
                network.get_submodule(path), "forward", lambda x: torch.from_numpy(run(x.contiguous().numpy()))
            ):
                return network.execute(torch.from_numpy(x), [decision])[0].numpy()

        return torch.inference_mode()(segment)

    return around


def listed(file: Path) -> list[str]:
    """Names of the files that ``file``, as :meth:`Parts.write` made it, belongs to.

    Raises:
        JobError: it cannot be read.
    """
    parts, rest = _read(file)
    models = [part["file"] for part in parts]
    return [*models, *weights_of(models), rest]


def _read(file: Path) -> tuple[list[dict], str]:
    """The parts, and the name of the file with the rest."""
    with reading(file):
        content = json.loads(file.read_text())
        parts = [
            {"module": str(part["module"]), "size": tuple(map(int, part["size"])), "precision": part["precision"]}
            | {"file": str(part["file"])}
            for part in content["parts"]
        ]
        if unknown := {part["precision"] for part in parts} - {"fp32", "bf16", "int8"}:
            raise ValueError(f"precision got {unknown}")
        return parts, str(content["rest"])


class StagesEngine(TorchEngine):
    """Runs a :class:`MedDANetV2` per fold, whose modules are models of OpenVINO.

    All of them are read at once, and compiled when first used: there are as many of a module as sizes and precisions,
    of which a case needs few.

    Args:
        network: as the plans have it; its weights do not matter.
        files: of each fold, what :meth:`Parts.write` returned.
        patch: voxels of a slice.

    Raises:
        JobError: files that cannot be read or run, or are not of this network.
    """

    name = "openvino"

    def __init__(self, network: MedDANetV2, files: Sequence[Path], patch: Size, threads: int | None = None):
        super().__init__(network, None, torch.device("cpu"), "int8", threads)
        self.folds = len(files)
        _fuse(network, patch)
        self._networks = [_load(deepcopy(network), file, self.threads) for file in files]
        for own in self._networks:
            for precision, request in _one_of_each_precision(own).items():
                if precision != "fp32":
                    self.computes_in = computes_in(request.get_compiled_model())

    def load(self, fold: int) -> None:
        self.network = self._networks[fold]


def _load(network: MedDANetV2, file: Path, threads: int) -> MedDANetV2:
    """``network`` with the modules and what else ``file`` lists; all of it, and nothing that it does not have."""
    parts, rest_name = _read(file)
    files: dict[str, dict[tuple[Size, str], Path]] = {}
    for part in parts:
        files.setdefault(part["module"], {})[part["size"], part["precision"]] = file.parent / part["file"]
    with reading(file):
        if files.keys() != _stages(network).keys():
            raise ValueError(f"modules got {', '.join(sorted(files))}; expected {', '.join(sorted(_stages(network)))}")
        load_rest(network, file.parent / rest_name, _rest(network))
    for path, of_module in files.items():
        parent, _, child = path.rpartition(".")
        setattr(network.get_submodule(parent), child, _Compiled(of_module, threads))
    return network.eval()


def _one_of_each_precision(network: MedDANetV2) -> dict[str, openvino.InferRequest]:
    """Ready to run, so that a machine which cannot is known before the first case."""
    requests: dict[str, openvino.InferRequest] = {}
    for module in network.modules():
        for size, precision in module.files if isinstance(module, _Compiled) else ():
            if precision not in requests:
                requests[precision] = module.prepare(size, precision)
    return requests


def _rest(network: MedDANetV2) -> dict[str, torch.Tensor]:
    """What ``network`` has learnt beside the modules that are replaced."""
    replaced = tuple(f"{path}." for path in _stages(network))
    # Under ``backbone`` there are only the same modules once more.
    return {key: x for key, x in network.state_dict().items() if not key.startswith((*replaced, "backbone."))}


class _Compiled(nn.Module):
    """In the place of a module: the model for the size of the input, in the precision of the width that is asked for.

    Args:
        files: by size and precision.
    """

    def __init__(self, files: dict[tuple[Size, str], Path], threads: int):
        super().__init__()
        self.files, self.threads = files, threads
        self._models = {key: read(file) for key, file in files.items()}
        self._requests: dict[tuple[Size, str], openvino.InferRequest] = {}

    def prepare(self, size: Size, precision: str) -> openvino.InferRequest:
        """What runs the model for ``size`` in ``precision``."""
        key = size, precision
        if key not in self._requests:
            ready = compiled(self._models[key], precision, self.threads, file=self.files[key])
            self._requests[key] = ready.create_infer_request()
            del self._models[key]
        return self._requests[key]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        request = self.prepare(tuple(x.shape[2:]), precision_of(current_width()))
        return torch.cat([torch.from_numpy(run(request, row)[0].copy()) for row in x.split(1)])

    def __deepcopy__(self, memo: dict[int, Any]) -> _Compiled:
        return self  # a compiled model has nothing to change


def _fuse(network: MedDANetV2, patch: Size) -> None:
    """Join what always runs together: the stem with the first stage, the last stage with the head.

    Costs are counted before, for every size: later the modules have other names, or nothing to count.
    """
    for size in {patch, *(crop_size(crop, patch, network.divisor) for crop in network.options.crops)}:
        network.stage_macs(patch, size)
    encoder, decoder = network.backbone.encoder, network.backbone.decoder
    if getattr(encoder, "stem", None) is not None:
        encoder.stages[0] = nn.Sequential(encoder.stem, encoder.stages[0])
        encoder.stem = nn.Identity()
    decoder.stages[-1] = nn.Sequential(decoder.stages[-1], decoder.seg_layers[-1])
    decoder.seg_layers[-1] = nn.Identity()


def _stages(network: MedDANetV2) -> dict[str, int | None]:
    """Path of every module that is replaced, and the stage it belongs to; ``None`` for what decides."""
    encoder, levels = network.n_encoder_stages, network.n_stages - network.n_encoder_stages
    stages: dict[str, int | None] = {f"backbone.encoder.stages.{stage}": stage for stage in range(encoder)}
    for level in range(levels):
        stages[f"backbone.decoder.transpconvs.{level}"] = encoder + level
        stages[f"backbone.decoder.stages.{level}"] = encoder + level
    whole = "whole" in network.options.policy_space
    if not whole:
        del stages[f"backbone.decoder.stages.{levels - 1}"]  # crops have one of their own
    deciding = {"crop_tail": network.n_stages - 1, "policy": None, "position": None}
    return stages | {name: stage for name, stage in deciding.items() if getattr(network, name) is not None}


def _widths(network: MedDANetV2, stage: int | None) -> set[int]:
    """Every width that ``stage`` can be asked for."""
    if stage is None or not network.is_quantised:
        return {FULL_PRECISION}
    return set(network.options.bits) if network._selector(stage) is not None else {network.fixed_width(stage)}


def _seen(
    network: MedDANetV2, stages: dict[str, int | None], slices: Sequence[np.ndarray], folder: Path
) -> dict[tuple[str, Size], tuple[Arrays, list[Sample]]]:
    """What every module gets for each size, and of what: whole slices, and every crop of each where the position
    network puts it, in full precision. What decides gets whole slices alone."""
    seen: dict[tuple[str, Size], tuple[Arrays, list[Sample]]] = {}

    def record(path: str, *sample):
        def hook(_, inputs):
            (x,) = inputs
            key = path, tuple(x.shape[2:])
            if key not in seen:
                seen[key] = Arrays(folder), []
            seen[key][0].add(x.detach().numpy())
            seen[key][1].append(sample)

        return hook

    for x in slices:
        for decision in (*_decisions(network, torch.from_numpy(x)), None):
            hooks = [
                network.get_submodule(path).register_forward_pre_hook(record(path, x, decision)) for path in stages
            ]
            try:
                if decision is None:
                    network.probe(torch.from_numpy(x))
                else:
                    network.execute(torch.from_numpy(x), [decision])
            finally:
                for hook in hooks:
                    hook.remove()
    return seen


@torch.no_grad()
def _decisions(network: MedDANetV2, x: torch.Tensor) -> list[Decision]:
    """Every way to segment the slice ``x``, in full precision."""
    full, crops = (FULL_PRECISION,) * network.n_stages, network.options.crops
    made = [Decision("whole", bits=full)] if "whole" in network.options.policy_space else []
    if crops:
        place = network.place(network._view(x)).expand(len(crops), -1)
        made += [Decision("crop", box, full) for box in network._boxes(place, tuple(x.shape[2:]), crops)]
    return made
