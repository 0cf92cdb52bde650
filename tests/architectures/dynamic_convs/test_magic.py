"""MAGIC against its equations, computed another way."""

import pytest
import torch
from torch import nn

from nnunet_dyn.architectures.dynamic_convs import magic
from nnunet_dyn.architectures.dynamic_convs.magic import MAGICConv, summarise


def conv(n_kernels=3, channels=8, **options) -> MAGICConv:
    torch.manual_seed(0)
    return MAGICConv(nn.Conv2d, channels, 6, 3, padding=1, n_kernels=n_kernels, **options)


def test_equations_3_to_11():
    module, x = conv(channels=5), torch.randn(2, 5, 6, 7)
    beta_c = x.mean((2, 3))  # Eq. 3
    maps = torch.stack([x.mean(1), x.amax(1)], 1).repeat(1, 3, 1, 1)[:, :5]  # Eq. 4, an odd number of channels
    beta_s = maps.mean((2, 3))
    context = module.non_local
    value, first, norm, _, second = context.transform
    logits = torch.einsum("c,bchw->bhw", context.key, x)
    attention = logits.flatten(1).softmax(1).view_as(logits)
    values = torch.einsum("dc,bchw->bdhw", value.weight, x)  # L_v at every position, as Eq. 7 has it
    beta_g = second(norm(first((attention.unsqueeze(1) * values).sum((2, 3)))).relu())
    fc1, _, fc2 = module.fusion
    beta = fc2(fc1(beta_s + beta_c + beta_g).relu())  # Eq. 8
    alpha = module.mixture(beta).softmax(1)  # Eq. 9
    l1, norm, _, l2, _ = module.recalculation
    phi = l2(norm(l1(beta)).relu()).sigmoid()  # Eq. 11
    torch.testing.assert_close(module.coefficients(x), phi * alpha, rtol=1e-4, atol=1e-6)
    for sample in range(2):  # Eq. 10
        weight = sum((phi * alpha)[sample, i] * module.kernels[i] for i in range(3))
        bias = sum((phi * alpha)[sample, i] * module.biases[i] for i in range(3))
        expected = nn.functional.conv2d(x[sample : sample + 1], weight, bias, padding=1)
        torch.testing.assert_close(module(x)[sample : sample + 1], expected, rtol=1e-4, atol=1e-5)


def test_equal_kernels_without_recalculation_are_a_static_convolution():
    module, x = conv(recalculation=False), torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        module.kernels.copy_(module.kernels[:1].expand_as(module.kernels).clone())
        module.biases.copy_(module.biases[:1].expand_as(module.biases).clone())
    expected = nn.functional.conv2d(x, module.kernels[0], module.biases[0], padding=1)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_kernels", [1, 2])
@pytest.mark.parametrize(
    "switches",
    [
        {name: bool(bits & 1 << index) for index, name in enumerate(("spatial", "channel", "non_local"))}
        for bits in range(8)
    ],
    ids=lambda switches: "+".join(name for name, on in switches.items() if on) or "none",
)
def test_every_ablation_trains_all_it_has(switches, n_kernels):
    module = conv(n_kernels, **switches)
    module(torch.randn(2, 8, 9, 9)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())
    first, second = module.eval().coefficients(torch.randn(2, 8, 9, 9))
    assert torch.equal(first, second) == (not any(switches.values()))  # without a summary, one mixture for all


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_kernel_without_gradients_serves_the_whole_batch(layout):
    module, x = conv(1).eval(), torch.randn(3, 8, 9, 9).to(memory_format=layout)
    with torch.no_grad():
        fast = module(x)
    torch.testing.assert_close(fast, module(x).detach(), rtol=1e-4, atol=1e-5)
    assert not torch.equal(*module.coefficients(x)[:2])


def test_what_cannot_be_asked_for():
    with pytest.raises(ValueError, match="one kernel without recalculation"):
        conv(1, recalculation=False)
    with pytest.raises(ValueError, match="expected 'layer' or 'batch'"):
        conv(recalculation_norm="instance")
    with pytest.raises(ValueError, match="n_kernels got 0; expected 1 or more"):
        conv(0)
    with pytest.raises(ValueError, match="expected true or false"):
        conv(recalculation="false")
    batch = conv(recalculation_norm="batch")
    assert batch(torch.randn(2, 8, 9, 9)).shape == (2, 6, 9, 9)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch(torch.randn(1, 8, 9, 9))
    assert batch.half()(torch.randn(2, 8, 9, 9).half()).dtype == torch.float16


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("chunk", [1, 40, 10**6])
@pytest.mark.parametrize(("with_key", "with_maximum"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_summary_in_chunks_equals_one_in_plain_operators(monkeypatch, layout, chunk, with_key, with_maximum):
    monkeypatch.setattr(magic, "_CHUNK_ON_CPU", chunk)
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, 7).to(memory_format=layout).requires_grad_()
    key = (5 * torch.randn(6)).requires_grad_() if with_key else None
    inputs = [x, key] if with_key else [x]
    results = []
    for function in (summarise, lambda x, *args: magic._summarise_plainly(x.flatten(2), *args)):
        outputs = [output for output in function(x, key, with_maximum) if output is not None]
        weights = [torch.linspace(-1, 1, output.numel()).view_as(output) for output in outputs]
        loss = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        results.append((*outputs, *torch.autograd.grad(loss, inputs)))
    assert len(results[0]) == 1 + with_key + with_maximum + len(inputs)
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_a_backward_pass_under_autocast_is_computed_in_full_precision():
    x, gradients = 1e3 + torch.randn(2, 6, 5, 7), []
    for enabled in (False, True):
        key = torch.linspace(-1, 1, 6).requires_grad_()
        context = summarise(x, key, True)[2]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            context.square().sum().backward()
        gradients.append(key.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_attention_over_a_large_map_keeps_its_mass_in_half_precision():
    x = torch.randn(1, 4, 300, 300).half()
    mean, _, context = summarise(x, torch.zeros(4), True)  # equal weights: the context is the mean
    torch.testing.assert_close(context, mean, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(mean, x.float().mean((2, 3)), rtol=1e-3, atol=1e-5)
