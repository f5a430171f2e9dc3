"""left^T right over many rows and few columns of left: the gradients of an adapter, dA = (g a)^T codes and dB = dy^T h.

    out_rc = sum_m left_mr scale_m right_mc          left [M, r], right [M, C] float or INT8 codes, scale [M, 1] or none
    dA     = (sum_m g_mr a_m codes_mc) H * smooth    [r, K]     the rotation and smoothing of x, on the small result
    dB     = (sum_m h_mr dy_mn)^T                    [N, r]

A reduction over tokens has few output tiles, so the tokens are split among programs. One launch takes both products of a layer;
a second one adds up their float32 parts in a fixed order and writes dA and dB as they are wanted. Codes are read as 32-bit words of
four columns, one product for each: a tensor core's operand has neighbouring tokens in a register, and bytes would have to be
fetched from shared memory one by one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loragraft.kernels.layout import apply_hadamard, on_device, uses_triton
from loragraft.kernels.tiles import hadamard_tile

PROGRAMS = 528  # at most; four for each multiprocessor of a large card
ROWS = 128  # tokens of a step
COLUMNS = {1: 128, 2: 64, 4: 64}  # of a program, by bytes of an element: 128 bytes of a row
STAGES = 3  # of the loop's loads
# Byte $BYTE of words $1 and $2 as two bf16: the low 7 bits below the exponent of 128 are 128 + v, the sign's bit there 128 or 256.
BYTE_TO_BF16 = tl.constexpr(
    tuple(
        f"""
{{
.reg .b32 pair, low, high, one;
mov.b32 one, 0x3F803F80;
prmt.b32 pair, $1, $2, 0x{4 + byte}{4 + byte}{byte}{byte};
lop3.b32 low, pair, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 high, pair, 0x00800080, 0xC300C300, 0xEA;
fma.rn.bf16x2 $0, low, one, high;
}}
"""
        for byte in range(4)
    )
)
CASES = ((77, 5, 132), (1, 40, 64), (300, 16, 192))  # (M, r, C); four divides C for codes


@triton.jit
def _scaled(b_left, p_scale, o_m, M, HAS_SCALE: tl.constexpr):
    """left * scale [BM, BR] in left's dtype."""
    if HAS_SCALE:
        b_scale = tl.load(p_scale + o_m, mask=o_m < M, other=0.0)
        b_left = (b_left.to(tl.float32) * b_scale[:, None]).to(b_left.dtype)
    return b_left


@triton.jit
def _byte_dot(acc, b_left, b_word, BYTE: tl.constexpr, ASM: tl.constexpr):
    """acc += left^T times one byte, signed, of every word."""
    if ASM:
        b_code = tl.inline_asm_elementwise(
            BYTE_TO_BF16[BYTE], "=r,r,r", [b_word], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        b_code = ((b_word << (24 - 8 * BYTE)) >> 24).to(b_left.dtype)
    return tl.dot(tl.trans(b_left), b_code, acc, input_precision="ieee")


@triton.jit
def _codes_part(
    p_left, p_words, p_scale, p_out, block, first, last, M, R, C, s_lm, s_wm, s_out,
    HAS_SCALE: tl.constexpr, ASM: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """BC columns of INT8 codes, as words of four."""
    BW: tl.constexpr = BC // 4
    o_m, o_r, o_w = first + tl.arange(0, BM), tl.arange(0, BR), block * BW + tl.arange(0, BW)
    p_l = p_left + o_m.to(tl.int64)[:, None] * s_lm + o_r[None, :]
    p_w = p_words + o_m.to(tl.int64)[:, None] * s_wm + o_w[None, :]
    acc0 = tl.zeros((BR, BW), tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for _ in range(first, last, BM):
        b_left = tl.load(p_l, mask=(o_m < M)[:, None] & (o_r < R)[None, :], other=0.0)
        b_left = _scaled(b_left, p_scale, o_m, M, HAS_SCALE)
        b_word = tl.load(p_w, mask=(o_m < M)[:, None] & (o_w < C // 4)[None, :], other=0)
        acc0 = _byte_dot(acc0, b_left, b_word, 0, ASM)
        acc1 = _byte_dot(acc1, b_left, b_word, 1, ASM)
        acc2 = _byte_dot(acc2, b_left, b_word, 2, ASM)
        acc3 = _byte_dot(acc3, b_left, b_word, 3, ASM)
        o_m += BM
        p_l += BM * s_lm
        p_w += BM * s_wm
    acc = tl.reshape(tl.join(tl.join(acc0, acc2), tl.join(acc1, acc3)), (BR, BC))
    o_c = block * BC + tl.arange(0, BC)
    p_tile = p_out + o_r[:, None].to(tl.int64) * s_out + o_c[None, :]
    tl.store(p_tile, acc, mask=(o_r < R)[:, None] & (o_c < C)[None, :])


@triton.jit
def _float_part(
    p_left, p_right, p_scale, p_out, block, first, last, M, R, C, s_lm, s_rm, s_out,
    HAS_SCALE: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """BC columns of a float matrix."""
    o_m, o_r, o_c = first + tl.arange(0, BM), tl.arange(0, BR), block * BC + tl.arange(0, BC)
    p_l = p_left + o_m.to(tl.int64)[:, None] * s_lm + o_r[None, :]
    p_r = p_right + o_m.to(tl.int64)[:, None] * s_rm + o_c[None, :]
    acc = tl.zeros((BR, BC), tl.float32)
    for _ in range(first, last, BM):
        b_left = tl.load(p_l, mask=(o_m < M)[:, None] & (o_r < R)[None, :], other=0.0)
        b_left = _scaled(b_left, p_scale, o_m, M, HAS_SCALE)
        b_right = tl.load(p_r, mask=(o_m < M)[:, None] & (o_c < C)[None, :], other=0.0)
        acc = tl.dot(tl.trans(b_left), b_right, acc, input_precision="ieee")
        o_m += BM
        p_l += BM * s_lm
        p_r += BM * s_rm
    p_tile = p_out + o_r[:, None].to(tl.int64) * s_out + o_c[None, :]
    tl.store(p_tile, acc, mask=(o_r < R)[:, None] & (o_c < C)[None, :])


@triton.jit(do_not_specialize=["x_blocks"])
def row_product_kernel(
    p_g, p_x, p_scale, p_h, p_dy, p_part, M, R, K, N, s_gm, s_xm, s_hm, s_dym, rows, x_blocks,
    CODES: tl.constexpr, ASM: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_DY: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """part [splits, R, K + N]: g^T x, then h^T dy. CODES: x is INT8, four codes to a word. Axis 0 of the grid: blocks of BK columns of
    x, then of BN columns of dy; axis 1: `rows` tokens each."""
    block, first = tl.program_id(0), tl.program_id(1) * rows
    last, s_out = min(first + rows, M), K + N
    p_out = p_part + tl.program_id(1).to(tl.int64) * R * s_out
    if block < x_blocks:
        if CODES:
            _codes_part(
                p_g, p_x, p_scale, p_out, block, first, last, M, R, K, s_gm, s_xm, s_out, HAS_SCALE, ASM, BM, BR, BK
            )  # fmt: skip
        else:
            _float_part(p_g, p_x, p_scale, p_out, block, first, last, M, R, K, s_gm, s_xm, s_out, HAS_SCALE, BM, BR, BK)
    elif HAS_DY:
        _float_part(
            p_h, p_dy, p_scale, p_out + K, block - x_blocks, first, last, M, R, N, s_hm, s_dym, s_out, False, BM, BR, BN
        )


@triton.jit
def _sum_of_parts(p_part, o_r, o_c, m_rc, splits, R, s_part, AHEAD: tl.constexpr):
    """[BR, BC] of all parts, first to last; AHEAD of them are fetched at a time."""
    total = tl.zeros(m_rc.shape, tl.float32)
    p_tile = p_part + o_r[:, None].to(tl.int64) * s_part + o_c[None, :]
    o_split = tl.zeros((1, 1), tl.int32)
    for _ in range(0, splits, AHEAD):
        for _ahead in tl.static_range(AHEAD):
            total += tl.load(p_tile, mask=m_rc & (o_split < splits), other=0.0)
            p_tile += R * s_part
            o_split += 1
    return total


@triton.jit(do_not_specialize=["splits", "x_blocks"])
def sum_parts_kernel(
    p_part, p_smooth, p_down, p_up, splits, R, K, KP, N, x_blocks,
    HAS_SMOOTH: tl.constexpr, HADAMARD: tl.constexpr, HAS_DY: tl.constexpr, AHEAD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dA [R, K] = (sum of parts) H * smooth, without columns K to KP, and dB [N, R], transposed. BR ranks of 64 columns a program."""
    block = tl.program_id(0)
    o_r = tl.program_id(1) * BR + tl.arange(0, BR)
    if block < x_blocks:
        o_c = block * 64 + tl.arange(0, 64)
        m_rc = (o_r < R)[:, None] & (o_c < K)[None, :]
        b_down = _sum_of_parts(p_part, o_r, o_c, m_rc, splits, R, KP + N, AHEAD)
        if (
            HADAMARD
        ):  # exact in TF32, which keeps 10 bits of a fraction: of the sum the upper ones first, then what is left
            b_upper = (b_down.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            b_hadamard = hadamard_tile()
            b_rest = tl.dot(b_down - b_upper, b_hadamard, input_precision="tf32")
            b_down = tl.dot(b_upper, b_hadamard, b_rest, input_precision="tf32")
        if HAS_SMOOTH:
            b_down *= tl.load(p_smooth + o_c, mask=o_c < K, other=0.0).to(tl.float32)[None, :]
        p_tile = p_down + o_r[:, None].to(tl.int64) * K + o_c[None, :]
        tl.store(p_tile, b_down.to(p_down.dtype.element_ty), mask=m_rc)
    elif HAS_DY:
        o_n = (block - x_blocks) * 64 + tl.arange(0, 64)
        m_rn = (o_r < R)[:, None] & (o_n < N)[None, :]
        b_up = tl.trans(_sum_of_parts(p_part + KP, o_r, o_n, m_rn, splits, R, KP + N, AHEAD))
        p_rows = p_up + o_n[:, None].to(tl.int64) * R + o_r[None, :]
        tl.store(p_rows, b_up.to(p_up.dtype.element_ty), mask=(o_n < N)[:, None] & (o_r < R)[None, :])


def _columns(right_MC: Tensor) -> int:
    return COLUMNS[right_MC.element_size()]


def count_blocks(x_MK: Tensor, dy_MN: Tensor | None) -> tuple[int, int]:
    """Blocks of columns of x and of dy, each of one program per split."""
    of_x = triton.cdiv(x_MK.shape[1], _columns(x_MK))
    return of_x, 0 if dy_MN is None else triton.cdiv(dy_MN.shape[1], _columns(dy_MN))


def split_rows(M: int, blocks: int) -> tuple[int, int]:
    """(tokens of a program, number of splits)."""
    splits = max(1, min(PROGRAMS // max(blocks, 1), triton.cdiv(M, ROWS)))
    rows = triton.cdiv(triton.cdiv(M, splits), ROWS) * ROWS
    return rows, triton.cdiv(M, rows)


def _launch(
    g_Mr: Tensor, x_MK: Tensor, scale_M1: Tensor | None, h_Mr: Tensor | None, dy_MN: Tensor | None,
    smooth_K: Tensor | None, hadamard: bool, down_rK: Tensor, up_Nr: Tensor | None,
) -> None:  # fmt: skip
    (M, r), KP, N = g_Mr.shape, x_MK.shape[1], 0 if dy_MN is None else dy_MN.shape[1]
    codes = x_MK.dtype == torch.int8
    blocks = count_blocks(x_MK, dy_MN)
    rows, splits = split_rows(M, sum(blocks))
    part_SrC = g_Mr.new_empty((splits, r, KP + N), dtype=torch.float32)
    x_words = x_MK.view(torch.int32) if codes else x_MK
    strides = (0 if t is None else t.stride(0) for t in (g_Mr, x_words, h_Mr, dy_MN))
    K = down_rK.shape[1]
    down_blocks = triton.cdiv(K, 64)
    with on_device(g_Mr):
        row_product_kernel[(sum(blocks), splits)](
            g_Mr, x_words, scale_M1, h_Mr, dy_MN, part_SrC, M, r, KP, N, *strides, rows, blocks[0],
            CODES=codes, ASM=g_Mr.is_cuda and g_Mr.dtype == torch.bfloat16, HAS_SCALE=scale_M1 is not None,
            HAS_DY=dy_MN is not None, BM=ROWS, BR=max(16, triton.next_power_of_2(r)), BK=_columns(x_MK),
            BN=64 if dy_MN is None else _columns(dy_MN), num_warps=4, num_stages=STAGES,
        )  # fmt: skip
        sum_parts_kernel[(down_blocks + triton.cdiv(N, 64), triton.cdiv(r, 16))](
            part_SrC, smooth_K, down_rK, up_Nr, splits, r, K, KP, N, down_blocks,
            HAS_SMOOTH=smooth_K is not None, HADAMARD=hadamard, HAS_DY=dy_MN is not None, AHEAD=8, BR=16,
        )  # fmt: skip


def _check(name: str, left_Mr: Tensor, right_MC: Tensor) -> None:
    if left_Mr.shape[0] != right_MC.shape[0] or left_Mr.stride(1) != 1 or right_MC.stride(1) != 1:
        raise ValueError(
            f"{name}: left {tuple(left_Mr.shape)} and right {tuple(right_MC.shape)} must be [M, r] and [M, C], rows contiguous"
        )
    if right_MC.dtype == torch.int8 and (right_MC.shape[1] % 4 or right_MC.stride(0) % 4):
        raise ValueError(
            f"{name}: codes {tuple(right_MC.shape)} are read four at a time; pad their columns with zeros, as `padded` does"
        )


def _reference(left_Mr: Tensor, right_MC: Tensor, scale_M1: Tensor | None) -> Tensor:
    left_Mr = left_Mr if scale_M1 is None else left_Mr * scale_M1.to(left_Mr.dtype)
    return (left_Mr.T @ right_MC.to(left_Mr.dtype)).float()


def row_product(left_Mr: Tensor, right_MC: Tensor, scale_M1: Tensor | None = None) -> Tensor:
    """left^T (right * scale) -> float32 [r, C]; both with unit stride along the last axis. For use inside an op.

    Raises ValueError if the shapes do not fit, or for INT8 codes whose columns four does not divide.
    """
    _check("row_product", left_Mr, right_MC)
    if not uses_triton(left_Mr):
        return _reference(left_Mr, right_MC, scale_M1)
    out_rC = left_Mr.new_empty((left_Mr.shape[1], right_MC.shape[1]), dtype=torch.float32)
    _launch(left_Mr, right_MC, scale_M1, None, None, None, False, out_rC, None)
    return out_rC


@torch.library.custom_op("loragraft::adapter_gradients", mutates_args=())
def _adapter_gradients(
    g_Mr: Tensor, x_MK: Tensor, scale_M1: Tensor | None, h_Mr: Tensor, dy_MN: Tensor, smooth_K: Tensor | None,
    hadamard: bool, K: int, down_dtype: torch.dtype, up_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not uses_triton(g_Mr):
        down_rK = _reference(g_Mr, x_MK, scale_M1)[:, :K]
        down_rK = apply_hadamard(down_rK) if hadamard else down_rK
        down_rK = down_rK if smooth_K is None else down_rK * smooth_K.float()
        up_Nr = _reference(h_Mr, dy_MN, None).T
        whole = torch.contiguous_format
        return down_rK.to(down_dtype, copy=True, memory_format=whole), up_Nr.to(
            up_dtype, copy=True, memory_format=whole
        )
    down_rK = g_Mr.new_empty((g_Mr.shape[1], K), dtype=down_dtype)
    up_Nr = dy_MN.new_empty((dy_MN.shape[1], h_Mr.shape[1]), dtype=up_dtype)
    _launch(g_Mr, x_MK, scale_M1, h_Mr, dy_MN, smooth_K, hadamard, down_rK, up_Nr)
    return down_rK, up_Nr


@_adapter_gradients.register_fake
def _(g_Mr, x_MK, scale_M1, h_Mr, dy_MN, smooth_K, hadamard, K, down_dtype, up_dtype):
    r, N = g_Mr.shape[1], dy_MN.shape[1]
    return g_Mr.new_empty((r, K), dtype=down_dtype), dy_MN.new_empty((N, r), dtype=up_dtype)


def adapter_gradients(
    g_Mr: Tensor, x_MK: Tensor, scale_M1: Tensor | None, h_Mr: Tensor, dy_MN: Tensor, smooth_K: Tensor | None,
    hadamard: bool, K: int, down_dtype: torch.dtype, up_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dA [r, K], dB [N, r]), contiguous, of g = dy B, h = x A^T and x: raw, or INT8 codes [M, Kp] whose columns from K on are padding.

    Rows of every matrix have unit stride. Raises ValueError if the shapes do not fit.
    """
    _check("adapter_gradients", g_Mr, x_MK)
    _check("adapter_gradients", h_Mr, dy_MN)
    result: tuple[Tensor, Tensor] = _adapter_gradients(
        g_Mr, x_MK, scale_M1, h_Mr, dy_MN, smooth_K, hadamard, K, down_dtype, up_dtype
    )
    return result
