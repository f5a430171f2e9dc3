"""The precision ladder on `pocket`: one recipe, one trainer, one score, every precision of the base.

    python benchmarks/precision_ladder.py --work work --out benchmarks/results/precision_ladder.json

Stages; each goes on where it was interrupted and skips what lies in --work (shared with others: pocket_runs.py):

    prepare   draws and encodes the recipe's data and quantizes every base, so that what follows may run side by side
    train     an adapter per precision
    render    pictures of held-out captions by the base of each precision, without and with its adapter
    time      a process per precision, never two at a time: steps, a batch of pictures, peak memory
    measure   base against the 16-bit base's images at equal prompts and seeds (PSNR, KID), and both against the real
              held-out images (KID, before and after LoRA); the table and the JSON

--stages and --precisions choose, so that several machines or processes share the work. A CPU step takes half a second: all
twelve precisions at 520 steps and 2 x 256 pictures are a few hours of one core. What follows `--` overrides the recipe in
each (train.steps=100 data.limit=400).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import Accelerator
from pocket_runs import (
    NONE,
    about,
    add_shared_options,
    alone,
    device,
    domain_set,
    features_of,
    pictures,
    real_features,
    recipe_of,
    render_on,
    run_folder,
    run_stages,
    settings_of,
    train_run,
    trained_on,
)

from loragraft.adapters.inject import inject_adapter
from loragraft.backbones.load import find_spec, load_backbone, shipped_folder
from loragraft.backbones.spec import Backbone, Profile
from loragraft.data.cache import default_cache_root
from loragraft.data.dataset import LatentCache
from loragraft.data.encode import encode_dataset
from loragraft.data.sources import open_source
from loragraft.disk import write_atomic
from loragraft.evaluation import measure
from loragraft.evaluation.features import FeatureStore
from loragraft.evaluation.image_sets import device_name, rendered_on, seconds_per_image
from loragraft.evaluation.metrics import kernel_distance_change, kernel_distance_interval
from loragraft.quantization.formats import FORMATS
from loragraft.recipes.load import load_recipe
from loragraft.recipes.schema import Numerics, Recipe
from loragraft.train.loop import train
from loragraft.train.previews import Previews
from loragraft.train.run_folder import RunFolder
from loragraft.train.tracking import Tracking

BASE: str = "pocket"
REFERENCE: Numerics = "16bit"
STAGES = ("prepare", "train", "render", "time", "measure")
ONE = "time one"
ORDER: tuple[Numerics, ...] = (
    "16bit", "int8", "fp8", "native", "weight-only", "nf4", "nf4-double", "interchange", "nvfp4", "mxfp4", "int3", "int2",
)  # fmt: skip
BITS = {"16bit": "W16A16", "native": "W4A8", "weight-only": "W4A16", "interchange": "W4A4"}
WARMUP = 5
"""Steps that the time of a step leaves out: compilation, capture, first touch."""
QUICK = (
    "data.count=60", "train.steps=3", "train.batch_size=2", "adapter.rank=2", "optim.warmup_steps=0",
    "eval.steps=1", "eval.guidance=1", "sample.steps=1", "sample.guidance=1",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs the stages; exit code 2 with a message for what is lacking."""
    stages = {"prepare": prepare, "train": train_all, "render": render_all, "time": time_all, "measure": measure_all}
    return run_stages(parse(argv), {**stages, ONE: lambda args: time_one(args, args.one)})


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options, `--quick` and `--one` resolved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_options(parser, STAGES)
    parser.add_argument("--out", type=Path, help="JSON file to write (stage measure)")
    parser.add_argument("--recipe", default="marketing")
    parser.add_argument("--precisions", nargs="+", choices=ORDER, default=list(ORDER))
    parser.add_argument("--quick", action="store_true", help="3 steps, 4 pictures: tries every stage, measures nothing")
    parser.add_argument("--timed-steps", type=int, default=30, help="steps of the stage `time`")
    parser.add_argument("--one", choices=ORDER, help="only the stage `time` of one precision, in this process")
    args = parser.parse_args(argv)
    assert set(ORDER) == set(get_args(Numerics))
    if args.quick:
        args.images, args.timed_steps, args.overrides = min(args.images, 4), 3, [*QUICK, *args.overrides]
    if args.one:
        args.stages = [ONE]
    return args


def asked(args: argparse.Namespace, precision: Numerics, *more: str) -> Recipe:
    """The recipe at one precision."""
    recipe = load_recipe(args.recipe, [*settings_of(args, precision), *more])
    if recipe.base != BASE:
        raise ValueError(f"the ladder is measured on {BASE}, and the recipe's base is {recipe.base}")
    return recipe


class StepTimes(Tracking):
    """Keeps the seconds of every step."""

    def __init__(self) -> None:
        super().__init__(None, "ladder")
        self.seconds: list[float] = []

    def log(self, values: dict[str, float], step: int) -> None:
        """Of what the loop logs."""
        if "train/seconds_per_step" in values:
            self.seconds.append(values["train/seconds_per_step"])


def profile_of(precision: Numerics) -> Profile | None:
    """None for the 16-bit base."""
    return None if precision == "16bit" else precision


def prepare(args: argparse.Namespace) -> None:
    """Fills the cache."""
    spec, root = find_spec(BASE), default_cache_root()
    encoded(asked(args, REFERENCE), load_backbone(BASE, None, device(), root))
    for precision in args.precisions:
        shipped_folder(spec, profile_of(precision), device(), root)


def encoded(recipe: Recipe, backbone: Backbone) -> LatentCache:
    """The recipe's data, from the cache where it is there."""
    resolution, root, encoders = backbone.resolution, default_cache_root(), backbone.encoders
    samples = open_source(recipe.data, resolution, root)
    return encode_dataset(samples, encoders.encode_images, encoders.encode_text, encoders.id, resolution, root)


def train_all(args: argparse.Namespace) -> None:
    """A run per precision."""
    for precision in args.precisions:
        asked(args, precision)
        train_run(args, args.recipe, precision)


def render_all(args: argparse.Namespace) -> None:
    """Two sets per precision."""
    for precision in args.precisions:
        render_on(args, args.recipe, precision, (NONE, precision))


def time_all(args: argparse.Namespace) -> None:
    """A process per precision, so that memory is its own."""
    for precision in args.precisions:
        command = [sys.executable, __file__, "--one", precision, "--work", args.work, "--recipe", args.recipe]
        command += ["--images", args.images, "--threads", args.threads]
        command += ["--timed-steps", args.timed_steps, "--", *args.overrides]
        subprocess.run([str(word) for word in command], check=True)


def times_file(args: argparse.Namespace, precision: str) -> Path:
    """What the stage `time` found."""
    found: Path = args.work / "times" / args.recipe / f"{precision}.json"
    return found


def time_one(args: argparse.Namespace, precision: Numerics) -> None:
    """Nothing where it was done before."""
    file = times_file(args, precision)
    if file.exists():
        return
    recipe = asked(
        args, precision, f"train.steps={args.timed_steps}", "train.log_every=1", "train.validate_every=0", "sample.steps=1",
        "sample.guidance=1", "optim.warmup_steps=1",
    )  # fmt: skip
    where = torch.device(device())
    accelerator = Accelerator(cpu=where.type == "cpu", log_with=None)
    with alone(args.work):
        timed = timed_steps(recipe, load_backbone(BASE, precision, where, default_cache_root()), accelerator)
        backbone = load_backbone(BASE, precision, where, default_cache_root())  # another: that one carries an adapter
        ledger, weights = backbone.ledger, shipped_folder(backbone.spec, backbone.profile, where, default_cache_root())
        found = {
            "numerics": BITS.get(precision, precision),
            "layers": {key: value for key, value in ledger.to_dict().items() if key in ("layers", "nbytes")},
            "engines": sorted({row.backend for row in ledger.rows}),
            "file_mb": sum(file.stat().st_size for file in weights.glob("*.safetensors")) / 1e6,
            "bits_per_weight": FORMATS[precision].bits if precision in FORMATS else None,
            "seconds_per_image": seconds_per_image(backbone, domain_set("timed", None, recipe, args.images)),
            **timed,
            "timed_on": device_name(where),
            "threads": torch.get_num_threads(),
        }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, (json.dumps(found, indent=1) + "\n").encode())


def timed_steps(recipe: Recipe, backbone: Backbone, accelerator: Accelerator) -> dict[str, float]:
    """`seconds_per_step`, a median, and `peak_training_mib` of a short training that is thrown away."""
    cache, where = encoded(recipe, backbone), backbone.device
    previews = Previews.prepare(recipe.sample, backbone, cache)
    backbone.encoders.release_text()
    backbone.set_training_numerics(recipe.train.save_x, recipe.train.dgrad)
    if where.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # as train/lora.py
        torch.cuda.reset_peak_memory_stats()
    parameters, times = inject_adapter(backbone.transformer, recipe.adapter, backbone.spec.lora_targets), StepTimes()
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder.open(Path(scratch), recipe, backbone.base_id)
        if train(accelerator, recipe, backbone, parameters, cache, previews, folder, times):
            raise ValueError("stopped: the same command goes on")
    return {
        "seconds_per_step": statistics.median(times.seconds[WARMUP:] or times.seconds),
        "peak_training_mib": peak_bytes(where) / 2**20,
    }


def peak_bytes(where: torch.device) -> int:
    """Allocated on a GPU since the last reset; of a CPU process, all that was resident, Python and libraries included."""
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not getrusage: a process begins with the ru_maxrss of the one that started it.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def measure_all(args: argparse.Namespace) -> None:
    """Writes the JSON and prints the table."""
    if args.out is None:
        raise ValueError("the stage `measure` writes a JSON: name it with --out")
    if REFERENCE not in args.precisions:
        raise ValueError(f"everything is measured against {REFERENCE}: name it among --precisions")
    rows = {precision: row_of(args, precision) for precision in args.precisions}
    recipe = recipe_of(args.work, args.recipe, REFERENCE)
    store = FeatureStore(args.work / "features", device())
    real = real_features(store, recipe)
    names = {(p, kind): NONE if kind == "base" else p for p in rows for kind in ("base", "adapted")}
    paths = {(p, kind): pictures(args, args.recipe, p, name) for (p, kind), name in names.items()}
    features = {key: features_of(store, found) for key, found in paths.items()}
    for precision, row in rows.items():
        base, adapted = features[precision, "base"], features[precision, "adapted"]
        row["kid_base"] = asdict(kernel_distance_interval(base, real))
        row["kid_adapted"] = asdict(kernel_distance_interval(adapted, real))
        drawn = {kind: rendered_on(paths[precision, kind]) for kind in ("base", "adapted")}
        row |= {"trained_on": trained_on(args.work, args.recipe, [precision]), "drawn_on": drawn}
        if precision != REFERENCE:  # of another device the noise is another: nothing is paired with that
            alike = {kind: drawn[kind] == rendered_on(paths[REFERENCE, kind]) for kind in drawn}
            pairs = partial(measure.measure_pairs, paths[REFERENCE, "base"], paths[precision, "base"], store)
            change = partial(kernel_distance_change, features[REFERENCE, "adapted"], adapted, real)
            row["to_16bit"] = pairs() if alike["base"] else None
            row["kid_adapted_change_to_16bit"] = asdict(change()) if alike["adapted"] else None
    result = {
        "base": BASE,
        **about(args, "precision_ladder", args.precisions, [path for found in paths.values() for path in found]),
        "steps": rows[REFERENCE]["steps"],
        "references": len(real),
        "timed_on": sorted({row["timed_on"] for row in rows.values()}),
        "precisions": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out, (json.dumps(result, indent=1) + "\n").encode())
    print(table(result))


def row_of(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """What training and the stage `time` wrote. Raises FileNotFoundError or ValueError where it is not there."""
    folder, times = run_folder(args.work, args.recipe, precision), times_file(args, precision)
    for file, stage in ((folder / "summary.json", "train"), (times, "time")):
        if not file.exists():
            raise FileNotFoundError(
                f"{file} is missing: run the stage `{stage}` first, or leave {precision} out of --precisions"
            )
    summary = json.loads((folder / "summary.json").read_text())
    kept = {key: summary[key] for key in ("steps", "validation_loss_start", "validation_loss_end")}
    return {**json.loads(times.read_text()), **kept}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| | file, MB | ms a step | ms an image | peak, MiB | PSNR to 16-bit, dB | KID to 16-bit | KID of the base | KID after LoRA |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for precision, row in result["precisions"].items():
        pairs = row.get("to_16bit")
        psnr = "" if pairs is None else "equal" if pairs["psnr_db"] is None else f"{pairs['psnr_db']['value']:.2f}"
        cells = [
            f"`{precision}`",
            f"{row['file_mb']:.1f}",
            f"{1000 * row['seconds_per_step']:.0f}",
            f"{1000 * row['seconds_per_image']:.0f}",
            f"{row['peak_training_mib']:.0f}",
            psnr,
            "" if pairs is None else f"{pairs['kid_lite0']['value']:.4f}",
            f"{row['kid_base']['value']:.3f}",
            "{value:.4f} ({low:.4f} to {high:.4f})".format(**row["kid_adapted"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
