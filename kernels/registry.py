"""The linear ops side by side and the convolution, with random inputs for each: what tests and benchmarks iterate over.

Inputs are built so that results can be compared across precisions: x lies on its quantization grid, at most 0.3 steps off,
so that no rounding depends on the last bit of a float, and codes of padding columns are garbage, which no op may read.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loragraft.kernels.act_quant import shift_unsigned
from loragraft.kernels.layout import GROUP, LinearCase, apply_hadamard, pack_words, padded
from loragraft.kernels.taps import Window, tap_columns
from loragraft.kernels.w4a4_linear import CASES as W4A4_CASES
from loragraft.kernels.w4a4_linear import w4a4_linear, w4a4_reference
from loragraft.kernels.w4a8_conv import as_image
from loragraft.kernels.w4a8_linear import CASES as W4A8_CASES
from loragraft.kernels.w4a8_linear import w4a8_linear, w4a8_reference
from loragraft.kernels.w4a16_linear import CASES as W4A16_CASES
from loragraft.kernels.w4a16_linear import w4a16_linear, w4a16_reference

Inputs = dict[str, Tensor | bool | int | None]
SIXTEEN_BIT = ("x", "smooth", "lora_down", "lora_up", "bias", "adapter_down", "adapter_up")  # what `cast` casts


@dataclass(frozen=True)
class LinearOp:
    """One op: the public function, its reference, its odd shapes, and a maker of its weights' tensors (float32)."""

    name: str
    apply: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    cases: tuple[LinearCase, ...]
    weights: Callable[[LinearCase, torch.Generator], Inputs]
    activation_bits: int

    def inputs(self, case: LinearCase, seed: int = 0) -> Inputs:
        """Keyword arguments of `apply` and `reference`, float32 on the CPU, reproducible from the seed."""
        random = torch.Generator().manual_seed(seed)
        N, K, R, r = case.N, case.K, case.R, case.r
        inputs = self.weights(case, random)
        inputs["x"] = _on_grid(case, inputs.get("smooth"), self.activation_bits, random)
        inputs["lora_down"] = torch.randn(R, K, generator=random) / K**0.5
        inputs["lora_up"] = torch.randn(N, R, generator=random) / max(R, 1) ** 0.5
        inputs["bias"] = torch.randn(N, generator=random) if case.bias else None
        inputs["adapter_down"] = torch.randn(r, K, generator=random) / K**0.5 if r else None
        inputs["adapter_up"] = torch.randn(N, r, generator=random) / r**0.5 if r else None
        return inputs


def cast(inputs: Inputs, dtype: torch.dtype, device: torch.device | str) -> Inputs:
    """16-bit tensors to `dtype`, scales and codes as they are, all to `device`."""
    moved: Inputs = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value = value.to(device, dtype if name in SIXTEEN_BIT else value.dtype)
        moved[name] = value
    return moved


def _on_grid(
    case: LinearCase, smooth: Tensor | bool | int | None, bits: int, random: torch.Generator, same: bool = False
) -> Tensor:
    """x [M, K] whose x' has codes in every row (8 bits) or group (4 bits) up to the largest, none near a tie.

    same: one grid for all rows, so that any set of them has the same scale."""
    K, levels = case.K, 7 if bits == 4 else 127
    width = GROUP if bits == 4 else K
    unsigned_from = case.unsigned_from if case.unsigned else K
    levels_K = torch.full((K,), levels)
    levels_K[unsigned_from:] = 15
    codes = (torch.randn(case.M, K, generator=random) * levels_K / 3).round()
    codes = codes.minimum(levels_K).maximum(-levels_K * (levels_K == levels))
    steps = codes + (torch.rand(case.M, K, generator=random) - 0.5) * 0.6 * (codes.abs() < levels_K)
    steps[:, ::width] = levels_K[::width].to(steps.dtype)
    grid = (
        2.0 ** torch.randint(-3, 3, (1 if same else case.M, (K + width - 1) // width), generator=random)
        / levels_K[::width]
    )
    x = steps * grid.to(torch.bfloat16).float().repeat_interleave(width, dim=1)[:, :K]
    x = apply_hadamard(x) if case.hadamard else x
    x = x * smooth if isinstance(smooth, Tensor) else x
    return 2 * x - shift_unsigned(x, unsigned_from) if case.unsigned else x


def _smooth(case: LinearCase, random: torch.Generator) -> Tensor:
    return torch.rand(case.K, generator=random) + 0.5


def _packed(case: LinearCase, random: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (case.N, padded(case.K) // 2), dtype=torch.uint8, generator=random)


def _w4a8_weights(case: LinearCase, random: torch.Generator) -> Inputs:
    shape = (padded(case.K) // case.group, case.N)
    group_scale = torch.randint(1, 9, shape, dtype=torch.uint8, generator=random)
    group_zero = torch.randint(0, 16, shape, dtype=torch.uint8, generator=random)
    group_scale[:, 0], group_zero[:, 0] = 16, 8  # the ends of INT8: (u - 8) * 16 is -128 .. 112
    row_scale = (torch.rand(case.N, generator=random) + 0.5) / (40 * case.K**0.5)
    return {
        "qweight": _packed(case, random), "row_scale": row_scale,
        "group_words": pack_words(group_scale, group_zero, case.group), "smooth": _smooth(case, random), "hadamard": case.hadamard,
    }  # fmt: skip


def _wscale(case: LinearCase, random: torch.Generator) -> Tensor:
    scale = (torch.rand(padded(case.K) // GROUP, case.N, generator=random) + 0.5) / (5 * case.K**0.5)
    return scale.to(torch.bfloat16)


def _w4a4_weights(case: LinearCase, random: torch.Generator) -> Inputs:
    wscale = _wscale(case, random)
    return {
        "qweight": _packed(case, random),
        "wscale": wscale,
        "smooth": _smooth(case, random),
        "hadamard": case.hadamard,
        "unsigned": case.unsigned,
        "unsigned_from": case.unsigned_from,
    }


def _w4a16_weights(case: LinearCase, random: torch.Generator) -> Inputs:
    wscale = _wscale(case, random)
    return {"qweight": _packed(case, random), "wscale": wscale, "wzero": (-7.5 * wscale).to(torch.bfloat16)}


OPS = (
    LinearOp("w4a8", w4a8_linear, w4a8_reference, W4A8_CASES, _w4a8_weights, activation_bits=8),
    LinearOp("w4a4", w4a4_linear, w4a4_reference, W4A4_CASES, _w4a4_weights, activation_bits=4),
    LinearOp("w4a16", w4a16_linear, w4a16_reference, W4A16_CASES, _w4a16_weights, activation_bits=8),
)


@dataclass(frozen=True)
class ConvCase:
    """One convolution of images [B, C, H, W] to N channels, branch rank R, adapter rank r."""

    B: int
    C: int
    H: int
    W: int
    N: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    R: int = 8
    r: int = 4
    hadamard: bool = False
    bias: bool = True
    group: int = GROUP

    def __str__(self) -> str:
        flags = ("-bias" if self.bias else "") + ("-hadamard" if self.hadamard else "")
        window = f"k{self.kernel}s{self.stride}p{self.padding}"
        return f"{self.B}x{self.H}x{self.W}x{self.C}x{self.N}-{window}-R{self.R}-r{self.r}-g{self.group}{flags}"

    @property
    def options(self) -> dict[str, int | bool]:
        """Arguments of `w4a8_conv` that are no tensors."""
        window = {"kernel": self.kernel, "stride": self.stride, "padding": self.padding}
        return {**window, "hadamard": self.hadamard}

    def inputs(self, seed: int = 0) -> Inputs:
        """The tensors, float32 on the CPU, x on one quantization grid; reproducible from the seed."""
        random = torch.Generator().manual_seed(seed)
        window, N, R, r = Window(self.B, self.H, self.W, self.kernel, self.stride, self.padding), self.N, self.R, self.r
        K, KP = window.taps * self.C, padded(window.taps * tap_columns(self.C))
        weights = _w4a8_weights(LinearCase(window.pixels, N, KP, hadamard=self.hadamard, group=self.group), random)
        del weights["hadamard"]
        pixels = LinearCase(window.pixels, N, self.C, hadamard=self.hadamard)
        smooth = _smooth(pixels, random)
        x = _on_grid(pixels, smooth, 8, random, same=True)
        return weights | {
            "x": as_image(x, self.B, self.H, self.W),
            "smooth": smooth,
            "lora_down": torch.randn(R, K, generator=random) / K**0.5,
            "lora_up": torch.randn(N, R, generator=random) / max(R, 1) ** 0.5,
            "bias": torch.randn(N, generator=random) if self.bias else None,
            "adapter_down": torch.randn(r, K, generator=random) / K**0.5 if r else None,
            "adapter_up": torch.randn(N, r, generator=random) / r**0.5 if r else None,
        }


CONV_CASES = (
    ConvCase(2, 64, 5, 6, 40, hadamard=True),
    ConvCase(1, 128, 4, 3, 72, group=128, bias=False),
    ConvCase(1, 48, 7, 5, 24, stride=2, R=0, r=3),
    ConvCase(1, 64, 8, 6, 130, stride=2, r=0),
    ConvCase(1, 100, 3, 4, 16, kernel=1, padding=0, R=5),
    ConvCase(1, 64, 6, 7, 16, kernel=2, padding=0, stride=2, R=3, r=20),
    ConvCase(1, 192, 1, 1, 8, R=0, r=0),
    ConvCase(1, 64, 9, 32, 72),
    ConvCase(2, 64, 4, 32, 24, stride=2, bias=False),
)
