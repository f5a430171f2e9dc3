"""Four-bit floating point, E2M1, with a scale per block of inputs: NVFP4 and MXFP4.

    E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; code = sign << 3 | index; round to nearest, ties to an even index

    mxfp4: blocks of 32, E8M0 scale X = 2^(floor(log2 max|v|) - 2), stored with bias 127;   v ~ E2M1 X;   4.25 bits
    nvfp4: blocks of 16, E4M3 scale b and one float32 t = max|tensor| / (6 * 448),
           b = E4M3(max|v| / (6 t));   v ~ E2M1 b t;   4.5 bits

Tensor cores of Blackwell multiply these; here they are stored so and computed as products of what the codes stand for. Activations
have t per token instead of per tensor, so that no image depends on its neighbours in a batch.
Sources: OCP Microscaling Formats (MX) 1.0, sections 5.2, 5.3, 6.3; NVIDIA, "Introducing NVFP4"; PTX ISA `mma` with
`.kind::mxf4nvf4`. Packing as torch.float4_e2m1fn_x2: the low nibble is the even column.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from loragraft.kernels.layout import pack_int4
from loragraft.quantization.rowwise import E4M3_MAX, to_e4m3

E2M1_MAX, E2M1_EXPONENT = 6.0, 2
"""The largest value, and its exponent."""
MX_BLOCK, NV_BLOCK = 32, 16
BIAS, EXPONENT_FIELD = 127, 0x7F800000
"""Of float32, and of E8M0."""
SMALLEST_E4M3 = 2.0**-9


def e2m1_codes(values: Tensor) -> Tensor:
    """Nearest E2M1 codes, uint8 0..15; values beyond 6 saturate."""
    size = values.abs().clamp(max=E2M1_MAX)
    # Between 0 and 2 the values are 0.5 apart, then 1, then 2; indices go on at 4 and at 6.
    index = torch.where(size < 2, (2 * size).round(), torch.where(size < 4, size.round() + 2, (size / 2).round() + 4))
    return index.to(torch.uint8) | (torch.signbit(values).to(torch.uint8) << 3)


def e2m1_values(codes: Tensor) -> Tensor:
    """float32 values of codes 0..15."""
    index = (codes & 7).float()
    size = torch.where(index < 4, index / 2, torch.where(index < 6, index - 2, 2 * index - 8))
    return torch.where(codes > 7, -size, size)


def e2m1_round(values: Tensor) -> Tensor:
    """`e2m1_values(e2m1_codes(values))` for float32, without codes."""
    held = values.clamp(-E2M1_MAX, E2M1_MAX)
    # Half the power of two below: values between 2^e and 2^(e+1) are 2^(e-1) apart, and 0.5 below 2.
    step = (held.abs().clamp(min=1).view(torch.int32) & EXPONENT_FIELD).view(torch.float32) / 2
    return (held / step).round() * step


def tables() -> dict[str, Tensor]:
    """`pairs` [256, 2]: the two values of a byte. Looked up, never stored."""
    byte = torch.arange(256, dtype=torch.uint8)
    return {"pairs": torch.stack((e2m1_values(byte & 15), e2m1_values(byte >> 4)), dim=1)}


def _blocks(matrix: Tensor, size: int) -> Tensor:
    """[M, K] -> [M, blocks, size] in float32, zeros after the last column."""
    M, K = matrix.shape
    return (pad(matrix.float(), (0, -K % size)) if K % size else matrix.float()).reshape(M, -1, size)


def _mx_exponent(blocks_MBk: Tensor) -> Tensor:
    """Shared exponents [M, B] as stored, 0..254; a block of zeros has 127, scale 1."""
    largest = blocks_MBk.abs().amax(-1)
    exponent = torch.frexp(largest).exponent - 1 - E2M1_EXPONENT  # frexp's mantissa is 0.5 to 1
    return torch.where(largest > 0, exponent.clamp(-BIAS, BIAS) + BIAS, BIAS).to(torch.uint8)


def _mx_scale(stored: Tensor) -> Tensor:
    """2^(stored - 127), exact: the exponent of a float32, whose field 0 would be zero."""
    return torch.where(stored == 0, 1 << 22, stored.int() << 23).view(torch.float32)


def _nv_scales(blocks_MBk: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """(E4M3 scales [M, B], t) for a largest value that broadcasts against [M, B]."""
    whole = largest / (E2M1_MAX * E4M3_MAX)
    whole = torch.where(whole > 0, whole, torch.ones_like(whole))
    wanted = blocks_MBk.abs().amax(-1) / E2M1_MAX / whole
    return to_e4m3(wanted.clamp(min=SMALLEST_E4M3)), whole


def encode_mx(weight_NK: Tensor) -> dict[str, Tensor]:
    """`qweight` u8 [N, Kp/2], `block_scale` u8 [N, Kp/32], Kp = K rounded up to whole blocks."""
    blocks = _blocks(weight_NK, MX_BLOCK)
    stored = _mx_exponent(blocks)
    codes = e2m1_codes(blocks / _mx_scale(stored)[..., None])
    return {"qweight": pack_int4(codes.flatten(1)), "block_scale": stored}


def encode_nv(weight_NK: Tensor) -> dict[str, Tensor]:
    """`qweight` u8 [N, Kp/2], `block_scale` u8 [N, Kp/16] (E4M3), `tensor_scale` f32 [1]."""
    blocks = _blocks(weight_NK, NV_BLOCK)
    scale, whole = _nv_scales(blocks, blocks.abs().amax().view(1, 1))
    codes = e2m1_codes(blocks / (scale.float() * whole)[..., None])
    return {"qweight": pack_int4(codes.flatten(1)), "block_scale": scale.view(torch.uint8), "tensor_scale": whole[0]}


def decode(tensors: dict[str, Tensor], K: int) -> Tensor:
    """[N, K] in float32, of either format."""
    stored = tensors["block_scale"]
    if "tensor_scale" in tensors:
        scale = stored.view(torch.float8_e4m3fn).float() * tensors["tensor_scale"]
    else:
        scale = _mx_scale(stored)
    values = tensors["pairs"].index_select(0, tensors["qweight"].flatten().int())
    return (values.view(*scale.shape, -1) * scale[..., None]).flatten(1)[:, :K]


def round_mx(x_MK: Tensor) -> Tensor:
    """x as MXFP4 holds it, in its own dtype (exact in bfloat16)."""
    blocks = _blocks(x_MK, MX_BLOCK)
    scale = _mx_scale(_mx_exponent(blocks))[..., None]
    return (e2m1_round(blocks / scale) * scale).flatten(1)[:, : x_MK.shape[1]].to(x_MK.dtype)


def round_nv(x_MK: Tensor) -> Tensor:
    """x as NVFP4 holds it, with one float32 scale per row, in its own dtype."""
    blocks = _blocks(x_MK, NV_BLOCK)
    scale, whole = _nv_scales(blocks, blocks.abs().amax(dim=(1, 2))[:, None])
    step = (scale.float() * whole)[..., None]
    return (e2m1_round(blocks / step) * step).flatten(1)[:, : x_MK.shape[1]].to(x_MK.dtype)
