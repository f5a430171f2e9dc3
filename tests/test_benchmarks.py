"""The committed results hold what the documents point to, and the shipped weights stay light."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
KEYS = (
    "device versions commit command seed train_seconds tests_seconds pocket_kid pocket_retrieval real_retrieval "
    "autoencoder_psnr_db kid_real_floor kid_base kid_adapter retrieval_base retrieval_adapter control_kid psnr_rtn_w4a4 "
    "psnr_svdq_w4a4 psnr_svdq_w4a8 psnr_nf4 weights_mb"
)

ENGINE_KEYS = (
    "device versions commit command linears_speedup_w4a8 linears_vs_fp8 fused_vs_unfused train_linears_speedup_w4a8 "
    "branch_cost_pct graft_cost_pct w4a4_vs_comfy_kitchen w4a4_vs_bf16 w4a16_bandwidth_fraction max_rel_err auto_error_ratio "
    "quantize_seconds calibrated_seconds quantize_peak_gib file_gb"
)


def test_the_committed_main_job_has_every_figure() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "main_job.json").read_text(encoding="utf-8"))
    assert [key for key in KEYS.split() if key not in result] == []
    assert result["kid_adapter"]["high"] < result["kid_base"]["low"]


def test_the_committed_engine_figures_are_complete_and_passed_their_gate() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "int4_engine.json").read_text(encoding="utf-8"))
    assert [key for key in ENGINE_KEYS.split() if key not in result] == []
    assert result["max_rel_err"] <= 5e-3
    assert result["same_bits_twice"]


def test_the_committed_gradients_of_w4a8_are_those_of_exact_arithmetic() -> None:
    """Closer to it than bf16's are; in the whole model and layer by layer."""
    result = json.loads((ROOT / "benchmarks" / "results" / "fidelity.json").read_text(encoding="utf-8"))
    assert result["adapter_steps"] >= 100
    assert result["grad_cosine_min"] >= 0.999
    assert result["grad_cosine_min"] > result["grad_cosine_of_bf16"]
    for name in ("w4a8", "w4a8, x kept raw", "w4a8, int8 dgrad"):
        kinds = result["variants"][name]["whole_model"]["dequantized"]["kinds"]
        assert len(kinds) == 20
        assert all(row[q]["cosine"] >= 0.999 for row in kinds.values() for q in ("A", "B", "x")), name


def test_weights_stay_under_forty_megabytes(benchmark_module: Callable[[str], ModuleType]) -> None:
    """A clone must stay light (docs: pretrain/README.md)."""
    files = benchmark_module("main_job").shipped_weights()
    assert len(files) == 4, [file.name for file in files]
    assert sum(file.stat().st_size for file in files) <= 40e6
