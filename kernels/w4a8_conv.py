"""Native W4A8 convolution, k x k: UINT4 weight codes, INT8 activations with a scale per block, a 16-bit low-rank branch.

    W_ntc = s_n I_ntc,  I in INT8 as in `w4a8_linear`, K = T Ct columns (tap, channel)    T = k^2, Ct = C rounded up to 64
    xq, a = quantize_blocks(x, smooth, hadamard)                                          `block_codes`: a_p is p's block's
    y_p   = a_p s_n sum_t (xq_q(p,t) . I_t^T)  +  h_p [U, B]^T  +  bias                   the sum over K is exact in INT32
    h_p   = sum_t x_q(p,t) [D_t; A_t]^T                                                   raw x
    dx    = conv^T(dy, W_eff),   W_eff = (W H) / smooth + [U, B] [D; A]                   rounding of x: straight through
    dA_t  = sum_p (dy B)_p^T x_q(p,t),   dB = dy^T h                                      x raw, or INT8 with a scale per pixel

q(p, t) is the input pixel that tap t of output pixel p reads (`taps`). The branch is a k x k convolution to R channels and a
1 x 1 one to N, which is what a LoRA of a convolution is (PEFT, kohya: A [r, C, k, k], B [N, r, 1, 1]): ranks concatenate.

Why one scale for all that an output reads: its sum over K is then one INT32 sum, which is the linear layer's product. With a
scale per input pixel every tap's sum is promoted to float32 by itself, which left an H100 a third of its speed. Why per block
and not per window: see `block_codes`. Rounding x costs, in the 3 x 3 convolutions of TAESD on photographs of 256 pixels
(relative RMS of the output; median of 136 and worst): per pixel 0.37 % and 1.0 %, per window 0.51 % and 1.3 %, per block of
8 x 64 outputs 0.88 % and 2.1 %, per image 1.14 % and 2.7 %.

On Hopper the product reads its tiles out of the codes of the image, elsewhere out of a matrix of windows, written for the
length of the call. Branch and quantization need only x: on CUDA they run beside each other. Smoothing is per channel, the same
for all taps, since they read the same codes; `smooth_and_rotate` acts on x before the windows.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cudnn
from torch.nn.grad import conv2d_input

from loragraft.kernels import branch
from loragraft.kernels.act_quant import quantize_activation, smooth_and_rotate
from loragraft.kernels.block_codes import (
    BlockCodes,
    Blocks,
    blocks_of,
    blocks_reference,
    empty_codes,
    quantize_blocks,
    windows_of,
)
from loragraft.kernels.hopper_gemm import hopper_boxes_run, hopper_gemm
from loragraft.kernels.layout import apply_hadamard, padded, rank_product, rank_rows, uses_triton
from loragraft.kernels.row_product import row_product
from loragraft.kernels.taps import Window, pad_taps, spread_taps, sum_taps, tap_columns, trim_taps
from loragraft.kernels.unpack import effective_weight
from loragraft.kernels.w4a8_group import side_streams
from loragraft.kernels.w4a8_linear import dequantize_w4a8, w4a8_product


def dequantize_conv(
    qweight: Tensor,
    row_scale: Tensor,
    group_words: Tensor,
    channels: int,
    taps: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """W = s_n I, [N, T C] in dtype: still smoothed and rotated, without the padding of the codes."""
    return trim_taps(dequantize_w4a8(qweight, row_scale, group_words, dtype), channels, taps)


def as_kernel(matrix_NK: Tensor, kernel: int) -> Tensor:
    """[N, T C] -> [N, C, k, k], a view: channels last, as cuDNN wants it beside pixels of that layout."""
    return matrix_NK.unflatten(1, (kernel, kernel, -1)).permute(0, 3, 1, 2)


def as_columns(weight: Tensor) -> Tensor:
    """[N, C, k, k] -> [N, T C], columns (tap, channel); differentiable."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def as_pixels(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B H W, C], contiguous; a view of channels-last images."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()


def as_image(y_PN: Tensor, batch: int, height: int, width: int) -> Tensor:
    """[B H W, N] -> [B, N, H, W], a channels-last view."""
    return y_PN.view(batch, height, width, -1).permute(0, 3, 1, 2)


def w4a8_conv_reference(
    x: Tensor, qweight: Tensor, row_scale: Tensor, group_words: Tensor, smooth: Tensor | None,
    lora_down: Tensor, lora_up: Tensor, bias: Tensor | None, *, kernel: int, stride: int = 1, padding: int = 0,
    hadamard: bool = False, adapter_down: Tensor | None = None, adapter_up: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The formula in plain torch and in x's dtype (float64 is the oracle); autograd through it is the gradient."""
    B, C, H, W = x.shape
    rotated_MC = smooth_and_rotate(x.permute(0, 2, 3, 1).reshape(-1, C), smooth, hadamard)
    blocks = blocks_of(Window(B, H, W, kernel, stride, padding))
    codes_RC, scale_P1 = blocks_reference(rotated_MC, blocks)
    weight = dequantize_w4a8(qweight, row_scale, group_words, x.dtype)
    rounded = as_image(scale_P1 * (windows_of(codes_RC, blocks).to(x.dtype) @ weight.T), B, *blocks.window.out_size)
    dense = as_kernel(trim_taps(weight, C, kernel * kernel), kernel)
    y = F.conv2d(as_image(rotated_MC, B, H, W), dense, None, stride, padding)
    y = y + (rounded - y).detach()
    down = branch.join(lora_down, adapter_down, 0, x.dtype)
    if len(down):
        h = F.conv2d(x, as_kernel(down, kernel), None, stride, padding)
        y = y + F.conv2d(h, branch.join(lora_up, adapter_up, 1, x.dtype)[..., None, None])
    return y if bias is None else y + bias.to(x.dtype)[:, None, None]


@torch.library.custom_op("loragraft::w4a8_conv", mutates_args=())
def _w4a8_conv(
    x_MC: Tensor, qweight: Tensor, row_scale: Tensor, group_words: Tensor, smooth: Tensor | None,
    lora_down: Tensor, lora_up: Tensor, bias: Tensor | None, adapter_down: Tensor | None, adapter_up: Tensor | None,
    window: list[int], hadamard: bool, save_x: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, h, codes, scale): the last three are what the backward pass keeps; codes per pixel, empty if nothing reads them."""
    blocks = blocks_of(Window(*window))
    kept = quantize_activation(x_MC if _keeps_codes(adapter_down, save_x) else x_MC[:0], smooth, hadamard, bits=8)
    up_NR = branch.join(lora_up, adapter_up, 1, x_MC.dtype)
    if not uses_triton(x_MC):
        codes = quantize_blocks(x_MC, smooth, hadamard, blocks)
        h_PR = _branch_on_cpu(x_MC, branch.join(lora_down, adapter_down, 0, x_MC.dtype), blocks.window)
    elif not x_MC.is_cuda:
        codes = quantize_blocks(x_MC, smooth, hadamard, blocks)
        h_PR = _branch(x_MC, lora_down, adapter_down, blocks.window)
    else:
        memory, main, side = (
            empty_codes(x_MC, blocks),
            torch.cuda.current_stream(x_MC.device),
            side_streams(x_MC.device)[0],
        )
        side.wait_event(main.record_event())
        with torch.cuda.stream(side):
            codes = quantize_blocks(x_MC, smooth, hadamard, blocks, memory)
        h_PR = _branch(x_MC, lora_down, adapter_down, blocks.window)
        main.wait_event(side.record_event())
    return conv_product(codes, blocks, qweight, row_scale, group_words, h_PR, up_NR, bias), h_PR, *kept


def _keeps_codes(adapter_down: Tensor | None, save_x: str) -> bool:
    return adapter_down is not None and save_x == "quantized"


def conv_product(
    codes: BlockCodes, blocks: Blocks, qweight: Tensor, row_scale: Tensor, group_words: Tensor, h_PR: Tensor, up_NR: Tensor,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """y [P, N] in h's dtype from what is quantized and projected already."""
    codes_RC, scale_P1 = codes
    if hopper_boxes_run(h_PR, up_NR, blocks):
        return hopper_gemm(codes_RC, scale_P1, qweight, group_words, row_scale, h_PR, up_NR, bias, blocks=blocks)
    windows_PK = windows_of(codes_RC, blocks)
    return w4a8_product(windows_PK, scale_P1, qweight, row_scale, group_words, h_PR, up_NR, bias)


def _branch(x_MC: Tensor, lora_down: Tensor, adapter_down: Tensor | None, window: Window) -> Tensor:
    """h [P, R]: a product for all taps, and its sum over them."""
    rank = len(lora_down) + (0 if adapter_down is None else len(adapter_down))
    return sum_taps(rank_product(x_MC, _by_tap(x_MC, lora_down, adapter_down, window.taps)), rank, window)


def _by_tap(x_MC: Tensor, lora_down: Tensor, adapter_down: Tensor | None, taps: int) -> Tensor:
    """[D; A] as a matrix [C, T R], columns (tap, rank), in x's dtype: joined and put in order by one copy."""
    given = [lora_down] if adapter_down is None else [lora_down, adapter_down]
    parts = [part.to(x_MC.dtype).view(len(part), taps, x_MC.shape[1]).transpose(0, 1) for part in given]
    return torch.cat(parts, dim=1).flatten(0, 1).T


def _branch_on_cpu(x_MC: Tensor, down_RK: Tensor, window: Window) -> Tensor:
    """h [P, R] by torch's float32 convolution."""
    h_PR = rank_rows(x_MC[:1].expand(window.out_pixels, -1), len(down_RK))
    if len(down_RK):
        x, down = as_image(x_MC, *window[:3]).float(), as_kernel(down_RK, window.kernel).float()
        h_PR.copy_(as_pixels(F.conv2d(x, down, None, window.stride, window.padding)))
    return h_PR


@_w4a8_conv.register_fake
def _(
    x_MC, qweight, row_scale, group_words, smooth, lora_down, lora_up, bias, adapter_down, adapter_up,
    window, hadamard, save_x,
):  # fmt: skip
    view, (M, C) = Window(*window), x_MC.shape
    rank = lora_down.shape[0] + (0 if adapter_down is None else adapter_down.shape[0])
    h_PR = x_MC.new_empty((view.out_pixels, (rank + 7) // 8 * 8))[:, :rank]
    kept = M if _keeps_codes(adapter_down, save_x) else 0
    codes_MC = x_MC.new_empty((kept, padded(C)), dtype=torch.int8)
    scale_M1 = x_MC.new_empty((kept, 1), dtype=torch.float32)
    return x_MC.new_empty((view.out_pixels, qweight.shape[0])), h_PR, codes_MC, scale_M1


@torch.library.custom_op("loragraft::w4a8_conv_dgrad", mutates_args=())
def _w4a8_conv_dgrad(
    dy_PN: Tensor, up_NR: Tensor, down_RK: Tensor, qweight: Tensor, row_scale: Tensor, group_words: Tensor,
    smooth: Tensor | None, window: list[int], hadamard: bool,
) -> Tensor:  # fmt: skip
    """dx [M, C]: torch's transposed convolution of dy with W_eff, written for the length of this call."""
    view, (R, K) = Window(*window), down_RK.shape
    C = K // view.taps
    if uses_triton(dy_PN):
        columns = tap_columns(C) * view.taps
        smooth_K = None if smooth is None else F.pad(smooth, (0, tap_columns(C) - C), value=1.0).repeat(view.taps)
        down = pad_taps(down_RK, C) if R else down_RK.new_empty((0, columns))
        dense = effective_weight(qweight, group_words, row_scale, smooth_K, hadamard, up_NR, down)
        dense = trim_taps(dense, C, view.taps)
    else:
        dense = dequantize_conv(qweight, row_scale, group_words, C, view.taps)
        dense = branch.unrotate(dense, None if smooth is None else smooth.repeat(view.taps), hadamard)
        dense = torch.addmm(dense, up_NR.float(), down_RK.float()).to(dy_PN.dtype)
    dy = as_image(dy_PN, view.batch, view.out_height, view.out_width)
    shape = (view.batch, C, view.height, view.width)
    with _reproducible(dy_PN):
        dx = conv2d_input(shape, as_kernel(dense, view.kernel), dy, stride=view.stride, padding=view.padding)
    return as_pixels(dx)


def _reproducible(x: Tensor) -> AbstractContextManager[None]:
    """cuDNN without algorithms whose sums change their order from run to run, and without TF32: both are on by default."""
    if not x.is_cuda:
        return nullcontext()
    return cudnn.flags(enabled=True, benchmark=cudnn.benchmark, deterministic=True, allow_tf32=False)


@_w4a8_conv_dgrad.register_fake
def _(dy_PN, up_NR, down_RK, qweight, row_scale, group_words, smooth, window, hadamard):
    view = Window(*window)
    return dy_PN.new_empty((view.pixels, down_RK.shape[1] // view.taps))


@torch.library.custom_op("loragraft::conv_adapter_gradients", mutates_args=())
def _conv_adapter_gradients(
    dy_PN: Tensor, h_Pr: Tensor, x_MC: Tensor, scale_M1: Tensor | None, smooth: Tensor | None, adapter_up: Tensor,
    window: list[int], hadamard: bool, channels: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dA [r, T C] and dB [N, r] in float32; x raw, or codes with their scale."""
    view = Window(*window)
    spread_TMr = spread_taps(rank_product(dy_PN, adapter_up.to(dy_PN.dtype)), view)
    grad_TrC = torch.stack([row_product(g_Mr, x_MC, scale_M1)[:, :channels] for g_Mr in spread_TMr])
    if scale_M1 is not None:  # rotation and smoothing of a rebuilt x act on the small dA
        grad_TrC = apply_hadamard(grad_TrC) if hadamard else grad_TrC
        grad_TrC = grad_TrC if smooth is None else grad_TrC * smooth.float()
    return grad_TrC.transpose(0, 1).flatten(1), row_product(h_Pr, dy_PN).T.contiguous()


@_conv_adapter_gradients.register_fake
def _(dy_PN, h_Pr, x_MC, scale_M1, smooth, adapter_up, window, hadamard, channels):
    N, r = adapter_up.shape
    wide = {"dtype": torch.float32}
    return dy_PN.new_empty((r, Window(*window).taps * channels), **wide), dy_PN.new_empty((N, r), **wide)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_MC, *weights, _bias, adapter_down, adapter_up, ctx.window, ctx.hadamard, save_x = inputs
    _, h_PR, codes_MC, scale_M1 = output
    ctx.trains, ctx.channels = any(ctx.needs_input_grad[8:10]), x_MC.shape[1]
    kept = (h_PR, *branch.kept_x(x_MC, codes_MC, scale_M1, save_x)) if ctx.trains else (None,) * 4
    ctx.save_for_backward(*kept, *weights, adapter_down, adapter_up)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy_PN: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: under checkpointing the first reading computes them again
    h_PR, x_MC, codes_MC, scale_M1, *quantized, smooth, lora_down, lora_up, adapter_down, adapter_up = saved
    dy_PN = dy_PN.contiguous()
    dx_MC, grad_down, grad_up = None, None, None
    if ctx.needs_input_grad[0]:
        up_NR = branch.join(lora_up, adapter_up, 1, dy_PN.dtype)
        down_RK = branch.join(lora_down, adapter_down, 0, dy_PN.dtype)
        dx_MC = _w4a8_conv_dgrad(dy_PN, up_NR, down_RK, *quantized, smooth, ctx.window, ctx.hadamard)
    if ctx.trains:
        r = adapter_down.shape[0]
        grad_down, grad_up = _conv_adapter_gradients(
            dy_PN, h_PR[:, -r:], codes_MC if x_MC is None else x_MC, scale_M1, smooth, adapter_up, ctx.window,
            ctx.hadamard, ctx.channels,
        )  # fmt: skip
        grad_down, grad_up = grad_down.to(adapter_down.dtype), grad_up.to(adapter_up.dtype)
    return dx_MC, *(None,) * 7, grad_down, grad_up, *(None,) * 3


_w4a8_conv.register_autograd(_backward, setup_context=_setup_context)


def w4a8_conv(
    x: Tensor, qweight: Tensor, row_scale: Tensor, group_words: Tensor, smooth: Tensor | None,
    lora_down: Tensor, lora_up: Tensor, bias: Tensor | None, *, kernel: int, stride: int = 1, padding: int = 0,
    hadamard: bool = False, adapter_down: Tensor | None = None, adapter_up: Tensor | None = None,
    save_x: branch.SaveX = "quantized",
) -> Tensor:  # fmt: skip
    """x [B, C, H, W] -> y [B, N, H', W'] in x's dtype, channels last; gradients for x, adapter_down and adapter_up only.

    qweight uint8 [N, Kp/2] (pack_tiles) with Kp = T Ct rounded up to 128, row_scale float32 [N], group_words int32
    [Kp/128, N] (pack_words), smooth [C], lora_down [R, T C] with columns (tap, channel), lora_up [N, R], bias [N],
    adapter_down [r, T C], adapter_up [N, r] (already times alpha / r). T = kernel^2. x in channels-last layout is not copied.
    save_x: as in `w4a8_linear`.
    Raises ValueError for a shape, window or mode that does not fit.
    """
    adapter_down, adapter_up = branch.trainable_rank(adapter_down), branch.trainable_rank(adapter_up)
    window = _check(x, qweight, row_scale, group_words, smooth, lora_down, lora_up, bias, kernel, stride, padding)
    _check_adapter(x.shape[1] * window.taps, qweight.shape[0], adapter_down, adapter_up)
    branch.check_modes("w4a8_conv", save_x, "dequantized")
    if hadamard and x.shape[1] % 64:
        raise ValueError(f"w4a8_conv: hadamard=True needs C % 64 == 0, C = {x.shape[1]}; quantize without the rotation")
    y_PN, *_ = _w4a8_conv(
        as_pixels(x), qweight, row_scale, group_words, smooth, lora_down, lora_up, bias, adapter_down, adapter_up,
        list(window), hadamard, save_x,
    )  # fmt: skip
    return as_image(y_PN, window.batch, window.out_height, window.out_width)


def _check(
    x: Tensor, qweight: Tensor, row_scale: Tensor, group_words: Tensor, smooth: Tensor | None, lora_down: Tensor,
    lora_up: Tensor, bias: Tensor | None, kernel: int, stride: int, padding: int,
) -> Window:  # fmt: skip
    """The window over x. Raises ValueError, naming the argument."""
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"w4a8_conv: x has shape {tuple(x.shape)}, must be [B, C, H, W] with at least one pixel")
    (B, C, H, W), N = x.shape, qweight.shape[0]
    if kernel < 1 or stride < 1 or padding < 0 or min(H, W) + 2 * padding < kernel:
        raise ValueError(
            f"w4a8_conv: kernel {kernel}, stride {stride}, padding {padding} leave no output of {H} x {W} pixels"
        )
    window = Window(B, H, W, kernel, stride, padding)
    columns, R = padded(window.taps * tap_columns(C)), lora_up.shape[1]
    if not (qweight.is_contiguous() and group_words.is_contiguous()):
        raise ValueError("w4a8_conv: qweight or group_words is not contiguous; call .contiguous() once, when loading")
    expected: dict[str, tuple[Tensor | None, tuple[int, ...], torch.dtype | None]] = {
        "qweight": (qweight, (N, columns // 2), torch.uint8),
        "group_words": (group_words, (columns // 128, N), torch.int32),
        "row_scale": (row_scale, (N,), None),
        "smooth": (smooth, (C,), None),
        "lora_down": (lora_down, (R, window.taps * C), None),
        "lora_up": (lora_up, (N, R), None),
        "bias": (bias, (N,), None),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != (dtype or tensor.dtype)):
            raise ValueError(
                f"w4a8_conv: {name} is {tensor.dtype} {tuple(tensor.shape)}, must be {dtype or 'a float'} {shape} "
                f"(N = {N}, C = {C}, {kernel} x {kernel})"
            )
    return window


def _check_adapter(K: int, N: int, adapter_down: Tensor | None, adapter_up: Tensor | None) -> None:
    if (adapter_down is None) != (adapter_up is None):
        raise ValueError("w4a8_conv: adapter_down and adapter_up come together, or neither; one of them is None")
    if adapter_down is None or adapter_up is None:
        return
    r = adapter_down.shape[0]
    if tuple(adapter_down.shape) != (r, K) or tuple(adapter_up.shape) != (N, r):
        raise ValueError(
            f"w4a8_conv: adapter_down {tuple(adapter_down.shape)} and adapter_up {tuple(adapter_up.shape)}, must be "
            f"[r, {K}] and [{N}, r]"
        )
