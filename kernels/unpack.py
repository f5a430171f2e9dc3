"""Four-bit weights as the backward pass reads them: transient matrices, written by one kernel and gone after one product.

* `transposed_int8`: I^T [Kp, Np] of a W4A8 weight. 8-bit tensor cores sum along the last axis of both operands only, so
  dy I needs the weight with its output features last.
* `effective_weight`: W_eff = (deq(q) H) / smooth + U D [N, K] in 16 or 32 bits, what a layer multiplies with when nothing
  rounds its input. dx = dy W_eff is then one matrix product of the library, branch included.
* `joined_weight`: [deq(q), U] [N, Kp + Rp] of a W4A4 weight: with [x', h] on the other side, y is one such product too.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from loragraft.kernels.layout import hadamard64, on_device, padded
from loragraft.kernels.tiles import load_nibbles


@triton.jit
def _load_tile(p_q, p_words, o_n, tile, N, KP):
    """Bytes [BN, 64] of columns 128 tile .., low nibbles the first 64 of them, and the words [BN] of their scales and zeros."""
    m_n = o_n < tl.where(tile * 128 < KP, N, 0)
    p_tile = p_q + o_n.to(tl.int64)[:, None] * (KP // 2) + tile * 64 + tl.arange(0, 64)[None, :]
    b_byte = tl.load(p_tile, mask=m_n[:, None], other=0).to(tl.int32)
    return b_byte, tl.load(p_words + tile * N + o_n, mask=m_n, other=0x80008000 - 0x100000000)


@triton.jit
def _half_int8(b_byte, b_word, half: tl.constexpr):
    """I [BN, 64] int32 of one half of a tile."""
    b_scale, b_offset = (b_word >> (16 * half)) & 255, (b_word >> (16 * half + 8)) & 255
    return ((b_byte >> (4 * half)) & 15) * b_scale[:, None] + b_offset[:, None] - 128


@triton.jit
def transposed_int8_kernel(p_q, p_words, p_out, N, NP, KP, BN: tl.constexpr):
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    b_byte, b_word = _load_tile(p_q, p_words, o_n, tl.program_id(1), N, KP)
    for half in tl.static_range(2):
        b_w = _half_int8(b_byte, b_word, half)
        o_k = tl.program_id(1) * 128 + half * 64 + tl.arange(0, 64)
        p_tile = p_out + o_k.to(tl.int64)[:, None] * NP + o_n[None, :]
        tl.store(p_tile, tl.trans(b_w).to(tl.int8), mask=(o_n < NP)[None, :])


@triton.jit
def effective_weight_kernel(
    p_q, p_words, p_scale, p_smooth, p_hadamard, p_up, p_down, p_out, N, K, KP, R, s_un, s_ur, s_dr, s_out,
    W4A8: tl.constexpr, HADAMARD: tl.constexpr, HAS_SMOOTH: tl.constexpr, ONE_RANK_BLOCK: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Rows of BN, TILES tiles of 128 columns. p_scale: row scales [N] of W4A8, group scales [Kp/64, N] of W4A4."""
    o_n, o_64, o_r = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, 64), tl.arange(0, BR)
    if HADAMARD:
        b_hadamard = tl.load(p_hadamard + o_64[:, None] * 64 + o_64[None, :])
    if ONE_RANK_BLOCK:
        p_u = p_up + o_n[:, None] * s_un + o_r[None, :] * s_ur
        b_up = tl.load(p_u, mask=(o_n < N)[:, None] & (o_r < R)[None, :], other=0.0)
    for step in range(TILES):
        tile = tl.program_id(1) * TILES + step
        if W4A8:
            b_byte, b_word = _load_tile(p_q, p_words, o_n, tile, N, KP)
        for half in tl.static_range(2):
            group = 2 * tile + half
            o_k = group * 64 + o_64
            m_out = (o_n < N)[:, None] & (o_k < K)[None, :]
            if W4A8:
                b_codes = _half_int8(b_byte, b_word, half)
                b_scale = tl.load(p_scale + o_n, mask=o_n < N, other=0.0)
            else:
                b_codes = (load_nibbles(p_q, o_n, group * 64, tl.where(group * 64 < KP, N, 0), KP, 64) ^ 8) - 8
                b_scale = tl.load(p_scale + group * N + o_n, mask=o_n < tl.where(group * 64 < KP, N, 0), other=0.0).to(
                    tl.float32
                )
            # Codes and +-1/8 are exact in float16, their sums in float32: the rotation rounds nothing.
            b_w = tl.dot(b_codes.to(tl.float16), b_hadamard) if HADAMARD else b_codes.to(tl.float32)
            b_w *= b_scale[:, None]
            if HAS_SMOOTH:
                b_w *= (1.0 / tl.load(p_smooth + o_k, mask=o_k < K, other=1.0).to(tl.float32))[None, :]
            for r in range(0, R, BR):
                if not ONE_RANK_BLOCK:
                    p_u = p_up + o_n[:, None] * s_un + (r + o_r)[None, :] * s_ur
                    b_up = tl.load(p_u, mask=(o_n < N)[:, None] & (r + o_r < R)[None, :], other=0.0)
                p_d = p_down + (r + o_r)[:, None] * s_dr + o_k[None, :]
                b_down = tl.load(p_d, mask=(r + o_r < R)[:, None] & (o_k < K)[None, :], other=0.0)
                b_w = tl.dot(b_up, b_down, b_w, input_precision="ieee")
            p_tile = p_out + o_n.to(tl.int64)[:, None] * s_out + o_k[None, :]
            tl.store(p_tile, b_w.to(p_out.dtype.element_ty), mask=m_out)


def transposed_int8(qweight: Tensor, words: Tensor) -> Tensor:
    """I^T int8 [Kp, Np], Np = N padded to 128 with zeros."""
    N, KP = qweight.shape[0], 2 * qweight.shape[1]
    NP = padded(N)
    out = qweight.new_empty((KP, NP), dtype=torch.int8)
    with on_device(qweight):
        transposed_int8_kernel[(triton.cdiv(NP, 64), KP // 128)](qweight, words, out, N, NP, KP, BN=64)
    return out


def effective_weight(
    qweight: Tensor, words: Tensor | None, scale: Tensor, smooth: Tensor | None, hadamard: bool, up_NR: Tensor, down_RK: Tensor
) -> Tensor:  # fmt: skip
    """W_eff [N, K] in the dtype of the branch. W4A8 with its words and row scales [N], W4A4 with group scales [Kp/64, N]."""
    (N, R), K = up_NR.shape, down_RK.shape[1]
    out = up_NR.new_empty((N, K))
    _write_weight(out, qweight, words, scale, smooth, hadamard, up_NR, down_RK, R, K)
    return out


def _write_weight(
    out: Tensor, qweight: Tensor, words: Tensor | None, scale: Tensor, smooth: Tensor | None, hadamard: bool,
    up_NR: Tensor, down_RK: Tensor, R: int, K: int,
) -> None:  # fmt: skip
    """W_eff into the first K columns of `out`; R = 0 leaves the branch out."""
    N, KP = qweight.shape[0], 2 * qweight.shape[1]
    rank_block, tiles = min(64, max(16, triton.next_power_of_2(R))), 4
    matrix = _half_hadamard(qweight.device) if hadamard else None
    with on_device(qweight):
        effective_weight_kernel[(triton.cdiv(N, 64), triton.cdiv(KP // 128, tiles))](
            qweight, words, scale, smooth, matrix, up_NR, down_RK, out, N, K, KP, R, *up_NR.stride(), down_RK.stride(0),
            out.stride(0), W4A8=words is not None, HADAMARD=hadamard, HAS_SMOOTH=smooth is not None,
            ONE_RANK_BLOCK=rank_block >= R, BN=64, BR=rank_block, TILES=tiles, num_warps=4, num_stages=2,
        )  # fmt: skip


@functools.cache
def _half_hadamard(device: torch.device) -> Tensor:
    return hadamard64(torch.float16, device)


def joined_weight(qweight: Tensor, wscale: Tensor, up_NR: Tensor) -> Tensor:
    """[deq(q), U, 0] of a W4A4 weight in U's dtype, [N, Kp + Rp] with Rp = R rounded up to 8."""
    (N, R), KP = up_NR.shape, 2 * qweight.shape[1]
    out = up_NR.new_empty((N, KP + (R + 7) // 8 * 8))
    out[:, KP:] = 0
    out[:, KP : KP + R] = up_NR
    _write_weight(out, qweight, None, wscale, None, False, up_NR, up_NR, 0, KP)
    return out
