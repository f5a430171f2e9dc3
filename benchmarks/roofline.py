"""Achieved TOP/s against arithmetic intensity of FLUX.1-dev's linear layers, from the committed figures of the INT4 engine.

    python benchmarks/roofline.py --out docs/images/roofline.png

    work       2 M N K operations; a branch's are not counted, its time is
    traffic    what cannot be avoided: x [M, K] and y [M, N] in 16 bits once, the weight once as it is stored
    intensity  work / traffic, operations a byte

The roofs are the data sheet's dense peaks; a card without an entry in `ROOFS` gets the measured copy bandwidth alone.
W4A8 includes quantizing x and the branch of rank 48, FP8 quantizing x; bf16 is the bare product.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

RESULT = Path(__file__).parent / "results" / "int4_engine.json"
ROOFS = {
    "NVIDIA H100 80GB HBM3": {"bandwidth": 3.35e12, "8 bits": 1979e12, "16 bits": 989e12},
    "NVIDIA H200": {"bandwidth": 4.8e12, "8 bits": 1979e12, "16 bits": 989e12},
}
"""Bytes and operations a second, without sparsity (NVIDIA's data sheets)."""
KINDS: dict[str, tuple[str, float, str, str]] = {
    # name in the JSON: label, bytes of a weight (with its scales), colour, marker
    "bf16": ("bf16, no branch", 2.0, "tab:gray", "s"),
    "fp8": ("FP8, x quantized, no branch", 1.0, "tab:orange", "^"),
    "w4a8": ("W4A8, x quantized, branch 48", 0.5 + 2 / 64, "tab:blue", "o"),
}


def points(result: dict[str, Any], kind: str) -> list[tuple[str, float, float]]:
    """(layer, operations a byte, operations a second) of FLUX.1-dev's layers."""
    found = []
    for name, row in result["forward_us"].items():
        if name.startswith(("SDXL", "SANA")):
            continue
        M, N, K = row["M"], row["N"], row["K"]
        work, traffic = 2 * M * N * K, 2 * M * (N + K) + KINDS[kind][1] * N * K
        found.append((name, work / traffic, work / row[kind] * 1e6))
    return found


def draw(result: dict[str, Any], out: Path) -> None:
    """One PNG."""
    figure, axes = plt.subplots(figsize=(8, 5), dpi=150)
    roofs = ROOFS.get(result["device"], {})
    bandwidth = roofs.get("bandwidth", result["w4a16"]["copy_tb_per_s"] * 1e12)
    intensity = [3, 1e4]
    tops = {name: value for name, value in roofs.items() if name != "bandwidth"}
    _line(axes, intensity, lambda i: min(i * bandwidth, max(tops.values(), default=float("inf"))))
    axes.annotate(f"memory, {bandwidth / 1e12:.2f} TB/s", (12, 14 * bandwidth / 1e12), rotation=38, fontsize=8)
    for name, top in tops.items():
        _line(axes, [top / bandwidth, 1e4], lambda _, top=top: top)  # type: ignore[misc]
        axes.annotate(f"{name}: {top / 1e12:.0f}", (9e3, top / 1e12 * 1.06), fontsize=8, ha="right")
    for kind, (label, _, colour, marker) in KINDS.items():
        found = points(result, kind)
        axes.plot(
            [i for _, i, _ in found],
            [rate / 1e12 for _, _, rate in found],
            marker,
            color=colour,
            label=label,
            alpha=0.8,
        )
    gemv = result["w4a16"]
    N, K = 18432, 3072
    axes.plot(
        2 * N * K / ((0.5 + 4 / 64) * N * K + 2 * (N + K)),
        2 * N * K / gemv["microseconds"] / 1e6,
        "D",
        color="tab:green",
        label=f"W4A16, one token, {N} x {K}",
    )
    axes.set(xscale="log", yscale="log", xlim=intensity, ylim=(4, 3e3))
    axes.set_xlabel("operations a byte of unavoidable traffic")
    axes.set_ylabel("TOP/s")
    axes.set_title(f"Linear layers of FLUX.1-dev at 1024 px, {result['device']}", fontsize=10)
    axes.grid(which="major", alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(out)
    plt.close(figure)


def _line(axes: Any, ends: list[float], height: Callable[[float], float]) -> None:
    steps = [ends[0] * (ends[1] / ends[0]) ** (i / 200) for i in range(201)]
    axes.plot(steps, [height(step) / 1e12 for step in steps], color="black", linewidth=0.8)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=RESULT, help="JSON of benchmarks/int4_engine.py")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    arguments = parser.parse_args()
    draw(json.loads(arguments.result.read_text(encoding="utf-8")), arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
