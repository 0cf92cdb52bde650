"""The segmentation is nnU-Net's, whatever the model and the image are like."""

import gc
import itertools
import json

import models
import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_dyn.errors import JobError, UsageError
from nnunet_dyn.inference import Predictor
from nnunet_dyn.inference import predictor as module
from nnunet_dyn.inference.engines import TorchEngine
from nnunet_dyn.inference.model_folder import load_model
from nnunet_dyn.inference.predictor import list_cases

SMALLEST_AGREEMENT = 0.9999


def stock(folder, folds=(0,), **options) -> nnUNetPredictor:
    predictor = nnUNetPredictor(**options, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), folds)
    return predictor


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    assert first.shape == second.shape and first.dtype == second.dtype
    return float((first == second).mean())


CUBIC = ("resample_data_or_seg_to_shape", {**models.LINEAR, "order": 3})
TORCH = ("resample_torch_fornnunet", {"is_seg": False, "force_separate_z": None, "memefficient_seg_resampling": False})
MODELS = {
    "3d": dict(options={}, shape=(20, 30, 25), spacing=(1, 1, 1)),
    "3d, resampled": dict(options={"spacing": (1.5, 1, 1.2)}, shape=(23, 31, 27), spacing=(1, 1.3, 1)),
    "3d, anisotropic": dict(options={"spacing": (4, 1, 1), "patch_size": (8, 24, 24)}, shape=(9, 41, 37),
                            spacing=(5, 0.8, 0.7)),
    "3d, by torch": dict(options={"spacing": (4, 1, 1), "resampling": TORCH}, shape=(9, 41, 37), spacing=(5, 0.8, 0.7)),
    "3d, cubic": dict(options={"spacing": (1.5, 1, 1.2), "resampling": CUBIC}, shape=(23, 31, 27), spacing=(1, 1.3, 1)),
    "3d, two folds": dict(options={"spacing": (1.2, 1, 1), "folds": 2}, shape=(20, 30, 25), spacing=(1, 1, 1)),
    "3d, transposed": dict(options={"spacing": (1.2, 1, 1.5), "transpose": (2, 0, 1)}, shape=(20, 30, 25),
                           spacing=(1, 1.2, 1.4)),
    "3d, two channels, no mirroring": dict(options={"channels": 2, "mirroring": None}, shape=(20, 30, 25),
                                           spacing=(1, 1, 1)),
    "regions": dict(options={"labels": models.REGIONS, "spacing": (1.3, 1, 1)}, shape=(20, 30, 25), spacing=(1, 1, 1)),
    "2d": dict(options={"dimension": 2, "patch_size": (24, 16), "spacing": (9, 1.3, 1)}, shape=(5, 40, 31),
               spacing=(3, 1, 1)),
    "2d, regions, two folds": dict(options={"dimension": 2, "patch_size": (24, 16), "labels": models.REGIONS,
                                            "folds": 2}, shape=(5, 40, 31), spacing=(3, 1, 1)),
    "residual encoder": dict(options={"residual": True}, shape=(20, 30, 25), spacing=(1, 1, 1)),
    "smaller than the patch": dict(options={}, shape=(7, 30, 11), spacing=(1, 1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("probabilities", [False, True], ids=["segmentation", "probabilities"])
def test_the_prediction_is_nnunets(tmp_path, name, probabilities):
    model = MODELS[name]
    options = model["options"]
    folder = models.write_model(tmp_path / "model", **options)
    folds = tuple(range(options.get("folds", 1)))
    array = models.image(model["shape"], options.get("channels", 1))
    expected = stock(folder, folds).predict_single_npy_array(
        array, {"spacing": list(model["spacing"])}, None, None, probabilities
    )
    expected, expected_probabilities = expected if probabilities else (expected, None)
    predicted = Predictor.from_folder(folder, folds, device="cpu").predict(
        array, model["spacing"], probabilities=probabilities
    )
    assert agreement(predicted.segmentation, expected) >= SMALLEST_AGREEMENT
    assert len(np.unique(expected)) > 2, "an empty prediction would agree by chance"
    assert set(predicted.seconds) == {"read", "preprocess", "network", "export"}
    if probabilities:
        assert predicted.probabilities.dtype == expected_probabilities.dtype
        np.testing.assert_allclose(predicted.probabilities, expected_probabilities, atol=2e-3)
        assert np.abs(predicted.probabilities - expected_probabilities).mean() < 1e-5
    else:
        assert predicted.probabilities is None


@pytest.mark.parametrize("options", [{"tile_step_size": 0.8}, {"use_mirroring": False}])
def test_step_size_and_mirroring_are_nnunets(tmp_path, options):
    folder = models.write_model(tmp_path / "model")
    array = models.image((20, 40, 25))
    expected, by_default = (
        stock(folder, **own).predict_single_npy_array(array, {"spacing": [1, 1, 1]}) for own in (options, {})
    )
    got = Predictor.from_folder(folder, device="cpu", **options).predict(array, (1, 1, 1)).segmentation
    assert agreement(got, expected) >= SMALLEST_AGREEMENT > agreement(by_default, expected)


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ([["p1/ct_0000.nii.gz"], ["p2/ct_0000.nii.gz"]], r"two cases called ct, .*p1.* and .*p2"),
        ([["a/ct.nii.gz"]], r"expected channel files as case_0000\.nii\.gz"),
        ([[]], r"Got a case of \[\]"),
    ],
)
def test_lists_of_files_that_cannot_be(files, error):
    with pytest.raises(UsageError, match=error):
        list_cases(files, ".nii.gz")


def test_folds_are_found_and_averaged(tmp_path):
    folder = models.write_model(tmp_path / "model", folds=2)
    array = models.image((18, 20, 22))
    both, first, alone = (Predictor.from_folder(folder, folds, device="cpu") for folds in (None, [0], 0))
    assert both.folds == (0, 1) and first.folds == alone.folds == (0,)
    assert both.engine.folds == 2
    data = torch.from_numpy(array)
    logits = [predictor.predict_logits_from_preprocessed_data(data) for predictor in (both, first)]
    expected = stock(folder, (0, 1)).predict_logits_from_preprocessed_data(data)
    torch.testing.assert_close(logits[0], expected, atol=2e-3, rtol=2e-3)
    assert not torch.allclose(logits[0], logits[1], atol=0.05)


class Counting(torch.nn.Module):
    """Counts the rows it is asked for."""

    def __init__(self, network):
        super().__init__()
        self.network, self.batches = network, []

    def forward(self, x):
        self.batches.append(len(x))
        return self.network(x)


def count(predictor: Predictor) -> list[int]:
    predictor.engine.network = counting = Counting(predictor.engine.network)
    return counting.batches


def test_batches_are_limited_by_their_voxels_and_span_tiles(tmp_path, monkeypatch):
    folder = models.write_model(tmp_path / "model", dimension=2, patch_size=(16, 16))
    data = torch.from_numpy(models.image((1, 32, 24)))
    results, batches = [], []
    for limit in (1, 2 * 256, 12 * 256):
        monkeypatch.setattr(module, "BATCH_VOXELS", limit)
        predictor = Predictor.from_folder(folder, device="cpu")
        batches.append(count(predictor))
        results.append(predictor.predict_logits_from_preprocessed_data(data))
    # Six tiles, four copies of each.
    assert batches == [[1] * 24, [2] * 12, [12, 12]]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=2e-3, rtol=2e-3)


def test_constant_tiles_are_computed_once(tmp_path):
    folder = models.write_model(tmp_path / "model")
    data = torch.zeros(1, 16, 16, 80)
    data[..., 24:32] = torch.randn(8)
    data[..., 64:] = 1.5
    predictor = Predictor.from_folder(folder, device="cpu")
    batches = count(predictor)
    logits = predictor.predict_logits_from_preprocessed_data(data)
    # Tiles start at 0, 8, … 64: zeros at 0, 8, 32, 40 and 48, another constant at 64, and three others; eight copies.
    assert sum(batches) == 8 * (1 + 1 + 3)
    torch.testing.assert_close(logits, stock(folder).predict_logits_from_preprocessed_data(data), atol=2e-3, rtol=2e-3)


def test_constant_tiles_are_remembered_behind_a_batch_of_others(tmp_path):
    """In 2D a batch holds many tiles."""
    folder = models.write_model(tmp_path / "model", dimension=2, patch_size=(16, 16), mirroring=None)
    predictor = Predictor.from_folder(folder, device="cpu")
    batches = count(predictor)
    together = module.BATCH_VOXELS // 16**2
    data = torch.zeros(1, 3 * together, 16, 16)
    data[:, together : 2 * together] = torch.randn(together, 16, 16)
    predictor.predict_logits_from_preprocessed_data(data)
    assert batches == [1, together]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([[1, 1], [2, 2]], (1.0, 2.0)), ([[1, 1], [2, 3]], None), ([[0, 0], [0, 0]], (0.0, 0.0))],
)
def test_constant_values(values, expected):
    assert module.constant_values(torch.tensor(values, dtype=torch.float32)[..., None]) == expected


def test_bf16_is_close_and_is_bf16(tmp_path):
    folder = models.write_model(tmp_path / "model")
    data = torch.from_numpy(models.image((16, 16, 16)))
    full, low = (Predictor.from_folder(folder, precision=p, device="cpu") for p in ("fp32", "bf16"))
    seen = []
    low.engine.network.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    logits = [predictor.predict_logits_from_preprocessed_data(data).float() for predictor in (full, low)]
    assert set(seen) == {torch.bfloat16}
    error = (logits[0] - logits[1]).abs().mean() / logits[0].abs().mean()
    assert 1e-4 < error < 0.05


def test_threads_are_given_back(tmp_path):
    predictor = Predictor.from_folder(models.write_model(tmp_path / "model"), device="cpu", threads=1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        used = []
        predictor.engine.network.register_forward_hook(lambda *_: used.append(torch.get_num_threads()))
        predictor.predict(models.image((16, 16, 16)), (1, 1, 1))
        assert set(used) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_image_of_zeros_is_a_segmentation_too(tmp_path):
    folder = models.write_model(tmp_path / "model")
    array = np.zeros((1, 17, 18, 19), np.int16)
    expected = stock(folder).predict_single_npy_array(array, {"spacing": [1, 1, 1]})
    assert agreement(Predictor.from_folder(folder, device="cpu").predict(array, (1, 1, 1)).segmentation, expected) == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (dict(engine="tensorrt"), "Unknown engine 'tensorrt'; expected torch"),
        (dict(precision="int8"), "no int8 on cpu"),
        (dict(device="tpu"), "Unknown device 'tpu'"),
        (dict(tile_step_size=0), "step size"),
        (dict(threads=0), "threads"),
        (dict(folds=[3]), "there are folds: 0"),
        (dict(checkpoint="checkpoint_best.pth"), "there are folds: none"),
    ],
)
def test_requests_that_cannot_be_met(tmp_path, change, expected):
    folder = models.write_model(tmp_path / "model")
    with pytest.raises(UsageError, match=expected):
        Predictor.from_folder(folder, **{"folds": [0], "device": "cpu", **change})


@pytest.mark.parametrize(
    ("array", "spacing", "expected"),
    [
        (np.zeros((16, 16, 16)), (1, 1, 1), r"shape \(16, 16, 16\)"),
        (np.zeros((1, 16, 16, 16)), (1, 0, 1), "spacing"),
        (np.zeros((2, 16, 16, 16)), (1, 1, 1), "Got 2 channels; expected 1: image0"),
        (np.full((1, 16, 16, 16), np.nan), (1, 1, 1), "4096 of 4096 voxels of channel 0 are NaN"),
        (np.full((1, 16, 16, 16), np.inf), (1, 1, 1), "infinite"),
        (np.zeros((1, 16, 0, 16)), (1, 1, 1), "16 × 0 × 16 voxels"),
    ],
)
def test_images_that_cannot_be_predicted(tmp_path, array, spacing, expected):
    predictor = Predictor.from_folder(models.write_model(tmp_path / "model"), device="cpu")
    with pytest.raises(JobError, match=expected):
        predictor.predict(array, spacing)


@pytest.mark.parametrize("resampling", ["numpy", "torch"])
@pytest.mark.parametrize("is_cascade", [False, True], ids=["one stage", "second stage"])
def test_an_image_without_a_voxel_at_the_networks_spacing(tmp_path, resampling, is_cascade):
    """Which nnU-Net says in words of its own in three of these four."""
    folder = models.write_model(tmp_path / "model", spacing=(3, 1, 1), previous_stage=is_cascade)
    if resampling == "torch":
        plans = json.loads((folder / "plans.json").read_text())
        for planned in plans["configurations"].values():
            for kind in ("data", "seg") if "resampling_fn_data" in planned else ():
                planned[f"resampling_fn_{kind}"], kwargs = TORCH
                planned[f"resampling_fn_{kind}_kwargs"] = kwargs | {"is_seg": kind == "seg"}
        (folder / "plans.json").write_text(json.dumps(plans))
    predictor = Predictor.from_folder(folder, device="cpu")
    for slices, is_too_thin in ((1, True), (2, False)):
        array = models.image((slices, 20, 20))
        given = {"previous_stage": np.ones(array.shape[1:], np.uint8)} if is_cascade else {}
        if is_too_thin:
            with pytest.raises(JobError, match=r"0 × \d+ × \d+ voxels at the network's spacing of 3 × 1 × 1 mm"):
                predictor.predict(array, (1, 1, 1), **given)
        else:
            assert predictor.predict(array, (1, 1, 1), **given).segmentation.any()


def test_logits_that_are_not_finite_are_an_error(tmp_path):
    """At once: nnU-Net predicts again on the CPU after a RuntimeError of its sliding window, which would not help."""
    folder = models.write_model(tmp_path / "model")
    predictor = Predictor.from_folder(folder, device="cpu")
    predictor.perform_everything_on_device = True  # what a GPU has; turns nnU-Net's second attempt on
    batches = count(predictor)
    with torch.no_grad():
        for parameter in predictor.engine.network.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(JobError, match="NaN or too large"):
        predictor.predict(models.image((16, 16, 16)), (1, 1, 1))
    assert sum(batches) == 8


def large_tensors(elements: int) -> int:
    """Tensors that are alive and have at least so many elements."""
    gc.collect()
    return sum(type(thing) is torch.Tensor and thing.numel() >= elements for thing in gc.get_objects())


def test_the_logits_are_freed_before_nnunet_tries_again(tmp_path, monkeypatch):
    """Where memory was lacking, the second attempt must not find the tensors of the first one."""
    predictor = Predictor.from_folder(models.write_model(tmp_path / "model"), device="cpu")
    predictor.perform_everything_on_device = True
    data = torch.from_numpy(models.image((16, 16, 48)))
    expected = predictor.predict_logits_from_preprocessed_data(data)
    infer, size, alive, calls = predictor.engine.infer, expected.numel(), [], itertools.count(1)

    def lack_memory(tiles):
        call = next(calls)
        held = torch.zeros(size)  # what a network holds when it fails
        if call in (9, 10):  # in the second tile, and at the start of the second attempt
            alive.append(large_tensors(size))
        if call == 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        del held
        return infer(tiles)

    monkeypatch.setattr(predictor.engine, "infer", lack_memory)
    monkeypatch.setattr(module, "BATCH_VOXELS", 1)
    logits = predictor.predict_logits_from_preprocessed_data(data)
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=2e-3)
    assert next(calls) == 9 + 5 * 8 + 1 and len(alive) == 2 and alive[0] == alive[1]


@pytest.mark.parametrize("given", [True, False], ids=["parameters", "the network's own"])
def test_manual_initialization(tmp_path, given):
    """nnU-Net's other way to make a predictor: from a network in memory."""
    folder = models.write_model(tmp_path / "model", spacing=(1.2, 1, 1))
    model = load_model(folder)
    weights = model.parameters[0]
    if not given:
        model.network.load_state_dict(weights)
    predictor = Predictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.manual_initialization(model.network, model.plans, model.configuration, [weights] if given else None,
                                    model.dataset, model.trainer, model.mirroring_axes)  # fmt: skip
    array = models.image((16, 20, 18))
    expected = Predictor.from_folder(folder, device="cpu").predict(array, (1, 1, 1)).segmentation
    assert agreement(predictor.predict(array, (1, 1, 1)).segmentation, expected) == 1
    assert len(np.unique(expected)) > 2


def test_the_parameters_after_a_fold_that_does_not_fit():
    """torch copies the tensors that fit before it says that one does not."""
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    right = {name: torch.ones_like(value) for name, value in network.state_dict().items()}
    wrong = {name: torch.zeros(2, 2) for name in right}  # not the shape of a bias
    engine = TorchEngine(network, [right, wrong], torch.device("cpu"), "fp32")
    engine.load(0)
    with pytest.raises(JobError, match="fold number 1 does not fit"):
        engine.load(1)
    engine.load(0)
    assert all(bool((value == 1).all()) for value in network.state_dict().values())
