"""`nnunet_dyn plan`: add configurations of this package's networks to an nnU-Net plans file."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_dyn.errors import JobError, UsageError
from nnunet_dyn.plans_templates import Template, load_template, template_names

if TYPE_CHECKING:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

DEFAULT_SOURCE, DEFAULT_OUTPUT = "nnUNetPlans", "nnUNetDynPlans"


class _DoesNotFit(UsageError):
    """A template cannot be planned for a configuration."""


# What is read of plans beside their configurations.
_NEEDED = ("dataset_name", "plans_name", "experiment_planner_used", "original_median_shape_after_transp")
# Entries of a configuration that leave its plan as it is.
_LINKS = {"inherits_from", "previous_stage", "next_stage", "batch_dice"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", metavar="DATASET", required=True, help="name or number of a preprocessed data set")
    parser.add_argument(
        "-t", metavar="TEMPLATE", nargs="+", help="templates, by name or JSON file (default: all, see nnunet_dyn list)"
    )
    parser.add_argument("-c", metavar="CONFIG", nargs="+", help="configurations to start from (default: all that fit)")
    parser.add_argument("-p", metavar="PLANS", default=DEFAULT_SOURCE, help="plans to start from (%(default)s)")
    parser.add_argument("-o", metavar="PLANS", default=DEFAULT_OUTPUT, help="plans to write (%(default)s)")
    parser.add_argument(
        "-gpu_memory_target", metavar="GB", type=float, help="as in nnUNetv2_plan_experiment (default: the planner's)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace configurations and plans that exist")


def run(args: argparse.Namespace) -> int:
    """Derive the configurations and write them. Nothing is written unless all that were named could be planned."""
    if args.gpu_memory_target is not None and not 0 < args.gpu_memory_target < math.inf:
        raise UsageError(f"-gpu_memory_target got {args.gpu_memory_target}; expected gigabytes, more than 0.")
    if args.o == args.p or "__" in args.o or os.sep in args.o or not args.o:
        raise UsageError(
            f"-o got {args.o!r}; expected a name other than {args.p!r}, without double underscore (which separates "
            "the parts of nnU-Net's result folders) and without a path."
        )
    templates = [load_template(name) for name in args.t or template_names()]
    for template in templates:
        for part in (template.parts or {template.name: template}).values():
            _ = part.network_class  # a class that is missing should be known before minutes of planning
    names = [template.name for template in templates]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"-t got {', '.join(repeated)} more than once; expected templates of different names.")
    folder = dataset_folder(args.d, "nnUNet_raw", "nnUNet_preprocessed")
    if not os.access(folder, os.W_OK):
        raise JobError(f"Cannot write into {folder}: permission denied. Nothing was changed.")
    source = load_plans(folder, args.p)
    output = folder / f"{args.o}.json"
    plans = _start(source, output, args.overwrite)

    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_dyn.planning import source_configurations

    bases = source_configurations(source)
    wanted = [(template, _fitting(template, bases, args.c, skip=not args.t)) for template in templates]
    wanted = [(template, fitting) for template, fitting in wanted if fitting]
    if not wanted:
        raise UsageError(f"{args.p} has no configuration with one of nnU-Net's U-Nets; nothing to derive from.")
    made_by: dict[str, str] = {}
    for template, fitting in wanted:
        for name in template.configuration_names(fitting):
            if made_by.setdefault(name, template.name) != template.name:
                raise UsageError(
                    f"-t got {made_by[name]} and {template.name}, which both make {name}; expected configurations of "
                    "different names. Change those in one of the templates, or plan it apart with another -o."
                )
    names = set(made_by)
    if not args.overwrite and (existing := sorted(names & set(plans["configurations"]))):
        raise UsageError(
            f"{output.name} already has {', '.join(existing)}. Choose another name with -o, or take --overwrite."
        )
    manager = PlansManager(source)
    if manager.experiment_planner_class is None:
        _progress(f"nnU-Net has no planner {manager.experiment_planner_name}, which made the plans; using its default.")
    added: dict[str, dict] = {}
    trainers: list[str | None] = []
    for number, (template, fitting) in enumerate(wanted, 1):
        _progress(f"[{number}/{len(wanted)}] {template.name}: {', '.join(fitting)}")
        try:
            added |= _derive(template, manager, fitting, args.o, args.gpu_memory_target)
            trainers.append(template.trainer)
        except _DoesNotFit as error:
            if args.t or (number == len(wanted) and not added):
                raise
            _progress(f"Left out: {error}")  # nobody asked for this one
    plans["configurations"] |= added
    _write(plans, output)
    _report(added, plans, output, f"nnUNetv2_train {args.d} {next(iter(added))} 0 -p {args.o}", trainers[0])
    return 0


def dataset_folder(dataset: str, *variables: str) -> Path:
    """The folder of ``dataset``, a name or number, in the last of nnU-Net's folders that ``variables`` name.

    Raises:
        UsageError: one of the folders is not set, or has no such data set.
    """
    for variable in variables:
        if not os.path.isdir(os.environ.get(variable, "")):
            raise UsageError(
                f"{variable} is {os.environ.get(variable) or 'not set'}; expected a folder. Run 'nnunet_dyn doctor'."
            )
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    try:
        name = maybe_convert_to_dataset_name(dataset)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"No data set {dataset!r}: {error}") from error
    for variable in variables:
        folder = Path(os.environ[variable], name)
        if not folder.is_dir():
            raise UsageError(
                f"{variable} has no {name}. Expected a data set that nnUNetv2_plan_and_preprocess has been run on."
            )
    return folder


def load_plans(folder: Path, name: str) -> dict:
    """Read plans ``name`` of the preprocessed data set in ``folder``.

    Raises:
        UsageError: they are missing, not valid, or of a format that nnU-Net 2.8 no longer writes.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        found = sorted(p.stem for p in folder.glob("*lans*.json"))
        raise UsageError(
            f"No plans {name} in {folder}; there are: {', '.join(found) or 'none'}. Run nnUNetv2_plan_experiment, or "
            "name other plans with -p."
        )
    try:
        plans = json.loads(path.read_text())
        configurations = plans["configurations"]
        old = [c for c, entries in configurations.items() if not {"architecture", "inherits_from"} & set(entries)]
        missing = [key for key in _NEEDED if key not in plans]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not an nnU-Net plans file ({error}). Run nnUNetv2_plan_experiment.") from error
    if old:
        raise UsageError(
            f"{path} was made by an older nnU-Net: {', '.join(old)} without an architecture. Plan again with "
            "nnUNetv2_plan_experiment of the nnU-Net installed here."
        )
    if missing:
        raise UsageError(f"{path} has no {', '.join(missing)}; expected nnU-Net's plans. Plan again.")
    _resolve(plans, path)
    return plans


def _resolve(plans: dict, path: Path) -> None:
    """Check that every configuration is complete once what it inherits is filled in."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(plans)
    for name in manager.available_configurations:
        try:
            entries = manager.get_configuration(name).configuration
            missing = [key for key in ("patch_size", "spacing", "architecture") if key not in entries]
            missing += [key for key in ("network_class_name", "arch_kwargs") if key not in entries["architecture"]]
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: configuration {name} cannot be resolved: {error}. Correct it.") from error
        if missing:
            raise UsageError(f"{path}: configuration {name} has no {', '.join(missing)}. Plan again.")


def _start(source: dict, output: Path, overwrite: bool) -> dict:
    """The plans to add to: those in ``output`` if they come from ``source``, else a copy of ``source``."""
    fresh = deepcopy(source) | {"plans_name": output.stem}
    if not output.exists():
        return fresh
    try:
        plans = load_plans(output.parent, output.stem)
    except UsageError:
        if overwrite:
            return fresh
        raise
    same = {**plans, "configurations": None} == {**fresh, "configurations": None} and all(
        plans["configurations"].get(name) == entries for name, entries in source["configurations"].items()
    )
    if same:
        return plans
    if overwrite:
        return fresh
    raise UsageError(
        f"{output} exists and was made from other plans than {source['plans_name']}. Choose another name with -o, or "
        "replace it with --overwrite."
    )


def _fitting(template: Template, bases: dict[str, int], wanted: list[str] | None, skip: bool) -> list[str]:
    """The configurations that ``template`` is planned for; ``bases`` gives each one's dimension.

    Args:
        skip: leave out what does not fit, instead of refusing.
    """
    if unknown := sorted(set(wanted or []) - set(bases)):
        raise UsageError(
            f"-c got {', '.join(unknown)}; the plans have {', '.join(bases) or 'no U-Net'}. Name some of those."
        )
    if template.base is not None:
        if template.base in bases and template.base in (wanted or bases):
            return [template.base]
        if skip:
            return []
        raise UsageError(
            f"Template {template.name} starts from {template.base}; got {', '.join(wanted or bases)}. Choose that "
            "configuration, or another template."
        )
    fitting = [name for name in wanted or bases if bases[name] in template.dimensions]
    if not skip and (not fitting or (wanted and fitting != wanted)):
        possible = " and ".join(f"{d}D" for d in template.dimensions)
        raise UsageError(
            f"Template {template.name} works in {possible}; got {', '.join(wanted or bases)}. Choose a configuration "
            "of that dimension, or another template."
        )
    return fitting


def _derive(
    template: Template, plans: PlansManager, bases: list[str], output_name: str, gpu_memory_target: float | None
) -> dict[str, dict]:
    """The configurations of ``template`` for each of ``bases``, by name."""
    from nnunet_dyn.planning import derive_configuration

    if template.configurations:
        return _derive_parts(template, plans, output_name, gpu_memory_target)
    planner = _planner(plans, template, gpu_memory_target)
    derived, cache = {}, {}
    for base in bases:
        entries = plans.plans["configurations"][base]
        parent = entries.get("inherits_from")
        if parent in bases and set(entries) <= _LINKS:
            configuration = {**entries, "inherits_from": f"{parent}_{template.name}"}
        else:
            try:
                configuration = derive_configuration(planner, plans, base, cache)
            except (ValueError, TypeError) as error:
                raise _DoesNotFit(f"Template {template.name} does not fit {base}: {error}") from error
        for link in ("previous_stage", "next_stage"):
            linked = plans.get_configuration(base).configuration.get(link)
            if link not in template.configuration and linked in bases:
                configuration[link] = f"{linked}_{template.name}"
        name = f"{base}_{template.name}"
        if "spacing" in template.configuration:
            configuration["data_identifier"] = f"{output_name}_{name}"
        derived[name] = configuration
    return derived


def _derive_parts(
    template: Template, plans: PlansManager, output_name: str, gpu_memory_target: float | None
) -> dict[str, dict]:
    """The configurations that ``template`` names, each derived from its base."""
    from nnunet_dyn.planning import derive_configuration, derive_whole_volume

    derived = {}
    for name, part in template.parts.items():
        planner = _planner(plans, part, gpu_memory_target)
        try:
            if part.whole_volume is None:
                derived[name] = derive_configuration(planner, plans, template.base, {})
            else:
                derived[name] = derive_whole_volume(planner, plans, template.base)
        except (ValueError, TypeError) as error:
            raise _DoesNotFit(f"Template {template.name}, {name}, does not fit {template.base}: {error}") from error
        if "spacing" in derived[name]:
            derived[name]["data_identifier"] = f"{output_name}_{name}"
    return derived


def _planner(plans: PlansManager, template: Template, gpu_memory_target: float | None):
    from nnunet_dyn.planning import network_planner

    try:
        return network_planner(plans, template, gpu_memory_target)
    except (RuntimeError, OSError, ValueError, KeyError, AssertionError) as error:
        raise UsageError(
            f"nnU-Net's planner cannot start ({type(error).__name__}: {error}). Expected the data set's dataset.json, "
            "images and fingerprint; run nnUNetv2_plan_and_preprocess."
        ) from error


def _write(plans: dict, path: Path) -> None:
    """Replace ``path`` in one step, so that no reader sees half a file and a failure leaves the old one."""
    text = json.dumps(plans, indent=4)
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise JobError(f"Cannot write into {path.parent}: {error.strerror}. Nothing was changed.") from error
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise JobError(f"Cannot write {path}: {error.strerror}. The old file is untouched.") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _report(added: dict[str, dict], plans: dict, output: Path, command: str, trainer: str | None) -> None:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(plans)
    width = max(map(len, added))
    print(f"\n{'configuration':{width}}  {'patch size':17}  batch  preprocessed data")
    for name in added:
        configuration = manager.get_configuration(name)
        patch = " × ".join(map(str, configuration.patch_size))
        present = (output.parent / configuration.data_identifier).is_dir()
        state = configuration.data_identifier + ("" if present else " (not there yet: nnUNetv2_preprocess)")
        print(f"{name:{width}}  {patch:17}  {configuration.batch_size:5}  {state}")
    own_data = [name for name in added if "data_identifier" in plans["configurations"][name]]
    if own_data:
        print(
            f"\nPreprocess {' and '.join(own_data)} first, which shares no data with another:\n"
            f"  nnUNetv2_preprocess -d {command.split()[1]} -plans_name {output.stem} -c {' '.join(own_data)}"
        )
    with_trainer = f"its own trainer:\n  {command} -tr {trainer}" if trainer else f"nnU-Net's own trainer:\n  {command}"
    print(f"\nWritten to {output}. Train the first one with {with_trainer}")
