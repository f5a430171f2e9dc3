"""Per-token INT8 activations and the low-rank down-projection, from one reading of x.

    x'    = (x * (1 / smooth)) H                 H block-diagonal Hadamard-64, or the identity
    a_m   = max_k |x'_mk| / 127                  scale [M, 1], 1 for a row of zeros
    codes = round_half_even(x'_mk * (127 / max)) int8 [M, Kp], zero from K on
    h     = x D^T                                raw x, [M, R], float32 accumulation, stored in x's dtype

A row's maximum is needed before its first code, and D should be read for many rows at once. So K is split among programs,
each leaves its part of the maximum and of h, waits until the others of its rows have, and writes codes from the slice that
it has just read (by now in L2). Partial h are added in a fixed order; the only atomics are integer counters.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loragraft.kernels.hopper import on_hopper
from loragraft.kernels.hopper_quant import hopper_quant_runs, hopper_quantize_down
from loragraft.kernels.layout import on_device, padded, rank_rows
from loragraft.kernels.tiles import hadamard_tile, round_to_int8

SPLIT = 768  # columns of one program: 132 SMs with two programs each hold 26 MB of x, half an H100's L2


@triton.jit
def _rotated(b_x, p_smooth, o_k, K, HAS_SMOOTH: tl.constexpr, HADAMARD: tl.constexpr, PRECISION: tl.constexpr):
    """x' of one tile of x in float32; with HADAMARD the tile is 64 columns."""
    b_x = b_x.to(tl.float32)
    if HAS_SMOOTH:
        b_smooth = tl.load(p_smooth + o_k, mask=o_k < K, other=1.0).to(tl.float32)
        b_x = b_x * (1.0 / b_smooth)[None, :]
    if HADAMARD:
        b_x = tl.dot(b_x, hadamard_tile(), input_precision=PRECISION)
    return b_x


@triton.jit
def token_quant_kernel(
    p_x, p_smooth, p_down, p_ticket, p_arrived, p_max, p_part, p_codes, p_scale, p_h, M, K, KP, R, s_hm, s_dr, s_dk, split_k,
    SPLITS: tl.constexpr, HAS_SMOOTH: tl.constexpr, HADAMARD: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr, CODE_STAGES: tl.constexpr,
):  # fmt: skip
    """Rows of one block, columns of one split. BH: rows of h that this program finishes. BC: columns a round of codes."""
    # Tickets follow the order of start, so the programs that one waits for have started or are next: no deadlock.
    ticket = tl.atomic_add(p_ticket, 1, sem="relaxed") if SPLITS > 1 else tl.program_id(0)
    block, split = ticket // SPLITS, ticket % SPLITS
    o_m, o_k, o_r = block * BM + tl.arange(0, BM), tl.arange(0, BK), tl.arange(0, BR)
    o_row, m_m, first = o_m.to(tl.int64), o_m < M, split * split_k
    b_max = tl.zeros((BM, BK), tl.float32)  # per element: one reduction across threads, at the end
    acc = tl.zeros((BR, BM), tl.float32)
    for k in tl.range(first, min(first + split_k, K), BK):
        m_k = k + o_k < K
        b_x = tl.load(p_x + o_row[:, None] * K + (k + o_k)[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        if BR > 1:
            p_d = p_down + o_r[:, None] * s_dr + (k + o_k).to(tl.int64)[None, :] * s_dk
            b_d = tl.load(p_d, mask=m_k[None, :] & (o_r < R)[:, None], other=0.0)
            acc = tl.dot(b_d, tl.trans(b_x), acc, input_precision="ieee")
        b_x = _rotated(b_x, p_smooth, k + o_k, K, HAS_SMOOTH, HADAMARD, PRECISION)
        b_max = tl.maximum(b_max, tl.abs(b_x), propagate_nan=tl.PropagateNan.ALL)
    b_row = tl.max(b_max, axis=1) + tl.sum(b_max * 0.0, axis=1)  # a reduction drops NaN, and codes would hide it
    if SPLITS > 1:
        tl.store(p_max + split * M + o_m, b_row, mask=m_m)
        if BR > 1:
            p_own = p_part + (split * M + o_row)[None, :] * R + o_r[:, None]
            tl.store(p_own, acc, mask=m_m[None, :] & (o_r < R)[:, None])
        tl.debug_barrier()
        tl.atomic_add(p_arrived + block, 1, sem="release")
        while tl.atomic_add(p_arrived + block, 0, sem="acquire") < SPLITS:
            pass
        tl.debug_barrier()
        b_row = tl.zeros((BM,), tl.float32)
        for other in tl.static_range(SPLITS):
            b_other = tl.load(p_max + other * M + o_m, mask=m_m, other=0.0, cache_modifier=".cg")
            b_row = tl.maximum(b_row, b_other, propagate_nan=tl.PropagateNan.ALL)
        if BR > 1:
            o_i = split * BH + tl.arange(0, BH)
            o_h = block * BM + o_i
            m_h = ((o_i < BM) & (o_h < M))[:, None] & (o_r < R)[None, :]
            b_h = tl.zeros((BH, BR), tl.float32)
            for other in tl.static_range(SPLITS):
                p_other = p_part + (other * M + o_h.to(tl.int64))[:, None] * R + o_r[None, :]
                b_h += tl.load(p_other, mask=m_h, other=0.0, cache_modifier=".cg")
            tl.store(p_h + o_h.to(tl.int64)[:, None] * s_hm + o_r[None, :], b_h.to(p_h.dtype.element_ty), mask=m_h)
    elif BR > 1:
        m_h = m_m[None, :] & (o_r < R)[:, None]
        tl.store(p_h + o_row[None, :] * s_hm + o_r[:, None], acc.to(p_h.dtype.element_ty), mask=m_h)
    b_row = tl.where(b_row == 0, 127.0, b_row)
    if split == 0:
        tl.store(p_scale + o_m, tl.math.div_rn(b_row, tl.full((BM,), 127.0, tl.float32)), mask=m_m)
    b_inverse = tl.math.div_rn(tl.full((BM,), 127.0, tl.float32), b_row)
    o_c = tl.arange(0, BC)
    for k in tl.range(first, min(first + split_k, KP), BC, num_stages=CODE_STAGES):
        m_x = m_m[:, None] & (k + o_c < K)[None, :]
        b_x = tl.load(p_x + o_row[:, None] * K + (k + o_c)[None, :], mask=m_x, other=0.0)
        b_x = _rotated(b_x, p_smooth, k + o_c, K, HAS_SMOOTH, HADAMARD, PRECISION)
        b_codes = round_to_int8(b_x * b_inverse[:, None])
        m_out = m_m[:, None] & (k + o_c < KP)[None, :]
        tl.store(p_codes + o_row[:, None] * KP + (k + o_c)[None, :], b_codes, mask=m_out)


def quantize_down(
    x_MK: Tensor, smooth_K: Tensor | None, hadamard: bool, down_RK: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x [M, K] -> (codes int8 [M, Kp], scale float32 [M, 1], h [M, R] in x's dtype); D [R, K] may have any strides.

    h is `rank_rows`: a view whose rows start at multiples of 16 bytes. Runs Triton only.
    """
    if hopper_quant_runs(x_MK, down_RK):
        return hopper_quantize_down(x_MK, smooth_K, hadamard, down_RK)
    (M, K), R, KP = x_MK.shape, down_RK.shape[0], padded(x_MK.shape[1])
    codes_MK = x_MK.new_empty((M, KP), dtype=torch.int8)
    scale_M1 = x_MK.new_empty((M, 1), dtype=torch.float32)
    h_MR = rank_rows(x_MK, R)
    bm, split_k = 64, SPLIT if x_MK.is_cuda else KP  # the interpreter runs programs one by one: none may wait
    splits, blocks = triton.cdiv(KP, split_k), triton.cdiv(M, bm)
    alone = splits == 1
    counters = None if alone else torch.zeros(blocks + 1, dtype=torch.int32, device=x_MK.device)
    max_SM = None if alone else x_MK.new_empty((splits, M), dtype=torch.float32)
    part_SMR = None if alone else x_MK.new_empty((splits, M, R), dtype=torch.float32)
    with on_device(x_MK):
        token_quant_kernel[(blocks * splits,)](
            x_MK, smooth_K, down_RK, counters, None if counters is None else counters[1:], max_SM, part_SMR, codes_MK,
            scale_M1, h_MR, M, K, KP, R, h_MR.stride(0), *down_RK.stride(), split_k, SPLITS=splits,
            HAS_SMOOTH=smooth_K is not None, HADAMARD=hadamard,
            PRECISION="ieee" if x_MK.dtype == torch.float32 else "tf32x3", BM=bm, BK=64,
            BR=max(16, triton.next_power_of_2(R)) if R else 1, BH=triton.next_power_of_2(triton.cdiv(bm, splits)),
            BC=64 if hadamard else 128, CODE_STAGES=3, num_warps=4,
            # Triton 3.6 fetches into a buffer that an asynchronous wgmma still reads, if registers read it too.
            num_stages=1 if on_hopper(x_MK, x_MK.dtype) else 4,
        )  # fmt: skip
    return codes_MK, scale_M1, h_MR
