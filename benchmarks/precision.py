"""16-bit against 4-bit: what quantization changes in the images of `pocket`, at equal prompts and seeds.

    python benchmarks/precision.py render --work precision           resumable; best on a GPU
    python benchmarks/precision.py measure --work precision --out benchmarks/results/precision.json

Variants, all on the same layers in groups of 64; the adaLN layers are W4A16 in all but the last. Every precision that a
recipe can name, with an adapter trained on each: precision_ladder.py.

    16bit        the reference
    rtn-w4a4     plain rounding: the codes and kernels of `interchange`, no branch, no smoothing
    svdq-w4a4    SVDQuant, profile `interchange`
    svdq-w4a8    SVDQuant, profile `native`, as shipped
    nf4          bitsandbytes' NF4 weights (activations stay 16-bit)

PSNR, SSIM and ST-LPIPS are means over image pairs, KID compares the two sets; all with 95 % bootstrap intervals. Prompts:
the test captions of the domains, then the general ones of the score.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from loragraft.backbones.load import find_spec, load_backbone, plan_base
from loragraft.backbones.spec import Backbone, Profile
from loragraft.data.cache import default_cache_root
from loragraft.data.domains import DOMAINS
from loragraft.data.sources import open_source
from loragraft.disk import write_atomic
from loragraft.evaluation.controls import GENERAL_PROMPTS
from loragraft.evaluation.features import FeatureStore
from loragraft.evaluation.image_sets import ImageSet, device_name, present, render_missing, rendered_on
from loragraft.evaluation.measure import measure_pairs, paired
from loragraft.evaluation.metrics import mean_interval
from loragraft.quantization.checkpoint import record_base_id, recorded_base_id
from loragraft.quantization.convert import quantize_model
from loragraft.quantization.ledger import build_ledger
from loragraft.quantization.settings import QuantSettings
from loragraft.recipes.load import list_recipes, load_recipe
from loragraft.recipes.schema import DataConfig

BASE, REFERENCE = "pocket", "16bit"
RTN = QuantSettings(numerics="w4a4", rank=0, smoothing="none", rotation="never")
PLAN = "plan.json"


def main() -> int:
    """Runs one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    draw = stages.add_parser("render", help="draw what is missing")
    draw.add_argument("--work", type=Path, required=True)
    draw.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="default: all")
    draw.add_argument("--images", type=int, default=256)
    draw.add_argument("--steps", type=int, default=12)
    draw.add_argument("--seed", type=int, default=0)
    draw.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's own choice")
    judge = stages.add_parser("measure", help="compare what is there with the 16-bit images")
    judge.add_argument("--work", type=Path, required=True)
    judge.add_argument("--out", type=Path, required=True)
    judge.add_argument("--commit", default="", help="commit of the code that drew")
    args = parser.parse_args()
    try:
        {"render": render, "measure": measure}[args.stage](args)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def opened(precision: Profile | None) -> Callable[[str], Backbone]:
    return lambda device: load_backbone(BASE, precision, device, default_cache_root())


def rounded(device: str) -> Backbone:
    """The plan of `interchange` with plain rounding."""
    backbone = load_backbone(BASE, None, device, default_cache_root())
    quantize_model(
        backbone.transformer, plan_base(backbone.spec, backbone.transformer, RTN), {}, keep=backbone.spec.keep_16bit
    )
    record_base_id(backbone.transformer, f"rtn-{backbone.base_id}")
    return replace(
        backbone,
        profile="interchange",
        base_id=recorded_base_id(backbone.transformer),
        ledger=build_ledger(backbone.transformer),
    )


VARIANTS: dict[str, Callable[[str], Backbone]] = {
    REFERENCE: opened(None),
    "rtn-w4a4": rounded,
    "svdq-w4a4": opened("interchange"),
    "svdq-w4a8": opened("native"),
    "nf4": opened("nf4"),
}


def prompts() -> tuple[str, ...]:
    """Test captions of every domain in turn, then the general prompts; no doubles."""
    resolution = find_spec(BASE).resolution
    captions: list[str] = []
    for name in sorted(DOMAINS):
        data = load_recipe(name).data if name in list_recipes() else DataConfig(domain=name)
        samples = open_source(data, resolution, default_cache_root())
        captions += [s.caption for s in samples if s.split == "test"][:128]
    return tuple(dict.fromkeys([*GENERAL_PROMPTS, *captions]))


def render(args: argparse.Namespace) -> None:
    """Draws every variant's images under --work, and notes there what is where."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = args.variants or list(VARIANTS)
    asked = prompts()
    args.work.mkdir(parents=True, exist_ok=True)
    plan_file = args.work / PLAN
    plan: dict[str, Any] = json.loads(plan_file.read_text()) if plan_file.exists() else {}
    for name in wanted:
        begun = time.perf_counter()
        backbone = VARIANTS[name](device)
        entry = ImageSet(
            name=name,
            prompts=asked,
            count=args.images,
            seed=args.seed,
            steps=args.steps,
            guidance=backbone.spec.guidance,
        )
        folder = render_missing(backbone, [entry], args.work)[name]
        plan[name] = {
            "folder": str(folder.relative_to(args.work)),
            "images": args.images,
            "prompts": len(asked),
            "steps": args.steps,
            "guidance": backbone.spec.guidance,
            "seed": args.seed,
            "base_id": backbone.base_id,
            "layers": dict(Counter(row.numerics for row in backbone.ledger.rows)),
            "dtype": str(backbone.dtype).removeprefix("torch."),
            "seconds": round(time.perf_counter() - begun, 1),
        }
        write_atomic(plan_file, (json.dumps(plan, indent=1) + "\n").encode())
        print(f"{name}: {folder}", flush=True)


def measure(args: argparse.Namespace) -> None:
    """Writes the JSON and prints the table."""
    plan_file = args.work / PLAN
    if not plan_file.exists():
        raise FileNotFoundError(f"{plan_file} is missing: run `precision.py render --work {args.work}` first")
    plan: dict[str, Any] = json.loads(plan_file.read_text())
    files = {name: present(args.work / entry["folder"], entry["images"]) for name, entry in plan.items()}
    check(plan, files)
    reference, store = files[REFERENCE], FeatureStore(args.work / "features", "cpu")
    names = [name for name in plan if name != REFERENCE]
    measured = {name: {**plan[name], **measure_pairs(reference, files[name], store)} for name in names}
    result = {
        "base": BASE,
        "commit": args.commit,
        "command": "python benchmarks/precision.py measure --work WORK --out benchmarks/results/precision.json",
        "drawn_on": rendered_on([path for paths in files.values() for path in paths]),
        "measured_on": device_name(torch.device("cpu")),
        "versions": {package: version(package) for package in ("torch", "diffusers")},
        "reference": plan[REFERENCE],
        "variants": measured,
    }
    if {"rtn-w4a4", "svdq-w4a4"} <= set(names):
        gain = [paired(reference, files[name], "cpu")["psnr_db"] for name in ("svdq-w4a4", "rtn-w4a4")]
        result["psnr_gain_of_svdq_over_rtn_w4a4_db"] = asdict(mean_interval(gain[0] - gain[1]))
    write_atomic(args.out, (json.dumps(result, indent=1) + "\n").encode())
    print(table(result))


def check(plan: dict[str, Any], files: dict[str, list[Path]]) -> None:
    """Raises ValueError unless every variant has all its images, drawn at the reference's settings."""
    if REFERENCE not in plan:
        raise ValueError(f"the {REFERENCE} images are missing: render --variants {REFERENCE}")
    settings = ("images", "prompts", "steps", "guidance", "seed", "dtype")
    for name, entry in plan.items():
        if len(files[name]) < entry["images"]:
            raise ValueError(
                f"{name} has {len(files[name])} of {entry['images']} images: render again, it goes on there"
            )
        odd = [key for key in settings if entry[key] != plan[REFERENCE][key]]
        if odd:
            raise ValueError(f"{name} was drawn with other {', '.join(odd)} than {REFERENCE}: render it again")


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    rows = [
        f"| against {REFERENCE}, N = {result['reference']['images']} | PSNR in dB | SSIM | ST-LPIPS | KID (Lite0) |",
        "|---|---|---|---|---|",
    ]
    for name, entry in result["variants"].items():
        cells = [
            "equal images" if found is None else f"{found['value']:.{d}f} [{found['low']:.{d}f}, {found['high']:.{d}f}]"
            for found, d in (
                (entry[key], d) for key, d in (("psnr_db", 2), ("ssim", 4), ("st_lpips", 4), ("kid_lite0", 5))
            )
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
