import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from plans import arch_kwargs
from torch import nn

from nnunet_dyn.accounting import count_operations, count_parameters


def operations(module, *shape):
    return count_operations(module, shape)


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (1, 3, 10, 10), 100 * 8 * 3 * 9),
        (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 10, 10), 2 * 100 * 8 * 3 * 9),
        (nn.Conv3d(8, 8, 3, stride=2, padding=1, groups=8), (1, 8, 8, 8, 8), 64 * 8 * 27),
        (nn.ConvTranspose2d(6, 4, 2, 2), (1, 6, 5, 5), 25 * 6 * 4 * 4),
        (nn.Linear(7, 5), (3, 7), 3 * 7 * 5),
        (nn.Linear(7, 5, bias=False), (2, 3, 7), 2 * 3 * 7 * 5),
        (nn.InstanceNorm2d(4, affine=True), (1, 4, 6, 6), 144 * 5),
        (nn.InstanceNorm2d(4), (1, 4, 6, 6), 144 * 4),
        (nn.GroupNorm(2, 4), (1, 4, 6, 6), 144 * 5),
        (nn.LayerNorm(6), (1, 4, 6), 24 * 5),
        (nn.BatchNorm2d(4).train(), (1, 4, 6, 6), 144 * 5),
        (nn.BatchNorm2d(4).eval(), (1, 4, 6, 6), 144 * 2),
        (nn.BatchNorm2d(4, affine=False).eval(), (1, 4, 6, 6), 144),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_each_operator(module, shape, expected):
    assert operations(module, *shape).total == expected


def test_what_is_left_out_is_listed():
    counted = operations(nn.Sequential(nn.Conv2d(1, 2, 1), nn.GELU()), 1, 1, 4, 4)
    assert counted.not_counted == {"aten::gelu": 1}


def test_submodules_add_up_and_a_shared_module_counts_each_time():
    conv = nn.Conv2d(2, 2, 1)
    counted = operations(nn.Sequential(conv, nn.Sequential(conv, nn.Conv2d(2, 3, 1))), 1, 2, 4, 4)
    assert counted.by_module["1"] == 16 * (4 + 6)
    assert counted.total == counted.by_module[""] == 16 * (4 + 4 + 6)


def test_the_network_comes_back_as_it_was():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    parameters = list(network.parameters())
    operations(network, 1, 1, 8, 8)
    assert all(a is b for a, b in zip(parameters, network.parameters(), strict=True))
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_hooks_are_gone_after_an_error():
    network = nn.Sequential(nn.Conv2d(1, 2, 3))
    with pytest.raises(RuntimeError):
        operations(network, 1, 5, 8, 8)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_count_parameters_leaves_buffers_out():
    assert count_parameters(nn.BatchNorm2d(4)) == 8


def test_a_network_that_holds_modules_under_several_names():
    """nnU-Net's own network does: its decoder keeps a reference to the encoder."""
    stock = PlainConvUNet(1, num_classes=2, n_conv_per_stage=2, **arch_kwargs(2, n_stages=3))
    counted = operations(stock, 1, 1, 16, 16)
    assert counted.total > counted.by_module["encoder"] > 0
