import os
import pickle
import subprocess
import sys

import pytest

import nnunet_dyn.trainers
from nnunet_dyn.trainers import suggest, trainer_names

CONTRACT = [
    *(f"nnUNetTrainer{decoder}B{index}" for decoder in ("Eff", "FullyEff") for index in range(8)),
    *(f"nnUNetTrainer{decoder}V2{size}" for decoder in ("Eff", "FullyEff") for size in "SML"),
    "nnUNetTrainerFullyEffGeneric",
    *(f"nnUNetTrainerMAGIC{kernels}x" for kernels in (1, 2, 4)),
    *(f"nnUNetTrainer{peer}" for peer in ("DYConv4x", "CondConv8x", "ODConv4x", "DCD", "DDConv")),
    *(f"nnUNetTrainerMedDANetV2{ablation}" for ablation in ("", "SpatialOnly", "QuantOnly")),
    *(f"nnUNetTrainerROICascade{detector}" for detector in ("", "TriPlane")),
]


def get(name):
    return getattr(nnunet_dyn.trainers, name)


def test_every_promised_name_exists():
    assert len(CONTRACT) == 36 and set(CONTRACT) <= set(trainer_names())
    assert {name.removesuffix("_ImageNet") for name in trainer_names()} == set(CONTRACT)
    assert all("__" not in name for name in trainer_names())  # nnU-Net splits result folders there


@pytest.mark.parametrize(
    "name",
    ["nnUNetTrainerEffV2S", "nnUNetTrainerFullyEffGeneric", "nnUNetTrainerEffB0_ImageNet", "nnUNetTrainerMAGIC4x"],
)
@pytest.mark.parametrize("length", ["", "_20epochs", "_5iters", "_2epochs_10iters"])
def test_a_name_is_one_picklable_class(name, length):
    trainer = get(name + length)
    assert trainer is get(name + length) is pickle.loads(pickle.dumps(trainer))
    assert trainer.__name__ == name + length and issubclass(trainer, get(name))


def test_lengths_are_read_from_the_name():
    trainer = get("nnUNetTrainerEffV2S_20epochs_7iters")
    assert (trainer.planned_epochs, trainer.planned_iterations) == (20, 7)
    assert (get("nnUNetTrainerEffV2S").planned_epochs, get("nnUNetTrainerEffV2S_7iters").planned_epochs) == (None, None)


def test_the_stock_trainer_gets_lengths_but_not_its_own_name():
    trainer = get("nnUNetTrainer_2epochs_3iters")
    assert (trainer.planned_epochs, trainer.planned_iterations) == (2, 3)
    assert "build_network_architecture" not in trainer.__dict__
    with pytest.raises(AttributeError):
        get("nnUNetTrainer")


@pytest.mark.parametrize(
    "name",
    [
        "nnUNetTrainerEffV2X",
        "nnUNetTrainerEffB8",
        "nnUNetTrainerEffV2S_0epochs",
        "nnUNetTrainerEffV2S_05epochs",
        "nnUNetTrainerEffV2S_5iters_5epochs",
        "nnUNetTrainerEffV2S_5epochs_5epochs",
        "nnUNetTrainerEffV2S_",
        "nnUNetTrainerEffV2S_5epoch",
        "nnUNetTrainerFullyEffGeneric_ImageNet",
        "xnnUNetTrainerEffV2S",
        "nnUNetTrainerEffV2S\n",
        "",
        "pytestmark",
    ],
)
def test_any_other_name_is_an_attribute_error(name):
    with pytest.raises(AttributeError):
        get(name)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("nnUNetTrainerEffV2s", "nnUNetTrainerEffV2S"),
        ("nnunettrainereffb0", "nnUNetTrainerEffB0"),
        ("nnUNetTrainerEffV2S_5epoch", "nnUNetTrainerEffV2S_5epochs"),
        ("nnUNetTrainerEffV2S_5iters_3epochs", "nnUNetTrainerEffV2S_3epochs_5iters"),
        ("nnUNetTrainerFulyEffB3_ImageNet_9epochs", "nnUNetTrainerFullyEffB3_ImageNet_9epochs"),
    ],
)
def test_suggestions(typed, meant):
    assert suggest(typed)[0] == meant and get(meant)


def test_no_suggestion_for_something_else():
    assert suggest("nnUNetTrainerDiceCELoss_noSmooth") == [] == suggest("MyTrainer")


def test_listing_names_needs_no_torch():
    code = "import sys, nnunet_dyn.trainers as t; t.trainer_names(); t.suggest('x'); print('torch' in sys.modules)"
    environment = {**os.environ, "NNUNET_DYN_REGISTER": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "False"
