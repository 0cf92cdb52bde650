"""Dynamic convolutions through nnU-Net's trainer: what is built from plans, how it trains, what a checkpoint keeps."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from plans import plans_manager
from training import LABELS, build, steps, trainer_class

import nnunet_dyn
from nnunet_dyn.architectures.dynamic_convs import DynamicConv
from nnunet_dyn.architectures.dynamic_convs.base import Temperature
from nnunet_dyn.architectures.efficient_unet import EfficientUNet
from nnunet_dyn.errors import JobError
from nnunet_dyn.planning import build_network, derived_architecture
from nnunet_dyn.plans_templates import load_template
from nnunet_dyn.trainers.catalogue import FAMILIES, template_name
from nnunet_dyn.trainers.dynamic_convs import upcycle_checkpoint

NAMES = FAMILIES["nnunet_dyn.trainers.dynamic_convs"]


def dynamic(network) -> list[DynamicConv]:
    """The convolutions that were replaced (DDConv's offsets are made by dynamic convolutions of their own)."""
    modules = network.encoder.named_modules()
    return [module for name, module in modules if isinstance(module, DynamicConv) and not name.endswith("offsets")]


@pytest.mark.parametrize("name", NAMES)
def test_the_planned_network_with_the_kernels_its_name_says(name):
    dimension = 2 if name.endswith("DDConv") else 3
    with torch.device("meta"):
        network = build(name, plans_manager(dimension, n_stages=4))
    convs = dynamic(network)
    assert type(network) is PlainConvUNet and len(convs) == 7
    method = name.removeprefix("nnUNetTrainer")
    if method[-1] == "x":
        assert {conv.n_kernels for conv in convs} == {int(method[-2])}
    assert all(method.lower().startswith(type(conv).__name__.removesuffix("Conv").lower()) for conv in convs)


def test_in_three_dimensions_ddconv_says_what_to_do():
    with pytest.raises(ValueError, match="Train a 2d configuration, or take another method"):
        build("nnUNetTrainerDDConv", plans_manager(3, n_stages=3))


def test_whatever_network_the_plans_name():
    plans = plans_manager(n_stages=3, features=(8, 12, 16))
    architecture = plans.plans["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    del architecture["arch_kwargs"]["n_conv_per_stage"]
    architecture["arch_kwargs"] |= {"n_blocks_per_stage": [1, 2, 2], "n_conv_per_stage_decoder": [1, 1]}
    network = build("nnUNetTrainerMAGIC2x", plans)
    assert type(network) is ResidualEncoderUNet and dynamic(network)
    plans = plans_manager(n_stages=3, features=(8, 12, 16))
    architecture = plans.plans["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = "nnunet_dyn.architectures.efficient_unet.EfficientUNet"
    architecture["arch_kwargs"]["encoder"] = "b0"
    del architecture["arch_kwargs"]["n_conv_per_stage"]
    network = build("nnUNetTrainerMAGIC2x", plans)
    assert type(network) is EfficientUNet and any(conv.groups > 1 for conv in dynamic(network))


def test_a_configuration_of_the_template_builds_the_same_network_and_no_other():
    plans = plans_manager(n_stages=3, features=(8, 12, 16))
    configuration = plans.plans["configurations"]["3d_fullres"]
    template = load_template("magic2x")
    configuration["architecture"] = derived_architecture(template, configuration["architecture"])
    json.dumps(configuration)
    with torch.device("meta"):
        by_plans = build_network(configuration["architecture"], 2, 3, allow_init=False, deep_supervision=True)
        by_trainer = build("nnUNetTrainerMAGIC2x", plans)
    assert by_plans.state_dict().keys() == by_trainer.state_dict().keys()
    with pytest.raises(ValueError, match="Take the configuration that this one comes from"):
        build("nnUNetTrainerMAGIC4x", plans)


def test_a_users_template_combines_dynamic_kernels_with_an_efficient_encoder(tmp_path):
    content = {
        "family": "Mine",
        "summary": "MAGIC in EfficientNetV2-S",
        "paper": "",
        "dimensions": [2, 3],
        "network_class_name": "nnunet_dyn.architectures.dynamic_convs.dynamic_network",
        "arch_kwargs": {
            "network_class": "nnunet_dyn.architectures.efficient_unet.EfficientUNet",
            "dynamic": {"method": "magic", "n_kernels": 1, "non_local": False},
            "encoder": "v2s",
            "decoder": "plain",
        },
    }
    (tmp_path / "mine.json").write_text(json.dumps(content))
    planned = plans_manager(n_stages=3, features=(8, 12, 16)).plans["configurations"]["3d_fullres"]["architecture"]
    architecture = derived_architecture(load_template(str(tmp_path / "mine.json")), planned)
    network = build_network(architecture, 1, 3, deep_supervision=False)
    assert type(network) is EfficientUNet and dynamic(network)[0].non_local is None
    assert network(torch.randn(1, 1, 8, 8, 8)).shape == (1, 3, 8, 8, 8)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_has_a_template_that_says_what_it_is(name):
    template = load_template(template_name(name))
    assert template.dimensions == ((2,) if name.endswith("DDConv") else (2, 3))
    assert template.arch_kwargs["dynamic"]["method"] in name.lower()


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("dimension", [2, 3])
def test_trains_on_every_kind_of_label(prepared, dimension, labels):
    trainer = prepared("nnUNetTrainerMAGIC2x", dimension, channels=2, **LABELS[labels])
    trainer.initialize()
    before = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    assert np.isfinite(steps(trainer)).all()
    trainer.network.eval()
    with torch.no_grad():
        assert np.isfinite(trainer.validation_step(next(trainer.dataloader_val))["loss"])
    unmoved = [key for key, value in trainer.network.state_dict().items() if torch.equal(value, before[key])]
    assert all(key.startswith("decoder.seg_layers.0") for key in unmoved)


@pytest.mark.parametrize("name", NAMES)
def test_batch_of_one_without_deep_supervision(prepared, name):
    trainer = prepared(name, 2 if name.endswith("DDConv") else 3, batch_size=1)
    trainer.enable_deep_supervision = False
    assert np.isfinite(steps(trainer)).all()
    assert trainer.network.decoder.deep_supervision is False


@pytest.mark.parametrize("name", ["nnUNetTrainerODConv4x", "nnUNetTrainerMAGIC1x"])
def test_a_checkpoint_brings_back_the_temperature_too(prepared, tmp_path, name):
    trainer = prepared(f"{name}_10epochs_4iters")
    trainer.initialize()
    trainer.on_train_epoch_start()
    steps(trainer, 3)
    temperatures = [module for module in trainer.network.modules() if isinstance(module, Temperature)]
    assert all((t.passes_done, t.passes_to_one) == (3, 4) for t in temperatures)  # a tenth of 40 iterations
    assert bool(temperatures) == ("ODConv" in name)
    path = str(tmp_path / "checkpoint.pth")
    trainer.save_checkpoint(path)
    again = prepared(f"{name}_10epochs_4iters")
    again.load_checkpoint(path)
    # Prediction knows no trainer: it builds the network and loads its state.
    predicted = build(name, trainer.plans_manager, 1, 3)
    predicted.load_state_dict(torch.load(path, weights_only=False)["network_weights"])
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        outputs = [network.eval()(x)[0] for network in (trainer.network, again.network, predicted)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("name", ["nnUNetTrainerMAGIC1x", "nnUNetTrainerMAGIC2x"])
def test_the_log_says_where_one_kernel_changes_nothing(prepared, name):
    trainer = prepared(f"{name}_1epochs")
    trainer.initialize()
    trainer.on_train_epoch_start()
    assert ("removes that scale" in Path(trainer.log_file).read_text()) == (name == "nnUNetTrainerMAGIC1x")


def test_annealing_takes_at_most_ten_of_nnunets_epochs(prepared):
    trainer = prepared("nnUNetTrainerDYConv4x")
    trainer.initialize()
    trainer.on_train_epoch_start()
    passes = {module.passes_to_one.item() for module in trainer.network.modules() if isinstance(module, Temperature)}
    assert passes == {2500} and trainer_class("nnUNetTrainerDYConv4x").__doc__


@pytest.mark.parametrize(("template", "name"), [("magic2x", "MAGIC2x"), ("dyconv4x", "DYConv4x")])
def test_a_static_checkpoint_is_upcycled_for_pretraining(prepared, tmp_path, monkeypatch, template, name):
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    monkeypatch.setenv("nnUNet_extTrainer", str(Path(nnunet_dyn.__file__).parent / "ext_trainer"))
    static = prepared("nnUNetTrainer_1epochs_1iters")
    steps(static)
    static.save_checkpoint(str(tmp_path / "static.pth"))
    upcycle_checkpoint(tmp_path / "static.pth", tmp_path / "upcycled.pth", template)
    trainer = prepared(f"nnUNetTrainer{name}_2epochs_10iters")
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(tmp_path / "upcycled.pth"))
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        skips = [network.eval().encoder(x) for network in (static.network, trainer.network)]
    for expected, found in zip(*skips, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    trainer.on_train_epoch_start()  # the pretrained file must not bring its own length of annealing
    temperatures = [module for module in trainer.network.modules() if isinstance(module, Temperature)]
    assert all(module.passes_to_one == 2 for module in temperatures) and bool(temperatures) == (name == "DYConv4x")
    (tmp_path / "broken.pth").write_bytes(b"PK")
    with pytest.raises(JobError, match="is truncated or no checkpoint of nnU-Net v2"):
        upcycle_checkpoint(tmp_path / "broken.pth", tmp_path / "again.pth", template)
    with pytest.raises(ValueError, match="expected one of dynamic convolutions"):
        upcycle_checkpoint(tmp_path / "static.pth", tmp_path / "again.pth", "effb0")
    assert not (tmp_path / "again.pth").exists()
