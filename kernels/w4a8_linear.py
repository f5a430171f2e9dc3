"""Native W4A8 linear: UINT4 weight codes in integer groups inside INT8, INT8 activations, and a 16-bit low-rank branch.

    W_nk  = s_n I_nk,  I_nk = (u_nk - z_Gn) s_Gn in INT8     row_scale s_n, group_scale s_Gn, group_zero z_Gn, G = k // g
    xq, a = quantize_activation(x, smooth, hadamard, bits=8)
    y     = a_m s_n (xq . I^T)  +  (x [D; A]^T) [U, B]^T  +  bias                   the sum over K is exact in INT32
    dx    = (dy W) H / smooth   +  (dy [U, B]) [D; A]                               rounding of x: straight through
    dA    = (dy B)^T x,  dB = dy^T (x A^T)                                          x raw, or rebuilt from xq and a

Progressive groups: QServe (arXiv 2405.04532, section 4.1), where |I| <= 119 before the second level keeps (u - z) s in
INT8. Branch and smoothing: SVDQuant (arXiv 2411.05007). The branch reads raw x. g is 64 or 128.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loragraft.kernels import branch
from loragraft.kernels.act_quant import (
    dequantize_activation,
    quantize_activation,
    quantize_reference,
    smooth_and_rotate,
)
from loragraft.kernels.layout import LinearCase, on_device, padded, unpack_uint4, uses_triton
from loragraft.kernels.matmul import matmul
from loragraft.kernels.tiles import dot_ranks, hadamard_tile, load_nibbles

CASES = (
    LinearCase(77, 96, 192),
    LinearCase(1, 40, 128, R=0, r=4, bias=False),
    LinearCase(7, 130, 320, R=24, r=0, hadamard=True),
    LinearCase(7, 40, 64, R=16, r=3, hadamard=True),
    LinearCase(33, 96, 256, R=0, r=0, group=128),
    LinearCase(5, 40, 100, R=5, r=20),
    LinearCase(7, 130, 1280, hadamard=True, group=128),
)


def weight_int8(qweight: Tensor, group_scale: Tensor, group_zero: Tensor) -> Tensor:
    """I = (u - z) s, int8 [N, Kp]."""
    (G, N), u_NK = group_scale.shape, unpack_uint4(qweight).view(torch.int8)
    zero_NG1, scale_NG1 = group_zero.view(torch.int8).T[..., None], group_scale.view(torch.int8).T[..., None]
    return ((u_NK.view(N, G, -1) - zero_NG1) * scale_NG1).view(N, -1)


def dequantize_w4a8(
    qweight: Tensor, row_scale: Tensor, group_scale: Tensor, group_zero: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """W = s_n (u - z) s, [N, Kp] in dtype: still smoothed and rotated, columns from K on are padding."""
    return weight_int8(qweight, group_scale, group_zero).to(dtype).mul_(row_scale.to(dtype)[:, None])


def w4a8_reference(
    x: Tensor, qweight: Tensor, row_scale: Tensor, group_scale: Tensor, group_zero: Tensor, smooth: Tensor | None,
    lora_down: Tensor, lora_up: Tensor, bias: Tensor | None, *, hadamard: bool,
    adapter_down: Tensor | None = None, adapter_up: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The formula in plain torch and in x's dtype (float64 is the oracle); autograd through it is the gradient."""
    x_MK = x.reshape(-1, x.shape[-1])
    rotated_MK = smooth_and_rotate(x_MK, smooth, hadamard)
    codes_MK, scale_M1 = quantize_reference(rotated_MK, bits=8)
    K = x_MK.shape[1]
    rounded_MK = dequantize_activation(codes_MK, scale_M1, x.dtype)[:, :K]
    rotated_MK = rotated_MK + (rounded_MK - rotated_MK).detach()
    y_MN = rotated_MK @ dequantize_w4a8(qweight, row_scale, group_scale, group_zero, x.dtype)[:, :K].T
    y_MN = y_MN + branch.branch_reference(x_MK, lora_down, lora_up, adapter_down, adapter_up)
    y_MN = y_MN if bias is None else y_MN + bias.to(x.dtype)
    return y_MN.view(*x.shape[:-1], -1)


@triton.jit
def _load_int8(p_q, p_group_scale, p_group_zero, o_n, k, N, KP, g, BK: tl.constexpr):
    """Tile [BN, BK] of I; BK divides g, so one scale and zero per row."""
    o_group = (k // g) * N + o_n
    b_scale = tl.load(p_group_scale + o_group, mask=o_n < N, other=0).to(tl.int32)
    b_zero = tl.load(p_group_zero + o_group, mask=o_n < N, other=0).to(tl.int32)
    b_codes = load_nibbles(p_q, o_n, k, N, KP, BK)
    return ((b_codes - b_zero[:, None]) * b_scale[:, None]).to(tl.int8)


@triton.jit
def w4a8_fwd_kernel(
    p_x, p_a, p_q, p_row_scale, p_group_scale, p_group_zero, p_h, p_up, p_bias, p_y, M, N, KP, R, g,
    HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    o_m, o_n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.int32)
    for k in range(0, KP, BK):
        p_tile = p_x + o_m.to(tl.int64)[:, None] * KP + (k + tl.arange(0, BK))[None, :]
        b_x = tl.load(p_tile, mask=(o_m < M)[:, None], other=0)
        b_w = _load_int8(p_q, p_group_scale, p_group_zero, o_n, k, N, KP, g, BK)
        acc = tl.dot(b_x, tl.trans(b_w), acc, out_dtype=tl.int32)
    b_a = tl.load(p_a + o_m, mask=o_m < M, other=0.0)
    b_s = tl.load(p_row_scale + o_n, mask=o_n < N, other=0.0)
    b_y = acc.to(tl.float32) * (b_a[:, None] * b_s[None, :])
    b_y = dot_ranks(b_y, p_h, p_up, o_m, o_n, M, N, R, 1, R, BR)
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    m_y = (o_m < M)[:, None] & (o_n < N)[None, :]
    tl.store(p_y + o_m.to(tl.int64)[:, None] * N + o_n[None, :], b_y.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit
def w4a8_dx_kernel(
    p_dy, p_t, p_q, p_row_scale, p_group_scale, p_group_zero, p_smooth, p_g, p_down, p_dx, M, N, NP, K, KP, R, g,
    INT8: tl.constexpr, HADAMARD: tl.constexpr, HAS_SMOOTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """BK = 64 output columns: one Hadamard block. INT8: dy holds codes of dy s_n and t_m their scale; otherwise dy itself.
    NP is the row length of dy."""
    o_m, o_g = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BK)
    k = tl.program_id(1) * BK
    acc = tl.zeros((BM, BK), tl.int32 if INT8 else tl.float32)
    for n in range(0, N, BN):
        o_n = n + tl.arange(0, BN)
        b_w = _load_int8(p_q, p_group_scale, p_group_zero, o_n, k, N, KP, g, BK)
        p_tile = p_dy + o_m.to(tl.int64)[:, None] * NP + o_n[None, :]
        b_dy = tl.load(p_tile, mask=(o_m < M)[:, None] & (o_n < N)[None, :], other=0)
        if INT8:
            acc = tl.dot(b_dy, b_w, acc, out_dtype=tl.int32)
        else:
            b_s = tl.load(p_row_scale + o_n, mask=o_n < N, other=0.0)
            acc = tl.dot(b_dy, (b_w.to(tl.float32) * b_s[:, None]).to(b_dy.dtype), acc, input_precision="ieee")
    b_dx = acc.to(tl.float32)
    if INT8:
        b_dx *= tl.load(p_t + o_m, mask=o_m < M, other=0.0)[:, None]
    if HADAMARD:
        b_dx = tl.dot(b_dx, hadamard_tile(), input_precision="ieee")
    o_k = k + o_g
    if HAS_SMOOTH:
        b_dx /= tl.load(p_smooth + o_k, mask=o_k < K, other=1.0).to(tl.float32)[None, :]
    b_dx = dot_ranks(b_dx, p_g, p_down, o_m, o_k, M, K, R, K, 1, BR)
    m_dx = (o_m < M)[:, None] & (o_k < K)[None, :]
    tl.store(p_dx + o_m.to(tl.int64)[:, None] * K + o_k[None, :], b_dx.to(p_dx.dtype.element_ty), mask=m_dx)


@torch.library.custom_op("loragraft::w4a8_linear", mutates_args=())
def _w4a8_linear(
    x_MK: Tensor, qweight: Tensor, row_scale: Tensor, group_scale: Tensor, group_zero: Tensor, smooth: Tensor | None,
    lora_down: Tensor, lora_up: Tensor, bias: Tensor | None, adapter_down: Tensor | None, adapter_up: Tensor | None,
    hadamard: bool, save_x: str, dgrad: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, h, codes, scale): the last three are what the backward pass keeps."""
    (M, _), N = x_MK.shape, qweight.shape[0]
    codes_MK, scale_M1 = quantize_activation(x_MK, smooth, hadamard, bits=8)
    h_MR = matmul(x_MK, branch.join(lora_down, adapter_down, 0, x_MK.dtype).T)
    up_NR = branch.join(lora_up, adapter_up, 1, x_MK.dtype)
    if not uses_triton(x_MK):
        y_MN = torch._int_mm(codes_MK, weight_int8(qweight, group_scale, group_zero).T).float().mul_(scale_M1)
        y_MN = y_MN.mul_(row_scale) if bias is None else torch.addcmul(bias.float(), y_MN, row_scale)
        return y_MN.addmm_(h_MR.float(), up_NR.float().T).to(x_MK.dtype), h_MR, codes_MK, scale_M1
    y_MN, BM = x_MK.new_empty((M, N)), 64 if M > 16 else 16
    with on_device(x_MK):
        w4a8_fwd_kernel[(triton.cdiv(M, BM), triton.cdiv(N, 64))](
            codes_MK, scale_M1, qweight, row_scale, group_scale, group_zero, h_MR, up_NR, bias, y_MN,
            M, N, codes_MK.shape[1], up_NR.shape[1], codes_MK.shape[1] // group_scale.shape[0],
            HAS_BIAS=bias is not None, BM=BM, BN=64, BK=64, BR=16,
        )  # fmt: skip
    return y_MN, h_MR, codes_MK, scale_M1


@_w4a8_linear.register_fake
def _(x_MK, qweight, row_scale, group_scale, group_zero, smooth, lora_down, lora_up, bias, adapter_down, adapter_up, hadamard, save_x, dgrad):  # fmt: skip
    (M, K), rank = x_MK.shape, lora_down.shape[0] + (0 if adapter_down is None else adapter_down.shape[0])
    codes_MK = x_MK.new_empty((M, padded(K)), dtype=torch.int8)
    scale_M1 = x_MK.new_empty((M, 1), dtype=torch.float32)
    return x_MK.new_empty((M, qweight.shape[0])), x_MK.new_empty((M, rank)), codes_MK, scale_M1


@torch.library.custom_op("loragraft::w4a8_dx", mutates_args=())
def _w4a8_dx(
    dy_MN: Tensor, g_MR: Tensor, down_RK: Tensor, qweight: Tensor, row_scale: Tensor, group_scale: Tensor, group_zero: Tensor,
    smooth: Tensor | None, hadamard: bool, int8: bool,
) -> Tensor:  # fmt: skip
    """dx = (dy W) H / smooth + g [D; A]. int8: dy s_n is quantized per token (its 1/s_n plays the part of `smooth`)."""
    (M, N), (R, K) = dy_MN.shape, down_RK.shape
    t_M1, codes_MN = None, dy_MN
    if int8:
        codes_MN, t_M1 = quantize_activation(dy_MN, 1 / row_scale, hadamard=False, bits=8)
    if not uses_triton(dy_MN):
        if t_M1 is None:
            dense_NK = dequantize_w4a8(qweight, row_scale, group_scale, group_zero)
            return branch.dequantized_dx(dy_MN, dense_NK, smooth, hadamard, g_MR, down_RK)
        acc_MK = torch._int_mm(codes_MN[:, :N], weight_int8(qweight, group_scale, group_zero))
        return branch.finish_dx(acc_MK.float().mul_(t_M1), smooth, hadamard, g_MR, down_RK)
    dx_MK, BM = dy_MN.new_empty((M, K)), 64 if M > 16 else 16
    KP, NP = 2 * qweight.shape[1], codes_MN.shape[1]
    with on_device(dy_MN):
        w4a8_dx_kernel[(triton.cdiv(M, BM), triton.cdiv(K, 64))](
            codes_MN, t_M1, qweight, row_scale, group_scale, group_zero, smooth, g_MR, down_RK, dx_MK,
            M, N, NP, K, KP, R, KP // group_scale.shape[0],
            INT8=int8, HADAMARD=hadamard, HAS_SMOOTH=smooth is not None, BM=BM, BN=64, BK=64, BR=16,
        )  # fmt: skip
    return dx_MK


@_w4a8_dx.register_fake
def _(dy_MN, g_MR, down_RK, qweight, row_scale, group_scale, group_zero, smooth, hadamard, int8):
    return dy_MN.new_empty((dy_MN.shape[0], down_RK.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_MK, *weights, _bias, adapter_down, adapter_up, ctx.hadamard, save_x, ctx.dgrad = inputs
    _, h_MR, codes_MK, scale_M1 = output
    ctx.trains = any(ctx.needs_input_grad[9:11])
    kept = (h_MR, *branch.kept_x(x_MK, codes_MK, scale_M1, save_x)) if ctx.trains else (None,) * 4
    ctx.save_for_backward(*kept, *weights, adapter_down, adapter_up)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy_MN: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    h_MR, x_MK, codes_MK, scale_M1, *quantized, smooth, lora_down, lora_up, adapter_down, adapter_up = ctx.saved_tensors
    dy_MN = dy_MN.contiguous()
    g_MR = matmul(dy_MN, branch.join(lora_up, adapter_up, 1, dy_MN.dtype))
    dx_MK, grad_down, grad_up = None, None, None
    if ctx.needs_input_grad[0]:
        down_RK = branch.join(lora_down, adapter_down, 0, dy_MN.dtype)
        dx_MK = _w4a8_dx(dy_MN, g_MR, down_RK, *quantized, smooth, ctx.hadamard, ctx.dgrad == "int8")
    if ctx.trains:
        grad_down, grad_up = branch.adapter_gradients(
            dy_MN, g_MR, h_MR, x_MK, codes_MK, scale_M1, smooth, ctx.hadamard, adapter_down, adapter_up
        )
    return dx_MK, *(None,) * 8, grad_down, grad_up, None, None, None


_w4a8_linear.register_autograd(_backward, setup_context=_setup_context)


def w4a8_linear(
    x: Tensor, qweight: Tensor, row_scale: Tensor, group_scale: Tensor, group_zero: Tensor, smooth: Tensor | None,
    lora_down: Tensor, lora_up: Tensor, bias: Tensor | None, *, hadamard: bool,
    adapter_down: Tensor | None = None, adapter_up: Tensor | None = None,
    save_x: branch.SaveX = "quantized", dgrad: branch.Dgrad = "dequantized",
) -> Tensor:  # fmt: skip
    """x [..., K] -> y [..., N] in x's dtype; gradients for x, adapter_down and adapter_up only.

    qweight uint8 [N, Kp/2], row_scale float32 [N], group_scale and group_zero uint8 [Kp/g, N] with g 64 or 128, smooth [K],
    lora_down [R, K], lora_up [N, R], bias [N], adapter_down [r, K], adapter_up [N, r] (already times alpha / r).
    save_x: what dA reads, the INT8 codes ("quantized") or x itself ("raw"); neither is kept if no adapter is trained.
    dgrad: dy W with W dequantized to x's dtype, or in INT32 with dy s_n quantized per token ("int8").
    Raises ValueError for a shape or mode that does not fit.
    """
    adapter_down, adapter_up = branch.trainable_rank(adapter_down), branch.trainable_rank(adapter_up)
    branch.check_shapes("w4a8_linear", x, qweight, lora_down, lora_up, bias, smooth, adapter_down, adapter_up, hadamard)
    branch.check_modes("w4a8_linear", save_x, dgrad)
    branch.check_groups("w4a8_linear", qweight, group_scale=group_scale, group_zero=group_zero)
    if group_scale.shape != group_zero.shape or row_scale.shape != qweight.shape[:1]:
        raise ValueError(
            f"w4a8_linear: group_scale {tuple(group_scale.shape)} and group_zero {tuple(group_zero.shape)} must be of one shape, "
            f"and row_scale {tuple(row_scale.shape)} must be [{qweight.shape[0]}]"
        )
    y_MN, *_ = _w4a8_linear(
        x.reshape(-1, x.shape[-1]).contiguous(), qweight, row_scale, group_scale, group_zero, smooth, lora_down, lora_up, bias,
        adapter_down, adapter_up, hadamard, save_x, dgrad,
    )  # fmt: skip
    return y_MN.view(*x.shape[:-1], -1)
