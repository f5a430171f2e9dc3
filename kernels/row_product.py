"""left^T right over many rows and few columns of left: the gradients of an adapter, dA = (g a)^T codes and dB = dy^T h.

    out_rc = sum_m left_mr scale_m right_mc          left [M, r], right [M, C] float or INT8 codes, scale [M, 1] or none

A reduction over tokens has few output tiles, so the tokens are split among programs; float32 partial sums are added in a
fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loragraft.kernels.layout import on_device, uses_triton

PROGRAMS = {1: 264, 2: 512}  # by bytes of an element: two and four waves of a large card
CASES = ((77, 5, 130), (1, 40, 64), (300, 16, 192))  # (M, r, C)


@triton.jit
def row_product_kernel(
    p_left, p_right, p_scale, p_part, M, R, C, s_lm, s_rm, rows,
    HAS_SCALE: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    o_r, o_c = tl.arange(0, BR), tl.program_id(0) * BC + tl.arange(0, BC)
    first = tl.program_id(1) * rows
    acc = tl.zeros((BR, BC), tl.float32)
    for m in range(first, min(first + rows, M), BM):
        o_m = (m + tl.arange(0, BM)).to(tl.int64)
        m_left = (o_m < M)[:, None] & (o_r < R)[None, :]
        b_left = tl.load(p_left + o_m[:, None] * s_lm + o_r[None, :], mask=m_left, other=0.0)
        if HAS_SCALE:
            b_scale = tl.load(p_scale + o_m, mask=o_m < M, other=0.0)
            b_left = (b_left.to(tl.float32) * b_scale[:, None]).to(b_left.dtype)
        m_right = (o_m < M)[:, None] & (o_c < C)[None, :]
        b_right = tl.load(p_right + o_m[:, None] * s_rm + o_c[None, :], mask=m_right, other=0)
        acc = tl.dot(tl.trans(b_left), b_right.to(b_left.dtype), acc, input_precision="ieee")
    p_out = p_part + (tl.program_id(1) * R + o_r)[:, None].to(tl.int64) * C + o_c[None, :]
    tl.store(p_out, acc, mask=(o_r < R)[:, None] & (o_c < C)[None, :])


@torch.library.custom_op("loragraft::row_product", mutates_args=())
def _row_product(left_MR: Tensor, right_MC: Tensor, scale_M1: Tensor | None) -> Tensor:
    if not uses_triton(left_MR):
        left_MR = left_MR if scale_M1 is None else left_MR * scale_M1.to(left_MR.dtype)
        return (left_MR.T @ right_MC.to(left_MR.dtype)).float()
    (M, R), C = left_MR.shape, right_MC.shape[1]
    size = right_MC.element_size()
    BC, BM = (256 if size == 1 else 64), 64
    blocks = triton.cdiv(C, BC)
    rows = triton.cdiv(triton.cdiv(M, max(1, min(PROGRAMS.get(size, 512) // blocks, triton.cdiv(M, BM)))), BM) * BM
    splits = triton.cdiv(M, rows)
    part_SRC = left_MR.new_empty((splits, R, C), dtype=torch.float32)
    with on_device(left_MR):
        row_product_kernel[(blocks, splits)](
            left_MR, right_MC, scale_M1, part_SRC, M, R, C, left_MR.stride(0), right_MC.stride(0), rows,
            HAS_SCALE=scale_M1 is not None, BM=BM, BR=max(16, triton.next_power_of_2(R)), BC=BC,
        )  # fmt: skip
    return part_SRC.sum(0)


@_row_product.register_fake
def _(left_MR: Tensor, right_MC: Tensor, scale_M1: Tensor | None) -> Tensor:
    return left_MR.new_empty((left_MR.shape[1], right_MC.shape[1]), dtype=torch.float32)


def row_product(left_MR: Tensor, right_MC: Tensor, scale_M1: Tensor | None = None) -> Tensor:
    """left^T (right * scale) -> float32 [r, C]; both with unit stride along the last axis. Not differentiable.

    Raises ValueError if the shapes do not fit.
    """
    if left_MR.shape[0] != right_MC.shape[0] or left_MR.stride(1) != 1 or right_MC.stride(1) != 1:
        raise ValueError(
            f"row_product: left {tuple(left_MR.shape)} and right {tuple(right_MC.shape)} must be [M, r] and [M, C], rows contiguous"
        )
    result: Tensor = _row_product(left_MR, right_MC, scale_M1)
    return result
