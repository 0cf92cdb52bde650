"""`nnunet_dyn list`: every trainer and template, what it is and what it costs."""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import asdict, dataclass

from nnunet_dyn.plans_templates import Template, load_template
from nnunet_dyn.trainers.catalogue import STOCK, template_name, trainer_names

#: The patch that costs are given for, per dimension; one channel, four classes, nnU-Net's default plan.
REFERENCE_PATCHES = {2: (256, 256), 3: (128, 128, 128)}


@dataclass(frozen=True)
class Method:
    """A network and the names under which it can be had.

    Attributes:
        trainers: names for ``-tr``; each also takes a length.
        template: name for ``nnunet_dyn plan -t``, whose configurations nnU-Net's own trainer trains unless
            ``own_procedure`` names another one.
        parameters, macs: of the network for the largest reference patch it works on, of several configurations
            together; MACs as in :mod:`nnunet_dyn.accounting`.
    """

    trainers: tuple[str, ...]
    template: str | None
    family: str
    summary: str
    paper: str
    dimensions: tuple[int, ...]
    own_procedure: str | None
    parameters: int
    macs: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print every method, each as soon as its cost is known."""
    if args.json:
        print(json.dumps({"reference_patches": REFERENCE_PATCHES, "methods": [asdict(m) for m in methods()]}, indent=1))
        return 0
    print(f"{'trainer (-tr)':38}{'template (-t)':18}{'dimensions':12}{'parameters':>12}{'MACs':>12}  own procedure")
    stock, heading = None, None
    for method in methods():
        stock = stock or method
        if (method.family, method.paper) != heading:
            heading = (method.family, method.paper)
            print(f"\n{textwrap.fill('. '.join(filter(None, heading)), 118)}")
        dimensions = " ".join(f"{dimension}D" for dimension in method.dimensions)
        name, *others = method.trainers
        cost = f"{method.parameters / 1e6:10.1f} M{method.macs / 1e9:10.0f} G"
        print(
            f"  {name:36}{method.template or '-':18}{dimensions:12}{cost}  {method.own_procedure or 'no'}", flush=True
        )
        for other in others:
            print(f"  {other}")
    patches = " and ".join("×".join(map(str, patch)) for patch in REFERENCE_PATCHES.values())
    print(
        f"\nMACs of one patch ({patches}; the 3D one where a method has both), 1 channel, 4 classes, default plan; "
        "nnunet_dyn profile says what is counted.\nEvery trainer also takes _<N>epochs and then _<N>iters: "
        "nnUNetTrainerEffV2S_20epochs_50iters."
    )
    return 0


def methods():
    """Yield nnU-Net's own network for reference, then every method of this package."""
    from nnunet_dyn.accounting import count_operations, count_parameters
    from nnunet_dyn.planning import build_network, derived_architecture
    from nnunet_dyn.profiling import planned_configuration

    def costs(template: Template | None) -> dict[str, int]:
        import torch

        patch = REFERENCE_PATCHES[max(template.dimensions) if template else 3]
        total = {"parameters": 0, "macs": 0}
        for part in [template] if template is None else list(template.parts.values()) or [template]:
            architecture, channels = planned_configuration(patch)["architecture"], 1
            if part is not None:
                architecture = derived_architecture(part, architecture, patch, channels)
            if "previous_stage" in (part.configuration if part else {}):
                channels += 3  # its segmentation, a channel a class
            with torch.device("meta"):  # counting needs no weights
                network = build_network(architecture, channels, 4, allow_init=False)
            total["parameters"] += count_parameters(network)
            total["macs"] += count_operations(network, (1, channels, *patch)).total
        return total

    yield Method(
        (STOCK,),
        None,
        "nnU-Net (PlainConvUNet)",
        "for comparison",
        "",
        (2, 3),
        None,
        **costs(None),
    )
    by_template: dict[str, list[str]] = {}
    for trainer in trainer_names():
        by_template.setdefault(template_name(trainer), []).append(trainer)
    for name in by_template:
        template = load_template(name)
        yield Method(
            tuple(by_template[name]),
            name,
            template.family,
            template.summary,
            template.paper,
            template.dimensions,
            template.trainer,
            **costs(template),
        )
