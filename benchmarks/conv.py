"""INT4 convolutions beside cuDNN bf16 on one CUDA device: correctness first, then every 3 x 3 layer of SDXL's UNet at 1024 px.

    python benchmarks/conv.py --out benchmarks/results/conv.json --commit $(git rev-parse HEAD)
    python benchmarks/conv.py --out /tmp/conv.json --commit HEAD --tune kernels/tuned        tile sizes of this card, kept

Nothing is timed if an error against float64 of the same quantized operands, or of a gradient against float64 of its
reference, exceeds its bound. Then medians of replayed CUDA graphs, one of each in turn: bf16 (cuDNN, channels last,
benchmark = True, no branch, bias included) and ours with everything (activation quantization, branch of rank 32 + 16, bias)
for each kernel and tile size that runs (`conv_gemm.CONFIGS`), and without a branch; then the parts of ours alone. `best` is the fastest
configuration of each shape, `w4a8` what the layer takes by itself. The first and the last convolution (4 channels) stay in 16 bits.
Sums count every shape as often as the UNet has it.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from timing import compare
from torch import Tensor

from loragraft.kernels.conv_gemm import CONFIGS
from loragraft.kernels.hopper_gemm import card_name
from loragraft.kernels.layout import pack_words, padded, rank_product, relative_rms
from loragraft.kernels.taps import Window, sum_taps, tap_columns
from loragraft.kernels.token_quant import quantize_down
from loragraft.kernels.unpack import plain_int8
from loragraft.kernels.w4a8_conv import (
    as_columns,
    as_image,
    as_kernel,
    as_pixels,
    dequantize_conv,
    w4a8_conv,
    w4a8_conv_reference,
)

DEVICE, BF16 = "cuda", torch.bfloat16
RANK, ADAPTER = 32, 16
BOUND = 5e-3


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
CHECKED = ((2, 17, 24, 320, 320, 1), (1, 32, 32, 640, 1280, 1), (1, 33, 20, 128, 72, 2), (1, 40, 40, 960, 320, 1),
           (3, 16, 16, 64, 64, 1), (1, 38, 26, 1280, 640, 2))  # fmt: skip
"""(B, H, W, C, N, stride)."""


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
    view = Window(x.shape[0], x.shape[2], x.shape[3], 3, stride, 1)
    codes, scale, _ = quantize_down(as_pixels(x), w["smooth"], False, w["lora_down"][:0, : x.shape[1]])
    rounded = as_image((codes.double() * scale.double())[:, : x.shape[1]].contiguous(), *view[:3])
    dense = dequantize_conv(w["qweight"], w["row_scale"], w["group_words"], x.shape[1], 9, torch.float64)
    y = F.conv2d(rounded, as_kernel(dense, 3), w["bias"].double(), stride, 1)
    h = F.conv2d(x.double(), as_kernel(w["lora_down"].double(), 3), None, stride, 1)
    return y + F.conv2d(h, w["lora_up"].double()[..., None, None])


def errors(config: str | None) -> dict[str, float]:
    """Worst relative RMS error of the forward pass and of each gradient in bf16."""
    worst = dict.fromkeys(("y", "dx", "dA", "dB"), 0.0)
    for B, H, W, C, N, stride in CHECKED:
        x, w = images(B, H, W, C), native_conv(C, N, RANK)
        window: dict[str, Any] = {"kernel": 3, "stride": stride, "padding": 1}
        y = w4a8_conv(x, **w, **window, config=config)
        found = {"y": relative_rms(y, exact(x, w, stride))}
        down = (torch.randn(ADAPTER, 9 * C, device=DEVICE) / C**0.5 / 3).to(BF16)
        up = torch.randn(N, ADAPTER, device=DEVICE).to(BF16)
        dy = torch.randn_like(y)
        ours = _gradients(w4a8_conv, x, down, up, dy, **w, **window, config=config, save_x="raw")
        wide = {name: value.double() if value.is_floating_point() else value for name, value in w.items()}
        reference = _gradients(
            w4a8_conv_reference, x.double(), down.double(), up.double(), dy.double(), **wide, **window
        )
        found |= {name: relative_rms(a, b) for name, a, b in zip(("dx", "dA", "dB"), ours, reference, strict=True)}
        print(f"{config or 'default'} {B}x{H}x{W} {C} to {N} /{stride}: "
              + ", ".join(f"{name} {value:.1e}" for name, value in found.items()), flush=True)  # fmt: skip
        worst = {name: max(worst[name], found[name]) for name in worst}
    return worst


def _gradients(
    function: Callable[..., Tensor], x: Tensor, down: Tensor, up: Tensor, dy: Tensor, **arguments: Any
) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in (x, down, up)]
    y = function(leaves[0], **arguments, adapter_down=leaves[1], adapter_up=leaves[2])
    return torch.autograd.grad(y, leaves, dy)


def forward_row(conv: Conv, batch: int, configs: list[str]) -> dict[str, float]:
    """Microseconds of one shape's forward pass, every way, and of the parts of ours."""
    x, own = images(batch, conv.size, conv.size, conv.C), native_conv(conv.C, conv.N, RANK + ADAPTER)
    bare = {**own, "lora_down": own["lora_down"][:0], "lora_up": own["lora_up"][:, :0]}
    dense = (torch.randn(conv.N, conv.C, 3, 3, device=DEVICE) / (3 * conv.C**0.5)).to(BF16)
    dense = dense.contiguous(memory_format=torch.channels_last)
    window: dict[str, Any] = {"kernel": 3, "stride": conv.stride, "padding": 1}
    x_MC = as_pixels(x)
    down = as_columns(as_kernel(own["lora_down"], 3)).unflatten(1, (9, -1)).transpose(0, 1).flatten(0, 1).contiguous()
    steps: dict[str, Callable[[], object]] = {
        "bf16": lambda: F.conv2d(x, dense, own["bias"], conv.stride, 1),
        "w4a8": lambda: w4a8_conv(x, **own, **window),
        "w4a8_no_branch": lambda: w4a8_conv(x, **bare, **window),
        **{f"w4a8_{name}": (lambda name=name: w4a8_conv(x, **own, **window, config=name)) for name in configs},  # type: ignore[misc]
        "part_quantize": lambda: quantize_down(x_MC, own["smooth"], False, x_MC[:0]),
        "part_unpack": lambda: plain_int8(own["qweight"], own["group_words"]),
        "part_branch": lambda: sum_taps(rank_product(x_MC, down.T), RANK + ADAPTER, conv.window(batch)),
    }
    with torch.no_grad():
        row = compare(steps)
    torch.cuda.empty_cache()
    flops = 2 * conv.window(batch).out_pixels * conv.N * 9 * conv.C
    best = min(configs, key=lambda name: row[f"w4a8_{name}"])
    return {**row, "best": row[f"w4a8_{best}"], "best_config": best, "bf16_tflops": flops / row["bf16"] / 1e6,
            "w4a8_tops": flops / row["w4a8"] / 1e6}  # type: ignore[dict-item]  # fmt: skip


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Sums over the UNet and the least favourable shape; speeds are bf16's time over ours."""
    total = {key: sum(conv.count * rows[conv.name][key] for conv in SDXL)
             for key in ("bf16", "w4a8", "w4a8_no_branch", "best")}  # fmt: skip
    return {
        "convs_ms_bf16": total["bf16"] / 1e3,
        "convs_ms_w4a8": total["w4a8"] / 1e3,
        "conv_vs_cudnn": total["bf16"] / total["w4a8"],
        "conv_vs_cudnn_best": total["bf16"] / total["best"],
        "conv_vs_cudnn_no_branch": total["bf16"] / total["w4a8_no_branch"],
        "conv_vs_cudnn_worst_shape": min(rows[conv.name]["bf16"] / rows[conv.name]["w4a8"] for conv in SDXL),
        "branch_cost_pct": 100 * (total["w4a8"] / total["w4a8_no_branch"] - 1),
    }


def keep_tuned(folder: Path, rows: dict[str, dict[str, dict[str, Any]]]) -> Path:
    """Writes the best configuration of every shape into kernels/tuned/CARD.json, beside what others keep there."""
    file = folder / f"{card_name(torch.device(DEVICE, 0))}.json"
    known = json.loads(file.read_text()) if file.is_file() else {"torch": torch.__version__}
    known["conv"] = [
        {"P": conv.window(int(batch)).out_pixels, "N": conv.N, "Ct": tap_columns(conv.C), "stride": conv.stride,
         "config": of_batch[conv.name]["best_config"], "microseconds": round(of_batch[conv.name]["best"], 1)}
        for batch, of_batch in rows.items() for conv in SDXL
    ]  # fmt: skip
    file.write_text(json.dumps(known, indent=1) + "\n")
    return file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--commit", required=True, help="commit of the code that runs")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2], help="images a batch (default: 1 2)")
    parser.add_argument(
        "--configs",
        nargs="+",
        choices=CONFIGS,
        help="kernels and tile sizes to time (default: all)",
    )
    parser.add_argument("--tune", type=Path, help="folder of CARD.json to write the best tile sizes to")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: these figures are about GPU kernels; `pytest tests/kernels` checks the CPU path")
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    configs = arguments.configs or list(CONFIGS)
    wrong = {name: errors(name) for name in configs}
    worst = max(value for of_config in wrong.values() for value in of_config.values())
    if not worst <= BOUND:
        print(f"largest error {worst:.1e}, bound {BOUND:.0e}; nothing is timed: {wrong}", file=sys.stderr)
        return 1
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for batch in arguments.batches:
        rows[str(batch)] = {}
        for conv in SDXL:
            row = forward_row(conv, batch, configs)
            rows[str(batch)][conv.name] = {**row, "count": conv.count}
            figures = {name: round(value, 1) if isinstance(value, float) else value for name, value in row.items()}
            print(f"batch {batch}, {conv.name}: {row['bf16'] / row['w4a8']:.2f}", figures, flush=True)
    if arguments.tune:
        print(f"tile sizes written to {keep_tuned(arguments.tune, rows)}; run again to time them as defaults")
    result = {
        "device": torch.cuda.get_device_properties(0).name,
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda,
                     "cudnn": torch.backends.cudnn.version(), "python": platform.python_version()},
        "commit": arguments.commit,
        "command": f"python benchmarks/conv.py --batches {' '.join(map(str, arguments.batches))} --out {arguments.out.name}",
        "max_rel_err": wrong,
        "batches": {batch: summary(of_batch) for batch, of_batch in rows.items()},
        "forward_us": rows,
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["batches"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
