"""What each trainer builds from plans, and how it trains, through nnU-Net's own steps on a small data set."""

import inspect
import pickle

import numpy as np
import pytest
import torch
from plans import plans_manager
from torch import nn
from training import LABELS, build, steps, trainer_class

from nnunet_dyn.architectures import imagenet
from nnunet_dyn.architectures.efficient_unet import EfficientUNet, GenericUNet
from nnunet_dyn.trainers import trainer_names

BASE_NAMES = [name for name in trainer_names() if "Eff" in name and not name.endswith("_ImageNet")]


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("name", BASE_NAMES)
def test_builds_what_its_name_says(name, dimension):
    with torch.device("meta"):
        network = build(name, plans_manager(dimension, n_stages=5))
    kind = "fully_efficient" if "Fully" in name else "plain"
    if name.endswith("Generic"):
        assert isinstance(network, GenericUNet)
    else:
        assert isinstance(network, EfficientUNet)
        assert network.encoder.variant.name == name.split("Eff")[1].lower()
    assert isinstance(network.decoder.stages[0], nn.Sequential) == (kind == "fully_efficient")
    assert network.decoder.deep_supervision is True
    assert next(network.parameters()).ndim == dimension + 2
    assert "plans_manager" in inspect.signature(trainer_class(name).build_network_architecture).parameters


def test_residual_encoder_plans_are_understood():
    plans = plans_manager(n_stages=4)
    architecture = plans.plans["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    del architecture["arch_kwargs"]["n_conv_per_stage"]
    architecture["arch_kwargs"] |= {"n_blocks_per_stage": [1, 2, 2, 2], "n_conv_per_stage_decoder": [1, 1, 1]}
    for name in ("nnUNetTrainerEffB0", "nnUNetTrainerFullyEffGeneric"):
        network = build(name, plans, deep_supervision=False)
        assert network(torch.randn(1, 2, 16, 16, 16)).shape == (1, 3, 16, 16, 16)


def test_the_network_compiles_into_one_graph_with_and_without_deep_supervision():
    network = build("nnUNetTrainerFullyEffB0", plans_manager(2, n_stages=3), deep_supervision=True).to("meta")
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    x = torch.empty(1, 2, 16, 16, device="meta")
    assert len(compiled(x)) == 2
    network.decoder.deep_supervision = False
    assert compiled(x).shape == (1, 3, 16, 16)


def test_bfloat16_autocast_on_a_cpu():
    network = build("nnUNetTrainerEffB0", plans_manager(2, n_stages=3), deep_supervision=False)
    with torch.autocast("cpu", torch.bfloat16):
        output = network(torch.randn(2, 2, 16, 16))
    output.float().mean().backward()
    assert output.dtype == torch.bfloat16
    assert all(torch.isfinite(p.grad).all() for p in network.decoder.stages.parameters())


def test_plans_it_cannot_serve():
    plans = plans_manager(n_stages=4, patch_size=(16, 20, 16))
    with pytest.raises(
        ValueError, match=r"got patch size \[16, 20, 16\]; expected .* \[8, 8, 8\]\. Set .* \[16, 16, 16\]"
    ):
        build("nnUNetTrainerEffV2S", plans)
    plans = plans_manager(n_stages=4)
    plans.plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] = {"patch_embed_size": [8, 8, 8]}
    with pytest.raises(ValueError, match=r"without n_stages, .* Plan with nnU-Net's default or a ResEnc planner"):
        build("nnUNetTrainerEffV2S", plans)


# --- training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("name", ["nnUNetTrainerEffB0", "nnUNetTrainerFullyEffGeneric"])
def test_trains_on_every_kind_of_label(prepared, name, dimension, labels):
    trainer = prepared(name, dimension, channels=2, **LABELS[labels])
    trainer.initialize()
    before = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    losses = steps(trainer)
    assert np.isfinite(losses).all()
    trainer.network.eval()
    with torch.no_grad():
        validation = trainer.validation_step(next(trainer.dataloader_val))
    assert np.isfinite(validation["loss"])
    heads = trainer.label_manager.num_segmentation_heads
    assert (
        trainer.network.decoder.seg_layers[-1].out_channels
        == heads
        == {"classes": 3, "regions": 2, "ignore": 2}[labels]
    )
    # The head of the lowest resolution has no weight in nnU-Net's loss, so only weight decay moves it.
    unmoved = [key for key, value in trainer.network.state_dict().items() if torch.equal(value, before[key])]
    assert all(key.startswith("decoder.seg_layers.0") for key in unmoved)


@pytest.mark.parametrize("name", ["nnUNetTrainerEffV2S", "nnUNetTrainerFullyEffB0"])
def test_batch_of_one_without_deep_supervision(prepared, name):
    trainer = prepared(name, batch_size=1)
    trainer.enable_deep_supervision = False
    assert np.isfinite(steps(trainer)).all()
    assert trainer.network.decoder.deep_supervision is False


def test_lengths_and_checkpoint_interval(prepared):
    trainer = prepared("nnUNetTrainerEffB0_20epochs_7iters")
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (20, 7, 1)
    assert trainer.save_every == 2
    stock = prepared("nnUNetTrainerEffB0")
    assert (stock.num_epochs, stock.num_iterations_per_epoch, stock.num_val_iterations_per_epoch) == (1000, 250, 50)
    assert stock.save_every == 50
    assert prepared("nnUNetTrainerEffB0_1epochs").save_every == 1


def test_a_checkpoint_brings_back_weights_and_names_its_trainer(prepared, tmp_path):
    trainer = prepared("nnUNetTrainerEffB0_3epochs_2iters")
    steps(trainer)
    path = str(tmp_path / "checkpoint.pth")
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=False)
    assert checkpoint["trainer_name"] == "nnUNetTrainerEffB0_3epochs_2iters"
    again = prepared(checkpoint["trainer_name"])
    again.load_checkpoint(path)
    x = torch.randn(1, 1, 16, 16, 16)
    for network in (trainer.network, again.network):
        network.eval()
    with torch.no_grad():
        assert torch.equal(trainer.network(x)[0], again.network(x)[0])
    assert pickle.loads(pickle.dumps(type(again))) is type(trainer)


def test_imagenet_trainer_fetches_for_training_and_not_for_a_checkpoint(prepared, tmp_path, monkeypatch):
    timm = pytest.importorskip("timm", reason="the extra 'pretrained' is not installed")
    state = timm.create_model("tf_efficientnet_b0", pretrained=False).state_dict()
    fetched = []
    monkeypatch.setattr(imagenet, "imagenet_state", lambda encoder: fetched.append(encoder) or state)
    trainer = prepared("nnUNetTrainerEffB0_ImageNet_1epochs")
    trainer.initialize()
    weight = trainer.network.encoder.stages[2][0].expand.conv.weight.flatten(1)
    assert len(fetched) == 1 and torch.equal(weight, state["blocks.1.0.conv_pw.weight"].flatten(1))
    trainer.save_checkpoint(path := str(tmp_path / "checkpoint.pth"))
    prepared("nnUNetTrainerEffB0_ImageNet_1epochs").load_checkpoint(path)
    assert len(fetched) == 1
    build("nnUNetTrainerEffB0_ImageNet", plans_manager(n_stages=3))  # what prediction does
    assert len(fetched) == 1
