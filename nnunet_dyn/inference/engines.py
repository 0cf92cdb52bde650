"""What runs the network: one small interface, and the engine of PyTorch.

The other engines are in ``openvino_engine.py`` and ``onnxruntime_engine.py``, which import what they need when used.
"""

from __future__ import annotations

import os
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

from nnunet_dyn.errors import JobError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nnunet_dyn.decisions import Decision, GatedNetwork

# What torch computes in, by device; the first is what nnU-Net takes there.
TORCH_PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp16", "fp32", "bf16"), "mps": ("fp32",)}
# The same of the engines that run on the CPU alone, with the extra that installs each and the modules it then has.
CPU_PRECISIONS = {"openvino": ("fp32", "bf16", "int8"), "onnxruntime": ("fp32", "int8")}
EXTRAS = {"openvino": "openvino", "onnxruntime": "onnx"}
ENGINES = ("torch", *CPU_PRECISIONS)
# The file that tells an exported model from a model folder of nnU-Net.
MANIFEST = "manifest.json"


def check_engine(engine: str, precision: str | None, device: str) -> str:
    """The precision to use. Imports nothing.

    Args:
        precision: ``None`` takes nnU-Net's own on that device: fp32, on CUDA half precision by autocast.
        device: ``cpu``, ``cuda`` or ``mps``.

    Raises:
        UsageError: an engine, a device or a precision that is not there.
    """
    if engine not in ENGINES:
        raise UsageError(f"Unknown engine {engine!r}; expected {', '.join(ENGINES)}. Take --engine torch.")
    if device not in TORCH_PRECISIONS:
        raise UsageError(f"Unknown device {device!r}; expected one of {', '.join(TORCH_PRECISIONS)}.")
    if engine != "torch" and device != "cpu":
        raise UsageError(f"Engine {engine} runs on the CPU; got device {device}. Take cpu, or --engine torch.")
    possible = TORCH_PRECISIONS[device] if engine == "torch" else CPU_PRECISIONS[engine]
    if precision is None:
        return possible[0]
    if precision not in possible:
        remedy = "Export the model: nnunet_dyn export --precision int8" if precision == "int8" else "Choose one of them"
        raise UsageError(
            f"Engine {engine} has no {precision} on {device}; expected one of {', '.join(possible)}. {remedy}, or take "
            "another device."
        )
    return precision


def check_installed(engine: str | None, *modules: str, otherwise: str = "", load: bool = False) -> None:
    """Look for the package of ``engine``, and for ``modules`` of the same extra.

    Args:
        otherwise: what else may be done about it, such as ``", or take --engine torch"``.
        load: import them, which also finds what is there and broken; else nothing is imported.

    Raises:
        UsageError: it is not installed, or cannot be imported; names the extra.
    """
    if engine not in EXTRAS:
        return
    if load:
        send_no_usage_data()
    extra = f"nnunet-dyn[{EXTRAS[engine]}]"
    for module in (engine, *modules):
        if find_spec(module) is None:
            raise UsageError(
                f"Engine {engine} needs {module}, which is not installed; expected the extra {extra}. Run: pip install "
                f"'{extra}'{otherwise}."
            )
        try:
            if load:
                import_module(module)
        except ImportError as error:
            raise UsageError(
                f"Engine {engine} needs {module}, which cannot be imported: {error}. Expected the extra {extra}. Run: "
                f"pip install --force-reinstall '{extra}'{otherwise}."
            ) from error


def send_no_usage_data() -> None:
    """Keep OpenVINO and NNCF from reporting what they do to Google Analytics, in this process.

    To be called before either is imported: they report that, too, unless the user has a file that says no. They ask for
    the consent anew for every tool, so it is withheld from the class. No file is written.
    """
    try:
        from openvino_telemetry import Telemetry
    except ImportError:
        return
    Telemetry.consent = property(lambda self: False, lambda self, value: None)


class Engine(ABC):
    """Runs the folds of one model, one at a time, on batches of tiles.

    Attributes:
        name: one of :data:`ENGINES`.
        precision: what it computes in, such as ``fp32``.
        computes_in: what the rest of an int8 model, or all of another, is computed in where the CPU has no bf16;
            known once a fold is loaded.
        threads: on the CPU, at most.
        folds: how many parameter sets ``load`` can choose from.
    """

    name: ClassVar[str]

    def __init__(self, precision: str, threads: int | None, folds: int):
        self.precision = precision
        self.computes_in = "fp32" if precision == "int8" else precision
        self.threads = threads or available_cores()
        self.folds = folds

    @abstractmethod
    def load(self, fold: int) -> None:
        """Make parameter set number ``fold``, from 0, the one that ``infer`` uses."""

    @abstractmethod
    def infer(self, tiles: torch.Tensor) -> torch.Tensor:
        """Logits of ``tiles``.

        Args:
            tiles: (B, C, *patch), float32, on the device of the engine. Rows do not influence each other.

        Returns:
            (B, classes, *patch) on the same device: new, so that the caller may overwrite it. Half precision only where
            nnU-Net has it too.
        """

    @property
    def decides(self) -> bool:
        """Whether the network decides what it computes of a tile. Such an engine also has ``profile_paths``, ``decide``
        and ``execute`` as :class:`nnunet_dyn.decisions.DecidingNetwork`, with tiles and logits as of ``infer``."""
        return False

    @property
    def gated(self) -> GatedNetwork | None:
        """The network, if it segments what a gate asks for and nothing else. Such an engine also has ``infer_crops``,
        which is ``infer`` for what the network cuts out."""
        return None


class TorchEngine(Engine):
    """PyTorch in eager mode, or compiled where nnU-Net's ``nnUNet_compile`` asks for it; lower precision by autocast.

    Args:
        network: with deep supervision off.
        parameters: a state dictionary per fold. They may be mapped from a file: ``load`` copies. ``None``: one fold,
            whose parameters the network has.
    """

    name = "torch"

    def __init__(
        self,
        network: nn.Module,
        parameters: Sequence[dict] | None,
        device: torch.device,
        precision: str,
        threads: int | None = None,
    ):
        super().__init__(precision, threads, 1 if parameters is None else len(parameters))
        self.network = network.to(device).eval()
        self.parameters = parameters
        self.device = device
        self._loaded: int | None = None

    def load(self, fold: int) -> None:
        if self.parameters is None or self._loaded == fold:
            return
        self._loaded = None  # an error may come when some tensors are copied
        try:
            getattr(self.network, "_orig_mod", self.network).load_state_dict(self.parameters[fold])
        except RuntimeError as error:
            said = textwrap.shorten(str(error), 300)  # torch names every key
            raise JobError(
                f"The checkpoint of fold number {fold} does not fit the network of the plans; expected both from one "
                f"training and version. Copy the model folder again, or take the version it was trained with. {said}"
            ) from error
        self._loaded = fold

    def infer(self, tiles: torch.Tensor) -> torch.Tensor:
        return self._as_added_up(self._at_precision(self.network, tiles))

    def _at_precision(self, run, *arguments):
        """What ``run`` returns for ``arguments``, computed in the precision of the engine."""
        import torch

        from nnunet_dyn.architectures.blocks import without_autocast

        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        with without_autocast(arguments[0]) if dtype is None else torch.autocast(self.device.type, dtype=dtype):
            return run(*arguments)

    @staticmethod
    def _as_added_up(logits: torch.Tensor) -> torch.Tensor:
        """Mirrored copies are added up in single precision, or in half where nnU-Net does so."""
        import torch

        return logits.float() if logits.dtype is torch.bfloat16 else logits

    @property
    def decides(self) -> bool:
        from nnunet_dyn.decisions import DecidingNetwork

        return isinstance(getattr(self.network, "_orig_mod", self.network), DecidingNetwork)

    @property
    def gated(self) -> GatedNetwork | None:
        from nnunet_dyn.decisions import GatedNetwork

        network = getattr(self.network, "_orig_mod", self.network)
        return network if isinstance(network, GatedNetwork) else None

    def infer_crops(self, crops: torch.Tensor) -> torch.Tensor:
        return self._as_added_up(self._at_precision(self.gated.segment_crops, crops))

    def profile_paths(self, patch: tuple[int, ...]) -> dict[str, Decision]:
        return self.network.profile_paths(patch)

    def decide(self, tiles: torch.Tensor) -> list[Decision]:
        return self._at_precision(self.network.decide, tiles)

    def execute(self, tiles: torch.Tensor, decisions: Sequence[Decision]) -> tuple[torch.Tensor, list[Decision]]:
        logits, done = self._at_precision(self.network.execute, tiles, decisions)
        return self._as_added_up(logits), done


@contextmanager
def on_threads(threads: int | None) -> Iterator[None]:
    """What runs in torch inside takes so many threads; ``None``: every core this process may use."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or available_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
