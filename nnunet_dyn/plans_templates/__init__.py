"""Templates: what a method changes in an nnU-Net configuration, as data.

A template is a JSON file, ``<name>.json`` in this folder or anywhere else. Its entries:

- ``summary``, ``family``, ``paper``: text for the reader of ``nnunet_dyn list``.
- ``dimensions``: the dimensions of a patch the network works in, ``[2]``, ``[3]`` or ``[2, 3]``.
- ``network_class_name``: dotted path of the network's class, as in nnU-Net's plans.
- ``arch_kwargs``: the arguments that the class needs beyond those nnU-Net plans for a U-Net.
- ``configuration`` (optional): entries of the configuration to set, out of :data:`CONFIGURATION_KEYS`.
- ``trainer`` (optional): the trainer that the method's own procedure needs. Without it any trainer will do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from pydoc import ErrorDuringImport, locate

from nnunet_dyn.errors import UsageError

#: What a template may set beside the architecture. A spacing of its own takes preprocessed data of its own.
CONFIGURATION_KEYS = ("patch_size", "batch_size", "batch_dice", "spacing", "previous_stage", "next_stage")

_TYPES = {
    "summary": str,
    "family": str,
    "paper": str,
    "dimensions": list,
    "network_class_name": str,
    "arch_kwargs": dict,
    "configuration": dict,
    "trainer": (str, type(None)),
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

    @property
    def network_class(self) -> type:
        """The network's class.

        Raises:
            UsageError: there is no such class.
        """
        try:
            found = locate(self.network_class_name)
        except ErrorDuringImport as error:
            raise UsageError(f"Template {self.name}: {self.network_class_name} cannot be imported: {error}") from error
        if not isinstance(found, type):
            raise UsageError(
                f"Template {self.name}: network_class_name got {self.network_class_name!r}; expected the dotted path "
                "of a class that can be imported here. Correct it, or install what it comes from."
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
    if missing := sorted(set(_TYPES) - {"configuration", "trainer"} - set(content)):
        refuse(f"without {', '.join(missing)}")
    if unknown := sorted(set(content) - set(_TYPES)):
        refuse(f"unknown {', '.join(unknown)}; expected {', '.join(_TYPES)}")
    for key, value in content.items():
        if not isinstance(value, _TYPES[key]):
            refuse(f"{key} got {value!r}; expected {_TYPE_NAMES[_TYPES[key]]}")
    if not content["dimensions"] or not set(content["dimensions"]) <= {2, 3}:
        refuse(f"dimensions got {content['dimensions']}; expected [2], [3] or [2, 3]")
    if unknown := sorted(set(content.get("configuration", {})) - set(CONFIGURATION_KEYS)):
        refuse(f"configuration got {', '.join(unknown)}; expected {', '.join(CONFIGURATION_KEYS)}")
