"""The peers' own rules: temperature, routing, gates, decomposition, offsets."""

import pytest
import torch
from torch import nn

from nnunet_dyn.architectures.dynamic_convs import set_annealing
from nnunet_dyn.architectures.dynamic_convs.base import Temperature
from nnunet_dyn.architectures.dynamic_convs.condconv import CondConv
from nnunet_dyn.architectures.dynamic_convs.dcd import DCDConv
from nnunet_dyn.architectures.dynamic_convs.ddconv import DDConv
from nnunet_dyn.architectures.dynamic_convs.dyconv import DYConv
from nnunet_dyn.architectures.dynamic_convs.odconv import ODConv


def test_temperature_falls_by_a_line_and_only_in_training():
    temperature = Temperature(passes=4)
    assert [temperature().item() for _ in range(6)] == pytest.approx([30, 22.75, 15.5, 8.25, 1, 1])
    assert temperature.eval()().item() == 1 and temperature.passes_done == 6
    resumed = Temperature(passes=9)
    resumed.load_state_dict(temperature.state_dict())
    assert resumed.passes_to_one == 4 and resumed().item() == 1


def test_annealing_is_set_for_a_whole_network():
    network = nn.Sequential(DYConv(nn.Conv2d, 4, 4, 3), ODConv(nn.Conv2d, 4, 4, 3))
    set_annealing(network, 0)
    assert [module.passes_to_one.item() for module in network.modules() if isinstance(module, Temperature)] == [1, 1]


def test_a_high_temperature_makes_attention_even():
    conv, x = DYConv(nn.Conv2d, 8, 8, 3), 10 * torch.randn(1, 8, 9, 9)
    hot = conv.coefficients(x)
    set_annealing(conv, 1)
    conv.coefficients(x)
    cold = conv.coefficients(x)
    assert hot.std() < cold.std() and hot.sum().item() == pytest.approx(1)
    expected = torch.softmax(conv.attention(x.mean((2, 3))), 1)
    torch.testing.assert_close(cold, expected)


def test_condconv_routes_by_a_sigmoid():
    conv, x = CondConv(nn.Conv3d, 4, 4, 3), torch.randn(2, 4, 5, 5, 5)
    torch.testing.assert_close(conv.coefficients(x), torch.sigmoid(conv.routing(x.mean((2, 3, 4)))))


def test_odconv_gates_every_axis_of_the_kernel():
    conv, x = ODConv(nn.Conv2d, 4, 6, 3, padding=1).eval(), torch.randn(1, 4, 7, 7)
    squeezed, t = conv.squeeze(x.mean((2, 3))), conv.temperature()
    mixture = torch.softmax(conv.mixture(squeezed) / t, 1)[0]
    inputs, outputs, positions = (
        torch.sigmoid(gate(squeezed) / t)[0] for gate in (conv.input_channels, conv.output_channels, conv.positions)
    )
    weight = torch.einsum("noihw,n,o,i,hw->oihw", conv.kernels, mixture, outputs, inputs, positions.view(3, 3))
    bias = outputs * (mixture @ conv.biases)
    torch.testing.assert_close(conv(x), nn.functional.conv2d(x, weight, bias, padding=1), rtol=1e-4, atol=1e-5)
    assert ODConv(nn.Conv2d, 4, 6, 1).positions is None
    assert ODConv(nn.Conv2d, 4, 4, 3, groups=4).output_channels is None


def test_dcd_is_a_scaled_kernel_plus_a_low_rank_residual_at_its_centre():
    conv, x = DCDConv(nn.Conv2d, 6, 5, 3, padding=1), torch.randn(1, 6, 7, 7)
    scale, fusion = (part[0] for part in conv.attend(x))
    scaled = scale.view(-1, 1, 1) * nn.functional.conv2d(x, conv.kernel, conv.bias, padding=1)[0]
    residual = torch.einsum("ol,lm,im,ihw->ohw", conv.p, fusion, conv.q, x[0])
    torch.testing.assert_close(conv(x)[0], scaled + residual, rtol=1e-4, atol=1e-5)


def test_ddconv_samples_where_its_offsets_say():
    conv, x = DDConv(nn.Conv2d, 4, 6, 3, padding=1).eval(), torch.randn(1, 4, 8, 8)
    nn.init.zeros_(conv.offsets.kernels)
    with torch.no_grad():
        conv.offsets.routing.weight.zero_()
        conv.offsets.routing.bias.fill_(100.0)  # every coefficient is 1
        conv.offsets.biases.zero_()
        conv.offsets.biases[0].copy_(torch.tensor([0.0, 1.0]).repeat(9))  # (y, x) of each position: one to the right
    weight, bias = conv.assemble(conv.coefficients(x))
    shifted = nn.functional.pad(x, (0, 1))[..., 1:]
    expected = nn.functional.conv2d(shifted, weight[0], bias[0], padding=1)
    torch.testing.assert_close(conv(x)[..., 1:-1], expected[..., 1:-1], rtol=1e-4, atol=1e-5)


def test_ddconv_has_no_third_dimension():
    with pytest.raises(ValueError, match=r"DDConv got a 3D convolution; expected a 2D one .* Train a 2d configuration"):
        DDConv(nn.Conv3d, 4, 4, 3)
