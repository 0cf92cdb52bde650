import pytest
import torch
from torch import nn

from nnunet_dyn.architectures import fast_convs
from nnunet_dyn.architectures.blocks import to_fast_layout
from nnunet_dyn.architectures.fast_convs import fast_conv_op

CONVS = {2: nn.Conv2d, 3: nn.Conv3d}


@pytest.mark.parametrize("kernel", [3, 5, (1, 3, 5)])
@pytest.mark.parametrize("stride", [1, 2, (1, 2, 2)])
@pytest.mark.parametrize("size", [(8, 8, 8), (9, 8, 7)])
@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("small_map", [0, 10**6])
def test_depthwise_gradients_equal_torch(dimension, kernel, stride, size, small_map, monkeypatch):
    monkeypatch.setattr(fast_convs, "_SMALL_MAP", small_map)
    kernel, stride = (v if isinstance(v, int) else v[-dimension:] for v in (kernel, stride))
    padding = kernel // 2 if isinstance(kernel, int) else tuple(k // 2 for k in kernel)
    arguments = dict(kernel_size=kernel, stride=stride, padding=padding, groups=6, bias=False)
    reference = CONVS[dimension](6, 6, **arguments).double()
    ours = fast_conv_op(CONVS[dimension])(6, 6, **arguments).double()
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
    module = fast_conv_op(nn.Conv3d)(2, 2, 3, padding=1, groups=2, bias=False)
    module(torch.randn(1, 2, 4, 4, 4)).sum().backward()
    assert module.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (5, 1)])
@pytest.mark.parametrize("dimension", [2, 3])
def test_full_convolutions_equal_torch(dimension, kernel, stride, batch, bias):
    arguments = dict(kernel_size=kernel, stride=stride, padding=kernel // 2, bias=bias)
    reference = CONVS[dimension](5, 7, **arguments)
    ours = fast_conv_op(CONVS[dimension])(5, 7, **arguments)
    ours.load_state_dict(reference.state_dict())
    inputs = [torch.randn(batch, 5, *[9] * dimension)]
    inputs.append(to_fast_layout(inputs[0].clone()))
    outputs = []
    for module, x in zip((reference, ours), inputs, strict=True):
        x.requires_grad_()
        y = module(x)
        y.square().mean().backward()
        outputs.append((y, x.grad, *(p.grad for p in module.parameters())))
    for expected, got in zip(*outputs, strict=True):
        assert torch.allclose(expected, got, atol=1e-5)


def test_exporters_and_compilers_see_plain_convolutions():
    module = nn.Sequential(fast_conv_op(nn.Conv2d)(2, 3, 1), fast_conv_op(nn.Conv2d)(3, 3, 3, padding=1, groups=3))
    traced = torch.jit.trace(module, torch.randn(1, 2, 4, 4))
    operators = {node.kind() for node in traced.inlined_graph.nodes()}
    assert "aten::_convolution" in operators
    assert not operators & {"aten::linear", "aten::mkldnn_convolution", "prim::PythonOp"}
