"""Windows of a convolution as shifted pixels: what a tap reads, and the low-rank branch's sums over taps.

    pixel q = (b, y, x) of the input, p = (b, i, j) of the output, tap t = (u, v) of a k x k kernel
    q(p, t) = (b, i stride + u - padding, j stride + v - padding), nothing outside of the image

    sum_taps      h_pr  = sum_t e_q(p,t)tr         e = x D^T [M, T R]: the branch's k x k convolution as one matrix product
    spread_taps   g_tqr = g_pr where q = q(p, t)   its adjoint: dA_t = g_t^T x, one product per tap

Neither writes the k^2 copies of x that im2col would: e and g have R columns a tap where x has C.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from loragraft.kernels.layout import GROUP, on_device, rank_rows, uses_triton


class Window(NamedTuple):
    """Input pixels and the window over them; an op takes it as a list of integers."""

    batch: int
    height: int
    width: int
    kernel: int
    stride: int
    padding: int

    @property
    def taps(self) -> int:
        """T = k^2."""
        return self.kernel * self.kernel

    @property
    def pixels(self) -> int:
        """M."""
        return self.batch * self.height * self.width

    @property
    def out_height(self) -> int:
        """Rows of the output."""
        return (self.height + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def out_width(self) -> int:
        """Columns of the output."""
        return (self.width + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def out_size(self) -> tuple[int, int]:
        """Rows and columns of the output."""
        return self.out_height, self.out_width

    @property
    def out_pixels(self) -> int:
        """P."""
        return self.batch * self.out_height * self.out_width


def tap_columns(channels: int) -> int:
    """Columns of one tap in the codes: C rounded up to 64, so that no group and no rotation crosses a tap."""
    return (channels + GROUP - 1) // GROUP * GROUP


def pad_taps(matrix: Tensor, channels: int) -> Tensor:
    """[..., T C] -> [..., T Ct] with zeros behind every tap; as it is where 64 divides C."""
    width = tap_columns(channels)
    if width == channels:
        return matrix
    return pad(matrix.unflatten(-1, (-1, channels)), (0, width - channels)).flatten(-2)


def trim_taps(matrix: Tensor, channels: int, taps: int) -> Tensor:
    """[..., >= T Ct] -> [..., T C]: without the padding behind every tap and at the end."""
    width = tap_columns(channels)
    matrix = matrix[..., : taps * width]
    if width == channels:
        return matrix
    return matrix.unflatten(-1, (taps, width))[..., :channels].flatten(-2)


@triton.jit
def sum_taps_kernel(
    p_e, p_h, P, H, W, HO, WO, R, s_em, s_hp,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    o_p, o_r = tl.program_id(0) * BP + tl.arange(0, BP), tl.arange(0, BR)
    b_y = o_p // WO % HO * STRIDE - PADDING
    b_x = o_p % WO * STRIDE - PADDING
    b_first = (o_p // (WO * HO)).to(tl.int64) * H
    acc = tl.zeros((BP, BR), tl.float32)
    for tap in tl.static_range(KERNEL * KERNEL):
        b_row, b_column = b_y + tap // KERNEL, b_x + tap % KERNEL
        inside = (o_p < P) & (b_row >= 0) & (b_row < H) & (b_column >= 0) & (b_column < W)
        p_tap = p_e + ((b_first + b_row) * W + b_column)[:, None] * s_em + (tap * R + o_r)[None, :]
        acc += tl.load(p_tap, mask=inside[:, None] & (o_r < R)[None, :], other=0.0).to(tl.float32)
    p_out = p_h + o_p.to(tl.int64)[:, None] * s_hp + o_r[None, :]
    tl.store(p_out, acc.to(p_h.dtype.element_ty), mask=(o_p < P)[:, None] & (o_r < R)[None, :])


@triton.jit
def spread_taps_kernel(
    p_g, p_out, M, H, W, HO, WO, R, s_gp,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    o_m, o_r, tap = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BR), tl.program_id(1)
    b_row, b_column = o_m // W % H + PADDING - tap // KERNEL, o_m % W + PADDING - tap % KERNEL
    b_i, b_j = b_row // STRIDE, b_column // STRIDE
    whole = (b_row >= 0) & (b_column >= 0) & (b_row % STRIDE == 0) & (b_column % STRIDE == 0)
    inside = (o_m < M) & whole & (b_i < HO) & (b_j < WO)
    b_p = ((o_m // (W * H)).to(tl.int64) * HO + b_i) * WO + b_j
    b_g = tl.load(p_g + b_p[:, None] * s_gp + o_r[None, :], mask=inside[:, None] & (o_r < R)[None, :], other=0.0)
    p_tap = p_out + (tap.to(tl.int64) * M + o_m)[:, None] * R + o_r[None, :]
    tl.store(p_tap, b_g, mask=(o_m < M)[:, None] & (o_r < R)[None, :])


def sum_taps(e_MTR: Tensor, rank: int, window: Window) -> Tensor:
    """e [M, T R] with rows of any stride -> h [P, R] (`rank_rows`) in e's dtype, summed in float32."""
    h_PR = rank_rows(e_MTR[:1].expand(window.out_pixels, -1), rank)
    if not rank:
        return h_PR
    if not uses_triton(e_MTR):
        return h_PR.copy_(_sum_taps_reference(e_MTR, rank, window))
    with on_device(e_MTR):
        sum_taps_kernel[(triton.cdiv(window.out_pixels, 32),)](
            e_MTR, h_PR, window.out_pixels, window.height, window.width, window.out_height, window.out_width, rank,
            e_MTR.stride(0), h_PR.stride(0), KERNEL=window.kernel, STRIDE=window.stride, PADDING=window.padding,
            BP=32, BR=max(16, triton.next_power_of_2(rank)), num_warps=4,
        )  # fmt: skip
    return h_PR


def _sum_taps_reference(e_MTR: Tensor, rank: int, window: Window) -> Tensor:
    e = e_MTR.float().view(window.batch, window.height, window.width, window.taps, rank)
    total = e.new_zeros((window.batch, window.out_height, window.out_width, rank))
    edge = pad(e, (0, 0, 0, 0, window.padding, window.padding, window.padding, window.padding))
    for tap in range(window.taps):
        total += _of_tap(edge[..., tap, :], tap, window)
    return total.view(-1, rank)


def spread_taps(g_PR: Tensor, window: Window) -> Tensor:
    """g [P, R] -> [T, M, R]: for every tap, the gradient that each input pixel's R values of e get."""
    R = g_PR.shape[1]
    if not uses_triton(g_PR):
        grid = g_PR.view(window.batch, window.out_height, window.out_width, R)
        edge = 2 * window.padding
        parts = []
        for tap in range(window.taps):
            wide = grid.new_zeros((window.batch, window.height + edge, window.width + edge, R))
            _of_tap(wide, tap, window).copy_(grid)
            inner = wide[
                :, window.padding : window.padding + window.height, window.padding : window.padding + window.width
            ]
            parts.append(inner.reshape(-1, R))
        return torch.stack(parts)
    out = g_PR.new_empty((window.taps, window.pixels, R))
    with on_device(g_PR):
        spread_taps_kernel[(triton.cdiv(window.pixels, 64), window.taps)](
            g_PR, out, window.pixels, window.height, window.width, window.out_height, window.out_width, R,
            g_PR.stride(0), KERNEL=window.kernel, STRIDE=window.stride, PADDING=window.padding,
            BM=64, BR=max(16, triton.next_power_of_2(R)), num_warps=4,
        )  # fmt: skip
    return out


def _of_tap(padded_BHWR: Tensor, tap: int, window: Window) -> Tensor:
    """The view [B, HO, WO, R] of a padded image that one tap of every output pixel reads."""
    u, v, s = tap // window.kernel, tap % window.kernel, window.stride
    rows, columns = u + s * (window.out_height - 1) + 1, v + s * (window.out_width - 1) + 1
    return padded_BHWR[:, u:rows:s, v:columns:s]
