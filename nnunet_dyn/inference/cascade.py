"""The ROI cascade in OpenVINO or ONNX Runtime: the layers of its detectors, and the networks of its segmentors.

What decides stays in torch, with its costs: boxes, crops, and what is background. A detector's layers get whole tiles,
or the slices that the tri-plane detector makes of them, in fp32 whatever the segmentor computes in: score and margin
were calibrated so, and it runs once a case. A segmentor's network gets crops of many sizes, so its models take any
multiple of its strides; one that skips stages has a model for each set, and each cube of ``paper`` mode has one.

OpenVINO takes longer for a model of any size than for one of a fixed size (``benchmarks/crop_sizes.py``), which takes
seconds to compile. So the sizes that are most frequent in the training cases are compiled for themselves, each when it
is first met, and all others share a model. The export names them, so that a case is predicted alike whatever was
predicted before it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nnunet_dyn.architectures.roi import DetectorNetwork
from nnunet_dyn.architectures.roi_segmentor import ROISegmentor, Size
from nnunet_dyn.errors import JobError
from nnunet_dyn.inference.conversion import ENDINGS, Arrays, convert
from nnunet_dyn.inference.engines import TorchEngine
from nnunet_dyn.inference.parts import Part, Parts, load_rest, reading, weights_of
from nnunet_dyn.inference.preprocessed import Cases

# Of each calibration case, as many as patches of other networks.
_CROPS = 4
# How many sizes of crops are compiled for themselves, at most.
_SIZES = 4

Variant = tuple[int, ...]
# From one row to its outputs.
Run = Callable[[torch.Tensor], Sequence[np.ndarray]]
# What runs a model that has been read, on inputs of just one shape, or of any: ``None``.
Make = Callable[[Size | None], Run]


@dataclass
class Crops:
    """What a segmentor's network gets in some cases.

    Attributes:
        of_variant: (1, image channels, *size) float32, some of each case.
        sizes: how often each size occurs, among all crops.
    """

    of_variant: dict[Variant, Arrays] = field(default_factory=dict)
    sizes: Counter[Size] = field(default_factory=Counter)

    def __len__(self) -> int:
        return sum(map(len, self.of_variant.values()))


def crops_of(
    network: ROISegmentor,
    cases: Cases,
    names: Sequence[str],
    tiles: Callable[[torch.Tensor], Iterable[torch.Tensor]],
    copies: Sequence[tuple[int, ...]],
    folder: Path,
) -> Crops:
    """The crops of ``network`` in the tiles of the cases ``names``, kept in ``folder``.

    Of a case with few crops mirrored copies are kept, too, as prediction runs them.

    Args:
        tiles: those of a case's input, (C, *shape), in prediction.
        copies: axes of (C, *shape) to flip for each, the first ones none.
    """
    made = Crops()
    for name in names:
        found = []
        for tile in tiles(cases.load(name)[0]):
            found += [network.cut(tile, box) for box in network.decide(tile[None])[0].boxes]
        made.sizes.update(tuple(crop.shape[1:]) for crop in found)
        some = found[:: max(1, -(-len(found) // _CROPS))]
        for crop in islice((crop.flip(axes) for axes in copies for crop in some), _CROPS):
            variant = network.variant(tuple(crop.shape[1:]))
            made.of_variant.setdefault(variant, Arrays(folder)).add(crop[None].numpy())
    return made


def convert_detector(network: DetectorNetwork, engine: str, shape: Size, name: str) -> Parts:
    """The layers of ``network`` and what else it has learnt.

    Args:
        shape: (1, C, *patch).
        name: of the fold, which the files start with.

    Raises:
        JobError: the layers cannot be converted.
    """
    network = deepcopy(network).eval()
    layers = _DetectorLayers(network, [])
    with torch.inference_mode(False), torch.no_grad():
        x = network.prepare(torch.zeros(shape))
        layers.names = list(network.layers(x))
    part = Part(f"{name}{ENDINGS[engine]}", convert(layers, engine, x.shape))
    content = {"parts": [{"variant": [], "file": part.file}], "outputs": layers.names}
    return Parts(name, (part,), content, _rest(network))


def convert_segmentor(
    network: ROISegmentor, crops: Crops, engine: str, precision: str, shape: Size, name: str
) -> Parts:
    """The network of ``network`` in all its variants, and what else it has learnt.

    In int8 a variant that no crop is of keeps its precision, for there is nothing to take the ranges from.

    Args:
        shape: (1, C, *patch).
        crops, name: as of :func:`crops_of` and of :func:`convert_detector`.

    Raises:
        JobError: the network cannot be converted; int8 without any crop.
    """
    if precision == "int8" and not crops.sizes:
        raise JobError(
            "The detector found nothing in the calibration cases; expected boxes, whose contents int8 takes its ranges "
            "from. Take more with --calibration-cases, or train the detector longer."
        )
    models, parts = [], []
    network.decoder.deep_supervision = False
    for number, (variant, (size, multiples)) in enumerate(network.variants(shape[2:]).items()):
        one = _Variant(deepcopy(network.network), variant if network.mode == "own" else ())
        model = convert(one, engine, (1, network.image_channels, *size), multiples=multiples)
        inputs = crops.of_variant.get(variant, ()) if precision == "int8" else ()
        models.append(Part(f"{name}.{number}{ENDINGS[engine]}", model, inputs))
        parts.append({"variant": variant, "file": models[-1].file})
    sizes = [size for size, _ in crops.sizes.most_common(_SIZES)] if network.mode == "own" else []
    return Parts(name, tuple(models), {"parts": parts, "sizes": sizes}, _rest(network))


class _DetectorLayers(nn.Module):
    """The values of what a detector's ``layers`` returns, in the order of ``names``."""

    def __init__(self, network: DetectorNetwork, names: list[str]):
        super().__init__()
        self.network, self.names = network, names

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.network.layers(x)
        return tuple(found[name] for name in self.names)


class _Variant(nn.Module):
    """A segmentor's network with the active stages that are given, or as it is."""

    def __init__(self, network: nn.Module, stages: Variant):
        super().__init__()
        self.network, self.stages = network, stages

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network.enter(x, self.stages[0])[0] if self.stages else self.network(x)


def _rest(network: nn.Module) -> dict[str, torch.Tensor]:
    """What ``network`` has learnt beside weights: margin, score, and whether the classes are regions."""
    buffers = dict(network.named_buffers())
    return {key: value for key, value in network.state_dict().items() if key in buffers}


@dataclass(frozen=True)
class _Content:
    """Of the file that lists the others of a fold."""

    parts: dict[Variant, str]
    rest: str
    outputs: tuple[str, ...] = ()
    sizes: tuple[Size, ...] = ()

    @classmethod
    def read(cls, file: Path) -> _Content:
        with reading(file):
            content = json.loads(file.read_text())
            return cls(
                {tuple(map(int, part["variant"])): str(part["file"]) for part in content["parts"]},
                str(content["rest"]),
                tuple(map(str, content.get("outputs", ()))),
                tuple(tuple(map(int, size)) for size in content.get("sizes", ())),
            )


def listed(file: Path) -> list[str]:
    """Names of the files that ``file``, as this module writes it, belongs to.

    Raises:
        JobError: it cannot be read.
    """
    content = _Content.read(file)
    models = list(content.parts.values())
    return [*models, *weights_of(models), content.rest]


class CascadeEngine(TorchEngine):
    """Runs a detector or a segmentor per fold, whose layers are models of another engine.

    Args:
        network: as the plans have it; its weights do not matter.
        files: of each fold, what :meth:`Parts.write` returned.
        engine: ``openvino`` or ``onnxruntime``.
        shape: (1, C, *patch).

    Raises:
        JobError: files that cannot be read or run, or are not of this network.
    """

    def __init__(
        self,
        network: DetectorNetwork | ROISegmentor,
        files: Sequence[Path],
        engine: str,
        precision: str,
        shape: Size,
        threads: int | None = None,
    ):
        super().__init__(network, None, torch.device("cpu"), precision, threads)
        self.name, self.folds = engine, len(files)
        self._networks = []
        for file in files:
            content, own = _Content.read(file), deepcopy(network)
            with reading(file):
                load_rest(own, file.parent / content.rest, _rest(own))
            models = _Models({key: file.parent / name for key, name in content.parts.items()}, self)
            if isinstance(own, DetectorNetwork):
                expected, attach = {()}, _attach_detector
            else:
                expected, attach = set(own.variants(shape[2:])), _attach_segmentor
            with reading(file):
                if content.parts.keys() != expected:
                    raise ValueError(f"variants got {sorted(content.parts)}; expected {sorted(expected)}")
            attach(own, models, content, shape)
            _drop_weights(own)
            self._networks.append(own)

    def load(self, fold: int) -> None:
        self.network = self._networks[fold]

    def _at_precision(self, run, *arguments):
        return run(*arguments)  # the models have it; nothing else is worth autocast


class _Models:
    """The models of one fold, each of them for one row at a time: read at once, compiled when first used."""

    def __init__(self, files: Mapping[Variant, Path], engine: CascadeEngine):
        self.engine, make = engine, _of_openvino if engine.name == "openvino" else _of_onnxruntime
        self._makes = {variant: make(file, engine) for variant, file in files.items()}
        self._ready: dict[tuple[Variant, Size | None], Run] = {}

    def prepare(self, variant: Variant, shape: Size | None = None) -> Run:
        """What runs ``variant`` on one row.

        Args:
            shape: for inputs of just this shape; ``None`` for any that the model takes.
        """
        if (variant, shape) not in self._ready:
            self._ready[variant, shape] = self._makes[variant](shape)
        return self._ready[variant, shape]


def _by_row(run: Run, x: torch.Tensor) -> list[torch.Tensor]:
    """Each output of ``run`` for the rows of ``x``."""
    # Copied: a model may use its memory again for the next row.
    rows = [[torch.from_numpy(np.array(output)) for output in run(row)] for row in x.split(1)]
    return [torch.cat(of_output) for of_output in zip(*rows, strict=True)]


def _of_openvino(file: Path, engine: CascadeEngine) -> Make:
    from nnunet_dyn.inference.openvino_engine import compiled, computes_in, read, run

    model = read(file)

    def make(shape: Size | None) -> Run:
        ready = compiled(model, engine.precision, engine.threads, shape, file)
        engine.computes_in = computes_in(ready)
        request = ready.create_infer_request()
        return lambda row: run(request, row)

    return make


def _of_onnxruntime(file: Path, engine: CascadeEngine) -> Make:
    from nnunet_dyn.inference.onnxruntime_engine import session

    ready = session(file, engine.threads)
    name = ready.get_inputs()[0].name
    return lambda shape: lambda row: ready.run(None, {name: row.contiguous().numpy()})


def _attach_detector(network: DetectorNetwork, models: _Models, content: _Content, shape: Size) -> None:
    in_torch = network.layers

    def layers(x: torch.Tensor) -> dict[str, torch.Tensor]:
        if x.is_meta:  # counts
            return in_torch(x)
        return dict(zip(content.outputs, _by_row(run, x), strict=True))

    run = models.prepare(())
    network.layers = layers


def _attach_segmentor(network: ROISegmentor, models: _Models, content: _Content, shape: Size) -> None:
    own_sizes = set(content.sizes) if models.engine.name == "openvino" else set()

    def run(size: Size):
        return models.prepare(network.variant(size), (1, network.image_channels, *size) if size in own_sizes else None)

    def segment_crops(x: torch.Tensor) -> torch.Tensor:
        return _by_row(run(tuple(x.shape[2:])), x)[0]

    # What is needed most; now, so that a model which cannot run is known before the first case.
    run(content.sizes[0] if content.sizes else next(iter(network.variants(shape[2:]).values()))[0])
    network.segment_crops = segment_crops


def _drop_weights(network: nn.Module) -> None:
    """Keep of the weights what is needed to count operations: shapes."""
    for module in network.modules():
        for name, weights in module._parameters.items():
            if weights is not None:
                module._parameters[name] = nn.Parameter(weights.detach().to("meta"), requires_grad=False)
