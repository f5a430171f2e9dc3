"""`round_progressive` in one kernel: a pass over the weight instead of the 60 that its elementwise operations make on a GPU.

The alternation rounds a large model's weights some twenty times, which is most of its time. Same formulas and the same order of
preference among scales as `weight_quant.round_progressive`; the squared errors that choose a scale are summed in another order,
so where two scales fit a group equally well the other one may be taken. What is returned always belongs to the stored scales.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loragraft.kernels.layout import on_device, padded
from loragraft.kernels.tiles import round_half_even
from loragraft.quantization.weight_quant import ROW_LIMIT, SCALE_SEARCH, RoundedWeight

ELEMENTS = 1024
"""Per program: 16 groups of 64, or 8 of 128."""

assert SCALE_SEARCH == (0, -1, 1, -2), "the kernel counts these offsets up by itself"


@triton.jit  # type: ignore[untyped-decorator]
def progressive_kernel(  # type: ignore[no-untyped-def]
    p_weight, p_row_scale, p_dense, p_codes, p_scale, p_zero, N, K, KP, LIMIT: tl.constexpr, g: tl.constexpr, BG: tl.constexpr
):  # fmt: skip
    """BG groups of one row."""
    row = tl.program_id(0).to(tl.int64)
    o_g = tl.program_id(1) * BG + tl.arange(0, BG)
    o_k = o_g[:, None] * g + tl.arange(0, g)[None, :]
    b_weight = tl.load(p_weight + row * K + o_k, mask=o_k < K, other=0.0)
    b_row = tl.load(p_row_scale + row)
    b_wanted = tl.math.div_rn(b_weight, tl.zeros((BG, g), tl.float32) + b_row)
    b_first = tl.minimum(tl.maximum(round_half_even(b_wanted), -LIMIT), LIMIT)
    b_low = tl.minimum(tl.min(b_first, axis=1), 0.0)
    b_high = tl.maximum(tl.max(b_first, axis=1), 0.0)
    b_base = round_half_even(tl.math.div_rn(b_high - b_low, tl.full((BG,), 15.0, tl.float32)))
    b_best = tl.minimum(tl.maximum(b_base, 1.0), 15.0)
    b_best_zero = tl.zeros((BG,), tl.float32)
    b_best_error = tl.full((BG,), float("inf"), tl.float32)
    for i in tl.static_range(4):
        offset = ((i + 1) // 2) * (1 - 2 * (i % 2))  # 0, -1, 1, -2
        b_scale = tl.minimum(tl.maximum(b_base + offset, 1.0), 15.0)
        b_zero = tl.minimum(tl.maximum(round_half_even(tl.math.div_rn(-b_low, b_scale)), 0.0), 15.0)
        b_wide = tl.broadcast_to(b_scale[:, None], (BG, g))
        b_code = round_half_even(tl.math.div_rn(b_first, b_wide)) + b_zero[:, None]
        b_value = (tl.minimum(tl.maximum(b_code, 0.0), 15.0) - b_zero[:, None]) * b_wide
        b_wrong = b_value - b_wanted
        b_error = tl.sum(b_wrong * b_wrong, axis=1)
        better = b_error < b_best_error
        b_best = tl.where(better, b_scale, b_best)
        b_best_zero = tl.where(better, b_zero, b_best_zero)
        b_best_error = tl.where(better, b_error, b_best_error)
    b_wide = tl.broadcast_to(b_best[:, None], (BG, g))
    b_code = round_half_even(tl.math.div_rn(b_first, b_wide)) + b_best_zero[:, None]
    b_code = tl.minimum(tl.maximum(b_code, 0.0), 15.0)
    tl.store(p_dense + row * K + o_k, (b_code - b_best_zero[:, None]) * b_wide * b_row, mask=o_k < K)
    tl.store(p_codes + row * KP + o_k, b_code.to(tl.uint8), mask=o_k < KP)
    inside = o_g < KP // g
    tl.store(p_scale + o_g.to(tl.int64) * N + row, b_best.to(tl.uint8), mask=inside)
    tl.store(p_zero + o_g.to(tl.int64) * N + row, b_best_zero.to(tl.uint8), mask=inside)


def round_progressive_fused(weight_NK: Tensor, group_size: int) -> RoundedWeight:
    """`weight_quant.round_progressive` of a float32 weight [N, K] on a GPU (or in Triton's interpreter)."""
    (N, K), KP = weight_NK.shape, padded(weight_NK.shape[1])
    weight = weight_NK.contiguous()
    row_scale = torch.maximum(weight.amax(1), -weight.amin(1)) / ROW_LIMIT
    row_scale = torch.where(row_scale > 0, row_scale, torch.ones_like(row_scale))
    dense = torch.empty_like(weight)
    codes = torch.empty((N, KP), dtype=torch.uint8, device=weight.device)
    scale = torch.empty((KP // group_size, N), dtype=torch.uint8, device=weight.device)
    zero = torch.empty_like(scale)
    groups = ELEMENTS // group_size
    with on_device(weight):
        progressive_kernel[(N, triton.cdiv(KP // group_size, groups))](
            weight, row_scale, dense, codes, scale, zero, N, K, KP, LIMIT=float(ROW_LIMIT), g=group_size, BG=groups
        )  # fmt: skip
    return RoundedWeight(codes, dense, {"row_scale": row_scale, "group_scale": scale, "group_zero": zero})
