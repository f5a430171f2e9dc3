"""Runs and pictures that the benchmarks on `pocket` share: with one --work, each training and each picture is made once.

    WORK/runs/<recipe>/<numerics>/                 what train/lora.py wrote
    WORK/images/<key>/<name>/0000.png ...          pictures (evaluation/image_sets.py)
    WORK/drawn/<recipe>/<run on>/<name>.json       which folder holds them; name: the numerics trained in, or "none"
    WORK/features/                                 of pictures, by their bytes

precision_ladder.py, adapters.py, convergence.py and sampling_steps.py each make what they need and use what the others made.
Training may be done on one machine and the rest on another: copy WORK.
"""

import argparse
import fcntl
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loragraft.adapters.checkpoint import Adapter
from loragraft.adapters.opening import open_run, recipe_of_run
from loragraft.backbones.load import find_spec, load_backbone
from loragraft.backbones.spec import Backbone
from loragraft.data.cache import default_cache_root
from loragraft.data.sources import Sample, open_source
from loragraft.disk import write_atomic
from loragraft.evaluation import measure
from loragraft.evaluation.features import FeatureStore
from loragraft.evaluation.image_sets import ImageSet, device_name, present, render_missing, rendered_on
from loragraft.recipes.load import load_recipe
from loragraft.recipes.schema import Numerics, Recipe
from loragraft.versions import installed_versions

ROOT = Path(__file__).resolve().parents[1]
LABELS: dict[str, Numerics] = {
    "16-bit": "16bit", "W4A16": "weight-only", "W4A8": "native", "W4A4": "interchange", "NF4": "nf4",
}  # fmt: skip
"""What tables call the numerics of the recipes."""
SIXTEEN, NONE = "16-bit", "none"
VALIDATE_EVERY = 20

Stage = Callable[[argparse.Namespace], object]


def add_shared_options(parser: argparse.ArgumentParser, stages: Sequence[str]) -> None:
    """Those that mean the same in every benchmark; `stages` in the order in which they run."""
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for runs, pictures and features; may be shared"
    )
    parser.add_argument("--images", type=int, default=256, help="pictures per set")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's own choice")
    parser.add_argument("--commit", default="", help="commit of the code that runs")
    parser.add_argument("--stages", nargs="+", choices=stages, default=list(stages))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides")


def add_variant_options(parser: argparse.ArgumentParser, variants: Sequence[str], default: Sequence[str]) -> None:
    """Of benchmarks that plot several numerics of one recipe; `variants` are keys of `LABELS`."""
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--recipe", default="marketing")
    parser.add_argument("--variants", nargs="+", choices=variants, default=list(default))


def run_stages(args: argparse.Namespace, stages: Mapping[str, Stage], then: Callable[[], int] = lambda: 0) -> int:
    """Those of --stages in the order of `stages`; the exit code is that of `then`, or 2 with a message for what is lacking."""
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        for name, stage in stages.items():
            if name in args.stages:
                stage(args)
        return then()
    except (ValueError, FileNotFoundError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def about(args: argparse.Namespace, script: str, several: Sequence[str], drawn: Sequence[Path]) -> dict[str, Any]:
    """What a result says of its making: the runs of `several` numerics, the pictures `drawn`, this machine."""
    return {
        "recipe": args.recipe,
        "overrides": args.overrides,
        "images": args.images,
        "commit": args.commit,
        "command": f"python benchmarks/{script}.py --work WORK --out benchmarks/results/{script}.json",
        "trained_on": trained_on(args.work, args.recipe, several),
        "drawn_on": rendered_on(drawn),
        "measured_on": device_name(torch.device(device())),
        "versions": installed_versions("torch", "diffusers", "peft"),
    }


def device() -> str:
    """Where it trains and draws."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def settings_of(args: argparse.Namespace, numerics: Numerics) -> list[str]:
    """Recipe overrides of every run; a precision that cannot be trained is an error of `load_recipe`."""
    fixed = [f"numerics={numerics}", f"train.validate_every={VALIDATE_EVERY}", "tracking.mode=disabled"]
    return [*fixed, f"train.threads={args.threads}", *args.overrides]


def run_folder(work: Path, recipe: str, numerics: str) -> Path:
    """Where training writes."""
    return work / "runs" / recipe / numerics


def train_run(args: argparse.Namespace, recipe: str, numerics: Numerics) -> None:
    """The training script, a process of its own: nothing for a finished run, and an interrupted one goes on."""
    settings = settings_of(args, numerics)
    load_recipe(recipe, settings)
    out = str(run_folder(args.work, recipe, numerics))
    command = [sys.executable, str(ROOT / "train" / "lora.py"), "--recipe", recipe, "--out", out]
    subprocess.run([*command, *settings], check=True)


def train_variants(args: argparse.Namespace) -> None:
    """A run for each of --variants."""
    for variant in args.variants:
        train_run(args, args.recipe, LABELS[variant])


def recipe_of(work: Path, recipe: str, numerics: str) -> Recipe:
    """The recipe of a run as it was trained. Raises FileNotFoundError where there is none; its adapter need not be here."""
    folder = run_folder(work, recipe, numerics)
    found = recipe_of_run(str(folder)) if (folder / "summary.json").exists() else None
    if found is None:
        raise FileNotFoundError(f"{folder} holds no finished run: run the stage `train` first")
    return found


def trained_on(work: Path, recipe: str, several: Sequence[str]) -> list[str]:
    """The devices that finished runs were trained on."""
    files = (run_folder(work, recipe, numerics) / "summary.json" for numerics in several)
    return sorted({json.loads(file.read_text())["device"] for file in files})


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


def features_of(store: FeatureStore, pictures: Sequence[Path]) -> Tensor:
    """Of drawn pictures."""
    return store.of(pictures, measure.read_image, measure.GENERATED)


def domain_set(name: str, adapter: Adapter | None, recipe: Recipe, images: int, steps: int = 0) -> ImageSet:
    """Held-out captions at the recipe's evaluation settings, as `loragraft score` draws them; `steps` other than its own.

    Raises ValueError where nothing is held out.
    """
    config, captions = recipe.eval, tuple(sample.caption for sample in held_out(recipe))
    if not captions:
        raise ValueError(f"the {config.split} split is empty, and its captions are what is drawn: raise data.count")
    return ImageSet(
        name=name, prompts=captions, count=images, seed=config.seed, steps=steps or config.steps,
        guidance=config.guidance, adapter=adapter,
    )  # fmt: skip


def onto(adapter: Adapter, base_id: str) -> Adapter:
    """The same for another base: the one place where that may be, as the transfer is what is measured."""
    return replace(adapter, metadata={**adapter.metadata, "base_id": base_id})


def render_on(args: argparse.Namespace, recipe: str, run_on: Numerics, names: Sequence[str]) -> None:
    """Draws what is missing of `names` (the numerics of finished runs, or "none") on the base in `run_on`.

    Raises ValueError for an unfinished run, that of `run_on` among them: it says what is drawn and how.
    """
    _, settings = open_run(run_folder(args.work, recipe, run_on))
    adapters = {name: open_run(run_folder(args.work, recipe, name))[0] for name in names if name != NONE}
    backbone = load_backbone(settings.base, run_on, device(), default_cache_root())
    sets = []
    for name in names:
        adapter = onto(adapters[name], backbone.base_id) if name in adapters else None
        sets.append(domain_set(name, adapter, settings, args.images))
    draw(args.work, recipe, run_on, backbone, sets)


def draw(work: Path, recipe: str, run_on: str, backbone: Backbone, sets: Sequence[ImageSet]) -> None:
    """Draws what is missing and notes where it lies."""
    for name, folder in render_missing(backbone, sets, work / "images").items():
        note = _note(work, recipe, run_on, name)
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(note, json.dumps({"folder": str(folder.relative_to(work))}).encode())


def pictures(args: argparse.Namespace, recipe: str, run_on: str, name: str) -> list[Path]:
    """The first --images of a set. Raises FileNotFoundError or ValueError where they were not all drawn."""
    note = _note(args.work, recipe, run_on, name)
    if not note.exists():
        raise FileNotFoundError(f"{note} is missing: run the stage `render` first")
    folder = args.work / json.loads(note.read_text())["folder"]
    found = present(folder, args.images)
    if len(found) < args.images:
        raise ValueError(
            f"{folder} has {len(found)} of {args.images} pictures: run the stage `render` again, it goes on"
        )
    return found


def _note(work: Path, recipe: str, run_on: str, name: str) -> Path:
    return work / "drawn" / recipe / run_on / f"{name}.json"


@contextmanager
def alone(work: Path) -> Iterator[None]:
    """Waits until no other process is inside: times are taken one after the other, however many processes are started."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "timing.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
