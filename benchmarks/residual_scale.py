"""Why deep EfficientNet encoders blow up at nnU-Net's learning rate, in a minute a network on a CPU.

The depth of the paper's six-stage networks in 2D (patch 64², bottleneck 2²), nnU-Net's loss, optimiser and learning
rate, **no gradient clipping**, noisy blobs. Compared: how the encoder is normalised, and what a residual branch
contributes at the start. Per run: the largest gradient norm and the largest value any convolution writes (half
precision ends at 65504). Example:

    python benchmarks/residual_scale.py --output residual_scale.json
"""

import argparse
import json
from pathlib import Path

import machine
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn
from torch.nn import functional as F

from nnunet_dyn.architectures.blocks import FusedMBConv, MBConv
from nnunet_dyn.architectures.efficient_unet import RESIDUAL_SCALE, EfficientUNet

WEIGHTS = [8 / 15, 4 / 15, 2 / 15, 1 / 15, 0]


def make_data(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    noise = F.avg_pool2d(torch.randn(count, 1, 64, 64), 9, 1, 4)
    image = noise / noise.std()
    return image + 0.5 * torch.randn_like(image), (image > 1).long() + (image > 1.8).long()


def run(variant: str, norm: str, scale: float, iterations: int, learning_rate: float) -> dict:
    torch.manual_seed(0)
    images, labels = make_data()
    network = EfficientUNet(
        1, 3, encoder=variant, n_stages=6, features_per_stage=[32, 64, 128, 256, 320, 320], conv_op=nn.Conv2d,
        kernel_sizes=3, strides=[1, 2, 2, 2, 2, 2], norm_op=nn.InstanceNorm2d,
        norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin_kwargs={"inplace": True}, deep_supervision=True,
        mbconv_norm=norm,
    )  # fmt: skip
    network.apply(network.initialize)
    largest = [0.0]
    for module in network.modules():
        if isinstance(module, (MBConv, FusedMBConv)) and module.has_shortcut:
            nn.init.constant_(module.project.norm.weight, scale)
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_hook(
                lambda module, args, out: largest.append(max(largest.pop(), out.detach().abs().max().item()))
            )
    loss_function = DeepSupervisionWrapper(
        DC_and_CE_loss({"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}, {},
                       dice_class=MemoryEfficientSoftDiceLoss), WEIGHTS)  # fmt: skip
    optimizer = torch.optim.SGD(network.parameters(), learning_rate, weight_decay=3e-5, momentum=0.99, nesterov=True)
    losses, norms, values = [], [], []
    for _ in range(iterations):
        batch = torch.randint(0, len(images), (2,))
        target = labels[batch]
        optimizer.zero_grad()
        outputs = network(images[batch])
        loss = loss_function(outputs, [target[:, :, :: 2**i, :: 2**i] for i in range(len(outputs))])
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(network.parameters(), float("inf")).item())
        optimizer.step()
        losses.append(loss.item())
        values.append(largest[0])
        largest[0] = 0.0
    return {
        "variant": variant,
        "norm": {"plan": "instance", "batch": "batch"}[norm],
        "residual_scale": scale,
        "learning_rate": learning_rate,
        "iterations": iterations,
        "loss_last_tenth": round(sum(losses[-(iterations // 10) :]) / (iterations // 10), 3),
        "largest_gradient_norm": round(max(norms), 1),
        "largest_value_first_iteration": round(values[0], 1),
        "largest_value": round(max(values), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", default=["b0", "b1", "b3", "b7"])
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    args = parser.parse_args()
    rows = []
    for variant in args.variants:
        for norm, scale in (("batch", 1.0), ("plan", 1.0), ("plan", RESIDUAL_SCALE)):
            rows.append(run(variant, norm, scale, args.iterations, args.learning_rate))
            print(rows[-1], flush=True)
            args.output.write_text(json.dumps({"machine": machine.describe(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
