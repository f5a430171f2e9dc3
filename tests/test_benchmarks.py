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


def test_the_committed_main_job_has_every_figure() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "main_job.json").read_text(encoding="utf-8"))
    assert [key for key in KEYS.split() if key not in result] == []
    assert result["kid_adapter"]["high"] < result["kid_base"]["low"]


def test_weights_stay_under_forty_megabytes(benchmark_module: Callable[[str], ModuleType]) -> None:
    """A clone must stay light (docs: pretrain/README.md)."""
    files = benchmark_module("main_job").shipped_weights()
    assert len(files) == 4, [file.name for file in files]
    assert sum(file.stat().st_size for file in files) <= 40e6
