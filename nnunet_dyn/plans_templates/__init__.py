"""Templates: what a method changes in an nnU-Net configuration, as data.

A template is a JSON file, ``<name>.json`` in this folder or anywhere else. Its entries:

- ``summary``, ``family``, ``paper``: text for the reader of ``nnunet_dyn list``.
- ``dimensions``: the dimensions of a patch the network works in, ``[2]``, ``[3]`` or ``[2, 3]``.
- ``network_class_name``: dotted path of the network's class, as in nnU-Net's plans. A function that takes a
  ``network_class``, as ``dynamic_network`` does, is given the planned network's.
- ``arch_kwargs``: the arguments that the class needs beyond those nnU-Net plans for a U-Net.
- ``configuration`` (optional): entries of the configuration to set, out of :data:`CONFIGURATION_KEYS`.
- ``trainer`` (optional): the trainer that the method's own procedure needs. Without it any trainer will do.

A method of several configurations that belong together, such as the stages of a cascade, has two entries more:

- ``base``: the configuration they are all derived from.
- ``configurations``: by name, what each of them has in the place of the template's own ``network_class_name``,
  ``arch_kwargs`` and ``configuration``. With ``whole_volume``, an object with ``max_voxels`` and ``max_share``, its
  patch is a whole volume: the spacing is the finest at which the largest training volume has at most so many voxels,
  and at most that share of those in ``base``.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import TYPE_CHECKING

from nnunet_dyn.errors import UsageError

if TYPE_CHECKING:
    from torch import nn


def _positive(kind: type | tuple) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kind) and not isinstance(value, bool) and value > 0


def _axes(kind: type | tuple) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and len(value) in (2, 3) and all(map(_positive(kind), value))


#: What a template may set beside the architecture, with the check of its value and what is expected. A spacing of its
#: own takes preprocessed data of its own.
CONFIGURATION_KEYS: dict[str, tuple[Callable[[object], bool], str]] = {
    "patch_size": (_axes(int), "two or three whole numbers above 0"),
    "batch_size": (_positive(int), "a whole number above 0"),
    "batch_dice": (lambda value: isinstance(value, bool), "true or false"),
    "spacing": (_axes((int, float)), "two or three numbers above 0, in millimetres"),
    "previous_stage": (lambda value: isinstance(value, str), "the name of a configuration"),
    "next_stage": (lambda value: isinstance(value, str), "the name of a configuration"),
}

_TYPES = {
    "summary": str,
    "family": str,
    "paper": str,
    "dimensions": list,
    "network_class_name": str,
    "arch_kwargs": dict,
    "configuration": dict,
    "trainer": (str, type(None)),
    "base": (str, type(None)),
    "configurations": dict,
}
_OPTIONAL = {"configuration", "trainer", "base", "configurations"}
#: What one of several configurations may say for itself.
_PART_TYPES = {"network_class_name": str, "arch_kwargs": dict, "configuration": dict, "whole_volume": dict}
_WHOLE_VOLUME = {
    "max_voxels": (_positive(int), "a whole number above 0"),
    "max_share": (lambda value: _positive((int, float))(value) and value <= 1, "a number above 0, at most 1"),
}
_TYPE_NAMES = {str: "a text", list: "a list", dict: "an object", (str, type(None)): "a text or null"}


@dataclass(frozen=True)
class Template:
    """One template, checked. The module's docstring says what the fields mean."""

    name: str
    summary: str
    family: str
    paper: str
    dimensions: tuple[int, ...]
    network_class_name: str
    arch_kwargs: dict
    configuration: dict = field(default_factory=dict)
    trainer: str | None = None
    base: str | None = None
    configurations: dict[str, dict] = field(default_factory=dict)
    whole_volume: dict | None = None

    @property
    def parts(self) -> dict[str, Template]:
        """Of a method of several configurations, a template for each, by the configuration's name."""
        return {
            name: replace(self, **entries, base=None, configurations={})
            for name, entries in self.configurations.items()
        }

    def configuration_names(self, bases: Iterable[str]) -> list[str]:
        """What the configurations derived from ``bases`` are called."""
        return list(self.configurations) or [f"{base}_{self.name}" for base in bases]

    @property
    def network_class(self) -> Callable[..., nn.Module]:
        """The network's class, or the function that makes it.

        Raises:
            UsageError: there is no such class, or it does not take ``arch_kwargs`` or cannot plan its memory.
        """
        try:
            found = locate(self.network_class_name)
        except ErrorDuringImport as error:
            raise UsageError(f"Template {self.name}: {self.network_class_name} cannot be imported: {error}") from error
        if not callable(found):
            raise UsageError(
                f"Template {self.name}: network_class_name got {self.network_class_name!r}; expected the dotted path "
                "of a class that can be imported here. Correct it, or install what it comes from."
            )
        if isinstance(found, type) and not hasattr(found, "compute_conv_feature_map_size"):
            raise UsageError(
                f"Template {self.name}: {self.network_class_name} has no compute_conv_feature_map_size; expected what "
                "nnU-Net asks of a network, to plan its memory. Add it to the class."
            )
        parameters = inspect.signature(found).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        if (unknown := sorted(set(self.arch_kwargs) - set(parameters))) and not takes_any:
            raise UsageError(
                f"Template {self.name}: arch_kwargs got {', '.join(unknown)}, which {self.network_class_name} does not "
                f"take; it takes {', '.join(parameters)}."
            )
        return found


def template_names() -> list[str]:
    """Names of the templates that come with the package."""
    return [path.stem for path in sorted(Path(__file__).parent.glob("*.json"))]


def load_template(name_or_file: str) -> Template:
    """Read a template of this package by name, or a user's own by its file name (which ends in ``.json``).

    Raises:
        UsageError: no such template, or one that breaks the rules of this module.
    """
    if name_or_file.endswith(".json"):
        return _read(Path(name_or_file))
    if name_or_file not in template_names():
        raise UsageError(
            f"Unknown template {name_or_file!r}. Expected one of {', '.join(template_names())}, or a file that ends "
            "in .json."
        )
    return _packaged(name_or_file)


@cache
def _packaged(name: str) -> Template:
    return _read(Path(__file__).parent / f"{name}.json")


def _read(path: Path) -> Template:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"Cannot read the template {path}: {error.strerror}. Give the name of a JSON file.") from error
    except ValueError as error:
        raise UsageError(f"The template {path} is not valid JSON: {error}.") from error
    _check(content, path)
    return Template(path.stem, **content | {"dimensions": tuple(content["dimensions"])})


def _check(content: object, path: Path) -> None:
    def refuse(what: str) -> None:
        raise UsageError(f"The template {path}: {what}. The docstring of nnunet_dyn.plans_templates has the rules.")

    if not isinstance(content, dict):
        refuse(f"got a {type(content).__name__}; expected an object")
    if "__" in path.stem:
        refuse("its name has a double underscore, which separates the parts of nnU-Net's result folders; rename it")
    if missing := sorted(set(_TYPES) - _OPTIONAL - set(content)):
        refuse(f"without {', '.join(missing)}")
    if unknown := sorted(set(content) - set(_TYPES)):
        refuse(f"unknown {', '.join(unknown)}; expected {', '.join(_TYPES)}")
    for key, value in content.items():
        if not isinstance(value, _TYPES[key]):
            refuse(f"{key} got {value!r}; expected {_TYPE_NAMES[_TYPES[key]]}")
    if not content["dimensions"] or any(dimension not in (2, 3) for dimension in content["dimensions"]):
        refuse(f"dimensions got {content['dimensions']}; expected [2], [3] or [2, 3]")
    _check_configuration(content.get("configuration", {}), refuse)
    if bool(content.get("base")) != bool(content.get("configurations")):
        refuse("base and configurations belong together; got one of them")
    for name, entries in content.get("configurations", {}).items():
        if not isinstance(entries, dict) or "__" in name:
            refuse(f"configurations got {name}: {entries!r}; expected a name without double underscore, and an object")
        for key, value in entries.items():
            if key not in _PART_TYPES:
                refuse(f"configurations: {name} got {key}; expected {', '.join(_PART_TYPES)}")
            if not isinstance(value, _PART_TYPES[key]):
                refuse(f"{name}: {key} got {value!r}; expected {_TYPE_NAMES[_PART_TYPES[key]]}")
        _check_configuration(entries.get("configuration", {}), refuse)
        whole = entries.get("whole_volume", {})
        if whole and set(whole) != set(_WHOLE_VOLUME):
            refuse(f"{name}: whole_volume got {', '.join(whole)}; expected {' and '.join(_WHOLE_VOLUME)}")
        for key, value in whole.items():
            is_valid, expected = _WHOLE_VOLUME[key]
            if not is_valid(value):
                refuse(f"{key} got {value!r}; expected {expected}")


def _check_configuration(content: dict, refuse: Callable[[str], None]) -> None:
    for key, value in content.items():
        if key not in CONFIGURATION_KEYS:
            refuse(f"configuration got {key}; expected {', '.join(CONFIGURATION_KEYS)}")
        is_valid, expected = CONFIGURATION_KEYS[key]
        if not is_valid(value):
            refuse(f"{key} got {value!r}; expected {expected}")
