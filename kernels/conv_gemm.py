"""INT8 convolution as an implicit matrix product, on any GPU with INT8 tensor cores and in Triton's interpreter.

    y_pn = s_n sum_t a_q sum_c x_qc w_ntc  +  sum_r h_pr u_nr  +  bias_n          q = q(p, t), see `taps`

x INT8 codes, one scale a_q per pixel; w INT8 [N, Kp], columns (tap, channel) with Ct = C rounded up to 64 of each tap. A
tap's sum is exact in INT32 and joins a float32 sum with the scale of its pixels: k^2 conversions of a tile, against
C / 64 tensor core steps each. Pixels outside of the image are loads that are masked off; no im2col matrix is written.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loragraft.kernels.gemm import _tile
from loragraft.kernels.hopper_gemm import card_name
from loragraft.kernels.layout import on_device
from loragraft.kernels.taps import Window

CONFIGS: dict[str, dict[str, int]] = {
    "small": {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 4},
    "narrow": {"BM": 64, "BN": 128, "BK": 64, "num_warps": 4, "num_stages": 4},
    "portable": {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 4},
    "deep": {"BM": 128, "BN": 128, "BK": 128, "num_warps": 8, "num_stages": 4},
}
"""What `conv_gemm` can be told to use; all but "deep" fit into the 99 KB of sm_86, sm_89 and sm_120."""


@triton.jit
def conv_gemm_kernel(
    p_x, p_a, p_w, p_s, p_h, p_up, p_bias, p_y, P, N, H, W, HO, WO, XC, KP, CT, R, s_hp, s_un, s_ur,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, RANKS: tl.constexpr, BR: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Y tile [BM, BN]. XC: row length of x. RANKS steps of BR ranks."""
    t_p, t_n = _tile(tl.program_id(0), P, N, BM, BN, GROUP_M)
    o_p, o_n, o_k = t_p * BM + tl.arange(0, BM), t_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    # Rows beyond the end repeat the last one and are not stored.
    r_p, r_n = tl.minimum(o_p, P - 1), tl.minimum(o_n, N - 1)
    b_y0, b_x0 = r_p // WO % HO * STRIDE - PADDING, r_p % WO * STRIDE - PADDING
    b_q0 = ((r_p // (WO * HO)) * H + b_y0) * W + b_x0
    p_wt = p_w + r_n.to(tl.int64)[None, :] * KP + o_k[:, None]
    b_tap = tl.zeros((BM, BN), tl.int32)
    acc = tl.zeros((BM, BN), tl.float32)
    channel, tap = 0, 0
    for _ in tl.range(0, KERNEL * KERNEL * (CT // BK)):
        u, v = tap // KERNEL, tap % KERNEL
        inside = (b_y0 + u >= 0) & (b_y0 + u < H) & (b_x0 + v >= 0) & (b_x0 + v < W)
        b_q = b_q0 + u * W + v
        p_xt = p_x + b_q.to(tl.int64)[:, None] * XC + (channel + o_k)[None, :]
        b_tap = tl.dot(tl.load(p_xt, mask=inside[:, None], other=0), tl.load(p_wt), b_tap, out_dtype=tl.int32)
        p_wt += BK
        channel += BK
        if channel == CT:
            b_a = tl.load(p_a + b_q, mask=inside, other=0.0)
            acc += b_tap.to(tl.float32) * b_a[:, None]
            b_tap = tl.zeros((BM, BN), tl.int32)
            channel = 0
            tap += 1
    acc *= tl.load(p_s + r_n)[None, :]
    for rank in tl.static_range(RANKS):
        o_r = rank * BR + tl.arange(0, BR)
        b_h = tl.load(p_h + r_p.to(tl.int64)[:, None] * s_hp + o_r[None, :], mask=(o_r < R)[None, :], other=0.0)
        b_up = tl.load(p_up + r_n[None, :] * s_un + o_r[:, None] * s_ur, mask=(o_r < R)[:, None], other=0.0)
        acc = tl.dot(b_h, b_up, acc, input_precision="ieee")
    if p_bias is not None:
        acc += tl.load(p_bias + r_n).to(tl.float32)[None, :]
    p_out = p_y + o_p.to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(p_out, acc.to(p_y.dtype.element_ty), mask=(o_p < P)[:, None] & (o_n < N)[None, :])


def conv_gemm(
    x_MC: Tensor, a_M1: Tensor, weight: Tensor, s_N: Tensor, h_PR: Tensor, up_NR: Tensor, bias: Tensor | None,
    window: Window, columns: int, config: str,
) -> Tensor:  # fmt: skip
    """y [P, N] in h's dtype; x int8 [M, >= Ct], weight int8 [N, Kp] with `columns` = Ct of each tap, h [P, R], up [N, R].

    config: a name of `CONFIGS`.
    """
    (N, R), tiles = up_NR.shape, CONFIGS[config]
    if columns % tiles["BK"]:
        tiles = {**tiles, "BK": 64}  # 320 channels are five times 64
    P = window.out_pixels
    y_PN = h_PR.new_empty((P, N))
    with on_device(x_MC):
        conv_gemm_kernel[(triton.cdiv(P, tiles["BM"]) * triton.cdiv(N, tiles["BN"]),)](
            x_MC, a_M1, weight, s_N, h_PR, up_NR, bias, y_PN, P, N, window.height, window.width, window.out_height,
            window.out_width, x_MC.stride(0), weight.stride(0), columns, R, h_PR.stride(0), *up_NR.stride(),
            KERNEL=window.kernel, STRIDE=window.stride, PADDING=window.padding, RANKS=triton.cdiv(R, 16), BR=16,
            GROUP_M=8, **tiles,
        )  # fmt: skip
    return y_PN


def conv_config(device: torch.device, window: Window, outputs: int, columns: int) -> str | None:
    """What benchmarks/conv.py found fastest on this card for such a shape and up to twice as many pixels; None if nothing."""
    if device.type != "cuda":
        return None
    P = window.out_pixels
    rows = [
        row
        for row in _tuned(card_name(device))
        if (row["N"], row["Ct"], row["stride"]) == (outputs, columns, window.stride)
    ]
    near = [row for row in rows if 2 * row["P"] >= P and row["P"] <= 2 * P]
    return str(min(near, key=lambda row: abs(row["P"] - P))["config"]) if near else None


@cache
def _tuned(card: str) -> tuple[dict[str, Any], ...]:
    file = Path(__file__).parent / "tuned" / f"{card}.json"
    return tuple(json.loads(file.read_text()).get("conv", ())) if file.is_file() else ()
