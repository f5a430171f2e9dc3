"""The INT4 engine beside bf16 on one CUDA device: correctness first, then every linear layer of FLUX.1-dev at 1024 px.

    python benchmarks/int4_engine.py --out benchmarks/results/int4_engine.json --commit $(git rev-parse HEAD) --work /dev/shm/quantizer

Nothing is timed if an error against float64 of the same quantized operands exceeds its bound. Then, replayed CUDA graphs, one
of each in turn: bf16 (cuBLAS, no branch), ours (activation quantization, down- and up-projection of rank 32 + 16
and bias included), ours without a branch, with a second adapter, unfused, in W4A4, on the portable kernels; from
benchmarks/rivals.py FP8 with and without its activation quantization, `torch._int_mm`, NF4 (bitsandbytes) and W4A4
(comfy-kitchen), the last two where they are installed. Layers that read one x (q, k, v; in single blocks the feed-forward too)
are one layer here; of bf16 as one matrix or as several the faster counts. Training: forward and the gradients of x and of the
adapter, against `nn.Linear` with PEFT's LoRA. --quantizer, --calibrated and
--accuracy are what benchmarks/quantizer.py (on a GPU) and quantizer_accuracy.py (anywhere) wrote; with --work those that are
not given are made first, each by a process of its own. --timings FILE times nothing: it renews the quantizer's figures in a
file of before, and needs no GPU.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from peft import LoraConfig, inject_adapter_in_model
from rivals import RivalError, build, int_mm
from timing import compare, eager_us
from torch import Tensor, nn

from loragraft.kernels.gemm import w4a8_gemm
from loragraft.kernels.hopper_gemm import hopper_gemm
from loragraft.kernels.layout import LinearCase, pack_words, padded, relative_rms
from loragraft.kernels.registry import OPS, cast
from loragraft.kernels.token_quant import quantize_down
from loragraft.kernels.w4a4_linear import w4a4_linear
from loragraft.kernels.w4a8_linear import w4a8_linear
from loragraft.kernels.w4a16_linear import w4a16_linear

DEVICE, BF16 = "cuda", torch.bfloat16
RANK, ADAPTER = 32, 16
BOUND = 5e-3


@dataclass(frozen=True)
class Layer:
    """`count` layers of K inputs and N outputs in all on M tokens; parts: the matrices that a bf16 model holds."""

    name: str
    count: int
    M: int
    K: int
    parts: tuple[int, ...]

    @property
    def N(self) -> int:  # noqa: N802  # a dimension, named as its siblings
        return sum(self.parts)


FLUX = (
    Layer("single qkv + ff in", 38, 4608, 3072, (3072, 3072, 3072, 12288)),
    Layer("single out", 38, 4608, 15360, (3072,)),
    *(
        layer
        for name, M in (("image", 4096), ("text", 512))
        for layer in (
            Layer(f"{name} qkv", 19, M, 3072, (3072, 3072, 3072)),
            Layer(f"{name} attention out", 19, M, 3072, (3072,)),
            Layer(f"{name} ff in", 19, M, 3072, (12288,)),
            Layer(f"{name} ff out", 19, M, 12288, (3072,)),
        )
    ),
)
OTHER = (
    Layer("SDXL self-attention 32x32", 1, 1024, 1280, (1280, 1280, 1280)),
    Layer("SDXL ff in 32x32", 1, 1024, 1280, (10240,)),
    Layer("SDXL ff out 32x32", 1, 1024, 5120, (1280,)),
    Layer("SANA qkv", 1, 1024, 2240, (2240, 2240, 2240)),
    Layer("SANA ff in (1x1)", 1, 1024, 2240, (11200,)),
    Layer("SANA ff out (1x1)", 1, 1024, 5600, (2240,)),
)
CHECKED = tuple(
    LinearCase(M, N, K, R=RANK, r=ADAPTER, hadamard=hadamard, group=group)
    for M, N, K, hadamard, group in (
        (1, 3072, 3072, False, 64), (77, 2240, 2240, False, 64), (333, 2240, 5632, False, 64), (600, 3072, 5632, True, 128),
        (1100, 1280, 1280, True, 64),
    )
)  # fmt: skip


def largest_error() -> float:
    """Worst relative RMS error, forward and gradients, of every op in bf16 against float64 of its reference."""
    worst = 0.0
    for op in OPS:
        for case in CHECKED:
            if (op.name == "w4a16" and case.M > 600) or (op.name != "w4a8" and (case.hadamard or case.group == 128)):
                continue
            inputs = cast(op.inputs(case), BF16, DEVICE)
            dy = torch.randn(case.M, case.N, device=DEVICE).to(BF16)
            wide = {
                name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
                for name, value in inputs.items()
            }
            modes = {} if op.name == "w4a16" else {"save_x": "raw"}
            ours, reference = _gradients(op.apply, inputs, dy, **modes), _gradients(op.reference, wide, dy.double())
            errors = {name: relative_rms(ours[name], reference[name]) for name in reference}
            print(
                f"{op.name} {case}: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()), flush=True
            )
            worst = max(worst, *errors.values())
    return worst


def _gradients(function: Callable[..., Tensor], inputs: dict[str, Any], dy: Tensor, **modes: str) -> dict[str, Tensor]:
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("x", "adapter_down", "adapter_up")}
    y = function(**{**inputs, **leaves}, **modes)
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))}


def native_weights(layer: Layer, rank: int) -> dict[str, Tensor]:
    """Random W4A8 tensors of a layer, its branch of `rank`; plain smoothing vector."""
    N, K = layer.N, layer.K
    KP = padded(K)
    scale = torch.randint(6, 16, (KP // 64, N), dtype=torch.uint8, device=DEVICE)
    return {
        "qweight": torch.randint(0, 256, (N, KP // 2), dtype=torch.uint8, device=DEVICE),
        "row_scale": torch.rand(N, device=DEVICE) / (60 * K**0.5) + 1e-5,
        "group_words": pack_words(scale, torch.full_like(scale, 8), 64),
        "smooth": (torch.rand(K, device=DEVICE) + 0.5).to(BF16),
        "lora_down": (torch.randn(rank, K, device=DEVICE) / K**0.5).to(BF16),
        "lora_up": torch.randn(N, rank, device=DEVICE).to(BF16),
        "bias": torch.randn(N, device=DEVICE).to(BF16),
    }


def forward_row(layer: Layer) -> dict[str, float]:
    """Microseconds of one layer's forward pass, every way."""
    x = torch.randn(layer.M, layer.K, device=DEVICE).to(BF16)
    dense = [torch.randn(part, layer.K, device=DEVICE).to(BF16) / layer.K**0.5 for part in layer.parts]
    joined = torch.cat(dense) if len(dense) > 1 else dense[0]
    weights = {rank: native_weights(layer, rank) for rank in (0, RANK, RANK + ADAPTER, RANK + 2 * ADAPTER)}
    own, bare = weights[RANK + ADAPTER], weights[0]

    def ours(w: dict[str, Tensor], **changes: Any) -> Callable[[], Tensor]:
        return lambda: w4a8_linear(x, **{**w, "hadamard": False, **changes})  # type: ignore[arg-type]

    def portable() -> Tensor:
        codes, scale, h = quantize_down(x, own["smooth"], False, own["lora_down"])
        return w4a8_gemm(
            codes, scale, own["qweight"], own["group_words"], own["row_scale"], h, own["lora_up"], own["bias"]
        )

    def unfused() -> Tensor:
        codes, scale, h = quantize_down(x, own["smooth"], False, bare["lora_down"])
        y = hopper_gemm(
            codes, scale, own["qweight"], own["group_words"], own["row_scale"], h, bare["lora_up"], own["bias"]
        )
        return y.addmm_(x @ own["lora_down"].T, own["lora_up"].T)

    steps: dict[str, Callable[[], object]] = {
        "bf16": lambda: F.linear(x, joined),
        "bf16_parts": lambda: [F.linear(x, part) for part in dense],
        "w4a8": ours(own),
        "w4a8_rotated": ours({**own, "smooth": None}, hadamard=layer.K % 64 == 0),  # type: ignore[dict-item]
        "w4a8_no_branch": ours(bare),
        "w4a8_two_adapters": ours(weights[RANK + 2 * ADAPTER]),
        "w4a8_unfused": unfused,
        "w4a8_portable": portable,
        "w4a4": interchange(layer, x, own),
        **library(x, joined),
    }
    with torch.no_grad():
        # Short and many: under this load the clock moves by a third, and 15 rounds read the branch anywhere from 3.4 to 5.4 %.
        row = {**compare(steps, inner=5, rounds=60), **peers(x, joined)}
    row["bf16"] = min(row["bf16"], row.pop("bf16_parts"))
    torch.cuda.empty_cache()
    return row


def interchange(layer: Layer, x: Tensor, own: dict[str, Tensor]) -> Callable[[], Tensor]:
    """The same layer in W4A4, groups of 64."""
    wscale = (torch.rand(padded(layer.K) // 64, layer.N, device=DEVICE) / layer.K**0.5).to(BF16)
    branch = (own["smooth"], own["lora_down"], own["lora_up"], own["bias"])
    return lambda: w4a4_linear(x, own["qweight"], wscale, *branch, hadamard=False)


def library(x: Tensor, dense: Tensor) -> dict[str, Callable[[], object]]:
    """What torch itself has (rivals.py): FP8 with a scale per row, with and without quantizing x; INT8 without any scales."""
    torch._dynamo.reset()  # else the ninth shape of a run would meet the limit on recompilations, and run uncompiled
    layers = {
        "fp8_product_only": build("fp8_matmul", dense),
        "fp8": build("fp8_compiled", dense),
        "int_mm_product_only": int_mm(dense),
    }
    return {name: partial(layer, x) for name, layer in layers.items()}


def peers(x: Tensor, dense: Tensor) -> dict[str, float]:
    """Eager microseconds of other people's four-bit layers that can run here; where one cannot, NaN and the reason printed."""
    row = {}
    for name in ("nf4", "comfy_kitchen"):
        try:
            layer = build(name, dense)
            row[name] = eager_us(lambda layer=layer: layer(x), repeats=5)  # type: ignore[misc]
        except RivalError as error:
            print(f"{name}: {error}", file=sys.stderr)
            row[name] = float("nan")
    return row


def train_row(layer: Layer) -> dict[str, float]:
    """Microseconds of forward + dx + dA + dB: PEFT's LoRA on bf16 layers, and ours with both kinds of dgrad.

    Replayed CUDA graphs of the eager calls on both sides, that is, their GPU time; `eager_` as Python launches them.
    """
    x = torch.randn(layer.M, layer.K, device=DEVICE).to(BF16).requires_grad_()
    dy = torch.randn(layer.M, layer.N, device=DEVICE).to(BF16)
    parts = nn.ModuleDict({f"p{i}": nn.Linear(layer.K, n, dtype=BF16) for i, n in enumerate(layer.parts)}).to(DEVICE)
    parts.requires_grad_(False)
    config = LoraConfig(r=ADAPTER, lora_alpha=ADAPTER, target_modules=list(parts))
    peft = inject_adapter_in_model(config, parts).to(BF16)
    trained = [x, *(parameter for parameter in peft.parameters() if parameter.requires_grad)]
    dys = dy.split(layer.parts, dim=1)
    weights: dict[str, Any] = {**native_weights(layer, RANK), "hadamard": False}
    down = (torch.randn(ADAPTER, layer.K, device=DEVICE) / layer.K**0.5).to(BF16).requires_grad_()
    up = torch.randn(layer.N, ADAPTER, device=DEVICE).to(BF16).requires_grad_()

    def ours(dgrad: str) -> Callable[[], object]:
        def step() -> object:
            y = w4a8_linear(x, **weights, adapter_down=down, adapter_up=up, dgrad=dgrad)  # type: ignore[arg-type]
            return torch.autograd.grad(y, [x, down, up], dy)

        return step

    steps: dict[str, Callable[[], object]] = {
        "bf16_peft": lambda: torch.autograd.grad([module(x) for module in peft.values()], trained, dys),
        "w4a8_int8_dgrad": ours("int8"),
        "w4a8_bf16_dgrad": ours("dequantized"),
    }
    row = {**compare(steps, inner=3), **{f"eager_{name}": eager_us(step) for name, step in steps.items()}}
    torch.cuda.empty_cache()
    return row


def gemv() -> dict[str, float]:
    """W4A16 for one token, 3072 -> 18432, rotating among 8 weights: bytes a second against a device copy's."""
    N, K, copies = 18432, 3072, 8
    x = torch.randn(1, K, device=DEVICE).to(BF16)
    scales = [torch.rand(K // 64, N, device=DEVICE).to(BF16) for _ in range(2 * copies)]
    codes = [torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device=DEVICE) for _ in range(copies)]
    none = torch.zeros(0, K, device=DEVICE, dtype=BF16), torch.zeros(N, 0, device=DEVICE, dtype=BF16)

    def step() -> None:
        for i in range(copies):
            w4a16_linear(x, codes[i], scales[2 * i], scales[2 * i + 1], *none, None)

    with torch.no_grad():
        source = torch.empty(1 << 28, dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        times = compare({"gemv": step, "copy": lambda: target.copy_(source)})
    us, copy = times["gemv"] / copies, 2 * source.numel() / times["copy"]
    moved = codes[0].numel() + 2 * scales[0].nbytes + 2 * K + 2 * N
    return {"microseconds": us, "copy_tb_per_s": copy / 1e6, "fraction_of_copy": moved / us / copy}


def deterministic() -> bool:
    """Two runs of forward and backward on one layer, compared bit for bit."""
    layer = FLUX[6]
    x = torch.randn(layer.M, layer.K, device=DEVICE).to(BF16)
    dy = torch.randn(layer.M, layer.N, device=DEVICE).to(BF16)
    inputs: dict[str, Any] = {**native_weights(layer, RANK), "hadamard": False, "x": x}
    inputs["adapter_down"] = (torch.randn(ADAPTER, layer.K, device=DEVICE) / layer.K**0.5).to(BF16)
    inputs["adapter_up"] = torch.randn(layer.N, ADAPTER, device=DEVICE).to(BF16)
    first = _gradients(w4a8_linear, inputs, dy, dgrad="int8")
    again = [_gradients(w4a8_linear, inputs, dy, dgrad="int8") for _ in range(20)]
    return all(torch.equal(first[name], other[name]) for other in again for name in first)


def summary(rows: dict[str, dict[str, float]], training: dict[str, dict[str, float]]) -> dict[str, float]:
    """Sums over the layers of FLUX.1-dev, weighted by how often they occur."""
    total = {key: sum(layer.count * rows[layer.name][key] for layer in FLUX) for key in rows[FLUX[0].name]}
    train = {key: sum(layer.count * training[layer.name][key] for layer in FLUX) for key in training[FLUX[0].name]}
    return {
        "linears_ms_bf16": total["bf16"] / 1e3,
        "linears_ms_w4a8": total["w4a8"] / 1e3,
        "linears_speedup_w4a8": total["bf16"] / total["w4a8"],
        "linears_speedup_w4a8_rotated": total["bf16"] / total["w4a8_rotated"],
        "linears_speedup_w4a8_portable": total["bf16"] / total["w4a8_portable"],
        "linears_vs_fp8": total["fp8"] / total["w4a8"],
        "fused_vs_unfused": total["w4a8_unfused"] / total["w4a8"],
        "train_linears_speedup_w4a8": train["bf16_peft"] / train["w4a8_int8_dgrad"],
        "train_linears_speedup_w4a8_bf16_dgrad": train["bf16_peft"] / train["w4a8_bf16_dgrad"],
        "train_linears_speedup_w4a8_eager": train["eager_bf16_peft"] / train["eager_w4a8_int8_dgrad"],
        "branch_cost_pct": 100 * (total["w4a8"] / total["w4a8_no_branch"] - 1),
        "graft_cost_pct": 100 * (total["w4a8_two_adapters"] / total["w4a8"] - 1),
        "w4a4_vs_bf16": total["bf16"] / total["w4a4"],
        "w4a4_vs_comfy_kitchen": total["comfy_kitchen"] / total["w4a4"],
        "nf4_vs_bf16": total["bf16"] / total["nf4"],
    }


def make_missing(arguments: argparse.Namespace) -> None:
    """With --work: runs the quantizer's benchmarks whose files were not given, and puts them beside --out."""
    here, folder = Path(__file__).parent, arguments.out.parent
    folder.mkdir(parents=True, exist_ok=True)
    scripts = {
        "quantizer": ["quantizer.py", "stream", "--work", str(arguments.work)],
        "calibrated": ["quantizer.py", "calibrated", "--work", str(arguments.work)],
        "accuracy": ["quantizer_accuracy.py"],
    }
    for name, (script, *options) in scripts.items():
        if arguments.work is None or getattr(arguments, name) is not None:
            continue
        made = folder / {"quantizer": "quantizer.json", "accuracy": "quantizer_accuracy.json"}.get(name, f"{name}.json")
        line = [sys.executable, str(here / script), *options, "--out", str(made), "--commit", arguments.commit]
        print(f"{name}: {script} {' '.join(options)}", flush=True)
        subprocess.run(line, check=True)
        setattr(arguments, name, made)


def from_other_scripts(arguments: argparse.Namespace) -> dict[str, Any]:
    """The quantizer's figures, from the files of its own benchmarks; None where a file was not given."""
    read = {name: json.loads(path.read_text()) if path else {} for name, path in (
        ("stream", arguments.quantizer), ("calibrated", arguments.calibrated), ("accuracy", arguments.accuracy))}  # fmt: skip
    return {
        "quantizer_commits": {name: found.get("commit") for name, found in read.items()},
        "quantize_seconds": read["stream"].get("seconds"),
        "quantize_peak_gib": read["stream"].get("peak_gpu_gib"),
        "file_gb": read["stream"].get("file_gb"),
        "calibrated_seconds": read["calibrated"].get("total_seconds"),
        "auto_error_ratio": read["accuracy"].get("ratios", {}).get("auto_over_w4a4", {}).get("worst"),
    }


def _command(arguments: argparse.Namespace) -> str:
    """The line that was given, files by their names. Called before `make_missing`."""
    files = {"out": arguments.out, "quantizer": arguments.quantizer, "calibrated": arguments.calibrated,
             "accuracy": arguments.accuracy, "work": arguments.work}  # fmt: skip
    given = " ".join(f"--{name} {path.name}" for name, path in files.items() if path is not None)
    return f"python benchmarks/int4_engine.py --shapes {arguments.shapes} {given}"


def _without_nan(value: Any) -> Any:
    """JSON knows no NaN: null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--commit", required=True, help="commit of the code that runs")
    parser.add_argument("--shapes", choices=("all", "flux"), default="all", help="flux: without SDXL's and SANA's")
    parser.add_argument("--quantizer", type=Path, help="JSON of `benchmarks/quantizer.py stream`")
    parser.add_argument("--calibrated", type=Path, help="JSON of `benchmarks/quantizer.py calibrated`")
    parser.add_argument("--accuracy", type=Path, help="JSON of `benchmarks/quantizer_accuracy.py`")
    parser.add_argument(
        "--work",
        type=Path,
        help="folder of 40 GB: make those of the three files above that are not given (half an hour)",
    )
    parser.add_argument("--timings", type=Path, help="JSON of an earlier run: keep its timings")
    arguments = parser.parse_args()
    if arguments.timings is not None:
        kept = json.loads(arguments.timings.read_text())
        arguments.out.write_text(json.dumps(kept | from_other_scripts(arguments), indent=1) + "\n")
        return 0
    if not torch.cuda.is_available():
        parser.error("no CUDA device: these figures are about GPU kernels; `pytest tests/kernels` checks the CPU path")
    command = _command(arguments)
    make_missing(arguments)
    torch.manual_seed(0)
    error, same = largest_error(), deterministic()
    if error > BOUND or not same:
        print(
            f"largest error {error:.1e} (bound {BOUND:.0e}), same bits twice: {same}; nothing is timed", file=sys.stderr
        )
        return 1
    rows, training = {}, {}
    for layer in FLUX if arguments.shapes == "flux" else (*FLUX, *OTHER):
        rows[layer.name] = {**forward_row(layer), "count": layer.count, "M": layer.M, "N": layer.N, "K": layer.K}
        training[layer.name] = train_row(layer)
        figures = {**rows[layer.name], **training[layer.name]}
        print(layer.name, {name: round(value, 1) for name, value in figures.items()}, flush=True)
    adaln = gemv()
    properties = torch.cuda.get_device_properties(0)
    result = {
        "device": properties.name,
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda,
                     "python": platform.python_version()},
        "commit": arguments.commit,
        "command": command,
        **summary(rows, training),
        "w4a16_bandwidth_fraction": adaln["fraction_of_copy"],
        "max_rel_err": error,
        "same_bits_twice": same,
        **from_other_scripts(arguments),
        "forward_us": rows,
        "train_us": training,
        "w4a16": adaln,
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(_without_nan(result), indent=1, allow_nan=False) + "\n")
    print(json.dumps({name: value for name, value in result.items() if not isinstance(value, dict)}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
