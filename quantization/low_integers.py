"""INT3 and INT2 weights: unsigned codes with a bfloat16 scale and offset per group of 64 inputs, w ~ c scale + zero.

The ends of a group's range are drawn in by the factor that leaves the smallest squared error: with four or eight levels, the rare
large weight is better cut off (Lin et al., AWQ, arXiv:2306.00978, search the same clipping). 3.5 and 2.5 bits per weight.
Packing, low bits first: 3 bits, eight codes in three bytes; 2 bits, four codes in one.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from loragraft.kernels.layout import padded

GROUP = 64
CLIPS = tuple(1 - 0.05 * i for i in range(11))
"""Shares of the range that are tried, 1 to 0.5."""


def layout(N: int, K: int, bits: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Kp is K rounded up to 128."""
    Kp = padded(K)
    grouped = (Kp // GROUP, N), torch.bfloat16
    return {"qweight": ((N, Kp * bits // 8), torch.uint8), "wscale": grouped, "wzero": grouped}


def encode(weight_NK: Tensor, bits: int) -> dict[str, Tensor]:
    """Codes and scales under their checkpoint names."""
    N, K = weight_NK.shape
    groups = pad(weight_NK.float(), (0, padded(K) - K)).view(N, -1, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    levels = 2**bits - 1
    best: tuple[Tensor, ...] | None = None
    for clip in CLIPS:
        zero = (clip * low).bfloat16().float()
        scale = ((clip * high - zero) / levels).bfloat16().float()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        codes = ((groups - zero) / scale).round_().clamp_(0, levels)
        error = (codes * scale + zero - groups).square_().sum(-1, keepdim=True)
        tried = (error, scale, zero, codes)
        best = (
            tried
            if best is None
            else tuple(torch.where(error < best[0], a, b) for a, b in zip(tried, best, strict=True))
        )
    assert best is not None  # CLIPS is not empty
    _, scale, zero, codes = best
    tensors = {"qweight": pack(codes.flatten(1).to(torch.uint8), bits)}
    return tensors | {
        name: value[..., 0].T.to(torch.bfloat16).contiguous() for name, value in (("wscale", scale), ("wzero", zero))
    }


def decode(tensors: dict[str, Tensor], K: int, bits: int) -> Tensor:
    """[N, K] in float32."""
    codes = unpack(tensors["qweight"], bits).float()
    scale, zero = (tensors[name].T.float()[..., None] for name in ("wscale", "wzero"))
    return (codes.view(len(codes), -1, GROUP) * scale + zero).flatten(1)[:, :K]


def pack(codes_NK: Tensor, bits: int) -> Tensor:
    """uint8 codes below 2^bits [N, K], K a multiple of 8 -> uint8 [N, K bits / 8]."""
    eight = codes_NK.int().view(len(codes_NK), -1, 8)
    shifts = torch.arange(8, device=codes_NK.device, dtype=torch.int32) * bits
    words = (eight << shifts).sum(-1, keepdim=True, dtype=torch.int32)
    places = torch.arange(bits, device=codes_NK.device, dtype=torch.int32) * 8
    return ((words >> places) & 255).to(torch.uint8).flatten(1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes [N, K] of `pack`."""
    places = torch.arange(bits, device=packed.device, dtype=torch.int32) * 8
    words = (packed.int().view(len(packed), -1, bits) << places).sum(-1, keepdim=True, dtype=torch.int32)
    shifts = torch.arange(8, device=packed.device, dtype=torch.int32) * bits
    return ((words >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(1)
