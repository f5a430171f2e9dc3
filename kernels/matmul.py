"""out = a @ b with any strides, and with b optionally held as INT8 codes: b_kn = codes_kn * scale_k,group(n).

a [M, K] and the float b [K, N] share no layout: transposed views are read in place, so this one kernel computes the skinny
products of the low-rank branch (x D^T), of its gradient (dy U) and of the adapter's gradients (g^T x, dy^T h). Products
accumulate in float32, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loragraft.kernels.layout import on_device, uses_triton

CASES = ((7, 5, 77), (77, 16, 130), (1, 40, 64), (8, 192, 33), (3, 24, 0))  # (M, N, K)


@triton.jit
def matmul_kernel(
    p_a, p_b, p_scale, p_out, M, N, K, s_am, s_ak, s_bk, s_bn, n_group, GROUPS,
    HAS_SCALE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    o_m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    o_n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        o_k = (k + tl.arange(0, BK)).to(tl.int64)
        m_a, m_b = (o_m < M)[:, None] & (o_k < K)[None, :], (o_k < K)[:, None] & (o_n < N)[None, :]
        b_a = tl.load(p_a + o_m[:, None] * s_am + o_k[None, :] * s_ak, mask=m_a, other=0.0)
        b_b = tl.load(p_b + o_k[:, None] * s_bk + o_n[None, :] * s_bn, mask=m_b, other=0)
        if HAS_SCALE:
            b_scale = tl.load(p_scale + o_k[:, None] * GROUPS + (o_n // n_group)[None, :], mask=m_b, other=0.0)
            b_b = b_b.to(tl.float32) * b_scale
        acc = tl.dot(b_a, b_b.to(b_a.dtype), acc, input_precision="ieee")
    m_out = (o_m < M)[:, None] & (o_n < N)[None, :]
    tl.store(p_out + o_m[:, None] * N + o_n[None, :], acc.to(p_out.dtype.element_ty), mask=m_out)


@torch.library.custom_op("loragraft::matmul", mutates_args=())
def _matmul(a_MK: Tensor, b_KN: Tensor, scale_KG: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    (M, K), N = a_MK.shape, b_KN.shape[1]
    if not uses_triton(a_MK):
        if scale_KG is not None and scale_KG.shape[1] == 1:
            a_MK = a_MK * scale_KG.T.to(a_MK.dtype)  # the smaller operand of the two
        elif scale_KG is not None:
            b_KN = (b_KN.reshape(K, scale_KG.shape[1], -1) * scale_KG[..., None]).view(K, N)
        return (a_MK @ b_KN.to(a_MK.dtype)).to(out_dtype)
    out_MN = a_MK.new_empty((M, N), dtype=out_dtype)
    if out_MN.numel() == 0:
        return out_MN
    groups = 1 if scale_KG is None else scale_KG.shape[1]
    BM, BN, BK = (min(64, max(16, triton.next_power_of_2(size))) for size in (M, N, 64))
    with on_device(a_MK):
        matmul_kernel[(triton.cdiv(M, BM), triton.cdiv(N, BN))](
            a_MK, b_KN, scale_KG, out_MN, M, N, K, *a_MK.stride(), *b_KN.stride(), N // groups, groups,
            HAS_SCALE=scale_KG is not None, BM=BM, BN=BN, BK=BK,
        )  # fmt: skip
    return out_MN


@_matmul.register_fake
def _(a_MK: Tensor, b_KN: Tensor, scale_KG: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    return a_MK.new_empty((a_MK.shape[0], b_KN.shape[1]), dtype=out_dtype)


def matmul(a_MK: Tensor, b_KN: Tensor, scale_KG: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """a @ b (or a @ (b * scale), scale float32 [K, G] over N / G columns each) -> [M, N] in out_dtype (a's by default).

    b is cast to a's dtype tile by tile. Raises ValueError if the shapes do not fit. Not differentiable.
    """
    if a_MK.ndim != 2 or b_KN.ndim != 2 or a_MK.shape[1] != b_KN.shape[0]:
        raise ValueError(f"matmul: a {tuple(a_MK.shape)} and b {tuple(b_KN.shape)} must be [M, K] and [K, N]")
    result: Tensor = _matmul(a_MK, b_KN, scale_KG, out_dtype or a_MK.dtype)
    return result
