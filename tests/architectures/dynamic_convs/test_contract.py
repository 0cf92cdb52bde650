"""What every dynamic convolution promises, method by method: it stands where a static convolution stood."""

import copy
import math

import pytest
import torch
from torch import nn

from nnunet_dyn.architectures.dynamic_convs import METHODS, set_annealing
from nnunet_dyn.architectures.dynamic_convs.replacement import method_class

CONVS = {2: nn.Conv2d, 3: nn.Conv3d}
DIMENSIONS = [(method, dimension) for method in METHODS for dimension in CONVS if (method, dimension) != ("ddconv", 3)]
every_method = pytest.mark.parametrize("method", METHODS)
every_method_and_dimension = pytest.mark.parametrize(("method", "dimension"), DIMENSIONS)


def make(method, conv_op=nn.Conv2d, *geometry, **named):
    torch.manual_seed(0)
    return method_class(method)(conv_op, *geometry, **named)


GEOMETRIES = {
    "odd channels": {"in_channels": 5, "out_channels": 7, "kernel_size": 3, "padding": 1},
    "one channel": {"in_channels": 1, "out_channels": 4, "kernel_size": 3, "padding": 1},
    "stride, no bias": {
        "in_channels": 4,
        "out_channels": 6,
        "kernel_size": 3,
        "stride": 2,
        "padding": 1,
        "bias": False,
    },
    "dilation": {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 2, "dilation": 2},
    "1×1": {"in_channels": 6, "out_channels": 4, "kernel_size": 1},
    "even kernel": {"in_channels": 3, "out_channels": 4, "kernel_size": 2, "stride": 2},
    "groups": {"in_channels": 6, "out_channels": 4, "kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"in_channels": 6, "out_channels": 6, "kernel_size": 3, "padding": 1, "groups": 6, "bias": False},
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@every_method_and_dimension
def test_shapes_gradients_and_samples_of_their_own(method, dimension, geometry):
    geometry = GEOMETRIES[geometry]
    conv = make(method, CONVS[dimension], **geometry)
    x = torch.randn(3, geometry["in_channels"], *(6, 9, 7)[:dimension])
    y = conv(x)
    assert y.shape == CONVS[dimension](**geometry)(x).shape
    y.square().sum().backward()
    without = [name for name, parameter in conv.named_parameters() if not parameter.grad.abs().sum() > 0]
    # One channel has a constant context, whatever its attention.
    assert not without or (geometry["in_channels"] == 1 and all("non_local.key" in name for name in without))
    conv.eval()
    alone = torch.cat([conv(sample) for sample in x.split(1)])
    torch.testing.assert_close(conv(x), alone, rtol=1e-4, atol=1e-5)


@every_method_and_dimension
def test_the_kernel_depends_on_the_sample(method, dimension):
    """A static convolution without bias is homogeneous; one whose kernel follows its input is not."""
    conv = make(method, CONVS[dimension], 8, 8, 3, padding=1, bias=False)
    set_annealing(conv, 1)
    conv(torch.randn(1, 8, *(8,) * dimension))
    conv.eval()
    x = torch.randn(1, 8, *(8,) * dimension) + 1
    assert not torch.allclose(conv(4 * x), 4 * conv(x), rtol=1e-3)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@every_method_and_dimension
def test_started_from_static_weights_the_output_is_theirs(method, dimension, geometry):
    static = CONVS[dimension](**GEOMETRIES[geometry])
    conv = method_class(method).like(static)
    conv.start_from(static.weight, static.bias)
    x = torch.randn(2, static.in_channels, *(6, 9, 7)[:dimension])
    torch.testing.assert_close(conv(x), static(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "dcd"])
def test_kernels_that_start_equal_become_different(method):
    conv, static = make(method, nn.Conv2d, 8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    set_annealing(conv, 1)
    conv.start_from(static.weight, static.bias)
    x = torch.randn(2, 8, 9, 9)
    optimizer = torch.optim.SGD(conv.parameters(), 0.1)
    for _ in range(5):
        optimizer.zero_grad()
        conv(x).square().mean().backward()
        optimizer.step()
    first, second = (kernel / kernel.norm() for kernel in conv.kernels[:2])
    assert (first - second).abs().max() > 1e-5 * first.abs().max()


@pytest.mark.parametrize("method", [method for method in METHODS if method != "ddconv"])
def test_three_dimensions_of_depth_one_are_two(method):
    flat = make(method, nn.Conv2d, 4, 6, 3, padding=1).eval()
    deep = make(method, nn.Conv3d, 4, 6, (1, 3, 3), padding=(0, 1, 1)).eval()
    state = {}
    for name, value in deep.state_dict().items():
        state[name] = flat.state_dict()[name].view_as(value)
    deep.load_state_dict(state)
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(deep(x.unsqueeze(2)).squeeze(2), flat(x), rtol=1e-4, atol=1e-5)


@every_method_and_dimension
def test_circular_padding(method, dimension):
    geometry = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1, "padding_mode": "circular"}
    if method == "ddconv":
        with pytest.raises(ValueError, match="expected numbers and zeros"):
            make(method, CONVS[dimension], **geometry)
        return
    static = CONVS[dimension](**geometry)
    conv = method_class(method).like(static)
    conv.start_from(static.weight, static.bias)
    x = torch.randn(2, 4, *(6, 7, 8)[:dimension])
    torch.testing.assert_close(conv(x), static(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_method_and_dimension
def test_half_precision_stays_finite_for_large_inputs(method, dimension, dtype):
    x = 1e3 * torch.randn(2, 8, *(12,) * dimension)
    x[0] = 1e3  # a constant map, every product of the same sign
    conv = make(method, CONVS[dimension], 8, 8, 3, padding=1)
    full = conv(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = conv(x.to(dtype) if dtype == torch.bfloat16 else x)
        mixed.float().mean().backward()
    half = copy.deepcopy(conv).to(dtype)(x.to(dtype))
    with torch.no_grad():
        without_gradients = copy.deepcopy(conv).to(dtype)(x.to(dtype))
    for output in (mixed, half, without_gradients):
        assert torch.isfinite(output).all()
        assert (output.float() - full).norm() / full.norm() < 0.1
    assert half.dtype == dtype
    assert all(torch.isfinite(parameter.grad).all() for parameter in conv.parameters())


@every_method
def test_compiles_into_one_graph_and_computes_the_same(method):
    torch._dynamo.reset()
    conv = make(method, nn.Conv2d, 4, 6, 3, padding=1).eval()
    x = torch.randn(2, 4, 8, 8)
    compiled = torch.compile(conv, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), conv(x), rtol=1e-4, atol=1e-5)


@every_method_and_dimension
def test_a_compiled_training_step_is_an_eager_one(method, dimension):
    """Through autograd's own compiler, without one for C++: gradients, and the temperature's count of passes."""
    torch._dynamo.reset()
    conv = make(method, CONVS[dimension], 4, 6, 3, padding=1)
    set_annealing(conv, 4)
    again = copy.deepcopy(conv)
    compiled = torch.compile(again, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 4, *(6,) * dimension)
    for module in (conv, compiled):
        for _ in range(2):
            module(x).square().sum().backward()
    for (name, ours), theirs in zip(conv.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-3, atol=1e-4, msg=name)
    for ours, theirs in zip(conv.buffers(), again.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "ddconv"])
def test_exports_as_plain_operators(method):
    conv = make(method, nn.Conv3d, 4, 6, 3, padding=1).eval()
    x = torch.randn(1, 4, 6, 6, 6)
    exported = torch.export.export(conv, (x,)).module()
    torch.testing.assert_close(exported(x), conv(x), rtol=1e-4, atol=1e-5)


@every_method
def test_kernels_start_as_the_static_convolution_does(method):
    conv = make(method, nn.Conv2d, 16, 16, 3, padding=1)
    bank = conv.kernel.unsqueeze(0) if method == "dcd" else conv.kernels
    expected = math.sqrt(1 / (3 * 16 * 9))  # kaiming_uniform_ with a = √5, PyTorch's own
    for kernel in bank:
        assert kernel.std().item() == pytest.approx(expected, rel=0.1)
    assert len(bank) == 1 or not torch.equal(bank[0], bank[1])


@every_method
def test_a_map_of_one_voxel_and_a_batch_of_one(method):
    conv = make(method, nn.Conv2d, 8, 8, 3, padding=1)
    conv(torch.randn(1, 8, 1, 1)).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in conv.parameters())


@every_method
def test_it_says_which_input_it_expects(method):
    conv = make(method, nn.Conv2d, 4, 4, 3)
    for shape in ((2, 3, 8, 8), (4, 8, 8), (2, 4, 8, 8, 8)):
        with pytest.raises(ValueError, match=r"got an input of shape .*; expected \(batch, 4, and 2 spatial axes\)"):
            conv(torch.randn(shape))


@every_method
def test_training_keeps_the_map_and_no_kernels(method):
    """The kernels of a batch would be larger than the maps of deep stages; they are made again when they are needed."""
    conv = make(method, nn.Conv2d, 64, 64, 3, padding=1)
    x = torch.randn(4, 64, 4, 4, requires_grad=True)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in conv.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        conv(x)
    assert sum(kept.values()) < 4 * 64 * 64 * 9 * 4  # bytes of one kernel a sample


@every_method_and_dimension
def test_autocast_in_half_precision_keeps_no_copy_of_the_map(method, dimension):
    conv = make(method, CONVS[dimension], 4, 4, 3, padding=1)
    x = torch.randn(1, 4, *(24,) * dimension).bfloat16().requires_grad_()
    kept = {}

    def pack(tensor):
        if tensor.numel() >= x.numel():
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() / (2 * x.numel())
        return tensor.detach()

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        conv(x)
    offsets = 18 / 4 if method == "ddconv" else 0  # a map of their own, and what makes it
    assert sum(kept.values()) <= 1 + 4 * offsets
