import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nnunet_dyn.architectures import blocks
from nnunet_dyn.architectures.blocks import (
    ConvNormAct,
    FusedMBConv,
    MBConv,
    SqueezeExcite,
    fast_norm_op,
    to_fast_layout,
)

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
@pytest.mark.parametrize("batch", [1, 2])
def test_instance_norm_stays_exact_in_single_precision(dimension, mean, spread, batch):
    """Where a channel's mean is large beside its spread, a variance from E[x²] - E[x]² would be noise."""
    size = (48, 48) if dimension == 2 else (16, 16, 16)
    x = mean + spread * torch.randn(batch, 6, *size, dtype=torch.double)
    norm = fast_norm_op(NORMS[dimension])(6, **AFFINE)
    expected = norm.double()(x.float().double())
    got = norm.float()(to_fast_layout(x.float()))
    assert (got - expected).abs().amax() < 2e-3


def test_one_voxel_is_refused_in_training_as_in_torch():
    norm = blocks.InstanceNorm3d(2, affine=True)
    with pytest.raises(ValueError, match=r"maps of one voxel in training .* larger patch or fewer stages"):
        norm(torch.randn(2, 2, 1, 1, 1))
    assert norm.eval()(torch.randn(2, 2, 1, 1, 1)).abs().amax() < 1e-3


def test_other_norms_stay():
    assert fast_norm_op(nn.BatchNorm3d) is nn.BatchNorm3d


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


def test_feature_map_size_counts_what_is_kept():
    module = MBConv(nn.Conv2d, 8, 16, 3, 2, 6, 2, blocks.InstanceNorm2d, AFFINE)
    expanded, depthwise, gated, projected = 3 * 48 * 64, 3 * 48 * 16, 48 * 16, 2 * 16 * 16
    assert module.compute_conv_feature_map_size((8, 8)) == (expanded + depthwise + gated + projected) / 2


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("kernel", [1, 3])
def test_batch_norm_is_folded_in_inference_only(dimension, groups, kernel):
    norm_op = (nn.BatchNorm2d, nn.BatchNorm3d)[dimension - 2]
    module = ConvNormAct(CONVS[dimension], 6, 6, kernel, 1, norm_op, {"eps": 1e-3}, groups=groups).double()
    x = torch.randn(4, 6, *[5] * dimension, dtype=torch.double) + 1
    nn.init.normal_(module.norm.weight)
    nn.init.normal_(module.norm.bias)
    for _ in range(3):
        module.train()(x)
    calls = []
    module.norm.register_forward_hook(lambda *_: calls.append(1))
    expected = module.eval()(x)
    with torch.no_grad():
        assert torch.allclose(module(x), expected)
        assert len(calls) == 1
        module.train()(x)
    assert len(calls) == 2
