"""How fast the quantizer is and how little memory it takes, at the size of FLUX.1-dev. How good: `quantizer_accuracy.py`.

    python benchmarks/quantizer.py stream --work /dev/shm/quantizer --out stream.json
    python benchmarks/quantizer.py stream --work /dev/shm/quantizer --out computed.json --no-input-file
    python benchmarks/quantizer.py calibrated --work /dev/shm/quantizer --out calibrated.json

stream      A folder of FLUX.1-dev's shapes with random weights and planted outliers: seconds, peak memory, size; then once
            more, killed by signal 9 half-way and resumed; the two files are compared. --no-input-file makes each weight
            when it is asked for, which takes the disk out of the time. --scale 0.05 is a model for a CPU.
calibrated  The same folder run on random inputs first (`flux_calibration.py`), and quantized on what its layers received; --kill
            as in `stream`. --no-input-file keeps the weights out of files here too, for a machine with little room: seconds
            then lack 24 GB of reading, and the GPU holds two weights more. `excluded` in the result says what the time lacks.

The JSON is written anew after every phase and every few seconds; `complete` is true in the last one.
"""

import argparse
import hashlib
import json
import math
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel
from flux_calibration import DEVICE, Note, collect_stats
from safetensors.torch import save_file
from torch import Tensor

from loragraft.backbones.architectures import FLUX, Architecture, folder_settings, open_model, plan_model
from loragraft.disk import write_atomic
from loragraft.quantization import svdquant
from loragraft.quantization.calibrate import StatsFile
from loragraft.quantization.candidates import candidate_errors
from loragraft.quantization.checkpoint import WEIGHTS_NAME
from loragraft.quantization.partial_file import JOURNAL
from loragraft.quantization.split import Layer, Split, Transform, split_layer
from loragraft.quantization.stream import quantize_stream
from loragraft.quantization.weight_source import TensorInfo, WeightSource

RANK = 32


def flux_config(scale: float) -> dict[str, Any]:
    """FLUX.1-dev's configuration at scale 1, else fewer blocks and heads."""
    return {
        "_class_name": FLUX.class_name, "patch_size": 1, "in_channels": 64, "out_channels": None,
        "num_layers": max(1, round(19 * scale)), "num_single_layers": max(1, round(38 * scale)),
        "attention_head_dim": 128, "num_attention_heads": max(1, round(24 * scale)),
        "joint_attention_dim": 64 * max(1, round(64 * scale)), "pooled_projection_dim": 64 * max(1, round(12 * scale)),
        "guidance_embeds": True, "axes_dims_rope": [16, 56, 56],
    }  # fmt: skip


class GeneratedSource:
    """Weights that are made when they are read: N(0, 1/K), one column in 128 ten times as loud, some entries 20 times."""

    def __init__(self, config: dict[str, Any], seed: int, device: str) -> None:
        with init_empty_weights():
            model = FluxTransformer2DModel.from_config(config)
        self._tensors = {name: TensorInfo(torch.bfloat16, tuple(t.shape)) for name, t in model.state_dict().items()}
        self._config, self.seed, self.device = config, seed, device

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def config(self) -> dict[str, Any]:
        return self._config

    @property
    def identity(self) -> str:
        return f"generated {self.seed} on {self.device}"

    def read(self, name: str) -> Tensor:
        shape = self._tensors[name].shape
        if len(shape) == 1:
            return torch.full(shape, 1.0 if "norm" in name and name.endswith("weight") else 0.0, dtype=torch.bfloat16)
        generator = torch.Generator(self.device).manual_seed(self.seed ^ zlib.crc32(name.encode()))
        weight = torch.randn(shape, generator=generator, device=self.device) / shape[1] ** 0.5
        loud = torch.randperm(shape[1], generator=generator, device=self.device)[: max(1, shape[1] // 128)]
        weight[:, loud] *= 10
        count = max(1, weight.numel() // 20_000)
        weight.view(-1)[torch.randint(weight.numel(), (count,), generator=generator, device=self.device)] *= 20
        return weight.to(torch.bfloat16)


def write_model(source: GeneratedSource, folder: Path, shard_bytes: float = 4e9) -> None:
    """A diffusers folder in shards, as the hub has it."""
    folder.mkdir(parents=True)
    index: dict[str, str] = {}
    shard: dict[str, Tensor] = {}

    def close() -> None:
        name = f"diffusion_pytorch_model-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name)
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for name in source.tensors:
        shard[name] = source.read(name).cpu()
        if sum(tensor.nbytes for tensor in shard.values()) > shard_bytes:
            close()
    close()
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    (folder / "config.json").write_text(json.dumps(source.config))


def open_source(args: argparse.Namespace) -> tuple[WeightSource, Architecture, dict[str, Any]]:
    """The folder that `prepare` made, or with --no-input-file the generator of the same weights."""
    if not args.no_input_file:
        return open_model(args.work / "model")
    config = flux_config(args.scale)
    return GeneratedSource(config, args.seed, DEVICE), FLUX, config


def child(args: argparse.Namespace) -> dict[str, Any]:
    """One quantization in this process: seconds, peak memory."""
    source, architecture, config = open_source(args)
    stats = StatsFile(args.stats) if args.stats else None
    main = folder_settings(
        "native", calibrated=stats is not None, rank=RANK, group_size=args.group_size, gptq=args.gptq
    )
    waits = {"reader": 0.0, "writer": 0.0}

    def waited(what: str, seconds: float) -> None:
        waits[what] += seconds

    started, plan = time.monotonic(), plan_model(source, architecture, main)
    with timed_parts() as parts:
        reports = quantize_stream(
            source, plan, config, args.work / args.name, device=DEVICE, stats=stats, waited=waited
        )
    quantized = [report for report in reports if report.numerics == "w4a8"]
    return {
        "seconds": time.monotonic() - started,
        "waited_seconds": waits,
        "part_seconds": parts,
        "peak_gpu_gib": torch.cuda.max_memory_reserved() / 2**30 if DEVICE == "cuda" else None,
        "peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "layers": len(reports),
        "mean_output_error": statistics.mean(report.output_error for report in quantized),
        "mean_plain_error": statistics.mean(report.rtn_error for report in quantized),
        "rotated": sum(report.hadamard for report in quantized),
        "smoothed": sum(report.beta > 0 or report.alpha > 0 for report in quantized),
        "fitted_to_inputs": sum(report.weighted for report in quantized),
        "mean_rounds": statistics.mean(report.iterations for report in quantized),
    }


@contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """Seconds in the parts of the layers' searches. Each of them ends by fetching an error: the host's clock is right."""
    seconds = {"candidates": 0.0, "finalists": 0.0, "alternation": 0.0, "plain rounding": 0.0}

    def timed_rank(layer: Layer, transforms: Sequence[Transform]) -> list[float]:
        started = time.monotonic()
        found = candidate_errors(layer, transforms)
        seconds["candidates"] += time.monotonic() - started
        return found

    def timed_split(layer: Layer, transform: Transform, rounds: int, *, weighted: bool = False) -> Split:
        started = time.monotonic()
        found = split_layer(layer, transform, rounds, weighted=weighted)
        part = {1: "plain rounding", svdquant.FINALIST_ROUNDS: "finalists"}.get(rounds, "alternation")
        seconds[part] += time.monotonic() - started
        return found

    with (
        patch.object(svdquant, "candidate_errors", timed_rank),
        patch.object(svdquant, "split_layer", timed_split),
    ):
        yield seconds


def start_child(args: argparse.Namespace, name: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "child", "--work", str(args.work), "--name", name, "--scale", str(args.scale)]
    command += ["--seed", str(args.seed), "--group-size", str(args.group_size), *options]
    command += ["--no-input-file"] if args.no_input_file else []
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish_child(process: subprocess.Popen[str], look: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """What a child found; `look` is called every second until it ends."""
    while True:
        try:
            output, _ = process.communicate(timeout=1)
            break
        except subprocess.TimeoutExpired:
            look()
    if process.returncode:
        raise RuntimeError(f"quantizing ended with {process.returncode}: {output}")
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def stream(args: argparse.Namespace, note: Note) -> dict[str, Any]:
    """Once without a break, once killed half-way and resumed; the files must be equal."""
    started = prepare(args)
    result = {
        "scale": args.scale,
        "make_seconds": time.monotonic() - started,
        **finish_child(start_child(args, "whole")),
    }
    whole = args.work / "whole" / WEIGHTS_NAME
    result["file_gb"] = whole.stat().st_size / 1e9
    note(result)
    if args.kill is not False:
        result |= killed(args, result["layers"], args.work / "whole")
    return result


def killed(args: argparse.Namespace, layers: int, whole: Path, *options: str) -> dict[str, Any]:
    """The same quantization killed by signal 9 half-way and resumed, compared with the one in `whole`."""
    journal = args.work / ".killed.unfinished" / JOURNAL
    process = start_child(args, "killed", *options)
    while process.poll() is None and (not journal.exists() or len(journal.read_bytes().splitlines()) <= layers // 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result: dict[str, Any] = {"killed_with_exit": process.returncode}
    result["done_when_killed"] = len(journal.read_bytes().splitlines()) - 1
    result["resume_seconds"] = finish_child(start_child(args, "killed", *options))["seconds"]
    result["equal_after_kill"] = digest(whole / WEIGHTS_NAME) == digest(args.work / "killed" / WEIGHTS_NAME)
    return result


def prepare(args: argparse.Namespace) -> float:
    """Clears the work folder of earlier results and makes the model unless it is there; returns when it began."""
    for name in ("whole", "killed", "calibrated", ".whole.unfinished", ".killed.unfinished", ".calibrated.unfinished"):
        shutil.rmtree(args.work / name, ignore_errors=True)
    started = time.monotonic()
    if not args.no_input_file and not is_made(args):
        shutil.rmtree(args.work / "model", ignore_errors=True)
        write_model(GeneratedSource(flux_config(args.scale), args.seed, DEVICE), args.work / "model")
    return started


def is_made(args: argparse.Namespace) -> bool:
    """Whether the folder of this scale is there, whole: its configuration is written last."""
    path = args.work / "model" / "config.json"
    return path.exists() and json.loads(path.read_text()) == flux_config(args.scale)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def calibrated(args: argparse.Namespace, note: Note) -> dict[str, Any]:
    """Statistics from forward passes over random inputs (1024 px at scale 1), then the quantizer on those."""
    result: dict[str, Any] = {"scale": args.scale, "passes": args.passes, "gptq": args.gptq}
    result["excluded"] = ["text encoders and prompts", "starting Python"]
    result["excluded"] += ["reading the 16-bit weights from a file"] if args.no_input_file else []

    def add(figures: dict[str, Any]) -> None:
        result.update(figures)
        note(result)

    started = prepare(args)
    add({"make_seconds": time.monotonic() - started})
    source, architecture, _ = open_source(args)
    plan = plan_model(source, architecture, folder_settings("native", calibrated=True))
    layers = [layer for layer, settings in plan.items() if settings.numerics != "w4a16"]
    stats, began = args.work / "stats.safetensors", time.monotonic()
    collect_stats(source, layers, stats, scale=args.scale, passes=args.passes, seed=args.seed, note=add)
    add({"statistics_seconds": time.monotonic() - began})
    options = ["--stats", str(stats), *(["--gptq"] if args.gptq else [])]
    add(finish_child(start_child(args, "calibrated", *options), watch(args, "calibrated", add)))
    for name in ("quantize_wall_so_far", "pieces_written"):  # of a run that was ended
        result.pop(name, None)
    add({"wall_seconds": time.monotonic() - began})  # with the start of a second Python
    add({"total_seconds": result["statistics_seconds"] + result["seconds"]})
    add({"file_gb": (args.work / "calibrated" / WEIGHTS_NAME).stat().st_size / 1e9})
    if args.kill:
        add(killed(args, result["layers"], args.work / "calibrated", *options))
    return result


def watch(args: argparse.Namespace, name: str, note: Note) -> Callable[[], None]:
    """Notes how far a child has come; at most every five seconds."""
    journal, started, last = args.work / f".{name}.unfinished" / JOURNAL, time.monotonic(), [0.0]

    def look() -> None:
        now = time.monotonic() - started
        if now - last[0] >= 5 and journal.exists():
            last[0] = now
            note({"quantize_wall_so_far": now, "pieces_written": len(journal.read_bytes().splitlines()) - 1})

    return look


def main() -> int:
    """Measures, writes the JSON, prints a summary; exit code 1 if a killed run ended with other bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("stream", "calibrated", "child"))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--commit", default="", help="commit of the code that runs")
    parser.add_argument("--work", type=Path, required=True, help="folder for models; at scale 1 it takes 40 GB")
    parser.add_argument("--scale", type=float, default=1.0, help="1: FLUX.1-dev")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--gptq", action="store_true")
    parser.add_argument("--passes", type=int, default=8, help="calibrated: forward passes")
    parser.add_argument("--no-input-file", action="store_true", help="make each weight when it is read; no folder")
    parser.add_argument(
        "--kill",
        action=argparse.BooleanOptionalAction,
        help="then once more, killed and resumed (stream: unless --no-kill)",
    )
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--stats", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "child":
        print(json.dumps(child(args)))
        return 0
    if reason := lacking_room(args):
        parser.error(reason)
    words = [args.out.name if args.out and word == str(args.out) else word for word in sys.argv]  # no local path
    about = {"device": torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()}
    about |= {"torch": torch.__version__, "commit": args.commit, "command": " ".join(words)}

    def note(result: dict[str, Any], complete: bool = False) -> None:
        if args.out:
            content = {**about, "complete": complete, **result}
            write_atomic(args.out, (json.dumps(content, indent=1) + "\n").encode())

    result = (stream if args.what == "stream" else calibrated)(args, note)
    note(result, complete=True)
    for name, value in result.items():
        print(f"{name:24s} {json.dumps(value)}")
    return 0 if result.get("equal_after_kill", True) else 1


def lacking_room(args: argparse.Namespace) -> str | None:
    """Why the work folder cannot hold what this run writes; None if it can."""
    args.work.mkdir(parents=True, exist_ok=True)
    config = flux_config(args.scale)
    weights = sum(2 * math.prod(info.shape) for info in GeneratedSource(config, args.seed, "cpu").tensors.values())
    made = args.no_input_file or is_made(args)
    statistics_bytes = 0.1 * weights if args.what == "calibrated" else 0  # 512 rows of every layer's input in bfloat16
    files = 1 if args.kill is False or (args.kill is None and args.what == "calibrated") else 2
    needed = int((0 if made else weights) + statistics_bytes + files * 0.3 * weights)
    free = shutil.disk_usage(args.work).free
    if free >= needed:
        return None
    return f"--work {args.work} has {free / 1e9:.1f} GB free, this run writes {needed / 1e9:.1f}: name another folder"


if __name__ == "__main__":
    sys.exit(main())
