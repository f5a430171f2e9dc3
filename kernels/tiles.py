"""Pieces of Triton code that several kernels share. Plain arithmetic only, so that Triton's interpreter runs them too."""

import triton
import triton.language as tl

# One 32-bit register of 8 packed codes ($1) and the word of their row ($2: s0 | c0 << 8 | s1 << 16 | c1 << 24) -> 4 INT8.
# Low nibbles are the tile's first 64 columns with scale s0, high nibbles the second 64 with s1; c = 128 - z s. u s + c stays
# in 0..255 for every reachable code, so one 32-bit multiply-add serves four codes, and xor 0x80 makes them signed.
WIDEN_LOW = tl.constexpr("""
{
.reg .b32 codes, scale, offset;
and.b32 codes, $1, 0x0F0F0F0F;
prmt.b32 scale, $2, 0, 0x4440;
prmt.b32 offset, $2, 0, 0x1111;
mad.lo.u32 codes, codes, scale, offset;
xor.b32 $0, codes, 0x80808080;
}
""")
WIDEN_HIGH = tl.constexpr("""
{
.reg .b32 codes, scale, offset;
shr.u32 codes, $1, 4;
and.b32 codes, codes, 0x0F0F0F0F;
prmt.b32 scale, $2, 0, 0x4442;
prmt.b32 offset, $2, 0, 0x3333;
mad.lo.u32 codes, codes, scale, offset;
xor.b32 $0, codes, 0x80808080;
}
""")


@triton.jit
def round_half_even(b_x):
    """float32 -> float32 integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits to keep."""
    return (b_x + 12582912.0) - 12582912.0


@triton.jit
def round_to_int8(b_x):
    """float32 -> int8, ties to even, for |x| <= 127: the low byte of x + 1.5 * 2^23, without a conversion instruction."""
    return (b_x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def hadamard_tile():
    """[64, 64] float32, layout.hadamard64: entry (i, j) is -1/8 if an odd number of base-4 digits of i xor j are 3."""
    o_i = tl.arange(0, 64)
    b_xor = o_i[:, None] ^ o_i[None, :]
    b_threes = b_xor & (b_xor >> 1) & 0x15
    b_sign = ((b_threes * 0x15) << 27) & -2147483648  # bit 4 of the product is the parity of bits 0, 2 and 4
    return (b_sign | 0x3E000000).to(tl.float32, bitcast=True)


@triton.jit
def load_nibbles(p_packed, o_n, k, N, KP, BK: tl.constexpr):
    """Unsigned codes (int32) [BN, BK] of columns k .. k + BK of packed [N, KP / 2]; rows from N on are 0."""
    o_byte = k // 2 + tl.arange(0, BK // 2)
    b_byte = tl.load(
        p_packed + o_n.to(tl.int64)[:, None] * (KP // 2) + o_byte[None, :], mask=(o_n < N)[:, None], other=0
    )
    b_byte = b_byte.to(tl.int32)
    return tl.interleave(b_byte & 15, b_byte >> 4)


@triton.jit
def dot_ranks(acc, p_left, p_right, o_row, o_col, ROWS, COLS, R, s_right_r, s_right_col, BR: tl.constexpr):
    """acc [rows, cols] += left [ROWS, R] @ right [R, COLS]: the low-rank branch in an epilogue. R may be any size."""
    o_r = tl.arange(0, BR)
    for r in range(0, R, BR):
        m_r = (r + o_r) < R
        p_l = p_left + o_row.to(tl.int64)[:, None] * R + (r + o_r)[None, :]
        b_left = tl.load(p_l, mask=(o_row < ROWS)[:, None] & m_r[None, :], other=0.0)
        p_r = p_right + (r + o_r).to(tl.int64)[:, None] * s_right_r + o_col.to(tl.int64)[None, :] * s_right_col
        b_right = tl.load(p_r, mask=m_r[:, None] & (o_col < COLS)[None, :], other=0.0)
        acc = tl.dot(b_left, b_right, acc, input_precision="ieee")
    return acc
