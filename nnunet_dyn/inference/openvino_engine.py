"""OpenVINO on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_dyn.errors import JobError
from nnunet_dyn.inference.engines import Engine, available_cores, send_no_usage_data

if TYPE_CHECKING:
    import numpy as np
    import openvino
    import torch

# What is not quantised in an int8 model: bf16 there is as close to fp32 as the quantised layers are, and faster. A CPU
# without it computes in fp32.
_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}


class OpenVINOEngine(Engine):
    """One compiled model per fold, for one tile at a time; what is loaded once stays.

    Args:
        models: of each fold, a file of OpenVINO's or a model in memory, that takes (1, C, *patch).
    """

    name = "openvino"

    def __init__(self, models: Sequence[Path | openvino.Model], precision: str, threads: int | None = None):
        super().__init__(precision, threads, len(models))
        self.models = models
        self._requests: dict[int, openvino.InferRequest] = {}
        self._request: openvino.InferRequest | None = None

    def load(self, fold: int) -> None:
        if fold not in self._requests:
            model = compiled(self.models[fold], self.precision, self.threads)
            self.computes_in = computes_in(model)
            self._requests[fold] = model.create_infer_request()
        self._request = self._requests[fold]

    def infer(self, tiles: torch.Tensor) -> torch.Tensor:
        import torch

        # Copied: the request uses its memory again for the next row.
        rows = [torch.from_numpy(run(self._request, row)[0].copy()) for row in tiles.split(1)]
        return rows[0] if len(rows) == 1 else torch.cat(rows)


def run(request: openvino.InferRequest, *inputs: torch.Tensor) -> tuple[np.ndarray, ...]:
    """The outputs, as arrays that the next call overwrites."""
    outputs = request.infer([x.contiguous().numpy() for x in inputs], share_inputs=True, share_outputs=True)
    return outputs.to_tuple()


def computes_in(model: openvino.CompiledModel) -> str:
    """What ``model`` computes in where it is not quantised: fp32 instead of bf16 on a CPU that has none."""
    return "bf16" if "bf" in str(model.get_property("INFERENCE_PRECISION_HINT")) else "fp32"


def of_threads(threads: int) -> dict[str, int | bool]:
    """What a model is compiled with to run on so many threads."""
    # Pinned threads of several processes, each with some of the cores, would wait for the same ones.
    return {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": threads >= available_cores()}


def read(file: Path) -> openvino.Model:
    """The model in ``file``.

    Raises:
        JobError: it cannot be read.
    """
    send_no_usage_data()
    import openvino

    try:
        return openvino.Core().read_model(file)
    except RuntimeError as error:
        raise _cannot_run(file, error) from error


def compiled(
    model: Path | openvino.Model,
    precision: str,
    threads: int,
    shape: Sequence[int] | None = None,
    file: Path | None = None,
) -> openvino.CompiledModel:
    """``model`` for the CPU.

    Args:
        shape: of the input, for a model that takes any.
        file: where a model in memory was read from, for the message.

    Raises:
        JobError: a file that cannot be read, or a model that OpenVINO cannot run.
    """
    ready = read(model) if isinstance(model, Path) else model
    import openvino

    config = {"INFERENCE_PRECISION_HINT": _HINTS[precision], "PERFORMANCE_HINT": "LATENCY"} | of_threads(threads)
    try:
        if shape is not None:
            ready = ready.clone()
            ready.reshape(list(shape))
        return openvino.Core().compile_model(ready, "CPU", config)
    except RuntimeError as error:
        raise _cannot_run(file or model, error) from error


def _cannot_run(model: Path | openvino.Model, error: RuntimeError) -> JobError:
    import openvino

    name = model if isinstance(model, Path) else "the network"
    return JobError(
        f"OpenVINO {openvino.__version__} cannot run {name}: {str(error).splitlines()[-1][:300]}. Take the version "
        "the model was exported with, or another engine."
    )
