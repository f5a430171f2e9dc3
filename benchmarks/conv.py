"""INT4 convolutions beside cuDNN bf16 on one CUDA device: correctness first, then every 3 x 3 layer of SDXL's UNet at 1024 px.

    python benchmarks/conv.py --out benchmarks/results/conv.json --commit $(git rev-parse HEAD) --batches 1
    python benchmarks/conv.py --out /tmp/conv.json --commit HEAD --batches 1 --tune                    tile sizes of this card first

Nothing is timed if an error against float64 of the same quantized operands, or of a gradient against float64 of its
reference, exceeds its bound. Then medians of replayed CUDA graphs, one of each in turn: bf16 (cuDNN, channels last,
benchmark = True, no branch, bias included), ours with everything (activation quantization, branch of rank 32 + 16, bias)
and without a branch; then the parts of ours alone: quantization (absmax is its first kernel) and branch, which run beside
each other, and the product. The first and the last convolution (4 channels) stay in 16 bits. Sums count every shape as often
as the UNet has it.

--tune times the product's tile sizes first, adds the best to kernels/tuned and to the result, and times the layers with them.
--windows has products read a matrix of windows, as on other GPUs.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from int4_engine import ADAPTER, BF16, BOUND, DEVICE, RANK
from timing import compare
from torch import Tensor

from loragraft.kernels import w4a8_conv as conv_op
from loragraft.kernels.block_codes import blocks_of, pixel_absmax, quantize_blocks, windows_of
from loragraft.kernels.hopper_gemm import hopper_gemm, keep_tuned
from loragraft.kernels.layout import pack_words, padded, rank_product, rank_rows, relative_rms
from loragraft.kernels.taps import Window, sum_taps, tap_columns
from loragraft.kernels.w4a8_conv import (
    as_columns,
    as_image,
    as_kernel,
    as_pixels,
    conv_product,
    w4a8_conv,
    w4a8_conv_reference,
)
from loragraft.kernels.w4a8_linear import dequantize_w4a8


@dataclass(frozen=True)
class Conv:
    """`count` convolutions of C channels to N over size x size pixels, 3 x 3 with padding 1."""

    size: int
    C: int
    N: int
    count: int
    stride: int = 1

    @property
    def name(self) -> str:
        """128x128 320 to 640, /2 where the stride is 2."""
        return f"{self.size}x{self.size} {self.C} to {self.N}" + (" /2" if self.stride == 2 else "")

    def window(self, batch: int) -> Window:
        """On a batch of images."""
        return Window(batch, self.size, self.size, 3, self.stride, 1)


SDXL = (
    Conv(128, 320, 320, 7), Conv(128, 640, 320, 2), Conv(128, 960, 320, 1), Conv(128, 640, 640, 1),
    Conv(128, 320, 320, 1, stride=2), Conv(64, 320, 640, 1), Conv(64, 640, 640, 6), Conv(64, 960, 640, 1),
    Conv(64, 1280, 640, 1), Conv(64, 1920, 640, 1), Conv(64, 1280, 1280, 1), Conv(64, 640, 640, 1, stride=2),
    Conv(32, 640, 1280, 1), Conv(32, 1280, 1280, 10), Conv(32, 1920, 1280, 1), Conv(32, 2560, 1280, 2),
)  # fmt: skip
CHECKED = ((2, 24, 128, 320, 320, 1), (1, 32, 32, 640, 1280, 1), (1, 33, 20, 128, 72, 2), (1, 64, 64, 960, 320, 2),
           (3, 16, 48, 64, 64, 1), (1, 38, 26, 1280, 640, 2))  # fmt: skip
"""(B, H, W, C, N, stride): boxes of 64, 32 and 16 columns, and windows that are no boxes."""


def native_conv(C: int, N: int, rank: int) -> dict[str, Any]:
    """Random W4A8 tensors of a 3 x 3 convolution, its branch of `rank`."""
    K, KP = 9 * C, padded(9 * tap_columns(C))
    scale = torch.randint(6, 16, (KP // 64, N), dtype=torch.uint8, device=DEVICE)
    return {
        "qweight": torch.randint(0, 256, (N, KP // 2), dtype=torch.uint8, device=DEVICE),
        "row_scale": torch.rand(N, device=DEVICE) / (60 * K**0.5) + 1e-5,
        "group_words": pack_words(scale, torch.full_like(scale, 8), 64),
        "smooth": (torch.rand(C, device=DEVICE) + 0.5).to(BF16),
        "lora_down": (torch.randn(rank, K, device=DEVICE) / K**0.5).to(BF16),
        "lora_up": torch.randn(N, rank, device=DEVICE).to(BF16),
        "bias": torch.randn(N, device=DEVICE).to(BF16),
    }


def images(batch: int, height: int, width: int, channels: int) -> Tensor:
    """[B, C, H, W] in channels-last layout, distributed as a group norm and SiLU leave it."""
    x = F.silu(torch.randn(batch, channels, height, width, device=DEVICE))
    return x.to(BF16).contiguous(memory_format=torch.channels_last)


def exact(x: Tensor, w: dict[str, Any], stride: int) -> Tensor:
    """y in float64 of the codes and scales that the layer itself made of x."""
    blocks = blocks_of(Window(x.shape[0], x.shape[2], x.shape[3], 3, stride, 1))
    codes, scale = quantize_blocks(as_pixels(x), w["smooth"], False, blocks)
    dense = dequantize_w4a8(w["qweight"], w["row_scale"], w["group_words"], torch.float64)
    y = scale.double() * (windows_of(codes, blocks).double() @ dense.T) + w["bias"].double()
    h = F.conv2d(x.double(), as_kernel(w["lora_down"].double(), 3), None, stride, 1)
    return as_image(y, x.shape[0], *blocks.window.out_size) + F.conv2d(h, w["lora_up"].double()[..., None, None])


def errors() -> dict[str, float]:
    """Worst relative RMS error of the forward pass and of each gradient in bf16."""
    worst = dict.fromkeys(("y", "dx", "dA", "dB"), 0.0)
    for B, H, W, C, N, stride in CHECKED:
        x, w = images(B, H, W, C), native_conv(C, N, RANK)
        window: dict[str, Any] = {"kernel": 3, "stride": stride, "padding": 1}
        down = (torch.randn(ADAPTER, 9 * C, device=DEVICE) / C**0.5 / 3).to(BF16)
        up = torch.randn(N, ADAPTER, device=DEVICE).to(BF16)
        joined = {"lora_down": torch.cat([w["lora_down"], down]), "lora_up": torch.cat([w["lora_up"], up], 1)}
        y = w4a8_conv(x, **w, **window, adapter_down=down, adapter_up=up)
        found = {"y": relative_rms(y, exact(x, w | joined, stride))}
        dy = torch.randn_like(y)
        ours = _gradients(w4a8_conv, x, down, up, dy, **w, **window, save_x="raw")
        wide = {name: value.double() if value.is_floating_point() else value for name, value in w.items()}
        reference = _gradients(
            w4a8_conv_reference, x.double(), down.double(), up.double(), dy.double(), **wide, **window
        )
        found |= {name: relative_rms(a, b) for name, a, b in zip(("dx", "dA", "dB"), ours, reference, strict=True)}
        print(f"{B}x{H}x{W} {C} to {N} /{stride}: "
              + ", ".join(f"{name} {value:.1e}" for name, value in found.items()), flush=True)  # fmt: skip
        worst = {name: max(worst[name], found[name]) for name in worst}
    return worst


def _gradients(
    function: Callable[..., Tensor], x: Tensor, down: Tensor, up: Tensor, dy: Tensor, **arguments: Any
) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in (x, down, up)]
    y = function(leaves[0], **arguments, adapter_down=leaves[1], adapter_up=leaves[2])
    return torch.autograd.grad(y, leaves, dy)


def forward_row(conv: Conv, batch: int) -> dict[str, float]:
    """Microseconds of one shape's forward pass, every way, and of the parts of ours."""
    x, own = images(batch, conv.size, conv.size, conv.C), native_conv(conv.C, conv.N, RANK + ADAPTER)
    bare = {**own, "lora_down": own["lora_down"][:0], "lora_up": own["lora_up"][:, :0]}
    dense = (torch.randn(conv.N, conv.C, 3, 3, device=DEVICE) / (3 * conv.C**0.5)).to(BF16)
    dense = dense.contiguous(memory_format=torch.channels_last)
    window: dict[str, Any] = {"kernel": 3, "stride": conv.stride, "padding": 1}
    x_MC, blocks = as_pixels(x), blocks_of(conv.window(batch))
    down = as_columns(as_kernel(own["lora_down"], 3)).unflatten(1, (9, -1)).transpose(0, 1).flatten(0, 1).contiguous()
    codes, max_M = quantize_blocks(x_MC, own["smooth"], False, blocks), x_MC.new_empty(len(x_MC), dtype=torch.float32)
    h_PR = sum_taps(rank_product(x_MC, down.T), RANK + ADAPTER, blocks.window)
    weight = (own["qweight"], own["row_scale"], own["group_words"], h_PR, own["lora_up"], own["bias"])
    steps: dict[str, Callable[[], object]] = {
        "bf16": lambda: F.conv2d(x, dense, own["bias"], conv.stride, 1),
        "w4a8": lambda: w4a8_conv(x, **own, **window),
        "w4a8_no_branch": lambda: w4a8_conv(x, **bare, **window),
        "part_absmax": lambda: pixel_absmax(x_MC, own["smooth"], False, max_M),
        "part_quantize": lambda: quantize_blocks(x_MC, own["smooth"], False, blocks),
        "part_branch": lambda: sum_taps(rank_product(x_MC, down.T), RANK + ADAPTER, blocks.window),
        "part_product": lambda: conv_product(codes, blocks, *weight),
    }
    with torch.no_grad():
        row = compare(steps)
    torch.cuda.empty_cache()
    flops = 2 * blocks.window.out_pixels * conv.N * 9 * conv.C
    return {**row, "bf16_tflops": flops / row["bf16"] / 1e6, "w4a8_tops": flops / row["w4a8"] / 1e6,
            "product_tops": flops / row["part_product"] / 1e6}  # fmt: skip


def tuned(conv: Conv, batch: int) -> dict[str, Any]:
    """The fastest tile sizes of one shape's product. Raises RuntimeError if one of them gives another result."""
    blocks, R = blocks_of(conv.window(batch)), RANK + ADAPTER
    w, (P, CT) = native_conv(conv.C, conv.N, R), (blocks.window.out_pixels, tap_columns(conv.C))
    codes = torch.randint(-127, 128, (blocks.code_rows, CT), dtype=torch.int8, device=DEVICE)
    scale, h_PR = torch.rand(P, 1, device=DEVICE), rank_rows(torch.empty(P, 1, dtype=BF16, device=DEVICE), R).normal_()

    def product(config: dict[str, int]) -> Tensor:
        weight = (w["qweight"], w["group_words"], w["row_scale"], h_PR, w["lora_up"], w["bias"])
        return hopper_gemm(codes, scale, *weight, config=config, blocks=blocks)

    tiles = ((128, 64),) if P <= 1024 else ((256, 64), (128, 64))
    configs = [{"BM": BM, "WN": WN, "GROUP_M": group} for BM, WN in tiles for group in (2, 8)]
    first, *others = (product(config) for config in configs)
    if worst := max((error for y in others if (error := relative_rms(y, first)) > 1e-3), default=0):
        raise RuntimeError(f"{conv.name}: tile sizes differ in their results by {worst:.1e}")
    times = compare({json.dumps(config): lambda config=config: product(config) for config in configs}, 5, 5)  # type: ignore[misc]
    best = min(times, key=lambda name: times[name])
    shape = {"M": P, "N": conv.N, "K": padded(9 * CT), "packed": True}
    return {**shape, **json.loads(best), "microseconds": round(times[best], 1)}


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Sums over the UNet and the least favourable shape; speeds are bf16's time over ours."""
    total = {key: sum(conv.count * rows[conv.name][key] for conv in SDXL)
             for key in ("bf16", "w4a8", "w4a8_no_branch")}  # fmt: skip
    return {
        "convs_ms_bf16": total["bf16"] / 1e3,
        "convs_ms_w4a8": total["w4a8"] / 1e3,
        "conv_vs_cudnn": total["bf16"] / total["w4a8"],
        "conv_vs_cudnn_no_branch": total["bf16"] / total["w4a8_no_branch"],
        "conv_vs_cudnn_worst_shape": min(rows[conv.name]["bf16"] / rows[conv.name]["w4a8"] for conv in SDXL),
        "branch_cost_pct": 100 * (total["w4a8"] / total["w4a8_no_branch"] - 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--commit", required=True, help="commit of the code that runs")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2], help="images a batch (default: 1 2)")
    parser.add_argument(
        "--tune", action="store_true", help="find tile sizes first and keep them in kernels/tuned (sm_90)"
    )
    parser.add_argument("--windows", action="store_true", help="write the windows out as a matrix, as on other GPUs")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: these figures are about GPU kernels; `pytest tests/kernels` checks the CPU path")
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    if arguments.windows:
        mock.patch.object(conv_op, "hopper_boxes_run", return_value=False).start()
    wrong = errors()
    if not max(wrong.values()) <= BOUND:
        print(f"an error above {BOUND:.0e}; nothing is timed: {wrong}", file=sys.stderr)
        return 1
    best = [tuned(conv, batch) for batch in arguments.batches for conv in SDXL] if arguments.tune else []
    if best:
        print(f"tile sizes in {keep_tuned(torch.device(DEVICE, 0), best)}", flush=True)
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for batch in arguments.batches:
        rows[str(batch)] = {}
        for conv in SDXL:
            row = forward_row(conv, batch)
            rows[str(batch)][conv.name] = {**row, "count": conv.count}
            figures = {name: round(value, 1) for name, value in row.items()}
            print(f"batch {batch}, {conv.name}: {row['bf16'] / row['w4a8']:.2f}", figures, flush=True)
    result = {
        "device": torch.cuda.get_device_properties(0).name,
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda,
                     "cudnn": torch.backends.cudnn.version(), "python": platform.python_version()},
        "commit": arguments.commit,
        "command": f"python benchmarks/conv.py --batches {' '.join(map(str, arguments.batches))} --out {arguments.out.name}"
        + " --tune" * arguments.tune + " --windows" * arguments.windows,
        "max_rel_err": wrong,
        "tuned": best,
        "batches": {batch: summary(of_batch) for batch, of_batch in rows.items()},
        "forward_us": rows,
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["batches"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
