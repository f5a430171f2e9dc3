"""The same training in four numerics, curves overlaid: W4A8, W4A4, W4A16 and ordinary 16-bit LoRA on `pocket`.

    python benchmarks/convergence.py --work work --out benchmarks/results/convergence.json --plot docs/images/convergence.png

One recipe, one seed: batches, times and noise are equal step by step, only the base's numerics differ. Stages, each skipped
where its result lies in --work (shared with others: pocket_runs.py) and gone on with where it was interrupted:

    train     the training script, once per variant; validation every 20 steps
    render    --images pictures of held-out captions per adapter, on the base that it was trained on, and the 16-bit adapter
              grafted into W4A8 as well: what people do who train in 16 bits and ship 4
    measure   KID to the real held-out images, and paired differences to 16-bit LoRA at equal prompts and seeds
    plot      training and validation losses

On one CPU core a step takes about a second: 520 steps of four variants and 5 x 256 pictures are one and a half hours.
--stages names the stages to run; what follows `--` overrides the recipe in every variant (train.steps=100 data.count=400).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pocket_runs import (
    LABELS,
    SIXTEEN,
    about,
    add_shared_options,
    add_variant_options,
    device,
    features_of,
    pictures,
    real_features,
    recipe_of,
    render_on,
    run_folder,
    run_stages,
    train_variants,
)

from loragraft.disk import write_atomic
from loragraft.evaluation.features import FeatureStore
from loragraft.evaluation.metrics import kernel_distance_change, kernel_distance_interval

VARIANTS = (SIXTEEN, "W4A16", "W4A8", "W4A4")
TRANSFER, SHIPPED = "16-bit grafted into W4A8", "W4A8"
STAGES = ("train", "render", "measure", "plot")
SMOOTH = 20


def main() -> int:
    """Runs the stages; exit code 2 with a message for what is lacking."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_options(parser, STAGES)
    add_variant_options(parser, VARIANTS, VARIANTS)
    args = parser.parse_args()
    return run_stages(args, {"train": train_variants, "render": render, "measure": measure_all, "plot": plot})


def drawn_sets(variants: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Name -> (run on, trained in): every variant on its own base, and the 16-bit adapter where people ship it."""
    found: dict[str, tuple[str, str]] = {variant: (LABELS[variant], LABELS[variant]) for variant in variants}
    if SIXTEEN in variants and SHIPPED in variants:
        found[TRANSFER] = LABELS[SHIPPED], LABELS[SIXTEEN]
    return found


def render(args: argparse.Namespace) -> None:
    """Draws what is missing."""
    sets = drawn_sets(args.variants).values()
    for variant in args.variants:
        run_on = LABELS[variant]
        render_on(args, args.recipe, run_on, [trained for on, trained in sets if on == run_on])


def measure_all(args: argparse.Namespace) -> None:
    """Writes the JSON and prints the table."""
    sets = drawn_sets(args.variants)
    paths = {name: pictures(args, args.recipe, on, trained) for name, (on, trained) in sets.items()}
    several = [LABELS[variant] for variant in args.variants]
    recipe = recipe_of(args.work, args.recipe, several[0])
    store = FeatureStore(args.work / "features", device())
    features, real = {name: features_of(store, found) for name, found in paths.items()}, real_features(store, recipe)
    result: dict[str, Any] = {
        **about(args, "convergence", several, [path for found in paths.values() for path in found]),
        "references": len(real),
        "variants": {name: curves(run_folder(args.work, args.recipe, LABELS[name])) for name in args.variants},
        "kid_lite0": {name: asdict(kernel_distance_interval(found, real)) for name, found in features.items()},
    }
    if SIXTEEN in features:
        kid = {name: entry["value"] for name, entry in result["kid_lite0"].items()}
        others = [name for name in features if name != SIXTEEN]
        result["kid_over_16bit"] = {name: kid[name] / kid[SIXTEEN] for name in others}
        result["kid_change_to_16bit"] = {
            name: asdict(kernel_distance_change(features[SIXTEEN], features[name], real)) for name in others
        }
    write_atomic(args.out, (json.dumps(result, indent=1) + "\n").encode())
    print(table(result))


def curves(run: Path) -> dict[str, Any]:
    """Losses of a finished run: every training loss, every validation loss with its step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    validation = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    return {
        "steps": len(rows),
        "device": summary["device"],
        "train_seconds": summary["train_seconds"],
        "loss": [round(row["loss"], 5) for row in rows],
        "validation": [(0, summary["validation_loss_start"]), *validation],
    }


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| | validation loss, start | end | KID | of 16-bit LoRA's | difference |", "|---|---|---|---|---|---|"]
    for name, kid in result["kid_lite0"].items():
        losses = result["variants"].get(name, {}).get("validation", [])
        change = result.get("kid_change_to_16bit", {}).get(name)
        cells = [f"{losses[0][1]:.4f}", f"{losses[-1][1]:.4f}"] if losses else ["", ""]
        cells.append(f"{kid['value']:.4f} ({kid['low']:.4f} to {kid['high']:.4f})")
        cells.append(f"{result['kid_over_16bit'][name]:.3f}" if change else "")
        cells.append(f"{change['value']:+.4f} ({change['low']:+.4f} to {change['high']:+.4f})" if change else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def smoothed(values: Sequence[float], width: int = SMOOTH) -> list[float]:
    """The mean of the last `width` values at each place."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def plot(args: argparse.Namespace) -> None:
    """Training and validation losses of all variants side by side, from the JSON."""
    if args.plot is None:
        return
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    result = json.loads(args.out.read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), dpi=150)
    for variant, style in zip(result["variants"], ("-", "--", "-.", ":"), strict=False):
        found = result["variants"][variant]
        left.plot(range(1, found["steps"] + 1), smoothed(found["loss"]), style, label=variant, linewidth=1.2)
        kid = result["kid_lite0"][variant]["value"]
        right.plot(*zip(*found["validation"], strict=True), style, label=f"{variant}, KID {kid:.4f}", linewidth=1.2)
    left.set_title(f"training loss, mean of {SMOOTH} steps", fontsize=10)
    right.set_title("validation loss, fixed noise", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.2)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(args.plot)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
