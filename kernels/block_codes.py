"""INT8 codes of an image for a convolution: one scale per block of output pixels, so that a window is summed in INT32.

    x'    = (x / smooth) H                                       per pixel, as in `act_quant`
    a_b   = max of |x'| over the pixels that block b reads / 127     one scale for its outputs; 1 where all are zero
    codes = round(x' / a_b)                                      [block, patch row, phase, step, Ct], zeros outside the image

A block is 8 x 64 outputs, or what of that divides the image: an odd number of rows or columns makes blocks of one. Its patch
has (8 - 1) stride + k rows, and columns stored by phase = column % stride, so that the pixels which neighbouring outputs
read for one tap are neighbouring rows of the matrix [R, Ct], whatever the stride:

    row(p, t) = first_row(p) + tap_row(t)        tap_row(u, v) = (u stride + v % stride) steps + v // stride

Codes are written 1.3 times (the rims that patches share), where a scale per window would write them k^2 times: 9 x 5 MB for
128 x 128 pixels of 320 channels, half an H100's L2, and then read them from memory again. x is read twice, by a kernel for
the maximum of every pixel and by one for the codes; the second finds it in L2.
"""

from math import gcd
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from loragraft.kernels.act_quant import smooth_and_rotate
from loragraft.kernels.hopper import on_hopper
from loragraft.kernels.layout import on_device, padded, uses_triton
from loragraft.kernels.taps import Window, tap_columns
from loragraft.kernels.tiles import round_to_int8
from loragraft.kernels.token_quant import _rotated

ROWS, COLUMNS = 8, 64
"""Output pixels of a block, where that divides the image's."""


class Blocks(NamedTuple):
    """The blocks of a `Window` and their patches."""

    window: Window
    rows: int
    """Output rows of a block, a power of two that divides the image's."""
    columns: int
    """Output columns of a block, likewise. So many outputs find every tap's pixels in neighbouring rows of codes."""

    @property
    def down(self) -> int:
        """Blocks of an image, vertically."""
        return self.window.out_height // self.rows

    @property
    def across(self) -> int:
        """Blocks of an image, horizontally."""
        return self.window.out_width // self.columns

    @property
    def total(self) -> int:
        """Of the batch."""
        return self.window.batch * self.down * self.across

    @property
    def patch_rows(self) -> int:
        """Rows of pixels that a block reads."""
        return (self.rows - 1) * self.window.stride + self.window.kernel

    @property
    def steps(self) -> int:
        """Columns of one phase of a patch."""
        return self.columns + (self.window.kernel - 1) // self.window.stride

    @property
    def patch_columns(self) -> int:
        """Columns of pixels in a patch; with a stride up to stride - 1 more than the block reads."""
        return self.steps * self.window.stride

    @property
    def code_rows(self) -> int:
        """Rows of the matrix of codes."""
        return self.total * self.patch_rows * self.patch_columns


def blocks_of(window: Window) -> Blocks:
    """The largest blocks that divide the output."""
    return Blocks(window, gcd(ROWS, window.out_height), gcd(COLUMNS, window.out_width))


@triton.jit
def pixel_absmax_kernel(
    p_x, p_smooth, p_max, M, C,
    HAS_SMOOTH: tl.constexpr, HADAMARD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """max |x'| of BM pixels over all channels; with HADAMARD BC is 64."""
    o_m, o_c = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BC)
    b_max = tl.zeros((BM, BC), tl.float32)  # per element: one reduction across threads, at the end
    for c in tl.range(0, C, BC):
        mask = (o_m < M)[:, None] & (c + o_c < C)[None, :]
        b_x = tl.load(p_x + o_m.to(tl.int64)[:, None] * C + (c + o_c)[None, :], mask=mask, other=0.0)
        b_x = _rotated(b_x, p_smooth, c + o_c, C, HAS_SMOOTH, HADAMARD, PRECISION)
        b_max = tl.maximum(b_max, tl.abs(b_x), propagate_nan=tl.PropagateNan.ALL)
    b_row = tl.max(b_max, axis=1) + tl.sum(b_max * 0.0, axis=1)  # a reduction drops NaN, and codes would hide it
    tl.store(p_max + o_m, b_row, mask=o_m < M)


@triton.jit
def block_codes_kernel(
    p_x, p_smooth, p_max, p_codes, p_scale, C, CT, H, W, HO, WO, DOWN, ACROSS, PATCH_ROWS, STEPS, STRIDE, PADDING,
    HAS_SMOOTH: tl.constexpr, HADAMARD: tl.constexpr, PRECISION: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
    PY: tl.constexpr, PX: tl.constexpr, BX: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One row of one patch, BC channels. PY x PX: the patch, rounded up to powers of two. BX: pixels a round."""
    block, y, chunk = tl.program_id(0) // PATCH_ROWS, tl.program_id(0) % PATCH_ROWS, tl.program_id(1)
    image, b_down, b_across = block // (DOWN * ACROSS), block // ACROSS % DOWN, block % ACROSS
    top, left = b_down * BH * STRIDE - PADDING, b_across * BW * STRIDE - PADDING
    columns = STEPS * STRIDE
    o_y, o_x = tl.arange(0, PY), tl.arange(0, PX)
    m_y = (o_y < PATCH_ROWS) & (top + o_y >= 0) & (top + o_y < H)
    m_x = (o_x < columns) & (left + o_x >= 0) & (left + o_x < W)
    p_patch = p_max + (image * H + top + o_y)[:, None] * W + (left + o_x)[None, :]
    b_max = tl.load(p_patch, mask=m_y[:, None] & m_x[None, :], other=0.0)
    b_max = tl.max(tl.max(b_max, axis=1) + tl.sum(b_max * 0.0, axis=1), axis=0) + tl.sum(
        tl.sum(b_max * 0.0, axis=1), axis=0
    )
    b_max = tl.where(b_max == 0, 127.0, b_max)
    if (y == 0) & (chunk == 0):
        o_p = tl.arange(0, BH * BW)
        o_i, o_j = b_down * BH + o_p // BW, b_across * BW + o_p % BW
        b_scale = tl.math.div_rn(tl.zeros((BH * BW,), tl.float32) + b_max, tl.full((BH * BW,), 127.0, tl.float32))
        tl.store(p_scale + (image * HO + o_i) * WO + o_j, b_scale)
    b_inverse = tl.math.div_rn(tl.full((BX,), 127.0, tl.float32), tl.zeros((BX,), tl.float32) + b_max)
    o_c, row = chunk * BC + tl.arange(0, BC), top + y
    seen = tl.where((row >= 0) & (row < H), columns, 0)
    p_row = p_codes + (tl.program_id(0) * columns).to(tl.int64) * CT
    for first in tl.range(0, columns, BX):
        o_b = first + tl.arange(0, BX)
        o_w = left + o_b % STEPS * STRIDE + o_b // STEPS
        m_w = (o_b < seen) & (o_w >= 0) & (o_w < W)
        p_pixel = p_x + ((image * H + row) * W + o_w).to(tl.int64)[:, None] * C + o_c[None, :]
        b_x = tl.load(p_pixel, mask=m_w[:, None] & (o_c < C)[None, :], other=0.0)
        b_x = _rotated(b_x, p_smooth, o_c, C, HAS_SMOOTH, HADAMARD, PRECISION)
        b_codes = round_to_int8(b_x * b_inverse[:, None])
        tl.store(p_row + o_b[:, None] * CT + o_c[None, :], b_codes, mask=(o_b < columns)[:, None] & (o_c < CT)[None, :])


class BlockCodes(NamedTuple):
    """An image in INT8."""

    codes_RC: Tensor
    """int8 [code_rows, Ct]."""
    scale_P1: Tensor
    """[P, 1]: that of its block, for every output pixel."""


def empty_codes(x_MC: Tensor, blocks: Blocks) -> tuple[BlockCodes, Tensor]:
    """Memory for `quantize_blocks`: the result, and float32 [M] for the maxima of the pixels."""
    (M, C), P = x_MC.shape, blocks.window.out_pixels
    codes_RC = x_MC.new_empty((blocks.code_rows, tap_columns(C)), dtype=torch.int8)
    scale_P1 = x_MC.new_empty((P, 1), dtype=torch.float32)
    return BlockCodes(codes_RC, scale_P1), x_MC.new_empty(M, dtype=torch.float32)


def quantize_blocks(
    x_MC: Tensor, smooth_C: Tensor | None, hadamard: bool, blocks: Blocks, memory: tuple[BlockCodes, Tensor] | None = None
) -> BlockCodes:  # fmt: skip
    """x [M, C] -> its codes and scales; memory: of `empty_codes`, where another stream allocates. Not differentiable."""
    if not uses_triton(x_MC):
        codes, scale = blocks_reference(smooth_and_rotate(x_MC.float(), smooth_C, hadamard), blocks)
        return BlockCodes(codes, scale)
    window, (out, max_M) = blocks.window, memory or empty_codes(x_MC, blocks)
    (codes_RC, scale_P1), BC = out, 64 if hadamard else 128
    pixel_absmax(x_MC, smooth_C, hadamard, max_M)
    with on_device(x_MC):
        block_codes_kernel[(blocks.total * blocks.patch_rows, triton.cdiv(codes_RC.shape[1], BC))](
            x_MC, smooth_C, max_M, codes_RC, scale_P1, x_MC.shape[1], codes_RC.shape[1], window.height, window.width,
            window.out_height, window.out_width, blocks.down, blocks.across, blocks.patch_rows, blocks.steps,
            window.stride, window.padding, BH=blocks.rows, BW=blocks.columns,
            PY=triton.next_power_of_2(blocks.patch_rows), PX=triton.next_power_of_2(blocks.patch_columns),
            BX=16, BC=BC, **_launch(x_MC, smooth_C, hadamard),
        )  # fmt: skip
    return out


def pixel_absmax(x_MC: Tensor, smooth_C: Tensor | None, hadamard: bool, max_M: Tensor) -> None:
    """max |x'| over the channels of each pixel, into max [M] float32. Runs Triton only."""
    M, C = x_MC.shape
    BC = 64 if hadamard else min(1024, triton.next_power_of_2(C))
    BM = 16 if hadamard else max(4, 2048 // BC)
    with on_device(x_MC):
        pixel_absmax_kernel[(triton.cdiv(M, BM),)](
            x_MC, smooth_C, max_M, M, C, BM=BM, BC=BC, **_launch(x_MC, smooth_C, hadamard)
        )


def _launch(x_MC: Tensor, smooth_C: Tensor | None, hadamard: bool) -> dict[str, Any]:
    return {
        "HAS_SMOOTH": smooth_C is not None,
        "HADAMARD": hadamard,
        "PRECISION": "ieee" if x_MC.dtype == torch.float32 else "tf32x3",
        "num_warps": 4,
        # Triton 3.6 fetches into a buffer that an asynchronous wgmma still reads, if registers read it too.
        "num_stages": 1 if on_hopper(x_MC, x_MC.dtype) else 3,
    }


def blocks_reference(rotated_MC: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """x' [M, C] in any float dtype -> int8 codes [code_rows, Ct] and scales [P, 1] in that dtype."""
    window, C = blocks.window, rotated_MC.shape[1]
    stride, edge = window.stride, window.padding
    step_y, step_x = blocks.rows * stride, blocks.columns * stride
    right = (blocks.across - 1) * step_x + blocks.patch_columns - window.width - edge
    below = (blocks.down - 1) * step_y + blocks.patch_rows - window.height - edge
    image = rotated_MC.detach().view(window.batch, window.height, window.width, C)
    image = F.pad(image, (0, 0, edge, right, edge, below))
    patches = image.unfold(1, blocks.patch_rows, step_y).unfold(2, blocks.patch_columns, step_x)  # [B, I, J, C, PY, PX]
    scale_BIJ = patches.abs().amax((3, 4, 5)) / 127
    scale_BIJ = torch.where(scale_BIJ == 0, 1, scale_BIJ)
    codes = (patches / scale_BIJ[..., None, None, None]).round_().to(torch.int8)
    codes = codes.unflatten(-1, (-1, stride)).permute(0, 1, 2, 4, 6, 5, 3)  # [B, I, J, PY, phase, step, C]
    codes_RC = F.pad(codes, (0, tap_columns(C) - C)).reshape(-1, tap_columns(C))
    scale = scale_BIJ.repeat_interleave(blocks.rows, 1).repeat_interleave(blocks.columns, 2)
    return codes_RC, scale.reshape(-1, 1)


def windows_of(codes_RC: Tensor, blocks: Blocks) -> Tensor:
    """[P, Kp] int8, columns (tap, channel), zero from T Ct on: what every output multiplies its weights with, k^2 times
    as much as there is. For products that read a matrix."""
    window, CT = blocks.window, codes_RC.shape[1]
    words = codes_RC.view(torch.int64).view(
        window.batch, blocks.down, blocks.across, blocks.patch_rows, window.stride, blocks.steps, CT // 8
    )
    P, KP = window.out_pixels, padded(window.taps * CT)
    matrix_PK = codes_RC.new_empty((P, KP))
    matrix_PK[:, window.taps * CT :] = 0
    out = matrix_PK.view(torch.int64).view(
        window.batch, blocks.down, blocks.rows, blocks.across, blocks.columns, KP // 8
    )
    last = (blocks.rows - 1) * window.stride + 1
    for tap in range(window.taps):
        u, v = tap // window.kernel, tap % window.kernel
        first = v // window.stride
        part = words[:, :, :, u : u + last : window.stride, v % window.stride, first : first + blocks.columns]
        out[..., tap * CT // 8 : (tap + 1) * CT // 8] = part.transpose(2, 3)
    return matrix_PK
