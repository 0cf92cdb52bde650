"""Every number of the paper's Table 1 (``nnunet_dyn/table1.csv``): parameters and operations, all 24 rows."""

import pytest
from plans import NETWORKS, build

from nnunet_dyn.accounting import count_operations, count_parameters
from nnunet_dyn.architectures.efficientnet import VARIANTS
from nnunet_dyn.profiling import agrees, read_table1

TABLE = read_table1()


WRONG_IN_THE_PAPER = "FullyEfficientUNet-b4"


def network_name(row: str) -> str:
    """The table's row name → the name that ``plans.build`` takes."""
    return row.replace("UNetV2-", "UNet-v2").replace("v2S", "v2s").replace("v2M", "v2m").replace("v2L", "v2l")


def decoder_blocks(network, by_module):
    return sum(by_module[f"decoder.stages.{level}"] for level in range(len(network.decoder.stages)))


def unused_head(network) -> int:
    """Parameters of the classification head that the paper counts: 1×1 convolution, norm, linear layer."""
    variant = network.encoder.variant
    head = variant.head_channels
    return variant.stages[-1].channels * head + 2 * head + (head + 1) * 1000


def test_the_table_has_every_network():
    assert sorted(network_name(row["name"]) for row in TABLE) == sorted([*NETWORKS, "GenericUNet"])


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row["name"])
def test_parameters_and_operations_are_the_papers(row):
    network = build(network_name(row["name"]), num_classes=int(row["num_classes"]))
    heads = sum(layer.in_channels for layer in network.decoder.seg_layers) * (4 - int(row["num_classes"]))
    assert count_parameters(network) + heads == int(row["live_params_net_4_classes"])
    assert count_parameters(network.encoder) == int(row["live_params_enc"])
    assert count_parameters(network.decoder.stages) == int(row["live_params_dec"])
    head = 0
    if "Generic" not in row["name"]:
        head = unused_head(network)
        with_head = count_parameters(network.encoder) + head
        assert with_head == int(row["params_enc_with_unused_head"])
    if row["name"] != WRONG_IN_THE_PAPER:
        cells = {
            "params_enc": count_parameters(network.encoder) + head,
            "params_dec": count_parameters(network.decoder.stages),
            "params_net": count_parameters(network) + head,
        }
        for cell, value in cells.items():
            assert agrees(value, row[f"paper_{cell}"]), cell
    assert network.encoder.output_channels == [int(c) for c in row["encoder_channels_per_resolution"].split(";")]

    counted = count_operations(network, (2, 1, 128, 128, 128))
    assert counted.total == int(row["flops_net"])
    assert counted.by_module["encoder"] == int(row["flops_enc"])
    assert decoder_blocks(network, counted.by_module) == int(row["flops_dec"])
    if row["name"] != WRONG_IN_THE_PAPER:
        for cell in ("net", "enc", "dec"):
            assert agrees(int(row[f"flops_{cell}"]), row[f"paper_flops_{cell}"]), cell


def test_one_row_of_the_paper_repeats_another():
    """FullyEfficientUNet-b4 is printed with EfficientUNet-b4's cells; every other cell agrees with the networks."""
    printed = ("paper_flops_net", "paper_flops_dec", "paper_params_net", "paper_params_dec")
    rows = {row["name"]: row for row in TABLE}
    assert [rows["FullyEfficientUNet-b4"][key] for key in printed] == [rows["EfficientUNet-b4"][key] for key in printed]
    own = build("FullyEfficientUNet-b4")
    assert count_parameters(own.decoder.stages) == 8081156 != count_parameters(build("EfficientUNet-b4").decoder.stages)


def test_variants_are_the_papers_eleven():
    assert list(VARIANTS) == [f"b{i}" for i in range(8)] + ["v2s", "v2m", "v2l"]
