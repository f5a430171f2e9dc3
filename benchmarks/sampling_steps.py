"""Steps against quality on `pocket`: 4, 10, 20 and 50 Euler steps, 4-bit against 16-bit, seconds per image and KID.

    python benchmarks/sampling_steps.py work/runs/native work/runs/16bit --work work \\
        --out benchmarks/results/sampling_steps.json --plot docs/images/sampling_steps.png

Each run's adapter is grafted into the base that it was trained on (benchmarks/convergence.py trains such runs), and pictures
of held-out captions are drawn at equal prompts, seeds and guidance. KID is to the real held-out images. The seconds are those
of one batch, drawn after another as warm-up, its text encoder and autoencoder included. Drawing is resumable.
"""

import argparse
import json
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from convergence import domain_set, real_features

from loragraft.adapters.opening import open_run
from loragraft.backbones.load import load_backbone
from loragraft.data.cache import default_cache_root
from loragraft.disk import write_atomic
from loragraft.evaluation import measure
from loragraft.evaluation.features import FeatureStore
from loragraft.evaluation.image_sets import device_name, present, render_missing, seconds_per_image
from loragraft.evaluation.metrics import kernel_distance_interval

STEPS = (4, 10, 20, 50)


def main() -> int:
    """Draws, times, measures, writes the JSON and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="finished run folders, one per precision")
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's own choice")
    parser.add_argument("--commit", default="", help="commit of the code that runs")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        rows = [row for run in args.runs for row in sweep(run, args, device)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = {
        "device": device_name(torch.device(device)),
        "versions": {package: version(package) for package in ("torch", "diffusers")},
        "commit": args.commit,
        "command": "python benchmarks/sampling_steps.py RUN RUN --work WORK --out benchmarks/results/sampling_steps.json",
        "images": args.images,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    write_atomic(args.out, (json.dumps(result, indent=1) + "\n").encode())
    print(table(rows))
    if args.plot:
        plot(rows, args.plot)
    return 0


def sweep(run: Path, args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """One row per number of steps."""
    adapter, recipe = open_run(run)
    backbone = load_backbone(recipe.base, recipe.numerics, device, default_cache_root())
    store = FeatureStore(args.work / "features", device)
    real = real_features(store, recipe)
    rows = []
    for steps in args.steps:
        entry = domain_set(f"{recipe.numerics}-{steps}", adapter, recipe, args.images, steps)
        seconds = seconds_per_image(backbone, entry)
        folder = render_missing(backbone, [entry], args.work / "images")[entry.name]
        features = store.of(present(folder, args.images), measure.read_image, measure.GENERATED)
        kid = asdict(kernel_distance_interval(features, real))
        row = {"numerics": recipe.numerics, "steps": steps, "seconds_per_image": seconds, "kid_lite0": kid}
        rows.append({**row, "guidance": entry.guidance, "references": len(real)})
        print(f"{recipe.numerics}, {steps} steps: {seconds:.3f} s per image, KID {kid['value']:.4f}", flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| numerics | steps | seconds per image | KID |", "|---|---|---|---|"]
    for row in rows:
        kid = row["kid_lite0"]
        lines.append(
            f"| {row['numerics']} | {row['steps']} | {row['seconds_per_image']:.3f} | "
            f"{kid['value']:.4f} ({kid['low']:.4f} to {kid['high']:.4f}) |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    """KID against seconds per image, a point per number of steps."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), dpi=150)
    for numerics in dict.fromkeys(row["numerics"] for row in rows):
        chosen = [row for row in rows if row["numerics"] == numerics]
        seconds, kids = [row["seconds_per_image"] for row in chosen], [row["kid_lite0"] for row in chosen]
        values = [kid["value"] for kid in kids]
        # An interval of resamples need not hold the value itself.
        spread = [
            [max(0.0, kid["value"] - kid["low"]) for kid in kids],
            [max(0.0, kid["high"] - kid["value"]) for kid in kids],
        ]
        axes.errorbar(seconds, values, yerr=spread, marker="o", capsize=3, label=numerics)
        for row, x, y in zip(chosen, seconds, values, strict=True):
            axes.annotate(str(row["steps"]), (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axes.set(xscale="log", xlabel="seconds per image", ylabel="KID (Lite0), 95 %")
    axes.legend(fontsize=8)
    axes.grid(which="both", alpha=0.2)
    figure.tight_layout()
    figure.savefig(out)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
