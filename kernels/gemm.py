"""INT8 matrix products on any GPU with INT8 tensor cores (sm_80 and newer) and in Triton's interpreter.

    y_mn = (a_m s_n sum_k x_mk w_nk) H  +  sum_r h_mr u_nr  +  bias_n          H: none, or blocks of 64 outputs rotated

* `w4a8_gemm`: w in packed UINT4 (layout.pack_tiles, pack_words); codes are widened in registers, which are the tensor
  core's A operand (Y^T = W X^T), so the widened weight exists nowhere.
* `int8_gemm`: w INT8 as it lies, [N, K].

INT32 sums are exact in any order. No M x N intermediate leaves the registers before the final store.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loragraft.kernels.layout import on_device
from loragraft.kernels.tiles import WIDEN_HIGH, WIDEN_LOW, hadamard_tile


@triton.jit
def _tile(pid, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP_M: tl.constexpr):
    """Tile numbers of a program: GROUP_M tiles of tokens share each strip of weights, for the L2 cache."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = pid // (GROUP_M * tiles_n)
    first = group * GROUP_M
    size = min(tiles_m - first, GROUP_M)
    inside = pid % (GROUP_M * tiles_n)
    return first + inside % size, inside // size


@triton.jit
def _widen(b_q, b_word, HALF: tl.constexpr, SHIFT: tl.constexpr, ASM: tl.constexpr):
    """INT8 codes of one half tile [BN, 64]. The interpreter has no inline PTX: there in plain arithmetic."""
    if ASM:
        b_word = tl.broadcast_to(b_word[:, None], b_q.shape)  # the four words of pack=4 are one row's, hence equal
        return tl.inline_asm_elementwise(HALF, "=r,r,r,r,r,r", [b_q, b_word], dtype=tl.int8, is_pure=True, pack=4)
    else:
        b_code, b_word = (b_q.to(tl.int32) >> SHIFT) & 15, b_word >> (4 * SHIFT)
        return (b_code * (b_word & 255)[:, None] + ((b_word >> 8) & 255)[:, None] - 128).to(tl.int8)


@triton.jit
def w4a8_gemm_kernel(
    p_x, p_a, p_q, p_words, p_s, p_h, p_up, p_bias, p_y, M, N, KP, R, s_hm, s_un, s_ur,
    RANKS: tl.constexpr, BR: tl.constexpr, ASM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Y^T tile [BN, BM]. RANKS steps of BR ranks."""
    t_m, t_n = _tile(tl.program_id(0), M, N, BM, BN, GROUP_M)
    o_m, o_n, o_b = t_m * BM + tl.arange(0, BM), t_n * BN + tl.arange(0, BN), tl.arange(0, 64)
    # Rows beyond the end repeat the last one and are not stored: no mask in the loop.
    r_m, r_n = tl.minimum(o_m, M - 1).to(tl.int64), tl.minimum(o_n, N - 1)
    p_xt = p_x + r_m[None, :] * KP + o_b[:, None]
    p_qt = p_q + r_n.to(tl.int64)[:, None] * (KP // 2) + o_b[None, :]
    p_word = p_words + r_n
    acc = tl.zeros((BN, BM), tl.int32)
    for _ in tl.range(0, KP // 128):
        b_q, b_word = tl.load(p_qt), tl.load(p_word)
        acc = tl.dot(_widen(b_q, b_word, WIDEN_LOW, 0, ASM), tl.load(p_xt), acc, out_dtype=tl.int32)
        acc = tl.dot(_widen(b_q, b_word, WIDEN_HIGH, 4, ASM), tl.load(p_xt + 64), acc, out_dtype=tl.int32)
        p_xt += 128
        p_qt += 64
        p_word += N
    b_y = acc.to(tl.float32) * (tl.load(p_s + r_n)[:, None] * tl.load(p_a + r_m)[None, :])
    for rank in tl.static_range(RANKS):
        o_r = rank * BR + tl.arange(0, BR)
        b_up = tl.load(p_up + r_n[:, None] * s_un + o_r[None, :] * s_ur, mask=(o_r < R)[None, :], other=0.0)
        b_h = tl.load(p_h + r_m[None, :] * s_hm + o_r[:, None], mask=(o_r < R)[:, None], other=0.0)
        b_y = tl.dot(b_up, b_h, b_y, input_precision="ieee")
    if p_bias is not None:
        b_y += tl.load(p_bias + r_n).to(tl.float32)[:, None]
    p_out = p_y + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(p_out, tl.trans(b_y).to(p_y.dtype.element_ty), mask=(o_m < M)[:, None] & (o_n < N)[None, :])


@triton.jit
def int8_gemm_kernel(
    p_x, p_a, p_w, p_s, p_h, p_up, p_y, M, N, KP, R, s_hm, s_un, s_ur,
    HADAMARD: tl.constexpr, RANKS: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Y tile [BM, BN]; with HADAMARD BN is 64, one block."""
    t_m, t_n = _tile(tl.program_id(0), M, N, BM, BN, GROUP_M)
    o_m, o_n, o_k = t_m * BM + tl.arange(0, BM), t_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    r_m, r_n = tl.minimum(o_m, M - 1).to(tl.int64), tl.minimum(o_n, N - 1).to(tl.int64)
    p_xt = p_x + r_m[:, None] * KP + o_k[None, :]
    p_wt = p_w + r_n[None, :] * KP + o_k[:, None]
    acc = tl.zeros((BM, BN), tl.int32)
    for _ in tl.range(0, KP // BK):
        acc = tl.dot(tl.load(p_xt), tl.load(p_wt), acc, out_dtype=tl.int32)
        p_xt += BK
        p_wt += BK
    b_y = acc.to(tl.float32) * tl.load(p_a + r_m)[:, None]
    if HADAMARD:
        b_y = tl.dot(b_y, hadamard_tile(), input_precision=PRECISION)
    if p_s is not None:
        b_y *= tl.load(p_s + r_n).to(tl.float32)[None, :]
    for rank in tl.static_range(RANKS):
        o_r = rank * BR + tl.arange(0, BR)
        b_h = tl.load(p_h + r_m[:, None] * s_hm + o_r[None, :], mask=(o_r < R)[None, :], other=0.0)
        b_up = tl.load(p_up + r_n[None, :] * s_un + o_r[:, None] * s_ur, mask=(o_r < R)[:, None], other=0.0)
        b_y = tl.dot(b_h, b_up, b_y, input_precision="ieee")
    p_out = p_y + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(p_out, b_y.to(p_y.dtype.element_ty), mask=(o_m < M)[:, None] & (o_n < N)[None, :])


def w4a8_gemm(
    x_MK: Tensor, a_M1: Tensor, qweight: Tensor, words: Tensor, s_N: Tensor, h_MR: Tensor, up_NR: Tensor, bias: Tensor | None
) -> Tensor:  # fmt: skip
    """y [M, N] in h's dtype; x int8 [M, Kp], qweight uint8 [N, Kp/2]."""
    (M, KP), (N, R) = x_MK.shape, up_NR.shape
    y_MN = h_MR.new_empty((M, N))
    BM, BN = (128, 128) if M > 64 else (max(16, triton.next_power_of_2(M)), 64)
    with on_device(x_MK):
        w4a8_gemm_kernel[(triton.cdiv(M, BM) * triton.cdiv(N, BN),)](
            x_MK, a_M1, qweight.view(torch.int8), words, s_N, h_MR, up_NR, bias, y_MN, M, N, KP, R, h_MR.stride(0),
            *up_NR.stride(), RANKS=triton.cdiv(R, 16), BR=16, ASM=x_MK.is_cuda, BM=BM, BN=BN, GROUP_M=8,
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return y_MN


def int8_gemm(
    x_MK: Tensor, a_M1: Tensor, weight: Tensor, s_N: Tensor | None, h_MR: Tensor, up_NR: Tensor, hadamard: bool
) -> Tensor:  # fmt: skip
    """y [M, N] in h's dtype; x int8 [M, Kp], weight int8 [N, Kp], s over N applied after the rotation."""
    (M, KP), (N, R) = x_MK.shape, up_NR.shape
    y_MN = h_MR.new_empty((M, N))
    BM, BN = 128 if M > 64 else max(16, triton.next_power_of_2(M)), 64 if hadamard else 128
    with on_device(x_MK):
        int8_gemm_kernel[(triton.cdiv(M, BM) * triton.cdiv(N, BN),)](
            x_MK, a_M1, weight, s_N, h_MR, up_NR, y_MN, M, N, KP, R, h_MR.stride(0), *up_NR.stride(), HADAMARD=hadamard,
            RANKS=triton.cdiv(R, 16), BR=16, PRECISION="ieee" if y_MN.dtype == torch.float32 else "tf32",
            BM=BM, BN=BN, BK=64, GROUP_M=8, num_warps=4, num_stages=4,
        )  # fmt: skip
    return y_MN
