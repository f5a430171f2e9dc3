"""The ledger lists every linear layer, and the quantization report prints."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from loragraft.quantization.calibrate import ActivationStats
from loragraft.quantization.ledger import build_ledger
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.report import report_table, report_to_dict
from loragraft.quantization.settings import Numerics, QuantSettings, Smoothing
from loragraft.quantization.svdquant import quantize_linear


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


def test_backends_follow_the_model(quantized_flux: FluxTransformer2DModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger that was made on the CPU says what runs the layers once they lie on a GPU."""
    before = replace(build_ledger(quantized_flux), attention="flash_attn_4")
    monkeypatch.setattr("loragraft.quantization.ledger.uses_triton", lambda x: True)  # as on a GPU
    after = before.moved(quantized_flux)
    assert {row.backend for row in after.rows} == {"triton", "torch"}
    assert after.summary() == "bf16 8, w4a16 3, w4a8 17; triton; attention flash_attn_4"
    assert [replace(row, backend="") for row in after.rows] == [replace(row, backend="") for row in before.rows]


def test_report_table() -> None:
    _, report = SVDQuantLinear.from_linear(
        nn.Linear(64, 32), None, QuantSettings(smoothing="weight", rank=4), path="a.b"
    )
    table = report_table([report])
    assert "a.b" in table
    assert f"{100 * report.output_error:.2f}" in table
    assert table.endswith("on N(0, 1) inputs (nothing was measured)")
    described = report_to_dict([report, report])
    assert described["summary"]["w4a8"]["layers"] == 2
    assert described["layers"][0]["path"] == "a.b"
    assert described["summary"]["w4a8"]["inputs"] == ["normal"]
    json.dumps(described)
    mixed = report_table([report, replace(report, inputs="measured")])
    assert "(nothing was measured)" in mixed
    assert mixed.endswith("Errors on unlike inputs are not comparable.")


@pytest.mark.parametrize("numerics", ["w4a8", "nf4"])
def test_a_report_says_what_its_errors_were_measured_on(numerics: Numerics) -> None:
    linear, x = nn.Linear(64, 32), torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    stats = ActivationStats(x.abs().amax(0), x)

    def inputs(measured: ActivationStats | None, smoothing: Smoothing | None) -> str:
        return quantize_linear(linear.weight, None, measured, QuantSettings(numerics, smoothing=smoothing))[1].inputs

    assert inputs(stats, None) == "measured"
    assert inputs(None, "none") == "normal"
    if numerics == "w4a8":
        assert inputs(None, "auto") == "mixed"
