"""Small, ragged calls of every op of kernels/, each compared with its float64 reference: what `sanitizer.py` runs.

A case yields checks: a label, and a call that runs an op on a device and gives each result's relative error and its bound.
References are computed on the CPU, so that a GPU runs the ops alone. Bounds are wide: tests/kernels measures precision; here a
wrong result shows that a kernel did not do its work.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from loragraft.kernels import adamw8bit
from loragraft.kernels.act_quant import (
    dequantize_activation,
    quantize_activation,
    quantize_reference,
    smooth_and_rotate,
)
from loragraft.kernels.join_factors import Plan
from loragraft.kernels.layout import LinearCase, relative_rms
from loragraft.kernels.registry import OPS, ConvCase, Inputs, cast
from loragraft.kernels.w4a8_conv import w4a8_conv, w4a8_conv_reference
from loragraft.kernels.w4a8_group import w4a8_group
from loragraft.kernels.w4a8_linear import w4a8_reference

Errors = dict[str, tuple[float, float]]
"""Result -> (relative error, bound)."""
Checks = Iterator[tuple[str, Callable[[], Errors]]]
Case = Callable[[str, torch.dtype], Checks]
BOUND = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 1e-2}
QUANTIZED = 3e-2
"""Bound of a gradient that is computed from INT8 codes of x or dy, which the reference does not round."""
GROUP_ARGUMENTS = ("qweight", "row_scale", "group_words", "lora_down", "lora_up", "bias")


class Linear(NamedTuple):
    """A shape, and whether x is divided by a `smooth` (the W4A16 op has none)."""

    case: LinearCase
    smooth: bool = True


W4A8_BARE = (
    Linear(LinearCase(1, 72, 128, R=0, r=0, bias=False), smooth=False),
    Linear(LinearCase(130, 136, 104, R=0, r=8, bias=False)),
)
W4A8_BRANCH = (
    Linear(LinearCase(77, 72, 320, R=48, r=16, hadamard=True)),
    Linear(LinearCase(130, 200, 320, R=48, r=0), smooth=False),
)
"""N leaves a part of a tile of 128 outputs, K a part of a group."""
W4A8_LARGE = (
    Linear(LinearCase(1100, 72, 1280, R=16, r=8)),
    Linear(LinearCase(77, 40, 4224, R=48, r=8, group=128), smooth=False),
    Linear(LinearCase(1100, 40, 4224, R=0, r=0, hadamard=True)),
)
"""More than 1024 tokens and more than 4096 inputs have tiles of their own."""
W4A8_FP16 = (Linear(LinearCase(1, 40, 192, R=48, r=0)), Linear(LinearCase(77, 200, 104, R=16, r=8)))
W4A8_PORTABLE = (
    Linear(LinearCase(1, 40, 128, R=0, r=0, bias=False), smooth=False),
    Linear(LinearCase(77, 72, 320, R=48, r=16, hadamard=True)),
    Linear(LinearCase(130, 130, 100, R=5, r=20)),
    Linear(LinearCase(77, 40, 1280, R=48, r=0, group=128), smooth=False),
)
W4A4 = (
    Linear(LinearCase(1, 40, 128, R=0, r=0, bias=False), smooth=False),
    Linear(LinearCase(77, 72, 320, R=48, r=8)),
    Linear(LinearCase(130, 130, 100, R=5, r=20)),
    Linear(LinearCase(77, 136, 192, R=16, r=3, hadamard=True), smooth=False),
)
W4A4_UNSIGNED = (
    Linear(LinearCase(77, 72, 320, R=48, r=8, unsigned=True)),
    Linear(LinearCase(130, 40, 100, R=0, r=0, unsigned=True)),
    Linear(LinearCase(1, 40, 320, R=16, r=4, unsigned=True, unsigned_from=128)),
)
W4A16_FEW = (
    Linear(LinearCase(1, 130, 1280, R=0, r=0)),
    Linear(LinearCase(1, 37, 104, R=48, r=8, bias=False)),
    Linear(LinearCase(2, 72, 192, R=0, r=20)),
    Linear(LinearCase(16, 33, 320, R=48, r=0)),
)
W4A16_MANY = (
    Linear(LinearCase(1, 40, 100, R=5, r=4)),
    Linear(LinearCase(77, 72, 320, R=48, r=8)),
    Linear(LinearCase(130, 130, 100, R=0, r=0, bias=False)),
)
CONVOLUTIONS = (
    ConvCase(2, 64, 5, 6, 40, hadamard=True),
    ConvCase(1, 48, 7, 5, 24, stride=2, R=0, r=3),
    ConvCase(1, 100, 3, 4, 16, kernel=1, padding=0, R=5),
    ConvCase(1, 64, 5, 7, 130, R=48, r=0, bias=False),
)
CONVOLUTIONS_IN_BOXES = (
    ConvCase(1, 64, 9, 32, 72, R=48, r=8),
    ConvCase(2, 72, 4, 32, 24, stride=2, bias=False, R=0, r=0),
)
"""Rows of 16 outputs and more, which the Hopper product reads out of the codes of the image."""
MODES: dict[str, tuple[dict[str, str], ...]] = {
    "w4a8": ({"save_x": "raw", "dgrad": "dequantized"}, {"save_x": "quantized", "dgrad": "int8"}),
    "w4a4": ({"save_x": "raw"}, {"save_x": "quantized"}),
    "w4a16": ({},),
}


def results(apply: Callable[..., Tensor], inputs: Inputs, dy: Tensor, **modes: Any) -> dict[str, Tensor]:
    """y, and the gradients of x and of the adapter if there is one, on the CPU."""
    leaves = {name: t for name in ("x", "adapter_down", "adapter_up") if isinstance(t := inputs[name], Tensor)}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    y = apply(**{**inputs, **leaves}, **modes)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y))
    return {"y": y.detach().cpu()} | {name: g.cpu() for name, g in zip(leaves, gradients, strict=True)}


def widened(inputs: Inputs) -> Inputs:
    return {
        name: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for name, v in cast(inputs, torch.float64, "cpu").items()
    }


def errors(actual: dict[str, Tensor], expected: dict[str, Tensor], modes: dict[str, str], dtype: torch.dtype) -> Errors:
    """Of every result; some modes round what the reference does not."""
    coarse = {"adapter_down": modes.get("save_x") == "quantized", "x": modes.get("dgrad") == "int8"}
    return {
        name: (relative_rms(actual[name], value), QUANTIZED if coarse.get(name) else BOUND[dtype])
        for name, value in expected.items()
    }


def linears(name: str, cases: tuple[Linear, ...], device: str, dtype: torch.dtype) -> Checks:
    """Forward and backward of one linear op, in each of its modes."""
    for linear in cases:
        for modes in MODES[name]:
            label = " ".join([name, str(linear.case), *([] if linear.smooth else ["not smoothed"]), *modes.values()])
            yield label, partial(linear_errors, name, linear, modes, device, dtype)


def linear_errors(name: str, linear: Linear, modes: dict[str, str], device: str, dtype: torch.dtype) -> Errors:
    op, case = next(op for op in OPS if op.name == name), linear.case
    inputs = op.inputs(case)
    if not linear.smooth:
        assert isinstance(inputs["x"], Tensor) and isinstance(inputs["smooth"], Tensor)
        inputs |= {"x": inputs["x"] / inputs["smooth"], "smooth": None}
    inputs = cast(inputs, dtype, "cpu")
    dy = torch.randn(case.M, case.N, generator=torch.Generator().manual_seed(1)).to(dtype)
    actual = results(op.apply, cast(inputs, dtype, device), dy.to(device), **modes)
    return errors(actual, results(op.reference, widened(inputs), dy), modes, dtype)


def convolutions(cases: tuple[ConvCase, ...], device: str, dtype: torch.dtype) -> Checks:
    for case in cases:
        for save_x in ("raw", "quantized"):
            yield f"conv {case} {save_x}", partial(conv_errors, case, {"save_x": save_x}, device, dtype)


def conv_errors(case: ConvCase, modes: dict[str, str], device: str, dtype: torch.dtype) -> Errors:
    inputs = cast(case.inputs(), dtype, "cpu")
    wide: dict[str, Any] = widened(inputs)
    shape = w4a8_conv_reference(**wide, **case.options).shape  # type: ignore[arg-type]
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    actual = results(w4a8_conv, cast(inputs, dtype, device), dy.to(device), **case.options, **modes)
    return errors(actual, results(w4a8_conv_reference, wide, dy, **case.options), modes, dtype)


def groups(device: str, dtype: torch.dtype) -> Checks:
    for M, hadamard in ((1, False), (77, True)):
        yield f"group of {M} tokens", partial(group_errors, M, hadamard, device, dtype)


def group_errors(M: int, hadamard: bool, device: str, dtype: torch.dtype) -> Errors:
    """Three layers of unequal width and rank on one x."""
    shapes = ((40, 8), (136, 24), (64, 0))
    made = [OPS[0].inputs(LinearCase(M, N, 320, R=R, r=0), seed) for seed, (N, R) in enumerate(shapes)]
    layers = [cast({name: layer[name] for name in GROUP_ARGUMENTS}, dtype, "cpu") for layer in made]
    x = torch.randn(M, 320, generator=torch.Generator().manual_seed(2)).to(dtype)
    columns: list[list[Any]] = [[cast(layer, dtype, device)[name] for layer in layers] for name in GROUP_ARGUMENTS]
    ys, found = w4a8_group(x.to(device), *columns, hadamard=hadamard), {}
    for i, layer in enumerate(layers):
        wide: dict[str, Any] = widened(layer)
        expected = w4a8_reference(x.double(), smooth=None, hadamard=hadamard, **wide)
        found[f"layer {i}"] = relative_rms(ys[i].cpu(), expected), QUANTIZED
    return found


def quantizers(device: str, dtype: torch.dtype) -> Checks:
    for M, K in ((1, 64), (77, 1280), (130, 104), (77, 100)):
        for bits, smoothed, hadamard in ((8, False, K % 64 == 0), (8, True, False), (4, True, K % 64 == 0)):
            label = f"quantizer {M}x{K}, {bits} bits{', smoothed' * smoothed}{', rotated' * hadamard}"
            yield label, partial(quantizer_errors, M, K, bits, smoothed, hadamard, device, dtype)


def quantizer_errors(
    M: int, K: int, bits: int, smoothed: bool, hadamard: bool, device: str, dtype: torch.dtype
) -> Errors:
    """Of codes times scales. A tie may fall the other way than in float64."""
    generator = torch.Generator().manual_seed(K)
    x, smooth = torch.randn(M, K, generator=generator).to(dtype), torch.rand(K, generator=generator).to(dtype) + 0.5
    codes, scale = quantize_activation(x.to(device), smooth.to(device) if smoothed else None, hadamard, bits)
    rotated = smooth_and_rotate(x.double(), smooth.double() if smoothed else None, hadamard)
    exact = dequantize_activation(*quantize_reference(rotated, bits), torch.float64)
    found = dequantize_activation(codes.cpu(), scale.cpu().double(), torch.float64)
    return {"codes times scales": (relative_rms(found, exact), 1e-2 if bits == 8 else 5e-2)}


def joins(device: str, dtype: torch.dtype) -> Checks:
    for rank, layers in ((8, ((4, 104, 40), (4, 64, 130))), (0, ((5, 1500, 3),))):
        yield f"join beside rank {rank}", partial(join_errors, rank, layers, device, dtype)


def join_errors(rank: int, layers: tuple[tuple[int, int, int], ...], device: str, dtype: torch.dtype) -> Errors:
    """A [r, K] and B [N, r] of layers (r, K, N), below and beside factors of `rank` that stay 0."""
    random, joined, factors, wanted = torch.Generator().manual_seed(0), [], [], []
    for r, K, N in layers:
        for shape, scale, at in (((r, K), 1.0, (rank, 0)), ((N, r), 0.5, (0, rank))):
            factors.append(torch.randn(shape, generator=random))
            joined.append(torch.zeros(shape[0] + at[0], shape[1] + at[1], dtype=dtype, device=device))
            wanted.append(F.pad(scale * factors[-1].double(), (at[1], 0, at[0], 0)))
    places = [whole[-f.shape[0] :, -f.shape[1] :] for whole, f in zip(joined, factors, strict=True)]
    Plan(places, [factor.to(device) for factor in factors], [1.0, 0.5] * len(layers)).run()
    pairs = enumerate(zip(joined, wanted, strict=True))
    return {f"matrix {i}": (relative_rms(whole.cpu(), expected), 4e-3) for i, (whole, expected) in pairs}


def optimizers(device: str, dtype: torch.dtype) -> Checks:
    for sizes in adamw8bit.CASES:
        yield f"adamw8bit {sizes}", partial(optimizer_errors, sizes, device)


def optimizer_errors(sizes: tuple[int, ...], device: str) -> Errors:
    """Three steps of float32 factors, bit for bit those of the CPU."""
    random = torch.Generator().manual_seed(0)
    first, *gradients = [[torch.randn(size, generator=random) for size in sizes] for _ in range(4)]
    blocks, found = sum(adamw8bit.count_blocks(factor) for factor in first), []
    for where in (device, "cpu"):
        factors = [factor.to(where, copy=True) for factor in first]
        codes = torch.zeros(2, blocks * adamw8bit.BLOCK, dtype=torch.uint8, device=where)
        scales = torch.zeros(2, blocks, device=where)
        for step, gradient in enumerate(gradients, 1):
            moved = [g.to(where) for g in gradient]
            adamw8bit.adamw8bit(
                factors, moved, codes, scales, step=step, lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1
            )
        found.append(torch.cat([factor.cpu() for factor in factors]))
    return {"values that differ": (float((found[0] != found[1]).sum()), 0.5)}


@triton.jit  # type: ignore[untyped-decorator]
def planted_kernel(p_x, BLOCK: tl.constexpr) -> None:
    """Adds 1 to BLOCK values, however few p_x has: the error that memcheck must find."""
    o = tl.arange(0, BLOCK)
    tl.store(p_x + o, tl.load(p_x + o) + 1)


def planted(device: str, dtype: torch.dtype) -> Checks:
    """1000 values of 1024. Raises ValueError on a CPU, whose memory nothing watches."""
    if device == "cpu":
        raise ValueError("case planted writes where it must not: run it on a GPU, under compute-sanitizer")
    yield "1024 of 1000 values", partial(planted_errors, device)


def planted_errors(device: str) -> Errors:
    x = torch.zeros(1000, device=device)
    planted_kernel[(1,)](x, BLOCK=1024)
    return {"the values that exist": (relative_rms(x.cpu(), torch.ones(1000)), 1e-6)}


@contextmanager
def off_hopper() -> Iterator[None]:
    """On an sm_90 card too, the kernels of other cards."""
    never = partial(_never)
    with (
        patch("loragraft.kernels.hopper_gemm.on_hopper", never),
        patch("loragraft.kernels.hopper_quant.on_hopper", never),
    ):
        yield


def _never(x: Tensor, dtype: torch.dtype) -> bool:
    return False


def portable(case: Case, device: str, dtype: torch.dtype) -> Checks:
    with off_hopper():
        yield from case(device, dtype)


PLANTED = "planted"
FP16 = "w4a8-fp16"
CASES: dict[str, Case] = {
    "w4a8-large": partial(linears, "w4a8", W4A8_LARGE),
    "w4a8-bare": partial(linears, "w4a8", W4A8_BARE),
    "w4a8-branch": partial(linears, "w4a8", W4A8_BRANCH),
    FP16: partial(linears, "w4a8", W4A8_FP16),
    "w4a8-portable": partial(portable, partial(linears, "w4a8", W4A8_PORTABLE)),
    "quantizers": quantizers,
    "quantizers-portable": partial(portable, quantizers),
    "w4a4": partial(linears, "w4a4", W4A4),
    "w4a4-unsigned": partial(linears, "w4a4", W4A4_UNSIGNED),
    "w4a16-few": partial(linears, "w4a16", W4A16_FEW),
    "w4a16-many": partial(linears, "w4a16", W4A16_MANY),
    "group": groups,
    "conv": partial(convolutions, CONVOLUTIONS),
    "conv-boxes": partial(convolutions, CONVOLUTIONS_IN_BOXES),
    "join-factors": joins,
    "adamw8bit": optimizers,
    PLANTED: planted,
}


def run_case(name: str, device: str) -> dict[str, Any]:
    """{"checks", "wrong": what is, "kernels": launches on a GPU}; an op that raises is wrong, and the next one is tried.

    float32 on a CPU, bfloat16 on a GPU, float16 for one case. Raises KeyError for an unknown name.
    """
    dtype = torch.float32 if device == "cpu" else torch.float16 if name == FP16 else torch.bfloat16
    launches: dict[str, int] = {}

    def count(metadata: Any) -> None:
        kernel = metadata.get()["name"]
        launches[kernel] = launches.get(kernel, 0) + 1

    triton.knobs.runtime.launch_enter_hook.add(count)
    checks, wrong = 0, []
    try:
        for label, compute in CASES[name](device, dtype):
            checks += 1
            try:
                found = compute()
            except Exception as error:  # a report names everything that is wrong, not the first
                wrong.append(f"{label}: {type(error).__name__}: {error}"[:500])
                continue
            for result, (error_of, bound) in found.items():
                if not error_of < bound:  # NaN is wrong too
                    wrong.append(f"{label}, {result}: relative error {error_of:.3g}, must be below {bound:.3g}")
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(count)
    return {"checks": checks, "wrong": wrong, "kernels": launches}
