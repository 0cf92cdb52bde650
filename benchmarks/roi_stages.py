"""Parameters and operations of the ROI cascade's networks, per size of the ROI.

``paper`` mode beside Table 5 of Kim et al. 2025, "Multi-Stage Hierarchical Feature Extraction for Efficient 3D Medical
Image Segmentation", which counts what the active stages have and do; and ``own`` mode beside nnU-Net's U-Net on the
same crop. One channel and two classes, as in the paper's experiments; nothing is timed. Example:

    python benchmarks/roi_stages.py --output roi_stages.json
"""

import argparse
import json
from pathlib import Path

import machine
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunet_dyn.accounting import count_operations, count_parameters
from nnunet_dyn.architectures.roi_segmentor import StageSkippingUNet

#: Table 5: million operations and million parameters by the side of the cube in voxels.
TABLE_5 = {16: (40.1449, 9.3809), 32: (153.9072, 10.3211), 64: (276.0581, 10.4607)}

PLAN = {
    "n_stages": 6,
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "conv_op": nn.Conv3d,
    "kernel_sizes": [[3, 3, 3]] * 6,
    "strides": [[1, 1, 1]] + [[2, 2, 2]] * 5,
    "norm_op": nn.InstanceNorm3d,
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "nonlin": nn.LeakyReLU,
    "nonlin_kwargs": {"inplace": True},
}
STOCK = {"n_conv_per_stage": 2, "n_conv_per_stage_decoder": 2, "conv_bias": True}


def active_parameters(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Elements of the parameters of all modules that run on an input of ``shape``."""
    ran = set()
    handles = [module.register_forward_pre_hook(lambda module, _: ran.add(module)) for module in network.modules()]
    with torch.no_grad():
        network(torch.zeros(shape))
    for handle in handles:
        handle.remove()
    return sum(parameter.numel() for module in ran for parameter in module.parameters(recurse=False))


def rows(mode: str, sides: list[int]) -> list[dict]:
    network = StageSkippingUNet(1, 2, mode=mode, **PLAN).eval()
    made = []
    for side in sides:
        shape = (1, 1, side, side, side)
        counted = {
            "side": side,
            "stages": list(network.active_stages(shape[2:])),
            "parameters": active_parameters(network, shape),
            "operations": count_operations(network, shape).total,
        }
        made.append(counted)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    print("paper mode      million parameters (Table 5)      million operations (Table 5)")
    paper = rows("paper", list(TABLE_5))
    for row in paper:
        operations, parameters = TABLE_5[row["side"]]
        row["table_5"] = {"parameters": parameters * 1e6, "operations": operations * 1e6}
        print(
            f"{row['side']:>10}³{row['parameters'] / 1e6:>23.2f} ({parameters:.2f}){row['operations'] / 1e6:>26.1f} "
            f"({operations:.1f})"
        )
    print("own mode        million operations      of nnU-Net's U-Net on the same crop")
    own = rows("own", [8, 16, 32, 64, 128])
    stock = PlainConvUNet(1, num_classes=2, **PLAN, **STOCK).eval()
    least = 2 * 2 ** (PLAN["n_stages"] - 1)  # its crops are multiples of its strides, and its deepest map not one voxel
    for row in own:
        row["stock_operations"] = count_operations(stock, (1, 1, *(max(least, row["side"]),) * 3)).total
        print(f"{row['side']:>10}³{row['operations'] / 1e6:>20.1f}{row['stock_operations'] / 1e6:>24.1f}")
    args.output.write_text(
        json.dumps(
            {
                "machine": machine.describe(),
                "unit": "multiply-accumulates as in nnunet_dyn.accounting, one channel, two classes, batch 1",
                "paper": paper,
                "own": own,
                "stock_parameters": count_parameters(stock),
                "stock_least_side": least,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
