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
from torch import Tensor

from loragraft.kernels import branch
from loragraft.kernels.act_quant import (
    dequantize_activation,
    quantize_activation,
    quantize_reference,
    smooth_and_rotate,
)
from loragraft.kernels.gemm import int8_gemm, w4a8_gemm
from loragraft.kernels.hopper_gemm import hopper_gemm, hopper_gemm_runs
from loragraft.kernels.layout import LinearCase, padded, rank_product, rank_rows, unpack_tiles, uses_triton, word_bytes
from loragraft.kernels.shared_codes import shared_codes
from loragraft.kernels.token_quant import quantize_down
from loragraft.kernels.unpack import effective_weight, transposed_int8

CASES = (
    LinearCase(77, 96, 192),
    LinearCase(1, 40, 128, R=0, r=4, bias=False),
    LinearCase(7, 130, 320, R=24, r=0, hadamard=True),
    LinearCase(7, 40, 64, R=16, r=3, hadamard=True),
    LinearCase(33, 96, 256, R=0, r=0, group=128),
    LinearCase(5, 40, 100, R=5, r=20),
    LinearCase(7, 130, 1280, hadamard=True, group=128),
)


def weight_int8(qweight: Tensor, group_words: Tensor) -> Tensor:
    """I = (u - z) s, int8 [N, Kp]; in bytes u s + c - 128, which wraps to the same."""
    scale_GN, offset_GN = (part.to(torch.uint8) for part in word_bytes(group_words))
    bytes_NGg = unpack_tiles(qweight).view(qweight.shape[0], -1, 64) * scale_GN.T[..., None] + offset_GN.T[..., None]
    return (bytes_NGg ^ 128).view(torch.int8).flatten(1)


def dequantize_w4a8(
    qweight: Tensor, row_scale: Tensor, group_words: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """W = s_n (u - z) s, [N, Kp] in dtype: still smoothed and rotated, columns from K on are padding."""
    return weight_int8(qweight, group_words).to(dtype).mul_(row_scale.to(dtype)[:, None])


def w4a8_reference(
    x: Tensor, qweight: Tensor, row_scale: Tensor, group_words: Tensor, smooth: Tensor | None,
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
    y_MN = rotated_MK @ dequantize_w4a8(qweight, row_scale, group_words, x.dtype)[:, :K].T
    y_MN = y_MN + branch.branch_reference(x_MK, lora_down, lora_up, adapter_down, adapter_up)
    y_MN = y_MN if bias is None else y_MN + bias.to(x.dtype)
    return y_MN.view(*x.shape[:-1], -1)


@torch.library.custom_op("loragraft::w4a8_linear", mutates_args=())
def _w4a8_linear(
    x_MK: Tensor, qweight: Tensor, row_scale: Tensor, group_words: Tensor, smooth: Tensor | None,
    lora_down: Tensor, lora_up: Tensor, bias: Tensor | None, adapter_down: Tensor | None, adapter_up: Tensor | None,
    hadamard: bool, save_x: str, dgrad: str, shared: Tensor | None = None, shared_scale: Tensor | None = None,
    shared_h: Tensor | None = None, joined_down: Tensor | None = None, joined_up: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, h, codes, scale): the last three are what the backward pass keeps; codes and scale are empty where x came with
    its own, `shared`, which are then kept, and so is h."""
    down_RK = branch.join(lora_down, adapter_down, 0, x_MK.dtype) if joined_down is None else joined_down
    up_NR = branch.join(lora_up, adapter_up, 1, x_MK.dtype) if joined_up is None else joined_up
    if shared is not None and shared_scale is not None:
        codes_MK, scale_M1, own = shared, shared_scale, _empty_codes(x_MK, 0)
        h_MR = rank_product(x_MK, down_RK.T) if shared_h is None else shared_h
    elif not uses_triton(x_MK):
        codes_MK, scale_M1 = own = quantize_activation(x_MK, smooth, hadamard, bits=8)
        h_MR = rank_product(x_MK, down_RK.T)
    else:
        codes_MK, scale_M1, h_MR = quantize_down(x_MK, smooth, hadamard, down_RK)
        own = codes_MK, scale_M1
    y_MN = w4a8_product(codes_MK, scale_M1, qweight, row_scale, group_words, h_MR, up_NR, bias)
    return y_MN, h_MR if shared_h is None else rank_rows(x_MK[:0], h_MR.shape[1]), *own


def w4a8_product(
    codes_MK: Tensor, scale_M1: Tensor, qweight: Tensor, row_scale: Tensor, group_words: Tensor, h_MR: Tensor, up_NR: Tensor,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """y [M, N] in h's dtype from what is quantized and projected already."""
    if not uses_triton(codes_MK):
        y_MN = torch._int_mm(codes_MK, weight_int8(qweight, group_words).T).float().mul_(scale_M1)
        y_MN = y_MN.mul_(row_scale) if bias is None else torch.addcmul(bias.float(), y_MN, row_scale)
        return y_MN.addmm_(h_MR.float(), up_NR.float().T).to(h_MR.dtype)
    gemm = hopper_gemm if hopper_gemm_runs(codes_MK, h_MR.dtype, up_NR) else w4a8_gemm
    return gemm(codes_MK, scale_M1, qweight, group_words, row_scale, h_MR, up_NR, bias)


def _empty_codes(x_MK: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    return x_MK.new_empty((rows, padded(x_MK.shape[1])), dtype=torch.int8), x_MK.new_empty(
        (rows, 1), dtype=torch.float32
    )


@_w4a8_linear.register_fake
def _(
    x_MK, qweight, row_scale, group_words, smooth, lora_down, lora_up, bias, adapter_down, adapter_up,
    hadamard, save_x, dgrad, shared=None, shared_scale=None, shared_h=None, joined_down=None, joined_up=None,
):  # fmt: skip
    M, rank = x_MK.shape[0], lora_down.shape[0] + (0 if adapter_down is None else adapter_down.shape[0])
    own = _empty_codes(x_MK, M if shared is None else 0)
    return x_MK.new_empty((M, qweight.shape[0])), rank_rows(x_MK if shared_h is None else x_MK[:0], rank), *own


@torch.library.custom_op("loragraft::w4a8_dgrad", mutates_args=())
def _w4a8_dgrad(
    dy_MN: Tensor, up_NR: Tensor, down_RK: Tensor, qweight: Tensor, row_scale: Tensor, group_words: Tensor,
    smooth: Tensor | None, hadamard: bool, given_MR: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx = (dy W) H / smooth + g [D; A] and g = dy [U, B]. Without g given, dy s_n is quantized per token (INT8); with it, W is
    dequantized, and the second result is empty."""
    K = down_RK.shape[1]
    if given_MR is not None:
        nothing = rank_rows(dy_MN[:0], up_NR.shape[1])
        if uses_triton(dy_MN):
            return dy_MN @ effective_weight(qweight, group_words, row_scale, smooth, hadamard, up_NR, down_RK), nothing
        dense_NK = dequantize_w4a8(qweight, row_scale, group_words)
        return branch.dequantized_dx(dy_MN, dense_NK, smooth, hadamard, given_MR, down_RK), nothing
    if not uses_triton(dy_MN):
        g_MR = rank_product(dy_MN, up_NR)
        codes_MN, t_M1 = quantize_activation(dy_MN, 1 / row_scale, hadamard=False, bits=8)
        acc_MK = torch._int_mm(codes_MN[:, : dy_MN.shape[1]], weight_int8(qweight, group_words))
        return branch.finish_dx(acc_MK.float().mul_(t_M1), smooth, hadamard, g_MR, down_RK), g_MR
    codes_MN, t_M1, g_MR = quantize_down(dy_MN, 1 / row_scale, False, up_NR.T)
    weight_KN = transposed_int8(qweight, group_words)[:K]
    inverse_K = None if smooth is None else 1 / smooth.float()
    if hadamard or not hopper_gemm_runs(codes_MN, dy_MN.dtype, down_RK.T):
        return int8_gemm(codes_MN, t_M1, weight_KN, inverse_K, g_MR, down_RK.T, hadamard), g_MR
    inverse_K = torch.ones(K, device=dy_MN.device) if inverse_K is None else inverse_K
    return hopper_gemm(codes_MN, t_M1, weight_KN, None, inverse_K, g_MR, down_RK.T, None), g_MR


@_w4a8_dgrad.register_fake
def _(dy_MN, up_NR, down_RK, qweight, row_scale, group_words, smooth, hadamard, given_MR=None):
    g_MR = rank_rows(dy_MN if given_MR is None else dy_MN[:0], up_NR.shape[1])
    return dy_MN.new_empty((dy_MN.shape[0], down_RK.shape[1])), g_MR


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_MK, *weights, _bias, adapter_down, adapter_up, ctx.hadamard, save_x, ctx.dgrad = inputs[:13]
    shared, shared_scale, shared_h, *joined = inputs[13:]
    _, h_MR, *own = output
    h_MR = h_MR if shared_h is None else shared_h
    codes_MK, scale_M1 = own if shared is None else (shared, shared_scale)
    ctx.trains = any(ctx.needs_input_grad[8:10])
    kept = (h_MR, *branch.kept_x(x_MK, codes_MK, scale_M1, save_x)) if ctx.trains else (None,) * 4
    ctx.save_for_backward(*kept, *weights, adapter_down, adapter_up, *joined)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy_MN: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: under checkpointing the first reading computes them again
    h_MR, x_MK, codes_MK, scale_M1, *quantized, smooth, lora_down, lora_up = saved[:-4]
    adapter_down, adapter_up, joined_down, joined_up = saved[-4:]
    dy_MN = dy_MN.contiguous()
    dx_MK, g_MR, grad_down, grad_up = None, None, None, None
    weights: tuple[Any, ...] = ()
    if ctx.needs_input_grad[0]:
        up_NR = branch.join(lora_up, adapter_up, 1, dy_MN.dtype) if joined_up is None else joined_up
        down_RK = branch.join(lora_down, adapter_down, 0, dy_MN.dtype) if joined_down is None else joined_down
        weights = up_NR, down_RK, *quantized, smooth, ctx.hadamard
        if ctx.dgrad == "int8":
            dx_MK, g_MR = _w4a8_dgrad(dy_MN, *weights)
        else:
            g_MR = dy_MN @ up_NR
    if ctx.trains:  # before dx, in a compiled graph: codes of x are gone when dx and W are written
        g_MR = dy_MN @ adapter_up.to(dy_MN.dtype) if g_MR is None else g_MR
        grad_down, grad_up = branch.adapter_gradients(
            dy_MN, g_MR, h_MR, x_MK, codes_MK, scale_M1, smooth, ctx.hadamard, adapter_down, adapter_up
        )
    if weights and dx_MK is None:
        dx_MK, _ = _w4a8_dgrad(dy_MN, *weights, g_MR)
    return dx_MK, *(None,) * 7, grad_down, grad_up, *(None,) * 8


_w4a8_linear.register_autograd(_backward, setup_context=_setup_context)


def w4a8_linear(
    x: Tensor, qweight: Tensor, row_scale: Tensor, group_words: Tensor, smooth: Tensor | None,
    lora_down: Tensor, lora_up: Tensor, bias: Tensor | None, *, hadamard: bool,
    adapter_down: Tensor | None = None, adapter_up: Tensor | None = None,
    save_x: branch.SaveX = "quantized", dgrad: branch.Dgrad = "dequantized", shares_input: bool = False,
    joined: branch.Joined | None = None,
) -> Tensor:  # fmt: skip
    """x [..., K] -> y [..., N] in x's dtype; gradients for x, adapter_down and adapter_up only.

    qweight uint8 [N, Kp/2] (pack_tiles), row_scale float32 [N], group_words int32 [Kp/128, N] (pack_words), smooth [K],
    lora_down [R, K], lora_up [N, R], bias [N], adapter_down [r, K], adapter_up [N, r] (already times alpha / r).
    save_x: what dA reads, the INT8 codes ("quantized") or x itself ("raw"); neither is kept if no adapter is trained.
    dgrad: dy W with W dequantized to x's dtype, or in INT32 with dy s_n quantized per token ("int8").
    shares_input: other layers read this x too; without smoothing it is quantized once for all of them (`shared_codes`).
    joined: [lora_down; adapter_down] and [lora_up, adapter_up] in x's dtype, for a caller who keeps them (`branch.join`).
    With its `together`, the D of all layers that read x, and shared codes, h is one product for all of them.
    Raises ValueError for a shape or mode that does not fit.
    """
    adapter_down, adapter_up = branch.trainable_rank(adapter_down), branch.trainable_rank(adapter_up)
    branch.check_shapes("w4a8_linear", x, qweight, lora_down, lora_up, bias, smooth, adapter_down, adapter_up, hadamard)
    branch.check_modes("w4a8_linear", save_x, dgrad)
    tiles = (qweight.shape[1] // 64, qweight.shape[0])
    if group_words.dtype != torch.int32 or tuple(group_words.shape) != tiles or row_scale.shape != qweight.shape[:1]:
        raise ValueError(
            f"w4a8_linear: group_words is {group_words.dtype} {tuple(group_words.shape)}, must be int32 {tiles}, "
            f"and row_scale {tuple(row_scale.shape)} must be [{qweight.shape[0]}]"
        )
    shared: tuple[Tensor | None, ...] = (None, None, None)
    x_MK = x.reshape(-1, x.shape[-1]).contiguous()
    if shares_input and smooth is None:
        shared = (*shared_codes(x, hadamard), None if joined is None else branch.shared_projection(x_MK, joined))
    y_MN, *_ = _w4a8_linear(
        x_MK, qweight, row_scale, group_words, smooth, lora_down, lora_up, bias, adapter_down, adapter_up,
        hadamard, save_x, dgrad, *shared, *((None, None) if joined is None else (joined.down, joined.up)),
    )  # fmt: skip
    return y_MN.view(*x.shape[:-1], -1)
