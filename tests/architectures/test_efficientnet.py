import pytest
import torch
from plans import encoder
from torch import nn

from nnunet_dyn.architectures.blocks import FusedMBConv, MBConv
from nnunet_dyn.architectures.efficientnet import (
    BATCH_NORM_KWARGS,
    VARIANTS,
    blocks_per_resolution,
    round_to_8,
)


@pytest.mark.parametrize(("channels", "rounded"), [(35.2, 32), (38.4, 40), (26.4, 24), (4, 8), (44, 48), (76, 80)])
def test_round_to_8(channels, rounded):
    assert round_to_8(channels) == rounded


def test_squeezed_channels_follow_the_two_rules():
    assert [VARIANTS["b0"].squeezed_channels(c) for c in (32, 24, 1)] == [8, 6, 1]
    assert [VARIANTS["v2m"].squeezed_channels(c) for c in (64, 176, 304)] == [16, 48, 80]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("deep_groups", ["truncate", "merge"])
def test_blocks_for_any_number_of_stages(variant, deep_groups):
    all_blocks = sum(stage.repeats for stage in VARIANTS[variant].stages)
    for n_stages in range(2, 9):
        resolutions = blocks_per_resolution(VARIANTS[variant], n_stages, deep_groups)
        assert len(resolutions) == n_stages and resolutions[0] == []
        assert all([block.takes_stride for block in blocks] == [True] + [False] * (len(blocks) - 1)
                   for blocks in resolutions[1:])  # fmt: skip
        flat = [block for blocks in resolutions for block in blocks]
        channels = [VARIANTS[variant].stem_channels] + [block.stage.channels for block in flat]
        assert [block.input_channels for block in flat] == channels[:-1]
        last = VARIANTS[variant].stages[-1]
        if n_stages > 6:
            assert len(flat) == all_blocks + (n_stages - 6) * last.repeats
            assert all(block.stage == last for blocks in resolutions[6:] for block in blocks)
        elif n_stages == 6 or deep_groups == "merge":
            assert len(flat) == all_blocks
        else:
            assert {block.stage.group for block in flat} == set(range(1, n_stages))


def test_too_few_stages():
    with pytest.raises(ValueError, match=r"n_stages=1; expected at least 2"):
        blocks_per_resolution(VARIANTS["b0"], 1, "merge")


@pytest.mark.parametrize(("deep_groups", "last"), [(None, {(5, 5, 5)}), ("merge", {(5, 5, 5), (3, 3, 3)})])
def test_resolutions_follow_the_plans_strides_and_kernels(deep_groups, last):
    """A flat kernel of the plans stays flat in every convolution of its stage, and a stride of 1 is none."""
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2]]
    kernels = [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]]
    options = {"deep_groups": deep_groups} if deep_groups else {}  # truncate is the default
    network = encoder("b0", n_stages=4, strides=strides, kernel_sizes=kernels, options=options)
    outputs = network(torch.randn(1, 1, 4, 16, 16))
    assert [tuple(o.shape[2:]) for o in outputs] == [(4, 16, 16), (4, 8, 8), (2, 4, 4), (2, 2, 2)]
    assert [o.shape[1] for o in outputs] == network.output_channels
    sizes = {
        index: {m.kernel_size for m in stage.modules() if isinstance(m, nn.Conv3d) and m.kernel_size != (1, 1, 1)}
        for index, stage in enumerate(network.stages)
    }
    assert sizes == {0: {(1, 3, 3)}, 1: {(1, 3, 3)}, 2: {(3, 3, 3)}, 3: last}


def test_a_stem_with_a_stride():
    network = encoder("b0", n_stages=3, strides=[[2, 2, 2], [2, 2, 2], [1, 1, 1]])
    assert [o.shape[-1] for o in network(torch.randn(1, 1, 8, 8, 8))] == [4, 2, 2]


@pytest.mark.parametrize("dimension", [2, 3])
def test_block_types(dimension):
    b0, v2s = (encoder(v, dimension=dimension, n_stages=5) for v in ("b0", "v2s"))
    kinds = [[type(block) for block in stage] for stage in v2s.stages[1:]]
    assert set(kinds[0]) == set(kinds[1]) == set(kinds[2]) == {FusedMBConv} and set(kinds[3]) == {MBConv}
    assert all(isinstance(block, MBConv) for stage in b0.stages[1:] for block in stage)


def test_stochastic_depth_grows_linearly_and_is_off_by_default():
    rates = [m.drop_path.drop_prob for m in encoder("b0", options={"drop_path_rate": 0.2}).modules()
             if isinstance(m, MBConv) and hasattr(m.drop_path, "drop_prob")]  # fmt: skip
    assert rates == sorted(rates) and rates[0] > 0 and rates[-1] < 0.2
    assert not any(hasattr(m.drop_path, "drop_prob") for m in encoder("b0").modules() if isinstance(m, MBConv))


def test_the_papers_batch_norm():
    network = encoder("b0", options={"norm_op": nn.BatchNorm3d, "norm_op_kwargs": BATCH_NORM_KWARGS})
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm3d)]
    assert norms and all(m.eps == 1e-3 and m.momentum == 0.01 for m in norms)


def test_unknown_words_and_wrong_lengths():
    with pytest.raises(ValueError, match=r"deep_groups got 'mrege'; expected one of \('truncate', 'merge'\)"):
        encoder(options={"deep_groups": "mrege"})
    with pytest.raises(ValueError, match=r"Unknown EfficientNet variant 'b9'. Expected one of b0, b1"):
        encoder("b9")
    with pytest.raises(ValueError, match=r"strides got .* expected 6 entries .* of 3 numbers .* Correct the arch"):
        encoder(strides=[[1, 1, 1]] * 5)
    with pytest.raises(ValueError, match=r"kernel_sizes got"):
        encoder(kernel_sizes=[[3, 3]] * 6)
