"""The main job and everything that is claimed of it, measured: one command, resumable, one JSON.

    python benchmarks/main_job.py --icons icons.jsonl.gz mdi.jsonl.gz --keep work --out benchmarks/results/main_job.json

Stages, each a command of its own that a user could type; a stage that is done in `--keep` is not done again:

    marketing: train, generate, score   the README's three commands, timed from an empty cache
    design: train                       the other domain
    full scores of both                 N = 256, with every control
    pocket                              the base on held-out captions (needs --icons, which this project may not ship)
    precision                           16-bit against RTN, SVDQuant and NF4
    tests                               the test suite

Alone on two cores it takes about an hour and a half. `--stages` runs some of them; the JSON is made of what is there.
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
STAGES = ("marketing", "design", "full", "pocket", "precision", "tests")
PYTHON = sys.executable
CLI = (PYTHON, "-m", "loragraft.cli")


def main() -> int:
    """Runs, measures, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", type=Path, help="folder for cache, runs and figures; default: a temporary one")
    parser.add_argument("--icons", type=Path, nargs="+", default=[], help="icon records for the stage `pocket`")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES)
    parser.add_argument("--commit", default="", help="commit of the code that runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        seconds = run_stages(folder, args)
        result = {**collect(folder, seconds), "commit": args.commit}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "score"}, indent=1))
    return 0


def commands(folder: Path, args: argparse.Namespace) -> dict[str, tuple[str, list[str | Path]]]:
    """Name -> (stage, command line)."""
    runs = {name: folder / "runs" / name for name in ("marketing", "design")}
    launch = (PYTHON, "-m", "accelerate.commands.launch", "train/lora.py")

    def full(name: str, other: str) -> list[str | Path]:
        return [*CLI, "score", runs[name], "--full", "--control", runs[other]]

    precision: list[str | Path] = [PYTHON, "benchmarks/precision.py"]
    made: dict[str, tuple[str, list[str | Path]]] = {
        "train": ("marketing", [*launch, "--recipe", "marketing", "--out", runs["marketing"]]),
        "generate": (
            "marketing",
            [*CLI, "generate", "--adapter", runs["marketing"], "--compare", "--out", runs["marketing"] / "images"],
        ),
        "score": ("marketing", [*CLI, "score", runs["marketing"]]),
        "train_design": ("design", [*launch, "--recipe", "design", "--out", runs["design"]]),
        "generate_design": (
            "design",
            [*CLI, "generate", "--adapter", runs["design"], "--compare", "--out", runs["design"] / "images"],
        ),
        "full_marketing": ("full", full("marketing", "design")),
        "full_design": ("full", full("design", "marketing")),
    }
    if args.icons:
        made["pocket"] = (
            "pocket",
            [PYTHON, "benchmarks/pocket_quality.py", "--icons", *(icon.resolve() for icon in args.icons), "--work",
             folder / "pocket", "--out", folder / "pocket_quality.json", "--commit", args.commit],
        )  # fmt: skip
    made["precision_render"] = ("precision", [*precision, "render", "--work", folder / "precision"])
    made["precision"] = (
        "precision",
        [*precision, "measure", "--work", folder / "precision", "--out", folder / "precision.json", "--commit", args.commit],
    )  # fmt: skip
    made["tests"] = ("tests", [PYTHON, "-m", "pytest", "-q"])
    return made


def run_stages(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Runs what is asked for and not done; returns the seconds of everything done so far."""
    file = folder / "seconds.json"
    seconds: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    environment = {**os.environ, "LORAGRAFT_CACHE": str(folder / "cache")}
    for name, (stage, command) in commands(folder, args).items():
        if stage not in args.stages or name in seconds:
            continue
        start = time.perf_counter()
        if name == "full_marketing":  # the figures of the cheap score, before the full one takes their place
            keep_quick_score(folder)
        subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, check=True)
        seconds[name] = round(time.perf_counter() - start, 1)
        file.write_text(json.dumps(seconds, indent=1))
    return seconds


def keep_quick_score(folder: Path) -> None:
    run = folder / "runs" / "marketing"
    (run / "quick_score.json").write_bytes((run / "score.json").read_bytes())


def collect(folder: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Everything that was measured, under the names that reports and tests look for."""
    runs = folder / "runs"
    summary = _read(runs / "marketing" / "summary.json")
    quick = runs / "marketing" / "quick_score.json"
    score = _read(quick if quick.exists() else runs / "marketing" / "score.json")
    result: dict[str, Any] = {
        "device": f"{summary['device']}, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {package: version(package) for package in ("torch", "diffusers", "peft", "accelerate")},
        "command": "python benchmarks/main_job.py --icons ICONS --keep WORK --out benchmarks/results/main_job.json",
        "seed": score["seed"],
        "seconds": {
            **seconds,
            "all": round(sum(seconds[name] for name in ("train", "generate", "score")), 1),
            "optimizer_loop": round(summary["train_seconds"], 1),
        },
        "train_seconds": round(summary["train_seconds"], 1),
        "steps": summary["steps"],
        "validation_loss_start": summary["validation_loss_start"],
        "validation_loss_end": summary["validation_loss_end"],
        "weights_mb": round(sum(f.stat().st_size for f in shipped_weights()) / 1e6, 2),
        "score": score,
    }
    if "tests" in seconds:
        result["tests_seconds"] = seconds["tests"]
    if "full_marketing" in seconds:
        result |= headline(_read(runs / "marketing" / "score.json"))
    if "full_design" in seconds:
        result["design"] = headline(_read(runs / "design" / "score.json"))
    if "pocket" in seconds:
        pocket = _read(folder / "pocket_quality.json")
        name = "retrieval_minilm_lite0_r5"
        result |= {
            "pocket_kid": pocket["drawn"]["kid_lite0"],
            "pocket_retrieval": pocket["drawn"][name],
            "real_retrieval": pocket["floors"][name],
            "autoencoder_psnr_db": pocket["autoencoder_psnr_db"],
            "pocket": pocket,
        }
    if "precision" in seconds:
        precision = _read(folder / "precision.json")
        names = {"rtn-w4a4": "rtn_w4a4", "svdq-w4a4": "svdq_w4a4", "svdq-w4a8": "svdq_w4a8", "nf4": "nf4"}
        for variant, key in names.items():
            if variant in precision["variants"]:
                result[f"psnr_{key}"] = precision["variants"][variant]["psnr_db"]
        result["precision"] = precision
    return result


def shipped_weights() -> list[Path]:
    """Every weight file of the repository."""
    folders = (ROOT / "backbones" / "weights", ROOT / "evaluation" / "weights")
    return [file for folder in folders for file in folder.rglob("*.safetensors")]


def headline(score: dict[str, Any]) -> dict[str, Any]:
    """A full score's figures under short names; `control_kid` has one entry per control that was drawn."""
    name = "retrieval_minilm_lite0_r5"
    sets = score["sets"]
    return {
        "images": score["images"],
        "references": score["references"],
        "eval_steps": score["steps"],
        "kid_real_floor": score["kid_lite0_floor"],
        "kid_base": score["kid_lite0_base"],
        "kid_adapter": score["kid_lite0_adapter"],
        "improvement": score["improvement"],
        "retrieval_base": sets["base"][name],
        "retrieval_adapter": sets["adapter"][name],
        "domain_real_retrieval": score["floors"][name],
        "retrieval_chance": score["retrieval"]["chance"],
        "retrieval_shuffled": score["shuffled_captions"][name],
        "control_kid": {control: sets[control]["kid_lite0"] for control in score["controls"]},
        "control_retrieval": {control: sets[control][name] for control in score["controls"]},
        "short_gap": score["short_gap"],
        "drift": score.get("drift"),
        "memorisation": score.get("memorisation"),
    }


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


if __name__ == "__main__":
    sys.exit(main())
