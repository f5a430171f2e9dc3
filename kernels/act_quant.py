"""Activation quantization: x' = (x / smooth) H, then symmetric codes with one scale per token or per 64 channels.

    bits = 8   a_m  = max_k |x'_mk| / 127           codes_mk = round(x'_mk / a_m)              scale [M, 1]
    bits = 4   a_mG = bf16(max_{k in G} |x'_mk| / 7) codes_mk = clamp(round(x'_mk / a_mG), +-7)  scale [M, K/64]
    unsigned   x' = (x + 0.171875) / smooth, /15 for /7, codes clamped to 0..15 (bits = 4 only, from column unsigned_from on)

Rounding is half to even; a row or group of zeros has scale 1. Codes are int8 [M, Kp], zero from K on; scales are float32,
those of 4 bits holding a bf16 value (what W4A4 checkpoints' runtimes store: nunchaku `gemm_w4a4.cuh`).
The dequantized x is ((codes * scale) H) * smooth, as H H = I; less 0.171875 if unsigned. Unsigned is for what tanh-GELU
puts out, which is above -0.17004: shifted, it has no negative half to waste codes on (nunchaku's `SHIFT_GELU`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loragraft.kernels.layout import GROUP, apply_hadamard, on_device, padded, uses_triton
from loragraft.kernels.tiles import hadamard_tile, round_half_even
from loragraft.kernels.token_quant import quantize_down

LEVELS = {8: 127, 4: 7}
UNSIGNED_LEVELS = 15
GELU_SHIFT = 0.171875  # 11 / 64: exact in bf16
CPU_CHUNK = 1 << 17  # elements per round of elementwise passes: float32 intermediates stay in a core's cache
CASES = ((1, 64), (7, 128), (77, 192), (33, 1280), (5, 100))  # (M, K)


def smooth_and_rotate(x_MK: Tensor, smooth_K: Tensor | None, hadamard: bool) -> Tensor:
    """x' = (x / smooth) H in x's dtype; differentiable."""
    x_MK = x_MK if smooth_K is None else x_MK / smooth_K.to(x_MK.dtype)
    return apply_hadamard(x_MK) if hadamard else x_MK


def shift_unsigned(x_MK: Tensor, unsigned_from: int) -> Tensor:
    """x + 0.171875 in the columns from unsigned_from on; differentiable."""
    shift_K = x_MK.new_zeros(x_MK.shape[1])
    shift_K[unsigned_from:] = GELU_SHIFT
    return x_MK + shift_K


def quantize_reference(
    rotated_MK: Tensor, bits: int, *, unsigned: bool = False, unsigned_from: int = 0
) -> tuple[Tensor, Tensor]:
    """x' [M, K] (any float dtype; shifted already if unsigned) -> int8 codes [M, Kp] and scales [M, G] in x's dtype.

    Not differentiable.
    """
    (M, K), levels = rotated_MK.shape, LEVELS[bits]
    KP, G = padded(K), 1 if bits == 8 else padded(K) // GROUP
    x_MK = rotated_MK.detach()
    x_MGg = (x_MK if K == KP else torch.nn.functional.pad(x_MK, (0, KP - K))).view(M, G, KP // G)
    # Two reductions, as abs() would write a copy and vector_norm(inf) takes 10 times longer (1536 x 1280, CPU).
    scale_MG = torch.maximum(x_MGg.amax(dim=-1), -x_MGg.amin(dim=-1))
    split = unsigned_from // GROUP if unsigned else G  # groups before it are signed
    scale_MG[:, :split] /= levels
    scale_MG[:, split:] /= UNSIGNED_LEVELS
    scale_MG = scale_MG.to(torch.bfloat16).to(scale_MG.dtype) if bits == 4 else scale_MG
    scale_MG = torch.where(scale_MG == 0, 1, scale_MG)
    codes_MGg = (x_MGg / scale_MG[..., None]).round_()
    if bits == 4:
        codes_MGg[:, :split].clamp_(-levels, levels)
        codes_MGg[:, split:].clamp_(0, UNSIGNED_LEVELS)
    return codes_MGg.to(torch.int8).view(M, KP), scale_MG


def dequantize_activation(codes_MK: Tensor, scale_MG: Tensor, dtype: torch.dtype) -> Tensor:
    """codes * scale, each scale over Kp / G columns, in `dtype`: x' again, still rotated and smoothed."""
    (M, KP), G = codes_MK.shape, scale_MG.shape[1]
    return codes_MK.view(M, G, KP // G).to(dtype).mul_(scale_MG[..., None].to(dtype)).view(M, KP)


@triton.jit
def _load_rotated(
    p_x, p_smooth, o_m, o_k, M, K, HAS_SMOOTH: tl.constexpr, HADAMARD: tl.constexpr,
    SHIFTED: tl.constexpr = False, shift=0.0,
):  # fmt: skip
    mask = (o_m < M)[:, None] & (o_k < K)[None, :]
    b_x = tl.load(p_x + o_m.to(tl.int64)[:, None] * K + o_k[None, :], mask=mask, other=0.0).to(tl.float32)
    if SHIFTED:
        b_x = tl.where(mask, b_x + shift, 0.0)
    if HAS_SMOOTH:
        b_smooth = tl.load(p_smooth + o_k, mask=o_k < K, other=1.0).to(tl.float32)
        b_x = tl.math.div_rn(b_x, tl.broadcast_to(b_smooth[None, :], b_x.shape))
    if HADAMARD:
        b_x = tl.dot(b_x, hadamard_tile(), input_precision="ieee")
    return b_x


@triton.jit
def quantize_group_kernel(
    p_x, p_smooth, p_out, p_scale, M, K, KP, s_out, unsigned_from,
    HAS_SMOOTH: tl.constexpr, HADAMARD: tl.constexpr, UNSIGNED: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """4 bits: one program per group of 64 columns. Without p_scale the output is codes * scale in its own dtype."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    group = tl.program_id(1)
    o_k = group * 64 + tl.arange(0, 64)
    low, high, shift = -7.0, 7.0, 0.0
    if UNSIGNED:
        above = group * 64 >= unsigned_from
        low, high = tl.where(above, 0.0, -7.0), tl.where(above, 15.0, 7.0)
        shift = tl.where(above, 0.171875, 0.0)
    b_x = _load_rotated(p_x, p_smooth, o_m, o_k, M, K, HAS_SMOOTH, HADAMARD, UNSIGNED, shift)
    b_max = tl.max(tl.abs(b_x), axis=1) + tl.sum(
        b_x * 0.0, axis=1
    )  # a maximum drops NaN, and codes hide it: carry it into the scale
    b_scale = tl.math.div_rn(b_max, tl.full((BM,), high, tl.float32))
    b_bits = b_scale.to(tl.int32, bitcast=True)  # to bf16 by bits: the interpreter's own cast truncates
    b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & -65536
    b_scale = tl.where(b_scale == b_scale, b_bits.to(tl.float32, bitcast=True), b_scale)  # a NaN's bits may overflow
    b_scale = tl.where(b_scale == 0, 1.0, b_scale)
    b_codes = round_half_even(tl.math.div_rn(b_x, tl.broadcast_to(b_scale[:, None], b_x.shape)))
    b_codes = tl.minimum(tl.maximum(b_codes, low), high)
    o_row = o_m.to(tl.int64)
    if p_scale is None:
        b_codes *= b_scale[:, None]
    else:
        tl.store(p_scale + o_row * (KP // 64) + group, b_scale, mask=o_m < M)
    tl.store(p_out + o_row[:, None] * s_out + o_k[None, :], b_codes.to(p_out.dtype.element_ty), mask=(o_m < M)[:, None])


@torch.library.custom_op("loragraft::quantize_activation", mutates_args=())
def _quantize_activation(
    x_MK: Tensor, smooth_K: Tensor | None, hadamard: bool, bits: int, unsigned: bool = False, unsigned_from: int = 0
) -> tuple[Tensor, Tensor]:
    if not uses_triton(x_MK):
        rows = max(1, CPU_CHUNK // x_MK.shape[1])
        widened = (part.float() for part in x_MK.split(rows))
        shifted = (shift_unsigned(part, unsigned_from) if unsigned else part for part in widened)
        rotated = (smooth_and_rotate(part, smooth_K, hadamard) for part in shifted)
        parts = [quantize_reference(part, bits, unsigned=unsigned, unsigned_from=unsigned_from) for part in rotated]
        return torch.cat([codes for codes, _ in parts]), torch.cat([scale for _, scale in parts])
    (M, K), KP = x_MK.shape, padded(x_MK.shape[1])
    codes_MK = x_MK.new_empty((M, KP), dtype=torch.int8)
    scale_MG = x_MK.new_empty((M, 1 if bits == 8 else KP // GROUP), dtype=torch.float32)
    if M == 0:
        return codes_MK, scale_MG
    x_MK, smooth_K, BM = x_MK.contiguous(), None if smooth_K is None else smooth_K.contiguous(), 16
    if bits == 8:
        codes_MK, scale_MG, _ = quantize_down(x_MK, smooth_K, hadamard, x_MK.new_empty((0, K)))
        return codes_MK, scale_MG
    with on_device(x_MK):
        quantize_group_kernel[(triton.cdiv(M, BM), KP // GROUP)](
            x_MK, smooth_K, codes_MK, scale_MG, M, K, KP, KP, unsigned_from,
            HAS_SMOOTH=smooth_K is not None, HADAMARD=hadamard, UNSIGNED=unsigned, BM=BM,
        )  # fmt: skip
    return codes_MK, scale_MG


@_quantize_activation.register_fake
def _(
    x_MK: Tensor, smooth_K: Tensor | None, hadamard: bool, bits: int, unsigned: bool = False, unsigned_from: int = 0
) -> tuple[Tensor, Tensor]:
    M, KP = x_MK.shape[0], padded(x_MK.shape[1])
    codes_MK = x_MK.new_empty((M, KP), dtype=torch.int8)
    return codes_MK, x_MK.new_empty((M, 1 if bits == 8 else KP // GROUP), dtype=torch.float32)


def quantize_activation(
    x_MK: Tensor, smooth_K: Tensor | None, hadamard: bool, bits: int, *, unsigned: bool = False, unsigned_from: int = 0
) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (codes int8 [M, Kp], scale float32 [M, G]); see the formula above. Not differentiable.

    Raises ValueError if bits is neither 8 nor 4, x is not a matrix, hadamard is asked of a K that 64 does not divide,
    unsigned of 8 bits or of a rotation (which brings the signs back), or unsigned_from is not the first column of a group.
    """
    if bits not in LEVELS:
        raise ValueError(f"quantize_activation: bits = {bits}, must be 8 (per token) or 4 (per group of {GROUP})")
    if x_MK.ndim != 2:
        raise ValueError(
            f"quantize_activation: x has shape {tuple(x_MK.shape)}, must be [M, K]; flatten the tokens first"
        )
    if hadamard and x_MK.shape[1] % GROUP:
        raise ValueError(
            f"quantize_activation: hadamard needs K % {GROUP} == 0, K = {x_MK.shape[1]}; pass hadamard=False"
        )
    if unsigned and (bits != 4 or hadamard):
        raise ValueError(
            f"quantize_activation: unsigned needs bits = 4 and no rotation, not bits = {bits}, hadamard = {hadamard}"
        )
    check_unsigned_from("quantize_activation", x_MK.shape[1], unsigned, unsigned_from)
    codes_MK, scale_MG = _quantize_activation(x_MK.detach(), smooth_K, hadamard, bits, unsigned, unsigned_from)
    return codes_MK, scale_MG


def check_unsigned_from(op: str, K: int, unsigned: bool, unsigned_from: int) -> None:
    """Raises ValueError if unsigned_from is not the first column of a group, or is given without unsigned."""
    if unsigned_from % GROUP or not 0 <= unsigned_from < K or (unsigned_from and not unsigned):
        raise ValueError(
            f"{op}: unsigned_from = {unsigned_from}, must be 0 or, with unsigned, a multiple of {GROUP} below K = {K}"
        )


def round_to_groups(
    x_MK: Tensor, smooth_K: Tensor | None, hadamard: bool, unsigned: bool, unsigned_from: int, out_MK: Tensor
) -> None:
    """codes * scale of `quantize_activation` with 4 bits into out [M, Kp], rows of any stride. Runs Triton only."""
    (M, K), BM = x_MK.shape, 16
    with on_device(x_MK):
        quantize_group_kernel[(triton.cdiv(M, BM), padded(K) // GROUP)](
            x_MK, smooth_K, out_MK, None, M, K, padded(K), out_MK.stride(0), unsigned_from,
            HAS_SMOOTH=smooth_K is not None, HADAMARD=hadamard, UNSIGNED=unsigned, BM=BM,
        )  # fmt: skip
