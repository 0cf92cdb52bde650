"""The mapping from timm's names and shapes, with randomly initialised timm models: weights are not needed for it."""

import pytest
import torch
from plans import build, encoder
from torch import nn

from nnunet_dyn.architectures import efficient_unet, imagenet
from nnunet_dyn.architectures.efficientnet import BATCH_NORM_KWARGS, VARIANTS
from nnunet_dyn.architectures.imagenet import load_imagenet
from nnunet_dyn.errors import JobError

timm = pytest.importorskip("timm", reason="the extra 'pretrained' is not installed")

BATCH_NORM = {"norm_op": nn.BatchNorm2d, "norm_op_kwargs": BATCH_NORM_KWARGS}


def timm_model(variant: str, **kwargs):
    torch.manual_seed(1)
    model = timm.create_model(VARIANTS[variant].timm_name, pretrained=False, **kwargs)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_but_the_known_ones_is_loaded(variant):
    without = load_imagenet(encoder(variant), timm_model(variant).state_dict())
    stages = {tuple(name.split(".")[1:2] + name.split(".")[3:4]) for name in without}
    expected = {
        "v2s": {("1", "project")},
        "v2m": {("1", "project")},
        "v2l": {("0", "conv"), ("0", "norm"), ("1", "expand"), ("1", "project")},
    }
    assert stages == expected.get(variant, set())
    if variant == "v2l":  # only the stem and the first block behind it are narrower
        assert {name.split(".")[2] for name in without if ".expand." in name} == {"0"}


def test_the_2d_encoder_computes_what_timm_computes():
    """Same strides and padding given, b0's maps are timm's."""
    model = timm_model("b0")
    ours = encoder("b0", input_channels=3, dimension=2, options=BATCH_NORM)
    load_imagenet(ours, model.state_dict())
    reference = timm.create_model("efficientnet_b0", pretrained=False, bn_eps=1e-3).eval()  # symmetric padding
    reference.load_state_dict(model.state_dict())
    reference.conv_stem.stride = (1, 1)
    reference.blocks[0][0].conv_dw.stride = (2, 2)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = reference.bn1(reference.conv_stem(x))
        expected = [features]
        for index, stage in enumerate(reference.blocks):
            features = stage(features)
            if index in (0, 1, 2, 4, 6):
                expected.append(features)
        got = ours(x)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("variant", ["b0", "v2m"])
def test_a_3d_encoder_answers_a_volume_constant_along_the_new_axis_as_the_2d_one(variant):
    """Away from the ends of that axis, whose zero padding the 2D network does not have."""
    state = timm_model(variant).state_dict()
    options = {"norm_op": nn.BatchNorm2d, "norm_op_kwargs": BATCH_NORM_KWARGS}
    flat = encoder(variant, dimension=2, n_stages=2, options=options | {"deep_groups": "truncate"})
    options = {"norm_op": nn.BatchNorm3d, "norm_op_kwargs": BATCH_NORM_KWARGS, "deep_groups": "truncate"}
    deep = encoder(variant, n_stages=2, strides=[[1, 1, 1], [1, 2, 2]], options=options)
    load_imagenet(flat, state)
    load_imagenet(deep, state)
    for ours, theirs in zip(deep.parameters(), flat.parameters(), strict=True):
        if ours.ndim != theirs.ndim + 1:
            assert torch.equal(ours, theirs)
    with torch.no_grad():
        stem2d = flat.stages[0](x := torch.randn(1, 1, 16, 16))
        stem3d = deep.stages[0](x[:, :, None].expand(-1, -1, 9, -1, -1))
    assert torch.allclose(stem3d[:, :, 4], stem2d, atol=1e-5)


def test_flat_kernels_get_the_sum_along_the_axis():
    ours = encoder("b0", n_stages=2, kernel_sizes=[[1, 3, 3], [3, 1, 3]])
    state = timm_model("b0").state_dict()
    load_imagenet(ours, state)
    stem = state["conv_stem.weight"].sum(1, keepdim=True)
    assert torch.allclose(ours.stages[0][0].conv.weight[:, :, 0], stem)
    depthwise = state["blocks.0.0.conv_dw.weight"].sum(2) / 3
    assert torch.allclose(ours.stages[1][0].depthwise.conv.weight[:, :, 0, 0], depthwise, atol=1e-6)


def test_input_channels_share_the_colours():
    state = timm_model("b0").state_dict()
    for channels in (1, 2, 3, 4):
        ours = encoder("b0", input_channels=channels, dimension=2)
        load_imagenet(ours, state)
        weight = ours.stages[0][0].conv.weight
        assert torch.allclose(weight.sum(1), state["conv_stem.weight"].sum(1), atol=1e-5)
        assert channels != 3 or torch.equal(weight, state["conv_stem.weight"])


def test_a_wider_squeeze_and_excitation_keeps_the_trained_gate():
    """Some blocks of V2-M squeeze to 48 channels where timm has 44."""
    model = timm_model("v2m")
    ours = encoder("v2m", dimension=2)
    load_imagenet(ours, model.state_dict())
    theirs = model.blocks[4][1].se
    block = next(b for b in ours.stages[4] if b.squeeze_excite.reduce.in_channels == theirs.conv_reduce.in_channels)
    assert block.squeeze_excite.reduce.out_channels == 48 and theirs.conv_reduce.out_channels == 44
    x = torch.randn(2, theirs.conv_reduce.in_channels, 4, 4)
    with torch.no_grad():
        assert torch.allclose(block.squeeze_excite(x.clone()), theirs(x.clone()), atol=1e-5)


def test_fewer_and_more_resolutions_than_the_original():
    state = timm_model("b0").state_dict()
    assert load_imagenet(encoder("b0", dimension=2, n_stages=3, options={"deep_groups": "truncate"}), state) == []
    assert load_imagenet(encoder("b0", dimension=2, n_stages=4), state) == []
    without = load_imagenet(encoder("b0", dimension=2, n_stages=7, features=(8,) * 7), state)
    assert without and {name.split(".")[1] for name in without} == {"6"}


def test_pretrained_argument_survives_initialize(monkeypatch):
    state = timm_model("b0").state_dict()
    monkeypatch.setattr(imagenet, "imagenet_state", lambda encoder: state)
    assert efficient_unet.load_imagenet is load_imagenet
    network = build("EfficientUNet-b0", dimension=2, n_stages=4, options={"pretrained": True})
    assert torch.equal(network.encoder.stages[2][0].expand.conv.weight, state["blocks.1.0.conv_pw.weight"])
    assert network.decoder.stages[0].convs[0].conv.weight.std() > 0


def test_what_imagenet_does_not_have_starts_as_without_it(monkeypatch):
    state = timm_model("v2s").state_dict()
    monkeypatch.setattr(imagenet, "imagenet_state", lambda encoder: state)
    network = build("EfficientUNet-v2s", dimension=2, n_stages=4, options={"pretrained": True})
    projection = network.encoder.stages[1][1].project
    assert torch.allclose(projection.norm.weight, torch.tensor(efficient_unet.RESIDUAL_SCALE))
    he = (2 / (1 + 1e-4) / projection.conv.in_channels) ** 0.5
    assert projection.conv.weight.std().item() == pytest.approx(he, rel=0.2)


def test_without_weights_the_error_names_the_remedy(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        JobError, match=r"tf_efficientnet_b0\.aa_in1k \(OSError: no route to host\).*HF_HOME.*without _ImageNet"
    ):
        load_imagenet(encoder("b0"))
