"""Kernels beside bf16: correctness first, then medians, on one CUDA device.

    python benchmarks/kernels.py --out benchmarks/results/kernels.json --commit $(git rev-parse HEAD)

Every op is compared with its float64 reference, forward and gradient, at each shape that is timed; if one error exceeds its
bound nothing is timed and the exit status is 1. Times are medians of CUDA events over runs that rotate among eight copies of
the weights, so that a small layer is not read from the L2 cache every time. The baseline of the same run is `F.linear` in
bf16, for the backward pass with a frozen weight and a LoRA of the same rank beside it: the work an adapter costs without
quantization. Calls are eager, one by one: where a layer is small, the time is that of launching its kernels from Python.
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from loragraft.kernels.layout import LinearCase, relative_rms
from loragraft.kernels.registry import OPS, Inputs, LinearOp, cast

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
POCKET = (LinearCase(1536, 256, 256), LinearCase(1536, 1024, 256), LinearCase(1536, 256, 1280))
FLUX = (LinearCase(4608, 3072, 3072, R=32, r=16), LinearCase(512, 12288, 3072, R=32, r=16))
SHAPES = {
    "w4a8": (*POCKET, *FLUX, LinearCase(4608, 3072, 3072, R=32, r=16, hadamard=True)),
    "w4a4": (*POCKET, *FLUX),
    "w4a16": (
        LinearCase(16, 1536, 256, R=0, r=0),
        LinearCase(1, 18432, 3072, R=0, r=0),
        LinearCase(1, 18432, 3072, R=0, r=16),
    ),
}
WRT = ("x", "adapter_down", "adapter_up")
COPIES = 8


def run(function: Callable[..., Tensor], inputs: Inputs, dy: Tensor, **modes: str) -> dict[str, Tensor]:
    """y and the gradients of x and of the adapter."""
    leaves = {name: value.detach().requires_grad_() for name in WRT if isinstance(value := inputs[name], Tensor)}
    y = function(**{**inputs, **leaves}, **modes)
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))}


def errors(op: LinearOp, case: LinearCase, dtype: torch.dtype) -> dict[str, object]:
    """RMS ratios against float64 for y, dx, dA, dB, with x saved raw and the dequantized dgrad; and of the cheaper modes."""
    inputs = cast(op.inputs(case), dtype, "cuda")
    dy = torch.randn(case.M, case.N, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(dtype)
    in_float64: Inputs = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    expected = run(op.reference, in_float64, dy.double())
    actual = run(op.apply, inputs, dy, **({} if op.name == "w4a16" else {"save_x": "raw"}))
    row: dict[str, object] = {name: relative_rms(actual[name], expected[name]) for name in expected}
    passed = all(error < TOLERANCE[dtype] for error in row.values())  # type: ignore[operator]
    if op.name != "w4a16":
        row["adapter_down, x saved as codes"] = relative_rms(
            run(op.apply, inputs, dy)["adapter_down"], expected["adapter_down"]
        )
    if op.name == "w4a8":
        row["x, int8 dgrad"] = relative_rms(run(op.apply, inputs, dy, dgrad="int8")["x"], expected["x"])
    return {
        "op": op.name,
        "case": str(case),
        "dtype": str(dtype),
        "bound": TOLERANCE[dtype],
        "passed": passed,
        "errors": row,
    }


def median_ms(step: Callable[[int], object], repeats: int = 24) -> float:
    """Median over `repeats` of step(i), timed by CUDA events, after a warm-up."""
    for i in range(4):
        step(i)
    times = []
    for i in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        step(i)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(statistics.median(times))


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None) -> Tensor:
    """The 16-bit baseline: a frozen linear layer and a LoRA beside it."""
    y = F.linear(x, weight, bias)
    return y if down is None or up is None else y + F.linear(F.linear(x, down), up)


def timings(op: LinearOp, case: LinearCase) -> dict[str, object]:
    """Milliseconds of the forward and of the forward + backward pass, ours and bf16."""
    weights = [cast(op.inputs(case, seed), torch.bfloat16, "cuda") for seed in range(COPIES)]
    shared = {name: value.requires_grad_() for name in WRT if isinstance(value := weights[0][name], Tensor)}
    leaves = list(shared.values())
    dense = [torch.randn(case.N, case.K, device="cuda", dtype=torch.bfloat16) for _ in range(COPIES)]
    dy = torch.randn(case.M, case.N, device="cuda", dtype=torch.bfloat16)
    bias = weights[0]["bias"]

    def ours(i: int, **modes: str) -> Tensor:
        return op.apply(**{**weights[i % COPIES], **shared}, **modes)

    def plain(i: int) -> Tensor:
        return lora_linear(shared["x"], dense[i % COPIES], bias, shared.get("adapter_down"), shared.get("adapter_up"))  # type: ignore[arg-type]

    def both(forward: Callable[[int], Tensor]) -> Callable[[int], object]:
        return lambda i: torch.autograd.grad(forward(i), leaves, dy)

    with torch.no_grad():
        row: dict[str, object] = {
            "forward_ms": median_ms(ours),
            "bf16_forward_ms": median_ms(lambda i: F.linear(shared["x"], dense[i % COPIES], bias)),  # type: ignore[arg-type]
            "bf16_lora_forward_ms": median_ms(plain),
        }
    row["forward_backward_ms"] = median_ms(both(ours))
    row["bf16_lora_forward_backward_ms"] = median_ms(both(plain))
    if op.name == "w4a8":
        row["forward_backward_int8_dgrad_ms"] = median_ms(both(lambda i: ours(i, dgrad="int8")))
    return {"op": op.name, "case": str(case), "dtype": "torch.bfloat16", **row}


def machine(commit: str, out: Path) -> dict[str, str]:
    """What the numbers belong to; the command without the folder that it wrote to."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "command": f"python benchmarks/kernels.py --out {out.name} --commit {commit}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--commit", required=True, help="commit of the code that runs")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(
            "no CUDA device: these figures are about GPU kernels. The CPU path is checked by `pytest tests/kernels`"
        )
    gate, times = [], []
    for op in OPS:
        for case in SHAPES[op.name]:
            for dtype in TOLERANCE if case.M <= 1536 and case.N <= 1536 else (torch.bfloat16,):
                gate.append(errors(op, case, dtype))
                print(json.dumps(gate[-1]), flush=True)
    passed = all(row["passed"] for row in gate)
    if passed:
        for op in OPS:
            for case in SHAPES[op.name]:
                times.append(timings(op, case))
                print(json.dumps(times[-1]), flush=True)
    report = {"machine": machine(arguments.commit, arguments.out), "passed": passed, "gate": gate, "timings": times}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
