"""The contract that every network offers to nnU-Net."""

import pydoc

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from plans import NETWORKS, arch_kwargs, build
from torch import nn

import nnunet_dyn.architectures.efficient_unet as efficient_unet
from nnunet_dyn.accounting import training_memory
from nnunet_dyn.architectures import blocks, efficientnet
from nnunet_dyn.architectures.blocks import MBConv
from nnunet_dyn.architectures.efficient_unet import RESIDUAL_SCALE, EfficientUNet, GenericUNet

# Four stages of a small patch hold every block of every variant: the groups without a resolution of their own merge
# into the last stage.
SMALL = dict(n_stages=4, features=(8, 12, 16, 20))


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_contract(name, dimension):
    network = build(name, input_channels=3, num_classes=5, dimension=dimension, **SMALL)
    x = torch.randn(1, 3, *[16] * dimension)

    outputs = network(x)
    assert [tuple(o.shape) for o in outputs] == [(1, 5, *[size] * dimension) for size in (16, 8, 4)]
    sum(o.square().mean() for o in outputs).backward()
    unreached = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not unreached
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())

    network.decoder.deep_supervision = False
    network.eval()
    with torch.no_grad():
        logits = network(x)
    assert logits.shape == (1, 5, *[16] * dimension) and torch.isfinite(logits).all()
    assert logits.min() < 0 < logits.max()

    other = build(name, input_channels=3, num_classes=5, deep_supervision=False, dimension=dimension, **SMALL).eval()
    nn.init.zeros_(next(other.parameters()))
    other.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x), logits)


@pytest.mark.parametrize("name", ["EfficientUNet-b0", "FullyEfficientUNet-v2s", "FullyEffGenericUNet"])
def test_anisotropic_plans_and_batches(name):
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2], [2, 2, 2]]
    kernels = [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]]
    network = build(
        name, n_stages=5, strides=strides, kernel_sizes=kernels, features=(8, 12, 16, 20, 24), num_classes=2
    ).eval()
    x = torch.randn(2, 1, 8, 32, 48)
    with torch.no_grad():
        outputs = network(x)
        assert [tuple(o.shape[2:]) for o in outputs] == [(8, 32, 48), (8, 16, 24), (4, 8, 12), (4, 4, 6)]
        single = torch.cat([network(sample[None])[0] for sample in x])
    assert torch.allclose(outputs[0], single, atol=1e-4)


@pytest.mark.parametrize("n_stages", [2, 3, 5, 7])
@pytest.mark.parametrize("name", ["EfficientUNet-b0", "FullyEfficientUNet-v2s"])
def test_any_number_of_stages(name, n_stages):
    features = (4, 6, 8, 8, 8, 8, 8)
    network = build(name, dimension=2, n_stages=n_stages, features=features).eval()
    with torch.no_grad():
        outputs = network(torch.randn(1, 1, 128, 64))
    assert [o.shape[2] for o in outputs] == [128 // 2**level for level in range(n_stages - 1)]


@pytest.mark.parametrize("name", ["EfficientUNet-b1", "EfficientUNet-v2s", "FullyEfficientUNet-b0", "GenericUNet"])
@pytest.mark.parametrize("dimension", [2, 3])
def test_the_fast_paths_change_nothing(name, dimension, monkeypatch):
    """Same weights, PyTorch's plain modules in contiguous layout: same logits, same gradients."""
    fast = build(name, dimension=dimension, **SMALL)
    for module in (blocks, efficientnet, efficient_unet):
        monkeypatch.setattr(module, "to_fast_layout", lambda x: x, raising=False)
        monkeypatch.setattr(module, "fast_norm_op", lambda op: op, raising=False)
    monkeypatch.setattr(blocks, "fast_conv_op", lambda op: op)
    plain = build(name, dimension=dimension, **SMALL)
    plain.load_state_dict(fast.state_dict())
    monkeypatch.undo()
    assert not any(isinstance(m, (blocks.InstanceNorm2d, blocks.InstanceNorm3d)) for m in plain.modules())

    x = torch.randn(2, 1, *[16] * dimension, dtype=torch.double)
    results = []
    for network in (fast.double(), plain.double()):
        outputs = network(x)
        sum(o.square().mean() for o in outputs).backward()
        with torch.no_grad():
            results.append((outputs[0], network(x)[0], [p.grad for p in network.parameters()]))
    (out, inferred, grads), (plain_out, plain_inferred, plain_grads) = results
    assert torch.allclose(out, plain_out) and torch.allclose(inferred, plain_inferred) and torch.allclose(out, inferred)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(grads, plain_grads, strict=True))


def test_residual_branches_start_small_and_the_others_do_not():
    network = build("FullyEfficientUNet-b1", **SMALL)
    found = {True: set(), False: set()}
    for module in network.modules():
        if isinstance(module, MBConv):
            found[module.has_shortcut].update(round(w, 6) for w in module.project.norm.weight.tolist())
    assert found == {True: {RESIDUAL_SCALE}, False: {1.0}}


def test_generic_with_plain_decoder_is_the_stock_network_without_six_biases():
    """With the biases that our decoder does not have at zero, nnU-Net's own network gives the same logits."""
    kwargs = arch_kwargs(**SMALL)
    stock = PlainConvUNet(1, num_classes=3, n_conv_per_stage=2, deep_supervision=True, **kwargs)
    ours = GenericUNet(1, 3, n_conv_per_stage=2, decoder="plain", deep_supervision=True, **kwargs)
    missing, unexpected = ours.load_state_dict(
        {name: value for name, value in stock.state_dict().items() if not name.startswith("decoder.encoder.")},
        strict=False,
    )
    assert not missing
    assert sorted(unexpected) == sorted(
        f"decoder.{part}.{level}.bias" for part in ("transpconvs", "seg_layers") for level in range(3)
    )
    with torch.no_grad():
        for name in unexpected:
            stock.get_parameter(name).zero_()
        x = torch.randn(1, 1, 16, 16, 16)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours(x), stock(x), strict=True))


def test_residual_encoder_plans():
    kwargs = arch_kwargs(n_stages=4, features=(8, 12, 16, 20)) | {"n_conv_per_stage_decoder": [1, 1, 1]}
    network = GenericUNet(1, 2, n_blocks_per_stage=[1, 2, 2, 2], **kwargs)
    network.apply(network.initialize)
    assert network(torch.randn(1, 1, 16, 16, 16)).shape == (1, 2, 16, 16, 16)
    assert len(network.decoder.stages[0]) == 1
    eff = EfficientUNet(1, 2, encoder="b0", **kwargs)
    assert eff(torch.randn(1, 1, 16, 16, 16)).shape == (1, 2, 16, 16, 16)


def test_batch_norm_option_reaches_encoder_and_mbconv_decoder():
    network = build("FullyEfficientUNet-b0", options={"mbconv_norm": "batch"}, **SMALL)
    mbconvs = [m for m in network.modules() if isinstance(m, MBConv)]
    assert all(isinstance(m.project.norm, nn.BatchNorm3d) and m.project.norm.eps == 1e-3 for m in mbconvs)
    assert isinstance(network.decoder.stages[-1].convs[0].norm, nn.InstanceNorm3d)
    network(torch.randn(1, 1, 16, 16, 16))[0].mean().backward()


def test_names_that_plans_and_checkpoints_rely_on():
    for name in ("EfficientUNet", "GenericUNet"):
        assert pydoc.locate(f"nnunet_dyn.architectures.efficient_unet.{name}") is getattr(efficient_unet, name)
    keys = set(build("FullyEfficientUNet-b0", **SMALL).state_dict())
    assert {
        "encoder.stages.0.0.conv.weight",
        "encoder.stages.1.0.depthwise.conv.weight",
        "encoder.stages.2.0.expand.norm.weight",
        "encoder.stages.2.0.squeeze_excite.reduce.bias",
        "decoder.transpconvs.0.weight",
        "decoder.stages.0.0.project.conv.weight",
        "decoder.stages.2.convs.0.conv.weight",
        "decoder.seg_layers.0.weight",  # nnU-Net's -pretrained_weights leaves out exactly these
    } <= keys


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_planned_memory_is_the_memory_that_training_keeps(name, dimension):
    """In nnU-Net's unit: eight bytes in fp32, two maps a convolution of ``PlainConvUNet``."""
    network = build(name, dimension=dimension, n_stages=4, features=(16, 32, 64, 64))
    patch = (64, 64, 64)[:dimension]
    kept = training_memory(network, (1, 1, *patch))
    assert network.compute_conv_feature_map_size(patch) * 8 == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("name", ["GenericUNet", "FullyEffGenericUNet"])
def test_planned_memory_with_a_residual_encoder(name):
    options = {"n_conv_per_stage": None, "n_blocks_per_stage": [1, 3, 4, 6]}
    network = build(name, n_stages=4, features=(16, 32, 64, 64), options=options)
    kept = training_memory(network, (1, 1, 64, 64, 64))
    assert network.compute_conv_feature_map_size((64, 64, 64)) * 8 == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("name", ["EfficientUNet-v2s", "FullyEfficientUNet-b0", "FullyEffGenericUNet"])
def test_planned_memory_is_what_autograd_saves_on_a_cpu(name):
    network = build(name, n_stages=4, features=(16, 32, 64, 64))
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # a tensor that knows its graph would keep it alive for good

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = network(torch.randn(1, 1, 32, 32, 32))
    kept = sum(size for pointer, size in saved.items() if pointer not in parameters)
    assert network.compute_conv_feature_map_size((32, 32, 32)) * 8 == pytest.approx(kept, rel=0.15)
    del outputs


def test_bad_input_says_got_expected_remedy():
    network = build("EfficientUNet-b0", **SMALL)
    with pytest.raises(ValueError, match=r"Got an input of \(16, 20, 16\) voxels; expected .* \(8, 8, 8\). Change"):
        network(torch.randn(1, 1, 16, 20, 16))
    with pytest.raises(ValueError, match=r"decoder got 'half'; expected 'plain' or 'fully_efficient'"):
        build("EfficientUNet-b0", options={"decoder": "half"}, **SMALL)
    with pytest.raises(ValueError, match=r"mbconv_norm got 'group'; expected 'plan' or 'batch'"):
        build("EfficientUNet-b0", options={"mbconv_norm": "group"}, **SMALL)
    with pytest.raises(ValueError, match="norm_op=None; expected a normalisation"):
        build("EfficientUNet-b0", options={"norm_op": None}, **SMALL)
    with pytest.raises(ValueError, match="Got 3 features_per_stage and 3 n_conv_per_stage_decoder; expected 4 and 3"):
        build("EfficientUNet-b0", options={"features_per_stage": [8, 8, 8]}, **SMALL)
    with pytest.raises(ValueError, match="expected one of them"):
        GenericUNet(1, 2, **arch_kwargs(**SMALL))
