import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from plans import arch_kwargs
from torch import nn

from nnunet_dyn.accounting import count_operations, count_parameters, inference_memory, training_memory


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


class Chain(nn.Module):
    """Two convolutions and what lies between them, whose memory can be counted by hand."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.second(torch.sigmoid(self.first(x)))


def test_activation_memory_by_hand():
    network = Chain()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    wide, output = 3 * 8 * 100 * 4, 3 * 4 * 100 * 4
    # Sigmoid keeps its result, which the second convolution keeps too; the first one's output is given up.
    assert training_memory(network, (3, 2, 10, 10)) == wide + output
    assert inference_memory(network, (3, 2, 10, 10)) == 2 * wide
    assert network.training and all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert all(p.device.type == "cpu" and p.grad is None for p in network.parameters())


def test_activation_memory_grows_with_the_batch_and_counts_shared_storage_once():
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Flatten(2), nn.Unflatten(2, (8, 8, 8)), nn.ReLU(True))
    single, double = (training_memory(network, (batch, 1, 8, 8, 8)) for batch in (1, 2))
    assert single == inference_memory(network, (1, 1, 8, 8, 8)) == 4 * 512 * 4
    assert double == 2 * single
