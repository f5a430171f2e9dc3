"""The verb `loragraft quantize`: its options, and what they mean for a base and for weights on disk."""

import argparse
import json
from pathlib import Path

from loragraft.backbones.architectures import quantize_files
from loragraft.backbones.load import find_spec, quantize_base
from loragraft.quantization.partial_file import JOURNAL
from loragraft.quantization.report import report_table, report_to_dict
from loragraft.quantization.settings import LayerReport
from loragraft.quantization.stream import REPORT_NAME

BASE_RANK = 16


def run(args: argparse.Namespace, device: str) -> int:
    """Quantizes `args.base` into `args.out` and prints the report. Raises ValueError for options that do not go together."""
    out, source = Path(args.out), Path(args.base)
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
    spec = find_spec(args.base)
    if args.stats:
        raise ValueError(f"--stats is for weights on disk; the base {args.base!r} calibrates itself")
    return quantize_base(
        spec,
        args.profile,
        out,
        device,
        smoothing=args.smoothing or "calibrated",
        rank=BASE_RANK if args.rank is None else args.rank,
        group_size=args.group_size,
        gptq=args.gptq,
    )


def _files(args: argparse.Namespace, source: Path, out: Path, device: str) -> list[LayerReport]:
    if args.smoothing == "calibrated" and not args.stats:
        raise ValueError("calibrated smoothing of weights on disk needs --stats, a file of calibrate.save_stats")
    if args.smoothing not in (None, "auto", "calibrated"):
        raise ValueError(f"--smoothing {args.smoothing} is for bases; weights on disk are quantized with auto")
    return quantize_files(
        source,
        out,
        args.profile,
        device,
        stats=Path(args.stats) if args.stats else None,
        rank=args.rank,
        group_size=args.group_size,
        gptq=args.gptq,
    )
