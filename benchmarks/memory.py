"""Planned against measured activation memory, every network, 2D and 3D.

Planned: ``compute_conv_feature_map_size`` in the unit of nnU-Net's ``PlainConvUNet``, that is, times the bytes which
that network was measured to keep per unit. Measured: the bytes of all tensors that autograd saves in one forward pass
in training mode on a CPU, each storage once, parameters left out. Example:

    python benchmarks/memory.py --output memory.json
"""

import argparse
import json
from pathlib import Path

import machine
import speed
import torch
from torch import nn


def saved_bytes(network: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward pass of ``network(x)``."""
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a tensor that knows its graph would keep it alive for good

    network.train()
    network.decoder.deep_supervision = True
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = network(x)
    del outputs
    return sum(saved.values())


def measure(setting: str, names: list[str] | None) -> list[dict]:
    patch = speed.SETTINGS[setting]["patch"]
    x = torch.randn(1, 1, *patch)
    makers = speed.networks(setting)
    stock = speed.build(makers.pop("PlainConvUNet"))
    per_unit = saved_bytes(stock, x) / int(stock.compute_conv_feature_map_size(patch))
    rows = []
    for name in names or makers:
        network = speed.build(makers[name])
        measured = saved_bytes(network, x)
        planned = int(network.compute_conv_feature_map_size(patch)) * per_unit
        rows.append(
            {
                "setting": setting,
                "network": name,
                "measured_mb": round(measured / 2**20, 1),
                "planned_mb": round(planned / 2**20, 1),
                "planned_over_measured": round(planned / measured, 3),
                "measured_over_stock": round(measured / per_unit / int(stock.compute_conv_feature_map_size(patch)), 3),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--settings", nargs="+", choices=speed.SETTINGS, default=list(speed.SETTINGS))
    parser.add_argument("--networks", nargs="+")
    args = parser.parse_args()
    rows = [row for setting in args.settings for row in measure(setting, args.networks)]
    patch = {setting: speed.SETTINGS[setting]["patch"] for setting in args.settings}
    args.output.write_text(
        json.dumps({"machine": machine.describe(), "patch": patch, "batch": 1, "rows": rows}, indent=1)
    )


if __name__ == "__main__":
    main()
