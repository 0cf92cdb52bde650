"""Which convolutions are replaced, in which networks, and what that costs."""

import copy

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from plans import arch_kwargs, build
from torch import nn
from torchvision.models import resnet18

from nnunet_dyn.accounting import count_operations, count_parameters, training_memory
from nnunet_dyn.architectures.dynamic_convs import METHODS, DynamicConv, dynamic_network, make_dynamic, upcycle

# Differences to the static ResNet-18 in the paper's Table 5, millions of parameters, and how close ours must be.
TABLE_5 = {
    ("magic", 1): (17.03 - 12.34, 0.01),
    ("magic", 2): (28.02 - 12.34, 0.01),
    ("magic", 4): (49.99 - 12.34, 0.01),
    ("dyconv", 4): (45.60 - 12.34, 0.03),
    ("condconv", 8): (89.29 - 12.34, 0.03),
    ("odconv", 4): (45.55 - 12.34, 0.03),
    ("ddconv", 8): (93.69 - 12.34, 0.03),
}


def plain(dimension=3, deep_supervision=False, **plan):
    kwargs = arch_kwargs(dimension, **({"n_stages": 3, "features": (8, 12, 16)} | plan))
    network = PlainConvUNet(2, num_classes=3, n_conv_per_stage=2, deep_supervision=deep_supervision, **kwargs)
    network.apply(network.initialize)
    return network


def residual(dimension=3):
    kwargs = arch_kwargs(dimension, n_stages=3, features=(8, 12, 16)) | {"n_conv_per_stage_decoder": [1, 1]}
    return ResidualEncoderUNet(2, num_classes=3, n_blocks_per_stage=[1, 2, 2], **kwargs)


class Hybrid(nn.Module):
    """A CNN, a transformer over its last map, and a decoder, as TransUNet has them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 7, 2, 3)
        self.encoder = nn.Sequential(
            nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU()
        )
        self.patches = nn.Conv2d(16, 16, 1)
        self.transformer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.decoder = nn.Sequential(nn.ConvTranspose2d(16, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 3, 3, 1, 1))

    def forward(self, x):
        x = self.patches(self.encoder(self.stem(x)))
        tokens = self.transformer(x.flatten(2).transpose(1, 2))
        return self.decoder(tokens.transpose(1, 2).view_as(x))


def replaced(network) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, DynamicConv)]


@pytest.mark.parametrize("method", [method for method in METHODS if method != "ddconv"])
@pytest.mark.parametrize("make", [plain, residual], ids=["plain", "residual"])
def test_nnunets_networks_become_dynamic_throughout_their_encoder(make, method):
    network = make_dynamic(make(), method)
    encoder = network.encoder
    static = [module for module in encoder.modules() if isinstance(module, nn.Conv3d) and max(module.kernel_size) > 1]
    assert len(static) == 1 and static[0].in_channels == 2  # the very first
    assert not replaced(network.decoder.stages) and replaced(network)
    x = torch.randn(2, 2, 16, 16, 16)
    network(x).square().mean().backward()
    without = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 1e-8}
    # The lower heads are not used here. Behind a convolution, instance normalisation removes a bias and any factor of
    # a channel, such as ODConv's gate.
    convs = {f"{name}.{bias}" for name, module in network.named_modules() for bias in ("bias", "biases")
             if isinstance(module, (nn.Conv3d, DynamicConv))}  # fmt: skip
    assert all("seg_layers" in name or name in convs or ".output_channels." in name for name in without)
    # nnU-Net's initialisation of the whole network leaves the kernels as they are.
    before = {name: value.clone() for name, value in network.encoder.state_dict().items() if "kernel" in name}
    network.apply(network.initialize)
    assert before and all(torch.equal(network.encoder.state_dict()[name], value) for name, value in before.items())


def test_kernels_start_as_nnunet_initialises_a_convolution():
    network = make_dynamic(plain(features=(32, 32, 32)), "magic", 4)
    conv = next(module for module in network.encoder.modules() if isinstance(module, DynamicConv))
    expected = (2 / (1 + 1e-2**2) / (32 * 27)) ** 0.5  # He et al., as InitWeights_He
    for kernel, bias in zip(conv.kernels, conv.biases, strict=True):
        assert kernel.std().item() == pytest.approx(expected, rel=0.05) and not bias.any()


# In MBConv blocks also the 1×1 convolutions; the first stages of v2s have none, and no other 1×1 is replaced.
PARTS = {"b0": {"expand", "depthwise", "project"}, "v2s": {"expand"}}


@pytest.mark.parametrize("method", [method for method in METHODS if method != "ddconv"])
@pytest.mark.parametrize("variant", PARTS)
def test_efficient_encoders(variant, method):
    network = build(f"EfficientUNet-{variant}", n_stages=3, features=(8, 12, 16), deep_supervision=False)
    make_dynamic(network, method)
    names = replaced(network.encoder)
    assert {name.split(".")[-2] for name in names} == PARTS[variant]
    x = torch.randn(2, 1, 16, 16, 16)
    network(x).square().mean().backward()
    banks = [p for name, p in network.named_parameters() if "kernel" in name]
    assert banks and all(p.grad.abs().sum() > 0 for p in banks)
    assert all(p.grad is not None for name, p in network.named_parameters() if "seg_layers" not in name)
    network.eval()
    with torch.no_grad():
        torch.testing.assert_close(network(x), torch.cat([network(s) for s in x.split(1)]), rtol=1e-3, atol=1e-4)


def test_resnet_18_has_its_sixteen_replaced():
    network = make_dynamic(resnet18(), "magic", 1)
    assert len(replaced(network)) == 16 and isinstance(network.conv1, nn.Conv2d)
    assert isinstance(network.layer2[0].downsample[0], nn.Conv2d)


@pytest.mark.parametrize(("method", "n_kernels"), TABLE_5, ids=str)
def test_parameters_of_the_papers_table_5(method, n_kernels):
    with torch.device("meta"):
        added = count_parameters(make_dynamic(resnet18(), method, n_kernels)) - count_parameters(resnet18())
    expected, tolerance = TABLE_5[method, n_kernels]
    assert added / 1e6 == pytest.approx(expected, rel=tolerance)


def test_each_further_kernel_adds_exactly_the_weights_of_the_replaced_convolutions():
    with torch.device("meta"):
        two, three = (count_parameters(make_dynamic(resnet18(), "magic", n)) for n in (2, 3))
    rows_of_attention = sum(4 * [64] + [64] + 3 * [128] + [128] + 3 * [256] + [256] + 3 * [512])
    hidden = rows_of_attention // 8
    assert three - two == 10_985_472 + rows_of_attention + hidden


def test_operations_that_magic_adds():
    """The paper has 9.671 → 9.685 G (0.14 %) with its segmentation head, without the mixing of kernels.

    torchvision's ResNet-18 has 2.385 G at that size: there it is 0.4 % without mixing and 2.2 % with it.
    """
    with torch.device("meta"):
        static = count_operations(resnet18(), (1, 3, 256, 256)).total
        network = make_dynamic(resnet18(), "magic", 4)
    mixing = sum(module.kernels.numel() for module in network.modules() if isinstance(module, DynamicConv))
    added = count_operations(network, (1, 3, 256, 256)).total - static
    assert static == pytest.approx(2.385e9, rel=0.01) and mixing == 4 * 10_985_472
    assert added == pytest.approx(0.0222 * static, rel=0.02)
    assert added - mixing == pytest.approx(0.0038 * static, rel=0.02)
    assert added - mixing < (9.685 - 9.671) * 1e9  # less than the paper's own


def test_operations_and_memory_that_magic_adds_to_nnunets_network():
    """At 128³, with everything counted."""
    with torch.device("meta"):
        stock = plain(n_stages=6, features=(32, 64, 128, 256, 320, 320))
        shape = (1, 2, 128, 128, 128)
        before, kept = count_operations(stock, shape).total, training_memory(stock, shape)
        make_dynamic(stock, "magic", 4)
        after, kept_after = count_operations(stock, shape).total, training_memory(stock, shape)
    assert 0 < after / before - 1 < 0.01
    assert kept_after / kept < 1.01


def test_a_hybrid_keeps_its_transformer_and_decoder():
    network = make_dynamic(Hybrid(), "magic", 2)
    assert replaced(network) == ["encoder.0", "encoder.3"]
    assert network(torch.randn(2, 2, 32, 32)).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("method", METHODS)
def test_upcycling_leaves_the_output_as_it_is(method):
    static = plain(dimension=2)
    network = upcycle(copy.deepcopy(static), method)
    x = torch.randn(2, 2, 16, 16)
    torch.testing.assert_close(network(x), static(x), rtol=1e-3, atol=1e-4)
    assert replaced(network)


def test_instance_normalisation_removes_what_only_scales_a_map():
    """With one kernel MAGIC only scales; a network with batch normalisation sees that, nnU-Net's does not."""
    network = make_dynamic(plain(dimension=2), "magic", 1)
    x = torch.randn(2, 2, 16, 16)
    before = network(x)
    before.square().mean().backward()
    gradients = {name: p.grad.norm().item() for name, p in network.encoder.named_parameters()}
    attention = max(norm for name, norm in gradients.items() if "recalculation" in name or "fusion" in name)
    assert attention < 1e-2 * max(norm for name, norm in gradients.items() if "kernels" in name)
    for module in network.modules():
        if isinstance(module, DynamicConv):
            nn.init.zeros_(module.recalculation[-2].weight)  # φ = 1/2 everywhere
    torch.testing.assert_close(network(x), before, rtol=1e-2, atol=1e-3)
    with_batch_norm = make_dynamic(resnet18(), "magic", 1).eval()
    x = torch.randn(2, 3, 64, 64)
    before = with_batch_norm(x)
    for module in with_batch_norm.modules():
        if isinstance(module, DynamicConv):
            nn.init.zeros_(module.recalculation[-2].weight)
    assert not torch.allclose(with_batch_norm(x), before, rtol=1e-2)


def test_deep_supervision_and_anisotropy():
    plan = {"strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]], "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]]}
    network = make_dynamic(plain(deep_supervision=True, **plan), "magic", 2)
    outputs = network(torch.randn(1, 2, 8, 16, 16))
    assert [tuple(output.shape[2:]) for output in outputs] == [(8, 16, 16), (8, 8, 8)]


def test_a_dynamic_network_by_the_arguments_of_plans():
    kwargs = arch_kwargs(2, n_stages=3, features=(8, 12, 16)) | {"n_conv_per_stage": [2, 2, 2]}
    dynamic = {"method": "magic", "n_kernels": 2, "recalculation": False}
    network = dynamic_network(1, 3, PlainConvUNet, dynamic, deep_supervision=True, **kwargs)
    assert type(network) is PlainConvUNet and len(network(torch.randn(1, 1, 16, 16))) == 2
    conv = next(module for module in network.modules() if isinstance(module, DynamicConv))
    assert conv.n_kernels == 2 and conv.recalculation is None


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("magik",), {}, "method got 'magik'; expected one of magic, dyconv"),
        (("dcd", 4), {}, "dcd has one kernel"),
        (("magic",), {"spacial": True}, "spacial"),
        (("magic", 0), {}, "n_kernels got 0"),
        (("magic", "4"), {}, "n_kernels got '4'; expected a whole number"),
        (("ddconv",), {}, "expected a 2D one"),
    ],
)
def test_what_cannot_be_done_leaves_the_network_alone(arguments, options, message):
    network = plain()
    with pytest.raises(ValueError, match=message):
        make_dynamic(network, *arguments, **options)
    assert not replaced(network)


def test_nothing_to_replace_is_an_error():
    with pytest.raises(ValueError, match="Sequential has nothing to replace"):
        make_dynamic(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1)), "magic")
    with pytest.raises(ValueError, match="nothing to replace"):
        make_dynamic(make_dynamic(plain(), "magic"), "magic")


class Standardised(nn.Conv2d):
    """A convolution that computes more than one, as in TransUNet's encoder."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


@pytest.mark.parametrize(
    "conv", [Standardised(4, 4, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))], ids=["own", "norm"]
)
def test_a_convolution_that_computes_more_is_refused_by_name(conv):
    with pytest.raises(ValueError, match=r"^1 is a .*, which computes more than a convolution"):
        make_dynamic(nn.Sequential(nn.Conv2d(1, 4, 3), conv), "magic")


@pytest.mark.parametrize("dynamic", ["magic", {"n_kernels": 4}, {"method": "magic", "upcycle": True}])
def test_plans_that_say_no_method(dynamic):
    with pytest.raises(ValueError, match="expected the arguments of make_dynamic"):
        dynamic_network(1, 3, PlainConvUNet, dynamic)
