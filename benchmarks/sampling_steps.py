"""Steps against quality on `pocket`: 4, 10, 20 and 50 Euler steps, 4-bit against 16-bit, seconds per image and KID.

    python benchmarks/sampling_steps.py --work work --out benchmarks/results/sampling_steps.json \\
        --plot docs/images/sampling_steps.png

Each variant's adapter is grafted into the base that it was trained on, and pictures of held-out captions are drawn at equal
prompts, seeds and guidance. Stages, each skipped where its result lies in --work (shared with others: pocket_runs.py):

    train     the training script, once per variant
    render    pictures; the seconds are those of one batch, drawn after another as warm-up, its text encoder and autoencoder
              included, and nothing else is timed meanwhile
    measure   KID to the real held-out images; the table, the JSON and the plot
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pocket_runs import (
    LABELS,
    SIXTEEN,
    about,
    add_shared_options,
    add_variant_options,
    alone,
    device,
    domain_set,
    draw,
    features_of,
    pictures,
    real_features,
    recipe_of,
    run_folder,
    run_stages,
    train_variants,
)

from loragraft.adapters.opening import open_run
from loragraft.backbones.load import load_backbone
from loragraft.data.cache import default_cache_root
from loragraft.disk import write_atomic
from loragraft.evaluation.features import FeatureStore
from loragraft.evaluation.image_sets import device_name, seconds_per_image
from loragraft.evaluation.metrics import kernel_distance_interval

STEPS = (4, 10, 20, 50)
STAGES = ("train", "render", "measure")


def main() -> int:
    """Runs the stages; exit code 2 with a message for what is lacking."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_options(parser, STAGES)
    add_variant_options(parser, list(LABELS), ("W4A8", SIXTEEN))
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    args = parser.parse_args()
    return run_stages(args, {"train": train_variants, "render": render, "measure": measure_all})


def render(args: argparse.Namespace) -> None:
    """Times and draws what is missing."""
    for variant in args.variants:
        numerics = LABELS[variant]
        adapter, recipe = open_run(run_folder(args.work, args.recipe, numerics))
        backbone = load_backbone(recipe.base, numerics, device(), default_cache_root())
        for steps in args.steps:
            entry = domain_set(set_name(numerics, steps), adapter, recipe, args.images, steps)
            times = times_file(args, entry.name)
            if not times.exists():
                with alone(args.work):
                    seconds = seconds_per_image(backbone, entry)
                found = {
                    "seconds_per_image": seconds, "guidance": entry.guidance, "timed_on": device_name(backbone.device),
                    "threads": torch.get_num_threads(),
                }  # fmt: skip
                times.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(times, json.dumps(found).encode())
            draw(args.work, args.recipe, numerics, backbone, [entry])


def set_name(numerics: str, steps: int) -> str:
    """Of pictures that are not drawn at the recipe's own steps."""
    return f"{numerics}-{steps}-steps"


def times_file(args: argparse.Namespace, name: str) -> Path:
    """What the stage `render` found."""
    found: Path = args.work / "times" / args.recipe / f"{name}.json"
    return found


def measure_all(args: argparse.Namespace) -> None:
    """Writes the JSON and the plot, and prints the table."""
    several = [LABELS[variant] for variant in args.variants]
    recipe = recipe_of(args.work, args.recipe, several[0])
    store = FeatureStore(args.work / "features", device())
    real, rows, drawn = real_features(store, recipe), list[dict[str, Any]](), list[Path]()
    for numerics in several:
        for steps in args.steps:
            name = set_name(numerics, steps)
            found = pictures(args, args.recipe, numerics, name)
            kid = asdict(kernel_distance_interval(features_of(store, found), real))
            times = json.loads(times_file(args, name).read_text())
            rows.append({"numerics": numerics, "steps": steps, **times, "kid_lite0": kid, "references": len(real)})
            drawn += found
    result = {
        **about(args, "sampling_steps", several, drawn),
        "rows": rows,
    }
    write_atomic(args.out, (json.dumps(result, indent=1) + "\n").encode())
    print(table(rows))
    if args.plot:
        plot(rows, args.plot)


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
