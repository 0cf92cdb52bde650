"""Plans and networks for the tests: what nnU-Net plans, without running its planner."""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_dyn.architectures.efficient_unet import EfficientUNet, GenericUNet
from nnunet_dyn.architectures.efficientnet import VARIANTS, EfficientNetEncoder

NETWORKS = [
    *(f"{decoder}EfficientUNet-{variant}" for decoder in ("", "Fully") for variant in VARIANTS),
    "FullyEffGenericUNet",
]


def arch_kwargs(dimension=3, n_stages=6, strides=None, kernel_sizes=None, features=(32, 64, 128, 256, 320, 320)):
    """What nnU-Net's default planner writes for ``n_stages`` stages, imports resolved."""
    return {
        "n_stages": n_stages,
        "features_per_stage": list(features[:n_stages]),
        "conv_op": (nn.Conv2d, nn.Conv3d)[dimension - 2],
        "kernel_sizes": kernel_sizes or [[3] * dimension] * n_stages,
        "strides": strides or [[1] * dimension] + [[2] * dimension] * (n_stages - 1),
        "n_conv_per_stage_decoder": [2] * (n_stages - 1),
        "conv_bias": True,
        "norm_op": (nn.InstanceNorm2d, nn.InstanceNorm3d)[dimension - 2],
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    }


def build(name: str, input_channels=1, num_classes=4, deep_supervision=True, options=None, **plan) -> nn.Module:
    """Build a network of ``NETWORKS`` (or ``GenericUNet``) for the plan that ``arch_kwargs(**plan)`` gives."""
    kwargs = {"decoder": "fully_efficient" if name.startswith("Fully") else "plain"}
    if name.endswith("GenericUNet"):
        network_class = GenericUNet
        kwargs["n_conv_per_stage"] = 2
    else:
        network_class = EfficientUNet
        kwargs["encoder"] = name.split("-")[1]
    kwargs |= arch_kwargs(**plan) | (options or {})
    network = network_class(input_channels, num_classes, deep_supervision=deep_supervision, **kwargs)
    torch.manual_seed(0)
    network.apply(network.initialize)
    return network


def plans_manager(dimension=3, patch_size=None, batch_size=2, **plan) -> PlansManager:
    """A ``PlansManager`` with one configuration, ``2d`` or ``3d_fullres``, as nnU-Net's planner writes it."""
    kwargs = arch_kwargs(dimension, **plan)
    required_imports = ["conv_op", "norm_op", "dropout_op", "nonlin"]
    for key in required_imports:
        if kwargs[key] is not None:
            kwargs[key] = f"{kwargs[key].__module__}.{kwargs[key].__qualname__}"
    kwargs["n_conv_per_stage"] = [2] * kwargs["n_stages"]
    configuration = {
        "data_identifier": "nnUNetPlans",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": batch_size,
        "patch_size": list(patch_size or [2 ** (kwargs["n_stages"])] * dimension),
        "spacing": [1.0] * dimension,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": True,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": kwargs,
            "_kw_requires_import": required_imports,
        },
    }
    name = "2d" if dimension == 2 else "3d_fullres"
    return PlansManager(
        copy.deepcopy(
            {
                "dataset_name": "Dataset999_Test",
                "plans_name": "nnUNetPlans",
                "configurations": {name: configuration},
                "label_manager": "LabelManager",
                "image_reader_writer": "SimpleITKIO",
                "transpose_forward": list(range(3)),
                "transpose_backward": list(range(3)),
                "foreground_intensity_properties_per_channel": {},
            }
        )
    )


def encoder(variant="b0", input_channels=1, options=None, **plan) -> EfficientNetEncoder:
    """An encoder for the plan that ``arch_kwargs(**plan)`` gives, in evaluation mode."""
    kwargs = arch_kwargs(**plan)
    keys = ("n_stages", "conv_op", "kernel_sizes", "strides", "norm_op", "norm_op_kwargs")
    arguments = {key: kwargs[key] for key in keys} | (options or {})
    return EfficientNetEncoder(input_channels, variant, **arguments).eval()


def narrow_resnet(name, weights, norm_layer) -> nn.Module:
    """What of a ResNet is used, in a hundredth of the time."""
    assert name == "resnet18" and weights is None
    blocks = {"stem": nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 1))}
    for level, width in enumerate((16, 32, 64, 128), 1):
        convolution = nn.Conv2d(max(16, width // 2), width, 3, 2 if level < 4 else 1, 1)
        blocks[f"layer{level}"] = nn.Sequential(convolution, norm_layer(width), nn.ReLU())
    made = nn.Sequential(OrderedDict(blocks))
    made.inplanes = 128
    return made
