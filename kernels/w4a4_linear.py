"""Interchange W4A4 linear: symmetric INT4 codes in groups of 64 on both sides, and a 16-bit low-rank branch.

    W_nk  = w_Gn q_nk                                         wscale w_Gn, G = k // 64, q in -8..7
    xq, a = quantize_activation(x, smooth, hadamard, bits=4, unsigned, unsigned_from)     unsigned: 0..15 of x + 0.171875
    y     = sum_G a_mG w_Gn (xq_G . q_G^T)  +  (x [D; A]^T) [U, B]^T  +  bias       INT32 within a group, float32 over groups
    dx    = (dy W) H / smooth   +  (dy [U, B]) [D; A]                               rounding of x: straight through
    dA    = (dy B)^T x,  dB = dy^T (x A^T)                                          x raw, or rebuilt from INT8 codes

This is what Nunchaku, Nunchaku Lite and ComfyUI files mean (SVDQuant, arXiv 2411.05007; nunchaku `gemm_w4a4.cuh`), but
for their 16-bit accumulator: here sums over groups are float32. Such files have no rotation; hadamard serves our own.
On a GPU both factors are written as 16-bit numbers a q and w q with h and [U, B] as further columns, and one matrix product of
the library does the rest: no GPU since Ampere multiplies INT4 with a scale per 64 faster than this (docs/log.md).
The INT4 codes would put an error of 13 % into dA, so an x to be saved is quantized once more, to 8 bits per token (0.9 %).
Of an unsigned layer (its columns from unsigned_from on: the single blocks of FLUX join a signed and an unsigned half in one
matrix) the branch and dA read x unshifted, and its bias has the shift's share already taken out of it:
bias = b - 0.171875 sum_k W_nk / smooth_k (nunchaku's `ShiftedLinear`), so that dx is what it is for signed codes.
"""

from typing import Any

import torch
from torch import Tensor

from loragraft.kernels import branch
from loragraft.kernels.act_quant import (
    check_unsigned_from,
    dequantize_activation,
    quantize_activation,
    quantize_reference,
    round_to_groups,
    shift_unsigned,
    smooth_and_rotate,
)
from loragraft.kernels.layout import GROUP, LinearCase, padded, unpack_int4, uses_triton
from loragraft.kernels.unpack import effective_weight, joined_weight

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


def _keeps_codes(adapter_down: Tensor | None, save_x: str) -> bool:
    return adapter_down is not None and save_x == "quantized"


@torch.library.custom_op("loragraft::w4a4_linear", mutates_args=())
def _w4a4_linear(
    x_MK: Tensor, qweight: Tensor, wscale: Tensor, smooth: Tensor | None, lora_down: Tensor, lora_up: Tensor,
    bias: Tensor | None, adapter_down: Tensor | None, adapter_up: Tensor | None, hadamard: bool, save_x: str,
    unsigned: bool = False, unsigned_from: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, h, codes, scale): the last three are what the backward pass keeps; codes of 8 bits, empty if nothing reads them."""
    kept = quantize_activation(x_MK if _keeps_codes(adapter_down, save_x) else x_MK[:0], smooth, hadamard, bits=8)
    h_MR = x_MK @ branch.join(lora_down, adapter_down, 0, x_MK.dtype).T
    up_NR = branch.join(lora_up, adapter_up, 1, x_MK.dtype)
    if not uses_triton(x_MK):
        codes_MK, scale_MG = quantize_activation(
            x_MK, smooth, hadamard, bits=4, unsigned=unsigned, unsigned_from=unsigned_from
        )
        rounded_MK = dequantize_activation(codes_MK, scale_MG, torch.float32)
        y_MN = rounded_MK @ dequantize_w4a4(qweight, wscale).T
        y_MN = (y_MN if bias is None else y_MN.add_(bias)).addmm_(h_MR.float(), up_NR.float().T)
        return y_MN.to(x_MK.dtype), h_MR, *kept
    weight_NJ = joined_weight(qweight, wscale, up_NR)
    KP, R = 2 * qweight.shape[1], h_MR.shape[1]
    joined_MJ = x_MK.new_empty((x_MK.shape[0], weight_NJ.shape[1]))
    joined_MJ[:, KP:] = 0
    joined_MJ[:, KP : KP + R] = h_MR
    round_to_groups(x_MK, smooth, hadamard, unsigned, unsigned_from, joined_MJ)
    return torch.nn.functional.linear(joined_MJ, weight_NJ, None if bias is None else bias.to(x_MK.dtype)), h_MR, *kept


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


@torch.library.custom_op("loragraft::w4a4_dgrad", mutates_args=())
def _w4a4_dgrad(
    dy_MN: Tensor,
    up_NR: Tensor,
    down_RK: Tensor,
    qweight: Tensor,
    wscale: Tensor,
    smooth: Tensor | None,
    hadamard: bool,
) -> tuple[Tensor, Tensor]:
    """dx = (dy W) H / smooth + g [D; A] and g = dy [U, B]."""
    g_MR = dy_MN @ up_NR
    if not uses_triton(dy_MN):
        return branch.dequantized_dx(dy_MN, dequantize_w4a4(qweight, wscale), smooth, hadamard, g_MR, down_RK), g_MR
    return dy_MN @ effective_weight(qweight, None, wscale, smooth, hadamard, up_NR, down_RK), g_MR


@_w4a4_dgrad.register_fake
def _(dy_MN, up_NR, down_RK, qweight, wscale, smooth, hadamard):
    return dy_MN.new_empty((dy_MN.shape[0], down_RK.shape[1])), dy_MN.new_empty((dy_MN.shape[0], up_NR.shape[1]))


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
    dx_MK, g_MR, grad_down, grad_up = None, None, None, None
    if ctx.needs_input_grad[0]:
        up_NR = branch.join(lora_up, adapter_up, 1, dy_MN.dtype)
        down_RK = branch.join(lora_down, adapter_down, 0, dy_MN.dtype)
        dx_MK, g_MR = _w4a4_dgrad(dy_MN, up_NR, down_RK, qweight, wscale, smooth, ctx.hadamard)
    if ctx.trains:
        g_MR = dy_MN @ adapter_up.to(dy_MN.dtype) if g_MR is None else g_MR
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
    check_unsigned_from("w4a4_linear", x.shape[-1], unsigned, unsigned_from)
    branch.check_groups("w4a4_linear", qweight, wscale=wscale)
    y_MN, *_ = _w4a4_linear(
        x.reshape(-1, x.shape[-1]).contiguous(), qweight, wscale, smooth, lora_down, lora_up, bias, adapter_down, adapter_up,
        hadamard, save_x, unsigned, unsigned_from,
    )  # fmt: skip
    return y_MN.view(*x.shape[:-1], -1)
