"""The main job from an empty cache, timed: train, draw before and after, score.

    python benchmarks/main_job.py --out benchmarks/results/main_job.json

Runs the three commands of the README in a folder of its own (kept with --keep FOLDER) and writes what they measured.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Runs, measures, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", type=Path, help="folder for cache and run; default: a temporary one")
    parser.add_argument("--commit", default="", help="commit of the code that runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        result = measure(folder)
    result["commit"] = args.commit
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


def measure(folder: Path) -> dict[str, Any]:
    """Seconds of each command, and what the run and its score say of themselves."""
    run = folder / "run"
    python = sys.executable
    commands = {
        "train": [
            python,
            "-m",
            "accelerate.commands.launch",
            "train/lora.py",
            "--recipe",
            "marketing",
            "--out",
            str(run),
        ],
        "generate": [
            python,
            "-m",
            "loragraft.cli",
            "generate",
            "--adapter",
            str(run),
            "--compare",
            "--out",
            str(run / "images"),
        ],
        "score": [python, "-m", "loragraft.cli", "score", str(run)],
    }
    environment = {**os.environ, "LORAGRAFT_CACHE": str(folder / "cache")}
    seconds = {}
    for name, command in commands.items():
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        seconds[name] = round(time.perf_counter() - start, 1)
    summary = json.loads((run / "summary.json").read_text())
    score = json.loads((run / "score.json").read_text())
    return {
        "device": f"{summary['device']}, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {package: version(package) for package in ("torch", "diffusers", "peft", "accelerate")},
        "command": "python benchmarks/main_job.py --out benchmarks/results/main_job.json",
        "seconds": {
            **seconds,
            "all": round(sum(seconds.values()), 1),
            "optimizer_loop": round(summary["train_seconds"], 1),
        },
        "steps": summary["steps"],
        "validation_loss_start": summary["validation_loss_start"],
        "validation_loss_end": summary["validation_loss_end"],
        **headline(score),
        "score": score,
    }


def headline(score: dict[str, Any]) -> dict[str, Any]:
    """The score's figures under short names; `control_kid` has one entry per control that was drawn."""
    name = "retrieval_minilm_lite0_r5"
    sets = score["sets"]
    return {
        "kid_real_floor": score["kid_lite0_floor"],
        "kid_base": score["kid_lite0_base"],
        "kid_adapter": score["kid_lite0_adapter"],
        "retrieval_base": sets["base"][name],
        "retrieval_adapter": sets["adapter"][name],
        "real_retrieval": score["floors"][name],
        "control_kid": {control: sets[control]["kid_lite0"] for control in score["controls"]},
    }


if __name__ == "__main__":
    sys.exit(main())
