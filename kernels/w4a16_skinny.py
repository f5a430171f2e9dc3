"""W4A16 for 1 to 16 tokens, where the time is that of reading the weights: y = x W^T + h U^T + bias, W = c w + z.

    sum_k x_k (c_k w_G + z_G) = sum_G w_G (sum_{k in G} c_k x_k) + z_G (sum_{k in G} x_k)

so scales and zeros act once per group of 64 and never per code. `gemv_kernel` (up to 2 tokens) multiplies in float32 on the
plain cores: 128-bit loads of codes, one warp reading a row in pieces of 512 bytes, the next piece always in flight.
`skinny_kernel` (up to 16) feeds tensor cores. Neither interleaves nibbles: x is split into columns instead, once per program.
`down_kernel` is h = x D^T for so few tokens. Sums run in a fixed order, without atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loragraft.kernels.tiles import dot_ranks

MAX_TOKENS = 16
GEMV_TOKENS = 2  # from here on tensor cores are cheaper: the GEMV's arithmetic grows with the tokens
MAGIC = 0x4B000000  # float32 2^23: or-ing bits into its mantissa adds them

Config = dict[str, int]
GEMV_CONFIGS: dict[str, Config] = {
    "4x128-1w": {"BN": 4, "BW": 128, "num_warps": 1},
    "8x128-1w": {"BN": 8, "BW": 128, "num_warps": 1, "maxnreg": 168},
    "8x128-2w": {"BN": 8, "BW": 128, "num_warps": 2},
    "16x128-4w": {"BN": 16, "BW": 128, "num_warps": 4},
    "16x128-2w": {"BN": 16, "BW": 128, "num_warps": 2},
    "8x64-1w": {"BN": 8, "BW": 64, "num_warps": 1},
    "16x64-1w": {"BN": 16, "BW": 64, "num_warps": 1},
    "16x64-2w": {"BN": 16, "BW": 64, "num_warps": 2},
    "32x128-4w": {"BN": 32, "BW": 128, "num_warps": 4, "maxnreg": 168},
}
SKINNY_CONFIGS: dict[str, Config] = {
    "32-2w-4s": {"BN": 32, "num_warps": 2, "num_stages": 4},
    "32-4w-5s": {"BN": 32, "num_warps": 4, "num_stages": 5},
    "64-4w-3s": {"BN": 64, "num_warps": 4, "num_stages": 3},
    "64-4w-5s": {"BN": 64, "num_warps": 4, "num_stages": 5},
    "128-4w-4s": {"BN": 128, "num_warps": 4, "num_stages": 4},
}
GEMV_DEFAULT, SKINNY_DEFAULT = "8x128-1w", "32-2w-4s"


@triton.jit
def _halves(b_pair, BF16: tl.constexpr):
    """int32 of two 16-bit floats -> (low, high) in float32."""
    if BF16:
        b_low, b_high = (b_pair << 16).to(tl.float32, bitcast=True), (b_pair & -65536).to(tl.float32, bitcast=True)
    else:
        b_low = (b_pair & 65535).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        b_high = (b_pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return b_low, b_high


@triton.jit
def _code(b_word, magic, j: tl.constexpr):
    """Code j (0..7) of each 32-bit word in float32: masked into 2^23 + 16^i c, and back by one exact FMA.

    Two instructions instead of shift, mask and a conversion at half rate. `magic` is an argument of the kernel because with
    two immediates mask and or do not become one LOP3.
    """
    i: tl.constexpr = j if j < 5 else j - 3
    if j > 4:
        b_word = b_word >> 12
    b_float = ((b_word & (15 << (4 * i))) | magic).to(tl.float32, bitcast=True)
    return b_float * (0.0625**i) - 8388608.0 * 0.0625**i


@triton.jit
def _add_pair(b_acc, b_word, magic, b_pair, j: tl.constexpr, BF16: tl.constexpr):
    """acc [BN, BW] += codes j and j + 1 times their columns of x."""
    b_low, b_high = _halves(b_pair, BF16)
    b_acc += _code(b_word, magic, j) * b_low[None, :]
    return b_acc + _code(b_word, magic, j + 1) * b_high[None, :]


@triton.jit
def gemv_kernel(
    p_x, p_q, p_wscale, p_wzero, p_h, p_up, p_bias, p_y, N, K, W, R, magic,
    BF16: tl.constexpr, HAS_BIAS: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """x int32 [M, K / 2] (pairs), q int32 [N, W] (eight codes a word); programs over (N / BN, M)."""
    BG: tl.constexpr = BW // 8
    o_n, m = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1).to(tl.int64)
    o_w, m_n = tl.arange(0, BW), o_n < N
    p_row = p_q + o_n.to(tl.int64)[:, None] * W
    b_y, b_z = tl.zeros((BN, BG), tl.float32), tl.zeros((BN, BG), tl.float32)
    m_next = m_n[:, None] & (o_w < W)[None, :]
    b_next = tl.load(p_row + o_w[None, :], mask=m_next, other=0, eviction_policy="evict_first")
    for w in range(0, W, BW):
        b_word = b_next.to(tl.uint32, bitcast=True)
        o_next = w + BW + o_w
        m_next = m_n[:, None] & (o_next < W)[None, :]
        b_next = tl.load(p_row + o_next[None, :], mask=m_next, other=0, eviction_policy="evict_first")
        o_g = w // 8 + tl.arange(0, BG)
        m_g = m_n[:, None] & (o_g * 64 < K)[None, :]  # scales of padding may be anything
        b_scale = tl.load(p_wscale + o_g[None, :] * N + o_n[:, None], mask=m_g, other=0.0)
        b_zero = tl.load(p_wzero + o_g[None, :] * N + o_n[:, None], mask=m_g, other=0.0)
        p_pair = p_x + m * (K // 2) + ((w + o_w) * 4)[:, None] + tl.arange(0, 4)[None, :]
        b_pair = tl.load(p_pair, mask=((w + o_w) * 8 < K)[:, None], other=0)
        b_low, b_high = _halves(b_pair, BF16)
        b_z += b_zero.to(tl.float32) * tl.sum(tl.reshape(b_low + b_high, (BG, 32)), axis=1)[None, :]
        b_even, b_odd = tl.split(tl.reshape(b_pair, (BW, 2, 2)))  # pairs (0, 2) and (1, 3) of each word's eight columns
        b_pair0, b_pair2 = tl.split(b_even)
        b_pair1, b_pair3 = tl.split(b_odd)
        b_acc = tl.zeros((BN, BW), tl.float32)
        b_acc = _add_pair(b_acc, b_word, magic, b_pair0, 0, BF16)
        b_acc = _add_pair(b_acc, b_word, magic, b_pair1, 2, BF16)
        b_acc = _add_pair(b_acc, b_word, magic, b_pair2, 4, BF16)
        b_acc = _add_pair(b_acc, b_word, magic, b_pair3, 6, BF16)
        b_y += tl.sum(tl.reshape(b_acc, (BN, BG, 8)), axis=2) * b_scale.to(tl.float32)
    b_out = tl.sum(b_y, axis=1) + tl.sum(b_z, axis=1)
    for r in range(0, R, BR):
        o_r = r + tl.arange(0, BR)
        b_h = tl.load(p_h + m * R + o_r, mask=o_r < R, other=0.0).to(tl.float32)
        p_tile = p_up + o_n.to(tl.int64)[:, None] * R + o_r[None, :]
        b_up = tl.load(p_tile, mask=m_n[:, None] & (o_r < R)[None, :], other=0.0).to(tl.float32)
        b_out += tl.sum(b_up * b_h[None, :], axis=1)
    if HAS_BIAS:
        b_out += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(p_y + m * N + o_n, b_out.to(p_y.dtype.element_ty), mask=m_n)


@triton.jit
def skinny_kernel(
    p_x, p_q, p_wscale, p_wzero, p_h, p_up, p_bias, p_y, M, N, K, KP, R,
    BF16: tl.constexpr, HAS_BIAS: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """x int32 [M, K / 2], M <= 16; codes enter the dots as 128 + c (bf16) or 1024 + c (fp16), exact, and one mask each."""
    OFFSET: tl.constexpr = 128 if BF16 else 1024
    MASK: tl.constexpr = 0x4300 if BF16 else 0x6400
    half = tl.bfloat16 if BF16 else tl.float16
    o_m, o_n, o_pair = tl.arange(0, 16), tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, 32)
    m_m, m_n = o_m < M, o_n < N
    p_codes = p_q + o_n.to(tl.int64)[:, None] * (KP // 2) + o_pair[None, :]
    p_pair = p_x + o_m[:, None] * (K // 2) + o_pair[None, :]
    b_y = tl.zeros((16, BN), tl.float32)
    b_scale = tl.load(p_wscale + o_n, mask=m_n, other=0.0)
    b_zero = tl.load(p_wzero + o_n, mask=m_n, other=0.0)
    for group in range(0, tl.cdiv(K, 64)):
        b_s, b_z = b_scale.to(tl.float32), b_zero.to(tl.float32)
        o_next = (
            tl.minimum(group + 1, tl.cdiv(K, 64) - 1) * N + o_n
        )  # a step ahead, as 16 bits a thread bypass cp.async
        b_scale = tl.load(p_wscale + o_next, mask=m_n, other=0.0)
        b_zero = tl.load(p_wzero + o_next, mask=m_n, other=0.0)
        b_pair = tl.load(p_pair + group * 32, mask=m_m[:, None] & (group * 32 + o_pair < K // 2)[None, :], other=0)
        b_byte = tl.load(p_codes + group * 32, mask=m_n[:, None], other=0).to(tl.int16)
        b_even = (b_pair & 65535).to(tl.int16).to(half, bitcast=True)
        b_odd = (b_pair >> 16).to(tl.int16).to(half, bitcast=True)
        b_low, b_high = _halves(b_pair, BF16)
        b_sum = tl.sum(b_low + b_high, axis=1)
        b_dot = tl.dot(b_even, tl.trans(((b_byte & 15) | MASK).to(half, bitcast=True)))
        b_dot = tl.dot(b_odd, tl.trans((((b_byte >> 4) & 15) | MASK).to(half, bitcast=True)), b_dot)
        b_y += b_dot * b_s[None, :] + b_sum[:, None] * (b_z - OFFSET * b_s)[None, :]
    b_y = dot_ranks(b_y, p_h, p_up, o_m, o_n, M, N, R, 1, R, BR)
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    tl.store(p_y + o_m[:, None] * N + o_n[None, :], b_y.to(p_y.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def down_kernel(p_x, p_down, p_h, K, R, BK: tl.constexpr):
    """h_mr = sum_k x_mk D_rk; programs over (R, M)."""
    r, m = tl.program_id(0), tl.program_id(1)
    b_sum = tl.zeros((BK,), tl.float32)
    for k in range(0, K, BK):
        o_k = k + tl.arange(0, BK)
        b_x = tl.load(p_x + m.to(tl.int64) * K + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        b_sum += b_x * tl.load(p_down + r.to(tl.int64) * K + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    tl.store(p_h + m * R + r, tl.sum(b_sum, axis=0).to(p_h.dtype.element_ty))


def fits(x_MK: Tensor, qweight: Tensor) -> bool:
    """Whether the kernels here take these operands: few tokens of 16 bits, K a multiple of 8, words aligned."""
    (M, K), aligned = x_MK.shape, x_MK.storage_offset() % 2 == 0 and qweight.storage_offset() % 4 == 0
    return M <= MAX_TOKENS and K % 8 == 0 and x_MK.dtype in (torch.bfloat16, torch.float16) and aligned


def skinny_down(x_MK: Tensor, down_RK: Tensor) -> Tensor:
    """x D^T -> [M, R] in x's dtype, accumulated in float32."""
    (M, K), R = x_MK.shape, down_RK.shape[0]
    h_MR = x_MK.new_empty((M, R))
    if R:
        down_kernel[(R, M)](x_MK, down_RK, h_MR, K, R, BK=min(2048, triton.next_power_of_2(K)))
    return h_MR


def skinny_linear(
    x_MK: Tensor, qweight: Tensor, wscale: Tensor, wzero: Tensor, h_MR: Tensor, up_NR: Tensor, bias: Tensor | None,
    config: str | None = None,
) -> Tensor:  # fmt: skip
    """y [M, N] of operands that `fits` accepts; h and up contiguous. config: a key of GEMV_CONFIGS or SKINNY_CONFIGS.

    A GEMV config takes any M here; without a name, the number of tokens chooses. Raises KeyError for another name.
    """
    (M, K), N, R = x_MK.shape, qweight.shape[0], up_NR.shape[1]
    name = config or (GEMV_DEFAULT if M <= GEMV_TOKENS else SKINNY_DEFAULT)
    options = dict({**GEMV_CONFIGS, **SKINNY_CONFIGS}[name])
    y_MN, grid_n = x_MK.new_empty((M, N)), triton.cdiv(N, options["BN"])
    shared = {"BF16": x_MK.dtype == torch.bfloat16, "HAS_BIAS": bias is not None, "BR": 16}
    x_pairs = x_MK.view(torch.int32)
    if name in SKINNY_CONFIGS:
        skinny_kernel[(grid_n,)](
            x_pairs, qweight, wscale, wzero, h_MR, up_NR, bias, y_MN, M, N, K, 2 * qweight.shape[1], R, **shared, **options
        )  # fmt: skip
        return y_MN
    words, W = qweight.view(torch.int32), qweight.shape[1] // 4
    options["BW"] = min(options["BW"], triton.next_power_of_2(W))
    gemv_kernel[(grid_n, M)](
        x_pairs, words, wscale, wzero, h_MR, up_NR, bias, y_MN, N, K, W, R, MAGIC, **shared, **options
    )  # fmt: skip
    return y_MN
