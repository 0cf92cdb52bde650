"""Tiles on regions of interest: where they lie, what is run for them, and that the logits are those of whole tiles."""

import math
from itertools import product

import models
import numpy as np
import pytest
import torch
from cascades import TRAINER, give_every_class
from nnunetv2.inference.sliding_window_prediction import compute_gaussian

from nnunet_dyn.architectures.roi import box_slices, intersection
from nnunet_dyn.architectures.roi_segmentor import ROIDecision
from nnunet_dyn.inference import Predictor
from nnunet_dyn.inference import predictor as module
from nnunet_dyn.inference.regions import Crop, RegionLogits, RegionTile, crops_of_tiles, region_tiles, tile_boxes

PATCH = (16, 16, 16)
# How far rounding to half precision moves a number, relative to it.
HALF = 2**-10
CORNER, FAR = ((0, 4), (0, 5), (0, 3)), ((30, 34), (28, 33), (36, 40))
MIDDLE = ((12, 17), (14, 18), (20, 26))
# Of 2 × 4 × 4 voxels beside MIDDLE: one crop of both is no larger than two.
NEAR = ((18, 20), (14, 18), (20, 26))
LONG = ((4, 34), (10, 14), (10, 14))  # with its margin 32 voxels: tiles at 0, 8 and 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("results"))


def write(folder, patch_size=PATCH, **options):
    return models.write_model(
        folder / f"{TRAINER}__nnUNetDynPlans__3d_roi", folds=2, trainer=TRAINER, template="roi_cascade", part="3d_roi",
        previous_stage="3d_detect", patch_size=patch_size, prepare=give_every_class, **options,
    )  # fmt: skip


def load(folder, folds=(0,), **options) -> Predictor:
    return Predictor.from_folder(folder, folds, device="cpu", threads=1, first_stage=False, **options)


def image(*boxes, shape=(36, 36, 40), seed=0) -> torch.Tensor:
    """(1 + 4, *shape): noise, and a gate for each box, in the four channels in turn."""
    data = torch.zeros(5, *shape)
    data[0] = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for number, box in enumerate(boxes):
        data[(1 + number % 4, *box_slices(box))] = 1
    return data


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (((14, 19), (16, 20), (22, 28)), [(9, 10, 17)]),  # in the middle, half a voxel less where it is odd
        (((0, 3), (1, 2), (30, 40)), [(0, 0, 24)]),  # at the border
        (((10, 26), (0, 16), (5, 9)), [(10, 0, 0)]),  # as large as the tile
        (((3, 35), (20, 24), (20, 24)), [(3, 14, 14), (11, 14, 14), (19, 14, 14)]),
        (((3, 20), (0, 17), (20, 24)), [(3, 0, 14), (3, 1, 14), (4, 0, 14), (4, 1, 14)]),
    ],
)
def test_where_tiles_lie(target, expected):
    boxes = tile_boxes(target, (36, 36, 40), PATCH, 0.5)
    assert [tuple(start for start, _ in box) for box in boxes] == expected
    assert all(stop - start == 16 for box in boxes for start, stop in box)


def test_tiles_of_other_sides_and_steps():
    target = ((3, 15), (0, 30), (10, 20))
    boxes = tile_boxes(target, (20, 40, 40), (8, 16, 24), 1.0)
    assert [tuple(start for start, _ in box) for box in boxes] == [(3, 0, 3), (3, 14, 3), (7, 0, 3), (7, 14, 3)]


def calls_of(predictor) -> list[int]:
    """The rows of each batch that comes to the network, but for those of the meta device, where costs are counted."""
    rows = []

    def count(layer, inputs, output):
        if not inputs[0].is_meta:
            rows.append(len(inputs[0]))

    predictor.network.network.register_forward_hook(count)
    return rows


@pytest.mark.parametrize(
    ("boxes", "tiles"),
    [
        ([], 0),
        ([MIDDLE], 1),
        ([CORNER], 1),
        ([CORNER, FAR], 2),
        ([MIDDLE, NEAR], 1),
        ([MIDDLE, MIDDLE], 1),  # of two labels
        ([LONG], 3),
        ([LONG, ((10, 12), (11, 13), (11, 13))], 3),  # what is inside a larger one is segmented with it
    ],
    ids=["none", "one", "border", "far", "near", "same", "long", "inside"],
)
def test_what_is_run(folder, boxes, tiles):
    """Each tile's crop once a mirrored copy; nothing outside of it is anything but background."""
    predictor = load(folder, (0, 1))
    rows, data = calls_of(predictor), image(*boxes)
    logits = predictor.predict_logits_from_preprocessed_data(data)
    assert sum(rows) == 2 * 8 * tiles and all(len(fold) == tiles for fold in predictor.decided)
    outside = torch.ones(data.shape[1:], dtype=torch.bool)
    for tile in predictor.decided[0]:
        (box,) = tile.boxes
        assert tile.macs == 8 * tile.decision.cost > 0 and intersection(box, tile.tile) == box
        outside[box_slices(box)] = False
    assert not (data[1:] > 0)[:, outside].any()
    assert (logits[0, outside] == 8).all() and (logits[1:, outside] == -8).all()
    assert not tiles or len(logits.argmax(0)[~outside].unique()) > 2


def test_an_image_without_regions_has_no_share_of_the_cost(folder):
    predictor = load(folder, (0, 1))
    predicted = predictor.predict(image()[:1].numpy(), (1, 1, 1), previous_stage=np.zeros((36, 36, 40), np.uint8))
    assert not predicted.segmentation.any()
    totals = predicted.decisions.totals()
    assert (totals["tiles"], totals["shares"], totals["relative_macs"], totals["macs_all_copies"]) == (0, {}, 0, 0)
    assert predicted.decisions.to_json("a")["window"]["tiles"] == 4 * 4 * 4


@pytest.mark.parametrize("shape", [(36, 36, 40), (12, 16, 40)], ids=["larger", "padded"])
def test_the_share_is_of_nnunets_tiles(folder, shape):
    predictor = load(folder, use_mirroring=False)
    predictor.predict_logits_from_preprocessed_data(
        image(((4, 8), (4, 8), (20, 24)), ((3, 5), (3, 5), (2, 4)), shape=shape)
    )
    decisions = predictor._case_decisions(
        shape, {"shape_before_cropping": shape, "bbox_used_for_cropping": ((0, 1),) * 3}
    )
    padded = tuple(max(16, side) for side in shape)
    slicers = predictor._internal_get_sliding_window_slicers(padded)
    tiles = len(slicers)
    inside = torch.zeros(padded)
    for slicer in slicers:
        inside[slicer[1:]] += 1
    offset = [(big - small) // 2 for big, small in zip(padded, shape, strict=True)]
    voxels = inside[tuple(slice(a, a + side) for a, side in zip(offset, shape, strict=True))].sum()
    assert decisions.window == (tiles, voxels)
    spent = sum(tile.decision.cost for tile in decisions.tiles)
    assert decisions.totals()["tiles"] == 2 and decisions.totals()["shares"] == {"crop": 1.0}
    assert decisions.totals()["mean_macs"] == pytest.approx(spent / tiles, abs=1)
    assert decisions.totals()["relative_macs"] == pytest.approx(spent / tiles / decisions.everything_macs, abs=1e-6)


def of_whole_tile(network, tile, copies) -> torch.Tensor:
    """(classes, *patch), the mean of the mirrored copies of a tile, each executed as a whole."""
    (decision,) = network.decide(tile[None])
    total = 0
    for axes in copies:
        order = decision.mirrored([axis - 1 for axis in axes], tuple(tile.shape[1:]))
        total = total + network.execute(tile.flip(axes)[None], [order])[0][0].flip(axes)
    return total / len(copies)


@pytest.mark.parametrize("mode", ["own", "paper"])
@torch.inference_mode()
def test_averaged_on_the_crop_is_what_averaged_tiles_are(tmp_path, mode):
    """Also where crops of a tile overlap: two long boxes that cross are no joint crop, nor are two at an edge."""
    crossing = ((2, 30), (14, 17), (14, 17)), ((12, 15), (2, 30), (13, 16))
    predictor = load(write(tmp_path, (32, 32, 32), arch_kwargs={"mode": mode}))
    predictor.engine.load(0)
    network, copies = predictor.network, predictor.mirrored_axes()
    tile = image(*crossing, ((25, 30), (25, 30), (25, 30)), shape=(32, 32, 32))
    (decision,) = network.decide(tile[None])
    assert len(decision.boxes) == 3 and intersection(*decision.boxes[:2])
    whole = RegionTile(((0, 32),) * 3, ((0, 32),) * 3, decision)
    crops = crops_of_tiles(network, [whole])
    total = RegionLogits(crops, network.background_logits, (32,) * 3, use_gaussian=False)
    for crop in crops:
        (mean,) = predictor._mean_of_copies([network.cut(tile, crop.box)], copies, 3, predictor.engine.infer_crops)
        total.add(crop, network.restore(*mean, crop.box))
    expected = of_whole_tile(network, tile, copies)
    assert expected.argmax(0).unique().numel() > 2
    assert torch.allclose(total.mean().float(), expected, atol=1e-4, rtol=HALF)


def by_hand(predictor, data) -> torch.Tensor:
    """(classes, *shape) of one fold: a slow loop over tiles that are executed as a whole, each with one crop."""
    network, copies = predictor.network, predictor.mirrored_axes()
    total, weights = torch.zeros(5, *data.shape[1:]), torch.zeros(data.shape[1:])
    for tile, at in zip(predictor.tiles(data), predictor.decided[0], strict=True):
        (box,) = at.boxes
        size = tuple(stop - start for start, stop in box)
        weight = torch.zeros(data.shape[1:])
        # In double precision: in nnU-Net's, half, what is near zero would be rounded.
        weight[box_slices(box)] = compute_gaussian(size, 1 / 8, 10, torch.float64, torch.device("cpu")).float()
        weights += weight
        total[(slice(None), *box_slices(at.tile))] += of_whole_tile(network, tile, copies) * weight[box_slices(at.tile)]
    return torch.where(weights > 0, total / weights, network.background_logits.view(-1, 1, 1, 1))


@torch.inference_mode()
def test_crops_are_weighted_as_nnunets_tiles(folder):
    """A region of three tiles, and one apart."""
    predictor, data = load(folder), image(LONG, FAR)
    logits = predictor.predict_logits_from_preprocessed_data(data).float()
    expected = by_hand(predictor, data)
    assert len(predictor.decided[0]) == 4 and torch.allclose(logits, expected, atol=1e-4, rtol=HALF)


@torch.inference_mode()
def test_folds_are_averaged_and_tiles_found_once(folder, monkeypatch):
    predictor, data, found = load(folder, (0, 1)), image(MIDDLE, FAR), []
    monkeypatch.setattr(module, "region_tiles", lambda *given: found.append(region_tiles(*given)) or found[-1])
    logits = predictor.predict_logits_from_preprocessed_data(data).float()
    assert len(found) == 1 and predictor.decided[0] == predictor.decided[1]
    found.clear()
    of_fold = []
    for fold in range(2):
        predictor.engine.load(fold)
        of_fold.append(by_hand(predictor, data))
    assert (of_fold[0] - of_fold[1]).abs().max() > 1
    assert torch.allclose(logits, (of_fold[0] + of_fold[1]) / 2, atol=0.02, rtol=2 * HALF)
    assert len(found) == 2, "outside of a prediction nothing is kept"
    predictor.predict_logits_from_preprocessed_data(image(CORNER))
    assert len(found) == 3 and len(found[-1]) == 1, "another image has its own"


@torch.inference_mode()
def test_a_crop_as_large_as_its_tile_keeps_its_digits(folder):
    """Also in the corners, where weights are smallest."""
    predictor, data = load(folder, use_mirroring=False), image(((10, 24), (11, 25), (12, 26)))
    logits = predictor.predict_logits_from_preprocessed_data(data)
    (tile,) = predictor.decided[0]
    assert tile.boxes == (tile.tile,) and tile.tile == ((9, 25), (10, 26), (11, 27))
    at = (slice(None), *box_slices(tile.tile))
    expected = predictor.network.network(data[at][None, :1])[0]
    assert torch.allclose(logits[at].float(), expected, atol=1e-4, rtol=HALF)


@torch.inference_mode()
def test_an_image_smaller_than_the_patch(folder):
    """What lies in the image of the logits of its one tile, padded by zeros."""
    predictor, data = load(folder), image(((3, 8), (2, 9), (4, 10)), shape=(12, 11, 16))
    logits = predictor.predict_logits_from_preprocessed_data(data).float()
    padded = torch.nn.functional.pad(data, (0, 0, 2, 3, 2, 2))
    expected = of_whole_tile(predictor.network, padded, predictor.mirrored_axes())[:, 2:14, 2:13]
    assert logits.shape == (5, 12, 11, 16) and len(logits.argmax(0).unique()) > 2
    assert torch.allclose(logits, expected, atol=1e-4, rtol=HALF)


@torch.inference_mode()
def test_lower_precision_is_that_of_the_crops(folder):
    data = image(MIDDLE, FAR)
    single, half = (
        load(folder, precision=precision).predict_logits_from_preprocessed_data(data).float()
        for precision in ("fp32", "bf16")
    )
    outside = single[0] == 8
    assert torch.equal(half[:, outside], single[:, outside]) and 0 < (~outside).float().mean() < 0.2
    assert 0 < (half - single).abs().max() < 0.1 * single[:, ~outside].abs().max()


def two_crops(*pairs) -> list[Crop]:
    """Of (crop, target) pairs, in voxels of the image, each of a region and a tile of its own."""
    crops = []
    for box, target in pairs:
        crop, inner = (((0, box[1] - box[0]),), (tuple(end - box[0] for end in target),))
        tile = RegionTile((box,), (target,), ROIDecision((crop,), (inner,)))
        crops.append(Crop((box,), (target,), tile, (box[1] - box[0],)))
    return crops


def test_the_crop_with_a_target_there_counts():
    """Two regions, each a tile of its own, whose crops overlap; both targets meet in one voxel."""
    crops = two_crops(((0, 8), (1, 5)), ((2, 10), (4, 7)))
    total = RegionLogits(crops, torch.tensor([8.0, -8.0]), (12,), use_gaussian=False)
    for crop, value in zip(crops, (1.0, 4.0), strict=True):
        total.add(crop, torch.full((2, 8), value))
    logits = total.mean()
    assert logits[1].tolist() == [1, 1, 1, 1, 2.5, 4, 4, 2.5, 4, 4, -8, -8] and logits[0, 10:].tolist() == [8, 8]


def test_the_crop_with_the_voxel_in_its_middle_counts_more():
    """Both targets have voxels 12 to 15, of the large one the middle and of the small one the end."""
    crops = two_crops(((0, 28), (1, 27)), ((8, 16), (12, 16)))
    total = RegionLogits(crops, torch.tensor([8.0, -8.0]), (28,))
    for crop, value in zip(crops, (1.0, 4.0), strict=True):
        total.add(crop, torch.full((2, crop.size[0]), value))
    values = total.mean()[1].tolist()
    assert values[:12] == values[16:] == [1.0] * 12
    assert values[12] > 2 and values[12] > values[13] > values[14] > values[15] and values[15] < 1.1


@pytest.mark.parametrize("patch", [PATCH, (8, 16, 24)])
def test_every_voxel_of_the_gate_is_covered(tmp_path, folder, patch):
    """Of boxes of all sizes, of speckle, and of what is no box."""
    predictor = load(folder if patch == PATCH else write(tmp_path, patch))
    shape, rng = (40, 36, 44), np.random.default_rng(0)
    images = [image(shape=shape)]
    images[0][1][torch.from_numpy(rng.random(shape) < 0.001)] = 1  # 63 voxels apart
    for _ in range(4):
        boxes = []
        for _ in range(rng.integers(1, 7)):
            size = rng.integers(1, [min(30, side) for side in shape])
            start = [rng.integers(0, side - own + 1) for side, own in zip(shape, size, strict=True)]
            boxes.append(tuple((int(a), int(a + b)) for a, b in zip(start, size, strict=True)))
        images.append(image(*boxes, shape=shape))
    images[-1][2][10:20, 10:20, 10:20] = 0  # a hole
    for data in images:
        gate = (data[1:] > 0).any(0)
        tiles = region_tiles(predictor.network, data, patch, 0.5)
        crops = crops_of_tiles(predictor.network, tiles)
        assert gate.any() and all(tuple(b - a for a, b in tile.box) == patch for tile in tiles)
        total = RegionLogits(crops, torch.zeros(1), shape)
        for crop in crops:
            assert intersection(crop.box, crop.tile.box) == crop.box
            gate[box_slices(crop.target)] = False
            total.add(crop, torch.ones(1, *(b - a for a, b in crop.box)))
        assert not gate.any()
        covered = torch.zeros(shape, dtype=torch.bool)
        for crop in crops:
            covered[box_slices(crop.box)] = True
        assert torch.equal(total.mean()[0], covered.half()), "every voxel of a crop has a crop that counts"


def tiles_in(size) -> int:
    """How many tiles a box of ``size`` takes."""
    return math.prod(max(1, math.ceil((side - 16) / 8) + 1) for side in size)


@pytest.mark.parametrize("side", [1, 10])
def test_many_regions_far_apart_stay_as_they_are(folder, side):
    """Each costs what it costs alone."""
    network, shape = load(folder).network, (250, 200, 100)
    boxes = [tuple((50 * a + 20, 50 * a + 20 + side) for a in place) for place in product(range(5), range(4), (0, 1))]
    gate = np.zeros(shape, bool)
    for box in boxes:
        gate[box_slices(box)] = True
    regions = network.regions([gate], shape, PATCH, tiles_in)
    assert len(boxes) == 40 and sorted(box for box, _ in regions) == sorted(boxes)
    assert all(target == tuple((a - 1, b + 1) for a, b in box) for box, target in regions)


def test_speckle_takes_little_to_find(folder):
    """Thousands of voxels, which are a few hundred regions; all are covered."""
    network, gate = load(folder).network, np.random.default_rng(0).random((128, 128, 128)) < 0.002
    regions = network.regions([gate], gate.shape, PATCH, tiles_in)
    assert gate.sum() > 4000 and 1 <= len(regions) <= 512
    for box, _ in regions:
        gate[box_slices(box)] = False
    assert not gate.any()


def test_copies_run_in_batches_as_large_as_is_fast(folder, monkeypatch):
    predictor, data = load(folder), image(MIDDLE, FAR, CORNER)
    rows = calls_of(predictor)
    expected = predictor.predict_logits_from_preprocessed_data(data)
    sizes = [tuple(b - a for a, b in tile.boxes[0]) for tile in predictor.decided[0]]
    assert len(set(sizes)) == 1 and rows == [24], "crops of one size are run together"
    rows.clear()
    monkeypatch.setattr(module, "BATCH_VOXELS", 5 * math.prod(sizes[0]))
    some = predictor.predict_logits_from_preprocessed_data(data)
    assert rows == [5, 3] * 3
    assert torch.equal(expected, some) or (expected - some).abs().max() < 0.02


def test_another_step_leaves_nothing_out_of_regions(folder, recwarn):
    predictor = load(folder, tile_step_size=1.0, use_mirroring=False)
    logits = predictor.predict_logits_from_preprocessed_data(image(LONG))
    assert not [warning for warning in recwarn if "step size" in str(warning.message)]
    assert len(predictor.decided[0]) == 2 and (logits[0, 4:34, 10:14, 10:14] != 8).all()
