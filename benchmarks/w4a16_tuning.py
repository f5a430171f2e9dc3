"""W4A16 configs for 1 to 16 tokens, timed on one CUDA device: correctness first, then microseconds and bandwidth.

    python benchmarks/w4a16_tuning.py --out tuning.json

Each config must match the float64 reference before it is timed. Times are those of a CUDA graph of 24 calls that rotate among
eight copies of the weights (32 MB each at the default shape), so that none is read from the L2 cache; the median of 20 replays
divided by 24. Bandwidth counts codes, scales and zeros, read once; the copy it is compared with counts bytes read and written.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from loragraft.kernels import w4a16_skinny
from loragraft.kernels.layout import LinearCase, relative_rms
from loragraft.kernels.registry import OPS, Inputs, cast

COPIES, CALLS, REPLAYS, BOUND = 8, 24, 20, 5e-3
W4A16 = next(op for op in OPS if op.name == "w4a16")


def graph_us(call: Callable[[int], object]) -> float:
    """Microseconds a call: the median replay of a CUDA graph of CALLS calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(COPIES):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            call(i % COPIES)
    times = []
    for _ in range(REPLAYS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / CALLS)
    return float(statistics.median(times[3:]))


def copy_bandwidth() -> float:
    """GB/s of a device copy of 1 GiB, bytes read plus bytes written."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / graph_us(lambda _: target.copy_(source)) / 1e3


def rows(case: LinearCase, copy: float) -> list[dict[str, object]]:
    """One row per config at this shape: error, microseconds, GB/s, part of the copy bandwidth."""
    copies = [cast(W4A16.inputs(case, seed), torch.bfloat16, "cuda") for seed in range(COPIES)]
    in_float64: Inputs = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in copies[0].items()
    }
    expected = W4A16.reference(**in_float64)
    size = sum(copies[0][name].nbytes for name in ("qweight", "wscale", "wzero"))  # type: ignore[union-attr]
    x, down, up, bias = (copies[0][name] for name in ("x", "lora_down", "lora_up", "bias"))

    def call(i: int, config: str | None) -> Tensor:
        weights = (copies[i][name] for name in ("qweight", "wscale", "wzero"))
        h_MR = w4a16_skinny.skinny_down(x, down)  # type: ignore[arg-type]
        return w4a16_skinny.skinny_linear(x, *weights, h_MR, up, bias, config)  # type: ignore[arg-type]

    measured = []
    gemv = w4a16_skinny.GEMV_CONFIGS if case.M <= 4 else {}
    for config in (*gemv, *w4a16_skinny.SKINNY_CONFIGS):
        error = relative_rms(call(0, config), expected)
        row: dict[str, object] = {"case": str(case), "config": config, "error": error, "passed": error < BOUND}
        if error < BOUND:
            row["us"] = graph_us(lambda i, name=config: call(i, name))  # type: ignore[misc]
            row["gb_per_s"] = size / float(row["us"]) / 1e3  # type: ignore[arg-type]
            row["of_copy"] = float(row["gb_per_s"]) / copy  # type: ignore[arg-type]
        print(json.dumps(row), flush=True)
        measured.append(row)
    return measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--shape", type=int, nargs=2, default=(18432, 3072), metavar=("N", "K"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 16], help="at most 16 each")
    parser.add_argument("--rank", type=int, default=0, help="rank of the low-rank branch")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(
            "no CUDA device: there is nothing to time. `TRITON_INTERPRET=1 pytest tests/kernels` checks results"
        )
    copy = copy_bandwidth()
    print(json.dumps({"device": torch.cuda.get_device_name(), "copy_gb_per_s": copy}), flush=True)
    N, K = arguments.shape
    table = [row for M in arguments.tokens for row in rows(LinearCase(M, N, K, R=arguments.rank, r=0), copy)]
    if arguments.out:
        report = {"device": torch.cuda.get_device_name(), "copy_gb_per_s": copy, "rows": table}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(row["passed"] for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
