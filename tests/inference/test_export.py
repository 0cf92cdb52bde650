"""Resampling and argmax in slabs: nnU-Net's result, from a fraction of its memory."""

import errno
import os
import tracemalloc
from functools import partial

import models
import numpy as np
import pytest
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.preprocessing.resampling.no_resampling import no_resampling_hack
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_dyn.inference import export

SCIPY = partial(resample_data_or_seg_to_shape, **models.LINEAR)
TORCH = partial(resample_torch_fornnunet, is_seg=False, force_separate_z=None)


def case(shape, new_shape, spacing, new_spacing, labels=models.LABELS, foreground=None, crop=2, **options):
    """Smooth logits and everything that export needs; foreground wins only inside the slices ``foreground``."""
    plans = PlansManager(models.plans(spacing=spacing, **options))
    configuration = plans.get_configuration(plans.available_configurations[0])
    manager = plans.get_label_manager(models.dataset(labels))
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, manager.num_segmentation_heads, *(n // 4 + 2 for n in shape), generator=generator) * 3
    logits = torch.nn.functional.interpolate(coarse, shape, mode="trilinear")[0]
    if foreground is not None:
        outside = torch.ones(shape, dtype=torch.bool)
        outside[foreground] = False
        if manager.has_regions:
            logits[:, outside] = -logits[:, outside].abs()
        else:
            logits[0, outside] = 20
    properties = {
        "spacing": list(new_spacing),  # plans are not transposed here
        "shape_after_cropping_and_before_resampling": tuple(new_shape),
        "shape_before_cropping": tuple(n + crop for n in new_shape),
        "bbox_used_for_cropping": [[crop // 2, n + crop // 2] for n in new_shape],
    }
    return logits.half(), plans, configuration, manager, properties


SIZES = {
    "larger": ((10, 14, 18), (19, 25, 31), (2, 1.8, 1.7), (1, 1, 1)),
    "smaller": ((19, 25, 31), (10, 14, 18), (1, 1, 1), (2, 1.8, 1.7)),
    "the same": ((10, 14, 18), (10, 14, 18), (1, 1, 1), (1, 1, 1)),
    "one slice": ((1, 14, 18), (1, 25, 31), (5, 1.8, 1.7), (5, 1, 1)),
    "thick slices": ((6, 14, 18), (9, 25, 31), (7.5, 1.8, 1.7), (5, 1, 1)),
    "fewer thick slices": ((9, 14, 18), (6, 25, 31), (5, 1.8, 1.7), (7.5, 1, 1)),
    "sagittal slices": ((14, 18, 6), (25, 31, 9), (1.8, 1.7, 7.5), (1, 1, 5)),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("labels", [models.LABELS, models.REGIONS], ids=["labels", "regions"])
@pytest.mark.parametrize("function", ["scipy", "torch"])
@pytest.mark.parametrize("foreground", [None, np.s_[2:5, 3:7, 4:6], np.s_[:0]], ids=["all", "some", "none"])
def test_the_segmentation_is_nnunets(size, labels, function, foreground, monkeypatch):
    monkeypatch.setattr(export, "SLAB_ELEMENTS", 4000)  # several slabs, of which the last one is smaller
    if size == "one slice" and foreground is not None:
        foreground = np.s_[:, foreground[-1], foreground[-1]] if isinstance(foreground, tuple) else foreground
    options = {} if function == "scipy" else {"resampling": ("resample_torch_fornnunet", TORCH.keywords)}
    logits, plans, configuration, manager, properties = case(
        *SIZES[size], labels=labels, foreground=foreground, **options
    )
    expected = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits.clone(), plans, configuration, manager, properties
    )
    segmentation, probabilities = export.segment(logits, plans, configuration, manager, properties)
    assert probabilities is None
    assert segmentation.dtype == expected.dtype and segmentation.shape == expected.shape
    assert (segmentation != expected).mean() <= 1e-4
    assert bool(segmentation.any()) == bool(expected.any())


@pytest.mark.parametrize("function", [SCIPY, TORCH], ids=["scipy", "torch"])
@pytest.mark.parametrize("size", SIZES)
def test_the_rule_of_a_function_is_what_it_does(function, size):
    shape, new_shape, spacing, new_spacing = SIZES[size]
    rule = export.resampling_rule(function, shape, new_shape, spacing, new_spacing)
    data = np.random.default_rng(0).normal(size=(2, *shape))
    resampled = torch.from_numpy(data)
    for dim, axis in enumerate(rule.axes):
        resampled = (resampled.transpose(dim + 1, 3) @ axis.matrix(shape[dim]).T.double()).transpose(dim + 1, 3)
    expected = function(data.copy(), new_shape, spacing, new_spacing)
    np.testing.assert_allclose(resampled, expected, atol=1e-4)


@pytest.mark.parametrize("out", range(1, 60))
def test_nearest_slices_are_those_of_the_functions(out):
    """Two slices can be equally near; a different choice would shift a whole slice."""
    for size in range(1, 25):
        ramp = np.broadcast_to(np.arange(size, dtype=np.float32)[:, None, None], (size, 1, 2)).copy()[None]
        expected = SCIPY(ramp, (out, 1, 2), (9, 1, 1), (8, 1, 1))[0, :, 0, 0]
        np.testing.assert_array_equal(export._nearest_of_scipy(size, out), expected)
        expected = TORCH(ramp, (out, 1, 2), (9, 1, 1), (8, 1, 1))[0, :, 0, 0]
        np.testing.assert_array_equal(export._nearest_of_torch(size, out), expected)


@pytest.mark.parametrize(
    "function",
    [
        partial(SCIPY, order=3),
        partial(SCIPY, order=0),
        partial(SCIPY, is_seg=True),
        partial(TORCH, mode="cubic"),
        partial(no_resampling_hack),
    ],
)
def test_other_functions_have_no_rule(function):
    assert export.resampling_rule(function, (4, 4, 4), (5, 5, 5), (1, 1, 1), (0.8, 0.8, 0.8)) is None


@pytest.mark.parametrize("labels", [models.LABELS, models.REGIONS], ids=["labels", "regions"])
@pytest.mark.parametrize("size", ["larger", "thick slices"])
def test_probabilities_are_nnunets_and_go_into_its_file(tmp_path, labels, size, monkeypatch):
    monkeypatch.setattr(export, "SLAB_ELEMENTS", 4000)
    logits, *arguments = case(*SIZES[size], labels=labels)
    expected = convert_predicted_logits_to_segmentation_with_correct_shape(logits.clone(), *arguments, True)
    with export.probabilities_file(tmp_path / "case.npz") as allocate:
        segmentation, _ = export.segment(logits, *arguments, allocate)
        assert not (tmp_path / "case.npz").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["case.npz"]
    written = np.load(tmp_path / "case.npz")["probabilities"]
    np.testing.assert_allclose(written, expected[1], atol=1e-3)
    assert written.dtype == expected[1].dtype
    assert (segmentation != expected[0]).mean() <= 1e-4


def test_only_where_foreground_can_win_is_resampled(monkeypatch):
    """Four of ten slices can have foreground: their neighbours' samples are the only ones computed."""
    logits, plans, configuration, manager, properties = case(*SIZES["larger"], foreground=np.s_[3:7, 2:6, 5:9])
    rule = export.resampling_rule(
        configuration.resampling_fn_probabilities, logits.shape[1:], (19, 25, 31), (2, 1.8, 1.7), (1, 1, 1)
    )
    box = export._foreground(logits, rule, manager)
    seen = np.zeros((19, 25, 31), bool)
    for where, slab in export._slabs(logits, rule, box):
        assert slab.shape[1:] == seen[where].shape
        seen[where] = True
    segmentation, _ = export.segment(logits, plans, configuration, manager, properties)
    assert not segmentation[1:-1, 1:-1, 1:-1][~seen].any() and segmentation.any()
    assert seen.mean() < 0.2


class Peak:
    """Bytes of the largest sum of the tensors and arrays that were alive at one time inside the block."""

    def __enter__(self):
        tracemalloc.start()
        self.tensors = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.tensors.__enter__()
        return self

    def __exit__(self, *error):
        self.arrays = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        self.tensors.__exit__(*error)
        total = peak = 0
        for event in self.tensors.profiler.kineto_results.events():
            if event.name() == "[memory]":
                total += event.nbytes()
                peak = max(peak, total)
        self.bytes = self.arrays + peak


@pytest.mark.parametrize("cubic", [False, True], ids=["linear", "cubic"])
def test_the_peak_is_below_all_class_logits_at_full_size(cubic, monkeypatch):
    """13 classes; what nnU-Net's export needs is measured in the same way."""
    labels = {"background": 0, **{f"organ{n}": n for n in range(1, 13)}}
    options = {"resampling": ("resample_data_or_seg_to_shape", {**models.LINEAR, "order": 3})} if cubic else {}
    logits, *arguments = case((20, 30, 30), (60, 90, 90), (3, 3, 3), (1, 1, 1), labels=labels, **options)
    monkeypatch.setattr(export, "SLAB_ELEMENTS", 2**18)
    all_logits = 13 * 60 * 90 * 90 * 2
    with Peak() as stock:
        expected = convert_predicted_logits_to_segmentation_with_correct_shape(logits.clone(), *arguments)
    with Peak() as ours:
        segmentation, _ = export.segment(logits, *arguments)
    assert (segmentation != expected).mean() <= 1e-4
    assert stock.bytes > all_logits
    # A cubic function resamples one class at a time, in double precision, before the slabs begin.
    assert ours.bytes < all_logits * (1 if cubic else 0.5)
    assert ours.bytes < stock.bytes / (2 if cubic else 5)


def test_what_a_network_drive_keeps_of_a_removed_file_stays_behind(tmp_path):
    with export.complete_files(tmp_path) as folder:
        for name in (".nfs0001", "case.nii.gz"):
            (folder / name).write_text("written")
    assert [path.name for path in tmp_path.iterdir()] == ["case.nii.gz"]


def test_files_appear_complete_or_not_at_all(tmp_path, monkeypatch):
    """Under their names, so that what a reader writes beside the segmentation has its name too; that one last."""
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (moved.append(target.name), replace(source, target)))
    with export.complete_files(tmp_path, last="a.tif") as folder:
        assert folder.parent == tmp_path and folder.name.startswith(".partial-")
        for name in ("a.tif", "a.json", "z.npz"):
            (folder / name).write_bytes(b"new")
        assert list(tmp_path.iterdir()) == [folder]
    assert moved == ["a.json", "z.npz", "a.tif"]
    with pytest.raises(OSError, match="no space"), export.complete_files(tmp_path) as folder:
        (folder / "a.tif").write_bytes(b"half of it")
        raise OSError("no space left")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(moved)
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"new"}


def test_a_full_disk_is_an_error_before_a_file_is_mapped(monkeypatch):
    """Here under a cubic function, which resamples into a file."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    cubic = ("resample_data_or_seg_to_shape", {**models.LINEAR, "order": 3})
    logits, *arguments = case(*SIZES["larger"], resampling=cubic)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        export.segment(logits, *arguments)


@pytest.mark.parametrize("way", ["no such call", "not on this file system"])
def test_space_is_taken_by_writing_where_it_cannot_be_reserved(tmp_path, monkeypatch, way):
    def cannot(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    if way == "no such call":
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", cannot)
    with open(tmp_path / "file", "w+b") as file:
        file.write(b"head")
        export._reserve(file, 2**20 + 5)
    assert (tmp_path / "file").read_bytes() == b"head" + bytes(2**20 + 5)
    assert (tmp_path / "file").stat().st_blocks * 512 >= 2**20
