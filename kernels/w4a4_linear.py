"""Interchange W4A4 linear: symmetric INT4 codes in groups of 64 on both sides, and a 16-bit low-rank branch.

    W_nk  = w_Gn q_nk                                         wscale w_Gn, G = k // 64, q in -8..7
    xq, a = quantize_activation(x, smooth, hadamard, bits=4, unsigned, unsigned_from)     unsigned: 0..15 of x + 0.171875
    y     = sum_G a_mG w_Gn (xq_G . q_G^T)  +  (x [D; A]^T) [U, B]^T  +  bias       INT32 within a group, float32 over groups
    dx    = (dy W) H / smooth   +  (dy [U, B]) [D; A]                               rounding of x: straight through
    dA    = (dy B)^T x,  dB = dy^T (x A^T)                                          x raw, or rebuilt from INT8 codes

This is what Nunchaku, Nunchaku Lite and ComfyUI files mean (SVDQuant, arXiv 2411.05007; nunchaku `gemm_w4a4.cuh`), but
for their 16-bit accumulator: here sums over groups are float32. Such files have no rotation; hadamard serves our own.
The INT4 codes would put an error of 13 % into dA, so an x to be saved is quantized once more, to 8 bits per token (0.9 %).
Of an unsigned layer (its columns from unsigned_from on: the single blocks of FLUX join a signed and an unsigned half in one
matrix) the branch and dA read x unshifted, and its bias has the shift's share already taken out of it:
bias = b - 0.171875 sum_k W_nk / smooth_k (nunchaku's `ShiftedLinear`), so that dx is what it is for signed codes.
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
    shift_unsigned,
    smooth_and_rotate,
)
from loragraft.kernels.layout import GROUP, LinearCase, on_device, padded, unpack_int4, uses_triton
from loragraft.kernels.matmul import matmul
from loragraft.kernels.tiles import dot_ranks, hadamard_tile, load_nibbles

CASES = (
    LinearCase(77, 96, 192),
    LinearCase(1, 40, 128, R=0, r=4, bias=False),
    LinearCase(7, 130, 320, R=24, r=0),
    LinearCase(7, 40, 64, R=16, r=3, hadamard=True),
    LinearCase(33, 96, 256, R=0, r=0),
    LinearCase(5, 40, 100, R=5, r=20),
    LinearCase(7, 130, 1280),
    LinearCase(33, 96, 320, unsigned=True),
    LinearCase(5, 40, 100, R=5, r=20, unsigned=True),
    LinearCase(7, 40, 320, unsigned=True, unsigned_from=128),
)


def dequantize_w4a4(qweight: Tensor, wscale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """W = w_Gn q_nk, [N, Kp] in dtype: still smoothed (and rotated), columns from K on are padding."""
    (G, N), q_NK = wscale.shape, unpack_int4(qweight)
    return q_NK.view(N, G, GROUP).to(dtype).mul_(wscale.to(dtype).T[..., None]).view(N, -1)


def w4a4_reference(
    x: Tensor, qweight: Tensor, wscale: Tensor, smooth: Tensor | None, lora_down: Tensor, lora_up: Tensor, bias: Tensor | None,
    *, hadamard: bool, unsigned: bool = False, unsigned_from: int = 0,
    adapter_down: Tensor | None = None, adapter_up: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The formula in plain torch and in x's dtype (float64 is the oracle); autograd through it is the gradient."""
    x_MK = x.reshape(-1, x.shape[-1])
    rotated_MK = smooth_and_rotate(shift_unsigned(x_MK, unsigned_from) if unsigned else x_MK, smooth, hadamard)
    codes_MK, scale_MG = quantize_reference(rotated_MK, bits=4, unsigned=unsigned, unsigned_from=unsigned_from)
    K = x_MK.shape[1]
    rounded_MK = dequantize_activation(codes_MK, scale_MG, x.dtype)[:, :K]
    rotated_MK = rotated_MK + (rounded_MK - rotated_MK).detach()
    y_MN = rotated_MK @ dequantize_w4a4(qweight, wscale, x.dtype)[:, :K].T
    y_MN = y_MN + branch.branch_reference(x_MK, lora_down, lora_up, adapter_down, adapter_up)
    y_MN = y_MN if bias is None else y_MN + bias.to(x.dtype)
    return y_MN.view(*x.shape[:-1], -1)


@triton.jit
def _load_int4(p_q, o_n, k, N, KP, BK: tl.constexpr):
    """Signed codes, int8 [BN, BK]."""
    return ((load_nibbles(p_q, o_n, k, N, KP, BK) ^ 8) - 8).to(tl.int8)


@triton.jit
def w4a4_fwd_kernel(
    p_x, p_a, p_q, p_wscale, p_h, p_up, p_bias, p_y, M, N, KP, R,
    HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    o_m, o_n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    o_row = o_m.to(tl.int64)
    b_y = tl.zeros((BM, BN), tl.float32)
    for group in range(0, KP // 64):
        p_tile = p_x + o_row[:, None] * KP + (group * 64 + tl.arange(0, 64))[None, :]
        b_x = tl.load(p_tile, mask=(o_m < M)[:, None], other=0)
        b_dot = tl.dot(b_x, tl.trans(_load_int4(p_q, o_n, group * 64, N, KP, 64)), out_dtype=tl.int32)
        b_a = tl.load(p_a + o_row * (KP // 64) + group, mask=o_m < M, other=0.0)
        b_w = tl.load(p_wscale + group * N + o_n, mask=o_n < N, other=0.0).to(tl.float32)
        b_y += b_dot.to(tl.float32) * (b_a[:, None] * b_w[None, :])
    b_y = dot_ranks(b_y, p_h, p_up, o_m, o_n, M, N, R, 1, R, BR)
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    m_y = (o_m < M)[:, None] & (o_n < N)[None, :]
    tl.store(p_y + o_row[:, None] * N + o_n[None, :], b_y.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit
def w4a4_dx_kernel(
    p_dy, p_q, p_wscale, p_smooth, p_g, p_down, p_dx, M, N, K, KP, R,
    HADAMARD: tl.constexpr, HAS_SMOOTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One group of 64 output columns (also one Hadamard block) per program."""
    o_m, group = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    b_dx = tl.zeros((BM, 64), tl.float32)
    for n in range(0, N, BN):
        o_n = n + tl.arange(0, BN)
        b_w = tl.load(p_wscale + group * N + o_n, mask=o_n < N, other=0.0).to(tl.float32)
        b_weight = _load_int4(p_q, o_n, group * 64, N, KP, 64).to(tl.float32) * b_w[:, None]
        p_tile = p_dy + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
        b_dy = tl.load(p_tile, mask=(o_m < M)[:, None] & (o_n < N)[None, :], other=0.0)
        b_dx = tl.dot(b_dy, b_weight.to(b_dy.dtype), b_dx, input_precision="ieee")
    if HADAMARD:
        b_dx = tl.dot(b_dx, hadamard_tile(), input_precision="ieee")
    o_k = group * 64 + tl.arange(0, 64)
    if HAS_SMOOTH:
        b_dx /= tl.load(p_smooth + o_k, mask=o_k < K, other=1.0).to(tl.float32)[None, :]
    b_dx = dot_ranks(b_dx, p_g, p_down, o_m, o_k, M, K, R, K, 1, BR)
    m_dx = (o_m < M)[:, None] & (o_k < K)[None, :]
    tl.store(p_dx + o_m.to(tl.int64)[:, None] * K + o_k[None, :], b_dx.to(p_dx.dtype.element_ty), mask=m_dx)


def _keeps_codes(adapter_down: Tensor | None, save_x: str) -> bool:
    return adapter_down is not None and save_x == "quantized"


@torch.library.custom_op("loragraft::w4a4_linear", mutates_args=())
def _w4a4_linear(
    x_MK: Tensor, qweight: Tensor, wscale: Tensor, smooth: Tensor | None, lora_down: Tensor, lora_up: Tensor,
    bias: Tensor | None, adapter_down: Tensor | None, adapter_up: Tensor | None, hadamard: bool, save_x: str,
    unsigned: bool = False, unsigned_from: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, h, codes, scale): the last three are what the backward pass keeps; codes of 8 bits, empty if nothing reads them."""
    M, N = x_MK.shape[0], qweight.shape[0]
    kept = quantize_activation(x_MK if _keeps_codes(adapter_down, save_x) else x_MK[:0], smooth, hadamard, bits=8)
    codes_MK, scale_MG = quantize_activation(
        x_MK, smooth, hadamard, bits=4, unsigned=unsigned, unsigned_from=unsigned_from
    )
    h_MR = matmul(x_MK, branch.join(lora_down, adapter_down, 0, x_MK.dtype).T)
    up_NR = branch.join(lora_up, adapter_up, 1, x_MK.dtype)
    if not uses_triton(x_MK):
        rounded_MK = dequantize_activation(codes_MK, scale_MG, torch.float32)
        y_MN = rounded_MK @ dequantize_w4a4(qweight, wscale).T
        y_MN = (y_MN if bias is None else y_MN.add_(bias)).addmm_(h_MR.float(), up_NR.float().T)
        return y_MN.to(x_MK.dtype), h_MR, *kept
    y_MN, BM = x_MK.new_empty((M, N)), 64 if M > 16 else 16
    with on_device(x_MK):
        w4a4_fwd_kernel[(triton.cdiv(M, BM), triton.cdiv(N, 64))](
            codes_MK, scale_MG, qweight, wscale, h_MR, up_NR, bias, y_MN, M, N, codes_MK.shape[1], up_NR.shape[1],
            HAS_BIAS=bias is not None, BM=BM, BN=64, BR=16,
        )  # fmt: skip
    return y_MN, h_MR, *kept


@_w4a4_linear.register_fake
def _(
    x_MK, qweight, wscale, smooth, lora_down, lora_up, bias, adapter_down, adapter_up, hadamard, save_x,
    unsigned=False, unsigned_from=0,
):  # fmt: skip
    (M, K), rank = x_MK.shape, lora_down.shape[0] + (0 if adapter_down is None else adapter_down.shape[0])
    rows = M if _keeps_codes(adapter_down, save_x) else 0
    codes_MK, scale_M1 = (
        x_MK.new_empty((rows, padded(K)), dtype=torch.int8),
        x_MK.new_empty((rows, 1), dtype=torch.float32),
    )
    return x_MK.new_empty((M, qweight.shape[0])), x_MK.new_empty((M, rank)), codes_MK, scale_M1


@torch.library.custom_op("loragraft::w4a4_dx", mutates_args=())
def _w4a4_dx(
    dy_MN: Tensor, g_MR: Tensor, down_RK: Tensor, qweight: Tensor, wscale: Tensor, smooth: Tensor | None, hadamard: bool
) -> Tensor:
    """dx = (dy W) H / smooth + g [D; A]."""
    (M, N), (R, K) = dy_MN.shape, down_RK.shape
    if not uses_triton(dy_MN):
        return branch.dequantized_dx(dy_MN, dequantize_w4a4(qweight, wscale), smooth, hadamard, g_MR, down_RK)
    dx_MK, BM = dy_MN.new_empty((M, K)), 64 if M > 16 else 16
    with on_device(dy_MN):
        w4a4_dx_kernel[(triton.cdiv(M, BM), triton.cdiv(K, GROUP))](
            dy_MN, qweight, wscale, smooth, g_MR, down_RK, dx_MK, M, N, K, 2 * qweight.shape[1], R,
            HADAMARD=hadamard, HAS_SMOOTH=smooth is not None, BM=BM, BN=64, BR=16,
        )  # fmt: skip
    return dx_MK


@_w4a4_dx.register_fake
def _(dy_MN, g_MR, down_RK, qweight, wscale, smooth, hadamard):
    return dy_MN.new_empty((dy_MN.shape[0], down_RK.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_MK, *weights, _bias, adapter_down, adapter_up, ctx.hadamard, save_x, _unsigned, _from = inputs
    _, h_MR, codes_MK, scale_M1 = output
    ctx.trains = any(ctx.needs_input_grad[7:9])
    kept = (h_MR, *branch.kept_x(x_MK, codes_MK, scale_M1, save_x)) if ctx.trains else (None,) * 4
    ctx.save_for_backward(*kept, *weights, adapter_down, adapter_up)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy_MN: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    h_MR, x_MK, codes_MK, scale_M1, qweight, wscale, smooth, lora_down, lora_up, adapter_down, adapter_up = (
        ctx.saved_tensors
    )
    dy_MN = dy_MN.contiguous()
    g_MR = matmul(dy_MN, branch.join(lora_up, adapter_up, 1, dy_MN.dtype))
    dx_MK, grad_down, grad_up = None, None, None
    if ctx.needs_input_grad[0]:
        down_RK = branch.join(lora_down, adapter_down, 0, dy_MN.dtype)
        dx_MK = _w4a4_dx(dy_MN, g_MR, down_RK, qweight, wscale, smooth, ctx.hadamard)
    if ctx.trains:
        grad_down, grad_up = branch.adapter_gradients(
            dy_MN, g_MR, h_MR, x_MK, codes_MK, scale_M1, smooth, ctx.hadamard, adapter_down, adapter_up
        )
    return dx_MK, *(None,) * 6, grad_down, grad_up, *(None,) * 4


_w4a4_linear.register_autograd(_backward, setup_context=_setup_context)


def w4a4_linear(
    x: Tensor, qweight: Tensor, wscale: Tensor, smooth: Tensor | None, lora_down: Tensor, lora_up: Tensor, bias: Tensor | None,
    *, hadamard: bool, unsigned: bool = False, unsigned_from: int = 0,
    adapter_down: Tensor | None = None, adapter_up: Tensor | None = None,
    save_x: branch.SaveX = "quantized", dgrad: branch.Dgrad = "dequantized",
) -> Tensor:  # fmt: skip
    """x [..., K] -> y [..., N] in x's dtype; gradients for x, adapter_down and adapter_up only.

    qweight uint8 [N, Kp/2] of signed codes, wscale bfloat16 [Kp/64, N], smooth [K], lora_down [R, K], lora_up [N, R],
    bias [N], adapter_down [r, K], adapter_up [N, r] (already times alpha / r).
    unsigned: x is quantized as x + 0.171875, to codes 0..15; the bias is expected to make up for the shift. unsigned_from, a
    multiple of 64: only in the columns from it on.
    save_x: what dA reads, INT8 codes of x ("quantized") or x itself ("raw"); neither is kept if no adapter is trained.
    Raises ValueError for a shape or mode that does not fit, for unsigned with hadamard, and for dgrad="int8": scales per group
    of K and row cannot leave a sum over N.
    """
    adapter_down, adapter_up = branch.trainable_rank(adapter_down), branch.trainable_rank(adapter_up)
    branch.check_shapes("w4a4_linear", x, qweight, lora_down, lora_up, bias, smooth, adapter_down, adapter_up, hadamard)
    branch.check_modes("w4a4_linear", save_x, dgrad)
    if unsigned and hadamard:
        raise ValueError(
            "w4a4_linear: unsigned=True with hadamard=True: a rotation brings the signs back; drop one of them"
        )
    if dgrad == "int8":
        raise ValueError(
            'w4a4_linear: dgrad="int8" needs one weight scale per row (w4a8_linear); with a scale per row and group of 64 the '
            'sum over N cannot stay in integers. Use dgrad="dequantized"'
        )
    branch.check_groups("w4a4_linear", qweight, wscale=wscale)
    y_MN, *_ = _w4a4_linear(
        x.reshape(-1, x.shape[-1]).contiguous(), qweight, wscale, smooth, lora_down, lora_up, bias, adapter_down, adapter_up,
        hadamard, save_x, unsigned, unsigned_from,
    )  # fmt: skip
    return y_MN.view(*x.shape[:-1], -1)
