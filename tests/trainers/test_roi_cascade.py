"""The trainer of the ROI cascade, on a small data set as nnU-Net leaves it after preprocessing."""

import contextlib
import json
import multiprocessing
import os
import pickle
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from cascade_training import BOXES, CASES, SHAPE, make_trainer, write_cases
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2, nnUNetDatasetNumpy
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from training import LABELS, steps

from nnunet_dyn.architectures.roi import Detection, box_size, box_slices, read_boxes
from nnunet_dyn.architectures.roi_detectors import LowResDetector
from nnunet_dyn.architectures.roi_segmentor import ROISegmentor
from nnunet_dyn.architectures.triplane import TriPlaneDetector
from nnunet_dyn.errors import JobError
from nnunet_dyn.trainers import roi_cascade
from nnunet_dyn.trainers.roi_cascade import GateDatasetBlosc2, GateDatasetNumpy, boxes_of_case, draw_gate, nearest_axes


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A factory of trainers for one of the two configurations."""
    for kind in ("preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / kind))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    torch.set_num_threads(1)
    write_cases(tmp_path / "preprocessed")
    return make_trainer


def predict(trainer, cases, age=100.0):
    """Write what the detector would have predicted ``age`` seconds ago: one box of label 1, elsewhere than the labels'
    own."""
    folder = Path(trainer.folder_with_segs_from_previous_stage)
    folder.mkdir(parents=True, exist_ok=True)
    boxes = np.zeros(SHAPE, np.uint8)
    boxes[10:14, 10:14, :4] = 1
    for case in cases:
        nnUNetDatasetBlosc2.save_seg(boxes, str(folder / case))
        written = time.time() - age
        os.utime(folder / f"{case}.b2nd", (written, written))
    return boxes


class TestDetector:
    @pytest.mark.parametrize("labels", ["classes", "regions"])
    def test_it_trains_and_is_calibrated(self, make, labels):
        trainer = make("3d_detect", LABELS[labels])
        assert all(np.isfinite(steps(trainer, 2)))
        network = trainer.module
        assert isinstance(network, LowResDetector) and network.has_regions == (labels == "regions")
        assert trainer.oversample_foreground_percent == 0 and not trainer.enable_deep_supervision
        assert trainer.inference_allowed_mirroring_axes is None
        assert isinstance(trainer.optimizer, torch.optim.AdamW)
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            result = trainer.validation_step(next(trainer.dataloader_val))
            assert not trainer.module.margin.any()  # the pseudo Dice is that of the boxes as they are
            trainer.on_validation_epoch_end([result])
        assert (trainer.module.margin == 4).all()  # what checkpoint_best gets
        assert result["loss"] > 0 and len(result["tp_hard"]) == 2
        trainer.on_train_end()
        written = json.loads(Path(trainer.output_folder, "calibration.json").read_text())
        checkpoint = torch.load(Path(trainer.output_folder, "checkpoint_final.pth"), weights_only=False)
        margin, scores = (
            checkpoint["network_weights"][f"labels.seg_layers.{name}"][trainer.module.classes.start :].tolist()
            for name in ("margin", "score_threshold")
        )
        assert margin == list(written["margin"].values()) and len(margin) == 2
        assert scores == pytest.approx(list(written["score_threshold"].values()))
        assert checkpoint["inference_allowed_mirroring_axes"] is None

    @pytest.mark.parametrize("labels", ["classes", "ignore"])
    def test_the_volume_stays_in_the_patch(self, make, labels):
        """Volumes of 10 × 12 × 10 voxels in a patch of 12: all of them is in every sample that is not turned.

        With an ignore label nnU-Net would place it on an annotated voxel, here in a corner.
        """
        trainer = make("3d_detect", LABELS[labels])
        trainer.initialize()
        for loader in trainer.get_dataloaders():
            inner = loader.data_loader
            for key in CASES:
                _, segmentation, _, properties = inner._data.load_case(key)
                for _ in range(3):
                    box = inner.get_bbox(segmentation.shape[1:], False, properties["class_locations"])
                    room = np.subtract(inner.patch_size, segmentation.shape[1:])
                    assert np.abs(np.array(box[0]) + room / 2).max() <= 0.5  # as much on either side
            assert inner.has_ignore == (labels == "ignore")
        for _ in range(5):
            assert {1, 2} <= set(next(loader)["target"].unique().tolist())

    def test_volumes_are_turned_less_and_never_mirrored(self, make):
        """Nor are they in prediction; a right organ that is mirrored looks like the left one."""
        kinds = {}
        for configuration in ("3d_detect", "3d_roi"):
            trainer = make(configuration)
            rotation, _, _, mirrored = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
            kinds[configuration] = (np.degrees(rotation).round(3).tolist(), mirrored)
            assert trainer.inference_allowed_mirroring_axes == (mirrored or None)
        assert kinds == {"3d_detect": ([-15, 15], ()), "3d_roi": ([-30, 30], (0, 1, 2))}

    def test_calibration_counts_on_the_segmentors_grid(self, make, monkeypatch):
        """A detector that finds boxes of another size: on its grid label 1 is at 1–4, 2–6, 2–5, label 2 at 7–9, …"""
        trainer = make("3d_detect")
        trainer.initialize()

        def read(network, outputs, patch):
            assert tuple(patch) == (12, 12, 12)
            # The volume lies one voxel behind the patch's start where it is smaller.
            sure = Detection(((2, 5), (2, 6), (3, 6)), 0.9)
            unsure = Detection(((8, 10), (9, 11), (6, 9)), 0.11)
            return [{1: [sure], 2: [one for one in [unsure] if one.score >= network.score_threshold[2]]}]

        monkeypatch.setattr(LowResDetector, "read", read)
        slack = trainer.calibrate()  # for one case
        assert slack.margin == {"1": (1, 1, 1), "2": (1, 2, 1)} and slack.score_threshold == {"1": 0.3, "2": 0.05}
        monkeypatch.setattr(trainer, "enough_cases", 1)
        passes = []
        trainer.module.stages[0].register_forward_hook(lambda module, args, output: passes.append(len(output)))
        found = trainer.calibrate()
        # Label 2, 7–9 × 8–11 × 5–8, is found at a low score only: one voxel is missing on the second axis.
        assert found.score_threshold == {"1": 0.5, "2": 0.1} and found.is_safe
        assert passes == [1]  # one for all scores
        assert found.margin == {"1": (0, 0, 0), "2": (0, 1, 0)} and found.coverage == {"1": 1.0, "2": 1.0}
        assert trainer.module.margin[1:].tolist() == [[0, 0, 0], [0, 1, 0]]
        assert trainer.module.score_threshold[1:].tolist() == pytest.approx([0.5, 0.1])

    @pytest.mark.parametrize("fails", [False, True])
    def test_the_scores_that_are_tried_are_not_kept(self, make, monkeypatch, fails):
        trainer = make("3d_detect")
        trainer.initialize()
        network, tried = trainer.module.eval(), []
        network.score_threshold.copy_(torch.tensor([0.1, 0.2, 0.7]))
        read = (lambda *_: 1 / 0) if fails else network.read
        monkeypatch.setattr(
            network, "read", lambda *given: tried.append(network.score_threshold.tolist()) or read(*given)
        )
        with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
            boxes_of_case(network, torch.randn(1, 12, 12, 12), (12, 12, 12), (0.5, 0.25))
        assert tried == [[0.5] * 3, [0.25] * 3][: 1 if fails else 2]
        assert network.score_threshold.tolist() == pytest.approx([0.1, 0.2, 0.7])

    def test_a_failed_calibration_leaves_safe_boxes(self, make, monkeypatch):
        trainer = make("3d_detect")
        trainer.initialize()
        path, before = Path(trainer.output_folder, "checkpoint_final.pth"), []
        monkeypatch.setattr(LowResDetector, "read", lambda *_: before.append(path.is_file()) or 1 / 0)
        trainer.on_train_end()
        assert before == [True]  # what was learned is saved before anything can fail or take long
        assert not Path(trainer.output_folder, "calibration.json").exists()
        weights = torch.load(path, weights_only=False)["network_weights"]
        assert (weights["labels.seg_layers.margin"] == 4).all()
        assert weights["labels.seg_layers.score_threshold"].tolist() == pytest.approx([0.05] * 3)

    def test_without_the_segmentors_data_its_own_grid_serves(self, make):
        trainer = make("3d_detect")
        trainer.initialize()
        assert trainer._next_stage(list(CASES)).source_folder.endswith("full")
        os.remove(Path(trainer.preprocessed_dataset_folder_base, "full", "case_2.b2nd"))
        assert trainer._next_stage(["case_2"]) is None
        assert trainer.calibrate().cases == 1


def test_pretrained_weights_are_fetched_when_a_training_starts_anew(make, monkeypatch, tmp_path):
    """And has no weights yet, of a checkpoint or by -pretrained_weights, which nnU-Net loads into the made network."""
    fetched = []
    monkeypatch.setattr(LowResDetector, "load_pretrained", lambda self: fetched.append(1))
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)
    trainer, path = make("3d_detect"), str(tmp_path / "checkpoint.pth")
    trainer.initialize()
    assert fetched == []
    trainer.save_checkpoint(path)
    trainer.on_train_start()
    assert fetched == [1]
    for load in (
        lambda trainer: trainer.load_checkpoint(path),
        lambda trainer: load_pretrained_weights(trainer.network, path),
    ):
        again = make("3d_detect")
        again.initialize()
        load(again)
        again.on_train_start()
    assert fetched == [1]
    make("3d_detect").on_train_start()
    assert fetched == [1, 1]


@pytest.mark.parametrize("asked", [None, 0.1, 0.05])
def test_boxes_that_are_not_calibrated_are_handed_to_nobody(make, monkeypatch, asked):
    """Except where calibration asks for the same."""
    validated = []
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda *_: validated.append(1))
    trainer = make("3d_detect")
    trainer.initialize()
    if asked is not None:
        found = {"score_threshold": dict.fromkeys("12", asked), "margin": {key: [4] * 3 for key in "12"}}
        Path(trainer.output_folder, "calibration.json").write_text(json.dumps(found))
    with contextlib.nullcontext() if asked == 0.05 else pytest.raises(JobError, match="with --val and without"):
        trainer.perform_actual_validation()
    trainer._set_boxes(0.05, [4, 4, 3], 2)
    trainer.perform_actual_validation()
    assert len(validated) == (2 if asked == 0.05 else 1)


class TestSegmentor:
    def test_it_trains_on_boxes_of_labels_before_the_detector_has_run(self, make, monkeypatch):
        trainer = make("3d_roi")
        assert all(np.isfinite(steps(trainer, 2)))
        assert isinstance(trainer.module, ROISegmentor) and trainer.module.image_channels == 1
        assert trainer.oversample_foreground_percent == 1
        batch = next(trainer.dataloader_train)
        assert batch["data"].shape[1] == 3  # the image, and a channel a class
        gates = batch["data"][:, 1:]
        assert set(gates.unique().tolist()) <= {0, 1}
        dataset = trainer.dataloader_train.data_loader._data
        drawn = [dataset.load_case("case_0")[2] for _ in range(20)]
        assert len({gate.tobytes() for gate in drawn}) > 10  # jittered
        held = np.mean([(gate > 0)[part].mean() for gate in drawn for part in BOXES.values()])
        assert held > 0.95
        assert 0.03 < np.median([(gate > 0).mean() for gate in drawn]) < 0.5
        for share in ("LOOSE_SHARE", "FREE_SHARE"):  # those of a good detector
            monkeypatch.setattr(roi_cascade, share, 0)
        drawn = [dataset.load_case("case_0")[2] for _ in range(20)]
        assert np.mean([(gate == label)[part].mean() for gate in drawn for label, part in BOXES.items()]) > 0.95
        assert all(0.03 < (gate > 0).mean() < 0.35 for gate in drawn)
        path = Path(trainer.output_folder_base, "label_boxes.json")
        assert set(json.loads(path.read_text())) == set(CASES)
        assert all("label_boxes" not in name for name in os.listdir(trainer.preprocessed_dataset_folder))

    def test_fine_tuning_on_the_detectors_boxes(self, make):
        """The switch reaches data sets in other processes, and the cases that the detector has predicted."""
        trainer = make("3d_roi")
        steps(trainer, 0)
        boxes = predict(trainer, CASES[:1])
        dataset = trainer.dataloader_train.data_loader._data
        trainer.do_split = None  # which reads files and fills the log, once an epoch
        trainer.current_epoch = 3
        trainer.on_train_epoch_start()
        assert not np.array_equal(dataset.load_case("case_0")[2], boxes)
        context = multiprocessing.get_context("fork")
        ready, answers = context.Event(), context.Queue()

        def worker():
            ready.wait(60)
            answers.put([np.array_equal(dataset.load_case(case)[2][:], boxes) for case in CASES[:2]])

        process = context.Process(target=worker)
        process.start()
        trainer.current_epoch = 4
        trainer.on_train_epoch_start()
        ready.set()
        assert answers.get(timeout=60) == [True, False]
        process.join()
        predict(trainer, CASES[1:2])
        for _ in range(2):
            trainer.on_train_epoch_start()
        assert np.array_equal(dataset.load_case("case_1")[2][:], boxes)
        log = Path(trainer.log_file).read_text()
        assert [log.count(f"in {number} of 2 training cases.") for number in (1, 2)] == [1, 1]
        assert log.count("the boxes of the labels go on. Train 3d_detect on every fold first") == 1

    def test_some_tiles_lie_on_boxes_around_nothing(self, make, monkeypatch):
        """On those drawn beside the labels' as on the detector's."""
        trainer = make("3d_roi")
        steps(trainer, 0)
        dataset = trainer.dataloader_train.data_loader._data
        monkeypatch.setattr(roi_cascade, "FREE_TILES", 1)

        def voxels_without_target(tries):
            for _ in range(tries):
                _, segmentation, gate, properties = dataset.load_case("case_0")
                for voxel in properties["class_locations"].get("no target", ()):
                    assert gate[tuple(voxel[1:])] > 0 and segmentation[tuple(voxel)] == 0
                    yield tuple(voxel[1:])

        assert len(set(voxels_without_target(30))) > 10
        predict(trainer, CASES[:1])
        trainer._is_switched.value = 1
        found = np.array(list(voxels_without_target(10)))
        assert len(found) == 10 and (found >= [10, 10, 0]).all() and (found < [14, 14, 4]).all()
        trainer.dataloader_train.data_loader.indices = ["case_0"]
        assert (next(trainer.dataloader_train)["data"][:, 1].flatten(1) > 0).any(1).all()
        monkeypatch.setattr(roi_cascade, "FREE_TILES", 0)
        assert not list(voxels_without_target(10))

    def test_validation_cases_take_the_detectors_boxes_at_once(self, make):
        trainer = make("3d_roi")
        trainer.initialize()
        boxes = predict(trainer, CASES[2:])
        _, validation = trainer.get_tr_and_val_datasets()
        assert np.array_equal(validation.load_case("case_2")[2][:], boxes)

    def test_what_may_still_be_being_written_is_not_read(self, make):
        trainer = make("3d_roi")
        trainer.initialize()
        boxes = predict(trainer, CASES[2:], age=30)
        _, validation = trainer.get_tr_and_val_datasets()
        assert not np.array_equal(validation.load_case("case_2")[2][:], boxes)

    def test_cases_without_targets_are_placed_on_boxes_around_nothing(self, make, monkeypatch):
        """Whatever share of the others is."""
        trainer = make("3d_roi")
        steps(trainer, 0)
        dataset = trainer.dataloader_train.data_loader._data
        monkeypatch.setattr(roi_cascade, "FREE_TILES", 0)
        empty = {label: [] for label in BOXES}
        monkeypatch.setattr(dataset, "boxes", dict.fromkeys(CASES, empty))
        loads = [dataset.load_case("case_0") for _ in range(10)]
        assert sum("no target" in properties["class_locations"] for *_, properties in loads) == sum(
            bool(gate.any()) for _, _, gate, _ in loads
        )
        assert any(gate.any() for _, _, gate, _ in loads)

    def test_final_validation_never_sees_boxes_of_labels(self, make):
        trainer = make("3d_roi")
        trainer.initialize()
        with pytest.raises(JobError, match=r"no boxes of the detector for 1 of 1 cases, such as case_2; .* with --val"):
            trainer.perform_actual_validation()
        # What nnU-Net's validation would load by itself.
        bare = trainer.dataset_class(
            trainer.preprocessed_dataset_folder, ["case_2"], trainer.folder_with_segs_from_previous_stage
        )
        with pytest.raises(FileNotFoundError):
            bare.load_case("case_2")

    def test_cudnn_times_no_sizes_of_crops(self, make, monkeypatch):
        """Neither on the way there nor back, though nnU-Net's commands ask it to."""
        trainer, seen = make("3d_roi"), []
        trainer.initialize()
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        inner = trainer.module.network
        inner.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.benchmark))
        inner.decoder.seg_layers[-1].weight.register_hook(lambda _: seen.append(torch.backends.cudnn.benchmark))
        steps(trainer, 1)
        assert len(seen) >= 2 and not any(seen) and torch.backends.cudnn.benchmark
        seen.clear()
        with torch.inference_mode():
            trainer.module.eval()(torch.ones(1, 3, 16, 16, 16))
        assert seen == [False] and torch.backends.cudnn.benchmark

    def test_gates_are_neither_eroded_nor_removed(self, make):
        trainer = make("3d_roi")
        trainer.initialize()
        arguments = ((16, 16, 16), (-0.1, 0.1), None, (0, 1, 2), False)
        options = {"use_mask_for_norm": [False], "is_cascaded": True, "foreground_labels": [1, 2]}
        ours = trainer.get_training_transforms(*arguments, **options).transforms
        stock = nnUNetTrainer.get_training_transforms(*arguments, **options).transforms
        names = [[type(getattr(one, "transform", one)).__name__ for one in made] for made in (stock, ours)]
        left_out = [name for name in names[0] if name not in names[1]]
        assert left_out == [
            "ApplyRandomBinaryOperatorTransform",
            "RemoveRandomConnectedComponentFromOneHotEncodingTransform",
        ]
        assert len(ours) == len(stock) - 2 and any(isinstance(one, RandomTransform) for one in ours)

    def test_regions_and_deep_supervision(self, make):
        trainer = make("3d_roi", LABELS["regions"])
        assert all(np.isfinite(steps(trainer, 1)))
        assert bool(trainer.module.labels.seg_layers.are_regions) and trainer.module.decoder.deep_supervision
        trainer.set_deep_supervision_enabled(False)
        assert not trainer.module.decoder.deep_supervision

    def test_its_own_network_is_trained_by_adamw_and_others_by_nnunets_sgd(self, make):
        plain = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
        own = make("3d_roi")
        other = make("3d_roi", network_class=plain, n_conv_per_stage=1, n_conv_per_stage_decoder=1)
        for trainer, kind, rate in ((own, torch.optim.AdamW, own.segmentor_lr), (other, torch.optim.SGD, 1e-2)):
            trainer.initialize()
            (group,) = trainer.optimizer.param_groups
            assert isinstance(trainer.optimizer, kind) and group["lr"] == trainer.initial_lr == rate
            assert group["weight_decay"] == trainer.weight_decay
            trainer.lr_scheduler.step(trainer.num_epochs - 1)
            assert 0 < trainer.optimizer.param_groups[0]["lr"] < rate / 2

    def test_it_learns_within_few_iterations(self, make):
        """Both classes. Under nnU-Net's SGD it has none of one of them even after 160 iterations."""
        trainer = make("3d_roi")
        torch.manual_seed(0)
        np.random.seed(0)
        steps(trainer, 60)
        trainer.network.eval()
        with torch.no_grad():
            results = [trainer.validation_step(next(trainer.dataloader_val)) for _ in range(6)]
        found, false, missed = (sum(result[key] for result in results) for key in ("tp_hard", "fp_hard", "fn_hard"))
        assert (2 * found / (2 * found + false + missed)).min() > 0.1

    def test_boxes_of_changed_data_are_found_anew(self, make):
        trainer = make("3d_roi")
        trainer.initialize()
        first = trainer._label_boxes(["case_0"])
        assert first == {"case_0": {label: [tuple((p.start, p.stop) for p in part)] for label, part in BOXES.items()}}
        path = Path(trainer.output_folder_base, "label_boxes.json")
        path.write_text(path.read_text().replace("[2, 8]", "[0, 20]"))
        assert trainer._label_boxes(["case_0"])["case_0"][1][0][0] == (0, 20)
        os.utime(Path(trainer.preprocessed_dataset_folder, "case_0.pkl"), (1, 1))
        assert trainer._label_boxes(["case_0"]) == first


class TestGatesOfLabels:
    shape = (40, 48, 40)
    boxes: ClassVar = {1: [((4, 12), (4, 12), (4, 12))], 2: [((20, 30), (20, 30), (20, 30))], 3: []}

    def drawn(self, boxes, count=400):
        labels, rng = np.zeros((1, *self.shape), np.int16), np.random.default_rng(0)
        for label, found in boxes.items():
            for box in found:
                labels[(0, *box_slices(box))] = label
        return labels, [draw_gate(labels, boxes, rng) for _ in range(count)]

    def test_some_boxes_are_as_loose_as_a_bad_detectors(self):
        """More than a quarter of its extent beyond any side goes none of the others."""
        _, drawn = self.drawn({1: self.boxes[1]})
        alone = [gate for gate, free in drawn if not free]
        (boxes,) = zip(*(read_boxes(gate)[1] for gate in alone), strict=True)
        beyond = np.array([[(4 - start, stop - 12) for start, stop in box] for box in boxes])
        assert beyond.min() >= -1 and 5 < beyond.max() <= 8
        is_loose = (beyond > 2).any((1, 2))
        assert 0.15 < is_loose.mean() < 0.35
        assert beyond[is_loose].mean() > 3 * beyond[~is_loose].mean() > 0

    def test_half_of_the_cases_have_boxes_without_a_target(self):
        labels, drawn = self.drawn(self.boxes)
        counts = np.bincount([len(free) for _, free in drawn], minlength=4) / len(drawn)
        assert len(counts) == 4 and counts[0] == pytest.approx(0.5, abs=0.08) and (counts[1:] > 0.08).all()
        kinds, sizes, places = set(), [], set()
        for gate, free in drawn:
            for box in free:
                assert not labels[(0, *box_slices(box))].any() and gate[box_slices(box)].all()
                kinds |= set(np.unique(gate[box_slices(box)]).tolist())
                sizes.append(box_size(box))
                places.add(box)
        assert kinds == {1, 2, 3} and len(places) > 0.9 * len(sizes)
        assert np.min(sizes) >= 4 and np.max(sizes) <= 15 and np.std(sizes) > 2

    def test_a_case_without_targets_has_nothing_else(self):
        _, drawn = self.drawn({1: [], 2: []}, count=100)
        shares = np.array([box_size(free[0]) for _, free in drawn]) / self.shape
        assert shares.min() >= 0.04 and shares.max() <= 0.32
        assert {label for gate, _ in drawn for label in np.unique(gate)} == {0, 1, 2}

    def test_where_there_is_no_place_there_is_no_box(self):
        labels = np.ones((1, 8, 8, 8), np.int16)
        gate, free = draw_gate(labels, {1: [((0, 8),) * 3]}, np.random.default_rng(1))
        assert free == [] and gate.all()


def test_data_that_nnunet_has_stored_by_numpy(make, tmp_path):
    """As it does where its plans or variables ask for it, and did before it had Blosc2."""
    for folder in (tmp_path / "preprocessed" / "Dataset999_Test").glob("*/"):
        dataset = nnUNetDatasetBlosc2(str(folder))
        for case in CASES:
            data, segmentation, _, properties = dataset.load_case(case)
            nnUNetDatasetNumpy.save_case(data[:], segmentation[:], properties, str(folder / case))
            (folder / f"{case}.b2nd").unlink()
            (folder / f"{case}_seg.b2nd").unlink()
    detector, segmentor = make("3d_detect"), make("3d_roi")
    assert np.isfinite(steps(detector)).all()
    detector.on_train_end()
    assert json.loads(Path(detector.output_folder, "calibration.json").read_text())["cases"] == 1
    assert np.isfinite(steps(segmentor)).all()
    dataset = segmentor.dataloader_train.data_loader._data
    assert isinstance(dataset, GateDatasetNumpy) and (dataset.load_case("case_0")[2] > 0).any()
    boxes, folder = np.zeros(SHAPE, np.uint8), Path(segmentor.folder_with_segs_from_previous_stage)
    boxes[10:14, 10:14, :4] = 1
    folder.mkdir(parents=True, exist_ok=True)
    nnUNetDatasetNumpy.save_seg(boxes, str(folder / "case_0"))
    os.utime(folder / "case_0.npz", (0, 0))
    segmentor._is_switched.value = 1
    assert np.array_equal(dataset.load_case("case_0")[2], boxes)


def test_data_sets_travel_to_workers():
    assert pickle.loads(pickle.dumps(GateDatasetBlosc2)) is GateDatasetBlosc2


def test_both_stages_look_for_each_other_under_the_same_name(make):
    detect, roi = make("3d_detect"), make("3d_roi")
    expected = Path(detect.output_folder_base, "predicted_next_stage", "3d_roi")
    assert Path(roi.folder_with_segs_from_previous_stage) == expected


def test_the_wrong_configuration_or_trainer(make):
    with pytest.raises(ValueError, match=r"expected 3d_detect or 3d_roi\. Make them with 'nnunet_dyn plan -t"):
        make("3d_fullres").initialize()
    for configuration in ("3d_detect", "3d_roi"):
        trainer = make(configuration, name="nnUNetTrainerEffB0")
        with pytest.raises(ValueError, match=r"Train with -tr nnUNetTrainerROICascade\."):
            trainer.initialize()


def test_resuming_keeps_the_calibration(make, tmp_path):
    trainer = make("3d_detect")
    trainer.initialize()
    trainer._set_boxes(0.5, [0, 0, 0])
    trainer._set_boxes(0.2, [1, 2, 3], 2)
    trainer.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    again = make("3d_detect")
    again.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    assert again.module.margin.tolist() == [[0, 0, 0], [0, 0, 0], [1, 2, 3]]
    assert again.module.score_threshold.tolist() == pytest.approx([0.5, 0.5, 0.2])


def test_a_checkpoint_of_another_optimizer_is_refused(make, tmp_path):
    trainer, path = make("3d_roi"), str(tmp_path / "checkpoint.pth")
    trainer.initialize()
    trainer.optimizer = torch.optim.SGD(trainer.network.parameters(), 0.01)
    trainer.save_checkpoint(path)
    with pytest.raises(JobError, match="got a checkpoint of nnU-Net's SGD"):
        make("3d_roi").load_checkpoint(path)
    trainer.optimizer, _ = trainer.configure_optimizers()
    trainer.save_checkpoint(path)
    make("3d_roi").load_checkpoint(path)


def test_fold_all_leaves_the_boxes_of_the_other_folds(make, monkeypatch):
    """Its own are of cases that it was trained on."""
    trainer, seen = make("3d_detect", fold="all"), []
    trainer.initialize()

    def validate(self, save_probabilities):
        seen.append(self.configuration_manager.next_stage_names)

    monkeypatch.setattr(trainer, "_expect_calibration", lambda: None)
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", validate)
    trainer.perform_actual_validation()
    predict(make("3d_roi"), CASES)  # its own, of an earlier training, are replaced
    for number, case in enumerate(CASES):
        trainer.perform_actual_validation()
        folder = Path(trainer.output_folder_base, f"fold_{number}", "validation")
        folder.mkdir(parents=True)
        (folder / f"{case}.nii.gz").touch()
    trainer.perform_actual_validation()
    assert seen == [["3d_roi"]] * 4 + [None]
    assert trainer.configuration_manager.next_stage_names == ["3d_roi"]


@pytest.mark.parametrize(
    "low, image, options, axes",
    [
        ([2, 2, 2], [1, 1, 1], {}, ()),
        ([2, 2, 2], [1, 1, 5], {}, (2,)),
        ([2, 8, 2], [1, 1, 5], {}, (1,)),
        ([2, 8, 2], None, {}, (1,)),
        ([2, 8, 2], None, {"order_z": 1}, ()),
        ([2, 8, 2], None, {"force_separate_z": False}, ()),
    ],
)
def test_boxes_are_resampled_to_the_nearest_of_thick_slices(make, low, image, options, axes):
    trainer = make("3d_detect")
    trainer.configuration_manager.configuration |= {
        "spacing": low,
        "resampling_fn_probabilities_kwargs": {"order": 1, "order_z": 0, "force_separate_z": None} | options,
    }
    assert nearest_axes(trainer.plans_manager, trainer.configuration_manager, image) == axes


def test_the_papers_detector_takes_the_defaults_place(make, monkeypatch):
    """On the same plans; it sees the segmentation of the batches that it learns from."""
    trainer = make("3d_detect", name="nnUNetTrainerROICascadeTriPlane_1epochs_1iters")
    small = {"size": 32, "stages": 2, "width": 32, "hidden": 32, "backbone": "resnet18"}
    original = roi_cascade.build_network

    def build(architecture, *arguments, **options):
        assert architecture["network_class_name"] == roi_cascade.TRI_PLANE
        return original(architecture | {"arch_kwargs": architecture["arch_kwargs"] | small}, *arguments, **options)

    monkeypatch.setattr(roi_cascade, "build_network", build)
    monkeypatch.setattr(roi_cascade, "SCORES", (0.5,))
    seen = []
    monkeypatch.setattr(TriPlaneDetector, "give_masks", lambda self, target: seen.append(target.shape))
    assert np.isfinite(steps(trainer, 1)).all()
    assert isinstance(trainer.module, TriPlaneDetector) and seen == [(2, 1, 12, 12, 12)]
    assert trainer.calibrate().cases == 1
