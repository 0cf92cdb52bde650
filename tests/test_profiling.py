"""``nnunet_dyn profile`` and ``nnunet_dyn list``."""

import json
import re

import models
import pytest
import torch
from plans import build

from nnunet_dyn import cli, listing, profiling
from nnunet_dyn.accounting import count_operations, count_parameters, inference_memory, training_memory
from nnunet_dyn.inference import Predictor
from nnunet_dyn.planning import derived_architecture
from nnunet_dyn.plans_templates import load_template, template_names
from nnunet_dyn.trainers.catalogue import template_name, trainer_names


def profile(*arguments) -> int:
    return cli.main(["profile", *map(str, arguments)])


def test_a_patch_beside_stock(tmp_path, capsys):
    file = tmp_path / "profile.json"
    arguments = ["--patch", 32, 32, 32, "--channels", 2, "--classes", 3, "-tr", "nnUNetTrainerEffB0", "--rounds", 1]
    assert profile(*arguments, "--json", file) == 0
    printed = capsys.readouterr().out
    stock, ours = json.loads(file.read_text())["profiles"]
    assert stock["trainer"] == "nnUNetTrainer" and ours["trainer"] == "nnUNetTrainerEffB0"
    assert set(stock["ratios"].values()) == {1.0}
    shape = (1, 2, 32, 32, 32)
    supervised, network = (
        build("EfficientUNet-b0", 2, 3, n_stages=4, features=(32, 64, 128, 256), deep_supervision=on)
        for on in (True, False)
    )
    counted = count_operations(network, shape)
    assert ours["parameters"] == count_parameters(network) and ours["macs"] == counted.total
    assert ours["memory_training"] == training_memory(supervised, shape)
    assert ours["memory_inference"] == inference_memory(network, shape)
    assert ours["not_counted"] == counted.not_counted and "aten::silu" in counted.not_counted
    assert ours["ratios"]["macs"] == pytest.approx(ours["macs"] / stock["macs"], abs=1e-4)
    assert ours["seconds"] > 0 and ours["stock_seconds"] > 0 and ours["ratios"]["seconds"] > 0
    assert "nnUNetTrainerEffB0" in printed and "Not counted among the MACs: " in printed and "silu" in printed


def test_two_dimensions_and_no_latency(tmp_path):
    file = tmp_path / "profile.json"
    assert profile("--patch", 64, 64, "-tr", "nnUNetTrainerFullyEffGeneric", "--rounds", 0, "--json", file) == 0
    rows = json.loads(file.read_text())["profiles"]
    assert [row["seconds"] for row in rows] == [None, None]
    assert rows[1]["patch_size"] == [64, 64] and rows[1]["configuration"] == "2d"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "neither a data set with a configuration"),
        (["--patch", 30, 30, 30], r"axes divisible by the strides, such as \[32, 32, 32\]"),
        (["--patch", 64], "expected two or three numbers of at least 8"),
        (["--patch", 64, 64, "--classes", 1], "expected at least 1 channel and 2 classes"),
        (["--patch", 64, 64, "-d", 5], "--patch beside -d or -c"),
        (["--patch", 64, 64, "--rounds", -1], "--rounds got -1"),
        (["--patch", 64, 64, "--json", "nowhere/at/all.json"], "expected a file in a folder that exists"),
        (
            ["--patch", 16, 16, "-tr", "nnUNetTrainerEffB9", "--rounds", 0],
            "nnU-Net finds no trainer nnUNetTrainerEffB9",
        ),
    ],
)
def test_bad_usage(arguments, message, capsys):
    assert profile(*arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_cuda_without_a_device(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert profile("--patch", 16, 16, "--device", "cuda") == 1
    assert "no CUDA device here" in capsys.readouterr().err


def test_a_derived_configuration_beside_the_one_it_comes_from(tmp_path, monkeypatch):
    """Also in a cascade, whose second stage has more input channels."""
    folder = tmp_path / "preprocessed" / "Dataset996_Profile"
    folder.mkdir(parents=True)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    (folder / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 1}})
    )
    base = profiling.planned_configuration((32, 32, 32))
    derived = derived_architecture(load_template("effb0"), base["architecture"])
    plans = {
        "dataset_name": folder.name,
        "plans_name": "nnUNetPlans",
        "experiment_planner_used": "ExperimentPlanner",
        "original_median_shape_after_transp": [32, 32, 32],
        "label_manager": "LabelManager",
        "configurations": {
            "3d_lowres": base,
            "3d_fullres": base,
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
            "3d_fullres_effb0": {"inherits_from": "3d_fullres", "architecture": derived, "patch_size": [16, 32, 32]},
            "3d_cascade_fullres_effb0": {"inherits_from": "3d_fullres_effb0", "previous_stage": "3d_lowres"},
        },
    }
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans, default=int))
    file = tmp_path / "profile.json"
    arguments = ["-d", "Dataset996_Profile", "-c", "3d_cascade_fullres_effb0", "--rounds", 0, "--json", file]
    assert profile(*arguments) == 0
    stock, ours = json.loads(file.read_text())["profiles"]
    assert stock["configuration"] == "3d_cascade_fullres" and ours["configuration"] == "3d_cascade_fullres_effb0"
    assert stock["trainer"] == ours["trainer"] == "nnUNetTrainer" and ours["patch_size"] == [16, 32, 32]
    network = build("EfficientUNet-b0", 2, 2, n_stages=4, features=(32, 64, 128, 256))
    assert ours["parameters"] == count_parameters(network)  # two channels: the image and the previous stage's label


def test_planned_configuration_is_nnunets_own():
    arch = profiling.planned_configuration((128, 128, 128))["architecture"]["arch_kwargs"]
    assert arch["features_per_stage"] == [32, 64, 128, 256, 320, 320]
    assert [list(s) for s in arch["strides"]] == [[1, 1, 1]] + [[2, 2, 2]] * 5
    assert profiling.planned_configuration((512, 512))["architecture"]["arch_kwargs"]["n_stages"] == 8


def test_table1_is_printed_beside_the_reproduced_one(monkeypatch, tmp_path, capsys):
    rows = [row for row in profiling.read_table1() if row["name"] in ("GenericUNet", "FullyEfficientUNet-b4")]
    monkeypatch.setattr(profiling, "read_table1", lambda: rows)
    assert profile("--table1", "--json", tmp_path / "t.json") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[2:] if " | " in line}
    generic, b4 = lines["GenericUNet"], lines["FullyEfficientUNet-b4"]
    assert "0.958T | 0.958" in generic and "differs" not in generic
    assert b4.endswith("differs: flops_net, flops_dec, params_net, params_dec")
    written = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert {row["name"]: row["reproduced"]["flops_net"] for row in written}["GenericUNet"] == 958481186816


def test_list_has_every_trainer_and_template_and_its_cost(capsys, monkeypatch):
    monkeypatch.setattr(listing, "REFERENCE_PATCHES", {2: (64, 64), 3: (32, 32, 32)})
    found = list(listing.methods())
    monkeypatch.setattr(listing, "methods", lambda: iter(found))
    assert cli.main(["list", "--json"]) == 0
    methods = json.loads(capsys.readouterr().out)["methods"]
    assert methods[0]["trainers"] == ["nnUNetTrainer"] and methods[0]["template"] is None
    assert {name for method in methods[1:] for name in method["trainers"]} == set(trainer_names())
    assert {method["template"] for method in methods[1:]} == set(template_names())
    by_template = {method["template"]: method for method in methods}
    network = build("FullyEfficientUNet-v2s", n_stages=4, features=(32, 64, 128, 256), num_classes=4)
    assert by_template["fullyeffv2s"]["parameters"] == count_parameters(network)
    assert by_template["effb0"]["macs"] < by_template["effb7"]["macs"]
    assert cli.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in trainer_names())


@pytest.mark.parametrize("trainer", trainer_names())
def test_every_trainer_has_a_template_that_says_what_it_is(trainer):
    template = load_template(template_name(trainer))
    assert callable(template.network_class)
    assert template.paper and template.summary
    assert template.trainer is None or trainer.startswith(template.trainer)


def test_only_trainers_for_the_dimension_are_profiled_by_default(monkeypatch):
    monkeypatch.setattr(profiling, "trainer_names", lambda: ["nnUNetTrainerMAGIC1x", "nnUNetTrainerDDConv"])
    assert profiling._trainers(None, 3) == ["nnUNetTrainer", "nnUNetTrainerMAGIC1x"]
    assert profiling._trainers(None, 2) == ["nnUNetTrainer", "nnUNetTrainerMAGIC1x", "nnUNetTrainerDDConv"]


def test_a_dynamic_convolution_is_counted_whole(tmp_path):
    """In 2D, where DDConv has a deformable convolution that belongs to torchvision."""
    assert profile("--patch", 32, 32, "-tr", "nnUNetTrainerDDConv", "nnUNetTrainerMAGIC4x", "--rounds", 0, "--json",
                   tmp_path / "p.json") == 0  # fmt: skip
    stock, ddconv, magic = json.loads((tmp_path / "p.json").read_text())["profiles"]
    assert ddconv["macs"] > stock["macs"] and 1 < magic["macs"] / stock["macs"] < 1.2
    assert all("conv" not in name and "mm" not in name for name in (*ddconv["not_counted"], *magic["not_counted"]))


@pytest.fixture(scope="module")
def deciding(tmp_path_factory):
    """A model of Med-DANet V2 for 32×24 slices, and a folder with one case."""
    folder = tmp_path_factory.mktemp("profile")
    coarse = torch.randn((6, 1, 5, 5), generator=torch.Generator().manual_seed(0))
    slices = torch.nn.functional.interpolate(coarse, (40, 40), mode="bicubic") * 3
    models.write_deciding_model(folder / "model", slices[..., :32, :24], spacing=(3, 1, 1))
    models.write_cases(folder / "images", {"case": slices.transpose(0, 1).numpy()}, (3, 1, 1))
    return folder


def test_a_network_that_decides_along_stated_paths(tmp_path, capsys):
    file = tmp_path / "profile.json"
    trainer = "nnUNetTrainerMedDANetV2"
    assert profile("--patch", 128, 128, "-tr", trainer, "--rounds", 1, "--json", file) == 0
    stock, ours = json.loads(file.read_text())["profiles"]
    assert stock["paths"] == []
    everything, skipped = ours["paths"]
    assert [path["path"] for path in ours["paths"]] == ["everything on", "everything skipped"]
    assert everything["macs"] > 50 * skipped["macs"] > 0  # the policy alone
    # A whole slice has no place for a crop to be looked for, by a network about as large as the policy.
    assert everything["macs"] == everything["macs_by_bits"]
    assert everything["macs"] + skipped["macs"] == pytest.approx(ours["macs"], rel=0.005)
    assert skipped["ratios"]["macs"] == pytest.approx(skipped["macs"] / stock["macs"], abs=1e-4)
    assert everything["seconds"] > skipped["seconds"] > 0 and everything["seconds"] == ours["seconds"]
    printed = capsys.readouterr().out
    assert re.search(r"\n  everything skipped +0\.0 G +0\.\d\d× +0\.\d+ s +\d\.\d\d×\n", printed)
    assert "Paths of networks that decide" in printed


@pytest.mark.parametrize("rounds", [0, 2])
def test_the_mean_over_images_of_a_trained_network(deciding, tmp_path, capsys, rounds):
    file = tmp_path / "profile.json"
    images = deciding / "images"
    given = images if rounds else images / "case_0000.nii.gz"
    assert profile("-m", deciding / "model", "-i", given, "--rounds", rounds, "--json", file) == 0
    stock, ours = json.loads(file.read_text())["profiles"]
    assert (stock["trainer"], stock["configuration"]) == ("nnUNetTrainer", "2d")
    assert (ours["trainer"], ours["configuration"]) == ("nnUNetTrainerMedDANetV2", "2d_meddanetv2")
    everything, skipped, mean = ours["paths"]
    predictor = Predictor.from_folder(deciding / "model", [0], device="cpu", use_mirroring=False)
    (outcome,) = predictor.predict_files(images, tmp_path / "out")
    totals = outcome.decisions.totals()
    assert mean["path"] == "1 image" and mean["tiles"] == totals["tiles"] == 6 * 2 * 3
    assert mean["shares"] == pytest.approx(totals["shares"], abs=1e-4) and len(mean["shares"]) > 1
    assert mean["macs_by_bits"] == pytest.approx(totals["mean_macs"], rel=1e-6)
    assert skipped["macs"] < mean["macs_by_bits"] < mean["macs"] < everything["macs"]
    assert (mean["seconds"] is None) == (rounds == 0) and ("seconds" in mean["ratios"]) == (rounds > 0)
    printed = capsys.readouterr().out
    assert re.search(r"36 tiles: .*\d+ % skip.*; MACs × bits / 32 \d\.\d\d×", printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--patch", 64, 64, "-i", "images"], "Got -i or -f without -m; .* untrained network decides says nothing"),
        (["-m", "{model}", "-d", 5], "Got -m beside -d"),
        (["-m", "{model}", "-i", "{images}/case.nii.gz"], "expected one folder, or files named as case_0000"),
        (["-m", "{model}", "-f", 3], "there are folds: 0"),
        (["-m", "nowhere"], "No model folder nowhere"),
    ],
)
def test_bad_usage_of_a_model(arguments, message, deciding, capsys):
    places = {"model": deciding / "model", "images": deciding / "images"}
    assert profile(*(str(argument).format(**places) for argument in arguments)) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("images", [False, True])
def test_an_exported_model_is_one_line(deciding, tmp_path, capsys, images):
    (tmp_path / "manifest.json").write_text("{}")
    assert profile("-m", tmp_path, *["-i", deciding / "images"] * images) == 2
    shown = capsys.readouterr().err
    assert "an exported model" in shown and "Name the one that it was exported from." in shown
    assert shown.count("\n") == 1


def test_images_for_a_network_that_does_not_decide(deciding, tmp_path, capsys):
    model = models.write_model(tmp_path / "model", dimension=2, patch_size=(16, 16))
    assert profile("-m", model, "-i", deciding / "images") == 2
    assert "nnUNetTrainer, which computes the same on every image" in capsys.readouterr().err
    assert profile("-m", model, "--rounds", 0) == 0
    assert "nnUNetTrainer" in capsys.readouterr().out
