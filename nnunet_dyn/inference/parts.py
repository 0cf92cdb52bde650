"""What a network is exported as: its models and, if it decides, a list of them and what else it has learnt.

Of a fold, ``fold_0.json`` lists its files, and ``fold_0.npz`` is the part of the state dictionary that is no model's.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import nn

from nnunet_dyn.errors import JobError
from nnunet_dyn.inference.conversion import quantise, save, writing

if TYPE_CHECKING:
    import onnx
    import openvino

Converted: TypeAlias = "openvino.Model | onnx.ModelProto"
#: From one (1, C, *size) array to another.
Run = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Part:
    """One of the models of a network.

    Attributes:
        file: its name.
        model: converted, in full precision.
        inputs: of the model, which int8 takes its ranges from. One that has none stays as it is.
        keep_first, keep_last: see :func:`~nnunet_dyn.inference.conversion.quantise`.
        samples: of the network, to measure on what int8 loses; ``None`` where the model is all of it: ``inputs``.
        network: from what runs the model to what runs the network with it, from a sample to logits.
    """

    file: str
    model: Converted
    inputs: Collection[np.ndarray] = ()
    keep_first: bool = True
    keep_last: bool = True
    samples: Collection[Any] | None = None
    network: Callable[[Run], Callable[[Any], np.ndarray]] = lambda run: run

    def quantised(
        self, threads: int | None, score: Callable[[Run], float] | None = None, max_drop: float = 0.0
    ) -> Converted:
        """The model in int8; for the rest see :func:`~nnunet_dyn.inference.conversion.quantise`."""
        return quantise(self.model, self.inputs, score, max_drop, self.keep_first, self.keep_last, threads)


@dataclass(frozen=True)
class Parts:
    """All models of a fold.

    Attributes:
        content: of the list, but for the rest; ``None``: there is one model and no list.
        rest: what the network has learnt beside its models.
    """

    name: str
    models: tuple[Part, ...]
    content: dict | None = None
    rest: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def quantised(self, threads: int | None = None) -> dict[str, Converted]:
        """By file, those that can be, in int8.

        Raises:
            JobError: NNCF cannot do it.
        """
        return {part.file: part.quantised(threads) for part in self.models if part.inputs}

    def write(self, folder: Path, quantised: Mapping[str, Converted]) -> str:
        """Write everything, of the models those in ``quantised`` where they are there.

        Returns:
            The name of the file that the others belong to.

        Raises:
            JobError: no space, or another reason.
        """
        for part in self.models:
            save(quantised.get(part.file, part.model), folder / part.file)
        return self.models[0].file if self.content is None else _write_list(folder, self.name, self.content, self.rest)


def _write_list(folder: Path, name: str, content: dict, rest: Mapping[str, torch.Tensor]) -> str:
    with writing(folder / f"{name}.npz"):
        np.savez(folder / f"{name}.npz", **{key: value.numpy() for key, value in rest.items()})
    with writing(folder / f"{name}.json"):
        (folder / f"{name}.json").write_text(json.dumps(content | {"rest": f"{name}.npz"}, indent=1))
    return f"{name}.json"


def load_rest(network: nn.Module, file: Path, rest: Mapping[str, torch.Tensor]) -> None:
    """Load what :meth:`Parts.write` wrote to the ``.npz`` file ``file`` into ``network``.

    Args:
        rest: what is expected there.

    Raises:
        ValueError: it has something else. Others: see :func:`reading`.
    """
    with np.load(file, allow_pickle=False) as found:
        if found.keys() != rest.keys():
            raise ValueError(f"{file.name} differs in {', '.join(sorted(found.keys() ^ rest.keys()))}")
        network.load_state_dict({key: torch.from_numpy(found[key]) for key in found}, strict=False)


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turns what goes wrong when ``file``, or what it lists, is read into a JobError."""
    try:
        yield
    except (
        *(OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RuntimeError),
        zipfile.BadZipFile,
    ) as error:
        raise JobError(
            f"Cannot read {file}: {type(error).__name__}: {' '.join(str(error).split())[:300]}. Expected that of an "
            "exported model; copy the folder again, or export the model again."
        ) from error


def weights_of(models: Iterable[str]) -> list[str]:
    """Names of the files with the weights of ``models``; those of ONNX have them inside."""
    return [str(Path(name).with_suffix(".bin")) for name in models if name.endswith(".xml")]
