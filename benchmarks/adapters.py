"""Adapters that travel: is a graft exact, how long does a switch take, and what does an adapter lose on another precision?

    python benchmarks/adapters.py --work work --out benchmarks/results/adapters.json --recipes marketing design
    python benchmarks/adapters.py --work small --out small.json --images 4 --precisions W4A8 16-bit --smoothing weight \\
        --methods "SVDQuant W4A8, rank R" --heads 1 -- train.steps=2 data.count=60 train.batch_size=2    two minutes on one core

Stages; the first two go on where they were interrupted, and each leaves its result in --work (shared: pocket_runs.py):

    train     an adapter per recipe and precision (train/lora.py, which resumes by itself)
    render    --images pictures of held-out captions per cell of the table, and of the merged and quantized models
    measure   KID of each, with paired differences
    graft     deviation of grafts on inputs that the layers see: the first run's adapter on `pocket`, and one that is trained here
              on FLUX.1's shapes
    switch    five resident rank-32 adapters on all of FLUX.1-dev's shapes; a GPU alone answers that

| key | meaning |
|---|---|
| graft_rel_dev_fp32, _bf16 | worst layer, RMS: grafted against the same factors kept apart |
| switch_ms | median milliseconds from one resident adapter to another; null without a GPU, and `switch` says so |
| transfer | recipe -> trained on -> run on -> KID, and its change against the adapter trained where it runs |
| merge_requantize | recipe -> method -> KID, and its change against the graft of the same adapter |

--stages names the stages to run, and --run-on and --methods what `render` draws, so that one machine or several processes may
draw and another measure. What follows `--` overrides the recipes in every run. Exit code 1 if a graft misses its bounds or an undo a byte, 2 if something is lacking.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from flux_graft import flux_shapes, random_adapter
from graft_proof import exact, on_real_inputs
from pocket_runs import LABELS, add_shared_options, device, run_folder, run_stages, train_run, trained_on
from torch import nn
from transfer import METHODS, PRECISIONS, methods, render_merged, render_transfer, score, tables

from loragraft.adapters.opening import open_run
from loragraft.adapters.resident import Change, ResidentAdapters
from loragraft.backbones.external import random_transformer
from loragraft.backbones.load import find_spec, load_backbone
from loragraft.data.cache import default_cache_root
from loragraft.disk import write_atomic
from loragraft.evaluation.image_sets import device_name, rendered_on
from loragraft.quantization.checkpoint import checksum, quantized_layers
from loragraft.quantization.names import match_paths
from loragraft.versions import installed_versions

STAGES = ("train", "render", "measure", "graft", "switch")
RESIDENTS, RANK, ROUNDS = 5, 32, 25
SWITCH_BASE = "flux1-dev"
NO_GPU = "not measured: a switch is timed on a GPU, and there is none here"


def main() -> int:
    """Runs the stages and writes the JSON once every part is there."""
    args = _parser().parse_args()
    stages = {"train": train, "render": render, "measure": measure, "graft": graft, "switch": switch}
    return run_stages(args, stages, then=lambda: finish(args))


def finish(args: argparse.Namespace) -> int:
    """Writes the JSON if every part is there; the exit code."""
    result = collect(args)
    if result is None:
        return 0
    write_atomic(args.out, (json.dumps(result, indent=1) + "\n").encode())
    print(tables(result))
    print(json.dumps({key: result[key] for key in ("graft_rel_dev_fp32", "graft_rel_dev_bf16", "switch_ms", "passed")}))
    return 0 if result["passed"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_options(parser, STAGES)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--recipes", nargs="+", default=["marketing"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--run-on", nargs="*", choices=PRECISIONS, help="columns to draw; default: --precisions")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--smoothing", choices=("calibrated", "weight"), default="calibrated", help="of merged models")
    parser.add_argument("--seed", type=int, default=0, help="of random layers and factors")
    parser.add_argument(
        "--heads", type=int, default=24, help="width of the FLUX-shaped layers, times 128; FLUX.1 has 24"
    )
    return parser


def train(args: argparse.Namespace) -> None:
    """A run per recipe and precision."""
    for recipe in args.recipes:
        for precision in args.precisions:
            train_run(args, recipe, LABELS[precision])


def render(args: argparse.Namespace) -> None:
    """The columns of the table, and the merged models."""
    for recipe in args.recipes:
        for run_on in args.precisions if args.run_on is None else args.run_on:
            render_transfer(args, recipe, run_on)
        for method in methods(args):
            render_merged(args, recipe, method)


def measure(args: argparse.Namespace) -> None:
    """Scores what is drawn."""
    for recipe in args.recipes:
        table, requantized, drawn = score(args, recipe)
        trained = trained_on(args.work, recipe, [LABELS[precision] for precision in args.precisions])
        steps = [json.loads(file.read_text())["steps"] for file in (args.work / "runs" / recipe).glob("*/summary.json")]
        part = {
            "transfer": table, "merge_requantize": requantized, "trained_on": trained, "drawn_on": rendered_on(drawn),
            "steps": sorted(set(steps)),
        }  # fmt: skip
        _write(args, f"measure-{recipe}", part)


def graft(args: argparse.Namespace) -> None:
    """Deviations of grafts, on a CPU or a GPU."""
    quantized = [precision for precision in args.precisions if precision in ("W4A8", "W4A4")]
    if not quantized:
        raise ValueError("the stage `graft` needs an adapter of W4A8 or W4A4: name one in --precisions")
    adapter, recipe = open_run(run_folder(args.work, args.recipes[0], LABELS[quantized[0]]))
    backbone = load_backbone(recipe.base, recipe.numerics, "cpu", default_cache_root())
    pocket = {"recipe": args.recipes[0], **on_real_inputs(backbone, adapter)}
    flux = {
        profile: flux_shapes(args.heads, profile, args.seed, device(), args.work / "flux-shapes" / profile)
        for profile in ("native", "interchange")
    }
    _write(args, "graft", {"device": device_name(torch.device(device())), "pocket": pocket, "flux_shapes": flux})


def switch(args: argparse.Namespace) -> None:
    """Five resident adapters on FLUX.1-dev with random codes, switched in turn."""
    if not torch.cuda.is_available():
        _write(args, "switch", {"device": device_name(torch.device("cpu")), "switch_ms": None, "why": NO_GPU})
        return
    spec = find_spec(SWITCH_BASE)
    assert spec.external is not None
    model = random_transformer(spec, spec.external, "native", torch.device("cuda"), torch.bfloat16, args.seed)
    part = {"device": torch.cuda.get_device_name(), "base": SWITCH_BASE}
    paths = [path for found in match_paths(spec.lora_targets, list(quantized_layers(model))).values() for path in found]
    _write(args, "switch", {**part, **switch_times(model, paths, RANK, args.seed)})


def switch_times(model: nn.Module, paths: list[str], rank: int, seed: int) -> dict[str, Any]:
    """Milliseconds, each until the device has finished: of switches, of all five at once, of a weight, of coming in."""
    before, random = checksum(model), torch.Generator(next(model.parameters()).device).manual_seed(seed)
    adapters = ResidentAdapters(model, room=rank)
    added = [adapters.add(random_adapter(model, paths, f"a{i}", rank, random), active=i == 0) for i in range(RESIDENTS)]
    times = [adapters.activate(f"a{i % RESIDENTS}") for i in range(1, ROUNDS + 1)]
    held, narrow = adapters.resident_bytes, adapters.branch_bytes
    weights = [adapters.set_weight("a0", 0.1 * i) for i in range(1, 6)]
    names = [f"a{i}" for i in range(RESIDENTS)]
    adapters.activate(*names)
    together = [adapters.activate(*order) for order in (names[::-1], names)]
    adapters.clear()
    return {
        "switch_ms": _median(times), "switch_ms_slowest": max(change.seconds for change in times) * 1e3,
        "switch_allocated_bytes": max(change.allocated_bytes for change in times),
        "switch_copied_mb": times[0].copied_bytes / 1e6, "all_five_ms": _median(together), "weight_ms": _median(weights),
        "add_ms": _median(added), "layers": len(paths), "adapters": RESIDENTS, "rank": rank,
        "resident_gib": held / 2**30, "branch_gib": narrow / 2**30, "undo_restores_every_byte": checksum(model) == before,
    }  # fmt: skip


def _median(changes: list[Change]) -> float:
    return float(statistics.median(change.seconds for change in changes) * 1e3)


def collect(args: argparse.Namespace) -> dict[str, Any] | None:
    """The JSON of all parts in --work; None, saying what is lacking, if only some stages were asked for."""
    try:
        scores = {recipe: _read(args, f"measure-{recipe}", "measure") for recipe in args.recipes}
        grafts, switches = _read(args, "graft", "graft"), _read(args, "switch", "switch")
    except FileNotFoundError as error:
        if set(args.stages) == set(STAGES):
            raise
        print(f"{args.out} is not written yet: {error}", file=sys.stderr)
        return None
    parts = [grafts["pocket"], *grafts["flux_shapes"].values()]
    return {
        "device": switches["device"], "graft_device": grafts["device"],
        **{key: sorted({name for part in scores.values() for name in part[key]}) for key in ("trained_on", "drawn_on")},
        "versions": installed_versions("loragraft", "torch", "diffusers", "peft"),
        "commit": args.commit, "command": "python benchmarks/adapters.py " + " ".join(sys.argv[1:]),
        "seed": args.seed, "images": args.images, "overrides": args.overrides,
        "steps": {recipe: part["steps"] for recipe, part in scores.items()},
        "graft_rel_dev_bf16": max(part["bf16_worst"] for part in parts),
        "graft_rel_dev_fp32": max(part["fp32_worst"] for part in parts),
        "switch_ms": switches["switch_ms"],
        "transfer": {recipe: part["transfer"] for recipe, part in scores.items()},
        "merge_requantize": {recipe: part["merge_requantize"] for recipe, part in scores.items()},
        "graft": {name: grafts[name] for name in ("pocket", "flux_shapes")}, "switch": switches,
        "passed": all(map(exact, parts)) and switches.get("undo_restores_every_byte", True),
    }  # fmt: skip


def _write(args: argparse.Namespace, name: str, part: dict[str, Any]) -> None:
    file = args.work / "parts" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, (json.dumps(part, indent=1) + "\n").encode())


def _read(args: argparse.Namespace, name: str, stage: str) -> dict[str, Any]:
    file = args.work / "parts" / f"{name}.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: run the stage `{stage}` first")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


if __name__ == "__main__":
    sys.exit(main())
