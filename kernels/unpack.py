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

ROWS, TOGETHER = 64, 3  # of W_eff that are written at a time; programs that share a large card's multiprocessor
# One register of 4 bytes ($2) -> 4 float16 (u s + c - 128) 2^-16: the bits of a nibble u alone are the float16 u 2^-24, those of
# a high nibble in its place u 2^-20. $3, $4 hold s 2^8 (high: s 2^4), $5, $6 (c - 128) 2^-16; one multiply-add, exact, for two.
CODE_UNIT = tl.constexpr(2.0**-16)
_HALVES = """
{{
.reg .b32 first, second;
prmt.b32 first, $2, 0, 0x4140;
prmt.b32 second, $2, 0, 0x4342;
and.b32 first, first, {mask};
and.b32 second, second, {mask};
fma.rn.f16x2 $0, first, $3, $5;
fma.rn.f16x2 $1, second, $4, $6;
}}
"""
HALVES_LOW = tl.constexpr(_HALVES.format(mask="0x000F000F"))
HALVES_HIGH = tl.constexpr(_HALVES.format(mask="0x00F000F0"))


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
def _half_float16(b_byte, b_word, HALF: tl.constexpr, ASM: tl.constexpr):
    """2^-16 I [BN, 64] float16 of one half of a tile, exact for |I| <= 128. The interpreter has no inline PTX."""
    b_scale = ((b_word >> (16 * HALF)) & 255)[:, None]
    b_offset = ((b_word >> (16 * HALF + 8)) & 255)[:, None] - 128
    if ASM:
        b_scale = tl.broadcast_to(b_scale.to(tl.float16) * (16.0 if HALF else 256.0), b_byte.shape)
        b_offset = tl.broadcast_to(b_offset.to(tl.float16) * CODE_UNIT, b_byte.shape)
        return tl.inline_asm_elementwise(
            HALVES_HIGH if HALF else HALVES_LOW, "=r,=r,r,r,r,r,r", [b_byte, b_scale, b_offset],
            dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        b_codes = ((b_byte.to(tl.int32) >> (4 * HALF)) & 15) * b_scale + b_offset
        return (b_codes.to(tl.float32) * CODE_UNIT).to(tl.float16)


@triton.jit
def _down_tile(p_down, o_r, o_k, R, K, s_dr):
    """D [BR, 64]: ranks o_r, columns o_k."""
    p_tile = p_down + o_r[:, None] * s_dr + o_k[None, :]
    return tl.load(p_tile, mask=(o_r < R)[:, None] & (o_k < K)[None, :], other=0.0)


@triton.jit
def _up_tile(p_up, r_n, o_r, R, s_un, s_ur):
    """U [BN, BR]: rows r_n, ranks o_r."""
    return tl.load(p_up + r_n[:, None] * s_un + o_r[None, :] * s_ur, mask=(o_r < R)[None, :], other=0.0)


@triton.jit
def effective_weight_kernel(
    p_q, p_words, p_scale, p_smooth, p_hadamard, p_up, p_down, p_out, N, K, KP, R, s_un, s_ur, s_dr, s_out, rows,
    W4A8: tl.constexpr, HADAMARD: tl.constexpr, HAS_SMOOTH: tl.constexpr, RANK_BLOCKS: tl.constexpr, ASM: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """128 columns, `rows` rows in steps of BN. p_scale: row scales [N] of W4A8, group scales [Kp/64, N] of W4A4.

    H, and D of one rank block, stay in shared memory; codes, words and U of the next steps are on their way meanwhile. With
    several rank blocks (RANK_BLOCKS 2) U and D are read again in every step.
    """
    tile, first = tl.program_id(0), tl.program_id(1) * rows
    o_n, o_64, o_r = tl.arange(0, BN), tl.arange(0, 64), tl.arange(0, BR)
    if HADAMARD:
        b_hadamard = tl.load(p_hadamard + o_64[:, None] * 64 + o_64[None, :])
    o_k = (tile * 128 + o_64, tile * 128 + 64 + o_64)
    if RANK_BLOCKS == 1:
        b_downs = (_down_tile(p_down, o_r, o_k[0], R, K, s_dr), _down_tile(p_down, o_r, o_k[1], R, K, s_dr))
    for n in tl.range(first, min(first + rows, N), BN, num_stages=STAGES):
        r_n = tl.minimum(n + o_n, N - 1)  # rows beyond the end repeat the last one and are not stored: no masks here
        if W4A8:
            b_byte = tl.load(p_q + r_n.to(tl.int64)[:, None] * (KP // 2) + tile * 64 + o_64[None, :])
            b_word = tl.load(p_words + tile * N + r_n)
            b_scale = tl.load(p_scale + r_n) * (1 / CODE_UNIT)
        if RANK_BLOCKS == 1:
            b_up = _up_tile(p_up, r_n, o_r, R, s_un, s_ur)
        for half in tl.static_range(2):
            if W4A8:
                b_codes = _half_float16(b_byte, b_word, half, ASM)
            else:
                b_codes = ((load_nibbles(p_q, r_n, tile * 128 + half * 64, N, KP, 64) ^ 8) - 8).to(tl.float16)
                b_scale = tl.load(p_scale + (2 * tile + half) * N + r_n).to(tl.float32)
            # Codes and +-1/8 are exact in float16, their sums in float32: the rotation rounds nothing.
            b_w = tl.dot(b_codes, b_hadamard) if HADAMARD else b_codes.to(tl.float32)
            b_w *= b_scale[:, None]
            if HAS_SMOOTH:
                b_w *= (1.0 / tl.load(p_smooth + o_k[half], mask=o_k[half] < K, other=1.0).to(tl.float32))[None, :]
            if RANK_BLOCKS == 1:
                b_w = tl.dot(b_up, b_downs[half], b_w, input_precision="ieee")
            elif RANK_BLOCKS == 2:
                for r in range(0, R, BR):
                    b_up = _up_tile(p_up, r_n, r + o_r, R, s_un, s_ur)
                    b_down = _down_tile(p_down, r + o_r, o_k[half], R, K, s_dr)
                    b_w = tl.dot(b_up, b_down, b_w, input_precision="ieee")
            p_tile = p_out + tl.cast(n, tl.int64) * s_out + o_n[:, None] * s_out + o_k[half][None, :]
            m_out = (o_n < N - n)[:, None] & (o_k[half] < K)[None, :]
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
    most = 64 if out.element_size() == 2 else 16  # float32 has no exact tensor core: U and D of a step are in registers
    rank_block, rows = min(most, max(16, triton.next_power_of_2(R))), rows_of_program(N, KP, qweight.device)
    matrix = _half_hadamard(qweight.device) if hadamard else None
    with on_device(qweight):
        effective_weight_kernel[(KP // 128, triton.cdiv(N, rows))](
            qweight, words, scale, smooth, matrix, up_NR, down_RK, out, N, K, KP, R, *up_NR.stride(), down_RK.stride(0),
            out.stride(0), rows, W4A8=words is not None, HADAMARD=hadamard, HAS_SMOOTH=smooth is not None,
            RANK_BLOCKS=min(2, triton.cdiv(R, rank_block)), ASM=qweight.is_cuda, BN=ROWS, BR=rank_block, STAGES=3, num_warps=4,
        )  # fmt: skip


def rows_of_program(N: int, KP: int, device: torch.device) -> int:
    """Rows that a program walks down: all programs together are one wave, whose length is what the longest takes."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    down = max(1, TOGETHER * processors // (KP // 128))
    return ROWS * triton.cdiv(triton.cdiv(N, ROWS), down)


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
