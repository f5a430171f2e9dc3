"""W4A16 linear for few tokens (adaLN modulation, time embedding): UINT4 weights, 16- or 32-bit x, optional branch.

    W_nk = c_nk w_Gn + z_Gn                                   wscale w_Gn, wzero z_Gn (bfloat16), G = k // 64, c in 0..15
    y    = x W^T  +  (x [D; A]^T) [U, B]^T  +  bias           float32 accumulation
    dx   = dy W   +  (dy [U, B]) [D; A]
    dA   = (dy B)^T x,  dB = dy^T (x A^T)

x is not quantized, so there is neither smoothing nor rotation, and x itself is what dA reads. The layout of codes, scales
and zeros is AWQ's as in nunchaku's `gemv_awq`, in plain row-major order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loragraft.kernels import branch, w4a16_skinny
from loragraft.kernels.layout import GROUP, LinearCase, on_device, unpack_uint4, uses_triton
from loragraft.kernels.tiles import dot_ranks, load_nibbles

CASES = (
    LinearCase(1, 130, 256, R=0, r=0),
    LinearCase(1, 40, 64, R=0, r=4, bias=False),
    LinearCase(7, 96, 192),
    LinearCase(77, 40, 100, R=5, r=20),
    LinearCase(2, 130, 1280, R=0, r=8),
    LinearCase(16, 40, 104, R=0, r=20),
)


def dequantize_w4a16(qweight: Tensor, wscale: Tensor, wzero: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """W = c w + z, [N, Kp] in dtype; columns from K on are padding."""
    (G, N), c_NK = wscale.shape, unpack_uint4(qweight)
    scale_NG1, zero_NG1 = wscale.to(dtype).T[..., None], wzero.to(dtype).T[..., None]
    return c_NK.view(N, G, GROUP).to(dtype).mul_(scale_NG1).add_(zero_NG1).view(N, -1)


def w4a16_reference(
    x: Tensor, qweight: Tensor, wscale: Tensor, wzero: Tensor, lora_down: Tensor, lora_up: Tensor, bias: Tensor | None,
    *, adapter_down: Tensor | None = None, adapter_up: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The formula in plain torch and in x's dtype (float64 is the oracle); autograd through it is the gradient."""
    x_MK = x.reshape(-1, x.shape[-1])
    y_MN = x_MK @ dequantize_w4a16(qweight, wscale, wzero, x.dtype)[:, : x_MK.shape[1]].T
    y_MN = y_MN + branch.branch_reference(x_MK, lora_down, lora_up, adapter_down, adapter_up)
    y_MN = y_MN if bias is None else y_MN + bias.to(x.dtype)
    return y_MN.view(*x.shape[:-1], -1)


@triton.jit
def _load_weight(p_q, p_wscale, p_wzero, o_n, group, N, KP):
    """Tile [BN, 64] of W in float32: one group of columns."""
    b_scale = tl.load(p_wscale + group * N + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    b_zero = tl.load(p_wzero + group * N + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    b_codes = load_nibbles(p_q, o_n, group * 64, N, KP, 64)
    return b_codes.to(tl.float32) * b_scale[:, None] + b_zero[:, None]


@triton.jit
def w4a16_fwd_kernel(
    p_x, p_q, p_wscale, p_wzero, p_h, p_up, p_bias, p_y, M, N, K, KP, R,
    HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    o_m, o_n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    o_row = o_m.to(tl.int64)
    b_y = tl.zeros((BM, BN), tl.float32)
    for group in range(0, tl.cdiv(K, 64)):
        o_k = group * 64 + tl.arange(0, 64)
        p_tile = p_x + o_row[:, None] * K + o_k[None, :]
        b_x = tl.load(p_tile, mask=(o_m < M)[:, None] & (o_k < K)[None, :], other=0.0)
        b_w = _load_weight(p_q, p_wscale, p_wzero, o_n, group, N, KP)
        b_y = tl.dot(b_x, tl.trans(b_w.to(b_x.dtype)), b_y, input_precision="ieee")
    b_y = dot_ranks(b_y, p_h, p_up, o_m, o_n, M, N, R, 1, R, BR)
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    m_y = (o_m < M)[:, None] & (o_n < N)[None, :]
    tl.store(p_y + o_row[:, None] * N + o_n[None, :], b_y.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit
def w4a16_dx_kernel(
    p_dy, p_q, p_wscale, p_wzero, p_g, p_down, p_dx, M, N, K, KP, R,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    o_m, group = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    b_dx = tl.zeros((BM, 64), tl.float32)
    for n in range(0, N, BN):
        o_n = n + tl.arange(0, BN)
        p_tile = p_dy + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
        b_dy = tl.load(p_tile, mask=(o_m < M)[:, None] & (o_n < N)[None, :], other=0.0)
        b_w = _load_weight(p_q, p_wscale, p_wzero, o_n, group, N, KP)
        b_dx = tl.dot(b_dy, b_w.to(b_dy.dtype), b_dx, input_precision="ieee")
    o_k = group * 64 + tl.arange(0, 64)
    b_dx = dot_ranks(b_dx, p_g, p_down, o_m, o_k, M, K, R, K, 1, BR)
    m_dx = (o_m < M)[:, None] & (o_k < K)[None, :]
    tl.store(p_dx + o_m.to(tl.int64)[:, None] * K + o_k[None, :], b_dx.to(p_dx.dtype.element_ty), mask=m_dx)


@torch.library.custom_op("loragraft::w4a16_linear", mutates_args=())
def _w4a16_linear(
    x_MK: Tensor, qweight: Tensor, wscale: Tensor, wzero: Tensor, lora_down: Tensor, lora_up: Tensor,
    bias: Tensor | None, adapter_down: Tensor | None, adapter_up: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, h)."""
    (M, K), N = x_MK.shape, qweight.shape[0]
    down_RK = branch.join(lora_down, adapter_down, 0, x_MK.dtype)
    up_NR = branch.join(lora_up, adapter_up, 1, x_MK.dtype)
    if uses_triton(x_MK) and w4a16_skinny.fits(x_MK, qweight):
        with on_device(x_MK):
            h_MR = w4a16_skinny.skinny_down(x_MK, down_RK.contiguous())
            return w4a16_skinny.skinny_linear(x_MK, qweight, wscale, wzero, h_MR, up_NR.contiguous(), bias), h_MR
    h_MR = x_MK @ down_RK.T
    if not uses_triton(x_MK):
        y_MN = x_MK @ dequantize_w4a16(qweight, wscale, wzero)[:, :K].to(x_MK.dtype).T + h_MR @ up_NR.T
        return (y_MN if bias is None else y_MN + bias.to(y_MN.dtype)), h_MR
    y_MN, BM = x_MK.new_empty((M, N)), 64 if M > 16 else 16
    with on_device(x_MK):
        w4a16_fwd_kernel[(triton.cdiv(M, BM), triton.cdiv(N, 64))](
            x_MK, qweight, wscale, wzero, h_MR, up_NR, bias, y_MN, M, N, K, 2 * qweight.shape[1], up_NR.shape[1],
            HAS_BIAS=bias is not None, BM=BM, BN=64, BR=16,
        )  # fmt: skip
    return y_MN, h_MR


@_w4a16_linear.register_fake
def _(x_MK, qweight, wscale, wzero, lora_down, lora_up, bias, adapter_down, adapter_up):
    rank = lora_down.shape[0] + (0 if adapter_down is None else adapter_down.shape[0])
    return x_MK.new_empty((x_MK.shape[0], qweight.shape[0])), x_MK.new_empty((x_MK.shape[0], rank))


@torch.library.custom_op("loragraft::w4a16_dx", mutates_args=())
def _w4a16_dx(dy_MN: Tensor, g_MR: Tensor, down_RK: Tensor, qweight: Tensor, wscale: Tensor, wzero: Tensor) -> Tensor:
    """dx = dy W + g [D; A]."""
    (M, N), (R, K) = dy_MN.shape, down_RK.shape
    if not uses_triton(dy_MN):
        return dy_MN @ dequantize_w4a16(qweight, wscale, wzero)[:, :K].to(dy_MN.dtype) + g_MR @ down_RK
    dx_MK, BM = dy_MN.new_empty((M, K)), 64 if M > 16 else 16
    with on_device(dy_MN):
        w4a16_dx_kernel[(triton.cdiv(M, BM), triton.cdiv(K, GROUP))](
            dy_MN, qweight, wscale, wzero, g_MR, down_RK, dx_MK, M, N, K, 2 * qweight.shape[1], R, BM=BM, BN=64, BR=16
        )  # fmt: skip
    return dx_MK


@_w4a16_dx.register_fake
def _(dy_MN, g_MR, down_RK, qweight, wscale, wzero):
    return dy_MN.new_empty((dy_MN.shape[0], down_RK.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_MK, *weights, _bias, adapter_down, adapter_up = inputs
    ctx.trains = any(ctx.needs_input_grad[7:9])
    kept = (output[1], x_MK) if ctx.trains else (None, None)
    ctx.save_for_backward(*kept, *weights, adapter_down, adapter_up)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy_MN: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    h_MR, x_MK, qweight, wscale, wzero, lora_down, lora_up, adapter_down, adapter_up = ctx.saved_tensors
    dy_MN = dy_MN.contiguous()
    g_MR = dy_MN @ branch.join(lora_up, adapter_up, 1, dy_MN.dtype)
    dx_MK, grad_down, grad_up = None, None, None
    if ctx.needs_input_grad[0]:
        down_RK = branch.join(lora_down, adapter_down, 0, dy_MN.dtype)
        dx_MK = _w4a16_dx(dy_MN, g_MR, down_RK, qweight, wscale, wzero)
    if ctx.trains:
        grad_down, grad_up = branch.adapter_gradients(
            dy_MN, g_MR, h_MR, x_MK, None, None, None, False, adapter_down, adapter_up
        )
    return dx_MK, *(None,) * 6, grad_down, grad_up


_w4a16_linear.register_autograd(_backward, setup_context=_setup_context)


def w4a16_linear(
    x: Tensor, qweight: Tensor, wscale: Tensor, wzero: Tensor, lora_down: Tensor, lora_up: Tensor, bias: Tensor | None,
    *, adapter_down: Tensor | None = None, adapter_up: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [..., K] -> y [..., N] in x's dtype; gradients for x, adapter_down and adapter_up only.

    qweight uint8 [N, Kp/2], wscale and wzero bfloat16 [Kp/64, N], lora_down [R, K] and lora_up [N, R] (R may be 0),
    bias [N], adapter_down [r, K], adapter_up [N, r] (already times alpha / r). x is kept only if an adapter is trained.
    Raises ValueError for a shape that does not fit.
    """
    adapter_down, adapter_up = branch.trainable_rank(adapter_down), branch.trainable_rank(adapter_up)
    branch.check_shapes("w4a16_linear", x, qweight, lora_down, lora_up, bias, None, adapter_down, adapter_up, False)
    branch.check_groups("w4a16_linear", qweight, wscale=wscale, wzero=wzero)
    y_MN, _ = _w4a16_linear(
        x.reshape(-1, x.shape[-1]).contiguous(),
        qweight,
        wscale,
        wzero,
        lora_down,
        lora_up,
        bias,
        adapter_down,
        adapter_up,
    )
    return y_MN.view(*x.shape[:-1], -1)
