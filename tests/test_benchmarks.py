"""The committed results hold what the documents point to, and the shipped weights stay light."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from loragraft.backbones.load import list_bases, shipped_bases
from loragraft.recipes.schema import Numerics

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

TRAINING_KEYS = (
    "device versions commit command step_1024_vs_eager step_1024_vs_compiled step_1024_vs_compiled_same_attention "
    "step_1024_vs_fp8 step_1024_vs_nf4 step_512_vs_eager step_512_vs_compiled peak_gib_ckpt_1024 peak_gib_nockpt_1024 "
    "reserved_gib_whole_run_1024 first_step_seconds preflight_worst_pct grad_cosine_min image_20_steps_vs_bf16 "
    "image_memory_vs_bf16 ddp2_scaling"
)
ADAPTERS_KEYS = (
    "device versions commit command seed graft_rel_dev_bf16 graft_rel_dev_fp32 switch_ms transfer merge_requantize"
)
BASES_KEYS = "params file_gb step_ms peak_gib preflight_gib conv_vs_cudnn"
LADDER_KEYS = "file_mb seconds_per_step seconds_per_image peak_training_mib kid_base kid_adapted"


def committed(name: str) -> dict[str, Any]:
    """benchmarks/results/<name>.json."""
    result: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return result


def test_no_script_names_a_result_that_is_not_there() -> None:
    named = {
        (script.name, result)
        for script in (ROOT / "benchmarks").glob("*.py")
        for result in re.findall(r"benchmarks/results/\w+\.json", script.read_text(encoding="utf-8"))
    }
    assert ("fidelity.py", "benchmarks/results/fidelity.json") in named
    assert [(script, result) for script, result in sorted(named) if not (ROOT / result).is_file()] == []


def test_the_committed_main_job_has_every_figure() -> None:
    result = committed("main_job")
    assert [key for key in KEYS.split() if key not in result] == []
    assert result["kid_adapter"]["high"] < result["kid_base"]["low"]


def test_the_committed_engine_figures_are_complete_and_passed_their_gate() -> None:
    result = committed("int4_engine")
    assert [key for key in ENGINE_KEYS.split() if key not in result] == []
    assert result["max_rel_err"] <= 5e-3
    assert result["same_bits_twice"]


def test_the_committed_training_figures_are_complete_and_of_one_run() -> None:
    """Every training step and its rivals on one commit and one card, the same losses, and a time to the first step."""
    result = committed("flux_training")
    assert [key for key in TRAINING_KEYS.split() if result.get(key) is None] == []
    assert result["loss_worst_pct"] <= 2
    steps = {name: part for name, part in result["parts"].items() if "step_ms" in part and "losses" in part}
    compared = {name: part for name, part in steps.items() if part.get("resolution")}
    assert len(compared) >= 10
    assert len({(part["commit"], part["device"]) for part in compared.values()}) == 1
    assert all(part["timed_alone"] for part in compared.values())


def test_the_committed_sanitizer_runs_found_only_what_was_planted() -> None:
    result = committed("sanitizer")
    assert {"memcheck", "synccheck"} <= set(result["tools"])
    assert result["passed"]
    assert result["planted_found"]
    verdicts = {run["verdict"] for name, runs in result["cases"].items() if name != "planted" for run in runs.values()}
    assert verdicts == {"clean"}


def test_the_committed_gradients_of_w4a8_are_those_of_exact_arithmetic() -> None:
    """Closer to it than bf16's are; in the whole model and layer by layer."""
    result = committed("fidelity")
    assert result["adapter_steps"] >= 100
    assert result["grad_cosine_min"] >= 0.999
    assert result["grad_cosine_min"] > result["grad_cosine_of_bf16"]
    for name in ("w4a8", "w4a8, x kept raw", "w4a8, int8 dgrad"):
        kinds = result["variants"][name]["whole_model"]["dequantized"]["kinds"]
        assert len(kinds) == 20
        assert all(row[q]["cosine"] >= 0.999 for row in kinds.values() for q in ("A", "B", "x")), name


def test_the_committed_adapters_are_exact_on_trained_factors_and_switch_fast() -> None:
    """The bounds: 1e-5 in float32, 5e-3 in bf16, 100 ms for five adapters of rank 32 on FLUX.1-dev; both domains in the tables."""
    result = committed("adapters")
    assert [key for key in ADAPTERS_KEYS.split() if key not in result] == []
    assert result["passed"]
    assert result["graft_rel_dev_fp32"] <= 1e-5
    assert result["graft_rel_dev_bf16"] <= 5e-3
    for name, part in result["graft"]["flux_shapes"].items():
        assert part["factors"].startswith("trained"), name
        assert part["width"] == 3072, name
        assert part["loss_left"] < 1, name
    assert result["graft"]["pocket"]["velocity_change"] >= 0.05
    assert result["switch_ms"] < 100
    assert (result["switch"]["adapters"], result["switch"]["rank"], result["switch"]["base"]) == (5, 32, "flux1-dev")
    precisions = {"W4A8", "W4A4", "NF4", "16-bit"}
    assert {"marketing", "design"} <= result["transfer"].keys() & result["merge_requantize"].keys()
    for recipe, rows in result["transfer"].items():
        assert rows.keys() == precisions | {"none"}, recipe
        assert all(row.keys() == precisions for row in rows.values()), recipe


def test_every_base_was_measured_within_what_preflight_said() -> None:
    result = committed("bases")
    assert result["bases"].keys() == set(list_bases()) - set(shipped_bases())
    for base, row in result["bases"].items():
        assert [key for key in BASES_KEYS.split() if key not in row] == [], base
        assert row["step_ms"] > 0, base
        assert row["memory_holds"], base
    assert result["bases"]["sdxl"]["conv_vs_cudnn"] is not None


def test_every_precision_has_its_rung() -> None:
    result = committed("precision_ladder")
    assert result["precisions"].keys() == set(get_args(Numerics))
    for precision, row in result["precisions"].items():
        assert [key for key in LADDER_KEYS.split() if key not in row] == [], precision
        assert precision == "16bit" or {"psnr_db", "kid_lite0"} <= row["to_16bit"].keys(), precision
    psnr = {p: result["precisions"][p]["to_16bit"]["psnr_db"]["value"] for p in ("native", "interchange", "int2")}
    assert psnr["native"] > psnr["interchange"] > psnr["int2"]


def test_weights_stay_under_forty_megabytes(benchmark_module: Callable[[str], ModuleType]) -> None:
    """A clone must stay light (docs: pretrain/README.md)."""
    files = benchmark_module("main_job").shipped_weights()
    assert len(files) == 4, [file.name for file in files]
    assert sum(file.stat().st_size for file in files) <= 40e6
