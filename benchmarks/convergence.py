"""The same training in four numerics, curves overlaid: W4A8, W4A4, W4A16 and ordinary 16-bit LoRA on `pocket`.

    python benchmarks/convergence.py --work work --out benchmarks/results/convergence.json --plot docs/images/convergence.png

One recipe, one seed: batches, times and noise are equal step by step, only the base's numerics differ. Stages, each skipped
where its result lies in --work and gone on with where it was interrupted:

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
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loragraft.adapters.checkpoint import Adapter
from loragraft.adapters.opening import open_run
from loragraft.backbones.load import find_spec, load_backbone
from loragraft.data.cache import default_cache_root
from loragraft.data.sources import Sample, open_source
from loragraft.disk import write_atomic
from loragraft.evaluation import measure
from loragraft.evaluation.features import FeatureStore
from loragraft.evaluation.image_sets import ImageSet, device_name, present, render_missing, rendered_on
from loragraft.evaluation.metrics import kernel_distance_change, kernel_distance_interval
from loragraft.recipes.schema import Recipe

ROOT = Path(__file__).resolve().parents[1]
NUMERICS = {"16-bit": "16bit", "W4A16": "weight-only", "W4A8": "native", "W4A4": "interchange"}
REFERENCE, TRANSFER = "16-bit", "16-bit grafted into W4A8"
STAGES = ("train", "render", "measure", "plot")
VALIDATE_EVERY, SMOOTH = 20, 20


def main() -> int:
    """Runs the stages; exit code 2 with a message for what is lacking."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and pictures")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--recipe", default="marketing")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--variants", nargs="+", choices=list(NUMERICS), default=list(NUMERICS))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = all")
    parser.add_argument("--commit", default="", help="commit of the code that runs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        for stage in [stage for stage in STAGES if stage in args.stages]:
            {"train": train, "render": render, "measure": measure_all, "plot": plot}[stage](args)
    except (ValueError, FileNotFoundError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run_folder(args: argparse.Namespace, variant: str) -> Path:
    found: Path = args.work / "runs" / NUMERICS[variant]
    return found


def train(args: argparse.Namespace) -> None:
    """`train/lora.py` itself does nothing for a finished run and resumes an unfinished one."""
    for variant in args.variants:
        settings = [f"numerics={NUMERICS[variant]}", f"train.validate_every={VALIDATE_EVERY}", "tracking.mode=disabled"]
        settings += [f"train.threads={args.threads}", *args.overrides]
        command = [sys.executable, str(ROOT / "train" / "lora.py"), "--recipe", args.recipe]
        subprocess.run([*command, "--out", str(run_folder(args, variant)), *settings], check=True)


def image_sets(args: argparse.Namespace) -> dict[str, tuple[str, ImageSet, Recipe]]:
    """Name -> (numerics of the base, what to draw, the run's recipe). Raises ValueError for an unfinished run."""
    wanted: dict[str, tuple[str, ImageSet, Recipe]] = {}
    for variant in args.variants:
        adapter, recipe = open_run(run_folder(args, variant))
        wanted[variant] = NUMERICS[variant], domain_set(variant, adapter, recipe, args.images), recipe
    if REFERENCE in wanted and "W4A8" in wanted:
        entry, native = wanted[REFERENCE][1], wanted["W4A8"][1]
        assert entry.adapter is not None and native.adapter is not None  # domain_set
        # The one place where an adapter may enter another base: the transfer is what is measured.
        moved = replace(entry.adapter, metadata={**entry.adapter.metadata, "base_id": native.adapter.base_id})
        wanted[TRANSFER] = NUMERICS["W4A8"], replace(entry, name="transfer", adapter=moved), wanted["W4A8"][2]
    return wanted


def domain_set(name: str, adapter: Adapter, recipe: Recipe, images: int, steps: int = 0) -> ImageSet:
    """Held-out captions at the recipe's evaluation settings, as `loragraft score` draws them; `steps` other than its own."""
    config = recipe.eval
    return ImageSet(
        name=name,
        prompts=tuple(sample.caption for sample in held_out(recipe)),
        count=images,
        seed=config.seed,
        steps=steps or config.steps,
        guidance=config.guidance,
        adapter=adapter,
    )


def held_out(recipe: Recipe) -> list[Sample]:
    """The samples of the split that is scored."""
    samples = open_source(recipe.data, resolution_of(recipe), default_cache_root())
    return [sample for sample in samples if sample.split == recipe.eval.split]


def resolution_of(recipe: Recipe) -> int:
    """Edge of the images, in pixels."""
    return recipe.data.resolution or find_spec(recipe.base).resolution


def real_features(store: FeatureStore, recipe: Recipe) -> Tensor:
    """Of the held-out images, read as training reads them."""
    resolution = resolution_of(recipe)
    read = measure.reference_reader(resolution)
    return store.of([sample.image for sample in held_out(recipe)], read, f"reference {resolution}")


def render(args: argparse.Namespace) -> None:
    """Draws what is missing and notes where it lies."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folders = {}
    for name, (numerics, entry, recipe) in image_sets(args).items():
        backbone = load_backbone(recipe.base, numerics, device, default_cache_root())  # type: ignore[arg-type]
        folder = render_missing(backbone, [entry], args.work / "images")[entry.name]
        folders[name] = str(folder.relative_to(args.work))
        write_atomic(args.work / "images" / "folders.json", json.dumps(folders).encode())


def measure_all(args: argparse.Namespace) -> None:
    """Writes the JSON and prints the table."""
    note = args.work / "images" / "folders.json"
    if not note.exists():
        raise FileNotFoundError(f"{note} is missing: run the stage `render` first")
    folders: dict[str, str] = json.loads(note.read_text())
    paths = {name: present(args.work / folder, args.images) for name, folder in folders.items()}
    short = [f"{name} {len(found)}" for name, found in paths.items() if len(found) < args.images]
    if short:
        raise ValueError(f"of {args.images} images there are only: {', '.join(short)}; run the stage `render` again")
    _, recipe = open_run(run_folder(args, args.variants[0]))
    store = FeatureStore(args.work / "features", "cuda" if torch.cuda.is_available() else "cpu")
    features = {name: store.of(found, measure.read_image, measure.GENERATED) for name, found in paths.items()}
    real = real_features(store, recipe)
    result: dict[str, Any] = {
        "recipe": args.recipe,
        "overrides": args.overrides,
        "commit": args.commit,
        "command": "python benchmarks/convergence.py --work WORK --out benchmarks/results/convergence.json",
        "measured_on": device_name(torch.device("cpu")),
        "drawn_on": rendered_on([path for found in paths.values() for path in found]),
        "versions": {package: version(package) for package in ("torch", "diffusers", "peft")},
        "images": args.images,
        "references": len(real),
        "variants": {variant: curves(run_folder(args, variant)) for variant in args.variants},
        "kid_lite0": {name: asdict(kernel_distance_interval(found, real)) for name, found in features.items()},
    }
    if REFERENCE in features:
        kid = {name: entry["value"] for name, entry in result["kid_lite0"].items()}
        others = [name for name in features if name != REFERENCE]
        result["kid_over_16bit"] = {name: kid[name] / kid[REFERENCE] for name in others}
        result["kid_change_to_16bit"] = {
            name: asdict(kernel_distance_change(features[REFERENCE], features[name], real)) for name in others
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
