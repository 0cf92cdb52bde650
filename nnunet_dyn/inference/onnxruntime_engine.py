"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_dyn.errors import JobError
from nnunet_dyn.inference.engines import Engine

if TYPE_CHECKING:
    import onnxruntime
    import torch


class ONNXRuntimeEngine(Engine):
    """One session per fold, for one tile at a time; what is loaded once stays.

    Args:
        models: of each fold, an ONNX file or the content of one, that takes (1, C, *patch).
    """

    name = "onnxruntime"

    def __init__(self, models: Sequence[Path | bytes], precision: str, threads: int | None = None):
        super().__init__(precision, threads, len(models))
        self.models = models
        self._sessions: dict[int, onnxruntime.InferenceSession] = {}
        self._session: onnxruntime.InferenceSession | None = None

    def load(self, fold: int) -> None:
        if fold not in self._sessions:
            self._sessions[fold] = session(self.models[fold], self.threads)
        self._session = self._sessions[fold]

    def infer(self, tiles: torch.Tensor) -> torch.Tensor:
        import torch

        name = self._session.get_inputs()[0].name
        rows = [self._session.run(None, {name: row.numpy()})[0] for row in tiles.contiguous().split(1)]
        rows = [torch.from_numpy(row) for row in rows]
        return rows[0] if len(rows) == 1 else torch.cat(rows)


def session(model: Path | bytes, threads: int) -> onnxruntime.InferenceSession:
    """``model`` for the CPU.

    Raises:
        JobError: a file that cannot be read, or a model that ONNX Runtime cannot run.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that spin would take the cores from the other stages of the prediction.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its errors have no class of their own
        name = "the network" if isinstance(model, bytes) else model
        raise JobError(
            f"ONNX Runtime {onnxruntime.__version__} cannot run {name}: {' '.join(str(error).split())[:300]}. Take the "
            "version the model was exported with, or another engine."
        ) from error
