"""Round a weight matrix to four bits: the three code systems of this project, as pure functions.

Shapes: N out features, K in features, g group size, G = Kp / g groups, Kp = K rounded up to a multiple of 128 (the added
columns hold zero weights). Every function computes the codes with the scales *as they are stored*, so that the returned
`dense_NK` is what the kernels multiply with, and nothing is rounded a second time when a checkpoint is written.

* `round_progressive` (native, W4A8): QServe's QoQ (arXiv:2405.04532, section 4.1), asymmetric:
  row_scale = max|W_n| / 119;  I = clip(round(W / row_scale), -119, 119)
  per group: s in 1..15, z = clip(round(-min I / s), 0, 15), u = clip(round(I / s) + z, 0, 15);  W ~ row_scale (u - z) s
  |round(I/s) s| <= 119 + s/2 <= 126.5, hence (u - z) s stays inside INT8 ("protective range").
* `round_symmetric` (interchange, W4A4): scale = max|W_group| / 7 in bfloat16, codes -7..7 (SVDQuant, arXiv:2411.05007).
* `round_affine` (W4A16): scale = (max - min) / 15 and zero = min of the group in bfloat16, W ~ c scale + zero, c in 0..15.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from loragraft.kernels.layout import padded

ROW_LIMIT = 119
"""Largest first-level code of QoQ: leaves room for the second level's rounding inside INT8."""
SCALE_SEARCH = (0, -1, 1, -2)
"""Offsets from round(range / 15) that are tried for a group's integer scale; the smallest squared error wins."""


@dataclass(frozen=True)
class RoundedWeight:
    """Codes of one weight, what they stand for, and the scales under their checkpoint names."""

    codes_NK: Tensor
    """[N, Kp] uint8 in 0..15, or int8 in -7..7 for the symmetric code."""
    dense_NK: Tensor
    """[N, K] float32: the value of the codes."""
    scales: dict[str, Tensor]
    """`row_scale` [N] f32 + `group_scale`, `group_zero` u8 [G, N]; or `wscale` (+ `wzero`) bf16 [G, N]."""


def _grouped(weight_NK: Tensor, group_size: int) -> Tensor:
    """[N, K] -> [N, G, g] in float32, zero-padded to Kp columns."""
    N, K = weight_NK.shape
    return pad(weight_NK.float(), (0, padded(K) - K)).view(N, -1, group_size)


def round_progressive(weight_NK: Tensor, group_size: int) -> RoundedWeight:
    """QoQ's two levels with the branch-free range fix s <= 15; see the module's head."""
    K = weight_NK.shape[1]
    weight_NGg = _grouped(weight_NK, group_size)
    row_scale = weight_NGg.abs().amax(dim=(1, 2)) / ROW_LIMIT
    row_scale = torch.where(row_scale > 0, row_scale, torch.ones_like(row_scale))
    wanted = weight_NGg / row_scale[:, None, None]  # not yet rounded: the second level sees the true value's error
    first = wanted.round().clamp_(-ROW_LIMIT, ROW_LIMIT)
    # Zero belongs to the range, or a group of one sign would need a zero point outside 0..15.
    low, high = first.amin(-1).clamp(max=0), first.amax(-1).clamp(min=0)
    base = ((high - low) / 15).round()
    scale = base.clamp(1, 15)
    best, best_error, best_zero = scale, torch.full_like(scale, torch.inf), torch.zeros_like(scale)
    for offset in SCALE_SEARCH:
        scale = (base + offset).clamp(1, 15)
        zero = (-low / scale).round().clamp_(0, 15)
        error = (_progressive_values(first, scale, zero) - wanted).square_().sum(-1)
        better = error < best_error
        best, best_zero = torch.where(better, scale, best), torch.where(better, zero, best_zero)
        best_error = torch.where(better, error, best_error)
    codes = ((first / best[..., None]).round() + best_zero[..., None]).clamp_(0, 15)
    dense = (codes - best_zero[..., None]) * best[..., None] * row_scale[:, None, None]
    scales = {
        "row_scale": row_scale,
        "group_scale": best.T.contiguous().to(torch.uint8),
        "group_zero": best_zero.T.contiguous().to(torch.uint8),
    }
    return RoundedWeight(codes.flatten(1).to(torch.uint8), dense.flatten(1)[:, :K], scales)


def _progressive_values(first_NGg: Tensor, scale_NG: Tensor, zero_NG: Tensor) -> Tensor:
    """(u - z) s for the second level's codes u of the integers `first_NGg`."""
    code = (first_NGg / scale_NG[..., None]).round_().add_(zero_NG[..., None]).clamp_(0, 15)
    return code.sub_(zero_NG[..., None]).mul_(scale_NG[..., None])


def round_symmetric(weight_NK: Tensor, group_size: int) -> RoundedWeight:
    """Signed codes with one bfloat16 scale per group; an all-zero group gets scale 1."""
    K = weight_NK.shape[1]
    weight_NGg = _grouped(weight_NK, group_size)
    scale = (weight_NGg.abs().amax(-1) / 7).to(torch.bfloat16)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = (weight_NGg / scale.float()[..., None]).round().clamp_(-7, 7)
    dense = codes * scale.float()[..., None]
    return RoundedWeight(codes.flatten(1).to(torch.int8), dense.flatten(1)[:, :K], {"wscale": scale.T.contiguous()})


def round_affine(weight_NK: Tensor, group_size: int) -> RoundedWeight:
    """Unsigned codes with a bfloat16 scale and offset per group; a constant group gets scale 1."""
    K = weight_NK.shape[1]
    weight_NGg = _grouped(weight_NK, group_size)
    low, high = weight_NGg.amin(-1), weight_NGg.amax(-1)
    zero = low.to(torch.bfloat16)
    scale = ((high - zero.float()) / 15).to(torch.bfloat16)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = ((weight_NGg - zero.float()[..., None]) / scale.float()[..., None]).round().clamp_(0, 15)
    dense = codes * scale.float()[..., None] + zero.float()[..., None]
    scales = {"wscale": scale.T.contiguous(), "wzero": zero.T.contiguous()}
    return RoundedWeight(codes.flatten(1).to(torch.uint8), dense.flatten(1)[:, :K], scales)
