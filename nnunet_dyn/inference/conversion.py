"""A network as a model of OpenVINO or of ONNX for one tile, and what of it is quantised to int8."""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

import numpy as np
import torch
from torch import nn

from nnunet_dyn.errors import JobError, UsageError
from nnunet_dyn.inference.engines import Engine, TorchEngine, available_cores, check_installed, send_no_usage_data
from nnunet_dyn.inference.model_folder import Model

if TYPE_CHECKING:
    import onnx
    import openvino

#: Of the ONNX files.
OPSET = 18
#: How a file of each engine ends; OpenVINO's weights lie beside it in a ``.bin``.
ENDINGS = {"openvino": ".xml", "onnxruntime": ".onnx"}


def convert(
    network: nn.Module, engine: str, *shapes: Sequence[int], multiples: Sequence[int] | None = None
) -> openvino.Model | onnx.ModelProto:
    """``network`` in evaluation mode for inputs of just these shapes; the batch is a part of them.

    Its convolutions are plain ones there: an exporter is a compiler to :mod:`nnunet_dyn.architectures.fast_convs`.

    Args:
        engine: ``openvino`` or ``onnxruntime``.
        shapes: of each argument.
        multiples: per spatial axis of the only argument. Its sides may be any multiples of these, from twice as many
            voxels on; ``shapes`` has one of them.

    Raises:
        JobError: it cannot be exported.
    """
    inputs = tuple(torch.zeros(*shape) for shape in shapes)
    sides = None
    if multiples is not None:
        names = [torch.export.Dim(f"side_{axis}", min=2) for axis in range(len(multiples))]
        sides = [step * name if step > 1 else name for step, name in zip(multiples, names, strict=True)]
        sides = (dict(enumerate(sides, 2)),)
    try:
        # Not inference mode, whose tensors cannot be exported. Without gradients, stored statistics are folded into
        # the weights.
        with torch.inference_mode(False), torch.no_grad(), _quiet():
            program = torch.export.export(network.eval(), inputs, dynamic_shapes=sides)
            return _to_openvino(program, inputs, sides is not None) if engine == "openvino" else _to_onnx(program)
    except Exception as error:  # each exporter has many of its own
        raise JobError(
            f"The network cannot be converted for engine {engine}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}. Take --engine torch."
        ) from error


def _to_openvino(
    program: torch.export.ExportedProgram, inputs: Sequence[torch.Tensor], any_sides: bool
) -> openvino.Model:
    import openvino

    program = program.run_decompositions(
        {torch.ops.aten.instance_norm.default: _instance_norm, torch.ops.aten.group_norm.default: _group_norm}
    )
    shapes = [[*x.shape[:2], *[-1] * (x.ndim - 2)] if any_sides else list(x.shape) for x in inputs]
    return openvino.convert_model(program, input=[openvino.PartialShape(shape) for shape in shapes])


def _instance_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    variance: torch.Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> torch.Tensor:
    """Instance normalisation in the form that OpenVINO recognises and runs in one kernel with what follows it.

    PyTorch's own decomposition is a batch normalisation, which it runs as five operations, some of them in int8.
    """
    if not use_input_stats:
        return torch.nn.functional.batch_norm(x, mean, variance, weight, bias, eps=eps)
    axes = list(range(2, x.dim()))
    centred = x - x.mean(axes, keepdim=True)
    normal = centred / torch.sqrt((centred * centred).mean(axes, keepdim=True) + eps)
    affine = (1, -1) + (1,) * len(axes)
    return normal if weight is None else normal * weight.reshape(affine) + bias.reshape(affine)


def _group_norm(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> torch.Tensor:
    """Group normalisation by the same form: on OpenVINO's own operation, added to the one before it as in a ResNet,
    version 2026.4 crashes the process when it compiles the model."""
    grouped = _instance_norm(x.reshape(x.shape[0], groups, -1), None, None, None, None, True, 0.0, eps, cudnn_enabled)
    normal, affine = grouped.reshape(x.shape), (1, -1) + (1,) * (x.dim() - 2)
    return normal if weight is None else normal * weight.reshape(affine) + bias.reshape(affine)


def _to_onnx(program: torch.export.ExportedProgram) -> onnx.ModelProto:
    return torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False).model_proto


def save(model: openvino.Model | onnx.ModelProto, path: Path) -> None:
    """Write ``model`` to ``path``, whose ending is that of :data:`ENDINGS`, and read it. Weights keep their precision.

    Raises:
        JobError: no space, or another reason.
    """
    with writing(path):
        if path.suffix == ".onnx":
            import onnx

            path.write_bytes(model.SerializeToString())
            onnx.load(path)
            return
        import openvino

        openvino.save_model(model, path, compress_to_fp16=False)
        openvino.Core().read_model(path)


@contextmanager
def writing(path: Path):
    """Turns what may go wrong when ``path`` is written into a JobError; OpenVINO has no errors of its own."""
    try:
        yield
    except Exception as error:
        raise JobError(
            f"Cannot write {path.name}: {' '.join(str(error).split())[:300]}. Make space, or take another folder."
        ) from error


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder inside ``folder`` until it is left; the default one for temporary files is often memory.

    Raises:
        JobError: it cannot be made.
    """
    with writing(folder):
        made = tempfile.TemporaryDirectory(dir=folder, prefix=".scratch-")
    with made as path:
        yield Path(path)


class Arrays(Collection[np.ndarray]):
    """Arrays to calibrate on, in files of ``folder``, so that memory holds one at a time."""

    def __init__(self, folder: Path):
        with writing(folder):
            self.folder, self.count = Path(tempfile.mkdtemp(dir=folder)), 0

    def add(self, array: np.ndarray) -> None:
        with writing(self._path(self.count)):
            np.save(self._path(self.count), array)
        self.count += 1

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.npy"

    def __iter__(self) -> Iterator[np.ndarray]:
        return (np.load(self._path(number), allow_pickle=False) for number in range(self.count))

    def __len__(self) -> int:
        return self.count

    def __contains__(self, array: object) -> bool:
        return any(np.array_equal(array, one) for one in self)


def quantise(
    model: openvino.Model | onnx.ModelProto,
    patches: Collection[np.ndarray],
    score: Callable[[Callable[[np.ndarray], np.ndarray]], float] | None = None,
    max_drop: float = 0.0,
    keep_first: bool = True,
    keep_last: bool = True,
    threads: int | None = None,
) -> openvino.Model | onnx.ModelProto:
    """``model`` with its layers in int8, by NNCF's post-training quantisation.

    Some keep their precision: the first convolution and the last one, which is the head, make much of the error and
    little of the time; layers of one voxel, as in squeeze-and-excitation, and matrix products, as in attention, too.
    Kernels that are computed from the image have no int8 version, nor have grouped 3D convolutions on OpenVINO's CPU
    plugin.

    Args:
        patches: (1, C, *patch) float32, to take the ranges of values from.
        score: a number, higher where better, of a function from a patch to its logits. With it, layers that lose most
            are put back into their precision until no more than ``max_drop`` is lost on it.
        keep_first: whether ``model`` begins with the image.
        keep_last: whether it ends with the head.
        threads: on the CPU; ``None`` takes every core this process may use.

    Raises:
        JobError: NNCF cannot do it.
    """
    send_no_usage_data()
    try:
        import nncf

        name = model.graph.input[0].name if _is_onnx(model) else 0
        calibration = nncf.Dataset(patches, lambda patch: {name: patch})
        options: dict[str, Any] = {
            "subset_size": len(patches),
            "ignored_scope": nncf.IgnoredScope(names=_kept(_layers(model), keep_first, keep_last), validate=False),
        }
        with _quiet(), _as_it_will_run(threads or available_cores(), _is_onnx(model)):
            if score is None:
                return nncf.quantize(model, calibration, **options)
            return nncf.quantize_with_accuracy_control(
                model,
                calibration,
                nncf.Dataset([None]),  # nothing is run on it, but of each item the score is asked for once more
                lambda candidate, _: float(score(runner(candidate, threads))),
                max_drop=max_drop,
                drop_type=nncf.DropType.ABSOLUTE,
                **options,
            )
    except Exception as error:  # NNCF has many, such as for kernels that are computed, in ONNX
        raise JobError(
            f"NNCF cannot quantise the network: {type(error).__name__}: {' '.join(str(error).split())[:300]}. Take "
            "another engine or fp32, where the network has them, or predict with --engine torch."
        ) from error


def quantisations(model: openvino.Model | onnx.ModelProto) -> int:
    """How many operations of ``model`` round to int8."""
    nodes = model.graph.node if _is_onnx(model) else model.get_ops()
    kinds = [node.op_type if _is_onnx(model) else node.get_type_name() for node in nodes]
    return kinds.count("FakeQuantize") + kinds.count("QuantizeLinear")


@contextmanager
def _as_it_will_run(threads: int, is_onnx: bool):
    """NNCF runs models on every core, and candidates in fp32; it has no options for either."""
    if is_onnx:
        import onnxruntime

        def options(make=onnxruntime.SessionOptions) -> onnxruntime.SessionOptions:
            made = make()
            made.intra_op_num_threads = threads
            return made

        with mock.patch.object(onnxruntime, "SessionOptions", options):
            yield
        return
    import openvino

    from nnunet_dyn.inference.openvino_engine import compiled, of_threads

    in_fp32 = openvino.Core.compile_model

    def compile_model(core, model, device_name=None, config=None):
        return in_fp32(core, model, device_name, of_threads(threads) | (config or {}))

    # The latter is what it compiles candidates with; the ranges are taken by the former, in fp32.
    with (
        mock.patch.object(openvino.Core, "compile_model", compile_model),
        mock.patch.object(openvino, "compile_model", lambda model, *_, **__: compiled(model, "int8", threads)),
    ):
        yield


def runner(model: Any, threads: int | None = None, precision: str = "fp32") -> Callable[[np.ndarray], np.ndarray]:
    """From a (1, C, *patch) patch to its logits, by ``model``: of OpenVINO, compiled or not, or of ONNX.

    Args:
        precision: of what is not quantised, as of an engine; a compiled model has its own, and ONNX Runtime fp32.
    """
    threads = threads or available_cores()
    if not _is_onnx(model):
        from nnunet_dyn.inference.openvino_engine import compiled

        ready = compiled(model, precision, threads) if hasattr(model, "get_ordered_ops") else model
        return lambda patch: ready(patch)[0]
    from nnunet_dyn.inference.onnxruntime_engine import session

    ready = session(model.SerializeToString(), threads)
    return lambda patch: ready.run(None, {ready.get_inputs()[0].name: patch})[0]


def converted_engine(model: Model, engine: str, precision: str, threads: int | None) -> Engine:
    """An engine that runs the folds of ``model`` as they are, converted in memory; ``fp32`` or ``bf16``.

    Raises:
        UsageError: the engine is not installed; ``int8``, which needs data.
        JobError: the network cannot be converted.
    """
    from nnunet_dyn.inference.exported import engine_of

    needed = ("onnx", "onnxscript") if engine == "onnxruntime" else ()
    check_installed(engine, *needed, otherwise=", or take --engine torch", load=True)
    if precision == "int8":
        raise UsageError(
            "Got precision int8 for a model folder of nnU-Net; expected fp32 or bf16, since int8 needs training cases. "
            f"Make an int8 model with: nnunet_dyn export --engine {engine} --precision int8, and predict with that."
        )
    if hasattr(model.network, "decide"):
        raise UsageError(
            f"Got a network that decides what it computes for engine {engine}; expected engine torch. Med-DANet V2 "
            "and the ROI cascade can be exported: nnunet_dyn export --engine openvino --precision int8."
        )
    weights = TorchEngine(model.network, model.parameters, torch.device("cpu"), "fp32")
    converted = []
    for fold in range(weights.folds):
        weights.load(fold)
        made = convert(deepcopy(model.network), engine, model.input_shape)  # a converted model shares its tensors
        converted.append(made.SerializeToString() if engine == "onnxruntime" else made)
    return engine_of(engine)(converted, precision, threads)


@dataclass(frozen=True)
class _Layer:
    """A layer with weights.

    Attributes:
        grouped: whether it is a grouped or depthwise convolution.
        static: whether its weights are constants.
        size: voxels of its output along each axis; 0 where that is not fixed.
    """

    name: str
    kind: Literal["convolution", "transposed", "product"]
    grouped: bool
    static: bool
    size: tuple[int, ...]


def _kept(layers: Sequence[_Layer], keep_first: bool = True, keep_last: bool = True) -> list[str]:
    """Names of the layers that are not quantised in any case."""
    convolutions = [layer for layer in layers if layer.kind == "convolution" and layer.static and not layer.grouped]
    ends = convolutions[:keep_first] + convolutions[len(convolutions) - keep_last :]
    return [
        layer.name
        for layer in layers
        if layer in ends
        or not layer.static
        or layer.kind == "product"
        or all(side == 1 for side in layer.size)
        or (layer.grouped and len(layer.size) == 3)
    ]


def _layers(model: openvino.Model | onnx.ModelProto) -> list[_Layer]:
    """In the order of computation."""
    return _layers_of_onnx(model) if _is_onnx(model) else _layers_of_openvino(model)


def _layers_of_openvino(model: openvino.Model) -> list[_Layer]:
    kinds = {
        "Convolution": "convolution",
        "GroupConvolution": "convolution",
        "ConvolutionBackpropData": "transposed",
        "GroupConvolutionBackpropData": "transposed",
        "MatMul": "product",
    }
    moving, layers = set(), []
    for op in model.get_ordered_ops():
        name, kind = op.get_friendly_name(), op.get_type_name()
        sources = [op.input_value(index).get_node().get_friendly_name() for index in range(op.get_input_size())]
        if kind == "Parameter" or moving.intersection(sources):
            moving.add(name)
        if kind in kinds:
            sides = list(op.get_output_partial_shape(0))[2:]
            size = tuple(side.get_length() if side.is_static else 0 for side in sides) or (1,)
            layers.append(_Layer(name, kinds[kind], kind.startswith("Group"), sources[1] not in moving, size))
    return layers


def _layers_of_onnx(model: onnx.ModelProto) -> list[_Layer]:
    import onnx

    kinds = {"Conv": "convolution", "ConvTranspose": "transposed", "MatMul": "product", "Gemm": "product"}
    graph = onnx.shape_inference.infer_shapes(model).graph  # an exporter need not write them all
    moving = {entry.name for entry in graph.input} - {entry.name for entry in graph.initializer}
    shapes = {
        entry.name: tuple(axis.dim_value for axis in entry.type.tensor_type.shape.dim)
        for entry in (*graph.value_info, *graph.output)
    }
    layers = []
    for node in graph.node:
        if moving.intersection(node.input):
            moving.update(node.output)
        if node.op_type in kinds:
            groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
            size = shapes[node.output[0]][2:] or (1,)
            layers.append(_Layer(node.name, kinds[node.op_type], groups > 1, node.input[1] not in moving, size))
    return layers


def _is_onnx(model: Any) -> bool:
    return hasattr(model, "SerializeToString")


@contextmanager
def _quiet():
    """Without the progress that the exporters print, and their notes on packages that are not needed."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)
