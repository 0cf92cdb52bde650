"""`nnunet_dyn profile`: what each network costs, beside nnU-Net's own, before anything is trained."""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cache
from io import StringIO
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_dyn.errors import JobError, UsageError
from nnunet_dyn.plan import dataset_folder, load_plans
from nnunet_dyn.plans_templates import load_template
from nnunet_dyn.trainers.catalogue import STOCK, template_name, trainer_names

if TYPE_CHECKING:
    from torch import nn

    from nnunet_dyn.inference import Predictor

UNITS = (
    "MACs: multiply-accumulates of one patch at batch 1, plus the normalisations (5 per element with affine part). "
    "Memory: fp32 tensors of one patch, as an accelerator allocates them, without parameters; training is what is "
    "kept for the backward pass (with deep supervision), inference the largest sum at any time. Forward pass: median, "
    "batch 1. ×: relative to the first row; of the time, the median ratio to a pass of the first row's network right "
    "before, so it is not the quotient of the seconds shown."
)
PATHS = (
    "Paths of networks that decide what they compute, deciding included. MACs are those that run, at whatever width; "
    "a pass decides and then does what the path says, or on images what was decided. The mean over images is what is "
    "predicted, not mirrored and with the decisions of the trained network, per tile of the sliding window, also where "
    "tiles lie on regions (ROI cascade, its segmentor alone: its seconds are of deciding on them and of their crops); "
    "its seconds are relative to the median of some passes of the first row's network (--rounds an image) between the "
    "tiles."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to profile: a data set's plans, or a patch, or the paper's table")
    what.add_argument("-d", metavar="DATASET", help="name or number of a preprocessed data set")
    what.add_argument("-c", metavar="CONFIG", help="a configuration of its plans, such as 3d_fullres")
    what.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="(default: %(default)s)")
    what.add_argument("--patch", type=int, nargs="+", metavar="N", help="voxels per axis, as 128 128 128 or 256 256")
    what.add_argument("--channels", type=int, default=1, help="image channels with --patch (default: %(default)s)")
    what.add_argument("--classes", type=int, default=4, help="classes with --patch (default: %(default)s)")
    what.add_argument("--table1", action="store_true", help="Martinho's Table 1, printed and reproduced")
    what.add_argument("-m", metavar="DIR", type=Path, help="model folder: the network as it was trained")
    parser.add_argument("-f", metavar="FOLD", help="fold of -m (default: the first that is there)")
    parser.add_argument(
        "-i",
        metavar="IMAGES",
        nargs="+",
        type=Path,
        help="with -m: what its network decides on these images, a folder or files named as case_0000.nii.gz",
    )
    parser.add_argument("-tr", metavar="TRAINER", nargs="+", help="(default: every trainer of this package)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="for latency (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed forward passes; 0: none (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write everything to FILE")


@dataclass(frozen=True)
class Subject:
    """Something to profile: how a trainer's network is built for a configuration.

    Attributes:
        trainer: a trainer name that nnU-Net finds.
        patch_size: voxels per axis.
        build: makes the network, on the CPU, with deep supervision where it has that.
    """

    trainer: str
    configuration: str
    patch_size: tuple[int, ...]
    channels: int
    build: Callable[[], nn.Module]


@dataclass(frozen=True)
class PathProfile:
    """What a network that decides costs along one path: see :data:`PATHS`.

    Attributes:
        macs: of one tile, or their mean.
        macs_by_bits: those of each stage times its bits / 32.
        tiles: of nnU-Net's sliding window over images, over which the numbers are means; 0 where the path is stated.
        shares: of the tiles that were predicted, by what was done with them.
        ratios: to the stock network.
    """

    path: str
    macs: float
    macs_by_bits: float
    tiles: int
    shares: dict[str, float]
    seconds: float | None
    stock_seconds: float | None
    ratios: dict[str, float]


@dataclass(frozen=True)
class Profile:
    """What one network costs; units in :data:`UNITS`.

    ``seconds`` and ``stock_seconds`` are medians of the timed passes of this network and of the stock one between them.
    ``paths`` are those of a network that decides what it computes.
    """

    trainer: str
    configuration: str
    patch_size: tuple[int, ...]
    parameters: int
    macs: int
    memory_training: int
    memory_inference: int
    seconds: float | None
    stock_seconds: float | None
    ratios: dict[str, float]
    not_counted: dict[str, int]
    paths: tuple[PathProfile, ...] = ()


def run(args: argparse.Namespace) -> int:
    """Profile one row after the other, each printed as soon as it is known."""
    if args.json is not None and not args.json.parent.is_dir():
        raise UsageError(f"--json got {args.json}; expected a file in a folder that exists.")
    if args.table1:
        return _print_table1(args.json)
    if args.rounds < 0:
        raise UsageError(f"--rounds got {args.rounds}; expected 0 or more.")
    if args.m is None and (args.i is not None or args.f is not None):
        raise UsageError(
            "Got -i or -f without -m; expected a trained model, since what an untrained network decides says nothing. "
            "Name its folder with -m."
        )
    device = _device(args.device)
    predictor, cases = (None, []) if args.m is None else _trained(args)
    subjects = _subjects(args) if predictor is None else _subjects_of_model(args, predictor)
    print(f"patch {' × '.join(map(str, subjects[0].patch_size))}, {subjects[0].channels} channel(s), {device}")
    heads = ["parameters", "MACs", "memory, training", "inference"] + ["forward pass"] * bool(args.rounds)
    print(f"{'trainer':32}" + "".join(f"{head:>17}" for head in heads))
    # The first network is timed beside every other one.
    stock = subjects[0] = replace(subjects[0], build=cache(subjects[0].build))
    profiles = []
    for subject in subjects:
        reference = profiles[0] if profiles else None
        profile = profile_network(subject, stock, device, args.rounds, reference)
        if cases and subject is subjects[-1]:
            mean = profile_images(predictor, cases, stock, device, args.rounds, profiles[0])
            profile = replace(profile, paths=(*profile.paths, mean))
        profiles.append(profile)
        _print_row(profile, stock)
    left_out = sorted({name.removeprefix("aten::") for profile in profiles for name in profile.not_counted})
    print()
    notes = [UNITS, *[PATHS] * any(profile.paths for profile in profiles)]
    for text in (*notes, f"Not counted among the MACs: {', '.join(left_out)}."):
        print(textwrap.fill(text, 117))
    if args.json is not None:
        _write_json(args.json, {"device": str(device), "units": UNITS, "profiles": [asdict(p) for p in profiles]})
    return 0


def profile_network(subject: Subject, stock: Subject, device, rounds: int, reference: Profile | None) -> Profile:
    """Count and time ``subject``; every timed pass is preceded by one of ``stock``, so that the ratio is fair.

    Args:
        reference: the profile of ``stock``, or ``None`` where ``subject`` is it.
    """
    from nnunet_dyn.accounting import count_operations, count_parameters, inference_memory, training_memory

    network = subject.build()
    shape = (1, subject.channels, *subject.patch_size)
    costs = {"parameters": count_parameters(network), "memory_training": training_memory(network, shape)}
    _without_deep_supervision(network)
    operations = count_operations(network, shape)
    costs |= {"macs": operations.total, "memory_inference": inference_memory(network, shape)}
    ratios = {key: value / (value if reference is None else getattr(reference, key)) for key, value in costs.items()}
    seconds = stock_seconds = None
    paths = tuple(_stated_paths(subject, network, stock, device, rounds, reference))
    if rounds and paths:  # what it would decide on noise says nothing
        seconds, stock_seconds, ratios["seconds"] = paths[0].seconds, paths[0].stock_seconds, paths[0].ratios["seconds"]
    elif rounds:
        seconds, stock_seconds, ratios["seconds"] = _measured(subject, network, stock, device, rounds, network)
    return Profile(
        subject.trainer,
        subject.configuration,
        subject.patch_size,
        **costs,
        seconds=seconds,
        stock_seconds=stock_seconds,
        ratios={key: round(value, 4) for key, value in ratios.items()},
        not_counted=operations.not_counted,
        paths=paths,
    )


def _measured(subject: Subject, network, stock: Subject, device, rounds: int, run: Callable) -> tuple[float, ...]:
    """Median seconds of ``run``, what ``network`` does, and of a pass of the stock one, and the median ratio."""
    timed, shapes = [network], [(1, subject.channels, *subject.patch_size)]
    if subject is not stock:
        timed.insert(0, _without_deep_supervision(stock.build()))
        shapes.insert(0, (1, stock.channels, *stock.patch_size))
    try:
        passes = latencies([*timed[:-1], run], timed, shapes, device, rounds)
    except (RuntimeError, MemoryError) as error:
        raise JobError(
            f"{subject.trainer}: the forward pass on {device} failed: {error}. Take a smaller patch, or --rounds 0."
        ) from error
    seconds, stock_seconds = (statistics.median(row[index] for row in passes) for index in (-1, 0))
    return seconds, stock_seconds, statistics.median(row[-1] / row[0] for row in passes)


def _stated_paths(
    subject: Subject, network, stock: Subject, device, rounds: int, reference: Profile | None
) -> Iterator[PathProfile]:
    """The paths that ``network`` names; none of one that does not decide."""
    from nnunet_dyn.decisions import DecidingNetwork

    if not isinstance(network, DecidingNetwork) or reference is None:
        return
    for name, decision in network.profile_paths(subject.patch_size).items():

        def follow(x, decision=decision):
            network.decide(x)
            return network.execute(x, [decision])

        seconds = stock_seconds = None
        macs = network.operations(decision, subject.patch_size)
        ratios = {"macs": macs / reference.macs, "macs_by_bits": decision.cost / reference.macs}
        if rounds:
            measured = _measured(subject, network, stock, device, rounds, follow)
            seconds, stock_seconds, ratios["seconds"] = measured
        ratios = {key: round(value, 4) for key, value in ratios.items()}
        yield PathProfile(name, macs, decision.cost, 0, {}, seconds, stock_seconds, ratios)


def profile_images(
    predictor: Predictor, cases: list[list[Path]], stock: Subject, device, rounds: int, reference: Profile
) -> PathProfile:
    """What the tiles of images cost, decided by the trained network, to those of nnU-Net's sliding window.

    Args:
        cases: channel files of each.
        rounds: passes of the stock network that are timed while each case is segmented.
        reference: the profile of ``stock``.
    """
    import torch

    network, patch = predictor.network.to(device).eval(), tuple(predictor.configuration_manager.patch_size)
    static = _without_deep_supervision(stock.build()).to(device).eval()
    noise = torch.randn((1, stock.channels, *stock.patch_size), device=device)

    def follow(x):
        decisions = network.decide(x)
        if predictor.gated is None:
            return network.execute(x, decisions)[1][0]
        for box in decisions[0].boxes:  # as they are predicted, without what is around them in a tile
            network.restore(network.segment_crops(network.cut(x[0], box)[None])[0], box)
        return decisions[0]

    macs, by_bits, seconds, stock_seconds, shares, window = [], [], [], [], Counter(), 0
    for number, files in enumerate(cases, 1):
        print(f"image {number} of {len(cases)}", file=sys.stderr, flush=True)
        image, properties = predictor.read(files)
        data, _ = predictor.preprocess([image], properties)
        window += predictor.window(tuple(data.shape[1:]))[0]
        last = max(0, sum(1 for _ in predictor.tiles(data)) - 1)
        timed = {round(at * last / max(1, rounds - 1)) for at in range(rounds)}
        if rounds and number == 1:
            timed_pass(static, noise, device)
        for index, tile in zip_longest(range(last + 1), predictor.tiles(data)):
            if index in timed:
                stock_seconds.append(timed_pass(static, noise, device)[0])
            if tile is None:  # nothing is predicted of this image
                continue
            if rounds and not seconds:
                timed_pass(follow, tile[None].to(device), device)
            spent, decision = timed_pass(follow, tile[None].to(device), device)
            seconds.append(spent)
            if predictor.gated is not None:  # counting a crop of a new size takes long
                decision = network.counted(decision)
            macs.append(network.operations(decision, patch))
            by_bits.append(decision.cost)
            shares[decision.action] += 1
    mean, mean_by_bits = sum(macs) / window, sum(by_bits) / window
    ratios = {"macs": mean / reference.macs, "macs_by_bits": mean_by_bits / reference.macs}
    if rounds:
        ratios["seconds"] = sum(seconds) / window / statistics.median(stock_seconds)
    return PathProfile(
        f"{len(cases)} image{'s' * (len(cases) != 1)}",
        mean,
        mean_by_bits,
        window,
        {action: round(count / len(macs), 4) for action, count in sorted(shares.items())},
        sum(seconds) / window if rounds else None,
        statistics.median(stock_seconds) if rounds else None,
        {key: round(value, 4) for key, value in ratios.items()},
    )


def _without_deep_supervision(network):
    """Turn deep supervision off as nnU-Net does for validation, where the network has it."""
    if hasattr(getattr(network, "decoder", None), "deep_supervision"):
        network.decoder.deep_supervision = False
    return network


def latencies(
    runs: list[Callable], networks: list, shapes: list[tuple[int, ...]], device, rounds: int
) -> list[list[float]]:
    """Seconds of each run on noise of its shape in turn, ``rounds`` times, after a pass that is not timed.

    As in nnU-Net's prediction: evaluation mode, no gradients, on CUDA under autocast.

    Args:
        networks: what each of ``runs`` is, or what it uses.
    """
    import torch

    inputs = [torch.randn(shape, device=device) for shape in shapes]
    for network in networks:
        network.to(device).eval()
    return [[timed_pass(*pair, device)[0] for pair in zip(runs, inputs, strict=True)] for _ in range(rounds + 1)][1:]


def timed_pass(run: Callable, x, device) -> tuple[float, object]:
    """Seconds of ``run(x)``, and what it returned."""
    import torch

    start = time.perf_counter()
    with torch.inference_mode(), torch.autocast(device.type, enabled=device.type == "cuda"):
        result = run(x)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def planned_configuration(patch_size: tuple[int, ...]) -> dict:
    """The configuration that nnU-Net's default planner gives a patch of isotropic voxels.

    Raises:
        UsageError: not 2 or 3 axes, or an axis below 8 voxels or not divisible by its strides.
    """
    import torch
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    dimension = len(patch_size)
    if dimension not in (2, 3) or min(patch_size) < 8:
        raise UsageError(f"--patch got {list(patch_size)}; expected two or three numbers of at least 8.")
    _, strides, kernels, fitting, _ = get_pool_and_conv_props([1.0] * dimension, patch_size, 4, 999999)
    if tuple(fitting) != tuple(patch_size):
        nearest = [int(size) for size in fitting]
        raise UsageError(f"--patch got {list(patch_size)}; expected axes divisible by the strides, such as {nearest}.")
    stages = len(strides)
    widest = 512 if dimension == 2 else 320
    conv, norm = (getattr(torch.nn, f"{name}{dimension}d") for name in ("Conv", "InstanceNorm"))
    return {
        "patch_size": list(patch_size),
        "spacing": [1.0] * dimension,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": stages,
                "features_per_stage": [min(widest, 32 * 2**stage) for stage in range(stages)],
                "conv_op": f"{conv.__module__}.{conv.__name__}",
                "kernel_sizes": kernels,
                "strides": strides,
                "n_conv_per_stage": [2] * stages,
                "n_conv_per_stage_decoder": [2] * (stages - 1),
                "conv_bias": True,
                "norm_op": f"{norm.__module__}.{norm.__name__}",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }


def _subjects(args: argparse.Namespace) -> list[Subject]:
    """The stock network first, then what was asked for."""
    if args.patch is not None:
        if args.d is not None or args.c is not None:
            raise UsageError("Got --patch beside -d or -c; expected one of the two ways.")
        if args.channels < 1 or args.classes < 2:
            raise UsageError(
                f"Got --channels {args.channels} --classes {args.classes}; expected at least 1 channel and 2 classes."
            )
        name = f"{len(args.patch)}d"
        plans = {"plans_name": "--patch", "configurations": {name: planned_configuration(tuple(args.patch))}}
        pairs = [(name, trainer) for trainer in _trainers(args.tr, len(args.patch))]
        dataset = {
            "channel_names": {str(channel): "image" for channel in range(args.channels)},
            "labels": {"background": 0} | {str(label): label for label in range(1, args.classes)},
        }
    else:
        if args.d is None or args.c is None:
            raise UsageError("Got neither a data set with a configuration (-d, -c) nor --patch; expected one of them.")
        folder = dataset_folder(args.d, "nnUNet_preprocessed")
        plans = load_plans(folder, args.p)
        pairs = _of_plans(plans, args.p, args.c, args.tr)
        try:
            dataset = json.loads((folder / "dataset.json").read_text())
        except (OSError, ValueError) as error:
            raise UsageError(
                f"Cannot read {folder / 'dataset.json'}: {error}. Run nnUNetv2_plan_experiment."
            ) from error
    return [_subject(plans, dataset, configuration, trainer) for configuration, trainer in pairs]


def _trainers(wanted: list[str] | None, dimension: int) -> list[str]:
    """The stock trainer, then those that are ``wanted``, or all whose networks work in ``dimension`` dimensions."""
    if wanted is None:
        wanted = [
            name
            for name in trainer_names()
            if "ImageNet" not in name
            and dimension in (template := load_template(template_name(name))).dimensions
            and not template.configurations  # those train configurations of their own
        ]
    return [STOCK, *(name for name in wanted if name != STOCK)]


def _trained(args: argparse.Namespace) -> tuple[Predictor, list[list[Path]]]:
    """The model of ``-m``, and the cases of ``-i`` if it decides."""
    named = {"-d": args.d, "-c": args.c, "--patch": args.patch, "-tr": args.tr}
    if given := [flag for flag, value in named.items() if value is not None]:
        raise UsageError(f"Got -m beside {', '.join(given)}; expected the model folder alone, which says all of them.")
    from nnunet_dyn.inference import Predictor
    from nnunet_dyn.inference.exported import is_exported
    from nnunet_dyn.inference.model_folder import available_folds

    if is_exported(args.m):
        raise UsageError(
            f"-m got {args.m}, an exported model, whose network is in an engine's own format; expected nnU-Net's model "
            "folder. Name the one that it was exported from."
        )
    folds = [args.f] if args.f else available_folds(args.m)[:1] or None
    predictor = Predictor.from_folder(args.m, folds, device=args.device)
    if args.i is None:
        return predictor, []
    if not predictor.engine.decides:
        raise UsageError(
            f"-i got images for a model of {predictor.trainer_name}, which computes the same on every image. "
            "Leave out -i, or name a model of a dynamic method."
        )
    predictor.check_cascade(has_previous_stage=False)
    return predictor, _cases(args.i, predictor.dataset_json["file_ending"])


def _cases(paths: list[Path], ending: str) -> list[list[Path]]:
    """The channel files of each case of a folder, or of files."""
    from nnunet_dyn.inference.predictor import list_cases

    if len(paths) == 1 and paths[0].is_dir():
        return [files for _, files in list_cases(paths[0], ending)]
    wrong = [str(path) for path in paths if not path.match(f"*_[0-9][0-9][0-9][0-9]{ending}") or not path.is_file()]
    if wrong:
        raise UsageError(f"-i got {wrong[0]}; expected one folder, or files named as case_0000{ending}.")
    of_case: dict[str, list[Path]] = {}
    for path in sorted(paths):
        of_case.setdefault(str(path)[: -len(ending) - 5], []).append(path)
    return list(of_case.values())


def _subjects_of_model(args: argparse.Namespace, predictor: Predictor) -> list[Subject]:
    """The stock network, and the trained one in place of one that is built anew."""
    from nnunet_dyn.inference.model_folder import CHECKPOINT, load_checkpoint

    checkpoint = next(args.m.glob(f"fold_{args.f or '*'}/{CHECKPOINT}"))
    configuration = load_checkpoint(checkpoint)["init_args"]["configuration"]
    plans, dataset = predictor.plans_manager.plans, predictor.dataset_json
    pairs = _of_plans(plans, str(args.m), configuration, [predictor.trainer_name])
    *before, own = [_subject(plans, dataset, *pair) for pair in pairs]
    return [*before, replace(own, build=lambda: predictor.network)]


def _of_plans(plans: dict, plans_name: str, configuration: str, trainers: list[str] | None) -> list[tuple[str, str]]:
    """(configuration, trainer) pairs; a derived configuration is set beside the one it comes from."""
    from nnunet_dyn.planning import source_configurations

    sources = source_configurations(plans)
    if configuration not in plans["configurations"]:
        raise UsageError(
            f"-c got {configuration!r}; {plans_name} has {', '.join(plans['configurations'])}. Name one of those."
        )
    if configuration in sources:
        return [(configuration, trainer) for trainer in _trainers(trainers, sources[configuration])]
    source = configuration.rpartition("_")[0]  # as nnunet_dyn plan names what it derives
    if source not in sources:
        source = plans["configurations"][configuration].get("inherits_from")
    if source not in sources:
        raise UsageError(
            f"{configuration} comes from no configuration with one of nnU-Net's U-Nets; nothing to compare."
        )
    return [(source, STOCK), *((configuration, trainer) for trainer in trainers or [STOCK])]


def _subject(plans: dict, dataset: dict, configuration: str, trainer: str) -> Subject:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
    from nnunetv2.utilities.label_handling.label_handling import LabelManager, determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(plans)
    planned = manager.get_configuration(configuration)
    channels = determine_num_input_channels(manager, planned, dataset)
    classes = LabelManager(dataset["labels"], dataset.get("regions_class_order")).num_segmentation_heads
    try:
        with redirect_stdout(StringIO()):  # nnU-Net reports its search
            trainer_class = recursive_find_trainer_class_by_name(trainer)
    except RuntimeError as error:
        raise UsageError(f"nnU-Net finds no trainer {trainer}. Run 'nnunet_dyn doctor {trainer}'.") from error

    def build():
        try:
            return trainer_class.build_network_architecture(manager, planned, channels, classes, True)
        except (ValueError, TypeError, ImportError) as error:
            raise UsageError(f"{trainer} cannot serve {configuration}: {error}") from error

    return Subject(trainer, configuration, tuple(planned.patch_size), channels, build)


def _device(name: str):
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise JobError("--device cuda: no CUDA device here. Take --device cpu, or run where there is one.")
    return torch.device(name)


def _print_row(profile: Profile, stock: Subject) -> None:
    cells = [
        _cell(profile, "parameters", 1e6, "M", 1),
        _cell(profile, "macs", 1e9, "G", 1),
        _cell(profile, "memory_training", 2**20, "MB"),
        _cell(profile, "memory_inference", 2**20, "MB"),
    ]
    if profile.seconds is not None:
        cells.append(_cell(profile, "seconds", 1, "s", 3))
    name = profile.trainer
    if profile.configuration != stock.configuration:
        name += f" {profile.configuration}"
    print(f"{name:32}" + "".join(f"{cell:>17}" for cell in cells), flush=True)
    for path in profile.paths:
        cells = ["", _cell(path, "macs", 1e9, "G", 1), "", ""]
        if path.seconds is not None:
            cells.append(_cell(path, "seconds", 1, "s", 3))
        print((f"  {path.path:30}" + "".join(f"{cell:>17}" for cell in cells)).rstrip(), flush=True)
        if path.tiles:
            shares = ", ".join(f"{100 * share:.0f} % {action}" for action, share in path.shares.items()) or "none run"
            weighted = f"MACs × bits / 32 {path.ratios['macs_by_bits']:.2f}×"
            print(f"    {path.tiles} tiles: {shares}; {weighted}", flush=True)


def _cell(profile: Profile | PathProfile, key: str, scale: float, unit: str, digits: int = 0) -> str:
    return f"{getattr(profile, key) / scale:,.{digits}f} {unit} {profile.ratios[key]:5.2f}×"


def read_table1() -> list[dict[str, str]]:
    """Martinho's Table 1: what the paper prints (``paper_…``) and the exact values behind it, a row a network."""
    # Without newline translation, so that the table reads the same on every system.
    with open(Path(__file__).with_name("table1.csv"), newline="") as file:
        return list(csv.DictReader(file))


def reproduce_table1(row: dict[str, str]) -> dict[str, int]:
    """Parameters and operations of the network of one row of Table 1, counted as the paper counts.

    Two patches of 128³, every head of deep supervision; the encoder's parameters include the classification head,
    which never runs.
    """
    from nnunet_dyn.accounting import count_operations, count_parameters
    from nnunet_dyn.planning import build_network, derived_architecture
    from nnunet_dyn.plans_templates import load_template

    name = (
        row["name"].replace("UNetV2-", "-v2").replace("UNet", "").replace("Efficient", "Eff").replace("-", "").lower()
    )
    architecture = planned_configuration((128, 128, 128))["architecture"]
    if name == "generic":
        template = load_template("fullyeffgeneric")
        planned = derived_architecture(template, architecture)
        planned["arch_kwargs"]["decoder"] = "plain"
    else:
        template = load_template(name)
        planned = derived_architecture(template, architecture)
    network = build_network(planned, 1, int(row["num_classes"]), allow_init=False, deep_supervision=True)
    operations = count_operations(network, (2, 1, 128, 128, 128))
    variant = getattr(network.encoder, "variant", None)
    head = 0
    if variant is not None:
        head = variant.stages[-1].channels * variant.head_channels + 2 * variant.head_channels
        head += (variant.head_channels + 1) * 1000
    blocks = [f"decoder.stages.{level}" for level in range(len(network.decoder.stages))]
    return {
        "flops_net": operations.total,
        "flops_enc": operations.by_module["encoder"],
        "flops_dec": sum(operations.by_module[block] for block in blocks),
        "params_net": count_parameters(network) + head,
        "params_enc": count_parameters(network.encoder) + head,
        "params_dec": count_parameters(network.decoder.stages),
    }


def agrees(value: int, printed: str) -> bool:
    """Whether ``value`` is ``printed`` (such as 0.958T or 31.196M) at the digits that are printed."""
    unit = {"M": 1e6, "G": 1e9, "T": 1e12}[printed[-1]]
    return abs(value / unit - float(printed[:-1])) <= 0.5e-3 * (1 + 1e-9)


def _print_table1(json_file: Path | None) -> int:
    cells = ("flops_net", "flops_enc", "flops_dec", "params_net", "params_enc", "params_dec")
    print("Martinho, Table 1: printed | reproduced here. FLOPs as the paper counts them, two patches of 128³.")
    print(f"{'network':24}" + "".join(f"{cell:>20}" for cell in cells))
    rows = []
    for row in read_table1():
        ours = reproduce_table1(row)
        line, differs = f"{row['name']:24}", []
        for cell in cells:
            printed = row[f"paper_{cell}"]
            unit = {"M": 1e6, "G": 1e9, "T": 1e12}[printed[-1]]
            line += f"{f'{printed} | {ours[cell] / unit:.3f}':>20}"
            if not agrees(ours[cell], printed):
                differs.append(cell)
        print(line + (f"  differs: {', '.join(differs)}" if differs else ""), flush=True)
        rows.append({"name": row["name"], "paper": {c: row[f"paper_{c}"] for c in cells}, "reproduced": ours})
    print(
        "\nFullyEfficientUNet-b4 is printed with the cells of EfficientUNet-b4; the reproduced ones are its own. "
        "The encoder's parameters include a classification head that never runs and is not built here."
    )
    if json_file is not None:
        _write_json(json_file, {"rows": rows})
    return 0


def _write_json(path: Path, content: dict) -> None:
    try:
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise JobError(f"Cannot write {path}: {error.strerror}.") from error
    print(f"Written to {path}", file=sys.stderr)
