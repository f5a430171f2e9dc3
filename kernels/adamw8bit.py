"""AdamW with both moments in 8 bits, one launch for all factors: 2.03 bytes of state a value instead of 8.

    m = b1 m + (1 - b1) g        v = b2 r^2 + (1 - b2) g^2        r = sqrt(v)                    float32, from decoded codes
    p = (1 - decay) p - rate m / (r root + eps)       decay = lr wd,  rate = lr / (1 - b1^t),  root = (1 - b2^t)^-1/2

and then m and r are coded, in blocks of 256 values of a factor with a float32 scale each. A code is a small float relative to
its block's largest value: exponent and mantissa as in IEEE 754 with subnormals, top = 2 - 2^-M, scale = max / top.

    m   sign, 3 bits of exponent, 4 of mantissa     rounded by 3.1 % of itself at most, from 1/124 of the largest on
    r   3 bits of exponent, 5 of mantissa           1.6 %, from 1/126 on; never 0 beside another that is not

r is kept instead of v because the update divides by it, and half the exponent range does. The floor of r matters: a block
holds values whose gradients differ by orders of magnitude, and a root rounded to 0 would make an update of m / eps; Dettmers'
dynamic codes of v do that. Against float32 AdamW the update is off by 5 to 6 % where gradients of a block vary by e^(+-1)
(dynamic codes of m and r: 7 to 10 %) and keeps its length within 1 %; by e^(+-1.5), 22 % (14 %).
Nothing is drawn at random, and no fused multiply-add is used: a CPU and a GPU give the same bits.

Sources: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019); Dettmers et al., "8-bit Optimizers via Block-wise
Quantization" (arXiv 2110.02861).
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from loragraft.kernels.layout import on_device, uses_triton

BLOCK = 256
BLOCKS = 4  # of one program
LEAST = 1e-30  # smaller maxima count as 0: their reciprocals would overflow
SIGNED, UNSIGNED = (3, 4), (3, 5)  # bits of exponent and mantissa, of m and of r
CASES = ((1,), (256,), (300, 7, 4096), (16 * 40, 2048 + 255, 1, 130))  # sizes of the factors


@triton.jit
def _encoded(b_x, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """(codes of |x|, scale [BLOCKS]) of x [BLOCKS, 256]."""
    TOP: tl.constexpr = 2.0 - 2.0**-MANTISSA
    b_x = tl.abs(b_x)
    b_max = tl.max(b_x, axis=1)
    b_max = tl.where(b_max > 1e-30, b_max, 0.0)
    b_inverse = tl.where(b_max > 0.0, tl.div_rn(TOP, tl.where(b_max > 0.0, b_max, 1.0)), 0.0)
    b_y = b_x * b_inverse[:, None]
    b_bits = b_y.to(tl.int32, bitcast=True) + (1 << (22 - MANTISSA))
    b_normal = (b_bits >> (23 - MANTISSA)) - ((128 - 2**EXPONENT) << MANTISSA)
    b_small = (b_y * 2.0 ** (2**EXPONENT - 2 + MANTISSA) + 0.5).to(tl.int32)
    b_codes = tl.where(b_y < 2.0 ** (2 - 2**EXPONENT), b_small, b_normal)
    return tl.minimum(b_codes, 2 ** (EXPONENT + MANTISSA) - 1), tl.div_rn(b_max, tl.full(b_max.shape, TOP, tl.float32))


@triton.jit
def _decoded(b_codes, b_scale, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    b_normal = ((b_codes + ((128 - 2**EXPONENT) << MANTISSA)) << (23 - MANTISSA)).to(tl.float32, bitcast=True)
    b_small = b_codes.to(tl.float32) * 2.0 ** (2 - 2**EXPONENT - MANTISSA)
    return tl.where(b_codes < 2**MANTISSA, b_small, b_normal) * b_scale[:, None]


@triton.jit(do_not_specialize=["values", "blocks"])  # one kernel for any number of factors
def adamw8bit_kernel(
    p_factors, p_work, p_codes, p_scales, values, blocks, keep, rate, beta1, rest1, beta2, rest2, root, eps,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, E_M: tl.constexpr, M_M: tl.constexpr, E_R: tl.constexpr, M_R: tl.constexpr,
):  # fmt: skip
    """p_factors [F, 4]: addresses of a factor and its gradient, its size, its first block. p_work [programs, 2]: a factor and
    the first of the BLOCKS blocks in it. Codes and scales of m, then of r: `values` and `blocks` of each."""
    factor, first = tl.load(p_work + 2 * tl.program_id(0)), tl.load(p_work + 2 * tl.program_id(0) + 1)
    p_p = tl.load(p_factors + 4 * factor).to(tl.pointer_type(tl.float32))
    p_g = tl.load(p_factors + 4 * factor + 1).to(tl.pointer_type(tl.float32))
    size, base = tl.load(p_factors + 4 * factor + 2), tl.load(p_factors + 4 * factor + 3)
    o_b = first.to(tl.int64) + tl.arange(0, BLOCKS)
    o_i = o_b[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    m_i, m_b = o_i < size, o_b * BLOCK < size
    p_m = p_codes + base * BLOCK + o_i
    p_m_scale = p_scales + base + o_b
    b_p, b_g = tl.load(p_p + o_i, mask=m_i, other=0.0), tl.load(p_g + o_i, mask=m_i, other=0.0)
    b_code = tl.load(p_m, mask=m_i, other=0).to(tl.int32)
    b_m = _decoded(b_code & 127, tl.load(p_m_scale, mask=m_b, other=0.0), E_M, M_M)
    b_m = tl.where(b_code > 127, -b_m, b_m)
    b_code = tl.load(p_m + values, mask=m_i, other=0).to(tl.int32)
    b_r = _decoded(b_code, tl.load(p_m_scale + blocks, mask=m_b, other=0.0), E_R, M_R)
    b_m = b_m * beta1 + b_g * rest1
    b_r = tl.sqrt_rn((b_r * b_r) * beta2 + (b_g * b_g) * rest2)
    b_p = b_p * keep - tl.div_rn(b_m, b_r * root + eps) * rate
    tl.store(p_p + o_i, b_p, mask=m_i)
    b_code, b_scale = _encoded(b_m, E_M, M_M)
    b_code = tl.where(b_m < 0, b_code + 128, b_code)
    tl.store(p_m, b_code.to(tl.uint8), mask=m_i)
    tl.store(p_m_scale, b_scale, mask=m_b)
    b_code, b_scale = _encoded(b_r, E_R, M_R)
    tl.store(p_m + values, tl.maximum(b_code, 1).to(tl.uint8), mask=m_i)
    tl.store(p_m_scale + blocks, b_scale, mask=m_b)


def encode(x: Tensor, format: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """|x| [blocks, 256] float32 -> (codes int32, scale [blocks, 1])."""
    exponent, mantissa = format
    top = 2 - 2.0**-mantissa
    x = x.abs()
    largest = x.amax(1, keepdim=True)
    largest = torch.where(largest > LEAST, largest, 0.0)
    inverse = torch.where(largest > 0, top / torch.where(largest > 0, largest, 1.0), 0.0)
    y = x * inverse
    normal = ((y.view(torch.int32) + (1 << (22 - mantissa))) >> (23 - mantissa)) - ((128 - 2**exponent) << mantissa)
    small = (y * 2.0 ** (2**exponent - 2 + mantissa) + 0.5).to(torch.int32)
    codes = torch.where(y < 2.0 ** (2 - 2**exponent), small, normal)
    return codes.clamp_max(2 ** (exponent + mantissa) - 1), largest / top


def decode(codes: Tensor, scale: Tensor, format: tuple[int, int]) -> Tensor:
    """The inverse of `encode`, float32."""
    exponent, mantissa = format
    codes = codes.to(torch.int32)
    normal = ((codes + ((128 - 2**exponent) << mantissa)) << (23 - mantissa)).view(torch.float32)
    return torch.where(codes < 2**mantissa, codes * 2.0 ** (2 - 2**exponent - mantissa), normal) * scale


def _reference(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], codes: Tensor, scales: Tensor,
    keep: float, rate: float, beta1: float, rest1: float, beta2: float, rest2: float, root: float, eps: float,
) -> None:  # fmt: skip
    """The kernel in plain torch, operation by operation."""
    p, g = _flat(parameters), _flat(gradients)
    signed = codes[0].view(-1, BLOCK)
    m = decode(signed & 127, scales[0, :, None], SIGNED)
    m = torch.where(signed > 127, -m, m) * beta1 + g * rest1
    r = decode(codes[1].view(-1, BLOCK), scales[1, :, None], UNSIGNED)
    v = (r * r) * beta2 + (g * g) * rest2
    r = v.double().sqrt().float()  # MKL's float32 root is an ulp off now and then
    p = p * keep - (m / (r * root + eps)) * rate
    first = 0
    for parameter in parameters:
        parameter.copy_(p.view(-1)[first : first + parameter.numel()].view_as(parameter))
        first += count_blocks(parameter) * BLOCK
    coded, scale = encode(m, SIGNED)
    codes[0], scales[0] = torch.where(m < 0, coded + 128, coded).to(torch.uint8).view(-1), scale[:, 0]
    coded, scale = encode(r, UNSIGNED)
    codes[1], scales[1] = coded.clamp_min(1).to(torch.uint8).view(-1), scale[:, 0]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All values [blocks, 256], every tensor filled up with zeros to whole blocks."""
    return torch.cat([
        torch.nn.functional.pad(t.reshape(-1), (0, -t.numel() % BLOCK)) for t in tensors
    ]).view(-1, BLOCK)  # fmt: skip


def count_blocks(factor: Tensor) -> int:
    """Blocks of a factor, the last of them perhaps not full."""
    return -(-factor.numel() // BLOCK)


@torch.library.custom_op("loragraft::adamw8bit", mutates_args=("parameters", "codes", "scales"))
def _adamw8bit(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], codes: Tensor, scales: Tensor,
    keep: float, rate: float, beta1: float, rest1: float, beta2: float, rest2: float, root: float, eps: float,
) -> None:  # fmt: skip
    numbers = (keep, rate, beta1, rest1, beta2, rest2, root, eps)
    if not uses_triton(codes):
        return _reference(parameters, gradients, codes, scales, *numbers)
    sizes = tuple(parameter.numel() for parameter in parameters)
    first, work = _layout(sizes, codes.device)
    rows = zip((p.data_ptr() for p in parameters), (g.data_ptr() for g in gradients), sizes, first, strict=True)
    factors = torch.tensor(list(rows))  # addresses may be others at every step: no synchronous copy
    factors = factors.pin_memory().to(codes.device, non_blocking=True) if codes.is_cuda else factors
    with on_device(codes):
        adamw8bit_kernel[(len(work),)](
            factors, work, codes, scales, codes.shape[1], scales.shape[1], *numbers,
            BLOCKS=BLOCKS, BLOCK=BLOCK, E_M=SIGNED[0], M_M=SIGNED[1], E_R=UNSIGNED[0], M_R=UNSIGNED[1],
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return None


@lru_cache(maxsize=4)
def _layout(sizes: tuple[int, ...], device: torch.device) -> tuple[tuple[int, ...], Tensor]:
    """(first block of each factor, p_work of the kernel on the device)."""
    blocks = torch.tensor([-(-size // BLOCK) for size in sizes])
    programs = -(-blocks // BLOCKS)
    factor = torch.repeat_interleave(torch.arange(len(sizes)), programs)
    start = torch.arange(int(programs.sum())) - (programs.cumsum(0) - programs)[factor]
    work = torch.stack([factor, start * BLOCKS], 1).to(torch.int32)
    return tuple((blocks.cumsum(0) - blocks).tolist()), work.to(device)


@_adamw8bit.register_fake
def _(parameters, gradients, codes, scales, keep, rate, beta1, rest1, beta2, rest2, root, eps):
    return None


@torch.no_grad()
def adamw8bit(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], codes: Tensor, scales: Tensor, *,
    step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """Step `step` (the first is 1) in place. codes uint8 [2, 256 blocks], scales float32 [2, blocks]: of m and of r, zeros at first.

    Raises ValueError for factors or gradients that are not float32 and contiguous on the device of the codes, or do not fit.
    """
    for which, tensors in (("factor", parameters), ("gradient", gradients)):
        for t in tensors:
            if t.dtype != torch.float32 or not t.is_contiguous() or t.device != codes.device:
                raise ValueError(
                    f"adamw8bit: a {which} is {t.dtype} on {t.device}, must be contiguous float32 on {codes.device}"
                )
    blocks = sum(count_blocks(parameter) for parameter in parameters)
    if (
        [p.shape for p in parameters] != [g.shape for g in gradients]
        or codes.shape[1] != blocks * BLOCK
        or scales.shape[1] != blocks
    ):
        raise ValueError(
            f"adamw8bit: {len(parameters)} factors in {blocks} blocks of {BLOCK}, {len(gradients)} gradients, codes "
            f"{tuple(codes.shape)}, scales {tuple(scales.shape)}: they must be of equal shapes, [2, {blocks * BLOCK}] and [2, {blocks}]"
        )  # fmt: skip
    beta1, beta2 = betas
    _adamw8bit(
        [p.detach() for p in parameters], list(gradients), codes, scales, 1 - lr * weight_decay, lr / (1 - beta1**step),
        beta1, 1 - beta1, beta2, 1 - beta2, (1 - beta2**step) ** -0.5, eps,
    )  # fmt: skip
