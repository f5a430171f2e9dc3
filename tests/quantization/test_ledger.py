"""The ledger lists every linear layer, and the quantization report prints."""

import json

from diffusers import FluxTransformer2DModel
from torch import nn

from loragraft.quantization.ledger import build_ledger
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.report import report_table, report_to_dict
from loragraft.quantization.settings import QuantSettings


def test_nothing_is_left_out(quantized_flux: FluxTransformer2DModel) -> None:
    ledger = build_ledger(quantized_flux)
    linears = [p for p, m in quantized_flux.named_modules() if isinstance(m, (nn.Linear, SVDQuantLinear))]
    assert [row.path for row in ledger.rows] == linears
    described = ledger.to_dict()
    assert described["layers"] == {"bf16": 8, "w4a16": 3, "w4a8": 17}
    assert sum(described["nbytes"].values()) == sum(row.nbytes for row in ledger.rows)
    json.dumps(described)
    by_path = {row.path: row for row in ledger.rows}
    row = by_path["single_transformer_blocks.0.proj_out"]
    assert (row.numerics, row.out_features, row.in_features, row.rank, row.backend) == (
        "w4a8",
        128,
        640,
        4,
        "reference",
    )
    assert row.error is not None
    assert 0 < row.error < 0.2
    assert by_path["x_embedder"].backend == "torch"
    table = ledger.table()
    assert all(path in table for path in linears)
    assert table.endswith("bf16 8, w4a16 3, w4a8 17; reference")


def test_report_table() -> None:
    _, report = SVDQuantLinear.from_linear(
        nn.Linear(64, 32), None, QuantSettings(smoothing="weight", rank=4), path="a.b"
    )
    table = report_table([report])
    assert "a.b" in table
    assert f"{100 * report.output_error:.2f}" in table
    described = report_to_dict([report, report])
    assert described["summary"]["w4a8"]["layers"] == 2
    assert described["layers"][0]["path"] == "a.b"
    json.dumps(described)
