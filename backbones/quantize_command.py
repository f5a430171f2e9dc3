"""The verb `loragraft quantize`: its options, and what they mean for a base and for weights on disk."""

import argparse
import glob
import hashlib
import json
from pathlib import Path

from loragraft.backbones.architectures import (
    SMOOTHED,
    check_tensors,
    folder_settings,
    open_model,
    plan_model,
    quantize_files,
)
from loragraft.backbones.load import find_spec, quantize_base
from loragraft.quantization.formats import FORMATS
from loragraft.quantization.partial_file import JOURNAL
from loragraft.quantization.report import report_table, report_to_dict
from loragraft.quantization.settings import LayerReport
from loragraft.quantization.stream import REPORT_NAME


def run(args: argparse.Namespace, device: str) -> int:
    """Quantizes `args.base` into `args.out` and prints the report. Raises ValueError for options that do not go together."""
    out, source = Path(args.out), Path(args.base)
    if args.smoothing not in (None, "none") and args.profile not in SMOOTHED:
        raise ValueError(f"--smoothing {args.smoothing}: {args.profile} stores no smoothing vector; leave it out")
    calibrates = source.exists() and args.smoothing == "calibrated" and not args.stats
    for option, value in (("--prompts", args.prompts), ("--resolution", args.resolution)):
        if value is not None and not calibrates:
            raise ValueError(
                f"{option} {value} is for a pipeline's folder that is run with --smoothing calibrated; nothing reads it here"
            )
    if out.exists() and not (out / JOURNAL).exists():
        raise ValueError(f"{out} exists already: name another folder with --out, or move it away")
    if source.exists():
        reports = _files(args, source, out, device)
    else:
        reports = _base(args, out, device)
        (out / REPORT_NAME).write_text(json.dumps(report_to_dict(reports), indent=1) + "\n")
    print(report_table(reports))
    print(f"{args.base} in profile {args.profile}: {out}")
    return 0


def _base(args: argparse.Namespace, out: Path, device: str) -> list[LayerReport]:
    if "/" in args.base or args.base.endswith(".safetensors"):
        raise ValueError(f"there is no file or folder {args.base}")
    try:
        spec = find_spec(args.base)
    except ValueError as error:
        raise ValueError(f"{error}. There is no file or folder {args.base} either") from error
    if args.stats:
        raise ValueError(f"--stats is for weights on disk; the base {args.base!r} calibrates itself")
    return quantize_base(
        spec,
        args.profile,
        out,
        device,
        smoothing=args.smoothing or "calibrated",
        rank=args.rank,
        group_size=args.group_size,
        gptq=args.gptq,
    )


def _files(args: argparse.Namespace, source: Path, out: Path, device: str) -> list[LayerReport]:
    if args.smoothing not in (None, "auto", "calibrated"):
        raise ValueError(f"--smoothing {args.smoothing} is for bases; weights on disk are quantized with auto")
    if args.gptq and args.profile not in FORMATS and args.smoothing != "calibrated" and not args.stats:
        raise ValueError("--gptq needs activations: --smoothing calibrated on the pipeline's folder, or --stats FILE")
    stats, own = Path(args.stats) if args.stats else None, None
    if args.smoothing == "calibrated" and stats is None:
        stats = own = _pipeline_stats(args, source, out, device)
    reports = quantize_files(
        source,
        out,
        args.profile,
        device,
        stats=stats,
        rank=args.rank,
        group_size=args.group_size,
        gptq=args.gptq,
    )
    if own is not None:
        own.unlink()
    return reports


def _pipeline_stats(args: argparse.Namespace, source: Path, out: Path, device: str) -> Path:
    """A hidden file beside `out`; the same command, interrupted, finds it and does not calibrate again. Those of commands with
    other weights, layers, prompts or pixels are deleted."""
    from loragraft.backbones.pipeline_stats import PROMPTS, collect_pipeline_stats

    if not (source / "model_index.json").is_file():
        raise ValueError(
            "calibrated smoothing of weights on disk needs the folder of the whole pipeline (with its text encoders), or "
            "--stats, a file of calibrate.save_stats"
        )
    prompts: tuple[str, ...] = PROMPTS
    if args.prompts:
        lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()
        prompts = tuple(line.strip() for line in lines if line.strip())
    weights, architecture, config = open_model(source)
    main = folder_settings(args.profile, calibrated=True, rank=args.rank, group_size=args.group_size)
    check_tensors(weights, config, source)
    plan = plan_model(weights, architecture, main)  # what cannot be quantized is refused before the model runs
    layers = [layer for layer, settings in plan.items() if settings.numerics != "w4a16"]
    decisive = json.dumps([weights.identity, layers, prompts, args.resolution]).encode()
    path = out.with_name(f".{out.name}.{hashlib.sha256(decisive).hexdigest()[:16]}.stats.safetensors")
    if not path.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        for other in out.parent.glob(f".{glob.escape(out.name)}.*.stats.safetensors"):
            other.unlink()
        collect_pipeline_stats(source, layers, path, device, prompts=prompts, resolution=args.resolution)
    return path
