"""Which trainer names exist, and how a name becomes a class. Imports nothing heavy until a class is asked for."""

from __future__ import annotations

import difflib
import importlib
import re

# Family module → the base names it makes. The names are data so that listing them needs no torch.
_B_NETS = tuple(f"B{index}" for index in range(8))
_V2_NETS = ("V2S", "V2M", "V2L")
_EFFICIENT = (
    *(
        f"nnUNetTrainer{decoder}{encoder}{weights}"
        for decoder in ("Eff", "FullyEff")
        for encoder in _B_NETS + _V2_NETS
        for weights in ("", "_ImageNet")
    ),
    "nnUNetTrainerFullyEffGeneric",
)
_DYNAMIC = tuple(
    f"nnUNetTrainer{method}"
    for method in ("MAGIC1x", "MAGIC2x", "MAGIC4x", "DYConv4x", "CondConv8x", "ODConv4x", "DCD", "DDConv")
)
_ABLATIONS = ("SpatialOnly", "QuantOnly")
_MED_DANET = tuple(f"nnUNetTrainerMedDANetV2{ablation}" for ablation in ("", *_ABLATIONS))
_ROI_CASCADE = ("nnUNetTrainerROICascade", "nnUNetTrainerROICascadeTriPlane")
FAMILIES: dict[str, tuple[str, ...]] = {
    "nnunet_dyn.trainers.efficient_unet": _EFFICIENT,
    "nnunet_dyn.trainers.dynamic_convs": _DYNAMIC,
    "nnunet_dyn.trainers.med_danet": _MED_DANET,
    "nnunet_dyn.trainers.roi_cascade": _ROI_CASCADE,
}

# nnU-Net's own trainer gets lengths too, so that a baseline can be trained exactly as long.
STOCK = "nnUNetTrainer"

_FAMILY_OF = {name: module for module, names in FAMILIES.items() for name in names}
_LENGTH = re.compile(r"(?P<base>.+?)(?:_(?P<epochs>[1-9]\d*)epochs)?(?:_(?P<iterations>[1-9]\d*)iters)?")
_classes: dict[str, type] = {}


def trainer_names() -> list[str]:
    """Every base name. Each also exists with ``_<N>epochs`` and then ``_<N>iters`` behind it."""
    return list(_FAMILY_OF)


def template_name(name: str) -> str:
    """The plans template whose network the trainer called ``name``, a base name, trains."""
    if name in _ROI_CASCADE:
        return "roi_cascade"
    for variant in ("_ImageNet", *_ABLATIONS):
        name = name.removesuffix(variant)
    return name.removeprefix(STOCK).lower()


def suggest(name: str) -> list[str]:
    """Up to three existing names close to ``name``, with its length where that can be read."""
    base, _, tail = name.partition("_")
    if tail.startswith("ImageNet"):
        base, tail = f"{base}_ImageNet", tail.removeprefix("ImageNet").removeprefix("_")
    length = "".join(
        f"_{number.group(1)}{unit}"
        for unit in ("epochs", "iters")
        if (number := re.search(rf"0*([1-9]\d*)_?{unit.rstrip('s')}", tail))
    )
    by_lower = {known.lower(): known for known in _FAMILY_OF}
    matches = difflib.get_close_matches(base.lower(), by_lower, n=3, cutoff=0.8)
    return [by_lower[match] + length for match in matches]


def resolve(name: str) -> type:
    """Return the trainer class called ``name``, the same object each time.

    Raises:
        AttributeError: no such trainer. nnU-Net's finder takes this, and nothing else, as "look elsewhere".
    """
    if name not in _classes:
        match = _LENGTH.fullmatch(name)
        base = match["base"] if match else name
        if base not in _FAMILY_OF and (base != STOCK or name == base):
            raise AttributeError(f"nnunet_dyn has no trainer {name!r}")
        if name == base:
            parent, members = importlib.import_module(_FAMILY_OF[base]).make_trainer(base)
        else:
            parent = importlib.import_module("nnunet_dyn.trainers.base").DynTrainer if base == STOCK else resolve(base)
            members = {
                f"planned_{unit}": int(match[unit]) for unit in ("epochs", "iterations") if match[unit] is not None
            }
        _classes[name] = _named(name, parent, members)
    return _classes[name]


def _named(name: str, base: type, members: dict) -> type:
    members = {"__doc__": base.__doc__, **members, "__module__": "nnunet_dyn.trainers"}
    return type(name, (base,), members)
