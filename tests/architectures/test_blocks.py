import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nnunet_dyn.architectures import blocks, depthwise
from nnunet_dyn.architectures.blocks import FusedMBConv, MBConv, SqueezeExcite, fast_norm_op, to_fast_layout
from nnunet_dyn.architectures.depthwise import depthwise_op

CONVS = {2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
AFFINE = {"affine": True, "eps": 1e-5}


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm_equals_torch(dimension, affine):
    reference = NORMS[dimension](6, affine=affine, eps=1e-3).double()
    ours = fast_norm_op(NORMS[dimension])(6, affine=affine, eps=1e-3).double()
    if affine:
        nn.init.normal_(reference.weight)
        nn.init.normal_(reference.bias)
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(3, 6, *[5] * dimension, dtype=torch.double) * 3 + 1
    assert torch.allclose(ours(x), reference(x))
    assert torch.allclose(ours(to_fast_layout(x)), reference(x))
    assert isinstance(ours, NORMS[dimension])


@pytest.mark.parametrize(("mean", "spread"), [(100.0, 1.0), (1.0, 1e-3), (0.0, 1.0)])
@pytest.mark.parametrize("dimension", [2, 3])
def test_instance_norm_stays_exact_in_single_precision(dimension, mean, spread):
    """Where a channel's mean is large beside its spread, a variance from E[x²] - E[x]² would be noise."""
    size = (48, 48) if dimension == 2 else (16, 16, 16)
    x = mean + spread * torch.randn(2, 6, *size, dtype=torch.double)
    norm = fast_norm_op(NORMS[dimension])(6, **AFFINE)
    expected = norm.double()(x.float().double())
    got = norm.float()(to_fast_layout(x.float()))
    assert (got - expected).abs().amax() < 2e-3


def test_one_voxel_is_refused_in_training_as_in_torch():
    norm = blocks.InstanceNorm3d(2, affine=True)
    with pytest.raises(ValueError, match=r"maps of one voxel in training .* larger patch or fewer stages"):
        norm(torch.randn(2, 2, 1, 1, 1))
    assert torch.equal(norm.eval()(torch.randn(2, 2, 1, 1, 1)), torch.zeros(2, 2, 1, 1, 1))


def test_other_norms_stay():
    assert fast_norm_op(nn.BatchNorm3d) is nn.BatchNorm3d


@pytest.mark.parametrize("kernel", [3, 5, (1, 3, 5)])
@pytest.mark.parametrize("stride", [1, 2, (1, 2, 2)])
@pytest.mark.parametrize("size", [(8, 8, 8), (9, 8, 7)])
@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("small_map", [0, 10**6])
def test_depthwise_gradients_equal_torch(dimension, kernel, stride, size, small_map, monkeypatch):
    monkeypatch.setattr(depthwise, "_SMALL_MAP", small_map)
    kernel, stride = (v if isinstance(v, int) else v[-dimension:] for v in (kernel, stride))
    padding = kernel // 2 if isinstance(kernel, int) else tuple(k // 2 for k in kernel)
    arguments = dict(kernel_size=kernel, stride=stride, padding=padding, groups=6, bias=False)
    reference = CONVS[dimension](6, 6, **arguments).double()
    ours = depthwise_op(CONVS[dimension])(6, 6, **arguments).double()
    ours.load_state_dict(reference.state_dict())
    assert isinstance(ours, CONVS[dimension])
    inputs = [torch.randn(2, 6, *size[:dimension], dtype=torch.double, generator=torch.Generator().manual_seed(0))]
    inputs.append(to_fast_layout(inputs[0].clone()))
    outputs = []
    for module, x in zip((reference, ours), inputs, strict=True):
        x.requires_grad_()
        y = module(x)
        y.backward(torch.cos(torch.arange(y.numel(), dtype=torch.double)).reshape(y.shape))
        outputs.append((y, x.grad, module.weight.grad))
    for expected, got in zip(*outputs, strict=True):
        assert torch.allclose(expected, got)


def test_depthwise_without_input_gradient():
    module = depthwise_op(nn.Conv3d)(2, 2, 3, padding=1, groups=2, bias=False)
    module(torch.randn(1, 2, 4, 4, 4)).sum().backward()
    assert module.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dimension", [2, 3])
def test_squeeze_excite_is_the_equation(dimension):
    module = SqueezeExcite(CONVS[dimension], 8, 2)
    x = torch.randn(2, 8, *[4] * dimension)
    pooled = x.flatten(2).mean(-1)
    hidden = F.silu(F.linear(pooled, module.reduce.weight.flatten(1), module.reduce.bias))
    gate = torch.sigmoid(F.linear(hidden, module.expand.weight.flatten(1), module.expand.bias))
    expected = x * gate.reshape(2, 8, *[1] * dimension)
    assert torch.allclose(module(x), expected, atol=1e-6)


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("block", ["mbconv", "mbconv_e1", "fused"])
@pytest.mark.parametrize("stride", [1, 2])
def test_inference_equals_training_and_leaves_its_input(dimension, block, stride):
    """Without gradients the blocks work in place; that must change neither the result nor the input."""
    arguments = (CONVS[dimension], 8, 8, 3, stride)
    norm = (fast_norm_op(NORMS[dimension]), AFFINE)
    module = {
        "mbconv": lambda: MBConv(*arguments, 4, 2, *norm),
        "mbconv_e1": lambda: MBConv(*arguments, 1, 2, *norm),
        "fused": lambda: FusedMBConv(*arguments, 4, *norm),
    }[block]()
    x = to_fast_layout(torch.randn(2, 8, *[6] * dimension))
    before = x.clone()
    trained = module(x)
    with torch.no_grad():
        inferred = module(x)
    assert torch.allclose(trained, inferred, atol=1e-6)
    assert torch.equal(x, before)
    assert module.has_shortcut == (stride == 1)


def test_stochastic_depth_drops_whole_samples():
    module = MBConv(nn.Conv2d, 8, 8, 3, 1, 4, 2, blocks.InstanceNorm2d, AFFINE, drop_path_rate=0.5).train()
    torch.manual_seed(0)
    x = torch.randn(32, 8, 4, 4)
    dropped = (module(x) - x).flatten(1).abs().amax(1) == 0
    assert 0 < dropped.sum() < 32
    assert torch.equal(module.eval()(x[:1]), module(x[:1])) and (module(x) - x).abs().amax() > 0


def test_feature_map_size_counts_the_expanded_maps():
    module = MBConv(nn.Conv2d, 8, 16, 3, 2, 6, 2, blocks.InstanceNorm2d, AFFINE)
    assert module.compute_conv_feature_map_size((8, 8)) == 48 * 64 + 48 * 16 + 16 * 16
