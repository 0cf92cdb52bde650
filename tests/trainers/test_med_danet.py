"""Med-DANet V2's trainers: what they build, their phases, calibration, and resuming, through nnU-Net's own steps."""

import json
from pathlib import Path

import ddp_med_danet_worker
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerNoDeepSupervision import (
    nnUNetTrainerNoDeepSupervision,
)
from plans import plans_manager
from torch import nn

import nnunet_dyn.trainers
from nnunet_dyn.architectures.med_danet import NEVER, PARTS, SCHEDULES, Decision, MedDANetV2, ModifiedUNet
from nnunet_dyn.planning import derived_architecture
from nnunet_dyn.plans_templates import load_template
from nnunet_dyn.safety import Evidence
from nnunet_dyn.trainers.med_danet import mean_costs, plot_costs

NAME = "nnUNetTrainerMedDANetV2"
LABELS = {
    "classes": {"labels": {"background": 0, "organ": 1, "tumour": 2}},
    "regions": {"labels": {"background": 0, "whole": [1, 2], "tumour": [2]}, "regions_class_order": [1, 2]},
    "ignore": {"labels": {"background": 0, "organ": 1, "ignore": 2}},
}
OPTIONS = {"policy_space": ["skip", 16, "whole"]}


def trainer_class(name):
    return getattr(nnunet_dyn.trainers, name) if isinstance(name, str) else name


def with_template(plans, **options):
    """``plans`` with its configuration replaced by that of the template, for a small U-Net."""
    configuration = plans.plans["configurations"]["2d"]
    architecture = derived_architecture(load_template("meddanetv2"), configuration["architecture"])
    architecture["arch_kwargs"] |= {"med_danet": OPTIONS | options, "base_features": 4, "blocks": [1, 1, 1]}
    configuration["architecture"] = architecture
    return plans


def build(name, plans, channels=1, heads=2, deep_supervision=True):
    configuration = plans.get_configuration(plans.available_configurations[0])
    return trainer_class(name).build_network_architecture(plans, configuration, channels, heads, deep_supervision)


# --- what is built ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "choices", "bits"),
    [
        ("", ("skip", 96, "whole"), (8, 16)),
        ("SpatialOnly", ("skip", 96, "whole"), (32,)),
        ("QuantOnly", ("whole",), (8, 16)),
    ],
)
def test_each_name_builds_its_row_of_table_3a(suffix, choices, bits):
    network = build(NAME + suffix, plans_manager(2, patch_size=[128, 128], n_stages=6))
    assert isinstance(network, MedDANetV2) and isinstance(network.backbone, ModifiedUNet)
    assert (network.options.policy_space, network.options.bits) == (choices, bits)
    assert network.backbone.encoder.output_channels == [16, 32, 64, 128] and network.divisor == (8, 8)


def test_the_configurations_own_network_and_options_are_kept():
    plans = with_template(plans_manager(2, patch_size=[32, 32], n_stages=3), bits=[4, 8])
    network = build(NAME, plans)
    assert network.options.bits == (4, 8) and network.options.crops == (16,)
    assert network.backbone.encoder.output_channels == [4, 8, 16]
    assert build(NAME + "SpatialOnly", plans).options.bits == (32,)
    assert load_template("meddanetv2").arch_kwargs["med_danet"]["policy_space"] == ["skip", 96, "whole"]


def test_it_refuses_what_it_cannot_serve():
    with pytest.raises(ValueError, match=r"patches of \(64, 64, 64\) voxels; expected a 2D one, .* configuration 2d"):
        build(NAME, plans_manager(3))
    with pytest.raises(ValueError, match=r"crop of 96 voxels is larger than the patch, \(64, 64\)"):
        build(NAME, plans_manager(2, patch_size=[64, 64], n_stages=4))
    with pytest.raises(ValueError, match="cost_weight got -1; expected 0 or more"):
        build(NAME, with_template(plans_manager(2, patch_size=[32, 32], n_stages=3), cost_weight=-1))
    with pytest.raises(ValueError, match="schedule got 'mine'; expected one of paper, published, guided"):
        build(NAME, with_template(plans_manager(2, patch_size=[32, 32], n_stages=3), schedule="mine"))
    with pytest.raises(ValueError, match="guidance got 0; expected more than 0 for the schedule 'guided'"):
        build(NAME, with_template(plans_manager(2, patch_size=[32, 32], n_stages=3), schedule="guided", guidance=0))


@pytest.mark.parametrize(
    "other", ["nnUNetTrainerEffB0", "nnUNetTrainerMAGIC1x", "nnUNetTrainer_2epochs", nnUNetTrainer]
)
def test_another_trainer_is_refused_with_the_name_of_the_right_one(other):
    plans = with_template(plans_manager(2, patch_size=[32, 32], n_stages=3))
    with pytest.raises(ValueError, match=rf"Train with -tr {NAME}\."):
        trainer_class(other).build_network_architecture(plans, plans.get_configuration("2d"), 1, 2, True)


# --- training ---------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A factory of trainers on two preprocessed cases of eight 40×36 slices, the first four without foreground."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    torch.set_num_threads(1)

    def make(name=NAME, kind="classes", channels=1, fill=None, **options):
        torch.manual_seed(0)
        plans = with_template(plans_manager(2, n_stages=3, patch_size=[32, 32], batch_size=4), **options)
        dataset = {"channel_names": {str(c): "CT" for c in range(channels)}, "numTraining": 2, "file_ending": ".nii.gz"}
        dataset |= LABELS[kind]
        base = tmp_path / "preprocessed" / "Dataset999_Test"
        folder = base / "nnUNetPlans"
        folder.mkdir(parents=True, exist_ok=True)
        manager = plans.get_label_manager(dataset)
        sampled = list(manager.foreground_regions if manager.has_regions else manager.foreground_labels)
        if manager.has_ignore_label:
            sampled.append([-1, *manager.all_labels])
        rng = np.random.default_rng(0)
        for case in ("case_0", "case_1"):
            labels = np.zeros((1, 8, 40, 36), np.int16)
            labels[0, 4:, 6:14, 20:30], labels[0, 6:, 8:11, 22:25] = 1, 2
            if fill is not None:
                labels[:] = fill
            image = (labels + rng.normal(0, 0.1, (channels, 8, 40, 36))).astype(np.float32)
            layout = {}
            for suffix, array in (("", image), ("_seg", labels)):
                blocks, chunks = comp_blosc2_params(array.shape, (32, 32), array.itemsize)
                layout |= {f"blocks{suffix}": blocks, f"chunks{suffix}": chunks}
            locations = DefaultPreprocessor._sample_foreground_locations(labels, sampled)
            if not (folder / f"{case}.pkl").exists():
                properties = {"class_locations": locations}
                nnUNetDatasetBlosc2.save_case(image, labels, properties, str(folder / case), **layout)
        save_json(plans.plans, str(base / "nnUNetPlans.json"))
        save_json({}, str(base / "dataset_fingerprint.json"))
        content = json.loads(json.dumps(plans.plans)) | {"continue_training": False}
        return trainer_class(name)(content, "2d", "all", dataset, torch.device("cpu"))

    return make


def start(trainer, epoch=0):
    """``trainer`` as it is at the start of ``epoch``."""
    if not trainer.was_initialized:
        trainer.initialize()
    if trainer.dataloader_train is None:
        trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    trainer.current_epoch = epoch
    log = trainer.logger.local_logger.my_fantastic_logging
    log["lrs"] = [0.0] * epoch
    trainer.on_train_epoch_start()
    return trainer


def test_a_trainer_without_deep_supervision_is_refused_before_it_trains_or_validates(prepared):
    trainer = prepared(nnUNetTrainerNoDeepSupervision)
    for command in (trainer.on_train_start, trainer.perform_actual_validation):
        with pytest.raises(AttributeError, match=rf"sets deep supervision; .* Train with -tr {NAME}\."):
            command()
    assert not hasattr(trainer.network, "decoder")


def state(trainer):
    return {key: value.clone() for key, value in trainer.network.state_dict().items()}


def changed_parts(trainer, before):
    changed = {
        key.partition(".")[0]
        for key, value in trainer.network.state_dict().items()
        if not torch.equal(value, before[key])
    }
    names = {"backbone": "segmentation", "crop_tail": "segmentation"}
    return {names.get(name, name) for name in changed} - {"is_quantised"}


def count_calls(module):
    """A list that grows with every forward pass of ``module``."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 350])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_phases_divide_any_number_of_epochs(prepared, epochs, schedule):
    trainer = prepared(f"{NAME}_{epochs}epochs", schedule=schedule)
    trainer.initialize()
    indices = [trainer.phase_index(epoch) for epoch in range(epochs)]
    last = len(SCHEDULES[schedule]) - 1
    assert indices == sorted(indices) and indices[-1] == last
    if epochs == 350:
        lengths = [indices.count(index) for index in range(last + 1)]
        expected = {"paper": [200, 100, 50], "published": [150, 150, 50], "guided": [280, 42, 14, 14]}
        assert lengths == expected[schedule]


@pytest.mark.parametrize(
    ("schedule", "lengths"), [("paper", [200, 100, 50]), ("published", [175, 175]), ("guided", [210, 70, 70])]
)
def test_phases_without_anything_to_learn_leave_their_epochs_to_the_others(prepared, schedule, lengths):
    trainer = prepared(f"{NAME}QuantOnly_350epochs", schedule=schedule)
    trainer.initialize()
    indices = [trainer.phase_index(epoch) for epoch in range(350)]
    assert [indices.count(index) for index in range(len(trainer.schedule))] == lengths


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_phase_changes_what_learns_in_it_and_nothing_else(prepared, schedule):
    trainer = prepared(f"{NAME}_70epochs_1iters", schedule=schedule)
    trainer.initialize()
    batch = None
    for index, phase in enumerate(SCHEDULES[schedule]):
        epoch = next(epoch for epoch in range(70) if trainer.phase_index(epoch) == index)
        start(trainer, epoch)
        batch = batch or next(trainer.dataloader_train)
        before = state(trainer)
        calls = count_calls(trainer.network.backbone.encoder.stages[0])
        assert np.isfinite(trainer.train_step(batch)["loss"])
        assert bool(calls) == phase.segments
        assert changed_parts(trainer, before) == phase.learns, phase.name
        rates = {group["part"]: group["lr"] for group in trainer.optimizer.param_groups}
        assert {part for part, rate in rates.items() if rate > 0} == phase.learns
        assert bool(trainer.network.is_quantised) == phase.quantised


def test_each_parts_learning_rate_rises_and_falls_over_its_own_epochs(prepared):
    trainer = prepared(f"{NAME}_350epochs")
    trainer.initialize()
    rates = {part: [] for part in PARTS}
    for epoch in range(350):
        trainer.lr_scheduler.step(epoch)
        for group in trainer.optimizer.param_groups:
            rates[group["part"]].append(group["lr"])

    def expected(own):
        decay = [2e-4 * (1 - done / own) ** 0.9 for done in range(own)]
        return [rate * min(1, (done + 1) / (own // 20)) for done, rate in enumerate(decay)]

    assert rates["segmentation"] == pytest.approx(expected(350))
    assert rates["policy"] == pytest.approx([*expected(250)[:200], *[0] * 100, *expected(250)[200:]])
    assert rates["position"] == rates["selectors"] == pytest.approx([*[0] * 200, *expected(150)])
    guided = prepared(f"{NAME}_80epochs", schedule="guided")
    guided.initialize()
    guided.lr_scheduler.step(30)
    policy, position = (3e-3 * (1 - 30 / own) ** 0.9 for own in (77, 80))
    assert [group["lr"] for group in guided.optimizer.param_groups] == pytest.approx([0, policy, position, 0])
    guided.lr_scheduler.step(70)  # the seventh of its sixteen that segment
    assert guided.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * (1 - 6 / 16) ** 0.9)
    trainer.lr_scheduler.step(-1)  # PyTorch's way to say "the next one"
    assert trainer.optimizer.param_groups[0]["lr"] == rates["segmentation"][trainer.lr_scheduler.ctr - 1]


@pytest.mark.parametrize("kind", LABELS)
def test_every_kind_of_label_trains_and_validates(prepared, kind):
    trainer = start(prepared(f"{NAME}_7epochs_1iters", kind, channels=2), 6)
    assert np.isfinite(trainer.train_step(next(trainer.dataloader_train))["loss"])
    heads = trainer.label_manager.num_segmentation_heads
    background = trainer.network.background_logits.tolist()
    assert background == ([-8] * heads if kind == "regions" else [8] + [-8] * (heads - 1))
    trainer.logger.local_logger.my_fantastic_logging |= {
        key: [0] * 6 for key in ("mean_fg_dice", "ema_fg_dice", "dice_per_class_or_region", "val_losses")
    } | {key: [0] * 6 for key in ("skipped", "cropped", "whole", "gmacs", "bits")}
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        outputs = [trainer.validation_step(next(trainer.dataloader_val))]
    trainer.on_validation_epoch_end(outputs)
    shares = [trainer.logger.get_value(key, -1) for key in ("skipped", "cropped", "whole")]
    assert sum(shares) == pytest.approx(1) and len(trainer.logger.get_value("bits", -1)) == 5
    assert trainer.logger.get_value("gmacs", -1) > 0
    # A checkpoint from before the calibration neither skips nor crops.
    assert trainer.network.skip_threshold == trainer.network.crop_threshold == NEVER


@pytest.mark.parametrize("suffix", ["SpatialOnly", "QuantOnly"])
def test_ablations_train(prepared, suffix):
    trainer = prepared(f"{NAME}{suffix}_7epochs_1iters")
    trainer.initialize()
    for epoch in (0, 4, 6):
        start(trainer, epoch)
        assert np.isfinite(trainer.train_step(next(trainer.dataloader_train))["loss"])
    assert len(trainer.optimizer.param_groups) == {"SpatialOnly": 3, "QuantOnly": 2}[suffix]
    assert (trainer.calibrate() is None) == (suffix == "QuantOnly")


@pytest.mark.parametrize("fill", [0, 1])
def test_cases_that_are_all_background_or_all_foreground(prepared, fill):
    trainer = prepared(f"{NAME}_7epochs_1iters", fill=fill)
    for epoch in (0, 6):
        start(trainer, epoch)
        losses = [trainer.train_step(next(trainer.dataloader_train))["loss"] for _ in range(2)]
        assert np.isfinite(losses).all()
    trainer.network.policy.fc.weight.data.zero_()
    trainer.network.policy.fc.bias.data = torch.tensor([9.0, 0, 0])
    found = trainer.calibrate()
    assert found.skip_threshold == found.crop_threshold == NEVER and found.skipped == 0
    assert found.coverage == ({} if fill == 0 else {"1": 1.0})
    assert found.unseen == (("1", "2") if fill == 0 else ("2",))


def test_random_centres_and_the_distance_to_a_centred_crop(prepared):
    trainer = start(prepared())
    target = torch.zeros(2, 1, 32, 32)
    target[0, 0, 4:10, 20:32] = 1  # its middle is 7, 26; the nearest crop of 16 begins at 0, 16
    trainer.foreground_centres = 1.0
    for _ in range(20):
        centres = trainer.random_centres(target)
        assert (
            4 <= centres[0, 0] < 10 and 20 <= centres[0, 1] < 32 and (centres[1] >= 0).all() and (centres[1] < 32).all()
        )
    at = torch.tensor([[0.0, 16.0], [9.0, 9.0]])
    assert trainer.position_loss([at], target) == 0
    away = trainer.position_loss([at + torch.tensor([[8.0, 0], [0, 0]])], target)
    assert away.item() == pytest.approx((8 / 32 - 0.025) / 2)  # smooth L1 of a quarter of one axis, and of none
    assert trainer.position_loss([at], torch.zeros(2, 1, 32, 32)) == 0


def test_guidance_of_the_policy_by_hand(prepared):
    """Skip without foreground, crop (16 of 32) where the crop holds all of it, else the whole slice."""
    scores = torch.log(torch.tensor([[0.5, 0.2, 0.3], [0.2, 0.5, 0.3], [0.1, 0.3, 0.6], [0.9, 0.04, 0.06]]))
    target = torch.zeros(4, 1, 32, 32)
    target[1, 0, 4:18, 5] = target[1, 0, 5, 5:19] = 1
    target[2, 0, 4, 5:20] = 1
    trainer = start(prepared())

    def loss(*corners):
        return trainer.choice_loss(scores, [torch.tensor(corners)] if corners else [], target).item()

    # Where crops lie is not known: 14 voxels at most.
    assert loss() == pytest.approx(-np.log([0.5, 0.5, 0.6, 0.9]).mean(), abs=1e-5)
    known = loss([0.0, 0], [2.4, 4.0], [3.0, 4.6], [0, 0])
    assert known == pytest.approx(-np.log([0.5, 0.5, 0.3, 0.9]).mean(), abs=1e-5)
    cut = loss([0.0, 0], [4.6, 4.0], [3.0, 4.0], [0, 0])
    assert cut == pytest.approx(-np.log([0.5, 0.3, 0.3, 0.9]).mean(), abs=1e-5)
    trainer = prepared(kind="ignore")
    trainer.initialize()
    target[3, 0, 0, 0] = 2  # of a slice whose voxels are ignored nobody knows
    assert loss() == pytest.approx(-np.log([0.5, 0.5, 0.6]).mean(), abs=1e-5)
    target[1, 0, 30, 30] = 2  # which may be foreground, too
    assert loss() == pytest.approx(-np.log([0.5, 0.3, 0.6]).mean(), abs=1e-5)


@pytest.mark.parametrize(
    ("space", "wanted"),
    [(["skip", 16, 24, "whole"], [0, 1, 2, 3]), ([24, 16], [1, 1, 0, 0]), ([16, "whole"], [0, 0, 1, 1])],
)
def test_guidance_of_the_policy_takes_the_smallest_crop(prepared, space, wanted):
    """Slices without foreground, with 10, 20 and 30 voxels of it, whatever there is to choose from."""
    trainer = start(prepared(policy_space=space))
    target = torch.zeros(4, 1, 32, 32)
    for index in (1, 2, 3):
        target[index, 0, 1, 1 : 1 + 10 * index] = 1
    sure = 50 * torch.nn.functional.one_hot(torch.tensor(wanted), len(space)).float()
    assert trainer.choice_loss(sure, [], target) < 1e-5


def test_guidance_of_the_maps_by_hand(prepared):
    """A cell with any foreground counts thrice, one that is ignored in part and has none not at all."""
    target = torch.zeros(1, 1, 32, 32)
    target[0, 0, 3, 20] = 1
    maps = [torch.log(torch.tensor([[[[0.25, 4.0], [1.0, 1.0]]]])), torch.zeros(1, 1, 1, 1)]
    losses = -np.log([0.8, 0.8, 0.5, 0.5]) * (1, 3, 1, 1)
    trainer = start(prepared())
    expected = (losses.mean() - 3 * np.log(0.5)) / 2
    assert trainer.map_loss(maps, target).item() == pytest.approx(expected, abs=1e-5)
    target[0, 0, 20, :] = 2
    trainer = prepared(kind="ignore")
    trainer.initialize()
    expected = (losses[:2].mean() - 3 * np.log(0.5)) / 2
    assert trainer.map_loss(maps, target).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("index", range(3))
def test_resuming_in_a_phase_continues_it_exactly(prepared, tmp_path, index):
    """In the middle of each phase of the default schedule, 7 epochs of which are 4, 2 and 1 of two steps."""
    name, epoch = f"{NAME}_7epochs_2iters", (2, 5, 6)[index]
    trainer = start(prepared(name), epoch)
    batches = [next(trainer.dataloader_train) for _ in range(3)]
    for batch in batches[:2]:
        trainer.train_step(batch)
    trainer.current_epoch = epoch - 1  # what is saved counts one on
    path = str(tmp_path / "checkpoint.pth")
    trainer.save_checkpoint(path)
    again = prepared(name)
    again.load_checkpoint(path)
    assert again.current_epoch == epoch
    before = state(again)
    for resumed in (start(trainer, epoch), start(again, epoch)):
        assert resumed.network.phase is SCHEDULES["paper"][index]
        torch.manual_seed(5)
        resumed.train_step(batches[2])
    first, second = state(trainer), state(again)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert changed_parts(again, before) == SCHEDULES["paper"][index].learns
    assert [group["lr"] for group in again.optimizer.param_groups] == [
        group["lr"] for group in trainer.optimizer.param_groups
    ]


def test_costs_of_an_epoch_by_hand():
    decisions = [
        Decision("skip", bits=(), cost=1e9),
        Decision("whole", bits=(8, 16), cost=5e9),
        Decision("crop", ((0, 8), (0, 8)), (16, 16), cost=3e9),
        Decision("skip", bits=(), cost=1e9),
    ]
    assert mean_costs(decisions, 2) == {"skipped": 0.5, "cropped": 0.25, "whole": 0.25, "gmacs": 2.5, "bits": [12, 16]}
    assert mean_costs(decisions[:1], 2)["bits"] == [0, 0]


def test_the_picture_of_costs_does_not_hang_on_nnunets_fonts(tmp_path):
    import seaborn
    from matplotlib import rc_context, rcParams

    log = {"skipped": [0.1, 0.2], "cropped": [0.2, 0.3], "whole": [0.7, 0.5], "gmacs": [2.0, 1.0]}
    log["bits"] = [[16, 8], [8, 8]]
    plot_costs(log, tmp_path / "own.png")
    with rc_context():
        seaborn.set(font_scale=2.5)  # as nnU-Net does before its progress.png
        size = rcParams["font.size"]
        plot_costs(log, tmp_path / "after.png")
        assert rcParams["font.size"] == size > 20
    assert (tmp_path / "own.png").read_bytes() == (tmp_path / "after.png").read_bytes()


class Oracle(nn.Module):
    """In the policy's place: skips slices without a bright voxel with the given score."""

    def __init__(self, score=4.0):
        super().__init__()
        self.score = score

    def forward(self, x):
        is_empty = (x.flatten(1).amax(1) < 0.6).float()
        return torch.stack([self.score * is_empty, torch.ones_like(is_empty), torch.zeros_like(is_empty)], 1)


class Middle(nn.Module):
    """In the position network's place: every crop in the middle of the slice."""

    def forward(self, x):
        return x.new_full((len(x), 2), 0.5)


def test_calibration_finds_what_can_be_left_out(prepared):
    trainer = start(prepared(fill=None))
    trainer.inference_allowed_mirroring_axes = (0, 1)
    network = trainer.network
    network.policy, network.position = Oracle(), Middle()
    found = trainer.calibrate()
    # Two overlapping tiles an axis, eight slices; half of the slices are empty.
    assert found.slices == 2 * 8 * 4 and found.cases == 2
    assert 0.5 <= found.skipped < 1 and found.lost_components == 0 and min(found.coverage.values()) >= 0.995
    # Mirrored, crops cut the organ at one logit; two cases of the twenty that are enough raise that by their logarithm.
    assert trainer.enough_cases == 20 and found.slack == pytest.approx(np.log(10))
    assert found.crop_threshold == pytest.approx(1 / (1 + np.exp(-1.1 - found.slack)), abs=1e-4)
    assert found.cropped == 0
    assert network.skip_threshold.item() == pytest.approx(found.skip_threshold)


class Around(nn.Module):
    """In the position network's place: every crop around the bright voxels."""

    def forward(self, x):
        is_bright = (x[:, :1] > 0.6).flatten(2).float() + 1e-6
        sides = (torch.arange(side, device=x.device) + 0.5 for side in x.shape[2:])
        rows, columns = torch.meshgrid(*sides, indexing="ij")
        at = torch.stack([rows / x.shape[2], columns / x.shape[3]]).flatten(1)
        return (is_bright * at).sum(2) / is_bright.sum(2)


def test_calibration_allows_crops_that_hold_everything(prepared):
    trainer = start(prepared(fill=None, policy_space=["skip", 24, "whole"]))
    trainer.inference_allowed_mirroring_axes = (0, 1)
    trainer.network.policy, trainer.network.position = Oracle(), Around()
    trainer.enough_cases = 2
    found = trainer.calibrate()
    assert found.left_out == {"1": 1.0, "2": 1.0} and found.left_out_lost == 0 and found.slack == 0
    assert found.cropped > 0 and found.lost_components == 0 and min(found.coverage.values()) >= 0.995


def test_calibration_does_not_trust_a_policy_that_errs(prepared):
    trainer = start(prepared())
    trainer.network.policy.fc.weight.data.zero_()
    trainer.network.policy.fc.bias.data = torch.tensor([5.0, 0, 0])
    found = trainer.calibrate()
    assert found.skipped == 0 and found.is_useless


def test_a_calibration_that_fails_does_not_cost_the_training(prepared, tmp_path):
    trainer = start(prepared(f"{NAME}_3epochs_1iters"))
    trainer.network.skip_threshold.fill_(0.6)

    def fails(*_):
        trainer.network.crop_threshold.fill_(0.6)
        raise MemoryError("no room for the case")

    trainer._observe = fails
    trainer.current_epoch = 3
    stale = Path(trainer.output_folder, "calibration.json")
    stale.write_text("{}")
    trainer.on_train_end()
    assert not stale.exists()
    folder = next((tmp_path / "results").rglob("fold_all"))
    weights = torch.load(folder / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert weights["skip_threshold"] == weights["crop_threshold"] == NEVER
    log = next(folder.glob("training_log*")).read_text()
    assert "Calibration failed, the network will not skip or crop: MemoryError('no room for the case')" in log


def test_one_decision_for_all_flips_leaves_out_no_more_than_calibration_counts(prepared):
    """Whatever the thresholds: the tile itself is one of the mirrored passes that calibration looks at."""
    trainer = start(prepared(policy_space=["skip", 16, 24, "whole"]))
    trainer.inference_allowed_mirroring_axes = (0, 1)
    network = trainer.network.eval()
    tiles = torch.randn(24, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        network.policy.fc.weight *= 2 / network.score(network._view(tiles)).std(0).mean()
        network.policy.fc.bias -= network.score(network._view(tiles)).mean(0)
        for where in network.position.where:
            where.weight *= 50  # or every middle is that of the slice
    seen = trainer._probe_mirrored(tiles)
    found, others = [], 0
    for threshold in (0.1, 0.2, 0.3, 0.5, 0.7):
        network.skip_threshold.fill_(threshold)
        network.crop_threshold.fill_(threshold)
        for (skip, crop, inside), decision in zip(seen, network.decide(tiles), strict=True):
            found.append(decision.action)
            others += decision.action != "skip" and skip > threshold
            if decision.action == "skip":
                assert skip > threshold
            elif decision.action == "crop":
                assert crop > threshold
                for shared, (start_, stop) in zip(inside, decision.box, strict=True):
                    assert shared.start == shared.stop or (start_ <= shared.start and shared.stop <= stop)
    assert set(found) == {"skip", "crop", "whole"} and others, "flips would decide otherwise"


class SkipsTilesAt:
    """In the place of ``_probe_mirrored``: sure to skip the tiles in which the first voxel's value says so."""

    def __init__(self, values):
        self.values = values

    def __call__(self, tiles):
        whole = tuple(slice(0, side) for side in tiles.shape[2:])
        return [(0.9 if tile[0, 0, 0].item() in self.values else 0.1, 0.0, whole) for tile in tiles]


def test_a_component_that_one_of_its_tiles_skips_is_lost(prepared):
    trainer = prepared()
    trainer.initialize()
    labels = np.zeros((1, 1, 32, 64), np.int16)
    labels[0, 0, 4:12, 20:30] = 1  # tiles begin at columns 0, 16 and 32, so that the first two hold all of it
    image = np.broadcast_to(np.arange(64, dtype=np.float32), (1, 1, 32, 64)).copy()
    for values, lost in (([16], 1), ([0], 1), ([0, 16], 1), ([32], 0), ([], 0)):
        trainer._probe_mirrored = SkipsTilesAt(values)
        evidence = Evidence()
        trainer._observe(evidence, "a", image, labels)
        found = evidence.calibrate(1, ["1"], min_coverage=0)
        assert (found.skip_threshold == pytest.approx(0.9, abs=0.01)) == bool(lost), values
        assert found.lost_components == 0 and found.slices == 3
    # A tile's crop that leaves a part of it out, which the neighbour covers, leaves these voxels out.
    trainer._probe_mirrored = lambda tiles: [
        (0.1, 0.8 if tile[0, 0, 0] == 16 else 0.1, (slice(0, 32), slice(8, 32))) for tile in tiles
    ]
    evidence = Evidence()
    trainer._observe(evidence, "a", image, labels)
    found = evidence.calibrate(1, ["1"], min_coverage=0.5)  # columns 20 to 23 are outside of the crop: 40 %
    assert found.coverage == {"1": pytest.approx(0.6)} and found.cropped == pytest.approx(1 / 3)
    assert evidence.calibrate(1, ["1"], min_coverage=0.7).cropped == 0


def test_a_whole_training_and_what_it_leaves(prepared, tmp_path):
    trainer = prepared(f"{NAME}_3epochs_1iters")
    trainer.save_every = 1
    trainer.run_training()
    folder = next((tmp_path / "results").rglob("fold_all"))
    assert (folder / "costs.png").stat().st_size > 0 and (folder / "progress.png").exists()
    found = json.loads((folder / "calibration.json").read_text())
    assert found["cases"] == 2 and set(found["coverage"]) == set(found["left_out"]) == {"1", "2"}
    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["trainer_name"] == f"{NAME}_3epochs_1iters"
    assert checkpoint["network_weights"]["skip_threshold"].item() == pytest.approx(found["skip_threshold"])
    assert len(checkpoint["logging"]["gmacs"]) == 3
    log = next(folder.glob("training_log*")).read_text()
    assert "Phase 'full precision'" in log and "Phase 'everything'" in log and "Calibrated on" in log
    assert "GMACs each" in log and "bits per stage" in log
    # As nnU-Net's predictor loads and runs it.
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder.parent), ("all",), "checkpoint_final.pth")
    assert predictor.network.skip_threshold == trainer.network.skip_threshold and predictor.network.is_quantised
    predictor.network.decisions = []
    logits = predictor.predict_sliding_window_return_logits(torch.randn(1, 2, 40, 36))
    assert logits.shape == (3, 2, 40, 36) and torch.isfinite(logits).all()
    assert len(predictor.network.decisions) == 2 * 4 * 4  # slices, tiles, flips


@pytest.mark.integration
def test_two_processes_train_validate_and_calibrate_as_one(prepared, tmp_path):
    trainer = prepared(f"{NAME}_7epochs_2iters")
    content = json.loads(json.dumps(trainer.plans_manager.plans)) | {"continue_training": False}
    arguments = (str(tmp_path), type(trainer).__name__, content, trainer.dataset_json)
    mp.spawn(ddp_med_danet_worker.run, args=arguments, nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=False) for rank in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    found, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert found == other, "the first process calibrates for both, and costs are those of both"
    calibration, _, costs, changed = found
    assert changed == ["backbone", "crop_tail", "policy", "position", "selectors"]
    assert calibration["cases"] == 2 and set(calibration["coverage"]) == {"1", "2"}
    assert [sum(shares) for shares in zip(*(costs[key] for key in ("skipped", "cropped", "whole")), strict=True)] == (
        pytest.approx([1, 1, 1])
    )
