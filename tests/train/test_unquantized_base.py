"""`numerics=16bit`: ordinary LoRA through the same commands, to compare with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from loragraft.adapters.checkpoint import load_adapter
from loragraft.backbones.load import load_backbone

ROOT = Path(__file__).parents[2]


def command(folder: Path, *words: str) -> str:
    environment = {**os.environ, "LORAGRAFT_CACHE": str(folder / "cache"), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_it_trains_says_so_and_draws_on_the_base_that_it_was_trained_on(tmp_path: Path) -> None:
    log = command(
        tmp_path, str(ROOT / "train" / "lora.py"), "--recipe", "marketing", "--cpu", "--out", "run", "numerics=16bit",
        "data.count=20", "data.limit=10", "train.steps=2", "train.batch_size=2", "train.threads=1", "adapter.rank=2",
        "optim.warmup_steps=0", "sample.steps=1", "sample.guidance=1", "sample.prompts=[white heart icon]",
        "tracking.mode=disabled",
    )  # fmt: skip
    assert "w4a" not in log
    adapter = load_adapter(tmp_path / "run" / "adapter")
    assert adapter.metadata["profile"] == "16bit"
    assert adapter.base_id == load_backbone("pocket", None, "cpu", tmp_path).base_id
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    command(
        tmp_path, "-m", "loragraft.cli", "generate", "--adapter", "run", "--prompt", "white heart icon", "--steps", "1",
        "--out", "images",
    )  # fmt: skip
    about = json.loads(Image.open(tmp_path / "images" / "0000.png").info["loragraft"])
    assert (about["base_id"], about["profile"]) == (adapter.base_id, None)
