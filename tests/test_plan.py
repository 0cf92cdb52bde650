"""``nnunet_dyn plan``: from plans that nnU-Net's own planners wrote to configurations that its trainer can train."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from plans import plans_manager

import nnunet_dyn.plans_templates
import nnunet_dyn.trainers
from nnunet_dyn import cli
from nnunet_dyn.architectures.efficient_unet import EfficientUNet, GenericUNet
from nnunet_dyn.planning import build_network, derived_architecture, network_planner
from nnunet_dyn.plans_templates import load_template
from nnunet_dyn.trainers.roi_cascade import DETECTORS

DATASET = "Dataset997_Plans"
PLANNERS = {"nnUNetPlans": ExperimentPlanner, "nnUNetResEncUNetMPlans": nnUNetPlannerResEncM}


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A data set as far as planning reads it; call it with a shape and spacing, and the plans to make."""
    for kind in ("raw", "preprocessed", "results"):
        (tmp_path / kind / DATASET).mkdir(parents=True)
        monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / kind))
    raw, folder = tmp_path / "raw" / DATASET, tmp_path / "preprocessed" / DATASET
    for kind in ("imagesTr", "labelsTr"):
        (raw / kind).mkdir()

    def make(shape=(40, 56, 40), spacing=(1.0, 1.0, 1.0), plans="nnUNetPlans", cases=40, target=8):
        names = [f"case_{number:03d}" for number in range(cases)]
        for name in names:
            (raw / "imagesTr" / f"{name}_0000.nii.gz").touch()
            (raw / "labelsTr" / f"{name}.nii.gz").touch()
        content = {
            "channel_names": {"0": "MR"},
            "labels": {"background": 0, "a": 1, "b": 2},
            "numTraining": cases,
            "file_ending": ".nii.gz",
            "overwrite_image_reader_writer": "SimpleITKIO",
        }
        (raw / "dataset.json").write_text(json.dumps(content))
        fingerprint = {
            "spacings": [list(spacing)] * cases,
            "shapes_after_crop": [list(shape)] * cases,
            "median_relative_size_after_cropping": 1.0,
            "foreground_intensity_properties_per_channel": {},
        }
        (folder / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
        PLANNERS[plans](DATASET, target, plans_name=plans).plan_experiment()
        return folder

    return make


def plan(*arguments) -> int:
    return cli.main(["plan", "-d", "997", *map(str, arguments)])


def read(folder, name="nnUNetDynPlans") -> PlansManager:
    return PlansManager(str(folder / f"{name}.json"))


@pytest.mark.parametrize("source", PLANNERS)
@pytest.mark.parametrize(
    ("shape", "spacing"), [((40, 56, 40), (1.0, 1.0, 1.0)), ((20, 120, 120), (5.0, 1.0, 1.0))], ids=["iso", "aniso"]
)
def test_derived_configurations_train_with_the_stock_trainer(dataset, source, shape, spacing):
    folder = dataset(shape, spacing, source, target=2 if source == "nnUNetPlans" else 8)
    assert plan("-t", "effb0", "fullyeffgeneric", "-p", source, "-gpu_memory_target", 2) == 0
    plans, original = read(folder), read(folder, source)
    assert plans.plans_name == "nnUNetDynPlans"
    expected = {f"{base}_{t}" for base in ("2d", "3d_fullres") for t in ("effb0", "fullyeffgeneric")}
    assert set(plans.available_configurations) - set(original.available_configurations) == expected
    for name in sorted(expected):
        derived, base = plans.get_configuration(name), original.get_configuration(name.rpartition("_")[0])
        for shared in ("data_identifier", "spacing", "normalization_schemes", "resampling_fn_data", "batch_dice"):
            assert derived.configuration[shared] == base.configuration[shared]
        network = nnUNetTrainer.build_network_architecture(plans, derived, 1, 3, True)
        assert type(network) is (GenericUNet if "generic" in name else EfficientUNet)
        with torch.device("meta"):
            outputs = network.to("meta")(torch.empty(1, 1, *derived.patch_size))
        assert len(outputs) == len(derived.pool_op_kernel_sizes) - 1
        assert list(outputs[0].shape[2:]) == list(derived.patch_size)
        assert derived.batch_size >= 2


def test_patch_and_batch_follow_the_networks_memory(dataset):
    folder = dataset((160, 160, 160), cases=200)
    plans = read(folder, "nnUNetPlans")
    voxels = {}
    for target in (4, 8):
        for template in ("effb0", "fullyeffv2l"):
            plan("-t", template, "-c", "3d_fullres", "-gpu_memory_target", target, "--overwrite")
            derived = read(folder).get_configuration(f"3d_fullres_{template}")
            voxels[template, target] = torch.tensor(derived.patch_size).prod().item() * derived.batch_size
            planner = network_planner(plans, load_template(template), target)
            network = nnUNetTrainer.build_network_architecture(read(folder), derived, 1, 3, False)
            feature_maps = network.compute_conv_feature_map_size(derived.patch_size) * derived.batch_size / 2
            limit = planner.UNet_reference_val_3d * target / 8
            # The batch size is a whole number, so half a sample more is nnU-Net's own tolerance.
            assert feature_maps <= limit * (1 + 0.5 / derived.batch_size)
            assert feature_maps > 0.5 * limit
    assert voxels["effb0", 8] > voxels["effb0", 4] > voxels["fullyeffv2l", 4]
    assert voxels["fullyeffv2l", 8] > voxels["fullyeffv2l", 4]


def test_cascades_are_linked_among_themselves(dataset):
    folder = dataset((400, 400, 400))
    assert "3d_cascade_fullres" in read(folder, "nnUNetPlans").available_configurations
    assert plan("-t", "effv2s") == 0
    plans = read(folder)
    lowres, cascade = (plans.get_configuration(f"3d_{kind}_effv2s") for kind in ("lowres", "cascade_fullres"))
    assert lowres.next_stage_names == ["3d_cascade_fullres_effv2s"]
    assert cascade.previous_stage_name == "3d_lowres_effv2s"
    fullres = plans.get_configuration("3d_fullres_effv2s")
    assert cascade.patch_size == fullres.patch_size and cascade.network_arch_init_kwargs["encoder"] == "v2s"
    assert fullres.previous_stage_name is None


def test_plans_grow_and_existing_names_are_refused(dataset, capsys):
    folder = dataset()
    assert plan("-t", "effb0") == 0
    assert plan("-t", "effb1") == 0
    before = (folder / "nnUNetDynPlans.json").read_text()
    assert {"2d_effb0", "2d_effb1", "3d_fullres_effb0"} < set(json.loads(before)["configurations"])
    assert plan("-t", "effb2", "effb1") == 2
    assert "already has 2d_effb1, 3d_fullres_effb1" in capsys.readouterr().err
    assert (folder / "nnUNetDynPlans.json").read_text() == before
    assert plan("-t", "effb1", "--overwrite", "-gpu_memory_target", "0.5") == 0
    assert set(json.loads((folder / "nnUNetDynPlans.json").read_text())["configurations"]) == set(
        json.loads(before)["configurations"]
    )


def test_plans_of_another_origin_are_not_mixed(dataset, capsys):
    folder = dataset()
    assert plan("-t", "effb0") == 0
    dataset((64, 64, 64))
    assert plan("-t", "effb1") == 2
    assert "made from other plans than nnUNetPlans" in capsys.readouterr().err
    assert plan("-t", "effb1", "--overwrite") == 0
    assert "2d_effb0" not in read(folder).available_configurations


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "nnUNetOtherPlans"], "No plans nnUNetOtherPlans in .*; there are: nnUNetPlans. Run"),
        (["-t", "effv3"], "Unknown template 'effv3'. Expected one of "),
        (["-t", "missing.json"], "Cannot read the template missing.json: No such file"),
        (["-o", "nnUNetPlans"], "-o got 'nnUNetPlans'; expected a name other than 'nnUNetPlans'"),
        (["-o", "a__b"], "without double underscore"),
        (["-c", "3d_lowres"], "-c got 3d_lowres; the plans have 2d, 3d_fullres"),
        (["-gpu_memory_target", "0"], "expected gigabytes, more than 0"),
    ],
)
def test_bad_usage_is_one_line_and_writes_nothing(dataset, capsys, arguments, message):
    folder = dataset()
    before = sorted(folder.iterdir())
    assert plan(*(["-t", "effb0"] if "-t" not in arguments else []), *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error)
    assert sorted(folder.iterdir()) == before


def test_unknown_data_set_and_missing_folders(dataset, capsys, monkeypatch):
    dataset()
    assert cli.main(["plan", "-d", "123", "-t", "effb0"]) == 2
    assert "No data set '123'" in capsys.readouterr().err
    monkeypatch.delenv("nnUNet_preprocessed")
    assert plan("-t", "effb0") == 2
    assert "nnUNet_preprocessed is not set; expected a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plans: plans.pop("experiment_planner_used"), "has no experiment_planner_used"),
        (lambda plans: plans["configurations"]["2d"].pop("patch_size"), "configuration 2d has no patch_size"),
        (lambda plans: plans["configurations"].update(x={"inherits_from": "y"}), "configuration x cannot be resolved"),
        (lambda plans: plans.update(configurations=[]), "is not an nnU-Net plans file"),
    ],
)
def test_broken_plans(dataset, capsys, change, message):
    folder = dataset()
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    change(plans)
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    assert plan("-t", "effb0") == 2
    assert message in capsys.readouterr().err


def test_a_missing_or_broken_fingerprint(dataset, capsys):
    folder = dataset()
    (folder / "dataset_fingerprint.json").write_text("{")
    assert plan("-t", "effb0") == 2
    assert "planner cannot start (JSONDecodeError" in capsys.readouterr().err
    (folder / "dataset_fingerprint.json").unlink()
    assert plan("-t", "effb0") == 2
    assert "Fingerprint missing" in capsys.readouterr().err
    assert not (folder / "nnUNetDynPlans.json").exists()


def test_a_configuration_that_changes_its_parents_plan_is_planned_itself(dataset):
    folder = dataset((160, 160, 160))
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["configurations"]["3d_small"] = {"inherits_from": "3d_fullres", "patch_size": [64, 64, 64], "batch_size": 7}
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    assert plan("-t", "effb0", "-c", "3d_fullres", "3d_small") == 0
    small = read(folder).get_configuration("3d_small_effb0")
    fullres = read(folder).get_configuration("3d_fullres_effb0")
    assert (small.patch_size, small.batch_size) == (fullres.patch_size, fullres.batch_size)


def test_plans_of_an_older_nnunet(dataset, capsys):
    folder = dataset()
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    del plans["configurations"]["2d"]["architecture"]
    plans["configurations"]["2d"]["UNet_class_name"] = "PlainConvUNet"
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    assert plan("-t", "effb0") == 2
    assert "made by an older nnU-Net: 2d without an architecture. Plan again" in capsys.readouterr().err


@pytest.mark.parametrize("call", ["mkstemp", "replace"])
def test_a_folder_that_cannot_be_written_keeps_the_old_file(dataset, capsys, monkeypatch, call):
    folder = dataset()
    assert plan("-t", "effb0") == 0
    before = sorted(folder.iterdir()), (folder / "nnUNetDynPlans.json").read_text()

    def fail(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp" if call == "mkstemp" else "os.replace", fail)
    assert plan("-t", "effb1") == 1
    assert "Cannot write" in capsys.readouterr().err
    assert (sorted(folder.iterdir()), (folder / "nnUNetDynPlans.json").read_text()) == before


class TestOwnTemplate:
    CONTENT = load_template("effb0").__dict__ | {"dimensions": [2]}

    def write(self, path, **changes):
        content = {key: self.CONTENT[key] for key in self.CONTENT if key not in ("name", "whole_volume")} | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
        return path

    def test_two_dimensional_one(self, dataset, tmp_path, capsys):
        folder = dataset()
        mine = self.write(tmp_path / "mine.json", arch_kwargs={"encoder": "b1"}, configuration={"batch_size": 3})
        assert plan("-t", mine) == 0
        assert set(read(folder).available_configurations) == {"2d", "3d_fullres", "2d_mine"}
        derived = read(folder).get_configuration("2d_mine")
        assert derived.batch_size == 3 and derived.network_arch_init_kwargs["encoder"] == "b1"
        assert plan("-t", mine, "-c", "3d_fullres", "-o", "Others") == 2
        assert "Template mine works in 2D; got 3d_fullres" in capsys.readouterr().err

    def test_a_spacing_of_its_own_takes_its_own_data(self, dataset, tmp_path, capsys):
        folder = dataset()
        mine = self.write(tmp_path / "mine.json", dimensions=[3], configuration={"spacing": [2.0, 2.0, 2.0]})
        assert plan("-t", mine) == 0
        derived = read(folder).get_configuration("3d_fullres_mine")
        assert derived.data_identifier == "nnUNetDynPlans_3d_fullres_mine"
        assert derived.spacing == [2.0, 2.0, 2.0] and derived.median_image_size_in_voxels == [20.0, 28.0, 20.0]
        assert all(size <= 32 for size in derived.patch_size)
        assert "not there yet: nnUNetv2_preprocess" in capsys.readouterr().out

    def test_a_patch_of_its_own_has_its_own_strides_and_batch(self, dataset, tmp_path):
        folder = dataset((160, 160, 160), cases=200)
        mine = self.write(tmp_path / "mine.json", dimensions=[3], configuration={"patch_size": [32, 64, 64]})
        assert plan("-t", mine) == 0
        derived = read(folder).get_configuration("3d_fullres_mine")
        assert derived.patch_size == [32, 64, 64] and derived.batch_size > 2
        total = [int(torch.tensor(axis).prod()) for axis in zip(*derived.pool_op_kernel_sizes, strict=True)]
        assert total == [8, 16, 16]

    def test_two_that_make_the_same_configuration_are_refused(self, dataset, tmp_path, capsys):
        folder = dataset()
        both = [tmp_path / name for name in ("mine.json", "yours.json")]
        for path in both:
            shutil.copy(Path(nnunet_dyn.plans_templates.__file__).parent / "roi_cascade.json", path)
        assert plan("-t", *both) == 2
        assert "-t got mine and yours, which both make 3d_detect; expected" in capsys.readouterr().err
        assert not (folder / "nnUNetDynPlans.json").exists()

    def test_the_documented_tri_plane_detector(self, tmp_path):
        text = (Path(__file__).parents[1] / "docs" / "roi_cascade.md").read_text(encoding="utf-8")
        path = tmp_path / "tri_plane_sobel.json"
        path.write_text(text.split("<!-- tri-plane template -->\n```json\n")[1].split("```")[0])
        part = load_template(str(path)).parts["3d_detect"]
        planned = plans_manager(3, [32] * 3, n_stages=3, features=(4, 6, 8)).plans["configurations"]["3d_fullres"]
        made = derived_architecture(part, planned["architecture"], [32] * 3, 1)
        options = {"patch_size": [32] * 3, "view": "centre", "filter": "sobel", "pretrained": True}
        assert made["arch_kwargs"] == options
        assert made["network_class_name"] == DETECTORS["nnUNetTrainerROICascadeTriPlane"]

    def test_own_name_and_trainer(self, dataset, tmp_path, capsys):
        dataset()
        (tmp_path / "other").mkdir()
        mine, same = (self.write(tmp_path / part / "mine.json", trainer="nnUNetTrainerX") for part in ("", "other"))
        assert plan("-t", mine, same) == 2
        assert "-t got mine more than once" in capsys.readouterr().err
        assert plan("-t", mine) == 0
        assert "Train the first one with its own trainer" in (out := capsys.readouterr().out)
        assert out.rstrip().endswith("nnUNetv2_train 997 2d_mine 0 -p nnUNetDynPlans -tr nnUNetTrainerX")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"family": ...}, "without family"),
            ({"patch": [1]}, "unknown patch; expected summary"),
            ({"dimensions": [4]}, "dimensions got [4]; expected [2], [3] or [2, 3]"),
            ({"arch_kwargs": []}, "arch_kwargs got []; expected an object"),
            ({"configuration": {"patch": 1}}, "configuration got patch; expected patch_size"),
            ({"network_class_name": "nowhere.Network"}, "expected the dotted path of a class"),
            ({"configuration": {"patch_size": [30, 30]}}, "patch_size got [30, 30]; the nearest that fits"),
            ({"configuration": {"patch_size": [32, 32, 32]}}, "expected 2 numbers"),
            ({"configuration": {"patch_size": "big"}}, "patch_size got 'big'; expected two or three whole numbers"),
            ({"configuration": {"batch_size": "two"}}, "batch_size got 'two'; expected a whole number above 0"),
            ({"dimensions": [[2]]}, "dimensions got [[2]]; expected [2]"),
            ({"arch_kwargs": {"encoder": "b0", "decodr": "plain"}}, "arch_kwargs got decodr, which"),
            ({"arch_kwargs": {"encoder": "b9"}}, "Unknown EfficientNet variant 'b9'"),
            ({"base": "3d_fullres"}, "base and configurations belong together"),
            ({"base": "2d", "configurations": {"x": {"patch": 1}}}, "x got patch; expected network_class_name"),
            ({"base": "2d", "configurations": {"x": {"whole_volume": {"max_voxels": 9}}}}, "got max_voxels; expected"),
            (
                {"base": "2d", "configurations": {"x": {"whole_volume": {"max_voxels": 9, "max_share": 2}}}},
                "max_share got 2; expected a number above 0, at most 1",
            ),
            ({"base": "2d", "configurations": {"x": {"configuration": {"patch": 1}}}}, "configuration got patch"),
            ({"network_class_name": "torch.nn.Linear", "arch_kwargs": {}}, "has no compute_conv_feature_map_size"),
        ],
    )
    def test_the_rules(self, dataset, tmp_path, capsys, changes, message):
        folder = dataset()
        assert plan("-t", self.write(tmp_path / "mine.json", **changes)) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error and "mine" in error
        assert not (folder / "nnUNetDynPlans.json").exists()


def test_the_file_is_readable_like_its_neighbours(dataset):
    folder = dataset()
    plan("-t", "effb0")
    modes = {os.stat(folder / name).st_mode for name in ("nnUNetPlans.json", "nnUNetDynPlans.json")}
    assert len(modes) == 1


def test_dynamic_convolutions_keep_the_planned_patch(dataset):
    folder = dataset()
    assert plan("-t", "magic4x", "-c", "3d_fullres") == 0
    plans = read(folder)
    derived, base = (plans.get_configuration(name) for name in ("3d_fullres_magic4x", "3d_fullres"))
    assert (derived.patch_size, derived.batch_size) == (base.patch_size, base.batch_size)
    network = nnUNetTrainer.build_network_architecture(plans, derived, 1, 3, True)
    kernels = [module.n_kernels for module in network.encoder.modules() if hasattr(module, "n_kernels")]
    assert kernels and set(kernels) == {4}


def test_without_a_template_every_one_that_fits_is_planned(dataset, monkeypatch):
    folder = dataset()
    monkeypatch.setattr("nnunet_dyn.plan.template_names", lambda: ["ddconv", "magic1x"])
    assert plan("-c", "3d_fullres") == 0
    assert {"3d_fullres_magic1x"} == {name for name in read(folder).available_configurations if "x" in name[-1]}
    assert plan("-o", "nnUNetOtherPlans") == 0
    names = set(read(folder, "nnUNetOtherPlans").available_configurations)
    assert names >= {"2d_ddconv", "2d_magic1x", "3d_fullres_magic1x"} and "3d_fullres_ddconv" not in names


def test_a_method_with_its_own_procedure(dataset, capsys):
    folder = dataset((20, 250, 240), (5.0, 1.0, 1.0))
    assert plan("-t", "meddanetv2") == 0
    assert "its own trainer:" in (printed := capsys.readouterr().out)
    assert "2d_meddanetv2 0 -p nnUNetDynPlans -tr nnUNetTrainerMedDANetV2" in printed
    plans = read(folder)
    derived = plans.get_configuration("2d_meddanetv2")
    assert "3d_fullres_meddanetv2" not in plans.available_configurations
    with pytest.raises(ValueError, match=r"Train with -tr nnUNetTrainerMedDANetV2\."):
        nnUNetTrainer.build_network_architecture(plans, derived, 1, 3, True)
    network = nnunet_dyn.trainers.nnUNetTrainerMedDANetV2.build_network_architecture(plans, derived, 1, 3, True)
    assert network.options.crops == (96,) and derived.batch_size >= 2


def test_templates_that_do_not_fit_are_left_out_unless_named(dataset, capsys, monkeypatch):
    folder = dataset((40, 56, 40))
    assert plan("-t", "meddanetv2") == 2
    assert re.search(r"does not fit 2d: .* crop of 96 voxels is larger than the patch", capsys.readouterr().err)
    monkeypatch.setattr("nnunet_dyn.plan.template_names", lambda: ["effb0", "meddanetv2"])
    assert plan("-c", "2d") == 0
    assert "Left out: Template meddanetv2 does not fit 2d" in capsys.readouterr().err
    assert "2d_effb0" in read(folder).available_configurations


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((20, 96, 96), (5.0, 1.0, 1.0)), ((24, 32, 32), (1.0, 1.0, 1.0))],
    ids=["aniso", "tiny"],
)
def test_a_cascade_of_detector_and_segmentor(dataset, capsys, shape, spacing):
    folder = dataset(shape, spacing)
    assert plan("-t", "roi_cascade") == 0
    printed = capsys.readouterr().out
    assert "3d_detect 0 -p nnUNetDynPlans -tr nnUNetTrainerROICascade" in printed
    assert "nnUNetv2_preprocess -d 997 -plans_name nnUNetDynPlans -c 3d_detect\n" in printed
    plans, original = read(folder), read(folder, "nnUNetPlans")
    assert set(plans.available_configurations) - set(original.available_configurations) == {"3d_detect", "3d_roi"}
    detect, roi, fullres = (plans.get_configuration(name) for name in ("3d_detect", "3d_roi", "3d_fullres"))
    assert detect.data_identifier == "nnUNetDynPlans_3d_detect" and roi.data_identifier == fullres.data_identifier
    assert detect.next_stage_names == ["3d_roi"] and roi.previous_stage_name == "3d_detect"
    # The largest volume fits into the patch, which is small enough; all volumes have the same shape here.
    resampled = compute_new_shape(shape, spacing, detect.spacing)
    assert all(size <= length for size, length in zip(resampled, detect.patch_size, strict=True))
    voxels = torch.tensor(detect.patch_size).prod().item()
    assert voxels <= min(128**3, torch.tensor(shape).prod().item() / 8)
    assert voxels > 0.35 * min(128**3, torch.tensor(shape).prod().item() / 8)
    assert (detect.spacing[0] > spacing[0]) == (spacing[0] < 2 * detect.spacing[1])  # finer axes are coarsened first
    assert detect.batch_size >= 2
    # The networks are told what they ask for.
    kwargs = roi.network_arch_init_kwargs
    assert kwargs["image_channels"] == 1 and "network_class" in roi.network_arch_init_kwargs_req_import
    network = build_network(roi.configuration["architecture"], 3, 3, deep_supervision=True)
    assert network.image_channels == 1
    assert all(size % step == 0 for size, step in zip(roi.patch_size, network.divisor, strict=True))
    kwargs = detect.network_arch_init_kwargs
    assert kwargs["patch_size"] == detect.patch_size
    network = build_network(detect.configuration["architecture"], 1, 3, deep_supervision=False)
    with torch.no_grad():
        assert network.raw(torch.zeros(1, 1, *detect.patch_size))["mask"].shape[:2] == (1, 3)
    with pytest.raises(ValueError, match=r"Train with -tr nnUNetTrainerROICascade\."):
        nnUNetTrainer.build_network_architecture(plans, detect, 1, 3, True)


def test_the_largest_volume_sets_the_whole_one(dataset):
    """Volumes of other shapes: the patch has the longest side of each axis."""
    folder = dataset((64, 64, 64))
    fingerprint = json.loads((folder / "dataset_fingerprint.json").read_text())
    fingerprint["shapes_after_crop"][3:5] = [[40, 96, 64], [80, 48, 48]]
    fingerprint["spacings"][4] = [1.5, 1.0, 1.0]  # 120 mm
    (folder / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    assert plan("-t", "roi_cascade") == 0
    detect = read(folder).get_configuration("3d_detect")
    needed = compute_new_shape((120, 96, 64), (1.0, 1.0, 1.0), detect.spacing)
    assert all(size <= length for size, length in zip(needed, detect.patch_size, strict=True))
    assert torch.tensor(detect.patch_size).prod() <= 120 * 96 * 64 / 8


def test_a_cascade_starts_from_its_base_only(dataset, capsys, monkeypatch):
    folder = dataset()
    assert plan("-t", "roi_cascade", "-c", "2d") == 2
    assert "Template roi_cascade starts from 3d_fullres; got 2d. Choose" in capsys.readouterr().err
    monkeypatch.setattr("nnunet_dyn.plan.template_names", lambda: ["magic1x", "roi_cascade"])
    assert plan("-c", "2d") == 0
    assert "3d_detect" not in read(folder).available_configurations
    assert plan("-t", "roi_cascade") == 0
    assert plan("-t", "roi_cascade") == 2
    assert "already has 3d_detect, 3d_roi" in capsys.readouterr().err
    dataset((8, 12, 12))
    assert plan("-t", "roi_cascade", "-o", "Small") == 2
    assert "Such small volumes need no detector: train 3d_fullres" in capsys.readouterr().err
