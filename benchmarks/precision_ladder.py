"""The precision ladder on `pocket`: one recipe, one trainer, one score, every precision of the base.

    python benchmarks/precision_ladder.py --work ladder --out benchmarks/results/precision_ladder.json

Stages; each goes on where it was interrupted and skips what lies in --work:

    prepare   encodes the recipe's data and quantizes every base into --cache
    run       a process per precision: the adapter is trained through `train.loop`, its base drawn without and with it; times
              and memory. Needs torch, diffusers, peft and accelerate, and neither network nor text encoder
    measure   base against the 16-bit base's images at equal prompts and seeds (PSNR, KID), and both against the real
              held-out images (KID, before and after LoRA); the table and the JSON

One machine runs all three. To run on a GPU machine that has few packages: `--stages prepare` where they are, carry --cache, then
there `--stages run --cache CACHE --data CACHE/domains/NAME` (drawn pictures instead of the recipe's domain, with equal
settings), carry --work back, and `--stages measure`. A CPU step takes half a second, so all twelve precisions at 520 steps and
2 x 256 pictures are a few hours of one core; what follows `--` overrides the recipe in each (train.steps=100 data.limit=400).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import Accelerator
from torch import Tensor

from loragraft.adapters.checkpoint import load_adapter, save_adapter
from loragraft.adapters.inject import inject_adapter, remove_adapter
from loragraft.backbones.load import find_spec, load_backbone, shipped_folder
from loragraft.backbones.pocket import PocketEncoders
from loragraft.backbones.spec import Backbone, Profile
from loragraft.data.cache import default_cache_root
from loragraft.data.dataset import LatentCache
from loragraft.data.encode import encode_dataset
from loragraft.data.sources import open_source
from loragraft.disk import write_atomic
from loragraft.evaluation.image_sets import (
    ImageSet,
    device_name,
    present,
    render_missing,
    rendered_on,
    seconds_per_image,
)
from loragraft.quantization.formats import FORMATS
from loragraft.recipes.load import load_recipe
from loragraft.recipes.schema import Numerics, Recipe
from loragraft.train.loop import train
from loragraft.train.metadata import adapter_metadata
from loragraft.train.previews import Previews
from loragraft.train.run_folder import RunFolder
from loragraft.train.tracking import Tracking

BASE, REFERENCE = "pocket", "16bit"
STAGES = ("prepare", "run", "measure")
ORDER: tuple[Numerics, ...] = (
    "16bit", "int8", "fp8", "native", "weight-only", "nf4", "nf4-double", "interchange", "nvfp4", "mxfp4", "int3", "int2",
)  # fmt: skip
BITS = {"16bit": "W16A16", "native": "W4A8", "weight-only": "W4A16", "interchange": "W4A4"}
WARMUP = 5
"""Steps that the time of a step leaves out: compilation, capture, first touch."""
QUICK = (
    "data.count=60", "train.steps=3", "train.batch_size=2", "adapter.rank=2", "optim.warmup_steps=0",
    "eval.steps=1", "eval.guidance=1",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs the stages; exit code 2 with a message for what is lacking."""
    args = parse(argv)
    os.environ["LORAGRAFT_CACHE"] = str(args.cache)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        if args.one:
            run_one(args, args.one)
            return 0
        for stage in [stage for stage in STAGES if stage in args.stages]:
            {"prepare": prepare, "run": run_all, "measure": measure_all}[stage](args)
    except (ValueError, FileNotFoundError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options, `--quick` resolved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for runs, pictures and features")
    parser.add_argument("--out", type=Path, help="JSON file to write (stage measure)")
    parser.add_argument("--recipe", default="marketing")
    parser.add_argument("--precisions", nargs="+", choices=ORDER, default=list(ORDER))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--images", type=int, default=256, help="pictures of each kind and precision")
    parser.add_argument("--cache", type=Path, default=default_cache_root(), help="data, encoded data, quantized bases")
    parser.add_argument("--data", type=Path, help="a domain's folder, drawn before, instead of drawing it")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's own choice")
    parser.add_argument("--quick", action="store_true", help="3 steps, 4 pictures: tries every stage, measures nothing")
    parser.add_argument("--commit", default="", help="commit of the code that runs")
    parser.add_argument("--one", choices=ORDER, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides")
    args = parser.parse_args(argv)
    assert set(ORDER) == set(get_args(Numerics))
    args.cache, args.work = args.cache.resolve(), args.work.resolve()
    if args.quick:
        args.images, args.overrides = min(args.images, 4), [*QUICK, *args.overrides]
    return args


def recipe_of(args: argparse.Namespace, precision: Numerics) -> Recipe:
    """The recipe at one precision: no tracking, no sample pictures to speak of, the time of every step."""
    settings = [f"numerics={precision}", "tracking.mode=disabled", "train.log_every=1", f"train.threads={args.threads}"]
    settings += ["sample.prompts=[]", "sample.steps=1", "sample.guidance=1", "sample.negative_prompt="]
    if args.data:
        settings += ["data.domain=null", f"data.folder={args.data.resolve()}", "data.allow_overlap=true"]
    recipe = load_recipe(args.recipe, [*settings, *args.overrides])
    if recipe.base != BASE:
        raise ValueError(f"the ladder is measured on {BASE}, and the recipe's base is {recipe.base}")
    return recipe


def device_of(args: argparse.Namespace) -> torch.device:
    """Where it runs."""
    return torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")


class StoredCaptions(PocketEncoders):
    """`pocket`'s autoencoder, and the embeddings of captions that were encoded before."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype, text=False)
        self.place, self.rows = (device, dtype), dict[str, dict[str, Tensor]]()

    def remember(self, cache: LatentCache) -> None:
        """The captions of all held-out samples, and the empty one."""
        names = ("prompt_embeds", "pooled_prompt_embeds")
        self.rows[""] = {name: cache.empty[name] for name in names}
        for split in ("test", "validation"):
            for entry in cache.split(split).entries:  # type: ignore[arg-type]  # a literal
                row = cache.store.read(entry.key)
                self.rows[entry.sample.caption] = {name: row[name] for name in names}

    def readable(self, caption: str) -> str:
        """All of it: what is too long was refused when it was encoded."""
        return caption

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        """Raises ValueError for a caption that is not there."""
        unknown = next((caption for caption in captions if caption not in self.rows), None)
        if unknown is not None:
            raise ValueError(
                f"{unknown!r} is not encoded in --cache: run `--stages prepare` with the same settings first"
            )
        rows = [self.rows[caption] for caption in captions]
        return {name: torch.stack([row[name] for row in rows]).to(*self.place) for name in rows[0]}


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
    recipe, device = recipe_of(args, REFERENCE), device_of(args)
    encoded(recipe, PocketEncoders(device, torch.float32))
    for precision in args.precisions:
        shipped_folder(find_spec(BASE), profile_of(precision), device, args.cache)


def encoded(recipe: Recipe, encoders: PocketEncoders) -> LatentCache:
    """The recipe's data, from the cache where it is there."""
    resolution = find_spec(BASE).resolution
    samples = open_source(recipe.data, resolution, default_cache_root())
    return encode_dataset(
        samples, encoders.encode_images, encoders.encode_text, encoders.id, resolution, default_cache_root()
    )


def run_all(args: argparse.Namespace) -> None:
    """A process per precision, so that memory is its own."""
    for precision in args.precisions:
        note = args.work / "results" / f"{precision}.json"
        if note.exists():
            check_settings(json.loads(note.read_text()), args, precision)
            continue
        command = [sys.executable, __file__, "--one", precision, "--work", args.work, "--cache", args.cache]
        command += ["--recipe", args.recipe, "--images", args.images, "--threads", args.threads]
        command += ["--cpu"] * args.cpu + (["--data", args.data] if args.data else []) + ["--", *args.overrides]
        subprocess.run([str(word) for word in command], check=True)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What must be equal for two precisions to be compared."""
    return {"recipe": args.recipe, "overrides": args.overrides, "images": args.images}


def check_settings(found: dict[str, Any], args: argparse.Namespace, precision: str) -> None:
    """Raises ValueError where a result was made with other settings."""
    if found["settings"] != settings_of(args):
        raise ValueError(
            f"{args.work} holds {precision} with {found['settings']}, and now it is {settings_of(args)}: give another --work"
        )


def run_one(args: argparse.Namespace, precision: Numerics) -> None:
    """Trains, draws, and writes what was found to <work>/results."""
    recipe, device = recipe_of(args, precision), device_of(args)
    accelerator = Accelerator(cpu=device.type == "cpu", log_with=None)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    encoders = StoredCaptions(device, dtype)
    cache = encoded(recipe, encoders)
    encoders.remember(cache)
    captions = tuple(sample.caption for sample in cache.split(recipe.eval.split).samples)
    if not captions:
        raise ValueError(
            f"the {recipe.eval.split} split is empty, and its captions are what is drawn: raise data.count"
        )
    backbone = load_backbone(BASE, profile_of(precision), device, args.cache, encoders=encoders)
    ledger = backbone.ledger
    weights = shipped_folder(backbone.spec, backbone.profile, device, args.cache)
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # as train/lora.py
        torch.cuda.reset_peak_memory_stats()
    trained = train_adapter(args.work / "runs" / precision, recipe, backbone, cache, accelerator)
    found = {
        "settings": settings_of(args),
        "numerics": BITS.get(precision, precision),
        "layers": {key: value for key, value in ledger.to_dict().items() if key in ("layers", "nbytes")},
        "engines": sorted({row.backend for row in ledger.rows}),
        "file_mb": sum(file.stat().st_size for file in weights.glob("*.safetensors")) / 1e6,
        "bits_per_weight": FORMATS[precision].bits if precision in FORMATS else None,
        "peak_training_mib": peak_bytes(device) / 2**20,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        **trained,
    }
    adapter = load_adapter(args.work / "runs" / precision / "adapter")
    config = recipe.eval
    sets = [
        ImageSet(
            name=name, prompts=captions, count=args.images, seed=config.seed, steps=config.steps,
            guidance=config.guidance, adapter=grafted,
        )
        for name, grafted in (("base", None), ("adapted", adapter))
    ]  # fmt: skip
    found["seconds_per_image"] = seconds_per_image(backbone, sets[0])
    folders = render_missing(backbone, sets, args.work / "images")
    found["folders"] = {name: str(folder.relative_to(args.work)) for name, folder in folders.items()}
    note = args.work / "results" / f"{precision}.json"
    note.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(note, (json.dumps(found, indent=1) + "\n").encode())


def train_adapter(
    path: Path, recipe: Recipe, backbone: Backbone, cache: LatentCache, accelerator: Accelerator
) -> dict[str, Any]:
    """What train/lora.py does between encoding and saving; nothing for a finished run but to read its figures."""
    backbone.set_training_numerics(recipe.train.save_x, recipe.train.dgrad)
    folder = RunFolder.open(path, recipe, backbone.base_id, exclusive=True)
    figures = path / "figures.json"
    if not folder.finished:
        previews = Previews.prepare(recipe.sample, backbone, cache)
        before = backbone.fingerprint()
        parameters = inject_adapter(backbone.transformer, recipe.adapter, backbone.spec.lora_targets)
        times = StepTimes()
        if train(accelerator, recipe, backbone, parameters, cache, previews, folder, times):
            raise ValueError(f"stopped at step {folder.step}: the same command goes on there")
        save_adapter(backbone.transformer, folder.adapter_folder, adapter_metadata(recipe, backbone, cache, folder))
        remove_adapter(backbone.transformer)
        if backbone.fingerprint() != before:
            raise ValueError(f"the frozen base changed while {path} was trained")
        steady = times.seconds[WARMUP:] or times.seconds
        write_atomic(figures, json.dumps({"seconds_per_step": statistics.median(steady)}).encode())
        folder.finish()
    summary = {key: folder.summary[key] for key in ("steps", "validation_loss_start", "validation_loss_end")}
    return {**json.loads(figures.read_text()), **summary}


def peak_bytes(device: torch.device) -> int:
    """Allocated on a GPU since the last reset; of a CPU process, all that was resident, Python and libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not getrusage: a process begins with the ru_maxrss of the one that started it.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def measure_all(args: argparse.Namespace) -> None:
    """Writes the JSON and prints the table."""
    # Here alone: the networks that judge are packages of 50 MB that the stage `run` does without.
    from loragraft.evaluation import measure
    from loragraft.evaluation.features import FeatureStore
    from loragraft.evaluation.metrics import kernel_distance_change, kernel_distance_interval

    if args.out is None:
        raise ValueError("the stage `measure` writes a JSON: name it with --out")
    rows = {precision: result_of(args, precision) for precision in args.precisions}
    if REFERENCE not in rows:
        raise ValueError(f"everything is measured against {REFERENCE}: name it among --precisions")
    recipe, resolution = recipe_of(args, REFERENCE), find_spec(BASE).resolution
    held_out = [s for s in open_source(recipe.data, resolution, args.cache) if s.split == recipe.eval.split]
    store = FeatureStore(args.work / "features", device_of(args))
    real = store.of([s.image for s in held_out], measure.reference_reader(resolution), f"reference {resolution}")
    paths = {
        (precision, kind): complete(args, precision, rows[precision]["folders"][kind])
        for precision in rows
        for kind in ("base", "adapted")
    }
    features = {key: store.of(found, measure.read_image, measure.GENERATED) for key, found in paths.items()}
    for precision, row in rows.items():
        base, adapted = features[precision, "base"], features[precision, "adapted"]
        row["kid_base"] = asdict(kernel_distance_interval(base, real))
        row["kid_adapted"] = asdict(kernel_distance_interval(adapted, real))
        if precision != REFERENCE:
            row["to_16bit"] = measure.measure_pairs(paths[REFERENCE, "base"], paths[precision, "base"], store)
            change = kernel_distance_change(features[REFERENCE, "adapted"], adapted, real)
            row["kid_adapted_change_to_16bit"] = asdict(change)
    result = {
        "base": BASE,
        **settings_of(args),
        "steps": rows[REFERENCE]["steps"],
        "references": len(real),
        "commit": args.commit,
        "command": "python benchmarks/precision_ladder.py --work WORK --out benchmarks/results/precision_ladder.json",
        "drawn_on": rendered_on([path for found in paths.values() for path in found]),
        "measured_on": device_name(device_of(args)),
        "versions": {package: version(package) for package in ("torch", "diffusers", "peft")},
        "precisions": {
            p: {k: v for k, v in row.items() if k not in ("settings", "folders")} for p, row in rows.items()
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out, (json.dumps(result, indent=1) + "\n").encode())
    print(table(result))


def result_of(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """What the stage `run` wrote. Raises FileNotFoundError or ValueError where it is not there, or of other settings."""
    note = args.work / "results" / f"{precision}.json"
    if not note.exists():
        raise FileNotFoundError(
            f"{note} is missing: run the stage `run` first, or leave {precision} out of --precisions"
        )
    found: dict[str, Any] = json.loads(note.read_text())
    check_settings(found, args, precision)
    return found


def complete(args: argparse.Namespace, precision: str, folder: str) -> list[Path]:
    """The pictures of a set. Raises ValueError where some are missing."""
    found = present(args.work / folder, args.images)
    if len(found) < args.images:
        raise ValueError(f"{precision} has {len(found)} of {args.images} pictures in {args.work / folder}")
    return found


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
