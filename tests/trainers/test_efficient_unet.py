"""What each trainer builds from plans, and how it trains, through nnU-Net's own steps on a small data set."""

import inspect
import json
import pickle

import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import save_json
from plans import plans_manager
from torch import nn

import nnunet_dyn.trainers
from nnunet_dyn.architectures import imagenet
from nnunet_dyn.architectures.efficient_unet import EfficientUNet, GenericUNet
from nnunet_dyn.trainers import trainer_names

BASE_NAMES = [name for name in trainer_names() if not name.endswith("_ImageNet")]


def trainer_class(name):
    return getattr(nnunet_dyn.trainers, name)


def build(name, plans, channels=2, heads=3, deep_supervision=True):
    configuration = plans.get_configuration(plans.available_configurations[0])
    return trainer_class(name).build_network_architecture(plans, configuration, channels, heads, deep_supervision)


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


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A factory of trainers on a data set that is preprocessed as nnU-Net leaves it."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    torch.set_num_threads(1)

    def make(name, dimension=3, channels=1, labels=None, regions_class_order=None, **plan):
        labels = labels or {"background": 0, "organ": 1, "tumour": 2}
        plans = plans_manager(dimension, n_stages=3, features=(8, 12, 16), patch_size=[16] * dimension, **plan)
        dataset = {
            "channel_names": {str(channel): "CT" for channel in range(channels)},
            "labels": labels,
            "numTraining": 2,
            "file_ending": ".nii.gz",
        }
        if regions_class_order:
            dataset["regions_class_order"] = regions_class_order
        folder = tmp_path / "preprocessed" / "Dataset999_Test" / "nnUNetPlans"
        folder.mkdir(parents=True, exist_ok=True)
        manager = plans.get_label_manager(dataset)
        sampled = list(manager.foreground_regions if manager.has_regions else manager.foreground_labels)
        if manager.has_ignore_label:
            sampled.append([-1, *manager.all_labels])
        rng = np.random.default_rng(0)
        highest = max(max(v) if isinstance(v, (list, tuple)) else v for v in labels.values())
        for case in ("case_0", "case_1"):
            if (folder / f"{case}.pkl").exists():
                continue
            segmentation = np.zeros((1, 20, 20, 20), np.int16)
            for label in range(1, highest + 1):
                segmentation[0, 4 * label - 2 : 4 * label + 1, 5:15, 5:15] = label
            image = segmentation + rng.normal(0, 0.1, (channels, 20, 20, 20))
            locations = DefaultPreprocessor._sample_foreground_locations(segmentation, sampled)
            image = image.astype(np.float32)
            blocks, chunks = comp_blosc2_params(image.shape, (16,) * 3, image.itemsize)
            seg_blocks, seg_chunks = comp_blosc2_params(segmentation.shape, (16,) * 3, segmentation.itemsize)
            nnUNetDatasetBlosc2.save_case(
                image,
                segmentation,
                {"class_locations": locations},
                str(folder / case),
                chunks=chunks,
                blocks=blocks,
                chunks_seg=seg_chunks,
                blocks_seg=seg_blocks,
            )
        save_json(plans.plans, str(tmp_path / "preprocessed" / "Dataset999_Test" / "nnUNetPlans.json"))
        configuration = plans.available_configurations[0]
        return trainer_class(name)(
            json.loads(json.dumps(plans.plans)) | {"continue_training": False},
            configuration,
            "all",
            dataset,
            torch.device("cpu"),
        )

    return make


def steps(trainer, count=1):
    """Initialise ``trainer`` if need be and run ``count`` training steps on nnU-Net's own batches."""
    if not trainer.was_initialized:
        trainer.initialize()
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    trainer.network.train()
    return [trainer.train_step(next(trainer.dataloader_train))["loss"] for _ in range(count)]


LABELS = {
    "classes": {"labels": {"background": 0, "organ": 1, "tumour": 2}},
    "regions": {
        "labels": {"background": 0, "whole": [1, 2], "tumour": [2]},
        "regions_class_order": [1, 2],
    },
    "ignore": {"labels": {"background": 0, "organ": 1, "ignore": 2}},
}


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
