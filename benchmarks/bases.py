"""Every base at its true shapes, with random weights, on one GPU: its size, one training step, and its memory against preflight.

    python benchmarks/bases.py --out benchmarks/results/bases.json --conv benchmarks/results/conv.json --commit $(git rev-parse HEAD)
    python benchmarks/bases.py --out bases.json --only sdxl          one base; the others' rows in the file stay
    python benchmarks/bases.py --out bases.json --predict            sizes and preflight alone, anywhere
    python benchmarks/bases.py --out bases.json --write /tmp/bases   adds file_gb_written to the rows of the file: each base's INT4 file,
                                                                     written with random codes, weighed and removed; anywhere

A step is the one of `base=<name>` with one picture of the base's native resolution: forward, loss, backward, clipping, AdamW, replayed
from a CUDA graph, its blocks not compiled. A base that is not trained on runs forward instead ("step": "forward"). Each base has
a process of its own, and its row is in the file before the next begins; predictions run beside them on the CPU. Exit code 1 if a base
failed or its peak is not within max(10 %, 300 MiB) of preflight.

| key | meaning |
|---|---|
| params | weights of the denoiser |
| file_gb | its INT4 file, profile native, in 10^9 bytes (file_gb_16bit: in 16 bits) |
| step_ms | median step |
| peak_gib, preflight_gib | `torch.cuda.max_memory_allocated` and its prediction |
| conv_vs_cudnn | all its 3x3 convolutions: cuDNN's time in bf16 over ours, from --conv (SDXL, one picture); null if not timed |
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from preflight import GIB, Configuration, Model, compare, measure, predict

from loragraft.backbones.architectures import folder_settings
from loragraft.backbones.file_size import base_bytes
from loragraft.backbones.load import find_spec, list_bases
from loragraft.backbones.skeleton import meta_transformer, plan_architecture, randomize
from loragraft.disk import write_atomic
from loragraft.quantization.checkpoint import WEIGHTS_NAME, save_quantized
from loragraft.recipes.load import load_recipe

KEYS = ("params", "file_gb", "step_ms", "peak_gib", "preflight_gib", "conv_vs_cudnn")
BESIDE = 4
"""Predictions that run at once."""
TIMEOUT = 150
"""Seconds for one base's prediction or measurement."""
SHIPPED = ("pocket",)
"""`load.shipped_bases` without importing them: `pocket` reads its text encoder from a package that a bare machine lacks."""
CONV_BASE = "sdxl"
"""Whose convolutions benchmarks/conv.py times."""
ROW = "row: "


def bases(only: Sequence[str] = ()) -> list[str]:
    """The bases whose weights do not travel with the package, or those named. Raises ValueError for an unknown name."""
    return [find_spec(name).name for name in only] or [name for name in list_bases() if name not in SHIPPED]


def configuration(base: str, eager: bool = False) -> Configuration:
    """What is run of it: a step as the base's own defaults have it; `eager`: launched kernel by kernel."""
    spec = find_spec(base)
    trains = not spec.refuses_training
    checkpointing = trains and load_recipe("marketing", [f"base={base}"]).train.checkpointing == "block"
    return Configuration(
        base, spec.resolution, trains=trains, checkpointing=checkpointing, captured=trains and not eager
    )


def prediction(base: str, eager: bool = False) -> dict[str, Any]:
    """Sizes and preflight, from the configuration alone."""
    spec, chosen = find_spec(base), configuration(base, eager)
    assert spec.external is not None  # `bases` names no other
    plain = meta_transformer(spec.transformer_class, spec.external.config)
    run = predict(Model.of(base), chosen)
    return {
        "params": sum(parameter.numel() for parameter in plain.parameters()),
        "file_gb": base_bytes(spec, "native") / 1e9, "file_gb_16bit": base_bytes(spec, None) / 1e9,
        "preflight_gib": run.peak / GIB, "at_peak_gib": {kind: nbytes / GIB for kind, nbytes in run.at_peak.items()},
        "unknown_ops": list(run.unknown), "pixels": chosen.pixels, "step": "train" if chosen.trains else "forward",
        "checkpointing": chosen.checkpointing, "captured": chosen.captured,
    }  # fmt: skip


def written_gb(base: str, folder: Path) -> float:
    """Size of the INT4 file of random codes, written into `folder` and removed. Raises ValueError if it is not the predicted one."""
    spec = find_spec(base)
    assert spec.external is not None  # `bases` names no other
    plan = partial(plan_architecture, spec, folder_settings("native", calibrated=False))
    model = randomize(
        meta_transformer(spec.transformer_class, spec.external.config, plan), torch.device("cpu"), torch.bfloat16
    )
    saved = save_quantized(model, folder / base, overwrite=True)
    size = (saved / WEIGHTS_NAME).stat().st_size
    shutil.rmtree(saved)
    if size != base_bytes(spec, "native"):
        raise ValueError(f"{base}: the file has {size} bytes, its configuration says {base_bytes(spec, 'native')}")
    return size / 1e9


def measurement(base: str, eager: bool = False) -> dict[str, Any]:
    """One step on the GPU."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # as training does: its backward pass fails on some drivers
    found = measure(Model.of(base), configuration(base, eager), torch.device("cuda"))
    reserved = found["reserved_bytes"] / GIB
    return {"step_ms": 1e3 * found["seconds"], "peak_gib": found["peak_bytes"] / GIB, "reserved_gib": reserved}


def joined(predicted: dict[str, Any], measured: dict[str, Any], conv: float | None) -> dict[str, Any]:
    """A base's row, `KEYS` first. A part that failed is {"error": text}."""
    row = {**predicted, **measured, "conv_vs_cudnn": conv}
    if "peak_gib" in row and "preflight_gib" in row:
        sizes = [{"peak_bytes": row[key] * GIB, "seconds": 1.0} for key in ("preflight_gib", "peak_gib")]
        judged = compare(*sizes)
        row |= {"memory_pct": judged["memory_pct"], "memory_holds": judged["memory_holds"]}
    return {key: row.get(key) for key in KEYS} | {key: value for key, value in row.items() if key not in KEYS}


def in_its_own_process(what: str, base: str, eager: bool) -> dict[str, Any]:
    """The row that `bases.py --part WHAT --only BASE` prints, or {"error": the end of what it said}."""
    command = [sys.executable, __file__, "--part", what, "--only", base, *(["--eager"] if eager else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"{what} was not done after {TIMEOUT} s"}
    rows = [line for line in done.stdout.splitlines() if line.startswith(ROW)]
    if done.returncode or not rows:
        return {"error": f"{what}: {done.stderr.strip()[-1500:]}"}
    found: dict[str, Any] = json.loads(rows[-1].removeprefix(ROW))
    return found


def conv_figures(file: Path | None) -> dict[str, float]:
    """Base -> conv_vs_cudnn, from the JSON of benchmarks/conv.py. Raises KeyError where that has no such figure."""
    if file is None:
        return {}
    return {CONV_BASE: float(json.loads(file.read_text(encoding="utf-8"))["batches"]["1"]["conv_vs_cudnn"])}


def line(base: str, row: dict[str, Any]) -> str:
    """One line of the table."""
    if "error" in row:
        return f"{base:14s} FAILED {row['error'].splitlines()[-1]}"
    text = (
        f"{base:14s} {row['params'] / 1e9:6.2f} B {row['file_gb']:6.2f} GB   preflight {row['preflight_gib']:6.2f} GiB"
    )
    if row["step_ms"] is None:
        return text
    return f"{text}   measured {row['peak_gib']:6.2f} ({row['memory_pct']:+.1f} %)   {row['step']} {row['step_ms']:7.1f} ms"


def main() -> int:
    """Runs the bases one after another and writes the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", action="append", default=[], metavar="BASE", help="may be given several times")
    parser.add_argument("--predict", action="store_true", help="sizes and preflight alone: needs no GPU")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write, weigh and remove every INT4 file here")
    parser.add_argument("--eager", action="store_true", help="steps launched kernel by kernel, not captured")
    parser.add_argument("--conv", type=Path, help="JSON of benchmarks/conv.py, for conv_vs_cudnn")
    parser.add_argument("--commit", default="", help="commit of the code that runs")
    parser.add_argument(
        "--part", choices=["prediction", "measurement"], help="internal: print one base's part of a row"
    )
    args = parser.parse_args()
    if args.part is not None:
        (base,) = bases(args.only)
        part = prediction if args.part == "prediction" else measurement
        print(ROW + json.dumps(part(base, args.eager)))
        return 0
    if args.out is None:
        parser.error("give --out")
    if args.write is not None:
        return weigh(args)
    conv, started = conv_figures(args.conv), time.perf_counter()
    rows = json.loads(args.out.read_text())["bases"] if args.only and args.out.exists() else {}
    with ThreadPoolExecutor(BESIDE if not args.predict else 1) as pool:
        waiting: dict[str, Future[dict[str, Any]]] = {
            base: pool.submit(in_its_own_process, "prediction", base, args.eager) for base in bases(args.only)
        }
        for base, future in waiting.items():
            measured = {} if args.predict else in_its_own_process("measurement", base, args.eager)
            rows[base] = row = {**joined(future.result(), measured, conv.get(base)), "commit": args.commit}
            print(line(base, row), flush=True)
            write(args, rows, time.perf_counter() - started)
    chosen = [rows[base] for base in waiting]
    return 0 if all("error" not in row and row.get("memory_holds", True) for row in chosen) else 1


def weigh(args: argparse.Namespace) -> int:
    """Adds the written files' sizes to a result that is there."""
    result = json.loads(args.out.read_text())
    for base in bases(args.only):
        result["bases"][base]["file_gb_written"] = size = written_gb(base, args.write)
        print(f"{base:14s} {size:6.2f} GB written", flush=True)
        write_atomic(args.out, (json.dumps(result, indent=1) + "\n").encode())
    return 0


def write(args: argparse.Namespace, rows: dict[str, Any], seconds: float) -> None:
    """The file as far as it is known."""
    result = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none: predicted alone",
        "commit": args.commit, "command": "python benchmarks/bases.py --out FILE --conv FILE",
        "versions": {package: version(package) for package in ("torch", "diffusers", "peft", "triton")},
        "seconds": seconds,
        "preflight_worst_pct": max((abs(row["memory_pct"]) for row in rows.values() if "memory_pct" in row), default=None),
        "bases": rows,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
