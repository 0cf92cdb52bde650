"""What an exported network that decides has beside its models: a list of them, and what else it has learnt.

Of a fold, ``fold_0.json`` lists its files, and ``fold_0.npz`` is the part of the state dictionary that is no model's.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nnunet_dyn.errors import JobError
from nnunet_dyn.inference.conversion import writing


def write_list(folder: Path, name: str, content: dict, rest: Mapping[str, torch.Tensor]) -> str:
    """Write both files of the fold ``name``, and return the name of the list: ``content`` with that of the rest.

    Raises:
        JobError: no space, or another reason.
    """
    with writing(folder / f"{name}.npz"):
        np.savez(folder / f"{name}.npz", **{key: value.numpy() for key, value in rest.items()})
    with writing(folder / f"{name}.json"):
        (folder / f"{name}.json").write_text(json.dumps(content | {"rest": f"{name}.npz"}, indent=1))
    return f"{name}.json"


def load_rest(network: nn.Module, file: Path, rest: Mapping[str, torch.Tensor]) -> None:
    """Load what :func:`write_list` wrote to the ``.npz`` file ``file`` into ``network``.

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
