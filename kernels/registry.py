"""The linear ops side by side, with random inputs for each: what tests and benchmarks iterate over.

Inputs are built so that results can be compared across precisions: x lies on its quantization grid, at most 0.3 steps off,
so that no rounding depends on the last bit of a float, and codes of padding columns are garbage, which no op may read.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loragraft.kernels.act_quant import shift_unsigned
from loragraft.kernels.layout import GROUP, LinearCase, apply_hadamard, pack_words, padded
from loragraft.kernels.w4a4_linear import CASES as W4A4_CASES
from loragraft.kernels.w4a4_linear import w4a4_linear, w4a4_reference
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


def _on_grid(case: LinearCase, smooth: Tensor | bool | int | None, bits: int, random: torch.Generator) -> Tensor:
    """x [M, K] whose x' has codes in every row (8 bits) or group (4 bits) up to the largest, none near a tie."""
    K, levels = case.K, 7 if bits == 4 else 127
    width = GROUP if bits == 4 else K
    unsigned_from = case.unsigned_from if case.unsigned else K
    levels_K = torch.full((K,), levels)
    levels_K[unsigned_from:] = 15
    codes = (torch.randn(case.M, K, generator=random) * levels_K / 3).round()
    codes = codes.minimum(levels_K).maximum(-levels_K * (levels_K == levels))
    steps = codes + (torch.rand(case.M, K, generator=random) - 0.5) * 0.6 * (codes.abs() < levels_K)
    steps[:, ::width] = levels_K[::width].to(steps.dtype)
    grid = 2.0 ** torch.randint(-3, 3, (case.M, (K + width - 1) // width), generator=random) / levels_K[::width]
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
