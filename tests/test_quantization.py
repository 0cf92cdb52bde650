"""Quantisation: hand-computed values, gradients, and which layers the context reaches."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nnunet_dyn.architectures.fast_convs import FastConv2d
from nnunet_dyn.quantization import quantize, quantized


def test_eq_6_by_hand():
    x = torch.tensor([-1.27, 0.004, 0.006, 0.305, 0.6349])  # at 8 bits the grid is 1.27 / 127 = 0.01
    assert torch.allclose(quantize(x, 8), torch.tensor([-1.27, 0.0, 0.01, 0.30, 0.63]), atol=1e-6)
    x = torch.tensor([3.2767, -1.00004, 0.00006])  # at 16 bits the grid is 3.2767 / 32767 = 0.0001
    assert torch.allclose(quantize(x, 16), torch.tensor([3.2767, -1.0, 0.0001]), atol=1e-6)
    x = torch.tensor([1.0, 0.49, -0.51])  # at 2 bits: -1, 0 and 1
    assert quantize(x, 2).tolist() == [1, 0, -1]


def test_levels_fit_the_integer_type():
    x = torch.cat([torch.linspace(-2, 2, 5001), torch.tensor([-2.0])])
    integers = quantize(x, 8) * 127 / 2
    assert torch.allclose(integers, integers.round(), atol=1e-4)
    assert integers.min() >= -127.001 and len(integers.round().unique()) == 255


def test_zeros_full_precision_and_half_precision():
    assert torch.equal(quantize(torch.zeros(2, 3), 8, per_sample=True), torch.zeros(2, 3))
    x = torch.randn(4, 5)
    assert quantize(x, 32) is x
    half = quantize(x.half(), 16)
    assert half.dtype == torch.float16 and torch.allclose(half.float(), x, atol=2e-3)


def test_a_sample_does_not_see_its_neighbours():
    x = torch.randn(3, 2, 4, 4) * torch.tensor([1.0, 10, 100]).view(3, 1, 1, 1)
    together = quantize(x, 8, per_sample=True)
    assert torch.equal(together, torch.cat([quantize(sample, 8, per_sample=True) for sample in x.split(1)]))
    assert not torch.allclose(together[0], quantize(x, 8)[0])


def test_rounding_passes_gradients_straight_through():
    x = torch.randn(3, 4, requires_grad=True)
    weights = torch.randn(3, 4)
    (quantize(x, 8) * weights).sum().backward()
    assert torch.equal(x.grad, weights)


@pytest.mark.parametrize(("bits", "floor"), [(8, 30), (16, 75)])
def test_signal_to_noise(bits, floor):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 16, 16)
    noise = quantize(x, bits, per_sample=True) - x
    assert 10 * torch.log10(x.var() / noise.var()) > floor


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 8, 3, groups=4),
        nn.ConvTranspose2d(4, 6, 2, 2),
        nn.Linear(8, 5),
        FastConv2d(4, 6, 3, padding=1),
        FastConv2d(4, 6, 1),
        FastConv2d(4, 4, 3, padding=1, groups=4, bias=False),
    ],
    ids=repr,
)
def test_weights_and_inputs_of_every_kind_of_layer(layer):
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    with quantized(4):
        y = layer(x)
    expected = torch.func.functional_call(
        layer, {"weight": quantize(layer.weight, 4)}, (quantize(x, 4, per_sample=True),)
    )
    assert torch.allclose(y, expected, atol=1e-6) and not torch.allclose(y, layer(x), atol=1e-3)
    y.square().sum().backward()
    assert x.grad.abs().sum() > 0 and layer.weight.grad.abs().sum() > 0
    with quantized(32):
        assert torch.equal(layer(x), layer(x))


def test_other_operators_keep_their_precision():
    x = torch.randn(2, 4, 8, 8)
    norm = nn.InstanceNorm2d(4)
    with quantized(2):
        assert torch.equal(F.relu(norm(x)), F.relu(nn.InstanceNorm2d(4)(x)))
